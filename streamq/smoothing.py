"""Where each group's smoothing vector goes in each format, decided by names alone.

A vector is exact only where its inverse meets the same tensor: in the norm before, in the rows of the layers before, or
in the layer itself (`streamq.wan.groups`). A format says which of these its runtime honours (`Format.WAYS`); a group
for which there is none is left as it is, and the run says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from streamq import wan
from streamq.errors import UsageError
from streamq.quantized import Scheme, Smooth
from streamq.recipe import Recipe, SmoothStep
from streamq.resolve import resolve_smoothing
from streamq.wan import Group, Model


@dataclass
class Placement:
    """What smoothing does to one model in one format.

    `schemes`: every quantized layer's. `folded`: norm tensor -> the vector that it is divided by. `beside`: name of a
    vector's new tensors (`blocks.0.norm1`) -> the vector. `warnings`: groups that stay as they are.
    """

    schemes: dict[str, Scheme]
    folded: dict[str, Smooth] = field(default_factory=dict)
    beside: dict[str, Smooth] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def place(
    recipe: Recipe, form: str, ways: Mapping[str, tuple[str, ...]], model: Model, schemes: Mapping[str, Scheme]
) -> Placement:
    """Give each quantized layer its part in the smoothing that the recipe asks for.

    ways: type -> where the format can put a vector. schemes: layer -> without smoothing. Raises UsageError for a method
    that does not know a layer's type.
    """
    found = Placement(dict(schemes))
    if not any(isinstance(step, SmoothStep) for step in recipe.process):
        return found
    groups = {
        f"{block}.{group.name}": (
            block,
            group,
            tuple(f"{block}.{n}" for n in group.layers if f"{block}.{n}" in schemes),
        )
        for block in model.blocks
        for group in wan.GROUPS
    }
    natives = {name: [wan.to_native(n) for n in layers] for name, (_, _, layers) in groups.items() if layers}
    steps = resolve_smoothing(recipe, natives)
    left: Counter[str] = Counter()
    unable: Counter[str] = Counter()  # of types that no runtime smooths
    for name, step in steps.items():
        block, group, layers = groups[name]
        layers = tuple(layer for layer in layers if ways[schemes[layer].type])
        _check_method(recipe, step, layers, schemes)
        known = ways[schemes[layers[0]].type] if layers else ()
        able = {n: scheme for n, scheme in schemes.items() if ways[scheme.type]}  # to take a vector, in rows too
        possible = [way for way in known if _can(way, block, group, layers, model, able)]
        if not possible:
            four = all(schemes[layer].four_bit for layer in groups[name][2])
            (unable if four and not layers else left)[group.name] += 1
            continue
        base = schemes[layers[0]]
        smooth = Smooth(step.method, step.alpha, step.scale_min, name, layers, possible[0], base, step.grid, step.rows)
        _apply(smooth, block, group, model, found)
    if found.beside:  # LightX2V reads these vectors in every block or in none
        for block in model.blocks:
            for group in (group for group in wan.GROUPS if group.adaln):
                first = schemes[f"{block}.{group.layers[0]}"]
                layers = tuple(f"{block}.{name}" for name in group.layers)
                ones = Smooth("ones", 0.0, 0.0, f"{block}.{group.name}", layers, "adaln", first)
                found.beside.setdefault(f"{block}.{group.adaln}", ones)
    placed = any(scheme.smooth for scheme in found.schemes.values())
    for group_name, count in (left if placed else left + unable).items():
        native = ", ".join(
            wan.to_native(f"blocks.0.{n}").removeprefix("blocks.0.")
            for group in wan.GROUPS
            if group.name == group_name
            for n in group.layers
        )
        found.warnings.append(
            f"{form}: no place for a smoothing scale before {native} ({count} blocks); quantized without it"
        )
    return found


def _check_method(recipe: Recipe, step: SmoothStep, layers: tuple[str, ...], schemes: Mapping[str, Scheme]) -> None:
    for layer in layers:
        four = schemes[layer].four_bit
        if four != (step.method == "svdquant") and not (four and step.method == "smoothquant"):
            right = "svdquant, or smoothquant with an alpha" if four else "smoothquant or awq"
            raise UsageError(
                f"recipe {recipe.name}: {step.path}.method: {step.method} does not know {schemes[layer].type}, which"
                f" {wan.to_native(layer)} is; use {right}"
            )


def _can(
    way: str, block: str, group: Group, layers: tuple[str, ...], model: Model, schemes: Mapping[str, Scheme]
) -> bool:  # fmt: skip
    if way not in group.ways():
        return False
    if way == "layer":
        return True
    present = [f"{block}.{n}" for n in group.layers if f"{block}.{n}.weight" in model.tensors]
    makers = [f"{block}.{n}" for n in group.makers if f"{block}.{n}.weight" in model.tensors]
    # A layer that stays float keeps its source's bytes, so it cannot be given W·s, nor rows divided by s.
    return len(present) == len(layers) and (way != "rows" or all(maker in schemes for maker in makers))


def _apply(smooth: Smooth, block: str, group: Group, model: Model, found: Placement) -> None:
    for layer in smooth.layers:
        found.schemes[layer] = replace(found.schemes[layer], smooth=smooth)
    if smooth.way == "norm":
        for leaf in ("weight", "bias"):
            if f"{block}.{group.norm}.{leaf}" in model.tensors:
                found.folded[f"{block}.{group.norm}.{leaf}"] = smooth
    elif smooth.way == "adaln":
        found.beside[f"{block}.{group.adaln}"] = smooth
    elif smooth.way == "rows":
        for maker in group.makers:
            if f"{block}.{maker}" in found.schemes:
                found.schemes[f"{block}.{maker}"] = replace(found.schemes[f"{block}.{maker}"], rows=smooth)
