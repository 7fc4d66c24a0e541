"""What an analysis will do, from headers and options: types, layers, bytes, memory; refuses early. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamq import __version__, hub, memory, wan
from streamq.analysis import recipes
from streamq.analysis.recipes import TypeRecipe
from streamq.calibration import make
from streamq.calibration import plan as calibrations
from streamq.calibration.plan import CalibPlan
from streamq.calibration.store import CalibSet, check_content, open_set
from streamq.checkpoint import DTYPE_SIZE
from streamq.device import kind_of
from streamq.errors import UsageError
from streamq.journal import source_times
from streamq.options import QuantOptions
from streamq.plan import DEVICE_SCRATCH, Plan, aligned, host_fixed
from streamq.planner import check_paths, make_plan
from streamq.quantized import Scheme
from streamq.savers import formats
from streamq.savers.shard import PARTIAL, disk_errors

# Looked at where none is named: what needs no search that takes hours, the widest first.
DEFAULT_TYPES = ("w8a8", "w8a16", "fp8", "w8a8_mxfp8", "w4a16", "w4a4_mxfp4", "w4a4")
WITHOUT_FORMAT = ("w8a8", "fp8", "w4a16", "w4a4")
DOCUMENT = "analyze.json"
WORK = "streamq-analysis"  # folder of what is kept while an analysis is unfinished
OURS = {DOCUMENT, "layers.csv", "blocks.csv", "recipe.yaml", WORK} | {
    f"{name}.{kind}" for name in ("layers", "blocks") for kind in ("png", "svg")
}


@dataclass(frozen=True)
class AnalyzeSettings:
    """The options of `streamq analyze`. Sizes in bytes; `types` empty: those that make sense for the model."""

    model_path: str
    save_path: Path
    types: tuple[str, ...] = ()
    form: str | None = None
    calib: Path | None = None
    max_size: int | None = None
    max_error: float | None = None
    top_k: int = 10
    device: str = "auto"
    seed: int = 0
    max_host_memory: int | None = None
    max_device_memory: int | None = None
    overwrite: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Candidate:
    """A type on a model: expert -> layer (diffusers name) -> its scheme, and its bytes in the format's files.

    `plan`: of a run that gives every layer this type.
    """

    recipe: TypeRecipe
    plan: Plan
    schemes: dict[str, dict[str, Scheme]]
    nbytes: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Job:
    """A checked analysis. `form`: of the recommended recipe; None where no format has all the types.

    `identity`: sha256 of all that decides the figures. `peaks`: predicted bytes of host and of device memory.
    """

    settings: AnalyzeSettings
    form: str | None
    candidates: tuple[Candidate, ...]
    calibration: CalibPlan
    identity: str
    peaks: tuple[int, int]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def experts(self) -> list[wan.Expert]:
        """The model's transformers."""
        return [part.expert for part in self.candidates[0].plan.experts]

    @property
    def source(self) -> Path:
        """The model, as found."""
        return self.candidates[0].plan.source_path


def prepare(settings: AnalyzeSettings) -> Job:
    """Check everything that headers tell, write nothing. Raises UsageError."""
    if settings.max_size is not None and settings.max_error is not None:
        raise UsageError("--max_size and --max_error exclude each other; give one of them")
    if settings.max_error is not None and not 0 < settings.max_error < math.inf:
        raise UsageError(f"--max_error {settings.max_error:g}: a relative error above 0, e.g. 0.05")
    if settings.top_k < 0:
        raise UsageError(f"--top_k {settings.top_k}: a number of layers, 0 for no table")
    budget = settings.max_size is not None or settings.max_error is not None
    asked, told = settings.form, []
    if budget and not settings.types and asked is None:
        asked = _most(DEFAULT_TYPES)
        told = [f"no --format: the recipe is for {asked}, which has most of the default types; --format is another's"]
    types = tuple(dict.fromkeys(settings.types)) or _default_types(asked)
    where, form = recipes.pick_format(types, asked)
    if budget and form is None:
        raise _no_format(types)
    _check_model(settings)
    _check_folder(settings)
    candidates, notes = _candidates(settings, types, where)
    calibration = _calibration(settings, candidates)
    kind = kind_of(settings.device)
    peaks = _peaks(settings, candidates, calibration, kind)
    warnings = list(_warnings(settings, candidates, calibration))
    if settings.max_device_memory is not None and kind == "cpu":
        warnings.append("--max_device_memory: ignored, the device is the cpu; its memory is --max_host_memory")
    identity = _identity(candidates, calibration, kind)
    notes = told + notes
    return Job(settings, form, tuple(candidates), calibration, identity, peaks, tuple(notes), tuple(warnings))


