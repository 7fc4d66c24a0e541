"""A LightX2V inference configuration to begin with, and the command that takes it.

Settings are those of LightX2V's own `configs/wan/wan_{t2v,i2v,flf2v,vace}.json`, `configs/wan22/wan_ti2v_t2v.json` and
`wan_moe_{t2v,i2v}.json`, without offloading; the guidance of Wan2.2 I2V is switched on as in Wan2.2's own program.
Names of `--model_cls` and `--task`: `lightx2v/infer.py`, `scripts/wan`, `scripts/wan22`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from streamq.card import FOLDER
from streamq.wan import Model

NAME = "lightx2v_config.json"
_CKPT = {"high_noise_model": "high_noise_quantized_ckpt", "low_noise_model": "low_noise_quantized_ckpt"}
_ATTENTION = ("self_attn_1_type", "cross_attn_1_type", "cross_attn_2_type")


def _settings(steps: int, frames: int, size: tuple[int, int], guide: Any, shift: float, **more: Any) -> dict[str, Any]:
    return {
        "infer_steps": steps,
        "target_video_length": frames,
        "text_len": 512,
        "target_height": size[0],
        "target_width": size[1],
        **dict.fromkeys(_ATTENTION, "flash_attn3"),
        "sample_guide_scale": guide,
        "sample_shift": shift,
        "enable_cfg": True,
        "cpu_offload": False,
        **more,
    }


_TI2V = {"num_channels_latents": 48, "vae_stride": [4, 16, 16], "fps": 24, "use_image_encoder": False}
# (family, two experts) -> --model_cls, --task, settings
_KNOWN: dict[tuple[str, bool], tuple[str, str, dict[str, Any]]] = {
    ("t2v", False): ("wan2.1", "t2v", _settings(50, 81, (480, 832), 6, 8)),
    ("i2v", False): ("wan2.1", "i2v", _settings(40, 81, (480, 832), 5, 3)),
    ("flf2v", False): ("wan2.1", "flf2v", _settings(50, 81, (720, 1280), 5, 16)),
    ("vace", False): ("wan2.1_vace", "vace", _settings(50, 81, (480, 832), 5, 16)),
    ("ti2v", False): ("wan2.2", "t2v", _settings(50, 121, (704, 1280), 5.0, 5.0, **_TI2V)),
    ("t2v", True): ("wan2.2_moe", "t2v", _settings(40, 81, (720, 1280), [4.0, 3.0], 12.0, boundary=0.875)),
    ("i2v", True): (
        "wan2.2_moe",
        "i2v",
        _settings(40, 81, (720, 1280), [3.5, 3.5], 5.0, boundary=0.9, use_image_encoder=False),
    ),
}


def keys(scheme: str, folders: Mapping[str, str], *, smoothed: bool) -> dict[str, Any]:
    """What LightX2V has to be told of the weights. `scheme`: `int8` or `fp8`; `folders`: expert -> folder.

    With two experts `dit_quantized_ckpt` stays unset, or both would load that one; and no config.json beside the
    weights is read then, so that the affine tensors of a smoothed model are asked for here.
    """
    found: dict[str, Any] = {"dit_quantized": True, "dit_quant_scheme": f"{scheme}-vllm"}
    found |= {_CKPT.get(expert, "dit_quantized_ckpt"): folder for expert, folder in folders.items()}
    return found | ({"quant_method": "advanced_ptq"} if smoothed else {})


def sample(model: Model, scheme: str, experts: Iterable[str], *, smoothed: bool) -> bytes:
    """The file. Of a model that no configuration of LightX2V's is known for, only what concerns the weights."""
    folders = {expert: "/".join(part for part in (FOLDER, expert) if part) for expert in experts}
    known = _KNOWN.get(_kind(model, folders))
    document = (known[2] if known else {}) | keys(scheme, folders, smoothed=smoothed)
    return (json.dumps(document, indent=2) + "\n").encode()


def command(model: Model, experts: Iterable[str]) -> str:
    """The command line; what is written large is to be filled in."""
    known = _KNOWN.get(_kind(model, list(experts)))
    kind, task = known[:2] if known else ("MODEL_CLS", "TASK")
    image = " --image_path IMAGE" * (task in ("i2v", "flf2v")) + " --last_frame_path IMAGE" * (task == "flf2v")
    return (
        f"python -m lightx2v.infer --model_cls {kind} --task {task} --model_path ORIGINAL_MODEL"
        f" --config_json {FOLDER}/{NAME} --prompt PROMPT{image} --save_result_path OUT.mp4"
    )


def _kind(model: Model, experts: Any) -> tuple[str, bool]:
    """An expert of Wan2.2's I2V that stands alone has no image branch, and is none of these."""
    alone = model.family == "i2v" and len(experts) == 1 and "blocks.0.attn2.add_k_proj.weight" not in model.tensors
    return ("", False) if alone else (model.family, len(experts) == 2)
