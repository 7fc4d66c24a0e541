"""Making a calibration set: what it will cost, whether its folder may be used, and the work itself.

    texts, pictures, clips -> [encoders] -> inputs -> [outside of blocks, an expert at a time] -> file -> calib.json

Nothing is created before all that can be refused has been: files, sizes, prompts, dumps. An expert's file appears whole
under its final name, `calib.json` last; a run that was ended starts again, over what it left. Same settings, same
model, same kind of device and number of threads: the same bytes. Needs no torch until `make_set` is called.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.calibration.plan import CALIBRATED_FAMILIES
from streamq.calibration.settings import (
    TRAIN_STEPS,
    CalibSettings,
    Schedule,
    check_settings,
    latent_shape,
    no_steps,
    schedule_of,
    states_len,
    tokens_of,
)
from streamq.calibration.store import DOCUMENT, CalibSet, file_name, open_set, write_document
from streamq.checkpoint import Source
from streamq.device import Device
from streamq.errors import RunError, UsageError
from streamq.savers.shard import PARTIAL, disk_errors
from streamq.wan import Expert, Model

if TYPE_CHECKING:
    from streamq.calibration.encoders import Parts

THREADS = "STREAMQ_THREADS"  # in the environment
THUMBNAILS = "thumbnails"
THUMBNAIL = re.compile(r"\d{2,}\.png(\.partial)?")
FINGERPRINT_BYTES = 64  # of each tensor


def make_set(
    folder: Path, settings: CalibSettings, experts: list[Expert], model_path: Path, device: Device, *,
    document: str = DOCUMENT, suffix: str = ".safetensors", about: Callable[[str], None],
) -> CalibSet:  # fmt: skip
    """Make a set in `folder`. `about` is told, in plain sentences, what is synthetic and how far the work is.

    Raises UsageError before anything is created, RunError when the work fails; the folder then holds no document.
    """
    import torch

    from streamq.calibration.conditions import gather
    from streamq.calibration.dumped import dumped
    from streamq.calibration.encoders import find_parts
    from streamq.calibration.interpolate import interpolated, write_expert
    from streamq.calibration.trajectory import Trajectory

    check(settings, experts)
    where = getattr(device, "device", torch.device("cpu"))
    model, parts = experts[0].model, find_parts(model_path)
    schedule = schedule_for(settings, experts, parts)
    synthetic: list[str] = []
    warnings: list[str] = []
    with all_threads():
        run, works = None, {}
        if settings.mode == "dump":
            works = dumped(settings, experts, schedule.boundary)
        else:
            conditions = gather(settings, model, parts, where, about)
            synthetic, warnings = conditions.synthetic, conditions.warnings
            if settings.mode == "trajectory":
                run = Trajectory(conditions, schedule, experts, parts, where, about)
            else:
                sizes = tokens_of(model, settings), states_len(model)
                works = {expert.name: interpolated(conditions, schedule, expert.name, *sizes) for expert in experts}
        with at_work(folder):
            _clear(folder, document, suffix)
            if run is not None:
                made = run.write(folder, suffix, thumbnails=document == DOCUMENT)
            else:
                made = {
                    expert.name: write_expert(folder, expert, works[expert.name], settings.dtype, where, suffix, about)
                    for expert in experts
                }
            facts = describe(settings, experts, schedule) | {"synthetic": synthetic, "warnings": warnings}
            write_document(folder, document, facts, made)
    return open_set(folder, document)


def _clear(folder: Path, document: str, suffix: str) -> None:
    """Remove an older set, whole or not, and nothing else; its document first: it must not speak of what is gone."""
    doomed = [folder / document]
    for expert in ("", "high_noise_model", "low_noise_model"):
        doomed += [folder / (file_name(expert, suffix) + ending) for ending in ("", PARTIAL)]
    if document == DOCUMENT and (folder / THUMBNAILS).is_dir():
        doomed += [path for path in (folder / THUMBNAILS).iterdir() if THUMBNAIL.fullmatch(path.name)]
    for path in doomed:
        with disk_errors(path):
            path.unlink(missing_ok=True)


def check(settings: CalibSettings, experts: Sequence[Expert]) -> None:
    """Raise UsageError for what cannot be made, as far as settings and headers tell."""
    check_settings(settings)
    model = experts[0].model
    if model.family not in CALIBRATED_FAMILIES:
        raise UsageError(
            f"{model.checkpoint.root}: a {model.family} model, which streamq cannot replay; it makes calibration sets"
            f" for {', '.join(CALIBRATED_FAMILIES)}"
        )
    if settings.mode == "dump":
        if settings.dump is None:
            raise UsageError("--mode dump: no dump; give it with --dump PATH")
        return
    latent_shape(model, settings)


def check_schedule(settings: CalibSettings, experts: Sequence[Expert], model_path: Path) -> None:
    """Raise UsageError for settings of which some expert would get no sample, besides what `check` refuses."""
    from streamq.calibration.encoders import find_parts

    check(settings, experts)
    schedule = schedule_for(settings, experts, find_parts(model_path))
    for expert in experts:
        if not schedule.steps_of(expert.name):
            raise no_steps(len(schedule.sigmas), expert.name, TRAIN_STEPS * schedule.boundary)


def schedule_for(settings: CalibSettings, experts: Sequence[Expert], parts: Parts) -> Schedule:
    """The schedule, by the settings, else by the pipeline's own configuration, else by Wan-AI's."""
    scheduler = parts.scheduler
    own = {
        "flow_shift": scheduler.get("flow_shift", scheduler.get("shift")),
        "boundary_ratio": parts.model_index.get("boundary_ratio"),
    }
    return schedule_of(settings, experts[0].model.family, len(experts), own)


def describe(settings: CalibSettings, experts: Sequence[Expert], schedule: Schedule) -> dict[str, Any]:
    """What a set's document says of how it was made. Equal for equal sets, wherever they and the model lie."""
    model = experts[0].model
    return {
        "family": model.family, "dim": model.dim, "mode": settings.mode, "settings": settings.identity(),
        "schedule": {
            "shift": schedule.shift, "guidance": schedule.guidance, "steps": len(schedule.sigmas),
            "boundary": schedule.boundary,
        },
        "model": {expert.name: fingerprint(expert.model) for expert in experts},
        "data": {name: _stamp(path) for name in ("videos", "latents", "text_embeds", "dump")
                 if (path := getattr(settings, name)) is not None},
    }  # fmt: skip


