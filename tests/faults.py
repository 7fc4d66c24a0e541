"""Runs of streamq that die, fail or pause exactly where a test says.

A server process imports torch and streamq once and forks a child a run: 50 ms instead of 1.5 s. In the child, every
call that changes the output folder goes through a `Recorder`, which counts it and, at the call that a `Fault` names,
kills the process, loses what was not synced, raises, sends a signal, stops, or changes the source under the reader's
feet.

`python tests/faults.py COMMAND` is the server (JSON lines on stdin and stdout); tests use `Runs`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock, Timer
from typing import Any, NoReturn, TypeAlias, TypeVar

JOURNAL = "streamq-journal.jsonl"
MANIFEST = "streamq.json"
PARTIAL = ".partial"
# Calls that change a folder, and, where half of one makes sense, which of their arguments holds the bytes or the size.
OS_CALLS = ("open", "pwrite", "write", "fdatasync", "fsync", "replace", "fchmod", "posix_fallocate", "ftruncate")
PATH_CALLS = ("unlink", "mkdir", "write_bytes")
HALVED = {"pwrite": 1, "write": 1, "posix_fallocate": 2, "write_bytes": 1}
STOPPED = "stopped"
TIMED_OUT = 124
TIMEOUT = 120.0  # seconds that a run may take; the longest takes one
Snapshot: TypeAlias = "dict[str, tuple[int, str]]"
T = TypeVar("T")
J = TypeVar("J")


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th call (from 1) of those that match `call` and hold `path` in their path.

    `act`: `before` `half` `after` kill the process there; `power` kills it and takes what was not synced, `power_kept`
    the same but renames have reached the disk; `error` raises OSError(`code`), `short` does half and returns so;
    `signal` sends `code` to the process itself; `stop` stops it until SIGCONT; `touch` `grow` `shrink` change the file
    `target`. `forever`: at every later match too. `limit`: RLIMIT_FSIZE in bytes.
    """

    act: str = ""
    at: int = 0
    call: str = ""
    path: str = ""
    code: int = 0
    target: str = ""
    forever: bool = False
    limit: int = 0


class Recorder:
    """Installed in a child. `calls`: `"pwrite mindie/a.safetensors.partial"`, in order."""

    def __init__(self, root: str, fault: Fault) -> None:
        self.root = root
        self.fault = fault
        self.calls: list[str] = []
        self.matched = 0
        self.fired = False
        self._synced_size: dict[str, int] = {}  # of files with changes that no sync has followed
        self._unsynced: dict[str, list[tuple[int, int]]] = {}
        self._renamed: list[tuple[str, str]] = []
        self._lock = threading.RLock()  # several threads write, and one more commits

    def install(self) -> None:
        """Wrap the calls, for the rest of this process's life."""
        for name in OS_CALLS:
            self._wrap(os, name)
        for name in PATH_CALLS:
            self._wrap(Path, name)
        if self.fault.call == "read":
            from streamq.checkpoint import Source

            real: Callable[..., None] = Source.read

            def read(source: Source, info: Any, *args: Any) -> None:
                path = str(source.checkpoint.files[info.file].path)
                if self._due("read", path):
                    self._fire(real, (source, info, *args), path)
                real(source, info, *args)

            setattr(Source, "read", read)  # noqa: B010 - mypy takes an assignment for a method with two selfs

    def _wrap(self, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **keywords: Any) -> Any:
            path = path_of(args[0])
            if path != self.root and not path.startswith(self.root + "/"):
                return real(*args, **keywords)
            with self._lock:
                self.calls.append(f"{name} {os.path.relpath(path, self.root)}")
                due = self._due(name, path)
            if due:
                done = self._fire(partial(real, **keywords), args, path, name)
                if done is not None:
                    return done
            with self._lock:  # what is noted is done before the power can go
                self._note(name, args, path)
                return real(*args, **keywords)

        setattr(owner, name, call)

    def _due(self, name: str, path: str) -> bool:
        fault = self.fault
        if not fault.act or (fault.call and name not in fault.call.split()) or fault.path not in path:
            return False
        self.matched += 1
        return self.matched == fault.at or (fault.forever and self.matched > fault.at)

    def _fire(self, real: Callable[..., Any], args: tuple[Any, ...], path: str, name: str = "") -> Any:
        """What the call is to return, or None to let it go on."""
        fault, self.fired = self.fault, True
        if fault.act == "half" and name not in HALVED:  # threads: the call of this number was another one in the record
            _die()
        if fault.act in ("half", "short"):
            half = list(args)
            part = HALVED[name]
            half[part] = half[part] // 2 if isinstance(half[part], int) else half[part][: len(half[part]) // 2]
            done = real(*half)
            return _die() if fault.act == "half" else done
        if fault.act == "before":
            _die()
        if fault.act == "after":
            real(*args)
            _die()
        if fault.act in ("power", "power_kept"):
            with self._lock:
                self._cut(keep_renames=fault.act == "power_kept")
                _die()
        if fault.act == "error":
            time.sleep(0.02)  # a disk takes its time, and the other threads fill their queues meanwhile
            raise OSError(fault.code, os.strerror(fault.code))
        if fault.act == "signal":
            os.kill(os.getpid(), fault.code)
        elif fault.act == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            change(Path(fault.target), fault.act)
        return None

    def _note(self, name: str, args: tuple[Any, ...], path: str) -> None:
        """Keep the books on what a power cut would take."""
        if name in ("pwrite", "write", "posix_fallocate", "write_bytes"):
            size = os.stat(path).st_size if os.path.exists(path) else 0
            self._synced_size.setdefault(path, 0 if name == "write_bytes" else size)
            if name == "pwrite":
                self._unsynced.setdefault(path, []).append((args[2], len(args[1])))
        elif name in ("fsync", "fdatasync"):
            self._synced_size.pop(path, None)
            self._unsynced.pop(path, None)
            self._renamed = [(old, new) for old, new in self._renamed if os.path.dirname(new) != path]
        elif name == "replace":
            new = path_of(args[1])
            self._renamed.append((path, new))
            if path in self._synced_size:
                self._synced_size[new] = self._synced_size.pop(path)
                self._unsynced[new] = self._unsynced.pop(path, [])

    def _cut(self, *, keep_renames: bool) -> None:
        for path, size in self._synced_size.items():
            if os.path.exists(path):
                with open(path, "r+b") as stream:
                    for start, length in self._unsynced.get(path, []):
                        stream.seek(start)
                        stream.write(bytes(length))
                    stream.truncate(size)
        for old, new in [] if keep_renames else reversed(self._renamed):
            os.rename(new, old)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    while True:
        signal.pause()


