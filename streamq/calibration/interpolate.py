"""Block-0 inputs without running a block: noise mixed into latents goes through what lies outside the blocks.

    x_t = (1 - sigma)·x0 + sigma·noise

Only what lies outside blocks is in memory, one expert's at a time, and one sample. The file is written front to back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from streamq.calibration.conditions import Conditions, Inputs, drawn, smooth_latents
from streamq.calibration.settings import TRAIN_STEPS, CalibSettings, Schedule, no_steps
from streamq.calibration.store import SampleInfo, Shapes, file_name, shapes_of
from streamq.checkpoint import Source
from streamq.device.cpu import host_bytes
from streamq.errors import RunError
from streamq.lora import open_source
from streamq.savers.shard import ShardWriter, layout
from streamq.stages import Lane
from streamq.wan import Expert, Model
from streamq.wan.blocks import Shared, Shell, names_in, tensors_of

MODE = 0o644
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Part: TypeAlias = "tuple[str, str, Shapes, list[SampleInfo]]"  # as `store.write_document` takes an expert's
GOLDEN = (math.sqrt(5) - 1) / 2
UNCONDITIONAL_EVERY = 4


class Stored(Mapping[str, Tensor]):
    """Tensors of a model, each read when it is asked for: while they are cast, one of them is there twice, not all."""

    def __init__(self, source: Source, model: Model, names: Sequence[str], device: torch.device) -> None:
        self.source, self.model, self.names, self.device = source, model, names, device

    def __getitem__(self, name: str) -> Tensor:
        return tensors_of(self.source, self.model, [name], self.device)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def open_shell(source: Source, model: Model, dtype: str, device: torch.device) -> Shell:
    """Everything of a model that lies outside its blocks, in its compute dtype."""
    names = names_in(model, "rest")
    shell = Shell(model, Stored(source, model, names, device), TORCH_DTYPES[dtype], device)
    for name in names:
        source.drop(model.tensors[name])
    return shell


class SetFile:
    """One expert's file of a set, in the order of `Shapes.specs`: `shared`, every `states`, then sample by sample."""

    def __init__(self, folder: Path, expert: str, suffix: str, shapes: Shapes, samples: Sequence[SampleInfo]) -> None:
        self.shapes, self.samples = shapes, list(samples)
        file, places = layout(file_name(expert, suffix), 0, shapes.specs(self.samples), MODE)
        self._writer, self._places, self._lane = ShardWriter(folder, file), iter(places), Lane(0, "hasher")
        self._writer.create()

    def shared(self, shared: Shared) -> None:
        """What all samples have: rotary tables, and VACE's scale."""
        for name, tensor in zip(("rotary.cos", "rotary.sin"), shared.rotary_emb, strict=True):
            self._write(name, tensor)
        if self.shapes.n_vace:
            assert shared.control_scale is not None
            self._write("control_scale", shared.control_scale)

    def states(self, number: int, shared: Shared) -> None:
        """One text's (and picture's) states."""
        self._write(f"encoder_hidden_states.{number}", shared.encoder_hidden_states)

    def sample(self, number: int, streams: Mapping[str, Tensor], shared: Shared) -> None:
        """What one sample brings to block 0."""
        self._write(f"timestep_proj.{number}", shared.timestep_proj)
        if shared.token_row is not None:
            self._write(f"token_row.{number}", shared.token_row)
        if not torch.isfinite(streams["hidden"]).all():
            raise RunError(
                f"sample {number} (timestep {self.samples[number].timestep:g}) has NaN or Inf at block 0: check the"
                " weights outside blocks and the data that was given"
            )
        self._write(f"hidden_states.{number}", streams["hidden"])
        if self.shapes.n_vace:
            self._write(f"control.{number}", streams["control"])

    def _write(self, name: str, tensor: Tensor) -> None:
        place = next(self._places)
        assert (place.name, place.shape) == (name, tuple(tensor.shape)), (place, name, tensor.shape)
        data = host_bytes(tensor.detach().to("cpu").contiguous())
        assert len(data) == place.nbytes, (place, tensor.dtype)
        self._writer.begin(place)
        self._writer.append(data, self._lane.start)
        self._writer.end()

    def finish(self) -> Part:
        """Publish the file: (its name, its sha256, its shapes, its samples)."""
        return self._writer.file.path, self._writer.publish(), self.shapes, self.samples

    def close(self) -> None:
        """Close it, finished or not."""
        self._writer.close()


