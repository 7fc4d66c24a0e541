"""What the Triton kernels are compared with torch on; as a program, all of it, in Triton's interpreter on the CPU.

Prints a line of JSON: case -> what is wrong with it, or nothing; with a folder for Triton's cache as argument, kernel
-> its PTX. The interpreter is chosen when a kernel is defined, for the whole process, so this is one of its own.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from streamq import emulate
from streamq.device import kernels
from streamq.methods import activation, fourbit, fp8, int4, int8, report, svdquant
from streamq.methods.statistics import InputStatistics, Wanted
from streamq.pairs import QConfig, pair_of
from streamq.quantized import QuantizedLinear, Rule, Scheme

RULES = {"mindie": Rule(scale_floor=2.0**-23), "bf16": Rule(amax_floor=1e-5, scale_dtype="BF16", qmin=-127)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
Case = tuple[str, Callable[..., Any], Callable[..., Any], list[Any]]


def rows_of(count: int, width: int, seed: int = 0) -> Tensor:
    """[count, width] fp32: rows of several sizes, halves, zeros, tiny and huge numbers, NaN and Inf, in turn."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    for row in range(count):
        kind = row % 12
        if kind in (0, 10):  # down to what e4m3 has no name for
            x[row, 1::2] *= 2.0 ** -torch.arange(1, width, 2).remainder(23)
        if kind in (1, 2, 3, 4, 5):
            x[row] *= (0.0, 1e-3, 5e37, 1e-38, 1e-43)[kind - 1]
        elif kind in (6, 7, 8):
            x[row, width // 2] = (torch.nan, torch.inf, -torch.inf)[kind - 6]
        elif kind == 9:
            x[row] = x[row].mul(8).round().div(2)
            x[row, -1] = 127
        elif kind == 10:
            x[row] = x[row].mul(2.0**10).round().div(2.0**10)  # halves of e4m3's least step, which is 2^-9
            x[row, -1] = -448
        elif kind == 11:
            x[row, ::2] = -0.0
    return x


def scheme_of(kind: str, rule: Rule) -> Scheme:
    return Scheme(kind, pair_of(kind), rule)


def row_cases(module: Any, device: str) -> Iterator[Case]:
    """The codes of a weight by rows: of its dtype, and of the fp32 tile that torch makes of it."""
    for kind, job_of in (("w8a8", int8.Job), ("fp8", fp8._Job)):
        for rule_name, rule in (RULES if kind == "w8a8" else RULES | {"none": Rule()}).items():
            for dtype in DTYPES:
                for count, width in ((1, 1), (12, 301), (1, 4100)) if dtype == torch.float32 else ((12, 33),):
                    weight = rows_of(count, width).to(dtype).to(device)
                    job = job_of(weight, scheme_of(kind, rule), None, None, None, None)
                    told = job.told()
                    assert told is not None
                    tile = weight.float()

                    def plain(w: Tensor, codes: Tensor, scales: Tensor, job: Any = job, tile: Tensor = tile) -> Tensor:
                        return job.plain(tile, codes, scales)

                    values = torch.full((count, width), 7.0, device=device)
                    kernel = partial(module.rows, values=values, **told)
                    outs = [torch.zeros_like(job.codes), torch.zeros_like(job.scales)]
                    name = f"rows {kind} {rule_name} {dtype} {count}x{width}"
                    yield name, plain, kernel, [weight, *outs]
                    if count > 1:
                        apart = torch.cat((weight, weight), dim=1)[:, :width]
                        yield f"{name} apart", plain, kernel, [apart, *outs]


def token_cases(module: Any, device: str) -> Iterator[Case]:
    for shape in ((1, 1), (12, 33), (2, 2, 2050), (40,)):
        x = rows_of(math.prod(shape[:-1]), shape[-1]).view(shape).to(device)
        for e4m3, plain in ((False, activation._int8_tokens), (True, activation._fp8_tokens)):
            kernel = partial(module.tokens, e4m3=e4m3, floor=activation.TOKEN_FLOOR)
            yield f"tokens e4m3={e4m3} {shape}", plain, kernel, [x]


def group_cases(module: Any, device: str) -> Iterator[Case]:
    for precision in fourbit.GROUP:
        for count, width in ((1, 64), (12, 192), (1, 2112)):
            x = rows_of(count, width).to(device)
            finite = x.nan_to_num(0.0, 3.0, -3.0)
            whole = fourbit.tensor_scale(finite.abs().amax(), precision)
            for shrink in (1.0, 0.85):
                args = [x, precision, whole, shrink]
                yield f"weight {precision} {shrink} {count}x{width}", fourbit._round_weight_, module.weight, args
            smooth = torch.rand(width, generator=torch.Generator().manual_seed(1)).mul(3).exp().to(device)
            for dtype in DTYPES if count > 1 else DTYPES[:2]:
                for half in HALVES if dtype == torch.float32 else (torch.bfloat16,):
                    for s, back in ((None, False), (smooth, True), (smooth, False)):
                        args = [x.to(dtype), precision, half, s, back]
                        name = f"inputs {precision} {dtype} {half} {s is not None} {back} {count}x{width}"
                        yield name, fourbit._quantize_input, module.inputs, args


def lost_cases(module: Any, device: str) -> Iterator[Case]:
    for count, groups, size in ((1, 1, 64), (12, 3, 64), (1, 40, 64), (3, 5, 48)):
        x = rows_of(count, groups * size).unflatten(1, (groups, size)).to(device)
        share = torch.rand(groups, size, generator=torch.Generator().manual_seed(2)).unsqueeze(0).to(device)
        for symmetric in (False, True):
            scale, offset = int4._fit(x, symmetric, 0.9)
            args = [x, scale, offset, share, symmetric]
            yield f"lost {symmetric} {count}x{groups}x{size}", int4._lost, module.lost, args


def cases(module: Any, device: str) -> Iterator[Case]:
    """(name, torch function, kernel, arguments) of everything."""
    for some in (row_cases, token_cases, group_cases, lost_cases):
        yield from some(module, device)


def wrong(plain: Callable[..., Any], kernel: Callable[..., Any], args: list[Any]) -> str:
    """What is different, or nothing: results, and tensors that were written to."""
    mine, its = kernels.copies(args), kernels.copies(args)
    expected, made = kernels._several(plain(*mine)), kernels._several(kernel(*its))
    if len(expected) != len(made):
        return f"{len(made)} results"
    for number, (a, b) in enumerate(zip((*mine, *expected), (*its, *made), strict=True)):
        if not kernels.same(a, b):
            return f"tensor {number} differs in {int((a != b).sum())} places"
    return ""


# --- whole methods, with every kernel taken where a CUDA device would be asked ---


def layers() -> dict[str, Any]:
    """A result of each method that calls a kernel somewhere."""
    stats, made = _statistics(128), dict[str, Any]()
    bias = torch.randn(6, generator=torch.Generator().manual_seed(4))
    s = stats.amax.clamp_min(0.1).bfloat16().float()
    eights = rows_of(12, 128)[[0, 1, 2, 4, 10, 11]]
    for kind, rule, dtype in (("w8a8", "mindie", torch.float32), ("w8a8", "bf16", torch.bfloat16),
                              ("fp8", "bf16", torch.bfloat16), ("fp8", "mindie", torch.float32)):  # fmt: skip
        weight, scheme = eights.to(dtype), scheme_of(kind, RULES[rule])
        quantize = (fp8 if kind == "fp8" else int8).quantize
        made[f"{kind} {rule} shared"] = quantize(weight, bias, scheme, ranges=int8.RowRanges(weight))
        made[f"{kind} {rule} smoothed"] = quantize(weight, bias, scheme, columns=s)
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(5)) * 0.05
    weight[3], weight[4, 64:] = 0, -0.0
    x = stats.rows[:3].bfloat16()
    for kind in ("w4a4", "w4a4_nvfp4", "w4a16"):
        scheme = scheme_of(kind, Rule())
        pair = scheme.pair
        if kind == "w4a16":
            scheme = replace(scheme, pair=replace(pair, weight=replace(pair.weight, method="mse")))
            layer = int4.quantize(weight, bias, scheme, stats=stats)
        else:
            ext = (("rank", 2), ("rounds", 2))
            scheme = replace(scheme, pair=replace(pair, weight=replace(pair.weight, method="svdquant", ext=ext)))
            layer = svdquant.quantize(weight, bias, scheme, columns=s, stats=stats)
        made[kind] = layer
        made[f"{kind} output"] = emulate.forward(x, layer)
        made[f"{kind} output in halves"] = emulate.forward(x, layer, half_accumulation=True)
    for act in (QConfig("per_token", "int8"), QConfig("per_token", "fp8_e4m3")):
        made[f"{act.dtype} input"] = activation.fake_quantize(stats.rows.float(), act)
    made["output error"] = report.output_error(stats.rows, weight, made["w4a4"], QConfig("per_group", "int4"))
    return made


