"""Checkpoints are written atomically, and only files that nothing refers to are deleted."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from orchestrator.errors import CheckpointError, DamagedCheckpointError
from orchestrator.files import atomic, checkpoints
from orchestrator.files.checkpoint_record import CheckpointRecord, lineage, read_record
from tests.support.checkpoints import write

STEM = "g00000007-c00000003"
FILE = f"{STEM}.pt"
CONTENT = bytes(range(256)) * 100


def save(target: IO[bytes]) -> None:
    target.write(CONTENT[:1000])
    target.write(memoryview(CONTENT)[1000:])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- publish -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"old"], ids=["where nothing was", "in place of an old one"])
def test_a_published_file_holds_what_was_filled_in(tmp_path, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    atomic.publish(path, save)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("before", [None, b"old"], ids=["nothing was there", "an old one was there"])
@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
def test_a_file_that_could_not_be_filled_leaves_everything_as_it_was(tmp_path, before, error):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def fill(target: IO[bytes]) -> None:
        target.write(CONTENT)
        target.flush()
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        atomic.publish(path, fill)
    assert names(tmp_path) == ([] if before is None else ["file"])
    assert before is None or path.read_bytes() == before


def test_nothing_is_seen_under_the_final_name_while_it_is_filled(tmp_path):
    path = tmp_path / "file"
    seen: list[list[str]] = []

    def fill(target: IO[bytes]) -> None:
        target.write(CONTENT)
        target.flush()
        seen.append(names(tmp_path))

    atomic.publish(path, fill)
    assert seen == [[f".tmp-file-{os.getpid()}"]]


def test_every_byte_is_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(fd: int) -> None:
        what = os.readlink(f"/proc/self/fd/{fd}")
        done.append("sync the folder" if what == str(tmp_path) else f"sync {os.fstat(fd).st_size} bytes")
        fsync(fd)

    def watched_rename(old: Path, new: Path) -> None:
        done.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    atomic.publish(tmp_path / "file", save)
    assert done == [f"sync {len(CONTENT)} bytes", "rename", "sync the folder"]


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from orchestrator.files import checkpoints

def fill(target):
    target.write(b"half of it")
    target.flush()
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints.write(Path(sys.argv[1]), "g00000007-c00000003", fill, lambda written: None)
"""


def test_a_writer_that_is_killed_leaves_a_temporary_file_which_is_collected_when_its_claim_is_dead(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path)])
    assert done.returncode == -9
    (left,) = names(tmp_path)
    assert left.startswith(f".tmp-{FILE}-")
    assert checkpoints.collect(tmp_path, lambda: (set(), {7})) == []
    assert checkpoints.collect(tmp_path, lambda: (set(), {8})) == [left]
    assert names(tmp_path) == []


# --- write -------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_with_its_checksum_and_its_record(tmp_path):
    written = write(tmp_path, STEM, save, score=0.5, epochs=3)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert written == checkpoints.Written(FILE, sha256, len(CONTENT))
    assert names(tmp_path) == [f"{STEM}.json", FILE]
    assert (tmp_path / FILE).read_bytes() == CONTENT
    record = read_record(tmp_path, FILE)
    assert (record.file, record.sha256, record.size_bytes) == (FILE, sha256, len(CONTENT))
    assert (record.score, record.epochs, record.parent_file) == (0.5, 3, None)


@pytest.mark.parametrize(
    "data",
    [b"12345678", bytearray(b"12345678"), memoryview(b"12345678"), memoryview(array("d", [1.0])), b""],
    ids=["bytes", "bytearray", "memoryview of bytes", "memoryview of doubles", "nothing"],
)
def test_the_size_of_a_checkpoint_is_counted_in_bytes_whatever_is_written(tmp_path, data):
    written = write(tmp_path, STEM, lambda target: target.write(data))
    assert written.size_bytes == (tmp_path / FILE).stat().st_size
    assert checkpoints.verify(tmp_path, written.file, written.sha256)


def test_a_measure_that_is_not_finite_stands_as_null_in_the_record(tmp_path):
    # The board admits a model with a finite accuracy even if its loss is infinite.
    metrics = {"accuracy": 0.004, "loss": math.nan, "train_loss": math.inf}
    write(tmp_path, STEM, save, score=0.004, metrics=metrics)
    record = json.loads((tmp_path / f"{STEM}.json").read_text())
    assert record["metrics"] == {"accuracy": 0.004, "loss": None, "train_loss": None}


@pytest.mark.parametrize(
    ("failing_save", "score", "error"),
    [
        pytest.param(lambda target: 1 / 0, 0.5, ZeroDivisionError, id="the model can't be saved"),
        pytest.param(save, object(), ValueError, id="the record is not valid"),
    ],
)
def test_a_mistake_of_the_caller_is_passed_on_and_leaves_nothing(tmp_path, failing_save, score, error):
    with pytest.raises(error):
        write(tmp_path, STEM, failing_save, score=score)
    assert names(tmp_path) == []


