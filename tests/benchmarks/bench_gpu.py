"""Acceptance on one GPU: speed against a plain way of doing the same and against the encoder alone, and equal results.

    make bench-gpu                                                  # at most 8 minutes on one H100
    make bench-gpu BENCH_ARGS="--sections device,encoder,labels"
    make bench-gpu BENCH_ARGS=--tiny                                # the same code with small shapes, also on a CPU

It needs no network and no weights. The scripts' own `main` runs on a random Whisper of large-v3's shape and on made-up
clips with ReazonSpeech's lengths. Each section is a process of its own with a time limit: one that fails or hangs is
named in the table, and the next begins.

Random weights never end a text. So here each text ends after as many tokens as its clip would have: 4.55 a second with
a spread of 25 %, and one clip in 500 runs to the limit, as a looping label does. Both sides get the same lengths. Where
labels are compared, the tests' tiny teacher labels, which ends its texts by itself.
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from transformers import (
    LogitsProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput

import create_student_model as creation
import run_distillation as distillation
import run_pseudo_labelling as labelling
import run_short_form_eval as evaluation
from tests.benchmarks.bench_distillation import plain_loss
from tests.sandbox import teachers

SECTIONS = {  # seconds that each may take
    "device": 60,
    "encoder": 60,
    "labels": 150,
    "training": 180,
    "evaluation": 120,
    "exact": 90,
    "resume": 120,
    "memory": 60,
    "variants": 120,
}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
NAME = str(DTYPE).removeprefix("torch.")
VOCABULARY = 51866
PREFIX = ["<|startoftranscript|>", "<|ja|>", "<|transcribe|>"]


def sizes(tiny: bool) -> argparse.Namespace:
    """Shapes and amounts."""
    if tiny:
        shape = {"width": 64, "layers": 2, "heads": 2, "mels": 80}
        amounts = {"clips": 8, "shard": 4, "plain": 4, "plain_batch": 2, "batches": [2], "train": 2, "steps": 4}
        return argparse.Namespace(**shape, **amounts, seconds=3.0, limit=16)
    shape = {"width": 1280, "layers": 32, "heads": 20, "mels": 128}
    amounts = {"clips": 2000, "shard": 1000, "plain": 64, "plain_batch": 16, "train": 16, "steps": 24}
    return argparse.Namespace(**shape, **amounts, batches=[None], seconds=5.8, limit=128)


@dataclasses.dataclass
class World:
    """Where a section finds its files, and what it found out before."""

    root: Path
    size: argparse.Namespace

    def tell(self, what: str, value: float | str, unit: str = "", note: str = "") -> None:
        """Add a row to the table."""
        with open(self.root / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "value": value, "unit": unit, "note": note}) + "\n")

    def encoder_rate(self) -> float:
        """Windows a second of the encoder alone, if that has been measured."""
        path = self.root / "encoder"
        return float(path.read_text()) if path.exists() else math.nan

    def of_encoder(self, rate: float) -> str:
        return f"{rate / self.encoder_rate():.2f} of the encoder alone"


# ---- models and clips ------------------------------------------------------------------------------------------------


def make_models(world: World) -> None:
    """A directory like large-v3's with random weights, and its student of two decoder layers."""
    size, root = world.size, world.root / "teacher"
    root.mkdir()
    alphabet = sorted(teachers.pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"word{number}" for number in range(50257 - len(alphabet)))]
    tokenizer = teachers.Tokenizer(teachers.models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = teachers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = teachers.decoders.ByteLevel()
    special = teachers.special_tokens("large-v3")
    tokenizer.add_special_tokens([teachers.AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([teachers.AddedToken(f"<|{i * 0.02:.2f}|>", special=False) for i in range(1501)])
    fast = teachers.save_tokenizer(tokenizer, root, "large-v3")
    end, start = fast.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    layers = {f"{side}_layers": size.layers for side in ("encoder", "decoder")}
    heads = {f"{side}_attention_heads": size.heads for side in ("encoder", "decoder")}
    widths = {f"{side}_ffn_dim": 4 * size.width for side in ("encoder", "decoder")}
    ends = {f"{name}_token_id": end for name in ("bos", "eos", "pad")}
    config = WhisperConfig(
        d_model=size.width,
        num_mel_bins=size.mels,
        vocab_size=VOCABULARY,
        decoder_start_token_id=start,
        **layers,
        **heads,
        **widths,
        **ends,
    )
    torch.manual_seed(0)
    with DEVICE:
        model = WhisperForConditionalGeneration(config).to(DTYPE)
    model.generation_config = teachers.generation_config(fast, "large-v3")
    model.generation_config.alignment_heads = None
    model.save_pretrained(root)
    WhisperFeatureExtractor(feature_size=size.mels).save_pretrained(root)
    del model
    student = ["--teacher_checkpoint", str(root), "--decoder_layers", "2", "--save_dir", str(world.root / "student")]
    assert creation.main(student) == 0


@functools.cache
def make_waveforms(number: int, mean_seconds: float) -> list[np.ndarray]:
    """Syllables of a moving tone in noise. Lengths are spread as ReazonSpeech's, and tell clips from each other."""
    rng = np.random.default_rng(0)
    waveforms = []
    for index, seconds in enumerate(np.clip(rng.gamma(2.6, mean_seconds / 2.6, number), 0.6, 29.0)):
        times = np.arange(int(seconds * 16000) + index, dtype=np.float32) / 16000
        tone = np.sin(2 * np.pi * (150 + 50 * rng.random()) * times) * np.sin(2 * np.pi * 4.5 * times)
        waveforms.append((0.2 * tone + 0.01 * rng.standard_normal(len(times))).astype(np.float32))
    return waveforms


def encode_flac(waveform: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, 16000, format="FLAC")
    return file.getvalue()


def make_dataset(world: World) -> None:
    """The clips as FLAC in a local dataset directory."""
    with ThreadPoolExecutor() as pool:
        files = list(pool.map(encode_flac, make_waveforms(world.size.clips, world.size.seconds)))
    rows = []
    for number, file in enumerate(files):
        rows.append({"audio": {"bytes": file, "path": f"{number}.flac"}, "text": "音声"})
    features = datasets.Features({"audio": datasets.Audio(sampling_rate=16000), "text": datasets.Value("string")})
    directory = world.root / "speech" / "default"
    directory.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), directory / "train-00000-of-00001.parquet")


# ---- texts that end --------------------------------------------------------------------------------------------------


def text_length(samples: int, limit: int) -> int:
    """Tokens of a clip's text, its end included."""
    rng = np.random.default_rng(samples)
    if rng.random() < 0.002:
        return limit
    tokens = 4.55 * samples / 16000 * math.exp(rng.normal(0, 0.25)) + 3  # two timestamps and the end
    return int(np.clip(round(tokens), 3, limit))


def end_texts(script, limit: int) -> None:
    """From now on a script's greedy decoder ends every text where its clip's ends."""

    class Ending(script.GreedyDecoder):
        """The lengths of the texts are in a further entry of `keys_values`, so they go where their clips go."""

        def encode_group(self, waveforms: list[np.ndarray]) -> BaseModelOutput:
            states = super().encode_group(waveforms)
            states.lengths = [text_length(len(waveform), limit) for waveform in waveforms]
            return states

        def fill(self, states, targets: list[int]) -> None:
            known = self.slots.keys_values.pop() if self.slots else None
            super().fill(states, targets)
            known = known or (torch.zeros(self.batch_size, dtype=torch.long, device=DEVICE),)
            # The position of the last token but the end. The host does not wait for a GPU here.
            lengths = torch.tensor(states.lengths).to(DEVICE, non_blocking=True) + len(self.prompt) - 1
            known[0][torch.tensor(targets).to(DEVICE, non_blocking=True)] = lengths
            self.slots.keys_values.append(known)

        def next_logits(self, slots, token: torch.Tensor) -> torch.Tensor:
            *layers, (lengths,) = slots.keys_values
            logits = super().next_logits(dataclasses.replace(slots, keys_values=layers), token)
            logits[:, self.end].fill_(-math.inf)
            logits[:, self.end].masked_fill_(slots.position >= lengths - 1, 1e4)
            return logits

    script.GreedyDecoder = Ending


class EndAt(LogitsProcessor):
    """The same for `generate`: ends each row where its text ends, and not before."""

    def __init__(self, end: int, waveforms: list[np.ndarray], prefix: int, limit: int):
        self.end = end
        lengths = [text_length(len(waveform), limit) + prefix - 1 for waveform in waveforms]
        self.lengths = torch.tensor(lengths, device=DEVICE)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.end] = -math.inf
        scores[:, self.end].masked_fill_(self.lengths <= input_ids.shape[1], 1e4)
        return scores


