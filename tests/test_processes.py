"""Several processes on one run: the bytes of one, whoever is lost on the way, and one message where all fail."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from calib_kit import Kit
from calib_kit import kit as kit  # the fixture
from conftest import ROOT, Tiny, run
from faults import JOURNAL, Ended, Fault, Runs, Started, differences, fresh, snapshot
from resume_kit import KILLED, THOROUGH, Models, Work, Works
from torch.distributed import TCPStore

from streamq import together
from streamq.errors import DamagedError, RunError, UsageError
from streamq.methods.statistics import InputStatistics, Wanted
from streamq.options import QuantOptions
from streamq.plan import Plan
from streamq.planner import make_plan
from streamq.ranks import ALONE, Ranks, launched

CPU = torch.device("cpu")
pytestmark = pytest.mark.xdist_group("calibrated")  # one process makes the servers


_stores: list[TCPStore] = []  # what a launcher keeps for its processes, here as long as the tests run


def environment(count: int) -> dict[str, str]:
    """What a launcher gives to all processes of a run."""
    _stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_stores[-1].port)}
    return address | {"WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def start(runs: Runs, argv: Sequence[str], count: int, faults: Mapping[int, Fault] | None = None) -> list[Started]:
    """`count` processes of one run, as a launcher would start them."""
    env, given = environment(count), faults or {}
    return [runs.start(argv, given.get(number), env | {"RANK": str(number)}) for number in range(count)]


def ended(started: Iterable[Started]) -> list[Ended]:
    return [one.wait() for one in started]


def launch(runs: Runs, argv: Sequence[str], count: int, faults: Mapping[int, Fault] | None = None) -> list[Ended]:
    return ended(start(runs, argv, count, faults))


def check(found: list[Ended], out: Path, work: Work) -> None:
    assert [one.status for one in found] == [0] * len(found), [one.err[-500:] for one in found]
    assert not differences(out, work.result), differences(out, work.result)
    shutil.rmtree(out)


# 1. The same bytes.


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("model", "depth"), [("three", 0), ("pair", 2)])
def test_data_free(runs: Runs, works: Works, tmp_path: Path, model: str, depth: int, count: int) -> None:
    work = works(model, "--format", "mindie,lightx2v,diffusers,comfyui")
    out = tmp_path / "out"
    check(launch(runs, work.argv(out, "--read_ahead", depth), count), out, work)


def test_more_processes_than_layers(runs: Runs, works: Works, tmp_path: Path) -> None:
    work = works("small", "--format", "mindie")
    check(launch(runs, work.argv(tmp_path / "out"), 6), tmp_path / "out", work)


def test_gguf_with_zeros_between_tensors(runs: Runs, models: Models, tmp_path: Path) -> None:
    argv = ["quant", "--model_path", str(models("three")), "--device", "cpu"]
    argv += ["--quant_type", "w8a16", "--format", "gguf"]
    assert runs([*argv, "--save_path", str(tmp_path / "one")]).status == 0
    found = launch(runs, [*argv, "--save_path", str(tmp_path / "two")], 2)
    assert [one.status for one in found] == [0, 0], found
    assert not differences(tmp_path / "two", snapshot(tmp_path / "one"))


@pytest.mark.parametrize(
    ("model", "recipe", "count"),
    [("t2v", "smooth", 3), ("three", "static", 2), ("pair", "smooth", 2), ("vace", "gptq", 2)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in
       (("t2v", "smooth", 2), ("vace", "smooth_all", 3), ("t2v", "gptq_float", 3), ("ti2v", "static", 2))],
)  # fmt: skip
def test_calibrated(kit: Kit, tmp_path: Path, model: str, recipe: str, count: int) -> None:
    """Three samples: with two processes one of them has two, the other one."""
    work = kit.work(model, recipe)
    out = tmp_path / "out"
    check(launch(kit.runs, work.argv(out), count), out, work)


def test_each_replays_its_samples_alone(kit: Kit, tmp_path: Path) -> None:
    work = kit.work("three", "smooth")
    calls = [sum(call.startswith("replay") for call in one.calls) for one in launch(kit.runs, work.argv(tmp_path), 3)]
    alone = sum(call.startswith("replay") for call in work.calls)
    assert calls == [alone // 3] * 3 and alone == 3 * 3, (calls, alone)


# 2. Whoever is lost.


def lost(runs: Runs, work: Work, out: Path, who: int, fault: Fault, again: int, count: int = 2) -> str:
    """One of the processes is killed; the others end; any number goes on. What is wrong, if anything."""
    began = time.monotonic()
    found = launch(runs, work.argv(fresh(out)), count, {who: fault})
    taken = time.monotonic() - began
    others = [one for number, one in enumerate(found) if number != who]
    problems = [] if found[who].status == KILLED else [f"process {who}: {found[who].status} {found[who].err[-300:]}"]
    problems += [f"survivor: {one.status} {one.err[-400:]}" for one in others if one.status not in (0, 1)]
    problems += [f"not one message: {one.err[-400:]}" for one in others if one.status == 1 and len(one.errors) > 1]
    problems += [f"ended after {taken:.0f} s"] if taken > 60 else []
    then = launch(runs, work.argv(out), again)
    problems += [f"again: {one.status} {one.err[-400:]}" for one in then if one.status != 0]
    problems += [differences(out, work.result)] if not problems else []
    shutil.rmtree(out)
    return "; ".join(problem for problem in problems if problem)


@pytest.mark.parametrize("who", [0, 1])
def test_a_lost_process(runs: Runs, works: Works, tmp_path: Path, who: int) -> None:
    work = works("three", "--format", "mindie,lightx2v")
    alone = launch(runs, work.argv(tmp_path / "calls"), 2)
    numbers = range(1, len(alone[who].calls) + 1)
    chosen = numbers if THOROUGH else sorted(random.Random(who).sample(numbers, 4))
    for number in chosen:
        problem = lost(runs, work, tmp_path / "out", who, Fault("before", number), 1 + number % 3)
        assert not problem, f"at call {number} ({alone[who].calls[number - 1]}): {problem}"


@pytest.mark.parametrize("who", [0, 1])
def test_a_lost_process_while_calibrating(kit: Kit, tmp_path: Path, who: int) -> None:
    work = kit.work("three", "smooth")
    alone = launch(kit.runs, work.argv(tmp_path / "calls"), 2)
    assert [one.status for one in alone] == [0, 0]
    numbers = [n for n, call in enumerate(alone[who].calls, 1) if not call.startswith(("open", "mkdir"))]
    for number in numbers if THOROUGH else sorted(random.Random(who + 7).sample(numbers, 3)):
        problem = lost(kit.runs, work, tmp_path / "out", who, Fault("before", number), 1 + number % 3)
        assert not problem, f"at call {number} ({alone[who].calls[number - 1]}): {problem}"


def test_one_is_killed_and_the_others_say_so(runs: Runs, works: Works, tmp_path: Path) -> None:
    work = works("three", "--format", "mindie")
    found = launch(runs, work.argv(tmp_path / "out"), 3, {2: Fault("before", 1, "pwrite")})
    assert [one.status for one in found] == [1, 1, KILLED], [one.err for one in found]
    errors = [line for one in found for line in one.errors]
    assert len(errors) == 1 and "one of the 3 processes of this run is gone" in errors[0], errors
    assert "the same command goes on" in errors[0] and (tmp_path / "out" / JOURNAL).exists()
    assert runs(work.argv(tmp_path / "out")).status == 0 and not differences(tmp_path / "out", work.result)


@pytest.mark.parametrize("who", [0, 1])
def test_a_full_disk(runs: Runs, works: Works, tmp_path: Path, who: int) -> None:
    """Whoever meets it says so, once; what is committed is kept."""
    work, out = works("three", "--format", "mindie,lightx2v"), tmp_path / "out"
    found = launch(runs, work.argv(out), 2, {who: Fault("error", 9, "pwrite", code=errno.ENOSPC)})
    assert [one.status for one in found] == [1, 1], [one.err for one in found]
    assert not found[who].complaint(1) and "make room" in found[who].errors[0] and not found[1 - who].errors
    assert (out / JOURNAL).exists() and not any(path.suffix == ".safetensors" for path in out.rglob("*"))
    check([runs(work.argv(out))], out, work)


def test_terminated(runs: Runs, works: Works, tmp_path: Path) -> None:
    """All of them, as a launcher does it when it is stopped."""
    work = works("large", "--format", "mindie")
    started = start(runs, work.argv(tmp_path / "out"), 2)
    while not (tmp_path / "out" / JOURNAL).exists():
        time.sleep(0.01)
    for one in started:
        one.send(signal.SIGTERM)
    found = ended(started)
    assert all(one.status in (1, 130) for one in found), [one.err for one in found]
    assert sum(len(one.errors) for one in found) == 1, [one.err for one in found]
    check(launch(runs, work.argv(tmp_path / "out"), 2), tmp_path / "out", work)


# 3. One message.


def test_the_same_wrong_use_is_told_once(runs: Runs, models: Models, tmp_path: Path) -> None:
    argv = ["quant", "--model_path", str(models("small")), "--quant_type", "w9", "--save_path", str(tmp_path / "out")]
    found = launch(runs, argv, 3)
    assert [one.status for one in found] == [2, 2, 2]
    assert len([line for one in found for line in one.errors]) == 1 and not (tmp_path / "out").exists()


def test_a_damaged_layer_is_told_once(runs: Runs, own_model: Models, tmp_path: Path) -> None:
    model = own_model("three")
    path = next(model.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-4:] = b"\0\0\xc0\x7f"  # NaN, in the last tensor
    path.write_bytes(content)
    argv = ["quant", "--model_path", str(model), "--quant_type", "w8a8", "--device", "cpu"]
    found = launch(runs, [*argv, "--save_path", str(tmp_path / "out")], 2)
    errors = [line for one in found for line in one.errors]
    assert [one.status for one in found] == [1, 1] and len(errors) == 1 and "NaN" in errors[0], [
        one.err for one in found
    ]


def test_errors_go_from_process_to_process() -> None:
    """As the first one's failure does, with its kind and its words."""
    for error in (UsageError("a"), RunError("b"), DamagedError("c"), DamagedError("d", "make it anew")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.status) == (type(error), str(error), error.status)


