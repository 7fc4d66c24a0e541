"""Stop a calibrated run anywhere, in any way, start it again: the same bytes, and no block is replayed twice.

STREAMQ_KILLS=200 tries every point and every case, STREAMQ_SEED=1 other ones.
"""

from __future__ import annotations

import errno
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from calib_kit import CACHE, STREAM, CalibWork, Kit, least_memory, replays, stop, sweep, unsound, watched
from calib_kit import kit as kit  # the fixture
from faults import JOURNAL, MANIFEST, Ended, Fault, differences, fresh, snapshot, stamps
from resume_kit import KILLED, KILLS, SEED, THOROUGH, finish, report, some, thinned, was_killed

from streamq.options import QuantOptions
from streamq.planner import make_plan

pytestmark = pytest.mark.xdist_group("calibrated")  # one process makes the servers

CASES = [("vace", "gptq"), ("pair", "smooth"), ("ti2v", "smooth_all")]
if THOROUGH:
    CASES = [(m, r) for m in ("t2v", "vace", "ti2v", "pair") for r in ("smooth", "smooth_all", "static", "gptq")]
named = pytest.mark.parametrize(("model", "recipe"), CASES)


def about_cache(work: CalibWork) -> list[int]:
    """The calls that have to do with streams, set and journal, and the first weights' write behind each."""
    near = [n for n, call in enumerate(work.calls, 1) if CACHE in call or JOURNAL in call or call.startswith("replay")]
    return sorted({n for number in near for n in (number, number + 1) if n <= len(work.calls)})


def drawn(numbers: list[int], count: int, *purpose: object) -> list[int]:
    """Some of them, or all where the tests are to be thorough."""
    if THOROUGH or len(numbers) <= count:
        return numbers
    return sorted(random.Random(repr((SEED, *purpose))).sample(numbers, count))


# 1. Killed.


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "every"])
def test_killed_at_every_call(kit: Kit, tmp_path: Path, count: int) -> None:
    work = kit.work("t2v", "static", "--read_ahead", 0)
    assert {call.split()[0] for call in work.calls} >= {"rmdir", "unlink", "replay", "posix_fallocate", "fdatasync"}
    numbers = thinned(range(1, len(work.calls) + 1), work.calls, 40)
    if not THOROUGH:  # what is published is like a data-free run's, but for the manifest behind it
        numbers = [n for n in numbers if not re.search(r"(config|description_w8a8)\.json", work.calls[n - 1])]
    streams = [number for number in work.numbers("pwrite") if STREAM in work.calls[number - 1]]
    assert len(streams) == 3  # nobody reads what the last block makes
    halves = {*streams, *(n for n in work.numbers("write", "write_bytes") if n in numbers)}
    faults = [Fault("before", n) for n in sorted({*numbers, *streams})] + [Fault("half", n) for n in sorted(halves)]
    faults = [*some(faults, count), Fault("after", len(work.calls))]
    problems = sweep(kit, work, tmp_path, faults, was_killed)
    assert not problems, report(problems)


@pytest.mark.slow
@named
def test_killed_and_resumed_with_other_settings(kit: Kit, tmp_path: Path, model: str, recipe: str) -> None:
    """Streams in memory at first and from the disk later, or the other way round, at another depth."""
    work = kit.work(model, recipe, "--read_ahead", 1)
    least = least_memory(kit, work, tmp_path / "none")
    for number, (more, other) in enumerate([([], ["--max_host_memory", least]), (["--max_host_memory", least], [])]):
        first, depth = CalibWork(work.model, (*work.options, *map(str, more)), *_facts(work)), (0, 3)[number]
        numbers = drawn(about_cache(work), 3, model, recipe, number)
        faults = [Fault("before", n) for n in numbers]
        problems = sweep(kit, first, tmp_path, faults, was_killed, "--read_ahead", depth, *other)
        assert not problems, report(problems)


def _facts(work: CalibWork) -> Any:
    return work.result, work.calls, work.seconds


