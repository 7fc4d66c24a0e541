"""Runs in the diffusers format for its tests, and their tensors as torchao computes with them, in this file's words.

Files are read with safetensors' own reader and with `json`, never by the saver.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import Result, run
from nunchaku_runs import one_thread, source, tensors_in
from torch import Tensor, nn

from streamq.resolve import library

DATA = Path(__file__).parent / "data" / "torchao"
STEM = "diffusion_pytorch_model"
WHOLE = f"{STEM}.safetensors"
CALIBRATION = {"num_samples": 2, "time_bins": 2, "size": "64*64", "frame_num": 5, "rows": 64, "gram_rows": 128}
FP32 = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}  # kept by diffusers, as parts of a name
PROMPT = 20  # tokens of the text; zeros behind them, as the pipelines pad it
Step = Mapping[str, Any]
Entry = dict[str, Any]


# -- Runs --------------------------------------------------------------------------------------------------------------


def step(act: str, weight: str = "int8", scope: str = "", include: Iterable[str] = ("*",), **keys: Any) -> Step:
    """A `linear_quant` step. `scope`: of the activation, per_token unless said."""
    qconfig = {
        "act": {"scope": scope or "per_token", "dtype": act, "method": "none" if act == "float" else "minmax"},
        "weight": {"scope": "per_channel", "dtype": weight},
    }
    return {"type": "linear_quant", "qconfig": qconfig, "include": list(include), **keys}


W8A16, W8A8, FP8 = step("float"), step("int8"), step("fp8_e4m3", "fp8_e4m3")
STATIC = step("int8", scope="per_tensor", include=["*blocks.*"])
SMOOTH: Step = {"type": "smooth_quant", "method": "smoothquant", "alpha": 0.5}


def recipe(path: Path, what: str | Iterable[Step]) -> Path:
    """A recipe of the library by its name, or one of these steps, with little to calibrate on."""
    if isinstance(what, str):
        document = yaml.safe_load(library()[what])
    else:
        save = [{"type": "diffusers_format_saver"}]
        spec = {"process": [dict(one) for one in what], "save": save}
        document = {"apiversion": "multimodal_sd_modelslim_v1", "spec": spec}
    document["spec"]["calibration"] = CALIBRATION
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document))
    return path


def command(model: Path, out: Path, what: str | Iterable[Step], *more: object) -> list[object]:
    made = recipe(out.with_name(f"{out.name}.yaml"), what)
    return ["--model_path", model, "--save_path", out, "--config_path", made, "--device", "cpu", *more]


def quant(model: Path, out: Path, what: str | Iterable[Step], *more: object) -> Result:
    """Run it to its end, which must be a good one."""
    with one_thread():
        done = run("quant", *command(model, out, what, "--quiet", "--json", *more))
    assert done.returncode == 0, done.stderr
    return done


class Runs:
    """Models and outputs that are made once a session; nobody writes to them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models: dict[str, Path] = {}
        self._outputs: dict[str, Path] = {}

    def model(self, family: str = "t2v-1.3B", **how: Any) -> Path:
        """As `nunchaku_runs.source`, of width 64."""
        how = {"dim": 64, "ffn": 128, "layout": "diffusers"} | how
        key = repr((family, sorted(how.items())))
        if key not in self._models:
            self._models[key] = source(self.root / f"model{len(self._models)}", family, **how)
        return self._models[key]

    def out(self, model: Path, what: str | Iterable[Step], *more: object) -> Path:
        """As `quant`."""
        what = what if isinstance(what, str) else list(what)
        key = repr((model, what, more))
        if key not in self._outputs:
            self._outputs[key] = self.root / f"out{len(self._outputs)}"
            quant(model, self._outputs[key], what, *more)
        return self._outputs[key]


# -- Reading -----------------------------------------------------------------------------------------------------------


def header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


