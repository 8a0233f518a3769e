"""Images of Denoising Langevin Gibbs chains: image i is sample i mod S of chain i div S.

So an image depends on the seed, i, S and the chain's class alone, and jobs share out whole chains. A job that was
interrupted goes on from the states that its chains had when they were last kept.

Shapes: N images, B chains of a batch, S samples of a chain, T steps of a chain from one sample to the next.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted
from ditmoe.parallel.checkpoint.folder import CheckpointInfo
from ditmoe.sampling.chains.dlg import Dlg, DlgSample, Finish
from ditmoe.sampling.chains.state import ChainDraws, Chains, SeededDraws, load_chains, save_chains
from ditmoe.sampling.integrators.flow import Drawn, NoiseSource
from ditmoe.sampling.integrators.samplers import initial_config, integrate
from ditmoe.sampling.network.denoiser import Denoiser
from ditmoe.sampling.network.load import complete_config
from ditmoe.sampling.noise_level.classifier import (
    NoiseClassifier,
    classifier_folder,
    load_noise_classifier,
    space_of,
)
from ditmoe.sampling.noise_level.levels import LevelRange, NoisePosterior
from ditmoe.sampling.settings.chains import DlgConfig
from ditmoe.sampling.settings.config import SAMPLER_RULES, SamplerConfig

KEEP_SECONDS: Final = 60.0
"""Seconds between two states of unfinished chains that are kept."""


class ChainImages(NamedTuple):
    """Images of chains in the order that was asked for, and the way to each."""

    image_NHWC: Tensor
    """uint8."""
    nfe_N: Tensor
    """Evaluations of the denoiser that each took, int64; those of a chain's start are with its first sample."""
    sigma_N: Tensor
    """σ of the state that was denoised, float32."""
    trace_NT: Tensor
    """σ after each step since the last sample, float32."""
    finite_N: Tensor
    """False where an image, or the state it was made of, had NaN or infinity in it."""


ToBytes = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x0_BCHW → uint8 `[B, H, W, C]` on the CPU, and which of them are finite, bool `[B]` on the CPU."""


OnSample = Callable[[Tensor, list[int], list[int]], None]
"""(image_BHWC of a sample of each chain, rows of those that were asked for, rows of these among the images)."""


@dataclass(frozen=True)
class StateFile:
    """A file that unfinished chains are kept in, so that a repeated call goes on with them."""

    path: Path
    identity: str
    """Stands for what the images depend on beside the arguments of the call: weights, classifier, objective."""


def find_posterior(info: CheckpointInfo, device: str | torch.device = "cpu") -> NoiseClassifier:
    """The noise-level classifier of a checkpoint's run.

    Raises:
        UserError: there is none, or it was trained for another space.
    """
    return load_noise_classifier(classifier_folder(info), space_of(info), device)


def classifier_fingerprint(info: CheckpointInfo, samplers: Sequence[SamplerConfig]) -> str | None:
    """That of the noise-level classifier that samplers of a checkpoint ask; None: there are no chains among them.

    Raises:
        UserError: as `find_posterior`; none of its levels is in a chain's range of σ, or `class_scales` has no
            factor for a class.
    """
    chains = [sampler.dlg for sampler in samplers if sampler.chains]
    if not chains:
        return None
    classifier = find_posterior(info)
    num_classes = complete_config(info.model, info).num_classes
    assert num_classes is not None
    for dlg in chains:
        check_chains(dlg, classifier, num_classes)
    return classifier.fingerprint


def check_chains(dlg: DlgConfig, posterior: NoisePosterior, num_classes: int) -> None:
    """UserError when no level is in a chain's range of σ, or `class_scales` has no factor for a class."""
    if dlg.class_scales is not None and len(dlg.class_scales) < num_classes:
        raise UserError(
            f"class_scales has {len(dlg.class_scales)} numbers; expected one for each of "
            f"{counted(num_classes, 'class')}"
        )
    LevelRange(posterior, dlg.sigma_min, dlg.sigma_max)


