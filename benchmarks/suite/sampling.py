"""Drawing a batch with Euler's method and guidance, against the plain baseline's."""

from collections.abc import Iterator

from benchmarks import plain
from benchmarks.suite.figure import Figure, in_turns, rate
from benchmarks.suite.machine import DTYPES
from benchmarks.suite.networks import SCALE, STEPS, Drawing, our_network, plain_network
from benchmarks.suite.settings import Settings
from ditmoe.model.count import count


def measure(settings: Settings) -> Iterator[Figure]:
    """In fp32 and in bf16."""
    config, drawing = settings.model, Drawing(settings)
    theirs = plain_network(config).to(settings.device)
    networks = {
        precision: our_network(config).to(settings.device, dtype).eval() for precision, dtype in DTYPES.items()
    }
    contenders = {
        "plain": lambda: plain.sample(theirs, drawing.start_BCHW, drawing.label_B, STEPS, SCALE),
        **{precision: lambda precision=precision: drawing(networks[precision]) for precision in DTYPES},
    }
    seconds = in_turns(contenders, settings.rounds_of(5), settings.device)
    for precision in DTYPES:
        limit = settings.limits.seconds(precision, 2 * drawing.passes * count(config).flops)
        name = f"guided Euler steps {settings.model_name}, batch {settings.batch}, {precision}"
        yield rate(
            name,
            "images/s",
            drawing.passes,
            seconds[precision],
            seconds["plain"],
            limit=limit,
            against="plain, fp32",
        )
