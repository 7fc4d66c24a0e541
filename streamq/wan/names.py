"""Wan's names: native <-> diffusers, and the order of a block's modules.

Every rule is for a whole module name, because `proj_out` and `scale_shift_table` mean one thing inside a block and
another outside. Source: Wan-Video/Wan2.1 and Wan2.2 `wan/modules/model.py`, huggingface/diffusers
`scripts/convert_wan_to_diffusers.py`.
"""

from __future__ import annotations

import re

_ATTENTION = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
    "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k",
}  # fmt: skip
# Module inside a block, native -> diffusers. Mind norm3: native norm3 is diffusers norm2 (the others have no tensors).
_BLOCK = {
    **{f"self_attn.{native}": f"attn1.{diffusers}" for native, diffusers in _ATTENTION.items()},
    **{f"cross_attn.{native}": f"attn2.{diffusers}" for native, diffusers in _ATTENTION.items()},
    "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "modulation": "scale_shift_table",
    "before_proj": "proj_in", "after_proj": "proj_out",
}  # fmt: skip
TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "vace_patch_embedding": "vace_patch_embedding",
}
BLOCK_BACK = {diffusers: native for native, diffusers in _BLOCK.items()}
TOP_BACK = {diffusers: native for native, diffusers in TOP.items()}
_BLOCK_NUMBER = r"(?:vace_)?blocks\.(?:0|[1-9]\d{0,5})"
_NAME = re.compile(rf"(?P<block>{_BLOCK_NUMBER}\.)?(?P<module>.*?)(?P<leaf>\.(?:weight|bias))?", re.DOTALL)

RMS_NORMS = ("norm_q", "norm_k", "norm_k_img")  # native names; the only modules of Wan's without a bias
# The linear layers that every block has, by diffusers name, in module order.
BLOCK_LINEARS = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    "ffn.net.0.proj", "ffn.net.2",
)  # fmt: skip
# The linear layers outside the blocks that some formats quantize, by native name.
OUTER_LINEARS = (
    "text_embedding.0", "text_embedding.2", "time_projection.1", "head.head", "img_emb.proj.1", "img_emb.proj.3",
)  # fmt: skip
OPTIONAL_LINEARS = ("attn2.add_k_proj", "attn2.add_v_proj", "proj_in", "proj_out")
BLOCK_ORDER = (
    "scale_shift_table", *BLOCK_LINEARS[:4], "attn1.norm_q", "attn1.norm_k", "norm2", *BLOCK_LINEARS[4:8],
    "attn2.norm_q", "attn2.norm_k", "attn2.add_k_proj", "attn2.add_v_proj", "attn2.norm_added_k",
    *BLOCK_LINEARS[8:], "proj_in", "proj_out",
)  # fmt: skip

# `_keep_in_fp32_modules` of both diffusers classes, less `rope`, which has buffers only.
FP32_PARTS = frozenset({"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})


def rename(name: str, block: dict[str, str], top: dict[str, str]) -> str | None:
    match = _NAME.fullmatch(name)
    assert match is not None
    module = (block if match["block"] else top).get(match["module"])
    return None if module is None else f"{match['block'] or ''}{module}{match['leaf'] or ''}"


def to_diffusers(native: str) -> str | None:
    """Diffusers name of a native tensor or module name; None where diffusers has none."""
    return rename(native, _BLOCK, TOP)


def to_native(diffusers: str) -> str:
    """Native name of a tensor or module that goes by its diffusers name inside; unknown names stay as they are."""
    return rename(diffusers, BLOCK_BACK, TOP_BACK) or diffusers


def modulation_of(module: str) -> tuple[str, ...]:
    """What a module's modulation may be called, native or diffusers: a parameter without a leaf."""
    return f"{module}.modulation", f"{module}.scale_shift_table"


def block_of(name: str) -> str | None:
    """`"blocks.3"` for anything inside that block (`"vace_blocks.0"` likewise), None for the rest."""
    match = re.match(rf"({_BLOCK_NUMBER})\.", name)
    return match[1] if match else None


def unit_of(name: str) -> str:
    """What is committed together: the tensor's block, or `"rest"` for everything outside blocks."""
    return block_of(name + ".") or "rest"


def keeps_fp32(name: str) -> bool:
    """Whether `from_pretrained` leaves a parameter, by its diffusers name, in fp32 whatever `torch_dtype` is.

    diffusers compares whole name parts: `norm1` stays fp32 (in `image_embedder` too), `norm_q` does not.
    """
    return not FP32_PARTS.isdisjoint(name.split("."))
