"""Images that are answered at once: from a request to its tickets, and from what was drawn to the reply."""

import asyncio
import base64
import io
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any, Final

import numpy as np
from PIL import Image
from starlette.requests import Request
from torch import Tensor

from ditmoe.sampling.batching.engine import Cancelled, Engine, NotFinite, Ticket, users_mistake
from ditmoe.sampling.batching.models import ModelKey, ModelUnavailable
from ditmoe.sampling.batching.queue import QueueFull
from ditmoe.sampling.chains.images import StateFile
from ditmoe.sampling.service.access import user_of
from ditmoe.sampling.service.counters import Counters
from ditmoe.sampling.service.errors import ServiceError
from ditmoe.sampling.service.listing import Listed, Listing
from ditmoe.sampling.service.posteriors import Posteriors
from ditmoe.sampling.service.requests import ImageRequest, check_cost

LOG: Final = logging.getLogger("ditmoe.service")


def tickets_of(request: ImageRequest, listed: Listed, user: str, posteriors: Posteriors) -> list[Ticket]:
    """What is to be drawn. ServiceError: a class is unknown, or there is no classifier for chains."""
    config = request.sampler_config().for_a_look(listed.info.objective)
    numbers, samples = range(request.first, request.first + request.count), config.images_per_unit
    classes = len(listed.class_names)
    if request.labels is not None:
        labels = [listed.label_of(given, f"labels.{place}") for place, given in enumerate(request.labels)]
    elif request.one_class is not None:
        labels = [listed.label_of(request.one_class, "class")] * request.count
    else:
        labels = [number // samples % classes for number in numbers]
    for place in range(1, len(numbers)):
        if numbers[place] % samples and labels[place] != labels[place - 1]:
            raise ServiceError(
                400,
                f"labels.{place}: images {numbers[place] - 1} and {numbers[place]} are of one chain of {samples}; "
                "expected one class for both",
                param=f"labels.{place}",
            )
    return tickets_for(
        numbers,
        labels,
        Ticket(
            user,
            ModelKey(listed.checkpoint, request.weights, config.precision),
            0,
            (),
            config,
            posteriors.find(listed, config),
        ),
    )


def tickets_for(numbers: Sequence[int], labels: Sequence[int], like: Ticket) -> list[Ticket]:
    """A ticket for each image, or for the images of each chain, which have one class; all else is as of `like`.

    Where its state file is a folder, each chain gets a file in it.
    """
    samples, made = like.sampler.images_per_unit, []
    for chain, group in groupby(zip(numbers, labels, strict=True), key=lambda each: each[0] // samples):
        pairs, kept = list(group), like.state_file
        made.append(
            Ticket(
                like.user,
                like.model,
                pairs[0][1],
                [number for number, _ in pairs],
                like.sampler,
                like.posterior,
                None if kept is None else StateFile(kept.path / f"{chain:08d}.safetensors", kept.identity),
            )
        )
    return made


async def generate_images(
    http: Request,
    request: ImageRequest,
    listing: Listing,
    engine: Engine,
    counters: Counters,
    posteriors: Posteriors,
    most_images: int,
    most_passes: int,
) -> dict[str, Any]:
    """Draw the images of a request; whoever goes away before cancels them.

    Raises:
        ServiceError: naming the field that is wrong, or why there are no images.
    """
    start = time.monotonic()
    listed = await asyncio.to_thread(listing.find, request.model, request.step)
    config = request.sampler_config().for_a_look(listed.info.objective)
    check_cost(request.count, config, listed.info.objective, most_images, most_passes, first=request.first)
    tickets = await asyncio.to_thread(tickets_of, request, listed, user_of(http, request.user).name, posteriors)
    try:
        engine.submit(tickets)
    except QueueFull as error:
        raise ServiceError(
            429, f"{error}", reason="queue_full", retry_after=counters.retry_after(error.waiting)
        ) from None
    drawing = asyncio.ensure_future(_finished(tickets))
    leaving = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            raise ServiceError(499, "the client went away", reason="cancelled")
    finally:
        drawing.cancel()
        leaving.cancel()
        engine.cancel([ticket for ticket in tickets if not ticket.drawn.done()])
    found = [ticket.drawn.exception() for ticket in tickets if ticket.drawn.done()]
    errors = [error for error in found if error is not None]
    if errors:
        raise failure_of(next((error for error in errors if not isinstance(error, Cancelled)), errors[0]))
    drawn = [
        (ticket, *each) for ticket in tickets for each in zip(ticket.numbers, ticket.drawn.result(), strict=True)
    ]
    for _, _, each in drawn:
        counters.drawn(each.nfe)
    try:
        images = [each.checked() for _, _, each in drawn]
    except NotFinite as wrong:
        raise failure_of(wrong) from None
    encoded = await asyncio.to_thread(lambda: [png_of(image.image_HWC) for image in images])
    counters.seconds.observe(time.monotonic() - start)
    return {
        "created": int(time.time()),
        "model": listed.run,
        "step": listed.info.step,
        "data": [
            {
                "b64_json": base64.b64encode(png).decode("ascii"),
                "number": number,
                "seed": ticket.sampler.seed,
                "label": ticket.label,
                "class": listed.class_names[ticket.label],
                "nfe": image.nfe,
                "passes": image.passes,
                "cached_passes": image.cached_passes,
            }
            for (ticket, number, image), png in zip(drawn, encoded, strict=True)
        ],
        "sampler": tickets[0].sampler.plain(),
    }


def failure_of(error: BaseException) -> ServiceError:
    """What the client is told of an image that was not drawn."""
    if isinstance(error, ModelUnavailable):
        return ServiceError(503, str(error), param="model", reason="model")
    if users_mistake(error):
        reason = "not_finite" if isinstance(error, NotFinite) else "rejected"
        return ServiceError(400, str(error), param="sampler", reason=reason)
    if isinstance(error, Cancelled):
        return ServiceError(503, "the service ends", reason="closing", retry_after=5)
    LOG.error("images could not be drawn", exc_info=error)
    return ServiceError(500, "the images could not be drawn; the service's log says why", reason="backend")


async def _finished(tickets: Sequence[Ticket]) -> None:
    """Wait until each image is drawn, or one of them failed."""
    loop, left, done = asyncio.get_running_loop(), len(tickets), asyncio.Event()

    def one(failed: bool) -> None:
        nonlocal left
        left -= 1
        if failed or left == 0:
            done.set()

    def tell(future: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(one, future.exception() is not None)

    for ticket in tickets:
        ticket.drawn.add_done_callback(tell)
    await done.wait()


async def _gone(request: Request) -> None:
    """Wait until the client goes away; its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def png_of(image_HWC: Tensor) -> bytes:
    """An image as PNG: grey or RGB, uint8 `[H, W, 1 or 3]`; the first three channels of more."""
    array = np.asarray(image_HWC)
    array = array[:, :, 0] if array.shape[2] < 3 else array[:, :, :3]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, "PNG")
    return file.getvalue()
