"""The lock made of files: one holder at a time, taken over only from processes that are proven dead."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from filelock import Timeout

from orchestrator.errors import LockError
from orchestrator.locking.soft_lock import HeldError, SoftLock, is_dead

PATIENCE_S = 60.0

PROLOGUE = """
import os, signal, sys, time
from orchestrator.locking.soft_lock import SoftLock
lock = SoftLock(sys.argv[1], timeout=60)
"""
HOLDER = """
lock.acquire()
print("held", flush=True)
sys.stdin.read()
lock.release()
print("released", flush=True)
"""
# Logs when it takes and releases the lock. Some processes kill themselves with SIGKILL while they hold it.
MORTAL = """
log, turns, dies = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "dies"
print("ready", flush=True)
sys.stdin.readline()
for turn in range(turns):
    with lock:
        with open(log, "a") as file:
            print("in", os.getpid(), file=file, flush=True)
            time.sleep(0.002)
            if dies and turn == turns - 1:
                print("dies", os.getpid(), file=file, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            print("out", os.getpid(), file=file, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "orch.db.lock"


@pytest.fixture
def spawn(path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    children: list[subprocess.Popen[str]] = []

    def start(script: str, *args: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROLOGUE + script, str(path), *map(str, args)]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def holder_of(spawn: Callable[..., subprocess.Popen[str]]) -> subprocess.Popen[str]:
    holder = spawn(HOLDER)
    assert holder.stdout.readline() == "held\n"
    return holder


def claims(path: Path) -> list[Path]:
    return sorted(Path(f"{path}.filelock/claims").glob("*.claim"))


def rewrite(path: Path, **changes: str) -> None:
    """Change the pid, host or start time in the claim files."""
    for claim in claims(path):
        magic, token, pid, host, start, _ = claim.read_text().split("\n")
        new = {"pid": pid, "host": bytes.fromhex(host).decode(), "start": start} | changes
        claim.write_text("\n".join([magic, token, new["pid"], new["host"].encode().hex(), new["start"], ""]))


# --- holders that are alive


def test_it_is_used_like_any_lock(path):
    lock = SoftLock(path, timeout=5)
    for _ in range(3):
        with lock as same:
            assert same is lock
            assert lock.is_locked
        assert not lock.is_locked
    lock.release()
    assert claims(path) == []


def test_threads_with_locks_of_their_own_exclude_each_other(path):
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(5):
            with SoftLock(path, timeout=PATIENCE_S):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (len(most), max(most)) == (20, 1)


@pytest.mark.parametrize("timeout_s", [0, 0.7], ids=["no wait at all", "a wait"])
def test_a_wait_for_a_living_holder_ends_at_its_limit_and_says_who_it_is(spawn, path, timeout_s):
    holder = holder_of(spawn)
    started = time.monotonic()
    with pytest.raises(HeldError) as caught:
        SoftLock(path, timeout=timeout_s).acquire()
    assert timeout_s <= time.monotonic() - started < timeout_s + 45
    assert isinstance(caught.value, Timeout)
    assert f"process {holder.pid} on " in str(caught.value)


def test_a_holder_is_not_broken_by_its_age(spawn, path):
    holder_of(spawn)
    long_ago = time.time() - 10 * 365 * 86400
    for claim in claims(path):
        os.utime(claim, (long_ago, long_ago))
    with pytest.raises(HeldError):
        SoftLock(path, timeout=1.2).acquire()


def test_a_holder_that_is_stopped_is_alive(spawn, path):
    holder = holder_of(spawn)
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(HeldError, match="Check whether that process is stopped"):
        SoftLock(path, timeout=0.7).acquire()


# --- holders that are dead


def test_a_waiting_process_gets_the_lock_of_a_killed_holder(spawn, path):
    holder = holder_of(spawn)
    threading.Timer(0.2, holder.kill).start()
    with SoftLock(path, timeout=PATIENCE_S) as lock:
        assert holder.poll() is None or holder.returncode == -9
        assert lock.is_locked
    assert claims(path) == []


def test_a_holder_that_is_a_zombie_counts_as_dead(spawn, path):
    holder = holder_of(spawn)
    os.kill(holder.pid, signal.SIGKILL)
    while psutil.Process(holder.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with SoftLock(path, timeout=0):
        pass


def test_many_processes_take_over_from_killed_holders_and_never_two_at_once(spawn, path, tmp_path):
    log, turns = tmp_path / "log", 3
    victim = holder_of(spawn)
    children = [spawn(MORTAL, log, turns, "dies" if number % 2 else "lives") for number in range(10)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    time.sleep(random.Random(3).uniform(0.0, 0.2))
    victim.kill()
    assert [child.wait(PATIENCE_S) for child in children] == [0, -9] * 5

    inside = None
    lines = [line.split() for line in log.read_text().splitlines()]
    for what, pid in lines:
        assert inside == (None if what == "in" else pid), "two were inside"
        inside = pid if what == "in" else None
    assert [what for what, _ in lines].count("dies") == 5
    assert [what for what, _ in lines].count("in") == 10 * turns
    with SoftLock(path, timeout=PATIENCE_S):
        pass
    assert claims(path) == []


def test_a_foreign_host_s_holder_is_never_broken_and_the_error_says_what_to_do(spawn, path):
    holder = holder_of(spawn)
    holder.kill()
    holder.wait()
    rewrite(path, host="node17", pid="4711")
    before = claims(path)
    lock = SoftLock(path, timeout=1.2)
    with pytest.raises(HeldError) as caught:
        lock.acquire()
    text = str(caught.value)
    assert "process 4711 on node17" in text
    assert "ssh node17 ps -p 4711" in text
    assert claims(path) == before
    command = text.partition("remove its claim: ")[2]
    subprocess.run(command, shell=True, check=True)
    with lock:
        assert lock.is_locked


@pytest.mark.parametrize(
    "unshare",
    [
        pytest.param(["--uts", "sh", "-c", 'hostname node17; exec "$@"', "sh"], id="another host name"),
        pytest.param(["--pid", "--fork", "--kill-child"], id="another namespace of pids"),
    ],
)
def test_a_process_that_can_t_be_seen_from_here_keeps_its_lock_even_killed(path, unshare):
    if subprocess.run(["unshare", *unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("only root can make namespaces here")
    die = "lock.acquire(); print('held', flush=True); os.abort() if os.getpid() == 1 else os.kill(os.getpid(), 9)"
    command = ["unshare", *unshare, sys.executable, "-c", PROLOGUE + die, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "held\n", done.stderr
    before = claims(path)
    assert len(before) == 2
    with pytest.raises(HeldError, match="never removed because of its age"):
        SoftLock(path, timeout=1.2).acquire()
    assert claims(path) == before


def test_evidence_of_death_as_a_table(spawn, path):
    with SoftLock(path, timeout=5) as lock:
        mine = lock._inner.claims[0]
    killed = holder_of(spawn)
    dead = SoftLock(path, timeout=0)._inner.claims[0]
    assert not is_dead(dead), "it lives still"
    killed.kill()
    killed.wait()
    boot = 1 << 64
    table = [
        ("this process", mine, False),
        ("no such process", dead, True),
        ("its pid is another process's now", replace(mine, start=mine.start - 1000), True),
        ("of another host", replace(dead, hostname="node17"), False),
        ("of another namespace of pids", replace(dead, hostname=dead.hostname + "?pidns-f"), False),
        ("of another boot, or of another machine of this name", replace(dead, start=dead.start + boot), False),
        ("its boot is not known", replace(dead, start=dead.start % boot), False),
        ("its start is not known", replace(dead, start=None), False),
    ]
    assert {name: is_dead(claim) for name, claim, _ in table} == {name: expected for name, _, expected in table}


# --- damage ------------------------------------------------------------------------------------------


def test_a_claim_that_can_t_be_read_is_an_error_that_says_what_to_do(spawn, path):
    holder_of(spawn)
    claims(path)[0].write_text("garbage")
    with pytest.raises(LockError, match="If no process of this run is alive on any node, remove"):
        SoftLock(path, timeout=5).acquire()


def test_a_file_of_flock_at_the_path_of_the_soft_lock_is_an_error(path):
    path.write_text("")
    with pytest.raises((LockError, HeldError)):
        SoftLock(path, timeout=4).acquire()
