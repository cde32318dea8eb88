"""What the scripts tell in figures, against another computation of them: plans, records, trackers, logs and cards.

The sizes and times of a plan are those of large files and slow devices that are made up here, because those of the
sandbox would all be rounded to nothing.
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import types
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import soundfile
import torch
from accelerate import PartialState
from transformers import WhisperConfig, WhisperForConditionalGeneration

import create_student_model
import reazonspeech_manual_dataloader
import reazonspeech_manual_downloader
import run_data_filtering
import run_distillation
import run_pseudo_labelling
import run_short_form_eval
from tests.stages import (
    distil,
    evaluate,
    filter_clips,
    initialise,
    label,
    make_label,
    read_metrics,
    read_rows,
    tone,
    write_dataset,
)

HASH = re.compile(r"[0-9a-f]{16}")


def record_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def without_digests(settings: dict) -> dict:
    """The settings, and `...` for those that are a digest."""
    return {name: ... if HASH.fullmatch(str(value)) else value for name, value in settings.items()}


def told(capsys) -> dict[str, str]:
    """What a plan says, by the word before the colon."""
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that all scripts see, in seconds; it stands still unless a test sets it."""
    seconds = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: seconds[0])
    monkeypatch.setattr("time.perf_counter", lambda: seconds[0])
    return seconds


def taking(seconds: float, clock: list[float], call):
    """A function that takes so long by the clock of the test."""

    def timed(*args, **options):
        clock[0] += seconds
        return call(*args, **options)

    return timed


# ---- labelling -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speech(clips, tmp_path_factory) -> list[dict]:
    """Nine clips; the third is no audio and the sixth is over 30 s long."""
    rows = [{"name": c["name"], "sound": c["audio"], "sentence": c["transcription"]} for c in clips[:9]]
    rows[2] = rows[2] | {"name": "broken", "sound": b"no audio" * 100_000}
    rows[5] = rows[5] | {"name": "long", "sound": tone(31)}
    return rows


def seconds_of(row: dict) -> float:
    return 0.0 if row["name"] == "broken" else soundfile.info(io.BytesIO(row["sound"])).duration


LABELLING = {
    "audio_column_name": "sound",
    "id_column_name": "name",
    "shard_size": 3,
    "dtype": "float32",
    "return_timestamps": True,
    "generation_num_beams": 2,
    "max_label_length": 12,
    "decode_token_ids": False,
    "scores": True,
    "language": "ja",
    "task": "translate",
    "attention": "eager",
    "rows": 8,
    "dataset_digest": ...,
    "teacher_digest": ...,
    "split": "train[:9]",
}
LABELLING_FLAGS = [
    *("--audio_column_name", "sound", "--id_column_name", "name", "--shard_size", 3, "--dtype", "float32"),
    *("--return_timestamps", "--generation_num_beams", 2, "--max_label_length", 12, "--scores", "--language", "ja"),
    *("--task", "translate", "--attn_type", "eager", "--max_samples", 8, "--dataset_split_name", "train[:9]"),
    *("--text_column_name", "sentence", "--per_device_eval_batch_size", 1, "--logging_steps", 1),
]
SHARDS = "default/train.to_9-{:05d}-of-00003.parquet"
LABELLING_RECORD = "labelling.default.train.to_9.json"


@pytest.fixture(scope="module")
def labelling(tiny_teacher, speech, tmp_path_factory):
    """Eight rows in three shards, labelled by a teacher that takes two seconds a clip: dataset, output and reports."""
    place = tmp_path_factory.mktemp("labelling")
    dataset = write_dataset(place / "speech", speech)
    seconds = [0.0]
    reports = []
    make_labels = run_pseudo_labelling.label_clips

    def slow_labels(*args):
        for result in make_labels(*args):
            seconds[0] += 2
            yield result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: seconds[0])
        patch.setattr(run_pseudo_labelling, "label_clips", slow_labels)
        patch.setattr(run_pseudo_labelling, "track", lambda _, values, step: reports.append({"step": step, **values}))
        label(tiny_teacher, dataset, place / "out", *LABELLING_FLAGS)
    return dataset, place / "out", reports


def test_the_record_of_a_labelling_has_every_setting_and_the_sums_of_all_rows(labelling, speech, tiny_teacher):
    _, output, _ = labelling
    record = record_of(output / LABELLING_RECORD)
    assert without_digests(record["settings"]) == LABELLING
    found = read_rows(output, split="train.to_9")
    expected = {
        "rows_in": 8,
        "rows_out": 7,
        "over_30_s": 1,
        "unusable_rows": 1,
        "status": "complete",
        "tokens": sum(len(row["whisper_transcript"]) for row in found),
        "hours": round(sum(map(seconds_of, speech[:8])) / 3600, 4),
    }
    assert {name: record[name] for name in expected} == expected
    assert [name for name, _ in record["unusable"]] == ["broken"]
    run = {"clips": 8, "wall_seconds": 14.0, "clips_per_second": 8 / 14, "processes": 1}
    assert record["last_run"] == run
    card = (output / "README.md").read_text()
    cells = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", card, re.MULTILINE))
    total = {name: record[name] for name in ("truncated", "malformed_timestamps", *expected) if name in record}
    del total["status"], total["unusable_rows"]
    values = {"teacher": tiny_teacher.name, **record["settings"], **total, "unusable": 1}
    assert cells == {name.replace("_", " "): str(value) for name, value in values.items()}


def test_the_tracker_of_a_labelling_gets_clips_rates_and_the_hours_that_are_left(labelling, speech):
    """The clips of a shard are labelled longest first, and one that cannot be used counts when its shard is done."""
    _, _, reports = labelling
    order = []
    for shard in (speech[:3], speech[3:6], speech[6:8]):
        usable = [seconds_of(row) for row in shard if row["name"] != "broken"]
        order += sorted(usable, reverse=True)
    assert [report["step"] for report in reports] == [1, 2, 3, 4, 5, 6, 7]
    assert [report["clips"] for report in reports] == [1, 2, 4, 5, 6, 7, 8]
    for number, report in enumerate(reports, 1):
        rate = report["clips"] / (2 * number)
        assert report["clips_per_second"] == pytest.approx(rate)
        assert report["audio_hours_per_hour"] == pytest.approx(sum(order[:number]) / (2 * number), rel=1e-4)
        assert report["hours_left"] == pytest.approx((8 - report["clips"]) / rate / 3600)


def test_a_labelling_of_two_processes_counts_the_shards_of_the_other_once(labelling, caplog):
    caplog.set_level("INFO")
    _, output, _ = labelling
    settings = record_of(output / LABELLING_RECORD)["settings"]
    shards = [output / SHARDS.format(number) for number in (1, 0, 2)]  # the other's has a clip that cannot be used
    split = run_pseudo_labelling.LabelledSplit("default", "train.to_9", shards, output / LABELLING_RECORD, settings)
    args = types.SimpleNamespace(
        dataset_split_name="train[:9]", dataset_name="speech", model_name_or_path="teacher", dtype="float32"
    )
    teacher = types.SimpleNamespace(args=args, decoder=types.SimpleNamespace(batch_size=5))
    processes = types.SimpleNamespace(is_main_process=True, num_processes=2, device=torch.device("cpu"))
    progress = run_pseudo_labelling.start_progress(teacher, processes, split, [1, 2])
    assert "batches of 5, processes: 2; 2 of 3 shards are left" in caplog.text
    assert (progress.bar.initial, progress.bar.total, progress.elsewhere) == (3, 8, [shards[1]])
    for _ in range(2):
        run_pseudo_labelling.report_shards(progress, split)
        assert progress.bar.n == 6
        assert progress.seconds == pytest.approx(run_pseudo_labelling.read_notes(shards[1])["seconds"])
    progress.bar.close()


@pytest.mark.parametrize(
    ("flags", "lost", "done", "left", "time"),
    [
        ([], [], 3, 0, "0:00:00"),
        ([], [2], 2, 2, "0:00:20"),
        ([], [0, 2], 1, 5, "0:00:50"),
        (["--overwrite_output_dir"], [2], 2, 2, "0:00:20"),  # which keeps what has the same settings
        (["--overwrite_output_dir", "--max_label_length", 9], [2], 0, 8, "0:01:20"),
    ],
)
def test_the_plan_of_a_labelling_counts_the_rows_of_the_shards_that_are_left(
    labelling, speech, tiny_teacher, tmp_path, monkeypatch, capsys, flags, lost, done, left, time
):
    dataset, output, _ = labelling
    shutil.copytree(output, tmp_path / "out")
    for shard in lost:
        (tmp_path / "out" / SHARDS.format(shard)).unlink()
    measured = []
    monkeypatch.setattr(run_pseudo_labelling, "measure_rate", lambda _, clips: measured.append(len(clips)) or 0.05)
    tell = run_pseudo_labelling.print_labelling_plan
    monkeypatch.setattr(run_pseudo_labelling, "print_labelling_plan", lambda *args: tell(*args[:-1], 2))
    flags = ["--per_device_eval_batch_size", 4, *flags, "--dry_run"]
    label(tiny_teacher, dataset, tmp_path / "out", *LABELLING_FLAGS, *flags)
    said = told(capsys)
    hours = sum(map(seconds_of, speech[:8])) / 3600
    size = sum(len(row["sound"]) for row in speech[:8] if row["name"] != "broken") / 1e6
    assert said["input"] == f"{dataset}, 8 clips, {hours:.2f} h, {size:.1f} MB"
    assert (said["done"], said["left"]) == (f"{done} of 3 shards", f"{left} clips")
    assert said["time"] == f"about {time} with 2 processes on cpu, 0.1 clips/s each"
    assert measured == [3]  # usable ones of the first batch


