#!/usr/bin/env python
"""Keep the clips whose teacher label agrees with the reference text, and store what the student trains on.

In: a labelled dataset as run_pseudo_labelling.py writes it, a local directory or a Hub id, stored as parquet.
Out, next to a local dataset, or in --output_dir and on the Hub (`.cer_10.0` with `--cer_threshold 10`):

    <dataset>.wer_10.0             audio, text, whisper_transcript, labels, input_length (samples at 16 kHz), wer, cer
    <dataset>.wer_10.0.vectorized  input_features, labels, input_length

and with --concatenate_audio, instead of the second, windows that hold several whole clips each:

    <dataset>.wer_10.0.packed      audio, text, whisper_transcript, labels, input_length, clips (rows of the labelled
                                   dataset), clip_starts (seconds)
    <dataset>.wer_10.0.packed.vectorized

Audio without reference texts is filtered by what the teacher says of its own labels, and by what is known of them:
loops, and phrases that Whisper hears in silence. The names then have `.unscored` in place of `.wer_10.0`.

A card, a record (filtering.<config>.<split>.json) and a figure say what was dropped, why, and what other thresholds
would keep. Run it on one machine, or on each of two machines that share a file system:

    python run_data_filtering.py -d org/dataset --dataset_config_name tiny --wer_threshold 10
    accelerate launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank 0 --main_process_ip HOST \\
        --main_process_port 29500 run_data_filtering.py -d /shared/dataset --preprocessing_num_workers 32

Run the same command again to continue: complete shards are kept. A run with another threshold takes scores and features
from them.
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
import multiprocessing
import os
import pickle
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import timedelta
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

import datasets
import fsspec
import jiwer
import librosa
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import soundfile
import torch
import yaml
from accelerate import PartialState
from datasets import Audio, Features, List, Value
from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, DataFilesList, resolve_pattern, sanitize_patterns
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfApi, HfFileSystem, RepoCard, set_client_factory, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from huggingface_hub.utils._http import default_client_factory
from matplotlib.figure import Figure
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, WhisperConfig, WhisperFeatureExtractor, WhisperTokenizerFast
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE
from transformers.utils import find_adapter_config_file

STEP_SECONDS = 0.02  # from one timestamp token to the next
TIMESTAMP_SAMPLES = 320  # the same in samples
MAX_CLIP_LABEL = 128  # tokens; for clips, if --max_label_length is not given
MAX_WINDOW_LABEL = 256  # tokens; for windows, likewise
PACKED_ROWS = 1000  # fewest rows of the labelled dataset that are packed together: fewer would fill windows less well
SAMPLE_ROWS = 64  # rows that a dry run measures
OTHER_THRESHOLDS = (0, 5, 10, 15, 20, 30, 40, 80, 100)  # per cent; the report counts what each would keep
LENGTH_CLASSES = (1, 8, 16, 32, 64, 128)  # characters; the report's classes of reference length begin at these
LIBRARIES = ("datasets", "jiwer", "librosa", "numpy", "pyarrow", "soundfile", "torch", "transformers")  # in the record
NORMALISER = "Whisper's, without spaces for languages that are written without them"  # part of the settings
# Reasons to drop a row that cannot be used. Reasons are stored by name.
UNUSABLE = (
    "no label",
    "label ids outside the vocabulary",
    "label for another language or task",
    "malformed label",
    "empty reference",
    "empty label",
    "undecodable audio",
)
OVER_THRESHOLD = "score over the threshold"
KEPT = "kept"
# Flags on scores that the labelling can store: each with the score's column and the reason to drop a row.
TEACHER_SCORES = {
    "min_avg_logprob": ("avg_logprob", "mean log-probability under the minimum"),
    "max_compression_ratio": ("compression_ratio", "compression ratio over the maximum"),
    "max_no_speech_prob": ("no_speech_prob", "no-speech probability over the maximum"),
}
# Limits where there are no references: those of openai-whisper's `transcribe`, and for loops one of our own.
UNSCORED_LIMITS = {
    "min_avg_logprob": -1.0,
    "max_compression_ratio": 2.4,
    "max_no_speech_prob": 0.6,
    "max_ngram_repeats": 5,
}
# What Whisper hears in silence, music and noise, by public reports: the ends of the videos that it has learnt from.
HALLUCINATIONS = {
    "ja": (
        "ご視聴ありがとうございました",
        "ご視聴ありがとうございます",
        "ご視聴いただきありがとうございました",
        "ご視聴いただきありがとうございます",
        "最後までご視聴いただきありがとうございました",
        "最後までご視聴いただきありがとうございます",
        "最後までご覧いただきありがとうございました",
        "最後まで見てくれてありがとう",
        "ご清聴ありがとうございました",
        "字幕視聴ありがとうございました",
        "チャンネル登録お願いします",
        "チャンネル登録をお願いします",
        "チャンネル登録よろしくお願いします",
        "チャンネル登録をよろしくお願いいたします",
        "チャンネル登録と高評価お願いします",
        "高評価とチャンネル登録よろしくお願いします",
        "また次の動画でお会いしましょう",
        "次の動画でお会いしましょう",
        "それでは次の動画でお会いしましょう",
        "次回の動画でお会いしましょう",
        "また次回の動画でお会いしましょう",
        "この動画の字幕は視聴者によって作成されました",
    ),
    "en": (
        "Thanks for watching",
        "Thank you for watching",
        "Thank you so much for watching",
        "Thank you very much for watching",
        "Thanks for watching and see you next time",
        "Thank you for watching and don't forget to subscribe",
        "Please subscribe",
        "Please subscribe to my channel",
        "Please subscribe to our channel",
        "Please like and subscribe",
        "Don't forget to like and subscribe",
        "Like, comment and subscribe",
        "I'll see you in the next video",
        "See you in the next video",
        "See you next video",
        "Subtitles by the Amara.org community",
        "Subtitles by Amara.org",
        "Transcription by CastingWords",
        "Captions by GetTranscribed.com",
        "For more information visit www.FEMA.gov",
    ),
}
FREQUENT_LABELS = 50  # that a shard notes; the report has fewer
# Arguments that the filtered dataset depends on, and those that the windows depend on as well.
FILTER_ARGUMENTS = (
    "split",
    "text_column_name",
    "audio_column_name",
    "speaker_id_column_name",
    "task",
    "metric",
    "threshold",
    "shard_size",
    "seed",
    "min_duration_in_seconds",
    "max_duration_in_seconds",
    "max_ngram_repeats",
    "hallucinations",
    *TEACHER_SCORES,
    "timestamp_probability",
    "condition_on_prev_probability",
)
WINDOW_ARGUMENTS = ("concatenate_seconds", "concatenate_gap_seconds", "concatenate_probability")
# What is measured for every row, and the settings that these measures and the features depend on.
MEASURES = ["samples", "word_errors", "words", "character_errors", "characters"]
MEASURE_SETTINGS = ("dataset", "audio_column_name", "task", "language", "normaliser", "tokenizer", "feature_extractor")
# Columns of the datasets that are written.
AUDIO_COLUMNS = {
    "audio": Audio(sampling_rate=16_000),
    "text": Value("string"),
    "whisper_transcript": List(Value("int32")),
    "labels": List(Value("int32")),
    "input_length": Value("int32"),
}
ERROR_COLUMNS = {"wer": Value("float64"), "cer": Value("float64")}
WINDOW_COLUMNS = {"clips": List(Value("int32")), "clip_starts": List(Value("float64"))}
FEATURE_COLUMNS = {"input_features": Value("binary"), "labels": List(Value("int32")), "input_length": Value("int32")}
ABOUT_AUDIO = "`labels` is the decoder sequence, `input_length` the samples at 16 kHz. "
ABOUT = {
    "filtered": f"Clips whose teacher label agrees with the reference, to train a student on. {ABOUT_AUDIO}"
    "`wer` and `cer` compare normalised texts, in per cent.",
    "unscored": f"Clips whose teacher label nothing speaks against, to train a student on. {ABOUT_AUDIO}"
    "There were no reference texts: `text` is what the teacher says as well.",
    "packed": f"Windows of several whole clips with silence between them, to train a student on. {ABOUT_AUDIO}"
    "`clips` are rows of the labelled dataset, `clip_starts` the seconds at which they begin in the window.",
    "vectorized": "Log-mel features and labels, to train a student on. `input_features` is binary: little-endian "
    'float16, `[frames, mels]`, read with `np.frombuffer(value, "<f2").reshape(-1, mels)`. Repeat the last frame to '
    "reach 3,000.",
}


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    description = __doc__.partition("\n\n")[0]
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    add = parser.add_argument_group("input").add_argument
    add("-d", "--dataset_name", required=True, help="labelled dataset, a local directory or a Hub id")
    add("--dataset_config_name", help="configuration of the dataset; unset = its only or default one")
    add("--split", default="train", help="split of the dataset")
    add(
        "--text_column_name",
        help="column of reference texts; none = go by the labels alone; unset = transcription, or none without texts",
    )
    add("--audio_column_name", default="audio", help="column of the audio")
    add("--speaker_id_column_name", help="column of the speakers, one to a window; unset = windows mix speakers")
    add("--model", default="openai/whisper-large-v3", help="teacher, whose tokenizer and feature extractor are used")
    add("--language", default="ja", help="language of the labels, a Whisper code or name")
    add("--task", default="transcribe", choices=("transcribe", "translate"), help="task of the labels")
    add = parser.add_argument_group("what is kept").add_argument
    add("--wer_threshold", type=float, default=10.0, help="highest WER to keep, per cent")
    add("--cer_threshold", type=float, help="highest CER to keep, per cent; unset = filter by WER")
    add("--min_duration_in_seconds", type=float, default=0.0, help="shortest clip to keep, seconds")
    add("--max_duration_in_seconds", type=float, default=30.0, help="longest clip to keep, seconds")
    add("--max_label_length", type=int, help="longest label, tokens with special ones; unset = 128, 256 for windows")
    unset = "unset = no limit, or without references {}"
    repeats_help = f"most consecutive repetitions of any piece of a label; {unset}"
    add("--max_ngram_repeats", type=int, help=repeats_help.format(UNSCORED_LIMITS["max_ngram_repeats"]))
    for name, (column, _) in TEACHER_SCORES.items():
        limit_help = f"{name[:3]}imum of the labels' {column}; {unset}"
        add(f"--{name}", type=float, help=limit_help.format(UNSCORED_LIMITS[name]))
    phrases_help = "text file of more phrases that are dropped as known hallucinations, one per line; unset = none"
    add("--hallucinations", metavar="FILE", type=os.path.expanduser, help=phrases_help)
    add = parser.add_argument_group("labels").add_argument
    add("--timestamp_probability", type=float, default=0.2, help="share of labels with timestamps that keep them")
    prompt_help = "share of labels that get the previous row's text as a prompt"
    add("--condition_on_prev_probability", type=float, default=0.0, help=prompt_help)
    add("--seed", type=int, default=42, help="seed of all random choices")
    add = parser.add_argument_group("windows").add_argument
    add("--concatenate_audio", default=False, **flag, help="pack several clips into each window")
    add("--concatenate_seconds", type=float, default=30.0, help="longest window, seconds")
    add("--concatenate_gap_seconds", type=float, default=0.4, help="longest silence between clips, seconds")
    add("--concatenate_probability", type=float, default=1.0, help="share of clips that are packed with others")
    add = parser.add_argument_group("work").add_argument
    add("--skip_filtering", default=False, **flag, help="pack and vectorise what an earlier run filtered")
    add("--skip_logmel", default=False, **flag, help="compute no features")
    add("--preprocessing_num_workers", type=int, default=len(os.sched_getaffinity(0)), help="processes on this machine")
    add("--preprocessing_batch_size", type=int, default=8, help="clips whose features are computed together")
    add("--shard_size", type=int, default=1000, help="rows of the labelled dataset in a shard")
    add = parser.add_argument_group("output").add_argument
    output_help = "directory of the results; unset = next to a local dataset, else the current directory"
    add("--output_dir", type=os.path.expanduser, help=output_help)
    add("--overwrite_output_dir", default=False, **flag, help="start afresh, also with equal settings")
    push_help = "push the results; unset = if the dataset is on the Hub or --hub_model_id is given"
    add("--push_to_hub", default=None, **flag, help=push_help)
    add("--hub_model_id", help="Hub id of the results, without .wer_10.0; unset = that of the dataset")
    add("--hub_private_repo", default=True, **flag, help="make new repositories private")
    add("--dry_run", default=False, **flag, help="only print what a run would do and how long it would take")
    args = parser.parse_args(argv)
    for name in ("timestamp_probability", "condition_on_prev_probability", "concatenate_probability"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)} is not between 0 and 1")
    if not 0 <= args.concatenate_gap_seconds < args.concatenate_seconds:
        parser.error(f"--concatenate_gap_seconds {args.concatenate_gap_seconds} is not between 0 and a window's length")
    for name in ("preprocessing_num_workers", "preprocessing_batch_size", "shard_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is less than 1")
    args.metric = "wer" if args.cer_threshold is None else "cer"
    args.threshold = args.wer_threshold if args.cer_threshold is None else args.cer_threshold
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


# ---- the job ---------------------------------------------------------------------------------------------------------


TokenIds = list[int]


class RowGroup(NamedTuple):
    """Rows of the labelled dataset that a parquet file stores together and that are read together."""

    start: int
    stop: int
    path: str
    number: int  # of the row group in its file


class Labelled(NamedTuple):
    """The labelled dataset."""

    config: str
    digest: str  # tells datasets apart
    rows: int
    columns: dict[str, str]  # names by role: audio, label; if they are there or needed, text, name, speaker and scores
    row_groups: list[RowGroup]  # none where the rows are in `dataset`
    dataset: datasets.Dataset | None  # what is not stored as parquet in the form of our labelling
    place: Place  # where the files lie that rows name


class SpecialTokens(NamedTuple):
    """Ids of Whisper's special tokens: those of text come before `end`, those of timestamps behind `no_timestamps`."""

    prefix: TokenIds  # <|startoftranscript|> <|ja|> <|transcribe|>; only the first in an English-only model
    end: int  # <|endoftext|>, the first special token
    previous: int  # <|startofprev|>
    no_timestamps: int
    last: int  # of the vocabulary

    @property
    def timestamps(self) -> range:
        """Ids of <|0.00|> to <|30.00|>."""
        return range(self.no_timestamps + 1, self.no_timestamps + 1 + TIMESTAMPS)

    def is_text(self, token: int) -> bool:
        """Whether a token is text. Those behind the timestamps were added to the vocabulary later."""
        return token < self.end or token >= self.timestamps.stop


