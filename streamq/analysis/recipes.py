"""Recipes for an analysis: a type on every linear layer of every block, and mixtures of such types. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import yaml

from streamq import resolve, wan
from streamq.errors import UsageError, nearest
from streamq.recipe import APIVERSION, AttentionStep, LinearQuant, Recipe, SmoothStep, parse_recipe
from streamq.recipe_keys import SAVERS
from streamq.savers import formats

EVERY_LAYER = "*blocks.*"  # of every block, VACE's too
INDICES = 40  # in the braces of one pattern


@dataclass(frozen=True)
class TypeRecipe:
    """A type of the library for one format. `recipe`: the library's; `pair`: which of its linear_quant steps is meant.

    `smoothing` and `linear`: those steps as the document has them.
    """

    name: str
    form: str
    recipe: Recipe
    smoothing: tuple[dict[str, Any], ...]
    linear: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """The type on every linear layer of every block."""
        return mixture([(self, [EVERY_LAYER])], self.form, "streamq_analyze_type")


@cache
def served() -> dict[str, list[str]]:
    """Type, or name of a recipe of the library -> the formats that have it, the default format first."""
    recipes = {name: parse_recipe(text, name, f"recipe {name}") for name, text in resolve.library().items()}
    own: dict[str, list[tuple[bool, str]]] = {}
    for recipe in recipes.values():
        about = recipe.document["metadata"]
        own.setdefault(about["quant_type"], []).extend((form != recipe.format, form) for form in about["formats"])
    # The default is the first that is a recipe's own, as in `resolve.recipe_for`.
    found = {kind: [form for _, form in sorted(rows, key=lambda row: row[0])] for kind, rows in own.items()}
    for name, recipe in recipes.items():
        found.setdefault(name, list(recipe.document["metadata"]["formats"]))
    return found


def type_recipe(name: str, form: str) -> TypeRecipe:
    """Raises UsageError for a type that the library or the format does not have, or that is about attention."""
    found = resolve.recipe_for(name, form)
    if any(isinstance(step, AttentionStep) for step in found.process):
        raise UsageError(
            f"--quant_type {name}: it quantizes attention too, and analyze looks at linear layers; take w8a8_mxfp8 or"
            " w4a4_mxfp4"
        )
    steps = found.document["spec"]["process"]
    linear = [i for i, step in enumerate(found.process) if isinstance(step, LinearQuant)]
    about = found.document["metadata"]["quant_type"]
    named = [i for i in linear if _type(found, i) == about] or linear
    smoothing = [steps[i] for i, step in enumerate(found.process) if isinstance(step, SmoothStep)]
    return TypeRecipe(name, form, found, tuple(smoothing), steps[named[0]])


def _type(found: Recipe, index: int) -> str | None:
    step = found.process[index]
    return step.pair.type if isinstance(step, LinearQuant) else None


def pick_format(types: Sequence[str], form: str | None) -> tuple[dict[str, str], str | None]:
    """The format in which each type is looked at, and the one that has them all; None if there is none.

    One type: its default format. Several: the first format that has all of them. Raises UsageError for an unknown type
    or format, and for a type that the format does not have.
    """
    known = served()
    if form is not None and form not in formats():
        raise UsageError(
            f"--format {form}: unknown; this version has {', '.join(formats())}{nearest(form, tuple(formats()))}"
        )
    for name in types:
        if name not in known:
            resolve.recipe_for(name, form)  # raises, with what there is
        if form is not None and form not in known[name]:
            raise UsageError(
                f"--quant_type {name} is not written in the format {form}; it is in: {', '.join(known[name])}"
            )
    if form is None:
        common = [able for able in formats() if all(able in known[name] for name in types)]
        form = known[types[0]][0] if len(types) == 1 else next(iter(common), None)
    return {name: form or known[name][0] for name in types}, form


def mixture(parts: Iterable[tuple[TypeRecipe, list[str]]], form: str, called: str) -> dict[str, Any]:
    """A recipe that gives each type the layers of its patterns; every other layer stays float."""
    smoothing: list[dict[str, Any]] = []
    linear: list[dict[str, Any]] = []
    calibration: dict[str, Any] = {}
    for part, patterns in parts:
        smoothing += [_over(step, patterns) for step in part.smoothing]
        linear.append(_over(part.linear, patterns))
        calibration |= part.recipe.calibration
    saver = next(name for name, own in SAVERS.items() if own == form)
    spec: dict[str, Any] = {"process": smoothing + linear, "save": [{"type": saver}]}
    if calibration:
        spec["calibration"] = calibration
    return {"apiversion": APIVERSION, "metadata": {"config_id": called}, "spec": spec}


def _over(step: Mapping[str, Any], patterns: list[str]) -> dict[str, Any]:
    kept = {key: value for key, value in step.items() if key not in ("include", "exclude", "overrides")}
    return kept | {"include": list(patterns)}  # its own, or YAML would refer to it


def patterns(chosen: Iterable[str], layers: Iterable[str]) -> list[str]:
    """Patterns that match just the `chosen` of `layers`, both native names of layers in blocks, in a fixed order."""
    every = _by_place(layers)
    found: list[str] = []
    for (kind, leaf), numbers in _by_place(chosen).items():
        if numbers == every[kind, leaf]:
            found.append(f"{kind}.*.{leaf}")
            continue
        for start in range(0, len(numbers), INDICES):
            part = numbers[start : start + INDICES]
            where = str(part[0]) if len(part) == 1 else "{" + ",".join(map(str, part)) + "}"
            found.append(f"{kind}.{where}.{leaf}")
    return found


def _by_place(layers: Iterable[str]) -> dict[tuple[str, str], list[int]]:
    """(`blocks`, `ffn.0`) -> the numbers of the blocks that have it, rising."""
    places = []
    for layer in layers:
        block = wan.block_of(layer)
        assert block is not None, layer
        kind, _, number = block.rpartition(".")
        places.append(((kind, layer.removeprefix(f"{block}.")), int(number)))
    return {key: sorted(number for _, number in group) for key, group in groupby(sorted(places), lambda one: one[0])}


def as_yaml(document: Mapping[str, Any], comments: Sequence[str] = ()) -> str:
    """A recipe's text, below comment lines."""
    head = "".join(f"# {line}\n" for line in comments)
    return head + yaml.safe_dump(dict(document), sort_keys=False, width=110, default_flow_style=None)
