"""Blocks by compiled code against the same blocks without a compiler: a training step, drawing, and what compiling
costs. One network does both in turns."""

import gc
from collections.abc import Iterator

import torch

from benchmarks.suite.engines import make_engine
from benchmarks.suite.figure import Figure, duration, in_turns, rate
from benchmarks.suite.machine import DTYPES
from benchmarks.suite.networks import batch_of, our_network
from benchmarks.suite.sampling import SCALE, STEPS
from benchmarks.suite.settings import Settings
from ditmoe.launcher.local.memory import keep_freed_memory
from ditmoe.model.compiling.blocks import CompiledBlocks, compiled_blocks
from ditmoe.model.config import ObjectiveConfig
from ditmoe.model.dit import DiT, call_block
from ditmoe.parallel import processes
from ditmoe.sampling.drawing.generate import draw
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.network.denoiser import make_denoiser
from ditmoe.sampling.settings.config import SamplerConfig

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
    config, objective = settings.model, ObjectiveConfig()
    assert config.channels and config.image_size and config.num_classes
    sampler = SamplerConfig(sampler="euler", steps=STEPS, cfg_scale=SCALE).resolved(objective)
    label_B = (torch.arange(settings.batch) % config.num_classes).to(settings.device)
    shape = (config.channels, config.image_size, config.image_size)
    noise = ImageNoise(0, range(settings.batch), shape, settings.device)
    start_BCHW, blocks = noise.initial(), compiled_blocks(with_gradients=False)
    for precision, dtype in DTYPES.items():
        network = our_network(config).to(settings.device, dtype).eval()

        def ask(compute: object, network: DiT = network) -> None:
            network.compute_block = compute  # type: ignore[assignment]
            denoiser = make_denoiser(network, config, objective, sampler)
            with torch.inference_mode():
                draw(denoiser, label_B, start_BCHW, noise, sampler)

        with torch.inference_mode():
            yield _compiling(f"drawing, {precision}", blocks, network, 2 * settings.batch)
        contenders = {"without": lambda ask=ask: ask(call_block), "ours": lambda ask=ask: ask(blocks)}
        seconds = in_turns(contenders, settings.rounds_of(9), settings.device)
        name = f"guided Euler steps {settings.model_name}, batch {settings.batch}, {precision}, compiled"
        passes = settings.batch * STEPS
        yield rate(name, "images/s", passes, seconds["ours"], seconds["without"], against=AGAINST)


def _compiling(name: str, blocks: CompiledBlocks, network: DiT, images: int) -> Figure:
    """How long the code takes to make, once."""
    return duration(f"compiling a block, {name}", [blocks.prepare(network, images)])
