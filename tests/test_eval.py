"""`streamq eval` end to end on synthetic folders: files, tables, refusals, exit statuses."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import check_error, run
from eval_kit import clip_of, noisy, write_video

from streamq.calibration.make import at_work
from streamq.evaluation.evaluate import Results
from streamq.evaluation.tables import show, to_csv, worse

CSVS = ("fidelity_per_video.csv", "fidelity_summary.csv", "clip_temporal_per_video.csv", "clip_temporal_summary.csv",
        "motion_summary.csv")  # fmt: skip
PROMPTS = ("a red ball", "a blue ball")
Change = Callable[[np.ndarray], np.ndarray]


def folder_of(folder: Path, change: Change, *, latents: float = 0.0, **pair: Any) -> Path:
    for index, prompt in enumerate(PROMPTS):
        for seed in (0, 1):
            number = 2 * index + seed
            base = np.random.default_rng(number).normal(size=(4, 2, 6, 8)).astype(np.float32)
            moved = base * np.float32(1 + latents)
            frames = change(clip_of(frames=4, seed=number))
            write_video(folder, frames, index=index, seed=seed, prompt=prompt, latents=moved, **pair)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module", name="videos")
def videos_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float, float2 (the floor), int8, int4: four pairs each."""
    root = tmp_path_factory.mktemp("videos")
    folder_of(root / "float", lambda f: f)
    folder_of(root / "float2", lambda f: noisy(f, 0.6), latents=0.001, device_kind="cuda")
    folder_of(root / "int8", lambda f: noisy(f, 3), latents=0.02)
    folder_of(root / "int4", lambda f: noisy(f, 12), latents=0.2)
    return root


