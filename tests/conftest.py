"""What every test file shares: tiny checkpoints from `benchmarks/synthetic.py`, two ways to run the command line."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test waits for a network

import synthetic  # noqa: E402
from resume_kit import models, own_model, runs, works  # noqa: E402, F401 - fixtures of the tests of interrupted runs

from streamq import cli  # noqa: E402

Result: TypeAlias = "subprocess.CompletedProcess[str]"
Tiny: TypeAlias = "Callable[..., Path]"


def write_tiny(out: Path, family: str, *, blocks: int = 2, **how: Any) -> Path:
    """Write a checkpoint of `family` at width 64; returns what to give as --model_path.

    `how` goes to `synthetic.write`: layout, dtype, seed, prefix, shard_bytes, single_file.
    """
    synthetic.write(out, synthetic.tiny(synthetic.FAMILIES[family], blocks), **how)
    return out / how.get("single_file", "")


@pytest.fixture(name="tiny")
def tiny_fixture(tmp_path: Path) -> Tiny:
    """`tiny("t2v-1.3B", blocks=3, dtype="bf16")` writes a new checkpoint below tmp_path and returns its path."""
    count = 0

    def make(family: str = "t2v-1.3B", **how: Any) -> Path:
        nonlocal count
        count += 1
        return write_tiny(tmp_path / f"model{count}", family, **how)

    return make


def run(*args: object, env: Mapping[str, str] | None = None) -> Result:
    """Run `streamq ARGS` in this process, so that torch is imported once a session and not once a case."""
    argv = [str(arg) for arg in args]
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with (
            mock.patch.dict(os.environ, {"COLUMNS": "200"} | dict(env or {})),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            code = cli.main(argv)
    except SystemExit as stop:  # argparse: --version and --help
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(["streamq", *argv], code, out.getvalue(), err.getvalue())


def run_process(
    *args: object, env: Mapping[str, str] | None = None, timeout: float = 120, cwd: Path | None = None
) -> Result:
    """Run `python -m streamq ARGS` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "streamq", *map(str, args)],
        capture_output=True, text=True, timeout=timeout, cwd=cwd, env=os.environ | dict(env or {}), check=False,
    )  # fmt: skip


@pytest.fixture(name="run")
def run_fixture() -> Callable[..., Result]:
    """`run` for tests that would rather not import it from here."""
    return run


@pytest.fixture(name="run_process")
def run_process_fixture() -> Callable[..., Result]:
    """`run_process`, likewise."""
    return run_process


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for a busy core make small tensors slow."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})


class Hang(BaseException):
    """Beyond every `except Exception`."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Nothing that is refused may take long; an alarm ends what would hang."""

    def ring(*_: object) -> None:
        raise Hang(f"not refused within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_error(result: Result, *says: str) -> None:
    """One line of stderr begins with `error: ` and holds every text (`a|b`: either of the two); no traceback."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "bug in streamq" not in errors[0], errors[0]
    for text in says:
        assert any(choice in errors[0] for choice in text.split("|")), f"{text!r} is not in: {errors[0]}"
    assert len(errors[0]) < 20_000, f"a message of {len(errors[0])} characters"