def fingerprint(model: Model) -> str:
    """Tells models apart, whatever their layout and shards: names, dtypes, shapes, each tensor's first bytes; LoRAs."""
    digest = hashlib.sha256()
    with closing(Source(model.checkpoint)) as source:
        for name, info in sorted(model.tensors.items()):
            first = bytearray(min(FINGERPRINT_BYTES, info.nbytes))
            source.read(info, 0, memoryview(first))
            digest.update(f"{name} {info.dtype} {info.shape}".encode() + bytes(first))
    for lora in model.lora.loras if model.lora else ():
        digest.update(repr(lora.identity).encode())
    return digest.hexdigest()


def _stamp(path: Path) -> str:
    """sha256 of the names and sizes of what the user gave."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    lines = [f"{file.relative_to(path.parent)} {file.stat().st_size}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def all_threads() -> Iterator[None]:
    """Let torch use every core that this process may: a model's forward is not a stream of small tiles.

    Several processes on a machine, which torchrun counts, divide them; STREAMQ_THREADS says how many instead. On a CPU
    factorizations and long sums round by how many there are. Raises UsageError.
    """
    import torch

    before = torch.get_num_threads()
    given, beside = os.environ.get(THREADS, ""), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if given and not (given.isdecimal() and int(given)):
        raise UsageError(f"{THREADS}={given}: a number of threads, at least 1")
    torch.set_num_threads(int(given or max(1, len(os.sched_getaffinity(0)) // beside)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Create the folder, show that files can be made in it, and keep a second run out of it.

    Raises UsageError, RunError for a disk that is full or fails.
    Folders that are made here go again if nothing was put into them: what is refused later leaves no trace.
    """
    new: list[Path] = []
    descriptor = -1
    try:
        try:
            new += [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            with tempfile.TemporaryFile(dir=folder):  # os.access says yes to root, of /proc too
                pass
        except OSError as error:
            why = f"--save_path {folder}: no files can be made in it ({error.strerror}); choose another folder"
            # A full or a failing disk is no wrong use.
            raise (RunError if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT) else UsageError)(why) from error
        if not _locked(descriptor):
            new.clear()
            raise UsageError(f"--save_path {folder}: another run is at work on it; wait for it, or choose another")
        yield
    finally:
        for place in new:
            with suppress(OSError):  # there is something in it
                place.rmdir()
        if descriptor >= 0:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
