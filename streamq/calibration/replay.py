"""Calibration inputs through one block at a time, with somebody looking at what its linear layers get.

Each sample goes through alone, as in the pipeline (another batch size would choose other kernels, which round
differently); its outputs are the next block's inputs. With `next_input: quantized` the samples go through twice: once
through the float block, to look, and once through the quantized one, to go on with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamq import wan
from streamq.calibration.cache import Cache
from streamq.calibration.plan import CalibPlan
from streamq.calibration.store import ExpertInputs
from streamq.checkpoint import Source, TensorInfo
from streamq.device import Device
from streamq.device.cpu import give_memory_back
from streamq.dtypes import TORCH_DTYPES
from streamq.errors import RunError
from streamq.methods.statistics import InputStatistics, Sample, Wanted
from streamq.quantized import QuantizedLinear, Scheme
from streamq.ranks import ALONE, Ranks
from streamq.simulate import put_in
from streamq.wan import Expert
from streamq.wan.blocks import BlockRunner, Shared, flow


class Replay:
    """One expert's samples on their way through its blocks. Used by the loop's own thread only."""

    def __init__(
        self, expert: Expert, plan: CalibPlan, inputs: ExpertInputs, cache: Cache, device: Device, ranks: Ranks = ALONE
    ) -> None:  # fmt: skip
        self.ranks, self._sample = ranks, 0
        self.model, self.plan, self.inputs, self.cache, self.device = expert.model, plan, inputs, cache, device
        self.where = getattr(device, "device", torch.device("cpu"))
        self.dtype = TORCH_DTYPES[plan.dtype]
        self.runner = BlockRunner(expert.model, self.dtype, self.where)
        self.synthetic: list[str] = []  # what of the inputs is made up, for the manifest
        self._set = Source(inputs.checkpoint)
        self._rotary = (self._shared_tensor("rotary.cos"), self._shared_tensor("rotary.sin"))
        self._scale = self._shared_tensor("control_scale") if inputs.shapes.n_vace else None

    def observe(self, unit: str, tensors: Mapping[str, Tensor], schemes: Mapping[str, set[Scheme]]) -> Seen:
        """Send every sample through the float block. `tensors`: the block's, source dtype, on the device.

        `schemes`: layer -> how it will be quantized, which decides what is kept of its group's input.
        Raises RunError if an input is not finite.
        """
        module = self.runner.fill(unit, tensors)
        seen = Seen(dict(tensors), self._statistics(unit, module, schemes))
        goes_on = self.plan.next_input == "float" and self._needed(unit)
        looked: dict[str, Sample] | None = {} if self.ranks.count > 1 else None
        with self._looking(module, unit, seen.statistics, looked):
            self._run(unit, keep=goes_on, statistics=seen.statistics, looked=looked)
        for group, statistics in seen.statistics.items():
            if not torch.isfinite(statistics.amax).all():
                raise RunError(
                    f"{group}: NaN or Inf in the inputs of {unit} while calibrating in {self.plan.dtype}; check the"
                    " calibration set, or calibrate with dtype fp32"
                )
        if self.plan.next_input == "float":
            self.runner.release()
        return seen

    def go_on(self, unit: str, layers: Mapping[str, QuantizedLinear]) -> None:
        """Make the next block's inputs, if `observe` has not: send the samples through the block with these layers.

        Weights and inputs are rounded as they will be at run time.
        """
        if self.plan.next_input == "float":
            return
        if not self._needed(unit):
            self.runner.release()
            return
        module = self.runner.module(unit)
        floats = {name: module.get_submodule(name) for name in (full.removeprefix(f"{unit}.") for full in layers)}
        for name, layer in layers.items():
            put_in(module, name.removeprefix(f"{unit}."), layer)
        self._run(unit, keep=True)
        for name, linear in floats.items():
            module.set_submodule(name, linear)
        self.runner.release()

    @contextmanager
    def _looking(
        self, module: nn.Module, unit: str, statistics: Mapping[str, InputStatistics], looked: dict[str, Sample] | None
    ) -> Iterator[None]:
        """Every group's input goes to its statistics: that of the group's first layer, as all have the same.

        Where samples are divided between processes, what is to be added of them goes to `looked`.
        """

        def look_at(group: str) -> Any:
            def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                if looked is None:
                    statistics[group].update(args[0])
                else:
                    looked[group] = statistics[group].look(args[0], self._sample)

            return look

        handles = []
        for group in wan.GROUPS:
            if f"{unit}.{group.name}" in statistics:
                present = next(name for name in group.layers if _has(module, name))
                hook = look_at(f"{unit}.{group.name}")
                handles.append(module.get_submodule(present).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _needed(self, unit: str) -> bool:
        """Whether anybody reads what the block makes: nobody the last one's."""
        return unit != self.model.replay_order[-1]

    def _run(
        self, unit: str, *, keep: bool, statistics: Mapping[str, InputStatistics] | None = None,
        looked: dict[str, Sample] | None = None,
    ) -> None:  # fmt: skip
        streams, count = flow(self.model, unit), len(self.inputs.samples)
        if keep:
            self.cache.begin(streams, self.model.replay_order.index(unit))
        for first in range(0, count, self.ranks.count):  # a sample for each process
            self._sample = sample = first + self.ranks.number
            if sample < count:
                shared = self._shared(sample)
                made = self.runner.run(unit, {s: self.cache.read(s, sample) for s in streams.reads}, shared)
                for stream, tensor in made.items() if keep else ():
                    self.cache.write(stream, sample, tensor)
            if statistics is not None and looked is not None:
                self._put_together(statistics, looked)
            give_memory_back()

    def _put_together(self, statistics: Mapping[str, InputStatistics], looked: dict[str, Sample]) -> None:
        """Every process's sample, in their order, into everybody's statistics; one group in memory at a time."""
        for group, whole in statistics.items():
            own = looked.pop(group, None)
            for seen in self.ranks.gather(own and own.to(torch.device("cpu"))):
                if seen is not None:
                    whole.add(seen)

    def _statistics(
        self, unit: str, module: nn.Module, schemes: Mapping[str, set[Scheme]]
    ) -> dict[str, InputStatistics]:
        found = {}
        for group in wan.GROUPS:
            wanted = [scheme for layer in group.layers for scheme in schemes.get(f"{unit}.{layer}", ())]
            if wanted:
                layer = next(name for name in group.layers if f"{unit}.{name}" in schemes)
                linear = module.get_submodule(layer)
                assert isinstance(linear, nn.Linear)
                want = Wanted(
                    mean=any(s.smooth is not None and s.smooth.method == "awq" for s in wanted),
                    histogram=any(s.pair.act.method in ("percentile", "mse") for s in wanted),
                    gram=any(s.gram for s in wanted),
                    rows=self.plan.rows,
                    gram_rows=self.plan.gram_rows,
                )
                found[f"{unit}.{group.name}"] = InputStatistics(
                    linear.in_features, want, len(self.inputs.samples), self.where
                )
        return found

    def _shared(self, sample: int) -> Shared:
        info = self.inputs.samples[sample]
        return Shared(
            self._shared_tensor(f"encoder_hidden_states.{info.states}"),
            self._shared_tensor(f"timestep_proj.{sample}"),
            self._shared_tensor(f"token_row.{sample}") if info.rows > 1 else None,
            self._rotary,
            self._scale,
        )

    def _shared_tensor(self, name: str) -> Tensor:
        info: TensorInfo = self.inputs.tensors[name]
        memory = self.device.empty(info.nbytes)
        self.device.wait(self.device.load(lambda start, into: self._set.read(info, start, into), memory))
        return memory.view(TORCH_DTYPES[info.dtype]).view(info.shape)

    def close(self) -> None:
        """Let go of files and weights."""
        self.runner.release()
        self._set.close()


class Seen:
    """A block at work: its tensors by diffusers name, and what was seen of its groups' inputs (`blocks.0.attn1.in`)."""

    def __init__(self, tensors: dict[str, Tensor], statistics: dict[str, InputStatistics]) -> None:
        self.tensors = tensors
        self.statistics = statistics


def _has(module: nn.Module, name: str) -> bool:
    return any(found == name for found, _ in module.named_modules())
