"""What the tests of interrupted calibrated runs share: recipes, models, reference runs, and a stricter forking server.

`python tests/calib_kit.py COMMAND` is that server: `faults.py`'s, with a `Recorder` to which a block's forward and what
`shutil.rmtree` removes are calls too, that loses what no sync of a folder has followed, and that watches the streams.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # the server does not come by conftest.py

import faults  # noqa: E402
import synthetic  # noqa: E402
from faults import JOURNAL, MANIFEST, PARTIAL, Ended, Fault, Recorder, Runs, Snapshot, fresh, snapshot  # noqa: E402
from resume_kit import Work, finish  # noqa: E402

CACHE, DOCUMENT, STREAM = "streamq-cache", "calib.cache", ".stream"
WATCHED = "watched: "
MODELS = {
    "t2v": synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"], blocks=2),
    "three": synthetic.tiny(synthetic.FAMILIES["t2v-1.3B"], blocks=3),
    "vace": synthetic.tiny(synthetic.FAMILIES["vace-1.3B"], blocks=2),
    "ti2v": synthetic.tiny(synthetic.FAMILIES["ti2v-5B"], blocks=2),
    "pair": synthetic.tiny(synthetic.FAMILIES["t2v-A14B"], blocks=2),
}
CALIBRATION: dict[str, Any] = {
    "num_samples": 3, "time_bins": 2, "size": "64*64", "frame_num": 5, "rows": 16, "gram_rows": 16,
}  # fmt: skip
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smooth": ("w8a8_smooth", {}),
    "smooth_all": ("w8a8_smooth_all", {}),
    "static": ("w8a8_static", {}),
    "gptq": ("w8a8_gptq", {"next_input": "quantized"}),
    "gptq_float": ("w8a8_gptq", {"next_input": "float"}),
    "fp32": ("w8a8_static", {"dtype": "fp32"}),
}


# The server.


class CalibRecorder(Recorder):
    """See the module. Strict about power cuts: a new name, or a removed one, counts once its folder is synced."""

    current: CalibRecorder | None = None

    def __init__(self, root: str, fault: Fault) -> None:
        super().__init__(root, fault)
        self.most: Counter[str] = Counter()  # expert and stream -> most files of it at once
        self.most_nbytes = 0
        self._entered: set[str] = set()
        self._removed: dict[str, str] = {}  # path -> where its content is kept, "" for a folder
        self._spare = f"{root}.spare-{os.getpid()}"
        CalibRecorder.current = self

    def install(self) -> None:
        """See Recorder."""
        super().install()
        self._wrap_removal("unlink")
        self._wrap_removal("rmdir")
        from streamq.wan.blocks import BlockRunner

        real = BlockRunner.run

        def run(runner: BlockRunner, unit: str, *args: Any) -> Any:
            self.calls.append(f"replay {unit}")
            if self._due("replay", f"{self.root}/replay/{unit}"):
                self._fire(real, (runner, unit, *args), self.root, "replay")
            return real(runner, unit, *args)

        setattr(BlockRunner, "run", run)  # noqa: B010 - as in Recorder

    def _wrap_removal(self, name: str) -> None:
        """`os.unlink` and `os.rmdir`, as `shutil.rmtree` calls them; Path.unlink calls them too, and is counted."""
        real = getattr(os, name)

        def call(path: Any, *, dir_fd: int | None = None) -> Any:
            inside = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else ""
            found = os.path.abspath(os.path.join(inside, os.fspath(path)))
            if (name == "unlink" and dir_fd is None) or not found.startswith(self.root + "/"):
                return real(path, dir_fd=dir_fd)
            self.calls.append(f"{name} {os.path.relpath(found, self.root)}")
            if self._due(name, found):
                self._fire(partial(real, dir_fd=dir_fd), (path,), found, name)
            self._note(name, (path,), found)
            return real(path, dir_fd=dir_fd)

        setattr(os, name, call)

    def _note(self, name: str, args: tuple[Any, ...], path: str) -> None:
        super()._note(name, args, path)
        self._watch()
        if name in ("open", "mkdir", "write_bytes") and not os.path.lexists(path):
            self._entered |= {path} - {self.root}  # whose own folder is not watched
        elif name == "replace" and path in self._entered:
            self._entered.add(faults.path_of(args[1]))
        elif name == "fsync":
            self._entered = {entry for entry in self._entered if os.path.dirname(entry) != path}
            self._removed = {old: kept for old, kept in self._removed.items() if os.path.dirname(old) != path}
        elif name == "unlink" and os.path.isfile(path) and path not in self._entered:
            os.makedirs(self._spare, exist_ok=True)
            self._removed[path] = f"{self._spare}/{len(self.calls)}"
            os.link(path, self._removed[path])
        elif name == "rmdir" and os.path.isdir(path) and path not in self._entered:
            self._removed[path] = ""

    def _cut(self, *, keep_renames: bool) -> None:
        super()._cut(keep_renames=keep_renames)
        if self.fault.target == "lenient":  # the cache's own folder has been entered
            self._entered.discard(f"{self.root}/{CACHE}")
        for entry in sorted(self._entered):
            if os.path.isdir(entry):
                shutil.rmtree(entry)
            elif os.path.lexists(entry):
                os.remove(entry)
        for old, kept in sorted(self._removed.items()):  # folders before what is in them
            if not os.path.lexists(old) and os.path.isdir(os.path.dirname(old)):
                os.rename(kept, old) if kept else os.makedirs(old)

    def _watch(self) -> None:
        cache = Path(self.root, CACHE)
        found = [path for path in cache.glob("*" + STREAM)] if cache.is_dir() else []
        for stream, count in Counter(path.name.rpartition("-")[0] for path in found).items():
            self.most[stream] = max(self.most[stream], count)
        self.most_nbytes = max(self.most_nbytes, sum(path.stat().st_size for path in found if path.exists()))


def _main() -> None:
    from streamq import cli

    real = cli.main

    def main(argv: Any = None) -> int:
        status = real(argv)
        if (seen := CalibRecorder.current) is not None:
            print(WATCHED + json.dumps({"most": seen.most, "nbytes": seen.most_nbytes}), file=sys.stderr)
        return status

    setattr(os, "sched_getaffinity", lambda _: {0})  # noqa: B010 - threads that wait for a busy core cost time
    setattr(cli, "main", main)  # noqa: B010
    setattr(faults, "Recorder", CalibRecorder)  # noqa: B010
    faults._serve()


# The client.


@dataclass(frozen=True)
class CalibWork(Work):
    """A calibrated run's command. `options` begin with --config_path."""

    def argv(self, out: Path, *more: object) -> list[str]:
        """See Work."""
        return calib_argv(self.model, out, *self.options, *more)


