"""Whole models in the diffusers format, loaded and run by stock diffusers with torchao, on a CPU.

Every layer's output is compared with torchao's formulas as `torchao_kit` has them, bit for bit where its product is of
whole numbers; every weight with what torchao makes of the float model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from nunchaku_runs import floats, one_thread
from torch import Tensor, nn
from torchao_kit import (
    FP32,
    SMOOTH,
    STATIC,
    W8A8,
    W8A16,
    Loaded,
    Runs,
    Step,
    bits,
    computed,
    dequantized,
    forward,
    inputs,
    layer,
    metadata,
    step,
)

from streamq.pairs import Pair, QConfig
from streamq.quantized import QuantizedLinear, Rule, Scheme, StaticInput
from streamq.simulate import SimulatedLinear

MIXED = [
    step("float", include=["*cross_attn.v", "text_embedding.0"]),
    step("fp8_e4m3", "fp8_e4m3", include=["*self_attn.o"]),
    step("int8", exclude=["blocks.0.ffn.2", "head.head", "vace_blocks.1.*"]),
]
HOT = {"hot": True, "dim": 128, "ffn": 256}


@dataclass(frozen=True)
class Case:
    """A model and a recipe. `types`: how many layers of an expert are of each type."""

    family: str
    what: str | list[Step]
    types: Mapping[str, int]
    model: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[object, ...] = ()


CASES = {
    "t2v w8a16": Case("t2v-1.3B", "w8a16_diffusers", {"w8a16": 24}, {"layout": "native", "dim": 128}),
    "t2v gptq": Case("t2v-1.3B", "w8a8_gptq_diffusers", {"w8a8": 24}),
    "t2v static": Case("t2v-1.3B", "w8a8_static_diffusers", {"w8a8_static": 20, "w8a8": 4}),
    "t2v fp8": Case("t2v-1.3B", "fp8_diffusers", {"fp8": 24}, {"dtype": "bf16"}),
    "i2v w8a8": Case("i2v-14B", "w8a8_diffusers", {"w8a8": 30}, {"dtype": "bf16"}),
    "i2v static": Case("i2v-14B", [STATIC, W8A16], {"w8a8_static": 24, "w8a16": 6}, {"dtype": "fp16"}),
    "flf2v smooth": Case("flf2v-14B", "w8a8_smooth_diffusers", {"w8a8": 30}, HOT),
    "ti2v w8a8": Case("ti2v-5B", "w8a8_diffusers", {"w8a8": 24}, {}, ("--max_shard_size", "100KB")),
    "ti2v smooth and static": Case("ti2v-5B", [SMOOTH, STATIC, W8A8], {"w8a8_static": 20, "w8a8": 4}, HOT),
    "vace w8a8": Case("vace-1.3B", "w8a8_diffusers", {"w8a8": 47}),
    "vace static": Case("vace-1.3B", "w8a8_static_diffusers", {"w8a8_static": 43, "w8a8": 4}),
    "vace fp8": Case("vace-1.3B", "fp8_diffusers", {"fp8": 47}, {"layout": "native", "dim": 128}),
    "vace mixed": Case("vace-1.3B", MIXED, {"w8a8": 27, "w8a16": 5, "fp8": 4}),
    "experts": Case("t2v-A14B", "w8a8_diffusers", {"w8a8": 14}, {"blocks": 1}),
}  # fmt: skip
PADDED = ("condition_embedder.text_embedder.linear_1.weight", "vace_blocks.0.proj_in.weight")  # rows of zeros
DYNAMIC = [name for name, case in CASES.items() if not case.types.get("w8a8_static")]


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Everything here is small."""
    with one_thread():
        yield


