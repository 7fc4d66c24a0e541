"""Stop a run anywhere, in any way, start it again: the same bytes. And what a second start must not touch.

STREAMQ_KILLS=200 kills more often, STREAMQ_SEED=1 elsewhere.
"""

from __future__ import annotations

import errno
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from faults import (
    HALVED,
    JOURNAL,
    MANIFEST,
    PARTIAL,
    Ended,
    Fault,
    Runs,
    differences,
    fresh,
    snapshot,
    unsound,
)
from resume_kit import (
    BOTH,
    KILLED,
    KILLS,
    SEED,
    THOROUGH,
    WEIGHTS,
    Work,
    Works,
    finish,
    published,
    report,
    some,
    stop,
    sweep,
    thinned,
    was_killed,
)

# 1. Killed at any moment.


@pytest.mark.parametrize(
    ("model", "formats", "read_ahead"),
    [
        ("large", "mindie", 0),
        ("large", BOTH, 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("large", BOTH, 1), ("large_pair", BOTH, 1)]),
        pytest.param("large_pair", "mindie", 3, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random(runs: Runs, works: Works, tmp_path: Path, model: str, formats: str, read_ahead: int) -> None:
    work = works(model, "--format", formats, "--read_ahead", read_ahead)
    quota = -(-KILLS // (5 * runs.width))

    def track(number: int) -> int:
        rng, kills = random.Random(f"{SEED} {model} {formats} {read_ahead} {number}"), 0
        while kills < quota:
            out = fresh(tmp_path / str(number) / "out")
            while True:
                started = runs.start(work.argv(out))
                time.sleep(rng.uniform(0, 1.2 * work.seconds))
                started.send(signal.SIGKILL)
                ended = started.wait()
                if ended.status != KILLED:
                    break
                kills += 1
                assert not unsound(out, work.result)
            assert ended.status == 0, ended.err
            assert not differences(out, work.result)
            shutil.rmtree(out)
        return kills

    assert sum(runs.each(track, range(runs.width))) >= quota * runs.width


@pytest.mark.slow
def test_killed_as_a_process(works: Works, tmp_path: Path) -> None:
    """The same without forking: `python -m streamq`, once while it starts, then while it works."""
    work = works("large", "--format", BOTH)
    out, rng, kills = tmp_path / "out", random.Random(f"{SEED} process"), 0
    command = [sys.executable, "-m", "streamq", *work.argv(out)]
    while kills < max(2, KILLS // 8):
        if (out / MANIFEST).exists():
            shutil.rmtree(out)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = (out / JOURNAL).stat().st_size if (out / JOURNAL).exists() else 0
        while (
            kills
            and process.poll() is None
            and not ((out / JOURNAL).exists() and (out / JOURNAL).stat().st_size > seen)
        ):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.8 * work.seconds))
        process.kill()
        kills += process.wait() == KILLED
        assert not unsound(out, work.result)
    subprocess.run(command, check=True, capture_output=True)
    assert not differences(out, work.result)


# 2. Killed at every call that changes the folder.


@pytest.mark.parametrize("count", [45, pytest.param(1000, marks=pytest.mark.slow)], ids=["some", "every"])
def test_killed_at_every_call(runs: Runs, works: Works, tmp_path: Path, count: int) -> None:
    work = works("small", "--format", "mindie", "--read_ahead", 0)
    names = [call.split()[0] for call in work.calls]
    assert set(names) >= {"mkdir", "open", "posix_fallocate", "pwrite", "fdatasync", "write", "fsync"}
    assert set(names) >= {"fchmod", "replace", "write_bytes", "unlink"}
    faults = [Fault("before", number) for number in range(1, len(names) + 1)]
    faults += [Fault("half", number) for number, name in enumerate(names, 1) if name in HALVED]
    faults = [*some(faults, count), Fault("after", len(names))]
    problems = sweep(runs, work, tmp_path, faults, was_killed)
    assert not problems, report(problems)


@pytest.mark.slow
def test_killed_at_many_calls_of_two_experts(runs: Runs, works: Works, tmp_path: Path) -> None:
    work = works("pair", "--format", BOTH, "--read_ahead", 3)
    numbers = thinned(range(1, len(work.calls) + 1), work.calls, 40)
    faults = [Fault("before", number) for number in numbers]
    faults += [Fault("half", number) for number in numbers if work.calls[number - 1].split()[0] in HALVED]
    problems = sweep(runs, work, tmp_path, some(faults, 40), was_killed)
    assert not problems, report(problems)


@pytest.mark.parametrize("act", ["power", "power_kept"])
def test_power_cut(runs: Runs, works: Works, tmp_path: Path, act: str) -> None:
    """The machine goes down: what no sync has followed is gone, and renames may or may not have reached the disk."""
    work = works("small", "--format", BOTH, "--read_ahead", 1)
    numbers = thinned(range(1, len(work.calls) + 1), work.calls, 30)
    if act == "power_kept":
        numbers = [number for number, call in enumerate(work.calls, 2) if call.startswith("replace")]
    faults = some([Fault(act, number) for number in numbers], 14)
    problems = sweep(runs, work, tmp_path, faults, was_killed)
    assert not problems, report(problems)


def test_killed_again_while_it_resumes(runs: Runs, works: Works, tmp_path: Path) -> None:
    work = works("three", "--format", BOTH, "--read_ahead", 1)

    def one(number: int) -> list[str]:
        rng = random.Random(f"{SEED} again {number}")
        out, kills = fresh(tmp_path / str(number) / "out"), 0
        for _ in range(4):
            fault = Fault(rng.choice(["before", "power"]), rng.randrange(1, len(work.calls)))
            ended = runs(work.argv(out), fault)
            if ended.status not in (0, KILLED):
                return [f"{fault}: exit {ended.status}: {ended.err[-300:]}"]
            kills += ended.status == KILLED
            if problem := unsound(out, work.result):
                return [f"{fault}: {problem}"]
        return [problem for problem in (finish(runs, work, out), "" if kills else "never killed") if problem]

    problems = [problem for found in runs.each(one, range(KILLS // 2)) for problem in found]
    assert not problems, report(problems)


@pytest.mark.slow
@pytest.mark.parametrize("notes", [False, True], ids=["alone", "beside notes"])
@pytest.mark.parametrize("formats", ["mindie", BOTH])
def test_no_resume_killed(runs: Runs, works: Works, tmp_path: Path, formats: str, notes: bool) -> None:
    """Killed while it discards an unfinished run, the same command must still be able to start."""
    work = works("small", "--format", formats)
    unfinished = stop(runs, work, tmp_path / "unfinished", commits=1)
    if notes:
        (unfinished / "notes.txt").write_text("mine")
        work = replace(work, result=work.result | {"notes.txt": snapshot(unfinished)["notes.txt"]})
    calls = runs(work.argv(shutil.copytree(unfinished, tmp_path / "all"), "--no_resume")).calls
    discarding = next(number for number, call in enumerate(calls, 1) if call == "fsync .") + 1

    def one(numbers: tuple[int, int]) -> list[str]:
        number, kind = numbers
        # Copies of different names, in case the order of discarding depends on them.
        out = Path(shutil.copytree(unfinished, tmp_path / f"out{number}-{kind}"))
        found = [was_killed(Fault(), runs(work.argv(out, "--no_resume"), Fault("before", number)))]
        left = ", ".join(snapshot(out))
        found += [unsound(out, work.result), finish(runs, work, out, "--no_resume")]
        return [f"before call {number}, left {left}: {problem}" for problem in found if problem]

    problems = [p for found in runs.each(one, product(range(1, discarding + 1), range(2))) for p in found]
    assert not problems, report(problems)


@pytest.mark.parametrize("formats", ["mindie", BOTH])
def test_no_resume_killed_before_there_was_anything_to_lose(
    runs: Runs, works: Works, tmp_path: Path, formats: str
) -> None:
    """Nothing was committed, so the command without --no_resume goes on as well, and leaves nothing behind."""
    work = works("small", "--format", formats)
    unfinished = stop(runs, work, tmp_path / "unfinished", commits=0)
    calls = runs(work.argv(shutil.copytree(unfinished, tmp_path / "all"), "--no_resume")).calls
    beginning = next(number for number, call in enumerate(calls, 1) if call == "fsync .") + 1

    def one(number: int) -> list[str]:
        out = Path(shutil.copytree(unfinished, tmp_path / f"out{number}"))
        found = [was_killed(Fault(), runs(work.argv(out, "--no_resume"), Fault("before", number)))]
        found += [unsound(out, work.result), finish(runs, work, out)]
        return [f"before {calls[number - 1]}: {problem}" for problem in found if problem]

    problems = [problem for found in runs.each(one, range(1, beginning + 1)) for problem in found]
    assert not problems, report(problems)


@pytest.mark.slow
def test_overwrite_killed(runs: Runs, works: Works, tmp_path: Path) -> None:
    """A finished output of another plan may be gone at any moment, but never half there with its manifest."""
    old, new = works("small", "--format", "lightx2v"), works("small", "--format", BOTH)
    assert runs(old.argv(tmp_path / "finished")).status == 0
    (tmp_path / "finished" / "notes.txt").write_text("mine")
    notes = {"notes.txt": snapshot(tmp_path / "finished")["notes.txt"]}
    calls = runs(new.argv(shutil.copytree(tmp_path / "finished", tmp_path / "all"), "--overwrite")).calls
    discarding = next(n for n, call in enumerate(calls, 1) if call.startswith("posix_fallocate"))
    assert discarding > len(old.result)
    numbers = [*range(1, discarding + 1), *range(discarding + 1, len(calls), 30)]

    def one(number: int) -> list[str]:
        out = Path(shutil.copytree(tmp_path / "finished", tmp_path / f"out{number}"))
        killed = runs(new.argv(out, "--overwrite"), Fault("before", number))
        found = [was_killed(Fault(), killed), unsound(out, old.result, new.result, notes)]
        again = runs(new.argv(out, "--overwrite"))
        found += [again.err if again.status else differences(out, new.result | notes)]
        shutil.rmtree(out)
        return [f"before {calls[number - 1]}: {problem}" for problem in found if problem]

    problems = [problem for found in runs.each(one, numbers) for problem in found]
    assert not problems, report(problems)


@pytest.mark.parametrize("formats", ["mindie", BOTH])
def test_resumes_instead_of_starting_over(runs: Runs, works: Works, tmp_path: Path, formats: str) -> None:
    """What is committed is not written again: otherwise all tests above would pass without any resuming."""
    work = works("three", "--format", formats, "--read_ahead", 0)  # with threads, calls have no order to count by
    out = stop(runs, work, tmp_path / "out", commits=2)
    ended = runs(work.argv(out))
    assert ended.status == 0 and "resuming: 2 of 4 units" in ended.err
    commits = [number for number, call in enumerate(work.calls, 1) if call == f"fsync {JOURNAL}"]
    left = [call for call in work.calls[commits[2] :] if call.startswith("pwrite")]
    headers = 2 if formats == BOTH else 0  # of lightx2v's two files without a commit, which are begun anew
    assert len([call for call in ended.calls if call.startswith("pwrite")]) == len(left) + headers
    assert not differences(out, work.result)


# 3. A disk that fails.


def failed_as_told(work: Work) -> Callable[[Fault, Ended], str]:
    """The judge of a run whose call failed: one line that names the file."""

    def judge(fault: Fault, ended: Ended) -> str:
        if complaint := ended.complaint(1):
            return complaint
        # Of this run's own calls: several files are written side by side, and their order is not that of another run.
        failed = {Path(call.split()[1]).name for call in ended.calls[fault.at - 1 :][: None if fault.forever else 1]}
        if not any(name in ended.errors[0] for name in failed):
            return f"none of {sorted(failed)} is named: {ended.errors[0]}"
        return "" if "run" in ended.errors[0] else f"no next step: {ended.errors[0]}"

    return judge


@pytest.mark.parametrize(
    "read_ahead", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "write"])
def test_disk_full(runs: Runs, works: Works, tmp_path: Path, call: str, read_ahead: int) -> None:
    """Once, or from then on. At every depth: what stands behind the failed write in the queue must not be committed."""
    work = works("small", "--format", BOTH, "--read_ahead", read_ahead)
    numbers = thinned(work.numbers(call), work.calls, 24)
    assert numbers
    once = [Fault("error", number, code=errno.ENOSPC) for number in numbers]
    forever = [replace(fault, forever=True) for fault in once]
    faults = once + forever[:: 4 if call == "pwrite" and not THOROUGH else 1]
    problems = sweep(runs, work, tmp_path, faults, failed_as_told(work))
    assert not problems, report(problems)
    out = fresh(tmp_path / "last")
    assert runs(work.argv(out), Fault("error", numbers[-1], code=errno.ENOSPC)).status == 1
    assert not published(out)


def test_disk_full_while_finishing(runs: Runs, works: Works, tmp_path: Path) -> None:
    """Syncs, renames and small files fail too; what is final by then stays, and is complete."""
    work = works("small", "--format", BOTH)
    names = ("fdatasync", "fsync", "write_bytes", "fchmod", "replace")
    first = next(number for number, call in enumerate(work.calls, 1) if call.startswith("posix_fallocate"))
    unlink = work.numbers("unlink")[0]
    numbers = [number for number in work.numbers(*names) if first < number < unlink]
    judged = failed_as_told(work)
    problems = sweep(runs, work, tmp_path, some([Fault("error", n, code=errno.ENOSPC) for n in numbers], 10), judged)
    assert not problems, report(problems)


@pytest.mark.parametrize("call", ["mkdir", "fsync .", "unlink"])
def test_disk_error_in_the_folder_itself(runs: Runs, works: Works, tmp_path: Path, call: str) -> None:
    """Making a sub-folder, syncing the folder, removing the journal: an error of the disk, not a bug in streamq."""
    work = works("small", "--format", BOTH)
    numbers = [n for n, found in enumerate(work.calls, 1) if found.startswith(call) and found != "mkdir ."]
    assert numbers
    faults = [Fault("error", number, code=errno.EIO) for number in numbers]
    problems = sweep(runs, work, tmp_path, faults, lambda fault, ended: ended.complaint(1))
    assert not problems, report(problems)


def test_file_size_limit(runs: Runs, works: Works, tmp_path: Path) -> None:
    """The kernel itself refuses: RLIMIT_FSIZE."""
    work = works("small", "--format", "mindie")
    out = tmp_path / "out"
    ended = runs(work.argv(out), Fault(limit=100_000))
    assert not ended.complaint(1) and WEIGHTS in ended.errors[0]
    assert not published(out)
    assert not finish(runs, work, out)


def test_short_writes(runs: Runs, works: Works, tmp_path: Path) -> None:
    """The kernel may write less than it was given, every time."""
    work = works("small", "--format", "mindie")
    for call in ("pwrite", "write"):
        out = fresh(tmp_path / "out")
        ended = runs(work.argv(out), Fault("short", 1, call))
        assert ended.status == 0 and ended.fired, ended.err
        assert len(ended.calls) == len(work.calls) + 1
        assert not differences(out, work.result)
        # All of them: the halves of one byte are none, so the loop ends only if it asks for the rest.
        out = fresh(tmp_path / "out")
        ended = runs(work.argv(out), Fault("short", 2, call, path=PARTIAL if call == "pwrite" else JOURNAL))
        assert ended.status == 0 and ended.fired, ended.err
        assert not differences(out, work.result)


# 4. Interrupted.


@pytest.mark.parametrize("read_ahead", [pytest.param(0, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(runs: Runs, works: Works, tmp_path: Path, number: signal.Signals, read_ahead: int) -> None:
    work = works("small", "--format", BOTH, "--read_ahead", read_ahead)
    numbers = range(1 + number % 7, len(work.calls) + 1, 1 if THOROUGH else 30)
    faults = [Fault("signal", n, code=number) for n in numbers]
    problems = sweep(runs, work, tmp_path, faults, lambda fault, ended: ended.complaint(130))
    assert not problems, report(problems)


def test_interrupted_again_and_again(runs: Runs, works: Works, tmp_path: Path) -> None:
    """An impatient user: a signal at every call from one on. How it ends may vary, what it leaves may not."""
    work = works("small", "--format", BOTH, "--read_ahead", 3)
    numbers = range(1, len(work.calls), 1 if THOROUGH else 30)
    faults = [Fault("signal", number, code=signal.SIGINT, forever=True) for number in numbers]
    problems = sweep(runs, work, tmp_path, faults, lambda fault, ended: "" if ended.status else "not interrupted")
    assert not problems, report(problems)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_interrupted_process(runs: Runs, works: Works, tmp_path: Path, number: signal.Signals) -> None:
    work, out = works("large", "--format", BOTH), tmp_path / "out"
    command = [sys.executable, "-m", "streamq", *work.argv(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # pytest as a job in the background ignores it
    )
    assert process.stderr is not None
    seen = ""
    while not seen.startswith("blocks.2 "):
        seen = process.stderr.readline()
        assert seen, "ended before it could be interrupted"
    process.send_signal(number)
    ended = Ended(process.wait(), "", process.stderr.read())
    process.stderr.close()
    assert not ended.complaint(130)
    assert not unsound(out, work.result) and not published(out)
    again = runs(work.argv(out))
    assert again.status == 0 and "resuming: " in again.err
    assert not differences(out, work.result)
