"""Images from a loaded model: image i is a function of (seed, i) and its label alone, or one of a chain.

All its noise comes from streams keyed by (seed, image number, step), so that neither the batch size nor who draws
the other images has a say in it beyond rounding. Every batch has the same shape (the last one is filled up),
because a matrix product of another shape may round otherwise. A CPU draws a batch in shards of one thread each,
whose size is a matter of batch and network alone: so images do not tell how many threads there were, and threads
do not wait for one another within layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ditmoe.model.config import ModelConfig, ObjectiveConfig
from ditmoe.model.errors import UserError
from ditmoe.model.threads import map_in_threads, threads_of
from ditmoe.parallel.expert_group import NetworkOfGroup
from ditmoe.sampling.chains.images import ChainImages, StateFile, draw_chain_images, find_posterior
from ditmoe.sampling.chains.state import chains_of_seeds
from ditmoe.sampling.drawing.frames import Film, PacedFilm, watched
from ditmoe.sampling.drawing.noise import ImageNoise, noise_threads
from ditmoe.sampling.drawing.pixels import as_bytes, as_pictures, bytes_on_cpu, developed, pixels_of
from ditmoe.sampling.integrators.flow import Drawn, NoiseSource
from ditmoe.sampling.integrators.samplers import integrate, pace_of, planned_nfe, planned_passes, start_of
from ditmoe.sampling.network.compiled import with_compiled_blocks
from ditmoe.sampling.network.denoiser import Denoiser, make_denoiser
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.network.pace import Passes
from ditmoe.sampling.noise_level.levels import NoisePosterior
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import NOT_FINITE

SHARD_TOKENS: Final = 1024
"""Tokens, about, of the images that a thread of a CPU draws at once."""


class GeneratedFloats(NamedTuple):
    """Images before rounding."""

    image_NCHW: Tensor
    """float32 on the CPU, about −1…1, not clipped."""
    nfe_N: Tensor
    """Evaluations of the denoiser that each image took, int64."""


class Generated(NamedTuple):
    """Images as bytes."""

    image_NHWC: Tensor
    """uint8 on the CPU: −1…1 clipped and rounded to 0…255."""
    nfe_N: Tensor
    """Evaluations of the denoiser that each image took, int64."""
    passes_per_evaluation: float
    """Of an image through the network, on average: two under guidance, none where its blocks are foretold."""
    chains: ChainImages | None = None
    """Of chains also the way to each image."""
    finite_N: Tensor | None = None
    """False where an image had NaN or infinity in it, and is plain grey instead; None: all are finite."""
    frames_NFHWC: Tensor | None = None
    """uint8 on the CPU: what the network took each image for on the way, the last frame the image; None: not
    asked for."""
    cached_per_evaluation: float = 0.0
    """Passes of an image, on average, whose blocks were foretold."""

    @property
    def nfe(self) -> float:
        """Evaluations of the denoiser per image, on average where images differ."""
        return self.nfe_N.double().mean().item()

    @property
    def network_evaluations(self) -> float:
        """Passes through the network per image: twice the NFE under guidance."""
        return self.nfe * self.passes_per_evaluation

    @property
    def cached_evaluations(self) -> float:
        """Passes per image beside those whose blocks were foretold."""
        return self.nfe * self.cached_per_evaluation


def default_labels(image_numbers: Sequence[int], num_classes: int, images_per_unit: int = 1) -> Tensor:
    """The classes in turn: image i, or all samples of chain i, is of class i mod `num_classes`; int64 `[N]`."""
    return torch.tensor(image_numbers, dtype=torch.int64) // images_per_unit % num_classes


def generate(
    model: LoadedModel,
    labels: Tensor | None,
    image_numbers: Sequence[int],
    config: SamplerConfig,
    batch: int,
    progress: Callable[[int], None] | None = None,
    *,
    posterior: NoisePosterior | None = None,
    state_file: StateFile | None = None,
    seeds: Sequence[int] | None = None,
    frames: int | None = None,
    on_evaluation: Callable[[int], None] | None = None,
) -> Generated:
    """Draw images as bytes, independent ones or those of chains.

    Args:
        labels: class of each image, int64 `[N]`, one for all images of a chain; None: `default_labels`.
        image_numbers: the number i of each image.
        config: the sampler; its nulls are filled in for the model's objective.
        batch: images, or chains, drawn at once. Another size changes an image by rounding only.
        progress: called after each batch with the images drawn so far.
        posterior: of chains; None: the noise-level classifier of the model's run.
        state_file: where unfinished chains are kept; None: nowhere.
        seeds: of each image one of its own; None: all have that of the configuration. Images of chains are of the
            chain of their seed, number and class.
        frames: so many of the steps, or all where they are fewer, are kept as the frames of an animation; None: no
            frames. Images of `rk45` and of chains, whose steps are their own, have so many frames in any case.
        on_evaluation: called, by any thread, after an evaluation, with the rows that went through the network for
            it: an image counts twice under guidance. Also images that fill up a batch. Of independent images.

    Raises:
        UserError: as `generate_float`; there is no classifier for chains, or what was kept is of others.
    """
    config = config.resolved(model.objective_config)
    passes, cached = _passes_per_evaluation(config, model.objective_config)
    if not config.chains:
        channels, height, width = model.image_shape
        images = [torch.empty(0, height, width, channels, dtype=torch.uint8)]
        nfe = [torch.empty(0, dtype=torch.int64)]
        finite = [torch.empty(0, dtype=torch.bool)]
        filmed: list[Tensor] = []

        def take(pixels_BCHW: Tensor, nfe_B: Tensor, frames_BFHWC: Tensor | None) -> None:
            image_BHWC, finite_B = as_bytes(pixels_BCHW)
            images.append(image_BHWC.cpu())
            finite.append(finite_B.cpu())
            nfe.append(nfe_B)
            if frames_BFHWC is not None:
                filmed.append(frames_BFHWC)

        _draw_batches(
            *(model, labels, image_numbers, config, batch, take, progress),
            seeds=seeds,
            frames=frames,
            on_evaluation=on_evaluation,
        )
        frames_NFHWC = torch.cat(filmed) if filmed else None
        return Generated(torch.cat(images), torch.cat(nfe), passes, None, torch.cat(finite), frames_NFHWC, cached)
    labels = _checked_labels(model, labels, image_numbers, config)
    device = next(model.network.parameters()).device
    if posterior is None:
        assert model.info is not None
        posterior = find_posterior(model.info, device)
    vae = model.vae

    def to_bytes(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        image_BHWC, finite_B = as_bytes(x_BCHW if vae is None else vae.decode(x_BCHW))
        return image_BHWC.cpu(), finite_B.cpu()

    draws = None
    if seeds is not None:
        samples = config.dlg.samples_per_chain
        image_numbers, draws = chains_of_seeds(seeds, image_numbers, labels.tolist(), samples)
    film, filmed = None, []
    if frames is not None:
        units = len({number // config.dlg.samples_per_chain for number in image_numbers})
        film = PacedFilm(min(batch, units), frames, bytes_on_cpu if vae is None else Tensor.cpu)
        height, width, channels = (model.image_shape[axis] for axis in (1, 2, 0))
        filmed = [torch.zeros(len(image_numbers), frames, height, width, channels, dtype=torch.uint8)]

    def cut(image_BHWC: Tensor, chosen_R: list[int], rows_R: list[int]) -> None:
        if film is not None and frames is not None:
            filmed[0][rows_R] = developed(model, film, frames, device, image_BHWC)[chosen_R]

    rows = images_at_once(model, config, batch, image_numbers)
    with _evaluating(model, config, rows) as (denoisers, shape), torch.inference_mode(), threads_of(device):
        drawn = draw_chain_images(
            watched(denoisers(), film, None),
            posterior,
            config,
            labels.to(device),
            image_numbers,
            shape,
            to_bytes,
            batch,
            progress=progress,
            state_file=state_file,
            draws=draws,
            on_sample=None if film is None else cut,
        )
    frames_NFHWC = filmed[0] if filmed else None
    return Generated(drawn.image_NHWC, drawn.nfe_N, passes, drawn, drawn.finite_N, frames_NFHWC)


def _passes_per_evaluation(config: SamplerConfig, objective: ObjectiveConfig) -> Passes:
    if not config.paced:
        return Passes(1 if config.cfg_scale == 1 else 2, 0)
    nfe, passes = planned_nfe(config), planned_passes(config, objective)
    assert nfe and passes is not None
    return Passes(passes.full / nfe, passes.cached / nfe)


def generate_float(
    model: LoadedModel,
    labels: Tensor | None,
    image_numbers: Sequence[int],
    config: SamplerConfig,
    batch: int,
    progress: Callable[[int], None] | None = None,
) -> GeneratedFloats:
    """Draw independent images on the network's device; what a network of latents draws is decoded.

    Args:
        labels: class of each image, int64 `[N]`; None: `default_labels`.
        image_numbers: the number i of each image.
        config: the sampler; its nulls are filled in for the model's objective.
        batch: images drawn at once. Another size changes an image by rounding only.
        progress: called after each batch with the images drawn so far.

    Raises:
        UserError: a label is not a class of the model, or the sampler does not fit it.
    """
    config = config.resolved(model.objective_config)
    assert not config.chains
    images: list[Tensor] = [torch.empty(0, *model.image_shape)]
    nfe: list[Tensor] = [torch.empty(0, dtype=torch.int64)]

    def take(pixels_BCHW: Tensor, nfe_B: Tensor, _: Tensor | None) -> None:
        images.append(pixels_BCHW.float().cpu())
        nfe.append(nfe_B)

    _draw_batches(model, labels, image_numbers, config, batch, take, progress)
    return GeneratedFloats(torch.cat(images), torch.cat(nfe))


def _draw_batches(
    model: LoadedModel,
    labels: Tensor | None,
    image_numbers: Sequence[int],
    config: SamplerConfig,
    batch: int,
    take: Callable[[Tensor, Tensor, Tensor | None], None],
    progress: Callable[[int], None] | None,
    *,
    seeds: Sequence[int] | None = None,
    frames: int | None = None,
    on_evaluation: Callable[[int], None] | None = None,
) -> None:
    """Draw independent images, a batch at a time, while threads draw the noise that comes next.

    Args:
        take: gets the pixels of each batch, `[B, C, H, W]` on the network's device; their NFE, int64 `[B]` on
            the CPU; and their frames, uint8 `[B, F, H, W, C]` on the CPU, where there are any.
        seeds: as of `generate`, and so are `frames` and `on_evaluation`.
    """
    labels = _checked_labels(model, labels, image_numbers, config)
    device = next(model.network.parameters()).device
    batches = [
        list(range(first, min(first + batch, len(image_numbers)))) for first in range(0, len(image_numbers), batch)
    ]
    size = shard_size(model.model_config, batch, device)
    # Ranks of a group meet within layers: each draws one shard after the other.
    apart = not isinstance(model.network, NetworkOfGroup)
    with _evaluating(model, config, size) as (denoisers, shape), noise_threads() as threads:

        def shards_of(wanted: list[int]) -> list[_Shard]:
            cuts = (wanted[first : first + size] for first in range(0, len(wanted), size))
            filled = (rows + [rows[-1]] * (size - len(rows)) for rows in cuts)
            return [
                _Shard(
                    rows,
                    ImageNoise(
                        config.seed,
                        [image_numbers[row] for row in rows],
                        shape,
                        device,
                        threads,
                        None if seeds is None else [seeds[row] for row in rows],
                    ),
                )
                for rows in filled
            ]

        @torch.inference_mode()
        def draw_shard(shard: _Shard) -> tuple[Tensor, ...]:
            label_B = labels[shard.rows].to(device)
            # Latents are small, and are decoded when the shard is done, a frame at a time; pixels become bytes.
            keep = bytes_on_cpu if model.vae is None else Tensor.cpu
            film: Film | PacedFilm | None = None
            if frames is not None:
                paced = config.integrator == "rk45"
                film = PacedFilm(size, frames, keep) if paced else Film(config.steps, frames, keep)
            denoiser = watched(denoisers(), film, on_evaluation)
            drawn = draw(denoiser, label_B, shard.noise.initial(), shard.noise, config)
            shard.noise.forget()
            pixels_BCHW = pixels_of(model, drawn.x_BCHW)
            nfe_B = torch.full((size,), drawn.nfe) if drawn.nfe_B is None else drawn.nfe_B.cpu()
            if film is None:
                return pixels_BCHW, nfe_B
            if isinstance(film, PacedFilm):
                assert frames is not None
                return pixels_BCHW, nfe_B, developed(model, film, frames, device, bytes_on_cpu(pixels_BCHW))
            return pixels_BCHW, nfe_B, torch.stack(as_pictures(model, film.cut(), device), dim=1)

        shards = [shards_of(wanted) for wanted in batches]
        for number, wanted in enumerate(batches):
            for shard in shards[number]:
                shard.noise.prepare()
            for shard in (shard for following in shards[number + 1 : number + 2] for shard in following):
                shard.noise.prepare()
            with nullcontext() if apart else threads_of(device):
                found = map_in_threads(draw_shard, shards[number], device)
            pixels_BCHW, nfe_B, *filmed = (torch.cat(parts)[: len(wanted)] for parts in zip(*found, strict=True))
            take(pixels_BCHW, nfe_B, filmed[0] if filmed else None)
            if progress is not None:
                progress(wanted[-1] + 1)


class _Shard(NamedTuple):
    """Images that are drawn at once."""

    rows: list[int]
    """Of the labels; the last one again where the shard is filled up."""
    noise: ImageNoise


def shard_size(config: ModelConfig, batch: int, device: torch.device) -> int:
    """Images of a batch that are drawn at once: all on a GPU, some of equal number on a CPU."""
    if device.type != "cpu":
        return batch
    assert config.image_size is not None
    fitting = max(1, SHARD_TOKENS // (config.image_size // config.patch) ** 2)
    return -(-batch // -(-batch // fitting))


def images_at_once(model: LoadedModel, config: SamplerConfig, batch: int, image_numbers: Sequence[int]) -> int:
    """Images that `generate` draws at once, in one thread: the shards of a batch, or its chains."""
    if config.chains:
        return min(batch, len({number // config.images_per_unit for number in image_numbers}))
    return shard_size(model.model_config, batch, next(model.network.parameters()).device)


@contextmanager
def _evaluating(
    model: LoadedModel, config: SamplerConfig, images: int
) -> Iterator[tuple[Callable[[], Denoiser], tuple[int, int, int]]]:
    """Makes denoisers of the model for so many images at once, one for each thread; and the (C, H, W) of what it
    draws. The network is in evaluation mode."""
    network, model_config = model.network_in(config.precision), model.model_config
    network = with_compiled_blocks(network, images, config)
    assert model_config.channels and model_config.image_size
    training = network.training
    network.eval()
    try:
        yield (
            partial(make_denoiser, network, model_config, model.objective_config, config),
            (model_config.channels, model_config.image_size, model_config.image_size),
        )
    finally:
        network.train(training)


def draw(
    denoiser: Denoiser, label_B: Tensor, initial_BCHW: Tensor, noise: NoiseSource, config: SamplerConfig
) -> Drawn:
    """Draw one batch from pure noise with a resolved configuration.

    Args:
        initial_BCHW: standard normal; times a deviation (`start_of`) it is what the images start from.
    """
    start = start_of(denoiser, config)
    denoiser.follow(pace_of(denoiser, config))
    sigma_B = torch.full((len(label_B),), start.sigma, dtype=torch.float64, device=initial_BCHW.device)
    return integrate(denoiser, initial_BCHW * start.deviation, sigma_B, label_B, noise, config)


def check_finite(finite_N: Tensor | None, image_numbers: Sequence[int]) -> None:
    """UserError naming the first image that had NaN or infinity in it: bytes would not show it."""
    bad = [] if finite_N is None else (~finite_N).nonzero()[:, 0].tolist()
    if bad:
        raise UserError(
            f"image {image_numbers[bad[0]]} is not finite, and neither are {len(bad) - 1} others: {NOT_FINITE}"
        )


def _checked_labels(
    model: LoadedModel, labels: Tensor | None, image_numbers: Sequence[int], config: SamplerConfig
) -> Tensor:
    """The labels, or the default ones. UserError when one is no class of the model."""
    num_classes = model.model_config.num_classes
    assert num_classes is not None
    if labels is None:
        return default_labels(image_numbers, num_classes, config.images_per_unit)
    assert len(labels) == len(image_numbers)
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(f"class {int(wrong[0])}: expected 0 to {num_classes - 1}")
    return labels
