"""`--lora`: the same bytes as a checkpoint into which the LoRAs were merged before, for every style of keys."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from calib_kit import CALIBRATION, write_recipe
from conftest import Result, check_error, run, run_process, write_tiny
from lora_kit import STYLES, Made, Maker, contents, everything, grid, linears, merge_by_formula
from safetensors.torch import load_file, save_file

from streamq import lora, pipeline
from streamq.checkpoint import Source
from streamq.errors import RunError, UsageError
from streamq.lora import Delta, LoraPlan, MergedSource, attach, open_loras
from streamq.merge import merged
from streamq.options import LoraOption, parse_lora
from streamq.wan import open_model

BOTH = ("--format", "mindie,lightx2v")


def shapes_of(family: str, blocks: int = 1) -> dict[str, tuple[int, ...]]:
    return synthetic.shapes(synthetic.tiny(synthetic.FAMILIES[family], blocks))


def quant(model: Path, out: Path, *more: object, command: str = "quant") -> Result:
    kind = () if {"--config_path", "--quant_type"} & set(more) else ("--quant_type", "w8a8")
    return run(command, "--model_path", model, "--save_path", out, "--device", "cpu", "--quiet", *kind, *more)


def done(model: Path, out: Path, *more: object) -> dict[str, bytes]:
    result = quant(model, out, *more)
    assert result.returncode == 0, result.stderr
    return contents(out)


def check_equal(tmp: Path, model: Path, loras: Sequence[tuple[Made, float]], *more: object) -> None:
    """Quantizing with `--lora` gives what quantizing the merged checkpoint gives, and not what the plain one does."""
    given: list[object] = []
    for number, (made, strength) in enumerate(loras):
        path = made.save(tmp / f"lora{number}.safetensors")
        given += ["--lora", path if strength == 1 else f"{path}:{strength}"]
    got = done(model, tmp / "got", *given, *more)
    assert got == done(merge_by_formula(model, tmp / "merged", loras), tmp / "due", *more)
    assert got != done(model, tmp / "plain", *more)


@pytest.fixture(name="t2v", scope="module")
def t2v_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one block in fp32, which no test changes."""
    return write_tiny(tmp_path_factory.mktemp("lora") / "t2v", "t2v-1.3B", blocks=1)


T2V = shapes_of("t2v-1.3B")


# -- Equal to a merged checkpoint --------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_every_style_equals_a_merged_checkpoint(tmp_path: Path, t2v: Path, style: str) -> None:
    check_equal(tmp_path, t2v, [(everything(T2V, style), 1.0)], *BOTH)


@pytest.mark.parametrize(("family", "style", "dtype"), [
    ("flf2v-14B", "lightx2v", "bf16"), ("vace-1.3B", "musubi", "bf16"), ("i2v-14B", "diffusers", "fp16"),
    ("animate-14B", "comfyui", "bf16"),
])  # fmt: skip
def test_every_tensor_of_every_family(tmp_path: Path, family: str, style: str, dtype: str) -> None:
    model = write_tiny(tmp_path / "model", family, blocks=2, dtype=dtype)
    check_equal(tmp_path, model, [(everything(shapes_of(family, 2), style, torch.float32), 0.5)], "--layout", "single",
                "--format", "lightx2v")  # fmt: skip


@pytest.mark.parametrize(("kind", "forms"), [("w8a8", "diffusers,comfyui"), ("w8a16", "gguf"), ("fp8", "lightx2v")])
def test_every_container(tmp_path: Path, t2v: Path, kind: str, forms: str) -> None:
    made = everything(T2V, "comfyui")
    check_equal(tmp_path, t2v, [(made, 0.5)], "--quant_type", kind, "--format", forms)
    given = ("--lora", f"{tmp_path / 'lora0.safetensors'}:0.5")
    verdict = run("verify", tmp_path / "got", "--source", t2v, *given)
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr


def test_a_checkpoint_with_diffusers_names_takes_native_keys(tmp_path: Path, t2v: Path) -> None:
    other = write_tiny(tmp_path / "other", "t2v-1.3B", blocks=1, layout="diffusers")
    path = everything(T2V, "native").save(tmp_path / "lora.safetensors")
    assert "model_index.json" in os.listdir(other) or (other / "transformer").is_dir()
    native, diffusers = (done(model, tmp_path / out, "--lora", path) for model, out in ((t2v, "a"), (other, "b")))
    weights = "quant_model_weight_w8a8_dynamic.safetensors"
    assert native[weights] == diffusers[weights] != done(t2v, tmp_path / "c")[weights]


