"""Runs of streamq whose stages are slow, fail or are interrupted, and what they take of memory and threads meanwhile.

A server imports torch and streamq once and forks a child a run. In the child every stage says where it is to a
`Pressure`, which makes it wait, fails it or sends a signal; and whatever is bounded (the arena, lanes, layers at work,
device memory) is counted. A run that does not end in time is ended by faulthandler, which prints every thread's stack.

`python tests/pressure_kit.py cpu|npu COMMAND` is the server (JSON lines on stdin and stdout); tests use `Server`.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

WIDTH = 4  # runs at a time: most of their time they sleep
LIMIT = 60.0  # seconds that a run may take before it counts as hung
WARM_LIMIT = 120.0  # and the first one, which imports everything
CHUNK, TILE = 1999, 8192  # bytes: of the pinned rings, an odd number, and of a method's tile on a device
STAGES = ("read", "write", "sync", "commit", "hash", "method", "replay")
DEVICE_STAGES = ("copy_in", "copy_out", "compute")


@dataclass(frozen=True)
class Job:
    """One command. slow: stage -> (seconds a call, seconds a KiB); `seed`: they vary from call to call.

    At call number `at` of stage `fault`: `act` is `error`, or the number of a signal, sent `times` times with
    `pause` seconds between them. `program`: a function of this module instead of streamq's command line.
    `sample`: count all bytes in tensors at every so-many-th write.
    """

    argv: tuple[str, ...]
    slow: dict[str, tuple[float, float]] = field(default_factory=dict)
    seed: int = 0
    fault: str = ""
    at: int = 0
    act: str | int = "error"
    times: int = 1
    pause: float = 0.0
    program: str = ""
    sample: int = 0
    limit: float = LIMIT


@dataclass
class Outcome:
    """What a run came to. after: seconds from the fault to its end. threads: those that outlived it.

    most: the largest number or size that was ever seen of what is bounded; plan: its figures.
    """

    status: int
    err: str
    fired: bool = False
    after: float = 0.0
    seconds: float = 0.0
    threads: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    plan: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    made: Any = None


# --- in the child ------------------------------------------------------------------------------------------------


class Pressure:
    """What a job asks for, and what was seen."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.calls: Counter[str] = Counter()
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.problems: list[str] = []
        self.plan: dict[str, int] = {}
        self.fired_at = 0.0
        self._random = random.Random(job.seed)
        self._lock = threading.Lock()

    def at(self, stage: str, nbytes: int = 0) -> None:
        """A stage begins a call."""
        with self._lock:
            self.calls[stage] += 1
            due = stage == self.job.fault and self.calls[stage] == self.job.at
            pace = 2 * self._random.random() if self.job.seed else 1.0
        if due:
            self.fired_at = time.monotonic()
            self._fire(stage)
        call, kib = self.job.slow.get(stage, (0.0, 0.0))
        if call or kib:
            time.sleep(pace * (call + kib * nbytes / 1024))

    def _fire(self, stage: str) -> None:
        if self.job.act == "error":
            from streamq.errors import RunError

            if stage in ("write", "sync"):
                raise OSError(28, os.strerror(28))
            raise RunError(f"fault in {stage}")
        for number in range(self.job.times):
            if number:
                time.sleep(self.job.pause)
            os.kill(os.getpid(), int(self.job.act))

    def add(self, what: str, count: int) -> None:
        """There is so much more of something now, or less."""
        with self._lock:
            self.now[what] += count
            self.most[what] = max(self.most[what], self.now[what])


