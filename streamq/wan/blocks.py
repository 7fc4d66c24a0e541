"""How a Wan block is built and called: replay of one block at a time, bit-equal to diffusers' full forward.

The modules are diffusers' own, made once on the meta device and refilled per block. What lies outside blocks runs
through diffusers' own forward of a model whose blocks are replaced by a gate, so no arithmetic is repeated here.
dtypes are those of `from_pretrained(torch_dtype=…)`. Bits are equal at batch 1, on one device and one torch, and where
weights start at multiples of 64 bytes in both: on a CPU a product with one row, which the timestep's is, is rounded by
where its weights lie. torch's own allocations do; diffusers' do not where it leaves weights in the mapped file.

Source: huggingface/diffusers `models/transformers/transformer_wan.py`, `transformer_wan_vace.py` and
`models/model_loading_utils.py` (`load_model_dict_into_meta`), 0.35 to 0.42.

D: width; L: latent tokens; S: text tokens (512), behind 257 or 514 image tokens where there is an image branch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn

from streamq.checkpoint import Source
from streamq.device.cpu import host_bytes
from streamq.dtypes import TORCH_DTYPES
from streamq.errors import UsageError
from streamq.merge import merged
from streamq.wan.config import diffusers_config, keeps_fp32, vace_layers
from streamq.wan.model import Model
from streamq.wan.names import to_native, unit_of

MAX_ROWS = 256  # distinct rows of timestep_proj; token_row is uint8
_COMPARED = 1024  # tokens compared at a time, so that the comparison needs little memory
_IGNORED = re.compile(r".*\.norm_added_q\.weight")  # diffusers' _keys_to_ignore_on_load_unexpected


# -- Weights -----------------------------------------------------------------------------------------------------------


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter, by its diffusers name, after `from_pretrained(torch_dtype=dtype)`."""
    return torch.float32 if keeps_fp32(name) else dtype


def names_in(model: Model, unit: str) -> list[str]:
    """The diffusers names of a unit's tensors: a block's, a VACE block's, or those of `"rest"`, which the shell has."""
    return [name for name in model.tensors if unit_of(name) == unit]


def tensors_of(source: Source, model: Model, names: Iterable[str], device: torch.device | str) -> dict[str, Tensor]:
    """Read tensors by diffusers name, in the source's dtype, into memory of their own on `device`. Raises RunError."""
    found = {}
    for name in names:
        info = model.tensors[name]
        tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        source.read(info, 0, host_bytes(tensor))
        found[name] = merged(source, info, tensor.to(device))
    return found


# -- What flows between blocks -----------------------------------------------------------------------------------------


@dataclass
class Shared:
    """What all blocks of one sample share; dtype: that of the model's matrices.

    encoder_hidden_states  [1, S, D], image tokens first where there are any
    timestep_proj          [1, 6, D]; where tokens have their own timestep (TI2V) the distinct rows, [R, 6, D], and
    token_row              [L] uint8, which row each token has; None where R is 1
    rotary_emb             cos and sin, each [1, L, 1, head_dim] fp32
    control_scale          VACE: [n_vace] fp32, rounded to the model's dtype as the pipeline does; else None
    """

    encoder_hidden_states: Tensor
    timestep_proj: Tensor
    token_row: Tensor | None
    rotary_emb: tuple[Tensor, Tensor]
    control_scale: Tensor | None

    def to(self, device: torch.device | str) -> Shared:
        """The same on another device."""
        cos, sin = self.rotary_emb
        return replace(
            self,
            encoder_hidden_states=self.encoder_hidden_states.to(device),
            timestep_proj=self.timestep_proj.to(device),
            token_row=None if self.token_row is None else self.token_row.to(device),
            rotary_emb=(cos.to(device), sin.to(device)),
            control_scale=None if self.control_scale is None else self.control_scale.to(device),
        )

    def block_timestep_proj(self) -> Tensor:
        """What a block gets: [1, 6, D], or [1, L, 6, D], made anew at each call because it is large."""
        if self.token_row is None:
            return self.timestep_proj
        return self.timestep_proj[self.token_row.long()].unsqueeze(0)


