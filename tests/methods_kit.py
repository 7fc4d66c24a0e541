"""What the tests of weight methods share: schemes by type, matrices with the rows that break things, golden files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from streamq.pairs import Pair, QConfig
from streamq.quantized import Rule, Scheme

DATA = Path(__file__).parent / "data"
FLOAT = QConfig("per_tensor", "float")
PAIRS = {
    "w8a8": Pair(QConfig("per_token", "int8"), QConfig("per_channel", "int8")),
    "w8a16": Pair(FLOAT, QConfig("per_channel", "int8")),
    "fp8": Pair(QConfig("per_token", "fp8_e4m3"), QConfig("per_channel", "fp8_e4m3")),
    "q8_0": Pair(FLOAT, QConfig("per_block", "int8")),
    "q4_0": Pair(FLOAT, QConfig("per_block", "int4")),
    "w8a8_mxfp8": Pair(QConfig("per_block", "mxfp8"), QConfig("per_block", "mxfp8")),
    "w4a4_mxfp4": Pair(QConfig("per_block", "mxfp4"), QConfig("per_block", "mxfp4")),
}
MINDIE = Rule(scale_floor=2.0**-23)
MATCH_MINDIE = Rule(scale_floor=2.0**-23, scale_dtype="source", arithmetic="source")
LIGHTX2V = Rule(amax_floor=1e-5, scale_dtype="BF16", qmin=-127)
MATCH_LIGHTX2V = Rule(amax_floor=1e-5, scale_dtype="source", arithmetic="source", fp8_halves="away")
TORCHAO = Rule(arithmetic="torchao")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every type with every rule that some format has for it, and its methods.
EVERY: list[tuple[str, Rule, str, dict[str, object]]] = [
    ("w8a8", MINDIE, "minmax", {}), ("w8a8", LIGHTX2V, "minmax", {"convrot": 16}), ("w8a8", TORCHAO, "minmax", {}),
    ("w8a8", MATCH_LIGHTX2V, "minmax", {}), ("w8a16", TORCHAO, "minmax", {}), ("w8a16", TORCHAO, "mse", {}),
    ("fp8", LIGHTX2V, "minmax", {}), ("fp8", MATCH_LIGHTX2V, "minmax", {}), ("fp8", TORCHAO, "minmax", {}),
    ("q8_0", Rule(), "minmax", {}), ("q4_0", Rule(), "minmax", {}),
    ("w8a8_mxfp8", MINDIE, "minmax", {}), ("w8a8_mxfp8", MINDIE, "mse_round", {}),
    ("w8a8_mxfp8", MATCH_MINDIE, "mse_round", {}), ("w4a4_mxfp4", MINDIE, "minmax", {}),
    ("w4a4_mxfp4", MATCH_MINDIE, "ceil_x", {}), ("w4a4_mxfp4", MINDIE, "ceil_x", {"enable_search": True}),
]  # fmt: skip


def scheme(kind: str, rule: Rule, method: str = "minmax", scope: str = "", **ext: object) -> Scheme:
    """A scheme of a type, with another method, scope and `ext` of the weight."""
    pair = PAIRS[kind]
    weight = QConfig(scope or pair.weight.scope, pair.weight.dtype, method=method, ext=tuple(sorted(ext.items())))
    return Scheme(kind, Pair(pair.act, weight), rule)


def edges(rows: int = 40, columns: int = 128, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random rows, the first ones special: zeros, -0.0, tiny, huge, an outlier, ties, one sign, many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.05
    w[0] = 0
    w[1] = torch.where(w[1] > 0, 0.0, -0.0)
    w[2] *= 1e-7
    w[3] *= 2.0**17 if dtype == torch.float16 else 1e6
    w[4, 7] = 30
    w[5] = torch.arange(columns).remainder(9) * 0.5 - 2
    w[6] = -w[6].abs()
    w[7] *= 2.0 ** torch.randint(-14, 4, (columns,), generator=generator)
    w[8, : columns // 2] = 0
    w[9] = w[9].sign()
    w[10] *= 1e-9
    return w.to(dtype)


def golden_weights(folder: str) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, or a file, below tests/data."""
    path = DATA / folder
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, for comparing NaN and -0 too."""
    return tensor.contiguous().view(torch.uint8)
