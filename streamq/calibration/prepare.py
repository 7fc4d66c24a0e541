"""Before a calibration set is made: what the user asked for, what it will cost, and whether its folder may be used.

Headers and small files only; creates nothing. Needs no torch.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamq import hub, wan
from streamq.calibration import encoders, make, store
from streamq.calibration.encoders import EMBEDDING, Parts
from streamq.calibration.plan import DIFFUSERS_BASE, activation_nbytes
from streamq.calibration.prompts import BUILT_IN, load_prompts
from streamq.calibration.settings import (
    CalibSettings,
    Prompt,
    Schedule,
    block_flops,
    check_settings,
    parse_video_size,
    states_len,
    tokens_of,
)
from streamq.calibration.store import DOCUMENT, CalibSet, SampleInfo, Shapes, open_set, shapes_of
from streamq.checkpoint import DTYPE_SIZE, open_checkpoint
from streamq.device import HOST_BASE, MiB, kind_of
from streamq.errors import UsageError
from streamq.plan import DISK_RESERVE, existing_parent
from streamq.planner import check_paths, check_sources_outside
from streamq.wan import Expert, Model, unit_of

OURS = re.compile(r"(inputs(-high_noise_model|-low_noise_model)?\.safetensors|calib\.json)(\.partial)?|thumbnails")
OF_INTERPOLATE = ("prompts", "prompt", "videos", "latents", "text_embeds", "size", "frame_num", "sample_steps",
                  "time_bins", "guidance", "shift")  # fmt: skip


@dataclass(frozen=True)
class CalibJob:
    """A set that can be made, or `finished`, the one that is there already."""

    settings: CalibSettings
    source: Path
    save_path: Path
    experts: list[Expert]
    outlook: Outlook
    warnings: list[str]
    finished: CalibSet | None


def settings_of(args: argparse.Namespace) -> CalibSettings:
    """The command line's settings. Raises UsageError for options that contradict each other."""
    mode = args.mode or ("dump" if args.dump is not None else "interpolate")
    given = {name for name in OF_INTERPOLATE if getattr(args, name) not in (None, [])}
    for one, other in (("prompts", "prompt"), ("text_embeds", "prompts"), ("text_embeds", "prompt"),
                       ("videos", "latents")):  # fmt: skip
        if {one, other} <= given:
            raise UsageError(f"--{one} and --{other} exclude each other; give one of them")
    if mode != "dump" and args.dump is not None:
        raise UsageError(f"--dump {args.dump} goes with --mode dump, not {mode}; leave one of them out")
    if mode == "dump" and given:
        raise UsageError(f"--mode dump takes everything from the dump: leave out --{sorted(given)[0]}")
    files = {}
    for name in ("prompts", "videos", "latents", "text_embeds", "dump"):
        if (path := getattr(args, name)) is not None:
            files[name] = path.expanduser()
            if not files[name].exists():
                raise UsageError(f"--{name} {path}: no such file or folder; check the path")
    file = files.pop("prompts", None)
    prompts = load_prompts(file) if file else tuple(Prompt(text) for text in args.prompt)
    names = ("num_samples", "frame_num", "sample_steps", "time_bins", "guidance", "shift")
    chosen: dict[str, Any] = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.size is not None:
        chosen["size"] = parse_video_size(args.size)
    settings = CalibSettings(mode=mode, seed=args.seed, dtype=args.dtype, prompts=prompts, **chosen, **files)
    check_settings(settings)
    return settings


def prepare(
    settings: CalibSettings, model_path: str, model_type: str | None, save_path: Path, device: str,
    budgets: tuple[int | None, int | None], *, overwrite: bool,
) -> CalibJob:  # fmt: skip
    """Check everything that headers tell. `budgets`: bytes of host and of device memory. Raises UsageError."""
    source = hub.resolve(model_path, download=True)
    try:
        check_paths(source, save_path)
    except OSError as error:  # a name that is too long, links in a circle
        raise UsageError(f"--save_path {str(save_path)[:200]}: {error.strerror}; give another folder") from error
    kind = kind_of(device)
    experts = wan.open_model(source)
    wan.check_model_type(model_type, experts)
    for expert in experts:
        check_sources_outside(expert, save_path)
    make.check(settings, experts)
    parts = encoders.find_parts(source)
    schedule = make.schedule_for(settings, experts, parts)
    warnings = [text for expert in experts for text in expert.model.warnings]
    if settings.guidance is not None and settings.mode == "interpolate":
        warnings.append("--guidance: of no use in interpolate, which mixes noise into latents; left out")
    if settings.mode == "trajectory" and (settings.videos or settings.latents) and experts[0].model.family in (
        "t2v", "vace"
    ):  # fmt: skip
        raise UsageError(
            f"--mode trajectory starts from noise, and a {experts[0].model.family} model takes no picture: leave out"
            " --videos and --latents"
        )
    finished = look_at(save_path, lambda: make.describe(settings, experts, schedule), overwrite=overwrite)
    found = outlook(settings, experts, parts, kind)
    if finished is None:
        _check_budgets(found, budgets, kind, warnings)
        _check_disk(save_path, found.nbytes)
    return CalibJob(settings, source, save_path, experts, found, list(dict.fromkeys(warnings)), finished)