def fail_on_call(monkeypatch: pytest.MonkeyPatch, function: str, number: int, code: int) -> list[int]:
    """Make an os function fail at call `number`. Returns a list to which each call appends its number, from 1."""
    real, calls = getattr(os, function), []

    def failing(*args: object) -> object:
        calls.append(len(calls) + 1)
        if calls[-1] == number:
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, function, failing)
    return calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("function", "number"),
    [
        pytest.param("fsync", 1, id="the checkpoint's bytes"),
        pytest.param("rename", 1, id="the checkpoint's name"),
        pytest.param("fsync", 2, id="the folder with the checkpoint"),
        pytest.param("fsync", 3, id="the record's bytes"),
        pytest.param("rename", 2, id="the record's name"),
        pytest.param("fsync", 4, id="the folder with the record"),
    ],
)
def test_a_full_disk_leaves_nothing_of_the_checkpoint_and_says_what_to_do(
    tmp_path, monkeypatch, function, number, code
):
    write(tmp_path, "g00000001-c00000001", save)
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        calls = fail_on_call(patch, function, number, code)
        with pytest.raises(CheckpointError) as caught:
            write(tmp_path, STEM, save)
    assert number in calls
    assert names(tmp_path) == before, "other checkpoints stay, and nothing of this one"
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / FILE}: can't be written: {os.strerror(code)}. Free some space")


