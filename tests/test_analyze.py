"""`streamq analyze`: its figures against an unstreamed computation, other models, its manners."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from analyze_kit import ROWS, analyze, calib, every_row, inputs_fixture, model_fixture, rows_of  # noqa: F401
from conftest import Tiny, check_error, run
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from streamq import cli, wan
from streamq.analysis import measure, plots
from streamq.analysis.prepare import DEFAULT_TYPES, AnalyzeSettings, prepare
from streamq.calibration import plan as calibrations
from streamq.errors import UsageError

FILES = {"layers.csv", "blocks.csv", "analyze.json", "layers.png", "layers.svg", "blocks.png", "blocks.svg"}
PLANTED = "blocks.1.ffn.2"


@pytest.fixture(autouse=True)
def quick(every_row: None, one_core: None) -> None:  # noqa: F811
    """In every test."""


# -- Figures -----------------------------------------------------------------------------------------------------------


def int8(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest, a scale a row, as MindIE's W8A8_DYNAMIC has it."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(2.0**-23 * 127) / 127
    return (x / scale).round().clamp(-128, 127) * scale


class Whole:
    """The whole model in memory, its blocks called one after another on the set's samples."""

    def __init__(self, model: Path, inputs: Path) -> None:
        self.model = WanTransformer3DModel.from_pretrained(model, torch_dtype=torch.float32)
        self.given = load_file(inputs / "inputs.safetensors")
        document = json.loads((inputs / "calib.json").read_text())
        self.samples = document["experts"][""]["samples"]

    @torch.no_grad()
    def block(self, index: int, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
        rotary = (self.given["rotary.cos"], self.given["rotary.sin"])
        found = []
        for number, (sample, x) in enumerate(zip(self.samples, hidden, strict=True)):
            states = self.given[f"encoder_hidden_states.{sample['states']}"]
            found.append(self.model.blocks[index](x, states, self.given[f"timestep_proj.{number}"], rotary))
        return found

    def first(self) -> list[torch.Tensor]:
        return [self.given[f"hidden_states.{number}"] for number in range(len(self.samples))]


class FakeInt8(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = int8(linear.weight.data), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(int8(x), self.weight, self.bias)


def relative(got: torch.Tensor, due: torch.Tensor) -> float:
    return float((got.double() - due.double()).norm() / due.double().norm())


def lacking(got: torch.Tensor, due: torch.Tensor) -> float:
    """What their cosine lacks of 1."""
    return 1 - float(torch.nn.functional.cosine_similarity(got.double().flatten(), due.double().flatten(), dim=0))


@torch.no_grad()
def unstreamed(model: Path, inputs: Path) -> tuple[dict[str, dict[str, float]], dict[str, tuple[float, float]]]:
    """Figures of w8a8: native layer name -> figures; block -> error of its output, of what it adds."""
    whole = Whole(model, inputs)
    layers: dict[str, dict[str, float]] = {}
    blocks, hidden = {}, whole.first()
    for index, block in enumerate(whole.model.blocks):
        seen: dict[str, list[torch.Tensor]] = defaultdict(list)
        linears = {name: part for name, part in block.named_modules() if isinstance(part, torch.nn.Linear)}
        hooks = [
            part.register_forward_pre_hook(lambda _, args, name=name, seen=seen: seen[name].append(args[0]))
            for name, part in linears.items()
        ]
        due = whole.block(index, hidden)
        for hook in hooks:
            hook.remove()
        for name, part in linears.items():
            x, weight = torch.cat([one.flatten(0, -2) for one in seen[name]]), part.weight.data
            amax = x.abs().amax(dim=0)
            each = [float(one.abs().max()) for one in seen[name]]
            median = amax.sort().values[(len(amax) - 1) // 2]
            layers[wan.to_native(f"blocks.{index}.{name}")] = {
                "weight_rel_error": relative(int8(weight), weight),
                "output_rel_error": relative(int8(x) @ int8(weight).T, x @ weight.T),
                "input_amax": float(amax.max()),
                "outlier_channels": float((amax > 6 * median).sum()),
                "outlier_ratio": float(amax.max() / median),
                "time_spread": max(each) / min(each),
                "lacks": lacking(int8(x) @ int8(weight).T, x @ weight.T),
            }
            block.set_submodule(name, FakeInt8(part))
        got = whole.block(index, hidden)
        a, b, x = (torch.cat(part) for part in (got, due, hidden))
        blocks[f"blocks.{index}"] = relative(a, b), float((a - b).double().norm() / (b - x).double().norm())
        hidden = due
    return layers, blocks


@pytest.fixture(scope="module")
def done(model: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrations, "ROWS", ROWS)
        patch.setattr("os.sched_getaffinity", lambda _: {0})
        out = tmp_path_factory.mktemp("analysis") / "out"
        yield out, analyze(model, inputs, out, "--quant_type", "w8a8", "--format", "mindie", "--top_k", 3)


def test_figures_are_those_of_the_whole_model(model: Path, inputs: Path, done: tuple[Path, dict[str, Any]]) -> None:
    layers, blocks = unstreamed(model, inputs)
    lacks = {name: figures.pop("lacks") for name, figures in layers.items()}
    found = rows_of(done[0] / "layers.csv")
    assert [row["layer"] for row in found] == [
        li.native for li in sorted(wan.open_model(model)[0].model.linears, key=lambda li: li.name.split(".")[1])
    ]
    for row in found:
        for key, due in layers[row["layer"]].items():
            assert float(row[key]) == pytest.approx(due, rel=2e-3), (row["layer"], key)
        error = float(row["output_rel_error"])
        assert float(row["output_sqnr_db"]) == pytest.approx(-20 * math.log10(error), abs=1e-6)
        assert 1 - float(row["output_cosine"]) == pytest.approx(lacks[row["layer"]], rel=1e-2)
    for row in rows_of(done[0] / "blocks.csv"):
        assert (float(row["rel_error"]), float(row["update_rel_error"])) == pytest.approx(
            blocks[row["block"]], rel=5e-3
        )
        assert int(row["layers"]) == 10


def test_planted_outliers_come_out_on_top(done: tuple[Path, dict[str, Any]]) -> None:
    top = done[1]["top_layers"]
    assert len(top) == 3 and top[0]["layer"] == PLANTED
    assert top[0]["outlier_channels"] >= 1 and top[0]["outlier_ratio"] > 20
    assert all(row["outlier_ratio"] < top[0]["outlier_ratio"] for row in top[1:])
    assert done[1]["top_blocks"][0]["block"] == "blocks.1"


def test_files_and_one_type_alone(done: tuple[Path, dict[str, Any]]) -> None:
    """One type needs no budget: its recipe."""
    out, figures = done
    assert {path.name for path in out.iterdir()} == FILES | {"recipe.yaml"}
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (out / "blocks.svg").read_bytes()
    assert set(figures["recipe"]["layers"].values()) == {"w8a8"}
    step = yaml.safe_load((out / "recipe.yaml").read_text())["spec"]["process"][0]
    assert len(step["include"]) == 10 and all("*" in pattern for pattern in step["include"])


def test_same_bytes_and_a_known_analysis(
    model: Path, inputs: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in done[0].iterdir()}
    analyze(model, inputs, tmp_path / "again", "--quant_type", "w8a8", "--format", "mindie")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured again"))
    known = analyze(model, inputs, done[0], "--quant_type", "w8a8", "--format", "mindie", "--top_k", 1)
    assert known["status"] == "known" and {p.name: p.read_bytes() for p in done[0].iterdir()} == before


# -- Other models ------------------------------------------------------------------------------------------------------


def test_two_experts_get_one_recipe(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, also if it was stopped in the second."""
    model = tiny("t2v-A14B", blocks=1)
    inputs, real, calls = calib(model, tmp_path / "set"), measure._unit, []

    def once(job: Any, expert: Any, *rest: Any) -> Any:
        calls.append(expert.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(job, expert, *rest)

    monkeypatch.setattr(measure, "_unit", once)
    stopped = run("analyze", "--model_path", model, "--save_path", tmp_path / "out", "--calib", inputs,
                  "--device", "cpu", "--quant_type", "w8a8", "--quiet")  # fmt: skip
    assert stopped.returncode == 130 and "the same command goes on" in stopped.stderr
    found = analyze(model, inputs, tmp_path / "out", "--quant_type", "w8a8")
    rows = rows_of(tmp_path / "out/layers.csv")
    assert calls == ["high_noise_model", "low_noise_model", "low_noise_model"]
    assert [row["expert"] for row in rows] == ["high_noise_model"] * 10 + ["low_noise_model"] * 10
    error = math.sqrt(sum(float(row["output_rel_error"]) ** 2 for row in rows) / 20)
    assert found["recipe"]["error"] == pytest.approx(error)


def test_vace_blocks(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("vace-1.3B", blocks=2)
    found = analyze(model, calib(model, tmp_path / "set"), tmp_path / "out", "--quant_type", "w8a8")
    blocks = [row["block"] for row in rows_of(tmp_path / "out/blocks.csv")]
    assert blocks[0] == "vace_blocks.0" and blocks[-2:] == ["blocks.0", "blocks.1"]
    assert {"vace_blocks.0.before_proj", "vace_blocks.0.after_proj"} <= found["recipe"]["layers"].keys()


# -- Manners -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max_size", "1GB", "--max_error", "0.1"], "exclude each other"),
        (["--max_error", "0"], "--max_error 0"),
        (["--quant_type", "w8a9"], "w8a9: no such type"),
        (["--quant_type", "w4a4", "--format", "mindie"], "not written in the format mindie"),
        (["--format", "onnx"], "--format onnx: unknown"),
        (["--quant_type", "w8a8,w4a16", "--max_size", "1GB"], "none has all of w8a8, w4a16"),
        (["--quant_type", "w4a4f8"], "quantizes attention"),
        (["--quant_type", "w8a8", "--max_size", "1KB"], "the smallest that w8a8 makes"),
        (["--quant_type", "w8a8", "--max_host_memory", "1MiB"], "a budget of 1048576 bytes (1.05 MB), but"),
        (["--quant_type", "w8a8", "--calib", "nowhere"], "nowhere: no calib.json"),
        (["--top_k", "-1"], "--top_k -1"),
        (["--device", "tpu"], "--device tpu: unknown"),
        (["--device", "npu", "--quant_type", "w8a8"], "--device npu"),
        (["--quant_type", "fp8,w8a16,gone", "--max_error", "0.1"], "gone: no such type"),
        (["--quant_type", "w8a8,w8a16,w4a16", "--max_error", "0.1"], "--format diffusers --quant_type w8a8,w8a16"),
    ],
)
def test_wrong_uses(model: Path, tmp_path: Path, options: list[str], says: str) -> None:
    ended = run("analyze", "--model_path", model, "--save_path", tmp_path / "out", *options)
    assert ended.returncode == 2
    check_error(ended, says)
    assert not (tmp_path / "out").exists()


def test_a_budget_without_types_or_a_format(model: Path, inputs: Path, tmp_path: Path) -> None:
    """The format that has most of the default types, MindIE's where several have as many."""
    settings = AnalyzeSettings(str(model), tmp_path / "out", calib=inputs, max_error=0.1, device="cpu")
    job = prepare(settings)
    assert job.form == "mindie" and {one.recipe.name for one in job.candidates} <= set(DEFAULT_TYPES)
    assert len(job.candidates) > 1 and "no --format: the recipe is for mindie" in job.notes[0]
    assert prepare(replace(settings, max_error=None)).form is None  # figures alone need none


def test_a_folder_that_cannot_be_had(model: Path, inputs: Path) -> None:
    out = Path("/proc/streamq")
    ended = run("analyze", "--model_path", model, "--save_path", out, "--calib", inputs, "--quant_type", "w8a8",
                "--device", "cpu")  # fmt: skip
    assert ended.returncode == 2
    check_error(ended, f"--save_path {out}", "no files can be made in it|cannot be written to")


def test_models_that_cannot_be_run(tiny: Tiny, tmp_path: Path) -> None:
    ended = run("analyze", "--model_path", tiny("s2v-14B"), "--save_path", tmp_path / "out")
    check_error(ended, "s2v model, whose blocks streamq cannot run")


def test_a_folder_of_others(model: Path, inputs: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "streamq.json").write_text("{}")
    given = ("analyze", "--model_path", model, "--calib", inputs, "--device", "cpu", "--quant_type", "fp8")
    check_error(run(*given, "--save_path", tmp_path), "not empty (streamq.json)")
    ended = run(*given, "--save_path", done[0])
    check_error(ended, "holds another analysis")
    assert ended.returncode == 2 and (done[0] / "analyze.json").exists()


def test_wrong_use_imports_no_torch(model: Path, tmp_path: Path) -> None:
    script = (
        "import argparse, sys\nfrom streamq.analysis import command\nfrom streamq.errors import UsageError\n"
        "parser = argparse.ArgumentParser()\ncommand.add_options(parser)\n"
        f"args = parser.parse_args(['--model_path', {str(model)!r}, '--save_path', {str(tmp_path / 'out')!r},"
        " '--quant_type', 'w8a8', '--max_size', '1KB', '--device', 'cpu'])\n"
        "try:\n    command.run(args)\nexcept UsageError as error:\n    print(error)\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "the smallest that w8a8" in ended.stdout, ended.stderr


def test_memory_does_not_grow_with_blocks(tiny: Tiny, tmp_path: Path) -> None:
    peaks = {
        prepare(AnalyzeSettings(str(tiny(blocks=blocks)), tmp_path / "out", ("w8a8", "fp8"), device="cpu")).peaks
        for blocks in (2, 5)
    }
    assert len(peaks) == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_one_goes_on(
    model: Path, inputs: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    stop: type[BaseException],
) -> None:  # fmt: skip
    """Nothing has a final name before all is measured; finished blocks are not measured again."""
    real, out, units = measure._unit, tmp_path / "out", []

    def once(job: Any, expert: Any, unit: str, *rest: Any) -> Any:
        units.append(unit)
        if unit == "blocks.1" and len(units) == 2:
            raise stop
        return real(job, expert, unit, *rest)

    monkeypatch.setattr(measure, "_unit", once)
    given = ("analyze", "--model_path", model, "--save_path", out, "--calib", inputs, "--device", "cpu", "--quant_type",
             "w8a8", "--format", "mindie")  # fmt: skip
    ended = run(*given)
    assert ended.returncode == (130 if stop is KeyboardInterrupt else 1)
    assert [path.name for path in out.iterdir()] == ["streamq-analysis"]
    assert not list(out.rglob("*.csv")) and not list(out.rglob("*.safetensors"))
    ended = run(*given)
    assert ended.returncode == 0 and units == ["blocks.0", "blocks.1", "blocks.1"]
    assert "going on behind 1 blocks" in ended.stderr and "Most sensitive layers" in ended.stdout
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in done[0].iterdir()}


def test_its_own_inputs_and_no_matplotlib(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = calibrations.settings_of
    small = {"num_samples": 2, "size": "64*64", "frame_num": 5}
    monkeypatch.setattr(calibrations, "settings_of", lambda chosen: real(dict(chosen) | small))

    def missing(*_: Any) -> Any:
        raise UsageError('plots needs matplotlib; pip install "streamq[plots]"')

    monkeypatch.setattr(plots, "require", missing)
    ended = run("analyze", "--model_path", model, "--save_path", tmp_path / "out", "--device", "cpu", "--quant_type",
                "fp8", "--quant_type", "w8a16", "--format", "diffusers", "--json", "--quiet")  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"layers.csv", "blocks.csv", "analyze.json"}
    assert any(note.startswith("no plots") for note in found["notes"])
    assert any("synthetic" in note for note in found["notes"]) and found["recipe"] is None
    assert any("no --max_size or --max_error" in note for note in found["notes"])
    assert cli.VIDEO_COMMANDS["analyze"][0] == "analysis"
