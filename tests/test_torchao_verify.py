"""`streamq verify` on folders of the diffusers format with damage that diffusers loads without a word, or trips over.

Each damage three times: beside the manifest of the sound folder; with a manifest that agrees with the damaged bytes, so
that only their meaning is wrong; and without any.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from nunchaku_runs import one_thread
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchao_kit import (
    SMOOTH,
    STATIC,
    W8A8,
    WHOLE,
    Loaded,
    Runs,
    copies,
    header,
    quant,
    settle,
    sign,
    verify,
)

LAYER, NATIVE = "blocks.0.attn1.to_q", "blocks.0.self_attn.q"
WEIGHT = f"{LAYER}.weight"
KINDS = {
    "w8a16": "w8a16_diffusers", "w8a8": "w8a8_diffusers", "fp8": "fp8_diffusers", "static": [SMOOTH, STATIC, W8A8],
}  # fmt: skip
Tensors, Metadata = dict[str, Tensor], dict[str, str]
Change = Callable[[Tensors, Metadata], object]


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Everything here is small."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("verify"))


def source_of(made: Runs) -> Path:
    return made.model(blocks=1) / "transformer"


def sound(made: Runs, kind: str, *more: object) -> Path:
    return made.out(source_of(made), KINDS[kind], *more)


def rewrite(path: Path, change: Change) -> None:
    tensors, words = load_file(path), header(path)["__metadata__"]
    change(tensors, words)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, words or None)


def put(suffix: str, make: Callable[[Tensor], Tensor], layer: str = LAYER) -> Change:
    return lambda tensors, _: tensors.update({f"{layer}.{suffix}": make(tensors[f"{layer}.{suffix}"]).contiguous()})


def drop(suffix: str, layer: str = LAYER) -> Change:
    return lambda tensors, _: tensors.pop(f"{layer}.{suffix}")


def passed(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, _: tensors.update({name: make(tensors[name]).contiguous()})


def said(change: Callable[[dict[str, Any]], object], name: str = WEIGHT) -> Change:
    """Another entry in the metadata."""

    def make(_: Tensors, words: Metadata) -> None:
        entry = json.loads(words[name])
        change(entry)
        words[name] = json.dumps(entry)

    return make


def kwargs(**keys: Any) -> Change:
    return said(lambda entry: entry["_data"]["act_quant_kwargs"]["_data"].update(keys))


def data(**keys: Any) -> Change:
    return said(lambda entry: entry["_data"].update(keys))


def plain(tensors: Tensors, words: Metadata) -> None:
    """The float weight in the place of the parts, and nobody says so."""
    codes, scale = tensors.pop(f"{LAYER}._weight_qdata"), tensors.pop(f"{LAYER}._weight_scale")
    tensors.pop(f"{LAYER}._weight_zero_point")
    tensors[WEIGHT] = (codes.float() * scale).bfloat16()


def as_plain(tensors: Tensors, words: Metadata) -> None:
    """The parts are there, but the metadata calls the weight a plain tensor."""
    words[WEIGHT] = json.dumps({"_type": "Tensor"})


def unnamed(name: str) -> Change:
    def change(_: Tensors, words: Metadata) -> None:
        names = json.loads(words["tensor_names"])
        names.remove(name)
        words["tensor_names"] = json.dumps(names)
        del words[name]

    return change


def own_names_only(tensors: Tensors, words: Metadata) -> None:
    """What a writer that thinks of one file at a time would say."""
    here = {name.replace("._weight_qdata", ".weight") for name in tensors}
    names = [name for name in json.loads(words["tensor_names"]) if name in here]
    for name in json.loads(words["tensor_names"]):
        if name not in here:
            del words[name]
    words["tensor_names"] = json.dumps(names)


def poked(value: float) -> Callable[[Tensor], Tensor]:
    def make(tensor: Tensor) -> Tensor:
        made = tensor.clone()
        made.view(-1)[3] = value
        return made

    return make


MISSING = "missing; diffusers loads without it"
# Seen without a source: names, dtypes, shapes, metadata, numbers that mean nothing.
FORM: dict[str, tuple[str, Change, str]] = {
    "no codes": ("w8a8", drop("_weight_qdata"), f"{LAYER}._weight_qdata: {MISSING}"),
    "no scale": ("w8a16", drop("_weight_scale"), f"{LAYER}._weight_scale: {MISSING}"),
    "no zero point": ("w8a8", drop("_weight_zero_point"), f"{LAYER}._weight_zero_point: {MISSING}"),
    "no fixed scale": ("static", drop("_weight_act_quant_scale"), f"_weight_act_quant_scale: {MISSING}"),
    "no smoothing": ("static", drop("_weight_act_pre_scale"), f"_weight_act_pre_scale: {MISSING}"),
    "no scale of e4m3 codes": ("fp8", drop("_weight_scale"), f"{LAYER}._weight_scale: {MISSING}"),
    "no bias": ("w8a8", drop("bias"), f"{LAYER}.bias: {MISSING}"),
    "no norm": ("w8a8", drop("norm2.weight", "blocks.0"), "blocks.0.norm2.weight: missing"),
    "no outer layer": ("w8a8", drop("_weight_qdata", "proj_out"), "proj_out._weight_qdata: missing"),
    "unsigned codes": ("w8a8", put("_weight_qdata", lambda t: t.view(torch.uint8)), "_weight_qdata: U8 [64, 64], must"),
    "int8 for e4m3": ("fp8", put("_weight_qdata", lambda t: t.view(torch.int8)), "_weight_qdata: I8 [64, 64], must be"),
    "half of the codes": ("w8a8", put("_weight_qdata", lambda t: t[:, :32]), "_weight_qdata: I8 [64, 32], must be I8"),
    "half of the rows": ("w8a8", put("_weight_qdata", lambda t: t[:32]), "_weight_qdata: I8 [32, 64], must be I8"),
    "a flat scale": ("w8a8", put("_weight_scale", lambda t: t.flatten()), "_weight_scale: F32 [64], must be F32 [64,"),
    "a scale in bf16": ("w8a16", put("_weight_scale", lambda t: t.bfloat16()), "_weight_scale: BF16 [64, 1], must be"),
    "a fixed scale of rank 2": (
        "static", put("_weight_act_quant_scale", lambda t: t[0]), "_act_quant_scale: F32 [1, 1], must be F32 [1, 1, 1]",
    ),
    "a fixed scale of rank 1": (
        "static", put("_weight_act_quant_scale", lambda t: t[0, 0]), "_act_quant_scale: F32 [1], must be F32 [1, 1, 1]",
    ),
    "smoothing in fp32": ("static", put("_weight_act_pre_scale", lambda t: t.float()), "pre_scale: F32 [64], must be"),
    "half of the smoothing": ("static", put("_weight_act_pre_scale", lambda t: t[:32]), "_pre_scale: BF16 [32], must"),
    "a wide bias": ("w8a8", put("bias", lambda t: t.float()), f"{LAYER}.bias: F32 [64], must be BF16 [64]"),
    "a norm in bf16": ("w8a8", passed("blocks.0.norm2.bias", lambda t: t.bfloat16()), "norm2.bias: BF16 [64], must be"),
    "a table in bf16": ("w8a8", passed("scale_shift_table", lambda t: t.bfloat16()), "scale_shift_table: BF16 [1, 2,"),
    "a table in fp16": ("w8a8", passed("patch_embedding.bias", lambda t: t.half()), "patch_embedding.bias: F16 [64],"),
    "half of a table": ("w8a8", passed("scale_shift_table", lambda t: t[..., :32]), "scale_shift_table: F32 [1, 2, 32"),
    "a scale of zero": ("w8a8", put("_weight_scale", poked(0.0)), "_weight_scale: a scale that is not finite and posi"),
    "a scale of NaN": ("fp8", put("_weight_scale", poked(float("nan"))), "_weight_scale: a scale that is not finite a"),
    "a smoothing of zero": ("static", put("_weight_act_pre_scale", poked(0.0)), "_act_pre_scale: a scale that is not"),
    "a fixed scale of infinity": (
        "static", put("_weight_act_quant_scale", lambda t: t * float("inf")), "_act_quant_scale: a scale that is not f",
    ),
    "a zero point": ("w8a8", put("_weight_zero_point", poked(3)), "_weight_zero_point: a zero point that is not zero"),
    "a plain weight": ("w8a8", plain, f"{WEIGHT}: a plain tensor, the metadata says Int8Tensor"),
    "both weights": (
        "w8a8", lambda t, _: t.update({WEIGHT: torch.ones(64, 64).bfloat16()}), f"{WEIGHT}: a plain tensor, the metada",
    ),
    "a part too many": (
        "w8a8", lambda t, _: t.update({f"{LAYER}._weight_act_pre_scale": torch.ones(64).bfloat16()}),
        "_weight_act_pre_scale: the metadata has no use for it",
    ),
    "a tensor too many": ("w8a8", lambda t, _: t.update({"blocks.0.extra": torch.ones(2)}), "blocks.0.extra: the meta"),
    "no metadata": ("w8a8", lambda _, words: words.clear(), "no torchao metadata"),
    "metadata without names": ("w8a8", lambda _, words: words.pop("tensor_names"), "no torchao metadata"),
    "names that are no list": (
        "w8a8", lambda _, words: words.update(tensor_names='{"a": 1}'), "tensor_names is no list of names",
    ),
    "a name without an entry": ("w8a8", lambda _, words: words.pop(WEIGHT), f"{WEIGHT} is in tensor_names, but has no"),
    "an entry that is no JSON": ("w8a8", lambda _, words: words.update({WEIGHT: "{"}), f"{WEIGHT} is in tensor_names,"),
    "a parameter without a name": ("w8a8", unnamed("blocks.0.norm2.weight"), "norm2.weight: not in tensor_names"),
    "a layer without a name": ("w8a8", unnamed(WEIGHT), f"{WEIGHT}: not in tensor_names"),
    "parts called plain": ("w8a8", as_plain, f"{WEIGHT}: missing"),
    "another type": ("w8a8", said(lambda e: e.update(_type="Int4Tensor")), "Int4Tensor by its metadata, which is no t"),
    "groups of 32": ("w8a8", data(block_size=[1, 32]), "_data.block_size: [1, 32], must be [1, 64]"),
    "the block of another width": ("fp8", data(block_size=[1, 128]), "_data.block_size: [1, 128], must be [1, 64]"),
    "a reduced range": ("w8a16", data(reduce_range=True), "_data.reduce_range: true, must be false"),
    "another dtype": (
        "w8a8", data(dtype={"_type": "torch.dtype", "_data": "float16"}), '_data.dtype._data: "float16", must be "bflo',
    ),
    "an asymmetric input": (
        "static", kwargs(mapping_type={"_type": "MappingType", "_data": "ASYMMETRIC"}), 'mapping_type._data: "ASYMMETR',
    ),
    "one range for all tokens": (
        "w8a8", kwargs(granularity={"_type": "PerTensor", "_data": {}}), "_weight_act_quant_scale: missing",
    ),
    "a fixed scale for each token": (
        "static", kwargs(granularity={"_type": "PerRow", "_data": {"dim": -1}}), "act_quant_kwargs._data.granularity",
    ),
    "a product that torchao does not know": ("fp8", data(mm_config=None), "_data.mm_config: null, must be"),
    "parts in another number": (
        "static", said(lambda e: e["_tensor_data_names"].remove("zero_point")), "_tensor_data_names: [",
    ),
}  # fmt: skip
# Right in form: only the source tells.
MEANING: dict[str, tuple[str, Change]] = {
    "half the scale": ("w8a8", put("_weight_scale", lambda t: t / 2)),
    "half the scale of a row": ("w8a16", put("_weight_scale", lambda t: torch.cat([t[:1] / 2, t[1:]]))),
    "half the scale of e4m3 codes": ("fp8", put("_weight_scale", lambda t: t / 2)),
    "scales upside down": ("w8a8", put("_weight_scale", lambda t: t.flip(0))),
    "codes upside down": ("w8a8", put("_weight_qdata", lambda t: t.flip(0))),
    "codes of another layer": ("w8a8", lambda t, _: t.update({
        f"{LAYER}._weight_qdata": t["blocks.0.attn1.to_k._weight_qdata"].clone()})),
    "e4m3 codes upside down": ("fp8", put("_weight_qdata", lambda t: t.view(torch.int8).flip(0).view(t.dtype))),
    "a smoothing vector's inverse": ("static", put("_weight_act_pre_scale", lambda t: 1 / t)),
    "no smoothing of smoothed codes": ("static", put("_weight_act_pre_scale", torch.ones_like)),
    "an outer layer's codes": ("w8a8", put("_weight_qdata", lambda t: -t, "condition_embedder.time_proj")),
    "an outer layer's scale": ("fp8", put("_weight_scale", lambda t: t * 2, "proj_out")),
    "another bias": ("w8a8", put("bias", lambda t: t.flip(0))),
    "an outer layer's bias": ("w8a8", put("bias", lambda t: t.flip(0), "proj_out")),
    "another norm": ("w8a16", passed("blocks.0.norm2.weight", lambda t: t * 1.01)),
    "another table": ("w8a8", passed("blocks.0.scale_shift_table", lambda t: t.flip(1))),
    "another embedding": ("w8a8", passed("patch_embedding.weight", lambda t: -t)),
}  # fmt: skip
# No further off than 8 bits may be, for all that is known without a manifest.
SUBTLE = ("half the scale of a row",)


def damaged(made: Runs, tmp: Path, kind: str, change: Change) -> dict[str, Path]:
    folders = copies(sound(made, kind), tmp)
    for folder in folders.values():
        rewrite(folder / WHOLE, change)
    settle(folders)
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_sound(made: Runs, tmp_path: Path, kind: str) -> None:
    """Written by another program, even, or without a word of streamq's: only what is wrong is told."""
    for folder in damaged(made, tmp_path, kind, lambda *_: None).values():
        assert (folder / WHOLE).read_bytes() != (sound(made, kind) / WHOLE).read_bytes()  # an order of its own
        if (folder / "streamq.json").exists():
            sign(folder)
        assert verify(folder) == verify(folder, "--source", source_of(made)) == []


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


