"""Which Wan a checkpoint holds: family, sizes, layers, experts; read off tensor names and shapes alone.

Inside streamq a tensor goes by its diffusers name; native names exist at the two doors, the checkpoint and the savers.
A module that diffusers has no name for (S2V's and Animate's extra encoders) keeps its native name.

Shapes: Wan-Video/Wan2.1 and Wan2.2 `wan/modules/model.py`, huggingface/diffusers `transformer_wan.py`,
`transformer_wan_vace.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.checkpoint import Checkpoint, TensorInfo, load_json, open_checkpoint
from streamq.errors import DamagedError, QuantizedError, UsageError, nearest
from streamq.wan.names import (
    BLOCK_BACK,
    BLOCK_LINEARS,
    BLOCK_ORDER,
    OPTIONAL_LINEARS,
    TOP,
    TOP_BACK,
    block_of,
    keeps_fp32,
    rename,
    to_diffusers,
    to_native,
)

if TYPE_CHECKING:
    from streamq.lora import LoraPlan

HEAD_DIM = 128  # every released Wan
COMFYUI_PREFIX = "model.diffusion_model."
FLOAT_DTYPES = {"F32", "BF16", "F16"}
MAX_CONFIG_BYTES = 4 << 20

# What every Wan has, outside blocks and in each, with its shape; D: width, F: width of the FFN, *: any size.
_OUTSIDE: dict[str, tuple[object, ...]] = {
    "patch_embedding.weight": ("D", "*", 1, 2, 2),
    "condition_embedder.text_embedder.linear_1.weight": ("D", "*"),
    "condition_embedder.text_embedder.linear_2.weight": ("D", "D"),
    "condition_embedder.time_embedder.linear_1.weight": ("D", "*"),
    "condition_embedder.time_embedder.linear_2.weight": ("D", "D"),
    "condition_embedder.time_proj.weight": ("6D", "D"),
    "scale_shift_table": (1, 2, "D"),
    "proj_out.weight": ("*", "D"),
}
_INSIDE: dict[str, tuple[object, ...]] = {
    **{f"{layer}.weight": ("D", "D") for layer in BLOCK_LINEARS[:8] + OPTIONAL_LINEARS},
    "ffn.net.0.proj.weight": ("F", "D"),
    "ffn.net.2.weight": ("D", "F"),
    "scale_shift_table": (1, 6, "D"),
    **{f"{attn}.{norm}.weight": ("D",) for attn in ("attn1", "attn2") for norm in ("norm_q", "norm_k")},
    "norm2.weight": ("D",),
    "norm2.bias": ("D",),
}
# Tensors that only an already quantized checkpoint has.
_QUANTIZED_NAME = re.compile(
    r".*\.(weight_scale|scale_weight|scale_input|input_scale|weight_offset|comfy_quant|deq_scale|quant_bias|qweight)$"
    r"|scaled_fp8$"
)

MODEL_TYPES: dict[str, tuple[str, frozenset[str]]] = {
    "Wan2_1": ("Wan2_1", frozenset({"t2v", "i2v", "flf2v", "vace"})),
    "Wan2.1": ("Wan2_1", frozenset({"t2v", "i2v", "flf2v", "vace"})),
    "Wan2_2": ("Wan2_2", frozenset({"t2v", "i2v", "ti2v", "s2v", "animate", "vace"})),
    "Wan2.2": ("Wan2_2", frozenset({"t2v", "i2v", "ti2v", "s2v", "animate", "vace"})),
    "Wan2.2-T2V-A14B": ("Wan2_2", frozenset({"t2v"})),
    "Wan2.2-I2V-A14B": ("Wan2_2", frozenset({"i2v"})),
    "Wan2.2-TI2V-5B": ("Wan2_2", frozenset({"ti2v"})),
}


@dataclass(frozen=True)
class Linear:
    """A linear layer. `name` is the diffusers name; `weight` is [out, in], `bias` [out] or None."""

    name: str
    weight: TensorInfo
    bias: TensorInfo | None

    @property
    def native(self) -> str:
        """The name that recipes match and that MindIE and LightX2V use."""
        return to_native(self.name)


@dataclass(frozen=True)
class Model:
    """One Wan transformer (one expert), as its tensors describe it.

    `tensors` maps diffusers names to what lies in the checkpoint, in model order: blocks, VACE blocks, the rest.
    `lora`: what is merged into them when they are read (`streamq.lora`).
    """

    checkpoint: Checkpoint
    family: str
    layout: str
    prefix: str
    dim: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    n_blocks: int
    n_vace_blocks: int
    tensors: dict[str, TensorInfo]
    warnings: tuple[str, ...]
    lora: LoraPlan | None = None

    @property
    def blocks(self) -> list[str]:
        """`["blocks.0", …, "vace_blocks.0", …]`."""
        return [f"blocks.{i}" for i in range(self.n_blocks)] + [f"vace_blocks.{i}" for i in range(self.n_vace_blocks)]

    @property
    def replay_order(self) -> list[str]:
        """Blocks in the order of the model's forward: VACE blocks come first, their hints go into the others."""
        return [f"vace_blocks.{i}" for i in range(self.n_vace_blocks)] + [f"blocks.{i}" for i in range(self.n_blocks)]

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer inside a block or VACE block, in model order: what a recipe can reach."""
        found = []
        for name, info in self.tensors.items():
            block = block_of(name)
            if block is None or not name.endswith(".weight"):
                continue
            layer = name.removesuffix(".weight")
            if layer.removeprefix(block + ".") in BLOCK_LINEARS + OPTIONAL_LINEARS:
                found.append(Linear(layer, info, self.tensors.get(f"{layer}.bias")))
        return tuple(found)

    @cached_property
    def outer_linears(self) -> tuple[Linear, ...]:
        """The linear layers outside blocks whose weights diffusers does not keep in fp32, in model order."""
        found = []
        for name, info in self.tensors.items():
            if block_of(name) is None and name.endswith(".weight") and len(info.shape) == 2 and not keeps_fp32(name):
                layer = name.removesuffix(".weight")
                found.append(Linear(layer, info, self.tensors.get(f"{layer}.bias")))
        return tuple(found)

    def native_name(self, info: TensorInfo) -> str:
        """A stored tensor's native name, whatever style and prefix it is stored under."""
        stored = info.name.removeprefix(self.prefix)
        return stored if self.layout == "native" else to_native(stored)

    @cached_property
    def source_config(self) -> dict[str, Any]:
        """The `config.json` beside the weights, or {} where there is none."""
        path = self.checkpoint.root / "config.json"
        config = load_json(path, MAX_CONFIG_BYTES) if path.is_file() else {}
        return config if isinstance(config, dict) else {}

    def _model_type(self) -> str:
        """LightX2V's rule for a config that is not the model's own: an image branch or 36 channels make `i2v`."""
        image = "blocks.0.attn2.add_k_proj.weight" in self.tensors or self.in_channels == 36
        return "i2v" if image else "t2v"

    @cached_property
    def native_config(self) -> dict[str, Any]:
        """The twelve keys of Wan-AI's own `config.json`: from shapes, and from the source's config where they are mute.

        Raises UsageError where neither tells the number of heads.
        """
        given = self.source_config
        heads = given.get("num_heads", given.get("num_attention_heads"))
        if not isinstance(heads, int):
            if self.dim % HEAD_DIM:
                raise UsageError(
                    f"{self.checkpoint.root}: no config.json, and the width {self.dim} is not a multiple of {HEAD_DIM},"
                    " Wan's head size; put the model's config.json beside the weights"
                )
            heads = self.dim // HEAD_DIM
        vace: dict[str, Any] = {}
        if self.family == "vace":  # control blocks are evenly spread, unless the config says where they are
            spread = list(range(0, self.n_blocks, max(1, self.n_blocks // max(1, self.n_vace_blocks))))
            layers = given.get("vace_layers", spread[: self.n_vace_blocks])
            vace = {"vace_in_dim": self.tensors["vace_patch_embedding.weight"].shape[1], "vace_layers": layers}
        return {
            "_class_name": "VaceWanModel" if self.family == "vace" else "WanModel",
            "_diffusers_version": given.get("_diffusers_version", "0.33.0"),
            "dim": self.dim, "eps": given.get("eps", 1e-6), "ffn_dim": self.ffn_dim,
            "freq_dim": self.tensors["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "in_dim": self.in_channels,
            "model_type": given["model_type"] if "model_type" in given and "dim" in given else self._model_type(),
            "num_heads": heads, "num_layers": self.n_blocks, "out_dim": self.out_channels,
            "text_len": given.get("text_len", 512),
        } | vace  # fmt: skip


def describe(checkpoint: Checkpoint, *, quantized: bool = False) -> Model:
    """Find out which Wan model a checkpoint holds. `quantized`: an output, whose scales and the like are passed over.

    Raises UsageError for anything else, for a quantized source, for gaps, and for a block that differs from block 0.
    """
    prefix, layout = _style(checkpoint)
    tensors: dict[str, TensorInfo] = {}
    warnings: list[str] = []
    for stored, info in checkpoint.tensors.items():
        if quantized and _QUANTIZED_NAME.match(stored):
            continue
        if not quantized and (info.dtype not in FLOAT_DTYPES or _QUANTIZED_NAME.match(stored)):
            what = f"{checkpoint.where(info)}: dtype {info.dtype}"
            reads = "streamq reads F32, BF16 and F16 checkpoints: give the float original"
            if info.dtype in ("F64", "I64"):
                raise UsageError(f"{what}; {reads}")
            raise QuantizedError(f"{what}, so the source is quantized already; {reads}")
        if not stored.startswith(prefix):
            raise UsageError(f"{checkpoint.where(info)}: lacks the prefix {prefix!r} of the others; not one Wan model")
        name = _inside(stored.removeprefix(prefix), layout, warnings)
        if name is None:
            continue
        if name in tensors:
            raise UsageError(
                f"{checkpoint.where(info)}: the same tensor as {tensors[name].name}; remove one of the two"
            )
        tensors[name] = info
    n_blocks, n_vace = _count_blocks(checkpoint, tensors)
    _check_blocks(checkpoint, tensors, n_blocks, n_vace)
    dim, in_channels, out_channels, ffn_dim = _sizes(checkpoint, tensors, layout)
    family = _family(tensors, in_channels, out_channels)
    if family == "animate" and layout == "diffusers":
        raise UsageError(f"{checkpoint.root}: Wan2.2-Animate under diffusers names; give the native checkpoint")
    order = {name: i for i, name in enumerate(_model_order(tensors, n_blocks, n_vace))}
    ordered = dict(sorted(tensors.items(), key=lambda item: order[item[0]]))
    return Model(checkpoint, family, layout, prefix, dim, ffn_dim, in_channels, out_channels, n_blocks, n_vace,
                 ordered, tuple(warnings))  # fmt: skip


def _style(checkpoint: Checkpoint) -> tuple[str, str]:
    for prefix in ("", COMFYUI_PREFIX):
        for layout, attention in (("native", "self_attn.q"), ("diffusers", "attn1.to_q")):
            if f"{prefix}blocks.0.{attention}.weight" in checkpoint.tensors:
                return prefix, layout
    some = ", ".join(sorted(checkpoint.tensors)[:3]) or "no tensor at all"
    raise UsageError(
        f"{checkpoint.root}: not a Wan transformer: neither blocks.0.self_attn.q.weight (native names) nor"
        f" blocks.0.attn1.to_q.weight (diffusers names) among its {len(checkpoint.tensors)} tensors ({some})"
    )


def _inside(name: str, layout: str, warnings: list[str]) -> str | None:
    """The name by which a stored tensor goes inside streamq; None for one that every loader ignores."""
    if layout == "native":
        return to_diffusers(name) or name
    if name.endswith(".norm_added_q.weight"):  # in some diffusers files; diffusers itself does not load it
        warnings.append(f"{name} is left out: no Wan runtime reads it")
        return None
    if rename(name, BLOCK_BACK, TOP_BACK) is None:
        warnings.append(f"{name} has no native name: it is written under this one")
    return name


def _count_blocks(checkpoint: Checkpoint, tensors: dict[str, TensorInfo]) -> tuple[int, int]:
    counts = []
    for kind in ("blocks", "vace_blocks"):
        named = {name: block_of(name) for name in tensors if name.startswith(f"{kind}.")}
        for name, block in named.items():
            if block is None:
                raise UsageError(
                    f"{checkpoint.where(tensors[name])}: not a block number that Wan has; not one Wan model"
                )
        numbers = {int(block.partition(".")[2]) for block in named.values() if block}
        for i in range(len(numbers)):
            if i not in numbers:
                raise UsageError(
                    f"{checkpoint.root}: {kind}.{i} is missing, but {kind}.{max(numbers)} is there"
                    f" ({len(numbers)} blocks in all); a shard or a part of one is missing"
                )
        counts.append(len(numbers))
    return counts[0], counts[1]


def _check_blocks(checkpoint: Checkpoint, tensors: dict[str, TensorInfo], n_blocks: int, n_vace: int) -> None:
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        block = block_of(name)
        if block:
            parts.setdefault(block, {})[name.removeprefix(block + ".")] = info
    for kind, count in (("blocks", n_blocks), ("vace_blocks", n_vace)):
        for i in range(count):
            mine, first = parts[f"{kind}.{i}"], parts[f"{kind}.0"]
            optional = {"proj_in.weight", "proj_in.bias"} if kind == "vace_blocks" else set()
            for inner in sorted((first.keys() ^ mine.keys()) - optional):
                present, absent = (i, 0) if inner in mine else (0, i)
                raise DamagedError(
                    f"{checkpoint.root}: {kind}.{present}.{inner} has no counterpart in {kind}.{absent}:"
                    f" block {i} has {len(mine)} tensors, block 0 {len(first)}"
                )
            for inner, info in mine.items():
                if inner in first and info.shape != first[inner].shape:
                    raise DamagedError(
                        f"{checkpoint.where(info)}: shape {list(info.shape)}, block 0 has {list(first[inner].shape)};"
                        " every block of a Wan model has block 0's shapes"
                    )


def _check_shapes(
    checkpoint: Checkpoint, tensors: dict[str, TensorInfo], table: dict[str, tuple[object, ...]], sizes: dict[str, int],
    where: str, layout: str,
) -> None:  # fmt: skip
    """Raise UsageError for a tensor of the table that is missing or has another shape. Biases go by their weights."""
    for name, symbols in table.items():
        shape = tuple(sizes.get(str(symbol), symbol) for symbol in symbols)
        info, bias = tensors.get(name), tensors.get(name.removesuffix(".weight") + ".bias")
        if info is None:
            if where and name.removesuffix(".weight") in OPTIONAL_LINEARS:
                continue
            called = to_native(where + name) if layout == "native" else where + name
            raise DamagedError(f"{checkpoint.root}: {called} is missing; not a complete Wan transformer")
        if len(info.shape) != len(shape) or any(
            w not in ("*", d) or d == 0 for d, w in zip(info.shape, shape, strict=True)
        ):
            raise UsageError(f"{checkpoint.where(info)}: shape {list(info.shape)}, Wan needs {_spelt(shape)} here")
        if bias is not None and name.endswith(".weight") and bias.shape != info.shape[:1]:
            raise UsageError(f"{checkpoint.where(bias)}: shape {list(bias.shape)}, Wan needs {[info.shape[0]]} here")


def _spelt(shape: tuple[object, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _sizes(checkpoint: Checkpoint, tensors: dict[str, TensorInfo], layout: str) -> tuple[int, int, int, int]:
    """(width, channels in, channels out, width of the FFN), once every shape that follows from them is checked."""
    for name in ("attn1.to_q.weight", "ffn.net.0.proj.weight"):
        info = tensors.get(f"blocks.0.{name}")
        if info is not None and len(info.shape) != 2:
            raise UsageError(f"{checkpoint.where(info)}: shape {list(info.shape)}, Wan needs a matrix here")
    ffn = tensors.get("blocks.0.ffn.net.0.proj.weight")
    dim = tensors["blocks.0.attn1.to_q.weight"].shape[0]
    sizes = {"D": dim, "6D": 6 * dim, "F": ffn.shape[0] if ffn else 0}
    for kind in ("blocks", "vace_blocks"):
        prefix = f"{kind}.0."
        inside = {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}
        if inside:
            _check_shapes(checkpoint, inside, _INSIDE, sizes, prefix, layout)
    _check_shapes(checkpoint, tensors, _OUTSIDE, sizes, "", layout)
    head = tensors["proj_out.weight"]
    if head.shape[0] % 4:
        raise UsageError(f"{checkpoint.where(head)}: shape {list(head.shape)}, Wan needs [4·channels, {dim}]")
    return dim, tensors["patch_embedding.weight"].shape[1], head.shape[0] // 4, sizes["F"]


def _family(tensors: dict[str, TensorInfo], in_channels: int, out_channels: int) -> str:
    if any(name.startswith("audio_injector.") for name in tensors):
        return "s2v"
    if any(name.startswith("face_adapter.") for name in tensors):
        return "animate"
    if TOP["img_emb.emb_pos"] in tensors:
        return "flf2v"
    if "vace_patch_embedding.weight" in tensors:
        return "vace"
    if in_channels == 48 and out_channels == 48:
        return "ti2v"
    if "blocks.0.attn2.add_k_proj.weight" in tensors or in_channels > out_channels:
        return "i2v"
    return "t2v"


def _model_order(tensors: dict[str, TensorInfo], n_blocks: int, n_vace: int) -> list[str]:
    """The native modules' own order, which msModelSlim's files have: blocks, VACE blocks, then the rest."""
    inside = {module: i for i, module in enumerate(BLOCK_ORDER)}
    outside = {module: i for i, module in enumerate(TOP.values())}

    def key(name: str) -> tuple[object, ...]:
        block = block_of(name)
        module, leaf = name.removeprefix(f"{block}."), 0
        for i, ending in enumerate((".weight", ".bias")):
            if module.endswith(ending):
                module, leaf = module.removesuffix(ending), i
        if block is None:
            return (n_blocks + n_vace, outside.get(module, len(outside)), module, leaf, name)
        kind, number = block.split(".")
        position = int(number) + (n_blocks if kind == "vace_blocks" else 0)
        return (position, inside.get(module, len(inside)), module, leaf, name)

    return sorted(tensors, key=key)


@dataclass(frozen=True)
class Expert:
    """One transformer of a model. `name` is "" for the only one, else "high_noise_model" or "low_noise_model"."""

    name: str
    model: Model


def version_of(experts: list[Expert]) -> str | None:
    """`"Wan2_1"`, `"Wan2_2"`, or None where tensors fit both."""
    model = experts[0].model
    if len(experts) == 2 or model.family in ("ti2v", "s2v", "animate"):
        return "Wan2_2"
    if model.family == "i2v":
        return "Wan2_1" if "blocks.0.attn2.add_k_proj.weight" in model.tensors else "Wan2_2"
    return None if model.family == "t2v" else "Wan2_1"


def open_model(path: Path) -> list[Expert]:
    """Enter a file, a folder of shards, a diffusers pipeline or a folder with two experts; read headers only.

    Experts come in the order in which the denoising uses them: high noise first. Raises UsageError.
    """
    experts = [Expert(name, describe(open_checkpoint(place))) for name, place in _expert_places(path)]
    first, last = experts[0].model, experts[-1].model
    if (first.family, first.dim, first.n_blocks) != (last.family, last.dim, last.n_blocks):
        raise UsageError(
            f"{path}: its experts do not belong together: {first.family} of {first.n_blocks} blocks, width {first.dim},"
            f" and {last.family} of {last.n_blocks} blocks, width {last.dim}; download them again"
        )
    return experts


def _expert_places(path: Path) -> list[tuple[str, Path]]:
    if path.is_file():
        return [("", path)]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    native = [(name, path / name) for name in ("high_noise_model", "low_noise_model")]
    if any(place.is_dir() for _, place in native):
        for _, place in native:
            if not place.is_dir():
                raise UsageError(f"{place}: missing beside the other expert; download it, or give one expert's folder")
        return native
    if not ((path / "model_index.json").is_file() or (path / "transformer").is_dir()) or _has_weights(path):
        return [("", path)]
    if not (path / "transformer").is_dir():
        raise UsageError(f"{path}: model_index.json is here, but no transformer/ folder; download it")
    second = path / "transformer_2"
    if not second.is_dir():
        if _lists_second_expert(path):
            raise UsageError(
                f"{second}: missing, but model_index.json lists it; download it, or give transformer/ itself"
            )
        return [("", path / "transformer")]
    return [("high_noise_model", path / "transformer"), ("low_noise_model", second)]


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))


def _lists_second_expert(folder: Path) -> bool:
    index = folder / "model_index.json"
    entry = load_json(index, MAX_CONFIG_BYTES) if index.is_file() else {}
    second = entry.get("transformer_2") if isinstance(entry, dict) else None
    return isinstance(second, list) and any(second)


def check_model_type(stated: str | None, experts: list[Expert]) -> None:
    """Raise UsageError if what the user says the model is contradicts its tensors."""
    if stated is None:
        return
    if stated not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UsageError(f"--model_type {stated}: unknown; known: {known}{nearest(stated, tuple(MODEL_TYPES))}")
    version, families = MODEL_TYPES[stated]
    found, family = version_of(experts), experts[0].model.family
    if (found is not None and found != version) or family not in families:
        two = " with two experts" if len(experts) == 2 else ""
        raise UsageError(
            f"--model_type {stated}: the tensors are a {found or 'Wan2_1 or Wan2_2'} {family} model{two};"
            " leave --model_type out, or give the folder of the model that you mean"
        )
