"""SVDQuant against a slow reference: full SVDs and tables in fp64, written from the algorithm's description."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from streamq.methods import low_rank, svdquant
from streamq.methods.statistics import InputStatistics, Wanted
from streamq.methods.svdquant import CANDIDATES, InputRows, Options, alternate, options_of, outputs, quantize, search
from streamq.quantized import QuantizedLinear, Rule, Scheme
from streamq.recipe import Pair, QConfig

CPU = torch.device("cpu")
PRECISIONS = ("int4", "nvfp4")
GROUP = {"int4": 64, "nvfp4": 16}
TABLE = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small decompositions: with several threads, most of the time is spent waiting for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scheme(precision: str, method: str = "svdquant", **ext: Any) -> Scheme:
    act, weight = QConfig("per_group", precision), QConfig("per_group", precision, True, method, tuple(ext.items()))
    return Scheme({"int4": "w4a4", "nvfp4": "w4a4_nvfp4"}[precision], Pair(act, weight), Rule())


@dataclass
class Case:
    """A layer with hot input channels, and rows of its input that calibration has not seen."""

    stats: InputStatistics
    weights: list[Tensor]
    others: Tensor

    @property
    def weight(self) -> Tensor:
        return self.weights[0]


def case(width: int = 128, counts: tuple[int, ...] = (160,), rows: int = 96, seed: int = 0, count: int = 256) -> Case:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    scale = torch.ones(width)
    scale[:: width // 7] = torch.linspace(8, 40, len(scale[:: width // 7]))
    falls = torch.arange(1, width + 1) ** -0.7

    def draw(n: int) -> Tensor:
        return ((torch.randn(n, width, generator=generator) * falls) @ mix * scale).bfloat16()

    stats = InputStatistics(width, Wanted(gram=True, rows=rows), 4, CPU)
    for _ in range(4):
        stats.update(draw(count))
    weights = []
    for n in counts:
        side = torch.randn(n, 8, generator=generator) @ torch.randn(8, width, generator=generator) * 0.02
        weights.append(((torch.randn(n, width, generator=generator) * 0.05 + side) / scale.sqrt()).bfloat16())
    return Case(stats, weights, draw(128).float())


# --- the reference ---


def e2m1(x: Tensor) -> Tensor:
    away = (x.abs().unsqueeze(-1) - TABLE.to(x.dtype)).abs()
    # Of two equally near the one with an even code.
    first, last = away.argmin(-1), 7 - away.flip(-1).argmin(-1)
    return TABLE.to(x.dtype)[torch.where(first % 2 == 0, first, last)] * x.sign()


def half(x: Tensor) -> Tensor:
    return x.float().bfloat16().double()


def slow_weight(w: Tensor, precision: str) -> Tensor:
    """What rounding leaves of a residual, fp64."""
    made = torch.empty_like(w)
    whole = float(half(w.abs().max() / 6 / 448)) or 1.0
    for start in range(0, w.shape[1], GROUP[precision]):
        group = w[:, start : start + GROUP[precision]]
        amax = group.abs().amax(1, keepdim=True)
        if precision == "int4":
            s = half(amax / 7)
            s[s == 0] = 1
            q = (group / s).round().clamp(-7, 7)
        else:
            s = (amax / 6 / whole).clamp(max=448).float().to(torch.float8_e4m3fn).double()
            s[s == 0] = 1
            s = s * whole
            q = e2m1(group / s)
        made[:, start : start + GROUP[precision]] = q * s
    return made


def slow_input(x: Tensor, precision: str) -> Tensor:
    """In fp32, as the kernel does it: many a bf16 number lies halfway between two codes but for its rounding."""
    made, top = torch.empty_like(x), 7 if precision == "int4" else 6
    for start in range(0, x.shape[1], GROUP[precision]):
        part = slice(start, start + GROUP[precision])
        group = x[:, part].float().bfloat16().float()
        s = group.abs().amax(1, keepdim=True) * (1 / top)
        q = torch.where(s > 0, group * (1 / s), 0)
        if precision == "int4":
            made[:, part] = q.round().clamp(-8, 7).double() * half(s)
        else:
            made[:, part] = e2m1(q).double() * s.to(torch.float8_e4m3fn).double()
    return made


def slow_factors(m: Tensor, s: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U, D / S) in bf16 numbers."""
    u, sigma, v = torch.linalg.svd(m, full_matrices=False)
    return half(u[:, :rank] * sigma[:rank]), half(v[:rank] / s)


