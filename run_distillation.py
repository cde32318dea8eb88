#!/usr/bin/env python
"""Distil a Whisper teacher into a smaller student on pseudo-labelled speech, or fine-tune a Whisper on transcripts.

In: a student from create_student_model.py, its teacher, and one or more datasets joined by `+`: `.vectorized` ones with
log-mels, labelled audio, whose log-mels are computed while it is loaded, or audio with transcripts, from which labels
are made. With `--kl_weight 0` the student is any Whisper, and there is no teacher.

Out, in --output_dir: the trained model with every file that transformers, faster-whisper and whisper.cpp look for, its
card, `metrics.jsonl`, `training_curves.png`, the record `distillation.json`, and `checkpoint-<step>-epoch-<epoch>/`.
With held-out rows also `held_out_predictions.jsonl`: what the student says of the first ones at every evaluation.

One process:

    python run_distillation.py --model_name_or_path my-init --teacher_model_name_or_path openai/whisper-large-v3 \\
        --train_dataset_name my-org/my-data.wer_10.0.vectorized --language ja --freeze_encoder --do_train \\
        --num_train_epochs 8 --output_dir my-model

Several processes, each training on its share of every batch; on several machines, --output_dir must be shared:

    accelerate launch --multi_gpu run_distillation.py ...

The loss is `ce_weight · CE + kl_weight · T² · KL(teacher ‖ student)` (https://arxiv.org/abs/2311.00430), its mean over
the label tokens of the global batch: it does not depend on padding, accumulation or the number of processes. The rows
of a batch are a function of the seed and of the step. So to resume, after a kill at any moment, run the same command
again: it goes on from the newest complete checkpoint and ends with the weights of a run that was never interrupted.
On some GPUs two uninterrupted runs differ in their last bits; a resumed run differs from them no more than that.
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
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO
from urllib.parse import urlsplit

import datasets
import fsspec
import jiwer
import librosa
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import safetensors.torch
import soundfile
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import (
    InitProcessGroupKwargs,
    LoggerType,
    broadcast_object_list,
    gather_object,
    send_to_device,
)
from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, DataFilesList, resolve_pattern
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.parquet.parquet import Parquet
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfApi, RepoCard, constants, set_client_factory, snapshot_download
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
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW, Optimizer
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.modeling_whisper import WhisperAttention, eager_attention_forward
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS, TO_LANGUAGE_CODE
from transformers.utils import cached_file, find_adapter_config_file, is_flash_attn_2_available

LOSS_CHUNK = 256  # tokens whose logits exist at the same time
LOSS_CHUNK_GPU = 1024  # the same on a GPU: each chunk reads and writes the whole gradient of the head
GPU_WORKERS = 4  # loading processes per GPU; one reads 650 FLAC or 1,520 vectorised clips a second
# Modules that take long to import. The fork server imports them once for all workers.
PRELOADED = ["accelerate", "datasets", "librosa", "jiwer", "matplotlib.figure"]
PRELOADED += [f"transformers.models.whisper.{name}_whisper" for name in ("modeling", "processing", "tokenization")]
CACHE_BLOCK = 32  # rows encoded together for the cache; fixed, because the last bits of a row depend on the batch size
SAMPLE_STEPS = 3  # that a dry run times
SAMPLE_ROWS = 16  # rows read from the start of a dataset as a sample of its inputs
MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # what accelerate calls them
LED_BY_LOSS = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the held-out loss
RECORD = "distillation.json"
MANIFEST = "manifest.json"  # of a checkpoint: training state, settings and file hashes; written last
SCHEDULER = "scheduler.json"  # of a checkpoint: the state of the learning-rate schedule
OLD_SCHEDULER = "custom_checkpoint_0.pkl"  # where checkpoints of earlier versions have it
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)-epoch-(\d+)")
SCRIPTS = ["create_student_model.py", "run_distillation.py"]  # published with the model
METRICS = "metrics.jsonl"
PREDICTIONS = "held_out_predictions.jsonl"  # stays on this machine: it has texts of the held-out rows
LOGGED_PREDICTIONS = 8  # held-out rows whose predictions are written down at every evaluation
TRAINING_FILES = ["model.safetensors", METRICS, "training_curves.png", RECORD]
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
]
# What the trained weights depend on, beside the data and the models. A run is resumed only with the same settings.
SETTINGS = [
    "train_dataset_samples",
    "max_label_length",
    "language",
    "task",
    "freeze_encoder",
    "dtype",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "ce_weight",
    "kl_weight",
    "kl_shares",
    "temperature",
    "seed",
]


# ---- command line ----------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[float]:
    """Value of a flag that takes numbers joined by `+`."""
    return [float(part) for part in text.split("+")]


def tasks(text: str) -> str:
    """Value of --task: tasks joined by `+`."""
    if not set(text.split("+")) <= set(TASK_IDS):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(TASK_IDS)}, or several joined by +")
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    count = {"type": int, "metavar": "N"}
    add = parser.add_argument_group("models").add_argument
    add("--model_name_or_path", required=True, help="student, Hub id or local directory")
    add("--teacher_model_name_or_path", help="teacher, Hub id or local directory; not needed with --kl_weight 0")
    add(
        "--freeze_encoder", **switch, help="do not train the encoder; if it equals the teacher's, it runs once for both"
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="compute precision; what is trained stays float32; unset = bfloat16 where the device computes it "
        "natively, else float32",
    )
    add(
        "--attn_type",
        choices=["eager", "sdpa", "flash_attn"],
        default="sdpa",
        help="attention; flash_attn needs a GPU, half precision, and the package flash-attn or kernels",
    )
    add("--gradient_checkpointing", **switch, help="recompute activations instead of storing them")
    add("--torch_compile", **switch, help="compile the models, for GPUs; not measured on one yet")
    add = parser.add_argument_group("data").add_argument
    add("--train_dataset_name", help="training datasets, Hub ids or local directories, joined by +")
    add("--train_dataset_config_name", help="their configurations joined by +, or one for all; unset = the default one")
    add(
        "--train_split_name",
        default="train",
        help="their splits joined by +, or one for all; of one dataset, any such as train[:1000]+test",
    )
    add(
        "--train_dataset_samples",
        type=numbers,
        help="their sampling weights joined by +; unset = every row once an epoch",
    )
    add("--audio_column_name", default="audio", help="column of audio, for datasets without input_features")
    add(
        "--text_column_name",
        help="column of texts: of the held-out references, and of what labels are made from where a training dataset "
        "has none; unset = text or transcription",
    )
    add(
        "--train_on_silence",
        **switch,
        help="take rows without a text for silence or noise, on which the student learns to say nothing, instead of "
        "leaving them out; only where labels are made from texts",
    )
    add(
        "--language",
        help="language code or name of the labels that are made from texts and of what is held out; joined by +, one "
        "for each training dataset and the first for what is held out; unset = the models get no language token",
    )
    add("--task", type=tasks, default="transcribe", help="transcribe or translate, likewise")
    add("--max_label_length", **count, default=448, help="maximum label length in tokens; longer ones are left out")
    add("--preprocessing_num_workers", **count, default=1, help="processes that load the datasets")
    add(
        "--dataloader_num_workers",
        **count,
        help=f"processes that load batches, per training process; 0 = that process itself; unset = {GPU_WORKERS} "
        "with a GPU, if there are so many cores, and 0 without",
    )
    add(
        "--cache_encoder_outputs",
        metavar="DIR",
        help="cache for the outputs of what is frozen, about 4 MB per clip of large-v3: for CPUs, slow GPUs and small "
        "data, because a fast GPU computes them sooner than a disk reads them; unset = computed every epoch",
    )
    add = parser.add_argument_group("training").add_argument
    add("--do_train", **switch, help="train; without it, only an evaluation on the held-out rows")
    add("--num_train_epochs", type=float, default=3.0, help="epochs")
    add("--max_steps", **count, default=-1, help="optimiser steps in place of epochs; -1 = epochs")
    add("--per_device_train_batch_size", **count, default=16, help="clips per process per micro-batch")
    add("--gradient_accumulation_steps", **count, default=1, help="micro-batches per optimiser step")
    add("--learning_rate", type=float, default=1e-4, help="peak learning rate")
    schedules = [schedule.value for schedule in transformers.SchedulerType]
    add("--lr_scheduler_type", choices=schedules, default="constant_with_warmup", help="learning-rate schedule")
    add("--lr_scheduler_kwargs", type=json.loads, default="{}", metavar="JSON", help="arguments of the schedule")
    add("--warmup_steps", **count, default=50, help="optimiser steps of warm-up")
    add("--weight_decay", type=float, default=0.0, help="AdamW's weight decay, of matrices only")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's beta 1")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's beta 2")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm; 0 = no clipping")
    add("--ce_weight", type=float, default=0.8, help="weight of the cross-entropy with the labels")
    add(
        "--kl_weight",
        type=numbers,
        default="1.0",
        help="weight of the KL divergence from the teacher, one for all training datasets or one for each joined by +; "
        "0 = no teacher, which is fine-tuning",
    )
    add("--temperature", type=float, default=2.0, help="temperature of the KL divergence")
    add("--seed", type=int, default=42, help="seed of the order of rows and of dropout")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_dataset_name", help="held-out dataset, Hub id or local directory; unset = no evaluation")
    add("--eval_dataset_config_name", help="its configuration; unset = the default one")
    add("--eval_split_name", default="test", help="its split")
    add("--eval_steps", **count, default=1000, help="optimiser steps between evaluations")
    add("--eval_max_samples", **count, default=256, help="held-out rows, evenly spaced; 0 = all")
    add(
        "--metric_for_best_model",
        choices=["loss", "cer", "wer"],
        default="cer",
        help="metric that selects the best checkpoint",
    )
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="directory of the results; may be a clone of the model's repository")
    add("--overwrite_output_dir", **switch, help="delete output that was made with different settings")
    add(
        "--resume_from_checkpoint",
        nargs="?",
        const="auto",
        default="auto",
        metavar="CHOICE",
        help="auto = the newest complete checkpoint, False = none, or the path of one",
    )
    add("--save_steps", **count, default=500, help="optimiser steps between checkpoints")
    add("--save_total_limit", **count, help="newest checkpoints to keep beside the best; unset = all")
    add("--logging_steps", **count, default=50, help="optimiser steps between entries of metrics.jsonl")
    add("--report_to", choices=TRACKERS, default="wandb", help="tracker beside metrics.jsonl")
    add("--wandb_project", default="distillation", help="project of the tracker")
    add("--wandb_name", help="name of the run in wandb; unset = wandb's choice")
    add("--push_to_hub", **switch, help="push the result, at every save in the background and at the end")
    add(
        "--hub_model_id",
        help="repository to push to; unset = the one --output_dir is a clone of, else the org/name its path ends with",
    )
    private = switch | {"default": True}
    add("--hub_private_repo", **private, help="make a new repository private; an existing one stays as it is")
    add(
        "--dry_run",
        **switch,
        help="print what a run would read, write and push, what is done, and how long the rest takes by a few steps "
        "with random weights; change nothing",
    )
    args = parser.parse_args(argv)
    args.output_dir = Path(args.output_dir).expanduser()
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "logging_steps", "eval_steps")
    for name in sizes:
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.language:
        args.language = "+".join(map(language_code, args.language.split("+")))
    weights = args.kl_weight
    args.kl_weight = max(weights)
    args.kl_shares = None  # of each dataset, how much of the largest weight counts; None = all of it everywhere
    if len(set(weights)) > 1:
        args.kl_shares = [weight / args.kl_weight for weight in weights]
    if not args.kl_weight:
        args.teacher_model_name_or_path = None
    elif not args.teacher_model_name_or_path:
        parser.error("--teacher_model_name_or_path is needed, unless --kl_weight is 0")
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


# ---- common: saving models -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def saving_models() -> Iterator[None]:
    """Raise an OSError where torch (RuntimeError) or tokenizers (Exception) cannot write, as on a full disk."""
    try:
        yield
    except Exception as error:
        is_full_disk = re.search(r"PytorchStreamWriter|inline_container|iostream|os error", str(error))
        if isinstance(error, OSError) or not is_full_disk:
            raise
        raise OSError(errno.EIO, f"writing failed, perhaps on a full disk: {first_line(error)}") from None


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


# ---- loss ------------------------------------------------------------------------------------------------------------


def chunk_loss(
    logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    kl_shares: Tensor | None,
    temperature: float,
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and T² · KL(teacher ‖ student), each summed over tokens; and the gradient of their weighted sum.

    The gradient of the first by the logits is softmax(logits) - onehot(targets), that of the second is
    T · (softmax(logits / T) - softmax(teacher_logits / T)). `kl_shares` weigh the KL of each token, (tokens).

    A further term needs its sum and its gradient here; its weight in `parse_args`, SETTINGS, `TrainedPart` and
    `DistillationLoss.forward`; and an entry wherever sums of cross-entropy and KL are kept: in the last one,
    `TrainingState.window`, `optimiser_step`, `mean_figures`, `evaluate_batch` and `evaluate`.
    """
    ce_weight, kl_weight = weights
    labels = targets[:, None]
    log_probs = logits.log_softmax(-1)  # (tokens, vocabulary)
    ce_loss = -log_probs.gather(1, labels).sum()
    # Gradients are computed in place, because each of these tensors is as large as the logits.
    if teacher_logits is None:
        kl_loss = torch.zeros_like(ce_loss)
        gradient = torch.zeros_like(logits)
    else:
        soft_log_probs = (logits / temperature).log_softmax(-1)
        teacher_log_probs = (teacher_logits / temperature).log_softmax(-1)
        teacher_probs = teacher_log_probs.exp()
        divergence = teacher_probs * (teacher_log_probs - soft_log_probs)
        gradient = soft_log_probs.exp_().sub_(teacher_probs).mul_(kl_weight * temperature)
        if kl_shares is not None:
            divergence.mul_(kl_shares[:, None])
            gradient.mul_(kl_shares[:, None])
        kl_loss = temperature**2 * divergence.sum()
    gradient.add_(log_probs.exp_(), alpha=ce_weight)
    gradient.scatter_(1, labels, -ce_weight, reduce="add")
    return torch.stack([ce_loss, kl_loss]), gradient


