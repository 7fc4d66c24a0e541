"""A model's configuration in diffusers' words, and which of its parameters diffusers keeps in fp32. Needs no torch.

Source: huggingface/diffusers `models/transformers/transformer_wan.py`, `transformer_wan_vace.py`.
"""

from __future__ import annotations

from typing import Any

from streamq.errors import UsageError
from streamq.wan.model import Model
from streamq.wan.names import keeps_fp32 as keeps_fp32

DIFFUSERS_VERSION = "0.42.1"  # whose loader the formats were checked with
CLASS, VACE_CLASS = "WanTransformer3DModel", "WanVACETransformer3DModel"


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


def diffusers_document(model: Model, form: str) -> dict[str, Any]:
    """diffusers' `config.json` of the float model: the source's own keys, and every init argument.

    `form`: the format that asks, for the message. Raises UsageError for a model that diffusers' classes are not.
    """
    if model.family in ("s2v", "animate"):
        raise UsageError(
            f"{form}: {model.checkpoint.root} is a {model.family} model, which diffusers' Wan transformer is not;"
            " choose another --format"
        )
    given = dict(model.source_config) if model.layout == "diffusers" else {}
    given.pop("quantization_config", None)
    arguments = diffusers_config(model)
    kind = VACE_CLASS if "vace_layers" in arguments else CLASS
    made = {"_class_name": kind, "_diffusers_version": given.get("_diffusers_version", DIFFUSERS_VERSION)}
    return given | arguments | made


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
