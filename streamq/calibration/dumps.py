"""Calibration dumps of other tools, read without running code that may be in them.

Pickles (`.pth`, `.pt`) are opened by `torch.load(weights_only=True, mmap=True)` alone: tensors, lists, tuples, dicts,
strings and numbers come in, everything else is refused by name. What each tool writes:

msModelSlim   `calib_data_{task}_{expert}.pth`: a list, one entry a forward of the native WanModel; an entry is the list
              of its arguments in the order of its signature: x (list of [C,F,h,w]), t, context (list of [n,D]),
              seq_len, then clip_fea [1,257,1280] and y (list of [20,F,h,w]) where the model has them; VACE has
              vace_context before context and its scale after seq_len. With two experts both files hold all calls.
deepcompressor  `caches/{name}-{step:05d}-{guidance}.pt`: a dict of one forward: `input_args` [hidden_states],
              `input_kwargs` {timestep, encoder_hidden_states, …}, `outputs`, `filename`, `step`, `guidance`.
neutral       `.safetensors` with, for i from 0, `call{i}.latents` (or `.x`), `call{i}.timestep` (`.t`), `call{i}.text`
              (`.context`), and where the model has them `.y`, `.image` (`.clip_fea`), `.control`, `.control_scale`.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.checkpoint import DTYPE_SIZE, Checkpoint, Source, TensorInfo, read_header
from streamq.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = {".pth", ".pt", ".safetensors"}
ALLOWED = "a dump may hold tensors, lists, dicts, strings and numbers only"
# What a field is called: here, by diffusers, by native code, by native code of other pipelines.
NAMES = {
    "latents": ("latents", "hidden_states", "x"),
    "timestep": ("timestep", "t"),
    "text": ("text", "encoder_hidden_states", "context"),
    "image": ("image", "encoder_hidden_states_image", "clip_fea", "clip_feature"),
    "y": ("y",),
    "control": ("control", "control_hidden_states", "vace_context"),
    "control_scale": ("control_scale", "control_hidden_states_scale", "vace_context_scale", "vace_scale"),
}
# The transformer's positional arguments in diffusers, for what `input_args` holds.
POSITIONS = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
SMALL = 1 << 20  # elements that an expanded tensor, one element repeated, may have
ST_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32"}


@dataclass
class Call:
    """One forward of the transformer at batch 1, in diffusers' conventions; tensors are contiguous and on the CPU."""

    latents: Tensor  # [1, C, F, h, w] as the model gets them: 36 channels for I2V
    timestep: Tensor  # float32 [1], or [1, L] where tokens have their own
    text: Tensor  # [1, n, text_dim], padded or not
    image: Tensor | None = None  # [1, 257, 1280], or [1, 514, 1280] for a first and a last frame
    control: Tensor | None = None  # VACE: [1, 96, F, h, w]
    control_scale: Tensor | None = None  # VACE: one number, or one a VACE block; None: 1
    prompt: str = ""


def read_dump(path: Path) -> Iterator[Call]:
    """Every call of a dump, one at a time: of a file, or of a folder's files by name. A call comes only once.

    Raises UsageError for a file that holds anything but plain data, or other data than a dump of a Wan transformer.
    """
    seen: set[bytes] = set()
    for file in list_dump(path):
        for call in _neutral(file) if file.suffix.lower() == ".safetensors" else _pickled(file):
            digest = _digest(call)  # msModelSlim writes every call to both experts' files
            if digest not in seen:
                seen.add(digest)
                yield call


def list_dump(path: Path) -> list[Path]:
    """The files of a dump by name: of a folder, or of `caches/` in it. Raises UsageError where there are none."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{path}: not a dump ({' '.join(sorted(SUFFIXES))}); see the documentation of --dump")
        return [path]
    for folder in (path, path / "caches"):
        found = sorted(folder.glob("*")) if folder.is_dir() else []
        if files := [f for f in found if f.suffix.lower() in SUFFIXES and f.is_file()]:
            return files
    raise UsageError(f"{path}: no dump there ({' '.join(sorted(SUFFIXES))}); check the path")


def _digest(call: Call) -> bytes:
    import torch

    digest = hashlib.sha256()
    for tensor in (call.latents, call.timestep, call.text, call.image, call.control):
        if tensor is not None:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.digest()


# --- what each tool writes --------------------------------------------------------------------------------------------


def _pickled(path: Path) -> Iterator[Call]:
    data = _load(path)
    if isinstance(data, Mapping):
        data = [data]
    if not isinstance(data, (list, tuple)) or not data:
        raise UsageError(f"{path}: holds {_kind(data)}, not calls of a transformer; {_WHAT}")
    for number, entry in enumerate(data):
        where = f"{path}: call {number}"
        if isinstance(entry, Mapping):
            yield from _deepcompressor(entry, where)
        elif isinstance(entry, (list, tuple)):
            yield from _calls(_msmodelslim(entry, where), where, "")
        else:
            raise UsageError(f"{where} is {_kind(entry)}, not a call's arguments; {_WHAT}")


def _deepcompressor(entry: Mapping[Any, Any], where: str) -> Iterator[Call]:
    args, kwargs = entry.get("input_args", ()), entry.get("input_kwargs", entry)
    if not isinstance(args, (list, tuple)) or not isinstance(kwargs, Mapping):
        raise UsageError(f"{where}: input_args and input_kwargs are not a list and a dict; {_WHAT}")
    # `hidden_states` was taken out of kwargs; what stands behind it goes to the next names that kwargs do not have
    fields = dict(zip((name for name in POSITIONS if name not in kwargs), args, strict=False)) | dict(kwargs)
    label = entry.get("filename", entry.get("sample_id", ""))
    yield from _calls(_named(fields), where, label if isinstance(label, str) else "")


def _named(fields: Mapping[Any, Any]) -> dict[str, Any]:
    """Fields under this file's names."""
    found = {}
    for name, words in NAMES.items():
        value = next((fields[word] for word in words if fields.get(word) is not None), None)
        if value is not None:
            found[name] = value
    return found