@dataclass(frozen=True)
class Work:
    """One expert's samples. `keys`: equal for samples of equal states; `inputs`: of some samples, ascending numbers.

    per_token: whether tokens have their own timesteps, so that a sample's timestep_proj may have several rows.
    """

    infos: list[SampleInfo]
    keys: list[Hashable]
    per_token: bool
    tokens: int
    states_len: int
    inputs: Callable[[Sequence[int]], Iterator[Inputs]]


def shapes_for(model: Model, tokens: int, states_len: int, dtype: str) -> Shapes:
    """Shapes of a model's set."""
    return shapes_of(model, model.dim // int(model.native_config["num_heads"]), tokens, states_len, dtype)


def numbered(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Every key's number, by first use, and where each is first used."""
    first: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    numbers = {key: number for number, key in enumerate(first)}
    return [numbers[key] for key in keys], list(first.values())


def write_expert(
    folder: Path, expert: Expert, work: Work, dtype: str, device: torch.device, suffix: str,
    about: Callable[[str], None],
) -> Part:  # fmt: skip
    """Send every sample of an expert through its shell, into its file."""
    numbers, firsts = numbered(work.keys)
    label = f"{expert.name}: " if expert.name else ""
    with ExitStack() as stack:
        source = stack.enter_context(closing(open_source(expert.model)))
        shell = open_shell(source, expert.model, dtype, device)
        rows = rows_of(shell, work)
        infos = [
            SampleInfo(info.timestep, number, count, info.prompt)
            for info, number, count in zip(work.infos, numbers, rows, strict=True)
        ]
        shapes = shapes_for(expert.model, work.tokens, work.states_len, dtype)
        file = stack.enter_context(closing(SetFile(folder, expert.name, suffix, shapes, infos)))
        for number, inputs in enumerate(work.inputs(firsts)):
            _, shared = stem(shell, inputs)
            if number == 0:
                file.shared(shared)
            file.states(number, shared)
        for number, inputs in enumerate(work.inputs(range(len(infos)))):
            file.sample(number, *stem(shell, inputs))
            about(f"{label}sample {number + 1} of {len(infos)}, timestep {infos[number].timestep:.1f}")
        source.check_unchanged()
        return file.finish()


def stem(shell: Shell, inputs: Inputs) -> tuple[dict[str, Tensor], Shared]:
    """The shell's stem."""
    return shell.stem(inputs.latents, inputs.timestep, inputs.text, inputs.image, inputs.control, inputs.control_scale)


def rows_of(shell: Shell, work: Work) -> list[int]:
    """R of every sample's timestep_proj. The file's header needs them first, and only running the embedder tells."""
    if not work.per_token:
        return [1] * len(work.infos)
    known: dict[bytes, int] = {}
    found = []
    for inputs in work.inputs(range(len(work.infos))):
        key = inputs.timestep.cpu().numpy().tobytes()
        if key not in known:
            known[key] = len(stem(shell, inputs)[1].timestep_proj)
        found.append(known[key])
    return found


# -- Noise mixed into latents ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One sample to be: a step of the schedule, whose prompt (and picture), with its text or its negative one."""

    step: int
    prompt: int
    unconditional: bool
    clip: int | None


def bins_of(steps: Sequence[int], time_bins: int) -> list[list[int]]:
    """An expert's steps in `time_bins` bins of equal size, or in fewer where there are fewer steps."""
    count = min(time_bins, len(steps))
    return [list(steps[i * len(steps) // count : (i + 1) * len(steps) // count]) for i in range(count)]


def step_in(steps: Sequence[int], turn: int) -> int:
    """A bin's step at its `turn`-th use: the middle first, then spread by the golden ratio, however many follow."""
    return steps[int((0.5 + turn * GOLDEN) % 1 * len(steps))]


def in_turn(count: int, *purpose: object) -> Iterator[int]:
    """0 … count - 1 over and over, in a new order each time: equally often, and in step with nothing else."""
    lap = 0
    while True:
        yield from random.Random(repr((*purpose, lap))).sample(range(count), count)
        lap += 1


def draws_of(settings: CalibSettings, schedule: Schedule, expert: str, prompts: int, clips: int) -> list[Draw]:
    """An expert's samples: sample i in bin i % bins. What sample i is does not depend on how many follow it.

    Every fourth is unconditional, such that every bin has its share: in bin b at turn k where b + k is 3 (mod 4).
    """
    steps = schedule.steps_of(expert)
    if not steps:
        raise no_steps(len(schedule.sigmas), expert, TRAIN_STEPS * schedule.boundary)
    bins = bins_of(steps, settings.time_bins)
    phase = 2 if len(bins) in (2, 3) else 3  # so that four samples have one without a prompt, whatever the bins
    turns = {what: in_turn(prompts, settings.seed, expert, what) for what in (False, True)}
    clip_turns = in_turn(clips, settings.seed, expert, "clip") if clips else None
    found = []
    for number in range(settings.num_samples):
        place, turn = number % len(bins), number // len(bins)
        without = settings.num_samples >= UNCONDITIONAL_EVERY and (place + turn) % UNCONDITIONAL_EVERY == phase
        clip = next(clip_turns) if clip_turns else None
        found.append(Draw(step_in(bins[place], turn), next(turns[without]), without, clip))
    return found


def interpolated(conditions: Conditions, schedule: Schedule, expert: str, tokens: int, states_len: int) -> Work:
    """An expert's samples by interpolation between latents and noise."""
    settings = conditions.settings
    draws = draws_of(settings, schedule, expert, len(conditions.prompts), len(conditions.clips))
    texts = [
        conditions.prompts[draw.prompt].negative if draw.unconditional else conditions.prompts[draw.prompt].text
        for draw in draws
    ]

    def inputs(number: int) -> Inputs:
        draw, sigma = draws[number], schedule.sigmas[draws[number].step]
        x0, noised = noised_latents(conditions, expert, number, draw.clip, sigma)
        timestep = torch.tensor([schedule.timesteps[draw.step]], dtype=torch.float32)
        still = conditions.still(draw.prompt, x0, draw.clip)
        return conditions.inputs(noised, timestep, draw.prompt, texts[number], still)

    infos = [
        SampleInfo(schedule.timesteps[draw.step], 0, 1, "" if draw.unconditional else text)
        for draw, text in zip(draws, texts, strict=True)
    ]
    keys: list[Hashable] = [conditions.states_key(draw.prompt, text) for draw, text in zip(draws, texts, strict=True)]
    per_token = conditions.model.family == "ti2v"
    return Work(infos, keys, per_token, tokens, states_len, lambda numbers: map(inputs, numbers))


def noised_latents(
    conditions: Conditions, expert: str, number: int, clip: int | None, sigma: float
) -> tuple[Tensor, Tensor]:
    """x0 [C, f, h, w] and x_t [1, C, f, h, w] of one sample, float32."""
    seed, shape = conditions.settings.seed, conditions.shape
    x0 = smooth_latents(shape, "x0", seed, expert, number) if clip is None else conditions.clips[clip]
    noise = drawn(shape, "noise", seed, expert, number)
    return x0, ((1 - sigma) * x0 + sigma * noise)[None]
