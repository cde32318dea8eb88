#!/usr/bin/env python
"""Label a speech dataset with a Whisper teacher.

In:  `--dataset_name`: a dataset directory, a Hub id, a manifest, or a builder: reazonspeech_manual_dataloader.py.
Out: <output_dir>/<config>/<split>-000ii-of-000NN.parquet, the input's columns and `whisper_transcript`: the ids of
     <|startoftranscript|><|ja|><|transcribe|>, then <|notimestamps|> or timestamps with the text, then one
     <|endoftext|>; with `--decode_token_ids`, the label's text instead. `--scores` adds columns to filter by. Next to
     them are README.md (the card) and labelling.<config>.<split>.json (the record: counts, rows left out, speed).

    python run_pseudo_labelling.py --model_name_or_path openai/whisper-large-v3 --dataset_name org/speech \\
        --dataset_split_name train --language ja --return_timestamps --output_dir labelled
    accelerate launch --multi_gpu run_pseudo_labelling.py ... --hub_model_id org/speech-labelled

Run the same command again to resume: shards of `--shard_size` rows that are complete are kept, and the result has the
same bytes whatever the number of processes. All machines must see the same `--output_dir`.
"""

import argparse
import atexit
import codecs
import contextlib
import csv
import errno
import fcntl
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import secrets
import shutil
import signal
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

import datasets
import fsspec
import librosa
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import soundfile
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, LoggerType, gather_object, slice_tensors
from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, DataFilesList, resolve_pattern, sanitize_patterns
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfApi, RepoCard, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from huggingface_hub.utils._http import default_client_factory
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoConfig,
    GenerationConfig,
    LogitsProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import WhisperAttention, eager_attention_forward
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS, TO_LANGUAGE_CODE
from transformers.utils import cached_file, find_adapter_config_file, is_flash_attn_2_available

