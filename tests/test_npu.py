"""`--device npu`: the whole command on the stand-in of `npu_standin.py`, and what users without CANN are told.

The stand-in renames a global backend, so it lives in a child: `python tests/test_npu.py`, JSON in, JSON out. Tensors go
through the pinned ring in chunks of CHUNK bytes, an odd number, so that each of them goes round the ring several times.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import ROOT, run, run_process, write_tiny

from streamq.device import STAGE_CHUNKS
from streamq.methods.int8 import DEVICE_TILE_BYTES
from streamq.plan import DEVICE_SCRATCH

pytestmark = pytest.mark.xdist_group("npu")  # one process makes what all of them look at

CHUNK = 1999
TILE = 8192  # bytes: 32 rows of the tiny model's 64 columns, in fp32
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("t2v-1.3B", {"blocks": 3}),
    "bf16": ("i2v-14B", {"dtype": "bf16", "layout": "diffusers"}),
    "small": ("t2v-1.3B", {"dtype": "bf16", "blocks": 1}),
    "experts": ("t2v-A14B", {"dtype": "bf16"}),
}


@dataclass(frozen=True)
class Job:
    """One command in the child. `mse`: with that method. `sabotage`: see there. `stop_after`: commits before Ctrl-C.

    `capacity`: bytes of a card. `into`: the output folder, where it is not one of the job's own.
    """

    model: str = "fp32"
    formats: str = "mindie"
    read_ahead: int = 1
    match: str = ""
    mse: bool = False
    device: str = "npu"
    sabotage: str = ""
    stop_after: int = -1
    capacity: int = 64 << 30
    into: str = ""

    @property
    def name(self) -> str:
        """Short, and unique among jobs that differ."""
        parts = (self.model, self.formats, f"ahead{self.read_ahead}", self.match, "mse" * self.mse, self.device)
        return self.into or "-".join(filter(None, (*parts, self.sabotage)))


@dataclass
class Outcome:
    """What a job left. `plan`: its figures."""

    code: int
    stderr: str
    counts: dict[str, Any]
    live: list[int]
    plan: dict[str, int] = field(default_factory=dict)


def arguments(job: Job, folder: Path, save: Path, device: str) -> list[str]:
    """The command line of a job."""
    recipe = ["--config_path", str(folder / "mse.yaml")] if job.mse else ["--quant_type", "w8a8"]
    match = ["--match", job.match] if job.match else []
    return [
        "quant", "--model_path", str(folder / job.model), "--save_path", str(save), *recipe, "--format", job.formats,
        "--read_ahead", str(job.read_ahead), "--device", device, "--quiet", *match,
    ]  # fmt: skip


# --- the child ---------------------------------------------------------------------------------------------------


class _Never:
    """An event that nobody waits for."""

    def __init__(self, event: Any) -> None:
        self.record = event.record

    def synchronize(self) -> None:
        """Forgotten."""


def _sabotage(name: str) -> Any:
    """Take one of the waits out of `Accelerator`, as a mistake would."""
    from streamq.device import accelerator
    from streamq.device.cpu import host_bytes

    kind, load = accelerator.Accelerator, accelerator.Accelerator.load

    def hasty_load(self: Any, read: Any, into: Any) -> Any:
        self._ring_in = [(chunk, _Never(copied)) for chunk, copied in self._ring_in]
        return load(self, read, into)

    changes: dict[str, tuple[str, Any]] = {
        "work does not wait for the load": ("wait", lambda self, token: None),
        "store does not wait for the work": ("mark", lambda self: self.module.Event()),
        "bytes are taken before they arrive": ("_arrived", staticmethod(lambda chunk: host_bytes(chunk[0]))),
        "chunks are filled before they are free": ("load", hasty_load),
    }
    return mock.patch.object(kind, *changes[name])


SABOTAGE = (
    "work does not wait for the load",
    "store does not wait for the work",
    "bytes are taken before they arrive",
    "chunks are filled before they are free",
)


@contextmanager
def _interrupted(commits: int) -> Iterator[None]:
    """Ctrl-C instead of the next commit."""
    from streamq.journal import Journal

    append, left = Journal.append, commits

    def count(self: Journal, commit: Any) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        append(self, commit)

    with mock.patch.object(Journal, "append", count):
        yield


def _figures(plan: Any) -> dict[str, int]:
    steps = [step for unit in plan.units for step in unit.steps if step.held]
    return {
        "arena": plan.arena_nbytes,
        "peak": plan.peak_device_bytes,
        "in": sum(step.nbytes for step in steps),
        "out": sum(place.nbytes for step in steps for output in step.outputs for place in output.places),
        "passed": plan.bytes_to_read - sum(step.nbytes for step in steps),
    }


def _do(job: Job, folder: Path, save: Path) -> Outcome:
    """Run one job on the stand-in."""
    import npu_standin

    from streamq import pipeline

    found: dict[str, int] = {}
    work = pipeline.run

    def watched(plan: Any, *rest: Any) -> Any:
        found.update(_figures(plan))
        return work(plan, *rest)

    with ExitStack() as changes:
        changes.enter_context(mock.patch.object(npu_standin, "capacity", job.capacity))
        changes.enter_context(mock.patch.object(pipeline, "run", watched))
        if job.sabotage:
            changes.enter_context(_sabotage(job.sabotage))
        if job.stop_after >= 0:
            changes.enter_context(_interrupted(job.stop_after))
        for card in range(npu_standin.CARDS):
            npu_standin.synchronize(card)  # whatever a job that failed has left
        npu_standin.reset()
        result = run(*arguments(job, folder, save, job.device))
    gc.collect()
    return Outcome(result.returncode, result.stderr, asdict(npu_standin.counts), list(npu_standin.live), found)


def child() -> None:
    """Read {models, saves, jobs} from stdin, print the jobs' outcomes."""
    import npu_standin

    import streamq.device

    streamq.device.STAGE_CHUNK = CHUNK  # before the modules that take it from there
    npu_standin.install()
    from streamq.methods import int8

    int8.DEVICE_TILE_BYTES = TILE
    asked = json.load(sys.stdin)
    jobs = [Job(**job) for job in asked["jobs"]]
    outcomes = [_do(job, Path(asked["models"]), Path(asked["saves"], job.name)) for job in jobs]
    print(json.dumps([asdict(outcome) for outcome in outcomes]))


