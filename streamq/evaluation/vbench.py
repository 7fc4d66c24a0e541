"""VBench, out and back: a folder of videos that its custom mode takes, and its results as columns of ours.

VBench (Huang et al. 2024) with `--mode=custom_input` takes a flat folder of .mp4 files and a JSON object
{"file name": "prompt"} as `--prompt_file`, and writes {dimension: [overall, [{"video_path", "video_results"}, ...]]}.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from streamq.checkpoint import load_json
from streamq.errors import UsageError
from streamq.evaluation.evaluate import REFERENCE, Pairs, Results
from streamq.evaluation.pairs import Video
from streamq.savers.shard import write_whole
from streamq.videos import iter_frames, pixel_file, write_lossless_mp4

DIMENSIONS = (
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
    "imaging_quality",
)  # fmt: skip
MAX_BYTES = 256 << 20
Imported = dict[tuple[str, str], dict[str, float]]  # (folder's name, stem) -> dimension -> VBench's number


def export(folder: Path, reference: list[Video], pairs: dict[str, Pairs]) -> list[Path]:
    """Write `folder`/NAME/STEM.mp4 (h264, lossless RGB) and `folder`/NAME.prompts.json, of every name.

    STEM is the reference's, so that results can be paired. Returns the folders of videos. Raises UsageError, RunError.
    """
    named = {REFERENCE: [(video, video) for video in reference], **pairs}
    for name, found in named.items():
        prompts = {}
        for one, other in found:
            pair = other.sidecar.pair
            file = folder / name / f"{one.stem}.mp4"
            write_lossless_mp4(file, iter_frames(pixel_file(other.path, other.sidecar)), float(pair["fps"]))
            prompts[file.name] = pair["prompt"]
        write_whole(
            folder / f"{name}.prompts.json", (json.dumps(prompts, indent=1, ensure_ascii=False) + "\n").encode(), 0o644
        )
    return [folder / name for name in named]


def commands(folders: Sequence[Path]) -> list[str]:
    """What to run in VBench's own folder for each of ours. (Its `vbench evaluate` takes one dimension at a time.)"""
    return [
        f"python evaluate.py --mode=custom_input --videos_path {folder} --prompt_file {folder}.prompts.json"
        f" --dimension {' '.join(DIMENSIONS)}"
        for folder in (one.absolute() for one in folders)
    ]


def read_results(paths: Sequence[Path], names: Collection[tuple[str, str]]) -> Imported:
    """VBench's ..._eval_results.json files, one for each folder that it was run on, put together.

    `names`: what may be in them, see `names_of`. Raises UsageError for another JSON and for another video.
    """
    found: Imported = {}
    for path in paths:
        document = load_json(path, MAX_BYTES, "let VBench write it again")
        if not isinstance(document, dict) or not document:
            raise UsageError(f"--vbench_import {path}: not VBench's results; give its ..._eval_results.json")
        for dimension, result in document.items():
            if not isinstance(result, list) or len(result) != 2 or not isinstance(result[1], list):
                raise UsageError(f"--vbench_import {path}: {dimension} is not [overall, [videos]], as VBench writes it")
            for entry in result[1]:
                key, value = _entry(path, dimension, entry)
                if key not in names:
                    raise UsageError(
                        f"--vbench_import {path}: {'/'.join(key)}.mp4 is no video of this comparison; export it first"
                    )
                found.setdefault(key, {})[dimension] = value
    return found


def names_of(reference: list[Video], pairs: dict[str, Pairs]) -> set[tuple[str, str]]:
    """(folder, stem) of every file that `export` writes."""
    return {(name, video.stem) for name in (REFERENCE, *pairs) for video in reference}


def _entry(path: Path, dimension: str, entry: Any) -> tuple[tuple[str, str], float]:
    name = entry.get("video_path") if isinstance(entry, dict) else None
    value = entry.get("video_results") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not isinstance(value, bool | int | float):
        raise UsageError(f"--vbench_import {path}: {dimension} has a video without video_path or a number")
    file = PurePosixPath(name.replace("\\", "/"))
    return (file.parent.name, file.stem), float(value)


def merge(results: Results, imported: Imported) -> None:
    """Add columns `vbench_DIMENSION`, `…_reference` and `…_diff` to the rows per video."""
    for row in results.per_video:
        before = imported.get((REFERENCE, row["stem"]), {})
        for dimension, value in imported.get((row["candidate"], row["stem"]), {}).items():
            row[f"vbench_{dimension}"] = value
            if dimension in before:
                row[f"vbench_{dimension}_reference"] = before[dimension]
                row[f"vbench_{dimension}_diff"] = value - before[dimension]


def columns(results: Results) -> list[str]:
    """The imported columns to be summed up."""
    found = {key for row in results.per_video for key in row if key.startswith("vbench_")}
    return sorted(key for key in found if not key.endswith("_reference"))
