#!/usr/bin/env python
"""Keep the clips whose teacher label agrees with the reference, and store what the student trains on.

In: a labelled dataset, as run_pseudo_labelling.py writes it: a local directory or a Hub id, with the columns `audio`,
a reference text and `whisper_transcript`. Out, beside a local dataset, or in --output_dir and on the Hub for one that
is there (`.cer_10.0` with `--cer_threshold 10`):

    <dataset>.wer_10.0             audio, text, whisper_transcript, labels, input_length (samples at 16 kHz), wer, cer
    <dataset>.wer_10.0.vectorized  input_features, labels, input_length

and with --concatenate_audio, instead of the second, windows of several whole clips each, to train or evaluate on:

    <dataset>.wer_10.0.packed      audio, text, whisper_transcript, labels, input_length, clips (rows of the labelled
                                   dataset) and clip_starts (seconds)
    <dataset>.wer_10.0.packed.vectorized

`input_features` is binary: float16, little-endian, [frames, mels] in C order, only the frames that the clip fills and
the first padded one. `np.frombuffer(value, "<f2").reshape(-1, mels)`, its last frame repeated up to 3,000, is what
`WhisperFeatureExtractor` gives. A clip is dropped when its score, in per cent of Whisper-normalised text, is more than
the threshold. A card, a record (filtering.<config>.<split>.json) and a figure beside the data say what was dropped and
why, and what other thresholds would have kept.

Work is done in shards: the same command again does only what is missing, and another threshold takes the scores and
features of the results that lie beside it. One machine, then one of two with a common file system:

    python run_data_filtering.py -d org/dataset --dataset_config_name tiny --wer_threshold 10
    accelerate launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank 0 --main_process_ip HOST \\
        --main_process_port 29500 run_data_filtering.py -d /shared/dataset --preprocessing_num_workers 32
"""

import argparse
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jiwer
import librosa
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import yaml
from accelerate import PartialState
from datasets import Audio, DownloadManager, Features, List, Value, load_dataset_builder
from huggingface_hub import DatasetCard, HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, WhisperFeatureExtractor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16_000  # Whisper's
HOP_LENGTH = 160  # samples from one log-mel frame to the next; a frame sees 200 samples to either side of its centre
STEP = 320  # samples from one timestamp token to the next: 0.02 s
TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>
UNSPACED = ("ja", "zh", "yue", "th", "lo", "my", "km")  # written without spaces: none counts in the CER
OTHER_THRESHOLDS = (0, 5, 10, 15, 20, 30, 40, 80, 100)  # per cent; in the report
LENGTHS = (1, 8, 16, 32, 64, 128)  # characters; where the report's classes of reference length begin
CLIP_LABEL, WINDOW_LABEL = 128, 256  # tokens; the longest label, where --max_label_length is not given
PACKED_ROWS = 1000  # rows of the input, at least, that are packed together: fewer fill windows less well
SAMPLE = 64  # rows that a dry run works on
HUB_ERRORS = (OSError, HFValidationError, httpx.HTTPError, RuntimeError)  # RuntimeError: Xet's uploads
# Scores that the labeller can leave in columns: flag, column, and the reason given for a drop.
SCORE_COLUMNS = {
    "min_avg_logprob": ("avg_logprob", "mean log-probability under the minimum"),
    "max_compression_ratio": ("compression_ratio", "compression ratio over the maximum"),
    "max_no_speech_prob": ("no_speech_prob", "no-speech probability over the maximum"),
}
# Why a row is not kept; of those that hold, the first in this order is given.
UNUSABLE = (
    *("no label", "label ids outside the vocabulary", "label for another language or task", "malformed label"),
    *("empty reference", "undecodable audio"),
)
LIMITS = ("shorter than the minimum", "longer than the maximum", "label too long", "label repeats itself")
SCORE, KEPT = "score over the threshold", "kept"
REASONS = (*UNUSABLE, *LIMITS, *(reason for _, reason in SCORE_COLUMNS.values()), SCORE, KEPT)
# Arguments that change the data, those that change the windows, and settings on which scores and features depend.
DATA_ARGUMENTS = (
    *("split", "text_column_name", "audio_column_name", "speaker_id_column_name", "task", "shard_size", "seed"),
    *("min_duration_in_seconds", "max_duration_in_seconds", "max_ngram_repeats", *SCORE_COLUMNS),
    *("timestamp_probability", "condition_on_prev_probability"),
)
WINDOW_ARGUMENTS = ("concatenate_seconds", "concatenate_gap_seconds", "concatenate_probability")
REUSE_SETTINGS = (
    *("dataset", "split", "text_column_name", "audio_column_name", "task", "language", "shard_size"),
    *("tokenizer", "feature_extractor"),
)
COLUMNS = {
    "audio": Audio(sampling_rate=SAMPLING_RATE, decode=False),
    "text": Value("string"),
    "whisper_transcript": List(Value("int32")),
    "labels": List(Value("int32")),
    "input_length": Value("int32"),
}
AUDIO_CARD = "`labels` is the decoder sequence, `input_length` the samples at 16 kHz. "
CARDS = {
    "": f"Clips whose teacher label agrees with the reference, to train a student on. {AUDIO_CARD}"
    "`wer` and `cer` compare normalised texts, in per cent.",
    ".packed": f"Windows of several whole clips with silence between them, to train a student on. {AUDIO_CARD}"
    "`clips` are rows of the labelled dataset, `clip_starts` where they begin in the window, in seconds.",
    ".vectorized": "Log-mel features and labels for training. `input_features` is binary: little-endian float16, "
    '`[frames, mels]`, read with `np.frombuffer(value, "<f2").reshape(-1, mels)`. Repeat the last frame up to 3,000.',
}


def boolean(value: str) -> bool:
    """Value of a flag that may stand alone (`--flag`) or carry a value (`--flag False`)."""
    if value.lower() in ("true", "1", "yes"):
        return True
    if value.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")


def fail(message: str) -> NoReturn:
    """End the script with one line for the user: what was wrong, with which value, what to do."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}")


def hub_fail(action: str, error: Exception) -> NoReturn:
    """End the script because the Hub refused something, with the commands that may help."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    reason = lines[0] if lines else type(error).__name__
    fail(
        f"{action} failed: {reason} (check the name, and with `hf auth whoami` the token; `hf auth login` sets another)"
    )


def local_directory(reference: str) -> Path | None:
    """The directory that a repository reference names, or None where it is a Hub id (`org/name`)."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        fail(f"{reference!r} is neither a directory that exists nor a Hub id such as org/name")
    return None


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ---- labels ----------------------------------------------------------------------------------------------------------


class Unusable(ValueError):
    """A label that can't be used; the message is one of `UNUSABLE`."""


@dataclass(frozen=True)
class Tokens:
    """Ids of the special tokens, which are looked up by name."""

    prefix: list[int]  # <|startoftranscript|> <|ja|> <|transcribe|>; only the first for an English-only model
    end: int
    previous: int  # <|startofprev|>
    no_timestamps: int  # the next id is <|0.00|>
    special: frozenset[int]  # all added tokens but the timestamps
    size: int


def find_tokens(tokenizer: Any, prefix: list[str]) -> Tokens:
    """The ids that labels need. Old vocabularies end before the timestamps. Raises KeyError for a name they lack."""
    added = tokenizer.get_added_vocab()
    end, previous, no_timestamps = (added[f"<|{name}|>"] for name in ("endoftext", "startofprev", "notimestamps"))
    special = frozenset(token for token in added.values() if token <= no_timestamps)
    size = max(len(tokenizer), no_timestamps + 1 + TIMESTAMPS)
    return Tokens([added[name] for name in prefix], end, previous, no_timestamps, special, size)


