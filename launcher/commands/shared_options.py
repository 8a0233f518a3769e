"""Options that several commands have, declared once."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ditmoe.model.errors import UserError

if TYPE_CHECKING:
    from ditmoe.data.crew.leader import Crew

PER_GPU: Final = "one per GPU, or 1"
PER_CORE: Final = "one per GPU, or per core"
PART_MINUTES: Final = 360.0
ListenOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS|INTERFACE",
        help="Interface or address at which the crew finds this machine, such as ib0. [default: the "
        "system's route]",
    ),
]


def with_options(
    options: Mapping[str, tuple[Any, Any]], argument: str, collect: Callable[[Mapping[str, Any]], Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options in place of one of its arguments, which then holds what they were.

    Args:
        options: option → its annotation and its default.
        argument: the command's argument.
        collect: makes that argument of the options' values; a list is a tuple there.
    """
    parameters = {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in options.items()
    }

    def mark(command: Callable[..., None]) -> Callable[..., None]:
        signature: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            signature += parameters.values() if name == argument else [parameter]

        @functools.wraps(command)
        def with_all(*arguments: Any, **given: Any) -> None:
            values = {name: given.pop(name, option.default) for name, option in parameters.items()}
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            command(*arguments, **{argument: collect(values)}, **given)

        with_all.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        with_all.__annotations__ = {parameter.name: parameter.annotation for parameter in signature}
        return with_all

    return mark


@dataclass(frozen=True)
class Sharing:
    """Who makes the parts of a command's work, as its options say."""

    processes: int | None = None
    crew: Path | None = None
    listen: str | None = None
    part_limit: float | None = None

    def __post_init__(self) -> None:
        if self.listen is not None and self.crew is None:
            raise UserError(
                f"--listen {self.listen}: workers of other machines join by --crew FOLDER; expected both"
            )
        if self.crew is None and self.processes == 0:
            raise UserError("--processes 0: expected 1 or more, or --crew FOLDER for workers that join")

    def count(self, *, per_core: bool = False, gpus: bool = True, most: int | None = None) -> int:
        """Processes of this machine.

        Args:
            per_core: without GPUs one for each core, where the option is left out.
            gpus: whether they compute on GPUs where there are any.
            most: as many as there is work for; None: not known.
        """
        import torch

        from ditmoe.launcher.local.launch import threads_per_process

        usual = (torch.cuda.device_count() if gpus else 0) or (threads_per_process(1) if per_core else 1)
        count = usual if self.processes is None else self.processes
        return count if most is None else min(count, max(1, most))

    def arguments(self) -> list[str]:
        """The options again, for a command line."""
        arguments = [] if self.processes is None else [f"--processes={self.processes}"]
        for name, value in (("crew", self.crew), ("listen", self.listen), ("part-limit", self.part_limit)):
            arguments += [] if value is None else [f"--{name}={value}"]
        return arguments

    def leads(self, count: int, ranks: int = 1) -> bool:
        """Whether a process, one of so many ranks, leads workers, where it is to have `count` of its own.

        UserError where an option says something of workers, and there would be none.
        """
        if self.crew is not None and ranks > 1:
            raise UserError(f"--crew {self.crew}: one process leads it, and this is one of {ranks}")
        if self.crew is not None or (count > 1 and ranks == 1):
            return True
        if self.part_limit is not None:
            raise UserError(
                f"--part-limit {self.part_limit:g}: is of workers that one process leads, and there would be "
                "none; expected --processes above 1 or --crew FOLDER beside it, without srun and torchrun"
            )
        return False

    @contextmanager
    def led(
        self,
        logs: Path | None = None,
        *,
        per_core: bool = False,
        gpus: bool = True,
        most: int | None = None,
        again: Sequence[str] | None = None,
        together: int = 1,
    ) -> "Iterator[Crew | None]":
        """Lead a crew for the body, where several processes or workers that join make the parts.

        None: this process makes them, alone or as one of the ranks that torchrun or srun started. A task of srun
        that has a node to itself, among others, ends here: it starts ranks in its place, and waits for them.

        Args:
            logs: folder of the output of such ranks; None: a temporary one.
            per_core: as of `count`, and so are `gpus` and `most`.
            again: the command line of such ranks; None: that of this process.
            together: so many ranks share out one network; above 1 there are ranks, and no crew.

        Raises:
            UserError: the options do not go together, or as `lead_crew`.
            typer.Exit: when ranks have ended.
        """
        from ditmoe.data.storage.files import make_folder
        from ditmoe.launcher.local.crew_workers import leads_crew
        from ditmoe.launcher.local.launch import spawn
        from ditmoe.parallel.ranks import this_process

        process = this_process()
        asked = self.processes is not None or self.crew is not None
        count = 1
        if process.starts_ranks or (process.ranks == 1 and asked):
            count = self.count(per_core=per_core, gpus=gpus, most=most)
        for option, value in (("--crew", self.crew), ("--part-limit", self.part_limit)):
            if together > 1 and value is not None:
                raise UserError(f"--expert-parallel {together}: expected without {option}")
        if together > 1 and count == 1 and self.processes is None and not process.started:
            count = together
        if together == 1 and self.leads(count, process.ranks):
            minutes = self.part_limit or PART_MINUTES
            with leads_crew(self.crew, count, minutes, _say, self.listen, gpus=gpus) as crew:
                yield crew
        elif count > 1:
            if logs is not None:
                make_folder(logs)
            raise typer.Exit(spawn(sys.argv[1:] if again is None else again, count, log_dir=logs))
        else:
            yield None


def start_leader(
    options: Sequence[str],
    arguments: Sequence[str],
    sharing: Sharing,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Do a command in a process of its own, which leads those that make its parts; its exit code.

    Args:
        options: verb and options, without those of the sharing.
        arguments: what follows them.
        environment: further variables.
    """
    from ditmoe.launcher.local.launch import spawn, threads_per_process

    count = sharing.count()
    told = replace(sharing, processes=count).arguments()
    return spawn(
        [*options, *told, *arguments],
        1,
        threads=None if "OMP_NUM_THREADS" in os.environ else threads_per_process(max(count, 1)),
        environment=environment,
        quiet=True,
    )


def shares_work(usual: str = PER_GPU) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that say who makes the parts of its work, where it has its argument `sharing`.

    Args:
        usual: how many processes there are where the option is left out: PER_GPU or PER_CORE.
    """
    options: dict[str, tuple[Any, Any]] = {
        "processes": (
            Annotated[
                int | None,
                typer.Option(min=0, help=f"Processes on this machine that share the work. [default: {usual}]"),
            ],
            None,
        ),
        "crew": (
            Annotated[
                Path | None,
                typer.Option(
                    metavar="FOLDER",
                    help="Folder through which workers on any machine join: `ditmoe worker FOLDER`.",
                ),
            ],
            None,
        ),
        "listen": (ListenOption, None),
        "part_limit": (
            Annotated[
                float | None,
                typer.Option(
                    min=0.01,
                    metavar="MINUTES",
                    help=f"Replace a worker that takes longer for one part. [default: {PART_MINUTES:g}]",
                ),
            ],
            None,
        ),
    }
    return with_options(options, "sharing", lambda values: Sharing(**values))


def _say(line: str) -> None:
    typer.echo(line, err=True)
