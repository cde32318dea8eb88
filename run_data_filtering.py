#!/usr/bin/env python
"""Keep the clips whose teacher label agrees with the reference, and store what the student trains on.

In: a labelled dataset, as run_pseudo_labelling.py writes it: a local directory or a Hub id, with the columns `audio`,
a reference text and `whisper_transcript`. Out, beside a local dataset, or in --output_dir and on the Hub for one that
is there (`.cer_10.0` with `--cer_threshold 10`):

    <dataset>.wer_10.0             audio, text, whisper_transcript, labels, input_length (samples at 16 kHz), wer, cer
    <dataset>.wer_10.0.vectorized  input_features, labels, input_length

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
import errno
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
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
from datasets import Audio, Features, List, Value, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, metadata_load, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, WhisperFeatureExtractor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16_000  # Whisper's
HOP_LENGTH = 160  # samples from one log-mel frame to the next; a frame sees 200 samples to either side of its centre
TIMESTAMP_STEP = 0.02  # seconds from one timestamp token to the next
TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>
UNSPACED = ("ja", "zh", "yue", "th", "lo", "my", "km")  # written without spaces: none counts in the CER
OTHER_THRESHOLDS = (0, 5, 10, 15, 20, 30, 40, 80, 100)  # per cent; in the report
LENGTHS = (1, 8, 16, 32, 64, 128)  # characters; where the report's classes of reference length begin
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
# What takes long to import, for the server that the workers are forked from.
PRELOAD = [
    "accelerate",
    "datasets",
    "jiwer",
    "librosa",
    "matplotlib.figure",
    "transformers.models.auto.tokenization_auto",
]
# Arguments that change the data, and those settings on which scores, lengths and features depend.
DATA_ARGUMENTS = (
    *("split", "text_column_name", "audio_column_name", "task", "shard_size", "seed", "max_label_length"),
    *("min_duration_in_seconds", "max_duration_in_seconds", "max_ngram_repeats", *SCORE_COLUMNS),
    *("timestamp_probability", "condition_on_prev_probability"),
)
REUSE_SETTINGS = (
    *("dataset", "split", "text_column_name", "audio_column_name", "task", "language", "shard_size"),
    *("tokenizer", "feature_extractor"),
)
CARD = {
    "": "Clips whose teacher label agrees with the reference, to train a student on. `labels` is the decoder sequence, "
    "`input_length` the samples at 16 kHz; `wer` and `cer` compare normalised texts, in per cent.",
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
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
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
                body.append(tokens.no_timestamps + 1 + round(float(timestamp[1]) / TIMESTAMP_STEP))
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


def build_label(body: list[int], previous: list[int], row: int, tokens: Tokens, settings: dict) -> list[int]:
    """Decoder sequence to train on: perhaps a prompt, the prefix, text with or without timestamps, the end.

    What is drawn depends on the seed and the row alone. A prompt is the end of the text before: at most half of the
    decoder's positions, as Whisper has it, and no more than `max_label_length` leaves room for.
    """
    draw = random.Random(f"{settings['seed']}, {row}")
    keep_timestamps = draw.random() < settings["timestamp_probability"]
    add_prompt = draw.random() < settings["condition_on_prev_probability"]
    text = text_ids(body, tokens)
    if keep_timestamps and len(text) < len(body):
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


# ---- shards ----------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What a worker needs to know; it travels to each of them once."""

    settings: dict
    groups: list[tuple[int, int, Path, int]]  # row groups of the input: first row, row after the last, file, number
    columns: dict[str, str]  # of the input, by role: audio, text, label, and where needed name and the teacher's scores
    tokenizer: Any
    tokens: Tokens
    extractor: WhisperFeatureExtractor | None  # None: only filter
    batch_size: int
    cut: Path  # the filtered dataset
    earlier: list[Path]  # the same dataset filtered at other thresholds

    def outputs(self) -> list[Path]:
        return [self.cut, vectorized(self.cut)] if self.extractor else [self.cut]

    def shards(self) -> range:
        return range(math.ceil(self.groups[-1][1] / self.settings["shard_size"]))

    def path(self, directory: Path, shard: int) -> Path:
        split = self.settings["split"]
        return directory / self.settings["config"] / f"{split}-{shard:05d}-of-{len(self.shards()):05d}.parquet"

    def missing(self) -> list[int]:
        return [i for i in self.shards() if not all(self.path(directory, i).exists() for directory in self.outputs())]


