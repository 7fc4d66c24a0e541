"""GPTQ against the paper's column-by-column procedure, and int4 groups against loops."""

from __future__ import annotations

import pytest
import torch

from streamq.methods import gptq as gptq_module
from streamq.methods.gptq import gptq
from streamq.methods.int4 import SHRINK, awq4, quantize_groups


def inputs(columns: int = 64, count: int = 400, seed: int = 0, hot: float = 8.0) -> torch.Tensor:
    torch.manual_seed(seed)
    x = torch.randn(count, columns // 2) @ torch.randn(columns // 2, columns) / 6 + 0.3 * torch.randn(count, columns)
    x[:, 5] *= hot
    return x


def row_scales(w: torch.Tensor, qmax: int) -> torch.Tensor:
    return w.abs().amax(dim=1, keepdim=True) / qmax


def plainly(w: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    return (w / scale).round().clamp(qmin, qmax)


def objective(lost: torch.Tensor, gram: torch.Tensor) -> float:
    lost, gram = lost.double(), gram.double()
    return float(torch.trace(lost @ gram @ lost.T))


def by_the_paper(
    w: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, limits: tuple[int, int],
    act_order: bool, damping: float,
) -> torch.Tensor:  # fmt: skip
    """OBQ's update with the order of columns fixed: the inverse of the remaining H anew for each column. fp64."""
    w, gram = w.double().clone(), gram.double()
    columns = w.shape[1]
    h = gram + damping * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    size = columns // scales.shape[1]
    codes = torch.zeros_like(w)
    for at, column in enumerate(order.tolist()):
        remaining = order[at:]
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        s, z = scales[:, column // size].double(), zeros[:, column // size].double()
        codes[:, column] = (w[:, column] / s + z).round().clamp(*limits)
        error = (w[:, column] - (codes[:, column] - z) * s) / inverse[0, 0]
        w[:, remaining] -= error.unsqueeze(1) * inverse[0].unsqueeze(0)
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 16, 24, 128])
@pytest.mark.parametrize("kind", ["rows", "groups"])
def test_codes_are_the_papers(act_order: bool, block: int, kind: str) -> None:
    x = inputs()
    gram = x.T @ x
    w = torch.randn(12, 64) * 0.1
    if kind == "rows":
        scales, zeros, limits, size = row_scales(w, 127), None, (-128, 127), 0
    else:
        groups = w.unflatten(1, (4, 16))
        scales = (groups.amax(2) - groups.amin(2)) / 15
        zeros, limits, size = -groups.amin(2) / scales, (0, 15), 16
    made = gptq(w, gram, scales, zeros, group_size=size, qmin=limits[0], qmax=limits[1], act_order=act_order,
                block=block)  # fmt: skip
    expected = by_the_paper(w, gram, scales, torch.zeros_like(scales) if zeros is None else zeros, limits, act_order,
                            0.01)  # fmt: skip
    assert made.damping == 0.01 and made.codes.dtype == (torch.int8 if zeros is None else torch.uint8)
    assert torch.equal(made.codes.double(), expected)


@pytest.mark.parametrize("qmax", [127, 7])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_output_error_falls_below_plain_rounding(qmax: int, act_order: bool, seed: int) -> None:
    x = inputs(seed=seed)
    gram, w = x.T @ x, torch.randn(24, 64)
    scale = row_scales(w, qmax)
    made = gptq(w, gram, scale, qmin=-qmax, qmax=qmax, act_order=act_order)
    mine = objective(w - made.codes * scale, gram)
    assert mine < 0.9 * objective(w - plainly(w, scale, -qmax, qmax) * scale, gram)
    assert mine == pytest.approx(float(((w - made.codes * scale) @ x.T).double().square().sum()), rel=1e-3)


@pytest.mark.parametrize("act_order", [True, False])
def test_uncorrelated_inputs_leave_plain_rounding(act_order: bool) -> None:
    torch.manual_seed(1)
    w = torch.randn(20, 300)
    scale = row_scales(w, 127)
    for diagonal in (torch.ones(300), torch.rand(300) + 0.1):
        made = gptq(w, torch.diag(diagonal), scale, act_order=act_order)
        assert torch.equal(made.codes.float(), plainly(w, scale, -128, 127))


def test_dead_columns_are_rounded_plainly_and_touch_nothing() -> None:
    x = inputs()
    dead = [0, 17, 63]
    x[:, dead] = 0
    w = torch.randn(8, 64)
    scale, gram = row_scales(w, 7), x.T @ x
    for act_order in (True, False):
        made = gptq(w, gram, scale, qmin=-7, qmax=7, act_order=act_order)
        assert made.damping == 0.01
        assert torch.equal(made.codes[:, dead].float(), plainly(w, scale, -7, 7)[:, dead])
        live = [i for i in range(64) if i not in dead]
        alone = gptq(w[:, live], gram[live][:, live], scale, qmin=-7, qmax=7, act_order=act_order)
        assert torch.equal(made.codes[:, live], alone.codes)
    nothing = gptq(w, torch.zeros(64, 64), scale, qmin=-7, qmax=7)
    assert torch.equal(nothing.codes.float(), plainly(w, scale, -7, 7))


def test_damping_rises_until_it_factorizes_and_no_further_than_five_times() -> None:
    w = torch.randn(6, 32)
    scale = row_scales(w, 127)
    for need, taken in ((-0.5, 0.01), (0.05, 0.1), (5.0, 10.0), (500.0, 1000.0), (999.0, 1000.0), (1001.0, None)):
        # Diagonal 1, least eigenvalue -need: damping has to be above that.
        a = (1 + need) / 31
        made = gptq(w, (1 + a) * torch.eye(32) - a, scale)
        assert made.damping == (None if taken is None else pytest.approx(taken)), need
    hopeless = torch.eye(32) - 2000 * (torch.ones(32, 32) - torch.eye(32))
    made = gptq(w, hopeless, scale)
    assert made.damping is None
    assert torch.equal(made.codes.float(), plainly(w, scale, -128, 127))
    assert gptq(w, torch.full((32, 32), float("nan")), scale).damping is None


def test_rank_deficient_and_hot_channels_still_gain() -> None:
    x = inputs(128, count=40, hot=300.0)
    gram, w = x.T @ x, torch.randn(16, 128)
    scale = row_scales(w, 127)
    made = gptq(w, gram, scale)
    assert made.damping == 0.01
    assert objective(w - made.codes * scale, gram) < 0.5 * objective(w - plainly(w, scale, -128, 127) * scale, gram)


def test_parts_of_rows_and_source_dtypes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    w = torch.randn(30, 64).bfloat16()
    scale = row_scales(w.float(), 127)
    whole = gptq(w.float(), x.T @ x, scale).codes
    monkeypatch.setattr(gptq_module, "PART_BYTES", 4 * 64 * 7)
    assert (gptq(w, x.T @ x, scale).codes != whole).float().mean() < 0.002  # products may group differently
    with pytest.raises(ValueError, match="needs a Gram matrix"):
        gptq(w, torch.eye(63), scale)


# --- grids of the caller's own ---

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GRID = torch.cat((-E2M1.flip(0), E2M1[1:]))


def nearest(q: torch.Tensor) -> torch.Tensor:
    return GRID[(q.unsqueeze(-1) - GRID).abs().argmin(-1)]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_snap_of_whole_numbers_is_plain_gptq(in_place: bool, groups: int) -> None:
    x = inputs()
    w, gram = torch.randn(12, 64), x.T @ x
    parts = w.unflatten(1, (groups, -1))
    scales = (parts.amax(2) - parts.amin(2)) / 15
    zeros = -parts.amin(2) / scales

    def snap(q: torch.Tensor) -> torch.Tensor:
        assert q.dtype == torch.float32 and q.dim() == 1
        return q.round_().clamp_(0, 15) if in_place else q.round().clamp(0, 15)

    for zero in (zeros, None):
        plain = gptq(w, gram, scales, zero, group_size=64 // groups, qmin=0, qmax=15)
        mine = gptq(w, gram, scales, zero, group_size=64 // groups, snap=snap)
        assert plain.codes is not None and mine.values is not None and plain.values is mine.codes is None
        assert mine.values.dtype == torch.float32 and torch.equal(mine.values, plain.codes.float())
        assert mine.damping == plain.damping == 0.01


@pytest.mark.parametrize("act_order", [True, False])
def test_snap_to_e2m1(act_order: bool) -> None:
    x = inputs()
    w, gram = torch.randn(24, 64), x.T @ x
    scales = w.unflatten(1, (4, 16)).abs().amax(2) / 6
    wide = scales.repeat_interleave(16, dim=1)
    made = gptq(w, gram, scales, group_size=16, act_order=act_order, snap=nearest)
    assert made.values is not None and torch.isin(made.values, GRID).all() and made.values.abs().max() == 6
    assert objective(w - made.values * wide, gram) < 0.8 * objective(w - nearest(w / wide) * wide, gram)
    hopeless = gptq(w, torch.full((64, 64), float("nan")), scales, group_size=16, snap=nearest)
    assert hopeless.damping is None and hopeless.values is not None
    assert torch.equal(hopeless.values, nearest(w / wide))


# --- int4 ---


def test_groups_are_a_loops() -> None:
    torch.manual_seed(0)
    w = torch.randn(9, 256) * torch.rand(9, 1)
    w[3, 64:128] = 0
    w[4, 64:128] = -0.75
    made, even = quantize_groups(w), quantize_groups(w, symmetric=True)
    assert made.codes.dtype == torch.uint8 and int(made.codes.max()) == 15
    assert even.codes.dtype == torch.int8 and int(even.codes.min()) == -7
    for i in range(9):
        for g in range(4):
            group = w[i, g * 64 : g * 64 + 64]
            part = slice(g * 64, g * 64 + 64)
            low, high = float(group.min()), float(group.max())
            step = (high - low) / 15
            assert float((made.dequantize()[i, part] - group).abs().max()) <= step / 2 + 1e-6
            if step:
                expected = torch.tensor([round((float(v) - low) / step) for v in group])
                assert (made.codes[i, part] - expected).abs().max() <= 1  # ties aside, 0
                assert (made.codes[i, part] == expected).float().mean() > 0.95
            scale = float(group.abs().max()) / 7
            expected = torch.tensor([round(float(v) / scale) if scale else 0 for v in group])
            assert torch.equal(even.codes[i, part].long(), expected)
    assert torch.equal(made.dequantize()[3, 64:128], torch.zeros(64))
    assert torch.equal(made.dequantize()[4, 64:128], torch.full((64,), -0.75))
    with pytest.raises(ValueError, match="no multiple"):
        quantize_groups(w[:, :100])


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_takes_the_best_of_its_grid(symmetric: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(5, 128) ** 3
    importance = torch.rand(128) * 4
    made = quantize_groups(w, symmetric=symmetric, clip=True, importance=importance)
    lost = ((made.dequantize() - w).square() * importance).unflatten(1, (2, 64)).sum(2)
    gained = 0
    for i in range(5):
        for g in range(2):
            group, weight = w[i, g * 64 : g * 64 + 64], importance[g * 64 : g * 64 + 64]
            tried = []
            for shrink in SHRINK:
                if symmetric:
                    scale = group.abs().max() * shrink / 7
                    value = (group / scale).round().clamp(-7, 7) * scale
                else:
                    middle, half = (group.max() + group.min()) / 2, (group.max() - group.min()) / 2 * shrink
                    scale = 2 * half / 15
                    value = ((group - middle + half) / scale).round().clamp(0, 15) * scale + middle - half
                tried.append(float(((value - group).square() * weight).sum()))
            assert float(lost[i, g]) == pytest.approx(min(tried), rel=1e-3)
            gained += min(tried) < tried[0]
    assert gained >= 3


def test_each_step_lowers_the_output_error() -> None:
    x = inputs(256, 600, hot=30.0)
    x[:, 100:110] *= 10
    w = torch.randn(40, 256)
    gram = x.T @ x

    def error(w_hat: torch.Tensor) -> float:
        return objective(w_hat - w, gram) / objective(w, gram)

    even = error(quantize_groups(w, symmetric=True).dequantize())
    free = error(quantize_groups(w).dequantize())
    clipped = error(quantize_groups(w, clip=True, importance=x.square().mean(0)).dequantize())
    best = quantize_groups(w, clip=True, gram=gram)
    s, scaled = awq4(w, x.abs().mean(0), importance=x.square().mean(0), clip=True)
    smoothed = quantize_groups(w, clip=True, gram=gram / s / s.unsqueeze(1), columns=s)
    assert best.damping == 0.01
    assert free < even and clipped < free and error(best.dequantize()) < 0.5 * clipped
    assert error(scaled.dequantize() / s) < clipped
    assert error(smoothed.dequantize() / s) < 0.5 * clipped


def test_awq_on_even_inputs_changes_little_and_never_does_harm() -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 128)
    mean = torch.ones(128)
    s, made = awq4(w, mean)
    assert torch.equal(s, torch.ones(128))
    assert torch.equal(made.dequantize(), quantize_groups(w).dequantize())
