"""The nunchaku format, a layer at a time: its tensors there and back, the check of them, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from nunchaku_kit import (
    FILES,
    FOLDER,
    KINDS,
    SINGLE,
    bits,
    by_suffix,
    golden,
    layer,
    layer_of,
    linear,
    scheme,
)
from torch import Tensor

from streamq.dtypes import TORCH_DTYPES
from streamq.errors import RunError, UsageError
from streamq.quantized import LowRank, QuantizedLinear, Scheme
from streamq.savers import SaveOptions, Spec, nunchaku, nunchaku_layout

Poke = Callable[[QuantizedLinear], QuantizedLinear]
RANK_32 = scheme("w4a4", "svdquant", 32)


# -- A layer's tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_another_programs_layer(name: str) -> None:
    logical, packed = golden(name)
    made = by_suffix(layer_of(FILES[name], logical))
    assert made.keys() == packed.keys()
    for suffix, due in packed.items():
        assert (made[suffix].dtype, made[suffix].shape) == (due.dtype, due.shape), suffix
        assert bits(made[suffix]) == bits(due), suffix


@pytest.mark.parametrize("name", FILES)
def test_another_programs_layer_back(name: str) -> None:
    logical, packed = golden(name)
    kind, layer = FILES[name], nunchaku.unpack(packed)
    assert layer.scheme.type == kind == layer.scheme.pair.type
    assert torch.equal(layer.codes, logical["codes"].to(torch.int8)) and layer.codes.dtype == torch.int8
    assert torch.equal(layer.scales, logical["scales"].float()) and layer.scales.dtype == torch.float32
    assert layer.bias is not None and torch.equal(layer.bias, logical["bias"])
    alone = nunchaku.bias(packed)
    assert alone is not None and bits(alone) == bits(layer.bias)
    assert nunchaku.contradictions(packed) == []
    rows = nunchaku.decode(packed)
    whole = torch.cat([rows(slice(start, start + 50)) for start in range(0, layer.codes.shape[0], 50)])
    if kind == "w4a16":
        assert layer.zeros is not None and torch.equal(layer.zeros, logical["zeros"].float())
    else:
        assert torch.allclose(whole, logical["effective_weight"], rtol=1e-6, atol=1e-6)
    weight = logical["weight"].float()
    assert (whole - weight).norm() < 0.15 * weight.norm()


ORDER = {
    "w4a4": ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "bias"),
    "w4a4_nvfp4": ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "wcscales", "wtscale", "bias"),
    "w4a16": ("qweight", "wscales", "wzeros", "bias"),
}


@pytest.mark.parametrize("options", [FOLDER, SINGLE], ids=lambda o: o.layout)
@pytest.mark.parametrize("poor", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_what_was_announced(kind: str, poor: bool, options: SaveOptions) -> None:
    """`poor`: without smoothing, branch and bias."""
    rows, columns = 256, 384
    made = layer(kind, rows, columns, rank=48)
    if poor:
        made = replace(made, scheme=scheme(kind), smooth=None, low_rank=None, bias=None)
    one = linear("blocks.7.ffn.net.2", rows, columns, bias=not poor)
    specs, tensors = nunchaku.quantized_specs(one, made.scheme, options), nunchaku.encode(made, options)
    for spec, tensor in zip(specs, tensors, strict=True):
        assert spec.unit == "blocks.7" and spec.name.startswith("blocks.7.ffn.net.2.")
        assert TORCH_DTYPES[spec.dtype] == tensor.dtype and spec.shape == tuple(tensor.shape), spec
        assert tensor.is_contiguous()
    due = list(ORDER[kind][: -1 if poor else None])
    if options is SINGLE and kind != "w4a16":
        due.insert(3, "smooth_factor_orig")
    assert [spec.name.removeprefix("blocks.7.ffn.net.2.") for spec in specs] == due


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_comes_back(kind: str) -> None:
    made = layer(kind, 256, 384, rank=48)
    back = nunchaku.unpack(by_suffix(made))
    for name in ("codes", "scales", "smooth", "zeros", "tensor_scale"):
        one, other = getattr(made, name), getattr(back, name)
        assert one is other is None or torch.equal(one, other), name
    assert made.bias is not None and back.bias is not None
    assert torch.equal(back.bias, made.bias.bfloat16())
    assert torch.equal(back.effective(), made.effective())
    assert back.rel_error != back.rel_error and back.source_dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["w4a4", "w4a4_nvfp4"])
def test_plain_rounding_has_ones_and_zeros(kind: str) -> None:
    made = replace(layer(kind), scheme=scheme(kind), smooth=None, low_rank=None)
    tensors = by_suffix(made)
    assert bool((tensors["smooth_factor"] == 1).all())
    assert tensors["proj_down"].shape == (128, 16) and not tensors["proj_down"].any()
    assert tensors["proj_up"].shape == (256, 16) and not tensors["proj_up"].any()
    assert torch.equal(nunchaku.decode(tensors)(slice(None)), made.dequantize())


def test_channel_scales_of_another_program_count() -> None:
    made = layer("w4a4_nvfp4")
    tensors = by_suffix(made)
    channel = torch.rand(256).bfloat16()
    tensors["wcscales"] = nunchaku_layout.pack_vector(channel)
    due = replace(made, low_rank=None).effective() * channel.float().unsqueeze(1)
    assert made.low_rank is not None
    due += made.low_rank.up.float() @ made.low_rank.down.float()
    assert torch.allclose(nunchaku.decode(tensors)(slice(None)), due, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_another_device(kind: str) -> None:
    made = layer(kind)
    branch = made.low_rank and LowRank(made.low_rank.down.cuda(), made.low_rank.up.cuda())
    names = ("codes", "scales", "bias", "smooth", "zeros", "tensor_scale")
    there = {name: None if getattr(made, name) is None else getattr(made, name).cuda() for name in names}
    for name, tensor in by_suffix(replace(made, low_rank=branch, **there)).items():
        assert tensor.is_cuda and bits(tensor.cpu()) == bits(by_suffix(made)[name]), name


def test_types_are_told_by_the_tensors() -> None:
    kinds = {kind: by_suffix(layer(kind)) for kind in KINDS}
    assert {kind: nunchaku.unpack(tensors).scheme.type for kind, tensors in kinds.items()} == {k: k for k in KINDS}
    del kinds["w4a4_nvfp4"]["wtscale"]
    with pytest.raises(KeyError, match="wtscale"):
        nunchaku.unpack(kinds["w4a4_nvfp4"])
    short = kinds["w4a4"] | {"wscales": kinds["w4a4"]["wscales"][:, :100]}
    with pytest.raises((RuntimeError, ValueError)):
        nunchaku.unpack(short)


# -- The check of what was packed --------------------------------------------------------------------------------------

PACKERS = {
    "pack_qweight": ("w4a4", "codes"), "pack_awq": ("w4a16", "codes"), "pack_scales": ("w4a4", "scales"),
    "pack_micro_scales": ("w4a4_nvfp4", "scales"), "pack_vector": ("w4a4", "bias"),
    "pack_down": ("w4a4_nvfp4", "first low-rank factor"), "pack_up": ("w4a4", "second low-rank factor"),
}  # fmt: skip


@pytest.mark.parametrize("packer", PACKERS)
def test_a_broken_packer_is_noticed(packer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, what = PACKERS[packer]
    right = getattr(nunchaku_layout, packer)

    def wrong(tensor: Tensor) -> Tensor:
        packed = right(tensor).clone()
        flat = packed.view(torch.uint8).view(-1)
        flat[-1] ^= 1
        return packed

    made = layer(kind)
    nunchaku.encode(made, FOLDER)
    monkeypatch.setattr(nunchaku_layout, packer, wrong)
    with pytest.raises(RunError, match=f"{kind} layer of 256 x 128.*{what} came back changed.*run the same command"):
        nunchaku.encode(made, FOLDER)


def test_a_packer_that_leaves_the_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers would load without a word: a bias and scales of the right shape, row by row."""
    for packer, plain in (("pack_vector", lambda v: v.clone()), ("pack_scales", lambda s: s.T.contiguous())):
        with monkeypatch.context() as patch, pytest.raises(RunError):
            patch.setattr(nunchaku_layout, packer, plain)
            nunchaku.encode(layer("w4a4"), FOLDER)


