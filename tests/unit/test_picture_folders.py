"""Folders of pictures: classes, files and their order are ImageFolder's, without what no user put there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from jobs.data.picture_folders import class_names, describe, list_pictures
from jobs.errors import JobError

JUNK_FOLDERS = (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".AppleDouble", ".Trash-1000", "lost+found", ".hidden")
JUNK_FILES = ("._x.jpg", "Thumbs.db", ".DS_Store", ".hidden.png")


def make(root: Path, *names: str) -> Path:
    """Create empty files; listing does not read them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    names = ["b/2.png", "b/10.png", "b/z/1.PNG", "b/z-1/1.jpg", "b/z/deep/er/0.webp", "a/x.jpeg", "a/X.tiff", "c/é.bmp"]
    return make(tmp_path / "clean", *names)


def listed(root: Path) -> list[tuple[str, int]]:
    folder = list_pictures(root)
    return list(zip(map(str, folder.files), folder.targets, strict=True))


def test_clean_folders_are_listed_as_torchvision_does(clean: Path) -> None:
    expected = ImageFolder(str(clean))
    assert listed(clean) == expected.samples
    assert list_pictures(clean).classes == class_names(clean) == expected.classes
    assert not list_pictures(clean).left_out


def test_what_systems_put_beside_the_pictures_is_left_out_at_any_depth(clean: Path) -> None:
    expected = listed(clean)
    for folder in ("", "a/", "b/z/deep/"):
        make(clean, *(f"{folder}{junk}/x.png" for junk in JUNK_FOLDERS), *(folder + junk for junk in JUNK_FILES))
    assert listed(clean) == expected
    assert class_names(clean) == ["a", "b", "c"]
    (line,) = [line for line in describe(list_pictures(clean), list_pictures(clean)) if line.startswith("training_")]
    assert line.startswith("training_source_dir, left out: 33 hidden or system entries, such as ")


def test_links_that_lead_back_are_not_followed(clean: Path) -> None:
    expected = listed(clean)
    (clean / "a/up").symlink_to("..")
    (clean / "b/z/self").symlink_to(".")
    (clean / "b/again").symlink_to("z")
    (clean / "loop").symlink_to(clean)
    (clean / "b/itself").symlink_to("itself")
    assert listed(clean) == expected
    left_out = list_pictures(clean).left_out
    assert sorted(map(len, left_out.values())) == [1, 4]


def test_links_to_other_folders_and_files_are_followed(clean: Path, tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "1.png", "2.png")
    (clean / "d").symlink_to(tmp_path / "elsewhere")
    (clean / "a/more").symlink_to(tmp_path / "elsewhere")
    assert listed(clean) == ImageFolder(str(clean)).samples


def test_other_files_are_counted_by_ending_with_an_example(clean: Path) -> None:
    make(clean, "a/notes.txt", "a/more.TXT", "b/z/last.txt", "b/README", "c/1.gif", "labels.csv")
    line = next(line for line in describe(list_pictures(clean), list_pictures(clean)) if "left out" in line)
    assert line == (
        "training_source_dir, left out: 3 files ending .txt, such as more.TXT; 1 file without an ending, such as "
        "README; 1 file ending .gif, such as 1.gif; 1 file beside the class folders, such as labels.csv"
    )


@pytest.mark.parametrize("many", [False, True])
def test_the_pictures_of_each_class_are_shown_in_short(many: bool, clean: Path) -> None:
    if many:
        make(clean, *(f"d{number:02d}/{number}.png" for number in range(10)))
    first = describe(list_pictures(clean), list_pictures(clean))[0]
    if many:
        assert first == "training pictures: 18 of 13 classes, from 1 (c) to 5 (b) in a class"
    else:
        assert first == "training pictures: 8 of 3 classes: a 2, b 5, c 1"


# --- test sets


def test_a_test_set_gets_the_training_sets_class_numbers(clean: Path, tmp_path: Path) -> None:
    test = make(tmp_path / "test", "c/1.png", "b/notes.txt")
    folder = list_pictures(test, class_names(clean))
    assert (folder.targets, folder.classes) == ([2], ["a", "b", "c"])
    lines = describe(list_pictures(clean), folder)
    assert "note: 2 classes are missing from the test set: a, b" in lines
    assert "test pictures: 1 of 3 classes: a 0, b 0, c 1" in lines


def test_a_test_class_that_training_does_not_have_is_an_error(clean: Path, tmp_path: Path) -> None:
    test = make(tmp_path / "test", "a/1.png", "aa/1.png", "z\n/1.png")
    message = rf"^{test} has classes that the training set does not have: aa, z\\n\. Rename or remove these folders"
    with pytest.raises(JobError, match=message):
        list_pictures(test, class_names(clean))


def test_folders_without_classes_or_pictures_are_errors(clean: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"has no class folders; put the pictures of each class into a folder"):
        list_pictures(make(tmp_path / "flat", "1.png", ".git/x.png"))
    with pytest.raises(JobError, match=r"found no valid file for the classes empty\. Add pictures \(\.jpg, "):
        list_pictures(make(clean, "empty/notes.txt"))
    with pytest.raises(JobError, match=r"test has no pictures \(\.jpg, .*\) in its class folders"):
        list_pictures(make(tmp_path / "test", "a/notes.txt"), ["a"])


# --- files that are listed more than once


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_one_file_under_two_names_is_noted(link: Callable[[Path, Path], None], clean: Path) -> None:
    test = list_pictures(make(clean.parent / "test", "a/1.png"), class_names(clean))
    assert not [line for line in describe(list_pictures(clean), test) if "more than once" in line]
    link(clean / "a/x.jpeg", clean / "b/copy.jpeg")
    (note,) = [line for line in describe(list_pictures(clean), test) if "more than once" in line]
    assert note.startswith(
        f"note: 1 file is listed more than once, such as {clean}/b/copy.jpeg, which is the same file as "
        f"{clean}/a/x.jpeg; "
    )


def test_one_file_in_both_sets_is_noted(clean: Path) -> None:
    folder = list_pictures(clean)
    assert "note: 8 files are listed more than once" in describe(folder, folder)[-1]


def test_a_folder_that_can_not_be_listed_is_an_error(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may list any folder, so the refusal is simulated."""
    scandir = os.scandir

    def refused(path: str | Path) -> object:
        if Path(path) == clean / "b/z":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(JobError, match=rf"^{clean}/b/z can't be listed: Permission denied$"):
        list_pictures(clean)


def test_names_that_are_no_text_can_be_listed_and_shown(tmp_path: Path) -> None:
    root = make(tmp_path / "odd", os.fsdecode(b"cl\xffass/1\n\xfe.png"), os.fsdecode(b"cl\xffass/\xfd.tx\xfct"))
    folder = list_pictures(root)
    assert [path.exists() for path in folder.files] == [True]
    assert all(line.isprintable() for line in describe(folder, folder))
