"""The ring of memory, the lanes and the writer, each on its own and against simple models of themselves."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from streamq.checkpoint import open_checkpoint
from streamq.device.cpu import CPU, host_bytes
from streamq.errors import UsageError
from streamq.savers import Spec
from streamq.savers.shard import ShardWriter, layout, publish, write_whole
from streamq.stages import Arena, Lane, Team


@given(st.integers(10, 200), st.lists(st.one_of(st.integers(1, 120), st.none()), max_size=60))
def test_arena_regions_never_overlap(size: int, actions: list[int | None]) -> None:
    """A number takes that many bytes (at most the ring's size), None gives the oldest back."""
    arena, live = Arena(CPU(), size), deque[tuple[int, int]]()
    base = arena.memory.data_ptr()
    for action in actions:
        if action is None:
            if live:
                arena.give_back()
                live.popleft()
            continue
        nbytes = min(action, size)
        region = arena.take(nbytes)
        if region is None:
            assert live, "an empty ring has room for anything that fits it"
            continue
        start = region.data_ptr() - base
        assert start >= 0 and start + nbytes <= size and region.numel() == nbytes
        assert all(start + nbytes <= other or end <= start for other, end in live)
        live.append((start, start + nbytes))
    while live:
        arena.give_back()
        live.popleft()
    assert arena.take(size) is not None


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_lane_keeps_order_and_bound(depth: int) -> None:
    lane, seen, gate = Lane(depth, "test"), [], threading.Event()

    def job(number: int) -> None:
        if depth:
            gate.wait(10)
        seen.append(number)

    for number in range(depth):
        lane.submit(job, number)
    threading.Timer(0.05, gate.set).start()
    for number in range(depth, 6):
        lane.submit(job, number)  # waits for the gate once `depth` are outstanding
        assert len(seen) >= number - depth
    lane.drain()
    lane.close()
    assert seen == list(range(6))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_lane_hands_errors_on_and_does_nothing_after(depth: int) -> None:
    """Jobs that are queued when one fails must not be done: they may commit what was not written."""
    lane, done, gate = Lane(depth, "test"), [], threading.Event()

    def fail() -> None:
        gate.wait(10)
        raise ZeroDivisionError

    threading.Timer(0.05, gate.set).start()
    with pytest.raises(ZeroDivisionError):
        lane.submit(fail)
        for number in range(3):
            lane.submit(done.append, number)
        lane.drain()
    lane.close()
    assert done == []


def test_writer_makes_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12, dtype=torch.int8).view(3, 4),
        "b": torch.randn(5, 2, dtype=torch.bfloat16),
        "c": torch.randn(1, 1, 7),
        "d": torch.randn(2, 3).half(),
    }
    words = {torch.int8: "I8", torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
    specs = [Spec(name, words[t.dtype], tuple(t.shape), "rest") for name, t in tensors.items()]
    file, places = layout("x.safetensors", 0, specs, 0o640)
    writer, lane = ShardWriter(tmp_path, file), Lane(0, "hash")
    writer.create()
    assert writer.partial.stat().st_size == file.size and not writer.final.exists()
    for place, tensor in zip(places, tensors.values(), strict=True):
        writer.begin(place)
        for view in CPU().store(tensor, None):
            writer.append(view, lane.start)
        assert writer.end() == hashlib.sha256(host_bytes(tensor)).hexdigest()
    writer.sync()
    assert writer.publish() == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert not writer.partial.exists() and (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    found = open_checkpoint(tmp_path / "x.safetensors")
    assert [info.offset for info in found.tensors.values()] == [place.offset for place in places]


def test_header_is_save_files_for_its_order(tmp_path: Path) -> None:
    """For one dtype and sorted names the file is byte for byte what `save_file` makes."""
    tensors = {f"t{i}": torch.randn(i + 1, 3) for i in range(5)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    file, places = layout("x", 0, [Spec(n, "F32", tuple(t.shape), "") for n, t in tensors.items()], 0o644)
    data = b"".join(bytes(host_bytes(t)) for t in tensors.values())
    assert file.header + data == (tmp_path / "theirs.safetensors").read_bytes()
    assert places[-1].offset + places[-1].nbytes == file.size == len(file.header) + len(data)


def test_publish_refuses_nothing_but_is_whole(tmp_path: Path) -> None:
    digest = write_whole(tmp_path / "deep" / "a.json", b"{}", 0o600)
    assert digest == hashlib.sha256(b"{}").hexdigest()
    assert (tmp_path / "deep" / "a.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "b.partial").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    publish(tmp_path / "b.partial", tmp_path / "b", 0o644)
    assert (tmp_path / "b").read_bytes() == b"new" and not (tmp_path / "b.partial").exists()


def test_sizes_are_parsed_or_refused() -> None:
    from streamq.options import parse_size

    assert [parse_size(text, "--x") for text in ("5GB", "4GiB", "1.5 KiB", "17")] == [5 * 10**9, 4 << 30, 1536, 17]
    for text in ("", "5XB", "-1GB", "0", "1e9", "GB"):
        with pytest.raises(UsageError, match="--x"):
            parse_size(text, "--x")


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x2280])
def test_header_lengths_that_look_like_a_pickle(tmp_path: Path, length: int) -> None:
    """A header of 640 bytes starts a file with 80 02, as a pickle does."""
    name = "x" * (length - len('{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'))
    save_file({name: torch.ones(1)}, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes()[:2] == length.to_bytes(2, "little")
    assert set(open_checkpoint(tmp_path / "x.safetensors").tensors) == {name}


@pytest.mark.parametrize("count", [1, 3])
def test_a_team_gives_results_in_order(count: int) -> None:
    """Though the first job ends last: with one member they are done in turn."""
    team, done = Team(count, "team"), threading.Event()
    if count == 1:
        done.set()

    def first() -> str:
        assert done.wait(10)
        return "first"

    def last() -> str:
        done.set()
        return "last"

    assert team.run([first, lambda: "middle", last]) == ["first", "middle", "last"]
    team.close()


def test_a_teams_error_comes_when_nobody_works_any_more() -> None:
    """The jobs' memory is given to others as soon as `run` returns, however it returns."""
    team, failed, ended = Team(2, "team"), threading.Event(), []

    def fails() -> None:
        failed.set()
        raise ValueError("of the first")

    def slow() -> None:
        assert failed.wait(10)
        threading.Event().wait(0.1)
        ended.append("slow")

    with pytest.raises(ValueError, match="of the first"):
        team.run([fails, slow])
    assert ended == ["slow"]
    team.close()


def test_syncing_beside_a_write_closes_nothing_that_is_unsynced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit's sync runs while the next unit's last bytes arrive: they are not the sync's, so the file stays open."""
    file, places = layout("a.safetensors", 0, [Spec("x", "U8", (4,), "a"), Spec("y", "U8", (4,), "b")], 0o644)
    writer, lane = ShardWriter(tmp_path, file), Lane(0, "hash")
    writer.create()
    writer.begin(places[0])
    writer.append(memoryview(b"1234"), lane.start)
    writer.end()
    plain = os.fdatasync

    def slow_sync(descriptor: int) -> None:
        plain(descriptor)
        if writer.position < file.size:
            writer.begin(places[1])
            writer.append(memoryview(b"5678"), lane.start)
            writer.end()

    monkeypatch.setattr(os, "fdatasync", slow_sync)
    writer.sync()
    assert writer._descriptor >= 0, "closed, though what came meanwhile is not on the disk"
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    writer.sync()
    assert len(synced) == 1 and writer._descriptor < 0
