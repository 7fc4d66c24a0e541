"""Memory while a video is made: a few blocks, whatever the model's number of them, and what a budget lets stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from generate_kit import inputs

from streamq import wan
from streamq.device.cpu import CPU
from streamq.generation.layers import float_weights
from streamq.generation.store import Room
from streamq.generation.transformer import Transformer

BLOCKS = 30
SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "text_dim": 64,
    "freq_dim": 64, "ffn_dim": 1024, "num_layers": BLOCKS,
}  # fmt: skip


class Counting(CPU):
    """A device that knows how many bytes of what it handed out are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0

    def empty(self, nbytes: int) -> torch.Tensor:
        memory = np.empty(nbytes + 64, dtype=np.uint8)
        start = -memory.ctypes.data % 64
        self.alive += nbytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(memory, self._freed, nbytes)
        return torch.from_numpy(memory[start : start + nbytes])

    def _freed(self, nbytes: int) -> None:
        self.alive -= nbytes


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    WanTransformer3DModel(**SIZES).save_pretrained(folder)
    return folder


@pytest.fixture(name="opened")
def opened_fixture(folder: Path) -> Iterator[Any]:
    made = []

    def make(room: int, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Counting]:
        device = Counting()
        made.append(Transformer(float_weights(wan.open_model(folder)[0]), device, Room(room), dtype))
        return made[-1], device

    yield make
    for transformer in made:
        transformer.close()


def test_two_blocks_at_a_time(opened: Any) -> None:
    transformer, device = opened(0)
    store = transformer.store
    block, rest = store.kept_nbytes("blocks.0"), store.kept_nbytes("rest")
    assert device.alive == rest and block > 1_000_000
    for _ in range(2):
        transformer.module(return_dict=False, **inputs(torch.float32))
    assert rest + block < device.peak <= rest + 2 * block
    assert store.source.bytes_read >= 2 * BLOCKS * block
    store.drop()
    assert device.alive == rest


def test_every_tensor_counted(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only what the store hands out: all storages that any tensor in the process holds, at every block."""
    transformer, _ = opened(0)
    block = transformer.store.kept_nbytes("blocks.0")
    before, most = _bytes_in_tensors(), []
    real = Transformer._contents

    def watched(one: Transformer, name: str, tensors: Any) -> Any:
        if int(name.split(".")[1]) % 10 == 9:
            most.append(_bytes_in_tensors() - before)
        return real(one, name, tensors)

    monkeypatch.setattr(Transformer, "_contents", watched)
    given = inputs(torch.float32)
    transformer.module(return_dict=False, **given)
    streams = 4 * 512 * 128 * 4  # text states, and what the blocks hand on
    assert len(most) == BLOCKS // 10 and max(most) <= 2 * block + streams
    assert max(most) >= block


def _bytes_in_tensors() -> int:
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type == "cpu" and one.layout == torch.strided:
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(("room", "dtype"), [(10, torch.float32), (7, torch.bfloat16)])
def test_a_budget_keeps_the_first_blocks(opened: Any, room: int, dtype: torch.dtype) -> None:
    transformer, _ = opened(0, dtype)
    block = transformer.store.kept_nbytes("blocks.0")
    transformer, device = opened(room * block + block // 2, dtype)
    store, given = transformer.store, inputs(dtype)
    due = transformer.module(return_dict=False, **given)[0]
    assert store.resident == (room * block, 0)
    start = store.source.bytes_read
    again = transformer.module(return_dict=False, **given)[0]
    read = store.source.bytes_read - start
    stored = sum(info.nbytes for info in store.weights.units["blocks.0"].infos)
    assert (BLOCKS - room - 1) * stored <= read <= (BLOCKS - room + 1) * stored
    assert torch.equal(due, again)
    assert device.peak <= store.kept_nbytes("rest") + (room + 2) * block + stored


def test_the_same_bits_for_every_budget(opened: Any) -> None:
    outputs = []
    for room in (0, 1 << 22, 1 << 40):
        transformer, _ = opened(room)
        outputs.append(transformer.module(return_dict=False, **inputs(torch.float32))[0])
    with closing(transformer):
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
