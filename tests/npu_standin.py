"""Ascend NPUs made of host memory: a stand-in for torch_npu, to run the real device code where there is no NPU.

    import npu_standin
    npu_standin.install()          # once a process: `npu` becomes torch's PrivateUse1 backend, this module `torch.npu`
    torch.ones(3).to("npu") @ ...  # runs on the CPU

Renaming a backend cannot be undone: tests install it in a subprocess. It is stricter than the hardware, which lets the
same mistakes pass, most of the time:

- An operation that mixes CPU and npu tensors, or two cards, is an error; only copies cross over.
- Nothing that is asynchronous is done before somebody waits for it. A copy between host and device sits in its stream's
  queue until an event behind it, or the stream, is synchronized, or until another stream's work needs it. So the device
  gets what the pinned chunk holds by then, and the host finds garbage where a copy to it has not arrived.
- Streams keep vector clocks. Work that touches bytes which another stream has written (or writes bytes that it has
  read), without an event or the host in between, raises `Hazard`; so does the like of it when memory is freed.
- A thread's current device is its own, card 0 at first; an event is synchronized with its own card as the current one.
- float64 becomes float32, as torch_npu has it ("Device do not support double dtype now").
- Fresh memory is filled with garbage; sizes are rounded up to 512 bytes, as the caching allocator does.

What it cannot show: the arithmetic of the real device, and its speed.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CARDS = 2
BLOCK = 512  # bytes; the allocator's unit
GARBAGE = 0xCB  # int8 -53, a large negative number in every float dtype
Clock = dict[int, int]  # stream number -> how many pieces of its work are known to be done
aten, _host_empty = torch.ops.aten, torch.empty


class Hazard(RuntimeError):
    """Something that goes wrong on real hardware only now and then."""


@dataclass
class Counts:
    """What happened since `reset`. Lists have an entry a card."""

    to_device_copies: int = 0
    to_device_bytes: int = 0
    to_host_copies: int = 0
    to_host_bytes: int = 0
    pageable_copies: int = 0  # non-blocking, but from or to memory that is not pinned
    double_casts: int = 0
    pinned_bytes: int = 0
    peak: list[int] = field(default_factory=lambda: [0] * CARDS)
    hazards: list[str] = field(default_factory=list)  # found where nothing can be raised


counts = Counts()
live: list[int] = [0] * CARDS  # bytes alive now
capacity = 64 << 30  # bytes a card
_lock = threading.RLock()
_thread = threading.local()
_host_clock: Clock = {}  # of all threads: whatever orders them among themselves is not seen here
_pinned: list[torch.Tensor] = []  # kept for good, so that no address is used twice
_streams: list[Stream] = []  # every stream that there is, the cards' default ones first


def reset() -> None:
    """Start counting anew; what is alive stays."""
    global counts
    counts = Counts(peak=list(live))


def _merge(into: Clock, other: Clock) -> None:
    for number, time in other.items():
        into[number] = max(time, into.get(number, 0))


class Stream:
    """A queue of work on one card."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("npu", _index(device))
        self.number = len(_streams)
        self.clock: Clock = {}
        self.begun = self.done = 0
        self._queue: deque[Callable[[], object]] = deque()
        _streams.append(self)

    def put(self, job: Callable[[], object]) -> None:
        """Queue a copy, or a wait."""
        self._queue.append(job)
        self.begun += 1

    def run(self, until: int | None = None) -> None:
        """Do what is queued, up to a position."""
        with torch.no_grad():
            while self.done < (self.begun if until is None else until):
                self.done += 1
                self._queue.popleft()()

    def advance(self) -> None:
        """Begin a piece of work: it comes after all that this stream waits for, and all that the host has seen done."""
        _merge(self.clock, _host_clock)
        self.clock[self.number] = self.clock.get(self.number, 0) + 1

    def wait_event(self, event: Event) -> None:
        """What is put next comes after the event."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        """What is put next comes after all that the other stream has now."""
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        """Mark the present end of the queue."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Block until everything is done."""
        with device(self.device):
            self.record_event().synchronize()


