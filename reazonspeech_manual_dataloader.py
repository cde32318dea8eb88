#!/usr/bin/env python
"""Load the ReazonSpeech files that reazonspeech_manual_downloader.py stored, as a Hugging Face dataset.

In:   <data_dir>/<target>/<target>.<target>.tsv and <target>.000.tar, ...; a download in ranges has the same files in
      <data_dir>/<target>_<start>_<end>/. `data_dir` is REAZONSPEECH_DATA_DIR or ~/.cache/reazon_manual_download.
Out:  rows of `name` (000/0123456789abc.flac), `audio` ({bytes, path}, with the FLAC bytes from the tar) and
      `transcription`, in the order of the tars and of their members, for any number of processes. As a script it
      prints statistics of the files, and with --output_dir it writes a dataset repository with one shard per tar.

The next stage loads this file by its path: `run_pseudo_labelling.py --dataset_name reazonspeech_manual_dataloader.py`.
As a script, in one process and in many:

    python reazonspeech_manual_dataloader.py -t tiny
    python reazonspeech_manual_dataloader.py -t all --dataset_dir_suffix 0_50 --preprocessing_num_workers 16 \\
        --output_dir reazonspeech --hub_model_id my-org/reazonspeech

To resume, run the same command again: only missing shards are written. Tars are streamed, never extracted. Members
without a transcript, transcripts without a member, malformed lines, duplicates and empty clips are left out, counted
and named. A broken tar fails the run; the script writes all others first.
"""

import argparse
import collections
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import secrets
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import yaml
from datasets.data_files import sanitize_patterns
from huggingface_hub import HfApi, RepoCard, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from huggingface_hub.utils._http import default_client_factory
from tqdm import tqdm

# The tars of each subset (https://huggingface.co/datasets/reazon-research/reazonspeech); the last tar is the test set.
# reazonspeech_manual_downloader.py has the same table.
TARS = {
    "tiny": range(1),
    "small": range(12),
    "medium": range(116),
    "large": range(579),
    "all": range(4095),
    "test": range(4095, 4096),
}
VERSION = datasets.Version("2.0.0")  # of the corpus
DATA_DIR = "~/.cache/reazon_manual_download"
END_OF_TAR = tarfile.NUL * tarfile.BLOCKSIZE
ROWS_AT_ONCE = 100  # rows held in memory, of about 105 kB each
DURATIONS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30)  # seconds; lower ends of the histogram's bins
# The columns of the rows that `read_tar` yields. `audio` is a plain struct because `datasets` cannot encode Audio
# without torchcodec; readers cast it to Audio.
FEATURES = datasets.Features(
    name=datasets.Value("string"),
    audio={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    transcription=datasets.Value("string"),
)
SCHEMA = datasets.Features({**FEATURES, "audio": datasets.Audio(sampling_rate=16_000)}).arrow_schema  # of the shards
Problems = dict[str, list[str]]  # where each kind of problem was found
UNDECODABLE = "clips that are no audio"  # the one kind of problem whose clips are kept
REMEDY = "run reazonspeech_manual_downloader.py --health_check, then without it"
CARD = """---
language: [ja]
license: other
task_categories: [automatic-speech-recognition]
---
# ReazonSpeech

Japanese broadcast speech of [ReazonSpeech v2](https://huggingface.co/datasets/reazon-research/reazonspeech), as FLAC
in parquet. Its terms bind: use only for information analysis under Article 30-4 of the Japanese Copyright Act.
"""


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    group = parser.add_argument_group("input")
    group.add_argument("-t", "--target", choices=list(TARS), default="tiny", help="subset of the corpus")
    group.add_argument(
        "--dataset_dir_suffix", metavar="START_END", help="range of a download in ranges; unset = all ranges"
    )
    group.add_argument("--data_dir", help=f"download directory; unset = REAZONSPEECH_DATA_DIR or {DATA_DIR}")
    group.add_argument("--preprocessing_num_workers", type=int, default=1, help="number of processes")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir", type=Path, help="directory of the dataset repository to write; unset = only print statistics"
    )
    group.add_argument("--overwrite_output_dir", default=False, help="first delete the subset's shards there", **flag)
    group.add_argument("--hub_model_id", metavar="ORG/NAME", help="dataset repository on the Hub; unset = no push")
    group.add_argument("--push_to_hub", help="push the dataset; unset = True with --hub_model_id, else False", **flag)
    group.add_argument("--hub_private_repo", default=True, help="make a new repository private", **flag)
    group.add_argument(
        "--dry_run", default=False, help="only print what would be done and how long it would take", **flag
    )
    args = parser.parse_args(argv)
    if args.push_to_hub is None:
        args.push_to_hub = args.hub_model_id is not None
    if args.push_to_hub and not (args.hub_model_id and args.output_dir):
        parser.error("--push_to_hub needs --hub_model_id and --output_dir")
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


# ---- common: records -------------------------------------------------------------------------------------------------


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file; what JSON does not know, such as a path, is written as its text."""
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def record_checksum(record: dict) -> str:
    """SHA-256 of a record's content as JSON."""
    return hashlib.sha256(json.dumps(record, default=str).encode()).hexdigest()