class Made:
    """Cases, quantized and loaded once a module."""

    def __init__(self, root: Path) -> None:
        self.runs = Runs(root)
        self._loaded: dict[str, list[Loaded]] = {}

    def folders(self, case: Case) -> list[tuple[Path, Path]]:
        """(output, source) of each expert."""
        model = self.runs.model(case.family, **case.model)
        out = self.runs.out(model, case.what, *case.options)
        if case.family.endswith("A14B"):
            return [(out / name, model / name) for name in ("transformer", "transformer_2")]
        return [(out, model if case.model.get("layout") == "native" else model / "transformer")]

    def __call__(self, name: str) -> list[Loaded]:
        if name not in self._loaded:
            self._loaded[name] = [Loaded(out) for out, _ in self.folders(CASES[name])]
        return self._loaded[name]

    def source(self, name: str, number: int = 0) -> dict[str, Tensor]:
        """An expert's float tensors by diffusers names."""
        return floats(self.folders(CASES[name])[number][1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("torchao"))


def kind_of(loaded: Loaded, name: str) -> str:
    """A layer's type by what torchao made of it."""
    weight = loaded.model.get_submodule(name).weight
    if type(weight).__name__ == "Float8Tensor":
        assert weight.act_quant_kwargs is not None
        return "fp8"
    assert type(weight).__name__ == "Int8Tensor"
    if weight.act_quant_kwargs is None:
        return "w8a16"
    return "w8a8" if weight.act_quant_scale is None else "w8a8_static"


@pytest.mark.parametrize("name", CASES)
def test_stock_diffusers_has_every_tensor(made: Made, name: str) -> None:
    for number, loaded in enumerate(made(name)):
        assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= loaded.report.keys()
        assert not any(loaded.report.values()), loaded.report
        assert not any(tensor.is_meta for tensor in (*loaded.model.parameters(), *loaded.model.buffers()))
        kinds = [kind_of(loaded, layer) for layer in loaded.layers]
        assert {kind: kinds.count(kind) for kind in kinds} == CASES[name].types
        source = made.source(name, number)
        for key, parameter in loaded.model.state_dict().items():
            module = key.rpartition(".")[0]
            if module in loaded.layers and key.endswith(".weight"):
                check_parts(parameter, layer(loaded.stored, module))
                continue
            due = torch.float32 if FP32 & set(key.split(".")) else torch.bfloat16
            assert parameter.dtype == due == loaded.stored[key].dtype, key
            assert bits(parameter) == bits(loaded.stored[key]) == bits(source[key].to(due)), key
        left = {key for key in source if key.endswith(".weight") and source[key].dim() == 2 and "time_emb" not in key}
        if name != "vace mixed":
            assert left == {f"{layer}.weight" for layer in loaded.layers}


def check_parts(weight: Tensor, parts: Mapping[str, Tensor]) -> None:
    """What is on the disk is in the tensor, and nothing else."""
    for part in ("qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale"):
        stored, own = parts.get(f"_weight_{part}"), getattr(weight, part, None)
        assert (stored is None) == (own is None), part
        if stored is not None and own is not None:
            assert (own.dtype, own.shape, bits(own)) == (stored.dtype, stored.shape, bits(stored)), part
    assert weight.dtype == torch.bfloat16


# -- What the layers compute -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_layer_computes_what_is_stored(made: Made, name: str) -> None:
    """On the inputs that it has in the model, whose rank is that of the fixed scales."""
    for loaded in made(name):
        seen: dict[str, float] = {}
        hooks = [
            loaded.model.get_submodule(of).register_forward_hook(watcher(loaded, of, seen)) for of in loaded.layers
        ]
        result = forward(loaded.model, inputs(loaded.config))
        for hook in hooks:
            hook.remove()
        assert bool(torch.isfinite(result).all()) and seen.keys() == set(loaded.layers)
        assert max(seen.values()) < 0.02, max(seen.items(), key=lambda row: row[1])


def watcher(loaded: Loaded, of: str, seen: dict[str, float]) -> Callable[..., None]:
    """Puts a layer's distance from what streamq takes it for into `seen`."""
    parts, kind = layer(loaded.stored, of), kind_of(loaded, of)

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        due = computed(args[0], parts, kind)
        assert due.shape == output.shape and output.dtype == torch.bfloat16
        assert not of.startswith(("blocks.", "vace_blocks.")) or args[0].dim() == 3, of
        if kind == "fp8":
            seen[of] = error(due, output)
            assert seen[of] < 0.002, of
        else:
            assert torch.equal(due, output), (of, error(due, output))
            seen[of] = error(simulated(parts, kind)(args[0]), output)

    return watch


def error(due: Tensor, made: Tensor) -> float:
    return float(torch.linalg.vector_norm(due.double() - made.double()) / torch.linalg.vector_norm(due.double()))


def simulated(parts: Mapping[str, Tensor], kind: str) -> nn.Module:
    """streamq's own idea of such a layer, by which it calibrates and counts errors."""
    act = {
        "w8a16": QConfig("per_token", "float"), "w8a8": QConfig("per_token", "int8"),
        "w8a8_static": QConfig("per_tensor", "int8"),
    }[kind]  # fmt: skip
    own, pre = parts.get("_weight_act_quant_scale"), parts.get("_weight_act_pre_scale")
    made = QuantizedLinear(
        Scheme(kind, Pair(act, QConfig("per_channel", "int8")), Rule()), parts["_weight_qdata"], parts["_weight_scale"],
        parts["bias"], torch.bfloat16, 0.0, smooth=None if pre is None else 1 / pre.float(),
        static=None if own is None else StaticInput(float(own), 0.0),
    )  # fmt: skip
    return SimulatedLinear(made, torch.bfloat16)


@pytest.mark.parametrize("name", DYNAMIC)
def test_the_output_is_near_the_float_models(made: Made, name: str) -> None:
    """Against the float model in bf16; and, where inputs are not rounded, against the weights that are stored.

    A fixed range is left out: it is right for the inputs that it was calibrated on.
    """
    case = CASES[name]
    for number, loaded in enumerate(made(name)):
        given = inputs(loaded.config)
        result = forward(loaded.model, given)
        due = forward(loaded.floats(made.source(name, number), torch.bfloat16), given)
        whole = {key: value.float() if value.is_floating_point() else value for key, value in given.items()}
        near = forward(loaded.effective(), whole)
        off, from_near = error(due, result), error(near, result)
        deep = 2 if case.family.startswith("vace") else 1
        limit = deep * (0.08 if "fp8" in case.types else 0.03)
        assert off < limit and from_near < limit, (off, from_near)
        if set(case.types) == {"w8a16"}:
            assert from_near < 0.01 and off < 0.015, (off, from_near)


@pytest.mark.parametrize("name", ["t2v static", "i2v static", "vace static", "ti2v smooth and static"])
def test_fixed_ranges_fit_the_inputs_that_they_were_made_of(made: Made, name: str) -> None:
    """Where nothing is beyond the range, a layer is as near the float layer as 8 bits for the whole input can be."""
    for loaded in made(name):
        for of in (key for key in loaded.layers if kind_of(loaded, key) == "w8a8_static"):
            parts = layer(loaded.stored, of)
            own, pre = parts["_weight_act_quant_scale"], parts.get("_weight_act_pre_scale")
            assert own.shape == (1, 1, 1) and own.dtype == torch.float32 and 0 < float(own) < 1
            chance = torch.Generator().manual_seed(3)
            x = torch.rand(1, 64, parts["_weight_qdata"].shape[1], generator=chance) * 254 - 127
            x = (x * own if pre is None else x * own / pre.float()).bfloat16()
            linear = loaded.model.get_submodule(of)
            with torch.no_grad():
                made_of = linear(x)
            due = nn.functional.linear(x.float(), dequantized(parts), parts["bias"].float())
            assert error(due, made_of) < 0.01, of


def test_smoothing_pays(made: Made) -> None:
    """Where some channels are hot: against the same recipe without it, by the errors of the blocks' layers."""
    (loaded,), source = made("flf2v smooth"), made.source("flf2v smooth")
    plain = Loaded(made.folders(Case("flf2v-14B", "w8a8_diffusers", {}, HOT))[0][0])
    smooth, rounded = (layer_errors(one, source) for one in (loaded, plain))
    assert len(smooth) == len(rounded) == 24
    assert sum(smooth.values()) < 0.8 * sum(rounded.values()), (smooth, rounded)
    factors = [layer(loaded.stored, of)["_weight_act_pre_scale"] for of in loaded.layers if of.startswith("blocks.")]
    assert len(factors) == 24 and any(bool((factor != 1).any()) for factor in factors)
    outside = [of for of in loaded.layers if not of.startswith("blocks.")]
    assert outside and not any("_weight_act_pre_scale" in layer(loaded.stored, of) for of in outside)


def layer_errors(loaded: Loaded, source: Mapping[str, Tensor]) -> dict[str, float]:
    """Block layer -> its output's distance from the float layer's, on the input that it has in the model."""
    found: dict[str, float] = {}

    def watch(of: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            due = nn.functional.linear(args[0].float(), source[f"{of}.weight"].float(), source[f"{of}.bias"].float())
            found[of] = error(due, output)

        return hook

    inside = [of for of in loaded.layers if of.startswith("blocks.")]
    hooks = [loaded.model.get_submodule(of).register_forward_hook(watch(of)) for of in inside]
    forward(loaded.model, inputs(loaded.config))
    for hook in hooks:
        hook.remove()
    return found


def test_layers_with_one_input_have_one_factor(made: Made) -> None:
    (loaded,) = made("flf2v smooth")
    for i in range(2):
        for group in (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")):
            first, *others = (layer(loaded.stored, f"blocks.{i}.{name}")["_weight_act_pre_scale"] for name in group)
            assert all(torch.equal(first, other) for other in others)


# -- The same as torchao ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t2v w8a16", "t2v fp8", "i2v w8a8", "ti2v w8a8", "vace fp8", "vace w8a8", "experts"])
def test_weights_are_what_torchao_makes_of_the_float_model(made: Made, name: str) -> None:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    (kind,) = CASES[name].types
    config = {
        "w8a16": Int8WeightOnlyConfig(), "w8a8": Int8DynamicActivationInt8WeightConfig(),
        "fp8": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }[kind]  # fmt: skip
    for number, loaded in enumerate(made(name)):
        model = loaded.floats(made.source(name, number), torch.bfloat16)
        for of in loaded.layers:
            parts, linear = layer(loaded.stored, of), model.get_submodule(of)
            weight = linear.weight.detach()
            if kind != "fp8":
                quantize_(linear, config)
                check_parts(linear.weight, parts)
                continue
            # quantize_ looks for a GPU that can multiply e4m3; what it would call does not.
            from torchao.quantization import Float8Tensor

            check_parts(Float8Tensor.from_hp(weight, granularity=PerRow()), parts)


def test_the_configurations_are_torchaos_own(made: Made) -> None:
    """Read by torchao, written by torchao again: the same JSON."""
    from torchao.core.config import config_from_dict, config_to_dict

    for name, due in {
        "t2v w8a16": "Int8WeightOnlyConfig", "i2v w8a8": "Int8DynamicActivationInt8WeightConfig",
        "t2v static": "Int8StaticActivationInt8WeightConfig", "vace mixed": "Int8DynamicActivationInt8WeightConfig",
        "t2v fp8": "Float8DynamicActivationFloat8WeightConfig",
    }.items():  # fmt: skip
        for loaded in made(name):
            given = loaded.config["quantization_config"]
            assert given["quant_method"] == "torchao" and list(given["quant_type"]) == ["default"]
            default = given["quant_type"]["default"]
            assert default["_type"] == due and config_to_dict(config_from_dict(default)) == default


@pytest.mark.parametrize("name", CASES)
def test_the_metadata_is_torchaos_own(made: Made, name: str) -> None:
    """What torchao says of the tensors that it has put together, but for the bound that keeps rows of zeros finite."""
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

    for loaded in made(name):
        for path in sorted(loaded.folder.glob("*.safetensors")):
            found = metadata(path)
            assert found["tensor_names"] == list(loaded.model.state_dict())
            assert found.keys() == {"format", "tensor_names", *found["tensor_names"]}
            for key, parameter in loaded.model.state_dict().items():
                if key.rpartition(".")[0] in loaded.layers and key.endswith(".weight"):
                    assert found[key] == json.loads(json.dumps(parameter, cls=TensorSubclassAttributeJSONEncoder))
                    bound = (found[key]["_data"]["act_quant_kwargs"] or {"_data": {}})["_data"].get("hp_value_lb")
                    fp8 = kind_of(loaded, key.removesuffix(".weight")) == "fp8"
                    assert bound == (1e-12 if fp8 and key in PADDED else None)
                else:
                    assert found[key] == {"_type": "Tensor"}


def test_layers_that_stay_float_are_listed_where_that_is_safe(made: Made) -> None:
    """`blocks.0.ffn.net.2` is part of `vace_blocks.0.ffn.net.2`, `proj_out` of `vace_blocks.0.proj_out`."""
    (loaded,) = made("vace mixed")
    listed = loaded.config["quantization_config"]["modules_to_not_convert"]
    inside = [name for name, module in loaded.model.named_modules() if isinstance(module, nn.Linear)]
    left = {name for name in inside if name not in loaded.layers and "time_embedder" not in name}
    assert {"blocks.0.ffn.net.2", "proj_out"} <= left and "vace_blocks.1.ffn.net.2" in left
    assert set(listed) == left - {"blocks.0.ffn.net.2", "proj_out"}
    for name in left:
        assert type(loaded.model.get_submodule(name).weight) is nn.Parameter
    assert made("vace w8a8")[0].config["quantization_config"]["modules_to_not_convert"] is None