class DistillationLoss(torch.autograd.Function):
    """ce_weight · CE + kl_weight · T² · KL summed over tokens, and the two sums without their weights.

    Logits exist for a chunk of tokens at a time, and a chunk's gradient is computed together with its loss. So memory
    does not grow with the batch, and no logit is computed twice. Stock functions under `torch.utils.checkpoint` make a
    step on packed windows with cached encoder outputs 1.3 to 1.6 times as long, and autograd within each chunk 1.1 to
    1.2 times.

    Args:
        hidden, teacher_hidden: last hidden states, (tokens, width); the teacher's are None where there is no teacher.
        head, teacher_head: output projections, (vocabulary, width).
        targets: token ids, (tokens).
        weights: ce_weight and kl_weight.
        kl_shares: of each token, how much of kl_weight counts, (tokens); None = all of it.
    """

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, temperature, weights, kl_shares=None):
        hidden_gradient = torch.zeros_like(hidden)
        head_gradient = torch.zeros_like(head)
        # An empty product tells in which dtype autocast multiplies. Each tensor is cast once, not for every chunk.
        dtype = F.linear(hidden[:0], head[:1]).dtype
        hidden = hidden.to(dtype)
        head = head.to(dtype)
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden.to(dtype)
            teacher_head = teacher_head.to(dtype)
        loss_dtype = torch.promote_types(dtype, torch.float32)
        sums = torch.zeros(2, dtype=loss_dtype, device=hidden.device)
        size = LOSS_CHUNK_GPU if hidden.is_cuda else LOSS_CHUNK
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            logits = F.linear(hidden[chunk], head).to(loss_dtype)
            teacher_logits = None
            if teacher_hidden is not None:
                teacher_logits = F.linear(teacher_hidden[chunk], teacher_head).to(loss_dtype)
            shares = None if kl_shares is None else kl_shares[chunk]
            losses, gradient = chunk_loss(logits, teacher_logits, targets[chunk], shares, temperature, weights)
            sums += losses
            if ctx.needs_input_grad[0]:
                gradient = gradient.to(dtype)
                hidden_gradient[chunk] = gradient @ head
                head_gradient += gradient.T @ hidden[chunk]
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.mark_non_differentiable(sums)
        ce_weight, kl_weight = weights
        return ce_weight * sums[0] + kl_weight * sums[1], sums

    @staticmethod
    def backward(ctx, loss_gradient, _):
        hidden_gradient, head_gradient = ctx.saved_tensors
        others = [None] * 6  # of the inputs that are not trained
        return hidden_gradient * loss_gradient, head_gradient.mul_(loss_gradient), *others


# ---- rows ------------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A split of a dataset."""

    reference: str
    config: str | None
    split: str
    language: str | None  # of labels that are made from texts
    task: str
    kl_share: float | None = None  # how much of --kl_weight counts; None = all of it
    is_held_out: bool = False


def training_sources(args: argparse.Namespace) -> list[Source]:
    """The training datasets; a single configuration, split, language or task applies to all."""
    references = args.train_dataset_name.split("+")
    columns = [references]
    for flag in ("train_dataset_config_name", "train_split_name", "language", "task"):
        value = getattr(args, flag) or ""
        values = [part or None for part in value.split("+")]
        if len(references) == 1 and flag == "train_split_name":
            values = [value]  # an expression such as train+validation[:10%]
        if len(values) == 1:
            values *= len(references)
        if len(values) != len(references):
            fail(f"--{flag} {value} names {len(values)} for {len(references)} datasets")
        columns.append(values)
    weights = args.train_dataset_samples
    if weights and (len(weights) != len(references) or min(weights) <= 0):
        fail(f"--train_dataset_samples {weights} must be one positive number for each dataset")
    if args.kl_shares and len(args.kl_shares) != len(references):
        fail(f"--kl_weight names {len(args.kl_shares)} for {len(references)} datasets")
    columns.append(args.kl_shares or [None] * len(references))
    return [Source(*values) for values in zip(*columns, strict=True)]


def held_out_source(args: argparse.Namespace) -> Source:
    """The held-out dataset, in the first of the given languages and tasks."""
    language = (args.language or "").split("+")[0] or None
    task = args.task.split("+")[0]
    return Source(
        args.eval_dataset_name,
        args.eval_dataset_config_name,
        args.eval_split_name,
        language,
        task,
        is_held_out=True,
    )


def open_split(source: Source, args: argparse.Namespace) -> tuple[datasets.Dataset, Place, pa.Table]:
    """All rows of a split, where their files lie, and its first rows as a sample of the inputs.

    A dry run converts nothing: from parquet files it reads every column except the large inputs.
    """
    if args.dry_run and is_repository(source.reference):
        try:
            builder, files_by_split = find_files(source.reference, source.config, source.split)
        except (ValueError, *HUB_ERRORS) as error:
            hub_fail(f"reading {source.reference} ({source.config})", error)
        if isinstance(builder, Parquet) and list(files_by_split) == [source.split]:
            files = files_by_split[source.split]
            filesystem, _ = fsspec.url_to_fs(files[0])
            parquet = pyarrow.dataset.dataset(files, filesystem=filesystem)
            large = ("input_features", args.audio_column_name)
            table = parquet.to_table(columns=[name for name in parquet.schema.names if name not in large])
            place = Place(os.path.realpath(builder.base_path), is_confined=True)
            return datasets.Dataset(table), place, parquet.head(SAMPLE_ROWS)
    dataset, place = open_dataset(
        source.reference,
        source.config,
        source.split,
        args.audio_column_name,
        num_proc=args.preprocessing_num_workers,
    )
    return dataset, place, dataset.with_format("arrow")[:SAMPLE_ROWS]


def first_of(candidates: Iterable[str | None], columns: Iterable[str]) -> str | None:
    """The first candidate that is a column."""
    return next((name for name in candidates if name in columns), None)


