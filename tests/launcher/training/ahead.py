"""`ditmoe` with a host that runs ahead, or not, and a gradient that is infinite in one step of the run.

`python ahead.py AHEAD STEP LAG.txt train …`: AHEAD is yes or no, STEP a number or none. The last rank's gradient
is the infinite one. LAG.txt gets the most steps that were under way when another one was started.
"""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ditmoe.launcher.cli import main
from ditmoe.parallel.engine import training_engine
from ditmoe.parallel.engine.training_engine import StepUnderWay, TrainingEngine

AHEAD, STEP, LAG = sys.argv[1] == "yes", sys.argv[2], Path(sys.argv[3])
under_way: set[int] = set()
most = 0
start, finish = TrainingEngine.start_step, TrainingEngine.finish


def started(engine: TrainingEngine, *arguments: Any) -> StepUnderWay:
    """As `start_step`, counted; with an infinite gradient where it is that step's turn."""
    global most
    most = max(most, len(under_way))
    if dist.get_rank() == 0:
        LAG.write_text(str(most))
    number = engine.step + 1
    broken = str(number) == STEP and dist.get_rank() == dist.get_world_size() - 1
    last = list(engine._network.parameters())[-1]
    handles = [last.register_hook(lambda gradient: gradient / 0)] if broken else []  # type: ignore[no-untyped-call]
    under_way.add(number)  # the first ones are looked at before they are given back
    found = start(engine, *arguments)
    for handle in handles:
        handle.remove()
    return found


def finished(engine: TrainingEngine, number: int, totals: Any) -> Any:
    """As `finish`, counted."""
    under_way.discard(number)
    return finish(engine, number, totals)


training_engine.runs_ahead = lambda device: AHEAD
TrainingEngine.start_step = started  # type: ignore[method-assign]
TrainingEngine.finish = finished  # type: ignore[method-assign]
sys.argv = ["ditmoe", *sys.argv[4:]]
main()
