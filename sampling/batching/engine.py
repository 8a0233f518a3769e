"""Draws the images of many users at once, each with the very bits that it has when it is drawn alone.

Each image, or chain of images, goes through its sampler by itself, in a thread of its own, as a batch of one: all
that is not the network is computed in one shape. What it asks of the network waits until every image that is
under way has asked, and is then answered in passes of one shape (`passes`). So images of any samplers, steps and
guidance share passes as long as they are of one network, a new one takes part at the next step, and one that is
cancelled ends at its next step.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from ditmoe.data.shards.images import to_uint8
from ditmoe.model.errors import UserError
from ditmoe.sampling.batching.models import Loaded, ModelKey, Models
from ditmoe.sampling.batching.passes import Call, Passes
from ditmoe.sampling.batching.queue import FairQueue
from ditmoe.sampling.chains.images import StateFile, draw_chain_images
from ditmoe.sampling.drawing.generate import draw
from ditmoe.sampling.drawing.noise import ImageNoise
from ditmoe.sampling.drawing.pixels import as_bytes
from ditmoe.sampling.network.denoiser import Denoiser, make_denoiser
from ditmoe.sampling.network.load import LoadedModel
from ditmoe.sampling.network.pace import SplitNetwork
from ditmoe.sampling.noise_level.levels import NoisePosterior
from ditmoe.sampling.settings.config import SamplerConfig
from ditmoe.sampling.settings.names import NOT_FINITE


class Cancelled(Exception):
    """Nobody waits for the image any more."""


class NotFinite(Exception):
    """An image has NaN or infinity in it."""


@dataclass(frozen=True)
class OneImage:
    """An image that was drawn."""

    image_HWC: Tensor
    """uint8 on the CPU; grey where it is not finite."""
    nfe: int
    """Evaluations of the denoiser."""
    finite: bool
    sigma: float | None = None
    """Of a chain: σ of the state that was denoised."""
    trace_T: Tensor | None = None
    """Of a chain: σ after each step since the sample before, float32."""
    passes: int = 0
    """Through the network: guidance takes two for each evaluation."""
    cached_passes: int = 0
    """Those whose blocks were extrapolated in place of asked."""

    def checked(self) -> "OneImage":
        """Itself. NotFinite where it is not."""
        if not self.finite:
            raise NotFinite(f"the image is not finite: {NOT_FINITE}")
        return self


@dataclass(eq=False)
class Ticket:
    """What is to be drawn by one thread: an image, or images of one chain."""

    user: str
    model: ModelKey
    label: int
    numbers: Sequence[int]
    """i of each image, which with the sampler's seed and the label makes it what it is."""
    sampler: SamplerConfig
    posterior: NoisePosterior | None = None
    """By which a chain chooses its levels."""
    state_file: StateFile | None = None
    """Where an unfinished chain is kept; None: nowhere."""
    drawn: "Future[list[OneImage]]" = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Threads that draw, and one that asks the networks."""

    def __init__(self, models: Models, at_once: int, limit: int) -> None:
        """Start the threads.

        Args:
            at_once: images that are under way at once.
            limit: of the queue, images of a user.
        """
        self._models = models
        self._lock = threading.Lock()
        self._wanted = threading.Condition(self._lock)
        """There is something to draw."""
        self._asked = threading.Condition(self._lock)
        """There may be something to ask the networks."""
        self._queue: FairQueue[Ticket] = FairQueue(limit)
        self._under_way = 0
        """Images between the first and the last of their evaluations."""
        self._calls: list[Call] = []
        self._closed = False
        self._threads = [threading.Thread(target=self._draw_all, daemon=True) for _ in range(at_once)]
        self._threads.append(threading.Thread(target=self._ask, daemon=True, name="network"))
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Images that nobody has begun."""
        with self._lock:
            return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def submit(self, tickets: Sequence[Ticket], *, bounded: bool = True) -> None:
        """Have the images of one user drawn; `Ticket.drawn` gets them.

        Args:
            bounded: the limits of the queue hold.

        Raises:
            QueueFull: they do not fit.
        """
        if tickets:
            with self._lock:
                self._queue.put(tickets[0].user, tickets, bounded=bounded)
                self._wanted.notify(len(tickets))

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Draw these no further: at once where nobody has begun, otherwise at the next step."""
        with self._lock:
            for ticket in tickets:
                ticket.cancelled.set()
                if self._queue.remove(ticket.user, ticket):
                    ticket.drawn.set_exception(Cancelled())

    def close(self) -> None:
        """End all threads; what is under way is cancelled."""
        with self._lock:
            self._closed = True
            while (ticket := self._queue.take()) is not None:
                ticket.drawn.set_exception(Cancelled())
            self._wanted.notify_all()
            self._asked.notify_all()
        for thread in self._threads:
            thread.join(timeout=30)

    def _draw_all(self) -> None:
        """One image after another."""
        while True:
            with self._lock:
                while (ticket := self._queue.take()) is None and not self._closed:
                    self._wanted.wait()
            if ticket is None:
                return
            try:
                with self._models.use(ticket.model) as loaded, torch.inference_mode():
                    images = self._draw(ticket, loaded)
            except BaseException as error:
                ticket.drawn.set_exception(error)
            else:
                ticket.drawn.set_result(images)

    def _draw(self, ticket: Ticket, loaded: Loaded) -> list[OneImage]:
        """From noise to bytes."""
        model, passes = loaded.model, loaded.passes
        config, device = ticket.sampler.resolved(model.objective_config), self._models.device
        channels, size = model.model_config.channels, model.model_config.image_size
        assert channels and size
        self._check(ticket)
        denoiser = make_denoiser(
            _Asking(partial(self._network, ticket, passes), model.network),
            model.model_config,
            model.objective_config,
            config,
        )
        shape = (channels, size, size)
        if config.chains:
            return self._draw_chain(ticket, model, denoiser, config, shape)
        [number] = ticket.numbers
        noise = ImageNoise(config.seed, [number], shape, device)
        label_B = torch.tensor([ticket.label], device=device)
        initial_BCHW = noise.initial()
        with self._taking_part():
            drawn = draw(denoiser, label_B, initial_BCHW, noise, config)
        pixels_BCHW = (drawn.x_BCHW if model.vae is None else model.vae.decode(drawn.x_BCHW)).float().cpu()
        finite = bool(pixels_BCHW.isfinite().all())
        image_HWC = to_uint8(pixels_BCHW if finite else torch.zeros_like(pixels_BCHW))[0].permute(1, 2, 0)
        nfe = drawn.nfe if drawn.nfe_B is None else int(drawn.nfe_B[0])
        full, cached = denoiser.network_evaluations, denoiser.cached_evaluations
        return [OneImage(image_HWC.contiguous(), nfe, finite, passes=full, cached_passes=cached)]

    def _draw_chain(
        self,
        ticket: Ticket,
        model: LoadedModel,
        denoiser: Denoiser,
        config: SamplerConfig,
        shape: tuple[int, int, int],
    ) -> list[OneImage]:
        """As far as the last of its images."""
        assert ticket.posterior is not None
        label_N = torch.full((len(ticket.numbers),), ticket.label, device=self._models.device)

        def to_bytes(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
            image_BHWC, finite_B = as_bytes(x_BCHW if model.vae is None else model.vae.decode(x_BCHW))
            return image_BHWC.cpu(), finite_B.cpu()

        with self._taking_part():
            drawn = draw_chain_images(
                denoiser,
                ticket.posterior,
                config,
                label_N,
                ticket.numbers,
                shape,
                to_bytes,
                batch=1,
                state_file=ticket.state_file,
            )
        guided = 1 if config.cfg_scale == 1 else 2
        return [
            OneImage(image_HWC, int(nfe), bool(finite), float(sigma), trace_T, int(nfe) * guided)
            for image_HWC, nfe, sigma, trace_T, finite in zip(*drawn, strict=True)
        ]

    @contextmanager
    def _taking_part(self) -> Iterator[None]:
        """Passes wait for what the body asks of the network."""
        with self._lock:
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                self._asked.notify()

    def _network(
        self,
        ticket: Ticket,
        passes: Passes,
        input_BCHW: Tensor,
        timestep_B: Tensor,
        label_B: Tensor,
        *,
        hidden: bool = False,
    ) -> Tensor:
        """What the network predicts, or what leaves its blocks, in a pass with what others ask."""
        self._check(ticket)
        call = Call(passes, input_BCHW, timestep_B, label_B, hidden)
        with self._lock:
            self._calls.append(call)
            self._asked.notify()
        call.done.wait()
        if call.error is not None:
            raise RuntimeError("the network failed") from call.error
        assert call.output_BCHW is not None
        return call.output_BCHW

    def _check(self, ticket: Ticket) -> None:
        if ticket.cancelled.is_set() or self._closed:
            raise Cancelled

    def _ask(self) -> None:
        """Answer all calls, whenever each image that is under way has one or has ended."""
        with torch.inference_mode():
            while True:
                with self._lock:
                    self._asked.wait_for(
                        lambda: (
                            (self._calls and len(self._calls) >= self._under_way)
                            or (self._closed and not self._under_way)
                        )
                    )
                    calls, self._calls = self._calls, []
                if not calls:
                    return
                calls.sort(key=lambda call: (id(call.passes), call.hidden))
                for (passes, _), group in groupby(calls, key=lambda call: (call.passes, call.hidden)):
                    passes.run(list(group))


class _Asking:
    """A network whose blocks are asked in passes with what others ask; what follows them is of one image."""

    def __init__(self, ask: Callable[..., Tensor], network: nn.Module) -> None:
        self._ask, self._split = ask, cast(SplitNetwork, network)

    def __call__(self, input_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        return self._ask(input_BCHW, timestep_B, label_B)

    def hidden(self, x_BCHW: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """As of the network."""
        return self._ask(x_BCHW, timestep_B, label_B, hidden=True)

    def predict_hidden(self, x_BTD: Tensor, timestep_B: Tensor, label_B: Tensor) -> Tensor:
        """As of the network, in the image's own thread."""
        return self._split.predict_hidden(x_BTD, timestep_B, label_B)


def users_mistake(error: BaseException) -> bool:
    """Whether an image failed because of what was asked for."""
    return isinstance(error, UserError | NotFinite)
