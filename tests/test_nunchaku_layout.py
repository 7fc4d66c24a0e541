"""The order of Nunchaku's numbers: against another program's files, against the formulas, and back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from nunchaku_kit import FILES, bits, golden
from torch import Tensor

from streamq.savers import nunchaku_layout as layout

SIZES = list(product((128, 256, 384), (128, 192, 384)))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """bf16, hardly two alike."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def codes(rows: int, columns: int, least: int = 0, most: int = 16) -> Tensor:
    chance = torch.Generator().manual_seed(rows + columns)
    return torch.randint(least, most, (rows, columns), generator=chance, dtype=torch.int8)


def micro(rows: int, groups: int) -> Tensor:
    return numbers(rows, groups).abs().to(torch.float8_e4m3fn)


# -- Another program's files -------------------------------------------------------------------------------------------


def pairs_of(name: str) -> dict[str, tuple[Tensor, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """What is packed -> (meant, stored, packer, unpacker)."""
    logical, packed = golden(name)
    meant = logical["codes"].to(torch.int8)
    if FILES[name] == "w4a16":
        return {"codes": (meant, packed["qweight"], layout.pack_awq, layout.unpack_awq)}
    signed, smooth = FILES[name] == "w4a4", logical["smooth"]
    down = (logical["down_smoothed"].double() / smooth.double()).bfloat16()
    scales = (layout.pack_scales, layout.unpack_scales)
    if not signed:
        scales = (layout.pack_micro_scales, layout.unpack_micro_scales)
    vector = (layout.pack_vector, layout.unpack_vector)
    return {
        "codes": (meant, packed["qweight"], layout.pack_qweight, lambda p: layout.unpack_qweight(p, signed=signed)),
        "scales": (logical["scales"], packed["wscales"], *scales),
        "smooth": (smooth, packed["smooth_factor"], *vector),
        "bias": (logical["bias"], packed["bias"], *vector),
        "down": (down, packed["proj_down"], layout.pack_down, layout.unpack_down),
        "up": (logical["up"], packed["proj_up"], layout.pack_up, layout.unpack_up),
    }


@pytest.mark.parametrize("name", FILES)
def test_another_programs_files(name: str) -> None:
    for what, (meant, stored, pack, unpack) in pairs_of(name).items():
        for made, due in ((pack(meant), stored), (unpack(stored), meant)):
            assert (made.dtype, made.shape) == (due.dtype, due.shape), what
            assert bits(made) == bits(due), what


# -- The formulas, an element at a time --------------------------------------------------------------------------------


def grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return n.flatten(), k.flatten()


def scattered(values: Tensor, position: Tensor) -> Tensor:
    """values[i] at position[i]; every position must be met once."""
    assert torch.equal(position.sort().values, torch.arange(values.numel()))
    out = torch.empty_like(values.flatten())
    out[position] = values.flatten()
    return out


def nibbles(packed: Tensor) -> Tensor:
    raw = packed.view(torch.uint8).flatten()
    return torch.stack((raw & 15, raw >> 4), dim=1).flatten()


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_qweight_by_the_formula(rows: int, columns: int) -> None:
    (n, k), given = grid(rows, columns), codes(rows, columns)
    nt, a, ns, low = n // 128, n // 16 % 8, n // 8 % 2, n % 8
    kt, ks, kl, r = k // 64, k // 32 % 2, k // 8 % 4, k % 8
    word = ((((nt * (columns // 64) + kt) * 8 + a) * 8 + low) * 4 + kl) * 4 + 2 * ns + ks
    packed = layout.pack_qweight(given)
    assert packed.shape == (rows, columns // 2) and packed.dtype == torch.int8
    assert torch.equal(nibbles(packed), scattered(given, 8 * word + r).view(torch.uint8))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_awq_by_the_formula(rows: int, columns: int) -> None:
    (n, k), given = grid(rows, columns), codes(rows, columns)
    position = (((((n // 4) * (columns // 64) + k // 64) * 4 + n % 4) * 2 + k // 32 % 2) * 8 + k % 8) * 4 + k // 8 % 4
    packed = layout.pack_awq(given)
    assert packed.shape == (rows // 4, columns // 2) and packed.dtype == torch.int32
    assert torch.equal(nibbles(packed), scattered(given, position).view(torch.uint8))


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("rows", [128, 384])
def test_scales_by_the_formula(rows: int, groups: int) -> None:
    (n, g), given = grid(rows, groups), numbers(rows, groups)
    inside = 16 * (n // 16 % 8) + 4 * (n // 2 % 4) + 2 * (n // 8 % 2) + n % 2
    packed = layout.pack_scales(given)
    assert packed.shape == (groups, rows)
    assert torch.equal(packed.flatten(), scattered(given, (n // 128 * groups + g) * 128 + inside))
    if groups == 1:
        assert torch.equal(layout.pack_vector(given.flatten()), packed.flatten())


@pytest.mark.parametrize("groups", [8, 12])
@pytest.mark.parametrize("rows", [128, 384])
def test_micro_scales_by_the_formula(rows: int, groups: int) -> None:
    (n, g), given = grid(rows, groups), micro(rows, groups)
    place = (n // 128 * (groups // 4) + g // 4) * 128 + 16 * (n % 8) + 4 * (n // 8 % 4) + n // 32 % 4
    packed = layout.pack_micro_scales(given)
    assert packed.shape == (groups, rows) and packed.dtype == torch.float8_e4m3fn
    due = scattered(given.view(torch.uint8), 4 * place + g % 4)
    assert torch.equal(packed.view(torch.uint8).flatten(), due)


@pytest.mark.parametrize("rank", [16, 32, 48])
@pytest.mark.parametrize("size", [128, 384])
def test_low_rank_by_the_formula(size: int, rank: int) -> None:
    for shape, down in (((rank, size), True), ((size, rank), False)):
        (n, k), given = grid(*shape), numbers(*shape)
        inner = ((((n % 8) * 4 + k // 2 % 4) * 2 + n // 8 % 2) * 2 + k // 8 % 2) * 2 + k % 2
        tile = (k // 16) * (rank // 16) + n // 16 if down else (n // 16) * (rank // 16) + k // 16
        packed = (layout.pack_down if down else layout.pack_up)(given)
        assert packed.shape == (size, rank)
        assert torch.equal(packed.flatten(), scattered(given, 256 * tile + inner))


# -- There and back ----------------------------------------------------------------------------------------------------

# Name -> (packer, unpacker, input).
WAYS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[int, int], Tensor]]] = {
    "int4": (layout.pack_qweight, lambda p: layout.unpack_qweight(p, signed=True), lambda n, k: codes(n, k, -8, 8)),
    "nvfp4": (layout.pack_qweight, lambda p: layout.unpack_qweight(p, signed=False), codes),
    "awq": (layout.pack_awq, layout.unpack_awq, codes),
    "scales": (layout.pack_scales, layout.unpack_scales, lambda n, k: numbers(n, k // 64)),
    "micro": (layout.pack_micro_scales, layout.unpack_micro_scales, lambda n, k: micro(n, k // 16)),
    "vector": (layout.pack_vector, layout.unpack_vector, lambda n, _: numbers(n)),
    "down 16": (layout.pack_down, layout.unpack_down, lambda _, k: numbers(16, k)),
    "down 48": (layout.pack_down, layout.unpack_down, lambda _, k: numbers(48, k)),
    "up 32": (layout.pack_up, layout.unpack_up, lambda n, _: numbers(n, 32)),
    "up 48": (layout.pack_up, layout.unpack_up, lambda n, _: numbers(n, 48)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_there_and_back(way: str, rows: int, columns: int) -> None:
    pack, unpack, make = WAYS[way]
    given = make(rows, columns)
    kept = given.clone()
    packed = pack(given)
    back = unpack(packed)
    assert packed.is_contiguous() and back.is_contiguous()
    assert back.dtype == given.dtype and bits(back) == bits(given)
    assert bits(given) == bits(kept), "the input was changed"
    assert len(bits(packed)) * (2 if way in ("int4", "nvfp4", "awq") else 1) == len(bits(given))


def strange(tensor: Tensor) -> Tensor:
    """The same values, every other one of a larger memory, rows and columns swapped, from an odd address on."""
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    room = torch.zeros(2 * raw.numel() + 1, dtype=raw.dtype)
    place = room[1:].view(2, *raw.shape[::-1])[1].T if raw.dim() == 2 else room[1::2]
    return place.copy_(raw).view(tensor.dtype)


@pytest.mark.parametrize("way", WAYS)
def test_memory_layout_of_the_input_is_no_matter(way: str) -> None:
    pack, unpack, make = WAYS[way]
    given = make(256, 384)
    other = strange(given)
    assert not other.is_contiguous() and bits(other) == bits(given)
    packed = pack(given)
    assert bits(pack(other)) == bits(packed)
    if packed.element_size() < 4:  # an int32 is never at an odd address
        odd = torch.zeros(packed.numel() + 1, dtype=packed.dtype)[1:].view(packed.shape).copy_(packed)
        assert bits(unpack(odd)) == bits(given)
    assert bits(unpack(strange(packed))) == bits(given)


@pytest.mark.parametrize("way", ["int4", "nvfp4", "awq"])
def test_slices_give_what_the_whole_gives(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, unpack, make = WAYS[way]
    given = make(640, 128)
    whole = pack(given)
    for size in (1, 300 * 128):  # one tile at a time; two, and the rest
        monkeypatch.setattr(layout, "CODES_AT_A_TIME", size)
        assert bits(pack(given)) == bits(whole) and bits(unpack(whole)) == bits(given)


def test_only_the_low_four_bits_count() -> None:
    given = codes(128, 128, -7, 8)
    for pack in (layout.pack_qweight, layout.pack_awq):
        assert bits(pack(given & 15)) == bits(pack(given)) == bits(pack(given.view(torch.uint8)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: layout.pack_qweight(codes(192, 128)), "192 outputs are no multiple of 128"),
        (lambda: layout.pack_qweight(codes(128, 96)), "96 inputs are no multiple of 64"),
        (lambda: layout.unpack_qweight(codes(192, 64), signed=True), "192 outputs are no multiple of 128"),
        (lambda: layout.unpack_qweight(codes(256, 48), signed=True), "96 inputs are no multiple of 64"),
        (lambda: layout.pack_awq(codes(6, 64)), "6 outputs are no multiple of 4"),
        (lambda: layout.pack_awq(codes(8, 96)), "96 inputs are no multiple of 64"),
        (lambda: layout.unpack_awq(codes(8, 48).int()), "96 inputs are no multiple of 64"),
        (lambda: layout.pack_scales(numbers(64, 2)), "64 outputs are no multiple of 128"),
        (lambda: layout.pack_vector(numbers(192)), "192 outputs are no multiple of 128"),
        (lambda: layout.unpack_vector(numbers(192)), "192 outputs are no multiple of 128"),
        (lambda: layout.pack_micro_scales(micro(128, 6)), "6 groups are no multiple of 4"),
        (lambda: layout.pack_down(numbers(24, 128)), "24 rows of a low-rank factor are no multiple of 16"),
        (lambda: layout.unpack_up(numbers(128, 24)), "24 ranks are no multiple of 16"),
    ],
)
def test_sizes_that_do_not_fit(call: Callable[[], Tensor], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
