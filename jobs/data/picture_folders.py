"""Folders of pictures, one folder for each class: list the files, and describe what was listed and what was left out.

For folders without hidden files and links, classes, files and their order are those of torchvision's ImageFolder.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from jobs.errors import JobError
from orchestrator.messages import counted, shown

ENDINGS: tuple[str, ...] = IMG_EXTENSIONS  # in lower case; the case of a file's ending does not matter
# Folders and files that systems make beside the user's, in lower case; most others have names that begin with a dot.
SYSTEM = {"@eadir", "__macosx", "lost+found", "#recycle", "$recycle.bin", "system volume information"}
SYSTEM |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}
FEW_CLASSES = 12  # at most so many are all named
KINDS_SHOWN = 6

HIDDEN, REPEATED, BESIDE = "hidden or system", "link to a folder listed already", "beside the class folders"


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder of class folders."""

    root: Path
    classes: list[str]  # of the training set; a class's place in this list is its number
    files: list[Path]
    targets: list[int]  # the class number of each file
    left_out: Mapping[
        str, list[str]
    ]  # names of other files and folders, by kind: HIDDEN, REPEATED, BESIDE or an ending

    @property
    def counts(self) -> dict[str, int]:
        """The number of pictures of each class."""
        number = Counter(self.targets)
        return {name: number[place] for place, name in enumerate(self.classes)}


def is_system(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or made by a system and not by the user."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_picture(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def class_names(root: Path) -> list[str]:
    """Return the names of the class folders, sorted. Raises JobError if there are none."""
    return _sorted_entries(root, _above(root), defaultdict(list))


def list_pictures(root: Path, classes: Sequence[str] | None = None) -> PictureFolder:
    """List the pictures at any depth below each class folder; system folders and hidden files are left out.

    classes: for a test set, the names of the training set's classes, whose numbers it gets; it may lack some of them.
    None: a training set, whose classes are its folders in sorted order. Raises JobError if a folder can't be listed, a
    class of a training set has no picture, or a test set has a class that the training set lacks.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    above = _above(root)
    found = _sorted_entries(root, above, left_out)
    known = found if classes is None else list(classes)
    if unknown := sorted(set(found) - set(known)):
        raise JobError(
            f"{shown_path(root)} has classes that the training set does not have: {_named(unknown)}. Rename or remove "
            "these folders, or add training pictures of these classes"
        )
    files: list[Path] = []
    targets: list[int] = []
    for name in found:
        paths = _pictures(os.path.join(root, name), above, left_out)
        files += paths
        targets += [known.index(name)] * len(paths)
    pictures = PictureFolder(root, known, files, targets, left_out)
    empty = [name for name, count in pictures.counts.items() if not count]
    if classes is None and empty:
        raise JobError(
            f"{shown_path(root)}: found no valid file for the classes {_named(empty)}. Add pictures "
            f"({', '.join(ENDINGS)}), or remove these folders"
        )
    if not files:
        raise JobError(f"{shown_path(root)} has no pictures ({', '.join(ENDINGS)}) in its class folders")
    return pictures


Identity = tuple[int, int]  # device and inode


def _identity(path: str | Path) -> Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _above(root: Path) -> frozenset[Identity]:
    """Return the folder and the folders above it, where a link from inside would lead back."""
    resolved = root.resolve()
    return frozenset(map(_identity, (resolved, *resolved.parents)))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:  # passing over it would lose pictures silently
        raise JobError(f"{shown_path(folder)} can't be listed: {error.strerror or error}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _sorted_entries(root: Path, above: Iterable[Identity], left_out: dict[str, list[str]]) -> list[str]:
    """Return the names of the class folders, sorted. Adds the other entries to left_out."""
    names = []
    for entry in _entries(root):
        if is_system(entry.name):
            left_out[HIDDEN].append(entry.name)
        elif not _is_folder(entry):
            left_out[BESIDE].append(entry.name)
        elif _identity(entry.path) in above:
            left_out[REPEATED].append(entry.name)
        else:
            names.append(entry.name)
    if not names:
        raise JobError(f"{shown_path(root)} has no class folders; put the pictures of each class into a folder in it")
    return names


def _pictures(top: str, above: Iterable[Identity], left_out: dict[str, list[str]]) -> list[Path]:
    """Return the pictures at any depth below a class folder in ImageFolder's order: by folder, then by name."""
    by_folder: dict[str, list[str]] = {}
    seen, waiting, links = {*above}, [top], list[str]()
    while waiting or links:  # links last, so that a folder is listed under its own name if it has one here
        folder = waiting.pop() if waiting else links.pop(0)
        if (identity := _identity(folder)) in seen:
            left_out[REPEATED].append(os.path.basename(folder))
            continue
        seen.add(identity)
        by_folder[folder] = []
        for entry in _entries(folder):
            if is_system(entry.name):
                left_out[HIDDEN].append(entry.name)
            elif _is_folder(entry):
                (links if entry.is_symlink() else waiting).append(entry.path)
            elif is_picture(entry.name):
                by_folder[folder].append(entry.name)
            else:
                left_out[os.path.splitext(entry.name)[1].lower()].append(entry.name)
    return [Path(folder, name) for folder in sorted(by_folder) for name in by_folder[folder]]


# --- what is shown to the user


def shown_path(path: str | Path) -> str:
    """Return a path for a message, in one line of printable characters: a file's name may be any bytes."""
    return shown(str(path), limit=1000)


def _named(classes: Sequence[str]) -> str:
    more = f" and {len(classes) - FEW_CLASSES} more" if len(classes) > FEW_CLASSES else ""
    return ", ".join(shown(name, 60) for name in classes[:FEW_CLASSES]) + more


def describe(train: PictureFolder, test: PictureFolder) -> list[str]:
    """Return lines for the user: the pictures of each class, and what deserves a look."""
    lines = [f"training pictures: {_per_class(train)}", f"test pictures: {_per_class(test)}"]
    for setting, folder in (("training_source_dir", train), ("testing_source_dir", test)):
        lines += [f"{setting}, left out: {_kinds(folder.left_out)}"] if folder.left_out else []
    if missing := [name for name, count in test.counts.items() if not count]:
        what = counted(len(missing), "class is", "classes are")
        lines.append(f"note: {what} missing from the test set: {_named(missing)}")
    return lines + repeated([*train.files, *test.files])


def _per_class(folder: PictureFolder) -> str:
    counts = folder.counts
    total = f"{len(folder.files)} of {counted(len(counts), 'class', 'classes')}"
    if len(counts) <= FEW_CLASSES:
        return f"{total}: " + ", ".join(f"{shown(name, 60)} {count}" for name, count in counts.items())
    ends = (min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name]))
    smallest, largest = (f"{counts[name]} ({shown(name, 60)})" for name in ends)
    return f"{total}, from {smallest} to {largest} in a class"


