"""`streamq eval`: its options, what goes with what, and the order of its work. No torch at import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streamq.errors import RunError, UsageError
from streamq.extras import check_there

if TYPE_CHECKING:
    from streamq.evaluation.evaluate import Pairs, Results
    from streamq.evaluation.pairs import Video
    from streamq.evaluation.settings import EvalSettings
    from streamq.evaluation.vbench import Imported
    from streamq.report import Clip, ReportData

REPORT = "report.html"
REPORT_BYTES = 1 << 30  # frames that the page's making may hold
GENERATING = ("prompts", "prompt", "transformer", "size", "frame_num", "fps", "sample_steps", "guidance", "guidance_2",
              "shift", "image", "last_image")  # fmt: skip
MODELS = ("clip_model", "dino_model", "lpips_model")


DESCRIPTION = """\
Compare videos pair by pair: the same prompt, seed and settings through the float model and through a quantized one.
Writes tables and report.html, from folders that streamq generate wrote, or from videos that it makes itself."""
EXAMPLES = """\
examples:
  make what is missing, measure it, and leave a page
    streamq eval --model_path Wan2.1-T2V-1.3B-Diffusers --transformer quantized --save_path compared \\
        --prompts prompts.txt --seeds 0,1,2 --size '480*272' --frame_num 33
  folders of videos that are there; exit status 1 if the pictures are worse than 30 dB
    streamq eval --reference float --candidate int8 --candidate int4 --fail_under psnr=30"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command line's page, and two of each: videos that are there, or a model that makes them."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_videos(parser)
    add = parser.add_argument
    add(
        "--save_path",
        type=Path,
        help="where the tables and report.html go (default: `eval` beside the first candidate)",
    )
    add("--metrics", default="all", help="latent,psnr,ssim,pixel,flicker,motion,clip_t,clip_f,background_consistency,"
        "subject_consistency,lpips, single metrics, all (default all: what the given models allow)")  # fmt: skip
    add("--clip_model", help="a CLIPModel's folder or hub id, for clip_t, clip_score, clip_f, background_consistency")
    add("--dino_model", help="a DINO ViT's folder or hub id, for subject_consistency")
    add("--lpips_model", help="LPIPS's AlexNet as .safetensors: file, folder or hub id")
    add("--noise_floor", type=Path, metavar="DIR", help="a second folder of float videos: what differs less is noise")
    add("--frames", default="all", metavar="N", help="frames of a video for clip_t and lpips, or all (default all)")
    add("--bootstrap", type=int, default=10000, metavar="N", help="draws for the 95 %% intervals (default 10000)")
    add("--fail_under", action="append", default=[], metavar="METRIC=NUMBER", help="exit 1 where a candidate's mean is"
        " worse, e.g. psnr=30; may be repeated")  # fmt: skip
    add("--allow_mismatch", action="append", default=[], metavar="FIELD", help="a field that a pair may differ in")
    add("--vbench_export", type=Path, metavar="DIR", help="write the videos as VBench's custom mode takes them")
    add("--vbench_import", type=Path, action="append", default=[], metavar="FILE", help="VBench's results, into the"
        " table of pairs; may be repeated")  # fmt: skip
    add("--no_report", action="store_true", help="no report.html")
    add("--device", default="auto", help="auto, cpu, cuda[:i], npu[:i]: for making videos and for the metrics' models")
    add("--seed", type=int, default=0, help="of the intervals' draws")
    add("--quiet", action="store_true", help="no progress, no tables")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--debug", action="store_true", help="show tracebacks")


