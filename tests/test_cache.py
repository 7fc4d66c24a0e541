"""The streams' files by themselves; stored sets; and what a start finds in, or makes of, an output folder's cache."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from calib_kit import CACHE, DOCUMENT, STREAM, CalibWork, Kit, calib_argv, stop, watched
from calib_kit import kit as kit  # the fixture
from faults import JOURNAL, Fault, differences, snapshot, stamps
from resume_kit import KILLED, SOURCE, finish, report

from streamq import journal as journals
from streamq import wan
from streamq.calibration.cache import Cache
from streamq.calibration.store import ExpertInputs, open_set
from streamq.device.cpu import CPU
from streamq.errors import RunError, UsageError
from streamq.options import QuantOptions
from streamq.plan import DISK_RESERVE
from streamq.planner import make_plan
from streamq.wan.blocks import flow

pytestmark = pytest.mark.xdist_group("calibrated")  # one process makes what all of them look at

SET = ("--num_samples", "3", "--time_bins", "2", "--size", "64*64", "--frame_num", "5")


@pytest.fixture(name="sets", scope="module")
def sets_fixture(kit: Kit) -> Any:
    """`sets("t2v")` is a stored set for a model of the kit, `sets("t2v", "--seed", 1)` another; made once."""

    def made(model: str, *more: object) -> Path:
        path = kit.folder / "sets" / "-".join((model, *map(str, more)))
        if not path.exists():
            argv = ["calib", "--model_path", kit.model(model), "--save_path", path, "--device", "cpu", *SET, *more]
            ended = kit.runs([str(part) for part in argv])
            assert ended.status == 0, ended.err
        return path

    return made


@pytest.fixture(name="inputs", scope="module")
def inputs_fixture(sets: Any) -> ExpertInputs:
    return open_set(sets("vace")).experts[""]


def open_cache(folder: Path, inputs: ExpertInputs, *, in_memory: bool) -> Cache:
    folder.mkdir(exist_ok=True)
    return Cache(folder, inputs, torch.bfloat16, CPU(), in_memory=in_memory)


def some_tensor(cache: Cache, unit: str, stream: str, sample: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(zlib.crc32(f"{unit} {stream} {sample}".encode()))
    return torch.randn(cache.shape, generator=random).to(torch.bfloat16)


def step(cache: Cache, kit: Kit, unit: str) -> Any:
    """What the loop does for one unit; returns what the journal would say."""
    for stream in begun(cache, kit, unit):
        for sample in range(cache.count):
            cache.write(stream, sample, some_tensor(cache, unit, stream, sample))
    state = json.loads(json.dumps(cache.sync()))
    cache.committed()
    return state


def begun(cache: Cache, kit: Kit, unit: str) -> tuple[str, ...]:
    """The streams that a unit has begun to write."""
    cache.begin(flow(vace(kit), unit), vace(kit).replay_order.index(unit))
    return flow(vace(kit), unit).writes


def vace(kit: Kit) -> wan.Model:
    return wan.open_model(kit.model("vace"))[0].model


UNITS = ("vace_blocks.0", "vace_blocks.1", "blocks.0", "blocks.1")
LIVE = [{"control", "hint.0"}, {"hint.0", "hint.1"}, {"hidden", "hint.1"}, {"hidden"}]


@pytest.mark.parametrize("in_memory", [False, True])
def test_streams_come_and_go(kit: Kit, inputs: ExpertInputs, tmp_path: Path, in_memory: bool) -> None:
    """After every unit the files are those of the streams that are still needed; a restart reads what was written."""
    descriptors, last = len(os.listdir("/proc/self/fd")), {"control": "set", "hidden": "set"}
    with closing(open_cache(tmp_path / "c", inputs, in_memory=in_memory)) as cache:
        first = {stream: cache.read(stream, 1).clone() for stream in last}
        for unit, live in zip(UNITS, LIVE, strict=True):
            state = step(cache, kit, unit)
            last |= dict.fromkeys(flow(vace(kit), unit).writes, unit)
            assert state.keys() == live
            assert {path.name for path in (tmp_path / "c").iterdir()} == {name for name, _ in state.values()}
            with closing(open_cache(tmp_path / "c", inputs, in_memory=not in_memory)) as again:
                again.restore(state)
                for which in (cache, again):
                    for stream, sample in [(s, n) for s in live for n in range(cache.count)]:
                        expected = some_tensor(cache, last[stream], stream, sample)
                        assert torch.equal(which.read(stream, sample), expected), (unit, stream, sample)
                    if "hidden" not in live:  # still as the set has it
                        assert torch.equal(which.read("hidden", 1), first["hidden"])
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("in_memory", [False, True])
def test_old_slots_can_be_read_while_new_ones_are_written(
    kit: Kit, inputs: ExpertInputs, tmp_path: Path, in_memory: bool
) -> None:
    with closing(open_cache(tmp_path / "c", inputs, in_memory=in_memory)) as cache:
        for unit in UNITS[:3]:
            step(cache, kit, unit)
        begun(cache, kit, "blocks.1")
        for sample in range(cache.count):
            assert torch.equal(cache.read("hidden", sample), some_tensor(cache, "blocks.0", "hidden", sample))
            cache.write("hidden", sample, some_tensor(cache, "blocks.1", "hidden", sample))
        assert len(list((tmp_path / "c").glob(f"*-hidden-*{STREAM}"))) == 2
        cache.sync()
        assert torch.equal(cache.read("hidden", 2), some_tensor(cache, "blocks.1", "hidden", 2))
        cache.committed()
        assert len(list((tmp_path / "c").glob(f"*-hidden-*{STREAM}"))) == 1


def test_what_does_not_fit_is_refused(kit: Kit, inputs: ExpertInputs, tmp_path: Path) -> None:
    with closing(open_cache(tmp_path / "c", inputs, in_memory=False)) as cache:
        state = step(cache, kit, UNITS[0])
    orphan = tmp_path / "c" / f"transformer-control-9{STREAM}"
    orphan.write_bytes(b"of a block that was cut off")
    name, sums = state["control"]
    for bad in ([name, sums[:-1]], [name, [*sums, 0]], [name, [sums[0] ^ 1, *sums[1:]]], ["gone.stream", sums]):
        with closing(open_cache(tmp_path / "c", inputs, in_memory=False)) as cache:
            with pytest.raises(UsageError, match="--no_resume"):
                cache.restore(state | {"control": bad})
            assert orphan.exists()
    with closing(open_cache(tmp_path / "c", inputs, in_memory=False)) as cache:
        cache.restore(state)
    assert not orphan.exists()


@pytest.mark.parametrize("which", [0, 1])
def test_a_failed_sync_can_be_closed(
    kit: Kit, inputs: ExpertInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Of two streams' files either may not sync: the error that is told is the disk's, and no file stays open."""
    descriptors, left = len(os.listdir("/proc/self/fd")), [which]

    def failing(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", failing)
    with (
        pytest.raises(RunError, match="Input/output error"),
        closing(open_cache(tmp_path / "c", inputs, in_memory=False)) as cache,
    ):
        step(cache, kit, UNITS[0])
    assert len(os.listdir("/proc/self/fd")) == descriptors


# Stored sets.


def given(kit: Kit, model: str, recipe: str, path: Path) -> CalibWork:
    """A command with --calib."""
    work = kit.work(model, recipe)
    return CalibWork(work.model, (*work.options, "--calib", str(path)), work.result, work.calls, 0.0)


@pytest.mark.parametrize("model", ["t2v", "vace", "pair"])
def test_a_stored_set_makes_what_the_run_s_own_makes(kit: Kit, sets: Any, tmp_path: Path, model: str) -> None:
    work, out = given(kit, model, "static", sets(model)), tmp_path / "out"
    before = snapshot(sets(model)), stamps(sets(model))
    ended = kit.runs(work.argv(out), Fault("after", 2, "fsync", JOURNAL))
    assert ended.status == KILLED and not (out / CACHE / DOCUMENT).exists()
    ended = kit.runs(work.argv(out))
    assert ended.status == 0 and "resuming: " in ended.err, ended.err
    assert differences(out, work.result) == "differs from an uninterrupted run: streamq.json"  # it names the inputs
    assert (snapshot(sets(model)), stamps(sets(model))) == before
    again = kit.runs(work.argv(out))
    assert again.status == 0 and "already done" in again.out and not again.calls


def test_another_set_is_another_plan(kit: Kit, sets: Any, tmp_path: Path) -> None:
    work, out = given(kit, "t2v", "static", sets("t2v")), tmp_path / "out"
    stop(kit, work, out, commits=1)
    before = snapshot(out), stamps(out)
    for other in (given(kit, "t2v", "static", sets("t2v", "--seed", "1")), kit.work("t2v", "static")):
        ended = kit.runs(other.argv(out))
        assert not ended.complaint(2) and "another plan" in ended.errors[0]
        assert (snapshot(out), stamps(out)) == before
    assert kit.runs(work.argv(out)).status == 0
    for other in (given(kit, "t2v", "static", sets("t2v", "--seed", "1")), kit.work("t2v", "static")):
        assert not kit.runs(other.argv(out)).complaint(2)


def flip_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_other_content_under_the_same_document(kit: Kit, sets: Any, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(sets("t2v"), tmp_path / "set"))
    work, out = given(kit, "t2v", "static", mine), tmp_path / "out"
    stop(kit, work, out, commits=1)
    content = (mine / "inputs.safetensors").read_bytes()
    flip_last(mine / "inputs.safetensors")
    before = snapshot(out)
    ended = kit.runs(work.argv(out))
    assert not ended.complaint(2) and "inputs.safetensors" in ended.errors[0]
    assert snapshot(out) == before
    (mine / "inputs.safetensors").write_bytes(content)
    assert kit.runs(work.argv(out)).status == 0
    assert differences(out, work.result) == "differs from an uninterrupted run: streamq.json"


def test_a_damaged_set_is_refused_before_anything_is_written(kit: Kit, sets: Any, tmp_path: Path) -> None:
    """Exit 2 says that nothing was written; of two experts' files the second counts as well."""
    for file in ("inputs-high_noise_model.safetensors", "inputs-low_noise_model.safetensors"):
        mine = Path(shutil.copytree(sets("pair"), tmp_path / file / "set"))
        flip_last(mine / file)
        ended = kit.runs(given(kit, "pair", "static", mine).argv(tmp_path / "out"))
        assert not ended.complaint(2) and file in ended.errors[0], ended.err
        assert not (tmp_path / "out").exists()


def test_a_set_that_cannot_be_made_is_refused_before_anything_is_written(kit: Kit, tmp_path: Path) -> None:
    """One step is the high noise expert's: nothing is left for the other."""
    options = ("--config_path", kit.recipe("static", sample_steps=1))
    ended = kit.runs(calib_argv(kit.model("pair"), tmp_path / "out", *options))
    assert not ended.complaint(2) and "sample_steps" in ended.errors[0], ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["touch", "grow"])
