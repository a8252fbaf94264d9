"""A web server on loopback that serves files from memory, and breaks connections when told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    url: str  # without a slash at the end
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)  # the next answers end after so many bytes
    ranges: bool = True  # whether the server can continue a file
    etag: str | None = '"1"'
    content_type: str | None = None
    status: int | None = None  # answer every request with this error
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range header


@contextmanager
def serving(**files: bytes) -> Iterator[FileServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.requests.append((self.path, wanted))
            content = state.files.get(self.path.lstrip("/"))
            if state.status or content is None:
                self.send_error(state.status or 404)
                return
            start = 0
            if wanted and state.ranges and self.headers.get("If-Range") == state.etag:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if state.etag:
                self.send_header("ETag", state.etag)
            if state.content_type:
                self.send_header("Content-Type", state.content_type)
            self.end_headers()
            cut = state.cuts.pop(0) if state.cuts else None
            with suppress(ConnectionError):  # the client may give up
                self.wfile.write(content[start:] if cut is None else content[start : start + cut])
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = FileServer(f"http://127.0.0.1:{server.server_port}", dict(files))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