def slow_turn(w: Tensor, q: Tensor | float, x: Tensor, s: Tensor, precision: str, rank: int) -> tuple[float, Tensor]:
    """(squared output error, Q of this turn)."""
    u, d = slow_factors(w * s - q, s, rank)
    made = slow_weight(w * s - u @ (d * s), precision)
    y = slow_input(x / s, precision) @ made.T + half(x @ d.T) @ u.T
    return float((y - x @ w.T).square().sum()), made


def slow_vector(case: Case, a: float, b: float) -> Tensor:
    s = []
    for k in range(len(case.stats.amax)):
        w = max(float(weight[:, k].abs().max()) for weight in case.weights)
        s.append(float(case.stats.amax[k]) ** a / w**b if w or not b else math.inf)
    if not all(map(math.isfinite, s)):
        s = [1.0] * len(s)
    return half(torch.tensor([value or 1.0 for value in s], dtype=torch.float64))


def slow_search(case: Case, rows: Tensor, precision: str, rank: int) -> tuple[tuple[float, float], list[float]]:
    pairs = [(0.0, 0.0)] + [(i / 20, 0.0) for i in range(1, 20)] + [(i / 20, 1 - i / 20) for i in range(1, 20)]
    errors = []
    for a, b in pairs:
        s = slow_vector(case, a, b)
        errors.append(sum(slow_turn(w.double(), 0.0, rows.double(), s, precision, rank)[0] for w in case.weights))
    least = min(errors)
    return [pair for pair, error in zip(pairs, errors, strict=True) if error == least][-1], errors


def slow_alternate(w: Tensor, x: Tensor, s: Tensor, precision: str, rank: int) -> list[float]:
    errors: list[float] = []
    q: Tensor | float = 0.0
    while len(errors) < 100:
        error, q = slow_turn(w.double(), q, x.double(), s.double(), precision, rank)
        errors.append(error)
        if len(errors) > 1 and error > min(errors[:-1]):
            break
    return errors


def output_error(layer: QuantizedLinear, weight: Tensor, x: Tensor) -> float:
    """Relative, of the layer as its runtime computes it."""
    precision = "int4" if layer.scheme.type == "w4a4" else "nvfp4"
    s = torch.ones(weight.shape[1]) if layer.smooth is None else layer.smooth
    y = slow_input(x.double() / s.double(), precision) @ layer.dequantize().double().T
    if layer.low_rank is not None:
        y += half(x.double() @ layer.low_rank.down.double().T) @ layer.low_rank.up.double().T
    exact = x.double() @ weight.double().T
    return float((y - exact).norm() / exact.norm())


