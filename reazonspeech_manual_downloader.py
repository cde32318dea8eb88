#!/usr/bin/env python
"""Download ReazonSpeech v2: the tars and transcriptions of a subset, or of a range of its tars.

In:   <base_url>/tsv/<target>.tsv and <base_url>/data/000.tar, 001.tar, ... If the corpus moves to another host, pass
      its address as --base_url or set REAZONSPEECH_BASE_URL.
Out:  <data_dir>/<target>/<target>.<target>.tsv and <target>.000.tar, ...; a range of tars is stored in
      <data_dir>/<target>_<start>_<end>/. The target `test` is the one tar that `all` excludes.

One file at a time, and ten at a time:

    python reazonspeech_manual_downloader.py --target tiny -p 1
    python reazonspeech_manual_downloader.py --target all -p 10 -s 0 -e 50

To resume, run the same command again: complete files are not downloaded again, and partial ones (`.part`) are resumed.
A file gets its final name only after its length and structure are checked and it is synced to the disk.

Exit status: 0 if all files are complete, 1 if files failed (each is named with the reason) or if --health_check
removed some, 130 after Ctrl-C, 143 after SIGTERM. The corpus may be used only for information analysis, as permitted
by Article 30-4 of the Japanese Copyright Act.
"""

import argparse
import contextlib
import datetime
import errno
import fcntl
import logging
import math
import os
import random
import re
import secrets
import shutil
import signal
import ssl
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

import requests
import urllib3
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

BASE_URL = "https://corpus.reazon-research.org/reazonspeech-v2"  # as of November 2026
# The tars of each subset (https://huggingface.co/datasets/reazon-research/reazonspeech); the last tar is the test set.
# reazonspeech_manual_dataloader.py has the same table.
TARS = {
    "tiny": range(1),
    "small": range(12),
    "medium": range(116),
    "large": range(579),
    "all": range(4095),
    "test": range(4095, 4096),
}
DATA_DIR = "~/.cache/reazon_manual_download"
TERMS = """ReazonSpeech is for information analysis only, as permitted by Article 30-4 of the Japanese Copyright Act.
By downloading it you agree to use it for nothing else."""
BLOCK = 1 << 20  # bytes per read
SAMPLE = 8 << 20  # bytes that --dry_run reads to measure the transfer rate
PROGRESS = 1 << 16  # bytes; an attempt that receives at least this much resets the count of failures
LEAST_RATE = 1024  # bytes per second, averaged over --timeout; slower connections are closed
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 600  # seconds, even if Retry-After asks for more
SPARE = 64 << 20  # bytes to leave free on the disk
PADDING = 1 << 20  # bytes; the most zeros that may end a tar
TEMPORARY_STATUSES = {408, 425, 429, *range(500, 600)}  # such as 503: the next attempt may succeed
NO_HEAD_STATUSES = {403, 405, 501}  # servers that refuse HEAD send these; they may still accept GET


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    group = parser.add_argument_group("files")
    group.add_argument("-t", "--target", choices=list(TARS), default="tiny", help="subset of the corpus")
    group.add_argument(
        "-s", "--start", "--start_que", type=int, help="first tar of the range; unset = the target's first tar"
    )
    group.add_argument(
        "-e", "--end", "--end_que", type=int, help="first tar after the range; unset = up to the target's last tar"
    )
    group.add_argument("--dry_run", help="only print what would be downloaded and how long it would take", **flag)
    group.add_argument("--health_check", help="only check the downloaded files and remove damaged ones", **flag)
    group = parser.add_argument_group("places")
    group.add_argument("--base_url", help=f"address of the corpus; unset = REAZONSPEECH_BASE_URL or {BASE_URL}")
    group.add_argument("--data_dir", help=f"download directory; unset = REAZONSPEECH_DATA_DIR or {DATA_DIR}")
    group = parser.add_argument_group("network")
    group.add_argument("-p", "--pool", type=int, default=10, help="files to download at the same time")
    group.add_argument("--retries", type=int, default=8, help="retries of a file without progress before giving up")
    group.add_argument(
        "--backoff",
        type=float,
        default=2.0,
        help=f"seconds before the first retry, doubled for each further one, at most {LONGEST_BACKOFF:g}",
    )
    group.add_argument("--timeout", type=float, default=60.0, help="seconds without data before a connection is closed")
    group.add_argument("--rate_limit", type=float, default=0.0, help="MB per second for all files; 0 = no limit")
    args = parser.parse_args(argv)
    args.base_url = (args.base_url or os.environ.get("REAZONSPEECH_BASE_URL") or BASE_URL).rstrip("/")
    args.data_dir = Path(args.data_dir or os.environ.get("REAZONSPEECH_DATA_DIR") or DATA_DIR).expanduser().absolute()
    if not re.match("https?://.", args.base_url):
        parser.error(f"--base_url must begin with http:// or https://, not {args.base_url.rpartition('@')[2]!r}")
    if args.pool < 1:
        parser.error(f"--pool must be at least 1, not {args.pool}")
    tars = TARS[args.target]
    start = args.start or 0
    end = len(tars) if args.end is None else args.end
    if not 0 <= start < end <= len(tars):
        parser.error(f"--start {start} --end {end}: {args.target} needs 0 <= start < end <= {len(tars)}")
    whole = args.start is None and args.end is None
    args.directory = args.data_dir / (args.target if whole else f"{args.target}_{start}_{end}")
    args.tars = tars[start:end]
    args.bytes_per_second = args.rate_limit * 1e6 or math.inf
    return args


