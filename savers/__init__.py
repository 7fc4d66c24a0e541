"""Output formats: one module each, which knows the names, dtypes, files and configuration of one runtime.

A format is a module with these names (see `Format`); adding one is a file and a row in `formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from streamq.checkpoint import nbytes_of
from streamq.quantized import QuantizedLinear, Rule, Scheme
from streamq.wan import Linear, Model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor to be written: its name in the file, safetensors dtype, shape, and the unit (block) it belongs to."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    unit: str

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return nbytes_of(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Attention:
    """What a recipe does to an attention module. `dtype`: `fp8_e4m3`, `mxfp4`, or "" for nothing; `rotated`: q, k."""

    dtype: str = ""
    rotated: bool = False


@dataclass(frozen=True)
class SaveOptions:
    """What the user may ask of a format's files. `max_shard_size` in bytes, 0 for no limit.

    attention: native name of an attention module (`blocks.0.self_attn`) -> what the recipe does to it.
    """

    layout: str = "block"
    max_shard_size: int = 0
    attention: Mapping[str, Attention] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A small file that is known in full before the run: description, index or configuration."""

    name: str
    content: bytes


# Native layer name -> how it is quantized; None: it stays float.
Schemes = Mapping[str, Scheme | None]


class Format(Protocol):
    """What a format module has."""

    @property
    def TYPES(self) -> Mapping[str, str]:
        """streamq's types -> the runtime's words."""

    @property
    def CONTAINER(self) -> str:
        """What its files are: safetensors or gguf."""

    @property
    def OUTER(self) -> bool:
        """Whether linear layers outside blocks are quantized, too (`Model.outer_linears`)."""

    @property
    def ATTENTION(self) -> tuple[str, ...]:
        """Steps of a recipe that change attention and that the runtime honours; () for none."""

    @property
    def MODE(self) -> int:
        """Permission bits of every file."""

    @property
    def NAMES(self) -> str:
        """Whose names the tensors have: native or diffusers."""

    @property
    def EXPERTS(self) -> Mapping[str, str]:
        """Expert ("" for the only one) -> its folder below the format's."""

    @property
    def LAYOUTS(self) -> tuple[str, ...]:
        """What `--layout` may be, the default first; () where there is no choice."""

    @property
    def WAYS(self) -> Mapping[str, tuple[str, ...]]:
        """Type -> where the runtime honours a smoothing scale (`streamq.wan.groups`), what costs it least first."""

    @property
    def RULES(self) -> Mapping[str | None, Rule]:
        """`--match` tool (None: the default) -> its arithmetic."""

    def unfit(self, layer: Linear, scheme: Scheme) -> str | None:
        """Why a layer's sizes do not fit the runtime, so that it stays float; None if they do."""

    def quantized_specs(self, layer: Linear, scheme: Scheme, options: SaveOptions) -> list[Spec]:
        """The tensors of a quantized layer, in file order."""

    def encode(self, layer: QuantizedLinear, options: SaveOptions) -> list[Tensor]:
        """The same tensors' values, contiguous, in the same order and of the same dtypes."""

    def vector_specs(self, name: str, dim: int) -> list[Spec]:
        """The tensors that carry a smoothing vector beside a norm without affine, `name` (`blocks.0.norm1`)."""

    def encode_vector(self, smooth: Tensor) -> list[Tensor]:
        """Their values, from the vector [dim] by which the norm's output is to be divided."""

    def rotation_specs(self, attention: str, head_dim: int) -> list[Spec]:
        """The tensors that carry the rotation [head_dim, head_dim] of an attention module, by native name."""

    def passed_spec(self, name: str, dtype: str, shape: tuple[int, ...], unit: str, options: SaveOptions) -> Spec:
        """A tensor that stays float, by its name in NAMES; its values are cast where the dtype changes."""

    def check(self, schemes: Schemes, options: SaveOptions) -> list[str]:
        """Warnings; raises UsageError for what the runtime could not load."""

    def files(self, specs: Sequence[Spec], schemes: Schemes, options: SaveOptions) -> list[tuple[str, list[Spec]]]:
        """Split the tensors, which come in writing order, into files in writing order."""

    def metadata(self, model: Model, schemes: Schemes, options: SaveOptions) -> dict[str, str]:
        """`__metadata__` of every file; {} for none."""

    def documents(
        self, model: Model, files: list[tuple[str, list[Spec]]], schemes: Schemes, options: SaveOptions,
        beside: Iterable[Path],
    ) -> list[Document]:  # fmt: skip
        """Everything that is written besides tensors. `beside`: folders whose configuration files may be copied."""

    def root_documents(self, experts: Sequence[str], model: Model, schemes: Schemes) -> list[Document]:
        """What lies once beside the experts' folders. `experts`: their names, `[""]` for the only one."""

    def usage(self, folders: Mapping[str, str], model: Model, schemes: Schemes, options: SaveOptions) -> list[str]:
        """How to load what was written, in lines of code or configuration, for the end of a run and the model card.

        `folders`: expert ("" for the only one) -> its folder, as it is to be shown.
        """

    def recognise(self, folder: Path) -> bool:
        """Whether a folder looks like this format's output."""

    def layers_in(self, folder: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
        """Native layer name -> type for every block linear in a folder (`"float"` for those left alone)."""

    def problems(self, folder: Path, tensors: Mapping[str, Any]) -> list[str]:
        """What the runtime would trip over, or worse, let pass in silence."""

    def float_name(self, name: str) -> str | None:
        """The native name of the model's tensor that a stored one stands for; None for what only the format has."""

    def float_shape(self, name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of that tensor, where a stored one is packed."""

    def contradictions(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Which of a layer's tensors (by suffix) do not have the values that follow from the others."""

    def decode(self, tensors: Mapping[str, Tensor]) -> Callable[[slice], Tensor]:
        """Rows of the float32 weight that a layer's tensors (by suffix, e.g. `weight_scale`) stand for.

        A smoothing scale that the layer itself carries is undone; one that lies elsewhere is not known here.
        """

    def unpack(self, tensors: Mapping[str, Tensor]) -> QuantizedLinear | None:
        """A layer whose codes share bytes, as the record that was packed; None where the format packs nothing."""

    def record(self, tensors: Mapping[str, Tensor], kind: str) -> QuantizedLinear:
        """A layer's tensors (by suffix), on any device, as the record that was written; `kind` as `layers_in` says.

        Codes, scales and bias share the tensors' memory where they lie there as they are. Smoothing that lies in other
        tensors is not known here. Raises KeyError for a missing tensor, RuntimeError or ValueError for a wrong one.
        """

    def bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The layer's bias [out] among them, in order, of any float dtype."""


def formats() -> dict[str, Format]:
    """Name -> module, in the order in which help texts list them."""
    from streamq.savers import comfyui, diffusers, gguf, lightx2v, mindie, nunchaku

    return {
        "mindie": mindie, "lightx2v": lightx2v, "nunchaku": nunchaku, "diffusers": diffusers, "comfyui": comfyui,
        "gguf": gguf,
    }  # fmt: skip