def path_of(argument: Any) -> str:
    """The path behind a descriptor or a path argument."""
    if isinstance(argument, int):
        return os.readlink(f"/proc/self/fd/{argument}")
    return os.path.abspath(os.fspath(argument))


def change(path: Path, how: str) -> None:
    """Change a file, and its time of change: `touch`, `grow` by a byte, `shrink` to half."""
    before = path.stat()
    if how == "grow":
        with open(path, "ab") as stream:
            stream.write(b"\0")
    elif how == "shrink":
        os.truncate(path, before.st_size // 2)
    else:
        assert how == "touch", how
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


# The server.


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from streamq import cli

    torch.set_num_threads(1)
    assert cli.main(sys.argv[1:]) == 0, "the run that warms up, after which a child has nothing left to import"
    assert len(os.listdir("/proc/self/task")) == 1, "a process that forks must have one thread"
    gc.collect()
    gc.freeze()  # children share its pages
    children: set[int] = set()
    while line := sys.stdin.readline():
        request = json.loads(line)
        reply: dict[str, Any]
        if "wait" in request:
            pid, raw = os.waitpid(request["wait"], os.WUNTRACED if request["untraced"] else 0)
            stopped = os.WIFSTOPPED(raw)
            children -= set() if stopped else {pid}
            reply = {"status": STOPPED if stopped else os.waitstatus_to_exitcode(raw)}
        elif "ready" in request:
            reply = {}
        else:
            pid = os.fork()
            if pid == 0:
                _child(cli.main, **request)
            children.add(pid)
            reply = {"pid": pid}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    for pid in children:  # of tests that failed before they could wait
        os.kill(pid, signal.SIGKILL)


def _child(
    main: Callable[[Sequence[str]], int], argv: list[str], fault: dict[str, Any], scratch: str, env: dict[str, str]
) -> NoReturn:
    status = 99
    try:
        os.environ.update(env)
        for number, name in ((1, "out"), (2, "err")):
            descriptor = os.open(f"{scratch}/{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
            os.dup2(descriptor, number)
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        recorder = Recorder(os.path.realpath(argv[argv.index("--save_path") + 1]), Fault(**fault))
        if recorder.fault.limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (recorder.fault.limit, resource.RLIM_INFINITY))
        recorder.install()
        status = main(argv)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(scratch, "calls").write_text(json.dumps({"calls": recorder.calls, "fired": recorder.fired}))
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# The client.


@dataclass
class Ended:
    """A run that is over. `status`: the exit status, or minus the signal that killed it."""

    status: int
    out: str
    err: str
    calls: list[str] = field(default_factory=list)
    fired: bool = False

    @property
    def errors(self) -> list[str]:
        """The lines that the contract counts."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def complaint(self, status: int) -> str:
        """Empty if it failed as the contract says: this status, one error line, no traceback, no bug of ours."""
        if self.status == status and len(self.errors) == 1 and "Traceback" not in self.err and "a bug" not in self.err:
            return ""
        return f"exit {self.status}, wanted {status}, stderr {self.err[-600:]!r}"


class Server:
    """A forking process. `runs`: the numbers of those that nobody has waited for yet."""

    def __init__(self, scratch: Path, warm: Sequence[str]) -> None:
        self.scratch = scratch
        self.runs: set[int] = set()
        self._lock = Lock()
        scratch.mkdir(parents=True)
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, __file__, *warm, "--save_path", str(scratch / "warm"), "--read_ahead", "0", "--quiet"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | one | {"PYTHONHASHSEED": "0"},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one reply."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        assert line, "the forking server is gone"
        return json.loads(line)

    def close(self) -> None:
        """End it, and whatever still runs under it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Started:
    """A run in progress."""

    def __init__(self, server: Server, number: int, argv: Sequence[str], fault: Fault, env: Mapping[str, str]) -> None:
        self._server = server
        self._number = number
        server.runs.add(number)
        self._scratch = server.scratch / f"run{number}"
        self._scratch.mkdir()
        request = {"argv": list(argv), "fault": asdict(fault), "scratch": str(self._scratch), "env": dict(env)}
        self.pid: int = server.ask(**request)["pid"]

    def send(self, number: int) -> None:
        """Send a signal; a run that has just ended does not mind."""
        os.kill(self.pid, number)

    def wait_stopped(self) -> None:
        """Until its fault has stopped it."""
        status = self._wait(untraced=True)
        assert status == STOPPED, f"ended with {status} instead of stopping: {self._text('err')}"

    def wait(self) -> Ended:
        """Until it is over, by itself or after `TIMEOUT` seconds."""
        status = self._wait(untraced=False)
        self._server.runs.discard(self._number)
        found = json.loads(self._text("calls") or "{}")
        ended = Ended(status, self._text("out"), self._text("err"), **found)
        shutil.rmtree(self._scratch)
        return ended

    def _wait(self, *, untraced: bool) -> Any:
        late: list[bool] = []

        def give_up() -> None:
            late.append(True)
            os.kill(self.pid, signal.SIGKILL)

        timer = Timer(TIMEOUT, give_up)
        timer.start()
        try:
            status = self._server.ask(wait=self.pid, untraced=untraced)["status"]
        finally:
            timer.cancel()
        return TIMED_OUT if late else status

    def _text(self, name: str) -> str:
        path = self._scratch / name
        return path.read_text() if path.exists() else ""


class Runs:
    """`streamq` by forking, `width` runs at a time. `warm`: a command without --save_path, run once before."""

    def __init__(self, scratch: Path, warm: Sequence[str], width: int) -> None:
        self.width = width
        self._lock = Lock()
        self._numbers = count()
        self._servers = [Server(scratch / str(number), warm) for number in range(width)]
        for server in self._servers:
            server.ask(ready=True)

    def start(self, argv: Sequence[str], fault: Fault | None = None, env: Mapping[str, str] | None = None) -> Started:
        """Begin a run. Any number may be at work at once, but while one is waited for, others under its server wait."""
        with self._lock:
            server = min(self._servers, key=lambda server: len(server.runs))
            return Started(server, next(self._numbers), argv, fault or Fault(), env or {})

    def __call__(self, argv: Sequence[str], fault: Fault | None = None) -> Ended:
        """Run to the end."""
        return self.start(argv, fault).wait()

    def each(self, job: Callable[[J], T], over: Iterable[J]) -> list[T]:
        """Do a job for every item, `width` at a time."""
        with ThreadPoolExecutor(self.width) as pool:
            return list(pool.map(job, over))

    def close(self) -> None:
        """End the servers."""
        for server in self._servers:
            server.close()


# What a folder holds.


def snapshot(folder: Path) -> Snapshot:
    """Path -> (mode, sha256) of everything in a folder; directories end in a slash."""
    found: Snapshot = {}
    for path in sorted(folder.rglob("*")):
        mode, name = stat.S_IMODE(path.lstat().st_mode), str(path.relative_to(folder))
        if path.is_dir():
            found[name + "/"] = (mode, "")
        else:
            found[name] = (mode, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """Path -> everything that a write to it or a change of it would move; the folder itself is `.`."""
    paths = [folder, *folder.rglob("*")]
    seen = {str(path.relative_to(folder)): path.lstat() for path in paths}
    return {name: (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in seen.items()}


def unsound(folder: Path, *references: Snapshot) -> str:
    """What an interrupted run must not have left; empty if all is well.

    Final names hold the final bytes of one of the references, everything else is temporary by its name, and where there
    is a manifest, every file that it lists is there and intact: it is the sign that the folder is complete.
    """
    found = snapshot(folder) if folder.exists() else {}
    for name, about in found.items():
        finals = [reference[name] for reference in references if name in reference]
        if finals and about not in finals:
            return f"{name} has its final name, but not its final content and mode"
        if not finals and name != JOURNAL and not name.endswith(PARTIAL):
            return f"{name} is left, which is neither a result nor temporary by its name"
    if MANIFEST in found:
        for name, about in json.loads((folder / MANIFEST).read_bytes())["files"].items():
            if name not in found or found[name][1] != about["sha256"]:
                return f"{MANIFEST} is there, but {name} is not as it says"
    return ""


def differences(folder: Path, reference: Snapshot) -> str:
    """How a folder differs from the reference; empty if it does not."""
    found = snapshot(folder) if folder.exists() else {}
    names = [name for name in sorted(set(found) | set(reference)) if found.get(name) != reference.get(name)]
    return "differs from an uninterrupted run: " + ", ".join(names[:5]) if names else ""


def fresh(folder: Path) -> Path:
    """An output folder that does not exist, below a parent that does."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    _serve()