def vectorized(cut: Path) -> Path:
    return cut.with_name(f"{cut.name}.vectorized")


def find_groups(paths: list[Path]) -> tuple[list[tuple[int, int, Path, int]], str]:
    """The row groups of parquet files, and an identity of the files from their footers, which hold sizes and minima."""
    groups, rows, identity = [], 0, hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            metadata = pq.read_metadata(file)
            file.seek(-8 - metadata.serialized_size, os.SEEK_END)
            identity.update(file.read())
        for number in range(metadata.num_row_groups):
            groups.append((rows, rows + metadata.row_group(number).num_rows, path, number))
            rows = groups[-1][1]
    return groups, identity.hexdigest()[:16]


def read_rows(groups: list[tuple[int, int, Path, int]], start: int, stop: int, columns: list[str]) -> pa.Table:
    """Rows `start` to `stop` of the input, or to its end."""
    tables = []
    for first, last, path, number in groups[bisect_right(groups, start, key=lambda group: group[1]) :]:
        if first >= stop:
            break
        table = pq.ParquetFile(path).read_row_group(number, columns)
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


def read_facts(path: Path) -> dict:
    """What a shard knows of every row of its input, kept or not."""
    return json.loads(pq.read_schema(path).metadata[b"kotoba"])


def read_labels(job: Job, start: int, stored: list) -> list[tuple[list[int], list[int], str | None]]:
    """Of each row from `start` on: the ids of its text, the label to train on, and why it can't be used, or None."""
    found, previous, row = [], [], start
    while not previous and row > 0:  # the nearest row before whose label says something, in whichever shard
        row -= 1
        with suppress(Unusable):
            label = read_rows(job.groups, row, row + 1, [job.columns["label"]])[0][0].as_py()
            previous = text_ids(label_body(label, job.tokenizer, job.tokens), job.tokens)
    for row, label in enumerate(stored, start):
        try:
            body = label_body(label, job.tokenizer, job.tokens)
            found.append((text_ids(body, job.tokens), build_label(body, previous, row, job.tokens, job.settings), None))
            previous = found[-1][0] or previous
        except Unusable as problem:
            found.append(([], [], str(problem)))
    return found


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


def judge_rows(job: Job, shard: int, table: pa.Table, earlier: dict[Path, dict]) -> tuple[list[dict], dict[int, dict]]:
    """Everything known of each row of a shard, and the audio that had to be read for it.

    Scores and lengths come from an earlier cut of the dataset if there is one: it knows them of all rows.
    """
    settings, columns = job.settings, job.columns
    start = shard * settings["shard_size"]
    spelling = job.tokenizer.english_spelling_normalizer or {}
    normalize = EnglishTextNormalizer(spelling) if settings["language"] == "en" else BasicTextNormalizer()
    stored = table[columns["label"]].to_pylist()
    labels = read_labels(job, start, stored)
    hypotheses = job.tokenizer.batch_decode([ids for ids, _, _ in labels])
    names = table["name"].to_pylist() if "name" in columns else [f"row {start + row}" for row in range(len(table))]
    rows = []
    for row, (_, label, problem) in enumerate(labels):
        text = table[columns["text"]][row].as_py()
        prompt = label.index(job.tokens.prefix[0]) if label else 0
        known = {"name": names[row], "text": text, "whisper_transcript": stored[row], "labels": label}
        known |= {column: table[column][row].as_py() for column, _ in SCORE_COLUMNS.values() if column in columns}
        known |= {"reference": normalize(text or "").strip(), "hypothesis": normalize(hypotheses[row]).strip()}
        rows.append({**known, "problem": problem, "label_length": len(label) - prompt})
    audio = {}
    if earlier:
        facts = next(iter(earlier.values()))
        lengths, counts = facts["input_length"], facts["counts"]
    else:
        audio = read_rows(job.groups, start, start + len(table), [columns["audio"]])
        audio = pick_audio(audio, {row: row for row in range(len(audio))})
        lengths = [count_samples(clip["bytes"]) for clip in audio.values()]
        spaced = settings["language"] not in UNSPACED
        counts = [
            error_counts(row["reference"], row["hypothesis"], spaced)
            if row["reference"] and not row["problem"]
            else [0] * 4
            for row in rows
        ]
    for row, samples, errors in zip(rows, lengths, counts, strict=True):
        row |= {"input_length": samples, "counts": errors, "wer": percent(*errors[:2]), "cer": percent(*errors[2:])}
        row["reason"] = reason_of(row, settings)
    return rows, audio


