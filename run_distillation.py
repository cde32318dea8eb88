#!/usr/bin/env python
"""Distil a Whisper teacher into a smaller student on pseudo-labelled speech.

In: a student from create_student_model.py, its teacher, and one or more datasets `a+b`, each a Hub id or a local
directory: `.vectorized` (log-mels), or labelled with audio, of which the features are computed while loading.

Out, in --output_dir: the trained model with all that transformers, faster-whisper and whisper.cpp look for, its card,
`metrics.jsonl`, `training_curves.png`, the record `distillation.json`, and `checkpoint-<step>-epoch-<epoch>/`.

    python run_distillation.py --model_name_or_path my-init --teacher_model_name_or_path openai/whisper-large-v3 \\
        --train_dataset_name my-org/my-data.wer_10.0.vectorized --language ja --freeze_encoder --do_train \\
        --num_train_epochs 8 --output_dir my-model
    accelerate launch --multi_gpu run_distillation.py ...       (every process trains on its part of each batch; on CPUs
        with ACCELERATE_USE_CPU=true in the environment)

The loss is `ce_weight · CE + kl_weight · T² · KL(teacher ‖ student)` (https://arxiv.org/abs/2311.00430), its mean over
the label tokens of the global batch: it does not depend on padding, accumulation or the number of processes.

Batch k of an epoch is a function of the seed, the epoch and k. After a kill at any moment the same command goes on from
the newest whole checkpoint and ends with the weights of a run that was never interrupted; when it has ended, the same
command only pushes what is missing. Several machines need an --output_dir (and an encoder cache) that all of them see.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import datasets
import jiwer
import librosa
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import safetensors.torch
import soundfile
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, send_to_device
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import HfApi, HfFileSystem, ModelCardData, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
from transformers.utils import is_flash_attn_2_available

logger = logging.getLogger(__name__)

HUB_ERRORS = (OSError, HFValidationError, httpx.HTTPError, RuntimeError)  # RuntimeError: Xet's uploads
SAMPLING_RATE = 16_000  # Whisper's
WINDOW_FRAMES = 3_000  # log-mel frames of the encoder's 30 s window, 160 samples each
START = "<|startoftranscript|>"
UNSPACED = ("ja", "zh", "yue", "th", "lo", "my", "km")  # written without spaces: the CER counts none
LOSS_CHUNK = 256  # tokens whose logits exist at the same time
LED_BY_LOSS = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the held-out loss
CACHE_BLOCK = 8  # rows encoded together for the cache; fixed, because the last bits of a row depend on its batch
HEAD = 16  # first rows of a dataset, which stand for its inputs
PACE = 0.1 if sys.stderr.isatty() else 30.0  # seconds between two looks of a progress bar: in a log each is a line
RECORD = "distillation.json"
MANIFEST = "manifest.json"  # of a checkpoint: what it holds; written last
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)-epoch-(\d+)")
SCRIPTS = ("create_student_model.py", "run_distillation.py")
TRAINING_FILES = ("model.safetensors", "metrics.jsonl", "training_curves.png", RECORD)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "normalizer.json", "added_tokens.json"),
    *("special_tokens_map.json", "preprocessor_config.json", "processor_config.json"),
)
OWN_FILES = (*TRAINING_FILES, *TOKENIZER_FILES, *SCRIPTS, "config.json", "generation_config.json", "README.md")


# ---- small pure functions --------------------------------------------------------------------------------------------


class DistillationLoss(torch.autograd.Function):
    """ce_weight · CE + kl_weight · T² · KL(teacher ‖ student), summed over tokens; and the two sums, unweighted.

    Logits exist for LOSS_CHUNK tokens at a time, and the gradient is computed with them: memory grows neither with
    padding nor the batch, and no logit is computed twice.

    Args:
        hidden, teacher_hidden: last hidden states, (tokens, width).
        head, teacher_head: output projections, (vocabulary, width).
        targets: ids, (tokens).
        weights: ce_weight and kl_weight.
    """

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, temperature: float, weights: tuple):
        dtype = F.linear(hidden[:0], head[:1]).dtype  # what autocast makes of them
        exact = torch.promote_types(dtype, torch.float32)
        gradients = [torch.zeros_like(hidden), torch.zeros_like(head)] if ctx.needs_input_grad[0] else []
        hidden, head, teacher_hidden, teacher_head = (
            tensor.to(dtype) for tensor in (hidden, head, teacher_hidden, teacher_head)
        )
        sums = torch.zeros(2, dtype=exact, device=hidden.device)
        for start in range(0, len(targets), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            ids = targets[part, None]
            logits, teacher_logits = (
                F.linear(states[part], weight).to(exact)  # (tokens, vocabulary)
                for states, weight in ((hidden, head), (teacher_hidden, teacher_head))
            )
            log_q, log_p = ((each / temperature).log_softmax(-1) for each in (logits, teacher_logits))
            p, log_probs = log_p.exp(), logits.log_softmax(-1)
            kl = temperature**2 * (p * (log_p - log_q)).sum()
            sums += torch.stack([-log_probs.gather(1, ids).sum(), kl])
            if gradients:
                gradient = log_q.exp_().sub_(p).mul_(weights[1] * temperature)
                gradient.add_(log_probs.exp_(), alpha=weights[0])
                gradient.scatter_add_(1, ids, torch.full_like(ids, -weights[0], dtype=exact))
                gradient = gradient.to(dtype)
                gradients[0][part] = gradient @ head
                gradients[1] += gradient.T @ hidden[part]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums)
        return (sums * sums.new_tensor(weights)).sum(), sums

    @staticmethod
    def backward(ctx, gradient, _):
        of_hidden, of_head = ctx.saved_tensors
        return of_hidden * gradient, of_head.mul_(gradient), *[None] * 5


def epoch_order(sizes: list[int], weights: list[float] | None, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in the order of training; datasets of these sizes count as one after the other.

    Without weights every row comes once. With them an epoch has as many rows, of each dataset its weight's share: only
    some of its rows where the share is less than it has, all of them again and again where it is more.
    """
    rng = np.random.default_rng([seed, epoch])
    if weights is None:
        return rng.permutation(sum(sizes))
    edges = np.rint(np.cumsum([0.0, *weights]) / sum(weights) * sum(sizes)).astype(int)
    parts, start = [], 0
    for size, count in zip(sizes, np.diff(edges), strict=True):
        rounds = [rng.permutation(size) for _ in range(math.ceil(count / size))]
        parts.append(start + np.concatenate([np.empty(0, int), *rounds])[:count])
        start += size
    return rng.permutation(np.concatenate(parts))


