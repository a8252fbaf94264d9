"""The archive of sketches, unpacked and split; and drawings in their place."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from jobs.data import sketches
from jobs.data.sketches import DataSource, draw_stand_in, read_source, root_of, unpack
from jobs.errors import JobError
from tests.support.sketches import sketch_archive


def unpacked(archive: Path, root: Path, *, remove: bool = False) -> tuple[DataSource, list[str]]:
    said: list[str] = []
    return unpack(archive, root, url=None, sha256="ab", say=said.append, remove=remove), said


def names(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.iterdir())


def test_of_each_class_the_first_60_drawings_by_number_are_for_training(tmp_path: Path) -> None:
    archive = sketch_archive(tmp_path / "sketches_png.zip", {"airplane": range(1, 81), "car (sedan)": range(81, 161)})
    source, said = unpacked(archive, tmp_path / "root")
    assert names(tmp_path / "root/train/airplane") == [*range(1, 61)]
    assert names(tmp_path / "root/test/airplane") == [*range(61, 81)]
    assert names(tmp_path / "root/train/car (sedan)") == [*range(81, 141)]
    assert names(tmp_path / "root/test/car (sedan)") == [*range(141, 161)]
    assert source == DataSource("TU Berlin sketches", False, None, "ab", 2, 120, 40)
    assert read_source(tmp_path / "root") == source
    assert said == [
        "unpacking 160 drawings of 2 classes",
        "note: the original has 250 classes with 80 drawings each; this archive differs",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "sketches_png.zip"]


def test_files_that_are_not_drawings_are_left_out(tmp_path: Path) -> None:
    others = ("png/filelist.txt", "__MACOSX/._1.png", "png/.hidden/1.png", "../../evil/x.png", "png/ant/notes.png")
    archive = sketch_archive(tmp_path / "a.zip", {"ant": range(1, 81)}, others)
    unpacked(archive, tmp_path / "root")
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["SOURCE.json", "test", "train"]
    assert [path.name for path in (tmp_path / "root/train").iterdir()] == ["ant"]


@pytest.mark.parametrize("remove", [True, False])
def test_a_carried_archive_is_kept_and_a_downloaded_one_deleted(tmp_path: Path, remove: bool) -> None:
    archive = sketch_archive(tmp_path / "a.zip", {"ant": range(1, 81)})
    unpacked(archive, tmp_path / "root", remove=remove)
    assert archive.exists() is not remove


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    at = content.index(b"IDAT") + 6
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def other_zip(content: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as made:
        made.writestr("notes.txt", "hello")
    return target.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"is damaged or incomplete .*Copy or download it again; the whole archive has about 525 MB"),
        (flipped, r"is damaged or incomplete \(Bad CRC-32 for file 'png/ant/"),
        (lambda _: b"", r"is damaged or incomplete \(File is not a zip file\)"),
        (other_zip, r"contains no drawings; the sketches are files such as png/airplane/1\.png"),
    ],
)
def test_a_damaged_archive_is_one_error_and_leaves_nothing(damage, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    archive = sketch_archive(tmp_path / "a.zip", {"ant": range(1, 81)})
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(JobError, match=message):
        unpacked(archive, tmp_path / "root")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_two_drawings_of_one_number_are_an_error(tmp_path: Path) -> None:
    archive = sketch_archive(tmp_path / "a.zip", {"ant": range(1, 81)}, ["copy/ant/1.png"])
    with pytest.raises(JobError, match=r"a\.zip: ant contains two drawings of the same number"):
        unpacked(archive, tmp_path / "root")


@pytest.mark.parametrize("numbers", [range(1, 61), range(1, 2)])
def test_a_class_with_too_few_drawings_is_an_error(numbers: Sequence[int], tmp_path: Path) -> None:
    archive = sketch_archive(tmp_path / "a.zip", {"ant": range(1, 81), "bee": numbers})
    with pytest.raises(JobError, match=r"a\.zip: bee have 60 drawings or fewer.*Is the archive complete\?"):
        unpacked(archive, tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_folder_that_orch_did_not_make_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/mine.txt").write_text("mine")
    archive = sketch_archive(tmp_path / "a.zip", {"ant": range(1, 81)})
    for fill in (lambda: unpacked(archive, tmp_path / "root"), lambda: draw_stand_in(tmp_path / "root", print, 1)):
        with pytest.raises(JobError, match=r"exists already, and `orch prepare` did not make it\. Move it away"):
            fill()
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["mine.txt"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = sketch_archive(tmp_path / "a.zip", {"ant": range(1, 81)})

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "sync", full)
    with pytest.raises(JobError, match=r"root can't be filled: No space left on device\. Free some space and run"):
        unpacked(archive, tmp_path / "root", remove=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("/a/train", "/b/test"),
        ("/a/training", "/a/test"),
        ("/a/train", "/a/train"),
        (None, "/a/test"),
        ("/a/train", None),
    ],
)
def test_the_folders_must_be_train_and_test_of_one_folder(train: str | None, test: str | None) -> None:
    assert root_of("/a/train", "/a/test") == Path("/a")
    with pytest.raises(JobError, match="they must be FOLDER/train and FOLDER/test"):
        root_of(train, test)


# --- stand-in drawings


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*.png"))
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_stand_in_drawings_have_the_layout_of_the_sketches_and_say_what_they_are(tmp_path: Path) -> None:
    source = draw_stand_in(tmp_path / "root", print, classes=2)
    assert names(tmp_path / "root/train/stand-in-001") == [*range(1, 61)]
    assert names(tmp_path / "root/test/stand-in-001") == [*range(61, 81)]
    assert source.stand_in
    assert str(source) == f"{sketches.STAND_IN}: 2 classes, 120 training and 40 test images"
    assert read_source(tmp_path / "root") == source
    with Image.open(tmp_path / "root/train/stand-in-000/1.png") as drawing:
        assert (drawing.size, drawing.mode) == ((256, 256), "RGB")
        assert drawing.convert("L").getextrema() == (0, 255)


def test_the_seed_decides_the_drawings(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_stand_in(tmp_path / name, print, classes=1, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_a_damaged_record_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    assert read_source(tmp_path / "missing") is None
    (tmp_path / "SOURCE.json").write_text("{")
    with pytest.raises(JobError, match=r"SOURCE\.json can't be read: delete .* and run `orch prepare` again"):
        read_source(tmp_path)


def test_what_a_killed_process_left_is_deleted_by_a_later_one(tmp_path: Path) -> None:
    for name, age_s in ((".root-1", 10 * 3600), (".root-2", 60), (".other-1", 10 * 3600), (".root-mine", 10 * 3600)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    draw_stand_in(tmp_path / "root", print, classes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other-1", ".root-2", ".root-mine", "root"]
