"""An array of jobs: each element runs the batch script of a job folder, which can also be handed in by itself."""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Final

from ditmoe.data.storage.files import make_folder, replacing
from ditmoe.slurm.client import Queue
from ditmoe.slurm.submission.script import Request, options_of
from ditmoe.slurm.submission.submit import write_job
from ditmoe.slurm.submission.values import in_file_name, in_option, in_shell, plain_path

TEMPLATE: Final = Path(__file__).resolve().parents[1] / "templates" / "array.sbatch"
_OWN: Final = ("job-name=", "output=", "dependency=", "kill-on-invalid-dep=")
"""Options of a single job that an array has otherwise: by `singleton` its elements would wait for each other."""


class _Template(Template):
    delimiter = "@"


def render_array(
    name: str, folder: Path, requests: Mapping[int, Request], after: str | None = None, at_once: int | None = None
) -> str:
    """The batch script of an array.

    Args:
        name: in the queue.
        folder: of what an element prints before its own output begins, absolute.
        requests: number of the element → its job; all ask for the same of Slurm.
        after: a dependency as sbatch takes it.
        at_once: elements that run at the same time, at most.

    Raises:
        ValueError: the folder's name has what a script cannot have.
    """
    plain_path(str(folder))
    elements = ",".join(map(str, requests)) + ("" if at_once is None else f"%{at_once}")
    options = [
        f"job-name={in_option(name)}",
        f"output={in_option(in_file_name(str(folder)) + '/output-%A_%a.txt')}",
        f"array={elements}",
        *([] if after is None else [f"dependency={in_option(after)}", "kill-on-invalid-dep=yes"]),
        *(line for line in options_of(next(iter(requests.values()))) if not line.startswith(_OWN)),
    ]

    def entries(values: Mapping[int, str]) -> str:
        return "\n".join(f"    [{number}]={in_shell(value)}" for number, value in values.items())

    return _Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        options="\n".join(f"#SBATCH --{line}" for line in options),
        scripts=entries({number: str(request.folder.script) for number, request in requests.items()}),
        outputs=entries({number: str(request.folder.path) for number, request in requests.items()}),
        names=entries({number: request.job.name for number, request in requests.items()}),
    )


def submit_array(
    script: Path,
    text: str,
    requests: Mapping[int, Request],
    configs: Mapping[int, tuple[str, bool]],
    queue: Queue,
) -> str:
    """Write the job folder of each element and the script, and hand it to Slurm; returns the array's id.

    Args:
        script: where it goes.
        text: of the script, as `render_array` made it.
        configs: number → text of the configuration that the element trains, and whether nobody but the owner may
            read it.

    Raises:
        UserError: the file system or sbatch refuses.
    """
    make_folder(script.parent)
    for number, request in requests.items():
        config, private = configs.get(number, (None, False))
        write_job(request, config, private)
    with replacing(script) as file:
        file.write(text.encode(errors="surrogateescape"))
    return queue.submit(script)