def _add_videos(parser: argparse.ArgumentParser) -> None:
    there = parser.add_argument_group("videos that are there")
    there.add_argument("--reference", type=Path, metavar="DIR", help="the float model's, made by streamq generate")
    there.add_argument("--candidate", type=Path, action="append", default=[], metavar="DIR",
                       help="the quantized model's; may be repeated")  # fmt: skip
    there.add_argument("--candidate_model", type=Path, action="append", default=[], metavar="DIR",
                       help="the quantized folder of each --candidate in turn, for the report")  # fmt: skip
    group = parser.add_argument_group("videos to be made, below SAVE_PATH, where they are missing")
    add = group.add_argument
    add("--model_path", help="folder or hub id of the float pipeline")
    add("--transformer", type=Path, action="append", default=[], metavar="DIR",
        help="a folder made by streamq quant; may be repeated")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    add("--prompt", action="append", metavar="TEXT", help="may be repeated")
    add("--seeds", default="0", help="e.g. 0,1,2: each prompt with each (default 0)")
    add("--negative_prompt", default="", metavar="TEXT")
    add("--image", type=Path, help="the first frame, of image-to-video models")
    add("--last_image", type=Path, help="the last frame, of models that take one")
    add("--size", metavar="W*H", help="of the video in pixels, e.g. 832*480")
    add("--frame_num", type=int, metavar="N", help="frames, 4n + 1")
    add("--fps", type=float, help="frames a second")
    add("--sample_steps", type=int, metavar="N", help="steps of the schedule")
    add("--guidance", type=float)
    add("--guidance_2", type=float, help="of the second expert")
    add("--shift", type=float, help="of the schedule")
    add("--dtype", choices=["bf16", "fp32", "fp16"], default="bf16", help="to compute in (default bf16)")
    add("--max_host_memory", metavar="SIZE", help="budget, e.g. 4GiB")
    add("--max_device_memory", metavar="SIZE", help="budget, e.g. 4GiB")
    add("--overwrite", action="store_true", help="make videos again that are there")


def run(args: argparse.Namespace) -> int:
    """Evaluate. Raises UsageError for what does not go together, and RunError after the tables are written: for pairs
    that failed and bounds that were missed."""
    from streamq.calibration.make import at_work
    from streamq.evaluation.evaluate import pair_up
    from streamq.evaluation.make import make_missing, names_of, plan_missing
    from streamq.evaluation.measure import check_models
    from streamq.evaluation.pairs import read_folder

    about: Callable[[str], None] = (lambda text: None) if args.quiet else (lambda text: print(text, file=sys.stderr))
    settings, notes, save_path, models = check(args)
    check_models(settings)
    floor = None if settings.noise_floor is None else read_folder(settings.noise_floor)
    if args.model_path is not None:
        asked = plan_missing(args, save_path, models)
        with at_work(save_path):
            reference, candidates = make_missing(asked, about)
            pairs = pair_up(reference, candidates, floor, settings.allowed)
            matched = _matched(args, settings, notes, reference, pairs)
            _measure(args, matched, save_path, models, about)
        return 0
    folders = names_of(args.candidate, "--candidate")
    reference, candidates = read_folder(args.reference), {name: read_folder(path) for name, path in folders.items()}
    pairs = pair_up(reference, candidates, floor, settings.allowed)
    matched = _matched(args, settings, notes, reference, pairs)
    with at_work(save_path):
        _measure(args, matched, save_path, models, about)
    return 0


@dataclass(frozen=True)
class _Matched:
    """Videos that belong together, and all that is to be done with them, checked."""

    settings: EvalSettings
    notes: list[str]
    reference: list[Video]
    pairs: dict[str, Pairs]
    limits: dict[str, float]
    imported: Imported


def _matched(
    args: argparse.Namespace, settings: EvalSettings, notes: list[str], reference: list[Video], pairs: dict[str, Pairs]
) -> _Matched:
    """Raises UsageError for what these videos do not have."""
    from streamq.evaluation import vbench
    from streamq.evaluation.settings import parse_limits

    settings, more = _with_latents(args, settings, reference, pairs)
    limits = parse_limits(args.fail_under, settings.metrics)
    imported = vbench.read_results(args.vbench_import, vbench.names_of(reference, pairs))
    return _Matched(settings, notes + more, reference, pairs, limits, imported)


def _measure(
    args: argparse.Namespace, matched: _Matched, save_path: Path, models: dict[str, Path], about: Callable[[str], None]
) -> None:
    """Measure, write the tables and the page, and judge. Raises UsageError, RunError."""
    from streamq.evaluation import tables, vbench
    from streamq.evaluation.evaluate import FLOOR, evaluate, summarise_columns

    reference, settings = matched.reference, matched.settings
    results = evaluate(reference, matched.pairs, settings, about)
    results.notes[:0] = matched.notes
    vbench.merge(results, matched.imported)
    whole = {name: found for name, found in matched.pairs.items() if name != FLOOR}
    names = list(whole)
    summarise_columns(results, names, vbench.columns(results), settings)
    files = tables.write_tables(save_path, results, settings.metrics)
    if not args.no_report:
        found_models = {name: path for name, path in models.items() if name in names}
        files.append(_report(save_path / REPORT, reference, whole, found_models, results))
    if args.vbench_export is not None:
        results.notes.extend(vbench.commands(vbench.export(args.vbench_export, reference, matched.pairs)))
    _tell(args, results, files, names)
    _judge(results, matched.limits, names)


