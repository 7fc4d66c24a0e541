"""Types by metrics, on videos: every type of the table quantized, generated with and compared with the float model.

    python benchmarks/quality.py [--model tests/assets/toy_wan] [--seeds 0,1] [--types w8a8:lightx2v,…] [--write]

The same prompts and seeds for all; types that need data are calibrated on other prompts' denoising. Each row is a run
of `quant`, `generate` and `eval` as a user would type them. The noise floor is the float model against itself, with its
attention computed by another kernel (torch's plain one). The numbers are those of a small trained pipeline and say
which type costs more, not how much a release loses.
`--write` puts the table into docs/quality.md, between its markers.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import tempfile
from pathlib import Path

from torch.nn.attention import SDPBackend, sdpa_kernel

from streamq.cli import main as streamq

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- python benchmarks/quality.py --write -->", "<!-- end -->"
PROMPTS = (
    "a red circle moving right over a black background",
    "a white square moving down over a navy background",
    "a yellow circle moving around over a gray background",
    "a purple triangle standing still over a brown background",
)
OTHER_PROMPTS = (  # for calibration: not those that are judged
    "a green square moving left over a gray background",
    "a white ring moving up over a black background",
    "a blue triangle moving around over a navy background",
    "a yellow square standing still over a brown background",
)
# Type, and the format whose runtime's arithmetic it is made and run in.
TYPES = (
    "w8a16:diffusers", "w8a16:gguf", "w8a8:lightx2v", "w8a8:diffusers", "w8a8_convrot:comfyui", "w8a8_smooth:lightx2v",
    "w8a8_static:mindie", "fp8:lightx2v", "fp8:comfyui", "w8a8_mxfp8:mindie", "w4a16:nunchaku", "w4a16:gguf",
    "w4a4:nunchaku", "w4a4_mxfp4:mindie",
)  # fmt: skip
CALIBRATED = ("w8a8_smooth", "w8a8_static", "w4a4", "w4a4_nvfp4", "w4a4_fast", "w4a16:nunchaku")
COLUMNS = {
    "latent_rel_l2": "latents, relative L2", "latent_cos": "latents, cosine", "psnr_video": "PSNR, dB", "ssim": "SSIM",
    "mae": "mean difference of 255", "flicker_diff": "flicker less float's", "motion_series_dev": "motion differs by",
}  # fmt: skip
FORMS = dict.fromkeys(COLUMNS, "{:.4f}") | {
    "psnr_video": "{:.1f}",
    "latent_cos": "{:.5f}",
    "mae": "{:.2f}",
    "flicker_diff": "{:+.5f}",
}
FLOOR = "floor"
SETTINGS = ("--size", "64*64", "--frame_num", "9", "--sample_steps", "24", "--guidance", "3")


def run(*argv: str) -> str:
    """One command; what it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = streamq([*argv])
    assert status == 0, (status, argv)
    return said.getvalue()


def measure(model: Path, folder: Path, types: list[str], seeds: str) -> tuple[dict[str, dict[str, float]], float]:
    """(candidate -> its column's means and its bytes on disk, the float model's bytes)."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    common = ["--model_path", str(model), "--prompts", str(prompts), "--seeds", seeds, *SETTINGS, "--device", "cpu"]
    with sdpa_kernel(SDPBackend.MATH):
        run("generate", *common, "--save_path", str(folder / "floor"), "--quiet")
    given = [word for prompt in OTHER_PROMPTS for word in ("--prompt", prompt)]
    run("calib", "--model_path", str(model), "--save_path", str(folder / "inputs"), "--mode", "trajectory", *given,
        "--num_samples", "16", *SETTINGS[:4], "--device", "cpu", "--quiet")  # fmt: skip
    made, rows = [], {}
    for text in types:
        kind, form = text.split(":")
        place = folder / "models" / text.replace(":", "-")
        inputs = ["--calib", str(folder / "inputs")] if kind in CALIBRATED or text in CALIBRATED else []
        run("quant", "--model_path", str(model), "--quant_type", kind, "--format", form, "--device", "cpu", "--quiet",
            "--save_path", str(place), *inputs)  # fmt: skip
        made += ["--transformer", str(place)]
        rows[place.name] = {"bytes": float(weights(place))}
    out = folder / "eval"
    run("eval", *common, *made, "--save_path", str(out), "--noise_floor", str(folder / "floor"), "--json", "--quiet")
    return summary(out, rows), float(weights(model / "transformer"))


def summary(folder: Path, rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Candidate -> its means, added to what `rows` has, from eval's tables; the noise floor as a candidate."""
    for name in ("fidelity_summary.csv", "clip_temporal_summary.csv", "motion_summary.csv"):
        with open(folder / name, newline="") as stream:
            for line in csv.DictReader(stream):
                if line["candidate"] in rows:
                    rows[line["candidate"]][line["metric"]] = float(line["mean"])
                if line["noise_floor"]:
                    rows.setdefault(FLOOR, {})[line["metric"]] = float(line["noise_floor"])
    return rows


def weights(folder: Path) -> int:
    """Bytes of tensors in a folder, those of videos left out."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf"))


def table(rows: dict[str, dict[str, float]], size: float, count: int) -> str:
    """Markdown. The size is that of the whole transformer, layers that stay float included."""
    lines = [
        "| type | format | size | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    order = [FLOOR, *sorted((name for name in rows if name != FLOOR), key=lambda name: rows[name]["latent_rel_l2"])]
    for name in order:
        kind, _, form = name.rpartition("-")
        share = f"{rows[name]['bytes'] / size:.0%}" if name != FLOOR else "100%"
        first = f"| `{kind}` | `{form}`" if name != FLOOR else "| float, another attention kernel |"
        figures = [FORMS[metric].format(rows[name][metric]) if metric in rows[name] else "" for metric in COLUMNS]
        lines.append(f"{first} | {share} | " + " | ".join(figures) + " |")
    made = "64*64 pixels, 9 frames, 24 steps, guidance 3, bf16, CPU"
    lines.append(f"\nMeans over {count} pairs, {len(PROMPTS)} prompts; {made}.")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "assets" / "toy_wan")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--types", default=",".join(TYPES), help="TYPE:FORMAT, comma-separated")
    parser.add_argument("--folder", type=Path, help="keep everything that is made here")
    parser.add_argument("--write", action="store_true", help="into docs/quality.md")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows, size = measure(args.model, args.folder or Path(scratch), args.types.split(","), args.seeds)
    text = table(rows, size, len(PROMPTS) * len(args.seeds.split(",")))
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"float_bytes": size, "rows": rows}, indent=1) + "\n")
    if args.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