def write_record(path: Path, record: dict) -> None:
    """Write a record as JSON, with a checksum by which `read_record` notices damage."""
    write_json(path, record | {"checksum": record_checksum(record)})


def read_record(path: Path) -> dict | None:
    """What `write_record` wrote; None where there is nothing or, with a warning, where it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = record.pop("checksum", None)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # it may be whole
        fail(f"cannot read {path}: {error.strerror}. {CONTINUE}")
    except (ValueError, AttributeError, TypeError):  # it is not JSON, or not an object
        record = None
    if not record or (checksum is not None and checksum != record_checksum(record)):
        logger.warning("%s is damaged: it does not count", path)
        return None
    return record


def shown_name(reference: str | Path) -> str:
    """What others may see of a reference: the last name of a local path, and no user or password of a URL."""
    text = without_password(str(reference))
    path = os.path.abspath(os.path.expanduser(text))
    is_local = text.startswith(("/", "~", ".")) or os.path.exists(path)
    return os.path.basename(path) if text and is_local else text


def shown_arguments(args: argparse.Namespace) -> dict:
    """The arguments for a record, which others may read: paths and URLs as `shown_name` shows them."""
    shown = {}
    for name, value in vars(args).items():
        shown[name] = value
        if isinstance(value, str | Path):  # datasets may be joined by +
            shown[name] = "+".join(map(shown_name, str(value).split("+")))
    return shown


def library_versions(*names: str) -> dict[str, str]:
    """Version of each of these installed packages, for a record."""
    return {name: importlib.metadata.version(name) for name in names}


def changed_setting(earlier: dict, settings: dict) -> str | None:
    """The first setting in which an earlier run differs from this one, for people to read; None where none does."""
    settings = json.loads(json.dumps(settings, default=str))  # as a record gives them back, tuples as lists
    for name, value in settings.items():
        if earlier.get(name) != value:
            return f"{name} was {earlier.get(name)!r} and is now {value!r}"
    return None


def refuse_other_settings(place: Path, earlier: dict, settings: dict) -> None:
    """Fail where `place` holds the results of a run with other settings, which must not be mixed with this run's."""
    if changed := changed_setting(earlier, settings):
        fail(
            f"{place} was made with other settings: {changed}. Choose another directory, "
            "or pass --overwrite_output_dir to start afresh"
        )


# ---- common: the Hub -------------------------------------------------------------------------------------------------

# RuntimeError: an upload through Xet; JSONDecodeError: a proxy or a login page answers in place of the Hub.
HUB_ERRORS = (OSError, HFValidationError, httpx.HTTPError, RuntimeError, json.JSONDecodeError)
LONGEST_HUB_WAIT = 600  # s


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, without its full stop. The Hub's errors begin with an id."""
    if isinstance(error, json.JSONDecodeError):
        return f"JSON was expected, not {error.doc[:40]!r}"
    for line in str(error).splitlines():
        if line.strip() and not line.startswith("(Request ID"):
            return line.strip().rstrip(".")
    return type(error).__name__


def refuse_long_wait(response: httpx.Response) -> None:
    """Raise where the Hub asks to wait for longer than anybody would; its client would wait for a day."""
    waits = re.findall(r"^\d+$", response.headers.get("Retry-After", ""))
    waits += re.findall(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    seconds = max(map(int, waits), default=0)
    if response.status_code >= 400 and seconds > LONGEST_HUB_WAIT:
        raise OSError(f"the Hub asks to wait for {seconds / 3600:.1f} h (HTTP {response.status_code})")


def make_hub_client() -> httpx.Client:
    """The Hub's own HTTP client, with a bound on waiting."""
    client = default_client_factory()
    client.event_hooks = client.event_hooks | {"response": [refuse_long_wait]}
    return client


def hub_fail(action: str, error: BaseException) -> NoReturn:
    """Fail because the Hub refused something."""
    fail(
        f"{action} failed: {first_line(error)}. Check the name, and the token with `hf auth whoami`; "
        "`hf auth login` sets another token"
    )


def push_with_retries(push: Callable[[], object]) -> None:
    """Push, and retry if another push to the repository came first, which the Hub answers with 409 or 412."""
    for seconds in (1, 2, 4, 0):  # to wait after a try that failed; 0 = it was the last
        try:
            push()
            return
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412) or not seconds:
                raise
        time.sleep(seconds * random.uniform(0.5, 1))


# ---- common: repositories to push to ---------------------------------------------------------------------------------