def check(args: argparse.Namespace) -> tuple[EvalSettings, list[str], Path, dict[str, Path]]:
    """The settings, notes on what is left out, where results go, and candidate -> quantized folder.

    Raises UsageError for all that options and installed packages tell, before a video is read or made.
    """
    from streamq.evaluation.settings import parse_limits

    settings, notes, save_path, models = _settings(args)
    parse_limits(args.fail_under, settings.metrics)
    _check_packages(settings, report=not args.no_report)
    return settings, notes, save_path, models


def _check_packages(settings: EvalSettings, *, report: bool) -> None:
    """Raise UsageError for a package that is needed once the videos are made, or all of them are measured."""
    from streamq.evaluation.metrics import METRICS

    needed = {"av": "reading videos", "scipy": "the signed-rank test"}
    if any(METRICS[metric].group == "motion" for metric in settings.metrics):
        needed["cv2"] = "motion"
    if any(METRICS[metric].needs in ("clip_model", "dino_model") for metric in settings.metrics):
        needed |= {"transformers": "metrics of features", "PIL": "pictures"}
    if report:
        needed |= {"jinja2": "the report", "PIL": "the report's pictures"}
        needed["matplotlib"] = "the report's heat maps"
    check_there(needed, "eval")


def _settings(args: argparse.Namespace) -> tuple[EvalSettings, list[str], Path, dict[str, Path]]:
    from streamq.device import kind_of
    from streamq.evaluation.make import names_of
    from streamq.evaluation.pairs import check_fields
    from streamq.evaluation.settings import EvalSettings, select

    making = args.model_path is not None
    if making == (args.reference is not None):
        raise UsageError(
            "give either --reference and --candidate (folders of videos), or --model_path and --transformer"
        )
    if making:
        _check_making(args)
        models = names_of(args.transformer, "--transformer")
    else:
        if stray := [f"--{name}" for name in GENERATING if getattr(args, name)]:
            raise UsageError(f"{stray[0]}: is for videos to be made; give --model_path, or leave it out")
        if not args.candidate:
            raise UsageError("--reference without --candidate: nothing to compare it with")
        if args.candidate_model and len(args.candidate_model) != len(args.candidate):
            raise UsageError(f"--candidate_model: {len(args.candidate_model)}, --candidate: {len(args.candidate)}; give"
                             " one for each, in the same order")  # fmt: skip
        models = dict(zip(names_of(args.candidate, "--candidate"), args.candidate_model, strict=False))
    check_fields(args.allow_mismatch)
    if not 2 <= args.bootstrap <= 1_000_000:
        raise UsageError(f"--bootstrap {args.bootstrap}: from 2 to 1000000 draws")
    frames = None if args.frames == "all" else int(args.frames) if args.frames.isdecimal() else 0
    if frames == 0:
        raise UsageError(f"--frames {args.frames}: a number from 1 on, or all")
    given = {name: getattr(args, name) for name in MODELS}
    metrics, notes = select(args.metrics, given)
    kind_of(args.device)
    save_path = (args.save_path or args.candidate[0].absolute().parent / "eval").expanduser()
    if save_path.exists() and not save_path.is_dir():
        raise UsageError(f"--save_path {save_path}: is a file; give a folder")
    settings = EvalSettings(
        metrics=metrics, noise_floor=args.noise_floor, frames=frames, bootstrap=args.bootstrap, seed=args.seed,
        allowed=tuple(args.allow_mismatch), device=_device(args.device) if any(given.values()) else "cpu", **given,
    )  # fmt: skip
    return settings, notes, save_path, models


