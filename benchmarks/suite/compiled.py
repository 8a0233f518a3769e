"""Blocks by compiled code against the same blocks without a compiler: a training step, drawing, and what compiling
costs. One network does both in turns."""

import gc
from collections.abc import Iterator

import torch

from benchmarks.suite.engines import make_engine
from benchmarks.suite.figure import Figure, duration, in_turns, rate
from benchmarks.suite.machine import DTYPES
from benchmarks.suite.networks import Drawing, batch_of, our_network
from benchmarks.suite.settings import Settings
from ditmoe.launcher.local.memory import keep_freed_memory
from ditmoe.model.compiling.blocks import CompiledBlocks, compiled_blocks
from ditmoe.model.dit import DiT, call_block
from ditmoe.parallel import processes

AGAINST = "the same without a compiler"


def measure(settings: Settings) -> Iterator[Figure]:
    """In fp32 and in bf16."""
    processes.join(settings.device)
    yield from _training(settings)
    processes.leave()
    yield from _sampling(settings)


def _training(settings: Settings) -> Iterator[Figure]:
    if settings.device.type == "cpu":
        keep_freed_memory()
    batch, blocks = batch_of(settings), compiled_blocks(with_gradients=True)
    for precision in DTYPES:
        engine = make_engine(settings, precision)
        network = engine._network

        def without(engine=engine, network=network) -> None:  # type: ignore[no-untyped-def]
            network.compute_block = call_block
            engine.train_step([batch], lr=1e-5, stop_requested=False)

        def ours(engine=engine, network=network) -> None:  # type: ignore[no-untyped-def]
            network.compute_block = blocks
            engine.train_step([batch], lr=1e-5, stop_requested=False)

        yield _compiling(f"training, {precision}", blocks, network, settings.batch)
        contenders = {"without": without, "ours": ours}
        seconds = in_turns(contenders, settings.rounds_of(9), settings.device, warm_up=3)
        name = f"training step {settings.model_name}, batch {settings.batch}, {precision}, compiled"
        yield rate(name, "images/s", settings.batch, seconds["ours"], seconds["without"], against=AGAINST)
        engine.close()
        del engine, network, contenders, without, ours
        gc.collect()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


def _sampling(settings: Settings) -> Iterator[Figure]:
    drawing, blocks = Drawing(settings), compiled_blocks(with_gradients=False)
    for precision, dtype in DTYPES.items():
        network = our_network(settings.model).to(settings.device, dtype).eval()

        def ask(compute: object, network: DiT = network) -> None:
            network.compute_block = compute  # type: ignore[assignment]
            drawing(network)

        with torch.inference_mode():
            yield _compiling(f"drawing, {precision}", blocks, network, 2 * settings.batch)
        contenders = {"without": lambda ask=ask: ask(call_block), "ours": lambda ask=ask: ask(blocks)}
        seconds = in_turns(contenders, settings.rounds_of(9), settings.device)
        name = f"guided Euler steps {settings.model_name}, batch {settings.batch}, {precision}, compiled"
        yield rate(name, "images/s", drawing.passes, seconds["ours"], seconds["without"], against=AGAINST)


def _compiling(name: str, blocks: CompiledBlocks, network: DiT, images: int) -> Figure:
    """How long the code takes to make, once."""
    return duration(f"compiling a block, {name}", [blocks.prepare(network, images)])
