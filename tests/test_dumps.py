"""Dumps of other tools: every structure that they write is read, and nothing of a pickle is ever run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from streamq.calibration.dumps import Call, list_dump, read_dump  # noqa: E402
from streamq.errors import UsageError  # noqa: E402

SHAPE = (16, 3, 4, 6)
TOKENS = 3 * 2 * 3


def native_record(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """What msModelSlim's capture keeps of a call: the arguments bound to forward's signature, with its defaults."""
    import inspect

    bound = inspect.signature(forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return list(bound.args)


def wan21(x: Any, t: Any, context: Any, seq_len: Any, clip_fea: Any = None, y: Any = None) -> None:
    """Wan2.1's WanModel.forward."""


def wan22(x: Any, t: Any, context: Any, seq_len: Any, y: Any = None) -> None:
    """Wan2.2's WanModel.forward."""


def vace(
    x: Any, t: Any, vace_context: Any, context: Any, seq_len: Any, vace_context_scale: float = 1.0,
    clip_fea: Any = None, y: Any = None,
) -> None:  # fmt: skip
    """Wan2.1's VaceWanModel.forward."""


def some(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(*shape).to(dtype)


def read(path: Path) -> list[Call]:
    calls = list(read_dump(path))
    for call in calls:
        for tensor in (call.latents, call.timestep, call.text, call.image, call.control):
            assert tensor is None or (tensor.is_contiguous() and len(tensor) == 1 and type(tensor) is torch.Tensor)
    return calls


def test_msmodelslim_wan21_t2v(tmp_path: Path) -> None:
    x, text = [some(*SHAPE) for _ in range(2)], [some(9, 32, dtype=torch.bfloat16), some(1, 32, dtype=torch.bfloat16)]
    records = [
        native_record(wan21, [x[step]], t=torch.tensor([999 - 20 * step]), context=[text[way]], seq_len=TOKENS)
        for step in range(2) for way in range(2)
    ]  # fmt: skip
    torch.save(records, tmp_path / "calib_data_wan2_1_t2v_.pth")
    calls = read(tmp_path)
    assert [float(call.timestep) for call in calls] == [999, 999, 979, 979]
    for number, call in enumerate(calls):
        assert torch.equal(call.latents[0], x[number // 2]) and torch.equal(call.text[0], text[number % 2])
        assert call.timestep.dtype == torch.float32 and call.text.dtype == torch.bfloat16
        assert call.image is None and call.control is None and call.prompt == ""


@pytest.mark.parametrize(("rows", "tokens"), [(1, 257), (2, 514)])
def test_msmodelslim_wan21_i2v_and_flf2v(tmp_path: Path, rows: int, tokens: int) -> None:
    x, y, clip = some(*SHAPE), some(20, *SHAPE[1:]), some(rows, 257, 64)
    record = native_record(wan21, [x], t=torch.tensor([500]), context=[some(5, 32)], seq_len=18, clip_fea=clip, y=[y])
    torch.save([record], tmp_path / "calib.pth")
    (call,) = read(tmp_path / "calib.pth")
    assert torch.equal(call.latents[0], torch.cat([x, y])) and call.image is not None
    assert torch.equal(call.image, clip.reshape(1, tokens, 64))


def test_msmodelslim_wan22_has_y_where_wan21_has_clip(tmp_path: Path) -> None:
    x, y = some(*SHAPE), some(20, *SHAPE[1:])
    torch.save([native_record(wan22, [x], torch.tensor([7]), [some(5, 32)], 18, [y])], tmp_path / "a.pth")
    (call,) = read(tmp_path / "a.pth")
    assert torch.equal(call.latents[0], torch.cat([x, y])) and call.image is None


def test_msmodelslim_ti2v_has_a_timestep_a_token(tmp_path: Path) -> None:
    times = torch.cat([torch.zeros(6), torch.full((TOKENS - 6 + 4,), 875.0)])[None]  # 4 more than tokens: seq_len
    torch.save([native_record(wan22, [some(48, 3, 4, 6)], times, [some(5, 32)], TOKENS + 4)], tmp_path / "a.pth")
    (call,) = read(tmp_path / "a.pth")
    assert torch.equal(call.timestep, times[:, :TOKENS])


def test_msmodelslim_vace(tmp_path: Path) -> None:
    control = some(96, *SHAPE[1:])
    record = native_record(vace, [some(*SHAPE)], torch.tensor([7]), [control], [some(5, 32)], 18, 0.5)
    torch.save([record], tmp_path / "a.pth")
    (call,) = read(tmp_path / "a.pth")
    assert call.control is not None and torch.equal(call.control[0], control) and call.text.shape == (1, 5, 32)
    assert call.control_scale is not None and call.control_scale.tolist() == [0.5] and call.image is None


def test_msmodelslims_two_experts_hold_the_same_calls_which_come_once(tmp_path: Path) -> None:
    records = [native_record(wan22, [some(*SHAPE)], torch.tensor([t]), [some(5, 32)], 18) for t in (999, 900, 100)]
    for expert in ("high_noise_model", "low_noise_model"):
        torch.save(records, tmp_path / f"calib_data_wan2_2_t2v_{expert}.pth")
    assert len(list_dump(tmp_path)) == 2
    assert [float(call.timestep) for call in read(tmp_path)] == [999, 900, 100]


def cache(batch: int = 1, **kwargs: Any) -> dict[str, Any]:
    """A file of deepcompressor's `caches`: hidden_states taken out of kwargs, all else by name."""
    text, times = some(batch, 7, 32, dtype=torch.bfloat16), torch.full((batch,), 750.0)
    kwargs = {
        "timestep": times,
        "encoder_hidden_states": text,
        "return_dict": False,
        "attention_kwargs": None,
        **kwargs,
    }
    return {
        "input_args": [some(batch, *SHAPE, dtype=torch.bfloat16)], "input_kwargs": kwargs,
        "outputs": (some(batch, *SHAPE),), "filename": "a cat-000", "step": 3, "guidance": 0,
    }  # fmt: skip


def test_deepcompressor(tmp_path: Path) -> None:
    (tmp_path / "caches").mkdir()
    (tmp_path / "samples").mkdir()
    kept = [cache(), cache(encoder_hidden_states_image=some(1, 257, 64)), cache()]
    for step, entry in enumerate(kept):
        torch.save(entry, tmp_path / "caches" / f"a cat-000-{step:05d}-0.pt")
    calls = read(tmp_path)
    assert len(calls) == 3 and {call.prompt for call in calls} == {"a cat-000"}
    for call, entry in zip(calls, kept, strict=True):
        assert torch.equal(call.latents, entry["input_args"][0]) and call.timestep.tolist() == [750.0]
        assert torch.equal(call.text, entry["input_kwargs"]["encoder_hidden_states"])
    assert calls[0].image is None and calls[1].image is not None


def test_a_batch_is_split(tmp_path: Path) -> None:
    entry = cache(2, encoder_hidden_states_image=some(2, 257, 64))
    torch.save(entry, tmp_path / "a.pt")
    calls = read(tmp_path)
    assert len(calls) == 2
    for number, call in enumerate(calls):
        assert torch.equal(call.latents[0], entry["input_args"][0][number])
        assert call.image is not None and call.image.shape == (1, 257, 64)


@pytest.mark.parametrize("form", ["all kwargs", "all args", "one timestep", "scalar", "vace"])
def test_other_forms_of_a_call(tmp_path: Path, form: str) -> None:
    entry = cache(2)
    args, kwargs = entry["input_args"], entry["input_kwargs"]
    if form == "all kwargs":
        kwargs["hidden_states"] = args.pop()
    elif form == "all args":
        args += [kwargs.pop("timestep"), kwargs.pop("encoder_hidden_states")]
    elif form == "one timestep":
        kwargs["timestep"] = torch.tensor([750])
    elif form == "scalar":
        kwargs["timestep"] = 750
    else:
        kwargs |= {"control_hidden_states": some(2, 96, *SHAPE[1:]), "control_hidden_states_scale": torch.ones(8)}
    torch.save(entry, tmp_path / "a.pt")
    calls = read(tmp_path / "a.pt")
    assert [call.timestep.tolist() for call in calls] == [[750.0], [750.0]]
    assert (calls[0].control is not None and calls[0].control_scale is not None) == (form == "vace")


def test_the_neutral_format_with_short_and_long_names(tmp_path: Path) -> None:
    x, y = some(*SHAPE), some(20, *SHAPE[1:])
    tensors = {
        "call1.latents": some(1, 16, 3, 4, 6), "call1.timestep": torch.tensor([2.5]), "call1.text": some(1, 9, 32),
        "call0.x": x, "call0.t": torch.tensor(999), "call0.context": some(4, 32), "call0.y": y,
        "call0.clip_fea": some(257, 64),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    first, second = read(tmp_path / "a.safetensors")
    assert torch.equal(first.latents[0], torch.cat([x, y])) and first.timestep.tolist() == [999.0]
    assert first.image is not None and first.image.shape == (1, 257, 64) and first.prompt == "call0"
    assert torch.equal(second.latents, tensors["call1.latents"]) and second.timestep.tolist() == [2.5]


# --- refused ----------------------------------------------------------------------------------------------------------


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


class Own:
    """A class of somebody's own."""


def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path) -> None:
    done = tmp_path / "done"
    torch.save([Harm(done), cache()], tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"a.pth: holds posix.mkdir, which is code and was not run"):
        read(tmp_path / "a.pth")
    torch.save(cache() | {"extra": Own()}, tmp_path / "b.pt")
    with pytest.raises(UsageError, match=r"b.pt: holds test_dumps.Own, .*tensors, lists, dicts, strings and numbers"):
        read(tmp_path / "b.pt")
    torch.save([Harm(done)], tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "d.pt").write_bytes(pickle.dumps(Harm(done)))
    with zipfile.ZipFile(tmp_path / "e.pt", "w") as archive:
        archive.writestr("e/data.pkl", pickle.dumps(Harm(done), protocol=2))
        archive.writestr("e/version", "3\n")
    for name in ("c.pt", "d.pt", "e.pt"):
        with pytest.raises(UsageError, match=name):
            read(tmp_path / name)
    assert not done.exists()


def test_an_environment_variable_does_not_change_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save([Harm(tmp_path / "done")], tmp_path / "a.pth")
    with pytest.raises(UsageError, match="was not run"):
        read(tmp_path / "a.pth")
    assert not (tmp_path / "done").exists()


def test_a_script_module_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:  # as torch.jit.save lays it out
        archive.writestr("a/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("a/version", "3\n")
    with pytest.raises(UsageError, match=r"a.pt: cannot be read as plain data"):
        read(tmp_path / "a.pt")


X, T, C = some(*SHAPE), torch.tensor([7]), some(5, 32)
BIG = torch.zeros(1).expand(16, 3000, 3000, 3000)
STRANGE: dict[str, tuple[Any, str]] = {
    "block inputs": ([[some(1, 18, 64), some(1, 6, 64)]], "starts with a tensor .*a block's input; what a dump is"),
    "a state dict": ({"a.weight": some(3, 3)}, "no latents and no timestep and no text"),
    "a number": (5, "holds an int, not calls"),
    "an empty list": ([], "holds a list of 0"),
    "tensors": ([X, X], "call 0 is a tensor"),
    "too few": ([[[X], T]], "2 arguments"),
    "no context": ([[[X], T, [X]]], "no context"),
    "no latents": ([[[], T, [C], 18]], "call 0: latents: 0 of them"),
    "flat latents": ([[[some(3, 4)], T, [C], 18]], r"latents is a tensor \[3, 4\] float32, not 4-dimensional"),
    "integers": ([[[torch.ones(SHAPE, dtype=torch.int64)], T, [C], 18]], "not 4-dimensional floats"),
    "batches differ": ([[[X, X], T, [C], 18]], "text: 1 of them for 2 latents"),
    "timesteps differ": ([[[X, X], torch.ones(3), [C, C], 18]], "3 timesteps for 2 latents"),
    "no timestep": ([[[X], "now", [C], 18]], "timestep is a str, not a tensor"),
    "y of another size": ([[[X], T, [C], 18, [some(20, 1, 4, 6)]]], r"y is \[20, 1, 4, 6\], x is"),
    "one that blows up": ([[[BIG], T, [C], 18]], "repeats a smaller tensor"),
    "a sparse one": ([[[X.to_sparse()], T, [C], 18]], "is not a plain tensor"),
    "without storage": ([[[torch.empty(SHAPE, device="meta")], T, [C], 18]], "is not a plain tensor"),
    "kwargs of a list": ({"input_args": [X], "input_kwargs": [T]}, "not a list and a dict"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_data_that_is_no_dump_is_refused(tmp_path: Path, what: str) -> None:
    data, says = STRANGE[what]
    torch.save(data, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=says):
        read(tmp_path / "a.pth")


def test_files_that_are_no_dump_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(cache(), whole)
    for name, content in {"cut.pt": whole.read_bytes()[:-200], "text.pt": b"hello", "empty.pt": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name}: cannot be read as plain data|{name}: written in"):
            read(tmp_path / name)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "none").mkdir()
    for path, says in ((tmp_path / "a.txt", "not a dump"), (tmp_path / "none", "no dump there")):
        with pytest.raises(UsageError, match=says):
            read(path)
    save_file({"model.weight": some(3)}, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="model.weight is not called call0.latents"):
        read(tmp_path / "m.safetensors")
    save_file({"call0.x": some(*SHAPE), "call0.t": torch.ones(1, dtype=torch.bool)}, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="is BOOL"):
        read(tmp_path / "m.safetensors")


def test_one_call_of_a_large_dump_is_in_memory(tmp_path: Path) -> None:
    """40 calls of 8 MB each: what is allocated stays far below the file, which is only mapped."""
    records = [[[some(16, 8, 128, 128)], torch.tensor([t]), [some(5, 32)], 18] for t in range(40)]
    torch.save(records, tmp_path / "a.pth")
    del records

    def allocated() -> int:
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    before, most = allocated(), 0
    for _ in read_dump(tmp_path / "a.pth"):
        most = max(most, allocated())
    assert most - before < (120 << 20) and (tmp_path / "a.pth").stat().st_size > (320 << 20)
