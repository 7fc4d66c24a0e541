"""Which linear layers of a block read the same tensor, and where that tensor could be scaled instead of the layers.

A smoothing vector s is shared by the layers of a group: x / s enters them, W · s is what they hold. 1/s can go

    norm    into weight and bias of the affine norm before the group                       (attn2.to_q: norm2)
    adaln   into a vector beside the norm without affine, where the runtime has one        (norm1, norm3)
    rows    out of the rows of the layers that make the input, whose outputs are mixed over tokens, never over channels
    layer   into the layer, as a scale of its input at run time

Not into the modulation: (1 + table + e) contains the time projection e, which all blocks share. Not before ffn.net.2:
GELU is in between. The text and image states are the same tensors in every block. Source: the data flow of
huggingface/diffusers `transformer_wan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamq.wan.names import block_of

WAYS = ("norm", "adaln", "rows", "layer")


@dataclass(frozen=True)
class Group:
    """Layers with one input, by their diffusers names inside a block. `makers`: whose rows feed the input's columns."""

    name: str
    layers: tuple[str, ...]
    norm: str | None = None
    adaln: str | None = None
    makers: tuple[str, ...] = ()

    def ways(self) -> tuple[str, ...]:
        """Where 1/s can go without changing the block's function, the cheapest at run time first."""
        can = {"norm": self.norm, "adaln": self.adaln, "rows": self.makers, "layer": True}
        return tuple(way for way in WAYS if can[way])


GROUPS = (
    Group("attn1.in", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), adaln="norm1"),
    Group("attn1.out", ("attn1.to_out.0",), makers=("attn1.to_v",)),
    Group("attn2.in", ("attn2.to_q",), norm="norm2"),
    Group("attn2.text", ("attn2.to_k", "attn2.to_v")),
    Group("attn2.image", ("attn2.add_k_proj", "attn2.add_v_proj")),
    Group("attn2.out", ("attn2.to_out.0",), makers=("attn2.to_v", "attn2.add_v_proj")),
    Group("ffn.in", ("ffn.net.0.proj",), adaln="norm3"),
    Group("ffn.out", ("ffn.net.2",)),
    Group("control.in", ("proj_in",)),
    Group("control.out", ("proj_out",)),
)
_OF = {layer: group for group in GROUPS for layer in group.layers}


def group_of(layer: str) -> Group:
    """The group of a block's linear layer, by its diffusers name (`blocks.3.attn2.to_q`)."""
    block = block_of(layer)
    return _OF[layer.removeprefix(f"{block}.")]
