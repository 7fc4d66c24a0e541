"""A MindIE folder as mindiesd 3.1.0 reads it, without mindiesd: each layer by its own type in the description.

Dynamic layers: int8 activations with a scale a token; static ones: one range, and a bias in int32. A layer with
`div.mul_scale` multiplies its input first. All else comes from the float checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from consumer.wan_block import Weights, per_token, tensors_in


class MindIE(Weights):
    """`floats`: the float checkpoint by native name; `act`: round activations as the runtime does."""

    def __init__(self, folder: Path, floats: Mapping[str, Tensor], *, act: bool = True) -> None:
        super().__init__(floats)
        (path,) = folder.glob("quant_model_description_*.json")
        self.description: dict[str, str] = json.loads(path.read_text())
        self.quant_type = self.description.pop("model_quant_type")
        assert [p.name for p in folder.glob("*.safetensors")] == [
            f"quant_model_weight_{self.quant_type.lower()}.safetensors"
        ]
        self.made = dict(tensors_in(folder))
        self.act = act

    def typed(self, name: str) -> str:
        """A layer's type; mindiesd looks below `.linear` first."""
        return self.description.get(f"{name}.linear.weight", self.description.get(f"{name}.weight", "absent"))

    def of(self, name: str, leaf: str) -> Tensor:
        """A tensor of a quantized layer, where mindiesd looks for it."""
        below = "linear." if f"{name}.div.mul_scale" in self.made else ""
        return self.made[f"{name}.{below}{leaf}"]

    def mul(self, name: str) -> Tensor:
        """What the input is multiplied by."""
        return self.made.get(f"{name}.div.mul_scale", torch.ones(1)).double()

    def weight(self, name: str) -> Tensor:
        """codes · scale."""
        codes = self.of(name, "weight").double()
        if self.typed(name) == "W8A8":
            return codes * (self.of(name, "deq_scale").double() / self.of(name, "input_scale").double()).unsqueeze(1)
        return codes * self.of(name, "weight_scale").double()

    def product(self, name: str, x: Tensor) -> Tensor:
        """As the runtime, or with `act` off in float; static layers then take their bias from `P.bias`."""
        kind = self.typed(name)
        if kind in ("FLOAT", "absent"):
            return super().product(name, x)
        x = x * self.mul(name)
        if not self.act or kind == "W8A8_DYNAMIC":
            x = per_token(x) if self.act else x
            return functional.linear(x, self.weight(name), self.of(name, "bias").double())
        assert kind == "W8A8", kind
        step, zero, codes = (
            self.of(name, "input_scale").double(),
            self.of(name, "input_offset"),
            self.of(name, "weight"),
        )
        q = ((x / step).round() + zero.double()).clamp(-128, 127)
        sums = functional.linear(q, codes.double()) + self.of(name, "quant_bias").double()
        return sums * self.of(name, "deq_scale").double()