LABEL_COLUMN = "whisper_transcript"
SCORE_COLUMNS = ("avg_logprob", "compression_ratio", "no_speech_prob")  # as openai-whisper's `transcribe` names them
SETTINGS = (  # flags that change the labels, besides those that choose teacher and dataset
    "audio_column_name",
    "id_column_name",
    "shard_size",
    "dtype",
    "return_timestamps",
    "generation_num_beams",
    "max_label_length",
    "decode_token_ids",
    "scores",
)
LIBRARIES = ("torch", "transformers", "datasets", "huggingface_hub", "accelerate", "soundfile", "librosa")
CPU_BATCH = 16  # clips
APPEAR_SECONDS = 60  # how long a shared file system may take to show other machines' files
PLAN_SECONDS = 20  # --dry_run reads the input for at most this long
PLAN_BATCHES = 4  # that --dry_run decodes on a GPU, which decodes one while it encodes the next; one on a CPU
CUT_CLIPS = "only their first 30 s are labelled, and the filter drops them"
NEW_CARD = """---
license: other
task_categories:
- automatic-speech-recognition
---
# Speech with labels by Whisper

The terms of the audio also apply to the labels. ReazonSpeech may only be used for information analysis under Article
30-4 of the Japanese Copyright Act.
"""


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    add = parser.add_argument_group("input").add_argument
    add("--dataset_name", required=True, help="directory, Hub id, .csv, .tsv, .json(l) or builder .py")
    add("--dataset_config_name", help="configuration; unset = the default one")
    add("--dataset_dir_suffix", metavar="START_END", help="which range of a download in ranges to read; unset = all")
    add("--dataset_split_name", default="train", help="split, or for example train[:1000]")
    add("--audio_column_name", default="audio", help="column of audio")
    add(
        "--text_column_name",
        help="column of reference texts, checked to exist; none = there are none; unset = transcription or text",
    )
    add("--id_column_name", help="column that names rows; unset = rows are numbered")
    add("--max_samples", type=int, help="rows to take from the start; unset = all")
    add = parser.add_argument_group("teacher and labels").add_argument
    add("--model_name_or_path", required=True, help="Whisper, a local directory or Hub id")
    add("--language", type=language_code, help="language, code or name; unset = detected per clip")
    add("--task", choices=("transcribe", "translate"), default="transcribe", help="task")
    add("--return_timestamps", default=False, help="labels with timestamps", **flag)
    add("--generation_num_beams", type=int, default=1, help="beams, 1 = greedy")
    add(
        "--max_label_length",
        type=int,
        default=128,
        help="maximum label length in tokens, special tokens included; longer labels are cut and counted as truncated",
    )
    add("--decode_token_ids", default=False, help="store text in place of token ids", **flag)
    add(
        "--scores",
        help=f"add the columns {', '.join(SCORE_COLUMNS)}; unset = add them if there are no reference texts",
        **flag,
    )
    add = parser.add_argument_group("work").add_argument
    add(
        "--per_device_eval_batch_size",
        type=int,
        help=f"clips per batch; unset = {CPU_BATCH} on a CPU, what fits on a GPU, at most {MOST_CLIPS}",
    )
    add("--dataloader_num_workers", type=int, default=4, help="threads that decode audio")
    add("--preprocessing_num_workers", type=int, default=1, help="processes that load the dataset")
    add("--shard_size", type=int, default=1000, help="rows per shard; a crash loses only the shards in progress")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision; unset = bfloat16 where the device computes it natively, else float32",
    )
    add("--attn_type", choices=("flash_attn", "sdpa", "eager"), default="sdpa", help="attention")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, type=Path, help="dataset directory to write")
    add("--overwrite_output_dir", default=False, help="delete output that was made with different settings", **flag)
    add("--hub_model_id", metavar="ORG/NAME", help="dataset repository to push to; unset = none")
    add("--push_to_hub", help="push the result; unset = push if --hub_model_id is a Hub id", **flag)
    add("--hub_private_repo", default=True, help="make a new repository private", **flag)
    add("--dry_run", default=False, help="print what a run would do and how long it would take", **flag)
    add = parser.add_argument_group("tracking").add_argument
    add("--report_to", choices=TRACKERS, default="wandb", help="tracker")
    add("--wandb_project", default="kotoba-whisper-labelling", help="project of the tracker")
    add("--logging_steps", type=int, default=100, help="report to the tracker after every so many batches")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir.expanduser()
    for name in ("generation_num_beams", "per_device_eval_batch_size", "shard_size", "logging_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
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


# ---- common: card texts ----------------------------------------------------------------------------------------------


def fill_metadata(card: RepoCard, **values: str | list | None) -> None:
    """Add to a card's metadata what they do not have. A value that is there stays, a list gets what it lacks."""
    for name, value in values.items():
        present = card.data.get(name)
        if not present:
            card.data[name] = value
        elif isinstance(value, list):
            present = present if isinstance(present, list) else [present]
            missing = [item for item in value if item not in present]
            card.data[name] = [*present, *missing]


def set_section(card: RepoCard, name: str, section: str) -> None:
    """Put our part into a card, in the place of what an earlier run put there. All else in the card stays."""
    begin = f"<!-- {name}: begin. What stands up to its end is replaced by the next run. -->"
    end = f"<!-- {name}: end -->"
    part = f"{begin}\n\n{section.replace('<!--', '&lt;!--').strip()}\n\n{end}"
    earlier = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if earlier.search(card.text):
        card.text = earlier.sub(lambda _: part, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{part}\n"


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


# ---- common: models --------------------------------------------------------------------------------------------------

ENGLISH_ONLY_END = 50256  # <|endoftext|> in GPT-2's vocabulary, which only English-only Whispers (`*.en`) have
TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>, behind <|notimestamps|>; tokens behind these were added later and are text
ENCODER_POSITIONS = 1500  # of the 30 s that every Whisper hears at a time
LFS_POINTER = b"version https://git-lfs"  # the start of what `git clone` writes without Git LFS
GET_LFS_FILES = "a pointer of Git LFS: get the file itself by `git lfs pull`, or all files by `hf download`"


def local_directory(reference: str) -> Path | None:
    """The directory that a repository reference names, or None for a Hub id (`org/name`). Fails if it is neither."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        fail(f"{reference!r} is neither a directory that exists nor a Hub id such as org/name")
    return None


def is_pointer(path: Path) -> bool:
    """Whether a file is only a pointer of Git LFS."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def load_pretrained(kind: type, reference: str, **options) -> Any:
    """`kind.from_pretrained` of a local directory or a Hub id. Fails in one line that says why."""
    # Otherwise `transformers` asks a Space to open a pull request at a repository that has no safetensors.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    directory = local_directory(reference)
    try:
        return kind.from_pretrained(str(directory or reference), **options)
    except (*HUB_ERRORS, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        # The last three are weights that were cut off, that are damaged, and that would run code.
        remedy = "It may be damaged" if directory else "A private one needs `hf auth login`"
        files = sorted(directory.iterdir()) if directory else []
        if pointer := next((file for file in files if file.is_file() and is_pointer(file)), None):
            remedy = f"{pointer.name} is {GET_LFS_FILES}"
        fail(f"cannot load the model {reference}: {first_line(error)}. {remedy}")


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_damaged_model(directory: Path) -> None:
    """Fail where a file of a student, before or after training, is not the one that its record tells of."""
    hashes: dict[str, list[str]] = {}
    for record_name in ("student.json", "distillation.json"):
        record = read_record(directory / record_name) or {}
        for name, hashed in record.get("files", {}).items():
            hashes.setdefault(name, []).append(hashed)
    for name, expected in hashes.items():
        path = directory / name
        if path.suffix not in (".safetensors", ".json", ".txt") or not path.exists():
            continue
        try:
            hashed = file_hash(path)
        except OSError as error:  # it may be whole
            fail(f"cannot read {path}: {error.strerror}. {CONTINUE}")
        if hashed not in expected:
            fail(
                f"{path} is damaged, or was changed: run the command that wrote it again, or, if it is meant to be as "
                "it is, delete student.json or distillation.json beside it"
            )


def load_config(reference: str, **options) -> WhisperConfig:
    """The configuration of a Whisper; fails for models of other kinds and for damaged ones."""
    directory = local_directory(reference)
    if directory:
        refuse_damaged_model(directory / options.get("subfolder", ""))
    with contextlib.suppress(*HUB_ERRORS):  # `load_pretrained` below reports them
        if find_adapter_config_file(str(directory or reference), **options):
            fail(
                f"{reference} has an adapter_config.json: an adapter (LoRA) has to be merged into its model first. "
                "Load it with PEFT, call `merge_and_unload()`, and save model and processor in a directory of their own"
            )
    config = load_pretrained(AutoConfig, reference, **options)
    if config.model_type != "whisper":
        fail(f"{reference} is a {config.model_type} model, not a Whisper")
    return config


def load_tokenizer(reference: str, **options) -> WhisperTokenizerFast:
    """The tokenizer of a Whisper. Without its files, `transformers` silently makes one with an empty vocabulary."""
    tokenizer = load_pretrained(WhisperTokenizerFast, reference, **options)
    # "a" as well: with tokenizer_config.json alone there are the special tokens, and no others.
    if not {"a", "<|startoftranscript|>", "<|notimestamps|>"} <= tokenizer.get_vocab().keys():
        fail(
            f"{reference} lacks the files of its tokenizer: tokenizer.json, or vocab.json and merges.txt. "
            "Copy them from the model that it was trained from"
        )
    return tokenizer


def refuse_other_sizes(
    reference: str, config: WhisperConfig, vocabulary: dict[str, int], extractor: WhisperFeatureExtractor
) -> None:
    """Fail where tokenizer or feature extractor are not of the model that config.json describes."""
    num_ids = 1 + max(*vocabulary.values(), vocabulary["<|notimestamps|>"] + TIMESTAMPS)
    if config.vocab_size > num_ids and config.vocab_size % 8 == 0:
        num_ids = config.vocab_size  # padded for the sake of speed
    sizes = {
        "vocab_size": ("the tokenizer's ids", num_ids),
        "num_mel_bins": ("the feature extractor's mel bins", extractor.feature_size),
        "max_source_positions": ("the encoder's positions", ENCODER_POSITIONS),
    }
    for key, (name, expected) in sizes.items():
        actual = getattr(config, key)
        if actual != expected:
            fail(f"{reference} has files of several models: {name} are {expected}, {key} in config.json is {actual}")


def is_multilingual(vocabulary: dict[str, int]) -> bool:
    """Whether a Whisper with this vocabulary takes a language and a task."""
    return "<|transcribe|>" in vocabulary and vocabulary["<|endoftext|>"] != ENGLISH_ONLY_END


# ---- common: weights and decoding ------------------------------------------------------------------------------------

# What is taken over from generation_config.json. How to search and what to return is up to the flags of each script.
DECODING_RULES = (
    "alignment_heads",
    "begin_suppress_tokens",
    "bos_token_id",
    "max_initial_timestamp_index",
    "no_repeat_ngram_size",
    "pad_token_id",
    "repetition_penalty",
    "suppress_tokens",
)


def load_generation_config(
    reference: str, config: WhisperConfig, vocabulary: dict[str, int], **options
) -> GenerationConfig:
    """How a model decodes: the rules of its file, and what follows from its vocabulary and its configuration.

    The file may be missing, as in 2022, lack most of this, or have settings that `transformers` 5 refuses.
    """
    source = str(local_directory(reference) or reference)
    try:
        path = cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False, **options)
        stored = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError) as error:  # a damaged file, or a Hub that does not answer
        fail(f"cannot load the generation config of {reference}: {first_line(error)}")
    positions = config.max_target_positions
    values = {"max_initial_timestamp_index": 50}  # the first timestamp is at most 1 s, as in openai/whisper
    for name in DECODING_RULES:
        value = stored.get(name, getattr(config, name, None))
        if value is not None:
            values[name] = value
    values |= {
        "decoder_start_token_id": vocabulary["<|startoftranscript|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "is_multilingual": is_multilingual(vocabulary),
        "max_length": min(stored.get("max_length") or positions, positions),
        "no_timestamps_token_id": vocabulary["<|notimestamps|>"],
        "prev_sot_token_id": vocabulary.get("<|startofprev|>"),
        "return_timestamps": False,
    }
    if is_multilingual(vocabulary):
        tokens = [f"<|{code}|>" for code in LANGUAGES]
        values["lang_to_id"] = {token: vocabulary[token] for token in tokens if token in vocabulary}
        values["task_to_id"] = {task: vocabulary[f"<|{task}|>"] for task in TASK_IDS}
    return GenerationConfig(**values)


def load_whisper(reference: str, generation_config: GenerationConfig, **options) -> WhisperForConditionalGeneration:
    """A Whisper with all of its weights: `transformers` fills in random ones for those that are missing, and warns."""
    model, report = load_pretrained(
        WhisperForConditionalGeneration,
        reference,
        generation_config=generation_config,  # otherwise the one that is stored is loaded, which may be refused
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report instead of an error that does not name them
        **options,
    )
    problems = {
        "lack": report["missing_keys"],
        "have another shape of": {name for name, *_ in report["mismatched_keys"]},
        "have, and config.json does not know,": report["unexpected_keys"],
    }
    for problem, names in problems.items():
        if names:
            fail(f"the weights of {reference} {problem} {min(names)} and {len(names) - 1} more tensors")
    model.config.forced_decoder_ids = None  # models of 2022 have these in place of language and task
    return model


# ---- common: attention -----------------------------------------------------------------------------------------------


class UncopiedAttention(WhisperAttention):
    """Attention to views of the projected queries, keys and values.

    WhisperAttention copies all three into another layout and its output back, which is a seventh of the encoder's time
    on an H100. The results are the same, with sdpa to the bit.
    """

    def forward(self, hidden_states, key_value_states=None, past_key_values=None, attention_mask=None, **options):
        if past_key_values is not None:  # `generate` keeps the copies
            return super().forward(hidden_states, key_value_states, past_key_values, attention_mask, **options)
        source = hidden_states if key_value_states is None else key_value_states
        heads = []
        for projected in (self.q_proj(hidden_states) * self.scaling, self.k_proj(source), self.v_proj(source)):
            heads.append(projected.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(self, *heads, attention_mask, dropout=dropout, scaling=1.0, **options)
        return self.out_proj(mixed.flatten(2)), weights


def spare_copies(model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """Let a model compute the same with fewer copies of its states, which cost a third of a GPU's time."""
    # The encoder transposes the output of its convolutions by strides alone. Without this copy, every layer would work
    # on that layout.
    model.model.encoder.layers[0].register_forward_pre_hook(lambda layer, inputs: (inputs[0].contiguous(), *inputs[1:]))
    for module in model.modules():
        if isinstance(module, WhisperAttention):
            module.__class__ = UncopiedAttention
    return model


# ---- common: languages -----------------------------------------------------------------------------------------------


def language_code(language: str) -> str:
    """Whisper's code of a language that is given by code, name or token: `Japanese`, `JA` and `<|ja|>` are `ja`."""
    name = language.lower().strip("<|>")
    return TO_LANGUAGE_CODE.get(name, name)


def prompt_arguments(reference: str, vocabulary: dict[str, int], language: str | None, task: str) -> dict[str, str]:
    """Language and task as `generate` takes them; none for an English-only model, where they are an error."""
    codes = ["en"]
    if is_multilingual(vocabulary):
        codes = [code for code in LANGUAGES if f"<|{code}|>" in vocabulary]
    if language is not None and language not in codes:
        fail(f"--language {language}: {reference} has no such language, only {', '.join(sorted(codes))}")
    if not is_multilingual(vocabulary):
        if task != "transcribe":
            fail(f"--task {task}: {reference} knows only English")
        return {}
    return {"task": task} if language is None else {"language": language, "task": task}


# ---- common: processes -----------------------------------------------------------------------------------------------

SILENCE_SECONDS = 60  # without a sign of life, after which a process is named


def counter(name: str, rank: int, step: int = 0) -> int:
    """Add to a counter of a process, and return its value. All processes see the counters of all."""
    return torch.distributed.distributed_c10d._get_default_store().add(f"{name}/{rank}", step)


def arrive() -> None:
    """Tell, before this process waits for the others, that it has come so far."""
    if torch.distributed.is_initialized():
        counter("arrivals", torch.distributed.get_rank(), 1)


def leave() -> None:
    """Tell that this process ends."""
    with contextlib.suppress(RuntimeError, ValueError):  # the first process, which keeps the counters, may have ended
        counter("left", torch.distributed.get_rank(), 1)


def watch_processes() -> None:
    """Let a thread name the processes that are silent for a minute, for which the others would wait without a word."""
    if torch.distributed.is_initialized():
        atexit.register(leave)
        threading.Thread(target=name_silent_processes, daemon=True).start()


def find_silent(earlier: dict[int, tuple[int, int]], now: dict[int, tuple[int, int]]) -> list[int]:
    """Which processes are silent, by the beats and arrivals of each a minute ago and now.

    They have stopped beating; or, where no process has arrived anywhere since, the others have come further.
    """
    arrivals = [count for _, count in now.values()]
    earlier_arrivals = [count for _, count in earlier.values()]
    silent = []
    for rank, (beats, count) in now.items():
        has_stopped = rank in earlier and earlier[rank][0] == beats
        is_behind = arrivals == earlier_arrivals and count < max(arrivals)
        if has_stopped or is_behind:
            silent.append(rank)
    return silent


def name_silent_processes() -> None:
    """Beat, and look once a minute at the others. The first process that is not silent speaks."""
    own_rank = torch.distributed.get_rank()
    earlier: dict[int, tuple[int, int]] = {}
    named: list[int] = []
    with contextlib.suppress(RuntimeError, ValueError):
        while True:
            for _ in range(6):
                time.sleep(SILENCE_SECONDS / 6)
                counter("beats", own_rank, 1)
            now = {}  # beats and arrivals of the processes that have not ended
            for rank in range(torch.distributed.get_world_size()):
                if not counter("left", rank):
                    now[rank] = (counter("beats", rank), counter("arrivals", rank))
            silent = find_silent(earlier, now)
            speaker = min(now.keys() - silent, default=None)
            if silent and silent != named and own_rank == speaker:
                numbers = ", ".join(map(str, silent))
                logger.warning("process %s has been silent for a minute, and the others wait for it", numbers)
            named = silent
            earlier = now


@contextlib.contextmanager
def one_line_for_lost_processes() -> Iterator[None]:
    """End with one line where the communication fails because another process of this run has ended."""
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, torch.distributed.DistError) or re.search("gloo|NCCL|Connection", str(error))
        if not is_lost or not torch.distributed.is_initialized():
            raise
        fail(f"another process of this run has ended, and says why: {first_line(error)}. {CONTINUE}")


# ---- common: devices and trackers ------------------------------------------------------------------------------------

# A tracker that accelerate does not know would go into `log_with` of `start_accelerator`.
TRACKERS = ["none", *sorted(set(LoggerType.list()) - {"all"})]


def start_accelerator(args: argparse.Namespace, handlers: Sequence = (), **options) -> Accelerator:
    """The processes, the device and the tracker of this run."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise processes without a GPU do not know of each other
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30)), *handlers],
        **options,
    )
    watch_processes()
    launched = "LOCAL_WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerator.device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        # One thread is the launchers' default, not a user's choice.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    return accelerator


def device_name(device: torch.device) -> str:
    """What a device is called, for people: the model of a GPU, or how many threads of a CPU compute."""
    if device.type == "cpu":
        return f"CPU, threads: {torch.get_num_threads()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_dtype(dtype: str | None, device: torch.device) -> str:
    """The precision to compute in: as asked for, else bfloat16 where the device computes it natively, else float32.

    It also makes convolutions in float32 exact, which are computed in TF32 by default.
    """
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    if dtype is not None:
        return dtype
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        native = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    dtype = "bfloat16" if native else "float32"
    logger.info("--dtype is not set: %s, which this %s computes natively", dtype, device.type)
    return dtype


def choose_attention(attn_type: str, dtype: str, device: torch.device) -> str:
    """What `transformers` calls --attn_type; sdpa in place of flash attention where that cannot run.

    Without the package flash-attn, `transformers` takes a kernel from the Hub, if the package kernels is installed.
    """
    if attn_type != "flash_attn":
        return attn_type
    if device.type != "cuda" or dtype == "float32":
        problem = f"it needs a GPU and --dtype bfloat16 or float16, and this is {dtype} on {device.type}"
    elif is_flash_attn_2_available():
        logger.info("--attn_type flash_attn: by the package flash-attn")
        return "flash_attention_2"
    elif is_flash_attn_2_available(kernels_fallback_ok=True):
        logger.info("--attn_type flash_attn: by the kernel of kernels-community on the Hub")
        return "flash_attention_2"
    else:
        problem = "install the package kernels, with which a kernel comes from the Hub, or the package flash-attn"
    logger.warning("--attn_type flash_attn: %s. sdpa is used", problem)
    return "sdpa"


def start_tracker(accelerator: Accelerator, args: argparse.Namespace, run_name: str | None = None) -> None:
    """Start the tracker of --report_to. Whatever is wrong with it gives one warning and never stops the work."""
    if args.report_to == "none" or not accelerator.is_main_process:
        return
    options = {}
    try:
        if args.report_to == "wandb":
            options["wandb"] = {"dir": args.output_dir, "name": run_name, "mode": wandb_mode(args.output_dir)}
        values = {}
        for name, value in shown_arguments(args).items():
            values[name] = value if isinstance(value, int | float) else str(value)
        accelerator.init_trackers(args.wandb_project, values, options)
        if not accelerator.trackers:
            raise ImportError("it is not installed")
    except Exception as error:  # a tracker may raise anything
        accelerator.trackers = []
        logger.warning("--report_to %s does not work and is left out: %s", args.report_to, first_line(error))


def wandb_mode(directory: str | Path) -> str:
    """`online`, or `offline` without a login, for which wandb would ask and wait for ever."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    import wandb  # only here: it need not be installed

    try:
        if wandb.login(prompt=False, timeout=20):
            return "online"
    except Exception as error:  # no network, or a key that is not valid
        logger.warning("wandb: %s", first_line(error))
    logger.warning("wandb has no login (`wandb login`): its files stay in %s/wandb", directory)
    return "offline"


def track(accelerator: Accelerator, values: dict[str, float], step: int | None = None) -> None:
    """Report figures to the tracker; one that fails is left out from then on."""
    try:
        accelerator.log(values, step=step)
    except Exception as error:  # a tracker may raise anything
        logger.warning("the tracker does not work any more and is left out: %s", first_line(error))
        accelerator.trackers = []


# ---- common: finding datasets ----------------------------------------------------------------------------------------

WRITERS = {  # of records <name>.<config>.<split>.json, which lie in a dataset's directory
    "loading": "reazonspeech_manual_dataloader.py",
    "labelling": "run_pseudo_labelling.py",
    "filtering": "run_data_filtering.py",
}

SPLIT_WORDS = "|".join(itertools.chain(*SPLIT_KEYWORDS.values()))
SPLIT_FORM = "(^|[-._ 0-9])({})[-._ 0-9]"  # as `datasets` finds splits in names of files
SPLIT_IN_NAME = re.compile(SPLIT_FORM.format(SPLIT_WORDS))


def split_names(split: str) -> list[str]:
    """The splits of a dataset that an expression such as `train[:1000]+test` names."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def is_repository(reference: str) -> bool:
    """Whether a reference is a repository, local or on the Hub: no file, nor what `save_to_disk` or Kaldi writes."""
    path = Path(reference).expanduser()
    if not path.is_dir():
        return not path.is_file() and path.suffix not in MANIFESTS
    marks = ("state.json", "dataset_dict.json", "wav.scp")
    return not any((path / mark).exists() for mark in marks)


def is_audio(file: str) -> bool:
    """Whether the name of a file ends as those of audio files do."""
    return os.path.splitext(file)[1].lower() in AudioFolder.EXTENSIONS


def name_left_out(files: set[str], reason: str) -> None:
    """Warn of audio files that are not read."""
    if files:
        names = ", ".join(sorted(files)[:10])
        logger.warning("left out: %d audio files %s: %s", len(files), reason, names)


def name_linked_directories(directory: str) -> None:
    """Warn of links to directories, whose files are not read."""
    for parent, names, _ in os.walk(directory):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.islink(path):
                logger.warning("left out: %s is a link to a directory: name a table of its files, or copy it", path)


def capital_splits(directory: str) -> dict[str, list[str]]:
    """Patterns of the splits in directories such as TRAIN and TEST, which `datasets` does not take for splits."""
    patterns = defaultdict(list)
    for name in sorted(os.listdir(directory)):
        for split, words in SPLIT_KEYWORDS.items():
            if name.lower() in words:
                patterns[str(split)].append(f"{name}/**")
    return patterns


HAS_CONFIGS = re.compile(r"---\s*\n((?!---).*\n)*?configs:")  # in the first lines of a dataset card


def choose_builder(reference: str, config: str | None) -> datasets.DatasetBuilder:
    """The builder that `datasets` chooses for a local directory or a Hub id; AudioFolder for a directory of audio."""
    directory = local_directory(reference)
    if not directory:
        return datasets.load_dataset_builder(reference, config)
    location = str(directory.resolve())
    if glob.has_magic(location):  # which would read the files of other directories, too
        fail(f"`datasets` takes the characters *, ? and [ of a path for a pattern: rename the directory {location}")
    name_linked_directories(location)
    card = directory / "README.md"  # which may say what to read
    has_card = card.is_file() and HAS_CONFIGS.match(card.read_text("utf-8-sig", errors="replace"))
    try:
        builder = datasets.load_dataset_builder(location, config)
    except (ValueError, datasets.exceptions.DataFilesNotFoundError):
        # Among other things where the directory of one split has less audio than texts, and that of another has more,
        # and where only a train.list has a split in its name.
        if has_card or not any(map(is_audio, resolve_pattern("**", location))):
            raise
        builder = datasets.load_dataset_builder("audiofolder", data_dir=location)
    # Audio counts more than texts, tables and pictures beside it, but the tables may be what the card says.
    tables = ("csv", "json") if has_card else ()
    if builder.name in ("parquet", "arrow", "webdataset", *tables):
        return builder  # before the files are listed: a repository may have many shards
    audio = set(filter(is_audio, resolve_pattern("**", location)))
    if audio and builder.name != "audiofolder":
        builder = datasets.load_dataset_builder("audiofolder", data_dir=location)
    elif builder.name == "text":
        fail(f"{reference} has texts, and no audio beside them: unpack an archive of both")
    if has_card or not audio:
        return builder
    files = set(itertools.chain(*builder.config.data_files.values()))
    if audio - files and all(SPLIT_IN_NAME.search(os.path.basename(file)) for file in files):
        # mic_test.wav makes no split of an audio folder, nor does train.tsv: only directories do.
        builder = datasets.load_dataset_builder("audiofolder", data_dir=location, data_files="**")
    splits = capital_splits(location)
    if len(splits) > 1 and set(builder.config.data_files) == {"train"}:
        builder = datasets.load_dataset_builder("audiofolder", data_dir=location, data_files=splits)
    left_out = audio.difference(*builder.config.data_files.values())
    name_left_out(left_out, "that lie in the directory of no split")
    return builder


@contextlib.contextmanager
def walking_once() -> Iterator[None]:
    """Let `datasets` list a directory once. It does so for each of some forty patterns: minutes for 50,000 clips."""
    inherited = ("find", "glob")
    for name in inherited:
        setattr(LocalFileSystem, name, functools.cache(getattr(LocalFileSystem, name)))
    try:
        yield
    finally:
        for name in inherited:
            delattr(LocalFileSystem, name)


@walking_once()
def find_files(
    reference: str, config: str | None, split: str
) -> tuple[datasets.DatasetBuilder, dict[str, DataFilesList]]:
    """The builder for a local directory or a Hub id, and the files of the named splits."""
    builder = choose_builder(reference, config)
    files_by_split = builder.config.data_files or {}
    found = {}
    for name in split_names(split):
        if name not in files_by_split:
            available = ", ".join(map(str, files_by_split))
            hint = split_hint(local_directory(reference), name) if builder.name == "audiofolder" else ""
            fail(f"{reference} ({builder.config.name}) has no split {name!r}; it has {available}{hint}")
        found[name] = files_by_split[name]
        refuse_unfinished(reference, builder.config.name, name, found[name])
    return builder, found


def split_hint(directory: Path | None, split: str) -> str:
    """What to do where an audio folder has no such split, but a table that is named after it; else empty."""
    place = Place(os.path.realpath(directory or ""), is_confined=True)
    tables = [table for table in find_tables([], place) if is_named_after(table, split)] if directory else []
    return f". Name a table instead of the directory: {', '.join(map(str, tables[:10]))}" if tables else ""


def refuse_unfinished(reference: str, config: str, split: str, files: list[str]) -> None:
    """Fail where the stage before has not finished a split, where shards are missing, or where one is damaged.

    The record and the footers are read in local directories only: the Hub checks what it stores, and a split is pushed
    when it is complete.
    """
    directory = local_directory(reference)
    writer = "the command that writes it"
    if directory:
        for stage, script in WRITERS.items():
            path = directory / f"{stage}.{config}.{split}.json"
            if path.exists():
                writer = f"{script} with the same flags"
                record = read_record(path)
                if record is None or record.get("status") != "complete":
                    fail(f"{reference} is not finished, says {path.name}: run {writer} again")
        for file in files:
            if file.endswith(".parquet") and read_footer(Path(file)) is None:
                if is_pointer(Path(file)):
                    fail(f"{file} is {GET_LFS_FILES}")
                fail(f"{file} is damaged: run {writer} again")
    refuse_missing_shards(reference, split, files, writer)


def refuse_missing_shards(reference: str, split: str, files: list[str], writer: str) -> None:
    """Fail where shards of one of our stages are missing; warn where the names of other people's files say so."""
    numbers = defaultdict(set)  # by export: several may make up a split
    for file in files:
        if shard := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.parquet", file):
            export, number, total = shard.groups()
            numbers[export, int(total)].add(int(number))
    for (export, total), present in numbers.items():
        if len(present) == total:
            continue
        problem = f"{reference} has {len(present)} of {total} shards of {split}"
        with fsspec.open(f"{export}-{min(present):05d}-of-{total:05d}.parquet") as file:
            if b"kotoba" in (pq.read_metadata(file).metadata or {}):
                lost = min(set(range(total)) - present)
                fail(f"{problem}, -{lost:05d}-of-{total:05d} is missing: run {writer} again")
        logger.warning("%s by their names: is it complete?", problem)


# ---- common: reading datasets ----------------------------------------------------------------------------------------

# Suffixes of audio files beside .flac, .mp3, .ogg, .opus, .wav and others that `datasets` knows. Which of them can be
# decoded is up to libsndfile: see `open_stream`. Another decoder would go into `decode_clip`.
MORE_AUDIO = (
    *(".3gpp", ".aac", ".aif", ".aifc", ".amr", ".ape", ".ds2", ".dss", ".m4a", ".m4b", ".mka", ".mp2", ".mpeg"),
    *(".mts", ".oga", ".sph", ".spx", ".wma", ".wv"),
)
PATH_COLUMNS = ("audio_filepath", "file_name", "path", "audio_file")  # of audio in manifests; the first is NeMo's
AUDIO_DIRECTORIES = ("clips", "audios", "audio", "wavs", "wav")  # beside a table; the first two are Common Voice's
SAMPLED_BYTES = 4096  # of a clip, for a digest
FORMAT_SCP = "make files of them first, for example with ESPnet's format_wav_scp.sh"
SHEETS = (".xlsx", ".xls", ".ods", ".numbers")
SAVE_SHEET = "Save a spreadsheet as CSV (UTF-8)"
NOT_UTF8 = (
    "convert it, for example with iconv -f CP932 -t UTF-8 (Korean: -f CP949, Chinese: -f GB18030, German or French: "
    "-f CP1252)"
)
LOOKED_AT = 1000  # rows of a table, to tell which of its columns names clips
MANIFESTS = (".csv", ".tsv", ".jsonl", ".json", ".manifest")  # the last is SageMaker's
TEXT_COLUMNS = ("transcription", "text")  # of a table in an audio folder, where no flag names another
# The name and the text in a line of a list: `NAME<tab>text` or `NAME|text`, else `NAME text` or `NAME:text`. CSS10 adds
# a normalised text and the seconds, the ITA corpus and ROHAN a comma and the reading in katakana, VITS the number of a
# speaker before the text.
LISTED_TEXT = re.compile(r"([^\t|]+)[\t|](?:\d+\|)?([^\t|]*)(?:(?:\|[^\t|]*){1,2}\|[\d.]+(?:\|[^\t|]*)?)?")
SPACED_TEXT = re.compile(r"([^\s:：、]+?)[.．]?[ \u3000]([^\t|]*)")
COLON_TEXT = re.compile(r"([^\s:：、]+)[:：、]([^\t|]*?)(?:,[ァ-ー、。？！…]+)?")
TIMES = re.compile(r"[\d.]+\t[\d.]+\t")  # at the start of a label of Audacity
PINYIN = re.compile(r"(\S+ [a-z]+\d *){2,}")  # of each character of a text, as in AISHELL-3
TIMIT_SAMPLES = re.compile(r"^0 \d{4,} (?=\D)")  # the first and last sample, before a text
FLEURS_TEXT = re.compile(r"^\d+\t([^\t]+\.wav)\t([^\t]*)(?:\t[^\t]*){3}\t(?:MALE|FEMALE|OTHER)$", re.MULTILINE)
FESTIVAL_TEXTS = "txt.done.data"  # as CMU ARCTIC has it
TEXT_NAMES = (FESTIVAL_TEXTS, "prompts-original")  # the second is VoxForge's
FESTIVAL_TEXT = re.compile(r'\(\s*(\S+)\s+"(.*)"\s*\)')
PHONEMES = re.compile(r"^\s*[\d.]+\s+[\d.]+\s", re.MULTILINE)  # in a .lab file of phonemes: their times
CUE = re.compile(r"-->.*\n((?:.+\n?)+)")
CUES = {".srt": CUE, ".vtt": CUE, ".textgrid": re.compile(r'(?:text|mark) = "((?:[^"]|"")*)"')}  # texts with times
TEXT_FILES = (".txt", ".lab", ".trn", ".list", ".json", ".csv", ".tsv", *CUES)  # in audio folders
WITH_TIMES = (".ctm", ".lrc", ".sbv", ".srt", ".stm", ".vtt", ".ass", ".textgrid", ".eaf")  # subtitles and annotations
NO_FILES = (
    "If its README.md names files that are not there, name the directory of those that are. Raw samples (.pcm) need a "
    "header first, for example by ffmpeg -f s16le -ar 16000 -ac 1 -i FILE FILE.wav"
)
UNPACK = "unpack the archive, if they have the clips' texts"
CUT_THERE = "cut the audio there, and write the text of each piece into a .txt file of its name"
KALDI_FILES = {"audio": "wav.scp", "transcription": "text", "speaker": "utt2spk"}  # by the column that they fill
METADATA = ["metadata.jsonl", "metadata.csv", "metadata.parquet"]  # of audio folders
LIBRARY_ERRORS = (httpx.HTTPError, pa.ArrowException, datasets.exceptions.DatasetsError)
LOADING_ERRORS = (ValueError, TypeError, KeyError, RuntimeError, OSError, *LIBRARY_ERRORS)
# Of a file that a row names; the third to the fifth come from a zip that is damaged, or that lacks it.
READING_ERRORS = (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, httpx.HTTPError)


class Place(NamedTuple):
    """Where the files lie that rows of a dataset name."""

    base: str  # what relative paths are relative to: a directory, or hf://datasets/org/name@revision
    is_confined: bool  # only files inside of it are read, because somebody else may have written the paths


class Unreadable(Exception):
    """An audio file that cannot be read; the message says why."""


def store_undecoded(feature: datasets.Audio, value: str | bytes | dict) -> dict:
    """What `datasets` stores of an audio value. Its own `Audio.encode_example` needs torchcodec for this."""
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if value.get("array") is not None:
        file = io.BytesIO()
        samples = np.asarray(value["array"], np.float32).T  # (samples), or (channels, samples)
        soundfile.write(file, samples, int(value["sampling_rate"]), format="WAV", subtype="FLOAT")
        return {"bytes": file.getvalue(), "path": None}
    return {"bytes": value.get("bytes"), "path": value.get("path")}


def mend_datasets() -> None:
    """Let `datasets` load audio without torchcodec, all kinds of audio, and metadata as it is written."""
    datasets.Audio.encode_example = store_undecoded
    AudioFolder._read_metadata = read_metadata
    AudioFolder._generate_examples = generate_in_order
    AudioFolder.EXTENSIONS = list(dict.fromkeys([*AudioFolder.EXTENSIONS, *MORE_AUDIO]))
    for suffix in AudioFolder.EXTENSIONS:
        for form in (suffix, suffix.upper(), suffix.title()):
            if datasets.load._EXTENSION_TO_MODULE.get(form) != ("audiofolder", {}):  # .mp4 is a film to it
                datasets.load._EXTENSION_TO_MODULE[form] = ("audiofolder", {})
                datasets.load._MODULE_TO_EXTENSIONS["audiofolder"].append(form)
                datasets.load._ALL_ALLOWED_EXTENSIONS.append(form)


def read_metadata(builder: AudioFolder, file: str, metadata_ext: str) -> Iterator[pa.Table]:
    """The metadata of an audio folder. What `datasets` does instead turns the text "007" into 7, and "NA" into none."""
    if metadata_ext == ".parquet":
        yield from FolderBasedBuilder._read_metadata(builder, file, metadata_ext)
        return
    table = read_table(file, metadata_ext)
    names = table.column_names
    if not any(name.endswith(("file_name", "file_names")) for name in names):
        raise ValueError(f"{file} needs the columns file_name (paths relative to it) and text, and has {names}")
    yield table


def generate_in_order(builder: AudioFolder, files: tuple, metadata_files: set, **options) -> Iterator[tuple]:
    """The rows of an audio folder. `datasets` takes its metadata files in an order that differs between processes."""
    in_order = sorted(metadata_files, key=str)
    return FolderBasedBuilder._generate_examples(builder, files, in_order, **options)


def load_builder(path: Path, config: str | None, dir_suffix: str | None) -> datasets.DatasetBuilder:
    """The builder that a Python file defines. `load_dataset` does not run such files any more.

    `dir_suffix` says which part of a download in parts to read, as our data loader's `dataset_dir_suffix`.
    """
    if not path.is_file():
        fail(f"--dataset_name {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where worker processes look for it
    spec.loader.exec_module(module)
    builder = datasets.load.import_main_class(path.stem)
    if builder is None:
        fail(f"--dataset_name {path} must define a datasets.DatasetBuilder")
    options = {"dataset_dir_suffix": dir_suffix} if dir_suffix else {}
    return builder(config_name=config, **options)


def parse_cells(path: str, text: str, delimiter: str, quoting: int) -> pa.Table:
    """A table of strings. Raises ValueError for a row that has more or fewer cells than the header."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    rows = []
    try:
        for cells in reader:
            if not any(cells):
                continue
            if rows and len(cells) != len(rows[0]):
                advice = f"; quote texts that have a {delimiter!r}" if len(cells) > len(rows[0]) else ""
                raise csv.Error(f"it has {len(cells)} cells, the header {len(rows[0])}{advice}")
            rows.append(cells)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    header = rows.pop(0)
    names = []
    arrays = []
    for number, name in enumerate(header):
        column = [cells[number] for cells in rows]
        if name.strip() in names:
            raise ValueError(f"{path} has two columns {name.strip()!r}: does its first line name the columns?")
        if name.strip():
            names.append(name.strip())
            arrays.append(pa.array(column, pa.string()))
        elif number > 0 and any(column):  # the first column may be an index of pandas
            raise ValueError(f"{path} has cells in column {number + 1}, which the header does not name")
    return pa.table(arrays, names)


def read_cells(path: str, text: str, suffix: str) -> pa.Table:
    """The table of a .csv, .tsv or .txt file by the delimiter of its header. Tabs and bars may do without quoting."""
    header = text.lstrip().partition("\n")[0]
    marks = ",;\t|" if suffix == ".csv" else "\t,;|"
    delimiter = next((mark for mark in marks if mark in header), ",")
    try:
        return parse_cells(path, text, delimiter, csv.QUOTE_MINIMAL)
    except ValueError:
        if delimiter not in "\t|":
            raise
    return parse_cells(path, text, delimiter, csv.QUOTE_NONE)


def decode_text(content: bytes, errors: str = "strict") -> str:
    """A file's text: UTF-16 where its first bytes say so, as those of Excel's Unicode text, and else UTF-8."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", errors)


def read_text(path: str) -> str:
    """The text of a file. Raises ValueError where it is not UTF-8."""
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            return decode_text(file.read())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): {NOT_UTF8}") from None


def read_kaldi_file(file: str, place: Place) -> dict[str, str]:
    """A file of Kaldi: what each line has after its first word, by that word."""
    values = {}
    for clip, value in re.findall(r"^[ \t]*(\S+)(.*)", read_text(find_file(file, place)), re.MULTILINE):
        if clip in values:
            raise ValueError(f"its file {file} has two lines for {clip}")
        values[clip] = value.strip()
    return values


def read_kaldi(place: Place) -> pa.Table:
    """The clips of a data directory of Kaldi or ESPnet. Commands in its wav.scp are refused, and never run."""
    if os.path.exists(f"{place.base}/segments"):
        raise ValueError(f"it names parts of recordings (segments): {FORMAT_SCP}")
    columns = {}
    for column, file in KALDI_FILES.items():
        if os.path.lexists(f"{place.base}/{file}"):  # only wav.scp must be there
            columns[column] = read_kaldi_file(file, place)
    paths = columns["audio"]
    for clip, path in paths.items():
        if re.search(r"^\||\|$|\.ark:\d", path):
            raise ValueError(f"its wav.scp has commands or archives, such as {path!r}: {FORMAT_SCP}")
        full = os.path.join(place.base, path)
        if not os.path.exists(full) and os.path.exists(path):
            full = paths[clip] = os.path.abspath(path)  # ESPnet's are relative to where its recipe runs
        if place.is_confined and not f"{os.path.realpath(full)}/".startswith(f"{place.base}/"):
            raise ValueError(f"its wav.scp names files elsewhere ({path}): name {place.base}/wav.scp to read them")
    rows = {column: pa.array(map(values.get, paths), pa.string()) for column, values in columns.items()}
    return pa.table({"id": list(paths), **rows})


def is_table(file: Path) -> bool:
    """Whether a file may be a table of clips, as its suffix says, or the tabs in the first line of a .txt file."""
    if file.suffix.lower() != ".txt" or not file.is_file():
        return file.suffix.lower() in MANIFESTS
    with open(file, "rb") as start:
        header = decode_text(start.read(4096), "replace").partition("\n")[0]
    return "\t" in header and not TIMES.match(header)


def rows_of_json(value: dict | list) -> list:
    """The rows in a value of JSON: of an object, its only list of objects, or its objects by name, or else itself."""
    if isinstance(value, list):
        return value
    lists = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if len(lists) == 1:
        return lists[0]
    if len(value) > 1 and all(isinstance(row, dict) for row in value.values()):
        return [{"name": name, **row} for name, row in value.items()]
    return [value]


def read_json(path: str, text: str, suffix: str) -> list:
    """The rows of a .jsonl file, or of a .json file, which may have a row in each line as well."""
    if suffix == ".json" and text.strip():
        try:
            return rows_of_json(json.loads(text))
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # behind the row in the first line
                raise ValueError(f"{path}: {error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            value = json.loads(line) if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows += value if isinstance(value, list) else [value]
    return rows


def read_table(path: str, suffix: str) -> pa.Table:
    """The rows of a .csv, .tsv, .txt, .jsonl or .json file. Cells stay the text that they are."""
    text = read_text(path)
    if suffix in (".csv", ".tsv", ".txt"):
        return read_cells(path, text, suffix)
    rows = read_json(path, text, suffix)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} needs an object for each row, such as {{'audio': 'clip.flac', 'text': '…'}}")
    if any(row.get("offset") for row in rows):
        raise ValueError(f"{path} names parts of recordings (offset): cut them into files of their own")
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def select_split(parts: dict[str, datasets.Dataset], split: str) -> datasets.Dataset:
    """The rows that a split expression such as `train[:10%]+test` names."""
    sizes = {name: len(part) for name, part in parts.items()}
    instruction = datasets.ReadInstruction.from_spec(split)
    chosen = []
    for piece in instruction.to_absolute(sizes):
        rows = range(piece.from_, piece.to)
        chosen.append(parts[piece.splitname].select(rows))
    return datasets.concatenate_datasets(chosen)


def load_part(kind: str, files: DataFilesList, place: Place, **options) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of some files, by the loader `kind` of `datasets`, or by our own where that would change texts."""
    if kind in ("csv", "json"):
        tables = []
        for file in files:
            suffix = os.path.splitext(file.removesuffix(".gz"))[1]
            tables.append(read_table(file, suffix))
        return datasets.Dataset(pa.concat_tables(tables, promote_options="permissive"))
    is_local_parquet = kind == "parquet" and not place.base.startswith("hf://")
    if is_local_parquet and not any(pq.read_metadata(file).num_rows for file in files):
        return datasets.Dataset(pq.read_table(files[0]))  # `load_dataset` refuses a split without rows
    if kind == "audiofolder":
        return load_folder(files, place, **options)
    if kind == "parquet":
        options["fragment_scan_options"] = pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
    # By its files: the cache of a whole directory does not notice that a file has changed, and the cache of a whole
    # configuration holds all splits.
    patterns = list(map(glob.escape, files))
    try:
        part = datasets.load_dataset(kind, data_files=patterns, split="train", **options)
    except datasets.exceptions.DatasetGenerationError:
        paths = list(map(Path, files))
        if is_local_parquet and (damaged := find_damaged(paths, threads=1)):
            fail(f"{damaged[0]} is damaged: run the command that wrote it again")
        raise
    return spread_fields(part) if kind == "webdataset" else part


def spread_fields(part: datasets.Dataset) -> datasets.Dataset:
    """The rows of a WebDataset, with the fields of its JSON as columns."""
    part = part.remove_columns("__url__")  # which names a directory of this machine
    fields = part.features.get("json")
    if isinstance(fields, dict):
        for name in sorted(set(fields) - {"audio", *part.column_names}):
            values = pc.struct_field(part.data.column("json"), name)
            part = part.add_column(name, values)
    return part


def is_plain_table(file: str, names: set[str]) -> bool:
    """Whether a metadata file is no such file as `datasets` wants: a list, or a table of clips in other directories.

    LJSpeech's metadata.csv is a list, with lines NAME|text. `names` are those of all clips, without their directories.
    """
    name, suffix = os.path.splitext(os.path.basename(file))
    if name != "metadata" or suffix not in (".csv", ".jsonl"):
        return False
    if suffix == ".csv" and "file_name" not in read_text(file).partition("\n")[0]:
        return True
    table = read_table(file, suffix)
    if "file_name" not in table.column_names:
        return False
    first = list(map(str, table["file_name"][:LOOKED_AT].to_pylist()))
    has_any = any(os.path.exists(os.path.join(os.path.dirname(file), path)) for path in first)
    return not has_any and not names.isdisjoint(first)


def load_folder(
    files: DataFilesList,
    place: Place,
    split: str,
    text_column: str | None = None,
    num_proc: int | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of an audio folder, with the metadata above it where there is none in it, or else with its texts."""
    is_local = not place.base.startswith("hf://")
    given = files
    names = set(map(os.path.basename, filter(is_audio, files)))
    plain = {file for file in files if is_plain_table(file, names)} if is_local else set()
    # `datasets` takes clip.wav.txt for audio as well. Of such files, only compressed ones may be some.
    others = (*METADATA, ".zip", ".gz")
    kept = [file for file in files if (is_audio(file) or file.lower().endswith(others)) and file not in plain]
    files = DataFilesList(kept, files.origin_metadata)
    has_metadata = any(os.path.basename(file) in METADATA for file in files)
    above = []
    if not has_metadata:
        candidates = [f"{place.base}/{name}" for name in METADATA]
        above = [file for file in candidates if os.path.exists(file) and not is_plain_table(file, names)]
    patterns = list(map(glob.escape, above))
    data_files = DataFilesDict(train=files + DataFilesList.from_patterns(patterns))
    # With other names than the default, so that nothing comes from a cache that `datasets` filled in its own way.
    builder = AudioFolder(data_files=data_files, metadata_filenames=METADATA)
    if streaming and not is_local:
        return builder.as_streaming_dataset("train")
    builder.download_and_prepare(num_proc=num_proc)
    dataset = builder.as_dataset("train")
    if not is_local:
        return dataset
    column = next(name for name, feature in dataset.features.items() if isinstance(feature, datasets.Audio))
    dataset = leave_out_texts(dataset, column)
    paths = []
    rows = dataset.select_columns(column).with_format("arrow")[:]
    for path in pc.struct_field(rows[column], "path").to_pylist():
        if path and "::" not in path and not is_audio(path):
            path = resolve_file(path, place.base)  # the metadata name it without its suffix
        paths.append(unicodedata.normalize("NFC", path or ""))
    if has_metadata or above:
        return match_files(dataset, paths, files, bool(above))
    dataset = add_transcripts(dataset, paths, place)
    wanted = {text_column} if text_column else set(TEXT_COLUMNS)
    if text_column == "none" or wanted.intersection(dataset.column_names):
        return dataset
    tables = find_tables(given, place)
    return read_listed(paths, tables, place, split, wanted.union(TEXT_COLUMNS)) or dataset


def leave_out_texts(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The rows of an audio folder without the texts in its archives, which `datasets` takes for audio beside audio."""
    paths = pc.struct_field(dataset.data.column(column), "path").to_pylist()
    texts = {path for path in paths if path and "::" in path and not is_audio(path.partition("::")[0])}
    if not texts:
        return dataset
    logger.warning("left out: %d files in archives, such as %s: %s", len(texts), min(texts), UNPACK)
    return dataset.select([row for row, path in enumerate(paths) if path not in texts])


def match_files(dataset: datasets.Dataset, paths: list[str], files: list[str], is_shared: bool) -> datasets.Dataset:
    """The rows of a split's own files, with a warning of files in no row. `is_shared`: the rows are of all splits."""
    present = {unicodedata.normalize("NFC", file) for file in files}
    audio = set(filter(is_audio, present))
    name_left_out(audio.difference(paths), "that no row of the metadata names")
    if not is_shared:
        return dataset
    # Files that are there, but not in this split, are those of another.
    rows = [row for row, path in enumerate(paths) if path in present or not os.path.exists(path)]
    return dataset.select(rows)


def parallel_directories(base: str) -> dict[Path, set[Path]]:
    """For each directory in `base`, its path without one directory that holds no audio, in every way: a for txt/a.

    Without all of them as well, which gives the nearest directory that holds audio.
    """
    tree = [(Path(directory), names) for directory, _, names in os.walk(base)]
    with_audio = set()
    for directory, names in tree:
        if any(map(is_audio, names)):
            with_audio |= {directory, *directory.parents}
    parallel = {}
    for directory, _ in tree:
        silent = {directory, *directory.parents} - with_audio
        nearest = {part.parent for part in silent} & with_audio
        parallel[directory] = nearest.union(part.parent / directory.relative_to(part) for part in silent)
    return parallel


def name_clips(paths: list[str], base: str) -> tuple[dict, dict]:
    """Two tables of the clips by name: `near`, as lists beside or above them name them; `far`, as a parallel tree does.

    Clip wav/a/x.flac is x, wav/x and wav/a/x for a list; in a parallel tree, one directory of its path may be missing,
    so that it is a/x as well. A name that several clips have stands for their set, but x.m4a and x.flac are one clip.
    """
    near = {}
    far = {}
    depth = len(Path(base).parts)
    clips = [os.path.splitext(path)[0] for path in paths]
    for clip in clips:
        *directories, stem = clip.split("/")
        for number in range(depth, len(directories) + 1):
            above = directories[:number]
            listed = "/".join([*above, stem])
            # VCTK's texts do not name the microphone.
            in_tree = "/".join([*above, *directories[number + 1 :], stem.removesuffix("_mic1")])
            for named, name in ((near, listed), (far, listed), (far, in_tree)):
                known = named.setdefault(name, clip)
                if isinstance(known, set):
                    known.add(clip)
                elif known != clip:
                    named[name] = {known, clip}
    near.update((clip, clip) for clip in clips)  # by its full path
    return near, far


def headless_rows(lines: list[str], is_clip: Callable[[str], bool]) -> list[tuple]:
    """Names and texts of a table without a header, such as OpenSLR's; none where its first line names no clip.

    Its columns are NAME and text, or NAME, speaker and text, or an id, NAME and a text that may have commas.
    """
    first = lines[0] if lines else ""
    behind_name = [mark for mark in "\t|;," if mark in first and is_clip(first.partition(mark)[0])]
    present = [mark for mark in "\t,;|" if mark in first]  # where an id stands before the name
    delimiter = next(iter(behind_name + present), ",")
    try:
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
    except csv.Error:
        return []
    if not rows:
        return []
    is_first = is_clip(rows[0][0])
    if is_first and (all(len(row) == 2 for row in rows) or all(len(row) == 3 for row in rows)):
        return [(row[0], row[-1]) for row in rows]
    is_second = not is_first and all(len(row) > 2 for row in rows) and is_clip(rows[0][1])
    if is_second and (delimiter == "," or all(len(row) == 3 for row in rows)):
        return [(name, delimiter.join(text)) for _, name, *text in rows]
    return []


def listed_texts(file: Path, is_clip: Callable[[str], bool]) -> list[tuple]:
    """Pairs of name and text: of a file for one clip, its own name and its text; of a list, those of its lines."""
    lines = decode_text(file.read_bytes(), "replace").splitlines()
    content = "\n".join(lines)
    if file.name == "metadata.csv" and "|" in content:
        return [tuple(line.split("|")[:2]) for line in lines if "|" in line]
    if file.suffix.lower() in (".csv", ".tsv"):
        return FLEURS_TEXT.findall(content) or headless_rows(lines, is_clip)
    if file.suffix == ".list":  # of GPT-SoVITS and Style-Bert-VITS2: path|speaker|language|text
        fields = [line.split("|") for line in lines]
        return [(line[0], line[3]) for line in fields if len(line) > 3]
    if file.name == FESTIVAL_TEXTS:
        return FESTIVAL_TEXT.findall(content)
    if file.suffix == ".lab":  # a text, or phonemes and their times
        return [] if PHONEMES.search(content) else [(file.stem, content)]
    if pattern := CUES.get(file.suffix.lower()):  # the text of a clip, where it is the only one
        texts = list(filter(str.strip, pattern.findall(content)))
        return [(file.stem, texts[0].replace('""', '"'))] if len(texts) == 1 else []
    if file.suffix == ".trn":  # of THCHS-30: NAME.wav.trn has the text, its pinyin and its phonemes
        return [(file.stem, lines[0])] if is_audio(file.stem) and len(lines) == 3 else []
    if file.suffix == ".json":  # a clip of Emilia, what a recogniser wrote, or texts by the names of their clips
        with contextlib.suppress(ValueError):
            values = json.loads(content)
            if isinstance(values, dict) and isinstance(values.get("text"), str):
                return [(file.stem, values["text"])]
            if isinstance(values, dict) and all(isinstance(text, str) for text in values.values()):
                return list(values.items())
        return []
    names = {file.stem, file.stem.removesuffix(".normalized")}  # LibriTTS also has the original text
    texts = [(name, TIMIT_SAMPLES.sub("", content)) for name in names]
    for line in lines:
        if listed := LISTED_TEXT.fullmatch(line) or SPACED_TEXT.fullmatch(line) or COLON_TEXT.fullmatch(line):
            name, text = listed.groups()
            texts.append((name, "".join(text.split()[::2]) if PINYIN.fullmatch(text) else text))
    return texts


def find_clip(clips: dict, directory: Path, name: str) -> str | set[str] | None:
    """The clip that a file in a directory calls by this name, if there is one; a set if it may be any of them."""
    # Lists for training tools have paths of another machine, or placeholders such as DUMMY/a.wav.
    parts = PureWindowsPath(name.strip()).parts
    ends = ["/".join(parts[start:]) for start in range(1, len(parts))]
    for known in (name.strip(), *ends):
        path = unicodedata.normalize("NFC", os.path.normpath(directory / known))
        stem = os.path.splitext(path)[0] if is_audio(path) else path
        if stem in clips:
            return clips[stem]
        if ends and os.path.exists(path):  # it is of another split
            return None
    return None


def name_unread(texts: list, what: str, advice: str) -> None:
    """Warn of texts in an audio folder that are not read."""
    if texts:
        logger.warning("left out: %d texts %s, such as %s: %s", len(texts), what, texts[0], advice)


def collect_texts(paths: list[str], place: Place) -> tuple[dict[str, set], dict[str, set], dict[str, set]]:
    """The texts in a directory, by the clips that they fit: near the clip, in a parallel tree, of all clips of a name.

    NAME.txt is the text of NAME.wav, and so are NAME.lab and the `text` of NAME.json. Other .txt files, .list files and
    tables without a header are lists of clips beside or below them, with lines such as `NAME text`. In a parallel tree,
    txt/a/NAME.txt is the text of wav/a/NAME.wav. A list above several directories may be what all speakers have read.
    """
    near_clips, far_clips = name_clips(paths, place.base)
    near_texts = defaultdict(set)
    far_texts = defaultdict(set)
    shared_texts = defaultdict(set)
    parallel = parallel_directories(place.base)

    def find(directory: Path, name: str) -> tuple[str | set[str] | None, list]:
        """The clip that has this name near the directory, and those that have it in parallel ones."""
        far = [find_clip(far_clips, other, name) for other in parallel[directory]]
        return find_clip(near_clips, directory, name), [clip for clip in far if clip is not None]

    links = []
    unread = []
    timed = []
    shared = []
    for file in Path(place.base).rglob("*"):
        if file.suffix.lower() in WITH_TIMES:
            timed.append(file)
        is_text = file.suffix.lower() in TEXT_FILES or file.name in TEXT_NAMES
        if not (is_text and file.is_file()):
            continue
        if not file.resolve().is_relative_to(place.base):
            links.append(file)
            continue
        texts = listed_texts(file, is_clip=lambda name, place=file.parent: find(place, name) != (None, []))
        if any("\ufffd" in text for _, text in texts):
            unread.append(file)
        if any(TIMES.match(text) for _, text in texts):
            timed.append(file)
        for name, text in texts:
            near, far = find(file.parent, name)
            text = text.replace("\n", " ").strip()
            exact = [clip for clip in far if isinstance(clip, str)]
            for clip in exact:
                far_texts[clip].add(text)
            if isinstance(near, str):
                near_texts[near].add(text)
            elif near and not exact and len(PureWindowsPath(name).parts) == 1:  # a path means one of them
                for clip in near:
                    shared_texts[clip].add(text)
            elif (near or far) and not exact:
                shared.append(name)
    name_unread(links, "that are links to files elsewhere", "copy the files")
    name_unread(unread, "that are not UTF-8", NOT_UTF8)
    clips = [os.path.splitext(path)[0] for path in paths]
    if not all(near_texts[clip] or far_texts[clip] or shared_texts[clip] for clip in clips):
        name_unread(timed, "with times", CUT_THERE)
        name_unread(shared, "of names that several clips have", "name the directory of those to read")
    return near_texts, far_texts, shared_texts


def add_transcripts(dataset: datasets.Dataset, paths: list[str], place: Place) -> datasets.Dataset:
    """The rows of an audio folder with the texts in its files, where a clip has one text: near it, or else far."""
    near_texts, far_texts, shared_texts = collect_texts(paths, place)
    column = []
    different = {}
    shared = []
    for path in paths:
        clip = os.path.splitext(path)[0]
        found = near_texts[clip] or far_texts[clip]
        if not found and (found := shared_texts[clip]):
            shared.append(path)
        # Whisper's own .txt and .json files differ in their spaces, which Japanese does without.
        is_one = len({"".join(text.split()) for text in found}) == 1
        column.append(min(found, key=len) if is_one else None)
        if found and not is_one:
            different[path] = sorted(found)
    if shared:
        first = f"{len(shared)} clips, such as {shared[0]}"
        logger.warning("%s, have the text of a list above them, which other clips of their name have as well", first)
    if different:
        path, texts = next(iter(different.items()))
        logger.warning("no text for %d clips that have several, such as %s: %s", len(different), path, texts)
    present = [text for text in column if text is not None]
    if not any(present):
        return dataset
    if any("\ufffd" in text for text in present):
        raise ValueError(f"its .txt files are not UTF-8: {NOT_UTF8}")
    if any(map(TIMES.match, present)):
        raise ValueError("its .txt files have times, as Audacity's labels do: cut the audio there, and keep only texts")
    logger.info("%d of %d audio files have texts in files beside them", len(present), len(column))
    return dataset.add_column("transcription", column)


def find_tables(files: list[str], place: Place) -> list[Path]:
    """The tables among the files of a split of an audio folder, or else all in it; none that links elsewhere."""
    clips = {os.path.splitext(os.path.basename(file))[0] for file in files if is_audio(file)}
    own = {f"{clip}{end}" for clip in clips for end in (".txt", ".json", ".info.json")}  # a clip may have these
    below = (os.path.join(directory, name) for directory, _, names in os.walk(place.base) for name in names)
    for candidates in (files, below):
        tables = [Path(file) for file in candidates if file.lower().endswith((".txt", *MANIFESTS))]
        # The copies of Jupyter and the files of macOS are no tables.
        tables = [file for file in tables if file.name not in own and not file.name.startswith(".")]
        tables = [file for file in tables if file.resolve().is_relative_to(place.base) and is_table(file)]
        if tables:
            return sorted(tables)
    return []


def find_clips(names: list[str | None], clips: dict, file: Path, base: str) -> list[str | set[str] | None]:
    """The clips that names in a table mean, by paths from the place of the table, or from that of the dataset.

    As in `find_clip`, a set is a clip that may be any of them.
    """
    found = []
    for name in names:
        fitting = [find_clip(clips, directory, name or "") for directory in (file.parent, Path(base))]
        exact = [clip for clip in fitting if isinstance(clip, str)]
        found.append(next(filter(None, exact + fitting), None))
    return found


def join_paths(table: pa.Table, columns: Sequence[str]) -> list[str | None]:
    """The paths of which columns have the parts. A column may also hold objects with a path."""
    parts = []
    for values in table.select(columns).columns:
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "path")
        parts.append(values.to_pylist())
    return ["/".join(map(str, path)) if None not in path else None for path in zip(*parts, strict=True)]


def naming_columns(table: pa.Table, clips: dict, file: Path, base: str) -> Sequence[str]:
    """The column that names the most clips, as its first cells tell, or such a pair: directory and name. Or none."""
    first = table[:LOOKED_AT]
    usable = []
    for column in table.schema:
        has_path = pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0
        if has_path or pa.types.is_string(column.type):
            usable.append(column.name)
    candidates = [(name,) for name in usable]
    found = {columns: find_clips(join_paths(first, columns), clips, file, base) for columns in candidates}
    # Where several clips have a name, their directories may tell them apart.
    shared = [name for (name,), named in found.items() if any(isinstance(clip, set) for clip in named)]
    pairs = [(directory, name) for name in shared for directory in usable if directory != name]
    found |= {columns: find_clips(join_paths(first, columns), clips, file, base) for columns in pairs}
    numbers = {columns: len({clip for clip in named if isinstance(clip, str)}) for columns, named in found.items()}
    best = max(numbers, key=numbers.get, default=())
    return best if numbers.get(best) else ()


def is_named_after(file: Path, split: str) -> bool:
    """Whether the name of a file says that it is of a split, in one of the ways that `datasets` knows."""
    words = "|".join(map(re.escape, SPLIT_KEYWORDS.get(split, [split])))
    return bool(re.search(SPLIT_FORM.format(words), file.name.lower()))


def choose_tables(
    tables: list[Path], clips: dict, place: Place, split: str, wanted: set[str]
) -> list[tuple[Path, pa.Table, Sequence[str]]]:
    """The tables that name clips and have a wanted column, and their columns that name them.

    Where some are named after the split, they are only these. One that is named after another split is none.
    """
    found = []
    own = []
    for file in tables:
        is_own = is_named_after(file, split)
        if not is_own and SPLIT_IN_NAME.search(file.name.lower()):
            continue
        try:
            table = read_table(str(file), file.suffix.lower())
        except ValueError as error:
            if file.suffix.lower() != ".json":  # which may be anything
                logger.warning("not read: %s", error)
            continue
        if wanted.intersection(table.column_names) and (columns := naming_columns(table, clips, file, place.base)):
            (own if is_own else found).append((file, table, columns))
    return own or found


def name_files(
    file: Path, table: pa.Table, columns: Sequence[str], paths: list[str], clips: dict, base: str
) -> pa.Table:
    """The rows of a table that name clips, with the clip's path, one of `paths`, as `audio` in place of the column."""
    names = join_paths(table, columns)
    path_of = {os.path.splitext(path)[0]: path for path in paths} | {path: path for path in paths}
    audio = []
    for name, clip in zip(names, find_clips(names, clips, file, base), strict=True):
        if isinstance(clip, set):
            clip = None
        same_kind = f"{clip}{os.path.splitext(name or '')[1]}"  # of a.wav and a.m4a, the one that is named
        audio.append(path_of.get(same_kind) or path_of.get(clip))
    missing = pc.is_null(pa.array(audio, pa.string()))
    if number := pc.sum(missing).as_py():
        first = names[audio.index(None)]
        logger.warning("left out: %d rows of %s that name no clip here, such as %s", number, file, first)
    if again := [path for path, number in Counter(filter(None, audio)).items() if number > 1]:
        logger.warning("%d clips have several rows in %s, such as %s: all are read", len(again), file, again[0])
    others = table.select([name for name in table.column_names if name not in (columns[-1], "audio")])
    return others.append_column("audio", pa.array(audio, pa.string())).filter(pc.invert(missing))


def read_listed(
    paths: list[str], tables: list[Path], place: Place, split: str, wanted: set[str]
) -> datasets.Dataset | None:
    """The clips of a split of an audio folder as its tables list them; None where none does, or two have the same."""
    clips, _ = name_clips(paths, place.base)
    chosen = choose_tables(tables, clips, place, split, wanted)
    listed = [name_files(*choice, paths, clips, place.base) for choice in chosen]
    named = [path for table in listed for path in table["audio"].unique().to_pylist()]
    if not named or len(set(named)) < len(named):
        return None
    files = ", ".join(str(file) for file, _, _ in chosen[:10])
    name_left_out(set(paths).difference(named), f"that {files} do not name")
    logger.info("the clips and their texts are those of %s", files)
    return datasets.Dataset(pa.concat_tables(listed, promote_options="permissive"))


def read_local(path: Path, split: str) -> tuple[datasets.Dataset, Place]:
    """A split of a manifest, or of what Kaldi or `save_to_disk` wrote, and where its files lie."""
    is_directory = path.is_dir()
    place = Place(os.path.realpath(path if is_directory else path.parent), is_confined=is_directory)
    if path.name == "wav.scp" or (path / "wav.scp").exists():
        saved = datasets.Dataset(read_kaldi(place))
    elif is_directory:
        saved = datasets.load_from_disk(str(path))
    elif is_table(path):
        saved = datasets.Dataset(read_table(str(path), path.suffix.lower()))
        if any(map(is_audio, saved.column_names)):
            raise ValueError("its first line has to name the columns, such as path and text")
    else:
        kinds = ", ".join(MANIFESTS)
        fail(f"{path} is no dataset: name its directory, or a table of clips ({kinds}). {SAVE_SHEET}")
    if isinstance(saved, datasets.DatasetDict):
        return select_split(saved, split), place
    names = set(split_names(split))
    if len(names) > 1:
        raise ValueError("its rows are those of one split")
    return select_split(dict.fromkeys(names, saved), split), place


def read_repository(
    reference: str, config: str | None, split: str, text_column: str | None, num_proc: int, streaming: bool
) -> tuple[datasets.Dataset | datasets.IterableDataset, Place]:
    """A split of a local directory or a Hub id, by the loader that `datasets` chooses, and where its files lie."""
    builder, files = find_files(reference, config, split)
    directory = local_directory(reference)
    place = Place(os.path.realpath(directory) if directory else builder.base_path, is_confined=True)
    parts = {}
    for name, paths in files.items():
        options = {"num_proc": min(num_proc, len(paths))} if num_proc > 1 else {}
        if streaming and split == name and builder.name != "webdataset":  # whose columns change their order
            options = {"streaming": True}
        if builder.name == "audiofolder":
            options |= {"split": str(name), "text_column": text_column}
        parts[name] = load_part(builder.name, paths, place, **options)
    if builder.name == "audiofolder" and not directory:
        place = Place("", is_confined=False)  # the loader has found and downloaded the files itself
    if split in parts:
        return parts[split], place
    return select_split(parts, split), place


def name_audio(dataset: datasets.Dataset) -> datasets.Dataset:
    """The rows with the only column of audio, or else of paths of audio files, renamed to `audio`."""
    features = dataset.features or {}
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    if not found:
        texts = [name for name, feature in features.items() if feature == datasets.Value("string")]
        found = [name for name in PATH_COLUMNS if name in texts][:1]
        if not found and isinstance(dataset, datasets.Dataset) and len(dataset):
            first = dataset[0]
            found = [name for name in texts if is_audio(first[name] or "")]
    if len(found) != 1:
        return dataset
    logger.info("the audio is in the column %s", found[0])
    return dataset.rename_column(found[0], "audio")


def find_audio(dataset: datasets.Dataset, audio_column: str) -> datasets.Dataset:
    """The rows with undecoded audio in the named column. Without the flag, any other that is the only one will do."""
    if audio_column == "audio" and "audio" not in (dataset.features or {}):  # the flag's default
        dataset = name_audio(dataset)
    if audio_column not in (dataset.column_names or []):
        return dataset
    undecoded = datasets.Audio(sampling_rate=SAMPLING_RATE, decode=False)
    stored = dataset.features[audio_column]
    if isinstance(stored, datasets.List):
        raise ValueError(f"{audio_column} has samples without their rate: store dicts of array and sampling_rate")
    if isinstance(stored, dict) and "array" in stored and isinstance(dataset, datasets.Dataset):
        features = datasets.Features({**dataset.features, audio_column: undecoded})
        return dataset.cast(features)  # some rows at a time, unlike `cast_column`
    return dataset.cast_column(audio_column, undecoded)


def convert_texts(reference: str, dataset: datasets.Dataset, column: str | None) -> datasets.Dataset:
    """The rows with strings in a column of texts, which may have classes. Fails where it holds something else."""
    feature = dataset.features.get(column)
    if feature is None or isinstance(dataset, datasets.IterableDataset):
        return dataset
    stored = dataset.data.column(column)
    values = stored
    if isinstance(feature, datasets.ClassLabel):
        numbers = stored.combine_chunks()
        numbers = pc.if_else(pc.less(numbers, 0), None, numbers)  # -1 is no class
        values = pa.array(feature.names).take(numbers)
    elif feature == datasets.Value("null"):
        values = stored.cast(pa.string())
    elif feature not in (datasets.Value("string"), datasets.Value("large_string")):
        fail(f"{column!r} (--text_column_name) of {reference} is not text: it has the type {stored.type}")
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        fail(f"{column!r} (--text_column_name) of {reference} is not text in UTF-8: {first_line(error)}")
    empty = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(values, "")), "")
    if number := pc.sum(empty).as_py():
        logger.warning("%d of %d rows of %s have no %s", number, len(values), reference, column)
    if values is stored:
        return dataset
    order = dataset.column_names
    return dataset.remove_columns(column).add_column(column, values).select_columns(order)