class Kit:
    """The session's runs, models, recipes and references."""

    def __init__(self, runs: Runs, folder: Path) -> None:
        self.runs = runs
        self.folder = folder
        self._known: dict[tuple[str, ...], CalibWork] = {}

    def model(self, name: str) -> Path:
        """A model's folder; nobody changes it."""
        path = self.folder / "models" / name
        if not path.exists():
            synthetic.write(path, MODELS[name])
        return path

    def recipe(self, name: str, **calibration: Any) -> Path:
        """A recipe of the library with tiny calibration settings."""
        stem, settings = RECIPES[name]
        chosen = CALIBRATION | settings | calibration
        label = "-".join(f"{key}{chosen[key]}".replace("*", "x") for key in sorted(calibration))
        return write_recipe(self.folder / f"{name}-{label}.yaml", stem, chosen)

    def work(self, model: str, recipe: str, *options: object) -> CalibWork:
        """`work("t2v", "static", "--read_ahead", 0)`, run once a session."""
        key = (model, recipe, *map(str, options))
        if key not in self._known:
            out, given = fresh(self.folder / "reference" / "out"), ("--config_path", str(self.recipe(recipe)), *key[2:])
            ended = self.runs(calib_argv(self.model(model), out, *given))
            assert ended.status == 0, ended.err
            assert not (out / CACHE).exists() and not (out / JOURNAL).exists() and (out / MANIFEST).exists()
            calls = tuple(ended.calls)
            self._known[key] = CalibWork(self.model(model), given, snapshot(out), calls, 0.0)
            shutil.rmtree(out)
        return self._known[key]


def calib_argv(model: Path, out: Path, *more: object) -> list[str]:
    """A calibrated run's command line."""
    return ["quant", "--model_path", str(model), "--save_path", str(out), "--device", "cpu", *map(str, more)]


