"""run_distillation.py: the loss, the batches, resuming, the encoder cache, held-out evaluation, and what it leaves."""

import argparse
import contextlib
import errno
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import jiwer
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import wandb
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import (
    GenerationConfig,
    SchedulerType,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    get_scheduler,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

import create_student_model
import run_distillation as script
from tests.conftest import forget_processes
from tests.test_limits import another_run

SCRIPT = str(Path(script.__file__))
FLAGS = "--freeze_encoder --dtype float32 --report_to none --language ja --do_train --warmup_steps 2"


@pytest.fixture(autouse=True)
def every_message(caplog):
    caplog.set_level("INFO")


@pytest.fixture(scope="module")
def processor(tiny_teacher):
    return WhisperProcessor.from_pretrained(tiny_teacher)


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "student-init"
    arguments = ["--teacher_checkpoint", str(tiny_teacher), "--decoder_layers", "2", "--save_dir", str(path)]
    assert create_student_model.main(arguments) == 0
    return path


def write_dataset(root: Path, config: str, split: str, rows: list[dict], schema: pa.Schema) -> Path:
    """Add a split to a dataset directory, whose card lists all of them."""
    (root / config).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), root / config / f"{split}-00000-of-00001.parquet")
    lines = ["---", "configs:"]
    for path in sorted(root.glob("*/*.parquet")):
        pattern = f"{path.parent.name}/{path.name.split('-')[0]}-*"
        lines += [f"- config_name: {path.parent.name}", "  data_files:"]
        lines += [f"  - split: {path.name.split('-')[0]}", f"    path: {pattern}"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


VECTORIZED = pa.schema(
    [("input_features", pa.binary()), ("labels", pa.list_(pa.int32())), ("input_length", pa.int64())]
)
AUDIO = pa.schema(
    [
        ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("labels", pa.list_(pa.int32())),
        ("input_length", pa.int64()),
    ]
)


@pytest.fixture(scope="module")
def examples(clips, processor) -> list[dict]:
    """Rows with everything: audio, log-mels with one padded frame, and labels; every third with a prompt."""
    tokenizer, rows = processor.tokenizer, []
    tokenizer.set_prefix_tokens(language="ja", task="transcribe", predict_timestamps=False)
    for number, clip in enumerate(clips[:10]):
        waveform, _ = soundfile.read(io.BytesIO(clip["audio"]), dtype="float32")
        frames = math.ceil((len(waveform) + 200) / 160) + 1
        log_mel = processor.feature_extractor(waveform, sampling_rate=16000, return_tensors="np").input_features[0]
        labels = tokenizer(clip["transcription"]).input_ids
        if number % 3 == 2:
            prompt = tokenizer(clips[0]["transcription"], add_special_tokens=False).input_ids
            labels = [tokenizer.convert_tokens_to_ids("<|startofprev|>"), *prompt, *labels]
        rows.append(
            {
                "audio": {"bytes": clip["audio"], "path": clip["name"]},
                "log_mel": log_mel,
                "input_features": log_mel.T[:frames].astype("<f2").tobytes(),
                "labels": labels,
                "input_length": len(waveform),
            }
        )
    return rows


@pytest.fixture(scope="module")
def vectorized(examples, tmp_path_factory) -> Path:
    """Ten training rows (config tiny, split train), and four held-out ones (config default, split test)."""
    root = tmp_path_factory.mktemp("data") / "speech.wer_10.0.vectorized"
    write_dataset(root, "default", "test", examples[:4], VECTORIZED)
    return write_dataset(root, "tiny", "train", examples, VECTORIZED)


@pytest.fixture(scope="module")
def arguments(student, tiny_teacher, vectorized):
    """Arguments of a run of six steps of four rows (two epochs, each with a last batch of two), saved every two."""

    def make(output: Path, *more: str) -> list[str]:
        given = f"--model_name_or_path {student} --teacher_model_name_or_path {tiny_teacher} --output_dir {output}"
        given += f" --train_dataset_name {vectorized} --train_dataset_config_name tiny --per_device_train_batch_size 4"
        given += " --learning_rate 0.003 --num_train_epochs 2 --save_steps 2 --logging_steps 1"
        return [*given.split(), *FLAGS.split(), *map(str, more)]

    return make


@pytest.fixture
def command(arguments, tmp_path):
    return lambda output="out", *more: arguments(tmp_path / output, *more)


@pytest.fixture
def run(command, tmp_path):
    """Train in this process; the output directory."""

    def train(output: str = "out", *more: str) -> Path:
        assert script.main(command(output, *more)) == 0
        return tmp_path / output

    return train


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory) -> Path:
    """The output of the plain run, which others are compared with."""
    output = tmp_path_factory.mktemp("reference") / "out"
    forget_processes()
    assert script.main(arguments(output)) == 0
    return output


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_close_weights(one: Path, other: Path, tolerance: float) -> None:
    ours, theirs = weights(one), weights(other)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < tolerance


def metrics(output: Path, name: str = "loss") -> list[float]:
    entries = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [entry[name] for entry in entries if name in entry]


def checkpoint_names(output: Path) -> list[str]:
    return [path.name for _, path in script.list_checkpoints(output)]


# ---- the loss --------------------------------------------------------------------------------------------------------


def plain_loss(logits, teacher_logits, targets, ce_weight, kl_weight, temperature):
    """The formula, straight from the paper, in the precision of its input."""
    ce = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    p, q = (teacher_logits / temperature).softmax(-1), (logits / temperature).softmax(-1)
    return ce_weight * ce + kl_weight * temperature**2 * (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize("tokens", [1, 7, script.LOSS_CHUNK, 2 * script.LOSS_CHUNK + 3])
@pytest.mark.parametrize(("ce_weight", "kl_weight", "temperature"), [(0.8, 1.0, 2.0), (0.0, 1.0, 1.0), (1.0, 0.0, 3.5)])
def test_the_loss_and_its_gradients_equal_the_formula_in_float64(tokens, ce_weight, kl_weight, temperature):
    generator = torch.Generator().manual_seed(tokens)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(*shape, generator=generator) * 1.5 for shape in ((tokens, 6), (50, 6), (tokens, 9), (50, 9))
    )
    targets = torch.randint(50, (tokens,), generator=generator)
    ours = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    exact = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    weights = (ce_weight, kl_weight)
    loss, (ce, kl) = script.DistillationLoss.apply(*ours, teacher_hidden, teacher_head, targets, temperature, weights)
    logits = exact[0] @ exact[1].T
    weight = (ce_weight, kl_weight, temperature)
    expected = plain_loss(logits, teacher_hidden.double() @ teacher_head.double().T, targets, *weight)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close((ce_weight * ce + kl_weight * kl).double(), expected, rtol=2e-6, atol=1e-5)
    (3 * loss).backward()
    (3 * expected).backward()
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_formulas_on_random_logits_when_the_head_is_the_identity():
    logits, teacher_logits = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(0)).double() * 4
    targets, eye = torch.arange(40) % 30, torch.eye(30).double()
    loss, _ = script.DistillationLoss.apply(logits, eye, teacher_logits, eye, targets, 2.0, (0.8, 1.0))
    torch.testing.assert_close(loss, plain_loss(logits, teacher_logits, targets, 0.8, 1.0, 2.0), rtol=1e-12, atol=0)


