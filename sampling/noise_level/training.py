"""Training of a noise-level classifier: cross-entropy on the run's own data plus noise of a drawn level.

Everything that is drawn for a step depends on (seed, position in the run's order of samples), so that an
interrupted training goes on from its last state as if nothing had been. A share of the images, chosen by their
keys, is left out of training and tells how well the posterior holds on images that were not seen.

Shapes: B images, N levels.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditmoe.data.shards.images import network_input
from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import make_folder
from ditmoe.data.stream.config import DataConfig, SourceConfig
from ditmoe.data.stream.dataset import Dataset, changed_facts, open_dataset
from ditmoe.data.stream.remembered import remembered_data
from ditmoe.data.stream.stream import dealing_of, open_stream
from ditmoe.model import randomness
from ditmoe.model.errors import UserError
from ditmoe.model.threads import threads_of
from ditmoe.parallel.checkpoint.folder import CheckpointInfo
from ditmoe.sampling.metrics.training.shards import set_gradients
from ditmoe.sampling.metrics.training.state import DamagedState, TrainingState
from ditmoe.sampling.network.denoiser import column
from ditmoe.sampling.noise_level.calibration import Predictions, calibration_figures, write_calibration_picture
from ditmoe.sampling.noise_level.classifier import PICTURE_FILE, NoiseNetwork, NoiseSpace, save_noise_classifier

STATE_FILE: Final = "training.safetensors"
HELD_OUT: Final = 10
"""One image in so many is left out of training."""
TELL_EVERY: Final = 500
"""Steps between two lines about a training."""
CALIBRATION_DRAWS: Final = 2000
"""Noisy images that the calibration is measured on."""


@dataclass(frozen=True)
class NoiseTraining:
    """What a classifier depends on, besides its space."""

    steps: int = 5000
    batch: int = 100
    """Images read at a step; those that are held out take no part in it."""
    learning_rate: float = 1e-3
    """Of Adam at the start; it goes to 0 along half a cosine."""
    seed: int = 0
    version: int = 1
    """Raised whenever this file changes what is trained."""


class NoisyBatch(NamedTuple):
    """Images with noise of known levels."""

    x_BCHW: Tensor
    level_B: Tensor
    held_out_B: Tensor
    """Which of them are left out of training."""


def training_dataset(info: CheckpointInfo, named: Sequence[str] = (), workers: int = 1) -> Dataset:
    """The data of a run as training reads it.

    Args:
        named: where the user says that the shards of each of its sources lie; empty: where they lay.
        workers: processes that read ahead.

    Raises:
        UserError: the run does not say what it was trained on, its data is not there, is other data, or is not
            opened unasked.
    """
    remembered = remembered_data(info.config, str(info.path))
    if remembered is not None:
        config = remembered.data(named, workers=workers)
    elif named:
        config = DataConfig(sources=tuple(SourceConfig(path=path) for path in named), workers=workers)
    else:
        raise UserError(f"{info.path}: does not say what it was trained on; name the source with --data")
    dataset = open_dataset(config, int(info.config.get("seed") or 0))
    if "fingerprint" in info.dataset and (changed := changed_facts(info.dataset, dataset.facts)):
        raise UserError(
            f"{dataset.sources[0].config.shown}: other data than {info.path} was trained on (another "
            f"{', '.join(changed)}); expected the same shards, indexed alike, and choice of samples"
        )
    return dataset


def train_noise_classifier(
    folder: Path,
    dataset: Dataset,
    space: NoiseSpace,
    settings: NoiseTraining,
    device: torch.device,
    log: Callable[[str], None] = lambda line: None,
    show: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Train a classifier, or go on with an interrupted training, measure its calibration, and write both.

    Args:
        folder: where the classifier is kept; made where it is not there.
        space: its `data` is the dataset's.
        log: takes lines to show.
        show: called with the steps that are done.

    Returns:
        The facts that are stored with the weights.

    Raises:
        UserError: the data is not of the space's shape or cannot be read, another process trains here, or a state
            cannot be read.
    """
    found = (dataset.index.channels, dataset.index.image_size, dataset.index.image_size)
    if found != space.shape:
        raise UserError(
            f"{dataset.sources[0].config.shown}: holds samples of {list(found)}, and the network draws "
            f"{list(space.shape)}; expected the data that it was trained on"
        )
    make_folder(folder)
    claims = Claims(folder)
    with claims.taken("training") as claim:
        if claim is None:
            who = claims.who("training")
            raise UserError(f"{folder}: another process trains this classifier{who}; expected no other")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = NoiseNetwork(space.shape[0], space.shape[1], space.levels).to(device)
        last_loss = _train(folder, network, dataset, space, settings, device, log, show)
        with threads_of(device):
            predictions, held_out = _predict(network.eval(), dataset, space, settings, device)
        figures = calibration_figures(predictions, space.level_N)
        facts = {
            "settings": asdict(settings),
            "training_loss": last_loss,
            "calibration_on": "held-out images" if held_out else "training images, of which none is held out",
            "calibration": figures,
        }
        write_calibration_picture(folder / PICTURE_FILE, predictions, space.level_N)
        save_noise_classifier(folder, network, space, facts)
        (folder / STATE_FILE).unlink(missing_ok=True)
    return facts