# ---- common ----------------------------------------------------------------------------------------------------------
# What stands under a banner "common" has the same text in every script that has it. Change it in all of them.

CONTINUE = "Run the same command again to continue."

logger = logging.getLogger(__name__)


def without_password(text: str) -> str:
    """The text without user and password of a URL."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def fail(message: str) -> NoReturn:
    """End the script with one line for the user: what was wrong, with which value, what to do.

    With KOTOBA_TRACEBACK=1 in the environment, the traceback comes before it.
    """
    if os.environ.get("KOTOBA_TRACEBACK"):
        logger.warning("traceback of the error below", exc_info=sys.exc_info()[0] is not None, stack_info=True)
    raise SystemExit(f"{Path(__file__).name}: error: {without_password(message)}")


def boolean(value: str) -> bool:
    """Value of a flag that may stand alone (`--flag`) or carry a value (`--flag False`)."""
    if value.lower() in ("true", "1", "yes"):
        return True
    if value.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of a flag in its help, unless it has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class LastingStream:
    """A text stream that drops what cannot be written any more, because its terminal or its reader has gone."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def set_up_process(is_main_process: bool = True) -> None:
    """Log to stderr, only warnings outside of the main process; turn SIGTERM into SystemExit; outlive the terminal."""
    sys.stdout = LastingStream(sys.stdout)
    sys.stderr = LastingStream(sys.stderr)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    level = logging.INFO if is_main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    for noisy in ("httpx2", "httpx", "accelerate"):  # they log every request and every file of a checkpoint
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("datasets").propagate = False  # it has a handler of its own
    logging.getLogger("datasets.builder").setLevel(logging.ERROR)  # it warns of fewer files than processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def hold_lock(path: Path, output: str, *leftovers: str, wait: bool = False) -> Iterator[None]:
    """Let no other run write an output meanwhile. The kernel frees the lock when this process ends, in whatever way.

    Args:
        path: the lock file. Its directory is made.
        output: how a message names what is written.
        leftovers: patterns of the half-written files beside the lock that killed runs have left. They are deleted.
        wait: wait until another run ends, instead of failing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        fail(f"cannot write to {path.parent}: {error}. {CONTINUE}")
    with open(path, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            busy = f"another run is writing {output}: wait until it ends. If its machine was lost, delete {path}"
            if not wait:
                fail(busy)
            logger.warning(busy)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            logger.warning("%s has no file locks: make sure that no other run writes %s", path.parent, output)
        for pattern in leftovers:
            for leftover in path.parent.glob(pattern):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
        yield


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name only when it is complete and on the disk.

    Until then its name has a random part: no other process has it, and no link that somebody has planted is followed.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(unfinished, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file by `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


# ---- common: progress ------------------------------------------------------------------------------------------------


class ProgressBar(tqdm):
    """A progress bar on a terminal; elsewhere, such as in a log file, a line a minute."""

    def __init__(self, *args, **options):
        seconds = 0.1 if sys.stderr.isatty() else 60
        super().__init__(*args, mininterval=seconds, maxinterval=max(10, seconds), **options)

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], object]:
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda line: file.write(f"{line}\n") if line.strip() else None

    def moveto(self, lines: int) -> None:
        if self.fp.isatty():
            super().moveto(lines)


# ---- tars and transcriptions -----------------------------------------------------------------------------------------


def check_tar(path: Path) -> None:
    """Raise ValueError if a file is not a tar, is cut short or is damaged. Nothing is extracted.

    `tarfile` verifies the checksums of the headers, but takes a damaged header for the end of the archive. So nothing
    but zeros may follow the last member.
    """
    size = path.stat().st_size
    end = 0  # of the last member
    try:
        # With this buffer the disk reads the file from front to back. Without it only the headers are read, which takes
        # longer on hard disks.
        with open(path, "rb", buffering=BLOCK) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # `tarfile` would keep all of them in memory
                if member.size < 0 or tar.offset > size:
                    raise ValueError(f"cut short after {size:,} bytes")
                end = tar.offset
            file.seek(end)
            rest = file.read(PADDING + 1)
    except (tarfile.TarError, OverflowError, MemoryError) as error:  # the last two come from an impossible size
        raise ValueError(f"no tar header at byte {end:,}" if end else "not a tar") from error
    if len(rest) < tarfile.BLOCKSIZE:
        raise ValueError(f"cut short after {size:,} bytes")
    if any(rest[: tarfile.BLOCKSIZE]):
        raise ValueError(f"no tar header at byte {end:,}")
    if not end or any(rest) or len(rest) > PADDING:
        raise ValueError(f"the archive ends at byte {end:,}, but the file does not")


def check_tsv(path: Path) -> None:
    """Raise ValueError unless the first line is a clip's name, a tab and a transcription."""
    with open(path, "rb") as file:
        line = file.readline(1 << 16)
    if not re.match(rb"(\./)?[0-9a-f]{3}/[^\t]+\t", line):
        raise ValueError("not a list of transcriptions")