def test_the_first_ten_rows_that_are_left_out_are_named(caplog):
    caplog.set_level("INFO")
    unusable = [[f"clip {number}", "broken"] for number in range(12)]
    split = types.SimpleNamespace(record="record", name="train")
    total = {"rows_in": 1200, "rows_out": 1188, "over_30_s": 0, "unusable": unusable}
    run_pseudo_labelling.report_total(split, total)
    messages = [record.getMessage() for record in caplog.records]
    named = [f"left out: 'clip {number}' (broken)" for number in range(10)]
    assert messages == ["1188 of 1200 rows are labelled: record", *named]
    with pytest.raises(SystemExit, match=r"none of the 12 clips could be labelled \(clip 0: broken, …\)"):
        run_pseudo_labelling.report_total(split, total | {"rows_in": 12, "rows_out": 0})


def on_device(device: str, batch_size: int) -> types.SimpleNamespace:
    """What a plan asks of a teacher and of a model that is evaluated."""
    model = types.SimpleNamespace(device=torch.device(device))
    return types.SimpleNamespace(model=model, decoder=types.SimpleNamespace(batch_size=batch_size))


@pytest.mark.parametrize(("device", "sampled"), [("cpu", 1), ("cuda", 4)])
def test_the_sample_of_a_labelling_is_a_batch_on_a_cpu_and_four_on_a_gpu(labelling, tmp_path, device, sampled):
    dataset, *_ = labelling
    given = ["--model_name_or_path", "a", "--dataset_name", dataset, "--output_dir", tmp_path, *LABELLING_FLAGS]
    args = run_pseudo_labelling.parse_args([str(flag) for flag in given])
    _, read, sample = run_pseudo_labelling.print_input(args, on_device(device, 1))
    assert (read, len(sample)) == (8, sampled)


def test_the_rate_of_a_teacher_is_that_of_the_second_time(clock, monkeypatch):
    durations = iter([100.0, 4.0])

    def labels(teacher, waveforms):
        clock[0] += next(durations)
        yield from waveforms

    monkeypatch.setattr(run_pseudo_labelling, "label_clips", labels)
    assert run_pseudo_labelling.measure_rate(None, [np.zeros(1)] * 6) == 1.5


# ---- filtering -------------------------------------------------------------------------------------------------------

KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろ"
OVER = "score over the threshold"


def texts(length: int, start: int, wrong: int = 0) -> tuple[str, str]:
    """A reference of different characters, and a label that has so many of them wrong."""
    reference = (KANA[start:] + KANA)[:length]
    return reference, "".join("ガギグゲゴ"[n] if n < wrong else c for n, c in enumerate(reference))


# Seconds, reference and label, scores where they matter, and the reason to drop the clip; each limit is met and passed.
JUDGED = [
    (1.0, *texts(10, 0), {}, "kept"),
    (2.0, *texts(10, 1, wrong=2), {}, "kept"),
    (1.0, *texts(10, 2, wrong=3), {}, OVER),
    (0.5, *texts(7, 3), {}, "kept"),
    (0.499, *texts(7, 4), {}, "shorter than the minimum"),
    (20.0, *texts(8, 5), {}, "kept"),
    (20.001, *texts(8, 6), {}, "longer than the maximum"),
    (1.0, *texts(15, 7), {"avg_logprob": -0.9}, "kept"),
    (1.0, *texts(15, 8), {"avg_logprob": -0.91}, "mean log-probability under the minimum"),
    (1.0, *texts(16, 9), {"compression_ratio": 2.3}, "kept"),
    (1.0, *texts(16, 10), {"compression_ratio": 2.31}, "compression ratio over the maximum"),
    (1.0, *texts(31, 11), {"no_speech_prob": 0.7}, "kept"),
    (1.0, *texts(31, 12), {"no_speech_prob": 0.71}, "no-speech probability over the maximum"),
    (1.0, "のたたたたのは", "のたたたたのは", {}, "kept"),
    (1.0, "のたたたたたのは", "のたたたたたのは", {}, "label repeats itself"),
    (0.0, *texts(9, 13), {}, "undecodable audio"),
    (1.0, "しろいねこ", "しろいねこ", {}, "kept"),
    (1.0, "いぬはどこ", "しろいねこ", {}, "known hallucination"),
    (1.0, "、。", "しろいねこ", {}, "empty reference"),
    (1.0, *texts(32, 14, wrong=5), {}, "kept"),
    (1.0, *texts(1, 15, wrong=1), {}, OVER),
]
FILTER = {
    "dataset": ...,
    "config": "default",
    "language": "ja",
    "normaliser": run_data_filtering.NORMALISER,
    "tokenizer": ...,
    "feature_extractor": ...,
    "max_positions": 448,
    "max_label_length": 90,
    "split": "train",
    "text_column_name": "sentence",
    "audio_column_name": "sound",
    "speaker_id_column_name": "speaker",
    "task": "transcribe",
    "metric": "cer",
    "threshold": 20.0,
    "shard_size": 4,
    "seed": 7,
    "min_duration_in_seconds": 0.5,
    "max_duration_in_seconds": 20.0,
    "max_ngram_repeats": 4,
    "hallucinations": ["しろいねこ"],
    "min_avg_logprob": -0.9,
    "max_compression_ratio": 2.3,
    "max_no_speech_prob": 0.7,
    "timestamp_probability": 0.5,
    "condition_on_prev_probability": 0.1,
}
WINDOWS = {"concatenate_seconds": 20.0, "concatenate_gap_seconds": 0.2, "concatenate_probability": 0.9}
OUTPUTS = ("cut.cer_20.0", "cut.cer_20.0.packed", "cut.cer_20.0.packed.vectorized")
FILTER_RECORD = "filtering.default.train.json"


def filter_flags(place: Path) -> list:
    return [
        *("--output_dir", place, "--text_column_name", "sentence", "--audio_column_name", "sound"),
        *("--speaker_id_column_name", "speaker", "--cer_threshold", 20, "--shard_size", 4, "--seed", 7),
        *("--min_duration_in_seconds", 0.5, "--max_duration_in_seconds", 20, "--max_ngram_repeats", 4),
        *("--hallucinations", place.parent / "phrases.txt", "--min_avg_logprob", -0.9, "--max_no_speech_prob", 0.7),
        *("--max_compression_ratio", 2.3, "--timestamp_probability", 0.5, "--condition_on_prev_probability", 0.1),
        *("--max_label_length", 90, "--concatenate_audio", "--concatenate_seconds", 20),
        *("--concatenate_gap_seconds", 0.2, "--concatenate_probability", 0.9),
    ]


@pytest.fixture(scope="module")
def filtering(tiny_teacher, tmp_path_factory) -> tuple[Path, Path]:
    """The clips of JUDGED in six shards, filtered and packed by one worker, which takes five seconds an output."""
    place = tmp_path_factory.mktemp("filtering")
    (place / "phrases.txt").write_text("しろいねこ\n", encoding="utf-8")
    rows = []
    for number, (seconds, reference, heard, scores, _) in enumerate(JUDGED):
        row = {"name": f"clip {number}", "sound": tone(seconds) if seconds else b"no audio", "sentence": reference}
        row |= {"whisper_transcript": make_label(tiny_teacher, heard), "speaker": f"speaker {number % 2}"}
        rows.append(row | {"avg_logprob": -0.5, "compression_ratio": 1.0, "no_speech_prob": 0.1} | scores)
    dataset = write_dataset(place / "cut", rows)
    seconds = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: seconds[0])
        write = run_data_filtering.write_shards
        patch.setattr(run_data_filtering, "write_shards", taking(5, seconds, write))
        filter_clips(tiny_teacher, dataset, *filter_flags(place / "out"))
    return dataset, place / "out"


def test_every_limit_keeps_what_meets_it_and_drops_what_is_beyond(filtering):
    _, output = filtering
    notes = [run_data_filtering.read_notes(path) for path in sorted((output / OUTPUTS[0] / "default").iterdir())]
    assert [reason for shard in notes for reason in shard["rows"]["reason"]] == [row[-1] for row in JUDGED]


def test_the_records_of_a_filtering_have_every_setting_of_their_output(filtering):
    _, output = filtering
    packed = FILTER | WINDOWS | {"shard_size": 1000}
    for name, expected in zip(OUTPUTS, (FILTER, packed, packed), strict=True):
        record = record_of(output / name / FILTER_RECORD)
        assert without_digests(record["settings"]) == expected, name
        assert (record["seconds"], record["clips_per_second"]) == (15.0, round(len(JUDGED) / 15, 1))


