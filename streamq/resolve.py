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
from streamq.recipe import AttentionStep, LinearQuant, Recipe, SmoothStep, parse_recipe
from streamq.savers import Attention

ROTATIONS = ("q_rot", "k_rot")  # what patterns of online_quarot are matched on, below an attention module
# msModelSlim's types that no recipe for Wan has -> what to take instead.
PEER_TYPES = {
    "w4a8": "MindIE has no int4 weights; w8a8, or w4a4_mxfp4 for 4-bit weights",
    "w8a8s": "no runtime here is sparse; w8a8",
    "w16a16s": "no runtime here is sparse; w8a8",
    "w8a8c8": "c8 is an 8-bit KV cache, and a video transformer keeps none; w8a8, or w8a8f8 for 8-bit attention",
    "w4a8c8": "c8 is an 8-bit KV cache, and a video transformer keeps none; w8a8, or w4a4f8 for 8-bit attention",
    "w4a4c8": "c8 is an 8-bit KV cache, and a video transformer keeps none; w4a4f8 has 8-bit attention",
}


def resolve(recipe: Recipe, layers: Iterable[str]) -> tuple[dict[str, Pair | None], list[str]]:
    """Decide for every layer (native module name without `.weight`) what the recipe does to it; None leaves it float.

    The first step that takes a layer keeps it. Returns the decisions and warnings.
    Raises UsageError for an `include` that matches nothing and for a recipe that quantizes nothing.
    """
    names = list(layers)
    chosen: dict[str, Pair | None] = dict.fromkeys(names)
    warnings = list(recipe.warnings)
    taken: set[str] = set()
    modules = [name.removesuffix(".q") for name in names if name.endswith("_attn.q")]
    for step in recipe.process:
        reached = _reached(step, modules) if isinstance(step, AttentionStep) else names
        for i, pattern in enumerate(step.exclude):
            if not any(matches(name, pattern) for name in reached):
                warnings.append(f"recipe {recipe.name}: {step.path}.exclude.{i}: {pattern!r} matches no layer")
        if isinstance(step, AttentionStep):
            continue  # see resolve_attention
        _check_includes(recipe, step.include, f"{step.path}.include", names)
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
    Raises UsageError for an include that matches nothing, a step that takes nothing, two fa3_quant steps that meet in
    one module, and a rotation of q without k.
    """
    marked: dict[str, AttentionStep] = {}
    rotated: dict[str, set[str]] = {}
    for step in (step for step in recipe.process if isinstance(step, AttentionStep)):
        reached = _reached(step, modules)
        _check_includes(recipe, step.include, f"{step.path}.include", reached, "attention module")
        taken = [name for name in reached if _takes(step, name)]
        if not taken:
            raise UsageError(
                f"recipe {recipe.name}: {step.path}: {step.kind} takes none of the {len(modules)} attention modules;"
                f" loosen include or exclude (it matches names like {reached[0]})"
            )
        for name in taken:
            if step.kind == "online_quarot":
                module, _, leaf = name.rpartition(".")
                rotated.setdefault(module, set()).add(leaf)
            elif name in marked:
                raise UsageError(
                    f"recipe {recipe.name}: {step.path}: takes {name}, which {marked[name].path} takes already; exclude"
                    " it from one of them"
                )
            else:
                marked[name] = step
    for module, leaves in rotated.items():
        if len(leaves) < len(ROTATIONS):
            raise UsageError(
                f"recipe {recipe.name}: online_quarot takes {module}.{leaves.pop()} alone; q and k are rotated together"
                f" or not at all: include {module}.*"
            )
    found = [module for module in modules if module in marked or module in rotated]
    return {m: Attention(marked[m].dtype if m in marked else "", m in rotated) for m in found}


def _reached(step: AttentionStep, modules: Iterable[str]) -> list[str]:
    """The names on which the patterns of a step about attention are matched."""
    if step.kind == "online_quarot":
        return [f"{module}.{leaf}" for module in modules for leaf in ROTATIONS]
    return list(modules)


def _takes(step: AttentionStep, name: str) -> bool:
    return any(matches(name, p) for p in step.include) and not any(matches(name, p) for p in step.exclude)


def _check_includes(
    recipe: Recipe, patterns: tuple[str, ...], path: str, names: list[str], what: str = "linear layer"
) -> None:
    for i, pattern in enumerate(patterns):
        if pattern != "*" and not any(matches(name, pattern) for name in names):
            close = nearest(pattern, tuple(names)) or f"; {what}s are matched by names like {names[0]}"
            raise UsageError(f"recipe {recipe.name}: {path}.{i}: {pattern!r} matches no {what}{close}")


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
        has = ", ".join(kind for kind, others in served.items() if form in dict(others))
        raise UsageError(
            f"--quant_type {quant_type} is not written in the format {form}; it is in: {formats}"
            + (f". {form} has: {has}" if has else "")
        )
    if quant_type in recipes:
        return recipes[quant_type]
    known = tuple(served)
    if quant_type in PEER_TYPES:
        raise UsageError(
            f"--quant_type {quant_type}: msModelSlim has it for other models; here: {PEER_TYPES[quant_type]}"
        )
    raise UsageError(
        f"--quant_type {quant_type}: no such type here; have: {', '.join(known)}{nearest(quant_type, known)}"
    )
