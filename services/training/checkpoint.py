"""Checkpoints: folders that transformers loads, with what training needs to go on beside the weights.

    config.json, model.safetensors, tokenizer ...   the model; of an adapter, PEFT's files; of gates, a heads file
    segcore.json                                    the policy to serve with
    training.safetensors, training.json             fp32 masters and the optimizer's state; `Progress`

Learning rates follow from the step, and so does every worker's random state (`worker.py`). Nothing here is a pickle.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segcore.adapter import SELECTORS_FILE
from segcore.config import SegmentConfig
from segcore.presets import write_card
from segcore.weights import LoadedModel
from services.training.folders import STATE, TENSORS, Progress
from services.training.parallel import Optimizer, like, whole


def save_weights(folder: Path, model: LoadedModel, segment: SegmentConfig) -> None:
    """Write a model as transformers does, its selectors' maps, and the policy to serve it with."""
    model.lm.model.save_pretrained(folder)
    if model.lm.query_maps is not None:
        model.lm.query_maps.write(folder / SELECTORS_FILE)
    model.tokenizer.tokenizer.save_pretrained(folder)
    write_card(folder, segment)


def save_training(folder: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Write what training needs beside the weights. tensors: of `optimizer_tensors`."""
    save_file(tensors, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(dataclasses.asdict(progress), indent=1) + "\n")


def optimizer_tensors(named: Mapping[str, nn.Parameter], optimizer: Optimizer, saved: torch.dtype) -> dict[str, Tensor]:
    """Masters wider than what is `saved` beside them, and the optimizer's state, by the parameters' names, in host
    memory. With shards, every worker calls this."""
    tensors: dict[str, Tensor] = {}
    for name, master in zip(named, optimizer.masters, strict=True):
        state = dict(optimizer.optimizer.state.get(master, {}))
        if master.dtype != saved:
            state["master"] = master
        tensors |= {f"{name}/{key}": whole(value).cpu().clone() for key, value in sorted(state.items())}
    return tensors


@torch.no_grad()
def restore_optimizer(folder: Path, named: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Go on where `optimizer_tensors` was taken; parameters have been loaded."""
    tensors = load_file(folder / TENSORS)
    for (name, parameter), master in zip(named.items(), optimizer.masters, strict=True):
        saved = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
        before = saved.pop("master", parameter.detach())
        master.copy_(like(before, master))
        parameter.copy_(before)
        # A count of steps is one number, wherever the parameter lies.
        optimizer.optimizer.state[master] = {
            key: like(value, master) if value.shape == master.shape else value for key, value in saved.items()
        }
