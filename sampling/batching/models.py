"""Several networks that are kept loaded as long as the memory for them allows."""

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch

from ditmoe.model.errors import UserError
from ditmoe.parallel.checkpoint.folder import CheckpointInfo, read_info
from ditmoe.sampling.batching.passes import Passes
from ditmoe.sampling.network.load import LoadedModel, Precision, Weights, find_decoder, load_model, shared_folder

BYTES: Final = {"fp32": 4, "bf16": 2}
LoadReason = Literal["request", "warm_up"]
"""Somebody waited for a network, or nobody yet."""


class ModelUnavailable(Exception):
    """A network cannot be loaded: its files are damaged or gone, or it is larger than the memory for all."""


class ModelKey(NamedTuple):
    """What is loaded."""

    checkpoint: Path
    weights: Weights
    precision: Precision


@dataclass(frozen=True)
class Loaded:
    """A network, and its passes."""

    model: LoadedModel
    passes: Passes
    bytes: int


class Models:
    """Networks by key; that which was not used for longest goes first. For any number of threads."""

    def __init__(
        self,
        device: torch.device,
        budget: int,
        rows: int,
        on_pass: Callable[[int], None] = lambda rows: None,
        on_load: Callable[[float, LoadReason], None] = lambda seconds, reason: None,
    ) -> None:
        """Load nothing yet.

        Args:
            budget: bytes for the weights of all networks, VAEs included.
            rows: of each pass.
            on_pass: as of `Passes`.
            on_load: called after each load with the seconds that it took, and why it was.
        """
        self.device = device
        self._budget, self._rows, self._on_pass, self._on_load = budget, rows, on_pass, on_load
        self._changed = threading.Condition()
        self._loaded: OrderedDict[ModelKey, Loaded] = OrderedDict()
        self._loading: dict[ModelKey, int] = {}
        self._uses: Counter[ModelKey] = Counter()

    def loaded(self) -> dict[ModelKey, Loaded]:
        """Those that are loaded now."""
        with self._changed:
            return dict(self._loaded)

    @contextmanager
    def use(self, key: ModelKey, reason: LoadReason = "request") -> Iterator[Loaded]:
        """A network, which stays loaded for the body; waits where the memory is in use by others.

        Raises:
            ModelUnavailable: it cannot be loaded.
        """
        with self._changed:
            self._changed.wait_for(lambda: key not in self._loading)
            loaded = self._loaded.get(key)
            if loaded is None:
                size = self._size(key)
                self._loading[key] = 0  # nobody else begins
                try:
                    self._changed.wait_for(lambda: self._make_room(size))
                    self._loading[key] = size
                except BaseException:
                    del self._loading[key]
                    raise
            else:
                self._loaded.move_to_end(key)
                self._uses[key] += 1
        if loaded is None:
            began = time.monotonic()
            try:
                loaded = self._load(key)
            finally:
                with self._changed:
                    del self._loading[key]
                    if loaded is not None:
                        self._loaded[key] = loaded
                        self._uses[key] += 1
                    self._changed.notify_all()
            self._on_load(time.monotonic() - began, reason)
        try:
            yield loaded
        finally:
            with self._changed:
                self._uses[key] -= 1
                self._changed.notify_all()

    def _make_room(self, size: int) -> bool:
        """Whether there is room now, after networks that nobody uses have gone."""
        for other in list(self._loaded):
            if self._held() + size <= self._budget:
                break
            if not self._uses[other]:
                del self._loaded[other]
        return self._held() + size <= self._budget

    def _held(self) -> int:
        return sum(loaded.bytes for loaded in self._loaded.values()) + sum(self._loading.values())

    def _size(self, key: ModelKey) -> int:
        """Bytes that a network will take. ModelUnavailable: more than there may be of all."""
        try:
            info = read_info(key.checkpoint)
            size = parameters_of(info) * BYTES[key.precision]
            decoder = find_decoder(info, None)
        except UserError as error:
            raise ModelUnavailable(str(error)) from error
        if decoder is not None:
            size += sum(file.stat().st_size for file in decoder.path.glob("*.safetensors"))
        if size > self._budget:
            raise ModelUnavailable(
                f"the network takes {size / 2**30:.2f} GiB; expected at most the {self._budget / 2**30:.2f} GiB "
                "that the service may hold"
            )
        return size

    def _load(self, key: ModelKey) -> Loaded:
        try:
            model = load_model(
                key.checkpoint,
                key.weights,
                device=self.device,
                precision=key.precision,
                shared=shared_folder(key.checkpoint),
            )
        except UserError as error:
            raise ModelUnavailable(str(error)) from error
        config = model.model_config
        assert config.channels and config.image_size and config.num_classes
        held = [*model.network.parameters()]
        if model.vae is not None:
            held += model.vae.network.parameters()
        return Loaded(
            model,
            Passes(
                model.network,
                self._rows,
                (config.channels, config.image_size, config.image_size),
                config.num_classes,
                self.device,
                self._on_pass,
            ),
            sum(parameter.numel() * parameter.element_size() for parameter in held),
        )


def parameters_of(info: CheckpointInfo) -> int:
    """Learned parameters of a checkpoint's network."""
    return sum(math.prod(shape) for shape in info.shapes.values())