def test_the_report_of_a_filtering_is_that_of_the_clips_one_by_one(filtering):
    _, output = filtering
    report = record_of(output / OUTPUTS[0] / FILTER_RECORD)["report"]
    kept = [row for row in JUDGED if row[-1] == "kept"]
    judged = [row for row in JUDGED if row[-1] in ("kept", OVER)]
    assert report["reasons"] == collections.Counter(row[-1] for row in JUDGED)
    lengths = [0 if row[1] == "、。" else len(row[1]) for row in JUDGED]
    assert report["clips"] == [len(JUDGED), len(kept)]
    assert report["characters"] == [sum(lengths), sum(len(row[1]) for row in kept)]
    assert report["hours"] == [round(sum(row[0] for row in rows) / 3600, 3) for rows in (JUDGED, kept)]

    def wrong(row: tuple) -> int:
        return sum(a != b for a, b in zip(row[1], row[2], strict=True))

    rates = [100 * wrong(row) / len(row[1]) for row in judged]
    assert report["cer_of_kept"] == round(100 * sum(map(wrong, kept)) / sum(len(row[1]) for row in kept), 3)
    for limit in (0, 5, 10, 15, 20, 30, 40, 80, 100):
        assert report["other_thresholds"]["cer"][str(limit)] == sum(rate <= limit + 1e-9 for rate in rates)
    histogram = [0] * 21
    for rate in rates:
        histogram[min(20, int(rate / 5 + 1e-9))] += 1
    assert report["score_histogram"] == histogram
    bounds = {"1-7": (1, 7), "8-15": (8, 15), "16-31": (16, 31), "32-63": (32, 63), "64-127": (64, 127)}
    for name, (low, high) in (bounds | {"128+": (128, math.inf)}).items():
        rows = [row for row, length in zip(JUDGED, lengths, strict=True) if low <= length <= high]
        assert report["by_reference_length"][name] == [len(rows), sum(row[-1] == "kept" for row in rows)]
    assert [row["cer"] for row in report["worst"]] == [100, 30]
    assert report["frequent_labels"][0] == ["しろいねこ", 3, 1]
    assert report["unusable"] == {"undecodable audio": ["clip 15"], "empty reference": ["clip 18"]}


def test_the_card_of_a_filtering_has_the_figures_of_its_report(filtering):
    _, output = filtering
    report = record_of(output / OUTPUTS[1] / FILTER_RECORD)["report"]
    card = (output / OUTPUTS[1] / "README.md").read_text()
    for name in ("clips", "hours", "characters"):
        total, kept = report[name]
        assert f"| {name} | {total} | {kept} | {100 * kept / total:.1f} |" in card
    for name, (total, kept) in report["by_reference_length"].items():
        assert f"| {name} | {total} | {kept} | {100 * kept / max(1, total):.1f} |" in card
    for reason, count in report["reasons"].items():
        assert f"| {reason} | {count} |" in card
    cer = report["other_thresholds"]["cer"].values()
    assert f"| CER | {' | '.join(map(str, cer))} |" in card
    assert f"CER <= 20.0 % are kept; their labels have a CER of {report['cer_of_kept']:.2f} %" in card
    rows = read_rows(output / OUTPUTS[1])
    kept = {number: row for number, row in enumerate(JUDGED) if row[-1] == "kept"}
    windows = report["windows"]
    tokens = [len(row["labels"]) for row in rows]
    assert windows["label_tokens"] == [round(sum(tokens) / len(tokens), 1), max(tokens)]
    assert (windows["windows"], windows["clips"]) == (len(rows), len(kept))
    (shard,) = (output / OUTPUTS[1] / "default").iterdir()
    notes = run_data_filtering.read_notes(shard)["windows"]
    shared = [row["clips"] for row, note in zip(rows, notes, strict=True) if not note["alone"]]
    assert windows["clips_left_alone"] == len(rows) - len(shared)
    speech = sum(kept[clip][0] for window in shared for clip in window)
    assert windows["fill"] == pytest.approx(100 * speech / (20 * len(shared)), abs=0.01)
    mean, longest = windows["label_tokens"]
    assert f"{len(rows)} windows hold {len(kept)} clips, of which {windows['clips_left_alone']} have a window" in card
    assert f"the clips of the other windows fill {windows['fill']:.1f} % of 20 s" in card
    assert f"Labels have {mean} tokens on average and at most {longest}: train with `--max_label_length 90`" in card


def test_a_second_filtering_tells_and_records_what_it_made(
    filtering, tiny_teacher, tmp_path, clock, monkeypatch, caplog
):
    caplog.set_level("INFO")
    dataset, output = filtering
    shutil.copytree(output.parent, tmp_path / "place")
    place = tmp_path / "place" / "out"
    before = (place / OUTPUTS[1] / FILTER_RECORD).read_bytes()
    for number in (1, 5):
        (place / OUTPUTS[0] / "default" / f"train-{number:05d}-of-00006.parquet").unlink()
    write = run_data_filtering.write_shards
    monkeypatch.setattr(run_data_filtering, "write_shards", taking(1, clock, write))
    filter_clips(tiny_teacher, dataset, *filter_flags(place))
    record = record_of(place / OUTPUTS[0] / FILTER_RECORD)
    assert (record["seconds"], record["clips_per_second"]) == (3.0, round(len(JUDGED) / 3 / 3, 1))
    assert record["report"] == record_of(output / OUTPUTS[0] / FILTER_RECORD)["report"]
    assert (place / OUTPUTS[1] / FILTER_RECORD).read_bytes() == before  # which was complete
    assert "filtered: 2 of 6 shards are left, workers: 1" in caplog.text
    assert "packed: 0 of 1 shards are left, workers: 1" in caplog.text
    kept = [row[0] / 3600 for row in JUDGED if row[-1] == "kept"]
    hours = sum(row[0] for row in JUDGED) / 3600
    assert f"kept {len(kept)} of 21 clips, {sum(kept):.3f} of {hours:.3f} h: {{" in caplog.text


@pytest.mark.parametrize(
    ("lost", "flags", "done", "parts"),
    [
        ({0: range(6), 1: range(1), 2: range(1)}, [], (0, 0, 0), (3, 3, 3)),  # samples of seven rows in 21
        ({0: [5]}, [], (5, 1, 1), (0.5, 0, 0)),
        ({0: [1, 5], 2: [0]}, [], (4, 1, 0), (1, 0, 3)),
        ({}, [], (6, 1, 1), (0, 0, 0)),
        ({}, ["--overwrite_output_dir"], (0, 0, 0), (3, 3, 3)),
        ({}, ["--overwrite_output_dir", "--skip_filtering"], (6, 0, 0), (0, 3, 3)),
    ],
)
def test_the_plan_of_a_filtering_is_scaled_from_its_sample_to_what_is_left(
    filtering, tiny_teacher, tmp_path, clock, monkeypatch, capsys, lost, flags, done, parts
):
    dataset, output = filtering
    shutil.copytree(output.parent, tmp_path / "place")
    place = tmp_path / "place" / "out"
    shards = [sorted((place / name / "default").iterdir()) for name in OUTPUTS]
    for kind, numbers in lost.items():
        for number in numbers:
            shards[kind][number].unlink()
    sizes = {}
    filter_sample = run_data_filtering.SHARD_WRITERS["filtered"]

    def write_filtered(job, shard):
        clock[0] += 600
        filter_sample(job, shard)
        sizes["filtered"] = job.outputs["filtered"].shard_path(shard).stat().st_size

    def writer(kind: str, seconds: float):
        def write(job, shard):
            clock[0] += seconds
            sizes[kind] = round(seconds * 1000)
            job.outputs[kind].shard_path(shard).write_bytes(bytes(sizes[kind]))

        return write

    for kind, write in (("filtered", write_filtered), ("packed", writer("packed", 1200))):
        monkeypatch.setitem(run_data_filtering.SHARD_WRITERS, kind, write)
    monkeypatch.setitem(run_data_filtering.SHARD_WRITERS, "vectorized", writer("vectorized", 3000))
    monkeypatch.setattr(run_data_filtering, "SAMPLE_ROWS", 7)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes on this machine, of four in all

    def join_others(**options) -> PartialState:
        state = PartialState(**options)
        state.num_processes = 4
        return state

    monkeypatch.setattr(run_data_filtering, "PartialState", join_others)
    more = ("--preprocessing_num_workers", 7, "--dry_run", *flags)
    filter_clips(tiny_teacher, dataset, *filter_flags(place), *more)
    said = capsys.readouterr().out
    hours = 3 * sum(row[0] for row in JUDGED[:7]) / 3600
    assert f"input: {dataset} (default, train), 21 clips, about {hours:.2f} h\n" in said
    assert "keeps: 57 % of the first 7 clips\n" in said
    number = (6, 1, 1)
    for kind, name, is_done, total, part in zip(sizes, OUTPUTS, done, number, parts, strict=True):
        size = sizes[kind] * part / 1e6
        assert f"done: {is_done} of {total} shards of {place / name}\n" in said
        assert f"writes: {place / name}, about {size:.1f} MB\n" in said
    minutes = sum(seconds * part for seconds, part in zip((600, 1200, 3000), parts, strict=True)) / 60 / 12
    assert f"time: about {minutes:.1f} min on 12 cores\n" in said


# ---- the student -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "dtype", "teacher_size", "student_size"),
    [
        ("float16", "float32", "3.087", "3.026"),
        ("float32", "bfloat16", "6.174", "1.513"),
        (None, "float16", "6.174", "1.513"),
    ],
)
def test_the_plan_of_a_student_has_the_sizes_of_large_v3_and_of_its_student(
    capsys, stored, dtype, teacher_size, student_size
):
    """Which have 1,543,490,560 parameters, and 26,236,160 fewer for each of 30 decoder layers."""
    sizes = {"d_model": 1280, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120, "num_mel_bins": 128}
    sizes |= {"encoder_attention_heads": 20, "decoder_attention_heads": 20, "vocab_size": 51866}
    layers = {"encoder": list(range(32)), "decoder": [0, 31]}
    args = types.SimpleNamespace(teacher_checkpoint="acme/large", dtype=dtype, save_dir="init", push_to_hub=True)
    for exists in (False, True):
        config = WhisperConfig(**sizes, encoder_layers=32, decoder_layers=32, dtype=stored)
        create_student_model.print_student_plan(args, config, layers, exists, "acme/init (private)")
        assert told(capsys) == {
            "input": f"acme/large, {teacher_size} GB of weights",
            "done": "the student is there and would be checked" if exists else "nothing",
            "writes": "nothing" if exists else f"init, about {student_size} GB",
            "pushes": f"acme/init (private), about {student_size} GB",
        }


