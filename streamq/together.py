"""How processes divide a run: samples and layers to each, one journal, the bytes that one process would write.

Each sends its share of the calibration samples through every block; what is seen of them is put together in the order
of the samples, so that the sums are those of one process. Each quantizes its share of a block's layers and writes them
where the plan has their places, into files that all have open; the first one commits when everybody's bytes are on the
disk. So a commit is a whole block, and a run goes on with any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamq import journal as journals
from streamq.errors import UsageError
from streamq.journal import JOURNAL, Commit, Journal
from streamq.plan import Plan, Step, Unit
from streamq.ranks import Ranks
from streamq.savers.shard import ShardWriter


def begin(plan: Plan, ranks: Ranks) -> tuple[Journal, list[ShardWriter]] | None:
    """The journal and every output file, taken over by the first process, open for all. None: finished already.

    Raises UsageError, also for processes that have not made the same plan or do not share the folder.
    """
    if len(set(ranks.gather(f"{plan.hash} {journals.source_times(plan)}"))) > 1:
        raise UsageError("the processes of this run have different options or sources; start all with the same command")
    opened: list[tuple[Journal, list[ShardWriter]]] = []

    def take_over() -> list[Commit] | None:
        journal = journals.open_journal(plan)
        if journal is None:
            return None
        try:
            opened.append((journal, journals.open_files(plan, journal, shared=ranks.count > 1)))
        except BaseException:
            journal.close()
            raise
        return journal.commits

    commits = ranks.by_first(take_over)
    if commits is None or ranks.first:
        return opened[0] if opened else None
    folder = plan.options.save_path
    if not (folder / JOURNAL).is_file():
        raise UsageError(
            f"--save_path {folder}: process {ranks.number} does not see what the first one has begun there; give a"
            " folder that all machines share"
        )
    return Journal(folder / JOURNAL, -1, commits), [ShardWriter(folder, file, shared=True) for file in plan.files]


SEARCH = 16  # times the work of plain rounding that a method takes which looks at inputs, roughly


@dataclass(frozen=True)
class Share:
    """What a process does of a unit: the steps that it reads; of each, whether it makes, and whether it writes it."""

    unit: Unit
    steps: list[Step]
    made: list[bool]
    own: list[bool]


def share(unit: Unit, plan: Plan, ranks: Ranks) -> Share:
    """This process's share: of a block that inputs go through every step is read, of others its own.

    Steps that need one smoothing vector stay together, so that nobody looks for it twice. The most work first, each to
    whom has the least. Where a block's quantized layers are what makes the next one's inputs, everybody makes all.
    """
    loads, mine = [0] * ranks.count, set()
    works = {part: sum(_work(unit.steps[number]) for number in part) for part in _parts(unit)}
    for part in sorted(works, key=lambda part: -works[part]):
        least = loads.index(min(loads))
        loads[least] += works[part]
        if least == ranks.number:
            mine |= set(part)
    read = [number for number in range(len(unit.steps)) if number in mine or unit.replayed]
    everything = plan.calibration is not None and plan.calibration.next_input == "quantized"
    steps, own = [unit.steps[number] for number in read], [number in mine for number in read]
    return Share(unit, steps, [everything or mine_too for mine_too in own], own)


def _parts(unit: Unit) -> list[tuple[int, ...]]:
    """Numbers of steps that stay together: those that one vector links, its own layers and the ones that it divides."""
    parts: list[tuple[set[str], list[int]]] = []
    for number, step in enumerate(unit.steps):
        vectors = [output.smooth for output in step.outputs]
        vectors += [v for output in step.outputs if output.scheme for v in (output.scheme.smooth, output.scheme.rows)]
        needed, numbers = {vector.group for vector in vectors if vector is not None}, [number]
        for found in [part for part in parts if part[0] & needed]:
            parts.remove(found)
            needed, numbers = needed | found[0], found[1] + numbers
        parts.append((needed, numbers))
    return [tuple(numbers) for _, numbers in parts]


def _work(step: Step) -> int:
    """In bytes of a layer that is rounded once."""
    searched = any(scheme.needs_data for scheme in step.schemes)
    return step.nbytes * (SEARCH if searched else 1) if step.schemes else step.nbytes // 4


def gather_commit(unit: Unit, plan: Plan, commit: Commit, ranks: Ranks) -> Commit:
    """What all processes have done of a unit, as one process would have noted it. Waits for all."""
    if ranks.count == 1:
        return commit
    parts = ranks.gather(commit)
    whole = Commit(unit.key, synthetic=commit.synthetic)
    for step in unit.steps:
        for place in (place for output in step.outputs for place in output.places):
            path = plan.files[place.file].path
            digest = next(part.tensors[path][place.name] for part in parts if place.name in part.tensors.get(path, {}))
            whole.tensors.setdefault(path, {})[place.name] = digest
    for number, target in enumerate(plan.targets):
        layers = {label: one for part in parts for label, one in part.layers.get(target.name, {}).items()}
        if layers:
            whole.layers[target.name] = {step.label: layers[step.label] for step in unit.steps if step.label in layers}
        vectors = {group: one for part in parts for group, one in part.vectors.get(target.name, {}).items()}
        schemes = [output.scheme for step in unit.steps for output in step.outputs if output.target == number]
        order = [scheme.smooth.group for scheme in schemes if scheme and scheme.smooth]
        if vectors:
            groups = sorted(vectors, key=lambda group: order.index(group.rpartition("/")[2]))
            whole.vectors[target.name] = {group: vectors[group] for group in groups}
    for stream, (name, sums) in commit.streams.items():
        of_samples = [parts[sample % ranks.count].streams[stream][1][sample] for sample in range(len(sums))]
        whole.streams[stream] = [name, of_samples]
    return whole


def publish(writers: Sequence[ShardWriter], ranks: Ranks) -> dict[str, str]:
    """Give every file its final name; path -> sha256, for which files that several wrote are read again."""
    if ranks.count == 1:
        return {writer.file.path: writer.publish() for writer in writers}
    mine = {writer.file.path: writer.digest() for writer in writers[ranks.number :: ranks.count]}
    found = {path: digest for part in ranks.gather(mine) for path, digest in part.items()}
    ranks.by_first(lambda: [writer.publish(found[writer.file.path]) for writer in writers])
    return found
