"""What `suite.py` compares, each in a process of its own: streamq, what everybody else does, and what is the floor.

    python benchmarks/contestants.py NAME '{"source": DIR, "out": DIR, ...}'

The last line of standard output is the process's own account, in JSON. Whatever is written is on the disk when the
process ends. A peer is used through its public interface, as its documentation says.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import quant

Spec = dict[str, Any]  # source, out, device, and what a contestant wants besides
PEERS = ("torchao", "sdnq", "msmodelslim")
# The linear layers of blocks, which is what streamq takes; by name in diffusers' model.
BLOCK_LINEAR = re.compile(r"blocks\.\d+\.(attn[12]\.(to_([qkv]|out\.0)|add_[kv]_proj)|ffn\.net\.(0\.proj|2))")
OUTSIDE = ["condition_embedder", "patch_embedding", "proj_out"]  # left float, as streamq does


def versions() -> dict[str, str | None]:
    """Of the peers and of what streamq stands on; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in ("torch", "diffusers", "safetensors", "numpy", *PEERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def missing(peer: str) -> str | None:
    """Why a peer does not take part, or None."""
    if importlib.util.find_spec(peer) is None:
        return "not installed"
    if peer == "msmodelslim":
        return "installed, not run: its Wan adapter needs the Wan repository and an NPU"
    return None


# -- streamq -----------------------------------------------------------------------------------------------------------


def streamq(spec: Spec) -> Spec:
    """A command. `stages`: with clocks in it, and what they say as `stages`. `least`: with the smallest budget."""
    argv: list[str] = spec["argv"]
    calibrated = spec.get("calibrated", False)
    import torch  # noqa: F401

    from streamq import cli, display, pipeline  # noqa: F401

    if calibrated:
        import streamq.calibration.replay  # noqa: F401
    if argv[0] == "generate":
        import streamq.generation.make  # noqa: F401

        _import_pipelines()
    quant.note_base()
    if spec.get("least"):
        argv = [*argv, *_least_budget(argv, spec["device"])]
    found: Spec = {}
    steps = _watch_steps() if argv[0] == "generate" else []
    if spec.get("stages"):
        import stages

        how = {"calibrated": calibrated, "synchronize": spec.get("synchronize", False)}
        found["stages"] = stages.run(argv, device=spec["device"], **how)
    else:
        assert cli.main(argv) == 0
    return found | (_video(Path(spec["out"]), steps) if steps else {})


def _least_budget(argv: list[str], device: str) -> list[str]:
    """The budget at which no block stays in memory."""
    import argparse

    from streamq.device import open_device
    from streamq.generation import budget, command
    from streamq.generation.prepare import prepare

    parser = argparse.ArgumentParser()
    command.add_options(parser)
    look = budget.outlook(prepare(command.settings_of(parser.parse_args(argv[1:]))), open_device(device))
    if device == "cpu":
        return ["--max_host_memory", str(look.fixed)]
    return ["--max_device_memory", str(look.fixed), "--max_host_memory", str(1 << 20)]


def _import_pipelines() -> None:
    """What both sides import once they are at work, so that it is in neither's `work`."""
    import av  # noqa: F401
    from diffusers import AutoencoderKLWan, WanPipeline  # noqa: F401
    from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401


def _watch_steps() -> list[float]:
    """When each step of a video ends, as `generate` goes on."""
    from streamq.generation import make

    real, times = make._Progress.__call__, []

    def watched(*args: Any) -> Any:
        times.append(time.monotonic())
        return real(*args)

    make._Progress.__call__ = watched  # type: ignore[method-assign]
    return times


def _video(out: Path, steps: list[float]) -> Spec:
    """`seconds_per_step`: without the first one, before which everything is made ready."""
    per_step = (steps[-1] - steps[0]) / (len(steps) - 1)
    frames = hashlib.sha256(next(out.glob("*.mkv")).read_bytes()).hexdigest()
    return {"seconds_per_step": round(per_step, 4), "frames_sha256": frames}


# -- What is the floor, and what a whole-model tool does ---------------------------------------------------------------


def copy(spec: Spec) -> Spec:
    """Every source byte read, `nbytes` written."""
    quant.copy(_weights(spec), Path(spec["out"]), spec["nbytes"])
    return {}


def load_all(spec: Spec) -> Spec:
    """The state dict at once, eager int8."""
    quant.load_all(_weights(spec), Path(spec["out"]), spec["every"], spec["device"])
    return {}


def forward(spec: Spec) -> Spec:
    """One pass of the calibration set through the float blocks; `work`: of that alone."""
    import calibrate

    import streamq.calibration.store
    import streamq.wan.blocks  # noqa: F401

    quant.note_base()
    return {"work": calibrate.forward(Path(spec["source"]), Path(spec["calib"]), spec["device"])["seconds"]}


def load_all_smooth(spec: Spec) -> Spec:
    """Calibrated, whole model: a hook on every layer, one pass, SmoothQuant at alpha 0.5 for each, eager int8."""
    make = _model(spec, "bfloat16")
    import torch
    from methods import open_chain
    from safetensors.torch import save_file

    from streamq.calibration.store import open_set

    quant.note_base()
    model, seen = make(), {}
    chain = open_chain(open_set(Path(spec["calib"])))

    def look(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            most = args[0].abs().flatten(0, -2).amax(dim=0).float()
            seen[name] = torch.maximum(seen[name], most) if name in seen else most

        return hook

    linears = {name: module for name, module in model.named_modules() if BLOCK_LINEAR.fullmatch(name)}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(look(name))
    with torch.no_grad():
        for hidden, shared in zip(chain.hidden, chain.shared, strict=True):
            shared, x = shared.to(spec["device"]), hidden.to(spec["device"])
            for block in model.blocks:
                x = block(x, shared.encoder_hidden_states, shared.timestep_proj, shared.rotary_emb)
        state = dict(model.state_dict())
        for name in linears:
            weight = state.pop(f"{name}.weight").float()
            state[f"{name}.smooth"] = (seen[name].clamp(min=1e-5) / weight.abs().amax(dim=0).clamp(min=1e-5)).sqrt()
            weight = weight * state[f"{name}.smooth"]
            scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=2**-23)
            state[f"{name}.weight"] = torch.clamp(torch.round(weight / scale), -128, 127).to(torch.int8)
            state[f"{name}.weight_scale"] = scale
    out = Path(spec["out"])
    out.mkdir()
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, out / "all.safetensors")
    return {}


