"""GGUF's Q8_0 and Q4_0 against gguf-py: its own quantization of what breaks, and the files that it wrote."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from methods_kit import DATA, DTYPES, edges, golden_weights, scheme
from torch import nn

from streamq.methods import ggml
from streamq.methods.report import output_error
from streamq.quantized import QuantizedLinear, Rule
from streamq.simulate import put_in

KINDS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
# Native names of the golden files' layers -> diffusers' names in their source.
RENAMED = {"self_attn.": "attn1.", "cross_attn.": "attn2.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.",
           ".o.": ".to_out.0.", "ffn.0.": "ffn.net.0.proj.", "ffn.2.": "ffn.net.2."}  # fmt: skip


def made(weight: torch.Tensor, kind: str) -> QuantizedLinear:
    return ggml.quantize(weight, None, scheme(kind, Rule()))


def packed(layer: QuantizedLinear) -> np.ndarray:
    """The bytes [out, in / 32 · block] as GGUF has them: fp16 scale, then codes, Q4_0 two in a byte."""
    count, width = layer.codes.shape
    codes = layer.codes.numpy().view(np.uint8).reshape(count, width // 32, 32)
    if layer.scheme.type == "q4_0":
        codes = codes[..., :16] | codes[..., 16:] << 4
    scales = layer.scales.numpy().astype(np.float16)
    assert np.array_equal(scales.astype(np.float32), layer.scales.numpy(), equal_nan=True)
    return np.concatenate([scales.view(np.uint8).reshape(count, -1, 2), codes], axis=-1).reshape(count, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_golden_files_come_out_byte_for_byte(kind: str) -> None:
    source = golden_weights("torchao/source")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(DATA / f"gguf/golden_{kind}.gguf").tensors}
    quantized = [name for name, tensor in tensors.items() if tensor.tensor_type == KINDS[kind]]
    assert len(quantized) == 10
    for name in quantized:
        theirs = name
        for native, diffusers in RENAMED.items():
            theirs = theirs.replace(native, diffusers)
        assert np.array_equal(packed(made(source[theirs], kind)), tensors[name].data), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_bytes_and_values_are_ggufs(kind: str, dtype: torch.dtype, seed: int) -> None:
    w = edges(300, 160, dtype, seed)
    w[3] *= 0.01  # within fp16 as a scale
    mine = made(w, kind)
    theirs = quantize(w.float().numpy(), KINDS[kind])
    assert np.array_equal(packed(mine), theirs)
    restored = dequantize(theirs, KINDS[kind])
    assert np.array_equal(mine.dequantize().numpy(), restored)
    exact, restored = w.double().numpy(), restored.astype(np.float64)
    error = np.linalg.norm(exact - restored) / np.linalg.norm(exact)
    assert mine.rel_error == pytest.approx(error, rel=1e-4)
    cosine = (exact * restored).sum() / np.linalg.norm(exact) / np.linalg.norm(restored)
    assert mine.cosine == pytest.approx(cosine, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # gguf-py's divisions by what is nearly 0
@settings(deadline=None, max_examples=200)
@given(arrays.arrays(np.float32, (3, 32), elements=st.floats(-(2.0**15), 2.0**15, width=32)))
@pytest.mark.parametrize("kind", KINDS)
def test_any_block_is_ggufs(kind: str, block: np.ndarray) -> None:
    # Where 1 / d is beyond fp32 gguf-py casts infinities to whole numbers, which is undefined.
    tiny = (np.abs(block).max(axis=1) < 1e-36) & (np.abs(block).max(axis=1) > 0)
    mine, theirs = packed(made(torch.from_numpy(block.copy()), kind)), quantize(block, KINDS[kind])
    assert np.array_equal(mine[~tiny], theirs[~tiny])


def test_halves_and_ties() -> None:
    """Q8_0 rounds halves away and knows 0.49999997; Q4_0's d has the sign of the first of the largest."""
    d = torch.tensor(0.5)
    block = torch.zeros(1, 32)
    block[0, :6] = torch.tensor([127, 2.5, -2.5, 0.5, -0.5, 0.49999997]) * d
    assert made(block, "q8_0").codes[0, :6].tolist() == [127, 3, -3, 1, -1, 0]
    for first, sign in ((1.0, -1.0), (-1.0, 1.0)):
        pair = torch.zeros(1, 32)
        pair[0, [5, 20]] = torch.tensor([first, -first])
        layer = made(pair, "q4_0")
        assert float(layer.scales) == sign / 8 and layer.codes[0, [5, 20]].tolist() == [0, 15]
        assert layer.zeros is not None and float(layer.zeros) == -sign


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_too_small_for_their_scale_are_zero(kind: str) -> None:
    layer = made(torch.full((1, 32), 1e-40), kind)
    assert not layer.codes.any() and not layer.dequantize().any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_scale_shows(kind: str) -> None:
    """Infinite where fp16 ends: the largest weight that has a scale is 65504 times the largest code."""
    w = torch.ones(2, 64)
    w[0, 3] = 65504 * (127 if kind == "q8_0" else 8) * 1.01
    assert made(w, kind).scales.isfinite().tolist() == [[False, True], [True, True]]
    with pytest.raises(ValueError, match="48 columns: no multiple of the block size 32"):
        made(torch.ones(2, 48), kind)
    with pytest.raises(AssertionError, match="no smoothing"):
        ggml.quantize(w, None, scheme(kind, Rule()), columns=torch.ones(64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_simulated_layer_takes_float_inputs(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w, bias, x = torch.randn(40, 64), torch.randn(40), torch.randn(7, 64).to(dtype)
    layer = ggml.quantize(w, bias, scheme(kind, Rule()))
    block = nn.Sequential(nn.Linear(64, 40, dtype=dtype))
    put_in(block, "0", layer)
    weight = layer.dequantize().to(dtype)  # as diffusers and ComfyUI dequantize: to the compute dtype
    assert torch.equal(block(x), (nn.functional.linear(x, weight).float() + bias).to(dtype))
    error, _ = output_error(x, w, layer, layer.scheme.pair.act)
    y, plain = x.double() @ layer.dequantize().double().T, x.double() @ w.double().T
    assert error == pytest.approx(float((y - plain).norm() / plain.norm()), rel=1e-3)
    assert error == pytest.approx(layer.rel_error, rel=0.3)