def test_several_with_strengths(tmp_path: Path, t2v: Path) -> None:
    first = Maker(T2V, "comfyui").pair("blocks.0.ffn.0", 8, torch.tensor(4.0)).bias("blocks.0.ffn.0").made
    second = Maker(T2V, "musubi", torch.float16, 1).pair("blocks.0.ffn.0", 3).pair("head.head", 2).made
    third = Maker(T2V, "diffusers", torch.float32, 2).diff("blocks.0.ffn.0").diff("blocks.0.norm3").made
    check_equal(tmp_path, t2v, [(first, 0.8), (second, -1.25), (third, 2e-1), (first, 0.0)], *BOTH)


@pytest.mark.parametrize("alpha", [
    torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.float16), torch.tensor(6.0).double(),
    torch.tensor(2), torch.tensor(0.0),
], ids=["bf16", "fp16", "fp64", "int64", "zero"])  # fmt: skip
def test_an_alpha_of_any_dtype(tmp_path: Path, t2v: Path, alpha: torch.Tensor) -> None:
    made = Maker(T2V, "musubi").pair("blocks.0.self_attn.o", 4, alpha).diff("blocks.0.norm3").made
    check_equal(tmp_path, t2v, [(made, 1.0)])


@pytest.mark.parametrize("conv", [False, True])
def test_a_patch_embedding_is_merged_as_a_matrix(tmp_path: Path, t2v: Path, conv: bool) -> None:
    check_equal(tmp_path, t2v, [(Maker(T2V).pair("patch_embedding", 6, conv=conv).made, 1.0)])


def test_a_pair_and_a_difference_for_one_weight_add_up(tmp_path: Path, t2v: Path) -> None:
    check_equal(tmp_path, t2v, [(Maker(T2V).pair("blocks.0.ffn.2").diff("blocks.0.ffn.2").made, -0.5)])


def test_the_bias_of_an_up_projection_is_scaled_like_it(tmp_path: Path, t2v: Path) -> None:
    made = Maker(T2V, "diffusers").pair("blocks.0.self_attn.v", 4, torch.tensor(1.0)).made
    add = grid("bias", 64)
    made.tensors["transformer.blocks.0.attn1.to_v.lora_B.bias"] = add
    made.adds.append(("blocks.0.self_attn.v.bias", 0.25, add))
    check_equal(tmp_path, t2v, [(made, 2.0)])


@pytest.mark.parametrize("how", ["header", "beside"])
def test_an_adapters_own_alpha(tmp_path: Path, t2v: Path, how: str) -> None:
    """diffusers writes it into the header, PEFT into adapter_config.json; neither writes an alpha beside the pair."""
    made = Maker(T2V, "peft").pair("blocks.0.self_attn.v", 4).pair("head.head", 2).made
    due = Made(made.tensors, [(name, 8 / rank, add) for (name, _, add), rank in zip(made.adds, (4, 2), strict=True)])
    folder = tmp_path / "adapter"
    if how == "header":
        made.save(folder / "x.safetensors", {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})})
    else:
        made.save(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4, "alpha_pattern": {}}))
    got = done(t2v, tmp_path / "got", "--lora", folder)
    assert got == done(merge_by_formula(t2v, tmp_path / "merged", [(due, 1.0)]), tmp_path / "due")


