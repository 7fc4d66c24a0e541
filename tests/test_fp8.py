"""FP8 weights: LightX2V's converter, the default arithmetic restated, one scale a matrix, inputs, simulation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods_kit import DTYPES, LIGHTX2V, MATCH_LIGHTX2V, PAIRS, edges, golden_weights, raw, scheme
from test_methods import hot_inputs
from torch import nn

from streamq.layers import FP16_SAFE, Block
from streamq.methods import fp8
from streamq.methods.activation import fake_quantize
from streamq.methods.floats import round_e4m3_
from streamq.methods.report import output_error
from streamq.methods.smooth import awq, exact, search_alpha
from streamq.quantized import Smooth
from streamq.simulate import put_in

if TYPE_CHECKING:
    from streamq.calibration.replay import Seen

# Every e4m3 number that is none of the NaNs, by code.
GRID = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
POSITIVE = GRID[:127]


@pytest.mark.parametrize("source", ["t2v_bf16", "i2v_fp32"])
def test_match_is_the_converters_bytes(source: str) -> None:
    floats, theirs = (
        golden_weights(f"lightx2v/source_{source}"),
        golden_weights(f"lightx2v/golden_{source}_fp8.safetensors"),
    )
    names = [name for name, tensor in theirs.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(names) >= 12
    for name in names:
        mine = fp8.quantize(floats[name], None, scheme("fp8", MATCH_LIGHTX2V))
        assert torch.equal(raw(mine.codes), raw(theirs[name])), name
        kept = theirs[name.replace(".weight", ".weight_scale")]
        assert torch.equal(raw(mine.scales.to(kept.dtype)), raw(kept)) and torch.equal(mine.scales, kept.float()), name


def slow_default(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m = w.float().abs().amax(1, keepdim=True).clamp(min=1e-5)
    s = (m / 448).bfloat16().float()
    return (w.float() / s).clamp(-448, 448).to(torch.float8_e4m3fn), s


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_is_a_cast_of_the_clamped_quotient(dtype: torch.dtype) -> None:
    w = edges(60, 160, dtype)
    mine = fp8.quantize(w, None, scheme("fp8", LIGHTX2V))
    codes, scales = slow_default(w)
    assert torch.equal(raw(mine.codes), raw(codes)) and torch.equal(mine.scales, scales)
    assert mine.codes.dtype == torch.float8_e4m3fn and (mine.scales > 0).all() and not mine.codes[0].float().any()
    assert 0.015 < mine.rel_error < 0.04


def slow_away(x: float) -> float:
    a = abs(x)
    if a == 0:
        return 0.0
    step = 2.0 ** (max(math.frexp(a)[1] - 1, -6) - 3)
    return math.copysign(math.floor(a / step + 0.5) * step, x) + 0.0


@settings(deadline=None, max_examples=300)
@given(st.lists(st.floats(-448, 448, width=16), min_size=1, max_size=40))
def test_halves_away_is_the_formula(values: list[float]) -> None:
    x = torch.tensor(values)
    mine = round_e4m3_(x.clone(), away=True).add_(0.0)
    assert torch.equal(raw(mine), raw(torch.tensor([slow_away(v) for v in values])))
    assert torch.equal(mine.to(torch.float8_e4m3fn).float(), mine)


def test_rounding_at_and_beside_every_half() -> None:
    low, high = POSITIVE[:-1], POSITIVE[1:]
    half = (low + high) / 2
    # Subnormal quotients below a half lose their last bit when 0.5 is added, as in the formula that is matched.
    below, above = torch.nextafter(half, low), torch.nextafter(half, high)
    for sign in (1, -1):
        x = torch.cat([half, below, above]) * sign
        even = round_e4m3_(x.clone())
        assert torch.equal(raw(even), raw(x.to(torch.float8_e4m3fn).float()))
        away = round_e4m3_(x.clone(), away=True)
        assert torch.equal(away[: len(half)], high * sign) and torch.equal(away[2 * len(half) :], high * sign)
        assert torch.equal(away[len(half) + 1 : 2 * len(half)], low[1:] * sign)
    assert torch.equal(round_e4m3_(GRID[:127].clone()), GRID[:127])
    assert torch.equal(round_e4m3_(torch.tensor([1e9, -1e9])), torch.tensor([448.0, -448.0]))
    assert round_e4m3_(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("rule", [LIGHTX2V, MATCH_LIGHTX2V])
def test_one_scale_for_the_matrix(rule: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamq.methods.int8.CPU_TILE_BYTES", 4 * 96 * 5)
    w = torch.randn(33, 96).bfloat16()
    assert rule in (LIGHTX2V, MATCH_LIGHTX2V)
    mine = fp8.quantize(w, None, scheme("fp8", LIGHTX2V if rule is LIGHTX2V else MATCH_LIGHTX2V, scope="per_tensor"))
    assert mine.scales.shape == (33, 1) and len(mine.scales.unique()) == 1
    flat = fp8.quantize(w.reshape(1, -1), None, scheme("fp8", LIGHTX2V if rule is LIGHTX2V else MATCH_LIGHTX2V))
    assert torch.equal(raw(mine.codes).flatten(), raw(flat.codes).flatten())
    assert torch.equal(mine.scales[:1], flat.scales)


@pytest.mark.parametrize("given", ["columns", "rows", "both"])
def test_smoothed_weights_are_those_of_the_product(given: str) -> None:
    w, bias = torch.randn(23, 48).bfloat16(), torch.randn(23).bfloat16()
    columns = torch.rand(48) * 5 + 0.1 if given != "rows" else None
    rows = torch.rand(23) * 3 + 0.1 if given != "columns" else None
    mine = fp8.quantize(w, bias, scheme("fp8", LIGHTX2V), columns=columns, rows=rows)
    product = w.float() * (1 if columns is None else columns)
    product = product / (1 if rows is None else rows.unsqueeze(1))
    codes, scales = slow_default(product)
    assert torch.equal(raw(mine.codes), raw(codes)) and torch.equal(mine.scales, scales)
    assert mine.smooth is columns and mine.rows is rows and mine.bias is not None
    assert torch.equal(mine.bias.float(), bias.float() if rows is None else bias.float() / rows)
    exact, restored = w.double(), mine.effective().double()
    assert mine.rel_error == pytest.approx(float((exact - restored).norm() / exact.norm()), rel=1e-4)


def test_a_float16_row_of_zeros_keeps_a_scale() -> None:
    """1e-5 / 448 is no float16 number: the peer divides by zero, and its row is NaN."""
    w = torch.randn(3, 64).half()
    w[1] = 0
    mine = fp8.quantize(w, None, scheme("fp8", MATCH_LIGHTX2V))
    assert mine.scales[1] == 2.0**-23 and not mine.codes[1].float().any() and torch.isfinite(mine.dequantize()).all()


def test_inputs_are_scaled_by_token() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 64) * 2.0 ** torch.randint(-9, 9, (2, 9, 1))
    x[0, 3] = 0
    fed = fake_quantize(x, PAIRS["fp8"].act)
    for i in range(2):
        for j in range(9):
            scale = max(float(x[i, j].abs().max() / 448), 1e-8)
            s = torch.tensor(scale)
            assert torch.equal(fed[i, j], (x[i, j] / s).to(torch.float8_e4m3fn).float() * s), (i, j)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_simulated_layer_is_the_product_of_codes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w, bias, columns = torch.randn(40, 64), torch.randn(40), torch.rand(64) + 0.5
    layer = fp8.quantize(w, bias, scheme("fp8", LIGHTX2V), columns=columns)
    block = nn.Sequential(nn.Linear(64, 40, dtype=dtype))
    put_in(block, "0", layer)
    x = torch.randn(3, 5, 64).to(dtype)
    fed = fake_quantize(x.float() / columns, PAIRS["fp8"].act).double()
    expected = fed @ layer.dequantize().double().T + bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(
        block(x).double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
    error, _ = output_error(x.reshape(-1, 64), w, layer, layer.scheme.pair.act)
    plain = x.double().reshape(-1, 64) @ w.double().T
    made = (expected - bias.double()).reshape(-1, 40)
    assert error == pytest.approx(float((made - plain).norm() / plain.norm()), rel=1e-3)


@pytest.mark.parametrize("method", ["search", "awq"])
def test_a_smoothing_search_is_judged_by_fp8_rounding(method: str) -> None:
    stats, _ = hot_inputs()
    weights = [torch.randn(40, 96), torch.randn(24, 96) * 3]
    layers = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k")
    wanted = scheme("fp8", LIGHTX2V)
    smooth = Smooth(method, 0.5, 1e-5, "blocks.0.attn1.qkv", layers, "layer", wanted)
    seen = SimpleNamespace(
        statistics={smooth.group: stats}, tensors={f"{name}.weight": w for name, w in zip(layers, weights, strict=True)}
    )
    found = Block(cast("Seen", seen)).vector(smooth)

    def kept(s: torch.Tensor) -> torch.Tensor:
        return exact(s.clamp(*FP16_SAFE))

    def rounding(w: torch.Tensor) -> torch.Tensor:
        codes, scales = slow_default(w)
        return codes.float() * scales

    search = search_alpha if method == "search" else awq
    expected = search(stats, weights, PAIRS["fp8"].act, rounding, settle=kept)
    assert expected.choice is not None and torch.equal(found, expected.s)