@pytest.fixture(scope="module", name="done")
def done_fixture(videos: Path) -> tuple[Path, dict[str, Any]]:
    out = videos / "out"
    result = run(
        "eval", "--reference", videos / "float", "--candidate", videos / "int8", "--candidate", videos / "int4",
        "--noise_floor", videos / "float2", "--save_path", out, "--bootstrap", 500, "--json", "--no_report",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return out, json.loads(result.stdout)


def test_files_and_rows(done: tuple[Path, dict[str, Any]]) -> None:
    out, document = done
    assert sorted(path.name for path in out.iterdir()) == sorted([*CSVS, "candidates_compared.csv"])
    per_video = rows(out / "fidelity_per_video.csv")
    assert [row["candidate"] for row in per_video] == ["noise_floor"] * 4 + ["int8"] * 4 + ["int4"] * 4
    assert [row["stem"] for row in per_video[:4]] == ["0000-seed0", "0000-seed1", "0001-seed0", "0001-seed1"]
    assert float(per_video[4]["latent_rel_l2"]) == pytest.approx(0.02, rel=1e-4)
    assert float(per_video[4]["psnr_video"]) == pytest.approx(10 * math.log10(255**2 / (9 + 1 / 12)), abs=0.3)
    assert {row["name"] for row in rows(out / "clip_temporal_per_video.csv")} == {
        "reference",
        "noise_floor",
        "int8",
        "int4",
    }
    assert document["failed"] == []
    assert "clip_t, clip_score, clip_f, background_consistency left out: no --clip_model" in document["notes"]
    assert any("4 pairs: fewer than 20" in note for note in document["notes"])


def test_the_summary_is_of_the_rows(done: tuple[Path, dict[str, Any]]) -> None:
    out, document = done
    mine = [float(row["ssim"]) for row in rows(out / "fidelity_per_video.csv") if row["candidate"] == "int8"]
    found = next(r for r in rows(out / "fidelity_summary.csv") if (r["candidate"], r["metric"]) == ("int8", "ssim"))
    assert float(found["mean"]) == pytest.approx(np.mean(mine), rel=1e-7)
    assert min(mine) <= float(found["low"]) <= float(found["mean"]) <= float(found["high"]) <= max(mine)
    assert (found["count"], found["within_noise"]) == ("4", "False")
    assert float(found["p_value"]) == pytest.approx(2 / 2**4)  # all four below the floor's
    flicker = {r["candidate"]: r for r in rows(out / "clip_temporal_summary.csv") if r["metric"] == "flicker_diff"}
    assert float(flicker["int4"]["mean"]) < float(flicker["int8"]["mean"]) < 0
    assert {r["metric"] for r in rows(out / "motion_summary.csv")} == {
        "motion", "motion_diff", "motion_norm", "motion_norm_diff", "motion_series_dev"
    }  # fmt: skip
    compared = next(r for r in document["compared"] if r["metric"] == "psnr_video")
    assert (compared["candidate"], compared["other"]) == ("int8", "int4")
    assert compared["difference"] == pytest.approx(12, abs=1)  # four times the noise


def test_thresholds_of_others(done: tuple[Path, dict[str, Any]]) -> None:
    found = done[1]["thresholds"]
    assert found["int8"] == {"vLLM-Omni smoke": "pass", "vLLM-Omni strict": "pass", "Unsloth video": "pass"}
    assert (
        found["int4"]["vLLM-Omni strict"] == "fail: mae, rel_l2, cos" or found["int4"]["vLLM-Omni strict"][:4] == "fail"
    )


def test_same_videos_same_bytes(videos: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    again = run(
        "eval", "--reference", videos / "float", "--candidate", videos / "int8", "--candidate", videos / "int4",
        "--noise-floor", videos / "float2", "--save-path", tmp_path, "--bootstrap", 500, "--no_report", "--quiet",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert (again.stdout, again.stderr) == ("", "")
    for name in CSVS:
        assert (tmp_path / name).read_bytes() == (done[0] / name).read_bytes()


def test_identical_videos_and_the_default_folder(videos: Path, tmp_path: Path) -> None:
    folder_of(tmp_path / "same", lambda f: f)
    result = run("eval", "--reference", videos / "float", "--candidate", tmp_path / "same", "--no_report", "--json",
                 "--bootstrap", 100)  # fmt: skip
    assert result.returncode == 0, result.stderr
    means = {row["metric"]: row["mean"] for row in json.loads(result.stdout)["summary"] if row["candidate"] == "same"}
    assert (means["psnr_video"], means["psnr_frame"], means["ssim"], means["mae"]) == ("inf", 100, 1, 0)
    assert (means["latent_rel_l2"], means["motion_series_dev"], means["flicker_diff"]) == (0, 0, 0)
    assert (tmp_path / "eval" / "fidelity_per_video.csv").is_file()


def test_a_terminal_sees_numbers_counts_and_thresholds(videos: Path, tmp_path: Path) -> None:
    result = run("eval", "--reference", videos / "float", "--candidate", videos / "int8", "--save_path", tmp_path,
                 "--no_report", "--metrics", "psnr,ssim,pixel", "--bootstrap", 100)  # fmt: skip
    assert result.returncode == 0, result.stderr
    for text in ("int8 against the reference", "psnr_video", "(4)", "vLLM-Omni strict: pass", "Unsloth video: pass"):
        assert text in result.stdout
    assert "video 8 of 8: int8/0001-seed1" in result.stderr


@pytest.mark.parametrize(
    ("limit", "says"),
    [("psnr=60", "int8 has psnr_video 38|int8 has psnr_video 39"), ("mae=0.1", "--fail_under wants 0.1")],
)
def test_fail_under(videos: Path, tmp_path: Path, limit: str, says: str) -> None:
    args = ("eval", "--reference", videos / "float", "--candidate", videos / "int8", "--save_path", tmp_path,
            "--no_report", "--metrics", "psnr,pixel", "--bootstrap", 100, "--quiet")  # fmt: skip
    result = run(*args, "--fail_under", limit)
    assert result.returncode == 1
    check_error(result, says, "the tables are written")
    assert (tmp_path / "fidelity_summary.csv").is_file()
    assert run(*args, "--fail_under", "psnr=30", "--fail_under", "mae=20").returncode == 0


def test_black_and_nan_fail_the_pair(videos: Path, tmp_path: Path) -> None:
    def black(frames: np.ndarray) -> np.ndarray:
        return np.concatenate([frames[:3], frames[3:] * np.uint8(0)])

    folder_of(tmp_path / "bad", lambda f: f)
    write_video(tmp_path / "bad", black(clip_of(frames=4)), index=0, seed=0, prompt=PROMPTS[0],
                latents=np.zeros((4, 2, 6, 8), np.float32))  # fmt: skip
    write_video(tmp_path / "bad", clip_of(frames=4, seed=1), index=0, seed=1, prompt=PROMPTS[0],
                latents=np.full((4, 2, 6, 8), np.nan, np.float32))  # fmt: skip
    result = run("eval", "--reference", videos / "float", "--candidate", tmp_path / "bad", "--no_report",
                 "--save_path", tmp_path / "o", "--json", "--bootstrap", 100)  # fmt: skip
    assert result.returncode == 1
    check_error(result, "2 pairs failed: bad/0000-seed0: frame 3 is black")
    document = json.loads(result.stdout)
    assert document["failed"][1] == "bad/0000-seed1: 384 of 384 latents are NaN or Inf"
    assert next(r for r in document["summary"] if r["metric"] == "psnr_video")["count"] == 2


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "give either --reference"),
        (("--reference", "{v}/float"), "--reference without --candidate"),
        (("--reference", "{v}/float", "--candidate", "{v}/gone"), "gone: no such folder"),
        (("--reference", "{v}/float", "--candidate", "{v}/float2"), "device_kind is 'cuda', of its pair"),
        (("--reference", "{v}/float", "--candidate", "{v}/int8", "--metrics", "clip_t"), "needs --clip_model"),
        (("--reference", "{v}/float", "--candidate", "{v}/int8", "--clip_model", "{v}"), "no config.json in it"),
        (("--reference", "{v}/float", "--candidate", "{v}/int8", "--frames", "0"), "--frames 0: a number from 1"),
        (("--reference", "{v}/float", "--candidate", "{v}/int8", "--bootstrap", "1"), "--bootstrap 1: from 2"),
        (("--reference", "{v}/float", "--candidate", "{v}/int8", "--fail_under", "lpips=1"), "lpips is not measured"),
        (
            ("--reference", "{v}/float", "--candidate", "{v}/int8", "--prompt", "a"),
            "--prompt: is for videos to be made",
        ),
        (("--reference", "{v}/float", "--candidate", "{v}/int8", "--candidate", "{v}/int8"), "the same name as"),
        (("--reference", "{v}/float", "--candidate", "{v}/int8", "--allow_mismatch", "x"), "not a field of a pair"),
        (("--model_path", "{v}", "--transformer", "{v}/int8"), "give the prompts"),
        (("--model_path", "{v}", "--transformer", "{v}/int8", "--prompt", "a"), "give --save_path|--save_path"),
        (("--model_path", "{v}", "--prompt", "a", "--save_path", "{v}/o2"), "nothing to compare it with"),
        (("--model_path", "{v}", "--reference", "{v}/float"), "give either"),
    ],
)
def test_wrong_use_writes_nothing(videos: Path, args: tuple[str, ...], says: str) -> None:
    before = sorted(videos.rglob("*"))
    result = run("eval", *(arg.format(v=videos) for arg in args))
    assert result.returncode == 2
    check_error(result, says)
    assert sorted(videos.rglob("*")) == before