def test_each_expert_its_own(tmp_path: Path) -> None:
    model, shapes = write_tiny(tmp_path / "model", "t2v-A14B", blocks=1), shapes_of("t2v-A14B")
    both = Maker(shapes).pair("blocks.0.ffn.0").made
    high, low = (Maker(shapes, seed=seed).pair("blocks.0.ffn.0").diff("head.head").made for seed in (1, 2))
    paths = [made.save(tmp_path / f"{name}.safetensors") for name, made in (("b", both), ("h", high), ("l", low))]
    merged_model = tmp_path / "merged"
    merged_model.mkdir()
    merge_by_formula(model / "high_noise_model", merged_model / "high_noise_model", [(both, 1.0), (high, 0.5)])
    merge_by_formula(model / "low_noise_model", merged_model / "low_noise_model", [(both, 1.0), (low, -2.0)])
    given = (
        "--lora",
        paths[0],
        "--lora",
        f"high_noise_model={paths[1]}:0.5",
        "--lora",
        f"low_noise_model={paths[2]}:-2",
    )
    got = done(model, tmp_path / "got", *given)
    assert got == done(merged_model, tmp_path / "due")
    manifest = json.loads((tmp_path / "got" / "streamq.json").read_text())
    assert [(one["file"], one["strength"], one["expert"]) for one in manifest["lora"]] == [
        ("b.safetensors", 1.0, ""), ("h.safetensors", 0.5, "high_noise_model"),
        ("l.safetensors", -2.0, "low_noise_model"),
    ]  # fmt: skip
    verdict = run("verify", tmp_path / "got", "--source", model, *given)
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr


@pytest.mark.parametrize("recipe", ["w8a8_smooth", "w8a8_gptq"])
@pytest.mark.usefixtures("one_core")
def test_a_calibrated_run_sees_merged_weights_only(tmp_path: Path, recipe: str) -> None:
    """Inputs, replay, smoothing and codes."""
    model = write_tiny(tmp_path / "model", "t2v-1.3B", blocks=2, dtype="bf16")
    made = everything(shapes_of("t2v-1.3B", 2), "comfyui")
    settings = CALIBRATION | ({"next_input": "quantized"} if recipe == "w8a8_gptq" else {})
    check_equal(tmp_path, model, [(made, 0.25)], "--config_path",
                write_recipe(tmp_path / "recipe.yaml", recipe, settings))  # fmt: skip


# -- The arithmetic ----------------------------------------------------------------------------------------------------


def merged_tensor(
    tmp: Path, weight: torch.Tensor, deltas: Sequence[tuple[float, tuple[torch.Tensor, ...]]]
) -> torch.Tensor:  # fmt: skip
    """A weight after the merging of one LoRA for each delta: (strength, (down, up) or (difference,))."""
    from streamq.checkpoint import Checkpoint, read_header

    def stored(name: str, tensors: dict[str, torch.Tensor]) -> Checkpoint:
        save_file(tensors, tmp / name)
        file, infos = read_header(tmp / name, tmp)
        return Checkpoint(tmp, (file,), {info.name: info for info in infos})

    source = stored("w.safetensors", {"w": weight})
    loras, plan = [], []
    for number, (strength, factors) in enumerate(deltas):
        found = stored(f"{number}.safetensors", {str(i): factor for i, factor in enumerate(factors)})
        loras.append(lora.Lora(LoraOption(tmp), found, None))
        rank = factors[0].shape[0] if len(factors) == 2 else 0
        plan.append(Delta(number, strength, rank, None, tuple(found.tensors[str(i)] for i in range(len(factors)))))
    opened = MergedSource(source, LoraPlan(tuple(loras), {"w": tuple(plan)}))
    result = merged(opened, source.tensors["w"], load_file(tmp / "w.safetensors")["w"])
    read = sum(factor.nbytes for _, factors in deltas for factor in factors)
    assert opened.bytes_read == read
    opened.close()
    return result


