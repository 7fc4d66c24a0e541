"""The report's page, read back: its pictures, its charts, its numbers, and that nothing in it comes from elsewhere."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from report_kit import HOSTILE, KINDS, data, frames, manifest, sidecar

from streamq.errors import UsageError
from streamq.report import Candidate, Clip, ReportData, build, charts, layers, pictures, tables, words

image = pytest.importorskip("PIL.Image")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """Every element with its attributes and its own text, in order; `errors`: tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.feed(text)
        self.close()
        self.errors += [f"{element['tag']} is not closed" for element in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "parents": [e["tag"] for e in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1]["tag"] != tag:
            self.errors.append(f"</{tag}> within {self.open[-1]['tag'] if self.open else 'nothing'}")
            return
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attrs: str) -> list[dict[str, Any]]:
        found = [element for element in self.elements if element["tag"] == tag]
        return [e for e in found if all(e["attrs"].get(key.rstrip("_")) == value for key, value in attrs.items())]

    def strips(self) -> list[dict[str, Any]]:
        return [json.loads(element["text"]) for element in self.all("script", type="application/json")]


def decoded(code: str) -> np.ndarray:
    return np.asarray(image.open(io.BytesIO(base64.b64decode(code))).convert("RGB"))


@pytest.fixture(scope="module")
def text() -> str:
    return build(data())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_is_one_document_that_loads_nothing(page: Page, text: str) -> None:
    assert not page.errors
    ids = [element["attrs"]["id"] for element in page.elements if "id" in element["attrs"]]
    assert len(ids) == len(set(ids))
    for element in page.elements:
        for key in ("src", "href", "srcset", "action", "poster", "data"):
            value = element["attrs"].get(key)
            assert value is None or value.startswith(("data:", "#")), (element["tag"], value)
        if (value := element["attrs"].get("href") or "").startswith("#"):
            assert value[1:] in ids
        assert not any(key.startswith("on") for key in element["attrs"])
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["attrs"]["content"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_headings_and_pictures_are_for_everybody(page: Page) -> None:
    levels = [int(element["tag"][1]) for element in page.elements if re.fullmatch("h[1-6]", element["tag"])]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(element["attrs"].get("alt") for element in page.all("img"))
    assert all(element["attrs"].get("aria-label") for element in page.all("canvas"))
    for svg in page.all("svg"):
        assert svg["attrs"].get("aria-label") or svg["attrs"].get("aria-hidden") == "true"


def test_frames_are_the_videos_own_bits(page: Page) -> None:
    strips = page.strips()
    assert len(strips) == 2 * (1 + 2 * 2)
    for pair in range(2):
        reference, first, first_heat, second, second_heat = strips[5 * pair : 5 * pair + 5]
        moved = frames(pair)
        for strip, more in ((reference, 0), (first, 1), (second, 1)):
            moved[..., 0] += more
            assert (strip["width"], strip["height"], len(strip["frames"])) == (32, 24, 5)
            assert all((decoded(code) == moved[i]).all() for i, code in enumerate(strip["frames"]))
        for strip, level in ((first_heat, 1), (second_heat, 2)):
            assert strip["gain"] == 1 and all((decoded(code) == level).all() for code in strip["frames"])
    assert "without loss" in page.all("main")[0]["text"]


def test_a_difference_is_of_the_most_different_channel() -> None:
    a = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    b = a.copy()
    b[0, 0, 0] = (3, 200, 7)
    b[0, 1, 1] = (0, 0, 255)
    assert pictures.difference(a[0], b[0]).tolist() == pictures.difference(b[0], a[0]).tolist() == [[200, 0], [0, 255]]
    found = pictures.compare(a, b)
    assert found is not None and found.curve == (465 / 12,)
    assert (found.counts[[0, 200, 255]] == [2, 1, 1]).all() and found.counts.sum() == 4
    assert pictures.compare(a, b[:, :1]) is None


@pytest.mark.parametrize(("levels", "scale"), [(0, 1), (1, 1), (2, 2), (3, 4), (33, 64), (129, 255)])
def test_the_scale_holds_almost_all_pixels(levels: int, scale: int) -> None:
    a = np.zeros((2, 20, 20, 3), dtype=np.uint8)
    b = a + np.uint8(levels)
    b[0, 0, :7] = 255  # 7 of 800: below one in a hundred
    assert pictures.scale_of([[pictures.compare(a, b)], [None]]) == scale


def test_colours_are_ordered_by_lightness() -> None:
    colours = pictures.colour_table().astype(float)
    assert colours.shape == (256, 3) and colours[0].max() < 5
    assert (np.diff(colours @ [0.2126, 0.7152, 0.0722]) > -0.5).all()


def test_the_page_holds_the_colours(page: Page) -> None:
    held = page.all("script", id="colours")[0]["text"]
    assert base64.b64decode(held) == pictures.colour_table().tobytes()


def test_large_videos_are_made_small_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "BUDGET_BYTES", 500_000)
    large = np.kron(frames(0, 7, 27, 48), np.ones((1, 11, 11, 1), dtype=np.uint8))
    large = np.concatenate([large] * 15)[:101]
    one = Clip(large, 16.0, sidecar(0))
    other = Clip(large + np.uint8(8), 16.0, sidecar(0))
    text = build(ReportData("t", [one], [Candidate("c", None, [other])]))
    assert len(text) < 700_000
    reference, _, heat = Page(text).strips()
    step = -(-101 // len(reference["frames"]))
    assert reference["width"] <= 480 and reference["height"] == round(reference["width"] * 297 / 528)
    assert f"every {pictures_step(step)} frame of 101" in text and "from 528×297" in text and "with loss" in text
    seen = decoded(reference["frames"][1]).astype(float)
    assert seen.shape[:2] == (reference["height"], reference["width"])
    small = np.asarray(image.fromarray(large[step]).resize(seen.shape[1::-1]), dtype=float)
    assert np.abs(seen - small).mean() < 12
    levels = decoded(heat["frames"][0]).astype(float) / heat["gain"]
    assert np.abs(levels - 8).max() < 0.5


def pictures_step(step: int) -> str:
    return {2: "second", 3: "third"}.get(step, f"{step}th")


def test_pairs_beyond_the_budget_keep_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "BUDGET_BYTES", 40_000)
    page = Page(build(data(6)))
    pairs = [e for e in page.all("section") if (e["attrs"].get("class") or "").startswith("pair ")]
    assert len(pairs) == 6
    played = [pair for pair in pairs if "data-frames" in pair["attrs"]]
    assert 1 <= len(played) < 6 and f"The first {len(played)} of 6 pairs have players" in page.all("main")[0]["text"]
    assert all("psnr_video" in pair["text"] for pair in pairs)


