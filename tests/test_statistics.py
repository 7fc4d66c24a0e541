"""Statistics of inputs against one pass over everything at once; static ranges; fake quantization; MindIE's bytes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from streamq.methods.activation import fake_quantize, static_input, static_tensors
from streamq.methods.int8 import quantize
from streamq.methods.statistics import InputStatistics, Wanted, spread
from streamq.pairs import Pair, QConfig
from streamq.quantized import QuantizedLinear, Rule, Scheme, StaticInput

DATA = Path(__file__).parent / "data/mindie_static/layers.safetensors"
CPU = torch.device("cpu")
ALL = Wanted(mean=True, histogram=True, gram=True, rows=24)
INT8 = QConfig("per_channel", "int8")
TENSOR = QConfig("per_tensor", "int8", symmetric=False)


def samples(count: int = 5, width: int = 12, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(3)
    scale = torch.logspace(-2, 1, width)
    return [((torch.randn(1, 37 + 3 * i, width) + 0.3) * scale * (i + 1)).to(dtype) for i in range(count)]


def gathered(xs: list[torch.Tensor], wanted: Wanted = ALL) -> InputStatistics:
    stats = InputStatistics(xs[0].shape[-1], wanted, len(xs), CPU)
    for x in xs:
        stats.update(x)
    return stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ranges_mean_and_gram_are_those_of_all_rows_at_once(dtype: torch.dtype) -> None:
    xs = samples(dtype=dtype)
    stats = gathered(xs)
    rows = torch.cat([x[0] for x in xs])
    assert torch.equal(stats.amax, rows.abs().amax(0).float())
    assert float(stats.lo) == min(0.0, float(rows.min())) and float(stats.hi) == max(0.0, float(rows.max()))
    torch.testing.assert_close(stats.mean, rows.double().abs().mean(0).float())
    assert stats.gram is not None and stats.gram_count == len(rows)
    torch.testing.assert_close(stats.gram, (rows.double().T @ rows.double()).float(), rtol=1e-5, atol=1e-4)
    assert stats.rows.dtype == dtype


def test_ranges_hold_zero() -> None:
    stats = gathered([torch.full((1, 4, 3), 2.0)])
    assert float(stats.lo) == 0.0 and float(stats.hi) == 2.0
    assert torch.equal(stats.columns_lo, torch.zeros(3)) and torch.equal(stats.amax, torch.full((3,), 2.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    xs = samples(3)
    xs[1][0, 7, 4] = bad
    stats = gathered(xs)
    assert not torch.isfinite(stats.amax[4]) and torch.isfinite(stats.amax[[0, 1, 2, 3, 5]]).all()


def test_a_wrong_width_or_one_sample_too_many_is_refused() -> None:
    stats = gathered(samples(2))
    with pytest.raises(ValueError, match="sample 2 of 2"):
        stats.update(samples(1)[0])
    with pytest.raises(ValueError, match="not 12 wide"):
        InputStatistics(12, ALL, 1, CPU).update(torch.zeros(1, 3, 11))


@given(count=st.integers(0, 40), length=st.integers(1, 60), phase=st.integers(0, 200))
def test_spread_rows_are_distinct_and_even(count: int, length: int, phase: int) -> None:
    chosen = spread(count, length, phase).tolist()
    assert len(chosen) == min(count, length) == len(set(chosen)) and chosen == sorted(chosen)
    assert all(0 <= i < length for i in chosen)
    gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("n", "rows"), [(1, 24), (5, 24), (7, 24), (100, 24), (5, 0)])
def test_shares_of_kept_rows_add_up(n: int, rows: int) -> None:
    x = torch.arange(50.0).unsqueeze(1)
    stats = gathered([x + 1000 * i for i in range(n)], Wanted(rows=rows))
    assert len(stats.rows) == rows
    assert len(set(stats.rows.flatten().tolist())) == rows
    if rows and n > 1:
        places = [{v % 1000 for v in stats.rows.flatten().tolist() if v // 1000 == i} for i in range(n)]
        taken = [p for p in places if p]
        assert len(set().union(*taken)) > rows * 0.5  # not the same positions of every sample


def test_gram_rows_bound_what_enters() -> None:
    xs = samples(3)
    stats = gathered(xs, Wanted(gram=True, gram_rows=5))
    assert stats.gram_count == 15 and stats.gram is not None
    by_hand = torch.zeros(12, 12)
    for i, x in enumerate(xs):
        picked = x[0, spread(5, x.shape[1], i)]
        by_hand += picked.T @ picked
    torch.testing.assert_close(stats.gram, by_hand)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.randoms(use_true_random=False))
@example([65536.0, -7.707141553786494e-44], Random(0))  # which underflows beside the first, and not alone
@example([-7.707141553786494e-44, 65536.0], Random(0))
def test_histogram_is_exact_and_knows_no_order(values: list[float], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    made = []
    for order in (values, shuffled):
        stats = gathered([torch.tensor([[v]]) for v in order], Wanted(histogram=True))
        made.append(stats.histogram)
    first, second = made
    assert first is not None and second is not None
    assert first.limit == second.limit and torch.equal(first.counts, second.counts)
    edges = first.edges()
    for v in values:
        at = int(torch.searchsorted(edges, torch.tensor(v, dtype=torch.float64), right=True)) - 1
        assert first.counts[at] > 0
    assert int(first.counts.sum()) == len(values) and max(map(abs, values)) < first.limit


def test_minmax_is_msmodelslims_formula() -> None:
    stats = gathered([torch.tensor([[-1.5, 3.0], [0.25, 2.0]])], Wanted())
    f32 = torch.float32
    lo, hi = torch.tensor(-1.5, dtype=f32), torch.tensor(3.0, dtype=f32)
    scale = hi / torch.tensor(255.0) - lo / torch.tensor(255.0)
    asymmetric = static_input(stats, TENSOR)
    assert asymmetric == StaticInput(float(scale), float(torch.round(-lo / scale) - 128))
    assert static_input(stats, QConfig("per_tensor", "int8")) == StaticInput(float(hi / torch.tensor(127.0)), 0.0)
    zero = gathered([torch.zeros(2, 2)], Wanted())
    assert static_input(zero, TENSOR) == StaticInput(2.0**-23, -128.0)


def test_range_of_a_smoothed_input_is_that_of_x_divided() -> None:
    xs, s = samples(), torch.linspace(0.1, 9, 12)
    direct = gathered([x / s for x in xs], Wanted())
    for symmetric in (False, True):
        config = QConfig("per_tensor", "int8", symmetric)
        assert static_input(gathered(xs, Wanted()), config, s) == static_input(direct, config)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("percent", [90.0, 99.0, 99.99])
def test_percentile_is_numpys_quantile_within_a_bin(percent: float, symmetric: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 8) + (0 if symmetric else 0.5)
    stats = gathered([x], Wanted(histogram=True))
    config = QConfig("per_tensor", "int8", symmetric, "percentile", (("percentile", percent),))
    static = static_input(stats, config)
    assert stats.histogram is not None
    bin_width = 2 * stats.histogram.limit / 2048
    if symmetric:
        expected = float(np.quantile(x.abs().numpy(), percent / 100, method="inverted_cdf"))
        assert static.scale * 127 == pytest.approx(expected, abs=2 * bin_width)
    else:
        tail = (100 - percent) / 200
        low = -float(np.quantile(-x.numpy(), 1 - tail, method="inverted_cdf"))
        high = float(np.quantile(x.numpy(), 1 - tail, method="inverted_cdf"))
        assert static.scale * 255 == pytest.approx(high - low, abs=4 * bin_width)
        assert (-128 - static.offset) * static.scale == pytest.approx(low, abs=4 * bin_width)


def squared(x: torch.Tensor, static: StaticInput, config: QConfig) -> float:
    return float((fake_quantize(x, config, static) - x).double().square().sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outlier", [0.0, 40.0, 400.0])
def test_mse_range_is_near_the_best_of_a_fine_search(symmetric: bool, outlier: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(3000, 16)
    x[5, 3] += outlier
    stats = gathered([x], Wanted(histogram=True, rows=3000))
    config = QConfig("per_tensor", "int8", symmetric, "mse")
    plain = QConfig("per_tensor", "int8", symmetric)
    mine = squared(x, static_input(stats, config), config)
    assert mine <= squared(x, static_input(stats, plain), plain) * 1.001
    tried = []
    for share in torch.logspace(-2.2, 0, 150).tolist():
        lo, hi = float(stats.lo), float(stats.hi)
        if symmetric:
            tried.append(StaticInput(max(-lo, hi) * share / 127, 0.0))
        else:
            for low in (1.0, share):
                scale = (hi * share - lo * low) / 255
                tried.append(StaticInput(scale, float(round(-lo * low / scale) - 128)))
    assert mine <= 1.05 * min(squared(x, one, config) for one in tried)


def test_ranges_refuse_what_they_lack() -> None:
    stats = gathered(samples(), Wanted())
    with pytest.raises(ValueError, match="histogram"):
        static_input(stats, QConfig("per_tensor", "int8", method="mse"))
    with pytest.raises(ValueError, match="kept rows"):
        static_input(gathered(samples(), Wanted(histogram=True)), QConfig("per_tensor", "int8", method="mse"),
                     torch.ones(12))  # fmt: skip
    with pytest.raises(ValueError, match="mean"):
        _ = stats.mean
    with pytest.raises(ValueError, match="no such rounding"):
        fake_quantize(torch.zeros(1, 32), QConfig("per_token", "mxfp8"))
    with pytest.raises(ValueError, match="2 columns are no multiple of the block size 32"):
        fake_quantize(torch.zeros(1, 2), QConfig("per_block", "mxfp8"))
    with pytest.raises(ValueError, match="no such rounding"):
        fake_quantize(torch.zeros(1, 64), QConfig("per_group", "int4"))


def test_fake_quantization_is_a_loop_over_elements() -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 3, 128) * 5
    x[0, 1] = 0

    def loop(vector: torch.Tensor, qmax: int) -> list[float]:
        scale = max(float(vector.abs().max()) / qmax, 1e-8)
        return [round(float(v) / scale) * scale for v in vector]

    token = fake_quantize(x, QConfig("per_token", "int8"))
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(token[i, j], torch.tensor(loop(x[i, j], 127)))
    static = StaticInput(0.05, -30.0)
    made = fake_quantize(x, TENSOR, static)
    expected = [[[(max(-128, min(127, round(float(v) / 0.05) - 30)) + 30) * 0.05 for v in r] for r in p] for p in x]
    torch.testing.assert_close(made, torch.tensor(expected))
    assert fake_quantize(x, QConfig("per_tensor", "float")) is x


def test_static_tensors_are_msmodelslims() -> None:
    tensors = load_file(DATA)
    names = [n[len("golden.") : -len(".deq_scale")] for n in tensors if n.endswith(".deq_scale")]
    assert len(names) > 8
    rule = Rule(scale_floor=2.0**-23)
    for name in names:
        theirs = {k: tensors[f"golden.{name}.{k}"] for k in
                  ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset")}  # fmt: skip
        scheme = Scheme("w8a8", Pair(QConfig("per_token", "int8"), INT8), rule)
        layer = quantize(tensors[f"source.{name}.weight"], tensors[f"source.{name}.bias"], scheme)
        layer.static = StaticInput(float(theirs["input_scale"]), float(theirs["input_offset"]))
        scale, offset, deq, bias, cut = static_tensors(layer)
        assert torch.equal(layer.codes, theirs["weight"]), name
        assert torch.equal(scale, theirs["input_scale"]) and torch.equal(offset, theirs["input_offset"]), name
        assert deq.dtype == torch.float32 and torch.equal(deq, theirs["deq_scale"]), name
        assert bias.dtype == torch.int32 and torch.equal(bias, theirs["quant_bias"]), name
        assert cut == 0


def test_a_bias_beyond_int32_saturates_and_is_counted() -> None:
    codes = torch.tensor([[1, 2], [0, 0], [3, -3], [0, 0]], dtype=torch.int8)
    scales = torch.tensor([[1e-7], [1e-7], [1.0], [0.0]])
    scheme = Scheme("w8a8_static", Pair(TENSOR, INT8), Rule())
    layer = QuantizedLinear(scheme, codes, scales, torch.tensor([1e6, -1e6, 5.0, 0.0]), torch.float32, 0.0,
                            static=StaticInput(1e-3, 0.0))  # fmt: skip
    *_, bias, cut = static_tensors(layer)
    assert bias.tolist() == [2**31 - 1, -(2**31), 5000, 0] and cut == 2
    layer.bias = None
    *_, bias, cut = static_tensors(layer)
    assert bias.tolist() == [0, 0, 0, 0] and cut == 0
    layer.static = None
    with pytest.raises(ValueError, match="no static"):
        static_tensors(layer)