def _check_budgets(found: Outlook, budgets: tuple[int | None, int | None], kind: str, warnings: list[str]) -> None:
    host, device = budgets
    if device is not None and kind == "cpu":
        warnings.append("--max_device_memory: ignored, the device is the cpu; its memory is --max_host_memory")
        device = None
    for option, budget, need in (("--max_host_memory", host, found.peak_host_bytes),
                                 ("--max_device_memory", device, found.peak_device_bytes)):  # fmt: skip
        if budget is not None and need > budget:
            raise UsageError(
                f"{option}: a budget of {budget} bytes, but making this set takes about {need}; raise it, or give a"
                " smaller --size or --frame_num"
            )


def _check_disk(save_path: Path, nbytes: int) -> None:
    free, need = shutil.disk_usage(existing_parent(save_path)).free, nbytes + DISK_RESERVE
    if need > free:
        raise UsageError(
            f"--save_path {save_path}: {need} bytes are to be written, {free} are free on its disk; make room or choose"
            " another disk"
        )


def look_at(save_path: Path, wanted: Callable[[], dict[str, Any]], *, overwrite: bool) -> CalibSet | None:
    """The finished set of the same settings, model and data in SAVE_PATH, or None where one can be made.

    Raises UsageError for other content: another set, or files that are no set's.
    """
    if not save_path.is_dir() or overwrite:
        return None
    foreign = sorted(path.name for path in save_path.iterdir() if not OURS.fullmatch(path.name))
    if foreign:
        raise UsageError(
            f"--save_path {save_path}: not empty ({', '.join(foreign[:3])}); choose another folder, or --overwrite"
        )
    if not (save_path / DOCUMENT).is_file():
        return None  # empty, or what an interrupted run has left
    found = open_set(save_path)
    for key, value in wanted().items():
        if (there := found.document.get(key)) != value:
            raise UsageError(
                f"--save_path {save_path}: holds another set{_difference(key, there, value)}; choose another folder, or"
                " --overwrite"
            )
    for name in found.experts:
        store.check_content(found, name)
    return found


def _difference(key: str, there: Any, wanted: Any) -> str:
    if isinstance(there, dict) and isinstance(wanted, dict):
        for name in wanted:
            if there.get(name) != wanted[name]:
                both = f", {str(there.get(name))[:60]} instead of {str(wanted[name])[:60]}" if key == "settings" else ""
                return f" ({key}: {name or 'another'}{both})"
    return f" ({key}: {str(there)[:60]} instead of {str(wanted)[:60]})"


# -- Cost --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outlook:
    """What a set will take, and what a replay of it in `quant` will. tokens 0: only the dump tells.

    forwards, make_flops: of whole forwards while it is made (trajectory only). Bytes are an upper bound.
    """

    samples: int
    experts: tuple[str, ...]
    tokens: int
    prompts: int
    forwards: int
    make_flops: int
    replay_flops: int
    nbytes: int
    streams_nbytes: int
    peak_host_bytes: int
    peak_device_bytes: int

    def to_json(self) -> dict[str, Any]:
        """For `calib --json`."""
        return {
            "samples_per_expert": self.samples, "tokens": self.tokens, "forwards": self.forwards,
            "make_pflop": self.make_flops / 1e15, "replay_pflop": self.replay_flops / 1e15, "set_bytes": self.nbytes,
            "peak_host_bytes": self.peak_host_bytes, "peak_device_bytes": self.peak_device_bytes,
        }  # fmt: skip


