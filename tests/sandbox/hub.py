"""A small Hugging Face Hub on 127.0.0.1, for the genuine clients: huggingface_hub, datasets, transformers, `hf`.

    with HubServer(directory, tokens={"hf_write": User("alice", orgs=("acme",))}) as hub:
        # Clients read their environment when they are imported: HF_ENDPOINT=hub.url HF_TOKEN=hf_write HF_HOME=…
        hub.fault("/commit/", status=503, times=2)  # and: drop_after=, lose_reply=, delay=, headers=, skip=

    python -m tests.sandbox.hub DIRECTORY --port 8000 --user hf_write=alice,acme

Repositories live in the directory, so a Hub started again on the same directory and port has them still. There is no
git: a commit is a mapping of paths to content hashes. Here are accounts with read or write tokens, private
repositories, creation, settings, deletion, listings, trees, commits, branches, tags, card validation, downloads with
ranges, Git LFS, and Xet (hub_xet.py). Not here: `git clone`, pull requests, gated repositories, spaces, search.
"""

import argparse
import re
import socket
import sys
import threading
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.sandbox.hub_api import Handler
from tests.sandbox.hub_http import Fault
from tests.sandbox.hub_store import HubStore, User

__all__ = ["Fault", "HubServer", "User"]


class HubServer(ThreadingHTTPServer):
    """The server and its storage.

    `faults` is the list of faults still to come, `log` the (method, path, status, milliseconds) of every request; a
    status of -1 is a connection that broke before an answer.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: str | Path, tokens: dict[str, User] | None = None, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.store = HubStore(Path(root))
        self.tokens = dict(tokens or {})
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.cdn = f"http://localhost:{self.server_address[1]}"  # another origin, as on the real Hub
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int, int]] = []
        self.connections: set[socket.socket] = set()

    def start(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, name="hub", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop answering, also on connections that clients keep open."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):  # closed in the meantime
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *error) -> None:
        self.stop()

    def fault(self, path: str, **what) -> Fault:
        """Let something go wrong; see `Fault`."""
        fault = Fault(path, **what)
        self.faults.append(fault)
        return fault

    def handle_error(self, request, client_address) -> None:
        """Say nothing of broken connections, which are expected here; the rest is a bug of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.store.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.path, path) and re.fullmatch(fault.method, method):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    fault.hits += 1
                    return fault
        return None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("directory", type=Path, help="where the repositories are kept")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (0 = a free one)")
    parser.add_argument(
        "--user", action="append", default=[], metavar="TOKEN=NAME[,ORG…]", help="account with a write token"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    tokens = {}
    for account in args.user:
        token, _, names = account.partition("=")
        name, *orgs = names.split(",")
        tokens[token] = User(name, tuple(orgs))
    hub = HubServer(args.directory, tokens, args.port)
    print(hub.url, flush=True)
    with suppress(KeyboardInterrupt):
        hub.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
