"""What a video is made with: the options of `streamq generate`, a model's own defaults, sizes that fit. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from streamq.calibration.settings import POSITIONS, SCHEDULES, TRAIN_STEPS, Prompt
from streamq.errors import UsageError

DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
SIZE, FRAMES, FPS = (832, 480), 81, 16.0
TI2V_SIZE, TI2V_FRAMES, TI2V_FPS = (1280, 704), 121, 24.0
# (of high noise, of low noise) where Wan-AI's config gives each expert its own.
GUIDANCE_2: dict[tuple[str, int], tuple[float, float]] = {("t2v", 2): (4.0, 3.0)}
PATCH = 2  # latent rows and columns in a token
EVERY = 4  # frames in a latent one
MAX_FRAMES = (POSITIONS - 1) * EVERY + 1


@dataclass(frozen=True)
class GenerateSettings:
    """The options of `streamq generate` by their names; None: the model's own.

    prompts: texts, or `Prompt`s with pictures of their own. size: (width, height). Every prompt is made with every
    seed. Budgets in bytes; None: what there is.
    """

    model_path: str
    save_path: Path
    prompts: tuple[str | Prompt, ...]
    seeds: tuple[int, ...] = (0,)
    transformer: Path | None = None
    transformer_2: Path | None = None
    negative_prompt: str = ""
    image: Path | None = None
    last_image: Path | None = None
    size: tuple[int, int] | None = None
    frame_num: int | None = None
    fps: float | None = None
    sample_steps: int | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    shift: float | None = None
    device: str = "auto"
    dtype: str = "bf16"
    max_host_memory: int | None = None
    max_device_memory: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Figures:
    """The settings' numbers with the model's own in the place of what was left out. `shift` None: the scheduler's."""

    size: tuple[int, int]
    frame_num: int
    fps: float
    steps: int
    guidance: float
    guidance_2: float | None
    shift: float | None


def figures_of(settings: GenerateSettings, family: str, experts: int, ratio: int) -> Figures:
    """What a video is made with. `ratio`: pixels to a latent row. Raises UsageError for numbers that do not fit."""
    ti2v = family == "ti2v"
    schedule = SCHEDULES.get((family, experts), SCHEDULES["t2v", experts])
    high, low = GUIDANCE_2.get((family, experts), (schedule[1], schedule[1]))
    guidance = high if settings.guidance is None else settings.guidance
    if settings.guidance is not None:
        low = settings.guidance
    if settings.guidance_2 is not None and experts == 1:
        raise UsageError("--guidance_2: is for the second expert, and this model has one; leave it out")
    made = Figures(
        settings.size or (TI2V_SIZE if ti2v else SIZE),
        settings.frame_num if settings.frame_num is not None else TI2V_FRAMES if ti2v else FRAMES,
        settings.fps if settings.fps is not None else TI2V_FPS if ti2v else FPS,
        settings.sample_steps if settings.sample_steps is not None else schedule[2],
        guidance,
        None if experts == 1 else low if settings.guidance_2 is None else settings.guidance_2,
        settings.shift,
    )
    _check(made, family, ratio * PATCH)
    return made


def _check(made: Figures, family: str, multiple: int) -> None:
    (width, height), most = made.size, POSITIONS * multiple
    for name, side in (("width", width), ("height", height)):
        if side < 1:
            raise UsageError(f"--size {width}*{height}: the {name} is {side}; give pixels, e.g. 832*480")
        if side > most:
            raise UsageError(
                f"--size {width}*{height}: a {name} of {side} pixels is {-(-side // multiple)} tokens, this {family}"
                f" model has positions for {POSITIONS} ({most} pixels); give less"
            )
    if any(side % multiple for side in made.size):
        fit = "*".join(str(_nearest(side, multiple, most)) for side in made.size)
        raise UsageError(
            f"--size {width}*{height}: both must be multiples of {multiple} for this {family} model; nearest: {fit}"
        )
    if made.frame_num > MAX_FRAMES:
        raise UsageError(
            f"--frame_num {made.frame_num}: a Wan model has positions for {POSITIONS} latent frames ({MAX_FRAMES});"
            " give less"
        )
    if (made.frame_num - 1) % EVERY or made.frame_num < 1:
        fit = str(_nearest(made.frame_num - 1, EVERY, MAX_FRAMES - 1, 0) + 1)
        raise UsageError(f"--frame_num {made.frame_num}: 4n + 1 frames (1, 5, 9, … 81) are made; nearest: {fit}")
    if not 1 <= made.steps <= TRAIN_STEPS:
        raise UsageError(f"--sample_steps {made.steps}: from 1 to {TRAIN_STEPS}")
    if not 0 < made.fps <= 240:
        raise UsageError(f"--fps {made.fps:g}: above 0, at most 240")
    for name, value in (("guidance", made.guidance), ("guidance_2", made.guidance_2), ("shift", made.shift)):
        if value is not None and not 0 < value < 1000:
            raise UsageError(f"--{name} {value:g}: a number above 0 and below 1000")


def _nearest(value: int, multiple: int, most: int, least: int | None = None) -> int:
    low = multiple if least is None else least
    return max(low, min((value + multiple // 2) // multiple * multiple, most // multiple * multiple))


def check_prompts(texts: Iterable[str], option: str) -> None:
    """Raise UsageError for a text without a word: a script's empty variable, and not what was meant."""
    if not all(text.strip() for text in texts):
        raise UsageError(f"{option} '': empty; say what the video is to show")


def stem_of(index: int, seed: int) -> str:
    """What a video's files are called: by the number of its prompt, and its seed."""
    return f"{index:04d}-seed{seed}"
