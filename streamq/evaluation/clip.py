"""Metrics of CLIP's and DINO's features: does a video show its prompt, does it hold together from frame to frame.

Models are transformers', read from a folder or a hub id, weights from .safetensors only, computed in fp32. Frames go
through the PIL image processor in every version of transformers: the torchvision one gives other pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamq import hub
from streamq.checkpoint import load_json
from streamq.errors import UsageError
from streamq.extras import require

if TYPE_CHECKING:
    import torch

BATCH = 8  # frames at a time
EXAMPLES = {"clip": "openai/clip-vit-large-patch14", "vit": "facebook/dino-vitb16"}
FILES = ["*.json", "*.txt", "*.safetensors"]
Encode = Callable[[list[np.ndarray]], np.ndarray]  # uint8 frames -> unit features [n, d], fp32


@dataclass(frozen=True)
class Encoder:
    """A loaded model. `name`: the hub id, or the folder's name. `image`: frames -> unit rows. `text`: a prompt -> (unit
    vector [d], how many of its tokens were cut off); None for a model without text."""

    name: str
    image: Encode
    text: Callable[[str], tuple[np.ndarray, int]] | None


def load_clip(model: str, device: torch.device) -> Encoder:
    """A CLIPModel with its tokenizer and image processor. Raises UsageError for what is not one."""
    option = f"--clip_model {model}"
    folder = find_model(model, "--clip_model", "clip")
    transformers = require("transformers", "CLIP metrics", "eval")
    how = {"local_files_only": True, "use_safetensors": True}
    network, tokenizer, pictures = _loaded(option, lambda: (
        transformers.CLIPModel.from_pretrained(folder, **how).float().eval().to(device),
        transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        _pil(transformers, "CLIP").from_pretrained(folder, local_files_only=True),
    ))  # fmt: skip
    longest = network.config.text_config.max_position_embeddings

    def text(prompt: str) -> tuple[np.ndarray, int]:
        whole = len(tokenizer(prompt).input_ids)
        tokens = tokenizer(prompt, truncation=True, max_length=longest, return_tensors="pt").to(device)
        with _no_grad():
            found = network.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return _unit(_features(found))[0], max(0, whole - longest)

    def image(frames: list[np.ndarray]) -> np.ndarray:
        pixels = pictures(images=_pictures(frames), return_tensors="pt")["pixel_values"].to(device)
        with _no_grad():
            return _unit(_features(network.get_image_features(pixel_values=pixels)))

    return Encoder(_name(model), image, text)


def load_dino(model: str, device: torch.device) -> Encoder:
    """A ViT trained by DINO, whose feature is the class token after the last norm. Raises UsageError.

    Its image processor's size counts (224 * 224, squashed, for facebook/dino-vitb16); VBench scales the short side.
    """
    option = f"--dino_model {model}"
    folder = find_model(model, "--dino_model", "vit")
    transformers = require("transformers", "DINO metrics", "eval")
    how = {"local_files_only": True, "use_safetensors": True, "add_pooling_layer": False}
    network, pictures = _loaded(option, lambda: (
        transformers.ViTModel.from_pretrained(folder, **how).float().eval().to(device),
        _pil(transformers, "ViT").from_pretrained(folder, local_files_only=True),
    ))  # fmt: skip

    def image(frames: list[np.ndarray]) -> np.ndarray:
        pixels = pictures(images=_pictures(frames), return_tensors="pt")["pixel_values"].to(device)
        with _no_grad():
            return _unit(network(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0])

    return Encoder(_name(model), image, None)


def find_model(model: str, option: str, kind: str) -> Path:
    """The folder of a path or hub id, whose config.json says `kind`. Raises UsageError."""
    folder = hub.resolve(model, download=True, option=option, wanted=FILES, unwanted=None)
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"{option} {model}: no config.json in it; give the folder that save_pretrained wrote")
    document = load_json(config, 4 << 20)
    has = document.get("model_type") if isinstance(document, dict) else None
    if has != kind:
        raise UsageError(f"{option} {model}: model_type is {has!r}, {kind!r} is needed; e.g. {EXAMPLES[kind]}")
    return folder


def _loaded(option: str, load: Callable[[], Any]) -> Any:
    require("transformers.utils.logging", "metrics of features", "eval").disable_progress_bar()
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{option}: does not load ({reason}); it needs config.json, model.safetensors, the tokenizer's and"
            " preprocessor_config.json: load it with transformers once and save_pretrained all of it into one folder"
        ) from error


def _pil(transformers: Any, name: str) -> Any:
    pil = getattr(transformers, f"{name}ImageProcessorPil", None)  # transformers 5; in 4 the plain name is Pillow's
    return pil if pil is not None else getattr(transformers, f"{name}ImageProcessor")


def _pictures(frames: list[np.ndarray]) -> list[Any]:
    image = require("PIL.Image", "pictures", "eval")
    return [image.fromarray(np.ascontiguousarray(frame)) for frame in frames]


def _no_grad() -> Any:
    import torch

    return torch.no_grad()


def _features(found: Any) -> torch.Tensor:
    """transformers 4 returns the projected features, 5 an output that holds them."""
    tensor: torch.Tensor = getattr(found, "pooler_output", found)
    return tensor


def _unit(rows: torch.Tensor) -> np.ndarray:
    rows = rows.float()
    return np.asarray((rows / rows.norm(dim=-1, keepdim=True)).cpu().numpy())


def _name(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def embed(encoder: Encoder, frames: Iterable[np.ndarray]) -> np.ndarray:
    """Unit features [F, d] of a video's frames, `BATCH` at a time."""
    rows: list[np.ndarray] = []
    batch: list[np.ndarray] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == BATCH:
            rows.append(encoder.image(batch))
            batch = []
    if batch:
        rows.append(encoder.image(batch))
    return np.concatenate(rows).astype(np.float64)


def sampled(count: int, wanted: int | None) -> list[int]:
    """Numbers of `wanted` frames of `count`, evenly spaced with the first and the last; all for None or for more."""
    if wanted is None or wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [count // 2]
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def alignment(images: np.ndarray, text: np.ndarray) -> dict[str, float]:
    """`clip_t`: mean over frames of cos(image, text). `clip_score`: 100 max(cos, 0), averaged. Unit rows are given."""
    cosines = images @ text.astype(np.float64)
    return {"clip_t": float(cosines.mean()), "clip_score": float(100 * np.maximum(cosines, 0).mean())}


def consecutive(images: np.ndarray) -> float | None:
    """`clip_f`: mean cosine of consecutive frames' unit features; None with a single frame."""
    return float((images[:-1] * images[1:]).sum(axis=1).mean()) if len(images) > 1 else None


def consistency(images: np.ndarray) -> float | None:
    """VBench's background (CLIP) and subject (DINO) consistency of one video.

    Mean over i >= 1 of (max(0, cos(f[i-1], f[i])) + max(0, cos(f[0], f[i]))) / 2; None with a single frame.
    """
    if len(images) < 2:
        return None
    before, first = ((a * images[1:]).sum(axis=1) for a in (images[:-1], images[:1]))
    return float(((np.maximum(before, 0) + np.maximum(first, 0)) / 2).mean())
