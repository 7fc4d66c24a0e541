"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from streamq.errors import UsageError


def require(module: str, why: str, extra: str = "calib") -> Any:
    """Import an optional package. Raises UsageError that says how to get it. `extra`: streamq's, that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f'{why} needs {module.split(".")[0]} ({error}); pip install "streamq[{extra}]"') from error
