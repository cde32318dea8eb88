#!/usr/bin/env python
"""Measure the error rates of a Whisper model, and show its mistakes.

In: a model (Hub id or local directory), and clips with their texts: a Hub dataset, a local dataset directory, a data
loader (`.py`), or a manifest (`.csv` or `.jsonl`, a clip a row, audio paths relative to it). Out, in --output_dir:

    metric.<name>.json                 every figure: rates, counts, 95 % intervals, by length; speed; settings
    all_predictions.<name>.csv         a row a clip, in the dataset's order, with the clip's own counts
    incorrect_predictions.<name>.csv   those rows whose normalised texts differ
    report.<name>.html                 one page: figures, chart, the worst clips to hear with each difference marked
    .predictions.<name>/               what the model said, in shards; the same command goes on where it was stopped

<name> is the split. Clips are of at most 30 s, one at a time. `--concatenate_audio` evaluates windows of several whole
clips, drawn by seed (<split>.windows_30), and `--long_form` takes audio of any length: what is over 30 s is decoded
sequentially, as Whisper does (<split>.long_form), greedily and without the text of the window before.

Japanese is scored as in the published tables: Whisper's basic normaliser, then no spaces. So a clip is one word, and
its word error rate the share of clips with a mistake: the character error rate is the one to look at.

    python run_short_form_eval.py --model_name_or_path org/model --dataset_name org/dataset --dataset_split_name test \
        --text_column_name transcription --language ja --output_dir eval/model
    accelerate launch --multi_gpu run_short_form_eval.py ...            # the same; each process takes shards
    python run_short_form_eval.py --compare eval/teacher eval/model     # no model is run: one table and a chart
"""

import argparse
import base64
import collections
import copy
import csv
import hashlib
import html
import importlib.util
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import IO, NoReturn

import datasets
import jiwer
import librosa
import matplotlib
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import soundfile
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from datasets import Audio, Dataset
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi, metadata_update, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
from transformers.utils import is_flash_attn_2_available

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16_000
WINDOW = 30 * SAMPLING_RATE  # what Whisper hears, in samples
TOO_LONG = "longer than 30 s"
LENGTHS = (0, 8, 16, 32, 64, 96, None)  # characters of normalised references; a group ends before the next starts
METRICS = ("cer", "wer", "cer_raw", "wer_raw")  # of normalised texts, and of texts as they are
COUNTS = ("substitutions", "deletions", "insertions", "reference")
DRAWS = 1_000  # of the bootstrap
WORST_CLIPS = 20  # on the page, which holds their audio
LONGEST_PLAYED = 4 * WINDOW  # samples of a clip on the page; of longer ones it shows the text alone
SAMPLE = 8  # clips that --dry_run looks at
LONG_FORM_SHARD = 8  # recordings in a shard, all in memory at once
GAP = (0, round(0.4 * SAMPLING_RATE))  # samples of silence between the clips of a window
OPEN_WINDOWS = 16  # that a clip may go into
UNSPACED = ("ja", "zh", "yue", "th", "lo", "my", "km")  # written without spaces
# What ReazonSpeech's own scorer removes and narrows: its pkg/evaluation/src/utils.py.
REAZON_TABLE = dict.fromkeys(map(ord, "、。「」『』，,？！!?")) | {
    wide: wide - 0xFEE0 for wide in range(0xFF10, 0xFF5B) if chr(wide - 0xFEE0).isalnum()
}
DIGITS, POWERS = "零一二三四五六七八九", ("", "万", "億", "兆", "京", "垓", "秭", "穣", "溝", "澗", "正", "載", "極")


# ----------------------------------------------------------------------------------------------- from texts to figures


def read_number(number: str) -> str:
    """A decimal number as it is read, in kanji, without idle zeros: "1203" -> "千二百三", "0.50" -> "零点五"."""
    whole, _, fraction = number.partition(".")
    whole, fraction, spoken = whole.lstrip("0"), fraction.rstrip("0"), ""
    if len(whole) > 4 * len(POWERS):  # too large to have a name
        return "".join(DIGITS[int(digit)] for digit in whole)
    whole = whole.zfill(4 * len(POWERS))
    for start, power in zip(range(0, len(whole), 4), reversed(POWERS), strict=True):
        group = whole[start : start + 4]
        for digit, place in zip(map(int, group), ("千", "百", "十", ""), strict=True):
            spoken += ("" if digit == 1 and place else DIGITS[digit]) + place if digit else ""
        spoken += power if group != "0000" else ""
    return (spoken or "零") + ("点" + "".join(DIGITS[int(digit)] for digit in fraction) if fraction else "")


def normalise_kotoba(text: str) -> str:
    """The rule of the published Japanese figures: Whisper's basic normaliser, then no spaces, for both error rates."""
    return BasicTextNormalizer()(text).replace(" ", "")


def normalise_reazon(text: str) -> str:
    """ReazonSpeech's rule: no punctuation, letters and digits in half width, numbers read out."""
    return re.sub(r"[0-9]+\.?[0-9]*", lambda number: read_number(number[0]), text.translate(REAZON_TABLE)).strip()


def text_normaliser(scorer: str, language: str, spellings: dict | None) -> Callable[[str], str]:
    """The scorer's function; Whisper's English one takes `spellings`, British to American, that a tokenizer has."""
    whisper = EnglishTextNormalizer(spellings or {}) if language == "en" else BasicTextNormalizer()
    rules = {"kotoba": normalise_kotoba, "reazon": normalise_reazon, "whisper": lambda text: whisper(text).strip()}
    return rules[scorer]


def count_errors(alignments: Sequence[Sequence[jiwer.AlignmentChunk]]) -> np.ndarray:
    """(clips, 4): the `COUNTS` of each clip, the last being the reference's length."""
    counts = np.zeros((len(alignments), 4), dtype=np.int64)
    columns = {"substitute": 0, "delete": 1, "insert": 2}
    for row, chunks in zip(counts, alignments, strict=True):
        for chunk in chunks:
            of_reference = chunk.ref_end_idx - chunk.ref_start_idx
            row[3] += of_reference
            if chunk.type != "equal":
                row[columns[chunk.type]] += of_reference or chunk.hyp_end_idx - chunk.hyp_start_idx
    return counts


