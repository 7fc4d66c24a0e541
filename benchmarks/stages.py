"""Where the seconds and bytes of a streamq command go: wraps the verbs of its loop from outside, not in the package.

    python benchmarks/stages.py [--synchronize] [--json FILE] quant --model_path DIR --save_path OUT --quant_type w8a8

Runs the command in this process and prints a table: stage, seconds, processor seconds, MB/s, share of the wall time.
Seconds are a thread's own: what a stage calls that is a stage itself is not in it; nor are, of its processor seconds,
those of threads that torch starts for it. Stages of several threads overlap,
so the shares may add up to more than 1; `wait` is a thread that waits for another one's stage, and no work. `hash` sees
most bytes twice, for their tensor and for their file. On an accelerator work is queued, and lands on whoever waits for
it first: `--synchronize` waits at both ends of every stage that uses the device, which is honest and slower.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Sized = Callable[..., int]  # a verb's arguments -> bytes
# Stage -> what kind of work it is, in the order of the table.
STAGES = {
    "start": "start", "plan": "start", "inputs": "compute", "allocate": "write", "read": "read", "copy in": "copy",
    "load": "compute", "merge": "compute", "texts": "compute", "forward": "compute", "statistics": "compute",
    "replay": "compute", "smooth": "compute", "quantize": "compute", "errors": "compute", "encode": "compute",
    "linear": "compute", "decode": "compute", "streams": "write", "copy back": "copy", "hash": "hash",
    "write": "write", "sync": "sync", "journal": "sync", "videos": "write", "wait": "wait", "rest": "rest",
}  # fmt: skip
ON_DEVICE = {name for name, kind in STAGES.items() if kind in ("compute", "copy")}


def _into(_: Any, info: Any, start: int, into: memoryview) -> int:
    return len(into)


def _second(_: Any, data: Any, *more: Any) -> int:
    return len(data)


# (module:name, stage, bytes of a call). A name that others import from its module is wrapped where it is used.
QUANT: tuple[tuple[str, str, Sized | None], ...] = (
    ("streamq.planner:make_plan", "plan", None),
    ("streamq.checkpoint:Source.read", "read", _into),
    ("streamq.checkpoint:Source.drop", "read", None),
    ("streamq.steps:merge", "merge", None),
    ("streamq.steps:quantize", "quantize", lambda name, weight, *more: weight.nbytes),
    ("streamq.layers:output_error", "errors", None),
    ("streamq.steps:_made", "encode", None),
    ("streamq.savers.shard:ShardWriter.create", "allocate", None),
    ("streamq.savers.shard:ShardWriter._write", "write", _second),
    ("streamq.savers.shard:ShardWriter.sync", "sync", None),
    ("streamq.savers.shard:publish", "sync", None),
    ("streamq.pipeline:write_whole", "write", _second),
    ("streamq.journal:write_whole", "write", _second),
    ("streamq.journal:_append", "journal", None),
    ("streamq.stages:wait", "wait", None),
    ("concurrent.futures:Future.result", "wait", None),
)
CALIBRATED: tuple[tuple[str, str, Sized | None], ...] = (
    ("streamq.calibration.make:make_set", "inputs", None),
    ("streamq.calibration.replay:Replay.observe", "replay", None),
    ("streamq.calibration.replay:Replay.go_on", "replay", None),
    ("streamq.wan.blocks:BlockRunner.run", "forward", None),
    ("streamq.methods.statistics:InputStatistics.update", "statistics", None),
    ("streamq.layers:Block.vector", "smooth", None),
    ("streamq.calibration.cache:Cache.write", "streams", lambda self, stream, sample, tensor: tensor.nbytes),
    ("streamq.calibration.cache:Cache.sync", "sync", None),
)
GENERATE: tuple[tuple[str, str, Sized | None], ...] = (
    ("streamq.checkpoint:Source.read", "read", _into),
    ("streamq.generation.make:encode_prompts", "texts", None),
    ("streamq.generation.make:_denoise", "forward", None),
    ("streamq.generation.store:BlockStore._load", "load", None),
    ("streamq.generation.linear:StoredLinear.forward", "linear", None),
    ("streamq.generation.make:decode", "decode", None),
    ("streamq.generation.make:_write", "videos", None),
    ("concurrent.futures:Future.result", "wait", None),
)
ACCELERATOR = "streamq.device.accelerator:Accelerator"


@dataclass
class Spent:
    """What one stage took in one thread; seconds without those of the stages that it called."""

    seconds: float = 0.0
    cpu: float = 0.0
    nbytes: int = 0
    calls: int = 0


class Clock:
    """Adds up stages, thread by thread. `synchronize`: called at both ends of a stage that uses the device."""

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize, self._here, self._lock = synchronize, threading.local(), threading.Lock()
        self.threads: list[tuple[str, dict[str, Spent]]] = []

    def add(self, stage: str, seconds: float, cpu: float, nbytes: int = 0) -> None:
        """Enter a stage's figures in this thread's account."""
        if not hasattr(self._here, "spent"):
            self._here.spent = {}
            with self._lock:
                self.threads.append((threading.current_thread().name, self._here.spent))
        spent = self._here.spent.setdefault(stage, Spent())
        spent.seconds, spent.cpu = spent.seconds + seconds, spent.cpu + cpu
        spent.nbytes, spent.calls = spent.nbytes + nbytes, spent.calls + 1

    def run(self, stage: str, size: Sized | None, call: Callable[..., Any], /, *args: Any, **how: Any) -> Any:
        """Call it, and add what it took to a stage."""
        stack = self._here.__dict__.setdefault("stack", [])
        waits = self._synchronize if stage in ON_DEVICE else None
        if waits is not None:
            waits()
        frame = [0.0, 0.0]  # what its own stages take
        stack.append(frame)
        began, cpu = time.perf_counter(), time.thread_time()
        try:
            return call(*args, **how)
        finally:
            if waits is not None:
                waits()
            seconds, used = time.perf_counter() - began, time.thread_time() - cpu
            stack.pop()
            if stack:
                stack[-1][0] += seconds
                stack[-1][1] += used
            self.add(stage, seconds - frame[0], used - frame[1], size(*args, **how) if size else 0)

    def timed(self, stage: str, size: Sized | None, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function with a clock; a function itself, so that it binds where it stands for a method."""

        @wraps(call)
        def clocked(*args: Any, **how: Any) -> Any:
            return self.run(stage, size, call, *args, **how)

        return clocked

    def report(self, wall: float) -> dict[str, Any]:
        """Totals by stage and seconds by thread. MB are 10^6 bytes; `share`: of the wall time."""
        totals: dict[str, Spent] = {}
        threads: dict[str, dict[str, float]] = {}
        for name, stages in self.threads:
            place = threads.setdefault(re.sub(r"_\d+$", "", name), {})
            for stage, spent in stages.items():
                total = totals.setdefault(stage, Spent())
                total.seconds, total.cpu = total.seconds + spent.seconds, total.cpu + spent.cpu
                total.nbytes, total.calls = total.nbytes + spent.nbytes, total.calls + spent.calls
                place[stage] = round(place.get(stage, 0.0) + spent.seconds, 6)
        rows = [_row(stage, totals[stage], wall) for stage in STAGES if stage in totals]
        return {"wall": wall, "rows": rows, "threads": threads}