@dataclass
class Output:
    """One configuration and split of a dataset that this script writes."""

    kind: str  # filtered; packed: windows of the filtered clips; vectorized: features of the windows or filtered clips
    directory: Path
    repository: str | None  # Hub id; None = it is not pushed
    settings: dict  # that its contents depend on
    shards: int
    visibility: str = ""  # of the repository: private or public

    @property
    def title(self) -> str:
        """Directory and beginning of the names of the shards."""
        return f"{self.settings['config']}/{self.settings['split']}"

    @property
    def record(self) -> Path:
        return self.directory / f"filtering.{self.settings['config']}.{self.settings['split']}.json"

    def shard_path(self, shard: int) -> Path:
        return self.directory / f"{self.title}-{shard:05d}-of-{self.shards:05d}.parquet"

    def missing_shards(self) -> list[int]:
        """The shards that do not exist or whose footer is damaged."""
        return [shard for shard in range(self.shards) if read_notes(self.shard_path(shard)) is None]

    def present_shards(self) -> list[Path]:
        """The shards that exist, whatever they were made with."""
        return sorted(self.directory.glob(f"{self.title}-*-of-*.parquet"))


@dataclass
class Job:
    """What a worker needs to know. Every worker receives it once."""

    labelled: Labelled
    tokenizer: WhisperTokenizerFast
    tokens: SpecialTokens
    extractor: WhisperFeatureExtractor
    batch_size: int
    outputs: dict[str, Output]  # by kind, in the order in which they are made
    results: Path  # directory and name of the outputs, without the suffix of each


def digest(content: bytes) -> str:
    """A short hash of the content."""
    return hashlib.sha256(content).hexdigest()[:16]


