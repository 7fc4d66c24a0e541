"""Video files and the JSON beside each: what `generate` writes and `eval` reads.

A video is an .mp4 for people (h264, lossy) and an .mkv for measuring (FFV1, bit-exact RGB). PyAV is imported where it
is used (`pip install "streamq[generate]"`), torch nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from streamq.checkpoint import load_json
from streamq.errors import UsageError
from streamq.extras import require
from streamq.savers.shard import PARTIAL, disk_errors, publish, write_whole

MARK = "streamq_video"  # a key that tells a sidecar from other JSON files, and the version of its form
VERSION = 1
MAX_SIDECAR_BYTES = 4 << 20
AGAIN = "make the video again with streamq generate"
THREADS = 2  # x264's bytes depend on the number of its threads, so the machine must not choose it
OPEN_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi", "protocol_whitelist": "file"}

# What two videos must share to be a pair, and the JSON types that each may have.
PAIR_FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "negative_prompt": (str, type(None)), "seed": (int,), "width": (int,), "height": (int,),
    "frame_num": (int,), "fps": (int, float), "steps": (int,), "guidance": (int, float, type(None)),
    "guidance_2": (int, float, type(None)), "shift": (int, float, type(None)), "scheduler": (str, type(None)),
    "compute_dtype": (str,), "text_encoder": (str, type(None)), "vae": (str, type(None)),
    "image_encoder": (str, type(None)), "boundary": (int, float, type(None)), "image": (str, type(None)),
    "last_image": (str, type(None)), "device_kind": (str,),
}  # fmt: skip


@dataclass(frozen=True)
class Sidecar:
    """What is known of one video.

    `pair`: what a pair must share, key by key (`PAIR_FIELDS`). `made`: what is particular to this video. `files`: kind
    ("mp4", "mkv", "latents") -> name of the file beside it.
    """

    pair: dict[str, Any]
    made: dict[str, Any]
    files: dict[str, str]


def write_mp4(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write uint8 [F, H, W, 3] RGB, or frames one by one, as h264, yuv420p, crf 18: for people, not for measuring.

    An odd height or width gets its last row or column twice, which yuv420p needs. Raises UsageError, RunError.
    """
    even = (np.pad(f, ((0, f.shape[0] % 2), (0, f.shape[1] % 2), (0, 0)), mode="edge") for f in _checked(frames))
    # bt709 and said so: players take an untagged video for one or the other by its size
    tags = {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": 1}
    _write(path, even, fps, ("mp4", "libx264", "yuv420p"), {"crf": "18", "preset": "medium"}, tags)


def write_lossless(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write uint8 [F, H, W, 3] RGB, or frames one by one, as FFV1 `bgr0`: `read_video` gives the same bits.

    Raises UsageError, RunError.
    """
    _write(path, _checked(frames), fps, ("matroska", "ffv1", "bgr0"), {"level": "3", "slicecrc": "1"}, {})


def write_lossless_mp4(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """The same in h264 RGB of qp 0, for programs that take no .mkv. Raises UsageError, RunError."""
    _write(path, _checked(frames), fps, ("mp4", "libx264rgb", "rgb24"), {"qp": "0", "preset": "medium"}, {})


def _checked(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    shape: tuple[int, ...] | None = None
    for frame in frames:
        shape = shape or frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3 or not frame.size:
            raise UsageError(f"a frame of {frame.dtype} {list(frame.shape)}: a video is uint8 [F, H, W, 3]")
        if frame.shape != shape:
            raise UsageError(f"frames of {list(shape)} and {list(frame.shape)}: a video's have one size")
        yield frame
    if shape is None:
        raise UsageError("no frame: a video has at least one")


def _write(
    path: Path, frames: Iterator[np.ndarray], fps: float, kind: tuple[str, str, str], options: dict[str, str],
    tags: dict[str, int],
) -> None:  # fmt: skip
    """`kind`: container, codec and pixel format."""
    av = require("av", "writing videos", "generate")
    container, codec, pixels = kind
    first = next(frames)
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        # bitexact: no creation time, no random identifiers, no library versions
        with av.open(str(partial), "w", format=container, options={"fflags": "+bitexact"}) as output:
            stream = output.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], pixels
            stream.codec_context.thread_count = THREADS
            stream.codec_context.flags |= av.codec.context.Flags.bitexact
            for name, value in tags.items():
                setattr(stream.codec_context, name, value)
            for picture in chain([first], frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                if tags:
                    frame = frame.reformat(format=pixels, dst_colorspace="ITU709", dst_color_range="MPEG")
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
    publish(partial, path, 0o644)


def frame_rate(path: Path) -> float:
    """Frames a second that a video's header states. Raises UsageError."""
    av = require("av", "reading videos", "generate")
    try:
        with av.open(f"file:{path}", options=OPEN_OPTIONS) as container:
            if not container.streams.video or container.streams.video[0].average_rate is None:
                raise UsageError(f"{path}: has no video with a frame rate in it; make it again")
            return float(container.streams.video[0].average_rate)
    except (OSError, ValueError, av.FFmpegError) as error:
        raise _unreadable(path, error) from error


def iter_frames(path: Path) -> Iterator[np.ndarray]:
    """A video's frames one at a time, each uint8 [H, W, 3] RGB. Raises UsageError."""
    av = require("av", "reading videos", "generate")
    try:
        with av.open(f"file:{path}", options=OPEN_OPTIONS) as container:
            if not container.streams.video:
                raise UsageError(f"{path}: has no video in it; make it again")
            for frame in container.decode(container.streams.video[0]):
                yield frame.to_ndarray(format="rgb24")
    except (OSError, ValueError, av.FFmpegError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> UsageError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return UsageError(f"{path}: not a video that can be read ({reason}); make it again")


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """All frames, uint8 [F, H, W, 3] RGB, and frames a second. Raises UsageError for what is no video."""
    frames = list(iter_frames(path))
    if not frames:
        raise UsageError(f"{path}: not one frame could be read from it; make it again")
    return np.stack(frames), frame_rate(path)


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Write a video's JSON; it comes last, after the files that it names. Raises RunError."""
    document = {MARK: VERSION, **asdict(sidecar)}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text.encode(), 0o644)


def read_sidecar(path: Path) -> Sidecar:
    """A video's JSON. Raises UsageError for another kind of JSON, a field too few, or a file that is not beside it."""
    document = load_json(path, MAX_SIDECAR_BYTES, AGAIN)
    if not _is_sidecar(document):
        raise UsageError(f"{path}: not the JSON of a video ({MARK} is missing); streamq generate writes them")
    if document[MARK] != VERSION:
        raise UsageError(f"{path}: {MARK} is {document[MARK]!r}, this streamq reads {VERSION}; make the video again")
    for part in ("pair", "made", "files"):
        if not isinstance(document.get(part), dict):
            raise UsageError(f"{path}: {part} is {_kind(document.get(part))}, not an object; make the video again")
    _check_pair(path, document["pair"])
    for kind, name in document["files"].items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise UsageError(f"{path}: files.{kind} is {name!r}, not the name of a file beside it")
        if not (path.parent / name).is_file():
            raise UsageError(f"{path}: {name}, which it names, is not beside it; make the video again")
    return Sidecar(document["pair"], document["made"], document["files"])


def _check_pair(path: Path, pair: dict[str, Any]) -> None:
    if lacks := [field for field in PAIR_FIELDS if field not in pair]:
        raise UsageError(f"{path}: pair lacks {', '.join(lacks)}; make the video again with streamq generate")
    for field, kinds in PAIR_FIELDS.items():
        value = pair[field]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UsageError(f"{path}: pair.{field} is {_kind(value)} ({str(value)[:60]}); make the video again")


def _is_sidecar(document: Any) -> bool:
    return isinstance(document, dict) and MARK in document


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def find_videos(folder: Path) -> list[tuple[Path, Sidecar]]:
    """Every video's JSON in a folder, sorted by name; other JSON files are passed over.

    Raises UsageError for a folder that is not there, JSON that cannot be read, and what `read_sidecar` refuses.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; streamq generate makes one with videos in it")
    found = sorted(path for path in folder.glob("*.json") if path.is_file())
    return [(path, read_sidecar(path)) for path in found if _is_sidecar(load_json(path, 1 << 30, AGAIN))]


def lost_sidecar(path: Path) -> str | None:
    """What is wrong where `path` should be a video's JSON, and its video is there; None where there is no video."""
    video = next((path.with_suffix(kind) for kind in (".mkv", ".mp4") if path.with_suffix(kind).is_file()), None)
    if video is None:
        return None
    what = f"not the JSON of a video ({MARK} is missing), beside" if path.is_file() else "missing beside"
    return f"{path}: {what} {video.name}, so nothing is known of that video; {AGAIN}"


def pixel_file(path: Path, sidecar: Sidecar) -> Path:
    """The file to measure: the lossless one, else the lossy one. `path`: the sidecar's. Raises UsageError."""
    for kind in ("mkv", "mp4"):
        if kind in sidecar.files:
            return path.parent / sidecar.files[kind]
    raise UsageError(f"{path}: names neither an mkv nor an mp4; make the video again")
