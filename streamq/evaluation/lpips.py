"""LPIPS with AlexNet (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric").

Arithmetic of the `lpips` package, version 0.1 of its weights, read from a .safetensors file with that package's
names. The package itself is not needed: it imports torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streamq.errors import UsageError
from streamq.extras import require

if TYPE_CHECKING:
    import torch

# Name of a convolution, its shape, stride, padding, and whether a 3 * 3 max pool of stride 2 comes before it.
LAYERS = (
    ("net.slice1.0", (64, 3, 11, 11), 4, 2, False),
    ("net.slice2.3", (192, 64, 5, 5), 1, 2, True),
    ("net.slice3.6", (384, 192, 3, 3), 1, 1, True),
    ("net.slice4.8", (256, 384, 3, 3), 1, 1, False),
    ("net.slice5.10", (256, 256, 3, 3), 1, 1, False),
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10
SMALLEST = 31  # pixels each way, below which nothing is left before the second pool
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
CONVERT = (
    'python -c "import lpips, safetensors.torch as s; s.save_file({k: v.clone() for k, v in'
    " lpips.LPIPS(net='alex').state_dict().items()}, 'lpips.safetensors')\""
)


def find_weights(path: Path) -> Path:
    """The .safetensors file of a file or folder. Raises UsageError, for a pickle with the line that converts it."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files and any(file.suffix in PICKLES for file in path.iterdir()):
        files = [file for file in path.iterdir() if file.suffix in PICKLES]
    if any(file.suffix in PICKLES for file in files):
        raise UsageError(f"--lpips_model {path}: a pickle, which is never opened; {CONVERT} writes one that is")
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise UsageError(f"--lpips_model {path}: {len(files)} .safetensors files, one is needed; {CONVERT} writes it")
    return files[0]


def load_lpips(path: Path, device: torch.device) -> Callable[[np.ndarray, np.ndarray], float]:
    """The distance of two uint8 [H, W, 3] frames, computed in fp32 on `device`. Raises UsageError."""
    import torch

    file = find_weights(path)
    unreadable = require("safetensors", "LPIPS").SafetensorError
    try:
        weights = require("safetensors.torch", "LPIPS").load_file(file)
    except (OSError, unreadable) as error:
        raise UsageError(f"--lpips_model {file}: cannot be read ({error}); {CONVERT} writes it again") from error
    wanted: dict[str, tuple[int, ...]] = {}
    for number, (name, shape, *_) in enumerate(LAYERS):
        wanted |= {
            f"{name}.weight": shape,
            f"{name}.bias": shape[:1],
            f"lin{number}.model.1.weight": (1, shape[0], 1, 1),
        }
    for name, size in wanted.items():
        has = tuple(weights[name].shape) if name in weights else "missing"
        if has != size:
            raise UsageError(f"--lpips_model {file}: {name} is {has}, LPIPS with AlexNet has {size}; {CONVERT}")
    weights = {name: weights[name].to(device, torch.float32) for name in wanted}
    return lambda candidate, reference: distance(weights, candidate, reference)


def distance(weights: dict[str, torch.Tensor], candidate: np.ndarray, reference: np.ndarray) -> float:
    """Sum over layers of the mean over positions of the weighted squared difference of unit feature vectors.

    `weights`: by the names of `LAYERS` and lin0 to lin4, fp32. Frames: uint8 [H, W, 3], scaled to -1..1. Raises
    UsageError for frames under 31 pixels.
    """
    import torch

    if min(candidate.shape[:2]) < SMALLEST:
        raise UsageError(
            f"frames of {candidate.shape[1]}*{candidate.shape[0]}: lpips needs {SMALLEST} pixels each way; leave it out"
        )
    functional = torch.nn.functional
    device = weights[f"{LAYERS[0][0]}.weight"].device
    frames = torch.from_numpy(np.stack([candidate, reference])).to(device).permute(0, 3, 1, 2)
    shift, scale = (torch.tensor(values, device=device)[None, :, None, None] for values in (SHIFT, SCALE))
    total = 0.0
    with torch.no_grad():
        x = (frames.float() / 127.5 - 1 - shift) / scale
        for number, (name, _, stride, padding, pooled) in enumerate(LAYERS):
            x = functional.max_pool2d(x, 3, 2) if pooled else x
            x = functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding).relu()
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + EPSILON)
            gap = (unit[:1] - unit[1:]).square()
            total += float(functional.conv2d(gap, weights[f"lin{number}.model.1.weight"]).double().mean())
    return total
