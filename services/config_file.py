"""YAML files whose faults are told with their lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from segcore.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
Location = Sequence[str | int]


def read_config(path: Path, model: type[Model]) -> Model:
    """Read and check a YAML file. Raises ConfigError with a line for each fault: FILE:LINE: KEY: what is wrong.

    The validators of `model` find the file's folder in their context as "folder".
    """
    try:
        text = path.read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
        faults = [f"{path}:{line}: {fault}" for line, fault in _repeated(root)]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} isn't a readable configuration: {error}") from error
    except RecursionError as error:
        raise ConfigError(
            f"{path} isn't a readable configuration: a part of it holds itself, or is nested too deeply"
        ) from error
    if faults:
        raise ConfigError("\n".join(faults))
    try:
        return model.model_validate({} if values is None else values, context={"folder": path.resolve().parent})
    except ValidationError as error:
        faults = [f"{path}:{_line(root, fault['loc'])}: {describe(fault)}" for fault in error.errors()]
        raise ConfigError("\n".join(faults)) from error


def describe(fault: Any) -> str:
    """One of pydantic's errors in words."""
    where = ".".join(str(part) for part in fault["loc"])
    what = "there is no such key" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else str(what)


def _repeated(node: yaml.Node | None) -> Iterator[tuple[int, str]]:
    """Keys that a mapping has twice, of which YAML's own loader would silently take the last."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated(item)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.start_mark.line + 1, f"{key.value}: the key is there twice"
            seen.add(key.value)
            yield from _repeated(value)


def _line(node: yaml.Node | None, location: Location) -> int:
    """Where a value stands, or the nearest that is there of what surrounds it."""
    line = 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if found:
                key, node = found[0]
                line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
