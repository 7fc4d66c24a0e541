"""What the tests of interrupted runs share: models, reference runs, and the sweep over faults."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import synthetic  # conftest.py has put benchmarks/ on the path
from faults import (
    JOURNAL,
    Ended,
    Fault,
    Runs,
    Snapshot,
    differences,
    fresh,
    snapshot,
    unsound,
)

DEFAULT_KILLS = 12
KILLS = int(os.environ.get("STREAMQ_KILLS", str(DEFAULT_KILLS)))
SEED = os.environ.get("STREAMQ_SEED", "0")
THOROUGH = KILLS > 6 * DEFAULT_KILLS
KILLED = -signal.SIGKILL
BOTH = "mindie,lightx2v"
WEIGHTS = "quant_model_weight_w8a8_dynamic.safetensors"
SOURCE = "diffusion_pytorch_model.safetensors"
_TINY = synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"], blocks=1)
_PAIR = synthetic.tiny(synthetic.FAMILIES["t2v-A14B"], blocks=1)
MODELS = {
    "small": _TINY,
    "pair": _PAIR,
    "three": replace(_TINY, blocks=3),
    "large": replace(_TINY, dim=192, ffn=384, blocks=16),
    "large_pair": replace(_PAIR, dim=192, ffn=384, blocks=8),
}


@dataclass(frozen=True)
class Work:
    """A command, and what it does when nothing comes between. `calls`: those that change the folder, in order."""

    model: Path
    options: tuple[str, ...]
    result: Snapshot
    calls: tuple[str, ...]
    seconds: float

    def argv(self, out: Path, *more: object) -> list[str]:
        """The command line; of an option given twice, the last counts."""
        return argv(self.model, out, *self.options, *more)

    def numbers(self, *names: str) -> list[int]:
        """Which calls (from 1) have one of these names."""
        return [number for number, call in enumerate(self.calls, 1) if call.split()[0] in names]


Works = Callable[..., Work]
Models = Callable[[str], Path]


def argv(model: Path, out: Path, *more: object) -> list[str]:
    fixed = ["quant", "--model_path", str(model), "--save_path", str(out), "--quant_type", "w8a8", "--device", "cpu"]
    return [*fixed, *map(str, more)]


@pytest.fixture(scope="session")
def runs(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    warm = ["quant", "--model_path", str(models("small")), "--quant_type", "w8a8", "--device", "cpu", "--format", BOTH]
    found = Runs(tmp_path_factory.mktemp("runs") / "servers", warm, width=2)
    yield found
    found.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    folder = tmp_path_factory.mktemp("models")

    def model(name: str) -> Path:
        if not (folder / name).exists():
            synthetic.write(folder / name, MODELS[name])
        return folder / name

    yield model
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def works(runs: Runs, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Works:
    """`works("small", "--format", "mindie")`, run once a session."""
    known: dict[tuple[str, ...], Work] = {}

    def work(name: str, *options: object) -> Work:
        key = (name, *map(str, options))
        if key not in known:
            out, began = tmp_path_factory.mktemp("reference") / "out", time.monotonic()
            ended = runs(argv(models(name), out, *options))
            seconds = time.monotonic() - began
            assert ended.status == 0, ended.err
            known[key] = Work(models(name), key[1:], snapshot(out), tuple(ended.calls), seconds)
            shutil.rmtree(out)
        return known[key]

    return work


@pytest.fixture
def own_model(models: Models, tmp_path: Path) -> Models:
    """A copy that the test may change. Times are kept: it is the same source."""
    return lambda name: Path(shutil.copytree(models(name), tmp_path / name))


def stop(runs: Runs, work: Work, out: Path, *, commits: int, more: Iterable[object] = ()) -> Path:
    """Kill a new run just after that many commits; returns `out`."""
    ended = runs(work.argv(fresh(out), *more), Fault("after", commits + 1, "fsync", JOURNAL))
    assert ended.status == KILLED, ended.err
    assert len((out / JOURNAL).read_bytes().splitlines()) == commits + 1
    return out


def finish(runs: Runs, work: Work, out: Path, *more: object) -> str:
    """Run to the end and remove the folder; what is wrong with the result, if anything."""
    ended = runs(work.argv(out, *more))
    problem = differences(out, work.result) if ended.status == 0 else f"exit {ended.status}: {ended.err[-500:]}"
    shutil.rmtree(out)
    return problem


def sweep(
    runs: Runs, work: Work, tmp: Path, faults: Iterable[Fault], judge: Callable[[Fault, Ended], str]
) -> list[str]:
    """For every fault: a new run that meets it, a look at the folder, the same command again. Returns the problems."""

    def one(numbered: tuple[int, Fault]) -> str:
        number, fault = numbered
        out = fresh(tmp / str(number) / "out")
        ended = runs(work.argv(out), fault)
        found = [judge(fault, ended), unsound(out, work.result)]
        found.append(finish(runs, work, out))
        problems = "; ".join(problem for problem in found if problem)
        call = "" if fault.call else f" ({work.calls[fault.at - 1]})"
        return (
            f"{fault.act} at {fault.call or 'call'} {fault.at} of {len(work.calls)}{call}: {problems}"
            if problems
            else ""
        )

    return [problem for problem in runs.each(one, enumerate(faults)) if problem]


def report(problems: list[str]) -> str:
    return f"{len(problems)} problems, of which:\n" + "\n".join(problems[:12])


def was_killed(fault: Fault, ended: Ended) -> str:
    return "" if ended.status == KILLED else f"exit {ended.status} instead of being killed: {ended.err[-300:]}"


def thinned(numbers: Iterable[int], calls: tuple[str, ...], step: int) -> list[int]:
    """Of a long row of writes every `step`-th and the last before another call; everything else in full.

    Calls that change nothing by themselves are left out: to be killed before them is to be killed before the next one.
    """
    if THOROUGH:
        return list(numbers)
    kept, before = [], 0
    for number in numbers:
        name, following = calls[number - 1].split()[0], calls[min(number, len(calls) - 1)].split()[0]
        before = before + 1 if name == "pwrite" else 0
        if name not in ("open", "mkdir", "pwrite") or (name == "pwrite" and (following != name or before % step == 0)):
            kept.append(number)
    return kept


def some(faults: list[Fault], count: int) -> list[Fault]:
    return faults if THOROUGH or len(faults) <= count else random.Random(f"{SEED} some").sample(faults, count)


def published(folder: Path) -> list[str]:
    return [name for name in snapshot(folder) if name.endswith((".safetensors", ".json"))]
