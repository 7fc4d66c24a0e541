"""Several processes on one run, and what they tell each other: over gloo, wherever their arithmetic is done.

`accelerate launch` and `torchrun` start them, and say in the environment which one each is. Without them there is one
process, which tells itself. Objects go by pickle, between processes of one run only.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from streamq.errors import RunError, StreamqError, UsageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# How long one waits for another that lives: as long as making inputs, or a block in 4 bits, may take.
PATIENCE = timedelta(hours=12)
LAST_WORDS = timedelta(seconds=20)  # how long one that ends waits until what it has sent has left
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FAILED = "streamq/failed"


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: this one's number, how many, their launcher's store, and what was sent last."""

    number: int = 0
    count: int = 1
    store: Any = None
    sent: list[tuple[Any, torch.Tensor]] = field(default_factory=list, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that keeps the journal and speaks to the user."""
        return self.number == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of their numbers; waits for all. Raises RunError if one is gone."""
        if self.count == 1:
            return [value]
        import torch

        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        try:
            sizes = self._exchange(torch.tensor([own.numel()]), [1] * self.count)
            return [pickle.loads(part.numpy().data) for part in self._exchange(own, [int(size) for size in sizes])]
        except RuntimeError as error:
            self.sent.clear()  # whoever still waits for it hears that this one has gone, too
            raise RunError(
                f"one of the {self.count} processes of this run is gone ({' '.join(str(error).split())[:120]}); what is"
                " committed is kept: the same command goes on, with any number of processes"
            ) from error

    def _exchange(self, own: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Everybody's tensor, by their sizes. Waits for what comes and not for what leaves.

        Of a process that dies, gloo (as in torch 2.13) tells whoever waits to receive, but now and then whoever waits
        for a send, as `all_gather` does, is never woken. What was sent last has arrived when all have answered.
        """
        import torch
        from torch import distributed

        others = [number for number in range(self.count) if number != self.number]
        found = [torch.empty(size, dtype=own.dtype) for size in sizes]
        found[self.number] = own
        coming = [distributed.irecv(found[number], number) for number in others]
        sent = [(distributed.isend(own, number), own) for number in others]
        for work in coming:
            if work is not None:  # as it is for whoever is not in the group; everybody is
                work.wait()
        self.sent[:] = sent
        return found

    def by_first(self, job: Callable[[], T]) -> T:
        """What the first process's `job` returns, or the StreamqError that it raises, for everybody."""
        if self.count == 1:
            return job()
        outcome: tuple[T | None, StreamqError | None] = (None, None)
        if self.first:
            try:
                outcome = (job(), None)
            except StreamqError as error:
                outcome = (None, error)
        value, failed = self.gather(outcome)[0]
        if failed is not None:
            raise failed
        return value  # type: ignore[return-value]

    def speaks(self) -> bool:
        """Whether this process is the first to say what went wrong: one message a run is enough."""
        if self.store is None:
            return True
        try:
            return bool(self.store.compare_set(FAILED, "", str(self.number)).decode() == str(self.number))
        except RuntimeError:  # whoever kept the store is gone, so nobody else can be asked
            return True

    def device(self, name: str) -> str:
        """`auto`, `cuda` and `npu` as the card of this process's own."""
        if self.count == 1 or ":" in name:
            return name
        from streamq.device import kind_of

        kind = kind_of(name)
        return kind if kind == "cpu" else f"{kind}:{os.environ.get('LOCAL_RANK', self.number)}"


ALONE = Ranks()


def launched() -> int:
    """How many processes were started together, by the environment; imports no torch. Raises UsageError."""
    if any(name not in os.environ for name in NEEDED):
        return 1
    number, count = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UsageError(f"RANK={number} WORLD_SIZE={count}: no number below a count; unset them, or use torchrun")
    return int(count)


def connect() -> Ranks:
    """Find the other processes; waits for them. Raises UsageError where torch or the network cannot."""
    count = launched()
    if count == 1:
        return ALONE
    from torch import distributed

    if not distributed.is_available():
        raise UsageError(f"WORLD_SIZE={count}: this torch has no torch.distributed; install one that has, or run alone")
    try:
        store, number, count = next(iter(distributed.rendezvous("env://")))
        distributed.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(
            f"{where}: the {count} processes do not find each other ({' '.join(str(error).split())[:200]}); start them"
            " with accelerate launch or torchrun; GLOO_SOCKET_IFNAME names the network interface"
        ) from error
    return Ranks(number, count, store)


def disconnect(ranks: Ranks) -> None:
    """This process needs the others no more, and they have heard its last word."""
    with suppress(RuntimeError):  # one is gone: so the others end too, whether or not they hear of it from here
        for work, _ in ranks.sent:
            work.wait(LAST_WORDS)
    ranks.sent.clear()