def test_not_the_same_command(runs: Runs, models: Models, tmp_path: Path) -> None:
    argv = ["quant", "--model_path", str(models("small")), "--save_path", str(tmp_path / "out"), "--device", "cpu"]
    env, types = environment(2), ("w8a8", "fp8")
    found = ended(
        [
            runs.start([*argv, "--quant_type", kind, "--format", "lightx2v"], None, env | {"RANK": str(number)})
            for number, kind in enumerate(types)
        ]
    )
    assert [one.status for one in found] == [2, 2], [one.err for one in found]
    assert len([line for one in found for line in one.errors]) == 1 and not (tmp_path / "out").exists()


def test_other_commands_are_one_process(runs: Runs, models: Models, tmp_path: Path) -> None:
    found = launch(runs, ["plan", "--model_path", str(models("small")), "--save_path", str(tmp_path)], 2)
    assert [one.status for one in found] == [2, 2]
    assert "only quant divides its work" in "".join(one.err for one in found)


def test_finished_already(runs: Runs, works: Works, tmp_path: Path) -> None:
    work = works("small", "--format", "mindie")
    assert runs(work.argv(tmp_path / "out")).status == 0
    found = launch(runs, work.argv(tmp_path / "out"), 2)
    assert [one.status for one in found] == [0, 0] and "already done" in found[0].out and not found[1].out


