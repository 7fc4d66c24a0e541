"""A calibrated W8A8 run beside the forward of its blocks alone, and its memory against the plan's.

    python benchmarks/calibrate.py [--family t2v-1.3B] [--blocks 3] [--samples 8] [--size 832*480] [--frame_num 5]
                                   [--runs 3] [--json FILE]

The unit of time is one pass of the calibration set through the float blocks by diffusers' own modules, weights already
in memory: `forward`. `w8a8_static` (ranges of every layer's input) is what must cost little more than that; smoothing
and GPTQ search, and cost what they search. The two take turns in processes of their own, and the ratios are medians of
pairs. `scaling` repeats the static run with other numbers of blocks and samples: the peak must not follow the former,
and the latter only by the cache that the plan announces.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import synthetic
import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("w8a8_static", "w8a8_smooth", "w8a8_gptq")


def forward(model: Path, calib: Path, device: str = "cpu") -> dict[str, float]:
    """Seconds of all samples through all blocks, and nothing else."""
    import torch

    from streamq import wan
    from streamq.calibration.store import open_set
    from streamq.checkpoint import Source
    from streamq.device.cpu import host_bytes
    from streamq.dtypes import TORCH_DTYPES
    from streamq.wan.blocks import BlockRunner, Shared, names_in, tensors_of

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    expert, inputs = wan.open_model(model)[0], open_set(calib).experts[""]
    weights, data = Source(expert.model.checkpoint), Source(inputs.checkpoint)

    def read(name: str) -> torch.Tensor:
        info = inputs.tensors[name]
        memory = torch.empty(info.nbytes, dtype=torch.uint8)
        data.read(info, 0, host_bytes(memory))
        return memory.view(TORCH_DTYPES[info.dtype]).view(info.shape).to(device)

    rotary = (read("rotary.cos"), read("rotary.sin"))
    runner = BlockRunner(expert.model, TORCH_DTYPES[inputs.shapes.dtype], device)
    samples = [
        Shared(read(f"encoder_hidden_states.{s.states}"), read(f"timestep_proj.{n}"), None, rotary, None)
        for n, s in enumerate(inputs.samples)
    ]
    hidden, seconds = [read(f"hidden_states.{n}") for n in range(len(samples))], 0.0
    for unit in expert.model.replay_order:
        runner.fill(unit, tensors_of(weights, expert.model, names_in(expert.model, unit), device))
        began = time.perf_counter()
        for n, shared in enumerate(samples):
            hidden[n] = runner.run(unit, {"hidden": hidden[n]}, shared)["hidden"]
        if device != "cpu":
            torch.get_device_module(device.partition(":")[0]).synchronize()
        seconds += time.perf_counter() - began
    return {"seconds": seconds}


def quant(model: Path, save: Path, recipe: Path, calib: Path) -> dict[str, Any]:
    """Seconds of `streamq quant` from its first weight to its last file, and its peak memory beside the plan's."""
    command = ["--model_path", model, "--save_path", save, "--config_path", recipe, "--calib", calib, "--device", "cpu"]
    planned = json.loads(_streamq("plan", *command, "--json"))
    done = json.loads(_streamq("quant", *command, "--overwrite", "--quiet", "--json"))
    return {
        "seconds": done["seconds"],
        "peak": done["peak_host_bytes"],
        "planned": planned["peak_host_bytes"],
        "cache": planned["calibration"]["cache_bytes"] * planned["calibration"]["cache_in_memory"],
    }


def _streamq(*args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "streamq", *map(str, args)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def _child(model: Path, calib: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--forward", str(model), str(calib)], capture_output=True, text=True, check=True
    )
    return json.loads(re.findall(r"\{.*\}", done.stdout)[-1])


def _recipe(name: str, folder: Path) -> Path:
    document = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return folder / f"{name}.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="t2v-1.3B", choices=list(synthetic.FAMILIES))
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--size", default="832*480")
    parser.add_argument("--frame_num", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--forward", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.forward:
        print(json.dumps(forward(*args.forward)))
        return 0
    found: dict[str, Any] = {k: str(v) for k, v in vars(args).items() if k not in ("json", "forward")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def prepared(blocks: int, samples: int) -> tuple[Path, Path]:
            model, calib = folder / f"model{blocks}", folder / f"calib{blocks}-{samples}"
            if not model.exists():
                synthetic.write(model, replace(synthetic.FAMILIES[args.family], blocks=blocks), dtype="bf16")
            if not calib.exists():
                _streamq("calib", "--model_path", model, "--save_path", calib, "--num_samples", samples, "--size",
                         args.size, "--frame_num", args.frame_num, "--device", "cpu", "--quiet")  # fmt: skip
            return model, calib

        model, calib = prepared(args.blocks, args.samples)
        for recipe in args.recipes.split(","):
            path, pairs = _recipe(recipe, folder), []
            for _ in range(args.runs):
                unit = _child(model, calib)
                pairs.append((unit["seconds"], quant(model, folder / "out", path, calib)))
            ratio = statistics.median(made["seconds"] / unit for unit, made in pairs)
            found[recipe] = {"ratio": round(ratio, 3), "forward_seconds": [u for u, _ in pairs], **pairs[-1][1]}
            print(recipe, json.dumps(found[recipe]), file=sys.stderr, flush=True)
        static = _recipe("w8a8_static", folder)
        found["scaling"] = []
        for blocks, samples in ((2, 2), (8, 2), (2, 8)):
            made = quant(*prepared(blocks, samples)[:1], folder / "out", static, prepared(blocks, samples)[1])
            found["scaling"].append({"blocks": blocks, "samples": samples, **made})
            print(json.dumps(found["scaling"][-1]), file=sys.stderr, flush=True)
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
