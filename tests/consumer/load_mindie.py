"""Load a MindIE folder with the public package ``mindiesd`` and report what it did.

    python load_mindie.py FOLDER FLOAT_FOLDER [--dtype bfloat16|float16|float32] [--divided FILE]

FOLDER holds ``quant_model_description_*.json`` and its weights; FLOAT_FOLDER the float
checkpoint it was made from, with native Wan names. FILE: by what the float weights' rows
(``LAYER.rows``) are divided and their columns (``LAYER.columns``) multiplied before the two
are compared, where smoothing has done so. One JSON object goes to stdout. When ``mindiesd``
refuses the folder it is ``{"error": {"type", "message"}}``, exit status 1.

Run it in a process of its own: it puts the ``torch_npu`` stand-in on ``sys.path``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

STANDIN = Path(__file__).resolve().parent / "torch_npu_standin"
sys.path.insert(0, str(STANDIN))
# mindiesd logs to stdout and to ~/mindie/log unless told not to.
os.environ.update(MINDIE_LOG_TO_STDOUT="false", MINDIE_LOG_TO_FILE="false")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

INT8_TYPES = ("W8A8_DYNAMIC", "W8A8")
MX_TYPES = ("W8A8_MXFP8", "W4A4_MXFP4")


class Affine(nn.Module):
    """A norm's parameters under their checkpoint names; never run here."""


def read_tensors(folder: Path, pattern: str) -> dict[str, Tensor]:
    """Read every tensor of the safetensors files in ``folder``."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        tensors.update(load_file(path))
    if not tensors:
        raise FileNotFoundError(f"no tensors in {folder}/{pattern}")
    return tensors


def leaf_module(params: dict[str, Tensor]) -> nn.Module:
    """Make the module that owns ``params``: a linear, a convolution or a plain one."""
    weight = params.get("weight")
    if weight is not None and weight.ndim == 2:
        return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in params)
    if weight is not None and weight.ndim == 5:
        out_channels, in_channels, *sides = weight.shape
        size = (sides[0], sides[1], sides[2])
        return nn.Conv3d(in_channels, out_channels, size, size)
    return Affine()


def build_model(state: dict[str, Tensor]) -> nn.Module:
    """Build the module tree that the checkpoint's names and shapes describe.

    Numbered children become ``blocks`` = ModuleList or an ``nn.Sequential`` whose
    parameterless places (activations) are ``nn.Identity``.
    """
    params: dict[str, dict[str, Tensor]] = {"": {}}
    children: dict[str, dict[str, None]] = {}  # a dict keeps the order
    for key, tensor in state.items():
        path, _, leaf = key.rpartition(".")
        params.setdefault(path, {})[leaf] = tensor
        while path:
            parent, _, child = path.rpartition(".")
            children.setdefault(parent, {})[child] = None
            path = parent

    def build(path: str) -> nn.Module:
        names = children.get(path, {})
        below = {n: build(f"{path}.{n}" if path else n) for n in names}
        if names and all(name.isdigit() for name in names):
            count = max(map(int, names)) + 1
            steps = [below.get(str(i), nn.Identity()) for i in range(count)]
            return nn.ModuleList(steps) if path == "blocks" else nn.Sequential(*steps)
        own = params.get(path, {})
        module = nn.Module() if names else leaf_module(own)
        for name, child in below.items():
            module.add_module(name, child)
        if names or isinstance(module, Affine):
            for name, tensor in own.items():
                module.register_parameter(name, nn.Parameter(tensor.clone(), False))
        return module

    model = build("")
    model.load_state_dict(state, strict=True)
    return model.requires_grad_(False)


def linear_types(description: dict[str, str]) -> dict[str, str]:
    """Map each module name to the type of its ``weight``."""
    types: dict[str, str] = {}
    for key, kind in description.items():
        if key.endswith(".weight"):
            types[key.removesuffix(".weight").removesuffix(".linear")] = kind
    return types


def relative(error: Tensor, reference: Tensor, dim: int | None = None) -> float:
    """Return the norm of ``error`` over that of ``reference``; the worst along dim."""
    norms = [torch.linalg.vector_norm(t, dim=dim) for t in (error, reference)]
    return float((norms[0] / norms[1].clamp_min(1e-30)).max())


def check_linear(
    layer: nn.Module,
    name: str,
    kind: str,
    quantized: dict[str, Tensor],
    state: dict[str, Tensor],
    divided: dict[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, object]:
    """Compare one replaced layer with the stored codes and with the float layer."""
    smoothed = f"{name}.div.mul_scale" in quantized
    prefix = f"{name}.linear" if smoothed else name
    stored = {
        leaf: quantized[f"{prefix}.{leaf}"].double()
        for leaf in ("bias", "weight_scale", "deq_scale", "input_scale", "quant_bias",
                     "input_offset")
        if f"{prefix}.{leaf}" in quantized
    }  # fmt: skip
    codes = quantized[f"{prefix}.weight"]
    mul = quantized[f"{name}.div.mul_scale"].double() if smoothed else torch.ones(1)
    out_features, in_features = codes.shape

    if kind == "W8A8":
        step, zero = stored["input_scale"], stored["input_offset"]
        scale = (stored["deq_scale"] / step).reshape(-1, 1)
        sums = stored["quant_bias"] + codes.double().sum(1) * zero
        bias = sums * stored["deq_scale"]
        uniform = torch.rand(2, 24, in_features, dtype=torch.float64) * 255 - 128
        x = step * (uniform - zero) / mul
    else:
        scale = stored["weight_scale"].reshape(-1, 1)
        bias = stored.get("bias", torch.zeros(out_features))
        x = torch.randn(2, 24, in_features, dtype=torch.float64)

    dequantized = codes.double() * scale
    rows = divided.get(f"{name}.rows", torch.ones(1)).double()
    columns = divided.get(f"{name}.columns", torch.ones(1)).double()
    float_weight = state[f"{name}.weight"].double() * columns / rows.unsqueeze(1)
    float_bias = state.get(f"{name}.bias", torch.zeros(out_features)).double() / rows
    # Keep the outputs of outlier rows inside the range of the dtype.
    peak = (x * mul @ dequantized.T + bias).abs().max()
    x = (x * min(1.0, float(torch.finfo(dtype).max / 2 / peak))).to(dtype)

    actual = layer(x)
    x = x.double()
    reference = x * mul @ dequantized.T + bias
    error = (actual.double() - reference).flatten(0, 1)
    reference = reference.flatten(0, 1)
    expected = (x @ float_weight.T + float_bias).flatten(0, 1)
    held = layer.get_buffer("weight")
    return {
        "type": kind,
        "class": type(layer).__name__,
        "dynamic": layer.is_dynamic,
        "smoothed": layer.mul_scale is not None,
        "codes_equal": torch.equal(held if kind == "W8A8" else held.T, codes),
        "output": [str(actual.dtype).removeprefix("torch."), *actual.shape],
        # against codes * scale, the whole output and its worst channel
        "forward_error": relative(error, reference),
        "channel_error": relative(error, reference, dim=0),
        # against the float layer: whole output; largest weight error in scale steps
        "float_error": relative(actual.double().flatten(0, 1) - expected, expected),
        "weight_steps": float(((dequantized - float_weight / mul) / scale).abs().max()),
    }


def mx_weight(kind: str, codes: Tensor, exponents: Tensor) -> Tensor:
    """What stored MX tensors stand for, by the formats' definition."""
    mx = importlib.import_module("torch_npu").mx
    if (kind == "W4A4_MXFP4") != (codes.dtype == torch.uint8):
        raise TypeError(f"{kind} in {codes.dtype}")
    weight: Tensor = mx.mx_values(codes, exponents.unflatten(1, (-1, 2)))
    return weight