def test_hostile_text_stays_text() -> None:
    one = data(1, (HOSTILE,))
    name, bad = one.candidates[0].name, manifest()
    made = bad["formats"]["mindie"]
    made["layers"][f"blocks.0.{HOSTILE}"] = {"type": HOSTILE, "rel_error": 0.5}
    made["layers"][HOSTILE] = {"type": "w8a8", "rel_error": 0.1, "output_rel_error": HOSTILE}
    made["recipe"] = {HOSTILE: [HOSTILE]}
    side = sidecar(0, transformer=HOSTILE, types={HOSTILE: 3}, torch=HOSTILE, seconds=HOSTILE, format=HOSTILE)
    side.pair.update(prompt=HOSTILE, negative_prompt=HOSTILE, scheduler=HOSTILE)
    clip = dataclasses.replace(one.reference[0], sidecar=side)
    rows = [row | {"prompt": HOSTILE, HOSTILE: 1.0, "failed": HOSTILE} for row in one.per_video]
    summary = [row | {"metric": HOSTILE} for row in one.summary]
    text = build(ReportData(HOSTILE, [clip], [Candidate(name, bad, [clip])], rows, summary, [HOSTILE]))
    page = Page(text)
    assert not page.errors
    assert [e["attrs"].get("type") for e in page.all("script")] == ["application/json"] * 3 + [
        "application/octet-stream",
        None,
    ]
    assert len(page.all("img")) == 1 and not any("onerror" in element["attrs"] for element in page.elements)
    assert page.all("h1")[0]["text"] == HOSTILE and page.all("title")[0]["text"] == HOSTILE
    assert page.all("p", class_="prompt")[0]["text"] == HOSTILE
    assert "49" not in page.all("h1")[0]["text"]
    assert "<script>alert" not in text and "<img src=https" not in text


