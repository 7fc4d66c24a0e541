"""Makes the plan: reads headers and recipes, settles every layer's scheme and every tensor's place, refuses early."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from streamq import card, hub, lora, memory, recipe, resolve, smoothing, wan
from streamq.calibration import make
from streamq.calibration import plan as calibrations
from streamq.calibration.plan import CalibPlan
from streamq.calibration.store import open_set
from streamq.card import Card
from streamq.checkpoint import TensorInfo
from streamq.device import kind_of
from streamq.errors import UsageError, nearest
from streamq.options import QuantOptions
from streamq.plan import (
    ExpertPlan,
    Output,
    Plan,
    Step,
    Target,
    Unit,
    existing_parent,
)
from streamq.quantized import LABELS, Scheme
from streamq.savers import Attention, Format, SaveOptions, Schemes, Spec, formats, gguf_file, shard
from streamq.savers.shard import Place, TensorFile

CONTAINERS = {"safetensors": shard.layout, "gguf": gguf_file.layout}
GPTQ_ROWS = 2  # for each column: fewer, and it fits them instead of the model's inputs


def make_plan(options: QuantOptions, *, download: bool) -> Plan:
    """Plan a run. Reads headers and small JSON files, writes nothing. `download`: a hub id may be fetched.

    Raises UsageError for everything that would make the run fail or its result useless, as far as headers can tell.
    """
    source_path = hub.resolve(options.model_path, download=download)
    try:
        check_paths(source_path, options.save_path)
    except (OSError, RuntimeError) as error:  # a name that is too long; links in a circle, RuntimeError before 3.13
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"--save_path {str(options.save_path)[:200]}: {why}; give another folder") from error
    kind = kind_of(options.device)
    experts = wan.open_model(source_path)
    wan.check_model_type(options.model_type, experts)
    experts = lora.attach(experts, lora.open_loras(options.lora, outside=options.save_path))
    for expert in experts:
        check_sources_outside(expert, options.save_path)
    targets, warnings = _targets(options)
    builder = _Builder(options, source_path, targets, warnings)
    placed = {expert.name: [builder.placement(target, expert) for target in targets] for expert in experts}
    schemes = [placement.schemes for placements in placed.values() for placement in placements]
    calibration = None
    if any(calibrations.needs_data(part) for part in schemes):
        given = open_set(options.calib) if options.calib else None
        calibration = calibrations.plan_calibration([t.recipe for t in targets], schemes, experts, given, options.seed)
        if given is None:
            make.check_schedule(calibration.settings, experts, source_path)
        builder.warnings.extend(_calibration_warnings(calibration, schemes))
        builder.warnings.extend(_few_rows(calibration, schemes, experts))
    elif options.calib:
        builder.warnings.append(f"--calib {options.calib}: not used, this recipe needs no data")
    parts = tuple(builder.expert(expert, placed[expert.name], calibration is not None) for expert in experts)
    cards, usage = builder.cards(experts, calibration)
    replay = memory.replay_nbytes(parts, calibration, schemes, kind)
    beside = memory.beside_nbytes(parts, options.read_ahead, kind)
    arena, room = memory.arena_nbytes(parts, options, kind, calibration, replay + beside)
    cache, making = 0, (0, 0)
    if calibration is not None:
        merging = max(step.merge_nbytes for part in parts for unit in part.units for step in unit.steps)
        making = memory.making_peaks(calibration, experts, source_path, options, kind, merging)
        cache = max(calibration.cache_nbytes(expert.name) for expert in experts)
        calibration = replace(calibration, in_memory=calibrations.fits_in_memory(cache, room))
        cache = cache if calibration.in_memory else calibration.stream_nbytes
    return Plan(
        options, source_path, kind, tuple(targets), parts, tuple(builder.files), tuple(builder.documents),
        builder.layers, arena, tuple(dict.fromkeys(builder.warnings)), cards, usage, calibration, replay,
        beside, cache, making,
    )  # fmt: skip


def _calibration_warnings(calibration: CalibPlan, schemes: list[dict[str, Scheme]]) -> list[str]:
    found = []
    if any(scheme.type == "w8a8_static" for part in schemes for scheme in part.values()):
        found.append(
            "w8a8_static: one activation range for all tokens and time steps costs accuracy; w8a8 has a range per token"
        )
    if calibration.given is not None and calibration.given.document.get("synthetic"):
        missing = ", ".join(calibration.given.document["synthetic"])
        found.append(f"--calib {calibration.given.path}: made with synthetic {missing}")
    return found


def _few_rows(calibration: CalibPlan, schemes: list[dict[str, Scheme]], experts: list[wan.Expert]) -> list[str]:
    """GPTQ fits the rows that it sees: with hardly more of them than columns it fits nothing else."""
    for expert in experts:
        tokens = calibration.shapes[expert.name].tokens
        rows = calibration.samples[expert.name] * min(calibration.gram_rows or tokens, tokens)
        widths = {linear.name: linear.weight.shape[1] for linear in expert.model.linears}
        widest = max((widths[n] for part in schemes for n, s in part.items() if s.gram and n in widths), default=0)
        if rows < GPTQ_ROWS * widest:
            return [
                f"gptq: {rows} rows of calibration inputs for {widest} columns, {GPTQ_ROWS * widest} would do; with few"
                " it may be worse than without on other prompts: use more or longer samples (num_samples, size,"
                " frame_num, gram_rows)"
            ]
    return []


def check_paths(source: Path, save_path: Path) -> None:
    model, save = source.resolve(), save_path.resolve()
    for inner, outer, relation in ((save, model, "inside"), (model, save, "above")):
        if inner == outer:
            raise UsageError(f"--save_path {save_path}: the same as --model_path; choose a folder beside it")
        if inner.is_relative_to(outer):
            raise UsageError(
                f"--save_path {save_path}: lies {relation} --model_path {source}; choose a folder beside it"
            )
    if os.path.lexists(save_path) and not save_path.is_dir():
        kind = "a link to nowhere" if save_path.is_symlink() else "a file"
        raise UsageError(f"--save_path {save_path}: {kind}; give a folder")
    parent = existing_parent(save_path)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"--save_path {save_path}: {parent} cannot be written to; check its permissions")


def check_sources_outside(expert: wan.Expert, save_path: Path) -> None:
    save = save_path.resolve()
    for file in expert.model.checkpoint.files:
        if file.path.resolve().is_relative_to(save):
            raise UsageError(
                f"--save_path {save_path}: holds the source file {file.path.resolve()}; choose another folder"
            )


def _targets(options: QuantOptions) -> tuple[list[Target], list[str]]:
    known = formats()
    for name in options.formats:
        if name not in known:
            raise UsageError(
                f"--format {name}: unknown; this version has {', '.join(known)}{nearest(name, tuple(known))}"
            )
    if options.config_path is not None and options.quant_type is not None:
        raise UsageError("--config_path and --quant_type exclude each other; give one of them")
    if options.config_path is None and options.quant_type is None:
        raise UsageError("neither --quant_type nor --config_path; say what to do, e.g. --quant_type w8a8")
    if options.config_path is not None:
        given = recipe.load_recipe(options.config_path)
        chosen = {name: given for name in options.formats or (given.format or "mindie",)}
    else:
        assert options.quant_type is not None
        chosen = {}
        for wanted in options.formats or (None,):
            found = resolve.recipe_for(options.quant_type, wanted)
            chosen[wanted or found.format or "mindie"] = found
    targets = [
        Target(name, known[name], found, name if len(chosen) > 1 else "", _save_options(options, found))
        for name, found in chosen.items()
    ]
    tools = {tool for target in targets for tool in target.format.RULES if tool}
    if options.match and options.match not in tools:
        every = ", ".join(f"{t} (format {n})" for n, f in known.items() for t in f.RULES if t)
        raise UsageError(f"--match {options.match}: not a tool whose bytes these formats can match; known: {every}")
    if options.layout != "block" and not any(options.layout in target.format.LAYOUTS for target in targets):
        able = ", ".join(name for name, form in known.items() if options.layout in form.LAYOUTS)
        raise UsageError(f"--layout {options.layout}: a setting of {able}, not of {', '.join(chosen)}; leave it out")
    warnings = ["--trust_remote_code True: streamq runs no code out of a checkpoint"] * options.trust_remote_code
    if options.max_device_memory is not None and kind_of(options.device) == "cpu":
        warnings.append("--max_device_memory: ignored, the device is the cpu; its memory is --max_host_memory")
    return targets, warnings


def _save_options(options: QuantOptions, found: recipe.Recipe) -> SaveOptions:
    return SaveOptions(options.layout, options.max_shard_size or found.part_file_size * (1 << 30))


class _Builder:
    """Grows the parts of a plan that are shared by experts and targets: numbered files, documents, layers, warnings."""

    def __init__(self, options: QuantOptions, source_path: Path, targets: list[Target], warnings: list[str]) -> None:
        self.options = options
        self.source_path = source_path
        self.targets = targets
        self.warnings = warnings
        self.files: list[TensorFile] = []
        self.documents: list[tuple[str, bytes, int]] = []
        self.layers: dict[str, dict[str, str]] = {target.name: {} for target in targets}
        self.schemes: dict[str, tuple[Schemes, SaveOptions]] = {}  # the last expert's: both have the same

    def placement(self, target: Target, expert: wan.Expert) -> smoothing.Placement:
        """What the target's recipe does to each layer, smoothing included."""
        model = expert.model
        linears = _linears(target, model)
        pairs, warnings = resolve.resolve(target.recipe, [linear.native for linear in linears])
        schemes = {li.name: self.scheme(target, pair) for li in linears if (pair := pairs[li.native])}
        _check_outer(target, schemes)
        self.leave_unfit(target, model, schemes)
        placed = smoothing.place(target.recipe, target.name, target.format.WAYS, model, schemes)
        self.warnings.extend([*warnings, *placed.warnings])
        rule = target.format.RULES[None]
        for name, scheme in placed.schemes.items():
            if (scheme.smooth or scheme.rows) and scheme.rule != rule:
                placed.schemes[name] = replace(scheme, rule=rule)
                self.warnings.append(f"--match {self.options.match}: smoothed layers keep streamq's own arithmetic")
        return placed

    def leave_unfit(self, target: Target, model: wan.Model, schemes: dict[str, Scheme]) -> None:
        """Take out the layers whose sizes the format's runtime has no kernel for."""
        reasons: dict[str, list[str]] = {}
        for linear in _linears(target, model):
            if linear.name in schemes and (reason := target.format.unfit(linear, schemes[linear.name])):
                reasons.setdefault(reason, []).append(linear.native)
                del schemes[linear.name]
        for reason, names in reasons.items():
            self.warnings.append(f"{target.name}: {len(names)} layers stay float ({names[0]}, …): {reason}")
        if reasons and not schemes:
            reason, names = next(iter(reasons.items()))
            raise UsageError(
                f"{target.name}: no layer of this model fits its runtime: {names[0]} has {reason}; change the recipe,"
                " or choose another --format"
            )

    def expert(self, expert: wan.Expert, placed: list[smoothing.Placement], replay: bool) -> ExpertPlan:
        model = expert.model
        self.warnings.extend(model.warnings)
        attention = [self.attention(target, model) for target in self.targets]
        beside = [name for placement in placed for name in placement.beside]
        rotated = [_rotation(name) for marks in attention for name, mark in marks.items() if mark.rotated]
        pieces = _pieces(model, list(dict.fromkeys([*beside, *rotated])))
        by_target = [self.target(*parts, expert, pieces) for parts in zip(self.targets, placed, attention, strict=True)]
        prefix = f"{expert.name}/" if expert.name else ""
        steps: dict[str, list[Step]] = {}
        for name, sources in pieces.items():
            outputs = tuple(
                Output(
                    number,
                    placed[number].schemes.get(name),
                    tuple(places[spec] for spec in specs[name]),
                    placed[number].folded.get(name) or placed[number].beside.get(name),
                    _head_dim(model) if name in rotated else 0,
                )
                for number, (specs, places) in enumerate(by_target)
                if specs[name]
            )
            unit = wan.unit_of(name)
            tensors = _tensor_names(name, model, sources)
            replayed = replay and unit != "rest" and bool(sources)
            deltas = lora.deltas_of(model, sources)
            steps.setdefault(unit, []).append(
                Step(prefix + wan.to_native(name), name, tensors, sources, outputs, replayed, deltas)
            )
        return ExpertPlan(expert, tuple(Unit(prefix + unit, unit, tuple(found)) for unit, found in steps.items()))

    def attention(self, target: Target, model: wan.Model) -> dict[str, Attention]:
        """What the target's recipe does to attention modules, by native name."""
        for step in target.recipe.process:
            if isinstance(step, recipe.AttentionStep) and step.kind not in target.format.ATTENTION:
                able = ", ".join(name for name, form in formats().items() if step.kind in form.ATTENTION)
                raise UsageError(
                    f"recipe {target.recipe.name}: {step.path}: {step.kind} is for {able}, the format {target.name} has"
                    " nothing like it; take the step out"
                )
        modules = dict.fromkeys(
            linear.native.removesuffix(".q") for linear in model.linears if linear.native.endswith("_attn.q")
        )
        return resolve.resolve_attention(target.recipe, list(modules))

    def target(
        self, target: Target, placed: smoothing.Placement, attention: dict[str, Attention], expert: wan.Expert,
        pieces: dict[str, tuple[TensorInfo, ...]],
    ) -> tuple[dict[str, list[str]], dict[str, Place]]:  # fmt: skip
        """Written names by piece, and the place of each written name, for one format and expert."""
        model, form, schemes = expert.model, target.format, placed.schemes
        linears = {linear.name: linear for linear in _linears(target, model)}
        by_native = {linear.native: schemes.get(n) for n, linear in linears.items()}
        save = replace(target.save, attention=attention)
        self.warnings.extend(form.check(by_native, save))
        written: dict[str, list[Spec]] = {}
        for name, sources in pieces.items():
            unit = wan.unit_of(name)
            if name in schemes:
                written[name] = form.quantized_specs(linears[name], schemes[name], save)
            elif sources:
                names = _tensor_names(name, model, sources)
                if form.NAMES == "native":
                    names = tuple(model.native_name(source) for source in sources)
                pairs = zip(names, sources, strict=True)
                written[name] = [form.passed_spec(own, s.dtype, s.shape, unit, save) for own, s in pairs]
            elif name in placed.beside:
                written[name] = form.vector_specs(name, model.dim)
            else:
                marks = [module for module, mark in attention.items() if mark.rotated and _rotation(module) == name]
                written[name] = [spec for module in marks for spec in form.rotation_specs(module, _head_dim(model))]
        files = form.files([spec for specs in written.values() for spec in specs], by_native, save)
        folder = target.folder_of(expert)
        places = self.place(files, folder, form, form.metadata(model, by_native, save))
        beside = [self.source_path, model.checkpoint.root] if self.source_path.is_dir() else []
        for document in form.documents(model, files, by_native, save, beside):
            self.documents.append((f"{folder}/{document.name}".lstrip("/"), document.content, form.MODE))
        self.schemes[target.name] = by_native, save
        label = f"{expert.name}/" if expert.name else ""
        kinds = {linear.native: schemes[n].label if n in schemes else "float" for n, linear in linears.items()}
        self.layers[target.name] |= {label + name: kind for name, kind in kinds.items()}
        return {name: [spec.name for spec in specs] for name, specs in written.items()}, places

    def scheme(self, target: Target, pair: recipe.Pair) -> Scheme:
        assert pair.type is not None
        if pair.type not in target.format.TYPES:
            kind = f"{LABELS[pair.type]} in blocks (per_block)" if pair.type in LABELS else pair.type
            others = [name for name, form in formats().items() if pair.type in form.TYPES]
            instead = f"it is written for {', '.join(others)}" if others else "no format of this version has it"
            raise UsageError(
                f"type {kind} does not go into the format {target.name}: {instead};"
                f" {target.name} has {', '.join(LABELS.get(own, own) for own in target.format.TYPES)}"
            )
        rule = target.format.RULES.get(self.options.match) or target.format.RULES[None]
        convert = target.recipe.model_config.get("convert_model_dtype")
        if rule.arithmetic == "source" and self.options.match == "msmodelslim" and convert:
            rule = replace(rule, arithmetic="bf16")  # the tool to be matched would load the model so
        return Scheme(pair.type, pair, rule)

    def cards(
        self, experts: list[wan.Expert], calibration: CalibPlan | None
    ) -> tuple[dict[str, Card], dict[str, list[str]]]:
        """Every format's own documents and its model card, beside its experts' folders; and how it is loaded."""
        found, usage = {}, {}
        for target in self.targets:
            form, (schemes, save) = target.format, self.schemes[target.name]
            model, names = experts[0].model, [expert.name for expert in experts]
            for document in form.root_documents(names, model, schemes):
                path = f"{target.folder}/{document.name}".lstrip("/")
                self.documents.append((path, document.content, form.MODE))
            folders = {name: "/".join(part for part in (card.FOLDER, form.EXPERTS[name]) if part) for name in names}
            usage[target.name] = form.usage(folders, model, schemes, save)
            measured = any(scheme is not None and scheme.needs_data for scheme in schemes.values())
            made = card.make_card(
                target.name, _about(experts), self.layers[target.name], _called(target.recipe),
                _facts(self.options, experts, calibration if measured else None), usage[target.name], measured,
            )  # fmt: skip
            path = f"{target.folder}/{card.NAME}".lstrip("/")
            found[path] = made
            self.documents.append((path, made.render({}), form.MODE))
        return found, usage

    def place(
        self, files: list[tuple[str, list[Spec]]], folder: str, form: Format, metadata: dict[str, str]
    ) -> dict[str, Place]:
        lay_out, mode = CONTAINERS[form.CONTAINER], form.MODE
        places: dict[str, Place] = {}
        for name, specs in files:
            file, found = lay_out(f"{folder}/{name}".lstrip("/"), len(self.files), specs, mode, metadata)
            self.files.append(file)
            for place in found:
                if place.name in places:
                    raise UsageError(f"{place.name}: two source tensors would be written under this name")
                places[place.name] = place
        return places


