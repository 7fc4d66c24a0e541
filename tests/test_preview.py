"""`quant --preview`: the pair and the page behind a run, and what is refused before the run."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

from streamq import preview
from streamq.cli import main
from streamq.options import QuantOptions

TOY = Path(__file__).parent / "assets" / "toy_wan"
SMALL = ["--preview_size", "32*32", "--preview_frame_num", "5", "--preview_sample_steps", "2"]
QUANT = ["quant", "--quant_type", "w8a8", "--device", "cpu", "--quiet"]


def test_the_pair_and_the_page_for_each_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = tmp_path / "out"
    argv = [*QUANT, "--model_path", str(TOY), "--save_path", str(save), "--format", "lightx2v,comfyui"]
    asked = ["--preview", "-- <b>a ring</b>", *SMALL, "--json"]
    assert main([*argv, *asked]) == 0
    figures = json.loads(capsys.readouterr().out)
    page = Path(figures["report"])
    assert page == save / "preview" / "report.html" and "&lt;b&gt;a ring" in page.read_text()
    with open(page.parent / "fidelity_per_video.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["candidate"], row["prompt"]) for row in rows] == [
        ("lightx2v", "-- <b>a ring</b>"), ("comfyui", "-- <b>a ring</b>"),
    ]  # fmt: skip
    assert all(30 < float(row["psnr_video"]) < 80 for row in rows)  # not the float model twice, and not noise
    assert main(["verify", str(save), "--source", str(TOY)]) == 0
    made = {path: path.stat().st_mtime_ns for path in (save / "preview").rglob("*.mkv")}
    assert len(made) == 3
    capsys.readouterr()
    assert main([*argv, *asked]) == 0  # finished: nothing of it is made again
    assert json.loads(capsys.readouterr().out)["status"] == "already done"
    assert {path: path.stat().st_mtime_ns for path in made} == made


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--preview_size", "64*64"], "goes with --preview"),
        (["--preview", "a", "--preview_size", "60*64"], "--preview_size 60*64: both must be multiples of"),
        (["--preview", "\udcff"], "--preview: not UTF-8"),
        (["--preview", "a", "--preview_frame_num", "6"], "4n + 1"),
        (["--preview", "a", "--preview_size", "64*0"], "--preview_size 64*0: the height is 0"),
        (["--preview", "a", "--preview_size", ""], "--preview_size '': empty"),
        (["--preview", ""], "--preview '': empty"),
        (["--preview", "a", "--preview", "a"], "--preview: 'a' stands twice"),
        (["--preview", "a", "--preview_sample_steps", "0"], "--preview_sample_steps 0"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_written(
    extra: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "out"
    assert main([*QUANT, "--model_path", str(TOY), "--save_path", str(save), *extra]) == 2
    assert words in capsys.readouterr().err and not save.exists()


@pytest.mark.parametrize("module", ["av", "cv2", "jinja2", "matplotlib", "scipy", "transformers"])
def test_what_eval_needs_is_asked_for_before_the_quantization(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    save = tmp_path / "out"
    assert main([*QUANT, "--model_path", str(TOY), "--save_path", str(save), "--preview", "a", *SMALL]) == 2
    assert f"needs {module}" in capsys.readouterr().err and not save.exists()


def test_what_is_overwritten_has_its_preview_made_anew(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    preview.add_options(parser)
    options = QuantOptions(str(TOY), tmp_path / "out", overwrite=True)
    given = preview._given(parser.parse_args(["--preview", "a"]), options, [tmp_path / "out"])
    assert given.overwrite and given.transformer == [tmp_path / "out"] and given.prompt == ["a"]


def test_a_transformer_alone_makes_no_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(TOY / "transformer", tmp_path / "alone")
    argv = [*QUANT, "--model_path", str(tmp_path / "alone"), "--save_path", str(tmp_path / "out"), "--preview", "a"]
    assert main(argv) == 2
    assert "model_index.json" in capsys.readouterr().err and not (tmp_path / "out").exists()