def prepare_repository(repository: str, repo_type: str, private: bool, dry_run: bool) -> tuple[str, str]:
    """Create a repository if it is missing, and check the right to write to it.

    A dry run creates nothing: it checks the repository, or else whether this token could create it. Audio goes into a
    public repository only with --hub_private_repo False.

    Returns:
        its full id, and whether it is "private" or "public".
    """
    api = HfApi()
    visibilities = {True: "private", False: "public"}
    try:
        if dry_run:
            account = api.whoami()
            repo_id = repository if "/" in repository else f"{account['name']}/{repository}"
            organisations = [organisation["name"] for organisation in account.get("orgs", [])]
            if not api.repo_exists(repo_id, repo_type=repo_type):
                if repo_id.split("/")[0] not in (account["name"], *organisations):
                    fail(f"{account['name']} cannot create {repo_id}: it belongs to somebody else")
                return repo_id, visibilities[private]
        else:
            repo_id = api.create_repo(repository, repo_type=repo_type, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, repo_type=repo_type, write=True)
        is_private = api.repo_info(repo_id, repo_type=repo_type).private
    except HUB_ERRORS as error:
        hub_fail(f"preparing the {repo_type} repository {repository}", error)
    except KeyError as error:  # `create_repo` takes every 409 to say where the repository is
        fail(f"preparing the {repo_type} repository {repository}: the Hub's answer lacks {error}. {CONTINUE}")
    if repo_type == "dataset" and private and not is_private:
        fail(
            f"the dataset repository {repo_id} is public, so everybody would hear its audio: make it private, choose "
            "another, or pass --hub_private_repo False"
        )
    return repo_id, visibilities[is_private]


# ---- common: cards ---------------------------------------------------------------------------------------------------


def read_card(path: Path, place: str | None = None) -> RepoCard | None:
    """The card in a file, None where there is none. Fails in one line, which names `place`, if it cannot be read."""
    if not path.exists():
        return None
    try:
        return RepoCard(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        fail(f"the card of {place or path.parent} cannot be read: {first_line(error)}. Correct it. {CONTINUE}")


def download_card(repository: str, repo_type: str, revision: str | None = None) -> RepoCard | None:
    """The card of a repository on the Hub, None where there is none."""
    try:
        path = HfApi().hf_hub_download(repository, "README.md", repo_type=repo_type, revision=revision)
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):  # not where the Hub did not answer
        return None
    return read_card(Path(path), repository)


def check_cards(
    directory: Path, repository: str | None, repo_type: str, update: Callable[[RepoCard], object] | None = None
) -> None:
    """Try, before the work, what will be done with the cards that are there."""
    try:
        cards = [read_card(directory / "README.md")]
        if repository:
            cards.append(download_card(repository, repo_type))
    except HUB_ERRORS as error:
        hub_fail(f"reading the cards of {directory} and {repository}", error)
    for card in filter(None, cards):
        if update:
            update(card)


def push_card(repository: str, repo_type: str, update: Callable[[RepoCard | None], str], message: str) -> None:
    """Update the card of a repository on the Hub; `update` gives the text for the card there, None if there is none."""
    api = HfApi()

    def push() -> None:
        head = api.repo_info(repository, repo_type=repo_type).sha
        text = update(download_card(repository, repo_type, head))
        api.upload_file(
            repo_id=repository,
            repo_type=repo_type,
            path_or_fileobj=text.encode(),
            path_in_repo="README.md",
            parent_commit=head,
            commit_message=message,
        )

    push_with_retries(push)


# ---- common: shards --------------------------------------------------------------------------------------------------

FOOTER_MARK = b"kotoba-1"  # lies before the footer of a shard, followed by the SHA-256 of the footer


def is_damage(error: Exception) -> bool:
    """Whether an error in reading a parquet file comes from its content, and not from the operating system."""
    return getattr(error, "errno", None) is None


def read_footer(path: Path) -> pq.FileMetaData | None:
    """The footer of a parquet file; None where it is damaged. Fails where it cannot be read just now."""
    try:
        metadata = pq.read_metadata(path)
        size = metadata.serialized_size + 8  # its length and the end mark follow the footer
        mark_size = len(FOOTER_MARK) + hashlib.sha256().digest_size
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - size - mark_size))
            end = file.read()
        mark = end[:-size]
        expected = FOOTER_MARK + hashlib.sha256(end[-size:]).digest()
        # The files of other programs have no mark.
        is_changed = mark.startswith(FOOTER_MARK) and mark != expected
        return None if is_changed else metadata
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (pa.ArrowException, OSError) as error:
        if is_damage(error):
            return None
        fail(f"cannot read {path}: {first_line(error)}. {CONTINUE}")


def is_whole(path: Path) -> bool:
    """Whether all of a parquet file can be read and has the checksums that its pages were written with."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                file.read_row_group(number)
        return True
    except (pa.ArrowException, OSError) as error:
        if is_damage(error):
            return False
        fail(f"cannot read {path}: {first_line(error)}. {CONTINUE}")


def find_damaged(paths: Sequence[Path], threads: int) -> list[Path]:
    """The parquet files that are not whole, each told in one line. All are read to the end."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        checked = zip(paths, pool.map(is_whole, paths), strict=True)
        damaged = [path for path, whole in checked if not whole]
    for path in damaged:
        logger.warning("%s is damaged", path)
    return damaged


# ---- common: dataset repositories ------------------------------------------------------------------------------------


