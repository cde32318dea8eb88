"""The sandbox Hub's side of HTTP: requests and answers, ranges, routes, and faults on demand."""

import json
import re
import socket
import struct
import sys
import tempfile
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import IO, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Fault:
    """What goes wrong with requests whose method and "path?query" match."""

    path: str  # regular expression, searched
    method: str = ".*"  # regular expression, of the whole method
    times: int = 1  # how many requests; -1 for ever
    skip: int = 0  # how many pass unharmed before
    status: int | None = None  # answered instead of doing anything
    headers: dict[str, str] = field(default_factory=dict)  # of that answer, such as Retry-After
    message: str = "injected"  # of that answer
    drop_after: int | None = None  # bytes of the request's body, for GET of the answer's, before a connection reset
    fin: bool = False  # for GET with drop_after: close politely instead
    lose_reply: bool = False  # do what is asked and reset the connection instead of answering
    delay: float = 0.0  # seconds before anything
    hits: int = 0  # how often it happened


class HubError(Exception):
    """An answer that is not what was asked for; `code` is the header from which clients make their exceptions."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.body = body


ROUTES = []


def route(method: str, path: str):
    """Send requests with this method and path to the decorated method, the named groups as its arguments."""

    def register(function):
        ROUTES.append((re.compile(method), re.compile(path), function))
        return function

    return register


class Connection(BaseHTTPRequestHandler):
    """One connection of a client. While a request is handled: `url`, `query`, `body` and `fault` are its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)
        self.store = self.server.store

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args) -> None:
        """The server's own log is `HubServer.log`."""

    def handle_request(self) -> None:
        self.started = time.monotonic()
        self.status = None
        self.url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(self.url.query).items()}
        self.fault = self.server.take_fault(self.command, self.path)
        try:
            self.answer()
        except ConnectionError:
            self.close_connection = True
        finally:
            if self.status is None:
                self.record(-1)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def record(self, status: int) -> None:
        """Enter the request into the log; called before the answer goes out, so that who has it finds it there."""
        self.status = status
        duration = round((time.monotonic() - self.started) * 1000)
        self.server.log.append((self.command, self.path, status, duration))

    def answer(self) -> None:
        fault = self.fault
        if fault and fault.delay:
            time.sleep(fault.delay)
        with self.read_body(fault.drop_after if fault and self.command != "GET" else None) as self.body:
            try:
                if fault and fault.status:
                    raise HubError(fault.status, fault.message)
                self.dispatch()
            except HubError as error:
                one_line = error.message.replace("\n", " ").encode("ascii", "replace").decode()
                headers = {"X-Error-Message": one_line}
                if error.code:
                    headers["X-Error-Code"] = error.code
                if fault:
                    headers |= fault.headers
                self.reply({"error": error.message, **error.body}, error.status, headers)

    def dispatch(self) -> None:
        """Call the method that a route names."""
        for method, path, function in ROUTES:
            match = path.fullmatch(self.url.path)
            if match and method.fullmatch(self.command):
                function(self, **{name: unquote(value) for name, value in match.groupdict().items() if value})
                return
        raise HubError(404, f"no such route: {self.command} {self.url.path}")

    def reset(self) -> NoReturn:
        """Break the connection as a failing network does: with a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionResetError("injected")

    def read_body(self, limit: int | None) -> IO[bytes]:
        """The request's body, spooled to the disk when large; with a limit, reset after so many bytes of it."""
        body = tempfile.SpooledTemporaryFile(8 << 20)  # noqa: SIM115 (the caller closes it)
        left = [limit if limit is not None else sys.maxsize]

        def copy(size: int) -> None:
            while size:
                if not left[0]:
                    self.reset()
                block = self.rfile.read(min(size, left[0], 1 << 16))
                if not block:
                    raise ConnectionResetError("the client went away")
                body.write(block)
                size -= len(block)
                left[0] -= len(block)

        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                copy(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            copy(int(self.headers.get("Content-Length") or 0))
        if limit is not None:
            self.reset()
        body.seek(0)
        return body

    def read_json(self) -> dict:
        return json.loads(self.body.read() or b"{}")

    def send_head(self, status: int, headers: dict) -> None:
        self.record(status)
        if self.fault and self.fault.lose_reply:
            self.reset()
        self.send_response(status)
        for name, value in {"X-Request-Id": f"request-{len(self.server.log)}", **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send_content(self, content: IO[bytes] | bytes, size: int) -> None:
        """Send so many bytes, or fewer where a fault says so."""
        if self.command == "HEAD":
            return
        cut = self.fault.drop_after if self.fault and self.command == "GET" else None
        left = size if cut is None else min(size, cut)
        if isinstance(content, bytes):
            self.wfile.write(content[:left])
        else:
            while left and (block := content.read(min(left, 1 << 20))):
                self.wfile.write(block)
                left -= len(block)
        if cut is not None:
            self.close_connection = True
            time.sleep(0.05)  # a reset overtakes bytes that are still on their way
            if not self.fault.fin:
                self.reset()

    def reply(self, content: dict | list | bytes = b"", status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_head(status, {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})})
        self.send_content(data, len(data))

    def reply_file(self, path: Path, headers: dict) -> None:
        """Send a file, or the range of it that was asked for."""
        size = path.stat().st_size
        start, end, status = 0, size, 200
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if wanted := self.wanted_range(size):
            start, end = wanted
            if start >= end:
                return self.reply(status=416, headers={"Content-Range": f"bytes */{size}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.send_head(status, {"Content-Length": end - start, **headers})
        with open(path, "rb") as file:
            file.seek(start)
            self.send_content(file, end - start)

    def wanted_range(self, size: int) -> tuple[int, int] | None:
        """The first byte and the byte behind the last that a Range header asks for; None for all of the content."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match or not (match[1] or match[2]):
            return None
        if not match[1]:
            return max(0, size - int(match[2])), size
        return int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
