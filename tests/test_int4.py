"""w4a16: stored bf16 scales and zeros, the range search, GPTQ on it, and groups that are no groups."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from streamq.methods import int4
from streamq.methods.report import compare
from streamq.methods.statistics import InputStatistics, Wanted
from streamq.pairs import Pair, QConfig
from streamq.quantized import QuantizedLinear, Rule, Scheme

CPU = torch.device("cpu")


def scheme(method: str = "minmax", **ext: Any) -> Scheme:
    weight = QConfig("per_group", "int4", False, method, tuple(ext.items()))
    return Scheme("w4a16", Pair(QConfig("per_token", "float"), weight), Rule())


def made(w: torch.Tensor, method: str = "minmax", stats: InputStatistics | None = None, **ext: Any) -> QuantizedLinear:
    return int4.quantize(w, None, scheme(method, **ext), stats=stats)


def inputs(width: int = 256, seed: int = 0, hot: float = 20.0) -> tuple[InputStatistics, torch.Tensor]:
    """Statistics of correlated inputs with hot channels, and other rows of the same kind."""
    chance = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=chance) / width**0.5 + torch.eye(width)
    scale = torch.ones(width)
    scale[3::31] = hot
    x = torch.randn(1200, width, generator=chance) @ mix * scale
    stats = InputStatistics(width, Wanted(gram=True, rows=400), 1, CPU)
    stats.update(x[:800])
    return stats, x[800:]


def weights(rows: int = 48, width: int = 256, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def is_bf16(t: torch.Tensor) -> bool:
    return t.dtype == torch.float32 and torch.equal(t, t.bfloat16().float())


def output_error(layer: QuantizedLinear, w: torch.Tensor, x: torch.Tensor) -> float:
    return float(((layer.dequantize() - w) @ x.T).norm() / (w @ x.T).norm())


def grid(layer: QuantizedLinear) -> torch.Tensor:
    """All 16 values that a group can hold: [N, groups, 16] fp64."""
    return torch.arange(16).double() * layer.scales.double().unsqueeze(2) + layer.zeros.double().unsqueeze(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["minmax", "mse", "gptq"])
def test_record_is_what_is_stored(method: str, dtype: torch.dtype) -> None:
    stats, _ = inputs()
    w, bias, out = weights().to(dtype), torch.randn(48).to(dtype), torch.empty(48, 256, dtype=torch.int8)
    assert stats.gram is not None
    given = [t.clone() for t in (w, stats.rows, stats.gram)]
    layer = int4.quantize(w, bias, scheme(method), out, stats=stats)
    assert all(torch.equal(a, b) for a, b in zip(given, (w, stats.rows, stats.gram), strict=True))
    assert layer.codes is out and layer.bias is bias and layer.source_dtype == dtype and layer.zeros is not None
    assert int(out.min()) == 0 and int(out.max()) == 15
    assert layer.scales.shape == layer.zeros.shape == (48, 4)
    assert is_bf16(layer.scales) and is_bf16(layer.zeros) and float(layer.scales.min()) > 0
    assert layer.smooth is layer.rows is layer.low_rank is layer.tensor_scale is layer.static is None
    rel_error, cosine = compare(w.double(), layer.dequantize().double())
    assert layer.rel_error == pytest.approx(rel_error, rel=1e-5) and 0.03 < rel_error < 0.2
    assert 1 - layer.cosine == pytest.approx(1 - cosine, rel=1e-3)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_codes_are_the_nearest_that_the_stored_numbers_allow(method: str) -> None:
    w = weights()
    layer = made(w, method, inputs()[0])
    values = grid(layer)
    # A tie may fall to either side, so the distance is compared and not the code.
    best = (w.double().unflatten(1, (4, 64)).unsqueeze(3) - values.unsqueeze(2)).abs().amin(3)
    mine = (w.double() - layer.dequantize().double()).abs().unflatten(1, (4, 64))
    assert float((mine - best).max()) < 1e-6 * float(layer.scales.max())


def test_minmax_spans_each_group() -> None:
    layer, w = made(weights()), weights().unflatten(1, (4, 64))
    values = grid(layer)
    step = layer.scales.double()
    assert ((values[:, :, 0] <= w.amin(2)) & (values[:, :, 0] > w.amin(2) - 0.1 * step)).all()
    assert ((values[:, :, 15] - w.amax(2)).abs() < 0.06 * step).all()


def test_each_method_lowers_the_output_error() -> None:
    for seed in range(2):
        stats, x = inputs(seed=seed)
        w = weights(seed=seed + 10)
        layers = {
            "minmax": made(w),
            "unweighted": made(w, "mse", weighted=False),
            "mse": made(w, "mse", stats),
            "gptq of minmax": made(w, "gptq", stats, scales="minmax"),
            "gptq": made(w, "gptq", stats),
        }
        error = {name: output_error(layer, w, x) for name, layer in layers.items()}
        assert error["unweighted"] < 0.98 * error["minmax"] and error["mse"] < 0.85 * error["unweighted"]
        assert error["gptq of minmax"] < 0.8 * error["minmax"] and error["gptq"] < 0.85 * error["mse"]
        assert error["gptq"] < error["gptq of minmax"]
        assert layers["unweighted"].rel_error < 0.96 * layers["minmax"].rel_error < layers["mse"].rel_error
        assert torch.equal(layers["gptq of minmax"].scales, layers["minmax"].scales)


def test_search_finds_what_trying_everything_finds() -> None:
    """A fine grid of both ends, by brute force in fp64, gains little more over plain rounding."""
    w = weights(rows=24, width=64)
    share = torch.linspace(-0.05, 0.25, 41).double()
    best = torch.full((24,), float("inf"), dtype=torch.float64)
    low, high = w.double().amin(1, keepdim=True), w.double().amax(1, keepdim=True)
    for up in share:
        zero, top = low + (high - low) * up, high - (high - low) * share
        scale = ((top - zero) / 15).unsqueeze(2)
        offset = (w.double() - zero).unsqueeze(1)
        lost = ((offset / scale).round().clamp(0, 15) * scale - offset).square().sum(2)
        best = torch.minimum(best, lost.amin(1))
    lost = [
        float((layer.dequantize() - w).double().square().sum()) for layer in (made(w), made(w, "mse", weighted=False))
    ]
    assert lost[0] - lost[1] > 0.75 * (lost[0] - float(best.sum())) > 0.1 * lost[0]


def test_importance_matters_by_group_and_not_by_size() -> None:
    w = weights()
    stats, _ = inputs()
    louder = InputStatistics(256, Wanted(rows=400), 1, CPU)
    louder.update(stats.rows * 64)
    assert torch.equal(made(w, "mse", stats).codes, made(w, "mse", louder).codes)
    silent = InputStatistics(256, Wanted(rows=8, gram=True), 1, CPU)
    silent.update(torch.zeros(8, 256))
    even = made(w, "mse", weighted=False)
    for method in ("mse", "gptq"):  # nothing seen: all columns alike
        assert torch.equal(made(w, method, silent).codes, even.codes)
        assert torch.equal(made(w, method, silent).scales, even.scales)


@pytest.mark.parametrize("method", ["minmax", "mse", "gptq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_without_a_range(method: str, dtype: torch.dtype) -> None:
    stats, _ = inputs(384)
    w = weights(8, 384).to(dtype)
    w[0] = 0
    w[1, :64], w[2, 64:128], w[3, 128:192] = 0.75, -(2.0**-20), 2.0**60  # bf16 numbers
    w[4, 192:256] = 0.3
    w[5, 256:320], w[5, 260] = 0, 1e-40
    layer = made(w, method, stats)
    kept = layer.dequantize()
    assert layer.zeros is not None
    for t in (layer.scales, layer.zeros, kept):
        assert torch.isfinite(t).all()
    assert float(layer.scales.min()) > 0 and layer.rel_error == layer.rel_error
    assert torch.equal(kept[0], torch.zeros(384)) and float(kept[5, 256:320].abs().max()) < 1e-39
    if method != "gptq":  # which spends a group's slack on other columns' errors
        for row, part in ((1, slice(64)), (2, slice(64, 128)), (3, slice(128, 192))):
            assert torch.equal(kept[row, part], w[row, part].float())
    assert float((kept[4, 192:256] - w[4, 192:256].float()).abs().max()) < 0.31 * 2.0**-8


@pytest.mark.parametrize("method", ["minmax", "mse", "gptq"])
@pytest.mark.parametrize("offset", [1.0, -30.0, 1e4, -1e8, 1e30, -3e38])
def test_offsets_far_beyond_the_range(method: str, offset: float) -> None:
    stats, _ = inputs(128)
    w = weights(6, 128) + offset
    w[3, 5] = -offset  # and a range of twice that
    layer = made(w, method, stats)
    kept = layer.dequantize()
    assert layer.zeros is not None
    assert all(torch.isfinite(t).all() for t in (layer.scales, layer.zeros, kept)) and float(layer.scales.min()) > 0
    near = [row for row in range(6) if row != 3]
    if method != "gptq":
        # A code or two, of the gap between bf16 numbers there or of the group's own range.
        assert float((kept[near] - w[near]).abs().max()) <= 2 * max(abs(offset) * 2.0**-8, 0.4) / 15
        if abs(offset) < 1e38:
            assert float((kept[3] - w[3]).abs().max() / abs(offset)) < 2.1 / 15
    assert layer.rel_error < 0.1 and layer.cosine > 0.99


def test_what_is_not_finite_shows() -> None:
    w = weights()
    w[2, 70], w[5, 200] = float("nan"), float("inf")
    for method in ("minmax", "mse"):
        layer = made(w, method, inputs()[0])
        assert layer.zeros is not None
        bad = ~(torch.isfinite(layer.scales) & torch.isfinite(layer.zeros))
        assert bad.nonzero().tolist() == [[2, 1], [5, 3]]


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_tiles_change_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stats, w = inputs()[0], weights(37)
    whole = made(w, method, stats)
    monkeypatch.setattr(int4, "TILE_BYTES", 4 * 256 * 5)
    monkeypatch.setattr("streamq.methods.report.WEIGHT_TILE_BYTES", 4 * 256 * 3)
    tiled = made(w, method, stats)
    assert whole.zeros is not None and tiled.zeros is not None
    for a, b in ((whole.codes, tiled.codes), (whole.scales, tiled.scales), (whole.zeros, tiled.zeros)):
        assert torch.equal(a, b)
    assert (whole.rel_error, whole.cosine) == (tiled.rel_error, tiled.cosine)
    assert torch.equal(made(w[11:12], method, stats).codes, whole.codes[11:12])


def test_gptq_reads_its_options_and_says_when_it_cannot() -> None:
    stats, w = inputs()[0], weights()

    def codes(**ext: Any) -> torch.Tensor:
        return made(w, "gptq", stats, **ext).codes

    default = codes()
    assert torch.equal(default, codes(act_order=True, damping=0.01, block=128, scales="mse", weighted=True))
    for change in ({"act_order": False}, {"damping": 0.5}, {"scales": "minmax"}, {"weighted": False}):
        assert not torch.equal(default, codes(**change)), change
    plain = made(w, "mse", weighted=False).codes
    stats.gram = torch.eye(256) - 1e7 * (torch.ones(256, 256) - torch.eye(256))
    with pytest.warns(RuntimeWarning, match="no factorization"):
        assert torch.equal(codes(weighted=False), plain)


def test_refuses_what_it_cannot_do() -> None:
    stats, w = inputs()[0], weights()
    cases: list[tuple[str, dict[str, Any]]] = [
        ("Gram", {"scheme": scheme("gptq")}),
        ("kept rows", {"scheme": scheme("mse")}),
        ("kept rows", {"scheme": scheme("mse"), "stats": InputStatistics(256, Wanted(gram=True), 1, CPU)}),
        ("Gram", {"scheme": scheme("gptq"), "stats": InputStatistics(256, Wanted(rows=4), 1, CPU)}),
        ("method 'svdquant'", {"scheme": scheme("svdquant")}),
        ("smoothing", {"scheme": scheme(), "columns": torch.ones(256)}),
        ("smoothing", {"scheme": scheme(), "rows": torch.ones(48)}),
        ("no multiple", {"scheme": scheme(), "weight": w[:, :100]}),
    ]
    for match, case in cases:
        with pytest.raises(ValueError, match=match):
            int4.quantize(**({"weight": w, "bias": None} | case))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made(w, "mse", weighted=False).codes.shape == made(w, "mse", stats).codes.shape
