"""Which type goes into which format on which device: read off the recipes, formats and devices that decide it.

`python -m streamq.support` prints the table that the README has; a test compares the two, and plans every pair of type
and format, those that are in it and those that are not. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamq import resolve
from streamq.device import KINDS
from streamq.pairs import QConfig
from streamq.quantized import Rule, Scheme
from streamq.recipe import AttentionStep, LinearQuant, Recipe, SmoothStep, parse_recipe
from streamq.savers import formats
from streamq.wan.names import BLOCK_LINEARS, OUTER_LINEARS, to_native

BLOCKS = 40  # a model with as many as the largest, so that recipes that name blocks match
DTYPES = {"fp8_e4m3": "e4m3", "mxfp8": "e4m3", "mxfp4": "e2m1", "nvfp4": "e2m1"}
SCOPES = {"per_channel": "per output channel", "per_tensor": "one scale", "per_token": "per token"}
GROUPS = {"int4": 64, "nvfp4": 16}  # of per_group; per_block is 32 everywhere


def served() -> dict[str, dict[str, Recipe]]:
    """`--quant_type` -> format -> the library's recipe for it, the default format first."""
    abouts = _metadata()
    found: dict[str, dict[str, Recipe]] = {}
    for kind in dict.fromkeys(about["quant_type"] for about in abouts):
        able = [form for form in formats() if any(kind == m["quant_type"] and form in m["formats"] for m in abouts)]
        default = resolve.recipe_for(kind, None).format
        able.sort(key=lambda form: form != default)
        found[kind] = {form: resolve.recipe_for(kind, form) for form in able}
    return found


def _metadata() -> list[dict[str, Any]]:
    return [parse_recipe(text, name, name).document["metadata"] for name, text in resolve.library().items()]


def layers_of(form: str) -> list[str]:
    """Native names of the linear layers that a recipe can reach in a format."""
    inside = [to_native(f"blocks.{i}.{layer}") for i in range(BLOCKS) for layer in BLOCK_LINEARS]
    return [*inside, *(OUTER_LINEARS if formats()[form].OUTER else ())]


def table() -> str:
    """The table in Markdown, a line a type."""
    head = (
        "`--quant_type`",
        "weights",
        "activations",
        "needs inputs",
        "formats, with the runtime's own word",
        "devices",
    )
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind, recipes in served().items():
        weights = {form: _weights(recipe) for form, recipe in recipes.items()}
        acts = {form: _activations(recipe) for form, recipe in recipes.items()}
        places = "; ".join(f"`{form}`: {_words(form, recipe)}" for form, recipe in recipes.items())
        data = {form: "yes" if _needs_data(recipe) else "no" for form, recipe in recipes.items()}
        cells = (f"`{kind}`", _merged(weights), _merged(acts), _merged(data), places, ", ".join(sorted(KINDS)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _merged(texts: Mapping[str, str]) -> str:
    """One text where all formats agree; else the first, and those that differ by their formats."""
    first = next(iter(texts.values()))
    others: dict[str, list[str]] = {}
    for form, text in texts.items():
        if text != first:
            others.setdefault(text, []).append(form)
    return "; ".join([first, *(f"{', '.join(names)}: {text}" for text, names in others.items())])


def _steps(recipe: Recipe) -> list[LinearQuant]:
    return [step for step in recipe.process if isinstance(step, LinearQuant)]


def _weights(recipe: Recipe) -> str:
    step = _steps(recipe)[0]
    how = {"gptq": ", GPTQ", "mse": ", clipped", "svdquant": ", SVDQuant"}.get(step.pair.weight.method, "")
    smooth = ", smoothed" if any(isinstance(s, SmoothStep) for s in recipe.process) and "SVD" not in how else ""
    turned = ", rotated (ConvRot)" if "convrot" in dict(step.pair.weight.ext) else ""
    return _operand(step.pair.weight) + how + smooth + turned


def _activations(recipe: Recipe) -> str:
    act = _steps(recipe)[0].pair.act
    if act.dtype == "float":
        return "float"
    return _operand(act) + (", fixed" if act.scope == "per_tensor" else "")


def _operand(config: QConfig) -> str:
    scope = SCOPES.get(config.scope) or f"groups of {32 if config.scope == 'per_block' else GROUPS[config.dtype]}"
    return f"{DTYPES.get(config.dtype, config.dtype)} {scope}"


def _words(form: str, recipe: Recipe) -> str:
    """The runtime's words for the types, and which layers stay float."""
    chosen, _ = resolve.resolve(recipe, layers_of(form))
    types = dict.fromkeys(pair.type for pair in chosen.values() if pair is not None and pair.type)
    words = ", ".join(formats()[form].TYPES[kind] for kind in types)
    attention = [_attention(step) for step in recipe.process if isinstance(step, AttentionStep)]
    words = "; ".join([words, *dict.fromkeys(attention)])
    left = {name.partition(".")[2].partition(".")[2] or name for name, pair in chosen.items() if pair is None}
    return words + (f" (`{'`, `'.join(sorted(left))}` float)" if left else "")


def _attention(step: AttentionStep) -> str:
    return "q and k rotated" if step.kind == "online_quarot" else f"attention in {step.dtype}"


def _needs_data(recipe: Recipe) -> bool:
    pairs = [step.pair for step in _steps(recipe)]
    smoothed = any(isinstance(step, SmoothStep) for step in recipe.process)
    return smoothed or any(Scheme(pair.type or "", pair, Rule()).needs_data for pair in pairs)


if __name__ == "__main__":
    print(table(), end="")