def bootstrap(values: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """(clips, ...) -> (draws, ...): sums over clips drawn with replacement, the same draws for as many clips."""
    generator, clips, columns = np.random.default_rng(0), len(values), values.reshape(len(values), -1).astype(float)
    times = (np.bincount(generator.integers(0, clips, clips), minlength=clips) for _ in range(draws))
    sums = [np.stack(some) @ columns for some in iter(lambda: list(itertools.islice(times, 50)), [])]
    return np.concatenate(sums).reshape(draws, *values.shape[1:])


def error_rate(counts: np.ndarray) -> np.ndarray:
    """(..., n) errors of n - 1 kinds and the reference's length -> (...): per cent, NaN where that length is 0."""
    with np.errstate(invalid="ignore"):
        return 100 * counts[..., :-1].sum(-1) / counts[..., -1]


def summarise(counts: np.ndarray) -> list[dict[str, dict]]:
    """(clips, groups, metrics, 4) -> by group and metric: its rate in per cent, 95 % interval and counts."""
    totals, errors = counts.sum(0), counts[..., :3].sum(-1)
    draws = error_rate(bootstrap(np.stack([errors, counts[..., 3]], axis=-1)))
    groups = [{} for _ in totals]
    for (group, metric), rate in np.ndenumerate(error_rate(totals)):
        cell, spread = dict(zip(COUNTS, totals[group, metric].tolist(), strict=True)), draws[:, group, metric]
        rates = [float(rate), *np.nanpercentile(spread, [2.5, 97.5]).tolist()] if cell["reference"] else [None] * 3
        groups[group][METRICS[metric]] = dict(zip(("rate", "low", "high"), rates, strict=True)) | cell
    return groups


def score(references: list[str], hypotheses: list[str], normalise: Callable[[str], str]) -> tuple[dict, list[dict]]:
    """Every figure, and a row a clip. A clip with nothing left of its reference once normalised counts nowhere."""
    sides = [list(map(normalise, texts)) for texts in (references, hypotheses)]
    scored = [index for index, reference in enumerate(sides[0]) if reference]
    if not scored:
        fail("there is nothing to score: no clip has a text once it is normalised")
    counts = np.stack(
        [
            count_errors(process(*([texts[index] for index in scored] for texts in pair)).alignments)
            for pair in (sides, (references, hypotheses))
            for process in (jiwer.process_characters, jiwer.process_words)
        ],
        axis=1,
    )  # (clips, metrics, 4)
    lengths = counts[:, :1, 3]
    inside = (lengths >= (0, *LENGTHS[:-1])) & (lengths < (np.inf, *LENGTHS[1:-1], np.inf))  # (clips, all and groups)
    overall, *groups = summarise(counts[:, None] * inside[:, :, None, None])
    rows = [
        {"normalised_reference": reference, "normalised_hypothesis": hypothesis}
        for reference, hypothesis in zip(*sides, strict=True)
    ]
    for index, clip in zip(scored, counts, strict=True):
        for unit, numbers in zip(("character", "word"), clip[:2].tolist(), strict=True):
            rows[index] |= {f"{unit}_{name}": number for name, number in zip(COUNTS, numbers, strict=True)}
        rows[index]["cer"] = round(float(error_rate(clip[0])), 2)
        rows[index]["runaway"] = len(sides[1][index]) > 2 * len(sides[0][index]) + 10
    metrics = {name: overall[name]["rate"] for name in METRICS} | {
        "clips": len(scored),
        "empty_references": len(references) - len(scored),
        "runaways": sum(rows[index]["runaway"] for index in scored),
        "details": overall,
        "by_length": [
            {"characters": [low, high and high - 1], "clips": int(members.sum())} | group
            for (low, high), members, group in zip(itertools.pairwise(LENGTHS), inside.T[1:], groups, strict=True)
        ],
    }
    return metrics, rows


# ------------------------------------------------------------------------------------------------------------ the page


def mark_differences(reference: str, hypothesis: str) -> str:
    """HTML of both texts in one: `<del>` around what the model left out, `<ins>` around what it put in."""
    marked = ""
    for chunk in jiwer.process_characters([reference], [hypothesis]).alignments[0]:
        left_out = html.escape(reference[chunk.ref_start_idx : chunk.ref_end_idx])
        put_in = html.escape(hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx])
        marked += left_out if chunk.type == "equal" else f"<del>{left_out}</del><ins>{put_in}</ins>"
    return marked.replace("<del></del>", "").replace("<ins></ins>", "")


def draw_rates(bars: list[tuple[str, dict]], file: IO | Path, **options) -> None:
    """A bar for each name with the character error rate beside it, and a line for its interval."""
    figure = Figure(figsize=(8, 1 + 0.5 * len(bars)), layout="constrained")
    axes = figure.add_subplot(xlabel="character error rate, % (line: 95 % interval)")
    for place, (_, cell) in enumerate(bars):
        if cell["reference"]:
            axes.barh(place, cell["rate"], color="#5588aa")
            axes.plot([cell["low"], cell["high"]], [place, place], color="black", linewidth=1)
            axes.annotate(f"  {cell['rate']:.1f}", (max(cell["rate"], cell["high"]), place), va="center")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set(xlim=(0, max([1, *(cell["high"] or 0 for _, cell in bars)]) * 1.15), ylim=(len(bars) - 0.5, -0.5))
    axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(file, **options)


def audio_player(waveform: np.ndarray) -> str:
    """HTML that plays a clip, which it holds; nothing for one that is too long for a page."""
    if len(waveform) > LONGEST_PLAYED:
        return ""
    file = io.BytesIO()
    soundfile.write(file, waveform, SAMPLING_RATE, format="FLAC")
    return f'<audio controls src="data:audio/flac;base64,{base64.b64encode(file.getvalue()).decode()}"></audio>'


