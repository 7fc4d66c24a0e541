"""`streamq calib`: sets of every family are what diffusers would have given to block 0, and wrong use is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, Tiny, check_error, run
from safetensors.torch import load_file, save_file

from streamq import display
from streamq.calibration import conditions, interpolate, make
from streamq.calibration.settings import CalibSettings, Prompt, Schedule, schedule_of
from streamq.calibration.store import CalibSet, check_content, check_fits, open_set
from streamq.device import open_device
from streamq.errors import UsageError
from streamq.wan import open_model
from streamq.wan.blocks import Shell, diffusers_config

FAMILIES = ("t2v-1.3B", "i2v-14B", "flf2v-14B", "i2v-A14B", "t2v-A14B", "ti2v-5B", "vace-1.3B")
PROMPTS = tuple(Prompt(text) for text in ("a cat", "a dog", "rain on a street"))
SMALL = ("--size", "64*64", "--frame_num", "9", "--num_samples", "8", "--prompt", "a cat", "--prompt", "a dog")


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for a busy core make small tensors slow."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})


def settings_for(**how: Any) -> CalibSettings:
    return CalibSettings(**{"num_samples": 8, "size": (64, 64), "frame_num": 9, "prompts": PROMPTS} | how)


def make_one(folder: Path, model: Path, settings: CalibSettings) -> tuple[CalibSet, list[str]]:
    said: list[str] = []
    made = make.make_set(folder, settings, open_model(model), model, open_device("cpu"), about=said.append)
    return made, said


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def calib(model: Path, out: Path, *more: object) -> Result:
    return run("calib", "--model_path", model, "--save_path", out, "--device", "cpu", *more)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tiny: Tiny, tmp_path: Path, family: str) -> None:
    native, diffusers = tiny(family), tiny(family, layout="diffusers")
    settings = settings_for()
    made, said = make_one(tmp_path / "a", native, settings)
    again, _ = make_one(tmp_path / "b", diffusers, settings)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b"), "both layouts are the same model: the same bytes"
    assert made.digest == again.digest
    experts = open_model(native)
    check_fits(made, experts, head_dim=32)
    assert any(line.startswith("synthetic: text states") for line in said)
    schedule = schedule_of(settings, experts[0].model.family, len(experts), {})
    for expert in experts:
        check_content(made, expert.name)
        part = made.experts[expert.name]
        tokens = 3 * 2 * 2 if family == "ti2v-5B" else 3 * 4 * 4
        assert (part.shapes.tokens, part.shapes.dim, len(part.samples)) == (tokens, 64, 8)
        assert {sample.rows for sample in part.samples} == {2 if family == "ti2v-5B" else 1}
        limit = 1000 * schedule.boundary
        for sample in part.samples:
            assert sample.timestep < limit if expert.name == "low_noise_model" else sample.timestep >= limit
        bins = interpolate.bins_of(schedule.steps_of(expert.name), settings.time_bins)
        for steps in bins:
            assert any(s.timestep in [schedule.timesteps[i] for i in steps] for s in part.samples), "a bin is empty"
        assert [s.prompt for s in part.samples].count("") == 2, "every fourth is without a prompt"


def reference(model: Any, dtype: torch.dtype, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What block 0 (VACE: VACE block 0) gets in diffusers' own forward of the whole model."""
    import diffusers

    config = diffusers_config(model)
    kind = diffusers.WanVACETransformer3DModel if "vace_layers" in config else diffusers.WanTransformer3DModel
    whole = kind(**config).eval()
    tensors = load_file(model.checkpoint.files[0].path)
    whole.load_state_dict({name: t.float() for name, t in tensors.items()})
    if dtype != torch.float32:
        for name, parameter in whole.named_parameters():
            if not set(name.split(".")) & {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}:
                parameter.data = parameter.data.to(dtype)
    names = ["hidden", "states", *(["control"] if "vace_layers" in config else []), "proj", "rotary"]
    seen: dict[str, Any] = {}

    def hook(_: Any, args: tuple[Any, ...]) -> None:
        seen.update(zip(names, args, strict=True))

    (whole.vace_blocks[0] if "control" in names else whole.blocks[0]).register_forward_pre_hook(hook)
    with torch.no_grad(), make.all_threads():
        whole(**{k: v if k == "timestep" or v is None else v.to(dtype) for k, v in inputs.items()})
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_block_inputs_are_diffusers_own(tiny: Tiny, tmp_path: Path, family: str, dtype: str) -> None:
    """One sample made by hand, through the whole model, unstreamed: equal bits at block 0."""
    source = tiny(family, layout="diffusers")
    settings = settings_for(dtype=dtype, num_samples=5, seed=3)
    made, _ = make_one(tmp_path / "set", source, settings)
    expert, number = open_model(source)[-1], 4
    model, part = expert.model, made.experts[expert.name]
    sample, stored = part.samples[number], load_file(part.checkpoint.files[0].path)
    c, f, h, w = (48, 3, 4, 4) if model.family == "ti2v" else (16, 3, 8, 8)
    x0 = conditions.smooth_latents((c, f, h, w), "x0", 3, expert.name, number)
    noise = conditions.drawn((c, f, h, w), "noise", 3, expert.name, number)
    sigma = sample.timestep / 1000
    noised = (1 - sigma) * x0 + sigma * noise
    text = conditions._synthetic_text(3, sample.prompt, 64)
    inputs: dict[str, Any] = {
        "timestep": torch.tensor([sample.timestep]),
        "encoder_hidden_states": torch.cat([text, torch.zeros(512 - len(text), 64)])[None],
    }
    if model.family in ("i2v", "flf2v"):
        mask, held = torch.zeros(4, f, h, w), torch.zeros(c, f, h, w)
        mask[:, 0], held[:, 0] = 1, x0[:, 0]
        if model.family == "flf2v":
            mask[3, -1], held[:, -1] = 1, x0[:, -1]
        noised = torch.cat([noised, mask, held])
    if "blocks.0.attn2.add_k_proj.weight" in model.tensors:
        which = [prompt.text for prompt in PROMPTS].index(sample.prompt)
        inputs["encoder_hidden_states_image"] = conditions.drawn(
            (2 if model.family == "flf2v" else 1, 257, 64), "image rows", 3, which
        )
    if model.family == "ti2v":
        noised[:, 0] = x0[:, 0]
        inputs["timestep"] = torch.cat([torch.zeros(4), torch.full((8,), sample.timestep)])[None]
    if model.family == "vace":
        inputs["control_hidden_states"] = torch.cat([torch.zeros(32, f, h, w), torch.ones(64, f, h, w)])[None]
    seen = reference(model, interpolate.TORCH_DTYPES[dtype], inputs | {"hidden_states": noised[None]})
    assert torch.equal(stored[f"hidden_states.{number}"], seen["hidden"])
    assert torch.equal(stored[f"encoder_hidden_states.{sample.states}"], seen["states"])
    assert torch.equal(stored["rotary.cos"], seen["rotary"][0]) and torch.equal(stored["rotary.sin"], seen["rotary"][1])
    projected = stored[f"timestep_proj.{number}"]
    if sample.rows > 1:
        projected = projected[stored[f"token_row.{number}"].long()][None]
    assert torch.equal(projected, seen["proj"])
    if model.family == "vace":
        assert torch.equal(stored[f"control.{number}"], seen["control"])
        assert torch.equal(stored["control_scale"], torch.ones(2))


