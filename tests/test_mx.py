"""MX weights against msModelSlim's files, its formulas restated block by block, and what MindIE is given of them."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods_kit import DTYPES, MATCH_MINDIE, MINDIE, PAIRS, edges, golden_weights, raw, scheme
from torch import nn

from streamq.methods import mx
from streamq.methods.activation import fake_quantize
from streamq.methods.floats import e2m1_codes_signed, mx_exponents, powers, round_e2m1_away_
from streamq.methods.report import output_error
from streamq.pairs import QConfig
from streamq.quantized import QuantizedLinear, Rule
from streamq.simulate import put_in

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
KINDS = {"w8a8_mxfp8": "mxfp8", "w4a4_mxfp4": "mxfp4"}


def made(
    weight: torch.Tensor, kind: str, method: str = "minmax", rule: Rule = MINDIE, **ext: object
) -> QuantizedLinear:
    return mx.quantize(weight, None, scheme(kind, rule, method, **ext))


# --- the formulas, element by element, in plain Python but for what is rounded to the arithmetic's dtype ---


def r(x: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float32).to(dtype).float()


def log2(x: torch.Tensor, dtype: torch.dtype) -> float:
    return float(r(torch.log2(x), dtype))


def slow_mxfp8(x: float) -> float:
    if x == 0:
        return 0.0
    p = max(math.frexp(abs(x))[1] - 1, -6)
    q = math.floor(float(torch.tensor(abs(x) / 2**p * 8) + 0.5)) / 8 * 2**p
    return math.copysign(min(q, 448.0), x)


def slow_mxfp4(x: float) -> float:
    if x == 0:
        return 0.0
    y = torch.tensor(abs(x), dtype=torch.float32)
    p = min(max(math.floor(float(torch.log2(y + 9.6e-7))), 0), 2)
    v = min(math.floor(float(y / 2**p * 2 + 0.5)) / 2 * 2**p, 6.0)
    return math.copysign(v, x)


def slow_elements(block: torch.Tensor, e: int, kind: str) -> torch.Tensor:
    element = slow_mxfp8 if kind == "mxfp8" else slow_mxfp4
    return torch.tensor([element(float(b) / 2.0**e) for b in block])


def slow_exponent(block: torch.Tensor, kind: str, dtype: torch.dtype, c: float | None = None) -> int:
    m = block.abs().max()
    if kind == "mxfp8":
        found = log2(m if m > 0 else r(2.0**-126, dtype), dtype)
        return -127 if found == -math.inf else max(math.floor(found) - 8, -127)
    if c is None:
        return min(math.floor(log2(r(r(m / 0.875, dtype) + 9.6e-7, dtype), dtype)) - 2, 125)
    return min(math.ceil(log2(r(r(m / c, dtype) + 9.6e-7, dtype), dtype)), 125)


def slow_squares(block: torch.Tensor, e: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    restored = r(slow_elements(block, e, kind) * 2.0**e, dtype)
    return r(r(block - restored, dtype) ** 2, dtype)


def slow_mse_round(block: torch.Tensor, dtype: torch.dtype) -> int:
    m = block.abs().max()
    found = log2(m if m > 0 else r(2.0**-126, dtype), dtype)
    if found == -math.inf:
        return -127
    down, up = (max(part(found) - 8, -127) for part in (math.floor, math.ceil))
    lost = [float(r(slow_squares(block, e, "mxfp8", dtype).mean(), dtype)) for e in (down, up)]
    return up if lost[1] < lost[0] else down


def slow_search(w: torch.Tensor, dtype: torch.dtype, grid: list[float]) -> float:
    best, chosen = math.inf, grid[0]
    for c in grid:
        blocks = w.reshape(-1, 32)
        squares = [slow_squares(b, slow_exponent(b, "mxfp4", dtype, c), "mxfp4", dtype).double().sum() for b in blocks]
        mean = float(r(float(sum(squares)) / w.numel(), dtype))
        if mean < best:
            best, chosen = mean, c
    return chosen


def check(layer: QuantizedLinear, exponents: list[int], w: torch.Tensor, kind: str) -> None:
    """Codes and scales are those of these exponents, signed zeros too."""
    assert layer.scales.log2().flatten().tolist() == exponents
    expected = torch.stack([slow_elements(b, e, kind) for b, e in zip(w.reshape(-1, 32), exponents, strict=True)])
    expected = expected.reshape(w.shape)
    if kind == "mxfp8":
        assert torch.equal(raw(layer.codes), raw(expected.to(torch.float8_e4m3fn)))
    else:
        table = torch.tensor([E2M1.index(float(v)) for v in expected.abs().flatten()]).reshape(w.shape)
        assert torch.equal(layer.codes.long(), table + 8 * torch.signbit(expected).long())


# --- files ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_golden_files_come_out_byte_for_byte(kind: str) -> None:
    source, theirs = golden_weights("mindie/t2v_fp32"), golden_weights(f"mindie/{kind}")
    names = [name for name, tensor in theirs.items() if name.endswith(".weight")]
    assert len(names) == (20 if kind == "w8a8_mxfp8" else 18)
    for name in names:
        layer = made(source[name], kind)
        codes = layer.codes.to(torch.uint8) if kind == "w4a4_mxfp4" else layer.codes
        stored = codes[:, ::2] | codes[:, 1::2] << 4 if kind == "w4a4_mxfp4" else codes
        assert torch.equal(raw(stored), raw(theirs[name])), name
        assert torch.equal(mx.exponents(layer.scales), theirs[f"{name}_scale"]), name


# --- formulas ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_the_formula(kind: str, matched: bool, dtype: torch.dtype) -> None:
    w = edges(22, 96, dtype)
    kept = dtype if matched else torch.float32
    layer = made(w, kind, rule=MATCH_MINDIE if matched else MINDIE)
    check(layer, [slow_exponent(b, KINDS[kind], kept) for b in w.float().reshape(-1, 32)], w.float(), KINDS[kind])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matched", [False, True])
def test_mse_round_is_the_formula(matched: bool, dtype: torch.dtype) -> None:
    w = edges(30, 64, dtype)
    kept = dtype if matched else torch.float32
    layer = made(w, "w8a8_mxfp8", "mse_round", MATCH_MINDIE if matched else MINDIE)
    exponents = [slow_mse_round(b, kept) for b in w.float().reshape(-1, 32)]
    check(layer, exponents, w.float(), "mxfp8")
    plain = made(w, "w8a8_mxfp8")
    changed = layer.scales != plain.scales
    assert changed.any() and torch.equal(layer.scales[changed], 2 * plain.scales[changed])
    assert matched or layer.rel_error <= plain.rel_error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("c", [6.0, 7.25, 9.1])
def test_ceil_x_is_the_formula(c: float, matched: bool, dtype: torch.dtype) -> None:
    w = edges(22, 64, dtype)
    kept = dtype if matched else torch.float32
    layer = made(w, "w4a4_mxfp4", "ceil_x", MATCH_MINDIE if matched else MINDIE, ceil_x_value=c)
    check(layer, [slow_exponent(b, "mxfp4", kept, c) for b in w.float().reshape(-1, 32)], w.float(), "mxfp4")
    if c == 7.25:
        default = made(w, "w4a4_mxfp4", "ceil_x", MATCH_MINDIE if matched else MINDIE)
        assert torch.equal(layer.codes, default.codes) and torch.equal(layer.scales, default.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_a_search_finds_the_c_of_least_error(spread: float, matched: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(int(spread * 10))
    w = (torch.randn(10, 64).sign() * torch.randn(10, 64).abs().pow(spread) * 0.05).to(dtype)
    kept = dtype if matched else torch.float32
    ext = {"search_min": 6.0, "search_max": 11.5, "search_step": 0.5}
    c = slow_search(w.float(), kept, [6 + i * 0.5 for i in range(12)])
    layer = made(w, "w4a4_mxfp4", "ceil_x", MATCH_MINDIE if matched else MINDIE, enable_search=True, **ext)
    check(layer, [slow_exponent(b, "mxfp4", kept, c) for b in w.float().reshape(-1, 32)], w.float(), "mxfp4")


def test_a_search_without_bounds_goes_from_6_to_12_in_quarters() -> None:
    torch.manual_seed(0)
    w = torch.randn(60, 128)
    found = made(w, "w4a4_mxfp4", "ceil_x", enable_search=True)
    tried = {i / 4: made(w, "w4a4_mxfp4", "ceil_x", ceil_x_value=i / 4) for i in range(24, 49)}
    errors = {c: float((one.dequantize() - w).double().square().mean().float()) for c, one in tried.items()}
    best = min(errors, key=errors.__getitem__)  # the first of equals
    assert torch.equal(found.scales, tried[best].scales) and torch.equal(found.codes, tried[best].codes)
    assert len(set(errors.values())) > 5 and found.rel_error < made(w, "w4a4_mxfp4").rel_error


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_arithmetic_is_that_of_a_weight_cast_first(kind: str) -> None:
    w, bias = edges(40, 96), torch.randn(40)
    method = "mse_round" if kind == "w8a8_mxfp8" else "ceil_x"
    mine = mx.quantize(w, bias, scheme(kind, Rule(arithmetic="bf16"), method))
    theirs = made(w.bfloat16(), kind, method, Rule(arithmetic="source"))
    assert torch.equal(raw(mine.codes), raw(theirs.codes)) and torch.equal(mine.scales, theirs.scales)
    assert mine.bias is not None and mine.bias.dtype == torch.bfloat16
    exact, restored = w.double(), mine.dequantize().double()
    assert mine.rel_error == pytest.approx(float((exact - restored).norm() / exact.norm()), rel=1e-4)


def test_bf16_logarithms_do_differ() -> None:
    """In bf16 the logarithm itself rounds up to the next whole number, just below a power of two."""
    w = torch.full((1, 32), 0.0078).bfloat16()
    w[0, 0] = 0.99609375 * 2.0**-6
    assert mx_exponents(w.float().amax().reshape(1), "mxfp8").item() == -15
    assert made(w, "w8a8_mxfp8", rule=MATCH_MINDIE).scales.item() == 2.0**-14 != made(w, "w8a8_mxfp8").scales.item()


# --- parts ---


def test_e2m1_rounding_and_codes_at_and_beside_every_half() -> None:
    for sign in (1.0, -1.0):
        for low, high in zip(E2M1[:-1], E2M1[1:], strict=True):
            half = torch.tensor((low + high) / 2)
            # Below 0.25 the last bit is lost when 0.5 is added, as in the formula.
            below = half - 2.0**-21
            got = round_e2m1_away_(torch.stack([half, below, torch.nextafter(half, torch.tensor(9.0))]) * sign)
            assert got.tolist() == [high * sign, low * sign, high * sign], (low, high)
    values = torch.tensor([*E2M1, *(-v for v in E2M1)])
    assert e2m1_codes_signed(values).tolist() == list(range(16))
    assert round_e2m1_away_(torch.tensor([7.9, -1e9])).tolist() == [6.0, -6.0]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40))
def test_e2m1_rounding_is_the_formula(values: list[float]) -> None:
    mine = round_e2m1_away_(torch.tensor(values).add_(0.0))  # no -0
    assert torch.equal(raw(mine), raw(torch.tensor([slow_mxfp4(v) for v in values])))


def test_powers_and_stored_exponents_are_exact() -> None:
    e = torch.arange(-127.0, 128.0)
    expected = torch.tensor([2.0 ** int(i) for i in e], dtype=torch.float64)
    assert torch.equal(powers(e).double(), expected)
    assert torch.equal(mx.exponents(powers(e)).int(), e.int() + 127)
    assert powers(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_blocks_and_the_least_exponent(kind: str) -> None:
    w = torch.zeros(2, 64)
    w[1, :32] = 1e-38
    w[1, 32] = -1e-43
    layer = made(w, kind)
    stored = mx.exponents(layer.scales)
    if kind == "w8a8_mxfp8":
        assert stored.flatten().tolist() == [0, 0, 0, 0] and layer.scales[0, 0] == 2.0**-127
        assert layer.codes.view(torch.uint8)[1, 32] == 0x80  # rounds to zero and stays negative
        torch.testing.assert_close(layer.dequantize()[1, :32], w[1, :32], rtol=0.07, atol=0)
    else:
        assert stored.flatten().tolist() == [127 - 22] * 4 and layer.codes[1, 32] == 8 and not layer.codes[0].any()
    assert layer.codes.view(torch.uint8)[0].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_shows(kind: str, bad: float) -> None:
    w = torch.randn(3, 96)
    w[1, 40] = bad
    methods = ["minmax", "mse_round"] if kind == "w8a8_mxfp8" else ["minmax", "ceil_x"]
    for method, rule in product(methods, (MINDIE, MATCH_MINDIE)):
        scales = made(w, kind, method, rule).scales
        assert scales.isnan().tolist() == [[False] * 3, [False, True, False], [False] * 3], method
    if kind == "w4a4_mxfp4":
        assert made(w, kind, "ceil_x", enable_search=True).scales.isnan().sum() == 1


def test_what_the_type_does_not_have_is_refused() -> None:
    for kind, method in (("w8a8_mxfp8", "ceil_x"), ("w4a4_mxfp4", "mse_round"), ("w8a8_mxfp8", "gptq")):
        with pytest.raises(ValueError, match=f"{KINDS[kind]} weight method '{method}'"):
            made(torch.ones(2, 32), kind, method)
    with pytest.raises(ValueError, match="40 columns: no multiple of the block size 32"):
        made(torch.ones(2, 40), "w8a8_mxfp8")
    with pytest.raises(AssertionError, match="no smoothing"):
        mx.quantize(torch.ones(2, 32), None, scheme("w8a8_mxfp8", MINDIE), rows=torch.ones(2))


# --- inputs and outputs ---


@pytest.mark.parametrize("kind", KINDS.values())
def test_inputs_are_rounded_block_by_block(kind: str) -> None:
    x = edges(12, 96).reshape(2, 6, 96)
    fed = fake_quantize(x, QConfig("per_block", kind))
    for row, got in zip(x.reshape(-1, 32), fed.reshape(-1, 32), strict=True):
        e = slow_exponent(row, kind, torch.float32)
        assert torch.equal(got, slow_elements(row, e, kind) * 2.0**e)
    assert fed.shape == x.shape and fed.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_simulated_layer_rounds_its_input_and_multiplies(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w, bias, x = torch.randn(40, 64), torch.randn(40), torch.randn(3, 5, 64).to(dtype)
    layer = mx.quantize(w, bias, scheme(kind, MINDIE))
    block = nn.Sequential(nn.Linear(64, 40, dtype=dtype))
    put_in(block, "0", layer)
    act = PAIRS[kind].act
    expected = fake_quantize(x.float(), act).double() @ layer.dequantize().double().T + bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(
        block(x).double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
    plain = x.double() @ w.double().T
    error, _ = output_error(x.reshape(-1, 64), w, layer, act)
    assert error == pytest.approx(float((expected - bias.double() - plain).norm() / plain.norm()), rel=1e-3)
    assert error < (0.08 if kind == "w8a8_mxfp8" else 0.25)