def test_a_mark_a_layer(page: Page, text: str) -> None:
    charts_found = re.findall(r'<svg class="chart panel".*?</svg>', text, re.S)
    marks = [
        sum(chart.count('<g class="mark">') for chart in charts_found[half]) for half in (slice(0, 5), slice(5, 9))
    ]
    # weights: 3 blocks of 4 kinds and the head, for two candidates; outputs: the head was not measured
    assert marks == [2 * (3 * len(KINDS) + 1), 2 * 3 * len(KINDS)]
    assert len(charts_found) == 9
    assert text.count("blocks.1.ffn.2: float</title>") == 4
    assert "w4a16, blocks.2.self_attn.q: w8a8: 6 %</title>" in text
    rows = [row for row in page.all("tr") if "blocks.2.ffn.0" in row["text"]]
    assert len(rows) == 1 and "3 %" in rows[0]["text"] and "6 %" in rows[0]["text"]


def test_a_real_model_of_400_layers_with_two_experts() -> None:
    whole = manifest(40, expert="high_noise_model/")
    whole["formats"]["mindie"]["layers"] |= manifest(40, expert="low_noise_model/")["formats"]["mindie"]["layers"]
    found = layers.layers_of([Candidate("c", whole, [])])
    assert len(found) == 2 * (40 * len(KINDS) + 1)
    made = layers.measures(found, ["c"])
    assert [group for group, _ in made[0].groups] == ["high_noise_model", "low_noise_model"]
    assert [len(panels) for _, panels in made[0].groups] == [len(KINDS) + 1] * 2
    assert made[0].groups[0][1][0].svg.count('<g class="mark">') == 40
    assert made[0].groups[0][1][-1].kind == layers.OUTSIDE


def test_an_axis_is_logarithmic_and_takes_any_error() -> None:
    scale = charts.log_scale([0.001, 0.1, 0.0, float("inf"), float("nan")])
    assert scale is not None and scale.low < 0.001 and scale.high > 0.1
    assert scale.at(0) == 0 and scale.at(float("inf")) == 1
    assert scale.at(0.01) - scale.at(0.001) == pytest.approx(scale.at(0.1) - scale.at(0.01))
    assert scale.ticks() == pytest.approx([0.001, 0.01, 0.1])
    assert charts.log_scale([0.0]) is None
    single = charts.log_scale([0.01])
    assert single is not None and len(single.ticks()) >= 3
    assert charts.percent(0.0062) == "0.62 %" and charts.percent(0.1) == "10 %" and charts.percent(0) == "0 %"
    assert charts.whole_ticks(0, 39, 5) == [0, 10, 20, 30] and charts.whole_ticks(0, 0, 5) == [0]


def test_numbers_of_the_headline_and_the_tables(page: Page) -> None:
    cards = page.all("section", class_="card verdict")
    assert [card["attrs"]["aria-label"] for card in cards] == ["w8a8", "w4a16"]
    said = " ".join(cards[1]["text"].split())
    for part in ("w8a8 in 10 layers, float in 3 layers", "2.50× smaller", "1 MB → 400 KB",
                 "49.00 dB", "48.50 … 49.50", "rough: 2 pairs",
                 "noise floor 88.00", "40 % of float's bytes"):  # fmt: skip
        assert part in said, part
    whole = " ".join(page.all("main")[0]["text"].split())
    assert "flicker less float's flicker" in whole and "−0.001" in whole
    assert "config_id: w8a8" in whole and "abababababab" in whole and "clip_t left out" in whole
    assert "host memory" in whole and "device memory" not in whole  # nobody has a number for it


def test_few_pairs_are_said_to_be_rough() -> None:
    row = {"metric": "ssim", "low": 0.9, "high": 1.0, "count": 2}
    assert tables.counted(row) == "rough: 2 pairs" and tables.counted(row | {"count": 20}) == "20 pairs"
    assert tables.counted({"count": 1}) == "1 pair" and tables.counted({}) == ""  # a single pair has no interval