GARBAGE = (
    '"x"', "[]", "{}", '{"_type": 1}', '{"_type": "Int8Tensor"}', '{"_type": "Int8Tensor", "_data": []}',
    '{"_type": "Int8Tensor", "_data": {"act_quant_kwargs": [1]}, "_tensor_data_names": {"qdata": 1}}',
    '{"_type": "Float8Tensor", "_data": {"block_size": {}}, "_tensor_data_names": 7}', '{"_type": "Tensor", "a": 1}',
    "\\ud800", '{"_type": "\\ud800"}', '{"a": 1, "a": 1}',
)  # fmt: skip


@pytest.mark.parametrize("text", GARBAGE)
def test_an_entry_that_makes_no_sense(made: Runs, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(sound(made, "w8a8"), tmp_path / "out"))
    (folder / "streamq.json").unlink()
    rewrite(folder / WHOLE, lambda _, words: words.update({WEIGHT: text}))
    assert any(problem.startswith((WEIGHT, f"metadata: {WEIGHT}")) for problem in verify(folder))
    assert verify(folder, "--source", source_of(made))
    assert json.loads(run("inspect", folder, "--json").stdout)["format"] == "diffusers"


def test_a_truncated_file(made: Runs, tmp_path: Path) -> None:
    folders = copies(sound(made, "w8a8"), tmp_path)
    for folder in folders.values():
        raw = (folder / WHOLE).read_bytes()
        (folder / WHOLE).write_bytes(raw[:-16])
    (folders["no manifest"] / "streamq.json").unlink()
    for how, folder in folders.items():
        assert any("truncated" in problem for problem in verify(folder)), how


