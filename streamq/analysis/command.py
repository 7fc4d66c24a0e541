"""`streamq analyze`: options, the order of its work, and the files that it leaves. Imports torch only to measure."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq import __version__
from streamq.errors import RunError, StreamqError, UsageError, out_of_memory
from streamq.options import given_size

if TYPE_CHECKING:
    from streamq.analysis.prepare import AnalyzeSettings, Job
    from streamq.analysis.recommend import Recommended
    from streamq.device import Device

Row = dict[str, Any]


DESCRIPTION = """\
What quantization costs, layer by layer: how far each linear layer and each block is from the float model, for a list of
types, on calibration inputs; and, under a budget, a recipe that gives each layer one of them."""
EXAMPLES = """\
examples:
  how sensitive is each layer to int8, and to float8?
    streamq analyze --model_path Wan2.1-T2V-1.3B-Diffusers --save_path figures --quant_type w8a8,fp8
  the best recipe of two types in at most 1 GB, from inputs that streamq calib made
    streamq analyze --model_path Wan2.1-T2V-1.3B-Diffusers --save_path figures --calib inputs \\
        --format gguf --quant_type w8a16,w4a16 --max_size 1GB"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model_path", required=True, help="folder, .safetensors file or hub id")
    add("--save_path", required=True, type=Path, help="output folder")
    add("--quant_type", action="append", default=[], metavar="TYPE",
        help="a type of the library (streamq recipes); may be repeated, or comma-separated; default: w8a8, fp8, w4a16,"
        " w4a4; with --format, or with a budget, those of one format")  # fmt: skip
    add("--format", help="of the recipe; default: the first that has all the types, or most of the default ones")
    add("--calib", type=Path, help="calibration inputs made by streamq calib; without it analyze makes its own")
    add("--max_size", metavar="SIZE", help="recommend the recipe of least error whose files are at most so large")
    add("--max_error", type=float, metavar="X", help="recommend the smallest recipe whose error is at most X")
    add("--top_k", type=int, default=10, metavar="N", help="most sensitive layers and blocks to show (default 10)")
    add("--device", default="auto", help="auto, cpu, cuda[:i], npu[:i]")
    add("--overwrite", action="store_true", help="discard the analysis that is in SAVE_PATH")
    add("--max_host_memory", metavar="SIZE", help="budget, e.g. 4GiB")
    add("--max_device_memory", metavar="SIZE", help="budget, e.g. 4GiB")
    add("--seed", type=int, default=0, help="of the calibration inputs that it makes")
    add("--quiet", action="store_true", help="no progress, no tables")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--debug", action="store_true", help="show tracebacks")