def pack(examples: list[dict], processor, tokens: int) -> dict:
    """A full window: audio of 30 s, and a label of so many tokens with the timestamps of many segments."""
    waveforms = [soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")[0] for row in examples]
    waveform = np.resize(np.concatenate(waveforms), 480_000)
    file = io.BytesIO()
    soundfile.write(file, waveform, 16_000, format="FLAC")
    log_mel = processor.feature_extractor(
        soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")[0], sampling_rate=16_000, return_tensors="np"
    ).input_features[0]
    ids, tokenizer = processor.tokenizer.convert_tokens_to_ids, processor.tokenizer
    label = ids(["<|startoftranscript|>", "<|ja|>", "<|transcribe|>"])
    text = tokenizer("".join(tokenizer.decode(row["labels"], skip_special_tokens=True) for row in examples))
    text = np.resize(text.input_ids[4:-1], 4 * tokens).tolist()
    for segment in range(100):
        start, end = ids([f"<|{0.28 * segment:.2f}|>", f"<|{0.28 * segment + 0.2:.2f}|>"])
        label += [start, *text[5 * segment : 5 * segment + 5], end]
    return {
        "audio": {"bytes": file.getvalue(), "path": "window.flac"},
        "log_mel": log_mel,
        "input_features": log_mel.T.astype("<f2").tobytes(),
        "labels": [*label[: tokens - 1], tokenizer.eos_token_id],
        "input_length": len(waveform),
    }


@pytest.fixture(scope="module")
def windows(examples, processor) -> list[dict]:
    return [pack(examples, processor, 448), pack(examples[3:], processor, 256)]


def test_a_batch_with_prompts_windows_and_padding_has_the_loss_of_its_rows_alone_in_float64(
    student, tiny_teacher, examples, windows, processor
):
    student_model = WhisperForConditionalGeneration.from_pretrained(student).eval()
    teacher_model = WhisperForConditionalGeneration.from_pretrained(tiny_teacher).eval()
    start = processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    rows, expected, count = [], 0.0, 0
    for example in [*examples[:4], *windows]:
        tokens, first = np.array(example["labels"]), example["labels"].index(start)
        features = script.read_log_mel(example["input_features"], None, processor.feature_extractor)
        rows.append({"tokens": torch.tensor(tokens), "start": first, "features": features})
        with torch.no_grad():
            states = teacher_model.model.encoder(features[None].float()).last_hidden_state.double()
            inputs = {"encoder_outputs": (states,), "decoder_input_ids": torch.tensor(tokens[None, :-1])}
            logits = [
                model.double()(**inputs, use_cache=False).logits[0, first:] for model in (student_model, teacher_model)
            ]
        student_model.float(), teacher_model.float()
        expected += float(plain_loss(*logits, torch.tensor(tokens[first + 1 :]), 0.8, 1.0, 2.0))
        count += len(tokens) - first - 1
    batch = script.collate(rows)
    assert batch["decoder_input_ids"].shape[1] % 8 == 0 and len(batch["targets"]) == count
    assert {script.collate([row])["decoder_input_ids"].shape[1] % 8 for row in rows} == {0}
    args = argparse.Namespace(freeze_encoder=True, temperature=2.0, ce_weight=0.8, kl_weight=1.0)
    trained = script.TrainedPart(student_model, args)
    student_model.model.encoder = teacher_model.model.encoder
    tokenizer, extractor = processor.tokenizer, processor.feature_extractor
    models = script.Models(student_model, teacher_model, trained, tokenizer, extractor, tiny_teacher, {})
    loss, _ = trained(*script.run_frozen(models, batch), teacher_model.proj_out.weight, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_no_logits_exist_for_prompts_or_padding_nor_for_more_than_a_chunk(monkeypatch, student, tiny_teacher, examples):
    seen = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(script.F, "linear", lambda *a: seen.append(real(*a).shape) or real(*a))
    monkeypatch.setattr(script, "LOSS_CHUNK", 16)
    hidden, head = torch.randn(50, 4, requires_grad=True), torch.randn(1000, 4)
    given = (hidden, head, hidden.detach(), head, torch.arange(50), 2.0, (0.8, 1.0))
    script.DistillationLoss.apply(*given)[0].backward()
    assert sorted(set(seen)) == [(0, 1), (2, 1000), (16, 1000)] and sum(shape[0] for shape in seen) == 2 * 50


# ---- the data --------------------------------------------------------------------------------------------------------


def test_stored_features_padded_are_the_extractors_in_float16(examples, processor):
    for example in examples:
        for value in (example["input_features"], example["audio"]):
            log_mel = script.read_log_mel(value, None, processor.feature_extractor)
            assert np.array_equal(log_mel, example["log_mel"].astype(np.float16))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(sizes, seed, epoch):
    order = script.epoch_order(tuple(sizes), None, seed, epoch)
    assert sorted(order) == list(range(sum(sizes)))
    script.epoch_order.cache_clear()
    assert np.array_equal(order, script.epoch_order(tuple(sizes), None, seed, epoch))
    if sum(sizes) > 8:
        assert not np.array_equal(order, script.epoch_order(tuple(sizes), None, seed, epoch + 1))


def test_sampling_weights_are_the_shares_of_an_epoch():
    order = script.epoch_order((100, 300), (3.0, 1.0), 0, 0)
    first, second = order[order < 100], order[order >= 100]
    assert (len(first), len(second)) == (300, 100)
    assert set(np.bincount(first)) == {3} and len(set(second)) == 100
    assert np.count_nonzero(np.diff(order < 100)) > 100  # the datasets are mixed
    again = script.epoch_order((100, 300), (3.0, 1.0), 0, 1)
    assert set(again[again >= 100]) != set(second)  # another part of the larger one


@settings(deadline=None)
@given(st.integers(1, 50), st.sampled_from([(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (2, 4, 1)]))
def test_batches_are_the_same_however_the_global_batch_is_split(rows, split):
    size, processes, accumulation = split
    plan = script.Plan((rows,), None, 1, size, processes, accumulation)
    parts = [list(plan.micro_batches(0, 9, process)) for process in range(processes)]
    assert {len(part) for part in parts} == {9 * accumulation}
    for step in range(9):
        expected = plan.rows(step).tolist()
        got = [parts[p][step * accumulation + m] for m in range(accumulation) for p in range(processes)]
        assert np.concatenate(got)[: len(expected)].tolist() == expected
        assert all(extra == expected[:1] for extra in got[math.ceil(len(expected) / size) :])


def test_labels_are_scanned_row_by_row_across_chunks_and_nulls():
    column = pa.chunked_array(
        [
            pa.array([[7, 1, 5], None, [1, 9, 1, 8]], pa.list_(pa.int32())),
            pa.array([[], [3], [4, 1]], pa.list_(pa.int32())),
        ]
    )
    lengths, starts = script.scan_labels(column, 1)
    assert lengths.tolist() == [3, 0, 4, 0, 1, 2]
    assert starts.tolist() == [1, 0, 0, 0, 1, 1]  # where there is none, the length


def test_audio_trains_the_same_model_as_stored_features(run, examples, uninterrupted, tmp_path):
    data = write_dataset(tmp_path / "labelled", "tiny", "train", examples, AUDIO)
    assert_equal_weights(run("audio", "--train_dataset_name", data), uninterrupted)


def test_two_datasets_train_together_and_unusable_rows_are_left_out_and_listed(
    run, examples, vectorized, tmp_path, caplog
):
    long = {**examples[0], "labels": examples[0]["labels"] * 40}
    none = {**examples[1], "labels": None}
    write_dataset(tmp_path / "more", "other", "train", [examples[2], long, examples[3], none], VECTORIZED)
    both = ("--train_dataset_name", f"{vectorized}+{tmp_path / 'more'}", "--train_dataset_config_name", "tiny+other")
    output = run("both", *both, "--num_train_epochs", 1)
    record = json.loads((output / "distillation.json").read_text())
    assert record["rows"] == 12 and record["rows_left_out"][vectorized.name] == {}
    assert list(record["rows_left_out"]["more"].values()) == [1, 1]
    assert "2 rows left out" in caplog.text and "the first: 1, 3" in caplog.text
    assert len(metrics(output)) == 3


def test_datasets_with_the_same_last_name_are_counted_apart(run, examples, tmp_path):
    good = write_dataset(tmp_path / "clean" / "speech", "tiny", "train", examples[:2], VECTORIZED)
    rows = [examples[2], {**examples[3], "labels": None}]
    bad = write_dataset(tmp_path / "noisy" / "speech", "tiny", "train", rows, VECTORIZED)
    output = run("out", "--train_dataset_name", f"{bad}+{good}+{bad}", "--max_steps", 1)
    left_out = json.loads((output / "distillation.json").read_text())["rows_left_out"]
    assert left_out == {"speech": {"no label": 1}, "speech (2)": {}, "speech (3)": {"no label": 1}}


def test_full_windows_train_stored_or_as_audio_and_too_long_labels_are_counted(
    run, command, windows, examples, processor, tmp_path, caplog
):
    over = pack(examples, processor, 449)
    rows = [*windows, over, examples[0]]
    data = [
        write_dataset(tmp_path / str(kind), "tiny", "train", rows, schema)
        for kind, schema in enumerate((VECTORIZED, AUDIO))
    ]
    flags = ("--max_steps", 2, "--train_dataset_name")
    stored = run("stored", *flags, data[0])
    assert "1 rows left out (1 with a label of more than 448 tokens, the longest of 449" in caplog.text
    assert json.loads((stored / "distillation.json").read_text())["rows"] == 3
    assert_equal_weights(run("audio", *flags, data[1]), stored)
    cached = run("cached", *flags, data[0], "--cache_encoder_outputs", tmp_path / "cache")
    assert metrics(cached) == pytest.approx(metrics(stored), rel=1e-5)
    caplog.clear()
    run("short", *flags, data[0], "--max_label_length", 128)
    assert (
        "3 rows left out (3 with a label of more than 128 tokens, the longest of 449 (--max_label_length)"
        in caplog.text
    )
    over["input_length"] = 480_001
    write_dataset(tmp_path / "long", "tiny", "train", [over], VECTORIZED)
    with pytest.raises(SystemExit, match=r"none of the 1 rows .* 448 tokens.*1 with more than 30 s"):
        script.main(command("none", *flags, tmp_path / "long"))


def flac(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(round(16_000 * seconds))), 16_000, format="FLAC")
    return file.getvalue()


@pytest.mark.parametrize(("audio", "reason"), [(b"not audio", "undecodable audio"), (flac(30.01), "30.0 s are more")])
def test_a_row_whose_audio_cannot_be_read_counts_for_nothing_and_is_named(
    run, examples, tmp_path, caplog, audio, reason
):
    """The decoded length is the length, whatever the row says of it."""
    broken = {**examples[1], "audio": {"bytes": audio, "path": "broken.flac"}}
    data = write_dataset(tmp_path / "broken", "tiny", "train", [examples[0], broken], AUDIO)
    rest = write_dataset(tmp_path / "rest", "tiny", "train", [examples[0]], AUDIO)
    flags = ("--max_steps", 1, "--train_dataset_name")
    both, one = run("both", *flags, data), run("one", *flags, rest)
    assert f"row 1: unreadable audio, left out of the loss: {reason}" in caplog.text
    cached = run("cached", *flags, data, "--cache_encoder_outputs", tmp_path / "cache")
    assert metrics(cached) == pytest.approx(metrics(both), rel=1e-5)
    share = len(examples[0]["labels"]) / (len(examples[0]["labels"]) + len(examples[1]["labels"]) - 2)
    assert metrics(both)[0] == pytest.approx(metrics(one)[0] * share, rel=0.1)


def test_a_schedule_may_follow_the_held_out_loss(run, command, vectorized, monkeypatch):
    flags = (
        "--lr_scheduler_type",
        "reduce_lr_on_plateau",
        "--lr_scheduler_kwargs",
        '{"patience": 0, "threshold": 10.0}',
    )
    with pytest.raises(SystemExit, match="needs --eval_dataset_name"):
        script.main(command("out", *flags))
    held_out = ("--eval_dataset_name", vectorized, "--eval_steps", 1, "--eval_max_samples", 1, "--max_steps", 3)
    followed = []
    step = ReduceLROnPlateau.step
    monkeypatch.setattr(
        ReduceLROnPlateau, "step", lambda self, loss: followed.append(loss) or step(self, loss), raising=True
    )
    output = run("out", *flags, *held_out, "--max_label_length", 60)
    assert metrics(output, "learning_rate") == pytest.approx([0.0003, 0.00003, 0.000003])
    assert followed == metrics(output, "eval_loss")


def test_fewer_rows_than_a_batch_still_train(run):
    losses = metrics(run("small", "--per_device_train_batch_size", 64, "--num_train_epochs", 3))
    assert len(losses) == 3 and losses[2] < losses[0]


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_leaves_a_whole_model(uninterrupted, student, examples, processor, tiny_teacher):
    losses = metrics(uninterrupted)
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    needed = "config.json generation_config.json model.safetensors tokenizer.json vocab.json merges.txt README.md"
    needed += (
        " added_tokens.json special_tokens_map.json preprocessor_config.json training_curves.png distillation.json"
    )
    names = {path.name for path in uninterrupted.iterdir()}
    assert set(needed.split()) | {"create_student_model.py", "run_distillation.py", "metrics.jsonl"} <= names
    assert [name for name in names if name.startswith(".")] == [".training.lock"]
    model = WhisperForConditionalGeneration.from_pretrained(uninterrupted)
    assert (model.generation_config.language, model.generation_config.task) == ("ja", "transcribe")
    assert model.dtype == torch.float32 and model.config.decoder_layers == 2
    sequence = model.generate(
        torch.tensor(examples[0]["log_mel"])[None], max_new_tokens=5, force_unique_generate_call=True
    )
    prefix = processor.tokenizer.convert_ids_to_tokens(sequence[0].tolist())[:4]
    assert prefix == ["<|startoftranscript|>", "<|ja|>", "<|transcribe|>", "<|notimestamps|>"]
    assert json.loads((uninterrupted / "distillation.json").read_text())["status"] == "complete"
    card = (uninterrupted / "README.md").read_text()
    assert "training_curves.png" in card and f"distilled from {tiny_teacher.name} on 10 rows of speech.wer_10.0" in card
    assert str(uninterrupted.parent) not in card and str(tiny_teacher) not in card


def test_copies_of_the_scripts_come_with_the_model_and_one_that_is_there_stays(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run_distillation.py").write_text("# another version\n")
    output = run("out", "--max_steps", 1)
    assert (output / "run_distillation.py").read_text() == "# another version\n"
    ours = Path(script.__file__).with_name("create_student_model.py")
    assert (output / ours.name).read_bytes() == ours.read_bytes()


def test_a_frozen_encoder_is_the_teachers_unchanged_and_in_no_checkpoint(uninterrupted, tiny_teacher):
    trained, teacher = weights(uninterrupted), load_file(tiny_teacher / "model.safetensors")
    encoder = [name for name in teacher if name.startswith("model.encoder.")]
    assert encoder and all(torch.equal(trained[name], teacher[name]) for name in encoder)
    assert not torch.equal(trained["model.decoder.embed_tokens.weight"], teacher["model.decoder.embed_tokens.weight"])
    stored = load_file(uninterrupted / "checkpoint-6-epoch-1" / "model.safetensors")
    assert all(name.startswith("decoder.") for name in stored)
    decoder = sum(value.numel() for name, value in trained.items() if ".decoder." in name)
    assert sum(value.numel() for value in stored.values()) == decoder
    optimizer = torch.load(uninterrupted / "checkpoint-6-epoch-1" / "optimizer.bin", weights_only=True)
    assert sum(value["exp_avg"].numel() for value in optimizer["state"].values()) == decoder
    assert all(value["exp_avg"].dtype == torch.float32 for value in optimizer["state"].values())


@pytest.mark.parametrize("difference", ["weights", "layers"])
def test_a_frozen_encoder_that_differs_from_the_teachers_runs_beside_it(run, student, tmp_path, caplog, difference):
    model = WhisperForConditionalGeneration.from_pretrained(student)
    if difference == "weights":
        with torch.no_grad():
            model.model.encoder.layer_norm.bias += 0.5
    else:
        model.model.encoder.layers = model.model.encoder.layers[:1]
        model.config.encoder_layers = 1
    shutil.copytree(student, tmp_path / "other", ignore=shutil.ignore_patterns("student.json"))
    model.save_pretrained(tmp_path / "other")
    output = run("differs", "--model_name_or_path", tmp_path / "other", "--max_steps", 1)
    assert "not the teacher's" in caplog.text
    trained, before = weights(output), load_file(tmp_path / "other" / "model.safetensors")
    assert trained.keys() == before.keys()
    encoder = [name for name in before if name.startswith("model.encoder.")]
    assert encoder and all(torch.equal(trained[name], before[name]) for name in encoder)
    assert metrics(output)[0] != pytest.approx(metrics(run("same", "--max_steps", 1))[0])


def test_an_encoder_that_is_not_frozen_is_trained_and_resumed(run, student, tmp_path):
    flags = ("--freeze_encoder", "False", "--num_train_epochs", 1, "--save_steps", 1)
    straight = run("straight", *flags)
    before = load_file(student / "model.safetensors")
    assert not torch.equal(weights(straight)["model.encoder.conv1.weight"], before["model.encoder.conv1.weight"])
    interrupt(straight, tmp_path / "again", keep=1)
    assert_equal_weights(run("again", *flags), straight)


@pytest.mark.parametrize(
    "flags", [("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2), ("--gradient_checkpointing",)]
)
def test_the_trained_weights_do_not_depend_on_micro_batches_or_recomputation(run, uninterrupted, flags):
    output = run("split", *flags)
    assert metrics(output) == pytest.approx(metrics(uninterrupted), rel=1e-5)
    # AdamW hides a gradient of the wrong size.
    assert metrics(output, "grad_norm") == pytest.approx(metrics(uninterrupted, "grad_norm"), rel=1e-3)
    assert_close_weights(output, uninterrupted, 2e-4)


def plain_rows(examples: list[dict], rows: np.ndarray, teacher, student, processor, weights: tuple) -> tuple:
    """Cross-entropy, KL and the weighted loss per token of some rows, by one forward pass a row without padding."""
    start = processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    ce_weight, kl_weight, temperature = weights
    ce, kl, tokens = 0.0, 0.0, 0
    for row in rows:
        labels = examples[row]["labels"]
        first = labels.index(start)
        features = torch.tensor(examples[row]["log_mel"].astype(np.float16))[None].float()
        with torch.no_grad():
            states = teacher.model.encoder(features).last_hidden_state
        inputs = {"encoder_outputs": (states,), "decoder_input_ids": torch.tensor([labels[:-1]]), "use_cache": False}
        logits = student(**inputs).logits[0, first:]
        teacher_logits = teacher(**inputs).logits[0, first:].detach()
        targets = torch.tensor(labels[first + 1 :])
        ce = ce + plain_loss(logits, teacher_logits, targets, 1.0, 0.0, temperature)
        kl = kl + plain_loss(logits, teacher_logits, targets, 0.0, 1.0, temperature)
        tokens += len(targets)
    return ce / tokens, kl / tokens, (ce_weight * ce + kl_weight * kl) / tokens


def test_the_steps_are_those_of_a_plain_loop_with_flags_that_all_differ_from_their_defaults(
    run, student, tiny_teacher, examples, processor
):
    flags = "--weight_decay 0.5 --max_grad_norm 0.05 --adam_beta1 0.8 --adam_beta2 0.9 --adam_epsilon 0.001 --seed 7"
    flags += " --temperature 3 --ce_weight 0.3 --kl_weight 0.7 --learning_rate 0.01 --lr_scheduler_type linear"
    output = run("out", *flags.split(), "--max_steps", 4)  # two warm-up steps, then down to nothing
    model = WhisperForConditionalGeneration.from_pretrained(student).eval()
    teacher = WhisperForConditionalGeneration.from_pretrained(tiny_teacher).eval()
    trained = list(model.model.decoder.parameters())
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=0.001)
    first_epoch, second_epoch = (script.epoch_order((10,), None, 7, epoch) for epoch in (0, 1))
    batches = [first_epoch[:4], first_epoch[4:8], first_epoch[8:], second_epoch[:4]]
    expected = []
    for rows, rate in zip(batches, (0.0, 0.005, 0.01, 0.005), strict=True):
        ce, kl, loss = plain_rows(examples, rows, teacher, model, processor, (0.3, 0.7, 3.0))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.05)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        expected.append([float(value.detach()) for value in (ce, kl, loss, norm)])
    for name, values in zip(("ce_loss", "kl_loss", "loss", "grad_norm"), zip(*expected, strict=True), strict=True):
        assert metrics(output, name) == pytest.approx(values, rel=1e-4), name
    assert metrics(output, "learning_rate") == pytest.approx([0.005, 0.01, 0.005, 0.0])
    ours = weights(output)
    distances = {name: (ours[name] - value).abs().max() for name, value in model.state_dict().items() if name in ours}
    assert len(distances) == len(ours) and max(distances.values()) < 1e-4


def test_an_entry_of_the_log_is_the_mean_over_the_tokens_since_the_one_before(
    run, uninterrupted, examples, processor, tmp_path
):
    output = run("out", "--logging_steps", 4)
    assert metrics(output, "step") == [4, 6]
    assert metrics(output, "epoch") == [1.3333, 2.0]
    start = processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    counted = np.array([len(row["labels"]) - row["labels"].index(start) - 1 for row in examples])
    epochs = [script.epoch_order((10,), None, 42, epoch) for epoch in (0, 1)]
    tokens = [counted[rows].sum() for order in epochs for rows in (order[:4], order[4:8], order[8:])]
    for name in ("loss", "ce_loss", "kl_loss"):
        steps = metrics(uninterrupted, name)
        expected = [np.average(steps[:4], weights=tokens[:4]), np.average(steps[4:], weights=tokens[4:])]
        assert metrics(output, name) == pytest.approx(expected, rel=1e-6)
    for name in ("learning_rate", "grad_norm"):
        assert metrics(output, name) == [metrics(uninterrupted, name)[step - 1] for step in (4, 6)]
    interrupt(output, tmp_path / "again", keep=2)  # between two entries
    assert metrics(run("again", "--logging_steps", 4)) == metrics(output)


def test_the_rate_in_the_log_is_of_the_training_alone(run, vectorized, monkeypatch):
    """A step takes two seconds by the clock of this test, and an evaluation or a save a hundred."""
    clock = [0.0]

    def taking(seconds: float, call):
        def timed(*args):
            clock[0] += seconds
            return call(*args)

        return timed

    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])
    for name, seconds in (("optimiser_step", 2.0), ("evaluate_training", 100.0), ("save_checkpoint", 100.0)):
        monkeypatch.setattr(script, name, taking(seconds, getattr(script, name)))
    held_out = ("--eval_dataset_name", vectorized, "--eval_steps", 1, "--eval_max_samples", 1)
    flags = (*held_out, "--max_label_length", 60, "--max_steps", 4)
    output = run("out", *flags)
    assert metrics(output, "samples_per_second") == [2, 2, 0.5, 2]  # of nine short rows the third batch has one
    output = run("rarely", *flags, "--logging_steps", 2)
    assert metrics(output, "samples_per_second") == [2, 1.25]


def test_gradient_checkpointing_runs_the_trained_layers_again(run):
    normalised = []

    def note(module, _) -> None:
        if isinstance(module, torch.nn.LayerNorm) and module.training:
            normalised.append(module)

    counts = []
    for number, flags in enumerate(((), ("--gradient_checkpointing",))):
        normalised.clear()
        with register_module_forward_pre_hook(note):
            run(f"out{number}", "--max_steps", 1, *flags)
        counts.append(len(normalised))
    assert counts == [2 * 3 + 1, 2 * 2 * 3 + 1]  # three in each of two layers, and one behind them


def test_every_micro_batch_of_every_step_draws_dropout_of_its_own_by_the_seed(run, monkeypatch):
    seeds = []
    manual_seed = torch.manual_seed
    monkeypatch.setattr(script.torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    flags = ("--max_steps", 2, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2, "--seed")
    drawn = []
    for number, seed in enumerate((42, 42, 7)):
        seeds.clear()
        run(f"out{number}", *flags, seed)
        drawn.append([*seeds])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0] + drawn[2])) == 8


