"""Reader processes: equal results, errors attributed to the right image, and no process left behind."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.utils.data.image_makers import left_half, noise, save
from utils.data.buckets import Bucket, crop_box
from utils.data.sources import decoding, reader_process, readers
from utils.data.sources.decoding import BadFile
from utils.data.sources.image_files import ImageFile
from utils.data.sources.readers import Readers

ROOT = Path(__file__).resolve().parents[4]
BOX = crop_box(200, 150, Bucket(64, 64))

TRAPS = """
import os, signal, time
from PIL import Image

def accept(start):
    if start.startswith(b"CRASH"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if start.startswith(b"HANG"):
        time.sleep(60)
    if start.startswith(b"ONCE") and not os.path.exists(os.environ["TRAP_MARK"]):
        open(os.environ["TRAP_MARK"], "w").close()
        os.kill(os.getpid(), signal.SIGSEGV)
    return False

Image.register_open("TRAP", None, accept)
"""
"""Run as sitecustomize.py by the reader processes: registers a Pillow decoder that some files crash or hang."""


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reader processes crash at files that start with CRASH, hang at HANG, and crash at ONCE the first time only."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(TRAPS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("TRAP_MARK", str(tmp_path / "mark"))


_other_tests_processes: list[psutil.Process] = []


@pytest.fixture(autouse=True)
def ignore_processes_of_other_tests() -> None:
    """Records the reader processes of session fixtures, which are not counted."""
    _other_tests_processes[:] = reader_processes()


@pytest.fixture
def pool() -> Iterator[Readers]:
    with Readers(2, limit_seconds=30.0) as readers:
        yield readers


def write_trap(path: Path, kind: str) -> ImageFile:
    """Writes a file that crashes or hangs its decoder; see TRAPS."""
    path.write_bytes(kind.encode() + b" and no image")
    return ImageFile(path)


def write_image(path: Path, shade: int = 0) -> ImageFile:
    """Writes an image; different shades give different contents."""
    return ImageFile(save(Image.eval(noise(), lambda value: (value + shade) % 256), path))


def reader_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "utils.data.sources.reader_process" in child.cmdline()]


def workers() -> list[psutil.Process]:
    """Returns the reader processes of this test."""
    return [process for process in reader_processes() if process not in _other_tests_processes]


def wait_until(what: str, seconds: float, happened: object) -> None:
    assert callable(happened)
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what} not within {seconds} s"
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# --- results ----------------------------------------------------------------------------------------------------


def test_pixels_equal_those_read_in_this_process(tmp_path: Path, pool: Readers) -> None:
    file = write_image(tmp_path / "fox.png")
    for flipped in (False, True):
        pixels = pool.pixels(file, BOX, flipped=flipped).result()
        assert pixels.dtype == np.uint8
        assert pixels.flags.writeable
        assert np.array_equal(pixels, decoding.read_pixels(file, BOX, flipped=flipped))


def test_masks_equal_those_read_in_this_process(tmp_path: Path, pool: Readers) -> None:
    file = ImageFile(save(left_half(50, 37), tmp_path / "mask.png"))
    mask = pool.mask(file, BOX, 8).result()
    assert mask.dtype == np.float32
    assert np.array_equal(mask, decoding.read_mask(file, BOX, 8))


def test_sizes_and_hashes_are_in_file_order(tmp_path: Path, pool: Readers) -> None:
    files = [ImageFile(save(noise(20 + number, 30), tmp_path / f"{number}.png")) for number in range(20)]
    files.insert(7, write_trap(tmp_path / "bad.png", "no trap"))
    files.insert(9, ImageFile(tmp_path / "none.png"))
    sizes = pool.sizes(files).result()
    assert sizes[7] == "is not an image Pillow can read"
    assert sizes[9] == "cannot be read: No such file or directory"
    assert [size for size in sizes if isinstance(size, tuple)] == [(20 + number, 30) for number in range(20)]
    hashes = pool.hashes(files).result()
    assert hashes.pop(9) == "cannot be read: No such file or directory"
    contents = [file.read() for file in files if file.path.exists()]
    assert hashes == [hashlib.blake2b(content, digest_size=16).digest() for content in contents]
    assert pool.sizes([]).result() == []


def test_concurrent_futures_return_their_own_results(tmp_path: Path, pool: Readers) -> None:
    files = [write_image(tmp_path / f"{number}.png", number) for number in range(20)]
    futures = [pool.pixels(file, BOX) for file in files]
    for file, future in zip(files, futures, strict=True):
        assert np.array_equal(future.result(), decoding.read_pixels(file, BOX))


def test_unreadable_image_is_reported_with_the_user_s_path(
    tmp_path: Path, pool: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadFile) as caught:
        pool.pixels(write_trap(Path("bad.png"), "no trap"), BOX).result()
    assert str(caught.value) == "bad.png: is not an image Pillow can read"
    with pytest.raises(BadFile, match="^shard.tar/fox.png: cannot be read: "):
        pool.mask(ImageFile(Path("shard.tar"), "fox.png", 512, 100), BOX, 8).result()


def test_archive_members_are_read(tmp_path: Path, pool: Readers) -> None:
    content = write_image(tmp_path / "fox.png").read()
    (tmp_path / "shard.tar").write_bytes(b"before" + content)
    member = ImageFile(tmp_path / "shard.tar", "fox.png", 6, len(content))
    assert pool.sizes([member]).result() == [(200, 150)]
    assert pool.hashes([member]).result() == [hashlib.blake2b(content, digest_size=16).digest()]
    assert np.array_equal(pool.pixels(member, BOX).result(), decoding.read_pixels(member, BOX))


def test_arbitrary_file_names_are_transmitted(tmp_path: Path, pool: Readers) -> None:
    for name in (b"\xff\xfe no UTF-8.png", "Füchse\n2.png".encode(), b"-c.png"):
        assert pool.sizes([write_image(tmp_path / os.fsdecode(name))]).result() == [(200, 150)]


def test_program_error_is_not_attributed_to_an_image(tmp_path: Path, pool: Readers) -> None:
    with pytest.raises(RuntimeError, match="(?s)error in a reader process.*ValueError"):
        pool.mask(write_image(tmp_path / "fox.png"), BOX, 0).result()


# --- processes ----------------------------------------------------------------------------------------------


def test_processes_start_on_demand_and_end_on_close(tmp_path: Path) -> None:
    file = write_image(tmp_path / "fox.png")
    with Readers(3) as pool:
        assert workers() == []
        pool.sizes([file]).result()
        (worker,) = workers()
        assert worker.nice() == min(19, psutil.Process().nice() + reader_process.NICENESS)
    assert workers() == []
    with pytest.raises(RuntimeError):
        pool.sizes([file])


def test_killed_process_is_detected_at_once(tmp_path: Path, traps: None) -> None:
    good = [write_image(tmp_path / f"{number}.png", number) for number in range(4)]
    with Readers(2) as pool:
        pool.sizes(good).result()
        (worker,) = workers()
        hanging = pool.pixels(write_trap(tmp_path / "hanging.png", "HANG"), BOX)
        wait_until("reading", 5.0, hanging.running)
        time.sleep(0.2)
        others = [pool.pixels(file, BOX) for file in good]
        killed_at = time.monotonic()
        worker.kill()
        with pytest.raises(BadFile) as caught:
            hanging.result()
        assert time.monotonic() - killed_at < 2
        assert str(caught.value) == f"{tmp_path / 'hanging.png'}: the process that read it died (signal 9)"
        for file, future in zip(good, others, strict=True):
            assert np.array_equal(future.result(), decoding.read_pixels(file, BOX))


@pytest.mark.parametrize("what", ["sizes", "pixels"])
def test_only_the_image_that_crashes_its_decoder_is_reported(tmp_path: Path, traps: None, what: str) -> None:
    files = [write_image(tmp_path / f"{number}.png", number) for number in range(6)]
    files[2:2] = [write_trap(tmp_path / "crash.png", "CRASH"), write_trap(tmp_path / "crash too.png", "CRASH")]
    died = "the process that read it died (signal 11)"
    with Readers(2) as pool:
        if what == "sizes":
            sizes = pool.sizes(files).result()
            assert sizes == [died if "crash" in file.path.name else (200, 150) for file in files]
            return
        for file, future in [(file, pool.pixels(file, BOX)) for file in files]:
            if "crash" in file.path.name:
                with pytest.raises(BadFile, match=r"died \(signal 11\)"):
                    future.result()
            else:
                assert future.result().shape == (3, 64, 64)


def test_image_is_not_reported_if_its_retry_succeeds(tmp_path: Path, traps: None) -> None:
    files = [write_image(tmp_path / "fox.png"), write_trap(tmp_path / "once.png", "ONCE"), write_image(tmp_path / "owl.png")]
    with Readers(1) as pool:
        assert pool.sizes(files).result() == [(200, 150), "is not an image Pillow can read", (200, 150)]
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("what", ["sizes", "pixels"])
def test_image_that_exceeds_the_time_limit_is_reported(tmp_path: Path, traps: None, what: str) -> None:
    files = [write_image(tmp_path / "fox.png"), write_trap(tmp_path / "slow.png", "HANG"), write_image(tmp_path / "owl.png")]
    reason = "took longer than 1 s to read"
    with Readers(1, limit_seconds=1.0) as pool:
        if what == "sizes":
            assert pool.sizes(files).result(timeout=10) == [(200, 150), reason, (200, 150)]
        else:
            futures = [pool.pixels(file, BOX) for file in files]
            with pytest.raises(BadFile, match=reason):
                futures[1].result(timeout=10)
            assert futures[2].result(timeout=10).shape == (3, 64, 64)
        assert len(workers()) == 1


def test_killed_idle_process_is_not_attributed_to_an_image(tmp_path: Path, pool: Readers) -> None:
    file = write_image(tmp_path / "fox.png")
    pool.sizes([file]).result()
    (worker,) = workers()
    worker.kill()
    wait_until("its end", 2.0, lambda: has_ended(worker.pid))
    assert pool.pixels(file, BOX).result().shape == (3, 64, 64)


def test_interrupt_does_not_end_a_reader(tmp_path: Path, pool: Readers) -> None:
    """Ctrl-C is sent to the foreground process group of a terminal, to which readers do not belong."""
    file = write_image(tmp_path / "fox.png")
    pool.sizes([file]).result()
    (worker,) = workers()
    assert os.getpgid(worker.pid) != os.getpgid(0)
    worker.send_signal(signal.SIGINT)
    pool.sizes([file]).result()
    assert workers() == [worker]


def test_close_cancels_pending_reads(tmp_path: Path, traps: None) -> None:
    pool = Readers(1)
    futures = [pool.pixels(write_trap(tmp_path / "slow.png", "HANG"), BOX) for _ in range(5)]
    wait_until("starting", 5.0, workers)
    started_at = time.monotonic()
    pool.close()
    assert time.monotonic() - started_at < 2
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=0)
    assert workers() == []


PARENT = """
import sys, time
from pathlib import Path
from utils.data.sources.image_files import ImageFile
from utils.data.sources.readers import Readers

pool = Readers(2)
pool.sizes([ImageFile(Path(sys.argv[1]))]).result()
for _ in range(3):
    pool.sizes([ImageFile(Path(sys.argv[2]))])
print("ready", flush=True)
time.sleep(0.3)
if sys.argv[3] == "exit":
    import os
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_no_reader_outlives_its_parent(tmp_path: Path, traps: None, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Neither an idle reader nor one that hangs at an image."""
    paths = [str(write_image(tmp_path / "fox.png").path), str(write_trap(tmp_path / "slow.png", "HANG").path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
    with subprocess.Popen([sys.executable, "-c", PARENT, *paths, how], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        time.sleep(0.1)
        pids = [child.pid for child in psutil.Process(parent.pid).children()]
        if how == "kill":
            parent.kill()
        parent.wait(timeout=5)
    assert pids
    wait_until("their end", 2.0, lambda: all(has_ended(pid) for pid in pids))


def test_readers_start_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it contains a package named `utils`; and relative paths refer to the parent's working directory."""
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").write_text("raise ImportError('not this one')")
    (tmp_path / "elsewhere").mkdir()
    write_image(tmp_path / "fox.png")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    with Readers(1) as pool:
        assert pool.sizes([ImageFile(Path("fox.png"))]).result() == [(200, 150)]
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert pool.sizes([ImageFile(Path("../fox.png"))]).result() == [(200, 150)]


def test_failed_reader_start_reports_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_image(tmp_path / "fox.png")
    broken = tmp_path / "broken" / "utils" / "data" / "sources"
    broken.mkdir(parents=True)
    (broken / "reader_process.py").write_text("import a_module_that_is_not_there")
    monkeypatch.setattr(readers, "_ROOT", tmp_path / "broken")
    with Readers(1) as pool:
        for future in (pool.sizes([file]), pool.pixels(file, BOX)):
            with pytest.raises(RuntimeError, match=r"(?s)could not start \(exit status 1\).*a_module_that_is_not_there"):
                future.result()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    with Readers(1) as pool, pytest.raises(RuntimeError, match="could not be started: .*no python"):
        pool.sizes([file]).result()
    assert workers() == []


def test_reader_does_not_import_torch() -> None:
    """Importing torch takes as much time and memory as reading twenty images."""
    module = "utils.data.sources.reader_process"
    code = f"import sys, {module}; print([name for name in ('torch', 'pyarrow') if name in sys.modules])"
    completed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert completed.stdout == "[]\n"
