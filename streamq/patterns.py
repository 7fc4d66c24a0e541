"""Layer-name patterns of recipes: msModelSlim's rule, which is `wcmatch.fnmatch` with braces."""

from __future__ import annotations

import re
from functools import lru_cache

import bracex
from wcmatch import fnmatch

MAX_EXPANSIONS = 1000  # of the braces in one pattern


def matches(name: str, pattern: str) -> bool:
    """msModelSlim's rule: equal, or `wcmatch.fnmatch` with braces. `*` crosses dots, case matters, whole names only."""
    return name == pattern or any(regex.fullmatch(name) for regex in regexes(pattern))


@lru_cache(maxsize=1000)
def regexes(pattern: str) -> list[re.Pattern[str]]:
    """A pattern's braces expanded, each as a regular expression. Raises bracex.ExpansionLimitException."""
    expanded = bracex.expand(pattern, keep_escapes=True, limit=MAX_EXPANSIONS)
    return [re.compile(text) for text in fnmatch.translate(expanded, flags=fnmatch.CASE)[0]]