def looks_complete(path: Path) -> bool:
    """Whether a file exists, and begins and ends as it should; another program may have left only its beginning."""
    if not path.is_file():
        return False
    try:
        if path.suffix != ".tar":
            check_tsv(path)
            return True
        with open(path, "rb") as file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
            return not any(file.read())
    except (ValueError, tarfile.HeaderError):
        return False


# ---- requests --------------------------------------------------------------------------------------------------------


class TryAgainError(Exception):
    """This attempt failed; another one may succeed after `after` seconds."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


class GiveUpError(Exception):
    """This file cannot be downloaded, at least not in this run."""


@dataclass
class CorpusFile:
    """One file of the corpus and the state of its download."""

    url: str
    path: Path
    size: int | None = None  # bytes, as stated by the server; None = not stated
    damage: str = ""  # what was wrong with the last complete download

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def part(self) -> Path:
        """The file that receives the download."""
        return self.path.with_name(f"{self.name}.part")

    @property
    def version_path(self) -> Path:
        """The file that stores which version on the server the `.part` belongs to."""
        return self.path.with_name(f"{self.name}.part.version")

    def received(self) -> int:
        """Return the number of bytes in the `.part`."""
        return self.part.stat().st_size if self.part.exists() else 0

    def check(self, path: Path) -> None:
        """Raise ValueError if `path` does not hold an intact file of this kind."""
        if self.path.suffix == ".tar":
            check_tar(path)
        else:
            check_tsv(path)


class Run:
    """The state that the threads of a run share."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.progress = ProgressBar(disable=True)  # in bytes
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.free_at = 0.0  # value of time.monotonic() at which the rate limit allows the next byte

    def wait(self, seconds: float) -> None:
        """Wait, and end the work of this thread if the run is stopped."""
        if self.stopped.wait(seconds):
            raise GiveUpError("stopped")

    def advance(self, received: int) -> None:
        """Add bytes to the progress bar; a negative number removes some."""
        with self.lock:
            self.progress.update(received)

    def throttle(self, received: int) -> None:
        """Wait until the rate limit, which all threads share, allows these bytes."""
        with self.lock:
            now = time.monotonic()
            self.free_at = max(self.free_at, now) + received / self.args.bytes_per_second
            seconds = self.free_at - now
        self.wait(seconds)


def retry_after(value: str) -> float:
    """Return the seconds that a server asks to wait; it states them as a number or a date."""
    try:
        return urllib3.Retry().parse_retry_after(value)
    except urllib3.exceptions.InvalidHeader:
        return 0.0


def check_status(response: requests.Response, url: str, accepted: set[int]) -> None:
    """Raise TryAgainError or GiveUpError if the status is not accepted or a redirect left https."""
    if url.startswith("https:") and not response.url.startswith("https:"):
        raise GiveUpError(f"the server redirects from https to {without_password(response.url)}")
    if response.status_code in accepted:
        return
    answer = f"the server sends {response.status_code} {response.reason}"
    if response.status_code in TEMPORARY_STATUSES:
        raise TryAgainError(answer, retry_after(response.headers.get("Retry-After", "")))
    raise GiveUpError(f"{answer}; if the corpus has moved, pass its address as --base_url")


