"""A manifest against the schema of KubeRay's own CustomResourceDefinition: strict, and after its defaults are filled in.

The API server drops unknown fields silently unless it is asked to be strict, so a mistyped field trains with a default.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from orchestrator.errors import RecipeError

_VERSION = "v1"
_META = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}


def read_schema(path: Path) -> dict[str, Any]:
    """The strict schema of version v1 in a CustomResourceDefinition, or in a file that holds no more than it.

    RecipeError when the file is neither.
    """
    try:
        content = _read(path)
        schema = _of_version(content) if "spec" in content else content
        return _strict({**schema, "properties": {**schema["properties"], **_META}})
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, StopIteration) as error:
        raise RecipeError(f"{path}: defines no RayJob ({error!r}); take ray.io_rayjobs.yaml of a KubeRay release") from error


def schema_problems(manifest: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """One line for each field that is wrong, the field first."""
    defaulted = with_defaults(manifest, schema)
    errors = Draft202012Validator(dict(schema)).iter_errors(defaulted)
    return [line for error in sorted(errors, key=lambda error: list(map(str, error.path))) for line in _told(error)]


def with_defaults(value: Any, schema: Mapping[str, Any]) -> Any:
    """As the API server stores it: without this, a field that has a default would count as missing."""
    if isinstance(value, Mapping):
        properties = schema.get("properties", {})
        missing = {name: each["default"] for name, each in properties.items() if "default" in each and name not in value}
        other = schema.get("additionalProperties")
        inner = {name: properties.get(name, other if isinstance(other, Mapping) else {}) for name in {**value, **missing}}
        return {name: with_defaults(each, inner[name]) for name, each in copy.deepcopy({**value, **missing}).items()}
    if isinstance(value, list | tuple):
        return [with_defaults(each, schema.get("items", {})) for each in value]
    return value


def _read(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    # The one in C where there is one: the definition has more than a million characters.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _of_version(definition: Mapping[str, Any]) -> dict[str, Any]:
    if definition["spec"]["names"]["kind"] != "RayJob":
        raise ValueError(f"it defines a {definition['spec']['names']['kind']}")
    version = next(each for each in definition["spec"]["versions"] if each["name"] == _VERSION)
    return version["schema"]["openAPIV3Schema"]


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Kubernetes' structural schema as JSON Schema, with fields that it does not know forbidden."""
    schema = {key: value for key, value in schema.items() if key != "description"}
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if isinstance(schema.get("properties"), dict):
        schema["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
        # An object of which only the kind is known (metadata) says nothing of its fields.
        if not is_open and schema["properties"]:
            schema["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = _strict(schema[key])
    return schema


def _told(error: ValidationError) -> Iterator[str]:
    where = shown(error.absolute_path)
    # What the library leaves open until an error is complete.
    schema, instance, value = cast("Any", error.schema), cast("Any", error.instance), cast("Any", error.validator_value)
    if error.validator == "additionalProperties":
        known = sorted(schema["properties"])
        for name in sorted(set(instance) - set(known)):
            yield f"{where + '.' if where else ''}{name}: no such field; there are {', '.join(known)}"
    elif error.validator == "required":
        for name in value:
            if name not in instance:
                yield f"{where + '.' if where else ''}{name}: is required and not set"
    else:
        yield f"{where}: {error.message}"


def shown(path: Any) -> str:
    """spec.rayClusterSpec.workerGroupSpecs[0].groupName"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")
