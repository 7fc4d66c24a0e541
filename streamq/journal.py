"""What is committed, and what a second start on the same folder may trust.

The journal (`streamq-journal.jsonl`) exists while a run is unfinished: a first line that says which plan and which
source, then a line for every committed unit, appended and synced after the unit's bytes are on the disk. State is what
the journal says and nothing else; a torn last line never happened. An advisory lock on it keeps a second run out. The
manifest (`streamq.json`) is written last and is the sign that the folder is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamq import __version__
from streamq.card import is_card
from streamq.checkpoint import Source, load_json
from streamq.errors import DamagedError, RunError, UsageError
from streamq.lora import Lora
from streamq.plan import Plan, check_disk
from streamq.savers import formats
from streamq.savers.shard import PARTIAL, Place, ShardWriter, disk_errors, sha256_of, sync_folder, write_whole

JOURNAL = "streamq-journal.jsonl"
MANIFEST = "streamq.json"
MANIFEST_MODE = 0o644
MAX_MANIFEST_BYTES = 256 << 20
SMALL_NBYTES = 1 << 20
CACHE = "streamq-cache"  # folder of what a calibrated run keeps while it is unfinished
# Where a run may have left files below its output folder, besides one folder a format.
_SUBFOLDERS = ("high_noise_model", "low_noise_model", "transformer", "transformer_2")
_CACHE_SUFFIXES = (".stream", ".cache", PARTIAL)
_SUFFIXES = (".safetensors", ".json", ".gguf", PARTIAL)


@dataclass
class Commit:
    """One finished unit.

    tensors: file path -> tensor -> sha256. layers: format -> layer -> its figures (`streamq.layers.quantize`).
    vectors: format -> group -> way and values of a smoothing vector that lies in other tensors than the layers'.
    streams: where the next block's inputs lie (`streamq.calibration.cache`). synthetic: what of them is made up.
    """

    unit: str
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    layers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    vectors: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    streams: dict[str, Any] = field(default_factory=dict)
    synthetic: list[str] = field(default_factory=list)


_COMMIT_KEYS = set(asdict(Commit("")))


class Journal:
    """The open, locked journal of an unfinished run."""

    def __init__(self, path: Path, descriptor: int, commits: list[Commit]) -> None:
        self.path = path
        self.commits = commits
        self._descriptor = descriptor

    def append(self, commit: Commit) -> None:
        """Make a unit count: its bytes must be on the disk already. One that another process keeps is only followed."""
        if self._descriptor >= 0:
            _append(self._descriptor, asdict(commit))
        self.commits.append(commit)

    def remove(self) -> None:
        """The manifest is there: the journal has done its work."""
        remove_cache(self.path.parent / CACHE)
        with disk_errors(self.path):
            self.path.with_name(self.path.name + PARTIAL).unlink(missing_ok=True)  # of a restart that was cut off
            self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Release the lock; what is committed stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_journal(plan: Plan) -> Journal | None:
    """Look at the output folder and take it over: new, or where an earlier run of the same plan stopped.

    Returns None when the same plan is finished and its files are as its manifest says. Raises UsageError, touching
    nothing, for another plan's or foreign content (without `overwrite`) and for a folder at which another run works;
    RunError when the folder is finished but damaged.
    """
    folder, options = plan.options.save_path, plan.options
    path = folder / JOURNAL
    _check_folders(plan)
    while path.exists():
        descriptor = _lock(path)
        if descriptor is None:  # its owner finished between our two looks
            continue
        try:
            overwrites = _begun_by_overwrite(plan, path)
            commits = _read(plan, descriptor, path) if overwrites or not options.overwrite else None
        except UsageError:
            os.close(descriptor)
            raise
        if options.resume and commits is not None:
            if overwrites and not commits:
                _discard(path)
            return Journal(path, descriptor, commits)
        break
    else:
        descriptor = -1
        if not options.overwrite and _finished(plan):
            return None
    doomed = discardable(folder) if options.overwrite or descriptor >= 0 else set()
    check_disk(plan, freed=sum(path.lstat().st_size for path in doomed))
    journal = _start(plan, path, descriptor)
    if doomed:
        _discard(path)
    return journal


def _discard(path: Path) -> None:
    """Remove what may go, under the lock of a journal without commits; again, if an earlier start was cut off."""
    # The manifest goes first: it must not speak of what is gone.
    for old in sorted(discardable(path.parent) - {path}, key=lambda one: one.name != MANIFEST):
        with disk_errors(old):
            old.unlink(missing_ok=True)
    remove_cache(path.parent / CACHE)


def _begun_by_overwrite(plan: Plan, path: Path) -> bool:
    """Whether the unfinished run is this plan's and had --overwrite itself: then the same command goes on."""
    with open(path, "rb") as stream:
        first = stream.readline()
    try:
        header = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(header, dict) and header.get("plan") == plan.hash and header.get("overwrite") is True


