"""The API server's strict field validation, from a published CRD, as a JSON schema.

`kubectl apply` asks for `fieldValidation=Strict` (Kubernetes 1.27 and later): fields that the CRD does not name are
refused, and so are duplicates in lists that are maps by a key. The published CRDs are read where they are; none is kept
here. `python -m tests.deploy.crd FILE [VERSION]` prints the schema of one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

if TYPE_CHECKING:
    from collections.abc import Iterator

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
OBJECT_META = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": r"^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": _TEXTS,
        "annotations": _TEXTS,
    },
    "required": ["name"],
    "additionalProperties": False,
}
"""What we may write of metadata; CRDs leave it to the API server."""
_KEPT = ("type", "enum", "pattern", "required", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength")


def strict_schema(crd: dict[str, Any], version: str) -> dict[str, Any]:
    """Return the JSON schema of the objects that the API server accepts for `version` of `crd`."""
    spec = crd["spec"]
    published = next(entry for entry in spec["versions"] if entry["name"] == version)["schema"]["openAPIV3Schema"]
    schema = _convert({**published, "properties": {"spec": published["properties"]["spec"]}})
    schema["properties"] |= {
        "apiVersion": {"const": f"{spec['group']}/{version}"},
        "kind": {"const": spec["names"]["kind"]},
        "metadata": OBJECT_META,
    }
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return schema


def validator(path: Path, version: str) -> Draft202012Validator:
    """Return the validator of the objects of the CRD in `path`."""
    with path.open(encoding="utf-8") as stream:
        crd = yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - safe, in C
    strict = extend(Draft202012Validator, {"x-kubernetes-list-map-keys": _unique_by_keys})
    return strict(strict_schema(crd, version))


def _convert(node: dict[str, Any]) -> dict[str, Any]:
    schema = {key: node[key] for key in _KEPT if key in node}
    if node.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]  # its anyOf says the same
    if node.get("x-kubernetes-list-type") == "set":
        schema["uniqueItems"] = True
    if "x-kubernetes-list-map-keys" in node:
        schema["x-kubernetes-list-map-keys"] = node["x-kubernetes-list-map-keys"]
    if "items" in node:
        schema["items"] = _convert(node["items"])
    if isinstance(node.get("additionalProperties"), dict):
        schema["additionalProperties"] = _convert(node["additionalProperties"])
    elif node.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields"):
        schema["properties"] = {name: _convert(child) for name, child in node.get("properties", {}).items()}
        schema["additionalProperties"] = False
    return schema


def _unique_by_keys(_: Any, keys: list[str], items: Any, __: Any) -> Iterator[ValidationError]:
    seen: set[tuple[Any, ...]] = set()
    for item in items if isinstance(items, list) else ():
        key = tuple(item.get(name) for name in keys)
        if key in seen:
            yield ValidationError(f"two items with {dict(zip(keys, key, strict=True))}")
        seen.add(key)


if __name__ == "__main__":
    with Path(sys.argv[1]).open(encoding="utf-8") as source:
        definition = yaml.safe_load(source)
    chosen = sys.argv[2] if len(sys.argv) > 2 else definition["spec"]["versions"][-1]["name"]
    json.dump(strict_schema(definition, chosen), sys.stdout, separators=(",", ":"), sort_keys=True)
