"""What the tests of calibrated outputs share: tiny models, their calibration sets, what streamq makes of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from conftest import run, write_tiny
from safetensors.torch import save_file
from torch import Tensor

from consumer.load_lightx2v import LightX2V
from consumer.read_mindie import MindIE
from consumer.wan_block import Sample, Weights, samples_in, tensors_in

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"num_samples": 3, "time_bins": 2, "size": "64*64", "frame_num": 5, "dtype": "fp32"}
FAMILIES = ("t2v-1.3B", "i2v-14B", "flf2v-14B", "i2v-A14B", "t2v-A14B", "ti2v-5B", "vace-1.3B")
HEADS = 2
# Groups of layers with one input, by the names that streamq.json gives them; layers by native name.
GROUPS = {
    "attn1.in": ("self_attn.q", "self_attn.k", "self_attn.v"), "attn1.out": ("self_attn.o",),
    "attn2.in": ("cross_attn.q",), "attn2.text": ("cross_attn.k", "cross_attn.v"),
    "attn2.image": ("cross_attn.k_img", "cross_attn.v_img"), "attn2.out": ("cross_attn.o",), "ffn.in": ("ffn.0",),
    "ffn.out": ("ffn.2",), "control.in": ("before_proj",), "control.out": ("after_proj",),
}  # fmt: skip
MAKERS = {"attn1.out": ("self_attn.v",), "attn2.out": ("cross_attn.v", "cross_attn.v_img")}


class Model:
    """One synthetic model of a family: native tensors by expert, its folders, and a calibration set in fp32."""

    def __init__(self, folder: Path, family: str, dtype: str = "fp32") -> None:
        self.folder, self.family, self.dtype = folder, family, dtype
        self.native = write_tiny(folder / "native", family, dtype=dtype)
        self.diffusers = write_tiny(folder / "diffusers", family, layout="diffusers", dtype=dtype)
        two = (self.native / "high_noise_model").is_dir()
        self.experts = ("high_noise_model", "low_noise_model") if two else ("",)
        self.branch, self.first_last = family in ("i2v-14B", "flf2v-14B"), family == "flf2v-14B"

    @cached_property
    def calib(self) -> Path:
        """A set made by `streamq calib`."""
        how = ("--size", "64*64", "--frame_num", 5, "--num_samples", 3, "--time_bins", 2, "--dtype", "fp32")
        done = run("calib", "--model_path", self.diffusers, "--save_path", self.folder / "set", *how, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        return self.folder / "set"

    def floats(self, expert: str) -> dict[str, Tensor]:
        """The source's tensors by native name."""
        return dict(tensors_in(self.native / expert))

    def samples(self, expert: str) -> list[Sample]:
        """Of the set."""
        return samples_in(self.calib, expert)

    @cached_property
    def vace_layers(self) -> list[int]:
        """The tiny model has a VACE block for every block."""
        return [0, 1] if self.family.startswith("vace") else []


