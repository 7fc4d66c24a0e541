"""The loop. Start here: this is all that `streamq quant` does, in order; everything else is called from it.

    disk -> source -> [read ahead] -> device -> method -> format -> [write behind] -> file -> sync -> journal

A step is one linear layer, or one tensor that passes through; a unit is a block's steps, and is what is committed.
The layers in memory share `plan.arena_nbytes`, so the number of blocks does not matter. At `read_ahead` 0 everything
happens in this thread; above, one thread reads that many steps ahead and one writes as many behind. The bytes are the
same: steps are read, worked on and written in the plan's order at every depth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

from streamq import journal as journals
from streamq.checkpoint import Source, TensorInfo
from streamq.device import Device
from streamq.device.cpu import host_bytes
from streamq.errors import RunError
from streamq.journal import Commit, Journal
from streamq.methods import METHODS
from streamq.methods.int8 import DTYPES
from streamq.plan import COPY_CHUNK, ExpertPlan, Plan, Step, Unit, aligned
from streamq.quantized import QuantizedLinear, Scheme
from streamq.savers.shard import Place, ShardWriter, write_whole
from streamq.stages import Arena, Lane, Watcher

Loaded = tuple[Step, torch.Tensor | None, Future[Any]]


def run(plan: Plan, device: Device, watcher: Watcher) -> dict[str, Any] | None:
    """Execute a plan, from the start or from where an earlier run of it stopped. Returns the manifest.

    None means that this very plan is finished already, and its files are intact.
    Raises UsageError before anything is written, RunError when the work fails; what is committed is kept either way.
    """
    journal = journals.open_journal(plan)
    if journal is None:
        return None
    with closing(journal), ExitStack() as files:
        writers = [files.enter_context(closing(writer)) for writer in journals.open_files(plan, journal)]
        done = {commit.unit for commit in journal.commits}
        watcher.started(plan, done)
        for part in plan.experts:
            todo = [unit for unit in part.units if unit.key not in done]
            if todo:
                source, hasher = Source(part.expert.model.checkpoint), Lane(plan.options.read_ahead, "hasher")
                with closing(source), closing(hasher):
                    _run_units(_Work(plan, part, device, source, writers, journal, watcher, hasher), todo)
        hashes = {writer.file.path: writer.publish() for writer in writers}
        for path, content, mode in plan.documents:
            hashes[path] = write_whole(plan.options.save_path / path, content, mode)
        manifest = journals.write_manifest(plan, journal.commits, hashes)
        journal.remove()
    return manifest


@dataclass
class _Work:
    """What the stages of one expert's run share."""

    plan: Plan
    part: ExpertPlan
    device: Device
    source: Source
    writers: list[ShardWriter]
    journal: Journal
    watcher: Watcher
    hasher: Lane


def _run_units(work: _Work, units: list[Unit]) -> None:
    plan, device = work.plan, work.device
    arena = Arena(device, plan.arena_nbytes)
    chunk = torch.empty(COPY_CHUNK, dtype=torch.uint8)
    depth = plan.options.read_ahead
    with closing(Lane(depth, "reader")) as reader, closing(Lane(depth, "writer")) as writer:
        loaded = _read_ahead([step for unit in units for step in unit.steps], work, arena, reader, writer)
        for unit in units:
            commit = Commit(unit.key)
            for step, memory, token in islice(loaded, len(unit.steps)):
                if memory is None:
                    writer.submit(_copy, step, work, commit, chunk)
                else:
                    device.wait(token.result())
                    tensors = _quantize(step, memory, work, commit)
                    writer.submit(_write, tensors, device.mark(), work, commit, arena)
            writer.submit(_commit, unit, work, commit)
        writer.drain()


def _read_ahead(steps: list[Step], work: _Work, arena: Arena, reader: Lane, writer: Lane) -> Iterator[Loaded]:
    """Steps with their bytes on the way to the device. A step that passes through is read when it is written."""
    begun: deque[Loaded] = deque()
    for step in steps:
        memory = None
        while step.quantized and (memory := arena.take(step.working_nbytes)) is None:
            if begun:
                yield begun.popleft()
            else:
                writer.drain()
        begun.append((step, memory, reader.start(_load, step, memory, work)))
        if len(begun) > reader.depth:
            yield begun.popleft()
    yield from begun