def test_killed_again_while_it_resumes(kit: Kit, tmp_path: Path) -> None:
    work = kit.work("vace", "static", "--read_ahead", 1)

    def one(number: int) -> list[str]:
        rng = random.Random(f"{SEED} calibrated {number}")
        out, problems = fresh(tmp_path / str(number) / "out"), []
        for _ in range(4):
            ended = kit.runs(
                work.argv(out),
                Fault(rng.choice(["before", "power"]), rng.randrange(1, len(work.calls)), target="lenient"),
            )
            problems += [] if ended.status in (0, KILLED) else [f"exit {ended.status}: {ended.err[-300:]}"]
            problems += [problem for problem in [unsound(out, work.result)] if problem]
        return problems + [problem for problem in [finish(kit.runs, work, out)] if problem]

    problems = list(chain(*kit.runs.each(one, range(max(3, KILLS // 5)))))
    assert not problems, report(problems)


@pytest.mark.skipif(not THOROUGH, reason="three processes that import diffusers: only with STREAMQ_KILLS")
def test_killed_as_a_process(kit: Kit, tmp_path: Path) -> None:
    """`python -m streamq` with every core that there is: once to the end, once killed at its first commit."""
    work, whole, out = kit.work("three", "smooth"), tmp_path / "whole", tmp_path / "out"
    command = [sys.executable, "-m", "streamq"]
    subprocess.run([*command, *work.argv(whole)], check=True, capture_output=True)
    with subprocess.Popen([*command, *work.argv(out)], stdout=-3, stderr=-3) as process:
        while process.poll() is None and not ((out / JOURNAL).exists() and b"\n{" in (out / JOURNAL).read_bytes()):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == KILLED
    again = subprocess.run([*command, *work.argv(out)], check=True, capture_output=True, text=True)
    assert "resuming: " in again.stderr and not differences(out, snapshot(whole))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(kit: Kit, tmp_path: Path, number: signal.Signals) -> None:
    work = kit.work("vace", "gptq", "--read_ahead", 1)
    faults = [Fault("signal", n, code=number) for n in drawn(about_cache(work)[:-8], 3, number)]
    problems = sweep(kit, work, tmp_path, faults, lambda fault, ended: ended.complaint(130))
    assert not problems, report(problems)


# 2. The machine goes down.


@pytest.mark.parametrize(("model", "recipe"), [("t2v", "static"), ("vace", "gptq"), ("pair", "smooth")])
def test_power_cut(kit: Kit, tmp_path: Path, model: str, recipe: str) -> None:
    """Unsynced bytes, renames, new names and removals are lost; but not the cache's own folder, see below."""
    work = kit.work(model, recipe, "--read_ahead", 1)
    numbers = drawn(about_cache(work), 12 if model == "t2v" else 5, "power", model)
    faults = [Fault("power", n, target="lenient") for n in numbers]
    problems = sweep(kit, work, tmp_path, faults, was_killed)
    assert not problems, report(problems)


def test_power_cut_takes_a_folder_that_was_not_entered(kit: Kit, tmp_path: Path) -> None:
    """The cache's folder is new, too: once a commit counts, its name must be on the disk."""
    work = kit.work("t2v", "static", "--read_ahead", 1)
    first = [n for n, call in enumerate(work.calls, 1) if call == f"fsync {JOURNAL}"][1]
    problems = sweep(kit, work, tmp_path, [Fault("power", first + 1), Fault("power", first + 9)], was_killed)
    assert not problems, report(problems)


# 3. No block is replayed twice.


@named
def test_no_block_is_replayed_twice(kit: Kit, tmp_path: Path, model: str, recipe: str) -> None:
    work = kit.work(model, recipe, "--read_ahead", 0)
    order = list(dict.fromkeys(call.split()[1] for call in work.calls if call.startswith("replay")))
    whole, passes = replays(work.calls), 2 if recipe == "gptq" else 1
    experts = 2 if model == "pair" else 1
    last = order[-1]  # its quantized pass would make inputs for nobody
    assert whole == {unit: 3 * experts * (1 if unit == last else passes) for unit in order}
    at = list(_commits_of_blocks(work))
    for commits in drawn(list(range(1, len(at) + 1)), 3, model, recipe):
        out = stop(kit, work, tmp_path / "out", commits=commits)
        ended = kit.runs(work.argv(out))
        assert ended.status == 0, ended.err
        # What came after the commit in the whole run, and nothing else.
        left = replays(work.calls[at[commits - 1] :])
        assert replays(ended.calls) == left, commits
        assert not any("inputs" in call and not call.startswith(("open", "unlink")) for call in ended.calls)
        assert not differences(out, work.result)


def _commits_of_blocks(work: CalibWork) -> list[int]:
    return [n for n, call in enumerate(work.calls, 1) if call == f"fsync {JOURNAL}"][1:]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "recipe"), [("three", "gptq"), *CASES])
def test_at_most_two_generations(kit: Kit, tmp_path: Path, model: str, recipe: str) -> None:
    work = kit.work(model, recipe, "--read_ahead", 1)
    out = stop(kit, work, tmp_path / "out", commits=1)
    options = QuantOptions(str(work.model), tmp_path / "x", config_path=Path(work.options[1]), device="cpu")
    plan = make_plan(options, download=False)
    assert plan.calibration is not None
    most = 2 * max(plan.calibration.cache_nbytes(part.expert.name) for part in plan.experts)
    for place in (tmp_path / "new", out):
        ended = kit.runs(work.argv(place))
        seen = watched(ended)
        experts = {"high_noise_model", "low_noise_model"} if model == "pair" else {"transformer"}
        assert {name.partition("-")[0] for name in seen["most"]} == experts
        # Of two blocks only the first leaves anything behind.
        assert max(seen["most"].values()) == (2 if model == "three" else 1) and seen["nbytes"] <= most
        assert plan.scratch_nbytes >= seen["nbytes"]


# 4. What is left on the disk is damaged.


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("file", ["hidden", "control", "hint.0", "inputs.cache", "calib.cache"])
def test_damaged(kit: Kit, tmp_path: Path, file: str) -> None:
    """Refused, and nothing is destroyed: not the next generation either, which a killed run may have left."""
    work = kit.work("vace", "static", "--read_ahead", 0)
    commits = 3 if file == "hidden" else 1
    at = [n for n, call in enumerate(work.calls, 1) if call == f"write {JOURNAL}"][commits + 1]
    left = fresh(tmp_path / "left")
    assert kit.runs(work.argv(left), Fault("before", at)).status == KILLED
    names = [path.name for path in (left / CACHE).iterdir()]
    (name,) = [name for name in names if name == file or name.startswith(f"transformer-{file}-{commits - 1}.")]
    for how, damage in DAMAGE.items():
        out = Path(shutil.copytree(left, tmp_path / how))
        damage(out / CACHE / name)
        before = snapshot(out)
        ended = kit.runs(work.argv(out))
        if file == "calib.cache" and how in ("flipped", "longer"):  # a brace less is not JSON, white space more is
            assert ended.status in (0, 2)
            continue
        assert not ended.complaint(2), (how, ended.err)
        assert name in ended.errors[0] or how == "gone", ended.errors
        assert snapshot(out) == before, how
    assert not finish(kit.runs, work, out, "--no_resume")


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("hidden", "flipped"),
        ("hidden", "gone"),
        ("calib.cache", "gone"),
        *[("inputs", "flipped"), ("inputs", "gone"), ("calib", "cut")],
    ],
)
def test_what_a_refusal_advises(kit: Kit, tmp_path: Path, file: str, how: str) -> None:
    work = kit.work("t2v", "static", "--read_ahead", 0)
    out = stop(kit, work, tmp_path / "out", commits=1)
    (path,) = [path for path in (out / CACHE).iterdir() if file in path.name]
    DAMAGE[how](path)
    ended = kit.runs(work.argv(out))
    assert not ended.complaint(2) and "--no_resume" in ended.errors[0], ended.err


# 5. A disk that fails.


@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
def test_disk_full(kit: Kit, tmp_path: Path, forever: bool) -> None:
    """Wherever the cache is written to: one line, exit 1, and the same command goes on."""
    work = kit.work("vace", "gptq", "--read_ahead", 1)
    calls = [(n, call) for n, call in enumerate(work.calls, 1) if CACHE in call]
    numbers = [n for n, call in calls if call.split()[0] in ("posix_fallocate", "pwrite", "fdatasync", "fsync")]
    numbers = drawn(numbers, 6, "full", forever)
    faults = [Fault("error", n, code=errno.ENOSPC, forever=forever) for n in numbers]
    problems = sweep(kit, work, tmp_path, faults, lambda fault, ended: ended.complaint(1))
    assert not problems, report(problems)


@pytest.mark.parametrize("which", [1, 2])
def test_a_stream_cannot_be_synced(kit: Kit, tmp_path: Path, which: int) -> None:
    """VACE blocks write two streams: either's sync may fail."""
    work = kit.work("vace", "static", "--read_ahead", 1)
    numbers = [n for n, call in enumerate(work.calls, 1) if call.startswith("fdatasync") and STREAM in call]
    problems = sweep(kit, work, tmp_path, [Fault("error", numbers[which - 1], code=errno.EIO)], _told)
    assert not problems, report(problems)


@pytest.mark.parametrize(
    "call",
    ["mkdir", "unlink", "rmdir", "replace"],
)
def test_disk_error_in_the_cache_folder(kit: Kit, tmp_path: Path, call: str) -> None:
    work = kit.work("t2v", "static", "--read_ahead", 0)
    numbers = [n for n in work.numbers(call) if CACHE in work.calls[n - 1]]
    faults = [Fault("error", n, code=errno.EIO) for n in drawn(numbers, 4, call)]
    problems = sweep(kit, work, tmp_path, faults, _told)
    assert not problems, report(problems)


def _told(fault: Fault, ended: Ended) -> str:
    return ended.complaint(1) or ("" if CACHE in ended.errors[0] else f"{CACHE} is not named: {ended.errors[0]}")


# 6. The same bytes for every setting.


@pytest.mark.parametrize(("model", "recipe"), [("three", "smooth"), ("vace", "gptq"), ("pair", "static")])
def test_same_bytes_at_every_depth_and_budget(kit: Kit, tmp_path: Path, model: str, recipe: str) -> None:
    work = kit.work(model, recipe)
    least = least_memory(kit, work, tmp_path / "none")
    assert not kit.runs(work.argv(tmp_path / "none", "--max_host_memory", least - 1)).complaint(2)
    settings: list[list[object]] = [[]] + [["--read_ahead", depth] for depth in (0, 3)]
    settings += [["--read_ahead", depth, "--max_host_memory", least] for depth in (0, 1, 3)]
    settings += [["--read_ahead", 3, "--max_host_memory", least + 70_000], ["--max_host_memory", "2GiB"]]
    settings = settings if THOROUGH or model == "vace" else settings[2:5]
    problems = kit.runs.each(
        lambda s: finish(kit.runs, work, fresh(tmp_path / ("_".join(map(str, s)) or "plain")), *s), settings
    )
    assert not any(problems), dict(zip(map(str, settings), problems, strict=True))


def test_settings_that_decide_the_bytes(kit: Kit, tmp_path: Path) -> None:
    """The other way round, lest all of the above compare what does not depend on the inputs."""
    work, out = kit.work("t2v", "static"), tmp_path / "out"
    for how in ({"shift": 3.0}, {"num_samples": 4}, {"dtype": "fp32"}):
        changed = CalibWork(work.model, ("--config_path", str(kit.recipe("static", **how))), *_facts(work))
        assert "weight" in finish(kit.runs, changed, fresh(out)), how
        stop(kit, work, out, commits=1)
        before = snapshot(out), stamps(out)
        ended = kit.runs(changed.argv(out))
        assert not ended.complaint(2) and "another plan" in ended.errors[0]
        assert (snapshot(out), stamps(out)) == before


@named
def test_already_done(kit: Kit, tmp_path: Path, model: str, recipe: str) -> None:
    work, out = kit.work(model, recipe), tmp_path / "out"
    assert kit.runs(work.argv(out)).status == 0
    before = snapshot(out), stamps(out)
    for more in ([], ["--read_ahead", 0], ["--no_resume"]):
        ended = kit.runs(work.argv(out, *more))
        assert ended.status == 0 and "already done" in ended.out and not ended.calls, ended.err
    assert (snapshot(out), stamps(out)) == before
    assert MANIFEST in before[0] and not Counter(replays(ended.calls))
