#!/usr/bin/env python
"""Distil a Whisper teacher into a smaller student on pseudo-labelled speech.

In: a student from create_student_model.py, its teacher, and one or more datasets `a+b`, each a Hub id or a local
directory: `.vectorized` (log-mels), or labelled with audio, of which the features are computed while loading.

Out, in --output_dir: the trained model with all that transformers, faster-whisper and whisper.cpp look for, its card,
`metrics.jsonl`, `training_curves.png`, the record `training.json`, and `checkpoint-<step>-epoch-<epoch>/`.

    python run_distillation.py --model_name_or_path my-init --teacher_model_name_or_path openai/whisper-large-v3 \\
        --train_dataset_name my-org/my-data.wer_10.0.vectorized --language ja --freeze_encoder --do_train \\
        --num_train_epochs 8 --output_dir my-model
    accelerate launch --multi_gpu run_distillation.py ...       (every process trains on its part of each batch)

The loss is `ce_weight · CE + kl_weight · T² · KL(teacher ‖ student)` (https://arxiv.org/abs/2311.00430), its mean over
the label tokens of the global batch: it does not depend on padding, accumulation or the number of processes.

Batch k of an epoch is a function of the seed, the epoch and k. After a kill at any moment the same command goes on from
the newest whole checkpoint and ends with the weights of a run that was never interrupted; when it has ended, the same
command only pushes what is missing. Several machines need an --output_dir that all of them see.
"""

import argparse
import hashlib
import io
import json
import logging
import math
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
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import datasets
import jiwer
import librosa
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import EvalResult, HfApi, ModelCardData, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor, get_scheduler
from transformers.modeling_outputs import BaseModelOutput
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
RECORD = "training.json"
MANIFEST = "manifest.json"  # of a checkpoint: what it holds; written last
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)-epoch-(\d+)")
SCRIPTS = ("create_student_model.py", "run_distillation.py")
TRAINING_FILES = ("model.safetensors", "metrics.jsonl", "training_curves.png", RECORD)
OWN_FILES = (
    *TRAINING_FILES,
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "normalizer.json"),
    *("added_tokens.json", "special_tokens_map.json", "README.md"),
)


# ---- small pure functions --------------------------------------------------------------------------------------------


class DistillationLoss(torch.autograd.Function):
    """The sums of loss, cross-entropy and T² · KL over tokens, from hidden states rather than from logits.

    Logits exist for LOSS_CHUNK tokens at a time, in float32, and their gradient is taken on the spot, so memory grows
    neither with padding nor with the batch. Products are in autocast's precision, as a linear layer's would be.
    """

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, targets, ce_weight, kl_weight, temperature, train):
        """`hidden` (tokens, width) and `head` (vocabulary, width), the same of the teacher; `targets` (tokens)."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        exact = torch.promote_types(hidden.dtype, torch.float32)
        ce = kl = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden, grad_head = (torch.zeros_like(hidden), torch.zeros_like(head)) if train else (None, None)
        with torch.autocast(kind, enabled=False):
            head, teacher_head = head.to(dtype), teacher_head.to(dtype)
            for part in range(0, len(targets), LOSS_CHUNK):
                rows = slice(part, part + LOSS_CHUNK)
                inputs, label = hidden[rows].to(dtype), targets[rows, None]
                logits = F.linear(inputs, head).to(exact)  # (tokens, vocabulary)
                soft = (logits / temperature).log_softmax(dim=-1)
                log_probs = logits.log_softmax(dim=-1)
                teacher = F.linear(teacher_hidden[rows].to(dtype), teacher_head).to(exact)
                teacher = teacher.div_(temperature).log_softmax(dim=-1)
                teacher_probs = teacher.exp()
                ce = ce - log_probs.gather(1, label).sum()
                kl = kl + temperature**2 * torch.dot(teacher_probs.flatten(), teacher.sub_(soft).flatten())
                if train:
                    slope = log_probs.exp_().mul_(ce_weight)
                    slope.scatter_add_(1, label, torch.full_like(label, -ce_weight, dtype=exact))
                    slope.add_(soft.exp_().sub_(teacher_probs), alpha=kl_weight * temperature)
                    slope = slope if dtype == torch.float16 else slope.to(dtype)  # float16 would lose small ones
                    grad_hidden[rows] = slope @ head.to(slope.dtype)
                    if slope.dtype == grad_head.dtype:
                        grad_head.addmm_(slope.T, inputs.to(slope.dtype))
                    else:
                        grad_head += slope.T @ inputs
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(ce, kl)
        return ce_weight * ce + kl_weight * kl, ce, kl

    @staticmethod
    def backward(ctx, grad, *_):
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_head.mul_(grad), *[None] * 7  # in place: as large as the head


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


def scan_labels(column: pa.ChunkedArray, start_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row the number of tokens, the place of the first `start_id` (-1: none), and the token behind that."""
    found = [np.empty((3, 0), np.int64)]
    for chunk in column.chunks:
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        values, ends = pc.list_flatten(chunk).to_numpy(zero_copy_only=False), np.cumsum(lengths)
        starts, languages = np.full((2, len(lengths)), -1)
        hits = np.flatnonzero(values == start_id)[::-1]  # backwards, so that the first of a row is written last
        rows = np.searchsorted(ends, hits, side="right")
        starts[rows] = hits - (ends - lengths)[rows]
        languages[rows] = values[np.minimum(hits + 1, len(values) - 1)]
        found.append(np.stack([lengths, starts, languages]))
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
    names = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    return "; ".join(f"{name} was {then.get(name)!r} and is now {now.get(name)!r}" for name in names)


def count_errors(output: jiwer.WordOutput | jiwer.CharacterOutput) -> list[int]:
    """Errors, and the length of the references."""
    wrong = output.substitutions + output.deletions
    return [wrong + output.insertions, wrong + output.hits]


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


def hub_fail(action: str, error: Exception | str) -> NoReturn:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    fail(f"{action} failed: {reason.strip()} (what is private, or written to, needs `hf auth login` or HF_TOKEN)")