def _row(stage: str, spent: Spent, wall: float) -> dict[str, Any]:
    rate = round(spent.nbytes / spent.seconds / 1e6, 1) if spent.nbytes and spent.seconds else None
    return {
        "stage": stage, "kind": STAGES[stage], "seconds": round(spent.seconds, 6), "cpu": round(spent.cpu, 6),
        "bytes": spent.nbytes, "calls": spent.calls, "mb_per_s": rate, "share": round(spent.seconds / wall, 4),
    }  # fmt: skip


# -- Wrapping ----------------------------------------------------------------------------------------------------------


def _replace(target: str, wrap: Callable[[Any], Any]) -> None:
    """Put a wrapper in the place of `module:name`. A name that is gone is an error: its time would be the rest's."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for one in outer:
        owner = getattr(owner, one)
    if not hasattr(owner, name):
        raise SystemExit(f"benchmarks/stages.py: {target} is not there any more; bring the table in it up to date")
    setattr(owner, name, wrap(getattr(owner, name)))


class _Hash:
    """sha256 with a clock."""

    def __init__(self, clock: Clock, data: Any = b"") -> None:
        self._digest = hashlib.sha256()
        self.update = clock.timed("hash", len, self._digest.update)
        self.hexdigest = self._digest.hexdigest
        if len(data):
            self.update(data)


def _stepwise(clock: Clock, stage: str, call: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A generator whose steps have a clock, and not what is done between them."""

    def steps(*args: Any) -> Iterator[Any]:
        made, end = call(*args), object()
        while True:
            began, cpu = time.perf_counter(), time.thread_time()
            view = next(made, end)
            nbytes = 0 if view is end else len(view)
            clock.add(stage, time.perf_counter() - began, time.thread_time() - cpu, nbytes)
            if view is end:
                return
            yield view

    return steps


