"""What a run takes of the host's and the device's memory, from the plan's steps: part of making the plan."""

from __future__ import annotations

from pathlib import Path

from streamq import wan
from streamq.calibration import plan as calibrations
from streamq.calibration.plan import CalibPlan
from streamq.checkpoint import DTYPE_SIZE
from streamq.device import MiB
from streamq.errors import UsageError, format_bytes
from streamq.options import QuantOptions
from streamq.plan import DEVICE_SCRATCH, ExpertPlan, host_fixed
from streamq.quantized import Scheme

# On the CPU, beyond the tiles of one int8 method, which HOST_BASE has: of a method in blocks of columns, and of each
# method that is at work beside another, in a thread of its own.
BLOCK_TILES = 4 * MiB
SIDE_BY_SIDE = 12 * MiB


def making_peaks(
    calibration: CalibPlan, experts: list[wan.Expert], source: Path, options: QuantOptions, kind: str, merging: int
) -> tuple[int, int]:
    """Most bytes on host and device while a run makes its own inputs. Raises UsageError if a budget is too small."""
    if calibration.given is not None:
        return 0, 0
    from streamq.calibration import encoders, prepare

    seen = prepare.outlook(calibration.settings, experts, encoders.find_parts(source), kind)
    host, device = seen.peak_host_bytes + merging, seen.peak_device_bytes + merging * (kind != "cpu")
    check_budgets(
        options.max_host_memory, options.max_device_memory, (host, device),
        "making the calibration inputs takes {}; raise the budget, or make them elsewhere with streamq calib and give"
        " --calib",
    )  # fmt: skip
    return host, device


def check_budgets(on_host: int | None, on_device: int | None, needs: tuple[int, int], text: str) -> None:
    """Raise UsageError if a budget is smaller than what is needed of it. `text` says for what, and the next step."""
    budgets = (("--max_host_memory", on_host), ("--max_device_memory", on_device))
    for (option, budget), need in zip(budgets, needs, strict=True):
        if budget is not None and need > budget:
            raise UsageError(f"{option}: a budget of {_spelt(budget)}, but {text.format(_spelt(need))}")


def _spelt(count: int) -> str:
    """`5000000000 bytes (5 GB)`."""
    return f"{count} bytes ({format_bytes(count)})"


def beside_nbytes(parts: tuple[ExpertPlan, ...], read_ahead: int, kind: str) -> int:
    """What methods and formats make outside the arena, of the layers between their methods and their files; of a block
    that inputs go through, of all its layers."""
    most = tiles = 0
    for unit in (unit for part in parts for unit in part.units):
        held = [step for step in unit.steps if step.held]
        window = len(held) if unit.replayed else read_ahead + 1
        most = max(most, *(sum(s.beside_nbytes for s in held[i : i + window]) for i in range(len(held))), 0)
        for schemes in (step.schemes for step in held if step.schemes):
            apart = not any(scheme.needs_data for scheme in schemes)
            in_blocks = any(scheme.scale_bytes for scheme in schemes)
            tiles = max(tiles, BLOCK_TILES * in_blocks + SIDE_BY_SIDE * (len(schemes) - 1) * apart)
    return most + tiles * (kind == "cpu")


def replay_nbytes(
    parts: tuple[ExpertPlan, ...], calibration: CalibPlan | None, schemes: list[dict[str, Scheme]], kind: str
) -> int:
    """What a replay takes on the device besides the block as it lies in the checkpoint."""
    if calibration is None:
        return 0
    most = 0
    for part in parts:
        model, shapes = part.expert.model, calibration.shapes[part.expert.name]
        size = 2 if shapes.dtype == "BF16" else 4
        cast = [
            sum(size * i.nbytes // DTYPE_SIZE[i.dtype] for s in u.steps for i in s.sources if i.dtype != shapes.dtype)
            for u in part.units
            if u.replayed
        ]
        forward = calibrations.activation_nbytes(model, shapes, kind) + max(cast)
        statistics = calibrations.statistics_nbytes(model, calibration, schemes)
        most = max(most, statistics + max(forward, calibrations.method_nbytes(model, calibration, schemes, kind)))
    return most


def arena_nbytes(
    parts: tuple[ExpertPlan, ...], options: QuantOptions, kind: str, calibration: CalibPlan | None, more: int
) -> tuple[int, int | None]:
    """Room for the layer (or block) at work, `read_ahead` layers before and as many behind it, as far as the budgets
    allow; and what is left of the host's budget for a cache, None where there is no budget. `more`: what the run takes
    on the device besides. Raises UsageError if a budget is too small."""
    units = [[step.working_nbytes for step in unit.steps if step.held] for part in parts for unit in part.units]
    sizes = [size for unit in units for size in unit]
    window = 2 * options.read_ahead + 1
    wanted, least = max(sum(sizes[i : i + window]) for i in range(len(sizes))), max(sizes)
    if calibration is not None:  # a block is held whole, and may have to begin behind what was read ahead of it
        block = max(sum(unit) for unit in units)
        wanted, least = block + (window - 1) * max(sizes), block + max(sizes)
    fixed_host = host_fixed(kind, calibration)
    room = None
    budgets = [("--max_host_memory", options.max_host_memory, fixed_host + more * (kind == "cpu"), kind == "cpu")]
    if kind != "cpu":
        budgets.append(("--max_device_memory", options.max_device_memory, DEVICE_SCRATCH + more, True))
    for option, budget, fixed, holds_arena in budgets:
        need = fixed + least * holds_arena
        if budget is None:
            continue
        if need > budget:
            what = (
                "the largest layer" if calibration is None else "a block; fewer tokens a sample (size, frame_num) help"
            )
            raise UsageError(
                f"{option}: a budget of {_spelt(budget)}, but the least that this run can do with is {_spelt(need)}"
                f" ({fixed} before the first weight, {need - fixed} for {what}); raise the budget"
            )
        if holds_arena:
            wanted = min(wanted, budget - fixed)
        if option == "--max_host_memory":
            room = max(0, budget - fixed - wanted * holds_arena)
    return wanted, room
