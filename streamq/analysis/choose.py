"""Which option each layer gets: the multiple-choice knapsack problem, solved exactly where that is feasible.

Minimise the sum of costs with the sum of weights within a limit, one option for each item. A Lagrange multiplier gives
a good choice and a bound; partial choices that the bound rules out, or that another one beats in both sums, are
dropped (H. Kellerer, U. Pferschy, D. Pisinger, Knapsack Problems, 2004, chapter 11). What is left is few, as most
layers of a model have one of a few shapes. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_STATES = 200_000  # partial choices that are kept; beyond, evenly spread ones
SLACK = 1e-12  # of rounding in sums, relative
HALVINGS = 200

Options = Sequence[tuple[float, float]]  # (cost, weight) of each option of one item


@dataclass(frozen=True)
class Choice:
    """One option number for each item, the sums, and no cost below `bound` is possible within the limit."""

    options: tuple[int, ...]
    cost: float
    weight: float
    bound: float


def choose(items: Sequence[Options], limit: float) -> Choice | None:
    """The choice of least cost whose weight is at most `limit`; None if there is none.

    Of choices with equal cost a lighter one. Exact up to rounding of the sums, unless more than MAX_STATES partial
    choices are worth going on with; `bound` tells then how much better another choice could be.
    """
    if sum(min(weight for _, weight in options) for options in items) > limit:
        return None
    ordered = sorted(range(len(items)), key=lambda i: -max(weight for _, weight in items[i]))
    arrays = [np.array(items[i], dtype=np.float64).reshape(-1, 2) for i in ordered]
    factor, best = _multiplier(arrays, limit)
    least = np.array([(part[:, 0] + factor * part[:, 1]).min() for part in arrays])
    bound = float(least.sum() - factor * limit)
    found, exact = _search(arrays, limit, factor, least, _cost(arrays, best))
    picks = best if found is None else found
    placed = dict(zip(ordered, picks, strict=True))
    cost, weight = _cost(arrays, picks), sum(float(part[i, 1]) for part, i in zip(arrays, picks, strict=True))
    return Choice(tuple(placed[i] for i in range(len(items))), cost, weight, cost if exact else min(cost, bound))


def _cost(arrays: list[np.ndarray], picks: list[int]) -> float:
    return sum(float(part[i, 0]) for part, i in zip(arrays, picks, strict=True))


def _multiplier(arrays: list[np.ndarray], limit: float) -> tuple[float, list[int]]:
    """The price of a unit of weight at which the cheapest options just fit, and what they are, improved greedily."""

    def cheapest(price: float) -> tuple[list[int], float]:
        picks = [int(np.lexsort((part[:, 1], part[:, 0] + price * part[:, 1]))[0]) for part in arrays]
        return picks, sum(float(part[i, 1]) for part, i in zip(arrays, picks, strict=True))

    picks, weight = cheapest(0.0)
    if weight <= limit:
        return 0.0, picks
    low, high = 0.0, 1e-30
    while cheapest(high)[1] > limit and high < 1e300:
        low, high = high, high * 16
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if cheapest(middle)[1] > limit:
            low = middle
        else:
            high = middle
    picks, weight = cheapest(high)
    if weight > limit:  # the prices do not reach so far: the lightest
        picks = [int(np.lexsort((part[:, 0], part[:, 1]))[0]) for part in arrays]
        weight = sum(float(part[i, 1]) for part, i in zip(arrays, picks, strict=True))
    gains = sorted(
        (float(part[now, 0] - part[other, 0]), item, other)
        for item, (part, now) in enumerate(zip(arrays, picks, strict=True))
        for other in range(len(part))
        if part[other, 0] < part[now, 0]
    )
    for _, item, other in reversed(gains):
        now, part = picks[item], arrays[item]
        more = float(part[other, 1] - part[now, 1])
        if part[other, 0] < part[now, 0] and weight + more <= limit:
            picks[item], weight = other, weight + more
    return high, picks


def _search(
    arrays: list[np.ndarray], limit: float, factor: float, least: np.ndarray, known: float
) -> tuple[list[int] | None, bool]:
    """Partial choices, item by item; None where nothing is better than what is known. And whether all were tried."""
    after = np.append(np.cumsum(least[::-1])[::-1], 0.0)
    lightest = np.append(np.cumsum([part[:, 1].min() for part in arrays][::-1])[::-1], 0.0)
    slack = SLACK * (abs(known) + factor * abs(limit))
    costs, weights, exact = np.zeros(1), np.zeros(1), True
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for number, part in enumerate(arrays):
        all_costs = (costs[:, None] + part[None, :, 0]).ravel()
        all_weights = (weights[:, None] + part[None, :, 1]).ravel()
        fits = all_weights + lightest[number + 1] <= limit * (1 + SLACK)
        promising = all_costs + factor * (all_weights - limit) + after[number + 1] <= known + slack
        kept = np.flatnonzero(fits & promising)
        kept = kept[np.lexsort((all_costs[kept], all_weights[kept]))]
        if len(kept):  # heavier ones only where they cost less than every lighter one
            running = np.minimum.accumulate(all_costs[kept])
            kept = kept[np.append(True, all_costs[kept][1:] < running[:-1])]
        if len(kept) > MAX_STATES:
            kept, exact = kept[np.linspace(0, len(kept) - 1, MAX_STATES).astype(np.int64)], False
        costs, weights = all_costs[kept], all_weights[kept]
        trail.append(((kept // len(part)).astype(np.int32), (kept % len(part)).astype(np.int16)))
        if not len(kept):
            return None, exact
    state = int(np.argmin(costs))
    if weights[state] > limit:
        return None, exact
    picks: list[int] = []
    for parents, options in reversed(trail):
        picks.append(int(options[state]))
        state = int(parents[state])
    return picks[::-1], exact
