"""A mirror of ReazonSpeech on the loopback interface, that fails on demand.

    with MirrorServer(root) as mirror:                  # root/tsv/tiny.tsv, root/data/000.tar, ...
        mirror.fault(r"\\.tar$", cut_after=1 << 20)      # the next request for a tar loses its connection after 1 MiB
        downloader.main(["--base_url", mirror.url, ...])
        mirror.log                                      # one Request for each request, in order of arrival

    python -m tests.sandbox.mirror ROOT [PORT]          # the same by hand

It answers GET and HEAD as a plain file host does: keep-alive, single byte ranges, `If-Range`, strong ETags and
`Last-Modified` taken from the file on disk, so a file that is rewritten gets new ones.
"""

import argparse
import email.utils
import re
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BLOCK = 64 * 1024  # bytes written at once
ERROR_PAGE = b"<!DOCTYPE html><html><body><h1>We will be back soon</h1></body></html>\n"


@dataclass
class Request:
    """What was asked and what was answered."""

    method: str
    path: str
    range: str | None  # the Range header as it came
    status: int = 0
    sent: int = 0  # bytes of body


@dataclass
class Fault:
    """Something that goes wrong with the requests whose path matches; the first fault that is due applies alone."""

    path: str  # regular expression searched in the path
    times: int = 1  # how many requests; -1 for all
    skip: int = 0  # ... after this many went well
    method: str = "GET"  # regular expression; "GET|HEAD" for both
    status: int | None = None  # answer this status with a short text
    headers: dict[str, str] = field(default_factory=dict)  # further headers, or other values of the usual ones
    html: bool = False  # answer an error page, with status 200 unless `status` is given
    delay: float = 0.0  # seconds before the answer
    cut_after: int | None = None  # lose the connection after so many bytes of body
    stall: float = 0.0  # fall silent for so many seconds ...
    stall_after: int = 0  # ... after so many bytes of body
    rate: float | None = None  # bytes a second ...
    rate_after: int = 0  # ... after so many bytes of body
    wrong_length: int | None = None  # state this length; the body is the right one, cut where it is longer
    no_length: bool = False  # state no length: the end of the connection is the end of the body
    corrupt_at: int | None = None  # invert the byte at this offset of the file
    ignore_range: bool = False  # answer 200 and the whole file whatever range is asked
    ignore_if_range: bool = False  # answer the range even if the file is another by now
    shift_range: int = 0  # answer the range that begins so many bytes later, and say so
    no_validators: bool = False  # neither ETag nor Last-Modified
    hits: int = 0  # requests matched so far

    def due(self, method: str, path: str) -> bool:
        if not re.search(self.path, path) or not re.fullmatch(self.method, method):
            return False
        self.hits += 1
        return self.hits > self.skip and (self.times < 0 or self.hits <= self.skip + self.times)


