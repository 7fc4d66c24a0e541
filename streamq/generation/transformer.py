"""diffusers' own Wan transformer, whose blocks are lent by a store for the time of a call.

Its class, its forward and its blocks' forwards are diffusers', so its pipelines drive it unchanged. With float weights
it computes their bits: `streamq.wan.blocks` says under what conditions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from streamq import outputs
from streamq.device import Device
from streamq.errors import RunError
from streamq.generation.layers import Layer, Weights
from streamq.generation.linear import StoredLinear
from streamq.generation.store import BlockStore, Room, Tensors, by_name
from streamq.quantized import QuantizedLinear
from streamq.wan.blocks import BlockRunner, streamed_model


class Transformer:
    """One expert: `module` is what a pipeline takes. `close()` when done.

    Raises UsageError for a model that diffusers' class does not fit, RunError when a file cannot be read, and from a
    forward when a layer that is used for the first time has a scale, bias or the like that is NaN or Inf.
    """

    def __init__(self, weights: Weights, device: Device, room: Room, dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype
        self._sound: set[str] = set()  # layers whose numbers have been looked at
        self.store = BlockStore(weights, device, room, dtype)
        place = device_of(device)
        self._runner = BlockRunner(weights.model, dtype, place)
        outside = self.store.outside()
        floats, layers = self._contents("rest", outside)
        self.module: Any = streamed_model(weights.model, floats, layers, dtype, place, self._borrow)

    @contextmanager
    def _borrow(self, unit: str) -> Iterator[nn.Module]:
        with self.store.borrow(unit) as tensors:
            yield self._runner.make(unit, *self._contents(unit, tensors))

    def _contents(self, name: str, tensors: Tensors) -> tuple[dict[str, Tensor], dict[str, nn.Module]]:
        """A unit's float tensors, and what stands for its quantized layers, by diffusers name."""
        unit = self.weights.units[name]
        inverse = {
            layer: tensors[unit.own[vector].name]
            for vector, layers in self.weights.vectors(name).items()
            for layer in layers
        }
        made = {
            layer: StoredLinear(partial(self._record, layer, about, tensors, inverse.get(layer)), self.dtype)
            for layer, about in unit.layers.items()
        }
        return by_name(tensors, unit.floats), dict(made)

    def _record(self, name: str, about: Layer, tensors: Tensors, inverse: Tensor | None) -> QuantizedLinear:
        form = self.weights.format
        assert form is not None
        try:
            layer = form.record(by_name(tensors, about.parts), about.kind)
        except (KeyError, RuntimeError, ValueError) as error:
            raise RunError(
                f"{self.weights.folder}: {name} cannot be read as {about.kind} ({str(error)[:200]}); `streamq verify`"
                " says what is wrong with the folder"
            ) from error
        if inverse is not None:
            layer.smooth = inverse.float().reciprocal()
        if name not in self._sound:
            self._check_finite(name, layer, about, tensors)
            self._sound.add(name)
        return layer

    def _check_finite(self, name: str, layer: QuantizedLinear, about: Layer, tensors: Tensors) -> None:
        """Raise RunError for a NaN or Inf in what scales a layer: it would be in every pixel, and told at the end."""
        branch = layer.low_rank
        fixed = layer.scales.new_tensor([layer.static.scale, layer.static.offset]) if layer.static else None
        values = [layer.scales, layer.zeros, layer.tensor_scale, layer.bias, layer.smooth, fixed]
        values += [branch.down, branch.up] if branch is not None else []
        if all(value is None or bool(torch.isfinite(value).all()) for value in values):
            return
        infos = sorted(about.parts.values(), key=lambda info: info.nbytes)
        floats = [info for info in infos if tensors[info.name].is_floating_point()]
        broken = [info for info in floats if not bool(torch.isfinite(tensors[info.name].float()).all())]
        packed = [info for info in infos if info not in floats]  # exponents, or scales among the codes
        found = [*broken, *packed]
        which = self.weights.checkpoint.where(found[0]) if found else f"the smoothing of {name}"
        raise RunError(
            f"{which}: NaN or Inf in it ({name}, {about.kind}, of {self.weights.folder}), so no picture can come of it;"
            f" {outputs.anew(self.weights.folder)}; `streamq verify` finds all such tensors"
        )

    def close(self) -> None:
        """Let go of everything."""
        self.module = None
        self.store.close()


def device_of(device: Device) -> torch.device:
    """Where a device's tensors are."""
    return getattr(device, "device", torch.device(device.kind))
