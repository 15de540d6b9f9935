"""Workers of a step: what they add up, and who keeps which part of the optimizer.

Each worker runs its own streams through the whole model, and workers meet once a step. Streams differ in length, so
meeting within one, as wrappers of modules do, would have all workers wait for the longest, pass by pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from segcore.training.optimizer import MasterOptimizer

# Numbers that are added up at once, in memory of their own.
BUNDLE = 2**24

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Workers:
    """All workers of a run, each of which calls the same things in the same order; a worker alone needs no others."""

    def __init__(self) -> None:
        self._joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self._joined else 0
        self.world = dist.get_world_size() if self._joined else 1

    def sum(self, *values: float) -> list[float]:
        """The sums of everyone's numbers, in fp64."""
        total = torch.tensor(values, dtype=torch.float64)
        if self._joined:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What everyone has, by rank."""
        values: list[Any] = [None] * self.world
        if not self._joined:
            return [value]
        dist.all_gather_object(values, value)
        return values

    def add_up(self, gradients: Sequence[Tensor]) -> None:
        """Replace each by the sum over the workers. They travel together: an adapter has hundreds of small ones."""
        for together in _bundles(gradients) if self._joined else ():
            flat_N = torch.cat([gradient.flatten() for gradient in together])
            dist.all_reduce(flat_N)
            parts = flat_N.split([gradient.numel() for gradient in together])
            for gradient, part in zip(together, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def mesh(self, device: torch.device) -> DeviceMesh:
        return init_device_mesh(device.type, (self.world,))


def _bundles(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one kind, `BUNDLE` numbers together, or one that is larger alone."""
    bundle: list[Tensor] = []
    for tensor in tensors:
        alike = bundle and (bundle[0].dtype, bundle[0].device) == (tensor.dtype, tensor.device)
        if bundle and not (alike and sum(t.numel() for t in bundle) + tensor.numel() <= BUNDLE):
            yield bundle
            bundle = []
        bundle.append(tensor)
    if bundle:
        yield bundle


class Optimizer(Protocol):
    """Moves the parameters by the sum of all workers' gradients; every worker calls everything."""

    masters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def step(self) -> float:
        """As `MasterOptimizer.step`."""
        ...


class Replicated:
    """Everyone keeps everything, and takes the same step."""

    def __init__(self, parameters: list[nn.Parameter], make: Make, max_norm: float | None, workers: Workers) -> None:
        self._inner, self._workers = MasterOptimizer(parameters, make, max_norm=max_norm), workers
        self.masters, self.optimizer = self._inner.masters, self._inner.optimizer

    def step(self) -> float:
        self._workers.add_up(self._inner.gradients)
        return self._inner.step()


class Sharded:
    """Each keeps a part of every gradient's sum, master and optimizer state, cut along the first dimension, as FSDP2
    does (arXiv 2304.11277). Weights stay whole on every worker, see above; so do gradients until the step."""

    def __init__(
        self, parameters: list[nn.Parameter], make: Make, max_norm: float | None, workers: Workers, device: torch.device
    ) -> None:
        self._parameters, self._mesh = parameters, workers.mesh(device)
        self._collected: dict[nn.Parameter, Tensor] = {}
        self.masters = [nn.Parameter(self._shard(p.detach().to(_wide(p)))) for p in parameters]
        self._inner = MasterOptimizer(self.masters, make, max_norm=max_norm)
        self.optimizer = self._inner.optimizer
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._collect)

    def step(self) -> float:
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            gradient = self._collected.pop(parameter, None)
            mine = torch.zeros_like(parameter, dtype=master.dtype) if gradient is None else gradient
            master.grad = DTensor.from_local(mine, self._mesh, [Partial()]).redistribute(placements=[Shard(0)])
        norm = self._inner.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self.masters, strict=True):
                parameter.copy_(whole(master))
        return norm

    def _shard(self, value: Tensor) -> DTensor:
        return distribute_tensor(value, self._mesh, [Shard(0)])

    def _collect(self, parameter: Tensor) -> None:
        """Add a gradient that was just made to those before it, in fp32 at least."""
        assert parameter.grad is not None
        assert isinstance(parameter, nn.Parameter)
        before, new = self._collected.get(parameter), parameter.grad.to(_wide(parameter))
        self._collected[parameter] = new if before is None else before.add_(new)
        parameter.grad = None


def whole(value: Tensor) -> Tensor:
    """A tensor, or all shards of it together; then every worker calls this."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()


def like(value: Tensor, model: Tensor) -> Tensor:
    """Place a whole tensor as another of its shape is."""
    if not isinstance(model, DTensor):
        return value.to(model.device)
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
