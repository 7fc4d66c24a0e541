"""How long a calibrated run will take: its matrix products and its rounding, by this machine's speed at both.

An estimate from shapes alone, before anything is read; needs no torch. On the CPU the speed is measured, in a tenth of
a second; of an accelerator it is assumed, because asking it would take a process of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamq import wan
from streamq.calibration.plan import CalibPlan
from streamq.calibration.settings import states_len
from streamq.plan import Plan
from streamq.quantized import Scheme
from streamq.wan import Expert, Linear

# Candidates of SVDQuant's smoothing grids; turns that its low-rank search is taken to need; directions beyond the rank.
CANDIDATES = {"full": 39, "coarse": 18}
USUAL_TURNS = 16
SPARE = 8
WARM_ROUNDS = 3  # passes over a matrix for one set of factors: two of iteration and one for the result
OTHER_CANDIDATES = 20  # of alpha, or of AWQ's ratio
# Share of a large square product's speed that products with few rows, or 40 columns, reach (measured at 1536 x 8960).
THIN = 0.45
# Passes that take about as long as dividing and rounding a weight once in numpy.
ROUNDING_PASSES = 4.0


@dataclass(frozen=True)
class Speed:
    """FLOP a second in fp32 matrix products, and weights rounded a second. `measured`: here, or assumed."""

    flops: float
    weights: float
    measured: bool


ASSUMED = Speed(2.0e13, 1.0e10, False)


@dataclass(frozen=True)
class Work:
    """Multiply-adds times two, and weights that pass through rounding."""

    flops: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.weights + other.weights)

    def seconds(self, speed: Speed) -> float:
        """At a machine's speed."""
        return self.flops / (THIN * speed.flops) + self.weights / speed.weights


def speed_of(kind: str) -> Speed:
    """This machine's, for `cpu`; an assumption for an accelerator."""
    if kind != "cpu":
        return ASSUMED
    a = np.ones((1024, 1024), np.float32)
    w = np.linspace(-1, 1, 1 << 20, dtype=np.float32)
    out = np.empty_like(w)
    product = _fastest(lambda: a @ a)
    rounding = _fastest(lambda: np.rint(np.divide(w, np.float32(0.01), out=out), out=out))
    return Speed(2 * 1024**3 / product, w.size / (ROUNDING_PASSES * rounding), True)


def _fastest(job: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        job()
        best = min(best, time.perf_counter() - began)
    return max(best, 1e-9)


def run_work(plan: Plan) -> Work:
    """Of a whole calibrated run, the making of its own inputs aside."""
    chosen = plan.calibration
    assert chosen is not None
    total = Work(float(chosen.flops([part.expert for part in plan.experts])))
    for part in plan.experts:
        linears = {linear.name: linear for linear in part.expert.model.linears}
        for step in (step for unit in part.units for step in unit.steps):
            for scheme in step.schemes:
                if not step.replayed:  # outside the blocks there is nothing to search by
                    total += Work(0.0, 2.0 * math.prod(step.sources[0].shape))
                    continue
                total += layer_work(linears[step.name], scheme, chosen, _gram_rows(step.name, chosen, part.expert))
    return total


def to_json(plan: Plan) -> dict[str, Any]:
    """`seconds` for `plan --json`, with what it is reckoned by; {} for a run that is not calibrated."""
    if plan.calibration is None:
        return {}
    speed = speed_of(plan.device_kind)
    by = {"gflops": round(speed.flops / 1e9), "measured": speed.measured}
    return {"seconds": round(run_work(plan).seconds(speed)), "speed": by}


def _gram_rows(layer: str, plan: CalibPlan, expert: Expert) -> int:
    """Rows that enter the Gram matrix of the layer's input, over all samples."""
    tokens = plan.shapes[expert.name].tokens
    if wan.group_of(layer).name in ("attn2.text", "attn2.image"):
        tokens = states_len(expert.model)
    return plan.samples[expert.name] * min(plan.gram_rows or tokens, tokens)


def layer_work(linear: Linear, scheme: Scheme, plan: CalibPlan, gram_rows: int) -> Work:
    """Of one layer's search, rounding and report; statistics of its input are part of it."""
    n, k = linear.weight.shape
    weights, rows = float(n * k), plan.rows
    output = 2.0 * rows * weights
    found = Work(4 * output, 6 * weights)  # the report: before and after, each against the float output
    ext = dict(scheme.pair.weight.ext)
    branch = 4.0 * weights * (int(ext.get("rank", 32)) + SPARE) * WARM_ROUNDS
    searched = scheme.pair.weight.method == "svdquant"
    if scheme.smooth is not None and scheme.smooth.method == "svdquant":
        tried = min(scheme.smooth.rows or rows, rows)
        each = Work(2.0 * tried * weights + (branch if searched else 0), weights)
        found += _times(each, CANDIDATES[scheme.smooth.grid])
    elif scheme.smooth is not None and scheme.smooth.method in ("search", "awq"):
        found += _times(Work(output, weights), OTHER_CANDIDATES)
    if searched:
        found += _times(Work(output + branch, 2 * weights), min(int(ext.get("rounds", 100)), USUAL_TURNS))
    if scheme.gram:
        found += Work(weights * k + 2.0 * k**3 / 3 * 2 + 2.0 * gram_rows * k**2, 2 * weights)
    return found


def _times(work: Work, count: int) -> Work:
    return Work(work.flops * count, work.weights * count)
