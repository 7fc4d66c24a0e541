"""Options and entry of `streamq generate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamq.calibration.prompts import load_prompts
from streamq.calibration.settings import Prompt, parse_video_size
from streamq.errors import UsageError, out_of_memory
from streamq.generation import run_job
from streamq.generation.settings import DTYPES, GenerateSettings, check_prompts
from streamq.options import given_size

DESCRIPTION = """\
Make videos with a float or a quantized model: every prompt with every seed, through diffusers' own pipeline, the
transformer's blocks read from disk as they are needed. Videos that are there are not made again."""
EXAMPLES = """\
examples:
  one video by the float model
    streamq generate --model_path Wan2.1-T2V-1.3B-Diffusers --save_path float --prompt "a red fox in the snow"
  the same prompts and seeds by what streamq quant wrote, small enough for a first look
    streamq generate --model_path Wan2.1-T2V-1.3B-Diffusers --transformer quantized --save_path int8 \\
        --prompts prompts.txt --seeds 0,1,2 --size '480*272' --frame_num 33"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model_path", required=True, help="a diffusers pipeline's folder (model_index.json) or hub id")
    add("--save_path", required=True, type=Path, help="folder for the videos; those that are there are not made again")
    add("--transformer", type=Path, metavar="DIR", help="a folder made by quant, or a float one (default: the model's)")
    add("--transformer_2", type=Path, metavar="DIR", help="the low-noise expert's, where --transformer has one expert")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line, or .jsonl with text, image, negative_prompt")
    add("--negative_prompt", default="", metavar="TEXT", help="for prompts that have none of their own")
    add("--image", type=Path, metavar="FILE", help="the picture that an image-to-video model starts with")
    add("--last_image", type=Path, metavar="FILE", help="the picture that a first-and-last-frame model ends with")
    add("--size", metavar="W*H", help="in pixels, e.g. 832*480 (default: 832*480; ti2v 1280*704)")
    add("--frame_num", type=int, metavar="N", help="frames, 4n + 1 (default 81; ti2v 121)")
    add("--fps", type=float, help="of the video files (default 16; ti2v 24)")
    add("--sample_steps", type=int, metavar="N", help="default: the model's own, 40 or 50")
    add("--guidance", type=float, help="default: the model's own; up to 1: none")
    add("--guidance_2", type=float, help="of the low-noise expert (default: --guidance, or the model's own)")
    add("--shift", type=float, help="of the schedule (default: the pipeline's)")
    add("--seed", type=int, default=0, help="of the first video of a prompt (default 0)")
    add("--seeds", metavar="LIST", help="e.g. 0,1,2: every prompt with each, instead of --seed and --num_videos")
    add("--num_videos", type=int, default=1, metavar="N", help="of each prompt, with seeds from --seed up (default 1)")
    add("--dtype", choices=list(DTYPES), default="bf16", help="to compute in (default bf16)")
    add("--device", default="auto", help="auto, cpu, cuda[:i], npu[:i]")
    add("--max_host_memory", metavar="SIZE", help="budget, e.g. 4GiB")
    add("--max_device_memory", metavar="SIZE", help="budget, e.g. 4GiB")
    add("--overwrite", action="store_true", help="replace other videos that are in SAVE_PATH")
    add("--quiet", action="store_true", help="no progress")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--debug", action="store_true", help="show tracebacks")


def settings_of(args: argparse.Namespace) -> GenerateSettings:
    """The command line's settings. Raises UsageError for options that contradict each other."""

    return GenerateSettings(
        model_path=args.model_path, save_path=args.save_path, prompts=_prompts(args), seeds=_seeds(args),
        transformer=args.transformer, transformer_2=args.transformer_2, negative_prompt=args.negative_prompt,
        image=args.image, last_image=args.last_image, size=None if args.size is None else parse_video_size(args.size),
        frame_num=args.frame_num, fps=args.fps, sample_steps=args.sample_steps, guidance=args.guidance,
        guidance_2=args.guidance_2, shift=args.shift, device=args.device, dtype=args.dtype,
        max_host_memory=given_size(args, "max_host_memory"), max_device_memory=given_size(args, "max_device_memory"),
        overwrite=args.overwrite,
    )  # fmt: skip


def _prompts(args: argparse.Namespace) -> tuple[str | Prompt, ...]:
    if args.prompt and args.prompts is not None:
        raise UsageError("--prompt and --prompts: give one of them")
    check_prompts(args.prompt, "--prompt")
    return tuple(args.prompt) if args.prompts is None else load_prompts(args.prompts.expanduser())


def _seeds(args: argparse.Namespace) -> tuple[int, ...]:
    if args.num_videos < 1:
        raise UsageError(f"--num_videos {args.num_videos}: at least 1")
    if args.seeds is None:
        return tuple(range(args.seed, args.seed + args.num_videos))
    if args.num_videos != 1 or args.seed:
        raise UsageError("--seeds: says it all; leave --seed and --num_videos out")
    try:
        return tuple(int(word) for word in args.seeds.split(","))
    except ValueError as error:
        raise UsageError(f"--seeds {args.seeds}: not whole numbers with commas between them, e.g. 0,1,2") from error


class _Said:
    """Shows what `generate` says: on a terminal a line that changes, elsewhere one plain line a step; on stderr."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self.quiet = quiet
        self.console = Console(stderr=True, markup=False, highlight=False)
        self.status: Any = None

    def __call__(self, line: str) -> None:
        if self.quiet and not line.startswith("warning:"):
            return
        if self.status is not None and line.startswith("video "):
            self.status.update(line)
            return
        try:
            self.console.print(" ".join(line.split()), soft_wrap=True)
        except OSError:  # whoever read it has gone: no reason to stop the work
            self.quiet = True

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While it is at work."""
        if self.quiet or not self.console.is_terminal:
            yield
            return
        with self.console.status("starting") as self.status:
            yield


def _memory_ran_out(error: BaseException) -> bool:
    import torch  # imported already, or nothing could have run out

    return isinstance(error, (MemoryError, torch.OutOfMemoryError))


def run(args: argparse.Namespace) -> int:
    """Make the videos; prints their sidecars. Returns the exit status."""
    settings = settings_of(args)
    from streamq.generation.prepare import prepare

    job, said = prepare(settings), _Said(args.quiet)
    try:
        with said.shown():
            made = run_job(job, said)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished videos in {settings.save_path} are kept, the same command goes on") from None
    except (MemoryError, RuntimeError) as error:
        if not _memory_ran_out(error):
            raise
        advice = (
            "finished videos are kept: run the same command with a smaller --max_host_memory or --max_device_memory, or"
            " another run with a smaller --size or --frame_num"
        )
        raise out_of_memory(error, advice) from error
    if args.json:
        done = sum(video.done for video in job.videos)
        videos = [str(path) for path in made]
        print(json.dumps({"videos": videos, "made": len(made) - done, "already_done": done}, indent=1))
    elif not args.quiet:
        for path in made:
            print(path.with_suffix(".mp4"))
    return 0
