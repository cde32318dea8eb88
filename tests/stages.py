"""The stages as functions, for tests that use several of them: a command line each, with the fewest flags.

The datasets are local directories of one configuration, `default`, and one split, `train`.
"""

import base64
import csv
import importlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from datasets import Audio, Features, List, Value
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizerFast

import create_student_model
import run_data_filtering
import run_distillation
import run_pseudo_labelling
import run_short_form_eval
from tests.conftest import forget_processes

START = ["<|startoftranscript|>", "<|ja|>", "<|transcribe|>"]


def run(main, *words) -> None:
    """Run a stage's command in this process; it must succeed."""
    forget_processes()
    assert main([str(word) for word in words]) == 0


def load(data_dir: Path, output: Path, *flags) -> Path:
    """Make a dataset of a download; gives its directory."""
    # Labelling loads this script anew, and its worker processes look functions up in the newest module of that name.
    loader = importlib.import_module("reazonspeech_manual_dataloader")
    run(loader.main, "--data_dir", data_dir, "--output_dir", output, *flags)
    return output


def label(teacher: Path | str, dataset: Path | str, output: Path, *flags) -> Path:
    """Label a dataset; gives the directory of the labelled one."""
    given = ["--model_name_or_path", teacher, "--dataset_name", dataset, "--output_dir", output, "--report_to", "none"]
    run(run_pseudo_labelling.main, *given, *flags)
    return output


def filter_clips(teacher: Path | str, dataset: Path, *flags) -> None:
    """Filter a labelled dataset by one worker; the results lie beside it."""
    run(run_data_filtering.main, "-d", dataset, "--model", teacher, "--preprocessing_num_workers", 1, *flags)


def initialise(teacher: Path | str, output: Path, *flags) -> Path:
    """Initialise a student; gives its directory."""
    run(create_student_model.main, "--teacher_checkpoint", teacher, "--save_dir", output, *flags)
    return output


def distil(student: Path, teacher: Path, dataset: Path | str, output: Path, *flags) -> Path:
    """Train a student with a frozen encoder in float32, every step logged; gives the directory of the trained one."""
    given = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--output_dir", output]
    given += ["--train_dataset_name", dataset, "--language", "ja", "--do_train", "--freeze_encoder"]
    given += ["--dtype", "float32", "--logging_steps", 1, "--report_to", "none"]
    run(run_distillation.main, *given, *flags)
    return output


def evaluate(model: Path | str, dataset: Path | str, output: Path, *flags) -> Path:
    """Evaluate a model on texts of up to 16 tokens in float32; gives the directory of the results."""
    given = ["--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", output]
    given += ["--dataset_split_name", "train", "--text_column_name", "transcription", "--id_column_name", "name"]
    run(run_short_form_eval.main, *given, "--generation_max_length", 16, "--dtype", "float32", *flags)
    return output


# ---- what goes in ----------------------------------------------------------------------------------------------------


def feature_of(value) -> Value | List | Audio:
    """The type of a column with such values; bytes are audio files."""
    types = {bytes: Audio(sampling_rate=16000, decode=False), list: List(Value("int32")), str: Value("string")}
    return types.get(type(value)) or Value({int: "int64", float: "float64"}[type(value)])