def write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema, notes: dict) -> None:
    """Write a shard that appears under its name only when it is complete and on the disk.

    `read_notes` gives the notes back. They are written last, so they may be filled while the tables are made. Pages
    have checksums, and the footer has its SHA-256 before it, where readers of parquet do not look.
    """
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with atomic_file(path) as file:
        with pq.ParquetWriter(file, schema, **options) as writer:
            for table in tables:
                if table.num_rows:  # `datasets` cannot read a row group without rows
                    writer.write_table(table, row_group_size=100)
            writer.add_key_value_metadata({"kotoba": json.dumps(notes, ensure_ascii=False)})
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        start = file.seek(-8 - length, os.SEEK_END)
        footer = file.read()
        file.seek(start)
        file.write(FOOTER_MARK + hashlib.sha256(footer).digest() + footer)


def read_notes(path: Path) -> dict | None:
    """What `write_parquet` noted in a shard; None where the shard is missing or damaged."""
    try:
        footer = read_footer(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if footer is None:
        return None
    return json.loads((footer.metadata or {}).get(b"kotoba", "{}"))


def list_split(card: RepoCard, config: str, split: str) -> None:
    """Name the files of a split in a dataset card, which keeps what it says of other splits and configurations."""
    try:
        configs = {entry.get("config_name", "default"): entry for entry in card.data.get("configs") or []}
        entry = configs.setdefault(config, {"config_name": config})
        directory = entry.pop("data_dir", None)
        default = {"train": f"{directory}/**"} if directory else {}
        files = sanitize_patterns(entry.get("data_files") or default)
    except (ValueError, TypeError, AttributeError) as error:
        fail(f"`configs` of the dataset's card cannot be read: {first_line(error)}. Correct it. {CONTINUE}")
    files.pop(split, None)
    files[split] = [f"{config}/{split}-*"]
    entry["data_files"] = []
    for name, patterns in files.items():
        path = patterns[0] if len(patterns) == 1 else patterns
        entry["data_files"].append({"split": name, "path": path})
    card.data["configs"] = list(configs.values())
    infos = card.data.get("dataset_info") or []
    infos = infos if isinstance(infos, list) else [infos]
    # `datasets` would insist on the row counts of this configuration, which are those of earlier contents.
    others = [info for info in infos if info.get("config_name", "default") != config]
    card.data["dataset_info"] = others or None


def write_card(directory: Path, update: Callable[[RepoCard | None], str]) -> None:
    """Update the card of a local dataset, one run at a time: another may write another split of it."""
    with hold_lock(directory / ".card.lock", f"the card of {directory}", ".README.md.*.partial", wait=True):
        write_atomically(directory / "README.md", update(read_card(directory / "README.md")))


def push_dataset(
    repository: str, directory: Path, patterns: list[str], update: Callable[[RepoCard | None], str], message: str
) -> None:
    """Upload the files of a directory that match, and then the card.

    Args:
        repository: Hub id of a dataset.
        patterns: which files are this run's; those that are only on the Hub are deleted there.
        update: gives the new text of the card for the one on the Hub, None where there is none.
        message: of the commits.
    """
    api = HfApi()

    def push_files() -> None:
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=directory,
            allow_patterns=patterns,
            delete_patterns=patterns,
            ignore_patterns=[".*", "*.partial"],
            commit_message=message,
        )

    try:
        push_with_retries(push_files)
        push_card(repository, "dataset", update, message)
    except HUB_ERRORS as error:
        fail(f"the push to {repository} failed: {first_line(error)}. All data is in {directory}. {CONTINUE}")
    logger.info("pushed to %s/datasets/%s", without_password(api.endpoint), repository)


