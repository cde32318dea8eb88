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

A card, a record (filtering.<config>.<split>.json) and a figure say what was dropped, why, and what other thresholds
would keep. Run it on one machine, or on each of two machines that share a file system:

    python run_data_filtering.py -d org/dataset --dataset_config_name tiny --wer_threshold 10
    accelerate launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank 0 --main_process_ip HOST \\
        --main_process_port 29500 run_data_filtering.py -d /shared/dataset --preprocessing_num_workers 32

Run the same command again to continue: complete shards are kept. A run with another threshold takes scores, audio and
features from them.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import io
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
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import datasets
import fsspec
import jiwer
import librosa
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import yaml
from accelerate import PartialState
from datasets import Audio, Features, List, Value
from datasets.data_files import sanitize_patterns
from huggingface_hub import HfApi, HfFileSystem, RepoCard, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from matplotlib.figure import Figure
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, WhisperConfig, WhisperFeatureExtractor, WhisperTokenizerFast
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

STEP_SECONDS = 0.02  # from one timestamp token to the next
TIMESTAMP_SAMPLES = 320  # the same in samples
TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>, the last ids of the vocabulary
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
SCORE_COLUMNS = {"wer": Value("float64"), "cer": Value("float64")}
WINDOW_COLUMNS = {"clips": List(Value("int32")), "clip_starts": List(Value("float64"))}
FEATURE_COLUMNS = {"input_features": Value("binary"), "labels": List(Value("int32")), "input_length": Value("int32")}
ABOUT_AUDIO = "`labels` is the decoder sequence, `input_length` the samples at 16 kHz. "
ABOUT = {
    "filtered": f"Clips whose teacher label agrees with the reference, to train a student on. {ABOUT_AUDIO}"
    "`wer` and `cer` compare normalised texts, in per cent.",
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
    add("--text_column_name", default="transcription", help="column of the reference texts")
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
    repeats_help = "most consecutive repetitions of any piece of a label; unset = no limit"
    add("--max_ngram_repeats", type=int, help=repeats_help)
    for name, (column, _) in TEACHER_SCORES.items():
        add(f"--{name}", type=float, help=f"{name[:3]}imum of the labels' {column}; unset = no limit")
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

CONTINUE = "Run the same command again to continue."

logger = logging.getLogger(__name__)


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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of a flag in its help, unless it has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def set_up_process(is_main_process: bool = True) -> None:
    """Log to stderr, only warnings outside of the main process, and turn SIGTERM into SystemExit."""
    level = logging.INFO if is_main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    for noisy in ("httpx2", "httpx", "accelerate"):  # they log every request and every file of a checkpoint
        logging.getLogger(noisy).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def hold_lock(path: Path, output: str, *leftovers: str, wait: bool = False) -> Iterator[None]:
    """Let no other run write an output meanwhile. The kernel frees the lock when this process ends, in whatever way.

    Args:
        path: the lock, a file whose directory is made.
        output: what is written, for people.
        leftovers: patterns, relative to the lock, of what killed runs have left half-written: deleted.
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
            for partial in path.parent.glob(pattern):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        yield


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name only when it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # no other process has this name
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file by `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


# ---- common: records -------------------------------------------------------------------------------------------------


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file; what JSON does not know, such as a path, is written as its text."""
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict | None:
    """The content of a JSON file, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def library_versions(*names: str) -> dict[str, str]:
    """Version of each of these installed packages, for a record."""
    return {name: importlib.metadata.version(name) for name in names}


def changed_setting(earlier: dict, settings: dict) -> str | None:
    """The first setting in which an earlier run differs from this one, for people to read; None where none does."""
    for name, value in json.loads(json.dumps(settings, default=str)).items():
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

HUB_ERRORS = (OSError, HFValidationError, httpx.HTTPError, RuntimeError)  # RuntimeError: an upload through Xet


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, without its full stop; the Hub's start with a request id."""
    for line in str(error).splitlines():
        if line.strip() and not line.startswith("(Request ID"):
            return line.strip().rstrip(".")
    return type(error).__name__


def hub_fail(action: str, error: BaseException) -> NoReturn:
    """Fail because the Hub refused something."""
    fail(
        f"{action} failed: {first_line(error)}. Check the name, and the token with `hf auth whoami`; "
        "`hf auth login` sets another token"
    )


def prepare_repository(repository: str, repo_type: str, private: bool | None, dry_run: bool) -> str:
    """Create a repository if it is missing, check the right to write to it, and return its full id.

    A dry run creates nothing: it checks the repository, or else whether this token could create it.
    """
    api = HfApi()
    try:
        if not dry_run:
            url = api.create_repo(repository, repo_type=repo_type, private=private, exist_ok=True)
            api.auth_check(url.repo_id, repo_type=repo_type, write=True)
            return url.repo_id
        account = api.whoami()
        repo_id = repository if "/" in repository else f"{account['name']}/{repository}"
        owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
        if api.repo_exists(repo_id, repo_type=repo_type):
            api.auth_check(repo_id, repo_type=repo_type, write=True)
        elif repo_id.split("/")[0] not in owners:
            fail(f"{account['name']} cannot create {repo_id}: it belongs to somebody else")
        return repo_id
    except HUB_ERRORS as error:
        hub_fail(f"preparing the {repo_type} repository {repository}", error)


def push_again(push: Callable[[], object]) -> None:
    """Push, and retry if another push to the repository came first, which the Hub answers with 409 or 412."""
    for seconds in (1, 2, 4, 0):
        try:
            push()
            return
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412) or not seconds:
                raise
        time.sleep(seconds * random.uniform(0.5, 1))


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
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return read_card(Path(path), repository)


def check_cards(
    directory: Path, repository: str | None, repo_type: str, update: Callable[[RepoCard], object] | None = None
) -> None:
    """Try, before the work, what will be done with the cards that are there."""
    try:
        cards = [read_card(directory / "README.md"), download_card(repository, repo_type) if repository else None]
    except HUB_ERRORS as error:
        hub_fail(f"reading the cards of {directory} and {repository}", error)
    for card in filter(None, cards):
        if update:
            update(card)


def fill_metadata(card: RepoCard, **values: str | list | None) -> None:
    """Add to a card's metadata what they do not have. A value that is there stays, a list gets what it lacks."""
    for name, value in values.items():
        present = card.data.get(name)
        if not present:
            card.data[name] = value
        elif isinstance(value, list):
            present = present if isinstance(present, list) else [present]
            card.data[name] = [*present, *(item for item in value if item not in present)]


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


def push_card(repository: str, repo_type: str, update: Callable[[RepoCard | None], str], message: str) -> None:
    """Update the card of a repository on the Hub; `update` gives the text for the card there, None if there is none."""
    api = HfApi()

    def push() -> None:
        target = {"repo_id": repository, "repo_type": repo_type, "commit_message": message}
        head = api.repo_info(repository, repo_type=repo_type).sha
        text = update(download_card(repository, repo_type, head))
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", parent_commit=head, **target)

    push_again(push)


# ---- common: dataset repositories ------------------------------------------------------------------------------------


def write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema, notes: dict) -> None:
    """Write a shard that appears under its name only when it is complete and on the disk.

    `read_notes` gives the notes back. They are written last, so they may be filled while the tables are made.
    """
    with atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer:
        for table in tables:
            if table.num_rows:  # `datasets` cannot read a row group without rows
                writer.write_table(table, row_group_size=100)
        writer.add_key_value_metadata({"kotoba": json.dumps(notes, ensure_ascii=False)})


