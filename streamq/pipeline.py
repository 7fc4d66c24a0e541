"""The loop. Start here: this is all that `streamq quant` does, in order; everything else is called from it.

    disk -> source -> [read ahead] -> device -> [replay] -> method -> format -> [write behind] -> file -> journal

A step is one linear layer, or one tensor that passes through; a unit is a block's steps, and is what is committed.
The layers in memory share `plan.arena_nbytes`, so the number of blocks does not matter. At `read_ahead` 0 everything
happens in this thread; above, one thread reads that many steps ahead and one writes as many behind. The bytes are the
same: steps are read, worked on and written in the plan's order at every depth. Where the recipe needs data a block is
held whole, and calibration inputs go through it, before its first layer is quantized.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from typing import Any

import torch

from streamq import journal as journals
from streamq.calibration.start import check_inputs, open_replay
from streamq.device import Device
from streamq.device.cpu import host_bytes
from streamq.dtypes import TORCH_DTYPES
from streamq.journal import Commit, Journal
from streamq.layers import Block, is_finite
from streamq.lora import open_source
from streamq.plan import COPY_CHUNK, ExpertPlan, Plan, Step, Unit
from streamq.savers.shard import Place, ShardWriter, write_whole
from streamq.stages import Arena, Lane, Team, Watcher
from streamq.steps import Loaded, Tensors, Work, begin, damaged, load, merge_loras, observe

# A step, what gives its tensors (None: its source is copied), and whether they take room in the arena.
Ready = tuple[Step, Tensors | None, bool]


def run(plan: Plan, device: Device, watcher: Watcher) -> dict[str, Any] | None:
    """Execute a plan, from the start or from where an earlier run of it stopped. Returns the manifest.

    None means that this very plan is finished already, and its files are intact.
    Raises UsageError before anything is written, RunError when the work fails; what is committed is kept either way.
    """
    check_inputs(plan, watcher)
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
                _run_expert(plan, part, todo, device, writers, journal, watcher)
        hashes = {writer.file.path: writer.publish() for writer in writers}
        for path, content, mode in plan.documents:
            if path in plan.cards:
                content = plan.cards[path].render(journals.figures(journal.commits))
            hashes[path] = write_whole(plan.options.save_path / path, content, mode)
        manifest = journals.write_manifest(plan, journal.commits, hashes)
        journal.remove()
    return manifest


def _run_expert(
    plan: Plan, part: ExpertPlan, todo: list[Unit], device: Device, writers: list[ShardWriter], journal: Journal,
    watcher: Watcher,
) -> None:  # fmt: skip
    with ExitStack() as files:
        # Where there are several targets. An accelerator is one anyway, and has one ring of staging memory.
        several = len(plan.targets) if device.kind == "cpu" and plan.options.read_ahead else 1
        source, hasher = open_source(part.expert.model), Lane(plan.options.read_ahead, "hasher", several)
        files.enter_context(closing(source))
        files.enter_context(closing(hasher))
        replay = files.enter_context(open_replay(plan, part, todo, device, journal, watcher))
        arena, chunk = Arena(device, plan.arena_nbytes), torch.empty(COPY_CHUNK, dtype=torch.uint8)
        methods = files.enter_context(closing(Team(several, "method")))
        written = files.enter_context(closing(Team(several, "file")))
        _run_units(
            Work(plan, part, device, source, writers, journal, watcher, hasher, methods, written, replay, arena, chunk),
            todo,
        )


def _run_units(work: Work, units: list[Unit]) -> None:
    depth = work.plan.options.read_ahead
    # Closed from the last to the first: the writer's jobs hand commits to the committer.
    with ExitStack() as lanes:
        committer, reader, writer = (
            lanes.enter_context(closing(Lane(depth, name))) for name in ("committer", "reader", "writer")
        )
        loaded = _read_ahead([step for unit in units for step in unit.steps], work, reader, writer)
        for unit in units:
            commit, block, steps = Commit(unit.key), Block(), islice(loaded, len(unit.steps))
            ready: Iterable[Ready] = (_ready(*one, work, commit, block) for one in steps)
            if unit.replayed and work.replay is not None:
                held = list(steps)  # the whole block, before anything goes through it
                writer.drain()
                committer.drain()  # the block before it, so its inputs may go
                block.seen = observe(unit, held, work, work.replay)
                ready = [_ready(*one, work, commit, block) for one in held]
                work.replay.go_on(unit.name, block.layers)
            for step, tensors, in_arena in ready:
                if tensors is None:
                    writer.submit(_copy, step, work, commit)
                else:
                    writer.submit(_write, tensors, work.device.mark(), work, commit, in_arena)
                del tensors  # before the next are made
            writer.submit(committer.submit, _commit, unit, work, commit)
        writer.drain()
        committer.drain()


def _read_ahead(steps: list[Step], work: Work, reader: Lane, writer: Lane) -> Iterator[Loaded]:
    """Steps with their bytes on the way to the device. A step that passes through is read when it is written."""
    begun: deque[Loaded] = deque()
    for step in steps:
        memory = None
        while step.held and (memory := work.arena.take(step.working_nbytes)) is None:
            if begun:
                yield begun.popleft()
            else:
                writer.drain()
        begun.append((step, memory, reader.start(load, step, memory, work)))
        if len(begun) > reader.depth:
            yield begun.popleft()
    yield from begun


def _ready(
    step: Step, memory: torch.Tensor | None, token: Future[Any], work: Work, commit: Commit, block: Block
) -> Ready:  # fmt: skip
    if memory is None and step.sources:
        return step, None, False
    if memory is not None:
        work.device.wait(token.result())
        if block.seen is None:  # otherwise it was done before the inputs went through
            merge_loras(step, memory, work)
    return step, begin(step, memory, work, commit, block), memory is not None


def _write(tensors: Tensors, token: Any, work: Work, commit: Commit, held: bool) -> None:
    files: dict[int, list[tuple[Place, torch.Tensor]]] = {}
    for place, tensor in tensors():
        files.setdefault(place.file, []).append((place, tensor))
    work.files.run([partial(_append, part, token, work, commit) for part in files.values()])
    if held:
        work.arena.give_back()


def _append(tensors: list[tuple[Place, torch.Tensor]], token: Any, work: Work, commit: Commit) -> None:
    for place, tensor in tensors:
        writer = work.writers[place.file]
        writer.begin(place)
        for view in work.device.store(tensor, token):
            writer.append(view, work.hasher.start)
        commit.tensors.setdefault(writer.file.path, {})[place.name] = writer.end()


def _copy(step: Step, work: Work, commit: Commit) -> None:
    """Pass a step's tensors through, in chunks of host memory: each is read once and goes to every target.

    COPY_CHUNK is a multiple of every element's size, so a chunk can be cast by itself.
    """
    for number, info in enumerate(step.sources):
        places = [output.places[number] for output in step.outputs]
        for place in places:
            work.writers[place.file].begin(place)
        for start in range(0, info.nbytes, COPY_CHUNK):
            part = work.chunk[: min(COPY_CHUNK, info.nbytes - start)]
            work.source.read(info, start, host_bytes(part))
            values = part.view(TORCH_DTYPES[info.dtype])
            if not is_finite(values):
                raise damaged(info, work)
            for place in places:
                work.writers[place.file].append(host_bytes(values.to(TORCH_DTYPES[place.dtype])), work.hasher.start)
        for place in places:
            writer = work.writers[place.file]
            commit.tensors.setdefault(writer.file.path, {})[place.name] = writer.end()
        work.source.drop(info)


def _commit(unit: Unit, work: Work, commit: Commit) -> None:
    """Bytes to the disk, then the journal's line: a power cut must not leave a line without its bytes."""
    for number in {place.file for step in unit.steps for output in step.outputs for place in output.places}:
        work.writers[number].sync()
    work.source.check_unchanged()
    if unit.replayed and work.replay is not None:
        commit.streams, commit.synthetic = work.replay.cache.sync(), work.replay.synthetic
    work.journal.append(commit)
    if unit.replayed and work.replay is not None:
        work.replay.cache.committed()
    work.watcher.committed(unit, commit)