def scan_labels(column: pa.ChunkedArray, start_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The length of each label, and the position of its first `start_id` (its length if there is none)."""
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    lengths = lengths.to_numpy().astype(np.int64)
    is_start = pc.equal(pc.list_flatten(column), start_id)  # in all labels joined
    hits = pc.indices_nonzero(is_start).to_numpy().astype(np.int64)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    rows = np.searchsorted(ends, hits, side="right")
    starts = lengths.copy()
    np.minimum.at(starts, rows, hits - begins[rows])
    return lengths, starts


def read_log_mel(value: bytes | dict, place: Place, extractor: WhisperFeatureExtractor) -> Tensor:
    """Log-mel (mels, 3000) in float16, stored or computed: rounded alike, so that both train the same model.

    Args:
        value: stored float16 (frames, mels), or an undecoded value of an audio column.

    Raises:
        ValueError, TypeError: it cannot be used; the message says why.
    """
    if isinstance(value, bytes):
        frames = np.frombuffer(value, "<f2").reshape(-1, extractor.feature_size)
        return pad_window(torch.tensor(frames.T))
    clip = load_clip(value, place)
    if clip.problem:
        raise ValueError(clip.problem)
    if clip.seconds > WINDOW_SECONDS:
        raise ValueError(f"{clip.seconds:.1f} s are more than {WINDOW_SECONDS}")
    return pad_window(log_mel([clip.waveform], extractor)[0]).half()


class Rows(Dataset):
    """The usable rows of a split, numbered from 0; of held-out ones a sample, evenly spaced."""

    def __init__(self, source: Source, models: "Models", args: argparse.Namespace):
        self.name = source.reference
        self.source = source
        self.extractor = models.extractor
        self.cache: Path | None = None  # directory of encoder outputs
        self.dataset, self.place, first_rows = open_split(source, args)
        columns = first_rows.column_names
        self.input_column = first_of(("input_features", args.audio_column_name), columns)
        self.text_column = first_of((args.text_column_name, "text", "transcription"), columns)
        label_column = first_of(("labels", "whisper_transcript"), columns)
        if source.is_held_out or not label_column:
            require_columns(self.name, self.dataset, {"text_column_name": args.text_column_name})
            self.dataset = convert_texts(self.name, self.dataset, self.text_column)
        if not self.input_column or not (label_column or self.text_column):
            needs = f"labels or a column of texts (--text_column_name), and input_features or {args.audio_column_name}"
            fail(f"{self.name} needs {needs}: it has {', '.join(columns)}")
        self.first_inputs = first_rows[self.input_column].to_pylist()
        if label_column:
            labels = self.dataset.select_columns(label_column)  # without the inputs, which are large
        else:
            label_column = "labels"
            labels = datasets.Dataset.from_dict({label_column: self.make_labels(models.tokenizer, args)})
        self.labels = labels[label_column]
        self.select_rows(labels.data.column(0), models.tokenizer, args)

    def make_labels(self, tokenizer: WhisperTokenizerFast, args: argparse.Namespace) -> list[list[int]]:
        """Labels from the texts, in the teacher's form without timestamps; an empty one for rows to leave out."""
        logger.info("%s: labels are made from its column %s", self.name, self.text_column)
        vocabulary = tokenizer.get_vocab()
        prompt = prompt_arguments(args.model_name_or_path, vocabulary, self.source.language, self.source.task)
        prefix = ["<|startoftranscript|>"]
        if "language" in prompt:
            prefix += [f"<|{prompt['language']}|>", f"<|{prompt['task']}|>"]
        prefix_ids = tokenizer.convert_tokens_to_ids([*prefix, "<|notimestamps|>"])
        # A blank text of a held-out row means silence; a training row may just lack its transcript.
        may_be_empty = self.source.is_held_out or args.train_on_silence
        labels = []
        for text in self.dataset[self.text_column]:
            label = []
            if text is None and args.train_on_silence:
                text = ""
            if text is not None and (may_be_empty or text.strip()):
                line = " ".join(text.splitlines())  # Whisper says no line breaks
                text_ids = tokenizer.encode(line, add_special_tokens=False)
                label = [*prefix_ids, *text_ids, tokenizer.eos_token_id]
            labels.append(label)
        return labels

    def select_rows(
        self,
        labels: pa.ChunkedArray,
        tokenizer: WhisperTokenizerFast,
        args: argparse.Namespace,
    ) -> None:
        """Find the usable rows, and which tokens of their labels count in the loss."""
        if pa.types.is_string(labels.type):
            fail(f"{self.name}: labels are {labels.type}, not token ids: label the data without --decode_token_ids")
        lengths, starts = scan_labels(labels, tokenizer.convert_tokens_to_ids("<|startoftranscript|>"))
        samples = np.zeros(len(lengths), np.int64)  # 0 = unknown
        if "input_length" in self.dataset.column_names:
            stored = self.dataset.data.column("input_length")
            samples = pc.fill_null(stored, 0).to_numpy()
        longest = f"the longest of {lengths.max(initial=0)} (--max_label_length)"
        reasons = {
            "no label": starts >= lengths - 1,
            f"a label of more than {args.max_label_length} tokens, {longest}": lengths > args.max_label_length,
            "more than 30 s of audio": samples > WINDOW_SECONDS * SAMPLING_RATE,
        }
        usable = self.leave_out(reasons)
        self.require_mels(int(samples[0]))
        self.digest = self.data_digest(labels, lengths, usable)
        if self.source.is_held_out and 0 < args.eval_max_samples < len(usable):
            sample = np.linspace(0, len(usable) - 1, args.eval_max_samples)
            usable = usable[sample.astype(int)]
        self.usable = usable  # their numbers in the dataset
        self.require_audio()
        self.starts = starts[usable]  # position of <|startoftranscript|> in each label
        self.token_counts = lengths[usable] - 1 - self.starts  # tokens after it, which count in the loss
        self.hours = samples[usable].sum() / SAMPLING_RATE / 3600

    def leave_out(self, reasons: dict[str, np.ndarray]) -> np.ndarray:
        """The numbers of the usable rows. Counts the others by reason, and fails if none is usable."""
        self.left_out = {}
        for reason, rows in reasons.items():
            if rows.any():
                self.left_out[reason] = int(rows.sum())
        counts = ", ".join(f"{count} with {reason}" for reason, count in self.left_out.items())
        is_left_out = np.any([*reasons.values()], axis=0)
        if is_left_out.all():
            split = f"{self.name} ({self.source.split})"
            fail(f"none of the {len(is_left_out)} rows of {split} can be used: {counts or 'there are no rows'}")
        if counts:
            left_out = np.flatnonzero(is_left_out)
            first = ", ".join(map(str, left_out[:10]))
            logger.warning("%s: %d rows left out (%s), the first: %s", self.name, len(left_out), counts, first)
        return np.flatnonzero(~is_left_out)

    def require_audio(self) -> None:
        """Fail where the audio of no row can be read: nothing would be trained."""
        if self.input_column not in self.dataset.column_names:  # a dry run has read the first inputs only
            return
        problems = []
        for row in self.usable:
            value = self.dataset[int(row)][self.input_column]
            try:
                read_log_mel(value, self.place, self.extractor)
                return
            except (ValueError, TypeError) as error:
                problems.append(str(error))
        split = f"{self.name} ({self.source.split})"
        fail(f"none of the {len(problems)} rows of {split} can be used: {problems[0]}")

    def require_mels(self, samples: int) -> None:
        """Fail where stored log-mels have another number of bins than the student: it would train on noise.

        `samples` is the length of the first row, where it is known.
        """
        if self.input_column == "input_features" and samples:
            stored = len(self.first_inputs[0]) / 2 / filled_frames(samples)
            needed = self.extractor.feature_size
            if stored != needed:
                problem = f"has log-mels of {stored:g} bins, the student needs {needed}"
                fail(f"{self.name} {problem}: filter it for this model")

    def data_digest(self, labels: pa.ChunkedArray, lengths: np.ndarray, usable: np.ndarray) -> str:
        """Fingerprint of the training data: a hash of all labels and of the first inputs."""
        digest = hashlib.sha256(lengths.tobytes() + usable.tobytes())
        for chunk in labels.chunks:
            tokens = pc.list_flatten(chunk).to_numpy(zero_copy_only=False)
            digest.update(tokens.astype(np.int32).tobytes())
        for value in self.first_inputs:
            if isinstance(value, dict):  # audio
                value = value["bytes"] or repr(sample_file(value["path"], self.place)).encode()
            digest.update(value or b"")
        return digest.hexdigest()[:16]

    def reference_text(self, index: int, tokenizer: WhisperTokenizerFast) -> str:
        """The reference text of a row, from the text column or else decoded from its label."""
        row = int(self.usable[index])
        if self.text_column:
            return self.dataset[row][self.text_column] or ""
        label = self.labels[row][self.starts[index] :]
        return tokenizer.decode(label, skip_special_tokens=True)

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, index: int) -> dict:
        row = int(self.usable[index])
        tokens = torch.tensor(self.labels[row])
        example = {"tokens": tokens, "start": int(self.starts[index])}
        if self.source.kl_share is not None:
            example["kl_share"] = self.source.kl_share
        if self.cache:
            example |= read_outputs(self.cache, index)
            # A row whose audio could not be read has no hidden states of the teacher, and so no targets.
            example["start"] = len(tokens) - 1 - len(example["teacher_hidden"])
            return example
        value = self.dataset[row][self.input_column]
        try:
            example["features"] = read_log_mel(value, self.place, self.extractor)
        except (ValueError, TypeError) as error:
            logger.warning("%s, row %d: unreadable audio, left out of the loss: %s", self.name, row, error)
            shape = (self.extractor.feature_size, WINDOW_FRAMES)
            example["features"] = torch.zeros(shape, dtype=torch.float16)
            example["start"] = len(tokens) - 1  # so that none of them is a target
        return example


# ---- batches ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # the loader runs ahead into the next epoch
def epoch_order(
    sizes: tuple[int, ...],
    weights: tuple[float, ...] | None,
    seed: int,
    epoch: int,
) -> np.ndarray:
    """The rows of an epoch in the order of training; datasets of these sizes are counted one after the other.

    Without weights every row comes once. With weights an epoch has as many rows, of each dataset its weight's share:
    only some of its rows where the share is smaller than the dataset, all of them again and again where it is larger.
    """
    rng = np.random.default_rng([seed, epoch])
    if weights is None:
        return rng.permutation(sum(sizes))
    shares = np.cumsum([0.0, *weights]) / sum(weights)
    limits = np.rint(shares * sum(sizes)).astype(int)
    counts = np.diff(limits)
    drawn = []
    first_row = 0
    for size, count in zip(sizes, counts, strict=True):
        for missing in range(count, 0, -size):  # each time, all rows of the dataset or as many as are missing
            rows = rng.permutation(size)
            drawn.append(first_row + rows[:missing])
        first_row += size
    return rng.permutation(np.concatenate(drawn))