def test_the_record_and_the_card_of_a_student_have_the_figures_of_both_models(tiny_teacher, tmp_path):
    output = initialise(tiny_teacher, tmp_path / "init", "--encoder_layers", 2, "--dtype", "bfloat16")
    record = record_of(output / create_student_model.RECORD)
    teacher = WhisperConfig.from_pretrained(tiny_teacher)
    copied = {side: record["settings"][f"{side}_layer_indices"] for side in ("encoder", "decoder")}
    assert record["settings"] == {
        "teacher_checkpoint": tiny_teacher.name,
        "subfolder": "",
        "dtype": "bfloat16",
        "encoder_layer_indices": [0, teacher.encoder_layers - 1],
        "decoder_layer_indices": [0, teacher.decoder_layers - 1],
    }
    assert record["teacher_layers"] == {"encoder": teacher.encoder_layers, "decoder": teacher.decoder_layers}
    numbers = {}
    for name, directory in (("teacher", tiny_teacher), ("student", output)):
        weights = safetensors.torch.load_file(directory / "model.safetensors")
        numbers[name] = sum(tensor.numel() for key, tensor in weights.items() if key != "proj_out.weight")
    assert record["parameters"] == numbers
    card = (output / "README.md").read_text()
    for side in ("encoder", "decoder"):
        places = " ".join(map(str, copied[side]))
        assert f"| {side} layers | {record['teacher_layers'][side]} | 2 | {places} |" in card
    assert f"| parameters | {numbers['teacher']:,} | {numbers['student']:,} | |" in card
    written = {path.name for path in output.iterdir() if path.suffix != ".md"} - {create_student_model.RECORD}
    assert set(record["files"]) == written


# ---- training --------------------------------------------------------------------------------------------------------


class FakeRows(list):
    """Rows of which only the figures matter."""

    def __init__(self, number: int, **figures):
        super().__init__(range(number))
        vars(self).update(figures)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"done": "0 of 25 steps", "left": "25 steps, 12.50 h at 1800.000 s a step (measured on this cpu)"}),
        ({"step": 10}, {"done": "10 of 25 steps (c)", "left": "15 steps, 7.50 h at 1800.000 s a step (measured on"}),
        ({"finished": True}, {"done": "25 of 25 steps", "left": "0 steps, 0.00 h at 1800.000 s a step (measured on"}),
        ({"limit": 2}, {"writes": "out, the model of 6.00 GB, 2 checkpoints of 3.00 GB each"}),
        ({"limit": 4}, {"writes": "out, the model of 6.00 GB, 3 checkpoints of 3.00 GB each"}),
        ({"limit": 0}, {"writes": "out, the model of 6.00 GB, 1 checkpoints of 3.00 GB each"}),
        ({"pushes": "acme/x (private)"}, {"pushes": "acme/x (private), 6.00 GB at every save"}),
        ({"removed": ["a", "b"]}, {"removes": "a, b in out"}),
    ],
)
def test_the_plan_of_a_training_has_the_figures_of_all_rows_steps_and_weights(capsys, changes, expected):
    """Of two processes with micro-batches of four rows, three of which make a step; the weights are in bfloat16."""
    script = run_distillation
    train = [
        FakeRows(90, name="one", hours=1.5, token_counts=np.array([9, 10]), left_out={"a": 2, "b": 3}),
        FakeRows(10, name="two", hours=0.0, token_counts=np.array([7]), left_out={}),
    ]
    held_out = FakeRows(5, name="test", hours=0.25, token_counts=np.array([4, 5, 5]), left_out={"a": 1})
    data = script.Data(train, held_out, script.Plan((90, 10), None, 1, 4, 2, 3), 25)
    bfloat16 = torch.empty(1_500_000_000, dtype=torch.bfloat16, device="meta")
    trained = [torch.empty(n, dtype=torch.float32, device="meta") for n in (50_000_000, 200_000_000)]
    models = types.SimpleNamespace(
        student=types.SimpleNamespace(parameters=lambda: [bfloat16]),
        trained=types.SimpleNamespace(parameters=lambda: trained),
    )
    args = types.SimpleNamespace(
        output_dir=Path("out"),
        save_steps=10,
        save_total_limit=changes.get("limit"),
        per_device_train_batch_size=4,
    )
    accelerator = types.SimpleNamespace(device=torch.device("cpu"))
    start = script.Start(
        state=script.TrainingState(step=changes.get("step", 0)),
        checkpoint=Path("c") if "step" in changes else None,
        finished=changes.get("finished", False),
        to_remove=[Path("out", name) for name in changes.get("removed", [])],
    )
    training = script.Training(args, accelerator, models, data)
    script.print_plan(training, start, 0.5, 1800.0, changes.get("pushes", ""))
    said = capsys.readouterr().out
    lines = {
        "work": "25 steps of 24 rows, 5 an epoch",
        "writes": "out, the model of 6.00 GB, 3 checkpoints of 3.00 GB each",
        "pushes": "nothing",
        "rates": "a training process takes 0.0 rows/s, a process that loads gives 8.0",
    }
    for name, line in (lines | expected).items():
        assert f"{name}: {line}" in said
    assert "input: one, 90 rows, 1.50 h, 9.5 tokens a label, 5 rows left out\n" in said
    assert "input: two, 10 rows, 7.0 tokens a label, 0 rows left out\n" in said
    assert "input: test, 5 rows, 0.25 h, 4.7 tokens a label, 1 rows left out\n" in said


def test_the_record_at_the_start_of_a_training_has_the_sums_of_its_datasets():
    script = run_distillation
    train = [
        FakeRows(9, name="/a/one", hours=1.254, left_out={"x": 2}),
        FakeRows(4, name="/b/one", hours=2.503, left_out={}),
    ]
    data = script.Data(train, None, script.Plan((9, 4), None, 1, 2, 3, 1), 25)
    config = types.SimpleNamespace(encoder_layers=32, decoder_layers=2)
    models = types.SimpleNamespace(student=types.SimpleNamespace(config=config))
    state = script.TrainingState(step=7)
    record = script.make_record(script.Training(argparse.Namespace(seed=1), None, models, data, state=state), {"a": 1})
    assert record.pop("versions").keys() == {"torch", "transformers", "datasets", "accelerate"}
    assert record == {
        "status": "running",
        "settings": {"a": 1},
        "rows": 13,
        "hours": 3.76,
        "steps": 7,
        "steps_per_epoch": 3,
        "layers": {"encoder": 32, "decoder": 2},
        "processes": 3,
        "arguments": {"seed": 1},
        "rows_left_out": {"one": {"x": 2}, "one (2)": {}},
    }


def test_a_step_of_a_plan_is_the_mean_of_those_after_the_first(clock, monkeypatch):
    script = run_distillation
    durations = iter([100.0, 1.0, 2.0, 6.0])

    def step(training, batches):
        clock[0] += next(durations)
        return next(batches)

    monkeypatch.setattr(script, "optimiser_step", step)
    monkeypatch.setattr(script, "make_optimizer", lambda training: None)
    monkeypatch.setattr(script, "collate", taking(0.25, clock, list))
    rows = FakeRows(3, usable=np.array([4, 5, 7]), first_inputs=["a", "b"], input_column="audio")
    training = types.SimpleNamespace(
        data=types.SimpleNamespace(train=[rows]),
        args=types.SimpleNamespace(per_device_train_batch_size=5),
        wrapped=types.SimpleNamespace(train=lambda: None),
    )
    assert script.measure_steps(training) == (0.25, 3.0)


def test_the_cache_of_encoder_outputs_asks_for_the_room_of_the_rows_that_are_missing(monkeypatch, tmp_path, caplog):
    """64 of 100 rows with 1,500 states of the student's width, and 20 of the teacher's, in bfloat16."""
    caplog.set_level("INFO")
    script = run_distillation
    teacher = types.SimpleNamespace(max_source_positions=1500, d_model=1280)
    models = types.SimpleNamespace(
        teacher=types.SimpleNamespace(config=teacher, dtype=torch.bfloat16),
        student=types.SimpleNamespace(config=types.SimpleNamespace(d_model=1024)),
    )
    rows = FakeRows(100, name="speech", token_counts=np.array([10, 30]))
    needed = 64 * (1500 * 1024 + 20 * 1280) * 2
    for free in (needed, needed - 1):
        monkeypatch.setattr(script.shutil, "disk_usage", lambda _, free=free: types.SimpleNamespace(free=free))
        if free == needed:
            script.refuse_small_disk(rows, 2, tmp_path / "cache", models)
            assert f"encoder cache of speech: {needed / 1e9:.2f} GB to write" in caplog.text
        else:
            with pytest.raises(SystemExit, match=f"needs {needed / 1e9:.2f} GB for speech; .* has 0.20 free"):
                script.refuse_small_disk(rows, 2, tmp_path / "cache", models)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "scaler", "is_refused"),
    [
        (1.0, 1.0, None, False),
        (60.9, 1.0, None, False),  # by which the trend is 3.995; four is three times the lowest and one
        (61.1, 1.0, None, True),
        (1.0, math.inf, None, True),
        (1.0, math.inf, "scaler", False),  # it leaves this step out
        (math.nan, 1.0, "scaler", True),
    ],
)
def test_a_training_ends_where_the_loss_is_over_three_times_its_lowest_and_one(
    tmp_path, loss, grad_norm, scaler, is_refused
):
    script = run_distillation
    args = types.SimpleNamespace(output_dir=tmp_path, learning_rate=0.1, warmup_steps=5)
    state = script.TrainingState(trend=1.0, lowest=1.0)
    training = types.SimpleNamespace(args=args, state=state, accelerator=types.SimpleNamespace(scaler=scaler))
    if not is_refused:
        script.check_loss(training, loss, grad_norm)
        return
    with pytest.raises(SystemExit, match=r"step 1: the loss .*Lower --learning_rate"):
        script.check_loss(training, loss, grad_norm)