def test_text_is_padded_with_zeros(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    real = Shell.stem

    def stem(self: Shell, latents: Any, timestep: Any, text: torch.Tensor, *more: Any) -> Any:
        seen.append(text)
        return real(self, latents, timestep, text, *more)

    monkeypatch.setattr(Shell, "stem", stem)
    make_one(tmp_path / "set", tiny(), settings_for())
    lengths = {int((text[0].abs().sum(dim=1) > 0).sum()) for text in seen}
    assert all(text.shape == (1, 512, 64) for text in seen)
    assert 1 in lengths and all(10 <= length <= 80 for length in lengths - {1}), lengths


def test_samples_do_not_depend_on_those_that_follow(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    few, _ = make_one(tmp_path / "few", source, settings_for(num_samples=4))
    many, _ = make_one(tmp_path / "many", source, settings_for(num_samples=12))
    one, other = (load_file(s.experts[""].checkpoint.files[0].path) for s in (few, many))
    assert few.experts[""].samples == many.experts[""].samples[:4]
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed, _ = make_one(tmp_path / "seed", source, settings_for(num_samples=4, seed=1))
    third = load_file(changed.experts[""].checkpoint.files[0].path)
    assert not torch.equal(one["hidden_states.0"], third["hidden_states.0"])


@pytest.mark.parametrize("bins", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("prompts", [1, 3, 8])
def test_draws(bins: int, prompts: int) -> None:
    schedule = Schedule(5.0, 5.0, tuple(1 - i / 40 for i in range(40)), 0.0)
    settings = settings_for(num_samples=4 * bins * prompts, time_bins=bins)
    draws = interpolate.draws_of(settings, schedule, "", prompts, 0)
    found = interpolate.bins_of(range(40), bins)
    for number, steps in enumerate(found):
        mine = draws[number::bins]
        assert all(draw.step in steps for draw in mine)
        assert sum(draw.unconditional for draw in mine) * 4 == len(mine), "every bin has its share"
        assert len({draw.step for draw in mine}) >= min(len(steps), len(mine)) // 2, "spread inside the bin"
    used = [sum(d.prompt == p and not d.unconditional for d in draws) for p in range(prompts)]
    assert max(used) - min(used) <= 1, used
    assert any(draw.unconditional for draw in draws[:4]) or settings.num_samples < 4


def test_smooth_latents() -> None:
    latents = conditions.smooth_latents((4, 6, 16, 16), "x")
    assert torch.allclose(latents.flatten(1).std(dim=1), torch.ones(4), atol=1e-4)
    near = (latents[..., 1:] * latents[..., :-1]).mean()
    assert near > 0.7, "neighbours are alike"
    assert torch.equal(latents, conditions.smooth_latents((4, 6, 16, 16), "x"))


def test_latents_and_text_states_of_the_user(tiny: Tiny, tmp_path: Path) -> None:
    source, out = tiny(), tmp_path / "set"
    latents = torch.randn(2, 16, 3, 8, 8)
    save_file({"clips": latents}, tmp_path / "latents.safetensors")
    save_file({"cat": torch.randn(7, 64), "negative": torch.randn(2, 64)}, tmp_path / "text.safetensors")
    given = ("--latents", tmp_path / "latents.safetensors", "--text_embeds", tmp_path / "text.safetensors")
    result = calib(source, out, "--size", "64*64", "--num_samples", "4", "--json", *given)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["status"] == "done" and figures["experts"] == {"": 4} and figures["synthetic"] == []
    assert figures["bytes"] == (out / "inputs.safetensors").stat().st_size
    assert {sample.prompt for sample in open_set(out).experts[""].samples} == {"cat", ""}
    assert "cost:" in result.stderr and result.stderr.index("cost:") < result.stderr.index("sample 1")
    save_file({"cat": torch.randn(7, 32)}, tmp_path / "text.safetensors")
    check_error(calib(source, tmp_path / "x", *given, "--size", "64*64"), "32", "64")
    assert not (tmp_path / "x").exists()


def test_a_bare_transformer_says_so(tiny: Tiny, tmp_path: Path) -> None:
    result = calib(tiny("i2v-14B", layout="diffusers") / "transformer", tmp_path / "set", *SMALL, "--quiet")
    assert result.returncode == 0 and result.stdout == "", result.stderr
    for what in ("text states", "image states", "latents", "image condition"):
        assert f"synthetic: {what}" in result.stderr
    assert "sample 1" not in result.stderr


# -- Another tool's dump -----------------------------------------------------------------------------------------------


def dump(path: Path, timesteps: Sequence[float], sizes: Sequence[int] = (8,), width: int = 64) -> Path:
    """As msModelSlim writes them: x, t, context, seq_len of each forward of the native model."""
    made = torch.Generator().manual_seed(0)
    texts = [torch.randn(count, width, generator=made) for count in (9, 1)]
    calls = []
    for i, timestep in enumerate(timesteps):
        size = sizes[i % len(sizes)]
        latents = torch.randn(16, 3, 8, size, generator=made)
        calls.append([[latents], torch.tensor([timestep]), [texts[i % 2]], 3 * 4 * size // 2])
    torch.save(calls, path)
    return path


def test_dump(tiny: Tiny, tmp_path: Path) -> None:
    path = dump(tmp_path / "calib_data_t2v.pth", [999.0, 990.0, 900.0, 876.0, 800.0, 500.0, 300.0, 100.0])
    source = tiny("t2v-A14B", layout="diffusers")
    result = calib(source, tmp_path / "set", "--dump", path, "--num_samples", "3", "--json")
    assert result.returncode == 0, result.stderr
    made = open_set(tmp_path / "set")
    times = {name: [s.timestep for s in part.samples] for name, part in made.experts.items()}
    assert times == {"high_noise_model": [999.0, 990.0, 900.0], "low_noise_model": [800.0, 500.0, 300.0]}
    assert [s.states for s in made.experts["high_noise_model"].samples] == [0, 1, 0]
    call = torch.load(path)[5]
    text = torch.cat([call[2][0], torch.zeros(512 - len(call[2][0]), 64)])[None]
    seen = reference(
        open_model(source)[1].model, torch.bfloat16,
        {"hidden_states": call[0][0][None], "timestep": call[1], "encoder_hidden_states": text},
    )  # fmt: skip
    stored = load_file(made.experts["low_noise_model"].checkpoint.files[0].path)
    assert torch.equal(stored["hidden_states.1"], seen["hidden"]) and torch.equal(
        stored["timestep_proj.1"], seen["proj"]
    )
    assert torch.equal(stored["encoder_hidden_states.1"], seen["states"])


def test_dumps_that_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    two, one = tiny("t2v-A14B"), tiny()
    cases = [
        (one, dump(tmp_path / "sizes.pth", [999.0, 500.0], sizes=(8, 12)), ("8, 8]", "8, 12]")),
        (one, dump(tmp_path / "width.pth", [999.0], width=32), ("32", "64")),
        (two, dump(tmp_path / "high.pth", [999.0, 900.0]), ("low_noise_model", "875")),
        (tiny("i2v-14B"), tmp_path / "sizes.pth", ("36",)),
    ]
    for source, path, says in cases:
        result = calib(source, tmp_path / "out", "--dump", path)
        assert result.returncode == 2
        check_error(result, *says)
        assert not (tmp_path / "out").exists()


# -- The command -------------------------------------------------------------------------------------------------------


def test_refused_before_anything_is_created(tiny: Tiny, tmp_path: Path) -> None:
    source, pair, out = tiny(), tiny("t2v-A14B"), tmp_path / "out"
    file = tmp_path / "file.safetensors"
    save_file({"a": torch.zeros(4)}, file)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    cases: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
        (("--size", "65*64"), ("65*64", "16")),
        (("--size", "big"), ("width*height",)),
        (("--frame_num", "10"), ("10", "4n + 1")),
        (("--num_samples", "0"), ("--num_samples 0",)),
        (("--mode", "fast"), ("interpolate, trajectory, dump",)),
        (("--mode", "dump"), ("--dump",)),
        (("--mode", "trajectory", "--dump", file), ("--dump",)),
        (("--dump", file, "--prompt", "x"), ("--prompt",)),
        (("--dump", file), (file.name,)),
        (("--videos", tmp_path, "--latents", file), ("--videos", "--latents")),
        (("--videos", tmp_path), ("vae|no .|clip",)),
        (("--prompts", prompts, "--prompt", "x"), ("--prompts", "--prompt")),
        (("--text_embeds", file, "--prompt", "x"), ("--text_embeds",)),
        (("--prompts", tmp_path / "none.txt"), ("none.txt",)),
        (("--latents", file), ("shape|[4]",)),
        (("--mode", "trajectory", "--latents", file), ("starts from noise",)),
        (("--shift", "0"), ("--shift 0",)),
        (("--max_host_memory", "100MB"), ("--max_host_memory", "100000000")),
        (("--device", "tpu"), ("tpu",)),
        (("--num_sample", "3"), ("--num_samples",)),
    ]
    for more, says in cases:
        result = calib(source, out, *more)
        assert result.returncode == 2, (more, result.stderr)
        check_error(result, *says)
        assert not out.exists(), more
    check_error(calib(pair, out, "--sample_steps", "1", *SMALL), "--sample_steps 1", "low_noise_model")
    check_error(calib(tiny("s2v-14B"), out), "s2v")
    check_error(calib(tiny("animate-14B"), out), "animate")
    check_error(calib(source, source / "calib"), "inside")
    check_error(calib(source, source.parent), "above")
    assert not out.exists()


def test_a_folder_that_is_in_use(tiny: Tiny, tmp_path: Path) -> None:
    source, out = tiny(), tmp_path / "set"
    assert calib(source, out, *SMALL).returncode == 0
    before = files_of(out)
    again = calib(source, out, *SMALL, "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["status"] == "already done"
    other = calib(source, out, *SMALL, "--seed", "5")
    assert other.returncode == 2
    check_error(other, "seed", "0", "5", "--overwrite")
    check_error(calib(tiny(seed=7), out, *SMALL), "another set", "model")
    assert files_of(out) == before
    assert calib(source, out, *SMALL, "--seed", "5", "--overwrite").returncode == 0
    assert open_set(out).document["settings"]["seed"] == 5
    damaged = bytearray((out / "inputs.safetensors").read_bytes())
    damaged[-1] ^= 1
    (out / "inputs.safetensors").write_bytes(damaged)
    check_error(calib(source, out, *SMALL, "--seed", "5"), "sha256")
    (out / "calib.json").unlink()  # what an interrupted run leaves
    (out / "inputs.safetensors.partial").write_bytes(b"x")
    assert calib(source, out, *SMALL).returncode == 0
    assert files_of(out) == before
    (out / "holiday.jpg").write_bytes(b"x")
    refused = calib(source, out, *SMALL)
    assert refused.returncode == 2
    check_error(refused, "holiday.jpg")
    assert calib(source, out, *SMALL, "--overwrite").returncode == 0 and (out / "holiday.jpg").exists()
    with make.at_work(out):
        busy = calib(source, out, *SMALL, "--overwrite")
    assert busy.returncode == 2
    check_error(busy, "another run")


def test_refusing_needs_no_torch(tiny: Tiny, tmp_path: Path) -> None:
    code = "import sys; from streamq.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    arguments = ["calib", "--model_path", str(tiny()), "--save_path", str(tmp_path / "x"), "--max_host_memory", "1MB"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2 False", done.stderr


TRAJECTORY = (
    "--mode",
    "trajectory",
    "--num_samples",
    "4",
    "--size",
    "64*64",
    "--sample_steps",
    "8",
    "--prompt",
    "a cat",
)


@pytest.fixture(name="whole")
def whole_fixture(tiny: Tiny, tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A model, and the set that TRAJECTORY makes of it when nothing comes between."""
    source = tiny()
    settings = settings_for(mode="trajectory", num_samples=4, sample_steps=8, prompts=(Prompt("a cat"),))
    make_one(tmp_path / "whole", source, settings)
    return source, files_of(tmp_path / "whole")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("mode", ["trajectory", "interpolate"])
def test_interrupted(
    whole: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
    mode: str,
) -> None:
    (source, files), out = whole, tmp_path / "set"

    def stop(_: object, line: str) -> None:
        if line.startswith(("step 2 of", "sample 2 of")):
            os.kill(os.getpid(), how)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with monkeypatch.context() as patch:
        patch.setattr(display.CalibProgress, "__call__", stop)
        result = calib(source, out, *(TRAJECTORY if mode == "trajectory" else SMALL))
    signal.signal(signal.SIGINT, before)
    assert result.returncode == 130
    check_error(result, f"interrupted; {out} holds no complete set, the same command starts again")
    assert sorted(path.name for path in out.iterdir()) == ["inputs.safetensors.partial"]
    assert calib(source, out, *TRAJECTORY).returncode == 0
    assert files_of(out) == files


@pytest.mark.slow
def test_killed(whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    (source, files), out = whole, tmp_path / "set"
    code = """import os, signal, sys
from streamq import cli, display
display.CalibProgress.__call__ = lambda _, line: os.kill(os.getpid(), signal.SIGKILL) if "step 2" in line else None
cli.main(sys.argv[1:])"""
    arguments = ["calib", "--model_path", source, "--save_path", out, "--device", "cpu", *TRAJECTORY]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in out.iterdir()) == ["inputs.safetensors.partial"]
    assert run(*arguments).returncode == 0
    assert files_of(out) == files


@pytest.mark.parametrize(("key", "value"), [("states", -1), ("states", 99), ("rows", 0), ("states", "0")])
def test_a_document_that_lies(whole: tuple[Path, dict[str, bytes]], tmp_path: Path, key: str, value: object) -> None:
    """Of samples that are not in the file: found when the set is opened, and not at block 0."""
    place = tmp_path / "whole" / "calib.json"  # where `whole` has made it
    assert place.name in whole[1]
    document = json.loads(place.read_text())
    document["experts"][""]["samples"][0][key] = value
    place.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="calib"):
        open_set(place.parent)
