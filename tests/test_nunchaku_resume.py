"""Runs in the nunchaku format that are killed, interrupted or cut off, and started again: the same bytes.

STREAMQ_KILLS=200 tries every call, STREAMQ_SEED=1 others than the default few.
"""

from __future__ import annotations

import errno
import random
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from calib_kit import CACHE, STREAM, CalibWork, Kit, calib_argv, least_memory, replays, stop, sweep, unsound
from calib_kit import kit as kit  # the fixture
from faults import JOURNAL, MANIFEST, Fault, differences, fresh, snapshot, stamps
from nunchaku_runs import SEARCH, Step, source, step, svdquant, write_recipe
from resume_kit import KILLED, KILLS, SEED, THOROUGH, finish, report, was_killed

FEW = ["*self_attn.q", "*cross_attn.v", "*ffn.0"]
ONE_ROUND = {"rounds": 1}
# Model, how it is written, steps, options, calibration.
WORKS: dict[str, tuple[str, dict[str, Any], list[Step], tuple[object, ...], dict[str, Any]]] = {
    "w4a4": ("t2v-1.3B", {"blocks": 3}, svdquant("w4a4", ext=ONE_ROUND, include=FEW), ("--read_ahead", 0), {}),
    "w4a16": (
        "t2v-1.3B", {"dtype": "bf16"}, [step("w4a16", "gptq", ext={"scales": "minmax"}, include=FEW)], (),
        {"next_input": "quantized"},
    ),
    "gptq": (
        "vace-1.3B", {"blocks": 1}, svdquant("w4a4_nvfp4", ext=ONE_ROUND | {"gptq": True}, include=FEW), (),
        {"next_input": "quantized"},
    ),
    "experts": (
        "t2v-A14B", {"blocks": 1, "layout": "diffusers"},
        [SEARCH, step("w4a4", "svdquant", ext=ONE_ROUND, include=FEW[1:2])], ("--max_shard_size", "400KB"), {},
    ),
    "plain": ("t2v-A14B", {"blocks": 1}, [step("w4a4_nvfp4")], ("--max_shard_size", "300KB"), {}),
}  # fmt: skip
Works = Callable[[str], CalibWork]


@pytest.fixture(scope="module")
def works(kit: Kit) -> Works:
    """`works("w4a4")`: run once, without a fault."""
    known: dict[str, CalibWork] = {}

    def work(name: str) -> CalibWork:
        if name not in known:
            family, how, process, options, calibration = WORKS[name]
            model = source(kit.folder / "nunchaku" / name, family, **how)
            recipe = write_recipe(kit.folder / "nunchaku" / f"{name}.yaml", process, **calibration)
            given = ("--config_path", str(recipe), *map(str, options))
            out = fresh(kit.folder / "nunchaku" / "out")
            ended = kit.runs(calib_argv(model, out, *given))
            assert ended.status == 0, ended.err
            assert not (out / CACHE).exists() and not (out / JOURNAL).exists()
            known[name] = CalibWork(model, given, snapshot(out), tuple(ended.calls), 0.0)
            shutil.rmtree(out)
        return known[name]

    return work


def commits(work: CalibWork) -> list[int]:
    """The calls by which a unit counts; the journal's first line is no unit."""
    return [n for n, call in enumerate(work.calls, 1) if call == f"fsync {JOURNAL}"][1:]


def some(numbers: Iterable[int], count: int, *purpose: object) -> list[int]:
    """`count` of them, or all where the tests are to be thorough."""
    every = sorted(set(numbers))
    if THOROUGH or len(every) <= count:
        return every
    return sorted(random.Random(repr((SEED, *purpose))).sample(every, count))


def durable(work: CalibWork) -> list[int]:
    """Calls that change what is on the disk, or make it last, but for weights' bytes, of which there are many."""
    names = ("fdatasync", "fsync", "replace", "write", "write_bytes", "unlink", "rmdir", "posix_fallocate", "fchmod")
    streams = [n for n in work.numbers("pwrite") if STREAM in work.calls[n - 1]]
    return sorted([*work.numbers(*names), *streams])


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKS)
def test_killed(kit: Kit, works: Works, tmp_path: Path, name: str) -> None:
    """Before and behind the commit of every unit, before some replays and other calls, halfway through some writes."""
    work = works(name)
    assert any("diffusion_pytorch_model" in call for call in work.calls)
    before = {n + i for n in commits(work) for i in (0, 1) if i == 0 or name == "w4a4"}
    for names in (["replay"], ["pwrite"], ["fdatasync", "fsync"], ["replace", "unlink", "rmdir", "fchmod"]):
        before |= set(some(work.numbers(*names), 1, name, *names))
    halves = some(work.numbers("write", "write_bytes", "pwrite"), 2, name, "halves")
    faults = [Fault("before", n) for n in sorted(before)] + [Fault("half", n) for n in halves]
    problems = sweep(kit, work, tmp_path, [*faults, Fault("after", len(work.calls))], was_killed)
    assert not problems, report(problems)


@pytest.mark.parametrize("name", ["w4a4", pytest.param("gptq", marks=pytest.mark.slow)])
def test_resumed_with_other_settings(kit: Kit, works: Works, tmp_path: Path, name: str) -> None:
    """Streams in memory at first and from the disk later, at another depth."""
    work = works(name)
    least = least_memory(kit, work, tmp_path / "none")
    faults = [Fault("before", n + 1) for n in some(commits(work), 1, name, "other")]
    more = ("--read_ahead", 3, "--max_host_memory", least)
    problems = sweep(kit, work, tmp_path, faults, was_killed, *more)
    assert not problems, report(problems)