class Made:
    """An output of `streamq quant`, and what it said."""

    def __init__(self, model: Model, out: Path, form: str, recipe: Path, *more: object) -> None:
        self.model, self.out, self.form = model, out, form
        self.command = ("--model_path", model.diffusers, "--save_path", out, "--config_path", recipe, "--format", form,
                        "--calib", model.calib, "--device", "cpu", *more)  # fmt: skip
        self.done = run("quant", *self.command, "--quiet", "--json")
        assert self.done.returncode == 0, self.done.stderr

    @property
    def manifest(self) -> dict[str, Any]:
        """streamq.json's part about the format."""
        return json.loads((self.out / "streamq.json").read_text())["formats"][self.form]

    def vectors(self, expert: str) -> dict[str, tuple[str, Tensor]]:
        """Diffusers' group name with its block -> way and vector, of those that lie in other tensors than layers'."""
        label, found = f"{expert}/" if expert else "", {}
        for name, entry in self.manifest.get("smoothing", {}).items():
            if name.startswith(label):
                found[name.removeprefix(label)] = entry["way"], decode(entry["values"])
        return found

    def reader(self, expert: str, **how: Any) -> MindIE | LightX2V:
        """The written folder as its runtime reads it."""
        if self.form == "mindie":
            return MindIE(self.out / expert, self.model.floats(expert), **how)
        return LightX2V(self.out / expert, branch=self.model.branch, first_last=self.model.first_last, **how)

    def layers(self, expert: str) -> list[str]:
        """Quantized layers by native name."""
        label = f"{expert}/" if expert else ""
        return [name.removeprefix(label) for name, about in self.manifest["layers"].items()
                if name.startswith(label) and about["type"] != "float"]  # fmt: skip

    def divided(self, expert: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (s of its columns, r of its rows), float64; from the written tensors where they say it."""
        reader, vectors = self.reader(expert), self.vectors(expert)
        found = {}
        one = torch.ones(1, dtype=torch.float64)
        for layer in self.layers(expert):
            unit, inner = ".".join(layer.split(".")[:2]), ".".join(layer.split(".")[2:])
            group = next(name for name, members in GROUPS.items() if inner in members)
            s = vectors.get(f"{unit}.{group}", ("", one))[1]
            if isinstance(reader, MindIE) and f"{layer}.div.mul_scale" in reader.made:
                s = reader.mul(layer).reciprocal()
            ahead = next((name for name, makers in MAKERS.items() if inner in makers), "")
            found[layer] = s.double(), vectors.get(f"{unit}.{ahead}", ("", one))[1].double()
        return found


def save_divided(made: Made, expert: str, path: Path) -> Path:
    """`Made.divided` as a file, for load_mindie.py: s where it lies in other tensors than the layer's, and r."""
    found: dict[str, Tensor] = {}
    reader = made.reader(expert)
    for layer, (s, r) in made.divided(expert).items():
        if not (isinstance(reader, MindIE) and f"{layer}.div.mul_scale" in reader.made):
            found[f"{layer}.columns"] = s.clone()
        found[f"{layer}.rows"] = r.clone()
    save_file(found, path)
    return path


def decode(text: str) -> Tensor:
    """A vector of streamq.json: base64 of little-endian float32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())


def recipe(path: Path, *process: Mapping[str, Any], **calibration: Any) -> Path:
    """A recipe of these steps."""
    document = {
        "apiversion": "multimodal_sd_modelslim_v1",
        "spec": {"process": [dict(step) for step in process], "calibration": SETTINGS | calibration},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def linear(act: str = "per_token", symmetric: bool = True, **keys: Any) -> dict[str, Any]:
    """A `linear_quant` step, int8 by int8."""
    qconfig = {
        "act": {"scope": act, "dtype": "int8", "symmetric": symmetric, "method": "minmax"},
        "weight": {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"},
    }
    return {"type": "linear_quant", "qconfig": qconfig, **keys}


class Unrounded(Weights):
    """A written output with W · s / r in the place of codes · scale: everything of it but the rounding of weights."""

    def __init__(self, made: Made, expert: str) -> None:
        super().__init__(made.model.floats(expert))
        self.reader, self.divided = made.reader(expert, act=False), made.divided(expert)
        if isinstance(self.reader, LightX2V):
            self.reader = made.reader(expert, act=False, exact=True)
        # Smoothed and folded in fp32, as streamq holds them.
        self.weights = {
            name: (self.tensors[f"{name}.weight"].float() * s.float() / r.float().unsqueeze(-1)).double()
            for name, (s, r) in self.divided.items()
        }

    def tensor(self, name: str) -> Tensor:
        """LightX2V's own norms, which may be folded; MindIE's come from the float checkpoint."""
        return self.reader.tensor(name)

    def affine(self, block: str, norm: str) -> tuple[Tensor, Tensor]:
        """See Weights."""
        return self.reader.affine(block, norm)

    def product(self, name: str, x: Tensor) -> Tensor:
        """The written bias and scale of the input."""
        if name not in self.weights:
            return super().product(name, x)
        if isinstance(self.reader, MindIE):
            x, bias = x * self.reader.mul(name), self.reader.of(name, "bias").double()
        else:
            bias = self.reader.layers[name][2]
        return torch.nn.functional.linear(x, self.weights[name], bias)
