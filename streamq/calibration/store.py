"""A calibration set on disk: what block 0 of each expert gets, sample by sample. Reading headers needs no torch.

    calib.json                   what it was made from and how; each expert's file, its sha256 and its samples; last
    inputs.safetensors           one expert's tensors (two experts: inputs-high_noise_model.safetensors, …)
      encoder_hidden_states.K    [1, S, D]   after the text embedder, image tokens first; one per prompt
      rotary.cos, rotary.sin     [1, L, 1, head_dim] F32; one set has one video size
      control_scale              [vace blocks] F32; VACE only
      hidden_states.N            [1, L, D]   of sample N
      timestep_proj.N            [R, 6, D]   its distinct rows: 1, or 2 where tokens have their own time step
      token_row.N                [L] U8      which row each token has; only where R > 1
      control.N                  [1, L, D]   the stream that enters VACE block 0; VACE only

`hidden_states` and `control` of sample N come last of its tensors and samples follow each other, so a set is written
front to back. A set that is complete has calib.json; a run's own lives in its output folder under other suffixes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamq import __version__
from streamq.checkpoint import Checkpoint, TensorInfo, advising, load_json, read_header
from streamq.errors import UsageError
from streamq.savers import Spec
from streamq.savers.shard import sha256_of, write_whole
from streamq.wan import Expert, Model

DOCUMENT = "calib.json"
VERSION = 1
MAX_DOCUMENT_BYTES = 64 << 20
ANEW = "make the set again with streamq calib"
ST_DTYPES = {"bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True)
class SampleInfo:
    """One forward. `states`: which encoder_hidden_states it has; `rows`: R of its timestep_proj; `prompt`: its text."""

    timestep: float
    states: int
    rows: int
    prompt: str


@dataclass(frozen=True)
class Shapes:
    """What the shapes of an expert's tensors follow from."""

    dim: int
    head_dim: int
    tokens: int
    states_len: int
    n_vace: int
    dtype: str  # safetensors' word for hidden_states

    def specs(self, samples: Iterable[SampleInfo]) -> list[Spec]:
        """Every tensor of an expert's file, in the order in which they are written."""
        samples = list(samples)
        length, dim = self.tokens, self.dim
        found = [Spec("rotary.cos", "F32", (1, length, 1, self.head_dim), "shared"),
                 Spec("rotary.sin", "F32", (1, length, 1, self.head_dim), "shared")]  # fmt: skip
        if self.n_vace:
            found.append(Spec("control_scale", "F32", (self.n_vace,), "shared"))
        for number in range(1 + max(sample.states for sample in samples)):
            found.append(Spec(f"encoder_hidden_states.{number}", self.dtype, (1, self.states_len, dim), "shared"))
        for number, sample in enumerate(samples):
            unit = f"sample.{number}"
            found.append(Spec(f"timestep_proj.{number}", self.dtype, (sample.rows, 6, dim), unit))
            if sample.rows > 1:
                found.append(Spec(f"token_row.{number}", "U8", (length,), unit))
            found.append(Spec(f"hidden_states.{number}", self.dtype, (1, length, dim), unit))
            if self.n_vace:
                found.append(Spec(f"control.{number}", self.dtype, (1, length, dim), unit))
        return found


