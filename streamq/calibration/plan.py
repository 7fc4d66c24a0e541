"""The calibrated part of a plan: which inputs, how many, what is observed of them, and the memory that it takes.

Needs no torch. Peak memory of a replay is the block (as it lies in the checkpoint and, where that is another dtype,
once more as it computes), one sample's activations, the statistics of the block's inputs, and the cache of streams if
that stays in memory. None of it grows with the number of blocks, and only the cache with the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from streamq import wan
from streamq.calibration import store
from streamq.calibration.settings import (
    CalibSettings,
    Prompt,
    block_flops,
    check_settings,
    parse_video_size,
    states_len,
    tokens_of,
)
from streamq.calibration.store import CalibSet, SampleInfo, Shapes
from streamq.checkpoint import DTYPE_SIZE
from streamq.device import MiB
from streamq.errors import UsageError
from streamq.quantized import Scheme
from streamq.recipe import Recipe
from streamq.wan import Expert, Model

ROWS, GRAM_ROWS = 256, 2048
SVDQUANT_ROWS = 1024  # the low-rank search is judged by rows alone
# What svdquant, low_rank and gptq take at once (their TILE_BYTES and PART_BYTES), and the side up to which it is exact.
CPU_TILE, DEVICE_TILE, GPTQ_PART, EXACT_SIDE = 10 * MiB, 64 * MiB, 256 * MiB, 256
CACHE_SHARE = 4  # of the free memory, one part
CALIBRATED_FAMILIES = ("t2v", "i2v", "flf2v", "vace", "ti2v")
# Resident bytes that diffusers adds to the process; measured with diffusers 0.42 on x86 Linux.
DIFFUSERS_BASE = 120 * MiB


@dataclass(frozen=True)
class CalibPlan:
    """What a calibrated run replays. `given`: the user's set; without one the run makes its own by `settings`.

    rows: of each group's inputs that are kept, for searches and for the report. gram_rows: of each sample, at most, in
    a Gram matrix. next_input: whether a block is fed its float predecessor's outputs or the quantized one's.
    in_memory: whether the streams between blocks are kept in memory besides on disk.
    """

    settings: CalibSettings
    given: CalibSet | None
    shapes: dict[str, Shapes]
    samples: dict[str, int]
    rows: int
    gram_rows: int
    next_input: str
    in_memory: bool

    @property
    def dtype(self) -> str:
        """What the replay computes in, as safetensors calls it."""
        return next(iter(self.shapes.values())).dtype

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the result."""
        made = self.given.digest if self.given else self.settings.identity()
        return {"inputs": made, "rows": self.rows, "gram_rows": self.gram_rows, "next_input": self.next_input}

    @property
    def stream_nbytes(self) -> int:
        """Bytes of one stream of one sample."""
        return max(s.tokens * s.dim * (2 if s.dtype == "BF16" else 4) for s in self.shapes.values())

    def cache_nbytes(self, expert: str) -> int:
        """Bytes of one generation of every stream of an expert: hidden_states, and VACE's control and hints."""
        shapes = self.shapes[expert]
        streams = 1 + (1 + shapes.n_vace if shapes.n_vace else 0)
        return streams * self.samples[expert] * self.stream_nbytes

    def set_nbytes(self, expert: str) -> int:
        """Most bytes that an expert's file of a set can have: text states of its own for every sample."""
        samples = [SampleInfo(0.0, number, 2, "") for number in range(self.samples[expert])]
        specs = self.shapes[expert].specs(samples)
        return sum(math.prod(spec.shape) * DTYPE_SIZE[spec.dtype] for spec in specs)

    def flops(self, experts: list[Expert]) -> int:
        """Of all forwards of all blocks."""
        passes = 2 if self.next_input == "quantized" else 1
        return passes * sum(
            self.samples[e.name]
            * (e.model.n_blocks + e.model.n_vace_blocks)
            * block_flops(e.model, self.shapes[e.name].tokens)
            for e in experts
        )