# -- Configuration and files -------------------------------------------------------------------------------------------

QUANT = ("quantization_config",)
CONFIG: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "no quantization": (QUANT, None, "quantization_config: missing"),
    "another method": ((*QUANT, "quant_method"), "gguf", "'gguf', must be 'torchao'"),
    "no default": ((*QUANT, "quant_type"), {"linear": {}}, "an object with one key, default"),
    "an unknown type": ((*QUANT, "quant_type", "default", "_type"), "Int4WeightOnlyConfig", "'Int4WeightOnlyConfig',"),
    "an older version": ((*QUANT, "quant_type", "default", "_version"), 1, "default._version: 1, must be 2"),
    "another granularity": (
        (*QUANT, "quant_type", "default", "_data", "granularity", "_type"), "PerTensor", '_type: "PerTensor", must be',
    ),
    "a list that takes layers": ((*QUANT, "modules_to_not_convert"), ["attn1"], f"'attn1' takes {LAYER}.weight"),
    "a list that is none": ((*QUANT, "modules_to_not_convert"), "attn1", "must be null or a list of names"),
    "another width": (("ffn_dim",), 256, "ffn.net.0.proj._weight_qdata: I8 [128, 64], must be I8 [256, 64]"),
    "another number of blocks": (("num_layers",), 2, "blocks.1.attn1.to_q.weight: not in tensor_names"),
    "another class": (("_class_name",), "FluxTransformer2DModel", "_class_name 'FluxTransformer2DModel'"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", CONFIG)
@pytest.mark.parametrize("how", ["old manifest", "new manifest", "no manifest"])
def test_a_wrong_configuration(made: Runs, tmp_path: Path, wrong: str, how: str) -> None:
    (*way, last), value, says = CONFIG[wrong]
    folders = copies(sound(made, "w8a8"), tmp_path)
    for folder in folders.values():
        config = json.loads((folder / "config.json").read_text())
        place = config
        for key in way:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
        (folder / "config.json").write_text(json.dumps(config))
    settle(folders)
    problems = verify(folders[how])
    assert any(says in problem for problem in problems), problems
    assert any("config.json: sha256" in problem for problem in problems) == (how == "old manifest")


def test_a_type_that_no_layer_has(made: Runs, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound(made, "w8a8"), tmp_path / "out"))
    shutil.copy(sound(made, "fp8") / "config.json", folder / "config.json")
    sign(folder)
    assert verify(folder) == ["config.json: quantization_config.quant_type: fp8, but the layers are w8a8"]


