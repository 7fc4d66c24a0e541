"""A transformer's weights as they lie on disk: of each block, which tensors make its float ones and its layers.

A float checkpoint and a folder of any format that streamq writes look alike from here on. Headers only: needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from streamq import outputs, wan
from streamq.checkpoint import Checkpoint, TensorInfo
from streamq.errors import UsageError
from streamq.journal import MANIFEST
from streamq.savers import Format

SAMPLE = 1 << 20  # bytes of each end of a file that count for a transformer's identity
KNOWN = (
    "w8a8", "w8a8_static", "w8a8_smooth", "w8a8_static_smooth", "w8a16", "fp8", "w8a8_mxfp8", "w4a4_mxfp4", "w4a4",
    "w4a4_nvfp4", "w4a16",
)  # fmt: skip


@dataclass
class Layer:
    """A quantized layer: its type, and its stored tensors by suffix."""

    kind: str
    parts: dict[str, TensorInfo] = field(default_factory=dict)


@dataclass
class Unit:
    """A block, or what lies outside: float tensors and layers by diffusers name, the format's own by stored name."""

    floats: dict[str, TensorInfo] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    own: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def infos(self) -> list[TensorInfo]:
        """All of them, in an order that depends on names alone."""
        parts = [info for layer in self.layers.values() for info in layer.parts.values()]
        return sorted([*self.floats.values(), *parts, *self.own.values()], key=lambda info: (info.file, info.offset))


@dataclass(frozen=True)
class Weights:
    """One transformer (one expert). `format` None: float. `types`: label -> number of layers, of quantized ones."""

    model: wan.Model
    checkpoint: Checkpoint
    format: Format | None
    format_name: str | None
    folder: Path
    units: dict[str, Unit]
    types: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.checkpoint.files)

    def unused(self) -> list[str]:
        """Tensors of the format's own that have no part in what is computed here: rotations of attention."""
        read = {name for unit in self.units for name in self.vectors(unit)}
        return sorted(name for unit in self.units.values() for name in unit.own if name not in read)

    def vectors(self, unit: str) -> dict[str, tuple[str, ...]]:
        """Smoothing vectors beside a block's norms: stored name -> layers whose input it multiplies."""
        form, found = self.format, {}
        for group in wan.GROUPS if form is not None and unit != "rest" else ():
            specs = form.vector_specs(f"{unit}.{group.adaln}", self.model.dim) if form and group.adaln else []
            if specs and specs[0].name in self.units[unit].own:
                found[specs[0].name] = tuple(f"{unit}.{layer}" for layer in group.layers)
                found |= {spec.name: () for spec in specs[1:]}
        return found


def float_weights(expert: wan.Expert) -> Weights:
    """A float checkpoint's."""
    model, units = expert.model, {unit: Unit() for unit in [*expert.model.blocks, "rest"]}
    for name, info in model.tensors.items():
        units[wan.unit_of(name)].floats[name] = info
    return Weights(model, model.checkpoint, None, None, model.checkpoint.root, units, {})


def quantized_weights(output: outputs.Output, manifest_folder: Path, config: Path | None) -> Weights:
    """Those of one expert's folder. `config`: where a config.json is, should the folder have none.

    Raises UsageError for a folder that is no whole model, and for a type that cannot be run.
    """
    form, checkpoint = output.format, output.checkpoint()
    kinds = {name: kind for name, kind in output.layers(checkpoint).items() if kind != "float"}
    for name, kind in kinds.items():
        if kind not in KNOWN:
            raise UsageError(f"{output.folder}: {name} has type {kind[:80]!r}, which is not known; streamq verify it")
    model = output.model(checkpoint)
    if config is not None and not (output.folder / "config.json").is_file():
        model = replace(model, checkpoint=replace(model.checkpoint, root=config))
    named = {(wan.to_diffusers(name) or name) if form.NAMES == "diffusers" else name: name for name in kinds}
    units = {unit: Unit() for unit in [*model.blocks, "rest"]}
    floats = output.floats(checkpoint)
    for stored, info in checkpoint.tensors.items():
        plain = stored.removeprefix(wan.COMFYUI_PREFIX)
        layer = _layer_of(plain, named)
        native = form.float_name(stored)
        if layer is not None:
            name = wan.to_diffusers(named[layer]) or named[layer]
            place = units[wan.unit_of(name)].layers.setdefault(name, Layer(kinds[named[layer]]))
            place.parts[plain.removeprefix(f"{layer}.")] = info
        elif native is None:
            units.get(wan.unit_of(plain), units["rest"]).own[plain] = info
        elif (name := wan.to_diffusers(native) or native) in model.tensors:
            units[wan.unit_of(name)].floats[name] = floats[native]
    recorded = outputs.recorded(manifest_folder, output)
    types = Counter(recorded.get(name, kind) for name, kind in kinds.items())
    return Weights(model, checkpoint, form, output.format_name, output.folder, units, dict(sorted(types.items())))


def _layer_of(name: str, layers: Mapping[str, str]) -> str | None:
    """The quantized layer that a stored tensor is part of."""
    place = name
    while "." in place:
        place = place.rpartition(".")[0]
        if place in layers:
            return place
    return None


def identity(weights: list[Weights]) -> str:
    """sha256 over manifests, headers, sizes and both ends of the files: whether two videos are the same model's."""
    digest = hashlib.sha256()
    for one in weights:
        for place in (one.folder, one.folder.parent):
            if (place / MANIFEST).is_file():
                digest.update((place / MANIFEST).read_bytes())
                break
        for file in one.checkpoint.files:
            digest.update(json.dumps([file.name, file.size, file.header_sha256]).encode())
            with open(file.path, "rb") as stream:
                digest.update(stream.read(SAMPLE))
                stream.seek(max(0, os.fstat(stream.fileno()).st_size - SAMPLE))
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
