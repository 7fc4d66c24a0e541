"""What each quantization method is worth, by the error of the whole transformer's output against the float model's.

    python benchmarks/methods.py [--model tests/assets/toy_wan] [--samples 16] [--markdown]

Calibrates on one trajectory and judges on another (other prompts, another seed): every row of the table quantizes all
blocks, runs the judging inputs through the quantized blocks one after another, and compares what comes out of the last
block with the float chain. Twice: on the model as it is, and with the outlier channels that real video transformers
have and the toy has not, put in without changing its function (see `add_outliers`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from streamq import smoothing, wan
from streamq.calibration.make import make_set
from streamq.calibration.settings import CalibSettings, Prompt
from streamq.calibration.store import CalibSet
from streamq.checkpoint import Source
from streamq.device.cpu import CPU, host_bytes
from streamq.dtypes import TORCH_DTYPES
from streamq.layers import Block, quantize
from streamq.methods.int4 import awq4, quantize_groups
from streamq.methods.statistics import InputStatistics, Wanted
from streamq.quantized import QuantizedLinear, Rule, Scheme
from streamq.recipe import Recipe, parse_recipe
from streamq.resolve import resolve
from streamq.simulate import put_in
from streamq.wan.blocks import BlockRunner, Shared, names_in, tensors_of

ROOT = Path(__file__).resolve().parents[1]
CALIBRATE = tuple(
    f"a {color} {shape} moving {way} over a {ground} background"
    for color, shape, way, ground in (
        ("red", "circle", "left", "black"), ("white", "square", "up", "navy"),
        ("yellow", "triangle", "around", "brown"), ("purple", "circle", "right", "gray"),
        ("green", "square", "down", "black"), ("blue", "ring", "left", "gray"),
        ("white", "circle", "down", "brown"), ("red", "triangle", "up", "gray"),
    )
)  # fmt: skip
JUDGE = (
    "a white circle moving right over a gray background",
    "a yellow square moving down over a black background",
    "a red square moving around over a navy background",
    "a green circle moving up over a brown background",
)
HEAD = "apiversion: multimodal_sd_modelslim_v1\nspec:\n  process:\n"
QUANT = """    - {{type: linear_quant, qconfig: {{act: {{scope: {act}}},
       weight: {{scope: per_channel, method: {weight}}}}}, exclude: [{exclude}]}}
"""
SMOOTH = "    - {{type: smooth_quant, method: {method}, alpha: {alpha}, exclude: [{exclude}]}}\n"
CROSS = '"*cross_attn.[qkv]"'


Smoothing = tuple[str, str, str]


def int8(act: str = "per_token, dtype: int8", weight: str = "minmax", smooth: Smoothing | None = None) -> str:
    """A recipe; `smooth`: method, alpha, excluded pattern."""
    step = SMOOTH.format(method=smooth[0], alpha=smooth[1], exclude=smooth[2]) if smooth else ""
    return HEAD + step + QUANT.format(act=act, weight=weight, exclude="")


STATIC = "per_tensor, dtype: int8, symmetric: False"
INT8: dict[str, str] = {
    "w8a8: round to nearest": int8(),
    "w8a8, weights clipped by MSE": int8(weight="mse"),
    "w8a8, GPTQ": int8(weight="gptq"),
    "w8a8, SmoothQuant alpha 0.5": int8(smooth=("smoothquant", "0.5", "")),
    "w8a8_smooth: alpha searched": int8(smooth=("smoothquant", "search", "")),
    "the same, cross-attention q, k, v left out": int8(smooth=("smoothquant", "search", CROSS)),
    "w8a8, AWQ scales": int8(smooth=("awq", "0.5", "")),
    "w8a8_smooth + GPTQ": int8(weight="gptq", smooth=("smoothquant", "search", "")),
    "w8a8_static: min, max": int8(act=STATIC),
    "w8a8_static, smoothed": int8(act=STATIC, smooth=("smoothquant", "search", "")),
}
Group = Callable[[Tensor, InputStatistics], Tensor]


def _group(clip: bool, symmetric: bool, gptq: bool) -> Group:
    def make(weight: Tensor, seen: InputStatistics) -> Tensor:
        importance = seen.gram.diagonal() / max(seen.gram_count, 1) if seen.gram is not None else None
        return quantize_groups(
            weight, symmetric=symmetric, clip=clip, importance=importance, gram=seen.gram if gptq else None
        ).dequantize()

    return make


def _awq(weight: Tensor, seen: InputStatistics) -> Tensor:
    assert seen.gram is not None
    importance = seen.gram.diagonal() / max(seen.gram_count, 1)
    s, made = awq4(weight, seen.mean, importance=importance, symmetric=False, clip=True)
    return made.dequantize() / s


# Weights alone, int4 in groups of 64; a channel's scale is divided out again, as if the layer carried it.
INT4: dict[str, Group] = {
    "int4 symmetric: round to nearest": _group(False, True, False),
    "int4 asymmetric: round to nearest": _group(False, False, False),
    "int4 asymmetric, clipped": _group(True, False, False),
    "int4 asymmetric, clipped, GPTQ": _group(True, False, True),
    "int4 asymmetric, clipped, AWQ": _awq,
}


# (unit, its tensors, statistics by group) -> layer -> what takes its place
Weights = Callable[[str, dict[str, Tensor], dict[str, InputStatistics]], dict[str, object]]


@dataclass
class Chain:
    """A set's samples on their way through the blocks."""

    shared: list[Shared]
    hidden: list[Tensor]