def _before(owner: Any, name: str, stage: str, pressure: Pressure, size: Callable[..., int] = lambda *_: 0) -> None:
    """Make a function a stage."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def call(*args: Any, **keywords: Any) -> Any:
        pressure.at(stage, size(*args))
        return real(*args, **keywords)

    setattr(owner, name, call)


def _install(pressure: Pressure) -> None:
    from streamq import pipeline, steps
    from streamq.checkpoint import Source
    from streamq.journal import Journal
    from streamq.savers.shard import ShardWriter

    _before(Source, "read", "read", pressure, lambda source, info, start, into: len(into))
    _before(os, "pwrite", "write", pressure, lambda descriptor, data, *_: len(data))
    _before(os, "fdatasync", "sync", pressure)
    _before(Journal, "append", "commit", pressure)
    if blocks := sys.modules.get("streamq.wan.blocks"):  # where the run that warmed up was a calibrated one
        _before(blocks.BlockRunner, "run", "replay", pressure)
    _before(steps, "quantize", "method", pressure)
    append = ShardWriter.append

    def slow_hash(writer: Any, data: memoryview, beside: Callable[..., Any]) -> None:
        def hashed(job: Callable[..., Any], *args: Any) -> Any:
            def late() -> Any:
                pressure.at("hash", len(data))
                return job(*args)

            return beside(late)

        append(writer, data, hashed)

    setattr(ShardWriter, "append", slow_hash)  # noqa: B010 - mypy takes an assignment for a method with two selfs
    work = pipeline.run

    def planned(plan: Any, *rest: Any, **more: Any) -> Any:
        held = [step for unit in plan.units for step in unit.steps if step.held]
        pressure.plan |= {
            "arena": plan.arena_nbytes, "device": plan.peak_device_bytes, "depth": plan.options.read_ahead,
            "schemes": max(len(step.schemes) for step in held), "files": len(plan.files),
            "largest": max(step.working_nbytes for step in held), "beside": plan.beside_nbytes,
        }  # fmt: skip
        return work(plan, *rest, **more)

    setattr(pipeline, "run", planned)  # noqa: B010
    _count(pressure)


def _count(pressure: Pressure) -> None:
    """Watch what is bounded."""
    from streamq import steps
    from streamq.stages import Arena, Lane

    take, give_back, regions = Arena.take, Arena.give_back, deque[tuple[int, int]]()

    def taken(arena: Arena, nbytes: int) -> Any:
        region = take(arena, nbytes)
        if region is not None:
            start = region.data_ptr() - arena.memory.data_ptr()
            if any(start < end and first < start + nbytes for first, end in list(regions)):
                pressure.problems.append(f"a layer at [{start}, {start + nbytes}) lies on another one's bytes")
            regions.append((start, start + nbytes))
            pressure.add("arena", nbytes)
            pressure.add("regions", 1)
        return region

    def given_back(arena: Arena) -> None:
        start, end = regions.popleft()
        pressure.add("arena", start - end)
        pressure.add("regions", -1)
        give_back(arena)

    setattr(Arena, "take", taken)  # noqa: B010
    setattr(Arena, "give_back", given_back)  # noqa: B010
    init, begin, names = Lane.__init__, Lane.start, weakref.WeakKeyDictionary[Lane, str]()

    def named(lane: Lane, depth: int, name: str, threads: int = 1) -> None:
        names[lane] = name
        init(lane, depth, name, threads)

    def started(lane: Lane, job: Callable[..., Any], *args: Any) -> Any:
        def done(*given: Any) -> Any:
            try:
                return job(*given)
            finally:
                pressure.add(names[lane], -1)

        pressure.add(names[lane], 1)
        return begin(lane, done, *args)

    setattr(Lane, "__init__", named)  # noqa: B010
    setattr(Lane, "start", started)  # noqa: B010
    quantize = steps.quantize

    def counted(*args: Any, **keywords: Any) -> Any:
        layer, about = quantize(*args, **keywords)
        pressure.add("layers", 1)
        weakref.finalize(layer, pressure.add, "layers", -1)
        return layer, about

    setattr(steps, "quantize", counted)  # noqa: B010
    if pressure.job.sample:
        _sample(pressure)


def _sample(pressure: Pressure) -> None:
    """All bytes that tensors hold, at every so-many-th write."""
    import torch

    real, gate = os.pwrite, threading.Lock()

    def sampled(*args: Any) -> int:
        if pressure.calls["write"] % pressure.job.sample == 0 and gate.acquire(blocking=False):
            found = {}
            for one in gc.get_objects():
                if issubclass(type(one), torch.Tensor) and one.device.type == "cpu" and one.layout == torch.strided:
                    storage = one.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
            pressure.most["tensors"] = max(pressure.most["tensors"], sum(found.values()))
            gate.release()
        return real(*args)

    setattr(os, "pwrite", sampled)  # noqa: B010


def _slow_device(pressure: Pressure) -> None:
    """A copy takes its time where somebody waits for it, and outside the stand-in's lock: others work meanwhile."""
    import npu_standin

    from streamq.device.accelerator import Accelerator

    init, wait, compute, directions = Accelerator.__init__, npu_standin.Event.synchronize, npu_standin._compute, {}

    def opened(device: Any, kind: str, index: int) -> None:
        init(device, kind, index)
        directions.update({device._inward.number: "copy_in", device._outward.number: "copy_out"})

    def waited(event: Any) -> None:
        stream = event._stream
        if stream is not None and stream.number in directions:
            pressure.at(directions[stream.number])
        wait(event)

    def computed(func: Any, args: Any, kwargs: Any, tensors: Any) -> Any:
        pressure.at("compute")
        return compute(func, args, kwargs, tensors)

    setattr(Accelerator, "__init__", opened)  # noqa: B010
    setattr(npu_standin.Event, "synchronize", waited)  # noqa: B010
    setattr(npu_standin, "_compute", computed)  # noqa: B010


