"""LoRAs for tests, in every style of keys, and the same change made to a checkpoint's bytes by the formula alone.

    W' = W + strength · alpha / rank · up @ down      fp32, LoRA after LoRA, rounded once to W's dtype

Factors are small whole numbers over a power of two: their products are exact in fp32, whoever sums them in which order.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from streamq import wan

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Style:
    """How a trainer calls the module `blocks.0.self_attn.q`, and the two halves of its pair."""

    base: Callable[[str], str]
    down: str
    up: str


def _diffusers(native: str) -> str:
    return wan.to_diffusers(native) or native


def _flat(name: str) -> str:
    return name.replace(".", "_")


KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
STYLES = {
    "native": Style(str, *KOHYA),
    "comfyui": Style(lambda n: f"diffusion_model.{n}", *PEFT),
    "lightx2v": Style(lambda n: f"diffusion_model.{n}", *KOHYA),
    "full-prefix": Style(lambda n: f"model.diffusion_model.{n}", ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers": Style(lambda n: f"transformer.{_diffusers(n)}", *PEFT),
    "diffusers-bare": Style(_diffusers, ".lora.down.weight", ".lora.up.weight"),
    "peft": Style(lambda n: f"base_model.model.{n}", ".lora_A", ".lora_B"),
    "musubi": Style(lambda n: f"lora_unet_{_flat(n)}", *KOHYA),
    "wan-fun": Style(lambda n: f"lora_unet__{_flat(n)}", *KOHYA),
    "onetrainer": Style(lambda n: f"lora_transformer_{_flat(_diffusers(n))}", *KOHYA),
}


@dataclass
class Made:
    """A LoRA's tensors by key, and what it does: native tensor name -> (alpha / rank, the fp32 addend), in order."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    adds: list[tuple[str, float, Tensor]] = field(default_factory=list)

    def save(self, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, path, dict(metadata) if metadata else None)
        return path


def grid(name: str, *shape: int, seed: int = 0) -> Tensor:
    """Multiples of 1/64 up to 1/8, seeded by name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    return torch.randint(-8, 9, shape, generator=generator).float() / 64


class Maker:
    """Grows a LoRA of one style for a model of known shapes (native name -> shape)."""

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], style: str = "comfyui", dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.shapes, self.style, self.dtype, self.seed = shapes, STYLES[style], dtype, seed
        self.made = Made()

    def _put(self, module: str, end: str, tensor: Tensor) -> None:
        self.made.tensors[self.style.base(module) + end] = tensor

    def pair(self, module: str, rank: int = 4, alpha: Tensor | None = None, *, conv: bool = False) -> Maker:
        """A low-rank pair for a module's weight; of a convolution with 5-D factors or, as matrices, 2-D ones."""
        rows, *rest = self.shapes[f"{module}.weight"]
        down = grid(f"{module} down", rank, math.prod(rest), seed=self.seed)
        up = grid(f"{module} up", rows, rank, seed=self.seed)
        self.made.adds.append((f"{module}.weight", 1.0 if alpha is None else float(alpha) / rank, up @ down))
        shaped = (down.view(rank, *rest), up.view(rows, rank, *[1] * (len(rest) - 1))) if conv else (down, up)
        self._put(module, self.style.down, shaped[0].to(self.dtype))
        self._put(module, self.style.up, shaped[1].to(self.dtype))
        if alpha is not None:
            self._put(module, ".alpha", alpha)
        return self

    def diff(self, module: str, end: str = ".diff", leaf: str = ".weight") -> Maker:
        """A difference: `.diff` of a weight, `.diff_b` of a bias, `.diff_m` of a modulation."""
        name = module + leaf
        add = grid(f"{name} diff", *self.shapes[name], seed=self.seed)
        self.made.adds.append((name, 1.0, add))
        self._put(module, end, add.to(self.dtype))
        return self

    def bias(self, module: str) -> Maker:
        return self.diff(module, ".diff_b", ".bias")


def linears(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Every module with a matrix."""
    return [
        name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2
    ]


def everything(shapes: Mapping[str, Sequence[int]], style: str, dtype: torch.dtype = torch.bfloat16) -> Made:
    """A LoRA that changes every tensor of a model: pairs, with an alpha at every third, biases, norms and the rest."""
    maker = Maker(shapes, style, dtype)
    for number, module in enumerate(linears(shapes)):
        maker.pair(module, 1 + number % 5, torch.tensor(2.0) if number % 3 == 0 else None)
    for name in shapes:
        module, _, leaf = name.rpartition(".")
        if leaf == "bias":
            maker.bias(module)
        elif leaf == "modulation" and style == "lightx2v":
            maker.diff(module, ".diff_m", ".modulation")
        elif leaf not in ("weight", "bias"):
            maker.diff(name, leaf="")
        elif len(shapes[name]) == 1:
            maker.diff(module)
        elif len(shapes[name]) > 2:
            maker.pair(module, 3, conv=True)
    return maker.made


def merge_by_formula(folder: Path, out: Path, loras: Iterable[tuple[Made, float]]) -> Path:
    """A copy of a native checkpoint with the LoRAs in it; every header, and every other byte, as it was."""
    shutil.copytree(folder, out)
    chosen = list(loras)
    for path in out.glob("*.safetensors"):
        raw = bytearray(path.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, about in header.items():
            begin, end = (8 + length + offset for offset in about["data_offsets"])
            stored = torch.frombuffer(raw[begin:end], dtype=TYPES[about["dtype"]]).view(about["shape"])
            wide = stored.float()
            for made, strength in chosen:
                for tensor, scale, add in made.adds:
                    if tensor == name:
                        wide = wide + strength * scale * add.view(wide.shape)
            raw[begin:end] = wide.to(stored.dtype).view(-1).view(torch.uint8).numpy().tobytes()
        path.write_bytes(raw)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output but those that name what it was made from."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("streamq.json", "README.md"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
