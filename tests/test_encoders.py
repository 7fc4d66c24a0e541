"""Encoders and media files: what the pipelines make of the same texts, pictures and clips, in bounded memory."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for module in ("transformers", "diffusers", "PIL", "av", "tokenizers"):
    pytest.importorskip(module)

import numpy  # noqa: E402
from PIL import Image  # noqa: E402
from pipeline_kit import make_pipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from streamq.calibration import encoders  # noqa: E402
from streamq.errors import RunError, UsageError  # noqa: E402

CPU = torch.device("cpu")
TEXTS = [
    "a cat runs",
    "",
    "  The camera pans &amp;amp; zooms\n on the red boat , a dog swims !",
    "a " * 600,
    "a cat runs",
]


@pytest.fixture(name="pipeline", scope="module")
def pipeline_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`pipeline("i2v")` -> (folder, loaded pipeline), once a module."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(family: str) -> tuple[Path, Any]:
        if family not in made:
            from diffusers import DiffusionPipeline

            folder = make_pipeline(tmp_path_factory.mktemp("pipelines") / family, family)
            made[family] = folder, DiffusionPipeline.from_pretrained(folder)
        return made[family]

    yield make


@pytest.fixture(name="pictures", scope="module")
def pictures_fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random pictures, one of them grey and turned by its EXIF."""
    folder, random = tmp_path_factory.mktemp("pictures"), numpy.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=numpy.uint8)).save(folder / "first.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random.integers(0, 256, (60, 80), dtype=numpy.uint8)).save(folder / "last.jpg", exif=exif)
    return folder / "first.png", folder / "last.jpg"


def encode_prompt(pipe: Any, texts: list[str], dtype: Any = None) -> Any:
    with torch.no_grad():
        return pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=512, dtype=dtype)[0]


# --- where the parts are ----------------------------------------------------------------------------------------------


def test_parts_are_found_from_any_place_in_a_pipeline(pipeline: Any) -> None:
    folder = pipeline("i2v")[0]
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for path in (folder, folder / "transformer", weights):
        parts = encoders.find_parts(path)
        assert parts.root == folder and parts.text_encoder == folder / "text_encoder"
        assert parts.image_processor == folder / "image_processor"
        assert parts.scheduler["flow_shift"] == 3.0 and parts.model_index["boundary_ratio"] is None
    assert encoders.find_parts(pipeline("t2v-a14b")[0] / "transformer_2").model_index["boundary_ratio"] == 0.875


def test_a_link_into_a_cache_is_a_part_of_where_the_link_is(pipeline: Any, tmp_path: Path) -> None:
    folder = pipeline("t2v")[0]
    (tmp_path / "snapshot" / "transformer").mkdir(parents=True)
    shutil.copy(folder / "model_index.json", tmp_path / "snapshot")
    (tmp_path / "snapshot" / "vae").symlink_to(folder / "vae")
    parts = encoders.find_parts(tmp_path / "snapshot" / "transformer")
    assert parts.vae == tmp_path / "snapshot" / "vae" and parts.text_encoder is None


def test_bare_and_native_folders_have_no_parts(pipeline: Any, tmp_path: Path) -> None:
    shutil.copytree(pipeline("t2v")[0] / "transformer", tmp_path / "bare")
    (tmp_path / "bare" / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"never opened")
    parts = encoders.find_parts(tmp_path / "bare")
    assert parts == encoders.Parts(None, None, None, None, None, None, {}, {})
    for call in (
        lambda: encoders.encode_texts(parts, ["a"], CPU, torch.float32),
        lambda: encoders.encode_images(parts, [tmp_path / "a.png"], CPU, torch.float32),
        lambda: encoders.LatentCodec(parts, CPU),
    ):
        with pytest.raises(UsageError, match="comes without a .*; give the diffusers pipeline"):
            call()


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_the_pipelines_but_for_rounding(pipeline: Any) -> None:
    folder, pipe = pipeline("t2v")
    found = encoders.encode_texts(encoders.find_parts(folder), TEXTS, CPU, torch.float32)
    for mine, theirs in zip(found, encode_prompt(pipe, TEXTS), strict=True):
        count = len(mine)
        assert mine.dtype == torch.float32 and not theirs[count:].any() and theirs[:count].any(dim=1).all()
        assert float((mine - theirs[:count]).norm() / theirs[:count].norm()) < 1e-6
    assert [len(one) for one in found] == [4, 1, 15, 512, 4]
    assert torch.equal(found[3], encode_prompt(pipe, [TEXTS[3]])[0])  # no padding in it: the same bits
    assert torch.equal(found[0], found[4])


