"""A written folder against the float model that it was made from, layer by layer and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamq import outputs, wan
from streamq.checkpoint import BLOCK_SIZE, Checkpoint, Source, TensorInfo
from streamq.device.cpu import host_bytes
from streamq.dtypes import TORCH_DTYPES
from streamq.emulate import forward
from streamq.lora import deltas_of, open_source
from streamq.merge import merged
from streamq.methods.report import compare as compared
from streamq.quantized import QuantizedLinear, decode_vector
from streamq.savers.shard import HASH_CHUNK
from streamq.wan.model import FLOAT_DTYPES

ROWS_AT_A_TIME = 256
# Without a manifest there is no recorded error to compare with; int8 of a Wan layer stays near 0.01, 4 bits near 0.12.
ERROR_LIMITS = {"w8a8": 0.1, "w4a4": 0.3, "w4a4_nvfp4": 0.3, "w4a16": 0.3, "w4a4_mxfp4": 0.3}
DEAD_ROW, SMALL_ROW = 0.95, 0.1  # relative error of a row; its norm beside the mean row's
EMULATED_ROWS, EMULATED_LIMIT = 32, 0.5


@dataclass(frozen=True)
class _Folded:
    """Smoothing vectors that lie in other tensors than the layer's own: by layer, and by norm tensor."""

    columns: dict[str, Tensor]
    rows: dict[str, Tensor]
    norms: dict[str, Tensor]


@dataclass
class _Pair:
    """What is compared: the expert's float tensors and the written ones, and what the manifest says about both."""

    output: outputs.Output
    model: wan.Model
    floats: Source
    written: Source
    stored: dict[str, TensorInfo]
    checkpoint: Checkpoint
    folded: _Folded
    rounded: bool
    problems: list[str]

    def made(self, linear: wan.Linear) -> dict[str, Tensor]:
        """A layer's written tensors by suffix."""
        return layer_tensors(self.output, self.checkpoint, self.written, linear.native)


