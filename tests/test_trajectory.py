"""`streamq calib --mode trajectory`: bit for bit what diffusers' pipelines compute, with the transformer streamed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_error, run
from pipeline_kit import make_pipeline
from safetensors.torch import load_file

from streamq.calibration import make
from streamq.calibration.encoders import encode_texts, find_parts
from streamq.calibration.interpolate import TORCH_DTYPES
from streamq.calibration.settings import CalibSettings, Prompt
from streamq.calibration.store import CalibSet
from streamq.calibration.trajectory import Trajectory
from streamq.device import open_device
from streamq.wan import open_model

TEXTS = ("a red cat on a beach", "a train in the snow, night")
STEPS, SEED, GUIDANCE = 5, 11, 3.0


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for a busy core make small tensors slow."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})


@pytest.fixture(name="picture", scope="module")
def picture_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "first.png"
    pixels = torch.randint(0, 255, (48, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).resize((96, 64)).save(path)
    return path


def denoise(folder: Path, model: Path, settings: CalibSettings, spy: pytest.MonkeyPatch) -> tuple[CalibSet, Trajectory]:
    """Make a set, and keep hold of the denoising that made it."""
    runs: list[Trajectory] = []
    real = Trajectory.write

    def write(self: Trajectory, *args: Any, **more: Any) -> Any:
        runs.append(self)
        return real(self, *args, **more)

    with spy.context() as patch:
        patch.setattr(Trajectory, "write", write)
        made = make.make_set(folder, settings, open_model(model), model, open_device("cpu"), about=lambda _: None)
    return made, runs[0]


def pipeline(model: Path, dtype: str) -> Any:
    import diffusers

    name = json.loads((model / "model_index.json").read_text())["_class_name"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of `torch_dtype`, which diffusers 0.35 needs
        # The VAE in float32, as its model cards advise.
        vae = diffusers.AutoencoderKLWan.from_pretrained(model / "vae", torch_dtype=torch.float32)
        pipe = getattr(diffusers, name).from_pretrained(model, vae=vae, torch_dtype=TORCH_DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    for one in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        for parameter in one.parameters() if one is not None else ():
            # Weights that are used as they lie in a mapped file may start anywhere, and MKL's fp32 kernels round
            # by alignment: two loads of the same file need not give equal bits. In memory of their own they do.
            parameter.data = parameter.data.clone()
    return pipe


def theirs(model: Path, settings: CalibSettings, video: int, picture: Path | None) -> tuple[Any, list[Any]]:
    """The pipeline's own latents for a video, and what each forward gave to the first block."""
    from PIL import Image

    pipe, seen = pipeline(model, settings.dtype), []
    for one in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if one is not None:
            first = one.vace_blocks[0] if hasattr(one, "vace_blocks") else one.blocks[0]
            first.register_forward_pre_hook(lambda _, args: seen.append([a for a in args if torch.is_tensor(a)]))
    texts = [settings.prompts[video].text, ""]
    states = encode_texts(find_parts(model), texts, torch.device("cpu"), TORCH_DTYPES[settings.dtype])
    padded = [torch.cat([rows, rows.new_zeros(512 - len(rows), rows.shape[1])])[None] for rows in states]
    width, height = settings.size
    how: dict[str, Any] = {"prompt_embeds": padded[0], "negative_prompt_embeds": padded[1]}
    if picture is not None:
        how["image"] = Image.open(picture)
        if "flf2v" in model.name:
            how["last_image"] = how["image"]
    with make.all_threads():
        frames = pipe(
            height=height, width=width, num_frames=settings.frame_num, num_inference_steps=STEPS, output_type="latent",
            guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(SEED + video), **how,
        ).frames  # fmt: skip
    return frames, seen


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("t2v", "fp32"), ("t2v-a14b", "bf16"), ("i2v", "bf16"), ("ti2v", "bf16"), ("vace", "fp32")]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in
       (("t2v", "bf16"), ("i2v", "fp32"), ("flf2v", "fp32"), ("i2v-a14b", "fp32"), ("ti2v", "fp32"), ("vace", "bf16"))],
)  # fmt: skip
def test_equals_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Path, family: str, dtype: str
) -> None:
    """Latents of every video, and every stored block-0 input: equal bits, given the same text states."""
    model = make_pipeline(tmp_path / family, family)
    image = picture if family in ("i2v", "flf2v", "i2v-a14b") else None
    settings = CalibSettings(
        mode="trajectory", num_samples=8, time_bins=2, size=(64, 64), frame_num=5, sample_steps=STEPS, seed=SEED,
        guidance=GUIDANCE, dtype=dtype, prompts=tuple(Prompt(text, image=image) for text in TEXTS),
    )  # fmt: skip
    made, run_ = denoise(tmp_path / "set", model, settings, monkeypatch)
    assert made.document["synthetic"] == [], "the pipeline has everything"
    assert run_.videos == (4 if family == "i2v-a14b" and len(run_.steps["high_noise_model"]) == 1 else 2)
    for video in range(2):
        frames, seen = theirs(model, settings, video, image)
        assert torch.equal(frames, run_.latents[video])
        for expert, part in made.experts.items():
            stored = load_file(part.checkpoint.files[0].path)
            for number, kept in enumerate(run_.kept[expert]):
                if kept.video != video:
                    continue
                hidden, states, *_ = seen[2 * kept.step + kept.negative]
                assert torch.equal(stored[f"hidden_states.{number}"], hidden)
                assert torch.equal(stored[f"encoder_hidden_states.{part.samples[number].states}"], states)
    for video in range(run_.videos):
        assert (tmp_path / "set" / "thumbnails" / f"{video:02d}.png").read_bytes().startswith(b"\x89PNG")