# ---- measuring -------------------------------------------------------------------------------------------------------


def forget_processes() -> None:
    """accelerate keeps its first settings for the life of a process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(script, *flags) -> None:
    """A script's command in this process; it must succeed."""
    forget_processes()
    status = script.main([str(flag) for flag in flags])
    assert status == 0, status


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds of some work, the device's included, after it has been done once."""
    work()
    taken = []
    for _ in range(repeats):
        synchronise()
        began = time.perf_counter()
        work()
        synchronise()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def peak_memory() -> str:
    """The most memory since the last call."""
    if not CUDA:
        return "no GPU"
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return f"{peak:.1f} GB"


def load_model(directory: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(directory, dtype=DTYPE).to(DEVICE).eval()


# ---- sections --------------------------------------------------------------------------------------------------------


def section_device(world: World) -> None:
    """What there is, and the files for the other sections."""
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, {len(os.sched_getaffinity(0))} cores"
    )
    world.tell("device", torch.cuda.get_device_name() if CUDA else "CPU", note=versions)
    make_models(world)
    make_dataset(world)


def section_encoder(world: World) -> None:
    """The encoder alone, which bounds labelling, evaluation and training on clips."""
    teacher = world.root / "teacher"
    ours = labelling.load_teacher(labelling.parse_args(list(map(str, label_flags(world, teacher, teacher)))), DEVICE)
    encoders = {"transformers' encoder": load_model(teacher), "the encoder alone": ours.model}
    for name, model in encoders.items():
        rates = []
        for batch in (2,) if world.size.clips < 100 else (16, 128):
            features = torch.randn(batch, world.size.mels, 3000, device=DEVICE, dtype=DTYPE)
            with torch.inference_mode():
                seconds = seconds_of(lambda features=features, model=model: model.model.encoder(features))
            rates.append(batch / seconds)
            world.tell(f"{name}, batches of {batch}", rates[-1], "windows/s", peak_memory())
    (world.root / "encoder").write_text(str(max(rates)))


