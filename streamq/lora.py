"""LoRAs that are merged into the weights before anything looks at them: which key of a file changes which tensor.

    W' = W + strength · alpha / rank · up @ down        in fp32, LoRA after LoRA, rounded once to W's own dtype

From headers alone; `streamq.merge` does the arithmetic. A key that does not fit is an error: a LoRA that is merged in
part is another one. Needs no torch.

Keys: kohya-ss/musubi-tuner `networks/lora_wan.py`, huggingface/diffusers `loaders/lora_conversion_utils.py`,
ModelTC/LightX2V `lightx2v/utils/lora_loader.py`, Comfy-Org/ComfyUI `comfy/lora.py` and `lora_convert.py`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamq.checkpoint import PICKLE_SUFFIXES, Checkpoint, Source, TensorInfo, load_json, parse_json, read_header
from streamq.errors import RunError, UsageError
from streamq.options import LoraOption
from streamq.wan import Expert, Model, to_native
from streamq.wan.model import FLOAT_DTYPES
from streamq.wan.names import modulation_of

TILE = 4 << 20  # bytes of fp32 weights that are merged at a time
TILE_ROWS = 64  # of which a tile has a multiple: with fewer, kernels round products of one weight in several ways
# What an alpha may be, and how struct calls it.
ALPHA_DTYPES = {"F64": "d", "F32": "f", "F16": "e", "BF16": "f", "I64": "q", "I32": "i", "I16": "h", "U8": "B"}
MAX_CONFIG_BYTES = 1 << 20
# Before a module's name; the longest that fits is taken off.
PREFIXES = ("", "diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.", "model.", "unet.",
            "transformer.base_model.model.", "pipe.dit.")  # fmt: skip
# Before a name whose dots are underscores; two of them are Wan-Fun's.
FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
# A key's end -> which part it is; `\1` may be the name of an adapter.
_DOWN = re.compile(r"\.lora_A(\.\w+)?\.weight|\.lora_A|[._]lora\.down\.weight|\.lora(_linear_layer\.|_)down\.weight")
_UP = re.compile(r"\.lora_B(\.\w+)?\.weight|\.lora_B|[._]lora\.up\.weight|\.lora(_linear_layer\.|_)up\.weight")
_ENDS = {
    "down": _DOWN, "up": _UP, "up_bias": re.compile(r"\.lora_B(\.\w+)?\.bias|\.lora_up\.bias"),
    "alpha": re.compile(r"\.alpha"), "diff": re.compile(r"\.diff|\.w_norm"),
    "diff_b": re.compile(r"\.diff_b|\.b_norm"), "diff_m": re.compile(r"\.diff_m"),
}  # fmt: skip
_PARTS = re.compile("(?P<base>.*?)(?:" + "|".join(f"(?P<{part}>{end.pattern})" for part, end in _ENDS.items()) + ")")
_OTHER_KINDS = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"), "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"), "a Tucker core (lora_mid)": re.compile(r"\.lora_mid"),
    "OFT": re.compile(r"\.(oft|boft)_"), "replaced weights": re.compile(r"\.(set_weight|reshape_weight)$"),
}  # fmt: skip
_TEXT_ENCODER = re.compile(r"(lora_te\d?_|text_encoders?[._]|text_model\.|cond_stage_model\.|conditioner\.|umt5|t5xxl)")


@dataclass(frozen=True, slots=True)
class Delta:
    """What one LoRA adds to one tensor. `factors`: (down, up), or the difference itself.

    file: number of the LoRA in its plan. alpha: its tensor, whose value is known once the file is open, or a number;
    None: as large as the rank. rank: 0 for a difference, which alpha does not scale.
    """

    file: int
    strength: float
    rank: int
    alpha: TensorInfo | float | None
    factors: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        stored = self.alpha.nbytes if isinstance(self.alpha, TensorInfo) else 0
        return sum(info.nbytes for info in self.factors) + stored


@dataclass(frozen=True)
class Lora:
    """One opened file. `alpha`: by its adapter's configuration, for modules without one of their own."""

    option: LoraOption
    checkpoint: Checkpoint
    alpha: float | None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the result, as far as headers tell; no path."""
        file = self.checkpoint.files[0]
        known = {} if self.alpha is None else {"alpha": self.alpha}
        return {
            "file": file.name, "bytes": file.size, "header_sha256": file.header_sha256,
            "strength": self.option.strength, "expert": self.option.expert,
        } | known  # fmt: skip

    @property
    def shown(self) -> str:
        """`style.safetensors at 0.8`, for tables and the model card."""
        whose = f" ({self.option.expert})" if self.option.expert else ""
        return f"{self.checkpoint.files[0].name} at {self.option.strength:g}{whose}"


@dataclass(frozen=True)
class LoraPlan:
    """The LoRAs of one transformer, in the order of the command line, and what they do to it.

    deltas: stored name of a tensor in the model's checkpoint -> what is added to it, in order.
    """

    loras: tuple[Lora, ...]
    deltas: Mapping[str, tuple[Delta, ...]]


def open_loras(options: Sequence[LoraOption], *, outside: Path | None = None) -> list[Lora]:
    """Read the headers of what `--lora` names. Raises UsageError, also for a file below `outside`, the output folder:
    `--overwrite` would discard it."""
    found = [_open(option) for option in options]
    for path in (lora.checkpoint.files[0].path.resolve() for lora in found if outside is not None):
        if outside is not None and path.is_relative_to(outside.resolve()):
            raise UsageError(f"--save_path {outside}: holds the LoRA {path}; choose another folder")
    return found


def attach(experts: Sequence[Expert], loras: Sequence[Lora]) -> list[Expert]:
    """The same experts, each with its LoRAs' plan. Raises UsageError for a key or a shape that does not fit."""
    names = [expert.name for expert in experts]
    for lora in loras:
        if lora.option.expert and lora.option.expert not in names:
            raise UsageError(
                f"--lora {lora.option}: the model has one transformer, no {lora.option.expert}; leave the name out"
            )
    return [_with(expert, [lora for lora in loras if lora.option.expert in ("", expert.name)]) for expert in experts]