# --- the search ---


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rank", [0, 16])
def test_the_search_finds_the_reference_s_exponents(precision: str, rank: int) -> None:
    made = case(counts=(96, 64))
    found = search(made.stats, made.weights, Options(precision, rank), rows=48)
    rows = made.stats.rows[::2]
    choice, errors = slow_search(made, rows, precision, rank)
    first, second = sorted(errors)[:2]
    assert second > 1.002 * first  # else what follows would be chance
    assert found.choice == pytest.approx(choice)
    assert torch.equal(found.s.double(), slow_vector(made, *choice))
    norm = sum(float((rows.double() @ w.double().T).square().sum()) for w in made.weights)
    assert found.error == pytest.approx(first / norm, rel=1e-3)
    assert found.plain == pytest.approx(errors[0] / norm, rel=1e-3) and found.error < 0.5 * found.plain


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_candidate_s_error(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case()
    seen: list[float] = []
    real = svdquant._error

    def error(*args: Any) -> float:
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(svdquant, "_error", error)
    search(made.stats, made.weights, Options(precision, 16))
    assert seen == pytest.approx(slow_search(made, made.stats.rows, precision, 16)[1], rel=1e-3)
    exact = list(seen)
    seen.clear()
    search(made.stats, made.weights, Options(precision, 16, svd="randomised"))
    # Other directions of about the same length, where the spectrum is flat: no candidate gains or loses much by that.
    ratios = [(a / b) ** 0.5 for a, b in zip(seen, exact, strict=True)]
    assert 0.95 < min(ratios) <= max(ratios) < 1.05 and sum(ratios) / len(ratios) == pytest.approx(1, abs=0.01)


def test_a_coarse_grid_tries_every_third_and_around_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tried = case(), []
    errors = {pair: 10 + abs(pair[0] - 0.35) + pair[1] for pair in CANDIDATES}
    vectors = svdquant.candidates(made.stats.amax, svdquant.column_amax(made.weights))

    def error(weight: Tensor, rows: InputRows, *rest: object) -> float:
        tried.append(CANDIDATES[next(i for i, s in enumerate(vectors) if s is rows.smooth)])
        return errors[tried[-1]]

    monkeypatch.setattr(svdquant, "_error", error)
    monkeypatch.setattr(svdquant, "candidates", lambda *args: vectors)
    found = search(made.stats, made.weights, Options("int4"), grid="coarse")
    thirds = [(i / 20, 0.0) for i in range(0, 20, 3)] + [(i / 20, 1 - i / 20) for i in range(1, 20, 3)]
    assert tried == thirds + [(i / 20, 0.0) for i in (4, 5, 7, 8)] and found.choice == (0.35, 0.0)
    errors |= {(0.95, 0.05): 5.0, (0.95, 1 - 0.95): 5.0, (0.9, 1 - 0.9): 6.0}
    tried.clear()
    found = search(made.stats, made.weights, Options("int4"), grid="coarse")
    assert tried[:14] == thirds and sorted(tried[14:]) == [(i / 20, 1 - i / 20) for i in (17, 18)]
    assert found.choice == pytest.approx((0.95, 0.05))
    errors[0.05, 0.95] = 1.0
    tried.clear()
    search(made.stats, made.weights, Options("int4"), grid="coarse")
    assert tried[14:] == [(i / 20, 1 - i / 20) for i in (2, 3)]


def test_of_equals_the_later_and_never_what_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case()
    values = iter([float("nan")] + [5.0] * 11 + [float("nan")] + [5.0] * 11 + [7.0] * 15)
    monkeypatch.setattr(svdquant, "_error", lambda *args: next(values))
    assert search(made.stats, made.weights, Options("int4")).choice == pytest.approx((4 / 20, 16 / 20))


def test_dead_channels_and_dead_columns() -> None:
    x, w = torch.tensor([0.0, 2.0, 4.0]), torch.tensor([1.0, 0.25, 0.5])
    by_pair = dict(zip(CANDIDATES, svdquant.candidates(x, w), strict=True))
    assert len(by_pair) == 39
    assert by_pair[0.5, 0.0].tolist() == [1.0, pytest.approx(2**0.5, rel=2**-8), 2.0]
    assert by_pair[0.5, 0.5].tolist() == [1.0, pytest.approx(8**0.5, rel=2**-8), pytest.approx(8**0.5, rel=2**-8)]
    dead = dict(zip(CANDIDATES, svdquant.candidates(x, torch.tensor([1.0, 0.0, 0.5])), strict=True))
    assert dead[0.5, 0.5].tolist() == [1.0] * 3 and dead[0.5, 0.0].tolist() == by_pair[0.5, 0.0].tolist()
    capped = svdquant.candidates(x, w, lambda s: s.clamp(max=1.3))
    assert all(torch.equal(s, s.bfloat16().float()) and s.max() <= 1.3 for s in capped)


def test_what_a_search_cannot_do_without() -> None:
    made = case()
    with pytest.raises(ValueError, match="needs kept input rows"):
        search(InputStatistics(128, Wanted(), 1, CPU), made.weights, Options("int4"))
    with pytest.raises(ValueError, match="'fine'; have full, coarse"):
        search(made.stats, made.weights, Options("int4"), grid="fine")


# --- the branch ---


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [128, 192])
def test_turns_and_their_errors_are_the_reference_s(precision: str, width: int) -> None:
    made = case(width)
    s = slow_vector(made, 0.6, 0.0).float()
    x = made.stats.rows.float()
    seen = InputRows(x, s, precision)
    _, errors = alternate(made.weight, seen, outputs(made.weight, x), Options(precision, 16))
    slow = slow_alternate(made.weight, x, s, precision, 16)
    assert 4 <= len(slow) < 100 and min(slow) < 0.9 * slow[0]
    # Codes at a tie part the two in time; what they reach is the same.
    assert errors[:4] == pytest.approx(slow[:4], rel=1e-3)
    assert min(errors) == pytest.approx(min(slow), rel=0.01)
    assert errors[-1] >= min(errors[:-1]) and errors[:-1] == sorted(errors[:-1], reverse=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_randomised_factors_lose_no_percent(precision: str) -> None:
    ratios = []
    for seed in range(4):
        made = case(256, (320,), seed=seed)
        x = made.stats.rows.float()
        seen, y = InputRows(x, slow_vector(made, 0.6, 0.0).float(), precision), outputs(made.weight, x)
        found = [min(alternate(made.weight, seen, y, Options(precision, 16, svd=svd))[1]) for svd in low_rank.SVD]
        assert found[0] == found[1]
        ratios.append((found[2] / found[1]) ** 0.5)
    # Each ends in some minimum of its own; neither way finds better ones.
    assert max(ratios) < 1.03 and sum(ratios) / len(ratios) < 1.01


def test_rounds_are_a_limit_and_the_best_turn_is_kept() -> None:
    made = case()
    s, x = slow_vector(made, 0.6, 0.0).float(), made.stats.rows
    found = []
    for rounds in (1, 2, 100):
        layer = quantize(made.weight, None, scheme("int4", rank=16, rounds=rounds), columns=s, stats=made.stats)
        found.append(output_error(layer, made.weight, x))
    assert found[0] > found[1] > found[2]
    seen = InputRows(x.float(), s, "int4")
    y = outputs(made.weight, seen.x)
    _, errors = alternate(made.weight, seen, y, Options("int4", 16))
    assert found[2] == pytest.approx(min(errors) ** 0.5 / float(y.norm()), rel=1e-3)
    assert found[0] == pytest.approx(errors[0] ** 0.5 / float(y.norm()), rel=1e-3)


# --- a layer ---


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("smoothed", [False, True])
def test_without_a_method_it_is_plain_rounding(precision: str, smoothed: bool) -> None:
    made = case()
    bias, out = torch.randn(160).bfloat16(), torch.empty(160, 128, dtype=torch.int8)
    s = slow_vector(made, 0.5, 0.5).float() if smoothed else None
    layer = quantize(made.weight, bias, scheme(precision, "minmax"), out, columns=s)
    w = made.weight.double() * (1.0 if s is None else s.double())
    assert layer.codes is out and layer.bias is bias and layer.smooth is s and layer.low_rank is None
    assert (layer.dequantize().double() - slow_weight(w, precision)).abs().max() < 1e-6
    assert layer.source_dtype == torch.bfloat16 and (layer.tensor_scale is None) == (precision == "int4")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gptq", [False, True])
def test_the_parts_make_the_whole(precision: str, gptq: bool) -> None:
    made = case()
    s = slow_vector(made, 0.6, 0.0).float()
    layer = quantize(made.weight, None, scheme(precision, rank=16, gptq=gptq), columns=s, stats=made.stats)
    assert layer.low_rank is not None
    up, down = layer.low_rank.up, layer.low_rank.down
    assert (up.shape, down.shape, up.dtype, down.dtype) == ((160, 16), (16, 128), torch.bfloat16, torch.bfloat16)
    codes = layer.codes.long()
    assert (codes.min() >= -7 and codes.max() <= 7) if precision == "int4" else (codes.min() >= 0 and codes.max() <= 15)
    values = codes.double() if precision == "int4" else torch.cat([TABLE, -TABLE])[codes]
    scales = layer.scales.double() * (1.0 if layer.tensor_scale is None else layer.tensor_scale.double())
    residual = values * scales.repeat_interleave(GROUP[precision], 1)
    whole = residual / s.double() + up.double() @ down.double()
    assert torch.allclose(layer.effective().double(), whole, atol=1e-6)
    w = made.weight.double()
    assert layer.rel_error == pytest.approx(float((whole - w).norm() / w.norm()), rel=1e-4)
    assert layer.cosine == pytest.approx(float((whole * w).sum() / whole.norm() / w.norm()), abs=1e-6)
    # D is orthonormal but for bf16, and what is rounded is what the stored branch leaves.
    d = down.double() * s.double()
    assert torch.allclose(d @ d.T, torch.eye(16, dtype=torch.float64), atol=0.02)
    left = w * s.double() - up.double() @ d
    if layer.tensor_scale is not None:
        assert float(layer.tensor_scale) == float(half(left.abs().max() / 6 / 448))
    if gptq:
        assert float((residual - left).norm() / left.norm()) < 0.3
    else:
        assert (residual - slow_weight(left, precision)).norm() < 1e-3 * left.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seed", range(3))
def test_each_part_helps_on_inputs_not_seen(precision: str, seed: int) -> None:
    made = case(256, (192,), rows=256, seed=seed, count=1024)
    w = made.weight
    plain, branch = scheme(precision, "minmax"), scheme(precision, rank=16)
    # What calibration sees fixes S, whoever is to be compared.
    s = {rank: search(made.stats, made.weights, Options(precision, rank), grid="coarse", rows=96).s for rank in (0, 16)}
    error = {
        "plain": quantize(w, None, plain),
        "smoothing": quantize(w, None, plain, columns=s[0]),
        "branch": quantize(w, None, branch, stats=made.stats),
        "both": quantize(w, None, branch, columns=s[16], stats=made.stats),
        "gptq": quantize(w, None, scheme(precision, rank=16, gptq=True), columns=s[16], stats=made.stats),
    }
    found = {name: output_error(layer, w, made.others) for name, layer in error.items()}
    assert found["smoothing"] < 0.8 * found["plain"] and found["branch"] < 0.8 * found["plain"]
    assert found["both"] < 0.9 * min(found["smoothing"], found["branch"])
    assert found["gptq"] < 0.95 * found["both"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gptq", [False, True])
def test_a_zero_matrix_and_channels_that_are_never_alive(precision: str, gptq: bool) -> None:
    made = case()
    stats = InputStatistics(128, Wanted(gram=True, rows=64), 1, CPU)
    x = made.others.bfloat16().clone()
    x[:, [0, 17, 127]] = 0
    stats.update(x)
    way = scheme(precision, rank=16, gptq=gptq)
    zero = torch.zeros(160, 128)
    found = search(stats, [zero], options_of(way))
    assert found.s[[0, 17, 127]].tolist() == [1.0] * 3 and (found.error, found.plain) == (0.0, 0.0)
    layer = quantize(zero, None, way, columns=found.s, stats=stats)
    assert not layer.codes.any() and (layer.scales == 1).all() and not layer.effective().any()
    assert (layer.rel_error, layer.cosine) == (0.0, 1.0)
    found = search(stats, made.weights, options_of(way))
    layer = quantize(made.weight, None, way, columns=found.s, stats=stats)
    assert (found.s[[0, 17, 127]] == 1).all() and output_error(layer, made.weight, x.float()) < 0.2
    assert torch.isfinite(layer.effective()).all() and (layer.scales > 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_bytes_twice_and_nearly_in_other_tiles(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case()
    way = scheme(precision, rank=16, gptq=True)

    def go() -> tuple[tuple[float, float], list[Tensor]]:
        found = search(made.stats, made.weights, options_of(way), grid="coarse", rows=40)
        layer = quantize(made.weight, None, way, columns=found.s, stats=made.stats)
        assert layer.low_rank is not None
        return found.choice, [layer.codes, layer.scales, layer.low_rank.up, layer.low_rank.down, layer.effective()]

    choice, parts = go()
    torch.manual_seed(5)
    again, others = go()
    assert choice == again and all(map(torch.equal, parts, others))
    monkeypatch.setattr(low_rank, "CPU_TILE_BYTES", 4 * 128 * 7)
    again, others = go()
    assert choice == again and float((parts[4] - others[4]).norm()) < 0.02 * float(parts[4].norm())
    assert float((parts[0] != others[0]).float().mean()) < 0.05


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gptq_is_given_what_the_branch_leaves_and_the_rounded_input(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = case()
    s = slow_vector(made, 0.6, 0.0)
    plain = quantize(made.weight, None, scheme(precision, rank=16), columns=s.float(), stats=made.stats)
    given: list[tuple[Tensor, ...]] = []
    real = svdquant.gptq

    def spy(*args: Any, **how: Any) -> Any:
        assert how["damping"] == 0.2 and not how["act_order"] and how["group_size"] == GROUP[precision]
        given.append(args)
        return real(*args, **how)

    monkeypatch.setattr(svdquant, "gptq", spy)
    ext: dict[str, Any] = {"rank": 16, "gptq": True, "damping": 0.2, "act_order": False}
    layer = quantize(made.weight, None, scheme(precision, **ext), columns=s.float(), stats=made.stats)
    left, gram, scales = (tensor.double() for tensor in given[0])
    branch = plain.low_rank
    assert branch is not None and torch.equal(layer.scales, plain.scales) and not torch.equal(layer.codes, plain.codes)
    wanted = made.weight.double() * s - branch.up.double() @ (branch.down.double() * s)
    assert torch.allclose(left, wanted, atol=1e-5)
    step = plain.scales.double() * (1.0 if plain.tensor_scale is None else plain.tensor_scale.double())
    assert torch.allclose(scales, step)
    x = made.stats.rows.double() / s
    assert made.stats.gram is not None
    noise = (slow_input(x, precision) - x).square().mean(dim=0)
    gram -= made.stats.gram.double() / s / s.unsqueeze(1)
    assert torch.allclose(gram.diagonal(), made.stats.gram_count * noise, rtol=0.01)
    assert gram.fill_diagonal_(0).abs().max() < 1e-3 * made.stats.gram_count * noise.min()


def test_gptq_that_has_no_factorization_says_so() -> None:
    made = case()
    s = slow_vector(made, 0.6, 0.0).float()
    plain = quantize(made.weight, None, scheme("int4", rank=16), columns=s, stats=made.stats)
    assert made.stats.gram is not None
    made.stats.gram.fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="rounded without GPTQ"):
        layer = quantize(made.weight, None, scheme("int4", rank=16, gptq=True), columns=s, stats=made.stats)
    assert torch.equal(layer.codes, plain.codes)


def test_options_and_what_is_refused() -> None:
    assert options_of(scheme("nvfp4", "minmax")) == Options("nvfp4", 0)
    assert options_of(scheme("int4")) == Options("int4", 32, 100, False, 0.01, True, "auto")
    ext: dict[str, Any] = {"rank": 48, "rounds": 7, "gptq": True, "damping": 0.1, "act_order": False, "svd": "exact"}
    assert options_of(scheme("int4", **ext)) == Options("int4", 48, 7, True, 0.1, False, "exact")
    made = case()
    with pytest.raises(ValueError, match="'mse'; w4a4 has minmax, svdquant"):
        quantize(made.weight, None, scheme("int4", "mse"))
    with pytest.raises(ValueError, match="no division of their rows"):
        quantize(made.weight, None, scheme("int4", "minmax"), rows=torch.ones(160))
    for stats in (None, InputStatistics(128, Wanted(gram=True), 1, CPU)):
        with pytest.raises(ValueError, match="kept rows"):
            quantize(made.weight, None, scheme("int4"), stats=stats)
    few = InputStatistics(128, Wanted(rows=8), 1, CPU)
    few.update(made.others)
    with pytest.raises(ValueError, match="Gram matrix"):
        quantize(made.weight, None, scheme("int4", gptq=True), stats=few)
    with pytest.raises(ValueError, match="no multiple of the group size 64"):
        quantize(torch.randn(64, 96), None, scheme("int4", "minmax"))
    with pytest.raises(ValueError, match="rank 144 of a matrix"):
        quantize(made.weight, None, scheme("int4", rank=144), stats=made.stats)