@contextlib.contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """Fail with the name of a file of the labelled dataset where reading it shows that it is damaged."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        fail(f"{path} is damaged: run the command that wrote it again, or delete it if it was downloaded. {CONTINUE}")


def find_row_groups(paths: list[str]) -> tuple[list[RowGroup], str]:
    """The row groups of parquet files, and a digest of their footers, which hold sizes, minima and maxima."""
    row_groups = []
    footers = io.BytesIO()
    start = 0
    for path in paths:
        with naming_damage(path):
            metadata = pq.ParquetFile(path).metadata
        metadata.write_metadata_file(footers)
        for number in range(metadata.num_row_groups):
            stop = start + metadata.row_group(number).num_rows
            row_groups.append(RowGroup(start, stop, path, number))
            start = stop
    return row_groups, digest(footers.getvalue())


def read_rows(labelled: Labelled, start: int, stop: int, roles: list[str]) -> pa.Table:
    """Rows `start` to `stop` of the labelled dataset, or up to its end. Columns are chosen and named by role."""
    columns = [labelled.columns[role] for role in roles]
    if labelled.dataset is not None:
        stored = labelled.dataset.select_columns(columns).with_format("arrow")
        table = stored[start : min(stop, labelled.rows)]
        return table.select(columns).rename_columns(roles)
    tables = []
    for group in labelled.row_groups:
        if group.stop <= start or group.start >= stop:
            continue
        with naming_damage(group.path):
            file = pq.ParquetFile(group.path, page_checksum_verification=True)
            table = file.read_row_group(group.number, columns)
        skipped = max(start - group.start, 0)
        tables.append(table.slice(skipped, stop - group.start - skipped))
    return pa.concat_tables(tables).select(columns).rename_columns(roles)


# ---- labels ----------------------------------------------------------------------------------------------------------


class UnusableLabel(ValueError):
    """Raised for a label that cannot be trained on. The message is the reason to drop its row, one of `UNUSABLE`."""


class Label(NamedTuple):
    """A stored label, parsed, and the training label built from it."""

    ids: TokenIds  # the text, without special tokens and timestamps
    labels: TokenIds  # the decoder sequence to train on
    label_length: int  # tokens of that sequence, without a prompt
    problem: str | None  # why the stored label cannot be used


def find_special_tokens(vocabulary: dict[str, int], prompt: dict[str, str]) -> SpecialTokens:
    """Look up the special tokens. `prompt` has language and task, and is empty for an English-only model."""
    no_timestamps = vocabulary["<|notimestamps|>"]
    return SpecialTokens(
        prefix=[vocabulary[f"<|{name}|>"] for name in ("startoftranscript", *prompt.values())],
        end=vocabulary["<|endoftext|>"],
        previous=vocabulary["<|startofprev|>"],
        no_timestamps=no_timestamps,
        last=max(*vocabulary.values(), no_timestamps + TIMESTAMPS),
    )


def tokenize_label(label: str, tokenizer: WhisperTokenizerFast, tokens: SpecialTokens) -> TokenIds:
    """The decoder sequence of a label that is stored as text with timestamps such as `<|1.08|>`."""
    vocabulary = tokenizer.get_vocab()
    body = []
    for piece in re.split(r"(<\|[^<>|]*\|>)", label):
        if timestamp := re.fullmatch(r"<\|(\d+\.\d\d)\|>", piece):
            step = round(float(timestamp[1]) / STEP_SECONDS)
            body.append(tokens.timestamps.start + step)
        elif piece not in vocabulary or tokens.is_text(vocabulary[piece]):
            body += tokenizer(piece, add_special_tokens=False).input_ids
    return [*tokens.prefix, *body, tokens.end]


def label_body(label: TokenIds | str | None, tokenizer: WhisperTokenizerFast, tokens: SpecialTokens) -> TokenIds:
    """Text and timestamps of a stored label, without its prefix and its end. Raises UnusableLabel."""
    if isinstance(label, str):
        label = tokenize_label(label, tokenizer, tokens)
    if not label:
        raise UnusableLabel("no label")
    if min(label) < 0 or max(label) > tokens.last:
        raise UnusableLabel("label ids outside the vocabulary")
    if label[0] != tokens.prefix[0]:
        raise UnusableLabel("malformed label")
    start = len(tokens.prefix)
    if label[:start] != tokens.prefix:
        raise UnusableLabel("label for another language or task")
    if tokens.no_timestamps in label[start : start + 1]:
        start += 1
    stop = len(label)
    while label[stop - 2 : stop] == [tokens.end, tokens.end]:  # padding
        stop -= 1
    body = label[start:stop]
    special = [token for token in body if tokens.end <= token <= tokens.no_timestamps]
    if special != [tokens.end] or body[-1] != tokens.end:
        raise UnusableLabel("malformed label")
    return body[:-1]


def text_ids(body: TokenIds, tokens: SpecialTokens) -> TokenIds:
    """The body of a label without its timestamps."""
    return [token for token in body if tokens.is_text(token)]


def build_label(
    body: TokenIds,
    text: TokenIds,
    previous: TokenIds,
    row: int | str,
    tokens: SpecialTokens,
    settings: dict,
) -> TokenIds:
    """The decoder sequence to train on: `body` with its timestamps, or `text` without, optionally after a prompt.

    Random choices depend on the seed and the row alone. A prompt is the tail of the previous text: at most half of the
    decoder's positions, as in Whisper, and no more than `max_label_length` leaves room for.
    """
    draw = random.Random(f"{settings['seed']}, {row}")
    keep_timestamps = draw.random() < settings["timestamp_probability"]
    add_prompt = draw.random() < settings["condition_on_prev_probability"]
    has_timestamps = len(body) > len(text_ids(body, tokens))
    if keep_timestamps and has_timestamps:
        label = [*tokens.prefix, *body, tokens.end]
    else:
        label = [*tokens.prefix, tokens.no_timestamps, *text, tokens.end]
    room = settings["max_label_length"] - len(label)
    longest = min(settings["max_positions"] // 2, room) - 1  # tokens after <|startofprev|>
    if add_prompt and previous and longest > 0:
        label = [tokens.previous, *previous[-longest:], *label]
    return label


def read_labels(job: Job, start: int, stop: int) -> list[Label]:
    """The labels of these rows. A prompt is the text of the previous row, if that has a usable label."""
    settings = job.outputs["filtered"].settings
    first = max(start - 1, 0)  # the row before is read for the first prompt
    stored = read_rows(job.labelled, first, stop, ["label"])["label"].to_pylist()
    labels = []
    previous: TokenIds = []
    for row, value in enumerate(stored, first):
        try:
            body = label_body(value, job.tokenizer, job.tokens)
        except UnusableLabel as problem:
            labels.append(Label([], [], 0, str(problem)))
            previous = []
            continue
        text = text_ids(body, job.tokens)
        label = build_label(body, text, previous, row, job.tokens, settings)
        length = len(label) - label.index(job.tokens.prefix[0])
        labels.append(Label(text, label, length, None))
        previous = text
    return labels[start - first :]


# ---- filter ----------------------------------------------------------------------------------------------------------


def error_counts(reference: str, hypothesis: str) -> list[int]:
    """Word errors, words, character errors and characters of two normalised texts; the reference has the totals."""
    counts = []
    for compare in (jiwer.process_words, jiwer.process_characters):
        alignment = compare(reference, hypothesis)
        missed = alignment.substitutions + alignment.deletions
        counts.append(missed + alignment.insertions)
        counts.append(missed + alignment.hits)
    return counts


def repeats(text: str, limit: int) -> bool:
    """Whether a piece of the text occurs more than `limit` times in succession, as when a teacher loops."""
    return re.search(rf"(.+?)\1{{{limit}}}", "".join(text.split())) is not None


def is_near(phrase: Sequence, heard: Sequence, least_ratio: float) -> bool:
    """Whether a phrase, once or repeated, is about what was heard."""
    times = max(1, round(len(heard) / len(phrase)))
    matcher = SequenceMatcher(None, phrase * times, heard, autojunk=False)
    ratios = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)  # each lower and slower than the one before
    return all(ratio() >= least_ratio for ratio in ratios)


def find_hallucinations(texts: Iterable[str], settings: dict) -> list[bool]:
    """Which normalised texts are a phrase that Whisper is known to say where nothing is said.

    A near match counts as well: a few more characters, or a word more.
    """
    language = text_language(settings["language"], settings["task"])
    split = list if language in UNSPACED else str.split
    least_ratio = 0.9 if language in UNSPACED else 0.85  # of the characters, or of the words
    normalise = text_normaliser(language, {})
    known = [*HALLUCINATIONS.get(language, ()), *(settings["hallucinations"] or ())]
    phrases = [split(phrase) for phrase in map(normalise, known) if phrase]
    found = []
    for text in texts:
        heard = split(text)
        is_known = any(is_near(phrase, heard, least_ratio) for phrase in phrases)
        found.append(is_known)
    return found


def rows_to_compare(job: Job, table: pa.Table, labels: list[Label], start: int) -> pd.DataFrame:
    """The labels of some rows with the texts to compare, normalised: the reference, and the teacher's hypothesis.

    Where there are no references, the teacher's text is taken for one.
    """
    settings = job.outputs["filtered"].settings
    language = text_language(settings["language"], settings["task"])
    normalise = text_normaliser(language, job.tokenizer.english_spelling_normalizer)
    rows = pd.DataFrame(labels)
    hypotheses = job.tokenizer.batch_decode(rows.ids.to_list())
    rows["text"] = [text.strip() for text in hypotheses]
    rows["name"] = [f"row {start + number}" for number in rows.index]
    for role in table.column_names:  # text and name are replaced where the dataset has them
        if role != "label":
            rows[role] = table[role].to_pylist()
    rows["hypothesis"] = [normalise(text) for text in hypotheses]
    rows["reference"] = [normalise(text) for text in rows.text.fillna("")]
    rows.loc[rows.problem.notna(), "reference"] = ""  # without a label, nothing is compared
    return rows


def measure_rows(rows: pd.DataFrame, clips: list[dict]) -> pd.DataFrame:
    """The `MEASURES` of the rows. A clip that cannot be read or decoded has 0 samples."""
    measures = []
    for row in rows.itertuples():
        stored = clips[row.Index]
        clip = decode_clip(stored["bytes"])
        if problem := stored["problem"] or clip.problem:
            logger.warning("left out: %s (%s)", stored["path"] or row.name, problem)
        counts = error_counts(row.reference, row.hypothesis)
        measures.append([clip.samples, *counts])
    return pd.DataFrame(measures, columns=MEASURES)


def add_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with WER and CER in per cent."""
    wer = 100 * rows.word_errors / rows.words.clip(lower=1)
    cer = 100 * rows.character_errors / rows.characters.clip(lower=1)
    return rows.assign(wer=wer, cer=cer)


def drop_reasons(rows: pd.DataFrame, settings: dict) -> np.ndarray:
    """For each row the first reason to drop it, or `KEPT`.

    A new reason needs a condition here, a flag in `parse_args`, and the name of that flag in `FILTER_ARGUMENTS`, so
    that results with different values are not mixed; and in `UNUSABLE`, if no row with it could be trained on. A limit
    on a score that the labelling stores needs only an entry in `TEACHER_SCORES` and one in `UNSCORED_LIMITS`.
    """
    metric = settings["metric"]
    conditions = {
        "empty reference" if metric else "empty label": rows.reference == "",
        "undecodable audio": rows.samples == 0,
        "shorter than the minimum": rows.samples < settings["min_duration_in_seconds"] * SAMPLING_RATE,
        "longer than the maximum": rows.samples > settings["max_duration_in_seconds"] * SAMPLING_RATE,
        "label too long": rows.label_length > settings["max_label_length"],
    }
    if (limit := settings["max_ngram_repeats"]) is not None:
        conditions["label repeats itself"] = [repeats(text, limit) for text in rows.hypothesis]
    is_known = pd.Series(find_hallucinations(rows.hypothesis, settings))
    if metric:  # where the reference is the same, somebody really says it
        is_known &= rows.reference != rows.hypothesis
    conditions["known hallucination"] = is_known
    for flag, (column, reason) in TEACHER_SCORES.items():
        if settings[flag] is not None:
            scores = rows[column].astype(float)
            is_minimum = flag.startswith("min_")
            conditions[reason] = scores < settings[flag] if is_minimum else scores > settings[flag]
    if metric:
        conditions[OVER_THRESHOLD] = rows[metric] > settings["threshold"]
    reasons = np.select(list(conditions.values()), list(conditions), KEPT)
    return np.where(rows.problem.isna(), reasons, rows.problem)