def report_page(metrics: dict, worst: list[tuple[dict, np.ndarray]]) -> str:
    """One page that needs nothing from outside and runs no script; `worst` pairs rows of clips with waveforms."""
    title = html.escape(f"{Path(metrics['model']).name} on {Path(metrics['dataset']).name}, {metrics['name']}")
    rates = [
        f"<tr><th>{name.upper().replace('_RAW', ' of the raw text')}<td>{cell['rate']:.2f} %"
        f"<td>{cell['low']:.2f} to {cell['high']:.2f} %{''.join(f'<td>{cell[count]:,}' for count in COUNTS)}"
        for name, cell in metrics["details"].items()
    ]
    bars = []
    for group in metrics["by_length"]:
        low, high = group["characters"]
        name = f"{low} to {high} characters" if high else f"{low} characters or more"
        bars.append((f"{name}\n({group['clips']:,} clips)", group["cer"]))
    chart = io.StringIO()
    draw_rates(bars, chart, format="svg")
    facts = ("clips", "empty_references", "runaways", "audio_seconds", "real_time_factor", "clips_per_second")
    facts = {name.replace("_", " "): f"{metrics[name]:,}" for name in (*facts, "parameters")}
    facts |= {problem: f"{len(names):,}" for problem, names in metrics["unusable"].items()}
    facts |= {"normalisation": metrics["scorer"], "precision": metrics["dtype"]}
    facts |= {name: html.escape(metrics[name]) for name in ("model", "dataset")}
    clips = [
        f"<li><p>{mark_differences(row['normalised_reference'], row['normalised_hypothesis'])}</p>"
        f"{audio_player(waveform)}"
        f"<small>{row['cer']:.0f} % of {row['character_reference']} characters · {html.escape(row['id'])}</small>"
        for row, waveform in worst
    ]
    return f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; media-src data:">
