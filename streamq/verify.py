"""`streamq verify`: is a written folder what its runtime needs, whole, and what its source says it should be?

Offline and in bounded memory: files are hashed in chunks, layers are dequantized one at a time. Everything that is
wrong becomes a line of text; nothing is changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamq import hub, outputs, wan
from streamq.checkpoint import Checkpoint, Source, TensorInfo, read_header
from streamq.device.cpu import host_bytes
from streamq.dtypes import TORCH_DTYPES
from streamq.errors import StreamqError, UsageError
from streamq.journal import JOURNAL
from streamq.quantized import decode_vector
from streamq.savers.shard import HASH_CHUNK, PARTIAL, sha256_of

ROWS_AT_A_TIME = 256
# Without a manifest there is no recorded error to compare with; int8 of a Wan layer stays near 0.01.
ERROR_LIMIT = 0.1


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


def verify(save_path: Path, source: str | None) -> Report:
    """Check a folder, and with `source` (path or hub id) every tensor's value against the float model.

    Raises UsageError when there is nothing to be checked.
    """
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
    experts = wan.open_model(hub.resolve(source, download=False)) if source else []
    for output in found:
        checkpoint = _checked(report, output.checkpoint)
        if checkpoint is None:
            continue
        _check_format(output, checkpoint, report)
        if experts and not (report.problems and _incomplete(output, checkpoint)):
            expert = _matching(experts, output, len({o.label for o in found if o.format_name == output.format_name}))
            _compare(output, checkpoint, expert, document or {}, report)
    return report


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
        _, infos = read_header(path, path.parent)
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


def _check_format(output: outputs.Output, checkpoint: Checkpoint, report: Report) -> None:
    prefix = f"{output.label}: " if output.label else ""
    found = _checked(report, lambda: output.format.problems(output.folder, checkpoint.tensors)) or []
    report.problems += [prefix + problem for problem in found]
    problem = _incomplete(output, checkpoint)
    if problem:
        report.problems.append(prefix + problem)
    with closing(Source(checkpoint)) as source:
        for info in checkpoint.tensors.values():
            if not info.name.endswith("_scale") or info.dtype not in ("F32", "BF16", "F16"):
                continue
            scale = _read(source, info).float()
            if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
                report.problems.append(f"{prefix}{info.name}: a scale that is not finite and positive")


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
    name = Path(output.label).name
    return next((expert for expert in experts if expert.name == name), experts[0])


def _rounded(document: dict[str, Any], output: outputs.Output) -> bool:
    """Whether the biases went through bf16: `convert_model_dtype` under `--match msmodelslim`."""
    made = document.get("formats", {}).get(output.format_name, {})
    settings = made.get("recipe", {}).get("spec", {}).get("multimodal_sd_config") or {}
    config = settings.get("inference_config") or settings.get("model_config") or {}
    return document.get("options", {}).get("match") == "msmodelslim" and bool(config.get("convert_model_dtype"))


def _recorded(document: dict[str, Any], output: outputs.Output) -> dict[str, dict[str, Any]]:
    layers = document.get("formats", {}).get(output.format_name, {}).get("layers", {})
    return {name: about for name, about in layers.items() if "rel_error" in about}


@dataclass(frozen=True)
class _Folded:
    """Smoothing vectors that lie in other tensors than the layer's own: by layer, and by norm tensor."""

    columns: dict[str, Tensor]
    rows: dict[str, Tensor]
    norms: dict[str, Tensor]


def _folded(document: dict[str, Any], output: outputs.Output, expert: wan.Expert, report: Report) -> _Folded:
    found = _Folded({}, {}, {})
    label = f"{expert.name}/" if expert.name else ""
    groups = {group.name: group for group in wan.GROUPS}
    made = document.get("formats", {}).get(output.format_name, {}).get("smoothing", {})
    for name, entry in made.items():
        block = wan.block_of(name.removeprefix(label))
        if not name.startswith(label) or block is None:
            continue
        try:
            group, vector = groups[name.removeprefix(f"{label}{block}.")], decode_vector(entry["values"])
        except (KeyError, TypeError, ValueError) as error:
            report.problems.append(f"streamq.json: smoothing of {name} cannot be read ({error})")
            continue
        found.columns.update({f"{block}.{layer}": vector for layer in group.layers})
        if entry["way"] == "rows":
            found.rows.update({f"{block}.{layer}": vector for layer in group.makers})
        if entry["way"] == "norm":
            found.norms.update({f"{block}.{group.norm}.{leaf}": vector for leaf in ("weight", "bias")})
    return found


def _read(source: Source, info: TensorInfo) -> Tensor:
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    source.read(info, 0, host_bytes(raw))
    return raw.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)


