"""The Hugging Face `kernels` package without a GPU: stock diffusers loads and runs a nunchaku_lite folder on the CPU.

    with kernels_standin.installed() as calls:
        model = diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
        model(...)
    assert calls == {"quantize": 20, "svdq": 20, "awq": 0}

While it is installed, diffusers' only other knowledge of the machine, its check for an NVIDIA GPU, says yes; everything
else of diffusers runs as it is. The two operators of an SVDQ layer and the two of an AWQ layer have the arguments that
diffusers (`quantizers/nunchaku/utils.py`) gives them. They refuse what the CUDA ones would read out of bounds or take
for something else, and compute with `streamq.emulate`, from the packed tensors. A model keeps the operators with which
it was loaded. Layers of 16 rows and more go through the matrix operator, smaller ones through the vector one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from streamq import emulate
from streamq.savers import nunchaku

VERSION = "0.14.0"  # the first with the argument trust_remote_code, which diffusers then gives
ROWS = 256  # that activations are padded to
UTILS = "diffusers.quantizers.nunchaku.utils"


class Refused(ValueError):
    """Arguments that the CUDA operators would not survive, or not as they are meant."""


def need(name: str, tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor as the kernel takes it: contiguous, real, and of this dtype and shape."""
    if tensor is None:
        raise Refused(f"{name}: missing")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise Refused(f"{name}: {tensor.dtype} {list(tensor.shape)}, must be {dtype} {list(shape)}")
    if tensor.is_meta or not tensor.is_contiguous():
        raise Refused(f"{name}: on the meta device, or not contiguous")
    return tensor


def multiple(name: str, size: int, of: int) -> None:
    if size % of or size <= 0:
        raise Refused(f"{name}: {size}, must be a multiple of {of}")


