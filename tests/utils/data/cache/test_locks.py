"""Locks of a cache: runs share it, pruning requires exclusive access, and processes that died hold no lock."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.utils.data.cache.entries import assert_holds, files_in, write
from utils.data.cache import locks
from utils.data.cache.locks import WRITERS, CacheInUse, SharedLock, WriterLock, exclusive_lock, remove_leftovers
from utils.data.cache.store import Store

ROOT = Path(__file__).resolve().parents[4]


@contextmanager
def other_process(folder: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that has run the code, in which `folder` is the cache, and waits until it is killed."""
    start = f"import sys; from pathlib import Path; folder = Path(sys.argv[1])\n{code}\nprint('ready', flush=True)\n"
    arguments = [sys.executable, "-c", f"{start}sys.stdin.read()", str(folder)]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


USES = "from utils.data.cache.locks import SharedLock; use = SharedLock(folder)"
PRUNES = "from utils.data.cache.locks import exclusive_lock; use = exclusive_lock(folder); use.__enter__()"
WRITES = """
from utils.data.cache.locks import WriterLock
lock = WriterLock(folder)
group = folder / "vae-0" / "32x32"
group.mkdir(parents=True, exist_ok=True)
for name in ("one", "two"):
    (group / f".{name}.{lock.name}.tmp").write_bytes(b"incomplete")
"""


def test_runs_share_a_cache(tmp_path: Path) -> None:
    with other_process(tmp_path / "cache", USES):
        first, second = SharedLock(tmp_path / "cache"), SharedLock(tmp_path / "cache")
    assert first is not second


def test_a_cache_that_another_process_uses_cannot_be_locked_exclusively(tmp_path: Path) -> None:
    with other_process(tmp_path, USES) as process:
        with pytest.raises(CacheInUse, match="is in use by a run; try again when the run has ended") as caught:
            with exclusive_lock(tmp_path):
                raise AssertionError("entered")
        assert str(tmp_path) in str(caught.value)
        kill(process)
        with exclusive_lock(tmp_path):
            pass


def test_a_shared_lock_is_released_with_its_object(tmp_path: Path) -> None:
    use = SharedLock(tmp_path)
    with pytest.raises(CacheInUse), exclusive_lock(tmp_path):
        pass
    del use
    with exclusive_lock(tmp_path):
        pass


def test_a_run_does_not_start_while_its_cache_is_pruned(tmp_path: Path) -> None:
    with other_process(tmp_path, PRUNES) as process:
        with pytest.raises(CacheInUse, match="is being pruned; start again when prune has finished"):
            SharedLock(tmp_path)
        kill(process)
        assert SharedLock(tmp_path)


def test_only_one_exclusive_lock_is_granted(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path), pytest.raises(CacheInUse), exclusive_lock(tmp_path):
        pass


def test_on_a_file_system_without_locks_runs_start_and_pruning_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have no locks; whether another process uses the cache is then unknown."""

    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert SharedLock(tmp_path)
    lock = WriterLock(tmp_path)
    with pytest.raises(CacheInUse, match="is on a file system without locks .No locks available."):
        with exclusive_lock(tmp_path):
            raise AssertionError("entered")
    assert remove_leftovers(tmp_path) == []
    assert (tmp_path / WRITERS / f"{lock.name}.lock").exists()
    lock.close()


# --- writers -----------------------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_writer_are_removed_and_files_of_a_running_writer_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "vae-0", range(2))
    with other_process(tmp_path, WRITES) as dead, other_process(tmp_path, WRITES) as living:
        kill(dead)
        living_files = [name for name in files_in(tmp_path) if f"-{living.pid}-" in name]
        dead_files = [name for name in files_in(tmp_path) if f"-{dead.pid}-" in name]
        assert len(living_files) == len(dead_files) == 3, "a lock file and two unfinished shards"
        removed = remove_leftovers(tmp_path)
        assert sorted(path.name for path in removed) == dead_files
        remaining = files_in(tmp_path)
        assert set(living_files) <= set(remaining)
        assert not set(dead_files) & set(remaining)
        assert remove_leftovers(tmp_path) == []
    assert_holds(Store(tmp_path / "vae-0"), range(2))


def test_a_dry_run_lists_leftovers_and_deletes_nothing(tmp_path: Path) -> None:
    with other_process(tmp_path, WRITES) as dead:
        kill(dead)
    before = files_in(tmp_path)
    assert sorted(path.name for path in remove_leftovers(tmp_path, dry_run=True)) == before
    assert files_in(tmp_path) == before
    assert len(remove_leftovers(tmp_path)) == 3
    assert files_in(tmp_path) == []


def test_the_lock_of_this_process_is_not_stale(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path)
    assert remove_leftovers(tmp_path) == []
    lock.close()
    assert files_in(tmp_path) == []


def test_writers_have_unique_names(tmp_path: Path) -> None:
    writers = [WriterLock(tmp_path) for _ in range(3)]
    assert len({lock.name for lock in writers}) == 3
    assert files_in(tmp_path) == sorted(f"{lock.name}.lock" for lock in writers)


def test_a_lock_is_held_before_its_file_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise another process could take a writer that has just started for a dead one."""
    real_lock = locks._try_lock
    visible: list[list[Path]] = []

    def lock_and_record(descriptor: int, kind: int) -> bool:
        visible.append(list((tmp_path / WRITERS).glob("*.lock")))
        return real_lock(descriptor, kind)

    monkeypatch.setattr(locks, "_try_lock", lock_and_record)
    lock = WriterLock(tmp_path)
    assert visible == [[]]
    lock.close()


def test_a_cache_without_writers_has_no_leftovers(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path) == []