def _msmodelslim(entry: list[Any] | tuple[Any, ...], where: str) -> dict[str, Any]:
    """Arguments of a native WanModel's forward, told apart by kind: Wan2.1 has clip_fea before y, Wan2.2 has only y."""
    if entry and getattr(entry[0], "ndim", 0) == 3:
        raise UsageError(f"{where}: starts with {_kind(entry[0])}, a block's input; {_WHAT}")
    if len(entry) < 3:
        raise UsageError(f"{where}: {len(entry)} arguments, a WanModel has at least x, t and context; {_WHAT}")
    fields = {"latents": entry[0], "timestep": entry[1]}
    rest = list(entry[2:])
    if _first_ndim(rest[0]) == 4:
        fields["control"] = rest.pop(0)
    if not rest:
        raise UsageError(f"{where}: no context among its arguments; {_WHAT}")
    fields["text"] = rest.pop(0)
    for value in rest:
        if isinstance(value, float):
            fields["control_scale"] = value
        elif isinstance(value, (list, tuple)) and _first_ndim(value) == 4:
            fields["y"] = value
        elif getattr(value, "ndim", 0) == 3:
            fields["image"] = value
        elif getattr(value, "ndim", 0) == 5:
            fields["y"] = value
    return fields


def _first_ndim(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return getattr(value[0], "ndim", 0) if value else 0
    return max(getattr(value, "ndim", 0) - 1, 0)


def _neutral(path: Path) -> Iterator[Call]:
    file, infos = read_header(path, path.parent)
    calls: dict[int, dict[str, TensorInfo]] = {}
    for info in infos:
        match = re.fullmatch(r"call(\d{1,9})\.(\w+)", info.name)
        if not match:
            raise UsageError(f"{path}: {info.name} is not called call0.latents, call0.timestep, …; {_WHAT}")
        calls.setdefault(int(match[1]), {})[match[2]] = info
    if not calls:
        raise UsageError(f"{path}: holds no tensor; {_WHAT}")
    with closing(Source(Checkpoint(path.parent, (file,), {info.name: info for info in infos}))) as source:
        for number in sorted(calls):
            fields = {name: _read(source, info) for name, info in calls[number].items()}
            yield from _calls(_named(fields), f"{path}: call{number}", f"call{number}")


def _read(source: Source, info: TensorInfo) -> Tensor:
    import torch

    if info.dtype not in ST_DTYPES:
        raise UsageError(f"{source.checkpoint.where(info)}: is {info.dtype}, which no input of a Wan model is")
    dtype = getattr(torch, ST_DTYPES[info.dtype])
    if not info.nbytes:
        return torch.empty(info.shape, dtype=dtype)
    buffer = bytearray(info.nbytes)
    source.read(info, 0, memoryview(buffer))
    assert len(buffer) % DTYPE_SIZE[info.dtype] == 0  # read_header has checked it
    return torch.frombuffer(buffer, dtype=dtype).reshape(info.shape)


# --- from fields to calls ---------------------------------------------------------------------------------------------


def _calls(fields: dict[str, Any], where: str, prompt: str) -> Iterator[Call]:
    """Split a call into calls of batch 1."""
    import torch

    if missing := [name for name in ("latents", "timestep", "text") if name not in fields]:
        raise UsageError(f"{where}: no {' and no '.join(missing)} in it; {_WHAT}")
    latents = _batch(fields["latents"], 4, f"{where}: latents")
    size = len(latents)
    text = _batch(fields["text"], 2, f"{where}: text", size)
    times = _times(fields["timestep"], size, where)
    image: list[Tensor] = _batch(fields["image"], 2, f"{where}: image") if "image" in fields else []
    if image and len(image) == 2 * size:  # a first and a last frame are two rows of the batch
        image = [torch.cat(image[i : i + 2]) for i in range(0, 2 * size, 2)]
    if image and len(image) != size:
        raise UsageError(f"{where}: {len(image)} image states for {size} latents; {_WHAT}")
    extra = _batch(fields["y"], 4, f"{where}: y", size) if "y" in fields else []
    control = _batch(fields["control"], 4, f"{where}: control", size) if "control" in fields else []
    scale = fields.get("control_scale")
    for i in range(size):
        x = latents[i]
        if extra:
            if extra[i].shape[1:] != x.shape[1:]:
                raise UsageError(f"{where}: y is {list(extra[i].shape)}, x is {list(x.shape)}; {_WHAT}")
            x = torch.cat([x, extra[i].to(x.dtype)])
        tokens = x.shape[1] * (x.shape[2] // 2) * (x.shape[3] // 2)
        time = times[i][:tokens] if times[i].ndim else times[i]  # native code pads it to seq_len
        yield Call(
            latents=x[None].contiguous(),
            timestep=time[None].contiguous(),
            text=text[i][None].contiguous(),
            image=image[i][None].contiguous() if image else None,
            control=control[i][None].contiguous() if control else None,
            control_scale=None if scale is None else _number(scale, f"{where}: control_scale").reshape(-1),
            prompt=prompt,
        )


def _batch(value: Any, ndim: int, where: str, size: int | None = None) -> list[Tensor]:
    """A list of `ndim`-dimensional tensors, of a list of them or of one tensor with the batch first."""
    if isinstance(value, (list, tuple)):
        parts = [_plain(one, where) for one in value]
        parts = [one[0] if one.ndim == ndim + 1 and one.shape[0] == 1 else one for one in parts]
    else:
        whole = _plain(value, where)
        parts = list(whole.unbind(0)) if whole.ndim == ndim + 1 else [whole]
    for part in parts:
        if part.ndim != ndim or not part.numel() or not part.is_floating_point():
            raise UsageError(f"{where} is {_kind(part)}, not {ndim}-dimensional floats; {_WHAT}")
    if not parts or size not in (None, len(parts)):
        raise UsageError(f"{where}: {len(parts)} of them for {size} latents; {_WHAT}")
    return [part.clone() for part in parts]  # off the mapped file


def _times(value: Any, size: int, where: str) -> list[Tensor]:
    time = _number(value, f"{where}: timestep")
    if time.ndim > 2 or not time.numel():
        raise UsageError(f"{where}: timestep is {_kind(time)}, not [batch] or [batch, tokens]; {_WHAT}")
    if time.ndim == 0 or (time.shape[0] == 1 and size > 1):
        time = time.expand(size) if time.ndim < 2 else time.expand(size, -1)
    if time.shape[0] != size:
        raise UsageError(f"{where}: {time.shape[0]} timesteps for {size} latents; {_WHAT}")
    return list(time.clone().unbind(0))


def _number(value: Any, where: str) -> Tensor:
    """Numbers as a float32 tensor."""
    import torch

    if isinstance(value, (int, float)):
        return torch.tensor(float(value))
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, float)) for v in value):
        return torch.tensor([float(v) for v in value])
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return _plain(value, where).to(torch.float32, copy=True)


