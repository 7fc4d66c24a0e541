"""Wan's blocks by native names in plain float64 arithmetic, and what a quantized output puts in the place of parts.

Written from the published architecture, with neither diffusers nor streamq: a test compares it with diffusers' blocks,
and with it what a runtime makes of a written folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

TEXT_LEN = 512
EPS = 1e-6


@dataclass
class Sample:
    """What the first block gets, from a calibration set: `temb` [1, 6, D], or a row a token, [1, L, 6, D]."""

    hidden: Tensor
    states: Tensor
    temb: Tensor
    cos: Tensor
    sin: Tensor
    control: Tensor | None = None
    control_scale: Tensor | None = None


def samples_in(folder: Path, expert: str = "") -> list[Sample]:
    """Every sample of an expert in a calibration set, by the layout that the set's own documentation states."""
    about = json.loads((folder / "calib.json").read_text())["experts"][expert]
    tensors = load_file(folder / about["file"])
    found = []
    for i, sample in enumerate(about["samples"]):
        temb = tensors[f"timestep_proj.{i}"]
        if f"token_row.{i}" in tensors:
            temb = temb[tensors[f"token_row.{i}"].long()][None]
        states = tensors[f"encoder_hidden_states.{sample['states']}"]
        cos, sin = tensors["rotary.cos"], tensors["rotary.sin"]
        more = tensors.get(f"control.{i}"), tensors.get("control_scale")
        found.append(Sample(tensors[f"hidden_states.{i}"], states, temb, cos, sin, *more))
    return found


class Weights:
    """A float model's tensors by native name. A quantized model overrides `product`, `tensor` or `affine`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        # layer -> max |x|, min and max of each input channel so far, as the layer gets it
        self.seen: dict[str, Tensor] = {}
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}
        self.given: dict[str, list[Tensor]] = {}  # layer -> its outputs

    def tensor(self, name: str) -> Tensor:
        """A float tensor."""
        return self.tensors[name].double()

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A layer's output; input and output are noted."""
        self.look(name, x)
        y = self.product(name, x)
        self.given.setdefault(name, []).append(y)
        return y

    def product(self, name: str, x: Tensor) -> Tensor:
        """x W^T + b."""
        return functional.linear(x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"))

    def look(self, name: str, x: Tensor) -> None:
        """Note a layer's input."""
        rows = x.flatten(0, -2)
        low, high = rows.amin(0), rows.amax(0)
        self.low[name] = torch.minimum(self.low.get(name, low), low)
        self.high[name] = torch.maximum(self.high.get(name, high), high)
        self.seen[name] = torch.maximum(self.high[name], -self.low[name])

    def affine(self, block: str, norm: str) -> tuple[Tensor, Tensor]:
        """What multiplies 1 + scale, and what multiplies the shift, behind the native `norm1` and `norm2`."""
        one = torch.ones((), dtype=torch.float64)
        return one, one

    def blocks(self, kind: str) -> list[str]:
        """`blocks.0`, …; `vace_blocks.0`, …"""
        numbers = {int(name.split(".")[1]) for name in self.tensors if name.startswith(f"{kind}.")}
        return [f"{kind}.{number}" for number in sorted(numbers)]


def run(weights: Weights, sample: Sample, heads: int, vace_layers: list[int]) -> Tensor:
    """The last block's output [1, L, D] float64."""
    hidden, hints = sample.hidden.double(), []
    if sample.control is not None:
        control = sample.control.double()
        for p in weights.blocks("vace_blocks"):
            if p == "vace_blocks.0":
                control = weights.linear(f"{p}.before_proj", control) + hidden
            control = block(weights, p, control, sample, heads)
            hints.append(weights.linear(f"{p}.after_proj", control))
    for i, p in enumerate(weights.blocks("blocks")):
        hidden = block(weights, p, hidden, sample, heads)
        if i in vace_layers and sample.control_scale is not None:
            which = sorted(vace_layers).index(i)
            hidden = hidden + hints[which] * sample.control_scale[which].double()
    return hidden


def block(weights: Weights, p: str, x: Tensor, sample: Sample, heads: int) -> Tensor:
    """One block: AdaLN, self-attention with rotary embedding, cross-attention with text and image, FFN."""
    table = weights.tensor(f"{p}.modulation") + sample.temb.double()
    shift, scale, gate, c_shift, c_scale, c_gate = (part.squeeze(2) if table.ndim == 4 else part
                                                    for part in table.chunk(6, dim=-2))  # fmt: skip
    w, b = weights.affine(p, "norm1")
    y = _norm(x) * ((1 + scale) * w) + shift * b
    q, k = (_rms(weights, f"{p}.self_attn", part, y) for part in "qk")
    q, k = (_rotated(_split(t, heads), sample) for t in (q, k))
    out = _attend(q, k, _split(weights.linear(f"{p}.self_attn.v", y), heads))
    x = x + weights.linear(f"{p}.self_attn.o", out) * gate
    x = x + _cross(weights, f"{p}.cross_attn", _norm3(weights, p, x), sample.states.double(), heads)
    w, b = weights.affine(p, "norm2")
    y = _norm(x) * ((1 + c_scale) * w) + c_shift * b
    y = functional.gelu(weights.linear(f"{p}.ffn.0", y), approximate="tanh")
    return x + weights.linear(f"{p}.ffn.2", y) * c_gate


def _cross(weights: Weights, p: str, y: Tensor, states: Tensor, heads: int) -> Tensor:
    images = states.shape[1] - TEXT_LEN
    q = _split(_rms(weights, p, "q", y), heads)
    text, image = states[:, images:], states[:, :images]
    out = _attend(q, _split(_rms(weights, p, "k", text), heads), _split(weights.linear(f"{p}.v", text), heads))
    if images:
        k, v = _rms(weights, p, "k_img", image), weights.linear(f"{p}.v_img", image)
        out = out + _attend(q, _split(k, heads), _split(v, heads))
    return weights.linear(f"{p}.o", out)


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=EPS)


def _norm3(weights: Weights, p: str, x: Tensor) -> Tensor:
    return _norm(x) * weights.tensor(f"{p}.norm3.weight") + weights.tensor(f"{p}.norm3.bias")


def _rms(weights: Weights, attention: str, part: str, x: Tensor) -> Tensor:
    """A projection and the RMS norm over all heads behind it."""
    y = weights.linear(f"{attention}.{part}", x)
    return y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt() * weights.tensor(f"{attention}.norm_{part}.weight")


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _rotated(x: Tensor, sample: Sample) -> Tensor:
    """Pairs of neighbours turned by the angle that `cos` and `sin` hold twice."""
    cos, sin = sample.cos.double()[..., 0::2], sample.sin.double()[..., 1::2]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def per_token(x: Tensor) -> Tensor:
    """What int8 with a scale a token leaves of x."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


def apart(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's .safetensors files; a name that comes twice is an error."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in names, f"{name} is in two files"
            names.add(name)
            yield name, tensor