def read_clips(job: Job, start: int, stop: int) -> list[dict]:
    """The encoded audio of these rows as `{bytes, path, problem}`."""
    column = read_rows(job.labelled, start, stop, ["audio"])["audio"]
    clips = []
    for audio in column.to_pylist():
        path = audio["path"] if audio else None
        if path and os.path.isabs(path):
            path = os.path.basename(path)  # others may read the result
        clip = {"bytes": None, "path": path, "problem": None}
        try:
            clip["bytes"] = read_audio(audio, job.labelled.place)
        except Unreadable as error:
            clip["problem"] = str(error)
        clips.append(clip)
    return clips


def same_at_other_thresholds(job: Job, output: Output, shard: int, source: str) -> Iterator[tuple[Path, dict]]:
    """The files and notes of a shard at other thresholds that were made from the same `source`.

    Clips and features have the same pattern, and are told apart by their `source`.
    """
    pattern = f"{job.results.name}.[cw]er_*/{output.settings['config']}/{output.shard_path(shard).name}"
    for path in sorted(job.results.parent.glob(pattern)):
        notes = read_notes(path)
        if notes and notes.get("source") == source:
            yield path, notes


def filter_shard(job: Job, shard: int) -> None:
    """Write the rows of a shard that are kept, and note what was measured for all of them."""
    output = job.outputs["filtered"]
    start = shard * output.settings["shard_size"]
    stop = start + output.settings["shard_size"]
    roles = [role for role in job.labelled.columns if role != "audio"]
    table = read_rows(job.labelled, start, stop, roles)
    labels = read_labels(job, start, stop)
    rows = rows_to_compare(job, table, labels, start)
    clips = read_clips(job, start, stop)

    # Measures of the same texts and audio are taken from another threshold, if there is one.
    texts = table.select([role for role in ("text", "label") if role in roles])
    settings = [output.settings[name] for name in MEASURE_SETTINGS]
    source = digest(json.dumps([texts.to_pydict(), settings]).encode())
    _, other_notes = next(same_at_other_thresholds(job, output, shard, source), (None, None))
    measures = pd.DataFrame(other_notes["rows"])[MEASURES] if other_notes else measure_rows(rows, clips)
    rows = add_scores(rows.join(measures))
    rows["reason"] = drop_reasons(rows, output.settings)

    kept = rows[rows.reason == KEPT]
    stored = table.take(pa.array(kept.index, pa.int64()))
    kept_clips = [clips[row] for row in kept.index]
    filtered = filtered_table(kept, stored, kept_clips)
    notes = {"settings": output.settings, **shard_notes(rows, source)}
    write_parquet(output.shard_path(shard), [filtered], filtered.schema, notes)


def filtered_table(kept: pd.DataFrame, stored: pa.Table, clips: list[dict]) -> pa.Table:
    """The rows that are kept, as they are stored: `stored` has their columns in the labelled dataset, by role."""
    scores = ERROR_COLUMNS
    if "text" not in stored.column_names:
        scores = {column: Value("float32") for column, _ in TEACHER_SCORES.values()}
    types = dict(AUDIO_COLUMNS)
    columns = {
        "audio": clips,
        "text": kept.text.to_list(),
        "whisper_transcript": stored["label"],
        "labels": kept.labels.to_list(),
        "input_length": kept.samples.to_list(),
    }
    for column, value_type in scores.items():
        if column in kept:
            types[column] = value_type
            columns[column] = kept[column].to_list()
    if pa.types.is_string(stored["label"].type):
        types["whisper_transcript"] = Value("string")
    if "speaker" in stored.column_names:
        types["speaker"] = Value("string")
        columns["speaker"] = stored["speaker"]
    return pa.table(columns, Features(types).arrow_schema)


def shard_notes(rows: pd.DataFrame, source: str) -> dict:
    """What a shard notes about all of its rows, for the report and for other thresholds."""
    kept = rows[rows.reason == KEPT]
    unusable = rows[rows.reason.isin(UNUSABLE)]
    worst = rows[rows.reason == OVER_THRESHOLD].nlargest(5, "cer")
    frequent = Counter(rows.hypothesis).most_common(FREQUENT_LABELS)
    kept_counts = Counter(kept.hypothesis)
    return {
        "source": source,
        "kept": kept.index.to_list(),
        "rows": rows[["reason", *MEASURES]].to_dict("list"),
        "unusable": unusable[["reason", "name"]].to_dict("records"),
        "worst": worst[["name", "reference", "hypothesis", "wer", "cer"]].to_dict("records"),
        "frequent": [[label, count, kept_counts[label]] for label, count in frequent if label],
    }


# ---- features --------------------------------------------------------------------------------------------------------


def features_at_other_thresholds(job: Job, output: Output, shard: int, source: str) -> dict[int, bytes]:
    """The features of a shard's rows that runs with other thresholds have computed."""
    features = {}
    for path, notes in same_at_other_thresholds(job, output, shard, source):
        if is_whole(path):
            column = pq.read_table(path, columns=["input_features"])["input_features"]
            features |= zip(notes["kept"], column.to_pylist(), strict=True)
    return features


def vectorize_shard(job: Job, shard: int) -> None:
    """Write the features and labels of a shard of windows, or of filtered clips if there are no windows."""
    output = job.outputs["vectorized"]
    is_packed = "packed" in job.outputs
    path = whole_shard(job, "packed" if is_packed else "filtered", shard)
    notes = read_notes(path)
    clips = pq.read_table(path, columns=["audio", "labels", "input_length"])
    source = None  # windows differ from threshold to threshold
    stored = {}
    if not is_packed:
        source = f"{notes['source']}, features"
        stored = features_at_other_thresholds(job, output, shard, source)
    features = [stored.get(row) for row in notes["kept"]]
    fill_features(features, clips, job)
    columns = {"input_features": features, "labels": clips["labels"], "input_length": clips["input_length"]}
    table = pa.table(columns, Features(FEATURE_COLUMNS).arrow_schema)
    features_notes = {"settings": output.settings, "source": source, "kept": notes["kept"]}
    write_parquet(output.shard_path(shard), [table], table.schema, features_notes)


def fill_features(features: list[bytes | None], clips: pa.Table, job: Job) -> None:
    """Compute the features that are None: float16, (frames, mels), with as many frames as the clip fills."""
    lengths = clips["input_length"].to_pylist()
    missing = [number for number, stored in enumerate(features) if stored is None]
    missing.sort(key=lengths.__getitem__)  # clips of similar length need little padding
    for first in range(0, len(missing), job.batch_size):
        batch = missing[first : first + job.batch_size]
        waveforms = []
        for number in batch:
            content = clips["audio"][number]["bytes"].as_py()
            waveforms.append(decode_clip(content).waveform)
        spectrograms = log_mel(waveforms, job.extractor).numpy()  # (clips, mels, frames)
        for number, spectrogram in zip(batch, spectrograms, strict=True):
            filled = spectrogram[:, : filled_frames(lengths[number])]
            features[number] = filled.T.astype("<f2").tobytes()


# ---- windows of several clips ----------------------------------------------------------------------------------------


@dataclass
class PackedClip:
    """A filtered clip that will be put into a window. A window is a list of clips."""

    row: int  # of the labelled dataset
    samples: int
    num_tokens: int  # that it adds to the label of its window
    speaker: str | None  # None = unknown; such a clip has a window of its own
    text: str = ""
    body: Sequence[int] = ()  # text and timestamps of its label
    audio: bytes = b""
    # `draw_choices` sets these.
    order: float = 0.0  # clips are put into windows in this order
    order_in_window: float = 0.0
    alone: bool = False  # the clip has a window of its own
    gap: int = 0  # silence before the clip, steps
    start: int = 0  # in its window, steps; `arrange` sets it

    @functools.cached_property
    def steps(self) -> int:
        """The length of the clip in steps of 0.02 s, those of the timestamps."""
        return math.ceil(self.samples / TIMESTAMP_SAMPLES)


def whole_steps(seconds: float) -> int:
    """The steps of 0.02 s that a time has room for."""
    return int(seconds / STEP_SECONDS + 1e-6)  # 0.58 / 0.02 is a little under 29


def draw_choices(clip: PackedClip, settings: dict) -> None:
    """Make the random choices for a clip. They depend on the seed and the row alone."""
    draw = random.Random(f"{settings['seed']}, window, {clip.row}")
    clip.order = draw.random()
    clip.order_in_window = draw.random()
    clip.alone = draw.random() >= settings["concatenate_probability"] or clip.speaker is None
    clip.gap = draw.randint(0, whole_steps(settings["concatenate_gap_seconds"]))


def fill_windows(clips: list[PackedClip], settings: dict, max_tokens: int) -> list[list[PackedClip]]:
    """Put every clip into one window.

    In random order, each clip goes into the fullest window of its speaker that has room for it, which fills windows
    well and still mixes long and short clips, unlike sorting by length. The order in a window is random too.
    """
    capacity = whole_steps(settings["concatenate_seconds"])
    for clip in clips:
        draw_choices(clip, settings)
    windows = []
    shared = defaultdict(list)  # windows that may take more clips, by speaker
    for clip in sorted(clips, key=lambda clip: clip.order):
        if clip.alone:
            windows.append([clip])
            continue
        fitting = []
        for window in shared[clip.speaker]:
            num_tokens = clip.num_tokens + sum(other.num_tokens for other in window)
            if num_tokens <= max_tokens and window_steps([clip, *window]) <= capacity:
                fitting.append(window)
        if fitting:
            max(fitting, key=window_steps).append(clip)
        else:
            window = [clip]
            windows.append(window)
            shared[clip.speaker].append(window)
    for window in windows:
        arrange(window)
    return windows


def window_steps(window: list[PackedClip]) -> int:
    """The steps of clips and silences together."""
    return sum(clip.gap + clip.steps for clip in window)


def arrange(window: list[PackedClip]) -> None:
    """Sort the clips of a window and set their starts. No silence comes before the first."""
    window.sort(key=lambda clip: clip.order_in_window)
    end = -window[0].gap
    for clip in window:
        clip.start = end + clip.gap
        end = clip.start + clip.steps