def metadata(path: Path) -> dict[str, Any]:
    """A file's metadata, its strings parsed but for `format`."""
    found = header(path)["__metadata__"]
    return {key: text if key == "format" else json.loads(text) for key, text in found.items()}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def layer(stored: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A layer's tensors by suffix."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}


def quantized(stored: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix("._weight_qdata") for name in stored if name.endswith("._weight_qdata")]


# -- torchao's layers, by their formulas -------------------------------------------------------------------------------


def dequantized(parts: Mapping[str, Tensor]) -> Tensor:
    """The float32 weight for the layer's own input."""
    weight = parts["_weight_qdata"].float() * parts["_weight_scale"]
    pre = parts.get("_weight_act_pre_scale")
    return weight if pre is None else weight * pre.float()


def computed(x: Tensor, parts: Mapping[str, Tensor], kind: str) -> Tensor:
    """What torchao makes of x, in the steps and dtypes in which it does. fp8: its product accumulates in fp32."""
    codes, scale = parts["_weight_qdata"], parts["_weight_scale"].flatten()
    pre = parts.get("_weight_act_pre_scale")
    scaled = x if pre is None else x * pre
    if kind == "w8a16":
        whole = scaled.reshape(-1, scaled.shape[-1]) @ codes.T.to(x.dtype) * scale.to(x.dtype)
        return whole.reshape(*x.shape[:-1], -1) + parts["bias"]
    if kind == "fp8":
        amax = scaled.abs().amax(-1, keepdim=True).clamp_min(1e-12)
        own = (amax / 448).float()
        q = (scaled.float() / own).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (q.float() @ codes.float().T * own * scale + parts["bias"].float()).to(x.dtype)
    own = parts.get("_weight_act_quant_scale")
    if own is None:
        own = (scaled.abs().amax(-1, keepdim=True) / 127.5).clamp_min(2.0**-23).float()
    own = own.reshape(-1, 1) if own.numel() == 1 else own
    q = torch.clamp(torch.round(scaled.float() * (1 / own)), -128, 127)
    product = (q.double() @ codes.double().T).float() * own
    return (product.to(x.dtype) * scale + parts["bias"]).to(x.dtype)


# -- Models ------------------------------------------------------------------------------------------------------------


def inputs(config: Mapping[str, Any], *, text: float = 1.0) -> dict[str, Tensor]:
    """What diffusers' pipelines give, in bf16: zeros behind the text, and control for the first of two frames."""
    chance = torch.Generator().manual_seed(11)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance).bfloat16()

    found = {
        "hidden_states": noise(1, config["in_channels"], 2, 8, 8), "timestep": torch.tensor([637]),
        "encoder_hidden_states": text * noise(1, 512, config["text_dim"]),
    }  # fmt: skip
    found["encoder_hidden_states"][:, PROMPT:] = 0
    if config["in_channels"] == 48:  # TI2V: a time step for each token
        found["timestep"] = torch.full((1, 2 * 4 * 4), 637)
        found["timestep"][:, :16] = 0
    if config["image_dim"] is not None:
        count = 1 if config["pos_embed_seq_len"] is None else 2
        found["encoder_hidden_states_image"] = noise(count, 257, config["image_dim"])
    if "vace_layers" in config:
        found["control_hidden_states"] = noise(1, config["vace_in_channels"], 1, 8, 8)
        found["control_hidden_states_scale"] = torch.ones(len(config["vace_layers"]))
    return found


def forward(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


class Loaded:
    """A folder as stock diffusers has it."""

    def __init__(self, folder: Path) -> None:
        import diffusers

        self.folder, self.config = folder, config_of(folder)
        self.stored = tensors_in(folder)
        self.kind = getattr(diffusers, self.config["_class_name"])
        self.model, self.report = self.kind.from_pretrained(
            folder, torch_dtype=torch.bfloat16, output_loading_info=True
        )
        self.layers = quantized(self.stored)

    def floats(self, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
        """diffusers' float model with these parameters, as `from_pretrained` casts them."""
        model = self.kind.from_config({k: v for k, v in self.config.items() if k != "quantization_config"})
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
        for name, parameter in model.named_parameters():
            if not FP32 & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return model.eval()

    def effective(self) -> nn.Module:
        """The float model with the weights that the quantized layers stand for."""
        plain = {name: tensor for name, tensor in self.stored.items() if "._weight_" not in name}
        made = {f"{name}.weight": dequantized(layer(self.stored, name)) for name in self.layers}
        return self.floats(plain | made)


# -- Damage ------------------------------------------------------------------------------------------------------------


def sign(folder: Path) -> None:
    """Make the manifest say what the files are."""
    from safetensors.torch import load_file

    document = json.loads((folder / "streamq.json").read_text())
    for name, about in document["files"].items():
        raw = (folder / name).read_bytes()
        about |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        if "tensors" in about:
            found = load_file(folder / name).items()
            about["tensors"] = {key: hashlib.sha256(bits(tensor)).hexdigest() for key, tensor in found}
    (folder / "streamq.json").write_text(json.dumps(document))


def copies(sound: Path, tmp: Path) -> dict[str, Path]:
    """Copies of a folder, for a damage beside its manifest, with a manifest that agrees with it, and without any."""
    return {how: Path(shutil.copytree(sound, tmp / how)) for how in ("old manifest", "new manifest", "no manifest")}


def settle(folders: Mapping[str, Path]) -> None:
    """Once the copies are damaged."""
    sign(folders["new manifest"])
    (folders["no manifest"] / "streamq.json").unlink()


def verify(folder: Path, *more: object) -> list[str]:
    result = run("verify", folder, *more, "--json")
    report = json.loads(result.stdout)
    assert report["ok"] == (result.returncode == 0) == (not report["problems"])
    return list(report["problems"])
