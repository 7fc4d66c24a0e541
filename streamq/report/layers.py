"""The manifests' layers as charts and as a table: which layers lost how much, by kind and by block."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from streamq.report import charts
from streamq.report.data import Candidate
from streamq.report.words import number
from streamq.wan.names import block_of

MEASURES = {  # key of a manifest's layer -> what it is called
    "rel_error": "weights: relative error ‖W − Ŵ‖ / ‖W‖",
    "output_rel_error": "outputs on calibration inputs: relative error ‖y − ŷ‖ / ‖y‖",
}
OUTSIDE = "outside blocks"


@dataclass(frozen=True)
class Layer:
    """One layer of one candidate. `group`: the expert and the stack of blocks; `place`: the block's number."""

    name: str
    group: str
    kind: str
    place: int
    series: int
    type: str
    errors: dict[str, float]


def made_format(candidate: Candidate) -> dict[str, Any] | None:
    """The part of a candidate's manifest that its videos were made with: recipe and layers. None without a manifest."""
    formats = (candidate.manifest or {}).get("formats")
    if not isinstance(formats, dict) or not formats:
        return None
    named = candidate.clips[0].sidecar.made.get("format") if candidate.clips else None
    found = formats.get(named) if isinstance(named, str) else None
    found = found if found is not None else next(iter(formats.values()))
    return found if isinstance(found, dict) else None


def layers_of(candidates: Sequence[Candidate]) -> list[Layer]:
    """Every layer that the candidates' manifests list, in their order."""
    found = []
    for series, candidate in enumerate(candidates):
        outside: Counter[str] = Counter()
        for name, about in ((made_format(candidate) or {}).get("layers") or {}).items():
            if not isinstance(about, dict):
                continue
            expert, _, layer = name.rpartition("/")
            block = block_of(layer)
            if block is None:
                group, kind, place = expert, OUTSIDE, outside[expert]
                outside[expert] += 1
            else:
                stack, _, digits = block.rpartition(".")
                group = expert if stack == "blocks" else f"{expert} {stack}".strip()
                kind, place = layer.removeprefix(block + "."), int(digits)
            errors = {key: value for key in MEASURES if (value := number(about.get(key))) is not None}
            found.append(Layer(name, group, kind, place, series, str(about.get("type", "?")), errors))
    return found


@dataclass(frozen=True)
class Panel:
    """One chart of a group: `kind` is what it shows, `svg` its text."""

    kind: str
    svg: str


@dataclass(frozen=True)
class Measure:
    """The charts of one measure: by block, in a wide and a narrow form, and by kind of layer."""

    title: str
    blocks: list[tuple[str, str]]
    groups: list[tuple[str, list[Panel]]]


def measures(layers: Sequence[Layer], names: Sequence[str]) -> list[Measure]:
    """A `Measure` for each that a manifest holds errors of. `names`: the candidates'."""
    found = []
    for key, title in MEASURES.items():
        having = {layer.series for layer in layers if key in layer.errors}
        own = [layer for layer in layers if layer.series in having]
        scale = charts.log_scale(layer.errors[key] for layer in own if key in layer.errors)
        if scale is not None:
            found.append(Measure(title, _by_block(own, key, scale, names), _by_kind(own, key, scale, names)))
    return found


def _by_kind(
    layers: Sequence[Layer], key: str, scale: charts.LogScale, names: Sequence[str]
) -> list[tuple[str, list[Panel]]]:
    groups: dict[str, dict[str, list[charts.Mark]]] = {}
    for layer in layers:
        value = layer.errors.get(key)
        if value is None and layer.type != "float":
            continue  # quantized, but not measured this way
        said = "float" if value is None else f"{layer.type}: {charts.percent(value)}"
        mark = charts.Mark(layer.place, value, layer.series, f"{names[layer.series]}, {layer.name}: {said}")
        groups.setdefault(layer.group, {}).setdefault(layer.kind, []).append(mark)
    made = []
    for group, kinds in groups.items():
        panels = []
        for kind, marks in sorted(kinds.items(), key=lambda item: item[0] == OUTSIDE):
            x_label = "layer" if kind == OUTSIDE else "block"
            title = f"{group} {kind}: relative error by {x_label}".strip()
            panels.append(
                Panel(kind, charts.layer_panel(title, marks, scale, len(names), x_label, joined=kind != OUTSIDE))
            )
        made.append((group, panels))
    return made


def _by_block(layers: Sequence[Layer], key: str, scale: charts.LogScale, names: Sequence[str]) -> list[tuple[str, str]]:
    blocks: dict[str, dict[tuple[int, int], list[float]]] = {}
    for layer in layers:
        if key in layer.errors and layer.kind != OUTSIDE:
            blocks.setdefault(layer.group, {}).setdefault((layer.series, layer.place), []).append(layer.errors[key])
    made = []
    for group, places in blocks.items():
        spans = []
        for (series, place), errors in places.items():
            mean = math.sqrt(sum(error * error for error in errors) / len(errors))
            said = f"{names[series]}, block {place}: {charts.percent(mean)}"
            said += f", layers from {charts.percent(min(errors))} to {charts.percent(max(errors))}"
            spans.append(charts.Span(place, mean, min(errors), max(errors), series, said))
        title = f"{group} relative error by block".strip()
        forms = (
            charts.block_chart(title, spans, scale, width, kind) for width, kind in ((880, "wide"), (350, "narrow"))
        )
        made.append((group, "".join(forms)))
    return made


def table(layers: Sequence[Layer], count: int) -> list[tuple[str, list[Layer | None]]]:
    """A row a layer: its name, and what each of the `count` candidates made of it."""
    rows: dict[str, list[Layer | None]] = {}
    for layer in layers:
        rows.setdefault(layer.name, [None] * count)[layer.series] = layer
    return list(rows.items())