def _statistics(width: int) -> InputStatistics:
    stats = InputStatistics(width, Wanted(rows=8), 1, torch.device("cpu"))
    stats.update(torch.randn(1, 8, width, generator=torch.Generator().manual_seed(3)))
    return stats


def parts(thing: Any) -> dict[str, Any]:
    """A result's tensors and figures by name."""
    if not isinstance(thing, QuantizedLinear):
        return {"": thing}
    branch = {} if thing.low_rank is None else vars(thing.low_rank)
    return {**vars(thing), **branch, "low_rank": None}  # figures are compared as text: NaN is like NaN


def method_cases(module: Any) -> Iterator[tuple[str, str]]:
    plain, asked = layers(), []

    def choose(name: str, *_: Any) -> Any:
        asked.append(name)
        return module.KERNELS[name]

    with mock.patch.object(kernels, "possible", lambda x: True), mock.patch.object(kernels, "_choice", choose):
        fused = layers()
    for name, expected in plain.items():
        pairs = [(field, value, parts(fused[name])[field]) for field, value in parts(expected).items()]
        bad = [f for f, a, b in pairs if not (kernels.same(a, b) if isinstance(a, Tensor) else repr(a) == repr(b))]
        yield name, f"other {', '.join(bad)}" if bad else ""
    yield "every kernel was taken", "" if set(asked) == set(module.KERNELS) else f"only {sorted(set(asked))}"


