"""Calibrated W8A8 by one process and by several, side by side: wall, processor seconds, memory of each, equal bytes.

    python benchmarks/processes.py [--family t2v-1.3B] [--blocks 3] [--samples 8] [--recipe w8a8_smooth]
                                   [--counts 1,2] [--runs 3] [--json FILE]

Every process has one thread, so that what is compared is the division of the work and not that of a matrix product.
Contestants take turns; ratios are medians of the rounds' own. With fewer cores than processes there is nothing to gain.
`work` leaves out the start of Python and torch and the launcher's own: it is the time that streamq says it took.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import synthetic

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "STREAMQ_THREADS": "1"}


def quant(count: int, model: Path, calib: Path, out: Path, recipe: str) -> dict[str, Any]:
    """One run by `count` processes, under torchrun where there are several."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "streamq", "quant", "--model_path", str(model), "--save_path", str(out)]
    command += ["--quant_type", recipe, "--calib", str(calib), "--device", "cpu", "--quiet", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_THREAD, check=False)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout[done.stdout.index("{") :])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "work": figures["seconds"], "cpu": cpu, "peak": figures["peak_host_bytes"],
            "manifest": (out / "streamq.json").read_text()}  # fmt: skip


def compare(counts: list[int], runs: int, scratch: Path, model: Path, calib: Path, recipe: str) -> list[dict[str, Any]]:
    """Rows of medians, and ratios to one process."""
    rounds: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for number in range(runs):
        for count in counts[number % len(counts) :] + counts[: number % len(counts)]:
            rounds[count].append(quant(count, model, calib, scratch / f"out-{number}-{count}", recipe))
    same = len({run["manifest"] for found in rounds.values() for run in found}) == 1
    table = []
    for count, found in rounds.items():
        row: dict[str, Any] = {"processes": count, "same_bytes": same}
        for figure in ("wall", "work", "cpu", "peak"):
            row[figure] = statistics.median(run[figure] for run in found)
            pairs = zip(found, rounds[counts[0]], strict=True)
            row[f"{figure}/{counts[0]}"] = statistics.median(a[figure] / b[figure] for a, b in pairs)
        table.append(row)
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="t2v-1.3B", choices=synthetic.FAMILIES)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--size", default="832*480")
    parser.add_argument("--frame_num", type=int, default=5)
    parser.add_argument("--recipe", default="w8a8_smooth")
    parser.add_argument(
        "--counts", default="1,2", help="numbers of processes; the first is what the others are held to"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--data", type=Path, help="where to make everything (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.data) as folder:
        scratch = Path(folder)
        synthetic.write(scratch / "model", replace(synthetic.FAMILIES[args.family], blocks=args.blocks), dtype="bf16")
        given = ["--model_path", scratch / "model", "--save_path", scratch / "calib", "--size", args.size]
        given += ["--frame_num", args.frame_num, "--num_samples", args.samples, "--quiet"]
        subprocess.run([sys.executable, "-m", "streamq", "calib", *map(str, given)], check=True)
        counts = [int(text) for text in args.counts.split(",")]
        table = compare(counts, args.runs, scratch, scratch / "model", scratch / "calib", args.recipe)
    for row in table:
        print(
            "  ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if args.json:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        machine = {"cpus": len(os.sched_getaffinity(0)), "processor": model[1] if model else platform.machine()}
        settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "data")}
        args.json.write_text(json.dumps({"machine": machine, "settings": settings, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