def draw_chain_images(
    denoiser: Denoiser,
    posterior: NoisePosterior,
    config: SamplerConfig,
    label_N: Tensor,
    image_numbers: Sequence[int],
    shape: tuple[int, int, int],
    to_bytes: ToBytes,
    batch: int,
    *,
    progress: Callable[[int], None] | None = None,
    state_file: StateFile | None = None,
    draws: ChainDraws | None = None,
    on_sample: OnSample | None = None,
) -> ChainImages:
    """Draw images of chains; a chain runs as far as the last of its images that is asked for.

    A chain whose state is no longer finite stays so until it starts anew (`restart_every`); it takes its turns, so
    that the others of its batch see no difference.

    Args:
        config: resolved, of a sampler of chains.
        label_N: class of each image, int64, one for all images of a chain, on the device that they are drawn on.
        image_numbers: at least one, each once.
        shape: (C, H, W) of what the network draws.
        to_bytes: makes images of what was drawn.
        batch: chains drawn at once. Another size changes them by rounding, see `dlg`.
        progress: called with the images drawn so far.
        state_file: removed when all are drawn.
        draws: what is random about the chains; None: it follows from the configuration's seed.
        on_sample: called after each sample of a batch, also where none of it was asked for.

    Raises:
        UserError: no level of noise is in the range of σ; what was kept is of other chains, or cannot be read or
            written.
    """
    assert image_numbers and len(label_N) == len(image_numbers)
    assert state_file is None or (draws is None and on_sample is None), "neither is kept"
    posterior = LevelRange(posterior, config.dlg.sigma_min, config.dlg.sigma_max)
    dlg = Dlg(denoiser, posterior, config.dlg, draws or SeededDraws(config.seed), _bound(initial_config(config)))
    finish = _bound(config)
    wanted = _wanted(image_numbers, config.dlg.samples_per_chain)
    numbers = sorted(wanted)
    batch = min(batch, len(numbers))
    file = (
        None
        if state_file is None
        else _StoredState(state_file.path, _identity(state_file, config, label_N, image_numbers, batch))
    )
    state = (None if file is None else file.load(label_N.device)) or _State(_DrawnSamples(len(image_numbers)))
    for first in range(state.first, len(numbers), batch):
        group = numbers[first : first + batch]
        filled = group + [group[-1]] * (batch - len(group))  # every batch has one shape
        chains = state.chains if first == state.first else None
        if chains is None:
            label_B = torch.stack([label_N[next(iter(wanted[number].values()))] for number in filled])
            started = dlg.start(filled, label_B, shape)
            before_B, chains = torch.zeros_like(started.nfe_B), started
        else:
            before_B = chains.nfe_B
        longest = 1 + max(max(wanted[number]) for number in group)
        for sample in islice(dlg.samples(chains, finish), longest - int(chains.samples_B[0])):
            spent_B, before_B = sample.chains.nfe_B - before_B, sample.chains.nfe_B
            state.done.take(sample, group, spent_B, wanted, to_bytes, on_sample)
            if progress is not None:
                progress(state.done.count)
            if file is not None:
                file.keep(_State(state.done, first, sample.chains))
    if file is not None:
        file.remove()
    return state.done.images()


def _bound(config: SamplerConfig) -> Finish:
    """A configuration's integrator with its settings."""

    def finish(denoiser: Denoiser, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor, noise: NoiseSource) -> Drawn:
        return integrate(denoiser, x_BCHW, sigma_B, label_B, noise, config)

    return finish


