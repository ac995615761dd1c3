"""The fields of a configuration as a JSON Schema, for files that hold one."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any, Literal

from emoe.config import EMoEConfig, GMoEConfig
from emoe.registry import ROUTERS

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_LAYERS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}, "minItems": 1}]}


def config_schema(config: type[EMoEConfig] | type[GMoEConfig]) -> dict[str, dict[str, Any]]:
    """Describe each field of a configuration by the properties of a JSON Schema (2020-12), without defaults.

    >>> config_schema(EMoEConfig)["selection"]["enum"]
    ['top', 'bottom', 'not_top', 'random']
    """
    hints, descriptions = typing.get_type_hints(config), _descriptions(config)
    return {
        field.name: {"description": descriptions[field.name], **_property(field, hints[field.name])}
        for field in dataclasses.fields(config)
    }


def _property(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    if field.name == "layers":
        return _LAYERS
    if field.name == "router":
        return {"enum": list(ROUTERS)}
    if typing.get_origin(hint) is Literal:
        return {"enum": list(typing.get_args(hint))}
    types = [_TYPES[kind] for kind in typing.get_args(hint) or (hint,)]
    return {"type": types[0] if len(types) == 1 else types, **field.metadata}


def _descriptions(config: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each attribute, in one line."""
    found = {}
    for cls in reversed(config.__mro__):
        text = inspect.getdoc(cls) or ""
        _, _, attributes = text.partition("Attributes:\n")
        for name, lines in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", attributes, re.MULTILINE):
            found[name] = re.sub(r":\w+:`([^`]*)`", r"\1", " ".join(lines.split())).replace("``", "'")
    return found
