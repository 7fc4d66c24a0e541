"""Clips, pictures, latents and text states from files that people have, and the pictures that a report shows.

PyAV and Pillow are imported where they are used: a run without pictures needs neither (`pip install "streamq[calib]"`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.checkpoint import Checkpoint, Source, TensorInfo, read_header
from streamq.errors import UsageError
from streamq.extras import require

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".gif"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FRAME_RATE = 16  # frames a second of what Wan was trained on and makes
OPEN_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif", "protocol_whitelist": "file"}
TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
NEGATIVE = "negative"  # the text state of the empty, or negative, prompt


def list_clips(path: Path) -> list[Path]:
    """What `read_clips` reads, in its order: a file, or a folder's videos and folders of frames by name.

    A folder that holds nothing but pictures is one clip. Raises UsageError where there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder; give a folder of videos ({_words(VIDEO_SUFFIXES)})")
    inside = sorted(path.iterdir())
    found = [item for item in inside if item.suffix.lower() in VIDEO_SUFFIXES and item.is_file()]
    found += [item for item in inside if item.is_dir() and _pictures(item)]
    if not found and _pictures(path):
        return [path]
    if not found:
        raise UsageError(
            f"{path}: no video in it ({_words(VIDEO_SUFFIXES)}), and no folder of frames ({_words(IMAGE_SUFFIXES)});"
            " put some there"
        )
    return sorted(found)


def read_clips(
    path: Path, size: tuple[int, int], frame_num: int, warnings: list[str] | None = None
) -> Iterator[Tensor]:
    """Each clip's first `frame_num` frames at 16 a second: [3, F, H, W] float32 in -1..1, one at a time.

    `size` is (width, height): frames are scaled to cover it and cropped in the middle. A clip that is too short has
    its last frame repeated, which is said in `warnings`. Pictures of a folder are frames at 16 a second already.
    """
    require("PIL.Image", "reading videos")
    for clip in list_clips(path):
        yield _read_clip(clip, size, frame_num, warnings)


def _read_clip(clip: Path, size: tuple[int, int], frame_num: int, warnings: list[str] | None) -> Tensor:
    import numpy
    import torch

    frames: list[np.ndarray] = []
    for picture in _folder_frames(clip) if clip.is_dir() else _video_frames(clip):
        frames.append(_cover(picture, size))
        if len(frames) == frame_num:
            break
    if not frames:
        raise UsageError(f"{clip}: not one frame could be read from it; remove it, or convert it to mp4")
    if len(frames) < frame_num:
        if warnings is not None:
            warnings.append(
                f"{clip}: {len(frames)} frames at {FRAME_RATE} a second, {frame_num} are needed: the last is repeated"
            )
        frames += [frames[-1]] * (frame_num - len(frames))
    return _to_signed(torch.from_numpy(numpy.stack(frames))).permute(3, 0, 1, 2).contiguous()


def _video_frames(clip: Path) -> Iterator[Any]:
    """PIL pictures at 16 a second: of a faster video some are left out, of a slower one some come twice."""
    av = require("av", "reading videos")
    try:
        # `file:` and the two lists: a name or a playlist in disguise opens no address and no other file
        with av.open(f"file:{clip}", options=OPEN_OPTIONS) as container:
            if not container.streams.video:
                raise UsageError(f"{clip}: has no video in it; remove it from the folder")
            start: float | None = None
            taken, before = 0, None
            for number, frame in enumerate(container.decode(container.streams.video[0])):
                time = frame.time if frame.time is not None else number / FRAME_RATE
                start = time if start is None else start
                # the last frame not after its time, with a quarter of a step to spare for rounded time stamps
                while before is not None and time - start > (taken + 0.25) / FRAME_RATE:
                    yield before.to_image()
                    taken += 1
                before = frame
            if before is not None:
                yield before.to_image()
    except (OSError, ValueError, av.FFmpegError) as error:
        raise UsageError(f"{clip}: not a video that can be read ({_reason(error)}); remove or convert it") from error


def _folder_frames(folder: Path) -> Iterator[Any]:
    return (open_picture(path) for path in _pictures(folder))


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _words(suffixes: set[str]) -> str:
    return " ".join(sorted(suffix[1:] for suffix in suffixes))


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _cover(picture: Any, size: tuple[int, int]) -> np.ndarray:
    """Scale a PIL picture so that it covers `size`, crop its middle; uint8 [H, W, 3]."""
    import numpy

    lanczos = require("PIL.Image", "reading pictures").Resampling.LANCZOS
    width, height = size
    scale = max(width / picture.width, height / picture.height)
    wide, high = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (wide - width) // 2, (high - height) // 2
    scaled = picture.convert("RGB").resize((wide, high), lanczos)
    return numpy.asarray(scaled.crop((left, top, left + width, top + height)))