def _having(types: Sequence[str]) -> dict[str, list[str]]:
    """Format -> which of the types it has."""
    return {name: [kind for kind in types if name in recipes.served()[kind]] for name in formats()}


def _most(types: Sequence[str]) -> str:
    """The first of the formats that have most of the types."""
    having = _having(types)
    return max(having, key=lambda name: len(having[name]))


def _no_format(types: Sequence[str]) -> UsageError:
    having, best = _having(types), _most(types)
    some = "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in having.items() if kinds)
    return UsageError(
        f"a recipe is for one format, and none has all of {', '.join(types)} (have: {some}); give e.g."
        f" --format {best} --quant_type {','.join(having[best])}"
    )


def _default_types(form: str | None) -> tuple[str, ...]:
    if form is None:
        return WITHOUT_FORMAT
    known = recipes.served()
    return tuple(name for name in DEFAULT_TYPES if form in known[name]) or ("w8a8",)


def _check_model(settings: AnalyzeSettings) -> None:
    source = hub.resolve(settings.model_path, download=True)
    try:
        check_paths(source, settings.save_path)
    except OSError as error:
        raise UsageError(
            f"--save_path {str(settings.save_path)[:200]}: {error.strerror}; give another folder"
        ) from error
    family = wan.open_model(source)[0].model.family
    if family not in calibrations.CALIBRATED_FAMILIES:
        raise UsageError(
            f"{source}: a {family} model, whose blocks streamq cannot run; analyze knows"
            f" {', '.join(calibrations.CALIBRATED_FAMILIES)}"
        )


def _check_folder(settings: AnalyzeSettings) -> None:
    folder = settings.save_path
    if settings.overwrite or not folder.is_dir():
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name.removesuffix(".partial") not in OURS)
    if foreign:
        raise UsageError(
            f"--save_path {folder}: not empty ({', '.join(foreign[:3])}); choose another folder, or --overwrite"
        )


def _candidates(
    settings: AnalyzeSettings, types: Sequence[str], where: Mapping[str, str]
) -> tuple[list[Candidate], list[str]]:
    """Each type's plan. One that was not asked for by name is left out, with a note, where the model has no place."""
    found, notes = [], []
    for name in types:
        try:
            kind = recipes.type_recipe(name, where[name])
            found.append(_candidate(kind, plan_of(settings, kind.document(), where[name], calib=settings.calib)))
        except UsageError as error:
            if settings.types:
                raise
            notes.append(f"{name} left out: {error}")
    if not found:
        raise UsageError(f"no type fits this model: {'; '.join(notes)}; name one with --quant_type")
    for one in found:
        told = [text for text in one.plan.warnings if "stay float" in text or "no place for" in text]
        notes += [f"{one.recipe.name}: {text}" for text in told]
    return found, list(dict.fromkeys(notes))


def plan_of(settings: AnalyzeSettings, document: Mapping[str, Any], form: str, *, calib: Path | None) -> Plan:
    """The plan of a `quant` with this recipe. Raises UsageError."""
    options = QuantOptions(
        settings.model_path, settings.save_path, formats=(form,), device=settings.device, calib=calib,
        seed=settings.seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipes.as_yaml(document))
        return make_plan(replace(options, config_path=path), download=True)


def _candidate(kind: TypeRecipe, plan: Plan) -> Candidate:
    schemes: dict[str, dict[str, Scheme]] = {}
    nbytes: dict[str, dict[str, int]] = {}
    for part in plan.experts:
        name = part.expert.name
        schemes[name], nbytes[name] = {}, {}
        for step in (step for unit in part.units for step in unit.steps):
            output = step.outputs[0] if step.outputs else None
            if output is not None and output.scheme is not None:
                schemes[name][step.name] = output.scheme
                nbytes[name][step.name] = sum(place.nbytes for place in output.places)
    return Candidate(kind, plan, schemes, nbytes)


def float_nbytes(candidate: Candidate) -> dict[str, dict[str, int]]:
    """Expert -> layer (diffusers name) -> its bytes in the candidate's format if it stays float."""
    (target,) = candidate.plan.targets
    form, found = target.format, {}
    for part in candidate.plan.experts:
        model = part.expert.model
        found[part.expert.name] = {
            linear.name: sum(
                form.passed_spec(
                    model.native_name(info) if form.NAMES == "native" else f"{linear.name}.{leaf}",
                    info.dtype, info.shape, wan.unit_of(linear.name), target.save,
                ).nbytes
                for leaf, info in (("weight", linear.weight), ("bias", linear.bias)) if info is not None
            )
            for linear in model.linears
        }  # fmt: skip
    return found


