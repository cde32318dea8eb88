#!/usr/bin/env python
"""Download ReazonSpeech v2: the tars and the transcriptions of a subset, or of a range of its tars.

In:   <base_url>/tsv/<target>.tsv and <base_url>/data/000.tar, 001.tar, ...; when the host moves again, name the new
      one by --base_url or REAZONSPEECH_BASE_URL.
Out:  <data_dir>/<target>/<target>.<target>.tsv and <target>.000.tar, ...; with --start and --end the tars of that
      range, end excluded, in <data_dir>/<target>_<start>_<end>/. The target `test` is the tar that `all` leaves out.

A file appears under its name only when it is whole: its length and the structure of the tar are checked, it is synced
and renamed. Until then it is a `.part`, which the same command resumes after any failure. What another target's
directory has already is linked from there. One file at a time, ten:

    python reazonspeech_manual_downloader.py --target tiny -p 1
    python reazonspeech_manual_downloader.py --target all -p 10 -s 0 -e 50

Exit status: 0 when everything is there, 1 when files failed (each is named, with the reason) or when the health check
removed some, 130 after Ctrl-C. The corpus may be used only for information analysis, as Article 30-4 of the Japanese
Copyright Act permits it.
"""

import argparse
import contextlib
import datetime
import email.utils
import logging
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import requests
import urllib3
from filelock import FileLock, Timeout
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

BASE_URL = "https://corpus.reazon-research.org/reazonspeech-v2"  # as of November 2026
# Tars of each subset (https://huggingface.co/datasets/reazon-research/reazonspeech); the last one is the test set.
TRAIN_TARS = {"tiny": 1, "small": 12, "medium": 116, "large": 579, "all": 4095}
TARS = {target: range(count) for target, count in TRAIN_TARS.items()} | {"test": range(4095, 4096)}
DATA_DIR = "~/.cache/reazon_manual_download"
TERMS = """ReazonSpeech is for information analysis only, as Article 30-4 of the Japanese Copyright Act permits it.
Who downloads it agrees to use it for nothing else."""
BLOCK = 1 << 20  # bytes read at once
PROGRESS = 1 << 16  # bytes after which a try that failed begins a new count of failures
SAMPLE = 32 << 20  # bytes that --dry_run reads to tell the rate, or as many as come in 3 s
LEAST_RATE = 1024  # bytes a second over a whole time-out; less is a stall
LONGEST_WAIT = 600  # seconds, whatever Retry-After says
SPARE = 64 << 20  # bytes left free on the disk
PADDING = 1 << 20  # bytes of zeros that a tar may end with
PASSING = {408, 425, 429, *range(500, 600)}  # statuses that may be others next time

logger = logging.getLogger(__name__)


class TryAgainError(Exception):
    """This try failed; another may succeed, after so many seconds."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


class GiveUpError(Exception):
    """This file can't be had, or not in this run."""


def fail(message: str) -> NoReturn:
    """End the script with one line for the user: what was wrong, with which value, what to do."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}")


def boolean(value: str) -> bool:
    """Value of a flag that may stand alone (`--flag`) or carry a value (`--flag False`)."""
    if value.lower() in ("true", "1", "yes"):
        return True
    if value.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")


def check_tar(path: Path, advance: Callable[[int], object] = int) -> None:
    """Read a tar to its end and raise ValueError where it isn't one, is cut short or is damaged; nothing is extracted.

    Every byte is read once; what is checked is the chain of headers, their checksums and the zeros at the end.
    """
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    start = header_at = members = end = 0  # the buffer's place in the file, the next header's, the last header's end
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            while not end and header_at < start + got:
                header = bytes(view[header_at - start :][:512])
                if not any(header):
                    end = header_at or 1
                    break
                try:
                    checksum, length = int(header[148:156].strip(b"\0 "), 8), tarfile.nti(header[124:136])
                except (ValueError, tarfile.HeaderError):
                    checksum = length = -1
                if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" ") or length < 0:
                    raise ValueError(f"no tar header at byte {header_at:,}" if header_at else "not a tar")
                header_at += 512 + -(-length // 512) * 512
                members += 1
            if end and any(view[max(0, end - start) : got]):
                raise ValueError(f"more follows the end of the archive at byte {end:,}")
            start += got
            advance(got)
    if not end:
        raise ValueError(f"cut short after {start:,} bytes")
    if not members or start - end > PADDING:
        raise ValueError(f"only zeros from byte {end:,} on")


def check_tsv(path: Path, advance: Callable[[int], object] = int) -> None:
    """Raise ValueError unless the first line is a clip's name, a tab and a transcription."""
    with open(path, "rb") as file:
        if not re.match(rb"(\./)?[0-9a-f]{3}/[^\t]+\t", file.readline(1 << 16)):
            raise ValueError("not a list of transcriptions")
    advance(path.stat().st_size)


