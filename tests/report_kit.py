"""Small report data: frames with known differences, sidecars and manifests with names that try to break a page."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamq.report import Candidate, Clip, ReportData
from streamq.videos import PAIR_FIELDS, Sidecar

HOSTILE = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)> \"'&{{ 7*7 }}"
KINDS = ("self_attn.q", "self_attn.k", "ffn.0", "ffn.2")


def sidecar(index: int, seed: int = 0, **made: Any) -> Sidecar:
    """The sidecar of pair `index`; `made` goes over what is there."""
    values: dict[str, Any] = dict.fromkeys(PAIR_FIELDS)
    values |= {"prompt": f"prompt {index}", "seed": seed, "width": 32, "height": 24, "frame_num": 5, "fps": 16}
    values |= {"steps": 4, "guidance": 3.0, "compute_dtype": "float32", "device_kind": "cpu"}
    about: dict[str, Any] = {
        "streamq": "0.1.0",
        "torch": "2",
        "diffusers": "0.4",
        "transformer": "toy",
        "types": {},
        "format": None,
    }
    about |= {"seconds": 2.0, "seconds_per_step": 0.5, "peak_host_bytes": 3_000_000, "peak_device_bytes": None}
    about |= {"transformer_bytes": 1_000_000}
    return Sidecar(values, about | made, {"mp4": f"{index:04d}-seed{seed}.mp4"})


def frames(seed: int, count: int = 5, height: int = 24, width: int = 32) -> np.ndarray:
    """uint8 [count, height, width, 3] of noise from 40 to 199, so that 40 levels more or less stay in range."""
    return np.random.default_rng(seed).integers(40, 200, (count, height, width, 3), dtype=np.uint8)


def manifest(blocks: int = 3, error: float = 0.01, expert: str = "") -> dict[str, Any]:
    """A `streamq.json` with `KINDS` in each block, `ffn.2` float, and one layer outside blocks."""
    layers: dict[str, Any] = {}
    for block in range(blocks):
        for kind in KINDS:
            worse = error * (1 + block)
            quantized = {"type": "w8a8", "rel_error": worse, "cosine": 0.999, "output_rel_error": worse / 2}
            layers[f"{expert}blocks.{block}.{kind}"] = {"type": "float"} if kind == "ffn.2" else quantized
    layers[f"{expert}head.head"] = {"type": "w8a8", "rel_error": error, "cosine": 0.999}
    recipe = {"metadata": {"config_id": "w8a8"}, "spec": {"process": [{"include": ["*"]}]}}
    return {
        "streamq": "0.1.0",
        "plan": "ab" * 32,
        "source": {"": [{"file": "model.safetensors", "bytes": 1_000_000, "header_sha256": "0"}]},
        "formats": {"mindie": {"folder": "", "recipe": recipe, "layers": layers}},
    }


def data(pairs: int = 2, names: tuple[str, ...] = ("w8a8", "w4a16"), **over: Any) -> ReportData:
    """Candidate k is float plus k + 1 levels in the red channel everywhere; metrics in the rows of `streamq eval`."""
    reference = [Clip(frames(i), 16.0, sidecar(i)) for i in range(pairs)]
    candidates, per_video, summary = [], [], []
    for k, name in enumerate(names):
        clips = []
        for i in range(pairs):
            moved = frames(i)
            moved[..., 0] += k + 1
            clips.append(Clip(moved, 16.0, sidecar(i, types={"w8a8": 9}, format="mindie", transformer_bytes=400_000)))
            row = {"candidate": name, "stem": f"{i:04d}-seed0", "prompt": f"prompt {i}", "seed": 0, "failed": ""}
            per_video.append(row | {"psnr_video": 50.0 - k - i / 4, "ssim": 0.99, "flicker_diff": -0.001})
        candidates.append(Candidate(name, manifest(error=0.01 * (k + 1)), clips))
        for metric, mean in (("psnr_video", 50.0 - k), ("ssim", 0.99), ("flicker_diff", -0.001)):
            row = {"candidate": name, "metric": metric, "mean": mean, "low": mean - 0.5, "high": mean + 0.5}
            floor = 88.0 if metric == "psnr_video" else None
            summary.append(row | {"count": pairs, "noise_floor": floor, "within_noise": False, "p_value": None})
    values = {"title": "a report", "reference": reference, "candidates": candidates, "per_video": per_video}
    return ReportData(**(values | {"summary": summary, "notes": ["clip_t left out: no --clip_model"]} | over))
