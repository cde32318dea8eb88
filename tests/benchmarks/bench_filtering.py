"""Filtering and vectorising against the plain way: clips/s, bytes on the disk, and reading a shuffled epoch.

The plain way is that of the recipe's first scripts, with today's `datasets` on the same cores: a filter by the WER of
each row through jiwer, a map that decodes, a map that calls the feature extractor on each clip padded to 30 s and keeps
float32 lists, parquet. Both start from the same labelled dataset, whose lengths are distributed like ReazonSpeech's,
keep the same third of it, and are read as a trainer reads: `load_dataset`, then rows in random order, as
arrays of 3,000 frames. Imports are not timed; the start of the workers is.

    python -m tests.benchmarks.bench_filtering [--clips 2000] [--runs 1]
"""

import argparse
import atexit
import contextlib
import io
import os
import random
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # before any Hub client is imported; not in the workers, which import this module too
    WORK = Path(tempfile.mkdtemp(prefix="kotoba-bench-filtering-"))
    atexit.register(shutil.rmtree, WORK, ignore_errors=True)
    os.environ.update(HF_HOME=str(WORK / "hf"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import datasets
import jiwer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, Features, List, Value, load_dataset
from transformers import AutoTokenizer, WhisperFeatureExtractor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

import run_data_filtering

WORKERS = len(os.sched_getaffinity(0))
MEAN_SECONDS, SHAPE = 5.74, 2.5  # of ReazonSpeech's clips: the mean, and the shape of a gamma distribution


def labelled_dataset(root: Path, clips: int, teacher: Path) -> Path:
    """Clips cut from the sandbox's speech, a third of them with an exact label, those of 4.3 s in the mean."""
    from tests.sandbox.corpus import build_corpus, cache_directory
    from tests.sandbox.sentences import sentences

    corpus = build_corpus(cache_directory() / "corpus-test", {"000": 24, "fff": 8})
    with tarfile.open(corpus / "data" / "000.tar") as tar:
        files = [io.BytesIO(tar.extractfile(member).read()) for member in tar if member.isfile()]
    speech = np.concatenate([soundfile.read(file, dtype="float32")[0] for file in files])
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    token = tokenizer.get_added_vocab()
    prefix = [token[f"<|{name}|>"] for name in ("startoftranscript", "ja", "transcribe", "notimestamps")]
    draw, texts, rows = random.Random(0), sentences(400), []
    for number in range(clips):
        seconds = min(max(draw.gammavariate(SHAPE, MEAN_SECONDS / SHAPE), 0.5), 29.0)
        first = draw.randrange(len(speech) - round(seconds * 16_000))
        flac = io.BytesIO()
        soundfile.write(flac, speech[first : first + round(seconds * 16_000)], 16_000, format="FLAC")
        text = texts[number % len(texts)]
        wrong = "" if draw.random() < 0.67 * np.exp(-seconds / 7) else draw.choice("あいう")
        ids = tokenizer(wrong + text, add_special_tokens=False).input_ids
        audio = {"bytes": flac.getvalue(), "path": f"{number}.flac"}
        label = [*prefix, *ids, token["<|endoftext|>"]]
        rows.append({"name": str(number), "audio": audio, "transcription": text, "whisper_transcript": label})
    features = Features(
        {
            "name": Value("string"),
            "audio": Audio(sampling_rate=16_000, decode=False),
            "transcription": Value("string"),
            "whisper_transcript": List(Value("int32")),
        }
    )
    (root / "default").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, features.arrow_schema)
    pq.write_table(table, root / "default" / "train-00000-of-00001.parquet", row_group_size=100)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: default/train-*\n---\n"
    )
    return root


