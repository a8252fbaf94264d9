"""Downloads that break, continue, and are checked."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from jobs.data import download as downloads
from jobs.data.download import Source, UnreachableError, check_sha256, copy_into_place, download, download_all
from jobs.errors import JobError
from tests.support.file_server import FileServer, serving

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE_S", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(data=CONTENT) as running:
        yield running


def source_of(server: FileServer, folder: Path, sha256: str = SHA256) -> Source:
    return Source(f"{server.url}/data", folder / "kept" / "data.zip", sha256)


def fetched(server: FileServer, folder: Path) -> list[str]:
    """Download the file and return the names in its folder."""
    said: list[str] = []
    assert download(source_of(server, folder), said.append) == SHA256
    assert (folder / "kept" / "data.zip").read_bytes() == CONTENT
    assert said[-1] == f"data.zip: SHA-256 {SHA256}"
    return sorted(path.name for path in (folder / "kept").iterdir())


def test_a_file_is_downloaded_and_nothing_else_is_left(server: FileServer, tmp_path: Path) -> None:
    assert fetched(server, tmp_path) == ["data.zip"]


def test_a_file_that_is_there_is_not_downloaded_again(server: FileServer, tmp_path: Path) -> None:
    fetched(server, tmp_path)
    fetched(server, tmp_path)
    assert len(server.requests) == 1


def test_a_download_that_breaks_twice_continues_each_time_where_it_stopped(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [300_000, 400_000]
    assert fetched(server, tmp_path) == ["data.zip"]
    assert [wanted for _, wanted in server.requests] == [None, "bytes=300000-", "bytes=700000-"]


def test_the_next_command_continues_a_download_that_broke_too_often(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [100_000] * downloads.ATTEMPTS
    with pytest.raises(UnreachableError, match=r"data: the connection broke after 0\.3 of 1\.0 MB"):
        download(source_of(server, tmp_path), print)
    assert fetched(server, tmp_path) == ["data.zip"]
    assert server.requests[-1][1] == "bytes=300000-"


@pytest.mark.parametrize("change", [{"ranges": False}, {"etag": None}, {"etag": 'W/"1"'}])
def test_a_server_that_cannot_continue_a_file_sends_the_whole_again(
    change: dict[str, Any], server: FileServer, tmp_path: Path
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    server.cuts = [300_000]
    assert fetched(server, tmp_path) == ["data.zip"]


def test_parts_of_two_versions_of_a_file_are_never_joined(server: FileServer, tmp_path: Path) -> None:
    server.files["data"] = b"old" * 300_000
    server.cuts = [100_000] * downloads.ATTEMPTS
    with pytest.raises(UnreachableError):
        download(source_of(server, tmp_path), print)
    server.files["data"], server.etag = CONTENT, '"2"'
    fetched(server, tmp_path)


def test_a_part_from_another_address_is_not_continued(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [100_000] * downloads.ATTEMPTS
    with pytest.raises(UnreachableError):
        download(source_of(server, tmp_path), print)
    server.files["mirror"] = CONTENT
    server.requests.clear()
    download(Source(f"{server.url}/mirror", tmp_path / "kept" / "data.zip", SHA256), print)
    assert server.requests == [("/mirror", None)]


def test_a_part_that_is_complete_already_is_accepted(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [0]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "data.zip.part").write_bytes(CONTENT)
    (kept / "data.zip.part.json").write_text(f'{{"url": "{server.url}/data", "validator": "\\"1\\""}}')
    assert fetched(server, tmp_path) == ["data.zip"]
    assert len(server.requests) == 1


def test_a_wrong_checksum_is_an_error_and_the_next_command_starts_anew(server: FileServer, tmp_path: Path) -> None:
    server.files["data"] = b"a page that asks for a password"
    with pytest.raises(JobError, match=r"^data.zip in .*kept has the SHA-256 \w+, but \w+ is expected.*run the same"):
        download(source_of(server, tmp_path), print)
    assert list((tmp_path / "kept").iterdir()) == []
    server.files["data"] = CONTENT
    fetched(server, tmp_path)


@pytest.mark.parametrize("status", [403, 404, 503])
def test_an_answer_that_is_an_error_is_named(status: int, server: FileServer, tmp_path: Path) -> None:
    server.status = status
    with pytest.raises(UnreachableError, match=f"data: the server answers {status}"):
        download(source_of(server, tmp_path), print)
    assert len(server.requests) == (downloads.ATTEMPTS if status == 503 else 1)


def test_a_disk_with_too_little_space_is_an_error_before_the_download(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500_000))
    with pytest.raises(JobError, match=r"data.zip does not fit in .*kept: 1 MB more are needed, 0 MB are free\. Free"):
        download(source_of(server, tmp_path), print)


def test_a_disk_that_fills_up_is_an_error_and_the_download_continues_later(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(JobError, match=r"data\.zip does not fit in .*: No space left on device\. Free some space"):
            download(source_of(server, tmp_path), print)
    assert fetched(server, tmp_path) == ["data.zip"]
    assert server.requests[-1][1] == f"bytes={len(CONTENT)}-"


def test_a_web_page_in_place_of_the_file_is_an_error_and_not_kept(server: FileServer, tmp_path: Path) -> None:
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(UnreachableError, match="data: the server answers with a web page, not with a file"):
        download(source_of(server, tmp_path), print)
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_wrong_checksum_from_the_user_deletes_nothing(server: FileServer, tmp_path: Path) -> None:
    given = replace(source_of(server, tmp_path), sha256="0" * 64, sha256_by_user=True)
    with pytest.raises(JobError, match=r"is expected: it is damaged or another file\. It was left as it is"):
        download(given, print)
    assert fetched(server, tmp_path) == ["data.zip"]
    assert server.requests[-1][1] == f"bytes={len(CONTENT)}-"


@pytest.mark.parametrize("text", ["", "sha256:deadbeef", "abc", "g" * 64, "0" * 65])
def test_a_checksum_must_be_hexadecimal(text: str) -> None:
    assert check_sha256("DEADBEEF") == "deadbeef"
    with pytest.raises(JobError, match=r"--sha256 .*: give the 64 hexadecimal digits"):
        check_sha256(text)


def test_two_processes_do_not_download_the_same_file(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with (
        FileLock(tmp_path / "kept" / "data.zip.part.lock"),
        pytest.raises(JobError, match=r"^another `orch prepare` is downloading data\.zip now$"),
    ):
        download(source_of(server, tmp_path), print)


def test_without_a_network_one_message_names_every_file_to_bring(tmp_path: Path) -> None:
    with serving() as gone:
        pass
    sources = [
        Source(f"{gone.url}/{name}", tmp_path / name, size_bytes=size)
        for name, size in [("a.zip", 5 * 10**8), ("b.pth", None)]
    ]
    with pytest.raises(UnreachableError) as raised:
        download_all(sources, "orch prepare mine.json", print)
    message = str(raised.value)
    assert f"a.zip (about 500 MB): {gone.url}/a.zip: can't be reached" in message
    assert f"b.pth: {gone.url}/b.pth: can't be reached" in message
    assert "  orch prepare mine.json --from a.zip --from b.pth\n" in message
    assert f"or put a.zip into {tmp_path}, b.pth into {tmp_path}, and run\n  orch prepare mine.json" in message


def test_a_copied_file_appears_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(JobError, match="does not fit"):
        copy_into_place(tmp_path / "here", tmp_path / "there" / "file")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.zip.part", b"a browser's"),
        ("data.zip.part.json", b'{"mine": 1}'),
        ("data.zip.part.json", b"[1]"),
        ("data.zip.part.json", b"\xff"),
    ],
)
def test_a_part_that_another_program_wrote_is_not_replaced(
    name: str, content: bytes, server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / name).write_bytes(content)
    with pytest.raises(JobError, match=rf"{name} exists, and `orch prepare` did not write it\. Move it away first"):
        download(source_of(server, tmp_path), print)
    assert (tmp_path / "kept" / name).read_bytes() == content
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [name]


def test_a_file_that_appears_during_its_download_is_not_replaced(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = downloads.checked

    def slowly(file: Path, *arguments: Any, **options: Any) -> str:
        (tmp_path / "kept/data.zip").write_bytes(b"of the user")
        return check(file, *arguments, **options)

    monkeypatch.setattr(downloads, "checked", slowly)
    with pytest.raises(JobError, match=r"^data\.zip can't be written to .*: File exists$"):
        download(source_of(server, tmp_path), print)
    assert (tmp_path / "kept/data.zip").read_bytes() == b"of the user"


def test_a_copy_never_replaces_another_file(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_bytes(b"brought")
    copy_into_place(here, there)
    copy_into_place(here, there)  # the same content
    there.write_bytes(b"of the user")
    with pytest.raises(
        JobError, match=rf"^{there} exists already, and differs from {here}\. Delete it or move it away"
    ):
        copy_into_place(here, there)
    assert there.read_bytes() == b"of the user"
    there.unlink()
    there.mkdir()
    with pytest.raises(JobError, match="exists already"):
        copy_into_place(here, there)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]