def looks_whole(path: Path) -> bool:
    """Whether a file is there and ends as it should: another program may have left the beginning of one."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 512))
        end = file.read()
    return bool(end) and (path.suffix != ".tar" or not any(end))


@dataclass
class File:
    """One file of the corpus."""

    url: str
    path: Path
    size: int | None = None  # bytes, as the server says; None where it doesn't
    damage: str = ""  # what was wrong with it when it came last

    def __post_init__(self):
        self.name = self.path.name
        self.part = self.path.with_name(f"{self.name}.part")
        self.version = self.path.with_name(f"{self.name}.part.version")  # which the `.part` is the beginning of
        self.check = check_tar if self.path.suffix == ".tar" else check_tsv

    def here(self) -> int:
        """Bytes in the `.part`."""
        return self.part.stat().st_size if self.part.exists() else 0


@dataclass
class Run:
    """What the threads of a run share."""

    retries: int
    timeout: float  # seconds
    backoff: float  # seconds
    rate_limit: float  # bytes a second; 0 = none
    bar: tqdm | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    own: threading.local = field(default_factory=threading.local)  # a connection for each thread
    free_at: float = 0.0  # when the rate limit allows the next byte
    broken: BaseException | None = None  # what ended the run

    def advance(self, count: int) -> None:
        with self.lock:
            self.bar.update(count)

    def restart(self, file: File) -> None:
        """Give up what has come of a file."""
        self.advance(-file.here())
        file.part.unlink(missing_ok=True)
        file.version.unlink(missing_ok=True)

    def wait(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise GiveUpError("stopped")

    def throttle(self, count: int) -> None:
        """Wait until the rate limit, which all threads share, allows for the bytes that came."""
        if self.rate_limit:
            with self.lock:
                self.free_at = max(self.free_at, time.monotonic()) + count / self.rate_limit
                seconds = self.free_at - time.monotonic()
            self.wait(seconds)


def retry_after(value: str) -> float:
    """Seconds that a server asks to wait, by a number or a date."""
    with contextlib.suppress(ValueError):
        return float(value) if value.isdigit() else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0


@contextlib.contextmanager
def request(run: Run, method: str, url: str, accepted: set[int], headers: dict[str, str]):
    """The answer to a request, if its status is accepted. Every way to fail becomes TryAgainError or GiveUpError.

    TLS is verified: no setting here turns that off, and `requests` takes an empty CURL_CA_BUNDLE for none.
    """
    if not hasattr(run.own, "session"):
        run.own.session = requests.Session()
        run.own.session.headers["Accept-Encoding"] = "identity"  # of a compressed answer no range can be asked
    try:
        with run.own.session.request(method, url, headers=headers, stream=True, timeout=run.timeout) as response:
            answer = f"the server answers {response.status_code} {response.reason}"
            if url.startswith("https:") and not response.url.startswith("https:"):
                raise GiveUpError(f"the server leads away from https, to {response.url}")
            if response.status_code in PASSING - accepted:
                raise TryAgainError(answer, retry_after(response.headers.get("Retry-After", "")))
            if response.status_code not in accepted:
                raise GiveUpError(f"{answer}; if the corpus has moved, give its address by --base_url")
            yield response
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        cause = error
        while cause.__context__:  # below the wrapping of two libraries
            cause = cause.__context__
        final = isinstance(cause, ssl.SSLCertVerificationError)
        raise (GiveUpError if final else TryAgainError)(f"{type(cause).__name__}: {cause}") from error


def ask_size(file: File, run: Run) -> None:
    """Ask for the length of a file without its content; a server need not know."""
    with request(run, "HEAD", file.url, {200, 403, 405, 501}, {}) as response:
        length = response.headers.get("Content-Length", "")
        file.size = int(length) if response.status_code == 200 and length.isdigit() else None


def measure_rate(file: File, run: Run) -> float:
    """Bytes a second of one connection, by a short read that keeps nothing."""
    began, came = time.monotonic(), 0
    with request(run, "GET", file.url, {200, 206}, {"Range": f"bytes=0-{SAMPLE - 1}"}) as response:
        while came < SAMPLE and time.monotonic() < began + 3 and (block := response.raw.read1(BLOCK)):
            came += len(block)
    return max(1, came) / (time.monotonic() - began)


def download(file: File, run: Run) -> None:
    """Bring the `.part` to its end by one request, from where an earlier one left it if the file is still the same."""
    version = file.version.read_text() if file.version.exists() else ""
    if not version:
        run.restart(file)
    have = file.here()
    headers = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    with request(run, "GET", file.url, {200, 206, 416}, headers) as response:
        part = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
        total = part[2] if part else response.headers.get("Content-Length", "")
        total = int(total) if total.isdigit() else file.size
        # A weak ETag vouches for no byte (RFC 9110, section 13.1.5).
        etag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
        now = etag if etag.startswith('"') else date
        if response.status_code == 416:
            if have == total:
                return
            run.restart(file)
            raise TryAgainError(f"{have:,} bytes are here, the server has {total}")
        if "html" in response.headers.get("Content-Type", ""):
            raise TryAgainError("the server answers a web page in place of the file")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise GiveUpError("the server answers in an encoding that was not asked for")
        if response.status_code == 206:
            if not part or part[1] != str(have):
                raise TryAgainError("the server answers another range than asked")
            if now not in (version, ""):
                run.restart(file)
                raise TryAgainError("the file has changed on the server")
        else:
            run.restart(file)
            if file.size not in (None, total):
                file.size = None  # to be asked again
                raise TryAgainError("the server contradicts itself about the length")
            file.version.write_text(now)
        receive(response, file, run)
    if total not in (None, file.here()):
        raise TryAgainError(f"connection lost at {file.here():,} of {total:,} bytes")


def receive(response: requests.Response, file: File, run: Run) -> None:
    """Append the body of an answer to the `.part` as it comes."""
    since, came = time.monotonic(), 0
    with open(file.part, "ab", buffering=0) as part:
        while block := response.raw.read1(BLOCK, decode_content=False):
            run.wait(0)
            part.write(block)
            run.advance(len(block))
            run.throttle(len(block))
            came += len(block)
            if time.monotonic() > since + run.timeout:
                if came < LEAST_RATE * run.timeout and not run.rate_limit:
                    raise TryAgainError(f"only {came:,} bytes in {run.timeout:g} s")
                since, came = time.monotonic(), 0


def fetch(file: File, run: Run) -> None:
    """Bring a file to its own name, in one try."""
    if file.size is None:
        ask_size(file, run)
    download(file, run)
    try:
        file.check(file.part)
    except ValueError as error:
        run.restart(file)
        earlier, file.damage = file.damage, str(error)
        raise (GiveUpError if earlier == file.damage else TryAgainError)(f"what comes is damaged: {error}") from error
    with open(file.part, "rb") as part:
        os.fsync(part.fileno())
    os.replace(file.part, file.path)
    file.version.unlink(missing_ok=True)


def patiently(action: Callable[[File, Run], None], file: File, run: Run) -> None:
    """Try until it works; raises GiveUpError after `retries` failures in a row that brought nothing new."""
    failures, furthest = 0, file.here()
    while True:
        try:
            return action(file, run)
        except TryAgainError as error:
            here = file.here()
            failures = 1 if here >= furthest + PROGRESS else failures + 1
            furthest = max(furthest, here)
            if failures > run.retries:
                raise GiveUpError(f"{error} ({failures} tries in vain)") from error
            pause = min(60.0, run.backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
            pause = max(pause, min(error.after, LONGEST_WAIT))
            logger.info("%s: %s; again in %.1f s", file.name, error, pause)
            run.wait(pause)


def for_each(action: Callable[[File], None], files: list[File], run: Run, threads: int) -> dict[str, str]:
    """Do something to every file, in threads; gives the reasons of the failures by name.

    Nobody waits for the threads when the run is stopped: they may hang in the network, and a `.part` is always sound.
    """
    todo, failed = iter(files), {}

    def work() -> None:
        while not run.stop.is_set():
            with run.lock:
                file = next(todo, None)
            if file is None:
                return
            try:
                action(file)
            except GiveUpError as error:
                failed[file.name] = str(error)
            except BaseException as error:  # the disk's, or a mistake of ours
                run.broken = error
                return

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(files)))]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) and not run.broken:
            time.sleep(0.02)
    except BaseException as error:  # Ctrl-C, SIGTERM
        run.broken = error
    if run.broken:
        run.stop.set()
        time.sleep(0.1)  # who can end does so
        if isinstance(run.broken, OSError):
            fail(f"{run.broken}; what has come is kept, and the same command goes on")
        raise run.broken
    return dict(sorted(failed.items()))


def find_copy(file: File, data_dir: Path) -> Path | None:
    """Where else below `data_dir` a file lies: `small` has the tar of `tiny`, each range of `all` the same tsv."""
    copies = data_dir.glob(f"*/*.{file.url.rpartition('/')[2]}")
    return next((copy for copy in sorted(copies) if copy != file.path and looks_whole(copy)), None)


def link_copies(files: list[File], copies: dict[str, Path], run: Run, threads: int) -> None:
    """Let a file be another name of its copy, if that is sound and the disk has such a thing."""

    def link(file: File) -> None:
        copy, name = copies[file.name], file.path.with_name(f".{file.name}.link")
        with contextlib.suppress(ValueError, OSError):
            file.check(copy, run.advance)
            name.unlink(missing_ok=True)
            os.link(copy, name)
            os.replace(name, file.path)
            file.part.unlink(missing_ok=True)
            file.version.unlink(missing_ok=True)

    with bar(run, "linking", sum(copy.stat().st_size for copy in copies.values())):
        for_each(link, [file for file in files if file.name in copies], run, threads)


def check_health(files: list[File], run: Run, threads: int) -> int:
    """Read all files that are here and remove the damaged ones; gives the exit status."""

    def check(file: File) -> None:
        try:
            file.check(file.path, run.advance)
        except ValueError as error:
            file.path.unlink()
            raise GiveUpError(str(error)) from error

    present = [file for file in files if file.path.exists()]
    with bar(run, "checking", sum(file.path.stat().st_size for file in present)):
        removed = for_each(check, present, run, threads)
    for name, reason in removed.items():
        print(f"removed {name}: {reason}")
    print(f"{len(present) - len(removed)} files are sound, {len(removed)} removed, {len(files) - len(present)} absent")
    return 1 if removed else 0


def bar(run: Run, what: str, total: int, initial: int = 0) -> tqdm:
    run.bar = tqdm(desc=what, total=total, initial=initial, unit="B", unit_scale=True, smoothing=0.05)
    return run.bar


def plan(missing: list[File], directory: Path, run: Run, threads: int) -> dict[str, str]:
    """Ask the sizes of what is missing, say what is to come, and refuse what can't fit; gives what can't be had."""
    try:
        patiently(ask_size, missing[0], run)  # alone, so that a dead host is known before long
    except GiveUpError as error:
        if isinstance(error.__cause__, TryAgainError):
            fail(f"{missing[0].url}: {error}; if the corpus has moved, give its address by --base_url")
    asked = [file for file in missing if file.size is None]
    failed = for_each(lambda file: patiently(ask_size, file, run), asked, run, threads)
    wanted = [file for file in missing if file.name not in failed]
    size, here = sum(file.size or 0 for file in wanted), sum(file.here() for file in wanted)
    disk = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    print(f"to fetch: {len(wanted)} files, {size / 1e9:,.3f} GB, of which {here / 1e9:,.3f} GB are here")
    print(f"of unknown size: {sum(file.size is None for file in wanted)} files; free on the disk: {free / 1e9:,.3f} GB")
    if size - here + SPARE > free:
        fail(f"{disk} is too small; make room, give another --data_dir, or fewer tars by --start and --end")
    return failed


def fetch_all(files: list[File], data_dir: Path, run: Run, threads: int, dry_run: bool) -> int:
    """Link what another target has and fetch the rest; gives the exit status."""
    directory = files[0].path.parent
    missing = [file for file in files if not looks_whole(file.path)]
    copies = {file.name: copy for file in missing if (copy := find_copy(file, data_dir))}
    if copies and not dry_run:
        link_copies(missing, copies, run, threads)
        copies = {}
    missing = [file for file in missing if file.name not in copies and not looks_whole(file.path)]
    print(f"{directory}: {len(files) - len(missing)} of {len(files)} files are here, or in another target's directory")
    if not missing:
        return 0
    failed = plan(missing, directory, run, threads)
    wanted = [file for file in missing if file.name not in failed]
    total, here = sum(file.size or 0 for file in wanted), sum(file.here() for file in wanted)
    if dry_run:
        rates = []
        failed |= for_each(lambda file: rates.append(patiently(measure_rate, file, run)), wanted[-1:], run, 1)
        for rate in rates:
            seconds = round((total - here) / min(rate, run.rate_limit or rate))
            print(f"time: about {datetime.timedelta(seconds=seconds)} by one connection, at {rate / 1e6:,.1f} MB/s")
    else:
        with logging_redirect_tqdm(), bar(run, directory.name, total, here):
            failed |= for_each(lambda file: patiently(fetch, file, run), wanted, run, threads)
        print(f"{directory}: {len(files) - len(failed)} of {len(files)} files are here")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    flag = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    group = parser.add_argument_group("what")
    group.add_argument("-t", "--target", choices=list(TARS), default="tiny", help="subset")
    group.add_argument("-s", "--start", "--start_que", type=int, help="first tar of a range; none if unset")
    group.add_argument("-e", "--end", "--end_que", type=int, help="tar behind the last of a range; none if unset")
    group.add_argument("--dry_run", help="say what is to be fetched and how long it takes, stop", **flag)
    group.add_argument("--health_check", help="read what is here, remove what is damaged, stop", **flag)
    group = parser.add_argument_group("where")
    group.add_argument("--base_url", help=f"the corpus; REAZONSPEECH_BASE_URL or {BASE_URL} if unset")
    group.add_argument("--data_dir", help=f"downloads; REAZONSPEECH_DATA_DIR or {DATA_DIR} if unset")
    group = parser.add_argument_group("how")
    group.add_argument("-p", "--pool", type=int, default=10, help="files at a time")
    group.add_argument("--retries", type=int, default=8, help="failures in a row before a file is given up")
    group.add_argument("--backoff", type=float, default=2.0, help="seconds before another try, doubled each time to 60")
    group.add_argument("--timeout", type=float, default=60.0, help="seconds of silence before a connection is given up")
    group.add_argument("--rate_limit", type=float, default=0.0, help="MB a second for all files together; 0 = none")
    args = parser.parse_args(argv)
    args.base_url = (args.base_url or os.environ.get("REAZONSPEECH_BASE_URL") or BASE_URL).rstrip("/")
    args.data_dir = Path(args.data_dir or os.environ.get("REAZONSPEECH_DATA_DIR") or DATA_DIR).expanduser().absolute()
    if not re.match("https?://.", args.base_url):
        parser.error(f"--base_url: {args.base_url!r} does not begin with https://")
    if args.pool < 1:
        parser.error(f"--pool: {args.pool} files at a time are too few")
    tars = TARS[args.target]
    start, end = args.start or 0, len(tars) if args.end is None else args.end
    if not 0 <= start < end <= len(tars):
        parser.error(f"--start {start} --end {end}: {args.target} has tars 0 to {len(tars)}, the end excluded")
    args.tars = tars[start:end]
    args.directory = args.target if args.start is args.end is None else f"{args.target}_{start}_{end}"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = Run(args.retries, args.timeout, args.backoff, args.rate_limit * 1e6)
    directory = args.data_dir / args.directory
    names = [f"tsv/{'all' if args.target == 'test' else args.target}.tsv", *(f"data/{i:03x}.tar" for i in args.tars)]
    files = [File(f"{args.base_url}/{name}", directory / f"{args.target}.{Path(name).name}") for name in names]
    if args.health_check:
        return check_health(files, run, args.pool)
    if args.dry_run:
        return fetch_all(files, args.data_dir, run, args.pool, dry_run=True)
    print(TERMS)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"no place for the downloads: {error}; give another --data_dir")
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another run fetches into %s; waiting for its end", directory)
        lock.acquire()
    try:
        return fetch_all(files, args.data_dir, run, args.pool, dry_run=False)
    finally:
        lock.release()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