def decode_audio(audio: dict) -> np.ndarray:
    """Mono float32 samples at 16 kHz of an undecoded `Audio` value, of which soundfile reads the bytes or the file."""
    source = io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"]
    waveform, rate = soundfile.read(source, dtype="float32", always_2d=True)
    waveform = waveform.mean(axis=1)
    return waveform if rate == SAMPLING_RATE else librosa.resample(waveform, orig_sr=rate, target_sr=SAMPLING_RATE)


def load_rows(name: str, config: str | None, split: str, workers: int) -> datasets.Dataset:
    """A split as memory-mapped Arrow: a random row takes 0.1 ms there, 240 ms in parquet groups of 1,000 rows."""
    source, options = name, {"name": config, "split": split}
    if directory := local_directory(name):
        pattern = f"{config or 'default'}/{split}-*.parquet"
        files = sorted(map(str, directory.glob(pattern)))
        if not files:
            there = sorted(
                {f"{path.parent.name}/{path.name.split('-')[0]}" for path in directory.glob("*/*-*.parquet")}
            )
            fail(f"{directory} has no {pattern}; it has {', '.join(there) or 'no parquet files'}")
        # Not load_dataset(directory): its cache would hide that a file has changed.
        source, options, workers = "parquet", {"data_files": files, "split": "train"}, min(workers, len(files))
    try:
        return datasets.load_dataset(source, **options, num_proc=workers if workers > 1 else None)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        hub_fail(f"loading {name}", error)


class Rows(torch.utils.data.Dataset):
    """The usable rows of one split of a dataset, numbered from 0."""

    def __init__(
        self, source: tuple[str, str | None, str], processor: WhisperProcessor, args, limit: int | None = None
    ):
        """`limit` is for held-out rows: at most so many, evenly spaced, labels made from text where there are none."""
        self.name, self.extractor, self.cache = source[0], processor.feature_extractor, None
        data, tokenizer = load_rows(*source, args.preprocessing_num_workers), processor.tokenizer
        columns = data.column_names
        self.text = next((name for name in (args.text_column_name, "text", "transcription") if name in columns), None)
        if "labels" not in columns and "whisper_transcript" in columns:
            data = data.rename_column("whisper_transcript", "labels")
        elif "labels" not in columns and self.text and limit:
            spoken = [f"<|{args.language}|>", f"<|{args.task}|>"] if args.language else []
            prefix = tokenizer.convert_tokens_to_ids([START, *spoken, "<|notimestamps|>"])
            texts = [tokenizer.encode(text or "", add_special_tokens=False) for text in data[self.text]]
            labels = [[*prefix, *text, tokenizer.eos_token_id] for text in texts]
            data = data.add_column("labels", labels)
        self.input = next((name for name in ("input_features", args.audio_column_name) if name in columns), None)
        if "labels" not in data.column_names or not self.input:
            fail(f"{self.name} lacks labels, or input_features or {args.audio_column_name}: its columns are {columns}")
        if self.input != "input_features":
            data = data.cast_column(self.input, datasets.Audio(sampling_rate=SAMPLING_RATE, decode=False))
        self.data, self.labels = data, data.select_columns("labels")  # labels without the inputs, which are large
        column = data.data.column("labels")
        if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
            fail(f"{self.name}: labels are {column.type}, not token ids: label the data without --decode_token_ids")
        lengths, self.starts, languages = scan_labels(column, tokenizer.convert_tokens_to_ids(START))
        usable = (self.starts >= 0) & (lengths - 1 > self.starts) & (lengths <= args.max_label_length)
        if "input_length" in columns:
            usable &= np.array(data.data.column("input_length")) <= WINDOW_FRAMES * 160
        self.usable, self.left_out = np.flatnonzero(usable), np.flatnonzero(~usable)
        reasons = f"no label, a label of more than {args.max_label_length} tokens, or more than 30 s of audio"
        if len(self.usable) == 0:
            fail(f"none of the {len(usable)} rows of {self.name} ({source[2]}) can be used: {reasons}")
        if len(self.left_out):
            first = ", ".join(map(str, self.left_out[:10]))
            logger.warning("%s: %d rows left out (%s), the first: %s", self.name, len(self.left_out), reasons, first)
        if limit and limit < len(self.usable):
            self.usable = self.usable[np.linspace(0, len(self.usable) - 1, limit).astype(int)]
        others = languages[self.usable] != tokenizer.convert_tokens_to_ids(f"<|{args.language}|>")
        if args.language and others.any():
            logger.warning(
                "%s: %d of %d labels are not in --language %s", self.name, others.sum(), len(others), args.language
            )
        self.counts = (lengths - 1 - self.starts)[self.usable]  # targets of each usable row
        self.check_features()
        name = hashlib.sha256(lengths.tobytes() + self.usable.tobytes())  # of all labels, and a sample of the inputs
        for chunk in column.chunks:
            name.update(pc.list_flatten(chunk).to_numpy(zero_copy_only=False).astype(np.int32).tobytes())
        for row in np.unique(np.linspace(0, len(data) - 1, 256).astype(int)):
            value = data[int(row)][self.input]
            name.update(value if isinstance(value, bytes) else value["bytes"] or value["path"].encode())
        self.fingerprint = name.hexdigest()[:16]

    def check_features(self) -> None:
        """Features of another number of mel bins would train on noise."""
        row, mels = self.data[int(self.usable[0])], self.extractor.feature_size
        if self.input == "input_features" and row.get("input_length"):
            frames = min(WINDOW_FRAMES, math.ceil((row["input_length"] + 200) / 160) + 1)
            if len(row["input_features"]) != 2 * frames * mels:
                stored = len(row["input_features"]) / 2 / frames
                fail(f"{self.name} has log-mels of {stored:g} bins, the student needs {mels}: filter it for this model")

    def features(self, index: int) -> np.ndarray | None:
        """Log-mels of a row, [mels, 3000] float16: also where they are computed, so that both train the same model."""
        value = self.data[int(self.usable[index])][self.input]
        if self.input == "input_features":
            return pad_features(np.frombuffer(value, "<f2").reshape(-1, self.extractor.feature_size))
        try:
            waveform = decode_audio(value)
        except (soundfile.SoundFileError, OSError, TypeError) as error:
            logger.warning("%s, row %d: its audio cannot be read and counts for nothing: %s", self.name, index, error)
            return None
        log_mel = self.extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="np").input_features[0]
        return log_mel.astype("<f2")

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
            return {"tokens": tokens, "first": first, **self.cache.read(index)}
        features = self.features(index)
        if features is None:  # in its place a row without targets
            first, features = len(tokens) - 1, np.zeros((self.extractor.feature_size, WINDOW_FRAMES), "<f2")
        return {"tokens": tokens, "first": first, "features": features}


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


def ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach a whole process group, to the process that saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(rows: torch.utils.data.Dataset, batches, workers: int, pin: bool) -> torch.utils.data.DataLoader:
    """Workers are spawned: a process forked after threads have run may hang in its first parallel region."""
    more = {"multiprocessing_context": "spawn", "worker_init_fn": ignore_signals} if workers else {}
    more |= {"collate_fn": collate, "num_workers": workers, "pin_memory": pin}
    return torch.utils.data.DataLoader(rows, batch_sampler=batches, **more)


# ---- models ----------------------------------------------------------------------------------------------------------


def load_model(reference: str, dtype: torch.dtype, attn_type: str) -> WhisperForConditionalGeneration:
    implementation = "flash_attention_2" if attn_type == "flash_attn" else attn_type
    if attn_type == "flash_attn" and not is_flash_attn_2_available():
        logger.warning("flash-attn is not installed: --attn_type sdpa instead")
        implementation = "sdpa"
    try:
        source, options = str(local_directory(reference) or reference), {"attn_implementation": implementation}
        return WhisperForConditionalGeneration.from_pretrained(source, dtype=dtype, **options)
    except (OSError, HFValidationError) as error:
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

    def __init__(
        self, student: WhisperForConditionalGeneration, freeze_encoder: bool, loss: tuple[float, float, float]
    ):
        super().__init__()
        self.encoder = None if freeze_encoder else student.model.encoder
        self.decoder, self.loss = student.model.decoder, loss
        self.proj_out = None if student.proj_out.weight is self.decoder.embed_tokens.weight else student.proj_out

    def forward(self, inputs: torch.Tensor, teacher_hidden: torch.Tensor, teacher_head: torch.Tensor, batch: dict):
        states = inputs if self.encoder is None else self.encoder(inputs).last_hidden_state
        head = (self.proj_out or self.decoder.embed_tokens).weight
        common = (teacher_hidden, teacher_head, batch["targets"], *self.loss, torch.is_grad_enabled())
        return DistillationLoss.apply(decode(self.decoder, states, batch), head, *common)


class Cache:
    """The frozen encoder's outputs and the teacher's hidden states for all rows of a dataset, in memory-mapped files.

    `<key>.states` (rows, frames, width), `<key>.hidden` (tokens, width), `<key>.done` a byte for each block of rows.
    Blocks are the same whoever encodes them, so that a cache finished by another run has the same bytes.
    """

    def __init__(self, directory: Path, key: str, counts: np.ndarray, frames: int, widths: tuple[int, int], dtype):
        self.dtype, self.rows, self.maps = dtype, len(counts), None
        self.tokens = np.concatenate([[0], np.cumsum(counts)])
        stored = np.dtype(f"i{dtype.itemsize}")  # numpy knows no bfloat16
        self.files = {
            "states": (directory / f"{key}.states", stored, (self.rows, frames, widths[0])),
            "hidden": (directory / f"{key}.hidden", stored, (int(self.tokens[-1]), widths[1])),
            "done": (directory / f"{key}.done", np.dtype("u1"), (math.ceil(self.rows / CACHE_BLOCK),)),
        }

    def bytes_needed(self) -> int:
        """Bytes that its files do not have on the disk yet."""
        total = sum(math.prod(shape) * kind.itemsize for _, kind, shape in self.files.values())
        return total - sum(path.stat().st_blocks * 512 for path, _, _ in self.files.values() if path.exists())

    def open(self) -> dict[str, np.ndarray]:
        if self.maps is None:
            for path, kind, shape in self.files.values():
                if not path.exists() or path.stat().st_size != math.prod(shape) * kind.itemsize:
                    path.touch()
                    os.truncate(path, math.prod(shape) * kind.itemsize)  # sparse; keeps what is there
            self.maps = {
                name: np.memmap(path, kind, "r+", shape=shape) for name, (path, kind, shape) in self.files.items()
            }
        return self.maps

    def write(self, block: int, states: torch.Tensor, hidden: torch.Tensor) -> None:
        maps, row = self.open(), block * CACHE_BLOCK
        if len(hidden) != self.tokens[min(self.rows, row + CACHE_BLOCK)] - self.tokens[row]:
            fail(f"--cache_encoder_outputs needs readable audio: that of one of the rows from {row} on is not")
        for name, start, value in (("states", row, states), ("hidden", self.tokens[row], hidden)):
            raw = value.to(self.dtype).cpu().contiguous().view(torch.uint8).numpy()
            maps[name][start : start + len(value)] = raw.view(maps[name].dtype)
            maps[name].flush()
        maps["done"][block] = 1  # only after what it vouches for is on the disk
        maps["done"].flush()

    def read(self, index: int) -> dict[str, torch.Tensor]:
        maps = self.open()
        tokens = slice(*self.tokens[index : index + 2])
        parts = {"states": maps["states"][index], "teacher_hidden": maps["hidden"][tokens]}
        return {name: torch.from_numpy(part.copy()).view(self.dtype) for name, part in parts.items()}

    def __getstate__(self) -> dict:  # for the loader's workers
        return self.__dict__ | {"maps": None}


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


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint in such a way that no part of it ever looks like a whole one."""
    doomed = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(directory, doomed)
    shutil.rmtree(doomed)


def rotate(directory: Path, step: int, limit: int | None, best: int | None) -> None:
    """Keep the newest `limit` checkpoints up to `step`, and the best. What is beyond `step` was found damaged."""
    for path in directory.glob(".checkpoint-*.partial"):  # a kill's
        shutil.rmtree(path, ignore_errors=True)
    past = [number for number, _ in checkpoints(directory) if number <= step]
    keep = {*(past if limit is None else past[-max(1, limit) :]), best}
    for number, path in checkpoints(directory):
        if number not in keep:
            remove_checkpoint(path)


def save_tokenizer_files(processor: WhisperProcessor, directory: Path) -> None:
    """Save a processor with the files that CTranslate2, whisper.cpp and transformers 4 look for as well."""
    tokenizer = processor.tokenizer
    processor.save_pretrained(directory)
    processor.feature_extractor.save_pretrained(directory)  # preprocessor_config.json
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])  # transformers 4 fails over 5's name
    contents = {
        "vocab": model["vocab"],
        "added_tokens": tokenizer.get_added_vocab(),
        "normalizer": tokenizer.english_spelling_normalizer,
        "special_tokens_map": tokenizer.special_tokens_map,
        "tokenizer_config": config,
    }
    for name, content in contents.items():
        if content is not None:
            text = json.dumps(content, ensure_ascii=False, indent=2)
            (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def read_metrics(path: Path, last_step: float = math.inf) -> list[dict]:
    """The entries up to a step. A kill may have cut the last line short: it is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}\n")]
    return [entry for entry in entries if entry["step"] <= last_step]


