"""The lock around the database: one holder at a time, in order, and released when a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from orchestrator.locking.flock import FairFileLock, lock_path

# Longer than any operation here takes on a busy machine. A test waits this long only if a lock is broken.
PATIENCE_S = 60.0

PROLOGUE = """
import os, sys, time
from orchestrator.locking.flock import FairFileLock
lock = FairFileLock(sys.argv[1], timeout=60)
def say(word):
    print(word, flush=True)
"""
HOLDER = """
with lock:
    say("held")
    sys.stdin.read()  # until the test closes it, or this process is killed
say("released")
"""
# Reads a number, waits a little and writes the next number. Two processes at the same time would lose an update.
COUNTER = """
for _ in range(int(sys.argv[3])):
    with lock, open(sys.argv[2], "r+") as file:
        number = int(file.read())
        time.sleep(0.001)
        file.seek(0)
        file.write(str(number + 1))
"""
# Takes the lock again and again, until all processes together have had it a given number of times.
TAKER = """
say("ready")
sys.stdin.readline()
while True:
    with lock, open(sys.argv[2], "a+") as file:
        file.seek(0)
        if len(file.readlines()) >= int(sys.argv[3]):
            break
        file.write(f"{os.getpid()}\\n")
        time.sleep(0.002)  # a short transaction
    time.sleep(0.001)  # and something else before the next
"""
# Forks while it holds the lock. The child still runs after the lock is released.
FORKER = """
with lock:
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
say("released")
say(child)
sys.stdin.read()
"""
# Is interrupted while it waits for the lock, and continues without the lock.
INTERRUPTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    lock.acquire()
except KeyboardInterrupt:
    say("interrupted")
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "orch.db.lock"


@pytest.fixture
def spawn(path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start other processes, which use a lock on `path`. They are killed at the end of the test."""
    children: list[subprocess.Popen[str]] = []

    def start(script: str, *args: object) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + script, str(path), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def held_elsewhere(spawn: Callable[..., subprocess.Popen[str]]) -> subprocess.Popen[str]:
    holder = spawn(HOLDER)
    assert holder.stdout.readline() == "held\n"
    return holder


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.002)


def queued(path: Path) -> int:
    """Count the processes and threads that wait for the lock: the first one in the queue and those behind it."""
    if not os.path.exists(f"{path}.queue"):
        return 0
    inode = os.stat(f"{path}.queue").st_ino
    return sum(f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines())


# --- one at a time -----------------------------------------------------------------------------------


def test_processes_that_read_and_write_under_the_lock_lose_nothing(spawn, tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    children = [spawn(COUNTER, counter, 25) for _ in range(4)]
    assert [child.wait(PATIENCE_S) for child in children] == [0] * 4
    assert counter.read_text() == "100"


def test_threads_with_locks_of_their_own_exclude_each_other(path):
    inside, most = [], []

    def work() -> None:
        lock = FairFileLock(path)
        for _ in range(10):
            with lock:
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(most) == 40
    assert max(most) == 1


def test_a_lock_knows_whether_it_is_held_and_can_be_taken_again(path):
    lock = FairFileLock(path)
    assert not lock.is_locked
    for _ in range(3):
        with lock as same:
            assert same is lock
            assert lock.is_locked
        assert not lock.is_locked


def test_the_lock_is_released_when_the_work_under_it_fails(path):
    def work() -> None:
        with FairFileLock(path):
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        work()
    with FairFileLock(path, timeout=0):
        pass


def test_releasing_what_is_not_held_does_nothing(path):
    lock = FairFileLock(path)
    lock.release()
    with lock:
        pass
    lock.release()
    with FairFileLock(path, timeout=0):
        pass


# --- time limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_s", [0, 0.3], ids=["no wait at all", "a wait"])
def test_a_wait_for_a_lock_that_is_held_ends_at_its_limit(spawn, path, timeout_s):
    held_elsewhere(spawn)
    started = time.monotonic()
    with pytest.raises(Timeout) as caught:
        FairFileLock(path, timeout=timeout_s).acquire()
    waited_s = time.monotonic() - started
    assert timeout_s <= waited_s < timeout_s + 45
    assert caught.value.lock_file == str(path)


def test_the_limit_of_one_call_wins_over_that_of_the_lock(spawn, path):
    held_elsewhere(spawn)
    with pytest.raises(Timeout):
        FairFileLock(path, timeout=PATIENCE_S).acquire(timeout=0)


def test_a_process_that_gave_up_waiting_does_not_get_the_lock_later(spawn, path):
    holder = held_elsewhere(spawn)
    impatient = FairFileLock(path, timeout=0.05)
    with pytest.raises(Timeout):
        impatient.acquire()
    assert not impatient.is_locked
    holder.stdin.close()
    assert holder.stdout.readline() == "released\n"
    wait_until(lambda: not any(thread.name == "flock" for thread in threading.enumerate()))
    with FairFileLock(path, timeout=0):
        pass
    with impatient:
        assert impatient.is_locked


def test_a_wait_below_zero_has_no_limit(spawn, path):
    holder = held_elsewhere(spawn)
    threading.Timer(0.2, holder.stdin.close).start()
    lock = FairFileLock(path, timeout=0).acquire(timeout=-1)
    assert holder.stdout.readline() == "released\n"
    lock.release()


@pytest.mark.parametrize("timeout_s", [0, 0.2], ids=["no wait at all", "a wait"])
def test_a_program_without_the_queue_is_waited_for_too(path, timeout_s):
    lock = FairFileLock(path, timeout=timeout_s)
    with FileLock(path), pytest.raises(Timeout):
        lock.acquire()
    assert not lock.is_locked
    with lock:
        pass


def test_a_program_without_the_queue_is_kept_out(path):
    with FairFileLock(path), pytest.raises(Timeout):
        FileLock(path, timeout=0).acquire()


def test_a_lock_in_a_missing_folder_is_an_error_of_the_file_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        FairFileLock(tmp_path / "gone" / "lock").acquire()


# --- dead processes ----------------------------------------------------------------------------------


def test_the_lock_of_a_holder_that_was_killed_is_free_at_once(spawn, path):
    holder = held_elsewhere(spawn)
    holder.kill()
    assert holder.wait(PATIENCE_S) == -9
    with FairFileLock(path, timeout=0):
        pass


def test_a_waiting_process_gets_the_lock_when_its_holder_is_killed(spawn, path):
    holder = held_elsewhere(spawn)
    got: list[bool] = []

    def wait() -> None:
        with FairFileLock(path, timeout=PATIENCE_S) as lock:
            got.append(lock.is_locked)

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: queued(path) == 1)
    assert not got
    holder.kill()
    waiter.join(PATIENCE_S)
    assert got == [True]


