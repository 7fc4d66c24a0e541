"""Triton kernels: torch's bits in Triton's interpreter, what they compile to, and who runs in the end.

No card is needed but where it says so: whether a kernel is fast, and gives the same bits there, a card has to show.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernels_kit
import pytest
import torch
from torch import Tensor

from streamq.device import kernels
from streamq.methods import activation, fourbit, fp8, int4, int8
from streamq.quantized import Rule

KIT = Path(kernels_kit.__file__)
# Where bin/test has put Triton: beside the environment, as torch imports it wherever it finds it.
BESIDE = os.environ.get("STREAMQ_TEST_TRITON", "")
TRITON = list(distributions(name="triton", path=[BESIDE, *sys.path]))
needs_triton = pytest.mark.skipif(not TRITON, reason="no Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
pytestmark = pytest.mark.xdist_group("kernels")  # one process asks the kit for all of them


def kit(*args: object, **env: str) -> dict[str, str]:
    """What kernels_kit prints."""
    own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": BESIDE} | env
    command = [sys.executable, str(KIT), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=own, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- bits ---


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return kit(TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("kernel", ["rows", "tokens", "weight", "inputs", "lost"])
def test_interpreted_it_has_the_bits_of_torch(kernel: str, interpreted: dict[str, str]) -> None:
    cases = {name: wrong for name, wrong in interpreted.items() if name.startswith(kernel + " ")}
    assert len(cases) >= 8
    assert not {name: wrong for name, wrong in cases.items() if wrong}


@needs_triton
@pytest.mark.parametrize(
    "kind", ["w8a8", "fp8", "w4a4", "w4a4_nvfp4", "w4a16", "int8 input", "fp8_e4m3 input", "output"]
)
def test_methods_that_call_it_give_the_same_layer(kind: str, interpreted: dict[str, str]) -> None:
    assert interpreted["every kernel was taken"] == ""
    cases = {name: wrong for name, wrong in interpreted.items() if name.startswith(kind)}
    assert cases
    assert not {name: wrong for name, wrong in cases.items() if wrong}


@needs_triton
def test_compiled_it_divides_exactly_and_joins_nothing(tmp_path: Path) -> None:
    """Of what could change a bit on a card, the part that PTX shows. Of Triton 3.2, whose division flushes, a card's
    trial has to tell."""
    if tuple(map(int, TRITON[0].version.split(".")[:2])) < (3, 3):
        pytest.skip("Triton compiles for a card that is not there in another way")
    found = kit(tmp_path, TRITON_INTERPRET="0")
    assert len(found) == 7
    for name, ptx in found.items():
        operations = set(re.findall(r"\s([a-z]+(?:\.[a-z0-9]+)*\.f32)\b", ptx))
        assert "div.rn.f32" in operations, name
        assert not [op for op in operations if re.search(r"fma|mad|approx|full|ftz|rcp|\.rz\.f32", op)], name


# --- who runs ---


def double(x: Tensor) -> Tensor:
    return x * 2


def timed(**seconds: float) -> Callable[[Callable[[], Any]], float]:
    """A clock by the function's name, or what is called."""

    def clock(call: Any) -> float:
        call()
        return seconds[call.func.__name__]

    return clock


