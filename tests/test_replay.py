"""Replay of one block at a time: the bits of diffusers' own full forward, for every family, layout and dtype."""

from __future__ import annotations

import gc
import inspect
import json
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
import torch
from conftest import Tiny
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from replay_kit import (
    DATA,
    DTYPES,
    GOLDEN,
    MADE,
    WEIGHTS,
    Case,
    Seen,
    forward,
    golden_case,
    keep,
    made_case,
    open_case,
    pretrained,
    shell_of,
    stored,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamq import wan
from streamq.checkpoint import Source
from streamq.errors import UsageError
from streamq.wan import Model, blocks, names
from streamq.wan.blocks import BlockRunner, Flow, Shared, flow, names_in, parameter_dtype, tensors_of

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]


@pytest.fixture(scope="module", name="cases")
def cases_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    made = {name: made_case(name, tmp_path_factory.mktemp(name)) for name in MADE}
    return made | {name: golden_case(name) for name in GOLDEN}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def same(mine: Tensor, theirs: Tensor) -> bool:
    return mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)


def replay(
    model: Model, streams: dict[str, Tensor], shared: Shared, dtype: torch.dtype, device: str = "cpu"
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every unit and the streams after it; streams go through the disk between blocks, and are dropped by `flow`."""
    runner = BlockRunner(model, dtype, device)
    with closing(Source(model.checkpoint)) as source:
        for unit in model.replay_order:
            runner.fill(unit, tensors_of(source, model, names_in(model, unit), device))
            way = flow(model, unit)
            written = runner.run(unit, {name: streams[name] for name in way.reads}, shared)
            assert tuple(written) == way.writes
            streams = {name: t for name, t in (streams | written).items() if name not in way.drops}
            yield unit, streams
            streams = {name: stored(t) for name, t in streams.items()}
    runner.release()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("name", [*GOLDEN, *MADE])
def test_every_block_has_diffusers_bits(
    cases: dict[str, Case], name: str, layout: str, dtype: str, device: str
) -> None:
    case, kind = cases[name], DTYPES[dtype]
    outputs = []
    for expert in range(len(case.native)):
        seen = forward(case, kind, expert, device)
        model = open_case(case, layout, expert)
        shell = shell_of(model, kind, device)
        streams, shared = shell.stem(**case.inputs)
        check_inputs(case, seen, streams, shared)
        units = model.replay_order
        for i, (unit, after) in enumerate(replay(model, streams, shared, kind, device)):
            if unit.startswith("vace"):
                number = unit.rpartition(".")[2]
                hint, control = seen.returned[unit]
                assert same(after[f"hint.{number}"], hint), unit
                assert "control" not in after or same(after["control"], control), unit
            elif i + 1 < len(units):
                assert same(after["hidden"], seen.received[units[i + 1]][0]), unit
            else:
                assert set(after) == {"hidden"}  # nothing is kept that nobody needs
                assert same(after["hidden"].float(), seen.residual)
        head = shell.head(stored(after["hidden"]), case.inputs["latents"], case.inputs["timestep"])
        assert same(head, seen.output)
        assert bool(seen.output.isfinite().all())
        outputs.append(head)
    assert len(outputs) == 1 or not torch.equal(*outputs)


def check_inputs(case: Case, seen: Seen, streams: dict[str, Tensor], shared: Shared) -> None:
    """The stem makes what the first block gets, strides included."""
    hidden, states, *control, projected, (cos, sin) = seen.received["vace_blocks.0" if case.vace else "blocks.0"]
    mine = [streams["hidden"], shared.encoder_hidden_states, *([streams["control"]] if case.vace else [])]
    mine += [shared.block_timestep_proj(), *shared.rotary_emb]
    for ours, theirs in zip(mine, [hidden, states, *control, projected, cos, sin], strict=True):
        assert same(ours, theirs)
        assert ours.stride() == theirs.stride()
        assert not ours.requires_grad
    assert shared.rotary_emb[0].dtype == torch.float32
    assert (shared.control_scale is not None) == case.vace
    mixed = case.inputs["timestep"].unique().numel() == 2
    assert shared.timestep_proj.shape[0] == (2 if mixed else 1)
    assert (shared.token_row is not None) == mixed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(cases: dict[str, Case], name: str, dtype: str) -> None:
    """What another machine once computed: only near, because kernels differ."""
    if not hasattr(WanRotaryPosEmbed(16, (1, 2, 2), 8), "t_dim"):
        pytest.skip("this diffusers splits the rotary tables of heads of 16 otherwise (of 128 it does not)")
    case, kind, limit = cases[name], DTYPES[dtype], {"fp32": 1e-6, "bf16": 1e-2}[dtype]
    golden = {
        key.removeprefix(f"{dtype}."): t
        for key, t in load_file(DATA / "replay" / name / "replay.safetensors").items()
        if key.startswith(dtype)
    }
    model = open_case(case, "native")
    shell = shell_of(model, kind)
    streams, shared = shell.stem(**case.inputs)
    ours = {
        "hidden_states": streams["hidden"], "encoder_hidden_states": shared.encoder_hidden_states,
        "timestep_proj": shared.block_timestep_proj(), "rope.cos": shared.rotary_emb[0],
        "rope.sin": shared.rotary_emb[1],
    }  # fmt: skip
    if case.vace:
        ours["control"] = streams["control"]
    for unit, after in replay(model, streams, shared, kind):
        for key in after.keys() & {unit.replace("vace_blocks", "hint")}:
            ours[f"{unit}.hint"] = after[key]
        if unit.startswith("blocks") and flow(model, unit).reads == ("hidden",):  # golden's are without the hint
            ours[f"{unit}.out"] = after["hidden"]
        ours["residual"] = after["hidden"]
    ours["out"] = shell.head(ours["residual"], case.inputs["latents"], case.inputs["timestep"])
    hinted = {f"blocks.{i}.out" for i in blocks.vace_layers(model)}
    assert ours.keys() == golden.keys() - hinted
    for key, tensor in ours.items():
        theirs = golden[key].float()
        assert (tensor.float() - theirs).abs().max() <= limit * theirs.abs().max(), key


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*GOLDEN, *MADE])
def test_parameters_have_the_dtypes_of_from_pretrained(cases: dict[str, Case], name: str, dtype: torch.dtype) -> None:
    case = cases[name]
    theirs = {n: p.dtype for n, p in pretrained(case, dtype).named_parameters()}
    assert theirs == {n: parameter_dtype(n, dtype) for n in theirs}
    model = open_case(case, "native")
    assert theirs.keys() == model.tensors.keys()
    runner, mine = BlockRunner(model, dtype, "cpu"), {}
    with closing(Source(model.checkpoint)) as source:
        for unit in model.replay_order:
            module = runner.fill(unit, tensors_of(source, model, names_in(model, unit), "cpu"))
            mine |= {f"{unit}.{n}": p.dtype for n, p in module.named_parameters()}
            assert not any(m.training for m in module.modules())
            assert not any(p.requires_grad for p in module.parameters())
    assert mine == {n: d for n, d in theirs.items() if "blocks." in n}


def test_named_islands() -> None:
    """The ones that a substring rule, or a rule by module, gets wrong."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for name, dtype in {
        "blocks.0.attn1.norm_q.weight": bf16, "blocks.0.attn2.norm_added_k.weight": bf16,
        "condition_embedder.time_proj.weight": bf16, "condition_embedder.image_embedder.pos_embed": bf16,
        "condition_embedder.image_embedder.norm1.weight": fp32, "condition_embedder.image_embedder.norm2.bias": fp32,
        "condition_embedder.time_embedder.linear_1.weight": fp32, "blocks.11.norm2.bias": fp32,
        "blocks.0.scale_shift_table": fp32, "scale_shift_table": fp32, "proj_out.weight": bf16,
    }.items():  # fmt: skip
        assert parameter_dtype(name, bf16) == dtype, name


