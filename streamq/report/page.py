"""From `ReportData` to one HTML file that opens offline, on any machine, without anything beside it.

Everything that comes from outside (prompts, names, recipes) is text: the template escapes it, and the page's own policy
runs no script but the one whose hash it states and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from streamq.evaluation.tables import direction
from streamq.extras import require
from streamq.report import charts, layers, pictures, tables, words
from streamq.report.data import ReportData
from streamq.report.pictures import Coding, Difference, PairPictures, Strip

BRIEF = (  # what stands below a prompt, and at the page's head where all pairs share it
    ("{}×{}", ("width", "height")), ("{} frames", ("frame_num",)), ("{} fps", ("fps",)), ("{} steps", ("steps",)),
    ("guidance {}", ("guidance",)), ("shift {}", ("shift",)), ("{}", ("scheduler",)), ("{}", ("device_kind",)),
    ("{}", ("compute_dtype",)),
)  # fmt: skip
PANEL_WIDTH, PANEL_HEIGHT = 560, 360  # a player's largest size on the page, in CSS pixels
PIXELATED = 192  # frames up to this width are shown with their pixels visible


def build(data: ReportData) -> str:
    """The page's text; the same data, the same text.

    Frames are embedded without loss where they fit in about 15 MB, else smaller, fewer or lossy, which the page says;
    differences are always taken from the frames as given. Raises UsageError without jinja2, Pillow or matplotlib.
    """
    assert all(len(candidate.clips) == len(data.reference) for candidate in data.candidates), "clips that are no pairs"
    jinja2 = require("jinja2", "the report", "eval")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("streamq.report", ""), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False,
    )  # fmt: skip
    safe = require("markupsafe", "the report", "eval").Markup
    script = environment.get_template("player.js.j2").render()
    environment.globals |= {
        "safe": safe, "swatch": lambda series: safe(charts.swatch(series)), "definition": words.definition,
        "better": lambda metric: words.BETTER[direction(metric)],
        "percent": charts.percent,
    }  # fmt: skip
    found = layers.layers_of(data.candidates)
    names = [candidate.name for candidate in data.candidates]
    text: str = environment.get_template("page.html.j2").render(
        data=data,
        subtitle=_subtitle(data),
        script=safe(script),
        script_hash=_hash(script),
        headlines=tables.headlines(data, found),
        summary=tables.summary(data),
        limits=tables.limits(data),
        measures=layers.measures(found, names),
        measure_keys=[key for key in layers.MEASURES if any(key in layer.errors for layer in found)],
        layer_rows=layers.table(found, len(names)),
        resources=tables.resources(data),
        versions=tables.versions(data),
        recipes=tables.recipes(data),
        **_players(data),
    )
    return text


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _brief(pairs: list[dict[str, Any]]) -> list[str]:
    """The settings that all of `pairs` share, in few words."""
    found = []
    for text, keys in BRIEF:
        values = {tuple(_plain(pair.get(key)) for key in keys) for pair in pairs}
        if len(values) == 1 and "None" not in (only := values.pop()):
            found.append(text.format(*only))
    return found


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _subtitle(data: ReportData) -> str:
    shared = _brief([clip.sidecar.pair for clip in data.reference])
    return " · ".join([tables.pairs(len(data.reference)), *shared])


def _players(data: ReportData) -> dict[str, Any]:
    """What the template needs for the pairs: their strips as JSON, scales, and what was left out of the pictures."""
    if not data.reference:
        return {"shown_pairs": [], "hidden_pairs": [], "coding_note": "", "heat": None}
    differences: list[list[Difference | None]] = [
        [pictures.compare(clip.frames, candidate.clips[index].frames) for candidate in data.candidates]
        for index, clip in enumerate(data.reference)
    ]
    scale = pictures.scale_of(differences)
    top = max((value for row in differences for found in row if found is not None for value in found.curve), default=0)
    coding, count = pictures.choose(data, scale)
    made = pictures.pictures(data, coding, scale, differences[:count])
    shown = [_pair(data, index, pair, top) for index, pair in enumerate(made)]
    colours = pictures.colour_table()
    heat = {
        "table": base64.b64encode(colours.tobytes()).decode(),
        "legend": pictures.legend(colours),
        "scale": scale,
        "scales": [s for s in pictures.SCALES if coding.quality is None or s <= scale],
    }
    return {
        "shown_pairs": shown,
        "hidden_pairs": [_pair_text(data, index) for index in range(count, len(data.reference))],
        "coding_note": _coding_note(data, coding, count, shown[0]["step"]),
        "heat": heat if any(found is not None for row in differences for found in row) else None,
    }


def _pair_text(data: ReportData, index: int) -> dict[str, Any]:
    pair = data.reference[index].sidecar.pair
    return {
        "number": index + 1,
        "prompt": str(pair.get("prompt", "")),
        "seed": str(pair.get("seed", "–")),
        "brief": " · ".join(_brief([pair])),
        "settings": [(key, "–" if value is None else str(value)) for key, value in pair.items()],
        "failures": tables.pair_failures(data, index),
        "metrics": tables.pair_metrics(data, index),
    }


def _pair(data: ReportData, index: int, made: PairPictures, top: float) -> dict[str, Any]:
    """`top`: where the curves' axis ends, on all of the page, so that pairs compare."""
    width, height = made.reference.width, made.reference.height
    lines = [(series, found.curve) for series, found in enumerate(made.differences) if found is not None]
    last = len(data.reference[index].frames)
    title = f"mean difference of each frame, 1 to {last}, from 0 to {top:.3g} levels"
    return _pair_text(data, index) | {
        "strips": [_strip(made.reference), *map(_strip, made.candidates)],
        "heat": [None if strip is None else _strip(strip) for strip in made.heat],
        "panel": min(PANEL_WIDTH, round(PANEL_HEIGHT * width / height)),
        "landscape": width >= 1.3 * height,
        "pixelated": width <= PIXELATED,
        "frames": len(made.reference.frames),
        "step": made.step,
        "fps": data.reference[index].fps / made.step,
        "curve": charts.curves(title, lines, top) if lines and top else "",
        "curve_top": f"{top:.3g}",
        "last_frame": last,
        "short": tables.pair_short(data, index),
        "largest": [None if found is None else int(found.counts.nonzero()[0].max()) for found in made.differences],
    }


def _strip(strip: Strip) -> dict[str, Any]:
    # Only base64 and numbers in it, so that nothing can end the script element that holds it.
    held = {"frames": strip.frames, "width": strip.width, "height": strip.height, "gain": strip.gain}
    return {"json": json.dumps(held, separators=(",", ":")), "width": strip.width, "height": strip.height}


def _coding_note(data: ReportData, coding: Coding, count: int, step: int) -> str:
    if coding.quality is None:
        return "Frames are stored without loss: what is drawn has the bits that were measured."
    height, width = data.reference[0].frames.shape[1:3]
    smaller = f"scaled from {width}×{height} to {coding.width} pixels wide, " if width > (coding.width or width) else ""
    fewer = f"every {_ordinal(step)} frame of {len(data.reference[0].frames)}, " if step > 1 else ""
    text = (
        f"To keep the page small its pictures are {smaller}{fewer}coded with loss (WebP, quality {coding.quality}). "
        "Metrics and differences were taken before that, from the full frames; look at the lossless files for details."
    )
    if count < len(data.reference):
        text += f" The first {count} of {len(data.reference)} pairs have players."
    return text


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