def cut_shard(job: Job, shard: int) -> tuple[pa.Table, list[bytes]]:
    """The rows of a shard that are kept, with the facts on all of its rows, and the features of those kept."""
    columns = job.columns
    start, stop = shard * job.settings["shard_size"], (shard + 1) * job.settings["shard_size"]
    table = read_rows(job.groups, start, stop, [name for role, name in columns.items() if role != "audio"])
    source = digest(table.select([columns["text"], columns["label"]]).to_pydict())
    earlier = {cut: read_facts(job.path(cut, shard)) for cut in job.earlier if job.path(cut, shard).exists()}
    earlier = {cut: facts for cut, facts in earlier.items() if facts["source"] == source}
    rows, audio = judge_rows(job, shard, table, earlier)
    kept = [row for row, known in enumerate(rows) if known["reason"] == KEPT]

    # Audio and features: from the earlier cut that shares most of what is kept, the rest from the input.
    features: dict[int, bytes | None] = {}
    if cut := max(earlier, key=lambda cut: len(set(kept).intersection(earlier[cut]["kept"])), default=None):
        places = {row: place for place, row in enumerate(earlier[cut]["kept"]) if rows[row]["reason"] == KEPT}
        audio = pick_audio(pq.read_table(job.path(cut, shard), columns=["audio"]), places)
        if not job.extractor:
            features = dict.fromkeys(places, b"")
        elif (path := job.path(vectorized(cut), shard)).exists():
            column = pq.read_table(path, columns=["input_features"])[0]
            features = {row: column[place].as_py() for row, place in places.items()}
    if not audio.keys() >= set(kept):
        audio = pick_audio(read_rows(job.groups, start, stop, [columns["audio"]]), {row: row for row in kept})
    new = [row for row in kept if row not in features]
    clips = [audio[row]["bytes"] for row in new], [rows[row]["input_length"] for row in new]
    features |= dict(zip(new, vectorize(*clips, job.extractor, job.batch_size), strict=True))
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
    text_label = pa.types.is_string(table[columns["label"]].type)
    types = {
        "audio": Audio(sampling_rate=SAMPLING_RATE, decode=False),
        "text": Value("string"),
        "whisper_transcript": Value("string") if text_label else List(Value("int32")),
        "labels": List(Value("int32")),
        "input_length": Value("int32"),
        "wer": Value("float64"),
        "cer": Value("float64"),
    }
    schema = Features(types).arrow_schema
    schema = schema.with_metadata({**schema.metadata, b"kotoba": json.dumps(facts, ensure_ascii=False).encode()})
    arrays = [pa.array([rows[row][field.name] for row in kept], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema), [features[row] for row in kept]


def filter_shard(job: Job, shard: int) -> None:
    """Write what is missing of a shard."""
    path, features = job.path(job.cut, shard), None
    if path.exists():
        table = pq.read_table(path)
    else:
        table, features = cut_shard(job, shard)
        write_shard(table, path)
    path = job.path(vectorized(job.cut), shard)
    if job.extractor and not path.exists():
        if features is None:
            audio = [clip["bytes"].as_py() for clip in table["audio"]]
            features = vectorize(audio, table["input_length"].to_pylist(), job.extractor, job.batch_size)
        types = {"input_features": Value("binary"), "labels": List(Value("int32")), "input_length": Value("int32")}
        columns = [pa.array(features, pa.binary()), table["labels"], table["input_length"]]
        write_shard(pa.Table.from_arrays(columns, schema=Features(types).arrow_schema), path)


JOB: Job | None = None  # of this worker


def start_worker(path: str) -> None:
    """Take the job from a file: among the arguments of a process, a large one keeps the next from being started."""
    global JOB
    JOB = pickle.loads(Path(path).read_bytes())
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # don't outlive a killed parent


def work(shard: int) -> None:
    filter_shard(JOB, shard)


def filter_shards(job: Job, shards: list[int], workers: int, show: bool) -> None:
    """Write the shards, each of which is on the disk when the bar counts it."""
    if not shards:
        return
    bar = tqdm(total=len(shards), desc="filtering", unit="shard", disable=not show)
    if min(workers, len(shards)) <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the workers
        for shard in shards:
            filter_shard(job, shard)
            bar.update()
        torch.set_num_threads(threads)
        return
    # Workers are forked from a server that has the libraries and no threads: forked from here, where there are threads,
    # they would deadlock in the extractor, and spawned ones would each import it all.
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.NamedTemporaryFile() as file:
        pickle.dump(job, file)
        file.flush()
        context = multiprocessing.get_context("forkserver")
        pool = ProcessPoolExecutor(min(workers, len(shards)), context, start_worker, (file.name,))
        try:
            for future in as_completed([pool.submit(work, shard) for shard in shards]):
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
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
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


def write_card(directory: Path) -> None:
    """Dataset card with a section for every record in the directory; keeps configurations that an older card lists."""
    path = directory / "README.md"
    old = (metadata_load(path) or {}) if path.exists() else {}
    configs = {entry["config_name"]: entry["data_files"] for entry in old.get("configs", [])}
    sections, languages = [], set()
    for record_path in sorted(directory.glob("filtering.*.json")):
        record = json.loads(record_path.read_text(encoding="utf-8"))
        if "report" in record:
            config, split = record["settings"]["config"], record["settings"]["split"]
            listed = configs.get(config, [])
            others = [file for file in listed if file["split"] != split] if isinstance(listed, list) else []
            configs[config] = [*others, {"split": split, "path": f"{config}/{split}-*"}]
            sections.append(describe(record, record_path.with_suffix(".png").name))
            languages.add(record["settings"]["language"])
    head = {"language": sorted(languages), "task_categories": ["automatic-speech-recognition"]}
    head["configs"] = [{"config_name": name, "data_files": files} for name, files in configs.items()]
    about = CARD[".vectorized" if directory.suffix == ".vectorized" else ""]
    body = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {directory.name}", about, *sections]
    path.write_text("\n\n".join(body) + "\n", encoding="utf-8")


# ---- input and output ------------------------------------------------------------------------------------------------


def find_input(args: argparse.Namespace) -> tuple[str, list[Path]]:
    """Name of the configuration, and the parquet files of the split, on this machine."""
    local = local_directory(args.dataset_name)
    try:
        builder = load_dataset_builder(str(local or args.dataset_name), args.dataset_config_name)
    except DatasetNotFoundError as error:
        hub_fail(f"reading {args.dataset_name}", error)
    except (ValueError, FileNotFoundError) as error:
        fail(f"can't read {args.dataset_name} ({args.dataset_config_name}): {str(error).splitlines()[0]}")
    except HUB_ERRORS as error:
        hub_fail(f"reading {args.dataset_name}", error)
    files = builder.config.data_files or {}
    if args.split not in files:
        fail(f"{args.dataset_name} ({builder.config.name}) has no split {args.split!r}; it has {', '.join(files)}")
    paths = files[args.split]
    if not all(path.endswith(".parquet") for path in paths):
        fail(f"{args.dataset_name} is not stored as parquet: push it with `datasets`' push_to_hub, which stores it so")
    if not local:
        places = [re.fullmatch(r"hf://datasets/[^@]+@([^/]+)/(.+)", path) for path in paths]
        try:
            root = snapshot_download(
                args.dataset_name,
                repo_type="dataset",
                revision=places[0][1],
                allow_patterns=[place[2] for place in places],
            )
        except HUB_ERRORS as error:
            hub_fail(f"downloading {args.dataset_name}", error)
        paths = [Path(root, place[2]) for place in places]
    return builder.config.name, [Path(path) for path in paths]


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
    if args.max_duration_in_seconds > extractor.chunk_length:
        fail(f"--max_duration_in_seconds {args.max_duration_in_seconds} is over the model's {extractor.chunk_length} s")
    if args.max_label_length > generation.max_length:
        fail(f"--max_label_length {args.max_label_length} is over the decoder's {generation.max_length} positions")
    return (
        *(tokenizer, tokens, extractor),
        {
            "language": language,
            "max_positions": generation.max_length,
            "tokenizer": digest(tokenizer.backend_tokenizer.to_str()),
            "feature_extractor": digest({k: v for k, v in extractor.to_dict().items() if k != "mel_filters"}),
        },
    )


def name_results(args: argparse.Namespace) -> tuple[str, float, Path, str | None]:
    """Metric, threshold, and the directory and Hub id of the filtered dataset (None: has no place on the Hub)."""
    metric = "wer" if args.cer_threshold is None else "cer"
    threshold = args.wer_threshold if metric == "wer" else args.cer_threshold
    suffix = f".{metric}_{threshold}"
    local = local_directory(args.dataset_name)
    base = Path(os.path.abspath(local or args.dataset_name.rpartition("/")[2]))
    hub_base = args.hub_model_id or (None if local else args.dataset_name)
    if args.skip_filtering:  # of which the filtered dataset may be given too
        base, hub_base = base.with_name(base.name.removesuffix(suffix)), hub_base and hub_base.removesuffix(suffix)
    if args.push_to_hub and not hub_base:
        fail("--push_to_hub with a local dataset needs --hub_model_id org/name")
    cut = Path(os.path.abspath(args.output_dir or base.parent)) / f"{base.name}{suffix}"
    return metric, threshold, cut, hub_base and f"{hub_base}{suffix}"


def find_filtered(args: argparse.Namespace, cut: Path, repository: str | None) -> dict:
    """Settings of a dataset that was filtered before, which is fetched from the Hub if it is there."""
    pattern = f"filtering.{args.dataset_config_name or '*'}.{args.split}"
    if repository and not local_directory(args.dataset_name):
        try:
            wanted = ["README.md", f"{pattern}.*", f"{args.dataset_config_name or '*'}/{args.split}-*"]
            snapshot_download(repository, repo_type="dataset", local_dir=cut, allow_patterns=wanted)
        except HUB_ERRORS as error:
            hub_fail(f"downloading {repository}", error)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in cut.glob(f"{pattern}.json")]
    if [record["status"] for record in records] != ["complete"]:
        fail(f"--skip_filtering, but {cut} has not one complete {pattern}.json: filter first")
    return records[0]


