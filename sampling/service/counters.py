"""What Prometheus is told. Nothing here waits for a device."""

import time
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

WINDOW: Final = 64
"""Images whose ends say how fast images are drawn."""
LONGEST_WAIT: Final = 600


class Counters:
    """The figures of one service. For any number of threads."""

    def __init__(self) -> None:
        """Start at zero."""
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("ditmoe_requests", "Requests.", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "ditmoe_generation_seconds", "From request to reply of images that were drawn.", registry=own
        )
        self.images = Counter("ditmoe_images", "Images that were drawn.", registry=own)
        self.evaluations = Counter("ditmoe_evaluations", "Evaluations of the denoiser (NFE).", registry=own)
        self.failures = Counter("ditmoe_failures", "Requests without images, by reason.", ["reason"], registry=own)
        self.rows = Histogram(
            "ditmoe_pass_rows",
            "Rows of passes through a network that were asked for: sum / count is the mean batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=own,
        )
        self._loads = Histogram(
            "ditmoe_network_load_seconds",
            "Loading of networks, with the passes that try them out: for a request, which waits, or as warm_up.",
            ["reason"],
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
            registry=own,
        )
        self.jobs = Counter("ditmoe_jobs_ended", "Jobs by their last state.", ["kind", "state"], registry=own)
        self._ends: deque[float] = deque(maxlen=WINDOW)
        self._lock = Lock()

    def gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A figure that is asked for when Prometheus asks."""
        Gauge(name, help_text, registry=self.registry).set_function(value)

    def loaded(self, seconds: float, reason: str) -> None:
        """Count a network that was loaded."""
        self._loads.labels(reason).observe(seconds)

    def drawn(self, nfe: int) -> None:
        """Count an image."""
        self.images.inc()
        self.evaluations.inc(nfe)
        with self._lock:
            self._ends.append(time.monotonic())

    def retry_after(self, waiting: int) -> int:
        """Seconds in which so many images are drawn, as it went of late."""
        with self._lock:
            ends = list(self._ends)
        if len(ends) < 2:
            return 1
        return int(min(LONGEST_WAIT, max(1.0, waiting * (ends[-1] - ends[0]) / (len(ends) - 1))))

    def text(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self.registry)