# ---- downloaded files ------------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """The downloaded files of a subset.

    All of this script is ReazonSpeech's. Other corpora need none of it: the next stage reads audio folders and tables.
    """

    tsv: Path
    tars: dict[int, Path]  # by index, in ascending order

    def fingerprint(self) -> str:
        """Return a hash that changes when a file is added, replaced or rewritten."""
        files = []
        for path in (self.tsv, *self.tars.values()):
            status = path.stat()
            files.append((path.name, status.st_size, status.st_mtime_ns))
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def find_corpus(target: str, data_dir: str | None = None, dataset_dir_suffix: str | None = None) -> Corpus:
    """Find the downloaded files of `target`: of one range if a suffix such as `0_50` is given, else of all ranges."""
    root = Path(data_dir or os.environ.get("REAZONSPEECH_DATA_DIR") or DATA_DIR).expanduser().absolute()
    if dataset_dir_suffix:
        directories = [root / f"{target}_{dataset_dir_suffix}"]
    else:
        ranges = [path for path in root.glob(f"{target}_*") if re.fullmatch(r"\w+_\d+_\d+", path.name)]
        directories = [root / target, *sorted(ranges)]
    indices = {f"{target}.{index:03x}.tar": index for index in TARS[target]}
    tars = {}
    for directory in directories:
        for path in directory.glob(f"{target}.*.tar"):
            if path.name in indices:
                tars.setdefault(indices[path.name], path)
    tsv = f"{target}.{'all' if target == 'test' else target}.tsv"
    tsvs = [directory / tsv for directory in directories if (directory / tsv).is_file()]
    if not tars or not tsvs:
        missing = tsv if tars else f"{target}.*.tar"
        command = f"python reazonspeech_manual_downloader.py -t {target}"
        fail(f"no {missing} in {directories[0]}; download it with: {command}")
    return Corpus(tsvs[0], dict(sorted(tars.items())))


def join_first(names: list[str], count: int) -> str:
    """Join the first `count` names of a list."""
    ellipsis = ["..."] if len(names) > count else []
    return ", ".join(names[:count] + ellipsis)


def check_tars(target: str, corpus: Corpus) -> None:
    """Warn of missing tars, and refuse truncated ones before any work is done."""
    indices = TARS[target]
    absent = [f"{index:03x}" for index in indices if index not in corpus.tars]
    if absent:
        present = len(corpus.tars)
        logger.warning("%s: %d of %d tars found; missing: %s", target, present, len(indices), join_first(absent, 8))
    truncated = []
    for path in corpus.tars.values():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
            if file.read() != END_OF_TAR:
                truncated.append(f"{path} ({file.tell():,} bytes)")
    if truncated:
        fail(f"truncated: {', '.join(truncated)}; {REMEDY}")


# ---- transcripts and clips -------------------------------------------------------------------------------------------


class BrokenTarError(Exception):
    """A tar that cannot be read to its end."""


class TarJob(NamedTuple):
    """A tar to process."""

    tar: Path
    tsv: Path
    line_ranges: array  # where the tsv has the tar's transcripts, as returned by `locate_transcripts`
    shard: Path | None = None  # parquet file to write; None = only statistics
    settings: dict | None = None  # noted in the shard, for later runs to compare


def describe_problems(problems: Problems) -> str:
    """Return one line with the number of problems of each kind and the places of the first three."""
    kinds = [f"{len(places)} {kind} ({join_first(places, 3)})" for kind, places in problems.items() if places]
    return "; ".join(kinds) or "nothing"


def locate_transcripts(tsv: Path, indices: Iterable[int], problems: Problems) -> dict[int, array]:
    """Find the lines of each tar, so that a worker reads only those of its tars: all.tsv has 2.1 GB.

    Lines that do not begin with the name of a tar are noted as problems.

    Returns:
        The ranges of adjacent lines of each tar, by index. A range is three numbers: the number of its first line, the
        byte where it begins and the byte where it ends. A tar's ranges are stored one after another in a flat array,
        which needs a seventh of the memory of tuples: an unsorted tsv has about one range per line.
    """
    line_ranges = {index: array("q") for index in indices}
    ranges_by_prefix = {b"%03x/" % index: ranges for index, ranges in line_ranges.items()}
    start = 0
    with open(tsv, "rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, 1):
            end = start + len(line)
            prefix = line.removeprefix(b"./")[:4]  # such as 000/
            ranges = ranges_by_prefix.get(prefix)
            if ranges is None:
                if line.strip() and not re.fullmatch(rb"[0-9a-f]{3}/", prefix):
                    problems["malformed lines"].append(f"{tsv.name} line {number}")
            elif ranges and ranges[-1] == start:  # the line before is of this tar too
                ranges[-1] = end
            else:
                ranges.extend((number, start, end))
            start = end
    return line_ranges


def list_jobs(corpus: Corpus, problems: Problems) -> list[TarJob]:
    """List a job for every tar of a corpus."""
    line_ranges = locate_transcripts(corpus.tsv, corpus.tars, problems)
    return [TarJob(tar, corpus.tsv, line_ranges[index]) for index, tar in corpus.tars.items()]


def read_transcripts(tsv: Path, line_ranges: array, problems: Problems) -> dict[str, str]:
    """Read the transcripts of one tar by name. If a name has several lines, the first one counts."""
    texts = {}
    with open(tsv, "rb") as file:
        for i in range(0, len(line_ranges), 3):  # three numbers per range
            first, start, end = line_ranges[i : i + 3]
            file.seek(start)
            lines = io.BytesIO(file.read(end - start))
            for number, line in enumerate(lines, first):
                place = f"{tsv.name} line {number}"
                try:
                    name, text = line.decode().rstrip("\r\n").removeprefix("./").split("\t")
                except ValueError:  # not UTF-8, no tab or several tabs
                    problems["malformed lines"].append(place)
                    continue
                if name in texts:
                    problems["duplicate lines"].append(f"{place}: {name}")
                texts.setdefault(name, text)
    return texts


def read_tar(job: TarJob, problems: Problems) -> Iterator[dict]:
    """Yield the rows of a tar in its order, one at a time. Raises BrokenTarError if it cannot be read to its end."""
    path = job.tar
    texts = read_transcripts(job.tsv, job.line_ranges, problems)
    seen = set()
    offset = 0  # of the member that is read, for messages
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            size = path.stat().st_size
            while member := tar.next():
                tar.members.clear()  # `tarfile` would keep all of them in memory
                offset = member.offset
                name = member.name.removeprefix("./")
                if not 0 <= member.size <= size - member.offset_data:
                    raise tarfile.ReadError(f"{name} claims {member.size:,} bytes, more than the file has left")
                if member.isdir():
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    problems["links, devices or sparse members"].append(f"{path.name}: {name}")
                elif name in seen:
                    problems["duplicate members"].append(f"{path.name} byte {offset}: {name}")
                elif name not in texts:
                    problems["members without a transcript"].append(name)
                elif member.size == 0:
                    seen.add(name)
                    problems["empty clips"].append(f"{path.name}: {name}")
                else:
                    seen.add(name)
                    file.seek(member.offset_data)
                    # Any content is accepted here; the next stage decodes it and counts what is no audio.
                    audio = {"bytes": file.read(member.size), "path": name}
                    # The keys are the columns of FEATURES.
                    yield {"name": name, "audio": audio, "transcription": texts[name]}
            offset = tar.offset
            file.seek(offset)
            if file.read(tarfile.BLOCKSIZE) != END_OF_TAR:  # `tarfile` takes a damaged header for the end
                raise tarfile.ReadError("neither a header nor the end of the archive")
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise BrokenTarError(f"{path}: byte {offset:,}: {error}; {REMEDY}") from error
    problems["transcripts without a member"] += [name for name in texts if name not in seen]


# ---- builder ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tied_workers() -> Iterator[None]:
    """Processes forked inside die on SIGTERM and with their parent.

    Otherwise workers orphaned by a killed run would keep the cache's lock and block the next run, and workers that
    inherit this script's SIGTERM handler could miss the signal by which a pool ends them.
    """
    parent = os.getpid()
    inside = threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    def tie() -> None:
        if inside.is_set():
            threading.Thread(target=watch, daemon=True).start()

    os.register_at_fork(after_in_child=tie)  # it cannot be taken back, so `tie` asks whether `inside` is set
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    inside.set()
    try:
        yield
    finally:
        inside.clear()
        signal.signal(signal.SIGTERM, handler)


@dataclass
class ReazonSpeechConfig(datasets.BuilderConfig):
    """A subset of the corpus; `data_dir` and `dataset_dir_suffix` say where its files are."""

    dataset_dir_suffix: str | None = None

    def corpus(self) -> Corpus:
        return find_corpus(self.name, self.data_dir, self.dataset_dir_suffix)

    def create_config_id(self, config_kwargs, custom_features=None) -> str:
        """Return the name of the cache directory, which depends on the files. `datasets` calls this."""
        config_id = super().create_config_id(config_kwargs, custom_features)
        return f"{config_id}-{self.corpus().fingerprint()}"


class ReazonSpeech(datasets.GeneratorBasedBuilder):
    """ReazonSpeech v2 from downloaded tars: the configuration `test` has the split `test`, the others have `train`."""

    BUILDER_CONFIG_CLASS = ReazonSpeechConfig
    BUILDER_CONFIGS = [ReazonSpeechConfig(name, VERSION) for name in TARS]  # noqa: RUF012
    DEFAULT_WRITER_BATCH_SIZE = ROWS_AT_ONCE

    def download_and_prepare(self, *args, **kwargs):
        with tied_workers():
            super().download_and_prepare(*args, **kwargs)

    def _info(self):
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager):
        corpus = self.config.corpus()
        check_tars(self.config.name, corpus)
        problems = collections.defaultdict(list)
        jobs = list_jobs(corpus, problems)  # `datasets` divides the list among its workers
        if problems:
            logger.warning("%s: left out %s", self.config.name, describe_problems(problems))
        split = split_name(self.config.name)
        return [datasets.SplitGenerator(split, {"jobs": jobs})]

    def _generate_examples(self, jobs: list[TarJob]):
        problems = collections.defaultdict(list)
        for job in jobs:
            for row in read_tar(job, problems):
                yield row["name"], row
        if any(problems.values()):
            first = jobs[0].tar.name
            last = jobs[-1].tar.name
            logger.warning("%s to %s: left out %s", first, last, describe_problems(problems))


# ---- shards and statistics -------------------------------------------------------------------------------------------


def count_clip(row: dict, counts: collections.Counter, problems: Problems) -> None:
    """Add a clip to the statistics."""
    content = row["audio"]["bytes"]
    seconds = 0.0
    try:
        seconds = soundfile.info(io.BytesIO(content)).duration
    except soundfile.LibsndfileError:
        problems[UNDECODABLE].append(row["name"])
    counts["clips"] += 1
    counts["bytes"] += len(content)
    counts["seconds"] += seconds
    counts["characters"] += len(row["transcription"])
    lower = max(bound for bound in DURATIONS if bound <= seconds)
    counts[f"from {lower} s"] += 1


def make_tables(job: TarJob, counts: collections.Counter, problems: Problems) -> Iterator[pa.Table]:
    """Yield the rows of a tar in small tables, and count the clips."""
    rows = read_tar(job, problems)
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        for row in batch:
            count_clip(row, counts, problems)
        yield pa.Table.from_pylist(batch, SCHEMA)


def process_tar(job: TarJob) -> dict:
    """Count the clips of a tar, and write its shard if the job names one; return the counts and problems.

    Raises BrokenTarError, and then leaves no shard, if the tar cannot be read to its end.
    """
    counts = collections.Counter()
    problems = collections.defaultdict(list)
    notes = {"settings": job.settings, "counts": counts, "problems": problems}
    tables = make_tables(job, counts, problems)
    if job.shard:
        write_parquet(job.shard, tables, SCHEMA, notes)
    else:
        for _ in tables:  # which counts the clips
            pass
    return notes


def process_tars(jobs: list[TarJob], num_workers: int) -> list[dict]:
    """Process tars in at most `num_workers` processes and return their notes. Fails after all tars if any is broken."""
    processes = max(1, min(num_workers, len(jobs)))
    ignore_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    fork = multiprocessing.get_context("fork")  # for `tied_workers`
    all_notes = []
    errors = []
    with ProcessPoolExecutor(processes, fork, initializer=ignore_ctrl_c) as pool:
        try:
            # Not by `pool.map`: at an interruption it cancels its futures, and then the pool prints a traceback.
            with tied_workers():
                futures = [pool.submit(process_tar, job) for job in jobs]  # the first one starts all workers
            for future in ProgressBar(futures, "loading", unit="tar"):
                try:
                    all_notes.append(future.result())
                except BrokenTarError as error:
                    errors.append(str(error))
        except BrokenProcessPool:
            fail(
                "a worker process was killed, most likely because memory ran out; "
                f"choose a smaller --preprocessing_num_workers. {CONTINUE}"
            )
        except BaseException:  # such as Ctrl-C and SIGTERM, after which nobody waits until the tars are finished
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    if errors:
        fail("; ".join(errors))
    return all_notes


def sum_notes(all_notes: list[dict]) -> dict:
    """Add up the notes of all tars."""
    counts = collections.Counter()
    problems = collections.defaultdict(list)
    for notes in all_notes:
        counts.update(notes["counts"])
        for kind, places in notes["problems"].items():
            problems[kind] += places
    return {"counts": counts, "problems": problems}


def print_statistics(counts: collections.Counter, problems: Problems) -> None:
    """Print totals, problems and a histogram of the durations."""
    undecodable = {UNDECODABLE: problems.get(UNDECODABLE, [])}
    left_out = {kind: places for kind, places in problems.items() if kind not in undecodable}
    print(f"{counts['clips']:,} clips, {counts['bytes'] / 1e9:,.3f} GB, {counts['seconds'] / 3600:,.2f} hours,")
    print(f"{counts['characters']:,} characters; left out: {describe_problems(left_out)}")
    print(f"not decodable, but kept: {describe_problems(undecodable)}")
    for lower, upper in itertools.pairwise((*DURATIONS, "...")):
        count = counts[f"from {lower} s"]
        share = count / max(1, counts["clips"])
        print(f"{lower:>3} to {upper:>3} s {count:>10,} {'#' * round(60 * share)}")


# ---- files, record, card, push ---------------------------------------------------------------------------------------


def split_name(target: str) -> str:
    """Return the name of the dataset's split that holds a target."""
    return "test" if target == "test" else "train"


