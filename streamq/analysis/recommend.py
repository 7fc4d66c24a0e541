"""The recommended recipe: which layers get which type under a budget of bytes or of error. Needs no torch.

The error of a recipe is the root of the mean, over all linear layers of all blocks (of both experts), of the squared
relative error of a layer's output on the calibration inputs; a layer that stays float has none. Each layer's error is
measured alone, on the float model's inputs. Its bytes are those of every file that `streamq quant` writes but the
manifest, as `streamq plan` says. Layers that share a smoothing vector in some type are chosen together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from streamq import wan
from streamq.analysis import recipes
from streamq.analysis.choose import Choice, choose
from streamq.analysis.prepare import Candidate, Job, float_nbytes, plan_of
from streamq.errors import RunError, UsageError, format_bytes
from streamq.plan import Plan
from streamq.quantized import Scheme

FLOAT = "float"
TRIES = 16  # of a budget of bytes less what files take besides layers

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """Layers (native names) of one choice. `options`: type -> (sum of squared errors, bytes, layers that it takes)."""

    layers: tuple[str, ...]
    options: dict[str, tuple[float, int, tuple[str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recommended:
    """`layers`: native name -> type. `error`: see the module; `nbytes`: of the plan's files.

    `bound`: no recipe of these types is better than this (error or bytes, whichever was to be small).
    """

    text: str
    layers: dict[str, str]
    error: float
    nbytes: int
    bound: float
    notes: tuple[str, ...]
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """For analyze.json and --json."""
        counts: dict[str, int] = defaultdict(int)
        for kind in self.layers.values():
            counts[kind] += 1
        return {
            "format": self.plan.targets[0].name, "bytes": self.nbytes, "error": self.error, "bound": self.bound,
            "types": dict(sorted(counts.items())), "layers": self.layers,
        }  # fmt: skip


def recommend(job: Job, rows: Sequence[Row]) -> tuple[Recommended | None, list[str]]:
    """The recipe under the job's budget, or of its only type; else None and a note why there is none.

    Raises RunError where no mixture of the types meets the budget.
    """
    settings, mine = job.settings, [one for one in job.candidates if one.recipe.form == job.form]
    budget = settings.max_size is not None or settings.max_error is not None
    if not budget and len(job.candidates) > 1:
        return None, ["no recipe: several types, and no --max_size or --max_error to choose between them by"]
    assert job.form is not None
    if not budget:
        (only,) = mine
        chosen = {wan.to_native(name): only.recipe.name for found in only.schemes.values() for name in found}
        return _made(job, chosen, rows, 0.0, [f"every layer that {only.recipe.name} takes gets it"]), []
    best: Recommended | None = None
    for kinds, may_stay in allowed(mine):
        some = [one for one in mine if one.recipe.name in kinds]
        if settings.max_size is not None and may_stay and _float_size(some[0]) <= settings.max_size:
            return None, [f"no recipe: the float model is within --max_size {settings.max_size}"]
        found = _within(job, some, rows, may_stay=may_stay)
        if found is not None and (best is None or _key(job, found) < _key(job, best)):
            best = found
    if best is None:
        what = (
            f"--max_size {settings.max_size}" if settings.max_size is not None else f"--max_error {settings.max_error}"
        )
        raise RunError(
            f"{what}: no mixture of {', '.join(one.recipe.name for one in mine)} in the format {job.form} meets it; the"
            " figures are in layers.csv; give a larger budget or more types"
        )
    return best, []


def _key(job: Job, found: Recommended) -> tuple[float, float]:
    return (found.error, found.nbytes) if job.settings.max_size is not None else (found.nbytes, found.error)


def check_budget(job: Job) -> None:
    """Raise UsageError, before anything is measured, for types of which no recipe can be made, and for a --max_size
    below the smallest."""
    settings = job.settings
    if settings.max_size is None and settings.max_error is None:
        return
    mine = [one for one in job.candidates if one.recipe.form == job.form]
    smallest = []
    for kinds, may_stay in allowed(mine):
        some = [one for one in mine if one.recipe.name in kinds]
        picks: dict[str, str] = {}
        for item in items(some, {}, may_stay=may_stay):
            kind = min(item.options, key=lambda name, of=item.options: of[name][1])  # type: ignore[misc]
            picks |= dict.fromkeys(item.options[kind][2], kind)
        if picks:
            found = plan_of(settings, document(some, picks), job.form or "", calib=settings.calib)
            smallest.append(found.bytes_to_write)
    least, limit = min(smallest, default=0), settings.max_size
    if limit is not None and least > limit:
        raise UsageError(
            f"--max_size {limit}: the smallest that {', '.join(one.recipe.name for one in mine)} makes of this model in"
            f" the format {job.form} is {least} bytes ({format_bytes(least)}); give more, or a smaller type"
        )


def allowed(candidates: Sequence[Candidate]) -> list[tuple[tuple[str, ...], bool]]:
    """Sets of types that the format's runtime can have together, none inside another; for each whether layers may stay
    float beside them. Found out by asking the format."""
    names = [one.recipe.name for one in candidates]
    able: list[tuple[str, ...]] = []
    for count in range(len(names), 0, -1):
        for kinds in combinations(names, count):
            if not any(set(kinds) <= set(larger) for larger in able) and (count == 1 or _mixes(candidates, kinds)):
                able.append(kinds)
    return [(kinds, _mixes(candidates, (*kinds, FLOAT))) for kinds in able]


def _mixes(candidates: Sequence[Candidate], kinds: Sequence[str]) -> bool:
    """Whether the format takes a model of which some layers have each of these types."""
    part = candidates[0].plan.experts[0]
    (target,) = candidates[0].plan.targets
    schemes: dict[str, Scheme | None] = {}
    by_name = {one.recipe.name: one.schemes[part.expert.name] for one in candidates}
    for number, linear in enumerate(part.expert.model.linears):
        turned = [kinds[(number + i) % len(kinds)] for i in range(len(kinds))]
        fit = [kind for kind in turned if kind == FLOAT or linear.name in by_name[kind]]
        schemes[linear.native] = None if not fit or fit[0] == FLOAT else by_name[fit[0]][linear.name]
    try:
        target.format.check(schemes, target.save)
    except UsageError:
        return False
    return True


def items(candidates: Sequence[Candidate], errors: Mapping[tuple[str, str], float], *, may_stay: bool) -> list[Item]:
    """What is chosen, layer by layer or group by group. `errors`: (type, native name) -> sum of squared errors."""
    first = candidates[0]
    layers = list(dict.fromkeys(li.native for part in first.plan.experts for li in part.expert.model.linears))
    stays: dict[str, int] = defaultdict(int)
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for found in float_nbytes(first).values():
        for name, nbytes in found.items():
            stays[wan.to_native(name)] += nbytes
    for one in candidates:
        for found in one.nbytes.values():
            for name, nbytes in found.items():
                sizes[one.recipe.name, wan.to_native(name)] += nbytes
    made = []
    for group in _linked(layers, candidates):
        options = {}
        for kind in (one.recipe.name for one in candidates):
            taken = tuple(layer for layer in group if (kind, layer) in sizes)
            if taken and (may_stay or len(taken) == len(group)):
                nbytes = sum(sizes.get((kind, layer), stays[layer]) for layer in group)
                options[kind] = (sum(errors.get((kind, layer), 0.0) for layer in taken), nbytes, taken)
        if may_stay or not options:
            options[FLOAT] = (0.0, sum(stays[layer] for layer in group), ())
        made.append(Item(group, options))
    return made


def _linked(layers: Sequence[str], candidates: Sequence[Candidate]) -> list[tuple[str, ...]]:
    """Layers that a smoothing vector ties together, in some type: they must have the same."""
    root = {layer: layer for layer in layers}

    def find(layer: str) -> str:
        while root[layer] != layer:
            layer = root[layer]
        return layer

    for schemes in (found for one in candidates for found in one.schemes.values()):
        for name, scheme in schemes.items():
            for smooth in (scheme.smooth, scheme.rows):
                for other in smooth.layers if smooth else ():
                    root[find(wan.to_native(other))] = find(wan.to_native(name))
    groups: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        groups[find(layer)].append(layer)
    return [tuple(group) for group in groups.values()]


def _within(job: Job, candidates: Sequence[Candidate], rows: Sequence[Row], *, may_stay: bool) -> Recommended | None:
    """The best within the budget of the types given."""
    settings, errors = job.settings, squared(rows)
    grouped = items(candidates, errors, may_stay=may_stay)
    count = layer_count(job)
    if settings.max_error is not None:
        limit = settings.max_error**2 * count
        by_size = [[(float(b), e) for e, b, _ in item.options.values()] for item in grouped]
        choice = choose(by_size, limit)
        if choice is None:
            return None
        found = _made(job, _picked(grouped, choice), rows, choice.bound, [])
        return None if found is None else replace(found, bound=found.nbytes - (choice.cost - choice.bound))
    assert settings.max_size is not None
    by_error = [[(e, float(b)) for e, b, _ in item.options.values()] for item in grouped]
    room = float(settings.max_size - _beside(candidates[0]))
    for _ in range(TRIES):
        choice = choose(by_error, room)
        if choice is None:
            return None
        found = _made(job, _picked(grouped, choice), rows, math.sqrt(max(choice.bound, 0.0) / count), [])
        if found is None:
            return None
        if found.nbytes <= settings.max_size:
            return found
        room = settings.max_size - (found.nbytes - choice.weight)  # less than it was: the files are too large
    return None


def _beside(candidate: Candidate) -> int:
    """Bytes of the files of a candidate's plan that are not its layers'; about the same for every mixture."""
    stays, layers = float_nbytes(candidate), 0
    for expert, found in stays.items():
        layers += sum(candidate.nbytes[expert].get(name, nbytes) for name, nbytes in found.items())
    return candidate.plan.bytes_to_write - layers


def _float_size(candidate: Candidate) -> int:
    """About what the files would have if every layer stayed float."""
    return _beside(candidate) + sum(sum(found.values()) for found in float_nbytes(candidate).values())


def _picked(grouped: Sequence[Item], choice: Choice) -> dict[str, str]:
    """Native name -> type, of the layers that are quantized."""
    picks: dict[str, str] = {}
    for item, number in zip(grouped, choice.options, strict=True):
        kind = list(item.options)[number]
        picks |= dict.fromkeys(item.options[kind][2], kind)
    return picks


def squared(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """(type, native name) -> squared relative error of the output, summed over experts."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        found[row["type"], row["layer"]] += float(row["output_rel_error"]) ** 2
    return dict(found)