def name_splits(reference: str, dataset: datasets.Dataset | datasets.IterableDataset) -> None:
    """Warn of a column that says that some rows are of other splits, which are read with the others."""
    if isinstance(dataset, datasets.Dataset) and (dataset.features or {}).get("split") == datasets.Value("string"):
        splits = dataset.unique("split")
        if len(splits) > 1:
            logger.warning("the rows of %s have several splits in a column, and all are read: %s", reference, splits)


def open_dataset(
    reference: str,
    config: str | None,
    split: str,
    audio_column: str,
    text_column: str | None = None,
    dir_suffix: str | None = None,
    num_proc: int = 1,
    streaming: bool = False,
) -> tuple[datasets.Dataset | datasets.IterableDataset, Place]:
    """The rows of a split, with the audio column, where there is one, undecoded, and where the files they name lie.

    `reference` is a .py file with a builder, a manifest or wav.scp, a local directory (a repository, or written by
    `save_to_disk` or Kaldi), or a Hub id. `text_column` must be text, if it is there; the table of an audio folder is
    found by it. `dir_suffix` is for our data loader. `num_proc` processes convert what is not Arrow yet. `streaming`
    prepares nothing in the cache.
    """
    mend_datasets()
    path = Path(reference).expanduser()
    try:
        if path.suffix == ".py":
            builder = load_builder(path, config, dir_suffix)
            place = Place(os.getcwd(), is_confined=False)
            if not streaming:
                builder.download_and_prepare(num_proc=num_proc if num_proc > 1 else None)
            dataset = builder.as_streaming_dataset(split) if streaming else builder.as_dataset(split)
        elif is_repository(reference):
            dataset, place = read_repository(reference, config, split, text_column, num_proc, streaming)
        else:
            dataset, place = read_local(path, split)
        dataset = find_audio(dataset, audio_column)
    except (Unreadable, *LOADING_ERRORS) as error:
        hint = "" if path.exists() else ". Check the name; a private one needs `hf auth login`"
        if choice := re.search(r"available configs: (\[.*?\])", str(error)):
            hint = f". Name one of its configurations: {choice[1]}"
        elif isinstance(error, datasets.exceptions.DataFilesNotFoundError) and path.is_dir():
            hint = f". {NO_FILES}"
        cause = first_line(error.__cause__ or error)
        fail(f"cannot load {config or 'the default configuration'}, {split} of {reference}: {cause}{hint}")
    name_splits(reference, dataset)
    return convert_texts(reference, dataset, text_column), place


