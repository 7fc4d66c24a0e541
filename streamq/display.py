"""What people see of a run: a progress bar on a terminal, a line a block elsewhere, and tables. Everything on stderr
except results, so that `--json` can have stdout for itself."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from streamq import cost
from streamq.calibration.prepare import Outlook
from streamq.calibration.settings import CalibSettings
from streamq.calibration.store import CalibSet
from streamq.card import FOLDER
from streamq.device import Device
from streamq.errors import format_bytes, format_duration
from streamq.journal import Commit
from streamq.plan import Plan, Unit


def warn(lines: Iterable[str]) -> None:
    """One line a warning, on stderr."""
    for line in lines:
        print("warning:", *line.split(), file=sys.stderr)


def peak_rss() -> int:
    """Most resident memory that this process ever had, in bytes."""
    # Not getrusage's ru_maxrss: it survives exec, so that it may be that of the process which started this one.
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else psutil.Process().memory_info().rss


class Display:
    """Watches a run (`streamq.pipeline.Watcher`) and shows it. Use as a context manager."""

    def __init__(self, device: Device, *, quiet: bool) -> None:
        self.device = device
        self.quiet = quiet
        self.console = Console(stderr=True, markup=False)
        self.bar: Progress | None = None
        self.units_done = self.units = self.bytes_done = self.bytes = 0
        self.bytes_at_start = 0
        self.began = self.last = time.monotonic()

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
            )
            self.bar = Progress(*columns, TextColumn("{task.fields[figures]}"), console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("starting", total=None, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def started(self, plan: Plan, done: set[str]) -> None:
        """See Watcher."""
        self.units, self.units_done = len(plan.units), len(done)
        self.bytes = plan.bytes_to_read
        self.bytes_done = sum(_nbytes(unit) for unit in plan.units if unit.key in done)
        self.bytes_at_start = self.bytes_done
        self.began = self.last = time.monotonic()
        if done and not self.quiet:
            self.console.print(f"resuming: {len(done)} of {self.units} units are committed already", highlight=False)

    def said(self, text: str) -> None:
        """See Watcher."""
        if not self.quiet or text.startswith(("synthetic:", "warning:")):
            self.console.print(text, highlight=False, soft_wrap=True)

    def committed(self, unit: Unit, commit: Commit) -> None:
        """See Watcher."""
        now = time.monotonic()
        self.units_done += 1
        self.bytes_done += _nbytes(unit)
        rate = (self.bytes_done - self.bytes_at_start) / max(now - self.began, 1e-9)
        worst = max(
            (about["rel_error"] for layers in commit.layers.values() for about in layers.values()), default=None
        )
        used, _ = self.device.memory()
        figures = [f"{rate / 1e6:.0f} MB/s", f"{now - self.last:.2f} s"]
        figures += [f"error {worst:.3%}"] if worst is not None else []
        figures += [f"RSS {format_bytes(psutil.Process(os.getpid()).memory_info().rss)}"]
        figures += [f"device {format_bytes(used)}"] if used else []
        figures += [f"{(self.bytes - self.bytes_done) / max(rate, 1):.0f} s left"]
        self.last = now
        name = f"{unit.key} ({self.units_done} of {self.units})"
        if self.bar is not None:
            text = " · ".join(figures)
            self.bar.update(self.task, description=name, total=self.bytes, completed=self.bytes_done, figures=text)
        elif not self.quiet:
            try:
                print(f"{name}: {', '.join(figures)}", file=sys.stderr, flush=True)
            except OSError:  # whoever read it has gone: no reason to stop hours of work
                self.quiet = True


class Silent:
    """Watches a run of several processes where the first one shows it. Use as a context manager."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def started(self, plan: Plan, done: set[str]) -> None:
        """See Watcher."""

    def committed(self, unit: Unit, commit: Commit) -> None:
        """See Watcher."""

    def said(self, text: str) -> None:
        """See Watcher."""


def _nbytes(unit: Unit) -> int:
    return sum(step.nbytes for step in unit.steps)


def show_plan(plan: Plan) -> None:
    """The plan as tables, on stdout."""
    model = plan.experts[0].expert.model
    console = Console(highlight=False, markup=False)
    experts = f", {len(plan.experts)} experts" if len(plan.experts) > 1 else ""
    console.print(
        f"{plan.source_path}: Wan {model.family}, {model.n_blocks} blocks of width {model.dim}{experts}",
        soft_wrap=True,
    )
    table = Table("format", "type", "layers", "example")
    for target in plan.targets:
        layers = plan.layers[target.name]
        for kind, count in Counter(layers.values()).items():
            table.add_row(target.name, kind, str(count), next(name for name, k in layers.items() if k == kind))
    console.print(table)
    files = Table("file", "bytes")
    paths = [(f.path, f.size) for f in plan.files] + [(path, len(content)) for path, content, _ in plan.documents]
    for path, size in paths if len(paths) <= 12 else [*paths[:5], (f"… {len(paths) - 8} more", 0), *paths[-3:]]:
        files.add_row(path, f"{size:,}" if size else "")
    console.print(files)
    if plan.loras:
        console.print(f"merges {', '.join(lora.shown for lora in plan.loras)}", soft_wrap=True)
    if plan.calibration is not None:
        for line in _calibration_lines(plan):
            console.print(line, soft_wrap=True)
    console.print(
        f"reads {format_bytes(plan.bytes_to_read)}, writes {format_bytes(plan.bytes_to_write)} on {plan.device_kind};"
        f" peak memory about {format_bytes(plan.peak_host_bytes)}"
        + (f", on the device {format_bytes(plan.peak_device_bytes)}" if plan.peak_device_bytes else ""),
        soft_wrap=True,
    )