def _kinds(left_out: Mapping[str, list[str]]) -> str:
    kinds = sorted(left_out.items(), key=lambda kind: (-len(kind[1]), kind[0]))
    parts = [f"{_kind(kind, len(names))}, such as {shown(names[0], 60)}" for kind, names in kinds[:KINDS_SHOWN]]
    if rest := sum(len(names) for _, names in kinds[KINDS_SHOWN:]):
        parts.append(f"{counted(rest, 'other file')}")
    return "; ".join(parts)


def _kind(kind: str, count: int) -> str:
    if kind == HIDDEN:
        return f"{count} hidden or system {'entry' if count == 1 else 'entries'}"
    if kind == REPEATED:
        return counted(count, "link to a folder that is listed already", "links to folders that are listed already")
    if kind == BESIDE:
        return f"{counted(count, 'file')} beside the class folders"
    return f"{counted(count, 'file')} " + (f"ending {shown(kind, 20)}" if kind else "without an ending")


def repeated(files: Iterable[Path]) -> list[str]:
    """Return a line about files that are listed more than once, under one name or as links to each other, because a
    model may then be tested on what it was trained on; [] if there are none."""
    first: dict[Identity, Path] = {}
    again = []
    for path in files:
        try:
            identity = _identity(path)
        except OSError:  # the check of each picture names the file
            continue
        if identity in first:
            again.append((first[identity], path))
        first.setdefault(identity, path)
    if not again:
        return []
    one, other = map(shown_path, again[0])
    what = counted(len(again), "file is", "files are")
    return [
        f"note: {what} listed more than once, such as {other}, which is the same file as {one}; a model may then be "
        "validated or tested on a picture that it was trained on"
    ]
