"""What one block of a 4-bit run costs at a release's width: seconds, peak memory beside the plan's, the whole model.

    python benchmarks/blocks.py [--family t2v-14B] [--recipes w4a4,w4a4_fast] [--size 256*256] [--frame_num 5]
                                [--samples 4] [--device cpu] [--json FILE]

Runs `streamq quant` on one block with synthetic values; what a run has once (imports, its own inputs, what lies outside
blocks) is in the seconds. `whole` is that times the family's number of blocks, and so an upper bound; `estimate` what
`streamq plan` says of the whole model with the same calibration. Forwards are in it, at these tokens: more tokens add
`block_flops` (streamq.calibration.settings) a sample and block, and nothing else: searches see a fixed number of rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import synthetic
import yaml

ROOT = Path(__file__).resolve().parents[1]


def streamq(*args: object) -> dict[str, Any]:
    """A command's JSON; ends the program with its message if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "streamq", *map(str, args), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def recipe(name: str, calibration: dict[str, Any], folder: Path) -> Path:
    """A library recipe with these calibration settings."""
    document = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    document["spec"]["calibration"] = calibration
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def measure(model: Path, path: Path, whole: Path, blocks: int, device: str) -> dict[str, Any]:
    """One recipe's row."""
    out = path.parent / "out"
    common = ["--config_path", path, "--device", device, "--save_path", out]
    made = streamq("quant", "--model_path", model, *common, "--overwrite", "--quiet")
    plan = streamq("plan", "--model_path", model, *common, "--overwrite")
    full = streamq("plan", "--model_path", whole, *common[:-1], path.parent / "never")
    return {
        "seconds": round(made["seconds"], 1),
        "whole_hours": round(blocks * made["seconds"] / 3600, 2),
        "estimate_hours": round(full["seconds"] / 3600, 2),
        "gflops": full["speed"]["gflops"],
        "peak_host": made["peak_host_bytes"],
        "planned_host": plan["peak_host_bytes"],
        "peak_device": made["peak_device_bytes"],
        "planned_device": plan["peak_device_bytes"],
        "output_error": made["mean_output_error"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="t2v-14B", choices=list(synthetic.FAMILIES))
    parser.add_argument("--recipes", default="w4a4,w4a4_fast,w4a4_nvfp4,w4a16")
    parser.add_argument("--size", default="256*256")
    parser.add_argument("--frame_num", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    calibration = {"num_samples": args.samples, "size": args.size, "frame_num": args.frame_num}
    family = synthetic.FAMILIES[args.family]
    found: dict[str, Any] = {"family": args.family, "device": args.device, **calibration}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.write(folder / "model", replace(family, blocks=1), dtype="bf16")
        synthetic.write(folder / "whole", family, dtype="bf16", sparse=True)
        for one in args.recipes.split(","):
            path = recipe(one, calibration, folder)
            found[one] = measure(folder / "model", path, folder / "whole", family.blocks, args.device)
            print(one, json.dumps(found[one]), file=sys.stderr, flush=True)
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
