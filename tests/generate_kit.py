"""What the tests of `generate` share: a toy of few blocks, and quantized layers computed in another way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamq import compare, emulate, outputs, wan
from streamq.checkpoint import Source
from streamq.device.cpu import CPU
from streamq.generation.layers import float_weights, quantized_weights
from streamq.generation.linear import StoredLinear
from streamq.generation.store import Room
from streamq.generation.transformer import Transformer
from streamq.methods.activation import fake_quantize
from streamq.methods.rotation import rotate, unrotate
from streamq.pairs import QConfig
from streamq.quantized import StaticInput

TOY = Path(__file__).parent / "assets" / "toy_wan"
WEIGHTS = "diffusion_pytorch_model.safetensors"
ACTS = {"w8a8": QConfig("per_token", "int8"), "fp8": QConfig("per_token", "fp8_e4m3"),
        "w8a8_static": QConfig("per_tensor", "int8"), "w8a8_mxfp8": QConfig("per_block", "mxfp8"),
        "w4a4_mxfp4": QConfig("per_block", "mxfp4")}  # fmt: skip


def short_toy(folder: Path, blocks: int = 1, dtype: torch.dtype | None = None) -> Path:
    """The toy pipeline with its first blocks only."""
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("README.md"))
    place = folder / "transformer"
    config = json.loads((place / "config.json").read_text()) | {"num_layers": blocks}
    (place / "config.json").write_text(json.dumps(config))
    tensors = {
        name: tensor if dtype is None else tensor.to(dtype)
        for name, tensor in load_file(place / WEIGHTS).items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < blocks
    }
    save_file(tensors, place / WEIGHTS, {"format": "pt"})
    return folder


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """One forward's, as a pipeline gives them."""
    random = torch.Generator().manual_seed(3)
    text = torch.nn.functional.pad(torch.randn(1, 9, 64, generator=random), (0, 0, 0, 503))
    latents = torch.randn(1, 16, 3, 8, 8, generator=random)
    return {
        "hidden_states": latents.to(dtype), "encoder_hidden_states": text.to(dtype), "timestep": torch.tensor([637])
    }  # fmt: skip


@torch.no_grad()
def forward(module: Any, dtype: torch.dtype) -> Tensor:
    return module(return_dict=False, **inputs(dtype))[0]


def plain(pipeline: Path, dtype: torch.dtype) -> Any:
    """diffusers' own, in memory of its own, which is aligned (see `streamq.wan.blocks`)."""
    model = WanTransformer3DModel.from_pretrained(pipeline / "transformer", torch_dtype=dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def layer_errors(folder: Path, dtype: torch.dtype, smooth: dict[str, Tensor] | None = None) -> dict[str, float]:
    """Every quantized layer's relative error against `_compute`, on what it gets in one forward of the folder's model.

    smooth: diffusers name of a layer -> what its input is divided by, where that lies beside a norm.
    """
    (output,) = outputs.find_outputs(folder)
    checkpoint = output.checkpoint()
    source, kinds = Source(checkpoint), output.format.layers_in(folder, checkpoint.tensors)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    real = StoredLinear.forward

    def watched(layer: Any, x: Tensor) -> Tensor:
        y = real(layer, x)
        seen[layer.record.args[0]] = x, y
        return y

    with opened(folder, dtype) as transformer, mock.patch.object(StoredLinear, "forward", watched):
        forward(transformer.module, dtype)
    assert seen.keys() == {wan.to_diffusers(name) for name, kind in kinds.items() if kind != "float"}
    errors = {}
    for name, (x, y) in seen.items():
        native = wan.to_native(name)
        made = compare.layer_tensors(output, checkpoint, source, native)
        due = _compute(output, made, kinds[native].removesuffix("_smooth"), (smooth or {}).get(name))(x.float())
        errors[name] = float((y.float() - due).norm() / due.norm())
    source.close()
    return errors


@contextmanager
def opened(folder: Path, dtype: torch.dtype, room: int = 1 << 40) -> Iterator[Transformer]:
    """The transformer of a quantized folder, or of a float pipeline."""
    found = outputs.find_outputs(folder)
    if found:
        weights = quantized_weights(found[0], folder, TOY / "transformer")
    else:
        weights = float_weights(wan.open_model(folder)[0])
    with closing(Transformer(weights, CPU(), Room(room), dtype)) as transformer:
        yield transformer


def _compute(
    output: outputs.Output, made: dict[str, Tensor], kind: str, smooth: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """A layer from the format's own `decode`, on an input that is rounded apart from it."""
    form = output.format
    packed = form.unpack(made)
    if packed is not None and packed.scheme.four_bit:
        return lambda x: emulate.forward(x.bfloat16(), packed).float()
    weight, bias = form.decode(made)(slice(None)), form.bias(made)
    inverse = made.get("div.mul_scale", made.get("_weight_act_pre_scale"))
    if inverse is not None:  # decode has undone it
        weight, smooth = weight / inverse.float(), 1 / inverse.float()
    below = "linear." if "linear.weight" in made else ""
    static = None
    if kind == "w8a8_static" and "_weight_act_quant_scale" in made:
        static = StaticInput(float(made["_weight_act_quant_scale"]), 0.0)
    elif kind == "w8a8_static":
        static = StaticInput(float(made[f"{below}input_scale"]), float(made[f"{below}input_offset"]))
    size = json.loads(bytes(made["comfy_quant"].tolist())).get("convrot_groupsize", 0) if "comfy_quant" in made else 0

    def compute(x: Tensor) -> Tensor:
        x = x if smooth is None else x / smooth
        x = rotate(x, size) if size else x
        x = fake_quantize(x, ACTS[kind], static) if kind in ACTS else x
        x = unrotate(x, size) if size else x
        y = x @ weight.T
        return y if bias is None else y + bias.float()

    return compute