def _check_making(args: argparse.Namespace) -> None:
    from streamq.generation.settings import check_prompts

    if args.candidate:
        raise UsageError("--candidate: goes with --reference; with --model_path give --transformer")
    if not args.transformer:
        raise UsageError(
            "--model_path without --transformer: nothing to compare it with; give a folder of streamq quant"
        )
    if (args.prompts is None) == (args.prompt is None):
        raise UsageError("--model_path: give the prompts, as --prompts FILE or --prompt TEXT")
    check_prompts(args.prompt or (), "--prompt")
    if args.save_path is None:
        raise UsageError("--model_path: give --save_path, where the videos go")


def _device(name: str) -> str:
    """torch's name of a device, opened."""
    from streamq.device import kind_of, open_device

    kind = kind_of(name)
    if kind == "cpu":
        return kind  # not opened: that keeps torch to one thread, which CLIP is slow on
    open_device(name)
    return name if ":" in name else f"{kind}:0"


def _with_latents(
    args: argparse.Namespace, settings: EvalSettings, reference: list[Video], pairs: dict[str, Pairs]
) -> tuple[EvalSettings, list[str]]:
    from dataclasses import replace

    from streamq.evaluation.settings import without_latents

    videos = [*reference, *(other for found in pairs.values() for _, other in found)]
    metrics, notes = without_latents(args.metrics, settings.metrics, videos)
    return replace(settings, metrics=metrics), notes


def _report(
    path: Path, reference: list[Video], pairs: dict[str, Pairs], models: dict[str, Path], results: Results
) -> Path:
    """Write the page; of many or large videos it shows the first ones, and says so. Raises UsageError, RunError."""
    from streamq.report import build
    from streamq.savers.shard import write_whole

    size = reference[0].sidecar.pair
    nbytes = 3 * size["width"] * size["height"] * size["frame_num"] * (1 + len(pairs))
    count = max(1, min(len(reference), REPORT_BYTES // nbytes))
    write_whole(path, build(_report_data(reference, pairs, models, results, count)).encode(), 0o644)
    return path


def _report_data(
    reference: list[Video], pairs: dict[str, Pairs], models: dict[str, Path], results: Results, count: int
) -> ReportData:
    from streamq import outputs
    from streamq.report import Candidate, ReportData

    notes = list(results.notes)
    if count < len(reference):
        notes.append(f"the page shows the first {count} of {len(reference)} pairs; the tables have all")
    shown = []
    for name, found in pairs.items():
        by_path = {one.path: other for one, other in found}
        manifest = outputs.manifest(models[name]) if name in models else None
        shown.append(Candidate(name, manifest, [_clip(by_path[video.path]) for video in reference[:count]]))
    return ReportData(
        title=", ".join(pairs) + " against the float model",
        reference=[_clip(video) for video in reference[:count]],
        candidates=shown,
        per_video=[row for row in results.per_video if row["candidate"] in pairs],
        summary=[row for row in results.summary if row["candidate"] in pairs],
        notes=notes,
    )


def _clip(video: Video) -> Clip:
    from streamq.report import Clip
    from streamq.videos import pixel_file, read_video

    frames, _ = read_video(pixel_file(video.path, video.sidecar))
    return Clip(frames, float(video.sidecar.pair["fps"]), video.sidecar)


def _tell(args: argparse.Namespace, results: Results, files: list[Path], names: list[str]) -> None:
    from streamq.evaluation import tables

    if args.json:
        print(tables.to_json(results, files, names))
        return
    if args.quiet:
        return
    tables.show(results, names)
    for note in results.notes:
        print(f"note: {note}")
    print(f"{len(files)} files in {files[0].parent}: {', '.join(file.name for file in files)}")
    if files[-1].name == REPORT:
        print(f"open {files[-1].absolute().as_uri()} in a browser; it is one file, and may be copied anywhere")


def _judge(results: Results, limits: dict[str, float], names: list[str]) -> None:
    """Raises RunError for failed pairs and missed bounds."""
    from streamq.evaluation.tables import worse

    means = {(row["candidate"], row["metric"]): row["mean"] for row in results.summary}
    missed = []
    for name in names:
        for metric, bound in limits.items():
            mean = means.get((name, metric), float("nan"))
            if worse(metric, mean, bound):
                missed.append(f"{name} has {metric} {mean:.5g}, --fail_under wants {bound:g}")
    wrong = [f"{len(results.failed)} pairs failed: {results.failed[0]}"] if results.failed else []
    if wrong or missed:
        raise RunError("; ".join([*wrong, *missed]) + "; the tables are written")
