"""Every way in which the input, the options or the output folder can be wrong, each with its exit status and message.

A row makes the bad thing, gives the options, and says what the one `error:` line must hold. `spec/cli.md`, "Exit status
and errors", is the contract: 2 is found before SAVE_PATH exists or is touched, and nothing incomplete has a final name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bad_sources import FFN, FILES, HEAD, HEADERS, LIGHTX2V, MODELS, W8A8, Row, nothing
from bad_uses import BAD_VALUES, FAILURES, OPTIONS, SAVE_PATHS, changed_manifest, linked_blobs, made
from conftest import Result, check_error, run, run_process, within, write_tiny
from damage import NAME, QUERY, Case, Make, entry, load, poison, put, read, store

ROWS = HEADERS + FILES + MODELS + OPTIONS + SAVE_PATHS + BAD_VALUES + FAILURES


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint, to be copied."""
    return write_tiny(tmp_path_factory.mktemp("sound") / "model", "t2v-1.3B")


@pytest.fixture
def case(tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """A case that nobody has damaged yet."""
    shutil.copytree(sound, tmp_path / "model")
    case = Case(tmp_path, monkeypatch, tmp_path / "model", tmp_path / "out")
    yield case
    for descriptor in case.held:
        os.close(descriptor)


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything in a folder: path -> mode, time of change, content or link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (status.st_mode, 0 if path.is_dir() else status.st_mtime_ns, data)
    return found


def final_names(folder: Path) -> set[str]:
    """What a runtime would take for weights or for their description."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")}


def invoke(command: str, case: Case, row: Row) -> Result:
    """The row's command line."""
    options = row.options.format(tmp=case.tmp, model=case.model).split()
    with within(6):
        return run(command, "--model_path", case.model, "--save_path", case.save, "--quiet", "--device=cpu", *options)


def check_message(result: Result, says: tuple[str, ...], case: Case) -> None:
    """`check_error`, with `{tmp}` and `{model}` filled in."""
    check_error(result, *(text.format(tmp=case.tmp, model=case.model) if "{" in text else text for text in says))


def test_the_table_is_long_and_has_no_row_twice() -> None:
    ids = Counter(row.id for row in ROWS)
    assert len(ids) >= 45
    assert ids.most_common(1)[0][1] == 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_quant_refuses(row: Row, case: Case) -> None:
    row.make(case)
    before = snapshot(case.tmp)
    result = invoke("quant", case, row)
    assert result.returncode == row.status, result.stderr
    check_message(result, row.says, case)
    assert result.stdout == ""
    if row.status == 2:
        assert snapshot(case.tmp) == before, "wrong use must leave everything as it was"
    else:
        assert final_names(case.save) == set(), "nothing incomplete may carry a final name"


@pytest.mark.parametrize("row", [row for row in ROWS if row.planned], ids=lambda row: row.id)
def test_plan_refuses(row: Row, case: Case) -> None:
    """The dry run cannot lie: what headers and options tell, `plan` says in the same words."""
    row.make(case)
    before = snapshot(case.tmp)
    result = invoke("plan", case, row)
    assert result.returncode == 2, result.stderr
    check_message(result, row.says, case)
    assert result.stdout == ""
    assert snapshot(case.tmp) == before


@pytest.mark.parametrize("row", [HEADERS[3], BAD_VALUES[0], OPTIONS[0]], ids=lambda row: row.id)
def test_a_process_ends_with_the_same_status_and_line(row: Row, case: Case) -> None:
    row.make(case)
    result = run_process("quant", "--model_path", case.model, "--save_path", case.save, *row.options.split())
    assert result.returncode == row.status
    check_message(result, row.says, case)


@pytest.mark.parametrize("row", [HEADERS[3], BAD_VALUES[0]], ids=lambda row: row.id)
def test_debug_adds_the_traceback_and_json_keeps_stdout_free(row: Row, case: Case) -> None:
    row.make(case)
    result = run(
        "quant", "--model_path", case.model, "--save_path", case.save, *row.options.split(), "--debug", "--json"
    )
    assert result.returncode == row.status
    assert "Traceback" in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert result.stdout == ""


def test_what_the_message_about_a_bad_weight_advises_works(case: Case) -> None:
    """Download again, then the command that the message names."""
    store(case.file, load(case.file))  # the header as `poison` writes it
    good = case.file.read_bytes()
    poison(QUERY, "nan")(case)
    command = ["quant", "--model_path", case.model, "--save_path", case.save, "--quant_type", "w8a8"]
    first = run(*command)
    assert first.returncode == 1 and "run the same command" in first.stderr
    case.file.write_bytes(good)
    advised = [option for option in ("--no_resume", "--overwrite") if option in first.stderr]
    second = run(*command, *advised[:1])
    assert second.returncode == 0, second.stderr


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_hostile_name_does_not_forge_an_error_line(layout: str, case: Case) -> None:
    """A tensor's name holds line breaks: it is refused, or stands in a warning that is still one line."""
    folder = case.remake(layout=layout)
    case.model = folder / "transformer" if layout == "diffusers" else folder
    put("extra\nerror: forged\nwarning: also.weight")(case)
    result = run("quant", "--model_path", case.model, "--save_path", case.save, "--quant_type", "w8a8", "--quiet")
    if result.returncode == 2:
        check_message(result, ("forged",), case)
    else:
        assert result.returncode == 0, result.stderr
        assert all(line.startswith("warning: ") for line in result.stderr.splitlines())
        assert result.stderr.count("forged") <= 1


def extremes(dtype: str) -> Make:
    """The largest finite numbers of both signs, in tensors that pass through: their difference is not finite."""

    def make(case: Case) -> None:
        case.remake(dtype={"F32": "fp32", "BF16": "bf16", "F16": "fp16"}[dtype])
        found = load(case.file)
        for name in (HEAD, FFN, "blocks.0.modulation") + ((QUERY,) if dtype == "F16" else ()):
            kind, shape, raw = found[name]
            bits = np.frombuffer(raw, np.uint32 if kind == "F32" else np.uint16).copy()
            largest = {"F32": 0x7F7FFFFF, "BF16": 0x7F7F, "F16": 0x7BFF}[kind]
            bits[:2] = largest, largest | (1 << (8 * bits.itemsize - 1))
            found[name] = (kind, shape, bits.tobytes())
        store(case.file, found)

    return make


def any_order(case: Case) -> None:
    """Tensors listed in another order than they lie in, a header with metadata and padding."""
    head, data = read(case.file)
    turned = {"__metadata__": {"format": "pt"}} | dict(reversed(head.items()))
    raw = json.dumps(turned).encode() + b" " * 77
    case.file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def linked(case: Case) -> None:
    """The hub's cache: a snapshot of links into blobs, which lie outside the model's folder."""
    linked_blobs(case)
    case.save = case.tmp / "out"


SOUND: list[tuple[str, Make]] = [
    ("largest numbers of F32", extremes("F32")),
    ("largest numbers of BF16", extremes("BF16")),
    ("largest numbers of F16", extremes("F16")),
    ("any order", any_order),
    ("links into a cache", linked),
    ("tensor without an element", put("blocks_extra.weight", shape=(0, 64))),
    ("scalar", put("blocks_extra", shape=())),
    ("pickles beside the weights", lambda case: (case.model / "Wan2.1_VAE.pth").write_bytes(b"\x80\x02}.")),
    ("a folder named with spaces", lambda case: setattr(case, "save", case.tmp / "höhe 1" / "out  put")),
    ("an empty folder", lambda case: case.save.mkdir()),
]


@pytest.mark.parametrize("make", [make for _, make in SOUND], ids=[name for name, _ in SOUND])
def test_odd_but_sound_input_is_not_refused(make: Make, case: Case) -> None:
    make(case)
    result = run("quant", "--model_path", case.model, "--save_path", case.save, "--quant_type", "w8a8", "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    checked = run("verify", case.save, "--source", case.model, "--json")
    assert (checked.returncode, json.loads(checked.stdout)["problems"]) == (0, [])


def test_inspect_says_of_a_native_checkpoint_that_it_is_a_source(case: Case) -> None:
    """One file, one config.json: the look of LightX2V's single-file layout, but nothing in it is quantized."""
    result = run("inspect", case.model, "--json")
    assert result.returncode == 0
    facts = json.loads(result.stdout)
    assert (facts["family"], facts["layout"], facts["linears"]) == ("t2v", "native", 20)
    assert "format" not in facts and "layers" not in facts


LOOKS: list[tuple[str, str, Make, int, tuple[str, ...]]] = [
    ("inspect nothing", "inspect {tmp}/absent", nothing, 2, ("absent", "no such")),
    ("inspect a folder of nothing", "inspect {tmp}", nothing, 2, ("no .safetensors file",)),
    ("inspect a lying header", "inspect {model}", entry(shape=[64, 65]), 2, (NAME, QUERY, "16384", "16640")),
    ("inspect a damaged output", "inspect {save}", lambda c: damaged_output(c), 2, ("quant_model_weight", "truncated")),
    ("verify nothing", "verify {tmp}/absent", nothing, 2, ("absent", "no such")),
    ("verify a source", "verify {tmp}", nothing, 2, ("not an output",)),
    ("verify against nothing", "verify {save} --source {tmp}/absent", lambda c: made(c, ""), 2, ("absent",)),
    ("print no recipe", "recipes w8a9", nothing, 2, ("w8a9", "w8a8")),
    ("no command", "", nothing, 2, ("COMMAND",)),
    ("unknown command", "qaunt", nothing, 2, ("qaunt", "quant")),
    ("no paths", "quant", nothing, 2, ("--model_path", "--save_path")),
    ("no model", "plan --save_path {save} --quant_type w8a8", nothing, 2, ("--model_path",)),
]


def damaged_output(case: Case) -> None:
    """A finished output whose weights have lost their last bytes."""
    made(case, "")
    weights = next(case.save.glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size - 100)


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look[0])
def test_other_commands_refuse(look: tuple[str, str, Make, int, tuple[str, ...]], case: Case) -> None:
    _, command, make, status, says = look
    make(case)
    before = snapshot(case.tmp)
    with within(6):
        result = run(*command.format(tmp=case.tmp, model=case.model, save=case.save).split())
    assert result.returncode == status, result.stderr
    check_message(result, says, case)
    assert snapshot(case.tmp) == before


HOSTILE_OUTPUTS: list[tuple[str, Make]] = [
    ("weights truncated", damaged_output),
    ("manifest not JSON", lambda case: made_and(case, "streamq.json", "{")),
    ("manifest without files", lambda case: changed_manifest(case, files=None)),
    ("manifest with a list of files", lambda case: changed_manifest(case, files=["a"])),
    ("manifest with a number for a file", lambda case: changed_manifest(case, files={"config.json": 3})),
    (
        "manifest with a file elsewhere",
        lambda case: changed_manifest(case, files={"/etc/passwd": {"bytes": 1, "sha256": ""}}),
    ),
    ("manifest with a list of formats", lambda case: changed_manifest(case, formats=["mindie"])),
    ("manifest with numbers for layers", lambda case: changed_manifest(case, formats={"mindie": {"layers": 3}})),
    ("description a list", lambda case: made_and(case, "quant_model_description_w8a8_dynamic.json", "[]")),
    ("description of numbers", lambda case: made_and(case, "quant_model_description_w8a8_dynamic.json", '{"a": 1}')),
    ("config with words for numbers", lambda case: made_and(case, "config.json", '{"num_layers": "two"}', LIGHTX2V)),
    ("config not JSON", lambda case: made_and(case, "config.json", "{", LIGHTX2V)),
]


def made_and(case: Case, name: str, text: str, options: str = "") -> None:
    """A finished output, one of whose documents now has this text."""
    made(case, options.removeprefix(W8A8))
    path = case.save / name
    assert path.is_file()
    path.write_text(text)


@pytest.mark.parametrize("make", [make for _, make in HOSTILE_OUTPUTS], ids=[name for name, _ in HOSTILE_OUTPUTS])
def test_verify_finds_a_broken_output(make: Make, case: Case) -> None:
    """It says what is wrong instead of falling over it: a report, or one error line."""
    make(case)
    before = snapshot(case.tmp)
    with within(6):
        result = run("verify", case.save, "--source", case.model, "--json")
    assert result.returncode in (1, 2), result.stdout
    assert "bug in streamq" not in result.stderr, result.stderr
    if result.stderr:
        check_message(result, (), case)
    else:
        report = json.loads(result.stdout)
        assert report["ok"] is False and report["problems"]
        assert "/etc/passwd" not in {file["path"] for file in report["files"]}, "it read outside the folder"
    assert snapshot(case.tmp) == before