<meta name="viewport" content="width=device-width"><style>
:root {{ color-scheme: light dark }} svg {{ width: 100%; height: auto }} small, audio {{ display: block }}
body {{ font: 16px/1.5 sans-serif; max-width: 50rem; margin: 2rem auto; padding: 1rem }}
td, th {{ padding: 0 1rem 0 0; text-align: right; white-space: nowrap }} th:first-child {{ text-align: left }}
li {{ margin: 1rem 0; overflow-wrap: anywhere }} li p {{ margin: 0; font-size: 1.2em }}
del {{ background: #f556 }} ins {{ background: #3b66; text-decoration: none }}
</style></head><body><h1>{title}</h1>
<table><tr><th><th>rate<th>95 % interval<th>{"<th>".join(COUNTS)}{"".join(rates)}</table>
<h2>By length of the reference</h2>{chart.getvalue().partition("<svg")[1]}{chart.getvalue().partition("<svg")[2]}
<h2>The run</h2><table>{"".join(f"<tr><th>{html.escape(name)}<td>{value}" for name, value in facts.items())}</table>
<h2>The worst clips</h2><p><del>left out by the model</del> <ins>put in by the model</ins></p>
<ol lang="{metrics["language"]}">{"".join(clips)}</ol>
</body></html>
"""


# --------------------------------------------------------------------------------------------------------------- input


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


def local_directory(reference: str) -> Path | None:
    """The directory that a repository reference names, or None where it is a Hub id (`org/name`)."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        fail(f"{reference!r} is neither a directory that exists nor a Hub id such as org/name")
    return None


def first_line(error: BaseException) -> str:
    """The line of an error that says what is wrong; the Hub's begin with the request's id."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    return lines[0] if lines else type(error).__name__


def open_dataset(args: argparse.Namespace) -> Dataset:
    """Columns `audio` (not decoded), `reference` and, where one is named, `id`, in the dataset's order."""
    name, config, split = args.dataset_name, args.dataset_config_name, args.dataset_split_name
    workers = args.preprocessing_num_workers if args.preprocessing_num_workers > 1 else None
    try:
        if name.endswith((".csv", ".jsonl")):
            dataset = read_manifest(Path(name), args.audio_column_name)
        elif name.endswith(".py"):
            dataset = build_dataset(Path(name), config, split, workers)
        elif directory := local_directory(name):
            dataset = read_directory(directory, config, split)
        elif isinstance(datasets.load_dataset_builder(name, config), AudioFolder):
            dataset = read_directory(Path(snapshot_download(name, repo_type="dataset")), config, split)
        else:
            dataset = datasets.load_dataset(name, config, split=split, num_proc=workers)
    except (ValueError, KeyError, RuntimeError, OSError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        what = f"can't load {config or 'the default configuration'}, {split} of {name}"
        hint = "" if Path(name).exists() else "; check the name, and `hf auth login` for a private one"
        fail(f"{what}: {first_line(error.__cause__ or error)}{hint}")
    columns = {"audio": args.audio_column_name, "reference": args.text_column_name, "id": args.id_column_name}
    columns = {column: part for part, column in columns.items() if column is not None}
    if missing := [column for column in columns if column not in dataset.column_names]:
        fail(f"{name} has no column {missing[0]!r}: it has {', '.join(dataset.column_names)} (--text_column_name, …)")
    dataset = dataset.select_columns(list(columns))
    dataset = dataset.rename_columns({column: part for column, part in columns.items() if column != part})
    dataset = dataset.select(range(min(args.max_samples_per_split or len(dataset), len(dataset))))
    if not len(dataset):
        fail(f"{split} of {name} has no rows")
    return dataset.cast_column("audio", Audio(sampling_rate=SAMPLING_RATE, decode=False))


def build_dataset(path: Path, config: str | None, split: str, workers: int | None) -> Dataset:
    """A split made by the `datasets.DatasetBuilder` that a Python file defines; `load_dataset` runs none any more."""
    if not path.is_file():
        fail(f"--dataset_name {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # found there by worker processes
    spec.loader.exec_module(module)
    classes = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == path.stem]
    builders = [cls for cls in classes if issubclass(cls, datasets.DatasetBuilder)]
    if len(builders) != 1:
        fail(f"--dataset_name {path} must define one datasets.DatasetBuilder, not {len(builders)}")
    builder = builders[0](config_name=config)
    builder.download_and_prepare(num_proc=workers)
    return builder.as_dataset(split)


def read_directory(directory: Path, config: str | None, split: str) -> Dataset:
    """A split of a local directory. Parquet is loaded by its files: a directory's cache looks at README.md only."""
    shards = sorted((directory / (config or "default")).glob(f"{split}-*-of-*.parquet"))
    if shards:
        expected = int(shards[0].stem.rsplit("-", 1)[1])
        if len(shards) != expected:
            fail(f"{directory} has {len(shards)} of {expected} shards of {split}: finish the stage that writes it")
        if not any(pq.read_metadata(path).num_rows for path in shards):
            fail(f"{split} of {directory} has no rows")  # `load_dataset` can't read it
        return datasets.load_dataset("parquet", data_files={split: list(map(str, shards))}, split=split)
    builder = datasets.load_dataset_builder(str(directory), config)
    files = builder.config.data_files
    if split not in files:
        raise ValueError(f"its splits are {', '.join(files)}")
    if isinstance(builder, AudioFolder):
        manifests = [Path(file) for file in files[split] if Path(file).stem == "metadata"]
        rows = [read_manifest(path, "file_name").rename_column("file_name", "audio") for path in manifests]
        return datasets.concatenate_datasets(rows)
    if isinstance(builder, Parquet):
        return datasets.load_dataset("parquet", data_files={split: list(files[split])}, split=split)
    return datasets.load_dataset(str(directory), config, split=split)


def read_manifest(path: Path, audio_column: str) -> Dataset:
    """The rows of a CSV or JSONL file, with audio paths relative to it, as `audiofolder` has them too."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file)))
    for row in rows:
        if row.get(audio_column):
            row[audio_column] = {"bytes": None, "path": str(path.parent / row[audio_column])}
    return Dataset.from_list(rows)


def clips_digest(clips: Dataset) -> str:
    """Digest of the texts, the ids and the sizes of the audio, to notice other clips under the same name."""
    digest = hashlib.sha256()
    for start in range(0, len(clips), 10_000):
        rows = clips.with_format("arrow")[start : start + 10_000]
        sizes = pc.binary_length(pc.struct_field(rows["audio"], "bytes")).to_pylist()
        digest.update(json.dumps([sizes, rows.drop_columns("audio").to_pydict()], default=str).encode())
    return digest.hexdigest()[:16]


def load_clip(audio: dict | None, long_form: bool = False) -> tuple[np.ndarray | None, float, str | None]:
    """Waveform (mono float32, 16 kHz), seconds, and the problem of what has none; over 30 s is one in short form."""
    content = audio and audio["bytes"]
    if audio and content is None and audio["path"] and Path(audio["path"]).is_file():
        content = Path(audio["path"]).read_bytes()
    if not content:
        return None, 0.0, "no audio"
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
            waveform = file.read(-1 if long_form else 31 * rate, dtype="float32", always_2d=True).mean(axis=1)
    except soundfile.LibsndfileError as error:
        return None, 0.0, f"undecodable: {error.error_string}"
    if not len(waveform):
        return None, 0.0, "zero length"
    if not np.isfinite(waveform).all():
        return None, 0.0, "samples that are not finite numbers"
    if long_form or len(waveform) < 31 * rate:  # headers of damaged files promise more
        seconds = len(waveform) / rate
    if seconds > WINDOW / SAMPLING_RATE and not long_form:
        return None, seconds, TOO_LONG
    if rate != SAMPLING_RATE:
        waveform = librosa.resample(waveform, orig_sr=rate, target_sr=SAMPLING_RATE)
    return waveform if long_form else waveform[:WINDOW], seconds, None


def pack_clips(lengths: Sequence[int | None], limit: int, seed: int) -> list[list[int]]:
    """Rows of windows with room for `limit`: whole clips, drawn in any order, into the first open window with room.

    A clip without a length can't be used and is left alone, and so is one that is longer than a window.
    """
    windows: list[dict] = []
    for row in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        length = limit if lengths[row] is None else min(limit, lengths[row])
        window = next((window for window in windows[-OPEN_WINDOWS:] if window["room"] >= length), None)
        if window is None:
            windows.append(window := {"rows": [], "room": limit})
        window["rows"].append(row)
        window["room"] -= length
    return [window["rows"] for window in windows]


def silence(row: int, seed: int) -> np.ndarray:
    """What is before a clip that follows another in a window."""
    return np.zeros(np.random.default_rng([seed, row]).integers(*GAP), np.float32)


def plan_items(clips: Dataset, args: argparse.Namespace) -> list[list[int]]:
    """The rows of each item that is evaluated: a clip, or a window of several."""

    def length(row: int) -> int | None:
        waveform = read_item(clips, [row], args)[1]
        return None if waveform is None else len(silence(row, args.seed)) + len(waveform)

    if not args.concatenate_audio:
        return [[row] for row in range(len(clips))]
    with ThreadPoolExecutor(max(1, args.dataloader_num_workers)) as pool:
        lengths = list(pool.map(length, range(len(clips))))
    return pack_clips(lengths, round(args.concatenate_seconds * SAMPLING_RATE), args.seed)


def read_item(clips: Dataset, rows: list[int], args: argparse.Namespace) -> tuple[dict, np.ndarray | None]:
    """The prediction of an item, still to be made, and its waveform, None where there is a problem."""
    names, texts, pieces, seconds, problem = [], [], [], 0.0, None
    for row in rows:
        values = clips[row]
        names.append(str(values.get("id") or (values["audio"] or {}).get("path") or row))
        texts.append("" if values["reference"] is None else str(values["reference"]))
        waveform, duration, found = load_clip(values["audio"], args.long_form)
        if args.concatenate_audio and not any(map(str.isalnum, texts[-1])):
            found = found or "empty reference"
        pieces += [silence(row, args.seed), waveform]
        seconds, problem = seconds + duration, problem or found
    reference = ("" if args.language in UNSPACED else " ").join(texts)
    prediction = {"id": " + ".join(names), "seconds": round(seconds, 3), "problem": problem, "reference": reference}
    return prediction | {"hypothesis": None}, None if problem else np.concatenate(pieces[1:])


# ----------------------------------------------------------------------------------------------- what the model says


def prompt_arguments(generation_config, language: str, task: str) -> dict[str, str]:
    """Language and task as `generate` wants them; none for an English-only checkpoint, where they are an error."""
    languages = getattr(generation_config, "lang_to_id", None)
    if not getattr(generation_config, "is_multilingual", languages is not None):
        languages = {"<|en|>": None}
    if f"<|{language}|>" not in (languages or {}):
        codes = ", ".join(sorted(token[2:-2] for token in languages or {}))
        fail(f"--language {language!r} is not one of the model's: {codes}")
    return {"language": language, "task": task} if len(languages) > 1 else {}


def model_digest(model: transformers.WhisperForConditionalGeneration) -> str:
    """Digest of a few numbers of each weight and of the generation settings, to tell models of one name apart."""
    settings = {name: value for name, value in model.generation_config.to_dict().items() if "version" not in name}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for weight in model.parameters():
        digest.update(weight.detach().flatten()[:64].float().numpy().tobytes())
    return digest.hexdigest()[:16]


class Transcriber:
    """A Whisper on its device, from waveforms to texts. It has no weights before `load`."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.assistance, self.memory = args, device, {}, []
        name, where = args.model_name_or_path, {"revision": args.model_revision, "subfolder": args.subfolder}
        local_directory(name)
        try:
            self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(name, **where)
            self.tokenizer = transformers.WhisperTokenizerFast.from_pretrained(name, **where)
            self.config = transformers.WhisperConfig.from_pretrained(name, **where)
            generation_config = transformers.GenerationConfig.from_pretrained(name, **where)
        except (OSError, ValueError) as error:
            fail(f"can't load the model {name}: {first_line(error)} (a private one needs `hf auth login`)")
        # `generate` assists one at a time. On a CPU a step of 16 clips takes half more than one of 8, as it reads the
        # same weights; more clips gain little, as a batch goes on until its longest text ends, and cost memory.
        size = args.per_device_eval_batch_size or (16 if device.type == "cpu" else 32)
        self.batch_size = 1 if args.assistant_model else size
        self.flags = prompt_arguments(generation_config, args.language, args.task) | {
            "max_new_tokens": min(args.generation_max_length, self.config.max_target_positions - 4),  # prefix
            "num_beams": args.generation_num_beams,
            "return_timestamps": args.return_timestamps or args.long_form,
        }

    def load(self) -> str:
        """Load the weights; returns the digest of the model."""
        args, name = self.args, self.args.model_name_or_path
        attention, able = args.attn_type, self.device.type == "cuda" and args.dtype != "float32"
        if attention == "flash_attn":
            attention = "flash_attention_2" if able and is_flash_attn_2_available() else "sdpa"
            if attention == "sdpa":
                logger.warning(
                    "--attn_type flash_attn needs CUDA, --dtype bfloat16 and the package flash-attn: using sdpa"
                )
        options = {"dtype": getattr(torch, args.dtype), "attn_implementation": attention}
        where = {"revision": args.model_revision, "subfolder": args.subfolder}
        try:
            self.model = transformers.WhisperForConditionalGeneration.from_pretrained(name, **where, **options)
            if args.assistant_model:
                name = args.assistant_model
                local_directory(name)
                student = transformers.WhisperForConditionalGeneration.from_pretrained(name, **options)
                weights, others = (list(whisper.model.encoder.parameters()) for whisper in (student, self.model))
                same = len(weights) == len(others) and all(map(torch.equal, weights, others))
                if not same or student.config.vocab_size != self.config.vocab_size:
                    fail(
                        f"--assistant_model {name} has another encoder or vocabulary than the model, so it can't assist"
                    )
                assistant = transformers.WhisperForCausalLM.from_pretrained(name, **options)  # without the encoder
        except (OSError, ValueError, pickle.UnpicklingError) as error:
            fail(f"can't load the model {name}: {first_line(error)} (a private one needs `hf auth login`)")
        self.model.to(self.device).eval()
        simple = not args.assistant_model and args.generation_num_beams == 1
        self.one_by_one = self.device.type == "cpu" and args.dtype == "float32" and simple
        if self.one_by_one:
            # Where each clip has one query a step, two plain products are faster than "sdpa", which is made for many.
            eager = copy.copy(self.model.config)
            eager._attn_implementation = "eager"
            for layer in self.model.model.decoder.layers:
                layer.encoder_attn.config = eager
        if args.assistant_model:
            self.assistance = {"assistant_model": assistant.to(self.device).eval()}
            if tokens := self.model.generation_config.begin_suppress_tokens:  # which `generate` then leaves out
                processor = transformers.SuppressTokensAtBeginLogitsProcessor(tokens, 0, str(self.device))
                self.assistance["logits_processor"] = [processor]
        return model_digest(self.model)

    def extract(self, waveforms: list[np.ndarray]) -> torch.Tensor:
        """Log-mel, (clips, mels, 3000): frames after the longest clip are all equal, and computed once."""
        samples = min(WINDOW, max(map(len, waveforms)) + 2 * self.extractor.n_fft)
        mel = self.extractor(
            waveforms, sampling_rate=SAMPLING_RATE, max_length=samples, return_tensors="pt", device=str(self.device)
        ).input_features
        return torch.nn.functional.pad(mel, (0, self.extractor.nb_max_frames - mel.shape[2]), mode="replicate")

    def encode(self, features: torch.Tensor) -> dict:
        """States of log-mels, and perhaps the decoder's keys and values of them, as arguments of `generate`."""
        if not self.one_by_one:
            return {"encoder_outputs": BaseModelOutput(self.model.model.encoder(features)[0])}
        # What one clip needs stays in a CPU's caches, and memory that is kept need not be made anew for every batch.
        # Keys lie as the product with a query reads them: position after position.
        rows, attentions = len(features), [layer.encoder_attn for layer in self.model.model.decoder.layers]
        positions, heads, width = self.config.max_source_positions, attentions[0].num_heads, attentions[0].head_dim
        if not self.memory or len(self.memory[0]) < rows:
            of_layer = [(heads, width, positions), (heads, positions, width)]
            shapes = [(positions, heads * width), *of_layer * len(attentions)]
            self.memory = [torch.empty(rows, *shape, dtype=features.dtype) for shape in shapes]
        states, *cross = (memory[:rows] for memory in self.memory)
        for row in range(rows):
            states[row] = self.model.model.encoder(features[row : row + 1])[0][0]
            for attention, keys, values in zip(attentions, cross[::2], cross[1::2], strict=True):
                keys[row] = attention.k_proj(states[row]).view(positions, heads, width).permute(1, 2, 0)
                values[row] = attention.v_proj(states[row]).view(positions, heads, width).transpose(0, 1)
        cache = DynamicCache()
        for keys, values in zip(cross[::2], cross[1::2], strict=True):
            layer = DynamicLayer()
            layer.keys, layer.values, layer.dtype, layer.device = keys.mT, values, keys.dtype, keys.device
            layer.is_initialized = True
            cache.layers.append(layer)
        return {
            "encoder_outputs": BaseModelOutput(states),
            "past_key_values": EncoderDecoderCache(DynamicCache(), cache),
        }

    @torch.inference_mode()
    def transcribe(self, waveforms: list[np.ndarray]) -> list[str]:
        """Texts of a batch, which takes each 30 s once; of longer audio by Whisper's sequential decoding."""
        if max(map(len, waveforms)) > WINDOW:
            how = {"padding": "longest", "truncation": False, "return_attention_mask": True, "return_tensors": "pt"}
            inputs = self.extractor(waveforms, sampling_rate=SAMPLING_RATE, **how).to(self.device, self.model.dtype)
            inputs = {**inputs, "condition_on_prev_tokens": False, "temperature": 0.0}
        else:
            features = self.extract(waveforms).to(self.device, self.model.dtype)
            inputs = self.encode(features) | {"force_unique_generate_call": True}
        tokens = self.model.generate(**inputs, **self.assistance, **self.flags)  # (clips, tokens)
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def predict(clips: Dataset, missing: dict[Path, list[list[int]]], transcriber: Transcriber, args, show: bool) -> None:
    """Write the missing shards, transcribed in batches of similar length."""
    size = transcriber.batch_size
    bar = tqdm(total=sum(map(len, missing.values())), unit="clip", disable=not show)
    with bar, ThreadPoolExecutor(max(1, args.dataloader_num_workers)) as pool:
        started = time.perf_counter()
        loading = ((path, pool.map(lambda rows: read_item(clips, rows, args), part)) for path, part in missing.items())
        # In pairs, so that the next shard is being read while this one is transcribed.
        for (path, loaded), _ in itertools.pairwise(itertools.chain(loading, [None])):
            shard = list(loaded)
            usable = sorted((item for item in shard if item[1] is not None), key=lambda item: -len(item[1]))
            parts = [[item for item in usable if (len(item[1]) > WINDOW) is long] for long in (True, False)]
            for batch in (part[start : start + size] for part in parts for start in range(0, len(part), size)):
                texts = transcriber.transcribe([waveform for _, waveform in batch])
                for (prediction, _), text in zip(batch, texts, strict=True):
                    prediction["hypothesis"] = text
                bar.update(len(batch))
            seconds, started = time.perf_counter() - started, time.perf_counter()
            facts = {"process_seconds": seconds, "parameters": transcriber.model.num_parameters()}
            lines = [facts, *(prediction for prediction, _ in shard)]
            write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), path)
            bar.update(len(shard) - len(usable))


# ------------------------------------------------------------------------------------------------------------- results


def write_text(text: str, path: Path) -> None:
    """Write a file that appears under its name only when it is whole and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_predictions(paths: Iterable[Path]) -> tuple[list[dict], dict]:
    """The rows of all shards, and what they took."""
    shards = [[json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")] for path in paths]
    rows = [row for _, *rows in shards for row in rows]
    seconds, audio = sum(facts["process_seconds"] for facts, *_ in shards), sum(row["seconds"] for row in rows)
    facts = {
        "audio_seconds": round(audio, 1),
        "process_seconds": round(seconds, 1),  # over all processes
        "real_time_factor": round(seconds / max(audio, 1e-9), 5),
        "clips_per_second": round(len(rows) / max(seconds, 1e-9), 3),
        "parameters": shards[0][0]["parameters"],
    }
    return rows, facts


def save_metrics(path: Path, metrics: dict) -> None:
    """`evaluate.save`, without what git says of a directory that is no repository."""
    import evaluate  # takes as long as all the others

    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        evaluate.save(path, **metrics)
    except OSError:  # there is no git, which it asks for a commit, or it can't write
        write_text(json.dumps(metrics), path)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def write_results(clips: Dataset, items, rows: list[dict], normalise: Callable, facts: dict, args) -> dict:
    """Score the predictions and write the four files; returns the metrics."""
    output_dir, name = Path(args.output_dir), args.name
    unusable = collections.defaultdict(list)
    for row in rows:
        if row["problem"]:
            unusable[row["problem"]].append(row["id"])
    if unusable[TOO_LONG] and not args.skip_long_audio:
        names = ", ".join(unusable[TOO_LONG][:10]) + ", …" * (len(unusable[TOO_LONG]) > 10)
        ways = "--skip_long_audio leaves such out, --long_form takes them"
        fail(f"{len(unusable[TOO_LONG])} clips are longer than 30 s, and {ways}: {names}")
    usable = [index for index, row in enumerate(rows) if not row["problem"]]
    if not usable:
        fail(f"none of the {len(rows)} clips of {args.dataset_name} can be used: {', '.join(unusable)}")
    metrics, scored = score([rows[i]["reference"] for i in usable], [rows[i]["hypothesis"] for i in usable], normalise)
    for index, columns in zip(usable, scored, strict=True):
        rows[index] |= columns
    metrics |= facts | {"unusable": {problem: names for problem, names in unusable.items() if names}}
    wrong = [row for row in rows if row.get("normalised_reference") != row.get("normalised_hypothesis")]
    for which, chosen in (("all", rows), ("incorrect", wrong)):
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(chosen)
        write_text(file.getvalue(), output_dir / f"{which}_predictions.{name}.csv")
    worst = sorted((index for index in usable if rows[index].get("cer")), key=lambda index: -rows[index]["cer"])
    worst = [(rows[index], read_item(clips, items[index], args)[1]) for index in worst[:WORST_CLIPS]]
    write_text(report_page(metrics, worst), output_dir / f"report.{name}.html")
    save_metrics(output_dir / f"metric.{name}.json", metrics)
    return metrics


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


def publish(metrics: dict) -> None:
    """Write the two rates into the model card's `model-index`, where the Hub shows them."""
    dataset, model = metrics["dataset"], metrics["model"]
    kind = dataset if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) else Path(dataset).stem
    source = {"type": kind, "name": Path(dataset).stem, "config": metrics["dataset_config_name"]}
    rates = [
        {"type": name, "name": f"{name.upper()} ({metrics['scorer']})", "value": round(metrics[name], 2)}
        for name in ("cer", "wer")
    ]
    result = {"task": {"type": "automatic-speech-recognition"}, "metrics": rates}
    result["dataset"] = source | {"split": metrics["name"]}
    index = {"model-index": [{"name": model, "results": [result]}]}
    try:  # from the card as it is at that commit, so that no other evaluation's rates are lost
        push_again(lambda: metadata_update(model, index, overwrite=True, parent_commit=HfApi().model_info(model).sha))
    except (OSError, ValueError) as error:
        fail(f"the results are written, but not on the card of {model}: {first_line(error)}; run this again to push")