def test_a_set_that_changes_while_it_is_read(kit: Kit, sets: Any, tmp_path: Path, how: str) -> None:
    """As with the model's files: what was read since the last commit does not count."""
    mine = Path(shutil.copytree(sets("t2v"), tmp_path / "set"))
    work, out = given(kit, "t2v", "static", mine), tmp_path / "out"
    file = mine / "inputs.safetensors"
    before = file.read_bytes(), file.stat()
    ended = kit.runs(work.argv(out), Fault(how, 2, "replay", target=str(file)))
    assert not ended.complaint(1) and "inputs.safetensors" in ended.errors[0], ended.err
    file.write_bytes(before[0])
    os.utime(file, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
    assert kit.runs(work.argv(out)).status == 0


# What a start finds.


@pytest.mark.parametrize("option", ["--overwrite", "--no_resume"])
def test_a_stale_cache_goes(kit: Kit, tmp_path: Path, option: str) -> None:
    """Of another recipe's run, or of this one's."""
    old, new = kit.work("t2v", "gptq"), kit.work("t2v", "static")
    out = stop(kit, old if option == "--overwrite" else new, tmp_path / "out", commits=1)
    assert (out / CACHE / DOCUMENT).exists()
    ended = kit.runs(new.argv(out, option))
    assert ended.status == 0, ended.err
    assert not differences(out, new.result)
    assert watched(ended)["most"] == {"transformer-hidden": 1}


def test_a_cache_is_removed_by_a_data_free_run_too(kit: Kit, tmp_path: Path) -> None:
    out = stop(kit, kit.work("t2v", "static"), tmp_path / "out", commits=1)
    argv = [*calib_argv(kit.model("t2v"), out, "--quant_type", "w8a8")]
    assert not kit.runs(argv).complaint(2)
    assert kit.runs([*argv, "--overwrite"]).status == 0
    assert not (out / CACHE).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "other"),
    [
        ("--overwrite", True),
        ("--no_resume", False),
        ("--no_resume", True),
    ],
)
def test_killed_while_it_starts_anew(kit: Kit, tmp_path: Path, option: str, other: bool) -> None:
    """From the new journal on nothing of the old run counts: neither half of a set, nor one of other weights."""
    work = kit.work("t2v", "static", "--read_ahead", 0)
    left = stop(kit, work, tmp_path / "left", commits=1)
    if other:
        model = Path(shutil.copytree(kit.model("t2v"), tmp_path / "model"))
        negate(model / SOURCE)
        work = CalibWork(model, work.options, {}, work.calls, 0.0)
        assert kit.runs(work.argv(tmp_path / "whole")).status == 0
        work = CalibWork(model, work.options, snapshot(tmp_path / "whole"), work.calls, 0.0)
    calls = kit.runs(work.argv(shutil.copytree(left, tmp_path / "all"), option)).calls
    beginning = next(n for n, call in enumerate(calls, 1) if call.startswith("posix_fallocate"))
    replaced = next(n for n, call in enumerate(calls, 1) if call.startswith("replace"))

    def one(number: int) -> str:
        out = Path(shutil.copytree(left, tmp_path / f"out{number}"))
        assert kit.runs(work.argv(out, option), Fault("before", number)).status == KILLED
        return finish(kit.runs, work, out)

    found = kit.runs.each(one, range(replaced + 1, beginning + 1))
    problems = [f"{call}: {problem}" for call, problem in zip(calls[replaced:], found, strict=False) if problem]
    assert not problems, report(problems)


