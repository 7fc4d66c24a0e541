"""What is done to one step between reading and writing: its bytes become tensors, and those every target's tensors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from streamq.checkpoint import Source, TensorInfo
from streamq.device import Device
from streamq.device.cpu import host_bytes
from streamq.dtypes import TORCH_DTYPES
from streamq.errors import RunError
from streamq.journal import Commit, Journal
from streamq.layers import Block, is_finite, quantize
from streamq.lora import MergedSource
from streamq.merge import merge
from streamq.methods.int8 import RowRanges
from streamq.methods.rotation import online_hadamard
from streamq.plan import COPY_CHUNK, ExpertPlan, Output, Plan, Step, Target, Unit, aligned
from streamq.quantized import QuantizedLinear, Scheme, encode_vector
from streamq.ranks import Ranks
from streamq.savers.shard import Place, ShardWriter
from streamq.stages import Arena, Lane, Team, Watcher, results

if TYPE_CHECKING:
    from streamq.calibration.replay import Replay, Seen

Tensors = Callable[[], list[tuple[Place, torch.Tensor]]]
Begun = dict[Scheme, Future[tuple[QuantizedLinear, dict[str, Any]]]]
# A step, and, unless it passes through, its region of the arena and the loading of it.
Loaded = tuple[Step, torch.Tensor | None, Future[Any] | None]


@dataclass
class Work:
    """What the stages of one expert's run share."""

    plan: Plan
    part: ExpertPlan
    device: Device
    source: Source
    writers: list[ShardWriter]
    journal: Journal
    watcher: Watcher
    hasher: Lane
    methods: Team
    files: Team
    replay: Replay | None
    arena: Arena
    chunk: torch.Tensor
    ranks: Ranks


def load(step: Step, memory: torch.Tensor, work: Work) -> Any:
    token = None
    for info, part in zip(step.sources, parts_of(step, memory), strict=False):
        token = work.device.load(partial(work.source.read, info), part)
        work.source.drop(info)
    if step.deltas:
        token = _load_factors(step, memory, work)
    return token


def _load_factors(step: Step, memory: torch.Tensor, work: Work) -> Any:
    source, token = work.source, None
    assert isinstance(source, MergedSource)
    deltas = [delta for found in step.deltas for delta in found]
    for delta, parts in zip(deltas, _factors(step, memory)[0], strict=True):
        for factor, part in zip(delta.factors, parts, strict=True):
            token = work.device.load(partial(source.read_factor, delta, factor), part)
            source.drop_factor(delta, factor)
    return token


def _factors(step: Step, memory: torch.Tensor) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """Where the bytes of each LoRA's factors lie, delta after delta, and what is left; the codes come there later."""
    room, found = parts_of(step, memory)[-1], []
    for delta in (delta for deltas in step.deltas for delta in deltas):
        parts = []
        for factor in delta.factors:
            parts.append(room[: factor.nbytes])
            room = room[aligned(factor.nbytes) :]
        found.append(parts)
    return found, room


def copy(step: Step, work: Work, commit: Commit) -> None:
    """Pass a step's tensors through, in chunks of host memory: each is read once and goes to every target.

    COPY_CHUNK is a multiple of every element's size, so a chunk can be cast by itself.
    """
    for number, info in enumerate(step.sources):
        places = [output.places[number] for output in step.outputs]
        for place in places:
            work.writers[place.file].begin(place)
        for start in range(0, info.nbytes, COPY_CHUNK):
            part = work.chunk[: min(COPY_CHUNK, info.nbytes - start)]
            work.source.read(info, start, host_bytes(part))
            values = part.view(TORCH_DTYPES[info.dtype])
            if not is_finite(values):
                raise damaged(info, work)
            for place in places:
                work.writers[place.file].append(host_bytes(values.to(TORCH_DTYPES[place.dtype])), work.hasher.start)
        for place in places:
            writer = work.writers[place.file]
            commit.tensors.setdefault(writer.file.path, {})[place.name] = writer.end()
        work.source.drop(info)


def merge_loras(step: Step, memory: torch.Tensor, work: Work) -> None:
    """Add to a step's tensors what the LoRAs bring, in place, once its bytes have arrived."""
    if not step.deltas:
        return
    assert isinstance(work.source, MergedSource)
    raw, room = _factors(step, memory)
    arrived = iter(raw)
    for info, tensor, deltas in zip(step.sources, tensors_of(step, memory), step.deltas, strict=True):
        factors = [
            [p.view(TORCH_DTYPES[f.dtype]).view(f.shape) for f, p in zip(delta.factors, next(arrived), strict=True)]
            for delta in deltas
        ]
        if deltas:
            merge(work.source, info, tensor, factors, room)
        elif not is_finite(tensor):
            raise damaged(info, work)


def parts_of(step: Step, memory: torch.Tensor) -> list[torch.Tensor]:
    """A step's region of the arena: the bytes of each source tensor, and the rest, for codes."""
    sizes = [aligned(info.nbytes) for info in step.sources]
    parts = memory.split([*sizes, memory.numel() - sum(sizes)])
    return [part[: info.nbytes] for part, info in zip(parts, step.sources, strict=False)] + [parts[-1]]