def compare(
    output: outputs.Output, checkpoint: Checkpoint, expert: wan.Expert, document: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(layer -> its errors against the source, what is wrong). `document`: the manifest, or {}."""
    prefix = f"{output.shown}/" if output.shown else ""
    label = f"{expert.name}/" if expert.name else ""
    layers: dict[str, dict[str, Any]] = {}
    kinds = output.format.layers_in(output.folder, checkpoint.tensors)
    quantized = {name for name, kind in kinds.items() if kind != "float"}
    recorded = _recorded(document, output)
    with closing(open_source(expert.model)) as floats, closing(Source(checkpoint)) as written:
        problems: list[str] = []
        folded = _folded(document, output, expert, problems)
        stored, rounded = output.floats(checkpoint), _rounded(document, output)
        pair = _Pair(output, expert.model, floats, written, stored, checkpoint, folded, rounded, problems)
        for linear in expert.model.linears + (expert.model.outer_linears if output.format.OUTER else ()):
            if linear.native not in quantized:
                continue
            about = recorded.get(label + linear.native, {})
            limit = about.get("rel_error", ERROR_LIMITS.get(kinds[linear.native], 0.1) / 1.01) * 1.01 + 1e-6
            found = _layer(pair, linear, limit, bool(about))
            if found is not None:
                layers[prefix + linear.native] = found | _on_data(about)
        problems += _wrong_vectors(pair)
        problems += _wrong_floats(pair, quantized)
    return layers, [prefix + one for one in problems]


def layer_tensors(
    output: outputs.Output, checkpoint: Checkpoint, written: Source, native: str
) -> dict[str, Tensor]:  # fmt: skip
    """A layer's written tensors by suffix."""
    name = (wan.to_diffusers(native) or native) if output.format.NAMES == "diffusers" else native
    infos = {n.removeprefix(wan.COMFYUI_PREFIX): info for n, info in checkpoint.tensors.items()}
    return {n.removeprefix(f"{name}."): read(written, info) for n, info in infos.items() if n.startswith(f"{name}.")}


def read(source: Source, info: TensorInfo) -> Tensor:
    """A whole tensor with its LoRAs, in its dtype, on the host; of a GGUF type uint8 [out, blocks, bytes of one]."""
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    source.read(info, 0, host_bytes(raw))
    if info.dtype not in TORCH_DTYPES and info.dtype not in BLOCK_SIZE:
        return raw  # of a dtype that no format writes: different from whatever is due
    if info.dtype in BLOCK_SIZE:
        return raw.view(*info.shape[:-1], -1, BLOCK_SIZE[info.dtype][1])
    return merged(source, info, raw.view(TORCH_DTYPES[info.dtype]).reshape(info.shape))


def extremes(source: Source, info: TensorInfo) -> tuple[float, float]:
    """Least and largest number of a float tensor, in chunks; NaN if one is among them. (0, 0) for no numbers."""
    lows, highs = [torch.zeros(())], [torch.zeros(())]
    for part in _chunks(source, info):
        values = torch.frombuffer(bytearray(part), dtype=TORCH_DTYPES[info.dtype])
        lows.append(values.amin().float())
        highs.append(values.amax().float())
    first = 0 if len(lows) == 1 else 1
    return float(torch.stack(lows[first:]).amin()), float(torch.stack(highs[first:]).amax())


def _layer(pair: _Pair, linear: wan.Linear, limit: float, known: bool) -> dict[str, Any] | None:
    """One layer's errors; what is wrong with it goes to `pair.problems`."""
    form = pair.output.format
    made, weight = pair.made(linear), read(pair.floats, linear.weight)
    try:
        error, cosine = _difference(weight, made, pair, linear.name, known)
    except (IndexError, KeyError, RuntimeError, ValueError):  # a tensor is missing, or has another shape or dtype
        pair.problems.append(f"{linear.native}: cannot be dequantized against this source")
        return None
    packed = form.unpack(made)
    found: dict[str, Any] = {"rel_error": error, "cosine": cosine}
    if not error <= limit:
        hint = (
            ""
            if known or packed is not None
            else "; without streamq.json a smoothing scale in other tensors is not known"
        )
        pair.problems.append(
            f"{linear.native}: relative error {error:.4g} against the source, at most {limit:.4g} due{hint}"
        )
    if linear.bias is not None:
        own = form.bias(made)
        due = _due(pair, linear.bias, pair.folded.rows.get(linear.name), None if own is None else own.dtype, True)
        if own is None or own.shape != due.shape or not torch.equal(own.to(due.dtype), due):
            pair.problems.append(f"{linear.native}.bias: differs from {pair.model.checkpoint.where(linear.bias)}")
    if packed is not None:
        found |= _emulated(weight, packed)
        if not found["emulated_rel_error"] <= EMULATED_LIMIT:
            wrong = f"{found['emulated_rel_error']:.4g}, at most {EMULATED_LIMIT} due"
            pair.problems.append(f"{linear.native}: the packed layer's output is off by {wrong}")
    return found


def _emulated(weight: Tensor, layer: QuantizedLinear) -> dict[str, float]:
    """Error of what the runtime computes from the packed tensors, on seeded noise as large as the layer expects it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EMULATED_ROWS, weight.shape[1], generator=generator)
    x = (x if layer.smooth is None else x * layer.smooth).bfloat16()
    due = x.float() @ weight.float().T + (0 if layer.bias is None else layer.bias.float())
    exact, half = (compared(due, forward(x, layer, half_accumulation=how).float())[0] for how in (False, True))
    return {"emulated_rel_error": exact, "emulated_rel_error_half": half}


def _difference(
    weight: Tensor, made: dict[str, Tensor], pair: _Pair, name: str, known: bool
) -> tuple[float, float]:  # fmt: skip
    """Relative error and cosine, a few rows at a time."""
    lost = norm = other = dot = 0.0
    lost_rows, rows_norm = [], []
    columns, scaled = pair.folded.columns.get(name), pair.folded.rows.get(name)
    decode = pair.output.format.decode(made)
    for start in range(0, weight.shape[0], ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        w = weight[rows].double()
        v = decode(rows).double()
        if columns is not None:
            v /= columns.double()
        if scaled is not None:
            v *= scaled[rows].double().unsqueeze(1)
        lost_rows.append((w - v).square().sum(dim=1))
        rows_norm.append(w.square().sum(dim=1))
        lost += float(lost_rows[-1].sum())
        norm += float(rows_norm[-1].sum())
        other += float(v.square().sum())
        dot += float((w * v).sum())
    dead = None if known else _dead_row(torch.cat(lost_rows), torch.cat(rows_norm))
    if dead is not None:  # the run's own figures and checksums say more, where they are known
        pair.problems.append(f"{wan.to_native(name)}: nothing of the source is left in row {dead}")
    if not norm or not other:
        return (0.0, 1.0) if norm == other else (1.0, 0.0)
    return (lost / norm) ** 0.5, dot / (norm * other) ** 0.5


def _dead_row(lost: Tensor, norm: Tensor) -> int | None:
    """The first row that is off by as much as it is large; small ones beside the others' mean may be."""
    dead = (lost > DEAD_ROW**2 * norm) & (norm > SMALL_ROW**2 * norm.mean())
    return int(dead.nonzero()[0]) if bool(dead.any()) else None


# -- What the manifest says --------------------------------------------------------------------------------------------


def _rounded(document: dict[str, Any], output: outputs.Output) -> bool:
    """Whether the biases went through bf16: `convert_model_dtype` under `--match msmodelslim`."""
    made = document.get("formats", {}).get(output.format_name, {})
    settings = made.get("recipe", {}).get("spec", {}).get("multimodal_sd_config") or {}
    config = settings.get("inference_config") or settings.get("model_config") or {}
    return document.get("options", {}).get("match") == "msmodelslim" and bool(config.get("convert_model_dtype"))


def _recorded(document: dict[str, Any], output: outputs.Output) -> dict[str, dict[str, Any]]:
    layers = document.get("formats", {}).get(output.format_name, {}).get("layers", {})
    return {name: about for name, about in layers.items() if "rel_error" in about}


def _folded(document: dict[str, Any], output: outputs.Output, expert: wan.Expert, problems: list[str]) -> _Folded:
    found = _Folded({}, {}, {})
    label = f"{expert.name}/" if expert.name else ""
    groups = {group.name: group for group in wan.GROUPS}
    made = document.get("formats", {}).get(output.format_name, {}).get("smoothing", {})
    for name, entry in made.items():
        block = wan.block_of(name.removeprefix(label))
        if not name.startswith(label) or block is None:
            continue
        try:
            group, vector = groups[name.removeprefix(f"{label}{block}.")], decode_vector(entry["values"])
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"streamq.json: smoothing of {name} cannot be read ({error})")
            continue
        found.columns.update({f"{block}.{layer}": vector for layer in group.layers})
        if entry["way"] == "rows":
            found.rows.update({f"{block}.{layer}": vector for layer in group.makers})
        if entry["way"] == "norm":
            found.norms.update({f"{block}.{group.norm}.{leaf}": vector for leaf in ("weight", "bias")})
    return found


