"""Small videos with their JSON, for tests of evaluation: blurred noise that moves to the right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from streamq.videos import Sidecar, write_lossless, write_sidecar

SIZE = (64, 48)  # width, height
PAIR: dict[str, Any] = {
    "prompt": "a red ball", "negative_prompt": "", "seed": 0, "width": SIZE[0], "height": SIZE[1], "frame_num": 5,
    "fps": 16, "steps": 4, "guidance": 3.0, "guidance_2": None, "shift": 3.0, "scheduler": "UniPCMultistepScheduler",
    "compute_dtype": "float32", "text_encoder": "aa", "vae": "bb", "image_encoder": None, "boundary": None,
    "image": None, "last_image": None, "device_kind": "cpu",
}  # fmt: skip


def clip_of(frames: int = 5, step: int = 2, seed: int = 0) -> np.ndarray:
    """uint8 [F, 48, 64, 3]: a textured picture that moves `step` pixels to the right a frame."""
    generator = np.random.default_rng(seed)
    width, height = SIZE
    noise = generator.normal(size=(height + 8, width + abs(step) * frames + 8, 3))
    blur = np.exp(-(np.arange(-4, 5) ** 2) / 4.5)
    for axis in (0, 1):
        noise = np.apply_along_axis(lambda line: np.convolve(line, blur, "valid"), axis, noise)
    picture = np.clip(128 + 40 * noise / noise.std(), 0, 255).astype(np.uint8)
    starts = [abs(step) * (frames - 1 - i) for i in range(frames)]
    return np.stack([picture[:, start : start + width] for start in starts])


def write_video(
    folder: Path, frames: np.ndarray, *, index: int = 0, seed: int = 0, latents: np.ndarray | None = None, **pair: Any
) -> Path:
    """A lossless video, its latents if given, and its JSON; returns the JSON's path."""
    from safetensors.numpy import save_file

    stem = f"{index:04d}-seed{seed}"
    files = {"mkv": f"{stem}.mkv"}
    write_lossless(folder / files["mkv"], frames, pair.get("fps", 16))
    if latents is not None:
        files["latents"] = f"{stem}.safetensors"
        save_file({"latents": latents}, folder / files["latents"])
    count, height, width, _ = frames.shape
    shape = {"frame_num": count, "height": height, "width": width}
    sidecar = Sidecar({**PAIR, "seed": seed, **shape, **pair}, {"streamq": "0", "transformer": folder.name}, files)
    write_sidecar(folder / f"{stem}.json", sidecar)
    return folder / f"{stem}.json"


def noisy(frames: np.ndarray, sigma: float, seed: int = 1) -> np.ndarray:
    """Frames with Gaussian noise of `sigma` levels, rounded and clipped."""
    noise = np.random.default_rng(seed).normal(0, sigma, frames.shape)
    return np.clip(np.round(frames + noise), 0, 255).astype(np.uint8)