@pytest.mark.parametrize(("dtype", "close"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_texts_in_half_precision_have_the_pipelines_dtypes(pipeline: Any, dtype: str, close: float) -> None:
    from transformers import UMT5EncoderModel

    folder, pipe = pipeline("t2v")
    half = getattr(torch, dtype)
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=half)
    mine = encoders._umt5(folder / "text_encoder", encoders.open_checkpoint(folder / "text_encoder"), half)
    own = dict(mine.named_parameters())
    for name, parameter in model.named_parameters():
        assert own[name].dtype == parameter.dtype, name
    whole = encode_prompt(pipe, [TEXTS[2]])[0]
    found = encoders.encode_texts(encoders.find_parts(folder), [TEXTS[2]], CPU, half)[0]
    assert found.dtype == half
    assert float((found.float() - whole[: len(found)]).norm() / whole[: len(found)].norm()) < close


def test_prompts_are_cleaned_as_the_pipelines_do() -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in [*TEXTS, "l\u00e2\u20ac\u2122eau &lt;b&gt; \t x", "\u3000 \u201cquoted\u201d\r\n", "&amp;lt;"]:
        assert encoders.prompt_clean(text) == prompt_clean(text)


def test_one_layer_of_the_text_encoder_is_resident_at_a_time(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipeline("t2v")[0]
    real, resident, models = encoders._umt5, [0], []

    def watched(*args: Any) -> Any:
        model = real(*args)
        layer = sum(p.numel() for p in model.encoder.block[0].parameters())
        assert all(p.is_meta for p in model.parameters())
        models.append((weakref.ref(model), layer))

        def look(*_: Any) -> None:
            there = [p.numel() for p in model.parameters() if not p.is_meta]
            resident.append(sum(there))

        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(look)
        return model

    monkeypatch.setattr(encoders, "_umt5", watched)
    encoders.encode_texts(encoders.find_parts(folder), TEXTS, CPU, torch.bfloat16)
    reference, layer = models[0]
    assert max(resident) == layer and len(resident) == 1 + 3 * 7 * 4  # layers, their linears, distinct texts
    gc.collect()
    assert reference() is None


def test_of_the_embedding_only_the_rows_of_tokens_are_read(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = encoders.read_rows
    monkeypatch.setattr(encoders, "read_rows", lambda *args: read.append(args[2:]) or real(*args))
    encoders.encode_texts(encoders.find_parts(pipeline("t2v")[0]), ["a cat a cat"], CPU, torch.float32)
    assert len(read) == 3 and all(count == 1 for _, count in read)


@pytest.mark.parametrize("damage", ["cut", "missing", "shape", "kind", "pickle", "vocabulary"])
def test_a_damaged_text_encoder_is_named(pipeline: Any, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(pipeline("t2v")[0], tmp_path / "pipeline")
    weights, config = folder / "text_encoder/model.safetensors", folder / "text_encoder/config.json"
    tensors, name = load_file(weights), "encoder.block.1.layer.0.SelfAttention.k.weight"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        save_file({k: v for k, v in tensors.items() if k != name}, weights)
    elif damage == "shape":
        save_file(tensors | {name: tensors[name][:5].contiguous()}, weights)
    elif damage == "kind":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "t5"}))
    elif damage == "pickle":
        weights.rename(weights.with_name("pytorch_model.bin"))
    elif damage == "vocabulary":
        save_file(tensors | {"shared.weight": tensors["shared.weight"][:4].contiguous()}, weights)
    says = {
        "cut": "truncated", "missing": f"{name} is missing", "shape": r"is F32 \[5, 32\], .*\[32, 32\]",
        "kind": "'t5'", "pickle": "pytorch_model.bin is a pickle", "vocabulary": "4 tokens, the tokenizer gives number",
    }[damage]  # fmt: skip
    with pytest.raises(UsageError, match=says):
        encoders.encode_texts(encoders.find_parts(folder), ["a cat"], CPU, torch.float32)


def test_a_text_encoder_that_changes_is_noticed(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(pipeline("t2v")[0], tmp_path / "pipeline")
    weights, real = folder / "text_encoder/model.safetensors", encoders._stream

    def cut(*args: Any) -> None:
        real(*args)
        os.truncate(weights, 4000)

    monkeypatch.setattr(encoders, "_stream", cut)
    with pytest.raises(RunError, match="text_encoder"):
        encoders.encode_texts(encoders.find_parts(folder), ["a cat"], CPU, torch.float32)


# --- pictures and the VAE ---------------------------------------------------------------------------------------------


def test_image_states_are_the_pipelines_bit_for_bit(pipeline: Any, pictures: tuple[Path, Path]) -> None:
    from diffusers.utils import load_image

    folder, pipe = pipeline("i2v")
    found = encoders.encode_images(encoders.find_parts(folder), pictures, CPU, torch.float32)
    for mine, path in zip(found, pictures, strict=True):
        with torch.no_grad():
            theirs = pipe.encode_image(load_image(str(path)), CPU)
        assert mine.shape == (257, 1280) and torch.equal(mine, theirs[0])


@pytest.mark.parametrize(("family", "both"), [("i2v", False), ("flf2v", True), ("i2v-a14b", False)])
def test_image_condition_is_the_pipelines_bit_for_bit(
    pipeline: Any, pictures: tuple[Path, Path], family: str, both: bool
) -> None:
    from diffusers.utils import load_image

    folder, pipe = pipeline(family)
    ready = [pipe.video_processor.preprocess(load_image(str(p)), height=64, width=96).float() for p in pictures]
    with torch.no_grad():
        theirs = pipe.prepare_latents(
            ready[0], 1, 16, 64, 96, 9, torch.float32, CPU, None, None, ready[1] if both else None
        )[1]  # fmt: skip
    with encoders.LatentCodec(encoders.find_parts(folder), CPU) as codec:
        mine = codec.image_condition(pictures[0], pictures[1] if both else None, (96, 64), 9)
    assert mine.shape == (20, 3, 8, 12) and torch.equal(mine, theirs[0])


def test_first_frame_is_the_pipelines_bit_for_bit(pipeline: Any, pictures: tuple[Path, Path]) -> None:
    from diffusers import WanImageToVideoPipeline
    from diffusers.utils import load_image

    folder, pipe = pipeline("ti2v")
    own = WanImageToVideoPipeline(**pipe.components, expand_timesteps=True, image_encoder=None, image_processor=None)
    ready = own.video_processor.preprocess(load_image(str(pictures[1])), height=64, width=96).float()
    with torch.no_grad():
        theirs = own.prepare_latents(ready, 1, 48, 64, 96, 9, torch.float32, CPU)[1]
    with encoders.LatentCodec(encoders.find_parts(folder), CPU) as codec:
        mine = codec.first_frame(pictures[1], (96, 64))
        assert codec.z_dim == 48
    assert mine.shape == (48, 1, 4, 6) and torch.equal(mine, theirs[0])


def test_vae_normalises_and_shows_the_first_frame(pipeline: Any) -> None:
    folder, pipe = pipeline("t2v")
    video = torch.rand(3, 9, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = (torch.tensor(pipe.vae.config[f"latents_{what}"]).view(1, 16, 1, 1, 1) for what in ("mean", "std"))
    codec = encoders.LatentCodec(encoders.find_parts(folder), CPU)
    latents = codec.encode(video)
    with torch.no_grad():
        raw = pipe.vae.encode(video[None]).latent_dist.mode()
        frames = pipe.vae.decode(latents[None] * std + mean, return_dict=False)[0]
    assert latents.shape == (16, 3, 8, 12) and torch.allclose(latents, ((raw - mean) / std)[0], atol=1e-5)
    theirs = pipe.video_processor.postprocess_video(frames, output_type="np")[0, 0]  # of all frames' decoding
    first = codec.decode_first(latents)
    assert first.shape == (64, 96, 3) and first.dtype == torch.uint8
    assert int((first.int() - torch.from_numpy((theirs * 255).round()).int()).abs().max()) <= 1
    held = weakref.ref(codec._vae)
    codec.close()
    assert held() is None


def test_a_vae_that_is_a_pickle_is_not_opened(pipeline: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline("t2v")[0], tmp_path / "pipeline")
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(UsageError, match="vae: cannot be loaded"):
        encoders.LatentCodec(encoders.find_parts(folder), CPU)


OFFLINE = """
import socket, sys
def refuse(*args): sys.exit("asked for a network: %r" % (args[1:],))
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *args, **how: refuse(None, *args)
import torch
from pathlib import Path
from streamq.calibration import encoders
parts, cpu = encoders.find_parts(Path(sys.argv[1])), torch.device("cpu")
encoders.encode_texts(parts, ["a cat"], cpu, torch.bfloat16)
encoders.encode_images(parts, [Path(sys.argv[2])], cpu, torch.bfloat16)
encoders.LatentCodec(parts, cpu).close()
"""


def test_nothing_asks_for_a_network_and_nothing_is_printed(pipeline: Any, pictures: tuple[Path, Path]) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OFFLINE, pipeline("i2v")[0], pictures[0]],
        capture_output=True, text=True, env=env, timeout=120, check=False,
    )  # fmt: skip
    # diffusers imports torchao where it is installed, and both say what of it does not fit this machine.
    said = [line for line in done.stderr.splitlines() if "torchao" not in line and "torch/utils/_pytree.py" not in line]
    assert (done.returncode, done.stdout, said) == (0, "", [])