def label_body(label: list[int] | str | None, tokenizer: Any, tokens: Tokens) -> list[int]:
    """Text and timestamp ids of a stored label, without prefix and end; raises `Unusable`."""
    if isinstance(label, str):  # decoded text, with `<|1.08|>` for timestamps and perhaps other special tokens
        added, body = tokenizer.get_added_vocab(), []
        for piece in re.split(r"(<\|[^<>|]*\|>)", label):
            if timestamp := re.fullmatch(r"<\|(\d+\.\d\d)\|>", piece):
                body.append(tokens.no_timestamps + 1 + round(float(timestamp[1]) * SAMPLING_RATE / STEP))
            elif piece and piece not in added:
                body += tokenizer(piece, add_special_tokens=False).input_ids
        label = [*tokens.prefix, *body, tokens.end]
    if not label:
        raise Unusable("no label")
    if min(label) < 0 or max(label) >= tokens.size:
        raise Unusable("label ids outside the vocabulary")
    prefix, body = label[: len(tokens.prefix)], label[len(tokens.prefix) :]
    if prefix != tokens.prefix:
        start = label[0] == tokens.prefix[0]
        raise Unusable("label for another language or task" if start else "malformed label")
    body = body[1:] if body[:1] == [tokens.no_timestamps] else body
    end = body.index(tokens.end) if tokens.end in body else len(body)
    if set(body[end:]) != {tokens.end} or not tokens.special.isdisjoint(body[:end]):
        raise Unusable("malformed label")
    return body[:end]


def text_ids(body: list[int], tokens: Tokens) -> list[int]:
    """The body of a label without its timestamps."""
    return [token for token in body if token <= tokens.no_timestamps]


