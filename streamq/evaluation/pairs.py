"""Which videos are compared with which: by the JSON beside each, never by luck."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamq.errors import UsageError, nearest
from streamq.videos import PAIR_FIELDS, Sidecar, find_videos, lost_sidecar

IDENTITY = ("prompt", "seed", "image", "last_image")  # what tells the videos of one folder apart
FLOOR_MAY_DIFFER = ("device_kind",)  # a noise floor is float against float with another device or kernel


@dataclass(frozen=True)
class Video:
    """A video of a folder: its sidecar's path and what it says."""

    path: Path
    sidecar: Sidecar

    @property
    def stem(self) -> str:
        """The sidecar's name without its suffix."""
        return self.path.stem

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells it apart in its folder: the values of `IDENTITY`."""
        return tuple(self.sidecar.pair[field] for field in IDENTITY)


def read_folder(folder: Path) -> list[Video]:
    """A folder's videos by name. Raises UsageError for none."""
    found = [Video(path, sidecar) for path, sidecar in find_videos(folder)]
    if not found:
        videos = sorted(path for kind in ("mkv", "mp4") for path in folder.glob(f"*.{kind}"))
        lost = lost_sidecar(videos[0].with_suffix(".json")) if videos else None
        raise UsageError(lost or f"{folder}: no video with its JSON in it; make some with streamq generate")
    return found


def check_fields(fields: Collection[str]) -> None:
    """Raises UsageError for an --allow_mismatch that is no field of a pair."""
    for field in fields:
        if field not in PAIR_FIELDS:
            raise UsageError(
                f"--allow_mismatch {field}: not a field of a pair; one of {', '.join(PAIR_FIELDS)}"
                + nearest(field, tuple(PAIR_FIELDS))
            )


def match(reference: list[Video], candidate: list[Video], allowed: Collection[str]) -> list[tuple[Video, Video]]:
    """(reference, candidate) for every video, in the reference's order.

    They belong together by prompt, seed and pictures; where one of these is `allowed` to differ, by name. Raises
    UsageError for a video that has no partner, and for a field that differs and is not `allowed`.
    """
    by_name = bool(set(IDENTITY) & set(allowed))
    left, right = _index(reference, by_name), _index(candidate, by_name)
    for key, video in [*left.items(), *right.items()]:
        if key not in right or key not in left:
            raise UsageError(_alone(video, candidate if key in left else reference))
    pairs = [(video, right[key]) for key, video in left.items()]
    for one, other in pairs:
        _compare(one, other, allowed)
    return pairs


def _index(videos: list[Video], by_name: bool) -> dict[Any, Video]:
    found: dict[Any, Video] = {}
    for video in videos:
        key = video.stem if by_name else video.identity
        if key in found:
            raise UsageError(
                f"{video.path}: the same prompt and seed as {found[key].path.name}; a folder holds one of each: remove"
                " one"
            )
        found[key] = video
    return found


def _alone(video: Video, others: list[Video]) -> str:
    """Why a video has no partner: what differs from the one of its name, if there is one; or that one's lost JSON."""
    folder = others[0].path.parent
    if (lost := lost_sidecar(folder / video.path.name)) is not None and all(o.stem != video.stem for o in others):
        return lost
    namesake = next((other for other in others if other.stem == video.stem), None)
    if namesake is not None:
        for field in IDENTITY:
            if video.sidecar.pair[field] != namesake.sidecar.pair[field]:
                return _differs(video, namesake, field)
    pair = video.sidecar.pair
    return (
        f"{video.path}: unpaired; {folder} has no video of prompt {_short(pair['prompt'])} and seed {pair['seed']};"
        " make it, or remove this one"
    )


def _compare(one: Video, other: Video, allowed: Collection[str]) -> None:
    fields = dict.fromkeys([*PAIR_FIELDS, *one.sidecar.pair, *other.sidecar.pair])
    for field in fields:
        if field not in allowed and one.sidecar.pair.get(field) != other.sidecar.pair.get(field):
            raise UsageError(_differs(other, one, field))


def _differs(video: Video, other: Video, field: str) -> str:
    values = (_short(v.sidecar.pair.get(field)) for v in (video, other))
    mine, theirs = values
    return (
        f"{video.path}: {field} is {mine}, of its pair {other.path} it is {theirs}; make both with the same, or give"
        f" --allow_mismatch {field}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
