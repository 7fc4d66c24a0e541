"""What the loop's stages share: a ring of memory, threads that do jobs in order, and whoever watches.

Reading and writing overlap with the arithmetic only where they use other hardware, so both are settings of one code
path and not code of their own: an arena that is small, or lanes without threads, make the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from threading import Lock
from typing import Any, Protocol, TypeVar

import torch

from streamq.device import Device
from streamq.errors import RunError
from streamq.journal import Commit
from streamq.plan import Plan, Unit

T = TypeVar("T")


class Watcher(Protocol):
    """Whoever shows how far a run is. `committed` is called from the thread that commits."""

    def started(self, plan: Plan, done: set[str]) -> None:
        """Work begins; the units in `done` were committed by an earlier run."""

    def committed(self, unit: Unit, commit: Commit) -> None:
        """A unit's bytes are on the disk for good."""

    def said(self, text: str) -> None:
        """A plain sentence about calibration inputs that are being made."""


class Arena:
    """A ring of device memory, allocated once: each layer takes a region, and gives it back in the same order."""

    def __init__(self, device: Device, nbytes: int) -> None:
        try:
            self.memory = device.empty(nbytes)
        except (RuntimeError, MemoryError) as error:  # what torch's allocators raise, on every kind of device
            raise RunError(
                f"out of memory: {nbytes} bytes for the layers at work are not to be had ({str(error)[:200]}); run the"
                " same command with --read_ahead 0, or with a budget (--max_host_memory, --max_device_memory)"
            ) from error
        self._taken: deque[tuple[int, int]] = deque()
        self._lock = Lock()  # one thread takes, another gives back

    def take(self, nbytes: int) -> torch.Tensor | None:
        """A region, or None while there is no room."""
        start, size = 0, self.memory.numel()
        with self._lock:
            if self._taken:
                (first, _), (newest, last) = self._taken[0], self._taken[-1]
                wrapped = newest < first
                start = last if wrapped or last + nbytes <= size else 0
                if start + nbytes > (first if wrapped or start == 0 else size):
                    return None
            self._taken.append((start, start + nbytes))
        return self.memory[start : start + nbytes]

    def give_back(self) -> None:
        """Free the oldest region."""
        with self._lock:
            self._taken.popleft()


class Lane:
    """A thread that does jobs in order, at most `depth` of them outstanding. At depth 0 there is no thread.

    With several `threads` each job begins in order, and may end after a later one.
    Once a job has failed no later one is done, queued though it may be: a commit must not follow a failed write.
    """

    def __init__(self, depth: int, name: str, threads: int = 1) -> None:
        self.depth = depth
        self._pool = ThreadPoolExecutor(threads, name) if depth else None
        self._outstanding: deque[Future[Any]] = deque()
        self._failed = False

    def start(self, job: Callable[..., Any], *args: Any) -> Future[Any]:
        """Begin a job; its result, or its exception, is in the future."""
        if self._pool is not None:
            return self._pool.submit(self._do, job, *args)
        done: Future[Any] = Future()
        done.set_result(self._do(job, *args))
        return done

    def _do(self, job: Callable[..., Any], *args: Any) -> Any:
        if self._failed:
            raise CancelledError("an earlier job of this lane failed")
        try:
            return job(*args)
        except BaseException:
            self._failed = True
            raise

    def submit(self, job: Callable[..., Any], *args: Any) -> None:
        """Begin a job that nobody waits for, once fewer than `depth` are outstanding. Raises an earlier one's error."""
        while self._outstanding and (self._failed or len(self._outstanding) >= self.depth):
            self._outstanding.popleft().result()
        self._outstanding.append(self.start(job, *args))

    def drain(self) -> None:
        """Wait for every job that was submitted."""
        while self._outstanding:
            self._outstanding.popleft().result()

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


class Team:
    """Threads that do a few jobs side by side. A team of one has no thread: its jobs are done when they are begun."""

    def __init__(self, count: int, name: str) -> None:
        self.threads = count > 1
        self._pool = ThreadPoolExecutor(count, name) if count > 1 else None

    def start(self, jobs: Sequence[Callable[[], T]]) -> list[Future[T]]:
        """Begin jobs; their results, or their exceptions, are in the futures. Alone, raises a job's error."""
        if self._pool is not None:
            return [self._pool.submit(job) for job in jobs]
        begun: list[Future[T]] = [Future() for _ in jobs]
        for future, job in zip(begun, jobs, strict=True):
            future.set_result(job())
        return begun

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Every job's result, in their order. Raises a job's error, once none is at work any more."""
        return [job() for job in jobs] if len(jobs) < 2 else results(self.start(jobs))

    def close(self) -> None:
        """Let the threads end."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def results(begun: Sequence[Future[T]]) -> list[T]:
    """What jobs came to. Raises a job's error, once none is at work any more: their memory is theirs until then.

    Of several errors not one that only says that something else has failed.
    """
    wait(begun)
    errors = [error for job in begun if (error := job.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, CancelledError))
    return [job.result() for job in begun]