def scan_labels(column: pa.ChunkedArray, start_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the number of tokens, and the place of the first `start_id` (-1: none)."""
    found = [np.empty((2, 0), np.int64)]
    for chunk in column.chunks:
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        ends, starts = np.cumsum(lengths), np.full(len(lengths), -1)
        hits = np.flatnonzero(pc.list_flatten(chunk).to_numpy(zero_copy_only=False) == start_id)
        rows, first = np.unique(np.searchsorted(ends, hits, side="right"), return_index=True)
        starts[rows] = hits[first] - (ends - lengths)[rows]
        found.append(np.stack([lengths, starts]))
    return tuple(np.concatenate(found, axis=1))


def digest(module: nn.Module) -> str:
    """A name for a module's weights: the hash of evenly spaced values of every tensor."""
    result = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sample = tensor.flatten()[:: max(1, tensor.numel() // 1024)].float().cpu().numpy()
        result.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    return result.hexdigest()[:16]


def pad_features(features: np.ndarray) -> np.ndarray:
    """[frames, mels] -> [mels, 3000], the last frame repeated: all padded frames of a Whisper log-mel are the same."""
    missing = max(0, WINDOW_FRAMES - len(features))
    return np.pad(features[:WINDOW_FRAMES], ((0, missing), (0, 0)), mode="edge").T


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Stack rows, their tokens padded to the longest row's in eights. `positions` (flat) are those with a target.

    Teacher and student both see the whole sequence but for its last token; targets are what follows the start token.
    """
    width = -(-max(len(row["tokens"]) - 1 for row in rows) // 8) * 8
    inputs = np.zeros((len(rows), width), np.int64)  # padding is behind all that counts: any id will do
    for padded, row in zip(inputs, rows, strict=True):
        padded[: len(row["tokens"]) - 1] = row["tokens"][:-1]
    positions = [i * width + np.arange(row["first"], len(row["tokens"]) - 1) for i, row in enumerate(rows)]
    targets = [row["tokens"][row["first"] + 1 :] for row in rows]
    arrays = {"decoder_input_ids": inputs, "positions": np.concatenate(positions), "targets": np.concatenate(targets)}
    batch = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    if "features" in rows[0]:
        return batch | {"features": torch.from_numpy(np.stack([row["features"] for row in rows]))}
    hidden = torch.cat([row["teacher_hidden"] for row in rows])
    return batch | {"states": torch.stack([row["states"] for row in rows]), "teacher_hidden": hidden}


def differences(then: dict, now: dict) -> str:
    """The settings that differ, for people to read; empty where none does."""
    names = [name for name in sorted(now) if then.get(name) != now[name]]
    return "; ".join(f"{name} was {then.get(name)!r} and is now {now[name]!r}" for name in names)


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


# ---- data ------------------------------------------------------------------------------------------------------------


def local_directory(reference: str) -> Path | None:
    """The directory that a repository reference names, or None where it is a Hub id (`org/name`)."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        fail(f"{reference!r} is neither a directory that exists nor a Hub id such as org/name")
    return None


def reason(error: BaseException) -> str:
    """The line of an error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    return lines[0] if lines else type(error).__name__


def hub_fail(action: str, error: Exception) -> NoReturn:
    fail(f"{action} failed: {reason(error)} (what is private, or written to, needs `hf auth login` or HF_TOKEN)")


def decode_audio(audio: dict) -> np.ndarray:
    """Mono float32 samples at 16 kHz of an undecoded `Audio` value, of which soundfile reads the bytes or the file."""
    source = io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"]
    waveform, rate = soundfile.read(source, dtype="float32", always_2d=True)
    waveform = waveform.mean(axis=1)
    return waveform if rate == SAMPLING_RATE else librosa.resample(waveform, orig_sr=rate, target_sr=SAMPLING_RATE)


def load_rows(source: tuple[str, str | None, str], args) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A split as memory-mapped Arrow, and its first rows. A random row takes 0.1 ms there, 240 ms in parquet.

    A dry run converts nothing: it reads the first rows, and of the others only what is small.
    """
    name, config, split = source
    path, options, workers = name, {"name": config, "split": split}, args.preprocessing_num_workers
    if directory := local_directory(name):
        pattern = f"{config or 'default'}/{split}-*.parquet"
        files = sorted(map(str, directory.glob(pattern)))
        if not files:
            there = {f"{file.parent.name}/{file.name.split('-')[0]}" for file in directory.glob("*/*-*.parquet")}
            fail(f"{directory} has no {pattern}; it has {', '.join(sorted(there)) or 'no parquet files'}")
        # Not load_dataset(directory): its cache would hide that a file has changed.
        path, options, workers = "parquet", {"data_files": files, "split": "train"}, min(workers, len(files))
    try:
        if not args.dry_run:
            data = datasets.load_dataset(path, **options, num_proc=workers if workers > 1 else None)
            return data, data.select(range(min(HEAD, len(data))))
        if not directory:
            there = datasets.load_dataset_builder(name, config).config.data_files
            files = [url.removeprefix("hf://") for url in there.get(split) or fail(f"{name} has no split {split}")]
        table = pa.dataset.dataset(files, filesystem=None if directory else HfFileSystem())
        small = [column for column in table.schema.names if column not in ("input_features", args.audio_column_name)]
        if "labels" in small:
            small = [column for column in small if column in ("labels", "input_length")]
        head = table.head(HEAD, batch_size=HEAD, batch_readahead=0, fragment_readahead=0)
        return datasets.Dataset(table.to_table(columns=small)), datasets.Dataset(head)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        hub_fail(f"loading {name}", error)


class Rows(torch.utils.data.Dataset):
    """The usable rows of one split of a dataset, numbered from 0."""

    def __init__(self, source: tuple[str, str | None, str], processor: WhisperProcessor, args, held_out: bool = False):
        """Of held-out rows some, evenly spaced, are taken, with labels made from text where there are none."""
        self.name, self.extractor, self.cache = source[0], processor.feature_extractor, None
        (data, head), tokenizer = load_rows(source, args), processor.tokenizer
        columns = head.column_names
        self.text = next((name for name in (args.text_column_name, "text", "transcription") if name in columns), None)
        if "labels" not in columns and "whisper_transcript" in columns:
            data = data.rename_column("whisper_transcript", "labels")
        elif "labels" not in columns and self.text and held_out:
            spoken = [f"<|{args.language}|>", f"<|{args.task}|>"] if args.language else []
            prefix = tokenizer.convert_tokens_to_ids([START, *spoken, "<|notimestamps|>"])
            texts = [tokenizer.encode(text or "", add_special_tokens=False) for text in data[self.text]]
            data = data.add_column("labels", [[*prefix, *text, tokenizer.eos_token_id] for text in texts])
        self.input = next((name for name in ("input_features", args.audio_column_name) if name in columns), None)
        if "labels" not in data.column_names or not self.input:
            fail(f"{self.name} lacks labels, or input_features or {args.audio_column_name}: its columns are {columns}")
        if self.input != "input_features":
            audio = datasets.Audio(sampling_rate=SAMPLING_RATE, decode=False)
            head = head.cast_column(self.input, audio)
            data = data if args.dry_run else data.cast_column(self.input, audio)
        self.data, self.labels = data, data.select_columns("labels")  # labels without the inputs, which are large
        column = data.data.column("labels")
        if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            fail(f"{self.name}: labels are {column.type}, not token ids: label the data without --decode_token_ids")
        lengths, self.starts = scan_labels(column, tokenizer.convert_tokens_to_ids(START))
        samples = np.zeros(len(lengths))
        if "input_length" in columns:
            samples = np.array(data.data.column("input_length").fill_null(0))
        longest = f"a label of more than {args.max_label_length} tokens, the longest of {lengths.max(initial=0)}"
        reasons = {
            "no label": (self.starts < 0) | (lengths - 1 <= self.starts),
            f"{longest} (--max_label_length)": lengths > args.max_label_length,
            "more than 30 s of audio": samples > WINDOW_FRAMES * 160,
        }
        left_out = np.any(list(reasons.values()), axis=0)
        self.usable, self.left_out = np.flatnonzero(~left_out), np.flatnonzero(left_out)
        self.reasons = {reason: int(rows.sum()) for reason, rows in reasons.items() if rows.any()}
        why = ", ".join(f"{count} with {reason}" for reason, count in self.reasons.items())
        if len(self.usable) == 0:
            fail(f"none of the {len(lengths)} rows of {self.name} ({source[2]}) can be used: {why or 'it is empty'}")
        if len(self.left_out):
            first = ", ".join(map(str, self.left_out[:10]))
            logger.warning("%s: %d rows left out (%s), the first: %s", self.name, len(self.left_out), why, first)
        if held_out and 0 < args.eval_max_samples < len(self.usable):
            self.usable = self.usable[np.linspace(0, len(self.usable) - 1, args.eval_max_samples).astype(int)]
        self.counts = (lengths - 1 - self.starts)[self.usable]  # targets of each usable row
        self.hours = samples[self.usable].sum() / SAMPLING_RATE / 3600  # 0 where the data does not tell
        self.head, mels = list(head[self.input]), self.extractor.feature_size
        frames = min(WINDOW_FRAMES, math.ceil((samples[0] + 200) / 160) + 1)
        if self.input == "input_features" and samples[0] and len(self.head[0]) != 2 * frames * mels:
            stored = len(self.head[0]) / 2 / frames  # they would train on noise
            fail(f"{self.name} has log-mels of {stored:g} bins, the student needs {mels}: filter it for this model")
        name = hashlib.sha256(lengths.tobytes() + self.usable.tobytes())  # of all labels, and of the first inputs
        for chunk in column.chunks:
            name.update(pc.list_flatten(chunk).to_numpy(zero_copy_only=False).astype(np.int32).tobytes())
        for value in self.head:
            name.update(value if isinstance(value, bytes) else value["bytes"] or value["path"].encode())
        self.fingerprint = name.hexdigest()[:16]

    def log_mel(self, value: bytes | dict) -> np.ndarray:
        """[mels, 3000] float16, stored or computed: rounded alike, so that both train the same model."""
        if self.input == "input_features":
            return pad_features(np.frombuffer(value, "<f2").reshape(-1, self.extractor.feature_size))
        waveform = decode_audio(value)
        if len(waveform) > WINDOW_FRAMES * 160:
            raise ValueError(f"{len(waveform) / SAMPLING_RATE:.1f} s are more than 30")
        features = self.extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="np").input_features
        return features[0].astype("<f2")

    def reference(self, index: int, tokenizer) -> str:
        """The text column's, or else the label's text."""
        row = int(self.usable[index])
        if self.text:
            return self.data[row][self.text] or ""
        return tokenizer.decode(self.labels[row]["labels"][self.starts[row] :], skip_special_tokens=True)

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, index: int) -> dict:
        row = int(self.usable[index])
        tokens, first = np.array(self.labels[row]["labels"]), int(self.starts[row])
        if self.cache:
            block, place = divmod(index, CACHE_BLOCK)
            with safetensors.safe_open(block_path(self.cache, block), "pt") as file:  # a memory map
                stored = {name: file.get_tensor(f"{name}.{place}") for name in ("states", "teacher_hidden")}
            return {"tokens": tokens, "first": len(tokens) - 1 - len(stored["teacher_hidden"]), **stored}
        try:
            features = self.log_mel(self.data[row][self.input])
        except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:  # in its place one without targets
            logger.warning("%s, row %d: its audio cannot be read and counts for nothing: %s", self.name, row, error)
            first, features = len(tokens) - 1, np.zeros((self.extractor.feature_size, WINDOW_FRAMES), "<f2")
        return {"tokens": tokens, "first": first, "features": features}


def block_path(cache: Path, block: int) -> Path:
    return cache / str(block // 1000) / f"{block}.safetensors"


class Plan:
    """Which rows make which batch: a function of the seed and the number of the step, and of nothing else."""

    def __init__(self, sizes: list[int], weights: list[float] | None, seed: int, batch_size: int):
        self.sizes, self.weights, self.seed, self.batch_size = sizes, weights, seed, batch_size
        self.steps_per_epoch = math.ceil(sum(sizes) / batch_size)
        self.orders: dict[int, np.ndarray] = {}

    def rows(self, step: int) -> np.ndarray:
        """The rows of the global batch of a step, counted from 0. The last of an epoch may be short."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch not in self.orders:  # the epoch before is kept, because the loader runs ahead
            order = epoch_order(self.sizes, self.weights, self.seed, epoch)
            self.orders = {key: self.orders[key] for key in self.orders if key == epoch - 1} | {epoch: order}
        return self.orders[epoch][number * self.batch_size :][: self.batch_size]

    def micro_batches(self, first: int, last: int, size: int, stride: int, offset: int) -> Iterator[list[int]]:
        """One process' part of the steps. Where a short batch leaves it nothing, a row that will not be counted."""
        for step in range(first, last):
            rows = self.rows(step)
            for start in range(offset, self.batch_size, stride):
                yield rows[start : start + size].tolist() or rows[:1].tolist()


def read_batches(rows: torch.utils.data.Dataset, batches, workers: int, pin: bool) -> Iterator[dict]:
    """Batches by workers, which leave Ctrl-C and SIGTERM, that reach a whole process group, to the process that saves.

    They are spawned: a process forked after threads have run may hang in its first parallel region. And they are born
    with both signals blocked: one that died before it had read what it is to do would leave us writing that for ever.
    """
    more = {"multiprocessing_context": "spawn"} if workers else {}
    more |= {"collate_fn": collate, "num_workers": workers, "pin_memory": pin}
    loader = torch.utils.data.DataLoader(rows, batch_sampler=batches, **more)
    resource_tracker.ensure_running()  # as workers start, which would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- models ----------------------------------------------------------------------------------------------------------


def load_model(reference: str, dtype: torch.dtype, args: argparse.Namespace) -> WhisperForConditionalGeneration:
    """A model; of a dry run only its shape."""
    attention = "flash_attention_2" if args.attn_type == "flash_attn" else args.attn_type
    if args.attn_type == "flash_attn" and not is_flash_attn_2_available():
        logger.warning("flash-attn is not installed: --attn_type sdpa instead")
        attention = "sdpa"
    try:
        source = str(local_directory(reference) or reference)
        if args.dry_run:
            with torch.device("meta"):
                return WhisperForConditionalGeneration(WhisperConfig.from_pretrained(source))
        return WhisperForConditionalGeneration.from_pretrained(source, dtype=dtype, attn_implementation=attention)
    except (*HUB_ERRORS, ValueError) as error:
        hub_fail(f"loading the model {reference}", error)


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights, in the precision of the second."""
    ours, theirs = one.state_dict(), other.state_dict()
    same_shapes = {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    return same_shapes and all(torch.equal(ours[name].to(tensor), tensor) for name, tensor in theirs.items())


def decode(decoder: nn.Module, states: torch.Tensor, batch: dict) -> torch.Tensor:
    """Last hidden states at the positions with a target, (tokens, width)."""
    output = decoder(input_ids=batch["decoder_input_ids"], encoder_hidden_states=states, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)[batch["positions"]]


class Frozen:
    """What is not trained: the teacher, and the student's encoder where it is frozen; the same one where they agree."""

    def __init__(self, teacher: WhisperForConditionalGeneration, encoder: nn.Module | None):
        self.teacher, self.encoder = teacher.eval().requires_grad_(False), encoder

    @torch.no_grad()
    def __call__(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's input, encoder outputs (rows, 1500, width) or features, and the teacher's hidden states."""
        if "states" in batch:
            return batch["states"], batch["teacher_hidden"]
        features = batch["features"].to(self.teacher.dtype)
        states = self.teacher.model.encoder(features).last_hidden_state
        hidden = decode(self.teacher.model.decoder, states, batch)
        if self.encoder is None:
            return features, hidden
        own = self.encoder is not self.teacher.model.encoder
        return self.encoder(features).last_hidden_state if own else states, hidden


class Trained(nn.Module):
    """What is trained, as one module: the decoder with its head, and the encoder unless it is frozen."""

    def __init__(self, student: WhisperForConditionalGeneration, args: argparse.Namespace):
        super().__init__()
        self.encoder = None if args.freeze_encoder else student.model.encoder
        self.decoder, self.loss = student.model.decoder, (args.temperature, (args.ce_weight, args.kl_weight))
        self.proj_out = None if student.proj_out.weight is self.decoder.embed_tokens.weight else student.proj_out

    def forward(self, inputs: torch.Tensor, teacher_hidden: torch.Tensor, teacher_head: torch.Tensor, batch: dict):
        """`DistillationLoss` of a batch."""
        states = inputs if self.encoder is None else self.encoder(inputs).last_hidden_state
        head, hidden = (self.proj_out or self.decoder.embed_tokens).weight, decode(self.decoder, states, batch)
        return DistillationLoss.apply(hidden, head, teacher_hidden, teacher_head, batch["targets"], *self.loss)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that appears under its name only when it is whole and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: dict) -> None:
    write_file(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def file_hash(path: Path, sync: bool = False) -> str:
    """SHA-256 of a file; with `sync` it is on the disk afterwards."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """The checkpoints of an output directory by their step, oldest first, whole or not."""
    found = ((CHECKPOINT_NAME.fullmatch(path.name), path) for path in directory.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def read_checkpoint(directory: Path) -> dict | None:
    """The manifest of a checkpoint, or None, said so, where anything of it is missing or damaged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if damaged := [name for name, expected in manifest["files"].items() if file_hash(directory / name) != expected]:
            raise ValueError(f"{', '.join(damaged)} is damaged")
        return manifest
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s is not whole and is skipped: %s", directory.name, error)
        return None


def rotate(directory: Path, step: int, limit: int | None, best: int | None) -> None:
    """Keep the newest `limit` checkpoints up to `step`, and the best. What is beyond `step` was found damaged."""
    for path in directory.glob(".checkpoint-*.partial"):  # a kill's
        shutil.rmtree(path, ignore_errors=True)
    past = [number for number, _ in checkpoints(directory) if number <= step]
    keep = {*(past if limit is None else past[-max(1, limit) :]), best}
    for number, path in checkpoints(directory):
        if number not in keep:
            shutil.rmtree(path)


def read_metrics(path: Path, last_step: float = math.inf) -> list[dict]:
    """The entries up to a step. A kill may have cut the last line short: it is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}\n")]
    return [entry for entry in entries if entry["step"] <= last_step]


def draw_curves(entries: list[dict], path: Path) -> None:
    """Training loss and its parts, held-out figures and the learning rate over the steps, as a PNG."""
    panels = {
        "loss per token": ("loss", "ce_loss", "kl_loss", "eval_loss"),
        "held-out errors, %": ("eval_cer", "eval_wer"),
        "learning rate": ("learning_rate",),
    }
    drawn = [what for what, names in panels.items() if any(name in entry for entry in entries for name in names)]
    figure = Figure(figsize=(5 * max(1, len(drawn)), 4), layout="constrained")
    for number, what in enumerate(drawn, start=1):
        axes = figure.add_subplot(1, len(drawn), number, title=what, xlabel="optimiser step")
        for name in panels[what]:
            steps = [entry["step"] for entry in entries if name in entry]
            axes.plot(steps, [entry[name] for entry in entries if name in entry], label=name, marker=".")
        axes.legend()
    figure.savefig(path, format="png", dpi=100)


def model_card(args: argparse.Namespace, record: dict, entries: list[dict]) -> str:
    """README.md: what the model was made from and how, its curves, and what was measured while it was made."""
    name, teacher = Path(args.output_dir).resolve().name, args.teacher_model_name_or_path
    trained_on, held_out = args.train_dataset_name.split("+"), args.eval_dataset_name or ""
    here = {reference: local_directory(reference) for reference in (teacher, *trained_on, held_out or teacher)}
    shown = {reference: path.resolve().name if path else reference for reference, path in here.items()}  # no paths
    data = ModelCardData(
        language=args.language,
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "distillation"],
        base_model=None if here[teacher] else teacher,
        datasets=[reference for reference in trained_on if not here[reference]] or None,
    )
    measured = [{"step": "teacher", **(record.get("teacher_evaluation") or {})}, *entries]
    columns = {"eval_loss": "loss", "eval_cer": "CER %", "eval_wer": "WER %"}
    rows = [[entry["step"], *(f"{entry[key]:.3f}" for key in columns)] for entry in measured if "eval_loss" in entry]
    what = f"Held out, on {shown.get(held_out)} ({args.eval_split_name}), greedy, normalised as Whisper does:"
    evaluation = f"\n{what}\n\n{table(['step', *columns.values()], rows)}\n" if rows else ""
    return f"""---
{data.to_yaml()}
---

# {name}

A Whisper with {record["layers"]["encoder"]} encoder and {record["layers"]["decoder"]} decoder layers, distilled from \
{shown[teacher]} on {record["rows"]:,} rows of {" and ".join(map(shown.get, trained_on))}: \
{record["steps"]:,} steps of {record["settings"]["global_batch_size"]} rows, \
{record["steps"] / record["steps_per_epoch"]:.2f} epochs.
The loss is {args.ce_weight} · CE + {args.kl_weight} · T² · KL(teacher ‖ student) at T = {args.temperature}.
Weights are float32.

![training curves](training_curves.png)
{evaluation}
{table(["setting", "value"], record["settings"].items())}

Made by `run_distillation.py`: `{RECORD}` has all arguments and library versions, `metrics.jsonl` every figure.
"""


def table(columns: list[str], rows) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [columns, ["---"] * len(columns), *rows])


def choose_start(output_dir: Path, args, settings: dict, total: int) -> tuple[str | None, dict, list[Path]]:
    """The checkpoint to go on from, if any, and its state; "done" where the result of these settings is there already.

    And what is to be removed, where --overwrite_output_dir allows that: what a run with other settings left there, or
    any run where --resume_from_checkpoint is False.
    """
    wish, path, start, limit = args.resume_from_checkpoint, output_dir / RECORD, (None, {}), -1
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    changed = differences(record["settings"], settings) if record else ""
    if wish.lower() not in ("auto", "true", "false", "none"):
        manifest = read_checkpoint(Path(wish)) or fail(f"--resume_from_checkpoint {wish} is no whole checkpoint")
        if other := differences(manifest["settings"], settings):
            fail(f"--resume_from_checkpoint {wish} was made with other settings: {other}")
        start = (wish, manifest["state"])
        limit = manifest["state"]["step"] if Path(wish).resolve().parent == output_dir.resolve() else -1
    elif record and not changed and wish.lower() in ("auto", "true"):
        finished = record["status"] == "complete" and (output_dir / "model.safetensors").exists()
        if finished and record["steps"] >= total:
            return "done", {}, []
        for _, directory in reversed(checkpoints(output_dir)):
            manifest = read_checkpoint(directory)
            if manifest and not differences(manifest["settings"], settings):
                return str(directory), manifest["state"], []
        if not finished:
            return *start, []
        changed = f"{record['steps']} steps of {total}, and no checkpoint to go on from"
    there = [directory for step, directory in checkpoints(output_dir) if step > limit]
    if limit < 0:
        there += [output_dir / name for name in TRAINING_FILES if (output_dir / name).exists()]
    if there and not args.overwrite_output_dir:
        why = f"another run ({changed})" if changed else f"later results ({', '.join(path.name for path in there)})"
        fail(f"{output_dir} holds {why}: pass --overwrite_output_dir to replace them, or choose another --output_dir")
    return *start, there


# ---- the world outside -----------------------------------------------------------------------------------------------


def home_repository(directory: Path) -> str:
    """The model repository that a directory is a clone of, or that its path ends with; else its name.

    `hf download org/name --local-dir org/name`, unlike `git clone`, leaves no other trace of where it came from.
    """
    if shutil.which("git"):
        command = ["git", "-C", str(directory), "config", "remote.origin.url"]
        remote = urlsplit(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        name = remote.path.strip("/").removesuffix(".git")
        if remote.hostname == urlsplit(constants.ENDPOINT).hostname and name.count("/") == 1:
            return name
    name = "/".join(directory.resolve().parts[-2:])
    with contextlib.suppress(HFValidationError):
        if HfApi().repo_exists(name):
            return name
    return directory.resolve().name


class Publisher:
    """Pushes the model repository: in the background while training goes on, and once more, checked, at the end."""

    def __init__(self, args: argparse.Namespace, output_dir: Path):
        self.api, self.output_dir, self.push = HfApi(), output_dir, None
        try:
            name = args.hub_model_id or home_repository(output_dir)
            if args.dry_run:
                account = self.api.whoami()
                self.repo_id = name if "/" in name else f"{account['name']}/{name}"
                if self.api.repo_exists(self.repo_id):
                    self.api.auth_check(self.repo_id, write=True)
                elif self.repo_id.split("/")[0] not in (account["name"], *(each["name"] for each in account["orgs"])):
                    raise RuntimeError(f"{account['name']} can't create {self.repo_id}")
            else:
                self.repo_id = self.api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        except HUB_ERRORS as error:
            hub_fail(f"--push_to_hub: creating the repository {args.hub_model_id or ''}", error)
        self.patterns = list(OWN_FILES)
        student, here = Path(args.model_name_or_path).resolve(), output_dir.resolve()
        if student.is_relative_to(here):
            self.patterns.append(f"{student.relative_to(here)}/*")

    def upload(self, message: str, background: bool):
        options = {"allow_patterns": self.patterns, "ignore_patterns": [".*", "*.partial"], "commit_message": message}
        return self.api.upload_folder(
            repo_id=self.repo_id, folder_path=self.output_dir, run_as_future=background, **options
        )

    def idle(self) -> bool:
        """Whether no push is under way. One that failed is reported, and made up for by the next."""
        if self.push and self.push.done():
            if error := self.push.exception():
                logger.warning("a push to %s failed, training goes on: %s", self.repo_id, reason(error))
            self.push = None
        return self.push is None

    def finish(self) -> None:
        """Push, and compare what is there with what is here."""
        try:
            self.upload("Distilled model", background=False)
            tree = self.api.list_repo_tree(self.repo_id, recursive=True)
            there = {entry.path: getattr(entry, "size", None) for entry in tree}
            paths = [self.output_dir / name for name in OWN_FILES if (self.output_dir / name).exists()]
            if missing := [path.name for path in paths if there.get(path.name) != path.stat().st_size]:
                raise RuntimeError(f"{', '.join(missing)} did not arrive whole")
        except HUB_ERRORS as error:
            whole = f"{self.output_dir} is whole: the same command pushes it"
            fail(f"pushing to {self.repo_id} failed: {reason(error)}; {whole}")
        logger.info("pushed to %s/%s", constants.ENDPOINT, self.repo_id)


def start_tracker(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Start the tracker. Whatever is wrong with it gives one warning and never stops the training."""
    mode = os.environ.get("WANDB_MODE")
    try:
        if args.report_to == "wandb" and not mode:
            import wandb  # only here: it need not be installed

            try:
                mode = "online" if wandb.login(prompt=False, timeout=20) else "offline"
            except Exception:
                mode = "offline"
            if mode == "offline":
                logger.warning("wandb: not logged in (`wandb login`); its files stay in %s/wandb", args.output_dir)
        values = {name: value if isinstance(value, int | float) else str(value) for name, value in vars(args).items()}
        options = {"wandb": {"dir": args.output_dir, "name": args.wandb_name, "mode": mode}}
        accelerator.init_trackers(args.wandb_project, values, options)
        if not accelerator.trackers:
            raise ImportError("it is not installed")
    except Exception as error:
        accelerator.trackers = []
        logger.warning("--report_to %s: %s; metrics.jsonl has all figures", args.report_to, reason(error))


class Stop:
    """SIGTERM and Ctrl-C: at once before training, at the end of the step during it, at once when it comes again."""

    def __init__(self):
        self.status, self.deferred = 0, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self)

    def __call__(self, number: int, _frame) -> None:
        if self.status or not self.deferred:
            sys.exit(128 + number)
        self.status = 128 + number


# ---- one run ---------------------------------------------------------------------------------------------------------


class Distillation:
    """The processes, the models, the data, and where training stands."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.output_dir, self.started = args, Path(args.output_dir), time.monotonic()
        if not args.dry_run:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[args.dtype],
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(days=30)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != self.accelerator.num_processes:  # each would take itself for the only one
            fail(
                f"{started} processes were started and accelerate sees {self.accelerator.num_processes}: on CPUs "
                "set ACCELERATE_USE_CPU=true"
            )
        self.stride = args.per_device_train_batch_size * self.accelerator.num_processes  # clips of a micro-step
        self.offset = args.per_device_train_batch_size * self.accelerator.process_index
        level = logging.INFO if self.is_main else logging.WARNING
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
        for noisy in ("httpx2", "accelerate"):  # a line for every request, and for every file of a checkpoint
            logging.getLogger(noisy).setLevel(logging.WARNING)
        transformers.logging.disable_progress_bar()
        if self.device.type == "cpu":  # accelerate launch --cpu gives a process one thread
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", self.accelerator.num_processes))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
        self.publisher = Publisher(args, self.output_dir) if args.push_to_hub and self.is_main else None
        self.load_models()
        with self.accelerator.local_main_process_first():  # the others find the Arrow files in the cache
            self.train_rows = [Rows(source, self.processor, args) for source in split_sources(args)]
            self.held_out = None
            if args.eval_dataset_name:
                source = (args.eval_dataset_name, args.eval_dataset_config_name, args.eval_split_name)
                self.held_out = Rows(source, self.processor, args, held_out=True)
        sizes, batch_size = [len(rows) for rows in self.train_rows], self.stride * args.gradient_accumulation_steps
        self.plan = Plan(sizes, args.train_dataset_samples, args.seed, batch_size)
        self.counts = np.concatenate([rows.counts for rows in self.train_rows])
        epochs = math.ceil(args.num_train_epochs * self.plan.steps_per_epoch)
        self.total = args.max_steps if args.max_steps > 0 else epochs
        self.settings = json.loads(json.dumps(self.run_settings()))

    def load_models(self) -> None:
        args, name = self.args, self.args.model_name_or_path
        try:
            self.source = local_directory(name) or Path(snapshot_download(name, allow_patterns=TOKENIZER_FILES))
            self.processor = WhisperProcessor.from_pretrained(self.source)
        except (*HUB_ERRORS, ValueError) as error:
            hub_fail(f"loading the tokenizer of {name}", error)
        if args.language and f"<|{args.language}|>" not in self.processor.tokenizer.get_vocab():
            fail(f"--language {args.language}: {name} has no token for that language")
        self.student = load_model(name, torch.float32, args)
        teacher = load_model(args.teacher_model_name_or_path, getattr(torch, args.dtype), args)
        for key in ("vocab_size", "num_mel_bins", "max_source_positions"):
            ours, theirs = getattr(self.student.config, key), getattr(teacher.config, key)
            if ours != theirs:
                fail(f"{key} is {ours} in the student, {theirs} in the teacher: distil from the teacher it came from")
        args.max_label_length = min(args.max_label_length, self.student.config.max_target_positions)
        encoder = None
        if args.freeze_encoder:
            encoder = self.student.model.encoder.requires_grad_(False).eval()
        self.frozen = Frozen(teacher, encoder)
        self.trained = self.model = Trained(self.student, args)
        if args.dry_run:
            return
        transformers.logging.set_verbosity_error()  # from here on it warns only of what is meant so
        self.names = {"student": digest(self.student), "teacher": digest(teacher)}
        teacher.to(self.device)
        self.encoder = self.student.model.encoder  # to be saved as it is
        if encoder and equal_weights(encoder, teacher.model.encoder):
            self.frozen.encoder = self.student.model.encoder = teacher.model.encoder
        elif encoder:
            logger.warning("the student's frozen encoder is not the teacher's: both run")
            encoder.to(self.device)
        if args.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        if args.torch_compile:
            for module in (teacher.model.encoder, teacher.model.decoder, self.trained.encoder, self.trained.decoder):
                if module is not None:
                    module.compile()

    def run_settings(self) -> dict:
        """The settings that change the trained weights. A run goes on only where all of them are as they were."""
        names = (
            "train_dataset_samples max_label_length language task freeze_encoder dtype learning_rate lr_scheduler_type "
            "lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm ce_weight "
            "kl_weight temperature seed"
        )
        settings = {name: getattr(self.args, name) for name in names.split()}
        settings |= {"train_data": [rows.fingerprint for rows in self.train_rows]}
        settings |= {"global_batch_size": self.plan.batch_size}
        if not self.args.lr_scheduler_type.startswith("constant"):  # only then the rate depends on where the run ends
            settings["steps"] = self.total
        return settings if self.args.dry_run else settings | self.names  # a dry run does not know the weights

    def run(self, stop: Stop) -> int:
        """Train and publish; the exit status."""
        args, start = self.args, [None]
        if self.is_main:
            checkpoint, state, there = choose_start(self.output_dir, args, self.settings, self.total)
            if args.dry_run:
                self.describe(checkpoint, state, there)
            elif there:
                logger.warning("replacing %s in %s", ", ".join(path.name for path in there), self.output_dir)
                for path in there:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            start = [(checkpoint, state)]
        if args.dry_run:
            return 0
        checkpoint, state = broadcast_object_list(start)[0]
        nothing = {"trend": None, "lowest": None, "best": None, "teacher": None}
        self.state = {"step": 0, "window": [0.0, 0.0, 0], **nothing, **state}
        if checkpoint == "done":
            logger.info("%s holds the finished result of this command: nothing is trained", self.output_dir)
        else:
            self.prepare(checkpoint)
            stop.deferred = True
            status = self.train(stop)
            stop.deferred = False
            if not status:
                self.finish()
            self.accelerator.end_training()
            if status:
                return status
        if self.publisher:
            self.publisher.finish()
        return 0

    def describe(self, checkpoint: str | None, state: dict, there: list[Path]) -> None:
        """What a dry run prints."""
        args, plan, teacher, gb = self.args, self.plan, self.frozen.teacher, 1e-9
        trained = sum(parameter.numel() for parameter in self.trained.parameters() if parameter.requires_grad)
        width, rows = getattr(torch, args.dtype).itemsize, self.train_rows[0]
        started = time.perf_counter()
        for value in rows.head:
            rows.log_mel(value)
        rate = len(rows.head) / (time.perf_counter() - started)
        step = self.total if checkpoint == "done" else state.get("step", 0)
        model, kept = 4 * self.student.num_parameters() * gb, math.ceil(self.total / args.save_steps)
        memory = (16 * trained + width * teacher.num_parameters()) * gb
        cached = int(self.counts.sum()) * teacher.config.d_model
        cached += len(self.counts) * teacher.config.max_source_positions * self.student.config.d_model
        for rows in [*self.train_rows, *([self.held_out] if self.held_out else [])]:
            hours = f"{rows.hours:.2f} h, " if rows.hours else ""
            print(f"input: {rows.name}, {len(rows)} rows, {hours}{rows.counts.mean():.1f} tokens a label", end="")
            print(f", {len(rows.left_out)} rows left out" if len(rows.left_out) else "")
        print(f"work: {self.total} steps of {plan.batch_size} rows, {plan.steps_per_epoch} an epoch")
        print(f"done: {step} of {self.total} steps{f' ({Path(checkpoint).name})' if state else ''}")
        if there:
            print(f"removes: {', '.join(path.name for path in there)} in {self.output_dir}")
        print(
            f"writes: {self.output_dir}, the model of {model:.2f} GB, {min(kept, args.save_total_limit or kept)} "
            f"checkpoints of {12 * trained * gb:.2f} GB each"
        )
        if args.cache_encoder_outputs:
            print(f"cache: {args.cache_encoder_outputs}, {cached * width * gb:.2f} GB less what is there already")
        print(f"pushes: {f'{self.publisher.repo_id}, {model:.2f} GB at every save' if self.publisher else 'nothing'}")
        print(f"memory: {memory:.2f} GB a process for weights, gradients and optimiser; activations come on top")
        print(
            f"time: {self.total - step} steps at this device's speed; a process reads {rate:.0f} rows/s "
            f"(from a sample of {len(self.train_rows[0].head)})"
        )

    def prepare(self, checkpoint: str | None) -> None:
        """Everything that trains, as it was."""
        args, accelerator = self.args, self.accelerator
        parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=fused, **options)
        self.scheduler = make_scheduler(args, optimizer, self.total)
        self.model, self.optimizer = accelerator.prepare(self.trained, optimizer)
        accelerator.register_for_checkpointing(self.scheduler)
        if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            # The names of weights tell how many processes wrote them, which may be others now.
            def load(models: list, directory: str) -> None:
                weights = safetensors.torch.load_file(Path(directory) / "model.safetensors")
                weights = {name.removeprefix("module."): value for name, value in weights.items()}
                accelerator.unwrap_model(models.pop()).load_state_dict(weights)

            accelerator.register_load_state_pre_hook(load)
        if checkpoint:
            accelerator.load_state(checkpoint)
            accelerator.step = 0  # of accumulation, which starts anew and may have changed
            logger.info("going on from step %d of %d (%s)", self.state["step"], self.total, Path(checkpoint).name)
        self.record = {
            "status": "running",
            "settings": self.settings,
            "rows": sum(self.plan.sizes),
            "rows_left_out": {rows.name: rows.reasons for rows in self.train_rows},
            "hours": round(sum(rows.hours for rows in self.train_rows), 2),
            "steps": self.state["step"],
            "steps_per_epoch": self.plan.steps_per_epoch,
            "layers": {side: getattr(self.student.config, f"{side}_layers") for side in ("encoder", "decoder")},
            "processes": accelerator.num_processes,
            "arguments": vars(args),
            "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")},
        }
        if self.is_main:
            rotate(self.output_dir, self.state["step"], None, None)
            write_json(self.output_dir / RECORD, self.record)
            entries = read_metrics(self.output_dir / "metrics.jsonl", self.state["step"])
            write_file(self.output_dir / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
        accelerator.wait_for_everyone()
        if not (self.output_dir / RECORD).exists():
            fail(f"--output_dir {self.output_dir} must be on a file system that all machines see")
        if args.cache_encoder_outputs:
            for rows in self.train_rows:
                rows.cache = self.fill_cache(rows, Path(args.cache_encoder_outputs).expanduser())
        sizes = (sum(self.plan.sizes), self.total, self.plan.steps_per_epoch, self.plan.batch_size)
        trained = sum(parameter.numel() for parameter in parameters) / 1e6
        logger.info("%d clips; %d steps, %d an epoch, of %d clips; %.1f M trained weights, in float32", *sizes, trained)
        if self.is_main and args.report_to != "none":
            start_tracker(accelerator, args)

    def fill_cache(self, rows: Rows, directory: Path) -> Path:
        """Write what no earlier run has: encoder outputs and the teacher's hidden states, a file for CACHE_BLOCK rows.

        Each process takes blocks of its own. They are the same whoever encodes them: a cache finished by another run
        has the same bytes.
        """
        teacher, encoder, accelerator = self.frozen.teacher, self.frozen.encoder, self.accelerator
        key = [digest(encoder), self.names["teacher"], rows.fingerprint, self.args.dtype]
        cache, missing = directory / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16], []
        if self.is_main:
            cache.mkdir(parents=True, exist_ok=True)
            there = {int(path.stem) for path in cache.glob("*/*.safetensors")}
            missing = [block for block in range(math.ceil(len(rows) / CACHE_BLOCK)) if block not in there]
            values = teacher.config.max_source_positions * encoder.config.d_model
            values += rows.counts.mean() * teacher.config.d_model
            needed = min(len(rows), len(missing) * CACHE_BLOCK) * values * teacher.dtype.itemsize / 1e9
            free = shutil.disk_usage(directory).free / 1e9
            logger.info("encoder cache of %s: %.2f GB to write, %.2f GB free in %s", rows.name, needed, free, directory)
            if needed > free:
                fail(f"--cache_encoder_outputs needs {needed:.2f} GB for {rows.name}; {directory} has {free:.2f} free")
        missing = broadcast_object_list([missing])[0]
        if not cache.is_dir():
            fail(f"--cache_encoder_outputs {directory} must be on a file system that all machines see")
        blocks = missing[accelerator.process_index :: accelerator.num_processes]
        batches = [range(block * CACHE_BLOCK, min(len(rows), (block + 1) * CACHE_BLOCK)) for block in blocks]
        batches = read_batches(rows, batches, self.args.dataloader_num_workers if batches else 0, pin=False)
        bar = tqdm(blocks, "encoding", unit="block", disable=not (self.is_main and blocks), mininterval=PACE)
        for block, batch in zip(bar, batches, strict=True):
            batch = send_to_device(batch, self.device, non_blocking=True)
            with accelerator.autocast():
                states, hidden = (each.to(teacher.dtype) for each in self.frozen(batch))
            counts = torch.bincount(batch["positions"] // batch["decoder_input_ids"].shape[1], minlength=len(states))
            parts = {"states": states, "teacher_hidden": hidden.split(counts.tolist())}
            tensors = {f"{name}.{i}": row.cpu().clone() for name, each in parts.items() for i, row in enumerate(each)}
            block_path(cache, block).parent.mkdir(exist_ok=True)
            write_file(block_path(cache, block), safetensors.torch.save(tensors))
        accelerator.wait_for_everyone()
        return cache

    def train(self, stop: Stop) -> int:
        """From where training stands to its end; 0, or the exit status where a signal ended it early."""
        args, state, plan, step = self.args, self.state, self.plan, self.state["step"]
        batches = plan.micro_batches(step, self.total, args.per_device_train_batch_size, self.stride, self.offset)
        rows = torch.utils.data.ConcatDataset(self.train_rows)
        batches = read_batches(rows, batches, args.dataloader_num_workers, pin=self.device.type == "cuda")
        look = {"desc": "training", "unit": "step", "mininterval": PACE, "disable": not self.is_main}
        bar = tqdm(total=self.total, initial=step, **look)
        self.model.train()
        if step == 0:
            self.assess(0)
        since, clips, stopping = time.monotonic(), 0, False
        while state["step"] < self.total and not stopping:
            ce, kl, tokens, norm, stopping = self.optimiser_step(batches, stop)
            clips += len(plan.rows(state["step"]))
            state["window"] = [before + now for before, now in zip(state["window"], (ce, kl, tokens), strict=True)]
            state["step"] = step = state["step"] + 1
            bar.update()
            last = step == self.total
            if step % args.logging_steps == 0 or last:
                rate, since, clips = clips / (time.monotonic() - since), time.monotonic(), 0
                ce, kl = (value / state["window"][2] for value in state["window"][:2])
                loss, lr = args.ce_weight * ce + args.kl_weight * kl, self.optimizer.param_groups[0]["lr"]
                state["window"] = [0.0, 0.0, 0]
                bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {rate:.1f} clips/s")
                figures = {"loss": loss, "ce_loss": ce, "kl_loss": kl, "learning_rate": lr, "grad_norm": norm}
                self.log(step, figures | {"samples_per_second": round(rate, 3)})
            paused = time.monotonic()
            best = self.assess(step) if step % args.eval_steps == 0 or last else False
            if best or stopping or last or step % args.save_steps == 0:
                self.save(step)
            since += time.monotonic() - paused
        bar.close()
        if step == self.total:
            return 0
        logger.warning("stopped at step %d of %d, which is saved: the same command goes on", step, self.total)
        return stop.status or 128 + signal.SIGTERM

    def optimiser_step(self, batches: Iterator[dict], stop: Stop) -> tuple[float, float, int, float, bool]:
        """One step: the sums of cross-entropy and KL, the tokens, the gradient's norm, whether a signal has come."""
        args, accelerator, step = self.args, self.accelerator, self.state["step"]
        rows, head = self.plan.rows(step), self.frozen.teacher.proj_out.weight
        tokens = int(self.counts[rows].sum())
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # cross-entropy, KL, processes with a signal
        scale = accelerator.num_processes * args.gradient_accumulation_steps / tokens
        for start in range(self.offset, self.plan.batch_size, self.stride):
            batch, counted = send_to_device(next(batches), self.device, non_blocking=True), start < len(rows)
            # Dropout is a function of the place in the data: there is no random state to keep.
            torch.manual_seed(int(np.random.SeedSequence([args.seed, step, start]).generate_state(1)[0]))
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    inputs, teacher_hidden = self.frozen(batch)
                    loss, parts = self.model(inputs, teacher_hidden, head, batch)
                # DDP takes the mean over processes and accelerate over micro-batches; ours is the one over tokens.
                accelerator.backward(loss * (counted * scale))
                sums[:2] += counted * parts
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm or math.inf)
                    norm, sums[2] = float(norm if norm is not None else 0.0), float(stop.status != 0)
                    ce, kl, signals = accelerator.reduce(sums).tolist()
                    self.watch((args.ce_weight * ce + args.kl_weight * kl) / tokens, norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if args.lr_scheduler_type not in LED_BY_LOSS:
            self.scheduler.step()
        return ce, kl, tokens, norm, signals > 0

    def watch(self, loss: float, norm: float) -> None:
        """End the run before a loss that is not a number, or explodes, gets into the weights and the checkpoints."""
        args, state, trouble = self.args, self.state, None
        state["trend"] = loss if state["trend"] is None else 0.95 * state["trend"] + 0.05 * loss
        state["lowest"] = min(state["lowest"] or math.inf, state["trend"])
        if not math.isfinite(loss) or (self.accelerator.scaler is None and not math.isfinite(norm)):
            trouble = f"the loss is {loss} and the gradient's norm {norm}"
        elif state["trend"] > 3 * state["lowest"] + 1:
            trouble = f"the loss has exploded from {state['lowest']:.3f} to {state['trend']:.3f}"
        if trouble:
            kept = [path.name for _, path in checkpoints(self.output_dir)] or ["none yet"]
            fail(
                f"step {state['step'] + 1}: {trouble}; the last checkpoint from before: {kept[-1]}. "
                f"Lower --learning_rate ({args.learning_rate}) or raise --warmup_steps ({args.warmup_steps})"
            )

    def log(self, step: int, figures: dict) -> None:
        if self.is_main:
            entry = {"step": step, "epoch": round(step / self.plan.steps_per_epoch, 4), **figures}
            with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            try:
                self.accelerator.log(figures, step=step)
            except Exception as error:  # whatever a tracker may raise
                logger.warning("--report_to %s: %s; it is left out from now on", self.args.report_to, error)
                self.accelerator.trackers = []

    def assess(self, step: int) -> bool:
        """Evaluate on the held-out rows, the teacher once; whether the student is better than ever."""
        if self.held_out is None:
            return False
        what = "held-out rows, %s: CER %.2f, WER %.2f, loss %.3f"
        if self.state["teacher"] is None:
            self.state["teacher"] = figures = self.evaluate(self.frozen.teacher)
            logger.info(what, "teacher", *(figures[f"eval_{name}"] for name in ("cer", "wer", "loss")))
        figures = self.evaluate(self.student)
        logger.info(what, f"step {step}", *(figures[f"eval_{name}"] for name in ("cer", "wer", "loss")))
        self.log(step, figures)
        if self.args.lr_scheduler_type in LED_BY_LOSS:
            self.scheduler.step(figures["eval_loss"])
        figure, best = figures[f"eval_{self.args.metric_for_best_model}"], self.state["best"]
        if step == 0 or (best and figure >= best["figure"]):
            return False
        self.state["best"] = {"step": step, "figure": figure}
        return True

    @torch.no_grad()
    def evaluate(self, model: WhisperForConditionalGeneration) -> dict[str, float]:
        """Loss per token, and WER and CER of greedy decoding in per cent, of teacher or student on held-out rows."""
        args, teacher, tokenizer, rows = self.args, self.frozen.teacher, self.processor.tokenizer, self.held_out
        sums, pairs, normalise = torch.zeros(3, dtype=torch.float64, device=self.device), [], BasicTextNormalizer()
        size = args.per_device_train_batch_size
        starts = range(self.accelerator.process_index * size, len(rows), self.accelerator.num_processes * size)
        self.model.eval()
        for start in tqdm(starts, "evaluating", leave=False, disable=not self.is_main, mininterval=PACE):
            indices = range(start, min(start + size, len(rows)))
            batch = send_to_device(collate([rows[index] for index in indices]), self.device)
            with self.accelerator.autocast():
                inputs, hidden = self.frozen(batch)
                head = teacher.proj_out.weight
                if model is teacher:
                    sums[:2] += DistillationLoss.apply(
                        hidden, head, hidden, head, batch["targets"], *self.trained.loss
                    )[1]
                else:
                    sums[:2] += self.model(inputs, hidden, head, batch)[1]
                sequences = model.generate(
                    batch["features"].to(model.model.encoder.conv1.weight.dtype),
                    generation_config=generation_config(model, args, args.max_label_length),
                    force_unique_generate_call=True,
                )
            sums[2] += len(batch["targets"])
            hypotheses = map(normalise, tokenizer.batch_decode(sequences, skip_special_tokens=True))
            references = (normalise(rows.reference(index, tokenizer)) for index in indices)
            pairs += [pair for pair in zip(references, hypotheses, strict=True) if pair[0].strip()]
        self.model.train()
        ce, kl, tokens = self.accelerator.reduce(sums).tolist()
        texts = [list(each) for each in zip(*gather_object(pairs), strict=True)] or [["-"], [""]]
        bare = [[text.replace(" ", "") for text in each] for each in texts] if args.language in UNSPACED else texts
        figures = {"loss": (args.ce_weight * ce + args.kl_weight * kl) / tokens, "ce": ce / tokens, "kl": kl / tokens}
        figures |= {"wer": 100 * jiwer.wer(*texts), "cer": 100 * jiwer.cer(*bare)}
        return {f"eval_{name}": value for name, value in figures.items()}

    def save(self, step: int) -> None:
        """Save a checkpoint, which appears under its name when all of it is on the disk, and push the model."""
        directory = self.output_dir / f"checkpoint-{step}-epoch-{(step - 1) // self.plan.steps_per_epoch}"
        partial = self.output_dir / f".{directory.name}.partial"
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.is_main:
            paths = sorted(path for path in partial.rglob("*") if path.is_file())
            files = {str(path.relative_to(partial)): file_hash(path, sync=True) for path in paths}
            write_json(partial / MANIFEST, {"state": self.state, "settings": self.settings, "files": files})
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(partial, directory)
            best = self.state["best"]
            rotate(self.output_dir, step, self.args.save_total_limit, best and best["step"])
        idle = [self.publisher is not None and self.publisher.idle() and step < self.total]
        if broadcast_object_list(idle)[0]:
            self.write_result(self.record | {"steps": step})
            if self.publisher:
                self.publisher.push = self.publisher.upload(f"Training in progress, step {step}", background=True)

    def write_result(self, record: dict) -> None:
        """Write the model repository into the output directory, each file whole or not at all."""
        weights = self.accelerator.get_state_dict(self.model)
        if self.args.freeze_encoder:
            weights |= self.encoder.state_dict(prefix="encoder.")
        if self.is_main:
            names = {name: name if name.startswith("proj_out") else f"model.{name}" for name in weights}
            weights = {names[name]: value.float().cpu() for name, value in weights.items()}
            partial = self.output_dir / ".model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            self.student.generation_config = generation_config(
                self.student, self.args, self.student.config.max_target_positions
            )
            shared, self.student.model.encoder = self.student.model.encoder, self.encoder
            self.student.save_pretrained(partial, state_dict=weights)
            self.student.model.encoder = shared  # the teacher's where they agree, in its precision
            self.processor.save_pretrained(partial)
            self.processor.feature_extractor.save_pretrained(partial)  # preprocessor_config.json
            for name in TOKENIZER_FILES:  # the student's own, made for CTranslate2 and whisper.cpp as well
                if (self.source / name).exists():
                    shutil.copyfile(self.source / name, partial / name)
            entries = read_metrics(self.output_dir / "metrics.jsonl")
            draw_curves(entries, partial / "training_curves.png")
            write_file(partial / "README.md", model_card(self.args, record, entries))
            write_json(partial / RECORD, record)
            for script in (Path(__file__).resolve().with_name(name) for name in SCRIPTS):
                if script.exists() and not (self.output_dir / script.name).exists():
                    shutil.copy(script, partial)
            for path in sorted(partial.iterdir(), key=lambda path: path.name == RECORD):  # the record, "complete", last
                file_hash(path, sync=True)
                os.replace(path, self.output_dir / path.name)
            partial.rmdir()
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Write the trained model and the record that it is complete."""
        best = self.state["best"]
        while self.publisher and not self.publisher.idle():
            time.sleep(0.1)
        done = {"status": "complete", "steps": self.total, "best": best, "teacher_evaluation": self.state["teacher"]}
        self.write_result(self.record | done | {"seconds": round(time.monotonic() - self.started, 1)})
        logger.info("the trained model is in %s", self.output_dir.resolve())


def make_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, total: int):
    options = {"num_warmup_steps": args.warmup_steps, "num_training_steps": total}
    extra = args.lr_scheduler_kwargs
    return transformers.get_scheduler(args.lr_scheduler_type, optimizer, scheduler_specific_kwargs=extra, **options)


def generation_config(model: WhisperForConditionalGeneration, args, max_length: int) -> GenerationConfig:
    """Greedy, in the language and the task trained for."""
    values = {"forced_decoder_ids": None, "return_timestamps": False, "num_beams": 1, "do_sample": False}
    values |= {"language": args.language, "task": args.task} if args.language else {}
    return GenerationConfig.from_dict(model.generation_config.to_dict() | values | {"max_length": max_length})


# ---- command line ----------------------------------------------------------------------------------------------------


def split_sources(args: argparse.Namespace) -> list[tuple[str, str | None, str]]:
    """Name, configuration and split of each training dataset; one configuration or split stands for all."""
    names = args.train_dataset_name.split("+")
    columns = [names]
    for flag in ("train_dataset_config_name", "train_split_name"):
        values = [value or None for value in (getattr(args, flag) or "").split("+")]
        if len(values) not in (1, len(names)):
            fail(f"--{flag} {getattr(args, flag)} names {len(values)} for {len(names)} datasets")
        columns.append(values * len(names) if len(values) == 1 else values)
    weights = args.train_dataset_samples
    if weights and (len(weights) != len(names) or min(weights) <= 0):
        fail(f"--train_dataset_samples {weights} must be one positive number for each dataset")
    return list(zip(*columns, strict=True))


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split("+")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    count = {"type": int, "metavar": "N"}
    add = parser.add_argument_group("models").add_argument
    add("--model_name_or_path", required=True, help="student: Hub id or directory")
    add("--teacher_model_name_or_path", required=True, help="teacher: Hub id or directory")
    add("--freeze_encoder", **switch, help="no training of the encoder; equal to the teacher's, it runs once for both")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="bfloat16", help="compute precision; what is trained stays float32")
    add("--attn_type", choices=["eager", "sdpa", "flash_attn"], default="sdpa", help="attention")
    add("--gradient_checkpointing", **switch, help="activations computed again, not kept: less memory, slower")
    add("--torch_compile", **switch, help="compiled models (for GPUs)")
    add = parser.add_argument_group("data").add_argument
    add("--train_dataset_name", help="datasets, Hub ids or directories, joined by +")
    add("--train_dataset_config_name", help="their configurations joined by +, or one for all")
    add("--train_split_name", default="train", help="their splits joined by +, or one for all")
    add(
        "--train_dataset_samples",
        type=numbers,
        help="their sampling weights joined by +; without them every row once an epoch",
    )
    add("--audio_column_name", default="audio", help="column with audio, where input_features is none")
    add("--text_column_name", help="column with the reference of held-out rows (text, transcription, else the label)")
    add("--language", help="language of the labels, such as ja")
    add("--task", choices=["transcribe", "translate"], default="transcribe", help="task of the labels")
    add("--max_label_length", **count, default=448, help="tokens of the longest label; longer ones are left out")
    add("--preprocessing_num_workers", **count, default=1, help="processes that convert datasets to Arrow")
    add("--dataloader_num_workers", **count, default=0, help="processes that load batches; 0 = the training process")
    add("--cache_encoder_outputs", metavar="DIR", help="cache of what is frozen, to compute it once; ~4 MB a clip")
    add = parser.add_argument_group("training").add_argument
    add("--do_train", **switch, help="training; without it, only an evaluation on the held-out rows")
    add("--num_train_epochs", type=float, default=3.0, help="epochs")
    add("--max_steps", **count, default=-1, help="optimiser steps instead of epochs; -1 = epochs")
    add("--per_device_train_batch_size", **count, default=16, help="clips a process and micro-batch")
    add("--gradient_accumulation_steps", **count, default=1, help="micro-batches an optimiser step")
    add("--learning_rate", type=float, default=1e-4, help="peak learning rate")
    schedules = [schedule.value for schedule in transformers.SchedulerType]
    add("--lr_scheduler_type", choices=schedules, default="constant_with_warmup", help="learning rate's schedule")
    add("--lr_scheduler_kwargs", type=json.loads, default="{}", metavar="JSON", help="the schedule's own arguments")
    add("--warmup_steps", **count, default=50, help="optimiser steps of warm-up")
    add("--weight_decay", type=float, default=0.0, help="AdamW's weight decay, of matrices only")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's beta 1")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's beta 2")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
    add("--max_grad_norm", type=float, default=1.0, help="largest norm of a gradient; 0 = any")
    add("--ce_weight", type=float, default=0.8, help="weight of the cross-entropy with the labels")
    add("--kl_weight", type=float, default=1.0, help="weight of the KL divergence from the teacher")
    add("--temperature", type=float, default=2.0, help="temperature of the KL term")
    add("--seed", type=int, default=42, help="seed of the order of the rows and of dropout")
    add = parser.add_argument_group("evaluation while training").add_argument
    add("--eval_dataset_name", help="held-out dataset: Hub id or directory")
    add("--eval_dataset_config_name", help="its configuration")
    add("--eval_split_name", default="test", help="its split")
    add("--eval_steps", **count, default=1000, help="optimiser steps between evaluations")
    add("--eval_max_samples", **count, default=256, help="rows, evenly spaced; 0 = all")
    add("--metric_for_best_model", choices=["loss", "cer", "wer"], default="cer", help="figure of the best checkpoint")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="directory of the result, also a clone of the model's repository")
    overwrite = "what a run with other settings left there is replaced; with the same settings a run goes on"
    add("--overwrite_output_dir", **switch, help=overwrite)
    resume = "auto = the newest whole checkpoint, False = none: start afresh, or the path of one"
    add("--resume_from_checkpoint", nargs="?", const="auto", default="auto", metavar="CHOICE", help=resume)
    add("--save_steps", **count, default=500, help="optimiser steps between checkpoints")
    add("--save_total_limit", **count, help="newest checkpoints to keep, beside the best (all)")
    add("--logging_steps", **count, default=50, help="optimiser steps between entries of metrics.jsonl")
    trackers = ["wandb", "tensorboard", "trackio", "none"]
    add("--report_to", choices=trackers, default="wandb", help="tracker beside metrics.jsonl")
    add("--wandb_project", default="distillation", help="tracker's project")
    add("--wandb_name", help="tracker's name for the run")
    add("--push_to_hub", **switch, help="push of the result, at every save in the background and at the end")
    add("--hub_model_id", help="repository to push to (that of the clone, or named as the end of --output_dir)")
    add("--hub_private_repo", **switch, help="a private repository, where it has to be made")
    dry_run = "say what would be read, written and pushed, how much, and what is done already; change nothing"
    add("--dry_run", **switch, help=dry_run)
    args = parser.parse_args(argv)
    args.output_dir = str(Path(args.output_dir).expanduser())
    sizes = "per_device_train_batch_size gradient_accumulation_steps save_steps logging_steps eval_steps"
    for name in sizes.split():
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.language:
        args.language = TO_LANGUAGE_CODE.get(args.language.lower(), args.language.lower())
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.do_train or not args.train_dataset_name:
        fail("nothing to do: pass --do_train and --train_dataset_name")
    if args.cache_encoder_outputs and not args.freeze_encoder:
        fail("--cache_encoder_outputs needs --freeze_encoder: the outputs of an encoder in training change")
    if args.lr_scheduler_type in LED_BY_LOSS and not args.eval_dataset_name:
        fail(f"--lr_scheduler_type {args.lr_scheduler_type} follows the held-out loss: it needs --eval_dataset_name")
    if args.dtype == "float16" and not torch.cuda.is_available():
        fail("--dtype float16 needs a GPU: use bfloat16 or float32")
    if Path(args.output_dir).resolve() == Path(args.model_name_or_path).resolve():
        fail(f"--output_dir {args.output_dir} is the student to start from: choose another")
    try:
        return Distillation(args).run(Stop())
    except (OSError, safetensors.SafetensorError, DatasetGenerationError) as error:  # no room, no right to write
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is None:  # not the system's
            raise
        fail(f"{reason(cause)}; when that is mended, the same command goes on from the last checkpoint")
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():  # the loader's get no SIGTERM: an exit would wait for them
            worker.kill()
            worker.join()


if __name__ == "__main__":
    sys.exit(main())
