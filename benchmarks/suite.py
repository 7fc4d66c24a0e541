"""Everything that streamq does, timed stage by stage beside what it should be judged by, in one run; table, JSON, plot.

    python benchmarks/suite.py --json benchmarks/suite.json --markdown FILE --plot FILE.svg
    python benchmarks/suite.py --only data_free,generate --family t2v-1.3B --blocks 4 --runs 1 --device cuda --data DIR
    python benchmarks/suite.py --quick                tiny models, one round: whether it works, not how fast

    data_free   w8a8 for mindie, lightx2v, diffusers: a copy of the same bytes, load-everything tools, torchao, sdnq
    calibrated  w8a8_smooth: the same set through the float blocks alone, a load-everything SmoothQuant, a copy
    svdquant    w4a4_fast: the same set through the float blocks alone, sdnq's int4 with SVD, a copy; --published too
    generate    a video with no block kept, and with all: diffusers' own pipeline with everything in memory

Every contestant is a process of its own, from a cold page cache, with its output on the disk before its clock stops.
They take turns; ratios are medians of the rounds' own ratios, and are the result. A streamq command runs once more with
clocks in it for the stages, which its other figures do not have. A peer that is not installed has a row that says so;
one that is not to be installed beside streamq may be given by PYTHONPATH (`pip install --no-deps --target DIR sdnq`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import contestants
import quant
import synthetic
import tables
from blocks import ROOT, streamq

TOY = ROOT / "tests" / "assets" / "toy_wan"
PROMPT = "a red circle moving left over a black background"
FIGURES = ("wall", "cpu", "work", "seconds_per_step", "peak", "over_import", "peak_device", "bytes_read", "written")
RATIOS = ("wall", "cpu", "work", "seconds_per_step", "over_import", "peak_device")
HOW = {
    "wall": "seconds from the start of the process to its end, imports and fsync of every file in it",
    "cpu": "user and system seconds of the process, as the operating system accounts them (wait4)",
    "work": "seconds from the end of the imports to the last byte on the disk; of `forward` its forwards alone",
    "seconds_per_step": "seconds of a denoising step, the first one left out",
    "peak": "VmHWM of the process",
    "over_import": "peak less what was resident at the end of the imports",
    "peak_device": "the allocator's max_memory_allocated",
    "bytes_read": "rchar of the process, Python's own modules in it",
    "written": "bytes of all files that it left",
    "torchao": "WanTransformer3DModel loaded whole in bf16, quantize_ on every linear layer, saved as safetensors",
    "sdnq": "the same by sdnq_post_load_quant and save_sdnq_model",
    "ratios": "median over rounds of a contestant's figure by another one's of the same round",
    "stages": "one further run with clocks around streamq's own functions (benchmarks/stages.py): thread seconds",
}
FULL: dict[str, dict[str, Any]] = {
    "data_free": {"blocks": 0},  # the family's own number
    "calibrated": {"blocks": 5, "samples": 8, "size": "832*480", "frame_num": 5},
    "svdquant": {"blocks": 1, "samples": 4, "size": "256*256", "frame_num": 5},
    "generate": {"blocks": 10, "size": "256*256", "frame_num": 5, "steps": 5, "guidance": 5.0},
}
LITTLE = {"samples": 2, "size": "64*64", "frame_num": 5}
QUICK: dict[str, dict[str, Any]] = {
    "data_free": {"blocks": 2}, "calibrated": LITTLE | {"blocks": 1}, "svdquant": LITTLE | {"blocks": 1},
    "generate": {"blocks": 2, "size": "64*64", "frame_num": 5, "steps": 3, "guidance": 5.0},
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A contestant of a section. `against`: labels that it is compared with; `clocked`: its stages are wanted.

    unavailable: why it does not run. peer: its failure is a row, and no end of the suite.
    """

    contestant: str
    spec: dict[str, Any]
    source: Path
    against: tuple[str, ...] = ()
    clocked: bool = False
    unavailable: str | None = None
    peer: bool = False


Section = tuple[dict[str, Any], dict[str, Entry]]  # what it is about, and its contestants by label


# -- Sections ----------------------------------------------------------------------------------------------------------


def _family(args: argparse.Namespace, blocks: int, **how: Any) -> synthetic.Family:
    family = synthetic.FAMILIES[args.family]
    if args.quick:
        family = synthetic.tiny(family)
    return replace(family, blocks=args.blocks or blocks or family.blocks, **how)