@dataclass(frozen=True)
class ExpertInputs:
    """One expert's part of a set: its samples, and where its tensors lie."""

    name: str
    checkpoint: Checkpoint
    sha256: str
    samples: tuple[SampleInfo, ...]
    shapes: Shapes

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name -> place in the file."""
        return self.checkpoint.tensors


@dataclass(frozen=True)
class CalibSet:
    """A complete set, its headers checked. `digest` stands for all of its content."""

    path: Path
    experts: dict[str, ExpertInputs]
    document: dict[str, Any]
    digest: str


def file_name(expert: str, suffix: str = ".safetensors") -> str:
    """`inputs.safetensors`, or `inputs-high_noise_model.safetensors`."""
    return f"inputs-{expert}{suffix}" if expert else f"inputs{suffix}"


def write_document(
    folder: Path, name: str, about: Mapping[str, Any], parts: Mapping[str, tuple[str, str, Shapes, list[SampleInfo]]]
) -> None:
    """The last file of a set. `parts`: expert -> (file name, sha256, shapes, samples); `about`: family, settings, …"""
    experts = {
        expert: {"file": file, "sha256": digest, "shapes": asdict(shapes), "samples": [asdict(s) for s in samples]}
        for expert, (file, digest, shapes, samples) in parts.items()
    }
    document = {"streamq": __version__, "calib": VERSION, **about, "experts": experts}
    write_whole(folder / name, json.dumps(document, indent=1).encode(), 0o644)


def open_set(folder: Path, name: str = DOCUMENT) -> CalibSet:
    """Read a set's document and headers. Raises UsageError for what is not one, or is incomplete or inconsistent."""
    path = folder / name
    if not path.is_file():
        raise UsageError(f"{folder}: no {name} in it, so not a complete calibration set; make one with streamq calib")
    document = load_json(path, MAX_DOCUMENT_BYTES, ANEW)
    try:
        if document["calib"] != VERSION:
            raise UsageError(f"{path}: version {document['calib']!r} of the format, this streamq reads {VERSION}")
        experts = {expert: _expert(folder, expert, about) for expert, about in document["experts"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{path}: not a calibration set of streamq's ({error}); make it again") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return CalibSet(folder, experts, document, digest)


def _expert(folder: Path, expert: str, about: dict[str, Any]) -> ExpertInputs:
    if Path(about["file"]).name != about["file"]:
        raise UsageError(f"{folder / DOCUMENT}: {about['file']!r} is not a file name")
    with advising(ANEW):
        file, infos = read_header(folder / about["file"], folder)
    shapes, samples = Shapes(**about["shapes"]), tuple(SampleInfo(**sample) for sample in about["samples"])
    if shapes.dtype not in ST_DTYPES.values() or any(sample.states < 0 or sample.rows < 1 for sample in samples):
        raise ValueError(f"dtype {shapes.dtype}, or a sample without states or time step")
    found = {info.name: info for info in infos}
    for spec in shapes.specs(samples):
        info = found.get(spec.name)
        if info is None or (info.dtype, info.shape) != (spec.dtype, spec.shape):
            there = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
            raise UsageError(
                f"{spec.name} in {folder / about['file']}: {there}, calib.json says {spec.dtype} {list(spec.shape)};"
                " make the set again"
            )
    return ExpertInputs(expert, Checkpoint(folder, (file,), found), about["sha256"], samples, shapes)


def check_fits(found: CalibSet, experts: list[Expert], head_dim: int) -> None:
    """Raise UsageError if a set was made for another kind of model."""
    family = experts[0].model.family
    if found.document.get("family") != family:
        raise UsageError(f"--calib {found.path}: made for a {found.document.get('family')} model, this one is {family}")
    if set(found.experts) != {expert.name for expert in experts}:
        has, needs = ", ".join(found.experts) or "one", ", ".join(e.name for e in experts) or "one"
        raise UsageError(f"--calib {found.path}: holds inputs for {has}, the model has {needs}; make it for this model")
    for expert in experts:
        model, shapes = expert.model, found.experts[expert.name].shapes
        mine = (model.dim, head_dim, model.n_vace_blocks)
        theirs = (shapes.dim, shapes.head_dim, shapes.n_vace)
        if mine != theirs:
            raise UsageError(
                f"--calib {found.path}: width, head size and VACE blocks are {theirs}, the model's {mine}; make it for"
                " this model"
            )


def check_content(found: CalibSet, expert: str) -> None:
    """Raise UsageError if an expert's file is not what calib.json's checksum says."""
    part = found.experts[expert]
    path = part.checkpoint.files[0].path
    if sha256_of(path) != part.sha256:
        raise UsageError(f"{path}: its sha256 is not the one in calib.json; make the set again")


def shapes_of(model: Model, head_dim: int, tokens: int, states_len: int, dtype: str) -> Shapes:
    """Shapes of a set for a model; `dtype` bf16 or fp32."""
    return Shapes(model.dim, head_dim, tokens, states_len, model.n_vace_blocks, ST_DTYPES[dtype])
