"""What a recipe does to a model's layers, and the recipes that come with streamq.

Patterns are matched by msModelSlim's rule. Knows layer names; opens no checkpoint and needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from streamq.errors import UsageError, nearest
from streamq.pairs import Pair
from streamq.patterns import matches
from streamq.recipe import LinearQuant, Recipe, SmoothStep, parse_recipe
from streamq.savers import Attention


def resolve(recipe: Recipe, layers: Iterable[str]) -> tuple[dict[str, Pair | None], list[str]]:
    """Decide for every layer (native module name without `.weight`) what the recipe does to it; None leaves it float.

    The first step that takes a layer keeps it. Returns the decisions and warnings.
    Raises UsageError for an `include` that matches nothing and for a recipe that quantizes nothing.
    """
    names = list(layers)
    chosen: dict[str, Pair | None] = dict.fromkeys(names)
    warnings = list(recipe.warnings)
    taken: set[str] = set()
    for step in recipe.process:
        _check_includes(recipe, step.include, f"{step.path}.include", names)
        for i, pattern in enumerate(step.exclude):
            if not any(matches(name, pattern) for name in names):
                warnings.append(f"recipe {recipe.name}: {step.path}.exclude.{i}: {pattern!r} matches no layer")
        if not isinstance(step, LinearQuant):
            continue
        for override in step.overrides:
            _check_includes(recipe, override.include, f"{override.path}.include", names)
        for name in names:
            if name in taken or not any(matches(name, p) for p in step.include):
                continue
            if any(matches(name, p) for p in step.exclude):
                continue
            taken.add(name)
            chosen[name] = step.pair
            for override in step.overrides:
                if any(matches(name, p) for p in override.include):
                    chosen[name] = override.pair
    if not any(chosen.values()):
        raise UsageError(
            f"recipe {recipe.name}: spec.process: quantizes none of the {len(names)} linear layers; loosen include or"
            f" exclude (layers are named like {names[0]})"
        )
    return chosen, warnings


def resolve_smoothing(recipe: Recipe, groups: Mapping[str, Sequence[str]]) -> dict[str, SmoothStep]:
    """Which step smooths which group. `groups`: name -> its quantized layers, by native name.

    A group is taken by the first step that includes one of its layers and excludes none: they share their input.
    """
    chosen: dict[str, SmoothStep] = {}
    for step in (step for step in recipe.process if isinstance(step, SmoothStep)):
        for group, layers in groups.items():
            included = any(matches(name, p) for name in layers for p in step.include)
            excluded = any(matches(name, p) for name in layers for p in step.exclude)
            if included and not excluded:
                chosen.setdefault(group, step)
    return chosen


def resolve_attention(recipe: Recipe, modules: Sequence[str]) -> dict[str, Attention]:
    """Attention module (native name, `blocks.0.self_attn`) -> what the recipe does to it; those left alone are absent.

    Patterns of fa3_quant are matched on the module, those of online_quarot on `<module>.q_rot` and `.k_rot`.
    Raises UsageError for an include that matches nothing, and for two fa3_quant steps that meet in one module.
    """
    return {}


def _check_includes(recipe: Recipe, patterns: tuple[str, ...], path: str, names: list[str]) -> None:
    for i, pattern in enumerate(patterns):
        if pattern != "*" and not any(matches(name, pattern) for name in names):
            close = nearest(pattern, tuple(names)) or f"; layers are named like {names[0]}"
            raise UsageError(f"recipe {recipe.name}: {path}.{i}: {pattern!r} matches no linear layer{close}")


def library() -> dict[str, str]:
    """The shipped recipes: name -> YAML text."""
    # A folder of YAML alone is no package, and an editable install does not map it: it lies beside the savers.
    savers = find_spec("streamq.savers")
    assert savers is not None and savers.origin is not None
    folder = Path(savers.origin).parents[1] / "recipes"
    return {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.yaml"))}


def recipe_for(quant_type: str, form: str | None) -> Recipe:
    """The library's recipe for a quantization type and a format (None: the type's first format), or one by its name.

    A library recipe says in `metadata` which `quant_type` it is and which `formats` it serves. Raises UsageError.
    """
    recipes = {name: parse_recipe(text, name, f"recipe {name}") for name, text in library().items()}
    served: dict[str, list[tuple[str, Recipe]]] = {}
    for recipe in recipes.values():
        about = recipe.document["metadata"]
        served.setdefault(about["quant_type"], []).extend((f, recipe) for f in about["formats"])
    if quant_type in served:
        rows = sorted(served[quant_type], key=lambda row: row[0] != row[1].format)
        for row_format, recipe in rows:
            if form in (None, row_format):
                return recipe
        formats = ", ".join(row_format for row_format, _ in rows)
        raise UsageError(f"--quant_type {quant_type} is not written in the format {form}; it is in: {formats}")
    if quant_type in recipes:
        return recipes[quant_type]
    known = tuple(served)
    raise UsageError(
        f"--quant_type {quant_type}: no such type here; have: {', '.join(known)}{nearest(quant_type, known)}"
    )