def _compare(
    output: outputs.Output, checkpoint: Checkpoint, expert: wan.Expert, document: dict[str, Any], report: Report
) -> None:
    model, form = expert.model, output.format
    recorded, rounded = _recorded(document, output), _rounded(document, output)
    folded, stored = _folded(document, output, expert, report), output.floats(checkpoint)
    prefix = f"{output.label}/" if output.label else ""
    label = f"{expert.name}/" if expert.name else ""
    kinds = form.layers_in(output.folder, checkpoint.tensors)
    quantized = {name for name, kind in kinds.items() if kind != "float"}
    with closing(Source(model.checkpoint)) as floats, closing(Source(checkpoint)) as written:
        for linear in model.linears:
            if linear.native not in quantized:
                continue
            suffixes = [n for n in checkpoint.tensors if n.startswith(linear.native + ".")]
            made = {n.removeprefix(linear.native + "."): _read(written, checkpoint.tensors[n]) for n in suffixes}
            try:
                error, cosine = _difference(_read(floats, linear.weight), made, output, linear.name, folded)
            except (KeyError, RuntimeError):  # a tensor is missing, or has another shape
                report.problems.append(f"{prefix}{linear.native}: cannot be dequantized against this source")
                continue
            wrong = form.contradictions(made)
            report.problems += [f"{prefix}{linear.native}.{one}" for one in wrong]
            about = recorded.get(label + linear.native, {})
            report.layers[prefix + linear.native] = {"rel_error": error, "cosine": cosine} | _on_data(about)
            limit = about.get("rel_error", ERROR_LIMIT / 1.01) * 1.01 + 1e-6
            if not error <= limit:
                hint = "" if about else "; without streamq.json a smoothing scale in other tensors is not known"
                report.problems.append(
                    f"{prefix}{linear.native}: relative error {error:.4g} against the source, at most {limit:.4g} due"
                    + hint
                )
        report.problems += [prefix + one for one in _wrong_vectors(output, checkpoint, written, model, folded)]
        for name, info in model.tensors.items():
            native = wan.to_native(name)
            layer = native.rpartition(".")[0]
            if layer in quantized and native.endswith(".weight"):
                continue
            mine = stored.get(native)
            vector = folded.norms.get(name)
            if vector is None and layer in quantized:
                vector = folded.rows.get(name.rpartition(".")[0])
            same = mine is not None and mine.shape == info.shape
            if same and mine is not None:
                same = _same(floats, info, written, mine, rounded and layer in quantized, vector)
            if not same:
                report.problems.append(f"{prefix}{native}: differs from {model.checkpoint.where(info)}")


def _wrong_vectors(
    output: outputs.Output, checkpoint: Checkpoint, written: Source, model: wan.Model, folded: _Folded
) -> list[str]:
    """Vectors beside norms that are not those by which the layers behind were scaled; ones where nothing was."""
    found = []
    for block in model.blocks:
        for group in (group for group in wan.GROUPS if group.adaln):
            vector = folded.columns.get(f"{block}.{group.layers[0]}", torch.ones(model.dim))
            specs = output.format.vector_specs(f"{block}.{group.adaln}", model.dim)
            for spec, due in zip(specs, output.format.encode_vector(vector), strict=False):
                info = checkpoint.tensors.get(spec.name)
                if info is not None and not torch.equal(_read(written, info).float(), due):
                    found.append(f"{spec.name}: not the scale that the layers behind it were smoothed by")
    return found


def _on_data(about: dict[str, Any]) -> dict[str, Any]:
    """What the run measured on calibration data, which only it had."""
    return {key: about[key] for key in ("output_rel_error", "output_cosine", "before") if key in about}


def _difference(
    weight: Tensor, made: dict[str, Tensor], output: outputs.Output, name: str, folded: _Folded
) -> tuple[float, float]:
    """Relative error and cosine, a few rows at a time."""
    lost = norm = other = dot = 0.0
    columns, scaled = folded.columns.get(name), folded.rows.get(name)
    for start in range(0, weight.shape[0], ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        w = weight[rows].double()
        v = output.format.decode(made, rows).double()
        if columns is not None:
            v /= columns.double()
        if scaled is not None:
            v *= scaled[rows].double().unsqueeze(1)
        lost += float((w - v).square().sum())
        norm += float(w.square().sum())
        other += float(v.square().sum())
        dot += float((w * v).sum())
    if not norm or not other:
        return (0.0, 1.0) if norm == other else (1.0, 0.0)
    return (lost / norm) ** 0.5, dot / (norm * other) ** 0.5


def _same(
    floats: Source, info: TensorInfo, written: Source, mine: TensorInfo, cast: bool, vector: Tensor | None
) -> bool:
    if vector is not None:
        due = _read(floats, info).float() / vector
        return torch.equal(due.to(TORCH_DTYPES[mine.dtype]), _read(written, mine))
    if cast:
        return torch.equal(_read(floats, info).bfloat16(), _read(written, mine).bfloat16())
    if info.dtype != mine.dtype:
        return torch.equal(_read(floats, info).float(), _read(written, mine).float())
    return all(a == b for a, b in zip(_chunks(floats, info), _chunks(written, mine), strict=True))


def _chunks(source: Source, info: TensorInfo) -> Iterator[bytes]:
    buffer = bytearray(min(info.nbytes, HASH_CHUNK))
    for start in range(0, info.nbytes, HASH_CHUNK):
        view = memoryview(buffer)[: min(HASH_CHUNK, info.nbytes - start)]
        source.read(info, start, view)
        yield bytes(view)