def test_environment(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    assert launched() == 1
    for name, value in {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    result = run("quant", "--model_path", tiny())
    assert result.returncode == 2 and "RANK=2 WORLD_SIZE=2" in result.stderr
    assert Ranks(1, 2).device("cpu") == "cpu" and Ranks(1, 2).device("cuda:3") == "cuda:3"
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert Ranks(13, 16).device("npu") == "npu:5" and ALONE.device("npu") == "npu"


# 4. The parts.


def test_shares_cover_every_step_once(kit: Kit) -> None:
    for recipe in ("smooth_all", "static", "gptq"):
        options = QuantOptions(model_path=str(kit.model("vace")), save_path=Path("/nowhere"), device="cpu",
                               config_path=kit.recipe(recipe))  # fmt: skip
        plan: Plan = make_plan(options, download=False)
        for unit in plan.units:
            for count in (1, 2, 3, 7):
                shares = [together.share(unit, plan, Ranks(number, count)) for number in range(count)]
                owned = [[id(step) for step, own in zip(one.steps, one.own, strict=True) if own] for one in shares]
                assert sorted(sum(owned, [])) == sorted(id(step) for step in unit.steps)
                for one in shares:
                    assert len(one.steps) == len(unit.steps) if unit.replayed else all(one.own)
                    assert all(made or not own for made, own in zip(one.made, one.own, strict=True))
                groups: dict[str, set[int]] = {}
                for number, one in enumerate(shares):
                    for step, own in zip(one.steps, one.own, strict=True):
                        for smooth in (output.scheme and output.scheme.smooth for output in step.outputs):
                            if own and smooth:
                                groups.setdefault(smooth.group, set()).add(number)
                assert all(len(who) == 1 for who in groups.values()), groups


def test_statistics_of_samples_seen_elsewhere() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 40, 24).bfloat16() * 3**n for n in range(5)]
    wanted = Wanted(mean=True, histogram=True, gram=True, rows=30, gram_rows=50)
    alone = InputStatistics(24, wanted, 5, CPU)
    whole, elsewhere = InputStatistics(24, wanted, 5, CPU), InputStatistics(24, wanted, 5, CPU)
    for number, x in enumerate(inputs):
        alone.update(x)
        whole.add((elsewhere if number % 2 else whole).look(x, number))
    for name in ("columns_lo", "columns_hi", "sample_amax", "gram", "mean", "rows"):
        assert torch.equal(getattr(alone, name), getattr(whole, name)), name
    assert alone.histogram is not None and whole.histogram is not None
    assert (
        torch.equal(alone.histogram.counts, whole.histogram.counts) and alone.histogram.limit == whole.histogram.limit
    )
    with pytest.raises(ValueError, match="sample 3 after 5"):
        whole.add(elsewhere.look(inputs[3], 3))


# 5. The launchers themselves.


@pytest.mark.parametrize(
    "launcher",
    [["torch.distributed.run", "--nproc-per-node", "2"],
     pytest.param(["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"], marks=pytest.mark.slow)],
    ids=["torchrun", "accelerate"],
)  # fmt: skip
def test_launched(works: Works, tmp_path: Path, launcher: list[str]) -> None:
    work = works("three", "--format", "mindie,lightx2v")
    command = [sys.executable, "-m", *launcher, "-m", "streamq", *work.argv(tmp_path / "out")]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not differences(tmp_path / "out", work.result)