def test_a_file_that_is_not_what_its_json_says(videos: Path, tmp_path: Path) -> None:
    folder_of(tmp_path / "bad", lambda f: f)
    (tmp_path / "bad" / "0000-seed0.mkv").write_bytes((write_short(tmp_path)).read_bytes())
    result = run("eval", "--reference", videos / "float", "--candidate", tmp_path / "bad", "--no_report", "--quiet")
    assert result.returncode == 2
    check_error(result, "frame_num is 2, its JSON says 4")
    assert not (tmp_path / "eval").exists()


def write_short(folder: Path) -> Path:
    return write_video(folder / "short", clip_of(frames=2)).with_suffix(".mkv")


def test_without_latents_they_are_left_out_or_refused(videos: Path, tmp_path: Path) -> None:
    for index, prompt in enumerate(PROMPTS):
        for seed in (0, 1):
            write_video(tmp_path / "c", clip_of(frames=4, seed=2 * index + seed), index=index, seed=seed, prompt=prompt)
    args = ("eval", "--reference", videos / "float", "--candidate", tmp_path / "c", "--no_report", "--json",
            "--bootstrap", 100)  # fmt: skip
    notes = json.loads(run(*args).stdout)["notes"]
    assert "latent_rel_l2, latent_cos left out: 0000-seed0.json names no file of latents" in notes
    check_error(run(*args, "--metrics", "latent"), "names no file of latents")


