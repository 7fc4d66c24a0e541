"""Smoothing vectors, int8 with smoothing, static ranges and GPTQ, and the errors that are reported of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods_kit import EVERY, PAIRS, edges, raw
from methods_kit import scheme as scheme_of

from streamq.methods import METHODS, RANGED, int8
from streamq.methods import smooth as smoothing
from streamq.methods.activation import fake_quantize, static_input
from streamq.methods.report import compare, output_error
from streamq.methods.smooth import awq, exact, exact_for_norm, search_alpha, smoothquant
from streamq.methods.statistics import InputStatistics, Wanted
from streamq.pairs import Pair, QConfig
from streamq.quantized import Rule, Scheme

CPU = torch.device("cpu")
TOKEN, TENSOR = QConfig("per_token", "int8"), QConfig("per_tensor", "int8", symmetric=False)
CHANNEL = QConfig("per_channel", "int8")
PLAIN = Scheme("w8a8", Pair(TOKEN, CHANNEL), Rule(scale_floor=2.0**-23))
RULES = [Rule(scale_floor=2.0**-23), Rule(1e-5, 0.0, "BF16", -127), Rule(arithmetic="source"),
         Rule(arithmetic="bf16")]  # fmt: skip


def scheme(act: QConfig = TOKEN, weight: QConfig = CHANNEL, rule: Rule = RULES[0]) -> Scheme:
    return Scheme("w8a8", Pair(act, weight), rule)


def hot_inputs(
    width: int = 96, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[InputStatistics, torch.Tensor]:
    """Statistics over 4 samples with hot channels, correlated; and all rows."""
    torch.manual_seed(seed)
    mix = torch.randn(width, width) / width**0.5 + torch.eye(width)
    scale = torch.ones(width)
    scale[::9] = torch.linspace(8, 40, len(scale[::9]))
    xs = [((torch.randn(60, width) @ mix) * scale + 0.2).to(dtype) for _ in range(4)]
    stats = InputStatistics(width, Wanted(mean=True, histogram=True, gram=True, rows=120), 4, CPU)
    for x in xs:
        stats.update(x.unsqueeze(0))
    return stats, torch.cat(xs)


def rounded(w: torch.Tensor) -> torch.Tensor:
    scale = w.abs().amax(1, keepdim=True) / 127
    return (w / scale).round() * scale


# --- smoothing vectors ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_smoothquant_is_the_formula_channel_by_channel(alpha: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(7, 10).to(dtype) * 0.1, torch.randn(5, 10).to(dtype) * 0.1]
    x = torch.rand(10) * 20
    weights[0][:, 3] = weights[1][:, 3] = 0
    x[4] = 0
    s = smoothquant(x, weights, alpha, 0.02)
    for j in range(10):
        w = max(max(abs(float(v)) for m in weights for v in m[:, j]), 1e-5)
        expected = 1.0 if j == 4 else max(float(x[j]) ** alpha / w ** (1 - alpha), 0.02)
        assert float(s[j]) == pytest.approx(expected, rel=1e-5), j
    assert s.dtype == torch.float32


@settings(deadline=None)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=4, max_size=4), st.floats(0, 1),
       st.lists(st.floats(0, 2.0**100, width=32), min_size=4, max_size=4))  # fmt: skip
def test_smoothquant_is_never_zero_nor_infinite(x: list[float], alpha: float, w: list[float]) -> None:
    s = smoothquant(torch.tensor(x), [torch.tensor([w])], alpha)
    assert torch.isfinite(s).all() and (s > 0).all()
    settled = exact(s)
    assert torch.isfinite(settled).all() and (settled > 0).all() and torch.isfinite(1 / settled).all()


def slow_loss(
    rows: torch.Tensor, weights: list[torch.Tensor], s: torch.Tensor, act: QConfig, stats: InputStatistics
) -> float:
    static = static_input(stats, act, s) if act.scope == "per_tensor" else None
    fed = fake_quantize(rows.float() / s, act, static)
    return sum(
        float((fed.double() @ rounded(w.float() * s).double().T - rows.double() @ w.double().T).square().sum())
        for w in weights
    )


@pytest.mark.parametrize("act", [TOKEN, TENSOR])
@pytest.mark.parametrize("kind", ["search", "awq"])
def test_searches_find_the_least_loss_of_their_grids(act: QConfig, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "TILE_BYTES", 4 * 96 * 11)  # several tiles
    stats, _ = hot_inputs()
    weights = [torch.randn(40, 96), torch.randn(24, 96) * 3]
    if kind == "search":
        found = search_alpha(stats, weights, act, rounded)
        cooled = stats.amax.maximum(stats.amax.mean())
        grid = [(i / 20, smoothquant(cooled, weights, i / 20)) for i in range(21)]
    else:
        found = awq(stats, weights, act, rounded)
        grid = []
        for i in range(20):
            s = stats.mean.pow(i / 20).clamp(min=1e-4)
            grid.append((i / 20, s / (s.max() * s.min()).sqrt()))
    losses = [slow_loss(stats.rows, weights, s, act, stats) for _, s in grid]
    norm = sum(float((stats.rows.double() @ w.double().T).square().sum()) for w in weights)
    plain = slow_loss(stats.rows, weights, torch.ones(96), act, stats)
    assert found.plain == pytest.approx(plain / norm, rel=1e-3)
    assert found.error == pytest.approx(min(losses) / norm, rel=1e-3) and found.error < 0.7 * found.plain
    best = min(range(len(grid)), key=losses.__getitem__)
    assert found.choice == grid[best][0] and torch.allclose(found.s, grid[best][1])


def test_a_search_keeps_ones_where_nothing_helps_and_wants_rows() -> None:
    stats, _ = hot_inputs()
    found = search_alpha(stats, [torch.randn(8, 96)], QConfig("per_tensor", "float"), lambda w: w)
    assert found.choice is None and torch.equal(found.s, torch.ones(96))
    bare = InputStatistics(96, Wanted(), 1, CPU)
    bare.update(torch.randn(3, 96))
    with pytest.raises(ValueError, match="rows"):
        search_alpha(bare, [torch.randn(8, 96)], TOKEN, rounded)


def test_dead_channels_get_one_everywhere() -> None:
    torch.manual_seed(0)
    stats = InputStatistics(8, Wanted(mean=True, rows=30), 1, CPU)
    x = torch.randn(30, 8) * torch.tensor([50.0, 1, 1, 1, 1, 1, 1, 1])
    x[:, [2, 5]] = 0
    stats.update(x)
    for found in (
        search_alpha(stats, [torch.randn(6, 8)], TOKEN, rounded),
        awq(stats, [torch.randn(6, 8)], TOKEN, rounded),
    ):
        assert found.choice is not None and found.s[[2, 5]].tolist() == [1.0, 1.0] and torch.isfinite(found.s).all()


def test_settled_vectors_are_what_is_judged_and_returned() -> None:
    stats, _ = hot_inputs()
    found = search_alpha(stats, [torch.randn(40, 96)], TOKEN, rounded, settle=exact)
    assert found.choice is not None and torch.equal(found.s, exact(found.s))


def test_exact_reciprocals_are_bf16_for_every_mantissa() -> None:
    m = torch.arange(128, 256).float()
    every = torch.cat([m * 2.0**e for e in (-60, -7, 0, 7, 60)])
    s = exact(1 / every)
    assert torch.equal((1 / s).bfloat16().float(), every)
    torch.testing.assert_close(1 / s, every, rtol=2.0**-23, atol=0)
    assert torch.equal(exact(s), s)
    torch.manual_seed(0)
    rough = torch.rand(10_000) * 100 + 1e-3
    made = exact(rough)
    inverse = 1 / made
    torch.testing.assert_close(inverse, inverse.bfloat16().float(), rtol=2.0**-23, atol=0)
    assert float((made / rough - 1).abs().max()) <= 2.0**-8
    wild = exact(torch.tensor([0.0, 1e-45, 3e38, float("inf")]))
    assert torch.isfinite(wild).all() and (wild > 0).all() and (1 / wild > 0).all()


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 10_000))
def test_folding_into_a_norm_loses_nothing(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-30, 12, (64,), generator=generator)
    w = (torch.randn(64, generator=generator) * 2.0**exponents).to(dtype)
    s = torch.rand(64, generator=generator) * 2.0 ** torch.randint(-25, 25, (64,), generator=generator) + 1e-9
    made = exact_for_norm(s, w)
    assert torch.isfinite(made).all() and (made > 0).all() and made.dtype == torch.float32
    stored = (w.float() / made).to(dtype)
    assert torch.isfinite(stored).all() and torch.equal(stored == 0, w == 0)
    if dtype == torch.float32:
        assert torch.equal(made, s)
        return
    # What the norm now gives is w / made, to fp32's last bits, and made is s but for one rounding of the fold.
    torch.testing.assert_close(stored.float() * made, w.float(), rtol=2.0**-22, atol=0)
    wanted = (w.float() / s).to(dtype)
    fine = torch.isfinite(wanted) & (wanted != 0)
    assert torch.equal(stored[fine], wanted[fine]) and torch.equal(
        made[~fine & (w != 0)], torch.ones_like(s)[~fine & (w != 0)]
    )


# --- int8 ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["columns", "rows", "both"])
@pytest.mark.parametrize("scope", ["per_channel", "per_tensor"])
def test_smoothed_weights_are_those_of_the_product(
    rule: Rule, dtype: torch.dtype, given: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "CPU_TILE_BYTES", 4 * 48 * 5)
    torch.manual_seed(0)
    w, bias = torch.randn(23, 48).to(dtype), torch.randn(23).to(dtype)
    columns = torch.rand(48) * 5 + 0.1 if given != "rows" else None
    rows = torch.rand(23) * 3 + 0.1 if given != "columns" else None
    weight = QConfig(scope, "int8")
    made = int8.quantize(w, bias, scheme(TOKEN, weight, rule), columns=columns, rows=rows)
    product = w.float() * (1 if columns is None else columns)
    product = product / (1 if rows is None else rows.unsqueeze(1))
    alone = int8.quantize(product, None, scheme(TOKEN, weight, replace(rule, arithmetic="fp32")))
    assert torch.equal(made.codes, alone.codes) and torch.equal(made.scales, alone.scales)
    assert made.smooth is columns and made.rows is rows
    kept = bias.bfloat16() if rule.arithmetic == "bf16" else bias
    assert made.bias is not None
    if rows is None:
        assert made.bias.dtype == kept.dtype and torch.equal(made.bias, kept)
    else:
        assert made.bias.dtype == torch.float32 and torch.equal(made.bias, kept.float() / rows)
    rel_error, cosine = compare(w.double(), made.effective().double())
    assert made.rel_error == pytest.approx(rel_error, rel=1e-4)
    assert 1 - made.cosine == pytest.approx(1 - cosine, rel=0.02, abs=2e-7)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_errors_are_those_of_the_source(rule: Rule, dtype: torch.dtype, method: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(30, 64).to(dtype)
    made = int8.quantize(w, None, scheme(TOKEN, QConfig("per_channel", "int8", method=method), rule))
    reference, restored = w.double(), made.dequantize().double()
    assert made.rel_error == pytest.approx(float((reference - restored).norm() / reference.norm()), rel=1e-4)
    cosine = float((reference * restored).sum() / reference.norm() / restored.norm())
    assert made.cosine == pytest.approx(cosine, abs=2e-7) and made.cosine < 0.99999
    assert made.smooth is made.rows is made.static is None


def test_huge_and_zero_weights_have_finite_errors() -> None:
    torch.manual_seed(0)
    ones = torch.full((40,), 2.0)
    huge = int8.quantize(torch.randn(8, 40) * 1e30, None, PLAIN, columns=ones)
    assert 0.001 < huge.rel_error < 0.02 and 0.999 < huge.cosine < 1
    zero = int8.quantize(torch.zeros(4, 40), None, PLAIN, columns=ones)
    assert (zero.rel_error, zero.cosine) == (0.0, 1.0)
    bad = torch.randn(4, 40)
    bad[2, 3] = float("nan")
    assert not torch.isfinite(int8.quantize(bad, None, PLAIN, columns=ones).scales[2])


def test_static_layers_carry_their_inputs_range() -> None:
    stats, _ = hot_inputs()
    w, s = torch.randn(10, 96), torch.rand(96) + 0.5
    config = scheme(TENSOR)
    assert METHODS["w8a8_static"](w, None, config, stats=stats).static == static_input(stats, TENSOR)
    assert int8.quantize(w, None, config, columns=s, stats=stats).static == static_input(stats, TENSOR, s)
    with pytest.raises(ValueError, match="statistics"):
        int8.quantize(w, None, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("scope", ["per_channel", "per_tensor"])
def test_gptq_lowers_the_output_error_with_the_same_scales(dtype: torch.dtype, smoothed: bool, scope: str) -> None:
    stats, x = hot_inputs(dtype=dtype)
    w = torch.randn(32, 96).to(dtype)
    columns = smoothquant(stats.amax, [w], 0.6) if smoothed else None
    rows = torch.rand(32) + 0.5 if smoothed else None
    made = [int8.quantize(w, None, scheme(TOKEN, QConfig(scope, "int8", method=method)), columns=columns, rows=rows,
                          stats=stats) for method in ("minmax", "gptq")]  # fmt: skip
    assert torch.equal(made[0].scales, made[1].scales) and not torch.equal(made[0].codes, made[1].codes)
    lost = [float(((one.effective() - w.float()) @ x.float().T).norm()) for one in made]
    assert lost[1] < 0.85 * lost[0]
    assert made[1].rel_error == pytest.approx(compare(w, made[1].effective())[0], rel=1e-4)
    assert made[1].rel_error > made[0].rel_error  # not nearest any more


def test_gptq_reads_its_options_and_says_when_it_cannot() -> None:
    stats, _ = hot_inputs()
    w = torch.randn(32, 96)

    def made(**ext: object) -> torch.Tensor:
        config = QConfig("per_channel", "int8", method="gptq", ext=tuple(ext.items()))
        return int8.quantize(w, None, scheme(TOKEN, config), stats=stats).codes

    assert not torch.equal(made(), made(act_order=False)) and not torch.equal(made(), made(damping=0.5))
    assert torch.equal(made(), made(act_order=True, damping=0.01, block=128))
    mse = int8.quantize(w, None, scheme(TOKEN, QConfig("per_channel", "int8", method="mse")))
    gptq_mse = QConfig("per_channel", "int8", method="gptq", ext=(("scales", "mse"),))
    assert torch.equal(int8.quantize(w, None, scheme(TOKEN, gptq_mse), stats=stats).scales, mse.scales)
    plain = int8.quantize(w, None, PLAIN).codes
    assert stats.gram is not None
    stats.gram = torch.eye(96) - 1e7 * (torch.ones(96, 96) - torch.eye(96))
    with pytest.warns(RuntimeWarning, match="no factorization"):
        assert torch.equal(made(), plain)
    stats.gram = None
    with pytest.raises(ValueError, match="Gram"):
        made()


# --- what the output loses ---


@pytest.mark.parametrize("act", [TOKEN, TENSOR])
def test_output_error_is_that_of_the_whole_product(act: QConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stats, x = hot_inputs()
    w = torch.randn(33, 96)
    s, rows = smoothquant(stats.amax, [w], 0.5), torch.rand(33) + 0.5
    layer = int8.quantize(w, torch.randn(33), scheme(act), columns=s, rows=rows, stats=stats)
    monkeypatch.setattr("streamq.methods.report.TILE_BYTES", 4 * 96 * 7)
    rel_error, cosine = output_error(x, w, layer, act)
    y, made = (
        x.double() @ w.double().T,
        fake_quantize(x / s, act, layer.static).double() @ layer.dequantize().double().T,
    )
    made *= rows.double()
    assert rel_error == pytest.approx(float((made - y).norm() / y.norm()), rel=1e-4)
    assert cosine == pytest.approx(float((made * y).sum() / made.norm() / y.norm()), abs=1e-6)
    floating = QConfig("per_tensor", "float", method="none")
    assert output_error(x, w, layer, floating)[0] < rel_error < 0.05


def test_smoothing_lowers_the_error_of_static_hot_inputs() -> None:
    stats, x = hot_inputs()
    w = torch.randn(64, 96)
    errors = {}
    found = search_alpha(stats, [w], TENSOR, rounded, settle=exact)
    for name, s in (("plain", None), ("smooth", found.s)):
        layer = int8.quantize(w, None, scheme(TENSOR), columns=s, stats=stats)
        errors[name] = output_error(x, w, layer, TENSOR)[0]
    assert errors["smooth"] < 0.5 * errors["plain"]


def test_compare_of_zeros_and_opposites() -> None:
    a = torch.tensor([3.0, 4.0])
    assert compare(a, a) == (0.0, 1.0) and compare(a, -a) == (2.0, -1.0)
    assert compare(torch.zeros(2), torch.zeros(2)) == (0.0, 1.0)
    assert compare(a, torch.zeros(2)) == (1.0, 0.0) and compare(torch.zeros(2), a)[1] == 0.0
    rel_error, cosine = compare(a, torch.tensor([4.0, -3.0]))
    assert rel_error == pytest.approx(2**0.5) and cosine == pytest.approx(0, abs=1e-7)


# --- every type ---

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize(("kind", "rule", "method", "ext"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_do_not_depend_on_the_tile(
    kind: str, rule: Rule, method: str, ext: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, wanted = edges(53, 96 if "convrot" not in ext else 80, dtype), scheme_of(kind, rule, method, **ext)
    if "convrot" not in ext and PAIRS[kind].weight.scope != "per_block":
        w = w[:, :83].contiguous()  # the last vector of a row is not whole
    given, kept = torch.full(w.shape, 77, dtype=torch.int8), w.clone()
    whole = METHODS[kind](w, None, wanted, given)
    assert whole.codes.data_ptr() == given.data_ptr() and whole.codes.shape == w.shape
    assert whole.codes.dtype == (torch.float8_e4m3fn if kind in ("fp8", "w8a8_mxfp8") else torch.int8)
    assert whole.scales.dtype == torch.float32 and len(whole.scales) == 53 and torch.isfinite(whole.scales).all()
    for rows in (1, 2, 7, 52):
        monkeypatch.setattr(int8, "CPU_TILE_BYTES", 4 * w.shape[1] * rows)
        part = METHODS[kind](w, None, wanted)
        assert torch.equal(raw(part.codes), raw(whole.codes)) and torch.equal(raw(part.scales), raw(whole.scales))
        if whole.zeros is not None and part.zeros is not None:
            assert torch.equal(raw(part.zeros), raw(whole.zeros))
        assert (part.rel_error, part.cosine) == (whole.rel_error, whole.cosine)
    assert torch.equal(raw(w), raw(kept))
    rel_error, cosine = compare(w.double(), whole.effective().double())
    assert whole.rel_error == pytest.approx(rel_error, rel=1e-3) and whole.cosine == pytest.approx(cosine, abs=1e-6)
    assert 0 < whole.rel_error < 0.3 and (whole.zeros is not None) == (kind == "q4_0")


@pytest.mark.parametrize(("kind", "rule", "method", "ext"), EVERY)
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_shows_in_a_scale(
    kind: str, rule: Rule, method: str, ext: dict[str, object], bad: float
) -> None:
    torch.manual_seed(0)
    w = torch.randn(5, 64)
    w[3, 40] = bad
    layer = METHODS[kind](w, None, scheme_of(kind, rule, method, **ext))
    assert layer.scales.isfinite().all(dim=1).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize(("kind", "rule", "method", "ext"), EVERY)
def test_matrices_of_zeros_and_beyond_the_squares_of_fp32(
    kind: str, rule: Rule, method: str, ext: dict[str, object]
) -> None:
    wanted = scheme_of(kind, rule, method, **ext)
    zero = METHODS[kind](torch.zeros(3, 64), torch.zeros(3), wanted)
    assert (zero.rel_error, zero.cosine) == (0.0, 1.0) and not zero.dequantize().any()
    if kind not in ("q8_0", "q4_0"):  # whose scales end with fp16
        torch.manual_seed(0)
        huge = METHODS[kind](torch.randn(4, 64) * 2.0**100, None, wanted)
        assert 0.001 < huge.rel_error < 0.3 and 0.95 < huge.cosine < 1


@pytest.mark.parametrize("kind", list(PAIRS))
def test_output_error_is_that_of_every_types_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamq.methods.report.TILE_BYTES", 4 * 96 * 7)
    _, x = hot_inputs()
    w = torch.randn(33, 96)
    layer = METHODS[kind](w, torch.randn(33), scheme_of(kind, RULES[0]))
    act = PAIRS[kind].act
    y = x.double() @ w.double().T
    made = fake_quantize(x, act).double() @ layer.dequantize().double().T
    error, cosine = output_error(x, w, layer, act)
    assert error == pytest.approx(float((made - y).norm() / y.norm()), rel=1e-3)
    assert cosine == pytest.approx(float((made * y).sum() / made.norm() / y.norm()), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(), (11,)], ids=["finite", "with NaN and Inf"])
def test_schemes_that_share_row_ranges_find_what_each_finds_alone(
    dtype: torch.dtype, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamq.methods.int8.CPU_TILE_BYTES", 4 * 128 * 7)  # 40 rows: six tiles, the last one short
    weight = edges(dtype=dtype)
    for row in rows:
        weight[row, 3], weight[row + 1, 5] = float("nan"), float("inf")
    ranges = int8.RowRanges(weight)
    for kind, rule, method, ext in EVERY:
        if kind not in RANGED:
            continue
        wanted = scheme_of(kind, rule, method, **ext)
        alone, shared = METHODS[kind](weight, None, wanted), METHODS[kind](weight, None, wanted, ranges=ranges)
        sound = alone.scales.squeeze(1).isfinite()  # the others end the run
        assert torch.equal(sound, shared.scales.squeeze(1).isfinite()) and int((~sound).sum()) == 2 * len(rows)
        for a, b in ((alone.codes, shared.codes), (alone.scales, shared.scales)):
            assert torch.equal(raw(a[sound]), raw(b[sound])), (kind, rule)
        assert repr((alone.rel_error, alone.cosine)) == repr((shared.rel_error, shared.cosine)), (kind, rule)
