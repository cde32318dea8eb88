#!/usr/bin/env python
"""Measure the error rates of a Whisper model, and show its mistakes.

In: a model (Hub id or local directory), and clips with their reference texts: a dataset on the Hub or on disk, a data
loader (`.py`), or a manifest (`.csv`, `.tsv` or `.jsonl`, one clip per row, audio paths relative to it).
Out, in --output_dir, where <name> is the split:

    metric.<name>.json                 every figure: rates, counts, 95 % intervals, by length; speed; settings, versions
    all_predictions.<name>.csv         one row per clip, in the dataset's order, with the clip's own counts
    incorrect_predictions.<name>.csv   the rows whose normalised texts differ
    report.<name>.html                 one page: figures, confusions, and all clips with both texts side by side
    .predictions.<name>/               the predictions, in shards

By default each clip, of at most 30 s, is evaluated on its own. `--concatenate_audio` evaluates windows of several whole
clips instead (<name> is <split>.windows_30). `--long_form` accepts audio of any length: clips over 30 s are decoded by
Whisper's sequential algorithm, greedily and without conditioning on previous text (<name> is <split>.long_form).

Japanese is scored as in the published tables: texts go through Whisper's basic normaliser and lose their spaces. Each
clip is then a single word, and `wer` is the share of clips with a mistake, a sentence error rate. Rates of readings, of
real words and by other rules are given beside it, as far as the packages that they need are installed.

    python run_short_form_eval.py --model_name_or_path org/model --dataset_name org/dataset --dataset_split_name test \
        --text_column_name transcription --language ja --output_dir eval/model
    accelerate launch --multi_gpu run_short_form_eval.py ...            # many processes; each takes its share of shards
    python run_short_form_eval.py --predictions engine.csv ...          # scores what another engine said
    python run_short_form_eval.py --compare eval/teacher eval/model     # table, JSON and page; runs no model

After an interruption, the same command continues with the shards that are missing.
"""

import argparse
import atexit
import base64
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
import statistics
import string
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

import datasets
import fsspec
import jinja2
import jiwer
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
from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, DataFilesList, resolve_pattern
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    eval_result_entries_to_yaml,
    metadata_update,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import httpx, yaml_dump
from huggingface_hub.utils._http import default_client_factory
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoConfig,
    GenerationConfig,
    SuppressTokensAtBeginLogitsProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.modeling_whisper import WhisperAttention, eager_attention_forward
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS, TO_LANGUAGE_CODE
from transformers.utils import cached_file, find_adapter_config_file, is_flash_attn_2_available

