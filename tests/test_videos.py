"""Video files keep what they shall keep, and the JSON beside them says what it must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_kit import PAIR, clip_of, write_video

from streamq.errors import UsageError
from streamq.videos import (
    PAIR_FIELDS,
    Sidecar,
    find_videos,
    frame_rate,
    pixel_file,
    read_sidecar,
    read_video,
    write_lossless,
    write_lossless_mp4,
    write_mp4,
    write_sidecar,
)


@pytest.fixture(scope="module", name="noise")
def noise_fixture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 34, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize(("write", "name"), [(write_lossless, "a.mkv"), (write_lossless_mp4, "a.mp4")])
def test_lossless_is_lossless(tmp_path: Path, noise: np.ndarray, write: Any, name: str) -> None:
    write(tmp_path / name, noise, 12.5)
    frames, fps = read_video(tmp_path / name)
    assert np.array_equal(frames, noise)
    assert fps == frame_rate(tmp_path / name) == 12.5


def test_mp4_is_for_people(tmp_path: Path, noise: np.ndarray) -> None:
    write_mp4(tmp_path / "a.mp4", noise, 16)
    frames, fps = read_video(tmp_path / "a.mp4")
    assert frames.shape == noise.shape
    assert fps == 16
    assert not np.array_equal(frames, noise)


def test_mp4_keeps_colours_and_takes_odd_sizes(tmp_path: Path) -> None:
    frames = np.zeros((3, 33, 47, 3), np.uint8) + np.array([200, 30, 60], np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, 16)
    found, _ = read_video(tmp_path / "a.mp4")
    assert found.shape == (3, 34, 48, 3)
    assert np.abs(found.astype(int) - [200, 30, 60]).max() <= 3


@pytest.mark.parametrize(("write", "name"), [(write_lossless, "a.mkv"), (write_mp4, "a.mp4")])
def test_same_frames_same_bytes(tmp_path: Path, write: Any, name: str) -> None:
    frames = clip_of(frames=5)
    for folder in ("one", "two"):
        write(tmp_path / folder / name, frames, 16)
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [path.name for path in (tmp_path / "one").iterdir()] == [name]


def test_frames_may_come_one_by_one(tmp_path: Path, noise: np.ndarray) -> None:
    write_lossless(tmp_path / "a.mkv", iter(noise), 16)
    assert np.array_equal(read_video(tmp_path / "a.mkv")[0], noise)


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), "no frame"),
        (np.zeros((1, 8, 8, 3), np.float32), "float32"),
        (np.zeros((1, 8, 8, 4), np.uint8), r"\[8, 8, 4\]"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)], "one size"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, frames: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        write_lossless(tmp_path / "a.mkv", frames, 16)
    assert not (tmp_path / "a.mkv").exists()


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.mkv").write_bytes(b"no video" * 100)
    with pytest.raises(UsageError, match="a.mkv: not a video that can be read"):
        read_video(tmp_path / "a.mkv")


def test_sidecars_come_back_sorted(tmp_path: Path) -> None:
    for seed in (10, 2, 1):
        write_video(tmp_path, clip_of(frames=2), seed=seed)
    (tmp_path / "other.json").write_text("[1]")
    found = find_videos(tmp_path)
    assert [path.name for path, _ in found] == ["0000-seed1.json", "0000-seed10.json", "0000-seed2.json"]
    assert [sidecar.pair["seed"] for _, sidecar in found] == [1, 10, 2]
    assert pixel_file(*found[0]) == tmp_path / "0000-seed1.mkv"
    assert find_videos(tmp_path / "..") == []


def test_every_field_of_a_pair_has_a_kind() -> None:
    assert set(PAIR) == set(PAIR_FIELDS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"streamq_video": 2}, "streamq_video is 2, this streamq reads 1"),
        ({"pair": None}, "pair is missing"),
        ({"made": []}, "made is of type list"),
        ({"pair": {"prompt": "a"}}, "pair lacks negative_prompt, seed"),
        ({"pair": PAIR | {"seed": "1"}}, "pair.seed is of type str"),
        ({"pair": PAIR | {"steps": True}}, "pair.steps is of type bool"),
        ({"pair": PAIR | {"prompt": None}}, "pair.prompt is missing"),
        ({"files": {"mkv": "../a.mkv"}}, "not the name of a file beside it"),
        ({"files": {"mkv": "gone.mkv"}}, "gone.mkv, which it names, is not beside it"),
    ],
)
def test_sidecars_that_are_nonsense(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    document = {"streamq_video": 1, "pair": PAIR, "made": {}, "files": {}} | change
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=says):
        find_videos(tmp_path)


def test_other_json_is_no_sidecar(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UsageError, match="not the JSON of a video"):
        read_sidecar(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        find_videos(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        find_videos(tmp_path / "gone")


def test_sidecar_round_trip(tmp_path: Path) -> None:
    sidecar = Sidecar({**PAIR, "prompt": "Zwölf Boxkämpfer 猫"}, {"torch": "2"}, {})
    write_sidecar(tmp_path / "a.json", sidecar)
    assert read_sidecar(tmp_path / "a.json") == sidecar


def test_without_video_no_torch_and_no_av() -> None:
    code = "import sys, streamq.videos; print([m for m in ('torch', 'av') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
