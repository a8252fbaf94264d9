"""A real PostgreSQL server for tests, in a temporary folder, on the loopback interface, with a password.

initdb and postgres refuse to run as root, so root runs them as another user. Tests that need the server are skipped
if it is not installed (Debian: apt install postgresql).
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USER, DATABASE = "orch", "orch"


class MissingServerError(Exception):
    """PostgreSQL's server is not installed, or there is no unprivileged user to run it."""


@dataclass(frozen=True, slots=True)
class Postgres:
    folder: Path
    bin: Path
    port: int
    password: str

    @property
    def url(self) -> str:
        """The URL without the password, as in a settings file."""
        return f"postgresql+psycopg://{USER}@127.0.0.1:{self.port}/{DATABASE}"

    def environment(self) -> dict[str, str]:
        return {"PGPASSWORD": self.password}

    def start(self) -> None:
        options = (  # fsync=off: no test simulates a power cut of the server
            f"-c listen_addresses=127.0.0.1 -p {self.port} -c unix_socket_directories= -c max_connections=200 "
            "-c fsync=off"
        )
        self._as_server("pg_ctl", "start", "--wait", "-D", "data", "-l", "server.log", "-o", options)

    def stop(self, mode: str = "fast") -> None:
        self._as_server("pg_ctl", "stop", "-D", "data", "-m", mode)

    def _as_server(self, program: str, *arguments: str) -> None:
        as_user = ["setpriv", f"--reuid={_unprivileged()}", "--clear-groups"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*as_user, self.bin / program, *arguments], cwd=self.folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            log = self.folder / "server.log"
            raise RuntimeError(f"{program}: {done.stdout}\n{log.read_text() if log.exists() else ''}")

    def create(self) -> None:
        (self.folder / "password").write_text(self.password)
        if os.geteuid() == 0:
            for path in (self.folder, self.folder / "password"):
                shutil.chown(path, _unprivileged())
        self._as_server(
            "initdb", "-D", "data", "-U", USER, "-A", "scram-sha-256", "--pwfile=password", "-E", "UTF8",
            "--locale=C.UTF-8", "--no-sync",
        )  # fmt: skip
        self.start()
        subprocess.run(
            [self.bin / "createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, DATABASE],
            env={**os.environ, **self.environment()},
            check=True,
        )


@contextmanager
def temporary() -> Iterator[Postgres]:
    """Run a server until the context ends. Raises MissingServerError."""
    folder = Path(tempfile.mkdtemp(prefix="orch-postgres-", dir="/tmp"))  # accessible to another user
    server = Postgres(folder, _bin(), _free_port(), secrets.token_urlsafe(12))
    try:
        server.create()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _bin() -> Path:
    """Return the folder of the server's programs. On Debian it is not on the PATH; there is one for each version."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    if found := shutil.which("initdb"):
        places.append(Path(found).resolve().parent)
    for place in sorted(places, reverse=True):
        if all((place / name).exists() for name in ("initdb", "pg_ctl", "postgres", "createdb")):
            return place
    raise MissingServerError("PostgreSQL's server is not installed (Debian: apt install postgresql)")


def _unprivileged() -> str:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise MissingServerError("PostgreSQL does not run as root, and there is no user postgres or nobody")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