def build_label(
    body: list[int], text: list[int], previous: list[int], row: int | str, tokens: Tokens, settings: dict
) -> list[int]:
    """Decoder sequence to train on: perhaps a prompt, the prefix, `body` or without its timestamps `text`, the end.

    What is drawn depends on the seed and the row alone. A prompt is the end of the text before: at most half of the
    decoder's positions, as Whisper has it, and no more than `max_label_length` leaves room for.
    """
    draw = random.Random(f"{settings['seed']}, {row}")
    keep_timestamps = draw.random() < settings["timestamp_probability"]
    add_prompt = draw.random() < settings["condition_on_prev_probability"]
    if keep_timestamps and len(body) > len(text_ids(body, tokens)):
        label = [*tokens.prefix, *body, tokens.end]
    else:
        label = [*tokens.prefix, tokens.no_timestamps, *text, tokens.end]
    room = min(settings["max_positions"] // 2, settings["max_label_length"] - len(label)) - 1
    if add_prompt and previous and room > 0:
        label = [tokens.previous, *previous[-room:], *label]
    return label


# ---- scores and features ---------------------------------------------------------------------------------------------


def error_counts(reference: str, hypothesis: str, spaced: bool) -> list[int]:
    """Word errors, words, character errors and characters (of the reference) between two normalised texts."""
    words = jiwer.process_words(reference, hypothesis)
    if not spaced:
        reference, hypothesis = "".join(reference.split()), "".join(hypothesis.split())
    counts = []
    for found in (words, jiwer.process_characters(reference, hypothesis)):
        wrong = found.substitutions + found.deletions
        counts += [wrong + found.insertions, wrong + found.hits]
    return counts


def repeats(text: str, limit: int | None) -> bool:
    """Whether some piece of the text stands more than `limit` times in a row, as in the labels of a looping teacher."""
    return limit is not None and re.search(rf"(.+?)\1{{{limit}}}", "".join(text.split())) is not None


def count_samples(audio: bytes | None) -> int:
    """Length of encoded audio in samples at 16 kHz, from its header; -1 where there is nothing to decode."""
    try:
        header = soundfile.info(io.BytesIO(audio or b""))
    except soundfile.LibsndfileError:
        return -1
    return math.ceil(header.frames * SAMPLING_RATE / header.samplerate) or -1


def decode(audio: bytes, samples: int) -> np.ndarray | None:
    """Mono float32 waveform at 16 kHz; None where it is damaged, not finite, or not as long as its header says."""
    try:
        waveform, rate = soundfile.read(io.BytesIO(audio), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        return None
    waveform = waveform.mean(axis=1)
    if rate != SAMPLING_RATE:
        waveform = librosa.resample(waveform, orig_sr=rate, target_sr=SAMPLING_RATE)
    return waveform if len(waveform) == samples and np.isfinite(waveform).all() else None


def log_mel(waveforms: list[np.ndarray], feature_extractor: WhisperFeatureExtractor) -> list[np.ndarray]:
    """Log-mel [frames, mels] of each clip, float32: the frames that it fills and the first padded one.

    Padding to the longest of these clips instead of 30 s changes no bit: all that lies past a clip's filled frames is
    one constant, and the padded frame that is kept brings that constant into the clip's maximum.
    """
    filled = [math.ceil((len(waveform) + 200) / HOP_LENGTH) + 1 for waveform in waveforms]
    frames = [min(count, feature_extractor.nb_max_frames) for count in filled]
    padded = feature_extractor(waveforms, sampling_rate=SAMPLING_RATE, max_length=max(frames) * HOP_LENGTH)
    return [features[:, :count].T for features, count in zip(padded["input_features"], frames, strict=True)]


def vectorize(audio: list[bytes], samples: list[int], extractor: Any, batch_size: int) -> list[bytes | None]:
    """Stored log-mel of each clip, or without an extractor b""; None where it can't be decoded whole."""
    stored: list[bytes | None] = [None] * len(audio)
    by_length = sorted(range(len(audio)), key=samples.__getitem__)
    for first in range(0, len(audio), batch_size):
        waveforms = {clip: decode(audio[clip], samples[clip]) for clip in by_length[first : first + batch_size]}
        sound = {clip: waveform for clip, waveform in waveforms.items() if waveform is not None}
        features = log_mel(list(sound.values()), extractor) if extractor and sound else [np.empty(0)] * len(sound)
        for clip, values in zip(sound, features, strict=True):
            stored[clip] = values.astype("<f2").tobytes()
    return stored


# ---- windows of several clips ----------------------------------------------------------------------------------------


@dataclass
class Window:
    """Whole clips that are heard one after the other, and the steps of 0.02 s in which they start."""

    alone: bool  # holds one clip, which was drawn to stay alone
    clips: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    steps: int = 0  # taken by clips and silences
    tokens: int = 0


def fill_windows(
    rows: list[int], samples: list[int], tokens: list[int], speakers: list, settings: dict
) -> list[Window]:
    """Put every clip into one window; `rows` number the clips, `tokens` is what each takes of a label.

    In an order drawn by the seed, each clip goes into the fullest window of its speaker that has room for it, so that
    windows fill well but long clips are heard with short ones, as they would not be if sorted by length. The order in a
    window is drawn too. What is drawn for a clip depends on the seed and its row alone.
    """
    steps = [math.ceil(count / STEP) for count in samples]
    capacity, longest_gap = (
        int(settings[name] * SAMPLING_RATE / STEP + 1e-6) for name in ("concatenate_seconds", "concatenate_gap_seconds")
    )
    draws = [random.Random(f"{settings['seed']}, window, {row}") for row in rows]
    order, place, share = ([draw.random() for draw in draws] for _ in range(3))
    gaps = [draw.randint(0, longest_gap) for draw in draws]
    windows, of_speaker = [], defaultdict(list)
    for clip in sorted(range(len(rows)), key=order.__getitem__):
        need = steps[clip] + gaps[clip]
        alone = share[clip] >= settings["concatenate_probability"] or speakers[clip] is None
        room = [
            window
            for window in of_speaker[speakers[clip]]
            if not (alone or window.alone)
            and window.steps + need <= capacity
            and window.tokens + tokens[clip] <= settings["max_label_length"]
        ]
        if not room:
            room = [Window(alone)]
            windows += room
            of_speaker[speakers[clip]] += room
        window = max(room, key=lambda window: window.steps)
        window.clips.append(clip)
        window.steps += need
        window.tokens += tokens[clip]
    for window in windows:
        window.clips.sort(key=place.__getitem__)
        end = -gaps[window.clips[0]]
        for clip in window.clips:
            window.starts.append(end + gaps[clip])
            end = window.starts[-1] + steps[clip]
    return windows


def place_body(body: list[int], start: int, samples: int, tokens: Tokens) -> list[int]:
    """The body of a clip's label on the clock of the window in whose step `start` it begins.

    The clip's own timestamps are shifted and kept within it. Where its text has none before or behind it, that is the
    clip's start or end. A label without text stays out: Whisper has timestamps in pairs, with text between.
    """
    zero, end = tokens.no_timestamps + 1, start + round(samples / STEP)
    text = [place for place, token in enumerate(body) if token < zero]
    if not text:
        return []
    before, after = [zero, *body[: text[0]]][-1], [*body[text[-1] + 1 :], zero + TIMESTAMPS][0]
    timed = [before, *body[text[0] : text[-1] + 1], after]
    return [token if token < zero else zero + min(token - zero + start, end) for token in timed]


def join_texts(texts: list[str], language: str) -> str:
    """Texts one after the other, as the language writes them."""
    return ("" if language in UNSPACED else " ").join(text.strip() for text in texts if text.strip())


def join_ids(parts: list[list[int]], language: str, limit: int, tokenizer: Any, tokens: Tokens) -> list[int]:
    """Ids of texts one after the other: those that the tokenizer gives for the joined text.

    Where it can't (half a character, the spelling of a special token, more than `limit` ids), the texts' own ids.
    """
    texts = tokenizer.batch_decode(parts, clean_up_tokenization_spaces=False)
    joined = " " * texts[0].startswith(" ") + join_texts(texts, language)
    ids = tokenizer(joined, add_special_tokens=False).input_ids
    if len(parts) > 1 and "\ufffd" not in joined and len(ids) <= limit and max(ids, default=0) < tokens.end:
        return ids
    space = [] if language in UNSPACED else tokenizer(" ", add_special_tokens=False).input_ids
    joined = []
    for part, text in zip(parts, texts, strict=True):
        joined += [*(space if joined and not text.startswith(" ") else []), *part]
    return joined


def join_audio(waveforms: list[np.ndarray], starts: list[int]) -> bytes:
    """FLAC of waveforms that start in these steps, silence between them. Loses nothing of what had 16 bits."""
    samples = np.zeros(starts[-1] * STEP + len(waveforms[-1]), np.int16)
    for waveform, start in zip(waveforms, starts, strict=True):
        samples[start * STEP :][: len(waveform)] = np.clip(np.rint(waveform * 32768), -32768, 32767)
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


# ---- shards ----------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What a worker needs to know; it travels to each of them once."""

    settings: dict
    windows: dict | None  # the settings of windows; None: no windows
    groups: list[tuple[int, int, str, int]]  # row groups of the input: first row, row after the last, file, number
    columns: dict[str, str]  # of the input, by role: audio, text, label, and where needed name, speaker and scores
    tokenizer: Any
    tokens: Tokens
    extractor: WhisperFeatureExtractor | None  # None: only filter
    batch_size: int
    cut: Path  # the filtered dataset
    earlier: list[Path]  # the same dataset filtered at other thresholds

    def outputs(self) -> dict[Path, dict]:
        """Directories and their settings."""
        outputs = {self.cut: self.settings} | ({add_suffix(self.cut, "packed"): self.windows} if self.windows else {})
        last = list(outputs)[-1]
        return outputs | ({add_suffix(last, "vectorized"): outputs[last]} if self.extractor else {})

    def steps(self) -> list[tuple[Callable, list[Path]]]:
        """What is done in turn, and the directories that it fills."""
        first, *others = self.outputs()
        return [(filter_shard, [first]), (pack_shard, others)] if self.windows else [(filter_shard, [first, *others])]

    def shards(self, directory: Path) -> range:
        rows = self.outputs().get(directory, self.settings)["shard_size"]  # of the input, that make a shard
        return range(math.ceil(self.groups[-1][1] / rows))

    def path(self, directory: Path, shard: int) -> Path:
        name = f"{self.settings['split']}-{shard:05d}-of-{len(self.shards(directory)):05d}.parquet"
        return directory / self.settings["config"] / name

    def paths(self, directory: Path) -> list[Path]:
        return [self.path(directory, shard) for shard in self.shards(directory)]

    def missing(self, directories: list[Path]) -> list[int]:
        shards = zip(*map(self.paths, directories), strict=True)
        return [number for number, paths in enumerate(shards) if not all(path.exists() for path in paths)]

    def record(self, directory: Path) -> Path:
        return directory / f"filtering.{self.settings['config']}.{self.settings['split']}.json"


def add_suffix(directory: Path, suffix: str) -> Path:
    return directory.with_name(f"{directory.name}.{suffix}")


def open_parquet(path: str) -> pq.ParquetFile:
    """A parquet file on this machine, or on the Hub (`hf://…`)."""
    return pq.ParquetFile(HfFileSystem().open(path) if path.startswith("hf://") else path)


def find_groups(paths: list[str]) -> tuple[list[tuple[int, int, str, int]], str]:
    """The row groups of parquet files, and an identity of the files from their footers, which hold sizes and minima."""
    groups, rows, footers = [], 0, io.BytesIO()
    for path in paths:
        metadata = open_parquet(path).metadata
        metadata.write_metadata_file(footers)
        for number in range(metadata.num_row_groups):
            groups.append((rows, rows + metadata.row_group(number).num_rows, path, number))
            rows = groups[-1][1]
    return groups, hashlib.sha256(footers.getvalue()).hexdigest()[:16]


def read_rows(groups: list[tuple[int, int, str, int]], start: int, stop: int, columns: list[str]) -> pa.Table:
    """Rows `start` to `stop` of the input, or to its end."""
    tables = []
    for first, last, path, number in groups[bisect_right(groups, start, key=lambda group: group[1]) :]:
        if first >= stop:
            break
        table = open_parquet(path).read_row_group(number, columns)
        tables.append(table.slice(max(start - first, 0), min(stop, last) - max(start, first)))
    return pa.concat_tables(tables)


def pick_audio(table: pa.Table, places: dict[int, int]) -> dict[int, dict]:
    """`{bytes, path}` of some rows, of which the table's first column has each at its place."""
    return {row: {key: table[0][place][key].as_py() for key in ("bytes", "path")} for row, place in places.items()}


def write_shard(table: pa.Table, path: Path) -> None:
    """Write a parquet file that appears under its name only when it is whole and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
            if len(table):  # `datasets` can't read a row group without rows
                writer.write_table(table, row_group_size=100)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def make_table(rows: list[dict], types: dict, facts: dict) -> pa.Table:
    """Columns of these types, with facts for `read_facts`."""
    schema = Features(types).arrow_schema
    schema = schema.with_metadata({**schema.metadata, b"kotoba": json.dumps(facts, ensure_ascii=False).encode()})
    return pa.Table.from_pylist(rows, schema)


def read_facts(path: Path) -> dict:
    """What a shard knows of every row of its input, kept or not, or of its windows."""
    return json.loads(pq.read_schema(path).metadata[b"kotoba"])


def read_labels(job: Job, start: int, stop: int) -> list[tuple[list[int], list[int], str | None]]:
    """Of each row: the ids of its text, the label to train on, and why it can't be used, or None.

    A prompt is the text of the row before, where that can be used.
    """
    found, previous, first = [], [], max(start - 1, 0)
    stored = read_rows(job.groups, first, stop, [job.columns["label"]])[0].to_pylist()
    for row, label in enumerate(stored, first):
        try:
            body = label_body(label, job.tokenizer, job.tokens)
            text = text_ids(body, job.tokens)
            found.append((text, build_label(body, text, previous, row, job.tokens, job.settings), None))
            previous = text
        except Unusable as problem:
            found.append(([], [], str(problem)))
            previous = []
    return found[start - first :]


def reason_of(row: dict, settings: dict) -> str:
    """The first reason to drop a row, in the order of `REASONS`, or `KEPT`."""
    tests = {
        row["problem"]: row["problem"] is not None,
        "empty reference": not row["reference"],
        "undecodable audio": row["input_length"] < 0,
        "shorter than the minimum": row["input_length"] < settings["min_duration_in_seconds"] * SAMPLING_RATE,
        "longer than the maximum": row["input_length"] > settings["max_duration_in_seconds"] * SAMPLING_RATE,
        "label too long": row["label_length"] > settings["max_label_length"],
        "label repeats itself": repeats(row["hypothesis"], settings["max_ngram_repeats"]),
    }
    for flag, (column, reason) in SCORE_COLUMNS.items():
        value, limit = row.get(column), settings[flag]
        if value is not None and limit is not None:
            tests[reason] = value < limit if flag.startswith("min") else value > limit
    tests[SCORE] = row[settings["metric"]] > settings["threshold"]
    return next((reason for reason, holds in tests.items() if holds), KEPT)


def judge_rows(job: Job, start: int, table: pa.Table, facts: dict | None) -> tuple[list[dict], dict[int, dict]]:
    """Everything known of each row of a shard, and the audio that had to be read for it.

    Scores and lengths come from the facts of an earlier cut of the dataset if there is one: it knows them of all rows.
    """
    settings, columns = job.settings, job.columns
    spelling = job.tokenizer.english_spelling_normalizer or {}
    normalize = EnglishTextNormalizer(spelling) if settings["language"] == "en" else BasicTextNormalizer()
    labels = read_labels(job, start, start + len(table))
    hypotheses = job.tokenizer.batch_decode([ids for ids, _, _ in labels])
    audio, rows = {}, []
    if not facts:
        audio = read_rows(job.groups, start, start + len(table), [columns["audio"]])
        audio = pick_audio(audio, {row: row for row in range(len(audio))})
    for row, (stored, (_, label, problem)) in enumerate(zip(table.to_pylist(), labels, strict=True)):
        text, speaker = stored[columns["text"]], stored.get(columns.get("speaker"))
        known = {"name": stored.get("name", f"row {start + row}"), "text": text, "labels": label, "problem": problem}
        known |= {"whisper_transcript": stored[columns["label"]], "speaker": speaker and str(speaker)}
        known |= {column: stored.get(column) for column, _ in SCORE_COLUMNS.values()}
        known |= {"reference": normalize(text or "").strip(), "hypothesis": normalize(hypotheses[row]).strip()}
        known["label_length"] = len(label) - (label.index(job.tokens.prefix[0]) if label else 0)  # without a prompt
        if facts:
            samples, counts = facts["input_length"][row], facts["counts"][row]
        else:
            samples, counts = count_samples(audio[row]["bytes"]), [0] * 4
            if known["reference"] and not problem:
                counts = error_counts(known["reference"], known["hypothesis"], settings["language"] not in UNSPACED)
        known |= {"input_length": samples, "counts": counts, "wer": percent(*counts[:2]), "cer": percent(*counts[2:])}
        rows.append(known | {"reason": reason_of(known, settings)})
    return rows, audio


def cut_shard(job: Job, shard: int) -> tuple[pa.Table, list[bytes]]:
    """The rows of a shard that are kept, with the facts on all of its rows, and the features of those kept."""
    columns, extractor = job.columns, None if job.windows else job.extractor
    start, stop = shard * job.settings["shard_size"], (shard + 1) * job.settings["shard_size"]
    table = read_rows(job.groups, start, stop, [name for role, name in columns.items() if role != "audio"])
    source = digest(table.select([columns["text"], columns["label"]]).to_pydict())
    paths = {cut: job.path(cut, shard) for cut in job.earlier}
    earlier = {cut: read_facts(path) for cut, path in paths.items() if path.exists()}
    earlier = {cut: facts for cut, facts in earlier.items() if facts["source"] == source}
    rows, audio = judge_rows(job, start, table, next(iter(earlier.values()), None))
    kept = [row for row, known in enumerate(rows) if known["reason"] == KEPT]

    # Audio and features: from the earlier cut that shares most of what is kept, the rest from the input.
    features: dict[int, bytes | None] = {}
    if cut := max(earlier, key=lambda cut: len(set(kept).intersection(earlier[cut]["kept"])), default=None):
        places = {row: place for place, row in enumerate(earlier[cut]["kept"]) if rows[row]["reason"] == KEPT}
        audio = pick_audio(pq.read_table(paths[cut], columns=["audio"]), places)
        if not extractor:
            features = dict.fromkeys(places, b"")
        elif (path := job.path(add_suffix(cut, "vectorized"), shard)).exists():
            column = pq.read_table(path, columns=["input_features"])[0]
            features = {row: column[place].as_py() for row, place in places.items()}
    if not audio.keys() >= set(kept):
        audio = pick_audio(read_rows(job.groups, start, stop, [columns["audio"]]), {row: row for row in kept})
    new = [row for row in kept if row not in features]
    clips = [audio[row]["bytes"] for row in new], [rows[row]["input_length"] for row in new]
    features |= dict(zip(new, vectorize(*clips, extractor, job.batch_size), strict=True))
    for row in kept:
        rows[row] |= {"audio": audio[row], "reason": "undecodable audio" if features[row] is None else KEPT}
    kept = [row for row in kept if rows[row]["reason"] == KEPT]

    dropped = sorted((row for row in rows if row["reason"] == SCORE), key=lambda row: -row["cer"])
    facts = {
        "source": source,
        "kept": kept,
        "reasons": [REASONS.index(row["reason"]) for row in rows],
        **{key: [row[key] for row in rows] for key in ("counts", "input_length")},
        "unusable": [(row["reason"], row["name"]) for row in rows if row["reason"] in UNUSABLE],
        "worst": [{key: row[key] for key in ("name", "reference", "hypothesis", "wer", "cer")} for row in dropped[:5]],
    }
    types = COLUMNS | {"wer": Value("float64"), "cer": Value("float64")}
    if pa.types.is_string(table[columns["label"]].type):
        types["whisper_transcript"] = Value("string")
    if "speaker" in columns:
        types["speaker"] = Value("string")
    return make_table([rows[row] for row in kept], types, facts), [features[row] for row in kept]


def make_windows(job: Job, shard: int) -> pa.Table:
    """The clips of some filtered shards in windows, and as facts of each: left alone, clips, samples, label length."""
    settings, tokens, size = job.windows, job.tokens, job.settings["shard_size"]
    numbers = job.shards(job.cut)[shard * settings["shard_size"] // size : (shard + 1) * settings["shard_size"] // size]
    paths = {number: job.path(job.cut, number) for number in numbers}
    rows = [number * size + row for number, path in paths.items() for row in read_facts(path)["kept"]]
    clips = pa.concat_tables(map(pq.read_table, paths.values()))
    samples, texts = clips["input_length"].to_pylist(), clips["text"].to_pylist()
    speakers = clips["speaker"].to_pylist() if settings["speaker_id_column_name"] else [""] * len(rows)
    bodies = [label_body(label, job.tokenizer, tokens) for label in clips["whisper_transcript"].to_pylist()]
    counts = [len(place_body(body, 0, 0, tokens)) for body in bodies]
    limit = settings["max_label_length"] - len(tokens.prefix) - 2  # <|notimestamps|>, <|endoftext|>
    windows, facts, previous = [], [], []
    for window in fill_windows(rows, samples, counts, speakers, settings | {"max_label_length": limit}):
        body, waveforms, lengths = [], [], [samples[clip] for clip in window.clips]
        for clip, start in zip(window.clips, window.starts, strict=True):
            body += place_body(bodies[clip], start, samples[clip], tokens)
            waveforms.append(decode(clips["audio"][clip]["bytes"].as_py(), samples[clip]))
        parts = [text_ids(bodies[clip], tokens) for clip in window.clips]
        text = join_ids(parts, settings["language"], limit, job.tokenizer, tokens)
        label = build_label(body, text, previous, f"window {rows[window.clips[0]]}", tokens, settings)
        previous = text or previous
        window_row = {
            "audio": {"bytes": join_audio(waveforms, window.starts), "path": None},
            "text": join_texts([texts[clip] for clip in window.clips], settings["language"]),
            "whisper_transcript": [*tokens.prefix, *body, tokens.end],
            "labels": label,
            "input_length": window.starts[-1] * STEP + lengths[-1],
            "clips": [rows[clip] for clip in window.clips],
            "clip_starts": [round(start * STEP / SAMPLING_RATE, 2) for start in window.starts],
        }
        windows.append(window_row)
        facts.append([window.alone, len(lengths), sum(lengths), len(label)])
    types = COLUMNS | {"clips": List(Value("int32")), "clip_starts": List(Value("float64"))}
    return make_table(windows, types, {"windows": facts})


def vectorize_shard(job: Job, directory: Path, shard: int, features: list[bytes] | None = None) -> None:
    """Write the features of a shard of this directory, unless they are there or not wanted."""
    path = job.path(add_suffix(directory, "vectorized"), shard)
    if not job.extractor or path.exists():
        return
    columns = ["labels", "input_length", *(["audio"] if features is None else [])]
    table = pq.read_table(job.path(directory, shard), columns=columns)
    if features is None:
        audio = [clip["bytes"].as_py() for clip in table["audio"]]
        features = vectorize(audio, table["input_length"].to_pylist(), job.extractor, job.batch_size)
    types = {"input_features": Value("binary"), "labels": List(Value("int32")), "input_length": Value("int32")}
    columns = [pa.array(features, pa.binary()), table["labels"], table["input_length"]]
    write_shard(pa.Table.from_arrays(columns, schema=Features(types).arrow_schema), path)


def filter_shard(job: Job, shard: int) -> None:
    """Write what is missing of a filtered shard, and unless there shall be windows of its features."""
    path, features = job.path(job.cut, shard), None
    if not path.exists():
        table, features = cut_shard(job, shard)
        write_shard(table, path)
    if not job.windows:
        vectorize_shard(job, job.cut, shard, features)


def pack_shard(job: Job, shard: int) -> None:
    """Write what is missing of a shard of windows, whose clips are filtered, and of its features."""
    directory = add_suffix(job.cut, "packed")
    path = job.path(directory, shard)
    if not path.exists():
        write_shard(make_windows(job, shard), path)
    vectorize_shard(job, directory, shard)


JOB: Job | None = None  # of this worker


def start_worker(jobs: multiprocessing.Queue) -> None:
    """Take the job from a queue: among the arguments of a process, a large one keeps the next from being started."""
    global JOB
    JOB = jobs.get()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # don't outlive a killed parent


def work(step: Callable, shard: int) -> None:
    step(JOB, shard)


def run_step(job: Job, step: Callable, shards: list[int], workers: int, show: bool) -> None:
    """Write the shards, each of which is on the disk when the bar counts it."""
    bar = tqdm(total=len(shards), desc=step.__name__, unit="shard", disable=not show)
    if min(workers, len(shards)) <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the workers
        for shard in shards:
            step(job, shard)
            bar.update()
        torch.set_num_threads(threads)
        return
    # Workers are forked from a server that has the libraries and no threads: forked from here, where there are threads,
    # they would deadlock in the extractor, and spawned ones would each import it all.
    libraries = "accelerate datasets jiwer librosa matplotlib.figure transformers.models.auto.tokenization_auto"
    multiprocessing.set_forkserver_preload(libraries.split())
    context = multiprocessing.get_context("forkserver")
    workers, jobs = min(workers, len(shards)), context.Queue()
    jobs.cancel_join_thread()  # not all workers may be started
    for _ in range(workers):
        jobs.put(job)
    pool = ProcessPoolExecutor(workers, context, start_worker, (jobs,))
    try:
        for future in as_completed([pool.submit(work, step, shard) for shard in shards]):
            future.result()
            bar.update()
    except BrokenProcessPool:
        fail("a worker was killed, perhaps for want of memory: run again with fewer --preprocessing_num_workers")
    finally:
        pool.shutdown(cancel_futures=True)  # after the shards in hand


# ---- report ----------------------------------------------------------------------------------------------------------


def summarize(shards: Iterable[dict], settings: dict) -> dict:
    """Counts over all shards (in and out; by reason, reference length and other thresholds), and the worst labels."""
    arrays, worst, unusable = [], [], []
    for facts in shards:
        arrays.append([np.array(facts[key], np.int32) for key in ("reasons", "counts", "input_length")])
        worst += facts["worst"]
        unusable += facts["unusable"]
    codes, counts, samples = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
    reasons, samples = np.array(REASONS)[codes], np.maximum(samples, 0).astype(float)
    kept, comparable = reasons == KEPT, np.isin(reasons, (KEPT, SCORE))
    word_errors, words, character_errors, characters = counts.T
    scores = {
        "wer": 100 * word_errors / np.maximum(words, 1),
        "cer": 100 * character_errors / np.maximum(characters, 1),
    }
    classes = np.digitize(characters, LENGTHS)
    names = [*(f"{low}-{high - 1}" for low, high in pairwise(LENGTHS)), f"{LENGTHS[-1]}+"]
    bins = np.minimum(scores[settings["metric"]][comparable] // 5, 20).astype(int)
    return {
        "clips": [len(kept), int(kept.sum())],
        "hours": [round(float(part.sum()) / SAMPLING_RATE / 3600, 3) for part in (samples, samples[kept])],
        "characters": [int(part.sum()) for part in (characters, characters[kept])],
        "cer_of_kept": round(percent(int(character_errors[kept].sum()), int(characters[kept].sum())), 3),
        "reasons": {reason: int((reasons == reason).sum()) for reason in REASONS if (reasons == reason).any()},
        "by_reference_length": {
            name: [int((classes == number).sum()), int(((classes == number) & kept).sum())]
            for number, name in enumerate(names, 1)
        },
        "other_thresholds": {
            metric: {str(limit): int((comparable & (values <= limit)).sum()) for limit in OTHER_THRESHOLDS}
            for metric, values in scores.items()
        },
        "score_histogram": np.bincount(bins, minlength=21).tolist(),  # classes of 5 per cent, the last one open
        "worst": sorted(worst, key=lambda row: -row["cer"])[:10],
        "unusable": {reason: [name for cause, name in unusable if cause == reason] for reason, _ in unusable},
    }


def summarize_windows(shards: Iterable[dict], settings: dict) -> dict:
    """Windows, clips and labels, and how much of the windows that are not left to one clip is speech, per cent."""
    found = np.array([row for facts in shards for row in facts["windows"]], np.int64).reshape(-1, 4)
    alone, clips, samples, tokens = found.T
    filled = samples[alone == 0] / (settings["concatenate_seconds"] * SAMPLING_RATE)
    return {
        "windows": len(found),
        "clips": int(clips.sum()),
        "clips_left_alone": int(alone.sum()),
        "fill": round(100 * float(filled.sum()) / max(len(filled), 1), 2),
        "label_tokens": [
            round(float(tokens.sum()) / max(len(found), 1), 1),
            int(tokens.max(initial=0)),
        ],  # mean, longest
    }


def describe_windows(windows: dict, settings: dict) -> str:
    mean, longest = windows["label_tokens"]
    return (
        f"{windows['windows']} windows hold {windows['clips']} clips, of which {windows['clips_left_alone']} are left "
        f"alone in theirs; the clips of the others fill {windows['fill']:.1f} % of {settings['concatenate_seconds']:g} "
        f"s in the mean. Labels have {mean} tokens in the mean and at most {longest}: train with `--max_label_length "
        f"{settings['max_label_length']}`."
    )


def exact_match_notice(report: dict, settings: dict) -> str:
    """What a WER threshold means where words are not separated; empty for other languages and for the CER."""
    if settings["metric"] != "wer" or settings["language"] not in UNSPACED:
        return ""
    return (
        f"{settings['language']} is written without spaces, so WER <= {settings['threshold']} is nearly an exact match "
        f"and keeps {report['clips'][1]} of {report['clips'][0]} clips; CER <= 10 (--cer_threshold 10) would keep "
        f"{report['other_thresholds']['cer']['10']}."
    )


def markdown_table(*rows: Iterable) -> str:
    """A Markdown table, the first row of which is its head."""
    lines = ["| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(list(rows[0])) + "|", *lines[1:]])


def describe(record: dict, figure: str) -> str:
    """The report of one configuration and split, in Markdown."""
    report, settings = record["report"], record["settings"]
    parts = [
        f"## {settings['config']}, {settings['split']}",
        f"Kept where {settings['metric'].upper()} <= {settings['threshold']} %; the labels that are kept have a CER of "
        f"{report['cer_of_kept']:.2f} %. {exact_match_notice(report, settings)}",
        markdown_table(
            ("", "in", "out", "%"),
            *((key, *report[key], f"{percent(*report[key][::-1]):.1f}") for key in ("clips", "hours", "characters")),
        ),
        *([describe_windows(report["windows"], settings)] if "windows" in report else []),
        f"![Scores, and keep rate by reference length]({figure})",
        markdown_table(("reason", "clips"), *report["reasons"].items()),
        markdown_table(
            ("characters of the reference", "clips", "kept", "%"),
            *((key, of, kept, f"{percent(kept, of):.1f}") for key, (of, kept) in report["by_reference_length"].items()),
        ),
        markdown_table(
            ("another threshold, %, would keep", *OTHER_THRESHOLDS),
            *((metric.upper(), *kept.values()) for metric, kept in report["other_thresholds"].items()),
        ),
        "The worst labels among the dropped, normalised:",
        markdown_table(
            ("clip", "CER", "reference", "label"),
            *((w["name"], f"{w['cer']:.0f}", w["reference"][:80], w["hypothesis"][:80]) for w in report["worst"]),
        ),
    ]
    return "\n\n".join(parts)


def draw(report: dict, settings: dict, path: Path) -> None:
    """The distribution of the scores, and the share that is kept by reference length."""
    figure = Figure(figsize=(11, 4))
    scores, lengths = figure.subplots(1, 2, gridspec_kw={"left": 0.07, "right": 0.98, "bottom": 0.15, "top": 0.95})
    scores.bar(np.arange(21) * 5, report["score_histogram"], width=5, align="edge")
    scores.axvline(settings["threshold"], color="black", linestyle="--", label="threshold")
    scores.set(xlabel=f"{settings['metric'].upper()}, % (last bar: 100 and more)", ylabel="clips")
    scores.legend()
    classes = report["by_reference_length"]
    lengths.bar(list(classes), [percent(kept, of) for of, kept in classes.values()])
    lengths.set(xlabel="reference length, characters", ylabel="kept, %", ylim=(0, 100))
    figure.savefig(path, format="png", metadata={"Software": None})


def card(directory: Path, text: str | None) -> str:
    """Dataset card with a section for every record in the directory, and for what else the card `text` has."""
    old = DatasetCard(text).data.to_dict() if text else {}
    configs = {entry["config_name"]: entry["data_files"] for entry in old.get("configs", [])}
    sections = {part.partition("\n")[0]: part.strip() for part in re.split(r"(?m)^(?=## )", text or "")[1:]}
    languages = {old["language"]} if isinstance(old.get("language"), str) else set(old.get("language") or [])
    for record_path in sorted(directory.glob("filtering.*.json")):
        record = json.loads(record_path.read_text(encoding="utf-8"))
        if "report" in record:
            config, split = record["settings"]["config"], record["settings"]["split"]
            listed = configs.get(config, [])
            others = [file for file in listed if file["split"] != split] if isinstance(listed, list) else []
            configs[config] = [*others, {"split": split, "path": f"{config}/{split}-*"}]
            section = describe(record, record_path.with_suffix(".png").name)
            sections[section.partition("\n")[0]] = section
            languages.add(record["settings"]["language"])
    head = {"language": sorted(languages), "task_categories": ["automatic-speech-recognition"]}
    head["configs"] = [{"config_name": name, "data_files": files} for name, files in configs.items()]
    about = CARDS[directory.suffix if directory.suffix in CARDS else ""]
    sections = [sections[heading] for heading in sorted(sections)]
    body = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {directory.name}", about, *sections]
    return "\n\n".join(body) + "\n"


# ---- input and output ------------------------------------------------------------------------------------------------


def find_input(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Name of the configuration, and the parquet files of the split: on this machine where they shall be read whole."""
    local = local_directory(args.dataset_name)
    try:
        builder = load_dataset_builder(str(local or args.dataset_name), args.dataset_config_name)
        files = builder.config.data_files or {}
        if args.split not in files:
            fail(f"{args.dataset_name} ({builder.config.name}) has no split {args.split!r}; it has {', '.join(files)}")
        paths = list(files[args.split])
        if not all(path.endswith(".parquet") for path in paths):
            fail(f"{args.dataset_name} is not stored as parquet: push it with `datasets`' push_to_hub")
        if not (args.dry_run or args.skip_filtering):
            paths = DownloadManager().download(paths)
    except (ValueError, *HUB_ERRORS) as error:
        if local:
            fail(f"can't read {args.dataset_name} ({args.dataset_config_name}): {str(error).splitlines()[0]}")
        hub_fail(f"reading {args.dataset_name}", error)
    return builder.config.name, paths


def load_teacher(args: argparse.Namespace) -> tuple[Any, Tokens, WhisperFeatureExtractor, dict]:
    """Tokenizer, special tokens and feature extractor, never the weights, and the settings that follow from them."""
    local_directory(args.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        extractor = WhisperFeatureExtractor.from_pretrained(args.model)
        generation = GenerationConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        hub_fail(f"loading tokenizer, feature extractor and generation config of {args.model}", error)
    language = TO_LANGUAGE_CODE.get(args.language.lower(), args.language.lower())
    multilingual = getattr(generation, "is_multilingual", True)
    if not multilingual and language != "en":
        fail(f"{args.model} knows English only: give --language en, not {args.language}")
    if language == "en" and tokenizer.english_spelling_normalizer is None:
        logger.warning("%s has no normalizer.json: British and American spellings count as different", args.model)
    names = ["<|startoftranscript|>", *([f"<|{language}|>", f"<|{args.task}|>"] if multilingual else [])]
    try:
        tokens = find_tokens(tokenizer, names)
    except KeyError as error:
        fail(f"{args.model} has no token {error}: check --model, --language {args.language} and --task {args.task}")
    for flag in ("max_duration_in_seconds", "concatenate_seconds"):
        if getattr(args, flag) > extractor.chunk_length:
            fail(f"--{flag} {getattr(args, flag)} is over the model's {extractor.chunk_length} s")
    if (args.max_label_length or 0) > generation.max_length:
        fail(f"--max_label_length {args.max_label_length} is over the decoder's {generation.max_length} positions")
    settings = {"language": language, "max_positions": generation.max_length}
    settings["tokenizer"] = digest(tokenizer.backend_tokenizer.to_str())
    settings["feature_extractor"] = digest({k: v for k, v in extractor.to_dict().items() if k != "mel_filters"})
    return tokenizer, tokens, extractor, settings


def name_results(args: argparse.Namespace) -> tuple[dict, Path, str | None]:
    """Metric and threshold, and the directory and Hub id of the filtered dataset (None: has no place on the Hub)."""
    metric = "wer" if args.cer_threshold is None else "cer"
    threshold = args.wer_threshold if metric == "wer" else args.cer_threshold
    local = local_directory(args.dataset_name)
    base = Path(os.path.abspath(local or args.dataset_name.rpartition("/")[2]))
    hub_base = args.hub_model_id or (None if local else args.dataset_name)
    if args.push_to_hub and not hub_base:
        fail("--push_to_hub with a local dataset needs --hub_model_id org/name")
    cut = Path(os.path.abspath(args.output_dir or base.parent)) / f"{base.name}.{metric}_{threshold}"
    return {"metric": metric, "threshold": threshold}, cut, hub_base and f"{hub_base}.{metric}_{threshold}"


def plan(args: argparse.Namespace) -> Job:
    """Load all that the work depends on, and refuse what does not go together."""
    filter_settings, cut, _ = name_results(args)
    tokenizer, tokens, extractor, settings = load_teacher(args)
    config, paths = find_input(args)
    groups, identity = find_groups(paths)
    if not groups or not groups[-1][1]:
        fail(f"{args.dataset_name} ({config}, {args.split}) has no rows")
    there = open_parquet(paths[0]).schema_arrow.names
    columns = {"audio": args.audio_column_name, "text": args.text_column_name, "label": "whisper_transcript"}
    columns |= {"speaker": args.speaker_id_column_name} if args.speaker_id_column_name else {}
    columns |= {column: column for flag, (column, _) in SCORE_COLUMNS.items() if getattr(args, flag) is not None}
    if missing := [name for name in columns.values() if name not in there]:
        fail(f"{args.dataset_name} has no column {missing[0]!r}; it has {', '.join(there)}")
    columns |= {"name": "name"} if "name" in there and "name" not in columns.values() else {}
    settings |= {"dataset": identity, "config": config, **filter_settings}
    settings |= {name: getattr(args, name) for name in DATA_ARGUMENTS}
    settings["max_label_length"] = args.max_label_length or CLIP_LABEL
    windows = None
    if args.concatenate_audio:
        windows = settings | {name: getattr(args, name) for name in WINDOW_ARGUMENTS}
        windows["max_label_length"] = args.max_label_length or min(WINDOW_LABEL, settings["max_positions"])
        windows["shard_size"] *= math.ceil(PACKED_ROWS / settings["shard_size"])
    extractor = None if args.skip_logmel else extractor
    batch = args.preprocessing_batch_size
    job = Job(settings, windows, groups, columns, tokenizer, tokens, extractor, batch, cut, [])
    suffix = f".{settings['metric']}_{settings['threshold']}"
    for path in sorted(cut.parent.glob(f"{cut.name.removesuffix(suffix)}.[cw]er_*")):
        if path != cut and path.suffix not in CARDS and job.record(path).exists():
            old = json.loads(job.record(path).read_text(encoding="utf-8"))["settings"]
            job.earlier += [path] if all(old.get(key) == settings[key] for key in REUSE_SETTINGS) else []
    return job


def write_record(path: Path, record: dict) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(partial, path)


def open_outputs(job: Job, overwrite: list[Path], check: bool = False) -> None:
    """Make the output directories and their records, those in `overwrite` afresh; refuse those of other settings.

    `check` only refuses.
    """
    for directory, settings in job.outputs().items():
        record, shards = job.record(directory), [path for path in job.paths(directory) if path.exists()]
        if directory in overwrite and not check:
            for file in (*record.parent.glob(f"{settings['config']}/{settings['split']}-*.parquet"), record):
                file.unlink(missing_ok=True)
        elif directory not in overwrite and record.exists():
            old = json.loads(record.read_text(encoding="utf-8"))["settings"]
            for key, value in settings.items():
                if old.get(key) != value:
                    fail(f"{directory} has {key} {old.get(key)}, not {value}; --overwrite_output_dir starts afresh")
        elif directory not in overwrite and shards:
            fail(f"{directory} has shards but no {record.name}; --overwrite_output_dir starts afresh")
        if check:
            continue
        (directory / settings["config"]).mkdir(parents=True, exist_ok=True)
        if not record.exists():
            write_record(record, {"stage": "filtering", "status": "running", "settings": settings})


def push_again(push: Callable[[], object]) -> None:
    """Push, and again where another push to the same repository came between, which the Hub answers with 409 or 412."""
    for waits in (1, 2, 4, 0):  # seconds, about
        try:
            push()
            return
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412) or not waits:
                raise
        time.sleep(waits * random.uniform(0.5, 1))


def push(directory: Path, repository: str, settings: dict) -> None:
    """Upload shards, record and figure, then a card that keeps what else the repository has."""
    api, split = HfApi(), f"{settings['config']}/{settings['split']}-*"
    message = f"Add {settings['config']}, {settings['split']}"
    to = {"repo_id": repository, "repo_type": "dataset", "commit_message": message}
    ignored = [".*", "*.partial", "README.md"]

    def push_card() -> None:
        head = api.dataset_info(repository).sha
        try:
            path = api.hf_hub_download(repository, "README.md", repo_type="dataset", revision=head)
            text = Path(path).read_text(encoding="utf-8")
        except EntryNotFoundError:
            text = None
        text = card(directory, text)
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", parent_commit=head, **to)

    push_again(lambda: api.upload_folder(folder_path=directory, delete_patterns=[split], ignore_patterns=ignored, **to))
    push_again(push_card)


def find_repositories(args: argparse.Namespace, job: Job) -> dict[Path, str]:
    """The repository that each output is pushed to; none stays local."""
    repository = name_results(args)[2]
    if args.push_to_hub is False or not repository:
        return {}
    outputs = list(job.outputs())[1 if args.skip_filtering else 0 :]
    return {output: repository + output.name.removeprefix(job.cut.name) for output in outputs}


def create_repositories(job: Job, repositories: dict[Path, str], private: bool) -> None:
    """Make the repositories before the work, which proves the token, and read what they say of other splits."""
    for directory, repository in repositories.items():
        own = f"{job.record(directory).stem}.*"
        wanted = {"allow_patterns": ["README.md", "filtering.*"], "ignore_patterns": own}
        try:
            HfApi().create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
            snapshot_download(repository, repo_type="dataset", local_dir=directory, **wanted)
        except HUB_ERRORS as error:
            hub_fail(f"preparing {repository}", error)


def find_filtered(args: argparse.Namespace, job: Job) -> None:
    """With --skip_filtering, make sure of the filtered dataset, which is fetched from the Hub if it is there."""
    repository = name_results(args)[2]
    if not args.dry_run and job.missing([job.cut]) and repository and not local_directory(args.dataset_name):
        wanted = [job.record(job.cut).name, *(str(path.relative_to(job.cut)) for path in job.paths(job.cut))]
        try:
            snapshot_download(repository, repo_type="dataset", local_dir=job.cut, allow_patterns=wanted)
        except HUB_ERRORS as error:
            hub_fail(f"downloading {repository}", error)
    if not args.dry_run and job.missing([job.cut]):
        fail(f"--skip_filtering, but {job.cut} has not all shards of {job.record(job.cut).stem}: filter first")


def preview(args: argparse.Namespace, job: Job, repositories: dict[Path, str], workers: int) -> int:
    """Print what a run would read, write and push, and how long it would take from a sample, in a temporary place."""
    settings, rows = job.settings, job.groups[-1][1]
    count = min(rows, SAMPLE)
    try:
        if repositories:
            HfApi().whoami()
    except HUB_ERRORS as error:
        hub_fail("logging in to push", error)
    sizes, seconds = {}, 0.0
    with tempfile.TemporaryDirectory() as directory:
        path, size = str(Path(directory, "sample.parquet")), {"shard_size": count}
        first = (rows - count) // 2
        pq.write_table(read_rows(job.groups, first, first + count, list(job.columns.values())), path)
        sample = replace(job, settings=settings | size, windows=job.windows and job.windows | size, earlier=[])
        sample = replace(sample, groups=find_groups([path])[0], cut=Path(directory, "sample"))
        open_outputs(sample, [])
        for (step, written), (_, outputs) in zip(sample.steps(), job.steps(), strict=True):
            started = time.monotonic()
            step(sample, 0)
            share = len(job.missing(outputs)) / len(job.shards(outputs[0]))
            seconds += (time.monotonic() - started) / count * rows * share
            sizes |= {o: sample.path(w, 0).stat().st_size / count for w, o in zip(written, outputs, strict=True)}
        facts = read_facts(sample.path(sample.cut, 0))
    hours = sum(max(samples, 0) for samples in facts["input_length"]) / count * rows / SAMPLING_RATE / 3600
    lines = [f"input: {args.dataset_name} ({settings['config']}, {settings['split']}), {rows} clips, {hours:.2f} h"]
    if remote := [path for path in {group[2] for group in job.groups} if path.startswith("hf://")]:
        lines.append(f"download: {sum(HfFileSystem().size(path) for path in remote) / 1e6:.1f} MB")
    lines.append(f"keeps: {percent(len(facts['kept']), count):.0f} % of a sample of {count} clips")
    lines += [f"reuses: {path}" for path in job.earlier]
    for output, row_size in sizes.items():
        shards, missing = len(job.shards(output)), len(job.missing([output]))
        lines.append(f"done: {shards - missing} of {shards} shards of {output}")
        lines.append(f"writes: {output}, about {row_size * rows * missing / shards / 1e6:.1f} MB")
    private = " (private)" if args.hub_private_repo else ""
    lines += [f"pushes: {name}{private}" for name in repositories.values()] or ["pushes: nothing"]
    minutes = f"{seconds / workers / 60:.1f} min on {workers} cores"
    print(*lines, f"time: about {minutes} (from a sample of {count} clips)", sep="\n")
    return 0


def finish(job: Job, args: argparse.Namespace, repositories: dict[Path, str], new: int, seconds: float) -> int:
    """Write record, figure and card of what lies on the disk, and push it."""
    settings, outputs = job.settings, job.outputs()
    for directory in outputs:
        if missing := job.missing([directory]):
            fail(f"shard {missing[0]} of {directory} is missing: do all machines see it? The same command makes it")
    report = summarize(map(read_facts, job.paths(job.cut)), settings)
    clips, kept = report["clips"]
    libraries = ("datasets", "jiwer", "librosa", "numpy", "pyarrow", "soundfile", "torch", "transformers")
    record = {"stage": "filtering", "status": "complete", "arguments": vars(args), "seconds": round(seconds, 1)}
    record |= {"clips_per_second": round(min(new * settings["shard_size"], clips) / seconds, 1)}
    record |= {"versions": {name: version(name) for name in libraries}}
    for directory, own_settings in outputs.items():
        path = job.record(directory)
        if own_settings is job.windows and "windows" not in report:
            packed = job.paths(add_suffix(job.cut, "packed"))
            report = report | {"windows": summarize_windows(map(read_facts, packed), job.windows)}
            logger.info(describe_windows(report["windows"], job.windows))
        if json.loads(path.read_text(encoding="utf-8"))["status"] == "running":
            write_record(path, record | {"settings": own_settings, "report": report})
        draw(report, settings, path.with_suffix(".png"))
        readme = directory / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.exists() else None
        readme.write_text(card(directory, text), encoding="utf-8")
    logger.info("kept %d of %d clips, %.3f of %.3f h: %s", kept, clips, *report["hours"][::-1], report["reasons"])
    logger.info("in %s", " and ".join(map(str, outputs)))
    if notice := exact_match_notice(report, settings):
        logger.warning(notice)
    if sum(report["reasons"].get(reason, 0) for reason in UNUSABLE) == clips:
        fail(f"none of the {clips} rows can be used: {report['reasons']}; nothing is pushed")
    if not kept:
        fail(
            f"{settings['metric'].upper()} <= {settings['threshold']} keeps none of {clips} clips; CER <= 10 would "
            f"keep {report['other_thresholds']['cer']['10']}. Nothing is pushed"
        )
    for directory, repository in repositories.items():
        try:
            push(directory, repository, settings)
        except HUB_ERRORS as error:
            hub_fail(f"{directory} is complete; pushing it to {repository} (the same command tries again)", error)
        logger.info("pushed to %s", repository)
    return 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    add = parser.add_argument_group("input").add_argument
    add("-d", "--dataset_name", required=True, help="labelled dataset, a local directory or a Hub id")
    add("--dataset_config_name", help="configuration of the dataset; needed where it has several")
    add("--split", default="train", help="split of the dataset")
    add("--text_column_name", default="transcription", help="column with the reference texts")
    add("--audio_column_name", default="audio", help="column with the audio")
    add("--speaker_id_column_name", help="column with the speakers, so that a window has one (None: any)")
    add("--model", default="openai/whisper-large-v3", help="teacher, for its tokenizer and feature extractor")
    add("--language", default="ja", help="language of the labels, a Whisper code or name")
    add("--task", default="transcribe", choices=("transcribe", "translate"), help="task of the labels")
    add = parser.add_argument_group("what is kept").add_argument
    add("--wer_threshold", type=float, default=10.0, help="highest WER that is kept, per cent")
    add("--cer_threshold", type=float, help="highest CER that is kept, per cent, instead of a WER")
    add("--min_duration_in_seconds", type=float, default=0.0, help="shortest clip that is kept")
    add("--max_duration_in_seconds", type=float, default=30.0, help="longest clip that is kept")
    add("--max_label_length", type=int, help="longest label, in tokens with special ones (None: 128, of a window 256)")
    add("--max_ngram_repeats", type=int, help="most times that a piece of a label may stand in a row")
    for name, (column, _) in SCORE_COLUMNS.items():
        add(f"--{name}", type=float, help=f"{name[:3]}imum of the column {column}, which the labeller can write")
    add = parser.add_argument_group("labels").add_argument
    add("--timestamp_probability", type=float, default=0.2, help="share of the labels with timestamps that keep them")
    add("--condition_on_prev_probability", type=float, default=0.0, help="share with the row before as prompt")
    add("--seed", type=int, default=42, help="seed of all draws")
    add = parser.add_argument_group("windows").add_argument
    add("--concatenate_audio", default=False, **flag, help="pack clips into windows of several")
    add("--concatenate_seconds", type=float, default=30.0, help="longest window")
    add("--concatenate_gap_seconds", type=float, default=0.4, help="silence between clips is drawn from 0 to this")
    add("--concatenate_probability", type=float, default=1.0, help="share of the clips that are packed with others")
    add = parser.add_argument_group("work").add_argument
    add("--skip_filtering", default=False, **flag, help="vectorise what an earlier run has filtered")
    add("--skip_logmel", default=False, **flag, help="filter only")
    add("--preprocessing_num_workers", type=int, default=len(os.sched_getaffinity(0)), help="processes on this machine")
    add("--preprocessing_batch_size", type=int, default=8, help="clips whose features are computed together")
    add("--shard_size", type=int, default=1000, help="rows of the input that make one shard")
    add = parser.add_argument_group("output").add_argument
    add(
        "--output_dir",
        type=os.path.expanduser,
        help="where the results go (None: beside a local dataset, else the current directory)",
    )
    add("--overwrite_output_dir", default=False, **flag, help="start afresh")
    add("--push_to_hub", default=None, **flag, help="push the results (None: where the dataset is on the Hub)")
    add("--hub_model_id", help="Hub id to which .wer_10.0 and .wer_10.0.vectorized are added (None: the dataset's)")
    add("--hub_private_repo", default=True, **flag, help="make new repositories private")
    add("--dry_run", default=False, **flag, help="change nothing, and say what a run would do and how long it takes")
    args = parser.parse_args(argv)
    for name in ("timestamp_probability", "condition_on_prev_probability", "concatenate_probability"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)} is not between 0 and 1")
    if not 0 <= args.concatenate_gap_seconds < args.concatenate_seconds:
        parser.error(f"--concatenate_gap_seconds {args.concatenate_gap_seconds} is not between 0 and a window's length")
    for name in ("preprocessing_num_workers", "preprocessing_batch_size", "shard_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is less than 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    state = PartialState(cpu=True, timeout=timedelta(days=30))
    level = logging.INFO if state.is_main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    started = time.monotonic()
    workers = max(1, args.preprocessing_num_workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        if args.dry_run and not state.is_main_process:
            return 0
        with nullcontext() if args.dry_run else state.main_process_first():
            job = plan(args)
            if args.skip_filtering and state.is_main_process:
                find_filtered(args, job)
            afresh = args.overwrite_output_dir and state.is_main_process
            overwrite = list(job.outputs())[1 if args.skip_filtering else 0 :] if afresh else []
            open_outputs(job, overwrite, check=True)
            repositories = find_repositories(args, job)
            if args.dry_run:
                return preview(args, job, repositories, workers * state.num_processes)
            if state.is_main_process:
                create_repositories(job, repositories, args.hub_private_repo)
            open_outputs(job, overwrite)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        new = len(job.missing(job.steps()[0][1]))
        for step, directories in job.steps():
            size = job.outputs()[directories[0]]["shard_size"]
            turn = (job.windows or job.settings)["shard_size"] // size  # what is packed together falls to one process
            missing = job.missing(directories)
            mine = [shard for shard in missing if shard // turn % state.num_processes == state.process_index]
            run_step(job, step, mine, workers, state.is_main_process and bool(mine))
        state.wait_for_everyone()
        if not state.is_main_process:
            return 0
        return finish(job, args, repositories, new, time.monotonic() - started)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        fail(f"{error}: what is done stays; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
