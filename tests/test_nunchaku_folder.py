"""A nunchaku folder: its files, configuration and the way to load it; what reads it again; what is wrong with one."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nunchaku_kit import FOLDER, SINGLE, bits, headers, model, scheme, specs_of, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamq import wan
from streamq.checkpoint import Checkpoint, TensorInfo
from streamq.errors import UsageError
from streamq.quantized import Scheme
from streamq.savers import SaveOptions, Spec, nunchaku, nunchaku_contents

TOY = Path(__file__).parent / "assets" / "toy_wan" / "transformer"
RANK_32 = scheme("w4a4", "svdquant", 32)
CONFIG, INDEX = "config.json", "diffusion_pytorch_model.safetensors.index.json"


# -- Files and documents -----------------------------------------------------------------------------------------------


def spec(name: str, size: int) -> Spec:
    return Spec(name, "I8", (size,), "blocks.0")


def test_shards_break_between_layers() -> None:
    specs = [spec("a.qweight", 60), spec("a.bias", 20), spec("b.qweight", 15), spec("b.bias", 10), spec("c.weight", 75)]
    schemes = {"a": RANK_32}

    def shards(limit: int) -> list[list[str]]:
        files = nunchaku.files(specs, schemes, SaveOptions("folder", limit))
        assert [one for _, inside in files for one in inside] == specs
        assert all(sum(one.shape[0] for one in inside) <= max(limit or 180, 75) for _, inside in files)
        count = len(files)
        names = [f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        assert [name for name, _ in files] == (names if count > 1 else ["diffusion_pytorch_model.safetensors"])
        return [[one.name for one in inside] for _, inside in files]

    a, b, c = ["a.qweight", "a.bias"], ["b.qweight", "b.bias"], ["c.weight"]
    assert shards(0) == shards(180) == [a + b + c]
    assert shards(179) == [a + b, c]
    assert shards(104) == [a, b + c]  # b's first tensor would have fitted beside a
    assert shards(80) == [a, b, c]
    assert shards(79) == [["a.qweight"], ["a.bias", *b], c]  # a fits no shard
    assert shards(10) == [["a.qweight"], ["a.bias"], ["b.qweight"], ["b.bias"], c]


def test_ten_gigabytes_without_a_limit() -> None:
    specs = [spec(f"blocks.{i}.attn1.to_q.qweight", 3 * 10**9) for i in range(7)]
    files = nunchaku.files(specs, {"a": RANK_32}, SaveOptions("block"))
    assert [len(inside) for _, inside in files] == [3, 3, 1]


@pytest.mark.parametrize(
    ("schemes", "name"),
    [
        ({"a": None, "b": RANK_32}, "svdq-int4_r32.safetensors"),
        ({"a": scheme("w4a16", "mse"), "b": scheme("w4a4_nvfp4")}, "svdq-nvfp4_r16.safetensors"),
        ({"a": scheme("w4a16", "mse")}, "awq-int4.safetensors"),
    ],
)
def test_a_single_file(schemes: dict[str, Scheme | None], name: str) -> None:
    specs = [spec("a.qweight", 60), spec("b.qweight", 20 * 10**9)]
    assert nunchaku.files(specs, schemes, SINGLE) == [(name, specs)]


def documents(of: wan.Model, schemes: dict[str, Scheme | None], limit: int = 0) -> dict[str, Any]:
    options = SaveOptions("folder", limit)
    files = nunchaku.files(specs_of(of, schemes, options), schemes, options)
    made = nunchaku.documents(of, files, schemes, options, [])
    assert made == nunchaku.documents(of, files, schemes, options, [])
    return {one.name: json.loads(one.content) for one in made}


def every(of: wan.Model, how: Scheme | None) -> dict[str, Scheme | None]:
    return {one.native: how for one in of.linears}


def test_configuration_of_a_diffusers_source() -> None:
    (expert,) = wan.open_model(TOY)
    schemes = every(expert.model, scheme("w4a4", "svdquant", 48))
    schemes["blocks.1.ffn.0"] = schemes["blocks.0.cross_attn.k"] = scheme("w4a16", "mse")
    schemes["blocks.5.self_attn.o"] = None
    made = documents(expert.model, schemes)
    assert set(made) == {"config.json"}
    config = made["config.json"]
    quantization = config.pop("quantization_config")
    assert config == json.loads((TOY / "config.json").read_text())  # every key kept, and none that differs
    assert quantization["quant_method"] == "nunchaku_lite" and quantization["compute_dtype"] == "bfloat16"
    svdq, awq = quantization["svdq_w4a4"], quantization["awq_w4a16"]
    assert {key: svdq[key] for key in svdq if key != "targets"} == {"precision": "int4", "group_size": 64, "rank": 48}
    assert awq == {
        "precision": "int4", "group_size": 64, "targets": ["blocks.0.attn2.to_k", "blocks.1.ffn.net.0.proj"],
    }  # fmt: skip
    order = [one.name for one in expert.model.linears]
    left = {"blocks.5.attn1.to_out.0", *awq["targets"]}
    assert svdq["targets"] == [name for name in order if name not in left]


def test_configuration_of_a_native_source(tmp_path: Path) -> None:
    of = model(tmp_path / "native", "vace-1.3B", layout="native")
    config = documents(of, every(of, scheme("w4a4_nvfp4")))["config.json"]
    assert config["_class_name"] == "WanVACETransformer3DModel" and config["_diffusers_version"] == "0.42.1"
    assert config["num_layers"] == 2 and config["vace_layers"] == [0, 1] and config["patch_size"] == [1, 2, 2]
    assert "dim" not in config and "model_type" not in config
    quantization = config["quantization_config"]
    assert set(quantization) == {"quant_method", "compute_dtype", "svdq_w4a4"}
    svdq = quantization["svdq_w4a4"]
    assert (svdq["precision"], svdq["group_size"], svdq["rank"]) == ("nvfp4", 16, 16)
    assert {"vace_blocks.0.proj_in", "vace_blocks.1.proj_out"} < set(svdq["targets"])


def test_an_old_quantization_is_not_kept(tmp_path: Path) -> None:
    of = model(tmp_path / "source")
    path = of.checkpoint.root / "config.json"
    given = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gguf"}, "_name_or_path": "mine"}
    path.write_text(json.dumps(given | {"_diffusers_version": "0.35.0"}))
    config = documents(of, every(of, scheme("w4a16", "mse")))["config.json"]
    assert config["_name_or_path"] == "mine" and config["_diffusers_version"] == "0.35.0"
    assert set(config["quantization_config"]) == {"quant_method", "compute_dtype", "awq_w4a16"}


def test_an_index_beside_shards(tmp_path: Path) -> None:
    of = model(tmp_path / "source")
    schemes = every(of, RANK_32)
    options = SaveOptions("folder", 100_000)
    files = nunchaku.files(specs_of(of, schemes, options), schemes, options)
    assert len(files) > 2
    index = documents(of, schemes, 100_000)["diffusion_pytorch_model.safetensors.index.json"]
    assert index["weight_map"] == {one.name: file for file, inside in files for one in inside}
    size = {"I8": 1, "BF16": 2, "F32": 4}
    total = sum(torch.Size(one.shape).numel() * size[one.dtype] for _, inside in files for one in inside)
    assert index["metadata"] == {"total_size": total}


def test_models_that_diffusers_has_no_class_for(tmp_path: Path) -> None:
    of = model(tmp_path / "source", "s2v-14B", layout="native")
    with pytest.raises(UsageError, match="s2v"):
        nunchaku.documents(of, [], every(of, scheme("w4a16", "minmax")), FOLDER, [])


def test_metadata_of_a_folders_files(tmp_path: Path) -> None:
    of = model(tmp_path / "source")
    assert nunchaku.metadata(of, every(of, RANK_32), FOLDER) == {"format": "pt"}


def test_metadata_of_the_single_file(tmp_path: Path) -> None:
    of = model(tmp_path / "source")
    made = nunchaku.metadata(of, every(of, scheme("w4a4_nvfp4", "svdquant", 32)), SINGLE)
    assert made["format"] == "pt" and made["model_class"] == "WanTransformer3DModel"
    config = json.loads(made["config"])
    assert config["num_layers"] == 2 and "quantization_config" not in config
    both = {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16}
    assert json.loads(made["quantization_config"]) == {
        "method": "svdquant", "weight": both, "activation": both, "rank": 32,
    }  # fmt: skip
    made = nunchaku.metadata(of, every(of, RANK_32), SINGLE)
    assert json.loads(made["quantization_config"])["weight"] == {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    assert nunchaku.documents(of, [], every(of, RANK_32), SINGLE, []) == []


# -- Reading it again --------------------------------------------------------------------------------------------------


def mixed(native: str) -> Scheme | None:
    if native.endswith("self_attn.k"):
        return None
    return scheme("w4a16", "mse") if ".ffn." in native else scheme("w4a4_nvfp4", "svdquant", 16)


@pytest.mark.parametrize("options", [FOLDER, SINGLE, SaveOptions("folder", 100_000)])
@pytest.mark.parametrize("family", ["t2v-1.3B", "i2v-14B", "vace-1.3B"])
def test_a_written_folder_describes_its_model(tmp_path: Path, family: str, options: SaveOptions) -> None:
    of, out = model(tmp_path / "source", family), tmp_path / "out"
    schemes = write(of, out, mixed, options)
    tensors = headers(out)
    assert nunchaku.recognise(out) and not nunchaku.recognise(of.checkpoint.root)
    assert nunchaku.layers_in(out, tensors) == {name: how.type if how else "float" for name, how in schemes.items()}
    floats = {}
    for stored, info in tensors.items():
        if (name := nunchaku.float_name(stored)) is not None:
            floats[name] = replace(info, name=name, shape=nunchaku.float_shape(stored, info.dtype, info.shape))
    seen = wan.describe(Checkpoint(out, (), floats), quantized=True)
    assert (seen.family, seen.dim, seen.ffn_dim, seen.n_blocks) == (of.family, of.dim, of.ffn_dim, of.n_blocks)
    assert {name: info.shape for name, info in seen.tensors.items()} == {
        name: info.shape for name, info in of.tensors.items()
    }


def test_other_folders_are_not_taken_for_it(tmp_path: Path) -> None:
    for text in ("", "[]", '{"quantization_config": {"quant_method": "gguf"}}', '{"quantization_config": 3}'):
        (tmp_path / "config.json").write_text(text)
        assert not nunchaku.recognise(tmp_path)
    (tmp_path / "config.json").unlink()
    for name in ("svdq-int4_r32.safetensors", "awq-int4.safetensors"):
        (tmp_path / name).write_bytes(b"\xff" * 40)
        assert not nunchaku.recognise(tmp_path)


@pytest.mark.parametrize("family", ["t2v-1.3B", "i2v-14B", "vace-1.3B"])
def test_usage_is_a_program(tmp_path: Path, family: str) -> None:
    of = model(tmp_path / "source", family)
    folders = {"high_noise_model": tmp_path / "transformer", "low_noise_model": tmp_path / "transformer_2"}
    for folder in folders.values():
        write(of, folder, lambda _: RANK_32)
    pipeline = {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline", "vace": "WanVACEPipeline"}[of.family]
    for given in (folders, {"": tmp_path / "transformer"}):
        shown = {name: str(folder) for name, folder in given.items()}
        text = "\n".join(nunchaku.usage(shown, of, {}, SaveOptions()))
        compile(text, "usage", "exec")
        assert text.index('os.environ["DIFFUSERS_TRUST_REMOTE_KERNELS"] = "true"') < text.index("from diffusers import")
        assert "kernels" in text.splitlines()[0] and "torch_dtype=torch.bfloat16" in text
        assert str(tmp_path / "transformer") in text and f"{pipeline}.from_pretrained" in text
        assert ("transformer_2=transformer_2" in text) == (given is folders)


def test_usage_of_the_single_file(tmp_path: Path) -> None:
    (line,) = nunchaku.usage({"": "out"}, model(tmp_path / "source"), {}, SINGLE)
    assert "nothing loads" in line


# -- What is wrong -----------------------------------------------------------------------------------------------------

STOCK = ("t2v-1.3B", "i2v-14B", "flf2v-14B", "ti2v-5B", "vace-1.3B")


@pytest.mark.parametrize("family", STOCK)
def test_stock_parameters_are_diffusers_own(tmp_path: Path, family: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    of = model(tmp_path / "source", family, blocks=3)
    config = documents(of, every(of, RANK_32))[CONFIG]
    with torch.device("meta"):
        stock = getattr(diffusers, config["_class_name"]).from_config(config)
    due = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    assert nunchaku_contents.stock_shapes(config) == due


@pytest.mark.parametrize("choose", [lambda _: RANK_32, mixed])
@pytest.mark.parametrize("family", STOCK)
def test_nothing_is_wrong_with_what_was_written(
    tmp_path: Path, family: str, choose: Callable[[str], Scheme | None]
) -> None:
    of = model(tmp_path / "source", family)
    for number, options in enumerate((FOLDER, SINGLE, SaveOptions("folder", 100_000))):
        out = tmp_path / str(number)
        write(of, out, choose, options)
        assert nunchaku.problems(out, headers(out)) == []


@pytest.fixture
def stock_loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """diffusers, that takes this machine for one with an NVIDIA GPU and the package of kernels, which has none."""
    quantizer = pytest.importorskip("diffusers.quantizers.nunchaku.nunchaku_quantizer")
    importlib.import_module("diffusers").WanTransformer3DModel  # noqa: B018 - looks for packages when first asked for
    kernels = types.ModuleType("kernels")
    kernels.get_kernel = lambda *args, **how: types.SimpleNamespace(ops=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr("diffusers.utils.import_utils._kernels_available", True)
    monkeypatch.setattr("diffusers.utils.import_utils._kernels_version", "0.14.0")
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    monkeypatch.setattr(quantizer.NunchakuLiteQuantizer, "validate_environment", lambda *args, **how: None)
    sys.modules.pop("diffusers.quantizers.nunchaku.utils", None)
    yield importlib.import_module("diffusers")
    sys.modules.pop("diffusers.quantizers.nunchaku.utils", None)


@pytest.mark.parametrize("choose", [lambda _: RANK_32, mixed])
def test_stock_diffusers_finds_every_tensor(
    tmp_path: Path, stock_loader: Any, choose: Callable[[str], Scheme | None]
) -> None:
    """Its own loader, as far as it goes without a GPU: no tensor missing, none left over, no packed one changed."""
    out = tmp_path / "out"
    write(model(tmp_path / "source", "i2v-14B"), out, choose, SaveOptions("folder", 100_000))
    loaded, report = stock_loader.WanTransformer3DModel.from_pretrained(
        out, torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values()), report
    state, stored = loaded.state_dict(), {}
    for path in out.glob("*.safetensors"):
        stored |= load_file(path)
    assert state.keys() == stored.keys() and not any(value.is_meta for value in state.values())
    packed = [name for name in stored if f"{name.rpartition('.')[0]}.qweight" in stored]
    assert packed
    for name in packed:
        assert state[name].dtype == stored[name].dtype and bits(state[name]) == bits(stored[name]), name


Table = dict[str, TensorInfo]
Damage = Callable[[Path, Table], None]


def change_config(*path: str, value: Any = None) -> Damage:
    """Set a key of config.json below `path`; None removes it."""

    def act(folder: Path, table: Table) -> None:
        config = json.loads((folder / CONFIG).read_text())
        place = config
        for key in path[:-1]:
            place = place[key]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        (folder / CONFIG).write_text(json.dumps(config))

    return act


def add_target(section: str, name: str) -> Damage:
    def act(folder: Path, table: Table) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["quantization_config"][section]["targets"].append(name)
        (folder / CONFIG).write_text(json.dumps(config))

    return act


def remove_target(section: str, name: str) -> Damage:
    def act(folder: Path, table: Table) -> None:
        config = json.loads((folder / CONFIG).read_text())
        config["quantization_config"][section]["targets"].remove(name)
        (folder / CONFIG).write_text(json.dumps(config))

    return act


def tensor(name: str, **how: Any) -> Damage:
    """Change a tensor's header; without `how`, remove it."""

    def act(folder: Path, table: Table) -> None:
        info = table.pop(name)
        if how:
            table[name] = replace(info, **how)

    return act


