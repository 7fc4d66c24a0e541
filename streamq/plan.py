"""The plan: everything that a run will do, from headers and a recipe alone.

What is quantized and how, in which order, into which files at which offsets, how many bytes are moved, how much memory
that takes, and a hash that says whether two plans make the same bytes. `pipeline.run` executes the plan and nothing but
the plan, so `streamq plan` cannot say anything else than `streamq quant` does. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from streamq import __version__, hub, recipe, wan
from streamq.checkpoint import TensorInfo
from streamq.device import HOST_BASE, STAGE_CHUNK, STAGE_CHUNKS, MiB, kind_of
from streamq.errors import UsageError, nearest
from streamq.options import QuantOptions
from streamq.quantized import Scheme
from streamq.savers import Format, SaveOptions, Spec, formats
from streamq.savers.shard import Place, TensorFile, layout

COPY_CHUNK = 8 * MiB  # of tensors that pass through
DEVICE_SCRATCH = 256 * MiB  # tiles of a method on an accelerator, and what its allocator rounds up
DISK_RESERVE = 16 * MiB  # journal, manifest, and the file system's own


def aligned(nbytes: int) -> int:
    """Rounded up so that whatever follows in the same buffer can have any dtype."""
    return -(-nbytes // 64) * 64


@dataclass(frozen=True, slots=True)
class Output:
    """What one target gets from one step: `scheme` None means the source's own bytes."""

    target: int
    scheme: Scheme | None
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """The smallest piece of work: a linear layer (weight and bias), or one tensor that passes through.

    `label` is what users see: the native name, after the expert's where there are two.
    """

    label: str
    sources: tuple[TensorInfo, ...]
    outputs: tuple[Output, ...]

    @property
    def quantized(self) -> bool:
        """Whether any target quantizes it; otherwise its bytes are copied in chunks."""
        return any(output.scheme for output in self.outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of its source tensors."""
        return sum(info.nbytes for info in self.sources)

    @property
    def working_nbytes(self) -> int:
        """Bytes that it takes in memory while it is worked on: its source, and the codes of each distinct scheme."""
        schemes = {output.scheme for output in self.outputs if output.scheme}
        codes = len(schemes) * math.prod(self.sources[0].shape)
        return sum(aligned(info.nbytes) for info in self.sources) + aligned(codes)


@dataclass(frozen=True)
class Unit:
    """What is committed together: a block, or everything outside blocks. `key` is unique in the plan."""

    key: str
    steps: tuple[Step, ...]


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


@dataclass(frozen=True)
class Plan:
    """See the module. `documents` are (path relative to the output folder, content, mode).

    `arena_nbytes` is the memory that all layers at work share, on the device: it bounds how much is read ahead.
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

    @property
    def units(self) -> list[Unit]:
        """Every unit of every expert, in the order of work."""
        return [unit for part in self.experts for unit in part.units]

    @property
    def bytes_to_read(self) -> int:
        """Bytes of source tensors; each is read once, whatever the number of formats."""
        return sum(step.nbytes for unit in self.units for step in unit.steps)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of every output file but the manifest."""
        return sum(f.size for f in self.files) + sum(len(content) for _, content, _ in self.documents)

    @property
    def peak_host_bytes(self) -> int:
        """Predicted peak of resident memory."""
        return _host_fixed(self.device_kind) + (self.arena_nbytes if self.device_kind == "cpu" else 0)

    @property
    def peak_device_bytes(self) -> int:
        """Predicted peak of device memory; 0 on the CPU."""
        return 0 if self.device_kind == "cpu" else self.arena_nbytes + DEVICE_SCRATCH

    @cached_property
    def hash(self) -> str:
        """sha256 of all that decides the bytes of the result."""
        options = self.options
        identity = {
            "version": __version__, "device": self.device_kind, "match": options.match, "seed": options.seed,
            "layout": options.layout, "max_shard_size": options.max_shard_size,
            "sources": self.sources, "layers": self.layers,
            "recipes": {target.name: target.recipe.document for target in self.targets},
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

    def to_json(self) -> dict[str, Any]:
        """What `streamq plan --json` prints."""
        paths = [(f.path, f.size) for f in self.files] + [(path, len(content)) for path, content, _ in self.documents]
        one = len(self.targets) == 1
        return {
            "model": {"family": self.experts[0].expert.model.family, "experts": [p.expert.name for p in self.experts]},
            "formats": [target.name for target in self.targets],
            "device": self.device_kind,
            "files": [{"path": path, "bytes": size} for path, size in sorted(paths)],
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "layers": self.layers[self.targets[0].name] if one else self.layers,
            "warnings": list(self.warnings),
            "hash": self.hash,
        }


def make_plan(options: QuantOptions, *, download: bool) -> Plan:
    """Plan a run. Reads headers and small JSON files, writes nothing. `download`: a hub id may be fetched.

    Raises UsageError for everything that would make the run fail or its result useless, as far as headers can tell.
    """
    source_path = hub.resolve(options.model_path, download=download)
    try:
        _check_paths(source_path, options.save_path)
    except OSError as error:  # a name that is too long, links in a circle
        raise UsageError(
            f"--save_path {str(options.save_path)[:200]}: {error.strerror}; give another folder"
        ) from error
    kind = kind_of(options.device)
    experts = wan.open_model(source_path)
    wan.check_model_type(options.model_type, experts)
    for expert in experts:
        _check_sources_outside(expert, options.save_path)
    targets, warnings = _targets(options)
    builder = _Builder(options, source_path, targets, warnings)
    parts = tuple(builder.expert(expert) for expert in experts)
    arena = _arena_nbytes(parts, options, kind)
    return Plan(options, source_path, kind, tuple(targets), parts, tuple(builder.files), tuple(builder.documents),
                builder.layers, arena, tuple(dict.fromkeys(builder.warnings)))  # fmt: skip


def _arena_nbytes(parts: tuple[ExpertPlan, ...], options: QuantOptions, kind: str) -> int:
    """Room for the layer at work, `read_ahead` before and as many behind it, as far as the budgets allow."""
    sizes = [step.working_nbytes for part in parts for unit in part.units for step in unit.steps if step.quantized]
    window = 2 * options.read_ahead + 1
    wanted, least = max(sum(sizes[i : i + window]) for i in range(len(sizes))), max(sizes)
    budgets = [("--max_host_memory", options.max_host_memory, _host_fixed(kind), kind == "cpu")]
    if kind != "cpu":
        budgets.append(("--max_device_memory", options.max_device_memory, DEVICE_SCRATCH, True))
    for option, budget, fixed, holds_arena in budgets:
        need = fixed + least * holds_arena
        if budget is not None and need > budget:
            raise UsageError(
                f"{option}: a budget of {budget} bytes, but the least that this run can do with is {need}"
                f" ({fixed} before the first weight, {need - fixed} for the largest layer); raise the budget"
            )
        if budget is not None and holds_arena:
            wanted = min(wanted, budget - fixed)
    return wanted


def _host_fixed(kind: str) -> int:
    return HOST_BASE[kind] + COPY_CHUNK + (0 if kind == "cpu" else 2 * STAGE_CHUNK * STAGE_CHUNKS)


def _check_paths(source: Path, save_path: Path) -> None:
    model, save = source.resolve(), save_path.resolve()
    for inner, outer, relation in ((save, model, "inside"), (model, save, "above")):
        if inner == outer:
            raise UsageError(f"--save_path {save_path}: the same as --model_path; choose a folder beside it")
        if inner.is_relative_to(outer):
            raise UsageError(
                f"--save_path {save_path}: lies {relation} --model_path {source}; choose a folder beside it"
            )
    if os.path.lexists(save_path) and not save_path.is_dir():
        kind = "a link to nowhere" if save_path.is_symlink() else "a file"
        raise UsageError(f"--save_path {save_path}: {kind}; give a folder")
    parent = _existing_parent(save_path)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"--save_path {save_path}: {parent} cannot be written to; check its permissions")


def _check_sources_outside(expert: wan.Expert, save_path: Path) -> None:
    save = save_path.resolve()
    for file in expert.model.checkpoint.files:
        if file.path.resolve().is_relative_to(save):
            raise UsageError(
                f"--save_path {save_path}: holds the source file {file.path.resolve()}; choose another folder"
            )


def _existing_parent(path: Path) -> Path:
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    return parent


def _targets(options: QuantOptions) -> tuple[list[Target], list[str]]:
    known = formats()
    for name in options.formats:
        if name not in known:
            raise UsageError(
                f"--format {name}: unknown; this version has {', '.join(known)}{nearest(name, tuple(known))}"
            )
    if options.config_path is not None and options.quant_type is not None:
        raise UsageError("--config_path and --quant_type exclude each other; give one of them")
    if options.config_path is None and options.quant_type is None:
        raise UsageError("neither --quant_type nor --config_path; say what to do, e.g. --quant_type w8a8")
    if options.config_path is not None:
        given = recipe.load_recipe(options.config_path)
        chosen = {name: given for name in options.formats or (given.format or "mindie",)}
    else:
        assert options.quant_type is not None
        chosen = {}
        for wanted in options.formats or (None,):
            found = recipe.recipe_for(options.quant_type, wanted)
            chosen[wanted or found.format or "mindie"] = found
    targets = [Target(name, known[name], found, name if len(chosen) > 1 else "") for name, found in chosen.items()]
    tools = {tool for target in targets for tool in target.format.RULES if tool}
    if options.match and options.match not in tools:
        every = ", ".join(f"{t} (format {n})" for n, f in known.items() for t in f.RULES if t)
        raise UsageError(f"--match {options.match}: not a tool whose bytes these formats can match; known: {every}")
    if options.layout != "block" and "lightx2v" not in chosen:
        raise UsageError(f"--layout {options.layout}: a setting of lightx2v, which is not written here; leave it out")
    warnings = ["--trust_remote_code True: streamq runs no code out of a checkpoint"] * options.trust_remote_code
    if options.max_device_memory is not None and kind_of(options.device) == "cpu":
        warnings.append("--max_device_memory: ignored, the device is the cpu; its memory is --max_host_memory")
    return targets, warnings


class _Builder:
    """Grows the parts of a plan that are shared by experts and targets: numbered files, documents, layers, warnings."""

    def __init__(self, options: QuantOptions, source_path: Path, targets: list[Target], warnings: list[str]) -> None:
        self.options = options
        self.source_path = source_path
        self.targets = targets
        self.warnings = warnings
        self.files: list[TensorFile] = []
        self.documents: list[tuple[str, bytes, int]] = []
        self.layers: dict[str, dict[str, str]] = {target.name: {} for target in targets}

    def expert(self, expert: wan.Expert) -> ExpertPlan:
        model = expert.model
        self.warnings.extend(model.warnings)
        by_target = [self.target(target, expert) for target in self.targets]
        prefix = f"{expert.name}/" if expert.name else ""
        steps: dict[str, list[Step]] = {}
        for name, sources in _pieces(model).items():
            outputs = tuple(
                Output(number, schemes.get(name), tuple(places[spec] for spec in specs[name]))
                for number, (schemes, specs, places) in enumerate(by_target)
            )
            steps.setdefault(wan.unit_of(name), []).append(Step(prefix + wan.to_native(name), sources, outputs))
        return ExpertPlan(expert, tuple(Unit(prefix + unit, tuple(found)) for unit, found in steps.items()))

    def target(
        self, target: Target, expert: wan.Expert
    ) -> tuple[dict[str, Scheme], dict[str, list[str]], dict[str, Place]]:
        """Schemes by layer, written names by piece, and the place of each written name, for one format and expert."""
        model, form = expert.model, target.format
        pairs, warnings = recipe.resolve(target.recipe, [linear.native for linear in model.linears])
        linears = {linear.name: linear for linear in model.linears}
        schemes = {n: self.scheme(target, pair) for n, linear in linears.items() if (pair := pairs[linear.native])}
        types = {linear.native: schemes[n].type if n in schemes else None for n, linear in linears.items()}
        save = SaveOptions(self.options.layout, self.options.max_shard_size or target.recipe.part_file_size * (1 << 30))
        self.warnings.extend([*warnings, *form.check(types, save)])
        written: dict[str, list[Spec]] = {}
        for name, sources in _pieces(model).items():
            if name in schemes:
                written[name] = form.quantized_specs(linears[name], schemes[name])
            else:
                unit = wan.unit_of(name)
                written[name] = [form.passed_spec(model.native_name(s), s.dtype, s.shape, unit) for s in sources]
        files = form.files([spec for specs in written.values() for spec in specs], types, save)
        folder = "/".join(part for part in (target.folder, expert.name) if part)
        places = self.place(files, folder, form.MODE)
        beside = [self.source_path, model.checkpoint.root] if self.source_path.is_dir() else []
        for document in form.documents(model, files, types, save, beside):
            self.documents.append((f"{folder}/{document.name}".lstrip("/"), document.content, form.MODE))
        label = f"{expert.name}/" if expert.name else ""
        self.layers[target.name] |= {label + name: kind or "float" for name, kind in types.items()}
        return schemes, {name: [spec.name for spec in specs] for name, specs in written.items()}, places

    def scheme(self, target: Target, pair: recipe.Pair) -> Scheme:
        assert pair.type is not None
        if pair.type not in target.format.TYPES:
            others = [name for name, form in formats().items() if pair.type in form.TYPES]
            instead = f"it is written for {', '.join(others)}" if others else "no format of this version has it"
            raise UsageError(
                f"type {pair.type} does not go into the format {target.name}: {instead};"
                f" {target.name} has {', '.join(target.format.TYPES)}"
            )
        rule = target.format.RULES.get(self.options.match) or target.format.RULES[None]
        convert = target.recipe.model_config.get("convert_model_dtype")
        if rule.arithmetic == "source" and self.options.match == "msmodelslim" and convert:
            rule = replace(rule, arithmetic="bf16")  # the tool to be matched would load the model so
        return Scheme(pair.type, pair, rule)

    def place(self, files: list[tuple[str, list[Spec]]], folder: str, mode: int) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for name, specs in files:
            file, found = layout(f"{folder}/{name}".lstrip("/"), len(self.files), specs, mode)
            self.files.append(file)
            for place in found:
                if place.name in places:
                    raise UsageError(f"{place.name}: two source tensors would be written under this name")
                places[place.name] = place
        return places


def _pieces(model: wan.Model) -> dict[str, tuple[TensorInfo, ...]]:
    """Step name -> its tensors, in model order: linear layers whole, everything else one by one."""
    linears = {linear.name: linear for linear in model.linears}
    pieces: dict[str, tuple[TensorInfo, ...]] = {}
    for name, info in model.tensors.items():
        layer = name.rpartition(".")[0]
        if layer in linears and name == f"{layer}.weight":
            bias = linears[layer].bias
            pieces[layer] = (info,) if bias is None else (info, bias)
        elif not (layer in linears and name == f"{layer}.bias"):
            pieces[name] = (info,)
    return pieces


def check_disk(plan: Plan, freed: int = 0) -> None:
    """Raise UsageError if the disk cannot hold the output. `freed`: bytes that will be removed before."""
    place = _existing_parent(plan.options.save_path)
    free, need = shutil.disk_usage(place).free + freed, plan.bytes_to_write + DISK_RESERVE
    if need > free:
        raise UsageError(
            f"--save_path {plan.options.save_path}: {need} bytes are to be written, {free} are free on its disk;"
            " make room or choose another disk"
        )
