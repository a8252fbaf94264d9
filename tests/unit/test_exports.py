"""Exports are written beside the user's files and never replace one that orch did not write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from orchestrator.errors import RunError
from orchestrator.files import atomic, exports
from orchestrator.files.exports import destination, write


def export(out: Path, content: bytes = b"weights") -> None:
    write(destination(out), lambda target: target.write(content), {"run": "tiny"})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["best.pt", "best", "my best.pth", "best.of.all.pt"])
def test_an_earlier_export_is_replaced(name: str, tmp_path: Path) -> None:
    export(tmp_path / name, b"first")
    export(tmp_path / name, b"second")
    description = (tmp_path / name).with_suffix(".json")
    assert (tmp_path / name).read_bytes() == b"second"
    assert json.loads(description.read_text()) | {"weights_sha256": ""} == {
        "made_by": "orch export",
        "weights": name,
        "weights_sha256": "",
        "run": "tiny",
    }
    assert sorted(contents(tmp_path)) == sorted([name, description.name])


def test_a_description_without_its_weights_is_replaced(tmp_path: Path) -> None:
    export(tmp_path / "best.pt")
    (tmp_path / "best.pt").unlink()
    export(tmp_path / "best.pt", b"again")
    assert (tmp_path / "best.pt").read_bytes() == b"again"


def link_to(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to("elsewhere")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "settings": (lambda folder: (folder / "best.json").write_text('{"name": "best"}'), "would replace .*best.json"),
    "a list": (lambda folder: (folder / "best.json").write_text("[1]"), "would replace .*best.json"),
    "deep": (lambda folder: (folder / "best.json").write_text("[" * 100_000), "would replace .*best.json"),
    "bytes": (lambda folder: (folder / "best.json").write_bytes(b"\xff"), "would replace .*best.json"),
    "a folder as description": (lambda folder: (folder / "best.json").mkdir(), "would replace .*best.json"),
    "a link as description": (link_to("best.json"), "would replace .*best.json"),
    "weights": (lambda folder: (folder / "best.pt").write_bytes(b"mine"), "best.pt: this file exists"),
    "a link": (link_to("best.pt"), "best.pt: this file exists"),
    "a pipe": (lambda folder: os.mkfifo(folder / "best.pt"), "best.pt: this file exists"),
    "a folder": (lambda folder: (folder / "best.pt").mkdir(), "it is a folder; name a file, such as .*best.pt/best.pt"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_orch_did_not_write_is_never_replaced(kind: str, tmp_path: Path) -> None:
    make, message = FOREIGN[kind]
    make(tmp_path)
    before, names = contents(tmp_path), sorted(os.listdir(tmp_path))
    with pytest.raises(RunError, match=f"^--out .*{message}"):
        export(tmp_path / "best.pt")
    assert (contents(tmp_path), sorted(os.listdir(tmp_path))) == (before, names)


@pytest.mark.parametrize(
    ("name", "message"),
    [("best.pt", "it was changed since"), ("best.bin", r"best\.json already describes best\.pt")],
)
def test_an_export_that_was_changed_or_is_another_is_not_replaced(name: str, message: str, tmp_path: Path) -> None:
    export(tmp_path / "best.pt")
    (tmp_path / "best.pt").write_bytes(b"changed")
    before = contents(tmp_path)
    with pytest.raises(RunError, match=message):
        export(tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["best.json", "best.JSON", "", ".."])
def test_a_name_that_can_not_be_an_exports_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"^--out .*: (it is a folder; name a file|.* use another suffix, such as .pt)"):
        export(Path(name))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
@pytest.mark.parametrize("name", ["best.pt", "best.json"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    links: bool, name: str, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def link(source: Path, target: Path) -> None:
            raise OSError(atomic.NO_LINKS[0], "no links here")

        monkeypatch.setattr(os, "link", link)
    if earlier:
        export(tmp_path / "best.pt", b"old")

    def save(target: IO[bytes]) -> None:
        target.write(b"weights")
        (tmp_path / "other").write_bytes(b"of the user")
        (tmp_path / "other").rename(tmp_path / name)

    with pytest.raises(RunError, match=f"^--out .*best.pt: .*{name} appeared meanwhile. Choose another --out"):
        write(destination(tmp_path / "best.pt"), save, {})
    assert (tmp_path / name).read_bytes() == b"of the user"
    if not earlier:
        assert contents(tmp_path) == {name: b"of the user"}


def test_without_hard_links_an_export_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(atomic.NO_LINKS[0], "no links here")

    monkeypatch.setattr(os, "link", link)
    export(tmp_path / "best.pt")
    assert contents(tmp_path)["best.pt"] == b"weights"
    assert len(contents(tmp_path)) == 2


def test_a_full_disk_is_an_error_that_leaves_the_earlier_export(tmp_path: Path) -> None:
    export(tmp_path / "best.pt", b"old")
    before = contents(tmp_path)

    def save(target: IO[bytes]) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"^--out .*best.pt: No space left on device$"):
        write(destination(tmp_path / "best.pt"), save, {})
    assert contents(tmp_path) == before


def test_a_large_file_is_not_read_as_a_description(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text('{"made_by": "orch export"}' + " " * exports.DESCRIPTION_BYTES)
    with pytest.raises(RunError, match="would replace"):
        export(tmp_path / "best.pt")