def name_shards(jobs: list[TarJob], directory: Path, split: str, settings: dict) -> list[TarJob]:
    """Return the jobs with the names of the shards that they write, and the settings of the run."""
    named = []
    for number, job in enumerate(jobs):
        shard = directory / f"{split}-{number:05d}-of-{len(jobs):05d}.parquet"
        named.append(job._replace(shard=shard, settings=settings))
    return named


def find_missing(jobs: list[TarJob]) -> list[TarJob]:
    """Return the jobs whose shards are not complete. Fails if a shard was written by a run with other settings."""
    missing = []
    for job in jobs:
        notes = read_notes(job.shard)
        if notes is None:
            missing.append(job)
        else:
            refuse_other_settings(job.shard, notes.get("settings") or {}, job.settings)
    return missing


def find_damaged_jobs(jobs: list[TarJob], threads: int) -> list[TarJob]:
    """Return the jobs whose shards are damaged. Reads all shards to the end."""
    damaged = find_damaged([job.shard for job in jobs], threads)
    return [job for job in jobs if job.shard in damaged]


def total_size(jobs: list[TarJob]) -> int:
    """Return the bytes of the tars."""
    return sum(job.tar.stat().st_size for job in jobs)


def print_loading_plan(args: argparse.Namespace, jobs: list[TarJob], pushes: str) -> None:
    """Print what a run would read, write and push, and how long it would take, scaled up from the first tar."""
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            sample = jobs[0]._replace(shard=Path(scratch) / "sample.parquet")
            (notes,) = process_tars([sample], num_workers=1)
    except OSError as error:
        fail(f"cannot write a sample: {error}; set TMPDIR to a directory with 1 GB of free space")
    seconds = time.monotonic() - started
    is_resumed = args.output_dir and not args.overwrite_output_dir
    left = find_missing(jobs) if is_resumed else jobs
    size = total_size(jobs)
    size_left = total_size(left)
    sample_size = total_size([sample])
    clips = notes["counts"]["clips"]
    hours = notes["counts"]["seconds"] / 3600
    workers = max(1, min(args.preprocessing_num_workers, len(left)))
    duration = timedelta(seconds=round(seconds * size_left / sample_size / workers))
    scale = size / sample_size
    print(f"input: {len(jobs)} tars, {size / 1e9:,.3f} GB, about {scale * clips:,.0f} clips, {scale * hours:,.2f} h")
    print(f"done: {len(jobs) - len(left)} of {len(jobs)} shards")
    print(f"left: {len(left)} tars, {size_left / 1e9:,.3f} GB")
    print(f"writes: {args.output_dir or 'nothing'}")
    print(f"pushes: {pushes}")
    print(f"time: about {duration} (from a sample of {clips} clips)")


