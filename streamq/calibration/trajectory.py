"""Block-0 inputs of the float pipeline's own denoising, with the transformer streamed: bit for bit what it computes.

    each step: outside of blocks -> every block: read once, run on every video (and its negative) -> head -> scheduler

All videos are in flight together, so that a step reads each block once. Held in memory meanwhile: one block, what lies
outside blocks, and the streams of one step: 2·videos·L·D elements (VACE: as many again for each of control and hints).

Source: huggingface/diffusers `pipelines/wan/pipeline_wan.py`, `pipeline_wan_i2v.py`, `pipeline_wan_vace.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from streamq.calibration import media
from streamq.calibration.conditions import Conditions, Inputs, smooth_latents
from streamq.calibration.encoders import LatentCodec, Parts
from streamq.calibration.interpolate import (
    TORCH_DTYPES,
    Part,
    SetFile,
    Stored,
    bins_of,
    no_steps,
    numbered,
    open_shell,
    shapes_for,
    stem,
    step_in,
)
from streamq.calibration.settings import Schedule, states_len, tokens_of
from streamq.calibration.store import SampleInfo
from streamq.checkpoint import Source
from streamq.errors import UsageError, format_bytes
from streamq.lora import open_source
from streamq.savers.shard import disk_errors
from streamq.wan import Expert
from streamq.wan.blocks import BlockRunner, Shared, Shell, flow, names_in

THUMBNAILS = "thumbnails"


@dataclass(frozen=True)
class Kept:
    """One forward whose block-0 input is stored."""

    step: int
    video: int
    negative: bool


@dataclass
class _Running:
    """One forward of a step, on its way through the blocks."""

    video: int
    negative: bool
    inputs: Inputs
    streams: dict[str, Tensor]
    shared: Shared


class Trajectory:
    """The denoising of as many videos as the samples take. Raises UsageError when made, before anything is written.

    Video v has prompt v (prompts in turn) and the noise of seed + v. Of an expert's samples, in order of choice: a step
    of every bin with the first video's prompt, the same steps with its negative prompt, the second video's, …
    `latents`: one a video, [1, C, f, h, w] float32; after `write` the denoised ones.
    """

    def __init__(
        self, conditions: Conditions, schedule: Schedule, experts: Sequence[Expert], parts: Parts,
        device: torch.device, about: Callable[[str], None],
    ) -> None:  # fmt: skip
        settings = conditions.settings
        self.conditions, self.experts, self.parts = conditions, experts, parts
        self.device, self.about, self.guidance = device, about, schedule.guidance
        self.dtype = settings.dtype
        template = scheduler_of(parts, schedule, settings.shift is not None)
        template.set_timesteps(len(schedule.sigmas), device=device)
        template.set_begin_index(0)
        self.timesteps: Tensor = template.timesteps
        self.steps = {e.name: self._steps_of(e.name, schedule.boundary, template) for e in experts}
        self.branches = (False, True) if self.guidance > 1 else (False,)
        bins = {name: bins_of(steps, settings.time_bins) for name, steps in self.steps.items()}
        fewest = min(len(found) for found in bins.values())
        self.videos = -(-settings.num_samples // (fewest * len(self.branches)))
        self.kept = {name: self._choose(found, settings.num_samples) for name, found in bins.items()}
        self.schedulers = [copy.deepcopy(template) for _ in range(self.videos)]
        self.latents = [
            torch.randn((1, *conditions.shape), generator=torch.Generator().manual_seed(settings.seed + v)).to(device)
            for v in range(self.videos)
        ]
        self.stills = [self._still(video) for video in range(self.videos)]

    def _steps_of(self, expert: str, boundary: float, scheduler: Any) -> list[int]:
        limit = boundary * scheduler.config.num_train_timesteps
        high = [bool(t >= limit) for t in self.timesteps]
        steps = [i for i, is_high in enumerate(high) if is_high != (expert == "low_noise_model")]
        if not steps:
            raise no_steps(len(high), expert, limit)
        return steps

    def _choose(self, bins: list[list[int]], count: int) -> list[Kept]:
        chosen = []
        for number in range(count):
            place, turn = number % len(bins), number // len(bins)
            video, branch = divmod(turn, len(self.branches))
            chosen.append(Kept(step_in(bins[place], video), video, self.branches[branch]))
        return sorted(chosen, key=lambda kept: (kept.step, kept.video, kept.negative))

    def _prompt(self, video: int) -> int:
        return video % len(self.conditions.prompts)

    def _text(self, video: int, negative: bool) -> str:
        prompt = self.conditions.prompts[self._prompt(video)]
        return prompt.negative if negative else prompt.text

    def _still(self, video: int) -> Tensor | None:
        """The picture that a video starts with: the prompt's, a clip's, or a synthetic one for image families."""
        found, x0 = self.conditions, None
        clip = video % len(found.clips) if found.clips else None
        if clip is not None:
            x0 = found.clips[clip]
        elif found.condition_channels:
            x0 = smooth_latents(found.shape, "still", found.settings.seed, video)
        return found.still(self._prompt(video), x0, clip)

    def _inputs(self, video: int, negative: bool, step: int) -> Inputs:
        timestep = self.timesteps[step].expand(1)
        text, still = self._text(video, negative), self.stills[video]
        return self.conditions.inputs(self.latents[video], timestep, self._prompt(video), text, still)

    def write(self, folder: Path, suffix: str, *, thumbnails: bool) -> dict[str, Part]:
        """Denoise, and store what was chosen; then decode each video's first frame."""
        model, settings = self.experts[0].model, self.conditions.settings
        streams = 2 + model.n_vace_blocks if model.n_vace_blocks else 1
        size = torch.finfo(TORCH_DTYPES[self.dtype]).bits // 8
        held = len(self.branches) * self.videos * tokens_of(model, settings) * model.dim * size * streams
        self.about(f"{self.videos} videos of {len(self.timesteps)} steps in flight, {format_bytes(held)} of streams")
        parts = {expert.name: self._expert(folder, expert, suffix) for expert in self.experts}
        if model.family == "ti2v":
            self.latents = [self._inputs_latents(video) for video in range(self.videos)]
        if thumbnails:
            self._thumbnails(folder / THUMBNAILS)
        return parts

    def _inputs_latents(self, video: int) -> Tensor:
        """TI2V: the given first frame is put back over what the last step made of it."""
        still, latents = self.stills[video], self.latents[video]
        if still is None:
            return latents
        mask = torch.ones(1, 1, *self.conditions.shape[1:], device=self.device)
        mask[:, :, 0] = 0
        return (1 - mask) * still.to(self.device) + mask * latents

    def _expert(self, folder: Path, expert: Expert, suffix: str) -> Part:
        model, kept = expert.model, self.kept[expert.name]
        keys = [self.conditions.states_key(self._prompt(k.video), self._text(k.video, k.negative)) for k in kept]
        numbers, firsts = numbered(keys)
        with ExitStack() as stack:
            source = stack.enter_context(closing(open_source(model)))
            shell = open_shell(source, model, self.dtype, self.device)
            rows = {k.step: self._rows(shell, k) for k in kept}
            infos = [
                SampleInfo(float(self.timesteps[k.step]), number, rows[k.step],
                           "" if k.negative else self._text(k.video, False))
                for k, number in zip(kept, numbers, strict=True)
            ]  # fmt: skip
            shapes = shapes_for(model, tokens_of(model, self.conditions.settings), states_len(model), self.dtype)
            file = stack.enter_context(closing(SetFile(folder, expert.name, suffix, shapes, infos)))
            for number, place in enumerate(firsts):
                one = kept[place]
                _, shared = stem(shell, self._inputs(one.video, one.negative, one.step))
                if number == 0:
                    file.shared(shared)
                file.states(number, shared)
            runner = BlockRunner(model, TORCH_DTYPES[self.dtype], self.device)
            places = {one: number for number, one in enumerate(kept)}
            for step in self.steps[expert.name]:
                self._step(source, shell, runner, step, file, places)
                named = f" ({expert.name})" if expert.name else ""
                self.about(f"step {step + 1} of {len(self.timesteps)}, timestep {int(self.timesteps[step])}{named}")
            source.check_unchanged()
            return file.finish()

    def _rows(self, shell: Shell, kept: Kept) -> int:
        """R of a step's timestep_proj, which the file's header needs before there are latents of that step."""
        inputs = self._inputs(kept.video, kept.negative, kept.step)
        return 1 if inputs.timestep.ndim == 1 else len(stem(shell, inputs)[1].timestep_proj)

    def _step(
        self, source: Source, shell: Shell, runner: BlockRunner, step: int, file: SetFile, places: dict[Kept, int]
    ) -> None:
        """One step of every video: `latents` become those of the next step. Chosen inputs are stored on the way."""
        model, running = runner.model, []
        for video in range(self.videos):
            for negative in self.branches:
                inputs = self._inputs(video, negative, step)
                streams, shared = stem(shell, inputs)
                if (number := places.get(Kept(step, video, negative))) is not None:
                    file.sample(number, streams, shared)
                running.append(_Running(video, negative, inputs, streams, shared))
        for unit in model.replay_order:
            runner.fill(unit, Stored(source, model, names_in(model, unit), self.device))
            drops = flow(model, unit).drops
            for one in running:
                one.streams.update(runner.run(unit, one.streams, one.shared))
                for name in drops:
                    del one.streams[name]
            runner.release()
        predicted: dict[tuple[int, bool], Tensor] = {}
        while running:
            one = running.pop()
            made = shell.head(one.streams.pop("hidden"), one.inputs.latents, one.inputs.timestep)
            predicted[one.video, one.negative] = made
        for video, scheduler in enumerate(self.schedulers):
            noise = predicted[video, False]
            if len(self.branches) == 2:
                without = predicted[video, True]
                noise = without + self.guidance * (noise - without)
            done = scheduler.step(noise, self.timesteps[step], self.latents[video], return_dict=False)
            self.latents[video] = done[0]

    def _thumbnails(self, folder: Path) -> None:
        if self.parts.vae is None:
            self.conditions.warnings.append("no thumbnails: no vae/ beside the transformer to decode them")
            self.about(f"warning: {self.conditions.warnings[-1]}")
            return
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        with closing(LatentCodec(self.parts, self.device)) as codec:
            for video, latents in enumerate(self.latents):
                media.save_thumbnail(codec.decode_first(latents[0].to("cpu")), folder / f"{video:02d}.png")
                self.about(f"{THUMBNAILS}/{video:02d}.png: {self._text(video, False)[:60]}")


def scheduler_of(parts: Parts, schedule: Schedule, overridden: bool) -> Any:
    """The pipeline's scheduler, or UniPC for flow matching. `overridden`: the user has given the shift."""
    config = dict(parts.scheduler)
    if not config:
        return diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=schedule.shift
        )
    name = str(config.get("_class_name"))
    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if found is None:
        raise UsageError(f"{parts.root}/scheduler: {name} is not a scheduler of diffusers {diffusers.__version__}")
    if overridden:
        config["shift" if "shift" in config else "flow_shift"] = schedule.shift
    return found.from_config(config)