def _on_data(about: Mapping[str, Any]) -> dict[str, Any]:
    """What the run measured on calibration data, which only it had."""
    return {key: about[key] for key in ("output_rel_error", "output_cosine", "before") if key in about}


# -- Everything that is not a quantized weight -------------------------------------------------------------------------


def _wrong_vectors(pair: _Pair) -> list[str]:
    """Vectors beside norms that are not those by which the layers behind were scaled; ones where nothing was."""
    found = []
    form, tensors = pair.output.format, pair.checkpoint.tensors
    for block in pair.model.blocks:
        for group in (group for group in wan.GROUPS if group.adaln):
            vector = pair.folded.columns.get(f"{block}.{group.layers[0]}", torch.ones(pair.model.dim))
            specs = form.vector_specs(f"{block}.{group.adaln}", pair.model.dim)
            for spec, due in zip(specs, form.encode_vector(vector), strict=False):
                info = tensors.get(spec.name)
                if info is not None and not torch.equal(read(pair.written, info).float(), due):
                    found.append(f"{spec.name}: not the scale that the layers behind it were smoothed by")
    return found


def _wrong_floats(pair: _Pair, quantized: set[str]) -> list[str]:
    """Tensors that should have the source's values and have not."""
    found = []
    for name, info in pair.model.tensors.items():
        native = wan.to_native(name)
        if native.rpartition(".")[0] in quantized:
            continue
        mine, vector = pair.stored.get(native), pair.folded.norms.get(name)
        floats = mine is not None and mine.dtype in FLOAT_DTYPES  # codes of a layer that nothing says to be quantized
        if mine is None or not floats or mine.shape != info.shape or not _same(pair, info, mine, vector):
            found.append(f"{native}: differs from {pair.model.checkpoint.where(info)}")
    return found


def _same(pair: _Pair, info: TensorInfo, mine: TensorInfo, vector: Tensor | None) -> bool:
    if vector is not None or info.dtype != mine.dtype or deltas_of(pair.model, [info]):
        own = read(pair.written, mine)
        due = _due(pair, info, vector, own.dtype, False)
        return torch.equal(own.to(due.dtype), due)
    return all(a == b for a, b in zip(_chunks(pair.floats, info), _chunks(pair.written, mine), strict=True))


def _due(
    pair: _Pair, info: TensorInfo, vector: Tensor | None, dtype: torch.dtype | None, bias: bool
) -> Tensor:  # fmt: skip
    """A float tensor as it should be stored in `dtype`."""
    due = read(pair.floats, info)
    if vector is not None:
        due = due.float() / vector
    if bias and pair.rounded:
        due = due.bfloat16()
    return due if dtype is None else due.to(dtype)


def _chunks(source: Source, info: TensorInfo) -> Iterator[bytes]:
    buffer = bytearray(min(info.nbytes, HASH_CHUNK))
    for start in range(0, info.nbytes, HASH_CHUNK):
        view = memoryview(buffer)[: min(HASH_CHUNK, info.nbytes - start)]
        source.read(info, start, view)
        yield bytes(view)