class Event:
    """A place in a stream's queue. Before it is recorded, waiting for it is no wait at all: as on the hardware."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._stream: Stream | None = None
        self._position = 0
        self._clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        """Mark the present end of a stream's queue."""
        with _lock:
            self._stream = stream or current_stream()
            self._position = self._stream.begun
            self._clock = dict(self._stream.clock)

    def wait(self, stream: Stream | None = None) -> None:
        """Make a stream's further work come after the event, as it is recorded now."""
        with _lock:
            stream = stream or current_stream()
            source, position = self._stream, self._position
            if source is not None:
                stream.put(lambda: source.run(position))
                _merge(stream.clock, self._clock)

    def synchronize(self) -> None:
        """Block until the event has come."""
        with _lock:
            if self._stream is None:
                return
            if self._stream.device.index != current_device():
                raise Hazard(f"event of {self._stream.device} waited for by a thread that is on npu:{current_device()}")
            self._stream.run(self._position)
            _merge(_host_clock, self._clock)


def is_available() -> bool:
    """There is always a card."""
    return True


def device_count() -> int:
    """Cards that pretend to be there."""
    return CARDS


def _index(device: Any) -> int:
    if isinstance(device, str):
        device = torch.device(device)
    index = device.index if isinstance(device, torch.device) else device
    index = current_device() if index is None else int(index)
    if not 0 <= index < CARDS:
        raise RuntimeError(f"invalid device id {index}")
    return index


def current_device() -> int:
    """This thread's card."""
    return getattr(_thread, "index", 0)


def set_device(device: Any) -> None:
    """Choose this thread's card."""
    _thread.index = _index(device)


@contextmanager
def device(device: Any) -> Iterator[None]:
    """Choose this thread's card for a while."""
    before = current_device()
    set_device(device)
    try:
        yield
    finally:
        set_device(before)


def current_stream(device: Any = None) -> Stream:
    """This thread's stream on a card."""
    index = _index(device)
    return getattr(_thread, "streams", {}).get(index, _streams[index])


@contextmanager
def stream(stream: Stream) -> Iterator[None]:
    """Work in a stream, and on its card, for a while."""
    before, card = current_stream(stream.device), current_device()
    _thread.streams = {**getattr(_thread, "streams", {}), stream.device.index: stream}
    set_device(stream.device)
    try:
        yield
    finally:
        _thread.streams = {**_thread.streams, stream.device.index: before}
        set_device(card)


def synchronize(device: Any = None) -> None:
    """Block until a card is idle."""
    with _lock:
        for each in _streams:
            if each.device.index == _index(device):
                each.run()
                _merge(_host_clock, each.clock)


def memory_allocated(device: Any = None) -> int:
    """Bytes alive on a card."""
    return live[_index(device)]


def max_memory_allocated(device: Any = None) -> int:
    """Most bytes that were alive on a card at once."""
    return counts.peak[_index(device)]


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """(free, total) bytes of a card."""
    return capacity - live[_index(device)], capacity


def empty_cache() -> None:
    """Nothing is cached."""


def manual_seed_all(seed: int) -> None:
    """Random numbers come from the CPU's generator."""


def _is_in_bad_fork() -> bool:
    return False