def loras_of(models: Iterable[Model]) -> list[Lora]:
    """Every LoRA of some transformers, once, in the order of the command line where all go to all."""
    found: dict[int, Lora] = {}
    for model in models:
        found |= {id(lora): lora for lora in (model.lora.loras if model.lora else ())}
    return list(found.values())


def _with(expert: Expert, loras: list[Lora]) -> Expert:
    if not loras:
        return expert
    names, deltas = _Names(expert.model), dict[str, tuple[Delta, ...]]()
    for number, lora in enumerate(loras):
        for stored, more in _deltas(number, lora, expert, names).items():
            deltas[stored] = (*deltas.get(stored, ()), *more)
    return replace(expert, model=replace(expert.model, lora=LoraPlan(tuple(loras), deltas)))


# -- Files -------------------------------------------------------------------------------------------------------------


def _open(option: LoraOption) -> Lora:
    path, where = option.path, f"--lora {option}"
    try:
        kind = "folder" if path.is_dir() else "file" if path.is_file() else "pipe" if path.exists() else ""
    except OSError as error:
        raise UsageError(f"{where[:300]}: {error.strerror}; check the path") from error
    if not kind:
        raise UsageError(f"{where}: no such file or folder; a strength is a number behind the last colon (PATH:0.8)")
    if kind == "folder":
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            pickles = [one.name for one in sorted(path.iterdir()) if one.suffix in PICKLE_SUFFIXES]
            if not found and pickles:
                raise UsageError(f"{where}: {pickles[0]} is a pickle, which streamq never opens: convert it")
            names = f" ({', '.join(one.name for one in found[:3])}, …)" if found else ""
            raise UsageError(f"{where}: {len(found)} .safetensors files in it{names}, one is due; give the file")
        path = found[0]
    file, infos = read_header(path, path.parent)
    if not infos:
        raise UsageError(f"{where}: no tensor in it; give a LoRA")
    checkpoint = Checkpoint(path.parent, (file,), {info.name: info for info in infos})
    return Lora(option, checkpoint, _adapter_alpha(path, where))


