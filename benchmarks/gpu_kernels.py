"""Triton kernels beside the torch functions whose place they may take, on a CUDA device: time, and equal bits or not.

    python benchmarks/gpu_kernels.py [--device cuda:0] [--rows 4096] [--runs 5] [--only rows,lost] [--json FILE]

Shapes are those of Wan's layers: 5120 columns (14B), 13824 (its ffn.2), 1536 (1.3B). Milliseconds are medians, the two
in turn, of several calls in a row by the device's events. GB/s is what has to move at least, arguments and results
once, over the kernel's time. Bits are compared on the timed numbers and on ones that are hard to round. `taken`: what
streamq itself would decide. Without a CUDA device, or without Triton, it says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

WIDTHS = (1536, 5120, 13824)


class Case(NamedTuple):
    """A kernel and its torch function on the same arguments; `how`: what the kernel is told besides."""

    name: str
    what: str
    reference: Callable[..., Any]
    args: list[Any]
    how: dict[str, Any]


def weight_cases(count: int, width: int, device: Any) -> Iterator[Case]:
    """Weights: codes by rows, and groups of columns in 4 bits."""
    import torch

    from streamq.methods import fourbit, fp8, int4, int8
    from streamq.pairs import pair_of
    from streamq.quantized import Rule, Scheme

    weight = torch.randn(count, width, device=device).mul_(0.05)
    for kind, job_of in (("w8a8", int8.Job), ("fp8", fp8._Job)):
        rule = Rule(amax_floor=1e-5, scale_dtype="BF16", qmin=-127)
        job = job_of(weight, Scheme(kind, pair_of(kind), rule), None, None, None, None)
        part = slice(0, job.parts()[0].stop)  # a tile, as methods have it
        args = [weight[part], job.codes[part], job.scales[part]]
        yield Case("rows", kind, job.plain, args, {**(job.told() or {}), "values": job.work.q})
    for precision in ("int4", "nvfp4"):
        whole = fourbit.tensor_scale(weight.abs().amax(), precision)
        yield Case("weight", precision, fourbit._round_weight_, [weight, precision, whole, 1.0], {})
    groups = weight.unflatten(1, (-1, int4.GROUP))
    share = torch.rand(1, groups.shape[1], int4.GROUP, device=device)
    yield Case("lost", "w4a16", int4._lost, [groups, *int4._stored(*int4._ends(groups)), share, False], {})


def input_cases(count: int, width: int, device: Any) -> Iterator[Case]:
    """Inputs: by token, and in groups with smoothing."""
    import torch

    from streamq.methods import activation, fourbit

    x = torch.randn(count, width, device=device)
    for what, plain in (("int8", activation._int8_tokens), ("e4m3", activation._fp8_tokens)):
        yield Case("tokens", what, plain, [x], {"e4m3": what == "e4m3", "floor": activation.TOKEN_FLOOR})
    smooth = torch.rand(width, device=device).add_(0.5)
    for dtype in (torch.bfloat16, torch.float16):
        for precision in ("int4", "nvfp4"):
            args = [x.to(dtype), precision, dtype, smooth, True]
            yield Case("inputs", f"{precision} smoothed", fourbit._quantize_input, args, {})


def measure(case: Case, kernel: Callable[..., Any], device: Any, runs: int) -> dict[str, Any]:
    """A row of the table."""
    import torch

    from streamq.device import kernels

    clock, told = kernels.cuda_clock(device), partial(kernel, **case.how)
    why = ""
    for args in (case.args, kernels.hard(case.args)):
        why = why or kernels.pick(case.name, case.reference, told, [args], lambda call: 0.0)
    args = kernels.copies(case.args)
    turns = [(clock(partial(case.reference, *args)), clock(partial(told, *args))) for _ in range(runs)]
    plain, fused = (statistics.median(times) for times in zip(*turns, strict=True))
    made = told(*args)
    results = [*args, *(made if isinstance(made, tuple) else (made,))]
    moved = sum(t.nbytes for t in results if isinstance(t, torch.Tensor))
    taken = kernels.chosen(case.name, case.reference, *case.args, **case.how) is not None
    x = case.args[0]
    return {
        "kernel": case.name, "what": case.what, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."),
        "torch_ms": plain, "triton_ms": fused, "ratio": plain / fused, "gb_per_s": moved / fused / 1e6,
        "bits_equal": not why, "taken": taken,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(
        f"{'kernel':<24}{'shape':<18}{'dtype':<10}{'torch ms':>9}{'triton ms':>10}{'ratio':>7}{'GB/s':>7}  bits  taken"
    )
    for row in rows:
        name, shape = f"{row['kernel']} {row['what']}", "x".join(map(str, row["shape"]))
        print(
            f"{name:<24}{shape:<18}{row['dtype']:<10}{row['torch_ms']:>9.3f}{row['triton_ms']:>10.3f}"
            f"{row['ratio']:>7.2f}{row['gb_per_s']:>7.0f}  {'equal' if row['bits_equal'] else 'OTHER'}"
            f"  {'yes' if row['taken'] else 'no'}"
        )


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rows", type=int, default=4096, help="of weights and inputs")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="names of kernels, with commas between")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print(f"no CUDA device (torch {torch.__version__}): nothing to measure", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print('no Triton: pip install "streamq[triton]"', file=sys.stderr)
        return 2
    from streamq.device import triton_kernels

    device, only = (
        torch.device(options.device),
        options.only.split(",") if options.only else list(triton_kernels.KERNELS),
    )
    torch.manual_seed(0)
    rows = []
    for width in WIDTHS:
        for cases in (weight_cases, input_cases):
            for case in cases(options.rows, width, device):
                if case.name in only:
                    rows.append(measure(case, triton_kernels.KERNELS[case.name], device, options.runs))
    show(rows)
    if options.json:
        machine = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
        machine["triton"] = importlib.import_module("triton").__version__
        options.json.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["bits_equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
