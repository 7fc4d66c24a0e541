"""Models for tests of replays: tiny checkpoints in both layouts, and what diffusers' own forward makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamq import wan
from streamq.checkpoint import Source
from streamq.wan import Model
from streamq.wan.blocks import Shell, names_in, tensors_of

DATA = Path(__file__).parent / "data"
GOLDEN = ("t2v", "i2v21", "ti2v22", "vace")
MADE = ("flf2v", "i2v22", "experts", "vace-gap")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 64, "freq_dim": 256, "ffn_dim": 64, "num_layers": 2,
}  # fmt: skip
IMAGE = {"in_channels": 36, "image_dim": 64, "added_kv_proj_dim": 32}


@dataclass(frozen=True)
class Case:
    """A model in both layouts, one path an expert, and the inputs of one forward."""

    native: tuple[Path, ...]
    diffusers: tuple[Path, ...]
    inputs: dict[str, Tensor]
    roots: tuple[Path, Path]  # what a user gives, native and diffusers

    @property
    def vace(self) -> bool:
        return "control" in self.inputs


@dataclass
class Seen:
    """One forward of diffusers: what each block got, what VACE blocks returned, what the head got and gave."""

    received: dict[str, tuple[Any, ...]]
    returned: dict[str, Any]
    residual: Tensor
    output: Tensor


def make(out: Path, seed: int, dtype: torch.dtype, folders: tuple[str, str], **config: Any) -> tuple[Path, Path]:
    """A random model of diffusers' class as `out/diffusers/…`, and the same weights by native names."""
    kind = WanVACETransformer3DModel if "vace_layers" in config else WanTransformer3DModel
    model = kind(**SMALL | config).eval()
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random) * (
            0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        )
        parameter.data = (noise + ("norm" in name and name.endswith("weight"))).to(dtype)
    native, theirs = out / "native" / folders[0], out / "diffusers" / folders[1]
    native.mkdir(parents=True)
    model.save_pretrained(theirs)
    save_file({wan.to_native(name): t.data.clone() for name, t in model.named_parameters()}, native / WEIGHTS)
    vace = {"vace_layers": config["vace_layers"]} if "vace_layers" in config else {}
    (native / "config.json").write_text(json.dumps({"num_heads": SMALL["num_attention_heads"], "eps": 1e-6} | vace))
    return native, theirs


def make_inputs(channels: int, **more: Tensor) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    text = torch.nn.functional.pad(torch.randn(1, 30, 64, generator=random), (0, 0, 0, 482))
    latents = torch.randn(1, channels, 3, 12, 10, generator=random)
    return {"latents": latents, "text": text, "timestep": torch.tensor([637])} | more


def made_case(name: str, out: Path) -> Case:
    randn = torch.Generator().manual_seed(5)
    alone = ("", "transformer")
    if name == "flf2v":  # 514 + 512 states; a bf16 source
        made = [make(out, 1, torch.bfloat16, alone, pos_embed_seq_len=514, **IMAGE)]
        inputs = make_inputs(36, image=torch.randn(2, 257, 64, generator=randn))
    elif name == "i2v22":  # condition channels, but no image branch
        made, inputs = [make(out, 2, torch.float32, alone, in_channels=36)], make_inputs(36)
    elif name == "vace-gap":  # no hint after the last block, scales that are not 1, and that bf16 rounds
        made = [make(out, 3, torch.float32, alone, num_layers=4, vace_layers=[0, 2])]
        control = torch.randn(1, 96, 3, 12, 10, generator=randn)
        inputs = make_inputs(16, control=control, control_scale=torch.tensor([0.7, 1.3]))
    else:
        pairs = (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2"))
        made = [make(out, 4 + i, torch.float32, folders) for i, folders in enumerate(pairs)]
        inputs = make_inputs(16)
    entry = ["diffusers", "WanTransformer3DModel"]
    index = {"transformer": entry, "transformer_2": entry if len(made) == 2 else [None, None]}
    (out / "diffusers/model_index.json").write_text(json.dumps(index))
    native, theirs = zip(*made, strict=True)
    return Case(native, theirs, inputs, (out / "native", out / "diffusers"))


def golden_case(name: str) -> Case:
    """One of the checkpoints of tests/data/wan, with its inputs."""
    inputs = load_file(DATA / "replay" / name / "io.safetensors")
    del inputs["out_native"]
    inputs["text"] = torch.nn.functional.pad(inputs["text"], (0, 0, 0, 512 - inputs["text"].shape[1]))
    roots = (DATA / "wan" / name / "native", DATA / "wan" / name / "diffusers")
    return Case((roots[0],), (roots[1],), inputs, roots)


def pretrained(case: Case, dtype: torch.dtype, expert: int = 0) -> torch.nn.Module:
    """In memory of its own, which is aligned: diffusers leaves weights of the right dtype where the file is mapped, at
    any multiple of 8 bytes, and a product with one row (the timestep's, in fp32) is rounded by where the weights lie.
    """
    kind = WanVACETransformer3DModel if case.vace else WanTransformer3DModel
    model = kind.from_pretrained(case.diffusers[expert], torch_dtype=dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def keep(what: dict[str, Any], name: str) -> Callable[..., None]:
    """A hook that keeps the last it is given: args before a forward, the output after it."""

    def hook(module: torch.nn.Module, *given: Any) -> None:
        what[name] = given[-1]

    return hook


def forward(case: Case, dtype: torch.dtype, expert: int = 0, device: str = "cpu") -> Seen:
    """diffusers' own, called as its pipelines do."""
    model = pretrained(case, dtype, expert).to(device)
    seen = Seen({}, {}, torch.empty(0), torch.empty(0))
    for kind in ("vace_blocks", "blocks"):
        for i, block in enumerate(getattr(model, kind, ())):
            unit = f"{kind}.{i}"
            block.register_forward_pre_hook(keep(seen.received, unit))
            block.register_forward_hook(keep(seen.returned, unit))
    model.norm_out.register_forward_pre_hook(keep(seen.received, "head"))
    given = {name: t.to(device, None if name == "timestep" else dtype) for name, t in case.inputs.items()}
    names = {
        "latents": "hidden_states", "timestep": "timestep", "text": "encoder_hidden_states",
        "image": "encoder_hidden_states_image", "control": "control_hidden_states",
        "control_scale": "control_hidden_states_scale",
    }  # fmt: skip
    seen.output = model(return_dict=False, **{names[name]: t for name, t in given.items()})[0]
    (seen.residual,) = seen.received["head"]
    return seen


def stored(tensor: Tensor) -> Tensor:
    """A trip to the disk and back: contiguous, in memory of its own."""
    return tensor.clone(memory_format=torch.contiguous_format)


def open_case(case: Case, layout: str, expert: int = 0) -> Model:
    return wan.open_model(case.roots[layout == "diffusers"])[expert].model


def shell_of(model: Model, dtype: torch.dtype, device: str = "cpu") -> Shell:
    with closing(Source(model.checkpoint)) as source:
        return Shell(model, tensors_of(source, model, names_in(model, "rest"), device), dtype, device)