# --- compiled for cards that need not be there ---


def compiled(folder: str) -> dict[str, str]:
    """Each kernel in its variants, as PTX that ptxas has accepted too, by a name."""
    os.environ["TRITON_CACHE_DIR"] = folder
    from streamq.device import triton_kernels as module

    rows = {"BLOCK": module.BLOCK, "CODES": True, "HALF_SCALE": True, "CHUNKS": 3}
    groups = {kind: {"GROUP": size, "COUNT": module.TILE // size} for kind, size in module.GROUP.items()}
    wanted = {
        "rows int8": (module._rows, "fp32", {**rows, "BF16": False, "E4M3": False}, 90),
        "rows e4m3": (module._rows, "i16", {**rows, "BF16": True, "E4M3": True}, 80),
        "weight int4": (module._weight, "fp32", {**groups["int4"], "NVFP4": False}, 90),
        "weight nvfp4": (module._weight, "fp32", {**groups["nvfp4"], "NVFP4": True}, 80),
        "lost": (module._lost, "fp32", {"GROUP": 64, "BLOCK": module.BLOCK}, 90),
    }
    for kind, dtype, bf16, half, arch in (("int4", "i16", True, True, 90), ("nvfp4", "fp16", False, False, 80)):
        told = {"BF16": bf16, "HALF_BF16": half, "SMOOTH": True, "BACK": True, "NVFP4": kind == "nvfp4"}
        wanted[f"inputs {kind}"] = (module._inputs, dtype, {**groups[kind], **told}, arch)
    return {name: _ptx(module, *how) for name, how in wanted.items()}


def _ptx(module: Any, kernel: Any, dtype: str, constants: dict[str, Any], arch: int) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"x": dtype, "w": dtype, "codes": "i8"}
    whole = ("width", "stride", "groups")
    numbers = ("amax_floor", "scale_floor", "zero_scale", "top", "low", "high", "shrink", "inverse_top", "one")
    types = dict.fromkeys(whole, "i32") | dict.fromkeys(numbers, "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*" + pointers.get(name, "fp32")) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=module.HOW)
    assert made.asm["cubin"]
    return str(made.asm["ptx"])


def main() -> None:
    """See the module."""
    if len(sys.argv) == 2:
        print(json.dumps(compiled(sys.argv[1])))
        return
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of a division by 0
    from streamq.device import triton_kernels

    found = {name: wrong(plain, kernel, args) for name, plain, kernel, args in cases(triton_kernels, "cpu")}
    print(json.dumps(found | dict(method_cases(triton_kernels))))


if __name__ == "__main__":
    main()
