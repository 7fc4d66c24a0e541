"""Everything that streamq knows of Wan, and the only place that does.

`names`: both name styles; `model`: families, sizes, experts; `groups`: layers with one input; these need no torch.
`blocks`: how a block is built and called.
"""

from streamq.wan.groups import GROUPS, WAYS, Group, group_of
from streamq.wan.model import COMFYUI_PREFIX, Expert, Linear, Model, check_model_type, describe, open_model, version_of
from streamq.wan.names import block_of, to_diffusers, to_native, unit_of

__all__ = [
    "COMFYUI_PREFIX",
    "GROUPS",
    "WAYS",
    "Expert",
    "Group",
    "Linear",
    "Model",
    "block_of",
    "check_model_type",
    "describe",
    "group_of",
    "open_model",
    "to_diffusers",
    "to_native",
    "unit_of",
    "version_of",
]