def test_curves_have_one_scale_and_say_their_axes(text: str) -> None:
    """w4a16 is two levels of red off: the mean over channels is 2 / 3, the highest of the page."""
    levels = r'<div class="up" aria-hidden="true"><span>(.*?)</span><span>(.*?)</span>'
    assert re.findall(levels, text) == [("0.667", "0")] * 2
    along = r'<div class="along" aria-hidden="true"><span>(.*?)</span><span>(.*?)</span>'
    assert re.findall(along, text) == [("frame 1", "5")] * 2
    one = data(2)
    for candidate in one.candidates:  # the second pair gets no difference: the scale of the page stays
        candidate.clips[1] = one.reference[1]
    text = build(one)
    assert re.findall(levels, text) == [("0.667", "0")] * 2
    lines = re.findall(r'<path class="thread s[01]" d="M0.0 ([0-9.]+)', text)[:4]
    assert lines == ["25.00", "2.00", "48.00", "48.00"]  # half, all, none, none of the axis from 48 to 2


def test_metrics_say_which_way_is_better(page: Page) -> None:
    rows = [" ".join(e["text"].split()) for e in page.all("th", scope="rowgroup")]
    due = ("psnr_video higher is better", "ssim higher is better", "flicker_diff best at 0")
    assert len(rows) == len(due) and all(row.startswith(text) for row, text in zip(rows, due, strict=True))


def test_other_projects_limits_are_judged_by_the_means() -> None:
    one = data(1, ("a",))
    summary = [
        {"candidate": "a", "metric": m, "mean": v} for m, v in (("psnr_video", 22.0), ("mae", 7.0), ("ssim", 0.7))
    ]
    found = tables.limits(dataclasses.replace(one, summary=summary))
    assert [cells for _, _, cells in found] == [["2 of 2 kept"], ["0 of 2 kept"], ["0 of 1 kept"]]
    assert "psnr_video ≥ 20" in found[0][1] and "mae ≤ 12" in found[0][1]


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("psnr_video", 41.237, "41.24"), ("psnr_video", float("inf"), "∞"), ("ssim", 0.9562, "0.9562"),
        ("ssim", 0.999816, "0.99982"), ("cos", 1.0, "1.0000"), ("flicker_diff", -0.00012345, "−0.0001234"),
        ("mae", None, "–"), ("mae", float("nan"), "–"), ("mae", "0.5", "0.5"), ("mae", "words", "words"),
        ("mae", True, "True"),
    ],
)  # fmt: skip
def test_how_numbers_are_written(metric: str, value: Any, said: str) -> None:
    assert words.shown(metric, value) == said


def test_little_is_enough() -> None:
    one = Clip(frames(0), 16.0, dataclasses.replace(sidecar(0), made={}, files={}))
    other = Clip(frames(1, 3, 16, 16), 8.0, one.sidecar)
    page = Page(build(ReportData("t", [one], [Candidate("c", None, [other])])))
    assert not page.errors and "sizes differ" in page.all("main")[0]["text"] and len(page.strips()) == 2
    assert not Page(build(ReportData("t", [one], [Candidate("c", {"formats": {"x": {}}}, [one])]))).errors
    assert not Page(build(ReportData("t", [], [Candidate("c", manifest(), [])]))).errors
    assert not Page(build(ReportData("t", [one], []))).errors
    single = Clip(frames(0, 1), 16.0, sidecar(0))
    changed = Clip(frames(1, 1), 16.0, sidecar(0))
    assert not Page(build(ReportData("t", [single], [Candidate("c", None, [changed])]))).errors


def test_many_candidates() -> None:
    page = Page(build(data(1, tuple(f"candidate {i}" for i in range(7)))))
    assert not page.errors and len(page.strips()) == 15


def test_the_same_data_makes_the_same_page(text: str) -> None:
    assert build(data()) == text


def test_without_the_extra_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(UsageError, match=r'the report needs jinja2.*pip install "streamq\[eval\]"'):
        build(data(1))
