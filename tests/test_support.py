"""The README's table is what the code decides, and true: every pair of type and format plans, no other does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic

from streamq import support
from streamq.cli import main
from streamq.device import KINDS
from streamq.savers import formats

Tiny = Callable[..., Path]
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by: python -m streamq.support -->\n", "<!-- end -->\n"
SERVED = support.served()
PAIRS = [(kind, form) for kind in SERVED for form in formats()]


def test_readme_has_the_table() -> None:
    text = README.read_text("utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == support.table()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """With the blocks that recipes name, by width; the wide one has sizes for every kernel."""
    tiny = synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"], 6)
    found = {64: tmp_path_factory.mktemp("narrow"), 256: tmp_path_factory.mktemp("wide")}
    for width, folder in found.items():
        synthetic.write(folder, replace(tiny, dim=width, ffn=2 * width))
    return found


@pytest.mark.parametrize("kind, form", PAIRS)
def test_what_is_in_the_table_plans_and_nothing_else(
    kind: str, form: str, sources: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources[256 if form == "nunchaku" or "convrot" in kind else 64]
    argv = ["plan", "--model_path", source, "--save_path", tmp_path / "out", "--quant_type", kind]
    status = main([str(one) for one in (*argv, "--format", form, "--json")])
    said = capsys.readouterr().err
    if form in SERVED[kind]:
        assert status == 0, said
    else:
        assert status == 2 and form in said and all(other in said for other in SERVED[kind]), said


def test_devices_are_all_kinds() -> None:
    assert all(f"| {', '.join(sorted(KINDS))} |" in line for line in support.table().splitlines()[2:])