def sample_file(path: str, place: Place) -> tuple[int, bytes] | None:
    """Size of a file that a row names, and what lies in its middle; None where it cannot be read."""
    try:
        with fsspec.open(find_file(path, place), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size // 2)
            return size, file.read(SAMPLED_BYTES)
    except (Unreadable, *READING_ERRORS):
        return None


# ---- common: columns -------------------------------------------------------------------------------------------------


def require_columns(reference: str, dataset: datasets.Dataset, columns: dict[str, str | None]) -> None:
    """Fail where a flag names a column that is not there. `columns` are the columns by flag."""
    names = dataset.column_names
    for flag, column in columns.items():
        if column is not None and column not in names:
            hint = missing_column_hint(Path(reference).expanduser(), names, column, flag)
            fail(f"{reference} has no column {column!r} (--{flag}); it has {', '.join(names)}{hint}")


def missing_column_hint(path: Path, names: list[str], column: str, flag: str) -> str:
    """Where a missing column may be, judged by the files of a local directory; empty where nothing tells."""
    if not path.is_dir():
        return ""
    files = sorted(Path(os.path.realpath(path)).rglob("*"))
    place = Place(os.path.realpath(path), is_confined=True)
    tables = find_tables(list(map(str, files)), place)
    audio = [unicodedata.normalize("NFC", str(file)) for file in files if is_audio(file.name)]
    clips, _ = name_clips(audio, place.base)
    columns = {}
    naming = set()
    not_utf8 = []
    for file in tables:
        try:
            table = read_table(str(file), file.suffix.lower())
        except ValueError as error:
            if NOT_UTF8 in str(error):
                not_utf8.append(error)
            continue
        columns[str(file)] = table.column_names
        if naming_columns(table, clips, file, place.base):
            naming.add(str(file))
    if fitting := [table for table, found in columns.items() if column in found]:
        if named := [table for table in fitting if table in naming]:
            return f". Name a table instead of the directory: {', '.join(named[:10])}"
        return f". {fitting[0]} has it, but no paths of audio files: add them in a column file_name"
    if not files or not set(names) <= {"audio", "label", "__key__"}:
        return ""
    packed = [file for file in files if file.name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))]
    if packed := [file for file in packed if not file.with_name(file.name.partition(".")[0]).is_dir()]:
        return f". Unpack {packed[0]}, if the texts lie in it"
    if not_utf8:
        return f". {not_utf8[0]}"
    if sheets := [file for file in files if file.suffix.lower() in SHEETS and not file.name.startswith("~$")]:
        return f". {SAVE_SHEET}, if {sheets[0]} has the texts"
    hint = f". Write it into {path / 'metadata.csv'}, with the columns file_name and {column}"
    if others := [table for table in columns if table in naming]:
        listed = ", ".join(others[:10])
        hint += f", or in a table: name it instead of the directory, and its column by --{flag}: {listed}"
    return hint