@contextmanager
def files_no_longer_than(size_bytes: int) -> Iterator[None]:
    """Limit the size of files, so that a real write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_with_torch(target: IO[bytes]) -> None:
    import torch

    torch.save({"model": torch.zeros(100_000)}, target)


@pytest.mark.parametrize("serialise", [save, save_with_torch], ids=["plain bytes", "torch.save"])
def test_a_write_that_runs_out_of_room_is_an_error_of_the_checkpoint_and_leaves_nothing(tmp_path, serialise):
    # torch.save replaces the file's OSError by its own error, which is not an OSError.
    write(tmp_path, "g00000001-c00000001", serialise)  # without the limit, the write succeeds
    before = names(tmp_path)
    with files_no_longer_than(10_000), pytest.raises(CheckpointError, match="can't be written: File too large"):
        write(tmp_path, STEM, serialise)
    assert names(tmp_path) == before


def test_a_checkpoint_for_a_folder_that_is_not_there_is_an_error_of_the_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="can't be written: No such file or directory"):
        write(tmp_path / "gone", STEM, save)


# --- verify ------------------------------------------------------------------------------------------


def flip(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


def test_a_checkpoint_as_it_was_written_is_verified(tmp_path):
    written = write(tmp_path, STEM, save)
    assert checkpoints.verify(tmp_path, written.file, written.sha256) == tmp_path / FILE


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-1], id="the last byte is missing"),
        pytest.param(lambda content: content[: len(content) // 2], id="half of it is missing"),
        pytest.param(lambda content: content + b"\0", id="a byte too much"),
        pytest.param(lambda content: flip(content, 0), id="the first bit is flipped"),
        pytest.param(lambda content: flip(content, len(content) // 2), id="a bit in the middle is flipped"),
        pytest.param(lambda content: flip(content, -1), id="the last bit is flipped"),
        pytest.param(lambda content: bytes(len(content)), id="zeros of the same length"),
    ],
)
def test_a_damaged_checkpoint_is_noticed(tmp_path, damage: Callable[[bytes], bytes]):
    written = write(tmp_path, STEM, save)
    (tmp_path / FILE).write_bytes(damage(CONTENT))
    with pytest.raises(DamagedCheckpointError) as caught:
        checkpoints.verify(tmp_path, written.file, written.sha256)
    assert str(tmp_path / FILE) in str(caught.value)
    assert f"{written.sha256[:12]}... was recorded" in str(caught.value)


def test_a_missing_checkpoint_is_damaged(tmp_path):
    with pytest.raises(DamagedCheckpointError, match="is missing"):
        checkpoints.verify(tmp_path, FILE, "0" * 64)


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_called_damaged(tmp_path):
    (tmp_path / FILE).mkdir()  # reading it fails, but not with "no such file"
    with pytest.raises(CheckpointError, match="Is a directory") as caught:
        checkpoints.verify(tmp_path, FILE, "0" * 64)
    assert not isinstance(caught.value, DamagedCheckpointError)


@pytest.mark.parametrize(
    "content",
    [None, b"", b'{"score": 0.5', b"\xff\xfe", b"[1, 2]", b"null"],
    ids=["missing", "empty", "cut", "not text", "a list", "null"],
)
def test_a_file_that_is_not_a_record_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / f"{STEM}.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{STEM}.json: not a checkpoint's record: "):
        read_record(tmp_path, FILE)


# --- remove and collect ------------------------------------------------------------------------------


def test_a_checkpoint_is_removed_with_its_record_as_far_as_they_are_there(tmp_path):
    for stem in ("g00000001-c00000001", STEM):
        write(tmp_path, stem, save)
    checkpoints.remove(tmp_path, ["g00000001-c00000001.pt", "g00000002-c00000002.pt"])
    assert names(tmp_path) == [f"{STEM}.json", FILE]


KEPT, LIVE, DEAD = "g00000001-c00000001", "g00000005-c00000002", "g00000003-c00000004"


@pytest.mark.parametrize(
    ("name", "collected"),
    [
        pytest.param(f"{KEPT}.pt", False, id="a checkpoint that is referred to"),
        pytest.param(f"{KEPT}.json", False, id="its record"),
        pytest.param(f"{LIVE}.pt", False, id="a candidate of a live claim"),
        pytest.param(f"{LIVE}.json", False, id="its record, not yet offered"),
        pytest.param(f".tmp-{LIVE}.pt-123", False, id="what a live claim is writing"),
        pytest.param(f"{DEAD}.pt", True, id="a checkpoint that nothing refers to"),
        pytest.param(f"{DEAD}.json", True, id="its record"),
        pytest.param(f".tmp-{DEAD}.pt-123", True, id="what a dead claim left half written"),
        pytest.param(f".tmp-{DEAD}.json-123", True, id="and half its record"),
        pytest.param("README.md", False, id="a file of the user"),
        pytest.param("g1-best-so-far.pt", False, id="a file of the user that looks a little like ours"),
        pytest.param("best.pt", False, id="a copy of the user's"),
    ],
)
def test_of_the_files_in_the_folder(tmp_path, name, collected):
    (tmp_path / name).write_bytes(b"")
    assert checkpoints.collect(tmp_path, lambda: ({f"{KEPT}.pt"}, {5})) == ([name] if collected else [])
    assert names(tmp_path) == ([] if collected else [name])


def test_a_checkpoint_that_appears_while_the_references_are_read_is_safe(tmp_path):
    write(tmp_path, DEAD, save)

    def references() -> tuple[set[str], set[int]]:
        write(tmp_path, STEM, save)  # its claim began after the references were read
        return set(), set()

    assert checkpoints.collect(tmp_path, references) == [f"{DEAD}.json", f"{DEAD}.pt"]
    assert names(tmp_path) == [f"{STEM}.json", FILE]


def test_a_folder_with_the_name_of_a_checkpoint_does_not_stop_a_collection(tmp_path):
    (tmp_path / f"{DEAD}.pt").mkdir()
    (tmp_path / f"{STEM}.pt").write_bytes(b"")
    checkpoints.collect(tmp_path, lambda: (set(), set()))
    assert names(tmp_path) == [f"{DEAD}.pt"]


def test_records_are_plain_json_that_any_program_reads(tmp_path):
    write(tmp_path, STEM, save, profile="é", metrics={"loss": 0.1})
    record = json.loads((tmp_path / f"{STEM}.json").read_text(encoding="utf-8"))
    assert (record["profile"], record["metrics"]) == ("é", {"loss": 0.1})


def test_a_record_holds_the_records_of_its_ancestors_without_what_they_need_not_repeat(tmp_path):
    origin = {"launched_at": 1.0, "import_paths": ["/code"]}
    for generation, parent in ((1, None), (2, 1), (3, 2)):
        parent_file = f"g{parent:08d}-c{parent:08d}.pt" if parent else None
        line = lineage(tmp_path, parent_file)
        write(tmp_path, f"g{generation:08d}-c{generation:08d}", save, parent_file=parent_file, ancestors=line, **origin)
    record = json.loads((tmp_path / "g00000003-c00000003.json").read_text())
    assert [one["chunk"] for one in record["ancestors"]] == [1, 2]
    assert [{"ancestors", "launched_at", "import_paths"} & one.keys() for one in record["ancestors"]] == [set(), set()]
    assert [one.chunk for one in lineage(tmp_path, "g00000003-c00000003.pt")] == [1, 2, 3]
    assert lineage(tmp_path, "g00000009-c00000009.pt") == ()


def test_a_record_is_written_with_the_fields_that_were_given_and_no_others(tmp_path):
    write(tmp_path, STEM, save)
    record = json.loads((tmp_path / f"{STEM}.json").read_text())
    assert "launched_at" not in record
    assert CheckpointRecord.model_validate(record) == read_record(tmp_path, FILE)
