"""Whether a Triton kernel stands in for a torch function: decided on the card itself, by bits first, then by time.

A kernel is taken if it gives the bits of the torch function, on a part of what the first call brought and on numbers
that are hard to round, and takes at most 1 / FASTER of its time. So the choice, which is made once for each kernel,
shape of a row, combination of types and card in a process, never shows in a result. Elsewhere than on CUDA nothing of
this is looked at. Without Triton, with one that does not compile, or with STREAMQ_TRITON=0 in the environment, torch's
functions run; the logger `streamq.kernels` says why.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import statistics
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LEAST = 1 << 21  # elements; below, a launch costs more than the work
SAMPLE = 1 << 21  # of them at most for a trial, which takes up to 64 MiB for a moment
FASTER = 1.1
ROUNDS, CALLS = 5, 8  # of timing, each in turn; calls in each
VARIABLE = "STREAMQ_TRITON"

Function = Callable[..., Any]
Clock = Callable[[Callable[[], Any]], float]

_log = logging.getLogger("streamq.kernels")
_lock = Lock()
_choices: dict[Hashable, Function | None] = {}


def chosen(name: str, reference: Function, *args: Any, **how: Any) -> Function | None:
    """The kernel `name` of `triton_kernels`, to be called with args, if it is to run in reference's place; else None.

    reference(*args) and kernel(*args, **how) return a tensor or several, and may write to tensors of args. args[0]: the
    input [n, ...]; other tensors of as many rows and at least two dimensions go by its rows, the rest is shared. how:
    what the kernel needs to be told besides; tensors there are scratch memory, which both may use.
    """
    x = args[0]
    if not possible(x):
        return None
    key = (
        name,
        x.device,
        x.shape[1:],
        *map(_kind, args),
        *((word, _kind(value)) for word, value in sorted(how.items())),
    )
    with _lock:
        if key not in _choices:
            _choices[key] = _choice(name, reference, args, how)
        kernel = _choices[key]
    return kernel and partial(kernel, **how)


def possible(x: Tensor) -> bool:
    """Whether a kernel may be looked for at all."""
    large = x.device.type == "cuda" and x.numel() >= LEAST and x.is_contiguous()
    return large and os.environ.get(VARIABLE) != "0"


def pick(name: str, reference: Function, kernel: Function, examples: Sequence[Sequence[Any]], clock: Clock) -> str:
    """Why kernel(*args) may not stand in for reference(*args); empty: it may. `clock`: seconds, or the like, of a call.

    The two are compared on each of the examples, on copies of their tensors, and timed on the first.
    """
    for example in examples:
        mine, its = copies(example), copies(example)
        expected = copies(_several(reference(*mine)))  # it may be scratch memory that the kernel uses too
        made = _several(kernel(*its))
        alike = len(expected) == len(made)
        if not alike or not all(map(same, (*mine, *expected), (*its, *made))):
            return "other bits than torch"
        del mine, its, expected, made  # before the next copies are made
    args = copies(examples[0])
    turns = [(clock(partial(reference, *args)), clock(partial(kernel, *args))) for _ in range(ROUNDS)]
    plain, fused = (statistics.median(times) for times in zip(*turns, strict=True))
    _log.info("%s: torch %.4g ms, Triton %.4g ms", name, plain, fused)
    return "" if fused * FASTER <= plain else "not faster than torch"


def same(a: Any, b: Any) -> bool:
    """Whether two tensors have the same shape, type and bits, but that any NaN is like another; other things: True."""
    if not isinstance(a, Tensor):
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    if torch.equal(a.view(whole), b.view(whole)):
        return True
    if not a.is_floating_point():
        return False
    a, b = (torch.where(t.isnan(), torch.nan, t).view(torch.int32) for t in (a.float(), b.float()))
    return torch.equal(a, b)


def cuda_clock(device: torch.device) -> Clock:
    """Milliseconds of a call on this card, of CALLS in a row, by its own events."""

    def clock(call: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            call()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / CALLS

    return clock


def by_rows(x: Tensor) -> Tensor:
    """x [..., K] as [n, K], of which a trial takes the first rows, where that is no copy; else x."""
    return x.view(-1, x.shape[-1]) if x.device.type == "cuda" and x.is_contiguous() else x


def sample(args: Sequence[Any]) -> list[Any]:
    """The first rows of what `chosen` was given, SAMPLE elements at most."""
    x = args[0]
    rows = max(1, SAMPLE // max(1, x[0].numel()))
    return [a[:rows] if isinstance(a, Tensor) and a.dim() > 1 and len(a) == len(x) else a for a in args]


def hard(args: Sequence[Any]) -> list[Any]:
    """The same with rows of zeros, halves, huge and tiny numbers, NaN and Inf in the place of the input's."""
    x = torch.randn(args[0][:16].shape, generator=torch.Generator().manual_seed(0))
    flat = x.view(len(x), -1)
    for row, value in enumerate((0.0, -0.0, torch.nan, torch.inf, -torch.inf, 5e37, 1e-38, 1e-43)):
        if row < len(x):
            flat[row] *= value if value else 0.0
            flat[row, 1::7] = value
    for row in range(8, len(x)):  # eighths to 1024ths of many sizes, and one number that makes the scale
        flat[row, ::3] *= 2.0 ** -torch.arange(0, flat.shape[1], 3).remainder(11)
        flat[row] = flat[row].mul(2.0 ** (row - 5)).round().div(2.0 ** (row - 5))
        flat[row, -1] = (127.0, 448.0, 7.0, 6.0, 8.0, 126.0, 3.5, 1.0)[row - 8]
    given = args[0]
    rest = [a[:16] if isinstance(a, Tensor) and a.dim() > 1 and len(a) == len(given) else a for a in args[1:]]
    return [x.to(given.dtype).to(given.device), *rest]


def copies(values: Sequence[Any]) -> list[Any]:
    """The same with tensors of their own."""
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def _choice(name: str, reference: Function, args: Sequence[Any], how: dict[str, Any]) -> Function | None:
    module = _module()
    if module is None:
        return None
    kernel: Function = module.KERNELS[name]
    part, stand_in = sample(args), partial(kernel, **how)
    try:
        why = _compiled(module, stand_in, part)
        why = why or pick(name, reference, stand_in, [part, hard(args)], cuda_clock(args[0].device))
    except torch.OutOfMemoryError:  # of the trial: the work itself may still fit
        why = "no memory for a trial"
    _log.info("%s on %s: %s", name, args[0].device, f"torch: {why}" if why else "Triton")
    return None if why else kernel


def _compiled(module: ModuleType, kernel: Function, args: Sequence[Any]) -> str:
    """Call it once; why it cannot be compiled, or nothing."""
    try:
        kernel(*copies(args))
    except torch.OutOfMemoryError:
        raise
    except module.FAILURES as error:
        return f"Triton fails ({type(error).__name__}: {error})"
    return ""


@cache
def _module() -> ModuleType | None:
    """triton_kernels, or None where Triton is not installed or does not load."""
    if importlib.util.find_spec("triton") is None:
        _log.info("no Triton: torch runs")
        return None
    try:
        from streamq.device import triton_kernels
    except (ImportError, OSError) as error:
        _log.info("Triton does not load, torch runs: %s", error)
        return None
    return triton_kernels


def _kind(value: Any) -> Any:
    """What of an argument another kernel is compiled for."""
    return value.dtype if isinstance(value, Tensor) else type(value) if isinstance(value, float) else value


def _several(made: Any) -> tuple[Any, ...]:
    return made if isinstance(made, tuple) else () if made is None else (made,)
