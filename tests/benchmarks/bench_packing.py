"""Training on windows of several clips against training on the clips: hours of speech trained per hour, and the fill.

Both are made by run_data_filtering.py from the same labelled dataset, whose lengths and labels are distributed like
ReazonSpeech's after the filter, and trained on by run_distillation.py with its own command line: whisper-base, a
student with two decoder layers, as many windows a step as clips. Runs take turns; the first step of each is left out.

Then whisper-base labels the sandbox's clips with timestamps, and they are packed. How far from a computed timestamp is
the one that whisper-base gives in its place, and how far is a timestamp that it gives by itself, where it may join and
split sentences, from the nearest computed one?

    python -m tests.benchmarks.bench_packing [--clips 400] [--batch_size 8] [--steps 2] [--runs 2]
"""

import argparse
import atexit
import contextlib
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

if __name__ == "__main__":  # before any Hub client is imported; not in the workers, which import this module too
    WORK = Path(tempfile.mkdtemp(prefix="kotoba-bench-packing-"))
    atexit.register(shutil.rmtree, WORK, ignore_errors=True)
    os.environ.update(HF_HOME=str(WORK / "hf"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from datasets import Audio, Features, List, Value
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

import create_student_model
import run_data_filtering

ROOT = Path(__file__).resolve().parents[2]
MEAN_SECONDS, SHAPE = 4.33, 4.0  # of ReazonSpeech's clips after the filter: the mean, and the shape of a gamma
TOKENS_A_SECOND = 18.8 / MEAN_SECONDS
PREFIX = ("startoftranscript", "ja", "transcribe")


def sandbox_speech() -> list[bytes]:
    """The sandbox's clips, FLAC."""
    from tests.sandbox.corpus import build_corpus, cache_directory

    corpus = build_corpus(cache_directory() / "corpus-test", {"000": 24, "fff": 8})
    with tarfile.open(corpus / "data" / "000.tar") as tar:
        return [tar.extractfile(member).read() for member in tar if member.isfile()]


def write_dataset(root: Path, rows: list[dict]) -> Path:
    features = Features(
        {
            "audio": Audio(sampling_rate=16_000, decode=False),
            "transcription": Value("string"),
            "whisper_transcript": List(Value("int32")),
        }
    )
    rows = [row | {"audio": {"bytes": row["audio"], "path": None}} for row in rows]
    (root / "default").mkdir(parents=True)
    path = root / "default" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), path, row_group_size=100)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: default/train-*\n---\n"
    )
    return root


def labelled_clips(root: Path, clips: int, teacher: Path) -> Path:
    """Pieces of the sandbox's speech, every label right and as long as such a clip's is."""
    from tests.sandbox.sentences import sentences

    speech = np.concatenate([soundfile.read(io.BytesIO(flac), dtype="int16")[0] for flac in sandbox_speech()])
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    token = tokenizer.get_added_vocab()
    prefix, end = [token[f"<|{name}|>"] for name in (*PREFIX, "notimestamps")], token["<|endoftext|>"]
    text = tokenizer("".join(sentences(400)), add_special_tokens=False).input_ids
    draw, rows = random.Random(0), []
    lengths = [draw.gammavariate(SHAPE, 1) for _ in range(clips)]
    scale = MEAN_SECONDS * clips / sum(lengths)
    while len(rows) < clips:
        seconds = min(max(lengths[len(rows)] * scale, 0.5), 29.0)
        first, begin = draw.randrange(len(speech) - round(seconds * 16_000)), draw.randrange(len(text) - 200)
        ids = text[begin : begin + max(1, round(seconds * TOKENS_A_SECOND))]
        written = tokenizer.decode(ids).strip("\ufffd")
        ids, flac = tokenizer(written, add_special_tokens=False).input_ids, io.BytesIO()
        if ids and run_data_filtering.BasicTextNormalizer()(written).strip():
            soundfile.write(flac, speech[first : first + round(seconds * 16_000)], 16_000, format="FLAC")
            rows.append({"audio": flac.getvalue(), "transcription": written})
            rows[-1]["whisper_transcript"] = [*prefix, *ids, end]
    return write_dataset(root, rows)


def filter_clips(dataset: Path, teacher: Path, *more) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        given = ["-d", dataset, "--model", teacher, *more]
        if run_data_filtering.main([str(value) for value in given]):
            raise SystemExit("filtering failed")