def write_dataset(root: Path, rows: list[dict], config: str = "default", split: str = "train") -> Path:
    """Write a split of a local dataset directory, whose columns are those of the first row; gives the directory."""
    features = Features({name: feature_of(value) for name, value in rows[0].items()})
    table = [
        {name: {"bytes": value, "path": None} if isinstance(value, bytes) else value for name, value in row.items()}
        for row in rows
    ]
    (root / config).mkdir(parents=True, exist_ok=True)
    path = root / config / f"{split}-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(table, features.arrow_schema), path)
    lines = ["---", "configs:"]
    for directory in sorted({path.parent for path in root.glob("*/*.parquet")}):
        lines += [f"- config_name: {directory.name}", "  data_files:"]
        for name in sorted({path.name.split("-")[0] for path in directory.iterdir()}):
            lines += [f"  - split: {name}", f"    path: {directory.name}/{name}-*"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


def encoded(samples: np.ndarray, rate: int = 16_000, format: str = "FLAC", **form) -> bytes:
    """An audio file of samples, (frames) or (frames, channels)."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, **form)
    return file.getvalue()


def tone(seconds: float, pitch: float = 220.0) -> bytes:
    """A clip of which no sample is 0, so that silence can be told from it."""
    samples = 0.3 + 0.2 * np.sin(2 * np.pi * pitch * np.arange(round(16_000 * seconds)) / 16_000)
    return encoded(samples.astype(np.float32))


def make_label(teacher: Path, text: str, *timestamps: float, start: list[str] = START) -> list[int]:
    """The decoder sequence of a text, with timestamps before and behind it or without any."""
    tokenizer = WhisperTokenizerFast.from_pretrained(teacher)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if timestamps:
        before, after = tokenizer.convert_tokens_to_ids([f"<|{time:.2f}|>" for time in timestamps])
        ids = [before, *ids, after]
    else:
        ids = [tokenizer.convert_tokens_to_ids("<|notimestamps|>"), *ids]
    return [*tokenizer.convert_tokens_to_ids(start), *ids, tokenizer.convert_tokens_to_ids("<|endoftext|>")]


def speaking(teacher: Path, directory: Path, text: str) -> Path:
    """A copy of the tiny teacher that says this text, whatever it hears.

    Each position of its decoder asks for one token so loudly that nothing else in the model counts.
    """
    shutil.copytree(teacher, directory)
    model = WhisperForConditionalGeneration.from_pretrained(teacher)
    tokenizer = WhisperTokenizerFast.from_pretrained(teacher)
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert len(set(ids)) < model.config.d_model
    decoder = model.model.decoder
    with torch.no_grad():
        for axis, token in enumerate(dict.fromkeys(ids)):
            decoder.embed_tokens.weight[token] = 0.0
            decoder.embed_tokens.weight[token, axis] = 30.0
        axes = {token: axis for axis, token in enumerate(dict.fromkeys(ids))}
        for position, token in enumerate(ids, start=3):  # of <|notimestamps|>, which the first token of text follows
            decoder.embed_positions.weight[position] = 0.0
            decoder.embed_positions.weight[position, axes[token]] = 10_000.0
    model.save_pretrained(directory)
    return directory


# ---- what comes out --------------------------------------------------------------------------------------------------


def read_rows(dataset: Path, config: str = "default", split: str = "train") -> list[dict]:
    """The rows of a local dataset directory in order, audio undecoded."""
    shards = sorted((dataset / config).glob(f"{split}-*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def read_labels(dataset: Path) -> list[list[int]]:
    return [row["whisper_transcript"] for row in read_rows(dataset)]


def read_predictions(output: Path, name: str = "train") -> list[dict]:
    with open(output / f"all_predictions.{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_metrics(output: Path, name: str = "train") -> dict:
    return json.loads((output / f"metric.{name}.json").read_text(encoding="utf-8"))


def read_page(path: Path) -> dict:
    """What the script of a page shows: the clips with their texts, figures and audio."""
    page = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def read_players(path: Path) -> dict[str, bytes]:
    """The audio files that a page holds, by the names of the clips in the page's order."""
    return {clip["id"]: base64.b64decode(clip["audio"]) for clip in read_page(path)["clips"] if clip["audio"]}


def read_figures(output: Path, name: str) -> list[float]:
    """One figure of a training's entries in metrics.jsonl."""
    entries = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [entry[name] for entry in entries if name in entry]


# ---- what stock `transformers` makes of a clip -----------------------------------------------------------------------


def samples_of(audio: bytes) -> np.ndarray:
    """The samples of an audio file, (frames, channels)."""
    return soundfile.read(io.BytesIO(audio), dtype="float32", always_2d=True)[0]


def features_of(model: Path, waveform: np.ndarray) -> torch.Tensor:
    """The log-mel of a waveform at 16 kHz, (1, mels, 3000)."""
    extractor = WhisperFeatureExtractor.from_pretrained(model)
    return extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_features


def stock_ids(model: Path, waveform: np.ndarray, tokens: int, **options) -> list[int]:
    """What `generate` gives in float32 for a waveform at 16 kHz, at most so many tokens behind a prefix of four."""
    whisper = WhisperForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    given = {"language": "ja", "task": "transcribe", "max_new_tokens": tokens, **options}
    with torch.inference_mode():
        return whisper.generate(features_of(model, waveform), force_unique_generate_call=True, **given)[0].tolist()


def stock_label(model: Path, waveform: np.ndarray, length: int, **options) -> list[int]:
    """The same as a label of at most `length` tokens, the last of which is <|endoftext|>."""
    ids = stock_ids(model, waveform, length - 4, **options)
    end = WhisperTokenizerFast.from_pretrained(model).convert_tokens_to_ids("<|endoftext|>")
    return ids if ids[-1] == end else [*ids[:-1], end]


def stock_text(model: Path, waveform: np.ndarray, tokens: int, **options) -> str:
    ids = stock_ids(model, waveform, tokens, **options)
    return WhisperTokenizerFast.from_pretrained(model).decode(ids, skip_special_tokens=True).strip()