def plain_labels(world: World, batch: int) -> float:
    """Clips a second of `generate` on log-mels that are padded on the CPU, in the dataset's order."""
    size = world.size
    model = load_model(world.root / "teacher")
    extractor = WhisperFeatureExtractor.from_pretrained(world.root / "teacher")
    waveforms = make_waveforms(size.clips, size.seconds)[: size.plain]
    options = {"language": "ja", "task": "transcribe", "return_timestamps": True, "max_new_tokens": size.limit - 3}

    def label() -> None:
        for start in range(0, len(waveforms), batch):
            clips = waveforms[start : start + batch]
            features = extractor(clips, sampling_rate=16000, return_tensors="pt").input_features.to(DEVICE, DTYPE)
            ends = EndAt(model.generation_config.eos_token_id, clips, 3, size.limit - 3)
            with torch.inference_mode():
                model.generate(features, logits_processor=[ends], force_unique_generate_call=True, **options)

    return len(waveforms) / seconds_of(label, 1)


def label_flags(world: World, teacher: Path, output: Path) -> list:
    return [
        *("--model_name_or_path", teacher, "--dataset_name", world.root / "speech", "--output_dir", output),
        *("--language", "ja", "--return_timestamps", "--report_to", "none", "--overwrite_output_dir", "--dtype", NAME),
    ]


def steady_rate(shards: list[Path]) -> float:
    """Rows a second from the end of the first shard to that of the last one; of one shard alone it is not a number."""
    ends = [path.stat().st_mtime for path in shards]
    rows = [pq.read_metadata(path).num_rows for path in shards]
    return sum(rows[1:]) / (ends[-1] - ends[0]) if len(shards) > 1 else math.nan


def section_labels(world: World) -> None:
    """Labelling from stored audio to shards on the disk."""
    size = world.size
    end_texts(labelling, size.limit - 3)
    output = world.root / "labelled"
    plain = plain_labels(world, size.plain_batch)
    world.tell(f"plain labelling, batches of {size.plain_batch}", plain, "clips/s", peak_memory())
    for batch in size.batches:
        shutil.rmtree(output, ignore_errors=True)
        flags = ["--max_label_length", size.limit, "--dataloader_num_workers", 8, "--shard_size", size.shard]
        flags += ["--per_device_eval_batch_size", batch, "--max_samples", 2 * size.shard] if batch else []
        run(labelling, *label_flags(world, world.root / "teacher", output), *flags)
        record = json.loads((output / "labelling.default.train.json").read_text())
        assert batch or record["rows_out"] == size.clips, record
        rate = steady_rate(sorted((output / "default").glob("*.parquet")))
        with_start = record["last_run"]["clips_per_second"]
        notes = [f"{rate / plain:.1f} x the plain way", world.of_encoder(rate), f"{with_start:.3g} with the start"]
        notes += [f"{record['tokens'] / record['rows_out']:.1f} tokens", peak_memory()]
        world.tell(f"labelling, batches of {batch or 'what fits'}", rate, "clips/s", "; ".join(notes))


