"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from streamq.errors import UsageError


def check_there(modules: Mapping[str, str], extra: str) -> None:
    """Raise `require`'s UsageError for what is not installed, without importing what is. modules: name -> why."""
    for module, why in modules.items():
        if importlib.util.find_spec(module) is None:
            require(module, why, extra)


def require(module: str, why: str, extra: str = "calib") -> Any:
    """Import an optional package. Raises UsageError that says how to get it. `extra`: streamq's, that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f'{why} needs {module.split(".")[0]} ({error}); pip install "streamq[{extra}]"') from error