@contextlib.contextmanager
def open_url(run: Run, method: str, url: str, accepted: set[int], headers: dict) -> Iterator[requests.Response]:
    """Send a request and yield the response if its status is accepted.

    Every failure becomes a TryAgainError or a GiveUpError. TLS is always verified: no setting of this script turns
    that off, and `requests` ignores an empty CURL_CA_BUNDLE.
    """
    all_headers = headers | {"Accept-Encoding": "identity"}  # byte ranges of a compressed response would be useless
    try:
        with requests.request(method, url, headers=all_headers, stream=True, timeout=run.args.timeout) as response:
            check_status(response, url, accepted)
            yield response
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        cause = error
        while cause.__context__:  # two libraries wrap the error that says most
            cause = cause.__context__
        kind = GiveUpError if isinstance(cause, ssl.SSLCertVerificationError) else TryAgainError
        raise kind(f"{type(cause).__name__}: {cause}") from error


Action = Callable[[CorpusFile, Run], object]


def retry(action: Action, file: CorpusFile, run: Run) -> object:
    """Repeat an action until it succeeds. Raises GiveUpError if more than `--retries` attempts in a row fail.

    An attempt that received at least `PROGRESS` more bytes starts the count again.
    """
    failures = 0
    furthest = file.received()
    while True:
        try:
            return action(file, run)
        except TryAgainError as error:
            if file.received() >= furthest + PROGRESS:
                failures = 0
            furthest = max(furthest, file.received())
            failures += 1
            if failures > run.args.retries:
                raise GiveUpError(f"{error} (gave up after {failures} attempts)") from error
            backoff = run.args.backoff * 2 ** min(failures - 1, 20)
            pause = min(backoff, LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
            pause = max(pause, min(error.after, LONGEST_WAIT))
            logger.info("%s: %s; next attempt in %.1f s", file.name, error, pause)
            run.wait(pause)


def for_each_file(action: Action, files: list[CorpusFile], run: Run, description: str) -> dict[str, str]:
    """Apply an action to every file in threads, with retries; return the reasons of the failures by name.

    A run that ends early does not wait for its threads, which may hang in the network: a `.part` can be resumed.
    """

    def attempt(file: CorpusFile) -> tuple[str, str]:
        try:
            retry(action, file, run)
        except GiveUpError as error:
            return file.name, str(error)
        return file.name, ""

    with ThreadPool(run.args.pool) as pool:
        try:
            results = pool.imap_unordered(attempt, files)
            reasons = dict(ProgressBar(results, description, len(files), unit="file", disable=not files))
        except OSError as error:  # of the disk; errors of the network do not get here
            run.stopped.set()
            fail(f"{error}; partial files are kept. {CONTINUE}")
        except BaseException:  # Ctrl-C and SIGTERM must stop the threads too
            run.stopped.set()
            raise
    return {name: reason for name, reason in sorted(reasons.items()) if reason}


# ---- download --------------------------------------------------------------------------------------------------------


def ask_size(file: CorpusFile, run: Run) -> None:
    """Ask for the length of a file without its content. The server need not state it."""
    with open_url(run, "HEAD", file.url, {200, *NO_HEAD_STATUSES}, {}) as response:
        if response.status_code == 200:
            file.size = stated_length(response)


def stated_length(response: requests.Response) -> int | None:
    """Return the bytes of the whole file: from `Content-Range: bytes 5-9/10`, else from `Content-Length`."""
    content_range = response.headers.get("Content-Range", "")
    length = content_range.rpartition("/")[2] or response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def stated_version(response: requests.Response) -> str:
    """Return the ETag or the date of a file. A weak ETag does not promise equal bytes (RFC 9110, section 13.1.5)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def discard_part(file: CorpusFile, run: Run) -> None:
    """Delete the `.part` of a file, and take its bytes off the progress bar."""
    run.advance(-file.received())
    file.part.unlink(missing_ok=True)
    file.version_path.unlink(missing_ok=True)


def check_content(response: requests.Response) -> None:
    """Raise TryAgainError or GiveUpError if the body of a response is not the file itself."""
    if "html" in response.headers.get("Content-Type", ""):
        raise TryAgainError("the server sends a web page instead of the file")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise GiveUpError("the server sends the file in an encoding that was not requested")


def check_range(response: requests.Response, file: CorpusFile, version: str, run: Run) -> None:
    """Raise TryAgainError if a response does not continue the `.part`, which belongs to `version`."""
    if not response.headers.get("Content-Range", "").startswith(f"bytes {file.received()}-"):
        raise TryAgainError("the server sends another range than requested")
    if stated_version(response) not in (version, ""):
        discard_part(file, run)
        raise TryAgainError("the file has changed on the server")


def download(file: CorpusFile, run: Run) -> None:
    """Resume the `.part` with one request: only the rest if the server's file is unchanged, else the whole file."""
    version = file.version_path.read_text() if file.version_path.exists() else ""
    if not version:  # nothing tells whether the rest on the server belongs to it
        discard_part(file, run)
    received = file.received()
    headers = {"Range": f"bytes={received}-", "If-Range": version} if received else {}
    with open_url(run, "GET", file.url, {200, 206, 416}, headers) as response:
        total = stated_length(response)
        if total is None:
            total = file.size
        if response.status_code == 416:
            if received == total:
                return
            discard_part(file, run)
            raise TryAgainError(f"{received:,} bytes were received, but the server states a length of {total}")
        check_content(response)
        if response.status_code == 206:
            check_range(response, file, version, run)
        else:
            discard_part(file, run)
            if file.size is not None and file.size != total:
                file.size = None  # the next attempt asks again
                raise TryAgainError("the server states two different lengths")
            write_atomically(file.version_path, stated_version(response))
        receive_body(response, file, run)
    if total is not None and total != file.received():
        raise TryAgainError(f"connection lost at {file.received():,} of {total:,} bytes")


def receive_body(response: requests.Response, file: CorpusFile, run: Run) -> None:
    """Append the body of a response to the `.part` as it arrives. Raises TryAgainError if it arrives too slowly."""
    window_start = time.monotonic()
    window_bytes = 0
    with open(file.part, "ab", buffering=0) as part:
        while block := response.raw.read1(BLOCK, decode_content=False):
            part.write(block)
            run.advance(len(block))
            run.throttle(len(block))
            window_bytes += len(block)
            if time.monotonic() > window_start + run.args.timeout:
                if window_bytes < LEAST_RATE * run.args.timeout and not run.args.rate_limit:
                    raise TryAgainError(f"received only {window_bytes:,} bytes in {run.args.timeout:g} s")
                window_start = time.monotonic()
                window_bytes = 0


def fetch_file(file: CorpusFile, run: Run) -> None:
    """Download, check and rename one file (one attempt)."""
    if file.size is None:
        ask_size(file, run)
    download(file, run)
    try:
        file.check(file.part)
    except ValueError as error:
        discard_part(file, run)
        # If two downloads have the same damage, the file is damaged on the server.
        kind = GiveUpError if file.damage == str(error) else TryAgainError
        file.damage = str(error)
        raise kind(f"the downloaded file is damaged: {error}") from error
    with open(file.part, "rb") as part:
        os.fsync(part.fileno())
    os.replace(file.part, file.path)
    file.version_path.unlink(missing_ok=True)


# ---- files, record, card, push ---------------------------------------------------------------------------------------


def list_corpus_files(args: argparse.Namespace) -> list[CorpusFile]:
    """List the files of the target or of its range: the transcriptions first, then the tars."""
    names = [f"tsv/{'all' if args.target == 'test' else args.target}.tsv"]
    names += [f"data/{index:03x}.tar" for index in args.tars]
    files = []
    for name in names:
        path = args.directory / f"{args.target}.{Path(name).name}"
        files.append(CorpusFile(f"{args.base_url}/{name}", path))
    return files


def find_copies(files: list[CorpusFile], data_dir: Path) -> dict[str, Path]:
    """Find copies of missing files in the directories of other targets and ranges; return them by name.

    For example, `small` includes the tar of `tiny`, and all ranges of `all` have the same tsv.
    """
    local_names = {file.url.rpartition("/")[2]: file.name for file in files}  # by the name on the server
    copies = {}
    for path in sorted(data_dir.glob("*/*")):
        name = local_names.get(path.name.partition(".")[2])  # without the target's name in front
        if name and name not in copies and looks_complete(path):
            copies[name] = path
    return copies


def link_copy(file: CorpusFile, run: Run, copies: dict[str, Path]) -> None:
    """Hard-link an intact copy from another target's directory, if the file system allows it."""
    with contextlib.suppress(ValueError, OSError):
        file.check(copies[file.name])
        file.path.unlink(missing_ok=True)
        os.link(copies[file.name], file.path)
        discard_part(file, run)


def remove_damaged(file: CorpusFile, run: Run) -> None:
    """Check a file and remove it if it is damaged."""
    try:
        file.check(file.path)
    except ValueError as error:
        file.path.unlink()
        raise GiveUpError(str(error)) from error


def check_health(files: list[CorpusFile], run: Run) -> int:
    """Check all files that exist and remove the damaged ones; return the exit status."""
    present = [file for file in files if file.path.exists()]
    removed = for_each_file(remove_damaged, present, run, "checking")
    for name, reason in removed.items():
        print(f"removed {name}: {reason}")
    print(f"{len(present) - len(removed)} files intact, {len(removed)} removed, {len(files) - len(present)} missing")
    return 1 if removed else 0


def ask_sizes(files: list[CorpusFile], run: Run) -> dict[str, str]:
    """Ask for the length of every file; return the reasons of the failures by name."""
    try:
        retry(ask_size, files[0], run)  # alone, so that a dead host is noticed soon
    except GiveUpError as error:
        if isinstance(error.__cause__, TryAgainError):  # the retries ran out
            fail(f"{files[0].url}: {error}; if the corpus has moved, pass its address as --base_url")
        # A refusal concerns this file alone. It is asked for again below, and reported with the others.
    unknown = [file for file in files if file.size is None]
    return for_each_file(ask_size, unknown, run, "asking for sizes")


def check_space(total: int, received: int, directory: Path) -> None:
    """Fail if the disk cannot hold the files to download."""
    disk = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    print(f"free on the disk: {free / 1e9:,.3f} GB")
    if total - received + SPARE > free:
        fail(f"the disk of {disk} is too small; free some space, choose another --data_dir, or set --start and --end")


def print_download_time(file: CorpusFile, run: Run, left: int) -> None:
    """Measure the transfer rate with a short read that keeps nothing; print how long `left` bytes would take."""
    started = time.monotonic()
    with open_url(run, "GET", file.url, {200, 206}, {"Range": f"bytes=0-{SAMPLE - 1}"}) as response:
        received = max(1, len(response.raw.read(SAMPLE)))  # `rate` is a divisor below
    rate = min(received / (time.monotonic() - started), run.args.bytes_per_second)
    duration = datetime.timedelta(seconds=round(left / rate))
    print(f"time: about {duration} over one connection, at {rate / 1e6:,.1f} MB/s")


# ---- main ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Set up.
    set_up_process()
    run = Run(args)
    files = list_corpus_files(args)
    if args.health_check:
        return check_health(files, run)
    lock = contextlib.nullcontext()
    if not args.dry_run:
        print(TERMS)
        lock = hold_lock(args.directory / ".lock", str(args.directory), wait=True)
    with lock:
        # 4. Find what is left to do. This comes before step 2, which needs the sizes.
        missing = [file for file in files if not looks_complete(file.path)]
        copies = find_copies(missing, args.data_dir)
        if args.dry_run:
            missing = [file for file in missing if file.name not in copies]
        else:
            copied = [file for file in missing if file.name in copies]
            for_each_file(partial(link_copy, copies=copies), copied, run, "linking")
            missing = [file for file in missing if not looks_complete(file.path)]
        elsewhere = " here or in another target's directory" if args.dry_run else ""
        print(f"{args.directory}: {len(files) - len(missing)} of {len(files)} files found{elsewhere}")
        if not missing:
            return 0
        failed = ask_sizes(missing, run)
        wanted = [file for file in missing if file.name not in failed]
        sized = [file for file in wanted if file.size is not None]
        total = sum(file.size for file in sized)
        received = sum(file.received() for file in sized)
        print(f"to download: {len(wanted)} files, {total / 1e9:,.3f} GB ({received / 1e9:,.3f} GB already received)")

        # 2. Refuse what can be refused.
        check_space(total, received, args.directory)

        # 5. Work.
        if args.dry_run:
            measure = partial(print_download_time, left=total - received)
            failed |= for_each_file(measure, wanted[-1:], run, "measuring")
        else:
            run.progress = ProgressBar(total=total, initial=received, unit="B", unit_scale=True)
            with logging_redirect_tqdm(), run.progress:
                failed |= for_each_file(fetch_file, wanted, run, "downloading")
            print(f"{args.directory}: {len(files) - len(failed)} of {len(files)} files are complete")

    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"stopped. {CONTINUE}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an exception while Python shuts down would print a traceback
