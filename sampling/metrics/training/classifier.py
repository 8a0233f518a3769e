"""Training of the classifiers that an evaluation needs, which goes on where it was killed.

Where both are needed, a CPU with several threads trains them at once, each in one thread: nothing of one is in the
other.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from ditmoe.data.shards.images import to_network_range
from ditmoe.data.storage.parts import Parts, Progress, run_parts
from ditmoe.model.outside.text import counted
from ditmoe.model.randomness import generator, permutation
from ditmoe.model.threads import one_thread
from ditmoe.sampling.metrics.classifier import (
    Classifier,
    ClassifierSettings,
    Dropout,
    build_classifier,
    classifier_file,
    read_classifier,
)
from ditmoe.sampling.metrics.features import fingerprint_of
from ditmoe.sampling.metrics.reference import ReferenceImages
from ditmoe.sampling.metrics.references.training_images import TrainingImages
from ditmoe.sampling.metrics.training.state import DamagedState, Kept, TrainingState

HELD_OUT: Final = 0.2
"""Share of the images that is left out of training and gives the held-out accuracy."""
_BATCH: Final = 64
_HELD_OUT_BATCH: Final = 512
LOOK_SECONDS: Final = 0.5
"""Between two looks at how far trainings are."""

Trained = tuple[nn.Module, dict[str, Any]]
"""The network, and facts about it: settings, split, accuracy on the held-out images."""
ShowProgress = Callable[[str, int], Progress]


class Trainings:
    """The trainings of some classifiers on the same real images, made when the first of them is asked for."""

    def __init__(
        self,
        real: ReferenceImages,
        settings: Sequence[ClassifierSettings],
        cache: Path,
        device: torch.device,
        log: Callable[[str], None] = lambda line: None,
        progress: ShowProgress = lambda title, total: lambda done: None,
    ) -> None:
        """Train nothing yet.

        Args:
            settings: of the classifiers that are to be trained.
            cache: folder of the states of interrupted trainings.
            log: takes lines to show.
            progress: (title, steps) → a function that is told the steps that are done.
        """
        self._real, self._cache, self._device = real, cache, device
        self._wanted = list(settings)
        self._log, self._progress = log, progress
        self._images = TrainingImages(real, [each.seed for each in settings], progress)
        self._trained: dict[ClassifierSettings, Trained] = {}

    def result(self, settings: ClassifierSettings) -> Trained:
        """A trained classifier, which is given away: who asks again has it trained again.

        Raises:
            UserError: a shard or an image is damaged, or none can be used.
        """
        if settings not in self._trained:
            together = self._device.type == "cpu" and torch.get_num_threads() > 1
            wanted = list(dict.fromkeys((settings, *(self._wanted if together else ()))))
            self._trained |= dict(zip(wanted, self._train(wanted), strict=True))
        self._wanted = [other for other in self._wanted if other != settings]
        return self._trained.pop(settings)

    def _train(self, wanted: Sequence[ClassifierSettings]) -> list[Trained]:
        """Train some at once."""
        real, device = self._real, self._device
        trainings = [
            ClassifierTraining(
                each, real, device, self._images, state_file(each, real, self._cache, device), self._log
            )
            for each in wanted
        ]
        names = " and ".join(each.settings.architecture for each in trainings)
        shown = self._progress(f"steps of the {names} classifier", sum(each.steps for each in trainings))

        def show() -> None:
            shown(sum(each.done for each in trainings))

        if self._device.type == "cpu":
            _at_once(trainings, show)
        else:
            for training in trainings:
                training.run(Event(), show)
        found = [training.result() for training in trainings]
        for _, facts in found:
            self._log(
                f"the {facts['settings']['architecture']} classifier is right on "
                f"{facts['held_out_accuracy']:.2%} of {counted(facts['held_out_images'], 'held-out real image')}"
            )
        return found


def _at_once(trainings: Sequence["ClassifierTraining"], show: Callable[[], None]) -> None:
    """Run trainings to their end, each in a thread of its own."""
    over = Event()
    with ThreadPoolExecutor(len(trainings)) as pool:
        pending: set[Future[None]] = {pool.submit(training.run, over) for training in trainings}
        try:
            while pending:
                done, pending = wait(pending, LOOK_SECONDS, FIRST_EXCEPTION)
                show()
                for future in done:
                    future.result()
        except BaseException:
            over.set()  # the pool waits for its threads
            raise


class ClassifierTraining:
    """One training: AdamW, one learning-rate cycle, random shifts, a random split of the real images."""

    def __init__(
        self,
        settings: ClassifierSettings,
        real: ReferenceImages,
        device: torch.device,
        images: TrainingImages,
        state: Path,
        log: Callable[[str], None],
    ) -> None:
        """Read the images, and take up where an interrupted training stopped.

        Args:
            state: the file of its state.
            log: takes lines to show.

        Raises:
            UserError: a shard or an image is damaged, or none can be used.
        """
        self.settings, self._real, self._device = settings, real, device
        self._image_NCHW, self._label_N = images.take(settings.seed)
        self._held = max(1, round(len(self._label_N) * HELD_OUT))
        self._trained_on = len(self._label_N) - self._held
        images_seen = min(settings.passes * self._trained_on, settings.most_images)
        self.steps = max(1, math.ceil(images_seen / _BATCH))
        log(
            f"training the {settings.architecture} classifier on {counted(self._trained_on, 'real image')} "
            f"({counted(self.steps, 'step')}, kept for later)"
        )
        self._path = state
        self._state = self._begin()
        try:
            kept = self._state.load()
        except DamagedState as error:
            log(f"{error}; the training begins anew")
            self._state, kept = self._begin(), Kept(0, {})
        self.done = kept.step
        """Steps."""
        if kept.step:
            log(f"the {settings.architecture} classifier goes on after step {kept.step:,}")
            self._rng = kept.more["rng"]
            self._cycle.load_state_dict({"last_epoch": kept.step - 1, "_step_count": kept.step + 1})
            self._cycle.step()

    def _begin(self) -> TrainingState:
        """Make the network and all that goes with it; where it is kept."""
        settings, device = self.settings, self._device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            self._network = build_classifier(settings, self._real.form).to(device)
            self._rng = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
        self._optimiser: torch.optim.Optimizer = torch.optim.AdamW(
            self._network.parameters(), lr=settings.learning_rate, weight_decay=0.02
        )
        self._cycle = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, settings.learning_rate, total_steps=self.steps + 1
        )
        identity = json.dumps([self._real.fingerprint, asdict(settings), device.type], sort_keys=True)
        return TrainingState(self._path, identity, self._network, self._optimiser)

    def run(self, over: Event, on_step: Callable[[], None] = lambda: None) -> None:
        """Train to the last step, or until `over` is set."""
        settings, device, network = self.settings, self._device, self._network
        train_x, train_y = (each[self._held :].to(device) for each in (self._image_NCHW, self._label_N))
        batches = islice(_batches(settings.seed, self._trained_on), self.done, self.steps)
        with _same_everywhere(device), _drawing_from(self._rng, network, device) as rng_state:
            network.train()
            for step, chosen in enumerate(batches, self.done):
                if over.is_set():
                    return
                rows = torch.from_numpy(chosen).to(device)
                x = to_network_range(_shift(train_x[rows], settings.seed, step))
                _, scores = network(x)
                loss = functional.cross_entropy(scores, train_y[rows], label_smoothing=0.05)
                self._optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimiser.step()
                self._cycle.step()
                self.done = step + 1
                self._state.keep_at_times(self.done, lambda: {"rng": rng_state()})
                on_step()
            self._accuracy = _accuracy(
                network.eval(), self._image_NCHW[: self._held], self._label_N[: self._held], device
            )

    def result(self) -> Trained:
        """What a training that ran to its end has made."""
        assert self.done == self.steps
        facts = {
            "settings": asdict(self.settings),
            "device": self._device.type,
            "fingerprint": fingerprint_of(self._network.state_dict()),
            "data": self._real.fingerprint,
            "trained_on": self._trained_on,
            "held_out_images": self._held,
            "held_out_accuracy": self._accuracy,
            "image_size": int(self._image_NCHW.shape[2]),
        }
        return self._network, facts


def load_classifier(
    settings: ClassifierSettings,
    real: ReferenceImages,
    cache: Path,
    device: torch.device,
    log: Callable[[str], None] = lambda line: None,
    trainings: Trainings | None = None,
) -> Classifier:
    """The classifier of these settings for these images: from `cache`, or trained now and kept there.

    A training that is interrupted goes on when it is asked for again, and ends with the same weights. A cached
    file that is damaged is trained anew.

    Args:
        trainings: has several classifiers trained, whose images are decoded once.

    Raises:
        UserError: a shard or a sample of the real images is damaged.
    """
    name = classifier_file(settings, real, device)
    training = trainings or Trainings(real, [settings], cache, device, log)

    def write(trained: Trained, file: BinaryIO) -> None:
        network, facts = trained
        state = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
        file.write(save(state, metadata={"facts": json.dumps(facts)}))

    parts: Parts[Trained, Classifier, Classifier] = Parts(
        cache,
        [name],
        lambda _: training.result(settings),
        write,
        lambda _: read_classifier(cache / name, real, settings, device),
        lambda found: next(iter(found)),
    )
    found = run_parts(parts)
    state_file(settings, real, cache, device).unlink(missing_ok=True)
    return found


def state_file(settings: ClassifierSettings, real: ReferenceImages, cache: Path, device: torch.device) -> Path:
    """Where an interrupted training of a classifier is kept."""
    return (cache / classifier_file(settings, real, device)).with_suffix(".training")


@contextmanager
def _same_everywhere(device: torch.device) -> Iterator[None]:
    """One thread on a CPU; on a GPU convolutions that add in a fixed order, in full float32."""
    with one_thread():
        if device.type == "cpu":
            yield
            return
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield


@contextmanager
def _drawing_from(rng: Tensor, network: nn.Module, device: torch.device) -> Iterator[Callable[[], Tensor]]:
    """Let a network draw what it drops from a state of its own; a function that has the state as it is now."""
    if device.type == "cpu":
        own = torch.Generator().set_state(rng)
        for module in network.modules():
            if isinstance(module, Dropout):
                module.generator = own
        yield own.get_state
        return
    with torch.random.fork_rng(devices=[device]):
        torch.cuda.set_rng_state(rng, device)
        yield lambda: torch.cuda.get_rng_state(device)


def _batches(seed: int, count: int) -> Iterator[NDArray[np.int64]]:
    """Rows of each step's batch: one random order of all images after the other."""
    order = np.empty(0, dtype=np.int64)
    epoch = 0
    while True:
        while len(order) < min(_BATCH, count):
            order = np.concatenate([order, permutation(seed, "classifier/order", epoch, count)])
            epoch += 1
        yield order[:_BATCH]
        order = order[_BATCH:]


def _shift(x_NCHW: Tensor, seed: int, step: int) -> Tensor:
    """The whole batch moved by up to an eighth of the side, edges repeated, by a draw of (seed, step)."""
    size = x_NCHW.shape[2]
    reach = size // 8
    down, right = generator(seed, "classifier/shift", step).integers(0, 2 * reach + 1, size=2)
    padded = functional.pad(x_NCHW.float(), (reach, reach, reach, reach), mode="replicate")
    return padded[:, :, down : down + size, right : right + size]


@torch.inference_mode()
def _accuracy(network: nn.Module, image_NCHW: Tensor, label_N: Tensor, device: torch.device) -> float:
    right = 0
    for start in range(0, len(label_N), _HELD_OUT_BATCH):
        x = to_network_range(image_NCHW[start : start + _HELD_OUT_BATCH].to(device))
        predicted = network(x)[1].argmax(1).cpu()
        right += int((predicted == label_N[start : start + _HELD_OUT_BATCH]).sum())
    return right / len(label_N)