@contextlib.contextmanager
def locked_output(directory: Path, target: str, split: str) -> Iterator[None]:
    """Create the output directory and hold the lock of a target. Fails in one line if the disk has an error."""
    leftovers = f"{target}/.{split}-*.partial"
    try:
        with hold_lock(directory / f".{target}.lock", f"{target} in {directory}", leftovers):
            (directory / target).mkdir(exist_ok=True)
            yield
    except OSError as error:
        fail(f"cannot write the dataset: {error}; complete shards are kept. {CONTINUE}")


def corpus_card(card: RepoCard | None, config: str, split: str) -> str:
    """Return a dataset card that lists this split in addition to those that `card` lists."""
    card = card or RepoCard(CARD)
    list_split(card, config, split)
    return str(card)


def loading_record(args: argparse.Namespace, settings: dict, notes: dict, clips_made: int, seconds: float) -> dict:
    """The record of a run that made so many of the clips in so many seconds."""
    counts = notes["counts"]
    return {
        "status": "complete",
        "settings": settings,
        "clips": counts["clips"],
        "hours": counts["seconds"] / 3600,
        "counts": counts,
        "problems": notes["problems"],
        "wall_seconds": seconds,
        "clips_per_second": clips_made / seconds,
        "arguments": shown_arguments(args),
        "versions": library_versions("datasets", "huggingface_hub", "pyarrow"),
    }