def _lock(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; not a journal of streamq's, remove it") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(
            f"--save_path {path.parent}: another run is at work on it; wait for it, or choose another"
        ) from None
    if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:
        os.close(descriptor)
        return None
    return descriptor


def _check_folders(plan: Plan) -> None:
    root = plan.options.save_path
    for name in {*(file.path for file in plan.files), *(path for path, _, _ in plan.documents)}:
        folder = (root / name).parent
        if os.path.lexists(folder) and not folder.is_dir():
            raise UsageError(
                f"{folder}: a file, where the output has a folder; remove it, or choose another --save_path"
            )
    for name in plan.cards:  # --overwrite discards models, not what somebody wrote
        if os.path.lexists(root / name) and not is_card(root / name):
            raise UsageError(
                f"{root / name}: not a model card of streamq's, which would take its place; move it, or choose another"
                " --save_path"
            )
    cache = root / CACHE
    if plan.calibration is not None and os.path.lexists(cache) and (cache.is_symlink() or not cache.is_dir()):
        raise UsageError(f"{cache}: not a folder of the run's own; remove it, or choose another --save_path")


def _start(plan: Plan, path: Path, old: int) -> Journal:
    """A journal with its first line: a new one, or one that takes the place of the locked one behind `old`."""
    beside = path.with_name(path.name + PARTIAL) if old >= 0 else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new_only = os.O_EXCL if old < 0 else os.O_TRUNC
        descriptor = os.open(beside, os.O_RDWR | os.O_APPEND | os.O_CREAT | new_only | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileExistsError, BlockingIOError):
        raise UsageError(f"--save_path {path.parent}: another run has just started on it; wait for it") from None
    except OSError as error:
        raise UsageError(
            f"--save_path {path.parent}: {error.strerror}; choose a folder that can be written to"
        ) from error
    header = {"streamq": __version__, "plan": plan.hash, "sources": source_times(plan)}
    _append(descriptor, header | {"overwrite": plan.options.overwrite})
    if old >= 0:
        with disk_errors(path):
            os.replace(beside, path)
        os.close(old)
    sync_folder(path.parent)
    sync_folder(path.parent.absolute().parent)
    return Journal(path, descriptor, [])


def _append(descriptor: int, value: dict[str, Any]) -> None:
    line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
    try:
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    except OSError as error:
        raise RunError(f"{JOURNAL}: {error.strerror}; committed blocks are kept: make room, then run again") from error


def source_times(plan: Plan) -> list[list[Any]]:
    """When which source file was changed last: weights may differ under equal headers."""
    return [
        [part.expert.name, file.name, file.size, file.mtime_ns]
        for part in plan.experts
        for file in part.expert.model.checkpoint.files
    ] + [["--lora", file.name, file.size, file.mtime_ns] for lora in plan.loras for file in lora.checkpoint.files]


def _read(plan: Plan, descriptor: int, path: Path) -> list[Commit] | None:
    """The commits that count, with anything torn behind them cut off; None where no run of any plan got started."""
    with open(path, "rb") as stream:
        raw = stream.read()
    lines, kept = [], 0
    for line in raw.splitlines(keepends=True):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            break
        lines.append(value)
        kept += len(line)
    if not lines:  # a run that was cut off before its first line has left no other file either
        if other := _any_file(path.parent):
            raise UsageError(
                f"{path}: not a journal of streamq's, beside {other}; choose another folder, or --overwrite"
            )
        return None
    if lines[0].get("plan") != plan.hash:
        raise UsageError(
            f"--save_path {path.parent}: holds another plan's unfinished output (plan {str(lines[0].get('plan'))[:12]},"
            f" this one is {plan.hash[:12]}); give the options that it was started with, --overwrite, or another folder"
        )
    if not plan.options.resume:
        return None
    if lines[0].get("sources") != source_times(plan):
        raise UsageError(
            f"{plan.source_path}: its files{' or LoRAs' if plan.loras else ''} are not those that the unfinished run in"
            f" {path.parent} was reading (their time of change differs); restore them, or start again with --no_resume"
        )
    commits = [
        Commit(line["unit"], line["tensors"], line["layers"], line["vectors"], line["streams"], line["synthetic"])
        for line in lines[1:]
        if line.keys() == _COMMIT_KEYS
    ]
    units = [unit.key for unit in plan.units]
    if len(commits) < len(lines) - 1 or [commit.unit for commit in commits] != units[: len(commits)]:
        raise UsageError(
            f"{path}: damaged: its {len(lines) - 1} commits are not this plan's; start again with --no_resume"
        )
    os.ftruncate(descriptor, kept)
    return commits