def changed_copy(model: Path, copy: Path, **changes) -> Path:
    """A copy of a model's directory with another configuration."""
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("student.json"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


DROPOUT = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5}


def test_a_teacher_that_was_trained_with_dropout_teaches_without(run, uninterrupted, tiny_teacher, tmp_path):
    noisy = changed_copy(tiny_teacher, tmp_path / "noisy", **DROPOUT, encoder_layerdrop=0.9, decoder_layerdrop=0.9)
    output = run("out", "--teacher_model_name_or_path", noisy)
    assert metrics(output) == metrics(uninterrupted)
    assert_equal_weights(output, uninterrupted)


def test_a_frozen_encoder_of_the_students_own_drops_nothing_out(run, student, tmp_path):
    model = WhisperForConditionalGeneration.from_pretrained(student)
    with torch.no_grad():
        model.model.encoder.layer_norm.bias += 0.5
    own = changed_copy(student, tmp_path / "own")
    model.save_pretrained(own)
    noisy = changed_copy(own, tmp_path / "noisy", encoder_layerdrop=0.9)
    plain, dropped = (run(f"out-{path.name}", "--model_name_or_path", path, "--max_steps", 2) for path in (own, noisy))
    assert metrics(dropped) == metrics(plain)


def test_dropout_is_the_trained_decoders_while_it_trains_and_the_same_after_a_kill(
    run, student, vectorized, uninterrupted, tmp_path
):
    noisy = changed_copy(student, tmp_path / "noisy", **DROPOUT)
    held_out = ("--eval_dataset_name", vectorized, "--eval_steps", 1, "--eval_max_samples", 2, "--max_label_length", 60)
    straight = run("straight", "--model_name_or_path", noisy, "--max_label_length", 60)
    assert metrics(straight)[0] != pytest.approx(metrics(uninterrupted)[0], rel=1e-3)
    evaluated = run("evaluated", "--model_name_or_path", noisy, *held_out)
    plain = run("plain", *held_out, "--max_steps", 1)
    assert metrics(evaluated, "eval_loss")[0] == metrics(plain, "eval_loss")[0]
    assert_equal_weights(evaluated, straight)
    interrupt(straight, tmp_path / "killed", keep=2)
    assert_equal_weights(run("killed", "--model_name_or_path", noisy, "--max_label_length", 60), straight)


def test_sampling_weights_are_how_often_a_dataset_is_seen(run, examples, tmp_path):
    """In one step: three times the row of one dataset, and one of the other, whose rows are all the same."""
    often = write_dataset(tmp_path / "often", "tiny", "train", [examples[0]], VECTORIZED)
    seldom = write_dataset(tmp_path / "seldom", "tiny", "train", [examples[1]] * 3, VECTORIZED)
    first, second = (
        run(data.name + "-only", "--train_dataset_name", data, "--max_steps", 1) for data in (often, seldom)
    )
    both = ("--train_dataset_name", f"{often}+{seldom}", "--train_dataset_samples", "3+1", "--max_steps", 1)
    tokens = [len(example["labels"]) - 1 for example in examples[:2]]
    sums = [loss * count for (loss,), count in zip((metrics(first), metrics(second)), tokens, strict=True)]
    expected = (3 * sums[0] + sums[1]) / (3 * tokens[0] + tokens[1])
    assert metrics(run("both", *both)) == pytest.approx([expected], rel=1e-5)


TOLD = {"ACCELERATE_USE_CPU": "true"}  # as the commands in older READMEs do


