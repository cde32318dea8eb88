"""run_data_filtering.py: what it keeps, the labels and features it stores, and that nothing is lost on the way."""

import contextlib
import errno
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jiwer
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Features, List, Value, load_dataset
from huggingface_hub import HfApi, snapshot_download
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, WhisperFeatureExtractor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

import run_data_filtering as script

SCRIPT = Path(script.__file__)
DATA = ("text", "whisper_transcript", "labels", "input_length", "wer", "cer")


# ---- a labelled dataset ----------------------------------------------------------------------------------------------


def tone(seconds: float, format: str = "WAV", rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    samples = np.sin(np.arange(round(seconds * rate)) * 0.05) * np.linspace(0.1, 0.9, round(seconds * rate))
    soundfile.write(file, samples, rate, format=format)
    return file.getvalue()


def labelled(root: Path, rows: list[dict], files: int = 2, **columns) -> Path:
    """Rows of name, audio (bytes), transcription and whisper_transcript as a labelled dataset: config tiny, train."""
    text_labels = any(isinstance(row["whisper_transcript"], str) for row in rows)
    features = Features(
        {
            "name": Value("string"),
            "audio": Audio(sampling_rate=16000, decode=False),
            "transcription": Value("string"),
            "whisper_transcript": Value("string") if text_labels else List(Value("int32")),
            **columns,
        }
    )
    rows = [
        {"name": f"clip {i}"} | row | {"audio": {"bytes": row["audio"], "path": None}} for i, row in enumerate(rows)
    ]
    (root / "tiny").mkdir(parents=True)
    for file in range(files):
        part = rows[file * len(rows) // files : (file + 1) * len(rows) // files]
        path = root / "tiny" / f"train-{file:05d}-of-{files:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part, features.arrow_schema), path, row_group_size=5)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: tiny\n  data_files:\n  - split: train\n    path: tiny/train-*\n---\n"
    )
    return root


class Teacher:
    """Writes labels as the labeller does."""

    def __init__(self, path: Path, language: str = "ja"):
        self.path, self.tokenizer = path, AutoTokenizer.from_pretrained(path)
        self.id = self.tokenizer.get_added_vocab()
        self.prefix = [self.id[f"<|{name}|>"] for name in ("startoftranscript", language, "transcribe")]
        self.end, self.no_timestamps = self.id["<|endoftext|>"], self.id["<|notimestamps|>"]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def label(self, text: str, end_time: float | None = None) -> list[int]:
        if end_time is None:
            return [*self.prefix, self.no_timestamps, *self.ids(text), self.end]
        first = self.no_timestamps + 1
        return [*self.prefix, first, *self.ids(text), first + round(end_time / 0.02), self.end]


@pytest.fixture(scope="module")
def teacher(tiny_teacher) -> Teacher:
    return Teacher(tiny_teacher)


@pytest.fixture(scope="module")
def rows(clips, teacher) -> list[dict]:
    """60 clips of speech whose labels have from no to many wrong characters, every other one with timestamps."""
    draw, rows = random.Random(0), []
    for number in range(60):
        clip = clips[number % len(clips)]
        text = list(clip["transcription"])
        for _ in range(draw.choice([0, 0, 0, 1, 1, 2, 5, len(text)])):
            text[draw.randrange(len(text))] = draw.choice("あいうえお、。")
        label = teacher.label("".join(text), 1.5 if number % 2 else None)
        rows.append(clip | {"name": f"{number} {clip['name']}", "whisper_transcript": label})
    return rows


@pytest.fixture(scope="module")
def source(rows, tmp_path_factory) -> Path:
    return labelled(tmp_path_factory.mktemp("labelled") / "speech", rows, files=3)


@pytest.fixture
def arguments(teacher):
    def make(dataset, *more, output: Path | None = None) -> list[str]:
        given = ["-d", dataset, "--dataset_config_name", "tiny", "--model", teacher.path, "--max_label_length", 448]
        given += ["--shard_size", 8, "--preprocessing_num_workers", 2, *more]
        return [str(value) for value in [*given, *(["--output_dir", output] if output else [])]]

    return make


@pytest.fixture
def run(arguments):
    """Filter in this process (its workers are others) and return the exit code."""
    return lambda *given, **more: script.main(arguments(*given, **more))


def read(directory: Path, columns=DATA) -> list[dict]:
    shards = sorted((directory / "tiny").glob("train-*.parquet"))
    return pa.concat_tables(pq.read_table(shard, columns=list(columns)) for shard in shards).to_pylist()


def contents(*directories: Path) -> dict[str, bytes]:
    """Names and bytes of all shards."""
    return {f"{d.name}/{f.name}": f.read_bytes() for d in directories for f in sorted((d / "tiny").iterdir())}


def record(directory: Path) -> dict:
    return json.loads((directory / "filtering.tiny.train.json").read_text())


@pytest.fixture(scope="module")
def filtered(source, teacher, tmp_path_factory) -> Path:
    """The directory of `speech.cer_10.0` and `speech.cer_10.0.vectorized`, made without interruption by one worker."""
    output = tmp_path_factory.mktemp("filtered")
    given = ["-d", source, "--dataset_config_name", "tiny", "--model", teacher.path, "--max_label_length", 448]
    given += ["--shard_size", 8, "--preprocessing_num_workers", 1, "--cer_threshold", 10, "--output_dir", output]
    given += ["--timestamp_probability", 0.5, "--condition_on_prev_probability", 0.5]
    assert script.main([str(value) for value in given]) == 0
    return output


SAME = ("--cer_threshold", 10, "--timestamp_probability", 0.5, "--condition_on_prev_probability", 0.5)
NAMES = ("speech.cer_10.0", "speech.cer_10.0.vectorized")


# ---- scores ----------------------------------------------------------------------------------------------------------


def edit_distance(a, b) -> int:
    """The textbook table, row by row."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        here = [i]
        for j, y in enumerate(b, 1):
            here.append(min(above[j] + 1, here[-1] + 1, above[j - 1] + (x != y)))
        above = here
    return above[-1]


def slow_scores(reference: str, hypothesis: str, language: str) -> tuple[float, float] | None:
    """WER and CER in per cent, the obvious way; None for an empty reference. A Japanese text is one word."""
    normalize = EnglishTextNormalizer({}) if language == "en" else BasicTextNormalizer()
    glue = " " if language == "en" else ""
    reference, hypothesis = (glue.join(normalize(text).split()) for text in (reference, hypothesis))
    if not reference:
        return None
    wer = 100 * edit_distance(reference.split(), hypothesis.split()) / len(reference.split())
    return wer, 100 * edit_distance(reference, hypothesis) / len(reference)


JAPANESE = st.text(st.sampled_from("東京に行く。、アメリカ12ａＡ a[]()\n　!ー々"), max_size=12)
ENGLISH = st.lists(
    st.sampled_from(["the", "Cat", "can't", "twenty", "five", "$5", "um", "colour", ",", "sat."]), max_size=6
)


@pytest.mark.parametrize("language", ["ja", "en"])
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_error_counts_give_the_textbook_scores_and_those_of_jiwer(language, data):
    texts = JAPANESE if language == "ja" else ENGLISH.map(" ".join)
    reference, hypothesis = data.draw(texts), data.draw(texts)
    expected = slow_scores(reference, hypothesis, language)
    normalise = script.text_normaliser(language, {})
    pair = normalise(reference), normalise(hypothesis)
    if expected is None:
        assert pair[0] == ""
        return
    counts = script.error_counts(*pair)
    assert (script.percent(*counts[:2]), script.percent(*counts[2:])) == expected
    assert expected == (pytest.approx(100 * jiwer.wer(*pair)), pytest.approx(100 * jiwer.cer(*pair)))


@pytest.mark.parametrize("language", ["ja", "en"])
@given(pairs=st.data())
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_exactly_the_clips_at_or_under_the_threshold_are_kept(language, pairs, tiny_teacher, tmp_path_factory):
    teacher = Teacher(tiny_teacher, language)
    texts = JAPANESE if language == "ja" else ENGLISH.map(" ".join)
    pairs = pairs.draw(
        st.lists(st.tuples(texts, texts) | texts.map(lambda text: (text, text)), min_size=1, max_size=20)
    )
    pairs.append(("東京 a", "東京 a"))
    metric, threshold = ("cer", 25) if language == "ja" else ("wer", 50)
    rows = [{"audio": tone(0.2), "transcription": a, "whisper_transcript": teacher.label(b)} for a, b in pairs]
    dataset = labelled(tmp_path_factory.mktemp("pairs") / "pairs", rows, files=1)
    given = ["-d", dataset, "--model", tiny_teacher, f"--{metric}_threshold", threshold, "--language", language]
    assert script.main([str(value) for value in [*given, "--max_label_length", 448, "--skip_logmel"]]) == 0
    scores = [slow_scores(*pair, language) for pair in pairs]
    which = 1 if metric == "cer" else 0
    expected = [
        {"text": pair[0], "labels": teacher.label(pair[1]), "wer": score[0], "cer": score[1]}
        for pair, score in zip(pairs, scores, strict=True)
        if score and score[which] <= threshold
    ]
    output = dataset.with_name(f"pairs.{metric}_{threshold}.0")
    assert read(output, ("text", "labels", "wer", "cer")) == expected
    report = record(output)["report"]
    assert report["reasons"].get("empty reference", 0) == scores.count(None)
    assert report["clips"] == [len(pairs), len(expected)]


def test_a_score_equal_to_the_threshold_is_kept(teacher, run, tmp_path):
    pairs = [("あいうえおかきくけこ", "あいうえおかきくけん"), ("あいうえおかきくけ", "あいうえおかきくん")]
    rows = [{"audio": tone(0.2), "transcription": a, "whisper_transcript": teacher.label(b)} for a, b in pairs]
    run(labelled(tmp_path / "edge", rows, files=1), "--cer_threshold", 10)
    assert [row["cer"] for row in read(tmp_path / "edge.cer_10.0")] == [10.0]


def test_a_japanese_text_is_one_word_whatever_commas_and_spaces_it_has(teacher, run, tmp_path):
    """As in the evaluation: a comma, which the normaliser makes a space, splits no word."""
    pairs = [
        ("今日は、晴れです。", "今日は晴れです"),
        ("今日は 晴れです", "今日は、晴れです"),
        ("今日は、雨", "今日は、雪"),
    ]
    rows = [{"audio": tone(0.2), "transcription": a, "whisper_transcript": teacher.label(b)} for a, b in pairs]
    assert run(labelled(tmp_path / "commas", rows, files=1)) == 0
    assert [(row["wer"], row["cer"]) for row in read(tmp_path / "commas.wer_10.0")] == [(0, 0), (0, 0)]
    assert record(tmp_path / "commas.wer_10.0")["report"]["worst"][0]["wer"] == 100


def test_labels_stored_as_strings_give_the_same_rows_as_ids(rows, teacher, run, filtered, tmp_path):
    decoded = [
        row | {"whisper_transcript": teacher.tokenizer.decode(row["whisper_transcript"], decode_with_timestamps=True)}
        for row in rows
    ]
    assert "<|1.50|>" in decoded[1]["whisper_transcript"]
    assert run(labelled(tmp_path / "speech", decoded), *SAME) == 0
    columns = ("text", "labels", "input_length", "wer", "cer")
    assert read(tmp_path / NAMES[0], columns) == read(filtered / NAMES[0], columns)
    assert isinstance(read(tmp_path / NAMES[0])[0]["whisper_transcript"], str)


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_the_teachers_sequences_with_timestamps_and_prompts_as_drawn(rows, teacher, filtered):
    kept = read(filtered / NAMES[0])
    expected_rows = [
        i for i, row in enumerate(rows) if slow_scores(row["transcription"], text_of(row, teacher), "ja")[1] <= 10
    ]
    assert len(kept) == len(expected_rows) > 20
    prompts = timestamps = 0
    for row, number in zip(kept, expected_rows, strict=True):
        label = row["labels"]
        stored = rows[number]["whisper_transcript"]
        assert row["whisper_transcript"] == stored
        assert row["text"] == rows[number]["transcription"]
        start = label.index(teacher.prefix[0])
        if start:
            prompts += 1
            previous = [
                token for token in rows[number - 1]["whisper_transcript"][4:-1] if token <= teacher.no_timestamps
            ]
            assert label[:start] == [teacher.id["<|startofprev|>"], *previous]
        plain = [token for token in stored if token <= teacher.no_timestamps and token != teacher.no_timestamps]
        if label[start:] == stored and number % 2:
            timestamps += 1
        else:
            assert label[start:] == [*plain[:3], teacher.no_timestamps, *plain[3:]]
    assert 0.25 < prompts / len(kept) < 0.75
    assert 0.25 < timestamps / sum(number % 2 for number in expected_rows) < 0.75


def text_of(row: dict, teacher: Teacher) -> str:
    return teacher.tokenizer.decode(row["whisper_transcript"], skip_special_tokens=True)


@given(
    text=st.lists(st.integers(0, 599), max_size=60),
    previous=st.lists(st.integers(0, 599), max_size=60),
    row=st.integers(0, 10**9),
    room=st.integers(0, 40),  # tokens beside those of the label itself
    positions=st.sampled_from([20, 448]),
)
@example(text=[1, 2], previous=[3, 4, 5], row=0, room=0, positions=448)
@example(text=[1, 2], previous=[3, 4, 5], row=0, room=1, positions=448)
@example(text=[1, 2], previous=[3, 4, 5], row=0, room=3, positions=448)
@example(text=[1, 2], previous=[3, 4, 5], row=0, room=4, positions=448)
@example(text=[1, 2], previous=[*range(300)], row=0, room=441, positions=448)
@settings(max_examples=200, deadline=None)
def test_a_prompt_is_the_end_of_the_text_before_and_never_makes_a_label_too_long(
    teacher, text, previous, row, room, positions
):
    """Of the decoder's positions it has at most half, <|startofprev|> included."""
    tokens = script.find_special_tokens(teacher.id, {"language": "ja", "task": "transcribe"})
    choices = {"seed": 1, "timestamp_probability": 0.0, "condition_on_prev_probability": 1.0}
    choices |= {"max_label_length": len(text) + 5 + room, "max_positions": positions}
    label = script.build_label(text, text, previous, row, tokens, choices)
    start = label.index(tokens.prefix[0])
    assert label[start:] == [*tokens.prefix, tokens.no_timestamps, *text, tokens.end]
    longest = min(room, positions // 2) - 1
    prompt = previous[-longest:] if longest > 0 else []
    assert label[:start] == ([tokens.previous, *prompt] if prompt else [])


def test_choices_depend_on_the_seed_and_the_row_alone(teacher):
    tokens = script.find_special_tokens(teacher.id, {"language": "ja", "task": "transcribe"})
    body = [tokens.no_timestamps + 1, 5, tokens.no_timestamps + 9]

    def drawn(seed: int) -> list[tuple[bool, bool]]:
        choices = {"seed": seed, "timestamp_probability": 0.3, "condition_on_prev_probability": 0.6}
        choices |= {"max_label_length": 128, "max_positions": 448}
        labels = [script.build_label(body, [5], [7], row, tokens, choices) for row in range(2000)]
        return [(body[0] in label, label[0] == tokens.previous) for label in labels]

    assert drawn(1) == drawn(1) != drawn(2)
    with_timestamps, with_prompt = np.mean(drawn(1), axis=0)
    assert abs(with_timestamps - 0.3) < 0.04
    assert abs(with_prompt - 0.6) < 0.04


def test_the_prompt_is_the_row_before_also_in_another_shard_where_that_can_be_used(rows, teacher, run, tmp_path):
    rows = [dict(row) for row in rows[:12]]
    rows[3]["whisper_transcript"] = None
    rows[6]["whisper_transcript"] = teacher.label("")
    dataset = labelled(tmp_path / "rows", rows)
    choices = ("--wer_threshold", 1000, "--condition_on_prev_probability", 1)
    results = []
    for size in (1, 5, 100):
        assert run(dataset, *choices, "--skip_logmel", "--shard_size", size, output=tmp_path / str(size)) == 0
        results.append([row["labels"] for row in read(tmp_path / str(size) / "rows.wer_1000.0")])
    assert results[0] == results[1] == results[2]
    kept = [number for number in range(12) if number != 3]
    for number, label in zip(kept, results[0], strict=True):
        before = rows[number - 1]["whisper_transcript"] if number else None
        text = [token for token in (before or [])[4:-1] if token < teacher.no_timestamps]
        prompt = [teacher.id["<|startofprev|>"], *text] if text else []
        assert label[: label.index(teacher.prefix[0])] == prompt


# ---- features --------------------------------------------------------------------------------------------------------


def waveforms() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    clips = {}
    for seconds in (0.1, 1.0, 4.33, 29.97, 29.99, 30.0):
        size = round(seconds * 16_000)
        clips[f"noise of {seconds} s"] = draw.normal(size=size) * 0.1
        clips[f"clipped sine of {seconds} s"] = np.clip(3 * np.sin(np.arange(size) * 0.03), -1, 1)
        clips[f"whisper of {seconds} s"] = draw.normal(size=size) * np.hanning(size) * 1e-4
        clips[f"constant of {seconds} s"] = np.full(size, 0.5)
        clips[f"silence of {seconds} s"] = np.zeros(size)
    return {name: waveform.astype(np.float32) for name, waveform in clips.items()}


@pytest.mark.parametrize("mels", [80, 128])
def test_features_padded_back_are_the_extractors_bit_for_bit(mels):
    extractor = WhisperFeatureExtractor(feature_size=mels)
    clips = waveforms()
    expected = {name: extractor(clip, sampling_rate=16000)["input_features"][0].T for name, clip in clips.items()}
    for batch in (1, 7):
        for first in range(0, len(clips), batch):
            names = list(clips)[first : first + batch]
            spectrograms = script.log_mel([clips[name] for name in names], extractor).numpy()
            for name, spectrogram in zip(names, spectrograms, strict=True):
                features = spectrogram[:, : script.filled_frames(len(clips[name]))].T
                assert len(features) == min(-(-(len(clips[name]) + 200) // 160) + 1, 3000)
                padded = np.pad(features, ((0, 3000 - len(features)), (0, 0)), mode="edge")
                assert np.array_equal(padded, expected[name]), (name, batch)


def test_stored_features_are_the_extractors_to_float16_rounding(rows, teacher, filtered):
    extractor = WhisperFeatureExtractor.from_pretrained(teacher.path)
    audio = read(filtered / NAMES[0], ("audio", "labels", "input_length"))
    stored = read(filtered / NAMES[1], ("input_features", "labels", "input_length"))
    assert [row["labels"] for row in stored] == [row["labels"] for row in audio]
    for clip, row in zip(audio, stored, strict=True):
        waveform, _ = soundfile.read(io.BytesIO(clip["audio"]["bytes"]), dtype="float32")
        features = np.frombuffer(row["input_features"], "<f2").reshape(-1, 128)
        assert clip["input_length"] == row["input_length"] == len(waveform)
        assert len(features) == -(-(len(waveform) + 200) // 160) + 1
        expected = extractor(waveform, sampling_rate=16000)["input_features"][0].T.astype(np.float16)
        assert np.array_equal(np.pad(features, ((0, 3000 - len(features)), (0, 0)), mode="edge"), expected)


def test_other_formats_and_rates_are_decoded_to_mono_16_khz(teacher, run, tmp_path):
    stereo = io.BytesIO()
    soundfile.write(stereo, np.stack([np.sin(np.arange(44_100) * 0.02)] * 2, axis=1) * 0.3, 44_100, format="WAV")
    audio = [stereo.getvalue(), tone(1.0, "FLAC", 8_000), tone(1.0, "OGG"), tone(1.5, "MP3", 32_000)]
    rows = [{"audio": a, "transcription": "東京", "whisper_transcript": teacher.label("東京")} for a in audio]
    assert run(labelled(tmp_path / "formats", rows)) == 0
    assert [row["input_length"] for row in read(tmp_path / "formats.wer_10.0")] == [16_000, 16_000, 16_000, 24_000]
    assert [row["audio"]["bytes"] for row in read(tmp_path / "formats.wer_10.0", ["audio"])] == audio


def test_the_decoded_length_is_the_length_whatever_the_header_says(teacher, run, tmp_path):
    whole = tone(3.0, "MP3")
    cut = whole[: len(whole) * 2 // 3]
    assert soundfile.info(io.BytesIO(cut)).frames == 48_000
    decoded, _ = soundfile.read(io.BytesIO(cut), dtype="float32")
    assert 30_000 < len(decoded) < 40_000
    row = {"audio": cut, "transcription": "東京", "whisper_transcript": teacher.label("東京")}
    assert run(labelled(tmp_path / "cut", [row], files=1), "--max_duration_in_seconds", 2.5) == 0
    assert [row["input_length"] for row in read(tmp_path / "cut.wer_10.0")] == [len(decoded)]
    (row,) = read(tmp_path / "cut.wer_10.0.vectorized", ["input_features", "input_length"])
    assert row["input_length"] == len(decoded)
    features = np.frombuffer(row["input_features"], "<f2").reshape(-1, 128)
    assert len(features) == -(-(len(decoded) + 200) // 160) + 1


def test_audio_that_a_row_only_names_is_read_and_stored(clips, teacher, run, tmp_path):
    text = clips[0]["transcription"]
    row = {"audio": None, "transcription": text, "whisper_transcript": teacher.label(text)}
    dataset = labelled(tmp_path / "named", [row], files=1)
    (path,) = (dataset / "tiny").iterdir()
    (dataset / "clip.flac").write_bytes(clips[0]["audio"])
    table = pq.read_table(path)
    named = pa.array([{"bytes": None, "path": "clip.flac"}], table["audio"].type)
    pq.write_table(table.set_column(table.column_names.index("audio"), "audio", named), path)
    assert run(dataset) == 0
    assert [row["audio"]["bytes"] for row in read(tmp_path / "named.wer_10.0", ["audio"])] == [clips[0]["audio"]]


def test_clips_that_a_dataset_stores_under_full_paths_keep_their_names_and_no_places(clips, teacher, run, tmp_path):
    row = {"transcription": clips[0]["transcription"], "whisper_transcript": teacher.label(clips[0]["transcription"])}
    dataset = labelled(tmp_path / "named", [row | {"audio": clips[0]["audio"]}] * 2, files=1)
    (path,) = (dataset / "tiny").iterdir()
    table = pq.read_table(path)
    audio = [{"bytes": clips[0]["audio"], "path": name} for name in ("/home/someone/a.flac", "day/b.flac")]
    column = pa.array(audio, table["audio"].type)
    pq.write_table(table.set_column(table.column_names.index("audio"), "audio", column), path)
    assert run(dataset) == 0
    stored = read(tmp_path / "named.wer_10.0", ["audio"])
    assert [row["audio"]["path"] for row in stored] == ["a.flac", "day/b.flac"]


# ---- what can't be used, and what is not wanted ----------------------------------------------------------------------


def test_unusable_rows_are_counted_and_named_and_the_others_are_kept(clips, teacher, run, tmp_path):
    flac, text = clips[0]["audio"], clips[0]["transcription"]
    good = teacher.label(text)
    bad = {
        "no label": (flac, text, None),
        "empty label": (flac, text, []),
        "too large an id": (flac, text, [*good[:-1], 10**6, good[-1]]),
        "negative id": (flac, text, [*good[:-1], -100, good[-1]]),
        "english": (flac, text, [good[0], teacher.id["<|en|>"], *good[2:]]),
        "no start": (flac, text, good[4:]),
        "no end": (flac, text, good[:-1]),
        "text after the end": (flac, text, [*good, 5]),
        "special token inside": (flac, text, [*good[:-1], teacher.id["<|nospeech|>"], good[-1]]),
        "null reference": (flac, None, good),
        "reference of symbols": (flac, "(笑)。。。", good),
        "null audio": (None, text, good),
        "no audio": (b"not audio at all", text, good),
        "empty wav": (tone(0), text, good),
        "cut flac": (flac[:60], text, good),
        "damaged flac": (flac[:60] + bytes(2000), text, good),
    }
    rows = [
        {"name": name, "audio": audio, "transcription": reference, "whisper_transcript": label}
        for name, (audio, reference, label) in bad.items()
    ]
    rows.insert(5, {"name": "good", "audio": flac, "transcription": text, "whisper_transcript": good})
    rows.append(
        {"name": "padded", "audio": flac, "transcription": text, "whisper_transcript": [*good, good[-1], good[-1]]}
    )
    assert run(labelled(tmp_path / "bad", rows)) == 0
    assert [row["whisper_transcript"] for row in read(tmp_path / "bad.wer_10.0")] == [good, [*good, good[-1], good[-1]]]
    assert [row["labels"] for row in read(tmp_path / "bad.wer_10.0.vectorized", ["labels"])] == [good, good]
    report = record(tmp_path / "bad.wer_10.0")["report"]
    assert report["characters"] == [(5 + 2) * 17, 2 * 17]  # those of rows with a label, whatever their audio
    assert report["by_reference_length"]["16-31"] == [5 + 2, 2]
    assert report["unusable"] == {
        "no label": ["no label", "empty label"],
        "label ids outside the vocabulary": ["too large an id", "negative id"],
        "label for another language or task": ["english"],
        "malformed label": ["no start", "no end", "text after the end", "special token inside"],
        "empty reference": ["null reference", "reference of symbols"],
        "undecodable audio": ["null audio", "no audio", "empty wav", "cut flac", "damaged flac"],
    }


def test_rows_that_are_all_unusable_are_an_error(teacher, run, tmp_path):
    row = {"audio": b"", "transcription": "東京", "whisper_transcript": teacher.label("東京")}
    with pytest.raises(SystemExit, match=r"none of the 3 rows can be used.*undecodable audio"):
        run(labelled(tmp_path / "bad", [row] * 3))


def test_limits_on_duration_length_repetition_and_teacher_scores_drop_and_say_so(teacher, run, tmp_path):
    def row(name, seconds=1.0, text="東京に行く", **scores):
        row = {"name": name, "audio": tone(seconds), "transcription": text, "whisper_transcript": teacher.label(text)}
        return row | {"avg_logprob": -0.1, "compression_ratio": 1.0, "no_speech_prob": 0.0} | scores

    long_text = "東京に行く" * 3 + "大阪"
    rows = [
        *(row("good"), row("short", 0.49), row("half a second", 0.5), row("two seconds", 2.0), row("long", 2.01)),
        *(row("unlikely", avg_logprob=-1.5), row("dense", compression_ratio=2.5), row("silent", no_speech_prob=0.9)),
        *(row("unknown", avg_logprob=None), row("loop", text="はいはいはいはい"), row("no loop", text="はいはいはい")),
        row("wordy", text=long_text),
    ]
    scores = {column: Value("float32") for column in ("avg_logprob", "compression_ratio", "no_speech_prob")}
    dataset = labelled(tmp_path / "limits", rows, **scores)
    limit = len(teacher.label(long_text)) - 1
    given = ["--min_duration_in_seconds", 0.5, "--max_duration_in_seconds", 2, "--max_label_length", limit]
    given += ["--min_avg_logprob", -1, "--max_compression_ratio", 2.4, "--max_no_speech_prob", 0.6]
    assert run(dataset, *given, "--max_ngram_repeats", 3, "--skip_logmel") == 0
    output = tmp_path / "limits.wer_10.0"
    good = {"good", "half a second", "two seconds", "unknown", "no loop"}
    assert [row["text"] for row in read(output)] == [row["transcription"] for row in rows if row["name"] in good]
    assert record(output)["report"]["reasons"] == {
        "shorter than the minimum": 1,
        "longer than the maximum": 1,
        "label too long": 1,
        "label repeats itself": 1,
        "mean log-probability under the minimum": 1,
        "compression ratio over the maximum": 1,
        "no-speech probability over the maximum": 1,
        "kept": 5,
    }


def test_a_clip_over_30_seconds_is_longer_than_the_maximum(teacher, run, tmp_path):
    text = "東京に行く"
    rows = [
        {"audio": tone(seconds), "transcription": text, "whisper_transcript": teacher.label(text)}
        for seconds in (30, 30.01, 95)
    ]
    assert run(labelled(tmp_path / "long", rows)) == 0
    assert [row["input_length"] for row in read(tmp_path / "long.wer_10.0")] == [480_000]
    report = record(tmp_path / "long.wer_10.0")["report"]
    assert report["reasons"] == {"longer than the maximum": 2, "kept": 1}
    assert report["hours"] == [round(155.01 / 3600, 3), round(30 / 3600, 3)]


def test_reasons_are_stored_by_name_so_that_a_new_one_misreads_no_old_shard(
    source, filtered, run, tmp_path, monkeypatch
):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    reasons = script.read_notes(next((tmp_path / NAMES[0] / "tiny").iterdir()))["rows"]["reason"]
    assert set(reasons) <= {script.KEPT, script.OVER_THRESHOLD}
    (tmp_path / NAMES[0] / "filtering.tiny.train.json").write_text(
        json.dumps({"status": "running", "settings": record(filtered / NAMES[0])["settings"]})
    )
    monkeypatch.setattr(script, "UNUSABLE", ("a new reason", *script.UNUSABLE))
    assert run(source, *SAME, output=tmp_path) == 0
    assert record(tmp_path / NAMES[0])["report"] == record(filtered / NAMES[0])["report"]


def test_nothing_kept_is_an_error_that_says_what_a_cer_filter_would_keep_and_leaves_whole_shards(
    teacher, run, tmp_path
):
    text = "あいうえおかきくけこさしすせそ"
    row = {"audio": tone(0.2), "transcription": text, "whisper_transcript": teacher.label(text[:-1])}
    with pytest.raises(
        SystemExit, match=r"WER <= 10.0 keeps none of 9 clips; CER <= 10 would keep 9. Nothing is pushed"
    ):
        run(labelled(tmp_path / "near", [row] * 9))
    for name in ("near.wer_10.0", "near.wer_10.0.vectorized"):
        assert record(tmp_path / name)["status"] == "complete"
        assert [len(pq.read_table(shard)) for shard in (tmp_path / name / "tiny").iterdir()] == [0, 0]


# ---- nothing is lost -------------------------------------------------------------------------------------------------


def test_four_workers_give_the_bytes_of_one(source, filtered, run, tmp_path):
    assert run(source, *SAME, "--preprocessing_num_workers", 4, "--preprocessing_batch_size", 3, output=tmp_path) == 0
    assert contents(*(tmp_path / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))


def test_two_launched_processes_give_the_bytes_of_one(source, filtered, arguments, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    given = arguments(source, *SAME, output=tmp_path)
    done = subprocess.run([sys.executable, *launch, SCRIPT, *given], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "4/4" in done.stderr  # shards of the eight, in the first process's bar
    assert contents(*(tmp_path / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))
    assert record(tmp_path / NAMES[0])["report"] == record(filtered / NAMES[0])["report"]


def test_a_run_that_is_stopped_and_killed_ends_with_the_bytes_of_one_that_was_not(source, arguments, run, tmp_path):
    given = arguments(source, *SAME, "--shard_size", 1, output=tmp_path / "killed")
    outputs = [tmp_path / "killed" / name for name in NAMES]
    counts = []
    for number, how in enumerate((signal.SIGTERM, signal.SIGKILL)):
        process = subprocess.Popen([sys.executable, SCRIPT, *given], stderr=subprocess.PIPE, start_new_session=True)
        before = len(list(outputs[1].glob("tiny/*")))
        while process.poll() is None and len(list(outputs[1].glob("tiny/*"))) < before + 5:
            time.sleep(0.002)
        os.kill(process.pid, how)
        error = process.stderr.read().decode()  # ends when the workers have let go of it too
        assert process.wait() == (143 if how == signal.SIGTERM else -signal.SIGKILL), error
        assert "Traceback" not in error
        counts.append(len(list(outputs[1].glob("tiny/train-*.parquet"))))
        assert counts[-1] < 60, f"all was done before kill {number}"
        assert record(outputs[0])["status"] == "running"
    assert counts[1] > counts[0]
    assert script.main(given) == 0
    assert run(source, *SAME, "--shard_size", 1, output=tmp_path / "whole") == 0
    assert contents(*outputs) == contents(*(tmp_path / "whole" / name for name in NAMES))
    assert not list((tmp_path / "killed").rglob("*.partial"))
    kept = record(outputs[0])["report"]["clips"][1]
    columns = (["audio", *DATA], ["input_features", "labels", "input_length"])
    for path, names in zip(outputs, columns, strict=True):  # some of whose shards are empty
        loaded = load_dataset(str(path), "tiny", split="train")
        assert (len(loaded), loaded.column_names) == (kept, names)
        assert loaded.features["labels"] == List(Value("int32"))
        if "audio" in names:
            assert loaded.features["audio"] == Audio(
                sampling_rate=16_000
            )  # which is decoded for everybody who loads it


WAITING_FOR_A_JOB = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
import run_data_filtering as script

context = multiprocessing.get_context("forkserver")
pool = ProcessPoolExecutor(1, context, script.start_worker, (context.Queue(),))
pool.submit(script.work, "filtered", 0)
print("waiting", flush=True)
time.sleep(600)
"""


def test_a_worker_that_has_not_got_its_job_yet_ends_with_a_run_that_is_killed():
    command = [sys.executable, "-c", WAITING_FOR_A_JOB]
    process = subprocess.Popen(command, cwd=SCRIPT.parent, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.readline() == b"waiting\n"
        process.kill()
        process.communicate(timeout=60)  # the pipe ends when the worker has let go of it too
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_killed_worker_ends_the_run_in_a_line_and_the_same_command_goes_on(source, filtered, arguments, tmp_path):
    given = arguments(source, *SAME, output=tmp_path)
    process = subprocess.Popen([sys.executable, SCRIPT, *given], stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.rglob("train-*.parquet")):
            assert process.poll() is None
            time.sleep(0.002)
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if child.ppid() != process.pid]  # of the server that forks them
        assert len(workers) == 2
        workers[0].send_signal(signal.SIGKILL)  # as the kernel does when memory is short
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "Traceback" not in errors
    line = errors.splitlines()[-1]
    assert re.search(r"error: a worker was killed.*lower --preprocessing_num_workers\. Run the same command", line)
    assert record(tmp_path / NAMES[0])["status"] == "running"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("train-*.parquet")}
    assert 0 < len(kept) < 16
    assert script.main(given) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(*(tmp_path / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))


def test_the_same_command_again_writes_no_data(source, filtered, run, tmp_path):
    shutil.copytree(filtered, tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*.parquet")}
    lost = tmp_path / "again" / NAMES[1] / "tiny" / "train-00003-of-00008.parquet"
    lost.unlink()
    assert run(source, *SAME, output=tmp_path / "again") == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*.parquet")}
    assert {path for path in after if after[path] != before[path]} == {lost}
    assert contents(*(tmp_path / "again" / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))


def test_other_settings_are_not_mixed(source, filtered, run):
    for change, message in (
        (("--seed", 7), "seed was 42 and is now 7"),
        (("--min_duration_in_seconds", 1), "min_duration_in_seconds was 0.0 and is now 1.0"),
    ):
        with pytest.raises(SystemExit, match=f"{NAMES[0]} was made with other settings: {message}.*--overwrite_output"):
            run(source, *SAME, *change, output=filtered)


def test_features_are_not_made_of_clips_that_were_filtered_otherwise(source, filtered, run, tmp_path):
    """Overwriting is of what the run makes, and with --skip_filtering those are the features alone."""
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    flags = ("--skip_filtering", "--overwrite_output_dir", "--min_duration_in_seconds", 1)
    changed = "min_duration_in_seconds was 0.0 and is now 1.0"
    with pytest.raises(SystemExit, match=f"{NAMES[0]} was made with other settings: {changed}"):
        run(source, *SAME, *flags, output=tmp_path)
    assert contents(*(tmp_path / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))


def test_results_of_another_normaliser_are_not_mixed(source, filtered, run, tmp_path):
    """Such as those of versions that did not say which."""
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    earlier = record(filtered / NAMES[0])
    del earlier["settings"]["normaliser"], earlier["checksum"]
    (tmp_path / NAMES[0] / "filtering.tiny.train.json").write_text(json.dumps(earlier))
    with pytest.raises(SystemExit, match="made with other settings: normaliser was None and is now \"Whisper's"):
        run(source, *SAME, output=tmp_path)


def test_the_decoder_s_positions_are_those_of_config_json(source, filtered, teacher, run, tmp_path):
    model = Path(shutil.copytree(teacher.path, tmp_path / "model"))
    (model / "generation_config.json").write_text("{}")
    assert run(source, *SAME, "--model", model, output=tmp_path) == 0
    assert contents(*(tmp_path / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))


def test_a_changed_dataset_is_not_mixed_and_overwriting_starts_afresh(source, rows, filtered, run, tmp_path):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    (tmp_path / NAMES[0] / "notes.txt").write_text("mine")
    other = labelled(tmp_path / "other" / "speech", rows[:-1])
    with pytest.raises(SystemExit, match=r"dataset was '\w+' and is now '\w+'.*--overwrite_output_dir"):
        run(other, *SAME, output=tmp_path)
    assert run(other, *SAME, "--overwrite_output_dir", output=tmp_path) == 0
    assert record(tmp_path / NAMES[0])["report"]["clips"][0] == 59
    assert (tmp_path / NAMES[0] / "notes.txt").read_text() == "mine"


def test_overwriting_starts_afresh_also_with_equal_settings(source, filtered, run, tmp_path):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("*.parquet"):
        os.utime(path, (0, 0))
    assert run(source, *SAME, "--overwrite_output_dir", output=tmp_path) == 0
    assert all(path.stat().st_mtime > 0 for path in tmp_path.rglob("*.parquet"))
    assert contents(*(tmp_path / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_shard_is_made_again(source, filtered, run, tmp_path, name):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    damaged = tmp_path / name / "tiny" / "train-00003-of-00008.parquet"
    os.truncate(damaged, damaged.stat().st_size // 2)
    assert run(source, *SAME, output=tmp_path) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert {path for path in after if after[path] != before[path]} == {damaged}
    assert contents(*(tmp_path / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))


@pytest.mark.parametrize("reader", ["read_metadata", "ParquetFile"])
def test_a_shard_that_cannot_be_read_just_now_is_named_and_not_made_again(
    source, filtered, run, tmp_path, monkeypatch, reader
):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    unreadable = tmp_path / NAMES[1] / "tiny" / "train-00003-of-00008.parquet"
    read = getattr(pq, reader)

    def fail_to_read(path, **options):
        if path == unreadable:
            raise OSError(errno.EIO, "Input/output error")
        return read(path, **options)

    monkeypatch.setattr(pq, reader, fail_to_read)
    with pytest.raises(SystemExit) as error:
        run(source, *SAME, output=tmp_path)
    assert re.search(rf"error: cannot read {unreadable}: .*Input/output error\. Run the same command", str(error.value))
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert run(source, *SAME, output=tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, which its footer does not show."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_all_shards_are_read_to_the_end_only_when_nothing_else_is_left_to_do(source, filtered, run, tmp_path):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    damaged, missing = (tmp_path / NAMES[1] / "tiny" / f"train-{shard:05d}-of-00008.parquet" for shard in (2, 5))
    flip(damaged)
    content = damaged.read_bytes()
    missing.unlink()
    assert run(source, *SAME, output=tmp_path) == 0
    assert missing.exists()
    assert damaged.read_bytes() == content
    assert run(source, *SAME, output=tmp_path) == 0
    assert contents(*(tmp_path / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))


@pytest.mark.parametrize("more", [[], ["--skip_filtering"]])
def test_a_damaged_shard_is_made_again_before_others_are_made_from_it(source, filtered, run, tmp_path, more, caplog):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    damaged, missing = (tmp_path / name / "tiny" / "train-00002-of-00008.parquet" for name in NAMES)
    flip(damaged)
    missing.unlink()
    assert run(source, *SAME, "--preprocessing_num_workers", 1, *more, output=tmp_path) == 0
    assert f"{damaged} is damaged and is made again" in caplog.text
    assert contents(*(tmp_path / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))


def test_a_damaged_filtered_shard_is_not_vectorised(source, filtered, run, tmp_path):
    shutil.copytree(filtered / NAMES[0], tmp_path / NAMES[0])
    damaged = tmp_path / NAMES[0] / "tiny" / "train-00003-of-00008.parquet"
    os.truncate(damaged, damaged.stat().st_size // 2)
    with pytest.raises(SystemExit, match=r"cer_10.0 does not have all shards of filtering.tiny.train: filter first"):
        run(source, *SAME, "--skip_filtering", output=tmp_path)


def test_filtering_and_vectorising_apart_give_the_bytes_of_both_together(source, filtered, run, tmp_path):
    with pytest.raises(
        SystemExit,
        match=r"--skip_filtering, but .*cer_10.0 does not have all shards of filtering.tiny.train: filter first",
    ):
        run(source, *SAME, "--skip_filtering", output=tmp_path)
    assert run(source, *SAME, "--skip_logmel", output=tmp_path) == 0
    assert not list((tmp_path / NAMES[1]).glob("[!.]*"))  # the refused run has left its lock
    assert run(source, *SAME, "--skip_filtering", output=tmp_path) == 0
    assert contents(*(tmp_path / name for name in NAMES)) == contents(*(filtered / name for name in NAMES))


# ---- another threshold -----------------------------------------------------------------------------------------------


def test_a_tighter_threshold_decodes_no_audio_and_gives_the_bytes_of_a_fresh_run(
    source, filtered, run, tmp_path, monkeypatch
):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    for metric in ("cer", "wer"):
        given = [source, *SAME[2:], f"--{metric}_threshold", 3, "--preprocessing_num_workers", 1]
        assert run(*given, output=tmp_path / "fresh") == 0
        with monkeypatch.context() as patch:
            patch.delattr(script, "decode_clip")
            assert run(*given, output=tmp_path) == 0
        names = [f"speech.{metric}_3.0", f"speech.{metric}_3.0.vectorized"]
        assert contents(*(tmp_path / name for name in names)) == contents(
            *(tmp_path / "fresh" / name for name in names)
        )


def test_a_looser_threshold_gives_the_bytes_of_a_fresh_run(source, filtered, run, tmp_path):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    given = [source, *SAME[2:], "--cer_threshold", 40, "--max_duration_in_seconds", 4]
    assert run(*given, output=tmp_path) == 0
    assert run(*given, output=tmp_path / "fresh") == 0
    names = ["speech.cer_40.0", "speech.cer_40.0.vectorized"]
    assert contents(*(tmp_path / name for name in names)) == contents(*(tmp_path / "fresh" / name for name in names))


def test_results_of_other_labels_are_not_reused(source, rows, run, tmp_path, monkeypatch):
    """Even where the files have the same footers: one label is exchanged for another of the same length."""
    find_row_groups = script.find_row_groups
    monkeypatch.setattr(script, "find_row_groups", lambda paths: (find_row_groups(paths)[0], "the same footers"))
    assert run(source, *SAME, output=tmp_path) == 0
    other = [dict(row) for row in rows]
    other[7]["whisper_transcript"] = (
        other[7]["whisper_transcript"][:4]
        + other[7]["whisper_transcript"][-3:3:-1]
        + other[7]["whisper_transcript"][-2:]
    )
    dataset = labelled(tmp_path / "other" / "speech", other, files=3)
    given = [dataset, *SAME[2:], "--cer_threshold", 40]
    assert run(*given, output=tmp_path) == 0
    assert run(*given, output=tmp_path / "fresh") == 0
    names = ["speech.cer_40.0", "speech.cer_40.0.vectorized"]
    assert contents(*(tmp_path / name for name in names)) == contents(*(tmp_path / "fresh" / name for name in names))


def test_the_audio_of_another_dataset_of_the_same_name_and_texts_is_not_reused(rows, source, filtered, run, tmp_path):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    other = [row | {"audio": tone(1 + number / 100)} for number, row in enumerate(rows)]
    dataset = labelled(tmp_path / "other" / "speech", other, files=3)
    assert run(dataset, *SAME[2:], "--cer_threshold", 40, "--skip_logmel", output=tmp_path) == 0
    heard = {row["name"]: row["audio"] for row in other}
    kept = read(tmp_path / "speech.cer_40.0", columns=("audio", "input_length"))
    assert len(kept) > 30
    assert {row["audio"]["bytes"] for row in kept} <= set(heard.values())
    for row in kept:
        assert row["input_length"] == soundfile.info(io.BytesIO(row["audio"]["bytes"])).frames


def test_features_that_an_overwritten_filter_left_behind_are_not_reused(source, filtered, run, tmp_path):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    shorter = ("--max_duration_in_seconds", 3)
    assert run(source, *SAME, *shorter, "--skip_logmel", "--overwrite_output_dir", output=tmp_path) == 0
    given = [source, *SAME[2:], "--cer_threshold", 40]
    assert run(*given, output=tmp_path) == 0
    assert run(*given, output=tmp_path / "fresh") == 0
    names = ["speech.cer_40.0", "speech.cer_40.0.vectorized"]
    assert contents(*(tmp_path / name for name in names)) == contents(*(tmp_path / "fresh" / name for name in names))


# ---- report ----------------------------------------------------------------------------------------------------------


def test_the_report_adds_up_and_the_card_tells_it(rows, teacher, filtered):
    content = record(filtered / NAMES[0])
    assert (content["status"], content["settings"]["seed"], content["arguments"]["cer_threshold"]) == (
        "complete",
        42,
        10,
    )
    assert {"torch", "transformers", "jiwer"} <= content["versions"].keys()
    report = content["report"]
    scores = [slow_scores(row["transcription"], text_of(row, teacher), "ja") for row in rows]
    lengths = [len("".join(BasicTextNormalizer()(row["transcription"]).split())) for row in rows]
    seconds = [soundfile.info(io.BytesIO(row["audio"])).duration for row in rows]
    kept = [score[1] <= 10 for score in scores]
    assert report["clips"] == [60, sum(kept)]
    assert report["characters"] == [sum(lengths), sum(n for n, keep in zip(lengths, kept, strict=True) if keep)]
    errors = [n * score[1] / 100 for n, score in zip(lengths, scores, strict=True)]
    wrong = sum(count for count, keep in zip(errors, kept, strict=True) if keep)
    assert wrong > 0
    assert report["cer_of_kept"] == pytest.approx(100 * wrong / report["characters"][1], abs=1e-3)
    assert report["hours"][0] == pytest.approx(sum(seconds) / 3600, abs=1e-3)
    assert report["reasons"] == {"score over the threshold": 60 - sum(kept), "kept": sum(kept)}
    for which, metric in enumerate(("wer", "cer")):
        for threshold, count in report["other_thresholds"][metric].items():
            assert count == sum(score[which] <= float(threshold) for score in scores)
    assert sum(report["score_histogram"]) == 60
    assert report["by_reference_length"]["8-15"] == [
        sum(8 <= n < 16 for n in lengths),
        sum(8 <= n < 16 and keep for n, keep in zip(lengths, kept, strict=True)),
    ]
    assert report["worst"][0]["cer"] == max(score[1] for score in scores)
    for name in NAMES:
        card = (filtered / name / "README.md").read_text()
        assert f"| clips | 60 | {sum(kept)} |" in card
        assert report["worst"][0]["reference"] in card
        assert "(filtering.tiny.train.png)" in card
        assert (filtered / name / "filtering.tiny.train.png").read_bytes().startswith(b"\x89PNG")
    assert "float16" in (filtered / NAMES[1] / "README.md").read_text()


def test_other_thresholds_count_the_clips_that_the_threshold_alone_decides_on(teacher, run, tmp_path):
    rows = []
    for label, seconds in itertools.product(("東京に行く", "大阪で待つよ"), (1, 0.1)):
        texts = {"transcription": "東京に行く", "whisper_transcript": teacher.label(label)}
        rows.append({"name": f"{seconds} {label}", "audio": tone(seconds), **texts})
    dataset = labelled(tmp_path / "speech", rows)
    assert run(dataset, "--cer_threshold", 10, "--min_duration_in_seconds", 0.5, "--skip_logmel") == 0
    report = record(tmp_path / "speech.cer_10.0")["report"]
    assert report["reasons"] == {"shorter than the minimum": 2, "kept": 1, "score over the threshold": 1}
    assert set(report["other_thresholds"]["cer"].values()) == {1}
    assert (sum(report["score_histogram"]), report["score_histogram"][0]) == (2, 1)
    assert [row["name"] for row in report["worst"]] == ["1 大阪で待つよ"]


def test_the_card_keeps_what_others_wrote_and_replaces_its_own_section(source, filtered, run, tmp_path):
    shutil.copytree(filtered, tmp_path, dirs_exist_ok=True)
    card = tmp_path / NAMES[0] / "README.md"
    text = card.read_text()
    assert text.startswith("---\n")
    assert "\n# speech.cer_10.0\n\nClips whose teacher label agrees" in text
    notes = "## Notes\n\nWritten by hand.\n\n"
    begin = "<!-- tiny, train: begin"
    edited = text.replace(begin, notes + begin).replace("## tiny, train\n", "## tiny, train\n\nof an earlier run\n")
    card.write_text(edited.replace("language:\n- ja\n", "language:\n- en\n- ja\nlicense: cc0-1.0\n"))
    assert run(source, *SAME, output=tmp_path) == 0
    expected = text.replace(begin, notes + begin)
    found = card.read_text()
    assert found.partition("\n# ")[2] == expected.partition("\n# ")[2]
    assert "license: cc0-1.0" in found
    assert "- en\n- ja\n" in found
    assert run(source, *SAME, output=tmp_path) == 0
    assert card.read_text() == found


def test_a_wer_filter_on_japanese_says_that_it_is_an_exact_match(source, run, tmp_path, caplog):
    assert run(source, "--skip_logmel", output=tmp_path) == 0
    report = record(tmp_path / "speech.wer_10.0")["report"]
    notice = (
        f"ja is written without spaces, so WER <= 10.0 is nearly an exact match and keeps {report['clips'][1]} of 60 "
        f"clips; CER <= 10 (--cer_threshold 10) would keep {report['other_thresholds']['cer']['10']}."
    )
    assert notice in caplog.text
    assert notice in (tmp_path / "speech.wer_10.0" / "README.md").read_text()


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def push(repository: str, dataset: Path) -> None:
    HfApi().create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
    HfApi().upload_folder(repo_id=repository, folder_path=dataset, repo_type="dataset")


def test_a_dataset_on_the_hub_is_filtered_and_pushed_privately(hub, source, filtered, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    push("acme/speech", source)
    assert run("acme/speech", *SAME) == 0
    for name in NAMES:
        assert HfApi().repo_info(f"acme/{name}", repo_type="dataset").private
        pulled = Path(snapshot_download(f"acme/{name}", repo_type="dataset", local_dir=tmp_path / "pulled" / name))
        assert contents(pulled) == contents(tmp_path / name) == contents(filtered / name)
    assert len(load_dataset("acme/speech.cer_10.0.vectorized", "tiny", split="train")) == len(read(filtered / NAMES[0]))


def test_a_second_split_keeps_the_first_on_the_hub_also_from_another_machine(hub, rows, run, tmp_path, monkeypatch):
    dataset = labelled(tmp_path / "splits", rows[:6])
    for path in sorted((dataset / "tiny").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("train", "test")))
    card = dataset / "README.md"
    card.write_text(
        card.read_text().replace("---\n", "", 1).replace("---\n", "  - split: test\n    path: tiny/test-*\n---\n")
    )
    card.write_text("---\n" + card.read_text())
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        monkeypatch.chdir(tmp_path / split)
        given = ["--split", split, "--wer_threshold", 1000, "--hub_model_id", "acme/splits"]
        assert run(dataset, *given, output=tmp_path / split) == 0
    both = load_dataset("acme/splits.wer_1000.0.vectorized", "tiny")
    assert {split: len(rows) for split, rows in both.items()} == {"train": 6, "test": 6}
    text = Path(snapshot_download("acme/splits.wer_1000.0", repo_type="dataset"), "README.md").read_text()
    assert "## tiny, train" in text
    assert "## tiny, test" in text


def test_a_failed_push_says_what_to_do_and_the_same_command_only_pushes(hub, source, run, tmp_path):
    given = [source, *SAME, "--hub_model_id", "acme/failing"]
    hub.fault("/commit/", status=403, times=-1)
    with pytest.raises(SystemExit, match=r"the push to acme/failing.* failed.* Run the same command again"):
        run(*given, output=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    hub.faults.clear()
    assert run(*given, output=tmp_path) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert len(load_dataset("acme/failing.cer_10.0", "tiny", split="train")) > 20


def test_a_token_without_rights_is_found_before_the_work(hub, source, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    with pytest.raises(SystemExit, match=r"preparing the dataset repository acme/denied.* failed: .*hf auth login"):
        run(source, *SAME, "--hub_model_id", "acme/denied", output=tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_vectorising_takes_the_filtered_dataset_from_the_hub(hub, source, filtered, run, tmp_path):
    push("acme/apart", source)
    assert run("acme/apart", *SAME, "--skip_logmel", output=tmp_path / "one") == 0
    assert run("acme/apart", *SAME, "--skip_filtering", output=tmp_path / "two") == 0
    expected = {name.replace("speech", "apart"): value for name, value in contents(filtered / NAMES[1]).items()}
    assert contents(tmp_path / "two" / "apart.cer_10.0.vectorized") == expected
    assert len(load_dataset("acme/apart.cer_10.0.vectorized", "tiny", split="train")) == len(read(filtered / NAMES[0]))


def test_a_filtered_dataset_that_the_hub_does_not_give_is_one_line_and_nothing_is_made(hub, source, run, tmp_path):
    push("acme/withheld", source)
    assert run("acme/withheld", *SAME, "--skip_logmel", output=tmp_path / "one") == 0
    hub.fault(r"acme/withheld\.cer_10\.0/(resolve|xet-read-token)", times=-1, status=403)
    with pytest.raises(SystemExit, match=r"error: downloading acme/withheld\.cer_10\.0 failed: ") as error:
        run("acme/withheld", *SAME, "--skip_filtering", output=tmp_path / "two")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "two").rglob("*.parquet"))


# ---- dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(hub, rows, run, tmp_path, monkeypatch, capsys):
    push("acme/planned", labelled(tmp_path / "planned", rows[:24]))  # no clip twice, which would be stored once
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def preview(*given) -> dict[str, list[str]]:
        capsys.readouterr()
        assert run("acme/planned", *SAME, "--dry_run", *given) == 0
        found: dict[str, list[str]] = {}
        for line in capsys.readouterr().out.splitlines():
            key, value = line.split(": ", 1)
            found.setdefault(key, []).append(value)
        return found

    before = preview()
    assert not list(Path().iterdir())
    assert not HfApi().repo_exists("acme/planned.cer_10.0", repo_type="dataset")
    assert before["input"][0].startswith("acme/planned (tiny, train), 24 clips, about 0.")
    assert before["pushes"] == [f"acme/planned{suffix} (private)" for suffix in (".cer_10.0", ".cer_10.0.vectorized")]
    assert [done[:6] for done in before["done"]] == ["0 of 3"] * 2
    assert len(before["time"]) == len(before["download"]) == 1
    assert [text.split(",")[0] for text in preview("--concatenate_audio", "--push_to_hub", "False")["writes"]] == [
        str(tmp_path / "work" / f"planned.cer_10.0{suffix}") for suffix in ("", ".packed", ".packed.vectorized")
    ]
    assert run("acme/planned", *SAME) == 0
    for text, name in zip(before["writes"], ("planned.cer_10.0", "planned.cer_10.0.vectorized"), strict=True):
        size = sum(path.stat().st_size for path in Path(name, "tiny").iterdir())
        assert float(re.search(r"about ([\d.]+) MB", text)[1]) == pytest.approx(size / 1e6, rel=0.2, abs=0.2)
    states = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert [done[:6] for done in preview()["done"]] == ["3 of 3"] * 2
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == states
    with pytest.raises(SystemExit, match="seed was 42 and is now 7"):
        preview("--seed", 7)
    afresh = ("--seed", 7, "--overwrite_output_dir")  # which deletes what is there
    assert [done[:6] for done in preview(*afresh)["done"]] == ["0 of 3"] * 2
    assert [done[:6] for done in preview("--skip_filtering", "--overwrite_output_dir")["done"]] == ["3 of 3", "0 of 3"]
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == states


def test_a_dry_run_takes_the_first_rows_for_a_sample_of_all(source, rows, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "SAMPLE_ROWS", 6)
    assert run(source, "--dry_run", "--skip_logmel", output=tmp_path) == 0
    sample = sum(soundfile.info(io.BytesIO(row["audio"])).duration for row in rows[:6]) / 3600
    assert f"input: {source} (tiny, train), 60 clips, about {10 * sample:.2f} h\n" in capsys.readouterr().out


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--max_duration_in_seconds", "31"], r"--max_duration_in_seconds 31.0 is over the model's 30 s"),
        (["--max_label_length", "449"], r"--max_label_length 449 is over the decoder's 448 positions"),
        (["--max_no_speech_prob", "0.5"], r"has no column 'no_speech_prob'"),
        (["--push_to_hub"], r"--push_to_hub with a local dataset needs --hub_model_id org/name"),
    ],
)
def test_a_mistake_gives_one_line(source, run, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        run(source, *change, output=tmp_path)
    assert str(stopped.value).startswith("run_data_filtering.py: error: ")
    assert "\n" not in str(stopped.value)
    assert not list(tmp_path.iterdir())


def test_a_table_without_audio_is_refused_by_name(run, tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("transcription,whisper_transcript\n東京,東京\n")
    with pytest.raises(SystemExit, match="table has no column 'audio'"):
        run(tmp_path / "table", "--dataset_config_name", "default", output=tmp_path / "out")


@pytest.mark.parametrize("change", [["--timestamp_probability", "2"], ["--shard_size", "0"], ["--threshold", "1"]])
def test_impossible_flags_are_refused(source, run, change):
    with pytest.raises(SystemExit) as stopped:
        run(source, *change)
    assert stopped.value.code == 2
