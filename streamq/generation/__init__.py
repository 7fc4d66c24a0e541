"""Videos of a float or a quantized model, through diffusers' Wan pipelines, the transformer's blocks streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from streamq.generation.settings import GenerateSettings

__all__ = ["GenerateSettings", "generate"]


def generate(settings: GenerateSettings, about: Callable[[str], None]) -> list[Path]:
    """Make every video that is not there yet; returns all their sidecars, by prompt, then by seed.

    `about` is told of each step, and of what a user should know. Raises UsageError, before anything is written, and
    RunError.
    """
    from streamq.generation.make import make_videos
    from streamq.generation.prepare import prepare

    return make_videos(prepare(settings), about)