def plan(args: argparse.Namespace) -> Job:
    """Load all that the work depends on, and refuse what does not go together."""
    metric, threshold, cut, repository = name_results(args)
    tokenizer, tokens, extractor, settings = load_teacher(args)
    columns = {}
    if args.skip_filtering:
        record = find_filtered(args, cut, repository)
        config, identity = (record["settings"][key] for key in ("config", "dataset"))
        groups = [(0, record["report"]["clips"][0], cut, 0)]
    else:
        config, paths = find_input(args)
        groups, identity = find_groups(paths)
        if not groups or not groups[-1][1]:
            fail(f"{args.dataset_name} ({config}, {args.split}) has no rows")
        there = pq.read_schema(paths[0]).names
        columns = {"audio": args.audio_column_name, "text": args.text_column_name, "label": "whisper_transcript"}
        columns |= {column: column for flag, (column, _) in SCORE_COLUMNS.items() if getattr(args, flag) is not None}
        if missing := [name for name in columns.values() if name not in there]:
            fail(f"{args.dataset_name} has no column {missing[0]!r}; it has {', '.join(there)}")
        columns |= {"name": "name"} if "name" in there and "name" not in columns.values() else {}
    settings |= {"dataset": identity, "config": config, "metric": metric, "threshold": threshold}
    settings |= {name: getattr(args, name) for name in DATA_ARGUMENTS}
    earlier = []
    for path in sorted(cut.parent.glob(f"{cut.name.removesuffix(f'.{metric}_{threshold}')}.[cw]er_*")):
        if path != cut and path.suffix != ".vectorized" and (path / record_name(settings)).exists():
            old = json.loads((path / record_name(settings)).read_text(encoding="utf-8"))["settings"]
            earlier += [path] if all(old.get(key) == settings[key] for key in REUSE_SETTINGS) else []
    extractor = None if args.skip_logmel else extractor
    return Job(settings, groups, columns, tokenizer, tokens, extractor, args.preprocessing_batch_size, cut, earlier)