def draw_curves(entries: list[dict], path: Path) -> None:
    """Training loss and its parts, held-out figures and the learning rate over the steps, as a PNG."""
    panels = (("loss", "ce_loss", "kl_loss", "eval_loss"), ("eval_cer", "eval_wer"), ("learning_rate",))
    panels = [names for names in panels if any(name in entry for entry in entries for name in names)]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            steps = [entry["step"] for entry in entries if name in entry]
            axes.plot(steps, [entry[name] for entry in entries if name in entry], label=name, marker=".")
        axes.set_xlabel("optimiser step")
        axes.legend()
    figure.savefig(path, format="png", dpi=100)


def model_card(args: argparse.Namespace, record: dict, entries: list[dict]) -> str:
    """README.md: what the model was made from and how, its curves, and what was measured while it was made."""
    on_hub = [name for name in args.train_dataset_name.split("+") if local_directory(name) is None]
    teacher, held_out = args.teacher_model_name_or_path, [entry for entry in entries if "eval_loss" in entry]
    source = {"dataset_type": args.eval_dataset_name, "dataset_name": args.eval_dataset_name}
    source |= {"dataset_split": args.eval_split_name, "task_type": "automatic-speech-recognition"}
    rates = [(name, round(held_out[-1][f"eval_{name}"], 2)) for name in ("cer", "wer") if held_out]
    data = ModelCardData(
        language=args.language,
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "distillation"],
        base_model=teacher if local_directory(teacher) is None else None,
        datasets=on_hub or None,
        model_name=Path(args.output_dir).resolve().name,
        eval_results=[EvalResult(metric_type=name, metric_value=rate, **source) for name, rate in rates] or None,
    )
    table = ["| step | loss | CER % | WER % |", "| --- | --- | --- | --- |"]
    for label, figures in [("teacher", record.get("teacher_evaluation")), *((e["step"], e) for e in held_out)]:
        figures = {name.removeprefix("eval_"): value for name, value in (figures or {}).items()}
        if figures:
            table.append(f"| {label} | {figures['loss']:.3f} | {figures['cer']:.2f} | {figures['wer']:.2f} |")
    what = f"on {args.eval_dataset_name} ({args.eval_split_name}), greedy decoding, normalised as Whisper does"
    evaluation = "\n".join([f"\n## While it was trained\n\nHeld out, {what}:\n", *table, ""]) if held_out else ""
    settings = "\n".join(f"| {name} | {value} |" for name, value in record["settings"].items())
    layers, epochs = record["layers"], record["steps"] / record["steps_per_epoch"]
    return f"""---
{data.to_yaml()}
---

# {data.model_name}

A Whisper with {layers["encoder"]} encoder and {layers["decoder"]} decoder layers, distilled from {teacher} on \
{record["rows"]:,} clips of {args.train_dataset_name}: {record["steps"]:,} steps of \
{record["settings"]["global_batch_size"]} clips, {epochs:.2f} epochs.
The loss is {args.ce_weight} · CE + {args.kl_weight} · T² · KL(teacher ‖ student) at T = {args.temperature}.
Weights are float32.

![training curves](training_curves.png)
{evaluation}
## Settings

| setting | value |
| --- | --- |
{settings}

Made by `run_distillation.py`: `{RECORD}` has all arguments and library versions, `metrics.jsonl` every figure.
"""


def choose_start(output_dir: Path, args: argparse.Namespace, settings: dict, total: int) -> tuple[str | None, dict]:
    """The checkpoint to go on from, if any, and its state; "done" where the result of these settings is there already.

    What a run with other settings left there, or any run where --resume_from_checkpoint is False, is removed where
    --overwrite_output_dir allows that.
    """
    wish, path, found = args.resume_from_checkpoint, output_dir / RECORD, (None, {})
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    changed = differences(record["settings"], settings) if record else ""
    auto, afresh = wish.lower() in ("auto", "true"), wish.lower() in ("false", "none")
    if not auto and not afresh:
        manifest = read_checkpoint(Path(wish)) or fail(f"--resume_from_checkpoint {wish} is no whole checkpoint")
        if other := differences(manifest["settings"], settings):
            fail(f"--resume_from_checkpoint {wish} was made with other settings: {other}")
        found = (wish, manifest["state"])
        if Path(wish).resolve().parent == output_dir.resolve():
            return found
    elif record and not changed and auto:
        complete = record["status"] == "complete"
        if complete and record["steps"] >= total and (output_dir / "model.safetensors").exists():
            return "done", {}
        for _, directory in reversed(checkpoints(output_dir)):
            manifest = read_checkpoint(directory)
            if manifest and not differences(manifest["settings"], settings):
                return str(directory), manifest["state"]
        if not complete:
            return found
        changed = f"{record['steps']} steps of {total}, and no checkpoint to go on from"
    there = [output_dir / name for name in TRAINING_FILES if (output_dir / name).exists()]
    there += [directory for _, directory in checkpoints(output_dir)]
    names = ", ".join(path.name for path in there)
    if there and not args.overwrite_output_dir:
        why = f"another run ({changed})" if changed else f"earlier results ({names})"
        fail(f"{output_dir} holds {why}: pass --overwrite_output_dir to replace them, or choose another --output_dir")
    if there:
        logger.warning("replacing %s in %s%s", names, output_dir, f": {changed}" if changed else "")
    for path in there:
        remove_checkpoint(path) if path.is_dir() else path.unlink()
    return found


