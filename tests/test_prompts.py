"""What people give a calibration: files of prompts, clips, pictures, latents and text states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamq.calibration.prompts import BUILT_IN, load_prompts
from streamq.calibration.settings import Prompt
from streamq.errors import UsageError


@pytest.fixture(name="beside")
def beside_fixture(tmp_path: Path) -> Path:
    """A folder with a.png and b.png in it, which nobody opens."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_the_built_in_prompts_are_short_and_differ() -> None:
    assert len(BUILT_IN) == len(set(BUILT_IN)) == 24
    assert all(20 < len(text) < 200 and text == text.strip() and "  " not in text for text in BUILT_IN)


def test_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffone cat\r\n\r\n  # a comment\n  два кота \n[not json]\n".encode())
    assert load_prompts(tmp_path / "p.txt") == (Prompt("one cat"), Prompt("два кота"), Prompt("[not json]"))


def test_json_lines_are_msmodelslims_index(beside: Path) -> None:
    lines = [
        '{"text": "one"}', "", "# a comment", '{"prompt": "two", "negative_prompt": "blurry", "seed": 3}',
        '{"text": "three\\u2028", "image": "a.png", "last_image": "b.png", "negative_prompt": null}',
        '{"text": "line\\u2028separator\u2028inside", "image": ""}',
    ]  # fmt: skip
    (beside / "index.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = load_prompts(beside / "index.jsonl")
    assert found[:2] == (Prompt("one"), Prompt("two", "blurry"))
    assert found[2] == Prompt("three\u2028", "", beside / "a.png", beside / "b.png")
    assert found[3].text == "line\u2028separator\u2028inside"
    assert load_prompts(beside) == found  # the folder of a data set


def test_json_is_llmcs_samples(beside: Path) -> None:
    samples = [{"prompt": "one", "negative_prompt": "bad"}, {"prompt": "two", "negative_prompt": "", "image": "a.png"}]
    (beside / "samples.json").write_text(json.dumps(samples))
    assert load_prompts(beside) == (Prompt("one", "bad"), Prompt("two", "", beside / "a.png"))


REFUSED = {
    "x.txt": [("# nothing\n\n", "no prompt in it"), (b"good\n\xff\xfe", r"x.txt:2: not UTF-8")],
    "x.jsonl": [
        ('{"text": "a"}\n{"text": }', r"x.jsonl:2: not valid JSON"),
        ('{"text": "a"}\n["a"]', r"x.jsonl:2: a JSON list, not an object"),
        ('{"image": "a.png"}', r"x.jsonl:1: no `text` \(or `prompt`\)"),
        ('{"text": 3}', r"x.jsonl:1: `text` is a number"),
        ('{"text": "a", "negative_prompt": ["b"]}', r"x.jsonl:1: `negative_prompt` is a list"),
        ('{"text": "a", "image": "no.png"}', r"x.jsonl:1: `image` 'no.png' is not a file beside x.jsonl"),
        ('{"text": "a", "image": "."}', "is not a file beside"),
        ('{"text": "a", "image": "https://example.org/a.png"}', "is an address; download it"),
        ('{"text": "a", "image": "a\\u0000.png"}', "is not a file beside"),
        ('{"text": "a", "last_image": 5}', "`last_image` is a number, not the name of a file"),
        ("[" * 100_000, "x.jsonl:1: not"),
        ('{"text": ' + "9" * 5000 + "}", "x.jsonl:1: "),
    ],
    "x.json": [
        ('{"prompt": "a"}', "x.json:1: a JSON object, not a list"),
        ('[\n{"prompt": "a"},\n{"prompt": b}]', "x.json:3: not valid JSON"),
        ('[{"prompt": "a"}, 5]', "x.json: entry 2: a JSON number"),
        ("[]", "no prompt in it"),
    ],
}


@pytest.mark.parametrize(("name", "content", "says"), [(n, c, s) for n, cases in REFUSED.items() for c, s in cases])
def test_what_is_no_prompt_is_refused_with_its_line(beside: Path, name: str, content: Any, says: str) -> None:
    (beside / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=says):
        load_prompts(beside / name)


def test_no_file_and_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(UsageError, match=r"without index.jsonl or samples.json"):
        load_prompts(tmp_path)


# --- clips and pictures -----------------------------------------------------------------------------------------------


@pytest.fixture(name="media")
def media_fixture() -> Any:
    for module in ("torch", "av", "PIL"):
        pytest.importorskip(module)
    from streamq.calibration import media

    return media


def write_video(path: Path, frames: int, rate: int, size: tuple[int, int] = (64, 48)) -> None:
    """A video whose frame i is grey of brightness 8·i, with a green stripe at its left edge."""
    import av
    import numpy

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if path.suffix != ".webm" else "libvpx", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for number in range(frames):
            pixels = numpy.full((size[1], size[0], 3), 8 * number, dtype=numpy.uint8)
            pixels[:, : size[0] // 8] = (0, 255, 0)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def middles(clip: Any) -> list[float]:
    """Brightness 0..255 in the middle of each frame of [3, F, H, W]."""
    return [round(float(v + 1) * 127.5 / 8) for v in clip[0, :, clip.shape[2] // 2, clip.shape[3] // 2]]


def test_clips_are_sampled_at_16_frames_a_second_and_cropped(media: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "a_same.mp4", 12, 16)
    write_video(tmp_path / "b_twice.mkv", 24, 32)
    write_video(tmp_path / "c_half.mov", 6, 8)
    write_video(tmp_path / "d_wide.mp4", 6, 16, (192, 48))
    (tmp_path / "notes.txt").write_text("not a clip")
    clips = list(media.read_clips(tmp_path, (64, 48), 5))
    assert [tuple(clip.shape) for clip in clips] == [(3, 5, 48, 64)] * 4
    assert all(float(clip.min()) >= -1 and float(clip.max()) <= 1 for clip in clips)
    assert [middles(clip) for clip in clips[:3]] == [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8], [0, 0, 1, 1, 2]]
    green = [float(clip[1, 0, 24, 0]) > 0.8 for clip in clips]
    assert green == [True, True, True, False]  # of the wide one the edges are cut off


def test_short_clips_are_filled_and_said(media: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", 3, 16)
    warnings: list[str] = []
    (clip,) = media.read_clips(tmp_path, (32, 32), 5, warnings)
    assert middles(clip) == [0, 1, 2, 2, 2]
    assert len(warnings) == 1 and "short.mp4: 3 frames" in warnings[0] and "5 are needed" in warnings[0]


def test_a_folder_of_frames_is_a_clip_and_so_is_a_gif(media: Any, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "frames").mkdir()
    pictures = [Image.new("RGB", (40, 30), (16 * i,) * 3) for i in range(4)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "frames" / f"{number:03d}.png")
    pictures[0].save(tmp_path / "z.gif", save_all=True, append_images=pictures[1:], duration=125)
    frames, gif = media.read_clips(tmp_path, (32, 32), 3)
    assert middles(frames) == [0, 2, 4] and middles(gif) == [0, 0, 2]
    assert [middles(clip) for clip in media.read_clips(tmp_path / "frames", (32, 32), 3)] == [[0, 2, 4]]
    assert media.list_clips(tmp_path) == [tmp_path / "frames", tmp_path / "z.gif"]


def test_a_picture_is_stretched_as_the_pipelines_do(media: Any, tmp_path: Path) -> None:
    import numpy
    import torch
    from diffusers.video_processor import VideoProcessor
    from PIL import Image

    pixels = numpy.random.default_rng(2).integers(0, 256, (50, 70, 4), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    theirs = VideoProcessor(vae_scale_factor=8).preprocess(Image.open(tmp_path / "a.png").convert("RGB"), 64, 96)
    assert torch.equal(media.read_image(tmp_path / "a.png", (96, 64)), theirs[0].float())
    media.save_thumbnail(torch.from_numpy(pixels[..., :3].copy()), tmp_path / "thumb.png")
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "thumb.png")), pixels[..., :3])


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"


def test_what_is_no_video_and_no_picture_is_named(media: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "real.mp4", 3, 16)
    for name, content in {
        "empty.mp4": "", "text.mp4": "not a video " * 50, "list.mp4": PLAYLIST.format(tmp_path / "real.mp4"),
        "net.mp4": PLAYLIST.format("http://127.0.0.1:9/a.ts"), "concat.mp4": "ffconcat version 1.0\nfile real.mp4\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=f"{name}: not a video that can be read"):
            next(media.read_clips(tmp_path / name, (32, 32), 3))
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    for name in ("bad.png", "none.png"):
        with pytest.raises(UsageError, match=f"{name}: not a picture that can be read"):
            media.read_image(tmp_path / name, (32, 32))
    (tmp_path / "nothing").mkdir()
    for path, says in ((tmp_path / "nothing", "no video in it"), (tmp_path / "none", "no such file or folder")):
        with pytest.raises(UsageError, match=says):
            next(media.read_clips(path, (32, 32), 3))


def test_a_picture_that_blows_up_is_refused(media: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    Image.new("1", (400, 400)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UsageError, match="bomb.png: not a picture that can be read"):
        media.read_image(tmp_path / "bomb.png", (32, 32))


def test_a_missing_package_is_named_with_its_extra(media: Any) -> None:
    with pytest.raises(UsageError, match=r'reading needs no_such_package .*pip install "streamq\[calib\]"'):
        media.require("no_such_package.part", "reading")


# --- latents and text states ------------------------------------------------------------------------------------------


def test_latents_are_cropped_to_the_shape(media: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    one, many = torch.randn(16, 3, 8, 10), torch.randn(2, 16, 2, 6, 6).bfloat16()
    save_file({"b": one, "a": many}, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", tmp_path):
        found = media.read_latents(path, (16, 2, 6, 6))
        assert [(tuple(t.shape), t.dtype) for t in found] == [((16, 2, 6, 6), torch.float32)] * 3
        assert torch.equal(found[1], many[1].float()) and torch.equal(found[2], one[:, :2, 1:7, 2:8])


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((48, 2, 6, 6), "48 channels, 16 are needed"), ((16, 1, 6, 6), "1 frames, 2 are needed"),
        ((16, 2, 6, 5), "5 columns, 6 are needed"), ((6, 6), r"shape \[6, 6\], latents are"), (None, "NaN or Inf"),
    ],
)  # fmt: skip
def test_other_latents_are_refused_with_both_numbers(media: Any, tmp_path: Path, shape: Any, says: str) -> None:
    import torch
    from safetensors.torch import save_file

    save_file(
        {"x": torch.ones(shape) if shape else torch.full((16, 2, 6, 6), float("nan"))}, tmp_path / "x.safetensors"
    )
    with pytest.raises(UsageError, match=says):
        media.read_latents(tmp_path / "x.safetensors", (16, 2, 6, 6))


def test_text_states_have_names(media: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    states = {"negative": torch.randn(1, 1, 32), "a cat": torch.randn(7, 32).bfloat16()}
    save_file(states, tmp_path / "t.safetensors")
    (name, cat), (other, negative) = media.read_text_embeds(tmp_path / "t.safetensors", 32)
    assert (name, other) == ("a cat", media.NEGATIVE) and torch.equal(cat, states["a cat"])
    assert torch.equal(negative, states["negative"][0])
    with pytest.raises(UsageError, match="32 wide, the model takes 4096"):
        media.read_text_embeds(tmp_path / "t.safetensors", 4096)
    for bad, says in ((torch.zeros(600, 8), "at most 512"), (torch.zeros(3, 8, dtype=torch.int32), "is I32")):
        save_file({"x": bad}, tmp_path / "t.safetensors")
        with pytest.raises(UsageError, match=says):
            media.read_text_embeds(tmp_path / "t.safetensors")
    (tmp_path / "t.pt").write_bytes(b"PK")
    with pytest.raises(UsageError, match="a pickle"):
        media.read_text_embeds(tmp_path / "t.pt")