def test_the_lowest_loss_is_that_of_the_trend_and_not_of_one_easy_batch(tmp_path):
    args = types.SimpleNamespace(output_dir=tmp_path, learning_rate=0.1, warmup_steps=5)
    state = run_distillation.TrainingState()
    training = types.SimpleNamespace(args=args, state=state, accelerator=types.SimpleNamespace(scaler=None))
    for loss in (2.0, 0.0, 2.0):
        run_distillation.check_loss(training, loss, 1.0)
    assert (state.trend, state.lowest) == pytest.approx((1.905, 1.9))


def data_digest(**changes) -> str:
    parts = {"labels": [[1, 2], [3]], "usable": [0, 1], "inputs": [b"one", b"two"], **changes}
    labels = pa.chunked_array(
        [pa.array(chunk, pa.list_(pa.int32())) for chunk in parts.get("chunks", [parts["labels"]])]
    )
    lengths = np.array([len(label) for label in parts["labels"]])
    place = run_distillation.Place(str(parts.get("directory", "/nowhere")), is_confined=False)
    rows = types.SimpleNamespace(first_inputs=parts["inputs"], place=place)
    return run_distillation.Rows.data_digest(rows, labels, lengths, np.array(parts["usable"]))


def test_the_digest_of_training_data_changes_with_each_of_its_parts(tmp_path):
    (tmp_path / "clip").write_bytes(b"one")
    named = {"inputs": [{"bytes": None, "path": "clip"}, b"two"], "directory": tmp_path}
    digests = [
        data_digest(),
        data_digest(labels=[[1, 2], [4]]),
        data_digest(labels=[[1], [2, 3]]),
        data_digest(usable=[0]),
        data_digest(inputs=[b"one", b"TWO"]),
        data_digest(inputs=[{"bytes": b"three", "path": "clip"}, b"two"]),
        data_digest(**named),
    ]
    (tmp_path / "clip").write_bytes(b"two")
    digests.append(data_digest(**named))
    assert len(set(digests)) == len(digests)
    assert data_digest(chunks=[[[1, 2]], [[3]]]) == digests[0]
    assert data_digest(inputs=[{"bytes": b"one", "path": "elsewhere"}, b"two"]) == digests[0]


def test_the_digest_of_weights_changes_with_their_names_shapes_and_values():
    def module(name: str, values: torch.Tensor) -> torch.nn.Module:
        holder = torch.nn.Module()
        holder.register_parameter(name, torch.nn.Parameter(values))
        return holder

    values = torch.arange(6.0)
    modules = [
        module("weight", values),
        module("bias", values),
        module("weight", values.reshape(2, 3)),
        module("weight", values + 1e-6),
    ]
    assert len({run_distillation.weights_digest(each) for each in modules}) == 4
    digest = run_distillation.weights_digest(module("weight", values.to(torch.bfloat16)))
    assert digest == run_distillation.weights_digest(modules[0])


TRAINING = {
    "train_dataset_samples": [1.0, 2.0],
    "max_label_length": 60,
    "language": "ja",
    "task": "transcribe",
    "freeze_encoder": True,
    "dtype": "float32",
    "learning_rate": 0.002,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 0.4},
    "warmup_steps": 1,
    "weight_decay": 0.01,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-7,
    "max_grad_norm": 0.5,
    "ce_weight": 0.7,
    "kl_weight": 1.0,
    "kl_shares": [1.0, 0.5],
    "temperature": 3.0,
    "seed": 5,
    "train_data": [..., ...],
    "global_batch_size": 4,
    "steps": 5,
    "student": ...,
    "teacher": ...,
}


@pytest.fixture(scope="module")
def training(tiny_teacher, clips, tmp_path_factory):
    """Two datasets of five and four rows, two of them without a label, trained for five steps of two micro-batches."""
    place = tmp_path_factory.mktemp("training")
    init = initialise(tiny_teacher, place / "init")
    rows = []
    for clip in clips[:9]:
        ids = make_label(tiny_teacher, clip["transcription"])[:50]
        samples = len(soundfile.read(io.BytesIO(clip["audio"]))[0])
        rows.append({"audio": clip["audio"], "labels": ids, "input_length": samples})
    for number in (3, 7):
        rows[number] = rows[number] | {"labels": rows[number]["labels"][:1]}
    write_dataset(place / "one", rows[:5])
    write_dataset(place / "two", rows[5:])
    flags = ["--train_dataset_samples", "1+2", "--max_label_length", 60, "--learning_rate", 0.002]
    flags += ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": 0.4}', "--warmup_steps", 1]
    flags += ["--weight_decay", 0.01, "--adam_beta1", 0.8, "--adam_beta2", 0.99, "--adam_epsilon", 1e-7]
    flags += ["--max_grad_norm", 0.5, "--ce_weight", 0.7, "--kl_weight", "1+0.5", "--temperature", 3, "--seed", 5]
    flags += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_steps", 5]
    flags += ["--eval_dataset_name", place / "two", "--eval_split_name", "train", "--eval_steps", 2]
    flags += ["--eval_max_samples", 2, "--logging_steps", 2, "--save_steps", 2]
    command = (init, tiny_teacher, f"{place / 'one'}+{place / 'two'}", place / "out", *flags)
    seconds = [0.0]
    reports = []
    messages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: seconds[0])
        step = run_distillation.optimiser_step
        patch.setattr(run_distillation, "optimiser_step", taking(2, seconds, step))
        patch.setattr(run_distillation, "track", lambda _, values, step: reports.append({"step": step, **values}))
        patch.setattr(run_distillation.logger, "info", lambda text, *values: messages.append(text % values))
        distil(*command)
    return command, rows, reports, messages


def test_the_record_of_a_training_has_every_setting_and_the_figures_of_the_usable_rows(training):
    (_, _, _, output, *_), rows, _, _ = training
    record = record_of(output / "distillation.json")
    settings = without_digests(record["settings"])
    settings["train_data"] = [... if HASH.fullmatch(digest) else digest for digest in settings["train_data"]]
    assert settings == TRAINING
    usable = [row for row in rows if len(row["labels"]) > 1]
    expected = {
        "status": "complete",
        "rows": 7,
        "steps": 5,
        "steps_per_epoch": 2,
        "processes": 1,
        "seconds": 10.0,
        "hours": round(sum(row["input_length"] for row in usable) / 16_000 / 3600, 2),
        "rows_left_out": {"one": {"no label": 1}, "two": {"no label": 1}},
        "layers": {"encoder": 4, "decoder": 2},
    }
    assert {name: record[name] for name in expected} == expected
    assert len(set(record["settings"]["train_data"])) == 2


def test_the_log_of_a_training_has_the_rate_of_each_window_and_the_tracker_gets_the_same(training):
    """Of seven rows every second step has three."""
    (_, _, _, output, *_), _, reports, messages = training
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], "eval_loss" in entry) for entry in entries] == [
        *((0, True), (2, False), (2, True), (4, False), (4, True), (5, False), (5, True)),
    ]
    assert [entry["epoch"] for entry in entries] == [0, 1, 1, 2, 2, 2.5, 2.5]
    assert [entry["samples_per_second"] for entry in entries if "loss" in entry] == [7 / 4, 7 / 4, 4 / 2]
    assert [{name: value for name, value in entry.items() if name != "epoch"} for entry in entries] == reports
    for entry in entries:
        prefix = "eval_" if "eval_loss" in entry else ""
        names = ("eval_ce", "eval_kl") if prefix else ("ce_loss", "kl_loss")
        assert entry[f"{prefix}loss"] == pytest.approx(0.7 * entry[names[0]] + entry[names[1]])
    assert "7 rows; 5 steps, 2 an epoch, of 4 rows" in messages
    figures = [("teacher", record_of(output / "distillation.json")["teacher_evaluation"])]
    figures += [(f"step {entry['step']}", entry) for entry in entries if "eval_loss" in entry]
    for name, values in figures:
        cer, wer, loss = (values[f"eval_{figure}"] for figure in ("cer", "wer", "loss"))
        assert f"held-out rows, {name}: CER {cer:.2f}, WER {wer:.2f}, loss {loss:.3f}" in messages


def test_the_card_of_a_training_has_the_figures_of_its_record_and_its_log(training):
    (_, teacher, _, output, *_), _, _, _ = training
    record = record_of(output / "distillation.json")
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    card = (output / "README.md").read_text()
    assert (
        f"4 encoder and 2 decoder layers, distilled from {teacher.name} on 7 rows of one and two: 5 steps of 4" in card
    )
    assert "steps of 4 rows, 2.50 epochs.\nThe loss is 0.7 · CE + 1.0 · T² · KL(teacher ‖ student) at T = 3.0." in card
    table = [["teacher", record["teacher_evaluation"]]]
    table += [[entry["step"], entry] for entry in entries if "eval_loss" in entry]
    for step, figures in table:
        cells = [f"{figures[name]:.3f}" for name in ("eval_loss", "eval_cer", "eval_wer")]
        assert f"| {step} | {' | '.join(cells)} |" in card
    assert f"| global_batch_size | 4 |\n| steps | 5 |\n| student | {record['settings']['student']} |" in card