def kernel_of(function: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        return function(*args)

    return kernel


X = torch.arange(-8.0, 8.0).view(4, 4)


@pytest.mark.parametrize(
    ("seconds", "why"), [(0.5, ""), (0.9, ""), (0.92, "not faster than torch"), (3.0, "not faster than torch")]
)
def test_a_kernel_is_taken_if_it_is_faster_by_a_tenth(seconds: float, why: str) -> None:
    clock = timed(double=1.0, kernel=seconds)
    assert kernels.pick("double", double, kernel_of(lambda x: x + x), [[X]], clock) == why


def test_the_median_decides() -> None:
    turns = iter([0.1, 0.1, 5.0, 0.1, 0.1])

    def clock(call: Any) -> float:
        return 1.0 if call.func is double else next(turns)

    assert kernels.pick("double", double, kernel_of(double), [[X]], clock) == ""


def never(call: Any) -> float:
    raise AssertionError("timed")


@pytest.mark.parametrize(
    "kernel",
    [
        lambda x: x * 2 + (x == 3) * 1e-6,
        lambda x: torch.where(x == 0, -0.0, x * 2),
        lambda x: (x * 2).half(),
        lambda x: (x * 2)[1:],
        lambda x: (x * 2, x),
        lambda x: x.mul_(2).clone(),  # the result is right, but the input was not to be touched
    ],
)
def test_other_bits_are_never_taken(kernel: Callable[[Tensor], Any]) -> None:
    before = X.clone()
    assert kernels.pick("double", double, kernel, [[X]], never) == "other bits than torch"
    assert torch.equal(X, before)


def test_every_example_is_compared() -> None:
    hard = kernels.hard([torch.ones(40, 16)])
    assert hard[0].shape == (16, 16) and hard[0].isnan().any() and hard[0].isinf().any()
    saves = kernel_of(lambda x: (x * 2).nan_to_num(0.0, torch.inf, -torch.inf))
    assert kernels.pick("double", double, saves, [[X]], timed(double=1.0, kernel=0.1)) == ""
    assert kernels.pick("double", double, saves, [[X], hard], never) == "other bits than torch"


def test_functions_that_write_to_their_arguments() -> None:
    def reference(x: Tensor, out: Tensor, word: str) -> None:
        out.copy_(x * 2)

    def kernel(x: Tensor, out: Tensor, word: str) -> None:
        out.copy_(x + x)

    def lazy(x: Tensor, out: Tensor, word: str) -> None:
        out[1:].copy_((x + x)[1:])

    out = torch.zeros_like(X)
    clock = timed(reference=1.0, kernel=0.5)
    assert kernels.pick("into", reference, kernel, [[X, out, "word"]], clock) == ""
    assert kernels.pick("into", reference, lazy, [[X, out, "word"]], clock) == "other bits than torch"
    assert not out.any()


def test_any_nan_is_like_another() -> None:
    a = torch.tensor([0x7FC00000, 0x3F800000], dtype=torch.int32).view(torch.float32)
    b = torch.tensor([-1, 0x3F800000], dtype=torch.int32).view(torch.float32)
    assert b.isnan()[0] and kernels.same(a, b)
    assert not kernels.same(a, torch.tensor([1.0, torch.nan]))
    assert not kernels.same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not kernels.same(torch.tensor([1], dtype=torch.int8), torch.tensor([1], dtype=torch.uint8))
    codes = torch.tensor([0x7F, 0x38, 0x00], dtype=torch.uint8)
    for bit, alike in ((torch.tensor([128, 0, 0]), True), (torch.tensor([0, 0, 128]), False)):
        other = (codes | bit).to(torch.uint8)
        assert kernels.same(*(c.view(torch.float8_e4m3fn) for c in (codes, other))) == alike


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Tensors of any size count as a card's; a module of stand-ins in Triton's place. `clock`: to be set."""
    made = SimpleNamespace(KERNELS={}, FAILURES=(RuntimeError,), clock=timed(double=1.0, kernel=0.5), trials=0)

    def clock(device: torch.device) -> Any:
        made.trials += 1
        return made.clock

    monkeypatch.setattr(kernels, "possible", lambda x: True)
    monkeypatch.setattr(kernels, "_module", lambda: made)
    monkeypatch.setattr(kernels, "cuda_clock", clock)
    monkeypatch.setattr(kernels, "_choices", {})
    yield made


def test_the_choice_is_made_once_for_each_type(card: SimpleNamespace) -> None:
    card.KERNELS["double"] = kernel_of(lambda x: x + x)
    for _ in range(3):
        taken = kernels.chosen("double", double, X)
        assert taken is not None and torch.equal(taken(X), X * 2)
    assert card.trials == 1
    assert kernels.chosen("double", double, X.half()) is not None and card.trials == 2
    assert kernels.chosen("double", double, X.view(2, 8)) is not None and card.trials == 3
    card.KERNELS["double"] = kernel_of(lambda x: x)  # what is decided stays
    assert kernels.chosen("double", double, X[:2] + 1) is not None and card.trials == 3


def test_what_a_kernel_is_told_reaches_it(card: SimpleNamespace) -> None:
    def kernel(x: Tensor, *, factor: float, scratch: Tensor) -> Tensor:
        return torch.mul(x, factor, out=scratch[: len(x)])

    def reference(x: Tensor) -> Tensor:
        return torch.mul(x, 2.0, out=scratch[: len(x)])

    scratch = torch.empty(20, 4)
    card.KERNELS["double"], card.clock = kernel, lambda call: 1.0 if call.func is reference else 0.5
    taken = kernels.chosen("double", reference, X, factor=2.0, scratch=scratch)
    assert taken is not None and torch.equal(taken(X), X * 2)
    card.KERNELS["triple"] = kernel  # both write to the same scratch memory, and yet they are told apart
    assert kernels.chosen("triple", reference, X, factor=3.0, scratch=scratch) is None


@pytest.mark.parametrize(
    ("error", "says"),
    [(RuntimeError("no C compiler"), "no C compiler"), (torch.OutOfMemoryError("full"), "no memory for a trial")],
)
def test_what_does_not_compile_leaves_torch(
    error: Exception, says: str, card: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    def kernel(x: Tensor) -> Tensor:
        raise error

    card.KERNELS["double"] = kernel
    with caplog.at_level(logging.INFO, logger="streamq.kernels"):
        assert kernels.chosen("double", double, X) is None
        assert kernels.chosen("double", double, X) is None
    assert len(caplog.records) == 1 and says in caplog.text


def test_other_errors_are_not_hidden(card: SimpleNamespace) -> None:
    def kernel(x: Tensor) -> Tensor:
        raise KeyError("a mistake of ours")

    card.KERNELS["double"] = kernel
    with pytest.raises(KeyError):
        kernels.chosen("double", double, X)


def test_a_slow_kernel_leaves_torch(card: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    card.KERNELS["double"], card.clock = kernel_of(double), timed(double=1.0, kernel=2.0)
    with caplog.at_level(logging.INFO, logger="streamq.kernels"):
        assert kernels.chosen("double", double, X) is None
    assert "not faster" in caplog.text


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    monkeypatch.setattr(kernels, "possible", lambda x: True)
    monkeypatch.setattr(kernels, "_choices", {})
    kernels._module.cache_clear()
    with caplog.at_level(logging.INFO, logger="streamq.kernels"):
        assert kernels.chosen("double", double, X) is None
    assert "no Triton" in caplog.text
    kernels._module.cache_clear()


def test_a_broken_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "streamq.device.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)  # its import fails
    kernels._module.cache_clear()
    with caplog.at_level(logging.INFO, logger="streamq.kernels"):
        assert kernels._module() is None
    assert "does not load" in caplog.text
    kernels._module.cache_clear()


def test_where_a_kernel_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(kind: str, size: int, contiguous: bool = True) -> Any:
        return SimpleNamespace(device=torch.device(kind, 0), numel=lambda: size, is_contiguous=lambda: contiguous)

    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert kernels.possible(on("cuda", kernels.LEAST))
    assert not kernels.possible(on("cuda", kernels.LEAST - 1))
    assert not kernels.possible(on("cuda", kernels.LEAST, contiguous=False))
    assert not any(kernels.possible(on(kind, kernels.LEAST)) for kind in ("cpu", "meta", "xpu"))
    monkeypatch.setenv(kernels.VARIABLE, "0")
    assert not kernels.possible(on("cuda", kernels.LEAST))


def test_nothing_of_triton_is_imported_on_a_cpu() -> None:
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "import kernels_kit as kit; kit.layers()\n"
        "from streamq.generation import linear\n"
        "print([m for m in set(sys.modules) - before if 'triton' in m.split('.')[-1] or m.startswith('triton')])"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env=env | {"PYTHONPATH": str(KIT.parent)})  # fmt: skip
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "rule",
    [
        Rule(),
        Rule(scale_floor=1.0, arithmetic="torchao"),
        Rule(scale_floor=1.0, arithmetic="bf16"),
        Rule(scale_floor=1.0, arithmetic="source", scale_dtype="source"),
    ],
)
def test_arithmetic_that_a_kernel_has_not(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "possible", lambda x: True)
    monkeypatch.setattr(kernels, "chosen", never)
    int8.quantize(torch.ones(3, 8), None, kernels_kit.scheme_of("w8a8", rule))


# --- on a card ---


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_compiled_it_has_the_bits_of_torch_on_the_card() -> None:
    from streamq.device import triton_kernels

    cases = kernels_kit.cases(triton_kernels, "cuda")
    found = {name: kernels_kit.wrong(plain, kernel, args) for name, plain, kernel, args in cases}
    assert len(found) > 100 and not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_a_trial_on_the_card(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it chooses: bits are equal, on the sample and on what is hard to round, and it needs little memory."""
    monkeypatch.setattr(kernels, "_choices", {})
    x = torch.randn(2048, 5120, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    groups, smooth = x.unflatten(1, (80, 64)), x[0].abs().add(1)
    steps = [x[:, :80].abs().add(0.1).unsqueeze(2), x[:, 80:160].round().unsqueeze(2), x[:1].view(1, 80, 64).abs()]
    whole = fourbit.tensor_scale(x.abs().amax(), "nvfp4")
    tries: list[tuple[str, Callable[..., Any], list[Any], dict[str, Any]]] = [
        ("weight", fourbit._round_weight_, [x, "int4", None, 1.0], {}),
        ("weight", fourbit._round_weight_, [x, "nvfp4", whole, 1.0], {}),
        ("lost", int4._lost, [groups, *steps, False], {}),
        ("tokens", activation._int8_tokens, [x], {"e4m3": False, "floor": activation.TOKEN_FLOOR}),
        ("tokens", activation._fp8_tokens, [x], {"e4m3": True, "floor": activation.TOKEN_FLOOR}),
        ("inputs", fourbit._quantize_input, [x.bfloat16(), "int4", torch.bfloat16, smooth, True], {}),
        ("inputs", fourbit._quantize_input, [x, "nvfp4", torch.float16, smooth, False], {}),
    ]
    for name, plain, args, how in tries:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with caplog.at_level(logging.INFO, logger="streamq.kernels"):
            taken = kernels.chosen(name, plain, *args, **how)
        assert torch.cuda.memory_allocated() == before
        assert torch.cuda.max_memory_allocated() - before <= 64 << 20
        if taken is not None:
            mine, its = kernels.copies(args), kernels.copies(args)
            results = zip(kernels._several(plain(*mine)), kernels._several(taken(*its)), strict=True)
            assert kernels.same(mine[0], its[0]) and all(kernels.same(a, b) for a, b in results)
    assert "other bits" not in caplog.text and "fails" not in caplog.text


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("kind", ["w8a8", "fp8"])
def test_a_weight_with_and_without(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = (fp8 if kind == "fp8" else int8).quantize
    weight = torch.randn(1024, 5120, generator=torch.Generator().manual_seed(0)).bfloat16()
    scheme = kernels_kit.scheme_of(kind, kernels_kit.RULES["bf16"])
    made = {}
    for word in ("0", "1"):
        monkeypatch.setenv(kernels.VARIABLE, word)
        made[word] = kernels_kit.parts(quantize(weight.cuda(), None, scheme))
    for name, value in made["0"].items():
        assert kernels.same(value, made["1"][name]) if isinstance(value, Tensor) else value == made["1"][name], name