def test_a_process_that_is_killed_in_the_queue_does_not_block_the_others(spawn, path):
    holder = held_elsewhere(spawn)
    waiting = spawn(HOLDER)
    wait_until(lambda: queued(path) == 1)
    waiting.kill()
    waiting.wait(PATIENCE_S)
    holder.stdin.close()
    assert holder.stdout.readline() == "released\n"
    with FairFileLock(path, timeout=PATIENCE_S):
        pass


def test_a_process_that_was_forked_under_the_lock_does_not_keep_it(spawn, path):
    forker = spawn(FORKER)
    assert forker.stdout.readline() == "released\n"
    child = int(forker.stdout.readline())
    try:
        with FairFileLock(path, timeout=0):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_process_that_is_interrupted_while_it_waits_does_not_get_the_lock_later(spawn, path, ahead):
    holder = held_elsewhere(spawn)
    others = [spawn(HOLDER) for _ in range(ahead)]
    wait_until(lambda: queued(path) == ahead)
    waiting = spawn(INTERRUPTED)
    wait_until(lambda: queued(path) == ahead + 1)
    waiting.send_signal(signal.SIGINT)
    assert waiting.stdout.readline() == "interrupted\n"
    holder.stdin.close()
    assert holder.stdout.readline() == "released\n"
    for other in others:
        assert other.stdout.readline() == "held\n"
        other.stdin.close()
    wait_until(lambda: queued(path) == 0)
    with FairFileLock(path, timeout=5):
        assert waiting.poll() is None, "it lives on without the lock"


# --- the order of waiters ----------------------------------------------------------------------------


def test_waiters_get_the_lock_in_the_order_in_which_they_came(path):
    order: list[int] = []

    def wait(number: int) -> None:
        with FairFileLock(path, timeout=PATIENCE_S):
            order.append(number)

    threads = [threading.Thread(target=wait, args=[number]) for number in range(8)]
    with FairFileLock(path):
        for number, thread in enumerate(threads, start=1):
            thread.start()
            wait_until(lambda number=number: queued(path) == number)
        assert order == []
    for thread in threads:
        thread.join(PATIENCE_S)
    assert order == list(range(8))


def test_each_of_8_processes_gets_the_lock_many_times(spawn, tmp_path):
    turns = tmp_path / "turns"
    children = [spawn(TAKER, turns, 400) for _ in range(8)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.wait(PATIENCE_S) for child in children] == [0] * 8
    taken = turns.read_text().split()
    counts = Counter(taken)
    assert len(taken) == 400
    assert len(counts) == 8
    assert min(counts.values()) >= 25, "half of an equal share at least"
    assert max(counts.values()) <= 100, "twice an equal share at most"


# --- the path of the lock file -----------------------------------------------------------------------


def test_the_lock_file_is_beside_its_database():
    assert lock_path(Path("runs") / "a" / "orch.db") == Path("runs") / "a" / "orch.db.lock"