def test_a_second_training_adds_nothing_and_one_that_lost_its_end_adds_it_once(training, tmp_path):
    command, *_ = training
    output = tmp_path / "out"
    shutil.copytree(command[3], output)
    log = (output / "metrics.jsonl").read_text()
    predictions = (output / "held_out_predictions.jsonl").read_text()
    again = (*command[:3], output, *command[4:])
    distil(*again)
    assert (output / "metrics.jsonl").read_text() == log
    (output / "model.safetensors").unlink()
    for path in output.glob("checkpoint-5-*"):
        shutil.rmtree(path)
    distil(*again)

    def figures(text: str) -> list[dict]:
        entries = map(json.loads, text.splitlines())
        return [{name: value for name, value in entry.items() if name != "samples_per_second"} for entry in entries]

    assert figures((output / "metrics.jsonl").read_text()) == figures(log)
    assert (output / "held_out_predictions.jsonl").read_text() == predictions


# ---- evaluation ------------------------------------------------------------------------------------------------------

EVALUATION = {
    "model_digest": ...,
    "assistant_model": None,
    "dtype": "float32",
    "language": "ja",
    "task": "translate",
    "dataset_config_name": "default",
    "dataset_split_name": "train[:8]",
    "rows": 7,
    "rows_digest": ...,
    "seed": 3,
    "max_new_tokens": 5,
    "num_beams": 2,
    "return_timestamps": True,
}


@pytest.fixture(scope="module")
def evaluation(tiny_teacher, speech, tmp_path_factory):
    """Windows of seven clips, one of which is no audio and one too long: model, dataset, output."""
    place = tmp_path_factory.mktemp("evaluation")
    dataset = write_dataset(place / "speech", speech)
    flags = ["--dataset_config_name", "default", "--dataset_split_name", "train[:8]", "--max_samples_per_split", 7]
    flags += ["--audio_column_name", "sound", "--text_column_name", "sentence", "--task", "translate", "--seed", 3]
    flags += ["--generation_num_beams", 2, "--generation_max_length", 5, "--return_timestamps", "--skip_long_audio"]
    flags += ["--concatenate_audio", "--concatenate_seconds", 12, "--per_device_eval_batch_size", 2]
    return tiny_teacher, dataset, evaluate(tiny_teacher, dataset, place / "out", *flags), flags


def test_the_metrics_of_an_evaluation_have_every_setting_and_every_figure(evaluation, speech):
    model, dataset, output, _ = evaluation
    name = "train.to_8.windows_12"
    metrics = read_metrics(output, name)
    expected = EVALUATION | {"model": str(model), "dataset": str(dataset)}
    settings = record_of(output / f".predictions.{name}" / "settings.json")
    del settings["checksum"]
    assert without_digests(settings) == expected
    assert without_digests({key: metrics[key] for key in expected}) == expected
    weights = safetensors.torch.load_file(model / "model.safetensors")
    assert metrics["parameters"] == sum(t.numel() for key, t in weights.items() if key != "proj_out.weight")
    assert (metrics["name"], metrics["scorer"], metrics["batch_size"]) == (name, "whisper", "2")
    assert metrics["audio_seconds"] == round(sum(map(seconds_of, speech[:7])), 1)
    assert sorted(itertools.chain(*metrics["unusable"].values())) == ["broken", "long"]


def test_the_seed_is_a_setting_of_windows_alone(evaluation, tmp_path):
    model, dataset, _, _ = evaluation
    columns = ("--audio_column_name", "sound", "--text_column_name", "sentence", "--max_samples_per_split", 1)
    output = evaluate(model, dataset, tmp_path, *columns, "--seed", 3)
    assert record_of(output / ".predictions.train" / "settings.json")["seed"] is None


@pytest.mark.parametrize(
    ("processes", "done", "long_form", "expected"),
    [
        (
            1,
            0,
            False,
            {"done": "0 of 3 shards", "left": "11 of 11", "time": "about 5.5 min; a sample of 4 took 120.0 s"},
        ),
        (
            1,
            2,
            False,
            {"done": "2 of 3 shards", "left": "3 of 11", "time": "about 1.5 min; a sample of 4 took 120.0 s"},
        ),
        (2, 2, False, {"time": "about 0.8 min; a sample of 4 took 120.0 s (float32)"}),
        (1, 0, True, {"time": "about 22.0 min; a sample of 1 took 120.0 s (float32)"}),
    ],
)
@pytest.mark.parametrize(("device", "batch_size"), [("cpu", 4), ("cuda", 1)])
def test_the_plan_of_an_evaluation_is_scaled_from_its_sample_to_what_is_left(
    capsys, monkeypatch, processes, done, long_form, expected, device, batch_size
):
    """Of eleven windows in shards of four: the sample is every third, with 1,800 s of audio."""
    script = run_short_form_eval
    paths = [Path(f"shard {number}") for number in range(3)]
    shards = {path: [[row] for row in range(11)][4 * number :][:4] for number, path in enumerate(paths)}
    sampled = []
    monkeypatch.setattr(script, "predict", lambda _, sample, *rest: sampled.extend(sample.values()))
    speed = {"audio_seconds": 1800.0, "process_seconds": 120.0}
    monkeypatch.setattr(script, "read_predictions", lambda paths: ([], speed))
    monkeypatch.setattr(script, "read_saved_shard", lambda path: path in paths[:done])
    args = types.SimpleNamespace(long_form=long_form, concatenate_audio=True, name="n", model_name_or_path="acme/m")
    vars(args).update(
        push_to_hub=True, dataset_name="acme/d", dataset_split_name="test", output_dir="o", dtype="float32"
    )
    recogniser = on_device(device, batch_size)
    script.print_evaluation_plan(range(1200), None, shards, recogniser, processes, args)
    said = told(capsys)
    hours = 1800 * 11 / 3600 / (1 if long_form else 4)
    assert said["input"] == f"acme/d, test, 11 windows of 1,200 clips, about {hours:.2f} h"
    assert said["pushes"] == "the rates to the card of acme/m"
    assert sampled == [[[0]] if long_form else [[0], [3], [6], [9]]] * 2
    for name, line in expected.items():
        assert said[name].startswith(line)


def test_the_speed_of_an_evaluation_is_that_of_all_shards_but_their_first_batches(tmp_path):
    """Two processes on different devices made three shards; the first batch of each is slow."""
    script = run_short_form_eval

    def write(name: str, seconds: list[float], device: str, **work) -> Path:
        recordings = [script.Recording(name, length, None, "", None) for length in seconds]
        script.write_predictions(tmp_path / name, recordings, {"device": device, "batch_size": 2, **work})
        return tmp_path / name

    warm_up = {"warm_up_seconds": 60.0, "warm_up_audio_seconds": 8.0}
    paths = [
        write("a", [4.0, 4.0, 2.0], "cpu", process_seconds=65.0, **warm_up),
        write("b", [5.0, 5.0], "gpu", process_seconds=62.0, **warm_up | {"warm_up_audio_seconds": 5.0}),
        write("c", [10.5], "cpu", process_seconds=3.0),
    ]
    predictions, speed = script.read_predictions(paths)
    assert [prediction["seconds"] for prediction in predictions] == [4, 4, 2, 5, 5, 10.5]
    assert speed == {
        "audio_seconds": 30.5,
        "process_seconds": 130.0,
        "real_time_factor": 4.2623,
        "rtfx": 1.75,
        "clips_per_second": 0.046,
        "device": "cpu, gpu",
        "batch_size": "2",
    }


