"""Load a file as ComfyUI does, into comfy-kitchen's own tensors, which compute the layers.

Follows Comfy-Org/ComfyUI `comfy/utils.py` (the prefix goes, metadata are written over the layers' own JSON) and
`comfy/ops.py` (a layer without JSON keeps its weight as it is, cast to the model's dtype).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout, TensorWiseINT8Layout
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

PREFIX = "model.diffusion_model."
STORED = {"int8_tensorwise": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
LAYOUTS: dict[str, Any] = {"int8_tensorwise": TensorWiseINT8Layout, "float8_e4m3fn": TensorCoreFP8Layout}


class ComfyUI:
    """A loaded file: `layers` by native name, and every tensor that belongs to none of them in `floats`."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        with safe_open(path, "pt") as file:
            self.metadata = dict(file.metadata() or {})
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        said = json.loads(self.metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
        for layer, conf in said.items():
            raw = list(json.dumps(conf).encode())
            held[f"{layer}.comfy_quant"] = torch.tensor(raw, dtype=torch.uint8)
        self.prefixed = any(name.startswith(PREFIX) for name in held)
        if self.prefixed:  # what lacks the prefix is no part of the model
            held = {name.removeprefix(PREFIX): tensor for name, tensor in held.items() if name.startswith(PREFIX)}
        self.held, self.dtype = held, dtype
        self.layers: dict[str, QuantizedTensor] = {}
        self.conf: dict[str, dict[str, Any]] = {}
        for name in [n.removesuffix(".comfy_quant") for n in held if n.endswith(".comfy_quant")]:
            self.layers[name] = self._layer(name)
        own = {f"{name}.{leaf}" for name in self.layers for leaf in ("weight", "weight_scale", "comfy_quant", "bias")}
        self.floats = {name: tensor for name, tensor in held.items() if name not in own}

    def _layer(self, name: str) -> QuantizedTensor:
        conf = json.loads(self.held[f"{name}.comfy_quant"].numpy().tobytes())
        layout, weight = LAYOUTS[conf["format"]], self.held[f"{name}.weight"]
        more = {}
        if conf["format"] == "int8_tensorwise" and conf.get("convrot", False):
            more = {"convrot": True, "convrot_groupsize": int(conf.get("convrot_groupsize", 256))}
        self.conf[name] = conf
        params = layout.Params(
            scale=self.held[f"{name}.weight_scale"], orig_dtype=self.dtype, orig_shape=tuple(weight.shape), **more
        )
        return QuantizedTensor(weight.to(STORED[conf["format"]]), layout.__name__, params)

    def weight(self, name: str) -> Tensor:
        """What comfy-kitchen says the layer's weight is, in the original basis."""
        return self.layers[name].dequantize()

    def product(self, name: str, x: Tensor) -> Tensor:
        """The layer's output by comfy-kitchen's kernels; fp8 with its input rounded to fp8 as ComfyUI does it."""
        weight, bias = self.layers[name], self.held[f"{name}.bias"].to(self.dtype)
        if self.conf[name]["format"] == "float8_e4m3fn":
            x = QuantizedTensor.from_float(x, "TensorCoreFP8Layout")
        return functional.linear(x, weight, bias)