def layer_count(job: Job) -> int:
    """Linear layers in all blocks of all experts."""
    return sum(len(expert.model.linears) for expert in job.experts)


def document(candidates: Sequence[Candidate], picks: Mapping[str, str]) -> dict[str, Any]:
    """The recipe that gives these layers their types."""
    layers = list(dict.fromkeys(li.native for p in candidates[0].plan.experts for li in p.expert.model.linears))
    parts = []
    for one in candidates:
        mine = [layer for layer in layers if picks.get(layer) == one.recipe.name]
        if mine:
            parts.append((one.recipe, recipes.patterns(mine, layers)))
    return recipes.mixture(parts, candidates[0].recipe.form, "streamq_analyze")


def _made(
    job: Job, picks: Mapping[str, str], rows: Sequence[Row], bound: float, notes: Sequence[str]
) -> Recommended | None:
    """The recipe's text, planned; None where it quantizes nothing."""
    if not picks:
        return None
    candidates = [one for one in job.candidates if one.recipe.form == job.form]
    found = document(candidates, picks)
    plan = plan_of(job.settings, found, job.form or "", calib=job.settings.calib)
    errors, told = squared(rows), list(notes)
    error = math.sqrt(sum(errors[kind, layer] for layer, kind in picks.items()) / layer_count(job))
    if _differs(candidates, picks, plan):
        told.append(
            "some layers' smoothing differs from what was measured: the format places it otherwise in a mixture"
        )
    layers = list(dict.fromkeys(li.native for expert in job.experts for li in expert.model.linears))
    comments = [
        "Made by streamq analyze; use it with --config_path, and with the same --calib.",
        f"Predicted: {plan.bytes_to_write} bytes in all files; error {error:.6g}, the root mean square over"
        f" {layer_count(job)} layers of",
        "each output's relative error on calibration inputs.",
    ]
    shown = {layer: picks.get(layer, FLOAT) for layer in layers}
    return Recommended(recipes.as_yaml(found, comments), shown, error, plan.bytes_to_write, bound, tuple(told), plan)


def _differs(candidates: Sequence[Candidate], picks: Mapping[str, str], plan: Plan) -> bool:
    by_name = {one.recipe.name: one for one in candidates}
    for part in plan.experts:
        for step in (step for unit in part.units for step in unit.steps):
            scheme = step.outputs[0].scheme if step.outputs else None
            kind = picks.get(wan.to_native(step.name))
            if scheme is not None and kind is not None:
                if by_name[kind].schemes[part.expert.name].get(step.name) != scheme:
                    return True
            elif (scheme is None) != (kind is None):
                return True
    return False