def test_vbench_out_and_back(videos: Path, tmp_path: Path) -> None:
    from streamq.videos import read_video

    out = tmp_path / "vbench"
    args = ("eval", "--reference", videos / "float", "--candidate", videos / "int8", "--save_path", tmp_path / "o",
            "--no_report", "--json", "--metrics", "psnr", "--bootstrap", 100)  # fmt: skip
    result = run(*args, "--vbench_export", out)
    assert result.returncode == 0, result.stderr
    assert f"python evaluate.py --mode=custom_input --videos_path {out}/int8" in result.stdout
    names = ["0000-seed0.mp4", "0000-seed1.mp4", "0001-seed0.mp4", "0001-seed1.mp4"]
    assert sorted(path.name for path in (out / "int8").iterdir()) == names
    prompts = json.loads((out / "int8.prompts.json").read_text())
    assert prompts == dict(zip(names, [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, strict=True))
    one, other = read_video(out / "int8" / names[0])[0], read_video(videos / "int8" / "0000-seed0.mkv")[0]
    assert np.array_equal(one, other)

    files = []
    for name, base in (("reference", 70.0), ("int8", 68.0)):
        each = [{"video_path": f"/x/{name}/{file}", "video_results": base + i} for i, file in enumerate(names)]
        still = [{"video_path": f"/x/{name}/{file}", "video_results": name == "reference"} for file in names]
        document = {"imaging_quality": [base / 100, each], "dynamic_degree": [0.5, still]}
        files += ["--vbench_import", tmp_path / f"{name}.json"]
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    result = run(*args, *files)
    assert result.returncode == 0, result.stderr
    table = rows(tmp_path / "o" / "fidelity_per_video.csv")
    assert [row["vbench_imaging_quality"] for row in table] == ["68", "69", "70", "71"]
    assert {row["vbench_imaging_quality_diff"] for row in table} == {"-2"}
    assert {row["vbench_dynamic_degree_diff"] for row in table} == {"-1"}
    summary = {row["metric"]: row for row in rows(tmp_path / "o" / "fidelity_summary.csv")}
    assert summary["vbench_imaging_quality"]["mean"] == "69.5"
    assert float(summary["vbench_imaging_quality_diff"]["p_value"]) == pytest.approx(2 / 2**4)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "not VBench's results"),
        ({"a": 1}, r"a is not \[overall"),
        ({"a": [1, [{"video_path": "x"}]]}, "without video_path or a number"),
        ({"a": [1, [{"video_path": "x/int9/0000-seed0.mp4", "video_results": 1}]]}, "int9/0000-seed0.mp4 is no video"),
    ],
)
def test_other_json_is_no_vbench(videos: Path, tmp_path: Path, document: Any, says: str) -> None:
    (tmp_path / "r.json").write_text(json.dumps(document))
    result = run("eval", "--reference", videos / "float", "--candidate", videos / "int8", "--save_path", tmp_path / "o",
                 "--no_report", "--metrics", "psnr", "--quiet", "--vbench_import", tmp_path / "r.json")  # fmt: skip
    assert result.returncode == 2
    check_error(result, says.replace("\\", ""))
    assert not (tmp_path / "o").exists()


