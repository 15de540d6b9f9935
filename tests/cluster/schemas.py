"""Objects against their schemas, strictly: what a schema doesn't name is wrong, where a server would drop it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

KUBERNETES = "1.34"


def core_faults(thing: dict[str, Any]) -> list[str]:
    """What is wrong with an object of Kubernetes' own kinds."""
    try:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}"]
    return []


class CustomKinds:
    """Kinds that custom resource definitions define."""

    def __init__(self, folder: Path) -> None:
        self._validators: dict[tuple[str, str], Draft202012Validator] = {}
        for file in sorted(folder.glob("*.yaml")):
            definition = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]
            for version in definition["versions"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                name = (f"{definition['group']}/{version['name']}", definition["names"]["kind"])
                self._validators[name] = Draft202012Validator(schema)

    def faults(self, thing: dict[str, Any]) -> list[str]:
        """What is wrong with an object. Raises KeyError for a kind that nobody defined."""
        validator = self._validators[thing["apiVersion"], thing["kind"]]
        return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(thing)]


def strict(schema: Any) -> Any:
    """An OpenAPI v3 schema of a definition as JSON Schema, in which unnamed fields are wrong."""
    if not isinstance(schema, dict):
        return schema
    made = {name: value for name, value in schema.items() if not name.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if made.pop("nullable", False) and "type" in made:
        made["type"] = [made["type"], "null"]
    if "properties" in made:
        made["properties"] = {name: strict(value) for name, value in made["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for below in ("items", "additionalProperties"):
        if below in made:
            made[below] = strict(made[below])
    return made