CPU_BATCH = 32  # clips
PLAN_BATCHES = 4  # that --dry_run decodes on a GPU, which decodes one while it encodes the next; one on a CPU
TOO_LONG = "longer than 30 s"
METRICS = ("cer", "wer", "cer_raw", "wer_raw")  # in per cent; _raw = without normalisation
COUNTS = ("substitutions", "deletions", "insertions", "reference")  # the last is the length of the reference
CLIP_COLUMNS = tuple(f"{unit}_{count}" for unit in ("character", "word") for count in COUNTS)
LENGTH_GROUPS = ((0, 7), (8, 15), (16, 31), (32, 63), (64, 95), (96, None))  # characters of the normalised reference
BOOTSTRAP_DRAWS = 1_000
CONFUSIONS = 50  # the most frequent ones are kept
NOTHING_TO_SCORE = "nothing to score: every reference is empty after normalisation. Check --text_column_name"
MAX_PLAYED_SECONDS = 120  # a page holds no audio of longer clips
LONG_FORM_SHARD = 8  # recordings per shard, all in memory at once
MAX_SILENCE = 6_400  # samples between two clips of a window: 0.4 s
OPEN_WINDOWS = 16  # newest windows that may still take another clip
PROMPT_TOKENS = 4  # decoder positions used by the prompt: start, language, task, no timestamps


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    path = {"type": os.path.expanduser}
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", help="Whisper model, local directory or Hub id", **path)
    add("--model_revision", default="main", help="branch, tag or commit of the model on the Hub")
    add("--subfolder", default="", help="folder of the model in its repository")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision; unset = bfloat16 where the device computes it natively, else float32",
    )
    add("--attn_type", choices=("flash_attn", "sdpa", "eager"), default="sdpa", help="attention implementation")
    add("--assistant_model", help="draft model for speculative decoding, with the same encoder; unset = none", **path)
    add = parser.add_argument_group("clips").add_argument
    add("--dataset_name", help="Hub id, local directory, builder file (.py), or .csv, .tsv, .json(l) manifest", **path)
    add("--dataset_config_name", help="configuration; unset = the default one")
    add("--dataset_split_name", default="test", help="split, or for example test[:1000]; names the output files")
    add("--audio_column_name", default="audio", help="column of audio")
    add("--text_column_name", default="text", help="column of reference texts")
    add("--id_column_name", help="column of clip ids; unset = audio paths, or row numbers if there are none")
    add("--max_samples_per_split", type=int, help="rows to take from the start; unset = all")
    add("--skip_long_audio", help="leave out clips over 30 s, and count them, instead of failing", **flag)
    add("--long_form", help="evaluate audio over 30 s too, by Whisper's sequential decoding with timestamps", **flag)
    add("--concatenate_audio", help="evaluate windows of several whole clips", **flag)
    add("--concatenate_seconds", type=float, default=30, help="window length, seconds; over 30 needs --long_form")
    add("--seed", type=int, default=0, help="seed for packing clips into windows and for the silences between them")
    add = parser.add_argument_group("generation").add_argument
    add("--language", default="ja", help="language code or name")
    add("--task", choices=("transcribe", "translate"), default="transcribe", help="task; translate = into English")
    add("--generation_max_length", type=int, default=256, help="maximum length of a prediction, tokens")
    add("--generation_num_beams", type=int, default=1, help="beams; 1 = greedy")
    add("--return_timestamps", help="let the model predict timestamps, which are not scored", **flag)
    add = parser.add_argument_group("work").add_argument
    add(
        "--per_device_eval_batch_size",
        type=int,
        help=f"clips per batch; unset = {CPU_BATCH} on a CPU, what fits on a GPU, at most {MOST_CLIPS}; "
        "always 1 with --assistant_model",
    )
    add("--dataloader_num_workers", type=int, default=4, help="threads that decode audio")
    add("--preprocessing_num_workers", type=int, default=1, help="processes that load the dataset")
    add = parser.add_argument_group("results").add_argument
    add(
        "--scorer",
        choices=("kotoba", "reazon", "whisper"),
        help="rule of the headline rate; unset = kotoba for languages written without spaces, else whisper. The others "
        "are given beside it",
    )
    add("--output_dir", default="eval", help="directory of the results", **path)
    add("--overwrite_output_dir", help="delete predictions that were made with different settings", **flag)
    add(
        "--report_audio_mb",
        type=float,
        default=20,
        help="audio in the report page, MB; the worst clips come first, 0 = none",
    )
    add(
        "--predictions",
        help="score texts that any engine made instead of running a model: .csv, .tsv or .jsonl with a column "
        "`hypothesis`, or an --output_dir; references are those of --dataset_name, by the column `id` or by order, "
        "or without a dataset the column `reference`; unset = run the model",
        **path,
    )
    add("--compare", nargs="+", metavar="DIR", help="output directories to compare; no model is run")
    add("--push_to_hub", help="write the rates into the model's card and .eval_results on the Hub", **flag)
    add("--report_to", choices=TRACKERS, default="none", help="tracker")
    add("--wandb_project", default="kotoba-whisper-evaluation", help="project of the tracker")
    add("--dry_run", help="print what a run would read, write and push, and how long it takes; change nothing", **flag)
    args = parser.parse_args(argv)
    for name in ("generation_num_beams", "per_device_eval_batch_size", "max_samples_per_split"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, not {args.seed}")
    if not (args.compare or args.predictions or (args.model_name_or_path and args.dataset_name)):
        parser.error("--model_name_or_path and --dataset_name are needed, or --predictions, or --compare")
    for name in ("concatenate_audio", "push_to_hub", "dry_run"):
        if args.predictions and getattr(args, name):
            parser.error(f"--{name} does not go with --predictions")
    if args.concatenate_audio and not 0 < args.concatenate_seconds <= (3600 if args.long_form else 30):
        parser.error(
            f"--concatenate_seconds {args.concatenate_seconds:g} must be above 0 and at most 30, "
            "or 3600 with --long_form"
        )
    if args.assistant_model and args.generation_num_beams > 1:
        parser.error("--assistant_model works only with greedy decoding: remove --generation_num_beams")
    args.language = language_code(args.language)
    if args.scorer is None:
        args.scorer = "kotoba" if text_language(args.language, args.task) in UNSPACED else "whisper"
    args.name = split_title(args.dataset_split_name)  # in the names of the output files
    if args.concatenate_audio:
        args.name += f".windows_{args.concatenate_seconds:g}"
    if args.long_form:
        args.name += ".long_form"
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


# ---- common: text ----------------------------------------------------------------------------------------------------

UNSPACED = ("ja", "zh", "yue", "th", "lo", "my", "km")  # languages that are written without spaces


def text_language(language: str | None, task: str) -> str | None:
    """The language in which texts are written: Whisper translates into English."""
    return "en" if task == "translate" else language


def remove_bracketed(text: str) -> str:
    """The text without what is in brackets, as Whisper's normalisers begin.

    From each bracket that nothing closes, theirs search to the end of the text, which takes hours for some texts. Here
    such a bracket becomes another mark, which they treat alike. Long gaps, another such case, are shortened.
    """
    for opening, closing, pattern in (("<[", ">]", r"[<\[][^>\]]*[>\]]"), ("(", ")", r"\([^)]+\)")):
        end = max(text.rfind(mark) for mark in closing) + 1
        rest = text[end:]
        for mark in opening:
            rest = rest.replace(mark, "|")
        text = re.sub(pattern, "", text[:end]) + rest
    return re.sub(r"\s{100,}", " " * 100, text)


def text_normaliser(language: str, spellings: dict[str, str] | None) -> Callable[[str], str]:
    """The rule by which two texts are compared for WER and CER, the same in filter, training and evaluation.

    It is Whisper's own normaliser, then without spaces where the language is written without them: such a text is one
    word. `spellings`, British to American, come from the tokenizer and serve English.
    """
    whisper_rule = EnglishTextNormalizer(spellings or {}) if language == "en" else BasicTextNormalizer()

    def normalise(text: str) -> str:
        if language == "en":
            text = re.sub(r"\d{1000,}", " ", text)  # which its normaliser fails to read as a number
        words = whisper_rule(remove_bracketed(text)).split()
        return ("" if language in UNSPACED else " ").join(words)

    return normalise


# ---- normalisation ---------------------------------------------------------------------------------------------------

Normaliser = Callable[[str], str]
DIGITS = "零一二三四五六七八九"
POWERS = ("", "万", "億", "兆", "京", "垓", "秭", "穣", "溝", "澗", "正", "載", "極")  # powers of 10,000
# The characters that ReazonSpeech's own scorer narrows or removes, from its pkg/evaluation/src/utils.py.
NARROW = string.digits + string.ascii_letters
WIDE = "".join(chr(ord(letter) + 0xFEE0) for letter in NARROW)
REAZON_TABLE = str.maketrans(WIDE, NARROW, "、。「」『』，,？！!?")
# Each kana that ends in a vowel, and what makes this vowel long.
LONG_VOWELS = {
    "アカサタナハマヤラワガザダバパァャヮ": "アァ",
    "イキシチニヒミリギジヂビピィ": "イィ",
    "ウクスツヌフムユルグズヅブプヴゥュ": "ウゥ",
    "エケセテネヘメレゲゼデベペェ": "エェイ",
    "オコソトノホモヨロヲゴゾドボポォョ": "オォウ",
}


def read_digits(digits: str) -> str:
    """Read digits one by one, in kanji: "203" -> "二零三"."""
    return "".join(DIGITS[int(digit)] for digit in digits)


def read_group(group: str) -> str:
    """Read up to four digits as a number, in kanji: "0203" -> "二百三"."""
    spoken = ""
    for digit, place in zip(reversed(group), ("", "十", "百", "千"), strict=False):
        if digit == "0":
            continue
        name = "" if digit == "1" and place else DIGITS[int(digit)]  # 100 is "百", not "一百"
        spoken = name + place + spoken
    return spoken


def read_number(number: str) -> str:
    """Read a decimal number, in kanji, without padding zeros: "1203" -> "千二百三", "0.50" -> "零点五"."""
    whole, _, fraction = number.partition(".")
    digits = whole.lstrip("0")
    decimals = fraction.rstrip("0")
    if len(digits) > 4 * len(POWERS):  # too large for the named powers
        return read_digits(digits)
    spoken = ""
    for power in POWERS:
        group = read_group(digits[-4:])
        digits = digits[:-4]
        if group:
            spoken = group + power + spoken
    spoken = spoken or DIGITS[0]
    if decimals:
        spoken += "点" + read_digits(decimals)
    return spoken


def normalise_reazon(text: str) -> str:
    """ReazonSpeech's rule: remove punctuation, narrow letters and digits to half width, and spell out numbers."""
    narrow = text.translate(REAZON_TABLE)
    return re.sub(r"[0-9]+\.?[0-9]*", lambda number: read_number(number[0]), narrow).strip()


def spell_kana(katakana: str) -> str:
    """One spelling for kana that sound alike: ヂ is ジ, ヲ is オ, and a long vowel is a bar: キョウ -> キョー."""
    spelled = katakana.translate(str.maketrans("ヂヅヲ", "ジズオ"))
    for kana, vowels in LONG_VOWELS.items():
        spelled = re.sub(f"(?<=[{kana}])[{vowels}]", "ー", spelled)
    return re.sub("ー+", "ー", spelled)


def readings_rule() -> Normaliser:
    """How a Japanese text is read aloud, in katakana, by Open JTalk's front end: 3時 and 三時 are both サンジ."""
    import pyopenjtalk  # only here: it need not be installed

    def read(text: str) -> str:
        spoken = remove_bracketed(unicodedata.normalize("NFKC", text))
        spoken = re.sub(r"(?<=\d),(?=\d{3})", "", spoken)  # Open JTalk reads thousands separators as pauses
        katakana = ""
        for piece in textwrap.wrap(spoken, 400):  # the front end takes at most 8,192 bytes
            words = pyopenjtalk.run_frontend(piece, use_vanilla=True)  # 3 times as fast, and as good
            katakana += "".join(word["pron"] for word in words)
        return spell_kana(re.sub("[^ァ-ヴー]", "", katakana))

    return read


def words_rule() -> Normaliser:
    """The words of a Japanese text by Sudachi, in its short unit, after Whisper's normaliser."""
    from sudachipy import Dictionary, SplitMode  # only here: it need not be installed

    tokenizer = Dictionary().tokenizer(mode=SplitMode.A)
    whisper_rule = BasicTextNormalizer()

    def split(text: str) -> str:
        words = []
        for piece in textwrap.wrap(whisper_rule(remove_bracketed(text)), 5_000):  # Sudachi takes at most 49,149 bytes
            words += [word.surface() for word in tokenizer.tokenize(piece)]
        return " ".join(" ".join(words).split())

    return split


def scoring_rule(scorer: str, language: str, spellings: dict[str, str] | None) -> Normaliser:
    """The normaliser of a scorer. The default scorer has the rule of the filter and of training.

    Raises ImportError where the scorer's package is not installed.
    """
    if scorer == "reazon":
        return normalise_reazon
    if scorer == "readings":
        return readings_rule()
    if scorer == "words":
        return words_rule()
    if scorer == "kotoba":  # the rule of the published Japanese figures, whatever the language
        return text_normaliser("ja", None)
    # `whisper` and `characters` have Whisper's own rule, which keeps the spaces that some texts have.
    if language in UNSPACED:
        return lambda text: BasicTextNormalizer()(remove_bracketed(text)).strip()
    return text_normaliser(language, spellings)


# ---- scorers ---------------------------------------------------------------------------------------------------------

BY_CHARACTER = (*UNSPACED, "ko")  # languages whose texts are compared character by character
OPTIONAL_PACKAGES = {"readings": "pyopenjtalk-plus", "words": "sudachipy sudachidict_core"}


class Scorer(NamedTuple):
    """One way to compare a reference and a hypothesis: how they are normalised, and what is counted then."""

    name: str
    unit: str  # characters or words, which are separated by spaces
    normalise: Normaliser


def make_scorers(headline: str, language: str, spellings: dict[str, str] | None) -> list[Scorer]:
    """All scorers of a language, first the one of --scorer. One that lacks its package is left out with a warning.

    A new scorer needs its name and its unit here, its rule in `scoring_rule`, and in OPTIONAL_PACKAGES the package that
    may be missing. To be the headline, it also needs to be a choice of --scorer.
    """
    if language == "ja":
        names = ["kotoba", "reazon", "whisper", "readings", "words"]
    elif language in BY_CHARACTER:
        names = ["kotoba", "whisper"]
    else:
        names = ["whisper", "characters"]
    scorers = []
    for name in dict.fromkeys([headline, *names]):
        by_word = name == "words" or (name == "whisper" and language not in BY_CHARACTER)
        try:
            normalise = scoring_rule(name, language, spellings)
        except ImportError:
            logger.warning("the scorer %s is left out: it needs `pip install %s`", name, OPTIONAL_PACKAGES[name])
            continue
        scorers.append(Scorer(name, "words" if by_word else "characters", normalise))
    return scorers


def scorer_titles(*evaluated: dict) -> dict[str, str]:
    """All scorers of these metrics for people: `CER (kotoba)`, `WER (words)`."""
    titles = {}
    for metrics in evaluated:
        for name, summary in metrics["scores"].items():
            rate = "WER" if summary["unit"] == "words" else "CER"
            titles[name] = f"{rate} ({name})"
    return titles


def format_rate(rate: float | None) -> str:
    """An error rate for people."""
    return "unknown" if rate is None else f"{rate:.2f} %"


# ---- error rates -----------------------------------------------------------------------------------------------------

ALIGN = {"characters": jiwer.process_characters, "words": jiwer.process_words}  # with the fewest errors, by unit


@functools.lru_cache(maxsize=8)  # the headline scorer counts again what the metrics have counted
def count_errors(reference: str, hypothesis: str, unit: str) -> list[int]:
    """The `COUNTS` of a clip."""
    result = ALIGN[unit](reference, hypothesis)
    return [result.substitutions, result.deletions, result.insertions, len(result.references[0])]


def align_texts(reference: str, hypothesis: str, unit: str) -> list[tuple[str, str]]:
    """Both texts in pieces that belong together: equal pieces, and between them pieces that differ."""
    result = ALIGN[unit](reference, hypothesis)
    separator = " " if unit == "words" else ""
    pieces = []
    for _, group in itertools.groupby(result.alignments[0], key=lambda chunk: chunk.type == "equal"):
        chunks = list(group)
        expected = result.references[0][chunks[0].ref_start_idx : chunks[-1].ref_end_idx]
        predicted = result.hypotheses[0][chunks[0].hyp_start_idx : chunks[-1].hyp_end_idx]
        pieces.append((separator.join(expected), separator.join(predicted)))
    return pieces


def error_rate(counts: np.ndarray) -> np.ndarray:
    """(..., 4) `COUNTS` -> (...) error rates in per cent; NaN if the reference is empty."""
    errors = counts[..., :3].sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return 100 * errors / counts[..., 3]


def bootstrap(counts: np.ndarray) -> np.ndarray:
    """(clips, metrics, 4) `COUNTS` -> (draws, metrics) rates of clips drawn with replacement, with a fixed seed."""
    generator = np.random.default_rng(0)
    clips = len(counts)
    counted = np.flatnonzero(counts.any(axis=(1, 2)))  # clips that `summarise_lengths` has set to 0 change no total
    counts = counts[counted].astype(float)
    totals = []
    for _ in range(BOOTSTRAP_DRAWS):
        drawn = generator.integers(0, clips, clips)
        times_drawn = np.bincount(drawn, minlength=clips)[counted].astype(float)
        totals.append(np.tensordot(times_drawn, counts, axes=1))
    return error_rate(np.stack(totals))


def summarise(counts: np.ndarray, names: Iterable[str]) -> dict[str, dict]:
    """(clips, metrics, 4) `COUNTS` -> for each metric, the rate in per cent, its 95 % interval and the counts."""
    summaries = {}
    all_totals = counts.sum(axis=0)  # (metrics, 4)
    all_drawn_rates = bootstrap(counts).T  # (metrics, draws)
    for name, totals, drawn_rates in zip(names, all_totals, all_drawn_rates, strict=True):
        summary = {"rate": None, "low": None, "high": None}
        if totals[3]:
            low, high = np.nanpercentile(drawn_rates, [2.5, 97.5]).tolist()
            summary = {"rate": error_rate(totals).item(), "low": low, "high": high}
        summaries[name] = summary | dict(zip(COUNTS, totals.tolist(), strict=True))
    return summaries


def summarise_lengths(counts: np.ndarray) -> list[dict]:
    """(clips, metrics, 4) `COUNTS` -> the `METRICS` of the clips of each length group."""
    lengths = counts[:, 0, 3]
    groups = []
    for low, high in LENGTH_GROUPS:
        members = (lengths >= low) & (lengths <= (high or np.inf))
        counts_of_members = counts * members[:, None, None]  # those of all other clips become 0
        group = {"characters": [low, high], "clips": members.sum().item()}
        groups.append(group | summarise(counts_of_members, METRICS))
    return groups


def score_clip(prediction: dict, scorers: list[Scorer]) -> list[list[int]]:
    """Add a clip's own figures to its prediction. Returns its `COUNTS` for each of the `METRICS` and each scorer.

    A clip whose reference is empty after normalisation has no counts. A further metric needs its name in METRICS, its
    counts here in that order, and its title in `page_rates`.
    """
    reference = prediction["reference"]
    hypothesis = prediction["hypothesis"]
    texts = [(scorer.normalise(reference), scorer.normalise(hypothesis)) for scorer in scorers]
    normalised_reference, normalised_hypothesis = texts[0]
    prediction["normalised_reference"] = normalised_reference
    prediction["normalised_hypothesis"] = normalised_hypothesis
    if not normalised_reference:
        return []
    by_character = count_errors(normalised_reference, normalised_hypothesis, "characters")
    by_word = count_errors(normalised_reference, normalised_hypothesis, "words")
    prediction.update(zip(CLIP_COLUMNS, by_character + by_word, strict=True))
    prediction["cer"] = round(100 * sum(by_character[:3]) / by_character[3], 2)
    prediction["runaway"] = len(normalised_hypothesis) > 2 * len(normalised_reference) + 10
    raw_by_character = count_errors(reference, hypothesis, "characters")
    raw_by_word = count_errors(reference, hypothesis, "words")
    counts = [by_character, by_word, raw_by_character, raw_by_word]  # in the order of METRICS
    for scorer, scorer_texts in zip(scorers, texts, strict=True):
        by_scorer = count_errors(*scorer_texts, scorer.unit)
        prediction[f"{scorer.name}_errors"] = sum(by_scorer[:3])
        prediction[f"{scorer.name}_reference"] = by_scorer[3]
        counts.append(by_scorer)
    return counts


def count_confusions(predictions: list[dict], unit: str) -> list[dict]:
    """The differences that occur most in the normalised texts, each with its count and the first clips that have it."""
    clips = defaultdict(list)  # ids of the clips that have a difference
    for prediction in predictions:
        expected = prediction["normalised_reference"]
        predicted = prediction["normalised_hypothesis"]
        if not expected or expected == predicted:
            continue
        for piece in align_texts(expected, predicted, unit):
            if piece[0] != piece[1]:
                clips[piece].append(prediction["id"])
    confusions = []
    by_count = sorted(clips.items(), key=lambda item: len(item[1]), reverse=True)
    for (expected, predicted), ids in by_count[:CONFUSIONS]:
        kind = "substitution"
        if not predicted:
            kind = "deletion"
        elif not expected:
            kind = "insertion"
        confusion = {
            "kind": kind,
            "reference": expected,
            "hypothesis": predicted,
            "count": len(ids),
            "clips": list(dict.fromkeys(ids))[:3],
        }
        confusions.append(confusion)
    return confusions


def list_unusable(predictions: list[dict], args: argparse.Namespace) -> dict[str, list[str]]:
    """Ids of the unusable clips, by problem. Fails if no clip is usable, or if clips are too long and not left out."""
    unusable = defaultdict(list)
    for prediction in predictions:
        if prediction["problem"]:
            unusable[prediction["problem"]].append(prediction["id"])
    refuse_long_clips(unusable.get(TOO_LONG, []), args)  # an earlier run with --skip_long_audio may have saved some
    if all(prediction["problem"] for prediction in predictions):
        fail(f"none of the {len(predictions)} clips of {args.dataset_name} can be used: {', '.join(unusable)}")
    return dict(unusable)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard what C libraries and other programs write to stderr, which `redirect_stderr` does not catch."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def score_predictions(predictions: list[dict], scorers: list[Scorer]) -> dict:
    """Add the figures of each usable prediction to it, and compute the metrics of all of them.

    Metrics that do not belong to a scorer follow the first scorer's rule. Text that was predicted where the reference
    is empty after normalisation is counted separately.
    """
    usable = [prediction for prediction in predictions if not prediction["problem"]]
    counted = []
    inserted = []
    with silent_stderr():  # Open JTalk warns of accents
        for prediction in usable:
            if clip_counts := score_clip(prediction, scorers):
                counted.append(clip_counts)
            else:
                inserted.append(prediction["normalised_hypothesis"])
    if not counted:
        fail(NOTHING_TO_SCORE)
    counts = np.array(counted)  # (clips, metrics, 4)
    names = [scorer.name for scorer in scorers]
    overall = summarise(counts, [*METRICS, *names])
    runaways = sum(prediction.get("runaway", False) for prediction in usable)
    metrics = {name: overall[name]["rate"] for name in METRICS}
    return metrics | {
        "clips": len(counts),
        "runaways": runaways,
        "runaway_rate": round(100 * runaways / len(counts), 3),
        "empty_references": len(inserted),
        "silence": {"clips_with_text": sum(map(bool, inserted)), "characters": len("".join(inserted))},
        "scores": {scorer.name: {"unit": scorer.unit} | overall[scorer.name] for scorer in scorers},
        "details": {name: overall[name] for name in METRICS},
        "by_length": summarise_lengths(counts[:, : len(METRICS)]),
        "confusions": count_confusions(usable, scorers[0].unit),
    }


def refuse_empty_references(clips: datasets.Dataset, args: argparse.Namespace) -> None:
    """Fail where no clip has a reference to score, before anything is transcribed."""
    normalise = scoring_rule(args.scorer, text_language(args.language, args.task), None)
    if not any(normalise(text or "") for text in clips["reference"]):
        fail(NOTHING_TO_SCORE)


# ---- clips and windows -----------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """The unit of evaluation: a clip, or a window of several clips."""

    id: str
    seconds: float
    problem: str | None  # why it is unusable, if it is
    reference: str
    waveform: np.ndarray | None  # mono float32 at 16 kHz
    hypothesis: str | None = None

    def prediction(self) -> dict:
        """What is kept of a recording: all but its waveform."""
        return {name: value for name, value in vars(self).items() if name != "waveform"}


Rows = list[int]  # numbers of dataset rows: the clips of one recording
Loader = Callable[[Rows], Recording]


def load_clips(args: argparse.Namespace) -> tuple[datasets.Dataset, Place]:
    """The clips: `audio` (undecoded), `reference` and, if a column is named, `id`; and where their files lie."""
    dataset, place = open_dataset(
        args.dataset_name,
        args.dataset_config_name,
        args.dataset_split_name,
        args.audio_column_name,
        args.text_column_name,
        num_proc=args.preprocessing_num_workers,
    )
    if not len(dataset):
        fail(f"{args.dataset_split_name} of {args.dataset_name} has no rows")
    flags = ("audio_column_name", "text_column_name", "id_column_name")
    require_columns(args.dataset_name, dataset, {flag: getattr(args, flag) for flag in flags})
    columns = {args.audio_column_name: "audio", args.text_column_name: "reference"}
    if args.id_column_name in columns:
        fail(f"--id_column_name {args.id_column_name} is the column of audio or texts: leave it out, or name another")
    if args.id_column_name:
        columns[args.id_column_name] = "id"
    rows = range(len(dataset))[: args.max_samples_per_split]
    return dataset.select_columns(list(columns)).rename_columns(columns).select(rows), place


def silence(row: int, seed: int) -> np.ndarray:
    """The silence, of random length, before a clip that follows another in a window."""
    generator = np.random.default_rng([seed, row])
    samples = generator.integers(0, MAX_SILENCE)
    return np.zeros(samples, np.float32)


def find_problem(clip: Clip, text: str | None, args: argparse.Namespace) -> str | None:
    """Why a clip is unusable, if it is."""
    if clip.problem:
        return clip.problem
    if clip.seconds > WINDOW_SECONDS and not args.long_form:
        return TOO_LONG
    if text is None:
        return "no reference"
    if args.concatenate_audio and not any(map(str.isalnum, text)):
        return "empty reference"
    return None


def load_recording(clips: datasets.Dataset, place: Place, rows: Rows, args: argparse.Namespace) -> Recording:
    """Decode the clips of a recording, and join their waveforms and texts."""
    names = []
    references = []
    waveforms = []
    seconds = 0.0
    problem = None
    for row in rows:
        values = clips[row]
        audio = values["audio"] or {}
        text = values["reference"]
        clip = load_clip(audio, place, whole=args.long_form)
        problem = problem or find_problem(clip, text, args)
        if waveforms:
            waveforms.append(silence(row, args.seed))
        waveforms.append(clip.waveform)
        name = values.get("id")
        if name in (None, ""):
            name = audio.get("path") or row
        names.append(str(name))
        references.append(text or "")
        seconds += clip.seconds
    separator = "" if text_language(args.language, args.task) in UNSPACED else " "
    return Recording(
        id=" + ".join(names),
        seconds=round(seconds, 3),
        problem=problem,
        reference=separator.join(references),
        waveform=None if problem else np.concatenate(waveforms),
    )


def first_names(names: Sequence[str]) -> str:
    """The first ten of these names, for people."""
    shown = list(names[:10])
    if len(names) > 10:
        shown.append("…")
    return ", ".join(shown)


def refuse_long_clips(too_long: list[str], args: argparse.Namespace) -> None:
    """Fail if there are clips over 30 s that --skip_long_audio does not leave out. `too_long` are their ids."""
    if too_long and not args.skip_long_audio:
        fail(
            f"{len(too_long)} clips are longer than 30 s ({first_names(too_long)}): pass --skip_long_audio to leave "
            "them out, or --long_form to evaluate them"
        )


def pack_clips(lengths: Sequence[int | None], limit: int, seed: int) -> list[Rows]:
    """Pack whole clips, in random order, each into the first open window with room; returns the rows of each window.

    An unusable clip (no length), or one longer than a window, gets a window of its own.
    """
    windows: list[Rows] = []
    room: list[int] = []  # samples that are left in each window
    order = np.random.default_rng(seed).permutation(len(lengths))
    for row in order.tolist():
        length = limit if lengths[row] is None else min(limit, lengths[row])
        still_open = range(len(windows))[-OPEN_WINDOWS:]
        window = next((number for number in still_open if room[number] >= length), None)
        if window is None:
            window = len(windows)
            windows.append([])
            room.append(limit)
        windows[window].append(row)
        room[window] -= length
    return windows


def plan_recordings(number: int, load: Loader, args: argparse.Namespace) -> list[Rows]:
    """The rows of each recording: one row if clips are evaluated on their own, several if they are packed."""
    if not args.concatenate_audio:
        return [[row] for row in range(number)]

    def measure(row: int) -> tuple[str, str | None, int | None]:
        """Id and problem of a clip, and the samples that it occupies in a window, or None if it is unusable."""
        recording = load([row])
        samples = None
        if not recording.problem:
            samples = len(silence(row, args.seed)) + len(recording.waveform)
        return recording.id, recording.problem, samples

    with ThreadPoolExecutor(max(1, args.dataloader_num_workers)) as pool:
        measured = list(pool.map(measure, range(number)))
    refuse_long_clips([name for name, problem, _ in measured if problem == TOO_LONG], args)
    lengths = [samples for _, _, samples in measured]
    limit = round(args.concatenate_seconds * SAMPLING_RATE)
    return pack_clips(lengths, limit, args.seed)


# ---- decoding --------------------------------------------------------------------------------------------------------


@dataclass
class Recogniser:
    """A Whisper model on its device, and how it decodes."""

    model: WhisperForConditionalGeneration
    tokenizer: WhisperTokenizerFast
    decoding: dict[str, Any]  # arguments of `generate` that determine the predictions
    decoder: GreedyDecoder | BatchDecoder  # for audio of at most 30 s
    long_decoder: BatchDecoder  # for audio over 30 s


def load_recogniser(args: argparse.Namespace, device: torch.device) -> Recogniser:
    """Load the model with its feature extractor, its tokenizer and, if there is one, its draft model."""
    reference = args.model_name_or_path
    source = {"revision": args.model_revision, "subfolder": args.subfolder}
    config = load_config(reference, **source)
    tokenizer = load_tokenizer(reference, **source)
    extractor = load_pretrained(WhisperFeatureExtractor, reference, **source)
    vocabulary = tokenizer.get_vocab()
    refuse_other_sizes(reference, config, vocabulary, extractor)
    decoding = prompt_arguments(reference, vocabulary, args.language, args.task)
    decoding["max_new_tokens"] = min(args.generation_max_length, config.max_target_positions - PROMPT_TOKENS)
    decoding["num_beams"] = args.generation_num_beams
    decoding["return_timestamps"] = args.return_timestamps or args.long_form

    attention = choose_attention(args.attn_type, args.dtype, device)
    precision = {"dtype": getattr(torch, args.dtype), "attn_implementation": attention}
    generation_config = load_generation_config(reference, config, vocabulary, **source)
    model = spare_copies(load_whisper(reference, generation_config, **precision, **source))
    assistance = {}
    if args.assistant_model:
        assistance = load_assistance(args.assistant_model, model, precision, device)
    model.to(device).eval()
    short, long = make_decoders(model, extractor, decoding | assistance, args.per_device_eval_batch_size)
    return Recogniser(model, tokenizer, decoding, short, long)


def load_assistance(
    reference: str, model: WhisperForConditionalGeneration, precision: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """The arguments with which `generate_tokens` calls `generate` for a draft model, which only speeds it up.

    A draft model gets the main model's encoder outputs, so its own encoder must be identical.
    """
    options = precision | {"generation_config": model.generation_config}
    draft_model = spare_copies(load_whisper(reference, **options))
    weights = list(draft_model.model.encoder.parameters())
    expected = list(model.model.encoder.parameters())
    same_encoder = len(weights) == len(expected) and all(map(torch.equal, weights, expected))
    if not same_encoder or draft_model.config.vocab_size != model.config.vocab_size:
        fail(f"--assistant_model {reference} has another encoder or vocabulary than the model, so it cannot assist")
    decoder = load_pretrained(WhisperForCausalLM, reference, **options)  # without the encoder
    assistance = {"assistant_model": decoder.to(device).eval()}
    if tokens := model.generation_config.begin_suppress_tokens:  # assisted `generate` ignores them
        assistance["logits_processor"] = [SuppressTokensAtBeginLogitsProcessor(tokens, 0, str(device))]
    return assistance


def make_decoders(
    model: WhisperForConditionalGeneration,
    extractor: WhisperFeatureExtractor,
    options: dict[str, Any],
    batch_size: int | None,
) -> tuple[GreedyDecoder | BatchDecoder, BatchDecoder]:
    """The decoders of audio of at most 30 s, and of audio over 30 s. `options` are arguments of `generate`."""
    num_beams = options["num_beams"]
    is_assisted = "assistant_model" in options
    is_greedy = num_beams == 1 and not is_assisted and not other_rules(model.generation_config)
    if is_assisted:
        batch_size = 1  # assisted `generate` takes one clip at a time
    elif batch_size is None:
        max_length = options["max_new_tokens"] + PROMPT_TOKENS
        batch_size = fitting_batch(model, max_length, num_beams, not is_greedy, CPU_BATCH)
    by_generate = BatchDecoder(batch_size, functools.partial(generate_tokens, model, extractor, options))
    if not is_greedy:
        return by_generate, by_generate
    greedy_options = options.copy()
    del greedy_options["num_beams"]
    return GreedyDecoder(model, extractor, batch_size, **greedy_options), by_generate


def model_digest(model: WhisperForConditionalGeneration) -> str:
    """Digest of the generation settings and a few values of each weight, to tell apart models of the same name."""
    settings = model.generation_config.to_dict()
    settings.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for weight in model.parameters():
        start = weight.detach().flatten()[:64].float()
        digest.update(start.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def is_long(waveform: np.ndarray) -> bool:
    """Whether a waveform is over 30 s and is therefore decoded window by window."""
    return len(waveform) > WINDOW_SECONDS * SAMPLING_RATE


@torch.inference_mode()
def generate_tokens(
    model: WhisperForConditionalGeneration,
    extractor: WhisperFeatureExtractor,
    options: dict[str, Any],
    waveforms: list[np.ndarray],
) -> list[list[int]]:
    """Transcribe a batch by `generate`. Audio over 30 s is decoded window by window, everything else in one pass."""
    if any(map(is_long, waveforms)):
        inputs = extractor(
            waveforms,
            sampling_rate=SAMPLING_RATE,
            padding="longest",
            truncation=False,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(model.device, model.dtype)
        tokens = model.generate(**inputs, condition_on_prev_tokens=False, temperature=0.0, **options)
    else:
        features = log_mel(waveforms, extractor, str(model.device))  # (clips, mels, frames)
        features = pad_window(features).to(model.device, model.dtype)  # (clips, mels, 3000)
        # There is one window, so `generate` needs one call and not its loop over windows.
        tokens = model.generate(features, force_unique_generate_call=True, **options)  # (clips, tokens)
    return tokens.tolist()


def transcribe(recogniser: Recogniser, recordings: list[Recording]) -> Iterator[Recording]:
    """Give recordings their hypotheses, and yield each that has one; the longest first, which saves padding."""
    usable = [recording for recording in recordings if recording.waveform is not None]
    usable.sort(key=lambda recording: len(recording.waveform), reverse=True)
    number_long = sum(is_long(recording.waveform) for recording in usable)
    groups = [(recogniser.long_decoder, usable[:number_long]), (recogniser.decoder, usable[number_long:])]
    for decoder, group in groups:
        waveforms = (recording.waveform for recording in group)
        for number, tokens in decoder.decode(waveforms):
            text = recogniser.tokenizer.decode(tokens, skip_special_tokens=True)
            group[number].hypothesis = text.strip()
            yield group[number]


def load_shards(pool: ThreadPoolExecutor, load: Loader, shards: Iterable[list[Rows]]) -> Iterator[list[Recording]]:
    """Yield the recordings of each shard, and load those of the next shard meanwhile."""
    loading = None
    for recording_rows in shards:
        next_loading = pool.map(load, recording_rows)
        if loading:
            yield list(loading)
        loading = next_loading
    if loading:
        yield list(loading)


def predict(
    load: Loader,
    shards: dict[Path, list[Rows]],
    recogniser: Recogniser,
    args: argparse.Namespace,
    show_progress: bool = False,
) -> None:
    """Transcribe the recordings of each shard, and write the shard when it is complete."""
    bar = ProgressBar(desc="transcribing", total=sum(map(len, shards.values())), unit="clip", disable=not show_progress)
    with bar, ThreadPoolExecutor(max(1, args.dataloader_num_workers)) as pool:
        is_first = True
        started = time.perf_counter()
        for path, recordings in zip(shards, load_shards(pool, load, shards.values()), strict=True):
            refuse_long_clips([recording.id for recording in recordings if recording.problem == TOO_LONG], args)
            work = {"device": device_name(recogniser.model.device), "batch_size": recogniser.decoder.batch_size}
            usable = sum(recording.waveform is not None for recording in recordings)
            first_batch = min(usable, recogniser.decoder.batch_size)
            done = []
            for recording in transcribe(recogniser, recordings):
                bar.update()
                done.append(recording)
                # The first batch of a process is slow, as it loads kernels.
                if is_first and len(done) == first_batch:
                    work["warm_up_seconds"] = time.perf_counter() - started
                    work["warm_up_audio_seconds"] = sum(recording.seconds for recording in done)
            bar.update(len(recordings) - len(done))
            finished = time.perf_counter()
            write_predictions(path, recordings, work | {"process_seconds": finished - started})
            started = finished
            is_first = False


# ---- comparison ------------------------------------------------------------------------------------------------------

COMPARED = ("clips", "parameters", "audio_seconds", "process_seconds", "rtfx", "runaways", "silence", "scores")


@dataclass
class Evaluation:
    """The results of an evaluation."""

    model: str  # as it is shown
    dataset: str  # as it is shown
    metrics: dict
    predictions: list[dict]
    # Paired tests against the first evaluation of the same data, by scorer. None: this is the first one. Empty: the
    # clips differ from those of the first one.
    tests: dict[str, dict] | None = None

    @property
    def data(self) -> tuple[str, str]:
        """Dataset and <name> of the results; only evaluations of the same data are compared."""
        return self.metrics["dataset"], self.metrics["name"]

    @property
    def language(self) -> str | None:
        """The language in which the texts are written."""
        return text_language(self.metrics["language"], self.metrics.get("task", "transcribe"))

    @property
    def headline(self) -> dict:
        """Rate, interval and unit of --scorer."""
        return self.metrics["scores"][self.metrics["scorer"]]

    @property
    def scored(self) -> list[dict]:
        return [prediction for prediction in self.predictions if prediction.get("cer") is not None]

    @property
    def clips(self) -> list[tuple[str, str]]:
        """Ids and references of the scored clips."""
        return [(prediction["id"], prediction["normalised_reference"]) for prediction in self.scored]

    def counts(self, scorer: str) -> np.ndarray:
        """(clips, 4): the `COUNTS` of each scored clip, all errors as substitutions."""
        counts = np.zeros((len(self.scored), len(COUNTS)))
        counts[:, 0] = [row[f"{scorer}_errors"] for row in self.scored]
        counts[:, 3] = [row[f"{scorer}_reference"] for row in self.scored]
        return counts


def read_table_of_clips(path: Path, scorers: Iterable[str]) -> list[dict]:
    """The predictions of an all_predictions.<name>.csv; figures that are not there are None."""
    figures = ["seconds", "cer", "confidence", *CLIP_COLUMNS]
    for scorer in scorers:
        figures += [f"{scorer}_errors", f"{scorer}_reference"]
    predictions = []
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for column in figures:
                row[column] = float(row[column]) if row.get(column) else None
            row["runaway"] = row["runaway"] == "True"
            predictions.append(row)
    return predictions


def read_evaluation(path: Path) -> Evaluation:
    """Read the evaluation of a metric.<name>.json."""
    table = path.with_name(f"all_predictions.{path.stem.removeprefix('metric.')}.csv")
    if not table.is_file():
        fail(f"{table} is missing: evaluate again with --output_dir {path.parent}")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if "scores" not in metrics:
            fail(f"{path} is of an earlier version: evaluate again with --output_dir {path.parent}")
        predictions = read_table_of_clips(table, metrics["scores"])
        kind = metrics["name"].removeprefix(split_title(metrics["dataset_split_name"]))  # for example .windows_30
        dataset = shown_name(metrics["dataset"]) + re.sub(r"[._]", " ", kind)
        evaluation = Evaluation(shown_name(metrics["model"]), dataset, metrics, predictions)
        for count in COUNTS:
            if sum(row[f"character_{count}"] for row in evaluation.scored) != metrics["details"]["cer"][count]:
                raise ValueError("the counts of the clips do not add up")
        return evaluation
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        fail(f"{path} or {table.name} is damaged ({first_line(error)}): evaluate again")


def paired_difference(first: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Bootstrap the difference of two error rates on the same clips, each given by its (clips, 4) `COUNTS`.

    Returns the difference in percentage points, both ends of its 95 % interval, and the two-sided p-value.
    """
    both = np.stack([first, other], axis=1)  # (clips, 2, 4)
    first_rate, other_rate = error_rate(both.sum(axis=0)).tolist()
    drawn_rates = bootstrap(both)  # (draws, 2)
    drawn = drawn_rates[:, 1] - drawn_rates[:, 0]
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
    rarer = min(np.sum(drawn <= 0), np.sum(drawn >= 0)).item()  # draws on the side of 0 that has fewer of them
    p = 2 * (1 + rarer) / (1 + BOOTSTRAP_DRAWS)
    return {"difference": other_rate - first_rate, "low": low, "high": high, "p": min(1.0, p)}


def compare_with(first: Evaluation, other: Evaluation) -> dict[str, dict]:
    """The paired test of each scorer that both have; none where they are not of the same clips."""
    tests = {}
    if first.clips != other.clips:
        return tests
    for scorer in first.metrics["scores"]:
        if scorer in other.metrics["scores"]:
            tests[scorer] = paired_difference(first.counts(scorer), other.counts(scorer))
    return tests


def read_evaluations(directories: list[str]) -> list[Evaluation]:
    """The evaluations in these directories, those of the same data together, with names that tell them apart."""
    evaluations = []
    seen = set()
    for directory in directories:
        paths = sorted(Path(directory).rglob("metric.*.json"))
        if not paths:
            fail(f"{directory} has no metric.<split>.json: evaluate a model with --output_dir {directory} first")
        for path in paths:
            evaluation = read_evaluation(path)
            if (evaluation.model, evaluation.data) in seen:
                evaluation.model += f" ({path.parent.name})"
            seen.add((evaluation.model, evaluation.data))
            evaluations.append(evaluation)
    return sorted(evaluations, key=lambda evaluation: evaluation.data)


def format_test(evaluation: Evaluation) -> str:
    """The paired test of an evaluation's headline for people."""
    if evaluation.tests is None:
        return ""
    test = evaluation.tests.get(evaluation.metrics["scorer"])
    if test is None:
        return "other clips"
    return f"{test['difference']:+.2f} ({test['low']:+.2f} to {test['high']:+.2f}, p = {test['p']:.3f})"


def comparison_table(evaluations: list[Evaluation]) -> list[list[str]]:
    """The header and a row for each evaluation, for print and page. The page finds the last three columns by place."""
    titles = scorer_titles(*(evaluation.metrics for evaluation in evaluations))
    header = ["Model", "Parameters", "Dataset", "Clips"]
    header += [f"{title} %" for title in titles.values()]
    table = [[*header, "Against the first", "RTFx", "Seconds"]]
    for evaluation in evaluations:
        metrics = evaluation.metrics
        parameters = f"{metrics['parameters'] / 1e6:.1f} M" if metrics["parameters"] else ""
        cells = [evaluation.model, parameters, evaluation.dataset, f"{metrics['clips']:,}"]
        for name in titles:
            summary = metrics["scores"].get(name, {"rate": None})
            cell = ""
            if summary["rate"] is not None:
                cell = f"{summary['rate']:.2f} ({summary['low']:.2f} to {summary['high']:.2f})"
            cells.append(cell)
        seconds = "" if metrics["process_seconds"] is None else f"{metrics['process_seconds']:.0f}"
        table.append([*cells, format_test(evaluation), f"{metrics['rtfx'] or ''}", seconds])
    return table


def compare(args: argparse.Namespace) -> None:
    """Print saved evaluations, each compared with the first one on the same data, and write them as JSON and page."""
    evaluations = read_evaluations(args.compare)
    firsts: dict[tuple, Evaluation] = {}
    compared = []
    for evaluation in evaluations:
        first = firsts.setdefault(evaluation.data, evaluation)
        if evaluation is not first:
            evaluation.tests = compare_with(first, evaluation)
        entry = {"model": evaluation.model, "dataset": evaluation.dataset, "against_first": evaluation.tests or None}
        compared.append(entry | {name: evaluation.metrics[name] for name in COMPARED})
    header, *rows = comparison_table(evaluations)
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")
    if args.dry_run:
        return
    output_dir = Path(args.output_dir)
    with one_line_for_write_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "comparison.json", {"evaluations": compared})
        write_atomically(output_dir / "comparison.html", render_page("Comparison", evaluations))


# ---- page ------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8886; --bar: #4a87b5; --lost: #c2570022; --got: #0a6cc422 }
@media (prefers-color-scheme: dark) { :root { --lost: #ff9a4444; --got: #58b0ff44; --bar: #6ba7d3 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem }
body, .details { overflow-wrap: break-word } .text, .pair, dd { overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem } h3 { font-size: 1rem; margin: .5rem 0 0 }
.rate { font-size: 3rem; font-weight: 600; line-height: 1.1 }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem } dd { margin: 0 }
.scroll { overflow: auto } .long { max-height: 26rem } .scroll .text, .scroll th { overflow-wrap: normal }
.scroll td.text { min-width: 4rem; max-width: 26rem } .compared th { white-space: nowrap }
table { border-collapse: collapse } caption { text-align: left; padding: .3rem 0 }
td, th { padding: .2rem .7rem .2rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line) }
th[scope=row], .text, .text + .text { text-align: left }
.number { white-space: nowrap; font-variant-numeric: tabular-nums }
svg.bar { width: 12rem; height: .8rem; overflow: visible; vertical-align: middle }
.bar rect { fill: var(--bar) } .bar path { stroke: currentColor; stroke-width: 1.5; vector-effect: non-scaling-stroke }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: end; margin: .5rem 0 }
.controls label { display: grid } input, select, button { font: inherit; padding: .2rem .4rem; max-width: 100% }
th button, .example, .open { border: 0; background: none; color: inherit; padding: 0; cursor: pointer }
th button, .open { text-align: inherit }
.open, .example { text-decoration: underline dotted; margin-right: .5rem }
th button { font-weight: 600 } [aria-sort=ascending] button::after { content: " ▲" }
[aria-sort=descending] button::after { content: " ▼" }
#clips { width: 100% } #clips .clip { cursor: pointer } #clips .clip:hover { background: #8882 }
#clips .clip .text { width: 60%; min-width: 14rem }
.details { text-align: left } .aligned { display: flex; flex-wrap: wrap; margin: .2rem 0 .5rem; row-gap: .4rem }
.pair { display: inline-grid; grid-template-rows: auto auto; min-width: .5em; max-width: 100% }
.words .pair { margin-right: .4em }
.pair.differs { border: 1px solid; border-radius: 3px; margin: -1px 1px; padding: 0 .1em }
del { background: var(--lost); text-decoration: underline dashed } ins { background: var(--got); font-weight: 600 }
audio { display: block; width: min(30rem, 100%) }
.tag { border: 1px solid; border-radius: 3px; padding: 0 .3em; font-size: .8em }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap }
@media (max-width: 40rem) {
  svg.bar { width: 24vw } .rate { font-size: 2.2rem } .minor { display: none }
  #clips, #clips tbody, #clips tr, #clips td, #clips .clip .text { display: block; width: 100%; border: 0 }
  #clips td { text-align: left }
  #clips thead tr { display: flex; flex-wrap: wrap } #clips thead th { border: 0 } #clips thead .text { display: none }
  #clips tbody tr { border-bottom: 1px solid var(--line); padding: .4rem 0 }
  #clips .clip .number { display: inline-block; width: auto }
  #clips .number::before { content: attr(data-label) " "; opacity: .7 }
}
"""

SCRIPT = """
"use strict"
const data = JSON.parse(document.getElementById("data").textContent)
const find = id => document.getElementById(id)
const collator = new Intl.Collator(undefined, {numeric: true})
const perPage = 50
let sortBy = 0, descending = true, page = 0, shown = []

function make(tag, properties, ...children) {  // strings among the children become text, never HTML
  const made = document.createElement(tag)
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value)
  made.append(...children)
  return made
}

const bothSides = piece => typeof piece === "string" ? [piece, piece] : piece
const sideOf = (pieces, side) => pieces.map(piece => bothSides(piece)[side]).join(data.unit === "words" ? " " : "")

for (const clip of data.clips) {
  const texts = clip.texts.flatMap(text => text.aligned.flatMap(pieces => [sideOf(pieces, 0), sideOf(pieces, 1)]))
  clip.search = [clip.id, ...texts].join("\\n").toLowerCase()
}

function aligned(pieces) {  // two lines, one above the other: the reference and what was heard
  const box = make("div", {class: "aligned " + data.unit, lang: data.language, "aria-hidden": "true"})
  for (const piece of pieces) {
    if (typeof piece === "string") {
      for (const letter of data.unit === "words" ? piece.split(" ") : piece) {
        box.append(make("span", {class: "pair"}, make("span", {}, letter), make("span", {}, letter)))
      }
    } else {
      const [expected, predicted] = piece.map(side => side || "∅")
      box.append(make("span", {class: "pair differs"}, make("del", {}, expected), make("ins", {}, predicted)))
    }
  }
  return box
}

function spoken(pieces) {  // the same for those who listen to the page
  const changes = pieces.filter(piece => typeof piece !== "string").map(([expected, predicted]) =>
    expected && predicted ? `“${expected}” is “${predicted}”` : expected ? `no “${expected}”` : `added “${predicted}”`)
  const texts = `Reference: ${sideOf(pieces, 0)}. Prediction: ${sideOf(pieces, 1)}.`
  return make("p", {class: "hidden"}, `${texts} ${changes.join("; ") || "No difference"}.`)
}

function details(clip) {
  const cell = make("td", {class: "details", colspan: data.columns.length + 2, role: "cell"})
  if (clip.audio) cell.append(make("audio", {controls: "", src: "data:audio/flac;base64," + clip.audio}))
  for (const text of clip.texts) {
    if (data.models.length > 1) cell.append(make("h3", {}, text.model))
    text.aligned.forEach((pieces, index) => {
      cell.append(make("small", {}, ["Normalised", "As written"][index]), aligned(pieces), spoken(pieces))
    })
  }
  return make("tr", {role: "row"}, cell)
}

function rowOf(clip) {
  const button = make("button", {class: "open", "aria-expanded": "false"}, clip.id)
  const row = make("tr", {class: "clip", role: "row"}, make("td", {class: "text", role: "cell"}, button))
  row.firstChild.append(make("span", {lang: data.language}, sideOf(clip.texts[0].aligned[1], 0) || "(empty)"))
  for (const kind of clip.kinds) {
    if (kind !== "wrong") row.firstChild.append(" ", make("span", {class: "tag"}, kind))
  }
  data.columns.forEach((column, index) => {
    const figure = clip.figures[index]
    const text = figure === null ? "–" : figure.toFixed(column.digits)
    row.append(make("td", {class: "number", role: "cell", "data-label": column.label}, text))
  })
  row.onclick = () => {
    const open = button.getAttribute("aria-expanded") === "true"
    button.setAttribute("aria-expanded", String(!open))
    if (open) row.nextSibling.remove()
    else row.after(details(clip))
  }
  return row
}

function show() {
  const rows = shown.slice(page * perPage, (page + 1) * perPage)
  find("rows").replaceChildren(...rows.map(rowOf))
  const last = page * perPage + rows.length
  find("count").textContent = rows.length ? `${page * perPage + 1} to ${last} of ${shown.length} clips` : "no such clip"
  find("previous").disabled = page === 0
  find("next").disabled = last >= shown.length
}

function select() {
  const wanted = find("search").value.trim().toLowerCase()
  const [shortest, longest] = find("length").value.split(" ").map(Number)
  const kind = find("kind").value
  const value = clip => sortBy < 0 ? clip.id : clip.figures[sortBy]
  shown = data.clips.filter(clip => clip.search.includes(wanted) && (!kind || clip.kinds.includes(kind)))
  shown = shown.filter(clip => clip.length >= shortest && clip.length <= longest)
  shown.sort((a, b) => {
    const [first, second] = descending ? [value(b), value(a)] : [value(a), value(b)]
    if (first === null || second === null) return (value(a) === null) - (value(b) === null)  // unknown comes last
    return sortBy < 0 ? collator.compare(first, second) : first - second
  })
  document.querySelectorAll("#clips th").forEach((head, index) => {
    head.setAttribute("aria-sort", index - 1 !== sortBy ? "none" : descending ? "descending" : "ascending")
  })
  page = 0
  show()
}

document.querySelectorAll("#clips th button").forEach((button, index) => button.onclick = () => {
  descending = index - 1 === sortBy ? !descending : index > 0
  sortBy = index - 1
  select()
})
document.querySelectorAll(".example").forEach(button => button.onclick = () => {
  find("search").value = button.textContent
  find("kind").value = ""
  find("length").selectedIndex = 0
  select()
  find("search").scrollIntoView()
})
for (const id of ["search", "kind", "length"]) find(id).oninput = select
find("previous").onclick = () => { page--; show() }
find("next").onclick = () => { page++; show() }
select()
"""

PAGE = """<!DOCTYPE html>
{% macro interval(summary) %}{{ "%.2f to %.2f %%"|format(summary.low, summary.high) }}{% endmacro %}
{% macro characters(low, high) %}{{ low }}{{ " to %d"|format(high) if high else " or more" }}{% endmacro %}
{% macro bar(summary, scale) %}
<span class="number"><svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">
  <rect width="{{ [100 * summary.rate / scale, 100]|min }}" height="10"/>
  <path d="M{{ [100 * summary.low / scale, 100]|min }} 5H{{ [100 * summary.high / scale, 100]|min }}"/>
</svg>{{ " »" if summary.rate > scale }}</span>
{% endmacro %}
{% macro rate_cells(summary, scale) %}
{% if summary.rate is none %}
  <td></td>
  <td></td>
{% else %}
  <td class="number">{{ summary.rate|percent }}</td>
  <td class="text">{{ bar(summary, scale) }} <span class="number">{{ interval(summary) }}</span></td>
{% endif %}
{% endmacro %}
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>{{ title }}</title>
  <meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src '{{ script|digest }}';
   style-src '{{ style|digest }}'; media-src data:; base-uri 'none'; form-action 'none'">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <style>{{ style|safe }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>

{% if evaluations|length == 1 %}
{% set metrics = evaluations[0].metrics %}
{% set headline = evaluations[0].headline %}
<p><span class="rate">{{ headline.rate|percent }}</span><br>
  {{ titles[scorer] }}, 95 % interval {{ interval(headline) }}</p>
<dl class="facts">
{% for name, value in facts.items() %}
  <dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>

<h2>All scorers</h2>
<div class="scroll" tabindex="0"><table>
<caption>Error rates; the line on a bar is the 95 % interval</caption>
<tr>
  <th scope="col" class="text">Scorer</th>
  <th scope="col">Rate</th>
  <th scope="col" class="text">95 % interval</th>
{% for count in counts %}
  <th scope="col" class="minor">{{ count }}</th>
{% endfor %}
</tr>
{% for name, summary in rates.items() %}
<tr>
  <th scope="row">{{ name }}</th>
  {{- rate_cells(summary, scale) }}
{% for count in counts %}
  <td class="number minor">{{ "{:,}".format(summary[count]) }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>

<h2>By length of the reference</h2>
<div class="scroll" tabindex="0"><table>
<caption>Character error rate of the clips of each length</caption>
<tr>
  <th scope="col" class="text">Characters</th>
  <th scope="col" class="minor">Clips</th>
  <th scope="col">Rate</th>
  <th scope="col" class="text">95 % interval</th>
</tr>
{% for group in metrics.by_length %}
<tr>
  <th scope="row" class="number">{{ characters(*group.characters) }}</th>
  <td class="number minor">{{ "{:,}".format(group.clips) }}</td>
  {{- rate_cells(group.cer, length_scale) }}
</tr>
{% endfor %}
</table></div>

<h2>What is confused most</h2>
<div class="scroll long" tabindex="0"><table>
<caption>Differences of the normalised texts; a clip's name shows that clip</caption>
<tr>
  <th scope="col" class="text">Reference</th>
  <th scope="col" class="text">Prediction</th>
  <th scope="col" class="text minor">Kind</th>
  <th scope="col">Times</th>
  <th scope="col" class="text">For example</th>
</tr>
{% for confusion in metrics.confusions %}
<tr>
  <td class="text" lang="{{ data.language }}"><del>{{ confusion.reference }}</del></td>
  <td class="text" lang="{{ data.language }}"><ins>{{ confusion.hypothesis }}</ins></td>
  <td class="text minor">{{ confusion.kind }}</td>
  <td class="number">{{ "{:,}".format(confusion.count) }}</td>
  <td class="text">
    {%- for clip in confusion.clips %}<button class="example">{{ clip }}</button>{% endfor %}</td>
</tr>
{% endfor %}
</table></div>

{% else %}
{# The rows of the printed table, with the bar and the paired test in front of the other figures. #}
<div class="scroll compared" tabindex="0"><table>
<caption>Rates with their 95 % intervals; paired tests against the first of the same data, in points</caption>
<tr>
  <th scope="col" class="text">{{ table[0][0] }}</th>
  <th scope="col" class="text">Rate</th>
  <th scope="col">{{ table[0][-3] }}</th>
{% for name in table[0][1:-3] + table[0][-2:] %}
  <th scope="col">{{ name }}</th>
{% endfor %}
</tr>
{% for cells in table[1:] %}
{% set headline = headlines[loop.index0] %}
<tr>
  <th scope="row">{{ cells[0] }}</th>
  <td class="text"><span class="number">{{ headline.rate|percent }}</span> {{ bar(headline, scale) }}</td>
  <td>{{ cells[-3] }}</td>
{% for cell in cells[1:-3] + cells[-2:] %}
  <td>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
{% endif %}

<h2>All clips</h2>
<noscript>This table needs JavaScript; all_predictions.*.csv has the same rows.</noscript>
<div class="controls">
  <label>Search in texts and names<input type="search" id="search"></label>
  <label>Show<select id="kind">
    <option value="">all clips</option>
    <option value="wrong">only wrong</option>
    <option value="runaway">runaways</option>
    <option value="empty">without a reference</option>
  </select></label>
  <label>Characters<select id="length">
    <option value="0 Infinity">any length</option>
{% for low, high in length_groups %}
    <option value="{{ low }} {{ high or 'Infinity' }}">{{ characters(low, high) }}</option>
{% endfor %}
  </select></label>
</div>
<table id="clips" role="table">
<caption>A row opens to the texts side by side, and to the audio where the page has it</caption>
<thead role="rowgroup"><tr role="row">
  <th scope="col" role="columnheader" class="text"><button>Clip</button></th>
{% for column in data.columns %}
  <th scope="col" role="columnheader"><button>{{ column.label }}</button></th>
{% endfor %}
</tr></thead>
<tbody id="rows" role="rowgroup"></tbody>
</table>
<div class="controls">
  <button id="previous">Previous</button>
  <span id="count" role="status"></span>
  <button id="next">Next</button>
</div>
</main>
<script type="application/json" id="data">{{ data|tojson }}</script>
<script>{{ script|safe }}</script>
</body>
</html>
"""


def digest_source(content: str) -> str:
    """How a content security policy names the one script or style that it allows."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def bar_scale(summaries: Iterable[dict]) -> float:
    """The rate of a full bar: the highest end of an interval, but at most 4 times the median, as one may be huge."""
    known = [summary for summary in summaries if summary["rate"] is not None]
    if not known:
        return 1.0
    typical = statistics.median_low(summary["rate"] for summary in known)
    highest = max(summary["high"] for summary in known)
    if typical:
        highest = min(highest, 4 * typical)
    return max(highest, 1.0)


Versions = list[tuple[Evaluation, dict]]  # the predictions of a clip, each with its evaluation


def page_text(evaluation: Evaluation, prediction: dict) -> dict:
    """Both texts of a clip in pieces, normalised and as written: a string where they are equal, else a pair."""
    aligned = []
    for prefix in ("normalised_", ""):
        texts = (prediction[f"{prefix}reference"], prediction[f"{prefix}hypothesis"])
        pieces = align_texts(*texts, evaluation.headline["unit"])
        aligned.append([piece if piece[0] != piece[1] else piece[0] for piece in pieces])
    return {"model": evaluation.model, "aligned": aligned}


def clip_rate(prediction: dict, scorer: str) -> float | None:
    """The error rate of a clip by a scorer, or None where it has none."""
    length = prediction.get(f"{scorer}_reference")
    return 100 * prediction[f"{scorer}_errors"] / length if length else None


def compared_rates(versions: Versions, models: list[str]) -> list[float | None]:
    """The widest difference between the models' rates of a clip, then the rate of each model."""
    rates = {}
    for evaluation, prediction in versions:
        rates[evaluation.model] = clip_rate(prediction, evaluation.metrics["scorer"])
    known = [rate for rate in rates.values() if rate is not None]
    widest = max(known) - min(known) if known else None
    return [widest, *map(rates.get, models)]


def find_versions(evaluations: list[Evaluation]) -> list[Versions]:
    """The predictions of each usable clip, from all evaluations that have it."""
    versions = defaultdict(list)
    for evaluation in evaluations:
        occurrences = Counter()
        for prediction in evaluation.predictions:
            if prediction["problem"]:
                continue
            clip = (evaluation.data, prediction["id"], prediction["reference"])
            occurrences[clip] += 1  # names need not be unique
            versions[clip, occurrences[clip]].append((evaluation, prediction))
    return list(versions.values())


def page_clip(versions: Versions, rates: list[float | None]) -> dict:
    """A clip as the page's script gets it: its texts by model, its kinds, its figures and its audio."""
    predictions = [prediction for _, prediction in versions]
    first = predictions[0]
    kinds = set()
    for prediction in predictions:
        if prediction["normalised_reference"] != prediction["normalised_hypothesis"]:
            kinds.add("wrong")
        if prediction.get("runaway"):
            kinds.add("runaway")
    if not first["normalised_reference"]:
        kinds.add("empty")
    length = len(first["normalised_reference"])
    return {
        "id": first["id"],
        "length": length,
        "texts": [page_text(*version) for version in versions],
        "kinds": sorted(kinds),
        "audio": first.get("audio"),
        "figures": [*rates, length, first["seconds"], first.get("confidence")],
    }


def page_data(evaluations: list[Evaluation]) -> dict:
    """The data of the page's script: the clips, and the columns of their figures."""
    models = list(dict.fromkeys(evaluation.model for evaluation in evaluations))
    metrics = evaluations[0].metrics
    titles = scorer_titles(metrics)
    scorers = [metrics["scorer"]]
    scorers += [name for name in ("readings", "words") if name in titles]
    is_comparison = len(models) > 1
    labels = ["widest difference", *models] if is_comparison else [titles[name] for name in scorers]
    clips = []
    for versions in find_versions(evaluations):
        if is_comparison:
            rates = compared_rates(versions, models)
        else:
            rates = [clip_rate(versions[0][1], name) for name in scorers]
        clips.append(page_clip(versions, rates))
    columns = [{"label": f"{label} %", "digits": 0} for label in labels]
    columns += [{"label": "characters", "digits": 0}, {"label": "seconds", "digits": 1}]
    if any(clip["figures"][-1] is not None for clip in clips):
        columns.append({"label": "confidence", "digits": 2})
    return {
        "models": models,
        "language": evaluations[0].language,
        "unit": evaluations[0].headline["unit"],
        "columns": columns,
        "clips": clips,
    }


def page_facts(evaluation: Evaluation) -> dict[str, str]:
    """The facts at the top of a page, by name; the paths of files are not among them."""
    metrics = evaluation.metrics
    got_text = metrics["silence"]
    invented = f"{got_text['clips_with_text']:,} of them got text, {got_text['characters']:,} characters"
    facts = {
        "Model": evaluation.model,
        "Dataset": f"{evaluation.dataset}, {metrics['name']}",
        "Clips": f"{metrics['clips']:,}, {metrics['audio_seconds'] / 3600:.2f} h",
        "RTFx": "unknown",
    }
    if metrics["rtfx"]:
        facts["RTFx"] = f"{metrics['rtfx']} seconds of audio per second"
        facts["Computed by"] = f"{metrics['device']}, {metrics['dtype']}, batches of {metrics['batch_size']}"
    facts |= {
        "Runaways": f"{metrics['runaways']:,} ({metrics['runaway_rate']:.2f} %)",
        "Without a reference": f"{metrics['empty_references']:,}; {invented}",
        "Parameters": f"{metrics['parameters'] / 1e6:.1f} M" if metrics["parameters"] else "unknown",
    }
    for problem, names in metrics["unusable"].items():
        facts[f"Left out: {problem}"] = f"{len(names):,}: {first_names(names)}"
    return facts


def page_rates(evaluation: Evaluation) -> dict[str, dict]:
    """All rates of an evaluation by title: those of the scorers, then the others by the headline scorer's rule."""
    metrics = evaluation.metrics
    rates = {title: metrics["scores"][name] for name, title in scorer_titles(metrics).items()}
    # A normalised text without spaces is one word, which is right or wrong as a whole.
    word = "Sentence error rate" if evaluation.language in UNSPACED else "WER"
    rates.setdefault(f"CER ({metrics['scorer']})", metrics["details"]["cer"])
    rates["CER of the raw texts"] = metrics["details"]["cer_raw"]
    rates.setdefault(f"{word} ({metrics['scorer']})", metrics["details"]["wer"])
    rates["WER of the raw texts"] = metrics["details"]["wer_raw"]  # which may have spaces
    return rates


def render_page(title: str, evaluations: list[Evaluation]) -> str:
    """One self-contained page about one evaluation, or about several."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {"percent": format_rate, "digest": digest_source}
    first = evaluations[0]
    rates = page_rates(first)
    headlines = [evaluation.headline for evaluation in evaluations]
    return environment.from_string(PAGE).render(
        title=title,
        style=STYLE,
        script=SCRIPT,
        evaluations=evaluations,
        table=comparison_table(evaluations),
        headlines=headlines,
        titles=scorer_titles(first.metrics),
        scorer=first.metrics["scorer"],
        facts=page_facts(first),
        rates=rates,
        counts=COUNTS,
        scale=bar_scale(rates.values() if len(evaluations) == 1 else headlines),
        length_scale=bar_scale(group["cer"] for group in first.metrics["by_length"]),
        length_groups=LENGTH_GROUPS,
        data=page_data(evaluations),
    )


def encode_audio(waveform: np.ndarray) -> str:
    """A waveform as a FLAC file in base64."""
    file = io.BytesIO()
    soundfile.write(file, waveform, SAMPLING_RATE, format="FLAC")
    return base64.b64encode(file.getvalue()).decode()


def badness(prediction: dict) -> float:
    """The error rate of a clip; infinite if the reference is empty and the prediction is not."""
    if not prediction["normalised_reference"] and prediction["normalised_hypothesis"]:
        return math.inf
    return prediction.get("cer", 0.0)


def embed_audio(predictions: list[dict], load_waveform: Callable[[int], np.ndarray], megabytes: float) -> None:
    """Add the `audio` that a page holds to predictions, in base64: to the worst clips first, to as many as fit."""
    playable = []
    for row, prediction in enumerate(predictions):
        if not prediction["problem"] and prediction["seconds"] <= MAX_PLAYED_SECONDS:
            playable.append(row)
    left = megabytes * 1e6
    for row in sorted(playable, key=lambda row: badness(predictions[row]), reverse=True):
        audio = encode_audio(load_waveform(row))
        left -= len(audio)
        if left < 0:
            break
        predictions[row]["audio"] = audio


# ---- predictions of other engines ------------------------------------------------------------------------------------

HYPOTHESIS_COLUMNS = ("hypothesis", "prediction", "text", "transcription")  # the first that is there has the texts
OWN_REFERENCES = "references of the predictions"  # the name of the data where there is no dataset


def read_prediction_rows(path: Path) -> list[dict]:
    """The rows of a .csv, .tsv or .jsonl file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                delimiter = "\t" if path.suffix == ".tsv" else ","
                rows = list(csv.DictReader(file, delimiter=delimiter))
    except (OSError, ValueError, csv.Error) as error:
        fail(f"cannot read --predictions {path}: {first_line(error)}")
    if not rows or not all(isinstance(row, dict) for row in rows):
        fail(f"--predictions {path} needs rows of named values: CSV with a header, or a JSON object per line")
    return rows


def text_of(row: dict, column: str) -> str:
    """A text of a row, empty where there is none. Characters that UTF-8 cannot encode are replaced."""
    value = row.get(column)
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def figure_of(row: dict, column: str) -> float | None:
    """A number of a row, or None where there is none."""
    value = row.get(column)
    try:
        return None if value in (None, "") else float(value)
    except (TypeError, ValueError):
        fail(f"--predictions has a {column} that is no number: {value!r}")


def read_engine(path: Path, args: argparse.Namespace) -> list[dict]:
    """The rows of --predictions, with the engine's texts under `hypothesis` and the ids, if there are any, under `id`.

    `path` is a file, or a directory that an evaluation wrote.
    """
    if path.is_dir():
        path = path / f"all_predictions.{args.name}.csv"
    rows = read_prediction_rows(path)
    columns = ", ".join(map(str, rows[0]))
    text_column = next((name for name in HYPOTHESIS_COLUMNS if name in rows[0]), None)
    if text_column is None:
        fail(f"--predictions {path} needs a column of texts ({', '.join(HYPOTHESIS_COLUMNS)}); it has {columns}")
    if not args.dataset_name and "reference" not in rows[0]:
        fail(f"--predictions {path} needs a column `reference`, or --dataset_name; it has {columns}")
    id_column = next((name for name in (args.id_column_name, "id") if name and name in rows[0]), None)
    for row in rows:
        row["hypothesis"] = text_of(row, text_column)
        if id_column:
            row["id"] = text_of(row, id_column)
    return rows


def own_references(rows: list[dict]) -> list[dict]:
    """The clips of predictions whose references stand beside them."""
    clips = []
    for number, row in enumerate(rows):
        clip = {
            "id": row.get("id", str(number)),
            "seconds": figure_of(row, "seconds") or 0.0,
            "problem": row.get("problem") or None,
            "reference": text_of(row, "reference"),
        }
        clips.append(clip)
    return clips


def count_ids(ids: list[str]) -> str:
    """How many ids these are, and the first of them, for a message."""
    return f"{len(ids):,} ({first_names(ids)})"


def match_rows(rows: list[dict], ids: list[str]) -> list[dict | None]:
    """The row of each clip of a dataset, by id if the rows have ids, else by order; None where a clip has no row."""
    if "id" not in rows[0]:
        if len(rows) != len(ids):
            fail(f"--predictions has {len(rows):,} rows for {len(ids):,} clips: give it a column id, or all rows")
        return rows
    by_id = {row["id"]: row for row in rows}
    times = Counter(row["id"] for row in rows)
    if twice := [name for name in times if times[name] > 1]:
        fail(f"--predictions has several rows of {count_ids(twice)}")
    if unknown := sorted(times.keys() - set(ids)):
        logger.warning("rows of --predictions that no clip has the id of: %s", count_ids(unknown))
    if missing := [name for name in ids if name not in times]:
        logger.warning("clips that --predictions has no row of: %s", count_ids(missing))
    return [by_id.get(name) for name in ids]


def add_hypotheses(predictions: list[dict], rows: list[dict | None]) -> None:
    """Add the engine's text and, where it has one, its confidence to each clip."""
    for prediction, row in zip(predictions, rows, strict=True):
        if row is None:
            prediction["problem"] = prediction["problem"] or "no prediction"
            continue
        prediction["hypothesis"] = row["hypothesis"]
        confidence = figure_of(row, "confidence")
        if confidence is not None:
            prediction["confidence"] = confidence


def score_other_engine(args: argparse.Namespace) -> None:
    """Score --predictions, and write the same results as for a model."""
    path = Path(args.predictions)
    rows = read_engine(path, args)
    load = None
    if args.dataset_name:
        clips, place = load_clips(args)
        refuse_empty_references(clips, args)
        load = functools.partial(load_recording, clips, place, args=args)
        # Clips are decoded for their lengths and problems: headers may be wrong.
        with ThreadPoolExecutor(max(1, args.dataloader_num_workers)) as pool:
            predictions = list(pool.map(lambda row: load([row]).prediction(), range(len(clips))))
        rows = match_rows(rows, [prediction["id"] for prediction in predictions])
    else:
        predictions = own_references(rows)
    add_hypotheses(predictions, rows)
    facts = dict.fromkeys(("parameters", "process_seconds", "rtfx", "dtype", "device", "batch_size"))
    facts |= {
        "model": args.model_name_or_path or path.stem,
        "dataset": args.dataset_name or OWN_REFERENCES,
        "dataset_config_name": args.dataset_config_name,
        "dataset_split_name": args.dataset_split_name,
        "language": args.language,
        "task": args.task,
        "audio_seconds": round(sum(prediction["seconds"] for prediction in predictions), 1),
    }
    if text_language(args.language, args.task) == "en":
        logger.warning("without a tokenizer, British and American spellings count as different words")
    with one_line_for_write_errors(args.output_dir), lock_results(args):
        load_waveform = (lambda row: load([row]).waveform) if load else None
        finish_evaluation(predictions, facts, None, load_waveform, args)


# ---- files, record, card, push ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_line_for_write_errors(directory: str | Path) -> Iterator[None]:
    """End with one line where results cannot be written: the disk is full, or there is no permission."""
    try:
        yield
    except OSError as error:
        fail(f"cannot write to {directory}: {first_line(error)}. {CONTINUE}")


def lock_results(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """The lock of all files that an evaluation of this name writes."""
    lock = Path(args.output_dir) / f".{args.name}.lock"
    leftovers = (f".*.{args.name}.*.partial", f".predictions.{args.name}/.*.partial")
    return hold_lock(lock, f"{args.name} in {args.output_dir}", *leftovers)


def prediction_settings(
    clips: datasets.Dataset, place: Place, recogniser: Recogniser, args: argparse.Namespace
) -> dict:
    """The settings that determine the predictions."""
    columns = clips.remove_columns("audio").column_names
    return {
        "model": args.model_name_or_path,
        "model_digest": model_digest(recogniser.model),
        "assistant_model": args.assistant_model,
        "dtype": args.dtype,
        "language": args.language,
        "dataset": args.dataset_name,
        "dataset_config_name": args.dataset_config_name,
        "dataset_split_name": args.dataset_split_name,
        "rows": len(clips),
        "rows_digest": speech_digest(clips, place, "audio", columns),
        "seed": args.seed if args.concatenate_audio else None,
        **recogniser.decoding,
    }


def plan_shards(directory: Path, recording_rows: list[Rows], settings: dict, long_form: bool) -> dict[Path, list[Rows]]:
    """The recordings of each shard, by its path. Both depend only on the clips and the settings."""
    content = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    sixteenth = math.ceil(len(recording_rows) / 16)  # so that several processes share a small test set
    size = LONG_FORM_SHARD if long_form else min(512, max(64, sixteenth))
    starts = range(0, len(recording_rows), size)
    shards = {}
    for index, start in enumerate(starts):
        path = directory / f"{digest}-{index:05d}-of-{len(starts):05d}.jsonl"
        shards[path] = recording_rows[start : start + size]
    return shards


def write_predictions(path: Path, recordings: list[Recording], work: dict) -> None:
    """Write a shard: a line with its time, its device and a checksum, then a line for each recording."""
    predictions = [recording.prediction() for recording in recordings]
    checksum = record_checksum([work["process_seconds"], predictions])
    lines = [work | {"checksum": checksum}, *predictions]
    write_atomically(path, "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))


def read_saved_shard(path: Path) -> tuple[dict, list[dict]] | None:
    """The first line and the predictions of a shard; None where it is missing or, with a warning, damaged."""
    try:
        work, *predictions = map(json.loads, path.read_text(encoding="utf-8").split("\n"))
        if work["checksum"] == record_checksum([work["process_seconds"], predictions]):
            return work, predictions
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        pass
    logger.warning("%s is damaged and is made again", path)
    return None


def read_predictions(paths: Iterable[Path]) -> tuple[list[dict], dict]:
    """Read the predictions of shards; returns them and the speed at which they were made."""
    works = []
    predictions = []
    for path in paths:
        work, shard = read_saved_shard(path)
        works.append(work)
        predictions += shard

    def total(name: str) -> float:
        return sum(work.get(name, 0.0) for work in works)

    audio_seconds = sum(prediction["seconds"] for prediction in predictions)
    process_seconds = total("process_seconds")  # of all processes
    warm_audio = audio_seconds - total("warm_up_audio_seconds")
    warm_seconds = process_seconds - total("warm_up_seconds")
    if warm_audio < 0.01 or warm_seconds <= 0:  # there was only one batch
        warm_audio = audio_seconds
        warm_seconds = process_seconds
    speed = {
        "audio_seconds": round(audio_seconds, 1),
        "process_seconds": round(process_seconds, 3),
        "real_time_factor": round(process_seconds / max(audio_seconds, 1e-9), 5),
        "rtfx": round(warm_audio / max(warm_seconds, 1e-9), 2),  # seconds of audio per second of a process
        "clips_per_second": round(len(predictions) / max(process_seconds, 1e-9), 3),
    }
    for name in ("device", "batch_size"):  # shards may come from several
        speed[name] = ", ".join(dict.fromkeys(str(work[name]) for work in works))
    return predictions, speed


def write_table(path: Path, predictions: list[dict], columns: Iterable[str]) -> None:
    """Write predictions as CSV."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(predictions)
    write_atomically(path, file.getvalue())


def write_evaluation(
    predictions: list[dict], metrics: dict, load_waveform: Callable[[int], np.ndarray] | None, args: argparse.Namespace
) -> None:
    """Write the two tables, the page and, last, the metrics. `load_waveform` gives the audio of a prediction by row."""
    output_dir = Path(args.output_dir)
    columns = list(dict.fromkeys(name for prediction in predictions for name in prediction))
    incorrect = [row for row in predictions if row.get("normalised_reference") != row.get("normalised_hypothesis")]
    write_table(output_dir / f"all_predictions.{args.name}.csv", predictions, columns)
    write_table(output_dir / f"incorrect_predictions.{args.name}.csv", incorrect, columns)
    if load_waveform:  # after the tables, which hold no audio
        embed_audio(predictions, load_waveform, args.report_audio_mb)
    model = shown_name(metrics["model"])
    dataset = shown_name(metrics["dataset"])
    evaluation = Evaluation(model, dataset, metrics, predictions)
    page = render_page(f"{model} on {dataset}, {metrics['name']}", [evaluation])
    write_atomically(output_dir / f"report.{args.name}.html", page)
    save_metrics(output_dir / f"metric.{args.name}.json", metrics)


def finish_evaluation(
    predictions: list[dict],
    facts: dict,
    spellings: dict[str, str] | None,
    load_waveform: Callable[[int], np.ndarray] | None,
    args: argparse.Namespace,
) -> dict:
    """Score predictions, write all results, and log the rates. Returns the metrics, of which `facts` are a part."""
    unusable = list_unusable(predictions, args)
    scorers = make_scorers(args.scorer, text_language(args.language, args.task), spellings)
    metrics = score_predictions(predictions, scorers)
    metrics |= facts | {
        "name": args.name,
        "scorer": args.scorer,
        "unusable": unusable,
        "versions": library_versions("torch", "transformers", "datasets", "jiwer"),
    }
    write_evaluation(predictions, metrics, load_waveform, args)
    for name, title in scorer_titles(metrics).items():
        logger.info("%s: %s", title, format_rate(metrics["scores"][name]["rate"]))
    logger.info("all results are in %s", args.output_dir)
    return metrics


def save_metrics(path: Path, metrics: dict) -> None:
    """Save by `evaluate.save`, which adds the time, the git commit, and versions and path of Python.

    The error of git, if this directory is not a repository, is silenced.
    """
    import evaluate  # only here: it is slow to import

    try:
        with silent_stderr(), tempfile.TemporaryDirectory() as scratch:
            saved = Path(scratch) / path.name
            evaluate.save(saved, **metrics)
            content = saved.read_text(encoding="utf-8")
    except OSError:  # git is not installed
        content = json.dumps(metrics)
    write_atomically(path, content)


def is_hub_id(reference: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", reference)) and not Path(reference).expanduser().exists()


def check_card(model: str) -> None:
    """Fail where the rates cannot be written into a model's card. A missing repository is not created."""
    if local_directory(model):
        fail(f"--push_to_hub writes into a model's card on the Hub; {model} is a local directory")
    try:
        HfApi().auth_check(model, repo_type="model", write=True)
        ModelCard.load(model)
    except RemoteEntryNotFoundError:
        pass  # it will be made
    except HUB_ERRORS as error:
        hub_fail(f"reading the card of {model}", error)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        fail(f"the card of {model} cannot be read: {first_line(error)}. Correct it. {CONTINUE}")


def card_results(metrics: dict) -> list[EvalResult]:
    """The rate of each scorer as the table of a model card has it."""
    dataset = metrics["dataset"]
    results = []
    for name, title in scorer_titles(metrics).items():
        summary = metrics["scores"][name]
        if summary["rate"] is None:
            continue
        result = EvalResult(
            task_type="automatic-speech-recognition",
            dataset_type=dataset if is_hub_id(dataset) else Path(dataset).stem,
            dataset_name=Path(dataset).stem,
            dataset_config=metrics["dataset_config_name"],
            dataset_split=metrics["name"],
            metric_type="wer" if summary["unit"] == "words" else "cer",
            metric_name=title,
            metric_value=round(summary["rate"], 2),
        )
        results.append(result)
    return results


def leaderboard_file(metrics: dict) -> str:
    """The headline rate as a file of `.eval_results`, from which the Hub makes the leaderboards of datasets."""
    title = scorer_titles(metrics)[metrics["scorer"]]
    entry = EvalResultEntry(
        dataset_id=metrics["dataset"],
        task_id=metrics["dataset_config_name"] or "default",
        value=round(metrics["scores"][metrics["scorer"]]["rate"], 2),
        date=datetime.now(UTC).date().isoformat(),
        notes=f"{title}, per cent, {metrics['name']}, {metrics['clips']} clips",
    )
    return yaml_dump(eval_result_entries_to_yaml([entry]))


def publish_rates(metrics: dict) -> None:
    """Write the rates into the `model-index` of the model card, which the Hub displays, and into `.eval_results`."""
    model = metrics["model"]
    index = {"model-index": eval_results_to_model_index(model, card_results(metrics))}
    name = f"{metrics['dataset']}.{metrics['name']}.{metrics['scorer']}".replace("/", "--")

    def push() -> None:
        if is_hub_id(metrics["dataset"]):  # a leaderboard is a dataset's on the Hub
            HfApi().upload_file(
                path_or_fileobj=leaderboard_file(metrics).encode(),
                path_in_repo=f".eval_results/{name}.yaml",
                repo_id=model,
                commit_message="Add an evaluation result",
            )
        head = HfApi().model_info(model).sha
        with contextlib.suppress(RemoteEntryNotFoundError):  # it will be made
            # Fails where the Hub does not answer. `metadata_update` would take an old card then, or make one.
            HfApi().hf_hub_download(model, "README.md", force_download=True)
        metadata_update(model, index, overwrite=True, parent_commit=head)  # fails if another push came in between

    try:
        push_with_retries(push)
    except (*HUB_ERRORS, ValueError) as error:
        fail(f"the results are written, but not on the card of {model}: {first_line(error)}. {CONTINUE}")


def print_evaluation_plan(
    clips: datasets.Dataset,
    load: Loader,
    shards: dict[Path, list[Rows]],
    recogniser: Recogniser,
    processes: int,
    args: argparse.Namespace,
) -> None:
    """Print what a run would do. Its time is estimated from a sample: a batch or more, or a recording of long form."""
    recording_rows = list(itertools.chain.from_iterable(shards.values()))
    total = len(recording_rows)
    if args.long_form:
        sample_size = 1
    elif recogniser.model.device.type == "cpu":
        sample_size = recogniser.decoder.batch_size
    else:
        sample_size = PLAN_BATCHES * recogniser.decoder.batch_size
    sample = recording_rows[:: math.ceil(total / sample_size)]
    with tempfile.TemporaryDirectory() as scratch:
        shard = Path(scratch) / "sample.jsonl"
        for _ in range(2):  # the first time is slow
            predict(load, {shard: sample}, recogniser, args)
        _, speed = read_predictions([shard])
    done = [recordings for path, recordings in shards.items() if read_saved_shard(path)]
    left = total - sum(map(len, done))
    hours = speed["audio_seconds"] / len(sample) * total / 3600
    minutes = speed["process_seconds"] / len(sample) * left / processes / 60
    windows = f"{total:,} windows of " if args.concatenate_audio else ""
    tables = f"all_predictions.{args.name}.csv, incorrect_predictions.{args.name}.csv"
    pushes = f"the rates to the card of {args.model_name_or_path}" if args.push_to_hub else "nothing"
    print(f"input: {args.dataset_name}, {args.dataset_split_name}, {windows}{len(clips):,} clips, about {hours:.2f} h")
    print(f"done: {len(done)} of {len(shards)} shards")
    print(f"left: {left:,} of {total:,}")
    print(f"writes: {args.output_dir}: metric.{args.name}.json, {tables}, report.{args.name}.html")
    print(f"pushes: {pushes}")
    print(f"time: about {minutes:.1f} min; a sample of {len(sample)} took {speed['process_seconds']} s ({args.dtype})")


# ---- main ------------------------------------------------------------------------------------------------------------


@one_line_for_lost_processes()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.compare:
        compare(args)
        return 0
    if args.predictions:
        set_up_process()
        score_other_engine(args)
        return 0

    # 1. Set up.
    accelerator = start_accelerator(args)
    is_main = accelerator.is_main_process
    set_up_process(is_main)
    set_client_factory(make_hub_client)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args.dtype = choose_dtype(args.dtype, accelerator.device)

    # 2. Refuse what can be refused.
    if args.push_to_hub and is_main:
        check_card(args.model_name_or_path)

    # 3. Load.
    clips, place = load_clips(args)
    refuse_empty_references(clips, args)
    recogniser = load_recogniser(args, accelerator.device)
    load = functools.partial(load_recording, clips, place, args=args)
    recording_rows = plan_recordings(len(clips), load, args)

    # 4. Find what is left to do.
    directory = Path(args.output_dir) / f".predictions.{args.name}"
    settings = prediction_settings(clips, place, recogniser, args)
    lock = lock_results(args) if is_main and not args.dry_run else contextlib.nullcontext()
    with one_line_for_write_errors(args.output_dir), lock:
        accelerator.wait_for_everyone()
        shards = plan_shards(directory, recording_rows, settings, args.long_form)
        foreign = set(directory.glob("*.jsonl")) - set(shards)  # made with other settings
        if foreign and not args.overwrite_output_dir:
            refuse_other_settings(directory, read_record(directory / "settings.json") or {}, settings)
        if args.dry_run:
            if is_main:
                print_evaluation_plan(clips, load, shards, recogniser, accelerator.num_processes, args)
            return 0
        share = list(shards)[accelerator.process_index :: accelerator.num_processes]
        missing = {path: shards[path] for path in share if read_saved_shard(path) is None}
        left = gather_object(list(missing))  # of all processes

        # 5. Work.
        directory.mkdir(parents=True, exist_ok=True)
        if is_main:
            write_record(directory / "settings.json", settings)
        tell_work("transcribing", args, accelerator, recogniser.decoder.batch_size, len(left), len(shards))
        predict(load, missing, recogniser, args, show_progress=is_main)
        arrive()
        accelerator.wait_for_everyone()

        # 6. Write record and card.
        if is_main:
            for path in foreign:
                path.unlink(missing_ok=True)
            predictions, speed = read_predictions(shards)
            facts = speed | settings | {"parameters": recogniser.model.num_parameters()}
            spellings = recogniser.tokenizer.english_spelling_normalizer
            metrics = finish_evaluation(
                predictions, facts, spellings, lambda row: load(recording_rows[row]).waveform, args
            )
            start_tracker(accelerator, args)
            track(accelerator, {name: metrics[name] for name in METRICS})

    # 7. Push.
    if args.push_to_hub and is_main:
        publish_rates(metrics)
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
