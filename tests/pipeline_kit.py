"""Complete tiny Wan pipelines in diffusers' layout, random, made offline: what `from_pretrained` takes as it is.

`make_pipeline(folder, family)`: t2v, t2v-a14b (two experts), i2v (36 channels, CLIP branch), flf2v, i2v-a14b, ti2v (48
channels, patched VAE) and vace. The parts are cached per session: a second pipeline of a family is a copy of files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

_TEXT = (
    "a an the of in on at over under with and to from red green blue black white dark bright cat dog man woman child"
    " bird fish car boat train street city sea beach forest mountain river snow rain sun moon night day slow fast walk"
    " run swim fly dance jump camera pans zooms left right up down sign says open blurry low quality , . ! ? é"
)
WORDS = _TEXT.split()
TEXT_DIM = 32
HEAD_DIM = 32
FAMILIES: dict[str, dict[str, Any]] = {
    "t2v": {},
    "t2v-a14b": {"boundary": 0.875},
    "i2v": {"channels": 36, "clip": True, "pipeline": "WanImageToVideoPipeline"},
    "flf2v": {"channels": 36, "clip": True, "positions": 514, "pipeline": "WanImageToVideoPipeline"},
    "i2v-a14b": {"channels": 36, "boundary": 0.9, "pipeline": "WanImageToVideoPipeline"},
    "ti2v": {"channels": 48, "z_dim": 48},
    "vace": {"vace": [0, 1], "pipeline": "WanVACEPipeline"},
}
_made: dict[tuple[str, int], Path] = {}
_scratch: list[tempfile.TemporaryDirectory[str]] = []


def make_pipeline(folder: Path, family: str = "t2v", seed: int = 0) -> Path:
    """Write a pipeline of `family` into `folder`, which it makes, and return it."""
    if (family, seed) not in _made:
        scratch = tempfile.TemporaryDirectory(prefix="streamq-pipeline-")
        _scratch.append(scratch)  # removed when the interpreter ends
        path = Path(scratch.name) / family
        _write(path, seed, **FAMILIES[family])
        _made[family, seed] = path
    shutil.copytree(_made[family, seed], folder, dirs_exist_ok=True)
    return folder


def _write(
    path: Path, seed: int, *, channels: int = 16, z_dim: int = 16, clip: bool = False, positions: int | None = None,
    boundary: float | None = None, vace: list[int] | None = None, pipeline: str = "WanPipeline",
) -> None:  # fmt: skip
    import torch
    from diffusers import UniPCMultistepScheduler

    path.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _text_encoder(path)
        _vae(path, z_dim)
        for name in ("transformer", "transformer_2")[: 1 if boundary is None else 2]:
            _transformer(path / name, channels, z_dim, clip, positions, vace)
        if clip:
            _image_encoder(path)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    ).save_pretrained(path / "scheduler")
    kind = "WanVACETransformer3DModel" if vace else "WanTransformer3DModel"
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",
        "boundary_ratio": boundary,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", kind],
        "transformer_2": ["diffusers", kind] if boundary is not None else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if pipeline != "WanVACEPipeline":
        index["expand_timesteps"] = z_dim == 48
    if pipeline == "WanImageToVideoPipeline":
        index["image_encoder"] = ["transformers", "CLIPVisionModel"] if clip else [None, None]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"] if clip else [None, None]
    (path / "model_index.json").write_text(json.dumps(index, indent=2))


def _text_encoder(path: Path, layers: int = 3) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(path / "tokenizer")
    config = UMT5Config(
        vocab_size=len(vocabulary), d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=layers, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    UMT5EncoderModel(config).eval().save_pretrained(path / "text_encoder")


def _vae(path: Path, z_dim: int) -> None:
    import torch
    from diffusers import AutoencoderKLWan

    how: dict[str, Any] = {"base_dim": 8, "z_dim": z_dim, "num_res_blocks": 1}
    how |= {"latents_mean": torch.randn(z_dim).tolist(), "latents_std": (torch.rand(z_dim) + 0.5).tolist()}
    if z_dim == 48:  # Wan2.2's: pixels in 2x2 patches, 16 times smaller in all
        how |= {"decoder_base_dim": 8, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        how |= {"scale_factor_spatial": 16, "num_res_blocks": 2}
    AutoencoderKLWan(**how).eval().save_pretrained(path / "vae")


def _transformer(
    path: Path, channels: int, z_dim: int, clip: bool, positions: int | None, vace: list[int] | None
) -> None:
    from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

    how: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": HEAD_DIM, "in_channels": channels, "out_channels": z_dim,
        "text_dim": TEXT_DIM, "freq_dim": 256, "ffn_dim": 96, "num_layers": 2,
    }  # fmt: skip
    if clip:
        how |= {"added_kv_proj_dim": 2 * HEAD_DIM, "image_dim": 1280, "pos_embed_seq_len": positions}
    if vace:
        WanVACETransformer3DModel(vace_layers=vace, vace_in_channels=96, **how).save_pretrained(path)
    else:
        WanTransformer3DModel(**how).save_pretrained(path)


def _image_encoder(path: Path) -> None:
    """CLIP as Wan2.1 has it in what the transformer sees: 257 tokens of 1280, of pictures of 224x224."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16, image_size=224,
        patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    CLIPVisionModel(config).eval().save_pretrained(path / "image_encoder")
    CLIPImageProcessor().save_pretrained(path / "image_processor")
