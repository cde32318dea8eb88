#!/usr/bin/env python
"""Download ReazonSpeech v2: the tars and the transcriptions of a subset, or of a range of its tars.

In:   <base_url>/tsv/<target>.tsv and <base_url>/data/000.tar, 001.tar, ...; when the corpus moves to another host
      again, --base_url or REAZONSPEECH_BASE_URL names it.
Out:  <data_dir>/<target>/<target>.<target>.tsv and <target>.000.tar, ...; a range of tars lies in
      <data_dir>/<target>_<start>_<end>/. The target `test` is the one tar that `all` leaves out.

One file at a time, and ten at a time:

    python reazonspeech_manual_downloader.py --target tiny -p 1
    python reazonspeech_manual_downloader.py --target all -p 10 -s 0 -e 50

To resume, run the same command again: complete files are not downloaded again, and partial ones (`.part`) go on where
they stopped. A file gets its name only when its length and structure are checked and it is synced to the disk.

Exit status: 0 when every file is there, 1 when files failed (each is named, with the reason) or when --health_check
removed some, 130 after Ctrl-C, 143 after SIGTERM. The corpus may be used only for information analysis, as Article
30-4 of the Japanese Copyright Act permits it.
"""

import argparse
import contextlib
import datetime
import logging
import math
import os
import random
import re
import shutil
import signal
import ssl
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NoReturn

import requests
import urllib3
from filelock import FileLock, Timeout
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

BASE_URL = "https://corpus.reazon-research.org/reazonspeech-v2"  # as of November 2026
TARS = {  # of each subset (https://huggingface.co/datasets/reazon-research/reazonspeech); the last one is the test set
    "tiny": range(1),
    "small": range(12),
    "medium": range(116),
    "large": range(579),
    "all": range(4095),
    "test": range(4095, 4096),
}
DATA_DIR = "~/.cache/reazon_manual_download"
TERMS = """ReazonSpeech is for information analysis only, as Article 30-4 of the Japanese Copyright Act permits it.
Who downloads it agrees to use it for nothing else."""
BLOCK = 1 << 20  # bytes read at once
SAMPLE = 8 << 20  # bytes that --dry_run reads to measure the rate
PROGRESS = 1 << 16  # bytes; a try that brought as many begins a new count of failures
LEAST_RATE = 1024  # bytes a second, on average over --timeout; a slower connection is given up
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 600  # seconds, whatever Retry-After says
SPARE = 64 << 20  # bytes left free on the disk
PADDING = 1 << 20  # bytes of zeros that a tar may end with
TEMPORARY_STATUSES = {408, 425, 429, *range(500, 600)}  # the next try may get another answer


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    group = parser.add_argument_group("files")
    group.add_argument("-t", "--target", choices=list(TARS), default="tiny", help="subset of the corpus")
    group.add_argument(
        "-s", "--start", "--start_que", type=int, help="first tar of a range; unset = the target's first"
    )
    group.add_argument("-e", "--end", "--end_que", type=int, help="tar after the range; unset = to the target's last")
    group.add_argument("--dry_run", help="print what would be downloaded and how long it takes, and stop", **flag)
    group.add_argument("--health_check", help="check the files on the disk, remove damaged ones, and stop", **flag)
    group = parser.add_argument_group("places")
    group.add_argument("--base_url", help=f"address of the corpus; unset = REAZONSPEECH_BASE_URL or {BASE_URL}")
    group.add_argument("--data_dir", help=f"directory of downloads; unset = REAZONSPEECH_DATA_DIR or {DATA_DIR}")
    group = parser.add_argument_group("network")
    group.add_argument("-p", "--pool", type=int, default=10, help="files at a time")
    group.add_argument("--retries", type=int, default=8, help="failures in a row before a file is given up")
    group.add_argument("--backoff", type=float, default=2.0, help="seconds before the next try, doubled up to 60")
    group.add_argument("--timeout", type=float, default=60.0, help="seconds of silence before a connection is given up")
    group.add_argument("--rate_limit", type=float, default=0.0, help="MB a second for all files together; 0 = no limit")
    args = parser.parse_args(argv)
    args.base_url = (args.base_url or os.environ.get("REAZONSPEECH_BASE_URL") or BASE_URL).rstrip("/")
    args.data_dir = Path(args.data_dir or os.environ.get("REAZONSPEECH_DATA_DIR") or DATA_DIR).expanduser().absolute()
    if not re.match("https?://.", args.base_url):
        parser.error(f"--base_url: {args.base_url!r} does not begin with https://")
    if args.pool < 1:
        parser.error(f"--pool: {args.pool} files at a time are too few")
    tars = TARS[args.target]
    start = args.start or 0
    end = len(tars) if args.end is None else args.end
    if not 0 <= start < end <= len(tars):
        parser.error(f"--start {start} --end {end}: {args.target} has tars 0 to {len(tars)}, the end excluded")
    whole = args.start is None and args.end is None
    args.directory = args.data_dir / (args.target if whole else f"{args.target}_{start}_{end}")
    args.tars = tars[start:end]
    args.bytes_per_second = args.rate_limit * 1e6 or math.inf
    return args