def ours(dataset: Path, output: Path, teacher: Path, threshold: float = 10.0) -> Path:
    """The stage; returns the directory with the vectorised parquet files."""
    size = str(
        max(1, min(1000, sum(pq.read_metadata(f).num_rows for f in dataset.rglob("*.parquet")) // (4 * WORKERS)))
    )
    given = ["-d", str(dataset), "--model", str(teacher), "--output_dir", str(output), "--max_label_length", "448"]
    given += ["--shard_size", size, "--preprocessing_num_workers", str(WORKERS), "--wer_threshold", str(threshold)]
    with contextlib.redirect_stderr(io.StringIO()):
        run_data_filtering.main(given)
    return output / f"{dataset.name}.wer_{threshold}.vectorized" / "default"


def plain(dataset: Path, output: Path, teacher: Path) -> Path:
    """The plain way; returns the directory with the vectorised parquet file."""
    tokenizer, normalize = AutoTokenizer.from_pretrained(teacher), BasicTextNormalizer()
    extractor = WhisperFeatureExtractor.from_pretrained(teacher)

    def close(row: dict) -> bool:
        label = tokenizer.decode(row["whisper_transcript"], skip_special_tokens=True)
        return 100 * jiwer.wer(normalize(row["transcription"]), normalize(label)) <= 10

    def decode(row: dict) -> dict:
        array, _ = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        return {"array": array, "input_length": len(array), "labels": row["whisper_transcript"]}

    def extract(row: dict) -> dict:
        features = extractor(np.array(row["array"]), sampling_rate=16_000, return_tensors="np")
        return {"input_features": features["input_features"][0]}

    rows = load_dataset(str(dataset), split="train").cast_column("audio", Audio(decode=False))
    rows = rows.filter(close, num_proc=WORKERS)
    rows = rows.map(decode, remove_columns=rows.column_names, num_proc=WORKERS)
    rows = rows.map(extract, remove_columns="array", num_proc=WORKERS)
    output.mkdir(parents=True)
    rows.to_parquet(output / "train.parquet")
    return output


def read_epoch(files: Path, fill) -> tuple[float, int]:
    """Seconds for one epoch in random order, read as batches of 16 clips of 3,000 frames; and the rows in it."""
    rows = load_dataset("parquet", data_files=sorted(map(str, files.glob("*.parquet"))), split="train")
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    started = time.perf_counter()
    for first in range(0, len(order), 16):
        fill(rows, order[first : first + 16])
    return time.perf_counter() - started, len(rows)


def fill_ours(rows, numbers: list[int]) -> np.ndarray:
    """float16 as stored; making it the type that the model computes in is the device's work."""
    batch = np.empty((len(numbers), 3000, 128), np.float16)
    for place, number in enumerate(numbers):
        features = np.frombuffer(rows[number]["input_features"], "<f2").reshape(-1, 128)
        batch[place, : len(features)] = features
        batch[place, len(features) :] = features[-1]
    return batch


def fill_plain(rows, numbers: list[int]) -> np.ndarray:
    """Through the numpy format, which is 14 times faster than rows as Python lists."""
    rows = rows.with_format("numpy", columns=["input_features"])
    return np.stack([rows[number]["input_features"] for number in numbers])


def size(*paths: Path) -> int:
    return sum(file.stat().st_size for path in paths for file in path.rglob("*") if file.is_file())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--clips", type=int, default=2000, help="clips in the labelled dataset")
    parser.add_argument("--runs", type=int, default=1, help="runs of both, whose medians are printed")
    parser.add_argument("--ours_only", action="store_true", help="leave the plain way out, for many clips")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    from tests.sandbox.teachers import cached_whisper  # here: workers import this module, and do not need it

    teacher = cached_whisper("tiny-whisper-v3")
    dataset = labelled_dataset(WORK / "speech", args.clips, teacher)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    ours(labelled_dataset(WORK / "few", 8, teacher), WORK / "warm", teacher)
    shutil.rmtree(cache, ignore_errors=True)

    measured: dict[str, dict[str, list[float]]] = {"ours": {}, "plain": {}}
    ways = {"ours": (ours, fill_ours), "plain": (plain, fill_plain)}
    for run in range(args.runs):
        for name, (stage, fill) in ways.items():
            if name == "plain" and args.ours_only:
                continue
            output = WORK / f"{name}{run}"
            started = time.perf_counter()
            files = stage(dataset, output, teacher)
            seconds = time.perf_counter() - started
            epoch, kept = read_epoch(files, fill)
            values = {
                "stage, s": seconds,
                "labelled clips/s": args.clips / seconds,
                "disk in all, kB a kept clip": size(output, cache) / kept / 1000,
                "vectorised parquet, kB a clip": size(files) / kept / 1000,
                "shuffled epoch, ms a clip": epoch / kept * 1000,
            }
            shutil.rmtree(cache, ignore_errors=True)
            if name == "ours":
                started = time.perf_counter()
                ours(dataset, output, teacher, 5.0)
                values["another threshold, s"] = time.perf_counter() - started
            for key, value in values.items():
                measured[name].setdefault(key, []).append(value)
            shutil.rmtree(output)
    lengths = [soundfile.info(io.BytesIO(clip["bytes"])).duration for clip in read_audio(dataset)]
    print(f"{args.clips} clips of {np.mean(lengths):.2f} s, {kept} kept, {WORKERS} cores, {args.runs} runs\n")
    print("| | ours | plain | ratio |\n| --- | ---: | ---: | ---: |")
    for key, values in measured["ours"].items():
        mine = statistics.median(values)
        if key in measured["plain"]:
            other = statistics.median(measured["plain"][key])
            ratio = mine / other if key == "labelled clips/s" else other / mine
            print(f"| {key} | {mine:.2f} | {other:.2f} | {ratio:.1f} |")
        else:
            print(f"| {key} | {mine:.2f} | | |")
    return 0


def read_audio(dataset: Path) -> list[dict]:
    return pq.read_table(dataset / "default", columns=["audio"])["audio"].to_pylist()


if __name__ == "__main__":
    sys.exit(main())
