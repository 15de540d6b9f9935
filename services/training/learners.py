"""What a run trains of a model: its weights or something beside them, by their predictions; or gates of its heads."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from segcore.config import DuoConfig, SegmentConfig, SegmentedConfig
from segcore.heads.gates import GatesReport
from segcore.retrieval.query_maps import QueryMaps
from segcore.training.gates import GateTrainer
from segcore.training.lora import LoraSettings, add_lora, load_adapter, save_adapter
from segcore.training.selectors import SelectorLoss
from segcore.training.stream import TrainingStream
from segcore.training.tbptt import SegmentedTrainer, StreamLoss
from segcore.weights import LoadedModel, load_model
from services.training.checkpoint import save_weights
from services.training.config import GatesSection, SelectorsSection, TrainConfig
from services.training.estimate import require_memory

GATES = "gates.json"


class Learner(Protocol):
    """model: as it was loaded. named: the parameters that are trained, by name."""

    model: LoadedModel
    named: dict[str, nn.Parameter]

    def choices(self, stream: TrainingStream) -> int:
        """How many choices of the stream teach selectors."""
        ...

    def loss_and_grad(self, stream: TrainingStream, valid_tokens: int, choices: int) -> StreamLoss:
        """As `SegmentedTrainer.loss_and_grad`."""
        ...

    def moved(self) -> None:
        """The optimizer has taken a step."""
        ...

    def scorer(self) -> SegmentedTrainer:
        """What evaluation runs: the policy to serve with, as it is now."""
        ...

    def save(self, folder: Path, step: int) -> None:
        """Write what was learnt, for `open_learner` and for serving. Raises OSError, SafetensorError."""
        ...


def open_learner(config: TrainConfig, device: torch.device, start: Path | None) -> Learner:
    """Load the model, with what a checkpoint says was learnt of it, or as it begins. Raises SegcoreError."""
    require_memory(config, device)
    return Predictions(config, device, start) if config.gates is None else Gates(config, config.gates, device, start)


class Predictions:
    """Weights, an adapter, selectors' maps: what next tokens teach."""

    def __init__(self, config: TrainConfig, device: torch.device, start: Path | None) -> None:
        self._config, self.model = config, _load(config, device, start)
        self._trainer = _trainer(config, self.model, config.segment_config())
        self.named = dict(self.model.lm.model.named_parameters())
        if self.model.lm.query_maps is not None:
            self.named |= {f"query_maps.{name}": p for name, p in self.model.lm.query_maps.named_parameters()}
        self.named = {name: p for name, p in self.named.items() if p.requires_grad}

    def choices(self, stream: TrainingStream) -> int:
        return len(self._trainer.lessons(stream))

    def loss_and_grad(self, stream: TrainingStream, valid_tokens: int, choices: int) -> StreamLoss:
        return self._trainer.loss_and_grad(stream, valid_tokens, choices)

    def moved(self) -> None:
        pass

    def scorer(self) -> SegmentedTrainer:
        return _trainer(self._config, self.model, self._config.evaluation_segment())

    def save(self, folder: Path, step: int) -> None:
        segment = self._config.evaluation_segment()
        if self._config.whole:
            save_weights(folder, self.model, segment)
        else:
            save_adapter(self.model.lm, folder, base_model=self._config.model, segment=segment)


class Gates:
    """Gates of KV heads, taught by full attention's hidden states; weights stay. The loss is their squared distance."""

    def __init__(self, config: TrainConfig, gates: GatesSection, device: torch.device, start: Path | None) -> None:
        segment = config.segment_config()
        assert isinstance(segment, DuoConfig)
        self._config, self._share = config, gates.share
        self.model = load_model(config.model, dtype=config.dtype, device=str(device), trainable=True)
        self.model.lm.model.requires_grad_(False)
        self._trainer = GateTrainer(
            self.model.lm, segment, sparsity=gates.sparsity, checkpoint_layers=config.checkpoint_layers
        )
        self.named = {"gates": self._trainer.gates_LH}
        if start is not None:
            gates_LH = self._trainer.gates_LH.data
            gates_LH.copy_(torch.tensor(GatesReport.read(start / GATES).gates, dtype=gates_LH.dtype))

    def choices(self, stream: TrainingStream) -> int:
        return 0

    def loss_and_grad(self, stream: TrainingStream, valid_tokens: int, choices: int) -> StreamLoss:
        loss = self._trainer.loss_and_grad(stream, valid_tokens)
        return StreamLoss(loss.distance * stream.valid_tokens, stream.valid_tokens, SelectorLoss())

    def moved(self) -> None:
        self._trainer.clamp()

    def scorer(self) -> SegmentedTrainer:
        return _trainer(self._config, self.model, self._report(0).apply(self._config.segment_config()))

    def save(self, folder: Path, step: int) -> None:
        self._report(step).write(folder / GATES)

    def _report(self, step: int) -> GatesReport:
        return self._trainer.report(self._config.model, self._share, step)


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Random numbers from here on follow from these alone."""
    mixed = int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=4).digest())
    random.seed(mixed)
    torch.manual_seed(mixed)


def _load(config: TrainConfig, device: torch.device, start: Path | None) -> LoadedModel:
    """The model with the weights, or the adapter, of a checkpoint, or as it begins."""
    name = str(start) if start is not None and config.whole else config.model
    model = load_model(name, dtype=config.dtype, device=str(device), trainable=True)
    lm, segment = model.lm, config.segment_config()
    if not config.whole:
        lm.model.requires_grad_(False)
    begun = config.adapter if start is None else start
    if begun is not None and not config.whole:
        load_adapter(lm, begun, name=config.model)
        if config.lora is None:
            lm.model.requires_grad_(False)
    elif config.lora is not None:
        seed_everything(config.seed, -1, 0)
        add_lora(lm, LoraSettings(**config.lora.model_dump()))
    if config.selectors is not None and lm.query_maps is None:
        assert isinstance(segment, SegmentedConfig)
        lm.query_maps = QueryMaps(segment.selectors, lm.spec)
    if lm.query_maps is not None:
        lm.query_maps.requires_grad_(config.selectors is not None)
    return model


def _trainer(config: TrainConfig, model: LoadedModel, segment: SegmentConfig) -> SegmentedTrainer:
    selectors = config.selectors or SelectorsSection()
    return SegmentedTrainer(
        model.lm,
        segment,
        k=config.k,
        chunk_tokens=config.chunk_tokens,
        checkpoint_layers=config.checkpoint_layers,
        host_bytes=config.past_bytes,
        selector_weight=selectors.weight,
        attention_teaches=selectors.attention_teaches,
        record=None if config.graphs else False,
    )
