"""How a calibrated run comes by its inputs: the user's set, or one that it makes first; and where it goes on.

What replays blocks is imported only then: it needs diffusers, which a data-free run has no use for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from streamq.calibration.store import CalibSet, check_content, open_set
from streamq.device import Device
from streamq.errors import UsageError
from streamq.journal import CACHE, Journal
from streamq.plan import ExpertPlan, Plan, Unit
from streamq.stages import Watcher

if TYPE_CHECKING:
    from streamq.calibration.replay import Replay

# In a run's own folder nothing has a name that a runtime would load.
DOCUMENT, SUFFIX = "calib.cache", ".cache"


@contextmanager
def open_replay(
    plan: Plan, part: ExpertPlan, todo: list[Unit], device: Device, journal: Journal, watcher: Watcher
) -> Iterator[Replay | None]:
    """One expert's replay, at the block where an earlier run stopped; None for what needs no data.

    Raises UsageError for a set that is not what it says, and for a cache that does not hold what was committed.
    """
    if plan.calibration is None or not any(unit.replayed for unit in todo):
        yield None
        return
    from streamq.calibration.cache import Cache
    from streamq.calibration.make import all_threads
    from streamq.calibration.replay import TORCH_DTYPES, Replay

    folder = plan.options.save_path / CACHE
    folder.mkdir(exist_ok=True)
    with all_threads():
        found = _inputs(plan, device, journal, watcher)
        inputs, dtype = found.experts[part.expert.name], TORCH_DTYPES[plan.calibration.dtype]
        check_content(found, part.expert.name)
        with closing(Cache(folder, inputs, dtype, device, in_memory=plan.calibration.in_memory)) as cache:
            mine = {unit.key for unit in part.units}
            last = [commit for commit in journal.commits if commit.unit in mine]
            cache.restore(last[-1].streams if last else {})
            with closing(Replay(part.expert, plan.calibration, inputs, cache, device)) as replay:
                yield replay


def _inputs(plan: Plan, device: Device, journal: Journal, watcher: Watcher) -> CalibSet:
    assert plan.calibration is not None
    if plan.calibration.given is not None:
        return plan.calibration.given
    folder = plan.options.save_path / CACHE
    if (folder / DOCUMENT).is_file():
        return open_set(folder, DOCUMENT)
    if journal.commits:
        raise UsageError(f"{folder}: the calibration inputs of the unfinished run are gone; start with --no_resume")
    from streamq.calibration.make import make_set

    experts = [part.expert for part in plan.experts]
    return make_set(
        folder, plan.calibration.settings, experts, plan.source_path, device,
        document=DOCUMENT, suffix=SUFFIX, about=watcher.said,
    )  # fmt: skip