def _run(job: Job, device: str) -> Outcome:
    from streamq import cli

    pressure = Pressure(job)
    _install(pressure)
    if device == "npu":
        import npu_standin

        _slow_device(pressure)
        npu_standin.reset()
    began, made = time.monotonic(), None
    if job.program:
        status, made = globals()[job.program](*job.argv, pressure)
    else:
        status = cli.main(job.argv)
    now = time.monotonic()
    threads = [one.name for one in threading.enumerate() if one is not threading.main_thread()]
    for one in threading.enumerate():
        if one is not threading.main_thread():
            one.join()  # as the interpreter does when it ends
    found = Outcome(status, "", bool(pressure.fired_at), now - (pressure.fired_at or now), now - began, threads)
    if device == "npu":
        gc.collect()
        found.most |= {"device": max(npu_standin.counts.peak), "alive": max(npu_standin.live)}
        found.most |= {"pinned": npu_standin.counts.pinned_bytes, "pageable": npu_standin.counts.pageable_copies}
        found.problems += npu_standin.counts.hazards
    found.calls, found.plan, found.made = dict(pressure.calls), pressure.plan, made
    found.most |= dict(pressure.most)
    found.problems += pressure.problems
    return found


def forward(folder: str, room: str, forwards: str, pressure: Pressure) -> tuple[int, Any]:
    """A transformer whose blocks come and go: the sha256 of what it makes. As `cli.main`, 1 for an error."""
    import hashlib

    import generate_kit
    import torch
    from test_generate_store import Counting

    from streamq import wan
    from streamq.errors import RunError
    from streamq.generation.layers import float_weights
    from streamq.generation.store import BlockStore, Room
    from streamq.generation.transformer import Transformer

    device, model = Counting(), wan.open_model(Path(folder))[0]
    one, load = Transformer(float_weights(model), device, Room(int(room)), torch.float32), BlockStore._load

    def counted(store: BlockStore, name: str) -> Any:
        found = load(store, name)
        pressure.most["resident"] = max(pressure.most["resident"], store.resident[0])
        return found

    setattr(BlockStore, "_load", counted)  # noqa: B010
    pressure.plan |= {"block": one.store.kept_nbytes("blocks.0"), "rest": one.store.kept_nbytes("rest")}
    made: list[str] = []
    try:
        try:
            for _ in range(int(forwards)):
                with torch.no_grad():
                    y = one.module(return_dict=False, **generate_kit.inputs(torch.float32))[0]
                made.append(hashlib.sha256(y.numpy().tobytes()).hexdigest())
        finally:
            pressure.most["bytes"] = device.peak
            one.close()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1, made
    except KeyboardInterrupt:
        return 130, made
    return 0, made