def check_mx_linear(
    layer: nn.Module,
    name: str,
    kind: str,
    quantized: dict[str, Tensor],
    state: dict[str, Tensor],
    divided: dict[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, object]:
    """Compare one replaced MX layer with what is stored and with the float layer."""
    npu = importlib.import_module("torch_npu")
    smoothed = f"{name}.div.mul_scale" in quantized
    prefix = f"{name}.linear" if smoothed else name
    codes, exponents = quantized[f"{prefix}.weight"], quantized[f"{prefix}.weight_scale"]
    mul = quantized[f"{name}.div.mul_scale"].to(dtype) if smoothed else torch.ones(1, dtype=dtype)
    weight, bias = mx_weight(kind, codes, exponents), quantized[f"{prefix}.bias"].double()
    rows = divided.get(f"{name}.rows", torch.ones(1)).double()
    columns = divided.get(f"{name}.columns", torch.ones(1)).double()
    float_weight = state[f"{name}.weight"].double() * columns / rows.unsqueeze(1)
    float_bias = state[f"{name}.bias"].double() / rows
    x = torch.randn(2, 24, weight.shape[1]).to(dtype)
    actual = layer(x).double()
    wanted = npu.float8_e4m3fn if kind == "W8A8_MXFP8" else npu.float4_e2m1fn_x2
    rounded = npu.mx.mx_values(*npu.npu_dynamic_mx_quant((x * mul).flatten(0, 1), dst_type=wanted))
    reference = rounded @ weight.T + bias
    expected = (x.double() @ float_weight.T + float_bias).flatten(0, 1)
    held = layer.get_buffer("weight")
    return {
        "type": kind,
        "class": type(layer).__name__,
        "smoothed": layer.mul_scale is not None,
        "codes_equal": held.dtype == codes.dtype and torch.equal(held.view(torch.uint8), codes.view(torch.uint8)),
        "output": [str(layer(x).dtype).removeprefix("torch."), *actual.shape],
        # against rounded input and stored weight; against the float layer
        "forward_error": relative(actual.flatten(0, 1) - reference, reference),
        "float_error": relative(actual.flatten(0, 1) - expected, expected),
        "weight_error": relative(weight * mul.double() - float_weight, float_weight),
    }


def float_attention(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> tuple[Tensor]:
    """FP8 attention as its operator is documented: tiles times scales, softmax, in float64. [B, N, S, D]."""

    def wide(name: str, tensor: Tensor, rows: int) -> Tensor:
        scale = how[f"dequant_scale_{name}"].double()
        spread = scale.repeat_interleave(rows, 2)[:, :, : tensor.shape[2]]
        return tensor.double() * spread.repeat_interleave(128, 3)[..., : tensor.shape[3]]

    q, k, v = wide("query", query, 128), wide("key", key, 256), wide("value", value, 256)
    scores = (q @ k.transpose(-1, -2) * how["softmax_scale"]).softmax(-1)
    return ((scores @ v).to(how["out_dtype"]),)


def check_attention(module: nn.Module, heads: int, dtype: torch.dtype) -> dict[str, object]:
    """What `quantize` hung on an attention module, and how far its attention is from plain attention."""
    made: Any = module.fa_quant
    report: dict[str, object] = {"class": type(made).__name__, "rotated": getattr(made, "q_rot", None) is not None}
    size = module.get_submodule("norm_q").get_parameter("weight").shape[0] // heads
    q, k, v = (torch.randn(1, heads, 48, size).to(dtype) for _ in range(3))
    q[..., 0] *= 5  # an outlier, which a rotation spreads
    k[..., 0] *= 0.2
    due = (q.double() @ k.double().transpose(-1, -2) / size**0.5).softmax(-1) @ v.double()
    if report["rotated"]:
        create = importlib.import_module("mindiesd.quantization.utils").create_online_hadamard_rot
        report["own_rotation"] = torch.equal(made.q_rot, create(size, dtype=torch.bfloat16))
        report["same_rotation"] = torch.equal(made.q_rot, made.k_rot)
    if type(made).__name__ == "FP8RotateQuantFA":
        layer = importlib.import_module("mindiesd.quantization.layer")
        vars(layer)["fused_infer_attention_score_v2"] = float_attention  # the operator is compiled code for the NPU
        report["forward_error"] = relative(made(q, k, v).double() - due, due)
    else:
        turned, by = made._apply_rotate(q, k)
        scores = turned.double() @ by.double().transpose(-1, -2)
        plain = q.double() @ k.double().transpose(-1, -2)
        report["forward_error"] = relative(scores - plain, plain)
    return report


def inspect_folder(folder: Path, source: Path, dtype: torch.dtype, divided: dict[str, Tensor]) -> dict[str, object]:
    """Quantize the float model by ``folder`` and describe every linear of it."""
    quantize = importlib.import_module("mindiesd.quantization").quantize
    found = sorted(folder.glob("quant_model_description_*.json"))
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} description files in {folder}")
    state = read_tensors(source, "*.safetensors")
    model = build_model(state)
    before = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    model = quantize(model, str(found[0].absolute()), dtype=dtype)
    after = dict(model.named_modules())

    description = json.loads(found[0].read_text(encoding="utf-8"))
    quantized = read_tensors(folder, "quant_model_weight_*.safetensors")
    types = linear_types(description)
    report: dict[str, dict[str, object]] = {}
    left: list[str] = []
    wrong: dict[str, str] = {}
    torch.manual_seed(0)
    for name, original in before.items():
        kind, layer = types.get(name, "absent"), after[name]
        if kind == "FLOAT":
            kept = layer is original and type(layer) is nn.Linear
            if kept and torch.equal(layer.weight, state[f"{name}.weight"]):
                left.append(name)
            else:
                wrong[name] = f"FLOAT, yet now {type(layer).__name__}"
        elif kind not in INT8_TYPES + MX_TYPES:
            wrong[name] = f"type {kind}, which this check does not know"
        elif layer is original or isinstance(layer, nn.Linear):
            wrong[name] = f"{kind}, yet left alone"
        else:
            check = check_mx_linear if kind in MX_TYPES else check_linear
            report[name] = check(layer, name, kind, quantized, state, divided, dtype)
    for name in sorted(types.keys() - after.keys()):
        wrong[name] = "described, yet not in the model"
    heads = int(json.loads((source / "config.json").read_text(encoding="utf-8"))["num_heads"])
    marked = {name: module for name, module in after.items() if hasattr(module, "fa_quant")}
    return {
        "attention": {name: check_attention(module, heads, dtype) for name, module in marked.items()},
        "model_quant_type": description["model_quant_type"],
        "dtype": str(dtype).removeprefix("torch."),
        "quantized": report,
        "left_alone": left,
        "wrong": wrong,
    }


def main() -> int:
    """Parse the arguments, print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("float_folder", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--divided", type=Path)
    args = parser.parse_args()
    divided = load_file(args.divided) if args.divided else {}
    # Outside of the try: a broken installation is no refusal.
    importlib.import_module("mindiesd")
    try:
        result = inspect_folder(args.folder, args.float_folder, getattr(torch, args.dtype), divided)
    except Exception as error:
        message = {"type": type(error).__name__, "message": str(error)}
        print(json.dumps({"error": message}))
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
