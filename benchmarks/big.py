"""A model of 14 billion parameters from disk to disk: time and memory of a whole run beside what the plan has said.

    python benchmarks/big.py --json benchmarks/big.json [--blocks 40] [--data DIR] [--keep] [--verify_source]

Makes a checkpoint with the names, shapes and shards of Wan2.1-T2V-14B in bf16 (28.6 GB; its blocks hold the same
synthetic numbers), runs `streamq quant --quant_type w8a8 --format mindie,lightx2v`, then `streamq verify`, and removes
everything. Room for source and output, 60 GB, is asked for before anything is made. The JSON is written anew after
each part, and the exit status is 1 if anything contradicts the plan or the manifest.

Each command is a process of its own from a cold page cache, its output on the disk when its clock stops. `peak`: VmHWM;
`over_import`: above what the process held when its imports were done; `bytes_read`, `bytes_written`: rchar and wchar as
the operating system counts them, Python's own modules in them. Stages: benchmarks/stages.py, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import contestants
import quant
import stages
import synthetic
from blocks import streamq
from suite import machine, write

from streamq.checkpoint import Checkpoint, TensorInfo, open_checkpoint

SHARD = 4.9e9  # six files at 40 blocks, as the release has
RESERVE = 1 << 30  # of the disk, beyond what is made
CHUNK = 16 << 20


def make(out: Path, family: synthetic.Family, dtype: str) -> dict[str, Any]:
    """Write the checkpoint; block 0 and what lies outside blocks are made, the others are copies of block 0.

    Headers come first, with holes for data. In a few MiB of memory.
    """
    began = time.monotonic()
    synthetic.write(out, family, dtype=dtype, shard_bytes=int(SHARD), sparse=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        synthetic.write(Path(folder), replace(family, blocks=1), dtype=dtype)
        one, whole = open_checkpoint(Path(folder)), open_checkpoint(out)
        sources, targets = _opened(one, os.O_RDONLY), _opened(whole, os.O_WRONLY)
        buffer = memoryview(bytearray(CHUNK))
        for info in sorted(whole.tensors.values(), key=lambda info: (info.file, info.offset)):
            first, _, rest = info.name.partition(".")
            name = f"blocks.0.{rest.partition('.')[2]}" if first == "blocks" else info.name
            given = one.tensors[name]
            assert given.nbytes == info.nbytes, (info.name, given.nbytes, info.nbytes)
            _copy(sources[given.file], given, targets[info.file], info, buffer)
        for descriptor in targets:
            os.fsync(descriptor)
        for descriptor in sources + targets:
            os.close(descriptor)
    size = sum(file.size for file in whole.files)
    return {"seconds": round(time.monotonic() - began, 1), "bytes": size, "files": len(whole.files)}


def _opened(checkpoint: Checkpoint, mode: int) -> list[int]:
    return [os.open(file.path, mode) for file in checkpoint.files]


def _copy(source: int, given: TensorInfo, target: int, info: TensorInfo, buffer: memoryview) -> None:
    """A tensor's bytes; what is written begins its way to the disk, and leaves the page cache once it is there."""
    for start in range(0, info.nbytes, CHUNK):
        part = buffer[: min(CHUNK, info.nbytes - start)]
        assert os.preadv(source, [part], given.offset + start) == len(part), info.name
        done = 0
        while done < len(part):
            done += os.pwrite(target, part[done:], info.offset + start + done)
        os.posix_fadvise(target, info.offset, start, os.POSIX_FADV_DONTNEED)


def planned(scratch: Path, family: synthetic.Family, options: list[str], dtype: str) -> dict[str, Any]:
    """What `streamq plan` says, by headers without data. Ends the program where the disk is too small."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        model, out = Path(folder) / "model", Path(folder) / "out"
        synthetic.write(model, family, dtype=dtype, shard_bytes=int(SHARD), sparse=True)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        plan = streamq("plan", "--model_path", model, "--save_path", out, *options)
    free, need = shutil.disk_usage(scratch).free, size * (1 + 1 / family.blocks) + plan["bytes_to_write"] + RESERVE
    if need > free:
        raise SystemExit(f"{scratch}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free; --data, or --blocks")
    wanted = ("bytes_to_read", "bytes_to_write", "peak_host_bytes", "peak_device_bytes", "seconds", "files")
    return {key: plan[key] for key in wanted if key in plan}


def run(argv: list[str], out: Path, cold: Path, device: str, *, clocks: bool) -> dict[str, Any]:
    """A streamq command's account. `cold`: the folder that is not to be in the page cache."""
    spec = {"argv": argv, "out": str(out), "device": device, "stages": clocks}
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, contestants.__file__, "streamq", json.dumps(spec)]
    return {"command": ["streamq", *argv]} | quant.run_cold(command, cold, env | {"HF_HUB_OFFLINE": "1"})


