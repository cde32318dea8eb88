"""What the stages hear: two channels that differ, at 44.1 kHz, and the silences between the clips of a window.

Each stage that decodes is compared with stock `transformers` on a waveform that is mixed and resampled here.
"""

from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import WhisperForConditionalGeneration

from tests.stages import (
    distil,
    encoded,
    evaluate,
    features_of,
    filter_clips,
    initialise,
    label,
    make_label,
    read_figures,
    read_labels,
    read_players,
    read_predictions,
    read_rows,
    samples_of,
    stock_label,
    stock_text,
    tone,
    write_dataset,
)

RATE = 44_100
ONE_STEP = ("--max_steps", 1, "--per_device_train_batch_size", 4)


def heard(audio: bytes) -> np.ndarray:
    """What a stage must hear of a file of two channels at 44.1 kHz: half of each channel, at 16 kHz."""
    left, right = samples_of(audio).T
    return librosa.resample(0.5 * left + 0.5 * right, orig_sr=RATE, target_sr=16_000)


@pytest.fixture(scope="module")
def rows(clips) -> list[dict]:
    """Three clips, in each of which one speaks on the left and another one, more softly, on the right."""
    rows = []
    for number in range(3):
        voices = [samples_of(clips[place]["audio"])[:, 0] for place in (2 * number, 2 * number + 1)]
        longest = max(map(len, voices))
        left, right = (np.pad(voice, (0, longest - len(voice))) for voice in voices)
        both = librosa.resample(np.stack([left, 0.6 * right]), orig_sr=16_000, target_sr=RATE)
        audio = encoded(both.T, RATE, format="WAV", subtype="FLOAT")
        rows.append({"name": f"clip {number}", "audio": audio, "transcription": clips[number]["transcription"]})
    return rows


@pytest.fixture(scope="module")
def dataset(rows, tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("stereo") / "speech", rows)


@pytest.fixture(scope="module")
def labelled(rows, tiny_teacher, tmp_path_factory) -> Path:
    """The clips with their transcriptions as labels."""
    labels = [{"whisper_transcript": make_label(tiny_teacher, row["transcription"])} for row in rows]
    together = [row | given for row, given in zip(rows, labels, strict=True)]
    return write_dataset(tmp_path_factory.mktemp("stereo") / "labelled", together)


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory) -> Path:
    return initialise(tiny_teacher, tmp_path_factory.mktemp("student") / "init")


# ---- two channels at 44.1 kHz ----------------------------------------------------------------------------------------


def test_a_label_is_that_of_both_channels_at_16_khz(rows, dataset, tiny_teacher, tmp_path):
    flags = ("--language", "ja", "--dtype", "float32", "--max_label_length", 40)
    found = read_labels(label(tiny_teacher, dataset, tmp_path, *flags))
    assert found == [stock_label(tiny_teacher, heard(row["audio"]), 40) for row in rows]
    for channel in (0, 1):  # alone it is heard differently
        alone = librosa.resample(samples_of(rows[0]["audio"])[:, channel], orig_sr=RATE, target_sr=16_000)
        assert found[0] != stock_label(tiny_teacher, alone, 40)


def test_the_filter_s_features_are_those_of_both_channels_at_16_khz(rows, labelled, tiny_teacher):
    filter_clips(tiny_teacher, labelled)
    found = read_rows(labelled.with_name("labelled.wer_10.0.vectorized"))
    for row, kept in zip(rows, found, strict=True):
        waveform = heard(row["audio"])
        assert kept["input_length"] == len(waveform)
        features = np.frombuffer(kept["input_features"], "<f2").reshape(-1, 128).T
        expected = features_of(tiny_teacher, waveform)[0].numpy()
        padded = np.pad(features, ((0, 0), (0, 3000 - features.shape[1])), mode="edge")
        np.testing.assert_allclose(padded, expected, rtol=0, atol=2e-3)


def test_the_filter_s_windows_are_those_of_both_channels_at_16_khz(rows, labelled, tiny_teacher, tmp_path):
    filter_clips(tiny_teacher, labelled, "--concatenate_audio", "--skip_logmel", "--output_dir", tmp_path)
    (window,) = read_rows(tmp_path / "labelled.wer_10.0.packed")
    found = samples_of(window["audio"]["bytes"])[:, 0]
    assert sorted(window["clips"]) == [0, 1, 2]
    for clip, start in zip(window["clips"], window["clip_starts"], strict=True):
        expected = heard(rows[clip]["audio"])
        piece = found[round(start * 16_000) :][: len(expected)]
        np.testing.assert_allclose(piece, expected, rtol=0, atol=1 / 32768)


def first_losses(teacher: Path, student: Path, rows: list[dict], labels: list[list[int]]) -> tuple[float, float]:
    """Cross-entropy and KL divergence at temperature 2 of a student that nothing has trained, a mean over tokens."""
    models = [WhisperForConditionalGeneration.from_pretrained(path).eval() for path in (student, teacher)]
    ce, kl, tokens = 0.0, 0.0, 0
    for row, ids in zip(rows, labels, strict=True):
        features = features_of(teacher, heard(row["audio"])).to(torch.float16).float()  # as they are stored
        with torch.no_grad():
            given = {"input_features": features, "decoder_input_ids": torch.tensor([ids[:-1]])}
            logits, teacher_logits = (model(**given).logits[0] for model in models)  # (tokens, vocabulary)
        targets = torch.tensor(ids[1:])
        ce += F.cross_entropy(logits, targets, reduction="sum").item()
        p, q = (teacher_logits / 2).log_softmax(-1), (logits / 2).log_softmax(-1)
        kl += 4 * F.kl_div(q, p, log_target=True, reduction="sum").item()
        tokens += len(targets)
    return ce / tokens, kl / tokens


