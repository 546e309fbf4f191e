"""Who uses a cache: runs share it, pruning wants it alone, and the dead hold nothing."""

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
from utils.data.cache.locks import WRITERS, CacheInUse, SharedUse, WriterLock, exclusive_use, remove_leftovers
from utils.data.cache.store import Store

ROOT = Path(__file__).resolve().parents[4]


@contextmanager
def other_process(folder: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has run the code, in which `folder` is the cache, and goes on until it is killed."""
    start = f"import sys; from pathlib import Path; folder = Path(sys.argv[1])\n{code}\nprint('there', flush=True)\n"
    arguments = [sys.executable, "-c", f"{start}sys.stdin.read()", str(folder)]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        try:
            yield process
        finally:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


USES = "from utils.data.cache.locks import SharedUse; use = SharedUse(folder)"
PRUNES = "from utils.data.cache.locks import exclusive_use; use = exclusive_use(folder); use.__enter__()"
WRITES = """
from utils.data.cache.locks import WriterLock
lock = WriterLock(folder)
group = folder / "vae-0" / "32x32"
group.mkdir(parents=True, exist_ok=True)
for name in ("one", "two"):
    (group / f".{name}.{lock.name}.tmp").write_bytes(b"half")
"""


def test_runs_share_a_cache(tmp_path: Path) -> None:
    with other_process(tmp_path / "cache", USES):
        first, second = SharedUse(tmp_path / "cache"), SharedUse(tmp_path / "cache")
    assert first is not second


def test_nobody_has_a_cache_alone_that_another_process_uses(tmp_path: Path) -> None:
    with other_process(tmp_path, USES) as process:
        with pytest.raises(CacheInUse, match="is in use by a run; try again when it has ended") as caught:
            with exclusive_use(tmp_path):
                raise AssertionError("entered")
        assert str(tmp_path) in str(caught.value)
        kill(process)
        with exclusive_use(tmp_path):
            pass


def test_a_use_ends_with_its_object(tmp_path: Path) -> None:
    use = SharedUse(tmp_path)
    with pytest.raises(CacheInUse), exclusive_use(tmp_path):
        pass
    del use
    with exclusive_use(tmp_path):
        pass


def test_a_run_does_not_start_while_its_cache_is_pruned(tmp_path: Path) -> None:
    with other_process(tmp_path, PRUNES) as process:
        with pytest.raises(CacheInUse, match="is being pruned; start again when that has ended"):
            SharedUse(tmp_path)
        kill(process)
        assert SharedUse(tmp_path)


def test_two_cannot_have_a_cache_alone(tmp_path: Path) -> None:
    with exclusive_use(tmp_path), pytest.raises(CacheInUse), exclusive_use(tmp_path):
        pass


def test_without_locks_runs_start_and_nobody_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none; there one cannot know who is in."""

    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert SharedUse(tmp_path)
    lock = WriterLock(tmp_path)
    with pytest.raises(CacheInUse, match="is on a file system without locks .No locks available."):
        with exclusive_use(tmp_path):
            raise AssertionError("entered")
    assert remove_leftovers(tmp_path) == []
    assert (tmp_path / WRITERS / f"{lock.name}.lock").exists()
    lock.close()


# --- writers -----------------------------------------------------------------------------------------------------------


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    write(tmp_path / "vae-0", range(2))
    with other_process(tmp_path, WRITES) as dead, other_process(tmp_path, WRITES) as living:
        kill(dead)
        living_files = [name for name in files_in(tmp_path) if f"-{living.pid}-" in name]
        dead_files = [name for name in files_in(tmp_path) if f"-{dead.pid}-" in name]
        assert len(living_files) == len(dead_files) == 3, "a lock file and two unfinished shards"
        removed = remove_leftovers(tmp_path)
        assert sorted(path.name for path in removed) == dead_files
        left = files_in(tmp_path)
        assert set(living_files) <= set(left)
        assert not set(dead_files) & set(left)
        assert remove_leftovers(tmp_path) == []
    assert_holds(Store(tmp_path / "vae-0"), range(2))


def test_leftovers_are_only_listed_when_nothing_is_to_be_deleted(tmp_path: Path) -> None:
    with other_process(tmp_path, WRITES) as dead:
        kill(dead)
    before = files_in(tmp_path)
    assert sorted(path.name for path in remove_leftovers(tmp_path, dry_run=True)) == before
    assert files_in(tmp_path) == before
    assert len(remove_leftovers(tmp_path)) == 3
    assert files_in(tmp_path) == []


def test_this_process_s_own_lock_is_not_stale(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path)
    assert remove_leftovers(tmp_path) == []
    lock.close()
    assert files_in(tmp_path) == []


def test_every_writer_has_another_name(tmp_path: Path) -> None:
    writers = [WriterLock(tmp_path) for _ in range(3)]
    assert len({lock.name for lock in writers}) == 3
    assert files_in(tmp_path) == sorted(f"{lock.name}.lock" for lock in writers)


def test_a_lock_is_held_before_its_file_can_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another process could take a writer for dead that has just begun."""
    real_lock = locks._try_lock
    seen: list[list[Path]] = []

    def lock_and_look(descriptor: int, kind: int) -> bool:
        seen.append(list((tmp_path / WRITERS).glob("*.lock")))
        return real_lock(descriptor, kind)

    monkeypatch.setattr(locks, "_try_lock", lock_and_look)
    lock = WriterLock(tmp_path)
    assert seen == [[]]
    lock.close()


def test_a_cache_without_writers_has_no_leftovers(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path) == []
