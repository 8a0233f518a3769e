"""What processes share is made once, whatever dies."""

import multiprocessing
from pathlib import Path

from ditmoe.data.storage.sharing import make_missing, try_lock


def _hold(path: str, ready: object) -> None:
    with try_lock(Path(path)) as held:
        assert held
        ready.set()  # type: ignore[attr-defined]
        multiprocessing.Event().wait(60)


def test_what_a_killed_process_held_is_free_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path / "lock"), ready))
    holder.start()
    assert ready.wait(30)
    with try_lock(tmp_path / "lock") as held:
        assert not held
    holder.kill()
    holder.join(30)
    with try_lock(tmp_path / "lock") as held:
        assert held


def test_progress_tells_how_many_files_are_there(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(4)]
    paths[1].touch()
    told: list[int] = []
    made = make_missing(paths, lambda i: paths[i].touch(), on_progress=told.append)
    assert made == 3 and told[0] == 1 and told[-1] == 4 and told == sorted(told)


def test_any_number_may_share_a_lock_but_not_beside_one_that_has_it_alone(tmp_path: Path) -> None:
    with try_lock(tmp_path / "lock", shared=True) as first, try_lock(tmp_path / "lock", shared=True) as second:
        assert first and second
        with try_lock(tmp_path / "lock") as alone:
            assert not alone
    with try_lock(tmp_path / "lock") as alone, try_lock(tmp_path / "lock", shared=True) as shared:
        assert alone and not shared
