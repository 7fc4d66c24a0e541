"""YAML as recipes have it: no key twice, no tag that makes an object, and back to what JSON has."""

from __future__ import annotations

import math
from typing import Any

import yaml


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice in one mapping (plain YAML keeps the last one silently)."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        checked = self.__dict__.setdefault("_checked", set())
        seen: set[str] = set()
        for key, _ in node.value if id(node) not in checked else ():  # flattening adds merged keys: look before it
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} stands twice in one mapping", key.start_mark
                    )
                seen.add(key.value)
        checked.add(id(node))
        super().flatten_mapping(node)
        # Later pairs win. Without this, merges of merges grow without bound.
        node.value = list(
            {k.value if isinstance(k, yaml.ScalarNode) else id(k): (k, v) for k, v in node.value}.values()
        )


def load_yaml(text: str) -> Any:
    """The document in a text. Raises ValueError, in one line, for what is not one."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
        # The latter are what PyYAML itself raises for e.g. `!!timestamp soon` or `!!int ''`.
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def plain(value: Any) -> Any:
    """The same value as JSON has it: YAML also knows dates, sets and keys that are not text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, set):
        return sorted(str(item) for item in value)
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite and isinstance(value, (str, int, float, bool, type(None))) else str(value)


def kind_of(value: Any) -> str:
    """What a value is, in words for a message."""
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
