"""Whether a quantized folder is still what was written, as far as names, sizes and small files tell. Needs no torch.

What is computed comes from the tensors' headers and the pipeline. Of the small files each is checked where it is there:

    streamq.json    a manifest, whose files of weights are there with their sizes; other tools' folders have none
    *.index.json    lists the tensors that are there, each in its file; without it the headers say the same
    config.json     a JSON object; without it the pipeline's own is taken, but a format that is told by it is not known
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamq import outputs
from streamq.checkpoint import MAX_INDEX_BYTES, Checkpoint, load_json
from streamq.errors import UsageError
from streamq.journal import MANIFEST

MAX_CONFIG_BYTES = 4 << 20
WEIGHTS = (".safetensors", ".gguf")


def manifest_above(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Where the manifest of a folder lies (in it, or above a format's and an expert's), and what it says.

    Raises UsageError for one that is no manifest.
    """
    for place in (path, path.parent, path.parent.parent):
        document = outputs.manifest(place)
        if document is not None and (place == path or _listed(path, place, document)):
            return place, document
    return None


def _listed(path: Path, place: Path, document: dict[str, Any]) -> dict[Path, int]:
    """The files below a folder that the manifest in `place` lists, with their bytes."""
    files = {place.absolute() / name: about["bytes"] for name, about in document["files"].items()}
    return {file: size for file, size in files.items() if file.is_relative_to(path.absolute())}


def check_files(option: str, path: Path, place: Path, document: dict[str, Any]) -> None:
    """Raise UsageError for a file of weights that is missing or has another size than the manifest says."""
    for file, size in _listed(path, place, document).items():
        if file.suffix not in WEIGHTS:
            continue
        has = file.stat().st_size if file.is_file() else None
        if has != size:
            what = "is missing" if has is None else f"has {has} bytes"
            raise UsageError(
                f"--{option} {path}: {file.name} {what}, {MANIFEST} says {size} bytes; {outputs.anew(path)}"
            )


def unknown(option: str, path: Path, place: Path, document: dict[str, Any]) -> UsageError:
    """What to raise for a folder that the manifest lists and whose format cannot be told any more."""
    lost = [file.name for file in _listed(path, place, document) if not file.is_file()]
    why = f"{', '.join(lost[:3])} missing" if lost else "its files do not show it: one of them is damaged"
    return UsageError(
        f"--{option} {path}: {MANIFEST} says {', '.join(document['formats'])}, but {why}; {outputs.anew(path)}"
    )


def check_config(folder: Path) -> None:
    """Raise UsageError for a config.json that is no JSON object."""
    path = folder / "config.json"
    if path.is_file() and not isinstance(load_json(path, MAX_CONFIG_BYTES, outputs.anew(folder)), dict):
        raise UsageError(f"{path}: not a JSON object; {outputs.anew(folder)}")


def check_index(folder: Path, checkpoint: Checkpoint) -> None:
    """Raise UsageError for an index that is not that of the folder's tensors."""
    here = {name: checkpoint.files[info.file].name for name, info in checkpoint.tensors.items()}
    for path in sorted(folder.glob("*.safetensors.index.json")):
        document = load_json(path, MAX_INDEX_BYTES, outputs.anew(folder))
        listed = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(listed, dict) or not listed:
            raise UsageError(f"{path}: no `weight_map` object in it; {outputs.anew(folder)}")
        for name in [*listed, *here]:
            if listed.get(name) != here.get(name):
                says, has = (str(found.get(name, "no file"))[:80] for found in (listed, here))
                raise UsageError(f"{path}: says {name} is in {says}, it is in {has}; {outputs.anew(folder)}")
