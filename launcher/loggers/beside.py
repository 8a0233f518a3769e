"""The program beside a run that hands its figures to Weights & Biases or MLflow; see `aside.py`.

    python -m ditmoe.launcher.loggers.beside wandb|mlflow FOLDER NAME [EVALUATION]

It reads a JSON object a line. Its output is one line, where it fails: why. With EVALUATION it shows evaluations
that follow the run, as a run of their own beside the run's: steps come in any order there, and what was handed
on is noted in a file.
"""

import base64
import hashlib
import io
import json
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import yaml

from ditmoe.data.storage.files import open_appending
from ditmoe.data.storage.stopping import STOP_SIGNALS
from ditmoe.model.outside.files import replacing

PROJECT: Final = "ditmoe"
"""Of W&B, and the experiment of MLflow, where no variable names another."""
STEP: Final = "progress/step"
"""W&B's axis of evaluations: the step of training."""


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, folder: Path, name: str, evaluation: str | None = None) -> None:
        import wandb

        self._folder, self._key = folder, key_of("wandb", evaluation)
        self._known = remembered(folder, self._key) or {"id": secrets.token_hex(8)}
        remember(folder, self._key, self._known)
        # Without a key wandb would ask for one; offline it writes what `wandb sync` sends later.
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._library = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=self._known["id"],
            name=shown_name(name, evaluation),
            group=name,
            job_type="train" if evaluation is None else "evaluation",
            dir=str(folder),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        self._in_order = evaluation is None
        if not self._in_order:
            self._run.define_metric(STEP)
            self._run.define_metric("evaluation/*", step_metric=STEP)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Of training, steps that came before are passed over, as after a resume; offline W&B would take them."""
        if self._in_order:
            if step <= int(self._known.get("last", -1)):
                return
            self._known["last"] = str(step)
        self._log(step, dict(values))
        if self._in_order:
            remember(self._folder, self._key, self._known)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self._in_order:
            self._run.log(values, step=step)
        else:  # its own steps only grow
            self._run.log({STEP: step, **values})

    def image(self, name: str, image: bytes, step: int) -> None:
        """A PNG."""
        from PIL import Image

        self._log(step, {name: self._library.Image(Image.open(io.BytesIO(image)))})

    def text(self, name: str, text: str, step: int) -> None:
        """The configuration becomes the run's own."""
        values = yaml.safe_load(text)
        self._run.config.update(values if isinstance(values, dict) else {name: text}, allow_val_change=True)

    def close(self, outcome: str) -> None:
        """Send what is left."""
        self._run.finish(exit_code={"complete": 0, "stopped": 75}.get(outcome, 1))


class Mlflow:
    """A run of MLflow."""

    def __init__(self, folder: Path, name: str, evaluation: str | None = None) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
        self._client = MlflowClient(uri)
        key = key_of("mlflow", evaluation)
        known, training = remembered(folder, key), remembered(folder, "mlflow")
        store = hashlib.sha256(uri.encode()).hexdigest()[:16]  # an address may have a password in it
        if known is not None and known["store"] == store:
            self._id = known["run_id"]
            self._client.update_run(self._id, "RUNNING")
        else:
            beside = evaluation is not None and training is not None and training["store"] == store
            parent = {"mlflow.parentRunId": training["run_id"]} if beside and training is not None else {}
            self._id = self._new(shown_name(name, evaluation), parent)
            remember(folder, key, {"run_id": self._id, "store": store})
        history = [] if evaluation else self._client.get_metric_history(self._id, "progress/images")
        self._last = max((metric.step for metric in history), default=-1)
        """Step of the last record; earlier ones are there already, as after a resume."""

    def _new(self, name: str, tags: dict[str, str]) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        return str(self._client.create_run(number, run_name=name, tags=tags).info.run_id)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """All of a step at once."""
        from mlflow.entities import Metric

        if step <= self._last:
            return
        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in values.items() if math.isfinite(value)]
        for first in range(0, len(metrics), 1000):  # MLflow takes no more at once
            self._client.log_batch(self._id, metrics[first : first + 1000])

    def image(self, name: str, image: bytes, step: int) -> None:
        """A PNG."""
        from PIL import Image

        self._client.log_image(self._id, Image.open(io.BytesIO(image)), f"images/{name} {step:08d}.png")

    def text(self, name: str, text: str, step: int) -> None:
        """A file."""
        self._client.log_text(self._id, text, f"{name}.txt")

    def close(self, outcome: str) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._id, {"complete": "FINISHED", "stopped": "KILLED"}.get(outcome, "FAILED"))


def key_of(kind: str, evaluation: str | None) -> str:
    """Under which name the files of a board are kept beside the run."""
    return kind if evaluation is None else f"{kind}-{evaluation}"


def shown_name(run: str, evaluation: str | None) -> str:
    """What a run is called there."""
    return run if evaluation is None else f"{run} {evaluation}"


KINDS: Final[dict[str, type[Wandb] | type[Mlflow]]] = {"wandb": Wandb, "mlflow": Mlflow}


def remembered(folder: Path, kind: str) -> dict[str, str] | None:
    """What an earlier start of the run was called by the library; None: there was none."""
    try:
        found = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return {str(key): str(value) for key, value in found.items()}


def remember(folder: Path, kind: str, known: Mapping[str, str]) -> None:
    """Keep what the library calls the run."""
    with replacing(folder / f"{kind}.json") as file:
        file.write(json.dumps(known).encode() + b"\n")


def handed_on(folder: Path, key: str) -> set[tuple[str, int]]:
    """(name, step) of all that an evaluation's board was given; the last line may be cut short by a kill."""
    try:
        lines = notes_of(folder, key).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return set()
    found = set()
    for line in lines:
        with suppress(ValueError, TypeError):
            name, step = json.loads(line)
            found.add((str(name), int(step)))
    return found


def notes_of(folder: Path, key: str) -> Path:
    """Where what is handed on is noted, a JSON list `[name, step]` a line."""
    return folder / f"{key}.jsonl"


def show(board: Wandb | Mlflow, lines: Iterable[str], note: Callable[[str, int], None]) -> None:
    """Hand on what comes, until its end."""
    outcome = "failed"  # where the run was killed
    for text in lines:
        line: dict[str, Any] = json.loads(text)
        if "end" in line:
            outcome = line["end"]
        elif "figures" in line:
            board.figures(line["step"], line["figures"])
            for name in line["figures"]:
                note(name, line["step"])
        elif "image" in line:
            board.image(line["name"], base64.b64decode(line["image"]), line["step"])
            note(line["name"], line["step"])
        else:
            board.text(line["name"], line["text"], line["step"])
    board.close(outcome)


def main() -> None:
    """Show a run until its input ends; the run alone is asked to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    kind, place, name, *rest = sys.argv[1:]
    folder, evaluation = Path(place), rest[0] if rest else None
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints goes to the file
    notes = notes_of(folder, key_of(kind, evaluation))

    def note(shown: str, step: int) -> None:
        if evaluation is not None:
            with open_appending(notes) as file:
                file.write(json.dumps([shown, step]).encode() + b"\n")

    try:
        show(KINDS[kind](folder, name, evaluation), sys.stdin, note)
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500], file=told, flush=True)
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)  # threads of the library may wait for a network


if __name__ == "__main__":
    main()
