"""Prompts: a built-in list, and the files that people have from other tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamq.calibration.settings import Prompt
from streamq.errors import UsageError

MAX_BYTES = 16 << 20
FOLDER_FILES = ("index.jsonl", "samples.json")  # msModelSlim's and LLMC's names inside a data set's folder

BUILT_IN: tuple[str, ...] = (
    "A woman in a yellow raincoat walks slowly through a crowded night market, steam rising from food stalls, handheld"
    " camera following from behind, neon light on wet pavement.",
    "Close-up of an old man's hands carving a small wooden bird, shavings curling off the knife, warm window light.",
    "A red fox trots across a snowy field at dawn, stops, and looks straight into the camera, its breath visible.",
    "Two children chase each other around a garden sprinkler, water drops frozen in the sunlight, slow motion.",
    "Aerial view of a coastal road winding along cliffs, a single white car, waves breaking far below; the camera"
    " glides forward and tilts down.",
    "A shop window at dusk, a painted wooden sign above the door reads \"OPEN UNTIL LATE\", people pass by, reflections"
    " move across the glass.",
    "Time-lapse of thunderclouds building over a wheat field, lightning in the distance, shadows racing past.",
    "A chef tosses vegetables in a flaming wok, sparks fly, fast cuts of steam and sizzling oil, shallow focus.",
    "An astronaut floats through a ruined space station, debris drifting past, Earth glowing blue through a window.",
    "A tabby cat leaps from a bookshelf onto a sofa, cushions bounce, dust in the light, seen from the side.",
    "Macro shot of ink drops blooming in clear water, deep blue and orange clouds folding into each other, black"
    " background.",
    "A steam train crosses a stone viaduct in the rain, thick white smoke trailing, wide static shot, muted colours.",
    "A street dancer spins on his head in an underground passage, friends clap around him, the camera circles fast.",
    "Watercolour animation: a paper boat drifts down a stream between giant mushrooms, soft pastel washes, gentle pan.",
    "A school of silver fish turns as one above a coral reef, sunbeams through the water, a turtle glides into view.",
    "Empty subway platform at night, flickering tube lights, a train rushes through without stopping, papers whirl up.",
    "Portrait of a young violinist playing with closed eyes on a dark stage, a single spotlight, slow push-in.",
    "A herd of elephants crosses a dusty plain at sunset, calves trotting between the adults, long telephoto view.",
    "A robot arm in a bright factory sorts coloured blocks onto a moving belt, precise and quick, seen from above.",
    "Claymation of a round green monster baking a cake in a tiny kitchen, flour everywhere, playful jerky movement.",
    "A surfer rides inside a curling wave, water wall glittering, filmed from the board, spray hitting the lens.",
    "Black-and-white film: a man in a hat lights a cigarette under a street lamp, fog rolls down the alley, 1940s"
    " style.",
    "Abstract geometric shapes, cubes and ribbons of gold and teal, morph and rotate in perfect symmetry on white.",
    "A soccer player kicks a ball into the top corner, the net ripples, the crowd behind rises in a blur, low angle.",
)  # fmt: skip


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file, or of a data set's folder (`index.jsonl` or `samples.json` in it).

    Text: one prompt a line, `#` starts a comment line. `.jsonl`: an object a line with `text` or `prompt`, and
    optionally `negative_prompt`, `image`, `last_image`; msModelSlim's `index.jsonl` is one. `.json`: a list of such
    objects; LLMC's `samples.json` is one. Pictures are looked for beside the file. Raises UsageError.
    """
    path = _inside(path)
    text = _read(path)
    if path.suffix.lower() == ".jsonl":
        found = list(_from_lines(path, text))
    elif path.suffix.lower() == ".json":
        found = list(_from_list(path, text))
    else:
        stripped = (line.strip() for line in text.splitlines())
        found = [Prompt(line) for line in stripped if line and not line.startswith("#")]
    if not found:
        raise UsageError(f"{path}: no prompt in it; write one a line")
    return tuple(found)


def _inside(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    raise UsageError(f"{path}: a folder without {' or '.join(FOLDER_FILES)}; give the file of prompts itself")


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such file of prompts; check the path")
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes, prompts are at most {MAX_BYTES}; give fewer")
        return path.read_bytes().decode("utf-8-sig")  # Windows editors write a byte order mark
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; check the path and its permissions") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error


def _from_lines(path: Path, text: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield _prompt(path, f"{path}:{number}", _parse(line, f"{path}:{number}"))


def _from_list(path: Path, text: str) -> Iterator[Prompt]:
    document = _parse(text, str(path))
    if not isinstance(document, list):
        raise UsageError(f"{path}:1: a JSON {_kind(document)}, not a list of objects with `prompt`; wrap it in [ ]")
    for number, entry in enumerate(document, 1):
        yield _prompt(path, f"{path}: entry {number}", entry)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if "\n" not in text.strip() and ":" in where else f"{where}:{error.lineno}"
        raise UsageError(f"{place}: not valid JSON ({error.msg} at column {error.colno}); correct it") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise UsageError(f"{where}: not JSON that can be read ({error}); correct it") from error


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")


def _prompt(path: Path, where: str, entry: Any) -> Prompt:
    if not isinstance(entry, dict):
        raise UsageError(f'{where}: a JSON {_kind(entry)}, not an object; write {{"text": "…"}}')
    text = entry.get("text", entry.get("prompt"))
    if text is None:
        raise UsageError(f"{where}: no `text` (or `prompt`) in it; add one")
    negative = entry.get("negative_prompt") or ""
    for name, value in (("text", text), ("negative_prompt", negative)):
        if not isinstance(value, str):
            raise UsageError(f"{where}: `{name}` is a {_kind(value)}, not a string; put it in quotes")
    return Prompt(text, negative, _picture(path, where, entry, "image"), _picture(path, where, entry, "last_image"))


def _picture(path: Path, where: str, entry: dict[str, Any], key: str) -> Path | None:
    name = entry.get(key)
    if name is None or name == "":
        return None
    if not isinstance(name, str):
        raise UsageError(f"{where}: `{key}` is a {_kind(name)}, not the name of a file; put one there or leave it out")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
        raise UsageError(f"{where}: `{key}` {name[:80]!r} is an address; download it, and name the file")
    picture = path.parent / name
    try:
        there = picture.is_file()
    except (OSError, ValueError):  # too long, or a NUL in it
        there = False
    if not there:
        raise UsageError(f"{where}: `{key}` {name[:200]!r} is not a file beside {path.name}; put it there")
    return picture