def _adapter_alpha(path: Path, where: str) -> float | None:
    """alpha by the adapter's configuration, which diffusers puts into the header, and PEFT beside the file.

    None where there is none. Raises UsageError for one that scales modules differently, or is not a plain LoRA.
    """
    with open(path, "rb") as stream:
        header = parse_json(stream.read(int.from_bytes(stream.read(8), "little")), str(path))
    config, beside = None, path.with_name("adapter_config.json")
    if (text := header.get("__metadata__", {}).get("lora_adapter_metadata")) is not None:
        config = parse_json(text.encode(), f"{path}: lora_adapter_metadata")
    elif path.stem == "adapter_model" and beside.is_file():
        config = load_json(beside, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        return None
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    for key in ("use_dora", "use_rslora", "alpha_pattern"):
        if config.get(key):
            raise UsageError(
                f"{where}: its adapter's configuration sets {key}, which streamq does not merge; merge it in the"
                " library that wrote it, and give the merged model"
            )
    alpha = config.get("lora_alpha")
    if alpha is not None and (not isinstance(alpha, int | float) or not math.isfinite(alpha)):
        raise UsageError(f"--lora {path}: lora_alpha {alpha!r:.40} in its configuration is no number; correct it")
    return None if alpha is None else float(alpha)


# -- Names -------------------------------------------------------------------------------------------------------------


class _Names:
    """A model's tensors under every name that a LoRA may have for them."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._tensors: dict[str, str] = {}  # native and diffusers name -> diffusers name
        for name in model.tensors:
            self._tensors[name] = self._tensors[to_native(name)] = name
        self._modules = {name.removesuffix(end) for name in self._tensors for end in ("", ".weight", ".bias")}
        self._modules |= {name.rpartition(".")[0] for name in self._tensors if "." in name}  # of a modulation
        self._flat: dict[str, str | None] = {}
        for module in sorted(self._modules):
            flat = module.replace(".", "_")
            self._flat[flat] = module if self._flat.get(flat, module) == module else None

    def module(self, base: str) -> str | None:
        """A key's module by its native or diffusers name; None for one that the model lacks."""
        for prefix in sorted(PREFIXES, key=len, reverse=True):
            if base.startswith(prefix) and base.removeprefix(prefix) in self._modules:
                return base.removeprefix(prefix)
        for prefix in FLAT_PREFIXES:
            if base.startswith(prefix) and (found := self._flat.get(base.removeprefix(prefix))) is not None:
                return found
        return None

    def tensor(self, module: str, part: str) -> str | None:
        """The diffusers name of the tensor that a part changes."""
        if part in ("diff_b", "up_bias"):
            return self._tensors.get(f"{module}.bias")
        if part == "diff_m":
            return next((self._tensors[n] for n in modulation_of(module) if n in self._tensors), None)
        return self._tensors.get(f"{module}.weight") or self._tensors.get(module)


def _deltas(number: int, lora: Lora, expert: Expert, names: _Names) -> dict[str, list[Delta]]:
    """Stored name -> what one LoRA adds to it."""
    refuse, infos = _Refusal(lora, expert), lora.checkpoint.tensors
    for kind, pattern in _OTHER_KINDS.items():
        refuse.any([key for key in infos if pattern.search(key)], f"are of a kind that streamq does not merge: {kind}",
                   "merge it with the tool that trained it, and give the merged model")  # fmt: skip
    refuse.any([key for key in infos if _TEXT_ENCODER.match(key)], "belong to a text encoder",
               "streamq merges into the transformer alone: save the LoRA without them")  # fmt: skip
    modules: dict[str, dict[str, TensorInfo]] = {}
    unmatched, twice = [], []
    for key, info in infos.items():
        match = _PARTS.fullmatch(key)
        part = match.lastgroup if match else None
        module = names.module(match["base"]) if match else None
        if match is None or part is None or module is None or (
            part != "alpha" and names.tensor(module, part) is None
        ):  # fmt: skip
            unmatched.append(key)
        elif part in modules.setdefault(module, {}):
            twice.append(key)
        else:
            modules[module][part] = info
    refuse.any(unmatched, f"match nothing in this {expert.model.family} model of {expert.model.n_blocks} blocks",
               "give a LoRA that was made for this model")  # fmt: skip
    found: dict[str, list[Delta]] = {}
    halves, seen = [], dict[tuple[str, bool], str]()
    for module, parts in modules.items():
        lone = [parts[part] for part in ("down", "up", "up_bias") if part in parts and not {"down", "up"} <= set(parts)]
        if set(parts) == {"alpha"}:
            lone = [parts["alpha"]]
        halves += [info.name for info in lone]
        for delta, name in () if lone else _module(number, lora, module, parts, names, refuse):
            key = delta.factors[0].name
            if seen.setdefault((name, len(delta.factors) == 2), key) != key:  # native and diffusers names at once
                twice.append(key)
            found.setdefault(expert.model.tensors[name].name, []).append(delta)
    refuse.any(halves, "lack the other half of their pair (down and up, A and B)", "save the LoRA again, whole")
    refuse.any(twice, "change a tensor that another key changes in the same way", "remove one of the two")
    return found


def _module(
    number: int, lora: Lora, module: str, parts: Mapping[str, TensorInfo], names: _Names, refuse: _Refusal
) -> list[tuple[Delta, str]]:
    """One module's deltas, the low-rank product first, each with the diffusers name of its tensor."""
    strength, rank, found = lora.option.strength, 0, []
    alpha: TensorInfo | float | None = parts.get("alpha")
    for part, info in parts.items():
        known: Iterable[str] = ALPHA_DTYPES if part == "alpha" else FLOAT_DTYPES
        if info.dtype not in known:
            refuse.one(info, f"dtype {info.dtype}", "LoRAs are read in F32, BF16 and F16: convert it")
    if isinstance(alpha, TensorInfo) and math.prod(alpha.shape) != 1:
        refuse.one(alpha, f"shape {list(alpha.shape)}", "an alpha is one number")
    if "down" in parts:
        down, up = parts["down"], parts["up"]
        name = names.tensor(module, "down")
        assert name is not None
        rank = _check_pair(down, up, names.model.tensors[name], refuse)
        alpha = lora.alpha if alpha is None else alpha
        found.append((Delta(number, strength, rank, alpha, (down, up)), name))
    for part in ("diff", "diff_b", "diff_m", "up_bias"):
        if part not in parts:
            continue
        name = names.tensor(module, part)
        assert name is not None
        due, info = names.model.tensors[name], parts[part]
        if [n for n in info.shape if n != 1] != [n for n in due.shape if n != 1]:
            refuse.one(info, f"shape {list(info.shape)}, {due.name} has {list(due.shape)}", "give one for this model")
        scaled = part == "up_bias"
        found.append((Delta(number, strength, rank * scaled, alpha if scaled else None, (info,)), name))
    return found


def _check_pair(down: TensorInfo, up: TensorInfo, due: TensorInfo, refuse: _Refusal) -> int:
    """The rank of a pair that fits; a convolution's is seen as a matrix."""
    rows, columns = matrix_of(due.shape)
    if len(due.shape) < 2:
        refuse.one(down, f"a low-rank pair for {due.name} of shape {list(due.shape)}", "only matrices have one")
    if len(down.shape) < 2 or down.shape[0] == 0 or math.prod(down.shape[1:]) != columns:
        refuse.one(
            down, f"shape {list(down.shape)}, {due.name} {list(due.shape)} needs [rank, {columns}]",
            "give a LoRA that was made for this model",
        )  # fmt: skip
    rank = down.shape[0]
    if len(up.shape) < 2 or up.shape[:2] != (rows, rank) or math.prod(up.shape[2:]) != 1:
        refuse.one(
            up, f"shape {list(up.shape)}, {due.name} {list(due.shape)} and rank {rank} need [{rows}, {rank}]",
            "give a LoRA that was made for this model",
        )  # fmt: skip
    return rank


@dataclass(frozen=True)
class _Refusal:
    """The wording of what does not fit."""

    lora: Lora
    expert: Expert

    def any(self, keys: list[str], what: str, advice: str) -> None:
        """Raise UsageError if there are such keys: the first few and their number."""
        if keys:
            total = len(self.lora.checkpoint.tensors)
            some = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
            whose = f" for {self.expert.name}" if self.expert.name else ""
            raise UsageError(
                f"--lora {self.lora.option}{whose}: {len(keys)} of its {total} keys {what}: {some}; {advice}"
            )

    def one(self, info: TensorInfo, what: str, advice: str) -> None:
        """Raise UsageError about one tensor of the LoRA."""
        raise UsageError(f"--lora {self.lora.option}: {info.name}: {what}; {advice}")


# -- What merging takes ------------------------------------------------------------------------------------------------


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor as it is merged: a convolution's kernel is one row, a vector is a row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def tile_rows(shape: tuple[int, ...]) -> int:
    """Rows that are merged at a time."""
    rows, columns = matrix_of(shape)
    return min(rows, max(TILE // (4 * columns) // TILE_ROWS, 1) * TILE_ROWS)


def merge_nbytes(shape: tuple[int, ...], deltas: Sequence[Delta]) -> int:
    """Bytes of fp32 temporaries while deltas are merged into one tensor: its tile twice, and factors as fp32."""
    rows, columns = tile_rows(shape), matrix_of(shape)[1]
    ranks = [delta.rank for delta in deltas if len(delta.factors) == 2]
    halves = sum(rank * columns for rank in ranks) + max(ranks, default=0) * rows
    return 4 * (2 * rows * columns + halves) + 64 * (3 + len(ranks))


def deltas_of(model: Model, infos: Sequence[TensorInfo]) -> tuple[tuple[Delta, ...], ...]:
    """What is added to each of some tensors of a model; () where nothing is added to any."""
    found = tuple(model.lora.deltas.get(info.name, ()) for info in infos) if model.lora else ()
    return found if any(found) else ()


# -- Bytes -------------------------------------------------------------------------------------------------------------


class MergedSource(Source):
    """A checkpoint's open files and its LoRAs'. `read` gives what is stored; `streamq.merge` adds the deltas.

    Raises RunError for an alpha that is not finite.
    """

    def __init__(self, checkpoint: Checkpoint, plan: LoraPlan) -> None:
        self.lora = plan
        self._loras: list[Source] = []
        super().__init__(checkpoint)
        try:
            for lora in plan.loras:
                self._loras.append(Source(lora.checkpoint))
            deltas = [delta for found in plan.deltas.values() for delta in found]
            self._alphas = {id(delta): self._alpha(delta) for delta in deltas}
        except BaseException:
            self.close()
            raise

    def deltas(self, info: TensorInfo) -> tuple[Delta, ...]:
        """What is added to a tensor of the checkpoint."""
        return self.lora.deltas.get(info.name, ())

    def scale(self, delta: Delta) -> float:
        """By what a delta's product or difference is multiplied."""
        return delta.strength * self._alphas[id(delta)] / delta.rank if delta.rank else delta.strength

    def _alpha(self, delta: Delta) -> float:
        if not isinstance(delta.alpha, TensorInfo):
            return float(delta.rank) if delta.alpha is None else delta.alpha
        raw = bytearray(delta.alpha.nbytes)
        self.read_factor(delta, delta.alpha, 0, memoryview(raw))
        value = _number(bytes(raw), delta.alpha.dtype)
        if not math.isfinite(value):
            raise RunError(f"{self.where(delta, delta.alpha)}: {value}; the LoRA is damaged: download it again")
        return value

    def read_factor(self, delta: Delta, factor: TensorInfo, start: int, into: memoryview) -> None:
        """As `read`, of a tensor of the LoRA."""
        self._loras[delta.file].read(factor, start, into)
        self.bytes_read += len(into)

    def drop_factor(self, delta: Delta, factor: TensorInfo) -> None:
        """As `drop`."""
        self._loras[delta.file].drop(factor)

    def where(self, delta: Delta, factor: TensorInfo) -> str:
        """A tensor of the LoRA and its file, for messages."""
        return self._loras[delta.file].checkpoint.where(factor)

    def check_unchanged(self) -> None:
        """See Source; of the LoRAs too."""
        super().check_unchanged()
        for lora in self._loras:
            lora.check_unchanged()

    def close(self) -> None:
        """Close every file."""
        super().close()
        while self._loras:
            self._loras.pop().close()


def _number(raw: bytes, dtype: str) -> float:
    if dtype == "BF16":  # the upper half of a float32
        raw = b"\0\0" + raw
    return float(struct.unpack("<" + ALPHA_DTYPES[dtype], raw)[0])


def open_source(model: Model) -> Source:
    """A model's files, with those of its LoRAs."""
    return MergedSource(model.checkpoint, model.lora) if model.lora else Source(model.checkpoint)
