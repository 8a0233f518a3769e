"""Loads the networks of some runs before anybody asks: a first use takes long, and the next ones do not."""

import logging
import threading
from collections.abc import Sequence
from typing import Final

from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import meant
from ditmoe.sampling.batching.models import ModelKey, Models, ModelUnavailable
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.listing import Listing

LOG: Final = logging.getLogger("ditmoe.service")
LOOK_SECONDS: Final = 5.0


class WarmUp:
    """A thread that loads the newest checkpoint of each run, and every newer one as soon as it is there."""

    def __init__(
        self, names: Sequence[str], listing: Listing, models: Models, seconds: float | None = None
    ) -> None:
        """Start the thread.

        Args:
            names: of the runs.
            seconds: between two looks for newer checkpoints; None: LOOK_SECONDS.

        Raises:
            UserError: there is no such run.
        """
        runs = listing.runs()
        for name in names:
            if name not in runs:
                raise UserError(
                    f"--load {name}: no such run; there are {', '.join(runs) or 'none'}{meant(name, runs)}"
                )
        self._listing, self._models = listing, models
        self._seconds = LOOK_SECONDS if seconds is None else seconds
        self._loading: dict[str, str | None] = dict.fromkeys(names)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(tuple(names),), daemon=True, name="warm-up")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, as long as it has something to do."""
        return self._thread.is_alive() or self._closing.is_set()

    def loading(self) -> dict[str, str | None]:
        """Runs of which no network has been loaded yet, each with what went wrong at the last try, if anything."""
        return dict(self._loading)

    def close(self) -> None:
        """End the thread, or leave it to end with the process where it is loading."""
        self._closing.set()
        self._thread.join(timeout=5)

    def _work(self, names: tuple[str, ...]) -> None:
        loaded: dict[str, ModelKey] = {}
        while not self._closing.is_set():
            for name in names:
                try:
                    key = ModelKey(self._listing.find(name, None).checkpoint, "ema", "fp32")
                    if loaded.get(name) != key:
                        with self._models.use(key, "warm_up"):
                            loaded[name] = key
                    self._loading = {other: said for other, said in self._loading.items() if other != name}
                except (
                    ServiceError,
                    ModelUnavailable,
                    OSError,
                ) as error:  # it is tried again
                    if name in self._loading and self._loading[name] != str(error):
                        LOG.warning("%s: is not loaded: %s", name, error)
                        self._loading = {**self._loading, name: str(error)}
            self._closing.wait(self._seconds)
