"""Every format and type is read back into layers that compute what the format's own `decode` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run
from generate_kit import forward, layer_errors, opened, plain, short_toy
from safetensors.torch import load_file

from streamq.device import products
from streamq.generation.linear import arithmetic

pytestmark = pytest.mark.xdist_group("generate_formats")  # one process makes what all of them look at

FREE = [
    ("w8a8_all", "lightx2v,comfyui"), ("w8a8", "mindie"), ("w8a8", "diffusers"), ("w8a16", "diffusers,gguf"),
    ("fp8", "lightx2v,diffusers"), ("fp8_comfyui", "comfyui"), ("w8a8_convrot", "comfyui"), ("w8a8_mxfp8", "mindie"),
    ("w4a4_mxfp4", "mindie"), ("w4a16", "gguf"),
]  # fmt: skip
CALIBRATED = [
    ("w4a4", "nunchaku"), ("w4a4_nvfp4", "nunchaku"), ("w4a16", "nunchaku"), ("w8a8_static", "mindie"),
    ("w8a8_static", "diffusers"), ("w8a8_smooth", "mindie,lightx2v,diffusers"),
]  # fmt: skip
CASES = [(kind, name) for kind, names in FREE + CALIBRATED for name in names.split(",")]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return short_toy(tmp_path_factory.mktemp("toy") / "pipeline")


def quick(kind: str, folder: Path) -> tuple[str, Path]:
    """SVDQuant without its search, which layers that are read back do not show."""
    text = (ROOT / "recipes" / f"{kind}.yaml").read_text()
    text = text.replace('method: "svdquant"\n      grid: "full"', 'method: "smoothquant"\n      alpha: 0.5')
    path = folder / f"{kind}.yaml"
    path.write_text(text.replace("rank: 32", "rank: 32, rounds: 2"))
    return "--config_path", path


@pytest.fixture(scope="module")
def quantized(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Type and format -> its folder."""
    out = tmp_path_factory.mktemp("quantized")
    calib = ("--num_samples", "2", "--time_bins", "2", "--size", "64*64", "--frame_num", "5")
    made = run("calib", "--model_path", toy, "--save_path", out / "calib", *calib, "--device", "cpu", "--quiet")
    assert made.returncode == 0, made.stderr
    found = {}
    for kind, names in FREE + CALIBRATED:
        folder = out / f"{kind}-{names}"
        given: tuple[Any, ...] = ("--calib", out / "calib") if (kind, names) in CALIBRATED else ()
        recipe = ("--quant_type", kind) if not kind.startswith("w4a4") or "mx" in kind else quick(kind, out)
        how = (*recipe, "--format", names, "--device", "cpu", "--quiet", *given)
        made = run("quant", "--model_path", toy, "--save_path", folder, *how)
        assert made.returncode == 0, made.stderr
        several = "," in names
        found |= {(kind, name): folder / name if several else folder for name in names.split(",")}
    return found


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_layers_compute_what_was_stored(quantized: dict[tuple[str, str], Path], kind: str, name: str) -> None:
    folder, smooth = quantized[kind, name], {}
    if (kind, name) == ("w8a8_smooth", "lightx2v"):
        stored = load_file(folder / "block_0.safetensors")
        one, three = (1 / stored[f"blocks.0.affine_norm{i}.weight"] for i in (1, 3))
        smooth = {f"blocks.0.attn1.to_{x}": one for x in "qkv"} | {"blocks.0.ffn.net.0.proj": three}
        assert any(bool((vector != 1).any()) for vector in smooth.values())
    errors = layer_errors(folder, torch.float32, smooth)
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize(("kind", "name"), [("w8a8_all", "comfyui"), ("w8a16", "gguf"), ("w4a4", "nunchaku")])
def test_bf16_stays_near_fp32(toy: Path, quantized: dict[tuple[str, str], Path], kind: str, name: str) -> None:
    due = forward(plain(toy, torch.float32), torch.float32)
    with opened(quantized[kind, name], torch.bfloat16) as transformer:
        made = forward(transformer.module, torch.bfloat16).float()
    assert float((made - due).norm() / due.norm()) < 0.1


def test_smoothing_is_exact_for_the_whole_model(toy: Path, quantized: dict[tuple[str, str], Path]) -> None:
    """Folded anywhere, a smoothed model must be near the float one: a vector that is left out would show."""
    due = forward(plain(toy, torch.float32), torch.float32)
    for name in ("mindie", "lightx2v", "diffusers"):
        with opened(quantized["w8a8_smooth", name], torch.float32) as transformer:
            assert transformer.weights.unused() == []
            made = forward(transformer.module, torch.float32)
        assert float((made - due).norm() / due.norm()) < 0.03, name


def test_int8_is_computed_in_integers(quantized: dict[tuple[str, str], Path]) -> None:
    with opened(quantized["w8a8", "mindie"], torch.bfloat16, 0) as transformer:
        unit = transformer.weights.units["blocks.0"]
        name = "blocks.0.attn1.to_q"
        with transformer.store.borrow("blocks.0") as tensors:
            layer = transformer._record(name, unit.layers[name], tensors, None)
        assert layer.codes.dtype == torch.int8 and arithmetic(layer) == "int8"
        # codes are the stored bytes themselves, not a copy of them
        assert layer.codes.data_ptr() == tensors[unit.layers[name].parts["weight"].name].data_ptr()


@pytest.mark.parametrize("sizes", [(1, 8, 8), (40, 256, 768), (5, 13824, 24)])
def test_integer_products_agree_bit_for_bit(sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    random = torch.Generator().manual_seed(1)
    x, w = (torch.randint(-128, 128, (rows, k), generator=random, dtype=torch.int8) for rows in (m, n))
    x[0], w[0] = -128, -128  # the largest sum: 2^14 · k
    due = products.int8_reference(x, w)
    assert int(due[0, 0]) == 128 * 128 * k
    assert torch.equal(products.int8_product(x, w), due)
    scales, scale = torch.rand(n, generator=random), torch.rand(m, 1, generator=random)
    made = products.int8_linear(x, w, scales, scale, offset=-7.0)
    exact = (x.double() + 7) @ w.double().T * scales.double() * scale.double()
    assert torch.allclose(made.double(), exact, rtol=1e-6, atol=0)
