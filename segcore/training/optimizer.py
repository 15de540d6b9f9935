"""An optimizer whose weights and gradients are fp32, for a model in bfloat16.

In bfloat16 a weight takes no step smaller than 1/256 of itself, and a sum of many gradients loses most of them. So each
parameter that is narrower than fp32 has a copy in fp32, its master, which the optimizer moves and which collects the
gradients, as soon as a backward pass has made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from segcore.errors import NonFiniteLoss


class MasterOptimizer:
    """Moves parameters by an optimizer of torch, after checking and clipping their gradients.

    make: makes the optimizer of the masters, `partial(torch.optim.AdamW, lr=2e-5)` for example; it is `optimizer` then,
    for schedules. max_norm: gradients are scaled down to this norm, all together; None: as they are. One at a time for
    a parameter: it takes over its `.grad`. Parameters may be shards (DTensor), if every worker takes every step.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        max_norm: float | None = 1.0,
    ) -> None:
        self._parameters, self._max_norm = list(parameters), max_norm
        self.masters = [_master(parameter) for parameter in self._parameters]
        self.optimizer = make(self.masters)
        for parameter, master in self._narrow:
            parameter.register_post_accumulate_grad_hook(lambda p, master=master: _collect(p, master))

    @property
    def gradients(self) -> list[Tensor]:
        """What was collected since the last step, for workers to add up; zeros where there was nothing."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters if master.grad is not None]

    @torch.no_grad()
    def step(self) -> float:
        """One step, after which gradients are gone; returns their norm before it was clipped.

        Raises NonFiniteLoss if it isn't finite; then nothing has moved, and the gradients are still there.
        """
        norm = torch.nn.utils.get_total_norm(self.gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not norm.isfinite():
            raise NonFiniteLoss(f"the gradient's norm is {norm.item()}; no weight was updated")
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.masters, self._max_norm, norm)
        self.optimizer.step()
        for parameter, master in self._narrow:
            parameter.copy_(master)
        self.zero_grad()
        return norm.item()

    def zero_grad(self) -> None:
        """Forget what was collected."""
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, beside gradients."""
        return {"optimizer": self.optimizer.state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the parameters follow."""
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, master, saved in zip(self._parameters, self.masters, state["masters"], strict=True):
            master.copy_(saved)
            parameter.copy_(saved)

    @property
    def _narrow(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The parameters that have a master of their own, with it."""
        return [(p, m) for p, m in zip(self._parameters, self.masters, strict=True) if p is not m]


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype.itemsize >= torch.float32.itemsize:
        return parameter
    return nn.Parameter(parameter.detach().float())


def _collect(parameter: Tensor, master: nn.Parameter) -> None:
    """Move a gradient that was just made to the master's."""
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad += parameter.grad
    parameter.grad = None
