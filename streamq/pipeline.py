"""The loop. Start here: this is all that `streamq quant` does, in order; everything else is called from it.

    disk -> source -> [read ahead] -> device -> method -> format -> [write behind] -> file -> sync -> journal

A step is one linear layer, or one tensor that passes through; a unit is a block's steps, and is what is committed.
At most `plan.slots` layers are in memory, so the number of blocks does not matter. At `read_ahead` 0 everything happens
in this thread; above, one thread reads that many steps ahead and one writes as many behind. The bytes are the same:
steps are read, worked on and written in the plan's order at every depth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

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


class Watcher(Protocol):
    """Whoever shows how far a run is. Called from the thread that writes."""

    def started(self, plan: Plan, done: set[str]) -> None:
        """Work begins; the units in `done` were committed by an earlier run."""

    def committed(self, unit: Unit, commit: Commit) -> None:
        """A unit's bytes are on the disk for good."""


def run(plan: Plan, device: Device, watcher: Watcher) -> dict[str, Any] | None:
    """Execute a plan, from the start or from where an earlier run of it stopped. Returns the manifest.

    None means that this very plan is finished already, and its files are intact.
    Raises UsageError before anything is written, RunError when the work fails; what is committed is kept either way.
    """
    journal = journals.open_journal(plan)
    if journal is None:
        return None
    with closing(journal):
        writers = journals.open_files(plan, journal)
        done = {commit.unit for commit in journal.commits}
        watcher.started(plan, done)
        for part in plan.experts:
            todo = [unit for unit in part.units if unit.key not in done]
            if todo:
                _run_expert(_Work(plan, part, device, Source(part.expert.model.checkpoint), writers, journal, watcher), todo)
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


class _Slot:
    """Device memory for one layer: its source bytes, and its codes under each scheme. Allocated once, used in turn."""

    def __init__(self, device: Device, plan: Plan) -> None:
        source_nbytes, codes_nbytes = plan.step_nbytes
        self.source, self.codes = device.empty(source_nbytes), device.empty(codes_nbytes)


class _Lane:
    """A thread that does jobs in order, at most `depth` of them outstanding. At depth 0 there is no thread."""

    def __init__(self, depth: int, name: str) -> None:
        self.depth = depth
        self._pool = ThreadPoolExecutor(1, name) if depth else None
        self._outstanding: deque[Future[Any]] = deque()

    def start(self, job: Callable[..., Any], *args: Any) -> Future[Any]:
        """Begin a job; its result, or its exception, is in the future."""
        if self._pool is not None:
            return self._pool.submit(job, *args)
        done: Future[Any] = Future()
        done.set_result(job(*args))
        return done

    def submit(self, job: Callable[..., Any], *args: Any) -> None:
        """Begin a job that nobody waits for, once fewer than `depth` are outstanding. Raises what an earlier one did."""
        while self._outstanding and len(self._outstanding) >= self.depth:
            self._outstanding.popleft().result()
        self._outstanding.append(self.start(job, *args))

    def drain(self) -> None:
        """Wait for every job that was submitted."""
        while self._outstanding:
            self._outstanding.popleft().result()

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _run_expert(work: _Work, units: list[Unit]) -> None:
    plan, device = work.plan, work.device
    slots = deque(_Slot(device, plan) for _ in range(plan.slots))
    chunk = torch.empty(COPY_CHUNK, dtype=torch.uint8)
    with ExitStack() as stack:
        stack.enter_context(closing(work.source))
        reader = stack.enter_context(closing(_Lane(plan.read_ahead, "reader")))
        writer = stack.enter_context(closing(_Lane(plan.read_ahead, "writer")))
        loaded = _read_ahead([step for unit in units for step in unit.steps], work, reader, slots)
        for unit in units:
            commit = Commit(unit.key)
            for step, slot, token in islice(loaded, len(unit.steps)):
                if slot is None:
                    writer.submit(_copy, step, work, commit, chunk)
                else:
                    device.wait(token.result())
                    tensors = _quantize(step, slot, work, commit)
                    writer.submit(_write, tensors, device.mark(), work, commit, slots, slot)
            writer.submit(_commit, unit, work, commit)
        writer.drain()