def _to_signed(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1, in the pipelines' order of operations."""
    return 2.0 * (pixels.float() / 255.0) - 1.0


def open_picture(path: Path) -> Any:
    """A PIL picture, upright and RGB, as diffusers' `load_image` gives it. Raises UsageError for what is not one."""
    image = require("PIL.Image", "reading pictures")
    turn = require("PIL.ImageOps", "reading pictures").exif_transpose
    try:
        with image.open(path) as picture:
            return turn(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise UsageError(f"{path}: not a picture that can be read ({_reason(error)}); replace it") from error


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture as [3, H, W] float32 in -1..1, stretched to `size` as the image-to-video pipelines do."""
    import numpy
    import torch

    lanczos = require("PIL.Image", "reading pictures").Resampling.LANCZOS
    picture = open_picture(path).resize(size, lanczos)
    return _to_signed(torch.from_numpy(numpy.array(picture))).permute(2, 0, 1).contiguous()


def read_latents(path: Path, shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Latents from a .safetensors file, or a folder of them: float32, each of `shape` = (C, f, h, w).

    A tensor is [C, f, h, w], or [n, C, f, h, w] for n of them. Larger ones lose their last frames and their edges.
    Raises UsageError for other channels, for smaller ones, and for NaN.
    """
    import torch

    found = []
    for source, info in _float_tensors(path, "latents"):
        where = source.checkpoint.where(info)
        if len(info.shape) not in (4, 5):
            raise UsageError(f"{where}: shape {list(info.shape)}, latents are [C, f, h, w] or [n, C, f, h, w]")
        for has, needs, what in zip(info.shape[-4:], shape, ("channels", "frames", "rows", "columns"), strict=True):
            if has != needs if what == "channels" else has < needs:
                fix = "give latents of this model's VAE" if what == "channels" else "give larger ones or a smaller size"
                raise UsageError(f"{where}: {has} {what}, {needs} are needed; {fix}")
        many = len(info.shape) == 5
        for number in range(info.shape[0] if many else 1):
            tensor = read_rows(source, info, number, 1)[0] if many else read_rows(source, info)
            top, left = (tensor.shape[2] - shape[2]) // 2, (tensor.shape[3] - shape[3]) // 2
            tensor = tensor[:, : shape[1], top : top + shape[2], left : left + shape[3]].float().contiguous()
            if not bool(torch.isfinite(tensor).all()):
                raise UsageError(f"{where}: has NaN or Inf in it; make these latents again")
            found.append(tensor)
    return found


def read_text_embeds(path: Path, dim: int | None = None) -> list[tuple[str, Tensor]]:
    """Text states from a .safetensors file: (name, [n, dim] as stored) of each, by name; `negative` is the empty one.

    A tensor is [n, dim] or [1, n, dim]. Raises UsageError for others, more than 512 rows, another width, or NaN.
    """
    import torch

    from streamq.calibration.settings import TEXT_LEN

    found = []
    for source, info in _float_tensors(path, "text states"):
        where, sizes = source.checkpoint.where(info), info.shape
        if len(sizes) == 3 and sizes[0] == 1:
            sizes = sizes[1:]
        if len(sizes) != 2 or not 0 < sizes[0] <= TEXT_LEN:
            raise UsageError(
                f"{where}: shape {list(info.shape)}, text states are [n, dim] or [1, n, dim], n at most {TEXT_LEN}"
            )
        if dim is not None and sizes[1] != dim:
            raise UsageError(f"{where}: {sizes[1]} wide, the model takes {dim}; give states of its own text encoder")
        tensor = read_rows(source, info).reshape(sizes)
        if not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{where}: has NaN or Inf in it; make these text states again")
        found.append((info.name, tensor))
    return found


def _float_tensors(path: Path, what: str) -> Iterator[tuple[Source, TensorInfo]]:
    """Every tensor of a .safetensors file or of a folder's, by file and name, with the file open."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{path}: no .safetensors file in it; {what} are read from such")
    for file in files:
        found, infos = read_header(file, file.parent)
        if not infos:
            raise UsageError(f"{file}: holds no tensor; {what} are read from it")
        with closing(Source(Checkpoint(file.parent, (found,), {info.name: info for info in infos}))) as source:
            for info in sorted(infos, key=lambda i: i.name):
                if info.dtype not in TORCH_DTYPES:
                    raise UsageError(f"{source.checkpoint.where(info)}: is {info.dtype}, {what} are F32, BF16 or F16")
                yield source, info


def read_rows(source: Source, info: TensorInfo, first: int = 0, count: int | None = None) -> Tensor:
    """Rows `first` to `first + count` of a float tensor's first dimension (all without `count`), by pread."""
    import torch

    rows = info.shape[0] if info.shape else 1
    count = rows - first if count is None else count
    row = info.nbytes // max(rows, 1)
    dtype = getattr(torch, TORCH_DTYPES[info.dtype])
    sizes = (count, *info.shape[1:]) if info.shape else ()
    if not count * row:
        return torch.empty(sizes, dtype=dtype)
    buffer = bytearray(count * row)
    source.read(info, first * row, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=dtype).reshape(sizes)


def save_thumbnail(pixels: Tensor, path: Path) -> None:
    """Write uint8 [H, W, 3] as a PNG."""
    image = require("PIL.Image", "writing pictures")
    from streamq.savers.shard import write_whole

    data = io.BytesIO()
    image.fromarray(pixels.cpu().numpy()).save(data, format="PNG")
    write_whole(path, data.getvalue(), 0o644)