def read_notes(path: Path) -> dict | None:
    """What `write_parquet` noted in a shard; None where the shard is missing or damaged."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (FileNotFoundError, NotADirectoryError, pa.ArrowInvalid):
        return None
    return json.loads(metadata.get(b"kotoba", "{}"))


def list_split(card: RepoCard, config: str, split: str) -> None:
    """Name the files of a split in a dataset card, which keeps what it says of other splits and configurations."""
    try:
        configs = {entry.get("config_name", "default"): entry for entry in card.data.get("configs") or []}
        entry = configs.setdefault(config, {"config_name": config})
        directory = entry.pop("data_dir", None)
        files = sanitize_patterns(entry.get("data_files") or ({"train": f"{directory}/**"} if directory else {}))
    except (ValueError, TypeError, AttributeError) as error:
        fail(f"`configs` of the dataset's card cannot be read: {first_line(error)}. Correct it. {CONTINUE}")
    files.pop(split, None)
    files[split] = [f"{config}/{split}-*"]
    entry["data_files"] = []
    for name, patterns in files.items():
        entry["data_files"].append({"split": name, "path": patterns[0] if len(patterns) == 1 else patterns})
    card.data["configs"] = list(configs.values())
    infos = card.data.get("dataset_info") or []
    infos = infos if isinstance(infos, list) else [infos]
    # Row counts of earlier contents, on which `datasets` would insist.
    card.data["dataset_info"] = [info for info in infos if info.get("config_name", "default") != config] or None


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
    api, target = HfApi(), {"repo_id": repository, "repo_type": "dataset", "commit_message": message}

    def push_files() -> None:
        ignored = [".*", "*.partial"]
        api.upload_folder(
            folder_path=directory, allow_patterns=patterns, delete_patterns=patterns, ignore_patterns=ignored, **target
        )

    try:
        push_again(push_files)
        push_card(repository, "dataset", update, message)
    except HUB_ERRORS as error:
        fail(f"the push to {repository} failed: {first_line(error)}. All data is in {directory}. {CONTINUE}")
    logger.info("pushed to %s/datasets/%s", api.endpoint, repository)


# ---- common: models --------------------------------------------------------------------------------------------------

ENGLISH_ONLY_END = 50256  # <|endoftext|> in GPT-2's vocabulary, which only English-only Whispers (`*.en`) have


def local_directory(reference: str) -> Path | None:
    """The directory that a repository reference names, or None where it is a Hub id (`org/name`)."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        fail(f"{reference!r} is neither a directory that exists nor a Hub id such as org/name")
    return None


