"""Load a folder as LightX2V does: by the names that its weight classes register, with what it does to each tensor.

Follows ModelTC/LightX2V `lightx2v/models/networks/wan/weights/{pre,transformer}_weights.py`, `vace/` beside them, and
`common/ops/`: every .safetensors file is loaded, the index is not read; names are looked up, a missing float tensor is
a KeyError, a missing scale or bias becomes None in silence. Affine tensors are looked up in every block when
`config.json` says `quant_method: advanced_ptq`, and never otherwise. Scales and biases become bf16 in a plain load.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from consumer.wan_block import Weights, per_token, tensors_in

SCHEMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
AFFINE = {"norm1": "affine_norm1", "norm2": "affine_norm3"}
FLOAT_LINEARS = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1")


@dataclass
class Registered:
    """Names that LightX2V looks up: quantized layers, and float tensors."""

    layers: list[str] = field(default_factory=list)
    floats: list[str] = field(default_factory=list)


def registered(config: dict[str, Any], *, branch: bool, first_last: bool = False) -> Registered:
    """By the config alone. `branch`: Wan2.1's image branch, which LightX2V knows from its task."""
    found = Registered()
    vace = config.get("vace_layers") or []
    units = [f"blocks.{i}" for i in range(config["num_layers"])] + [f"vace_blocks.{i}" for i in range(len(vace))]
    for unit in units:
        image = branch and unit.startswith("blocks.")
        found.layers += [f"{unit}.{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
        found.layers += [f"{unit}.ffn.0", f"{unit}.ffn.2"]
        found.floats += [f"{unit}.modulation", f"{unit}.norm3.weight", f"{unit}.norm3.bias"]
        found.floats += [f"{unit}.{kind}_attn.norm_{part}.weight" for kind in ("self", "cross") for part in "qk"]
        if image:
            found.layers += [f"{unit}.cross_attn.k_img", f"{unit}.cross_attn.v_img"]
            found.floats.append(f"{unit}.cross_attn.norm_k_img.weight")
        if unit.startswith("vace_"):
            found.layers += [f"{unit}.before_proj"] * (unit == "vace_blocks.0") + [f"{unit}.after_proj"]
        if config.get("quant_method") == "advanced_ptq":
            found.floats += [f"{unit}.{name}.{leaf}" for name in AFFINE.values() for leaf in ("weight", "bias")]
    found.floats += [f"{name}.{leaf}" for name in (*FLOAT_LINEARS, "head.head", "patch_embedding")
                     for leaf in ("weight", "bias")] + ["head.modulation"]  # fmt: skip
    if vace:
        found.floats += ["vace_patch_embedding.weight", "vace_patch_embedding.bias"]
    if branch:
        found.floats += [f"img_emb.proj.{i}.{leaf}" for i in (0, 1, 3, 4) for leaf in ("weight", "bias")]
        found.floats += ["img_emb.emb_pos"] * first_last
    return found


class LightX2V(Weights):
    """A loaded folder of one scheme, `int8` or `fp8`. `exact`: tensors as they lie on the disk, as in a lazy load; else
    scales, biases and affine tensors rounded to bf16, as in a plain one. `act`: round activations, a scale a token."""

    def __init__(
        self, folder: Path, *, branch: bool = False, first_last: bool = False, exact: bool = False, act: bool = True
    ) -> None:
        super().__init__(dict(tensors_in(folder)))
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        for key in ("dim", "ffn_dim", "in_dim", "num_heads", "num_layers"):
            assert key in self.config, key
        self.exact, self.act = exact, act
        self.scheme = ""
        self.names = registered(self.config, branch=branch, first_last=first_last)
        for name in self.names.floats:
            self.tensors[name]  # noqa: B018 - LightX2V's own KeyError
        self.layers = {name: self._layer(name) for name in self.names.layers}

    def _layer(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and bias of what LightX2V would compute with; it takes anything, this does not."""
        codes, scale, bias = (self.tensors.get(f"{name}.{leaf}") for leaf in ("weight", "weight_scale", "bias"))
        assert codes is not None and codes.dtype in SCHEMES and codes.ndim == 2, f"{name}: of no scheme"
        self.scheme = self.scheme or SCHEMES[codes.dtype]
        assert SCHEMES[codes.dtype] == self.scheme, f"{name}: LightX2V reads one scheme, {self.scheme}"
        assert bool(codes.float().isfinite().all()), f"{name}: codes"
        assert scale is not None and scale.shape == (len(codes), 1), f"{name}: LightX2V loads its scale as None"
        assert bias is not None and bias.shape == (len(codes),), f"{name}: LightX2V loads its bias as None"
        assert scale.is_floating_point() and bias.is_floating_point(), name
        assert bool(scale.isfinite().all()) and bool((scale > 0).all()), f"{name}: scale"
        assert torch.equal(scale.float(), scale.bfloat16().float()), f"{name}: a plain load would round its scale"
        return codes, self._kept(scale), self._kept(bias)

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.double() if self.exact else tensor.bfloat16().double()

    def unused(self) -> set[str]:
        """Tensors in the folder that LightX2V never looks up."""
        wanted = {f"{name}.{leaf}" for name in self.names.layers for leaf in ("weight", "weight_scale", "bias")}
        return self.tensors.keys() - wanted - set(self.names.floats)

    def tensor(self, name: str) -> Tensor:
        """See Weights. Norms and modulations are kept in a dtype of their own."""
        return super().tensor(name)

    def weight(self, name: str) -> Tensor:
        """What a layer multiplies with."""
        codes, scale, _ = self.layers[name]
        return codes.float().double() * scale

    def product(self, name: str, x: Tensor) -> Tensor:
        """Dynamic, a scale a token."""
        if self.act:
            x = per_token(x) if self.scheme == "int8" else per_token_e4m3(x)
        return functional.linear(x, self.weight(name), self.layers[name][2])

    def affine(self, block: str, norm: str) -> tuple[Tensor, Tensor]:
        """Only with `advanced_ptq`: y = LN(x) · ((1 + scale) · weight) + shift · bias."""
        if self.config.get("quant_method") != "advanced_ptq":
            return super().affine(block, norm)
        weight, bias = (self._kept(self.tensors[f"{block}.{AFFINE[norm]}.{leaf}"]) for leaf in ("weight", "bias"))
        return weight, bias


def per_token_e4m3(x: Tensor) -> Tensor:
    """What fp8 with a scale a token leaves of x."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (x / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale
