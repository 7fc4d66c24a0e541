"""What SVDQuant and its parts are worth, by the error of the whole transformer's output; time and memory beside it.

    python benchmarks/svdquant.py [--model tests/assets/toy_wan] [--samples 16] [--markdown] [--json FILE]

Calibrates on one trajectory and judges on another (other prompts, another seed), on the model as trained and with
outlier channels put in, as `methods.py` does. The reference is the model in fp32; every row's blocks run one after
another in bf16 with the quantized layers in. `output`: relative error of what the transformer returns; `blocks`: of
what comes out of its last block. Every row is a process of its own with one thread: `seconds` are processor seconds
from the first weight to the last layer's codes, calibration's forwards and the report's figures included, imports not;
`over import` is the peak of memory until then above what the imports take. streamq's rows are recipes, run by streamq's
own replay, searches and simulation. `published` is the whole-model, many-pass original (`published.py`) on the same
samples.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import published
import torch
from diffusers import WanTransformer3DModel
from methods import HEAD, ROOT, Chain, Judge, add_outliers, open_chain
from torch import Tensor, nn

from streamq import smoothing, wan
from streamq.calibration.cache import Cache
from streamq.calibration.plan import needs_data, plan_calibration
from streamq.calibration.replay import Replay
from streamq.calibration.store import CalibSet, open_set
from streamq.checkpoint import Source
from streamq.device.cpu import CPU
from streamq.layers import Block, quantize
from streamq.quantized import QuantizedLinear, Rule, Scheme
from streamq.recipe import parse_recipe
from streamq.resolve import resolve
from streamq.simulate import put_in
from streamq.wan import Expert
from streamq.wan.blocks import BlockRunner, Shared, Shell, names_in, tensors_of

COLUMNS = ("as trained", "outlier channels")
WAYS: dict[str, tuple[str, ...]] = {"w4a4": ("layer",), "w4a4_nvfp4": ("layer",), "w4a16": ()}
SMOOTH = "    - {type: smooth_quant, method: svdquant, grid: full, rows: 256, include: ['*']}\n"
FOUR = """    - {{type: linear_quant, include: ['*'], qconfig: {{act: {{scope: per_group, dtype: {0}}},
       weight: {{scope: per_group, dtype: {0}, {1}}}}}}}
"""
WEIGHTS = """    - {{type: linear_quant, include: ['*'],
       qconfig: {{weight: {{scope: per_group, dtype: int4, symmetric: False, {0}}}}}}}
"""
PLAIN = "method: minmax"
BRANCH = "method: svdquant, ext: {rank: 32, gptq: False}"
BRANCH_GPTQ = "method: svdquant, ext: {rank: 32, gptq: True}"
REFERENCE = "reference.pt"  # beside the sets: what the model makes of the judging one in fp32
FLOAT = "bf16, nothing quantized"


def recipes() -> dict[str, str]:
    """streamq's rows."""
    found: dict[str, str] = {}
    for kind, precision in (("w4a4", "int4"), ("w4a4_nvfp4", "nvfp4")):
        found |= {
            f"{kind}: round to nearest": HEAD + FOUR.format(precision, PLAIN),
            f"{kind}: smoothing only": HEAD + SMOOTH + FOUR.format(precision, PLAIN),
            f"{kind}: low rank only": HEAD + FOUR.format(precision, BRANCH),
            f"{kind}: both": HEAD + SMOOTH + FOUR.format(precision, BRANCH),
            f"{kind}: both + GPTQ": HEAD + SMOOTH + FOUR.format(precision, BRANCH_GPTQ),
        }
    return found | {
        "w4a16: min, max": HEAD + WEIGHTS.format(PLAIN),
        "w4a16: clipped": HEAD + WEIGHTS.format("method: mse"),
        "w4a16: clipped, GPTQ": HEAD + WEIGHTS.format("method: gptq"),
    }


# A process's name -> the rows that it makes: the published search is the same with both roundings.
PUBLISHED = {f"published {p}": (f"published {p}", f"published {p} + GPTQ") for p in ("int4", "nvfp4")}


def processes() -> list[str]:
    """In the table's order."""
    names = [FLOAT, *recipes()]
    for kind, precision in (("w4a4", "int4"), ("w4a4_nvfp4", "nvfp4")):
        names.insert(names.index(f"{kind}: both + GPTQ") + 1, f"published {precision}")
    return names


# -- One process -------------------------------------------------------------------------------------------------------


class Account:
    """Processor seconds since it was made, and the peak of memory above what was held then."""

    def __init__(self) -> None:
        self.base = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        self.began, self.wall = time.process_time(), time.monotonic()

    def figures(self) -> dict[str, float]:
        seconds, wall = time.process_time() - self.began, time.monotonic() - self.wall
        peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
        return {"seconds": seconds, "wall": wall, "peak": peak, "over_import": peak - self.base}


PutIn = Callable[[nn.Module, str, str], None]  # (block's module, layer's name in it, full name)


def by_streamq(expert: Expert, text: str, found: CalibSet, work: Path) -> dict[str, QuantizedLinear]:
    """A recipe on every block, by streamq's own replay and methods."""
    model, recipe, inputs, device = expert.model, parse_recipe(text, "table", "table"), found.experts[""], CPU()
    pairs, _ = resolve(recipe, [linear.native for linear in model.linears])
    plain: dict[str, Scheme] = {}
    for linear in model.linears:
        pair = pairs[linear.native]
        if pair is not None and linear.name.startswith("blocks."):
            assert pair.type is not None, pair
            plain[linear.name] = Scheme(pair.type, pair, Rule())
    schemes = smoothing.place(recipe, "table", WAYS, model, plain).schemes
    plan = plan_calibration([recipe], [schemes], [expert], found, 0)
    made: dict[str, QuantizedLinear] = {}
    with (
        closing(Cache(work, inputs, torch.bfloat16, device, in_memory=plan.in_memory)) as cache,
        closing(Source(model.checkpoint)) as source,
        closing(Replay(expert, plan, inputs, cache, device)) as replay,
    ):
        for unit in model.replay_order:
            tensors = tensors_of(source, model, names_in(model, unit), "cpu")
            mine = {name: scheme for name, scheme in schemes.items() if name.startswith(f"{unit}.")}
            block = Block()
            if needs_data(schemes):
                block.seen = replay.observe(unit, tensors, {name: {scheme} for name, scheme in mine.items()})
            for name, scheme in mine.items():
                weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
                out = torch.empty(weight.shape, dtype=torch.int8)
                made[name], _ = quantize(name, weight, bias, scheme, block, out)
                block.layers[name] = made[name]
            if needs_data(schemes):
                replay.go_on(unit, block.layers)
                replay.cache.sync()
                replay.cache.committed()
    return made


def by_published(pipeline: Path, found: CalibSet, precision: str) -> list[tuple[dict[str, float], PutIn]]:
    """Account and layers with plain rounding, and the same with GPTQ."""
    account, setting = Account(), published.Setting(precision)
    model = WanTransformer3DModel.from_pretrained(pipeline / "transformer", torch_dtype=torch.float32)
    model.requires_grad_(False)
    chain, samples = open_chain(found), []
    for hidden, shared in zip(chain.hidden, chain.shared, strict=True):
        states, projected = shared.encoder_hidden_states.float(), shared.timestep_proj.float()
        samples.append(published.Sample(hidden.float(), states, projected, shared.rotary_emb))
    vectors = published.find_smoothing(model, samples, setting)
    layers = published.find_branches(model, samples, vectors, setting)
    first = account.figures()
    by_gptq = published.round_by_gptq(model, samples, layers)
    return [(first, _replacing(layers)), (account.figures(), _replacing(by_gptq))]


def _replacing(layers: Mapping[str, nn.Module]) -> PutIn:
    return lambda module, name, full: module.set_submodule(name, layers[full])


def worker(name: str, pipeline: Path, sets: Path) -> None:
    """One process; its last line is its rows' figures."""
    torch.set_num_threads(1)
    expert, found = wan.open_model(pipeline)[0], open_set(sets / "calibrate")
    if name in PUBLISHED:
        both = by_published(pipeline, found, name.split()[1])
        rows = dict(zip(PUBLISHED[name], both, strict=True))
    elif name == FLOAT:
        rows = {name: ({}, lambda module, name, full: None)}
    else:
        with tempfile.TemporaryDirectory() as work:
            account = Account()
            layers = by_streamq(expert, recipes()[name], found, Path(work))
            rows = {name: (account.figures(), lambda module, name, full: put_in(module, name, layers[full]))}
    exact, judge, done = torch.load(sets / REFERENCE), open_set(sets / "judge"), {}
    for row, (figures, change) in rows.items():
        done[row] = figures | errors(exact, forward(expert, judge, torch.bfloat16, change))
    print(json.dumps(done))


# -- Judging -----------------------------------------------------------------------------------------------------------


Judged = tuple[list[Tensor], list[Tensor]]  # of each sample, the last block's stream and what the transformer returns