# ---- main ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Set up.
    set_up_process()
    set_client_factory(make_hub_client)
    started = time.monotonic()
    split = split_name(args.target)
    update_card = partial(corpus_card, config=args.target, split=split)

    # 2. Refuse what can be refused.
    corpus = find_corpus(args.target, args.data_dir, args.dataset_dir_suffix)
    check_tars(args.target, corpus)
    repository = visibility = None
    if args.push_to_hub:
        repository, visibility = prepare_repository(args.hub_model_id, "dataset", args.hub_private_repo, args.dry_run)
    if args.output_dir:
        check_cards(args.output_dir, repository, "dataset", update_card)

    # 3. Load.
    tsv_notes = {"counts": {}, "problems": collections.defaultdict(list)}  # for lines of the tsv that name no tar
    jobs = list_jobs(corpus, tsv_notes["problems"])
    settings = {"files": corpus.fingerprint(), "tars": len(jobs)}
    if args.output_dir:
        jobs = name_shards(jobs, args.output_dir / args.target, split, settings)
    if args.dry_run:
        pushes = f"{repository} ({visibility})" if repository else "nothing"
        print_loading_plan(args, jobs, pushes)
        return 0
    if not args.output_dir:
        all_notes = process_tars(jobs, args.preprocessing_num_workers)
        print_statistics(**sum_notes([*all_notes, tsv_notes]))
        return 0

    with locked_output(args.output_dir, args.target, split):
        # 4. Find what is left to do. If that is nothing, read complete shards to the end, to find damaged ones.
        record_path = args.output_dir / f"loading.{args.target}.{split}.json"
        if args.overwrite_output_dir:
            for path in [record_path, *(args.output_dir / args.target).glob(f"{split}-*.parquet")]:
                path.unlink(missing_ok=True)
        if earlier := read_record(record_path):
            refuse_other_settings(record_path, earlier["settings"], settings)
        left = find_missing(jobs) or find_damaged_jobs(jobs, args.preprocessing_num_workers)
        is_unfinished = left or not earlier or earlier["status"] != "complete"
        if is_unfinished:
            write_record(record_path, {"status": "running", "settings": settings})
        logger.info("%d of %d shards are complete", len(jobs) - len(left), len(jobs))

        # 5. Work.
        made = process_tars(left, args.preprocessing_num_workers)

        # 6. Write record and card.
        all_notes = [read_notes(job.shard) for job in jobs]
        notes = sum_notes([*all_notes, tsv_notes])
        write_card(args.output_dir, update_card)
        if is_unfinished:  # the record of a complete run is kept
            clips_made = sum(notes_of_tar["counts"]["clips"] for notes_of_tar in made)
            record = loading_record(args, settings, notes, clips_made, time.monotonic() - started)
            write_record(record_path, record)
        print_statistics(**notes)

        # 7. Push.
        if repository:
            push_dataset(
                repository,
                args.output_dir,
                patterns=[f"{args.target}/{split}-*.parquet", record_path.name],
                update=update_card,
                message=f"Add {args.target}, {split}",
            )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"stopped. {CONTINUE}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an exception while Python shuts down would print a traceback