@pytest.mark.parametrize(
    ("number", "long_form", "size"),
    [
        (10, False, 64),
        (640, False, 64),
        (1024, False, 64),
        (1040, False, 65),
        (8192, False, 512),
        (9000, False, 512),
        (17, True, 8),
    ],
)
def test_a_shard_of_an_evaluation_is_a_sixteenth_of_all_but_neither_small_nor_large(number, long_form, size):
    shards = run_short_form_eval.plan_shards(Path(), [[row] for row in range(number)], {"a": 1}, long_form)
    assert [len(rows) for rows in shards.values()] == [size] * (number // size) + [number % size] * (number % size > 0)
    assert [row for rows in shards.values() for (row,) in rows] == list(range(number))
    other = run_short_form_eval.plan_shards(Path(), [[0]], {"a": 2}, long_form)
    assert not other.keys() & run_short_form_eval.plan_shards(Path(), [[0]], {"a": 1}, long_form).keys()


def test_the_digest_of_speech_changes_with_the_columns_and_with_the_values_of_those_that_are_given():
    def digest(audio: bytes = b"audio", name: str = "a", other: str = "b", column: str = "other") -> str:
        rows = [{"audio": {"bytes": audio, "path": "x"}, "name": name, column: other}]
        dataset = datasets.Dataset.from_list(rows)
        return run_short_form_eval.speech_digest(dataset, None, "audio", ["name"])

    found = [digest(), digest(audio=b"audi0"), digest(audio=b"audio and more"), digest(name="c"), digest(column="text")]
    assert len(set(found)) == 5
    assert digest(other="c") == found[0]


@pytest.mark.parametrize("script", [run_pseudo_labelling, run_short_form_eval])
def test_the_digest_of_a_model_changes_with_its_rules_and_with_each_weight(script, tiny_teacher):
    digest_of = script.teacher_digest if script is run_pseudo_labelling else script.model_digest
    model = WhisperForConditionalGeneration.from_pretrained(tiny_teacher, dtype=torch.float32)
    first = digest_of(model)
    assert digest_of(model) == first
    for weight in (model.model.encoder.conv1.bias, model.model.decoder.layers[-1].fc2.weight):
        with torch.no_grad():
            weight.flatten()[0] += 1e-5
        assert digest_of(model) != first
        first = digest_of(model)
    rules = ("suppress_tokens", [1, 2]), ("begin_suppress_tokens", [3]), ("max_initial_timestamp_index", 7)
    for name, value in rules:
        setattr(model.generation_config, name, value)
        assert digest_of(model) != first
        first = digest_of(model)


@pytest.mark.parametrize(("length", "is_runaway"), [(16, False), (17, True)])
def test_a_runaway_is_over_twice_as_long_as_its_reference_and_ten_characters(length, is_runaway):
    scorer = run_short_form_eval.Scorer("kotoba", "characters", run_short_form_eval.scoring_rule("kotoba", "ja", None))
    prediction = {"reference": "あいう", "hypothesis": (KANA * 2)[:length]}
    run_short_form_eval.score_clip(prediction, [scorer])
    assert prediction["runaway"] == is_runaway


@pytest.mark.parametrize(
    ("rates", "scale"),
    [
        ([], 1.0),
        ([(10, 12), (20, 30), (30, 39)], 39),
        ([(10, 12), (20, 30), (30, 90)], 80),  # four times the median
        ([(10, 12), (20, 50)], 40),  # of two, the lower
        ([(0, 0), (0, 9), (5, 7)], 9),
        ([(0.1, 0.2)], 1.0),
    ],
)
def test_the_full_bar_of_a_page_is_the_highest_interval_but_at_most_four_medians(rates, scale):
    summaries = [{"rate": None, "high": None}, *({"rate": rate, "high": high} for rate, high in rates)]
    assert run_short_form_eval.bar_scale(summaries) == scale


def test_the_p_value_of_a_difference_is_two_sided():
    """By a thousand draws: all of them show that a model is better, none does, or about a half."""
    better = np.array([[1, 0, 0, 10]] * 20)
    worse = np.array([[5, 0, 0, 10]] * 20)
    test = run_short_form_eval.paired_difference(better, worse)
    assert test == {"difference": pytest.approx(40), "low": pytest.approx(40), "high": pytest.approx(40), "p": 2 / 1001}
    assert run_short_form_eval.paired_difference(better, better) == {"difference": 0, "low": 0, "high": 0, "p": 1.0}
    mixed = np.array([[0, 0, 0, 10], [3, 0, 0, 10]] * 10)  # on average 0.5 points more
    test = run_short_form_eval.paired_difference(better, mixed)
    drawn = run_short_form_eval.bootstrap(np.stack([better, mixed], axis=1))
    fewer = sum(second <= first for first, second in drawn.tolist())
    assert 0 < fewer < 500
    assert (test["difference"], test["p"]) == (pytest.approx(5), pytest.approx(2 * (1 + fewer) / 1001))


def fake_evaluation(**changes) -> run_short_form_eval.Evaluation:
    score = {"rate": 12.344, "low": 10.0, "high": 15.0, "unit": "characters"}
    metrics = {
        "name": "test",
        "dataset": "d",
        "language": "ja",
        "clips": 1234,
        "audio_seconds": 7200.0,
        "rtfx": 12.5,
        "device": "gpu",
        "dtype": "bfloat16",
        "batch_size": "16",
        "runaways": 3,
        "runaway_rate": 0.243,
        "empty_references": 5,
        "silence": {"clips_with_text": 2, "characters": 1500},
        "parameters": 756_220_160,
        "unusable": {"broken": [str(n) for n in range(12)]},
        "process_seconds": 576.4,
        "scorer": "kotoba",
        "scores": {"kotoba": score, "words": score | {"rate": None, "unit": "words"}},
    }
    return run_short_form_eval.Evaluation("m", "d", metrics | changes, [])


def test_a_page_tells_the_facts_of_its_metrics():
    assert run_short_form_eval.page_facts(fake_evaluation()) == {
        "Model": "m",
        "Dataset": "d, test",
        "Clips": "1,234, 2.00 h",
        "RTFx": "12.5 seconds of audio per second",
        "Computed by": "gpu, bfloat16, batches of 16",
        "Runaways": "3 (0.24 %)",
        "Parameters": "756.2 M",
        "Without a reference": "5; 2 of them got text, 1,500 characters",
        "Left out: broken": "12: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …",
    }
    other = run_short_form_eval.page_facts(fake_evaluation(rtfx=None, parameters=None))
    assert (other["RTFx"], other["Parameters"], "Computed by" in other) == ("unknown", "unknown", False)


def test_a_comparison_has_the_evaluations_of_the_same_data_together(tmp_path, monkeypatch):
    script = run_short_form_eval
    monkeypatch.setattr(script, "read_evaluation", lambda path: fake_evaluation(name=path.suffixes[0][1:]))
    for model, split in itertools.product("ab", ("test", "dev")):
        (tmp_path / model).mkdir(exist_ok=True)
        (tmp_path / model / f"metric.{split}.json").touch()
    found = script.read_evaluations([str(tmp_path / model) for model in "ab"])
    shown = [(evaluation.data[1], evaluation.model) for evaluation in found]
    assert shown == [("dev", "m"), ("dev", "m (b)"), ("test", "m"), ("test", "m (b)")]


def test_equal_clips_of_two_kinds_of_data_stay_apart_in_a_comparison():
    evaluations = [fake_evaluation(name=name) for name in ("test", "test", "test.long_form")]
    for evaluation in evaluations:
        evaluation.predictions = [{"id": "clip", "reference": "はい", "problem": ""}]
    first, second, long = [(evaluation, evaluation.predictions[0]) for evaluation in evaluations]
    assert run_short_form_eval.find_versions(evaluations) == [[first, second], [long]]


def test_a_comparison_has_a_line_of_figures_for_each_evaluation():
    test = {"difference": -1.234, "low": -2.0, "high": 0.5, "p": 0.0219}
    tests = (None, {}, {"kotoba": test})
    evaluations = [fake_evaluation(), fake_evaluation(rtfx=None, parameters=None, process_seconds=None)]
    evaluations.append(fake_evaluation())
    for evaluation, of_it in zip(evaluations, tests, strict=True):
        evaluation.tests = of_it
    rate = "12.34 (10.00 to 15.00)"
    assert run_short_form_eval.comparison_table(evaluations) == [
        [
            "Model",
            "Parameters",
            "Dataset",
            "Clips",
            "CER (kotoba) %",
            "WER (words) %",
            "Against the first",
            "RTFx",
            "Seconds",
        ],
        ["m", "756.2 M", "d", "1,234", rate, "", "", "12.5", "576"],
        ["m", "", "d", "1,234", rate, "", "other clips", "", ""],
        ["m", "756.2 M", "d", "1,234", rate, "", "-1.23 (-2.00 to +0.50, p = 0.022)", "12.5", "576"],
    ]


def test_a_page_plays_as_many_of_the_worst_clips_as_its_megabytes_hold(monkeypatch):
    """Each is 1,000 characters of base64; a clip of 120 s is played, and a longer one is not."""
    script = run_short_form_eval
    monkeypatch.setattr(script, "encode_audio", lambda waveform: "x" * 1000)
    base = {"problem": None, "normalised_reference": "あ", "normalised_hypothesis": "い", "seconds": 1.0}
    clips = [base | {"cer": 10.0}, base | {"cer": 30.0, "seconds": 120.0}, base | {"cer": 90.0, "seconds": 120.1}]
    clips += [base | {"normalised_reference": ""}, base | {"cer": 20.0}, base | {"problem": "broken"}]
    clips += [base | {"normalised_reference": "", "normalised_hypothesis": ""}]  # as it should be
    for megabytes, played in ((0.003, [1, 3, 4]), (0.002999, [1, 3]), (1, [0, 1, 3, 4, 6]), (0, [])):
        predictions = [dict(clip) for clip in clips]
        script.embed_audio(predictions, lambda row: None, megabytes)
        assert [row for row, prediction in enumerate(predictions) if "audio" in prediction] == played


# ---- loading ---------------------------------------------------------------------------------------------------------


def sparse_tars(directory: Path, *sizes: int) -> list:
    jobs = []
    for number, size in enumerate(sizes):
        path = directory / f"{number}.tar"
        with open(path, "wb") as file:
            file.truncate(size)
        settings = {"tars": len(sizes)}
        shard = directory / f"{number}.parquet"
        jobs.append(reazonspeech_manual_dataloader.TarJob(path, path, None, shard, settings))
    return jobs


@pytest.mark.parametrize(
    ("output", "overwrite", "workers", "done", "left", "time"),
    [
        ("out", False, 1, "1 of 4 shards", "3 tars, 7.000 GB", "0:00:56"),
        ("out", False, 3, "1 of 4 shards", "3 tars, 7.000 GB", "0:00:19"),
        ("out", False, 16, "1 of 4 shards", "3 tars, 7.000 GB", "0:00:19"),  # no more than tars
        ("out", True, 2, "0 of 4 shards", "4 tars, 9.000 GB", "0:00:36"),
        (None, False, 2, "0 of 4 shards", "4 tars, 9.000 GB", "0:00:36"),
    ],
)
def test_the_plan_of_loading_is_scaled_from_the_first_tar_to_the_bytes_that_are_left(
    tmp_path, monkeypatch, clock, capsys, output, overwrite, workers, done, left, time
):
    """The first of four tars has a gigabyte, 1,000 clips and half an hour of audio, and takes eight seconds."""
    script = reazonspeech_manual_dataloader
    jobs = sparse_tars(tmp_path, 10**9, 2 * 10**9, 4 * 10**9, 2 * 10**9)
    notes = {"counts": {"clips": 1000, "seconds": 1800.0}}
    monkeypatch.setattr(script, "process_tars", taking(8, clock, lambda jobs, num_workers: [notes] * len(jobs)))
    monkeypatch.setattr(script, "read_notes", lambda path: {"settings": {"tars": 4}} if path == jobs[3].shard else None)
    args = types.SimpleNamespace(output_dir=output, overwrite_output_dir=overwrite, preprocessing_num_workers=workers)
    script.print_loading_plan(args, jobs, "nothing")
    assert told(capsys) == {
        "input": "4 tars, 9.000 GB, about 9,000 clips, 4.50 h",
        "done": done,
        "left": left,
        "writes": output or "nothing",
        "pushes": "nothing",
        "time": f"about {time} (from a sample of 1000 clips)",
    }


def test_the_statistics_of_loading_are_the_sums_in_their_units_and_a_bar_for_each_class(capsys):
    counts = collections.Counter({"clips": 1200, "bytes": 2_500_000_000, "seconds": 5400.0, "characters": 34_567})
    counts |= collections.Counter({"from 0 s": 300, "from 5 s": 880, "from 30 s": 20})
    problems = {"malformed lines": ["a", "b", "c", "d"], reazonspeech_manual_dataloader.UNDECODABLE: ["e"]}
    reazonspeech_manual_dataloader.print_statistics(counts, problems)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1,200 clips, 2.500 GB, 1.50 hours,"
    assert lines[1] == "34,567 characters; left out: 4 malformed lines (a, b, c, ...)"
    assert lines[2] == "not decodable, but kept: 1 clips that are no audio (e)"
    assert len(lines) == 13
    assert lines[3] == f"  0 to   1 s        300 {'#' * 15}"
    assert lines[7] == f"  5 to   7 s        880 {'#' * 44}"
    assert lines[12] == " 30 to ... s         20 #"


def test_the_record_of_loading_has_hours_and_the_rate_of_this_run():
    counts = {"clips": 100, "bytes": 10, "seconds": 1800.0, "characters": 1000}
    notes = {"counts": counts, "problems": {"malformed lines": ["a"]}}
    args = argparse.Namespace(target="tiny")
    record = reazonspeech_manual_dataloader.loading_record(args, {"tars": 2}, notes, 40, 8.0)
    assert record.pop("versions").keys() == {"datasets", "huggingface_hub", "pyarrow"}
    assert record == {
        "status": "complete",
        "settings": {"tars": 2},
        "clips": 100,
        "hours": 0.5,
        **notes,
        "wall_seconds": 8.0,
        "clips_per_second": 5.0,
        "arguments": {"target": "tiny"},
    }


@pytest.mark.parametrize("change", ["name", "size", "time", "tsv", "fewer"])
def test_the_fingerprint_of_a_download_changes_with_each_of_its_parts(tmp_path, change):
    files = [tmp_path / name for name in ("a.tsv", "a.000.tar", "a.001.tar", "a.002.tar")]
    for path in files:
        path.write_bytes(b"content")
        os.utime(path, ns=(10**18, 10**18))

    def fingerprint(*paths: Path) -> str:
        return reazonspeech_manual_dataloader.Corpus(files[0], dict(enumerate(paths))).fingerprint()

    before = fingerprint(*files[1:3])
    if change == "size":
        files[2].write_bytes(b"contents")
    if change in ("size", "time", "tsv"):
        number = 0 if change == "tsv" else 2
        os.utime(files[number], ns=(10**18, 10**18 + (change != "size")))
    paths = {"name": (files[1], files[3]), "fewer": files[1:2]}.get(change, files[1:3])
    assert fingerprint(*paths) != before


# ---- downloading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "time", "rate"),
    [(math.inf, "0:06:40", "2.0"), (500_000.0, "0:26:40", "0.5"), (5e6, "0:06:40", "2.0")],
)
def test_the_time_of_a_download_is_of_the_bytes_that_are_left_at_the_rate_that_is_measured(
    monkeypatch, clock, capsys, limit, time, rate
):
    """A megabyte comes in half a second, and 800 MB are left."""
    script = reazonspeech_manual_downloader

    class Response:
        raw = types.SimpleNamespace(read=taking(0.5, clock, lambda size: bytes(10**6)))

    monkeypatch.setattr(script, "open_url", lambda *request: contextlib.nullcontext(Response))
    run = types.SimpleNamespace(args=types.SimpleNamespace(bytes_per_second=limit))
    script.print_download_time(types.SimpleNamespace(url="u"), run, 8 * 10**8)
    assert capsys.readouterr().out == f"time: about {time} over one connection, at {rate} MB/s\n"