def open_chain(found: CalibSet) -> Chain:
    """Every sample of a set, whole in memory: toys only."""
    part = found.experts[""]
    with closing(Source(part.checkpoint)) as source:

        def read(name: str) -> Tensor:
            info = part.tensors[name]
            memory = torch.empty(info.nbytes, dtype=torch.uint8)
            source.read(info, 0, host_bytes(memory))
            return memory.view(TORCH_DTYPES[info.dtype]).view(info.shape)

        rotary = (read("rotary.cos"), read("rotary.sin"))
        shared = [
            Shared(read(f"encoder_hidden_states.{s.states}"), read(f"timestep_proj.{n}"), None, rotary, None)
            for n, s in enumerate(part.samples)
        ]
        return Chain(shared, [read(f"hidden_states.{n}") for n in range(len(part.samples))])


def add_outliers(source: Path, target: Path, seed: int = 0) -> None:
    """Copy a diffusers pipeline, with hot channels before cross-attention's q, k, v and both output projections.

    Norm weights, rows of to_v and of the text embedder are multiplied by up to 30 in one channel of 32, and the columns
    that read them divided, in fp32: the function stays (but for bf16 rounding), the activations get outliers.
    """
    shutil.copytree(source, target)
    path = target / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    dim = tensors["blocks.0.norm2.weight"].shape[0]
    generator = torch.Generator().manual_seed(seed)

    def factors() -> Tensor:
        s = torch.ones(dim)
        hot = torch.randperm(dim, generator=generator)[: dim // 32]
        s[hot] = 10 + 20 * torch.rand(len(hot), generator=generator)
        return s

    text = factors()
    for leaf in ("weight", "bias"):
        name = f"condition_embedder.text_embedder.linear_2.{leaf}"
        tensors[name] = (tensors[name].T * text).T
    blocks = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")})
    for block in (f"blocks.{i}" for i in blocks):
        s = factors()
        for leaf in ("weight", "bias"):
            tensors[f"{block}.norm2.{leaf}"] *= s
        tensors[f"{block}.attn2.to_q.weight"] /= s
        for layer in ("to_k", "to_v"):
            tensors[f"{block}.attn2.{layer}.weight"] /= text
        for attention in ("attn1", "attn2"):
            s = factors()
            for leaf in ("weight", "bias"):
                name = f"{block}.{attention}.to_v.{leaf}"
                tensors[name] = (tensors[name].T * s).T
            tensors[f"{block}.{attention}.to_out.0.weight"] /= s
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


class Judge:
    """One model with its two sets: float chains, and the error of every method."""

    def __init__(self, pipeline: Path, work: Path, samples: int) -> None:
        device = CPU()
        self.expert = wan.open_model(pipeline)[0]
        self.model = self.expert.model
        quiet: Callable[[str], None] = lambda text: None  # noqa: E731
        base = CalibSettings(
            mode="trajectory", num_samples=samples, time_bins=8, size=(64, 64), frame_num=9, sample_steps=24,
            guidance=3.0, shift=3.0,
        )  # fmt: skip
        sets = {}
        for name, prompts, seed in (("calibrate", CALIBRATE, 0), ("judge", JUDGE, 1000)):
            settings = replace(base, prompts=tuple(Prompt(p) for p in prompts), seed=seed)
            sets[name] = make_set(work / name, settings, [self.expert], pipeline, device, about=quiet)
        self.calibrate, self.judge = open_chain(sets["calibrate"]), open_chain(sets["judge"])
        self.source = Source(self.model.checkpoint)
        self.runner = BlockRunner(self.model, torch.bfloat16, "cpu")

    def schemes(self, recipe: Recipe) -> dict[str, Scheme]:
        """Every layer's, smoothed wherever a scale can be carried."""
        pairs, _ = resolve(recipe, [linear.native for linear in self.model.linears])
        found = {}
        for linear in self.model.linears:
            pair = pairs[linear.native]
            if pair is not None and pair.type is not None:
                found[linear.name] = Scheme(pair.type, pair, Rule(scale_floor=2.0**-23))
        ways = dict.fromkeys({scheme.type for scheme in found.values()}, wan.WAYS)
        return smoothing.place(recipe, "table", ways, self.model, found).schemes

    def error(self, weights: Weights) -> float:
        """Relative error of the last block's output on the judging inputs."""
        calibrate, exact, rough = list(self.calibrate.hidden), list(self.judge.hidden), list(self.judge.hidden)
        for unit in self.model.replay_order:
            tensors = tensors_of(self.source, self.model, names_in(self.model, unit), "cpu")
            module = self.runner.fill(unit, tensors)
            seen, handles = self._looking(module, unit, len(calibrate))
            for n, shared in enumerate(self.calibrate.shared):
                calibrate[n] = self.runner.run(unit, {"hidden": calibrate[n]}, shared)["hidden"]
            for handle in handles:
                handle.remove()
            for n, shared in enumerate(self.judge.shared):
                exact[n] = self.runner.run(unit, {"hidden": exact[n]}, shared)["hidden"]
            floats = list(self._change(module, unit, weights(unit, tensors, seen)))
            for n, shared in enumerate(self.judge.shared):
                rough[n] = self.runner.run(unit, {"hidden": rough[n]}, shared)["hidden"]
            for name, linear in floats:
                module.set_submodule(name, linear)
        lost = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(exact, rough, strict=True))
        return (lost / sum(float(a.double().square().sum()) for a in exact)) ** 0.5

    def _looking(self, module: nn.Module, unit: str, count: int) -> tuple[dict[str, InputStatistics], list]:
        found, handles = {}, []
        for group in wan.GROUPS:
            layer = group.layers[0]
            if f"{unit}.{layer}.weight" in self.model.tensors:
                linear = module.get_submodule(layer)
                want = Wanted(mean=True, gram=True, rows=512, gram_rows=0)
                seen = InputStatistics(linear.in_features, want, count, torch.device("cpu"))
                found[f"{unit}.{group.name}"] = seen
                handles.append(linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(args[0])))
        return found, handles

    def _change(self, module: nn.Module, unit: str, made: dict[str, object]) -> Iterator[tuple[str, nn.Module]]:
        """Put quantized layers in; yields what was there."""
        for full, layer in made.items():
            name = full.removeprefix(f"{unit}.")
            linear = module.get_submodule(name)
            yield name, linear
            if isinstance(layer, QuantizedLinear):
                put_in(module, name, layer)
            else:
                assert isinstance(layer, Tensor) and isinstance(linear, nn.Linear)
                module.set_submodule(name, _Float(layer, linear.bias))

    def int8(self, text: str) -> float:
        """Error of a recipe."""
        schemes = self.schemes(parse_recipe(text, "table", "table"))

        def weights(unit: str, tensors: dict[str, Tensor], seen: dict[str, InputStatistics]) -> dict[str, object]:
            block, made = Block(_Seen(tensors, seen)), {}
            for name, scheme in schemes.items():
                if name.startswith(f"{unit}."):
                    w, b = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
                    made[name] = quantize(name, w, b, scheme, block, torch.empty(w.shape, dtype=torch.int8))[0]
            return made

        return self.error(weights)

    def int4(self, method: Group) -> float:
        """Error of a group-wise int4 method on all layers' weights."""

        def weights(unit: str, tensors: dict[str, Tensor], seen: dict[str, InputStatistics]) -> dict[str, object]:
            layers = [linear.name for linear in self.model.linears if linear.name.startswith(f"{unit}.")]
            group = {name: seen[f"{unit}.{wan.group_of(name).name}"] for name in layers}
            return {name: method(tensors[f"{name}.weight"].float(), group[name]) for name in layers}

        return self.error(weights)


class _Float(nn.Module):
    """A weight in fp32, so that what is measured is the method and not bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight, bias).to(x.dtype)


@dataclass
class _Seen:
    tensors: dict[str, Tensor]
    statistics: dict[str, InputStatistics]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "assets" / "toy_wan")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--markdown", action="store_true", help="a table instead of JSON")
    args = parser.parse_args()
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        add_outliers(args.model, work / "outliers")
        for column, path in (("as trained", args.model), ("outlier channels", work / "outliers")):
            judge = Judge(path, work / f"sets-{path.name}", args.samples)
            for name, text in INT8.items():
                table.setdefault(name, {})[column] = judge.int8(text)
                print(f"{column}: {name}: {table[name][column]:.3%}", file=sys.stderr)
            for name, method in INT4.items():
                table.setdefault(name, {})[column] = judge.int4(method)
                print(f"{column}: {name}: {table[name][column]:.3%}", file=sys.stderr)
    if args.markdown:
        print("| method | as trained | outlier channels |\n|---|---|---|")
        for name, row in table.items():
            print(f"| {name} | {row['as trained']:.2%} | {row['outlier channels']:.2%} |")
    else:
        print(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