@dataclass(frozen=True)
class Flow:
    """The streams of a sample, each [1, L, D], that a unit needs and makes; `drops`: nobody needs them after it."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    drops: tuple[str, ...]


def flow(model: Model, unit: str) -> Flow:
    """`hidden` runs through the blocks; VACE blocks before them run `control` and leave one `hint.K` each."""
    kind, _, number = unit.rpartition(".")
    index = int(number)
    if kind == "vace_blocks":
        if index == model.n_vace_blocks - 1:
            return Flow(("hidden", "control"), (f"hint.{index}",), ("control",))
        return Flow(("hidden", "control"), ("control", f"hint.{index}"), ())
    layers = vace_layers(model)
    if index in layers:
        hint = f"hint.{layers.index(index)}"
        return Flow(("hidden", hint), ("hidden",), (hint,))
    return Flow(("hidden",), ("hidden",), ())


# -- Blocks ------------------------------------------------------------------------------------------------------------


def _empty_model(config: dict[str, Any], n_blocks: int, vace: list[int]) -> nn.Module:
    """diffusers' model with so many blocks, in eval mode, without data and gradients."""
    with torch.device("meta"):
        if "vace_layers" in config:
            module = WanVACETransformer3DModel(**config | {"num_layers": n_blocks, "vace_layers": vace})
        else:
            module = WanTransformer3DModel(**config | {"num_layers": n_blocks})
    return module.eval().requires_grad_(False)


def _check_names(model: Model, unit: str, expected: Iterable[str]) -> None:
    """Raise UsageError where a unit's tensors are not those that diffusers' module has."""
    wanted, found = set(expected), {name for name in names_in(model, unit) if not _IGNORED.fullmatch(name)}
    for name in sorted(wanted - found):
        called = to_native(name) if model.layout == "native" else name
        raise UsageError(
            f"{model.checkpoint.root}: {called} is missing, and calibration runs the model; download it again"
        )
    for name in sorted(found - wanted):
        raise UsageError(
            f"{model.checkpoint.where(model.tensors[name])}: diffusers' Wan has no such tensor, so it cannot be run for"
            " calibration; choose a quantization that needs none"
        )


def _assign(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: Any) -> None:
    """Make the tensors below `prefix` the module's parameters; those of the right dtype without a copy."""
    state = {
        name.removeprefix(prefix): tensor.to(device, parameter_dtype(name, dtype))
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not _IGNORED.fullmatch(name)
    }
    expected = set(module.state_dict())
    assert state.keys() == expected, f"{prefix}: {sorted(state.keys() ^ expected)} missing or unexpected"
    module.load_state_dict(state, strict=True, assign=True)


def _put_in(module: nn.Module, prefix: str, layers: Mapping[str, nn.Module]) -> None:
    """Replace linear layers, by their diffusers names below `prefix`."""
    for name, layer in layers.items():
        module.set_submodule(name.removeprefix(prefix), layer)


