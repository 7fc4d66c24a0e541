"""`streamq verify` on nunchaku folders with damage that diffusers loads without a word, as if a writer had been wrong.

Each damage three times: beside the manifest of the sound folder; with a manifest that agrees with the damaged bytes, so
that only their meaning is wrong; and without any.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import run
from nunchaku_runs import Runs, Step, one_thread, step, svdquant
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamq.savers import nunchaku_layout as layout

LAYER, NATIVE = "blocks.0.attn1.to_q", "blocks.0.self_attn.q"
WHOLE = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]
PROCESS: dict[str, list[Step]] = {
    "w4a4": svdquant("w4a4"), "w4a4_nvfp4": svdquant("w4a4_nvfp4"), "w4a16": [step("w4a16", "mse")],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Everything here is small."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Sound folders, once a module."""
    return Runs(tmp_path_factory.mktemp("verify"))


def source_of(made: Runs) -> Path:
    return made.model(blocks=1, hot=True)


def verify(folder: Path, *more: object) -> list[str]:
    result = run("verify", folder, *more, "--json")
    report = json.loads(result.stdout)
    assert report["ok"] == (result.returncode == 0) == (not report["problems"])
    return report["problems"]


def rewrite(folder: Path, change: Change) -> None:
    tensors = load_file(folder / WHOLE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WHOLE, {"format": "pt"})


def sign(folder: Path) -> None:
    """Make the manifest say what the files are."""
    document = json.loads((folder / "streamq.json").read_text())
    for name, about in document["files"].items():
        raw = (folder / name).read_bytes()
        about |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        if "tensors" in about:
            found = load_file(folder / name).items()
            raws = {key: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for key, tensor in found}
            about["tensors"] = {key: hashlib.sha256(raw).hexdigest() for key, raw in raws.items()}
    (folder / "streamq.json").write_text(json.dumps(document))


def put(suffix: str, make: Callable[[Tensor], Tensor], layer: str = LAYER) -> Change:
    return lambda tensors: tensors.update({f"{layer}.{suffix}": make(tensors[f"{layer}.{suffix}"]).contiguous()})


def drop(*suffixes: str) -> Change:
    return lambda tensors: [tensors.pop(f"{LAYER}.{suffix}") for suffix in suffixes]


def extra(suffix: str, make: Callable[[Tensors], Tensor]) -> Change:
    return lambda tensors: tensors.update({f"{LAYER}.{suffix}": make(tensors).clone()})


def swapped(tensor: Tensor) -> Tensor:
    """The first two columns have changed places."""
    return torch.cat([tensor[:, 1:2], tensor[:, :1], tensor[:, 2:]], dim=1)


def undivided(tensors: Tensors) -> None:
    """D instead of D / S."""
    smooth = layout.unpack_vector(tensors[f"{LAYER}.smooth_factor"]).float()
    down = layout.unpack_down(tensors[f"{LAYER}.proj_down"]).float() * smooth
    tensors[f"{LAYER}.proj_down"] = layout.pack_down(down.bfloat16())


def in_order(packed: Tensor) -> Tensor:
    """Two codes a byte, row after row."""
    codes = layout.unpack_qweight(packed, signed=True).unflatten(1, (-1, 2)) & 15
    return (codes[..., 0] | (codes[..., 1] << 4)).to(torch.int8)


