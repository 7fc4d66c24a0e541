"""The two ways in which a run can end badly, and the wording of their one line.

A message says what, where, both numbers where there are two, and the next step. `cli.main` prints it after
`error: ` and exits with the class's status.
"""

DOWNLOAD = "download it again"


class StreamqError(Exception):
    """Base of every error that is meant for the user's eyes."""

    status = 1


class UsageError(StreamqError):
    """Options, a recipe or an input that cannot be worked with: found before anything is written. Exit status 2."""

    status = 2


class DamagedError(UsageError):
    """A file that is cut short, or not of its format. `advice`: what gets its reader a sound one."""

    def __init__(self, what: str, advice: str = DOWNLOAD) -> None:
        super().__init__(what, advice)
        self.what, self.advice = what, advice

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


class QuantizedError(UsageError):
    """A checkpoint where a float one is needed that is quantized already."""


class RunError(StreamqError):
    """The work itself failed: a bad weight, a full disk, a source that changed. Exit status 1."""

    status = 1


def out_of_memory(error: BaseException, advice: str) -> RunError:
    """What to raise instead of an allocator's error; `advice`: what is kept, and the next step."""
    return RunError(f"out of memory ({' '.join(str(error).split())[:200]}); {advice}")


def nearest(word: str, known: "list[str] | tuple[str, ...] | set[str] | dict[str, object]", count: int = 3) -> str:
    """`"; nearest: a, b"` for an unknown `word`, or an empty string when nothing known resembles it."""
    import difflib

    close = difflib.get_close_matches(word, sorted(known), n=count, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def format_bytes(count: float) -> str:
    """`5676070424` -> `5.68 GB`: powers of 1000, three digits."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_duration(seconds: float) -> str:
    """`8040` -> `2 h 14 min`: two digits' worth, for an estimate."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