def errors(exact: Judged, rough: Judged) -> dict[str, float]:
    """Relative errors over all samples."""
    return {"output": _relative(exact[1], rough[1]), "blocks": _relative(exact[0], rough[0])}


def forward(expert: Expert, found: CalibSet, dtype: torch.dtype, change: PutIn | None) -> Judged:
    """A set through the whole transformer in a dtype, with changed layers or without."""
    model, inputs = expert.model, found.experts[""]
    latents = torch.empty(1, model.in_channels, *_grid(found))
    with closing(Source(model.checkpoint)) as source:
        streams = _through(expert, open_chain(found), source, dtype, change)
        shell = Shell(model, tensors_of(source, model, names_in(model, "rest"), "cpu"), dtype, "cpu")
    pairs = zip(streams, inputs.samples, strict=True)
    return streams, [shell.head(hidden, latents, torch.tensor([sample.timestep])) for hidden, sample in pairs]


def _through(
    expert: Expert, chain: Chain, source: Source, dtype: torch.dtype, change: PutIn | None
) -> list[Tensor]:  # fmt: skip
    model, runner = expert.model, BlockRunner(expert.model, dtype, "cpu")
    hidden = [h.to(dtype) for h in chain.hidden]
    shared = [_as(dtype, s) for s in chain.shared]
    for unit in model.replay_order:
        module = runner.fill(unit, tensors_of(source, model, names_in(model, unit), "cpu"))
        names = [linear.name for linear in model.linears if linear.name.startswith(f"{unit}.")] if change else []
        floats = {full.removeprefix(f"{unit}."): module.get_submodule(full.removeprefix(f"{unit}.")) for full in names}
        for name in floats:
            assert change is not None
            change(module, name, f"{unit}.{name}")
        for n, s in enumerate(shared):
            hidden[n] = runner.run(unit, {"hidden": hidden[n]}, s)["hidden"]
        for name, linear in floats.items():
            module.set_submodule(name, linear)
    return hidden


def _as(dtype: torch.dtype, shared: Shared) -> Shared:
    states, projected = shared.encoder_hidden_states.to(dtype), shared.timestep_proj.to(dtype)
    return replace(shared, encoder_hidden_states=states, timestep_proj=projected)


def _grid(found: CalibSet) -> tuple[int, int, int]:
    """Frames, height and width of the latents."""
    (width, height), frames = found.document["settings"]["size"], found.document["settings"]["frame_num"]
    return (frames - 1) // 4 + 1, height // 8, width // 8


def _relative(exact: list[Tensor], rough: list[Tensor]) -> float:
    lost = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(exact, rough, strict=True))
    return (lost / sum(float(a.double().square().sum()) for a in exact)) ** 0.5


# -- The table ---------------------------------------------------------------------------------------------------------


def run(name: str, pipeline: Path, sets: Path) -> dict[str, dict[str, float]]:
    """A process's rows."""
    command = [sys.executable, __file__, "--worker", name, str(pipeline), str(sets)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{name}: failed")
    rows: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def markdown(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Errors on both models; seconds and memory on the second, from which those on the first differ little."""
    lines = [
        "| | output, as trained | output, outlier channels | last block, as trained | last block, outlier channels"
        " | seconds | peak over import |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        cells = [f"{row[column][key]:.2%}" for key in ("output", "blocks") for column in COLUMNS if column in row]
        cost = list(row.values())[-1]
        spent = [f"{cost['seconds']:.1f}", f"{cost['over_import'] / 2**20:.0f} MiB"] if "seconds" in cost else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells + spent)} |")
    return "\n".join(lines)


def main() -> int:
    """See the module."""
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "assets" / "toy_wan")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rows", help="only rows whose names match this regular expression")
    parser.add_argument("--markdown", action="store_true", help="a table instead of JSON")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    table: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        add_outliers(args.model, work / "outliers")
        for column, path in zip(COLUMNS, (args.model, work / "outliers"), strict=True):
            sets = work / f"sets-{path.name}"
            Judge(path, sets, args.samples)  # makes both sets
            exact = forward(wan.open_model(path)[0], open_set(sets / "judge"), torch.float32, None)
            torch.save(exact, sets / REFERENCE)
            for name in (name for name in processes() if re.search(args.rows or "", name)):
                for row, figures in run(name, path, sets).items():
                    table.setdefault(row, {})[column] = figures
                    shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
                    print(f"{column}: {row}: {shown}", file=sys.stderr, flush=True)
    document = {"model": args.model.name, "samples": args.samples, "rows": table}
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(markdown(table) if args.markdown else json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
