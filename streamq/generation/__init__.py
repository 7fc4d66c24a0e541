"""Videos of a float or a quantized model, through diffusers' Wan pipelines, the transformer's blocks streamed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from streamq.generation.settings import GenerateSettings

if TYPE_CHECKING:
    from streamq.generation.prepare import Job

__all__ = ["GenerateSettings", "generate", "run_job"]


def generate(settings: GenerateSettings, about: Callable[[str], None]) -> list[Path]:
    """Make every video that is not there yet; returns all their sidecars, by prompt, then by seed.

    `about` is told of each step, and of what a user should know. Raises UsageError, before anything is written, and
    RunError.
    """
    from streamq.generation.prepare import prepare

    return run_job(prepare(settings), about)


def run_job(job: Job, about: Callable[[str], None]) -> list[Path]:
    """`generate` of what is prepared: the folder is made and locked before anything is loaded, torch included."""
    from streamq.calibration.make import at_work

    idle = all(video.done for video in job.videos)
    with nullcontext() if idle else at_work(job.settings.save_path.expanduser()):
        from streamq.generation.make import make_videos

        return make_videos(job, about)
