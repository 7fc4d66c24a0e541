"""The model card: planned to the byte, filled in by the run, the same whatever is written beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from streamq import card
from streamq.cli import main

Tiny = Callable[..., Path]
BOTH = ("mindie", "lightx2v")


def quant(source: Path, out: Path, *options: object) -> Path:
    argv = ["quant", "--model_path", source, "--save_path", out, "--quant_type", "w8a8", "--device", "cpu", "--quiet"]
    assert main([str(one) for one in (*argv, *options)]) == 0
    return out


def rows(text: str) -> dict[str, list[str]]:
    """Kind of layer -> its cells."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells[1:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines)}


def test_figures_are_those_of_the_manifest(tmp_path: Path, tiny: Tiny) -> None:
    out = quant(tiny("t2v-1.3B"), tmp_path / "out", "--format", "lightx2v")
    layers = json.loads((out / "streamq.json").read_text())["formats"]["lightx2v"]["layers"]
    found = rows((out / card.NAME).read_text("utf-8"))
    assert len(found) == 10 and sum(int(cells[1]) for cells in found.values()) == len(layers)
    for kind, (type_, number, mean, largest) in found.items():
        errors = [about["rel_error"] for name, about in layers.items() if name.endswith(f".{kind}")]
        assert (type_, int(number)) == ("w8a8", len(errors))
        assert mean == f"{100 * sum(errors) / len(errors):.3f} %" and largest == f"{100 * max(errors):.3f} %"


def test_planned_to_the_byte(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny("t2v-1.3B")
    argv = ["plan", "--model_path", source, "--save_path", tmp_path / "out", "--quant_type", "w8a8", "--json"]
    assert main([str(one) for one in (*argv, "--format", ",".join(BOTH))]) == 0
    planned = {file["path"]: file["bytes"] for file in json.loads(capsys.readouterr().out)["files"]}
    out = quant(source, tmp_path / "out", "--format", ",".join(BOTH))
    for form in BOTH:
        assert (out / form / card.NAME).stat().st_size == planned[f"{form}/{card.NAME}"]


def test_says_nothing_of_the_machine_or_the_formats_beside_it(tmp_path: Path, tiny: Tiny) -> None:
    source, deep = tiny("t2v-1.3B"), tmp_path / "some" / "folder"
    both = quant(source, deep, "--format", ",".join(BOTH))
    for form in BOTH:
        text = (both / form / card.NAME).read_bytes()
        assert text == (quant(source, tmp_path / form, "--format", form) / card.NAME).read_bytes()
        assert str(tmp_path).encode() not in text and card.FOLDER.encode() in text


def test_two_experts_have_one_card(tmp_path: Path, tiny: Tiny) -> None:
    out = quant(tiny("t2v-A14B"), tmp_path / "out", "--format", "lightx2v")
    text = (out / card.NAME).read_text("utf-8")
    assert not list(out.glob("*_noise_model/README.md"))
    assert f"{card.FOLDER}/high_noise_model" in text and f"{card.FOLDER}/low_noise_model" in text
    assert all(int(cells[1]) == 4 for cells in rows(text).values())  # 2 blocks, 2 experts


def test_front_matter_is_yaml(tmp_path: Path, tiny: Tiny) -> None:
    import yaml

    text = (quant(tiny("t2v-1.3B"), tmp_path / "out") / card.NAME).read_text("utf-8")
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    assert yaml.safe_load(match[1]) == {"tags": ["wan", "video", "quantized", "mindie", "w8a8"]}


@pytest.mark.parametrize("value", [0.0, 1e-12, 0.0123456, 9.99999, 10.0, 1e9])
def test_numbers_are_as_wide_as_their_place(value: float) -> None:
    made = card.make_card("mindie", "Wan.", {"blocks.0.ffn.0": "w8a8"}, "r", [], ["load"], True)
    figures = {"mindie": {"blocks.0.ffn.0": {"rel_error": value, "output_rel_error": value}}}
    assert len(made.render(figures)) == len(made.render({}))


def test_somebody_elses_readme_is_not_a_card(tmp_path: Path, tiny: Tiny) -> None:
    out = quant(tiny("t2v-1.3B"), tmp_path / "out")
    assert card.is_card(out / card.NAME)
    (tmp_path / card.NAME).write_text("# My model\n")
    assert main(["quant", "--model_path", str(tiny("t2v-1.3B")), "--save_path", str(tmp_path), "--quant_type", "w8a8",
                 "--overwrite"]) == 2  # fmt: skip
    assert (tmp_path / card.NAME).read_text() == "# My model\n"
    assert not card.is_card(tmp_path / card.NAME) and not card.is_card(tmp_path / "none" / card.NAME)
