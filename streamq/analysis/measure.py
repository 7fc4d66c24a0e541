"""The figures: one block at a time, every type on each of its layers, then the block with one type throughout.

    block -> float forward of every sample, looking at inputs -> for each type: its layers' codes and errors, the block
    with them -> a line of the state file -> next block

Each block gets what the float blocks before it make, so its figures are its own. What the float block makes goes to the
disk, where each type's outputs are compared with it: one type's codes and one sample are in memory at a time. The state
file is written after each block; an interrupted analysis goes on behind the last that it has.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from streamq import wan
from streamq.analysis.prepare import WORK, Candidate, Job, float_nbytes, remove_work
from streamq.calibration.cache import Cache
from streamq.calibration.make import all_threads, make_set
from streamq.calibration.replay import Replay, Seen
from streamq.calibration.store import CalibSet, check_content, open_set
from streamq.checkpoint import Source
from streamq.device import Device
from streamq.device.cpu import give_memory_back
from streamq.dtypes import TORCH_DTYPES
from streamq.errors import RunError, UsageError, format_duration
from streamq.layers import Block, is_finite, quantize
from streamq.methods.report import relative_and_cosine
from streamq.methods.statistics import InputStatistics
from streamq.quantized import QuantizedLinear, Scheme
from streamq.savers.shard import disk_errors, write_whole
from streamq.simulate import put_in
from streamq.wan.blocks import flow, names_in, tensors_of

STATE = "state.cache"
SET_DOCUMENT, SET_SUFFIX = "calib.cache", ".cache"  # no names that a runtime would load
OUTLIER = 6.0  # times the median of the channels' largest values
Row = dict[str, Any]


def measure(job: Job, device: Device, about: Callable[[str], None]) -> tuple[list[Row], list[Row], list[str]]:
    """Rows of layers and of blocks, in the order of the forward, and what of the calibration inputs is made up.

    Raises RunError when the work fails; what is finished is kept and gone on with by the same command.
    """
    folder = job.settings.save_path / WORK
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with all_threads():
        state, inputs = _begin(job, folder, device, about)
        began, fresh = monotonic(), 0
        total = sum(len(expert.model.replay_order) for expert in job.experts)
        for expert in job.experts:
            keys = {unit: f"{expert.name}/{unit}".lstrip("/") for unit in expert.model.replay_order}
            todo = [unit for unit in keys if keys[unit] not in state["units"]]
            if not todo:  # its streams are gone, and to open them again would remove the other expert's
                continue
            cache = Cache(
                folder, inputs.experts[expert.name], TORCH_DTYPES[job.calibration.dtype], device, in_memory=False
            )
            with closing(cache):
                cache.restore(state["streams"].get(expert.name, {}))
                with (
                    closing(_Comparison(expert, job.calibration, inputs.experts[expert.name], cache, device)) as replay,
                    closing(Source(expert.model.checkpoint)) as source,
                ):
                    for unit in todo:
                        found = _unit(job, expert, unit, replay, source)
                        state["streams"][expert.name] = cache.sync()
                        state["units"][keys[unit]] = found
                        _save(folder, state)
                        cache.committed()
                        fresh += 1
                        about(_progress(keys[unit], found, len(state["units"]), total, (monotonic() - began) / fresh))
    rows = list(state["units"].values())
    layers = [row for found in rows for row in found["layers"]]
    return layers, [row for found in rows for row in found["blocks"]], list(inputs.document.get("synthetic", []))


def _progress(key: str, found: Row, done: int, total: int, seconds: float) -> str:
    errors = ", ".join(f"{row['type']} {row['rel_error']:.4g}" for row in found["blocks"])
    left = format_duration(seconds * (total - done)) if done < total else "0 s"
    return f"{key}: {done} of {total}, error of its output: {errors}; {format_duration(seconds)} a block, {left} left"


def _begin(job: Job, folder: Path, device: Device, about: Callable[[str], None]) -> tuple[dict[str, Any], CalibSet]:
    """The state of an interrupted analysis with the same identity and its inputs, or a new one."""
    state = _load(folder, job.identity)
    if state is None:
        remove_work(job.settings.save_path)
        state = {"identity": job.identity, "streams": {}, "units": {}}
        _save(folder, state)
    elif state["units"]:
        about(f"going on behind {len(state['units'])} blocks that are done")
    if job.calibration.given is not None:
        return state, job.calibration.given
    try:
        found = open_set(folder, SET_DOCUMENT)
        for name in found.experts:
            check_content(found, name)
        return state, found
    except UsageError as error:
        if state["units"]:
            raise UsageError(f"{error}: cannot be gone on with; start anew with --overwrite") from error
    made = make_set(
        folder, job.calibration.settings, job.experts, job.source, device, document=SET_DOCUMENT, suffix=SET_SUFFIX,
        about=about,
    )  # fmt: skip
    return state, made


def _load(folder: Path, identity: str) -> dict[str, Any] | None:
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_bytes())
    except ValueError:
        return None
    return state if isinstance(state, dict) and state.get("identity") == identity else None


def _save(folder: Path, state: Mapping[str, Any]) -> None:
    write_whole(folder / STATE, json.dumps(state).encode(), 0o600)


class _Comparison(Replay):
    """A replay that keeps the last block's outputs too, and runs a block a second time with other layers."""

    def _needed(self, unit: str) -> bool:
        return True

    def compare(self, unit: str, layers: Mapping[str, QuantizedLinear]) -> tuple[float, float, float]:
        """(relative error, cosine, error relative to what the block adds to its input) of the block's outputs.

        `layers` by diffusers name; the block's weights are in the runner, its float outputs are those of `observe`.
        Norms are of all samples and all streams that the block writes.
        """
        module, streams = self.runner.module(unit), flow(self.model, unit)
        floats = {name: module.get_submodule(name) for name in (full.removeprefix(f"{unit}.") for full in layers)}
        for name, layer in layers.items():
            put_in(module, name.removeprefix(f"{unit}."), layer)
        norms = [0.0] * 4
        for sample in range(len(self.inputs.samples)):
            given = {stream: self.cache.read(stream, sample) for stream in streams.reads}
            made = self.runner.run(unit, given, self._shared(sample))
            for stream, got in made.items():
                due, got = self.cache.written(stream, sample).float(), got.float()
                added = due - given[stream].float() if stream in given else due
                for i, tensor in enumerate((due, got, due - got, added)):
                    norms[i] += float(torch.linalg.vector_norm(tensor)) ** 2
            give_memory_back()
        for name, linear in floats.items():
            module.set_submodule(name, linear)
        error, cosine = relative_and_cosine(*norms[:3])
        return error, cosine, (norms[2] / norms[3]) ** 0.5 if norms[3] else 0.0