def _read_ahead(
    steps: list[Step], work: _Work, reader: _Lane, slots: deque[_Slot]
) -> Iterator[tuple[Step, _Slot | None, Future[Any]]]:
    """Steps with their bytes on the way to the device. A step that passes through is read when it is written."""
    begun: deque[tuple[Step, _Slot | None, Future[Any]]] = deque()
    for step in steps:
        # There is a free slot: read_ahead are begun, at most as many are being written, and one is to spare.
        slot = slots.popleft() if step.quantized else None
        begun.append((step, slot, reader.start(_load, step, slot, work)))
        if len(begun) > reader.depth:
            yield begun.popleft()
    yield from begun


def _load(step: Step, slot: _Slot | None, work: _Work) -> Any:
    token, start = None, 0
    for info in step.sources if slot is not None else ():
        assert slot is not None
        token = work.device.load(lambda at, view, i=info: work.source.read(i, at, view), slot.source[start : start + info.nbytes])
        work.source.drop(info)
        start += aligned(info.nbytes)
    return token


def _quantize(step: Step, slot: _Slot, work: _Work, commit: Commit) -> list[tuple[Place, torch.Tensor]]:
    """Every target's tensors of one layer. Targets with equal schemes share the work."""
    tensors, start = [], 0
    for info in step.sources:
        tensors.append(slot.source[start : start + info.nbytes].view(DTYPES[info.dtype]).view(info.shape))
        start += aligned(info.nbytes)
    weight, bias = tensors[0], tensors[1] if len(tensors) > 1 else None
    made: dict[Scheme, QuantizedLinear] = {}
    found: list[tuple[Place, torch.Tensor]] = []
    for output in step.outputs:
        if output.scheme is None:
            found += zip(output.places, tensors, strict=True)
            continue
        target = work.plan.targets[output.target]
        if output.scheme not in made:
            codes = slot.codes[len(made) * weight.numel() :][: weight.numel()].view(torch.int8).view(weight.shape)
            made[output.scheme] = layer = METHODS[output.scheme.type](weight, bias, output.scheme, out=codes)
            for info, values in zip(step.sources, (layer.scales, bias), strict=False):
                if values is not None and not torch.isfinite(values).all():
                    raise _damaged(info, work)
        layer = made[output.scheme]
        commit.layers.setdefault(target.name, {})[step.label] = float(f"{layer.rel_error:.6g}")
        found += zip(output.places, target.format.encode(layer), strict=True)
    return found


def _damaged(info: TensorInfo, work: _Work) -> RunError:
    where = work.part.expert.model.checkpoint.where(info)
    return RunError(f"{where}: NaN or Inf in it; the source is damaged: download it again, then run the same command")


def _write(
    tensors: list[tuple[Place, torch.Tensor]], token: Any, work: _Work, commit: Commit, slots: deque[_Slot], slot: _Slot
) -> None:
    for place, tensor in tensors:
        writer = work.writers[place.file]
        writer.begin(place)
        for view in work.device.store(tensor.contiguous(), token):
            writer.append(view)
        commit.tensors.setdefault(writer.file.path, {})[place.name] = writer.end()
    slots.append(slot)


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
            if not torch.isfinite(values.amax() - values.amin()):
                raise _damaged(info, work)
            for place in places:
                work.writers[place.file].append(host_bytes(part))
        for place in places:
            writer = work.writers[place.file]
            commit.tensors.setdefault(writer.file.path, {})[place.name] = writer.end()
        work.source.drop(info)


def _commit(unit: Unit, work: _Work, commit: Commit) -> None:
    """Bytes to the disk, then the journal's line: in this order, or a power cut could leave a line without its bytes."""
    for number in {place.file for step in unit.steps for output in step.outputs for place in output.places}:
        work.writers[number].sync()
    work.source.check_unchanged()
    work.journal.append(commit)
    work.watcher.committed(unit, commit)