def needs_data(schemes: Mapping[str, Scheme]) -> bool:
    """Whether any layer's scheme wants inputs to be seen."""
    return any(scheme.needs_data for scheme in schemes.values())


def plan_calibration(
    recipes: list[Recipe], schemes: Sequence[Mapping[str, Scheme]], experts: list[Expert], given: CalibSet | None,
    seed: int,
) -> CalibPlan:  # fmt: skip
    """Settle a calibrated run's settings. `schemes`: of every target and expert. Raises UsageError."""
    model = experts[0].model
    if model.family not in CALIBRATED_FAMILIES:
        raise UsageError(
            f"the recipe needs calibration data, and streamq cannot replay a {model.family} model; use a recipe without"
            " (w8a8)"
        )
    chosen = _merged(recipes)
    gptq = any(s.pair.weight.method == "gptq" for part in schemes for s in part.values())
    smooth = any(s.smooth for part in schemes for s in part.values())
    next_input = chosen.get("next_input") or ("quantized" if gptq and not smooth else "float")
    if next_input == "quantized" and len(recipes) > 1:
        raise UsageError(
            f"spec.calibration.next_input quantized{'' if 'next_input' in chosen else ', the default of gptq'}: each of"
            f" the {len(recipes)} formats would need a replay of its own; write one a run, or use next_input: float"
        )
    settings = settings_of({"seed": seed} | chosen)
    shapes, samples = {}, {}
    for expert in experts:
        head_dim = expert.model.dim // int(expert.model.native_config["num_heads"])
        if given is not None:
            store.check_fits(given, experts, head_dim)
            shapes[expert.name] = given.experts[expert.name].shapes
            samples[expert.name] = len(given.experts[expert.name].samples)
        else:
            tokens, states = tokens_of(expert.model, settings), states_len(expert.model)
            shapes[expert.name] = store.shapes_of(expert.model, head_dim, tokens, states, settings.dtype)
            samples[expert.name] = settings.num_samples
    searched = any(s.pair.weight.method == "svdquant" for part in schemes for s in part.values())
    rows, gram_rows = chosen.get("rows", SVDQUANT_ROWS if searched else ROWS), chosen.get("gram_rows", GRAM_ROWS)
    return CalibPlan(settings, given, shapes, samples, rows, gram_rows, next_input, in_memory=False)


def _merged(recipes: list[Recipe]) -> dict[str, Any]:
    """`spec.calibration`, over what msModelSlim's own keys say; several recipes must agree."""
    found: dict[str, Any] = {}
    for recipe in recipes:
        config = recipe.model_config
        guidance = config.get("sample_guide_scale")
        theirs = {
            "prompts": [config["prompt"]] if config.get("prompt") else None, "size": config.get("size"),
            "frame_num": config.get("frame_num"), "sample_steps": config.get("sample_steps"),
            "shift": config.get("sample_shift"), "seed": config.get("base_seed"),
            "guidance": guidance[0] if isinstance(guidance, list) and guidance else guidance or None,
        }  # fmt: skip
        for key, value in ({k: v for k, v in theirs.items() if v is not None} | recipe.calibration).items():
            if found.setdefault(key, value) != value:
                raise UsageError(
                    f"calibration settings of the formats' recipes differ: {key} is {found[key]!r} and {value!r}; give"
                    " one --config_path for all of them"
                )
    return found


def settings_of(chosen: Mapping[str, Any]) -> CalibSettings:
    """A recipe's calibration keys as settings. Raises UsageError."""
    plain = ("num_samples", "time_bins", "frame_num", "sample_steps", "guidance", "shift", "dtype", "seed")
    known = {key: chosen[key] for key in plain if key in chosen}
    if "size" in chosen:
        known["size"] = parse_video_size(chosen["size"])
    if "prompts" in chosen:
        known["prompts"] = tuple(Prompt(text) for text in chosen["prompts"])
    settings = CalibSettings(**known)
    check_settings(settings)
    return settings