def _wanted(image_numbers: Sequence[int], samples: int) -> dict[int, dict[int, int]]:
    """Chain → place of a sample in it → row among the images."""
    wanted: dict[int, dict[int, int]] = {}
    for row, number in enumerate(image_numbers):
        wanted.setdefault(number // samples, {})[number % samples] = row
    return wanted


class _DrawnSamples:
    """The images so far; those that are not there yet are zeros."""

    def __init__(self, count: int, stored: dict[str, Tensor] | None = None) -> None:
        self._count = count
        none_N = torch.zeros(count, dtype=torch.bool)
        # Lost rather than finite: in states that were kept before there was such an entry, none is lost.
        self.stored = {"drawn_N": none_N, "lost_N": none_N.clone(), **(stored or {})}

    @property
    def count(self) -> int:
        """Images that are there."""
        return int(self.stored["drawn_N"].sum())

    def take(
        self,
        sample: DlgSample,
        group: list[int],
        spent_B: Tensor,
        wanted: dict[int, dict[int, int]],
        to_bytes: ToBytes,
        on_sample: OnSample | None,
    ) -> None:
        """Keep what was asked for of a sample of each chain; what the batch was filled up with falls away."""
        place = int(sample.selected.number_B[0])
        chosen_R = [row for row, number in enumerate(group) if place in wanted[number]]
        if not chosen_R and on_sample is None:
            return
        image_BHWC, finite_B = to_bytes(sample.x0_BCHW)
        rows_R = [wanted[group[row]][place] for row in chosen_R]
        if on_sample is not None:
            on_sample(image_BHWC, chosen_R, rows_R)
        if not chosen_R:
            return
        finite_B = finite_B & sample.selected.x_BCHW.isfinite().flatten(1).all(1).cpu()
        found = {
            "image_NHWC": image_BHWC,
            "lost_N": ~finite_B,
            "nfe_N": spent_B,
            "sigma_N": sample.selected.sigma_B.float().cpu(),
            "trace_NT": sample.selected.trace_BT.float().cpu(),
            "drawn_N": torch.ones(len(spent_B), dtype=torch.bool),
        }
        target_R = torch.tensor(rows_R)
        for name, tensor_B in found.items():
            if name not in self.stored:
                self.stored[name] = tensor_B.new_zeros(self._count, *tensor_B.shape[1:])
            self.stored[name][target_R] = tensor_B[torch.tensor(chosen_R)]

    def images(self) -> ChainImages:
        """All of them."""
        assert bool(self.stored["drawn_N"].all())
        stored = {**self.stored, "finite_N": ~self.stored["lost_N"]}
        return ChainImages(*(stored[name] for name in ChainImages._fields))


class _State(NamedTuple):
    """How far a call has come."""

    done: _DrawnSamples
    first: int = 0
    """Place of the batch of chains that is at work."""
    chains: Chains | None = None
    """Where they are; null: at their start."""


class _StoredState:
    """The state of a call on disk, written now and then."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = identity
        self._written = time.monotonic()

    def load(self, device: torch.device) -> _State | None:
        """What an interrupted call left; null: nothing."""
        if not self._path.exists():
            return None
        chains, stored = load_chains(self._path, self._identity, device)
        first = int(stored.pop("first"))
        return _State(_DrawnSamples(len(stored["drawn_N"]), stored), first, chains)

    def keep(self, state: _State) -> None:
        """Write the state, if the last time is long enough ago."""
        if time.monotonic() - self._written < KEEP_SECONDS:
            return
        assert state.chains is not None
        beside = {**state.done.stored, "first": torch.tensor(state.first)}
        save_chains(self._path, state.chains, self._identity, beside)
        self._written = time.monotonic()

    def remove(self) -> None:
        """All is done."""
        self._path.unlink(missing_ok=True)


def _identity(
    state_file: StateFile, config: SamplerConfig, label_N: Tensor, image_numbers: Sequence[int], batch: int
) -> str:
    """Everything that the images of a call depend on."""
    settings = [SAMPLER_RULES, config.plain(), batch]
    return json.dumps([state_file.identity, *settings, label_N.tolist(), list(image_numbers)])
