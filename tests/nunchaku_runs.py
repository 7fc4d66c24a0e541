"""What the tests of whole nunchaku runs share: models whose layers fit, recipes that cost little, runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import synthetic
import torch
import yaml
from conftest import Result, run
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamq import wan

CALIBRATION = {"num_samples": 2, "time_bins": 2, "size": "64*64", "frame_num": 5, "rows": 64, "gram_rows": 128}
SMOOTH = {"type": "smooth_quant", "method": "smoothquant", "alpha": 0.5}
SEARCH = {"type": "smooth_quant", "method": "svdquant", "grid": "coarse", "rows": 16}
SAVE = [{"type": "nunchaku_format_saver"}]
HOT = (5, 77)  # channels
Step = Mapping[str, Any]


def source(
    out: Path,
    family: str = "t2v-1.3B",
    *,
    blocks: int = 2,
    dim: int = 128,
    ffn: int = 256,
    hot: bool = False,
    **how: Any,
) -> Path:
    """A synthetic checkpoint with a head of 128, so that no config.json need say it. `how`: as `synthetic.write`.

    hot: some channels of the blocks' inputs are twenty times as large as the others.
    """
    sizes = replace(synthetic.tiny(synthetic.FAMILIES[family], blocks), dim=dim, ffn=ffn, heads=max(1, dim // 128))
    sizes = replace(sizes, vace_blocks=min(sizes.vace_blocks, blocks))
    synthetic.write(out, sizes, **how)
    for path in out.rglob("*.safetensors") if hot else ():
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith((".modulation", ".scale_shift_table")) and tensor.shape[1] == 6:
                tensor[:, 1:5:3, HOT] += 20  # the scales of the first and the third norm
            elif name.endswith((".norm3.weight", ".norm2.weight")):
                tensor[HOT,] *= 20
        save_file(tensors, path)
    return out / how.get("single_file", "")


def operands(kind: str, method: str, **ext: Any) -> dict[str, Any]:
    """A `qconfig`. svdquant has rank 16 and two rounds unless `ext` says otherwise."""
    if method == "svdquant":
        ext = {"rank": 16, "rounds": 2} | ext
    dtype = "nvfp4" if kind == "w4a4_nvfp4" else "int4"
    weight = {"scope": "per_group", "dtype": dtype, "symmetric": kind != "w4a16", "method": method}
    made: dict[str, Any] = {"weight": weight | ({"ext": ext} if ext else {})}
    if kind != "w4a16":
        made["act"] = {"scope": "per_group", "dtype": dtype}
    return made


def step(kind: str, method: str = "minmax", *, ext: Step | None = None, **keys: Any) -> dict[str, Any]:
    """A `linear_quant` step. Of the methods minmax alone needs no data."""
    return {"type": "linear_quant", "qconfig": operands(kind, method, **(ext or {})), **keys}


def svdquant(kind: str, **keys: Any) -> list[Step]:
    """The steps of a w4a4 or w4a4_nvfp4 recipe without a search."""
    return [SMOOTH, step(kind, "svdquant", **keys)]


def document(process: Iterable[Step], **calibration: Any) -> dict[str, Any]:
    spec = {"process": [dict(one) for one in process], "calibration": CALIBRATION | calibration, "save": SAVE}
    return {"apiversion": "multimodal_sd_modelslim_v1", "spec": spec}


def write_recipe(path: Path, process: Iterable[Step], **calibration: Any) -> Path:
    """A recipe for nunchaku with these steps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document(process, **calibration)))
    return path


def command(model: Path, out: Path, recipe: Path, *more: object) -> list[object]:
    return ["--model_path", model, "--save_path", out, "--config_path", recipe, "--device", "cpu", *more]


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads that wait for a busy core make small tensors slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch("os.sched_getaffinity", lambda _: {0}):
            yield
    finally:
        torch.set_num_threads(before)


def quant(model: Path, out: Path, process: Iterable[Step], *more: object, **calibration: Any) -> Result:
    """Run it to its end, which must be a good one. The recipe lies beside `out`."""
    recipe = write_recipe(out.with_name(f"{out.name}.yaml"), process, **calibration)
    with one_thread():
        done = run("quant", *command(model, out, recipe, "--quiet", "--json", *more))
    assert done.returncode == 0, done.stderr
    return done


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def floats(folder: Path) -> dict[str, Tensor]:
    """A source's tensors by diffusers names."""
    return {wan.to_diffusers(name) or name: tensor for name, tensor in tensors_in(folder).items()}


def weights(folder: Path) -> dict[str, bytes]:
    """Path -> content of every weights file of an output."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


class Runs:
    """Models and outputs that are made once a session."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models: dict[str, Path] = {}
        self._outputs: dict[str, Path] = {}

    def model(self, family: str = "t2v-1.3B", **how: Any) -> Path:
        """As `source`; nobody writes to it."""
        key = repr((family, sorted(how.items())))
        if key not in self._models:
            self._models[key] = source(self.root / f"model{len(self._models)}", family, **how)
        return self._models[key]

    def out(self, model: Path, process: Iterable[Step], *more: object, **calibration: Any) -> Path:
        """As `quant`; nobody writes to it."""
        process = list(process)
        key = repr((model, process, more, calibration))
        if key not in self._outputs:
            self._outputs[key] = self.root / f"out{len(self._outputs)}"
            quant(model, self._outputs[key], process, *more, **calibration)
        return self._outputs[key]
