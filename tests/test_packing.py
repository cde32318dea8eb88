"""run_data_filtering.py --concatenate_audio: which clips share a window, what it holds and how it is labelled."""

import contextlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import librosa
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, WhisperFeatureExtractor

import run_data_filtering as script
from tests.test_filtering import Teacher, contents, labelled, read, record, tone

CUT, PACKED, VECTORS = "speech.cer_10.0", "speech.cer_10.0.packed", "speech.cer_10.0.packed.vectorized"
COLUMNS = ("text", "whisper_transcript", "labels", "input_length", "clips", "clip_starts")
TOGETHER = {"seed": 42, "concatenate_seconds": 30.0, "concatenate_gap_seconds": 0.4, "concatenate_probability": 1.0}


@pytest.fixture(scope="module")
def teacher(tiny_teacher) -> Teacher:
    return Teacher(tiny_teacher)


@pytest.fixture(scope="module")
def rows(clips, teacher) -> list[dict]:
    """40 clips of two speakers; every fourth label is wrong, every second has no timestamps."""
    rows = []
    for number in range(40):
        clip = clips[number % len(clips)]
        text = "まったく違う" if number % 4 == 3 else clip["transcription"]
        label = teacher.label(text, 0.9 if number % 2 else None)
        rows.append({**clip, "name": str(number), "who": f"speaker {number % 5 // 3}", "whisper_transcript": label})
    return rows


@pytest.fixture(scope="module")
def source(rows, tmp_path_factory) -> Path:
    return labelled(tmp_path_factory.mktemp("labelled") / "speech", rows, who=Value("string"))


@pytest.fixture(scope="module")
def arguments(source, teacher):
    def make(output: Path, *more) -> list[str]:
        given = ["-d", source, "--dataset_config_name", "tiny", "--model", teacher.path, "--cer_threshold", 10]
        given += ["--output_dir", output, "--concatenate_audio", "--shard_size", 8, "--preprocessing_num_workers", 1]
        return [str(value) for value in [*given, "--timestamp_probability", 0.5, *more]]

    return make


@pytest.fixture(scope="module")
def packed(arguments, tmp_path_factory) -> Path:
    """The directory of the results of one uninterrupted run of one worker."""
    output = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "PACKED_ROWS", 16)  # three shards of windows
        assert script.main(arguments(output)) == 0
    return output


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(script, "PACKED_ROWS", 16)


# ---- which clips share a window --------------------------------------------------------------------------------------


@given(
    clips=st.lists(
        st.tuples(
            st.integers(1, 96_000) | st.integers(1, 480_000), st.integers(0, 60), st.sampled_from([None, "a", "b"])
        ),
        min_size=4,
    ),
    seed=st.integers(0, 9),
    seconds=st.sampled_from([10.0, 29.99, 30.0]),
    gap=st.sampled_from([0.0, 0.4, 2.0]),
    probability=st.sampled_from([0.0, 0.5, 1.0]),
    limit=st.integers(50, 250),
)
@settings(max_examples=300, deadline=None)
def test_every_clip_is_in_one_window_that_keeps_the_limits(clips, seed, seconds, gap, probability, limit):
    choices = {"seed": seed, "concatenate_seconds": seconds, "concatenate_gap_seconds": gap}
    choices |= {"concatenate_probability": probability}
    packed = [script.PackedClip(row, *clip) for row, clip in enumerate(clips)]
    windows = script.fill_windows(packed, choices, limit)
    assert sorted(clip.row for window in windows for clip in window) == list(range(len(clips)))
    for window in windows:
        assert window[0].start == 0
        if len(window) == 1:
            continue
        assert not any(clip.alone for clip in window)
        assert len({clip.speaker for clip in window}) == 1
        assert window[0].speaker is not None
        assert sum(clip.num_tokens for clip in window) <= limit
        ends = [clip.start * 0.02 + clip.samples / 16_000 for clip in window]
        assert ends[-1] <= seconds + 1e-9
        for end, clip in zip(ends[:-1], window[1:], strict=True):
            assert -1e-9 <= clip.start * 0.02 - end < gap + 0.02


def test_a_time_in_whole_steps_of_0_02_s_has_all_of_them():
    """Also where it is stored a little short of them, as 0.58 is."""
    assert [script.whole_steps(steps / 50) for steps in range(1501)] == list(range(1501))
    assert [script.whole_steps(seconds) for seconds in (0.579, 0.599, 29.99)] == [28, 29, 1499]