def _load(step: Step, memory: torch.Tensor | None, work: _Work) -> Any:
    token = None
    for info, part in zip(step.sources, _parts(step, memory) if memory is not None else (), strict=False):
        token = work.device.load(partial(work.source.read, info), part)
        work.source.drop(info)
    return token


def _parts(step: Step, memory: torch.Tensor) -> list[torch.Tensor]:
    """A step's region of the arena: the bytes of each source tensor, and the rest, for codes."""
    sizes = [aligned(info.nbytes) for info in step.sources]
    parts = memory.split([*sizes, memory.numel() - sum(sizes)])
    return [part[: info.nbytes] for part, info in zip(parts, step.sources, strict=False)] + [parts[-1]]


def _quantize(step: Step, memory: torch.Tensor, work: _Work, commit: Commit) -> list[tuple[Place, torch.Tensor]]:
    """Every target's tensors of one layer. Targets with equal schemes share the work."""
    *parts, room = _parts(step, memory)
    tensors = [p.view(DTYPES[i.dtype]).view(i.shape) for p, i in zip(parts, step.sources, strict=True)]
    weight, bias = tensors[0], tensors[1] if len(tensors) > 1 else None
    made: dict[Scheme, QuantizedLinear] = {}
    found: list[tuple[Place, torch.Tensor]] = []
    for output in step.outputs:
        if output.scheme is None:
            found += zip(output.places, tensors, strict=True)
            continue
        target = work.plan.targets[output.target]
        if output.scheme not in made:
            codes, room = room[: weight.numel()].view(torch.int8).view(weight.shape), room[weight.numel() :]
            made[output.scheme] = layer = METHODS[output.scheme.type](weight, bias, output.scheme, out=codes)
            for info, values in zip(step.sources, (layer.scales, bias), strict=False):
                if values is not None and not torch.isfinite(values).all():
                    raise _damaged(info, work)
        layer = made[output.scheme]
        commit.layers.setdefault(target.name, {})[step.label] = float(f"{layer.rel_error:.6g}")
        found += zip(output.places, [t.contiguous() for t in target.format.encode(layer)], strict=True)
    return found


def _damaged(info: TensorInfo, work: _Work) -> RunError:
    where, advice = work.source.checkpoint.where(info), "download it again, then run the same command with --no_resume"
    return RunError(f"{where}: NaN or Inf in it; the source is damaged: {advice}")


def _write(tensors: list[tuple[Place, torch.Tensor]], token: Any, work: _Work, commit: Commit, arena: Arena) -> None:
    for place, tensor in tensors:
        writer = work.writers[place.file]
        writer.begin(place)
        for view in work.device.store(tensor, token):
            writer.append(view, work.hasher.start)
        commit.tensors.setdefault(writer.file.path, {})[place.name] = writer.end()
    arena.give_back()


def _copy(step: Step, work: _Work, commit: Commit, chunk: torch.Tensor) -> None:
    """Pass a step's tensors through, in chunks of host memory: each is read once and goes to every target."""
    for number, info in enumerate(step.sources):
        places = [output.places[number] for output in step.outputs]
        for place in places:
            work.writers[place.file].begin(place)
        for start in range(0, info.nbytes, COPY_CHUNK):
            part = chunk[: min(COPY_CHUNK, info.nbytes - start)]
            work.source.read(info, start, host_bytes(part))
            values = part.view(DTYPES[info.dtype])
            if not (torch.isfinite(values.amax()) and torch.isfinite(values.amin())):  # both hand a NaN on
                raise _damaged(info, work)
            for place in places:
                work.writers[place.file].append(host_bytes(part), work.hasher.start)
        for place in places:
            writer = work.writers[place.file]
            commit.tensors.setdefault(writer.file.path, {})[place.name] = writer.end()
        work.source.drop(info)


def _commit(unit: Unit, work: _Work, commit: Commit) -> None:
    """Bytes to the disk, then the journal's line: a power cut must not leave a line without its bytes."""
    for number in {place.file for step in unit.steps for output in step.outputs for place in output.places}:
        work.writers[number].sync()
    work.source.check_unchanged()
    work.journal.append(commit)
    work.watcher.committed(unit, commit)
