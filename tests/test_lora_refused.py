"""LoRAs that are not merged: one line, exit status 2, nothing written; 1 where only the values tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic
import torch
from conftest import check_error, run, write_tiny
from lora_kit import Made, Maker
from safetensors.torch import save_file
from torch import Tensor

SHAPES = synthetic.shapes(synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"], 1))
Q, FFN = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.ffn.0"
Tensors = dict[str, Tensor]


@pytest.fixture(name="model", scope="module")
def model_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("refused") / "t2v", "t2v-1.3B", blocks=1)


def sound() -> Made:
    return Maker(SHAPES).pair("blocks.0.self_attn.q", 4, torch.tensor(4.0)).bias("blocks.0.ffn.0").made


def refused(model: Path, out: Path, given: object, *says: str) -> None:
    """By `quant` and by `plan`, before anything is written."""
    for command in ("quant", "plan"):
        result = run(command, "--model_path", model, "--save_path", out, "--quant_type", "w8a8", "--device", "cpu",
                     "--quiet", "--lora", given)  # fmt: skip
        assert result.returncode == 2, result.stderr
        check_error(result, *says)
        assert not out.exists()


def without(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(key)


def put(key: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(key, torch.zeros(shape).to(dtype))


def both(*changes: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for one in changes:
            one(tensors)

    return change


CASES: dict[str, tuple[Callable[[Tensors], None], tuple[str, ...]]] = {
    "unmatched": (
        both(*(put(f"diffusion_model.blocks.{i}.self_attn.q.lora_A.weight", 4, 64) for i in range(1, 6))),
        ("5 of its 9 keys match nothing in this t2v model of 1 blocks", "blocks.1.self_attn.q.lora_A.weight", ", …"),
    ),
    "image-branch": (put("diffusion_model.blocks.0.cross_attn.k_img.diff_b", 64), ("1 of its 5 keys match", "k_img")),
    "unknown-end": (put(f"{Q}.weight", 64, 64), ("1 of its 5 keys match nothing", f"{Q}.weight")),
    "flat-unmatched": (put("lora_unet_blocks_7_ffn_0.lora_up.weight", 64, 4), ("match nothing", "blocks_7_ffn_0")),
    "bias-of-a-norm": (put("diffusion_model.blocks.0.self_attn.norm_q.diff_b", 64), ("match nothing", "norm_q.diff_b")),
    "no-up": (without(f"{Q}.lora_B.weight"), ("lack the other half", f"{Q}.lora_A.weight")),
    "no-down": (without(f"{Q}.lora_A.weight"), ("lack the other half", f"{Q}.lora_B.weight")),
    "lone-alpha": (put("blocks.0.ffn.2.alpha"), ("lack the other half", "blocks.0.ffn.2.alpha")) ,
    "lone-bias": (put(f"{FFN}.lora_B.bias", 128), ("lack the other half", f"{FFN}.lora_B.bias")),
    "columns": (put(f"{Q}.lora_A.weight", 4, 65), (f"{Q}.lora_A.weight: shape [4, 65]", "[64, 64] needs [rank, 64]")),
    "rows": (put(f"{Q}.lora_B.weight", 63, 4), ("lora_B.weight: shape [63, 4]", "rank 4 need [64, 4]")),
    "ranks": (put(f"{Q}.lora_B.weight", 64, 5), ("lora_B.weight: shape [64, 5]", "rank 4 need [64, 4]")),
    "no-rank": (put(f"{Q}.lora_A.weight", 0, 64), ("shape [0, 64]",)),
    "vector": (put(f"{Q}.lora_A.weight", 64), ("shape [64]",)),
    "pair-for-a-norm": (
        both(put("diffusion_model.blocks.0.norm3.lora_A.weight", 1, 64),
             put("diffusion_model.blocks.0.norm3.lora_B.weight", 64, 1)),
        ("blocks.0.norm3.weight of shape [64]", "only matrices"),
    ),
    "diff": (put(f"{FFN}.diff", 64, 128), (f"{FFN}.diff: shape [64, 128]", "[128, 64]")),
    "diff_b": (put(f"{FFN}.diff_b", 64), (f"{FFN}.diff_b: shape [64]", "[128]")),
    "diff_m": (put("diffusion_model.blocks.0.diff_m", 1, 2, 64), ("diff_m: shape [1, 2, 64]", "[1, 6, 64]")),
    "alpha-shape": (put(f"{Q}.alpha", 2, dtype=torch.float32), (f"{Q}.alpha: shape [2]", "one number")),
    "int8": (put(f"{Q}.lora_A.weight", 4, 64, dtype=torch.int8), ("lora_A.weight: dtype I8", "convert it")),
    "fp8": (put(f"{FFN}.diff_b", 128, dtype=torch.float8_e4m3fn), ("diff_b: dtype F8_E4M3", "convert it")),
    "fp64": (put(f"{FFN}.diff_b", 128, dtype=torch.float64), ("diff_b: dtype F64", "convert it")),
    "bool-alpha": (put(f"{Q}.alpha", dtype=torch.bool), ("alpha: dtype BOOL",)),
    "dora": (put(f"{Q}.dora_scale", 64, 1), ("1 of its 5 keys", "DoRA", "give the merged model")),
    "peft-dora": (put(f"{Q}.lora_magnitude_vector", 64), ("DoRA",)),
    "loha": (put(f"{Q}.hada_w1_a", 64, 4), ("LoHa",)),
    "lokr": (put(f"{Q}.lokr_w1", 8, 8), ("LoKr",)),
    "mid": (put(f"{Q}.lora_mid.weight", 4, 4, 1, 1), ("lora_mid",)),
    "oft": (put(f"{Q}.oft_blocks", 4, 4), ("OFT",)),
    "set_weight": (put(f"{Q}.set_weight", 64, 64), ("replaced weights",)),
    "text-encoder": (
        put("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", 4, 4),
        ("1 of its 5 keys belong to a text encoder", "save the LoRA without them"),
    ),
    "text-encoder-peft": (put("text_encoder.layers.0.q.lora_A.weight", 4, 4), ("belong to a text encoder",)),
    "twice-one-name": (
        both(put("blocks.0.self_attn.q.lora_A.weight", 4, 64), put("blocks.0.self_attn.q.lora_B.weight", 64, 4)),
        ("another key changes in the same way",),
    ),
    "twice-two-names": (put("transformer.blocks.0.ffn.net.0.proj.diff_b", 128), ("another key changes",)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_lora_that_does_not_fit(tmp_path: Path, model: Path, case: str) -> None:
    made, (change, says) = sound(), CASES[case]
    change(made.tensors)
    path = made.save(tmp_path / "lora.safetensors")
    refused(model, tmp_path / "out", f"{path}:0.5", f"--lora {path}", *says)


@pytest.mark.parametrize("key", [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", f"{FFN}.diff_b", f"{Q}.alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_names_its_key(tmp_path: Path, model: Path, key: str, value: float) -> None:
    made = sound()
    made.tensors[key] = made.tensors[key].clone()
    made.tensors[key].view(-1)[-1] = value
    path = made.save(tmp_path / "lora.safetensors")
    result = run("quant", "--model_path", model, "--save_path", tmp_path / "out", "--quant_type", "w8a8", "--device",
                 "cpu", "--quiet", "--lora", path)  # fmt: skip
    assert result.returncode == 1
    check_error(result, key, "lora.safetensors", "LoRA is damaged", "NaN or Inf|nan|-inf")
    assert not (tmp_path / "out" / "streamq.json").exists()


def test_a_strength_beyond_a_dtype(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1, dtype="fp16")
    path = sound().save(tmp_path / "lora.safetensors")
    result = run("quant", "--model_path", model, "--save_path", tmp_path / "out", "--quant_type", "w8a8", "--device",
                 "cpu", "--quiet", "--lora", f"{path}:1e9")  # fmt: skip
    assert result.returncode == 1
    check_error(result, "too large for F16", "smaller strength", "lora.safetensors")


def test_a_damaged_weight_is_not_the_loras_fault(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "t2v-1.3B", blocks=1)
    file = next(model.glob("*.safetensors"))
    from safetensors.torch import load_file

    tensors = load_file(file)
    tensors["head.head.bias"][0] = float("nan")
    save_file(tensors, file)
    for maker in (Maker(SHAPES).bias("head.head"), Maker(SHAPES).pair("head.head")):
        path = maker.made.save(tmp_path / "lora.safetensors")
        result = run("quant", "--model_path", model, "--save_path", tmp_path / "out", "--quant_type", "w8a8",
                     "--overwrite", "--device", "cpu", "--quiet", "--lora", path)  # fmt: skip
        assert result.returncode == 1
        check_error(result, "head.head.bias", "the source is damaged")


def test_paths_that_are_no_lora(tmp_path: Path, model: Path) -> None:
    path = sound().save(tmp_path / "folder" / "a.safetensors")
    refused(model, tmp_path / "out", tmp_path / "none.safetensors", "no such file or folder")
    refused(model, tmp_path / "out", f"{path}:nan", "no such file or folder", "number behind the last colon")
    sound().save(tmp_path / "folder" / "b.safetensors")
    refused(
        model,
        tmp_path / "out",
        path.parent,
        "2 .safetensors files in it (a.safetensors, b.safetensors",
        "give the file",
    )
    (tmp_path / "empty").mkdir()
    refused(model, tmp_path / "out", tmp_path / "empty", "0 .safetensors files in it")
    for name in ("lora.pt", "lora.ckpt"):
        (tmp_path / name).write_bytes(b"\x80\x02")
        refused(model, tmp_path / "out", tmp_path / name, "a pickle", "never opens")
    (tmp_path / "empty" / "x.bin").write_bytes(b"\x80\x02")
    refused(model, tmp_path / "out", tmp_path / "empty", "x.bin is a pickle")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-1])
    refused(model, tmp_path / "out", tmp_path / "cut.safetensors", "truncated")
    save_file({}, tmp_path / "nothing.safetensors")
    refused(model, tmp_path / "out", tmp_path / "nothing.safetensors", "no tensor in it")


@pytest.mark.parametrize("key", ["use_dora", "use_rslora", "alpha_pattern"])
def test_an_adapters_configuration_that_is_not_merged(tmp_path: Path, model: Path, key: str) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, f"transformer.{key}": {"a": 1}})}
    refused(
        model, tmp_path / "out", sound().save(tmp_path / "lora.safetensors", metadata), key, "give the merged model"
    )


def test_an_expert_that_the_model_lacks(tmp_path: Path, model: Path) -> None:
    path = sound().save(tmp_path / "lora.safetensors")
    refused(
        model,
        tmp_path / "out",
        f"high_noise_model={path}",
        "one transformer, no high_noise_model",
        "leave the name out",
    )


def test_the_expert_is_named(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "two", "t2v-A14B", blocks=1)
    made = sound()
    put("diffusion_model.blocks.0.x.diff", 1)(made.tensors)
    path = made.save(tmp_path / "lora.safetensors")
    refused(model, tmp_path / "out", f"low_noise_model={path}", "for low_noise_model: 1 of its 5 keys")


def test_an_output_that_would_hold_the_lora(tmp_path: Path, model: Path) -> None:
    path = sound().save(tmp_path / "out" / "deep" / "lora.safetensors")
    for place in (tmp_path / "out", path.parent):
        for more in ((), ("--overwrite",)):
            result = run(
                "quant", "--model_path", model, "--save_path", place, "--quant_type", "w8a8", "--lora", path, *more
            )
            assert result.returncode == 2 and path.exists()
            check_error(result, "holds the LoRA", "choose another folder")
    inside = path.parent / "result"
    result = run("quant", "--model_path", model, "--save_path", inside, "--quant_type", "w8a8", "--device", "cpu",
                 "--quiet", "--lora", path.parent)  # fmt: skip
    assert result.returncode == 0, result.stderr