def section_evaluation(world: World) -> None:
    """Evaluation of the student."""
    end_texts(evaluation, world.size.limit - 4)
    output = world.root / "evaluated"
    run(
        evaluation,
        *("--model_name_or_path", world.root / "student", "--dataset_name", world.root / "speech", "--dtype", NAME),
        *("--dataset_split_name", "train", "--output_dir", output, "--generation_max_length", world.size.limit - 4),
        *("--dataloader_num_workers", 8),
    )
    metrics = json.loads((output / "metric.train.json").read_text())
    rate = metrics["rtfx"] * metrics["clips"] / metrics["audio_seconds"]  # without the first batch of a run
    note = f"{world.of_encoder(rate)}; {metrics['clips_per_second']:.3g} with the start; {peak_memory()}"
    world.tell("evaluation of the student", rate, "clips/s", note)


def tiny_labels(teacher: Path, waveforms: list[np.ndarray], device: torch.device, *flags) -> list[list[int]]:
    """The labels of the script, in batches of 8."""
    given = ["--model_name_or_path", teacher, "--dataset_name", "none", "--output_dir", "none", "--language", "ja"]
    given += ["--max_label_length", 96, "--per_device_eval_batch_size", 8, *flags]
    loaded = labelling.load_teacher(labelling.parse_args([str(flag) for flag in given]), device)
    return [label.ids for _, label in sorted(labelling.label_clips(loaded, waveforms), key=lambda pair: pair[0])]


def generated_labels(teacher: Path, waveforms: list[np.ndarray], dtype: str, timestamps: bool) -> list[list[int]]:
    """What `generate` gives for each clip alone, on this device."""
    precision = getattr(torch, dtype)
    model = WhisperForConditionalGeneration.from_pretrained(teacher, dtype=precision).to(DEVICE).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(teacher)
    end = model.generation_config.eos_token_id
    prefix = 3 if timestamps else 4
    options = {"language": "ja", "task": "transcribe", "return_timestamps": timestamps, "max_new_tokens": 96 - prefix}
    found = []
    for waveform in waveforms:
        features = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_features.to(DEVICE, precision)
        with torch.inference_mode():
            sequence = model.generate(features, force_unique_generate_call=True, **options)[0].tolist()
        found.append(labelling.finish_label(sequence, prefix, end).ids)
    return found


def section_exact(world: World) -> None:
    """Labels against `generate` for each clip alone, and against the CPU; all must be equal in float32."""
    teacher = teachers.tiny_whisper(world.root / "tiny-teacher")
    waveforms = make_waveforms(4 if world.size.clips < 100 else 16, 4.0)
    for timestamps in (True, False):
        flags = ("--return_timestamps", timestamps, "--dtype")
        for dtype in ("float32", "bfloat16", "float16") if CUDA else ("float32",):
            expected = generated_labels(teacher, waveforms, dtype, timestamps)
            found = tiny_labels(teacher, waveforms, DEVICE, *flags, dtype)
            equal = sum(map(list.__eq__, found, expected))
            what = f"labels as of generate, {dtype}, timestamps {timestamps}"
            world.tell(what, f"{equal} of {len(waveforms)}", note="" if dtype == "float32" else "near-ties apart")
            assert dtype != "float32" or found == expected, what
        first, again = (tiny_labels(teacher, waveforms, DEVICE, *flags, NAME) for _ in range(2))
        equal = sum(map(list.__eq__, first, again))
        world.tell(f"labels made twice, {NAME}, timestamps {timestamps}", f"{equal} of {len(waveforms)}")
        assert first == again, "labels made twice"
        on_cpu = tiny_labels(teacher, waveforms, torch.device("cpu"), *flags, "float32")
        found = tiny_labels(teacher, waveforms, DEVICE, *flags, "float32")
        world.tell(f"labels as of a CPU, float32, timestamps {timestamps}", f"{sum(map(list.__eq__, found, on_cpu))}")


