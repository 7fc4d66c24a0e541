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

from streamq.device import Device
from streamq.errors import RunError
from streamq.generation.layers import Layer, Weights
from streamq.generation.linear import StoredLinear
from streamq.generation.store import BlockStore, Room, Tensors, by_name
from streamq.quantized import QuantizedLinear
from streamq.wan.blocks import BlockRunner, streamed_model


class Transformer:
    """One expert: `module` is what a pipeline takes. `close()` when done.

    Raises UsageError for a model that diffusers' class does not fit, RunError when a file cannot be read.
    """

    def __init__(self, weights: Weights, device: Device, room: Room, dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype
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
        return layer

    def close(self) -> None:
        """Let go of everything."""
        self.module = None
        self.store.close()


def device_of(device: Device) -> torch.device:
    """Where a device's tensors are."""
    return getattr(device, "device", torch.device(device.kind))
