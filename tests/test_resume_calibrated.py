from __future__ import annotations
from collections import Counter
from pathlib import Path
import pytest
from calib_kit import Kit, kit, stop, replays, watched, sweep, least_memory  # noqa
from faults import Fault, HALVED
from resume_kit import was_killed, report, finish

def test_probe(kit: Kit, tmp_path: Path) -> None:
    import time
    for m in ("t2v","vace","ti2v","pair"):
        for r in ("smooth","smooth_all","static","gptq"):
            t=time.time()
            w = kit.work(m, r, "--read_ahead", 0)
            print(m, r, time.time()-t, len(w.calls), replays(w.calls), Counter(c.split()[0] for c in w.calls))
    w = kit.work("t2v","static","--read_ahead",0)
    print("\n".join(w.calls))
    e = kit.runs(w.argv(tmp_path/"out"))
    print(watched(e))
    print(least_memory(kit, w, tmp_path/"x"))