def _any_file(folder: Path) -> str | None:
    """Some file below a folder, other than a journal in it; folders alone are what an early end may leave behind."""
    for path in folder.rglob("*") if folder.exists() else ():
        if path != folder / JOURNAL and (path.is_symlink() or not path.is_dir()):
            return str(path.relative_to(folder))
    return None


def _finished(plan: Plan) -> bool:
    folder = plan.options.save_path
    manifest = folder / MANIFEST
    if not manifest.is_file():
        first = _any_file(folder)
        if first is None:
            return False
        raise UsageError(
            f"--save_path {folder}: not empty ({first}) and not an output of streamq; choose another folder, or"
            " --overwrite to discard the model files in it"
        )
    document = read_manifest(manifest)
    if document["plan"] != plan.hash:
        raise UsageError(
            f"--save_path {folder}: holds another plan's finished output (plan {document['plan'][:12]}, this one is"
            f" {plan.hash[:12]}); choose another folder, or --overwrite"
        )
    for name, about in document["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != about["bytes"] or sha256_of(path) != about["sha256"]:
            found = "is missing" if size < 0 else f"has {size} bytes, made with {about['bytes']}"
            found = found if size != about["bytes"] else "has other content than the manifest says"
            raise RunError(f"{path}: {found}; make it anew with --overwrite")
    _check_same_weights(plan, document)
    return True


def _check_same_weights(plan: Plan, document: dict[str, Any]) -> None:
    """Raise UsageError if the finished output was made from other weights under equal headers: two finetunes, say.

    Compares the small tensors that passed through as they are (norms, modulation) with the manifest's hashes, and the
    LoRAs' own.
    """
    for lora, made in zip(plan.loras, document.get("lora", []), strict=False):
        path = lora.checkpoint.files[0].path
        if sha256_of(path) != made.get("sha256"):
            raise UsageError(
                f"--save_path {plan.options.save_path}: finished, but with another LoRA than --lora {path}; choose"
                " another folder, or --overwrite"
            )
    for part in plan.experts:
        with closing(Source(part.expert.model.checkpoint)) as source:
            for step in (step for unit in part.units for step in unit.steps if step.passed and not step.deltas):
                for info, place in zip(step.sources, step.outputs[0].places, strict=True):
                    if info.nbytes > SMALL_NBYTES or place.dtype != info.dtype:
                        continue
                    content = bytearray(info.nbytes)
                    source.read(info, 0, memoryview(content))
                    expected = document["files"][plan.files[place.file].path].get("tensors", {}).get(place.name)
                    if hashlib.sha256(content).hexdigest() != expected:
                        raise UsageError(
                            f"--save_path {plan.options.save_path}: finished, but from other weights:"
                            f" {source.checkpoint.where(info)} differs; choose another folder, or --overwrite"
                        )


def discardable(folder: Path) -> set[Path]:
    """What a run, streamq's or another tool's, left: model files, journal, manifest, and what the manifest lists.

    Other files stay: `--overwrite` on the wrong folder must not cost anybody's holiday pictures.
    """
    doomed = {folder / JOURNAL}
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            listed = read_manifest(manifest)["files"]
            doomed |= {folder / name for name in listed}
        except UsageError:
            pass  # a broken manifest lists nothing
    places = [folder, *(folder / name for name in _SUBFOLDERS)]
    places += [folder / form / name for form in formats() for name in ("", *_SUBFOLDERS)]
    for place in places:
        if place.is_dir() and (place == folder or not place.is_symlink()):
            doomed |= {path for path in place.iterdir() if path.name.endswith(_SUFFIXES) or is_card(path)}
    if not (folder / CACHE).is_symlink():
        doomed |= {path for path in (folder / CACHE).glob("*") if path.name.endswith(_CACHE_SUFFIXES)}
    return {path for path in doomed if path.is_file() or path.is_symlink()}


def remove_cache(folder: Path) -> None:
    """The run is complete, or begins anew: what it kept between blocks goes. Anybody else's files stay."""
    if folder.is_dir() and not folder.is_symlink():
        with disk_errors(folder):
            for path in folder.iterdir():
                if path.name.endswith(_CACHE_SUFFIXES):
                    path.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
        sync_folder(folder.parent)


def open_files(plan: Plan, journal: Journal, *, shared: bool) -> list[ShardWriter]:
    """Every output file: new ones allocated in full, begun ones hashed again as far as they are committed.

    Raises UsageError when what the journal says is committed is not there, RunError on a full disk.
    """
    units = {unit.key: unit for unit in plan.units}
    committed: dict[int, list[tuple[Place, str]]] = {}
    for commit in journal.commits:
        for step in units[commit.unit].steps:
            for place in (place for output in step.outputs for place in output.places):
                digest = commit.tensors.get(plan.files[place.file].path, {}).get(place.name)
                if digest is None:
                    raise UsageError(f"{journal.path}: damaged: no {place.name} in {commit.unit}; use --no_resume")
                committed.setdefault(place.file, []).append((place, digest))
    writers = [ShardWriter(plan.options.save_path, file, shared=shared) for file in plan.files]
    for number, writer in enumerate(writers):
        if number in committed:
            problem = writer.reopen(committed[number])
            if problem:
                raise UsageError(
                    f"{plan.options.save_path}: cannot be resumed: {problem}; start again with --no_resume"
                )
        else:
            writer.create()
    return writers


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest, checked as far as its readers rely on it. Raises UsageError, also for a path out of the folder."""

    def bad(what: str) -> UsageError:
        return UsageError(f"{path}: not a manifest of streamq's: {what}; make the folder anew with --overwrite")

    try:
        document = load_json(path, MAX_MANIFEST_BYTES)
    except DamagedError as error:
        raise bad(error.what.removeprefix(f"{path}: ")) from error
    if not isinstance(document, dict) or not isinstance(document.get("plan"), str):
        raise bad("no plan in it")
    files, made = document.get("files"), document.get("formats")
    if not isinstance(files, dict) or not isinstance(made, dict):
        raise bad("no files or no formats in it")
    for name, about in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise bad(f"{name!r} lies outside the folder")
        if (
            not isinstance(about, dict)
            or not isinstance(about.get("bytes"), int)
            or not isinstance(about.get("sha256"), str)
        ):
            raise bad(f"{name!r} without bytes and sha256")
        if not isinstance(about.get("tensors", {}), dict):
            raise bad(f"{name!r} with tensors that are no object")
    merged = document.get("lora", [])
    if not isinstance(merged, list) or not all(isinstance(one, dict) for one in merged):
        raise bad("lora that is no list of objects")
    for name, about in made.items():
        layers = about.get("layers") if isinstance(about, dict) else None
        if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
            raise bad(f"format {name!r} without layers")
    return document


def figures(commits: Iterable[Commit]) -> dict[str, dict[str, dict[str, Any]]]:
    """Format -> layer -> what was measured of it."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for commit in commits:
        for form, layers in commit.layers.items():
            found.setdefault(form, {}).update(layers)
    return found


def lora_entries(loras: Iterable[Lora]) -> list[dict[str, Any]]:
    """What a manifest says of the LoRAs that were merged. Raises RunError for one that is gone."""
    try:
        return [lora.identity | {"sha256": sha256_of(lora.checkpoint.files[0].path)} for lora in loras]
    except OSError as error:
        raise RunError(f"{error.filename}: {error.strerror}; restore it, then run the same command") from error


def write_manifest(plan: Plan, commits: list[Commit], hashes: dict[str, str]) -> dict[str, Any]:
    """Write `streamq.json`. `hashes`: path -> sha256 of every output file. Holds nothing that two runs differ in."""
    tensors: dict[str, dict[str, str]] = {}
    made = figures(commits)
    vectors: dict[str, dict[str, dict[str, str]]] = {}
    for commit in commits:
        for path, found in commit.tensors.items():
            tensors.setdefault(path, {}).update(found)
        for form, folded in commit.vectors.items():
            vectors.setdefault(form, {}).update(folded)
    synthetic = sorted({what for commit in commits for what in commit.synthetic})
    sizes = {f.path: f.size for f in plan.files} | {path: len(content) for path, content, _ in plan.documents}
    model = plan.experts[0].expert.model
    document = {
        "streamq": __version__,
        "plan": plan.hash,
        "device": plan.device_kind,
        "options": {"match": plan.options.match, "seed": plan.options.seed, "layout": plan.options.layout,
                    "max_shard_size": plan.options.max_shard_size},
        "model": {"family": model.family, "blocks": model.n_blocks, "vace_blocks": model.n_vace_blocks,
                  "dim": model.dim, "layout": model.layout, "experts": [p.expert.name for p in plan.experts]},
        "source": plan.sources,
        **({"lora": lora_entries(plan.loras)} if plan.loras else {}),
        **({"calibration": plan.calibration.identity | {"synthetic": synthetic}} if plan.calibration else {}),
        "formats": {
            target.name: {
                "folder": target.folder,
                "recipe": target.recipe.document,
                "layers": {
                    name: {"type": kind} | made.get(target.name, {}).get(name, {})
                    for name, kind in plan.layers[target.name].items()
                },
            }
            | ({"smoothing": vectors[target.name]} if target.name in vectors else {})
            for target in plan.targets
        },
        "files": {
            path: {"bytes": sizes[path], "sha256": digest} | ({"tensors": tensors[path]} if path in tensors else {})
            for path, digest in sorted(hashes.items())
        },
    }  # fmt: skip
    write_whole(plan.options.save_path / MANIFEST, json.dumps(document, indent=1).encode(), MANIFEST_MODE)
    return document