# ---- common ----------------------------------------------------------------------------------------------------------

CONTINUE = "Run the same command again to continue."

logger = logging.getLogger(__name__)


def fail(message: str) -> NoReturn:
    """End the script with one line for the user: what was wrong, with which value, what to do."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}")


def first_line(error: BaseException) -> str:
    """The line of an error that says what is wrong, without its full stop. The Hub's begin with the id of a request."""
    for line in str(error).splitlines():
        if line.strip() and not line.startswith("(Request ID"):
            return line.strip().rstrip(".")
    return type(error).__name__


def boolean(value: str) -> bool:
    """Value of a flag that may stand alone (`--flag`) or carry a value (`--flag False`)."""
    if value.lower() in ("true", "1", "yes"):
        return True
    if value.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")


def set_up_process(is_main_process: bool = True) -> None:
    """Log to stderr, from the main process more than from the others, and end in order on SIGTERM."""
    level = logging.INFO if is_main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    for noisy in ("httpx2", "httpx", "accelerate"):  # a line for every request, and for every file of a checkpoint
        logging.getLogger(noisy).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that appears under its name only when it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


# ---- tars and transcriptions -----------------------------------------------------------------------------------------


def check_tar(path: Path) -> None:
    """Raise ValueError where a file is no tar, is cut short or is damaged; nothing is extracted.

    `tarfile` checks the headers by their checksums, but takes a damaged one for the end of the archive. So nothing but
    zeros may follow the last member.
    """
    size = path.stat().st_size
    end = 0  # of the last member
    try:
        # With this buffer a disk reads from front to back. Without it only the headers are read, which takes hard disks
        # longer.
        with open(path, "rb", buffering=BLOCK) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # otherwise it keeps every one
                if member.size < 0 or tar.offset > size:
                    raise ValueError(f"cut short after {size:,} bytes")
                end = tar.offset
            file.seek(end)
            rest = file.read(PADDING + 1)
    except (tarfile.TarError, OverflowError, MemoryError) as error:  # the last two: an impossible size
        raise ValueError(f"no tar header at byte {end:,}" if end else "not a tar") from error
    if len(rest) < tarfile.BLOCKSIZE:
        raise ValueError(f"cut short after {size:,} bytes")
    if any(rest[: tarfile.BLOCKSIZE]):
        raise ValueError(f"no tar header at byte {end:,}")
    if not end or any(rest) or len(rest) > PADDING:
        raise ValueError(f"the archive ends at byte {end:,}, and the file does not")


def check_tsv(path: Path) -> None:
    """Raise ValueError unless the first line is a clip's name, a tab and a transcription."""
    with open(path, "rb") as file:
        line = file.readline(1 << 16)
    if not re.match(rb"(\./)?[0-9a-f]{3}/[^\t]+\t", line):
        raise ValueError("not a list of transcriptions")


def looks_complete(path: Path) -> bool:
    """Whether a file is there and ends as it should: another program may have left only its beginning."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        end = file.read()
    return bool(end) and (path.suffix != ".tar" or not any(end))


# ---- requests --------------------------------------------------------------------------------------------------------


class TryAgainError(Exception):
    """This try failed; another one may succeed, after so many seconds."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


class GiveUpError(Exception):
    """This file cannot be had, or not in this run."""


@dataclass
class CorpusFile:
    """One file of the corpus and its download."""

    url: str
    path: Path
    size: int | None = None  # bytes, as the server says; None = it does not say
    damage: str = ""  # what was wrong with the last complete download

    def __post_init__(self) -> None:
        self.name = self.path.name
        self.part = self.path.with_name(f"{self.name}.part")
        self.version = self.path.with_name(f"{self.name}.part.version")  # which version the `.part` is the beginning of
        self.check = check_tar if self.path.suffix == ".tar" else check_tsv

    def received(self) -> int:
        """Bytes in the `.part`."""
        return self.part.stat().st_size if self.part.exists() else 0