def load_pretrained(kind: type, reference: str, **options) -> Any:
    """`kind.from_pretrained` of a local directory or a Hub id, or one line that says why it cannot be had."""
    # Otherwise `transformers` asks a Space to open a pull request at a repository that has no safetensors.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        return kind.from_pretrained(str(local_directory(reference) or reference), **options)
    except (*HUB_ERRORS, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        # The last three are weights that were cut off, that are damaged, and that would run code.
        fail(f"cannot load the model {reference}: {first_line(error)}. A private one needs `hf auth login`")


def load_config(reference: str, **options) -> WhisperConfig:
    """The configuration of a Whisper; fails for models of other kinds."""
    config = load_pretrained(AutoConfig, reference, **options)
    if config.model_type != "whisper":
        fail(f"{reference} is a {config.model_type} model, not a Whisper")
    return config


def load_tokenizer(reference: str, **options) -> WhisperTokenizerFast:
    """The tokenizer of a Whisper. Without its files, `transformers` silently makes one with an empty vocabulary."""
    tokenizer = load_pretrained(WhisperTokenizerFast, reference, **options)
    # "a" as well: with tokenizer_config.json alone there are the special tokens, and no others.
    if not {"a", "<|startoftranscript|>"} <= tokenizer.get_vocab().keys():
        fail(f"{reference} lacks the files of its tokenizer: tokenizer.json, or vocab.json and merges.txt")
    return tokenizer


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
    codes = [code for code in LANGUAGES if f"<|{code}|>" in vocabulary] if is_multilingual(vocabulary) else ["en"]
    if language is not None and language not in codes:
        fail(f"--language {language}: {reference} has no such language, only {', '.join(sorted(codes))}")
    if not is_multilingual(vocabulary):
        if task != "transcribe":
            fail(f"--task {task}: {reference} knows only English")
        return {}
    return {"task": task} if language is None else {"language": language, "task": task}


# ---- common: finding datasets ----------------------------------------------------------------------------------------


def find_files(reference: str, config: str | None, split: str) -> tuple[datasets.DatasetBuilder, list[str]]:
    """The builder that `datasets` chooses for a local directory or a Hub id, and the files of one split."""
    source = str(local_directory(reference) or reference)
    builder = datasets.load_dataset_builder(source, config)
    files_by_split = builder.config.data_files or {}
    if split not in files_by_split:
        fail(f"{reference} ({builder.config.name}) has no split {split!r}; it has {', '.join(files_by_split)}")
    files = list(files_by_split[split])
    directories = {file.rpartition("/")[0] for file in files}
    shard = re.search(r"-of-(\d+)\.parquet$", files[0])
    if shard and len(directories) == 1 and len(files) != int(shard[1]):
        fail(f"{reference} has {len(files)} of {int(shard[1])} shards of {split}: finish the stage that writes it")
    return builder, files


# ---- common: audio ---------------------------------------------------------------------------------------------------

SAMPLING_RATE = 16_000  # Hz; Whisper's
WINDOW_SECONDS = 30  # what Whisper hears at a time
HOP_LENGTH = 160  # samples from one log-mel frame to the next; a frame sees 200 samples to either side of its centre
WINDOW_FRAMES = WINDOW_SECONDS * SAMPLING_RATE // HOP_LENGTH


class Clip(NamedTuple):
    """A decoded clip, or the problem why there is none."""

    waveform: np.ndarray | None  # mono float32 at 16 kHz
    samples: int  # of the whole clip at 16 kHz, also where the waveform is cut
    seconds: float  # of the whole clip
    problem: str | None = None


def read_audio(audio: dict | None) -> bytes | None:
    """The encoded bytes of an undecoded value of an audio column, which may only name a file."""
    if not audio:
        return None
    if audio["bytes"] is None and audio["path"]:
        try:
            with fsspec.open(audio["path"], "rb") as file:
                return file.read()
        except (OSError, ValueError):
            return None
    return audio["bytes"]


def decode_clip(content: bytes | None, whole: bool = False) -> Clip:
    """Decode an audio file to mono float32 at 16 kHz; of a clip over 30 s only those unless the whole is asked for.

    It is read to its end, because the header of a damaged file, and of many an MP3, only estimates the length.
    """
    if not content:
        return Clip(None, 0, 0.0, "no audio")
    kept, frames = [], 0
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = file.samplerate
            # A block is a second longer than what is kept, so that resampling sees what follows the cut.
            while len(block := file.read((WINDOW_SECONDS + 1) * rate, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    return Clip(None, 0, 0.0, "samples that are not finite numbers")
                if whole or not kept:
                    kept.append(block.mean(axis=1))
                frames += len(block)
    except soundfile.LibsndfileError as error:
        return Clip(None, 0, 0.0, f"undecodable audio: {error.error_string}")
    if not frames:
        return Clip(None, 0, 0.0, "zero length")
    waveform = np.concatenate(kept)
    if rate != SAMPLING_RATE:
        waveform = librosa.resample(waveform, orig_sr=rate, target_sr=SAMPLING_RATE)
    if not whole:
        waveform = waveform[: WINDOW_SECONDS * SAMPLING_RATE]
    return Clip(waveform, math.ceil(frames * SAMPLING_RATE / rate), frames / rate)


def filled_frames(samples: int) -> int:
    """Log-mel frames of a clip up to the first padded one; all later ones are equal to that one."""
    return min(WINDOW_FRAMES, math.ceil((samples + 200) / HOP_LENGTH) + 1)


def log_mel(waveforms: list[np.ndarray], extractor: WhisperFeatureExtractor, device: str = "cpu") -> torch.Tensor:
    """Whisper's log-mel of clips of at most 30 s, float32 (clips, mels, frames), as far as the longest clip fills it.

    Padding to 30 s instead changes no bit: all padded frames are one constant, and the one that is kept brings this
    constant into the clip's maximum. `pad_window` gives the frames that are left out.
    """
    samples = HOP_LENGTH * filled_frames(max(len(waveform) for waveform in waveforms))
    features = extractor(waveforms, sampling_rate=SAMPLING_RATE, max_length=samples, return_tensors="pt", device=device)
    return features.input_features


def pad_window(features: torch.Tensor) -> torch.Tensor:
    """(..., mels, frames) -> (..., mels, 3000): the last frame repeated, as all padded frames of a clip are equal."""
    missing = WINDOW_FRAMES - features.shape[-1]
    return torch.cat([features, features[..., -1:].expand(*features.shape[:-1], missing)], dim=-1)


# ---- common: text ----------------------------------------------------------------------------------------------------

UNSPACED = ("ja", "zh", "yue", "th", "lo", "my", "km")  # languages that are written without spaces


def text_normaliser(language: str, spellings: dict[str, str] | None) -> Callable[[str], str]:
    """The rule by which two texts are compared for WER and CER, the same in filter, training and evaluation.

    It is Whisper's own normaliser, then without spaces where the language is written without them: such a text is one
    word. `spellings`, British to American, come from the tokenizer and serve English.
    """
    whisper_rule = EnglishTextNormalizer(spellings or {}) if language == "en" else BasicTextNormalizer()

    def normalise(text: str) -> str:
        words = whisper_rule(text).split()
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


class SpecialTokens(NamedTuple):
    """Ids of Whisper's special tokens. They are above the ids of text, and timestamps are above `no_timestamps`."""

    prefix: TokenIds  # <|startoftranscript|> <|ja|> <|transcribe|>; only the first in an English-only model
    end: int  # <|endoftext|>, the first special token
    previous: int  # <|startofprev|>
    no_timestamps: int


@dataclass
class Output:
    """One configuration and split of a dataset that this script writes."""

    kind: str  # filtered; packed: windows of the filtered clips; vectorized: features of the windows or filtered clips
    directory: Path
    repository: str | None  # Hub id; None = it is not pushed
    settings: dict  # that its contents depend on
    shards: int

    @property
    def record(self) -> Path:
        return self.directory / f"filtering.{self.settings['config']}.{self.settings['split']}.json"

    def shard_path(self, shard: int) -> Path:
        name = f"{self.settings['split']}-{shard:05d}-of-{self.shards:05d}.parquet"
        return self.directory / self.settings["config"] / name

    def missing_shards(self) -> list[int]:
        """The shards that do not exist or are damaged."""
        return [shard for shard in range(self.shards) if read_notes(self.shard_path(shard)) is None]


@dataclass
class Job:
    """What a worker needs to know. Every worker receives it once."""

    row_groups: list[RowGroup]
    columns: dict[str, str]  # names by role: audio, text, label; if they are needed, name, speaker and scores
    tokenizer: WhisperTokenizerFast
    tokens: SpecialTokens
    extractor: WhisperFeatureExtractor
    batch_size: int
    outputs: dict[str, Output]  # by kind, in the order in which they are made
    results: Path  # directory and name of the outputs, without the suffix of each


def find_row_groups(paths: list[str]) -> tuple[list[RowGroup], str]:
    """The row groups of parquet files, and a digest of their footers, which hold sizes, minima and maxima."""
    row_groups = []
    footers = io.BytesIO()
    start = 0
    for path in paths:
        metadata = pq.ParquetFile(path).metadata
        metadata.write_metadata_file(footers)
        for number in range(metadata.num_row_groups):
            stop = start + metadata.row_group(number).num_rows
            row_groups.append(RowGroup(start, stop, path, number))
            start = stop
    return row_groups, digest(footers.getvalue())


def read_rows(job: Job, start: int, stop: int, roles: list[str]) -> pa.Table:
    """Rows `start` to `stop` of the labelled dataset, or up to its end. Columns are chosen and named by role."""
    columns = [job.columns[role] for role in roles]
    tables = []
    first = bisect_right(job.row_groups, start, key=lambda group: group.stop)
    for group in job.row_groups[first:]:
        if group.start >= stop:
            break
        table = pq.ParquetFile(group.path).read_row_group(group.number, columns)
        skipped = max(start - group.start, 0)
        tables.append(table.slice(skipped, stop - group.start - skipped))
    return pa.concat_tables(tables).select(columns).rename_columns(roles)


def digest(content: bytes) -> str:
    """A short hash of the content."""
    return hashlib.sha256(content).hexdigest()[:16]


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
    return SpecialTokens(
        prefix=[vocabulary[f"<|{name}|>"] for name in ("startoftranscript", *prompt.values())],
        end=vocabulary["<|endoftext|>"],
        previous=vocabulary["<|startofprev|>"],
        no_timestamps=vocabulary["<|notimestamps|>"],
    )


def tokenize_label(label: str, tokenizer: WhisperTokenizerFast, tokens: SpecialTokens) -> TokenIds:
    """The decoder sequence of a label that is stored as text with timestamps such as `<|1.08|>`."""
    special = tokenizer.get_added_vocab()
    body = []
    for piece in re.split(r"(<\|[^<>|]*\|>)", label):
        timestamp = re.fullmatch(r"<\|(\d+\.\d\d)\|>", piece)
        if timestamp:
            step = round(float(timestamp[1]) / STEP_SECONDS)
            body.append(tokens.no_timestamps + 1 + step)
        elif piece not in special:
            body += tokenizer(piece, add_special_tokens=False).input_ids
    return [*tokens.prefix, *body, tokens.end]


def label_body(stored: TokenIds | str | None, tokenizer: WhisperTokenizerFast, tokens: SpecialTokens) -> TokenIds:
    """Text and timestamps of a stored label, without its prefix and its end. Raises UnusableLabel."""
    label = tokenize_label(stored, tokenizer, tokens) if isinstance(stored, str) else stored
    if not label:
        raise UnusableLabel("no label")
    if min(label) < 0 or max(label) > tokens.no_timestamps + TIMESTAMPS:
        raise UnusableLabel("label ids outside the vocabulary")
    if label[0] != tokens.prefix[0]:
        raise UnusableLabel("malformed label")
    if label[: len(tokens.prefix)] != tokens.prefix:
        raise UnusableLabel("label for another language or task")
    body = label[len(tokens.prefix) :]
    if body[:1] == [tokens.no_timestamps]:
        body = body[1:]
    while body[-2:] == [tokens.end, tokens.end]:  # padding
        body = body[:-1]
    special = [token for token in body if tokens.end <= token <= tokens.no_timestamps]
    if special != [tokens.end] or body[-1] != tokens.end:
        raise UnusableLabel("malformed label")
    return body[:-1]


def text_ids(body: TokenIds, tokens: SpecialTokens) -> TokenIds:
    """The body of a label without its timestamps."""
    return [token for token in body if token < tokens.end]


def build_label(
    body: TokenIds, text: TokenIds, previous: TokenIds, row: int | str, tokens: SpecialTokens, settings: dict
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
    stored = read_rows(job, first, stop, ["label"])["label"].to_pylist()
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


def repeats(text: str, limit: int | None) -> bool:
    """Whether a piece of the text occurs more than `limit` times in succession, as when a teacher loops."""
    if limit is None:
        return False
    return re.search(rf"(.+?)\1{{{limit}}}", "".join(text.split())) is not None


def compare_texts(job: Job, table: pa.Table, labels: list[Label], start: int) -> pd.DataFrame:
    """The labels of some rows with the normalised texts: the reference, and the teacher's hypothesis."""
    settings = job.outputs["filtered"].settings
    normalise = text_normaliser(settings["language"], job.tokenizer.english_spelling_normalizer)
    rows = pd.DataFrame(labels)
    hypotheses = job.tokenizer.batch_decode(rows.ids.to_list())
    references = table["text"].to_pylist()
    rows["hypothesis"] = [normalise(text) for text in hypotheses]
    rows["reference"] = [normalise(text or "") for text in references]
    rows.loc[rows.problem.notna(), "reference"] = ""  # without a label, nothing is compared
    rows["name"] = [f"row {start + number}" for number in rows.index]
    for role in table.column_names:
        if role not in ("text", "label"):
            rows[role] = table[role].to_pylist()
    return rows


def measure_rows(rows: pd.DataFrame, clips: dict[int, dict]) -> pd.DataFrame:
    """The `MEASURES` of the rows. A clip that cannot be decoded has 0 samples."""
    measures = []
    for row in rows.index:
        clip = decode_clip(clips[row]["bytes"])
        counts = error_counts(rows.reference[row], rows.hypothesis[row])
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
    that results with different values are not mixed. A limit on a score that the labelling stores needs only an entry
    in `TEACHER_SCORES`.
    """
    limit = settings["max_ngram_repeats"]
    conditions = {
        "empty reference": rows.reference == "",
        "undecodable audio": rows.samples == 0,
        "shorter than the minimum": rows.samples < settings["min_duration_in_seconds"] * SAMPLING_RATE,
        "longer than the maximum": rows.samples > settings["max_duration_in_seconds"] * SAMPLING_RATE,
        "label too long": rows.label_length > settings["max_label_length"],
        "label repeats itself": [repeats(hypothesis, limit) for hypothesis in rows.hypothesis],
    }
    for flag, (column, reason) in TEACHER_SCORES.items():
        if settings[flag] is not None:
            scores = rows[column].astype(float)
            too_low = scores < settings[flag]
            too_high = scores > settings[flag]
            conditions[reason] = too_low if flag.startswith("min_") else too_high
    conditions[OVER_THRESHOLD] = rows[settings["metric"]] > settings["threshold"]
    reasons = np.select(list(conditions.values()), list(conditions), default=KEPT)
    return np.where(rows.problem.isna(), reasons, rows.problem)


def read_clips(job: Job, start: int, stop: int) -> dict[int, dict]:
    """The encoded audio of these rows as `{bytes, path}`; the keys count from 0."""
    column = read_rows(job, start, stop, ["audio"])["audio"]
    clips = {}
    for row, audio in enumerate(column.to_pylist()):
        path = audio["path"] if audio else None
        clips[row] = {"bytes": read_audio(audio), "path": path}
    return clips


def copy_from_others(job: Job, output: Output, shard: int, source: str, column: str) -> tuple[dict, dict[int, Any]]:
    """Notes and a column, by row, of the same shard at other thresholds, as far as it was made from the same source."""
    notes = {}
    values = {}
    pattern = f"{job.results.name}.[cw]er_*/{output.settings['config']}/{output.shard_path(shard).name}"
    for other in sorted(job.results.parent.glob(pattern)):
        found = read_notes(other)
        if found and found.get("source") == source:
            notes = found
            stored = pq.read_table(other, columns=[column])[column]
            values |= zip(notes["kept"], stored.to_pylist(), strict=True)
    return notes, values


def filter_shard(job: Job, shard: int) -> None:
    """Write the rows of a shard that are kept, and note what was measured for all of them."""
    output = job.outputs["filtered"]
    start = shard * output.settings["shard_size"]
    stop = start + output.settings["shard_size"]
    roles = [role for role in job.columns if role != "audio"]
    table = read_rows(job, start, stop, roles)
    labels = read_labels(job, start, stop)
    rows = compare_texts(job, table, labels, start)

    # Measures and audio of the same rows are taken from other thresholds, if there are any.
    texts = table.select(["text", "label"]).to_pydict()
    settings = [output.settings[name] for name in MEASURE_SETTINGS]
    source = digest(json.dumps([texts, settings]).encode())
    other_notes, clips = copy_from_others(job, output, shard, source, "audio")
    if other_notes:
        measures = pd.DataFrame(other_notes["rows"])[MEASURES]
    else:
        clips = read_clips(job, start, stop)
        measures = measure_rows(rows, clips)
    rows = add_scores(rows.join(measures))
    rows["reason"] = drop_reasons(rows, output.settings)

    kept = rows[rows.reason == KEPT]
    if not clips.keys() >= set(kept.index):
        clips = read_clips(job, start, stop)
    stored = table.take(pa.array(kept.index, pa.int64()))
    columns = {
        "audio": [clips[row] for row in kept.index],
        "text": stored["text"],
        "whisper_transcript": stored["label"],
        "labels": kept.labels.to_list(),
        "input_length": kept.samples.to_list(),
        "wer": kept.wer.to_list(),
        "cer": kept.cer.to_list(),
    }
    types = AUDIO_COLUMNS | SCORE_COLUMNS
    if pa.types.is_string(stored["label"].type):
        types["whisper_transcript"] = Value("string")
    if "speaker" in job.columns:
        types["speaker"] = Value("string")
        columns["speaker"] = stored["speaker"]
    schema = Features(types).arrow_schema
    notes = shard_notes(rows, source)
    write_parquet(output.shard_path(shard), [pa.table(columns, schema)], schema, notes)


def shard_notes(rows: pd.DataFrame, source: str) -> dict:
    """What a shard notes about all of its rows, for the report and for other thresholds."""
    unusable = rows[rows.reason.isin(UNUSABLE)]
    dropped = rows[rows.reason == OVER_THRESHOLD]
    worst = dropped.nlargest(5, "cer")[["name", "reference", "hypothesis", "wer", "cer"]]
    return {
        "source": source,
        "kept": rows.index[rows.reason == KEPT].to_list(),
        "rows": rows[["reason", *MEASURES]].to_dict("list"),
        "unusable": unusable[["reason", "name"]].to_dict("records"),
        "worst": worst.to_dict("records"),
    }


# ---- features --------------------------------------------------------------------------------------------------------


def vectorize_shard(job: Job, shard: int) -> None:
    """Write the features and labels of a shard of windows, or of filtered clips if there are no windows.

    Features are stored in float16 as (frames, mels), with as many frames as the clip fills.
    """
    output = job.outputs["vectorized"]
    source_path = job.outputs.get("packed", job.outputs["filtered"]).shard_path(shard)
    notes = read_notes(source_path)
    clips = pq.read_table(source_path, columns=["audio", "labels", "input_length"])
    source = None  # windows differ from threshold to threshold
    copied = {}
    if "packed" not in job.outputs:
        source = f"{notes['source']}, features"
        _, copied = copy_from_others(job, output, shard, source, "input_features")
    features = [copied.get(row) for row in notes["kept"]]

    lengths = clips["input_length"].to_pylist()
    missing = [number for number, stored in enumerate(features) if stored is None]
    missing.sort(key=lambda number: lengths[number])  # clips of similar length need little padding
    for first in range(0, len(missing), job.batch_size):
        batch = missing[first : first + job.batch_size]
        waveforms = []
        for number in batch:
            content = clips["audio"][number]["bytes"].as_py()
            waveforms.append(decode_clip(content).waveform)
        spectrograms = log_mel(waveforms, job.extractor).numpy()  # (clips, mels, frames)
        for number, waveform, spectrogram in zip(batch, waveforms, spectrograms, strict=True):
            filled = spectrogram[:, : filled_frames(len(waveform))]
            features[number] = filled.T.astype("<f2").tobytes()
    columns = {"input_features": features, "labels": clips["labels"], "input_length": clips["input_length"]}
    schema = Features(FEATURE_COLUMNS).arrow_schema
    features_notes = {"source": source, "kept": notes["kept"]}
    write_parquet(output.shard_path(shard), [pa.table(columns, schema)], schema, features_notes)


# ---- windows of several clips ----------------------------------------------------------------------------------------


@dataclass
class PackedClip:
    """A filtered clip that will be put into a window."""

    row: int  # of the labelled dataset
    samples: int
    tokens: int  # that it adds to the label of its window
    speaker: str | None  # None = unknown; such a clip has a window of its own
    text: str = ""
    body: Sequence[int] = ()  # text and timestamps of its label
    audio: bytes = b""
    # `draw_choices` sets these.
    order: float = 0.0  # clips are put into windows in this order
    place: float = 0.0  # the clips of a window are sorted by this
    alone: bool = False  # the clip has a window of its own
    gap: int = 0  # silence before the clip, steps

    @property
    def steps(self) -> int:
        """The length of the clip in steps of 0.02 s, those of the timestamps."""
        return math.ceil(self.samples / TIMESTAMP_SAMPLES)


@dataclass
class Window:
    """Whole clips that follow one another."""

    clips: list[PackedClip] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of the clips, steps
    steps: int = 0  # of clips and silences together
    tokens: int = 0  # of the clips together


def draw_choices(clip: PackedClip, settings: dict) -> None:
    """Make the random choices for a clip. They depend on the seed and the row alone."""
    longest_gap = settings["concatenate_gap_seconds"] / STEP_SECONDS
    draw = random.Random(f"{settings['seed']}, window, {clip.row}")
    clip.order = draw.random()
    clip.place = draw.random()
    clip.alone = draw.random() >= settings["concatenate_probability"] or clip.speaker is None
    clip.gap = draw.randint(0, int(longest_gap + 1e-6))


def fill_windows(clips: list[PackedClip], settings: dict, max_tokens: int) -> list[Window]:
    """Put every clip into one window.

    In random order, each clip goes into the fullest window of its speaker that has room for it, which fills windows
    well and still mixes long and short clips, unlike sorting by length. The order in a window is random too.
    """
    capacity = settings["concatenate_seconds"] / STEP_SECONDS + 1e-6  # steps
    for clip in clips:
        draw_choices(clip, settings)
    windows = []
    shared = defaultdict(list)  # windows that may take more clips, by speaker
    for clip in sorted(clips, key=lambda clip: clip.order):
        steps = clip.steps + clip.gap
        window = None
        if not clip.alone:
            window = fullest_window(shared[clip.speaker], capacity - steps, max_tokens - clip.tokens)
        if window is None:
            window = Window()
            windows.append(window)
            if not clip.alone:
                shared[clip.speaker].append(window)
        window.clips.append(clip)
        window.steps += steps
        window.tokens += clip.tokens
    for window in windows:
        arrange(window)
    return windows


def fullest_window(windows: list[Window], max_steps: float, max_tokens: int) -> Window | None:
    """The fullest of the windows with at most this many steps and tokens; None if no window has so few."""
    fullest = None
    for window in windows:
        has_room = window.steps <= max_steps and window.tokens <= max_tokens
        if has_room and (fullest is None or window.steps > fullest.steps):
            fullest = window
    return fullest


def arrange(window: Window) -> None:
    """Sort the clips of a window and set their starts. No silence comes before the first."""
    window.clips.sort(key=lambda clip: clip.place)
    end = -window.clips[0].gap
    for clip in window.clips:
        start = end + clip.gap
        window.starts.append(start)
        end = start + clip.steps


def place_body(body: TokenIds, start: int, samples: int, tokens: SpecialTokens) -> TokenIds:
    """The body of a clip's label, shifted to its window's clock; the clip begins at step `start`.

    No timestamp is later than the end of the clip. If the text has no timestamp before or after it, the start or the
    end of the clip is added. A label without text is left out: Whisper has timestamps in pairs, with text between.
    """
    zero = tokens.no_timestamps + 1
    text = [number for number, token in enumerate(body) if token < zero]
    if not text:
        return []
    first = text[0]
    last = text[-1]
    before = body[first - 1] if first else zero
    after = body[last + 1] if last + 1 < len(body) else zero + TIMESTAMPS
    end = start + round(samples / TIMESTAMP_SAMPLES)
    placed = []
    for token in [before, *body[first : last + 1], after]:
        if token >= zero:
            token = zero + min(token - zero + start, end)
        placed.append(token)
    return placed


def join_texts(texts: list[str], language: str) -> str:
    """The texts joined as the language is written, with or without spaces."""
    separator = "" if language in UNSPACED else " "
    return separator.join(text.strip() for text in texts if text.strip())


def join_ids(
    parts: list[TokenIds], language: str, limit: int, tokenizer: WhisperTokenizerFast, tokens: SpecialTokens
) -> TokenIds:
    """The ids of the joined texts, as the tokenizer splits the joined text.

    The ids of the parts are joined instead if the text has half a character or the spelling of a special token in it,
    or would have more than `limit` ids.
    """
    texts = tokenizer.batch_decode(parts, clean_up_tokenization_spaces=False)
    joined_text = join_texts(texts, language)
    leading_space = " " if texts[0].startswith(" ") else ""
    ids = tokenizer(leading_space + joined_text, add_special_tokens=False).input_ids
    is_text = "\ufffd" not in joined_text and max(ids, default=0) < tokens.end
    if len(parts) > 1 and is_text and len(ids) <= limit:
        return ids
    space = [] if language in UNSPACED else tokenizer(" ", add_special_tokens=False).input_ids
    joined_ids: TokenIds = []
    for part, text in zip(parts, texts, strict=True):
        if joined_ids and not text.startswith(" "):
            joined_ids += space
        joined_ids += part
    return joined_ids


def window_samples(window: Window) -> np.ndarray:
    """The audio of a window, with silence between the clips, as 16-bit samples, which most corpora have."""
    waveforms = [decode_clip(clip.audio).waveform for clip in window.clips]
    length = window.starts[-1] * TIMESTAMP_SAMPLES + len(waveforms[-1])
    samples = np.zeros(length, np.int16)
    for waveform, start in zip(waveforms, window.starts, strict=True):
        first = start * TIMESTAMP_SAMPLES
        last = first + len(waveform)
        samples[first:last] = np.clip(np.rint(waveform * 32768), -32768, 32767)
    return samples


def window_body(window: Window, tokens: SpecialTokens) -> TokenIds:
    """Text and timestamps of the label of a window, without prefix and end."""
    body = []
    for clip, start in zip(window.clips, window.starts, strict=True):
        body += place_body(clip.body, start, clip.samples, tokens)
    return body


def encode_flac(samples: np.ndarray) -> bytes:
    """The samples as the bytes of a FLAC file."""
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def read_filtered_clips(job: Job, shards: range) -> list[PackedClip]:
    """The clips of these filtered shards."""
    filtered = job.outputs["filtered"]
    clips = []
    for shard in shards:
        path = filtered.shard_path(shard)
        first = shard * filtered.settings["shard_size"]
        stored = pq.read_table(path).to_pylist()
        for row, values in zip(read_notes(path)["kept"], stored, strict=True):
            body = label_body(values["whisper_transcript"], job.tokenizer, job.tokens)
            clip = PackedClip(
                row=first + row,
                samples=values["input_length"],
                tokens=len(place_body(body, 0, 0, job.tokens)),
                speaker=values.get("speaker", "any"),
                text=values["text"],
                body=body,
                audio=values["audio"]["bytes"],
            )
            clips.append(clip)
    return clips


def pack_shard(job: Job, shard: int) -> None:
    """Write the windows of the filtered shards that are packed together in this shard."""
    filtered = job.outputs["filtered"]
    packed = job.outputs["packed"]
    settings = packed.settings
    tokens = job.tokens
    together = settings["shard_size"] // filtered.settings["shard_size"]
    first = shard * together
    shards = range(first, min(first + together, filtered.shards))
    max_tokens = settings["max_label_length"] - len(tokens.prefix) - 2  # <|notimestamps|>, <|endoftext|>
    rows = []
    windows = []
    previous: TokenIds = []
    for window in fill_windows(read_filtered_clips(job, shards), settings, max_tokens):
        clips = window.clips
        body = window_body(window, tokens)
        parts = [text_ids(clip.body, tokens) for clip in clips]
        text = join_ids(parts, settings["language"], max_tokens, job.tokenizer, tokens)
        label = build_label(body, text, previous, f"window {clips[0].row}", tokens, settings)
        previous = text or previous
        samples = window_samples(window)
        row = {
            "audio": {"bytes": encode_flac(samples), "path": None},
            "text": join_texts([clip.text for clip in clips], settings["language"]),
            "whisper_transcript": [*tokens.prefix, *body, tokens.end],
            "labels": label,
            "input_length": len(samples),
            "clips": [clip.row for clip in clips],
            "clip_starts": [round(start * STEP_SECONDS, 2) for start in window.starts],
        }
        rows.append(row)
        statistics = {
            "alone": clips[0].alone,
            "clips": len(clips),
            "samples": sum(clip.samples for clip in clips),
            "tokens": len(label),
        }
        windows.append(statistics)
    notes = {"kept": list(range(len(rows))), "windows": windows}
    schema = Features(AUDIO_COLUMNS | WINDOW_COLUMNS).arrow_schema
    table = pa.Table.from_pylist(rows, schema)
    write_parquet(packed.shard_path(shard), [table], schema, notes)


SHARD_WRITERS = {"filtered": filter_shard, "packed": pack_shard, "vectorized": vectorize_shard}


# ---- workers ---------------------------------------------------------------------------------------------------------

WORKER_JOB: Job | None = None  # set in each worker


def start_worker(jobs: multiprocessing.Queue) -> None:
    """Take the job from a queue: passed as an argument, a large job would delay the start of the next worker."""
    global WORKER_JOB
    WORKER_JOB = jobs.get()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


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
    progress = tqdm(total=len(shards), desc=kind, unit="shard", disable=not show_progress)
    if workers == 1:
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


# ---- report ----------------------------------------------------------------------------------------------------------


def percent(part: float, whole: float) -> float:
    """The share of the part in per cent; 0 if the whole is 0."""
    return 100 * part / whole if whole else 0.0


def summarize_filter(filtered: Output) -> dict:
    """Clips in and out by reason, by reference length and at other thresholds, and the worst labels."""
    tables = []
    worst = []
    unusable = defaultdict(list)
    for shard in range(filtered.shards):
        notes = read_notes(filtered.shard_path(shard))
        tables.append(pd.DataFrame(notes["rows"]))
        worst += notes["worst"]
        for row in notes["unusable"]:
            unusable[row["reason"]].append(row["name"])
    worst.sort(key=lambda row: row["cer"], reverse=True)
    rows = add_scores(pd.concat(tables, ignore_index=True))
    kept = rows[rows.reason == KEPT]
    judged = rows[rows.reason.isin([KEPT, OVER_THRESHOLD])]  # dropped or kept by the threshold alone
    scores = judged[filtered.settings["metric"]]
    bins = np.minimum(scores // 5, 20).astype(int)  # of 5 per cent; the last has no upper end
    total = rows[MEASURES].sum().to_dict()
    total_kept = kept[MEASURES].sum().to_dict()
    samples = [total["samples"], total_kept["samples"]]
    cer_of_kept = percent(total_kept["character_errors"], total_kept["characters"])
    return {
        "clips": [len(rows), len(kept)],
        "hours": [round(count / SAMPLING_RATE / 3600, 3) for count in samples],
        "characters": [total["characters"], total_kept["characters"]],
        "cer_of_kept": round(cer_of_kept, 3),
        "reasons": rows.reason.value_counts().to_dict(),
        "by_reference_length": count_by_length(rows),
        "other_thresholds": {"wer": count_under(judged.wer), "cer": count_under(judged.cer)},
        "score_histogram": np.bincount(bins, minlength=21).tolist(),
        "worst": worst[:10],
        "unusable": unusable,
    }


def count_under(scores: pd.Series) -> dict[str, int]:
    """How many clips other thresholds would keep."""
    counts = {}
    for threshold in OTHER_THRESHOLDS:
        counts[str(threshold)] = int((scores <= threshold).sum())
    return counts


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
    if settings["metric"] != "wer" or settings["language"] not in UNSPACED:
        return ""
    return (
        f"{settings['language']} is written without spaces, so WER <= {settings['threshold']} is nearly an exact match "
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
    rows = []
    for name, (total, kept) in counts.items():
        rows.append([name, total, kept, f"{percent(kept, total):.1f}"])
    return rows


def describe_filter(output: Output, report: dict) -> str:
    """What the card says of one configuration and split."""
    settings = output.settings
    metric = settings["metric"].upper()
    totals = keep_rates({name: report[name] for name in ("clips", "hours", "characters")})
    lengths = keep_rates(report["by_reference_length"])
    thresholds = []
    for name, counts in report["other_thresholds"].items():
        thresholds.append([name.upper(), *counts.values()])
    worst = []
    for row in report["worst"]:
        reference = row["reference"][:80]
        hypothesis = row["hypothesis"][:80]
        worst.append([row["name"], round(row["cer"]), reference, hypothesis])
    parts = [
        f"Clips with {metric} <= {settings['threshold']} % are kept; their labels have a CER of "
        f"{report['cer_of_kept']:.2f} %. {exact_match_notice(report, settings)}",
        markdown_table(["", "in", "out", "%"], totals),
        f"![Scores, and keep rate by reference length]({output.record.with_suffix('.png').name})",
        markdown_table(["reason", "clips"], report["reasons"].items()),
        markdown_table(["characters of the reference", "clips", "kept", "%"], lengths),
        markdown_table(["clips that another threshold (%) would keep", *OTHER_THRESHOLDS], thresholds),
        "The worst of the labels that were dropped, normalised:",
        markdown_table(["clip", "CER", "reference", "label"], worst),
    ]
    if "windows" in report:
        parts.insert(2, describe_windows(report["windows"], settings))
    return "\n\n".join(parts)


def draw_report(report: dict, settings: dict) -> bytes:
    """A PNG of the distribution of the scores and of the share of clips that is kept by reference length."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    scores, lengths = figure.subplots(1, 2)
    bins = range(0, 105, 5)
    scores.bar(bins, report["score_histogram"], width=5, align="edge")
    scores.axvline(settings["threshold"], color="black", linestyle="--", label="threshold")
    scores.legend()
    scores.set_xlabel(f"{settings['metric'].upper()}, % (last bar: 100 and more)")
    scores.set_ylabel("clips")
    classes = report["by_reference_length"]
    shares = [percent(kept, total) for total, kept in classes.values()]
    lengths.bar(list(classes), shares)
    lengths.set_xlabel("reference length, characters")
    lengths.set_ylabel("kept, %")
    lengths.set_ylim(0, 100)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


# ---- files, record, card, push ---------------------------------------------------------------------------------------


def find_parquet(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The name of the configuration and the parquet files of the split, downloaded if the work reads all of them."""
    try:
        builder, paths = find_files(args.dataset_name, args.dataset_config_name, args.split)
        if not all(path.endswith(".parquet") for path in paths):
            fail(f"{args.dataset_name} is not stored as parquet: push it with `push_to_hub` of `datasets`")
        if not (args.dry_run or args.skip_filtering):
            paths = datasets.DownloadManager().download(paths)
    except (ValueError, *HUB_ERRORS) as error:
        hub_fail(f"reading {args.dataset_name} ({args.dataset_config_name})", error)
    return builder.config.name, paths


def find_columns(args: argparse.Namespace, available: list[str]) -> dict[str, str]:
    """The columns of the labelled dataset by role. Fails if one is missing."""
    columns = {"audio": args.audio_column_name, "text": args.text_column_name, "label": "whisper_transcript"}
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


def load_job(args: argparse.Namespace) -> Job:
    """Load what the work depends on, but not the teacher's weights, and refuse arguments that contradict it."""
    model = load_config(args.model)
    tokenizer = load_tokenizer(args.model)
    extractor = load_pretrained(WhisperFeatureExtractor, args.model)
    language = language_code(args.language)
    vocabulary = tokenizer.get_vocab()
    prompt = prompt_arguments(args.model, vocabulary, language, args.task)
    if language == "en" and tokenizer.english_spelling_normalizer is None:
        logger.warning("%s has no normalizer.json: British and American spellings count as different", args.model)
    if (args.max_label_length or 0) > model.max_target_positions:
        fail(f"--max_label_length {args.max_label_length} is over the decoder's {model.max_target_positions} positions")
    config, paths = find_parquet(args)
    row_groups, dataset_digest = find_row_groups(paths)
    if not row_groups or not row_groups[-1].stop:
        fail(f"{args.dataset_name} ({config}, {args.split}) has no rows")
    settings = {
        "dataset": dataset_digest,
        "config": config,
        "language": language,
        "normaliser": NORMALISER,
        "tokenizer": digest(tokenizer.backend_tokenizer.to_str().encode()),
        "feature_extractor": digest(extractor.to_json_string().encode()),
        "max_positions": model.max_target_positions,
        "max_label_length": args.max_label_length or MAX_CLIP_LABEL,
    }
    for name in FILTER_ARGUMENTS:
        settings[name] = getattr(args, name)
    results = results_path(args)
    return Job(
        row_groups=row_groups,
        columns=find_columns(args, pq.ParquetFile(paths[0]).schema_arrow.names),
        tokenizer=tokenizer,
        tokens=find_special_tokens(vocabulary, prompt),
        extractor=extractor,
        batch_size=args.preprocessing_batch_size,
        outputs=name_outputs(args, results, settings, row_groups[-1].stop),
        results=results,
    )


def results_path(args: argparse.Namespace) -> Path:
    """Directory and name of the outputs, without the suffix of each."""
    dataset = Path(os.path.abspath(local_directory(args.dataset_name) or Path(args.dataset_name).name))
    return Path(os.path.abspath(args.output_dir or dataset.parent), dataset.name)


def name_outputs(args: argparse.Namespace, results: Path, settings: dict, rows: int) -> dict[str, Output]:
    """The datasets to write, by kind."""
    suffix = f".{args.metric}_{args.threshold}"
    dataset_id = None if local_directory(args.dataset_name) else args.dataset_name
    hub_id = args.hub_model_id or dataset_id
    filtered = Output(
        kind="filtered",
        directory=results.with_name(results.name + suffix),
        repository=hub_id + suffix if hub_id else None,
        settings=settings,
        shards=math.ceil(rows / args.shard_size),
    )
    outputs = {"filtered": filtered}
    if args.concatenate_audio:
        window_settings = dict(settings)
        for name in WINDOW_ARGUMENTS:
            window_settings[name] = getattr(args, name)
        window_label = min(MAX_WINDOW_LABEL, settings["max_positions"])
        window_settings["max_label_length"] = args.max_label_length or window_label
        window_settings["shard_size"] = args.shard_size * math.ceil(PACKED_ROWS / args.shard_size)
        outputs["packed"] = derive_output("packed", filtered, window_settings, rows)
    if not args.skip_logmel:
        source = outputs.get("packed", filtered)
        outputs["vectorized"] = derive_output("vectorized", source, source.settings, rows)
    return outputs


def derive_output(kind: str, source: Output, settings: dict, rows: int) -> Output:
    """An output that is made from another, whose name it takes with its kind as a suffix."""
    return Output(
        kind=kind,
        directory=source.directory.with_name(f"{source.directory.name}.{kind}"),
        repository=f"{source.repository}.{kind}" if source.repository else None,
        settings=settings,
        shards=math.ceil(rows / settings["shard_size"]),
    )


def fetch_filtered(args: argparse.Namespace, filtered: Output) -> None:
    """Download an incomplete filtered dataset if the labelled dataset is on the Hub. Fails if it stays incomplete."""
    if filtered.missing_shards() and filtered.repository and not local_directory(args.dataset_name):
        title = f"{filtered.settings['config']}/{filtered.settings['split']}"
        try:
            snapshot_download(
                filtered.repository,
                repo_type="dataset",
                local_dir=filtered.directory,
                allow_patterns=[filtered.record.name, f"{title}-*"],
            )
        except HUB_ERRORS as error:
            hub_fail(f"downloading {filtered.repository}", error)
    if filtered.missing_shards():
        fail(
            f"--skip_filtering, but {filtered.directory} does not have all shards of {filtered.record.stem}: "
            "filter first"
        )


def refuse_other_results(output: Output) -> None:
    """Fail if the directory has results of a run with other settings, or shards without a record."""
    record = read_json(output.record)
    if record is None and len(output.missing_shards()) == output.shards:
        return
    earlier = record["settings"] if record else {}
    refuse_other_settings(output.directory, earlier, output.settings)


def open_output(output: Output, overwrite: bool) -> None:
    """Create the directory and the record of an output; `overwrite` first deletes what earlier runs made."""
    directory = output.directory / output.settings["config"]
    if overwrite:
        output.record.unlink(missing_ok=True)
        for path in directory.glob(f"{output.settings['split']}-*.parquet"):
            path.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    if not output.record.exists():
        record = {"stage": "filtering", "status": "running", "settings": output.settings}
        write_json(output.record, record)


def lock_output(output: Output) -> contextlib.AbstractContextManager:
    """The lock of the configuration and split in an output's directory."""
    name = output.record.stem
    config, split = output.settings["config"], output.settings["split"]
    return hold_lock(
        output.directory / f".{name}.lock", f"{name} in {output.directory}", f"{config}/.{split}-*.partial"
    )


def prepare_outputs(args: argparse.Namespace, job: Job, is_main: bool, locks: contextlib.ExitStack) -> list[Output]:
    """Refuse results of other settings, create directories and repositories, and return the outputs to push."""
    made = list(job.outputs.values())
    if args.skip_filtering:
        made.remove(job.outputs["filtered"])
    if is_main and not args.dry_run:
        for output in made:
            locks.enter_context(lock_output(output))
    if is_main and args.skip_filtering and not args.dry_run:
        fetch_filtered(args, job.outputs["filtered"])
    for output in job.outputs.values():
        if output not in made or not args.overwrite_output_dir:
            refuse_other_results(output)
    pushed = [output for output in made if output.repository and args.push_to_hub is not False]
    if is_main:
        for output in pushed:
            output.repository = prepare_repository(output.repository, "dataset", args.hub_private_repo, args.dry_run)
    if is_main:
        for output in made:
            list_ours = functools.partial(list_split, config=output.settings["config"], split=output.settings["split"])
            check_cards(output.directory, output.repository if output in pushed else None, "dataset", list_ours)
    if is_main and not args.dry_run:
        for output in made:
            open_output(output, args.overwrite_output_dir)
    return pushed


def print_filtering_plan(
    args: argparse.Namespace, job: Job, pending: dict[str, list[int]], pushed: list[Output], workers: int
) -> None:
    """Print what a run would do and how long it would take, measured on the first rows in a temporary directory."""
    settings = job.outputs["filtered"].settings
    rows = job.row_groups[-1].stop
    sample_rows = min(rows, SAMPLE_ROWS)
    seconds = 0.0
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        sample_job = replace(job, outputs={}, results=Path(directory, "sample"))
        for kind, output in job.outputs.items():
            sample_settings = output.settings | {"shard_size": sample_rows}
            sample = replace(output, directory=Path(directory, kind), settings=sample_settings, shards=1)
            sample.shard_path(0).parent.mkdir(parents=True)
            sample_job.outputs[kind] = sample
            started = time.monotonic()
            SHARD_WRITERS[kind](sample_job, 0)
            missing = len(pending[kind])
            samples_left = missing / output.shards * rows / sample_rows
            seconds += (time.monotonic() - started) * samples_left
            megabytes = sample.shard_path(0).stat().st_size * samples_left / 1e6
            lines.append(f"done: {output.shards - missing} of {output.shards} shards of {output.directory}")
            lines.append(f"writes: {output.directory}, about {megabytes:.1f} MB")
        notes = read_notes(sample_job.outputs["filtered"].shard_path(0))
    hours = sum(notes["rows"]["samples"]) / SAMPLING_RATE / 3600 * rows / sample_rows
    print(f"input: {args.dataset_name} ({settings['config']}, {settings['split']}), {rows} clips, about {hours:.2f} h")
    remote = {group.path for group in job.row_groups if group.path.startswith("hf://")}
    if remote:
        print(f"download: {sum(HfFileSystem().size(path) for path in remote) / 1e6:.1f} MB")
    print(f"keeps: {percent(len(notes['kept']), sample_rows):.0f} % of the first {sample_rows} clips")
    print(*lines, sep="\n")
    for output in pushed:
        print(f"pushes: {output.repository}{' (private)' if args.hub_private_repo else ''}")
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
        if read_json(output.record)["status"] == "running":
            record = run | {"settings": output.settings, "report": report}
            write_json(output.record, record)
        figure = draw_report(report, output.settings)
        write_atomically(output.record.with_suffix(".png"), figure)
        write_card(output.directory, functools.partial(filtering_card, output))
    return report


def refuse_empty_results(report: dict, settings: dict) -> None:
    """Log what was kept, and fail if nothing was."""
    clips, kept = report["clips"]
    hours, kept_hours = report["hours"]
    logger.info("kept %d of %d clips, %.3f of %.3f h: %s", kept, clips, kept_hours, hours, report["reasons"])
    notice = exact_match_notice(report, settings)
    if notice:
        logger.warning(notice)
    unusable = sum(len(names) for names in report["unusable"].values())
    if unusable == clips:
        fail(f"none of the {clips} rows can be used: {report['reasons']}; nothing is pushed")
    if not kept:
        fail(
            f"{settings['metric'].upper()} <= {settings['threshold']} keeps none of {clips} clips; CER <= 10 would "
            f"keep {report['other_thresholds']['cer']['10']}. Nothing is pushed"
        )


def filtering_card(output: Output, card: RepoCard | None) -> str:
    """The dataset card with the section on this configuration and split, and all else that `card` has."""
    settings = output.settings
    card = card or RepoCard(f"---\n{{}}\n---\n# {output.directory.name}\n\n{ABOUT[output.kind]}\n")
    list_split(card, settings["config"], settings["split"])
    fill_metadata(card, language=[settings["language"]], task_categories=["automatic-speech-recognition"])
    title = f"{settings['config']}, {settings['split']}"
    description = describe_filter(output, read_json(output.record)["report"])
    set_section(card, title, f"## {title}\n\n{description}")
    return str(card)


def push_output(output: Output) -> None:
    """Upload shards, record, figure and card of this configuration and split. The card keeps its other sections."""
    title = f"{output.settings['config']}/{output.settings['split']}"
    patterns = [f"{title}-*", f"{output.record.stem}.*"]
    update_card = functools.partial(filtering_card, output)
    push_dataset(output.repository, output.directory, patterns, update_card, f"Filter {title}")


# ---- main ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Set up.
    started = time.monotonic()
    state = PartialState(cpu=True, timeout=timedelta(days=30))
    is_main = state.is_main_process
    set_up_process(is_main)
    torch.set_num_threads(1)  # as in the workers, so that features do not depend on their number
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this run, on this machine
    workers = max(1, args.preprocessing_num_workers // processes)

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
            pending = {kind: output.missing_shards() for kind, output in job.outputs.items()}
        if args.dry_run:
            if is_main:
                print_filtering_plan(args, job, pending, pushed, workers * state.num_processes)
            return 0

        # 5. Work. Shards are dealt out to the processes in turn; those that are packed together go to the same one.
        rows_together = max(output.settings["shard_size"] for output in job.outputs.values())
        for kind, output in job.outputs.items():
            together = rows_together // output.settings["shard_size"]
            mine = [shard for shard in pending[kind] if shard // together % state.num_processes == state.process_index]
            write_shards(job, kind, mine, workers, is_main)
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
            "arguments": vars(args),
            "seconds": round(seconds, 1),
            "clips_per_second": round(share_done * job.row_groups[-1].stop / seconds, 1),
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
