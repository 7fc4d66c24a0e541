"""Nunchaku's layers emulated: known samples, loops over the kernels' steps, and what is built on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nunchaku_kit import FILES, GOLDEN, KINDS, golden, layer, layer_of
from safetensors.torch import load_file
from torch import Tensor, nn

from streamq import emulate
from streamq.methods import report
from streamq.methods.fourbit import fake_quantize_input
from streamq.quantized import QuantizedLinear
from streamq.simulate import EmulatedLinear, put_in

HALVES = (torch.bfloat16, torch.float16)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def rows(count: int, columns: int, half: torch.dtype = torch.bfloat16, seed: int = 5) -> Tensor:
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))
    x[:, 7] *= 30
    x[0], x[1, :64] = 0, 0
    return x.to(half)


def balanced(kind: str, count: int, columns: int) -> QuantizedLinear:
    """A random layer whose parts all matter, and whose outputs fp16 can hold."""
    made = layer(kind, rows=count, columns=columns)
    zeros = None if made.zeros is None else made.zeros / 64
    branch = made.low_rank and replace(made.low_rank, up=made.low_rank.up / 128)
    return replace(made, scales=made.scales / 64, zeros=zeros, low_rank=branch)


def stepwise(x: Tensor, made: QuantizedLinear, half_accumulation: bool = False) -> Tensor:
    """One output at a time, as the kernels' description has the steps; sums in fp64, where the kernels have fp32."""
    half, out = x.dtype, torch.empty(x.shape[0], made.codes.shape[0], dtype=torch.float64)

    def h(value: Tensor) -> Tensor:
        return value.float().to(half).double()

    def rounded(part: Tensor) -> tuple[Tensor, Tensor]:
        if made.scheme.type == "w4a4":
            exact = part.abs().max().float() * torch.tensor(1 / 7)
            q = part if exact == 0 else (part.float() * (1 / exact)).round().clamp(-8, 7)
            return q.double(), h(exact)
        exact = (part.abs().max().float() * torch.tensor(1 / 6)).clamp_max(448)
        scaled = part if exact == 0 else part.float() * (1 / exact)
        distance = (scaled.abs().unsqueeze(-1) - E2M1).abs()
        distance[:, 1::2] += 1e-7  # ties to the even code
        return (E2M1[distance.argmin(-1)] * scaled.sign()).double(), exact.to(torch.float8_e4m3fn).double()

    weight, bias = made.dequantize().double(), made.bias
    size = 16 if made.scheme.type == "w4a4_nvfp4" else 64
    for i, row in enumerate(x.double()):
        if made.scheme.type == "w4a16":
            acc = h(h(weight) @ row)
            out[i] = acc if bias is None else h(acc + h(bias.bfloat16()))
            continue
        smoothed = row if made.smooth is None else h(row.float() / made.smooth)
        acc = torch.zeros(weight.shape[0], dtype=torch.float64)
        for group in range(len(row) // size):
            part = slice(group * size, (group + 1) * size)
            q, scale = rounded(smoothed[part])
            if half_accumulation:
                whole = h(made.codes[:, part].double() @ q)
                acc = h((whole * h(scale * made.scales[:, group].double())) + acc)
            else:
                acc += weight[:, part] @ (q * scale)
        acc = h(acc)
        if bias is not None:
            acc = h(acc + bias.bfloat16().double())
        if made.low_rank is not None:
            acc = h(acc + made.low_rank.up.double() @ h(made.low_rank.down.double() @ row))
        out[i] = acc
    return out


def assert_close(mine: Tensor, expected: Tensor) -> None:
    """Equal but for a few results whose fp32 sum lies at the edge between two halves."""
    assert mine.dtype in HALVES
    lost = (mine.double() - expected).abs()
    # An edge missed before the branch is added shows at the size that the sum had there.
    assert float(lost.max()) <= 2 * torch.finfo(mine.dtype).eps * float(expected.abs().max())
    assert float((lost > 0).double().mean()) < 0.02


@pytest.mark.parametrize("name", FILES)
def test_known_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer_of(FILES[name], golden(name)[0])
    sample = load_file(GOLDEN / f"{name}.safetensors")
    assert torch.equal(emulate.forward(sample["sample.x"], made), sample["sample.y"])
    # Tiles may add up in another order, no more than that.
    monkeypatch.setattr(emulate, "TILE_BYTES", 4 * made.codes.shape[1] * 48)
    monkeypatch.setattr(emulate, "ROW_BYTES", 4 * made.codes.shape[1] * 7)
    x = sample["sample.x"].view(2, 3, 4, -1)
    tiled = emulate.forward(x, made)
    assert tiled.shape == (2, 3, 4, made.codes.shape[0])
    assert_close(tiled.flatten(0, 2), sample["sample.y"].double())


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_kernels_steps(kind: str, half: torch.dtype) -> None:
    whole = balanced(kind, 128, 256)
    bare = replace(whole, bias=None, smooth=None, low_rank=None)
    for made in (whole, bare):
        x = rows(9, 256, half)
        assert_close(emulate.forward(x, made), stepwise(x, made))


@pytest.mark.parametrize("half", HALVES)
def test_half_accumulation(half: torch.dtype) -> None:
    made, x = balanced("w4a4", 128, 1024), rows(9, 1024, half)
    mine = emulate.forward(x, made, half_accumulation=True)
    # Groups' sums are whole numbers: nothing here depends on an order.
    assert_close(mine, stepwise(x, made, half_accumulation=True))
    assert float((mine != emulate.forward(x, made)).float().mean()) > 0.1
    for kind in ("w4a4_nvfp4", "w4a16"):
        other = layer(kind, columns=1024)
        assert torch.equal(emulate.forward(x, other, half_accumulation=True), emulate.forward(x, other))


def test_the_branch_reads_the_input_as_it_is() -> None:
    made = layer("w4a4", rows=128, columns=128)
    made.codes.zero_()
    made = replace(made, bias=None)
    assert made.low_rank is not None
    x = rows(4, 128)
    expected = (x.float() @ made.low_rank.down.float().T).bfloat16().float() @ made.low_rank.up.float().T
    assert torch.equal(emulate.forward(x, made), expected.bfloat16())


def test_refuses_other_inputs_and_layers() -> None:
    made = layer("w4a4", columns=128)
    with pytest.raises(ValueError, match="float32"):
        emulate.forward(rows(2, 128, torch.float32), made)
    with pytest.raises(ValueError, match="128 columns"):
        emulate.forward(rows(2, 256), made)
    with pytest.raises(ValueError, match="w8a8"):
        emulate.forward(rows(2, 128), replace(made, scheme=replace(made.scheme, type="w8a8")))
    assert emulate.forward(rows(2, 128)[:0], made).shape == (0, 256)


@pytest.mark.parametrize("kind", KINDS)
def test_takes_a_float_layers_place(kind: str) -> None:
    made = layer(kind, rows=256, columns=128)
    block = nn.Sequential(nn.Linear(128, 256), nn.GELU())
    put_in(block, "0", made)
    assert isinstance(block[0], EmulatedLinear)
    x = rows(6, 128, torch.float32).view(1, 6, 128)
    expected = emulate.forward(x.bfloat16(), made)
    for dtype in (torch.float32, torch.bfloat16):
        y = block[0](x.to(dtype))
        assert y.dtype == dtype and torch.equal(y, expected.to(dtype))
    assert torch.equal(block[0](x.half()), emulate.forward(x.half(), made))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bare", [False, True])
def test_output_error_of_four_bit_layers(kind: str, bare: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = balanced(kind, 192, 128)
    if bare:
        made = replace(made, smooth=None, low_rank=None)
    x, act = rows(40, 128), made.scheme.pair.act
    w = made.effective() + 0.1 * torch.randn(192, 128)
    monkeypatch.setattr(report, "TILE_BYTES", 4 * 128 * 50)
    rel_error, cosine = report.output_error(x, w, made, act)
    fed = x.double() if made.smooth is None else x.double() / made.smooth.double()
    if kind != "w4a16":
        fed = fake_quantize_input(fed.float(), act.dtype).double()
    y, product = x.double() @ w.double().T, fed @ made.dequantize().double().T
    if made.low_rank is not None:
        product += x.double() @ (made.low_rank.up.double() @ made.low_rank.down.double()).T
    assert rel_error == pytest.approx(float((product - y).norm() / y.norm()), rel=1e-3)
    assert cosine == pytest.approx(float((product * y).sum() / product.norm() / y.norm()), abs=1e-5)
    # What the kernels return is as far from the float layer, but for half precision.
    returned = emulate.forward(x, replace(made, bias=None)).double()
    assert rel_error == pytest.approx(float((returned - y).norm() / y.norm()), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_error(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(kind, rows=128, columns=128)
    w = (made.effective() + 0.3 * torch.randn(128, 128)).bfloat16()
    monkeypatch.setattr(report, "WEIGHT_TILE_BYTES", 4 * 128 * 30)
    rel_error, cosine = report.weight_error(w, made)
    expected = report.compare(w.double(), made.effective().double())
    assert rel_error == pytest.approx(expected[0], rel=1e-4) and cosine == pytest.approx(expected[1], abs=1e-6)
    huge = replace(made, scales=made.scales * 2.0**100, zeros=None if made.zeros is None else made.zeros * 2.0**100,
                   low_rank=None)  # fmt: skip
    assert report.weight_error(huge.effective() * 1.25, huge) == pytest.approx((0.2, 1.0), rel=1e-4)
