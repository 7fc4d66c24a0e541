"""What a user may set on one `quant` or `plan`, parsed once and never changed."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

from streamq.errors import UsageError

_UNITS = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)} | {
    f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)
}  # fmt: skip


_LORA = re.compile(
    r"(?:(?P<expert>high_noise_model|low_noise_model)=)?(?P<path>.+?)"
    r"(?::(?P<strength>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class LoraOption:
    """One `--lora [EXPERT=]PATH[:STRENGTH]`. `expert`: "" for every transformer of the model."""

    path: Path
    strength: float = 1.0
    expert: str = ""

    def __str__(self) -> str:
        return f"{self.expert}={self.path}" if self.expert else str(self.path)


@dataclass(frozen=True)
class QuantOptions:
    """`streamq quant` and `streamq plan`. Sizes in bytes, 0 or None for "not given".

    Change the bytes of the result, and so belong to the plan's identity: model_path's content, quant_type or
    config_path, formats, layout, match, max_shard_size, seed, calib's content, the kind of device, lora.
    Do not, and may differ when a run is resumed: read_ahead, the budgets, quiet, json, debug.
    """

    model_path: str
    save_path: Path
    model_type: str | None = None
    quant_type: str | None = None
    config_path: Path | None = None
    formats: tuple[str, ...] = ()
    layout: str = "block"
    device: str = "auto"
    resume: bool = True
    overwrite: bool = False
    max_shard_size: int = 0
    max_host_memory: int | None = None
    max_device_memory: int | None = None
    match: str | None = None
    calib: Path | None = None
    trust_remote_code: bool = False
    seed: int = 0
    lora: tuple[LoraOption, ...] = ()
    read_ahead: int = 1
    quiet: bool = False
    json: bool = False
    debug: bool = False


def parse_lora(text: str) -> LoraOption:
    """`"high_noise_model=a.safetensors:0.8"`: only a number behind the last colon is a strength. Raises UsageError."""
    match = _LORA.fullmatch(text)
    if match is None:
        raise UsageError(f"--lora {text!r}: no path; write PATH or PATH:STRENGTH")
    strength = float(match["strength"] or 1)
    if not math.isfinite(strength):
        raise UsageError(f"--lora {text}: strength {match['strength']} is too large a number")
    return LoraOption(Path(match["path"]).expanduser(), strength, match["expert"] or "")


def given_size(args: argparse.Namespace, name: str) -> int | None:
    """A size on a command line in bytes, None where it was left out. Raises UsageError."""
    text = getattr(args, name)
    return None if text is None else parse_size(text, f"--{name}")


def parse_size(text: str, option: str) -> int:
    """`"5GB"` -> 5_000_000_000, `"4GiB"` -> 4 << 30, a bare number is bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{option} {text}: not a size; write e.g. 5GB (powers of 1000) or 4GiB (powers of 1024)")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise UsageError(f"{option} {text}: {size} bytes; give a size above zero, or leave the option out")
    return size
