"""How an analysis chooses: against every other choice; and how it writes down what it chose."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from streamq.analysis import recipes
from streamq.analysis.choose import choose
from streamq.patterns import matches


def brute(options: list[list[tuple[float, float]]], limit: float) -> float:
    """Least cost of all choices within the limit; infinite if there is none."""
    best = math.inf
    for picks in itertools.product(*options):
        if sum(weight for _, weight in picks) <= limit:
            best = min(best, sum(cost for cost, _ in picks))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_choose_is_exact(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(1, most, (1,), generator=random))

    sizes = [number(50) for _ in range(3)]  # few shapes, as in a model
    options = []
    for _ in range(7):
        size = sizes[number(4) - 1]
        options.append([(float(number(1000)) / 7, float(size * part)) for part in (1, 2, 4)][: 1 + number(3)])
    limit = float(number(200) + sum(min(w for _, w in part) for part in options) - 20)
    found, due = choose(options, limit), brute(options, limit)
    if found is None:
        assert due == math.inf
        return
    assert found.weight <= limit and found.cost == pytest.approx(due) and found.bound <= found.cost + 1e-9
    picked = [part[i] for part, i in zip(options, found.options, strict=True)]
    sums = sum(cost for cost, _ in picked), sum(weight for _, weight in picked)
    assert sums == pytest.approx((found.cost, found.weight))


def test_choose_many_items() -> None:
    """As many as a large model has; near the bound, which nothing can be better than."""
    random = torch.Generator().manual_seed(1)
    errors = torch.rand(400, 2, generator=random).double().exp().tolist()
    options = [
        [(0.0, 4.0 * s), (a, 2.0 * s), (9 * b, 1.0 * s)] for (a, b), s in zip(errors, [1, 1, 1, 6] * 100, strict=True)
    ]
    found = choose(options, 1800.0)
    assert found is not None and found.weight <= 1800 and found.cost <= found.bound * 1.001


def test_patterns_match_just_the_chosen() -> None:
    layers = [
        f"{k}.{i}.{n}" for k in ("blocks", "vace_blocks") for i in range(120) for n in ("ffn.0", "ffn.2", "before_proj")
    ]
    chosen = [layer for layer in layers if layer.endswith("ffn.2") or (layer.startswith("blocks") and "7" in layer)]
    found = recipes.patterns(chosen, layers)
    assert [layer for layer in layers if any(matches(layer, pattern) for pattern in found)] == chosen
    assert max(map(len, found)) <= 200 and len(found) < 10
