"""What `suite.py` found, as tables in markdown and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import stages

MiB = 1 << 20
COLORS = {
    "start": "#bab0ab", "read": "#4e79a7", "copy": "#76b7b2", "compute": "#f28e2b", "hash": "#9c755f",
    "write": "#59a14f", "sync": "#edc948", "rest": "#d4d4d4",
}  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    """Ratios first, then figures, then stages, section by section."""
    place, versions = document["machine"], document["versions"]
    known = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    lines = [
        f"{place['cpus']} cores ({place['architecture']}, {place['cpu']}), {place['memory'] / 2**30:.0f} GiB, device"
        f" {place.get('device_name', place['device'])}, Python {place['python']}; {known}. Rounds: {document['runs']}.",
    ]
    for name, section in document["sections"].items():
        about = section["about"]
        facts = ", ".join(f"{key} {value}" for key, value in about.items() if key not in ("source", "planned_peak"))
        facts += f"; source {about['source'] / 1e9:.3f} GB"
        if "planned_peak" in about:
            facts += f"; by the plan a peak of {about['planned_peak'] / MiB:,.0f} MiB"
        lines += ["", f"## {name}", "", facts, ""]
        lines += _ratios(section) + [""] + _figures(section)
        for label, report in section["stages"].items():
            lines += ["", f"Stages of {label}:", "", stages.table(report)]
    return "\n".join(lines)


def _ratios(section: dict[str, Any]) -> list[str]:
    device = any(row.get("peak_device") for row in section["rows"].values())
    keys = ["wall", "cpu", "work", "over_import"] + ["peak_device"] * device
    keys += ["seconds_per_step"] * any("seconds_per_step" in row for row in section["rows"].values())
    words = {"cpu": "CPU seconds", "work": "after imports", "over_import": "memory over imports",
             "peak_device": "device memory", "seconds_per_step": "a step"}  # fmt: skip
    lines = [f"| | beside | {' | '.join(words.get(key, key) for key in keys)} |", "|---|---|" + "---|" * len(keys)]
    for label, others in section["ratios"].items():
        for other, found in others.items():
            cells = [f"{found[key]:.2f}×" if key in found else "" for key in keys]
            lines.append(f"| {label} | {other} | {' | '.join(cells)} |")
    return lines


def _figures(section: dict[str, Any]) -> list[str]:
    lines = [
        "| | wall s | CPU s | after imports s | peak MiB | over imports MiB | device MiB | written GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, row in section["rows"].items():
        if "not_run" in row:
            lines.append(f"| {label} | {' '.join(row['not_run'].split())[:120]} | | | | | | |")
            continue
        device = f"{row['peak_device'] / MiB:,.0f}" if row["peak_device"] else ""
        lines.append(
            f"| {label} | {row['wall']:.2f} | {row['cpu']:.2f} | {row['work']:.2f} | {row['peak'] / MiB:,.0f}"
            f" | {row['over_import'] / MiB:,.0f} | {device} | {row['written'] / 1e9:.3f} |"
        )
    return lines


def plot(document: dict[str, Any], path: Path) -> None:
    """A row a section: wall time, memory over imports, and what streamq's thread seconds go to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sections = document["sections"]
    figure, axes = pyplot.subplots(
        len(sections), 3, figsize=(15, 1.2 + 2.6 * len(sections)), squeeze=False, layout="constrained"
    )
    for (name, section), (wall, memory, parts) in zip(sections.items(), axes, strict=True):
        rows = {label: row for label, row in section["rows"].items() if "not_run" not in row}
        _bars(wall, {label: row["wall"] for label, row in rows.items()}, f"{name}: wall, s")
        _bars(memory, {label: row["over_import"] / MiB for label, row in rows.items()}, "peak over imports, MiB")
        _stacked(parts, section["stages"])
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, list(COLORS), loc="outside lower right", ncols=len(COLORS), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axis: Any, values: dict[str, float], title: str) -> None:
    colors = ["#e15759" if label.startswith("streamq") else "#bab0ab" for label in values]
    made = axis.barh(list(values), list(values.values()), color=colors)
    axis.bar_label(made, fmt=lambda value: f"{value:,.1f}" if value < 100 else f"{value:,.0f}", padding=2, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(title, fontsize=10)
    axis.tick_params(labelsize=8)


def _stacked(axis: Any, reports: dict[str, Any]) -> None:
    for place, (label, report) in enumerate(reports.items()):
        left = 0.0
        for kind, color in COLORS.items():
            width = sum(row["seconds"] for row in report["rows"] if row["kind"] == kind)
            axis.barh(label, width, left=left, color=color)
            left += width
        axis.plot([report["wall"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1)
    axis.invert_yaxis()
    axis.set_title("thread seconds by kind of work; line: wall", fontsize=10)
    axis.tick_params(labelsize=8)
