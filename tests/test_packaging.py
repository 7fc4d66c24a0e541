"""What people install: a wheel and a source distribution that hold the whole package, and nothing beside it.

device/, savers/ and recipes/ lie in the repository's root and become streamq.device and so on only when installed. The
tests run what is in the repository, so these install a built copy elsewhere and run that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import streamq

ROOT = Path(__file__).resolve().parents[1]
IN_THE_PACKAGE = ("streamq", "device", "savers", "recipes")
BESIDE_IT = ("pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.xdist_group("packaging")  # one process builds for all of them


def python(*args: object, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this environment's Python in `cwd`, with `path` before everything that is installed in it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(path)} if path else {}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return done


def install(archive: Path, into: Path) -> Path:
    """Install a wheel or a source distribution, without dependencies, into an empty folder."""
    python(
        "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", into, archive, cwd=into.parent
    )
    return into


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What setuptools needs of the repository, so that building leaves nothing in the repository itself."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77: pip install -e .[dev]")
    folder = tmp_path_factory.mktemp("repository")
    for name in IN_THE_PACKAGE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE_IT:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(copy: Path) -> Path:
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", ".", cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(copy: Path) -> Path:
    python("-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')", cwd=copy)
    (built,) = (copy / "dist").glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("from_wheel") / "site")


@pytest.fixture(scope="module")
def from_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(sdist, tmp_path_factory.mktemp("from_sdist") / "site")


def sources() -> set[str]:
    """Every file that belongs into the package, as it is called there."""
    found = {path.relative_to(ROOT) for top in IN_THE_PACKAGE for path in (ROOT / top).rglob("*") if path.is_file()}
    names = {path.as_posix() for path in found if path.suffix in (".py", ".yaml", ".j2") or path.name == "py.typed"}
    return {name if name.startswith("streamq/") else f"streamq/{name}" for name in names}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        about = f"streamq-{streamq.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{about}/METADATA").decode())
        scripts = archive.read(f"{about}/entry_points.txt").decode()
    assert {name.partition("/")[0] for name in names} == {"streamq", about}
    inside = {name for name in names if name.startswith("streamq/")}
    assert inside == sources()
    assert {
        "streamq/py.typed",
        "streamq/recipes/w8a8.yaml",
        "streamq/device/npu.py",
        "streamq/savers/shard.py",
    } <= inside
    assert f"{about}/licenses/LICENSE" in names
    assert (metadata["Version"], metadata["License-Expression"]) == (streamq.__version__, "Apache-2.0")
    assert "streamq = streamq.cli:main" in scripts


def test_the_source_distribution_holds_every_source(sdist: Path) -> None:
    top = f"streamq-{streamq.__version__}"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for name in IN_THE_PACKAGE for path in (ROOT / name).rglob("*.py")}
    assert wanted | {"LICENSE", "pyproject.toml", "recipes/w8a8.yaml", "streamq/py.typed"} <= names


@pytest.mark.parametrize("kind", ["from_wheel", "from_sdist"])
class TestInstalled:
    """The installed copy, run from a folder where nothing of the repository is in reach."""

    @pytest.fixture
    def site(self, kind: str, request: pytest.FixtureRequest) -> Path:
        found = request.getfixturevalue(kind)
        assert isinstance(found, Path)
        return found

    def test_it_is_the_copy_that_runs(self, site: Path, tmp_path: Path) -> None:
        modules = ["streamq", "streamq.cli", "streamq.device.cpu", "streamq.savers.mindie", "streamq.methods.int8"]
        code = f"import importlib, json; print(json.dumps([importlib.import_module(m).__file__ for m in {modules}]))"
        for file in json.loads(python("-c", code, cwd=tmp_path, path=site).stdout):
            assert Path(file).is_relative_to(site)

    def test_version_and_recipes(self, site: Path, tmp_path: Path) -> None:
        version = python("-m", "streamq", "--version", cwd=tmp_path, path=site).stdout
        assert version == f"streamq {streamq.__version__}\n"
        listed = json.loads(python("-m", "streamq", "recipes", "--json", cwd=tmp_path, path=site).stdout)
        assert set(listed) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
        text = python("-m", "streamq", "recipes", "w8a8", cwd=tmp_path, path=site).stdout
        assert text == (ROOT / "recipes" / "w8a8.yaml").read_text("utf-8")

    def test_the_whole_way(self, site: Path, tmp_path: Path, tiny: object) -> None:
        assert callable(tiny)
        model = tiny("t2v-1.3B")
        what = ["--model_path", model, "--save_path", "out", "--quant_type", "w8a8", "--format", "mindie,lightx2v"]
        python("-m", "streamq", "quant", *what, "--device", "cpu", "--quiet", cwd=tmp_path, path=site)
        python("-m", "streamq", "verify", "out", "--source", model, cwd=tmp_path, path=site)

    @pytest.mark.parametrize("name", ["device", "savers", "recipes"])
    def test_no_second_copy_is_importable(self, site: Path, tmp_path: Path, name: str) -> None:
        code = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
        assert python("-c", code, cwd=tmp_path, path=site).stdout == "None\n"
        assert not (site / name).exists()


def test_version_without_torch(tmp_path: Path) -> None:
    """Also building asks for the version, where torch need not be installed."""
    code = "import sys, streamq; assert 'torch' not in sys.modules; print(streamq.__version__)"
    assert python("-c", code, cwd=tmp_path).stdout.strip() == streamq.__version__
