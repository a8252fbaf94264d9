"""Download files for nodes without internet: resumable, with progress, and checked before they get their final name."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import http.client
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from jobs.errors import FULL_DISK, JobError
from orchestrator.files.atomic import place

BLOCK_BYTES = 1 << 20
PROGRESS_EVERY_S = 5.0
ATTEMPTS, PAUSE_S = 3, 2.0  # after a broken connection; each attempt continues where the last one ended
TIMEOUT_S = 60.0  # without a byte from the server
MB = 1e6

Say = Callable[[str], None]  # shows a line to the user


@dataclass(frozen=True)
class Fetch:
    """What `orch prepare` was asked to do besides downloading missing files."""

    brought: tuple[Path, ...] = ()  # files that the user has carried to this machine (--from)
    stand_in: bool = False  # make a small artificial data set instead of fetching the real one
    sha256: str | None = None  # the expected checksum of the data's archive
    say: Say = lambda line: None


@dataclass(frozen=True)
class Source:
    """A file on a server."""

    url: str
    file: Path  # where it is kept on this machine
    sha256: str = ""  # the expected checksum in hexadecimal, or its first digits; "": not known
    sha256_by_user: bool = False  # the user gave the checksum, perhaps a wrong one, so keep the file if they differ
    size_bytes: int | None = None  # roughly, for messages; None: not known


def check_sha256(text: str) -> str:
    """Return a checksum that the user gave. Raises JobError unless it is hexadecimal."""
    if not re.fullmatch(r"[0-9a-fA-F]{8,64}", text):
        raise JobError(f"--sha256 {text!r:.80}: give the 64 hexadecimal digits of the SHA-256, or the first 8 or more")
    return text.lower()


class UnreachableError(JobError):
    """The server can't be reached, does not have the file, or the connection broke too often."""


