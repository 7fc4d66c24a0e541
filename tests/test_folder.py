"""What a second start finds in the folder, and what it must not touch; and the same bytes for every setting."""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic  # conftest.py has put benchmarks/ on the path
from faults import (
    JOURNAL,
    MANIFEST,
    PARTIAL,
    Fault,
    Runs,
    change,
    differences,
    fresh,
    snapshot,
    stamps,
    unsound,
)
from resume_kit import (
    BOTH,
    KILLED,
    MODELS,
    SOURCE,
    THOROUGH,
    WEIGHTS,
    Models,
    Works,
    argv,
    finish,
    published,
    stop,
)

from streamq import journal as journals
from streamq.errors import UsageError
from streamq.options import QuantOptions
from streamq.planner import make_plan

# 5. What is found on the second start.


def test_torn_journal(runs: Runs, works: Works, tmp_path: Path) -> None:
    """Cut at any byte of its last line, the journal counts without that line; whole, with it."""
    work = works("small", "--format", "mindie")
    out = stop(runs, work, tmp_path / "out", commits=2)
    path = out / JOURNAL
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    assert len(whole) - start > 1000
    plan = make_plan(QuantOptions(str(work.model), out, quant_type="w8a8", device="cpu"), download=False)
    for length in range(start, len(whole) + 1):
        path.write_bytes(whole[:length])
        journal = journals.open_journal(plan)
        assert journal is not None
        journal.close()
        complete = length == len(whole)
        assert [commit.unit for commit in journal.commits] == (["blocks.0", "rest"] if complete else ["blocks.0"]), (
            length
        )
        assert path.read_bytes() == (whole if complete else whole[:start]), length
    for length in (start, start + 1, (start + len(whole)) // 2, len(whole) - 1, len(whole)):
        copy = Path(shutil.copytree(out, tmp_path / str(length)))
        (copy / JOURNAL).write_bytes(whole[:length])
        assert not finish(runs, work, copy), length


GARBAGE = {
    "nothing": b"",
    "zeros": bytes(300),
    "brace": b"{",
    "text": b"garbage\n",
    "not an object": b"[1]\n",
    "not utf-8": b'{"unit":"\xff\xfe"}\n',
    "two lines": b'{"unit":"blo\n{"unit":"blocks.2","tensors":{},"layers":{}}\n',
    "noise": random.Random(1).randbytes(5000),
    "blank lines": b"\n\n",
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_the_journal(runs: Runs, works: Works, tmp_path: Path, garbage: str) -> None:
    """Behind the last line, and behind half of it."""
    work = works("three", "--format", "mindie")
    out = stop(runs, work, tmp_path / "out", commits=2)
    whole = (out / JOURNAL).read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for number, kept in enumerate((len(whole), (start + len(whole)) // 2, start)):
        copy = Path(shutil.copytree(out, tmp_path / str(number)))
        (copy / JOURNAL).write_bytes(whole[:kept] + GARBAGE[garbage])
        ended = runs(work.argv(copy))
        assert ended.status == 0, (kept, ended.err)
        commits = 2 if (whole[:kept] + GARBAGE[garbage]).startswith(whole) else 1
        assert f"resuming: {commits} of" in ended.err
        assert not differences(copy, work.result)


@pytest.mark.parametrize("line", [b"{}\n", b'{"unit":"blocks.1","tensors":{},"layers":{}}\n', b'{"unit":1}\n'])
def test_a_line_that_is_no_commit_of_the_plan(runs: Runs, works: Works, tmp_path: Path, line: bytes) -> None:
    """No tear makes a whole line: this journal was written to by somebody else."""
    work = works("three", "--format", "mindie")
    out = stop(runs, work, tmp_path / "out", commits=2)
    with open(out / JOURNAL, "ab") as stream:
        stream.write(line)
    before = snapshot(out)
    ended = runs(work.argv(out))
    assert not ended.complaint(2) and JOURNAL in ended.errors[0] and "--no_resume" in ended.errors[0]
    assert snapshot(out) == before
    assert not finish(runs, work, out, "--no_resume")


def test_torn_first_line(runs: Runs, works: Works, tmp_path: Path) -> None:
    """Killed before anything was committed: there is nothing to resume, and nothing to refuse."""
    work = works("small", "--format", "mindie")
    out = stop(runs, work, tmp_path / "out", commits=0)
    line = (out / JOURNAL).read_bytes()
    for length in (0, 1, len(line) // 2, len(line) - 1):
        copy = Path(shutil.copytree(out, tmp_path / str(length)))
        (copy / JOURNAL).write_bytes(line[:length])
        assert not finish(runs, work, copy)


@pytest.mark.parametrize(
    "other",
    [
        f"--format {BOTH} --seed 1",
        f"--format {BOTH} --match msmodelslim",
        "--format lightx2v --layout single",
        "--format lightx2v",
        "--format mindie",
        "--format mindie --no_resume",
        "--format mindie --max_shard_size 100KB",
    ],
)
def test_another_plan(runs: Runs, works: Works, tmp_path: Path, other: str) -> None:
    """Refused on an unfinished and on a finished folder, and nothing is touched."""
    work = works("small", "--format", BOTH)
    out = stop(runs, work, tmp_path / "out", commits=1)
    for finished in (False, True):
        if finished:
            assert runs(work.argv(out)).status == 0
        before = snapshot(out), stamps(out)
        ended = runs(argv(work.model, out, *other.split()))
        assert not ended.complaint(2)
        assert "--overwrite" in ended.errors[0] and str(out) in ended.errors[0]
        assert (snapshot(out), stamps(out)) == before


def test_other_source(runs: Runs, works: Works, models: Models, tmp_path: Path) -> None:
    """Another checkpoint of the same shape has the same header: only its time of change tells."""
    work = works("small", "--format", "mindie")
    other = tmp_path / "other"
    synthetic.write(other, MODELS["small"], seed=7)
    out = stop(runs, work, tmp_path / "out", commits=1)
    before = stamps(out)
    ended = runs(argv(other, out, "--format", "mindie"))
    assert not ended.complaint(2) and "--no_resume" in ended.errors[0]
    assert stamps(out) == before
    assert not finish(runs, work, out)


def test_settings_that_may_change(runs: Runs, works: Works, tmp_path: Path) -> None:
    """Read-ahead, budgets and display belong to a run, not to a plan."""
    work = works("three", "--format", BOTH)
    out = stop(runs, work, tmp_path / "out", commits=1, more=["--read_ahead", 0])
    second = runs(work.argv(out, "--read_ahead", 5, "--max_host_memory", "2GiB"), Fault("after", 1, "fsync", JOURNAL))
    assert second.status == KILLED
    assert len((out / JOURNAL).read_bytes().splitlines()) == 3
    ended = runs(work.argv(out, "--read_ahead", 1, "--json", "--debug"))
    assert ended.status == 0 and json.loads(ended.out)["status"] == "done"
    assert not differences(out, work.result)


def _flip(path: Path, position: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte[0] ^ 1]))


def _data(path: Path) -> int:
    """The position of the first tensor's first byte."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


ALTERED: dict[str, Callable[[Path], None]] = {
    "first byte of the data": lambda path: _flip(path, _data(path)),
    "a byte later": lambda path: _flip(path, _data(path) + 5000),
    "header": lambda path: _flip(path, 20),
    "header's length": lambda path: _flip(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "gone": Path.unlink,
    "a folder": _replace_by_folder,
}


@pytest.mark.parametrize("how", ALTERED)
@pytest.mark.parametrize("file", [f"mindie/{WEIGHTS}", "lightx2v/block_0.safetensors"], ids=["mindie", "lightx2v"])
def test_altered_after_its_commit(runs: Runs, works: Works, tmp_path: Path, file: str, how: str) -> None:
    work = works("three", "--format", BOTH)
    out = stop(runs, work, tmp_path / "out", commits=2)
    ALTERED[how](out / (file + PARTIAL))
    before = snapshot(out)
    ended = runs(work.argv(out))
    assert not ended.complaint(2)
    assert Path(file).name in ended.errors[0] and "--no_resume" in ended.errors[0]
    assert snapshot(out) == before
    if how == "a folder":
        (out / (file + PARTIAL)).rmdir()
    assert not finish(runs, work, out, "--no_resume")


def test_altered_where_nothing_is_committed(runs: Runs, works: Works, tmp_path: Path) -> None:
    """Whatever a killed run has begun to write behind its last commit does not matter."""
    work = works("three", "--format", BOTH)
    out = stop(runs, work, tmp_path / "out", commits=2)
    (out / "lightx2v" / ("block_2.safetensors" + PARTIAL)).unlink()
    (out / "lightx2v" / ("non_block.safetensors" + PARTIAL)).write_bytes(b"garbage")
    path = out / "mindie" / (WEIGHTS + PARTIAL)
    with open(path, "r+b") as stream:
        stream.seek(-2000, os.SEEK_END)
        stream.write(b"\xff" * 2000)
    assert not finish(runs, work, out)


@pytest.mark.parametrize("name", ["small", "pair"])
def test_source_changed_between_runs(runs: Runs, works: Works, own_model: Models, tmp_path: Path, name: str) -> None:
    model = own_model(name)
    work = replace(works(name, "--format", BOTH), model=model)
    out = stop(runs, work, tmp_path / "out", commits=1)
    source = next(iter(sorted(model.rglob(SOURCE), reverse=True)))  # of two experts, the one that has not been read yet
    times = source.stat()
    change(source, "touch")
    before = snapshot(out), stamps(out)
    ended = runs(work.argv(out))
    assert not ended.complaint(2) and "--no_resume" in ended.errors[0]
    assert (snapshot(out), stamps(out)) == before
    shutil.copytree(out, tmp_path / "restored")
    assert not finish(runs, work, out, "--no_resume")
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not finish(runs, work, tmp_path / "restored")


@pytest.mark.parametrize("read_ahead", [0, 3])
@pytest.mark.parametrize("how", ["touch", "grow", "shrink"])
def test_source_changes_while_it_is_read(
    runs: Runs, works: Works, own_model: Models, tmp_path: Path, how: str, read_ahead: int
) -> None:
    """At any read, the first and the last as well. Restored, the same command ends as if nothing had been."""
    model = own_model("small")
    work = replace(works("small", "--format", BOTH, "--read_ahead", read_ahead), model=model)
    source = model / SOURCE
    content, times = source.read_bytes(), source.stat()
    reads = len(synthetic.shapes(MODELS["small"]))
    for at in [*range(1, reads, 1 if THOROUGH else 15), reads - 1, reads]:
        out = fresh(tmp_path / "out")
        ended = runs(work.argv(out), Fault(how, at, "read", target=str(source)))
        assert not ended.complaint(1), at
        assert SOURCE in ended.errors[0] and "same command" in ended.errors[0], at
        assert not unsound(out, work.result) and not published(out), at
        source.write_bytes(content)
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert not finish(runs, work, out), at


def test_second_expert_changes_while_the_first_is_read(
    runs: Runs, works: Works, own_model: Models, tmp_path: Path
) -> None:
    model = own_model("pair")
    work = replace(works("pair", "--format", "mindie"), model=model)
    later = model / "low_noise_model" / SOURCE
    ended = runs(work.argv(tmp_path / "out"), Fault("touch", 1, "read", "high_noise_model", target=str(later)))
    assert not ended.complaint(1) and str(later) in ended.errors[0]
    assert not published(tmp_path / "out")


# 6. Two runs at once; finished folders.


@pytest.mark.parametrize("at", ["posix_fallocate", "pwrite", "fdatasync", "replace", "unlink"])
def test_two_runs_at_once(runs: Runs, works: Works, tmp_path: Path, at: str) -> None:
    """The second is refused whatever it is told, and the first does not notice."""
    work = works("three", "--format", BOTH)
    out = tmp_path / "out"
    first = runs.start(work.argv(out), Fault("stop", 2 if len(work.numbers(at)) > 1 else 1, at))
    first.wait_stopped()
    before = snapshot(out), stamps(out)
    try:
        for more in ([], ["--overwrite"], ["--no_resume"], ["--seed", "1"], ["--overwrite", "--seed", "1"]):
            second = runs(work.argv(out, *more))
            assert not second.complaint(2), more
            assert "another run" in second.errors[0], more
            assert (snapshot(out), stamps(out)) == before, more
    finally:
        first.send(signal.SIGCONT)
        ended = first.wait()
    assert ended.status == 0, ended.err
    assert not differences(out, work.result)


def test_started_at_the_same_moment(runs: Runs, works: Works, tmp_path: Path) -> None:
    work = works("small", "--format", BOTH)
    for number in range(10):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        both = [runs.start(work.argv(out)), runs.start(work.argv(out))]
        ended = [started.wait() for started in both]
        assert 0 in [one.status for one in ended], [one.err for one in ended]
        for one in ended:
            assert one.status == 0 or not one.complaint(2)
        assert not differences(out, work.result)


def test_a_run_after_a_killed_one_is_not_locked_out(runs: Runs, works: Works, tmp_path: Path) -> None:
    work, out = works("three", "--format", "mindie"), tmp_path / "out"
    first = runs.start(work.argv(out), Fault("stop", 20, "pwrite"))
    first.wait_stopped()
    assert runs(work.argv(out)).status == 2
    first.send(signal.SIGKILL)
    assert first.wait().status == KILLED
    assert not finish(runs, work, out)


@pytest.mark.parametrize(
    "more", [[], ["--no_resume"], ["--read_ahead", "0", "--max_host_memory", "2GiB"]], ids=" ".join
)
def test_already_done(runs: Runs, works: Works, tmp_path: Path, more: list[str]) -> None:
    work, out = works("small", "--format", BOTH), tmp_path / "out"
    assert runs(work.argv(out)).status == 0
    before = snapshot(out), stamps(out)
    ended = runs(work.argv(out, *more))
    assert ended.status == 0 and "already done" in ended.out and not ended.calls
    assert json.loads(runs(work.argv(out, *more, "--json")).out)["status"] == "already done"
    assert (snapshot(out), stamps(out)) == before


@pytest.mark.parametrize("how", ["flipped", *(pytest.param(how, marks=pytest.mark.slow) for how in ("cut", "gone"))])
def test_finished_but_damaged(runs: Runs, works: Works, tmp_path: Path, how: str) -> None:
    work, out = works("small", "--format", BOTH), tmp_path / "out"
    assert runs(work.argv(out)).status == 0
    files = [name for name in work.result if not name.endswith("/") and name != MANIFEST]
    assert len(files) == 10
    for name in files:
        path, content = out / name, (out / name).read_bytes()
        if how == "flipped":
            _flip(path, len(content) - 3)
        elif how == "cut":
            os.truncate(path, len(content) - 1)
        else:
            path.unlink()
        before = snapshot(out), stamps(out)
        ended = runs(work.argv(out))
        assert not ended.complaint(1), name
        assert str(path) in ended.errors[0] and "--overwrite" in ended.errors[0]
        assert (snapshot(out), stamps(out)) == before
        assert runs(work.argv(out, "--overwrite")).status == 0
        assert not differences(out, work.result)


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b"{}", b"\xff", b'{"plan": 1}', b"null"])
def test_broken_manifest(runs: Runs, works: Works, tmp_path: Path, broken: bytes) -> None:
    work, out = works("small", "--format", "mindie"), tmp_path / "out"
    assert runs(work.argv(out)).status == 0
    (out / MANIFEST).write_bytes(broken)
    before = snapshot(out), stamps(out)
    assert not runs(work.argv(out)).complaint(2)
    assert (snapshot(out), stamps(out)) == before
    assert not finish(runs, work, out, "--overwrite")


@pytest.mark.parametrize("unfinished", [False, True], ids=["finished", "unfinished"])
def test_overwrite_keeps_what_is_not_a_model(runs: Runs, works: Works, tmp_path: Path, unfinished: bool) -> None:
    old, new = works("three", "--format", "lightx2v"), works("small", "--format", BOTH)
    out = tmp_path / "out"
    if unfinished:
        stop(runs, old, out, commits=2)
    else:
        assert runs(old.argv(out)).status == 0
    kept = {
        "notes.txt": b"mine",
        "mindie/NOTES.md": b"mine too",
        "holidays/beach.safetensors": b"not at a place of ours",
    }
    target = tmp_path / "elsewhere.safetensors"
    target.write_bytes(b"linked to")
    for name, content in kept.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    (out / "stale.safetensors").write_bytes(b"a model file")
    (out / "lightx2v").mkdir(exist_ok=True)
    (out / "lightx2v" / "stale.json").write_bytes(b"a runtime would read it")
    (out / "link.safetensors").symlink_to(target)
    assert not runs(new.argv(out)).complaint(2)
    ended = runs(new.argv(out, "--overwrite"))
    assert ended.status == 0, ended.err
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert target.read_bytes() == b"linked to"
    found = snapshot(out)
    assert set(found) == {*new.result, *kept, "holidays/"}
    assert {name: found[name] for name in new.result} == new.result


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", ".hidden", "streamq.json.partial"])
def test_foreign_folder(runs: Runs, works: Works, tmp_path: Path, name: str) -> None:
    work, out = works("small", "--format", "mindie"), tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"mine")
    before = snapshot(out), stamps(out)
    ended = runs(work.argv(out))
    assert not ended.complaint(2) and "--overwrite" in ended.errors[0]
    assert (snapshot(out), stamps(out)) == before


def test_empty_folder_is_taken(runs: Runs, works: Works, tmp_path: Path) -> None:
    work = works("small", "--format", "mindie")
    (tmp_path / "out").mkdir()
    assert not finish(runs, work, tmp_path / "out")


# 7. The same bytes for every setting.


@pytest.mark.parametrize(("model", "formats"), [("three", BOTH), ("pair", BOTH), ("three", "lightx2v")])
def test_same_bytes_at_every_depth_and_budget(
    runs: Runs, works: Works, tmp_path: Path, model: str, formats: str
) -> None:
    work = works(model, "--format", formats)
    refused = runs(work.argv(tmp_path / "none", "--max_host_memory", "1MiB"))
    assert not refused.complaint(2) and not (tmp_path / "none").exists()
    least = re.search(r"can do with is (\d+)", refused.errors[0])
    assert least is not None
    assert not runs(work.argv(tmp_path / "none", "--max_host_memory", int(least[1]) - 1)).complaint(2)
    settings: list[list[object]] = [["--read_ahead", depth] for depth in (0, 1, 2, 5, 64)]
    settings += [["--read_ahead", depth, "--max_host_memory", least[1]] for depth in (0, 1, 2, 5)]
    settings += [["--read_ahead", 5, "--max_host_memory", int(least[1]) + 70_000]]
    problems = runs.each(lambda s: finish(runs, work, fresh(tmp_path / "_".join(map(str, s))), *s), settings)
    assert not any(problems), dict(zip(map(str, settings), problems, strict=True))


def test_open_journal_refuses_a_foreign_folder(works: Works, tmp_path: Path) -> None:
    """`open_journal`, which is called directly above, is the one that refuses."""
    work = works("small", "--format", "mindie")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    options = QuantOptions(str(work.model), tmp_path / "out", quant_type="w8a8", device="cpu")
    with pytest.raises(UsageError, match="not empty"):
        journals.open_journal(make_plan(options, download=False))