# ---- the world outside -----------------------------------------------------------------------------------------------


def default_hub_id(output_dir: Path) -> str:
    """The repository that the output directory is a clone of; else its own name, behind its parent's where that is the
    user or one of their organisations, and otherwise behind the user's."""
    command = ["git", "-C", str(output_dir), "config", "remote.origin.url"]
    remote = urlsplit(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    name = remote.path.strip("/").removesuffix(".git")
    if remote.hostname == urlsplit(constants.ENDPOINT).hostname and name.count("/") == 1:
        return name
    account, path = HfApi().whoami(), output_dir.resolve()
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", ()))]
    return f"{path.parent.name if path.parent.name in owners else owners[0]}/{path.name}"


class Publisher:
    """Pushes the model repository: in the background while training goes on, and once more, checked, at the end."""

    def __init__(self, args: argparse.Namespace, output_dir: Path):
        self.api, self.output_dir, self.push = HfApi(), output_dir, None
        try:
            self.repo_id = args.hub_model_id or default_hub_id(output_dir)
            self.api.create_repo(self.repo_id, private=args.hub_private_repo, exist_ok=True)
        except HUB_ERRORS as error:
            hub_fail("--push_to_hub: creating the repository", error)
        self.patterns = [*OWN_FILES, *SCRIPTS]
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
                logger.warning("a push to %s failed, training goes on: %s", self.repo_id, str(error).splitlines()[0])
            self.push = None
        return self.push is None

    def finish(self) -> None:
        """Push, and compare what is there with what is here."""
        try:
            self.upload("Distilled model", background=False)
            tree = self.api.list_repo_tree(self.repo_id, recursive=True)
            there = {entry.path: getattr(entry, "size", None) for entry in tree}
            paths = [self.output_dir / name for name in (*OWN_FILES, *SCRIPTS) if (self.output_dir / name).exists()]
            if missing := [path.name for path in paths if there.get(path.name) != path.stat().st_size]:
                raise RuntimeError(f"{', '.join(missing)} did not arrive whole")
        except HUB_ERRORS as error:
            reason = str(error).strip().splitlines()[0]
            fail(f"pushing to {self.repo_id} failed: {reason}; {self.output_dir} is whole: the same command pushes it")
        logger.info("pushed to %s/%s", constants.ENDPOINT, self.repo_id)


def start_tracker(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Start the tracker. Whatever is wrong with it gives one warning and never stops the training."""
    if args.report_to == "none" or not accelerator.is_main_process:
        return
    mode = os.environ.get("WANDB_MODE")
    try:
        if args.report_to == "wandb" and mode is None:
            import wandb  # only here: it need not be installed

            try:
                mode = None if wandb.login(prompt=False, timeout=20) else "not logged in (`wandb login`)"
            except Exception as error:
                mode = str(error).splitlines()[0]
            if mode:
                logger.warning("wandb: %s; its files stay in %s/wandb", mode, args.output_dir)
                mode = "offline"
        values = {
            name: value if isinstance(value, int | float | str) else str(value) for name, value in vars(args).items()
        }
        options = {"wandb": {"dir": args.output_dir, "name": args.wandb_name, "mode": mode}}
        accelerator.init_trackers(args.wandb_project, values, options)
        if not accelerator.trackers:
            raise ImportError("it is not installed")
    except Exception as error:
        accelerator.trackers = []
        logger.warning("--report_to %s: %s; metrics.jsonl has all figures", args.report_to, str(error).splitlines()[0])


class Stop:
    """SIGTERM and Ctrl-C: at once before training, at the end of the step during it, at once when it comes again."""

    def __init__(self):
        self.status, self.deferred = 0, False
        self.before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}

    def __call__(self, number: int, _frame) -> None:
        if self.status or not self.deferred:
            sys.exit(128 + number)
        self.status = 128 + number

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- one run ---------------------------------------------------------------------------------------------------------


class Distillation:
    """The processes, the models, the data, and where training stands."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.output_dir, self.started = args, Path(args.output_dir).expanduser(), time.time()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[args.dtype],
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=str(self.output_dir),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(days=30)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.stride = args.per_device_train_batch_size * self.accelerator.num_processes  # clips of a micro-step
        self.offset = args.per_device_train_batch_size * self.accelerator.process_index
        level = logging.INFO if self.is_main else logging.WARNING
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
        logging.getLogger("accelerate").setLevel(logging.WARNING)
        if not self.is_main:
            transformers.logging.disable_progress_bar()
        if self.device.type == "cpu":  # accelerate launch --cpu gives a process one thread
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", self.accelerator.num_processes))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
        self.publisher = (
            Publisher(args, self.output_dir) if args.push_to_hub and args.do_train and self.is_main else None
        )
        self.load_models()
        with self.accelerator.local_main_process_first():  # the others find the Arrow files in the cache
            sources = split_sources(args) if args.do_train else []
            self.train_rows = [Rows(source, self.processor, args) for source in sources]
            self.held_out = None
            if args.eval_dataset_name:
                source = (args.eval_dataset_name, args.eval_dataset_config_name, args.eval_split_name)
                self.held_out = Rows(source, self.processor, args, limit=args.eval_max_samples or sys.maxsize)

    def load_models(self) -> None:
        args, name = self.args, self.args.model_name_or_path
        try:
            self.processor = WhisperProcessor.from_pretrained(str(local_directory(name) or name))
        except (OSError, HFValidationError) as error:
            hub_fail(f"loading the tokenizer of {name}", error)
        if args.language and f"<|{args.language}|>" not in self.processor.tokenizer.get_vocab():
            fail(f"--language {args.language}: {name} has no token for that language")
        self.student = load_model(name, torch.float32, args.attn_type)
        teacher = load_model(args.teacher_model_name_or_path, getattr(torch, args.dtype), args.attn_type)
        for key in ("vocab_size", "num_mel_bins", "max_source_positions"):
            ours, theirs = getattr(self.student.config, key), getattr(teacher.config, key)
            if ours != theirs:
                fail(
                    f"{key} is {ours} in the student and {theirs} in the teacher: distil from the teacher it came from"
                )
        self.names = {"student": digest(self.student), "teacher": digest(teacher)}
        teacher.to(self.device)
        encoder = None
        if args.freeze_encoder:
            encoder = self.student.model.encoder.requires_grad_(False).eval()
            if equal_weights(encoder, teacher.model.encoder):
                encoder = teacher.model.encoder  # the student's own stays in main memory, to be saved as it is
            else:
                logger.warning("the student's frozen encoder is not the teacher's: both run")
                encoder.to(self.device)
        self.frozen = Frozen(teacher, encoder)
        if args.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        weights = (args.ce_weight, args.kl_weight, args.temperature)
        self.trained = self.model = Trained(self.student, args.freeze_encoder, weights)
        if args.torch_compile:
            for module in (teacher.model.encoder, teacher.model.decoder, self.trained.encoder, self.trained.decoder):
                if module is not None:
                    module.compile()

    def run(self, stop: Stop) -> int:
        """Train and publish, or only evaluate; the exit status."""
        args = self.args
        if not args.do_train:
            self.model = self.accelerator.prepare(self.trained)
            figures = self.evaluate(of_teacher=False)
            if self.is_main:
                print(json.dumps(figures, indent=2))
            return 0
        sizes, batch_size = [len(rows) for rows in self.train_rows], self.stride * args.gradient_accumulation_steps
        self.plan = Plan(sizes, sampling_weights(args), args.seed, batch_size)
        self.counts = np.concatenate([rows.counts for rows in self.train_rows])
        epochs = math.ceil(args.num_train_epochs * self.plan.steps_per_epoch)
        self.total = args.max_steps if args.max_steps > 0 else epochs
        self.settings = json.loads(json.dumps(self.run_settings()))
        start = [choose_start(self.output_dir, args, self.settings, self.total) if self.is_main else None]
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

    def run_settings(self) -> dict:
        """The settings that change the trained weights. A run goes on only where all of them are as they were."""
        names = (
            "train_dataset_samples max_label_length language task freeze_encoder dtype learning_rate lr_scheduler_type "
            "lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm ce_weight "
            "kl_weight temperature seed"
        )
        settings = {name: getattr(self.args, name) for name in names.split()}
        settings |= self.names | {"train_data": [rows.fingerprint for rows in self.train_rows]}
        settings |= {"global_batch_size": self.plan.batch_size}
        if not self.args.lr_scheduler_type.startswith("constant"):  # only then the rate depends on where the run ends
            settings["steps"] = self.total
        return settings

    def prepare(self, checkpoint: str | None) -> None:
        """Everything that trains, as it was."""
        args, accelerator = self.args, self.accelerator
        parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        optimizer = torch.optim.AdamW(
            groups, lr=args.learning_rate, fused=self.device.type in ("cpu", "cuda"), **options
        )
        self.scheduler = make_scheduler(args, optimizer, self.total)
        self.model, self.optimizer = accelerator.prepare(self.trained, optimizer)
        accelerator.register_for_checkpointing(self.scheduler)
        if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            # Names in a checkpoint do not tell how many processes wrote it.
            def unwrap_weights(_models, weights, _directory):
                weights[:] = [{name.removeprefix("module."): value for name, value in each.items()} for each in weights]

            def unwrap_models(models, _directory):
                models[:] = map(accelerator.unwrap_model, models)

            accelerator.register_save_state_pre_hook(unwrap_weights)
            accelerator.register_load_state_pre_hook(unwrap_models)
        if checkpoint:
            accelerator.load_state(checkpoint)
            accelerator.step = 0  # of accumulation, which starts anew and may have changed
            logger.info("going on from step %d of %d (%s)", self.state["step"], self.total, Path(checkpoint).name)
        self.record = {
            "status": "running",
            "settings": self.settings,
            "rows": sum(self.plan.sizes),
            "rows_left_out": {rows.name: len(rows.left_out) for rows in self.train_rows},
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
        if args.cache_encoder_outputs:
            for rows in self.train_rows:
                rows.cache = self.fill_cache(rows, Path(args.cache_encoder_outputs).expanduser())
        sizes = (sum(self.plan.sizes), self.total, self.plan.steps_per_epoch, self.plan.batch_size)
        trained = sum(parameter.numel() for parameter in parameters) / 1e6
        logger.info("%d clips; %d steps, %d an epoch, of %d clips; %.1f M trained weights, in float32", *sizes, trained)
        start_tracker(accelerator, args)

    def fill_cache(self, rows: Rows, directory: Path) -> Cache:
        """Encode what no earlier run has encoded; each process takes blocks of its own."""
        directory.mkdir(parents=True, exist_ok=True)
        teacher, encoder, process = self.frozen.teacher, self.frozen.encoder, self.accelerator.process_index
        key = [digest(encoder), self.names["teacher"], rows.fingerprint, self.args.dtype]
        key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        widths = (encoder.config.d_model, teacher.config.d_model)
        cache = Cache(directory, key, rows.counts, teacher.config.max_source_positions, widths, teacher.dtype)
        needed, free = cache.bytes_needed() / 1e9, shutil.disk_usage(directory).free / 1e9
        logger.info("encoder cache of %s: %.2f GB to write, %.2f GB free in %s", rows.name, needed, free, directory)
        if needed > free:
            fail(f"--cache_encoder_outputs needs {needed:.1f} GB for {rows.name}; {directory} has {free:.1f} GB free")
        self.accelerator.wait_for_everyone()  # nobody writes before all have looked
        blocks = np.flatnonzero(cache.open()["done"] == 0)
        blocks = blocks[blocks % self.accelerator.num_processes == process]
        batches = [range(block * CACHE_BLOCK, min(len(rows), (block + 1) * CACHE_BLOCK)) for block in blocks]
        loader = make_loader(rows, batches, self.args.dataloader_num_workers if batches else 0, pin=False)
        bar = tqdm(blocks, "encoding", unit="block", disable=not (self.is_main and len(blocks)))
        for block, batch in zip(bar, loader, strict=True):
            with self.accelerator.autocast():
                cache.write(block, *self.frozen(self.to_device(batch)))
        self.accelerator.wait_for_everyone()
        cache.maps = None  # mapped again by those who read, so that they see what other machines wrote
        return cache

    def to_device(self, batch: dict) -> dict:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def train(self, stop: Stop) -> int:
        """From where training stands to its end; 0, or the exit status where a signal ended it early."""
        args, state, plan = self.args, self.state, self.plan
        batches = plan.micro_batches(
            state["step"], self.total, args.per_device_train_batch_size, self.stride, self.offset
        )
        rows = torch.utils.data.ConcatDataset(self.train_rows)
        batches = iter(make_loader(rows, batches, args.dataloader_num_workers, pin=self.device.type == "cuda"))
        bar = tqdm(total=self.total, initial=state["step"], desc="training", unit="step", disable=not self.is_main)
        self.model.train()
        if state["step"] == 0:
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
        if state["step"] == self.total:
            return 0
        logger.warning("stopped at step %d of %d, which is saved: the same command goes on", state["step"], self.total)
        return stop.status or 128 + signal.SIGTERM

    def optimiser_step(self, batches: Iterator[dict], stop: Stop) -> tuple[float, float, int, float, bool]:
        """One step: the sums of cross-entropy and KL, the tokens, the gradient's norm, whether a signal has come."""
        args, accelerator, step = self.args, self.accelerator, self.state["step"]
        rows, head = self.plan.rows(step), self.frozen.teacher.proj_out.weight
        tokens = int(self.counts[rows].sum())
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # cross-entropy, KL, processes with a signal
        scale = accelerator.num_processes * args.gradient_accumulation_steps / tokens
        for start in range(self.offset, self.plan.batch_size, self.stride):
            batch, counted = self.to_device(next(batches)), start < len(rows)
            # Dropout is a function of the place in the data: there is no random state to keep.
            torch.manual_seed(int(np.random.SeedSequence([args.seed, step, start]).generate_state(1)[0]))
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    inputs, teacher_hidden = self.frozen(batch)
                loss, ce, kl = self.model(inputs, teacher_hidden, head, batch)
                # DDP takes the mean over processes and accelerate over micro-batches; ours is the one over tokens.
                accelerator.backward(loss * (counted * scale))
                sums[:2] += counted * torch.stack([ce, kl])
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
            self.state["teacher"] = figures = self.evaluate(of_teacher=True)
            logger.info(what, "teacher", figures["cer"], figures["wer"], figures["loss"])
        figures = self.evaluate(of_teacher=False)
        logger.info(what, f"step {step}", figures["cer"], figures["wer"], figures["loss"])
        self.log(step, {f"eval_{name}": value for name, value in figures.items()})
        if self.args.lr_scheduler_type in LED_BY_LOSS:
            self.scheduler.step(figures["loss"])
        figure, best = figures[self.args.metric_for_best_model], self.state["best"]
        if step == 0 or (best and figure >= best["figure"]):
            return False
        self.state["best"] = {"step": step, "figure": figure}
        return True

    @torch.no_grad()
    def evaluate(self, of_teacher: bool) -> dict[str, float]:
        """Loss per token, and WER and CER of greedy decoding in per cent, of the held-out rows."""
        args, teacher, tokenizer, rows = self.args, self.frozen.teacher, self.processor.tokenizer, self.held_out
        normalise = BasicTextNormalizer()
        totals = np.zeros(7)  # cross-entropy, KL, tokens, errors in words, words, errors in characters, characters
        size = args.per_device_eval_batch_size or args.per_device_train_batch_size
        model = teacher if of_teacher else self.student
        encoder = teacher.model.encoder if of_teacher else self.frozen.encoder or self.student.model.encoder
        starts = range(self.accelerator.process_index * size, len(rows), self.accelerator.num_processes * size)
        self.model.eval()
        for start in tqdm(starts, "evaluating", leave=False, disable=not self.is_main):
            indices = range(start, min(start + size, len(rows)))
            batch = self.to_device(collate([rows[index] for index in indices]))
            with self.accelerator.autocast():
                inputs, hidden = self.frozen(batch)
                head, targets = teacher.proj_out.weight, batch["targets"]
                if of_teacher:
                    _, ce, kl = DistillationLoss.apply(hidden, head, hidden, head, targets, 1.0, 0.0, 1.0, False)
                else:
                    _, ce, kl = self.model(inputs, hidden, head, batch)
                if encoder is not self.frozen.encoder:
                    inputs = encoder(batch["features"].to(encoder.conv1.weight.dtype)).last_hidden_state
                own, model.model.encoder = model.model.encoder, encoder  # generate looks there for the device
                sequences = model.generate(
                    encoder_outputs=BaseModelOutput(last_hidden_state=inputs),
                    generation_config=generation_config(model, args, args.max_label_length),
                    force_unique_generate_call=True,
                )
                model.model.encoder = own
            hypotheses = map(normalise, tokenizer.batch_decode(sequences, skip_special_tokens=True))
            references = (normalise(rows.reference(index, tokenizer)) for index in indices)
            pairs = [pair for pair in zip(references, hypotheses, strict=True) if pair[0].strip()]
            totals[:3] += float(ce), float(kl), len(targets)
            if pairs:
                totals[3:5] += count_errors(jiwer.process_words(*map(list, zip(*pairs, strict=True))))
                if args.language in UNSPACED:
                    pairs = [[text.replace(" ", "") for text in pair] for pair in pairs]
                totals[5:] += count_errors(jiwer.process_characters(*map(list, zip(*pairs, strict=True))))
        self.model.train()
        ce, kl, tokens, *errors = self.accelerator.reduce(torch.tensor(totals, device=self.device)).tolist()
        figures = {"loss": (args.ce_weight * ce + args.kl_weight * kl) / tokens, "ce": ce / tokens, "kl": kl / tokens}
        return figures | {name: 100 * errors[i] / max(1, errors[i + 1]) for name, i in (("wer", 0), ("cer", 2))}

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
        if self.is_main:
            weights = {
                name if name.startswith("proj_out") else f"model.{name}": value for name, value in weights.items()
            }
            if self.args.freeze_encoder:
                encoder = self.student.model.encoder.state_dict()
                weights |= {f"model.encoder.{name}": value for name, value in encoder.items()}
            partial = self.output_dir / ".model.partial"
            shutil.rmtree(partial, ignore_errors=True)
            longest = self.student.config.max_target_positions
            self.student.generation_config = generation_config(self.student, self.args, longest)
            self.student.save_pretrained(
                partial, state_dict={name: value.float().cpu() for name, value in weights.items()}
            )
            save_tokenizer_files(self.processor, partial)
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
        if self.args.load_best_model_at_end and best and best["step"] != self.total:
            path = next(path for step, path in checkpoints(self.output_dir) if step == best["step"])
            self.accelerator.load_state(str(path))
            logger.info("the result is the best checkpoint, %s", path.name)
        while self.publisher and not self.publisher.idle():
            time.sleep(0.1)
        done = {"status": "complete", "steps": self.total, "best": best, "teacher_evaluation": self.state["teacher"]}
        self.write_result(self.record | done | {"seconds": round(time.time() - self.started, 1)})
        logger.info("the trained model is in %s", self.output_dir.resolve())


def make_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, total: int):
    options = {"num_warmup_steps": args.warmup_steps, "num_training_steps": total}
    extra = args.lr_scheduler_kwargs
    return get_scheduler(args.lr_scheduler_type, optimizer, scheduler_specific_kwargs=extra, **options)


def generation_config(model: WhisperForConditionalGeneration, args, max_length: int) -> GenerationConfig:
    """Greedy, in the language and the task trained for."""
    values = {"forced_decoder_ids": None, "return_timestamps": False, "num_beams": 1, "do_sample": False}
    values |= {"language": args.language, "task": args.task} if args.language else {}
    values |= {"max_length": max_length}
    return GenerationConfig.from_dict(model.generation_config.to_dict() | values)


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
    return list(zip(*columns, strict=True))


def sampling_weights(args: argparse.Namespace) -> list[float] | None:
    if not args.train_dataset_samples:
        return None
    try:
        weights = [float(part) for part in args.train_dataset_samples.split("+")]
    except ValueError:
        weights = []
    if len(weights) != len(args.train_dataset_name.split("+")) or min(weights) <= 0:
        fail(f"--train_dataset_samples {args.train_dataset_samples} must be one positive number for each dataset")
    return weights


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
    add("--train_dataset_samples", help="their sampling weights joined by +; without them every row once an epoch")
    add("--audio_column_name", default="audio", help="column with audio, where input_features is none")
    add("--text_column_name", help="column with the reference of held-out rows (text, transcription, else the label)")
    add("--language", help="language of the labels, such as ja")
    add("--task", choices=["transcribe", "translate"], default="transcribe", help="task of the labels")
    add("--max_label_length", **count, default=128, help="tokens of the longest label; longer ones are left out")
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
    add("--per_device_eval_batch_size", **count, help="clips a process and batch (as for training)")
    add("--metric_for_best_model", choices=["loss", "cer", "wer"], default="cer", help="figure of the best checkpoint")
    add("--load_best_model_at_end", **switch, help="the best checkpoint as the result rather than the last")
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
    add("--hub_model_id", help="repository to push to (that of the clone, or named as --output_dir)")
    add("--hub_private_repo", **switch, help="a private repository, where it has to be made")
    args = parser.parse_args(argv)
    sizes = "per_device_train_batch_size gradient_accumulation_steps save_steps logging_steps eval_steps"
    for name in sizes.split():
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.language:
        args.language = TO_LANGUAGE_CODE.get(args.language.lower(), args.language.lower())
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.do_train and not args.eval_dataset_name:
        fail("nothing to do: --do_train trains, --eval_dataset_name alone evaluates the student as it is")
    if args.do_train and not args.train_dataset_name:
        fail("--do_train needs --train_dataset_name")
    if args.cache_encoder_outputs and not args.freeze_encoder:
        fail("--cache_encoder_outputs needs --freeze_encoder: the outputs of an encoder in training change")
    if args.lr_scheduler_type in LED_BY_LOSS and not args.eval_dataset_name:
        fail(f"--lr_scheduler_type {args.lr_scheduler_type} follows the held-out loss: it needs --eval_dataset_name")
    if args.dtype == "float16" and not torch.cuda.is_available():
        fail("--dtype float16 needs a GPU: use bfloat16 or float32")
    if Path(args.output_dir).resolve() == Path(args.model_name_or_path).resolve():
        fail(f"--output_dir {args.output_dir} is the student to start from: choose another")
    stop = Stop()
    try:
        return Distillation(args).run(stop)
    finally:
        stop.restore()


if __name__ == "__main__":
    sys.exit(main())