def section_memory(world: World) -> None:
    """Labelling where memory ends: batches are halved, and every clip has its label."""
    end_texts(labelling, world.size.limit - 3)
    warnings = []
    handler = labelling.logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    labelling.logger.addHandler(handler)
    if CUDA:
        room = 12e9 / torch.cuda.mem_get_info()[1]  # 3 GB of weights, and 0.25 GB a clip
        torch.cuda.set_per_process_memory_fraction(room)
    output = world.root / "labelled-small"
    flags = ["--max_samples", min(192, world.size.clips), "--per_device_eval_batch_size", 64]
    run(labelling, *label_flags(world, world.root / "teacher", output), *flags)
    record = json.loads((output / "labelling.default.train.json").read_text())
    halvings = sum("out of memory" in warning for warning in warnings)
    rows = f"of {record['rows_in']}"
    world.tell("labels in 12 GB, batches of 64 asked", record["rows_out"], rows, f"{halvings} halvings")


def training_data(directory: Path, teacher: Path, mels: int, rows: int, packed: bool) -> Path:
    """`.vectorized` rows: clips that a filter left (4.3 s, 19 tokens), or windows packed full."""
    rng = np.random.default_rng(0)
    tokenizer = WhisperTokenizerFast.from_pretrained(teacher)
    prefix = tokenizer.convert_tokens_to_ids([*PREFIX, "<|notimestamps|>"])
    table = []
    for _ in range(rows):
        tokens = int(rng.integers(200, 260)) if packed else int(np.clip(rng.gamma(2.5, 5.9), 1, 120))
        seconds = float(rng.uniform(26, 29.9)) if packed else float(np.clip(rng.gamma(4.0, 1.08), 0.5, 29.0))
        frames = labelling.filled_frames(int(seconds * 16000))
        features = rng.standard_normal((frames, mels), np.float32).astype("<f2")
        labels = [*prefix, *rng.integers(300, 500, tokens).tolist(), tokenizer.eos_token_id]
        table.append({"input_features": features.tobytes(), "labels": labels})
    schema = pa.schema([("input_features", pa.binary()), ("labels", pa.list_(pa.int32()))])
    (directory / "default").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(table, schema), directory / "default" / "train-00000-of-00001.parquet")
    return directory


def training_rate(entries: list[dict]) -> float:
    """Samples a second, by the entries of metrics.jsonl, one a step: the median, as some first steps are slow."""
    return statistics.median(entry["samples_per_second"] for entry in entries if "samples_per_second" in entry)


def train(student: Path, teacher: Path, data: Path, output: Path, *flags) -> None:
    given = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--train_dataset_name", data]
    given += ["--do_train", "--freeze_encoder", "--language", "ja", "--report_to", "none", "--output_dir", output]
    run(distillation, *given, "--logging_steps", 1, "--save_steps", 100_000, *flags)


def measure_training(world: World, kind: str, *more) -> tuple[float, float]:
    """Samples a second of the script on `clips` or `windows`, loading included, and the loss of the last step."""
    size = world.size
    data = world.root / kind
    if not data.exists():
        rows = size.train * size.steps // 2
        training_data(data, world.root / "teacher", size.mels, rows, kind == "windows")
    output = world.root / f"trained-{kind}"
    flags = ["--max_label_length", 448, "--max_steps", size.steps, "--dtype", NAME, "--warmup_steps", 0]
    flags += ["--per_device_train_batch_size", size.train, *more]
    train(world.root / "student", world.root / "teacher", data, output, *flags)
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(output)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    return training_rate(entries), losses[-1]


def plain_training(world: World) -> float:
    """Clips a second of a step as the recipe was first run: padded labels, float32 logits for all, under autocast."""
    size = world.size
    teacher = load_model(world.root / "teacher")
    student = load_model(world.root / "student").float().train()
    student.model.encoder.requires_grad_(False)
    optimiser = torch.optim.AdamW([weight for weight in student.parameters() if weight.requires_grad], lr=1e-4)
    features = torch.randn(size.train, size.mels, 3000, device=DEVICE, dtype=DTYPE)
    labels = torch.randint(300, 500, (size.train, 128), device=DEVICE)
    labels[:, 23:] = -100  # 19 tokens of text, the prompt and the end

    def step() -> None:
        inputs = torch.where(labels == -100, teacher.config.pad_token_id, labels)
        with torch.autocast(DEVICE.type, DTYPE, enabled=CUDA):
            with torch.no_grad():
                states = teacher.model.encoder(features)  # the student's are the same
                expected = teacher(encoder_outputs=states, decoder_input_ids=inputs).logits.float()
            logits = student(encoder_outputs=states, decoder_input_ids=inputs).logits.float()
        plain_loss(logits, expected, labels).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return size.train / seconds_of(step)