def _calibration_lines(plan: Plan) -> list[str]:
    """What the replay will cost."""
    chosen = plan.calibration
    assert chosen is not None
    experts = [part.expert for part in plan.experts]
    found = []
    for expert in experts:
        shapes, count = chosen.shapes[expert.name], chosen.samples[expert.name]
        whose = f"{expert.name}: " if expert.name else ""
        found.append(f"calibration: {whose}{count} samples of {shapes.tokens:,} tokens in {shapes.dtype}")
    size = max(chosen.cache_nbytes(expert.name) for expert in experts)
    where = "in memory and on disk" if chosen.in_memory else "on disk"
    speed = cost.speed_of(plan.device_kind)
    how = "measured now" if speed.measured else "assumed"
    seconds = cost.run_work(plan).seconds(speed)
    found.append(f"about {format_duration(seconds)} of computing, at {speed.flops / 1e9:,.0f} GFLOP/s ({how})")
    source = f"inputs of {chosen.given.path}" if chosen.given else "inputs made by this run"
    found.append(
        f"{source}; {chosen.flops(experts) / 1e15:.3g} PFLOP of block forwards;"
        f" {format_bytes(size)} of streams between blocks, {where}"
    )
    return found


def summary(plan: Plan, manifest: dict[str, Any], device: Device, seconds: float) -> dict[str, Any]:
    """The closing figures of a run, as `quant --json` prints them."""
    worst = sorted(
        (
            (about["rel_error"], name, form)
            for form, made in manifest["formats"].items()
            for name, about in made["layers"].items()
            if "rel_error" in about
        ),
        reverse=True,
    )[:5]
    outputs = sorted(
        (
            {"layer": name, "format": form, "output_rel_error": about["output_rel_error"]}
            | ({"before": about["before"]["output_rel_error"]} if "before" in about else {})
            for form, made in manifest["formats"].items()
            for name, about in made["layers"].items()
            if "output_rel_error" in about
        ),
        key=lambda row: -row["output_rel_error"],
    )[:5]
    layers = {
        form: dict(Counter(about["type"] for about in made["layers"].values()))
        for form, made in manifest["formats"].items()
    }
    root = plan.options.save_path
    usage = {
        target.name: [
            line.replace(FOLDER, json.dumps(str((root / target.folder).resolve()))[1:-1])
            for line in plan.usage[target.name]
        ]
        for target in plan.targets
    }
    return {
        "status": "done",
        "save_path": str(plan.options.save_path),
        "plan": plan.hash,
        "layers": layers,
        "bytes_read": plan.bytes_to_read,
        "bytes_written": plan.bytes_to_write,
        "largest_errors": [{"layer": name, "format": form, "rel_error": error} for error, name, form in worst],
        "largest_output_errors": outputs,
        "mean_output_error": _means(manifest),
        "peak_host_bytes": peak_rss(),
        "peak_device_bytes": device.memory()[1],
        "seconds": round(seconds, 3),
        "usage": usage,
        "warnings": [*plan.warnings, *_notes(manifest)],
    }


