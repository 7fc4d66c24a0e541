"""Videos that `streamq eval` makes itself: the float model's and each transformer's, where they are missing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from streamq.calibration.settings import Prompt
from streamq.errors import UsageError
from streamq.evaluation.evaluate import FLOOR, REFERENCE
from streamq.evaluation.pairs import Video
from streamq.generation import GenerateSettings
from streamq.videos import read_sidecar

PASSED_ON = ("sample_steps", "frame_num", "fps", "guidance", "guidance_2", "shift", "image", "last_image")


def names_of(folders: Sequence[Path], option: str) -> dict[str, Path]:
    """A candidate's name -> its folder: the folder's own name. Raises UsageError for one name twice, and for ours."""
    found: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in (REFERENCE, FLOOR):
            raise UsageError(f"{option} {folder}: {name!r} is what eval calls its own; rename the folder")
        if name in found:
            raise UsageError(
                f"{option} {folder}: the same name as {found[name]}; a candidate goes by its folder's name"
            )
        found[name] = folder
    return found


def parse_seeds(text: str) -> tuple[int, ...]:
    """`"0,1,2"` -> (0, 1, 2). Raises UsageError for others and for a seed twice."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError(f"--seeds {text}: write different whole numbers from 0 on, e.g. 0,1,2")
    return seeds


def check_different(prompts: Sequence[str | Prompt], option: str) -> None:
    """Raise UsageError for a prompt that stands twice: its videos could not be told apart, and made no two pairs."""
    seen = set()
    for one in (Prompt(given) if isinstance(given, str) else given for given in prompts):
        key = one.text, one.image, one.last_image
        if key in seen:
            raise UsageError(f"{option}: {one.text[:60]!r} stands twice; give it once, with several --seeds")
        seen.add(key)


def plan_missing(
    args: argparse.Namespace, save_path: Path, folders: dict[str, Path]
) -> dict[str, GenerateSettings]:  # fmt: skip
    """Name -> what `generate` is to be asked for, below `save_path`: the reference first, then each transformer.

    Raises UsageError for all that would be refused: what is wrong with the last is said before the first is made.
    """
    from streamq.calibration.prompts import load_prompts
    from streamq.calibration.settings import parse_video_size
    from streamq.generation.prepare import prepare
    from streamq.options import given_size

    for given_folder in folders.values():
        if not given_folder.is_dir():
            raise UsageError(f"--transformer {given_folder}: no such folder; give one that streamq quant made")
    prompts = load_prompts(args.prompts) if args.prompts is not None else tuple(args.prompt)
    given = {name: getattr(args, name) for name in PASSED_ON}
    given |= {name: given_size(args, name) for name in ("max_host_memory", "max_device_memory")}
    check_different(prompts, "--prompts" if args.prompts is not None else "--prompt")
    size = None if args.size is None else parse_video_size(args.size)
    whole: dict[str, Path | None] = {REFERENCE: None, **folders}
    settings = {
        name: GenerateSettings(
            model_path=args.model_path,
            save_path=save_path / name,
            prompts=prompts,
            seeds=parse_seeds(args.seeds),
            transformer=folder,
            negative_prompt=args.negative_prompt,
            size=size,
            device=args.device,
            dtype=args.dtype,
            overwrite=args.overwrite,
            **given,
        )  # fmt: skip
        for name, folder in whole.items()
    }
    for one in settings.values():
        prepare(one)
    return settings


def make_missing(
    settings: dict[str, GenerateSettings], about: Callable[[str], None]
) -> tuple[list[Video], dict[str, list[Video]]]:
    """Make the videos of `plan_missing`; what is there already stays.

    Returns the reference's and each candidate's, those that were asked for. Raises UsageError, RunError.
    """
    from streamq.generation import generate

    made = {}
    for name, one in settings.items():
        about(f"videos of {name}")
        made[name] = [Video(path, read_sidecar(path)) for path in generate(one, about)]
    return made.pop(REFERENCE), made