def contradictions(found: dict[str, Any], out: Path) -> list[str]:
    """What is not as the plan or the manifest has it."""
    plan, made, problems = found["plan"], found["quant"], []
    for file in plan["files"]:
        if not (out / file["path"]).is_file() or (out / file["path"]).stat().st_size != file["bytes"]:
            problems.append(f"{file['path']}: not the {file['bytes']} bytes that the plan says")
    manifest = json.loads((out / "streamq.json").read_text())
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"streamq.json"}
    if written != set(manifest["files"]):
        problems.append(f"files that differ from the manifest's: {sorted(written ^ set(manifest['files']))[:5]}")
    if plan["peak_host_bytes"] and made["peak"] > plan["peak_host_bytes"]:
        problems.append(f"peak of {made['peak']} bytes, the plan says {plan['peak_host_bytes']}")
    rows = {row["stage"]: row for row in made.get("stages", {}).get("rows", ())}
    if rows and rows["read"]["bytes"] != plan["bytes_to_read"]:
        problems.append(f"{rows['read']['bytes']} bytes of weights read, the plan says {plan['bytes_to_read']}")
    return problems


def measure(args: argparse.Namespace, scratch: Path, found: dict[str, Any]) -> None:
    """Every part; `found` grows, and is written after each."""
    family = replace(synthetic.FAMILIES[args.family], blocks=args.blocks or synthetic.FAMILIES[args.family].blocks)
    options = ["--quant_type", args.quant_type, "--format", args.format, "--device", args.device]
    source, out = scratch / "model", scratch / "out"

    def note(part: str, about: Any) -> None:
        found[part] = about
        if args.json:
            write(args.json, found, scratch)

    note("plan", planned(scratch, family, options, args.dtype))
    note("model", {"family": args.family, "blocks": family.blocks, "dtype": args.dtype})
    _say("making the checkpoint")
    note("source", make(source, family, args.dtype))
    _say(f"made in {found['source']['seconds']} s; quantizing")
    argv = ["quant", "--model_path", str(source), "--save_path", str(out), *options, "--quiet"]
    note("quant", run(argv, out, source, args.device, clocks=not args.no_stages))
    _say(f"quantized in {found['quant']['wall']:.1f} s; verifying")
    problems = contradictions(found, out)
    found["plan"].pop("files")
    note("problems", problems)
    note("verify", run(["verify", str(out)], out, out, "cpu", clocks=False))
    if args.verify_source:
        _say(f"verified in {found['verify']['wall']:.1f} s; comparing with the source")
        argv = ["verify", str(out), "--source", str(source)]
        note("verify_source", run(argv, out, scratch, "cpu", clocks=False))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(found: dict[str, Any]) -> str:
    """The figures as text."""
    plan, made, source = found["plan"], found["quant"], found["source"]
    MiB = 1 << 20
    lines = [
        f"{found['model']['family']}, {found['model']['blocks']} blocks, {found['model']['dtype']}:"
        f" {source['bytes'] / 1e9:.2f} GB in {source['files']} files, made in {source['seconds']} s",
        "| | measured | plan |",
        "|---|---|---|",
        f"| wall | {made['wall']:.1f} s | |",
        f"| processor | {made['cpu']:.1f} s | |",
        f"| peak | {made['peak'] / MiB:,.0f} MiB | {plan['peak_host_bytes'] / MiB:,.0f} MiB |",
        f"| over imports | {made['over_import'] / MiB:,.0f} MiB | |",
        f"| read | {made['bytes_read'] / 1e9:.2f} GB | {plan['bytes_to_read'] / 1e9:.2f} GB |",
        f"| written | {made['written'] / 1e9:.2f} GB | {plan['bytes_to_write'] / 1e9:.2f} GB |",
    ]
    if made["peak_device"]:
        lines.append(f"| device | {made['peak_device'] / MiB:,.0f} MiB | {plan['peak_device_bytes'] / MiB:,.0f} MiB |")
    for part in ("verify", "verify_source"):
        if part in found:
            lines.append(f"| {part} | {found[part]['wall']:.1f} s, {found[part]['over_import'] / MiB:,.0f} MiB | |")
    if "stages" in made:
        lines += ["", stages.table(made["stages"])]
    return "\n".join(lines + [f"contradiction: {one}" for one in found["problems"]])


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", default="t2v-14B", choices=[name for name, one in synthetic.FAMILIES.items() if one.experts == 1])
    add("--blocks", type=int, help="instead of the family's")
    add("--dtype", default="bf16", choices=list(synthetic.DTYPES))
    add("--quant_type", default="w8a8")
    add("--format", default="mindie,lightx2v")
    add("--device", default="cpu")
    add("--data", type=Path, help="folder on the disk to be used (default: a temporary folder)")
    add("--no_stages", action="store_true", help="no clocks in the run")
    add("--verify_source", action="store_true", help="verify once more, every layer against the source")
    add("--keep", action="store_true", help="leave source and output")
    add("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    found: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "machine": machine(args.device), "versions": contestants.versions()
    }  # fmt: skip
    scratch = Path(tempfile.mkdtemp(prefix="streamq-big-", dir=args.data))
    try:
        measure(args, scratch, found)
    finally:
        if args.keep:
            _say(f"kept: {scratch}")
        else:
            shutil.rmtree(scratch)
    print(show(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
