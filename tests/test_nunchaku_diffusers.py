"""Whole models in the nunchaku format, loaded and run by stock diffusers with `kernels_standin` in the kernels' place.

Not judged here: the CUDA kernels themselves. The reference is diffusers' float model with the source's weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kernels_standin
import pytest
import torch
from nunchaku_runs import SEARCH, SMOOTH, Runs, Step, floats, one_thread, operands, step, svdquant, tensors_in
from torch import Tensor, nn

from streamq.savers import nunchaku

pytest.importorskip("diffusers.quantizers.nunchaku.nunchaku_quantizer", reason="diffusers without nunchaku_lite")


def weights_only(*layers: str) -> dict[str, Any]:
    """An override that makes them w4a16."""
    return {
        "include": list(layers),
        "qconfig": operands("w4a16", "mse") | {"act": {"scope": "per_token", "dtype": "float"}},
    }


FIRST_FLOAT = {"include": ["blocks.0.*"], "qconfig": None}
MIXED = [
    SMOOTH,
    step("w4a4", "svdquant", overrides=[weights_only("*ffn.2", "*cross_attn.v*"), FIRST_FLOAT]),
]
PLAIN = [step("w4a4")]
PART = {"w4a4": 0.55, "w4a4_nvfp4": 0.75}  # of the error of rounding to nearest
SVDQ, AWQ = "SVDQW4A4Linear", "AWQW4A16Linear"


@dataclass(frozen=True)
class Case:
    """A model and a recipe; `svdq` and `awq`: how many layers of each kind an expert has."""

    family: str
    process: list[Step]
    svdq: int = 0
    awq: int = 0
    model: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[object, ...] = ()


CASES = {
    "t2v": Case("t2v-1.3B", svdquant("w4a4", ext={"gptq": True}), 20, model={"hot": True}),
    "t2v searched": Case("t2v-1.3B", [SEARCH, step("w4a4_nvfp4", "svdquant", ext={"rank": 48})], 20),
    "t2v plain": Case("t2v-1.3B", PLAIN, 20, model={"dtype": "fp16"}),
    "i2v": Case("i2v-14B", svdquant("w4a4_nvfp4"), 24, model={"dtype": "bf16", "layout": "diffusers"}),
    "flf2v": Case("flf2v-14B", [step("w4a16", "gptq")], 0, 24),
    "flf2v mixed": Case("flf2v-14B", MIXED, 9, 3, options=("--max_shard_size", "200KB")),
    "ti2v mixed": Case("ti2v-5B", MIXED, 8, 2, model={"layout": "diffusers", "dtype": "bf16"}),
    "experts": Case("t2v-A14B", [SEARCH, step("w4a4", "svdquant")], 10, model={"blocks": 1, "layout": "diffusers"}),
    "vace": Case("vace-1.3B", svdquant("w4a4"), 43),
    "vace mixed": Case("vace-1.3B", [step("w4a4_nvfp4", overrides=[weights_only("*fore_proj")])], 42, 1),
    # Sizes that the SVDQ kernels have no tiles for; 64 outputs go through the operator for vectors.
    "i2v small": Case("i2v-14B", [step("w4a16", "mse")], 0, 24, model={"dim": 64, "ffn": 192}),
}  # fmt: skip


def error(due: Tensor, made: Tensor) -> float:
    return float(torch.linalg.vector_norm(due.double() - made.double()) / torch.linalg.vector_norm(due.double()))


def inputs(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What diffusers' pipelines give: 512 tokens of text, which the image branch counts on.

    VACE: no control, as in a set that was made without a VAE: gray frames, and ones for the mask.
    """
    chance = torch.Generator().manual_seed(11)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance)

    found = {
        "hidden_states": noise(1, config["in_channels"], 2, 8, 8), "timestep": torch.tensor([637]),
        "encoder_hidden_states": noise(1, 512, config["text_dim"]),
    }  # fmt: skip
    if config["image_dim"] is not None:
        count = 1 if config["pos_embed_seq_len"] is None else 2
        found["encoder_hidden_states_image"] = noise(count, 257, config["image_dim"])
    if "vace_layers" in config:
        found["control_hidden_states"] = torch.ones(1, config["vace_in_channels"], 2, 8, 8)
        found["control_hidden_states"][:, :32] = 0
        found["control_hidden_states_scale"] = torch.ones(len(config["vace_layers"]))
    return found