def check_standin() -> None:
    """Does the stand-in do what its docstring says?"""
    import npu_standin
    import torch

    npu_standin.install()
    npu: Any = torch.get_device_module("npu")
    assert str(torch.accelerator.current_accelerator()) == "npu" and npu.device_count() == 2
    values = torch.randn(5, 8)
    there = values.to("npu")
    assert (there.device, there.is_npu) == (torch.device("npu:0"), True)  # type: ignore[attr-defined]
    assert torch.equal((there @ there.t()).softmax(-1).cpu(), (values @ values.t()).softmax(-1))
    layer = torch.nn.Linear(8, 3)
    expected = layer(values)
    assert torch.equal(layer.to("npu")(there).cpu(), expected)
    assert there.sum().cpu().shape == ()
    assert torch.equal(there.mul_(3).round().to(torch.int8).cpu(), (values * 3).round().to(torch.int8))
    assert (there.double().dtype, npu_standin.counts.double_casts) == (torch.float32, 1)
    assert torch.empty(3, device="npu").view(torch.uint8).tolist() == [npu_standin.GARBAGE] * 12
    for other in (values, values.to("npu:1")):
        with pytest.raises(RuntimeError, match="its tensors are on npu:0, "):
            there + other

    pinned, side = torch.empty(4, pin_memory=True), npu.Stream()
    assert pinned.is_pinned() and pinned[1:].is_pinned() and not values.is_pinned()
    shared = torch.zeros(4, device="npu")
    npu.synchronize()
    with npu.stream(side):
        shared.copy_(pinned.fill_(1), non_blocking=True)
    arrived = side.record_event()
    pinned.fill_(2)  # too early
    with pytest.raises(npu_standin.Hazard, match="has not waited"):
        shared.sum()
    npu.current_stream().wait_event(arrived)
    assert shared.sum().item() == 8
    back = torch.zeros(4)
    back.copy_(shared, non_blocking=True)
    assert back.view(torch.uint8).tolist() == [npu_standin.GARBAGE] * 16
    npu.current_stream().synchronize()
    assert (back.tolist(), npu_standin.counts.pageable_copies) == ([2] * 4, 1)

    with npu.stream(side):
        shared.add_(1)
    del shared
    assert "freed while" in npu_standin.counts.hazards[0]
    with npu.device(1), pytest.raises(npu_standin.Hazard, match="waited for by a thread that is on npu:1"):
        arrived.synchronize()
    del there, other, layer
    gc.collect()
    assert npu_standin.live == [0, 0] and npu.max_memory_allocated() > 0
    assert npu.mem_get_info() == (npu_standin.capacity, npu_standin.capacity)


# --- the parent --------------------------------------------------------------------------------------------------


