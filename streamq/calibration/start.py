"""How a calibrated run comes by its inputs: the user's set, or one that it makes first; and where it goes on.

What replays blocks is imported only then: it needs diffusers, which a data-free run has no use for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from streamq.calibration.store import CalibSet, check_content, open_set
from streamq.device import Device
from streamq.errors import UsageError
from streamq.journal import CACHE, Journal, source_times
from streamq.plan import ExpertPlan, Plan, Unit
from streamq.ranks import Ranks
from streamq.savers.shard import disk_errors, sync_folder, write_whole
from streamq.stages import Watcher

if TYPE_CHECKING:
    from streamq.calibration.replay import Replay

# In a run's own folder nothing has a name that a runtime would load.
DOCUMENT, SUFFIX, MADE_BY = "calib.cache", ".cache", "made_by.cache"


@contextmanager
def open_replay(
    plan: Plan, part: ExpertPlan, todo: list[Unit], device: Device, journal: Journal, watcher: Watcher, ranks: Ranks
) -> Iterator[Replay | None]:  # fmt: skip
    """One expert's replay, at the block where an earlier run stopped; None for what needs no data.

    Raises UsageError for a set that is not what it says, and for a cache that does not hold what was committed.
    """
    if plan.calibration is None or not any(unit.replayed for unit in todo):
        yield None
        return
    from streamq.calibration.cache import Cache
    from streamq.calibration.make import all_threads
    from streamq.calibration.replay import Replay
    from streamq.dtypes import TORCH_DTYPES

    folder = plan.options.save_path / CACHE
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
    with all_threads():
        opened: list[CalibSet] = []
        ranks.by_first(lambda: opened.append(_inputs(plan, device, journal, watcher)))
        found = opened[0] if opened else _inputs(plan, device, journal, watcher)  # there by now
        inputs, dtype = found.experts[part.expert.name], TORCH_DTYPES[plan.calibration.dtype]
        with closing(Cache(folder, inputs, dtype, device, in_memory=plan.calibration.in_memory)) as cache:
            mine = {unit.key for unit in part.units}
            last = [commit for commit in journal.commits if commit.unit in mine]
            state = last[-1].streams if last else {}
            ranks.by_first(partial(cache.restore, state))
            cache.adopt(state)
            with closing(Replay(part.expert, plan.calibration, inputs, cache, device, ranks)) as replay:
                replay.synthetic = list(found.document.get("synthetic", []))
                yield replay


def check_inputs(plan: Plan, watcher: Watcher) -> None:
    """Raise UsageError if the user's set is not what its document says; before anything is written.

    Warns of a set that was made with other weights: it is what another model's blocks get.
    """
    if plan.calibration is None or plan.calibration.given is None:
        return
    from streamq.calibration.make import fingerprint

    given = plan.calibration.given
    for name in given.experts:
        check_content(given, name)
    made_with = given.document.get("model")
    if made_with != {part.expert.name: fingerprint(part.expert.model) for part in plan.experts}:
        merged = " with its LoRAs" if plan.loras else ""
        watcher.said(f"warning: --calib {given.path}: made with other weights than {plan.source_path}'s{merged}")


def _inputs(plan: Plan, device: Device, journal: Journal, watcher: Watcher) -> CalibSet:
    """The user's set, the one that this run has made already, or a new one."""
    assert plan.calibration is not None
    if plan.calibration.given is not None:
        return plan.calibration.given
    folder, identity = plan.options.save_path / CACHE, _identity(plan)
    try:
        # An earlier run's, on other weights or with other settings, may have been left by a start that was cut off.
        if not (folder / MADE_BY).is_file() or (folder / MADE_BY).read_text() != identity:
            raise UsageError(f"{folder}: the calibration inputs of the unfinished run are gone")
        found = open_set(folder, DOCUMENT)
        for name in found.experts:
            check_content(found, name)
        return found
    except UsageError as error:
        if journal.commits:
            raise UsageError(f"{error}: cannot be resumed; start again with --no_resume") from error
    from streamq.calibration.make import make_set

    with disk_errors(folder):
        (folder / MADE_BY).unlink(missing_ok=True)
    experts = [part.expert for part in plan.experts]
    found = make_set(
        folder, plan.calibration.settings, experts, plan.source_path, device,
        document=DOCUMENT, suffix=SUFFIX, about=watcher.said,
    )  # fmt: skip
    write_whole(folder / MADE_BY, identity.encode(), 0o600)
    return found


def _identity(plan: Plan) -> str:
    return hashlib.sha256(json.dumps([plan.hash, source_times(plan)]).encode()).hexdigest()
