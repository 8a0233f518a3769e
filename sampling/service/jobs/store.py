"""Jobs in a SQLite file: what was promised is on disk before anybody is told, and outlives whoever is killed.

A job is queued, in_progress, and then completed, failed or cancelled, which it stays until it expires: then what
it made is removed, and that it was stays known. One service at a time has the folder.
"""

import fcntl
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Final

from sqlalchemy import URL, create_engine, event, func, inspect, select, text, update
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from ditmoe.data.storage.files import make_folder
from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import sync_folder

FILE: Final = "jobs.sqlite"
QUEUED, IN_PROGRESS = "queued", "in_progress"
COMPLETED, FAILED, CANCELLED, EXPIRED = "completed", "failed", "cancelled", "expired"
ENDED: Final = (COMPLETED, FAILED, CANCELLED, EXPIRED)


class TooManyJobs(Exception):
    """A user has as many unfinished jobs as one may have."""


class _Base(DeclarativeBase):
    pass


class Job(_Base):
    """A row; a copy that its reader may keep."""

    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    key: Mapped[str | None] = mapped_column(unique=True)
    """The user, and a key of the client's own: a request that is repeated is one job."""
    user: Mapped[str]
    kind: Mapped[str] = mapped_column(index=True)
    request: Mapped[str]
    """JSON, with the step of the checkpoint filled in."""
    weights: Mapped[str]
    """Fingerprint of the checkpoint: what is drawn later is drawn from the same."""
    state: Mapped[str] = mapped_column(index=True)
    created: Mapped[float]
    """Seconds since 1970, as the others."""
    started: Mapped[float | None]
    completed: Mapped[float | None]
    """When it ended, however it did."""
    expires: Mapped[float | None]
    """When what it made is removed; None: it has not ended, or never."""
    done: Mapped[int] = mapped_column(default=0)
    """Images that are there."""
    total: Mapped[int]
    error: Mapped[str | None]
    cancelling: Mapped[bool] = mapped_column(default=False)
    attempts: Mapped[int] = mapped_column(default=0)
    """Times that it was taken up since `done` grew."""
    folder: Mapped[str | None]
    """Of an evaluation, where its results lie."""

    def plain(self) -> dict[str, Any]:
        """As routes and clients have it."""
        return {
            "id": self.id,
            "object": "job",
            "kind": self.kind,
            "status": self.state,
            "cancelling": self.cancelling and self.state not in ENDED,
            "created_at": self.created,
            "started_at": self.started,
            "completed_at": self.completed,
            "expires_at": self.expires,
            "progress": {"done": self.done, "total": self.total},
            "error": None if self.error is None else {"message": self.error},
        }


