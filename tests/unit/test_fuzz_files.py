"""Whatever bytes they contain, records, lists of mounts and lock files are either read or refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import CheckpointError, DamagedCheckpointError, LockError
from orchestrator.files import checkpoint_record, checkpoints
from orchestrator.files.checkpoint_record import CheckpointRecord, lineage, parse
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.rebuild import Origin, rebuild
from orchestrator.leaderboard.rebuild_plan import plan
from orchestrator.locking.choice import Choice, read_record, record_path
from orchestrator.locking.mounts import lock_facts, mount_of
from orchestrator.locking.proof import LOCKS
from orchestrator.locking.soft_lock import HeldError, SoftLock
from orchestrator.profile import Metric, Profile
from orchestrator.rules.checkpoint_names import generation_of
from tests.support.fuzzing import ODD_TEXT, examples, json_values, mutate, odd_scalars, to_json

CYCLE = [Profile(name, 0.1, 0.9, 0.0) for name in ("a", "b", "c")]
FIELDS = (*CheckpointRecord.model_fields, "unknown")
OUTSIDE = ("../outside.pt", "/etc/passwd", "..", ".", "", "sub/x.pt", "x\x00.pt", "../checkpoints/../outside.pt")


def name(generation: int) -> str:
    return f"g{generation:08d}-c{generation:08d}.pt"


def raw(generation: int, parent: int | None = None, position: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "kind": "candidate", "file": name(generation), "sha256": "0" * 64, "size_bytes": 1, "chunk": generation,
        "generation": generation, "worker": 0, "position": position, "profile": CYCLE[position % 3].name,
        "parent_file": name(parent) if parent else None, "created_at": float(generation), "score": 0.5, "epochs": 1,
        "metrics": {"loss": 0.5}, "results": [{"number": 1, "seconds": 1.0, "metrics": {}}], "train_seconds": 1.0,
        "ancestors": [], "launched_at": 1.0, "import_paths": ["/x"],
    } | more  # fmt: skip


def family() -> list[dict[str, Any]]:
    child = raw(2, parent=1, position=1, ancestors=[raw(1)])
    return [raw(1), child, raw(3, parent=2, position=4, kind="suspended", score=None, ancestors=[raw(1), raw(2, 1, 1)])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- records of checkpoints


@examples(250)
@given(content=st.binary(max_size=100) | json_values.map(lambda value: to_json(value).encode()))
@example(b"[" * 99_999)
@example(b"{" * 99_999)
def test_bytes_beside_a_checkpoint_that_are_not_its_record_are_refused(place: Path, content: bytes) -> None:
    (place / "g00000001-c00000001.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        checkpoint_record.read_record(place, name(1))
    assert lineage(place, name(1)) == ()


odd_names = st.sampled_from([name(1), name(2), name(9), ".tmp-" + name(1), name(1) + "-7", *OUTSIDE]) | odd_scalars
odd_values = (
    json_values
    | odd_names
    | st.lists(st.sampled_from(family()).map(deepcopy), max_size=2)
    | st.integers(-(2**70), 2**70)
)


@examples(200)
@given(data=st.data())
def test_any_records_make_a_board_or_are_refused(place: Path, data: st.DataObject) -> None:
    """A board made from records can be written to a database, and all its file names are names of checkpoints."""
    changed = family()
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(data, changed[data.draw(st.integers(0, 2))] or raw(1), FIELDS, odd_values)
    records = []
    for number, one in enumerate(changed, start=1):
        try:
            records.append(parse(json.loads(to_json(one)), name(number)))
        except CheckpointError:
            continue
        except (ValueError, RecursionError):  # errors of json.loads, which `read_record` handles
            if "VERBATIM" not in repr(one):
                raise
    try:
        found = plan(records, [name(1)], 2, Metric("accuracy", "max"), CYCLE)
    except CheckpointError:
        return
    files = [c.record.file for c in found.checkpoints] + [r.file for r in found.suspended]
    assert all(generation_of(file) is not None and "/" not in file for file in files)
    if data.draw(st.integers(0, 7)) == 0:
        folder = place / "run"
        (folder / "orch.db").unlink(missing_ok=True)
        rebuild(Database(None, folder), Origin("run", "{}", [], 1.0, 2.0, [None]), found, None, 3.0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"parent_file": "../../etc/passwd"}, id="a parent outside"),
        pytest.param({"parent_file": name(2)}, id="its own parent"),
        pytest.param({"parent_file": name(7)}, id="a parent of a later claim"),
        pytest.param({"file": name(1)}, id="another's file"),
        pytest.param({"file": ".tmp-" + name(2)}, id="a temporary file"),
        pytest.param({"created_at": float("nan")}, id="no time"),
        pytest.param({"launched_at": 1e300}, id="a time that no calendar has"),
        pytest.param({"worker": 10**9}, id="a billion workers"),
        pytest.param({"position": 10**12}, id="a position that no run reaches"),
        pytest.param({"position": -1}, id="a position below the first"),
        pytest.param({"chunk": 2**70, "file": f"g00000002-c{2**70}.pt"}, id="more than an integer of the database"),
        pytest.param({"ancestors": [{**raw(1), "parent_file": name(1)}]}, id="an ancestor that is its own"),
    ],
)
def test_a_record_that_no_run_writes_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint's record"):
        parse(raw(2, parent=1, position=1) | change, name(2))


def test_a_record_beside_another_file_is_refused() -> None:
    """The checkpoint that the record describes may be missing or damaged."""
    with pytest.raises(CheckpointError, match="its file is named"):
        parse(raw(1), name(2))


def test_records_of_the_same_chunk_are_named() -> None:
    twin = raw(3, parent=1, position=2, chunk=2, file="g00000003-c00000002.pt")
    records = [parse(raw(1)), parse(raw(2, parent=1, position=1)), parse(twin)]
    with pytest.raises(CheckpointError, match=r"and g00000003-c00000002[.]pt contradict"):
        plan(records, [], 9, Metric("accuracy", "max"), CYCLE)


def test_a_record_that_leaves_a_hundred_million_positions_open_is_refused() -> None:
    far = parse(raw(2, parent=1, position=99_999_999))
    with pytest.raises(CheckpointError, match="positions of the cycle open"):
        plan([parse(raw(1)), far], [], 9, Metric("accuracy", "max"), CYCLE)


@pytest.mark.parametrize("file", OUTSIDE)
def test_no_name_leads_out_of_the_checkpoints_folder(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "sub").mkdir(parents=True)
    victims = [tmp_path / "outside.pt", tmp_path / "outside.json", folder / "sub" / "x.pt", folder / "sub" / "x.json"]
    for victim in victims:
        victim.write_text("{}")
    with pytest.raises(DamagedCheckpointError, match="does not name a file"):
        checkpoints.verify(folder, file, "0" * 64)
    with pytest.raises(CheckpointError, match="does not name a file"):
        checkpoint_record.read_record(folder, file)
    checkpoints.remove(folder, [file])
    checkpoints.collect(folder, lambda: ([file], []))
    assert all(victim.exists() for victim in victims)


# --- mounts


mount_words = st.sampled_from(
    ["36", "/", "/home", "/home/me", "\\040", "\\777", "-", "nfs4", "lustre", "rw,vers=3", "x\x85y", ""]
)
mount_lines = st.lists(mount_words | st.text(max_size=8), max_size=12).map(" ".join) | st.text(max_size=40)


@examples(300)
@given(lines=st.lists(mount_lines, max_size=4), data=st.binary(max_size=60))
def test_any_mountinfo_names_a_mount_above_the_folder_or_none(lines: list[str], data: bytes) -> None:
    for text in ("\n".join(lines), data.decode("utf-8", "surrogateescape")):
        try:
            text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # reading a file never gives this text
            continue
        mount = mount_of(text, "/home/me/runs")
        if mount is not None:
            assert "/home/me/runs".startswith(mount.point)
            assert lock_facts(mount.fstype, mount.options).what


@pytest.mark.parametrize("space", ["\x0b", "\x1c", "\x85", "\xa0", "\u2003", "\u2028"])
def test_a_character_that_is_a_space_elsewhere_is_part_of_a_mounts_name(space: str) -> None:
    """Otherwise the options of another mount would decide which lock is used."""
    root = "1 0 8:1 / / rw - ext4 /dev/sda rw"
    shared = f"2 1 0:9 / /a{space}b rw,nolock - nfs server:/x rw,vers=3,local_lock=all"
    mount = mount_of(f"{root}\n{shared}\n", f"/a{space}b/runs")
    assert mount is not None
    assert (mount.point, mount.fstype) == (f"/a{space}b", "nfs")


# --- locks


kinds = st.sampled_from(["flock", "soft", "x"]) | json_values
choices = st.fixed_dictionaries({}, optional={"kind": kinds, "why": json_values, "sqlite_locks": json_values})


@examples(300)
@given(content=st.binary(max_size=60) | (json_values | choices).map(lambda value: to_json(value).encode()))
@example(b"[" * 99_999)
@example(b'{"kind": ["flock"], "why": ""}')
@example(b'{"kind": "flock", "why": "", "sqlite_locks": "false"}')
@example(b'{"kind": "flock", "why": ["by hand"]}')
def test_any_bytes_say_which_lock_a_run_has_or_are_refused(place: Path, content: bytes) -> None:
    """Only a valid record counts as the choice of a lock, because mixing two kinds of lock gives no protection."""
    record_path(place / "orch.db").write_bytes(content)
    try:
        choice = read_record(place / "orch.db")
    except LockError:
        return
    assert choice.kind in LOCKS
    assert isinstance(choice.why, str)
    assert isinstance(choice.sqlite_locks, bool)
    assert choice == Choice(**json.loads(content))


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[Path, bytes]]]:
    """A lock that is held, and the content of its claim files."""
    path = tmp_path_factory.mktemp("soft") / "orch.db.lock"
    with SoftLock(path, timeout=5):
        files = (path.with_name(path.name + ".filelock") / "claims").glob("*.claim")
        found = {file: file.read_bytes() for file in files}
        assert found
        yield path, found
        for file, good in found.items():
            file.write_bytes(good)


@examples(80)
@given(data=st.data())
def test_claims_of_any_bytes_are_never_a_free_lock(claims: tuple[Path, dict[Path, bytes]], data: st.DataObject) -> None:
    path, files = claims
    for file, good in files.items():
        cut = st.integers(0, len(good)).map(lambda end, good=good: good[:end])
        odd = st.sampled_from(ODD_TEXT).map(lambda text: text[:200].encode("utf-8", "surrogatepass"))
        file.write_bytes(data.draw(st.binary(max_size=80) | cut | odd))
    with pytest.raises((HeldError, LockError)):
        SoftLock(path, timeout=0).acquire()
    assert all(file.exists() for file in files)
