"""A whole training step (forward, backward, optimiser, EMA), as runs take it, against the plain baseline's."""

import gc
from collections.abc import Iterator

import torch

from benchmarks.plain import PlainTraining
from benchmarks.suite.engines import make_engine
from benchmarks.suite.figure import Figure, in_turns, rate
from benchmarks.suite.networks import batch_of, plain_network
from benchmarks.suite.settings import Settings
from ditmoe.launcher.local.memory import keep_freed_memory
from ditmoe.model.count import TRAINING_PASSES, count
from ditmoe.parallel import processes

BYTES_OF_STEP = 36
"""Moved for each parameter by AdamW (weight, gradient and both moments read, all but the gradient written) and the
EMA (read and written), each once."""


def measure(settings: Settings) -> Iterator[Figure]:
    """In fp32 and in bf16."""
    processes.join(settings.device)
    if settings.device.type == "cpu":
        keep_freed_memory()  # as training has it; the baseline gains by it too
    config, batch = settings.model, batch_of(settings)
    counted = count(config)
    flops = TRAINING_PASSES * counted.flops * settings.batch
    for precision in ("fp32", "bf16"):
        plain = PlainTraining(plain_network(config).to(settings.device))
        engine = make_engine(settings, precision)

        def baseline(plain: PlainTraining = plain) -> None:
            plain.step(batch.x_BCHW, batch.label_B, batch.draws.noise_BCHW, batch.draws.timestep_B)

        def ours(engine=engine) -> None:  # type: ignore[no-untyped-def]
            engine.train_step([batch], lr=1e-5, stop_requested=False)

        # The first steps check DeepSpeed's gradients.
        seconds = in_turns({"plain": baseline, "ours": ours}, settings.rounds_of(5), settings.device, warm_up=3)
        limit = settings.limits.seconds(precision, flops, BYTES_OF_STEP * counted.total)
        name = f"training step {settings.model_name}, batch {settings.batch}, {precision}"
        yield rate(
            name, "images/s", settings.batch, seconds["ours"], seconds["plain"], limit=limit, against="plain, fp32"
        )
        engine.close()
        del plain, engine, baseline, ours
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    processes.leave()