def change(name: str, index: tuple[int, ...], value: float) -> Poke:
    def poke(made: QuantizedLinear) -> QuantizedLinear:
        tensor = getattr(made, name).clone()
        tensor[index] = value
        return replace(made, **{name: tensor})

    return poke


def branch(down: float, up: float) -> Poke:
    def poke(made: QuantizedLinear) -> QuantizedLinear:
        assert made.low_rank is not None
        return replace(made, low_rank=LowRank(made.low_rank.down * down, made.low_rank.up * up))

    return poke


BAD: dict[str, tuple[str, Poke, str]] = {
    "code -8": ("w4a4", change("codes", (5, 77), -8), "qweight: code -8"),
    "code 9": ("w4a4", change("codes", (5, 77), 9), "codes came back changed"),
    "code 16": ("w4a16", change("codes", (5, 77), 16), "codes came back changed"),
    "scale 0": ("w4a4", change("scales", (5, 1), 0.0), "wscales: a number that is not above zero"),
    "negative scale": ("w4a16", change("scales", (5, 1), -1.0), "wscales: a number that is not above zero"),
    "scale NaN": ("w4a4", change("scales", (5, 1), float("nan")), "wscales: a number that is not finite"),
    "e4m3 NaN": ("w4a4_nvfp4", change("scales", (5, 1), float("nan")), "wscales: a number that is not finite"),
    "e4m3 beyond 448": ("w4a4_nvfp4", change("scales", (5, 1), 1000.0), "scales came back changed"),
    "scale that is no bf16 number": ("w4a4", change("scales", (5, 1), 1 + 2**-10), "scales came back changed"),
    "zero that is no bf16 number": ("w4a16", change("zeros", (5, 1), 1 + 2**-10), "zeros came back changed"),
    "zero NaN": ("w4a16", change("zeros", (5, 1), float("nan")), "wzeros: a number that is not finite"),
    "tensor scale 0": ("w4a4_nvfp4", change("tensor_scale", (0,), 0.0), "wtscale: a number that is not above zero"),
    "tensor scale that is no bf16 number": (
        "w4a4_nvfp4", change("tensor_scale", (0,), 1 + 2**-10), "tensor scale came back changed",
    ),
    "smooth 0": ("w4a4", change("smooth", (3,), 0.0), "smooth_factor: a number that is not above zero"),
    "smooth infinite": ("w4a4", change("smooth", (3,), float("inf")), "smooth_factor: a number that is not finite"),
    "smooth that is no bf16 number": ("w4a4", change("smooth", (3,), 1 + 2**-10), "smoothing vector came back"),
    "down infinite": ("w4a4", branch(float("inf"), 1), "proj_down: a number that is not finite"),
    "up NaN": ("w4a4_nvfp4", branch(1, float("nan")), "proj_up: a number that is not finite"),
    "bias NaN": ("w4a16", change("bias", (3,), float("nan")), "bias: a number that is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_numbers_that_are_never_written(bad: str) -> None:
    kind, poke, says = BAD[bad]
    with pytest.raises(RunError, match=says):
        nunchaku.encode(poke(layer(kind)), FOLDER)


def test_a_rank_that_was_not_planned() -> None:
    made = layer("w4a4", rank=48)
    with pytest.raises(RunError, match="rank 48, 32 was planned"):
        nunchaku.encode(replace(made, scheme=RANK_32), FOLDER)


def stored(kind: str, suffix: str, index: tuple[int, ...], value: float) -> list[str]:
    tensors = by_suffix(layer(kind))
    tensors[suffix][index] = value
    return nunchaku.contradictions(tensors)


def test_contradictions_in_stored_tensors() -> None:
    for kind in KINDS:
        assert nunchaku.contradictions(by_suffix(layer(kind))) == []
    for half in (-128, 8, 0x78):  # 80, 08 and 78 in hexadecimal: a nibble 8
        assert stored("w4a4", "qweight", (3, 7), half) == ["qweight: code -8, the codes go from -7 to 7"]
        assert stored("w4a4_nvfp4", "qweight", (3, 7), half) == []  # minus zero
    assert stored("w4a4_nvfp4", "wscales", (3, 7), float("nan")) == ["wscales: a number that is not finite"]
    assert stored("w4a4_nvfp4", "wcscales", (3,), float("inf")) == ["wcscales: a number that is not finite"]
    assert stored("w4a4", "smooth_factor", (3,), -1.0) == ["smooth_factor: a number that is not above zero"]
    assert stored("w4a16", "wscales", (1, 3), 0.0) == ["wscales: a number that is not above zero"]
    assert stored("w4a16", "wzeros", (1, 3), float("nan")) == ["wzeros: a number that is not finite"]


# -- What fits, and what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "rows", "columns", "numbers"),
    [
        (RANK_32, 128, 128, None),
        (RANK_32, 8960, 1536, None),
        (RANK_32, 13824, 5120, None),
        (RANK_32, 64, 5120, ("64 outputs", "128")),
        (RANK_32, 1536, 320, ("320 inputs", "128")),
        (scheme("w4a4", "svdquant", 24), 1536, 1536, ("rank 24", "16")),
        (scheme("w4a4", "svdquant", 2048), 5120, 5120, ("rank 2048", "1024")),
        (scheme("w4a4", "svdquant", 256), 128, 5120, ("rank 256", "128")),
        (scheme("w4a4_nvfp4"), 128, 128, None),
        (scheme("w4a4_nvfp4"), 200, 128, ("200 outputs", "128")),
        (scheme("w4a16", "mse"), 8, 64, None),
        (scheme("w4a16", "mse"), 1536, 96, ("96 inputs", "64")),
        (scheme("w4a16", "mse"), 12, 64, ("12 outputs", "8")),
    ],
)
def test_sizes_that_no_kernel_takes(how: Scheme, rows: int, columns: int, numbers: tuple[str, str] | None) -> None:
    reason = nunchaku.unfit(linear("blocks.0.attn1.to_q", rows, columns), how)
    if numbers is None:
        assert reason is None
    else:
        assert reason is not None and all(number in reason for number in numbers), reason


def test_ranks() -> None:
    assert nunchaku.rank_of(scheme("w4a4", "svdquant", 48)) == 48
    assert nunchaku.rank_of(scheme("w4a4", "svdquant")) == 32
    assert nunchaku.rank_of(scheme("w4a4_nvfp4")) == 16


def test_one_precision_and_one_rank() -> None:
    fine = {"a": RANK_32, "b": None, "c": scheme("w4a16", "mse"), "d": RANK_32}
    assert nunchaku.check(fine, FOLDER) == []
    with pytest.raises(UsageError, match="type w4a4 for a and w4a4_nvfp4 for e"):
        nunchaku.check(fine | {"e": scheme("w4a4_nvfp4", "svdquant", 32)}, FOLDER)
    with pytest.raises(UsageError, match="rank 32 for a and 48 for e"):
        nunchaku.check(fine | {"e": scheme("w4a4", "svdquant", 48)}, FOLDER)
    with pytest.raises(UsageError, match="rank 32 for a and 16 for e.*without svdquant has rank 16"):
        nunchaku.check(fine | {"e": scheme("w4a4")}, FOLDER)


def test_the_single_file_is_warned_of() -> None:
    (warning,) = nunchaku.check({"a": RANK_32}, SINGLE)
    assert "nothing loads Wan" in warning
    with pytest.raises(UsageError, match="--max_shard_size"):
        nunchaku.check({"a": RANK_32}, SaveOptions("single", 10**9))


@pytest.mark.parametrize(
    ("name", "dtype", "due"),
    [
        ("blocks.0.attn1.to_q.weight", "F32", "BF16"),
        ("blocks.0.attn1.norm_q.weight", "F16", "BF16"),
        ("patch_embedding.weight", "BF16", "BF16"),
        ("blocks.0.scale_shift_table", "F32", "F32"),
        ("blocks.0.norm2.weight", "F16", "F16"),
        ("condition_embedder.time_embedder.linear_1.bias", "F32", "F32"),
        ("scale_shift_table", "BF16", "BF16"),
    ],
)
def test_floats(name: str, dtype: str, due: str) -> None:
    assert nunchaku.passed_spec(name, dtype, (3, 4), "rest", SaveOptions()) == Spec(name, due, (3, 4), "rest")


def test_needs_no_torch() -> None:
    probe = "import sys; from streamq.savers import nunchaku; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
