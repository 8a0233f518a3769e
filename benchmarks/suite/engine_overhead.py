"""What DeepSpeed's engine costs: our step through it against the same step without it."""

import gc
from collections.abc import Iterator

from benchmarks.suite.engines import BareStep, make_engine
from benchmarks.suite.figure import Figure, duration, in_turns
from benchmarks.suite.networks import batch_of
from benchmarks.suite.settings import Settings
from ditmoe.launcher.local.memory import keep_freed_memory
from ditmoe.parallel import processes


def measure(settings: Settings) -> Iterator[Figure]:
    """In fp32 and in bf16."""
    processes.join(settings.device)
    if settings.device.type == "cpu":
        keep_freed_memory()  # as training has it; the step without DeepSpeed gains by it too
    batch = batch_of(settings)
    for precision in ("fp32", "bf16"):
        engine, bare = make_engine(settings, precision), BareStep(settings, precision)

        def ours(engine=engine) -> None:  # type: ignore[no-untyped-def]
            engine.train_step([batch], lr=1e-5, stop_requested=False)

        contenders = {"bare": lambda bare=bare: bare(batch), "ours": ours}
        seconds = in_turns(contenders, settings.rounds_of(5), settings.device, warm_up=3)
        yield duration(
            f"step through DeepSpeed, {settings.model_name}, {precision}",
            seconds["ours"],
            seconds["bare"],
            against="the same step without it",
        )
        engine.close()
        del engine, bare, contenders, ours
        gc.collect()
    processes.leave()