class Operators:
    """`get_kernel(...).ops`. `calls`: how often each has run."""

    def __init__(self) -> None:
        self.calls = {"quantize": 0, "svdq": 0, "awq": 0}
        # Quantized inputs on their way to the product: by address, because that is all a kernel gets.
        self._begun: dict[int, tuple[Tensor, Tensor, Tensor, bool]] = {}

    def quantize_w4a4_act_fuse_lora(
        self, x: Tensor, codes: Tensor, scales: Tensor, down: Tensor, inner: Tensor, smooth: Tensor, fuse_glu: bool,
        nvfp4: bool,
    ) -> None:  # fmt: skip
        """x [m, K] -> codes, scales, and x · down, in buffers for m rounded up to 256."""
        rows, columns = x.shape
        padded, rank = -(-rows // ROWS) * ROWS, down.shape[1]
        if x.dtype not in emulate.HALVES or fuse_glu:
            raise Refused(f"an input of {x.dtype}, fuse_glu {fuse_glu}")
        multiple("inputs", columns, 128)
        multiple("rank", rank, 16)
        need("x", x, x.dtype, rows, columns)
        need("codes of x", codes, torch.uint8, padded, columns // 2)
        group, dtype = (16, torch.float8_e4m3fn) if nvfp4 else (64, x.dtype)
        need("scales of x", scales, dtype, columns // group, padded)
        need("x · down", inner, torch.float32, padded, rank)
        need("proj_down", down, x.dtype, columns, rank)
        need("smooth_factor", smooth, x.dtype, columns)
        self.calls["quantize"] += 1
        self._begun[codes.data_ptr()] = x.clone(), down, smooth, nvfp4

    def gemm_w4a4(
        self, act: Tensor, wgt: Tensor, out: Tensor, qout: None, ascales: Tensor, wscales: Tensor, oscales: None,
        poolout: None, lora_act_in: Tensor, lora_up: Tensor, lora_down: None, lora_act_out: None, norm_q: None,
        norm_k: None, rotary_emb: None, bias: Tensor, smooth_factor: None, out_vk: None, out_linearattn: None,
        act_unsigned: bool, lora_scales: list[float], fuse_silu: bool, fp4: bool, alpha: Tensor | None,
        wcscales: Tensor | None, out_q: None, out_k: None, out_v: None, attn_tokens: int,
    ) -> None:  # fmt: skip
        """The product, the bias and the low-rank branch, into out [m, N]."""
        x, down, smooth, nvfp4 = self._begun.pop(act.data_ptr())
        (rows, columns), (count, rank) = x.shape, lora_up.shape
        fused = (qout, oscales, poolout, lora_down, lora_act_out, norm_q, norm_k, rotary_emb, smooth_factor, out_vk)
        if any(one is not None for one in (*fused, out_linearattn, out_q, out_k, out_v)) or fuse_silu or attn_tokens:
            raise Refused("an operation fused into the product, which a plain linear layer has none of")
        if fp4 != nvfp4 or act_unsigned or lora_scales != [1.0] * (rank // 16) or down.shape[1] != rank:
            raise Refused(f"nvfp4 {fp4} after {nvfp4}, unsigned {act_unsigned}, scales of the branch {lora_scales}")
        multiple("outputs", count, 128)
        group, dtype = (16, torch.float8_e4m3fn) if fp4 else (64, x.dtype)
        tensors = {
            "qweight": need("qweight", wgt, torch.int8, count, columns // 2),
            "wscales": need("wscales", wscales, dtype, columns // group, count),
            "smooth_factor": smooth,
            "proj_down": down,
            "proj_up": need("proj_up", lora_up, x.dtype, count, rank),
            "bias": need("bias", bias, x.dtype, count),
        }
        if fp4:
            tensors["wtscale"] = need("wtscale", alpha, x.dtype, 1)
            tensors["wcscales"] = need("wcscales", wcscales, x.dtype, count)
        elif alpha is not None or wcscales is not None:
            raise Refused("int4 with nvfp4's scales")
        need("scales of x", ascales, dtype, columns // group, -(-rows // ROWS) * ROWS)
        need("x · down", lora_act_in, torch.float32, -(-rows // ROWS) * ROWS, rank)
        need("out", out, x.dtype, rows, count)
        self.calls["svdq"] += 1
        out.copy_(emulate.forward(x, nunchaku.unpack(tensors)))

    def awq_gemm_w4a16_g64_int32(self, x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor) -> Tensor:
        """x [m, K] · dequantized^T [K, N]; the caller adds the bias."""
        if x.shape[0] < 16 or 4 * qweight.shape[0] % 128:
            raise Refused(f"{x.shape[0]} rows, {4 * qweight.shape[0]} outputs: not for the matrix operator")
        return self._awq(x, qweight, wscales, wzeros)

    def gemv_awq(
        self, x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor, m: int, n: int, k: int, group_size: int
    ) -> Tensor:
        """The same for 1 to 8 rows."""
        if not 0 < m <= 8 or (m, k) != tuple(x.shape) or n != 4 * qweight.shape[0] or n % 8 or group_size != 64:
            raise Refused(f"x {list(x.shape)}, m {m}, n {n}, k {k}, group_size {group_size}")
        return self._awq(x, qweight, wscales, wzeros)

    def _awq(self, x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor) -> Tensor:
        rows, columns = x.shape
        count = 4 * qweight.shape[0]
        if x.dtype not in emulate.HALVES:
            raise Refused(f"an input of {x.dtype}")
        multiple("inputs", columns, 64)
        need("x", x, x.dtype, rows, columns)
        tensors = {
            "qweight": need("qweight", qweight, torch.int32, count // 4, columns // 2),
            "wscales": need("wscales", wscales, x.dtype, columns // 64, count),
            "wzeros": need("wzeros", wzeros, x.dtype, columns // 64, count),
        }
        self.calls["awq"] += 1
        return emulate.forward(x, nunchaku.unpack(tensors))


@contextmanager
def installed() -> Iterator[dict[str, int]]:
    """Put it in the place of `kernels`; the calls so far, by operator. Nothing is left behind for other tests."""
    # diffusers and transformers look for kernels when they are imported: let them not find these.
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel  # noqa: F401
    from diffusers.quantizers.nunchaku import nunchaku_quantizer
    from diffusers.utils import constants, import_utils

    operators, kernels = Operators(), ModuleType("kernels")

    def get_kernel(repository: str, *, version: int, trust_remote_code: bool, **how: Any) -> Any:
        assert repository.endswith("nunchaku-lite-kernels") and trust_remote_code and version
        return mock.Mock(spec_set=["ops"], ops=operators)

    kernels.get_kernel = get_kernel  # type: ignore[attr-defined]
    kernels.__version__ = VERSION  # type: ignore[attr-defined]
    parts, others = importlib.import_module(UTILS.rpartition(".")[0]), {}
    for name in (UTILS, "kernels"):  # not by mock.patch.dict, which would also forget what is imported meanwhile
        others[name] = sys.modules.pop(name, None)
    sys.modules["kernels"] = kernels
    try:
        with (
            mock.patch.object(import_utils, "_kernels_available", True),
            mock.patch.object(import_utils, "_kernels_version", VERSION),
            mock.patch.object(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True),
            mock.patch.object(nunchaku_quantizer.NunchakuLiteQuantizer, "validate_environment", lambda *_, **__: None),
        ):
            yield operators.calls
    finally:
        vars(parts).pop("utils", None)  # it holds these operators
        for name, module in others.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