def _means(manifest: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Format -> root mean square of the layers' output errors on calibration data, with the method and without."""
    found = {}
    for form, made in manifest["formats"].items():
        rows = [about for about in made["layers"].values() if "output_rel_error" in about]
        after = [row["output_rel_error"] for row in rows]
        before = [row.get("before", row)["output_rel_error"] for row in rows]
        if rows:
            both = {"after": after, "before": before}
            found[form] = {key: (sum(v * v for v in values) / len(rows)) ** 0.5 for key, values in both.items()}
    return found


def _notes(manifest: dict[str, Any]) -> list[str]:
    """What the methods had to say of single layers."""
    return [
        f"{name} ({form}): {about['note']}"
        for form, made in manifest["formats"].items()
        for name, about in made["layers"].items()
        if "note" in about
    ]


def show_summary(figures: dict[str, Any]) -> None:
    """The closing table, on stdout."""
    console = Console(highlight=False, markup=False)
    table = Table(title=f"done: {figures['save_path']}", show_header=False)
    for form, kinds in figures["layers"].items():
        table.add_row(f"layers ({form})", ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    table.add_row("size", f"{format_bytes(figures['bytes_read'])} -> {format_bytes(figures['bytes_written'])}")
    for row in figures["largest_errors"]:
        table.add_row("largest weight error", f"{row['rel_error']:.3%}  {row['layer']} ({row['format']})")
    for form, mean in figures["mean_output_error"].items():
        table.add_row(f"output error ({form})", f"{mean['after']:.3%}; {mean['before']:.3%} rounded to nearest (RMS)")
    for row in figures["largest_output_errors"]:
        before = f", {row['before']:.3%} without the method" if "before" in row else ""
        where = f"{row['layer']} ({row['format']})"
        table.add_row("largest output error", f"{row['output_rel_error']:.3%}{before}  {where}")
    table.add_row("peak memory", format_bytes(figures["peak_host_bytes"]))
    if figures["peak_device_bytes"]:
        table.add_row("peak device memory", format_bytes(figures["peak_device_bytes"]))
    table.add_row("seconds", f"{figures['seconds']:.1f}")
    console.print(table)
    for form, lines in figures["usage"].items():
        console.print(f"to load it in {form}:", *lines, sep="\n", soft_wrap=True, markup=False)


def show_facts(facts: dict[str, Any]) -> None:
    """`inspect` as a table, on stdout."""
    table = Table(show_header=False)
    for key, value in facts.items():
        if key == "layers":
            value = ", ".join(f"{count} {kind}" for kind, count in Counter(value.values()).items())
        elif key == "files":
            value = f"{len(value)}: {value[0]}" + (f" … {value[-1]}" if len(value) > 1 else "")
        elif isinstance(value, dict):
            value = ", ".join(f"{count} {name}" for name, count in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "-"
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value if value not in (None, "") else "-"))
    Console(highlight=False, markup=False).print(table)


def show_verdict(report: dict[str, Any]) -> None:
    """`verify` as text, on stdout: problems first, then the layers with the largest errors."""
    console = Console(highlight=False, markup=False)
    for problem in report["problems"]:
        console.print(f"problem: {problem}", style="red", soft_wrap=True)
    if report["layers"]:
        table = Table("layer", "relative error", "cosine", title=f"worst of {len(report['layers'])} layers")
        on_data = any("output_rel_error" in found for found in report["layers"].values())
        if on_data:  # which only the run had
            table.add_column("output")
            table.add_column("plain")
            table.caption = "output: error on calibration data, as the run recorded it; plain: rounded to nearest"
        worst = sorted(report["layers"].items(), key=lambda row: row[1]["rel_error"], reverse=True)[:8]
        for name, found in worst:
            before = found.get("before", found)
            recorded = [f"{f['output_rel_error']:.4%}" if "output_rel_error" in f else "-" for f in (found, before)]
            table.add_row(name, f"{found['rel_error']:.4%}", f"{found['cosine']:.6f}", *(recorded if on_data else ()))
        console.print(table)
    count = len(report["files"])
    checked = f"{count} files hashed" if count else "no streamq.json: structure only, no checksum was checked"
    console.print(f"{'ok' if report['ok'] else str(len(report['problems'])) + ' problem(s)'} ({checked})")


class CalibProgress:
    """What `make_set` tells: what is synthetic and what is amiss always, how far it is unless `quiet`; on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, line: str) -> None:
        if self.quiet and not line.startswith(("synthetic:", "warning:")):
            return
        try:
            print(" ".join(line.split()), file=sys.stderr, flush=True)
        except OSError:  # whoever read it has gone: no reason to stop the work
            self.quiet = True


def show_calib_cost(outlook: Outlook, settings: CalibSettings) -> None:
    """What a calibration set will cost, before any of it is paid, on stderr."""
    experts = f" for each of {len(outlook.experts)} experts" if len(outlook.experts) > 1 else ""
    if not outlook.tokens:
        print(f"cost: at most {outlook.samples} samples{experts}, as large as the dump's calls", file=sys.stderr)
        return
    width, height = settings.size
    lines = [f"{outlook.samples} samples{experts} of {outlook.tokens:,} tokens ({width}*{height}, {settings.frame_num}"
             f" frames), {format_bytes(outlook.nbytes)} on disk"]  # fmt: skip
    if outlook.forwards:
        lines.append(
            f"to make it: {outlook.prompts} videos denoised, {outlook.forwards} forwards,"
            f" {outlook.make_flops / 1e15:.3g} PFLOP; {format_bytes(outlook.streams_nbytes)} of streams in memory"
        )
    else:
        lines.append("to make it: no forward of a block")
    lines.append(f"one replay of it in quant: {outlook.replay_flops / 1e15:.3g} PFLOP")
    device = f", on the device {format_bytes(outlook.peak_device_bytes)}" if outlook.peak_device_bytes else ""
    lines.append(f"peak memory about {format_bytes(outlook.peak_host_bytes)}{device}")
    for line in lines:
        print("cost:", line, file=sys.stderr)


def calib_summary(done: CalibSet, outlook: Outlook, warnings: Iterable[str], *, made: bool) -> dict[str, Any]:
    """The closing figures of `calib`, as `--json` prints them."""
    return {
        "status": "done" if made else "already done",
        "save_path": str(done.path),
        "experts": {name: len(part.samples) for name, part in done.experts.items()},
        "bytes": sum(file.size for part in done.experts.values() for file in part.checkpoint.files),
        "synthetic": done.document["synthetic"],
        "warnings": [*warnings, *done.document["warnings"]],
        "cost": outlook.to_json(),
    }