def place_body(body: TokenIds, start: int, samples: int, tokens: SpecialTokens) -> TokenIds:
    """The body of a clip's label, shifted to its window's clock; the clip begins at step `start`.

    No timestamp is later than the end of the clip. If the text has no timestamp before or after it, the start or the
    end of the clip is added. A label without text is left out: Whisper has timestamps in pairs, with text between.
    """
    zero = tokens.timestamps.start
    positions = [position for position, token in enumerate(body) if tokens.is_text(token)]
    if not positions:
        return []
    first, last = positions[0], positions[-1]
    before = body[first - 1] if first > 0 else zero
    after = body[last + 1] if last + 1 < len(body) else tokens.timestamps[-1]
    end = start + round(samples / TIMESTAMP_SAMPLES)
    placed = []
    for token in [before, *body[first : last + 1], after]:
        if token in tokens.timestamps:
            token = zero + min(token - zero + start, end)
        placed.append(token)
    return placed


def join_texts(texts: list[str], language: str) -> str:
    """The texts joined as the language is written, with or without spaces."""
    separator = "" if language in UNSPACED else " "
    return separator.join(text.strip() for text in texts if text.strip())


def join_ids(
    parts: list[TokenIds],
    language: str,
    limit: int,
    tokenizer: WhisperTokenizerFast,
    tokens: SpecialTokens,
) -> TokenIds:
    """The ids of the joined texts, as the tokenizer splits the joined text.

    The ids of the parts are joined instead if the text has half a character or the spelling of a special token in it,
    or would have more than `limit` ids. A single part keeps its ids.
    """
    if len(parts) == 1:
        return parts[0]
    texts = tokenizer.batch_decode(parts, clean_up_tokenization_spaces=False)
    joined_text = join_texts(texts, language)
    leading_space = " " if texts[0].startswith(" ") else ""
    ids = tokenizer(leading_space + joined_text, add_special_tokens=False).input_ids
    is_text = "\ufffd" not in joined_text and all(map(tokens.is_text, ids))
    if is_text and len(ids) <= limit:
        return ids
    space = [] if language in UNSPACED else tokenizer(" ", add_special_tokens=False).input_ids
    joined_ids: TokenIds = []
    for part, text in zip(parts, texts, strict=True):
        if joined_ids and not text.startswith(" "):
            joined_ids += space
        joined_ids += part
    return joined_ids


def window_audio(window: list[PackedClip]) -> np.ndarray:
    """The audio of a window, with silence between the clips, as 16-bit samples, which most corpora have."""
    samples = np.zeros(0, np.int16)
    for clip in window:
        waveform = decode_clip(clip.audio).waveform
        silence = np.zeros(clip.start * TIMESTAMP_SAMPLES - len(samples), np.int16)
        speech = np.clip(np.rint(waveform * 32768), -32768, 32767)
        samples = np.concatenate([samples, silence, speech.astype(np.int16)])
    return samples


def read_filtered_clips(job: Job, shards: range) -> list[PackedClip]:
    """The clips of these filtered shards."""
    clips = []
    for shard in shards:
        path = whole_shard(job, "filtered", shard)
        first = shard * job.outputs["filtered"].settings["shard_size"]
        stored = pq.read_table(path).to_pylist()
        for row, values in zip(read_notes(path)["kept"], stored, strict=True):
            body = label_body(values["whisper_transcript"], job.tokenizer, job.tokens)
            clip = PackedClip(
                row=first + row,
                samples=values["input_length"],
                num_tokens=len(place_body(body, 0, 0, job.tokens)),
                speaker=values.get("speaker", "any"),
                text=values["text"],
                body=body,
                audio=values["audio"]["bytes"],
            )
            clips.append(clip)
    return clips