def test_half_a_set_may_be_left(kit: Kit, tmp_path: Path) -> None:
    """In whatever order --no_resume discards: a file at a time, and killed behind the first."""
    work = kit.work("pair", "static", "--read_ahead", 0)
    left = stop(kit, work, tmp_path / "left", commits=1)
    assert len(list((left / CACHE).iterdir())) == 5

    def one(number: int) -> str:
        out = Path(shutil.copytree(left, tmp_path / f"{number}"))  # by whose name they are ordered
        killed = kit.runs(work.argv(out, "--no_resume"), Fault("after", 1, "unlink", CACHE))
        assert killed.status == KILLED and len(list((out / CACHE).iterdir())) == 4
        return finish(kit.runs, work, out)

    problems = [problem for problem in kit.runs.each(one, range(6)) if problem]
    assert not problems, report(problems)


def negate(path: Path) -> None:
    """Other weights under the same header."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + 3 :: 4] = bytes(byte ^ 0x80 for byte in content[start + 3 :: 4])
    path.write_bytes(content)


@pytest.mark.parametrize("option", ["", "--overwrite", "--no_resume"])
def test_a_foreign_file_in_the_cache(kit: Kit, tmp_path: Path, option: str) -> None:
    """`--overwrite` keeps what is not a model's, and so does the end of a run: not in the cache alone."""
    work = kit.work("t2v", "static")
    out = stop(kit, work, tmp_path / "out", commits=1)
    (out / CACHE / "notes.txt").write_text("mine")
    (out / CACHE / "holidays").mkdir()
    (out / CACHE / "holidays" / "beach.jpg").write_text("mine")
    ended = kit.runs(work.argv(out, *([option] if option else [])))
    assert ended.status == 0, ended.err
    left = {name for name in snapshot(out) if name.startswith(CACHE)}
    assert left == {f"{CACHE}/", f"{CACHE}/notes.txt", f"{CACHE}/holidays/", f"{CACHE}/holidays/beach.jpg"}


