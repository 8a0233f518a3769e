"""The program beside a run that hands its figures to Weights & Biases or MLflow; see `aside.py`.

    python -m ditmoe.launcher.loggers.beside wandb|mlflow FOLDER NAME

It reads a JSON object a line. Its output is one line, where it fails: why.
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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from ditmoe.data.storage.stopping import STOP_SIGNALS
from ditmoe.model.outside.files import replacing

PROJECT: Final = "ditmoe"
"""Of W&B, and the experiment of MLflow, where no variable names another."""


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, folder: Path, name: str) -> None:
        import wandb

        known = remembered(folder, "wandb") or {"id": secrets.token_hex(8)}
        remember(folder, "wandb", known)
        # Without a key wandb would ask for one; offline it writes what `wandb sync` sends later.
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._library = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=known["id"],
            name=name,
            dir=str(folder),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Steps that came before are passed over, as after a resume."""
        self._run.log(dict(values), step=step)

    def image(self, name: str, image: bytes, step: int) -> None:
        """A PNG."""
        from PIL import Image

        self._run.log({name: self._library.Image(Image.open(io.BytesIO(image)))}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """The configuration becomes the run's own."""
        values = yaml.safe_load(text)
        self._run.config.update(values if isinstance(values, dict) else {name: text}, allow_val_change=True)

    def close(self, outcome: str) -> None:
        """Send what is left."""
        self._run.finish(exit_code={"complete": 0, "stopped": 75}.get(outcome, 1))


class Mlflow:
    """A run of MLflow."""

    def __init__(self, folder: Path, name: str) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
        self._client = MlflowClient(uri)
        known = remembered(folder, "mlflow")
        store = hashlib.sha256(uri.encode()).hexdigest()[:16]  # an address may have a password in it
        if known is not None and known["store"] == store:
            self._id = known["run_id"]
            self._client.update_run(self._id, "RUNNING")
        else:
            self._id = self._new(name)
            remember(folder, "mlflow", {"run_id": self._id, "store": store})
        history = self._client.get_metric_history(self._id, "progress/images")
        self._last = max((metric.step for metric in history), default=-1)
        """Step of the last record; earlier ones are there already, as after a resume."""

    def _new(self, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        return str(self._client.create_run(number, run_name=name).info.run_id)

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


def show(board: Wandb | Mlflow, lines: Iterable[str]) -> None:
    """Hand on what comes, until its end."""
    outcome = "failed"  # where the run was killed
    for text in lines:
        line: dict[str, Any] = json.loads(text)
        if "end" in line:
            outcome = line["end"]
        elif "figures" in line:
            board.figures(line["step"], line["figures"])
        elif "image" in line:
            board.image(line["name"], base64.b64decode(line["image"]), line["step"])
        else:
            board.text(line["name"], line["text"], line["step"])
    board.close(outcome)


def main() -> None:
    """Show a run until its input ends; the run alone is asked to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    kind, folder, name = sys.argv[1:]
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints goes to the file
    try:
        show(KINDS[kind](Path(folder), name), sys.stdin)
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}"[:500], file=told, flush=True)
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)  # threads of the library may wait for a network


if __name__ == "__main__":
    main()