def train(models: Path, dataset: Path, output: Path, args: argparse.Namespace) -> list[float]:
    """Rows a second of each step but the first."""
    command = [sys.executable, ROOT / "run_distillation.py", "--do_train", "--report_to", "none"]
    command += ["--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher"]
    command += ["--train_dataset_name", dataset, "--max_label_length", 256, "--freeze_encoder", "--dtype", "float32"]
    command += ["--per_device_train_batch_size", args.batch_size, "--max_steps", args.steps + 1, "--logging_steps", 1]
    command += ["--save_steps", 1000, "--output_dir", output, "--language", "ja"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(output)
    return [entry["samples_per_second"] for entry in entries if "samples_per_second" in entry][1:]


def transcribe(teacher: Path, audio: list[bytes]) -> list[list[int]]:
    """Label each with whisper-base, greedily and with timestamps."""
    model = WhisperForConditionalGeneration.from_pretrained(teacher).eval()
    extractor, labels = WhisperFeatureExtractor.from_pretrained(teacher), []
    choices = {"language": "ja", "task": "transcribe", "return_timestamps": True, "max_length": 448}
    for first in range(0, len(audio), 8):
        waveforms = [soundfile.read(io.BytesIO(clip), dtype="float32")[0] for clip in audio[first : first + 8]]
        features = extractor(waveforms, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.inference_mode():
            labels += model.generate(features, force_unique_generate_call=True, **choices).tolist()
    end = model.config.eos_token_id
    return [[*label[: label.index(end)], end] if end in label else [*label, end] for label in labels]


def compare_timestamps(root: Path, teacher: Path) -> tuple[np.ndarray, np.ndarray]:
    """Seconds between computed timestamps and whisper-base's: given the label before, and of its own labels."""
    tokenizer, audio = AutoTokenizer.from_pretrained(teacher), sandbox_speech()
    zero = tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1
    labels = transcribe(teacher, audio)
    texts = [tokenizer.decode([token for token in label if token < zero], skip_special_tokens=True) for label in labels]
    rows = zip(audio, texts, labels, strict=True)
    keys = ("audio", "transcription", "whisper_transcript")
    dataset = write_dataset(root, [dict(zip(keys, row, strict=True)) for row in rows])
    filter_clips(dataset, teacher, "--concatenate_audio", "--skip_logmel")
    windows = pq.read_table(f"{dataset}.wer_10.0.packed/default").to_pylist()
    audio = [window["audio"]["bytes"] for window in windows]
    model = WhisperForConditionalGeneration.from_pretrained(teacher).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(teacher)
    given, own = [], []
    for window, clip, label in zip(windows, audio, transcribe(teacher, audio), strict=True):
        ours = np.array(window["whisper_transcript"])
        waveform = soundfile.read(io.BytesIO(clip), dtype="float32")[0]
        features = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.inference_mode():
            logits = model(features, decoder_input_ids=torch.tensor(ours[None, :-1])).logits[0, :, zero:]
        places = np.flatnonzero(ours >= zero)
        times = (ours[places] - zero) * 0.02
        given += np.abs(logits.argmax(-1).numpy()[places - 1] * 0.02 - times).tolist()
        own += [np.abs(times - (token - zero) * 0.02).min() for token in label if token >= zero]
    return np.array(given), np.array(own)


def compare(teacher: Path) -> None:
    given, own = compare_timestamps(WORK / "spoken", teacher)
    print("| seconds between timestamps | | median | nine in ten within |\n| --- | ---: | ---: | ---: |")
    for name, values in (("whisper-base's in the place of ours", given), ("its own and the nearest of ours", own)):
        print(f"| {name} | {len(values)} | {np.median(values):.2f} | {np.quantile(values, 0.9):.2f} |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--clips", type=int, default=400, help="clips that are filtered (400)")
    parser.add_argument("--batch_size", type=int, default=8, help="clips, or windows, a step (8)")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a run (2)")
    parser.add_argument("--runs", type=int, default=2, help="runs of each (2)")
    parser.add_argument("--concatenate_probability", type=float, default=1.0, help="share of clips packed (1.0)")
    parser.add_argument("--timestamps_only", action="store_true", help="do not train")
    args = parser.parse_args(argv)
    from tests.sandbox.base_teacher import whisper_base

    teacher, models = whisper_base(), WORK / "models"
    if args.timestamps_only:
        compare(teacher)
        return 0
    models.mkdir()
    (models / "teacher").symlink_to(teacher)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        flags = ["--teacher_checkpoint", str(teacher), "--decoder_layers", "2", "--save_dir", str(models / "student")]
        create_student_model.main(flags)
    dataset = labelled_clips(WORK / "speech", args.clips, teacher)
    filter_clips(dataset, teacher)
    packing = ["--concatenate_audio", "--concatenate_probability", args.concatenate_probability]
    filter_clips(dataset, teacher, *packing)
    record = json.loads(Path(f"{dataset}.wer_10.0.packed", "filtering.default.train.json").read_text())
    windows, hours = record["report"]["windows"], record["report"]["hours"][1]
    names = {"clips": f"{dataset}.wer_10.0.vectorized", "windows": f"{dataset}.wer_10.0.packed.vectorized"}
    counts = {"clips": windows["clips"], "windows": windows["windows"]}
    rates: dict[str, list[float]] = {"clips": [], "windows": []}
    for _ in range(args.runs):
        for kind, path in names.items():
            rates[kind] += train(models, Path(path), WORK / "output", args)
    speed = {kind: statistics.median(rates[kind]) * hours * 3600 / counts[kind] for kind in names}
    print(f"{args.clips} clips, {hours * 3600 / counts['clips']:.2f} s in the mean; {windows['windows']} windows, of")
    print(f"which {windows['clips_left_alone']} hold a clip left alone; the others' fill: {windows['fill']:.1f} %")
    print(f"whisper-base, float32, batch {args.batch_size}, {len(os.sched_getaffinity(0))} CPU cores\n")
    print("| | clips | windows | ratio |\n| --- | ---: | ---: | ---: |")
    for name, values in {
        "rows trained a second": {kind: statistics.median(rates[kind]) for kind in names},
        "hours of speech trained an hour": speed,
        "speech in a row, s": {kind: hours * 3600 / counts[kind] for kind in names},
    }.items():
        print(
            f"| {name} | {values['clips']:.2f} | {values['windows']:.2f} | {values['windows'] / values['clips']:.2f} |"
        )
    print(flush=True)
    compare(teacher)
    return 0


if __name__ == "__main__":
    sys.exit(main())