def another(name: str, like: str) -> Damage:
    def act(folder: Path, table: Table) -> None:
        table[name] = replace(table[like], name=name)

    return act


def index(**how: Any) -> Damage:
    def act(folder: Path, table: Table) -> None:
        document = json.loads((folder / INDEX).read_text())
        document["weight_map"] |= how.pop("weight_map", {})
        for name in how.pop("without", ()):
            del document["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(document | how))

    return act


def file(act: Callable[[Path], None]) -> Damage:
    return lambda folder, table: act(folder)


Q, FFN, K = "blocks.1.attn1.to_q", "blocks.1.ffn.net.2", "blocks.1.attn1.to_k"  # nvfp4, AWQ, float
WORDS = "quantization_config"
FIRST, LAST = "diffusion_pytorch_model-00001-of-00003.safetensors", "diffusion_pytorch_model-00003-of-00003.safetensors"
DAMAGE: dict[str, tuple[Damage, str]] = {
    "no wtscale": (tensor(f"{Q}.wtscale"), f"{Q}.wtscale: missing"),
    "no wcscales": (tensor(f"{Q}.wcscales"), f"{Q}.wcscales: missing"),
    "no bias": (tensor(f"{Q}.bias"), f"{Q}.bias: missing"),
    "no zeros": (tensor(f"{FFN}.wzeros"), f"{FFN}.wzeros: missing"),
    "no qweight": (tensor(f"{Q}.qweight"), f"{Q}: w4a4_nvfp4 by its section of config.json, not packed by its tensors"),
    "no float weight": (tensor(f"{K}.weight"), f"{K}.weight: missing"),
    "no norm": (tensor("blocks.0.norm2.bias"), "blocks.0.norm2.bias: missing"),
    "no embedder": (tensor("condition_embedder.time_proj.weight"), "condition_embedder.time_proj.weight: missing"),
    "old name": (another(f"{Q}.smooth_factor_orig", f"{Q}.smooth_factor"), "the older single-file container"),
    "float weight beside": (another(f"{Q}.weight", f"{K}.weight"), f"{Q}.weight: no parameter"),
    "something else": (another("blocks.0.attn3.x", f"{K}.weight"), "blocks.0.attn3.x: no parameter"),
    "block too many": (another("blocks.2.norm2.bias", "blocks.1.norm2.bias"), "blocks.2.norm2.bias: no parameter"),
    "fp32 smooth": (tensor(f"{Q}.smooth_factor", dtype="F32"), f"{Q}.smooth_factor: F32 [128], must be BF16 [128]"),
    "unsigned codes": (tensor(f"{Q}.qweight", dtype="U8"), f"{Q}.qweight: U8 [128, 64], must be I8 [128, 64]"),
    "bf16 micro scales": (tensor(f"{Q}.wscales", dtype="BF16"), f"{Q}.wscales: BF16 [8, 128], must be F8_E4M3"),
    "fp32 bias": (tensor(f"{FFN}.bias", dtype="F32"), f"{FFN}.bias: F32 [128], must be BF16 [128]"),
    "padded AWQ scales": (tensor(f"{FFN}.wscales", shape=(32, 128)), "BF16 [32, 128], must be BF16 [4, 128]"),
    "scales as meant": (tensor(f"{Q}.wscales", shape=(128, 8)), "F8_E4M3 [128, 8], must be F8_E4M3 [8, 128]"),
    "another rank": (tensor(f"{Q}.proj_up", shape=(128, 32)), f"{Q}.proj_up: BF16 [128, 32], must be BF16 [128, 16]"),
    "integer float": (tensor(f"{K}.weight", dtype="I8"), f"{K}.weight: I8 [128, 128], must be F32 or BF16 or F16"),
    "wide head": (tensor("proj_out.weight", shape=(96, 128)), "proj_out.weight: BF16 [96, 128], must be"),
    "target of nothing": (add_target("svdq_w4a4", "blocks.1.attn3.to_q"), "blocks.1.attn3.to_q: a target"),
    "target of a norm": (add_target("svdq_w4a4", "blocks.1.norm2"), "blocks.1.norm2: a target in config.json, but"),
    "target of the patch embedding": (add_target("awq_w4a16", "patch_embedding"), "patch_embedding: a target"),
    "target of a float layer": (add_target("svdq_w4a4", K), f"{K}: w4a4_nvfp4 by its section of config.json, not pack"),
    "target of a small layer": (add_target("svdq_w4a4", "proj_out"), "proj_out: 64 outputs, svdq_w4a4 takes multiples"),
    "target in both": (add_target("awq_w4a16", Q), f"{Q}: twice among the targets"),
    "target forgotten": (remove_target("svdq_w4a4", Q), f"{Q}: packed in the weights, but no target"),
    "target of the other kind": (add_target("awq_w4a16", K), f"{K}: w4a16 by its section"),
    "target that is no text": (change_config(WORDS, "awq_w4a16", "targets", value=[3]), "target 3 is no text"),
    "no target": (change_config(WORDS, "awq_w4a16", "targets", value=[]), "no target at all"),
    "targets that are no list": (change_config(WORDS, "awq_w4a16", "targets", value="*"), "a list of targets"),
    "another precision": (change_config(WORDS, "svdq_w4a4", "precision", value="int4"), f"{Q}: w4a4 by its section"),
    "no such precision": (change_config(WORDS, "awq_w4a16", "precision", value="nvfp4"), "'nvfp4', must be int4"),
    "another group": (change_config(WORDS, "svdq_w4a4", "group_size", value=64), "group_size 64, must be 16"),
    "another rank in words": (change_config(WORDS, "svdq_w4a4", "rank", value=32), "[128, 16], must be BF16 [128, 32]"),
    "no rank": (change_config(WORDS, "svdq_w4a4", "rank"), "rank None, must be a multiple of 16"),
    "true rank": (change_config(WORDS, "svdq_w4a4", "rank", value=True), "rank True, must be a multiple of 16"),
    "no section": (change_config(WORDS, value={"quant_method": "nunchaku_lite"}), "neither svdq_w4a4 nor awq_w4a16"),
    "another half": (change_config(WORDS, "compute_dtype", value="float32"), "compute_dtype 'float32'"),
    "half that the tensors are not": (change_config(WORDS, "compute_dtype", value="float16"), "must be F16 [128]"),
    "another class": (change_config("_class_name", value="FluxTransformer2DModel"), "_class_name 'FluxTransformer2D"),
    "another width": (change_config("num_attention_heads", value=2), f"{Q}.qweight: I8 [128, 64], must be I8 [256, 1"),
    "width of text": (change_config("attention_head_dim", value="128"), "attention_head_dim '128', must be a whole"),
    "a billion blocks": (change_config("num_layers", value=10**9), "num_layers '1000000000', must be a whole number"),
    "a block more": (change_config("num_layers", value=3), "blocks.2.attn1.to_q.weight: missing"),
    "strange patches": (change_config("patch_size", value="122"), "patch_size 122, must be three whole numbers"),
    "index of a tensor elsewhere": (index(weight_map={f"{Q}.bias": LAST}), f"{Q}.bias: in {FIRST}, {INDEX} says"),
    "index of too many": (index(weight_map={"x.bias": LAST}), f"x.bias: in {INDEX}, not in the weights"),
    "index of too few": (index(without=[f"{Q}.bias"]), f"{Q}.bias: in {FIRST}, {INDEX} says None"),
    "index of a file that is gone": (index(weight_map={"x.bias": "y.safetensors"}), "y.safetensors: in diffusion_"),
    "index without metadata": (index(metadata=[]), "no weight_map and metadata objects"),
    "no index": (file(lambda at: (at / INDEX).unlink()), "diffusion_pytorch_model.safetensors: missing, and there is"),
    "stray file": (file(lambda at: (at / "z.safetensors").write_bytes(b"")), "z.safetensors: not in"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three shards with layers of nvfp4, AWQ and bf16."""
    place = tmp_path_factory.mktemp("sound")
    write(model(place / "source"), place / "out", mixed, SaveOptions("folder", 400_000))
    assert sorted(path.name for path in (place / "out").glob("*.safetensors"))[-1] == LAST
    return place / "out"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen(sound: Path, tmp_path: Path, damage: str) -> None:
    spoil, says = DAMAGE[damage]
    folder, table = Path(shutil.copytree(sound, tmp_path / "out")), headers(sound)
    assert nunchaku.problems(folder, table) == []
    spoil(folder, table)
    found = nunchaku.problems(folder, table)
    assert any(says in problem for problem in found), found
    kinds = nunchaku.layers_in(folder, table)  # whatever is wrong, this answers
    assert set(kinds.values()) <= {"w4a4", "w4a4_nvfp4", "w4a16", "float"}


def test_a_lone_damage_is_told_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(model(tmp_path / "source"), out, mixed)
    for damage in ("no wtscale", "no qweight", "fp32 smooth", "padded AWQ scales", "old name"):
        table = headers(out)
        DAMAGE[damage][0](out, table)
        assert len(nunchaku.problems(out, table)) == 1, damage


def test_a_stray_file_beside_a_whole_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(model(tmp_path / "source"), out, mixed)
    (out / "block_0.safetensors").write_bytes(b"")
    assert nunchaku.problems(out, {})[-1] == "block_0.safetensors: diffusers would not read it; remove it"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("quantization_config", "{", "quantization_config: not valid JSON"),
        ("config", "[]", "config is no JSON object"),
        ("model_class", "Flux", "_class_name 'Flux'"),
        ("quantization_config", '{"rank": 16, "weight": {"dtype": "int4"}}', "weight.dtype int4, its layers are fp4"),
        ("quantization_config", '{"rank": 32, "weight": {"dtype": "fp4_e2m1_all"}}', "must be BF16 [128, 32]"),
    ],
)
def test_damage_of_the_single_files_words(tmp_path: Path, key: str, value: str, says: str) -> None:
    out = tmp_path / "out"
    write(model(tmp_path / "source"), out, mixed, SINGLE)
    (path,) = out.glob("*.safetensors")
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    save_file(load_file(path), path, metadata | {key: value})
    found = nunchaku.problems(out, headers(out))
    assert any(says in problem for problem in found), found
