"""What is a pair and what is not; what a handful of pairs allows to be said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_kit import clip_of, write_video

from streamq.errors import UsageError
from streamq.evaluation.metrics import METRICS
from streamq.evaluation.pairs import check_fields, match, read_folder
from streamq.evaluation.settings import parse_limits, select
from streamq.evaluation.statistics import bootstrap, signed_rank

STILL = clip_of(frames=2)


def folder_of(folder: Path, *videos: dict[str, Any]) -> Path:
    for video in videos:
        write_video(folder, STILL, **video)
    return folder


def pairs_of(tmp_path: Path, one: list[dict[str, Any]], other: list[dict[str, Any]], *allowed: str) -> list[Any]:
    folders = folder_of(tmp_path / "float", *one), folder_of(tmp_path / "int8", *other)
    return match(read_folder(folders[0]), read_folder(folders[1]), allowed)


def test_pairs_go_by_prompt_and_seed_not_by_name(tmp_path: Path) -> None:
    one = [{"index": 0, "prompt": "a"}, {"index": 1, "prompt": "b"}]
    other = [{"index": 0, "prompt": "b"}, {"index": 1, "prompt": "a"}]
    found = pairs_of(tmp_path, one, other)
    assert [(a.stem, b.stem) for a, b in found] == [("0000-seed0", "0001-seed0"), ("0001-seed0", "0000-seed0")]


@pytest.mark.parametrize(
    ("field", "value"),
    [("negative_prompt", "blurry"), ("steps", 5), ("guidance", 3.5), ("shift", 5.0), ("scheduler", "Euler"),
     ("compute_dtype", "bfloat16"), ("text_encoder", "cc"), ("vae", None), ("boundary", 0.9), ("fps", 24),
     ("device_kind", "npu"), ("guidance_2", 1.0), ("image_encoder", "dd")],
)  # fmt: skip
def test_a_field_that_differs_is_named_with_both_values(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"int8/0000-seed0.json: {field} is {value!r}, of its pair .*--allow_mismatch"):
        pairs_of(tmp_path, [{}], [{field: value}])
    videos = read_folder(tmp_path / "float"), read_folder(tmp_path / "int8")
    assert len(match(*videos, [field])) == 1


def test_size_and_length_count(tmp_path: Path) -> None:
    folder_of(tmp_path / "float", {})
    write_video(tmp_path / "int8", clip_of(frames=3))
    videos = read_folder(tmp_path / "float"), read_folder(tmp_path / "int8")
    with pytest.raises(UsageError, match="frame_num is 3, of its pair .* it is 2"):
        match(*videos, [])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ([{"prompt": "b"}], "prompt is 'a', of its pair .* it is 'b'"),
        ([{"prompt": "a", "seed": 1}], "float/0000-seed0.json: unpaired; .*int8 has no video of prompt 'a' and seed 0"),
        ([{"prompt": "a"}, {"prompt": "a", "seed": 1}], "0000-seed1.json: unpaired; .*float has no video"),
        ([{"prompt": "a"}, {"prompt": "a", "index": 1}], "0001-seed0.json: the same prompt and seed as 0000-seed0"),
    ],
)
def test_unpaired_and_swapped_videos_are_refused(tmp_path: Path, other: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        pairs_of(tmp_path, [{"prompt": "a"}], other)


def test_prompts_may_differ_where_allowed_then_names_count(tmp_path: Path) -> None:
    found = pairs_of(tmp_path, [{"prompt": "a"}], [{"prompt": "b"}], "prompt")
    assert [(a.stem, b.stem) for a, b in found] == [("0000-seed0", "0000-seed0")]


def test_folders_without_videos_and_unknown_fields(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no video with its JSON in it"):
        read_folder(tmp_path)
    with pytest.raises(UsageError, match="--allow_mismatch step: not a field of a pair; .*nearest: steps"):
        check_fields(["step"])


# --- which metrics ----------------------------------------------------------------------------------------------------

NONE = dict.fromkeys(("clip_model", "dino_model", "lpips_model"))


def test_all_leaves_out_what_has_no_model_and_says_so() -> None:
    metrics, notes = select("all", NONE)
    assert set(METRICS) - set(metrics) == {m for m, about in METRICS.items() if about.needs}
    assert notes == [
        "lpips left out: no --lpips_model",
        "clip_t, clip_score, clip_f, background_consistency left out: no --clip_model",
        "subject_consistency left out: no --dino_model",
    ]
    assert select("all", {**NONE, "clip_model": "x"})[1] == [notes[0], notes[2]]


def test_groups_and_single_metrics() -> None:
    assert select("psnr, ssim", NONE) == (("psnr_video", "psnr_frame", "ssim"), [])
    assert select("psnr_frame,motion", NONE)[0] == ("psnr_frame", "motion", "motion_norm", "motion_series_dev")
    assert select("clip_f", {**NONE, "clip_model": "x"})[0] == ("clip_f",)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("clip_t", "needs --clip_model"),
        ("all,lpips", "lpips: needs --lpips_model"),
        ("psnrr", "nearest: psnr"),
        (",", "no"),
    ],
)
def test_metrics_that_cannot_be(asked: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        select(asked, NONE)


def test_limits() -> None:
    assert parse_limits(["psnr=30", "ssim=0.9"], ["psnr_video", "ssim"]) == {"psnr_video": 30, "ssim": 0.9}
    for text, says in (("psnr", "write METRIC=NUMBER"), ("psnr=x", "write METRIC"), ("x=1", "unknown metric"),
                       ("lpips=1", "lpips is not measured here"), ("ssim=nan", "write METRIC")):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            parse_limits([text], ["psnr_video", "ssim"])


# --- statistics -------------------------------------------------------------------------------------------------------


def test_the_interval_holds_the_mean_about_as_often_as_it_says() -> None:
    generator, hits, whole = np.random.default_rng(0), 0, 400
    for seed in range(whole):
        found = bootstrap(list(generator.normal(3, 2, 40)), 500, seed)
        assert found is not None and found.low is not None and found.high is not None
        hits += found.low <= 3 <= found.high
    assert 0.91 <= hits / whole <= 0.97  # percentile intervals of 40 values cover a little under 95 %


def test_the_interval_is_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(1).normal(0, 1, 2000)
    found = bootstrap(list(values), 4000, 0)
    assert found is not None and found.low is not None and found.high is not None
    half = 1.96 * values.std() / math.sqrt(2000)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)
    assert found == bootstrap(list(values), 4000, 0)
    assert found != bootstrap(list(values), 4000, 1)


def test_few_and_infinite_values() -> None:
    assert bootstrap([], 100, 0) is None
    single = bootstrap([2.5], 100, 0)
    assert single is not None and (single.mean, single.low, single.high, single.count) == (2.5, None, None, 1)
    found = bootstrap([math.inf, 30.0, 40.0], 1000, 0)
    assert found is not None and found.mean == math.inf
    assert found.low is not None and 30 <= found.low < math.inf and found.high == math.inf


def test_signed_rank() -> None:
    # exact: the rank sum of the one negative value is 1; P(W <= 1) = 2 / 2^8 on each side
    assert signed_rank([-0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]) == pytest.approx(2 * 2 / 2**8)
    assert signed_rank([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx(2 / 2**6)
    assert signed_rank([0.0, 0.0, 0.0]) == 1
    assert signed_rank([1.0]) is None
    assert signed_rank([math.nan, 0.0]) == 1