@pytest.mark.parametrize("what", ["file", "link to a file", "link to nowhere"])
def test_something_else_is_called_as_the_cache(kit: Kit, tmp_path: Path, what: str) -> None:
    work, out = kit.work("t2v", "static"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "target").write_text("mine")
    place = out / CACHE
    if what == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / ("target" if what == "link to a file" else "nowhere"))
    assert not kit.runs(work.argv(out)).complaint(2)  # the folder is not empty
    ended = kit.runs(work.argv(out, "--overwrite"))
    assert not ended.complaint(2) and CACHE in ended.errors[0], ended.err


def test_a_cache_that_is_a_link(kit: Kit, tmp_path: Path) -> None:
    """To another disk, say. What an earlier run by other settings has left there is not this run's."""
    work, out = kit.work("t2v", "static"), tmp_path / "out"
    other = CalibWork(work.model, ("--config_path", str(kit.recipe("static", shift=3.0))), {}, (), 0.0)
    elsewhere = stop(kit, other, tmp_path / "other", commits=1) / CACHE
    out.mkdir()
    (out / CACHE).symlink_to(elsewhere)
    ended = kit.runs(work.argv(out, "--overwrite"))
    found = snapshot(out)
    assert ended.complaint(2) == "" or {name: found.get(name) for name in work.result} == work.result


def test_a_full_disk_is_seen_before_the_work(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the set and two generations is counted as the output is."""
    work, out = kit.work("pair", "static"), tmp_path / "out"
    options = QuantOptions(str(work.model), out, config_path=Path(work.options[1]), device="cpu")
    plan = make_plan(options, download=False)
    usage, need = shutil.disk_usage(tmp_path), plan.bytes_to_write + plan.scratch_nbytes + DISK_RESERVE
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(UsageError, match="are free"):
        journals.open_journal(plan)
    assert not out.exists()


def test_the_set_and_two_generations_are_counted(kit: Kit, tmp_path: Path) -> None:
    work = kit.work("vace", "static")
    options = QuantOptions(str(work.model), tmp_path / "x", config_path=Path(work.options[1]), device="cpu")
    plan = make_plan(options, download=False)
    assert plan.calibration is not None
    made = stop(kit, work, tmp_path / "made", commits=3) / CACHE
    inputs = sum(path.stat().st_size for path in made.glob("inputs*"))
    assert inputs + 2 * plan.calibration.cache_nbytes("") <= plan.scratch_nbytes