def test_no_configuration(made: Runs, tmp_path: Path) -> None:
    folders = copies(sound(made, "w8a8"), tmp_path)
    for folder in folders.values():
        (folder / "config.json").unlink()
    (folders["no manifest"] / "streamq.json").unlink()
    for folder in folders.values():
        assert any("quantization_config: missing" in problem for problem in verify(folder))


INDEX = f"{WHOLE}.index.json"


def mapped(change: Callable[[dict[str, str]], object]) -> Callable[[Path, list[Path]], object]:
    def make(folder: Path, shards: list[Path]) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return make


def swapped(folder: Path, shards: list[Path]) -> None:
    shards[0].rename(folder / "x")
    shards[1].rename(shards[0])
    (folder / "x").rename(shards[1])


SHARDS: dict[str, tuple[Callable[[Path, list[Path]], object], str]] = {
    "no metadata in one": (lambda _, s: rewrite(s[1], lambda t, w: w.clear()), "00002-of-00007.safetensors: no torcha"),
    "plain metadata in one": (
        lambda _, s: rewrite(s[2], lambda t, w: [w.pop(k) for k in list(w) if k != "format"]), "00003-of-00007.safeten",
    ),
    "one with its own names only": (lambda _, s: rewrite(s[1], own_names_only), "other metadata than diffusion_pytorc"),
    "each with its own names only": (
        lambda _, s: [rewrite(path, own_names_only) for path in s], "other metadata than diffusion_pytorch_model-00001",
    ),
    "one that says another type": (lambda _, s: rewrite(s[3], data(block_size=[1, 32])), "other metadata than"),
    "one is gone": (lambda _, s: s[2].unlink(), "in diffusion_pytorch_model.safetensors.index.json, but missing"),
    "two in each other's place": (swapped, "diffusion_pytorch_model.safetensors.index.json says"),
    "no index": (lambda folder, _: (folder / INDEX).unlink(), "missing, and there is no"),
    "an index that forgets a tensor": (mapped(lambda m: m.pop(f"{LAYER}.bias")), f"{LAYER}.bias: in diffusion_pytorch"),
    "an index that knows more": (mapped(lambda m: m.update({"x.y": m["scale_shift_table"]})), "x.y: in diffusion_pyto"),
    "a file beside them": (
        lambda folder, s: save_file({"a": torch.ones(2)}, folder / "other.safetensors"), "other.safetensors: not in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", SHARDS)
def test_shards_that_do_not_belong_together(made: Runs, tmp_path: Path, damage: str) -> None:
    change, says = SHARDS[damage]
    folder = Path(shutil.copytree(sound(made, "w8a8", "--max_shard_size", "30KB"), tmp_path / "out"))
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == 7 and not verify(folder)
    change(folder, shards)
    (folder / "streamq.json").unlink()
    problems = verify(folder)
    assert any(says in problem for problem in problems), problems


def test_what_diffusers_makes_of_it(made: Runs, tmp_path: Path) -> None:
    """Why the checks are worth their while: these load, and nothing but the output tells."""
    for damage in ("no metadata", "no zero point", "a part too many"):
        kind, change, _ = FORM[damage]
        folder = Path(shutil.copytree(sound(made, kind), tmp_path / damage))
        rewrite(folder / WHOLE, change)
        weight = Loaded(folder).model.get_submodule(LAYER).weight
        assert type(weight).__name__ != "Int8Tensor", damage


def test_experts_in_each_others_place(made: Runs, tmp_path: Path) -> None:
    model, folder = made.model("t2v-A14B", blocks=1), tmp_path / "out"
    quant(model, folder, "w8a8_diffusers")
    assert not verify(folder, "--source", model)
    for old, new in (("transformer", "x"), ("transformer_2", "transformer"), ("x", "transformer_2")):
        (folder / old).rename(folder / new)
    sign(folder)
    problems = verify(folder, "--source", model)
    for expert in ("high_noise_model", "low_noise_model"):
        assert any(problem.startswith(f"{expert}/") and "relative error" in problem for problem in problems)


def test_another_source_is_told(made: Runs) -> None:
    problems = verify(sound(made, "w8a16"), "--source", made.model(blocks=1, seed=1))
    assert sum("relative error" in problem for problem in problems) == 14


def test_inspect(made: Runs) -> None:
    """Types by the metadata; with the manifest also of the layers outside blocks."""
    found = json.loads(run("inspect", sound(made, "static"), "--json").stdout)
    assert found["format"] == "diffusers" and found["layout"] == "diffusers" and found["family"] == "t2v"
    kinds = set(found["layers"].values())
    assert found["layers"][NATIVE] == "w8a8_static_smooth" and found["layers"]["head.head"] == "w8a8"
    assert kinds == {"w8a8_static_smooth", "w8a8"}