def outlook(settings: CalibSettings, experts: Sequence[Expert], parts: Parts, kind: str) -> Outlook:
    """Predict from headers. `kind` of the device: cpu, cuda, npu."""
    model, schedule = experts[0].model, make.schedule_for(settings, experts, parts)
    tokens = 0 if settings.mode == "dump" else tokens_of(model, settings)
    head_dim = model.dim // int(model.native_config["num_heads"])
    shapes = shapes_of(model, head_dim, tokens, states_len(model), settings.dtype)
    texts = min(settings.num_samples, 2 * len(settings.prompts) if settings.prompts else len(BUILT_IN) + 1)
    rows = 2 if model.family == "ti2v" else 1
    samples = [SampleInfo(0.0, i % texts, rows, "") for i in range(settings.num_samples)]
    nbytes = sum(math.prod(spec.shape) * DTYPE_SIZE[spec.dtype] for spec in shapes.specs(samples))
    flops = (model.n_blocks + model.n_vace_blocks) * block_flops(model, tokens)
    prompts = forwards = 0
    if settings.mode == "trajectory":
        prompts = prompts_for(settings, schedule, [expert.name for expert in experts])
        forwards = prompts * len(schedule.sigmas) * (2 if schedule.guidance > 1 else 1)
    width = 2 if settings.dtype == "bf16" else 4
    streams = prompts * 2 * tokens * model.dim * width * (2 + model.n_vace_blocks if model.n_vace_blocks else 1)
    weights = max(_weights_nbytes(expert.model, settings) for expert in experts)
    active = _stem_nbytes(model, shapes)
    if settings.mode == "trajectory":
        active += activation_nbytes(model, shapes, kind)
    on_device = weights + active + streams
    host = HOST_BASE[kind] + DIFFUSERS_BASE
    return Outlook(
        settings.num_samples, tuple(expert.name for expert in experts), tokens, prompts, forwards, forwards * flops,
        len(experts) * settings.num_samples * flops, len(experts) * nbytes, streams,
        host + max(_encoders_nbytes(parts, settings), on_device if kind == "cpu" else 0),
        0 if kind == "cpu" else max(on_device, _encoders_nbytes(parts, settings)),
    )  # fmt: skip


def prompts_for(settings: CalibSettings, schedule: Schedule, experts: Sequence[str]) -> int:
    """Videos that a trajectory denoises: each gives every bin of an expert a sample, two with guidance."""
    branches = 2 if schedule.guidance > 1 else 1
    fewest = min(min(settings.time_bins, max(1, len(schedule.steps_of(name)))) for name in experts)
    return -(-settings.num_samples // (branches * fewest))


def _weights_nbytes(model: Model, settings: CalibSettings) -> int:
    """What lies outside blocks as it computes, and the largest source tensor; trajectory: one block, both ways."""
    width = 2 if settings.dtype == "bf16" else 4
    rest = [info for name, info in model.tensors.items() if unit_of(name) == "rest"]
    total = sum(math.prod(i.shape) * width for i in rest) + max(i.nbytes for i in rest)
    if settings.mode == "trajectory":
        block = [info for name, info in model.tensors.items() if unit_of(name) == model.blocks[0]]
        total += sum(math.prod(info.shape) * width + info.nbytes for info in block)
    return total


def _stem_nbytes(model: Model, shapes: Shapes) -> int:
    """Of one sample on its way to block 0: latents, patches, and TI2V's time projection of every token."""
    rows = 2 * 6 * model.dim * (2 if shapes.dtype == "BF16" else 4) if model.family == "ti2v" else 0
    return shapes.tokens * (16 * model.dim + rows + 64 * model.in_channels)


def _encoders_nbytes(parts: Parts, settings: CalibSettings) -> int:
    """The largest of the encoders at work: of the text encoder a layer, else weights and working set.

    The VAE takes four frames at a time; eight tensors of a full-size layer are an allowance, not a measurement.
    """
    if settings.mode == "dump":
        return 0
    found = [0]
    if parts.text_encoder is not None and settings.text_embeds is None:
        layers: dict[str, int] = {}
        for name, info in open_checkpoint(parts.text_encoder).tensors.items():
            if name not in EMBEDDING:
                layer = name.rpartition(".layer.")[0]
                layers[layer] = layers.get(layer, 0) + info.nbytes
        found.append(2 * max(layers.values(), default=0) + 64 * MiB)
    if parts.image_encoder is not None:
        found.append(_files_nbytes(parts.image_encoder))
    if parts.vae is not None:
        width, height = settings.size
        base = encoders._json(parts.vae / "config.json").get("base_dim", 96)
        found.append(
            _files_nbytes(parts.vae) + 8 * 4 * 4 * base * width * height + 12 * settings.frame_num * width * height
        )
    return max(found)


def _files_nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