class JobStore:
    """The jobs of one folder. For any number of threads of one process."""

    def __init__(self, folder: Path, most_of_user: int = 100, keep_seconds: float | None = None) -> None:
        """Take the folder, which is made where it is not there; what was in progress is queued again.

        Args:
            most_of_user: unfinished jobs of a user.
            keep_seconds: after which a job that has ended expires; None: never. What a job was told stays.

        Raises:
            UserError: another service has the folder, or its file is damaged.
        """
        make_folder(folder)
        self.folder = folder
        self._most, self._keep = most_of_user, keep_seconds
        os.chmod(folder, 0o700)
        self._held = open(folder / "lock", "ab")  # noqa: SIM115  # held until `close`
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._held.close()
            raise UserError(f"{folder}: another service keeps its jobs there; expected one, or --state") from error
        self._writing = Lock()
        self._engine = create_engine(URL.create("sqlite", database=str(folder / FILE)))
        event.listen(self._engine, "connect", _prepare)
        try:
            _Base.metadata.create_all(self._engine)
            self._add_columns()
            self.left = self._take_back()
            """Jobs that were in progress when the service before this one ended."""
        except DatabaseError as error:
            self.close()
            raise UserError(f"{folder / FILE}: could not be read: {error.orig}") from error
        sync_folder(folder)

    def folder_of(self, job_id: str) -> Path:
        """Where the files of a job lie."""
        return self.folder / "jobs" / job_id

    def close(self) -> None:
        """Give the folder back."""
        self._engine.dispose()
        self._held.close()

    def add(self, **values: Any) -> Job:
        """A new job, on disk; or that of its user which has its key.

        Raises:
            TooManyJobs: of its user.
        """
        with self._changing() as session:
            key = values["key"]
            if key is not None:
                key = values["key"] = f"{values['user']}\n{key}"
                known = session.scalar(select(Job).where(Job.key == key))
                if known is not None:
                    return known
            unfinished = select(func.count()).where(Job.user == values["user"], Job.state.not_in(ENDED))
            if (session.scalar(unfinished) or 0) >= self._most:
                raise TooManyJobs(f"{self._most} of your jobs are unfinished; expected fewer before another comes")
            job = Job(id=f"job-{uuid.uuid4().hex}", state=QUEUED, created=time.time(), **values)
            session.add(job)
            return job

    def get(self, job_id: str) -> Job | None:
        """A job; None: there is none of this name."""
        with self._reading() as session:
            return session.scalar(select(Job).where(Job.id == job_id))

    def newest(self, limit: int, before: int | None = None, user: str | None = None) -> Sequence[Job]:
        """Jobs, newest first; `before`: older than this number; `user`: of this user alone."""
        query = select(Job).order_by(Job.number.desc()).limit(limit)
        query = query if before is None else query.where(Job.number < before)
        with self._reading() as session:
            return session.scalars(query if user is None else query.where(Job.user == user)).all()

    def count(self, state: str) -> int:
        """Jobs in a state."""
        with self._reading() as session:
            return session.scalar(select(func.count()).where(Job.state == state)) or 0

    def take(self, kind: str) -> Job | None:
        """The next job of a kind, now in progress: the first of the user who was served longest ago."""
        with self._changing() as session:
            served = dict(
                session.execute(select(Job.user, func.max(Job.started)).group_by(Job.user)).tuples().all()
            )
            firsts = select(func.min(Job.number)).where(Job.state == QUEUED, Job.kind == kind).group_by(Job.user)
            waiting = session.scalars(select(Job).where(Job.number.in_(firsts))).all()
            if not waiting:
                return None
            job = min(waiting, key=lambda job: (served[job.user] or 0.0, job.number))
            job.state, job.started = IN_PROGRESS, time.time()
            job.attempts += 1
            return job

    def progress(self, job_id: str, done: int) -> None:
        """Note how many images are there."""
        with self._changing() as session:
            session.execute(update(Job).where(Job.id == job_id, Job.done < done).values(done=done, attempts=1))

    def set(self, job_id: str, **values: Any) -> None:
        """Note where a job's results lie."""
        with self._changing() as session:
            session.execute(update(Job).where(Job.id == job_id).values(**values))

    def cancel(self, job_id: str) -> Job | None:
        """End a job that waits, and mark one that is in progress; others stay as they are."""
        with self._changing() as session:
            job = session.scalar(select(Job).where(Job.id == job_id))
            if job is not None and job.state == QUEUED:
                self._end(job, CANCELLED)
            elif job is not None and job.state == IN_PROGRESS:
                job.cancelling = True
            return job

    def end(self, job_id: str, state: str, error: str | None = None) -> None:
        """A job in progress has ended, or waits again; one that was to be cancelled is, rather than to wait."""
        with self._changing() as session:
            job = session.scalar(select(Job).where(Job.id == job_id, Job.state == IN_PROGRESS))
            if job is None:
                return
            job.error = error
            self._end(job, CANCELLED if state == QUEUED and job.cancelling else state)
            if state == COMPLETED:
                job.done = job.total

    def expire(self) -> list[str]:
        """Mark what is to be removed now; the ids of all jobs that were not marked before."""
        due = (Job.state.in_((COMPLETED, FAILED, CANCELLED)), Job.expires <= time.time())
        with self._changing() as session:
            jobs = session.scalars(select(Job).where(*due)).all()
            for job in jobs:
                job.state = EXPIRED
            return [job.id for job in jobs]

    def _end(self, job: Job, state: str) -> None:
        """Give a job its last state, or have it wait."""
        job.state = state
        if state in ENDED:
            job.completed = time.time()
            job.expires = None if self._keep is None else job.completed + self._keep

    def _take_back(self) -> list[Job]:
        """Queue again what was in progress, or cancel it where that was asked for; say when the ended expire."""
        with self._changing() as session:
            left = list(session.scalars(select(Job).where(Job.state == IN_PROGRESS)))
            for job in left:
                job.attempts = max(0, job.attempts - 1)  # that it ended is no fault of the job's
                self._end(job, CANCELLED if job.cancelling else QUEUED)
            if self._keep is not None:
                untold = (Job.state.in_(ENDED), Job.expires.is_(None))
                session.execute(update(Job).where(*untold).values(expires=time.time() + self._keep))
            return left

    def _add_columns(self) -> None:
        """Give a file of an earlier version the columns that came later, all of which may be empty."""
        table = _Base.metadata.tables[Job.__tablename__]
        known = {column["name"] for column in inspect(self._engine).get_columns(table.name)}
        with self._engine.begin() as connection:
            for column in table.columns:
                if column.name not in known:
                    kind = column.type.compile(self._engine.dialect)
                    connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}"))

    @contextmanager
    def _changing(self) -> Iterator[Session]:
        """A transaction, on disk at the end of the body."""
        with self._writing, Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with Session(self._engine, expire_on_commit=False) as session:
            yield session


def _prepare(connection: Any, _: object) -> None:
    """Settings of each connection: a commit is on disk when it returns."""
    cursor = connection.cursor()
    for setting in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()