@pytest.mark.parametrize(("name", "number"), [("w4a4", signal.SIGINT), ("w4a16", signal.SIGTERM)])
def test_interrupted(kit: Kit, works: Works, tmp_path: Path, name: str, number: signal.Signals) -> None:
    work = works(name)
    numbers = [n for n in durable(work) if n < commits(work)[-1]]
    faults = [Fault("signal", n, code=number) for n in some(numbers, 3, name, number)]
    problems = sweep(kit, work, tmp_path, faults, lambda fault, ended: ended.complaint(130))
    assert not problems, report(problems)


@pytest.mark.parametrize("name", ["w4a16", "experts"])
def test_power_cut(kit: Kit, works: Works, tmp_path: Path, name: str) -> None:
    work = works(name)
    numbers = some(durable(work), 3, name, "power")
    faults = [Fault(act, n, target="lenient") for act, n in zip(["power", "power_kept"] * len(numbers), numbers)]  # noqa: B905
    problems = sweep(kit, work, tmp_path, faults, was_killed)
    assert not problems, report(problems)


@pytest.mark.parametrize("name", ["w4a4", "plain"])
def test_disk_full(kit: Kit, works: Works, tmp_path: Path, name: str) -> None:
    work = works(name)
    numbers = some(work.numbers("posix_fallocate", "pwrite", "fdatasync"), 3, name, "full")
    faults = [Fault("error", n, code=errno.ENOSPC, forever=True) for n in numbers]
    problems = sweep(kit, work, tmp_path, faults, lambda fault, ended: ended.complaint(1))
    assert not problems, report(problems)


def test_killed_again_while_it_resumes(kit: Kit, works: Works, tmp_path: Path) -> None:
    work = works("gptq")

    def one(number: int) -> list[str]:
        chance = random.Random(f"{SEED} nunchaku {number}")
        out, problems = fresh(tmp_path / str(number) / "out"), []
        for _ in range(3):
            fault = Fault(chance.choice(["before", "power"]), chance.randrange(1, len(work.calls)), target="lenient")
            ended = kit.runs(work.argv(out), fault)
            problems += [] if ended.status in (0, KILLED) else [f"exit {ended.status}: {ended.err[-300:]}"]
            problems.append(unsound(out, work.result))
        return [*problems, finish(kit.runs, work, out)]

    found = [problem for some in kit.runs.each(one, range(max(2, KILLS // 8))) for problem in some if problem]
    assert not found, report(found)


@pytest.mark.parametrize("name", ["w4a4", "w4a16", "experts"])
def test_what_is_done_is_not_done_again(kit: Kit, works: Works, tmp_path: Path, name: str) -> None:
    """A resumed run replays what came behind the last commit, and nothing else; a third run finds all of it done."""
    work, out = works(name), tmp_path / "out"
    at = commits(work)
    for count in some(range(1, len(at)), 2, name, "done"):
        stop(kit, work, out, commits=count)
        ended = kit.runs(work.argv(out))
        assert ended.status == 0 and "resuming: " in ended.err, ended.err
        assert replays(ended.calls) == replays(work.calls[at[count - 1] :]), count
        assert not differences(out, work.result)
    before = snapshot(out), stamps(out)
    ended = kit.runs(work.argv(out))
    assert ended.status == 0 and "already done" in ended.out and not ended.calls, ended.err
    assert (snapshot(out), stamps(out)) == before and MANIFEST in before[0]


CHANGES: dict[str, Callable[[list[Step]], list[Step]]] = {
    "rank": lambda process: _with(process, rank=32),
    "gptq": lambda process: _with(process, gptq=True),
    "alpha": lambda process: [dict(process[0]) | {"alpha": 0.6}, *process[1:]],
}


def _with(process: list[Step], **ext: Any) -> list[Step]:
    weight = process[-1]["qconfig"]["weight"]
    weight = weight | {"ext": weight["ext"] | ext}
    return [*process[:-1], dict(process[-1]) | {"qconfig": process[-1]["qconfig"] | {"weight": weight}}]


def test_settings_that_decide_the_bytes(kit: Kit, works: Works, tmp_path: Path) -> None:
    """Another plan: refused where one is unfinished, and other weights elsewhere; lest the above compare constants."""
    work, out = works("w4a4"), tmp_path / "out"
    stop(kit, work, out, commits=1)
    before = snapshot(out), stamps(out)
    for name, change in CHANGES.items():
        recipe = write_recipe(tmp_path / f"{name}.yaml", change(WORKS["w4a4"][2]))
        ended = kit.runs(work.argv(out, "--config_path", recipe))
        assert not ended.complaint(2) and "another plan" in ended.errors[0], (name, ended.err)
        assert (snapshot(out), stamps(out)) == before, name
        assert "diffusion_pytorch_model" in finish(kit.runs, work, tmp_path / name, "--config_path", recipe), name
    for more in (["--max_shard_size", "1MB"], ["--layout", "single"], ["--seed", 1]):
        ended = kit.runs(work.argv(out, *more))
        assert not ended.complaint(2) and "another plan" in ended.errors[0], (more, ended.err)
    assert (snapshot(out), stamps(out)) == before