def test_loras_are_added_in_order_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 33)
    first, second = torch.randn(7, 33) * 1e3, torch.randn(7, 33) * 1e-3
    forth = merged_tensor(tmp_path, weight, [(0.3, (first,)), (0.7, (second,)), (-0.3, (first,))])
    assert torch.equal(forth, weight + 0.3 * first + 0.7 * second + -0.3 * first)
    half = weight.bfloat16()
    once = merged_tensor(tmp_path, half, [(0.3, (first,)), (0.7, (second,)), (-0.3, (first,))])
    assert torch.equal(once, (half.float() + 0.3 * first + 0.7 * second + -0.3 * first).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """200 rows in tiles of 64 and one of 8."""
    monkeypatch.setattr(lora, "TILE", 1)
    assert lora.tile_rows((200, 96)) == 64
    weight, down, up = torch.randn(200, 96).to(dtype), grid("d", 5, 96), grid("u", 200, 5).bfloat16()
    other, more = grid("o", 200, 96).half(), (grid("d2", 9, 96).bfloat16(), grid("u2", 200, 9))
    got = merged_tensor(tmp_path, weight, [(0.7, (down, up)), (1.5, (other,)), (-3.0, more)])
    due = weight.float() + 0.7 * (up.float() @ down) + 1.5 * other.float() + -3.0 * (more[1] @ more[0].float())
    assert torch.equal(got, due.to(dtype))


def test_a_merged_weight_is_as_exact_as_its_dtype(tmp_path: Path) -> None:
    """Against float64, with factors that are no round numbers, over more than one tile."""
    torch.manual_seed(0)
    weight, down, up = torch.randn(300, 4096).bfloat16(), torch.randn(32, 4096), torch.randn(300, 32)
    got = merged_tensor(tmp_path, weight, [(0.8, (down, up))]).double()
    due = weight.double() + 0.8 * (up.double() @ down.double())
    assert bool(((got - due).abs() <= due.abs() * 2**-8 + 1e-4).all())


# -- Paths and strengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "path", "strength", "expert"), [
    ("a.safetensors", "a.safetensors", 1.0, ""),
    ("a.safetensors:0.8", "a.safetensors", 0.8, ""),
    ("a.safetensors:-1", "a.safetensors", -1.0, ""),
    ("a.safetensors:+.5e-1", "a.safetensors", 0.05, ""),
    ("dir:2/a:b.safetensors", "dir:2/a:b.safetensors", 1.0, ""),
    ("dir:2/a:b.safetensors:0", "dir:2/a:b.safetensors", 0.0, ""),
    ("a:1:2", "a:1", 2.0, ""),
    ("a.safetensors:nan", "a.safetensors:nan", 1.0, ""),
    ("a.safetensors:", "a.safetensors:", 1.0, ""),
    ("high_noise_model=a:0.5", "a", 0.5, "high_noise_model"),
    ("low_noise_model=b", "b", 1.0, "low_noise_model"),
    ("other=b", "other=b", 1.0, ""),
])  # fmt: skip
def test_only_a_number_behind_the_last_colon_is_a_strength(text: str, path: str, strength: float, expert: str) -> None:
    assert parse_lora(text) == LoraOption(Path(path), strength, expert)