def record_name(settings: dict) -> str:
    return f"filtering.{settings['config']}.{settings['split']}.json"


def write_record(directory: Path, record: dict) -> None:
    path = directory / record_name(record["settings"])
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(partial, path)


def open_outputs(job: Job, overwrite: list[Path]) -> None:
    """Make the output directories and their records, those in `overwrite` afresh; refuse those of other settings."""
    for directory in job.outputs():
        path = directory / record_name(job.settings)
        shards = list((directory / job.settings["config"]).glob(f"{job.settings['split']}-*.parquet"))
        if directory in overwrite:
            for file in (*shards, path):
                file.unlink(missing_ok=True)
        elif path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))["settings"]
            for key, value in job.settings.items():
                if old.get(key) != value:
                    fail(f"{directory} has {key} {old.get(key)}, not {value}; --overwrite_output_dir starts afresh")
        elif shards:
            fail(f"{directory} has shards but no {path.name}; --overwrite_output_dir starts afresh")
        (directory / job.settings["config"]).mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_record(directory, {"stage": "filtering", "status": "running", "settings": job.settings})


def create_repositories(args: argparse.Namespace, job: Job) -> dict[Path, str]:
    """The repository that each output is pushed to, made before the work, which proves the token; none stays local."""
    repository = name_results(args)[3]
    if args.push_to_hub is False or not repository:
        return {}
    repositories = dict(zip(job.outputs(), (repository, f"{repository}.vectorized"), strict=False))
    if args.skip_filtering:
        repositories.pop(job.cut)
    for directory, repository in repositories.items():
        try:
            HfApi().create_repo(repository, repo_type="dataset", private=args.hub_private_repo, exist_ok=True)
            snapshot_download(  # what it says of other configurations and splits
                repository,
                repo_type="dataset",
                local_dir=directory,
                allow_patterns=["README.md", "filtering.*"],
                ignore_patterns=[record_name(job.settings).replace(".json", ".*")],
            )
        except HUB_ERRORS as error:
            hub_fail(f"preparing {repository}", error)
    return repositories


