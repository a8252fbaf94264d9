"""The test of a lock before a launch: real processes on this machine's file system, with working and broken locks.

To break a lock, a system call is replaced in every Python process that the test starts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import LockError
from orchestrator.locking import choice, proof
from orchestrator.locking.choice import choose

DOES_NOTHING = "import fcntl\nfcntl.flock = lambda fd, operation: None\n"
IS_MISSING = """
import fcntl, errno, os
def flock(fd, operation):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
"""
HANGS = "import fcntl, time\nfcntl.flock = lambda fd, operation: time.sleep(600)\n"
NO_LINKS = """
import errno, os
def link(*args, **kwargs):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
os.link = link
"""
# Each process sees only its own claim files, as on a network file system whose cache is never refreshed.
BLIND = """
import os
real = os.scandir
class Mine(list):
    def __enter__(self): return iter(self)
    def __exit__(self, *_): pass
def scandir(path):
    found = list(real(path))
    mine = [e for e in found if e.name.endswith(".claim") and f"\\n{os.getpid()}\\n" in read(path, e.name)]
    return Mine(mine + [e for e in found if not e.name.endswith(".claim")])
def read(folder, name):
    try:
        fd = os.open(name, os.O_RDONLY, dir_fd=folder)
    except OSError:
        return ""
    try:
        return os.read(fd, 1000).decode()
    finally:
        os.close(fd)
os.scandir = scandir
os.supports_fd.add(scandir)
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make every Python process that is started from now on execute some code first."""
    monkeypatch.setattr(choice, "_proven", set())

    def start(code: str) -> Path:
        (tmp_path / "site").mkdir()
        (tmp_path / "site/sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        (tmp_path / "mount").mkdir()
        return tmp_path / "mount"

    return start


@pytest.mark.parametrize("kind", ["flock", "soft"])
def test_a_lock_that_holds_is_proven_and_leaves_nothing_behind(tmp_path, kind):
    assert proof.prove(tmp_path, kind) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        pytest.param("flock", DOES_NOTHING, "two processes got it at the same time", id="flock does nothing"),
        pytest.param("flock", IS_MISSING, "Function not implemented", id="flock is missing"),
        pytest.param("soft", NO_LINKS, "hard-link", id="hard links are missing"),
        pytest.param("soft", BLIND, "two processes got it at the same time", id="names are not seen by others"),
    ],
)
def test_a_lock_that_does_not_protect_is_detected(broken, kind, code, words):
    folder = broken(code)
    assert words in (proof.prove(folder, kind) or "")
    assert list(folder.iterdir()) == []


def test_a_lock_that_hangs_is_detected(broken, monkeypatch):
    monkeypatch.setattr(proof, "ANSWER_S", 3.0)
    assert "hangs" in (proof.prove(broken(HANGS), "flock") or "")


def test_lost_updates_are_counted(tmp_path):
    class Answers:
        """Replaces a process of the test, and answers like a process whose lock does not protect the counter."""

        def __init__(self, *said: str) -> None:
            self.said = list(said)

        def tell(self, order: str) -> None:
            if order == "count":
                (tmp_path / "counter").write_text(f"{43:012d}")

        def answer(self) -> str:
            return self.said.pop(0)

    children = [Answers("held", "released", "25"), Answers("refused", "25")]
    assert proof._find_problem(children, tmp_path / "counter") == "7 of 50 updates were lost"


def test_where_flock_does_nothing_the_soft_lock_is_chosen(broken):
    assert choose(broken(DOES_NOTHING), False, "auto").kind == "soft"


def test_where_flock_does_nothing_and_was_asked_for_the_launch_is_refused(broken):
    with pytest.raises(LockError, match=r"two processes got it at the same time.*postgresql\+psycopg://"):
        choose(broken(DOES_NOTHING), False, "flock")


def test_where_nothing_holds_the_launch_is_refused_with_each_reason(broken):
    with pytest.raises(LockError, match=r"fair flock: two processes.*soft lock \(files\): .*hard-link.*postgresql"):
        choose(broken(DOES_NOTHING + NO_LINKS), False, "auto")


def test_a_mount_is_proven_once_by_a_process(tmp_path, monkeypatch):
    tried: list[str] = []
    monkeypatch.setattr(choice, "_proven", set())
    monkeypatch.setattr(choice, "prove", lambda folder, kind: tried.append(kind))
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        choose(tmp_path / name, False, "auto")
    assert tried == ["flock"]