class MirrorServer(ThreadingHTTPServer):
    """Serves the files under `root` at `url` from threads, on 127.0.0.1 only.

    `certificate` is a PEM file with a certificate and its key: then the mirror speaks TLS.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, root: Path, port: int = 0, certificate: Path | None = None):
        super().__init__(("127.0.0.1", port), Handler)
        self.root = Path(root).resolve()
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server_address[1]}"
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.connections = set()
        self.most_connections = 0  # open at once
        self.lock = threading.Lock()
        self.tls = None
        if certificate:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(certificate)

    def fault(self, path: str, **what) -> Fault:
        fault = Fault(path, **what)
        self.faults.append(fault)
        return fault

    def fault_for(self, method: str, path: str) -> Fault:
        with self.lock:
            return next((fault for fault in self.faults if fault.due(method, path)), Fault(""))

    def requests(self, path: str = "", method: str = "GET") -> list[Request]:
        """The logged requests of a method whose path matches the regular expression."""
        return [request for request in self.log if request.method == method and re.search(path, request.path)]

    def start(self) -> "MirrorServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening and end the connections that are still open."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            self.shutdown_request(connection)

    __enter__ = start

    def __exit__(self, *_) -> None:
        self.stop()

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        self.most_connections = max(self.most_connections, len(self.connections))
        super().process_request(request, client_address)

    def finish_request(self, request, client_address) -> None:
        try:
            if self.tls:
                request = self.tls.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)
            if self.tls:
                request.close()
        finally:
            self.connections.discard(request)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        """Clients go away in the middle of things here; that is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: MirrorServer

    def log_message(self, *_) -> None:
        """The server's `log` is the log."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.record = Request(self.command, path, self.headers.get("Range"))
        self.server.log.append(self.record)
        fault = self.server.fault_for(self.command, path)
        time.sleep(fault.delay)
        file = (self.server.root / path.lstrip("/")).resolve()
        if fault.html:
            self.answer(fault, fault.status or 200, {"Content-Type": "text/html; charset=utf-8"}, ERROR_PAGE)
        elif fault.status:
            self.answer(fault, fault.status, {"Content-Type": "text/plain"}, b"injected\n")
        elif not file.is_relative_to(self.server.root) or not file.is_file():
            self.answer(fault, 404, {"Content-Type": "text/html; charset=utf-8"}, ERROR_PAGE)
        else:
            self.answer_file(fault, file)

    do_HEAD = do_GET

    def answer_file(self, fault: Fault, path: Path) -> None:
        """Answer a file or the range of it that was asked."""
        with open(path, "rb") as file:
            stat = path.stat()
            size = stat.st_size
            headers = {
                "Content-Type": "text/tab-separated-values" if path.suffix == ".tsv" else "application/x-tar",
                "Accept-Ranges": "bytes",
            }
            if not fault.no_validators:
                headers["ETag"] = f'"{stat.st_mtime_ns:x}-{size:x}"'
                headers["Last-Modified"] = email.utils.formatdate(stat.st_mtime, usegmt=True)
            headers |= fault.headers
            asked = None if fault.ignore_range else self.asked_range(size, headers, fault.ignore_if_range)
            if asked is None:
                self.answer(fault, 200, headers, file, 0, size)
                return
            first, last = asked
            first += fault.shift_range
            if first > last:
                headers["Content-Range"] = f"bytes */{size}"
                self.answer(fault, 416, headers, b"")
            else:
                headers["Content-Range"] = f"bytes {first}-{last}/{size}"
                self.answer(fault, 206, headers, file, first, last + 1 - first)

    def asked_range(self, size: int, headers: dict[str, str], unconditional: bool) -> tuple[int, int] | None:
        """First and last byte of the range asked, or None for the whole file (RFC 9110, section 14)."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        condition = None if unconditional else self.headers.get("If-Range")
        if not match or not any(match.groups()):
            return None
        validators = (headers.get("ETag"), headers.get("Last-Modified"))
        # A weak ETag matches nothing (section 13.1.5).
        if condition is not None and (condition not in validators or condition.startswith("W/")):
            return None
        first, last = match.groups()
        if not first:
            return max(0, size - int(last)), size - 1
        return int(first), min(int(last), size - 1) if last else size - 1

    def answer(self, fault: Fault, status: int, headers: dict[str, str], body, start: int = 0, length=None) -> None:
        """Send status, headers and body (bytes, or a file from `start` on), with the fault's effects on them."""
        length = len(body) if length is None else length
        stated = length if fault.wrong_length is None else fault.wrong_length
        headers = headers | fault.headers
        if fault.no_length:
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(stated)
        self.record.status = status
        self.send_response(status, self.responses.get(status, ("Unknown",))[0])
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = min(length, stated)
        while self.record.sent < end:
            sent = self.record.sent
            is_slow = fault.rate and sent >= fault.rate_after
            stops = [end, sent + (int(fault.rate / 20) + 1 if is_slow else BLOCK)]
            if sent < fault.rate_after:
                stops.append(fault.rate_after)
            if fault.cut_after is not None:
                stops.append(fault.cut_after)
            if fault.stall and sent < fault.stall_after:
                stops.append(fault.stall_after)
            if fault.stall and sent == fault.stall_after:
                time.sleep(fault.stall)
            if sent == fault.cut_after:
                break
            if isinstance(body, bytes):
                block = body[sent : min(stops)]
            else:
                body.seek(start + sent)
                block = self.corrupted(fault, body.read(min(stops) - sent), start + sent)
            self.wfile.write(block)
            self.record.sent += len(block)
            if is_slow:
                time.sleep(len(block) / fault.rate)
        if self.record.sent != stated or fault.no_length:
            self.close_connection = True  # the client still waits for bytes that will not come

    @staticmethod
    def corrupted(fault: Fault, block: bytes, offset: int) -> bytes:
        """The block that lies at `offset` of the file, one of its bytes inverted if the fault's byte is in it."""
        if fault.corrupt_at is None or not offset <= fault.corrupt_at < offset + len(block):
            return block
        changed = bytearray(block)
        changed[fault.corrupt_at - offset] ^= 0xFF
        return bytes(changed)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Serve a directory as ReazonSpeech's host does, on 127.0.0.1.")
    parser.add_argument("root", type=Path, help="directory with tsv/ and data/")
    parser.add_argument("port", type=int, nargs="?", default=0, help="0 = any free one")
    args = parser.parse_args(argv)
    server = MirrorServer(args.root, args.port)
    print(server.url, flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
