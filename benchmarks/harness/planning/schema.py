"""Read YAML against a JSON Schema; every error names the file, the key and the nearest valid value."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import SCHEMAS
from benchmarks.harness.planning.tunings import TUNINGS
from emoe.config import ROUTERS, EMoEConfig, GMoEConfig
from emoe.errors import did_you_mean
from emoe.schema import config_schema


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Parse one YAML file.

    Raises:
        DefinitionError: the file is missing or is not valid YAML; names the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a SafeLoader)
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise DefinitionError(f"{path} does not exist{did_you_mean(path.name, near)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DefinitionError(f"{path} is not valid YAML: {error}") from error


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema ``benchmarks/schemas/<name>.schema.yaml``, with the definitions that schemas share."""
    return _schema(name, tuple(ROUTERS), tuple(TUNINGS))


@functools.cache
def _schema(name: str, routers: tuple[str, ...], tunings: tuple[str, ...]) -> dict[str, Any]:
    """A schema as long as these are what is registered."""
    found: dict[str, Any] = read_yaml(SCHEMAS / f"{name}.schema.yaml")
    shared: dict[str, Any] = read_yaml(SCHEMAS / "shared.schema.yaml")["$defs"]
    fields = config_schema(GMoEConfig) | config_schema(EMoEConfig)
    # what the file says of a field of a configuration goes before what the configuration says
    settings = {name: fields[name] for name in fields if name != "version"} | shared["settings"]["properties"]
    settings["router"]["enum"], settings["tune"]["enum"] = list(routers), list(tunings)
    shared["train"]["enum"] += tunings
    for part in ("settings", "method", "row"):
        shared[part]["properties"] = settings | shared[part]["properties"]
    found["$defs"] = shared | found.get("$defs", {})
    Draft202012Validator.check_schema(found)
    return found


def read_checked(path: Path, schema_name: str) -> dict[str, Any]:
    """Read a YAML file, check it against a schema and fill the schema's defaults.

    Raises:
        DefinitionError: names the file, the key and the nearest valid value.
    """
    return check(read_yaml(path), schema_name, str(path))


def check(content: Any, schema_name: str, where: str) -> dict[str, Any]:
    """Check ``content`` against a schema and return it with the defaults filled in."""
    validator = Draft202012Validator(schema(schema_name))
    errors = sorted(validator.iter_errors(content), key=lambda error: (len(error.absolute_path), str(error.path)))
    if errors:
        raise DefinitionError(f"{where}: " + "; ".join(dict.fromkeys(_explain(error) for error in errors[:5])))
    filled = _with_defaults(content, schema(schema_name), schema(schema_name))
    assert isinstance(filled, dict)  # noqa: S101  every schema here describes an object
    return filled


def _explain(error: ValidationError) -> str:
    rule: Any = error.validator_value
    instance: Any = error.instance
    key = _dotted(list(error.absolute_path)) or "the file"
    if error.validator == "additionalProperties" and isinstance(instance, Mapping):
        known = list(cast(Mapping[str, Any], error.schema).get("properties", {}))
        unknown = [name for name in instance if name not in known]
        at = f"{key}." if error.absolute_path else ""
        return "; ".join(f"unknown key '{at}{name}'{did_you_mean(name, known)}" for name in unknown)
    if error.validator == "enum":
        return f"'{key}' is {instance!r}{did_you_mean(instance, rule)}"
    if error.validator == "required":
        missing = [name for name in rule if name not in instance]
        return f"'{key}' needs the key '{missing[0]}'"
    if error.validator == "propertyNames":
        return f"'{key}': {error.message}"
    if error.validator == "type":
        return f"'{key}' is {instance!r}, but must be {_a(rule)}{_float_hint(instance)}"
    if error.validator in ("anyOf", "oneOf") and error.context:
        deepest = max(error.context, key=lambda inner: len(inner.absolute_path))
        if len(deepest.absolute_path) > len(error.absolute_path):
            return _explain(deepest)
        wanted = " or ".join(
            str(inner.validator_value) for inner in error.context if inner.validator in ("type", "enum")
        )
        return f"'{key}' is {instance!r}, but must be {wanted}{_float_hint(instance)}"
    return f"'{key}': {error.message}"


def _a(kinds: Any) -> str:
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)


def _float_hint(value: object) -> str:
    """YAML 1.1 reads ``2e-5`` as text: say how to write it."""
    try:
        return f" (YAML reads {value} as text; write {float(value):.1e})" if isinstance(value, str) else ""
    except ValueError:
        return ""


def _dotted(path: list[str | int]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _with_defaults(content: Any, part: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    if "$ref" in part:
        part = root["$defs"][part["$ref"].removeprefix("#/$defs/")]
    if isinstance(content, dict) and "properties" not in part:
        # null or an object: the object's defaults
        for below in part.get("anyOf", ()):
            if "$ref" in below or "properties" in below:
                return _with_defaults(content, below, root)
    if isinstance(content, dict):
        filled = {}
        properties = part.get("properties", {})
        other = part.get("additionalProperties")
        for name, value in content.items():
            below = properties.get(name, other if isinstance(other, dict) else {})
            filled[name] = _with_defaults(value, below, root)
        for name, below in properties.items():
            if name not in filled and "default" in below:
                filled[name] = _with_defaults(copy.deepcopy(below["default"]), below, root)
        return filled
    if isinstance(content, list) and isinstance(part.get("items"), dict):
        return [_with_defaults(item, part["items"], root) for item in content]
    return content


def check_names(where: str, key: str, names: Iterable[str], known: Collection[str]) -> None:
    """Check the names that a file gives under a key.

    Args:
        where: the file, a quotation mark, and what stands before the key.
        key: the key.
        names: what it names.
        known: what exists.

    Raises:
        DefinitionError: names the nearest that exists.
    """
    for name in names:
        if name not in known:
            at = f"{where}.{key}" if not where.endswith("'") else f"{where}{key}"
            raise DefinitionError(f"{at}' is '{name}', which does not exist{did_you_mean(name, known)}")