def _linears(target: Target, model: wan.Model) -> tuple[wan.Linear, ...]:
    """What the target's recipe can reach."""
    return model.linears + (model.outer_linears if target.format.OUTER else ())


def _check_outer(target: Target, schemes: dict[str, Scheme]) -> None:
    """Calibration inputs go through blocks: no layer outside can be calibrated."""
    for name, scheme in schemes.items():
        if wan.block_of(name) is None and scheme.needs_data:
            raise UsageError(
                f"recipe {target.recipe.name}: {scheme.type} needs calibration inputs, and {wan.to_native(name)} lies"
                ' outside the blocks, where there are none; give that step include: ["blocks.*"]'
            )


def _rotation(module: str) -> str:
    """The piece that stands for an attention module's rotation."""
    return f"{module}.rotation"


def _head_dim(model: wan.Model) -> int:
    return model.dim // int(model.native_config["num_heads"])


def _about(experts: list[wan.Expert]) -> str:
    model = experts[0].model
    count = "two transformers, each of" if len(experts) == 2 else "a transformer of"
    return f"Wan {model.family}: {count} {model.n_blocks + model.n_vace_blocks} blocks, width {model.dim}."


def _called(found: recipe.Recipe) -> str:
    """The recipe by the name it gives itself; a file's name is the user's own business."""
    about = found.document.get("metadata") or {}
    return f"the recipe `{about['config_id']}`" if about.get("config_id") else "a recipe of its user's"