def launch(arguments: list[str], *flags: str, variables: dict[str, str] = TOLD) -> subprocess.Popen:
    """The script in a process of its own, or with flags in those that accelerate starts."""
    launcher = [sys.executable, *(["-m", "accelerate.commands.launch", "--multi_gpu", *flags] if flags else [])]
    environment = os.environ | variables
    return subprocess.Popen([*launcher, SCRIPT, *arguments], env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors[-3000:]


HALVES = ("--per_device_train_batch_size", 2)  # of the batches of the plain run, for each of two processes


@pytest.fixture(scope="module")
def two_processes(arguments, tmp_path_factory) -> Path:
    """The output of the plain run by two processes on one machine, which are not told to use the CPU."""
    output = tmp_path_factory.mktemp("processes") / "out"
    flags = ("--num_processes", "2", "--main_process_port", "0")
    finish(launch(arguments(output, *HALVES), *flags, variables={}))
    return output


def test_two_machines_two_processes_and_one_train_the_same_model_and_take_over_from_each_other(
    command, run, uninterrupted, two_processes, tmp_path
):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    flags = ("--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port")
    machines = [launch(command("machines", *HALVES), *flags, port, "--machine_rank", rank) for rank in ("0", "1")]
    for machine in machines:
        finish(machine)
    assert_equal_weights(tmp_path / "machines", two_processes)
    assert_close_weights(two_processes, uninterrupted, 2e-4)
    assert json.loads((tmp_path / "machines" / "distillation.json").read_text())["processes"] == 2
    interrupt(tmp_path / "machines", tmp_path / "one", keep=4)
    assert_close_weights(run("one"), uninterrupted, 2e-4)


IMPATIENT = "import sys, run_distillation as script; script.SILENCE_SECONDS = 1; sys.exit(script.main(sys.argv[1:]))"


@pytest.mark.timeout(300)  # what it guards against is waiting for ever
def test_a_process_that_stops_is_named_and_when_one_dies_the_others_end_in_one_line(command, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **TOLD}
    arguments = command("out", "--per_device_train_batch_size", 2, "--max_steps", 100_000)
    processes = []
    for rank in ("0", "1"):
        environment = os.environ | place | {"RANK": rank, "LOCAL_RANK": rank}
        process = [sys.executable, "-c", IMPATIENT, *arguments]
        options = {"env": environment, "cwd": Path(SCRIPT).parent, "text": True}
        processes.append(subprocess.Popen(process, stderr=subprocess.PIPE, **options))
    first, second = processes
    while not (tmp_path / "out" / "checkpoint-2-epoch-0").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    second.send_signal(signal.SIGSTOP)
    said = ""
    while "process 1 has been silent" not in said:
        line = first.stderr.readline()
        assert line, said
        said += line
    second.send_signal(signal.SIGKILL)
    errors = first.stderr.read()
    assert first.wait() == 1
    second.communicate()
    assert "Traceback" not in errors
    assert "error: another process of this run has ended" in errors


@pytest.mark.parametrize(
    ("earlier", "now", "silent"),
    [
        ({}, {0: (5, 3), 1: (5, 2)}, []),  # the first look
        ({0: (5, 3), 1: (5, 3)}, {0: (11, 8), 1: (11, 8)}, []),
        ({0: (5, 3), 1: (5, 3)}, {0: (11, 4), 1: (5, 3)}, [1]),  # it has not beaten
        ({0: (5, 3), 1: (5, 2)}, {0: (11, 3), 1: (11, 2)}, [1]),  # it beats, but does not arrive
        ({0: (5, 3), 1: (5, 2)}, {0: (11, 4), 1: (11, 3)}, []),  # they go on
        ({0: (5, 3), 1: (5, 3)}, {0: (11, 3), 1: (11, 3)}, []),  # all are busy with something long
        ({0: (5, 3), 1: (5, 3)}, {0: (11, 4)}, []),  # the second has ended
    ],
)
def test_silent_is_who_does_not_beat_or_does_not_come_to_where_others_wait(earlier, now, silent):
    assert script.find_silent(earlier, now) == silent


def test_a_directory_is_pushed_to_the_repository_that_it_came_from(hub, tmp_path):
    HfApi().create_repo("acme/came-from")
    downloaded, cloned = tmp_path / "acme" / "came-from", tmp_path / "cloned"
    for directory in (downloaded, cloned, tmp_path / "not--allowed" / "new"):
        directory.mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", str(cloned)], check=True)
    subprocess.run(
        ["git", "-C", str(cloned), "remote", "add", "origin", f"{hub.url}/acme/of-the-clone.git"], check=True
    )
    assert script.home_repository(downloaded) == "acme/came-from"
    assert script.home_repository(cloned) == "acme/of-the-clone"
    assert script.home_repository(tmp_path / "not--allowed" / "new") == "new"
    hub.fault("/api/models/acme/came-from", status=400, message="the Hub is away")
    with pytest.raises(SystemExit, match=r"looking for the repository acme/came-from failed: .*hf auth whoami"):
        script.home_repository(downloaded)


def test_an_output_directory_that_another_machine_does_not_see_is_refused(command, monkeypatch):
    monkeypatch.setattr(script, "write_json", lambda *_: None)  # as if the first machine had a disk of its own
    with pytest.raises(SystemExit, match="must be on a file system that all machines see"):
        script.main(command())


def test_a_cache_that_another_machine_does_not_see_is_refused(command, tmp_path, monkeypatch):
    hold_lock = script.hold_lock

    def hold_elsewhere(lock, *given, **options):  # as if the first machine had a disk of its own
        return contextlib.nullcontext() if "cache" in lock.parts else hold_lock(lock, *given, **options)

    monkeypatch.setattr(script, "hold_lock", hold_elsewhere)
    with pytest.raises(SystemExit, match=f"--cache_encoder_outputs {tmp_path}/cache must be on a file system that all"):
        script.main(command("out", "--cache_encoder_outputs", tmp_path / "cache"))


def test_processes_without_a_gpu_know_of_each_other_without_being_told(two_processes, uninterrupted):
    assert json.loads((two_processes / "distillation.json").read_text())["processes"] == 2
    assert metrics(two_processes) == pytest.approx(metrics(uninterrupted), rel=1e-5)
    assert metrics(two_processes, "grad_norm") == pytest.approx(metrics(uninterrupted, "grad_norm"), rel=1e-3)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_masters(run, uninterrupted):
    output = run("bf16", "--dtype", "bfloat16", "--max_steps", 2)
    assert {value.dtype for value in weights(output).values()} == {torch.float32}
    assert WhisperForConditionalGeneration.from_pretrained(output).dtype == torch.float32
    assert metrics(output) != metrics(uninterrupted)[:2]
    assert metrics(output) == pytest.approx(metrics(uninterrupted)[:2], rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_computes_in_the_precision_asked_for(run, tiny_teacher, examples, tmp_path, dtype):
    """As the cache shows, which holds what the frozen models gave."""
    data = write_dataset(tmp_path / "one", "tiny", "train", examples[:1], VECTORIZED)
    cache = ("--cache_encoder_outputs", tmp_path / "cache", "--train_dataset_name", data)
    run("out", "--dtype", dtype, *cache, "--max_steps", 1)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    states = load_file(file)["states"][0]
    teacher = WhisperForConditionalGeneration.from_pretrained(tiny_teacher, dtype=getattr(torch, dtype)).eval()
    features = torch.tensor(examples[0]["log_mel"].astype(np.float16))[None].to(teacher.dtype)
    with torch.no_grad():
        expected = teacher.model.encoder(features).last_hidden_state[0]
    assert states.dtype == expected.dtype == getattr(torch, dtype)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert float((states - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(
    ("capabilities", "dtype"), [({}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16")]
)
def test_without_a_dtype_the_device_decides_and_the_record_says_what(run, monkeypatch, caplog, capabilities, dtype):
    monkeypatch.setattr(script.torch.cpu, "get_capabilities", lambda: capabilities)
    parse_args = script.parse_args

    def parse_without_dtype(argv: list[str]) -> argparse.Namespace:
        return parse_args([word for word in argv if word not in ("--dtype", "float32")])

    monkeypatch.setattr(script, "parse_args", parse_without_dtype)
    output = run("out", "--max_steps", 1)
    assert f"--dtype is not set: {dtype}" in caplog.text
    assert json.loads((output / "distillation.json").read_text())["settings"]["dtype"] == dtype
    assert {value.dtype for value in weights(output).values()} == {torch.float32}


@pytest.mark.parametrize("schedule", [kind.value for kind in SchedulerType])
def test_every_schedule_of_transformers_is_accepted(schedule):
    needed = {"cosine_with_min_lr": {"min_lr": 1e-5}, "cosine_warmup_with_min_lr": {"min_lr": 1e-5}}
    needed |= {"warmup_stable_decay": {"num_decay_steps": 2}}
    flags = ["--lr_scheduler_type", schedule, "--lr_scheduler_kwargs", json.dumps(needed.get(schedule, {}))]
    required = ["--model_name_or_path", "a", "--teacher_model_name_or_path", "b", "--output_dir", "c"]
    args = script.parse_args([*required, *flags, "--warmup_steps", "4"])
    optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2)]
    schedulers = [
        script.make_scheduler(args, optimizers[0], total_steps=10),
        get_scheduler(schedule, optimizers[1], 4, 10, needed.get(schedule, {})),
    ]
    for _ in range(10):
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step(*([1.0] if schedule in script.LED_BY_LOSS else []))
        state = schedulers[0].state_dict()
        assert json.loads(json.dumps(state)) == state  # a checkpoint holds it as JSON
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]


def test_a_loss_that_is_not_a_number_stops_the_run_with_the_last_good_checkpoint_kept(
    command, tmp_path, vectorized, examples
):
    spoilt = {**examples[0], "input_features": np.full((64, 128), np.nan, "<f2").tobytes(), "input_length": 62 * 160}
    data = write_dataset(tmp_path / "spoilt", "tiny", "train", [*examples[:3], spoilt], VECTORIZED)
    flags = (
        "--train_dataset_name",
        data,
        "--per_device_train_batch_size",
        1,
        "--save_steps",
        1,
        "--num_train_epochs",
        4,
    )
    seed = next(seed for seed in range(99) if script.epoch_order((4,), None, seed, 0)[2] == 3)
    with pytest.raises(SystemExit, match=r"step 3: the loss is nan.*last checkpoint.*checkpoint-2-epoch-0"):
        script.main(command("nan", *flags, "--seed", seed, "--dataloader_num_workers", 1))
    assert multiprocessing.active_children() == []  # an exit would wait for them
    stored = checkpoint_names(tmp_path / "nan")
    assert stored and all(
        value.isfinite().all() for value in load_file(tmp_path / "nan" / stored[-1] / "model.safetensors").values()
    )


def test_an_exploding_loss_stops_the_run(command, tmp_path):
    flags = ("--learning_rate", 30.0, "--max_grad_norm", 0, "--warmup_steps", 60, "--max_steps", 30)
    with pytest.raises(SystemExit, match=r"the loss has exploded from \d.* to \d.*checkpoint-"):
        script.main(command("explodes", *flags, "--per_device_train_batch_size", 2))


def test_the_final_generation_config_is_the_students_but_for_language_and_task(run, student, vectorized, tmp_path):
    """Also after evaluations, which decode no further than the longest label."""
    own = changed_copy(student, tmp_path / "own")
    config = json.loads((own / "generation_config.json").read_text())
    config |= {"alignment_heads": [[0, 1], [1, 0]], "max_initial_timestamp_index": 25}
    config |= {"num_beams": 5, "do_sample": True, "return_timestamps": True, "forced_decoder_ids": [[1, 5]]}
    (own / "generation_config.json").write_text(json.dumps(config))
    held_out = ("--eval_dataset_name", vectorized, "--eval_max_samples", 1, "--max_label_length", 60)
    output = run("out", "--model_name_or_path", own, *held_out, "--task", "translate", "--max_steps", 1)
    final = json.loads((output / "generation_config.json").read_text())
    greedy = {"return_timestamps": False, "num_beams": 1, "do_sample": False, "forced_decoder_ids": None}
    said = {name for name, value in final.items() if name not in config or config[name] != value}
    assert said <= {"language", "task", "transformers_version", *greedy}
    assert set(config) - set(final) <= set(greedy)
    read = GenerationConfig.from_pretrained(output)
    assert {name: getattr(read, name, None) or greedy[name] for name in greedy} == greedy
    assert (final["language"], final["task"], final["max_length"]) == ("ja", "translate", 448)
    assert final["alignment_heads"] == [[0, 1], [1, 0]]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "distillation.json"])
def test_a_write_that_fails_midway_leaves_a_run_that_the_same_command_finishes(
    command, run, uninterrupted, tmp_path, monkeypatch, name
):
    replace = os.replace

    def replace_or_fail(source, target) -> None:
        if Path(target) == tmp_path / "out" / name and (tmp_path / "out" / "checkpoint-6-epoch-1").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_fail)
    with pytest.raises(SystemExit, match="No space left"):
        script.main(command())
    monkeypatch.undo()
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert record["status"] == "running"  # it is the last of all: "complete" means that all of it is there
    assert_equal_weights(run("out"), uninterrupted)
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert record["status"] == "complete"
    for file in uninterrupted.iterdir():
        assert (tmp_path / "out" / file.name).exists(), file.name