@dataclass
class Plan:
    """Which rows are in which batch. It depends on the seed and the number of the step alone."""

    sizes: tuple[int, ...]  # of the datasets
    weights: tuple[float, ...] | None
    seed: int
    micro_batch_size: int
    processes: int
    accumulation: int

    @property
    def batch_size(self) -> int:
        """Rows of an optimiser step, in all processes together."""
        return self.micro_batch_size * self.processes * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(sum(self.sizes) / self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """The rows of the global batch of a step, counted from 0. An epoch's last batch may be short."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.sizes, self.weights, self.seed, epoch)
        return order[number * self.batch_size :][: self.batch_size]

    def offsets(self, process: int) -> range:
        """Where the micro-batches of a process begin in a global batch."""
        return range(process * self.micro_batch_size, self.batch_size, self.processes * self.micro_batch_size)

    def micro_batches(self, first_step: int, last_step: int, process: int) -> Iterator[list[int]]:
        """The micro-batches of one process. If a short batch has none for it, it gets a row that is not counted."""
        for step in range(first_step, last_step):
            rows = self.rows(step)
            for offset in self.offsets(process):
                micro_batch = rows[offset : offset + self.micro_batch_size]
                yield micro_batch.tolist() or [int(rows[0])]


def collate(examples: list[dict]) -> dict[str, Tensor]:
    """Stack rows, padded to a multiple of eight tokens.

    Teacher and student both see the whole sequence but for its last token. `targets` is what follows the start token:
    the labels, shifted by one against these inputs. `positions` is where it is predicted, in all rows of the batch
    joined.
    """
    tokens = pad_sequence([example["tokens"] for example in examples], batch_first=True)
    missing = -(tokens.shape[1] - 1) % 8
    tokens = F.pad(tokens, (0, missing))
    inputs = tokens[:, :-1].contiguous()  # (rows, width)
    starts = torch.tensor([example["start"] for example in examples])
    ends = torch.tensor([len(example["tokens"]) - 1 for example in examples])
    columns = torch.arange(inputs.shape[1])
    is_target = (starts[:, None] <= columns) & (columns < ends[:, None])  # whether the token after an input is one
    batch = {
        "decoder_input_ids": inputs,
        "positions": is_target.flatten().nonzero()[:, 0],
        "targets": tokens[:, 1:][is_target],
    }
    for name in ("features", "states"):
        if name in examples[0]:
            batch[name] = torch.stack([example[name] for example in examples])
    if "kl_share" in examples[0]:
        shares = torch.tensor([example["kl_share"] for example in examples])
        batch["kl_shares"] = shares.repeat_interleave(ends - starts)  # as many as targets
    if "teacher_hidden" in examples[0]:
        batch["teacher_hidden"] = torch.cat([example["teacher_hidden"] for example in examples])
    return batch


def choose_workers(args: argparse.Namespace, device: torch.device, processes: int) -> int:
    """How many processes load batches for each training process."""
    if args.dataloader_num_workers is not None:
        return args.dataloader_num_workers
    if device.type == "cpu":  # which the training keeps busy
        return 0
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    cores = len(os.sched_getaffinity(0)) // local_processes
    return min(GPU_WORKERS, max(1, cores - 1))


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Block SIGTERM and Ctrl-C in processes that are started here: the training process handles them, and saves."""
    resource_tracker.ensure_running()  # if Python started it below, that would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server() -> None:
    """Start the process that imports the libraries once, and from which all workers are forked.

    A fork of the training process may hang, because threads have run in it. A process that is spawned imports all for
    itself, and if it is killed before it has read its task the training process hangs writing to it.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with blocked_signals():
        forkserver.ensure_running()


def end_with_training(_worker: int) -> None:
    """Let a worker end when the training process has been killed: its parent is the fork server, which lives on."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def one_line_for_lost_workers() -> Iterator[None]:
    """End with one line where a worker has been killed, which torch and Python report by these errors."""
    try:
        yield
    except (ConnectionError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        remedy = "If memory ran out, lower --dataloader_num_workers"
        fail(f"a process that loads batches was killed. {remedy}. {CONTINUE}")


def read_batches(rows: Dataset, indices: Iterable, workers: int) -> Iterator[dict]:
    """Batches, loaded by worker processes ahead of their use."""
    loader = DataLoader(
        rows,
        batch_sampler=indices,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=end_with_training,
        pin_memory=torch.cuda.is_available(),
    )
    with one_line_for_lost_workers():
        with blocked_signals():
            batches = iter(loader)  # starts the workers
        yield from batches


# ---- models ----------------------------------------------------------------------------------------------------------


def encode_features(encoder: nn.Module, batch: dict) -> Tensor:
    """Encoder outputs, (rows, 1500, width)."""
    features = batch["features"].to(encoder.conv1.weight.dtype)
    return encoder(features).last_hidden_state


def decode_labels(decoder: nn.Module, states: Tensor, batch: dict) -> Tensor:
    """Last hidden states at the positions with a target, (tokens, width)."""
    options = {"encoder_hidden_states": states, "use_cache": False}
    # Without a cache, which stays empty, `transformers` asks the device whether the rows are several texts packed, and
    # a GPU would idle while the host waits for the answer.
    output = decoder(input_ids=batch["decoder_input_ids"], past_key_values=DynamicCache(), **options)
    return output.last_hidden_state.flatten(0, 1)[batch["positions"]]


class TrainedPart(nn.Module):
    """What is trained, as one module: the decoder with its head, and the encoder unless it is frozen."""

    def __init__(self, student: WhisperForConditionalGeneration, args: argparse.Namespace):
        super().__init__()
        self.encoder = None if args.freeze_encoder else student.model.encoder
        self.decoder = student.model.decoder
        is_tied = student.proj_out.weight is self.decoder.embed_tokens.weight
        self.proj_out = None if is_tied else student.proj_out
        self.temperature = args.temperature
        self.loss_weights = (args.ce_weight, args.kl_weight)

    def forward(
        self,
        states: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        batch: dict,
    ) -> tuple[Tensor, Tensor]:
        """`DistillationLoss` of a batch; `states` are the encoder outputs where the encoder is frozen.

        SpecAugment would go here, before the encoder: so the teacher hears clips unchanged, and `optimiser_step` has
        seeded torch. The `apply_spec_augment` of `transformers` does nothing, as its model is not called as a whole.
        """
        if self.encoder is not None:
            states = encode_features(self.encoder, batch)
        hidden = decode_labels(self.decoder, states, batch)
        head = (self.proj_out or self.decoder.embed_tokens).weight
        inputs = (hidden, head, teacher_hidden, teacher_head, batch["targets"])
        return DistillationLoss.apply(*inputs, self.temperature, self.loss_weights, batch.get("kl_shares"))


@dataclass
class Models:
    """Teacher and student, and what belongs to the student."""

    student: WhisperForConditionalGeneration
    teacher: WhisperForConditionalGeneration | None  # None = fine-tuning
    trained: TrainedPart
    tokenizer: WhisperTokenizerFast
    extractor: WhisperFeatureExtractor
    tokenizer_directory: Path
    prompt: dict[str, str]  # the first language and task, as `generate` takes them
    digests: dict[str, str] = field(default_factory=dict)  # of the weights before training
    frozen_weights: dict[str, Tensor] = field(default_factory=dict)  # of the student's encoder, where it is frozen

    @property
    def teacher_head(self) -> Tensor | None:
        return self.teacher.proj_out.weight if self.teacher else None


def run_teacher(
    models: Models,
    encoder: nn.Module,
    states: Tensor | None,
    batch: dict,
) -> Tensor | None:
    """The teacher's hidden states, (tokens, width).

    `states` are the outputs of `encoder`. Where that is also the teacher's encoder, it does not run again.
    """
    if models.teacher is None:
        return None
    if encoder is not models.teacher.model.encoder:
        states = encode_features(models.teacher.model.encoder, batch)
    return decode_labels(models.teacher.model.decoder, states, batch)


@torch.no_grad()
def run_frozen(models: Models, batch: dict) -> tuple[Tensor | None, Tensor | None]:
    """Run what is frozen; returns the student's encoder outputs, if they are frozen, and the teacher's hidden states.

    Call it outside of autocast. Under autocast the LayerNorms of a half-precision model would compute in float32.
    """
    if "states" in batch:  # from the cache
        return batch["states"], batch["teacher_hidden"]
    encoder = models.student.model.encoder
    states = encode_features(encoder, batch) if models.trained.encoder is None else None
    return states, run_teacher(models, encoder, states, batch)


def load_model(
    reference: str,
    dtype: str,
    vocabulary: dict[str, int],
    device: torch.device,
    args: argparse.Namespace,
) -> WhisperForConditionalGeneration:
    """A model on the CPU; in a dry run with random weights, which take as long."""
    config = load_config(reference)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": args.attn_type}
    if args.dry_run:
        with device:
            return spare_copies(AutoModelForSpeechSeq2Seq.from_config(config, **options))
    return spare_copies(load_whisper(reference, load_generation_config(reference, config, vocabulary), **options))


def load_teacher_model(
    student: WhisperForConditionalGeneration,
    vocabulary: dict[str, int],
    device: torch.device,
    args: argparse.Namespace,
) -> WhisperForConditionalGeneration | None:
    """The teacher on the CPU; None in fine-tuning. Fails where the student is not of its kind."""
    if not args.teacher_model_name_or_path:
        return None
    teacher = load_model(args.teacher_model_name_or_path, args.dtype, vocabulary, device, args)
    for key in ("vocab_size", "num_mel_bins", "max_source_positions"):
        ours = getattr(student.config, key)
        theirs = getattr(teacher.config, key)
        if ours != theirs:
            fail(f"{key} is {ours} in the student, {theirs} in the teacher: distil from the teacher it came from")
    if args.dry_run:
        with contextlib.suppress(RuntimeError):  # as a rule, the student's encoder is the teacher's
            student.model.encoder.load_state_dict(teacher.model.encoder.state_dict())
    return teacher.eval().requires_grad_(False)


def load_models(args: argparse.Namespace, device: torch.device) -> Models:
    """Teacher and student on their device, ready for training; in a dry run with random weights."""
    name = args.model_name_or_path
    try:
        directory = local_directory(name) or Path(snapshot_download(name, allow_patterns=TOKENIZER_FILES))
    except HUB_ERRORS as error:
        hub_fail(f"loading the tokenizer of {name}", error)
    tokenizer = load_tokenizer(str(directory))
    vocabulary = tokenizer.get_vocab()
    extractor = load_pretrained(WhisperFeatureExtractor, str(directory))
    refuse_other_sizes(name, load_config(name), vocabulary, extractor)
    # Of every pair of them, so that one that the student does not know fails before any weights are loaded.
    prompts = []
    languages = (args.language or "").split("+")
    for language, task in itertools.product(languages, args.task.split("+")):
        prompts.append(prompt_arguments(name, vocabulary, language or None, task))

    student = load_model(name, "float32", vocabulary, device, args)
    args.max_label_length = min(args.max_label_length, student.config.max_target_positions)
    teacher = load_teacher_model(student, vocabulary, device, args)
    models = Models(
        student=student,
        teacher=teacher,
        trained=TrainedPart(student, args),
        tokenizer=tokenizer,
        extractor=extractor,
        tokenizer_directory=directory,
        prompt=prompts[0],
    )
    if not args.dry_run:
        models.digests["student"] = weights_digest(student)
        if teacher is not None:
            models.digests["teacher"] = weights_digest(teacher)
    place_models(models, args, device)
    transformers.logging.set_verbosity_error()  # its later warnings are about deliberate choices
    return models


def place_models(models: Models, args: argparse.Namespace, device: torch.device) -> None:
    """Freeze, share and compile modules as the flags ask, and move them to the device."""
    teacher = None
    if models.teacher is not None:
        teacher = models.teacher.to(device).model
    if args.freeze_encoder:
        encoder = models.student.model.encoder.requires_grad_(False).eval()
        models.frozen_weights = encoder.state_dict()  # float32, as they are saved: the cast below makes others
        if teacher is not None and equal_weights(encoder, teacher.encoder):
            models.student.model.encoder = teacher.encoder  # it runs once for both
        elif teacher is not None:
            logger.warning("the student's frozen encoder is not the teacher's: both run")
        models.student.model.encoder.to(getattr(torch, args.dtype))
    models.student.to(device)
    if args.gradient_checkpointing:
        # `transformers` 5.23 has a new name for it, and warns of the old one.
        enable = getattr(
            models.student, "activation_checkpointing_enable", models.student.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if args.torch_compile:
        compiled = [*models.trained.children(), models.student.model.encoder]
        if teacher is not None:
            compiled += [teacher.encoder, teacher.decoder]
        for module in dict.fromkeys(compiled):  # an encoder that is trained or shared is in the list twice
            module.compile()


def equal_weights(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights, in the precision of the second."""
    weights = module.state_dict()
    expected = other.state_dict()
    if weights.keys() != expected.keys():
        return False
    return all(torch.equal(weights[name].to(tensor), tensor) for name, tensor in expected.items())


def weights_digest(module: nn.Module) -> str:
    """Fingerprint of a module's weights: a hash of evenly spaced values of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        every = max(1, tensor.numel() // 1024)
        values = tensor.flatten()[::every].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def greedy_config(model: WhisperForConditionalGeneration, models: Models, max_length: int) -> GenerationConfig:
    """How a model decodes, here and where it is published: greedily, in the language and task of the labels."""
    own = model.generation_config.to_dict()  # of `load_generation_config`, which takes no beams and no sampling over
    return GenerationConfig.from_dict(own | models.prompt | {"max_length": max_length})


# ---- encoder cache ---------------------------------------------------------------------------------------------------


def block_path(cache: Path, block: int) -> Path:
    return cache / str(block // 1000) / f"{block}.safetensors"


def read_outputs(cache: Path, index: int) -> dict[str, Tensor]:
    """Encoder outputs and the teacher's hidden states of one row, from a memory map."""
    block, row = divmod(index, CACHE_BLOCK)
    with safetensors.safe_open(block_path(cache, block), "pt") as file:
        start, end = file.get_tensor("token_limits")[row : row + 2].tolist()
        states = file.get_slice("states")[row]
        return {"states": states, "teacher_hidden": file.get_slice("teacher_hidden")[start:end]}


def block_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the tensors of a block with their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def is_whole_block(path: Path) -> bool:
    """Whether a block of the cache is there, and has the tensors that were written."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get("sha256") == block_digest(tensors):
                return True
    except FileNotFoundError:
        return False
    except SafetensorError:
        pass
    logger.warning("%s is damaged and is made again", path)
    return False


def find_missing_blocks(rows: Rows, cache: Path, accelerator: Accelerator) -> list[int]:
    """The blocks that no earlier run has written, or that are damaged. Each process looks for its share of them."""
    num_blocks = math.ceil(len(rows) / CACHE_BLOCK)
    own = list(range(accelerator.process_index, num_blocks, accelerator.num_processes))
    checked = show_progress("checking the cache", accelerator, own, leave=False)
    missing = [block for block in checked if not is_whole_block(block_path(cache, block))]
    return sorted(gather_object(missing))


def refuse_small_disk(rows: Rows, num_blocks: int, cache: Path, models: Models) -> None:
    """Fail where the disk has no room for so many blocks."""
    num_rows = min(len(rows), num_blocks * CACHE_BLOCK)
    config = models.teacher.config
    values = config.max_source_positions * models.student.config.d_model  # of a row
    values += rows.token_counts.mean() * config.d_model
    needed = num_rows * values * models.teacher.dtype.itemsize / 1e9
    free = shutil.disk_usage(cache).free / 1e9
    logger.info("encoder cache of %s: %.2f GB to write, %.2f GB free in %s", rows.name, needed, free, cache.parent)
    if needed > free:
        fail(f"--cache_encoder_outputs needs {needed:.2f} GB for {rows.name}; {cache.parent} has {free:.2f} free")


def encode_block(batch: dict, models: Models, device: torch.device) -> dict[str, Tensor]:
    """What a file of the cache holds: encoder outputs, the teacher's hidden states, and where each row's begin."""
    num_rows, width = batch["decoder_input_ids"].shape
    token_counts = torch.bincount(batch["positions"] // width, minlength=num_rows)
    states, teacher_hidden = run_frozen(models, send_to_device(batch, device, non_blocking=True))
    dtype = models.teacher.dtype
    return {
        "states": states.to("cpu", dtype),  # (rows, 1500, width)
        "teacher_hidden": teacher_hidden.to("cpu", dtype),  # (tokens, width)
        "token_limits": F.pad(token_counts.cumsum(0), (1, 0)),  # (rows + 1)
    }


def write_block(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, safetensors.torch.save(tensors, {"sha256": block_digest(tensors)}))


def write_blocks(blocks: list[int], cache: Path, rows: Rows, training: "Training") -> None:
    """Encode blocks, and write each while the next is encoded."""
    all_rows = range(len(rows))
    indices = [all_rows[block * CACHE_BLOCK :][:CACHE_BLOCK] for block in blocks]
    batches = read_batches(rows, indices, training.args.dataloader_num_workers)
    writing = None
    with ThreadPoolExecutor(1) as writer:
        for block in show_progress("encoding", training.accelerator, blocks):
            tensors = encode_block(next(batches), training.models, training.accelerator.device)
            if writing:
                writing.result()  # it may have found the disk full; and no more than two blocks are in memory
            writing = writer.submit(write_block, block_path(cache, block), tensors)
    if writing:
        writing.result()


def fill_cache(rows: Rows, training: "Training") -> Path:
    """Encode the rows that no earlier run has encoded; gives their directory.

    Each process takes blocks of its own. They are the same whoever encodes them: a cache that another run finishes has
    the same bytes.
    """
    accelerator = training.accelerator
    models = training.models
    directory = Path(training.args.cache_encoder_outputs).expanduser()
    encoder_digest = weights_digest(models.student.model.encoder)
    key = json.dumps([encoder_digest, models.digests["teacher"], rows.digest, training.args.dtype, CACHE_BLOCK])
    cache = directory / hashlib.sha256(key.encode()).hexdigest()[:16]
    lock = contextlib.nullcontext()
    if accelerator.is_main_process:
        lock = hold_lock(cache / ".lock", str(cache), "*/.*.partial", wait=True)
    with lock:
        accelerator.wait_for_everyone()  # until the main process has the lock
        if not cache.is_dir():
            fail(f"--cache_encoder_outputs {directory} must be on a file system that all machines see")
        missing = find_missing_blocks(rows, cache, accelerator)
        if accelerator.is_main_process:
            refuse_small_disk(rows, len(missing), cache, models)
        write_blocks(missing[accelerator.process_index :: accelerator.num_processes], cache, rows, training)
        accelerator.wait_for_everyone()
    return cache


# ---- held-out evaluation ---------------------------------------------------------------------------------------------


def show_progress(title: str, accelerator: Accelerator, items: Sequence | None = None, **options) -> ProgressBar:
    """A progress bar of the main process, over items, or to be updated by the caller."""
    is_silent = items == [] or not accelerator.is_main_process
    return ProgressBar(items, title, disable=is_silent, **options)


def in_precision(module: nn.Module, accelerator: Accelerator) -> contextlib.AbstractContextManager:
    """Autocast for a module that is trained; a frozen one is stored in the precision to compute in."""
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    return accelerator.autocast() if is_trained else contextlib.nullcontext()


def evaluate_batch(
    model: WhisperForConditionalGeneration,
    batch: dict,
    training: "Training",
) -> tuple[Tensor, list[str]]:
    """Sums of cross-entropy and KL over the tokens of a batch, and what the model says of each row."""
    args = training.args
    models = training.models
    encoder = model.model.encoder
    with in_precision(encoder, training.accelerator):
        states = encode_features(encoder, batch)
    teacher_hidden = run_teacher(models, encoder, states, batch)
    with in_precision(model, training.accelerator):
        hidden = decode_labels(model.model.decoder, states, batch)
        inputs = (hidden, model.proj_out.weight, teacher_hidden, models.teacher_head, batch["targets"])
        _, losses = DistillationLoss.apply(*inputs, args.temperature, (1.0, 1.0))
        token_ids = model.generate(
            encoder_outputs=BaseModelOutput(states),
            generation_config=greedy_config(model, models, args.max_label_length),
            force_unique_generate_call=True,
        )
    return losses, models.tokenizer.batch_decode(token_ids, skip_special_tokens=True)


@torch.no_grad()
def evaluate(model: WhisperForConditionalGeneration, training: "Training") -> tuple[dict[str, float], list[dict]]:
    """Evaluate the teacher or the student on the held-out rows.

    Returns:
        loss per token, and WER and CER of greedy decoding in per cent; what the model says of the first rows.
    """
    args = training.args
    accelerator = training.accelerator
    rows = training.data.held_out
    tokenizer = training.models.tokenizer
    language = text_language(rows.source.language, rows.source.task)
    normalise = text_normaliser(language, tokenizer.english_spelling_normalizer)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # cross-entropy, KL, tokens
    pairs = []
    predictions = []
    size = args.per_device_train_batch_size
    starts = list(range(0, len(rows), size))
    starts = starts[accelerator.process_index :: accelerator.num_processes]
    for start in show_progress("evaluating", accelerator, starts, leave=False):
        indices = range(len(rows))[start : start + size]
        examples = [rows[index] for index in indices]
        batch = send_to_device(collate(examples), accelerator.device)
        losses, hypotheses = evaluate_batch(model, batch, training)
        sums[:2] += losses
        sums[2] += len(batch["targets"])
        for index, example, hypothesis in zip(indices, examples, hypotheses, strict=True):
            if example["start"] == len(example["tokens"]) - 1:  # its audio could not be read
                continue
            reference = rows.reference_text(index, tokenizer)
            pairs.append((normalise(reference), normalise(hypothesis)))
            if index < LOGGED_PREDICTIONS:
                predictions.append({"row": index, "reference": reference, "hypothesis": hypothesis.strip()})
    arrive()
    ce_sum, kl_sum, num_tokens = accelerator.reduce(sums).tolist()
    if not num_tokens:
        fail(f"no held-out clip of {rows.name} can be read: the warnings above have the reasons")
    figures = {
        "eval_loss": (args.ce_weight * ce_sum + args.kl_weight * kl_sum) / num_tokens,
        "eval_ce": ce_sum / num_tokens,
        "eval_kl": kl_sum / num_tokens,
        **error_rates(gather_object(pairs)),
    }
    return figures, sorted(gather_object(predictions), key=lambda prediction: prediction["row"])


def error_rates(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """WER and CER in per cent of pairs of reference and hypothesis, without those whose reference is empty."""
    pairs = [pair for pair in pairs if pair[0]] or [("-", "")]  # without any reference, both rates are 100 %
    references = [reference for reference, _ in pairs]
    hypotheses = [hypothesis for _, hypothesis in pairs]
    return {
        "eval_wer": 100 * jiwer.wer(references, hypotheses),
        "eval_cer": 100 * jiwer.cer(references, hypotheses),
    }


# ---- where a run starts ----------------------------------------------------------------------------------------------


@dataclass
class TrainingState:
    """How far the training has come. Every checkpoint holds it."""

    step: int = 0  # optimiser steps done
    window: list[float] = field(default_factory=lambda: [0.0, 0.0, 0])  # sums of CE, KL and tokens since the last entry
    trend: float | None = None  # running mean of the loss
    lowest: float | None = None  # its lowest value so far
    best: dict | None = None  # step and figure of the best checkpoint
    teacher: dict | None = None  # the teacher's held-out evaluation


@dataclass
class Start:
    """How a run starts."""

    state: TrainingState = field(default_factory=TrainingState)
    checkpoint: Path | None = None  # to load; None = start from the student
    finished: bool = False  # the result of these settings is there already
    to_remove: list[Path] = field(default_factory=list)  # results to delete, with --overwrite_output_dir


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Steps and directories of the checkpoints in an output directory, oldest first, complete or not."""
    found = []
    for path in directory.glob("checkpoint-*"):
        if match := CHECKPOINT_NAME.fullmatch(path.name):
            found.append((int(match[1]), path))
    return sorted(found)


def damaged_files(directory: Path, hashes: dict[str, str]) -> list[str]:
    """The files that are missing, or not as they were written.

    What cannot be read just now, because of a permission or the disk, may be whole: that ends the run by an OSError.
    """
    damaged = []
    for name, expected in hashes.items():
        with contextlib.suppress(FileNotFoundError):
            if file_hash(directory / name) == expected:
                continue
        damaged.append(name)
    return damaged


def read_checkpoint(directory: Path) -> dict | None:
    """The manifest of a checkpoint; None, with a warning, where anything of the checkpoint is missing or damaged."""
    manifest = read_record(directory / MANIFEST)
    damaged = [MANIFEST] if manifest is None else damaged_files(directory, manifest["files"])
    if damaged:
        names = ", ".join(damaged)
        logger.warning("%s is not complete and is skipped: %s missing or damaged", directory.name, names)
        return None
    return manifest


def find_start(settings: dict, total_steps: int, args: argparse.Namespace) -> Start:
    """Decide whether a run resumes from a checkpoint or starts from the student, and what must be removed for it."""
    output_dir = args.output_dir
    choice = args.resume_from_checkpoint
    if choice.lower() not in ("auto", "true", "false", "none"):
        return start_from_named(Path(choice), settings, args)
    record = read_record(output_dir / RECORD)
    if record is None and (output_dir / RECORD).exists():  # damaged: the newest whole checkpoint has the same settings
        for _, directory in reversed(list_checkpoints(output_dir)):
            record = read_checkpoint(directory)
            if record:
                break
    if record is None or choice.lower() in ("false", "none"):
        return Start(to_remove=results_to_remove(args))
    if not args.overwrite_output_dir:
        refuse_other_settings(output_dir, record["settings"], settings)
    if changed_setting(record["settings"], settings):
        return Start(to_remove=results_to_remove(args))
    return start_from_newest(record, settings, total_steps, args)


def start_from_newest(record: dict, settings: dict, total_steps: int, args: argparse.Namespace) -> Start:
    """Go on from the newest whole checkpoint of a run with the same settings, if that has not finished."""
    output_dir = args.output_dir
    is_complete = record.get("status") == "complete" and (output_dir / "model.safetensors").exists()
    damaged = []
    if is_complete:
        damaged = damaged_files(output_dir, record.get("files", {}))
        if not damaged and record["steps"] >= total_steps:
            return Start(finished=True)
    for name in damaged:
        logger.warning("%s is damaged, and is made again from the last checkpoint", output_dir / name)
    for _, directory in reversed(list_checkpoints(output_dir)):
        manifest = read_checkpoint(directory)
        if manifest is None:
            damaged.append(directory.name)
        elif not changed_setting(manifest["settings"], settings):
            state = TrainingState(**manifest["state"])
            if state.step <= total_steps:
                return Start(state, directory)
            return Start(to_remove=results_to_remove(args))  # it has gone on for longer than is asked for now
    if damaged and not args.overwrite_output_dir:
        remedy = "put a copy in their place, or pass --overwrite_output_dir to train from the start"
        fail(f"no checkpoint in {output_dir} is whole ({', '.join(damaged)} are damaged): {remedy}")
    if is_complete:  # with fewer steps, and no checkpoint to go on from
        return Start(to_remove=results_to_remove(args))
    return Start()


def start_from_named(checkpoint: Path, settings: dict, args: argparse.Namespace) -> Start:
    """Go on from the checkpoint that --resume_from_checkpoint names."""
    manifest = read_checkpoint(checkpoint)
    if manifest is None:
        fail(f"--resume_from_checkpoint {checkpoint} is no complete checkpoint")
    if changed := changed_setting(manifest["settings"], settings):
        fail(f"--resume_from_checkpoint {checkpoint} was made with other settings: {changed}. Pass the same ones")
    state = TrainingState(**manifest["state"])
    is_own = checkpoint.resolve().parent == args.output_dir.resolve()
    to_remove = results_to_remove(args, after_step=state.step if is_own else None)
    return Start(state, checkpoint, to_remove=to_remove)


def results_to_remove(args: argparse.Namespace, after_step: int | None = None) -> list[Path]:
    """The results of earlier runs, or only checkpoints after a step. Fails without --overwrite_output_dir."""
    output_dir = args.output_dir
    results = [path for step, path in list_checkpoints(output_dir) if after_step is None or step > after_step]
    if after_step is None:
        files = [output_dir / name for name in (*TRAINING_FILES, PREDICTIONS)]
        results += filter(Path.exists, files)
    if results and not args.overwrite_output_dir:
        names = ", ".join(path.name for path in results)
        remedy = "pass --overwrite_output_dir to replace them, or choose another --output_dir"
        fail(f"{output_dir} holds later results ({names}): {remedy}")
    return results


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """The rows to train on, in which order, and those to evaluate on."""

    train: list[Rows]
    held_out: Rows | None
    plan: Plan
    total_steps: int

    @functools.cached_property
    def token_counts(self) -> np.ndarray:
        """Tokens of each training row that the loss counts."""
        return np.concatenate([rows.token_counts for rows in self.train])


@dataclass
class Training:
    """What a training, or an evaluation without one, works with."""

    args: argparse.Namespace
    accelerator: Accelerator
    models: Models
    data: Data
    wrapped: nn.Module | None = None  # the trained part of the models, as accelerate wraps it
    optimizer: Optimizer | None = None
    scheduler: Any = None  # of the learning rate
    state: TrainingState = field(default_factory=TrainingState)
    record: dict = field(default_factory=dict)
    repo_id: str | None = None  # where the main process pushes to
    push: Future | None = None  # the one that is running in the background
    stop_status: int = 0  # exit status, once a signal has come

    def stop(self, number: int, _frame) -> None:
        """End the training after this step because of SIGTERM or Ctrl-C; end it at once at the second."""
        if self.stop_status:
            sys.exit(128 + number)
        self.stop_status = 128 + number


def make_scheduler(args: argparse.Namespace, optimizer: Optimizer, total_steps: int) -> Any:
    """The learning-rate schedule of --lr_scheduler_type."""
    return transformers.get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def read_state(path: Path) -> dict:
    """The tensors, numbers and texts in a file of a checkpoint. Code that it may hold is not run."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, ValueError, pickle.UnpicklingError, EOFError):  # torch's message advises to unpickle it
        fail(f"{path} holds something else than a training's state: delete {path.parent}. {CONTINUE}")


def load_checkpoint(training: Training, directory: Path) -> None:
    """Set weights, optimiser and schedule to a checkpoint's state.

    `Accelerator.load_state` would unpickle the schedule, and fail if the number of processes has changed. Random
    states are not needed: all is drawn by the position in the data.
    """
    weights = read_state(directory / "model.safetensors")
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    training.models.trained.load_state_dict(weights)
    training.optimizer.load_state_dict(read_state(directory / "optimizer.bin"))
    if scaler := training.accelerator.scaler:
        scaler.load_state_dict(read_state(directory / "scaler.pt"))
    scheduler = directory / SCHEDULER
    if not scheduler.exists():
        scheduler = directory / OLD_SCHEDULER
    training.scheduler.load_state_dict(read_state(scheduler))


def make_optimizer(training: Training) -> None:
    """Make AdamW, with weight decay for matrices, and the schedule; let accelerate wrap what is trained."""
    args = training.args
    accelerator = training.accelerator
    weights = [weight for weight in training.models.trained.parameters() if weight.requires_grad]
    matrices = [weight for weight in weights if weight.ndim > 1]
    vectors = [weight for weight in weights if weight.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    training.scheduler = make_scheduler(args, optimizer, training.data.total_steps)
    training.wrapped, training.optimizer = accelerator.prepare(training.models.trained, optimizer)


def optimiser_step(training: Training, batches: Iterator[dict]) -> tuple[list[float], float, bool]:
    """One step over a global batch, of which each process has its micro-batches.

    Returns:
        the sums of cross-entropy, KL and tokens; the gradient's norm; whether a process was told to stop.
    """
    args = training.args
    accelerator = training.accelerator
    data = training.data
    models = training.models
    step = training.state.step
    rows = data.plan.rows(step)
    num_tokens = int(data.token_counts[rows].sum())  # also of rows whose audio turns out to be unreadable
    # DDP takes the mean over processes, and accelerate the mean over micro-batches. Ours is the mean over tokens.
    scale = accelerator.num_processes * args.gradient_accumulation_steps / num_tokens
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # cross-entropy, KL, processes to be stopped
    for offset in data.plan.offsets(accelerator.process_index):
        is_counted = offset < len(rows)
        batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
        arrive()
        # Dropout is seeded by the position in the data, so no random state has to be saved.
        seeds = np.random.SeedSequence([args.seed, step, offset])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        with accelerator.accumulate(training.wrapped):
            states, teacher_hidden = run_frozen(models, batch)  # outside of autocast
            with accelerator.autocast():
                loss, losses = training.wrapped(states, teacher_hidden, models.teacher_head, batch)
            accelerator.backward(loss * (is_counted * scale))
        sums[:2] += is_counted * losses
    grad_norm = accelerator.clip_grad_norm_(training.wrapped.parameters(), args.max_grad_norm or math.inf)
    training.optimizer.step()
    training.optimizer.zero_grad()
    if args.lr_scheduler_type not in LED_BY_LOSS:
        training.scheduler.step()
    sums[2] = bool(training.stop_status)
    # The host waits for a GPU here and nowhere else in a step: once, and when all of the step's work is queued.
    figures = torch.stack([*accelerator.reduce(sums), grad_norm.to(sums)])
    ce_sum, kl_sum, num_stopped, grad_norm = figures.tolist()
    loss = (args.ce_weight * ce_sum + args.kl_weight * kl_sum) / num_tokens
    check_loss(training, loss, grad_norm)
    return [ce_sum, kl_sum, num_tokens], grad_norm, num_stopped > 0


def check_loss(training: Training, loss: float, grad_norm: float) -> None:
    """Follow the loss, and end the run before a checkpoint has weights whose loss is not a number or has exploded."""
    args = training.args
    state = training.state
    if state.trend is None:
        state.trend = state.lowest = loss
    else:
        state.trend = 0.95 * state.trend + 0.05 * loss
        state.lowest = min(state.lowest, state.trend)
    has_scaler = training.accelerator.scaler is not None  # it leaves out steps whose gradient is not finite
    if not math.isfinite(loss) or not (has_scaler or math.isfinite(grad_norm)):
        problem = f"the loss is {loss} and the gradient's norm {grad_norm}"
    elif state.trend > 3 * state.lowest + 1:
        problem = f"the loss has exploded from {state.lowest:.3f} to {state.trend:.3f}"
    else:
        return
    checkpoints = list_checkpoints(args.output_dir)
    last = checkpoints[-1][1].name if checkpoints else "none yet"
    fail(
        f"step {state.step + 1}: {problem}; the last checkpoint from before: {last}. "
        f"Lower --learning_rate ({args.learning_rate}) or raise --warmup_steps ({args.warmup_steps})"
    )


def evaluate_training(training: Training) -> bool:
    """Evaluate the student on the held-out rows, and the teacher once; returns whether the student is the best yet."""
    args = training.args
    state = training.state
    models = training.models
    if training.data.held_out is None:
        return False
    models.trained.eval()
    if models.teacher is not None and state.teacher is None:
        state.teacher, _ = evaluate(models.teacher, training)
        log_evaluation("teacher", state.teacher)
    figures, predictions = evaluate(models.student, training)
    models.trained.train()
    log_evaluation(f"step {state.step}", figures)
    if training.accelerator.is_main_process:
        log_figures(training, figures)
        log_predictions(training, predictions)
    if args.lr_scheduler_type in LED_BY_LOSS:
        training.scheduler.step(figures["eval_loss"])
    figure = figures[f"eval_{args.metric_for_best_model}"]
    if state.step == 0 or (state.best and figure >= state.best["figure"]):
        return False
    state.best = {"step": state.step, "figure": figure}
    return True


def log_evaluation(name: str, figures: dict[str, float]) -> None:
    text = "held-out rows, %s: CER %.2f, WER %.2f, loss %.3f"
    logger.info(text, name, figures["eval_cer"], figures["eval_wer"], figures["eval_loss"])


def append_entry(path: Path, entry: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def log_figures(training: Training, figures: dict) -> None:
    """Add an entry to metrics.jsonl, and report it to the tracker."""
    step = training.state.step
    epoch = round(step / training.data.plan.steps_per_epoch, 4)
    append_entry(training.args.output_dir / METRICS, {"step": step, "epoch": epoch, **figures})
    track(training.accelerator, figures, step)


def log_predictions(training: Training, predictions: list[dict]) -> None:
    """Write down what the student says of a few held-out rows, and show it in a tracker that has tables."""
    step = training.state.step
    append_entry(training.args.output_dir / PREDICTIONS, {"step": step, "predictions": predictions})
    rows = [list(prediction.values()) for prediction in predictions]
    try:
        for tracker in training.accelerator.trackers:
            if hasattr(tracker, "log_table"):
                tracker.log_table("held_out_predictions", ["row", "reference", "hypothesis"], rows, step=step)
    except Exception as error:  # a tracker may raise anything
        logger.warning("the tracker takes no table: %s", first_line(error))


def mean_figures(training: Training, grad_norm: float) -> dict:
    """The mean figures of the steps since the last entry of the log, and begin the next entry."""
    args = training.args
    ce_sum, kl_sum, num_tokens = training.state.window
    training.state.window = [0.0, 0.0, 0]
    return {
        "loss": (args.ce_weight * ce_sum + args.kl_weight * kl_sum) / num_tokens,
        "ce_loss": ce_sum / num_tokens,
        "kl_loss": kl_sum / num_tokens,
        "learning_rate": training.optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm,
    }


def train(training: Training) -> int:
    """Train from the step of the state to the last one; returns 0, or the exit status if a signal ended it early."""
    args = training.args
    accelerator = training.accelerator
    data = training.data
    state = training.state
    indices = data.plan.micro_batches(state.step, data.total_steps, accelerator.process_index)
    batches = read_batches(ConcatDataset(data.train), indices, args.dataloader_num_workers)
    bar = show_progress("training", accelerator, total=data.total_steps, initial=state.step)
    training.wrapped.train()
    if state.step == 0:
        evaluate_training(training)
    started = time.monotonic()
    num_clips = 0
    is_stopped = False
    while state.step < data.total_steps and not is_stopped:
        sums, grad_norm, is_stopped = optimiser_step(training, batches)
        num_clips += len(data.plan.rows(state.step))
        for number, value in enumerate(sums):
            state.window[number] += value
        state.step += 1
        is_last = state.step == data.total_steps
        bar.update()

        if state.step % args.logging_steps == 0 or is_last:
            figures = mean_figures(training, grad_norm)
            figures["samples_per_second"] = round(num_clips / (time.monotonic() - started), 3)
            bar.set_postfix(figures)
            if accelerator.is_main_process:
                log_figures(training, figures)
            started = time.monotonic()
            num_clips = 0

        paused = time.monotonic()
        is_best = False
        if state.step % args.eval_steps == 0 or is_last:
            is_best = evaluate_training(training)
        if is_best or is_stopped or is_last or state.step % args.save_steps == 0:
            save_checkpoint(training)
            if accelerator.is_main_process and not is_last:
                push_progress(training)
        started += time.monotonic() - paused
    bar.close()
    if state.step == data.total_steps:
        return 0
    logger.warning("stopped at step %d of %d, which is saved. %s", state.step, data.total_steps, CONTINUE)
    return training.stop_status or 128 + signal.SIGTERM


# ---- files, record, card, push ---------------------------------------------------------------------------------------


def finish_files(directory: Path) -> dict[str, str]:
    """Bring each file to the disk, let all read it who may read the directory, and give its SHA-256.

    safetensors makes its files private.
    """
    hashes = {}
    for path in sorted(directory.iterdir()):
        path.chmod(directory.stat().st_mode & 0o666)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        hashes[path.name] = file_hash(path)
    return hashes


def save_checkpoint(training: Training) -> None:
    """Save a checkpoint, which appears under its name when all of it is on the disk."""
    accelerator = training.accelerator
    state = training.state
    epoch = (state.step - 1) // training.data.plan.steps_per_epoch
    directory = training.args.output_dir / f"checkpoint-{state.step}-epoch-{epoch}"
    partial = directory.with_name(f".{directory.name}.partial")
    with saving_models():
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_atomically(partial / SCHEDULER, json.dumps(training.scheduler.state_dict()))
        hashes = finish_files(partial)
        settings = training.record["settings"]
        # Last: it has the hashes of all other files, and without it a checkpoint does not count.
        write_record(partial / MANIFEST, {"state": asdict(state), "settings": settings, "files": hashes})
        shutil.rmtree(directory, ignore_errors=True)  # a damaged one
        os.replace(partial, directory)
        rotate_checkpoints(training)


def rotate_checkpoints(training: Training) -> None:
    """Keep the newest checkpoints up to this step, and the best. Those of later steps were found damaged."""
    state = training.state
    limit = training.args.save_total_limit
    found = list_checkpoints(training.args.output_dir)
    kept = [step for step, _ in found if step <= state.step]
    if limit is not None:
        kept = kept[-max(1, limit) :]
    if state.best:
        kept.append(state.best["step"])
    for step, path in found:
        if step not in kept:
            shutil.rmtree(path)


def read_entries(path: Path, last_step: float = math.inf) -> list[dict]:
    """The entries of a log up to a step, without damaged lines and a last line that is not complete."""
    entries = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            if entry["step"] <= last_step:
                entries.append(entry)
        except (ValueError, LookupError, TypeError):
            logger.warning("line %d of %s is damaged and is left out", number, path)
    return entries


def write_model(training: Training, changes: dict) -> None:
    """Write the model repository into the output directory, each file complete or not at all.

    `changes` update the record that was made at the start.
    """
    output_dir = training.args.output_dir
    record = training.record | changes
    partial = output_dir / ".model.partial"
    partial.mkdir()
    with saving_models():
        save_student(partial, training.models)
    entries = read_entries(output_dir / METRICS)
    draw_curves(entries, partial / "training_curves.png")
    card = distillation_card(record, entries, training.args, read_card(output_dir / "README.md"))
    (partial / "README.md").write_text(card, encoding="utf-8")
    for script in SCRIPTS:
        path = Path(__file__).resolve().with_name(script)
        if path.exists() and not (output_dir / script).exists():
            shutil.copy(path, partial)
    hashes = {METRICS: file_hash(output_dir / METRICS)}
    for name, hashed in finish_files(partial).items():
        if not name.endswith((".md", ".py")):
            hashes[name] = hashed
        os.replace(partial / name, output_dir / name)
    partial.rmdir()
    # Last: its "complete" means that all is there.
    write_record(output_dir / RECORD, record | {"files": hashes})


def save_student(directory: Path, models: Models) -> None:
    """Write weights in float32, configurations, tokenizer and feature extractor."""
    student = models.student
    weights = {f"model.encoder.{name}": tensor for name, tensor in models.frozen_weights.items()}
    for name, tensor in models.trained.state_dict().items():
        full_name = name if name.startswith("proj_out") else f"model.{name}"
        weights[full_name] = tensor.float().cpu()
    safetensors.torch.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    student.config.save_pretrained(directory)
    greedy_config(student, models, student.config.max_target_positions).save_pretrained(directory)
    WhisperProcessor(models.extractor, models.tokenizer).save_pretrained(directory)
    models.extractor.save_pretrained(directory)  # preprocessor_config.json
    for name in TOKENIZER_FILES:  # the student's own, made for CTranslate2 and whisper.cpp as well
        if (models.tokenizer_directory / name).exists():
            shutil.copyfile(models.tokenizer_directory / name, directory / name)


def draw_curves(entries: list[dict], path: Path) -> None:
    """Training loss and its parts, held-out figures and the learning rate over the steps, as a PNG."""
    panels = {
        "loss per token": ["loss", "ce_loss", "kl_loss", "eval_loss"],
        "held-out errors, %": ["eval_cer", "eval_wer"],
        "learning rate": ["learning_rate"],
    }
    known = set().union(*entries)
    titles = [title for title, names in panels.items() if known.intersection(names)]
    figure = Figure(figsize=(15, 4), layout="constrained")
    for number, title in enumerate(titles, start=1):
        axes = figure.add_subplot(1, len(titles), number, title=title, xlabel="optimiser step")
        for name in panels[title]:
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, label=name, marker=".")
        axes.legend()
    figure.savefig(path, format="png", dpi=100)


def card_table(columns: list[str], rows: Iterable[Sequence]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def evaluation_section(record: dict, entries: list[dict], args: argparse.Namespace) -> str:
    """The part of the card about the held-out rows; empty where there are none."""
    lines = []
    teacher = {"step": "teacher", **(record.get("teacher_evaluation") or {})}
    for entry in [teacher, *entries]:
        if "eval_loss" in entry:
            figures = [f"{entry[name]:.3f}" for name in ("eval_loss", "eval_cer", "eval_wer")]
            lines.append([entry["step"], *figures])
    if not lines:
        return ""
    held_out = f"{shown_name(args.eval_dataset_name)} ({args.eval_split_name})"
    table = card_table(["step", "loss", "CER %", "WER %"], lines)
    return f"Held out, on {held_out}, greedy, normalised:\n\n{table}\n"


def distillation_card(
    record: dict,
    entries: list[dict],
    args: argparse.Namespace,
    card: RepoCard | None,
) -> str:
    """README.md: what the model was made from and how it went, beside what others wrote into `card`."""
    origin = args.teacher_model_name_or_path or args.model_name_or_path
    kind = "distilled" if args.teacher_model_name_or_path else "fine-tuned"
    trained_on = args.train_dataset_name.split("+")
    card = card or RepoCard(f"---\n{{}}\n---\n# {args.output_dir.resolve().name}\n")
    fill_metadata(
        card,
        language=args.language.split("+") if "+" in (args.language or "") else args.language,
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "distillation" if kind == "distilled" else "fine-tuning"],
        base_model=None if local_directory(origin) else origin,
        datasets=[reference for reference in trained_on if not Path(reference).expanduser().exists()],
    )
    epochs = record["steps"] / record["steps_per_epoch"]
    layers = record["layers"]
    section = f"""A Whisper with {layers["encoder"]} encoder and {layers["decoder"]} decoder layers, {kind} from \
{shown_name(origin)} on {record["rows"]:,} rows of {" and ".join(map(shown_name, trained_on))}: \
{record["steps"]:,} steps of {record["settings"]["global_batch_size"]} rows, {epochs:.2f} epochs.
The loss is {args.ce_weight} · CE + {args.kl_weight} · T² · KL(teacher ‖ student) at T = {args.temperature}.
Weights are float32.

![training curves](training_curves.png)

{evaluation_section(record, entries, args)}
{card_table(["setting", "value"], record["settings"].items())}

Made by `run_distillation.py`: `{RECORD}` has all arguments and library versions, `{METRICS}` every figure.
"""
    set_section(card, "model", section)
    return str(card)


def home_repository(directory: Path) -> str:
    """The model repository that a directory is a clone of, or that its path ends with; else its name.

    `hf download org/name --local-dir org/name`, unlike `git clone`, leaves no other trace of where it came from.
    """
    if shutil.which("git"):
        command = ["git", "-C", str(directory), "config", "remote.origin.url"]
        url = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        remote = urlsplit(url)
        name = remote.path.strip("/").removesuffix(".git")
        if remote.hostname == urlsplit(constants.ENDPOINT).hostname and name.count("/") == 1:
            return name
    name = "/".join(directory.resolve().parts[-2:])
    try:
        if HfApi().repo_exists(name):
            return name
    except HFValidationError:  # such a path cannot be the name of a repository
        pass
    except HUB_ERRORS as error:
        hub_fail(f"looking for the repository {name}", error)
    return directory.resolve().name


def prepare_push(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Repository that the trained model is pushed to, and whether it is private or public; None where none is."""
    if not (args.push_to_hub and args.do_train):
        return None, None
    repository = args.hub_model_id or home_repository(args.output_dir)
    return prepare_repository(repository, "model", args.hub_private_repo, args.dry_run)


def published_files(args: argparse.Namespace) -> list[str]:
    """Patterns of what is pushed: what this script writes, and the student where it lies in the output directory."""
    output_dir = args.output_dir.resolve()
    student = Path(args.model_name_or_path).resolve()
    patterns = [*TRAINING_FILES, *TOKENIZER_FILES, *SCRIPTS, "config.json", "generation_config.json"]
    if student.is_relative_to(output_dir):
        patterns.append(f"{student.relative_to(output_dir)}/*")
    return patterns


def push_model(repo_id: str, message: str, args: argparse.Namespace) -> None:
    """Upload the model repository, and update its card, in which others may have written since."""
    output_dir = args.output_dir
    upload = functools.partial(
        HfApi().upload_folder,
        repo_id=repo_id,
        folder_path=output_dir,
        allow_patterns=published_files(args),
        ignore_patterns=[".*", "*.partial"],
        commit_message=message,
    )
    push_with_retries(upload)
    record = read_record(output_dir / RECORD)
    entries = read_entries(output_dir / METRICS)
    local_card = read_card(output_dir / "README.md")

    def update(card: RepoCard | None) -> str:
        return distillation_card(record, entries, args, card or local_card)

    push_card(repo_id, "model", update, message)


def is_pushing(training: Training) -> bool:
    """Whether a push is running. A failed one is only reported: the next push uploads the same files."""
    if training.push and training.push.done():
        if error := training.push.exception():
            logger.warning("a push to %s failed, training goes on: %s", training.repo_id, first_line(error))
        training.push = None
    return training.push is not None


def push_progress(training: Training) -> None:
    """Push the model as it is now in the background, unless the push before is still running."""
    if training.repo_id and not is_pushing(training):
        step = training.state.step
        write_model(training, {"steps": step})
        message = f"Training in progress, step {step}"
        training.push = HfApi().run_as_future(push_model, training.repo_id, message, training.args)


def push_result(repo_id: str, args: argparse.Namespace) -> None:
    """Push the trained model, or what an earlier push has not uploaded."""
    try:
        push_model(repo_id, "Distilled model", args)
    except HUB_ERRORS as error:
        fail(f"the push to {repo_id} failed: {first_line(error)}. All is in {args.output_dir}. {CONTINUE}")
    logger.info("pushed to %s/%s", without_password(constants.ENDPOINT), repo_id)


def finish_training(training: Training, began: float) -> None:
    """Write the trained model, its card and the record that it is complete."""
    while is_pushing(training):
        time.sleep(0.1)
    result = {
        "status": "complete",
        "steps": training.data.total_steps,
        "best": training.state.best,
        "teacher_evaluation": training.state.teacher,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_model(training, result)
    logger.info("the trained model is in %s", training.args.output_dir.resolve())


def print_inputs(data: Data) -> None:
    """Print the dry run's lines about the rows."""
    for rows in filter(None, [*data.train, data.held_out]):
        hours = f"{rows.hours:.2f} h, " if rows.hours else ""
        counts = f"{len(rows)} rows, {hours}{rows.token_counts.mean():.1f} tokens a label"
        print(f"input: {rows.name}, {counts}, {sum(rows.left_out.values())} rows left out")


def measure_steps(training: Training) -> tuple[float, float]:
    """Seconds to load a micro-batch, and seconds of a step, by a training on its first rows."""
    rows = training.data.train[0]
    size = training.args.per_device_train_batch_size
    sample = np.resize(np.arange(len(rows)), size)  # repeated where there are fewer
    # A dry run has read the first inputs only: they stand for those of all rows.
    inputs = itertools.cycle({rows.input_column: value} for value in rows.first_inputs)
    rows.dataset = dict(zip(rows.usable[sample].tolist(), inputs, strict=False))
    started = time.perf_counter()
    batch = collate([rows[index] for index in sample])
    loading = time.perf_counter() - started
    make_optimizer(training)
    training.wrapped.train()
    optimiser_step(training, itertools.repeat(batch))  # the first step compiles, allocates and fills caches
    started = time.perf_counter()
    for _ in range(SAMPLE_STEPS):
        optimiser_step(training, itertools.repeat(batch))
    return loading, (time.perf_counter() - started) / SAMPLE_STEPS


def print_plan(
    training: Training,
    start: Start,
    loading: float,
    step_seconds: float,
    pushes: str,
) -> None:
    """Print what a run would read, do, write and push, and how long it would take."""
    args = training.args
    data = training.data
    models = training.models
    total = data.total_steps
    print_inputs(data)
    print(f"work: {total} steps of {data.plan.batch_size} rows, {data.plan.steps_per_epoch} an epoch")
    step = total if start.finished else start.state.step
    checkpoint = f" ({start.checkpoint.name})" if start.checkpoint else ""
    print(f"done: {step} of {total} steps{checkpoint}")
    if start.to_remove:
        print(f"removes: {', '.join(path.name for path in start.to_remove)} in {args.output_dir}")
    size = sum(4 * weight.numel() for weight in models.student.parameters()) / 1e9  # float32
    trained_size = sum(weight.nbytes for weight in models.trained.parameters()) / 1e9
    saved = math.ceil(total / args.save_steps)
    limit = args.save_total_limit
    kept = saved if limit is None else min(saved, max(1, limit))
    checkpoints = f"{kept} checkpoints of {3 * trained_size:.2f} GB each"  # weights, and AdamW's two averages
    print(f"writes: {args.output_dir}, the model of {size:.2f} GB, {checkpoints}")
    pushed = f"{pushes}, {size:.2f} GB at every save" if pushes else "nothing"
    print(f"pushes: {pushed}")
    hours = (total - step) * step_seconds / 3600
    device = training.accelerator.device.type
    print(f"left: {total - step} steps, {hours:.2f} h at {step_seconds:.3f} s a step (measured on this {device})")
    trained = data.plan.batch_size / data.plan.processes / step_seconds
    read = args.per_device_train_batch_size / loading
    print(f"rates: a training process takes {trained:.1f} rows/s, a process that loads gives {read:.1f}")


# ---- main ------------------------------------------------------------------------------------------------------------


def refuse_contradictions(args: argparse.Namespace) -> None:
    """Fail where flags contradict each other."""
    needed = args.train_dataset_name if args.do_train else args.eval_dataset_name
    if not needed:
        fail("nothing to do: pass --do_train and --train_dataset_name, or --eval_dataset_name for an evaluation")
    if args.cache_encoder_outputs and not args.freeze_encoder:
        fail("--cache_encoder_outputs needs --freeze_encoder: the outputs of an encoder in training change")
    if args.cache_encoder_outputs and not args.kl_weight:
        fail("--cache_encoder_outputs also holds what the teacher says: it does not go with --kl_weight 0")
    if args.lr_scheduler_type in LED_BY_LOSS and not args.eval_dataset_name:
        fail(f"--lr_scheduler_type {args.lr_scheduler_type} follows the held-out loss: it needs --eval_dataset_name")
    if args.dtype == "float16" and not torch.cuda.is_available():
        fail("--dtype float16 needs a GPU: use bfloat16 or float32")
    for engine in ("DeepSpeed", "FSDP"):  # their checkpoints are in other forms; DeepSpeed's may hold code
        if os.environ.get(f"ACCELERATE_USE_{engine.upper()}") == "true":
            fail(f"{engine} is not supported: train by DDP (`accelerate config`)")
    if args.output_dir.resolve() == Path(args.model_name_or_path).resolve():
        fail(f"--output_dir {args.output_dir} is the student to start from: choose another")


def load_data(models: Models, accelerator: Accelerator, args: argparse.Namespace) -> Data:
    """Read the rows, and plan the order of training."""
    train = []
    held_out = None
    with accelerator.local_main_process_first():  # the others find the Arrow files in the cache
        if args.do_train:
            train = [Rows(source, models, args) for source in training_sources(args)]
        if args.eval_dataset_name:
            held_out = Rows(held_out_source(args), models, args)
    plan = Plan(
        sizes=tuple(len(rows) for rows in train),
        weights=tuple(args.train_dataset_samples) if args.train_dataset_samples else None,
        seed=args.seed,
        micro_batch_size=args.per_device_train_batch_size,
        processes=accelerator.num_processes,
        accumulation=args.gradient_accumulation_steps,
    )
    total_steps = args.max_steps
    if total_steps <= 0:
        total_steps = math.ceil(args.num_train_epochs * plan.steps_per_epoch)
    return Data(train, held_out, plan, total_steps)


def training_settings(training: Training) -> dict:
    """The settings that change the trained weights. A dry run does not know the models' weights."""
    args = training.args
    data = training.data
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["train_data"] = [rows.digest for rows in data.train]
    settings["global_batch_size"] = data.plan.batch_size
    if not args.lr_scheduler_type.startswith("constant"):  # only then the rate depends on where the run ends
        settings["steps"] = data.total_steps
    return settings | training.models.digests


def make_record(training: Training, settings: dict) -> dict:
    """What distillation.json says of a run at its start."""
    data = training.data
    config = training.models.student.config
    return {
        "status": "running",
        "settings": settings,
        "rows": sum(data.plan.sizes),
        "rows_left_out": rows_left_out(data.train),
        "hours": round(sum(rows.hours for rows in data.train), 2),
        "steps": training.state.step,
        "steps_per_epoch": data.plan.steps_per_epoch,
        "layers": {"encoder": config.encoder_layers, "decoder": config.decoder_layers},
        "processes": data.plan.processes,
        "arguments": shown_arguments(training.args),
        "versions": library_versions("torch", "transformers", "datasets", "accelerate"),
    }


def restore_training(training: Training, start: Start, settings: dict) -> None:
    """Restore output directory and training to the step to start from, write the record, and fill the cache."""
    args = training.args
    data = training.data
    training.state = start.state
    training.record = make_record(training, settings)
    if training.accelerator.is_main_process:
        clean_output(start, args.output_dir)
        write_record(args.output_dir / RECORD, training.record)
    training.accelerator.wait_for_everyone()
    if not (args.output_dir / RECORD).exists():
        fail(f"--output_dir {args.output_dir} must be on a file system that all machines see")
    device = device_name(training.accelerator.device)
    logger.info("training %s: %s, %s, processes: %d", args.model_name_or_path, device, args.dtype, data.plan.processes)
    text = "%d rows; %d steps, %d an epoch, of %d rows"
    logger.info(text, sum(data.plan.sizes), data.total_steps, data.plan.steps_per_epoch, data.plan.batch_size)
    make_optimizer(training)
    if start.checkpoint:
        load_checkpoint(training, start.checkpoint)
        logger.info("going on from step %d of %d (%s)", start.state.step, data.total_steps, start.checkpoint.name)
    if args.cache_encoder_outputs:
        for rows in data.train:
            rows.cache = fill_cache(rows, training)


def rows_left_out(train: list[Rows]) -> dict[str, dict[str, int]]:
    """The number of unusable rows by dataset and reason. Datasets of the same name are numbered."""
    counts = {}
    for number, rows in enumerate(train, start=1):
        name = shown_name(rows.name)
        counts[f"{name} ({number})" if name in counts else name] = rows.left_out
    return counts


def clean_output(start: Start, output_dir: Path) -> None:
    """Remove results that are not of this run, and the figures of later steps than the one that it starts from.

    Damaged checkpoints stay until a whole one has been saved.
    """
    for path in start.to_remove:
        logger.warning("removing %s", path)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (output_dir / METRICS).touch()
    for path in (output_dir / METRICS, output_dir / PREDICTIONS):
        if path.exists():
            entries = read_entries(path, start.state.step)
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
            write_atomically(path, "".join(lines))


def evaluate_only(training: Training) -> None:
    """Evaluate teacher and student on the held-out rows, and write the figures."""
    models = {"teacher": training.models.teacher, "student": training.models.student}
    figures = {}
    for name, model in models.items():
        if model is not None:
            figures[name], _ = evaluate(model.eval(), training)
            log_evaluation(name, figures[name])
    if training.accelerator.is_main_process:
        write_json(training.args.output_dir / "evaluation.json", figures)


@contextlib.contextmanager
def stopped_by_signals(training: Training) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the training after a step, when it is saved."""

    def stop(number: int, frame) -> None:
        training.stop(number, frame)

    handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        # Not the method itself: Python formats a handler for an error that it drops, and here that is every weight.
        handlers[number] = signal.signal(number, stop)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def one_line_for_faults() -> Iterator[None]:
    """End with one line for faults that a user can mend, and leave no loading process behind."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        cause = getattr(error, "inner_exception", error)
        fail(f"--torch_compile failed: {first_line(cause)}. Run the same command without it")
    except (OSError, SafetensorError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is None:  # not the operating system's
            raise
        fail(f"{first_line(cause)}. Fix this. {CONTINUE}")
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # it blocks SIGTERM, so the interpreter's exit would wait for it
            worker.join()


@one_line_for_lost_processes()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    began = time.monotonic()
    with one_line_for_faults(), contextlib.ExitStack() as locks:
        # 1. Set up.
        set_up_process(os.environ.get("RANK", "0") == "0")
        set_client_factory(make_hub_client)
        transformers.logging.disable_progress_bar()
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        args.dtype = choose_dtype(args.dtype, device)
        args.attn_type = choose_attention(args.attn_type, args.dtype, device)

        # 2. Refuse what can be refused.
        refuse_contradictions(args)
        accelerator = start_accelerator(
            args,
            [DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            mixed_precision=MIXED_PRECISION[args.dtype],
            gradient_accumulation_steps=args.gradient_accumulation_steps,
        )
        args.dataloader_num_workers = choose_workers(args, accelerator.device, accelerator.num_processes)
        if args.dataloader_num_workers and not args.dry_run:
            start_fork_server()
        if accelerator.is_main_process and not args.dry_run:
            leftovers = (".checkpoint-*.partial", ".model.partial", ".*.json.*.partial", ".metrics.jsonl.*.partial")
            lock = args.output_dir / ".training.lock"
            locks.enter_context(hold_lock(lock, str(args.output_dir), *leftovers))
        accelerator.wait_for_everyone()
        repo_id = visibility = None
        if accelerator.is_main_process:
            repo_id, visibility = prepare_push(args)
            check_cards(args.output_dir, repo_id, "model")

        # 3. Load.
        models = load_models(args, accelerator.device)
        data = load_data(models, accelerator, args)
        training = Training(args, accelerator, models, data, repo_id=repo_id)

        # 4. Find what is left to do.
        if not args.do_train:
            if args.dry_run:
                print_inputs(data)
            else:
                evaluate_only(training)
            return 0
        settings = training_settings(training)
        start = find_start(settings, data.total_steps, args) if accelerator.is_main_process else None
        start = broadcast_object_list([start])[0]
        if args.dry_run:
            loading, step_seconds = measure_steps(training)
            if accelerator.is_main_process:
                pushes = f"{repo_id} ({visibility})" if repo_id else ""
                print_plan(training, start, loading, step_seconds, pushes)
            return 0
        if start.finished:
            logger.info("%s holds the finished result of this command: nothing is trained", args.output_dir)
        else:
            # 5. Work.
            restore_training(training, start, settings)
            start_tracker(accelerator, args, args.wandb_name)
            with stopped_by_signals(training):
                status = train(training)

            # 6. Write record and card.
            if status == 0 and accelerator.is_main_process:
                finish_training(training, began)
            accelerator.wait_for_everyone()
            accelerator.end_training()
            if status:
                return status

        # 7. Push.
        if repo_id:
            push_result(repo_id, args)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"stopped. {CONTINUE}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an exception while Python shuts down would print a traceback
