"""How many bytes of blocks may be kept while videos are made: what there is, less what everything else takes.

    room = limit - process - outside of blocks - 2 blocks - one layer expanded - intermediate tensors of one forward

limit: `--max_host_memory` (CPU) or `--max_device_memory`; without one, 90 % of what is free. The VAE is not in it:
blocks are let go of while it decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from streamq.calibration.plan import DIFFUSERS_BASE, activation_nbytes
from streamq.calibration.settings import IMAGE_LEN, TEXT_LEN
from streamq.calibration.store import Shapes
from streamq.device import HOST_BASE, Device, MiB
from streamq.dtypes import TORCH_DTYPES
from streamq.errors import UsageError, format_bytes
from streamq.generation.settings import DTYPES, PATCH
from streamq.generation.store import Room, kept_nbytes

if TYPE_CHECKING:
    from streamq.generation.prepare import Job

SHARE = 0.9  # of what is free, without a budget
PIPELINES = 180 * MiB  # transformers, the pipelines, PyAV; measured with torch 2.13 on x86 Linux
VAE_RATIO, VAE_FRAMES = 8, 4


@dataclass(frozen=True)
class Outlook:
    """Bytes. base: the process; fixed: everything but kept blocks, where the model runs (on a CPU base is in it).

    blocks: all blocks of the larger expert; limit: what there is.
    """

    base: int
    fixed: int
    blocks: int
    limit: int
    room: Room

    def words(self) -> str:
        """One line for people."""
        inside = min(self.room.device, self.blocks)
        host = f", {format_bytes(self.room.host)} more in host memory" if self.room.host else ""
        if inside == self.blocks:
            return f"memory: all {format_bytes(self.blocks)} of blocks stay"
        return f"memory: {format_bytes(inside)} of {format_bytes(self.blocks)} of blocks stay{host}, the rest is read"


def outlook(job: Job, device: Device) -> Outlook:
    """Raises UsageError for a budget that is smaller than what one block at a time takes."""
    import torch

    settings, cpu = job.settings, device.kind == "cpu"
    dtype = getattr(torch, DTYPES[settings.dtype])
    outside = sum(kept_nbytes(one, "rest", dtype) for one in job.weights)
    sizes = [[kept_nbytes(one, unit, dtype) for unit in one.model.blocks] for one in job.weights]
    model, base = job.weights[0].model, HOST_BASE[device.kind] + DIFFUSERS_BASE + PIPELINES
    expanded = model.dim * model.ffn_dim * 8 if any(one.format for one in job.weights) else 0
    at_work = outside + 2 * max(map(max, sizes)) + expanded + activation_nbytes(model, _shapes(job), device.kind)
    fixed = at_work + (base if cpu else 0)
    option, given = ("max_host_memory", settings.max_host_memory) if cpu else (
        "max_device_memory", settings.max_device_memory)  # fmt: skip
    if given is not None and given < fixed:
        raise UsageError(
            f"--{option} {format_bytes(given)}: {format_bytes(fixed)} are needed with one block at a time at this size;"
            " give more, or a smaller --size or --frame_num"
        )
    free = psutil.virtual_memory().available
    limit = given if given is not None else int(SHARE * free) + (base if cpu else 0) if cpu else _free(device)
    host = 0
    if not cpu:
        most = settings.max_host_memory if settings.max_host_memory is not None else int(SHARE * free) + base
        host = max(0, most - base)
    return Outlook(base if cpu else 0, fixed, max(map(sum, sizes)), limit, Room(max(0, limit - fixed), host))


def _free(device: Device) -> int:
    import torch

    module = torch.get_device_module(device.kind)
    return int(SHARE * module.mem_get_info()[0])


def _shapes(job: Job) -> Shapes:
    model, figures = job.weights[0].model, job.figures
    width, height = figures.size
    ratio = VAE_RATIO * (2 if model.family == "ti2v" else 1) * PATCH
    tokens = ((figures.frame_num - 1) // VAE_FRAMES + 1) * (width // ratio) * (height // ratio)
    states = TEXT_LEN + IMAGE_LEN.get(model.family, 0)
    word = "F32" if job.settings.dtype == "fp32" else "BF16"
    assert word in TORCH_DTYPES
    return Shapes(model.dim, 0, tokens, states, model.n_vace_blocks, word)


def fits_whole(nbytes: int, look: Outlook) -> bool:
    """Whether a text encoder of so many bytes can be loaded at once: nothing of the transformer is there by then."""
    return nbytes <= look.limit - look.base