# ---- resuming --------------------------------------------------------------------------------------------------------


def interrupt(finished: Path, copy: Path, keep: int) -> None:
    """Make a copy of a finished run into what it was just after the checkpoint of step `keep`, a torn line included."""
    shutil.copytree(finished, copy, dirs_exist_ok=True)
    for step, path in script.list_checkpoints(copy):
        if step > keep:
            shutil.rmtree(path)
    (copy / "model.safetensors").unlink()
    record = json.loads((copy / "distillation.json").read_text())
    del record["checksum"]
    (copy / "distillation.json").write_text(json.dumps(record | {"status": "running"}))
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')


def test_a_run_killed_in_the_middle_ends_with_the_weights_of_one_that_was_not(command, run, uninterrupted, tmp_path):
    process = launch(command("killed"))
    while not (tmp_path / "killed" / "checkpoint-2-epoch-0").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    output = run("killed")
    assert_equal_weights(output, uninterrupted)
    assert metrics(output) == metrics(uninterrupted)
    assert metrics(output, "step") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "no manifest"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_and_said(run, uninterrupted, tmp_path, caplog, damage):
    interrupt(uninterrupted, tmp_path / "out", keep=4)
    newest = tmp_path / "out" / "checkpoint-4-epoch-1"
    file = newest / ("manifest.json" if damage == "no manifest" else "optimizer.bin")
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    (tmp_path / "out" / ".checkpoint-6-epoch-1.partial").mkdir()
    (tmp_path / "out" / ".checkpoint-6-epoch-1.partial" / "model.safetensors").write_bytes(b"half")
    assert_equal_weights(run("out"), uninterrupted)
    assert "checkpoint-4-epoch-1 is not complete and is skipped" in caplog.text
    assert "going on from step 2" in caplog.text