@dataclass
class Run:
    """What the threads of a run share."""

    args: argparse.Namespace
    progress: tqdm = field(default_factory=partial(tqdm, disable=True))  # in bytes
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    free_at: float = 0.0  # when the rate limit allows the next byte

    def wait(self, seconds: float) -> None:
        """Wait, and end the work of this thread when the run is stopped."""
        if self.stopped.wait(seconds):
            raise GiveUpError("stopped")

    def count(self, received: int) -> None:
        """Show the bytes that came, and wait until the rate limit, which all threads share, allows for them."""
        with self.lock:
            self.progress.update(received)
            now = time.monotonic()
            self.free_at = max(self.free_at, now) + received / self.args.bytes_per_second
            seconds = self.free_at - now
        self.wait(seconds)


def retry_after(value: str) -> float:
    """Seconds that a server asks to wait, which it gives as a number or a date."""
    try:
        return urllib3.Retry().parse_retry_after(value)
    except urllib3.exceptions.InvalidHeader:
        return 0.0


def check_status(response: requests.Response, url: str, accepted: set[int]) -> None:
    """Raise TryAgainError or GiveUpError for an answer without the file."""
    if url.startswith("https:") and not response.url.startswith("https:"):
        raise GiveUpError(f"the server leads away from https, to {response.url}")
    if response.status_code in accepted:
        return
    answer = f"the server answers {response.status_code} {response.reason}"
    if response.status_code in TEMPORARY_STATUSES:
        raise TryAgainError(answer, retry_after(response.headers.get("Retry-After", "")))
    raise GiveUpError(f"{answer}; if the corpus has moved, give its address by --base_url")


@contextlib.contextmanager
def open_url(run: Run, method: str, url: str, accepted: set[int], headers: dict) -> Iterator[requests.Response]:
    """The answer to a request, if its status is accepted. Every failure becomes a TryAgainError or a GiveUpError.

    TLS is verified: no setting here turns that off, and `requests` takes an empty CURL_CA_BUNDLE for none.
    """
    all_headers = headers | {"Accept-Encoding": "identity"}  # a compressed answer has no byte ranges
    try:
        with requests.request(method, url, headers=all_headers, stream=True, timeout=run.args.timeout) as response:
            check_status(response, url, accepted)
            yield response
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        cause = error
        while cause.__context__:  # below the wrapping of two libraries
            cause = cause.__context__
        kind = GiveUpError if isinstance(cause, ssl.SSLCertVerificationError) else TryAgainError
        raise kind(f"{type(cause).__name__}: {cause}") from error


Action = Callable[[CorpusFile, Run], object]


