"""The report in a real browser: what its canvases hold, what its buttons do, that it fits a phone and says no error.

The page's own policy lets no other script run, so the test that asks the page works on a copy without the policy; the
other looks at the page as it is.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_kit import HOSTILE, data, frames

from streamq.report import build, pictures

image = pytest.importorskip("PIL.Image")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--enable-logging=stderr",
    "--force-color-profile=srgb",
)  # fmt: skip
ASK = """
const wait = async () => {
  for (let turn = 0; turn < 500; turn++) {
    await new Promise(done => setTimeout(done, 10));
    const frame = document.querySelector("section.pair input.frame").value;
    if (all("section.pair:first-of-type canvas").every(canvas => canvas.dataset.frame === frame)) return;
  }
  throw new Error("a canvas was never drawn");
};
const pixels = canvas => Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
const all = selector => [...document.querySelectorAll(selector)];
const errors = [];
addEventListener("error", event => errors.push(event.message));
(async () => {
  await wait();
  const said = { errors, alerted: typeof window.alerted };
  const first = document.querySelector("section.pair");
  const slider = first.querySelector("input.frame");
  slider.value = 3; slider.dispatchEvent(new Event("input")); await wait();
  said.frame = all("section.pair:first-of-type canvas").map(pixels);
  said.readout = first.querySelector("output").textContent;
  const scale = document.querySelector("select.scale");
  said.scales = [...scale.options].map(option => Number(option.value));
  scale.value = "4"; scale.dispatchEvent(new Event("change")); await wait();
  said.scaled = pixels(first.querySelectorAll("canvas[data-kind=heat]")[1]);
  said.tops = [...new Set(all(".scale-top").map(at => at.textContent))];
  first.querySelector("button.next").click(); await wait();
  said.next = slider.value;
  first.querySelector("button.next").click(); await wait();
  said.around = slider.value;
  first.querySelector("button.blink").click(); await wait();
  said.blink = pixels(first.querySelectorAll("canvas[data-kind=video]")[1]);
  first.querySelector("button.blink").click(); await wait();
  said.unblink = pixels(first.querySelectorAll("canvas[data-kind=video]")[1]);
  const play = first.querySelector("button.play");
  play.click(); said.playing = play.textContent; await wait(); await wait(); play.click();
  said.paused = play.textContent;
  all("details").forEach(details => { details.open = true; });
  const sort = document.querySelectorAll("table.sortable thead button")[2];
  const order = () => all("table.sortable tbody tr").map(row => row.cells[2].dataset.value);
  sort.click(); said.down = order();
  sort.click(); said.up = order();
  said.width = [document.documentElement.scrollWidth, innerWidth];
  return said;
})().catch(error => ({ errors: [String(error)] })).then(said =>
  fetch("/answer", { method: "POST", body: JSON.stringify(said) }));
"""
WRAPPER = '<!doctype html><iframe src="page.html" style="width:390px;height:3000px;border:0"></iframe>'


def complaints(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if "CONSOLE" in line]


def command(folder: Path, *more: str) -> list[str]:
    return [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'profile'}", *more]


def ask(folder: Path) -> Any:
    """Serve `folder` to a browser, and give what its page sends back."""
    answers: queue.Queue[bytes] = queue.Queue()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            answers.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server,
        open(folder / "log", "wb") as log,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{server.server_port}/wrapper.html"
        arguments = command(folder, "--window-size=800,3200", "--remote-debugging-port=0", page)
        browser = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)
        try:
            return json.loads(answers.get(timeout=60))
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            server.shutdown()


def rgb(pixels: list[int]) -> np.ndarray:
    """[24, 32, 3] of what a canvas gives."""
    found = np.array(pixels, dtype=np.uint8).reshape(24, 32, 4)
    assert (found[..., 3] == 255).all()
    return found[..., :3]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a page of two candidates answers on a phone's width."""
    folder = tmp_path_factory.mktemp("browser")
    text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", build(data(2, ("a", HOSTILE))))
    assert count == 1
    (folder / "page.html").write_text(text.replace("</body>", f"<script>{ASK}</script></body>"))
    (folder / "wrapper.html").write_text(WRAPPER)
    answer = ask(folder)
    assert answer["errors"] == [] and complaints(folder / "log") == []
    return answer


def test_canvases_hold_the_frames_and_the_heat_map(said: dict[str, Any]) -> None:
    assert said["alerted"] == "undefined"
    assert said["readout"] == "4 / 5"
    shown = [rgb(pixels) for pixels in said["frame"][:5]]
    expected = frames(0)[3]
    assert (shown[0] == expected).all()
    colours = pictures.colour_table()
    for video, heat, level in ((shown[1], shown[2], 1), (shown[3], shown[4], 2)):
        assert (video[..., 0] == expected[..., 0] + level).all() and (video[..., 1:] == expected[..., 1:]).all()
        assert (heat == colours[round(255 * level / 2)]).all()  # the scale of the page: 0 to 2
    assert said["scales"] == list(pictures.SCALES)
    assert (rgb(said["scaled"]) == colours[round(255 * 2 / 4)]).all() and said["tops"] == ["4"]


def test_buttons_do_what_they_say(said: dict[str, Any]) -> None:
    assert (said["next"], said["around"]) == ("4", "0")
    assert (rgb(said["blink"]) == frames(0)[0]).all()
    assert (rgb(said["unblink"])[..., 0] == frames(0)[0][..., 0] + 1).all()
    assert (said["playing"], said["paused"]) == ("Pause", "Play")
    for order, reverse in ((said["down"], True), (said["up"], False)):
        known = [float(value) for value in order if value]
        assert known == sorted(known, reverse=reverse) and len(known) == 10
        assert order[len(known) :] == [""] * 3  # the float layers last


def test_it_fits_a_phone(said: dict[str, Any]) -> None:
    width, window = said["width"]
    assert window == 390 and width <= window


def test_as_it_is_it_draws_and_the_policy_lets_its_script_run(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(build(data(1, (HOSTILE,))))
    picture = tmp_path / "shot.png"
    arguments = command(
        tmp_path, f"--screenshot={picture}", "--window-size=1280,1600", (tmp_path / "page.html").as_uri()
    )
    with open(tmp_path / "log", "wb") as log:
        subprocess.run(arguments, stdout=log, stderr=log, timeout=120, check=True)
    assert complaints(tmp_path / "log") == []
    seen = np.asarray(image.open(picture).convert("RGB"))
    # the heat map: one level of one, everywhere the last colour
    assert (seen == pictures.colour_table()[255]).all(axis=-1).sum() > 100_000
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 500  # noise, and not the canvas's own background