@pytest.mark.parametrize(("text", "says"), [("", "no path"), ("a:1e999", "too large")])
def test_what_is_no_lora_option(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_lora(text)


def test_a_path_with_colons_and_a_folder_with_one_file(tmp_path: Path, t2v: Path) -> None:
    made = Maker(T2V).pair("blocks.0.ffn.0").made
    odd, folder = made.save(tmp_path / "v1:2" / "a:b.safetensors"), made.save(tmp_path / "one" / "x.safetensors").parent
    first = done(t2v, tmp_path / "first", "--lora", f"{odd}:0.5")
    assert first == done(t2v, tmp_path / "second", "--lora", f"{folder}:0.5")


# -- What the plan says ------------------------------------------------------------------------------------------------


def plan_of(model: Path, *more: object) -> dict[str, Any]:
    result = quant(model, model.parent / "never", *more, "--json", command="plan")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_plan_counts_what_is_read(tmp_path: Path, t2v: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Maker(T2V).pair("blocks.0.ffn.0", 8, torch.tensor(4.0)).diff("blocks.0.norm3").bias("head.head").made
    path = made.save(tmp_path / "lora.safetensors")
    plain, plan = plan_of(t2v), plan_of(t2v, "--lora", f"{path}:0.5")
    assert plan["bytes_to_read"] == plain["bytes_to_read"] + sum(tensor.nbytes for tensor in made.tensors.values())
    assert plan["lora"] == [{
        "file": "lora.safetensors", "bytes": path.stat().st_size, "strength": 0.5, "expert": "",
        "header_sha256": plan["lora"][0]["header_sha256"],
    }]  # fmt: skip
    assert "lora" not in plain
    read: list[int] = []
    close = Source.close

    def closing(self: Source) -> None:
        read.extend([self.bytes_read] * isinstance(self, MergedSource))
        close(self)

    monkeypatch.setattr(Source, "close", closing)
    done(t2v, tmp_path / "out", "--lora", path)
    assert read == [plan["bytes_to_read"]]


def test_whatever_changes_the_bytes_is_in_the_hash(tmp_path: Path, t2v: Path) -> None:
    path = Maker(T2V).pair("blocks.0.ffn.0").made.save(tmp_path / "a.safetensors")
    other = Maker(T2V).pair("blocks.0.ffn.0", 8).made.save(tmp_path / "b" / "a.safetensors")
    given = [(), (path,), (f"{path}:0.5",), (other,), (path, other), (other, path)]
    hashes = [plan_of(t2v, *(word for one in loras for word in ("--lora", one)))["hash"] for loras in given]
    assert len(set(hashes)) == len(given)
    moved = path.rename(tmp_path / "elsewhere.safetensors").rename(path)
    assert plan_of(t2v, "--lora", moved)["hash"] == hashes[1]


def test_a_plan_with_loras_needs_no_torch_and_shows_them(tmp_path: Path, t2v: Path) -> None:
    path = Maker(T2V).pair("blocks.0.ffn.0").made.save(tmp_path / "a.safetensors")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise RuntimeError('imported')")
    given = ("--model_path", t2v, "--save_path", tmp_path / "out", "--quant_type", "w8a8", "--device", "cpu")
    result = run_process("plan", *given, "--lora", f"{path}:0.25", env={"PYTHONPATH": str(hidden)})  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "merges a.safetensors at 0.25" in result.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize("depth", [0, 3])
def test_the_least_memory_is_enough(tmp_path: Path, t2v: Path, depth: int) -> None:
    """Factors in fp32 and as large as weights take more room than codes; every tensor outside blocks has some."""
    made = Maker(T2V, dtype=torch.float32)
    for module in linears(T2V):
        made.diff(module).pair(module, 64).bias(module)
    path = made.made.save(tmp_path / "lora.safetensors")
    given = ("--lora", path, "--lora", f"{path}:-0.5", "--read_ahead", depth)
    refused = quant(t2v, tmp_path / "out", *given, "--max_host_memory", "1MiB")
    least = int(refused.stderr.split("can do with is ")[1].split()[0])
    got = done(t2v, tmp_path / "out", *given, "--max_host_memory", least)
    assert got == done(t2v, tmp_path / "more", *given)
    plain = quant(t2v, tmp_path / "out2", "--max_host_memory", "1MiB")
    assert least > int(plain.stderr.split("can do with is ")[1].split()[0])


def test_the_model_card_names_them(tmp_path: Path, t2v: Path) -> None:
    path = Maker(T2V).pair("blocks.0.ffn.0").made.save(tmp_path / "style.safetensors")
    done(t2v, tmp_path / "out", "--lora", f"{path}:-0.5", *BOTH)
    for form in ("mindie", "lightx2v"):
        card = (tmp_path / "out" / form / "README.md").read_text()
        assert "style.safetensors at -0.5" in card and str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "out" / "streamq.json").read_text()


# -- A second start ----------------------------------------------------------------------------------------------------


@pytest.fixture(name="stopped")
def stopped_fixture(tmp_path: Path, t2v: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(a LoRA, the folder of a run with it that ended behind its first block)"""
    path = everything(T2V, "comfyui").save(tmp_path / "lora.safetensors")
    real, out = pipeline._commit, tmp_path / "out"

    def once(unit: Any, *rest: Any) -> None:
        if unit.name == "rest":
            raise RunError("stopped by the test")
        real(unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_commit", once)
        check_error(quant(t2v, out, "--lora", path), "stopped by the test")
    assert (out / "streamq-journal.jsonl").is_file() and not (out / "streamq.json").exists()
    return path, out


def test_a_run_is_resumed_in_the_middle(tmp_path: Path, t2v: Path, stopped: tuple[Path, Path]) -> None:
    path, out = stopped
    assert done(t2v, out, "--lora", path) == done(t2v, tmp_path / "whole", "--lora", path)
    assert (out / "streamq.json").read_bytes() == (tmp_path / "whole" / "streamq.json").read_bytes()


def test_a_lora_that_changed_meanwhile_is_refused(t2v: Path, stopped: tuple[Path, Path]) -> None:
    path, out = stopped
    os.utime(path, ns=(1, 1))
    result = quant(t2v, out, "--lora", path)
    assert result.returncode == 2
    check_error(result, "LoRA", "--no_resume")
    done(t2v, out, "--lora", path, "--no_resume")


def test_a_lora_that_goes_before_the_end_is_an_error(
    tmp_path: Path, t2v: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = everything(T2V, "comfyui")
    path, real = made.save(tmp_path / "lora.safetensors"), pipeline._commit

    def gone(unit: Any, *rest: Any) -> None:
        real(unit, *rest)
        path.unlink(missing_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_commit", gone)
        result = quant(t2v, tmp_path / "out", "--lora", path)
    assert result.returncode == 1 and not (tmp_path / "out" / "streamq.json").exists()
    check_error(result, "lora.safetensors: No such file", "restore it")


def test_a_finished_run_knows_its_loras(tmp_path: Path, t2v: Path) -> None:
    made = everything(T2V, "comfyui")
    path, out = made.save(tmp_path / "lora.safetensors"), tmp_path / "out"
    done(t2v, out, "--lora", path)
    again = quant(t2v, out, "--lora", path)
    assert again.returncode == 0 and "already done" in again.stdout
    check_error(quant(t2v, out, "--lora", f"{path}:0.5"), "another plan's finished output")
    check_error(quant(t2v, out), "another plan's finished output")
    made.tensors = {key: tensor * 2 for key, tensor in made.tensors.items()}
    made.save(path)  # under the same header
    result = quant(t2v, out, "--lora", path)
    assert result.returncode == 2
    check_error(result, "another LoRA", "--overwrite")


# -- verify ------------------------------------------------------------------------------------------------------------


def test_verify_wants_the_same_loras(tmp_path: Path, t2v: Path) -> None:
    made = everything(T2V, "comfyui")
    path, out = made.save(tmp_path / "lora.safetensors"), tmp_path / "out"
    done(t2v, out, "--lora", f"{path}:0.5", *BOTH)
    source = ("verify", out, "--source", t2v)
    result = run(*source, "--lora", f"{path}:0.5", "--json")
    assert result.returncode == 0, result.stdout
    made_of = json.loads((out / "streamq.json").read_text())["formats"].values()
    quantized = sum(about["type"] != "float" for form in made_of for about in form["layers"].values())
    assert len(json.loads(result.stdout)["layers"]) == quantized > 15
    assert run("verify", out).returncode == 0
    for given in ((), ("--lora", path), ("--lora", path, "--lora", path)):
        result = run(*source, *given)
        assert result.returncode == 2
        check_error(result, "was made with lora.safetensors at 0.5", "give --lora as it was given to quant")
    check_error(run("verify", out, "--lora", path), "--lora without --source")
    done(t2v, tmp_path / "plain")
    check_error(run("verify", tmp_path / "plain", "--source", t2v, "--lora", path), "was made with no LoRA")
    made.tensors = {key: tensor * 2 for key, tensor in made.tensors.items()}
    made.save(path)
    check_error(run(*source, "--lora", f"{path}:0.5"), "of the same name differs")


def test_verify_compares_with_merged_weights(tmp_path: Path, t2v: Path) -> None:
    """Without a manifest nothing but the weights tells."""
    path, out = everything(T2V, "comfyui").save(tmp_path / "lora.safetensors"), tmp_path / "out"
    done(t2v, out, "--lora", path)
    (out / "streamq.json").unlink()
    source = ("verify", out, "--source", t2v, "--json")
    assert run(*source, "--lora", path).returncode == 0
    problems = json.loads(run(*source).stdout)["problems"]
    for name in ("blocks.0.norm3.weight", "blocks.0.modulation", "head.head.weight", "blocks.0.ffn.0.bias"):
        assert any(problem.startswith(f"{name}: differs") for problem in problems), (name, problems)
    problems = json.loads(run(*source, "--lora", f"{path}:0.9").stdout)["problems"]
    assert any(problem.startswith("patch_embedding.weight: differs") for problem in problems)


def test_every_layer_of_a_model_is_reached_by_its_lora(t2v: Path, tmp_path: Path) -> None:
    made = everything(T2V, "onetrainer")
    path = made.save(tmp_path / "lora.safetensors")
    (expert,) = attach(open_model(t2v), open_loras([LoraOption(path)]))
    assert expert.model.lora is not None
    assert set(expert.model.lora.deltas) == set(expert.model.checkpoint.tensors)
