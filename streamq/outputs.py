"""Looking at a folder without changing it: what a source is, and where in a quantized folder which format lies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamq import hub, wan
from streamq.checkpoint import Checkpoint, SourceFile, TensorInfo, advising, read_header
from streamq.errors import UsageError
from streamq.journal import MANIFEST, read_manifest
from streamq.savers import Format, formats, gguf_file


@dataclass(frozen=True)
class Output:
    """One expert's folder in one format. `label` is its path below the output folder ("" for the folder itself).

    `expert`: "" for the only one, else "high_noise_model" or "low_noise_model", whatever its folder is called.
    """

    format_name: str
    format: Format
    label: str
    folder: Path
    expert: str

    @property
    def shown(self) -> str:
        """`label`, the expert by its own name: what stands before a layer's name, as in the plan and the manifest."""
        if not self.expert:
            return self.label
        return "/".join(part for part in (*Path(self.label).parts[:-1], self.expert) if part)

    def checkpoint(self) -> Checkpoint:
        """The headers of every file of the format's kind in it. Raises UsageError for a file that is not sound."""
        files: list[SourceFile] = []
        tensors: dict[str, TensorInfo] = {}
        for number, path in enumerate(sorted(self.folder.glob(f"*.{self.format.CONTAINER}"))):
            with advising(anew(self.folder)):
                file, infos = header_of(path, self.folder, number)
            files.append(file)
            for info in infos:
                if info.name in tensors:
                    raise UsageError(
                        f"{info.name}: in two files, {files[tensors[info.name].file].name} and {file.name}"
                    )
                tensors[info.name] = info
        return Checkpoint(self.folder, tuple(files), tensors)

    def layers(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Native layer name -> type, "float" for those left alone. Raises UsageError for a document that is damaged."""
        with advising(anew(self.folder)):
            return self.format.layers_in(self.folder, checkpoint.tensors)

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        """What the format's runtime would trip over. Raises UsageError for a document that is damaged."""
        with advising(anew(self.folder)):
            return self.format.problems(self.folder, checkpoint.tensors)

    def model(self, checkpoint: Checkpoint) -> wan.Model:
        """The model whose tensors these are, the format's own left out. Raises UsageError if it is not a whole Wan."""
        plain = {name: replace(info, name=name) for name, info in self.floats(checkpoint).items()}
        with advising(anew(self.folder)):
            return wan.describe(Checkpoint(self.folder, checkpoint.files, plain), quantized=True)

    def floats(self, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
        """Native name of a float model's tensor -> what is stored for it, with the float tensor's shape."""
        found = {}
        for stored, info in checkpoint.tensors.items():
            if (name := self.format.float_name(stored)) is not None:
                found[name] = replace(info, shape=self.format.float_shape(stored, info.dtype, info.shape))
        return found


def anew(folder: Path) -> str:
    """What to do about a damaged folder: one that streamq wrote is made anew, another tool's is not ours to make."""
    ours = any((place / MANIFEST).is_file() for place in (folder, folder.parent, folder.parent.parent))
    return "make it anew with streamq quant --overwrite" if ours else "copy it, or make it, again"


def header_of(path: Path, root: Path, number: int = 0) -> tuple[SourceFile, list[TensorInfo]]:
    """`checkpoint.read_header`, of whichever kind a file is by its name. Raises UsageError."""
    return (gguf_file.read_header if path.suffix == ".gguf" else read_header)(path, root, number)


def find_outputs(path: Path) -> list[Output]:
    """Every format and expert in a folder that streamq or the format's own tool wrote; [] for anything else."""
    if not path.is_dir():
        return []
    found = []
    for name, form in formats().items():
        for place in (path, path / name):
            for expert, below in form.EXPERTS.items():
                folder = place / below
                if folder.is_dir() and form.recognise(folder):
                    label = "" if folder == path else str(folder.relative_to(path))
                    found.append(Output(name, form, label, folder, expert))
    return found


def manifest(path: Path) -> dict[str, Any] | None:
    """`streamq.json` of a folder, or None. Raises UsageError when it is not a manifest."""
    file = path / MANIFEST
    if not file.is_file():
        return None
    return read_manifest(file)


def inspect(text: str) -> dict[str, Any]:
    """What `streamq inspect --json` prints, for a source or a quantized folder. Raises UsageError."""
    path = Path(text).expanduser()
    found = find_outputs(path)
    if found:
        return _inspect_output(path, found)
    experts = wan.open_model(hub.resolve(text, download=False))
    model = experts[0].model
    return _model(model, wan.version_of(experts)) | {
        "prefix": model.prefix,
        "dtypes": dict(Counter(info.dtype for info in model.tensors.values())),
        "experts": [expert.name or "transformer" for expert in experts],
        "files": [file.name for expert in experts for file in expert.model.checkpoint.files],
        "bytes": sum(file.size for expert in experts for file in expert.model.checkpoint.files),
        "warnings": list(model.warnings),
    }


def _model(model: wan.Model, version: str | None) -> dict[str, Any]:
    return {
        "family": model.family,
        "model_type": version,
        "layout": model.layout,
        "n_blocks": model.n_blocks,
        "n_vace_blocks": model.n_vace_blocks,
        "linears": len(model.linears),
        "dim": model.dim,
        "ffn_dim": model.ffn_dim,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
    }


def recorded(path: Path, output: Output) -> dict[str, str]:
    """Layer -> type by the manifest, which knows of scales that are folded into other tensors."""
    document = manifest(path)
    made = document["formats"].get(output.format_name, {}).get("layers", {}) if document else {}
    prefix = f"{output.expert}/" if output.expert else ""
    found = {name.removeprefix(prefix): about.get("type") for name, about in made.items() if name.startswith(prefix)}
    return {name: kind for name, kind in found.items() if isinstance(kind, str)}


def _inspect_output(path: Path, found: list[Output]) -> dict[str, Any]:
    layers: dict[str, str] = {}
    dtypes: Counter[str] = Counter()
    size = 0
    files: list[str] = []
    experts, prefixed = [], False
    for output in found:
        checkpoint = output.checkpoint()
        prefixed = prefixed or any(name.startswith(wan.COMFYUI_PREFIX) for name in checkpoint.tensors)
        prefix = f"{output.label}/" if output.label else ""
        shown = f"{output.shown}/" if output.shown else ""
        kinds = output.layers(checkpoint)
        model = output.model(checkpoint)
        experts.append(wan.Expert(output.expert, model))
        inside = {linear.native for linear in model.linears}
        layers |= {shown + name: kind for name, kind in kinds.items() if name in inside}
        layers |= {shown + name: kind for name, kind in recorded(path, output).items() if name in kinds}
        dtypes.update(info.dtype for info in checkpoint.tensors.values())
        files += [prefix + file.name for file in checkpoint.files]
        size += sum(file.size for file in checkpoint.files)
    names = sorted({output.format_name for output in found})
    of_one_format = [e for e, output in zip(experts, found, strict=True) if output.format_name == found[0].format_name]
    return _model(experts[0].model, wan.version_of(of_one_format)) | {
        "layout": found[0].format.NAMES,
        "prefix": wan.COMFYUI_PREFIX if prefixed else "",
        "format": names[0] if len(names) == 1 else names,
        "layers": layers,
        "dtypes": dict(dtypes),
        "experts": [expert.name or "transformer" for expert in of_one_format],
        "files": files,
        "bytes": size,
        "warnings": [],
    }
