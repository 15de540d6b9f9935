"""An adapter's directory: PEFT's two files, and beside them what segcore needs to run it as it was trained. No torch.

`segcore.json` says which model was trained, under which policy, and what the other files are. Without it a directory
is plain PEFT's, of whose model nothing is known but shapes, and which brings no policy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segcore.config import SegmentConfig, segment_config
from segcore.errors import ConfigError, NotFound

CARD = "segcore.json"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Learned maps of the selectors' queries, if there are any.
SELECTORS_FILE = "segcore_selectors.safetensors"
VERSION = 1


@dataclass(frozen=True)
class Adapter:
    """What an adapter's directory holds.

    base_model: the name under which the trained model was loaded. base: a digest of its weights (`base_digest`); ""
    where it isn't known. segment: the policy and its options that it was trained with; None: not known.
    sha256: of each other file.
    """

    directory: Path
    base_model: str
    base: str
    segment: SegmentConfig | None
    sha256: dict[str, str]

    @property
    def id(self) -> str:
        """What past KV depends on: weights, selectors and policy, wherever the directory lies."""
        text = json.dumps([self.sha256, _options(self.segment)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    @property
    def has_lora(self) -> bool:
        return PEFT_FILES[1] in self.sha256

    @property
    def has_selectors(self) -> bool:
        return SELECTORS_FILE in self.sha256

    @classmethod
    def read(cls, directory: str | Path) -> Adapter:
        """Read and verify. Raises NotFound for what is no adapter's directory, ConfigError for a damaged one."""
        folder = Path(directory)
        if not (folder / CARD).is_file():
            if missing := [name for name in PEFT_FILES if not (folder / name).is_file()]:
                raise NotFound(
                    f"adapter {str(directory)!r} can't be loaded: it has no {' and no '.join(missing)}. Name a"
                    " directory that training or peft's save_pretrained wrote",
                    adapter=directory,
                )
            config = _json(folder / PEFT_FILES[0])
            return cls(folder, str(config.get("base_model_name_or_path") or ""), "", None, hashes(folder, PEFT_FILES))
        card = _json(folder / CARD)
        if card.get("version") != VERSION:
            raise ConfigError(f"{folder / CARD}: version {card.get('version')!r} isn't this segcore's, {VERSION}")
        try:
            segment, sha256 = dict(card["segment"]), dict(card["sha256"])
            adapter = cls(
                folder, card["base_model"], card["base"], segment_config(segment.pop("policy"), **segment), sha256
            )
        except ConfigError as error:
            raise ConfigError(f"{folder / CARD}: {error.message}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{folder / CARD} isn't one of segcore's: {error!r}") from error
        if wrong := [name for name, found in hashes(folder, sha256).items() if found != sha256[name]]:
            raise ConfigError(
                f"adapter {str(directory)!r} is damaged or was changed: {', '.join(wrong)} isn't what {CARD} says;"
                " copy it again"
            )
        return adapter

    def write_card(self) -> None:
        """Write `segcore.json`, last of all files, so that a directory which has it is whole."""
        card = {
            "version": VERSION,
            "base_model": self.base_model,
            "base": self.base,
            "segment": _options(self.segment),
            "sha256": self.sha256,
        }
        (self.directory / CARD).write_text(json.dumps(card, indent=1) + "\n")


def hashes(folder: Path, names: Sequence[str] | dict[str, str]) -> dict[str, str]:
    """The SHA-256 of each file, "" for one that isn't there."""
    found = {}
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            found[name] = ""
    return found


def _options(segment: SegmentConfig | None) -> dict[str, Any] | None:
    return None if segment is None else {"policy": segment.policy, **dataclasses.asdict(segment)}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return dict(values)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} isn't readable: {error}") from error