def write_recipe(path: Path, stem: str, calibration: dict[str, Any]) -> Path:
    """A recipe of the library with `spec.calibration`."""
    document = yaml.safe_load((ROOT / "recipes" / f"{stem}.yaml").read_text())
    document["spec"]["calibration"] = calibration
    path.write_text(yaml.safe_dump(document))
    return path


_kits: list[Kit] = []


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """Two forking servers that have replayed a model already, and what is run on them. One for all that import it."""
    if _kits:
        yield _kits[0]
        return
    folder = tmp_path_factory.mktemp("calibrated")
    found = Kit(None, folder)  # type: ignore[arg-type]
    warm = calib_argv(found.model("vace"), folder, "--config_path", str(found.recipe("smooth")))
    at = warm.index("--save_path")
    with mock.patch.object(faults, "__file__", __file__):  # the script that a server is
        found.runs = Runs(folder / "servers", [*warm[:at], *warm[at + 2 :]], width=2)
    _kits.append(found)
    yield found
    _kits.clear()
    found.runs.close()
    shutil.rmtree(folder)


def watched(ended: Ended) -> dict[str, Any]:
    """What a run's recorder has seen of the streams on the disk."""
    line = next(line for line in ended.err.splitlines() if line.startswith(WATCHED))
    return json.loads(line.removeprefix(WATCHED))


def replays(calls: Iterable[str]) -> Counter[str]:
    """Block -> how many forwards it had."""
    return Counter(call.split()[1] for call in calls if call.startswith("replay "))


def least_memory(kit: Kit, work: CalibWork, out: Path) -> int:
    """The smallest budget that is accepted: streams are then kept on the disk alone."""
    refused = kit.runs(work.argv(out, "--max_host_memory", "1MiB"))
    assert not refused.complaint(2) and not out.exists(), refused.err
    least = re.search(r"can do with is (\d+)", refused.errors[0])
    assert least is not None
    return int(least[1])


def stop(kit: Kit, work: CalibWork, out: Path, *, commits: int, more: Iterable[object] = ()) -> Path:
    """Kill a new run just after that many commits; returns `out`."""
    ended = kit.runs(work.argv(fresh(out), *more), Fault("after", commits + 1, "fsync", JOURNAL))
    assert ended.status == -9, ended.err
    assert len((out / JOURNAL).read_bytes().splitlines()) == commits + 1
    return out


def unsound(folder: Path, *references: Snapshot) -> str:
    """As `faults.unsound`, but while there is a journal there may be a cache, in which no name is a runtime's."""
    if not (folder / CACHE).exists():
        return faults.unsound(folder, *references)
    names = [path.name for path in (folder / CACHE).iterdir()]
    odd = [name for name in names if not name.endswith((".cache", STREAM, PARTIAL))]
    if odd or not (folder / JOURNAL).exists():
        return f"{CACHE} holds {odd or names}, journal: {(folder / JOURNAL).exists()}"
    return _without_cache(folder, references)


def _without_cache(folder: Path, references: tuple[Snapshot, ...]) -> str:
    cache = {name: about for name, about in snapshot(folder).items() if name.split("/")[0] == CACHE}
    return faults.unsound(folder, *references, cache)


def sweep(
    kit: Kit, work: CalibWork, tmp: Path, faults_: Iterable[Fault], judge: Callable[[Fault, Ended], str], *more: object
) -> list[str]:
    """For every fault: a new run that meets it, a look at the folder, the same command again. Returns the problems.

    `more`: options of the second command alone.
    """

    def one(numbered: tuple[int, Fault]) -> str:
        number, fault = numbered
        out = fresh(tmp / str(number) / "out")
        ended = kit.runs(work.argv(out), fault)
        found = [judge(fault, ended), unsound(out, work.result), finish(kit.runs, work, out, *more)]
        shutil.rmtree(out.parent)
        problems = "; ".join(problem for problem in found if problem)
        call = "" if fault.call else f" ({work.calls[fault.at - 1]})"
        return f"{fault.act} at {fault.call or 'call'} {fault.at} of {len(work.calls)}{call}: {problems}"

    return [problem for problem in kit.runs.each(one, enumerate(faults_)) if not problem.endswith(": ")]


if __name__ == "__main__":
    _main()