def section_training(world: World) -> None:
    """Steps of the script on clips and on packed windows, beside a plain step on clips that are in the memory."""
    batch = world.size.train
    rates = {}
    for kind in ("clips", "windows"):
        rates[kind], _ = measure_training(world, kind)
        note = f"{world.of_encoder(rates[kind])}; {peak_memory()}"
        world.tell(f"training on {kind}, {batch} a step", rates[kind], f"{kind}/s", note)
    plain = plain_training(world)
    note = f"ours is {rates['clips'] / plain:.2f} x; {peak_memory()}"
    world.tell(f"plain training, {batch} a step", plain, "clips/s", note)


def section_variants(world: World) -> None:
    """Training on windows with what saves memory or time: the loss must stay, up to the precision."""
    _, expected = measure_training(world, "windows")
    plain_memory = peak_memory()
    for flag in ("--gradient_checkpointing", "--torch_compile"):
        if flag == "--torch_compile" and not CUDA:
            continue  # minutes on a CPU
        rate, loss = measure_training(world, "windows", flag)
        note = f"loss {loss:.4f} against {expected:.4f}; {peak_memory()} against {plain_memory}"
        world.tell(f"training on windows, {flag}", rate, "windows/s", note)
        assert math.isclose(loss, expected, rel_tol=1e-2 if CUDA else 1e-4), flag


def largest_difference(first: Path, other: Path) -> float:
    """The largest difference of a weight between two trained models."""
    weights, others = (load_file(path / "model.safetensors") for path in (first, other))
    return max(float((weights[name].float() - others[name].float()).abs().max()) for name in weights)


def section_resume(world: World) -> None:
    """Three steps and three more against six, which must differ by no more than two runs of six do."""
    teacher = teachers.tiny_whisper(world.root / "tiny-teacher")
    student = teachers.tiny_whisper(world.root / "tiny-student", layers=2, seed=3)
    data = training_data(world.root / "tiny-data", teacher, 128, 48, False)
    for dtype in ("float32", "bfloat16", "float16") if CUDA else ("float32",):
        outputs = [world.root / f"{name}-{dtype}" for name in ("whole", "again", "parts")]
        flags = ["--per_device_train_batch_size", 8, "--dtype", dtype, "--warmup_steps", 2]
        for output, parts in zip(outputs, ((6,), (6,), (3, 6)), strict=True):
            for steps in parts:
                train(student, teacher, data, output, *flags, "--max_steps", steps)
        noise = largest_difference(outputs[0], outputs[1])
        apart = largest_difference(outputs[0], outputs[2])
        world.tell(f"3 and 3 steps against 6, {dtype}", apart, "of a weight", f"two whole runs: {noise:.1e}")
        assert apart <= 2 * noise + 1e-9, (apart, noise)


# ---- main ------------------------------------------------------------------------------------------------------------


def read_rows(root: Path) -> list[dict]:
    path = root / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_section(name: str, options: argparse.Namespace, root: Path, seconds: float) -> str | None:
    """Run a section in a process of its own; gives what went wrong."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_gpu", "--run_section", name, "--root", str(root)]
    command += ["--tiny"] if options.tiny else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        lines = done.stderr.strip().splitlines() or [""]
        return f"exit status {done.returncode}: {lines[-1][:200]}"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, in this order; `device` makes the files")
    parser.add_argument("--budget", type=float, default=470, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try this on a CPU")
    parser.add_argument("--run_section", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run_section:
        transformers.utils.logging.set_verbosity_error()
        globals()[f"section_{options.run_section}"](World(options.root, sizes(options.tiny)))
        return 0
    began = time.monotonic()
    failed = []
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=memory) as root:
        print("| what | value | unit | note |\n| --- | ---: | --- | --- |", flush=True)
        told = 0
        for name in options.sections.split(","):
            left = options.budget - (time.monotonic() - began)
            problem = run_section(name, options, Path(root), min(left, SECTIONS[name])) if left > 10 else "no time left"
            for row in read_rows(Path(root))[told:]:
                value = f"{row['value']:.3g}" if isinstance(row["value"], float) else row["value"]
                print(f"| {row['what']} | {value} | {row['unit']} | {row['note']} |", flush=True)
                told += 1
            if problem:
                failed.append(name)
                print(f"| {name} | FAILED | | {problem} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s; sections that failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
