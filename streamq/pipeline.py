"""The loop. Start here: this is all that `streamq quant` does, in order; everything else is called from it.

    disk -> source -> [read ahead] -> device -> [replay] -> method -> format -> [write behind] -> file -> journal

A step is one linear layer, or one tensor that passes through; a unit is a block's steps, and is what is committed.
The layers in memory share `plan.arena_nbytes`, so the number of blocks does not matter. At `read_ahead` 0 everything
happens in this thread; above, one thread reads that many steps ahead and one writes as many behind. The bytes are the
same: steps are read, worked on and written in the plan's order at every depth. Where the recipe needs data a block is
held whole, and calibration inputs go through it, before its first layer is quantized. Several processes each do their
share of every unit (`streamq.together`); one alone does all of it.
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
from streamq import together
from streamq.calibration.start import check_inputs, open_replay
from streamq.device import Device
from streamq.journal import Commit, Journal
from streamq.layers import Block
from streamq.lora import open_source
from streamq.plan import COPY_CHUNK, ExpertPlan, Plan, Step, Unit
from streamq.ranks import ALONE, Ranks
from streamq.savers.shard import Place, ShardWriter, write_whole
from streamq.stages import Arena, Lane, Team, Watcher
from streamq.steps import Loaded, Tensors, Work, begin, copy, load, merge_loras, observe

# A step, what gives its tensors (None: its source is copied), and whether they take room in the arena.
Ready = tuple[Step, Tensors | None, bool]


def run(plan: Plan, device: Device, watcher: Watcher, ranks: Ranks = ALONE) -> dict[str, Any] | None:
    """Execute a plan, from the start or from where an earlier run of it stopped. Returns the manifest.

    None means that this very plan is finished already, and its files are intact.
    Raises UsageError before anything is written, RunError when the work fails; what is committed is kept either way.
    """
    ranks.by_first(partial(check_inputs, plan, watcher))
    begun = together.begin(plan, ranks)
    if begun is None:
        return None
    journal, writers = begun
    with closing(journal), ExitStack() as files:
        for writer in writers:
            files.enter_context(closing(writer))
        done = {commit.unit for commit in journal.commits}
        watcher.started(plan, done)
        for part in plan.experts:
            todo = [unit for unit in part.units if unit.key not in done]
            if todo:
                _run_expert(plan, part, todo, device, writers, journal, watcher, ranks)
        return ranks.by_first(partial(_finish, plan, journal, together.publish(writers, ranks)))


def _finish(plan: Plan, journal: Journal, hashes: dict[str, str]) -> dict[str, Any]:
    for path, content, mode in plan.documents:
        if path in plan.cards:
            content = plan.cards[path].render(journals.figures(journal.commits))
        hashes[path] = write_whole(plan.options.save_path / path, content, mode)
    manifest = journals.write_manifest(plan, journal.commits, hashes)
    journal.remove()
    return manifest


def _run_expert(
    plan: Plan, part: ExpertPlan, todo: list[Unit], device: Device, writers: list[ShardWriter], journal: Journal,
    watcher: Watcher, ranks: Ranks,
) -> None:  # fmt: skip
    with ExitStack() as files:
        # Where there are several targets. An accelerator is one anyway, and has one ring of staging memory.
        several = len(plan.targets) if device.kind == "cpu" and plan.options.read_ahead else 1
        source, hasher = open_source(part.expert.model), Lane(plan.options.read_ahead, "hasher", several)
        files.enter_context(closing(source))
        files.enter_context(closing(hasher))
        replay = files.enter_context(open_replay(plan, part, todo, device, journal, watcher, ranks))
        arena, chunk = Arena(device, plan.arena_nbytes), torch.empty(COPY_CHUNK, dtype=torch.uint8)
        methods = files.enter_context(closing(Team(several, "method")))
        written = files.enter_context(closing(Team(several, "file")))
        _run_units(
            Work(plan, part, device, source, writers, journal, watcher, hasher, methods, written, replay, arena, chunk,
                 ranks), todo,
        )  # fmt: skip


def _run_units(work: Work, units: list[Unit]) -> None:
    depth = work.plan.options.read_ahead
    # Closed from the last to the first: the writer's jobs hand commits to the committer.
    with ExitStack() as lanes:
        committer, reader, writer = (
            lanes.enter_context(closing(Lane(depth, name))) for name in ("committer", "reader", "writer")
        )
        shares = [together.share(unit, work.plan, work.ranks) for unit in units]
        loaded = _read_ahead([step for share in shares for step in share.steps], work, reader, writer)
        for share in shares:
            unit, commit, block, steps = share.unit, Commit(share.unit.key), Block(), islice(loaded, len(share.steps))
            ready: Iterable[Ready] = (_ready(*one, work, commit, block) for one in steps)
            if unit.replayed and work.replay is not None:
                held = list(steps)  # the whole block, before anything goes through it
                writer.drain()
                committer.drain()  # the block before it, so its inputs may go
                block.seen = observe(unit, held, work, work.replay)
                ready = [_ready(*one, work, commit, block, made) for one, made in zip(held, share.made, strict=True)]
                work.replay.go_on(unit.name, block.layers)
            for (step, tensors, in_arena), own in zip(ready, share.own, strict=True):
                if not own:
                    writer.submit(_drop, work, in_arena)
                elif tensors is None:
                    writer.submit(copy, step, work, commit)
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
        begun.append((step, memory, None if memory is None else reader.start(load, step, memory, work)))
        if len(begun) > reader.depth:
            yield begun.popleft()
    yield from begun


def _ready(
    step: Step, memory: torch.Tensor | None, token: Future[Any] | None, work: Work, commit: Commit, block: Block,
    made: bool = True,
) -> Ready:  # fmt: skip
    if not made or (memory is None and step.sources):
        return step, None, memory is not None
    if memory is not None and token is not None:
        work.device.wait(token.result())
        if block.seen is None:  # otherwise it was done before the inputs went through
            merge_loras(step, memory, work)
    return step, begin(step, memory, work, commit, block), memory is not None


def _write(tensors: Tensors, token: Any, work: Work, commit: Commit, held: bool) -> None:
    files: dict[int, list[tuple[Place, torch.Tensor]]] = {}
    for place, tensor in tensors():
        files.setdefault(place.file, []).append((place, tensor))
    work.files.run([partial(_append, part, token, work, commit) for part in files.values()])
    _drop(work, held)


def _drop(work: Work, held: bool) -> None:
    if held:
        work.arena.give_back()


def _append(tensors: list[tuple[Place, torch.Tensor]], token: Any, work: Work, commit: Commit) -> None:
    for place, tensor in tensors:
        writer = work.writers[place.file]
        writer.begin(place)
        for view in work.device.store(tensor, token):
            writer.append(view, work.hasher.start)
        commit.tensors.setdefault(writer.file.path, {})[place.name] = writer.end()


def _commit(unit: Unit, work: Work, commit: Commit) -> None:
    """Bytes to the disk, then the journal's line: a power cut must not leave a line without its bytes."""
    for number in {place.file for step in unit.steps for output in step.outputs for place in output.places}:
        work.writers[number].sync()
    work.source.check_unchanged()
    cache = work.replay.cache if unit.replayed and work.replay is not None else None
    if cache is not None and work.replay is not None:
        commit.streams, commit.synthetic = cache.sync(), work.replay.synthetic
    commit = together.gather_commit(unit, work.plan, commit, work.ranks)
    work.journal.append(commit)
    if cache is not None:
        cache.committed(remove=work.ranks.first)
    work.watcher.committed(unit, commit)