def agree(checkpoint: Path) -> None:
    """Make a checkpoint's manifest agree with the files that are there."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = [path for path in checkpoint.iterdir() if path.name != "manifest.json"]
    manifest["files"] = {path.name: script.file_hash(path) for path in files}
    del manifest["checksum"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_of_an_earlier_version_which_has_its_schedule_in_a_pickle_goes_on(run, uninterrupted, tmp_path):
    interrupt(uninterrupted, tmp_path / "out", keep=4)
    newest = tmp_path / "out" / "checkpoint-4-epoch-1"
    state = json.loads((newest / "scheduler.json").read_text())
    (newest / "scheduler.json").unlink()
    torch.save(state, newest / "custom_checkpoint_0.pkl")
    agree(newest)
    assert_equal_weights(run("out"), uninterrupted)
    assert metrics(tmp_path / "out", "learning_rate") == metrics(uninterrupted, "learning_rate")


def test_a_checkpoint_that_cannot_be_read_just_now_stops_the_run_and_stays(command, run, uninterrupted, tmp_path):
    interrupt(uninterrupted, tmp_path / "out", keep=4)
    file = tmp_path / "out" / "checkpoint-4-epoch-1" / "optimizer.bin"
    file.rename(tmp_path / "aside")
    file.symlink_to(file)  # reading fails, as with a permission or a disk that are not as they should be
    with pytest.raises(SystemExit, match=r"optimizer\.bin.*Run the same command again") as error:
        script.main(command())
    assert str(error.value).count("\n") == 0
    assert checkpoint_names(tmp_path / "out") == ["checkpoint-2-epoch-0", "checkpoint-4-epoch-1"]
    (tmp_path / "aside").rename(file)
    assert_equal_weights(run("out"), uninterrupted)


def test_without_a_whole_checkpoint_nothing_starts_until_overwriting_is_allowed(
    command, run, uninterrupted, tmp_path, monkeypatch
):
    interrupt(uninterrupted, tmp_path / "out", keep=4)
    names = checkpoint_names(tmp_path / "out")
    for name in names:
        (tmp_path / "out" / name / "optimizer.bin").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=", ".join(reversed(names)) + ".*--overwrite_output_dir"):
        script.main(command())
    present = []
    optimiser_step = script.optimiser_step
    monkeypatch.setattr(script, "optimiser_step", lambda *_: present.append(checkpoint_names(tmp_path / "out")))
    with pytest.raises(TypeError):  # it gives no loss
        script.main(command("out", "--overwrite_output_dir"))
    assert present == [names]  # they stay until a whole one is there
    monkeypatch.setattr(script, "optimiser_step", optimiser_step)
    assert_equal_weights(run("out", "--overwrite_output_dir"), uninterrupted)


@pytest.mark.timeout(300)  # what it guards against is waiting for ever
def test_signals_to_a_whole_process_group_do_not_reach_the_loader_even_as_it_starts(command, uninterrupted, tmp_path):
    process, told = launch(command("told", "--dataloader_num_workers", "2")), set()
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "forkserver" in " ".join(child.cmdline()) and child.pid not in told:
                    child.send_signal(signal.SIGTERM)
                    told.add(child.pid)
        time.sleep(0.005)
    finish(process)
    assert len(told) == 3  # the fork server and its two workers
    assert_equal_weights(tmp_path / "told", uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_its_status_and_the_same_command_goes_on(
    command, run, uninterrupted, tmp_path, monkeypatch, number
):
    """The signal comes right after the checkpoint of step 2: the next step is the last, and is saved."""
    save_checkpoint = script.save_checkpoint

    def save_and_be_told(training, *args) -> None:
        save_checkpoint(training, *args)
        if training.state.step == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(script, "save_checkpoint", save_and_be_told)
    assert script.main(command()) == 128 + number
    monkeypatch.undo()
    assert checkpoint_names(tmp_path / "out") == ["checkpoint-2-epoch-0", "checkpoint-3-epoch-0"]
    assert json.loads((tmp_path / "out" / "distillation.json").read_text())["status"] == "running"
    assert metrics(tmp_path / "out", "step") == [1, 2, 3]
    assert_equal_weights(run(), uninterrupted)
    assert metrics(tmp_path / "out") == metrics(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_the_same_command_goes_on_from_the_last_checkpoint(
    command, run, uninterrupted, tmp_path, monkeypatch, number
):
    optimiser_step = script.optimiser_step
    raised = []

    def be_told_twice(training, batches):
        if training.state.step == 3:
            signal.raise_signal(signal.SIGTERM)
            raised.append("one")
            signal.raise_signal(number)
            raised.append("two")
        return optimiser_step(training, batches)

    monkeypatch.setattr(script, "optimiser_step", be_told_twice)
    with pytest.raises(SystemExit) as stopped:
        script.main(command())
    assert (stopped.value.code, raised) == (128 + number, ["one"])
    monkeypatch.undo()
    assert checkpoint_names(tmp_path / "out") == ["checkpoint-2-epoch-0"]
    assert_equal_weights(run(), uninterrupted)


def test_a_handler_of_signals_formats_no_weights():
    """Python formats a handler to try whether it is one of its constants; a method brings its object, all of it."""

    class Weights:
        told = ()

        def __repr__(self):
            raise AssertionError("formatted")

        def stop(self, number, frame) -> None:
            self.told += (number,)

    before = signal.getsignal(signal.SIGTERM)
    weights = Weights()
    with script.stopped_by_signals(weights):
        signal.raise_signal(signal.SIGTERM)
    assert weights.told == (signal.SIGTERM,)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_finished_run_is_not_trained_again_and_more_epochs_go_on_from_it(run, uninterrupted, tmp_path, caplog):
    shutil.copytree(uninterrupted, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    run("out", "--overwrite_output_dir")
    assert "nothing is trained" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    assert_equal_weights(run("out", "--num_train_epochs", 3), run("straight", "--num_train_epochs", 3))


def test_a_finished_run_of_which_fewer_epochs_are_asked_for_stays_as_it_is(run, uninterrupted, tmp_path, caplog):
    output = shutil.copytree(uninterrupted, tmp_path / "out")
    record = (output / "distillation.json").read_bytes()
    run("out", "--num_train_epochs", 1)
    assert "nothing is trained" in caplog.text
    assert (output / "distillation.json").read_bytes() == record
    assert_equal_weights(output, uninterrupted)


def test_an_unfinished_run_that_has_gone_on_for_longer_than_is_asked_for_starts_afresh_only_with_leave(
    run, command, uninterrupted, tmp_path
):
    output = shutil.copytree(uninterrupted, tmp_path / "out")
    (output / "model.safetensors").unlink()
    less = ("--num_train_epochs", 1)
    for more in ((), ("--dry_run",)):
        with pytest.raises(SystemExit, match=r"holds later results \(.*checkpoint.*pass --overwrite_output_dir"):
            script.main(command("out", *less, *more))
    run("out", *less, "--overwrite_output_dir")
    assert metrics(output, "step") == [1, 2, 3]
    assert_equal_weights(output, run("fresh", *less))


def test_more_epochs_of_a_run_without_its_checkpoints_start_afresh_only_with_leave(
    run, command, uninterrupted, tmp_path
):
    output = shutil.copytree(uninterrupted, tmp_path / "out")
    for _, checkpoint in script.list_checkpoints(output):
        shutil.rmtree(checkpoint)
    more = ("--num_train_epochs", 3)
    with pytest.raises(SystemExit, match=r"holds later results \(.*model\.safetensors.*pass --overwrite_output_dir"):
        script.main(command("out", *more))
    assert_equal_weights(output, uninterrupted)
    run("out", *more, "--overwrite_output_dir")
    assert metrics(output, "step") == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert_equal_weights(output, run("fresh", *more))


def test_other_settings_are_refused_by_name_until_overwriting_is_allowed(run, command, uninterrupted, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(uninterrupted, output)
    for name in (".git", "other-init"):
        (output / name).mkdir()
        (output / name / "file").write_text("theirs")
    with pytest.raises(
        SystemExit, match=r"made with other settings: temperature was 2.0 and is now 3.0.*--overwrite_output_dir"
    ):
        script.main(command("out", "--temperature", 3))
    assert checkpoint_names(output)[-1] == "checkpoint-6-epoch-1"
    with pytest.raises(SystemExit, match=r"seed was 42 and is now 7"):
        script.main(command("new", "--resume_from_checkpoint", output / "checkpoint-4-epoch-1", "--seed", 7))
    run("out", "--temperature", 3, "--overwrite_output_dir", "--max_steps", 3)
    assert checkpoint_names(output) == ["checkpoint-2-epoch-0", "checkpoint-3-epoch-0"]
    assert (output / ".git" / "file").exists() and (output / "other-init" / "file").exists()
    assert_equal_weights(output, run("fresh", "--temperature", 3, "--max_steps", 3))


@pytest.mark.parametrize(
    "changed", ["global_batch_size", "steps", "train_data", "other rows", "student", "teacher", "learning_rate"]
)
def test_a_run_of_other_batches_rows_or_models_does_not_go_on_from_this_one(
    command, student, tiny_teacher, examples, linear, tmp_path, changed
):
    def other_model(model: Path) -> Path:
        copy = shutil.copytree(model, tmp_path / "model")
        whisper = WhisperForConditionalGeneration.from_pretrained(model)
        with torch.no_grad():
            whisper.model.decoder.layer_norm.bias += 0.1
        whisper.save_pretrained(copy)
        (copy / "student.json").unlink(missing_ok=True)  # it has the hashes of the weights before
        return copy

    def other_rows(rows: list[dict]) -> Path:
        return write_dataset(tmp_path / "rows", "tiny", "train", rows, VECTORIZED)

    end = examples[3]["labels"]
    relabelled = {**examples[3], "labels": [*end[:-2], end[-3], end[-1]]}  # as long as before
    assert relabelled["labels"] != end
    flags = {
        "global_batch_size": lambda: ("--per_device_train_batch_size", 2),
        "steps": lambda: ("--num_train_epochs", 3),
        "train_data": lambda: ("--train_dataset_name", other_rows([*examples[:3], relabelled, *examples[4:]])),
        "other rows": lambda: ("--train_dataset_name", other_rows(examples[:9])),
        "student": lambda: ("--model_name_or_path", other_model(student)),
        "teacher": lambda: ("--teacher_model_name_or_path", other_model(tiny_teacher)),
        "learning_rate": lambda: ("--learning_rate", 0.002),
    }
    shutil.copytree(linear, tmp_path / "out")
    name = {"other rows": "train_data"}.get(changed, changed)
    with pytest.raises(SystemExit, match=f"made with other settings: {name} was"):
        script.main(command("out", "--lr_scheduler_type", "linear", *flags[changed]()))


def test_the_same_rows_in_another_place_are_the_same_data(run, uninterrupted, examples, tmp_path, caplog):
    shutil.copytree(uninterrupted, tmp_path / "out")
    run("out", "--train_dataset_name", write_dataset(tmp_path / "moved", "tiny", "train", examples, VECTORIZED))
    assert "nothing is trained" in caplog.text


@pytest.fixture(scope="module")
def linear(uninterrupted, tmp_path_factory) -> Path:
    """The plain run, as if its schedule had been `linear`."""
    output = shutil.copytree(uninterrupted, tmp_path_factory.mktemp("linear") / "out")
    record = script.read_record(output / "distillation.json")
    record["settings"] |= {"lr_scheduler_type": "linear", "steps": 6}
    script.write_record(output / "distillation.json", record)
    return output


def test_a_checkpoint_can_be_named_and_starting_afresh_needs_leave(run, command, uninterrupted, tmp_path):
    assert_equal_weights(run("on", "--resume_from_checkpoint", uninterrupted / "checkpoint-4-epoch-1"), uninterrupted)
    assert metrics(tmp_path / "on", "step") == [5, 6]
    with pytest.raises(SystemExit, match=r"holds later results \(.*metrics\.jsonl"):  # all are of another run
        script.main(command("on", "--resume_from_checkpoint", uninterrupted / "checkpoint-4-epoch-1"))
    for value in ("False", "None"):
        with pytest.raises(SystemExit, match="holds later results"):
            script.main(command("on", "--resume_from_checkpoint", value))
    run("on", "--resume_from_checkpoint", "False", "--overwrite_output_dir")
    assert metrics(tmp_path / "on", "step") == [1, 2, 3, 4, 5, 6]


def test_a_run_may_go_back_to_a_checkpoint_of_its_own_which_stays(run, command, uninterrupted, tmp_path):
    output = shutil.copytree(uninterrupted, tmp_path / "out")
    back = ("--resume_from_checkpoint", output / "checkpoint-4-epoch-1")
    with pytest.raises(SystemExit, match=r"holds later results \(checkpoint-6-epoch-1\)"):
        script.main(command("out", *back))
    (output / "checkpoint-6-epoch-1" / "optimizer.bin").unlink()  # so that it has to be made again
    run("out", *back, "--overwrite_output_dir")
    assert checkpoint_names(output) == checkpoint_names(uninterrupted)
    assert (output / "checkpoint-6-epoch-1" / "optimizer.bin").exists()
    assert metrics(output) == metrics(uninterrupted)
    assert_equal_weights(output, uninterrupted)


def test_a_run_goes_on_with_its_batches_cut_into_other_micro_batches(run, uninterrupted, tmp_path):
    interrupt(uninterrupted, tmp_path / "out", keep=2)
    output = run("out", "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4)
    assert metrics(output) == pytest.approx(metrics(uninterrupted), rel=1e-5)
    assert_close_weights(output, uninterrupted, 2e-4)


def test_without_held_out_data_no_step_is_the_best_and_saved_for_that(run):
    output = run("out", "--eval_steps", 1, "--save_steps", 100, "--max_steps", 3)
    assert checkpoint_names(output) == ["checkpoint-3-epoch-0"]


def test_a_finished_model_is_not_made_again_when_its_card_is_edited(run, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text() + "\nmine\n")
    weights = tmp_path / "out" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    run("out")
    assert weights.stat().st_mtime_ns == written
    assert card.read_text().endswith("\nmine\n")


def test_only_the_newest_checkpoints_are_kept_whatever_was_there(run, tmp_path):
    output = run("out", "--save_total_limit", 1, "--max_steps", 3)
    assert checkpoint_names(output) == ["checkpoint-3-epoch-0"]
    (output / "checkpoint-900-epoch-9").mkdir()
    run("out", "--save_total_limit", 1)
    assert checkpoint_names(output) == ["checkpoint-6-epoch-1"]


# ---- a dry run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(command, tmp_path, capsys):
    """What a dry run says, line by line; it must not write anything."""

    def dry_run(*more: str) -> dict[str, str]:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert script.main(command("out", *more, "--dry_run")) == 0
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    return dry_run


def test_a_dry_run_reads_no_weights_and_says_what_would_happen(
    plan, run, student, tiny_teacher, uninterrupted, vectorized, examples, tmp_path
):
    for name, model in (("student", student), ("teacher", tiny_teacher)):
        shutil.copytree(model, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    models = ("--model_name_or_path", tmp_path / "student", "--teacher_model_name_or_path", tmp_path / "teacher")
    said = plan(*models, "--cache_encoder_outputs", tmp_path / "cache", "--save_total_limit", 2)
    hours = sum(example["input_length"] for example in examples) / 16_000 / 3600
    assert said["input"].startswith(f"{vectorized}, 10 rows, {hours:.2f} h, ")
    assert said["work"] == "6 steps of 4 rows, 3 an epoch" and said["done"] == "0 of 6 steps"
    assert said["pushes"] == "nothing"
    assert re.fullmatch(r"6 steps, 0\.00 h at \d\.\d{3} s a step \(measured on this cpu\)", said["left"])
    assert len(re.findall(r"[1-9]\d*\.\d", said["rates"])) == 2

    size = sum(path.stat().st_size for path in (uninterrupted / "checkpoint-6-epoch-1").iterdir()) / 1e9
    model = (uninterrupted / "model.safetensors").stat().st_size / 1e9
    assert said["writes"] == f"{tmp_path}/out, the model of {model:.2f} GB, 2 checkpoints of {size:.2f} GB each"
    interrupt(uninterrupted, tmp_path / "out", keep=4)
    assert plan(*models)["done"] == "4 of 6 steps (checkpoint-4-epoch-1)"
    with pytest.raises(SystemExit, match=r"temperature was 2.0 and is now 3.0"):
        plan(*models, "--temperature", 3)
    removed = plan(*models, "--temperature", 3, "--overwrite_output_dir")["removes"]
    assert "checkpoint-2-epoch-0" in removed and "metrics.jsonl" in removed
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(uninterrupted, tmp_path / "out")
    assert plan(*models)["done"] == "6 of 6 steps"


def test_a_dry_run_of_two_processes_tells_the_rates_of_one(plan, monkeypatch):
    make_plan = script.Plan
    monkeypatch.setattr(script, "Plan", lambda **fields: make_plan(**fields | {"processes": 2}))
    monkeypatch.setattr(script, "measure_steps", lambda training: (0.5, 2.0))  # s to load four rows, and of a step
    said = plan("--gradient_accumulation_steps", 3)
    assert said["work"].endswith(" steps of 24 rows, 1 an epoch")
    assert said["rates"] == "a training process takes 6.0 rows/s, a process that loads gives 8.0"


def test_a_dry_run_of_an_evaluation_says_what_is_held_out(plan, vectorized):
    said = plan("--do_train", "False", "--eval_dataset_name", vectorized, "--eval_max_samples", 3)
    assert said.keys() == {"input"}
    assert said["input"].startswith(f"{vectorized}, ") and ", 3 rows, " in f", {said['input']}"


def test_epochs_may_be_parts_and_steps_come_before_them(plan):
    assert plan("--num_train_epochs", 0.5)["work"] == "2 steps of 4 rows, 3 an epoch"
    assert plan("--max_steps", 5)["work"] == "5 steps of 4 rows, 3 an epoch"


def test_no_label_is_longer_than_the_decoder_whatever_is_asked_for(plan, examples, processor, tmp_path):
    rows = [examples[0], pack(examples, processor, 449)]
    data = write_dataset(tmp_path / "long", "tiny", "train", rows, VECTORIZED)
    said = plan("--train_dataset_name", data, "--max_label_length", 1000)
    assert said["input"].endswith("1 rows left out")


@pytest.mark.parametrize("dataset", ["acme/no-such-dataset", "empty"])
def test_a_dry_run_on_a_dataset_that_is_not_there_is_one_line(dataset, command, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=f"error: reading {dataset} "):
        script.main(command("out", "--train_dataset_name", dataset, "--dry_run"))


def test_a_dry_run_on_the_hub_reads_a_few_columns_and_makes_no_repository(plan, hub, vectorized, student, tmp_path):
    from huggingface_hub import HfApi

    api = HfApi()
    for repository, folder, kind in (("acme/windows", vectorized, "dataset"), ("acme/init", student, "model")):
        api.create_repo(repository, repo_type=kind)
        api.upload_folder(repo_id=repository, folder_path=folder, repo_type=kind)
    card = "---\nconfigs:\n- config_name: tiny\n  data_files:\n  - split: train\n    path: tiny/train-*\n---\n"
    api.upload_file(
        path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="acme/windows", repo_type="dataset"
    )
    given = ("--train_dataset_name", "acme/windows", "--model_name_or_path", "acme/init", "--push_to_hub")
    said = plan(*given, "--hub_model_id", "acme/planned")
    assert said["input"].startswith("acme/windows, 10 rows") and said["pushes"].startswith("acme/planned")
    assert not api.repo_exists("acme/planned")
    with pytest.raises(SystemExit, match="cannot create bob/model: it belongs to somebody else"):
        plan(*given, "--hub_model_id", "bob/model")
    with pytest.raises(SystemExit, match=r"acme/windows .* has no split 'validation'"):
        plan(*given, "--train_split_name", "validation")


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_cached_encoder_outputs_give_the_same_losses_and_are_used_again(
    run, uninterrupted, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(script, "CACHE_BLOCK", 8)
    output = run("cached", "--cache_encoder_outputs", tmp_path / "cache")
    assert metrics(output) == pytest.approx(metrics(uninterrupted), rel=1e-5)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    content = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert sorted(path.name for path in files) == ["0.safetensors", "1.safetensors"]
    caplog.clear()
    again = run("again", "--cache_encoder_outputs", tmp_path / "cache", "--learning_rate", 0.001)
    assert "0.00 GB to write" in caplog.text
    assert all(path.stat().st_mtime_ns == content[path][1] for path in files)
    files[0].rename(files[0].with_name(f".{files[0].name}.partial"))  # as a kill leaves it
    flags = ("--cache_encoder_outputs", tmp_path / "cache", "--learning_rate", 0.001)
    assert_equal_weights(run("finished", *flags), again)
    assert all(path.read_bytes() == content[path][0] for path in files)


def test_a_cache_that_another_run_is_filling_is_waited_for(command, run, tmp_path):
    cached = ["--cache_encoder_outputs", str(tmp_path / "cache")]
    first = run("first", *cached)
    (lock,) = (tmp_path / "cache").glob("*/.lock")
    with another_run([lock]) as holder:
        process = launch(command("second", *cached))
        while "another run is writing" not in (line := process.stderr.readline()):
            assert line, "it ended without waiting"
        holder.stdin.close()
        process.stderr.read()
        assert process.wait() == 0
    assert_equal_weights(tmp_path / "second", first)


def test_another_teacher_other_data_other_rows_or_another_precision_is_another_cache(
    run, examples, tiny_teacher, tmp_path
):
    flags = ("--cache_encoder_outputs", tmp_path / "cache", "--max_steps", 1)
    run("one", *flags)
    model = WhisperForConditionalGeneration.from_pretrained(tiny_teacher)
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias += 0.1
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    model.save_pretrained(tmp_path / "teacher")
    run("two", *flags, "--teacher_model_name_or_path", tmp_path / "teacher")
    louder = [
        {**row, "input_features": (np.frombuffer(row["input_features"], "<f2") + np.float16(0.1)).tobytes()}
        for row in examples
    ]
    run(
        "three", *flags, "--train_dataset_name", write_dataset(tmp_path / "louder", "tiny", "train", louder, VECTORIZED)
    )
    longest = max(len(row["labels"]) for row in examples)
    run("four", *flags, "--max_label_length", longest - 1)  # the rows behind the one that is left out move up
    assert len(list((tmp_path / "cache").iterdir())) == 4
    forget_processes()
    run("five", *flags, "--dtype", "bfloat16")
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_a_cache_that_the_disk_has_no_room_for_is_refused_with_the_space_it_needs(command, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(SystemExit, match=r"needs 0\.0\d* GB .* has 0\.0"):
        script.main(command("out", "--cache_encoder_outputs", tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# ---- held-out evaluation ---------------------------------------------------------------------------------------------


def test_held_out_rows_are_scored_as_an_independent_computation_does(
    run, examples, vectorized, processor, tiny_teacher
):
    flags = (
        "--eval_dataset_name",
        vectorized,
        "--eval_steps",
        2,
        "--save_total_limit",
        1,
        "--metric_for_best_model",
        "loss",
    )
    recipe = ("--ce_weight", 0.3, "--kl_weight", 0.7, "--temperature", 3)
    output = run("out", *flags, *recipe, "--max_steps", 4, "--max_label_length", 64)
    losses = metrics(output, "eval_loss")
    assert [
        json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines() if "eval_loss" in line
    ] == [0, 2, 4]
    record = json.loads((output / "distillation.json").read_text())
    best = {2: losses[1], 4: losses[2]}
    assert record["best"] == {"step": min(best, key=best.get), "figure": min(best.values())}
    normalise, tokenizer = BasicTextNormalizer(), processor.tokenizer
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    for name, model_path in (("student", output), ("teacher", tiny_teacher)):
        model = WhisperForConditionalGeneration.from_pretrained(model_path).eval()
        references, hypotheses = [], []
        for row in examples[:4]:
            labels = row["labels"][row["labels"].index(start) :]
            references.append(normalise(tokenizer.decode(labels, skip_special_tokens=True)).replace(" ", ""))
            features = torch.tensor(row["log_mel"].astype(np.float16)[None]).float()
            ids = model.generate(
                features, language="ja", task="transcribe", max_length=64, force_unique_generate_call=True
            )
            hypotheses.append(normalise(tokenizer.decode(ids[0], skip_special_tokens=True)).replace(" ", ""))
        figures = (
            record["teacher_evaluation"]
            if name == "teacher"
            else {n: metrics(output, n)[-1] for n in ("eval_cer", "eval_wer")}
        )
        assert figures["eval_wer"] == pytest.approx(100 * jiwer.wer(references, hypotheses))
        assert figures["eval_cer"] == pytest.approx(100 * jiwer.cer(references, hypotheses))
    card = (output / "README.md").read_text()
    assert f"Held out, on {vectorized.name} (test), greedy, normalised:\n\n| step |" in card
    teacher, trained = (WhisperForConditionalGeneration.from_pretrained(path).eval() for path in (tiny_teacher, output))
    with torch.no_grad():
        expected = plain_rows(examples, range(4), teacher, trained, processor, (0.3, 0.7, 3.0))
    found = [metrics(output, name)[-1] for name in ("eval_ce", "eval_kl", "eval_loss")]
    assert found == pytest.approx([float(value) for value in expected], rel=1e-4)
    assert record["teacher_evaluation"]["eval_kl"] == pytest.approx(0, abs=1e-6)


def test_held_out_english_is_scored_as_the_evaluation_scores_it(run, examples, processor, tmp_path):
    """By Whisper's normaliser for English; a clip of which that leaves nothing does not count."""
    texts = ["Mr. Colour paid twenty-one pounds", "it's a colour", "(laughs)"]
    schema = VECTORIZED.append(pa.field("text", pa.string()))
    rows = [{**row, "text": text} for row, text in zip(examples, texts, strict=False)]
    data = write_dataset(tmp_path / "english", "default", "test", rows, schema)
    flags = ("--language", "en", "--eval_dataset_name", data, "--max_label_length", 60, "--max_steps", 1)
    output = run("out", *flags)
    model = WhisperForConditionalGeneration.from_pretrained(output).eval()
    tokenizer = processor.tokenizer
    normalise = EnglishTextNormalizer(tokenizer.english_spelling_normalizer or {})
    assert [normalise(text) for text in texts] == ["mister colour paid £21", "it is a colour", ""]
    hypotheses = []
    for row in rows[:2]:
        features = torch.tensor(row["log_mel"].astype(np.float16)[None]).float()
        ids = model.generate(features, language="en", max_length=60, force_unique_generate_call=True)
        hypotheses.append(normalise(tokenizer.decode(ids[0], skip_special_tokens=True)))
    references = [normalise(text) for text in texts[:2]]
    assert metrics(output, "eval_wer")[-1] == pytest.approx(100 * jiwer.wer(references, hypotheses))
    assert metrics(output, "eval_cer")[-1] == pytest.approx(100 * jiwer.cer(references, hypotheses))


