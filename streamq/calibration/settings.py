"""What a calibration set is made of, and what it costs, from settings and shapes alone. Needs no torch.

A sample is one forward of the transformer: latents at a time step, with or without the prompt. Its cost per block:

    FLOP = 12·L·D² + 4·S·D² + 4·L·D·F + 4·L²·D + 4·S·L·D        L tokens, S states, D width, F width of the FFN
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamq.errors import UsageError
from streamq.wan import Model

MODES = ("interpolate", "trajectory", "dump")
TEXT_LEN = 512
IMAGE_LEN = {"i2v": 257, "flf2v": 514}  # tokens of the image branch
DTYPES = ("bf16", "fp32")
# (flow shift, guidance, steps, boundary) that Wan-AI's own configs give a family; boundary only with two experts.
SCHEDULES: dict[tuple[str, int], tuple[float, float, int, float]] = {
    ("t2v", 1): (5.0, 5.0, 50, 0.0), ("i2v", 1): (5.0, 5.0, 40, 0.0), ("flf2v", 1): (16.0, 5.0, 50, 0.0),
    ("vace", 1): (16.0, 5.0, 50, 0.0), ("ti2v", 1): (5.0, 5.0, 50, 0.0),
    ("t2v", 2): (12.0, 3.0, 40, 0.875), ("i2v", 2): (5.0, 3.5, 40, 0.9), ("vace", 2): (12.0, 3.0, 40, 0.875),
}  # fmt: skip
TRAIN_STEPS = 1000
POSITIONS = 1024  # of the rotary table, for frames, rows and columns of tokens each (diffusers' rope_max_seq_len)
MAX_SIDE = 32 * POSITIONS  # pixels; ti2v has the largest tokens, 32 * 32


@dataclass(frozen=True)
class Prompt:
    """One thing to calibrate on: a text, and for image families the picture that the video starts (and ends) with."""

    text: str
    negative: str = ""
    image: Path | None = None
    last_image: Path | None = None


@dataclass(frozen=True)
class CalibSettings:
    """All that decides a set's bytes. `shift`, `guidance`, `sample_steps`, `boundary` None: the model's own.

    `num_samples` is per expert, spread over `time_bins` bins of its schedule; every fourth sample has no prompt.
    `size` is (width, height) of the video in pixels. Without `prompts` the built-in list is used.
    """

    mode: str = "interpolate"
    num_samples: int = 32
    time_bins: int = 8
    size: tuple[int, int] = (448, 256)
    frame_num: int = 9
    sample_steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    boundary: float | None = None
    seed: int = 0
    dtype: str = "bf16"
    prompts: tuple[Prompt, ...] = ()
    videos: Path | None = None
    latents: Path | None = None
    text_embeds: Path | None = None
    dump: Path | None = None

    def identity(self) -> dict[str, Any]:
        """The settings as JSON has them, for hashes and manifests: of files their names only."""
        prompts = [
            {"text": p.text, "negative": p.negative}
            | {k: v.name for k, v in (("image", p.image), ("last_image", p.last_image)) if v}
            for p in self.prompts
        ]
        files = {k: v.name for k in ("videos", "latents", "text_embeds", "dump") if (v := getattr(self, k)) is not None}
        plain = {k: getattr(self, k) for k in ("mode", "num_samples", "time_bins", "frame_num", "sample_steps",
                                               "guidance", "shift", "boundary", "seed", "dtype")}  # fmt: skip
        return {**plain, "size": list(self.size), "prompts": prompts, "files": files}


@dataclass(frozen=True)
class Schedule:
    """A model's denoising schedule: `timesteps` from 1000 down, and which of them are each expert's."""

    shift: float
    guidance: float
    sigmas: tuple[float, ...]
    boundary: float

    @property
    def timesteps(self) -> tuple[float, ...]:
        """1000·sigma."""
        return tuple(TRAIN_STEPS * sigma for sigma in self.sigmas)

    def steps_of(self, expert: str) -> list[int]:
        """Numbers of the steps that an expert does: t >= 1000·boundary is high noise."""
        high = [i for i, t in enumerate(self.timesteps) if t >= TRAIN_STEPS * self.boundary]
        if expert == "low_noise_model":
            return [i for i in range(len(self.sigmas)) if i not in set(high)]
        return high


def schedule_of(settings: CalibSettings, family: str, n_experts: int, pipeline: dict[str, Any]) -> Schedule:
    """The settings' schedule, or the pipeline's (`flow_shift`, `boundary_ratio`), or the one that Wan-AI gives.

    sigma' = s·sigma / (1 + (s - 1)·sigma), sigma from 1 in equal steps (flow matching, Wan's `sample_shift`).
    """
    shift, guidance, steps, boundary = SCHEDULES.get((family, n_experts), SCHEDULES["t2v", n_experts])
    shift = _first(settings.shift, pipeline.get("flow_shift"), shift)
    boundary = _first(settings.boundary, pipeline.get("boundary_ratio"), boundary) if n_experts == 2 else 0.0
    steps = settings.sample_steps or steps
    even = [1 - i / steps for i in range(steps)]
    sigmas = tuple(shift * sigma / (1 + (shift - 1) * sigma) for sigma in even)
    return Schedule(shift, _first(settings.guidance, guidance), sigmas, boundary)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def latent_shape(model: Model, settings: CalibSettings) -> tuple[int, int, int, int]:
    """(channels, frames, height, width) of the noisy latents. Raises UsageError for sizes that the VAE cannot have."""
    width, height = settings.size
    ratio = 16 if model.family == "ti2v" else 8
    if width % (2 * ratio) or height % (2 * ratio) or min(width, height) <= 0:
        raise UsageError(f"--size {width}*{height}: both must be multiples of {2 * ratio} for a {model.family} model")
    if settings.frame_num < 1 or (settings.frame_num - 1) % 4:
        raise UsageError(f"--frame_num {settings.frame_num}: 4n + 1 frames (1, 5, 9, … 81) are what the VAE makes")
    return model.out_channels, (settings.frame_num - 1) // 4 + 1, height // ratio, width // ratio


def tokens_of(model: Model, settings: CalibSettings) -> int:
    """L: tokens of one sample."""
    _, frames, height, width = latent_shape(model, settings)
    return frames * (height // 2) * (width // 2)


def states_len(model: Model) -> int:
    """S: rows of encoder_hidden_states."""
    branch = "blocks.0.attn2.add_k_proj.weight" in model.tensors
    return text_len(model) + (IMAGE_LEN.get(model.family, 257) if branch else 0)


def text_len(model: Model) -> int:
    """Rows of text that the model takes: 512."""
    return int(model.native_config.get("text_len", TEXT_LEN))


def block_flops(model: Model, tokens: int) -> int:
    """Multiply-adds, times two, of one forward of one block."""
    length, width, states = tokens, model.dim, states_len(model)
    linears = 12 * length * width**2 + 4 * states * width**2 + 4 * length * width * model.ffn_dim
    return linears + 4 * length**2 * width + 4 * states * length * width


@dataclass(frozen=True)
class Cost:
    """What a set takes: samples of one expert, tokens of one sample, bytes of one set of hidden_states, FLOP in all."""

    samples: int
    tokens: int
    hidden_nbytes: int
    flops: int


def cost_of(model: Model, settings: CalibSettings) -> Cost:
    """One expert's replay: every sample through every block."""
    tokens = tokens_of(model, settings)
    blocks = model.n_blocks + model.n_vace_blocks
    hidden = settings.num_samples * tokens * model.dim * (2 if settings.dtype == "bf16" else 4)
    return Cost(settings.num_samples, tokens, hidden, settings.num_samples * blocks * block_flops(model, tokens))