def activation_nbytes(model: Model, shapes: Shapes, kind: str) -> int:
    """Most bytes of intermediate tensors during one forward of one block on a kind of device.

    In the FFN: x, its fp32 normalised copy, the modulated input, and the hidden layer before and after GELU; in
    attention: q, k, v in the compute dtype, and rotary's fp32 copies of two of them. On a CPU their sum, because a C
    library mostly keeps what attention has given back, and in bf16 two copies of the widest weight, as matrix kernels
    repack it; fitted to measured peaks of 1,344 to 7,800 tokens at width 1536. An accelerator's allocator gives one's
    memory to the other: the larger of the two.
    """
    length, dim, ffn, size = shapes.tokens, model.dim, model.ffn_dim, 2 if shapes.dtype == "BF16" else 4
    feed = length * (dim * (2 * size + 8) + 2 * ffn * size)
    attention = length * dim * (5 * size + 16)
    context = 3 * shapes.states_len * dim * size
    if kind != "cpu":
        return max(feed, attention) + context
    repacked = 2 * ffn * dim * size if size == 2 else 0
    return feed + attention + context + repacked


def statistics_nbytes(model: Model, plan: CalibPlan, schemes: Sequence[Mapping[str, Scheme]]) -> int:
    """Bytes of everything that is kept of one block's inputs."""
    block, size = model.blocks[0], 2 if plan.dtype == "BF16" else 4
    total = 0
    for group in wan.GROUPS:
        layers = [f"{block}.{name}" for name in group.layers]
        found = [part[name] for part in schemes for name in layers if name in part]
        if not found:
            continue
        columns = model.ffn_dim if group.name == "ffn.out" else model.dim
        total += columns * (plan.rows * size + 5 * 4)
        if any(scheme.gram for scheme in found):
            total += 4 * columns * columns
    return total


def method_nbytes(model: Model, plan: CalibPlan, schemes: Sequence[Mapping[str, Scheme]], kind: str) -> int:
    """Most bytes of temporaries while one layer is worked on: searches, and GPTQ's copies of weight and Hessian."""
    most = 0
    shapes = {linear.name: linear.weight.shape for linear in model.linears}
    for name, scheme in ((n, s) for part in schemes for n, s in part.items() if n in shapes):
        count, columns = shapes[name]
        weights, weight = count * columns, scheme.pair.weight
        if weight.method == "svdquant":
            layers = scheme.smooth.layers if scheme.smooth else (name,)
            need = _svdquant_nbytes(scheme, count, columns, sum(shapes[layer][0] for layer in layers), plan.rows, kind)
        else:
            need = weights + (weights * 12 + 4 * 4 * columns * columns if scheme.gram else 0)
        most = max(most, need)
    return most


def _svdquant_nbytes(scheme: Scheme, count: int, columns: int, together: int, rows: int, kind: str) -> int:
    """As `streamq.methods.svdquant` says of itself, and a plainly rounded layer to compare with.

    count, columns: of the layer; together: rows of all the layers that share its smoothing vector.
    """
    weights, ext = count * columns, dict(scheme.pair.weight.ext)
    rank, group = int(ext.get("rank", 32)) + 8, 64 if scheme.type == "w4a4" else 16
    tile = min(4 * count, (CPU_TILE if kind == "cpu" else DEVICE_TILE) // columns) * (8 * columns + rows)
    seen = 8 * rows * columns + 28 * rank * (count + columns)
    branch = 4 * weights + seen + 4 * rows * count
    if ext.get("gptq"):
        rounding = (8 if group == 16 else 5) * weights + 8 * columns**2 + 2 * GPTQ_PART
        branch = max(branch, 4 * weights + 20 * columns**2, rounding)
    if min(count, columns) <= EXACT_SIDE or ext.get("svd") == "exact":
        branch += 16 * weights + 24 * min(count, columns) ** 2
    return weights + tile + 4 * weights // group + max(branch, seen + 4 * rows * together)


def fits_in_memory(nbytes: int, room: int | None) -> bool:
    """Whether a cache of so many bytes is kept in memory: within the budget's room, or a quarter of what is free."""
    return nbytes <= (psutil.virtual_memory().available // CACHE_SHARE if room is None else room)