def test_without_training_the_student_and_the_teacher_are_evaluated_and_nothing_else_is_written(
    run, command, uninterrupted, vectorized, tmp_path, caplog
):
    held_out = ("--eval_dataset_name", vectorized, "--eval_max_samples", 3, "--max_label_length", 60)
    expected = run("trained", *held_out, "--max_steps", 1)
    trained = json.loads((expected / "distillation.json").read_text())
    caplog.clear()
    output = run("evaluated", *held_out, "--do_train", "False", "--push_to_hub", "--hub_model_id", "acme/not-pushed")
    assert sorted(path.name for path in output.iterdir()) == [".training.lock", "evaluation.json"]
    figures = json.loads((output / "evaluation.json").read_text())
    assert figures["teacher"] == trained["teacher_evaluation"]
    for name, value in figures["student"].items():
        assert value == pytest.approx(metrics(expected, name)[0])  # before the first step
    assert "held-out rows, teacher: CER" in caplog.text and "held-out rows, student: CER" in caplog.text


@pytest.mark.parametrize("flags", [(), ("--do_train", "False")])
def test_held_out_audio_that_is_lost_after_the_start_ends_the_run_in_one_line(
    command, examples, tmp_path, monkeypatch, caplog, flags
):
    monkeypatch.setattr(script.Rows, "require_audio", lambda rows: None)  # it could be read then
    broken = [{**example, "audio": {"bytes": b"not audio", "path": "broken.flac"}} for example in examples[:2]]
    data = write_dataset(tmp_path / "broken", "default", "test", broken, AUDIO)
    with pytest.raises(SystemExit, match=f"no held-out clip of {data} can be read: the warnings above") as error:
        script.main(command("out", "--eval_dataset_name", data, "--max_label_length", 60, *flags))
    assert "\n" not in str(error.value)
    assert caplog.text.count("unreadable audio, left out of the loss") == 2


class Tracker:
    """A tracker that takes tables."""

    name = "tables"

    def __init__(self):
        self.tables = []

    def log(self, values, step, **options):
        pass

    def log_table(self, name, columns, data, step):
        self.tables.append((columns, data, step))

    def finish(self):
        pass


def test_what_the_student_says_of_a_few_held_out_rows_is_written_down_and_shown_in_a_tracker(
    run, vectorized, monkeypatch
):
    tracker = Tracker()
    monkeypatch.setattr(script, "start_tracker", lambda accelerator, *_: accelerator.trackers.append(tracker))
    monkeypatch.setattr(script, "LOGGED_PREDICTIONS", 2)
    held_out = ("--eval_dataset_name", vectorized, "--eval_steps", 1, "--eval_max_samples", 3, "--max_label_length", 60)
    output = run("straight", *held_out, "--max_steps", 2)
    entries = script.read_entries(output / "held_out_predictions.jsonl")
    assert [entry["step"] for entry in entries] == [0, 1, 2]
    for entry in entries:
        assert [prediction["row"] for prediction in entry["predictions"]] == [0, 1]
        assert all(prediction["reference"] for prediction in entry["predictions"])
    for step, (columns, data, table_step) in enumerate(tracker.tables):
        assert (columns, table_step) == (["row", "reference", "hypothesis"], step)
        assert data == [list(prediction.values()) for prediction in entries[step]["predictions"]]
    assert len(tracker.tables) == 3
    script.clean_output(script.Start(script.TrainingState(step=1)), output)
    assert script.read_entries(output / "held_out_predictions.jsonl") == entries[:2]


@pytest.mark.parametrize(
    ("method", "warning", "warnings"),
    [("log", "the tracker does not work any more and is left out", 1), ("log_table", "the tracker takes no table", 3)],
)
def test_a_tracker_that_fails_during_a_training_stops_nothing(
    run, vectorized, monkeypatch, caplog, method, warning, warnings
):
    tracker = Tracker()
    logged = []
    tracker.log = lambda values, step, **options: logged.append(values)

    def refuse(*given, **options) -> None:
        logged.append("refused")
        raise ValueError("the server is away\nmore")

    setattr(tracker, method, refuse)
    monkeypatch.setattr(script, "start_tracker", lambda accelerator, *_: accelerator.trackers.append(tracker))
    held_out = ("--eval_dataset_name", vectorized, "--eval_steps", 1, "--eval_max_samples", 1, "--max_label_length", 60)
    output = run("out", *held_out, "--max_steps", 2)
    assert caplog.text.count(f"{warning}: the server is away\n") == logged.count("refused") == warnings
    assert len(metrics(output)) == 2 and len(metrics(output, "eval_loss")) == 3
    figures = [entry for entry in logged if entry != "refused"]
    assert bool(figures) == (method == "log_table")


@pytest.mark.parametrize(("figure", "best"), [("loss", 1), ("wer", 2), ("cer", 3)])
def test_the_best_checkpoint_is_chosen_by_the_figure_asked_for(run, vectorized, monkeypatch, figure, best):
    """The weights stay as they are, and so does the loss: of equals the first is the best."""
    cer, wer = iter([0.9, 0.8, 0.7, 0.6, 0.5]), iter([0.9, 0.8, 0.7, 0.5, 0.6])  # teacher, steps 0 to 3
    monkeypatch.setattr(script.jiwer, "cer", lambda *_: next(cer))
    monkeypatch.setattr(script.jiwer, "wer", lambda *_: next(wer))
    flags = f"--eval_dataset_name {vectorized} --eval_steps 1 --eval_max_samples 2 --save_total_limit 1"
    flags += f" --metric_for_best_model {figure} --max_label_length 60 --max_steps 3 --learning_rate 0"
    output = run("out", *flags.split())
    expected = {"loss": metrics(output, "eval_loss")[1], "wer": 50.0, "cer": 50.0}[figure]
    record = json.loads((output / "distillation.json").read_text())
    assert record["best"] == {"step": best, "figure": expected}
    assert [step for step, _ in script.list_checkpoints(output)] == sorted({best, 3})


def test_held_out_audio_without_labels_is_scored_against_its_text(run, clips, examples, processor, tmp_path):
    schema = pa.schema([AUDIO.field("audio"), ("transcription", pa.string())])
    texts = [clip["transcription"] for clip in clips[2::-1]]  # not those of the audio
    rows = [
        {"audio": {"bytes": clip["audio"], "path": clip["name"]}, "transcription": text}
        for clip, text in zip(clips, texts, strict=False)
    ]
    data = write_dataset(tmp_path / "held", "default", "test", rows, schema)
    output = run("out", "--eval_dataset_name", data, "--max_label_length", 60, "--max_steps", 1)
    model = WhisperForConditionalGeneration.from_pretrained(output).eval()
    given = {"language": "ja", "max_length": 60, "force_unique_generate_call": True}
    pairs = []
    for example, text in zip(examples, texts, strict=False):
        features = torch.tensor(example["log_mel"].astype(np.float16)[None]).float()
        said = processor.tokenizer.decode(model.generate(features, **given)[0], skip_special_tokens=True)
        pairs.append([BasicTextNormalizer()(text).replace(" ", "") for text in (text, said)])
    references, hypotheses = map(list, zip(*pairs, strict=True))
    assert len(metrics(output, "eval_cer")) == 2
    assert metrics(output, "eval_cer")[-1] == pytest.approx(100 * jiwer.cer(references, hypotheses))
    assert metrics(output, "eval_wer")[-1] == pytest.approx(100 * jiwer.wer(references, hypotheses))


