"""torchao's arithmetic against torchao: the golden folders that it wrote, and its own quantization of what breaks."""

from __future__ import annotations

import pytest
import torch
from methods_kit import DTYPES, PAIRS, TORCHAO, edges, golden_weights, raw, scheme
from torchao.quantization import Int8Tensor, PerRow
from torchao.quantization.quantize_.workflows import Float8Tensor

from streamq.methods import METHODS, fp8, int8
from streamq.quantized import QuantizedLinear


def made(weight: torch.Tensor, kind: str = "w8a8", **more: torch.Tensor) -> QuantizedLinear:
    return METHODS[kind](weight, None, scheme(kind, TORCHAO), **more)


@pytest.mark.parametrize("kind", ["w8a16", "w8a8"])
def test_the_golden_folders_come_out_byte_for_byte(kind: str) -> None:
    source, theirs = golden_weights("torchao/source"), golden_weights(f"torchao/golden_{kind}")
    layers = [name.removesuffix("._weight_qdata") for name in theirs if name.endswith("._weight_qdata")]
    assert len(layers) == 14
    for name in layers:
        mine = made(source[f"{name}.weight"], kind)
        assert torch.equal(mine.codes, theirs[f"{name}._weight_qdata"]), name
        assert torch.equal(raw(mine.scales), raw(theirs[f"{name}._weight_scale"])), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_int8_is_torchaos(dtype: torch.dtype, seed: int) -> None:
    w = edges(200, 192, dtype, seed)
    mine, theirs = made(w), Int8Tensor.from_hp(w.bfloat16(), PerRow())
    assert torch.equal(raw(mine.codes), raw(theirs.qdata))
    assert torch.equal(raw(mine.scales), raw(theirs.scale.reshape(-1, 1).float()))
    assert mine.codes.amax() == 127  # clamped from 127.5
    assert mine.scales[0] == 2.0**-23 == mine.scales[10] and not mine.codes[[0, 1]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_fp8_is_torchaos_but_for_rows_of_zeros(dtype: torch.dtype, seed: int) -> None:
    w = edges(200, 192, dtype, seed)
    mine, theirs = made(w, "fp8"), Float8Tensor.from_hp(w.bfloat16(), granularity=PerRow())
    dead = (w.bfloat16() == 0).all(dim=1)
    assert 2 <= int(dead.sum()) <= 4
    assert torch.equal(raw(mine.codes[~dead]), raw(theirs.qdata[~dead]))
    assert torch.equal(raw(mine.scales[~dead]), raw(theirs.scale.reshape(-1, 1)[~dead].float()))
    assert theirs.qdata[dead].float().isnan().all()  # what the exception is for
    assert (mine.scales[dead] == 2.0**-23).all() and not mine.codes[dead].float().any()


@pytest.mark.parametrize("kind", ["w8a8", "fp8"])
def test_smoothed_weights_are_torchaos_of_the_product(kind: str) -> None:
    w, columns, rows = edges(50, 96), torch.rand(96) * 5 + 0.1, torch.rand(50) + 0.5
    mine = made(w, kind, columns=columns, rows=rows)
    alone = made(w * columns / rows.unsqueeze(1), kind)
    assert torch.equal(raw(mine.codes), raw(alone.codes)) and torch.equal(mine.scales, alone.scales)
    exact, restored = w.double(), mine.effective().double()
    assert mine.rel_error == pytest.approx(float((exact - restored).norm() / exact.norm()), rel=1e-4)


@pytest.mark.parametrize("kind", ["w8a8", "w8a16"])
def test_clipping_by_mse_uses_the_same_rounding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row against a loop over the candidates in plain arithmetic."""
    torch.manual_seed(0)
    w = torch.randn(24, 96).bfloat16()
    w[::2, 3] = 9
    mine = int8.quantize(w, None, scheme(kind, TORCHAO, "mse"))
    assert PAIRS[kind].weight.scope == "per_channel"
    for row in range(24):
        amax, best = w[row].abs().max(), (float("inf"), 0.0)
        for i in range(61):
            s = max(float((amax * (1 - i / 100)) / torch.tensor(127.5, dtype=torch.bfloat16)), 2.0**-23)
            s32 = torch.tensor(s, dtype=torch.float32)
            q = (w[row].float() * (1.0 / s32)).round().clamp(-128, 127)
            lost = float((q * s32 - w[row].float()).double().square().sum())
            best = min(best, (lost, float(s32)))
        got = float((mine.dequantize()[row] - w[row].float()).double().square().sum())
        assert got == pytest.approx(best[0], rel=1e-5), row
    assert (mine.scales < made(w, kind).scales).any()


def test_a_float16_source_that_bf16_rounds_is_compared_with_itself() -> None:
    """The error is that of the checkpoint's weight, not of its bf16 copy."""
    w = torch.randn(30, 64).half()
    for kind in ("w8a8", "fp8"):
        mine = made(w, kind)
        exact = w.double()
        error = float((mine.dequantize().double() - exact).norm() / exact.norm())
        assert mine.rel_error == pytest.approx(error, rel=1e-5)
        assert mine.source_dtype == torch.float16
    assert isinstance(fp8.quantize(w, None, scheme("fp8", TORCHAO)), QuantizedLinear)