def print_plan(clips: Dataset, shards: dict[Path, list[list[int]]], transcriber: Transcriber, args) -> None:
    """What a run would do, from a sample of what it would read."""
    items, started = list(itertools.chain.from_iterable(shards.values())), time.perf_counter()
    sample = [read_item(clips, items[index], args) for index in range(0, len(items), -(-len(items) // SAMPLE))]
    for waveform in (waveform for _, waveform in sample if waveform is not None):
        transcriber.extract([waveform])
    rate = len(sample) / (time.perf_counter() - started)
    seconds = statistics.mean(prediction["seconds"] for prediction, _ in sample)
    text = statistics.mean(len(json.dumps(prediction)) for prediction, _ in sample)
    written = 4 * text * len(items) + 25_000 * seconds * min(len(items), WORST_CLIPS)  # FLAC in base 64 on the page
    what = f"{len(items):,} windows of {len(clips):,} clips" if args.concatenate_audio else f"{len(clips):,} clips"
    left = sum(len(items) for path, items in shards.items() if not path.exists())
    hours = seconds * len(items) / 3600
    print(f"input: {args.dataset_name}, {args.dataset_split_name}, {what}, about {hours:.2f} h")
    print(f"done: {sum(path.exists() for path in shards)} of {len(shards)} shards")
    print(f"writes: {args.output_dir}, about {written / 1e6:.1f} MB")
    print(f"pushes: {f'two rates to the card of {args.model_name_or_path}' if args.push_to_hub else 'nothing'}")
    print(
        f"time: at {rate:.1f} a second and thread {left:,} are read (from a sample of {len(sample)}); the model's own"
    )
    print(f"      depends on the device: 30 s of encoder each, in batches of {transcriber.batch_size}")


def paired_difference(first: np.ndarray, other: np.ndarray) -> tuple[float, float, float, float]:
    """(clips, 4) `COUNTS` of two models on the same clips -> difference in per cent, its 95 % interval, two-sided p."""
    pair = np.stack([first, other], axis=1)
    (difference,), draws = np.diff(error_rate(pair.sum(0))), np.diff(error_rate(bootstrap(pair)))[:, 0]
    p = 2 * (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / (1 + DRAWS)
    return difference, *np.percentile(draws, [2.5, 97.5]), min(1.0, p)


def short_names(references: Iterable[str]) -> dict[str, str]:
    """Last parts of repository references, or all of them where two have the same one."""
    names = {reference: Path(reference).name for reference in references}
    return names if len(set(names.values())) == len(names) else {reference: reference for reference in names}


def compare(args: argparse.Namespace) -> int:
    """Print a table of saved evaluations, each with a test against the first on the same clips, and draw it."""
    saved = []
    for directory in args.compare:
        found = sorted(Path(directory).rglob("metric.*.json"))
        if not found:
            fail(f"{directory} has no metric.<split>.json: evaluate a model with --output_dir {directory} first")
        for path in found:
            predictions = path.with_name(path.name.replace("metric", "all_predictions", 1)).with_suffix(".csv")
            if not predictions.is_file():
                fail(f"{predictions} is missing: evaluate again with --output_dir {path.parent}")
            with open(predictions, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["cer"]]
            counts = np.array([[int(row[f"character_{name}"]) for name in COUNTS] for row in rows])
            clips = [(row["id"], row["normalised_reference"]) for row in rows]
            saved.append((json.loads(path.read_text(encoding="utf-8")), clips, counts))
    models, names = (short_names(metrics[part] for metrics, _, _ in saved) for part in ("model", "dataset"))
    head = ["Model", "Parameters", "Dataset", "Clips", "CER %", "WER %", "CER against the first", "Seconds"]
    lines = [head, ["---"] * len(head)]
    firsts, bars = {}, []
    for metrics, clips, counts in sorted(saved, key=lambda saved: (saved[0]["dataset"], saved[0]["name"])):
        kind = metrics["name"].removeprefix(metrics["dataset_split_name"]).replace(".", " ").replace("_", " ")
        model, dataset = models[metrics["model"]], names[metrics["dataset"]] + kind
        first_clips, first_counts = firsts.setdefault((metrics["dataset"], metrics["name"]), (clips, counts))
        against = "" if counts is first_counts else "other clips"
        if against and clips == first_clips:
            against = "{:+.2f} ({:+.2f} to {:+.2f}, p = {:.3f})".format(*paired_difference(first_counts, counts))
        cells = [metrics["details"][name] for name in ("cer", "wer")]
        bars.append((f"{model}\n{dataset}", cells[0]))
        rates = [f"{cell['rate']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})" for cell in cells]
        size, seconds = f"{metrics['parameters'] / 1e6:.1f} M", f"{metrics['process_seconds']:.0f}"
        lines.append([model, size, dataset, f"{metrics['clips']:,}", *rates, against, seconds])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if not args.dry_run:
        os.makedirs(args.output_dir, exist_ok=True)
        draw_rates(bars, Path(args.output_dir) / "comparison.png", dpi=150)
    return 0


# --------------------------------------------------------------------------------------------------------- the command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    path = {"type": os.path.expanduser}
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", help="Whisper, a local directory or Hub id", **path)
    add("--model_revision", default="main", help="branch, tag or commit of a model on the Hub")
    add("--subfolder", default="", help="folder of the model in its repository")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU if unset, else float32")
    add("--attn_type", choices=("flash_attn", "sdpa", "eager"), default="sdpa", help="attention")
    add("--assistant_model", help="student with the model's encoder, to draft for it; same texts", **path)
    add = parser.add_argument_group("clips").add_argument
    add("--dataset_name", help="builder file, local directory, Hub id, or .csv or .jsonl manifest", **path)
    add("--dataset_config_name", help="configuration; the default one if unset")
    add("--dataset_split_name", default="test", help="split; it names the output files")
    add("--audio_column_name", default="audio", help="column of audio")
    add("--text_column_name", default="text", help="column of reference texts")
    add("--id_column_name", help="column that names clips; their paths or else row numbers if unset")
    add("--max_samples_per_split", type=int, help="rows to take from the start; all if unset")
    add("--skip_long_audio", help="leave out and count clips over 30 s, in place of failing", **flag)
    add("--long_form", help="take them all the same, by Whisper's sequential decoding with timestamps", **flag)
    add("--concatenate_audio", help="evaluate windows of several whole clips", **flag)
    add("--concatenate_seconds", type=float, default=30, help="length of a window; over 30 s with --long_form")
    add("--seed", type=int, default=0, help="seed of what goes together, and of the silence between")
    add = parser.add_argument_group("generation").add_argument
    add("--language", default="ja", help="language code or name")
    add("--task", choices=("transcribe", "translate"), default="transcribe", help="task")
    add("--generation_max_length", type=int, default=256, help="bound of a clip's text and its end, tokens")
    add("--generation_num_beams", type=int, default=1, help="beams, 1 = greedy")
    add("--return_timestamps", help="let the model predict timestamps, which are not scored", **flag)
    add = parser.add_argument_group("work").add_argument
    add("--per_device_eval_batch_size", type=int, help="clips in a batch; 16 on a CPU if unset, else 32")
    add("--dataloader_num_workers", type=int, default=4, help="threads that decode audio")
    add("--preprocessing_num_workers", type=int, default=1, help="processes that load the dataset")
    add = parser.add_argument_group("results").add_argument
    add("--scorer", choices=("kotoba", "reazon", "whisper"), help="kotoba for Japanese if unset, else whisper")
    add("--output_dir", default="eval", help="directory of the results", **path)
    add("--overwrite_output_dir", help="replace what other settings left there", **flag)
    add("--compare", nargs="+", metavar="DIR", help="output directories to compare; no model is run")
    add("--push_to_hub", help="write the rates into the model's card on the Hub", **flag)
    add("--report_to", choices=("none", "wandb", "tensorboard"), default="none", help="tracker")
    add("--wandb_project", default="kotoba-whisper-evaluation", help="project of the tracker")
    add("--dry_run", help="say what would be read, written and pushed, and what is done; change nothing", **flag)
    args = parser.parse_args(argv)
    for name in ("generation_num_beams", "per_device_eval_batch_size", "max_samples_per_split"):
        if (getattr(args, name) or 1) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.seed < 0:
        parser.error("--seed must be at least 0")
    if not args.compare and not (args.model_name_or_path and args.dataset_name):
        parser.error("--model_name_or_path and --dataset_name are needed, or --compare")
    if args.concatenate_audio and not 0 < args.concatenate_seconds <= (3600 if args.long_form else 30):
        parser.error(
            f"--concatenate_seconds {args.concatenate_seconds:g} is not within 30 s; --long_form takes an hour"
        )
    if args.assistant_model and args.generation_num_beams > 1:
        parser.error("--assistant_model goes with greedy decoding only: leave --generation_num_beams out")
    args.language = TO_LANGUAGE_CODE.get(args.language.lower(), args.language.lower())
    args.scorer = args.scorer or ("kotoba" if args.language == "ja" else "whisper")
    windows = f".windows_{args.concatenate_seconds:g}" if args.concatenate_audio else ""
    args.name = args.dataset_split_name + windows + (".long_form" if args.long_form else "")  # of the results' files
    return args


def evaluate_model(args: argparse.Namespace) -> int:
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes without a GPU would not know of each other
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))],
    )
    level = logging.INFO if accelerator.is_main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    transformers.utils.logging.set_verbosity_error()
    if accelerator.device.type == "cpu":
        args.dtype = args.dtype or "float32"
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    args.dtype = args.dtype or "bfloat16"

    # 1. All that can be refused is refused before the work.
    if args.push_to_hub and accelerator.is_main_process:
        if local_directory(args.model_name_or_path):
            fail(f"--push_to_hub writes into a model's card on the Hub; {args.model_name_or_path} is a local directory")
        try:
            if not args.dry_run:
                HfApi().create_repo(args.model_name_or_path, exist_ok=True)
            HfApi().auth_check(args.model_name_or_path, write=True)
        except (OSError, ValueError) as error:
            fail(f"can't push to {args.model_name_or_path}: {first_line(error)} (see `hf auth whoami`)")
    clips = open_dataset(args)
    items = plan_items(clips, args)
    transcriber = Transcriber(args, accelerator.device)
    directory = Path(args.output_dir) / f".predictions.{args.name}"
    record = directory / "settings.json"
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() and not args.overwrite_output_dir else {}
    settings = {
        "model": args.model_name_or_path,
        "model_digest": before.get("model_digest") if args.dry_run else transcriber.load(),
        "assistant_model": args.assistant_model,
        "dtype": args.dtype,
        "language": args.language,
        "dataset": args.dataset_name,
        "dataset_config_name": args.dataset_config_name,
        "dataset_split_name": args.dataset_split_name,
        "rows": len(clips),
        "rows_digest": clips_digest(clips),
        "seed": args.seed if args.concatenate_audio else None,
        **transcriber.flags,
    }
    for name, value in settings.items():
        if before and before.get(name) != value:
            fail(
                f"{directory} has predictions with {name} {before.get(name)}, this run has {value}: take another "
                "--output_dir, or replace them with --overwrite_output_dir"
            )
    # Shards depend on the clips and settings alone.
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    size = LONG_FORM_SHARD if args.long_form else min(512, max(64, -(-len(items) // 64)))
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    shards = {directory / f"{digest}-{index:05d}-of-{len(parts):05d}.jsonl": part for index, part in enumerate(parts)}
    if args.dry_run:
        if accelerator.is_main_process:
            print_plan(clips, shards, transcriber, args)
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        write_text(json.dumps(settings, indent=2, ensure_ascii=False), record)

    # 2. This process transcribes its part of what is not there yet.
    mine = itertools.islice(shards.items(), accelerator.process_index, None, accelerator.num_processes)
    missing = {path: part for path, part in mine if not path.exists()}
    predict(clips, missing, transcriber, args, accelerator.is_main_process)

    # 3. The first and last time that processes wait for each other.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in set(directory.glob("*.jsonl")) - set(shards):
            path.unlink()
        rows, facts = read_predictions(shards)
        normalise = text_normaliser(args.scorer, args.language, transcriber.tokenizer.english_spelling_normalizer)
        facts |= settings | {"name": args.name, "scorer": args.scorer}
        metrics = write_results(clips, items, rows, normalise, facts, args)
        logger.info("CER %.2f %%, WER %.2f %%; more in %s", metrics["cer"], metrics["wer"], args.output_dir)
        if args.report_to != "none":
            try:
                accelerator.init_trackers(
                    args.wandb_project, config={key: str(value) for key, value in vars(args).items()}
                )
                accelerator.log({name: metrics[name] for name in METRICS})
            except Exception as error:  # of whatever kind: what watches the work must not end it
                logger.warning("no tracking by %s: %s", args.report_to, first_line(error))
        if args.push_to_hub:
            publish(metrics)
    accelerator.end_training()
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return compare(args) if args.compare else evaluate_model(args)
    except OSError as error:  # a full disk, a place where nothing may be written
        fail(f"can't go on with {args.output_dir}: {first_line(error)}; when that is mended, run the same command")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
