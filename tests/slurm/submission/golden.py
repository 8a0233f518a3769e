"""The scripts that the golden files hold. `python -m tests.slurm.submission.golden` writes them anew."""

from pathlib import Path
from typing import Any, Final

from ditmoe.slurm.job_folder import Job, dataset_folder, evaluation_folder, training_folder
from ditmoe.slurm.submission.script import Request, render, step_options, task_start
from ditmoe.slurm.submission.settings import JobSettings

FOLDER: Final = Path(__file__).with_name("golden")


def request(verb: str = "train", run: str = "/runs/tiny", after: str | None = None, **values: Any) -> Request:
    """A request with settings, as `ditmoe submit` makes it."""
    settings = JobSettings.model_validate(values)
    folder = {
        "train": training_folder(Path(run)),
        "evaluate": evaluation_folder(Path(run), ["--count=50000", "runs/tiny"]),
    }.get(verb, dataset_folder(Path(run)))
    seen = ("/home/ann", run)
    job = Job(
        name="ditmoe-tiny-0123ab",
        verb=verb,
        arguments=(verb, "--", "x"),
        run=run,
        nodes=settings.nodes,
        tasks_per_node=settings.tasks,
        gpus_per_node=settings.gpus_per_node,
        directory="/home/ann",
        python=settings.python or "/opt/ditmoe/bin/python",
        task=task_start(settings, "/opt/ditmoe/bin/python", "/home/ann", seen),
        srun=step_options(settings, "/home/ann", seen),
        limits=settings.limit_seconds,
        warning=settings.warning_seconds,
        chain=settings.chain,
    )
    return Request(job, folder, settings, after)


CASES: Final = {
    "cpu": request(),
    "gpus": request(
        nodes=16,
        gpus_per_node=8,
        cpus_per_task=12,
        mem="0",
        time="1-00:00:00",
        partition="large,small",
        account="team",
        qos="long",
        constraint="[rack1|rack2]&ib",
        gpu_type="h100",
        warning=600,
        sbatch={"exclusive": None, "mail-type": "END,FAIL", "comment": 'Ann\'s "big" run', "nice": 100},
        environment={"NCCL_DEBUG": "WARN", "MESSAGE": "it's $HOME; rm -rf /"},
        preamble="module purge\nmodule load cuda/12.9\n",
    ),
    "evaluation": request("evaluate", after="afterok:123", time=60, gpus_per_node=4, gpu_request="gres"),
    "odd-names": request(
        run='/runs/50% of $HOME; `touch x` "it\'s" #1 é',
        python="/opt/my python/bin/python",
        sbatch={"dependency": "afterany:7"},
    ),
}


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.sbatch"


if __name__ == "__main__":
    for case, made in CASES.items():
        path_of(case).write_text(render(made), encoding="utf-8")
