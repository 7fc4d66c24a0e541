"""Slow disks, slow devices, small budgets: always the same bytes, never more memory than planned, always an end.

Every run is a process of its own with a watchdog (`pressure_kit`): one that hangs is a failure with all stacks.
STREAMQ_KILLS=200 tries many more mixtures, STREAMQ_SEED=1 other ones.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calib_kit import CALIBRATION, unsound, write_recipe
from conftest import run, write_tiny
from diffusers import WanTransformer3DModel
from faults import JOURNAL, Snapshot, differences, snapshot
from pressure_kit import CHUNK, Job, Outcome, Server
from resume_kit import KILLS, SEED, THOROUGH

from streamq.device import STAGE_CHUNKS
from streamq.stages import Lane, Team

pytestmark = pytest.mark.xdist_group("pressure")  # one pair of servers

DEPTHS = (0, 1, 2, 5, 64)
DEPTHS_TO_TRY = [pytest.param(depth, marks=pytest.mark.slow) if depth in (1, 5) else depth for depth in DEPTHS]
MIXTURES = max(1, KILLS // 20)
STAGES = ("read", "write", "sync", "hash", "method")
SOON = 6.0  # seconds from a fault to the end, on a machine that is busy; what is queued would take much longer
KINDS: dict[str, tuple[str, ...]] = {
    "one": ("--quant_type", "w8a8", "--format", "mindie"),
    "several": ("--quant_type", "w8a8", "--format", "mindie,lightx2v"),
    "grouped": ("--quant_type", "w4a16", "--format", "gguf"),
    "calibrated": ("--config_path", "smooth.yaml", "--calib", "set"),
}


class Bench:
    """Models, a calibration set, a server, and what undisturbed runs made."""

    def __init__(self, folder: Path, device: str, warm: str) -> None:
        self.folder, self.device = folder, device
        self._count = 0
        self._whole: dict[tuple[str, int], tuple[Snapshot, Outcome]] = {}
        (folder / device).mkdir()
        self.server = Server(folder / device, device, self.job(warm, 0).argv)

    def job(self, kind: str, depth: int, *more: object, blocks: int = 2, **how: Any) -> Job:
        """A command with an output folder of its own."""
        model = self.folder / f"model{blocks}"
        if not model.exists():
            write_tiny(model, "t2v-1.3B", blocks=blocks)
        self._count += 1
        given = [str(self.folder / word) if word in ("smooth.yaml", "set") else word for word in KINDS[kind]]
        options = ["--model_path", model, "--save_path", self.folder / f"{self.device}{self._count}", *given]
        options += ["--read_ahead", depth, "--device", self.device, "--quiet", *more]
        if kind == "calibrated" and self.device == "npu":  # whose server has not imported diffusers
            how["limit"] = 120.0
        return Job(("quant", *map(str, options)), **how)

    def whole(self, kind: str, blocks: int = 2) -> tuple[Snapshot, Outcome]:
        """What nobody has disturbed makes, at read_ahead 0."""
        if (kind, blocks) not in self._whole:
            job = self.job(kind, 0, blocks=blocks)
            (outcome,) = self.server.run([job])
            assert outcome.status == 0, outcome.err
            self._whole[kind, blocks] = snapshot(out(job)), outcome
        return self._whole[kind, blocks]

    def run(self, jobs: list[tuple[str, Job]], blocks: int = 2) -> list[Outcome]:
        """Jobs that must end well, each with its kind."""
        wholes = [self.whole(kind, blocks) for kind, _ in jobs]
        outcomes = self.server.run([job for _, job in jobs])
        for (_, job), (result, _), outcome in zip(jobs, wholes, outcomes, strict=True):
            about = f"{' '.join(job.argv)}, slow: {job.slow}, seed {job.seed}"
            assert not outcome.problems, about + "".join(outcome.problems)
            assert (outcome.status, outcome.threads) == (0, []), about + outcome.err
            assert not differences(out(job), result), about
            shutil.rmtree(out(job))
        return outcomes


def out(job: Job) -> Path:
    return Path(job.argv[job.argv.index("--save_path") + 1])


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pressure")


@pytest.fixture(name="cpu", scope="module")
def cpu_fixture(folder: Path) -> Iterator[Bench]:
    write_tiny(folder / "model2", "t2v-1.3B", blocks=2)
    write_recipe(folder / "smooth.yaml", "w8a8_smooth", CALIBRATION | {"next_input": "quantized"})
    argv = ["calib", "--model_path", folder / "model2", "--save_path", folder / "set", "--size", "64*64"]
    made = run(*argv, "--frame_num", 5, "--num_samples", 3, "--device", "cpu", "--quiet")
    assert made.returncode == 0, made.stderr
    bench = Bench(folder, "cpu", "calibrated")
    yield bench
    bench.server.close()


@pytest.fixture(name="npu", scope="module")
def npu_fixture(folder: Path) -> Iterator[Bench]:
    bench = Bench(folder, "npu", "several")
    yield bench
    bench.server.close()


def mixture(*what: object, stages: tuple[str, ...] = STAGES) -> dict[str, Any]:
    """Slow stages, drawn: the first of `what` that is a stage among them."""
    rng = random.Random(repr((SEED, *what)))
    chosen = {*rng.sample(stages, 2), *(one for one in what if one in stages)}
    slow = {one: (rng.choice((0.001, 0.003, 0.006)), rng.choice((0.0, 0.0003))) for one in sorted(chosen)}
    return {"slow": slow, "seed": rng.randrange(1, 1 << 30)}


def check_bounds(outcome: Outcome, depth: int, *, whole_blocks: bool = False) -> None:
    """What never may be more than the plan and the read-ahead say."""
    most, plan = outcome.most, outcome.plan
    assert 0 < most["arena"] <= plan["arena"]
    assert max(most["writer"], most["committer"]) <= max(1, depth), most
    assert most["hasher"] <= plan["files"]
    if not whole_blocks:  # `depth` steps ahead of the one that is waited for
        assert most["reader"] <= depth + 1
        assert most["regions"] <= 2 * depth + 1


# Slow, and nothing else.


@pytest.mark.parametrize("depth", DEPTHS_TO_TRY)
def test_the_same_bytes_however_slow(cpu: Bench, depth: int) -> None:
    for turn in range(MIXTURES):
        jobs = [
            (kind, cpu.job(kind, depth, **mixture(STAGES[(place + DEPTHS.index(depth)) % 5], kind, depth, turn)))
            for place, kind in enumerate(KINDS)
        ]
        for (kind, _), outcome in zip(jobs, cpu.run(jobs), strict=True):
            check_bounds(outcome, depth, whole_blocks=kind == "calibrated")


@pytest.mark.parametrize("depth", DEPTHS_TO_TRY)
def test_the_same_bytes_however_slow_the_device(npu: Bench, depth: int) -> None:
    """Copies in, copies out and arithmetic; nothing is ever pinned but the two rings."""
    stages = (*STAGES, "copy_in", "copy_out")
    for turn in range(MIXTURES):
        how = mixture(stages[-1 - (DEPTHS.index(depth) + turn) % 7], depth, turn, stages=stages)
        how["slow"]["compute"] = (0.0001, 0.0)
        kind = ("several", "one")[(DEPTHS.index(depth) + turn) % 2]
        jobs = [(kind, npu.job(kind, depth, **how))]
        for outcome in npu.run(jobs):
            check_bounds(outcome, depth)
            check_device(outcome)
            # A row has a scale, which is nothing on a real layer; here the allocator rounds it up.
            small = outcome.most["regions"] * outcome.plan["schemes"] * 1024
            assert outcome.most["device"] <= outcome.plan["device"] + small


def check_device(outcome: Outcome) -> None:
    assert outcome.most["pinned"] == 2 * STAGE_CHUNKS * CHUNK
    assert (outcome.most["alive"], outcome.most["pageable"]) == (0, 0)


@pytest.mark.slow
def test_calibrated_on_a_slow_device(cpu: Bench, npu: Bench) -> None:
    """Blocks are read ahead while inputs are read through the same ring. What a replay takes does not depend on it."""
    alone = npu.whole("calibrated")[1]
    depths = (5,) if not THOROUGH else DEPTHS
    jobs = [("calibrated", npu.job("calibrated", depth, **mixture("copy_in", depth))) for depth in depths]
    for depth, outcome in zip(depths, npu.run(jobs), strict=True):
        check_bounds(outcome, depth, whole_blocks=True)
        check_device(outcome)
        beyond = [one.most["device"] - one.plan["device"] for one in (outcome, alone)]
        assert beyond[0] <= beyond[1]


# Small budgets.


def least(bench: Bench, job: Job, option: str) -> int:
    """The smallest budget that is accepted; one byte less is refused, and nothing is written."""
    (refused,) = bench.server.run([replace(job, argv=(*job.argv, option, "1"))])
    found = re.search(r"can do with is (\d+)", refused.err)
    assert refused.status == 2 and found is not None, refused.err
    (refused,) = bench.server.run([replace(job, argv=(*job.argv, option, str(int(found[1]) - 1)))])
    assert refused.status == 2 and f"a budget of {int(found[1]) - 1} bytes" in refused.err
    assert not out(job).exists()
    return int(found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_budget_is_enough(cpu: Bench, kind: str) -> None:
    depths = (0, 64) if kind != "calibrated" else (1, 64)
    smallest = {depth: least(cpu, cpu.job(kind, depth), "--max_host_memory") for depth in depths}
    jobs = [
        (kind, cpu.job(kind, depth, "--max_host_memory", budget, **mixture("write", kind, depth, budget)))
        for depth, budget in smallest.items()
    ]
    for (depth, _), outcome in zip(smallest.items(), cpu.run(jobs), strict=True):
        check_bounds(outcome, depth, whole_blocks=kind == "calibrated")
        if kind != "calibrated":
            assert outcome.plan["arena"] == outcome.plan["largest"]


def test_the_smallest_budget_of_a_device(npu: Bench) -> None:
    smallest = least(npu, npu.job("several", 5), "--max_device_memory")
    given = ("--max_device_memory", smallest)
    jobs = [("several", npu.job("several", 5, *given, **mixture(stage, "least"))) for stage in ("write",)]
    for outcome in npu.run(jobs):
        check_bounds(outcome, 5)
        check_device(outcome)
        assert outcome.plan["arena"] == outcome.plan["largest"]
        assert outcome.most["device"] <= outcome.plan["device"] <= smallest


def test_memory_does_not_grow_behind_a_slow_writer(cpu: Bench) -> None:
    """A hundred times slower than the reader: what lies between the stages is `read_ahead` layers, of any number."""
    slow = {"write": (0.005, 0.0), "read": (0.00005, 0.0)}
    few, many = (
        cpu.run([("grouped", cpu.job("grouped", 2, blocks=blocks, slow=slow, sample=40))], blocks)[0]
        for blocks in (1, 3)
    )
    assert few.plan["arena"] == many.plan["arena"]
    for outcome in (few, many):
        check_bounds(outcome, 2)
        assert outcome.most["writer"] == 2
        assert outcome.most["layers"] <= (2 + 1) * outcome.plan["schemes"]
    assert (
        abs(many.most["tensors"] - few.most["tensors"]) < few.plan["arena"]
    )  # two more blocks are 18 layers, the arena has 5


# Something fails, or somebody stops it, while everything else is full.

# stage -> at which call, and what is so slow that it would take longer than SOON to end all that is queued by then.
FULL: dict[str, tuple[int, dict[str, tuple[float, float]]]] = {
    "read": (30, {"write": (0.05, 0.0), "sync": (0.2, 0.0)}),
    "method": (12, {"write": (0.05, 0.0), "read": (0.001, 0.0)}),
    "write": (12, {"method": (0.4, 0.0), "read": (0.001, 0.0)}),
    "hash": (12, {"method": (0.4, 0.0), "sync": (0.1, 0.0)}),
    "sync": (3, {"read": (0.01, 0.0), "method": (0.15, 0.0)}),
    "commit": (1, {"read": (0.01, 0.0), "method": (0.15, 0.0)}),
}
ACTS: tuple[str | int, ...] = ("error", int(signal.SIGINT), int(signal.SIGTERM))


def check_stopped(bench: Bench, jobs: list[tuple[str, Job]], blocks: int = 2) -> None:
    """Each ends soon and says why, leaves nothing half, and the same command goes on to the same bytes."""
    wholes = [bench.whole(kind, blocks)[0] for kind, _ in jobs]
    for (_, job), result, outcome in zip(jobs, wholes, bench.server.run([job for _, job in jobs]), strict=True):
        about = f"{job.act} at {job.fault} {job.at}, {' '.join(job.argv)}: {outcome.err[-2000:]}"
        assert outcome.fired and not outcome.problems, about + "".join(outcome.problems)
        errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in outcome.err, about
        if job.act == "error":
            due = "No space left" if job.fault in ("write", "sync") else f"fault in {job.fault}"
            assert outcome.status == 1 and due in errors[0], about
        else:
            assert outcome.status == 130 and "the same command resumes" in errors[0], about
        # What a reader or a method failed at is told in its turn: the steps before it are written first.
        in_turn = job.act == "error" and job.fault in ("read", "method")
        assert outcome.after < SOON * (3 if in_turn else 1), f"{outcome.after:.1f} s after the fault: {about}"
        assert job.times > 1 or not outcome.threads, f"{outcome.threads} {about}"
        lines = (out(job) / JOURNAL).read_bytes().splitlines(keepends=True)
        assert all(line.endswith(b"\n") and json.loads(line) for line in lines), about
        assert not unsound(out(job), result), about
    bench.run([(kind, Job(job.argv)) for kind, job in jobs], blocks)


@pytest.mark.parametrize("act", ACTS)
def test_a_fault_ends_a_run_whose_queues_are_full(cpu: Bench, act: str | int) -> None:
    jobs = []
    for place, (stage, (at, slow)) in enumerate(FULL.items()):
        if act != "error" and not THOROUGH and ACTS.index(act) != 1 + place % 2:
            continue  # each stage has one of the signals
        kind = ("calibrated", "several", "one")[(place + ACTS.index(act)) % 3]
        depth = (64, 2, 5, 1)[(place // 3 + ACTS.index(act)) % 4]
        if (stage, kind) == ("read", "calibrated"):
            at += 70  # the set is read first
        jobs.append((kind, cpu.job(kind, depth, slow=slow, fault=stage, at=at, act=act)))
    check_stopped(cpu, jobs)


def test_a_fault_ends_a_run_on_a_slow_device(npu: Bench) -> None:
    slow = {"copy_out": (0.05, 0.0), "copy_in": (0.002, 0.0)}
    faults = [("copy_in", 60, ACTS[1]), ("read", 60, "error"), ("copy_out", 12, ACTS[2]), ("write", 9, "error")]
    depths = (2, 5, 64, 1)
    chosen = range(4) if THOROUGH else random.Random(f"{SEED} device").sample(range(4), 2)
    jobs = [
        ("several", npu.job("several", depths[n], slow=slow, fault=faults[n][0], at=faults[n][1], act=faults[n][2]))
        for n in chosen
    ]
    check_stopped(npu, jobs)


@pytest.mark.parametrize("depth", [2, 64])
def test_nothing_is_begun_behind_a_failed_job(depth: int) -> None:
    """Whoever hands jobs on hears of it with the next one, however many more would fit."""
    with closing(Lane(depth, "test")) as lane, pytest.raises(ZeroDivisionError):
        lane.submit(lambda: 1 / 0)
        wait(list(lane._outstanding))
        lane.submit(pytest.fail)


@pytest.mark.parametrize("stage", [pytest.param("write", marks=pytest.mark.slow), "commit"])
def test_who_presses_twice_loses_nothing(cpu: Bench, stage: str) -> None:
    """A second Ctrl-C while the first one waits for what is being written."""
    at, how = {"write": 30, "commit": 1}[stage], {"act": int(signal.SIGINT), "times": 2, "pause": 0.05}
    slow = {"write": (0.1, 0.0), "commit": (0.3, 0.0)}
    kinds = ("several", "calibrated")
    check_stopped(cpu, [(kind, cpu.job(kind, 5, slow=slow, fault=stage, at=at, **how)) for kind in kinds])


def test_the_first_error_is_the_one_that_is_told(cpu: Bench) -> None:
    """Two files are hashed at once: the second one's hash is only called off, which is nobody's error."""
    team, failed = Team(2, "team"), threading.Event()

    def called_off() -> None:
        assert failed.wait(10)
        raise CancelledError("an earlier job of this lane failed")

    def fails() -> None:
        failed.set()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), closing(team):
        team.run([called_off, fails])
    slow = {"method": (0.01, 0.0), "hash": (0.01, 0.0)}
    ats = (6, 7, 8) if not THOROUGH else range(1, 60)
    check_stopped(cpu, [("several", cpu.job("several", 1, slow=slow, fault="hash", at=at)) for at in ats])


# Videos.


@pytest.fixture(name="deep", scope="module")
def deep_fixture(folder: Path) -> Path:
    """A transformer of eight blocks."""
    sizes: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "text_dim": 64,
        "freq_dim": 64, "ffn_dim": 512, "num_layers": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    WanTransformer3DModel(**sizes).save_pretrained(folder / "deep")
    return folder / "deep"


def video(deep: Path, room: int, forwards: int = 2, **how: Any) -> Job:
    """Forwards of a transformer whose kept blocks may take `room` bytes."""
    return Job((str(deep), str(room), str(forwards)), program="forward", **how)


def test_a_slow_disk_makes_the_same_video_in_the_same_memory(cpu: Bench, deep: Path) -> None:
    (plain,) = cpu.server.run([video(deep, 1 << 40)])
    assert plain.status == 0, plain.err
    block, rest = plain.plan["block"], plain.plan["rest"]
    rooms = (0, block - 1, block, 3 * block + 1, 8 * block)
    jobs = [video(deep, room, slow={"read": (0.001, 0.00005)}, seed=number + 1) for number, room in enumerate(rooms)]
    for room, outcome in zip(rooms, cpu.server.run(jobs), strict=True):
        assert (outcome.status, outcome.problems, outcome.threads) == (0, [], []), outcome.err
        assert outcome.made == plain.made and len(set(plain.made)) == 1
        kept = min(room // block, 8) * block
        assert outcome.most["resident"] <= kept
        assert outcome.most["bytes"] <= rest + min(kept + 2 * block, 8 * block)


def test_an_error_of_the_reading_thread_ends_a_video(cpu: Bench, deep: Path) -> None:
    (plain,) = cpu.server.run([video(deep, 0, 1)])
    total = plain.calls["read"]
    slow = {"read": (0.01, 0.0)}
    faults: list[tuple[int, str | int]] = [(total // 2, act) for act in ACTS] + [(total - 1, "error")]
    jobs = [video(deep, 0, 1, slow=slow, fault="read", at=at, act=act) for at, act in faults]
    *stopped, late = cpu.server.run(jobs)
    for job, outcome in zip(jobs, stopped, strict=False):
        assert outcome.fired and not outcome.problems and not outcome.threads, outcome.err
        assert outcome.status == (1 if job.act == "error" else 130), outcome.err
        assert job.act != "error" or "fault in read" in outcome.err
        assert outcome.after < SOON and not outcome.made
    # The first block is read again for a forward that never comes: nobody needs it, and nobody misses it.
    assert (late.status, late.made, late.threads) == (0, plain.made, []), late.err
