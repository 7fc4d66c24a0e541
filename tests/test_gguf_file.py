"""GGUF files byte by byte: headers written and read, zeros between tensors, runs that are killed and taken up again."""

from __future__ import annotations

import hashlib
import random
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import within
from faults import JOURNAL, PARTIAL, Fault, Runs
from gguf_kit import STRING, UINT32, Keys, Stored, Tensors, header, load, pad, store, text
from resume_kit import _TINY as TINY
from resume_kit import MODELS, Works, finish, report, stop, sweep, was_killed

from streamq.errors import UsageError
from streamq.savers import Spec, gguf_file
from streamq.savers.shard import Place, ShardWriter

KEYS = {
    "general.architecture": "wan", "general.quantization_version": "2", "general.file_type": "7", "some.note": "é",
}  # fmt: skip
SPECS = [
    Spec("a.bias", "F32", (3,), "blocks.0"),
    Spec("a.weight", "Q8_0", (3, 64), "blocks.0"),
    Spec("b.weight", "Q4_0", (5, 32), "blocks.0"),
    Spec("patch_embedding.weight", "F32", (2, 3, 1, 2, 2), "rest"),
    Spec("c.weight", "BF16", (3, 7), "rest"),
    Spec("d.weight", "F16", (1, 5), "rest"),
]
# Nothing but ffn.2 is quantized, and most tensors end off a multiple of 32.
MODELS["odd"] = replace(TINY, dim=36, ffn=64, blocks=3, channels_out=1)
GGUF = ("--quant_type", "w8a16", "--format", "gguf")


def contents() -> list[bytes]:
    rng = random.Random(0)
    return [rng.randbytes(spec.nbytes) for spec in SPECS]


def at_once(job: Callable[..., Any], *args: Any) -> Future[Any]:
    done: Future[Any] = Future()
    done.set_result(job(*args))
    return done


def write(writer: ShardWriter, place: Place, data: bytes) -> str:
    writer.begin(place)
    writer.append(memoryview(data), at_once)
    return writer.end()


