"""A model's configuration in diffusers' words, and which of its parameters diffusers keeps in fp32. Needs no torch.

Source: huggingface/diffusers `models/transformers/transformer_wan.py`, `transformer_wan_vace.py`.
"""

from __future__ import annotations

from typing import Any

from streamq.errors import UsageError
from streamq.wan.model import Model

# `_keep_in_fp32_modules` of both diffusers classes, less `rope`, which has buffers only.
FP32_PARTS = frozenset({"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})


def keeps_fp32(name: str) -> bool:
    """Whether `from_pretrained` leaves a parameter, by its diffusers name, in fp32 whatever `torch_dtype` is.

    diffusers compares whole name parts: `norm1` stays fp32 (in `image_embedder` too), `norm_q` does not.
    """
    return not FP32_PARTS.isdisjoint(name.split("."))


def diffusers_config(model: Model) -> dict[str, Any]:
    """Every init argument of the model's diffusers class: from tensors; heads, eps and VACE layers from the config.

    Raises UsageError for a family that diffusers' two Wan classes are not, and for a config that contradicts tensors.
    """
    root, shapes = model.checkpoint.root, {name: info.shape for name, info in model.tensors.items()}
    if model.family in ("s2v", "animate"):
        raise UsageError(
            f"{root}: {model.family} models cannot be calibrated: diffusers' Wan transformer is another model;"
            " choose a quantization that needs no calibration"
        )
    known = model.native_config
    heads = known["num_heads"]
    if heads < 1 or model.dim % heads:
        raise UsageError(f"{root}: config.json says {heads} heads, the width is {model.dim}; correct the config")
    embedder = "condition_embedder."
    vace: dict[str, Any] = {}
    if model.family == "vace":
        vace = {"vace_layers": vace_layers(model), "vace_in_channels": known["vace_in_dim"]}
    return {
        "patch_size": shapes["patch_embedding.weight"][2:],
        "num_attention_heads": heads, "attention_head_dim": model.dim // heads,
        "in_channels": model.in_channels, "out_channels": model.out_channels,
        "text_dim": shapes[f"{embedder}text_embedder.linear_1.weight"][1], "freq_dim": known["freq_dim"],
        "ffn_dim": model.ffn_dim, "num_layers": model.n_blocks, "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads", "eps": known["eps"],
        "image_dim": shapes.get(f"{embedder}image_embedder.norm1.weight", (None,))[0],
        "added_kv_proj_dim": shapes.get("blocks.0.attn2.add_k_proj.weight", (None, None))[1],
        "rope_max_seq_len": model.source_config.get("rope_max_seq_len", 1024),
        "pos_embed_seq_len": shapes.get(f"{embedder}image_embedder.pos_embed", (None, None))[1],
    } | vace  # fmt: skip


def vace_layers(model: Model) -> list[int]:
    """The blocks after which hints are added, ascending: hint K belongs to the K-th; [] where there is no VACE."""
    if model.family != "vace":
        return []
    layers = model.native_config["vace_layers"]
    sound = isinstance(layers, list) and all(type(i) is int and 0 <= i < model.n_blocks for i in layers)
    if not sound or len(set(layers)) != model.n_vace_blocks or len(layers) != model.n_vace_blocks or 0 not in layers:
        raise UsageError(
            f"{model.checkpoint.root}: vace_layers {str(layers)[:80]} in config.json, but there are"
            f" {model.n_vace_blocks} VACE blocks for {model.n_blocks} blocks, the first at block 0; correct the config"
        )
    return sorted(layers)  # diffusers hands hints out in the order of blocks, not of the list