def window_row(
    window: list[PackedClip],
    text: TokenIds,
    previous: TokenIds,
    tokens: SpecialTokens,
    settings: dict,
) -> dict:
    """What is stored of a window. `text` and `previous` are the texts of its label and of that of the window before."""
    language = text_language(settings["language"], settings["task"])
    body = []
    for clip in window:
        body += place_body(clip.body, clip.start, clip.samples, tokens)
    samples = window_audio(window)
    flac = io.BytesIO()
    soundfile.write(flac, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return {
        "audio": {"bytes": flac.getvalue(), "path": None},
        "text": join_texts([clip.text for clip in window], language),
        "whisper_transcript": [*tokens.prefix, *body, tokens.end],
        "labels": build_label(body, text, previous, f"window {window[0].row}", tokens, settings),
        "input_length": len(samples),
        "clips": [clip.row for clip in window],
        "clip_starts": [round(clip.start * STEP_SECONDS, 2) for clip in window],
    }


def pack_shard(job: Job, shard: int) -> None:
    """Write the windows of the filtered shards that are packed together in this shard."""
    filtered = job.outputs["filtered"]
    packed = job.outputs["packed"]
    settings = packed.settings
    language = text_language(settings["language"], settings["task"])
    tokens = job.tokens
    together = settings["shard_size"] // filtered.settings["shard_size"]
    first = shard * together
    shards = range(first, min(first + together, filtered.shards))
    max_tokens = settings["max_label_length"] - len(tokens.prefix) - 2  # <|notimestamps|>, <|endoftext|>
    rows = []
    statistics = []
    previous: TokenIds = []
    for window in fill_windows(read_filtered_clips(job, shards), settings, max_tokens):
        texts = [text_ids(clip.body, tokens) for clip in window]
        text = join_ids(texts, language, max_tokens, job.tokenizer, tokens)
        row = window_row(window, text, previous, tokens, settings)
        rows.append(row)
        counts = {
            "alone": window[0].alone,
            "clips": len(window),
            "samples": sum(clip.samples for clip in window),
            "tokens": len(row["labels"]),
        }
        statistics.append(counts)
        previous = text or previous
    notes = {"settings": settings, "kept": list(range(len(rows))), "windows": statistics}
    table = pa.Table.from_pylist(rows, Features(AUDIO_COLUMNS | WINDOW_COLUMNS).arrow_schema)
    write_parquet(packed.shard_path(shard), [table], table.schema, notes)


# ---- workers ---------------------------------------------------------------------------------------------------------

SHARD_WRITERS = {"filtered": filter_shard, "packed": pack_shard, "vectorized": vectorize_shard}
WORKER_JOB: Job | None = None  # set in each worker


def whole_shard(job: Job, kind: str, shard: int) -> Path:
    """The file of a shard from which another is made. It is read to the end, and made again if it is damaged."""
    path = job.outputs[kind].shard_path(shard)
    if not is_whole(path):
        logger.warning("%s is damaged and is made again", path)
        SHARD_WRITERS[kind](job, shard)
    return path


def deal_out(job: Job, kind: str, shards: list[int], state: PartialState) -> list[int]:
    """The shards that this process makes. They are dealt out in turn; those that are packed together stay together."""
    size = job.outputs[kind].settings["shard_size"]
    rows_together = max(output.settings["shard_size"] for output in job.outputs.values())
    mine = []
    for shard in shards:
        group = shard * size // rows_together
        if group % state.num_processes == state.process_index:
            mine.append(shard)
    return mine


def start_worker(jobs: multiprocessing.Queue) -> None:
    """Take the job from a queue: passed as an argument, a large job would delay the start of the next worker."""
    global WORKER_JOB
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()  # first: a killed parent leaves half a job
    WORKER_JOB = jobs.get()
    torch.set_num_threads(1)


def end_with_parent() -> None:
    """End this worker if its parent is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(kind: str, shard: int) -> None:
    """Write one shard in a worker."""
    SHARD_WRITERS[kind](WORKER_JOB, shard)


def write_shards(job: Job, kind: str, shards: list[int], max_workers: int, show_progress: bool) -> None:
    """Write these shards of an output. The progress bar counts the shards that are complete on the disk."""
    if not shards:
        return
    workers = min(max_workers, len(shards))
    progress = ProgressBar(total=len(shards), desc=kind, unit="shard", disable=not show_progress)
    if workers == 1:
        with progress:
            for shard in shards:
                SHARD_WRITERS[kind](job, shard)
                progress.update()
        return
    # Workers are forked from a server that has imported the libraries and has no threads. Forked from this process,
    # which has threads, they would deadlock in the extractor; spawned, each would import everything.
    libraries = "accelerate datasets jiwer librosa matplotlib.figure transformers.models.whisper.tokenization_whisper"
    multiprocessing.set_forkserver_preload(libraries.split())
    context = multiprocessing.get_context("forkserver")
    jobs = context.Queue()
    jobs.cancel_join_thread()  # do not wait for workers that were never started
    for _ in range(workers):
        jobs.put(job)
    pool = ProcessPoolExecutor(workers, context, start_worker, (jobs,))
    try:
        futures = [pool.submit(work, kind, shard) for shard in shards]
        for future in as_completed(futures):
            future.result()
            progress.update()
    except BrokenProcessPool:
        fail(f"a worker was killed, perhaps because memory ran out: lower --preprocessing_num_workers. {CONTINUE}")
    finally:
        pool.shutdown(cancel_futures=True)  # returns once the shards in progress are done
        progress.close()  # so that an error is the last line


# ---- report ----------------------------------------------------------------------------------------------------------


def percent(part: float, whole: float) -> float:
    """The share of the part in per cent; 0 if the whole is 0."""
    return 100 * part / whole if whole else 0.0


def read_filtering(filtered: Output) -> tuple[pd.DataFrame, dict]:
    """The reasons and measures of all rows, and the clips and labels that the report names, from the shards' notes."""
    tables = []
    worst = []
    unusable = defaultdict(list)
    frequent = Counter()
    frequent_kept = Counter()
    for shard in range(filtered.shards):
        notes = read_notes(filtered.shard_path(shard))
        tables.append(pd.DataFrame(notes["rows"]))
        worst += notes["worst"]
        for row in notes["unusable"]:
            unusable[row["reason"]].append(row["name"])
        for label, count, kept in notes["frequent"]:
            frequent[label] += count
            frequent_kept[label] += kept
    worst.sort(key=lambda row: row["cer"], reverse=True)
    labels = [[label, count, frequent_kept[label]] for label, count in frequent.most_common(20)]
    named = {"worst": worst[:10], "frequent_labels": labels, "unusable": unusable}
    return pd.concat(tables, ignore_index=True), named


def summarize_filter(filtered: Output) -> dict:
    """Clips in and out by reason, by reference length and at other thresholds, and the worst labels."""
    rows, named = read_filtering(filtered)
    rows = add_scores(rows)
    kept = rows[rows.reason == KEPT]
    judged = rows[rows.reason.isin([KEPT, OVER_THRESHOLD])]  # dropped or kept by the threshold alone
    scores = judged[filtered.settings["metric"] or "cer"]
    bins = [*range(0, 105, 5), math.inf]
    total = rows[MEASURES].sum().to_dict()
    total_kept = kept[MEASURES].sum().to_dict()
    hours = [counts["samples"] / SAMPLING_RATE / 3600 for counts in (total, total_kept)]
    cer_of_kept = percent(total_kept["character_errors"], total_kept["characters"])
    return {
        "clips": [len(rows), len(kept)],
        "hours": [round(value, 3) for value in hours],
        "characters": [total["characters"], total_kept["characters"]],
        "cer_of_kept": round(cer_of_kept, 3),
        "reasons": rows.reason.value_counts().to_dict(),
        "by_reference_length": count_by_length(rows),
        "other_thresholds": {metric: count_under(judged[metric]) for metric in ERROR_COLUMNS},
        "score_histogram": np.histogram(scores, bins)[0].tolist(),
        **named,
    }


def count_under(scores: pd.Series) -> dict[str, int]:
    """How many clips other thresholds would keep."""
    return {str(threshold): int((scores <= threshold).sum()) for threshold in OTHER_THRESHOLDS}


def count_by_length(rows: pd.DataFrame) -> dict[str, list[int]]:
    """How many clips there are and are kept, by characters of the reference."""
    counts = {}
    for low, high in pairwise([*LENGTH_CLASSES, math.inf]):
        name = f"{low}+" if high == math.inf else f"{low}-{high - 1}"
        in_class = rows.characters.between(low, high, inclusive="left")
        reasons = rows.reason[in_class].to_list()
        counts[name] = [len(reasons), reasons.count(KEPT)]
    return counts


def summarize_windows(packed: Output) -> dict:
    """Counts of windows, clips and label tokens, and how much of the windows is speech in per cent.

    Windows of clips that are left alone do not count for the last figure.
    """
    windows = []
    for shard in range(packed.shards):
        windows += read_notes(packed.shard_path(shard))["windows"]
    shared = [window for window in windows if not window["alone"]]
    speech = sum(window["samples"] for window in shared)
    room = len(shared) * packed.settings["concatenate_seconds"] * SAMPLING_RATE
    tokens = [window["tokens"] for window in windows]
    mean_tokens = sum(tokens) / max(len(tokens), 1)
    return {
        "windows": len(windows),
        "clips": sum(window["clips"] for window in windows),
        "clips_left_alone": len(windows) - len(shared),
        "fill": round(percent(speech, room), 2),
        "label_tokens": [round(mean_tokens, 1), max(tokens, default=0)],
    }


def describe_windows(windows: dict, settings: dict) -> str:
    """What the card and the log say of the windows."""
    mean, longest = windows["label_tokens"]
    return (
        f"{windows['windows']} windows hold {windows['clips']} clips, of which {windows['clips_left_alone']} have a "
        f"window of their own; on average, the clips of the other windows fill {windows['fill']:.1f} % of "
        f"{settings['concatenate_seconds']:g} s. Labels have {mean} tokens on average and at most {longest}: train "
        f"with `--max_label_length {settings['max_label_length']}`."
    )


def exact_match_notice(report: dict, settings: dict) -> str:
    """What a WER threshold means in a language without spaces; empty for other languages and for CER thresholds."""
    language = text_language(settings["language"], settings["task"])
    if settings["metric"] != "wer" or language not in UNSPACED:
        return ""
    return (
        f"{language} is written without spaces, so WER <= {settings['threshold']} is nearly an exact match "
        f"and keeps {report['clips'][1]} of {report['clips'][0]} clips; CER <= 10 (--cer_threshold 10) would keep "
        f"{report['other_thresholds']['cer']['10']}."
    )


def markdown_table(head: Sequence, rows: Iterable[Sequence]) -> str:
    """A table in Markdown. Vertical bars in cells are escaped."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        cells = [" ".join(str(cell).split()) for cell in row]
        line = " | ".join(cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| {line} |")
    return "\n".join(lines)


def keep_rates(counts: dict[str, list]) -> list[list]:
    """Table rows of name, total, how much of it is kept, and the same in per cent."""
    return [[name, total, kept, f"{percent(kept, total):.1f}"] for name, (total, kept) in counts.items()]


def describe_filter(output: Output, report: dict) -> str:
    """What the card says of one configuration and split."""
    settings = output.settings
    totals = {name: report[name] for name in ("clips", "hours", "characters")}
    lengths = keep_rates(report["by_reference_length"])
    frequent = [[label[:80], *counts] for label, *counts in report["frequent_labels"]]
    parts = [
        describe_rule(report, settings),
        markdown_table(["", "in", "out", "%"], keep_rates(totals)),
    ]
    if "windows" in report:
        parts.append(describe_windows(report["windows"], settings))
    parts += [
        f"![Scores, and keep rate by length]({output.record.with_suffix('.png').name})",
        markdown_table(["reason", "clips"], report["reasons"].items()),
        markdown_table(["characters of the reference, or else of the label", "clips", "kept", "%"], lengths),
        "The most frequent labels, normalised:",
        markdown_table(["label", "clips", "kept"], frequent),
    ]
    if settings["metric"]:
        parts += describe_thresholds(report)
    return "\n\n".join(parts)


def describe_rule(report: dict, settings: dict) -> str:
    """What is kept."""
    if settings["metric"]:
        return (
            f"Clips with {settings['metric'].upper()} <= {settings['threshold']} % are kept; their labels have a CER "
            f"of {report['cer_of_kept']:.2f} %. {exact_match_notice(report, settings)}"
        )
    limits = [f"`{name} {settings[name]}`" for name in UNSCORED_LIMITS if settings[name] is not None]
    return (
        f"There are no reference texts. Clips are kept whose labels keep to {', '.join(limits)} and are no known "
        "hallucination; how many of these labels are wrong is not known."
    )


def describe_thresholds(report: dict) -> list[str]:
    """What other thresholds would keep, and the worst labels."""
    thresholds = [[name.upper(), *counts.values()] for name, counts in report["other_thresholds"].items()]
    worst = []
    for row in report["worst"]:
        texts = [row["reference"][:80], row["hypothesis"][:80]]
        worst.append([row["name"], round(row["cer"]), *texts])
    return [
        markdown_table(["clips that another threshold (%) would keep", *OTHER_THRESHOLDS], thresholds),
        "The worst of the labels that were dropped, normalised:",
        markdown_table(["clip", "CER", "reference", "label"], worst),
    ]


def draw_report(report: dict, settings: dict) -> bytes:
    """A PNG of the distribution of the scores and of the share of clips that is kept by reference length."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    if settings["metric"]:
        scores, lengths = figure.subplots(1, 2)
        scores.bar(range(0, 105, 5), report["score_histogram"], width=5, align="edge")
        scores.axvline(settings["threshold"], color="black", linestyle="--", label="threshold")
        scores.legend()
        scores.set(xlabel=f"{settings['metric'].upper()}, % (last bar: 100 and more)", ylabel="clips")
    else:
        lengths = figure.subplots()
    classes = report["by_reference_length"]
    shares = [percent(kept, total) for total, kept in classes.values()]
    lengths.bar(list(classes), shares)
    texts = "reference" if settings["metric"] else "label"
    lengths.set(xlabel=f"{texts} length, characters", ylabel="kept, %", ylim=(0, 100))
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


# ---- files, record, card, push ---------------------------------------------------------------------------------------


def find_parquet(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The name of the configuration and the parquet files of the split, downloaded if the work reads all of them.

    There are no files if the dataset is not parquet with texts and the audio itself, as our labelling writes it.
    """
    if not is_repository(args.dataset_name):
        return "default", []
    try:
        mend_datasets()
        builder, files = find_files(args.dataset_name, args.dataset_config_name, args.split)
        paths = files.get(args.split, [])  # none for an expression such as train[:1000]
        if not all(path.endswith(".parquet") for path in paths):
            return builder.config.name, []
        if paths and not (args.dry_run or args.skip_filtering):
            paths = datasets.DownloadManager().download(paths)
    except (ValueError, *HUB_ERRORS) as error:
        hub_fail(f"reading {args.dataset_name} ({args.dataset_config_name})", error)
    is_ours = all(is_as_labelled(args, path) for path in paths)
    return builder.config.name, paths if is_ours else []


def is_as_labelled(args: argparse.Namespace, path: str) -> bool:
    """Whether a parquet file has texts and the audio itself, as our labelling writes them, or no rows."""
    parquet = pq.ParquetFile(path, page_checksum_verification=True)
    if not parquet.metadata.num_row_groups:
        return True
    text_column = args.text_column_name or "transcription"
    if text_column in parquet.schema_arrow.names and not has_valid_texts(parquet, text_column, path):
        return False
    group = parquet.metadata.row_group(0)
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema == f"{args.audio_column_name}.bytes":
            # Where all bytes are null, the audio is in files that the rows name.
            return not column.statistics or column.statistics.null_count != group.num_rows
    return False


def has_valid_texts(parquet: pq.ParquetFile, text_column: str, path: str) -> bool:
    """Whether the texts of a parquet file are strings in UTF-8. Those on the Hub are taken to be that."""
    if not pa.types.is_string(parquet.schema_arrow.field(text_column).type):
        return False
    if path.startswith("hf://"):
        return True
    with naming_damage(path):
        texts = parquet.read([text_column])
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def settle_references(args: argparse.Namespace, available: list[str]) -> None:
    """Decide in `args` whether labels are compared with references, or have to be judged without.

    A dataset with no column `transcription` but a `text`, `sentence` or `transcript` is refused by `find_columns`:
    --text_column_name has to say whether that holds the references.
    """
    if args.text_column_name is None:
        has_text = {"transcription", "text", "sentence", "transcript"}.intersection(available)
        args.text_column_name = "transcription" if has_text else "none"
    if args.text_column_name != "none":
        return
    if args.cer_threshold is not None:
        fail("--cer_threshold compares labels with references, and there are none (--text_column_name)")
    args.text_column_name = None
    args.metric = None
    args.threshold = None
    for flag, limit in UNSCORED_LIMITS.items():
        column = TEACHER_SCORES[flag][0] if flag in TEACHER_SCORES else None
        if column and column not in available:
            logger.warning("%s has no column %s, which labelling with --scores adds", args.dataset_name, column)
        elif getattr(args, flag) is None:
            setattr(args, flag, limit)
    logger.info("%s has no reference texts: the labels are judged alone", args.dataset_name)


def find_columns(args: argparse.Namespace, available: list[str]) -> dict[str, str]:
    """The columns of the labelled dataset by role. Fails if one is missing."""
    columns = {"audio": args.audio_column_name, "label": "whisper_transcript"}
    if args.metric:
        columns["text"] = args.text_column_name
    if args.speaker_id_column_name:
        columns["speaker"] = args.speaker_id_column_name
    for flag, (column, _) in TEACHER_SCORES.items():
        if getattr(args, flag) is not None:
            columns[column] = column
    for column in columns.values():
        if column not in available:
            fail(f"{args.dataset_name} has no column {column!r}; it has {', '.join(available)}")
    if "name" in available:
        columns["name"] = "name"
    return columns


def open_labelled(args: argparse.Namespace) -> Labelled:
    """Find the rows and columns of the labelled dataset. Fails if there are no rows."""
    config, paths = find_parquet(args)
    if paths:
        row_groups, dataset_digest = find_row_groups(paths)
        rows = row_groups[-1].stop if row_groups else 0
        dataset = None
        directory = local_directory(args.dataset_name) or "/nowhere"  # no files lie beside downloaded shards
        place = Place(os.path.realpath(directory), is_confined=True)
        available = pq.ParquetFile(paths[0]).schema_arrow.names
        settle_references(args, available)
        columns = find_columns(args, available)
    else:
        dataset, place = open_dataset(args.dataset_name, args.dataset_config_name, args.split, args.audio_column_name)
        row_groups = []
        rows = len(dataset)
        settle_references(args, dataset.column_names)
        dataset = convert_texts(args.dataset_name, dataset, args.text_column_name)
        columns = find_columns(args, dataset.column_names)
        others = [column for role, column in columns.items() if role != "audio"]
        dataset_digest = speech_digest(dataset, place, args.audio_column_name, others)
    if not rows:
        fail(f"{args.dataset_name} ({config}, {args.split}) has no rows")
    return Labelled(config, dataset_digest, rows, columns, row_groups, dataset, place)


def load_job(args: argparse.Namespace) -> Job:
    """Load what the work depends on, but not the teacher's weights, and refuse arguments that contradict it."""
    model = load_config(args.model)
    tokenizer = load_tokenizer(args.model)
    extractor = load_pretrained(WhisperFeatureExtractor, args.model)
    vocabulary = tokenizer.get_vocab()
    refuse_other_sizes(args.model, model, vocabulary, extractor)
    language = language_code(args.language)
    prompt = prompt_arguments(args.model, vocabulary, language, args.task)
    if text_language(language, args.task) == "en" and tokenizer.english_spelling_normalizer is None:
        logger.warning("%s has no normalizer.json: British and American spellings count as different", args.model)
    if (args.max_label_length or 0) > model.max_target_positions:
        fail(f"--max_label_length {args.max_label_length} is over the decoder's {model.max_target_positions} positions")
    labelled = open_labelled(args)  # which also sets `args.metric` and limits, for the settings
    settings = {
        "dataset": labelled.digest,
        "config": labelled.config,
        "language": language,
        "normaliser": "Whisper's for English" if args.task == "translate" else NORMALISER,
        "tokenizer": digest(tokenizer.backend_tokenizer.to_str().encode()),
        "feature_extractor": digest(extractor.to_json_string().encode()),
        "max_positions": model.max_target_positions,
        "max_label_length": args.max_label_length or MAX_CLIP_LABEL,
    }
    for name in FILTER_ARGUMENTS:
        settings[name] = getattr(args, name)
    settings["hallucinations"] = read_phrases(args.hallucinations)
    settings["split"] = split_title(args.split)
    results = results_path(args)
    return Job(
        labelled=labelled,
        tokenizer=tokenizer,
        tokens=find_special_tokens(vocabulary, prompt),
        extractor=extractor,
        batch_size=args.preprocessing_batch_size,
        outputs=name_outputs(args, results, settings, labelled.rows),
        results=results,
    )


def results_path(args: argparse.Namespace) -> Path:
    """Directory and name of the outputs, without the suffix of each."""
    dataset = local_directory(args.dataset_name) or Path(args.dataset_name).name
    dataset = Path(os.path.abspath(dataset))
    directory = os.path.abspath(args.output_dir or dataset.parent)
    return Path(directory, dataset.name)


def read_phrases(path: str | None) -> list[str] | None:
    """The phrases of --hallucinations."""
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        fail(f"cannot read --hallucinations {path}: {first_line(error)}")
    return [line.strip() for line in lines if line.strip()] or None


def name_outputs(args: argparse.Namespace, results: Path, settings: dict, rows: int) -> dict[str, Output]:
    """The datasets to write, by kind. Each is made from the one before, and its kind is added to that one's name."""
    hub_id = args.hub_model_id or (None if local_directory(args.dataset_name) else args.dataset_name)
    suffix = f".{args.metric}_{args.threshold}" if args.metric else ".unscored"
    kinds = ["filtered"]
    if args.concatenate_audio:
        kinds.append("packed")
    if not args.skip_logmel:
        kinds.append("vectorized")
    outputs = {}
    for kind in kinds:
        if kind != "filtered":
            suffix += f".{kind}"
        if kind == "packed":
            settings = window_settings(args, settings)
        outputs[kind] = Output(
            kind=kind,
            directory=results.with_name(results.name + suffix),
            repository=hub_id + suffix if hub_id else None,
            settings=settings,
            shards=math.ceil(rows / settings["shard_size"]),
        )
    return outputs


def window_settings(args: argparse.Namespace, settings: dict) -> dict:
    """The settings of windows, by those of the clips. Their shards hold at least `PACKED_ROWS` rows each."""
    return settings | {
        "max_label_length": args.max_label_length or min(MAX_WINDOW_LABEL, settings["max_positions"]),
        "shard_size": args.shard_size * math.ceil(PACKED_ROWS / args.shard_size),
        **{name: getattr(args, name) for name in WINDOW_ARGUMENTS},
    }


def fetch_filtered(args: argparse.Namespace, filtered: Output) -> None:
    """Download an incomplete filtered dataset if the labelled dataset is on the Hub. Fails if it stays incomplete."""
    if filtered.missing_shards() and filtered.repository and not local_directory(args.dataset_name):
        files = [filtered.record.name, f"{filtered.title}-*"]
        try:
            snapshot_download(
                filtered.repository, repo_type="dataset", local_dir=filtered.directory, allow_patterns=files
            )
        except HUB_ERRORS as error:
            hub_fail(f"downloading {filtered.repository}", error)
    if filtered.missing_shards():
        name = filtered.record.stem
        fail(f"--skip_filtering, but {filtered.directory} does not have all shards of {name}: filter first")


def refuse_other_results(output: Output) -> None:
    """Fail if the directory has results of a run with other settings."""
    record = read_record(output.record)
    notes = map(read_notes, output.present_shards())
    for earlier in itertools.chain([record], notes):
        if earlier:
            refuse_other_settings(output.directory, earlier.get("settings", {}), output.settings)


def open_output(output: Output, deleted: list[Path]) -> None:
    """Delete files of an output, which are to be made again, and create its directory and its record."""
    for path in deleted:
        path.unlink(missing_ok=True)
    output.shard_path(0).parent.mkdir(parents=True, exist_ok=True)
    if output.missing_shards() or read_record(output.record) is None:
        record = {"stage": "filtering", "status": "running", "settings": output.settings}
        write_record(output.record, record)


def lock_output(output: Output) -> contextlib.AbstractContextManager:
    """The lock of the configuration and split in an output's directory."""
    name = output.record.stem
    leftovers = f"{output.settings['config']}/.{output.settings['split']}-*.partial"
    return hold_lock(output.directory / f".{name}.lock", f"{name} in {output.directory}", leftovers)


def prepare_pushes(args: argparse.Namespace, outputs: list[Output]) -> list[Output]:
    """The outputs to push, whose repositories are created. Tries what will be done with the cards of all outputs."""
    pushed = []
    for output in outputs:
        repository = None
        if output.repository and args.push_to_hub is not False:
            private = args.hub_private_repo
            repository, output.visibility = prepare_repository(output.repository, "dataset", private, args.dry_run)
            output.repository = repository
            pushed.append(output)
        check_cards(output.directory, repository, "dataset", functools.partial(add_split, output))
    return pushed


def prepare_outputs(args: argparse.Namespace, job: Job, is_main: bool, locks: contextlib.ExitStack) -> list[Output]:
    """Refuse results of other settings, create directories and repositories, and return the outputs to push."""
    outputs = list(job.outputs.values())
    made = outputs[1:] if args.skip_filtering else outputs  # the first are the filtered clips
    is_writer = is_main and not args.dry_run
    if is_writer:
        for output in made:
            locks.enter_context(lock_output(output))
        if args.skip_filtering:
            fetch_filtered(args, job.outputs["filtered"])
    for output in outputs:
        if output not in made or not args.overwrite_output_dir:
            refuse_other_results(output)
    pushed = prepare_pushes(args, made) if is_main else []
    if is_writer:
        is_complete = not any(output.missing_shards() for output in outputs)
        for output in made:
            deleted = []
            if args.overwrite_output_dir:
                deleted = [output.record, *output.present_shards()]
            elif is_complete:  # otherwise only those are read to the end that others are made from
                deleted = find_damaged(output.present_shards(), args.preprocessing_num_workers)
            open_output(output, deleted)
    return pushed


def make_sample(job: Job, directory: Path, rows: int) -> tuple[dict[str, tuple[float, int]], dict]:
    """Make all outputs of the first rows in a directory: seconds and bytes of each kind, and the notes on the rows."""
    sample = replace(job, outputs={}, results=directory / "sample")
    costs = {}
    for kind, output in job.outputs.items():
        settings = output.settings | {"shard_size": rows}
        sample.outputs[kind] = replace(output, directory=directory / kind, settings=settings, shards=1)
        path = sample.outputs[kind].shard_path(0)
        path.parent.mkdir(parents=True)
        started = time.monotonic()
        SHARD_WRITERS[kind](sample, 0)
        costs[kind] = (time.monotonic() - started, path.stat().st_size)
    return costs, read_notes(sample.outputs["filtered"].shard_path(0))


def print_filtering_plan(
    args: argparse.Namespace,
    job: Job,
    pending: dict[str, list[int]],
    pushed: list[Output],
    workers: int,
) -> None:
    """Print what a run would do and how long it would take, measured on the first rows in a temporary directory."""
    rows = job.labelled.rows
    sample_rows = min(rows, SAMPLE_ROWS)
    with tempfile.TemporaryDirectory() as directory:
        costs, notes = make_sample(job, Path(directory), sample_rows)
    hours = sum(notes["rows"]["samples"]) / SAMPLING_RATE / 3600 * rows / sample_rows
    place = f"{job.labelled.config}, {split_title(args.split)}"
    print(f"input: {args.dataset_name} ({place}), {rows} clips, about {hours:.2f} h")
    paths = {group.path for group in job.labelled.row_groups}
    remote = [path for path in paths if path.startswith("hf://")]
    if remote:
        print(f"download: {sum(map(HfFileSystem().size, remote)) / 1e6:.1f} MB")
    print(f"keeps: {percent(len(notes['kept']), sample_rows):.0f} % of the first {sample_rows} clips")
    seconds = 0.0
    for kind, output in job.outputs.items():
        missing = len(pending[kind])
        times = missing / output.shards * rows / sample_rows  # as much as the sample is left
        sample_seconds, sample_bytes = costs[kind]
        seconds += sample_seconds * times
        print(f"done: {output.shards - missing} of {output.shards} shards of {output.directory}")
        print(f"writes: {output.directory}, about {sample_bytes * times / 1e6:.1f} MB")
    for output in pushed:
        print(f"pushes: {output.repository} ({output.visibility})")
    if not pushed:
        print("pushes: nothing")
    print(f"time: about {seconds / workers / 60:.1f} min on {workers} cores")


def write_results(job: Job, run: dict) -> dict:
    """Write record, figure and card of each output, and return the report. Records of complete runs are kept."""
    report = summarize_filter(job.outputs["filtered"])
    for output in job.outputs.values():
        if output.kind == "packed":
            report = report | {"windows": summarize_windows(output)}
            logger.info(describe_windows(report["windows"], output.settings))
        record = read_record(output.record)
        if record is None or record["status"] == "running":
            write_record(output.record, run | {"settings": output.settings, "report": report})
        write_atomically(output.record.with_suffix(".png"), draw_report(report, output.settings))
        write_card(output.directory, functools.partial(filtering_card, output))
    return report


def refuse_empty_results(report: dict, settings: dict) -> None:
    """Log what was kept, and fail if nothing was."""
    clips, kept = report["clips"]
    hours, kept_hours = report["hours"]
    reasons = report["reasons"]
    logger.info("kept %d of %d clips, %.3f of %.3f h: %s", kept, clips, kept_hours, hours, reasons)
    if notice := exact_match_notice(report, settings):
        logger.warning(notice)
    if sum(map(len, report["unusable"].values())) == clips:
        fail(f"none of the {clips} rows can be used: {reasons}; nothing is pushed")
    if not kept and not settings["metric"]:
        fail(f"none of the {clips} clips is kept: {reasons}. Nothing is pushed")
    if not kept:
        fail(
            f"{settings['metric'].upper()} <= {settings['threshold']} keeps none of {clips} clips; CER <= 10 would "
            f"keep {report['other_thresholds']['cer']['10']}. Nothing is pushed"
        )


def add_split(output: Output, card: RepoCard) -> None:
    """Name the files of an output in its card."""
    list_split(card, output.settings["config"], output.settings["split"])


def filtering_card(output: Output, card: RepoCard | None) -> str:
    """The dataset card with the section on this configuration and split, and all else that `card` has."""
    settings = output.settings
    is_unscored = output.kind == "filtered" and not settings["metric"]
    about = ABOUT["unscored" if is_unscored else output.kind]
    card = card or RepoCard(f"---\n{{}}\n---\n# {output.directory.name}\n\n{about}\n")
    add_split(output, card)
    fill_metadata(card, language=[settings["language"]], task_categories=["automatic-speech-recognition"])
    title = f"{settings['config']}, {settings['split']}"
    description = describe_filter(output, read_record(output.record)["report"])
    set_section(card, title, f"## {title}\n\n{description}")
    return str(card)


def push_output(output: Output) -> None:
    """Upload shards, record, figure and card of this configuration and split. The card keeps its other sections."""
    patterns = [f"{output.title}-*", f"{output.record.stem}.*"]
    update_card = functools.partial(filtering_card, output)
    push_dataset(output.repository, output.directory, patterns, update_card, f"Filter {output.title}")


def shards_to_make(args: argparse.Namespace, job: Job) -> dict[str, list[int]]:
    """The shards of each output that are to be made."""
    pending = {kind: output.missing_shards() for kind, output in job.outputs.items()}
    if args.dry_run and args.overwrite_output_dir:  # which would delete what is there
        for kind, output in job.outputs.items():
            if kind != "filtered" or not args.skip_filtering:
                pending[kind] = list(range(output.shards))
    return pending


# ---- main ------------------------------------------------------------------------------------------------------------


@one_line_for_lost_processes()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Set up.
    started = time.monotonic()
    state = PartialState(cpu=True, timeout=timedelta(days=30))
    is_main = state.is_main_process
    watch_processes()
    set_up_process(is_main)
    set_client_factory(make_hub_client)
    torch.set_num_threads(1)  # as in the workers, so that features do not depend on their number
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this run, on this machine
    workers = max(1, args.preprocessing_num_workers // processes)
    all_workers = workers * state.num_processes

    # 2. Refuse what can be refused.
    if args.push_to_hub and not args.hub_model_id and local_directory(args.dataset_name):
        fail("--push_to_hub with a local dataset needs --hub_model_id org/name")
    for name in ("max_duration_in_seconds", "concatenate_seconds"):
        if getattr(args, name) > WINDOW_SECONDS:
            fail(f"--{name} {getattr(args, name)} is over the model's {WINDOW_SECONDS} s")

    locks = contextlib.ExitStack()
    try:
        with state.main_process_first():
            # 3. Load, and prepare the outputs.
            job = load_job(args)
            pushed = prepare_outputs(args, job, is_main, locks)

            # 4. Find what is left to do.
            pending = shards_to_make(args, job)
        if args.dry_run:
            if is_main:
                print_filtering_plan(args, job, pending, pushed, all_workers)
            return 0

        # 5. Work.
        for kind, output in job.outputs.items():
            left = len(pending[kind])
            logger.info("%s: %d of %d shards are left, workers: %d", kind, left, output.shards, all_workers)
            mine = deal_out(job, kind, pending[kind], state)
            write_shards(job, kind, mine, workers, is_main)
        arrive()
        state.wait_for_everyone()
        if not is_main:
            return 0
        for output in job.outputs.values():
            for shard in output.missing_shards():
                fail(f"shard {shard} of {output.directory} is missing: can all machines see this directory? {CONTINUE}")

        # 6. Write record and card.
        seconds = time.monotonic() - started
        share_done = max(len(pending[kind]) / output.shards for kind, output in job.outputs.items())
        run = {
            "stage": "filtering",
            "status": "complete",
            "arguments": shown_arguments(args),
            "seconds": round(seconds, 1),
            "clips_per_second": round(share_done * job.labelled.rows / seconds, 1),
            "versions": library_versions(*LIBRARIES),
        }
        report = write_results(job, run)
        refuse_empty_results(report, job.outputs["filtered"].settings)

        # 7. Push.
        for output in pushed:
            push_output(output)
        return 0
    except OSError as error:
        if error.errno is None:  # not from the operating system
            raise
        fail(f"{error}. {CONTINUE}")
    finally:
        locks.close()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"stopped. {CONTINUE}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an exception while Python shuts down would print a traceback