@pytest.mark.parametrize("clips", [330, 1000])
def test_windows_are_filled_to_90_percent_without_gathering_clips_of_one_length(clips):
    """Clips as long as ReazonSpeech's are after the filter, as many as are kept of 1,000, or as there could be."""
    draw = random.Random(0)
    for seed in range(4):
        seconds = [min(max(draw.gammavariate(4, 4.33 / 4), 0.5), 29) for _ in range(clips)]
        packed = []
        for row, length in enumerate(seconds):
            packed.append(script.PackedClip(row, round(16_000 * length), round(4.3 * length) + 2, "any"))
        windows = script.fill_windows(packed, TOGETHER | {"seed": seed}, 251)
        fill = [sum(seconds[clip.row] for clip in window) / 30 for window in windows]
        assert np.mean(fill) >= 0.9
        pairs = [(seconds[a.row], seconds[b.row]) for w in windows for a in w for b in w if a is not b]
        assert np.corrcoef(np.array(pairs).T)[0, 1] < 0.05
        first, last = ([seconds[window[place].row] for window in windows] for place in (0, -1))
        assert abs(np.mean(first) - np.mean(last)) < 1.0


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("東京 0.40 大阪 1.00", "10.00 東京 10.40 大阪 11.00"),
        ("0.10 東京", "10.10 東京 11.50"),
        ("0.10 東京 0.40 0.60 大阪 1.00", "10.10 東京 10.40 10.60 大阪 11.00"),
        ("0.00 東京 1.20 1.20", "10.00 東京 11.20"),
        ("0.00 0.08 東京 29.98", "10.08 東京 11.50"),
        ("0.00 1.20", ""),
        ("", ""),
    ],
)
def test_timestamps_are_shifted_kept_within_the_clip_and_added_where_missing(teacher, body, expected):
    def ids(text: str) -> list[int]:
        first = teacher.no_timestamps + 1
        pieces = [[first + round(float(p) / 0.02)] if p[0].isdigit() else teacher.ids(p) for p in text.split()]
        return [token for piece in pieces for token in piece]

    tokens = script.find_special_tokens(teacher.id, {"language": "ja", "task": "transcribe"})
    assert script.place_body(ids(body), 500, 24_000, tokens) == ids(expected)


def test_texts_are_joined_as_the_language_writes_them_and_as_the_tokenizer_writes_that(teacher):
    tokens = script.find_special_tokens(teacher.id, {"language": "ja", "task": "transcribe"})

    def join(texts: list, language: str, limit: int = 100) -> list[int]:
        parts = [teacher.ids(text) if isinstance(text, str) else text for text in texts]
        return script.join_ids(parts, language, limit, teacher.tokenizer, tokens)

    assert join(["今日は", " いい天気", "です。"], "ja") == teacher.ids("今日はいい天気です。")
    assert join([" Hello there.", " Good day."], "en") == teacher.ids(" Hello there. Good day.")
    assert join(["Hello", "you", " there"], "en") == teacher.ids("Hello you there")
    assert join(["東京", "", "大阪"], "ja") == teacher.ids("東京大阪")
    half = teacher.ids("鬱")[:1]  # the first byte of three
    assert teacher.tokenizer.decode(half) == "\ufffd"
    assert join([half, "東京"], "ja") == [*half, *teacher.ids("東京")]
    assert join([half, "you"], "en") == [*half, *teacher.ids(" "), *teacher.ids("you")]
    spelled = [token for piece in ("<|", "ja", "|>") for token in teacher.ids(piece)]
    assert join([spelled, "東京"], "ja") == [*spelled, *teacher.ids("東京")]
    split = [token for character in "東京大阪" for token in teacher.ids(character)]
    assert join([split], "ja") == split  # as the teacher has it


# ---- windows ---------------------------------------------------------------------------------------------------------