def theirs(path: Path) -> bytes:
    """The same file, by gguf's own writer."""
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_quantization_version(2)
    writer.add_file_type(7)
    writer.add_string("some.note", "é")
    for spec, data in zip(SPECS, contents(), strict=True):
        kind = gguf.GGMLQuantizationType[spec.dtype]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        array = np.frombuffer(data, np.uint8).reshape(*spec.shape[:-1], spec.shape[-1] // block * size)
        writer.add_tensor(spec.name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_the_streamed_file_is_ggufs(tmp_path: Path) -> None:
    file, places = gguf_file.layout("x/wan.gguf", 3, SPECS, 0o644, KEYS)
    due = theirs(tmp_path / "theirs.gguf")
    assert any(place.nbytes % 32 for place in places[:-1]) and places[-1].nbytes % 32, "zeros between, and at the end"
    assert due.startswith(file.header) and len(due) == file.size
    assert [(place.file, place.dtype, place.shape) for place in places] == [(3, s.dtype, s.shape) for s in SPECS]
    writer = ShardWriter(tmp_path, file)
    writer.create()
    digests = [write(writer, place, data) for place, data in zip(places, contents(), strict=True)]
    writer.sync()
    assert digests == [hashlib.sha256(data).hexdigest() for data in contents()]
    assert writer.publish() == hashlib.sha256(due).hexdigest()
    assert (tmp_path / "x/wan.gguf").read_bytes() == due
    found = gguf_file.read(tmp_path / "x/wan.gguf", tmp_path)
    assert found.file.name == "x/wan.gguf" and found.file.size == len(due)
    assert found.file.header_sha256 == hashlib.sha256(file.header).hexdigest()
    assert [(i.name, i.dtype, i.shape, i.offset, i.nbytes) for i in found.tensors] == [
        (p.name, p.dtype, p.shape, p.offset, p.nbytes) for p in places
    ]
    assert found.metadata == {
        "general.architecture": (STRING, "wan"), "general.quantization_version": (UINT32, 2),
        "general.file_type": (UINT32, 7), "some.note": (STRING, "é"),
    }  # fmt: skip


@pytest.mark.parametrize("done", range(1, len(SPECS) + 1))
def test_taken_up_behind_any_tensor(tmp_path: Path, done: int) -> None:
    """What lies behind the committed tensors may be anything: it is written again, zeros included."""
    file, places = gguf_file.layout("wan.gguf", 0, SPECS, 0o644, KEYS)
    first = ShardWriter(tmp_path, file)
    first.create()
    digests = [write(first, place, data) for place, data in zip(places[:done], contents(), strict=False)]
    first.sync()
    first.close()
    partial = tmp_path / f"wan.gguf{PARTIAL}"
    begun = partial.read_bytes()
    partial.write_bytes(begun[: first.position] + b"\xff" * (file.size - first.position))
    second = ShardWriter(tmp_path, file)
    committed = list(zip(places[:done], digests, strict=True))
    assert second.reopen(committed) is None and second.position == first.position
    for place, data in zip(places[done:], contents()[done:], strict=True):
        write(second, place, data)
    digest = second.publish()
    raw = (tmp_path / "wan.gguf").read_bytes()
    assert raw == theirs(tmp_path / "theirs.gguf") and digest == hashlib.sha256(raw).hexdigest()
    again = ShardWriter(tmp_path, file)  # killed between two files' names
    if done == len(SPECS):
        assert again.reopen(committed) is None and again.publish() == digest
    end = places[done - 1].offset + places[done - 1].nbytes
    if end % 32:
        (tmp_path / "wan.gguf").write_bytes(raw[:end] + b"\1" + raw[end + 1 :])
        problem = ShardWriter(tmp_path, file).reopen(committed)
        assert problem == f"wan.gguf: no zeros behind {places[done - 1].name}"


def test_a_name_twice_and_a_long_one() -> None:
    with pytest.raises(UsageError, match=r"a\.bias: two source tensors would be written under this name"):
        gguf_file.layout("wan.gguf", 0, [*SPECS, SPECS[0]], 0o644, KEYS)
    with pytest.raises(UsageError, match="a name of 128 bytes, GGUF's readers take 127"):
        gguf_file.layout("wan.gguf", 0, [replace(SPECS[0], name="x" * 128)], 0o644, KEYS)


# Runs that end early.


def test_killed_and_taken_up(runs: Runs, works: Works, tmp_path: Path) -> None:
    """Before and after every commit, in the middle of a write, around the rename: the same bytes."""
    work = works("odd", *GGUF, "--read_ahead", 0)
    commits = [n for n, call in enumerate(work.calls, 1) if call == f"fsync {JOURNAL}"]
    assert len(commits) >= 4 and any(call == f"replace wan-Q8_0.gguf{PARTIAL}" for call in work.calls)
    writes = random.Random(1).sample(work.numbers("pwrite"), 5)
    renames = work.numbers("replace", "fchmod")[:3]
    faults = [Fault("before", n) for n in (*commits[1:], *renames)] + [Fault("after", n) for n in commits[1:3]]
    faults += [Fault("half", n) for n in writes]
    problems = sweep(runs, work, tmp_path, faults, was_killed)
    assert not problems, report(problems)


def test_zeros_that_are_none_are_noticed(runs: Runs, works: Works, tmp_path: Path) -> None:
    work = works("odd", *GGUF, "--read_ahead", 0)
    out = stop(runs, work, tmp_path / "out", commits=1)
    partial = out / f"wan-Q8_0.gguf{PARTIAL}"
    shutil.copy(partial, tmp_path / "whole.gguf")
    info = next(i for i in gguf_file.read_header(tmp_path / "whole.gguf", tmp_path)[1] if i.nbytes % 32)
    raw = bytearray(partial.read_bytes())
    raw[info.offset + info.nbytes] = 1
    partial.write_bytes(raw)
    ended = runs(work.argv(out))
    assert ended.status == 2 and f"no zeros behind {info.name}" in ended.err
    assert finish(runs, work, out, "--no_resume") == ""


# Headers that are wrong.

Q = "blocks.0.q.weight"


def sound() -> tuple[Keys, Tensors]:
    keys: Keys = {"general.architecture": (STRING, "wan"), "general.file_type": (UINT32, 7)}
    return keys, {
        Q: Stored("Q8_0", (2, 64), bytes(2 * 68)), "a": Stored("F32", (3,), bytes(12)),
        "b": Stored("BF16", (2, 2), bytes(8)),
    }  # fmt: skip


def lie(name: str, /, **changes: Any) -> Callable[[Keys, Tensors], object]:
    """One entry of the table is changed; bytes stay."""
    return lambda keys, tensors: tensors.update({name: replace(tensors[name], **changes)})


def key(name: str, kind: int, value: Any) -> Callable[[Keys, Tensors], object]:
    return lambda keys, tensors: keys.update({name: (kind, value)})


ARRAY = 9
HUGE = struct.pack("<Q", 1 << 60)
ENTRIES: dict[str, tuple[Callable[[Keys, Tensors], object], str]] = {
    "a type that streamq does not read": (lie(Q, kind="Q4_K"), f"{Q}: ggml's type 12; streamq reads F32 F16 Q4_0"),
    "a type that nobody has": (lie(Q, kind=4711), "ggml's type 4711"),
    "half a block": (lie(Q, shape=(4, 16)), "whole blocks of 32"),
    "blocks of nothing": (lie(Q, shape=()), "whole blocks of 32"),
    "no rows": (lie("a", shape=(0,)), r"a: shape \[0\]"),
    "more than there is": (lie("b", shape=(2, 1 << 50)), r"b: shape \[2, 1125899906842624\]"),
    "too many dimensions": (lie("a", shape=(3,) + (1,) * 16), "17 dimensions, 16 at most"),
    "a larger shape": (lie("b", shape=(200, 2)), "truncated: the header describes 992 data bytes, the file holds 224"),
    "another size in the middle": (lie("a", shape=(13,)), "b overlaps a: it starts at data byte 192, 224 is due"),
    "an offset off the alignment": (lie("b", offset=196), "196, 192 is due .multiples of 32"),
    "two at one place": (lie("b", offset=160), "overlaps"),
    "a gap": (lie("b", offset=256), "is not where it belongs after a: it starts at data byte 256, 192 is due"),
    "an offset beyond the file": (lie("b", offset=1 << 63), "is not where it belongs"),
    "a name twice": (lie("b", name="a"), "a stands twice in the tensor table"),
    "another alignment": (key("general.alignment", UINT32, 64), "is due .multiples of 64"),
    "an alignment that is none": (key("general.alignment", UINT32, 33), "general.alignment 33 of type 4"),
    "an alignment in words": (key("general.alignment", STRING, "32"), "general.alignment '32' of type 8"),
    "a key of no type": (key("x", 99, b""), "'x' has a value of type 99"),
    "a string longer than the file": (key("x", STRING, HUGE), "the value of 'x' takes 1152921504606846976 bytes"),
    "a string that is none": (key("x", STRING, b"\2" + bytes(7) + b"\xff\xfe"), "'x' is not UTF-8"),
    "an array longer than the file": (key("x", ARRAY, struct.pack("<I", 6) + HUGE), "the array 'x' takes"),
    "an array of bytes that never ends": (key("x", ARRAY, struct.pack("<I", 0) + HUGE), "the array 'x' takes"),
    "strings without end": (key("x", ARRAY, struct.pack("<I", STRING) + HUGE), "the array 'x' takes"),
    "an array of arrays": (key("x", ARRAY, struct.pack("<IQ", ARRAY, 1)), "an array of type 9"),
}  # fmt: skip


def refused(path: Path, says: str) -> None:
    with within(2), pytest.raises(UsageError, match=says) as raised:
        gguf_file.read_header(path, path.parent)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_that_lie(tmp_path: Path, name: str) -> None:
    change, says = ENTRIES[name]
    keys, tensors = sound()
    change(keys, tensors)
    store(tmp_path / "x.gguf", keys, tensors)
    refused(tmp_path / "x.gguf", says)


def raw(**how: Any) -> bytes:
    keys, tensors = sound()
    return header(keys, tensors, **how) + b"".join(pad(one.data) for one in tensors.values())


WHOLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "truncated: the magic takes 4 bytes, 0 are left"),
    "something else": (lambda: b"PK\3\4" + bytes(100), "begins with .* GGUF begins with"),
    "an old version": (lambda: raw(version=1), "version 1, streamq reads 2 and 3"),
    "big-endian": (lambda: raw(version=3 << 24), "version 50331648"),
    "tensors without end": (lambda: raw(counts=(1 << 50, 2)), "a header of 1125899906842624 tensors and 2 keys takes"),
    "keys without end": (lambda: raw(counts=(3, 1 << 50)), "3 tensors and 1125899906842624 keys takes"),
    "a tensor more than there is": (lambda: raw(counts=(4, 2)), "a tensor without a name"),
    "a tensor fewer": (lambda: raw(counts=(2, 2)), "trailing bytes"),
    "cut in the data": (lambda: raw()[:-40], "truncated: the header describes"),
    "cut in the header": (lambda: raw()[:90], "truncated: "),
    "bytes behind the end": (lambda: raw() + bytes(32), "trailing bytes: the header describes"),
    "a key twice": (
        lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (text("k") + struct.pack("<II", 4, 1)), "'k' stands twice",
    ),
    "a header of 17 MB": (
        lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", STRING) + text("x" * (17 << 20)),
        "a header of more than 16777216 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLES)
def test_whole_files_that_are_wrong(tmp_path: Path, name: str) -> None:
    make, says = WHOLES[name]
    (tmp_path / "x.gguf").write_bytes(make())
    refused(tmp_path / "x.gguf", says)


def test_no_files(tmp_path: Path) -> None:
    refused(tmp_path / "absent.gguf", "No such file")
    (tmp_path / "x.gguf").mkdir()
    refused(tmp_path / "x.gguf", "not a regular file")


def test_what_is_sound_is_read(tmp_path: Path) -> None:
    """Arrays and numbers of every type among the keys; the last zeros may be missing; version 2."""
    keys, tensors = sound()
    keys |= {"n": (10, 5), "f": (6, 0.5), "s": (ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("")),
             "l": (ARRAY, struct.pack("<IQ3h", 3, 3, 1, 2, 3))}  # fmt: skip
    body = header(keys, tensors, version=2) + b"".join(pad(one.data) for one in tensors.values())
    (tmp_path / "x.gguf").write_bytes(body[: -32 + 8])
    found = gguf_file.read(tmp_path / "x.gguf", tmp_path)
    assert [(i.name, i.dtype, i.shape) for i in found.tensors] == [(n, t.kind, t.shape) for n, t in tensors.items()]
    assert found.metadata["f"] == (6, 0.5) and found.metadata["s"] == found.metadata["l"] == (ARRAY, None)
    store(tmp_path / "y.gguf", *sound())
    assert load(tmp_path / "y.gguf") == sound()


def test_any_damage_is_a_refusal(tmp_path: Path) -> None:
    """Random bytes in a header: read, or refused in one line; never anything else, and never slow."""
    rng, whole, path, refusals = random.Random(0), raw(), tmp_path / "x.gguf", 0
    end = len(header(*sound()))
    with within(20):
        for _ in range(1500):
            damaged = bytearray(whole)
            for _ in range(rng.choice((1, 1, 2, 8))):
                damaged[rng.randrange(end)] = rng.choice((0, 1, 255, rng.randrange(256)))
            path.write_bytes(damaged[: rng.choice((len(whole), rng.randrange(len(whole))))])
            try:
                gguf_file.read_header(path, tmp_path)
            except UsageError:
                refusals += 1
    assert refusals > 1000