def tensors(save: Path) -> dict[str, bytes]:
    """Every safetensors file of an output folder."""
    return {str(path.relative_to(save)): path.read_bytes() for path in sorted(save.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MODELS."""
    folder = tmp_path_factory.mktemp("models")
    for name, (family, how) in MODELS.items():
        write_tiny(folder / name, family, **how)
    library = (ROOT / "recipes" / "w8a8.yaml").read_text().splitlines()
    mse = [line.replace("minmax", "mse") if line.strip().startswith("weight:") else line for line in library]
    (folder / "mse.yaml").write_text("\n".join(mse))
    return folder


GOOD = [
    *(Job(formats=formats, read_ahead=ahead) for formats in ("mindie", "mindie,lightx2v") for ahead in (0, 1, 3)),
    Job("bf16", "mindie,lightx2v", 3),
    Job("bf16", "lightx2v", match="lightx2v"),
    Job("bf16", "mindie", match="msmodelslim"),
    Job("small", "mindie", mse=True),
    Job("experts", "mindie,lightx2v"),
    Job("fp32", "mindie,lightx2v", device="npu:1"),
]


SABOTAGED = [Job(read_ahead=0, sabotage=sabotage) for sabotage in SABOTAGE]
STOPPED = Job(formats="mindie,lightx2v", stop_after=2, into="stopped")
RESUMED = replace(STOPPED, stop_after=-1, read_ahead=3, device="npu:1")
AGAIN = replace(RESUMED, read_ahead=0)
FULL = Job(capacity=30_000, into="full")  # less than one layer's share of the arena
ABSENT = Job(device="npu:2", into="absent")


@dataclass
class Done:
    """What the child did. `save(job)` is the job's output folder."""

    outcomes: dict[Job, Outcome]
    saves: Path

    def save(self, job: Job) -> Path:
        return self.saves / job.name


@pytest.fixture(scope="module")
def done(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All jobs, in one child: importing torch takes longer than any of them."""
    jobs, saves = [*GOOD, *SABOTAGED, STOPPED, RESUMED, AGAIN, FULL, ABSENT], tmp_path_factory.mktemp("npu")
    asked = json.dumps({"models": str(models), "saves": str(saves), "jobs": [asdict(job) for job in jobs]})
    child = subprocess.run(
        [sys.executable, __file__], input=asked, capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
    return Done(dict(zip(jobs, (Outcome(**outcome) for outcome in json.loads(child.stdout)), strict=True)), saves)


@pytest.fixture(scope="module")
def on_cpu(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], dict[str, bytes]]:
    """What a job writes with --device cpu."""
    made: dict[Job, dict[str, bytes]] = {}

    def make(job: Job) -> dict[str, bytes]:
        job = Job(job.model, job.formats, 0, job.match, job.mse, "cpu")
        if job not in made:
            save = tmp_path_factory.mktemp("cpu") / "out"
            result = run(*arguments(job, models, save, "cpu"))
            assert result.returncode == 0, result.stderr
            made[job] = tensors(save)
        return made[job]

    return make


each_good = pytest.mark.parametrize("job", GOOD, ids=lambda job: job.name)


@each_good
def test_bytes_are_those_of_the_cpu(job: Job, done: Done, on_cpu: Callable[[Job], dict[str, bytes]]) -> None:
    outcome = done.outcomes[job]
    assert (outcome.code, outcome.counts["hazards"]) == (0, []), outcome.stderr
    assert tensors(done.save(job)) == on_cpu(job)
    assert json.loads((done.save(job) / "streamq.json").read_text())["device"] == "npu"


@each_good
def test_only_layers_cross_and_nothing_stays(job: Job, done: Done) -> None:
    counts, plan = done.outcomes[job].counts, done.outcomes[job].plan
    assert done.outcomes[job].live == [0, 0]
    assert plan["passed"] > 0
    assert counts["to_device_bytes"] == plan["in"]
    # Beside the tensors come two fp32 norms a row, of which the error is made; a row has 64 codes or more.
    assert plan["out"] < counts["to_host_bytes"] <= plan["out"] * (1 + 12 / 64)
    assert counts["to_device_copies"] > plan["in"] // CHUNK
    assert counts["to_host_copies"] > plan["out"] // CHUNK


@each_good
def test_memory_is_what_the_plan_says(job: Job, done: Done) -> None:
    """The plan's allowance is a multiple of int8.DEVICE_TILE_BYTES, here TILE; the pinned rings have a fixed size."""
    counts, plan = done.outcomes[job].counts, done.outcomes[job].plan
    card = int(job.device.partition(":")[2] or 0)
    assert counts["peak"][1 - card] == 0
    assert plan["arena"] < counts["peak"][card] <= plan["arena"] + TILE * DEVICE_SCRATCH // DEVICE_TILE_BYTES
    assert plan["peak"] == plan["arena"] + DEVICE_SCRATCH
    assert counts["pinned_bytes"] == 2 * STAGE_CHUNKS * CHUNK
    assert counts["pageable_copies"] == 0


def test_a_missing_wait_does_not_go_unnoticed(done: Done, on_cpu: Callable[[Job], dict[str, bytes]]) -> None:
    """The stand-in is worth something: without any one of the waits in `Accelerator` the tests above fail.

    Streams notice three of them, on the spot or when the memory is used again; the last one makes wrong bytes, which
    may be no numbers.
    """
    outcomes = [done.outcomes[job] for job in SABOTAGED]
    assert [outcome.code for outcome in outcomes[:3]] == [1, 1, 1]
    assert all("has not waited for it" in outcome.stderr for outcome in outcomes[:3])
    if outcomes[3].code:
        assert "NaN or Inf" in outcomes[3].stderr
    else:
        wrong, right = tensors(done.save(SABOTAGED[3])), on_cpu(SABOTAGED[3])
        assert wrong.keys() == right.keys() and wrong != right


def test_the_stand_in_is_as_strict_as_it_says() -> None:
    child = subprocess.run([sys.executable, __file__, "check"], capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 0, child.stderr


def test_an_interrupted_run_goes_on(done: Done, on_cpu: Callable[[Job], dict[str, bytes]]) -> None:
    """Also on another card: which one it is does not belong to the plan. Two of three equal blocks are committed."""
    stopped, resumed, again = (done.outcomes[job] for job in (STOPPED, RESUMED, AGAIN))
    assert (stopped.code, resumed.code, again.code) == (130, 0, 0)
    assert "the same command resumes" in stopped.stderr
    assert resumed.counts["to_device_bytes"] * 3 == resumed.plan["in"]
    assert again.counts["to_device_bytes"] == 0
    assert (resumed.live, resumed.counts["hazards"]) == ([0, 0], [])
    assert tensors(done.save(RESUMED)) == on_cpu(RESUMED)


def test_a_full_card_is_advice(done: Done) -> None:
    assert done.outcomes[FULL].code == 1
    assert_one_line(done.outcomes[FULL].stderr, "out of memory", "--read_ahead 0", "--max_device_memory")


def test_a_card_that_is_not_there(done: Done) -> None:
    assert done.outcomes[ABSENT].code == 2
    assert_one_line(done.outcomes[ABSENT].stderr, "--device npu:2", "there are 2 NPUs")
    assert not done.save(ABSENT).exists()


# --- without a card ------------------------------------------------------------------------------------------------


def assert_one_line(stderr: str, *words: str) -> None:
    """One error line and nothing else, with these words in it."""
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert all(word in stderr for word in words), stderr


def broken_torch_npu(folder: Path, *, entry_point: bool) -> dict[str, str]:
    """Make torch_npu as it is without CANN; returns the environment. torch imports an entry point by itself."""
    (folder / "torch_npu").mkdir(parents=True)
    missing = "libhccl.so: cannot open shared object file: No such file or directory"
    (folder / "torch_npu" / "__init__.py").write_text(f"raise ImportError({missing!r})\n")
    if entry_point:
        about = folder / "torch_npu-2.6.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.6.0\n")
        (about / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{before}" if before else str(folder)}


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="torch_npu is installed")
def test_torch_npu_is_missing(models: Path, tmp_path: Path) -> None:
    result = run(*arguments(Job(), models, tmp_path / "out", "npu"))
    assert result.returncode == 2
    assert_one_line(result.stderr, "no module torch_npu", "CANN", "set_env.sh", "--device cpu")
    assert not (tmp_path / "out").exists()


def test_cann_is_missing(models: Path, tmp_path: Path) -> None:
    env = broken_torch_npu(tmp_path / "site", entry_point=False)
    result = run_process(*arguments(Job(), models, tmp_path / "out", "npu"), env=env)
    assert result.returncode == 2
    assert_one_line(result.stderr, "libhccl.so", "CANN", "set_env.sh", "--device cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["npu", "cpu"])
def test_torch_falls_over_torch_npu(device: str, models: Path, tmp_path: Path) -> None:
    env = broken_torch_npu(tmp_path / "site", entry_point=True)
    command = arguments(Job(), models, tmp_path / "out", device)
    result = run_process(*command, env=env)
    assert result.returncode == 2
    assert_one_line(result.stderr, "torch_npu", "CANN", "set_env.sh", "TORCH_DEVICE_BACKEND_AUTOLOAD=0")
    assert not (tmp_path / "out").exists()
    if device == "cpu":  # the advice is good
        result = run_process(*command, env=env | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
        assert (result.returncode, (tmp_path / "out" / "streamq.json").exists()) == (0, True)


def test_several_cards_are_for_accelerate(models: Path, tmp_path: Path) -> None:
    result = run(*arguments(Job(), models, tmp_path / "out", "npu:0,1"))
    assert result.returncode == 2
    assert_one_line(result.stderr, "--device npu:0,1", "accelerate launch")
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    check_standin() if sys.argv[1:] == ["check"] else child()