def test_windows_have_the_audio_text_and_labels_of_their_clips(packed, rows, teacher):
    """Against a slow construction from the labelled rows, given only which clip starts where."""
    windows = read(packed / PACKED, ("audio", *COLUMNS))
    kept = [number for number in range(40) if number % 4 != 3]
    assert sorted(clip for window in windows for clip in window["clips"]) == kept
    assert len(windows) < len(kept) / 2
    first, timed = teacher.no_timestamps + 1, 0
    for window in windows:
        pieces, body = [], []
        for clip, start in zip(window["clips"], window["clip_starts"], strict=True):
            audio, rate = soundfile.read(io.BytesIO(rows[clip]["audio"]), dtype="int16")
            pieces.append(np.zeros(round(start * rate) - sum(map(len, pieces)), np.int16))
            pieces.append(audio)
            end = start + (0.9 if clip % 2 else len(audio) / rate)
            text = teacher.ids(rows[clip]["transcription"])
            body += [first + round(start / 0.02), *text, first + round(end / 0.02 + 1e-6)]
        stored, rate = soundfile.read(io.BytesIO(window["audio"]["bytes"]), dtype="int16")
        assert rate == 16_000
        assert np.array_equal(stored, np.concatenate(pieces))
        assert window["input_length"] == len(stored) <= 480_000
        assert window["text"] == "".join(rows[clip]["transcription"] for clip in window["clips"])
        assert window["whisper_transcript"] == [*teacher.prefix, *body, teacher.end]
        plain = [*teacher.prefix, teacher.no_timestamps, *teacher.ids(window["text"]), teacher.end]
        assert window["labels"] in (window["whisper_transcript"], plain)
        timed += window["labels"] != plain
    assert 0 < timed < len(windows)


