"""Block-0 inputs from another tool's dump of whole forwards: each goes through what lies outside the blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch.nn import functional

from streamq.calibration import dumps
from streamq.calibration.conditions import PICTURE_ROWS, Inputs
from streamq.calibration.dumps import Call
from streamq.calibration.interpolate import Work
from streamq.calibration.settings import TRAIN_STEPS, CalibSettings, states_len, text_len
from streamq.calibration.store import SampleInfo
from streamq.errors import UsageError
from streamq.wan import Expert, Model


@dataclass(frozen=True)
class _Seen:
    """What a first look at a dump keeps of a call."""

    timestep: float
    key: Hashable
    prompt: str
    per_token: bool


def dumped(settings: CalibSettings, experts: Sequence[Expert], boundary: float) -> dict[str, Work]:
    """Every expert's calls of a dump: those of its timesteps, evenly thinned to `num_samples` where there are more.

    The dump is gone through three times, one call in memory at a time. Raises UsageError.
    """
    path, model = settings.dump, experts[0].model
    assert path is not None
    seen: dict[str, dict[int, _Seen]] = {expert.name: {} for expert in experts}
    first: Call | None = None
    for number, call in enumerate(dumps.read_dump(path)):
        if first is None:
            first = call
            _check_call(path, model, call)
        _check_like(path, first, call, number)
        timestep = float(call.timestep.max())
        name = ("high_noise_model" if timestep >= TRAIN_STEPS * boundary else "low_noise_model") if boundary else ""
        seen[name][number] = _seen(call, timestep)
    for name, calls in seen.items():
        if not calls:
            two = f" (timesteps {'below' if name == 'low_noise_model' else 'from'} {TRAIN_STEPS * boundary:g})"
            raise UsageError(
                f"--dump {path}: no call of it is the {name or 'model'}'s{two if name else ''}; dump the model's own"
                " denoising from the first step to the last"
            )
    assert first is not None
    return {name: _work(path, model, first, calls, settings.num_samples) for name, calls in seen.items()}


def _work(path: Path, model: Model, first: Call, calls: dict[int, _Seen], most: int) -> Work:
    every, count = list(calls), min(most, len(calls))
    numbers = [every[i * len(every) // count] for i in range(count)]
    chosen = [calls[number] for number in numbers]

    def inputs(which: Sequence[int]) -> Iterator[Inputs]:
        wanted = {numbers[place] for place in which}
        for number, call in enumerate(islice(dumps.read_dump(path), max(wanted) + 1)):
            if number in wanted:
                yield _inputs(model, call)

    _, _, frames, height, width = first.latents.shape
    infos = [SampleInfo(one.timestep, 0, 1, one.prompt) for one in chosen]
    tokens = frames * (height // 2) * (width // 2)
    per_token = any(one.per_token for one in chosen)
    return Work(infos, [one.key for one in chosen], per_token, tokens, states_len(model), inputs)


def _check_call(path: Path, model: Model, call: Call) -> None:
    channels, *_, height, width = call.latents.shape[1:]
    width_of = {"condition_embedder.text_embedder.linear_1.weight": call.text.shape[-1]}
    if call.image is not None:
        width_of["condition_embedder.image_embedder.norm1.weight"] = call.image.shape[-1]
    for name, found in width_of.items():
        wanted = model.tensors[name].shape[-1] if name in model.tensors else 0
        if found != wanted:
            raise UsageError(
                f"--dump {path}: its {'image' if 'image' in name else 'text'} states are {found} wide, this model takes"
                f" {wanted}; it is another model's dump"
            )
    if channels != model.in_channels or height % 2 or width % 2:
        raise UsageError(
            f"--dump {path}: latents of {list(call.latents.shape)}, this {model.family} model takes {model.in_channels}"
            " channels and an even height and width; it is another model's dump"
        )
    branch, vace = "blocks.0.attn2.add_k_proj.weight" in model.tensors, model.family == "vace"
    for what, has, needs in (("image states", call.image, branch), ("control latents", call.control, vace)):
        if (has is not None) != needs:
            raise UsageError(
                f"--dump {path}: {'lacks' if needs else 'has'} {what}, which a {model.family} model"
                f" {'takes' if needs else 'does not take'}; it is another model's dump"
            )


def _check_like(path: Path, first: Call, call: Call, number: int) -> None:
    if call.latents.shape != first.latents.shape:
        raise UsageError(
            f"--dump {path}: call 0 has latents {list(first.latents.shape)}, call {number} {list(call.latents.shape)};"
            " a set has one video size: dump them apart"
        )
    scales = [None if one.control_scale is None else one.control_scale.tolist() for one in (first, call)]
    if scales[0] != scales[1]:
        raise UsageError(
            f"--dump {path}: control scale {scales[0]} in call 0, {scales[1]} in call {number}; a set has one: dump"
            " them apart"
        )


def _seen(call: Call, timestep: float) -> _Seen:
    return _Seen(timestep, _digest(call), call.prompt, call.timestep.ndim == 2)


def _digest(call: Call) -> str:
    """Equal for calls whose text and picture states are equal."""
    digest = hashlib.sha256()
    for tensor in (call.text, call.image):
        if tensor is not None:
            digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _inputs(model: Model, call: Call) -> Inputs:
    image, missing = call.image, max(0, text_len(model) - call.text.shape[1])
    text = functional.pad(call.text, (0, 0, 0, missing))
    if image is not None and model.family == "flf2v":  # diffusers takes two pictures as a batch of two
        image = image.reshape(2, PICTURE_ROWS, -1)
    scale = call.control_scale
    if scale is not None:  # one number stands for all VACE blocks
        scale = scale.reshape(-1).float().expand(model.n_vace_blocks)
    return Inputs(call.latents, call.timestep, text, image, call.control, scale)
