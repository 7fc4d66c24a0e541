"""``torch.npu`` of the stand-in: no device is there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

config = SimpleNamespace(allow_internal_format=False)


def is_available() -> bool:
    """Tell that no NPU can be used."""
    return False


def device_count() -> int:
    """Tell the number of NPUs: none."""
    return 0


def current_device() -> int:
    """Tell the index that callers use for the default device."""
    return 0


def get_device_name(device: Any = None) -> str:
    """Tell a name that belongs to no real product."""
    return "cpu-stand-in"


def empty_cache() -> None:
    """Do nothing: there is no device memory."""


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """Give any other public name as a function that raises when it is called."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"torch.npu stand-in: {name} is not implemented")

    return missing
