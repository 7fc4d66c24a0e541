"""`streamq verify`: is a written folder what its runtime needs, whole, and what its source says it should be?

Offline and in bounded memory: files are hashed in chunks, layers are dequantized one at a time. Everything that is
wrong becomes a line of text; nothing is changed.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamq import hub, outputs, wan
from streamq.checkpoint import Checkpoint, Source
from streamq.compare import compare, extremes, layer_tensors
from streamq.errors import StreamqError, UsageError
from streamq.journal import JOURNAL, lora_entries
from streamq.lora import attach, loras_of, open_loras
from streamq.options import LoraOption
from streamq.quantized import FOUR_BIT, OUTPUT_LIMIT
from streamq.savers.shard import HASH_CHUNK, PARTIAL, sha256_of


@dataclass
class Report:
    """What was found. `layers`: name -> rel_error ‖W - W'‖/‖W‖ and cosine, filled when there is a source."""

    problems: list[str] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `streamq verify --json` prints."""
        files = [{"path": path} | about for path, about in self.files.items()]
        return {"ok": not self.problems, "problems": self.problems, "layers": self.layers, "files": files}


def verify(save_path: Path, source: str | None, lora: tuple[LoraOption, ...] = ()) -> Report:
    """Check a folder, and with `source` (path or hub id) every tensor's value against the float model.

    lora: what was merged into the model. Raises UsageError when there is nothing to be checked, and for other LoRAs
    than the manifest names.
    """
    if lora and source is None:
        raise UsageError("--lora without --source; give the model that the LoRAs were merged into, too")
    if not save_path.is_dir():
        raise UsageError(f"{save_path}: no such folder")
    report = Report()
    if (save_path / JOURNAL).exists():
        report.problems.append(f"{JOURNAL}: the run that made this folder is unfinished; the same command resumes it")
    document = _checked(report, lambda: outputs.manifest(save_path))
    if document is not None:
        _check_files(save_path, document, report)
    elif not report.problems and not outputs.find_outputs(save_path):
        raise UsageError(f"{save_path}: not an output of streamq, nor of a tool whose format it knows")
    for path in sorted(save_path.rglob(f"*{PARTIAL}")):
        report.problems.append(f"{path.relative_to(save_path)}: left by an unfinished run")
    found = outputs.find_outputs(save_path)
    if document is not None:
        for name in document.get("formats", {}):
            if name not in {output.format_name for output in found}:
                report.problems.append(f"format {name}: made by this run, but no longer recognisable in {save_path}")
        report.problems += _useless(document)
    experts = attach(wan.open_model(hub.resolve(source, download=False)), open_loras(lora)) if source else []
    if experts and document is not None:
        _check_loras(save_path, document, experts)
    for output in found:
        checkpoint = _checked(report, output.checkpoint)
        if checkpoint is None:
            continue
        if not _check_format(output, checkpoint, report):
            continue
        if experts and not (report.problems and _incomplete(output, checkpoint)):
            expert = _matching(experts, output, len({o.label for o in found if o.format_name == output.format_name}))
            layers, problems = compare(output, checkpoint, expert, document or {})
            report.layers |= layers
            report.problems += problems
    return report


def _check_loras(save_path: Path, document: dict[str, Any], experts: list[wan.Expert]) -> None:
    """Raise UsageError unless the LoRAs beside --source are those that the manifest names."""
    due, given = document.get("lora", []), lora_entries(loras_of(expert.model for expert in experts))
    if due != given:
        made, have = (
            ", ".join(f"{one.get('file')} at {one.get('strength')}" for one in entries) or "no LoRA"
            for entries in (due, given)
        )
        other = " (a file or an expert of the same name differs)" if made == have else ""
        raise UsageError(
            f"{save_path}: was made with {made}, --source is given with {have}{other}; give --lora as it was given to"
            " quant"
        )


def _useless(document: dict[str, Any]) -> list[str]:
    """4-bit layers whose output, by the run's own figures, has hardly anything to do with the float layer's."""
    return [
        f"{layer}: output error {about['output_rel_error']:.4g} on calibration data, at most {OUTPUT_LIMIT} due"
        for made in document.get("formats", {}).values()
        for layer, about in made.get("layers", {}).items()
        if about.get("type") in FOUR_BIT and about.get("output_rel_error", 0) > OUTPUT_LIMIT
    ]


def _checked(report: Report, look: Any) -> Any:
    try:
        return look()
    except StreamqError as error:
        report.problems.append(str(error))
        return None


def _check_files(save_path: Path, document: dict[str, Any], report: Report) -> None:
    for name, about in document["files"].items():
        path = save_path / name
        if not path.is_file():
            report.problems.append(f"{name}: missing")
            continue
        digest = sha256_of(path)
        report.files[name] = {"bytes": path.stat().st_size, "sha256": digest}
        if path.stat().st_size != about["bytes"]:
            report.problems.append(f"{name}: {path.stat().st_size} bytes, the manifest says {about['bytes']}")
        if digest != about["sha256"]:
            report.problems.append(f"{name}: sha256 {digest[:12]}…, the manifest says {about['sha256'][:12]}…")
            report.problems += _changed_tensors(path, about.get("tensors", {}))


def _changed_tensors(path: Path, expected: dict[str, str]) -> list[str]:
    try:
        _, infos = outputs.header_of(path, path.parent)
    except UsageError:
        return []  # reported again, in full, where the folder's headers are read
    found = []
    with open(path, "rb") as stream:
        for info in infos:
            stream.seek(info.offset)
            digest, left = hashlib.sha256(), info.nbytes
            while left:
                chunk = stream.read(min(left, HASH_CHUNK))
                digest.update(chunk)
                left -= len(chunk)
            if expected.get(info.name) != digest.hexdigest():
                found.append(f"{info.name} in {path.name}: not the bytes that were written")
    return found


def _check_format(output: outputs.Output, checkpoint: Checkpoint, report: Report) -> bool:
    """False if a document of it cannot be read, so that nothing else can be told."""
    prefix = f"{output.label}: " if output.label else ""
    found = _checked(report, lambda: output.problems(checkpoint))
    if found is None:
        return False
    report.problems += [prefix + problem for problem in found]
    problem = _incomplete(output, checkpoint)
    if problem:
        report.problems.append(prefix + problem)
    with closing(Source(checkpoint)) as source:
        for info in checkpoint.tensors.values():
            if info.dtype not in ("F32", "BF16", "F16"):
                continue
            lowest, highest = extremes(source, info)
            finite = math.isfinite(lowest) and math.isfinite(highest)
            if info.name.endswith("_scale") and not (finite and lowest > 0):
                report.problems.append(f"{prefix}{info.name}: a scale that is not finite and positive")
            elif not finite:
                report.problems.append(f"{prefix}{info.name}: a number that is not finite")
        report.problems += [prefix + one for one in _wrong_values(output, checkpoint, source)]
    return True


def _wrong_values(output: outputs.Output, checkpoint: Checkpoint, source: Source) -> list[str]:
    """Numbers that no layer of its type has."""
    found: list[str] = []
    for native, kind in output.format.layers_in(output.folder, checkpoint.tensors).items():
        if kind == "float":
            continue
        try:
            wrong = output.format.contradictions(layer_tensors(output, checkpoint, source, native))
        except (IndexError, KeyError, RuntimeError, ValueError):  # missing, or of another shape or dtype: said already
            continue
        found += [f"{native}.{one}" for one in wrong]
    return found


def _incomplete(output: outputs.Output, checkpoint: Checkpoint) -> str | None:
    try:
        output.model(checkpoint)
    except UsageError as error:
        return str(error)
    return None


def _matching(experts: list[wan.Expert], output: outputs.Output, count: int) -> wan.Expert:
    if len(experts) != count:
        raise UsageError(
            f"--source has {len(experts)} transformers, the folder {count}; give the source it was made from"
        )
    return next((expert for expert in experts if expert.name == output.expert), experts[0])