def test_a_video_that_starts_with_a_picture_ti2v(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Path
) -> None:
    """TI2V as WanImageToVideoPipeline runs it: a clean first frame, whose tokens are at timestep 0."""
    import diffusers
    from PIL import Image

    model = make_pipeline(tmp_path / "ti2v", "ti2v")
    settings = CalibSettings(
        mode="trajectory", num_samples=4, time_bins=2, size=(64, 64), frame_num=5, sample_steps=STEPS, seed=SEED,
        guidance=GUIDANCE, dtype="fp32", prompts=(Prompt(TEXTS[0], image=picture),),
    )  # fmt: skip
    made, run_ = denoise(tmp_path / "set", model, settings, monkeypatch)
    assert {sample.rows for sample in made.experts[""].samples} == {2}
    base = pipeline(model, "fp32")
    pipe = diffusers.WanImageToVideoPipeline(
        base.tokenizer, base.text_encoder, base.vae, base.scheduler, transformer=base.transformer, expand_timesteps=True
    )
    pipe.set_progress_bar_config(disable=True)
    states = encode_texts(find_parts(model), [TEXTS[0], ""], torch.device("cpu"), torch.float32)
    padded = [torch.cat([rows, rows.new_zeros(512 - len(rows), rows.shape[1])])[None] for rows in states]
    with make.all_threads():
        frames = pipe(
            image=Image.open(picture), prompt_embeds=padded[0], negative_prompt_embeds=padded[1], height=64, width=64,
            num_frames=5, num_inference_steps=STEPS, output_type="latent", guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(SEED),
        ).frames  # fmt: skip
    assert torch.equal(frames, run_.latents[0])


def test_samples_of_a_trajectory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bins of each expert's own steps, with and without the prompt; as few videos as that many samples take."""
    model = make_pipeline(tmp_path / "pair", "t2v-a14b")
    settings = CalibSettings(
        mode="trajectory", num_samples=10, time_bins=3, size=(32, 32), frame_num=5, sample_steps=12, shift=5.0,
        prompts=tuple(map(Prompt, TEXTS)), boundary=0.8,
    )  # fmt: skip
    made, run_ = denoise(tmp_path / "set", model, settings, monkeypatch)
    assert run_.videos == 2
    for name, part in made.experts.items():
        assert len(part.samples) == 10
        assert all((s.timestep < 800) == (name == "low_noise_model") for s in part.samples)
        assert sum(s.prompt == "" for s in part.samples) in (4, 5)
        steps = [kept.step for kept in run_.kept[name]]
        assert steps == sorted(steps), "in the order of the denoising"
        thirds = [set(run_.steps[name][i * len(run_.steps[name]) // 3 : (i + 1) * len(run_.steps[name]) // 3])
                  for i in range(3)]  # fmt: skip
        assert [sum(step in third for step in steps) for third in thirds] == [4, 3, 3]
    again, _ = denoise(tmp_path / "again", model, settings, monkeypatch)
    assert made.digest == again.digest


def test_cost_comes_first_and_thumbnails_are_told(tmp_path: Path) -> None:
    model = make_pipeline(tmp_path / "t2v", "t2v")
    out = tmp_path / "set"
    mine = ("--mode", "trajectory", "--size", "32*32", "--frame_num", "5", "--sample_steps", "4", "--num_samples", "4")
    result = run("calib", "--model_path", model, "--save_path", out, *mine, "--prompt", "a cat", "--json")
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    costs = [line for line in lines if line.startswith("cost:")]
    assert lines[: len(costs)] == costs and "1 videos denoised, 8 forwards" in costs[1]
    figures = json.loads(result.stdout)
    assert figures["cost"]["forwards"] == 8 and figures["cost"]["make_pflop"] > 0
    assert figures["synthetic"] == [] and figures["warnings"] == []
    assert [path.name for path in (out / "thumbnails").iterdir()] == ["00.png"]
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("UniPCMultistepScheduler", "NoSuchScheduler"))
    refused = run(
        "calib", "--model_path", model, "--save_path", tmp_path / "x", "--mode", "trajectory", "--size", "32*32"
    )
    assert refused.returncode == 2
    check_error(refused, "NoSuchScheduler")
    assert not (tmp_path / "x").exists()


def test_clips_and_pictures_of_the_user(tmp_path: Path, picture: Path) -> None:
    """Interpolation on a whole I2V pipeline: clips through the VAE, the picture through CLIP; nothing is synthetic."""
    from PIL import Image

    model, clips = make_pipeline(tmp_path / "i2v", "i2v"), tmp_path / "clips" / "one"
    clips.mkdir(parents=True)
    for number in range(5):
        Image.open(picture).rotate(10 * number).save(clips / f"{number}.png")
    prompts = tmp_path / "prompts.jsonl"
    (tmp_path / "first.png").write_bytes(picture.read_bytes())
    prompts.write_text(json.dumps({"text": "a red cat", "image": "first.png"}) + "\n")
    given = ("--videos", tmp_path / "clips", "--prompts", prompts, "--size", "64*64", "--frame_num", "5")
    result = run(
        "calib", "--model_path", model, "--save_path", tmp_path / "set", "--num_samples", "4", "--json", *given
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["synthetic"] == []
