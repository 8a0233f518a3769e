"""Training of a noise-level classifier: cross-entropy on the run's own data plus noise of a drawn level.

Everything that is drawn for a step depends on (seed, position in the run's order of samples), so that an
interrupted training goes on from its last state as if nothing had been. A share of the images, chosen by their
keys, is left out of training and tells how well the posterior holds on images that were not seen.

Shapes: B images, N levels.
"""

import hashlib
import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from ditmoe.data.shards.images import network_input
from ditmoe.data.storage.claims import Claims
from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.data.stream.config import DataConfig, SourceConfig
from ditmoe.data.stream.dataset import Dataset, changed_facts, open_dataset
from ditmoe.data.stream.remembered import remembered_data
from ditmoe.data.stream.stream import dealing_of, open_stream
from ditmoe.model import randomness
from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import CheckpointInfo
from ditmoe.sampling.network.denoiser import column
from ditmoe.sampling.noise_level.calibration import Predictions, calibration_figures, write_calibration_picture
from ditmoe.sampling.noise_level.classifier import PICTURE_FILE, NoiseNetwork, NoiseSpace, save_noise_classifier

STATE_FILE: Final = "training.safetensors"
HELD_OUT: Final = 10
"""One image in so many is left out of training."""
SAVE_EVERY: Final = 500
"""Steps between two states of an interrupted training."""
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
) -> dict[str, Any]:
    """Train a classifier, or go on with an interrupted training, measure its calibration, and write both.

    Args:
        folder: where the classifier is kept; made where it is not there.
        space: its `data` is the dataset's.

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
        last_loss = _train(folder, network, dataset, space, settings, device, log)
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
) -> float:
    """Train in place; the mean loss in nats of the last steps that this call made."""
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    identity = json.dumps([space._asdict(), asdict(settings)], sort_keys=True)
    first = _load_state(folder / STATE_FILE, network, optimiser, identity)
    if first:
        log(f"going on at step {first:,} of {settings.steps:,}")
    losses: list[float] = []
    network.train()
    batches = noisy_batches(dataset, space, settings, first * settings.batch)
    for step in range(first, settings.steps):
        x_BCHW, level_B, held_out_B = next(batches)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        used_B = ~held_out_B
        if used_B.any():
            scores_BN = network(x_BCHW[used_B].to(device))
            loss = functional.cross_entropy(scores_BN, level_B[used_B].to(device))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            losses.append(loss.item())
        done = step + 1
        if done % SAVE_EVERY == 0 or done == settings.steps:
            recent = losses[-SAVE_EVERY:]
            mean = sum(recent) / max(len(recent), 1)
            log(f"step {done:,} of {settings.steps:,}: loss {mean:.3f} of {math.log(space.levels):.3f} nats")
            _save_state(folder / STATE_FILE, network, optimiser, done, identity)
    batches.close()
    recent = losses[-SAVE_EVERY:]
    return sum(recent) / len(recent) if recent else float("nan")


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


def _save_state(path: Path, network: NoiseNetwork, optimiser: torch.optim.Adam, step: int, identity: str) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        moments = optimiser.state[parameter]
        tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq", "step") if moments}
    with replacing(path) as file:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        file.write(save(whole, metadata={"step": str(step), "identity": identity}))


def _load_state(path: Path, network: NoiseNetwork, optimiser: torch.optim.Adam, identity: str) -> int:
    """Take up an interrupted training of the same settings; the steps it had made, 0 where there is none."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as stored:
            facts = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if facts["identity"] != identity:
            return 0
        network.load_state_dict(
            {n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")}
        )
        for name, parameter in network.named_parameters():
            optimiser.state[parameter] = {
                key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else parameter.device)
                for key in ("exp_avg", "exp_avg_sq", "step")
            }
        return int(facts["step"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: unreadable state of a training ({error}); delete the file") from error
