"""The plan: everything that a run will do, from headers and a recipe alone. `streamq.planner` makes it.

What is quantized and how, in which order, into which files at which offsets, how many bytes are moved, how much memory
that takes, and a hash that says whether two plans make the same bytes. `pipeline.run` executes the plan and nothing but
the plan, so `streamq plan` cannot say anything else than `streamq quant` does. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from streamq import __version__, recipe, wan
from streamq.calibration import plan as calibrations
from streamq.calibration.plan import CalibPlan
from streamq.card import Card
from streamq.checkpoint import TensorInfo
from streamq.device import HOST_BASE, STAGE_CHUNK, STAGE_CHUNKS, MiB
from streamq.errors import UsageError
from streamq.lora import Delta, Lora, loras_of, merge_nbytes
from streamq.options import QuantOptions
from streamq.quantized import Scheme, Smooth
from streamq.savers import Format, SaveOptions
from streamq.savers.shard import Place, TensorFile

COPY_CHUNK = 8 * MiB  # of tensors that pass through
DEVICE_SCRATCH = 256 * MiB  # tiles of a method on an accelerator, and what its allocator rounds up
DISK_RESERVE = 16 * MiB  # journal, manifest, and the file system's own


def aligned(nbytes: int) -> int:
    """Rounded up so that whatever follows in the same buffer can have any dtype."""
    return -(-nbytes // 64) * 64


@dataclass(frozen=True, slots=True)
class Output:
    """What one target gets from one step: `scheme` None means the source's own values, in the dtype of their places.

    `smooth`: a norm's tensor that is divided by this vector; or, in a step without sources, the vector itself.
    `rotation`: in a step without sources, the head size of an attention module whose q and k are rotated; 0 for none.
    """

    target: int
    scheme: Scheme | None
    places: tuple[Place, ...]
    smooth: Smooth | None = None
    rotation: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """The smallest piece of work: a linear layer (weight and bias), or one tensor that passes through.

    `label` is what users see: the native name, after the expert's where there are two. `name` is the diffusers name,
    `tensors` are those of its sources. `replayed`: part of a block that calibration inputs go through. `deltas`: of
    each source, what LoRAs add to it; () where none adds anything.
    """

    label: str
    name: str
    tensors: tuple[str, ...]
    sources: tuple[TensorInfo, ...]
    outputs: tuple[Output, ...]
    replayed: bool = False
    deltas: tuple[tuple[Delta, ...], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every target gets the source's own values."""
        return bool(self.sources) and not any(output.scheme or output.smooth for output in self.outputs)

    @property
    def held(self) -> bool:
        """Whether it is worked on in the device's memory; otherwise its bytes are copied in chunks."""
        return self.replayed or bool(self.deltas) or any(output.scheme for output in self.outputs)

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it: its source tensors, and what LoRAs add to them."""
        return sum(info.nbytes for info in self.sources) + sum(d.nbytes for found in self.deltas for d in found)

    @property
    def schemes(self) -> set[Scheme]:
        """The distinct ways in which it is quantized."""
        return {output.scheme for output in self.outputs if output.scheme}

    @property
    def working_nbytes(self) -> int:
        """Bytes that it takes in the arena while it is worked on: its source, and the codes of each distinct scheme."""
        codes = aligned(len(self.schemes) * math.prod(self.sources[0].shape))
        return sum(aligned(info.nbytes) for info in self.sources) + max(codes, self.merge_nbytes)

    @property
    def beside_nbytes(self) -> int:
        """Bytes outside the arena until it is written: the scales of blocks of columns, what a format packs codes into,
        and what it casts."""
        weights = math.prod(self.sources[0].shape)
        scales = sum(int(weights * scheme.scale_bytes) for scheme in self.schemes)
        made = sum(place.nbytes for o in self.outputs if o.scheme and o.scheme.packed for place in o.places)
        cast = sum(
            place.nbytes
            for output in self.outputs
            if output.scheme is None and output.smooth is None
            for place, info in zip(output.places, self.sources, strict=False)
            if place.dtype != info.dtype
        )
        return scales + made + cast

    @property
    def merge_nbytes(self) -> int:
        """Bytes that merging LoRAs takes, where its codes come later: every factor, and the largest tile."""
        factors = sum(aligned(f.nbytes) for found in self.deltas for delta in found for f in delta.factors)
        pairs = zip(self.sources, self.deltas, strict=False)
        return factors + max((aligned(merge_nbytes(info.shape, found)) for info, found in pairs if found), default=0)


@dataclass(frozen=True)
class Unit:
    """What is committed together: a block, or everything outside blocks. `key` is unique in the plan."""

    key: str
    name: str
    steps: tuple[Step, ...]

    @property
    def replayed(self) -> bool:
        """Whether calibration inputs go through it."""
        return any(step.replayed for step in self.steps)


@dataclass(frozen=True)
class ExpertPlan:
    """One transformer's part of the plan."""

    expert: wan.Expert
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Target:
    """One format of the run. `folder` is relative to the output folder ("" where there is one format)."""

    name: str
    format: Format
    recipe: recipe.Recipe
    folder: str
    save: SaveOptions

    def folder_of(self, expert: wan.Expert) -> str:
        """Where an expert's files go, relative to the output folder."""
        return "/".join(part for part in (self.folder, self.format.EXPERTS[expert.name]) if part)