def _made(args: argparse.Namespace, source: Path, family: synthetic.Family, dtype: str, **about: Any) -> dict[str, Any]:
    """Write a checkpoint with diffusers' names; returns what the section is about."""
    synthetic.write(source, family, layout="diffusers", dtype=dtype)
    size = sum(path.stat().st_size for path in (source / "transformer").glob("*.safetensors"))
    known = {"family": args.family, "blocks": family.blocks, "dim": family.dim, "dtype": dtype, "source": size}
    return known | {key: value for key, value in about.items() if key not in known}


def _peer(name: str, contestant: str, spec: dict[str, Any], source: Path) -> Entry:
    return Entry(contestant, spec, source, unavailable=contestants.missing(name), peer=True)


def _command(source: Path, out: Path, args: argparse.Namespace, *more: object) -> list[str]:
    options = ["--model_path", source, "--save_path", out, "--device", args.device, *more]
    return [str(one) for one in options]


def data_free(args: argparse.Namespace, folder: Path, sizes: dict[str, Any]) -> Section:
    """w8a8. Peers are compared with the format that holds the same layers, diffusers'."""
    source, out = folder / "model", folder / "out"
    about = _made(args, source, _family(args, sizes["blocks"]), args.dtype, quant_type="w8a8")
    entries: dict[str, Entry] = {}
    for every, form in enumerate(("mindie", "lightx2v", "diffusers")):  # each takes more layers than the one before
        others, peers = (f"copy, as {form}", f"load everything, as {form}"), ("torchao", "sdnq") * (form == "diffusers")
        if not any(re.search(args.rows or "", label) for label in (f"streamq {form}", *others)):
            continue
        command = _command(source, out, args, "--quant_type", "w8a8", "--format", form)
        nbytes = streamq("plan", *command)["bytes_to_write"]
        spec = {"argv": ["quant", *command, "--quiet"]}
        entries[f"streamq {form}"] = Entry("streamq", spec, source, (*others, *peers), clocked=True)
        entries[others[0]] = Entry("copy", {"nbytes": nbytes}, source)
        entries[others[1]] = Entry("load_all", {"every": every}, source)
    entries["torchao"] = _peer("torchao", "torchao", {"dtype": "bfloat16"}, source)
    options = {"weights_dtype": "int8", "group_size": -1, "modules_to_not_convert": []}
    entries["sdnq"] = _peer("sdnq", "sdnq", {"dtype": "bfloat16", "options": options}, source)
    entries["msmodelslim"] = _peer("msmodelslim", "", {}, source)
    return about, entries


def _calibration(args: argparse.Namespace, model: Path, calib: Path, sizes: dict[str, Any]) -> None:
    how = ["--num_samples", sizes["samples"], "--size", sizes["size"], "--frame_num", sizes["frame_num"]]
    streamq("calib", *_command(model, calib, args, *how), "--quiet")


def calibrated(args: argparse.Namespace, folder: Path, sizes: dict[str, Any]) -> Section:
    """w8a8_smooth for mindie, on a set that is made before."""
    source, out, calib = folder / "model", folder / "out", folder / "calib"
    about = _made(args, source, _family(args, sizes["blocks"]), "bf16", quant_type="w8a8_smooth", **sizes)
    _calibration(args, source, calib, sizes)
    command = _command(source, out, args, "--quant_type", "w8a8_smooth", "--calib", calib)
    plan = streamq("plan", *command)
    about["planned_peak"] = plan["peak_host_bytes"]
    spec = {"argv": ["quant", *command, "--quiet"], "calibrated": True}
    others = ("forward", "load everything, SmoothQuant", "copy")
    return about, {
        "streamq w8a8_smooth": Entry("streamq", spec, source, others, clocked=True),
        "forward": Entry("forward", {"calib": str(calib)}, source),
        "load everything, SmoothQuant": Entry("load_all_smooth", {"calib": str(calib)}, source),
        "copy": Entry("copy", {"nbytes": plan["bytes_to_write"]}, source),
    }