# ---- the Hub and trackers --------------------------------------------------------------------------------------------


def test_the_result_is_pushed_with_its_student_and_a_second_run_only_pushes_what_is_missing(
    command, student, tmp_path, hub, caplog
):
    from huggingface_hub import HfApi

    api, output = HfApi(), tmp_path / "kotoba"
    output.mkdir(parents=True)
    shutil.copytree(student, output / "kotoba-init")
    (output / "private-notes.txt").write_text("not ours to push")
    arguments = command("kotoba", "--model_name_or_path", output / "kotoba-init", "--push_to_hub", "--max_steps", 4)
    subprocess.run(["git", "init", "--quiet", output], check=True)
    remote = ["git", "-C", output, "remote", "add", "origin", f"{hub.url}/acme/kotoba"]
    subprocess.run(remote, check=True)
    assert script.main(arguments) == 0
    there = set(api.list_repo_files("acme/kotoba"))
    assert {
        "model.safetensors",
        "README.md",
        "distillation.json",
        "run_distillation.py",
        "kotoba-init/model.safetensors",
    } <= there
    assert not [name for name in there if name.startswith("checkpoint-")] and "private-notes.txt" not in there
    assert len(api.list_repo_commits("acme/kotoba")) >= 2
    api.delete_file("model.safetensors", "acme/kotoba")
    hub.fault("acme/kotoba/commit/", method="POST", times=1, status=412)  # another push came between
    assert script.main(arguments) == 0
    assert "nothing is trained" in caplog.text and api.file_exists("acme/kotoba", "model.safetensors")


def test_a_push_that_fails_in_the_background_does_not_stop_training_and_at_the_end_it_says_what_to_do(
    command, tmp_path, hub, caplog
):
    arguments = command("alice-model", "--push_to_hub", "--hub_model_id", "alice/broken", "--max_steps", 3)
    arguments += ["--logging_steps", "3"]  # so that there is nothing to draw at the first save
    hub.fault("/commit/|/preupload/", method="POST", times=1000, status=403)
    with pytest.raises(SystemExit, match=r"the push to alice/broken failed.*Run the same command again"):
        script.main(arguments)
    assert (tmp_path / "alice-model" / "model.safetensors").exists()
    hub.faults.clear()
    assert script.main(arguments) == 0


def test_while_a_push_runs_nothing_is_written_for_another_and_the_next_save_pushes_again(monkeypatch, caplog):
    started = []
    written = []
    monkeypatch.setattr(HfApi, "run_as_future", lambda _, push, *given: started.append(Future()) or started[-1])
    monkeypatch.setattr(script, "write_model", lambda training, changes: written.append(changes["steps"]))
    training = argparse.Namespace(repo_id="acme/model", push=None, state=script.TrainingState(step=1), args=None)
    script.push_progress(training)
    training.state.step = 2
    script.push_progress(training)
    assert written == [1] and training.push is started[0]
    started[0].set_exception(OSError("the line is down"))
    training.state.step = 3
    script.push_progress(training)
    assert written == [1, 3] and training.push is started[1]
    assert "a push to acme/model failed, training goes on: the line is down" in caplog.text
    started[1].set_result(None)
    assert not script.is_pushing(training)


def test_the_trained_model_is_written_when_the_push_before_has_ended(monkeypatch, tmp_path):
    push = Future()
    args = argparse.Namespace(output_dir=tmp_path)
    data = argparse.Namespace(total_steps=1)
    training = argparse.Namespace(repo_id="acme/model", push=push, state=script.TrainingState(), args=args, data=data)
    written = []
    monkeypatch.setattr(script, "write_model", lambda *_: written.append(push.done()))
    threading.Timer(0.5, push.set_result, [None]).start()
    script.finish_training(training, time.monotonic())
    assert written == [True]


def test_a_token_that_may_not_write_is_refused_before_the_work(command, tmp_path, hub):
    with pytest.raises(SystemExit, match="hf auth login"):
        script.main(command("out", "--push_to_hub", "--hub_model_id", "bob/model"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".training.lock"]


def test_a_tracker_without_login_goes_offline_with_one_warning(run, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    output = run("out", "--report_to", "wandb", "--wandb_project", "wandb", "--max_steps", 2)
    monkeypatch.undo()
    assert caplog.text.count("no login") == 1
    assert list((output / "wandb").glob("offline-run-*")) and len(metrics(output)) == 2


def test_a_tracker_is_online_with_a_login_and_offline_where_it_refuses_one(monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE")
    asked = []
    monkeypatch.setattr(wandb, "login", lambda **options: asked.append(options) or True)
    assert script.wandb_mode("out") == "online"
    assert asked == [{"prompt": False, "timeout": 20}]  # it must not wait for an answer
    assert not caplog.text

    def refuse(**options):
        raise wandb.errors.AuthenticationError("the key is not valid\nmore")

    monkeypatch.setattr(wandb, "login", refuse)
    assert script.wandb_mode("out") == "offline"
    assert "wandb: the key is not valid\n" in caplog.text
    assert caplog.text.count("wandb has no login (`wandb login`): its files stay in out/wandb") == 1


def test_tensorboard_gets_the_figures_and_a_tracker_that_is_not_installed_one_warning(run, caplog):
    assert list(run("board", "--report_to", "tensorboard", "--max_steps", 1).rglob("events.out.tfevents.*"))
    forget_processes()
    run("none", "--report_to", "trackio", "--max_steps", 1)
    assert "--report_to trackio" in caplog.text


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--do_train", "False"], "nothing to do"),
        (["--train_split_name", "validation"], "has no split 'validation'; it has train"),
        (["--train_dataset_name", "no/such/place"], "neither a directory that exists nor a Hub id"),
        (["--language", "xx"], "has no such language"),
        (["--train_dataset_config_name", "a+b"], "names 2 for 1 datasets"),
        (["--train_dataset_samples", "1+2"], "one positive number for each dataset"),
        (["--freeze_encoder", "False", "--cache_encoder_outputs", "c"], "needs --freeze_encoder"),
        (["--dtype", "float16"], "needs a GPU"),
        (["--max_label_length", "3"], "none of the 10 rows"),
        (["--resume_from_checkpoint", "no-such-checkpoint"], "is no complete checkpoint"),
        (["--model_name_or_path", "acme/no-such-model"], "acme/no-such-model failed"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(command, flags, message):
    with pytest.raises(SystemExit, match=message) as error:
        script.main(command("out", *flags))
    assert "\n" not in str(error.value) and str(error.value).startswith("run_distillation.py: error: ")


@pytest.mark.parametrize("engine", ["DeepSpeed", "FSDP"])
def test_engines_whose_checkpoints_have_other_forms_are_refused(command, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    with pytest.raises(SystemExit, match=f"{engine} is not supported: train by DDP"):
        script.main(command())


def test_models_and_data_that_do_not_fit_together_are_refused(command, examples, tiny_teacher_v2, tmp_path):
    with pytest.raises(SystemExit, match=r"vocab_size is .* in the student, .* in the teacher"):
        script.main(command("out", "--teacher_model_name_or_path", tiny_teacher_v2))
    other = [
        {**row, "input_features": np.zeros((len(row["input_features"]) // 256, 80), "<f2").tobytes()}
        for row in examples
    ]
    with pytest.raises(SystemExit, match="log-mels of 80 bins, the student needs 128"):
        script.main(
            command("out", "--train_dataset_name", write_dataset(tmp_path / "v2", "tiny", "train", other, VECTORIZED))
        )
    columns = pa.schema([("labels", pa.list_(pa.int32())), ("text", pa.string())])
    with pytest.raises(
        SystemExit, match=r"needs labels or a column of texts .*, and input_features or audio: it has labels, text"
    ):
        script.main(
            command(
                "out", "--train_dataset_name", write_dataset(tmp_path / "text", "tiny", "train", examples[:2], columns)
            )
        )
    strings = pa.schema([("input_features", pa.binary()), ("labels", pa.string())])
    rows = [{**row, "labels": "text"} for row in examples[:2]]
    with pytest.raises(SystemExit, match="labels are string, not token ids"):
        script.main(
            command("out", "--train_dataset_name", write_dataset(tmp_path / "strings", "tiny", "train", rows, strings))
        )


def test_the_seeds_command_is_accepted(capsys):
    seed = """--model_name_or_path org/init --teacher_model_name_or_path openai/whisper-large-v3 --train_dataset_name
    org/data.wer_10.0.vectorized --train_dataset_config_name tiny --language ja --max_label_length 128
    --train_split_name train --save_steps 2500 --warmup_steps 50 --learning_rate 0.0001 --lr_scheduler_type
    constant_with_warmup --logging_steps 50 --save_total_limit 1 --per_device_train_batch_size 16
    --gradient_accumulation_steps 2 --preprocessing_num_workers 64 --dataloader_num_workers 1 --dtype bfloat16
    --output_dir ./ --wandb_project wandb --gradient_checkpointing --freeze_encoder --push_to_hub --do_train
    --overwrite_output_dir --num_train_epochs 8"""
    args = script.parse_args(seed.split())
    assert (
        args.gradient_checkpointing
        and args.freeze_encoder
        and args.push_to_hub
        and args.resume_from_checkpoint == "auto"
    )
    with pytest.raises(SystemExit) as error:
        script.parse_args([*seed.split(), "--no_such_flag"])
    assert error.value.code == 2
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    assert "--kl_weight" in capsys.readouterr().out


# ---- flags that contradict each other --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--do_train --train_dataset_name d", None),
        ("--do_train --eval_dataset_name d", "nothing to do"),
        ("--eval_dataset_name d", None),
        ("--train_dataset_name d", "nothing to do"),
        ("--eval_dataset_name d --cache_encoder_outputs c", "needs --freeze_encoder"),
        ("--eval_dataset_name d --cache_encoder_outputs c --freeze_encoder", None),
        ("--eval_dataset_name d --cache_encoder_outputs c --freeze_encoder --kl_weight 0", "with --kl_weight 0"),
        ("--do_train --train_dataset_name d --lr_scheduler_type greedy", "greedy follows the held-out loss"),
        ("--do_train --train_dataset_name d --eval_dataset_name d --lr_scheduler_type greedy", None),
        ("--do_train --train_dataset_name d --lr_scheduler_type cosine", None),
        ("--eval_dataset_name d --dtype float16", "--dtype float16 needs a GPU"),
        ("--eval_dataset_name d --dtype bfloat16", None),
        ("--eval_dataset_name d --output_dir m", "--output_dir m is the student to start from"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_and_others_are_not(flags, problem):
    needed = "--model_name_or_path m --teacher_model_name_or_path t --output_dir o"
    args = script.parse_args([*needed.split(), *flags.split()])
    with contextlib.nullcontext() if problem is None else pytest.raises(SystemExit, match=problem):
        script.refuse_contradictions(args)


ENGINES = [("FSDP", "true", True), ("DEEPSPEED", "true", True), ("FSDP", "false", False)]


@pytest.mark.parametrize(("engine", "value", "is_refused"), ENGINES)
def test_engines_with_checkpoints_of_another_form_are_refused(monkeypatch, engine, value, is_refused):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", value)
    flags = "--model_name_or_path m --kl_weight 0 --output_dir o --eval_dataset_name d"
    args = script.parse_args(flags.split())
    with pytest.raises(SystemExit, match="is not supported") if is_refused else contextlib.nullcontext():
        script.refuse_contradictions(args)