# ---- common: names and digests ---------------------------------------------------------------------------------------

SAMPLED_ROWS = 100_000  # the most clips of which `speech_digest` reads a piece


def split_title(split: str) -> str:
    """A split expression as a name for files and splits: `train[10%:]+test` becomes train.10pct_to_and_test."""
    if re.fullmatch(r"\w+(\.\w+)*", split):
        return split
    readable = {" ": "", "[": ".", "]": "", ":": "_to_", "%": "pct", "+": "_and_", "-": "minus"}
    title = split.translate(str.maketrans(readable))
    title = re.sub(r"[^\w.]", "_", title)
    return title.replace("__", "_").replace("._", ".").strip("_")


def speech_digest(dataset: datasets.Dataset, place: Place, audio_column: str, columns: list[str]) -> str:
    """Digest that tells datasets apart, wherever they lie and whenever they were copied.

    It covers the names of all columns, the content of the given ones, the sizes of the audio that lies in the rows, and
    a piece from the middle of each clip. Of more than 100,000 clips, it covers the pieces of every second, third, ...
    """
    digest = hashlib.sha256(json.dumps(dataset.column_names).encode())
    step = max(1, math.ceil(len(dataset) / SAMPLED_ROWS))
    batch_size = 10_000
    stored = dataset.select_columns([audio_column, *columns]).with_format("arrow")
    for start in range(0, len(dataset), batch_size):
        rows = stored[start : start + batch_size]
        contents = pc.struct_field(rows[audio_column], "bytes")
        paths = pc.struct_field(rows[audio_column], "path")
        sizes = pc.binary_length(contents).to_pylist()
        others = rows.drop_columns(audio_column).to_pydict()
        digest.update(json.dumps([sizes, others], default=str).encode())
        first = -start % step  # so that start + first is a multiple of step
        for row in range(first, len(rows), step):
            content = contents[row].as_buffer()
            if content is not None:
                middle = len(content) // 2
                digest.update(content[middle : middle + SAMPLED_BYTES])
            elif path := paths[row].as_py():
                sample = sample_file(path, place)
                digest.update(repr(sample).encode())
    return digest.hexdigest()[:16]


# ---- common: audio ---------------------------------------------------------------------------------------------------

SAMPLING_RATE = 16_000  # Hz; Whisper's
WINDOW_SECONDS = 30  # what Whisper hears at a time
HOP_LENGTH = 160  # samples from one log-mel frame to the next; a frame sees 200 samples to either side of its centre
WINDOW_FRAMES = WINDOW_SECONDS * SAMPLING_RATE // HOP_LENGTH
DAMAGED_BLOCK = 1024  # samples; of damaged files so many are read at a time
UNKNOWN_FORMAT = 1  # libsndfile's code
MP3_RATES = 40  # the highest bit rate of an MP3 divided by the lowest


class Clip(NamedTuple):
    """A decoded clip, or the problem why there is none."""

    waveform: np.ndarray | None = None  # mono float32 at 16 kHz
    samples: int = 0  # of the whole clip at 16 kHz, also where the waveform is cut
    seconds: float = 0.0  # of the whole clip
    problem: str | None = None


class Stream(soundfile.SoundFile):
    """An audio file that is read to its end, because its header may only estimate the number of frames."""

    def seekable(self) -> bool:
        return False


class Lengthened(io.BytesIO):
    """A file that claims to be longer than it is. libsndfile guesses from this how many frames an MP3 has at most."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END and offset == 0:
            return super().seek(MP3_RATES * self.getbuffer().nbytes)
        return super().seek(offset, whence)


def open_stream(content: bytes) -> Stream:
    """Open an audio file for reading, whatever its header says of its length."""
    if content.startswith(b"RIFF"):  # a WAV that was written to a pipe: its length was to be filled in later
        content = content[:4096].replace(b"data\0\0\0\0", b"data\xff\xff\xff\xff", 1) + content[4096:]
    stream = Stream(io.BytesIO(content))
    tells_length = re.search(b"Xing|Info|VBRI", content[:65536])  # in the first frame of an MP3
    if stream.format == "MP3" and not tells_length:
        return Stream(Lengthened(content))
    return stream


def decode_clip(content: bytes | None, whole: bool = False, block_size: int = 2**19) -> Clip:
    """Decode an audio file to mono float32 at 16 kHz: its first 30 s, or all of it if `whole`.

    The file is read as far as it decodes, whatever its header says and whatever is damaged after that. `block_size` is
    the number of samples to read at a time: large blocks are faster, and small ones lose less to damage.
    """
    if not content:
        return Clip(problem="no audio")
    if content.startswith(LFS_POINTER):
        return Clip(problem=f"no audio, but {GET_LFS_FILES}")
    kept = []
    frames = 0
    problem = "zero length"
    try:
        with open_stream(content) as file:
            rate = file.samplerate
            if not 1000 <= rate <= 1_000_000:
                return Clip(problem=f"a sampling rate of {rate} Hz")
            # A second more than what is heard, so that resampling sees what follows the cut.
            needed = math.inf if whole else (WINDOW_SECONDS + 1) * rate
            while True:
                # A short clip needs no large buffer. Its header may tell of too few frames.
                expected = max(DAMAGED_BLOCK, file.frames - frames)
                block_frames = max(1, min(expected, block_size // file.channels))
                block = file.read(block_frames, dtype="float32", always_2d=True)  # (frames, channels)
                if not len(block):
                    break
                if not np.isfinite(block).all():
                    return Clip(problem="samples that are not finite numbers")
                if frames < needed:
                    kept.append(block.mean(axis=1))
                frames += len(block)
    except soundfile.LibsndfileError as error:
        if block_size > DAMAGED_BLOCK:
            return decode_clip(content, whole, DAMAGED_BLOCK)
        problem = f"undecodable audio: {error.error_string.strip('. ')}"
        if error.code == UNKNOWN_FORMAT:
            problem += ". Convert it, for example: ffmpeg -i FILE -ar 16000 FILE.flac"
    if not frames:
        return Clip(problem=problem)
    waveform = np.concatenate(kept)
    if rate != SAMPLING_RATE:
        waveform = librosa.resample(waveform, orig_sr=rate, target_sr=SAMPLING_RATE)
    if not whole:
        waveform = waveform[: WINDOW_SECONDS * SAMPLING_RATE]
    return Clip(waveform, math.ceil(frames * SAMPLING_RATE / rate), frames / rate)


def resolve_file(file: str, base: str) -> str:
    """The full path of a local file that a row names: as it is, by Windows' separators, beside a table, by its stem."""
    forms = [
        file,
        file.replace("\\", "/"),
        unicodedata.normalize("NFC", file),
        unicodedata.normalize("NFD", file),
        *(f"{directory}/{file}" for directory in AUDIO_DIRECTORIES),
    ]
    if not is_audio(file):
        forms += [f"{form}{suffix}" for form in forms for suffix in AudioFolder.EXTENSIONS]
    paths = [os.path.join(base, form) for form in forms]
    found = next(filter(os.path.exists, paths), None) or find_below(file, base)
    return os.path.realpath(found or paths[0])


def find_below(file: str, base: str) -> str | None:
    """A file that is not where its row says: by the end of its path, or by a bare name that one file below has."""
    parts = PureWindowsPath(file).parts
    if len(parts) == 1:
        return files_by_name(base).get(file)
    # Not by the name alone, which another clip may have.
    ends = (os.path.join(base, *parts[start:]) for start in range(1, len(parts) - 1))
    return next(filter(os.path.exists, ends), None)


@functools.cache
def files_by_name(base: str) -> dict[str, str | None]:
    """The audio files below a directory by their names, with and without suffix; None where two have the name."""
    found = {}
    for directory, _, names in os.walk(base):
        for name in filter(is_audio, names):
            for key in (name, os.path.splitext(name)[0]):
                found[key] = None if key in found else os.path.join(directory, name)
    return found


def find_file(path: str, place: Place) -> str:
    """Where a file lies that a row names. Raises Unreadable where it is not there, or must not be read."""
    inner, separator, file = path.rpartition("::")  # a file in a zip: zip://clip.flac::/data/train.zip
    is_url = "://" in file
    if is_url and not place.is_confined:
        return path
    is_in_zip = inner.startswith("zip://") and "::" not in inner
    is_foreign = is_url or (separator and not is_in_zip)
    if place.base.startswith("hf://"):
        name = os.path.normpath(file)
        if is_foreign or os.path.isabs(name) or name.startswith(".."):
            raise Unreadable(f"not in the dataset: {path}")
        return f"{inner}{separator}{place.base}/{name}"
    full = resolve_file(file, place.base)
    root = re.sub(r"/snapshots/[^/]+$", "", place.base)  # the Hub's cache links to blobs beside its snapshots
    if place.is_confined and (is_foreign or os.path.commonpath([root, full]) != root):
        target = f", a link to {full}" if os.path.islink(os.path.join(place.base, file)) else ""
        raise Unreadable(f"not in the dataset: {path}{target}")
    if not os.path.exists(full):
        origin = "" if place.is_confined or os.path.isabs(path) else f" (paths count from {place.base})"
        raise Unreadable(f"file not found: {path}{origin}")
    if not os.path.isfile(full) or full.startswith(("/proc/", "/sys/")):
        raise Unreadable(f"not a regular file: {path}")
    return inner + separator + full