def download(source: Source, say: Say) -> str:
    """Download a file, unless it is there already. Returns its SHA-256.

    An interrupted download is kept beside the file as NAME.part and continued by the next call, if the server can
    continue it and still has the same file. Raises UnreachableError, or JobError if the disk is full, if the checksum
    is wrong, or if another process downloads the same file.
    """
    if source.file.is_file():
        return checked(source.file, source.sha256, say=say)
    part = source.file.with_name(source.file.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(part):
            _refuse_to_replace(part)
            say(f"downloading {source.url}")
            for attempt in Retrying(
                stop=stop_after_attempt(ATTEMPTS),
                wait=wait_fixed(PAUSE_S),
                retry=retry_if_exception_type(ConnectionError),
                reraise=True,
            ):
                with attempt:
                    _continue(source, part, say)
            sha256 = checked(part, source.sha256, say=say, remove=not source.sha256_by_user)
            place(part, source.file)
            _validator_file(part).unlink(missing_ok=True)
    except HTTPError as error:
        raise UnreachableError(f"{source.url}: the server answers {error.code} {error.reason}") from error
    except (ConnectionError, http.client.HTTPException) as error:
        raise UnreachableError(f"{source.url}: {error}") from error
    except OSError as error:
        raise JobError(_why_not_written(part, error)) from error
    return sha256


def download_all(sources: Sequence[Source], command: str, say: Say) -> dict[Source, str]:
    """Download files, and return their SHA-256. command: the `orch prepare` command, for errors. Raises JobError; if
    servers can't be reached, it names all files to bring."""
    checksums: dict[Source, str] = {}
    failures: dict[Source, UnreachableError] = {}
    for source in sources:
        try:
            checksums[source] = download(source, say)
        except UnreachableError as error:
            failures[source] = error
    if failures:
        raise UnreachableError(_what_to_bring(failures, command))
    return checksums


def _what_to_bring(failures: Mapping[Source, UnreachableError], command: str) -> str:
    names = [source.file.name for source in failures]
    lines = ["these files are missing and can't be downloaded here:"]
    for source, error in failures.items():
        size = f" (about {source.size_bytes / MB:.0f} MB)" if source.size_bytes else ""
        lines.append(f"  {source.file.name}{size}: {error}")
    return "\n".join(
        [
            *lines,
            "Download them where there is internet, bring them to this machine, and run",
            f"  {command} {' '.join(f'--from {name}' for name in names)}",
            f"or put {', '.join(f'{source.file.name} into {source.file.parent}' for source in failures)}, and run",
            f"  {command}",
        ]
    )


def checked(file: Path, expected: str, *, say: Say = lambda line: None, remove: bool = False) -> str:
    """Return a file's SHA-256. expected: the checksum or its first digits; "": not known. Raises JobError if they
    differ, after deleting the file if `remove`."""
    with file.open("rb") as content:
        actual = hashlib.file_digest(content, "sha256").hexdigest()
    if not actual.startswith(expected.lower()):
        if remove:
            file.unlink(missing_ok=True)
            _validator_file(file).unlink(missing_ok=True)
        what = "It was deleted: run the same command again to download it anew" if remove else "It was left as it is"
        raise JobError(
            f"{file.name.removesuffix('.part')} in {file.parent} has the SHA-256 {actual}, but {expected} is expected: "
            f"it is damaged or another file. {what}"
        )
    say(f"{file.name.removesuffix('.part')}: SHA-256 {actual}")
    return actual


def copy_into_place(file: Path, target: Path) -> None:
    """Copy a file; `target` appears only when it is complete. Raises JobError if the disk is full, or if another file
    has this name."""
    copying = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            if target.is_file() and filecmp.cmp(file, target, shallow=False):
                return
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        shutil.copyfile(file, copying)
        place(copying, target)
    except FileExistsError as error:
        raise JobError(f"{target} exists already, and differs from {file}. Delete it or move it away first") from error
    except OSError as error:
        raise JobError(_why_not_written(target, error)) from error
    finally:
        copying.unlink(missing_ok=True)


def _continue(source: Source, part: Path, say: Say) -> None:
    """Download the rest of the file. Raises ConnectionError if the connection fails, and OSError."""
    offset = part.stat().st_size if part.exists() else 0
    validator = _read_validator(source, part)
    headers = {"User-Agent": "orch"}
    if offset and validator:
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator}
    try:
        answer = urlopen(Request(source.url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        error.close()
        if error.code in (429, 500, 502, 503, 504):
            raise ConnectionError(f"the server answers {error.code} {error.reason}") from error
        if error.code != 416:  # "range not satisfiable": the part is complete, or belongs to another file
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(offset):
            return
        part.unlink()
        raise ConnectionError("the file on the server has changed") from error
    except OSError as error:  # URLError, a timeout
        raise ConnectionError(f"can't be reached: {getattr(error, 'reason', error)}") from error
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise UnreachableError(f"{source.url}: the server answers with a web page, not with a file")
        if answer.status != 206:  # the server sends the whole file
            if offset:
                say(f"{source.file.name}: the server can't continue the download, or has another file; starting again")
            offset = 0
        length = answer.headers.get("Content-Length")
        total = offset + int(length) if length else None
        _write_validator(source, part, answer.headers)
        _check_space(part, (total or source.size_bytes or 0) - offset)
        with part.open("r+b" if offset else "wb") as target:
            target.seek(offset)
            done = _copy(answer, target, offset, total, source, say)
            os.fsync(target.fileno())
    if total is not None and done < total:
        raise ConnectionError(f"the connection broke after {done / MB:.1f} of {total / MB:.1f} MB")


def _copy(answer: Any, target: IO[bytes], done: int, total: int | None, source: Source, say: Say) -> int:
    """Copy the server's answer to the file. Returns the number of bytes that the file has now."""
    shown, first, begun = time.monotonic(), done, time.monotonic()
    of = f" of {total / MB:.0f}" if total else ""
    if done:
        say(f"{source.file.name}: continuing after {done / MB:.0f}{of} MB")
    while True:
        try:
            block = answer.read(BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            target.flush()
            raise ConnectionError(f"the connection broke after {done / MB:.1f}{of} MB: {error}") from error
        if not block:
            return done
        target.write(block)
        done += len(block)
        if (now := time.monotonic()) - shown >= PROGRESS_EVERY_S:
            shown = now
            say(f"{source.file.name}: {done / MB:.0f}{of} MB, {(done - first) / MB / (now - begun):.1f} MB/s")


# --- the server's name for this version of the file (ETag or Last-Modified), so that no two versions are mixed


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _write_validator(source: Source, part: Path, headers: Any) -> None:
    etag = headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")  # weak tags can't be used
    _validator_file(part).write_text(json.dumps({"url": source.url, "validator": validator}))


def _refuse_to_replace(part: Path) -> None:
    """Raise JobError if a file with one of the names of an unfinished download was not written by `download`."""
    record = _validator_file(part)
    try:
        ours = json.loads(record.read_bytes()).keys() == {"url", "validator"}
    except FileNotFoundError:
        ours = False
    except (OSError, ValueError, AttributeError, RecursionError):
        raise JobError(f"{record} exists, and `orch prepare` did not write it. Move it away first") from None
    for path in () if ours else (part, record):
        if os.path.lexists(path):
            raise JobError(f"{path} exists, and `orch prepare` did not write it. Move it away first")


def _read_validator(source: Source, part: Path) -> str | None:
    try:
        kept = json.loads(_validator_file(part).read_text())
        return str(kept["validator"]) if kept["url"] == source.url and kept["validator"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# --- the disk


@contextlib.contextmanager
def _only_one(part: Path) -> Iterator[None]:
    """Hold a lock, so that two processes do not write the same file. Raises JobError if another process holds it."""
    lock = FileLock(part.with_name(part.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise JobError(f"another `orch prepare` is downloading {part.name.removesuffix('.part')} now") from error
    except NotImplementedError:  # this file system has no locks
        yield
        return
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _check_space(part: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed_bytes > free:
        raise OSError(errno.ENOSPC, f"{needed_bytes / MB:.0f} MB more are needed, {free / MB:.0f} MB are free")


def _why_not_written(part: Path, error: OSError) -> str:
    name = part.name.removesuffix(".part")
    if error.errno in FULL_DISK:
        return (
            f"{name} does not fit in {part.parent}: {error.strerror}. Free some space and run the same command again; "
            "the download continues where it stopped"
        )
    return f"{name} can't be written to {part.parent}: {error.strerror or error}"