@pytest.mark.parametrize("mistake", ["none", "norm2", "scale_shift_table", "rope", "hint"])
def test_mistakes_change_bits(cases: dict[str, Case], mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the equality above would not hold if streamq made one of them."""
    case, bf16 = cases["vace-gap"], torch.bfloat16
    model = open_case(case, "native")
    streams, shared = shell_of(model, bf16).stem(**case.inputs)
    if mistake == "rope":
        cos, sin = shared.rotary_emb
        shared = replace(shared, rotary_emb=(cos.bfloat16(), sin.bfloat16()))
    elif mistake == "hint":
        shared = replace(shared, control_scale=torch.ones(2))
    elif mistake != "none":
        monkeypatch.setattr(names, "FP32_PARTS", names.FP32_PARTS - {mistake})
    *_, (_, after) = replay(model, streams, shared, bf16)
    assert torch.equal(after["hidden"].float(), forward(case, bf16).residual) == (mistake == "none")


# -- Tokens with timesteps of their own --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_timestep_for_all_tokens(cases: dict[str, Case], dtype: str) -> None:
    """TI2V without a first frame: [1, 6, D] instead of L equal rows, and the same bits."""
    case, kind = cases["ti2v22"], DTYPES[dtype]
    case = replace(case, inputs=case.inputs | {"timestep": torch.full_like(case.inputs["timestep"], 412.0)})
    model = open_case(case, "diffusers")
    streams, shared = shell_of(model, kind).stem(**case.inputs)
    seen = forward(case, kind)
    assert shared.token_row is None
    assert shared.timestep_proj.shape == (1, 6, 32)
    assert seen.received["blocks.0"][2].shape == (1, 36, 6, 32)
    *_, (_, after) = replay(model, streams, shared, kind)
    assert same(after["hidden"].float(), seen.residual)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_rows_are_told_apart_by_bits(dtype: torch.dtype) -> None:
    length = 2 * blocks._COMPARED + 5
    rows = torch.ones(length, 6, 8, dtype=dtype)
    rows[3::7, 2] = 0.0
    rows[5::11, 2] = -0.0
    rows[length - 2 :, 1] = torch.nan
    rows[-1, 5, 7] += torch.finfo(dtype).eps
    distinct, index = blocks._distinct_rows(rows)
    assert index is not None and index.dtype == torch.uint8
    assert len(distinct) == len(index.unique())
    back = distinct[index.long()]
    as_bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(back.view(as_bits), rows.view(as_bits))
    assert len({row.view(as_bits).numpy().tobytes() for row in distinct}) == len(distinct)
    assert torch.equal(distinct[0], rows[0])


# -- One block at a time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_block_is_alive(cases: dict[str, Case], dtype: str) -> None:
    model = open_case(cases["vace"], "native")
    runner = BlockRunner(model, DTYPES[dtype], "cpu")
    before: list[weakref.ref[Tensor]] = []
    gc.disable()  # nothing may wait for the collector of cycles
    try:
        with closing(Source(model.checkpoint)) as source:
            for unit in model.replay_order:
                tensors = tensors_of(source, model, names_in(model, unit), "cpu")
                shape = tensors[f"{unit}.attn1.to_q.weight"].shape
                runner.release()
                assert [ref() for ref in before if ref() is not None] == []
                module = runner.fill(unit, tensors)
                assert module.get_submodule("attn1.to_q").weight.shape == shape
                assert not any(p.is_meta for p in module.parameters())
                held = {p.data_ptr() for p in module.parameters()}
                for name, tensor in tensors.items():  # the same memory where the dtype is right
                    assert (tensor.data_ptr() in held) == (tensor.dtype == parameter_dtype(name, DTYPES[dtype])), name
                before = [weakref.ref(tensor) for tensor in [*tensors.values(), *module.parameters()]]
                del tensors, tensor
            runner.release()
            assert [ref() for ref in before if ref() is not None] == []
    finally:
        gc.enable()
    assert all(p.is_meta for kind in runner._modules.values() for p in kind.parameters())
    with pytest.raises(AssertionError, match=r"blocks\.0 is to run"):
        runner.run("blocks.0", {}, Shared(*[torch.empty(0)] * 3, (torch.empty(0), torch.empty(0)), None))


def test_hooks_see_diffusers_calls(cases: dict[str, Case]) -> None:
    """What a statistic needs: linears by name, their inputs as positional arguments, one call a forward."""
    case = cases["i2v21"]
    model = open_case(case, "native")
    streams, shared = shell_of(model, torch.float32).stem(**case.inputs)
    runner = BlockRunner(model, torch.float32, "cpu")
    with closing(Source(model.checkpoint)) as source:
        module = runner.fill("blocks.1", tensors_of(source, model, names_in(model, "blocks.1"), "cpu"))
    linears = [linear.name.removeprefix("blocks.1.") for linear in model.linears if linear.name.startswith("blocks.1.")]
    given: dict[str, Any] = {}
    for name in linears:
        module.get_submodule(name).register_forward_pre_hook(keep(given, name))
    with torch.enable_grad():  # run turns gradients off by itself
        written = runner.run("blocks.1", streams, shared)
    assert not written["hidden"].requires_grad
    assert given.keys() == set(linears)
    seen = {name: tensor for name, (tensor,) in given.items()}
    assert seen["attn1.to_q"] is seen["attn1.to_v"]
    assert seen["attn2.to_k"].shape[1] == 512
    assert torch.equal(seen["attn2.add_k_proj"], shared.encoder_hidden_states[:, :257])


def test_flow_of_vace(cases: dict[str, Case]) -> None:
    model = open_case(cases["vace-gap"], "diffusers")
    assert model.replay_order == ["vace_blocks.0", "vace_blocks.1", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert [flow(model, unit) for unit in model.replay_order] == [
        Flow(("hidden", "control"), ("control", "hint.0"), ()),
        Flow(("hidden", "control"), ("hint.1",), ("control",)),
        Flow(("hidden", "hint.0"), ("hidden",), ("hint.0",)),
        Flow(("hidden",), ("hidden",), ()),
        Flow(("hidden", "hint.1"), ("hidden",), ("hint.1",)),
        Flow(("hidden",), ("hidden",), ()),
    ]
    assert flow(open_case(cases["t2v"], "native"), "blocks.0") == Flow(("hidden",), ("hidden",), ())


def test_shared_moves(cases: dict[str, Case]) -> None:
    for name in ("ti2v22", "vace"):
        case = cases[name]
        _, shared = shell_of(open_case(case, "native"), torch.float32).stem(**case.inputs)
        moved = shared.to("meta")
        tensors = [moved.encoder_hidden_states, moved.timestep_proj, *moved.rotary_emb]
        tensors += [t for t in (moved.token_row, moved.control_scale) if t is not None]
        assert len(tensors) == 5
        assert all(t.is_meta for t in tensors)


# -- Configs -----------------------------------------------------------------------------------------------------------


def plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("name", [*GOLDEN, *MADE])
def test_config_is_that_of_from_pretrained(cases: dict[str, Case], name: str, layout: str) -> None:
    module = pretrained(cases[name], torch.float32)
    mine = blocks.diffusers_config(open_case(cases[name], layout))
    assert plain(mine) == plain(dict(module.config))
    assert mine.keys() == inspect.signature(type(module).__init__).parameters.keys() - {"self"}


@pytest.mark.parametrize("family", ["t2v-14B", "vace-14B"])
def test_config_of_a_release(tmp_path: Path, family: str) -> None:
    """diffusers' defaults are the 14B model; VACE layers come from the count where no config tells them."""
    synthetic.write(tmp_path, synthetic.FAMILIES[family], sparse=True)
    kind = WanVACETransformer3DModel if family == "vace-14B" else WanTransformer3DModel
    defaults = {n: p.default for n, p in inspect.signature(kind.__init__).parameters.items() if n != "self"}
    assert plain(blocks.diffusers_config(wan.open_model(tmp_path)[0].model)) == plain(defaults)


def edit(path: Path, change: Any) -> Model:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    return wan.open_model(path)[0].model


def test_models_that_are_not_diffusers(tiny: Tiny) -> None:
    for family in ("s2v-14B", "animate-14B"):
        with pytest.raises(UsageError, match="cannot be calibrated"):
            BlockRunner(wan.open_model(tiny(family))[0].model, torch.float32, "cpu")

    def cut(tensors: dict[str, Tensor]) -> None:
        for i in range(2):
            del tensors[f"blocks.{i}.self_attn.k.bias"]

    with pytest.raises(UsageError, match=r"blocks\.0\.self_attn\.k\.bias is missing"):
        BlockRunner(edit(tiny(), cut), torch.float32, "cpu")

    def widen(tensors: dict[str, Tensor]) -> None:
        for i in range(2):
            tensors[f"blocks.{i}.attn1.gate.weight"] = torch.ones(3)

    with pytest.raises(UsageError, match=r"blocks\.0\.attn1\.gate\.weight in .*: diffusers' Wan has no such tensor"):
        BlockRunner(edit(tiny(layout="diffusers") / "transformer", widen), torch.float32, "cpu")
    more = edit(tiny(), lambda tensors: tensors.update({"ref_conv.weight": torch.ones(3)}))
    with pytest.raises(UsageError, match=r"ref_conv\.weight"):
        shell_of(more, torch.float32)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_heads": 7}, "7 heads"),
        ({"num_heads": 2, "vace_layers": [0]}, "vace_layers"),
        ({"num_heads": 2, "vace_layers": [0, 0]}, "vace_layers"),
        ({"num_heads": 2, "vace_layers": [1, 2]}, "vace_layers"),
        ({"num_heads": 2, "vace_layers": [0, 3]}, "vace_layers"),
        ({"num_heads": 2, "vace_layers": "0,2"}, "vace_layers"),
    ],
)
def test_configs_that_contradict_tensors(tiny: Tiny, config: dict[str, object], says: str) -> None:
    path = tiny("vace-1.3B", blocks=3)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=says):
        blocks.diffusers_config(wan.open_model(path)[0].model)


def test_names_that_a_block_must_have(cases: dict[str, Case]) -> None:
    """diffusers passes over norm_added_q and nothing else."""
    model = open_case(cases["i2v21"], "native")
    runner = BlockRunner(model, torch.bfloat16, "cpu")
    with closing(Source(model.checkpoint)) as source:
        tensors = tensors_of(source, model, names_in(model, "blocks.0"), "cpu")
    runner.fill("blocks.0", tensors | {"blocks.0.attn2.norm_added_q.weight": torch.ones(32)})
    with pytest.raises(AssertionError, match="attn1.more"):
        runner.fill("blocks.0", tensors | {"blocks.0.attn1.more": torch.ones(32)})
    del tensors["blocks.0.attn1.to_q.bias"]
    with pytest.raises(AssertionError, match="to_q.bias"):
        runner.fill("blocks.0", tensors)
    assert runner.unit is None