class BlockRunner:
    """One block's weights at a time, in a module that is used for every block of its kind.

    Raises UsageError when made for a model that diffusers' blocks do not fit.
    """

    def __init__(self, model: Model, dtype: torch.dtype, device: torch.device | str) -> None:
        self.model = model
        self.dtype = dtype
        self.device = torch.device(device)
        self.unit: str | None = None  # whose weights are in
        self._vace_layers = vace_layers(model)
        whole = _empty_model(diffusers_config(model), 2, [0, 1])
        # Only the first VACE block has proj_in, so it is a kind of its own.
        self._modules: dict[str, nn.Module] = {"blocks": whole.get_submodule("blocks.0")}
        if model.family == "vace":
            self._modules |= {name: whole.get_submodule(f"vace_blocks.{i}") for i, name in enumerate(("first", "next"))}
        for unit in model.blocks:
            _check_names(model, unit, (f"{unit}.{name}" for name in self.module(unit).state_dict()))

    def module(self, unit: str) -> nn.Module:
        """The module that runs `unit`, whatever weights it holds."""
        if unit.startswith("blocks."):
            return self._modules["blocks"]
        return self._modules["first" if unit == "vace_blocks.0" else "next"]

    def fill(self, unit: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Put a block's weights in, instead of those that were; returns diffusers' module, for hooks on its linears.

        `tensors`: diffusers names, with the block's, -> source dtype, on the device. They are not copied where the
        dtype is right already, so they must not be changed while they are in.
        """
        self.release()
        module = self.module(unit)
        _assign(module, f"{unit}.", tensors, self.dtype, self.device)
        self.unit = unit
        return module

    def make(self, unit: str, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> nn.Module:
        """A block's module for itself, with weights as in `fill`; `layers`: what stands for its linears, by name."""
        module = copy.deepcopy(self.module(unit))  # on the meta device: no weight is copied
        _put_in(module, f"{unit}.", layers)
        _assign(module, f"{unit}.", tensors, self.dtype, self.device)
        return module

    @torch.no_grad()
    def run(self, unit: str, streams: Mapping[str, Tensor], shared: Shared) -> dict[str, Tensor]:
        """One block on one sample: `flow(model, unit).reads` of `streams` -> those that it writes, [1, L, D] each.

        The sample must be a batch of one: other batch sizes choose other kernels, which round differently.
        """
        assert unit == self.unit, f"{unit} is to run, but the weights are those of {self.unit}"
        module, hidden = self.module(unit), streams["hidden"]
        assert hidden.shape[0] == 1, hidden.shape
        states, rotary, projected = shared.encoder_hidden_states, shared.rotary_emb, shared.block_timestep_proj()
        kind, _, number = unit.rpartition(".")
        index = int(number)
        # Positional, as diffusers' forward does it: hooks look at args.
        if kind == "vace_blocks":
            hint, control = module(hidden, states, streams["control"], projected, rotary)
            last = index == self.model.n_vace_blocks - 1
            return {f"hint.{index}": hint} if last else {"control": control, f"hint.{index}": hint}
        hidden = module(hidden, states, projected, rotary)
        if index in self._vace_layers:
            which = self._vace_layers.index(index)
            assert shared.control_scale is not None
            hint, scale = streams[f"hint.{which}"], torch.unbind(shared.control_scale.to(hidden.dtype))[which]
            hidden = hidden + hint * scale
        return {"hidden": hidden}

    def release(self) -> None:
        """Let go of the weights: nothing of a block is held afterwards but empty modules."""
        if self.unit is not None:
            self.module(self.unit).to("meta")
            self.unit = None


# -- Everything outside blocks -----------------------------------------------------------------------------------------


class _Arrived(Exception):
    """Carries what the first block would have got out of diffusers' forward."""

    def __init__(self, received: tuple[Any, ...]) -> None:
        super().__init__()
        self.received = received


class _Gate(nn.Module):
    """In the place of all blocks: ends the forward there, or lets it go on with what the last block has returned."""

    def __init__(self, hidden: Tensor | None) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *received: Any) -> Tensor:
        if self.hidden is None:
            raise _Arrived(received)
        return self.hidden


def _outside(
    model: Model, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module], dtype: torch.dtype,
    device: torch.device,
) -> Any:  # fmt: skip
    """diffusers' model without blocks, its other weights in it. Raises UsageError for a model that does not fit."""
    config = diffusers_config(model)
    module: Any = _empty_model(config, 1, [0])
    module.blocks = nn.ModuleList()
    if model.family == "vace":
        module.vace_blocks = nn.ModuleList()
    # Tables, not weights: computed on the host for every device, as from_pretrained does; fp32 in any dtype.
    rope = (config["attention_head_dim"], config["patch_size"], config["rope_max_seq_len"])
    with torch.device("cpu"):
        module.rope = type(module.rope)(*rope).eval()
    _check_names(model, "rest", module.state_dict())
    _put_in(module, "", layers)
    _assign(module, "", tensors, dtype, device)
    module.rope.to(device)
    return module


class _Called(nn.Module):
    """In the place of a block: asks for its module whenever it is called."""

    def __init__(self, module: Callable[[], AbstractContextManager[nn.Module]]) -> None:
        super().__init__()
        self._made = module

    def forward(self, *received: Any) -> Any:
        with self._made() as module:
            return module(*received)


def streamed_model(
    model: Model, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module], dtype: torch.dtype,
    device: torch.device, borrow: Callable[[str], AbstractContextManager[nn.Module]],
) -> nn.Module:  # fmt: skip
    """diffusers' whole model, for its pipelines to call, whose blocks `borrow(unit)` lends for the time of a call.

    tensors, layers: of what lies outside blocks, by diffusers name: weights, and what stands for linear layers.
    Raises UsageError for a model that diffusers' class does not fit.
    """
    module = _outside(model, tensors, layers, dtype, device)
    config = diffusers_config(model)
    settings = {"num_layers": model.n_blocks} | {key: config[key] for key in ("vace_layers",) if key in config}
    module.register_to_config(**settings)
    module.blocks = nn.ModuleList([_Called(partial(borrow, f"blocks.{i}")) for i in range(model.n_blocks)])
    if model.family == "vace":
        units = [f"vace_blocks.{i}" for i in range(model.n_vace_blocks)]
        module.vace_blocks = nn.ModuleList([_Called(partial(borrow, unit)) for unit in units])
    return module