def parse_video_size(text: str) -> tuple[int, int]:
    """`"832*480"` (or 832x480) -> (832, 480). Raises UsageError, also for a side of no pixels or of too many."""
    if not text.strip():
        raise UsageError("--size '': empty; write width*height, e.g. 832*480, or leave it out")
    match = re.fullmatch(r"\s*(\d{1,20})\s*[*xX×]\s*(\d{1,20})\s*", text)
    if not match:
        raise UsageError(f"--size {text}: not a size; write width*height, e.g. 832*480")
    for side, pixels in (("width", int(match[1])), ("height", int(match[2]))):
        if not pixels:
            raise UsageError(f"--size {text}: the {side} is 0; write width*height in pixels, e.g. 832*480")
        if pixels > MAX_SIDE:
            raise UsageError(
                f"--size {text}: a {side} of {pixels} pixels, which no Wan model has positions for: {MAX_SIDE} at most"
            )
    return int(match[1]), int(match[2])


def check_settings(settings: CalibSettings) -> None:
    """Raise UsageError for numbers that make no set."""
    for name, value, least in (("num_samples", settings.num_samples, 1), ("time_bins", settings.time_bins, 1),
                               ("sample_steps", settings.sample_steps or 1, 1)):  # fmt: skip
        if value < least:
            raise UsageError(f"--{name} {value}: at least {least}")
    for name, number in (("shift", settings.shift), ("guidance", settings.guidance)):
        if number is not None and not (0 < number < 1000):
            raise UsageError(f"--{name} {number}: a number above 0 and below 1000")
    if (settings.sample_steps or 1) > TRAIN_STEPS:
        raise UsageError(f"--sample_steps {settings.sample_steps}: at most {TRAIN_STEPS}, of which the model knows")
    if settings.mode not in MODES:
        raise UsageError(f"--mode {settings.mode}: one of {', '.join(MODES)}")
    if settings.dtype not in DTYPES:
        raise UsageError(f"--dtype {settings.dtype}: one of {', '.join(DTYPES)}")


def no_steps(count: int, expert: str, boundary: float) -> UsageError:
    """An expert has nothing to do in a schedule of so many steps."""
    where = "below" if expert == "low_noise_model" else "from"
    return UsageError(
        f"--sample_steps {count}: none of them is the {expert}'s, which are {where} {boundary:g}; take more steps"
    )