def test_features_of_windows_are_the_extractors_and_no_larger_than_they_must(packed, teacher):
    extractor = WhisperFeatureExtractor.from_pretrained(teacher.path)
    windows, stored = read(packed / PACKED, ("audio", *COLUMNS)), read(packed / VECTORS, ("input_features", "labels"))
    for window, row in zip(windows, stored, strict=True):
        assert row["labels"] == window["labels"]
        features = np.frombuffer(row["input_features"], "<f2").reshape(-1, 128)
        assert len(features) == min(-(-(window["input_length"] + 200) // 160) + 1, 3000)
        waveform, _ = soundfile.read(io.BytesIO(window["audio"]["bytes"]), dtype="float32")
        expected = extractor(waveform, sampling_rate=16_000)["input_features"][0].T.astype(np.float16)
        assert np.array_equal(np.pad(features, ((0, 3000 - len(features)), (0, 0)), mode="edge"), expected)


def test_the_filtered_clips_are_those_of_a_run_without_windows_and_the_windows_load(packed, arguments, tmp_path):
    plain = [argument for argument in arguments(tmp_path) if argument != "--concatenate_audio"]
    assert script.main([*plain, "--skip_logmel"]) == 0
    assert contents(tmp_path / CUT) == contents(packed / CUT)
    assert not (packed / f"{CUT}.vectorized").exists()
    windows = load_dataset(str(packed / PACKED), "tiny", split="train").cast_column("audio", Audio(decode=False))
    assert windows.column_names == ["audio", *COLUMNS]
    assert len(windows) == len(load_dataset(str(packed / VECTORS), "tiny", split="train"))


def test_the_report_and_the_card_tell_how_full_the_windows_are(packed, rows):
    found = record(packed / PACKED)
    windows = read(packed / PACKED, COLUMNS)
    together = [window for window in windows if len(window["clips"]) > 1]
    report = found["report"]["windows"]
    assert (report["windows"], report["clips"]) == (len(windows), 30)
    assert report["label_tokens"][1] == max(len(window["labels"]) for window in windows)
    assert found["settings"]["max_label_length"] == 256
    assert found["settings"]["concatenate_gap_seconds"] == 0.4
    assert record(packed / CUT)["settings"]["max_label_length"] == 128
    lengths = [soundfile.info(io.BytesIO(row["audio"])).duration for row in rows]
    fill = [sum(lengths[clip] for clip in window["clips"]) / 30 for window in windows]
    if not report["clips_left_alone"]:
        assert report["fill"] == pytest.approx(100 * np.mean(fill), abs=0.01)
    assert together
    for name in (PACKED, VECTORS):
        assert f"{len(windows)} windows hold 30 clips" in (packed / name / "README.md").read_text()


def test_a_share_of_the_clips_stays_alone(arguments, tmp_path):
    assert script.main([*arguments(tmp_path), "--concatenate_probability", "0.5", "--skip_logmel"]) == 0
    report = record(tmp_path / PACKED)["report"]["windows"]
    assert 7 <= report["clips_left_alone"] <= 23
    alone = [window for window in read(tmp_path / PACKED, COLUMNS) if len(window["clips"]) == 1]
    assert report["clips_left_alone"] <= len(alone) < report["windows"]
    (shard,) = (tmp_path / PACKED / "tiny").glob("*.parquet")
    shared = [window for window in script.read_notes(shard)["windows"] if not window["alone"]]
    speech = sum(window["samples"] for window in shared) / 16_000
    assert report["fill"] == pytest.approx(100 * speech / (30 * len(shared)), abs=0.01)


def test_a_window_has_one_speaker_and_a_prompt_and_no_label_is_over_the_limit(arguments, rows, teacher, tmp_path):
    given = arguments(tmp_path, "--speaker_id_column_name", "who", "--max_label_length", 60, "--skip_logmel")
    assert script.main([*given, "--condition_on_prev_probability", "1", "--timestamp_probability", "1"]) == 0
    windows = read(tmp_path / PACKED, COLUMNS)
    prompts = 0
    for before, window in itertools.pairwise(windows):
        start = window["labels"].index(teacher.prefix[0])
        if start:
            said = teacher.ids("".join(rows[clip]["transcription"] for clip in before["clips"]))
            assert window["labels"][:start] == [teacher.id["<|startofprev|>"], *said[1 - start :]]
            assert start == len(said) + 1 or len(window["labels"]) == 60
            prompts += 1
    assert prompts > len(windows) / 2
    assert sorted(clip for window in windows for clip in window["clips"]) == [n for n in range(40) if n % 4 != 3]
    assert all(len({rows[clip]["who"] for clip in window["clips"]}) == 1 for window in windows)
    assert 40 < max(len(window["labels"]) for window in windows) <= 60
    assert any(len(window["clips"]) > 1 for window in windows)
    assert {row["speaker"] for row in read(tmp_path / CUT, ["speaker"])} == {"speaker 0", "speaker 1"}


def test_labels_stored_as_strings_give_the_same_windows(packed, rows, arguments, tmp_path, small_shards):
    tokenizer = AutoTokenizer.from_pretrained(Path(arguments(tmp_path)[5]))
    decoded = [
        row | {"whisper_transcript": tokenizer.decode(row["whisper_transcript"], decode_with_timestamps=True)}
        for row in rows
    ]
    dataset = labelled(tmp_path / "speech", decoded, who=Value("string"))
    assert script.main([*arguments(tmp_path, "-d", dataset), "--skip_logmel"]) == 0
    assert read(tmp_path / PACKED, COLUMNS) == read(packed / PACKED, COLUMNS)


def test_other_rates_and_formats_are_packed_at_16_khz(teacher, arguments, tmp_path):
    audio = [tone(1.0, "FLAC", 8_000), tone(1.0, "OGG"), tone(1.5, "MP3", 32_000)]
    rows = [{"audio": a, "transcription": "東京", "whisper_transcript": teacher.label("東京")} for a in audio]
    dataset = labelled(tmp_path / "speech", rows)
    assert script.main(arguments(tmp_path, "-d", dataset, "--concatenate_probability", 1)) == 0
    (window,) = read(tmp_path / PACKED, ("audio", *COLUMNS))
    stored, _ = soundfile.read(io.BytesIO(window["audio"]["bytes"]), dtype="float32")
    for clip, start in zip(window["clips"], window["clip_starts"], strict=True):
        samples, rate = soundfile.read(io.BytesIO(audio[clip]), dtype="float32")
        expected = librosa.resample(samples, orig_sr=rate, target_sr=16_000)
        assert len(expected) == [16_000, 16_000, 24_000][clip]
        placed = stored[round(start * 16_000) :][: len(expected)]
        assert np.abs(placed - expected).max() <= 0.5 / 32768 + 1e-7


# ---- nothing is lost -------------------------------------------------------------------------------------------------


def test_two_workers_give_the_bytes_of_one(packed, arguments, tmp_path, small_shards):
    assert script.main(arguments(tmp_path, "--preprocessing_num_workers", 2)) == 0
    results = [contents(*(root / name for name in (CUT, PACKED, VECTORS))) for root in (tmp_path, packed)]
    assert results[0] == results[1]
    assert len(results[0]) == 5 + 3 + 3


def test_clips_that_share_windows_are_filtered_by_the_process_that_packs_them(
    packed, arguments, tmp_path, small_shards, monkeypatch
):
    """Of two processes one after the other, so that neither finds shards of the other."""

    def run_as(rank: int) -> int:
        state = Mock(num_processes=2, process_index=rank, is_main_process=rank == 0)
        state.main_process_first = contextlib.nullcontext
        monkeypatch.setattr(script, "PartialState", lambda **_: state)
        return script.main(arguments(tmp_path))

    with pytest.raises(SystemExit, match=r"shard 2 of \S+ is missing"):
        run_as(0)
    assert run_as(1) == 0
    results = [contents(*(root / name for name in (CUT, PACKED, VECTORS))) for root in (tmp_path, packed)]
    assert results[0] == results[1]


def test_what_is_missing_is_made_again_and_nothing_else(packed, arguments, tmp_path, small_shards):
    """Filtered first and without windows, then packed, then with shards lost, as after kills at these moments."""
    plain = [argument for argument in arguments(tmp_path) if argument != "--concatenate_audio"]
    assert script.main(plain) == 0
    assert script.main(arguments(tmp_path, "--skip_filtering", "--skip_logmel")) == 0
    assert script.main(arguments(tmp_path)) == 0
    paths = {name: sorted((tmp_path / name / "tiny").iterdir()) for name in (CUT, PACKED, VECTORS)}
    lost = [paths[PACKED][0], paths[VECTORS][1]]
    (lost[0].with_name(f".{lost[0].name}.partial")).write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for some in paths.values() for path in some}
    for path in lost:
        path.unlink()
    assert script.main(arguments(tmp_path)) == 0
    assert [path for path in times if path.stat().st_mtime_ns != times[path]] == lost
    assert contents(*(tmp_path / n for n in paths)) == contents(*(packed / n for n in paths))
    for choice in (("--concatenate_seconds", 20), ("--concatenate_probability", 0.5), ("--seed", 1)):
        with pytest.raises(
            SystemExit, match=rf"{choice[0][2:]} was \S+ and is now {choice[1]}.*--overwrite_output_dir"
        ):
            script.main(arguments(tmp_path, *choice))


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(arguments, tmp_path):
    given, outputs = arguments(tmp_path / "killed"), [tmp_path / "killed" / name for name in (CUT, PACKED, VECTORS)]
    for wanted in (outputs[0] / "tiny", outputs[1] / "tiny"):  # while filtering, and while packing
        process = subprocess.Popen([sys.executable, script.__file__, *given], stderr=subprocess.PIPE)
        while process.poll() is None and not (wanted.exists() and any(wanted.iterdir())):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert json.loads((outputs[1] / "filtering.tiny.train.json").read_text())["status"] == "running"
    assert script.main(given) == 0
    assert script.main(arguments(tmp_path / "whole")) == 0
    assert contents(*outputs) == contents(*(tmp_path / "whole" / output.name for output in outputs))
    assert not list(tmp_path.rglob("*.partial"))


def test_windows_of_another_threshold_beside_them_are_not_taken_for_these(packed, arguments, tmp_path, small_shards):
    assert script.main(arguments(tmp_path, "--cer_threshold", 200)) == 0
    assert script.main(arguments(tmp_path)) == 0
    names = (CUT, PACKED, VECTORS)
    assert contents(*(tmp_path / name for name in names)) == contents(*(packed / name for name in names))


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--concatenate_seconds", 31), "--concatenate_seconds 31.0 is over the model's 30 s"),
        (("--speaker_id_column_name", "voice"), "has no column 'voice'"),
        (("--max_label_length", 449), "over the decoder's 448 positions"),
    ],
)
def test_a_mistake_gives_one_line(arguments, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        script.main(arguments(tmp_path, *change))
    assert not list(tmp_path.iterdir())


def test_impossible_flags_are_refused(arguments, tmp_path):
    for change in (("--concatenate_gap_seconds", 30), ("--concatenate_probability", 1.1)):
        with pytest.raises(SystemExit) as stopped:
            script.main(arguments(tmp_path, *change))
        assert stopped.value.code == 2


def test_no_kept_clip_leaves_whole_empty_shards(teacher, arguments, tmp_path):
    rows = [{"audio": tone(0.2), "transcription": "東京", "whisper_transcript": teacher.label("大阪府")}] * 3
    dataset = labelled(tmp_path / "speech", rows)
    with pytest.raises(SystemExit, match="keeps none of 3 clips"):
        script.main(arguments(tmp_path, "-d", dataset))
    assert [pq.read_table(path).num_rows for path in sorted((tmp_path / VECTORS / "tiny").iterdir())] == [0]