class Shell:
    """Embeddings, rotary tables and head: diffusers' forward without blocks. Batch 1, as everywhere in a replay.

    `tensors`: those of `names_in(model, "rest")`, diffusers name -> source dtype; cast as in `BlockRunner.fill`.
    Raises UsageError for a model that diffusers' class does not fit.
    """

    def __init__(
        self, model: Model, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.device = torch.device(device)
        self._vace = model.family == "vace"
        self._config = diffusers_config(model)
        module = _outside(model, tensors, {}, dtype, self.device)
        if self._vace:
            module.register_to_config(vace_layers=[])  # what forward goes by: no block, so no hints to wait for
        self._module = module

    def stem(
        self, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None = None,
        control: Tensor | None = None, control_scale: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Shared]:  # fmt: skip
        """What block 0 (VACE: VACE block 0) gets: the streams `hidden` (and `control`), and what all blocks share.

        latents        [1, C, F, h, w] with all condition channels
        timestep       [1], or one per token, [1, L] (TI2V)
        text           [1, 512, text_dim], zero-padded
        image          [1, 257, image_dim]; first and last frame: [2, 257, image_dim]
        control        VACE: [1, 96, F, h, w]
        control_scale  VACE: [n_vace]; None: ones

        All but timestep are cast to the model's dtype first, as diffusers' pipelines do.
        """
        assert (control is not None) == self._vace, "control latents are what VACE has, and no other"
        try:
            self._forward(_Gate(None), latents, timestep, text, image, control)
        except _Arrived as arrived:
            hidden, states, *controls, projected, rotary = arrived.received
        assert len(controls) == self._vace, f"{len(controls) + 4} inputs to the first block"
        token_row = None
        if projected.ndim == 4:
            projected, token_row = _distinct_rows(projected[0])
        scale = None
        if self._vace:
            scale = torch.ones(self.model.n_vace_blocks) if control_scale is None else control_scale
            assert scale.shape == (self.model.n_vace_blocks,), scale.shape
            scale = scale.to(self.device, self.dtype).float()
        streams = {"hidden": hidden, "control": controls[0]} if controls else {"hidden": hidden}
        return streams, Shared(states, projected, token_row, rotary, scale)

    def head(self, hidden: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
        """The model's output [1, out_channels, F, h, w] from the last block's `hidden` [1, L, D].

        `latents` tells the shape, `timestep` modulates; both as given to `stem`.
        """
        # Text and control have no part in the head: the least that the forward accepts.
        text = torch.zeros(1, 1, self._config["text_dim"])
        control = torch.zeros(1, self._config["vace_in_channels"], *self._config["patch_size"]) if self._vace else None
        return self._forward(_Gate(hidden), latents, timestep, text, None, control)

    @torch.no_grad()
    def _forward(
        self, gate: _Gate, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None, control: Tensor | None
    ) -> Tensor:
        assert latents.shape[0] == 1, latents.shape
        module, extra = self._module, {}
        module.blocks = nn.ModuleList([gate])
        if control is not None:  # VACE blocks come first; in the head they are over
            module.vace_blocks = nn.ModuleList([gate] if gate.hidden is None else [])
            extra["control_hidden_states"] = control.to(self.device, self.dtype)
        try:
            output = module(
                hidden_states=latents.to(self.device, self.dtype),
                timestep=timestep.to(self.device),
                encoder_hidden_states=text.to(self.device, self.dtype),
                encoder_hidden_states_image=None if image is None else image.to(self.device, self.dtype),
                return_dict=False,
                **extra,
            )
        finally:  # the gate holds a sample
            module.blocks = nn.ModuleList()
        return output[0]


def _distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """[L, 6, D] -> its distinct rows [R, 6, D] by first use, and [L] uint8, which one each token has (None: R is 1).

    Rows are compared by their bits, not by their timesteps: a matrix kernel may round its last rows differently.
    """
    bits = rows.reshape(len(rows), -1).view({2: torch.int16, 4: torch.int32}[rows.element_size()])
    which = torch.full((len(rows),), -1, device=rows.device)
    firsts: list[int] = []
    while bool((which < 0).any()):
        assert len(firsts) < MAX_ROWS, "tokens of more than 256 kinds: not the timesteps of a Wan pipeline"
        first = int((which < 0).int().argmax())
        for start in range(0, len(rows), _COMPARED):
            part = slice(start, start + _COMPARED)
            which[part][(bits[part] == bits[first]).all(dim=1)] = len(firsts)
        firsts.append(first)
    return rows[firsts], None if len(firsts) == 1 else which.to(torch.uint8)
