#!/usr/bin/env python
"""Label a speech dataset with a Whisper teacher.

In:  `--dataset_name`: a builder file such as reazonspeech_manual_dataloader.py, a local dataset directory (parquet as
     on the Hub, or audio files with metadata.csv or .jsonl) or a Hub id; any audio that soundfile reads.
Out: <output_dir>/<config>/<split>-000ii-of-000NN.parquet: the input's columns, the audio bytes untouched, and
     `whisper_transcript`: the ids of <|startoftranscript|><|ja|><|transcribe|>, then <|notimestamps|> or timestamps
     with the text, then one <|endoftext|>; with `--decode_token_ids` its text. `--scores` adds columns to filter by.
     Beside them README.md (the card) and labelling.<config>.<split>.json (the record: counts, rows left out, speed).

    python run_pseudo_labelling.py --model_name_or_path openai/whisper-large-v3 --dataset_name org/speech \\
        --dataset_split_name train --language ja --return_timestamps --output_dir labelled
    accelerate launch --multi_gpu run_pseudo_labelling.py ... --hub_model_id org/speech-labelled

Work is done in shards of `--shard_size` rows. A shard appears when it is complete, so the same command continues after
any interruption, on any number of processes, and ends with the same bytes. Machines must see one `--output_dir`.
A label that has not ended at `--max_label_length` tokens is cut there, ended, and counted as truncated.
"""

import argparse
import collections
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
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import datasets
import librosa
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import soundfile
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from datasets import Audio, Dataset, Features, List, Value
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from filelock import FileLock, Timeout
from huggingface_hub import DatasetCard, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx
from tqdm import tqdm
from transformers import LogitsProcessor, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizerFast
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
from transformers.utils import is_flash_attn_2_available

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16_000
WINDOW = 30 * SAMPLING_RATE  # what Whisper hears, in samples
BATCHES_AHEAD = 3  # whose audio is decoded while the device works
ROWS_PER_GROUP = 100  # of the parquet files, as `datasets` writes audio: ~10 MB to read for one row
PLAN_SECONDS = 20  # in which --dry_run counts clips
LABEL = "whisper_transcript"
SCORES = ("avg_logprob", "compression_ratio", "no_speech_prob")  # as openai-whisper's `transcribe` names them
LIBRARIES = ("torch", "transformers", "datasets", "huggingface_hub", "accelerate", "soundfile", "librosa")
HUB_ERRORS = (OSError, HFValidationError, httpx.HTTPError, RuntimeError)  # RuntimeError: Xet's uploads
NEW_CARD = """---
license: other
task_categories:
- automatic-speech-recognition
---
# Speech with labels by Whisper

The labels come with the terms of the audio. Those of ReazonSpeech: use only for information analysis under Article 30-4
of the Japanese Copyright Act.
"""


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


def first_line(error: BaseException) -> str:
    """The line of an error that says what is wrong; the Hub's begin with the request's id."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    return lines[0] if lines else type(error).__name__


def local_directory(reference: str) -> Path | None:
    """The directory that a repository reference names, or None where it is a Hub id (`org/name`)."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        fail(f"{reference!r} is neither a directory that exists nor a Hub id such as org/name")
    return None


# --------------------------------------------------------------------------------------------------------------- labels


class Label(NamedTuple):
    ids: list[int]  # from <|startoftranscript|> to one <|endoftext|>
    truncated: bool  # it had not ended at the length limit
    avg_logprob: float | None = None
    no_speech_prob: float | None = None


def finish_label(sequence: list[int], prefix_length: int, end: int) -> tuple[list[int], bool]:
    """The stored form of what `generate` returned, and whether it had to be cut.

    Without padding and with one end token, which takes the place of the last token where there is none.
    """
    if end in sequence[prefix_length:]:
        return sequence[: sequence.index(end, prefix_length) + 1], False
    return [*sequence[:-1], end], True


def timestamps_are_paired(body: list[int], first_timestamp: int) -> bool:
    """Whether timestamps open and close every stretch of text and never go back (`body`: no prefix, no end token)."""
    opened, latest = False, first_timestamp
    for token in body:
        if token < first_timestamp:
            if not opened:
                return False
        elif token < latest:
            return False
        else:
            opened, latest = not opened, token
    return not opened