class Memory:
    """An allocation on a card: some host memory, and who used which bytes of it, and when."""

    def __init__(self, host: torch.Tensor, index: int) -> None:
        storage = host.untyped_storage()
        self.nbytes = -(-storage.nbytes() // BLOCK) * BLOCK
        if live[index] + self.nbytes > capacity:
            raise torch.OutOfMemoryError(f"NPU out of memory: {live[index]} bytes of {capacity}, and {self.nbytes}")
        self.storage = storage  # keeps the address from being used again
        self.index = index
        self.stream = current_stream(index)
        # (stream, first byte, end, written) -> the stream's time. First comes the stream that it was allocated in: the
        # allocator may hand out what that stream has yet to stop using.
        time = self.stream.clock.get(self.stream.number, 0)
        self.uses: dict[tuple[int, int, int, bool], int] = {(self.stream.number, 0, storage.nbytes(), True): time}
        live[index] += self.nbytes
        counts.peak[index] = max(counts.peak[index], live[index])

    def touch(self, host: torch.Tensor, stream: Stream, write: bool, what: str) -> None:
        """A stream's newest piece of work reads or writes a tensor's bytes. Raises Hazard."""
        first = int(host.storage_offset()) * host.itemsize
        span = sum((size - 1) * step for size, step in zip(tuple(host.shape), host.stride(), strict=True))
        end = first + (int(span) + 1) * host.itemsize
        self._forget_known()
        for (number, start, stop, written), time in self.uses.items():
            if start < end and first < stop and (write or written) and time > stream.clock.get(number, 0):
                raise Hazard(
                    f"{what}: stream {stream.number} {'writes' if write else 'reads'} bytes [{first}, {end}) that"
                    f" stream {number} {'writes' if written else 'reads'}, and has not waited for it"
                )
        self.uses[stream.number, first, end, write] = stream.clock[stream.number]

    def _forget_known(self) -> None:
        self.uses = {use: time for use, time in self.uses.items() if time > _host_clock.get(use[0], 0)}

    def __del__(self) -> None:
        with _lock:
            if not hasattr(self, "uses"):
                return
            live[self.index] -= self.nbytes
            self._forget_known()
            late = {use[0] for use, time in self.uses.items() if time > self.stream.clock.get(use[0], 0)}
            if late:
                counts.hazards.append(f"{self.nbytes} bytes freed while streams {sorted(late)} may still use them")


class NPUTensor(torch.Tensor):
    """A tensor that says it is on a card, and holds a CPU tensor."""

    host: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, host: torch.Tensor, memory: Memory) -> NPUTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=torch.device("npu", memory.index),
        )  # fmt: skip
        made.host, made.memory = host, memory
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with _lock:
            return _dispatch(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """The address, which tells whether two tensors share memory."""
        return self.host.data_ptr()

    def tolist(self) -> Any:
        """The values: waits for them, as on any device."""
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.host!r} on npu:{self.memory.index}"


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """Apply to what lists, tuples and dicts hold. (torch's pytrees take longer than the arithmetic.)"""
    if isinstance(value, (list, tuple)):
        return type(value)([_each(change, item) for item in value])
    return {name: _each(change, item) for name, item in value.items()} if isinstance(value, dict) else change(value)


def _tensors(value: Any) -> list[Any]:
    found: list[Any] = []
    _each(found.append, value)
    return [item for item in found if isinstance(item, torch.Tensor)]


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = _tensors((args, kwargs))
    if func is aten.copy_.default:
        return _copy(args[0], args[1], bool(args[2]) if len(args) > 2 else kwargs.get("non_blocking", False))
    if func is aten._to_copy.default:
        kwargs = dict(kwargs)
        non_blocking = kwargs.pop("non_blocking", False)
        target = torch.device(kwargs.pop("device", None) or tensors[0].device)
        if kwargs.get("dtype") == torch.float64 and target.type == "npu":
            kwargs["dtype"] = torch.float32
            counts.double_casts += 1
        if target.type == "npu" and _index(target) != tensors[0].memory.index:
            raise NotImplementedError(f"{func}: from {tensors[0].device} to {target}")
        if target.type == "cpu":
            there = _compute(func, args, kwargs, tensors) if "dtype" in kwargs else tensors[0]
            return _copy(torch.empty(there.shape, dtype=there.dtype), there, non_blocking)
    for tensor in tensors:
        if not isinstance(tensor, NPUTensor) or tensor.memory.index != tensors[0].device.index:
            raise RuntimeError(f"{func}: its tensors are on {', '.join(str(each.device) for each in tensors)}")
    result = _compute(func, args, kwargs, tensors)
    if func is aten._local_scalar_dense.default:
        current_stream(tensors[0].device).synchronize()
    return result


