"""`quant --preview PROMPT`: one video by the float model and by what was just made, and the page that compares them.

It is `streamq eval` with the run's own paths; nothing of it is done in another way.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from streamq.errors import UsageError
from streamq.evaluation import command
from streamq.extras import check_there
from streamq.options import QuantOptions

FOLDER = "preview"  # below SAVE_PATH
PASSED_ON = ("size", "frame_num", "sample_steps")
NEEDED = ("transformers",)  # besides what eval asks for


def add_options(parser: argparse.ArgumentParser) -> None:
    """The option, and what a small machine wants smaller than the model's own."""
    add = parser.add_argument
    add("--preview", action="append", default=[], metavar="PROMPT", help="then make this video with the float model and"
        " with the result, and SAVE_PATH/preview/report.html that compares them; may be repeated")  # fmt: skip
    add("--preview_size", metavar="W*H", help="of these videos (default: the model's own)")
    add("--preview_frame_num", type=int, metavar="N", help="their frames, 4n + 1")
    add("--preview_sample_steps", type=int, metavar="N", help="their steps")


def check(args: argparse.Namespace, options: QuantOptions) -> None:
    """Raise UsageError for what would fail once the model is quantized: before anything is written."""
    if not args.preview:
        if stray := [name for name in PASSED_ON if getattr(args, f"preview_{name}") is not None]:
            raise UsageError(f"--preview_{stray[0]}: goes with --preview PROMPT")
        return
    if options.lora:
        raise UsageError("--preview: the float model is shown without LoRAs; use streamq generate on a merged model")
    from streamq.calibration.settings import parse_video_size
    from streamq.evaluation.evaluate import REFERENCE
    from streamq.evaluation.make import check_different, names_of
    from streamq.generation import GenerateSettings
    from streamq.generation.prepare import prepare
    from streamq.generation.settings import check_prompts

    check_there(dict.fromkeys(NEEDED, "--preview"), "eval")
    check_prompts(args.preview, "--preview")
    check_different(args.preview, "--preview")
    names_of([options.save_path], "--save_path")
    command.check(_given(args, options, [options.save_path]))  # a run for several formats calls them by these
    size = args.preview_size
    try:
        prepare(
            GenerateSettings(
                model_path=options.model_path, save_path=options.save_path / FOLDER / REFERENCE, device=options.device,
                prompts=tuple(args.preview), size=None if size is None else parse_video_size(size),
                frame_num=args.preview_frame_num, sample_steps=args.preview_sample_steps, overwrite=options.overwrite,
            )
        )  # fmt: skip
    except UsageError as error:  # it knows the options by the names that generate has for them
        raise UsageError(re.sub(rf"--({'|'.join(PASSED_ON)})\b", r"--preview_\1", str(error))) from error


def show(args: argparse.Namespace, options: QuantOptions, formats: list[str]) -> Path:
    """Make the videos, the tables and the page; returns the page. Raises UsageError, RunError."""
    several = len(formats) > 1
    folders = [options.save_path / name for name in formats] if several else [options.save_path]
    given = _given(args, options, folders)
    command.run(given)
    return given.save_path / command.REPORT


def _given(args: argparse.Namespace, options: QuantOptions, folders: list[Path]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    argv: list[Any] = ["--model_path", options.model_path, "--save_path", options.save_path / FOLDER]
    for folder in folders:
        argv += ["--transformer", folder]
    for prompt in args.preview:
        argv += [f"--prompt={prompt}"]
    for name in PASSED_ON:
        if (value := getattr(args, f"preview_{name}")) is not None:
            argv += [f"--{name}", value]
    argv += ["--device", options.device, *["--quiet"] * (options.quiet or options.json)]
    argv += ["--overwrite"] * options.overwrite  # videos of what was there before
    return parser.parse_args([str(one) for one in argv])
