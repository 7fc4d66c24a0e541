"""Several formats from one read: a run that writes them all beside the runs that write one each, in turn, in one go.

    python benchmarks/formats.py [--formats mindie,lightx2v,diffusers] [--quant_type w8a8] [--family t2v-1.3B]
                                 [--blocks 30] [--dtype fp32] [--runs 3] [--data DIR] [--json FILE]

Every figure is a whole process's: wall and processor seconds with Python's and torch's start in it, peak memory and the
bytes that it asked the system for. The source is dropped from the page cache before each run, and every output is on
the disk when its clock stops. Each folder of the joint run is then compared with the single run's, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthetic import FAMILIES, write

COMMAND = (
    "import json, re, sys; from pathlib import Path; from streamq.cli import main; status = main(sys.argv[1:]); "
    "read = re.search(r'rchar: (\\d+)', Path('/proc/self/io').read_text())[1]; "
    "peak = re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]; "
    "print(json.dumps({'bytes_read': int(read), 'peak': int(peak) * 1024})); sys.exit(status)"
)


def measure(source: Path, out: Path, quant_type: str, formats: str) -> dict[str, float]:
    """One run from a cold page cache; its folder stays."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for path in source.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    argv = ["quant", "--model_path", str(source), "--save_path", str(out), "--quant_type", quant_type]
    argv += ["--format", formats, "--device", "cpu", "--quiet"]
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", COMMAND, *argv], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    account = json.loads(child.stdout.read().splitlines()[-1])
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    assert status == 0, f"{formats} failed"
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "written": written} | account


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, the manifest and subfolders of other formats excepted."""
    names = [
        {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.name != "streamq.json"}
        for root in (one, other)
    ]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def compare(source: Path, scratch: Path, quant_type: str, formats: list[str], runs: int) -> dict[str, Any]:
    """Medians of every contestant, and the joint run's wall over the slowest single one's, run by run."""
    together = ",".join(formats)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in (*formats, together)}
    measure(source, scratch / "warm", quant_type, formats[0])
    shutil.rmtree(scratch / "warm")
    for number in range(runs):
        order = list(rounds)[number % len(rounds) :] + list(rounds)[: number % len(rounds)]
        for name in order:
            rounds[name].append(measure(source, scratch / name, quant_type, name))
        equal = all(same(scratch / together / name, scratch / name) for name in formats)
        assert equal, "a folder of the joint run is not the single run's"
        for name in rounds:
            shutil.rmtree(scratch / name)
    rows = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in rounds.items()
    }
    ratios = {
        key: statistics.median(
            rounds[together][i][key] / max(rounds[name][i][key] for name in formats) for i in range(runs)
        )
        for key in ("wall", "cpu", "bytes_read", "written", "peak")
    }
    return {"rows": rows, "ratios": ratios}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="mindie,lightx2v,diffusers")
    parser.add_argument("--quant_type", default="w8a8")
    parser.add_argument("--family", default="t2v-1.3B", choices=FAMILIES)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--data", type=Path, help="where to make the checkpoint (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.data) as folder:
        source = Path(folder) / "source"
        write(source, replace(FAMILIES[args.family], blocks=args.blocks), dtype=args.dtype)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        found = compare(source, Path(folder), args.quant_type, args.formats.split(","), args.runs)
    print(f"{args.family}, {args.blocks} blocks, {args.dtype}: {size / 1e9:.2f} GB; {args.quant_type}")
    print(f"{'':32s}{'wall s':>8s}{'cpu s':>8s}{'read GB':>9s}{'written GB':>11s}{'peak MiB':>10s}")
    for name, row in found["rows"].items():
        print(
            f"{name:32s}{row['wall']:8.2f}{row['cpu']:8.2f}{row['bytes_read'] / 1e9:9.2f}{row['written'] / 1e9:11.2f}"
            f"{row['peak'] / 2**20:10.0f}"
        )
    print("together / slowest: " + "  ".join(f"{key} {value:.2f}" for key, value in found["ratios"].items()))
    if args.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        about = {"family": args.family, "blocks": args.blocks, "dtype": args.dtype, "runs": args.runs, "source": size}
        args.json.write_text(json.dumps(about | {"machine": machine} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