def read_audio(audio: dict | None, place: Place) -> bytes:
    """The encoded bytes of an undecoded value of an audio column, which may only name a file."""
    if audio and audio["bytes"] is None and audio["path"]:
        try:
            with fsspec.open(find_file(audio["path"], place), "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise Unreadable(f"file not found: {audio['path']}") from None
        except READING_ERRORS as error:
            raise Unreadable(f"cannot read {audio['path']}: {first_line(error)}") from None
    if not audio or not audio["bytes"]:
        raise Unreadable("no audio")
    return audio["bytes"]


def load_clip(audio: dict | None, place: Place, whole: bool = False) -> Clip:
    """Read and decode an undecoded value of an audio column."""
    try:
        return decode_clip(read_audio(audio, place), whole)
    except Unreadable as error:
        return Clip(problem=str(error))


def filled_frames(samples: int) -> int:
    """Log-mel frames of a clip up to the first padded one; all later ones are equal to that one."""
    return min(WINDOW_FRAMES, math.ceil((samples + 200) / HOP_LENGTH) + 1)


def log_mel_on_device(waveforms: torch.Tensor, extractor: WhisperFeatureExtractor) -> torch.Tensor:
    """(clips, samples) -> (clips, mels, frames): the extractor's computation, whose result stays on the device."""
    window = torch.hann_window(extractor.n_fft, device=waveforms.device)
    stft = torch.stft(waveforms, extractor.n_fft, extractor.hop_length, window=window, return_complex=True)
    power = (stft[..., :-1].abs() ** 2).contiguous()
    filters = torch.from_numpy(extractor.mel_filters).to(waveforms.device, torch.float32, non_blocking=True)
    log_power = (filters.T @ power).clamp(min=1e-10).log10()
    loudest = log_power.amax((1, 2), keepdim=True)
    return (torch.maximum(log_power, loudest - 8.0) + 4.0) / 4.0


def log_mel(waveforms: list[np.ndarray], extractor: WhisperFeatureExtractor, device: str = "cpu") -> torch.Tensor:
    """Whisper's log-mel of clips of at most 30 s, float32 (clips, mels, frames), as far as the longest clip fills it.

    Padding to 30 s instead changes no bit: all padded frames are one constant, and the one that is kept brings this
    constant into the clip's maximum. `pad_window` gives the frames that are left out.
    """
    samples = HOP_LENGTH * filled_frames(max(len(waveform) for waveform in waveforms))
    if device != "cpu":
        padded = torch.zeros(len(waveforms), samples)
        for row, waveform in zip(padded, waveforms, strict=True):
            row[: len(waveform)] = torch.from_numpy(waveform)
        if device.startswith("cuda"):
            padded = padded.pin_memory()  # so that the host does not wait for the copy
        return log_mel_on_device(padded.to(device, non_blocking=True), extractor)
    features = extractor(waveforms, sampling_rate=SAMPLING_RATE, max_length=samples, return_tensors="pt")
    return features.input_features


def pad_window(features: torch.Tensor) -> torch.Tensor:
    """(..., mels, frames) -> (..., mels, 3000): the last frame repeated, as all padded frames of a clip are equal."""
    missing = WINDOW_FRAMES - features.shape[-1]
    padding = features[..., -1:].expand(*features.shape[:-1], missing)
    return torch.cat([features, padding], dim=-1)


# ---- common: greedy decoding -----------------------------------------------------------------------------------------

MOST_CLIPS = 128  # per batch by default; the arithmetic of a larger one takes as long per clip
FEWEST_SLOTS = 8  # that a step computes on a GPU; fewer would not be faster
ENCODED_TOGETHER = 16  # clips; a GPU takes as long per clip for more
CHECK_STEPS = 4  # decoder steps between two looks at which clips have ended, for which the host waits for a GPU
PLAIN_SETTINGS = {  # of a generation config: names and rules that GreedyDecoder follows, directly or by `generate`
    *("alignment_heads", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "eos_token_id"),
    *("forced_decoder_ids", "is_multilingual", "lang_to_id", "language", "max_initial_timestamp_index"),
    *("max_length", "max_new_tokens", "no_timestamps_token_id", "pad_token_id", "prev_sot_token_id"),
    *("return_timestamps", "suppress_tokens", "task", "task_to_id", "transformers_version", "use_cache"),
    "_from_model_config",
}


def other_rules(config: GenerationConfig) -> set[str]:
    """The settings of a generation config that GreedyDecoder does not know: `generate` itself has to decode then."""
    unknown = set(config.to_diff_dict()) - PLAIN_SETTINGS
    if not isinstance(config.eos_token_id, int):
        unknown.add("eos_token_id")
    if unknown:
        names = ", ".join(sorted(unknown))
        logger.warning("generation_config.json sets %s: `generate` decodes, which is slower on a GPU", names)
    return unknown


def fitting_batch(
    model: WhisperForConditionalGeneration, max_length: int, num_beams: int, by_generate: bool, cpu_batch: int
) -> int:
    """How many clips of `max_length` tokens a GPU's free memory holds, at most MOST_CLIPS; `cpu_batch` on a CPU."""
    if model.device.type != "cuda":
        return cpu_batch
    config = model.config
    # What follows is in bytes, of one clip.
    position = 2 * config.decoder_layers * config.d_model * model.dtype.itemsize  # keys and values of all layers
    audio = position * config.max_source_positions
    text = position * max_length
    scores = 6 * 4 * config.vocab_size  # in float32, and what is computed of them
    # The widest states of the encoder are there some four times, of the clips that are encoded at a time.
    states = 4 * config.max_source_positions * config.encoder_ffn_dim * model.dtype.itemsize
    encoded = 1 if by_generate else 1 / 4  # GreedyDecoder encodes at most a quarter of them
    clip = num_beams * (audio + text + scores) + encoded * states
    free, _ = torch.cuda.mem_get_info(model.device)
    number = min(MOST_CLIPS, max(1, int(0.9 * free / clip)))
    logger.info("--per_device_eval_batch_size is not set: %d, for %.1f GB of free memory", number, free / 1e9)
    return number


def halved(batch_size: int, reason: str) -> int:
    """The batch size to go on with after the device's memory has run out."""
    if batch_size == 1:
        fail(f"the device has not enough memory for one clip: {reason}")
    batch_size = math.ceil(batch_size / 2)
    logger.warning("out of memory: batches of %d for the rest of the run", batch_size)
    torch.cuda.empty_cache()
    return batch_size


def tell_work(
    work: str, args: argparse.Namespace, accelerator: Accelerator, batch_size: int, left: int, shards: int
) -> None:
    """Log what a run does: its `work`, such as "labelling", the dataset, model and device, and the shards left."""
    logger.info(
        "%s %s of %s with %s: %s, %s, batches of %d, processes: %d; %d of %d shards are left",
        work,
        args.dataset_split_name,
        args.dataset_name,
        args.model_name_or_path,
        device_name(accelerator.device),
        args.dtype,
        batch_size,
        accelerator.num_processes,
        left,
        shards,
    )


class BatchDecoder:
    """Decoding batch by batch, by a function that decodes one: for beams and whatever GreedyDecoder does not do."""

    def __init__(self, batch_size: int, decode_batch: Callable[[list[np.ndarray]], list]):
        self.batch_size = batch_size
        self.decode_batch = decode_batch

    def decode(self, waveforms: Iterable[np.ndarray]) -> Iterator[tuple[int, Any]]:
        """The number of each clip and what the function gives for it. Batches are halved when memory runs out."""
        left = list(waveforms)
        number = 0
        while left:
            try:
                results = self.decode_batch(left[: self.batch_size])
            except torch.OutOfMemoryError as error:
                results = None
                reason = first_line(error)
            if results is None:  # here, because in the `except` block the traceback still holds on to tensors
                self.batch_size = halved(self.batch_size, reason)
                continue
            del left[: len(results)]
            yield from enumerate(results, number)
            number += len(results)


def encode(
    model: WhisperForConditionalGeneration, extractor: WhisperFeatureExtractor, waveforms: list[np.ndarray]
) -> BaseModelOutput:
    """The encoder's states of clips of at most 30 s: (clips, 1500, width)."""
    features = log_mel(waveforms, extractor, str(model.device))  # (clips, mels, frames)
    encoder = model.get_encoder()
    return encoder(pad_window(features).to(model.device, model.dtype))


def timestamp_rules(
    scores: torch.Tensor,
    first_timestamp: int,
    end: int,
    last_is_time: torch.Tensor,
    before_is_time: torch.Tensor,
    latest: torch.Tensor,
) -> None:
    """Apply Whisper's rules for timestamps to scores (rows, vocabulary), in place and without asking for any value.

    They are those that WhisperTimeStampLogitsProcessor applies from the second token of a text on; those for the first
    are in `GreedyDecoder.never_first`. Between two pieces of text stand two timestamps, a pair: the end of one and the
    start of the next.

    Args:
        first_timestamp: id of <|0.00|>.
        last_is_time, before_is_time: whether the last token is a timestamp, and the one before it. (rows,)
        latest: the latest timestamp; the id before <|0.00|> where there is none. (rows,)
    """
    is_first = last_is_time & ~before_is_time  # of a pair
    is_second = last_is_time & before_is_time
    lowest = torch.where(is_first, latest, latest + 1)  # the second of a pair may repeat the first; others are later
    scores[:, :end].masked_fill_(is_first[:, None], -math.inf)  # either the end or the second timestamp of the pair
    times = scores[:, first_timestamp:]
    ids = torch.arange(first_timestamp, scores.shape[1], device=scores.device)
    times.masked_fill_(is_second[:, None] | (ids < lowest[:, None]), -math.inf)
    logprobs = scores.log_softmax(-1)
    time_logprob = logprobs[:, first_timestamp:].logsumexp(-1)
    best_text_logprob = logprobs[:, :first_timestamp].amax(-1)
    scores[:, :first_timestamp].masked_fill_((time_logprob > best_text_logprob)[:, None], -math.inf)


def attend(
    attention: WhisperAttention,
    hidden: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one token per row, hidden (rows, 1, width), to keys and values (rows, heads, positions, size)."""
    rows, heads, _, size = keys.shape
    query = (attention.q_proj(hidden) * attention.scaling).view(rows, 1, heads, size).transpose(1, 2)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
    return attention.out_proj(mixed.transpose(1, 2).reshape(rows, 1, heads * size))


@dataclass
class Slots:
    """Fixed memory for the clips that are being decoded, a slot each."""

    sequences: torch.Tensor  # (slots, length); from <|startoftranscript|> on
    position: torch.Tensor  # (slots,); of the last token in its sequence
    ended: torch.Tensor  # (slots,); also of a slot without a clip
    before_is_time: torch.Tensor  # (slots,); whether the token before the last one is a timestamp
    latest: torch.Tensor  # (slots,); the latest timestamp
    keys_values: list[tuple[torch.Tensor, ...]]  # by layer: keys and values of the text, keys and values of the audio

    def first(self, number: int) -> "Slots":
        """The first slots, in the same memory."""
        return Slots(**slice_tensors(vars(self), slice(number)))

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Move clips to other slots."""
        state = [self.sequences, self.position, self.ended, self.before_is_time, self.latest]
        for tensor in itertools.chain(state, *self.keys_values):
            tensor[targets] = tensor[sources]


class GreedyDecoder:
    """Greedy decoding of many clips of at most 30 s, whose step is one CUDA graph where there is a GPU.

    All steps work in fixed memory and ask nothing of the host, which looks every few steps which clips have ended; the
    next ones take their slots. Where float32 computes, each sequence is what `generate` gives for the clip alone.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        extractor: WhisperFeatureExtractor,
        batch_size: int,
        max_new_tokens: int,
        return_timestamps: bool,
        language: str | None = None,
        task: str | None = None,
    ):
        """Without a language, a multilingual model detects that of each clip. An English-only one takes no task."""
        self.model = model
        self.extractor = extractor
        self.batch_size = batch_size
        rules = model.generation_config
        self.prompt = [rules.decoder_start_token_id]  # the tokens before a text, as `generate` puts them there
        if rules.is_multilingual:
            language_id = rules.lang_to_id[f"<|{language}|>"] if language else None  # None = to be detected
            self.prompt += [language_id, rules.task_to_id[task]]
        if not return_timestamps:
            self.prompt.append(rules.no_timestamps_token_id)
        self.length = len(self.prompt) + max_new_tokens
        self.end = rules.eos_token_id
        self.first_timestamp = rules.no_timestamps_token_id + 1 if return_timestamps else None
        self.never = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
        self.never[rules.suppress_tokens or []] = True
        self.never_first = torch.zeros_like(self.never)
        self.never_first[rules.begin_suppress_tokens or []] = True
        if return_timestamps:
            self.never[rules.no_timestamps_token_id] = True
            self.never_first[: self.first_timestamp] = True
            if rules.max_initial_timestamp_index is not None:
                self.never_first[self.first_timestamp + rules.max_initial_timestamp_index + 1 :] = True
        self.on_gpu = model.device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Give the memory back."""
        self.slots: Slots | None = None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by the number of slots that a step computes

    def make_slots(self) -> Slots:
        """Memory for as many clips as a batch has."""
        config = self.model.config
        heads = config.decoder_attention_heads

        def memory(positions: int) -> torch.Tensor:
            size = config.d_model // heads
            return torch.zeros(self.batch_size, heads, positions, size, dtype=self.model.dtype)

        positions = (self.length, self.length, config.max_source_positions, config.max_source_positions)
        with self.model.device:
            return Slots(
                sequences=torch.zeros(self.batch_size, self.length, dtype=torch.long),
                position=torch.zeros(self.batch_size, dtype=torch.long),
                ended=torch.ones(self.batch_size, dtype=torch.bool),
                before_is_time=torch.zeros(self.batch_size, dtype=torch.bool),
                latest=torch.zeros(self.batch_size, dtype=torch.long),
                keys_values=[tuple(map(memory, positions)) for _ in range(config.decoder_layers)],
            )

    def fill(self, states: BaseModelOutput, targets: list[int]) -> None:
        """Put the prompts of clips, and the keys and values of their audio, into these slots."""
        if self.slots is None:
            self.slots = self.make_slots()
        slots = self.slots
        rows = torch.tensor(targets).to(self.model.device, non_blocking=True)
        for position, token in enumerate(self.prompt):
            if token is None:  # the language
                rules = self.model.generation_config
                token = self.model.detect_language(encoder_outputs=states, generation_config=rules)
            slots.sequences[rows, position] = token
        slots.position[rows] = 0
        slots.ended[rows] = False
        if self.first_timestamp:
            slots.latest[rows] = self.first_timestamp - 1
        audio = states.last_hidden_state
        for layer, (_, _, keys, values) in zip(self.model.model.decoder.layers, slots.keys_values, strict=True):
            shape = (len(targets), audio.shape[1], keys.shape[1], keys.shape[3])
            keys[rows] = layer.encoder_attn.k_proj(audio).view(shape).transpose(1, 2)
            values[rows] = layer.encoder_attn.v_proj(audio).view(shape).transpose(1, 2)

    def next_logits(self, slots: Slots, token: torch.Tensor) -> torch.Tensor:
        """Put the last tokens (slots,) into the decoder; the logits (slots, vocabulary) of the next ones."""
        decoder = self.model.model.decoder
        number, heads, length, size = slots.keys_values[0][0].shape
        rows = torch.arange(number, device=token.device)
        hidden = (decoder.embed_tokens(token) + decoder.embed_positions.weight[slots.position])[:, None]
        unseen = torch.arange(length, device=token.device) > slots.position[:, None]
        mask = hidden.new_zeros(number, 1, 1, length).masked_fill_(unseen[:, None, None], -math.inf)
        for layer, (keys, values, audio_keys, audio_values) in zip(decoder.layers, slots.keys_values, strict=True):
            normed = layer.self_attn_layer_norm(hidden)
            keys[rows, :, slots.position] = layer.self_attn.k_proj(normed).view(number, heads, size)
            values[rows, :, slots.position] = layer.self_attn.v_proj(normed).view(number, heads, size)
            hidden = hidden + attend(layer.self_attn, normed, keys, values, mask)
            normed = layer.encoder_attn_layer_norm(hidden)
            hidden = hidden + attend(layer.encoder_attn, normed, audio_keys, audio_values)
            normed = layer.final_layer_norm(hidden)
            hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        return self.model.proj_out(decoder.layer_norm(hidden))[:, 0].float()

    def step(self, slots: Slots) -> None:
        """One more token for each clip that has not ended; those of its prompt are in their places already.

        A CUDA graph forbids to ask the host for anything here.
        """
        token = slots.sequences.gather(1, slots.position[:, None])[:, 0]
        scores = self.next_logits(slots, token).masked_fill_(self.never, -math.inf)
        is_first = slots.position == len(self.prompt) - 1  # the next token is the first of the text
        scores.masked_fill_(is_first[:, None] & self.never_first, -math.inf)
        if self.first_timestamp:
            last_is_time = token >= self.first_timestamp
            timestamp_rules(scores, self.first_timestamp, self.end, last_is_time, slots.before_is_time, slots.latest)
            # Where a text has one token, the rules take it for granted that a timestamp is before it.
            slots.before_is_time.copy_(torch.where(slots.ended, slots.before_is_time, last_is_time | is_first))
        slots.position.add_(~slots.ended)  # that of the new token; a clip that has ended stays where it is
        position = slots.position[:, None]
        present = slots.sequences.gather(1, position)[:, 0]
        is_given = slots.ended | (slots.position < len(self.prompt))
        chosen = torch.where(is_given, present, scores.argmax(-1))
        slots.latest.copy_(torch.maximum(slots.latest, chosen))
        slots.sequences.scatter_(1, position, chosen[:, None])
        slots.ended.logical_or_((chosen == self.end) | (slots.position == self.length - 1))

    def capture(self, slots: Slots) -> torch.cuda.CUDAGraph | None:
        """Record a step as a CUDA graph; None where that fails, and steps are then launched kernel by kernel.

        Meanwhile all clips count as ended, so that nothing changes for them.
        """
        ended = slots.ended.clone()
        slots.ended.fill_(True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries set themselves up in their first calls
                    self.step(slots)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self.step(slots)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning("decoding is slow, as its step cannot be a CUDA graph: %s", first_line(error))
            graph = None
        slots.ended.copy_(ended)
        return graph

    def run_steps(self, number: int) -> None:
        """Take some steps of the first `number` slots, or of more: a GPU has graphs for all, for half, and so on."""
        size = number
        if self.on_gpu:
            size = self.batch_size
            while size // 2 >= max(number, FEWEST_SLOTS):
                size //= 2
            if size not in self.graphs:
                self.graphs[size] = self.capture(self.slots.first(size))
        slots = self.slots.first(size)
        graph = self.graphs.get(size)
        for _ in range(CHECK_STEPS):
            if graph:
                graph.replay()
            else:
                self.step(slots)
        if self.on_gpu:
            self.stepped = torch.cuda.current_stream().record_event()

    def encode_group(self, waveforms: list[np.ndarray]) -> BaseModelOutput:
        """The states of clips that take their slots together."""
        return encode(self.model, self.extractor, waveforms)

    def decode_in_slots(self, waveforms: dict[int, np.ndarray]) -> Iterator[tuple[int, list[int]]]:
        """`decode` without the halving."""
        numbers = list(waveforms)
        size = min(ENCODED_TOGETHER, math.ceil(self.batch_size / 4))
        groups = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        states = None  # of the next group, once it is encoded
        clips: dict[int, int] = {}  # their numbers, by slot
        while groups or clips:
            free = [slot for slot in range(self.batch_size) if slot not in clips]
            while groups and len(free) >= len(groups[0]):
                group = groups.pop(0)
                targets = free[: len(group)]
                self.fill(states or self.encode_group([waveforms[number] for number in group]), targets)
                states = None
                clips |= zip(targets, group, strict=True)
                del free[: len(group)]
            if not groups:
                self.close_ranks(clips)
            self.run_steps(1 + max(clips))
            if groups and states is None:
                # A GPU has this to do while the host looks which clips have ended.
                states = self.encode_group([waveforms[number] for number in groups[0]])
            yield from self.take_ended(clips)

    def take_ended(self, clips: dict[int, int]) -> Iterator[tuple[int, list[int]]]:
        """Take the clips that have ended out of their slots: their numbers and sequences.

        On a GPU, this waits for the steps, but not for what was queued after them.
        """
        beside = contextlib.nullcontext()
        if self.on_gpu:
            stream = torch.cuda.Stream()
            stream.wait_event(self.stepped)
            beside = torch.cuda.stream(stream)
        with beside:
            ended = self.slots.ended.tolist()
            positions = self.slots.position.tolist()
            sequences = self.slots.sequences.tolist()
        for slot in [slot for slot in clips if ended[slot]]:
            yield clips.pop(slot), sequences[slot][: positions[slot] + 1]

    def close_ranks(self, clips: dict[int, int]) -> None:
        """Move the clips of the last slots into those in front that are free, so that a step computes fewer slots."""
        sources = [slot for slot in clips if slot >= len(clips)]
        targets = [slot for slot in range(len(clips)) if slot not in clips]
        if sources:
            self.slots.move(sources, targets)
            for source, target in zip(sources, targets, strict=True):
                clips[target] = clips.pop(source)

    @torch.inference_mode()
    def decode(self, waveforms: Iterable[np.ndarray]) -> Iterator[tuple[int, list[int]]]:
        """The number and the sequence of each clip, as they end; one without an end token has come to the limit.

        The order of the work depends on the clips alone. Batches are halved when the device's memory runs out.
        """
        left = dict(enumerate(waveforms))
        while left:
            try:
                for clip, sequence in self.decode_in_slots(left):
                    yield clip, sequence
                    del left[clip]
            except torch.OutOfMemoryError as error:
                reason = first_line(error)
            if left:  # memory has run out
                self.forget()
                self.batch_size = halved(self.batch_size, reason)


# ---- labels ----------------------------------------------------------------------------------------------------------


@dataclass
class TeacherLabel:
    """The teacher's label for a clip, and its scores."""

    ids: list[int]  # from <|startoftranscript|> to one <|endoftext|>
    truncated: bool  # the length limit came before <|endoftext|>
    avg_logprob: float = math.nan
    no_speech_prob: float = math.nan


def finish_label(sequence: list[int], prefix_length: int, end: int) -> TeacherLabel:
    """The label in a sequence that was decoded: without padding, and with one end token.

    A sequence without an end token was cut at the length limit; its last token is replaced by the end token.
    """
    if end not in sequence[prefix_length:]:
        return TeacherLabel([*sequence[:-1], end], truncated=True)
    length = sequence.index(end, prefix_length) + 1
    return TeacherLabel(sequence[:length], truncated=False)


def timestamps_are_paired(text: list[int], timestamps: range) -> bool:
    """Whether timestamps open and close every stretch of a text (without prefix and end token) and never go back."""
    is_open = False
    latest = timestamps.start
    for token in text:
        if token in timestamps:
            if token < latest:
                return False
            is_open = not is_open
            latest = token
        elif not is_open:
            return False
    return not is_open


def decode_with_timestamps(ids: list[int], tokenizer: WhisperTokenizerFast, timestamps: range) -> str:
    """A label's text with its timestamps, such as `<|1.08|>`, and without special tokens.

    The tokenizer's own `decode` would turn added tokens, whose ids follow the timestamps', into times after 30 s.
    """
    decoded = ""
    for is_timestamp, tokens in itertools.groupby(ids, timestamps.__contains__):
        if is_timestamp:
            decoded += "".join(f"<|{timestamps.index(token) * 0.02:.2f}|>" for token in tokens)
        else:
            decoded += tokenizer.decode(list(tokens), skip_special_tokens=True)
    return decoded


class TokenLogprobs(LogitsProcessor):
    """Log-probabilities of the tokens that `generate` may choose, noted while it runs.

    As in openai-whisper's DecodingResult they are of the scores after suppression and timestamp rules.
    """

    def __init__(self, prefix_length: int, num_beams: int):
        self.prefix_length = prefix_length
        self.num_beams = num_beams
        self.by_text: dict[tuple, dict[int, float]] = {}  # clip and text so far: log-probabilities of the next token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best = scores.float().log_softmax(-1).topk(2 * self.num_beams)  # beam search chooses among these
        tokens = best.indices.tolist()
        logprobs = best.values.tolist()
        for row, text in enumerate(input_ids[:, self.prefix_length :].tolist()):
            clip = row // self.num_beams
            self.by_text[clip, tuple(text)] = dict(zip(tokens[row], logprobs[row], strict=True))
        return scores

    def mean(self, clip: int, text: list[int]) -> float:
        """Mean log-probability of the tokens of a clip's text."""
        logprobs = []
        for position, token in enumerate(text):
            best = self.by_text[clip, tuple(text[:position])]
            logprobs.append(best.get(token, min(best.values())))  # a token outside the top k scores as much as the k-th
        return np.mean(logprobs)


# ---- teacher ---------------------------------------------------------------------------------------------------------


@dataclass
class Teacher:
    """A Whisper and how it is asked for labels."""

    args: argparse.Namespace
    model: WhisperForConditionalGeneration
    extractor: WhisperFeatureExtractor
    tokenizer: WhisperTokenizerFast
    vocabulary: dict[str, int]
    prompt: dict[str, str]  # language and task for `generate`
    prefix_length: int  # tokens of a label before its text

    @functools.cached_property
    def decoder(self) -> GreedyDecoder | BatchDecoder:
        """Chosen at its first use, because only the dataset's columns settle whether scores are stored."""
        return choose_decoder(self)

    @property
    def timestamps(self) -> range:
        """The ids of <|0.00|> to <|30.00|>."""
        first = self.vocabulary["<|notimestamps|>"] + 1
        return range(first, first + TIMESTAMPS)


def load_teacher(args: argparse.Namespace, device: torch.device) -> Teacher:
    """Load the teacher, after every check that does not need its weights."""
    reference = args.model_name_or_path
    config = load_config(reference)
    tokenizer = load_tokenizer(reference)
    vocabulary = tokenizer.get_vocab()
    extractor = load_pretrained(WhisperFeatureExtractor, reference)
    refuse_other_sizes(reference, config, vocabulary, extractor)
    prompt = prompt_arguments(reference, vocabulary, args.language, args.task)
    prefix_length = 3 if prompt else 1  # <|startoftranscript|>, language, task
    if not args.return_timestamps:
        prefix_length += 1  # <|notimestamps|>
    longest = config.max_target_positions
    if not prefix_length + 2 <= args.max_label_length <= longest:
        fail(f"--max_label_length {args.max_label_length} must be within {prefix_length + 2} and {longest}")

    model = load_whisper(
        reference,
        load_generation_config(reference, config, vocabulary),
        dtype=getattr(torch, args.dtype),
        attn_implementation=choose_attention(args.attn_type, args.dtype, device),
    )
    spare_copies(model).to(device).eval()
    model.generation_config.max_length = None
    model.generation_config.max_new_tokens = args.max_label_length - prefix_length
    return Teacher(args, model, extractor, tokenizer, vocabulary, prompt, prefix_length)


def choose_decoder(teacher: Teacher) -> GreedyDecoder | BatchDecoder:
    """What decodes clips: `generate`, where GreedyDecoder does not know the rules or the scores that are asked for."""
    args = teacher.args
    model = teacher.model
    num_beams = args.generation_num_beams
    by_generate = num_beams > 1 or args.scores or bool(other_rules(model.generation_config))
    batch_size = args.per_device_eval_batch_size
    if batch_size is None:
        batch_size = fitting_batch(model, args.max_label_length, num_beams, by_generate, CPU_BATCH)
    if by_generate:
        return BatchDecoder(batch_size, functools.partial(label_batch, teacher))
    max_new_tokens = model.generation_config.max_new_tokens
    return GreedyDecoder(model, teacher.extractor, batch_size, max_new_tokens, args.return_timestamps, **teacher.prompt)


@torch.inference_mode()
def label_batch(teacher: Teacher, waveforms: list[np.ndarray]) -> list[TeacherLabel]:
    """Labels of clips of at most 30 s (mono, 16 kHz) by `generate`."""
    args = teacher.args
    logprobs = TokenLogprobs(teacher.prefix_length, args.generation_num_beams)
    states = encode(teacher.model, teacher.extractor, waveforms)
    sequences = teacher.model.generate(
        encoder_outputs=states,
        **teacher.prompt,
        return_timestamps=args.return_timestamps,
        num_beams=args.generation_num_beams,
        do_sample=False,
        force_unique_generate_call=True,  # one window, and the whole sequence with prefix and end token
        logits_processor=[logprobs] if args.scores else None,
    )
    end = teacher.vocabulary["<|endoftext|>"]
    labels = [finish_label(sequence, teacher.prefix_length, end) for sequence in sequences.tolist()]
    if args.scores:
        no_speech = no_speech_probs(teacher, states, sequences)
        for clip, label in enumerate(labels):
            text = label.ids[teacher.prefix_length :]
            if label.truncated:
                text = text[:-1]  # finish_label added this end token
            label.avg_logprob = logprobs.mean(clip, text)
            label.no_speech_prob = no_speech[clip]
    return labels


def no_speech_probs(teacher: Teacher, states: BaseModelOutput, sequences: torch.Tensor) -> list[float]:
    """Probability of <|nospeech|> behind <|startoftranscript|>, as openai-whisper's `transcribe` has it."""
    token = teacher.vocabulary.get("<|nospeech|>")
    if token is None:
        token = teacher.vocabulary["<|nocaptions|>"]  # its name before large-v3
    start = sequences[:, :1]
    logits = teacher.model(encoder_outputs=states, decoder_input_ids=start).logits  # (clips, 1, vocabulary)
    probs = logits[:, 0].float().softmax(-1)
    return probs[:, token].tolist()


def label_clips(teacher: Teacher, waveforms: Iterable[np.ndarray]) -> Iterator[tuple[int, TeacherLabel]]:
    """The number of each clip and its label, as they are made."""
    end = teacher.vocabulary["<|endoftext|>"]
    for number, result in teacher.decoder.decode(waveforms):
        if isinstance(teacher.decoder, GreedyDecoder):  # `label_batch` has done it for the other one
            result = finish_label(result, teacher.prefix_length, end)
        yield number, result


def teacher_digest(model: WhisperForConditionalGeneration) -> str:
    """Digest of the first values of each weight and of the decoding rules, to notice another teacher of that name."""
    names = ("suppress_tokens", "begin_suppress_tokens", "max_initial_timestamp_index")
    rules = [getattr(model.generation_config, name, None) for name in names]
    digest = hashlib.sha256(repr(rules).encode())
    for weight in model.parameters():
        numbers = weight.detach().flatten()[:64]
        digest.update(numbers.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- rows and shards -------------------------------------------------------------------------------------------------

MAY_HAVE_TEXTS = (*SHEETS, ".txt", ".xml")  # beside audio
NOTES = re.compile(r"\.|readme|licen[cs]e|changelog", re.IGNORECASE)  # names of files that have none


@dataclass
class SpeechRow:
    """A row of the dataset with its audio decoded, and later its label."""

    values: dict[str, Any]  # by column
    clip: Clip
    label: TeacherLabel | None = None


@dataclass
class LabelledSplit:
    """The files of a labelled split, and the settings that they are made with."""

    config: str
    name: str
    shards: list[Path]
    record: Path
    settings: dict


def settle_scores(args: argparse.Namespace, columns: list[str]) -> None:
    """Decide whether scores are stored, if no flag says so: without reference texts, a filter needs them."""
    if args.text_column_name == "none":
        args.text_column_name = None
        has_texts = False
    else:
        found = [column for column in TEXT_COLUMNS if column in columns]
        has_texts = bool(args.text_column_name or found)
        if found and not args.text_column_name:
            logger.info("the reference texts are in the column %s (--text_column_name none: there are none)", found[0])
        if not has_texts and set(columns) <= {"audio", "label"}:
            refuse_tables(args.dataset_name)
    if args.scores is None:
        args.scores = not has_texts
        if args.scores:
            logger.info("%s has no reference texts: the labels' scores are stored, to filter by", args.dataset_name)


def refuse_tables(reference: str) -> None:
    """Fail where tables or texts lie in an audio folder and none is read: they may be those of the clips."""
    path = Path(reference).expanduser()
    files = sorted(path.rglob("*"))
    unread = find_tables(list(map(str, files)), Place(os.path.realpath(path), is_confined=True))
    kind = "tables"
    advice = "name its column by --text_column_name, or the table instead of the directory"
    if not unread:
        kind = "files beside the audio"
        unread = [file for file in files if file.suffix.lower() in MAY_HAVE_TEXTS and not NOTES.match(file.name)]
        advice = f"write them into {path / 'metadata.csv'}, with the columns file_name and transcription"
    if unread:
        named = f"{len(unread)} {kind} in {reference} are not read, such as {unread[0]}"
        fail(f"{named}. If one has the clips' texts, {advice}; if none has, give --text_column_name none")


def open_speech(
    args: argparse.Namespace, streaming: bool = False
) -> tuple[datasets.Dataset | datasets.IterableDataset, Place]:
    """The rows to label as Arrow tables, with undecoded audio and without earlier labels, and where their files lie.

    Sets `args.scores`, where no flag does.
    """
    dataset, place = open_dataset(
        args.dataset_name,
        args.dataset_config_name,
        args.dataset_split_name,
        args.audio_column_name,
        args.text_column_name,
        args.dataset_dir_suffix,
        args.preprocessing_num_workers,
        streaming,
    )
    settle_scores(args, dataset.column_names or [])
    flags = ("audio_column_name", "text_column_name", "id_column_name")
    require_columns(args.dataset_name, dataset, {flag: getattr(args, flag) for flag in flags})
    earlier = [column for column in (LABEL_COLUMN, *SCORE_COLUMNS) if column in dataset.column_names]
    if earlier:
        logger.warning("%s has %s already: replaced", args.dataset_name, ", ".join(earlier))
        dataset = dataset.remove_columns(earlier)
    rows = args.max_samples
    if rows is not None:
        if isinstance(dataset, datasets.Dataset):
            rows = min(rows, len(dataset))  # a Dataset refuses to give more than it has
        dataset = dataset.take(rows)
    return dataset.with_format("arrow"), place


def load_speech_row(audio_column: str, place: Place, values: dict[str, Any]) -> SpeechRow:
    """Decode the audio of a row. Where the row only names a file, the file's bytes are put into the row."""
    audio = values[audio_column]
    try:
        content = read_audio(audio, place)
    except Unreadable as error:
        return SpeechRow(values, Clip(problem=str(error)))
    if audio["bytes"] is None:
        name = os.path.basename(audio["path"].split("::")[0])  # `zip://folder/name::archive.zip` is possible
        values[audio_column] = {"bytes": content, "path": name}
    return SpeechRow(values, decode_clip(content))


def plan_split(teacher: Teacher, rows: int, digest: str | None) -> LabelledSplit:
    """The files that the labels go to, and the settings that the labels depend on.

    In low precision the batch size may also decide between tokens that are as good as equal; it is not a setting.
    """
    args = teacher.args
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {
        "language": teacher.prompt.get("language"),
        "task": teacher.prompt.get("task"),
        "attention": teacher.model.config._attn_implementation,
        "rows": rows,
        "dataset_digest": digest,
        "teacher_digest": teacher_digest(teacher.model),
        "split": args.dataset_split_name,
    }
    config = args.dataset_config_name or "default"
    split = split_title(args.dataset_split_name)
    number = max(1, math.ceil(rows / args.shard_size))
    names = [f"{split}-{shard:05d}-of-{number:05d}.parquet" for shard in range(number)]
    shards = [args.output_dir / config / name for name in names]
    record = args.output_dir / f"labelling.{config}.{split}.json"
    return LabelledSplit(config, split, shards, record, settings)


def present_shards(args: argparse.Namespace) -> list[Path]:
    """All shards of the split that are there, whatever they were made with."""
    directory = args.output_dir / (args.dataset_config_name or "default")
    return sorted(directory.glob(f"{split_title(args.dataset_split_name)}-*-of-*.parquet"))


def finished_notes(split: LabelledSplit, path: Path) -> dict | None:
    """The notes of a shard; None where it is missing, damaged or made with other settings."""
    notes = read_notes(path)
    is_ours = notes and not changed_setting(notes.get("settings", {}), split.settings)
    return notes if is_ours else None


def find_pending(args: argparse.Namespace, split: LabelledSplit) -> list[int]:
    """The shards that are not complete.

    Fails if there are shards with other settings, unless --overwrite_output_dir is given.
    """
    for path in present_shards(args):
        notes = read_notes(path)
        if notes is None:
            logger.info("%s is damaged and is made again", path)
        elif not args.overwrite_output_dir:
            refuse_other_settings(path, notes.get("settings", {}), split.settings)
    return [shard for shard, path in enumerate(split.shards) if not finished_notes(split, path)]


def find_damaged_shards(args: argparse.Namespace, split: LabelledSplit, accelerator: Accelerator) -> list[int]:
    """The shards whose content is damaged. The processes share the reading, which is that of all labelled audio."""
    paths = split.shards[accelerator.process_index :: accelerator.num_processes]
    damaged = find_damaged(paths, args.dataloader_num_workers)
    return gather_object([split.shards.index(path) for path in damaged])


def count_rows(split: LabelledSplit, shards: list[int]) -> int:
    """The rows of the input that these shards are made of."""
    rows = split.settings["rows"]
    size = split.settings["shard_size"]
    return sum(min(size, rows - shard * size) for shard in shards)


@contextlib.contextmanager
def claim_split(args: argparse.Namespace, split: LabelledSplit, pending: list[int]) -> Iterator[None]:
    """Lock the split as long as the context lasts, delete shards that are not of this run, and begin the record."""
    name = split.record.stem
    leftovers = f"{split.config}/.{split.name}-*.partial"
    with hold_lock(args.output_dir / f".{name}.lock", f"{name} in {args.output_dir}", leftovers):
        try:
            for path in set(present_shards(args)) - set(split.shards):
                path.unlink()
            if pending or read_record(split.record) is None:
                write_record(split.record, {"status": "running", "settings": split.settings})
        except OSError as error:
            fail(f"cannot write to --output_dir {args.output_dir}: {first_line(error)}")
        yield


# ---- progress --------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What the bar and the tracker of the main process show. It sees other processes' work by the shards they write."""

    accelerator: Accelerator
    bar: ProgressBar
    elsewhere: list[Path]  # shards that other processes have yet to write
    started: float  # s
    clips: int = 0  # that this process has labelled
    seconds: float = 0.0  # of audio
    has_warned: bool = False  # of a clip over 30 s


def start_progress(teacher: Teacher, accelerator: Accelerator, split: LabelledSplit, pending: list[int]) -> Progress:
    """Say what is labelled by what, and show the main process' bar, which begins at the rows of complete shards."""
    tell_work("labelling", teacher.args, accelerator, teacher.decoder.batch_size, len(pending), len(split.shards))
    rows = split.settings["rows"]
    done = rows - count_rows(split, pending)
    is_main = accelerator.is_main_process
    bar = ProgressBar(desc="labelling", total=rows, initial=done, unit=" clips", smoothing=0, disable=not is_main)
    elsewhere = []
    if is_main:  # whose own shards have the remainder 0
        elsewhere = [split.shards[shard] for shard in pending if shard % accelerator.num_processes != 0]
    return Progress(accelerator, bar, elsewhere, time.monotonic())


def report_clip(progress: Progress, clip: Clip, teacher: Teacher) -> None:
    """Count a labelled clip, and report to the tracker every so many batches. Only the main process does."""
    if not progress.accelerator.is_main_process:
        return
    progress.clips += 1
    progress.seconds += clip.seconds
    progress.bar.update()
    elapsed = time.monotonic() - progress.started
    audio_rate = progress.seconds / elapsed
    progress.bar.set_postfix_str(f"{audio_rate:.1f} h of audio an hour", refresh=False)
    batches, rest = divmod(progress.clips, teacher.decoder.batch_size)
    if rest == 0 and batches % teacher.args.logging_steps == 0:
        clip_rate = (progress.bar.n - progress.bar.initial) / elapsed
        values = {
            "clips": progress.bar.n,
            "clips_per_second": clip_rate,
            "audio_hours_per_hour": audio_rate,
            "hours_left": (progress.bar.total - progress.bar.n) / clip_rate / 3600,
        }
        track(progress.accelerator, values, batches)


def report_shards(progress: Progress, split: LabelledSplit) -> None:
    """Count the clips of shards that other processes have written since the last check."""
    for path in list(progress.elsewhere):
        if notes := finished_notes(split, path):
            progress.elsewhere.remove(path)
            progress.seconds += notes["seconds"]
            progress.bar.update(notes["rows_in"])


# ---- labelling -------------------------------------------------------------------------------------------------------


def read_shard(
    args: argparse.Namespace, dataset: datasets.Dataset, place: Place, decoders: Executor, shard: int
) -> list[SpeechRow]:
    """Read the rows of a shard and decode their audio."""
    start = shard * args.shard_size
    rows = dataset[start : start + args.shard_size].to_pylist()
    load = functools.partial(load_speech_row, args.audio_column_name, place)
    return list(decoders.map(load, rows))


def usable_longest_first(rows: list[SpeechRow]) -> list[SpeechRow]:
    """Rows with usable audio, the longest first, so that labels of similar length are decoded together."""
    usable = [row for row in rows if row.clip.problem is None]
    return sorted(usable, key=lambda row: row.clip.samples, reverse=True)


def label_shard(teacher: Teacher, rows: list[SpeechRow], progress: Progress) -> None:
    """Label rows. Which clips are decoded together depends on the shard alone, so that labels do as well."""
    usable = usable_longest_first(rows)
    if usable and usable[0].clip.seconds > WINDOW_SECONDS and not progress.has_warned:
        progress.has_warned = True  # the end of the run, which tells how many there are, may be days away
        logger.warning("there are clips over 30 s, such as one of %.0f s: %s", usable[0].clip.seconds, CUT_CLIPS)
    waveforms = (row.clip.waveform for row in usable)
    for number, label in label_clips(teacher, waveforms):
        row = usable[number]
        row.label = label
        row.clip = row.clip._replace(waveform=None)  # by far the largest part of a row
        report_clip(progress, row.clip, teacher)
    progress.bar.update(len(rows) - len(usable))


def label_shards(
    teacher: Teacher,
    dataset: datasets.Dataset,
    place: Place,
    split: LabelledSplit,
    shards: list[int],
    progress: Progress,
) -> None:
    """Label shards one after the other, while threads decode the next one and write the one before."""
    if not shards:
        return
    threads = max(1, teacher.args.dataloader_num_workers)
    with ThreadPoolExecutor(2) as background, ThreadPoolExecutor(threads) as decoders:
        read = functools.partial(read_shard, teacher.args, dataset, place, decoders)
        write = functools.partial(write_labels, teacher, split, dataset.features)
        try:
            reading = background.submit(read, shards[0])
            writing = None
            for number, shard in enumerate(shards, 1):
                rows = reading.result()
                if number < len(shards):
                    reading = background.submit(read, shards[number])
                label_shard(teacher, rows, progress)
                report_shards(progress, split)
                if writing:
                    writing.result()
                writing = background.submit(write, shard, rows)
            writing.result()
        except BaseException:
            decoders.shutdown(wait=False, cancel_futures=True)
            raise


# ---- files, record, card, push ---------------------------------------------------------------------------------------


def label_features(args: argparse.Namespace, features: datasets.Features) -> datasets.Features:
    """The columns of the labelled dataset; `features` are those of the input."""
    token_ids = datasets.List(datasets.Value("int32"))
    new = {
        args.audio_column_name: datasets.Audio(sampling_rate=SAMPLING_RATE),
        LABEL_COLUMN: datasets.Value("string") if args.decode_token_ids else token_ids,
    }
    if args.scores:
        new |= dict.fromkeys(SCORE_COLUMNS, datasets.Value("float32"))
    return datasets.Features({**features, **new})


def label_values(teacher: Teacher, label: TeacherLabel) -> dict[str, Any]:
    """The new columns of a row."""
    values: dict[str, Any] = {LABEL_COLUMN: label.ids}
    if teacher.args.decode_token_ids:
        values[LABEL_COLUMN] = decode_with_timestamps(label.ids, teacher.tokenizer, teacher.timestamps)
    if teacher.args.scores:
        text = teacher.tokenizer.decode(label.ids, skip_special_tokens=True).strip().encode()
        ratio = len(text) / len(zlib.compress(text))  # Whisper treats a ratio above 2.4 as a repetition loop
        scores = (label.avg_logprob, ratio, label.no_speech_prob)
        for name, score in zip(SCORE_COLUMNS, scores, strict=True):
            values[name] = round(score, 4)
    return values


def row_name(args: argparse.Namespace, row: SpeechRow, number: int) -> str:
    """What a row is called in the list of those that cannot be used: by its id, its file or its number."""
    if args.id_column_name:
        return str(row.values[args.id_column_name])
    audio = row.values[args.audio_column_name] or {}
    return audio.get("path") or f"row {number}"


def label_notes(teacher: Teacher, shard: int, rows: list[SpeechRow]) -> dict:
    """What became of the rows of a shard."""
    args = teacher.args
    unusable = []
    for number, row in enumerate(rows, shard * args.shard_size):
        if row.clip.problem:
            unusable.append([row_name(args, row, number), row.clip.problem])
    labels = [row.label for row in rows if row.label]
    texts = [label.ids[teacher.prefix_length : -1] for label in labels] if args.return_timestamps else []
    malformed = sum(not timestamps_are_paired(text, teacher.timestamps) for text in texts)
    return {
        "rows_in": len(rows),
        "rows_out": len(labels),
        "seconds": round(sum(row.clip.seconds for row in rows), 3),
        "over_30_s": sum(row.clip.seconds > WINDOW_SECONDS for row in rows),
        "truncated": sum(label.truncated for label in labels),
        "malformed_timestamps": malformed,
        "tokens": sum(len(label.ids) for label in labels),
        "unusable": unusable,
    }


def write_labels(
    teacher: Teacher, split: LabelledSplit, features: datasets.Features, shard: int, rows: list[SpeechRow]
) -> None:
    """Write the rows of a shard that have a label, and notes on what became of all rows.

    `features` are the columns of the input.
    """
    path = split.shards[shard]
    schema = label_features(teacher.args, features).arrow_schema
    batches = []  # of one row, because an Arrow array of bytes must not exceed 2 GB
    for row in rows:
        if row.label:
            values = row.values | label_values(teacher, row.label)
            batches.append(pa.RecordBatch.from_pylist([values], schema))
    table = pa.Table.from_batches(batches, schema)
    notes = {"settings": split.settings, **label_notes(teacher, shard, rows)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [table], schema, notes)
    except OSError as error:
        fail(f"cannot write {path}: {first_line(error)}. Make room. {CONTINUE}")


def add_up(split: LabelledSplit) -> dict:
    """Counts of the whole split, and its rows that could not be used with the reasons.

    Shards of other machines may take a while to appear on a shared file system.
    """
    notes = []
    deadline = time.monotonic() + APPEAR_SECONDS
    for path in split.shards:
        while not (shard_notes := finished_notes(split, path)):
            if time.monotonic() > deadline:
                fail(f"{path} has not appeared: do all machines see it? {CONTINUE}")
            time.sleep(1)
        notes.append(shard_notes)
    total: dict[str, Any] = {}
    for name in ("rows_in", "rows_out", "over_30_s", "truncated", "malformed_timestamps", "tokens"):
        total[name] = sum(shard[name] for shard in notes)
    total["hours"] = round(sum(shard["seconds"] for shard in notes) / 3600, 4)
    total["unusable"] = [row for shard in notes for row in shard["unusable"]]
    return total


def complete_record(args: argparse.Namespace, split: LabelledSplit, total: dict, last_run: dict) -> None:
    """Complete the record. A run that found everything done leaves it as it is."""
    record = read_record(split.record)
    if record["status"] == "complete":
        return
    record.update(total, status="complete", unusable_rows=len(total["unusable"]), last_run=last_run)
    record["arguments"] = shown_arguments(args)
    record["versions"] = library_versions(*LIBRARIES)
    write_record(split.record, record)


def report_total(split: LabelledSplit, total: dict) -> None:
    """Say how many rows are labelled and which are not; fail where none is."""
    logger.info("%d of %d rows are labelled: %s", total["rows_out"], total["rows_in"], split.record)
    for name, problem in total["unusable"][:10]:
        logger.warning("left out: %.100r (%s)", name, problem)
    if total["over_30_s"]:
        logger.warning("%d clips are longer than 30 s: %s", total["over_30_s"], CUT_CLIPS)
    if not total["rows_in"]:
        logger.warning("THE INPUT HAS NO ROWS: %s is an empty split", split.name)
    elif not total["rows_out"]:
        first = ": ".join(total["unusable"][0])
        fail(
            f"none of the {total['rows_in']} clips could be labelled ({first}, …); {split.record} has the reasons. "
            "With these mended, pass --overwrite_output_dir"
        )


def labelling_card(teacher: str, split: LabelledSplit, total: dict, card: RepoCard | None) -> str:
    """The dataset card with this split's files and section, keeping the rest of `card`."""
    card = card or RepoCard(NEW_CARD)
    list_split(card, split.config, split.name)
    fill_metadata(card, language=split.settings["language"])
    title = f"{split.config}, {split.name}"
    values = {"teacher": teacher, **split.settings, **total, "unusable": len(total["unusable"])}
    table = "| | |\n| --- | --- |\n"
    for name, value in values.items():
        table += f"| {name.replace('_', ' ')} | {value} |\n"
    set_section(card, title, f"## {title}\n\nLabels are in `{LABEL_COLUMN}`.\n\n{table}")
    return str(card)


def repository_to_push(args: argparse.Namespace) -> tuple[str, str] | tuple[None, None]:
    """The dataset repository to push to, which is created if it is missing, and its visibility; None for no push."""
    if args.push_to_hub and args.hub_model_id is None:
        fail("--push_to_hub needs --hub_model_id, the dataset repository to push to")
    if args.push_to_hub is False or args.hub_model_id is None or local_directory(args.hub_model_id):
        return None, None
    return prepare_repository(args.hub_model_id, "dataset", args.hub_private_repo, args.dry_run)


def measure_rate(teacher: Teacher, waveforms: list[np.ndarray]) -> float:
    """Clips per second."""
    for _ in range(2):  # the first time is slow
        started = time.monotonic()
        list(label_clips(teacher, waveforms))
    return len(waveforms) / (time.monotonic() - started)


def print_input(args: argparse.Namespace, teacher: Teacher) -> tuple[str, int, list[SpeechRow]]:
    """Read the input for PLAN_SECONDS at most, and say how large it is, or else about how large.

    Returns:
        "more than " where nobody knows how much more of it there is, else ""; its clips, or those that were read; the
        rows of the first batches.
    """
    sample: list[SpeechRow] = []
    sample_size = teacher.decoder.batch_size * (1 if teacher.model.device.type == "cpu" else PLAN_BATCHES)
    clips = 0
    too_long = 0
    problems = []
    seconds = 0.0
    size = 0  # bytes
    is_whole = True
    dataset, place = open_speech(args, streaming=True)
    deadline = time.monotonic() + PLAN_SECONDS
    for table in dataset.iter(teacher.decoder.batch_size):
        batch = [load_speech_row(args.audio_column_name, place, values) for values in table.to_pylist()]
        if len(sample) < sample_size:
            sample += batch
        clips += len(batch)
        for row in batch:
            seconds += row.clip.seconds
            too_long += row.clip.seconds > WINDOW_SECONDS
            if row.clip.problem is None:
                size += len(row.values[args.audio_column_name]["bytes"])
            else:
                problems.append(row.clip.problem)
        if time.monotonic() > deadline:
            is_whole = False
            break
    more_than = "" if is_whole else "more than "
    first = ""
    if not is_whole and isinstance(dataset, datasets.Dataset):  # whose rows are counted
        more_than = ""
        first = f" of the first {clips:,}"
        seconds *= len(dataset) / clips
        size *= len(dataset) / clips
        clips = len(dataset)
    about = "about " if first else ""
    length = f"{about}{seconds / 3600:,.2f} h, {about}{size / 1e6:,.1f} MB"
    print(f"input: {args.dataset_name}, {more_than}{clips:,} clips, {length}")
    if too_long:
        print(f"too long: {more_than}{too_long:,}{first} clips are over 30 s: {CUT_CLIPS}")
    if problems:
        print(f"unusable: {more_than}{len(problems):,}{first} clips, which are left out; the first: {problems[0]}")
    return more_than, clips, sample


def print_labelling_plan(args: argparse.Namespace, teacher: Teacher, pushes: str, num_processes: int) -> None:
    """Say what a run would read, write and push, and how long it would take by its first batches; change nothing."""
    more_than, clips, sample = print_input(args, teacher)
    earlier: dict = {}  # settings of an earlier run, which has read the whole input
    if present := present_shards(args):
        notes = read_notes(present[0]) or {}
        earlier = notes.get("settings", {})
    if more_than:
        clips = earlier.get("rows", clips)
    split = plan_split(teacher, clips, earlier.get("dataset_digest"))
    pending = find_pending(args, split)
    left = count_rows(split, pending)
    print(f"done: {len(split.shards) - len(pending)} of {more_than}{len(split.shards)} shards")
    print(f"left: {more_than}{left:,} clips")
    print(f"writes: {args.output_dir}")
    print(f"pushes: {pushes}")
    waveforms = [row.clip.waveform for row in usable_longest_first(sample)]
    if not waveforms:
        print("time: unknown, as no clip of the first ones can be used")
        return
    rate = measure_rate(teacher, waveforms)
    needed = timedelta(seconds=round(left / rate / num_processes))
    device = teacher.model.device.type
    print(f"time: {more_than or 'about '}{needed} with {num_processes} processes on {device}, {rate:.1f} clips/s each")


# ---- main ------------------------------------------------------------------------------------------------------------


@one_line_for_lost_processes()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Set up.
    accelerator = start_accelerator(args)
    is_main = accelerator.is_main_process
    set_up_process(is_main)
    set_client_factory(make_hub_client)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not is_main:
        datasets.disable_progress_bars()
    args.dtype = choose_dtype(args.dtype, accelerator.device)

    # 2. Refuse what can be refused.
    source = Path(args.dataset_name).expanduser()
    if source.is_dir() and source.resolve() == args.output_dir.resolve():
        fail(f"--output_dir {args.output_dir} is the input: choose another directory")
    repository = visibility = None
    if is_main:
        repository, visibility = repository_to_push(args)
        config = args.dataset_config_name or "default"
        list_ours = functools.partial(list_split, config=config, split=split_title(args.dataset_split_name))
        check_cards(args.output_dir, repository, "dataset", list_ours)

    # 3. Load.
    teacher = load_teacher(args, accelerator.device)
    if args.dry_run:
        if is_main:
            pushes = f"{repository} ({visibility})" if repository else "nothing"
            print_labelling_plan(args, teacher, pushes, accelerator.num_processes)
        return 0
    dataset, place = open_speech(args)
    ids = [args.id_column_name] if args.id_column_name else []
    digest = speech_digest(dataset, place, args.audio_column_name, ids)
    split = plan_split(teacher, len(dataset), digest)

    # 4. Find what is left to do. If that is nothing, read complete shards to the end, to find damaged ones.
    pending = find_pending(args, split) or find_damaged_shards(args, split, accelerator)
    with claim_split(args, split, pending) if is_main else contextlib.nullcontext():
        accelerator.wait_for_everyone()  # until the lock is held

        # 5. Work. Each process labels every so many-th shard; they wait for each other only at the end.
        start_tracker(accelerator, args)
        progress = start_progress(teacher, accelerator, split, pending)
        mine = [shard for shard in pending if shard % accelerator.num_processes == accelerator.process_index]
        label_shards(teacher, dataset, place, split, mine, progress)
        arrive()
        accelerator.wait_for_everyone()
        report_shards(progress, split)  # of processes that ended later
        progress.bar.close()

        if is_main:
            # 6. Write record and card.
            seconds = time.monotonic() - progress.started
            clips = count_rows(split, pending)
            last_run = {
                "clips": clips,
                "wall_seconds": seconds,
                "clips_per_second": clips / seconds,
                "processes": accelerator.num_processes,
            }
            total = add_up(split)
            update_card = functools.partial(labelling_card, shown_name(args.model_name_or_path), split, total)
            write_card(args.output_dir, update_card)
            complete_record(args, split, total, last_run)
            report_total(split, total)

            # 7. Push.
            if repository:
                title = f"{split.config}/{split.name}"
                patterns = [f"{title}-*-of-*.parquet", split.record.name]
                push_dataset(repository, args.output_dir, patterns, update_card, f"Label {title}")
        accelerator.end_training()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"stopped. {CONTINUE}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an exception while Python shuts down would print a traceback