def _calibration(settings: AnalyzeSettings, candidates: Sequence[Candidate]) -> CalibPlan:
    """What is replayed, for all types at once: every block gets what the float blocks before it make."""
    given: CalibSet | None = open_set(settings.calib.expanduser()) if settings.calib is not None else None
    experts = [part.expert for part in candidates[0].plan.experts]
    schemes = [part for one in candidates for part in one.schemes.values()]
    chosen: dict[str, Any] = {}
    for one in candidates:
        chosen |= one.recipe.recipe.calibration
    first = replace(candidates[0].recipe.recipe, calibration=chosen | {"next_input": "float"}, model_config={})
    found = calibrations.plan_calibration([first], schemes, experts, given, settings.seed)
    if given is None:
        make.check_schedule(found.settings, experts, candidates[0].plan.source_path)
    else:
        for name in given.experts:
            check_content(given, name)
    return found


def _warnings(settings: AnalyzeSettings, candidates: Sequence[Candidate], calibration: CalibPlan) -> list[str]:
    given = calibration.given
    if given is None:
        return []
    experts = [part.expert for part in candidates[0].plan.experts]
    found = []
    if given.document.get("model") != {expert.name: make.fingerprint(expert.model) for expert in experts}:
        found.append(f"--calib {given.path}: made with other weights than {candidates[0].plan.source_path}'s")
    if given.document.get("synthetic"):
        found.append(f"--calib {given.path}: made with synthetic {', '.join(given.document['synthetic'])}")
    return found


def _peaks(
    settings: AnalyzeSettings, candidates: Sequence[Candidate], calibration: CalibPlan, kind: str
) -> tuple[int, int]:
    """Predicted bytes on host and device. Raises UsageError if a budget is too small.

    Of a block: as it lies in the checkpoint, as it computes, and once more as a type's runtime computes it; the codes
    and scales of one type, one layer in fp32; the statistics of inputs; one sample's forward, or one method at work.
    """
    plan = candidates[0].plan
    schemes = [part for one in candidates for part in one.schemes.values()]
    at_work = 0
    for part in plan.experts:
        model, shapes = part.expert.model, calibration.shapes[part.expert.name]
        size = 2 if shapes.dtype == "BF16" else 4
        blocks = [[i for n, i in model.tensors.items() if wan.unit_of(n) == block] for block in model.blocks]
        weights = max(sum(math.prod(info.shape) for info in block) for block in blocks)
        source = max(sum(aligned(info.nbytes) for info in block) for block in blocks)
        same = all(DTYPE_SIZE[info.dtype] == size for block in blocks for info in block)
        scales = max((scheme.scale_bytes for found in schemes for scheme in found.values()), default=0.0)
        widest = max(math.prod(linear.weight.shape) for linear in model.linears)
        held = source + weights * size * (1 if same else 2) + int(weights * (1 + scales)) + 4 * widest
        forward = calibrations.activation_nbytes(model, shapes, kind)
        method = calibrations.method_nbytes(model, calibration, schemes, kind)
        seen = calibrations.statistics_nbytes(model, calibration, schemes)
        at_work = max(at_work, held + seen + max(forward, method) + calibration.stream_nbytes)
    experts = [part.expert for part in plan.experts]
    options = replace(
        plan.options, max_host_memory=settings.max_host_memory, max_device_memory=settings.max_device_memory
    )
    making = memory.making_peaks(calibration, experts, plan.source_path, options, kind, 0)
    host = max(host_fixed(kind, calibration) + at_work * (kind == "cpu"), making[0])
    device = 0 if kind == "cpu" else max(at_work + DEVICE_SCRATCH, making[1])
    memory.check_budgets(
        settings.max_host_memory, settings.max_device_memory, (host, device),
        "this analysis takes {}, of a block with one type at a time; raise the budget, or give --calib with fewer"
        " tokens a sample",
    )  # fmt: skip
    return host, device


def _identity(candidates: Sequence[Candidate], calibration: CalibPlan, kind: str) -> str:
    plan = candidates[0].plan
    known = {
        "version": __version__, "device": kind, "sources": plan.sources, "times": source_times(plan),
        "types": [[one.recipe.name, one.recipe.form, one.recipe.document()] for one in candidates],
        "calibration": calibration.identity,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def remove_work(save_path: Path) -> None:
    """Remove what an analysis keeps while it is unfinished; anybody else's files stay."""
    folder = save_path / WORK
    if not folder.is_dir() or folder.is_symlink():
        return
    with disk_errors(folder):
        for path in folder.iterdir():
            if path.name.endswith((".cache", ".stream", PARTIAL)):
                path.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