def poked(value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        made = tensor.clone()
        made.view(-1)[3] = value
        return made

    return make


# Seen without a source: names, dtypes, shapes, numbers that mean nothing.
FORM: dict[str, tuple[str, Change, str]] = {
    "a tensor dropped": ("w4a4", drop("proj_up"), f"{LAYER}.proj_up: missing"),
    "a bias dropped": ("w4a16", drop("bias"), f"{LAYER}.bias: missing"),
    "one of two scales dropped": ("w4a4_nvfp4", drop("wcscales"), f"{LAYER}.wcscales: missing"),
    "a norm dropped": ("w4a4", lambda t: t.pop("blocks.0.norm2.bias"), "blocks.0.norm2.bias: missing"),
    "an old name": (
        "w4a4", extra("smooth_factor_orig", lambda t: t[f"{LAYER}.smooth_factor"]), "smooth_factor_orig: no parameter",
    ),
    "the float weight as well": ("w4a4", extra("weight", lambda t: torch.ones(128, 128)), f"{LAYER}.weight: no par"),
    "smoothing in fp32": ("w4a4", put("smooth_factor", lambda t: t.float()), "smooth_factor: F32 [128], must be BF16"),
    "scales in fp32": ("w4a16", put("wscales", lambda t: t.float()), "wscales: F32 [2, 128], must be BF16"),
    "unsigned codes": ("w4a4_nvfp4", put("qweight", lambda t: t.view(torch.uint8)), "qweight: U8 [128, 64], must be"),
    "codes of another width": ("w4a4", put("qweight", lambda t: t[:, :32]), "qweight: I8 [128, 32], must be I8"),
    "AWQ scales with rows to spare": ("w4a16", put("wzeros", lambda t: torch.cat([t, t])), "wzeros: BF16 [4, 128]"),
    "code -8": ("w4a4", put("qweight", poked(-120)), f"{NATIVE}.qweight: code -8"),
    "a scale of zero": ("w4a4", put("wscales", poked(0.0)), f"{NATIVE}.wscales: a number that is not above zero"),
    "a negative smoothing": ("w4a4", put("smooth_factor", poked(-1.0)), f"{NATIVE}.smooth_factor: a number that"),
    "e4m3's NaN": (
        "w4a4_nvfp4", put("wscales", lambda t: poked(127)(t.view(torch.uint8)).view(t.dtype)), "wscales: a number",
    ),
    "an infinite zero": ("w4a16", put("wzeros", poked(float("inf"))), f"{NATIVE}.wzeros: a number that is not finite"),
}  # fmt: skip
# Right in form: only the source tells.
MEANING: dict[str, tuple[str, Change]] = {
    "a plain bias": ("w4a4", put("bias", layout.unpack_vector)),
    "a plain bias of ffn.net.2": ("w4a4_nvfp4", put("bias", layout.unpack_vector, "blocks.0.ffn.net.2")),
    "a packed bias": ("w4a16", put("bias", layout.pack_vector)),
    "scales as meant": ("w4a4", put("wscales", lambda t: layout.unpack_scales(t).T)),
    "scales in rows": ("w4a4", put("wscales", lambda t: layout.unpack_scales(t).reshape(t.shape))),
    "micro scales as meant": ("w4a4_nvfp4", put("wscales", lambda t: layout.unpack_micro_scales(t).T)),
    "packed AWQ scales": ("w4a16", put("wscales", lambda t: layout.pack_scales(t.T.contiguous()))),
    "AWQ scales from below": ("w4a16", put("wscales", lambda t: t.flip(0))),
    "AWQ zeros that are subtracted": ("w4a16", put("wzeros", lambda t: -t)),
    "a plain smoothing vector": ("w4a4", put("smooth_factor", layout.unpack_vector)),
    "a smoothing vector's inverse": ("w4a4", put("smooth_factor", lambda t: t.float().reciprocal().bfloat16())),
    "no smoothing": ("w4a4", put("smooth_factor", torch.ones_like)),
    "ranks of one factor swapped": ("w4a4", put("proj_up", swapped)),
    "ranks of the other factor swapped": ("w4a4_nvfp4", put("proj_down", swapped)),
    "a first factor in order": ("w4a4", put("proj_down", lambda t: layout.unpack_down(t).T)),
    "a second factor in order": ("w4a4", put("proj_up", layout.unpack_up)),
    "a first factor that is not divided": ("w4a4", undivided),
    "no branch": ("w4a4", put("proj_up", torch.zeros_like)),
    "codes in order": ("w4a4", put("qweight", in_order)),
    "half the scale of all": ("w4a4_nvfp4", put("wtscale", lambda t: t / 2)),
    "channel scales": ("w4a4_nvfp4", put("wcscales", lambda t: t * 2)),
    "another float layer": ("w4a4", lambda t: t.update({"proj_out.weight": t["proj_out.weight"].flip(0)})),
    "another norm": ("w4a16", lambda t: t["blocks.0.norm2.weight"].mul_(1.01)),
}
# No further off than 4 bits may be, for all that is known without a manifest.
SUBTLE = ("scales as meant", "scales in rows", "ranks of the other factor swapped")


def damaged(made: Runs, tmp: Path, kind: str, change: Change) -> dict[str, Path]:
    """A folder for each of the three ways."""
    sound, found = made.out(source_of(made), PROCESS[kind]), {}
    for how in ("old manifest", "new manifest", "no manifest"):
        found[how] = Path(shutil.copytree(sound, tmp / how))
        rewrite(found[how], change)
    sign(found["new manifest"])
    (found["no manifest"] / "streamq.json").unlink()
    return found


@pytest.mark.parametrize("kind", PROCESS)
def test_sound(made: Runs, tmp_path: Path, kind: str) -> None:
    """Written by another program, even, or without a word of streamq's: only what is wrong is told."""
    sound, source = made.out(source_of(made), PROCESS[kind]), source_of(made)
    for folder in damaged(made, tmp_path, kind, lambda tensors: None).values():
        assert (folder / WHOLE).read_bytes() != (sound / WHOLE).read_bytes()  # safetensors has an order of its own
        if (folder / "streamq.json").exists():
            sign(folder)
        assert verify(folder) == verify(folder, "--source", source) == []


@pytest.mark.parametrize("damage", FORM)
def test_a_wrong_form_is_seen_without_a_source(made: Runs, tmp_path: Path, damage: str) -> None:
    kind, change, says = FORM[damage]
    for how, folder in damaged(made, tmp_path, kind, change).items():
        problems = verify(folder)
        assert any(says in problem for problem in problems), (how, problems)
        assert any("sha256" in problem for problem in problems) == (how == "old manifest")
        assert set(problems) <= set(verify(folder, "--source", source_of(made))), how


@pytest.mark.parametrize("damage", MEANING)
def test_a_wrong_meaning_is_seen_beside_the_source(made: Runs, tmp_path: Path, damage: str) -> None:
    kind, change = MEANING[damage]
    folders = damaged(made, tmp_path, kind, change)
    old, new, none = (verify(folder, "--source", source_of(made)) for folder in folders.values())
    assert any("not the bytes that were written" in problem for problem in old)
    assert new and not any("sha256" in problem for problem in new)
    assert bool(none) or damage in SUBTLE
    assert verify(folders["old manifest"]) and not verify(folders["new manifest"])


def test_a_flipped_bit(made: Runs, tmp_path: Path) -> None:
    """The tensor is named; without the manifest nobody can know, and verify does not claim to."""
    flip = put(
        "qweight", lambda t: t.view(torch.uint8).bitwise_xor(torch.eye(128, 64, dtype=torch.uint8)).view(t.dtype)
    )
    old = verify(damaged(made, tmp_path, "w4a4_nvfp4", flip)["old manifest"])
    assert [problem for problem in old if "not the bytes" in problem] == [
        f"{LAYER}.qweight in {WHOLE}: not the bytes that were written"
    ]


CONFIG = {
    "another rank": (("svdq_w4a4", "rank"), 32, f"{LAYER}.proj_up: BF16 [128, 16], must be BF16 [128, 32]"),
    "another precision": (("svdq_w4a4", "precision"), "nvfp4", f"{LAYER}: w4a4_nvfp4 by its section"),
    "another half": (("compute_dtype",), "float16", "must be F16"),
    "no target": (("svdq_w4a4", "targets"), [], "no target"),
    "one target": (("svdq_w4a4", "targets"), [LAYER], "packed in the weights, but no target"),
    "another method": (("quant_method",), "gguf", "no longer recognisable"),
}


@pytest.mark.parametrize("wrong", CONFIG)
@pytest.mark.parametrize("signed", [True, False])
def test_a_wrong_configuration(made: Runs, tmp_path: Path, wrong: str, signed: bool) -> None:
    (*way, last), value, says = CONFIG[wrong]
    folder = Path(shutil.copytree(made.out(source_of(made), PROCESS["w4a4"]), tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text())
    place = config["quantization_config"]
    for key in way:
        place = place[key]
    assert place[last] != value
    place[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    if signed:
        sign(folder)
    problems = verify(folder)
    assert any(says in problem for problem in problems), problems
    assert any("config.json: sha256" in problem for problem in problems) == (not signed)


def test_experts_in_each_others_place(made: Runs, tmp_path: Path) -> None:
    model = made.model("t2v-A14B", blocks=1)
    folder = Path(shutil.copytree(made.out(model, [step("w4a4")]), tmp_path / "out"))
    assert not verify(folder, "--source", model)
    for old, new in (("transformer", "x"), ("transformer_2", "transformer"), ("x", "transformer_2")):
        (folder / old).rename(folder / new)
    sign(folder)
    problems = verify(folder, "--source", model)
    for expert in ("high_noise_model", "low_noise_model"):
        assert any(problem.startswith(f"{expert}/") and "relative error" in problem for problem in problems)


def test_another_source_is_told(made: Runs) -> None:
    problems = verify(made.out(source_of(made), PROCESS["w4a16"]), "--source", made.model(blocks=1, seed=1))
    assert sum("relative error" in problem for problem in problems) == 10