def svdquant(args: argparse.Namespace, folder: Path, sizes: dict[str, Any]) -> Section:
    """w4a4_fast for nunchaku, on a set that is made before. sdnq's looks at weights alone."""
    source, out, calib = folder / "model", folder / "out", folder / "calib"
    wide = {"dim": 128, "ffn": 256, "heads": 1} if args.quick else {}  # what the kernels' layout can hold
    about = _made(args, source, _family(args, sizes["blocks"], **wide), "bf16", quant_type="w4a4_fast", **sizes)
    _calibration(args, source, calib, sizes)
    command = _command(source, out, args, "--quant_type", "w4a4_fast", "--calib", calib)
    plan = streamq("plan", *command)
    about["planned_peak"] = plan["peak_host_bytes"]
    spec = {"argv": ["quant", *command, "--quiet"], "calibrated": True}
    options = {"weights_dtype": "int4", "group_size": 64, "use_svd": True, "svd_rank": 32}
    options["modules_to_not_convert"] = contestants.OUTSIDE
    others = ("forward", "sdnq int4 + SVD", "copy") + (("published",) if args.published else ())
    entries = {
        "streamq w4a4_fast": Entry("streamq", spec, source, others, clocked=True),
        "forward": Entry("forward", {"calib": str(calib)}, source),
        "sdnq int4 + SVD": _peer("sdnq", "sdnq", {"dtype": "bfloat16", "options": options}, source),
        "copy": Entry("copy", {"nbytes": plan["bytes_to_write"]}, source),
    }
    if args.published:
        entries["published"] = Entry("published", {"calib": str(calib)}, source)
    return about, entries


def generate(args: argparse.Namespace, folder: Path, sizes: dict[str, Any]) -> Section:
    """A video by the toy's text encoder and VAE, and a synthetic transformer between them."""
    source, out = folder / "pipeline", folder / "out"
    shutil.copytree(TOY, source, ignore=shutil.ignore_patterns("transformer", "README.md"))
    index = (source / "model_index.json").read_text()
    text_dim = json.loads((TOY / "transformer" / "config.json").read_text())["text_dim"]
    about = _made(args, source, _family(args, sizes["blocks"], text_dim=text_dim), "bf16", **sizes)
    (source / "model_index.json").write_text(index)
    how = ["--prompt", PROMPT, "--size", sizes["size"], "--frame_num", sizes["frame_num"]]
    how += ["--sample_steps", sizes["steps"], "--guidance", sizes["guidance"], "--quiet"]
    argv = ["generate", *_command(source, out, args, *how)]
    width, height = map(int, sizes["size"].split("*"))
    given = {key: sizes[key] for key in ("frame_num", "steps", "guidance")} | {"prompt": PROMPT}
    others = ("diffusers, all in memory",)
    return about, {
        "streamq, no block kept": Entry("streamq", {"argv": argv, "least": True}, source, others, clocked=True),
        "streamq, every block kept": Entry("streamq", {"argv": argv}, source, others, clocked=True),
        others[0]: Entry("pipeline", given | {"size": [width, height]}, source),
    }


SECTIONS: dict[str, Callable[[argparse.Namespace, Path, dict[str, Any]], Section]] = {
    "data_free": data_free, "calibrated": calibrated, "svdquant": svdquant, "generate": generate,
}  # fmt: skip


# -- Measuring ---------------------------------------------------------------------------------------------------------


def command_of(entry: Entry, out: Path, device: str, **more: Any) -> list[str]:
    """What runs it. `forward` writes nothing, and so has no folder to be synced."""
    spec = entry.spec | {"source": str(entry.source), "device": device} | more
    if entry.contestant != "forward":
        spec["out"] = str(out)
    return [sys.executable, contestants.__file__, entry.contestant, json.dumps(spec)]