def _plain(value: Any, where: str) -> Tensor:
    """A dense tensor whose elements are in the file, not one that a few bytes blow up to terabytes."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise UsageError(f"{where} is {_kind(value)}, not a tensor; {_WHAT}")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
        raise UsageError(f"{where} is not a plain tensor ({value.layout}, {value.device}, {value.dtype}); {_WHAT}")
    if value.numel() > SMALL and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UsageError(f"{where}: shape {list(value.shape)} repeats a smaller tensor; save it with .contiguous()")
    return value.detach()


def _kind(value: Any) -> str:
    """What a value is, for messages."""
    if hasattr(value, "shape"):
        return f"a tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}" + (
        f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else ""
    )


_WHAT = "what a dump is: the inputs of whole transformer forwards, from msModelSlim, deepcompressor or as .safetensors"


def _load(path: Path) -> Any:
    """Plain data of a file that torch.save wrote. Raises UsageError, and runs nothing of what the file asks for."""
    import torch

    try:
        with warnings.catch_warnings():  # of a TorchScript archive torch says that it runs it, and then refuses
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, PermissionError) as error:
        raise UsageError(f"{path}: {error.strerror}; check the path and its permissions") from error
    except Exception as error:  # a file made to harm can fail anywhere in the unpickler
        text = str(error)
        if match := re.search(r"(?:GLOBAL|global|function|class)\s+`?([A-Za-z_][\w]*(?:\.\w+)+)", text):
            raise UsageError(
                f"{path}: holds {match[1]}, which is code and was not run; {ALLOWED}: save it again"
            ) from error
        if "mmap" in text:
            raise UsageError(f"{path}: written in torch.save's old format; load and save it again") from error
        reason = " ".join(text.split())[:160] or type(error).__name__
        raise UsageError(f"{path}: cannot be read as plain data ({reason}); {ALLOWED}") from error