def _unit(job: Job, expert: wan.Expert, unit: str, replay: _Comparison, source: Source) -> Row:
    """Every figure of one block."""
    tensors = tensors_of(source, expert.model, names_in(expert.model, unit), replay.where)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            where = expert.model.checkpoint.where(expert.model.tensors[name])
            raise RunError(f"{where}: NaN or Inf in it; the source is damaged: download it again")
    mine = [
        {name: scheme for name, scheme in one.schemes[expert.name].items() if wan.block_of(name) == unit}
        for one in job.candidates
    ]
    wanted: dict[str, set[Scheme]] = defaultdict(set)
    for linear in expert.model.linears:
        if wan.block_of(linear.name) == unit:
            wanted[linear.name] = {part[linear.name] for part in mine if linear.name in part}
    wanted = {name: schemes for name, schemes in wanted.items() if schemes}
    seen = replay.observe(unit, tensors, wanted)
    replay.runner.fill(unit, tensors)
    times = [sample.timestep for sample in replay.inputs.samples]
    layers, blocks = [], []
    for one, schemes in zip(job.candidates, mine, strict=True):
        made, rows = _layers(expert, unit, one, schemes, seen, times)
        layers += rows
        error, cosine, added = replay.compare(unit, made)
        blocks.append({
            "expert": expert.name, "block": unit, "type": one.recipe.name, "format": one.recipe.form,
            "layers": len(made), "bytes": sum(row["bytes"] for row in rows),
            "float_bytes": sum(row["float_bytes"] for row in rows),
            "rel_error": error, "cosine": cosine, "update_rel_error": added,
        })  # fmt: skip
        del made
    replay.runner.release()
    order = {linear.native: i for i, linear in enumerate(expert.model.linears)}
    return {"layers": sorted(layers, key=lambda row: order[row["layer"]]), "blocks": blocks}


def _layers(
    expert: wan.Expert, unit: str, one: Candidate, schemes: Mapping[str, Scheme], seen: Seen, times: list[float]
) -> tuple[dict[str, QuantizedLinear], list[Row]]:
    """A block's layers by one type, and their rows."""
    made, rows, block = {}, [], Block(seen)
    floats = float_nbytes(one)[expert.name]
    for name, scheme in schemes.items():
        weight, bias = seen.tensors[f"{name}.weight"], seen.tensors.get(f"{name}.bias")
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        made[name], report = quantize(name, weight, bias, scheme, block, codes)
        error = report["rel_error"]
        rows.append({
            "expert": expert.name, "block": unit, "layer": wan.to_native(name), "type": one.recipe.name,
            "format": one.recipe.form, "outputs": weight.shape[0], "inputs": weight.shape[1],
            "bytes": one.nbytes[expert.name][name], "float_bytes": floats[name],
            "weight_rel_error": error, "weight_cosine": report["cosine"],
            "output_rel_error": report.get("output_rel_error", error),
            "output_cosine": report.get("output_cosine", report["cosine"]),
            **input_figures(seen.statistics[f"{unit}.{wan.group_of(name).name}"], times),
            "note": str(report.get("note", "")),
        })  # fmt: skip
    return made, rows


def input_figures(seen: InputStatistics, times: list[float]) -> Row:
    """Of a layer's input. `times`: each sample's time step.

    input_amax: the largest |x|. outlier_channels: how many channels have a largest |x| of more than OUTLIER times the
    median of all channels'; outlier_ratio: the worst of these ratios. time_spread: largest over smallest of the time
    steps' largest |x|, 1.0 where all are alike.
    """
    amax = seen.amax.cpu()
    median = float(amax.median())
    ratio = float(amax.max()) / median if median else 0.0
    steps: dict[float, float] = defaultdict(float)
    for time, most in zip(times, seen.sample_amax.tolist(), strict=True):
        steps[time] = max(steps[time], most)
    least = min(steps.values())
    return {
        "input_amax": float(amax.max()),
        "outlier_channels": int((amax > OUTLIER * median).sum()) if median else 0,
        "outlier_ratio": ratio,
        "time_spread": max(steps.values()) / least if least else 0.0,
    }