def measure(entry: Entry, out: Path, device: str, **more: Any) -> dict[str, Any]:
    """One run; what it wrote is removed. Of a peer that fails: why."""
    shutil.rmtree(out, ignore_errors=True)
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    try:
        return quant.run_cold(command_of(entry, out, device, **more), entry.source, env | {"HF_HUB_OFFLINE": "1"})
    except SystemExit as failure:
        if not entry.peer:
            raise
        return {"failed": str(failure)[-500:]}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def compare(entries: Mapping[str, Entry], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rows by label, and ratios by label and by the one that it is compared with."""
    here, out = {label: one for label, one in entries.items() if one.unavailable is None}, folder / "out"
    runs = quant.take_turns(
        {label: partial(_told, label, measure, one, out, args.device) for label, one in here.items()}, args.runs
    )
    rows: dict[str, Any] = {}
    for label, entry in entries.items():
        failed = entry.unavailable or next((one["failed"] for one in runs[label] if "failed" in one), None)
        if failed:
            rows[label] = {"not_run": failed}
            continue
        known = [key for key in FIGURES if all(key in one for one in runs[label])]
        medians = {key: statistics.median(one[key] for one in runs[label]) for key in known}
        rows[label] = medians | {"runs": runs[label], "command": command_of(entry, out, args.device)[1:]}
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for label, entry in entries.items():
        for other in (one for one in entry.against if "not_run" not in rows.get(one, {"not_run": ""})):
            found = [key for key in RATIOS if rows[label].get(key) and rows[other].get(key)]
            if entries[other].contestant in ("copy", "forward"):  # they hold a buffer, a block
                found = [key for key in found if not key.startswith(("over_import", "peak"))]
            made = {key: round(quant.ratio(runs, label, other, key), 4) for key in found}
            ratios.setdefault(label, {})[other] = made
    return {"rows": rows, "ratios": ratios}


def _told(label: str, call: Callable[..., dict[str, Any]], *args: Any, **how: Any) -> dict[str, Any]:
    found = call(*args, **how)
    text = f"{found['wall']:.1f} s" if "wall" in found else found["failed"]
    print(f"  {label}: {text}", file=sys.stderr, flush=True)
    return found


def run_section(name: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything of one section."""
    folder = scratch / name
    folder.mkdir()
    sizes = (QUICK if args.quick else FULL)[name]
    print(f"{name}: making its model", file=sys.stderr, flush=True)
    about, entries = SECTIONS[name](args, folder, sizes)
    entries = {label: one for label, one in entries.items() if re.search(args.rows or "", label)}
    try:
        found = {"about": about} | compare(entries, args, folder)
        found["stages"] = {}
        for label, entry in ((label, one) for label, one in entries.items() if one.clocked):
            how = {"stages": True, "synchronize": args.synchronize}
            made = _told(f"{label}, with clocks", measure, entry, folder / "out", args.device, **how)
            found["stages"][label] = made["stages"] | {"written": made["written"]}
        if name == "generate":
            rows = [one for one in found["rows"].values() if "runs" in one]
            frames = {one["runs"][0]["frames_sha256"] for one in rows}
            found["about"]["same_frames"] = len(frames) == 1
    finally:
        shutil.rmtree(folder)
    return found


def write(path: Path, document: dict[str, Any], scratch: Path) -> None:
    """As JSON, without this machine's folders."""
    text = json.dumps(document, indent=1).replace(str(scratch), "DIR").replace(f"{ROOT}/", "")
    path.write_text(text + "\n")


def machine(device: str) -> dict[str, Any]:
    """What it was measured on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    found = {
        "cpus": len(os.sched_getaffinity(0)), "architecture": platform.machine(), "cpu": model[1] if model else "",
        "memory": int(memory[1]) * 1024 if memory else 0, "python": platform.python_version(), "device": device,
    }  # fmt: skip
    if device != "cpu":
        import torch

        found["device_name"] = torch.get_device_module(device.partition(":")[0]).get_device_name()
    return found


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    add("--family", default="t2v-1.3B", choices=list(synthetic.FAMILIES), help="its width and number of blocks")
    add("--blocks", type=int, help="in every section (default: each section's own)")
    add("--rows", help="only contestants whose names match this regular expression")
    add("--dtype", default="fp32", choices=list(synthetic.DTYPES), help="of data_free's source (default fp32)")
    add("--runs", type=int, default=3)
    add("--device", default="cpu", help="cpu, cuda[:i], npu[:i]")
    add("--synchronize", action="store_true", help="stages on a device: wait for it at both ends of each")
    add("--published", action="store_true", help="svdquant: its authors' search beside it; takes hours but in --quick")
    add("--data", type=Path, help="where to make the models (default: a temporary folder)")
    add("--quick", action="store_true", help="tiny models and one round: a minute or two")
    add("--json", type=Path, help="write all figures here")
    add("--markdown", type=Path, help="write the tables here too")
    add("--plot", type=Path, help="write a plot here: .png, .svg or .pdf")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    args.runs = 1 if args.quick else args.runs
    document: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "runs": args.runs, "machine": machine(args.device),
        "versions": contestants.versions(), "how": HOW, "sections": {},
    }  # fmt: skip
    if not args.quick:  # what everybody imports comes from the disk once, and not in the first one's time
        subprocess.run([sys.executable, "-c", "import torch, diffusers, diffusers.models"], check=True)
    with tempfile.TemporaryDirectory(dir=args.data) as folder:
        for name in names:
            document["sections"][name] = run_section(name, args, Path(folder))
            if args.json:  # after each, so that what is done is kept
                write(args.json, document, Path(folder))
    text = tables.markdown(document)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.plot:
        tables.plot(document, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