def retry(action: Action, file: CorpusFile, run: Run) -> object:
    """Try until it works; raises GiveUpError after `--retries` failures in a row that brought nothing new."""
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
                raise GiveUpError(f"{error} ({failures} tries in vain)") from error
            backoff = run.args.backoff * 2 ** min(failures - 1, 20)
            pause = min(backoff, LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
            pause = max(pause, min(error.after, LONGEST_WAIT))
            logger.info("%s: %s; again in %.1f s", file.name, error, pause)
            run.wait(pause)


def for_each_file(action: Action, files: list[CorpusFile], run: Run, description: str) -> dict[str, str]:
    """Do something to every file, in threads; gives the reasons of the failures by name.

    A run that ends early does not wait for its threads, which may hang in the network: a `.part` can be resumed.
    """

    def attempt(file: CorpusFile) -> tuple[str, str]:
        try:
            action(file, run)
        except GiveUpError as error:
            return file.name, str(error)
        return file.name, ""

    with ThreadPool(run.args.pool) as pool:
        try:
            results = pool.imap_unordered(attempt, files)
            reasons = dict(tqdm(results, description, len(files), unit="file", disable=not files))
        except BaseException as error:
            run.stopped.set()
            if isinstance(error, OSError):
                fail(f"{error}; what has come is kept. {CONTINUE}")
            raise
    return {name: reason for name, reason in sorted(reasons.items()) if reason}


# ---- download --------------------------------------------------------------------------------------------------------


def ask_size(file: CorpusFile, run: Run) -> None:
    """Ask for the length of a file without its content; a server need not know it."""
    with open_url(run, "HEAD", file.url, {200, 403, 405, 501}, {}) as response:
        if response.status_code == 200:
            file.size = stated_length(response)


def stated_length(response: requests.Response) -> int | None:
    """Bytes of the whole file, by `Content-Range: bytes 5-9/10` or else by the length of the answer."""
    content_range = response.headers.get("Content-Range", "")
    length = content_range.rpartition("/")[2] or response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def stated_version(response: requests.Response) -> str:
    """ETag or date of a file. A weak ETag vouches for no byte (RFC 9110, section 13.1.5)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def discard_part(file: CorpusFile, run: Run) -> None:
    """Delete what has come of a file."""
    run.progress.update(-file.received())
    file.part.unlink(missing_ok=True)
    file.version.unlink(missing_ok=True)


def check_content(response: requests.Response) -> None:
    """Raise TryAgainError or GiveUpError where the body of an answer is not the file itself."""
    if "html" in response.headers.get("Content-Type", ""):
        raise TryAgainError("the server answers a web page in place of the file")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise GiveUpError("the server answers in an encoding that was not asked for")


def check_range(response: requests.Response, file: CorpusFile, version: str, run: Run) -> None:
    """Raise TryAgainError where an answer does not continue the `.part`, which is of this version."""
    if not response.headers.get("Content-Range", "").startswith(f"bytes {file.received()}-"):
        raise TryAgainError("the server answers another range than asked")
    if stated_version(response) not in (version, ""):
        discard_part(file, run)
        raise TryAgainError("the file has changed on the server")


def download(file: CorpusFile, run: Run) -> None:
    """Complete the `.part` by one request: the rest of it where the file is still the same, else all of it."""
    version = file.version.read_text() if file.version.exists() else ""
    if not version:
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
            raise TryAgainError(f"{received:,} bytes are here, the server has {total}")
        check_content(response)
        if response.status_code == 206:
            check_range(response, file, version, run)
        else:
            discard_part(file, run)
            if file.size not in (None, total):
                file.size = None  # to be asked again
                raise TryAgainError("the server contradicts itself about the length")
            write_atomically(file.version, stated_version(response))
        receive_body(response, file, run)
    if total not in (None, file.received()):
        raise TryAgainError(f"connection lost at {file.received():,} of {total:,} bytes")


def receive_body(response: requests.Response, file: CorpusFile, run: Run) -> None:
    """Append the body of an answer to the `.part` as it comes."""
    started = time.monotonic()
    received = 0  # since then
    with open(file.part, "ab", buffering=0) as part:
        while block := response.raw.read1(BLOCK, decode_content=False):
            part.write(block)
            run.count(len(block))
            received += len(block)
            if time.monotonic() > started + run.args.timeout:
                if received < LEAST_RATE * run.args.timeout and not run.args.rate_limit:
                    raise TryAgainError(f"only {received:,} bytes in {run.args.timeout:g} s")
                started = time.monotonic()
                received = 0


def fetch_file(file: CorpusFile, run: Run) -> None:
    """Bring a file to its own name, in one try."""
    if file.size is None:
        ask_size(file, run)
    download(file, run)
    try:
        file.check(file.part)
    except ValueError as error:
        discard_part(file, run)
        kind = GiveUpError if file.damage == str(error) else TryAgainError  # the same damage twice is the server's
        file.damage = str(error)
        raise kind(f"what comes is damaged: {error}") from error
    with open(file.part, "rb") as part:
        os.fsync(part.fileno())
    os.replace(file.part, file.path)
    file.version.unlink(missing_ok=True)


# ---- files, record, card, push ---------------------------------------------------------------------------------------


def list_corpus_files(args: argparse.Namespace) -> list[CorpusFile]:
    """The files of the target or of its range: the transcriptions first, then the tars."""
    names = [f"tsv/{'all' if args.target == 'test' else args.target}.tsv"]
    names += [f"data/{index:03x}.tar" for index in args.tars]
    files = []
    for name in names:
        path = args.directory / f"{args.target}.{Path(name).name}"
        files.append(CorpusFile(f"{args.base_url}/{name}", path))
    return files


@contextlib.contextmanager
def locked_downloads(directory: Path) -> Iterator[None]:
    """Make the directory and hold its lock, which another run may hold for a while."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"no place for the downloads: {error}; give another --data_dir")
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another run downloads into %s; waiting for its end", directory)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def find_copies(files: list[CorpusFile], data_dir: Path) -> dict[str, Path]:
    """Copies of missing files, by name: `small` has the tar of `tiny`, and all ranges of `all` have the same tsv."""
    names = {file.url.rpartition("/")[2]: file.name for file in files}
    copies = {}
    for path in sorted(data_dir.glob("*/*")):
        name = names.get(path.name.partition(".")[2])  # without the target's name in front
        if name and name not in copies and looks_complete(path):
            copies[name] = path
    return copies


def link_copy(file: CorpusFile, run: Run, copies: dict[str, Path]) -> None:
    """Give a copy that is sound a second name, where the file system has such links."""
    with contextlib.suppress(ValueError, OSError):
        file.check(copies[file.name])
        file.path.unlink(missing_ok=True)
        os.link(copies[file.name], file.path)
        discard_part(file, run)


def remove_damaged(file: CorpusFile, run: Run) -> None:
    """Check a file and remove it where it is damaged."""
    try:
        file.check(file.path)
    except ValueError as error:
        file.path.unlink()
        raise GiveUpError(str(error)) from error


def check_health(files: list[CorpusFile], run: Run) -> int:
    """Check all files that are there and remove the damaged ones; gives the exit status."""
    present = [file for file in files if file.path.exists()]
    removed = for_each_file(remove_damaged, present, run, "checking")
    for name, reason in removed.items():
        print(f"removed {name}: {reason}")
    print(f"{len(present) - len(removed)} files are sound, {len(removed)} removed, {len(files) - len(present)} absent")
    return 1 if removed else 0


def ask_sizes(files: list[CorpusFile], run: Run) -> dict[str, str]:
    """Ask for the length of every file; gives the reasons why some cannot be had, by name."""
    try:
        retry(ask_size, files[0], run)  # alone, so that a dead host is known before long
    except GiveUpError as error:
        if isinstance(error.__cause__, TryAgainError):
            fail(f"{files[0].url}: {error}; if the corpus has moved, give its address by --base_url")
    unknown = [file for file in files if file.size is None]
    return for_each_file(partial(retry, ask_size), unknown, run, "asking for sizes")


def check_space(total: int, received: int, directory: Path) -> None:
    """Fail where the disk cannot hold what is to be downloaded."""
    disk = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    print(f"free on the disk: {free / 1e9:,.3f} GB")
    if total - received + SPARE > free:
        fail(f"{disk} is too small; make room, give another --data_dir, or fewer tars by --start and --end")


def print_download_time(file: CorpusFile, run: Run, left: int) -> None:
    """Measure the rate by a short read that keeps nothing, and print how long so many bytes take."""
    started = time.monotonic()
    with open_url(run, "GET", file.url, {200, 206}, {"Range": f"bytes=0-{SAMPLE - 1}"}) as response:
        received = max(1, len(response.raw.read(SAMPLE)))
    rate = min(received / (time.monotonic() - started), run.args.bytes_per_second)
    duration = datetime.timedelta(seconds=round(left / rate))
    print(f"time: about {duration} by one connection, at {rate / 1e6:,.1f} MB/s")


# ---- main ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Set up.
    set_up_process()
    run = Run(args)
    files = list_corpus_files(args)
    if args.health_check:
        return check_health(files, run)

    # 2. Refuse what can be refused.
    if not args.dry_run:
        print(TERMS)
    with contextlib.nullcontext() if args.dry_run else locked_downloads(args.directory):
        # 4. Find what is left to do.
        missing = [file for file in files if not looks_complete(file.path)]
        copies = find_copies(missing, args.data_dir)
        if args.dry_run:
            missing = [file for file in missing if file.name not in copies]
        else:
            copied = [file for file in missing if file.name in copies]
            for_each_file(partial(link_copy, copies=copies), copied, run, "linking")
            missing = [file for file in missing if not looks_complete(file.path)]
        there = f"{len(files) - len(missing)} of {len(files)} files are here"
        print(f"{args.directory}: {there}, or in another target's directory")
        if not missing:
            return 0
        failed = ask_sizes(missing, run)
        wanted = [file for file in missing if file.name not in failed]
        total = sum(file.size or 0 for file in wanted)
        received = sum(file.received() for file in wanted)
        print(f"to fetch: {len(wanted)} files, {total / 1e9:,.3f} GB, of which {received / 1e9:,.3f} GB are here")
        check_space(total, received, args.directory)

        # 5. Work.
        if args.dry_run:
            measure = partial(print_download_time, left=total - received)
            failed |= for_each_file(partial(retry, measure), wanted[-1:], run, "measuring")
        else:
            run.progress = tqdm(total=total, initial=received, unit="B", unit_scale=True)
            with logging_redirect_tqdm(), run.progress:
                failed |= for_each_file(partial(retry, fetch_file), wanted, run, "downloading")
            print(f"{args.directory}: {len(files) - len(failed)} of {len(files)} files are here")

    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"stopped. {CONTINUE}", file=sys.stderr)
        sys.exit(130)
