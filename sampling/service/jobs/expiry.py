"""Removes what expired jobs have made. What an evaluation wrote into its run's folder is the run's, and stays."""

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Final

from ditmoe.sampling.service.jobs.store import EXPIRED, JobStore

LOG: Final = logging.getLogger("ditmoe.service")
LOOK_SECONDS: Final = 30.0


class Sweeper:
    """A thread that looks now and then."""

    def __init__(self, store: JobStore, seconds: float | None = None) -> None:
        """Start the thread."""
        self._store, self._seconds = store, LOOK_SECONDS if seconds is None else seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="expiry")
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        pending: set[str] | None = None
        while True:
            try:
                # Marked first: no job loses its files without a mark, also where the service is killed here.
                marked = self._store.expire()
                pending = self._left_behind() if pending is None else pending | set(marked)
                pending = {job_id for job_id in pending if not _removed(self._store.folder_of(job_id))}
            except Exception:  # such as a full disk
                LOG.exception("what has expired could not be removed")
            if self._closing.wait(self._seconds):
                return

    def _left_behind(self) -> set[str]:
        """Jobs that are marked and have files."""
        folder = self._store.folder_of("")
        names = os.listdir(folder) if folder.is_dir() else []
        jobs = [self._store.get(name) for name in names]
        return {job.id for job in jobs if job is not None and job.state == EXPIRED}


def _removed(folder: Path) -> bool:
    """Remove a folder; False: it could not be."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return True
    except OSError as error:
        LOG.warning("%s: could not be removed: %s", folder, error)
        return False
    return True