def _child(request: dict[str, Any], number: int, scratch: str, device: str) -> NoReturn:
    status = 99
    try:
        descriptor = os.open(f"{scratch}/{number}.err", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        os.dup2(descriptor, 2)
        os.dup2(descriptor, 1)
        os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        job = Job(**request)
        faulthandler.dump_traceback_later(job.limit, exit=True, file=2)
        outcome = _run(job, device)
        Path(scratch, f"{number}.json").write_text(json.dumps(asdict(outcome)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve(device: str, warm: Sequence[str]) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setattr(os, "sched_getaffinity", lambda _: {0})  # noqa: B010 - threads that wait for a busy core cost time
    if device == "npu":
        _make_npu()
    from streamq import cli
    from streamq.device import cpu

    cpu.WRITE_CHUNK = 4096  # so that a layer is more than one
    faulthandler.dump_traceback_later(WARM_LIMIT, exit=True)
    assert cli.main(warm) == 0, "the run that warms up, after which a child has nothing left to import"
    faulthandler.cancel_dump_traceback_later()
    end = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < end:
        time.sleep(0.01)  # the watchdog's thread is on its way out
    assert len(os.listdir("/proc/self/task")) == 1, "a process that forks must have one thread"
    gc.collect()
    gc.freeze()
    while line := sys.stdin.readline():
        request = json.loads(line)
        waiting, at_work, ended = deque(enumerate(request["jobs"])), set[int](), 0
        while ended < len(request["jobs"]):
            while waiting and len(at_work) < request["width"]:
                number, job = waiting.popleft()
                pid = os.fork()
                if pid == 0:
                    _child(job, number, request["scratch"], device)
                at_work.add(pid)
            at_work.remove(os.wait()[0])
            ended += 1
        replies.write("{}\n")
        replies.flush()


def _make_npu() -> None:
    """The stand-in, with small chunks and tiles: the plan's allowance for tiles is a multiple of a tile's size."""
    import npu_standin

    import streamq.device

    streamq.device.STAGE_CHUNK = CHUNK  # before the modules that take it from there
    npu_standin.install()
    from streamq import memory, plan
    from streamq.methods import int8

    scratch = TILE * plan.DEVICE_SCRATCH // int8.DEVICE_TILE_BYTES
    int8.DEVICE_TILE_BYTES = TILE
    plan.DEVICE_SCRATCH = memory.DEVICE_SCRATCH = scratch  # type: ignore[attr-defined]


# --- in the test -------------------------------------------------------------------------------------------------


class Server:
    """A forking process for one kind of device. `warm`: a command that it runs first."""

    def __init__(self, scratch: Path, device: str, warm: Sequence[object]) -> None:
        self.scratch = scratch
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, __file__, device, *map(str, warm)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | one,
        )  # fmt: skip

    def run(self, jobs: Sequence[Job], width: int = WIDTH) -> list[Outcome]:
        """Every job's outcome. One that hung has status 124 and all threads' stacks in `err`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        for path in self.scratch.glob("*.json"):
            path.unlink()
        request = {"jobs": [asdict(job) for job in jobs], "scratch": str(self.scratch), "width": width}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline(), "the forking server is gone"
        return [self._outcome(number) for number in range(len(jobs))]

    def _outcome(self, number: int) -> Outcome:
        err, told = (self.scratch / f"{number}.err").read_text(), self.scratch / f"{number}.json"
        if not told.exists():
            return Outcome(124 if "Timeout" in err else 99, err, problems=[f"did not end by itself: {err[-6000:]}"])
        return Outcome(**json.loads(told.read_text()) | {"err": err})

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    _serve(sys.argv[1], sys.argv[2:])
