"""The model card (`README.md`) of a format's folder: what was quantized and how, how far off it is, how it is loaded.

It is part of the plan, which promises every file's size before the run has measured anything: so all its text is
settled there, and the errors are numbers of fixed width that the run fills in. Like every other output it says nothing
of the machine, the time or the formats beside it. Needs no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamq import __version__

NAME = "README.md"
WIDTH = 8  # of a percentage: 999.999 and a space
SIGN = "Written by streamq"
FOLDER = "PATH_TO_THIS_FOLDER"
Figures = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Row:
    """A line of the table: layers of one kind (`self_attn.q`) and type, by the names that the manifest has."""

    kind: str
    type: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """A card but for its figures. `measured`: whether calibration inputs went through the layers."""

    format: str
    before: str
    rows: tuple[Row, ...]
    after: str
    measured: bool

    def render(self, figures: Figures) -> bytes:
        """The whole text; `figures`: format -> layer -> `rel_error`, `output_rel_error`, {} before the run."""
        made = figures.get(self.format, {})
        head = ["layers", "type", "number", "mean error", "largest error"]
        head += ["mean output error", "largest output error"] * self.measured
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for row in self.rows:
            cells = [f"`{row.kind}`", row.type, str(len(row.layers))]
            for key in ("rel_error", "output_rel_error")[: 1 + self.measured]:
                values = [float(made[name][key]) for name in row.layers if key in made.get(name, {})]
                cells += [_percent(sum(values) / len(values) if values else None), _percent(max(values, default=None))]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([self.before, *lines, self.after]).encode()


def is_card(path: Path) -> bool:
    """Whether a file is a card of ours, not somebody's own README."""
    if path.name != NAME or not path.is_file():
        return False
    with open(path, "rb") as stream:
        return SIGN.encode() in stream.read(4096)


def _percent(value: float | None) -> str:
    return "-".rjust(WIDTH) + "  " if value is None else f"{min(100 * value, 999.999):{WIDTH}.3f} %"


def make_card(
    form: str, about: str, kinds: Mapping[str, str], recipe: str, facts: Sequence[str], usage: Sequence[str],
    measured: bool,
) -> Card:  # fmt: skip
    """A format's card. `kinds`: layer -> type, as in the plan.

    `about`: a sentence about the model; `recipe`: how it calls itself; `facts`: sentences about the run.
    """
    quantized = {name: kind for name, kind in kinds.items() if kind != "float"}
    rows: dict[tuple[str, str], list[str]] = {}
    for name, kind in quantized.items():
        rows.setdefault((_kind(name), kind), []).append(name)
    types = ", ".join(f"{count} {kind}" for kind, count in Counter(quantized.values()).items())
    left = len(kinds) - len(quantized)
    tags = ["wan", "video", "quantized", form, *dict.fromkeys(quantized.values())]
    front = ["---", f"tags: {json.dumps(tags)}", *["library_name: diffusers"] * (form == "diffusers"), "---"]
    before = [
        *front,
        f"# A Wan video transformer, quantized for {form}",
        "",
        about,
        "",
        f"{SIGN} {__version__} with {recipe}: {types} linear layers" + (f", {left} left float." if left else "."),
        *facts,
        "",
        "## Load it",
        "",
        f"`{FOLDER}` stands for the folder of this file.",
        "",
        "```",
        *usage,
        "```",
        "",
        "## Errors",
        "",
        "Of each layer's weight, relative to the float one: ‖W - W'‖ / ‖W‖ over the whole matrix."
        + (" Of its output: on calibration inputs, as the runtime computes it." if measured else ""),
        "",
    ]
    after = [
        "",
        "Every layer's own figures, and the sha256 of every file and tensor, are in the run's `streamq.json`, which"
        " lies here or, where several formats were written at once, one folder up.",
        "",
    ]
    made = tuple(Row(kind, of, tuple(names)) for (kind, of), names in rows.items())
    return Card(form, "\n".join(before), made, "\n".join(after), measured)


def _kind(layer: str) -> str:
    """`self_attn.q` of `high_noise_model/blocks.3.self_attn.q`; the whole name outside blocks."""
    name = layer.rpartition("/")[2]
    first, _, rest = name.partition(".")
    number, _, inside = rest.partition(".")
    return inside if first.endswith("blocks") and number.isdigit() else name