@dataclass(frozen=True)
class Plan:
    """See the module. `documents` are (path relative to the output folder, content, mode); `cards` are those of them
    whose figures the run fills in, by path; `usage` is how each format is loaded, with `card.FOLDER` for its folder.

    `arena_nbytes` is the memory that all layers at work share, on the device: it bounds how much is read ahead.
    `beside_nbytes` is what is made of them outside it. `replay_nbytes` is what a calibrated run takes on the device
    besides, `cache_nbytes` what it keeps in host memory;
    `making_peaks` are the peaks on host and device while it makes its own inputs, before any of that.
    """

    options: QuantOptions
    source_path: Path
    device_kind: str
    targets: tuple[Target, ...]
    experts: tuple[ExpertPlan, ...]
    files: tuple[TensorFile, ...]
    documents: tuple[tuple[str, bytes, int], ...]
    layers: dict[str, dict[str, str]]
    arena_nbytes: int
    warnings: tuple[str, ...]
    cards: Mapping[str, Card] = field(default_factory=dict)
    usage: Mapping[str, Sequence[str]] = field(default_factory=dict)
    calibration: CalibPlan | None = None
    replay_nbytes: int = 0
    beside_nbytes: int = 0
    cache_nbytes: int = 0
    making_peaks: tuple[int, int] = (0, 0)

    @property
    def units(self) -> list[Unit]:
        """Every unit of every expert, in the order of work."""
        return [unit for part in self.experts for unit in part.units]

    @property
    def bytes_to_read(self) -> int:
        """Bytes of source tensors and LoRAs; each is read once, whatever the number of formats."""
        return sum(step.nbytes for unit in self.units for step in unit.steps)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of every output file but the manifest."""
        return sum(f.size for f in self.files) + sum(len(content) for _, content, _ in self.documents)

    @property
    def scratch_nbytes(self) -> int:
        """Bytes on the disk while the run lasts: two generations of the streams between blocks, and its own inputs."""
        if self.calibration is None:
            return 0
        names = [part.expert.name for part in self.experts]
        own = 0 if self.calibration.given else sum(self.calibration.set_nbytes(name) for name in names)
        return 2 * max(self.calibration.cache_nbytes(name) for name in names) + own

    @property
    def peak_host_bytes(self) -> int:
        """Predicted peak of resident memory."""
        at_work = self._at_work if self.device_kind == "cpu" else 0
        return max(host_fixed(self.device_kind, self.calibration) + at_work + self.cache_nbytes, self.making_peaks[0])

    @property
    def _at_work(self) -> int:
        return self.arena_nbytes + self.beside_nbytes + self.replay_nbytes

    @property
    def peak_device_bytes(self) -> int:
        """Predicted peak of device memory; 0 on the CPU."""
        if self.device_kind == "cpu":
            return 0
        return max(self._at_work + DEVICE_SCRATCH, self.making_peaks[1])

    @cached_property
    def hash(self) -> str:
        """sha256 of all that decides the bytes of the result."""
        options = self.options
        identity = {
            "version": __version__, "device": self.device_kind, "match": options.match, "seed": options.seed,
            "layout": options.layout, "max_shard_size": options.max_shard_size,
            "sources": self.sources, "lora": self.lora_identity, "layers": self.layers,
            "recipes": {target.name: target.recipe.document for target in self.targets},
            "calibration": self.calibration.identity if self.calibration else None,
            "documents": {path: hashlib.sha256(content).hexdigest() for path, content, _ in self.documents},
            "files": {file.path: hashlib.sha256(file.header).hexdigest() for file in self.files},
        }  # fmt: skip
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def sources(self) -> dict[str, list[dict[str, Any]]]:
        """Expert -> its files' names, sizes and header hashes."""
        return {
            part.expert.name: [
                {"file": f.name, "bytes": f.size, "header_sha256": f.header_sha256}
                for f in part.expert.model.checkpoint.files
            ]
            for part in self.experts
        }

    @property
    def loras(self) -> list[Lora]:
        """What is merged into the weights, in the order of the command line."""
        return loras_of(part.expert.model for part in self.experts)

    @property
    def lora_identity(self) -> list[dict[str, Any]]:
        """Their files' names, sizes, header hashes and strengths."""
        return [lora.identity for lora in self.loras]

    def _calibration_json(self) -> dict[str, Any]:
        assert self.calibration is not None
        chosen, experts = self.calibration, [part.expert for part in self.experts]
        return {
            "inputs": str(chosen.given.path) if chosen.given else "made by the run",
            "samples": chosen.samples,
            "tokens": {name: shapes.tokens for name, shapes in chosen.shapes.items()},
            "next_input": chosen.next_input,
            "flops": chosen.flops(experts),
            "cache_bytes": max(chosen.cache_nbytes(expert.name) for expert in experts),
            "cache_in_memory": chosen.in_memory,
        }

    def to_json(self) -> dict[str, Any]:
        """What `streamq plan --json` prints."""
        paths = [(f.path, f.size) for f in self.files] + [(path, len(content)) for path, content, _ in self.documents]
        one = len(self.targets) == 1
        return {
            "model": {"family": self.experts[0].expert.model.family, "experts": [p.expert.name for p in self.experts]},
            "formats": [target.name for target in self.targets],
            "device": self.device_kind,
            "files": [{"path": path, "bytes": size} for path, size in sorted(paths)],
            **({"lora": self.lora_identity} if self.loras else {}),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "layers": self.layers[self.targets[0].name] if one else self.layers,
            **({"calibration": self._calibration_json()} if self.calibration else {}),
            "warnings": list(self.warnings),
            "hash": self.hash,
        }


def check_disk(plan: Plan, freed: int = 0) -> None:
    """Raise UsageError if the disk cannot hold the output. `freed`: bytes that will be removed before."""
    place = existing_parent(plan.options.save_path)
    free, need = shutil.disk_usage(place).free + freed, plan.bytes_to_write + plan.scratch_nbytes + DISK_RESERVE
    if need > free:
        raise UsageError(
            f"--save_path {plan.options.save_path}: {need} bytes are to be written, {free} are free on its disk;"
            " make room or choose another disk"
        )


def existing_parent(path: Path) -> Path:
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    return parent


def host_fixed(kind: str, calibration: CalibPlan | None) -> int:
    """Bytes of the host's memory that are taken before the first weight."""
    staged = 0 if kind == "cpu" else 2 * STAGE_CHUNK * STAGE_CHUNKS
    return HOST_BASE[kind] + COPY_CHUNK + staged + (calibrations.DIFFUSERS_BASE if calibration else 0)