def noisy_batches(
    dataset: Dataset, space: NoiseSpace, settings: NoiseTraining, start: int
) -> Generator[NoisyBatch, None, None]:
    """Batches of the run's order from a position on, without end; closing it ends the processes that read."""
    level_N, count = space.level_N, space.levels
    dealing = dealing_of(dataset.config, start=start, micro_batch=settings.batch, ranks=1)
    with closing(open_stream(dataset, dealing)) as stream:
        for batch in stream:
            x0_BCHW = network_input(batch.image_BCHW)
            positions = batch.position_B
            uniform_B = randomness.uniform(settings.seed, "noise-classifier/level", positions)
            level_B = (uniform_B * count).long().clamp(max=count - 1)
            noise_BCHW = randomness.normal(settings.seed, "noise-classifier/noise", positions, x0_BCHW.shape[1:])
            x_BCHW = x0_BCHW + column(level_N[level_B], x0_BCHW) * noise_BCHW
            yield NoisyBatch(x_BCHW, level_B, torch.tensor([_held_out(key) for key in batch.keys]))


def _train(
    folder: Path,
    network: NoiseNetwork,
    dataset: Dataset,
    space: NoiseSpace,
    settings: NoiseTraining,
    device: torch.device,
    log: Callable[[str], None],
    show: Callable[[int], None],
) -> float:
    """Train in place; the mean loss in nats of the last `TELL_EVERY` steps."""
    parameters = list(network.parameters())
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate)
    identity = json.dumps([space._asdict(), asdict(settings)], sort_keys=True)
    state = TrainingState(folder / STATE_FILE, identity, network, optimiser)
    try:
        first, more = state.load()
    except DamagedState as error:
        raise UserError(f"{error}; delete the file") from error
    if first:
        log(f"going on at step {first:,} of {settings.steps:,}")
    losses: deque[float] = deque(more["losses"].tolist() if more else (), TELL_EVERY)
    network.train()
    batches = noisy_batches(dataset, space, settings, first * settings.batch)
    for step in range(first, settings.steps):
        x_BCHW, level_B, held_out_B = next(batches)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        used_B = ~held_out_B
        if used_B.any():
            used_UCHW, level_U = x_BCHW[used_B].to(device), level_B[used_B].to(device)
            losses.append(_set_gradients(network, parameters, used_UCHW, level_U, device))
            optimiser.step()
        done = step + 1
        if done % TELL_EVERY == 0 or done == settings.steps:
            mean = sum(losses) / max(len(losses), 1)
            log(f"step {done:,} of {settings.steps:,}: loss {mean:.3f} of {math.log(space.levels):.3f} nats")
        show(done)
        if done == settings.steps:
            state.keep(done, _kept(losses))  # its calibration comes next
        else:
            state.keep_at_times(done, lambda: _kept(losses))
    batches.close()
    return sum(losses) / len(losses) if losses else float("nan")


def _kept(losses: Sequence[float]) -> dict[str, Tensor]:
    return {"losses": torch.tensor(losses, dtype=torch.float64)}


def _set_gradients(
    network: NoiseNetwork,
    parameters: Sequence[nn.Parameter],
    x_UCHW: Tensor,
    level_U: Tensor,
    device: torch.device,
) -> float:
    """Those of the mean cross-entropy of some images; the loss."""

    def loss_of(rows: slice) -> Tensor:
        return functional.cross_entropy(network(x_UCHW[rows]), level_U[rows], reduction="sum") / len(level_U)

    return set_gradients(parameters, len(level_U), loss_of, device)


@torch.inference_mode()
def _predict(
    network: NoiseNetwork, dataset: Dataset, space: NoiseSpace, settings: NoiseTraining, device: torch.device
) -> tuple[Predictions, bool]:
    """What the classifier says of noisy images that were held out, or of any where none is; and which it is."""
    total = sum(source.total for source in dataset.sources)
    batches = noisy_batches(dataset, space, settings, settings.steps * settings.batch)
    scores: list[Tensor] = []
    levels: list[Tensor] = []
    number = seen = 0
    any_held_out = False
    for x_BCHW, level_B, held_out_B in batches:
        seen += len(level_B)
        # After a whole epoch without one there is none, and all serve.
        any_held_out = any_held_out or bool(held_out_B.any())
        chosen_B = held_out_B if any_held_out or seen <= total + settings.batch else ~held_out_B
        if chosen_B.any():
            scores.append(network(x_BCHW[chosen_B].to(device)).double().log_softmax(1).cpu())
            levels.append(level_B[chosen_B])
            number += len(levels[-1])
        if number >= CALIBRATION_DRAWS:
            break
    batches.close()
    return Predictions(torch.cat(scores), torch.cat(levels)), any_held_out


def _held_out(key: str) -> bool:
    """Whether an image is left out of training, by a hash of its shard and key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) % HELD_OUT == 0
