"""Layers, models and written folders for the tests of the nunchaku format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import synthetic
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamq import wan
from streamq.checkpoint import TensorInfo, read_header
from streamq.dtypes import TORCH_DTYPES
from streamq.pairs import Pair, QConfig
from streamq.quantized import LowRank, QuantizedLinear, Scheme
from streamq.savers import SaveOptions, Spec, nunchaku

GOLDEN = Path(__file__).parent / "data" / "nunchaku"
FILES = {
    "int4_128x128_r32": "w4a4", "int4_256x384_r32": "w4a4", "nvfp4_128x128_r32": "w4a4_nvfp4", "awq_128x128": "w4a16",
}  # fmt: skip
KINDS = ("w4a4", "w4a4_nvfp4", "w4a16")
FOLDER, SINGLE = SaveOptions("folder"), SaveOptions("single")


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(logical, packed) tensors of a golden file, by what follows the dot."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return tuple(  # type: ignore[return-value]
        {key.removeprefix(kind): tensor for key, tensor in tensors.items() if key.startswith(kind)}
        for kind in ("logical.", "packed.")
    )


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def scheme(kind: str, method: str = "minmax", rank: int | None = None) -> Scheme:
    ext = () if rank is None else (("rank", rank),)
    if kind == "w4a16":
        pair = Pair(QConfig("per_token", "float"), QConfig("per_group", "int4", False, method, ext))
    else:
        dtype = "nvfp4" if kind == "w4a4_nvfp4" else "int4"
        pair = Pair(QConfig("per_group", dtype), QConfig("per_group", dtype, True, method, ext))
    assert pair.type == kind
    return Scheme(kind, pair, nunchaku.RULES[None])


def layer_of(kind: str, logical: Mapping[str, Tensor]) -> QuantizedLinear:
    """A golden file's logical tensors as the record that methods make."""
    made = QuantizedLinear(
        scheme(kind, "mse") if kind == "w4a16" else scheme(kind, "svdquant", 32),
        logical["codes"].to(torch.int8), logical["scales"].float(), logical["bias"], torch.bfloat16, 0.0,
    )  # fmt: skip
    if kind == "w4a16":
        return replace(made, zeros=logical["zeros"].float())
    down = (logical["down_smoothed"].double() / logical["smooth"].double()).bfloat16()
    whole = logical["tensor_scale"].float() if kind == "w4a4_nvfp4" else None
    return replace(
        made, smooth=logical["smooth"].float(), low_rank=LowRank(down, logical["up"]), tensor_scale=whole
    )  # fmt: skip


def layer(kind: str, rows: int = 256, columns: int = 128, rank: int = 32, seed: int = 0) -> QuantizedLinear:
    """A random layer that has everything its type may have."""
    chance = torch.Generator().manual_seed(seed)

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, generator=chance).add_(0.01).bfloat16().float()

    least, most = (-7, 8) if kind == "w4a4" else (0, 16)
    codes = torch.randint(least, most, (rows, columns), generator=chance, dtype=torch.int8)
    scales = positive(rows, columns // (16 if kind == "w4a4_nvfp4" else 64))
    bias = torch.randn(rows, generator=chance)
    if kind == "w4a16":
        zeros = -positive(rows, columns // 64)
        return QuantizedLinear(scheme(kind, "mse"), codes, scales, bias, torch.float32, 0.0, zeros=zeros)
    if kind == "w4a4_nvfp4":
        scales = (scales * 100).to(torch.float8_e4m3fn).float()
    branch = LowRank(*(torch.randn(shape, generator=chance).bfloat16() for shape in ((rank, columns), (rows, rank))))
    return QuantizedLinear(
        scheme(kind, "svdquant", rank), codes, scales, bias, torch.float32, 0.0, smooth=positive(columns),
        tensor_scale=positive(1) if kind == "w4a4_nvfp4" else None, low_rank=branch,
    )  # fmt: skip


def by_suffix(made: QuantizedLinear, options: SaveOptions = FOLDER) -> dict[str, Tensor]:
    """What `encode` returns, under the suffixes of `quantized_specs`."""
    rows, columns = made.codes.shape
    has = made.bias is not None
    specs = nunchaku.quantized_specs(linear("x", rows, columns, bias=has), made.scheme, options)
    return {spec.name.removeprefix("x."): t for spec, t in zip(specs, nunchaku.encode(made, options), strict=True)}


def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> wan.Linear:
    weight = TensorInfo(f"{name}.weight", 0, "F32", (rows, columns), 0, 4 * rows * columns)
    return wan.Linear(name, weight, TensorInfo(f"{name}.bias", 0, "F32", (rows,), 0, 4 * rows) if bias else None)


def model(out: Path, family: str = "t2v-1.3B", dim: int = 128, blocks: int = 2, **how: Any) -> wan.Model:
    """The first expert of a synthetic checkpoint whose block linears all fit."""
    how = {"layout": "diffusers"} | how
    sizes = replace(synthetic.tiny(synthetic.FAMILIES[family], blocks), dim=dim, ffn=2 * dim, heads=dim // 128 or 1)
    synthetic.write(out, sizes, **how)
    return wan.open_model(out / how.get("single_file", ""))[0].model


def specs_of(of: wan.Model, schemes: Mapping[str, Scheme | None], options: SaveOptions) -> list[Spec]:
    """Every tensor of a folder, in model order."""
    linears = {one.name: one for one in of.linears}
    found: list[Spec] = []
    for name, info in of.tensors.items():
        module, _, leaf = name.rpartition(".")
        how = schemes.get(linears[module].native) if module in linears else None
        if how is None:
            found.append(nunchaku.passed_spec(name, info.dtype, info.shape, wan.unit_of(name), options))
        elif leaf == "weight":
            found += nunchaku.quantized_specs(linears[module], how, options)
    return found


def write(
    of: wan.Model, out: Path, choose: Callable[[str], Scheme | None], options: SaveOptions = FOLDER
) -> dict[str, Scheme | None]:
    """A folder with random numbers in it, with the files and documents of the format; returns its schemes."""
    schemes = {one.native: choose(one.native) for one in of.linears}
    specs = specs_of(of, schemes, options)
    values = {spec.name: torch.ones(spec.shape).to(TORCH_DTYPES[spec.dtype]) for spec in specs}
    for number, one in enumerate(of.linears):
        how = schemes[one.native]
        if how is not None:
            made = layer(how.type, *one.weight.shape, nunchaku.rank_of(how), seed=number)
            names = [spec.name for spec in nunchaku.quantized_specs(one, how, options)]
            values |= dict(zip(names, nunchaku.encode(made, options), strict=True))
    out.mkdir(parents=True)
    files = nunchaku.files(specs, schemes, options)
    for file, inside in files:
        save_file({s.name: values[s.name].clone() for s in inside}, out / file, nunchaku.metadata(of, schemes, options))
    for document in nunchaku.documents(of, files, schemes, options, []):
        (out / document.name).write_bytes(document.content)
    return schemes


def headers(folder: Path) -> dict[str, TensorInfo]:
    """A folder's header table, files numbered by name."""
    found = {}
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        found |= {info.name: info for info in read_header(path, folder, number)[1]}
    return found
