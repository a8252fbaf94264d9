"""The sketch data of the original report: fetched, or artificial drawings of the same layout in their place.

The sketches are those of Eitz, Hays and Alexa, "How Do Humans Sketch Objects?", ACM Trans. Graph. 31(4), 2012: 250
classes, 80 drawings of each. ROOT/train and ROOT/test hold one folder per class; ROOT/SOURCE.json says where they come
from.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from jobs.data.download import MB, Say
from jobs.data.strokes import drawings
from jobs.errors import FULL_DISK, JobError
from orchestrator.files.atomic import publish
from orchestrator.messages import counted

URL = "https://cybertron.cg.tu-berlin.de/eitz/projects/classifysketch/sketches_png.zip"
ARCHIVE = "sketches_png.zip"
ARCHIVE_BYTES = 525_000_000  # roughly
CLASSES, DRAWINGS = 250, 80  # in the original
TRAIN = 60  # of each class, the first by file number; the others are the test set
RECORD = "SOURCE.json"
ABANDONED_S = 6 * 3600.0
WEIGHTS = "stand-in-weights.pth"  # in ROOT of stand-in data: pretrained weights made with them
_MEMBER = re.compile(r"(?:.*/)?(?P<label>[^/]+)/(?P<number>\d+)\.png")

STAND_IN_CLASSES, STAND_IN_SIZE, STAND_IN_SEED = 10, 256, 0  # classes, pixels
STAND_IN = "stand-in drawings made by `orch prepare --stand-in`, not the sketches of the report"


@dataclass(frozen=True)
class DataSource:
    """Where the files of a data set come from. Stored beside them as SOURCE.json."""

    name: str
    stand_in: bool = False  # artificial data in place of the real ones
    url: str | None = None
    sha256: str | None = None  # of the archive
    classes: int = 0
    train_images: int = 0
    test_images: int = 0
    weights: dict[str, str] = field(default_factory=dict)  # for stand-in data: the pretrained weights made with them
    weights_params: dict[str, int] = field(default_factory=dict)  # the job_params that these weights were made with

    def __str__(self) -> str:
        counts = f"{self.train_images} training and {self.test_images} test images"
        return f"{self.name}: {counted(self.classes, 'class', 'classes')}, {counts}"


_SOURCE = TypeAdapter(DataSource)


def read_source(root: Path) -> DataSource | None:
    """Return the record of the data in a folder; None if there is none. Raises JobError if it is damaged."""
    try:
        return _SOURCE.validate_json((root / RECORD).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise JobError(f"{root / RECORD} can't be read: delete {root} and run `orch prepare` again") from error


def write_source(root: Path, source: DataSource) -> None:
    text = json.dumps(asdict(source), indent=1) + "\n"
    publish(root / RECORD, lambda target: target.write(text.encode()))


def root_of(train: str | None, test: str | None) -> Path:
    """Return the folder that contains the training and the test folder. Raises JobError if it is not ROOT/train and
    ROOT/test."""
    if not train or not test or Path(train) != Path(test).with_name("train") or Path(test).name != "test":
        raise JobError(
            f"training_source_dir is {train} and testing_source_dir {test}; for dataset tu_berlin, they must be "
            "FOLDER/train and FOLDER/test"
        )
    return Path(train).parent


def is_there(root: Path) -> bool:
    return (root / "train").is_dir() and (root / "test").is_dir()


def unpack(archive: Path, root: Path, *, url: str | None, sha256: str, say: Say, remove: bool = False) -> DataSource:
    """Unpack the archive of sketches and split it: of each class, the first 60 drawings by file number are training
    images, the others test images. ROOT appears only when it is complete. remove: delete the archive afterwards, and
    also if it is damaged.

    Raises JobError if the archive is damaged or not one of sketches, if the disk is full, or if ROOT exists already.
    """

    def fill(folder: Path) -> DataSource:
        with zipfile.ZipFile(archive) as opened:
            found = _drawings(opened, archive)
            total = sum(map(len, found.values()))
            say(f"unpacking {total} drawings of {counted(len(found), 'class', 'classes')}")
            for label, members in found.items():
                for place, (number, member) in enumerate(sorted(members, key=itemgetter(0))):
                    part = folder / ("train" if place < TRAIN else "test") / label
                    part.mkdir(parents=True, exist_ok=True)
                    with opened.open(member) as source, (part / f"{number}.png").open("xb") as target:
                        shutil.copyfileobj(source, target)
        train = TRAIN * len(found)
        return DataSource("TU Berlin sketches", False, url, sha256, len(found), train, total - train)

    try:
        source = _build(root, fill)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        if remove:
            archive.unlink(missing_ok=True)
        raise JobError(
            f"{archive} is damaged or incomplete ({error}). Copy or download it again; the whole archive has about "
            f"{ARCHIVE_BYTES / MB:.0f} MB"
        ) from error
    if remove:
        archive.unlink(missing_ok=True)
    if (source.classes, source.train_images) != (CLASSES, TRAIN * CLASSES):
        say(f"note: the original has {CLASSES} classes with {DRAWINGS} drawings each; this archive differs")
    return source


def _drawings(opened: zipfile.ZipFile, archive: Path) -> dict[str, list[tuple[int, zipfile.ZipInfo]]]:
    """Return the drawings of each class, with their numbers. Raises JobError if there are none, or too few."""
    drawings: dict[str, list[tuple[int, zipfile.ZipInfo]]] = {}
    for member in opened.infolist():
        match = _MEMBER.fullmatch(member.filename)
        if match and not match["label"].startswith((".", "_")):
            drawings.setdefault(match["label"], []).append((int(match["number"]), member))
    if not drawings:
        raise JobError(f"{archive} contains no drawings; the sketches are files such as png/airplane/1.png")
    for label, members in drawings.items():
        numbers = [number for number, _ in members]
        if len({*numbers}) < len(numbers):
            raise JobError(f"{archive}: {label} contains two drawings of the same number. Is it the original archive?")
    few = [label for label, members in drawings.items() if len(members) <= TRAIN]
    if few:
        raise JobError(
            f"{archive}: {', '.join(sorted(few)[:3])} have {TRAIN} drawings or fewer; each class needs {TRAIN} for "
            "training and at least one for testing. Is the archive complete?"
        )
    return drawings


def draw_stand_in(root: Path, say: Say, classes: int = STAND_IN_CLASSES, seed: int = STAND_IN_SEED) -> DataSource:
    """Draw artificial classes of strokes, with 60 training and 20 test images each, in place of the sketches. The same
    seed gives the same files. Raises JobError if ROOT exists already or the disk is full."""

    def fill(folder: Path) -> DataSource:
        say(f"drawing {counted(classes, 'class', 'classes')} of strokes")
        for label in range(classes):
            for number, drawing in enumerate(drawings((seed, label), DRAWINGS, STAND_IN_SIZE), start=1):
                part = folder / ("train" if number <= TRAIN else "test") / f"stand-in-{label:03d}"
                part.mkdir(parents=True, exist_ok=True)
                drawing.save(part / f"{number}.png")
        test_images = (DRAWINGS - TRAIN) * classes
        return DataSource(STAND_IN, True, classes=classes, train_images=TRAIN * classes, test_images=test_images)

    return _build(root, fill)


def refuse_to_replace(root: Path) -> None:
    """Raise JobError if the folder exists and is not empty."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        made = (
            "contains data already"
            if (root / RECORD).exists()
            else "exists already, and `orch prepare` did not make it"
        )
        raise JobError(
            f"{root} {made}. Move it away, or name other folders in training_source_dir and testing_source_dir"
        )


def _remove_abandoned(root: Path) -> None:
    """Delete what killed processes have left: filling a folder takes minutes, not hours. Other hidden folders stay."""
    ours = re.compile(re.escape(f".{root.name}-") + r"(\d+|pretraining-\w+)")
    for folder in root.parent.iterdir():
        with suppress(OSError):
            if not ours.fullmatch(folder.name):
                continue
            if time.time() - folder.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)


def _build(root: Path, fill: Callable[[Path], DataSource]) -> DataSource:
    """Fill a new folder, then give it its name. Raises JobError if that name is in use or the disk is full."""
    refuse_to_replace(root)
    root = root.resolve()  # may be a link to an empty folder on another file system
    building = root.with_name(f".{root.name}-{os.getpid()}")
    try:
        building.mkdir(parents=True)
        _remove_abandoned(root)
        source = fill(building)
        write_source(building, source)
        os.sync()  # the files must be on disk before the folder gets its name
        if root.is_dir():
            root.rmdir()
        building.rename(root)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise JobError(f"another `orch prepare` has made {root} in the meantime; run the command again") from error
        advice = ". Free some space and run the same command again" if error.errno in FULL_DISK else ""
        raise JobError(f"{root} can't be filled: {error.strerror or error}{advice}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return source