def settings_of(args: argparse.Namespace) -> AnalyzeSettings:
    """The options as settings. Raises UsageError."""
    from streamq.analysis.prepare import AnalyzeSettings

    return AnalyzeSettings(
        model_path=args.model_path, save_path=args.save_path.expanduser(),
        types=tuple(name.strip() for given in args.quant_type for name in given.split(",")), form=args.format,
        calib=args.calib, max_size=given_size(args, "max_size"), max_error=args.max_error, top_k=args.top_k,
        device=args.device, seed=args.seed, max_host_memory=given_size(args, "max_host_memory"),
        max_device_memory=given_size(args, "max_device_memory"),
        overwrite=args.overwrite, quiet=args.quiet,
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Analyze; returns the exit status. Raises UsageError before anything is written, RunError when the work fails."""
    from streamq import display
    from streamq.analysis import tables
    from streamq.analysis.prepare import prepare
    from streamq.analysis.recommend import check_budget
    from streamq.calibration.make import at_work

    job = prepare(settings_of(args))
    check_budget(job)
    known = _finished(job)
    display.warn(job.warnings)
    try:
        with at_work(job.settings.save_path):
            device = _open(job) if known is None else None
            figures, failed = _work(job, known, device)
    except KeyboardInterrupt:
        how = "the same command without --overwrite" if job.settings.overwrite else "the same command"
        raise KeyboardInterrupt(f"{job.settings.save_path} keeps the finished blocks, {how} goes on") from None
    if args.json:
        print(json.dumps(figures, indent=1))
    elif not args.quiet:
        tables.show(figures)
    if failed is not None:
        raise failed
    return 0


def _finished(job: Job) -> dict[str, Any] | None:
    """The figures of a finished analysis in SAVE_PATH that only lacks this budget. Raises UsageError for another's."""
    from streamq.analysis.prepare import DOCUMENT

    path = job.settings.save_path / DOCUMENT
    if job.settings.overwrite or not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        same = found["identity"] == job.identity
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not an analysis of streamq's; choose another folder, or --overwrite") from error
    if not same:
        raise UsageError(
            f"--save_path {job.settings.save_path}: holds another analysis (model, types, inputs or version differ);"
            " choose another folder, or --overwrite"
        )
    return dict(found)


def _work(job: Job, known: dict[str, Any] | None, device: Device | None) -> tuple[dict[str, Any], StreamqError | None]:
    """Measure, choose, write. A budget that cannot be met is told after everything else is written."""
    from streamq.analysis.recommend import recommend

    if known is None:
        assert device is not None
        layers, blocks, synthetic = _measure(job, device)
    else:
        layers, blocks, synthetic = known["layers"], known["blocks"], known["synthetic"]
    failed: StreamqError | None = None
    found: Recommended | None = None
    notes = list(job.notes)
    if synthetic:
        notes.append(f"calibration inputs with synthetic {', '.join(synthetic)}")
    try:
        found, more = recommend(job, layers)
        notes += more + list(found.notes if found else ())
    except RunError as error:
        failed = error
        notes.append(str(error))
    figures = _write(job, layers, blocks, synthetic, found, notes)
    return figures | {"status": "done" if known is None else "known"}, failed


def _open(job: Job) -> Device:
    """Everything from here on needs torch. Raises UsageError without it, or without the device."""
    from streamq.cli import _import_torch
    from streamq.device import open_device

    _import_torch()
    return open_device(job.settings.device)


def _measure(job: Job, device: Device) -> tuple[list[Row], list[Row], list[str]]:
    import torch

    from streamq import display
    from streamq.analysis.measure import measure
    from streamq.analysis.prepare import DOCUMENT, remove_work
    from streamq.savers.shard import disk_errors

    if job.settings.overwrite:
        with disk_errors(job.settings.save_path / DOCUMENT):
            (job.settings.save_path / DOCUMENT).unlink(missing_ok=True)
        remove_work(job.settings.save_path)
    try:
        return measure(job, device, display.CalibProgress(quiet=job.settings.quiet))
    except (MemoryError, torch.OutOfMemoryError) as error:
        advice = "finished blocks are kept for the same command; with --calib of fewer tokens a sample it begins anew"
        raise out_of_memory(error, advice) from error


def _write(
    job: Job, layers: Sequence[Row], blocks: Sequence[Row], synthetic: Sequence[str], found: Recommended | None,
    notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The files, analyze.json last; returns what --json prints."""
    from streamq.analysis import plots, tables
    from streamq.analysis.prepare import DOCUMENT, remove_work
    from streamq.savers.shard import disk_errors, write_whole

    folder = job.settings.save_path
    full_layers, full_blocks = tables.completed(layers, blocks)
    files = {
        "layers.csv": tables.as_csv(full_layers, tables.LAYER_COLUMNS),
        "blocks.csv": tables.as_csv(full_blocks, tables.BLOCK_COLUMNS),
    }
    if found is not None:
        files["recipe.yaml"] = found.text.encode()
    try:
        files |= plots.draw(full_layers, full_blocks)
    except UsageError as error:
        notes.append(f"no plots: {error}")
    facts = _facts(job, found, notes)
    for name in ("recipe.yaml", "layers.png", "layers.svg", "blocks.png", "blocks.svg", DOCUMENT):
        if name not in files:  # of an earlier analysis
            with disk_errors(folder / name):
                (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content, 0o644)
    document = facts | {
        "synthetic": list(synthetic), "identity": job.identity,
        "layers": [tables.finite(row) for row in layers], "blocks": [tables.finite(row) for row in blocks],
    }  # fmt: skip
    write_whole(folder / DOCUMENT, json.dumps(document, indent=1).encode(), 0o644)
    remove_work(folder)
    top = job.settings.top_k
    return facts | {
        "save_path": str(folder), "files": [*files, DOCUMENT],
        "top_layers": tables.most_sensitive(full_layers, "layer", "output_rel_error", top),
        "top_blocks": tables.most_sensitive(full_blocks, "block", "rel_error", top),
    }  # fmt: skip


def _facts(job: Job, found: Recommended | None, notes: Sequence[str]) -> dict[str, Any]:
    chosen = job.calibration
    return {
        "streamq": __version__,
        "family": job.experts[0].model.family,
        "experts": [expert.name for expert in job.experts],
        "types": [{"type": one.recipe.name, "format": one.recipe.form} for one in job.candidates],
        "samples": chosen.samples,
        "tokens": {name: shapes.tokens for name, shapes in chosen.shapes.items()},
        "dtype": chosen.dtype,
        "rows": chosen.rows,
        "recipe": None if found is None else found.to_json(),
        "notes": list(dict.fromkeys(notes)),
    }