class LabelScores(LogitsProcessor):
    """Mean log-probability of labels, and the probability of no speech, picked up while `generate` runs.

    As openai-whisper's DecodingResult has them: log-probabilities are of the scores after suppression and timestamp
    rules and count the end token; no speech is the share of <|nospeech|> behind the very first token.
    """

    def __init__(self, model, prefix_length: int, no_speech: int, beams: int):
        self.prefix_length, self.no_speech, self.beams = prefix_length, no_speech, beams
        self.no_speech_probs: list[float] = []
        self.best: dict[tuple, dict[int, float]] = {}  # (clip, text so far) -> the best next tokens
        self.hook = model.get_output_embeddings().register_forward_hook(self.see_first_logits)

    def see_first_logits(self, module, inputs, logits: torch.Tensor) -> None:
        if logits.shape[1] == self.prefix_length:  # unlike those of language detection
            self.no_speech_probs = logits[:: self.beams, 0].float().softmax(-1)[:, self.no_speech].tolist()
            self.hook.remove()  # later steps may be compiled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # A search of n beams goes on with some of the best 2n tokens.
        best = scores.float().log_softmax(-1).topk(2 * self.beams)
        texts = input_ids[:, self.prefix_length :].tolist()
        for row, (text, *pair) in enumerate(zip(texts, best.indices.tolist(), best.values.tolist(), strict=True)):
            self.best[row // self.beams, *text] = dict(zip(*pair, strict=True))
        return scores

    def add_to(self, label: Label, clip: int) -> Label:
        text = label.ids[self.prefix_length :][: -1 if label.truncated else None]
        choices = [(self.best[clip, *text[:place]], token) for place, token in enumerate(text)]
        # A token that isn't there ties with the last that is.
        logprobs = [best.get(token, min(best.values())) for best, token in choices]
        return label._replace(avg_logprob=np.mean(logprobs), no_speech_prob=self.no_speech_probs[clip])


# ---------------------------------------------------------------------------------------------------------------- audio


class Clip(NamedTuple):
    waveform: np.ndarray | None  # mono float32 at 16 kHz, no more than 30 s; None where there is a problem
    seconds: float  # of the whole clip
    problem: str | None = None


def header_seconds(audio: bytes | None) -> float:
    """Duration that an audio file's header tells; 0 where it can't be read."""
    try:
        header = soundfile.info(io.BytesIO(audio or b""))
    except soundfile.LibsndfileError:
        return 0.0
    return header.frames / header.samplerate


def load_clip(value: pa.BinaryScalar) -> Clip:
    """Decode an audio file, mix it to mono and resample it to 16 kHz; of all past 31 s only the length counts."""
    audio = value.as_py()
    if not audio:
        return Clip(None, 0.0, "no audio")
    try:
        with soundfile.SoundFile(io.BytesIO(audio)) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
            waveform = file.read(31 * rate, dtype="float32", always_2d=True).mean(axis=1)
    except soundfile.LibsndfileError as error:
        return Clip(None, 0.0, f"undecodable: {error.error_string}")
    if not len(waveform):
        return Clip(None, 0.0, "zero length")
    if not np.isfinite(waveform).all():
        return Clip(None, 0.0, "samples that are not finite numbers")
    if len(waveform) < 31 * rate:  # headers of damaged files promise more
        seconds = len(waveform) / rate
    if rate != SAMPLING_RATE:
        waveform = librosa.resample(waveform, orig_sr=rate, target_sr=SAMPLING_RATE)
    return Clip(waveform[:WINDOW], seconds)


def log_mel(waveforms: torch.Tensor, extractor: WhisperFeatureExtractor) -> torch.Tensor:
    """Whisper's log-mel of zero-padded waveforms (batch, samples), as its extractor gives it: (batch, mels, 3000).

    Only the frames that the longest clip fills are computed, and one more: all later ones are equal to that one.
    """
    hop, frames = extractor.hop_length, extractor.nb_max_frames
    filled = min(frames, math.ceil((waveforms.shape[1] + extractor.n_fft // 2) / hop) + 1)
    padded = torch.nn.functional.pad(waveforms, (0, filled * hop - waveforms.shape[1]))
    window = torch.hann_window(extractor.n_fft, device=padded.device)
    stft = torch.stft(padded, extractor.n_fft, hop, window=window, return_complex=True)
    power = (stft[..., :-1].abs() ** 2).contiguous()
    filters = torch.from_numpy(extractor.mel_filters).to(padded.device, torch.float32)
    mel = torch.clamp(filters.T @ power, min=1e-10).log10()
    mel = (torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0
    return torch.cat([mel, mel[:, :, -1:].expand(-1, -1, frames - filled)], dim=2)


# -------------------------------------------------------------------------------------------------------------- teacher


def load(kind: type, reference: str, **settings):
    """`kind.from_pretrained(reference)`, or one line about why it can't be had."""
    try:
        return kind.from_pretrained(reference, **settings)
    except (OSError, ValueError, pickle.UnpicklingError) as error:  # the last: weights that are more than tensors
        fail(f"can't load --model_name_or_path {reference}: {first_line(error)}; for a private one `hf auth login`")


class Teacher:
    """A Whisper that labels batches of waveforms on a device; its weights come by `load_weights`, the rest at once."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.beams = args, device, args.generation_num_beams
        self.attention = attention_implementation(args, device)
        self.reference = str(local_directory(args.model_name_or_path) or args.model_name_or_path)
        self.config = load(transformers.AutoConfig, self.reference)
        if self.config.model_type != "whisper":
            fail(f"--model_name_or_path {self.reference} is a {self.config.model_type} model, not a Whisper")
        self.extractor = load(WhisperFeatureExtractor, self.reference)
        self.tokenizer = load(WhisperTokenizerFast, self.reference)
        try:
            self.generation = transformers.GenerationConfig.from_pretrained(self.reference)
        except OSError:  # checkpoints of 2022 have none
            self.generation = transformers.GenerationConfig.from_model_config(self.config)
        self.prompt = prompt_arguments(self.generation, args.language, args.task)
        vocabulary = self.tokenizer.get_vocab()
        self.end, self.no_timestamps = vocabulary["<|endoftext|>"], vocabulary["<|notimestamps|>"]
        self.no_speech = vocabulary.get("<|nospeech|>", vocabulary.get("<|nocaptions|>"))
        self.prefix_length = (3 if self.prompt else 1) + (not args.return_timestamps)
        longest = self.config.max_target_positions
        if not self.prefix_length + 1 < args.max_label_length <= longest:
            fail(f"--max_label_length {args.max_label_length} must be within {self.prefix_length + 2} and {longest}")
        self.generation.max_length = None
        self.generation.max_new_tokens = args.max_label_length - self.prefix_length
        self.cache: EncoderDecoderCache | None = None  # of `cache_rows` clips, for compiled code
        self.cache_rows = 0
        self.memory: torch.Tensor | None = None  # of `encode_for_cpu`

    def load_weights(self) -> None:
        settings = {"dtype": getattr(torch, self.args.dtype), "attn_implementation": self.attention}
        self.model = load(WhisperForConditionalGeneration, self.reference, **settings)
        self.model.generation_config = self.generation
        self.model.to(self.device).eval()
        self.encoder = self.model.get_encoder()
        if self.args.torch_compile and self.device.type == "cuda":
            torch._dynamo.config.suppress_errors = True  # what can't be compiled runs as it is
            self.encoder = torch.compile(self.encoder)  # `generate` compiles its steps where the cache is static

    def label(self, waveforms: list[np.ndarray], rows: int) -> list[Label]:
        """Labels of clips (mono, 16 kHz, up to 30 s); compiled code works on `rows` clips, the last one repeated."""
        rows = rows if self.args.torch_compile else len(waveforms)
        padded = torch.zeros(rows, max(map(len, waveforms)), pin_memory=self.device.type == "cuda")
        for row in range(rows):
            waveform = waveforms[min(row, len(waveforms) - 1)]
            padded[row, : len(waveform)] = torch.from_numpy(waveform)
        scores = None
        with torch.inference_mode():
            features = log_mel(padded.to(self.device, non_blocking=True), self.extractor).to(self.model.dtype)
            if self.device.type == "cpu" and self.beams == 1 and not self.args.torch_compile:
                states, cache = self.encode_for_cpu(features)
            else:
                states, cache = self.encoder(features)[0], self.static_cache(rows) if self.args.torch_compile else None
            if self.args.scores:
                scores = LabelScores(self.model, self.prefix_length, self.no_speech, self.beams)
            sequences = self.model.generate(
                encoder_outputs=BaseModelOutput(states),
                past_key_values=cache,
                **self.prompt,
                # Whisper has no padding to mask; without this `generate` warns of it.
                attention_mask=torch.ones(rows, features.shape[2], dtype=torch.long, device=self.device),
                force_unique_generate_call=True,
                return_timestamps=self.args.return_timestamps,
                num_beams=self.beams,
                do_sample=False,
                logits_processor=[scores] if scores else None,
            ).tolist()[: len(waveforms)]
        labels = [Label(*finish_label(sequence, self.prefix_length, self.end)) for sequence in sequences]
        return [scores.add_to(label, clip) for clip, label in enumerate(labels)] if scores else labels

    def encode_for_cpu(self, features: torch.Tensor) -> tuple[torch.Tensor, EncoderDecoderCache]:
        """Encoder states, and a cache with the decoder's keys and values of them.

        Clip by clip, which suits the CPU's caches, and in memory that is kept: to copy, and to touch new memory, would
        take as long as the projections themselves.
        """
        rows, attentions = len(features), [layer.encoder_attn for layer in self.model.get_decoder().layers]
        heads, width, positions = attentions[0].num_heads, attentions[0].head_dim, self.config.max_source_positions
        projections = [projection for attention in attentions for projection in (attention.k_proj, attention.v_proj)]
        if self.memory is None or self.memory.shape[1] < rows:
            shape = (1 + len(projections), rows, positions * heads * width)
            self.memory = torch.empty(shape, dtype=features.dtype)
        states, *cross = self.memory[:, :rows]
        states, cross = states.view(rows, positions, -1), [part.view(rows, heads, positions, width) for part in cross]
        for row in range(rows):
            states[row] = self.encoder(features[row : row + 1])[0][0]
            for projection, part in zip(projections, cross, strict=True):
                part[row] = projection(states[row]).view(positions, heads, width).transpose(0, 1)
        cache = DynamicCache()
        for keys, values in zip(cross[::2], cross[1::2], strict=True):
            layer = DynamicLayer()
            layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
            layer.is_initialized = True
            cache.layers.append(layer)
        return states, EncoderDecoderCache(DynamicCache(), cache)

    def static_cache(self, rows: int) -> EncoderDecoderCache:
        """The same emptied cache for every batch of so many rows: another one would be compiled for again."""
        if self.cache_rows != rows:
            lengths = (self.args.max_label_length, self.config.max_source_positions)
            caches = (StaticCache(config=self.config, max_cache_len=length) for length in lengths)
            self.cache, self.cache_rows = EncoderDecoderCache(*caches), rows
        self.cache.reset()
        return self.cache


def attention_implementation(args: argparse.Namespace, device: torch.device) -> str:
    """What `transformers` calls `--attn_type`; flash attention only where it can run."""
    if args.attn_type != "flash_attn":
        return args.attn_type
    # It doesn't mask what a static cache, which comes with --torch_compile, has yet to be filled with.
    fits = device.type == "cuda" and args.dtype != "float32" and not args.torch_compile
    if fits and is_flash_attn_2_available():
        return "flash_attention_2"
    needs = "a CUDA GPU, the package flash-attn, --dtype bfloat16 or float16, and no --torch_compile"
    logger.warning("--attn_type flash_attn needs %s: using sdpa", needs)
    return "sdpa"


def prompt_arguments(generation_config, language: str | None, task: str | None) -> dict[str, str]:
    """Language and task as `generate` wants them; none for an English-only checkpoint, where they are an error."""
    languages = getattr(generation_config, "lang_to_id", None)
    if not getattr(generation_config, "is_multilingual", languages is not None):
        if language or task:
            fail("this teacher knows only English: leave --language and --task out")
        return {}
    arguments = {"task": task or "transcribe"}
    if language:
        token = f"<|{TO_LANGUAGE_CODE.get(language.lower(), language.lower())}|>"
        if token not in (languages or {}):
            codes = ", ".join(sorted(name.strip("<|>") for name in languages or {}))
            fail(f"--language {language!r} is not one of the teacher's: {codes}")
        arguments["language"] = token
    return arguments


def teacher_digest(model: WhisperForConditionalGeneration) -> str:
    """Digest of a few numbers of each weight and of the rules of decoding, to tell teachers of one name apart."""
    rules = ("suppress_tokens", "begin_suppress_tokens", "max_initial_timestamp_index")
    digest = hashlib.sha256(repr([getattr(model.generation_config, rule, None) for rule in rules]).encode())
    for weight in model.parameters():
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def label_with_halving(clips: list[np.ndarray], size: int, label: Callable) -> tuple[list[Label], int]:
    """Label clips in pieces of at most `size`, halved when the device's memory runs out; also gives the last size."""
    labels: list[Label] = []
    while len(labels) < len(clips):
        piece = clips[len(labels) : len(labels) + size]
        try:
            labels += label(piece, size)
            continue
        except torch.OutOfMemoryError as error:
            if size == 1:
                fail(f"the device has not enough memory for one clip: {first_line(error)}")
        # Outside of `except`, whose traceback holds on to tensors.
        size = math.ceil(size / 2)
        logger.warning("out of memory: batches of %d for the rest of this shard", size)
        torch.cuda.empty_cache()
    return labels, size


# ---------------------------------------------------------------------------------------------------------------- input


def open_dataset(args: argparse.Namespace, stream: bool = False) -> Dataset | datasets.IterableDataset:
    """The rows to label, with undecoded audio. A stream is read where it lies: nothing is prepared in a cache."""
    name, config, split = args.dataset_name, args.dataset_config_name, args.dataset_split_name
    how = {"streaming": True} if stream else {"num_proc": max(1, args.preprocessing_num_workers)}
    try:
        if name.endswith(".py"):
            builder = builder_of(Path(name).expanduser(), config, args.dataset_dir_suffix)
            if not stream:
                builder.download_and_prepare(num_proc=how["num_proc"])
            dataset = builder.as_streaming_dataset(split) if stream else builder.as_dataset(split)
        else:
            dataset = read_repository(str(local_directory(name) or name), config, split, how)
    except (ValueError, RuntimeError, OSError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        what = f"can't load {config or 'the default configuration'}, {split} of {name}"
        hint = "" if Path(name).expanduser().exists() else "; check the name, and `hf auth login` for a private one"
        fail(f"{what}: {first_line(error.__cause__ or error)}{hint}")
    for flag in ("audio_column_name", "text_column_name", "id_column_name"):
        column = getattr(args, flag)
        if column is not None and column not in dataset.column_names:
            fail(f"--{flag} {column!r} is not a column of {name}, which has {', '.join(dataset.column_names)}")
    if old := [column for column in (LABEL, *SCORES) if column in dataset.column_names]:
        logger.warning("%s has %s already: replaced", name, ", ".join(old))
        dataset = dataset.remove_columns(old)
    if args.max_samples is not None:
        dataset = dataset.take(args.max_samples if stream else min(args.max_samples, len(dataset)))
    if stream:
        return dataset
    return dataset.cast_column(args.audio_column_name, Audio(sampling_rate=SAMPLING_RATE, decode=False))


def builder_of(path: Path, config: str | None, suffix: str | None) -> datasets.DatasetBuilder:
    """The builder that a Python file defines, which `load_dataset` runs no more.

    `suffix`: which part of a download in parts, as the builder's `dataset_dir_suffix`.
    """
    if not path.is_file():
        fail(f"--dataset_name {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where worker processes find it
    spec.loader.exec_module(module)
    classes = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == path.stem]
    builders = [cls for cls in classes if issubclass(cls, datasets.DatasetBuilder)]
    if len(builders) != 1:
        fail(f"--dataset_name {path} must define one datasets.DatasetBuilder, not {len(builders)}")
    return builders[0](config_name=config, **({"dataset_dir_suffix": suffix} if suffix else {}))


def read_repository(name: str, config: str | None, split: str, how: dict) -> Dataset | datasets.IterableDataset:
    """A split of a dataset repository. Parquet is loaded by its files: `datasets`' cache of a directory is stale."""
    builder = datasets.load_dataset_builder(name, config)
    files = list((builder.config.data_files or {}).get(split, []))
    if not files:
        raise ValueError(f"its splits are {', '.join(builder.config.data_files or ['unknown'])}")
    if isinstance(builder, AudioFolder):
        if Path(name).is_dir():
            return list_audio(list(map(Path, files)))
        return read_repository(snapshot_download(name, repo_type="dataset"), config, split, how)
    if not isinstance(builder, Parquet):
        return datasets.load_dataset(name, config, split=split, **how)
    if (shard := re.search(r"-of-(\d+)\.parquet$", files[0])) and len(files) != int(shard[1]):
        fail(f"{name} has {len(files)} of {int(shard[1])} shards of {split}: finish the stage that writes it")
    if Path(name).is_dir() and not any(pq.read_metadata(path).num_rows for path in files):
        return Dataset(pq.read_table(files[0]))  # `load_dataset` refuses a split without rows
    return datasets.load_dataset("parquet", data_files={split: files}, split=split, **how)


def list_audio(paths: list[Path]) -> Dataset:
    """Rows of audio files and their metadata.csv or .jsonl, as `audiofolder` has them; it can't without torchcodec."""
    metadata: dict[Path, dict] = {}
    for path in (path for path in paths if path.stem == "metadata"):
        table = (pa.csv.read_csv if path.suffix == ".csv" else pa.json.read_json)(path)
        metadata |= {path.parent / row.pop("file_name"): row for row in table.to_pylist()}
    audio = sorted(path for path in paths if path.suffix.lower() in AudioFolder.EXTENSIONS)
    audio = [path for path in audio if path in metadata or not metadata]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"audio": pa.array([{"bytes": None, "path": str(path)} for path in audio], struct)}
    for name in dict.fromkeys(name for row in metadata.values() for name in row):
        columns[name] = pa.array([metadata[path].get(name) for path in audio])
    return Dataset(pa.table(columns))


def with_bytes(rows: pa.Table, audio_column: str) -> pa.Table:
    """The same rows with the bytes of audio files that they only name."""
    if pc.struct_field(rows[audio_column], "bytes").null_count:
        values = rows[audio_column].to_pylist()
        for value in values:
            if value and value["bytes"] is None and value["path"] and (path := Path(value["path"])).is_file():
                value |= {"bytes": path.read_bytes(), "path": path.name}
        column = rows.schema.get_field_index(audio_column)
        rows = rows.set_column(column, rows.schema.field(column), pa.array(values, rows.schema.field(column).type))
    return rows


def dataset_digest(dataset: Dataset, args: argparse.Namespace) -> str:
    """Digest of ids and sizes of the audio, to tell datasets of one name apart."""
    digest = hashlib.sha256(json.dumps(dataset.column_names).encode())
    columns = [args.audio_column_name, *([args.id_column_name] if args.id_column_name else [])]
    dataset = dataset.select_columns(columns).with_format("arrow")
    for start in range(0, len(dataset), 10_000):
        rows = dataset[start : start + 10_000]
        sizes = pc.binary_length(pc.struct_field(rows[args.audio_column_name], "bytes")).to_pylist()
        ids = rows[args.id_column_name].to_pylist() if args.id_column_name else []
        digest.update(json.dumps([sizes, ids], default=str).encode())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------- shards


class Shards:
    """The files of a labelled split, and the rows and settings that they are made of."""

    def __init__(self, args: argparse.Namespace, rows: int, settings: dict):
        self.directory, self.rows, self.settings = args.output_dir, rows, settings
        self.config, self.split = args.dataset_config_name or "default", args.dataset_split_name
        self.number = max(1, math.ceil(rows / args.shard_size))
        names = (f"{self.split}-{shard:05d}-of-{self.number:05d}.parquet" for shard in range(self.number))
        self.paths = [self.directory / self.config / name for name in names]
        self.record = self.directory / f"labelling.{self.config}.{self.split}.json"

    def facts(self, shard: int) -> dict | None:
        """What is known of a finished shard; None where it is missing or was made with other settings."""
        facts = read_facts(self.paths[shard])
        return facts if facts and facts["settings"] == self.settings else None

    def present(self) -> list[Path]:
        return sorted((self.directory / self.config).glob(f"{self.split}-*-of-*.parquet"))


def read_facts(path: Path) -> dict | None:
    """What a shard tells of its making; None where it is missing or damaged."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):  # the latter of a damaged file
        return None
    return json.loads(metadata.get(b"kotoba", b'{"settings": null}'))


def batches(
    dataset: Dataset, shards: Shards, pending: list[int], pool: ThreadPoolExecutor, args: argparse.Namespace
) -> Iterator[tuple[int, pa.Table, list[int], list[Future]]]:
    """Batches of clips that are being decoded: of one shard after the other, the longest clips first.

    What lies in a batch together depends on the shard alone, not on processes or workers.
    """
    size = args.per_device_eval_batch_size
    for shard in pending:
        first, end = shard * args.shard_size, min((shard + 1) * args.shard_size, shards.rows)
        rows = with_bytes(dataset.with_format("arrow")[first:end], args.audio_column_name)
        audio = pc.struct_field(rows[args.audio_column_name], "bytes")
        seconds = list(pool.map(lambda value: header_seconds(value.as_py()), audio))
        order = sorted(range(len(rows)), key=seconds.__getitem__, reverse=True)
        for start in range(0, max(1, len(order)), size):  # one empty batch of an empty shard
            members = order[start : start + size]
            yield shard, rows, members, [pool.submit(load_clip, audio[row]) for row in members]


def ahead(items: Iterator, number: int) -> Iterator:
    """The same items, each asked for `number` items before it is needed."""
    waiting = collections.deque(itertools.islice(items, number))
    while waiting:
        yield waiting.popleft()
        waiting.extend(itertools.islice(items, 1))


def label_shards(dataset: Dataset, shards: Shards, pending: list[int], teacher: Teacher, args, report: Callable):
    """Label the pending shards and write each when it is complete. `report` is told clips and seconds of each batch."""
    writing: Future | None = None
    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(max(1, args.dataloader_num_workers)) as pool:
        try:
            results, size = {}, args.per_device_eval_batch_size  # of the shard in work
            for shard, rows, members, loading in ahead(batches(dataset, shards, pending, pool, args), BATCHES_AHEAD):
                clips = [future.result() for future in loading]
                waveforms = [clip.waveform for clip in clips if clip.waveform is not None]
                labels, size = label_with_halving(waveforms, size, teacher.label)
                remaining = iter(labels)
                for row, clip in zip(members, clips, strict=True):
                    results[row] = clip._replace(waveform=None), None if clip.problem else next(remaining)
                report(len(members), sum(clip.seconds for clip in clips))
                if len(results) == len(rows):
                    if writing:
                        writing.result()
                    results = [results[row] for row in range(len(rows))]
                    writing = writer.submit(write_labels, shard, rows, results, shards, dataset.features, teacher, args)
                    results, size = {}, args.per_device_eval_batch_size
            if writing:
                writing.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_labels(
    shard: int,
    rows: pa.Table,
    results: list[tuple[Clip, Label | None]],
    shards: Shards,
    features: Features,
    teacher: Teacher,
    args: argparse.Namespace,
) -> None:
    """Write a shard's rows that have a label, and with them what became of the others."""
    clips, labels = [clip for clip, _ in results], [label for _, label in results if label]
    bodies = [label.ids[teacher.prefix_length : -1] for label in labels]
    names = [f"row {shard * args.shard_size + row}" for row in range(len(rows))]
    if args.id_column_name:
        names = rows[args.id_column_name].to_pylist()
    malformed = [body for body in bodies if not timestamps_are_paired(body, teacher.no_timestamps + 1)]
    facts = {
        "settings": shards.settings,
        "rows_in": len(clips),
        "rows_out": len(labels),
        "seconds": round(sum(clip.seconds for clip in clips), 3),
        "over_30_s": sum(clip.seconds > 30 for clip in clips),
        "truncated": sum(label.truncated for label in labels),
        "malformed_timestamps": len(malformed) if args.return_timestamps else 0,
        "tokens": sum(len(label.ids) for label in labels),
        "unusable": [[str(name), clip.problem] for name, clip in zip(names, clips, strict=True) if clip.problem],
    }
    new = {LABEL: (List(Value("int32")), [label.ids for label in labels])}
    if args.decode_token_ids:
        decode = {"skip_special_tokens": True, "decode_with_timestamps": True}
        new[LABEL] = Value("string"), teacher.tokenizer.batch_decode(bodies, **decode)
    if args.scores:
        texts = teacher.tokenizer.batch_decode(bodies, skip_special_tokens=True)
        texts = [text.strip().encode() for text in texts]
        # Above a ratio of 2.4 Whisper takes a text for a loop.
        ratios = [len(text) / len(zlib.compress(text)) for text in texts]
        values = ([label.avg_logprob for label in labels], ratios, [label.no_speech_prob for label in labels])
        for name, column in zip(SCORES, values, strict=True):
            new[name] = Value("float32"), [round(value, 4) for value in column]
    rows = rows.filter(pa.array([label is not None for _, label in results], pa.bool_()))
    schema = Features({**features, **{name: feature for name, (feature, _) in new.items()}}).arrow_schema
    for name, (_, values) in new.items():
        rows = rows.append_column(name, pa.array(values, schema.field(name).type))
    metadata = {**schema.metadata, b"kotoba": json.dumps(facts, ensure_ascii=False).encode()}
    path = shards.paths[shard]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(rows.cast(schema).replace_schema_metadata(metadata), path)
    except OSError as error:
        path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
        fail(f"can't write {path}: {first_line(error)}; the same command continues once there is room")


def write_shard(table: pa.Table, path: Path) -> None:
    """Write a parquet file that appears under its name only when it is whole and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        with pq.ParquetWriter(file, table.schema, compression="snappy", use_dictionary=False) as writer:
            if table.num_rows:  # `datasets` can't read a row group of none
                writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(text: str, path: Path) -> None:
    """Write a text file that appears under its name only when it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# ------------------------------------------------------------------------------------------------------------- progress


class Progress:
    """The main process's bar and reports to the tracker; it sees the others by the shards that they finish."""

    def __init__(self, accelerator: Accelerator, shards: Shards, pending: list[int], args: argparse.Namespace):
        self.accelerator, self.shards, self.every = accelerator, shards, args.logging_steps
        self.others = [shard for shard in pending if shard % accelerator.num_processes]
        self.steps, self.clips, self.seconds, self.tracked = 0, 0, 0.0, args.report_to != "none"
        todo = sum(min(args.shard_size, shards.rows - shard * args.shard_size) for shard in pending)
        try:
            accelerator.init_trackers(args.wandb_project, {name: str(value) for name, value in vars(args).items()})
        except Exception as error:  # whatever its kind, what watches the work must not end it
            logger.warning("no tracking by %s: %s", args.report_to, first_line(error))
            self.tracked, accelerator.trackers = False, []
        self.bar = tqdm(desc="labelling", total=shards.rows, initial=shards.rows - todo, unit=" clips", smoothing=0)
        self.started = self.looked = time.monotonic()

    def __call__(self, clips: int, seconds: float) -> None:
        now, self.steps = time.monotonic(), self.steps + 1
        if self.others and now - self.looked > 10:
            found = {shard: facts for shard in self.others if (facts := self.shards.facts(shard))}
            self.others = [shard for shard in self.others if shard not in found]
            clips += sum(facts["rows_in"] for facts in found.values())
            seconds += sum(facts["seconds"] for facts in found.values())
            self.looked = now
        self.clips, self.seconds = self.clips + clips, self.seconds + seconds
        rate, speed = max(self.clips, 1) / (now - self.started), self.seconds / (now - self.started)
        self.bar.set_postfix_str(f"{speed:.1f} h of audio an hour", refresh=False)
        self.bar.update(clips)
        if self.tracked and self.steps % self.every == 0:
            left = (self.shards.rows - self.bar.n) / rate / 3600
            values = {"clips": self.bar.n, "clips_per_second": rate, "audio_hours_per_hour": speed, "hours_left": left}
            self.accelerator.log(values, step=self.steps)


# ----------------------------------------------------------------------------------------------- record, card and push


def data_settings(args: argparse.Namespace, teacher: Teacher, rows: int, digests: dict) -> dict:
    """What the labelled data depends on, near-ties of low precision aside: a run with other values must not go on."""
    same = ("audio_column_name", "id_column_name", "shard_size", "dtype", "return_timestamps", "generation_num_beams")
    same += ("max_label_length", "decode_token_ids", "scores")
    return {
        **{name: getattr(args, name) for name in same},
        **{"language": None, "task": None, **teacher.prompt},
        "attention": teacher.attention,
        "rows": rows,
        **digests,
    }


def check_present(shards: Shards, overwrite: bool) -> None:
    """Refuse to mix with what other settings left."""
    for path in shards.present():
        facts = read_facts(path)
        if overwrite or facts is None or facts["settings"] == shards.settings:
            continue
        old = facts["settings"] or {}
        name = next(name for name, value in shards.settings.items() if old.get(name) != value)
        fail(
            f"{path} was made with {name} {old.get(name, 'unknown')}, this run has {shards.settings[name]}: go back to "
            "that, take another --output_dir, or start afresh with --overwrite_output_dir"
        )


def write_record(shards: Shards, status: str, **facts) -> None:
    record = {"status": status, "settings": shards.settings, **facts}
    write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str), shards.record)


def card(text: str | None, shards: Shards, total: dict, args: argparse.Namespace) -> str:
    """Dataset card with this split's files and section, and all else that the card `text` has."""
    content, config, split = DatasetCard(text or NEW_CARD), shards.config, shards.split
    configs = {entry["config_name"]: entry for entry in content.data.get("configs") or []}
    entry = configs.setdefault(config, {"config_name": config, "data_files": []})
    others = [files for files in entry["data_files"] if files["split"] != split]
    entry["data_files"] = [*others, {"split": split, "path": f"{config}/{split}-*"}]
    content.data.configs = list(configs.values())
    language = shards.settings["language"]
    content.data.language = content.data.language or (language and language.strip("<|>"))
    content.data.dataset_info = None  # row counts of earlier contents, which `datasets` would insist on
    heading = f"## {config}, {split}"
    kept = re.sub(rf"(?ms)^{re.escape(heading)}\n.*?(?=^## |\Z)", "", content.text).rstrip()
    facts = {"teacher": args.model_name_or_path, **shards.settings, **total, "unusable": len(total["unusable"])}
    table = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    content.text = f"{kept}\n\n{heading}\n\nLabels are in `{LABEL}`.\n\n| | |\n| --- | --- |\n{table}\n"
    return str(content)


def prepare_repository(args: argparse.Namespace) -> str | None:
    """The dataset repository to push to, made and proved writable; None where nothing is to be pushed."""
    target = args.hub_model_id
    if args.push_to_hub and target is None:
        fail("--push_to_hub needs --hub_model_id, the dataset repository to push to")
    if args.push_to_hub is False or target is None or local_directory(target):
        return None
    try:
        if args.dry_run:
            HfApi().whoami()
        else:
            HfApi().create_repo(target, repo_type="dataset", private=args.hub_private_repo, exist_ok=True)
            HfApi().auth_check(target, repo_type="dataset", write=True)
    except HUB_ERRORS as error:
        fail(f"can't write to the dataset {target}: {first_line(error)}; log in with a write token: hf auth login")
    return target


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


def push(repository: str, shards: Shards, total: dict, args: argparse.Namespace) -> None:
    """Upload shards and record, then a card that keeps the repository's other configurations."""
    api, ours = HfApi(), [f"{shards.config}/{shards.split}-*-of-*.parquet", shards.record.name]
    to = {"repo_id": repository, "repo_type": "dataset", "commit_message": f"Label {shards.config}, {shards.split}"}

    def push_card() -> None:
        head = api.dataset_info(repository).sha
        try:
            path = hf_hub_download(repository, "README.md", repo_type="dataset", revision=head)
            text = Path(path).read_text(encoding="utf-8")
        except EntryNotFoundError:
            text = None
        text = card(text, shards, total, args)
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", parent_commit=head, **to)

    try:
        push_again(
            lambda: api.upload_folder(folder_path=shards.directory, allow_patterns=ours, delete_patterns=ours, **to)
        )
        push_again(push_card)
    except HUB_ERRORS as error:
        fail(
            f"the push to {repository} failed: {first_line(error)}; all labels are in {shards.directory}, "
            "and the same command again only pushes"
        )
    logger.info("pushed to %s/datasets/%s", api.endpoint, repository)


def finish(shards: Shards, args: argparse.Namespace, progress: Progress, repository: str | None) -> None:
    """Card, record and push, when all shards are there."""
    for _ in range(60):
        found = [shards.facts(shard) for shard in range(shards.number)]
        if None not in found:
            break
        time.sleep(1)  # NFS may take so long to show what other machines wrote
    if missing := found.count(None):
        fail(f"{missing} of {shards.number} shards are not in {shards.directory}: do all machines see it? Run again")
    counts = ("rows_in", "rows_out", "over_30_s", "truncated", "malformed_timestamps", "tokens")
    total = {name: sum(facts[name] for facts in found) for name in counts}
    total["hours"] = round(sum(facts["seconds"] for facts in found) / 3600, 4)
    total["unusable"] = [row for facts in found for row in facts["unusable"]]
    readme = shards.directory / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else None
    write_text(card(text, shards, total, args), readme)
    if json.loads(shards.record.read_text(encoding="utf-8"))["status"] != "complete":
        seconds = time.monotonic() - progress.started
        run = {"clips": progress.clips, "wall_seconds": seconds, "clips_per_second": progress.clips / seconds}
        run["processes"] = progress.accelerator.num_processes
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        total |= {"unusable_rows": len(total["unusable"]), "last_run": run}
        write_record(shards, "complete", **total, arguments=vars(args), versions=versions)
    logger.info("%d of %d rows are labelled in %s", total["rows_out"], total["rows_in"], shards.directory)
    for name, problem in total["unusable"][:10]:
        logger.warning("left out: %.100r (%s)", name, problem)
    if not total["rows_in"]:
        logger.warning("THE INPUT HAS NO ROWS: %s is an empty split", shards.split)
    elif not total["rows_out"]:
        fail(f"none of the {total['rows_in']} clips could be labelled; {shards.record} has the reasons")
    if repository:
        push(repository, shards, total, args)


# ----------------------------------------------------------------------------------------------------------------- plan


def encoder_rate(teacher: Teacher, rows: int) -> float:
    """Windows a second of an encoder of the teacher's shape, on its device, with random weights."""
    with torch.device("meta"):
        encoder = WhisperEncoder(teacher.config)
    encoder = encoder.to_empty(device=teacher.device).to(getattr(torch, teacher.args.dtype)).eval()
    with torch.inference_mode():
        for weight in encoder.parameters():
            weight.normal_(std=0.02)
        features = torch.zeros(rows, teacher.config.num_mel_bins, teacher.extractor.nb_max_frames)
        features = features.to(teacher.device, encoder.dtype)
        for _ in range(2):  # the first time is slow
            began = time.monotonic()
            encoder(features)[0].sum().item()
    return rows / (time.monotonic() - began)


def print_plan(args: argparse.Namespace, teacher: Teacher, repository: str | None, processes: int) -> None:
    """Say what a run would read, write and push, how much and about how long; change nothing."""
    began, rows, size, seconds, sample, whole = time.monotonic(), 0, 0, 0.0, [], True
    for table in open_dataset(args, stream=True).with_format("arrow").iter(batch_size=8):
        audio = pc.struct_field(with_bytes(table, args.audio_column_name)[args.audio_column_name], "bytes")
        rows, size = rows + len(audio), size + (pc.sum(pc.binary_length(audio)).as_py() or 0)
        seconds += sum(header_seconds(value.as_py()) for value in audio)
        sample = sample or list(audio)
        whole = time.monotonic() < began + PLAN_SECONDS
        if not whole:
            break
    more, one = "" if whole else "more than ", size / max(1, rows)  # bytes of one clip
    print(f"input: {args.dataset_name}, {more}{rows:,} clips, {seconds / 3600:,.2f} h, {size / 1e6:,.1f} MB")

    # What the shards that are there were made of is told by digests, which are taken on trust here.
    found = [facts["settings"] or {} for path in Shards(args, rows, {}).present() if (facts := read_facts(path))]
    old = found[0] if found else {}
    rows = rows if whole else old.get("rows", rows)
    digests = {name: old.get(name) for name in ("dataset_digest", "teacher_digest")}
    shards = Shards(args, rows, data_settings(args, teacher, rows, digests))
    check_present(shards, args.overwrite_output_dir)
    done = [facts for shard in range(shards.number) if (facts := shards.facts(shard))]
    left = rows - sum(facts["rows_in"] for facts in done)
    print(f"done: {len(done)} of {more}{shards.number} shards")
    print(f"writes: {args.output_dir}, {more or 'about '}{left * one / 1e6:,.1f} MB")
    private = "private" if args.hub_private_repo else "public"
    print(f"pushes: {f'{repository} ({private}), about {rows * one / 1e6:,.1f} MB' if repository else 'nothing'}")

    began = time.monotonic()
    for clip in map(load_clip, sample):
        if not clip.problem:
            log_mel(torch.from_numpy(clip.waveform)[None], teacher.extractor)
    decoding = len(sample) / (time.monotonic() - began)
    windows = encoder_rate(teacher, args.per_device_eval_batch_size if teacher.device.type == "cuda" else 1)
    needed = timedelta(seconds=round(1.3 * left / windows / processes))
    print(f"time: {more or 'about '}{needed} in {processes} processes on {teacher.device.type}; in a short sample")
    print(f"  a random encoder of the teacher's shape does {windows:.1f} clips/s (and text takes 0.3 of its time more)")
    print(f"  and one of the --dataloader_num_workers {decoding:.0f} clips/s")


# -------------------------------------------------------------------------------------------------------------- command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    group = parser.add_argument_group("input")
    group.add_argument("--dataset_name", required=True, help="builder file, local directory or Hub id")
    group.add_argument("--dataset_config_name", help="configuration; the default one if unset")
    group.add_argument("--dataset_dir_suffix", metavar="START_END", help="part of a download in parts; all if unset")
    group.add_argument("--dataset_split_name", default="train", help="split")
    group.add_argument("--audio_column_name", default="audio", help="column of audio")
    group.add_argument("--text_column_name", help="column of reference texts, which must be there; none if unset")
    group.add_argument("--id_column_name", help="column that names rows; their numbers if unset")
    group.add_argument("--max_samples", type=int, help="rows to take from the start; all if unset")
    group = parser.add_argument_group("teacher and labels")
    group.add_argument("--model_name_or_path", required=True, help="Whisper, a local directory or Hub id")
    group.add_argument("--language", help="language code or name; heard from each clip if unset")
    group.add_argument("--task", choices=("transcribe", "translate"), help="task; transcribe if unset")
    group.add_argument("--return_timestamps", default=False, help="labels with timestamps", **flag)
    group.add_argument("--generation_num_beams", type=int, default=1, help="beams, 1 = greedy")
    group.add_argument("--max_label_length", type=int, default=128, help="bound of a whole label, tokens")
    group.add_argument("--decode_token_ids", default=False, help="store text in place of ids", **flag)
    group.add_argument("--scores", default=False, help=f"add the columns {', '.join(SCORES)}", **flag)
    group = parser.add_argument_group("work")
    group.add_argument("--per_device_eval_batch_size", type=int, default=16, help="clips in a batch")
    group.add_argument("--dataloader_num_workers", type=int, default=4, help="threads that decode audio")
    group.add_argument("--preprocessing_num_workers", type=int, default=1, help="processes that load the dataset")
    group.add_argument("--shard_size", type=int, default=1000, help="rows of a shard; what a crash costs at most")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="on a GPU bfloat16 if unset")
    group.add_argument("--attn_type", choices=("flash_attn", "sdpa", "eager"), default="sdpa", help="attention")
    group.add_argument("--torch_compile", default=False, help="fixed shapes, compiled on a GPU", **flag)
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, help="dataset directory to write")
    group.add_argument("--overwrite_output_dir", default=False, help="replace what other settings left there", **flag)
    group.add_argument("--hub_model_id", metavar="ORG/NAME", help="dataset repository to push to; none if unset")
    group.add_argument("--push_to_hub", help="push; True where --hub_model_id is a Hub id", **flag)
    group.add_argument("--hub_private_repo", default=True, help="make a new repository private", **flag)
    group.add_argument("--dry_run", default=False, help="say what a run would do and how long it takes, stop", **flag)
    group = parser.add_argument_group("tracking")
    group.add_argument("--report_to", choices=("none", "wandb", "tensorboard"), default="wandb", help="tracker")
    group.add_argument("--wandb_project", default="kotoba-whisper-labelling", help="project of the tracker")
    group.add_argument("--logging_steps", type=int, default=100, help="batches between two reports to the tracker")
    args = parser.parse_args(argv)
    args.output_dir = Path(args.output_dir).expanduser()
    for name in ("generation_num_beams", "per_device_eval_batch_size", "shard_size", "logging_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes without a GPU would not know of each other
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))],
    )
    main_process, on_cpu = accelerator.is_main_process, accelerator.device.type == "cpu"
    level = logging.INFO if main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not main_process:
        datasets.disable_progress_bars()
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    if on_cpu:  # `accelerate launch` allows a process one thread
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))

    # 1. All that can be refused is refused before the work.
    repository = prepare_repository(args) if main_process else None
    if (source := Path(args.dataset_name).expanduser()).is_dir() and source.resolve() == args.output_dir.resolve():
        fail(f"--output_dir {args.output_dir} is the input: take another directory")
    teacher = Teacher(args, accelerator.device)
    if args.dry_run:
        if main_process:
            print_plan(args, teacher, repository, accelerator.num_processes)
        return 0
    dataset = open_dataset(args)
    teacher.load_weights()
    digests = {"dataset_digest": dataset_digest(dataset, args), "teacher_digest": teacher_digest(teacher.model)}
    settings = data_settings(args, teacher, len(dataset), digests)
    shards = Shards(args, len(dataset), settings)
    lock = FileLock(args.output_dir / f".{shards.record.stem}.lock")
    try:
        if main_process:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        check_present(shards, args.overwrite_output_dir)
        pending = [shard for shard in range(shards.number) if not shards.facts(shard)]
        if main_process:
            for path in set(shards.present()) - set(shards.paths):
                path.unlink()
            if pending or not shards.record.exists():
                write_record(shards, "running")
    except Timeout:
        fail(f"another run is writing {shards.record.stem} in {args.output_dir}: wait for it")
    except OSError as error:
        fail(f"can't write to --output_dir {args.output_dir}: {first_line(error)}")

    try:
        # 2. This process labels its part of what is not there yet.
        report = Progress(accelerator, shards, pending, args) if main_process else lambda clips, seconds: None
        mine = [shard for shard in pending if shard % accelerator.num_processes == accelerator.process_index]
        label_shards(dataset, shards, mine, teacher, args, report)

        # 3. The first and last time that processes wait for each other.
        accelerator.wait_for_everyone()
        if main_process:
            report.bar.close()
            finish(shards, args, report, repository)
        accelerator.end_training()
    finally:
        lock.release()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