def install(clock: Clock, command: str, *, calibrated: bool, accelerator: bool) -> None:
    """Wrap what a command uses. `calibrated`: it replays blocks, which imports diffusers. Once a process."""
    verbs = GENERATE if command == "generate" else QUANT + (CALIBRATED if calibrated else ())
    for target, stage, size in verbs:
        _replace(target, partial(clock.timed, stage, size))
    if command != "generate":
        shard: Any = importlib.import_module("streamq.savers.shard")
        shard.hashlib = SimpleNamespace(sha256=partial(_Hash, clock))
    if accelerator:
        _replace(f"{ACCELERATOR}.load", partial(clock.timed, "copy in", lambda self, read, into: into.numel()))
        _replace(f"{ACCELERATOR}.store", partial(_stepwise, clock, "copy back"))


def process_start() -> float:
    """When this process began, on the clock CLOCK_BOOTTIME, to 10 ms."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def synchronizer(device: str) -> Callable[[], None] | None:
    """What waits for everything that is queued on the device; None for the host."""
    if device == "cpu":
        return None
    import torch

    module: Any = torch.get_device_module(device.partition(":")[0])
    return module.synchronize


def run(argv: list[str], *, device: str, calibrated: bool, synchronize: bool = False) -> dict[str, Any]:
    """Run `streamq ARGV` in this process; returns its report. `device`: as given to it, not `auto`."""
    from streamq import cli, display, pipeline  # noqa: F401

    clock = Clock(synchronizer(device) if synchronize else None)
    install(clock, argv[0], calibrated=calibrated, accelerator=device != "cpu")
    began = process_start()
    clock.add("start", time.clock_gettime(time.CLOCK_BOOTTIME) - began, time.process_time())
    status = clock.run("rest", None, cli.main, argv)
    if status:
        raise SystemExit(f"streamq {' '.join(argv)}: exit status {status}")
    return clock.report(time.clock_gettime(time.CLOCK_BOOTTIME) - began)


def table(report: dict[str, Any]) -> str:
    """A report in markdown."""
    lines = ["| stage | seconds | CPU seconds | GB | MB/s | share of wall |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        gigabytes = f"{row['bytes'] / 1e9:.3f}" if row["bytes"] else ""
        rate = f"{row['mb_per_s']:,.0f}" if row["mb_per_s"] else ""
        lines.append(
            f"| {row['stage']} | {row['seconds']:.2f} | {row['cpu']:.2f} | {gigabytes} | {rate} | {row['share']:.1%} |"
        )
    return "\n".join([*lines, f"| wall | {report['wall']:.2f} | | | | |"])


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synchronize", action="store_true", help="wait for the device at both ends of a stage")
    parser.add_argument("--data_free", action="store_true", help="the recipe needs no data: do not import diffusers")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a streamq command with its options")
    args = parser.parse_args()
    from streamq.device import kind_of

    given = args.command[args.command.index("--device") + 1] if "--device" in args.command else "auto"
    device = kind_of(given) if given == "auto" else given
    report = run(args.command, device=device, calibrated=not args.data_free, synchronize=args.synchronize)
    print(table(report), file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
