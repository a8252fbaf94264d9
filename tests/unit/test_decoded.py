"""Pictures are decoded once per node and then found in the cache. They give the same batches whether they are kept on
the device or fetched by loader processes."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder, OxfordIIITPet
from torchvision.transforms import v2

from jobs.data import decode_cache, feeds, splits
from jobs.data.augment import CenterCrop, Cutout, Flip, Normalize, PadCrop, RandomCrop, Resize, Step
from jobs.data.decode_cache import Decoded, decoded, verify
from jobs.data.decoded import DecodedFeed, DecodedImages
from jobs.data.images import ImageFeed
from jobs.errors import JobError
from tests.support.real_data import pets_root

CPU = torch.device("cpu")
SIZE = 20  # of the shorter side, in pixels
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # These tests use two loader processes even on one core, and fork them while torch has threads.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of this node's local disk."""
    place = tmp_path / "node"
    place.mkdir()
    monkeypatch.setenv("SLURM_TMPDIR", str(place))
    return place


def draw(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """Write PNG files of noise with these heights and widths."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0)
    paths = [folder / f"{number:03}.png" for number in range(len(sizes))]
    for path, (height, width) in zip(paths, sizes, strict=True):
        Image.fromarray(pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def squares(tmp_path: Path) -> list[Path]:
    return draw(tmp_path / "squares", [(30, 30)] * 40)


@pytest.fixture
def mixed(tmp_path: Path) -> list[Path]:
    return draw(tmp_path / "mixed", [(30 + 3 * (n % 5), 30 + 7 * (n % 3)) for n in range(40)])


def kept(node: Path) -> list[Path]:
    (folder,) = node.iterdir()
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock")


# --- the cache


@pytest.mark.parametrize("cores", [1, 2])
def test_each_picture_equals_torchvisions(cores: int, mixed: list[Path]) -> None:
    pictures = decoded(mixed, SIZE, cores)
    for picture, path in zip(pictures, mixed, strict=True):
        expected = v2.functional.pil_to_tensor(v2.Resize(SIZE)(Image.open(path).convert("RGB")))
        assert torch.equal(torch.from_numpy(picture).permute(2, 0, 1), expected)
    assert not pictures.equal


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (25, 25)).save(tmp_path / f"{mode}.png")
    pictures = decoded(sorted(tmp_path.glob("*.png")), SIZE)
    assert [picture.shape for picture in pictures] == [(SIZE, SIZE, 3)] * 4


def test_statistics_cover_all_pixels(mixed: list[Path]) -> None:
    pictures = decoded(mixed, SIZE)
    values = np.concatenate([picture.reshape(-1, 3) for picture in pictures]) / 255
    mean, std = pictures.statistics()
    assert mean == pytest.approx(values.mean(axis=0))
    assert std == pytest.approx(values.std(axis=0))


def test_decoded_pictures_are_found_again(squares: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = decoded(squares, SIZE)
    monkeypatch.setattr(decode_cache, "decode", None)  # decoding again would fail
    again = decoded(squares, SIZE)
    assert again.file == first.file
    assert np.array_equal(again[7], first[7])
    assert again.statistics() == first.statistics()


def test_only_the_owner_can_open_the_cache(squares: list[Path], node: Path) -> None:
    umask = os.umask(0)
    try:
        decoded(squares, SIZE)
    finally:
        os.umask(umask)
    (folder,) = node.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.name == f"orch-pictures-{os.getuid()}"


@pytest.mark.parametrize("change", ["content", "time", "another file", "a file less", "another size"])
def test_other_files_or_another_size_are_decoded_again(change: str, squares: list[Path], node: Path) -> None:
    decoded(squares, SIZE)
    size = SIZE
    match change:
        case "content":
            known = squares[3].stat()
            Image.new("RGB", (30, 31)).save(squares[3])
            os.utime(squares[3], ns=(known.st_atime_ns, known.st_mtime_ns))
        case "time":
            os.utime(squares[3], (0, 0))
        case "another file":
            squares = [*squares[:-1], squares[0]]
        case "a file less":
            squares = squares[1:]
        case "another size":
            size += 1
    pictures = decoded(squares, size)
    assert len(kept(node)) == 2
    assert np.array_equal(pictures[3], decode_cache.decode(squares[3], size))


@pytest.mark.parametrize("damage", ["pixels cut off", "no pixels", "index cut off", "no index"])
def test_a_damaged_entry_is_decoded_again(damage: str, squares: list[Path]) -> None:
    pictures = decoded(squares, SIZE)
    expected = np.array(pictures[39])
    assert pictures.file is not None
    broken = pictures.file if "pixels" in damage else pictures.file.with_name(decode_cache.INDEX)
    if damage.startswith("no"):
        broken.unlink()
    else:
        os.truncate(broken, 100)
    assert np.array_equal(decoded(squares, SIZE)[39], expected)


def test_jobs_that_start_together_on_a_node_decode_once(squares: list[Path], node: Path) -> None:
    script = (
        "import sys, logging; from pathlib import Path; logging.basicConfig(level=logging.INFO)\n"
        "from jobs.data.decode_cache import decoded\n"
        f"pictures = decoded(sorted(Path({str(squares[0].parent)!r}).iterdir()), {SIZE})\n"
        "print(int(pictures[39].sum()))"
    )
    root = Path(__file__).parents[2]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert len({out for out, _ in outputs}) == 1
    assert sum("decoded 40 pictures" in err for _, err in outputs) == 1
    assert len(kept(node)) == 1


def test_a_cached_list_is_sent_to_another_process_as_a_path(squares: list[Path]) -> None:
    pictures = decoded(squares, SIZE)
    assert pictures[3].any()  # now the file is mapped into memory
    sent = pickle.dumps(pictures)
    assert len(sent) < 20_000
    assert np.array_equal(pickle.loads(sent)[3], pictures[3])


def test_a_change_in_memory_does_not_reach_the_disk(squares: list[Path]) -> None:
    pictures = decoded(squares, SIZE)
    before = int(pictures[3].sum())
    pictures[3][:] = 0
    assert int(decoded(squares, SIZE)[3].sum()) == before


def test_an_empty_list_can_be_decoded() -> None:
    assert len(decoded([], SIZE)) == 0


# --- unused entries


def age(entry: Path, days: float) -> None:
    for path in (entry, entry / decode_cache.USED):
        if path.exists():
            os.utime(path, (time.time() - days * 86400,) * 2)


def test_an_entry_that_was_not_opened_for_a_week_is_removed(squares: list[Path], mixed: list[Path], node: Path) -> None:
    first = decoded(squares, SIZE)
    before = int(first[3].sum())
    (entry,) = kept(node)
    age(entry, 6.5)
    decoded(mixed, SIZE)
    assert entry.exists()
    age(entry, 7.5)
    decoded(mixed, SIZE)
    assert not entry.exists()
    assert int(first[3].sum()) == before, "an open entry can still be read"


def test_an_entry_in_use_stays(squares: list[Path], mixed: list[Path], node: Path) -> None:
    decoded(squares, SIZE)
    (entry,) = kept(node)
    age(entry, 8)
    os.utime(entry / decode_cache.USED)
    decoded(mixed, SIZE)
    assert entry.exists()


def test_a_dead_builders_files_are_removed_but_not_a_living_ones(squares: list[Path], node: Path) -> None:
    decoded(squares, SIZE)
    (folder,) = node.iterdir()
    dead, alive = folder / "dead.part", folder / "alive.part"
    for part in (dead, alive):
        part.mkdir()
        age(part, 8)
    with decode_cache.FileLock(folder / "alive.lock"):
        decoded(squares, SIZE)
    assert (dead.exists(), alive.exists()) == (False, True)


# --- disks on which nothing can be cached


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every pixel file by /dev/full, where each write fails as on a full disk."""
    opened = Path.open

    def open_full(path: Path, *arguments: Any, **options: Any) -> Any:
        return opened(Path("/dev/full") if path.name == decode_cache.PIXELS else path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_full)


def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", mkdir)


@pytest.mark.parametrize("fill", [full_disk, no_folder])
def test_a_full_disk_gives_a_warning_and_the_same_batches(
    fill: Any, mixed: list[Path], node: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        fill(patch)
        pictures = decoded(mixed, SIZE)
    assert pictures.file is None
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("40 decoded pictures (0.0 GB) can't be cached: ")
    assert "No space left on device" in line
    assert "TMPDIR" in line
    assert kept(node) == [] if list(node.iterdir()) else True
    good = decoded(mixed, SIZE)
    assert good.file is not None
    assert pictures.statistics() == good.statistics()
    steps: list[Step] = [RandomCrop(16), Flip()]
    batches = [whole(feed(DecodedImages(one, [0] * 40, steps)).shuffled(5))[0] for one in (pictures, good)]
    assert torch.equal(*batches)


def test_a_folder_that_others_can_open_is_refused(squares: list[Path], node: Path) -> None:
    folder = node / f"orch-pictures-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(JobError, match=r"must be a folder that only you can open"):
        decoded(squares, SIZE)
    folder.rmdir()
    folder.symlink_to(squares[0].parent)
    with pytest.raises(JobError, match=r"must be a folder that only you can open"):
        decoded(squares, SIZE)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", None], ids=["empty", "no picture", "cut off"])
def test_a_file_that_is_not_a_picture_is_named(
    content: bytes | None, cores: int, squares: list[Path], node: Path
) -> None:
    squares[21].write_bytes(squares[21].read_bytes()[:300] if content is None else content)
    with pytest.raises(JobError, match=rf"^{squares[21]} can't be read as a picture: .*; repair or remove it$"):
        decoded(squares, SIZE, cores)
    assert kept(node) == []


def test_all_unreadable_files_are_named_at_once(squares: list[Path], node: Path) -> None:
    for number in range(5, 17):
        squares[number].write_bytes(b"damaged")
    squares[2].unlink()
    for read in (lambda: decoded(squares, SIZE, 2), lambda: verify([squares[:10], squares[10:]], SIZE, 2)):
        with pytest.raises(JobError) as raised:
            read()
        first, *lines = str(raised.value).splitlines()
        assert first == "13 of 40 pictures can't be read; repair or remove them:"
        assert lines[0] == f"  {squares[2]} can't be read: No such file or directory"
        assert [line.split()[0] for line in lines[1:10]] == [str(path) for path in squares[5:14]]
        assert lines[10:] == ["  and 3 more"]
    assert kept(node) == []


@pytest.mark.parametrize("before", ["verified", "decoded"])
def test_pictures_are_verified_only_once_until_a_file_changes(
    before: str, squares: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify([squares], SIZE) == 40 if before == "verified" else len(decoded(squares, SIZE)) == 40
    with monkeypatch.context() as patch:
        patch.setattr(decode_cache, "check", None)  # reading again would fail
        assert verify([squares], SIZE) == 0
    squares[7].write_bytes(b"damaged")
    with pytest.raises(JobError, match=rf"^{squares[7]} can't be read as a picture"):
        verify([squares[:3], squares], SIZE)


@pytest.mark.parametrize("cores", [1, 2])
def test_too_little_memory_is_one_short_error(cores: int, squares: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, size: int) -> None:
        raise MemoryError(f"there is too little memory to decode {path.name}")

    monkeypatch.setattr(decode_cache, "decode", fail)
    with pytest.raises(MemoryError, match=r"^there is too little memory to decode 000\.png$"):
        decoded(squares, SIZE, cores)


def test_files_whose_names_are_no_text_are_cached(tmp_path: Path) -> None:
    (path,) = draw(tmp_path / "odd", [(30, 30)])
    odd = path.rename(path.with_name(os.fsdecode(b"\xff\n.png")))
    assert np.array_equal(decoded([odd], SIZE)[0], decode_cache.decode(odd, SIZE))
    assert verify([[odd]], SIZE) == 0


def test_a_missing_file_is_named(squares: list[Path]) -> None:
    squares[3].unlink()
    with pytest.raises(JobError, match=rf"^{squares[3]} can't be read: No such file"):
        decoded(squares, SIZE)


# --- batches


INDICES = [*range(1, 20), *range(25, 40)]


def feed(source: DecodedImages, cores: int = 1, batch_size: int = 8) -> Any:
    return feeds.make_feed(source, INDICES, batch_size, CPU, cores)


def whole(batches: Iterator[Any]) -> tuple[Tensor, Tensor]:
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


STEPS = {
    "random crop": [RandomCrop(16), Flip(), Normalize(MEAN, STD), Cutout(4)],
    "middle": [CenterCrop(15), Normalize(MEAN, STD)],
    "crop alone": [RandomCrop((12, 16))],
    "padded": [PadCrop(20, 3, "reflect"), Normalize(MEAN, STD)],
    "resized": [Resize(18), Flip()],
    "nothing": [],
}


@pytest.mark.parametrize("name", STEPS)
def test_batches_on_the_device_equal_fetched_ones(name: str, squares: list[Path]) -> None:
    pictures, targets = decoded(squares, SIZE), list(range(40))
    resident = feed(DecodedImages(pictures, targets, STEPS[name]))
    fetched = feed(DecodedImages(pictures, targets, STEPS[name], memory_bytes=0))
    assert (type(resident), type(fetched)) == (ImageFeed, DecodedFeed)
    assert resident.augmented == fetched.augmented == (name not in ("middle", "nothing"))
    for batches in (lambda f: f.shuffled(5), lambda f: f.shuffled(5, 2, 1), lambda f: f.in_order(1, 2)):
        one, other = whole(batches(resident)), whole(batches(fetched))
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert one[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("first", [0, 2, 4])
def test_batches_do_not_depend_on_the_processes_or_on_where_the_epoch_begins(first: int, mixed: list[Path]) -> None:
    source = DecodedImages(decoded(mixed, SIZE), list(range(40)), STEPS["random crop"])
    one = list(feed(source, cores=1).shuffled(5))
    processes = feed(source, cores=4)
    for _ in range(2):  # with the same processes
        rest = list(processes.shuffled(5, first))
        assert len(rest) == len(one) - first
        for (images, targets), (same_images, same_targets) in zip(rest, one[first:], strict=True):
            assert torch.equal(images, same_images)
            assert torch.equal(targets, same_targets)


def test_pictures_of_many_sizes_are_cropped_as_torchvision_does(mixed: list[Path]) -> None:
    pictures = decoded(mixed, SIZE)
    made, targets = whole(feed(DecodedImages(pictures, list(range(40)), [CenterCrop(16)])).in_order())
    for image, target in zip(made, targets.tolist(), strict=True):
        picture = torch.from_numpy(np.array(pictures[target])).permute(2, 0, 1)
        expected = v2.functional.to_dtype(v2.CenterCrop(16)(picture), torch.float32, scale=True)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-7)
    cropped, targets = whole(feed(DecodedImages(pictures, list(range(40)), [RandomCrop(16)])).shuffled(5))
    places = set()
    for image, target in zip(cropped, targets.tolist(), strict=True):
        picture = torch.from_numpy(np.array(pictures[target])).permute(2, 0, 1) / 255
        windows = picture.unfold(1, 16, 1).unfold(2, 16, 1)
        matches = torch.nonzero((windows.permute(1, 2, 0, 3, 4) - image).abs().amax(dim=(2, 3, 4)) < 1e-6)
        assert len(matches) == 1
        places.add(tuple(matches[0].tolist()))
    assert len(places) > 10


def test_a_subset_of_the_pictures_is_fed_by_a_loader(mixed: list[Path]) -> None:
    source = DecodedImages(decoded(mixed, SIZE), list(range(40)), STEPS["random crop"])
    images, targets = whole(feeds.make_feed(Subset(source, range(10)), range(10), 4, CPU, 1).shuffled(5))
    assert images.shape == (10, 3, 16, 16)
    assert sorted(targets.tolist()) == list(range(10))


def test_reading_does_not_change_the_random_state(mixed: list[Path]) -> None:
    source = DecodedImages(decoded(mixed, SIZE, cores=2), [0] * 40, STEPS["random crop"])
    before = torch.get_rng_state()
    whole(feed(source).shuffled(5))
    decoded(mixed, SIZE + 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        pytest.param([], "the first step must be RandomCrop or CenterCrop", id="no crop"),
        pytest.param([Flip(), RandomCrop(16)], "the first step must be RandomCrop or CenterCrop", id="crop too late"),
        pytest.param([RandomCrop(21)], "crop of 21x21 pixels is larger than a picture, 20x2", id="crop too large"),
    ],
)
def test_pictures_of_many_sizes_without_a_fitting_crop_are_an_error(
    steps: list[Step], message: str, mixed: list[Path]
) -> None:
    with pytest.raises(JobError, match=message):
        next(feed(DecodedImages(decoded(mixed, SIZE), [0] * 40, steps)).shuffled(5))


def test_a_missing_target_is_an_error(squares: list[Path]) -> None:
    with pytest.raises(JobError, match="40 pictures and 39 targets"):
        DecodedImages(decoded(squares, SIZE), [0] * 39)


def test_photographs_of_pets_can_be_fed(node: Path) -> None:
    source = OxfordIIITPet(str(pets_root()), split="test")
    pictures = decoded([Path(path) for path in source._images][:48], 64, cores=2)
    assert isinstance(pictures, Decoded)
    assert len({tuple(shape) for shape in pictures.shapes.tolist()}) > 5
    steps: list[Step] = [RandomCrop(56), Flip(), Normalize(*pictures.statistics())]
    images, _ = whole(feed(DecodedImages(pictures, source._labels[:48], steps), cores=2).shuffled(5))
    assert images.shape == (len(INDICES), 3, 56, 56)
    assert abs(images.mean().item()) < 0.3
    assert abs(images.std().item() - 1) < 0.2


def test_the_targets_of_an_image_folder_are_used(tmp_path: Path) -> None:
    for label in range(3):
        draw(tmp_path / "folder" / f"class{label}", [(30, 30)] * 6)
    folder = ImageFolder(str(tmp_path / "folder"))
    source = DecodedImages(decoded([Path(path) for path, _ in folder.samples], SIZE), folder.targets)
    train, validation = splits.split(source, 0.34, seed=0)
    assert np.bincount(np.array(source.targets)[validation]).tolist() == [2, 2, 2]
    assert len(train) == 12