def test_the_room_of_a_download_is_its_bytes_without_those_received_and_a_spare(monkeypatch, tmp_path, capsys):
    script = reazonspeech_manual_downloader
    for free in (4 * 10**9 + script.SPARE, 4 * 10**9 + script.SPARE - 1):
        monkeypatch.setattr(script.shutil, "disk_usage", lambda _, free=free: types.SimpleNamespace(free=free))
        refused = contextlib.nullcontext() if free % 10 == 4 else pytest.raises(SystemExit, match="is too small")
        with refused:
            script.check_space(6 * 10**9, 2 * 10**9, tmp_path / "new")
    assert capsys.readouterr().out == "free on the disk: 4.067 GB\n" * 2


def test_what_was_received_of_a_file_of_unknown_size_makes_no_other_file_smaller(tmp_path, monkeypatch, capsys):
    script = reazonspeech_manual_downloader
    sizes = {"tiny.tiny.tsv": None, "tiny.000.tar": 3 * 10**9}
    (tmp_path / "tiny").mkdir()
    for name, received in (("tiny.tiny.tsv", 2 * 10**9), ("tiny.000.tar", 10**9)):
        with open(tmp_path / "tiny" / f"{name}.part", "wb") as file:
            file.truncate(received)

    def ask(file, run) -> None:
        file.size = sizes[file.name]

    lefts = []
    monkeypatch.setattr(script, "ask_size", ask)
    monkeypatch.setattr(script, "print_download_time", lambda file, run, left: lefts.append(left))
    assert script.main(["--data_dir", str(tmp_path), "--dry_run"]) == 0
    assert "to download: 2 files, 3.000 GB (1.000 GB already received)\n" in capsys.readouterr().out
    assert lefts == [2 * 10**9]


@pytest.mark.parametrize(
    ("asked", "pauses"),
    [(0.0, [2, 4, 8, 16, 32, 60, 60, 60]), (50.0, [50, 50, 50, 50, 50, 60, 60, 60]), (10_000.0, [600] * 8)],
)
def test_pauses_between_attempts_double_up_to_a_minute_and_obey_the_server_up_to_ten(monkeypatch, asked, pauses):
    script = reazonspeech_manual_downloader
    waited = []
    args = types.SimpleNamespace(retries=8, backoff=2.0)
    run = types.SimpleNamespace(args=args, wait=waited.append)
    file = types.SimpleNamespace(name="f", received=lambda: 0)
    monkeypatch.setattr(script.random, "uniform", lambda low, high: high if (low, high) == (0.5, 1.0) else None)

    def attempt(file, run) -> None:
        raise script.TryAgainError("lost", asked)

    with pytest.raises(script.GiveUpError, match=r"lost \(gave up after 9 attempts\)"):
        script.retry(attempt, file, run)
    assert waited == pauses


def test_the_rate_limit_makes_each_block_wait_for_those_before(clock, monkeypatch):
    script = reazonspeech_manual_downloader
    run = script.Run(types.SimpleNamespace(bytes_per_second=500_000.0))
    waited = []
    monkeypatch.setattr(run, "wait", waited.append)
    run.throttle(1_000_000)
    clock[0] = 0.5
    run.throttle(500_000)
    clock[0] = 10.0  # nothing is saved up in a pause
    run.throttle(500_000)
    assert waited == [2.0, 2.5, 1.0]


@pytest.mark.parametrize(("bytes_a_second", "limit", "is_slow"), [(1024, 0, False), (1023, 0, True), (1023, 5, False)])
def test_a_connection_under_a_kilobyte_a_second_is_closed_unless_the_user_limits_it(
    clock, tmp_path, bytes_a_second, limit, is_slow
):
    script = reazonspeech_manual_downloader
    blocks = [bytes(bytes_a_second * 10)] * 12
    response = types.SimpleNamespace(
        raw=types.SimpleNamespace(read1=taking(10.01, clock, lambda *_, **__: blocks.pop() if blocks else b""))
    )
    run = types.SimpleNamespace(
        args=types.SimpleNamespace(timeout=60.0, rate_limit=limit),
        advance=lambda received: None,
        throttle=lambda received: None,
    )
    file = types.SimpleNamespace(part=tmp_path / "part")
    if is_slow:
        with pytest.raises(script.TryAgainError, match="received only 61,380 bytes in 60 s"):
            script.receive_body(response, file, run)
    else:
        script.receive_body(response, file, run)
        assert file.part.stat().st_size == 120 * bytes_a_second