def observe(unit: Unit, held: list[Loaded], work: Work, replay: Replay) -> Seen:
    """Send the calibration inputs through a block."""
    tensors: dict[str, torch.Tensor] = {}
    for step, memory, token in held:
        if memory is not None and token is not None:
            work.device.wait(token.result())
            merge_loras(step, memory, work)
            for name, info, tensor in zip(step.tensors, step.sources, tensors_of(step, memory), strict=True):
                if not is_finite(tensor):
                    raise damaged(info, work)
                tensors[name] = tensor
    return replay.observe(unit.name, tensors, {step.name: step.schemes for step in unit.steps if step.schemes})


def tensors_of(step: Step, memory: torch.Tensor) -> list[torch.Tensor]:
    parts = zip(parts_of(step, memory), step.sources, strict=False)
    return [part.view(TORCH_DTYPES[info.dtype]).view(info.shape) for part, info in parts]


def begin(step: Step, memory: torch.Tensor | None, work: Work, commit: Commit, block: Block) -> Tensors:
    """Work out every target's tensors of one step, which the result gives.

    Where several methods look at nothing but the weight they are at work in threads of their own when this returns, and
    whoever asks for the tensors waits for them.
    """
    begun = _quantized(step, memory, work, block)
    tensors = partial(_made, step, memory, begun, work, commit, block)
    return tensors if work.methods.threads and block.seen is None else partial(list, tensors())


def _made(
    step: Step, memory: torch.Tensor | None, begun: Begun, work: Work, commit: Commit, block: Block
) -> list[tuple[Place, torch.Tensor]]:  # fmt: skip
    """Every target's tensors of one step."""
    tensors = [] if memory is None else tensors_of(step, memory)
    made = _ended(step, begun, work, block)
    found: list[tuple[Place, torch.Tensor]] = []
    for output in step.outputs:
        target, smooth = work.plan.targets[output.target], output.smooth
        if output.rotation:
            found += zip(output.places, _rotations(output, work), strict=True)
        elif smooth is not None:
            vector = block.vector(smooth)
            divided = [(t.float() / vector).to(t.dtype) for t in tensors] or target.format.encode_vector(vector)
            found += zip(output.places, divided, strict=True)
        elif output.scheme is None:
            kept = [t.to(TORCH_DTYPES[p.dtype]) for p, t in zip(output.places, tensors, strict=True)]
            found += zip(output.places, kept, strict=True)
        else:
            layer, commit.layers.setdefault(target.name, {})[step.label] = made[output.scheme]
            if (folded := output.scheme.smooth) is not None and folded.way != "layer":
                entry = {"way": folded.way, "values": encode_vector(block.vector(folded))}
                commit.vectors.setdefault(target.name, {})[_label(folded.group, work)] = entry
            found += zip(output.places, _encoded(layer, target, step), strict=True)
    return found


def _quantized(step: Step, memory: torch.Tensor | None, work: Work, block: Block) -> Begun:
    """The step's layer by each distinct scheme: targets with equal ones share the work."""
    schemes = list(dict.fromkeys(output.scheme for output in step.outputs if output.scheme))
    if memory is None or not schemes:
        return {}
    weight, *rest = tensors_of(step, memory)
    room, apart = parts_of(step, memory)[-1], not any(scheme.needs_data for scheme in schemes)
    ranges = RowRanges(weight) if apart and len(schemes) > 1 else None
    jobs = []
    for scheme in schemes:
        codes = room[: weight.numel()].view(torch.int8).view(weight.shape)
        room = room[weight.numel() :]
        jobs.append(partial(quantize, step.name, weight, rest[0] if rest else None, scheme, block, codes, ranges))
    return dict(zip(schemes, (work.methods if apart else Team(1, "")).start(jobs), strict=True))


def _ended(
    step: Step, begun: Begun, work: Work, block: Block
) -> dict[Scheme, tuple[QuantizedLinear, dict[str, Any]]]:  # fmt: skip
    found = dict(zip(begun, results(list(begun.values())), strict=True))
    for layer, _ in found.values():
        for number, values in ((0, layer.scales), (0, layer.zeros), (1, layer.bias)):
            if values is not None and not torch.isfinite(values).all():
                raise damaged(step.sources[number], work)
        if block.seen is not None:  # what comes next is made with them
            block.layers.setdefault(step.name, layer)
    return found


def _rotations(output: Output, work: Work) -> list[torch.Tensor]:
    """The rotation of an attention module, once for q and once for k."""
    made = online_hadamard(output.rotation)
    on_device = work.device.empty(made.nbytes).view(made.dtype).view(made.shape).copy_(made)
    return [on_device] * len(output.places)


def _encoded(layer: QuantizedLinear, target: Target, step: Step) -> list[torch.Tensor]:
    try:
        return [tensor.contiguous() for tensor in target.format.encode(layer, target.save)]
    except RunError as error:
        raise RunError(f"{step.label}: {error}") from error


def damaged(info: TensorInfo, work: Work) -> RunError:
    where, advice = work.source.checkpoint.where(info), "download it again, then run the same command with --no_resume"
    return RunError(f"{where}: NaN or Inf in it; the source is damaged: {advice}")


def _label(group: str, work: Work) -> str:
    return f"{work.part.expert.name}/{group}" if work.part.expert.name else group
