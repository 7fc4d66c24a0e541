"""Low-rank factors against the SVD in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamq.methods import low_rank
from streamq.methods.low_rank import factors

SHAPES = [(96, 96), (160, 72), (72, 160)]


def heavy(count: int, width: int, seed: int = 0, hot: float = 20.0) -> Tensor:
    """A slowly falling spectrum, and a few columns that stand out."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(count, min(count, width), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(width, min(count, width), generator=generator))[0]
    made = left * torch.arange(1, left.shape[1] + 1) ** -0.5 @ right.T
    made[:, :: width // 5] *= hot
    return made


def least_error(matrix: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt())


def error(matrix: Tensor, up: Tensor, down: Tensor) -> float:
    return float((matrix.double() - up.double() @ down.double()).norm())


def check(up: Tensor, down: Tensor, basis: Tensor, rank: int, shape: tuple[int, ...]) -> None:
    assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1]) and basis.shape[0] == shape[1]
    assert {up.dtype, down.dtype, basis.dtype} == {torch.float32}
    for rows in (down, basis.T):
        assert torch.allclose(rows.double() @ rows.double().T, torch.eye(len(rows), dtype=torch.float64), atol=1e-5)
    lengths = up.double().norm(dim=0)
    assert (lengths[1:] <= lengths[:-1] * (1 + 1e-5) + 1e-6).all()
    lone = up.double() / lengths.clamp_min(1e-6)
    assert torch.allclose(lone.T @ lone, torch.diag((lengths > 1e-5).double()), atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 16, 72])
@pytest.mark.parametrize("scaled", [False, True])
def test_exact_is_the_svd(shape: tuple[int, int], rank: int, scaled: bool) -> None:
    matrix = heavy(*shape).bfloat16()
    columns = torch.linspace(0.1, 9, shape[1]) if scaled else None
    meant = matrix.float() * (1 if columns is None else columns)
    up, down, basis = factors(matrix, rank, columns=columns, svd="exact")
    check(up, down, basis, rank, shape)
    assert error(meant, up, down) == pytest.approx(least_error(meant, rank), rel=1e-5, abs=1e-5)
    assert torch.allclose(up.norm(dim=0), torch.linalg.svdvals(meant)[:rank], rtol=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES, (400, 320)])
@pytest.mark.parametrize("scaled", [False, True])
def test_subspace_iteration_comes_close_and_closer(shape: tuple[int, int], scaled: bool) -> None:
    matrix = heavy(*shape)
    columns = torch.linspace(0.1, 9, shape[1]) if scaled else None
    meant = matrix * (1 if columns is None else columns)
    least = least_error(meant, 16)
    found = []
    for rounds in (1, 2, 4, None):
        up, down, basis = factors(matrix, 16, columns=columns, svd="randomised", rounds=rounds)
        check(up, down, basis, 16, shape)
        assert basis.shape[1] == 24
        found.append(error(meant, up, down))
    assert found == sorted(found, reverse=True) and found[0] > 1.001 * least
    assert least * (1 - 1e-5) <= found[-1] <= 1.002 * least


def test_columns_that_drown_the_others_do_not_cost_them_their_precision() -> None:
    matrix = heavy(300, 320, hot=3000.0)
    up, down, _ = factors(matrix, 16, svd="randomised")
    assert error(matrix, up, down) < 1.002 * least_error(matrix, 16)


def test_a_start_saves_rounds() -> None:
    matrix = heavy(300, 320)
    near = matrix + 0.02 * heavy(300, 320, seed=1)
    basis = factors(matrix, 16, svd="randomised")[2]
    least = least_error(near, 16)
    cold = error(near, *factors(near, 16, svd="randomised", rounds=1)[:2])
    warm = error(near, *factors(near, 16, svd="randomised", start=basis, rounds=1)[:2])
    assert warm - least < 0.1 * (cold - least)
    usual = error(near, *factors(near, 16, svd="randomised", start=basis)[:2])
    twice = error(near, *factors(near, 16, svd="randomised", start=basis, rounds=2)[:2])
    assert usual == twice < 1.005 * least


def test_auto_is_exact_for_small_sides_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 72)
    for shape, svd in (((160, 72), "exact"), ((72, 160), "exact"), ((96, 73), "randomised")):
        matrix = heavy(*shape)
        assert all(map(torch.equal, factors(matrix, 8), factors(matrix, 8, svd=svd)))
    assert not torch.equal(factors(matrix, 8)[0], factors(matrix, 8, svd="exact")[0])


@pytest.mark.parametrize("svd", ["exact", "randomised"])
@pytest.mark.parametrize("shape", SHAPES)
def test_less_rank_than_wanted(svd: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for matrix in (torch.zeros(shape), torch.randn(shape[0], 3) @ torch.randn(3, shape[1])):
        up, down, basis = factors(matrix, 16, svd=svd)
        assert torch.allclose(down @ down.T, torch.eye(16), atol=1e-5)
        assert torch.allclose(up @ down, matrix, atol=1e-4)
        again = factors(matrix, 16, svd=svd, start=basis)
        assert torch.allclose(again[0] @ again[1], matrix, atol=1e-4)


def test_tiles_and_the_generator_of_others_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, columns = heavy(300, 320).bfloat16(), torch.linspace(0.1, 9, 320)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = factors(matrix, 16, columns=columns, svd="randomised")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, factors(matrix, 16, columns=columns, svd="randomised")))
    monkeypatch.setattr(low_rank, "CPU_TILE_BYTES", 4 * 320 * 7)
    assert low_rank.tile_rows(320, matrix.device) == 7
    tiled = factors(matrix, 16, columns=columns, svd="randomised")
    assert torch.allclose(first[0] @ first[1], tiled[0] @ tiled[1], atol=1e-4)


def test_what_cannot_be() -> None:
    for rank in (0, 73):
        with pytest.raises(ValueError, match=f"rank {rank} of a matrix"):
            factors(heavy(160, 72), rank)
    with pytest.raises(ValueError, match="'full'; have auto, exact, randomised"):
        factors(heavy(160, 72), 8, svd="full")