# -- Peers -------------------------------------------------------------------------------------------------------------


def torchao(spec: Spec) -> Spec:
    """`quantize_` with Int8DynamicActivationInt8WeightConfig on diffusers' model, saved as torchao's docs say."""
    make = _model(spec, spec["dtype"])
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quant.note_base()
    model = make()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    out = Path(spec["out"])
    out.mkdir()
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contents, out / "model.safetensors", {"format": "pt"} | metadata)
    return {"quantized_layers": sum(name.endswith("weight_qdata") for name in contents)}


def sdnq(spec: Spec) -> Spec:
    """`sdnq_post_load_quant` on diffusers' model, and `save_sdnq_model`. `options`: SDNQConfig's."""
    make = _model(spec, spec["dtype"])
    from sdnq import save_sdnq_model, sdnq_post_load_quant

    quant.note_base()
    how = {"quantization_device": spec["device"], "minimum_allowed_numel": 1, "add_skip_keys": False}
    model = sdnq_post_load_quant(make(), **how | spec["options"])
    save_sdnq_model(model, spec["out"], max_shard_size="100GB")
    return {"quantized_layers": sum(type(one).__name__ == "SDNQLinear" for one in model.modules())}


def published(spec: Spec) -> Spec:
    """SVDQuant as its authors' tool runs it (`published.py`): whole model, every candidate. Writes nothing."""
    from svdquant import by_published

    from streamq.calibration.store import open_set

    quant.note_base()
    by_published(Path(spec["source"]), open_set(Path(spec["calib"])), "int4")
    Path(spec["out"]).mkdir()
    return {}


def pipeline(spec: Spec) -> Spec:
    """diffusers' own pipeline, everything in memory, and the same video files."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKLWan, WanPipeline

    from streamq.videos import write_lossless, write_mp4

    _import_pipelines()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    quant.note_base()
    source, out, times = Path(spec["source"]), Path(spec["out"]), []
    vae = AutoencoderKLWan.from_pretrained(source / "vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(source, vae=vae, torch_dtype=torch.bfloat16).to(spec["device"])
    pipe.set_progress_bar_config(disable=True)

    def step(pipe: Any, number: int, timestep: Any, given: Spec) -> Spec:
        times.append(time.monotonic())
        return {}

    made = pipe(
        prompt=spec["prompt"], negative_prompt="", width=spec["size"][0], height=spec["size"][1],
        num_frames=spec["frame_num"], num_inference_steps=spec["steps"], guidance_scale=spec["guidance"],
        generator=torch.Generator("cpu").manual_seed(0), output_type="np", callback_on_step_end=step,
    )  # fmt: skip
    frames = (np.asarray(made.frames[0]) * 255).round().astype("uint8")
    out.mkdir()
    write_mp4(out / "video.mp4", frames, 16)
    write_lossless(out / "video.mkv", frames, 16)
    return _video(out, times)


# -- The process -------------------------------------------------------------------------------------------------------

CONTESTANTS: dict[str, Callable[[Spec], Spec]] = {
    "streamq": streamq, "copy": copy, "load_all": load_all, "forward": forward, "load_all_smooth": load_all_smooth,
    "torchao": torchao, "sdnq": sdnq, "published": published, "pipeline": pipeline,
}  # fmt: skip


def _weights(spec: Spec) -> Path:
    """The folder with the transformer's files."""
    inside = Path(spec["source"]) / "transformer"
    return inside if inside.is_dir() else Path(spec["source"])


def _model(spec: Spec, dtype: str) -> Callable[[], Any]:
    """Imports what loads diffusers' whole transformer; returns that."""
    import torch
    from diffusers import WanTransformer3DModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def load() -> Any:
        model = WanTransformer3DModel.from_pretrained(_weights(spec), torch_dtype=getattr(torch, dtype))
        return model.eval().requires_grad_(False).to(spec["device"])

    return load


def _sync(out: Path) -> int:
    """Bring every file to the disk; returns their bytes."""
    total = 0
    for path in (path for path in out.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        total += path.stat().st_size
    return total


def _device_peak(device: str) -> int:
    torch: Any = sys.modules.get("torch")  # which a copy has no use for
    if device == "cpu" or torch is None:
        return 0
    return int(torch.get_device_module(device.partition(":")[0]).max_memory_allocated())


def main() -> None:
    """See the module."""
    name, spec = sys.argv[1], json.loads(sys.argv[2])
    with redirect_stdout(sys.stderr):
        found = CONTESTANTS[name](spec)
        written = _sync(Path(spec["out"])) if "out" in spec else 0
        found = quant.account() | {"written": written, "peak_device": _device_peak(spec["device"])} | found
    print(json.dumps(found))


if __name__ == "__main__":
    main()