def test_training_and_its_evaluation_hear_both_channels_at_16_khz(rows, labelled, tiny_teacher, student, tmp_path):
    held_out = ("--eval_dataset_name", labelled, "--eval_split_name", "train", "--max_label_length", 100)
    output = distil(student, tiny_teacher, labelled, tmp_path / "out", *ONE_STEP, *held_out)
    ce, kl = first_losses(tiny_teacher, student, rows, read_labels(labelled))
    assert read_figures(output, "ce_loss") == pytest.approx([ce], rel=1e-4)
    assert read_figures(output, "kl_loss") == pytest.approx([kl], rel=1e-4)
    assert read_figures(output, "eval_ce")[0] == pytest.approx(ce, rel=1e-4)  # before the first step
    assert read_figures(output, "eval_kl")[0] == pytest.approx(kl, rel=1e-4)


def test_training_on_audio_is_training_on_the_filter_s_features_of_it(labelled, tiny_teacher, student, tmp_path):
    filter_clips(tiny_teacher, labelled, "--timestamp_probability", 0, "--output_dir", tmp_path)
    stored = tmp_path / "labelled.wer_10.0.vectorized"
    read = [distil(student, tiny_teacher, data, tmp_path / data.name, *ONE_STEP) for data in (labelled, stored)]
    losses = [read_figures(output, "loss") for output in read]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_hypothesis_is_what_the_model_says_of_both_channels_at_16_khz(rows, dataset, tiny_teacher, tmp_path):
    found = [row["hypothesis"] for row in read_predictions(evaluate(tiny_teacher, dataset, tmp_path))]
    assert found == [stock_text(tiny_teacher, heard(row["audio"]), 16) for row in rows]
    for channel in (0, 1):
        alone = librosa.resample(samples_of(rows[0]["audio"])[:, channel], orig_sr=RATE, target_sr=16_000)
        assert found[0] != stock_text(tiny_teacher, alone, 16)


def test_a_clip_on_the_report_s_page_sounds_as_the_model_heard_it(rows, dataset, tiny_teacher, tmp_path):
    players = read_players(evaluate(tiny_teacher, dataset, tmp_path) / "report.train.html")
    found = {name: samples_of(audio)[:, 0] for name, audio in players.items()}
    for row in rows:
        np.testing.assert_allclose(found[row["name"]], heard(row["audio"]), rtol=0, atol=1 / 32768)


# ---- silences in windows ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tones(tiny_teacher, tmp_path_factory) -> Path:
    """Twelve tones of different lengths with labels; no sample of a tone is 0."""
    rows = []
    for number in range(12):
        audio = tone(0.5 + 0.1 * number)
        given = {"transcription": "東京", "whisper_transcript": make_label(tiny_teacher, "東京")}
        rows.append({"name": f"tone {number}", "audio": audio, **given})
    return write_dataset(tmp_path_factory.mktemp("tones") / "tones", rows)


def silences(samples: np.ndarray) -> list[int]:
    """Lengths of the stretches of zeros, from the first sound to the last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[1], samples != 0, [1]]).astype(int)))
    return (edges[1::2] - edges[::2]).tolist()


@pytest.mark.parametrize("gap", [0.4, 1.0])
def test_silences_in_the_filter_s_windows_are_drawn_from_none_to_the_longest(tones, tiny_teacher, tmp_path, gap):
    filter_clips(
        tiny_teacher,
        tones,
        *("--concatenate_audio", "--concatenate_gap_seconds", gap, "--skip_logmel", "--output_dir", tmp_path),
    )
    (window,) = read_rows(tmp_path / "tones.wer_10.0.packed")
    found = silences(samples_of(window["audio"]["bytes"])[:, 0])
    lengths = {number: round(0.5 + 0.1 * number, 1) for number in range(12)}
    ends = [start + lengths[clip] for clip, start in zip(window["clips"], window["clip_starts"], strict=True)]
    told = [start - end for end, start in zip(ends[:-1], window["clip_starts"][1:], strict=True)]  # seconds
    assert [round(silence * 16_000) for silence in told if silence > 1e-6] == found
    assert max(found) <= 16_000 * (gap + 0.02)
    assert max(found) > 8_000 * gap
    assert len(set(found)) > 5


def test_silences_in_the_evaluation_s_windows_differ_and_are_no_longer_than_0_4_s(tones, tiny_teacher, tmp_path):
    evaluate(tiny_teacher, tones, tmp_path, "--concatenate_audio")
    (audio,) = read_players(tmp_path / "report.train.windows_30.html").values()
    found = silences(samples_of(audio)[:, 0])
    assert len(found) > 8
    assert 3_200 < max(found) <= 6_400
    assert len(set(found)) > 5