def _copy(into: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    """Queue a copy between host and device; one on the device is an operation like any other."""
    if isinstance(into, NPUTensor) and isinstance(source, NPUTensor):
        return _compute(aten.copy_.default, (into, source), {}, [into, source])
    there, here, inward = (into, source, True) if isinstance(into, NPUTensor) else (source, into, False)
    assert isinstance(there, NPUTensor)
    working = current_stream(there.device)
    working.advance()
    there.memory.touch(there.host, working, inward, "copy")
    size = there.numel() * there.itemsize
    if inward:
        counts.to_device_copies += 1
        counts.to_device_bytes += size
        working.put(lambda: there.host.copy_(here))
    else:
        counts.to_host_copies += 1
        counts.to_host_bytes += size
        here.reshape(-1).view(torch.uint8).fill_(GARBAGE)  # from now on it may change at any moment
        working.put(lambda: here.copy_(there.host))
    if not non_blocking:
        working.synchronize()
    elif not here.is_pinned():
        counts.pageable_copies += 1
    return into


def _compute(func: Any, args: Any, kwargs: Any, tensors: list[NPUTensor]) -> Any:
    """Run an operation on the CPU tensors, now: only copies are late. A view touches nothing."""
    schema = func._schema
    if not any(value.alias_info and not value.alias_info.is_write for value in schema.returns):
        written = _written(schema, args, kwargs)
        working = current_stream(tensors[0].device)
        working.advance()
        working.run()
        for tensor in tensors:
            tensor.memory.touch(tensor.host, working, id(tensor) in written, str(func))
    result = func(*_each(_unwrapped, args), **_each(_unwrapped, kwargs))
    if schema.name in ("aten::empty_like", "aten::new_empty", "aten::new_empty_strided"):
        _soil(result)
    for tensor in tensors:
        assert tensor.shape == tensor.host.shape, f"{func} changed a shape in place, which the stand-in cannot follow"
    return _each(lambda value: _wrapped(value, tensors), result)


def _written(schema: Any, args: Any, kwargs: Any) -> set[int]:
    """The ids of the tensors that an operation writes to."""
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    changed = [named.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    return {id(tensor) for tensor in _tensors(changed)}


def _unwrapped(value: Any) -> Any:
    if isinstance(value, NPUTensor):
        return value.host
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "npu" else value


def _wrapped(value: Any, tensors: list[NPUTensor]) -> Any:
    """An operation's result: an argument itself, a view of one, or something new."""
    if not isinstance(value, torch.Tensor):
        return value
    for tensor in tensors:
        if value is tensor.host:
            return tensor
        if value.untyped_storage().data_ptr() == tensor.memory.storage.data_ptr() != 0:
            return NPUTensor(value, tensor.memory)
    return NPUTensor(value, Memory(value, tensors[0].memory.index))


def _soil(host: torch.Tensor) -> torch.Tensor:
    """Fill uninitialised memory with what nobody mistakes for data."""
    _host_empty(0, dtype=torch.uint8).set_(host.untyped_storage()).fill_(GARBAGE)
    return host


def _place(host: torch.Tensor, device: Any) -> NPUTensor:
    """A new tensor on a card."""
    with _lock:
        return NPUTensor(host, Memory(host, _index(device)))


def _empty(size: Any, *, memory_format: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> NPUTensor:
    made = _host_empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
    return _place(_soil(made), device)


def _empty_strided(size: Any, stride: Any, *, device: Any = None, dtype: Any = None, **_: Any) -> NPUTensor:
    return _place(_soil(torch.empty_strided(size, stride, dtype=dtype)), device)


def _arange(*bounds: Any, device: Any = None, dtype: Any = None, **_: Any) -> NPUTensor:
    return _place(torch.arange(*bounds, dtype=dtype), device)


def _pinnable_empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
    """torch.empty. A backend in Python has no way to give torch its allocator for pinned memory."""
    made = _host_empty(*size, **options)
    if pin_memory:
        _pinned.append(made)
        counts.pinned_bytes += made.numel() * made.itemsize
    return made


def _is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    address = tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else 0
    return any(address == pinned.data_ptr() for pinned in _pinned)


def install() -> None:
    """Become `torch.npu`. Cannot be undone."""
    _setup_privateuseone_for_python_backend(rename="npu", backend_module=sys.modules[__name__])
    for index in range(CARDS):
        Stream(index)
    torch.library.impl("aten::empty.memory_format", "PrivateUse1")(_empty)
    torch.library.impl("aten::empty_strided", "PrivateUse1")(_empty_strided)
    for overload in ("arange", "arange.start", "arange.start_step"):  # torch's own would resize a tensor in place
        torch.library.impl(f"aten::{overload}", "PrivateUse1")(_arange)
    torch.library.impl("aten::_copy_from", "PrivateUse1")(lambda source, into, late=False: _copy(into, source, late))
    torch.empty = _pinnable_empty  # type: ignore[assignment]
    torch.Tensor.is_pinned = _is_pinned  # type: ignore[method-assign, assignment]