def test_models_and_the_report(videos: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from test_eval_features import make_clip, random_weights

    make_clip(tmp_path / "tiny-clip")
    save_file(random_weights(), tmp_path / "lpips.safetensors")
    result = run(
        "eval", "--reference", videos / "float", "--candidate", videos / "int8", "--save_path", tmp_path / "o",
        "--clip_model", tmp_path / "tiny-clip", "--lpips_model", tmp_path / "lpips.safetensors", "--frames", 2,
        "--metrics", "clip_t,clip_f,lpips,psnr", "--bootstrap", 100, "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    own = rows(tmp_path / "o" / "clip_temporal_per_video.csv")
    assert {(row["clip_model"], row["clip_t_frames"], row["frames"]) for row in own} == {("tiny-clip", "2", "4")}
    row = rows(tmp_path / "o" / "fidelity_per_video.csv")[0]
    assert float(row["lpips"]) > 0
    assert float(row["clip_t"]) == pytest.approx(float(row["clip_t_reference"]) + float(row["clip_t_diff"]), abs=1e-8)
    page = (tmp_path / "o" / "report.html").read_text()
    assert "int8 against the float model" in page and PROMPTS[1] in page
    assert str(tmp_path) not in page + (tmp_path / "o" / "clip_temporal_per_video.csv").read_text()


def test_the_report_shows_as_many_pairs_as_fit(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamq.evaluation import command

    monkeypatch.setattr(command, "REPORT_BYTES", 2 * 2 * 4 * 48 * 64 * 3)
    result = run("eval", "--reference", videos / "float", "--candidate", videos / "int8", "--save_path", tmp_path,
                 "--metrics", "psnr", "--bootstrap", 100, "--quiet")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "the page shows the first 2 of 4 pairs" in (tmp_path / "report.html").read_text()


def test_missing_videos_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What generate is asked for; that it makes it is its own tests' matter."""
    import streamq.generation
    from streamq.generation import GenerateSettings, prepare

    asked: list[GenerateSettings] = []
    checked: list[GenerateSettings] = []

    def generate(settings: GenerateSettings, about: Callable[[str], None]) -> list[Path]:
        asked.append(settings)
        change = (lambda f: noisy(f, 3)) if settings.transformer else (lambda f: f)
        write_video(settings.save_path, clip_of(frames=4), seed=7)  # of an earlier run, and not asked for now
        return [write_video(settings.save_path, change(clip_of(frames=4, seed=s)), seed=s) for s in settings.seeds]

    monkeypatch.setattr(streamq.generation, "generate", generate)
    monkeypatch.setattr(prepare, "prepare", checked.append)
    (tmp_path / "w8a8").mkdir()
    result = run(
        "eval", "--model_path", "owner/model", "--transformer", tmp_path / "w8a8", "--prompt", "a red ball",
        "--seeds", "0,3", "--size", "64*48", "--frame_num", 5, "--sample_steps", 2, "--guidance", 3.5,
        "--dtype", "fp32", "--max_host_memory", "1GiB", "--save_path", tmp_path / "o", "--metrics", "psnr",
        "--no_report", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert checked == asked
    assert [(one.save_path.name, one.transformer) for one in asked] == [
        ("reference", None), ("w8a8", tmp_path / "w8a8")
    ]  # fmt: skip
    one = asked[1]
    assert (one.model_path, one.prompts, one.seeds, one.size) == ("owner/model", ("a red ball",), (0, 3), (64, 48))
    assert (one.frame_num, one.sample_steps, one.guidance, one.dtype) == (5, 2, 3.5, "fp32")
    assert one.max_host_memory == 1 << 30
    assert [row["stem"] for row in json.loads(result.stdout)["per_video"]] == ["0000-seed0", "0000-seed3"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--seeds", "0,0"), "--seeds 0,0: write different whole numbers"),
        (("--size", "64"), "--size 64: not a size"),
        (("--transformer", "gone"), "--transformer gone: no such folder"),
        (("--transformer", "reference"), "what eval calls its own"),
        (("--max_host_memory", "x"), "--max_host_memory x: not a size"),
    ],
)
def test_what_cannot_be_made(tmp_path: Path, more: tuple[str, str], says: str) -> None:
    (tmp_path / "w8a8").mkdir()
    result = run("eval", "--model_path", tmp_path, "--transformer", tmp_path / "w8a8", "--prompt", "a",
                 "--save_path", tmp_path / "o", *more)  # fmt: skip
    assert result.returncode == 2
    check_error(result, says)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("whose", ["int8", "float"])
@pytest.mark.parametrize("damage", ["missing", "[]", "cut"])
def test_a_lost_sidecar_is_named_and_not_its_partner(videos: Path, tmp_path: Path, whose: str, damage: str) -> None:
    for name in ("float", "int8"):
        shutil.copytree(videos / name, tmp_path / name)
    lost = tmp_path / whose / "0001-seed0.json"
    if damage == "missing":
        lost.unlink()
    else:
        lost.write_text("[]" if damage == "[]" else lost.read_text()[:50])
    result = run("eval", "--reference", tmp_path / "float", "--candidate", tmp_path / "int8", "--metrics", "psnr")
    assert result.returncode == 2
    word = {"missing": "missing beside 0001-seed0.mkv", "[]": "not the JSON of a video", "cut": "not valid JSON"}[
        damage
    ]
    check_error(result, f"error: {lost}: {word}", "make the video again with streamq generate")
    assert not (tmp_path / "eval").exists()


def test_a_folder_whose_videos_have_all_lost_their_json(videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos / "int8", tmp_path / "int8", ignore=shutil.ignore_patterns("*.json"))
    result = run("eval", "--reference", videos / "float", "--candidate", tmp_path / "int8")
    check_error(result, f"error: {tmp_path / 'int8' / '0000-seed0.json'}: missing beside 0000-seed0.mkv")


@pytest.mark.parametrize(("module", "more", "says"), [
    ("jinja2", (), "the report needs jinja2"), ("matplotlib", (), "heat maps needs matplotlib"),
    ("cv2", ("--no_report", "--metrics", "motion"), "motion needs cv2"), ("av", ("--no_report",), "needs av"),
])  # fmt: skip
def test_a_missing_package_is_told_before_a_video_is_read(
    videos: Path, monkeypatch: pytest.MonkeyPatch, module: str, more: tuple[str, ...], says: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("streamq.evaluation.evaluate.evaluate", None)
    result = run("eval", "--reference", videos / "float", "--candidate", videos / "int8", *more)
    assert result.returncode == 2
    check_error(result, says, 'pip install "streamq[eval]"')


@pytest.mark.parametrize(("place", "says"), [("/proc/streamq", "no files can be made|cannot be written"),
                                             ("", "another run is at work")])  # fmt: skip
def test_a_folder_that_cannot_be_had_is_told_before_the_work(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, says: str
) -> None:
    monkeypatch.setattr("streamq.evaluation.evaluate.evaluate", None)
    out = Path(place or tmp_path / "out")
    with nullcontext() if place else at_work(out):
        result = run("eval", "--reference", videos / "float", "--candidate", videos / "int8", "--save_path", out)
    assert result.returncode == 2
    check_error(result, f"--save_path {out}", says)
    assert not out.exists()


@pytest.mark.parametrize(("prompts", "says"), [(("",), "--prompt '': empty"), (("a", "a"), "'a' stands twice")])
def test_prompts_that_make_no_pairs(tmp_path: Path, prompts: tuple[str, ...], says: str) -> None:
    (tmp_path / "w8a8").mkdir()
    given = [one for prompt in prompts for one in ("--prompt", prompt)]
    result = run("eval", "--model_path", tmp_path, "--transformer", tmp_path / "w8a8", "--save_path", tmp_path / "o",
                 *given)  # fmt: skip
    assert result.returncode == 2
    check_error(result, says)


def test_the_terminal_says_which_way_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("psnr_video", "mae", "flicker", "flicker_diff", "clip_t_diff", "vbench_x")
    found = {"low": None, "high": None, "mean": 1.0, "count": 30, "noise_floor": None, "within_noise": None}
    rows = [{"candidate": "c", "metric": name, "p_value": None} | found for name in names]
    show(Results(summary=rows), ["c"])
    said = capsys.readouterr().out
    for line in ("psnr_video ↑ ", "mae ↓ ", "flicker = ", "flicker_diff 0 ", "clip_t_diff ↑ ", "vbench_x  "):
        assert line in said, said
    assert "↑ higher is better, ↓ lower is better" in said


@pytest.mark.parametrize("command", ["generate", "eval", "analyze"])
def test_help_says_what_it_is_for_with_two_examples(command: str) -> None:
    found = run(command, "--help").stdout
    examples = found.partition("\nexamples:\n")[2]
    assert examples.count(f"    streamq {command} --") == 2
    assert len(found.partition("\n\n")[2].split("\n\n")[0].split()) > 15  # the description behind the usage


def test_csv_cells() -> None:
    text = to_csv([{"a": 1 / 3, "b": None, "c": math.inf, "d": 'x,"y'}, {"a": 2}], ["a", "b", "c", "d"]).decode()
    assert text == 'a,b,c,d\n0.333333333,,inf,"x,""y"\n2,,,\n'


def test_worse_knows_which_way_is_better() -> None:
    assert worse("psnr_video", 29.9, 30) and not worse("psnr_video", 30, 30)
    assert worse("lpips", 0.2, 0.1) and not worse("lpips", 0.1, 0.1)
    assert worse("ssim", math.nan, 0.5)


def test_refusing_needs_no_torch() -> None:
    code = """
import argparse, sys
from streamq.evaluation import command
parser = argparse.ArgumentParser()
command.add_options(parser)
try:
    command.run(parser.parse_args(["--reference", "/gone", "--candidate", "/gone/too"]))
except Exception as error:
    print(error, "torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.startswith("/gone: no such folder") and found.stdout.endswith("False\n"), found
