"""Everything that streamq knows of Wan, and the only place that does. `names`: both name styles; `model`: the rest."""

from streamq.wan.model import Expert, Linear, Model, check_model_type, describe, open_model, version_of
from streamq.wan.names import block_of, to_diffusers, to_native, unit_of

__all__ = [
    "Expert",
    "Linear",
    "Model",
    "block_of",
    "check_model_type",
    "describe",
    "open_model",
    "to_diffusers",
    "to_native",
    "unit_of",
    "version_of",
]
