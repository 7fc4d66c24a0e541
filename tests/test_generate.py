"""`streamq generate` computes diffusers' pipelines' bits, keeps what is finished, refuses what cannot be made."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import Result, check_error
from generate_kit import TOY, short_toy
from PIL import Image
from pipeline_kit import make_pipeline
from safetensors.torch import load_file

from streamq.calibration.make import at_work
from streamq.device.cpu import CPU
from streamq.generation import GenerateSettings, generate, make
from streamq.generation.budget import outlook
from streamq.generation.prepare import prepare
from streamq.videos import read_sidecar, read_video

PROMPT = "a red circle moving right over a black background"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """How a sum is split among threads is no part of what is compared."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def quiet(line: str) -> None:
    """Nobody looks."""


def own_pipeline(folder: Path, dtype: torch.dtype, kind: str = "WanPipeline") -> Any:
    """diffusers', as its documentation has it: VAE and image encoder in fp32; weights in memory of their own."""
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    pipe = getattr(diffusers, kind).from_pretrained(folder, vae=vae, torch_dtype=dtype)
    if getattr(pipe, "image_encoder", None) is not None:
        pipe.image_encoder.float()
    for module in (pipe.transformer, pipe.transformer_2):
        for parameter in module.parameters() if module is not None else ():
            parameter.data = parameter.data.clone()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_video(pipe: Any, settings: GenerateSettings, seed: int, **how: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Latents [C, f, h, w], and frames uint8, of diffusers' own run."""
    assert settings.size is not None
    given = {
        "prompt": settings.prompts[0], "negative_prompt": settings.negative_prompt, "width": settings.size[0],
        "height": settings.size[1], "num_frames": settings.frame_num, "num_inference_steps": settings.sample_steps,
        "guidance_scale": settings.guidance,
    } | how  # fmt: skip
    seen = {}

    def last(_: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen["latents"] = given["latents"]
        return {}

    how = {"generator": torch.Generator().manual_seed(seed), "callback_on_step_end": last}
    frames = pipe(**given, **how, output_type="np").frames[0]
    return seen["latents"][0].float(), (frames * 255).round().astype(np.uint8)


def check_equal(sidecar: Path, latents: torch.Tensor, frames: np.ndarray) -> None:
    """The sidecar's files hold exactly these."""
    files = read_sidecar(sidecar).files
    assert torch.equal(load_file(sidecar.with_name(files["latents"]))["latents"], latents)
    assert np.array_equal(read_video(sidecar.with_name(files["mkv"]))[0], frames)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_diffusers_pipeline(tmp_path: Path, dtype: str) -> None:
    settings = GenerateSettings(
        str(TOY), tmp_path / "kept", (PROMPT,), seeds=(3,), negative_prompt="a blue ring", size=(64, 64), frame_num=5,
        sample_steps=3, guidance=3.0, device="cpu", dtype=dtype,
    )  # fmt: skip
    due = own_video(own_pipeline(TOY, DTYPES[dtype]), settings, 3)
    (kept,) = generate(settings, quiet)
    check_equal(kept, *due)
    least = outlook(prepare(settings), CPU())
    assert least.room.device > least.blocks
    streamed = replace(settings, save_path=tmp_path / "streamed", max_host_memory=least.fixed)
    assert outlook(prepare(streamed), CPU()).room.device == 0
    (made,) = generate(streamed, quiet)
    check_equal(made, *due)
    assert read_sidecar(made).pair == read_sidecar(kept).pair
    for kind in ("mp4", "mkv", "safetensors"):
        assert made.with_suffix(f".{kind}").read_bytes() == kept.with_suffix(f".{kind}").read_bytes()


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t2v-a14b": ("t2v-a14b", "WanPipeline", {"guidance_2": 2.5}),
    "i2v": ("i2v", "WanImageToVideoPipeline", {"image": "first"}),
    "flf2v": ("flf2v", "WanImageToVideoPipeline", {"image": "first", "last_image": "last"}),
    "i2v-a14b": ("i2v-a14b", "WanImageToVideoPipeline", {"image": "first"}),
    "ti2v": ("ti2v", "WanPipeline", {}),
    "ti2v-image": ("ti2v", "WanImageToVideoPipeline", {"image": "first"}),
    "vace": ("vace", "WanVACEPipeline", {}),
    "vace-image": ("vace", "WanVACEPipeline", {"image": "first"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bits_of_every_family(tmp_path: Path, case: str) -> None:
    family, kind, given = CASES[case]
    folder = make_pipeline(tmp_path / "pipeline", family)
    random = np.random.default_rng(0)
    paths = {}
    for name in ("first", "last"):
        paths[name] = tmp_path / f"{name}.png"
        Image.fromarray(random.integers(0, 255, (40, 72, 3), dtype=np.uint8)).save(paths[name])
    images = {key: paths[value] for key, value in given.items() if isinstance(value, str)}
    settings = GenerateSettings(
        str(folder), tmp_path / "out", ("a cat in the rain",), size=(32, 64), frame_num=5, sample_steps=2,
        guidance=4.0, guidance_2=given.get("guidance_2"), device="cpu", dtype="fp32", **images,
    )  # fmt: skip
    (made,) = generate(settings, quiet)
    how: dict[str, Any] = {key: Image.open(path) for key, path in images.items()}
    if "guidance_2" in given:
        how["guidance_scale_2"] = given["guidance_2"]
    if kind == "WanVACEPipeline" and images:
        how["reference_images"] = [how.pop("image")]
    pipe = own_pipeline(folder, torch.float32, kind)
    latents, frames = own_video(pipe, settings, 0, **how)
    if "reference_images" in how:
        latents = latents[:, 1:]
    if case == "ti2v-image":  # the pipeline puts the picture back over the last step's result
        latents[:, 0] = load_file(made.with_suffix(".safetensors"))["latents"][:, 0]
    check_equal(made, latents, frames)


def test_experts_take_turns_in_one_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_pipeline(tmp_path / "pipeline", "t2v-a14b")
    owners = []
    real = make.Transformer._borrow

    def watched(expert: Any, unit: str) -> Any:
        room = expert.store.room
        if not owners or owners[-1] is not expert:
            owners.append(expert)
            assert room.owner is None or room.owner.resident != (0, 0)
        found = real(expert, unit)
        return found

    monkeypatch.setattr(make.Transformer, "_borrow", watched)
    settings = GenerateSettings(
        str(folder), tmp_path / "out", ("a cat",), size=(32, 32), frame_num=1, sample_steps=6, device="cpu"
    )  # fmt: skip
    generate(settings, quiet)
    assert len(owners) == 2, "high noise, then low noise, and never back"
    assert owners[0].store.resident == (0, 0)


def test_streamed_text_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not fit: other rounding, no padding computed, the same states but for that."""
    settings = GenerateSettings(str(TOY), tmp_path / "out", (PROMPT,), dtype="fp32", size=(64, 64), device="cpu")
    job = prepare(settings)
    look = outlook(job, CPU())
    cpu, said = torch.device("cpu"), []
    whole = make.encode_prompts(job, list(job.videos), cpu, torch.float32, look, said.append)[PROMPT, ""]
    small = replace(look, limit=0)
    streamed = make.encode_prompts(job, list(job.videos), cpu, torch.float32, small, said.append)[PROMPT, ""]
    assert len(said) == 1 and "streamed" in said[0]
    for due, made in zip(whole, streamed, strict=True):
        assert due is not None and made is not None and made.shape == due.shape == (1, 512, 64)
        assert torch.allclose(made, due, atol=1e-5)


# -- The command -------------------------------------------------------------------------------------------------------

SMALL = ("--size", "64*64", "--frame_num", "1", "--sample_steps", "2", "--guidance", "3", "--device", "cpu")


@pytest.fixture(name="toy", scope="module")
def toy_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_toy(tmp_path_factory.mktemp("toy") / "pipeline")


def test_finished_videos_are_kept(
    toy: Path, tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, argv = tmp_path / "out", ("generate", "--model_path", toy, "--prompt", PROMPT, "--seeds", "0,4", *SMALL)
    real, calls = make._write, []

    def stopped(job: Any, video: Any, *rest: Any) -> None:
        calls.append(video.seed)
        if video.seed == 4 and len(calls) == 2:
            raise KeyboardInterrupt
        real(job, video, *rest)

    monkeypatch.setattr(make, "_write", stopped)
    result = run(*argv, "--save_path", out)
    assert result.returncode == 130 and "finished videos" in result.stderr
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == [f"0000-seed0.{kind}" for kind in ("json", "mkv", "mp4", "safetensors")]
    result = run(*argv, "--save_path", out, "--json")
    assert result.returncode == 0, result.stderr
    names = [Path(path).name for path in json.loads(result.stdout)["videos"]]
    assert names == ["0000-seed0.json", "0000-seed4.json"] and calls == [0, 4, 4]
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert "step 2 of 2" in result.stderr and "1 of 2 videos are there already" in result.stderr
    check_error(run(*argv, "--save_path", out, "--shift", "4"), "shift is 3.0", "--overwrite")
    assert run(*argv, "--save_path", out, "--shift", "4", "--overwrite", "--quiet").returncode == 0
    assert read_sidecar(out / "0000-seed4.json").pair["shift"] == 4.0


def test_a_quantized_transformer(toy: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    quantized = tmp_path / "quantized"
    how = ("--quant_type", "w8a8_all", "--format", "comfyui,lightx2v", "--device", "cpu", "--quiet")
    assert run("quant", "--model_path", toy, "--save_path", quantized, *how).returncode == 0
    argv = ("generate", "--model_path", toy, "--prompt", PROMPT, *SMALL)
    check_error(run(*argv, "--save_path", tmp_path / "out", "--transformer", quantized), "comfyui, lightx2v")
    result = run(*argv, "--save_path", tmp_path / "out", "--transformer", quantized / "comfyui", "--quiet")
    assert result.returncode == 0, result.stderr
    made = read_sidecar(tmp_path / "out" / "0000-seed0.json").made
    assert (made["transformer"], made["format"], made["types"]) == ("comfyui", "comfyui", {"w8a8": 10})
    assert made["peak_host_bytes"] > 0 and made["transformer_bytes"] > 0 and made["seconds_per_step"] > 0
    # another transformer's video is not taken for this one's
    check_error(run(*argv, "--save_path", tmp_path / "out"), "made with another transformer")


def test_two_quantized_experts(tmp_path: Path, run: Callable[..., Result]) -> None:
    """Both in one folder, one of two, each by itself; the format holds no config.json, and the heads are unusual."""
    folder, quantized = make_pipeline(tmp_path / "pipeline", "t2v-a14b"), tmp_path / "quantized"
    how = ("--quant_type", "w8a8_all", "--format", "comfyui", "--device", "cpu", "--quiet")
    assert run("quant", "--model_path", folder, "--save_path", quantized, *how).returncode == 0
    high, low = quantized / "high_noise_model", quantized / "low_noise_model"
    argv = ("generate", "--model_path", folder, "--prompt", "a cat", *SMALL, "--quiet")
    cases = {
        "both": (quantized, None, 40),
        "high": (high, None, 20),
        "each": (high, low, 40),
        "second": (None, low, 20),
    }
    for name, (first, second, layers) in cases.items():
        given = ("--transformer", first) if first else ()
        given += ("--transformer_2", second) if second else ()
        result = run(*argv, "--save_path", tmp_path / name, *given)
        assert result.returncode == 0, result.stderr
        assert read_sidecar(tmp_path / name / "0000-seed0.json").made["types"] == {"w8a8": layers}
    latents = {name: (tmp_path / name / "0000-seed0.safetensors").read_bytes() for name in cases}
    assert latents["both"] == latents["each"] and len(set(latents.values())) == 3
    result = run(*argv, "--save_path", tmp_path / "swapped", "--transformer", quantized, "--transformer_2", TOY)
    check_error(result, "num_layers|num_attention_heads", "another model's")


def test_quantized_videos_are_near_the_float_one(tmp_path: Path, run: Callable[..., Result]) -> None:
    """PSNR as the toy's README has it for round to nearest (24 steps there): int8 55 to 57 dB, 4 bits 34 to 43."""
    settings = GenerateSettings(
        str(TOY), tmp_path / "float", (PROMPT,), size=(64, 64), frame_num=5, sample_steps=8, guidance=3.0, device="cpu"
    )
    (due,) = generate(settings, quiet)
    frames = read_video(due.with_suffix(".mkv"))[0].astype(np.float64)
    for kind, form, least, most in (("w8a8", "diffusers", 45, 65), ("w4a16", "gguf", 28, 48)):
        folder = tmp_path / kind
        how = ("--quant_type", kind, "--format", form, "--device", "cpu", "--quiet")
        assert run("quant", "--model_path", TOY, "--save_path", folder, *how).returncode == 0
        (made,) = generate(replace(settings, save_path=tmp_path / f"{kind}-video", transformer=folder), quiet)
        error = np.square(read_video(made.with_suffix(".mkv"))[0] - frames).mean()
        psnr = 10 * np.log10(255**2 / error)
        assert least < psnr < most, (kind, psnr)


REFUSED: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "size": (("--size", "70*60"), ("70*60", "multiples of 16", "nearest: 64*64")),
    "frames": (("--frame_num", "8"), ("4n + 1", "nearest: 9")),
    "steps": (("--sample_steps", "0"), ("from 1 to 1000",)),
    "guidance_2": (("--guidance_2", "3"), ("second expert",)),
    "image": (("--image", TOY / "README.md"), ("t2v model takes none",)),
    "no-image": (("--image", "nowhere.png"), ("no such file",)),
    "transformer": (("--transformer", "nowhere"), ("no such folder",)),
    "transformer_2": (("--transformer_2", TOY / "transformer"), ("has one expert",)),
    "seeds": (("--seeds", "1,x"), ("not whole numbers",)),
    "twice": (("--seeds", "1,1"), ("none of them twice",)),
    "budget": (("--max_host_memory", "1MiB"), ("--max_host_memory", "are needed")),
    "both": (("--prompts", "x.txt"), ("give one of them",)),
    "no height": (("--size", "64*0"), ("--size 64*0: the height is 0",)),
    "no size": (("--size", ""), ("--size '': empty", "832*480")),
    "huge": (("--size", "1000000*1000000"), ("a width of 1000000 pixels", "32768 at most")),
    "too wide": (("--size", "20000*64"), ("20000 pixels is 1250 tokens", "positions for 1024 (16384 pixels)")),
    "too long": (("--frame_num", "4097"), ("1024 latent frames (4093)",)),
    "no words": (("--prompt", " "), ("--prompt '': empty",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, run: Callable[..., Result], case: str) -> None:
    given, says = REFUSED[case]
    argv = ("generate", "--model_path", TOY, "--save_path", tmp_path / "out", "--prompt", PROMPT, *SMALL)
    result = run(*argv, *given)
    assert result.returncode == 2, result.stderr
    check_error(result, *says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("place", "says"), [
    ("/proc/streamq/videos", "no files can be made in it|cannot be written to"),
    ("", "another run is at work on it"),
])  # fmt: skip
def test_a_folder_that_cannot_be_had_is_told_before_anything_is_loaded(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, place: str, says: str
) -> None:
    monkeypatch.setattr(make, "make_videos", None)
    out = Path(place or tmp_path / "out")
    with nullcontext() if place else at_work(out):
        result = run("generate", "--model_path", TOY, "--save_path", out, "--prompt", PROMPT, *SMALL)
        assert result.returncode == 2
        check_error(result, f"--save_path {out}", says)
        assert place or list(tmp_path.iterdir()) == [out]
    assert not out.exists()


def test_an_empty_negative_prompt_is_fine(tmp_path: Path) -> None:
    settings = GenerateSettings(str(TOY), tmp_path / "out", (PROMPT,), negative_prompt="", size=(64, 64), device="cpu")
    assert prepare(settings).videos[0].pair["negative_prompt"] == ""


def test_refused_models(toy: Path, tmp_path: Path, run: Callable[..., Result]) -> None:
    argv = ("generate", "--save_path", tmp_path / "out", "--prompt", PROMPT, *SMALL)
    alone = tmp_path / "alone"
    (toy / "transformer").rename(alone)
    check_error(run(*argv, "--model_path", alone), "a transformer alone makes no video", "vae/", "--transformer")
    alone.rename(toy / "transformer")
    check_error(run(*argv, "--model_path", TOY, "--transformer", toy / "transformer"), "num_layers is 1", "has 6")
    image = make_pipeline(tmp_path / "i2v", "i2v")
    check_error(run(*argv, "--model_path", image), "give --image")
    check_error(run("generate", "--model_path", TOY, "--save_path", tmp_path / "out"), "no prompt")
    assert not (tmp_path / "out").exists()
