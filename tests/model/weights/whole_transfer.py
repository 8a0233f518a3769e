"""What a run starts from, by the plain rule: each parameter of the source whole, and each value whole."""

from collections.abc import Callable, Mapping

from torch import Tensor

from ditmoe.model.weights.transfer import Value

Fetch = Callable[[str], Tensor]
Initial = Callable[[str, tuple[int, ...]], Tensor]
"""Name and shape of a canonical parameter → its value."""


def transferred(values: Mapping[str, Value], fetch: Fetch, fresh: Initial) -> Initial:
    """The first value of any parameter, by name and shape.

    Args:
        fetch: gives a parameter of the source.
        fresh: gives the fresh value of a parameter.
    """

    def initial(name: str, shape: tuple[int, ...]) -> Tensor:
        value = values[name]
        if value.source is None:
            return fresh(name, shape) * value.scale
        copied = fetch(value.source).float() * value.scale
        if value.kept == "all":
            return copied.reshape(shape)
        whole = fresh(name, shape) * value.beside
        if value.kept == "first rows":
            whole[: len(copied)] = copied
        elif value.kept == "first columns":
            whole[:, : copied.shape[1]] = copied
        else:
            whole[-1] = copied[-1]
        return whole

    return initial