def _facts(options: QuantOptions, experts: list[wan.Expert], calibration: CalibPlan | None) -> list[str]:
    found = []
    if merged := lora.loras_of(expert.model for expert in experts):
        found.append(f"Merged into the weights before: {', '.join(one.shown for one in merged)}.")
    if options.match:
        found.append(f"Weights and scales have the bytes of {options.match}'s arithmetic.")
    if calibration is not None:
        samples, tokens = next(iter(calibration.samples.values())), next(iter(calibration.shapes.values())).tokens
        found.append(
            f"Calibrated on {samples} samples of {tokens} tokens; `streamq.json` says what of them was made up."
        )
    return found


def _tensor_names(name: str, model: wan.Model, sources: tuple[TensorInfo, ...]) -> tuple[str, ...]:
    """Diffusers names of a step's tensors, weight before bias."""
    return (name,) if name in model.tensors else (f"{name}.weight", f"{name}.bias")[: len(sources)]


def _pieces(model: wan.Model, beside: list[str]) -> dict[str, tuple[TensorInfo, ...]]:
    """Step name -> its tensors, in the order of the model's forward: linear layers whole, everything else one by one.

    `beside`: what the run makes, without tensors; each comes last in its block. The order is the same for every recipe
    and format, so that a format's files do not depend on what is written beside them.
    """
    linears = {linear.name: linear for linear in model.linears + model.outer_linears}
    units: dict[str, dict[str, tuple[TensorInfo, ...]]] = {}
    for name, info in model.tensors.items():
        pieces = units.setdefault(wan.unit_of(name), {})
        layer = name.rpartition(".")[0]
        if layer in linears and name == f"{layer}.weight":
            bias = linears[layer].bias
            pieces[layer] = (info,) if bias is None else (info, bias)
        elif not (layer in linears and name == f"{layer}.bias"):
            pieces[name] = (info,)
    for name in beside:
        units[wan.unit_of(name)][name] = ()
    order = [*model.replay_order, *(unit for unit in units if unit == "rest")]
    return {name: infos for unit in order for name, infos in units[unit].items()}
