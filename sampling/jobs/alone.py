"""The start of a job: its processes alone at their folder, which the first of them makes theirs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ditmoe.data.storage.claims import Claims
from ditmoe.model.errors import UserError
from ditmoe.sampling.jobs.workers import Workers


@contextmanager
def alone_at(
    claims: Claims, name: str, workers: Workers, busy: str, begin: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """Hold the claim of a job for the body; every process of the job comes here.

    Args:
        claims: where the claim lies.
        name: of the claim.
        workers: this process among those of the job; the first one holds the claim.
        busy: what is said when another job holds it, such as `FOLDER: another process is at this evaluation`.
        begin: called by the first process, while the others wait.

    Yields:
        A function for the first process to call before it writes what the job writes once: UserError when the job
        was taken for dead meanwhile, and another may be at the folder.

    Raises:
        UserError: another job holds the claim, or `begin` raised it.
    """
    with ExitStack() as stack:
        claim = stack.enter_context(claims.taken(name)) if workers.first else None

        def start() -> None:
            if claim is None:
                raise UserError(f"{busy}{claims.who(name)}; wait for it, or stop it")
            begin()

        def check() -> None:
            assert claim is not None
            if not claim.held():
                raise UserError(
                    f"{claims.folder}: this process gave no sign of life for so long that it was taken for dead, "
                    "and another one may be at work there; repeat the command"
                )

        workers.on_first(start)
        yield check