def finish(job: Job, args: argparse.Namespace, repositories: dict[Path, str], new: int, seconds: float) -> int:
    """Write record, figure and card of what lies on the disk, and push it."""
    settings = job.settings
    if missing := job.missing():
        fail(f"shard {missing[0]} is missing: do all machines see {job.cut}? The same command makes what is missing")
    report = summarize((read_facts(job.path(job.cut, shard)) for shard in job.shards()), settings)
    libraries = ("datasets", "jiwer", "librosa", "numpy", "pyarrow", "soundfile", "torch", "transformers")
    record = {"stage": "filtering", "status": "complete", "settings": settings, "report": report}
    record |= {"arguments": vars(args), "versions": {name: version(name) for name in libraries}}
    clips, kept = report["clips"]
    done = min(new * settings["shard_size"], clips)
    record |= {"seconds": round(seconds, 1), "clips_per_second": round(done / seconds, 1)}
    for directory in job.outputs():
        path = directory / record_name(settings)
        if json.loads(path.read_text(encoding="utf-8"))["status"] == "running":
            write_record(directory, record)
        if directory == job.cut:
            draw(report, settings, path.with_suffix(".png"))
        else:
            shutil.copyfile(job.cut / path.with_suffix(".png").name, path.with_suffix(".png"))
        write_card(directory)
    logger.info("kept %d of %d clips, %.3f of %.3f h: %s", kept, clips, *report["hours"][::-1], report["reasons"])
    logger.info("in %s", " and ".join(map(str, job.outputs())))
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
            HfApi().upload_folder(
                repo_id=repository,
                repo_type="dataset",
                folder_path=directory,
                delete_patterns=[f"{settings['config']}/{settings['split']}-*"],
                ignore_patterns=[".*", "*.partial"],
                commit_message=f"Add {settings['config']}, {settings['split']}",
            )
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
    add("--model", default="openai/whisper-large-v3", help="teacher, for its tokenizer and feature extractor")
    add("--language", default="ja", help="language of the labels, a Whisper code or name")
    add("--task", default="transcribe", choices=("transcribe", "translate"), help="task of the labels")
    add = parser.add_argument_group("what is kept").add_argument
    add("--wer_threshold", type=float, default=10.0, help="highest WER that is kept, per cent")
    add("--cer_threshold", type=float, help="highest CER that is kept, per cent, instead of a WER")
    add("--min_duration_in_seconds", type=float, default=0.0, help="shortest clip that is kept")
    add("--max_duration_in_seconds", type=float, default=30.0, help="longest clip that is kept")
    add("--max_label_length", type=int, default=128, help="longest label that is kept, in tokens with the special ones")
    add("--max_ngram_repeats", type=int, help="most times that a piece of a label may stand in a row")
    for name, (column, _) in SCORE_COLUMNS.items():
        add(f"--{name}", type=float, help=f"{name[:3]}imum of the column {column}, which the labeller can write")
    add = parser.add_argument_group("labels").add_argument
    add("--timestamp_probability", type=float, default=0.2, help="share of the labels with timestamps that keep them")
    add(
        "--condition_on_prev_probability",
        type=float,
        default=0.0,
        help="share with the text of the row before as prompt",
    )
    add("--seed", type=int, default=42, help="seed of both draws")
    add = parser.add_argument_group("work").add_argument
    add("--skip_filtering", default=False, **flag, help="vectorise what an earlier run has filtered")
    add("--skip_logmel", default=False, **flag, help="filter only")
    add("--preprocessing_num_workers", type=int, default=len(os.sched_getaffinity(0)), help="processes on this machine")
    add("--preprocessing_batch_size", type=int, default=8, help="clips whose features are computed together")
    add("--shard_size", type=int, default=1000, help="rows of the input that make one shard")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", help="where the results go (None: beside a local dataset, else the current directory)")
    add("--overwrite_output_dir", default=False, **flag, help="start afresh")
    add("--push_to_hub", default=None, **flag, help="push the results (None: where the dataset is on the Hub)")
    add("--hub_model_id", help="Hub id to which .wer_10.0 and .wer_10.0.vectorized are added (None: the dataset's)")
    add("--hub_private_repo", default=True, **flag, help="make new repositories private")
    args = parser.parse_args(argv)
    for name in ("timestamp_probability", "condition_on_prev_probability"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)} is not between 0 and 1")
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
    try:
        with state.main_process_first():
            job = plan(args)
            repositories = create_repositories(args, job) if state.is_main_process else {}
            afresh = args.overwrite_output_dir and state.is_main_process
            open_outputs(job, job.outputs()[1 if args.skip_filtering else 0 :] if afresh else [])
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        missing = job.missing()
        workers = max(1, args.preprocessing_num_workers // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        mine = [shard for shard in missing if shard % state.num_processes == state.process_index]
        filter_shards(job, mine, workers, state.is_main_process)
        state.wait_for_everyone()
        if not state.is_main_process:
            return 0
        return finish(job, args, repositories, len(missing), time.monotonic() - started)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        fail(f"{error}: what is done stays; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