def forward(model: nn.Module, config: Mapping[str, Any], half: bool) -> Tensor:
    given = inputs(config)
    if half:
        given = {name: t.bfloat16() if t.is_floating_point() else t for name, t in given.items()}
    with torch.no_grad():
        return model(**given, return_dict=False)[0].float()


class Loaded:
    """One expert as diffusers has it, and its float model."""

    def __init__(self, folder: Path, source: Path) -> None:
        import diffusers

        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.stored, self.source = tensors_in(folder), floats(source)
        self.kind = getattr(diffusers, self.config["_class_name"])
        with kernels_standin.installed() as self.calls:
            self.model, self.report = self.kind.from_pretrained(
                folder, torch_dtype=torch.bfloat16, output_loading_info=True
            )

    def layer(self, name: str) -> dict[str, Tensor]:
        """A layer's stored tensors, by suffix."""
        return {n.rpartition(".")[2]: t for n, t in self.stored.items() if n.rpartition(".")[0] == name}

    @property
    def packed(self) -> list[str]:
        return [name.removesuffix(".qweight") for name in self.stored if name.endswith(".qweight")]

    def float_model(self, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
        """diffusers' own, with these weights in the place of the source's."""
        model = self.kind.from_config({k: v for k, v in self.config.items() if k != "quantization_config"})
        state = {name: tensor.float() for name, tensor in (self.source | dict(weights)).items()}
        model.load_state_dict(state, strict=True)
        return model.eval().to(dtype)

    def effective(self) -> nn.Module:
        """Every packed layer's weight is the one that it stands for."""
        return self.float_model({f"{n}.weight": nunchaku.decode(self.layer(n))(slice(None)) for n in self.packed})

    def run(self) -> dict[str, tuple[float, float]]:
        """Sets `output`. Packed layer -> errors of its output, without the bias, on the input that it has here.

        Against the float weight, and against the weight that the layer stands for.
        """
        found: dict[str, tuple[float, float]] = {}

        def watch(name: str) -> Callable[..., None]:
            weight, bias = self.source[f"{name}.weight"].float(), self.source[f"{name}.bias"].float()
            near = nunchaku.decode(self.layer(name))(slice(None))

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                x, y = args[0].float(), output.float() - bias
                found[name] = error(x @ weight.T, y), error(x @ near.T, y)

            return hook

        hooks = [self.model.get_submodule(name).register_forward_hook(watch(name)) for name in self.packed]
        self.output = forward(self.model, self.config, half=True)
        for hook in hooks:
            hook.remove()
        return found


Made = Callable[..., list[Loaded]]


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Everything here is small."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A case's experts, loaded; quantized once a module."""
    runs = Runs(tmp_path_factory.mktemp("diffusers"))

    def load(case: Case) -> list[Loaded]:
        model = runs.model(case.family, **case.model)
        out = runs.out(model, case.process, *case.options)
        if case.family.endswith("A14B"):
            return [Loaded(out / name, model / name) for name in ("transformer", "transformer_2")]
        return [Loaded(out, model / "transformer" if case.model.get("layout") == "diffusers" else model)]

    return load


@pytest.mark.parametrize("name", CASES)
def test_stock_diffusers_loads_and_runs(made: Made, name: str) -> None:
    case = CASES[name]
    for expert in made(case):
        check_loaded(expert, case)
        errors = expert.run()
        assert expert.calls["svdq"] == expert.calls["quantize"] == case.svdq
        assert bool(expert.calls["awq"]) == bool(case.awq) and len(errors) == case.svdq + case.awq
        check_layers(expert, errors)
        check_output(expert, plain=case.process == PLAIN, deep=case.family.startswith("vace"))


def check_loaded(expert: Loaded, case: Case) -> None:
    """Every tensor is in its place, and as it is stored."""
    assert not any(expert.report.values()), expert.report
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= expert.report.keys()
    assert not any(tensor.is_meta for tensor in (*expert.model.parameters(), *expert.model.buffers()))
    kinds = {name: type(module).__name__ for name, module in expert.model.named_modules()}
    quantization = expert.config["quantization_config"]
    for kind, section, count in ((SVDQ, "svdq_w4a4", case.svdq), (AWQ, "awq_w4a16", case.awq)):
        targets = [name for name in kinds if kinds[name] == kind]
        assert len(targets) == count
        assert sorted(quantization.get(section, {}).get("targets", [])) == sorted(targets)
    state = expert.model.state_dict()
    assert state.keys() == expert.stored.keys()
    for name, stored in expert.stored.items():
        packed = f"{name.rpartition('.')[0]}.qweight" in expert.stored
        if not packed:  # cast: with this quantizer diffusers keeps nothing in fp32
            stored = stored.bfloat16()
            assert torch.equal(stored, expert.source[name].bfloat16()), name
        assert state[name].dtype == stored.dtype and torch.equal(raw(state[name]), raw(stored)), name


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def check_layers(expert: Loaded, errors: Mapping[str, tuple[float, float]]) -> None:
    """Against the weight that a layer stands for only its input is rounded: AWQ's is not."""
    for name, (due, near) in errors.items():
        kind = type(expert.model.get_submodule(name)).__name__
        assert near < (0.006 if kind == AWQ else 0.35) and due < 0.4, (name, due, near)
    mean = [sum(column) / len(errors) for column in zip(*errors.values(), strict=True)]
    assert mean[0] < 0.2 and mean[1] < 0.15, mean


def check_output(expert: Loaded, *, plain: bool, deep: bool) -> None:
    """Against the float model, and against the float model with the weights that the layers stand for."""
    due, near = (forward(model, expert.config, half=False) for model in (expert.float_model({}), expert.effective()))
    half = error(due, forward(expert.float_model({}, torch.bfloat16), expert.config, half=True))
    from_due, from_near = error(due, expert.output), error(near, expert.output)
    limit = 0.06 * (1 + plain) * (1 + deep)
    assert half < 0.01 and from_due < limit and from_near < limit, (half, from_due, from_near)
    if not expert.calls["svdq"]:  # what is left is bf16's own
        assert from_near < 1.3 * half < from_due


@pytest.mark.parametrize("kind", ["w4a4", "w4a4_nvfp4"])
def test_svdquant_is_worth_it(made: Made, kind: str) -> None:
    """Where some channels are hot, against rounding to nearest in the same format; it costs little to tell."""
    found = []
    for process in (svdquant(kind), [step(kind)]):
        (expert,) = made(Case("t2v-1.3B", process, model={"hot": True}))
        errors = expert.run()
        whole = error(forward(expert.float_model({}), expert.config, half=False), expert.output)
        found.append((sum(due for due, _ in errors.values()) / len(errors), whole))
    (mine, whole), (plain, whole_plain) = found
    assert mine < PART[kind] * plain and whole < PART[kind] * whole_plain, found


def test_the_standin_leaves_nothing_behind(made: Made) -> None:
    (expert,) = made(CASES["t2v plain"])
    assert "kernels" not in sys.modules and kernels_standin.UTILS not in sys.modules
    from diffusers.utils import is_kernels_available

    assert not is_kernels_available()
    with pytest.raises((ImportError, ValueError), match="kernels|NVIDIA"):
        expert.kind.from_pretrained(expert.folder, torch_dtype=torch.bfloat16)


REFUSED = {
    "wide bias": ("bias", lambda t: t.float(), "bias: torch.float32"),
    "scales as meant": ("wscales", lambda t: t.T, "wscales: .* not contiguous|wscales: .* must be"),
    "another rank": ("proj_up", lambda t: t[:, :8].contiguous(), "scales of the branch|proj_up"),
    "unsigned codes": ("qweight", lambda t: t.view(torch.uint8), "qweight: torch.uint8"),
    "no bias": ("bias", lambda t: None, "bias: missing"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_the_standin_is_strict(made: Made, wrong: str) -> None:
    (expert,) = made(CASES["t2v plain"])
    suffix, change, says = REFUSED[wrong]
    layer = expert.model.get_submodule("blocks.0.ffn.net.0.proj")
    before = getattr(layer, suffix)
    made_wrong = change(before.data)
    try:
        setattr(layer, suffix, None if made_wrong is None else nn.Parameter(made_wrong, requires_grad=False))
        with pytest.raises(kernels_standin.Refused, match=says):
            layer(torch.ones(3, 128, dtype=torch.bfloat16))
    finally:
        setattr(layer, suffix, before)
