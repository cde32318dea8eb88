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
import copy
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
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
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import httpx
from tqdm import tqdm
from transformers import LogitsProcessor, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizerFast
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
from transformers.utils import is_flash_attn_2_available

logger = logging.getLogger(__name__)

SAMPLING_RATE = 16_000
WINDOW = 30 * SAMPLING_RATE  # what Whisper hears, in samples
BATCHES_AHEAD = 3  # whose audio is decoded while the device works
ROWS_PER_GROUP = 100  # of the parquet files, as `datasets` writes audio: ~10 MB to read for one row
FILES_IN_FOLDER = 10_000  # https://huggingface.co/docs/hub/repositories-recommendations
LABEL = "whisper_transcript"
SCORES = ("avg_logprob", "compression_ratio", "no_speech_prob")  # as openai-whisper's `transcribe` names them
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
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


def compression_ratio(text: str) -> float:
    """How much zlib shortens a text; above 2.4 Whisper takes it for a loop (openai-whisper's `compression_ratio`)."""
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


class LabelScores(LogitsProcessor):
    """Mean log-probability of labels, and the probability of no speech, picked up while `generate` runs.

    As openai-whisper's DecodingResult has them: log-probabilities are of the scores after suppression and timestamp
    rules and count the end token; no speech is the share of <|nospeech|> behind the very first token.
    """

    def __init__(self, model, prefix_length: int, end: int, no_speech: int, beams: int):
        self.prefix_length, self.end, self.no_speech, self.beams = prefix_length, end, no_speech, beams
        self.no_speech_probs: list[float] = []
        self.logprobs: torch.Tensor | None = None  # of the last step, (clips x beams, vocabulary)
        self.running: dict[tuple, tuple[int, float]] = {}  # (clip, text so far) -> its row, its log-probability
        self.ended: dict[tuple, float] = {}  # (clip, whole text) -> log-probability with the end token
        self.hook = model.get_output_embeddings().register_forward_hook(self.see_first_logits)

    def see_first_logits(self, module, inputs, logits: torch.Tensor) -> None:
        if logits.shape[1] == self.prefix_length:  # unlike those of language detection
            self.no_speech_probs = logits[:: self.beams, 0].float().softmax(-1)[:, self.no_speech].tolist()
            self.hook.remove()  # later steps may be compiled

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        texts = enumerate(input_ids[:, self.prefix_length :].tolist())
        rows = [(row // self.beams, tuple(text)) for row, text in texts]
        if self.logprobs is None:
            sums = [0.0] * len(rows)
        else:  # a row goes on from any row of its clip, or from none where its text has ended
            parents = [self.running.get((clip, text[:-1]), (0, None)) for clip, text in rows]
            chosen = self.logprobs[[row for row, _ in parents], input_ids[:, -1]].tolist()
            sums = [None if total is None else total + new for (_, total), new in zip(parents, chosen, strict=True)]
        self.logprobs = scores.float().log_softmax(-1)
        self.running = {}
        for row, (key, total, end) in enumerate(zip(rows, sums, self.logprobs[:, self.end].tolist(), strict=True)):
            if total is not None and self.end not in key[1][-1:] and key not in self.running:
                self.running[key] = row, total
                self.ended[key] = total + end
        return scores

    def add_to(self, label: Label, clip: int) -> Label:
        text = tuple(label.ids[self.prefix_length : -1])
        logprob = self.ended[clip, text] / (len(text) + 1)
        return label._replace(avg_logprob=logprob, no_speech_prob=self.no_speech_probs[clip])


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


class Teacher:
    """A Whisper on its device that labels batches of waveforms."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        reference = args.model_name_or_path
        local_directory(reference)
        self.attention = attention_implementation(args, device)
        try:
            self.config = transformers.AutoConfig.from_pretrained(reference)
            if self.config.model_type != "whisper":
                fail(f"--model_name_or_path {reference} is a {self.config.model_type} model, not a Whisper")
            self.extractor = WhisperFeatureExtractor.from_pretrained(reference)
            self.tokenizer = WhisperTokenizerFast.from_pretrained(reference)
            self.model = WhisperForConditionalGeneration.from_pretrained(
                reference, dtype=getattr(torch, args.dtype), attn_implementation=self.attention
            )
        except (OSError, ValueError) as error:
            fail(f"can't load --model_name_or_path {reference}: {first_line(error)}; for a private one `hf auth login`")
        self.device, self.beams, self.length = device, args.generation_num_beams, args.max_label_length
        self.timestamps, self.scores, self.compiled = args.return_timestamps, args.scores, args.torch_compile
        self.digest = teacher_digest(self.model)
        self.prompt = prompt_arguments(self.model.generation_config, args.language, args.task)
        vocabulary = self.tokenizer.get_vocab()
        self.end, self.no_timestamps = vocabulary["<|endoftext|>"], vocabulary["<|notimestamps|>"]
        self.no_speech = vocabulary.get("<|nospeech|>", vocabulary.get("<|nocaptions|>"))
        self.prefix_length = (3 if self.prompt else 1) + (not self.timestamps)
        if not self.prefix_length + 1 < self.length <= self.config.max_target_positions:
            fail(
                f"--max_label_length {self.length} must be more than {self.prefix_length + 1} "
                f"and no more than the {self.config.max_target_positions} positions of the teacher's decoder"
            )
        generation = self.model.generation_config = copy.deepcopy(self.model.generation_config)
        generation.max_length, generation.max_new_tokens = None, self.length - self.prefix_length
        self.model.to(device).eval()
        self.encoder = self.model.get_encoder()
        self.static_cache: EncoderDecoderCache | None = None  # of `rows_in_cache` clips
        self.rows_in_cache = 0
        self.memory: list[torch.Tensor] = []  # of `encode_one_by_one`
        if self.compiled and device.type == "cuda":
            self.compile(args.per_device_eval_batch_size)

    def compile(self, rows: int) -> None:
        """Compile the encoder; `generate` does so with its decoding step because the cache is static."""
        encoder = self.encoder
        try:
            self.encoder = torch.compile(encoder)
            self.label([np.zeros(SAMPLING_RATE, np.float32)], rows)
        except torch.OutOfMemoryError:
            pass  # then the batch is halved when it comes to that
        except Exception as error:  # compilers fail in many ways, all of which leave the model as it was
            logger.warning("--torch_compile fails here and is left out: %s", first_line(error))
            self.encoder, self.static_cache, self.compiled = encoder, None, False

    def label(self, waveforms: list[np.ndarray], rows: int) -> list[Label]:
        """Labels of clips (mono, 16 kHz, up to 30 s); compiled code works on `rows` clips, the last one repeated."""
        rows = rows if self.compiled else len(waveforms)
        padded = torch.zeros(rows, max(map(len, waveforms)), pin_memory=self.device.type == "cuda")
        for row in range(rows):
            waveform = waveforms[min(row, len(waveforms) - 1)]
            padded[row, : len(waveform)] = torch.from_numpy(waveform)
        with torch.inference_mode():
            features = log_mel(padded.to(self.device, non_blocking=True), self.extractor).to(self.model.dtype)
            encoded = self.encode(features)
            scores = None
            if self.scores:
                scores = LabelScores(self.model, self.prefix_length, self.end, self.no_speech, self.beams)
            sequences = self.model.generate(
                **encoded,
                **self.prompt,
                # Whisper has no padding to mask; without this `generate` warns of it.
                attention_mask=torch.ones(rows, features.shape[2], dtype=torch.long, device=self.device),
                force_unique_generate_call=True,
                return_timestamps=self.timestamps,
                num_beams=self.beams,
                do_sample=False,
                logits_processor=[scores] if scores else None,
            ).tolist()
        labels = [Label(*finish_label(sequence, self.prefix_length, self.end)) for sequence in sequences]
        labels = labels[: len(waveforms)]
        return [scores.add_to(label, clip) for clip, label in enumerate(labels)] if scores else labels

    def encode(self, features: torch.Tensor) -> dict:
        """Encoder states of log-mel features (batch, mels, 3000), and perhaps a cache, as arguments of `generate`."""
        if self.compiled:
            if self.rows_in_cache != len(features):
                lengths = (self.length, self.config.max_source_positions)
                caches = (StaticCache(config=self.config, max_cache_len=length) for length in lengths)
                self.static_cache, self.rows_in_cache = EncoderDecoderCache(*caches), len(features)
            self.static_cache.reset()
            return {
                "encoder_outputs": BaseModelOutput(self.encoder(features)[0]),
                "past_key_values": self.static_cache,
            }
        if self.device.type != "cpu" or self.beams > 1:
            return {"encoder_outputs": BaseModelOutput(self.encoder(features)[0])}
        return self.encode_one_by_one(features)

    def encode_one_by_one(self, features: torch.Tensor) -> dict:
        """The same with the decoder's keys and values of the states, for a CPU.

        What one clip needs stays in the CPU's caches. Memory that is kept saves the cost of touching new memory, which
        is a quarter of the decoder's time.
        """
        rows, attentions = len(features), [layer.encoder_attn for layer in self.model.get_decoder().layers]
        positions, heads, width = self.config.max_source_positions, attentions[0].num_heads, attentions[0].head_dim
        if not self.memory or len(self.memory[0]) < rows:
            self.memory = [torch.empty(rows, positions, heads * width, dtype=features.dtype)]
            shape = (rows, heads, positions, width)
            self.memory += [torch.empty(shape, dtype=features.dtype) for _ in range(2 * len(attentions))]
        states, *cross = (memory[:rows] for memory in self.memory)
        for row in range(rows):
            states[row] = self.encoder(features[row : row + 1])[0][0]
            for attention, keys, values in zip(attentions, cross[::2], cross[1::2], strict=True):
                keys[row] = attention.k_proj(states[row]).view(positions, heads, width).transpose(0, 1)
                values[row] = attention.v_proj(states[row]).view(positions, heads, width).transpose(0, 1)
        cache = DynamicCache()
        for keys, values in zip(cross[::2], cross[1::2], strict=True):
            layer = DynamicLayer()
            layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
            layer.is_initialized = True
            cache.layers.append(layer)
        return {
            "encoder_outputs": BaseModelOutput(states),
            "past_key_values": EncoderDecoderCache(DynamicCache(), cache),
        }


def attention_implementation(args: argparse.Namespace, device: torch.device) -> str:
    """What `transformers` calls `--attn_type`; flash attention only where it can run."""
    if args.attn_type != "flash_attn":
        return args.attn_type
    needs = {
        "a CUDA GPU": device.type == "cuda",
        "--dtype bfloat16 or float16": args.dtype != "float32",
        "the package flash-attn": is_flash_attn_2_available(),
        "no --torch_compile": not args.torch_compile,  # it doesn't mask what a static cache has yet to be filled with
    }
    if all(needs.values()):
        return "flash_attention_2"
    missing = " and ".join(need for need, there in needs.items() if not there)
    logger.warning("--attn_type flash_attn needs %s: using sdpa", missing)
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
        digest.update(weight.detach().flatten()[:64].float().numpy().tobytes())
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


def open_dataset(args: argparse.Namespace) -> Dataset:
    """The rows to label, with undecoded audio."""
    name, config, split = args.dataset_name, args.dataset_config_name, args.dataset_split_name
    workers = args.preprocessing_num_workers if args.preprocessing_num_workers > 1 else None
    try:
        if name.endswith(".py"):
            dataset = build_dataset(Path(name).expanduser(), config, args.dataset_dir_suffix, split, workers)
        elif directory := local_directory(name):
            dataset = read_directory(directory, config, split)
        elif isinstance(datasets.load_dataset_builder(name, config), AudioFolder):
            dataset = read_directory(Path(snapshot_download(name, repo_type="dataset")), config, split)
        else:
            dataset = datasets.load_dataset(name, config, split=split, num_proc=workers)
    except (ValueError, OSError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
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
        dataset = dataset.select(range(min(args.max_samples, len(dataset))))
    return dataset.cast_column(args.audio_column_name, Audio(sampling_rate=SAMPLING_RATE, decode=False))


def build_dataset(path: Path, config: str | None, suffix: str | None, split: str, workers: int | None) -> Dataset:
    """A split made by the `datasets.DatasetBuilder` that a Python file defines; `load_dataset` runs none any more.

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
    builder = builders[0](config_name=config, **({"dataset_dir_suffix": suffix} if suffix else {}))
    builder.download_and_prepare(num_proc=workers)
    return builder.as_dataset(split)


def read_directory(directory: Path, config: str | None, split: str) -> Dataset:
    """A split of a local directory. Parquet is loaded by its files: a directory's cache looks at README.md only."""
    shards = sorted((directory / (config or "default")).glob(f"{split}-*-of-*.parquet"))
    if shards:
        expected = int(shards[0].stem.rsplit("-", 1)[1])
        if len(shards) != expected:
            fail(f"{directory} has {len(shards)} of {expected} shards of {split}: finish the stage that writes it")
        if not any(pq.read_metadata(path).num_rows for path in shards):  # which `load_dataset` refuses
            return Dataset(pq.read_table(shards[0]))
        return datasets.load_dataset("parquet", data_files={split: list(map(str, shards))}, split=split)
    builder = datasets.load_dataset_builder(str(directory), config)
    files = builder.config.data_files
    if split not in files:
        raise ValueError(f"its splits are {', '.join(files)}")
    if isinstance(builder, AudioFolder):
        return list_audio(list(map(Path, files[split])))
    if isinstance(builder, Parquet):
        return datasets.load_dataset("parquet", data_files={split: list(files[split])}, split=split)
    return datasets.load_dataset(str(directory), config, split=split)


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


def read_rows(dataset: Dataset, start: int, stop: int, audio_column: str) -> pa.Table:
    """Rows of the dataset, with the bytes of audio files that it only names."""
    rows = dataset.with_format("arrow")[start:stop]
    if pc.struct_field(rows[audio_column], "bytes").null_count:
        values = rows[audio_column].to_pylist()
        for value in values:
            if value and value["bytes"] is None and value["path"] and (path := Path(value["path"])).is_file():
                value |= {"bytes": path.read_bytes(), "path": path.name}
        column = rows.schema.get_field_index(audio_column)
        rows = rows.set_column(column, rows.schema.field(column), pa.array(values, rows.schema.field(column).type))
    return rows


def dataset_digest(dataset: Dataset, audio_column: str, id_column: str | None) -> str:
    """Digest of ids and sizes of the audio, to tell datasets of one name apart."""
    digest = hashlib.sha256(json.dumps(dataset.column_names).encode())
    dataset = dataset.select_columns([audio_column, *([id_column] if id_column else [])]).with_format("arrow")
    for start in range(0, len(dataset), 10_000):
        rows = dataset[start : start + 10_000]
        sizes = pc.binary_length(pc.struct_field(rows[audio_column], "bytes")).to_pylist()
        ids = rows[id_column].to_pylist() if id_column else []
        digest.update(json.dumps([sizes, ids], default=str).encode())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------- shards


@dataclasses.dataclass
class Shards:
    """The files of a labelled split and the rows that belong in each."""

    directory: Path
    config: str
    split: str
    rows: int
    size: int
    settings: str  # digest of what the data depends on

    @property
    def number(self) -> int:
        return max(1, math.ceil(self.rows / self.size))

    @property
    def record(self) -> Path:
        return self.directory / f"labelling.{self.config}.{self.split}.json"

    def path(self, shard: int) -> Path:
        return self.directory / self.config / f"{self.split}-{shard:05d}-of-{self.number:05d}.parquet"

    def present(self) -> list[Path]:
        return sorted((self.directory / self.config).glob(f"{self.split}-*-of-*.parquet"))

    def facts(self, shard: int) -> dict | None:
        """What is known of a finished shard; None where it is missing or was made with other settings."""
        try:
            metadata = pq.read_metadata(self.path(shard)).metadata or {}
            facts = json.loads(metadata.get(b"kotoba", b"{}"))
        except (FileNotFoundError, pa.ArrowInvalid):  # the latter of a damaged file
            return None
        return facts if facts.get("settings") == self.settings else None


@dataclasses.dataclass
class Shard:
    """A shard in work."""

    index: int
    rows: pa.Table
    batch_size: int
    left: int  # rows without a result
    clips: list[Clip | None]
    labels: list[Label | None]


def batches(
    dataset: Dataset, shards: Shards, pending: list[int], pool: ThreadPoolExecutor, args: argparse.Namespace
) -> Iterator[tuple[Shard, list[int], list[Future]]]:
    """Batches of clips that are being decoded: of one shard after the other, the longest clips first.

    What lies in a batch together depends on the shard alone, not on processes or workers.
    """
    for index in pending:
        stop = min((index + 1) * shards.size, shards.rows)
        rows = read_rows(dataset, index * shards.size, stop, args.audio_column_name)
        audio = pc.struct_field(rows[args.audio_column_name], "bytes")
        shard = Shard(index, rows, args.per_device_eval_batch_size, len(rows), [None] * len(rows), [None] * len(rows))
        seconds = list(pool.map(lambda value: header_seconds(value.as_py()), audio))
        order = sorted(range(len(rows)), key=seconds.__getitem__, reverse=True)
        for first in range(0, max(1, len(order)), args.per_device_eval_batch_size):  # one empty batch of an empty shard
            members = order[first : first + args.per_device_eval_batch_size]
            yield shard, members, [pool.submit(load_clip, audio[row]) for row in members]


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
            for shard, members, loading in ahead(batches(dataset, shards, pending, pool, args), BATCHES_AHEAD):
                clips = [future.result() for future in loading]
                waveforms = [clip.waveform for clip in clips if clip.waveform is not None]
                labels, shard.batch_size = label_with_halving(waveforms, shard.batch_size, teacher.label)
                remaining = iter(labels)
                for row, clip in zip(members, clips, strict=True):
                    shard.labels[row] = None if clip.problem else next(remaining)
                    shard.clips[row] = clip._replace(waveform=None)
                shard.left -= len(members)
                report(len(members), sum(clip.seconds for clip in clips))
                if not shard.left:
                    if writing:
                        writing.result()
                    writing = writer.submit(write_labels, shard, shards, dataset.features, teacher, args)
            if writing:
                writing.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_labels(shard: Shard, shards: Shards, features: Features, teacher: Teacher, args: argparse.Namespace) -> None:
    """Write a shard's rows that have a label, and with them what became of the others."""
    labels = [label for label in shard.labels if label]
    bodies = [label.ids[teacher.prefix_length : -1] for label in labels]
    names = shard.rows[args.id_column_name].to_pylist() if args.id_column_name else None
    first, first_timestamp = shard.index * shards.size, teacher.no_timestamps + 1
    problems = [(row, clip.problem) for row, clip in enumerate(shard.clips) if clip.problem]
    facts = {
        "settings": shards.settings,
        "rows_in": len(shard.clips),
        "rows_out": len(labels),
        "seconds": round(sum(clip.seconds for clip in shard.clips), 3),
        "over_30_s": sum(clip.seconds > 30 for clip in shard.clips),
        "truncated": sum(label.truncated for label in labels),
        "malformed_timestamps": sum(not timestamps_are_paired(body, first_timestamp) for body in bodies)
        if teacher.timestamps
        else 0,
        "tokens": sum(len(label.ids) for label in labels),
        "unusable": [[str(names[row]) if names else f"row {first + row}", problem] for row, problem in problems],
    }
    new = {LABEL: (List(Value("int32")), [label.ids for label in labels])}
    if args.decode_token_ids:
        decode = {"skip_special_tokens": True, "decode_with_timestamps": True}
        new[LABEL] = Value("string"), teacher.tokenizer.batch_decode(bodies, **decode)
    if args.scores:
        texts = [text.strip() for text in teacher.tokenizer.batch_decode(bodies, skip_special_tokens=True)]
        ratios = [compression_ratio(text) for text in texts]
        values = ([label.avg_logprob for label in labels], ratios, [label.no_speech_prob for label in labels])
        for name, column in zip(SCORES, values, strict=True):
            new[name] = Value("float32"), [round(value, 4) for value in column]
    rows = shard.rows.filter(pa.array([label is not None for label in shard.labels], pa.bool_()))
    schema = Features({**features, **{name: feature for name, (feature, _) in new.items()}}).arrow_schema
    for name, (_, values) in new.items():
        rows = rows.append_column(name, pa.array(values, schema.field(name).type))
    metadata = {**schema.metadata, b"kotoba": json.dumps(facts, ensure_ascii=False).encode()}
    path = shards.path(shard.index)
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
    """The bar of the main process, and what the tracker gets; other processes are seen by the shards they finish."""

    def __init__(self, accelerator: Accelerator, shards: Shards, args: argparse.Namespace):
        self.accelerator, self.shards, self.every = accelerator, shards, args.logging_steps
        self.main = accelerator.is_main_process
        found = [shards.facts(shard) for shard in range(shards.number)] if self.main else []
        self.others = [shard for shard, facts in enumerate(found) if not facts and shard % accelerator.num_processes]
        done = sum(facts["rows_in"] for facts in found if facts)
        self.steps, self.clips, self.seconds = 0, 0, 0.0
        self.tracked = start_tracker(accelerator, args)
        self.started = self.looked = time.monotonic()
        self.bar = tqdm(total=shards.rows, initial=done, unit=" clips", disable=not self.main)

    def __call__(self, clips: int, seconds: float) -> None:
        if not self.main:
            return
        now, self.steps = time.monotonic(), self.steps + 1
        if self.others and now - self.looked > 10:
            found = {shard: facts for shard in self.others if (facts := self.shards.facts(shard))}
            self.others = [shard for shard in self.others if shard not in found]
            clips += sum(facts["rows_in"] for facts in found.values())
            seconds += sum(facts["seconds"] for facts in found.values())
            self.looked = now
        self.clips, self.seconds = self.clips + clips, self.seconds + seconds
        rate, speed = self.clips / (now - self.started), self.seconds / (now - self.started)
        self.bar.set_postfix_str(f"{speed:.1f} h of audio an hour", refresh=False)
        self.bar.update(clips)
        if self.tracked and self.steps % self.every == 0:
            left = (self.shards.rows - self.bar.n) / rate / 3600
            values = {"clips": self.bar.n, "clips_per_second": rate, "audio_hours_per_hour": speed, "hours_left": left}
            try:
                self.accelerator.log(values, step=self.steps)
            except Exception as error:  # whatever its kind, what watches the work must not end it
                logger.warning("tracking ends: %s", first_line(error))
                self.tracked = False


def start_tracker(accelerator: Accelerator, args: argparse.Namespace) -> bool:
    """Whether there is a tracker to report to; one that can't be had is worth one warning."""
    if args.report_to == "none" or not accelerator.is_main_process:
        return False
    try:
        if args.report_to == "wandb" and "WANDB_MODE" not in os.environ:
            import wandb

            if not wandb.login(prompt=False):
                raise RuntimeError("no login: `wandb login`, or WANDB_MODE=offline")
        accelerator.init_trackers(args.wandb_project, config={name: str(value) for name, value in vars(args).items()})
    except Exception as error:  # whatever its kind, what watches the work must not end it
        logger.warning("no tracking by %s: %s", args.report_to, first_line(error))
        return False
    return True


# ----------------------------------------------------------------------------------------------- record, card and push


def data_settings(args: argparse.Namespace, dataset: Dataset, teacher: Teacher) -> dict:
    """What the labelled data depends on, near-ties of low precision aside: a run with other values must not go on."""
    digest = dataset_digest(dataset, args.audio_column_name, args.id_column_name)
    same = ("audio_column_name", "id_column_name", "shard_size", "dtype", "return_timestamps", "generation_num_beams")
    same += ("max_label_length", "decode_token_ids", "scores")
    return {
        **{name: getattr(args, name) for name in same},
        **{"language": None, "task": None, **teacher.prompt},
        "attention": teacher.attention,
        "teacher": f"weights {teacher.digest}",
        "dataset": f"{len(dataset)} rows, {digest}",
    }


def begin(shards: Shards, settings: dict, overwrite: bool, main: bool) -> None:
    """Refuse to mix with what other settings left; the main process puts up the record and removes what is in the way.

    A file of other settings whose name this run gives too is replaced by the process that makes it.
    """
    earlier = json.loads(shards.record.read_text(encoding="utf-8")) if shards.record.exists() else {}
    for name, value in settings.items():
        if earlier and (old := earlier["settings"].get(name)) != value:
            if not overwrite:
                fail(
                    f"{shards.record} was begun with {name} {old}, this run has {value}: go back to that, "
                    "take another --output_dir, or start afresh with --overwrite_output_dir"
                )
            earlier = {}
    if not earlier and not overwrite and (present := shards.present()) and not shards.facts(0):
        fail(f"{present[0]} is not of this run: take another --output_dir, or replace it with --overwrite_output_dir")
    if not main:
        return
    expected = {shards.path(shard) for shard in range(shards.number)}
    for path in shards.present():
        if path not in expected:
            path.unlink()
    if earlier.get("status") != "complete" or not all(path.exists() for path in expected):
        record = {"status": "running", "settings": settings}
        write_text(json.dumps(record, indent=2, ensure_ascii=False), shards.record)


def total_facts(shards: Shards) -> dict:
    """Sums over all shards; fails where one is missing."""
    found = [shards.facts(shard) for shard in range(shards.number)]
    if missing := found.count(None):
        fail(f"{missing} of {shards.number} shards are not in {shards.directory}: do all machines see it? Run again")
    counts = ("rows_in", "rows_out", "over_30_s", "truncated", "malformed_timestamps", "tokens")
    total = {name: sum(facts[name] for facts in found) for name in counts}
    total["hours"] = round(sum(facts["seconds"] for facts in found) / 3600, 4)
    total["unusable"] = [row for facts in found for row in facts["unusable"]]
    return total


def describe(args: argparse.Namespace, total: dict) -> str:
    """What the dataset card says of this split."""
    counts = {
        "in the input": total["rows_in"],
        "labelled": total["rows_out"],
        "left out, no usable audio": len(total["unusable"]),
        "longer than 30 s, labelled on their first 30 s": total["over_30_s"],
        f"with a label cut at {args.max_label_length} tokens": total["truncated"],
        "with timestamps that are unpaired or go back": total["malformed_timestamps"],
    }
    how = f"{args.generation_num_beams} beam{'s' * (args.generation_num_beams > 1)}, {args.dtype}"
    timestamps = "with" if args.return_timestamps else "without"
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in counts.items())
    return (
        f"Labels (`{LABEL}`) of {total['hours']:.2f} hours of audio by {args.model_name_or_path}: language "
        f"{args.language or 'not given'}, {timestamps} timestamps, {how}.\n\n| rows | |\n| --- | --- |\n{rows}"
    )


def card(text: str | None, config: str, split: str, section: str, language: str | None) -> str:
    """Dataset card with this split's files and section, and all else that the card `text` has."""
    content = DatasetCard(text or NEW_CARD)
    configs = {entry["config_name"]: entry for entry in content.data.get("configs") or []}
    entry = configs.setdefault(config, {"config_name": config, "data_files": []})
    others = [files for files in entry["data_files"] if files["split"] != split]
    entry["data_files"] = [*others, {"split": split, "path": f"{config}/{split}-*"}]
    content.data.configs = list(configs.values())
    content.data.language = content.data.language or language
    content.data.dataset_info = None  # row counts of earlier contents, which `datasets` would insist on
    heading = f"## {config}, {split}"
    kept = re.sub(rf"(?ms)^{re.escape(heading)}\n.*?(?=^## |\Z)", "", content.text).rstrip()
    content.text = f"{kept}\n\n{heading}\n\n{section}\n"
    return str(content)


def prepare_repository(args: argparse.Namespace) -> str | None:
    """The dataset repository to push to, made and proved writable; None where nothing is to be pushed."""
    target = args.hub_model_id
    if args.push_to_hub and target is None:
        fail("--push_to_hub needs --hub_model_id, the dataset repository to push to")
    if args.push_to_hub is False or target is None or local_directory(target):
        return None
    try:
        HfApi().create_repo(target, repo_type="dataset", private=args.hub_private_repo, exist_ok=True)
        HfApi().auth_check(target, repo_type="dataset", write=True)
    except HUB_ERRORS as error:
        fail(f"can't write to the dataset {target}: {first_line(error)}; log in with a write token: hf auth login")
    return target


def push(repository: str, shards: Shards, section: str, language: str | None) -> None:
    """Upload shards and record, then a card that keeps the repository's other configurations."""
    api, ours = HfApi(), [f"{shards.config}/{shards.split}-*-of-*.parquet", shards.record.name]
    to = {"repo_id": repository, "repo_type": "dataset", "commit_message": f"Label {shards.config}, {shards.split}"}
    try:
        api.upload_folder(folder_path=shards.directory, allow_patterns=ours, delete_patterns=ours, **to)
        try:
            text = Path(hf_hub_download(repository, "README.md", repo_type="dataset")).read_text(encoding="utf-8")
        except EntryNotFoundError:
            text = None
        text = card(text, shards.config, shards.split, section, language)
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", **to)
    except HUB_ERRORS as error:
        fail(
            f"the push to {repository} failed: {first_line(error)}; all labels are in {shards.directory}, "
            "and the same command again only pushes"
        )
    logger.info("pushed to %s/datasets/%s", api.endpoint, repository)


def finish(shards: Shards, settings: dict, args: argparse.Namespace, clips: int, seconds: float, repository) -> None:
    """Card, record and push, when all shards are there."""
    total = total_facts(shards)
    readme, section = shards.directory / "README.md", describe(args, total)
    text = readme.read_text(encoding="utf-8") if readme.exists() else None
    language = settings["language"] and settings["language"].strip("<|>")
    write_text(card(text, shards.config, shards.split, section, language), readme)
    if json.loads(shards.record.read_text(encoding="utf-8"))["status"] != "complete":
        libraries = ("torch", "transformers", "datasets", "huggingface_hub", "accelerate", "soundfile", "librosa")
        record = {
            "status": "complete",
            "settings": settings,
            **total,
            "unusable_rows": len(total["unusable"]),
            "last_run": {"clips": clips, "wall_seconds": round(seconds, 1), "clips_per_second": clips / seconds},
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "versions": {name: importlib.metadata.version(name) for name in libraries},
        }
        write_text(json.dumps(record, indent=2, ensure_ascii=False), shards.record)
    logger.info("%d of %d rows are labelled in %s", total["rows_out"], total["rows_in"], shards.directory)
    for name, problem in total["unusable"][:10]:
        logger.warning("left out: %.100s (%s)", name, problem)
    if not total["rows_in"]:
        logger.warning("THE INPUT HAS NO ROWS: %s is an empty split", shards.split)
    elif not total["rows_out"]:
        fail(f"none of the {total['rows_in']} clips could be labelled; {shards.record} has the reasons")
    if repository:
        push(repository, shards, section, language)


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
    group.add_argument("--output_dir", type=Path, required=True, help="dataset directory to write")
    group.add_argument("--overwrite_output_dir", default=False, help="replace what other settings left there", **flag)
    group.add_argument("--hub_model_id", metavar="ORG/NAME", help="dataset repository to push to; none if unset")
    group.add_argument("--push_to_hub", help="push; True where --hub_model_id is a Hub id", **flag)
    group.add_argument("--hub_private_repo", default=True, help="make a new repository private", **flag)
    group = parser.add_argument_group("tracking")
    group.add_argument("--report_to", choices=("none", "wandb", "tensorboard"), default="wandb", help="tracker")
    group.add_argument("--wandb_project", default="kotoba-whisper-labelling", help="project of the tracker")
    group.add_argument("--logging_steps", type=int, default=100, help="batches between two reports to the tracker")
    args = parser.parse_args(argv)
    for name in ("generation_num_beams", "per_device_eval_batch_size", "shard_size", "logging_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    accelerator = Accelerator(
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))],
    )
    main_process, on_cpu = accelerator.is_main_process, accelerator.device.type == "cpu"
    level = logging.INFO if main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    transformers.utils.logging.set_verbosity_error()
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
    dataset = open_dataset(args)
    teacher = Teacher(args, accelerator.device)
    settings = data_settings(args, dataset, teacher)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    config = args.dataset_config_name or "default"
    shards = Shards(args.output_dir, config, args.dataset_split_name, len(dataset), args.shard_size, digest)
    if repository and shards.number > FILES_IN_FOLDER:
        size = math.ceil(shards.rows / FILES_IN_FOLDER)
        logger.warning("the Hub advises against %d files in a folder: --shard_size %d is better", shards.number, size)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(args.output_dir / f".{shards.record.stem}.lock")
    try:
        if main_process:
            lock.acquire(timeout=0)
    except Timeout:
        fail(f"another run is writing {config}, {shards.split} in {args.output_dir}: wait for it")
    begin(shards, settings, args.overwrite_output_dir, main_process)

    # 2. This process labels its part of what is not there yet.
    progress = Progress(accelerator, shards, args)
    mine = range(accelerator.process_index, shards.number, accelerator.num_processes)
    label_shards(dataset, shards, [shard for shard in mine if not shards.facts(shard)], teacher, args, progress)

    # 3. The first and last time that processes wait for each other.
    accelerator.wait_for_everyone()
    progress.bar.close()
    if main_process:
        finish(shards, settings, args, progress.clips, time.monotonic() - progress.started, repository)
    accelerator.end_training()
    lock.release()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
