"""ConvRot: rotating by sums, codes against comfy-kitchen's, errors of the unrotated weight, its layers simulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfy_kitchen.backends.eager.quantization import quantize_int8_convrot_weight, rotate_int8_convrot_weight
from methods_kit import LIGHTX2V, PAIRS, edges, scheme
from test_methods import hot_inputs
from torch import nn

from streamq.methods import int8
from streamq.methods.activation import fake_quantize
from streamq.methods.report import compare, output_error
from streamq.methods.rotation import online_hadamard, rotate, unrotate
from streamq.pairs import Pair, QConfig, fault
from streamq.quantized import Rule
from streamq.simulate import put_in

SIZES = [16, 64, 256]
BASE = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)


def hadamard(size: int) -> torch.Tensor:
    matrix = BASE
    while len(matrix) < size:
        matrix = torch.kron(matrix, BASE)
    return matrix / size**0.5


@pytest.mark.parametrize("size", SIZES)
def test_rotating_is_the_product_with_the_matrix_in_groups(size: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(5, 3 * size)
    expected = torch.cat([part.double() @ hadamard(size).T for part in w.split(size, dim=1)], dim=1)
    torch.testing.assert_close(rotate(w, size).double(), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(rotate(w.double(), size), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(unrotate(rotate(w, size), size), w, rtol=0, atol=3e-6)
    whole = torch.randint(-50, 50, (4, 2 * size)).float()
    assert torch.equal(unrotate(rotate(whole, size), size), whole)  # sums of small whole numbers are exact
    x = torch.randn(2, 3, size)
    turned = rotate(x, size)
    torch.testing.assert_close(turned @ rotate(w[:, :size], size).T, x @ w[:, :size].T, rtol=1e-4, atol=1e-4)
    assert torch.equal(turned[1, 2], rotate(x[1, 2], size)) and x.data_ptr() != turned.data_ptr()
    assert torch.equal(rotate(w.bfloat16(), size), rotate(w.bfloat16().float(), size))


def test_sizes_that_are_no_power_of_four_or_do_not_divide_are_refused() -> None:
    for size in (0, 1, 2, 8, 32, 128, 48):
        with pytest.raises(ValueError, match="power of four"):
            rotate(torch.ones(2, 384), size)
    with pytest.raises(ValueError, match="96 columns are no multiple"):
        rotate(torch.ones(2, 96), 64)
    with pytest.raises(ValueError, match="power of two"):
        online_hadamard(24)


@pytest.mark.parametrize("size", SIZES)
def test_codes_are_comfy_kitchens_but_for_the_last_bit_of_the_rotation(size: int) -> None:
    """Of an fp32 weight it divides in fp32, by a scale of amax / 127; the rotation is a matrix product, not sums."""
    w = edges(120, 512)[11:]
    mine = int8.quantize(w, None, scheme("w8a8", Rule(scale_floor=1e-30), convrot=size))
    codes, scales = quantize_int8_convrot_weight(w, size)
    torch.testing.assert_close(mine.scales, scales, rtol=2e-6, atol=0)
    assert float((mine.codes != codes).float().mean()) < 1e-4 and int((mine.codes - codes).abs().max()) <= 1
    # Fed with its own rotated weight, the rest of the arithmetic is the same bit for bit.
    alone = int8.quantize(rotate_int8_convrot_weight(w, size), None, scheme("w8a8", Rule(scale_floor=1e-30)))
    assert torch.equal(alone.codes, codes) and torch.equal(alone.scales, scales)


def test_whole_numbers_give_comfy_kitchens_codes_exactly() -> None:
    """Where every sum is exact, so are codes and scales."""
    torch.manual_seed(0)
    w = torch.randint(-100, 100, (90, 512)).float() / 64
    for size in SIZES:
        mine = int8.quantize(w, None, scheme("w8a8", Rule(scale_floor=1e-30), convrot=size))
        codes, scales = quantize_int8_convrot_weight(w, size)
        assert torch.equal(mine.codes, codes) and torch.equal(mine.scales, scales)


@pytest.mark.parametrize("size", SIZES)
def test_half_precision_sources_differ_by_its_bf16_division_only(size: int) -> None:
    w = edges(120, 512, torch.bfloat16)[11:]
    mine = int8.quantize(w, None, scheme("w8a8", LIGHTX2V, convrot=size))
    codes, scales = quantize_int8_convrot_weight(w, size)
    apart = (mine.codes.int() - codes.int()).abs()
    assert int(apart.max()) <= 2 and float((apart > 0).float().mean()) < 0.2
    torch.testing.assert_close(mine.scales, scales, rtol=2.0**-7, atol=0)
    theirs = unrotate(codes.float() * scales, size)
    assert mine.rel_error < compare(w, theirs)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_default_form_is_that_of_the_rotated_weight(dtype: torch.dtype, smoothed: bool) -> None:
    w = edges(60, 128, dtype)
    columns, rows = (torch.rand(128) + 0.5, torch.rand(60) + 0.5) if smoothed else (None, None)
    for rule in (LIGHTX2V, replace(LIGHTX2V, arithmetic="source")):
        mine = int8.quantize(w, None, scheme("w8a8", rule, convrot=64), columns=columns, rows=rows)
        given = w.float() if columns is None or rows is None else w.float() * columns / rows.unsqueeze(1)
        alone = int8.quantize(rotate(given, 64), None, scheme("w8a8", LIGHTX2V))
        assert torch.equal(mine.codes, alone.codes) and torch.equal(mine.scales, alone.scales)
        assert mine.rotation == 64 and mine.source_dtype == dtype
        rel_error, cosine = compare(w.double(), mine.effective().double())
        assert mine.rel_error == pytest.approx(rel_error, rel=1e-3) and mine.cosine == pytest.approx(cosine, abs=1e-6)


def test_an_outlier_costs_less_when_rotated() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 256)
    w[:, 5] *= 60
    plain = int8.quantize(w, None, scheme("w8a8", LIGHTX2V))
    turned = int8.quantize(w, None, scheme("w8a8", LIGHTX2V, convrot=256))
    assert turned.rotation == 256 and plain.rotation == 0
    rest = [i for i in range(256) if i != 5]
    lost = [float((one.effective() - w)[:, rest].norm()) for one in (plain, turned)]
    assert lost[1] < 0.5 * lost[0]


def test_gptq_of_a_rotated_weight_is_refused() -> None:
    stats, _ = hot_inputs(64)
    with pytest.raises(ValueError, match="not rotated"):
        int8.quantize(torch.randn(8, 64), None, scheme("w8a8", LIGHTX2V, "gptq", convrot=16), stats=stats)


def test_squares_beyond_fp32_still_have_an_error() -> None:
    torch.manual_seed(0)
    huge = int8.quantize(torch.randn(8, 64) * 1e30, None, scheme("w8a8", LIGHTX2V, convrot=16))
    assert 0.001 < huge.rel_error < 0.02 and 0.999 < huge.cosine < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_simulated_layers_input_is_rotated(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w, bias, x = torch.randn(40, 128), torch.randn(40), torch.randn(3, 7, 128).to(dtype)
    layer = int8.quantize(w, bias, scheme("w8a8", LIGHTX2V, convrot=64))
    block = nn.Sequential(nn.Linear(128, 40, dtype=dtype))
    put_in(block, "0", layer)
    fed = fake_quantize(rotate(x.float(), 64), PAIRS["w8a8"].act).double()
    expected = fed @ layer.dequantize().double().T + bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(
        block(x).double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
    plain = x.double() @ w.double().T
    error, _ = output_error(x.reshape(-1, 128), w, layer, layer.scheme.pair.act)
    assert error == pytest.approx(float((expected - bias.double() - plain).norm() / plain.norm()), rel=1e-3)
    assert error < 0.03


@pytest.mark.parametrize("method, key", [("minmax", None), ("mse", "weight.method"), ("gptq", "weight.method")])
def test_only_plain_rounding_is_rotated(method: str, key: str | None) -> None:
    weight = QConfig("per_channel", "int8", method=method, ext=(("convrot", 64),))
    found = fault(Pair(QConfig("per_token", "int8"), weight))
    assert (found and found[0]) == key
