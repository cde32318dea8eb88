"""run_short_form_eval.py on windows of several clips, on audio over 30 s, with a draft model, and on a dry run."""

import io
import json
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration, WhisperProcessor

import run_short_form_eval as evaluation
from tests.stages import read_players
from tests.test_evaluation import command, evaluate, predictions, row, write_dataset

WINDOWS = "train.windows_30"


def decode(audio: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(audio), dtype="float32")[0]


def transcribe(model_directory: Path, waveform: np.ndarray, **flags) -> str:
    """What `transformers` makes of one waveform, in the way that its documentation has it."""
    model = WhisperForConditionalGeneration.from_pretrained(model_directory).eval()
    processor = WhisperProcessor.from_pretrained(model_directory)
    long = {"truncation": False, "padding": "longest"} if len(waveform) > 480_000 else {}
    features = processor(waveform, sampling_rate=16_000, return_tensors="pt", **long).input_features
    with torch.inference_mode():
        tokens = model.generate(features, language="ja", task="transcribe", max_new_tokens=16, **flags)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


# ------------------------------------------------------------------------------------------------------------- windows


@given(st.lists(st.none() | st.integers(1, 40), max_size=60), st.integers(0, 5))
def test_every_clip_is_in_one_window_and_no_window_is_over_its_length(lengths, seed):
    windows = evaluation.pack_clips(lengths, 30, seed)
    assert sorted(row for window in windows for row in window) == list(range(len(lengths)))
    assert all(len(window) == 1 or sum(lengths[row] for row in window) <= 30 for window in windows)


def test_windows_are_filled_well_and_clips_of_any_length_go_together():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(1.5, 0.6, 5_000), 0.8, 29) * 16_000  # like ReazonSpeech's: mean 5.3 s
    windows = evaluation.pack_clips(lengths.astype(int).tolist(), 480_000, 0)
    assert statistics.mean(lengths[window].sum() for window in windows) > 0.93 * 480_000
    pairs = np.array([window[:2] for window in windows if len(window) > 1])
    assert abs(np.corrcoef(lengths[pairs].T)[0, 1]) < 0.2


@pytest.fixture(scope="session")
def windows(tiny_teacher, loaded, tmp_path_factory) -> Path:
    """Results of windows beside those of the clips."""
    output_dir = tmp_path_factory.mktemp("windows")
    for flags in ([], ["--concatenate_audio"]):
        name = WINDOWS if flags else "train"
        evaluate(tiny_teacher, loaded, output_dir, "--id_column_name", "name", *flags, name=name)
    return output_dir


def test_a_window_is_whole_clips_with_silence_between_and_their_texts_joined(windows, tiny_teacher, clips):
    sources = {clip["name"]: clip for clip in clips}
    rows = predictions(windows, name=WINDOWS)
    members = [prediction["id"].split(" + ") for prediction in rows]
    assert sorted(name for names in members for name in names) == sorted(sources)
    assert max(map(len, members)) > 2
    players = read_players(windows / f"report.{WINDOWS}.html")
    heard = {names: decode(audio) for names, audio in players.items()}
    for prediction, names in zip(rows, members, strict=True):
        assert prediction["reference"] == "".join(sources[name]["transcription"] for name in names)
        pieces = [decode(sources[name]["audio"]) for name in names]
        assert float(prediction["seconds"]) == pytest.approx(sum(map(len, pieces)) / 16_000, abs=0.01)
        window, start = heard[prediction["id"]], 0
        for number, piece in enumerate(pieces):
            if number:
                gap = np.flatnonzero(window[start:])[0]  # up to the first sample of the next that is not 0
                gap -= np.flatnonzero(piece)[0]
                assert 0 <= gap <= 0.4 * 16_000
                start += gap
            assert np.array_equal(window[start : start + len(piece)], piece)
            start += len(piece)
        assert start == len(window) <= 480_000
        assert prediction["hypothesis"] == transcribe(tiny_teacher, window)


def test_windows_and_clips_are_kept_apart_and_compared_apart(windows, tiny_teacher, loaded, tmp_path, capsys):
    metrics = {name: json.loads((windows / f"metric.{name}.json").read_text()) for name in ("train", WINDOWS)}
    assert metrics["train"]["clips"] == 24 > metrics[WINDOWS]["clips"]
    assert sum(metrics["train"]["details"]["cer"][count] for count in ("reference",)) == pytest.approx(
        metrics[WINDOWS]["details"]["cer"]["reference"]
    )
    evaluation.main(["--compare", str(windows), "--output_dir", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[3].strip() for line in lines] == ["reazonspeech", "reazonspeech windows 30"]
    assert all(line.split("|")[-4].strip() == "" for line in lines)  # each is the first on its data


def test_windows_are_drawn_by_seed(windows, tiny_teacher, loaded, tmp_path):
    flags = ["--id_column_name", "name", "--concatenate_audio"]
    evaluate(tiny_teacher, loaded, tmp_path / "same", *flags, name=WINDOWS)
    assert predictions(tmp_path / "same", name=WINDOWS) == predictions(windows, name=WINDOWS)
    with pytest.raises(SystemExit, match="other settings: seed was 0 and is now 1"):
        evaluate(tiny_teacher, loaded, tmp_path / "same", *flags, "--seed", "1", name=WINDOWS)
    evaluate(tiny_teacher, loaded, tmp_path / "other", *flags, "--seed", "1", name=WINDOWS)
    drawn = [{row["id"] for row in predictions(path, name=WINDOWS)} for path in (tmp_path / "other", windows)]
    assert drawn[0] != drawn[1]


def test_silences_are_drawn_by_seed_and_by_clip():
    drawn = [[len(evaluation.silence(row, seed)) for row in range(20)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[1] != drawn[2]
    assert all(len(set(lengths)) > 10 and max(lengths) < evaluation.MAX_SILENCE for lengths in drawn)


def test_clips_that_no_window_can_use_are_counted_by_name(tiny_teacher, loaded, clips, tmp_path):
    rows = [row(clip["name"], clip["audio"], clip["transcription"]) for clip in clips[:4]]
    rows += [row("silent", clips[4]["audio"], "。"), row("cut", clips[5]["audio"][:60], "はい")]
    dataset = write_dataset(tmp_path / "data", rows, loaded)
    flags = ["--id_column_name", "name", "--concatenate_audio", "--concatenate_seconds", "12.5"]
    metrics = evaluate(tiny_teacher, dataset, tmp_path / "results", *flags, name="train.windows_12.5")
    unusable = metrics["unusable"]
    assert unusable.pop("empty reference") == ["silent"]
    assert list(unusable.values()) == [["cut"]]


# ----------------------------------------------------------------------------------------------------------- long form


def test_audio_over_30_s_is_decoded_sequentially_and_shorter_as_ever(tiny_teacher, loaded, clips, tmp_path):
    waveform = np.concatenate([decode(clip["audio"]) for clip in clips])
    long = {}
    for name, seconds in (("long", 50), ("longer", 65)):
        file = io.BytesIO()
        soundfile.write(file, waveform[: seconds * 16_000], 16_000, format="FLAC")
        long[name] = file.getvalue()
    rows = [row(name, audio, "長い") for name, audio in long.items()]
    rows += [row("short", clips[0]["audio"], "短い")]
    dataset = write_dataset(tmp_path / "data", rows, loaded)
    flags = ["--id_column_name", "name", "--long_form"]
    metrics = evaluate(tiny_teacher, dataset, tmp_path / "results", *flags, name="train.long_form")
    assert metrics["audio_seconds"] == pytest.approx(115 + len(decode(clips[0]["audio"])) / 16_000, abs=0.1)
    said = {row["id"]: row["hypothesis"] for row in predictions(tmp_path / "results", name="train.long_form")}
    for name, audio in long.items():
        assert said[name] == transcribe(tiny_teacher, decode(audio), return_timestamps=True)
    once = {"return_timestamps": True, "force_unique_generate_call": True}
    assert said["short"] == transcribe(tiny_teacher, decode(clips[0]["audio"]), **once)
    # one at a time is the same as together
    evaluate(
        tiny_teacher, dataset, tmp_path / "ones", *flags, "--per_device_eval_batch_size", "1", name="train.long_form"
    )
    assert {row["id"]: row["hypothesis"] for row in predictions(tmp_path / "ones", name="train.long_form")} == said


# ---------------------------------------------------------------------------------------------------------- assistants


@pytest.fixture(scope="session")
def student(tiny_teacher, tmp_path_factory) -> Path:
    """The tiny teacher with its first and last decoder layer."""
    directory = tmp_path_factory.mktemp("student") / "student"
    model = WhisperForConditionalGeneration.from_pretrained(tiny_teacher)
    model.model.decoder.layers = torch.nn.ModuleList([model.model.decoder.layers[layer] for layer in (0, -1)])
    model.config.decoder_layers = 2
    shutil.copytree(tiny_teacher, directory)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("flags", [[], ["--return_timestamps"], ["--concatenate_audio"]])
def test_an_assistant_changes_no_text(windows, student, tiny_teacher, loaded, tmp_path, flags):
    flags = [*flags, "--id_column_name", "name", "--max_samples_per_split", "6"]
    name = WINDOWS if "--concatenate_audio" in flags else "train"
    evaluate(tiny_teacher, loaded, tmp_path / "alone", *flags, name=name)
    evaluate(tiny_teacher, loaded, tmp_path / "assisted", *flags, "--assistant_model", str(student), name=name)
    assert predictions(tmp_path / "assisted", name=name) == predictions(tmp_path / "alone", name=name)


def test_what_does_not_go_with_an_assistant_is_one_clear_line(
    student, tiny_teacher, tiny_teacher_v2, loaded, tmp_path, capsys
):
    with pytest.raises(SystemExit, match="has another encoder or vocabulary than the model") as error:
        evaluate(tiny_teacher, loaded, tmp_path / "results", "--assistant_model", str(tiny_teacher_v2))
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="2"):
        evaluate(tiny_teacher, loaded, tmp_path, "--assistant_model", str(student), "--generation_num_beams", "2")
    message = "--assistant_model works only with greedy decoding: remove --generation_num_beams"
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_measures_a_sample_says_what_is_to_be_done_and_changes_nothing(
    tiny_teacher, loaded, clips, tmp_path, capsys
):
    output_dir = tmp_path / "results"
    hours = sum(soundfile.info(io.BytesIO(clip["audio"])).duration for clip in clips) / 3600

    def dry_run(*flags: str) -> dict[str, str]:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert evaluation.main([*command(tiny_teacher, loaded, output_dir, "--dry_run", *flags)[1:]]) == 0
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)

    said = dry_run()
    assert re.fullmatch(rf".*, train, 24 clips, about {hours:.1f}\d h", said["input"])
    assert said["done"] == "0 of 1 shards"
    assert said["left"] == "24 of 24"
    assert said["writes"].startswith(f"{output_dir}: ")
    assert said["pushes"] == "nothing"
    assert re.fullmatch(r"about [\d.]+ min; a sample of 24 took [\d.]+ s \(float32\)", said["time"])
    assert "a sample of 6 took" in dry_run("--per_device_eval_batch_size", "6")["time"]
    assert "a sample of 1 took" in dry_run("--long_form")["time"]
    assert re.search(r"\d windows of 24 clips", dry_run("--concatenate_audio")["input"])
    with pytest.raises(SystemExit, match="has no column 'nothing'"):
        evaluation.main([*command(tiny_teacher, loaded, output_dir)[1:], "--id_column_name", "nothing"])

    assert evaluation.main(command(tiny_teacher, loaded, output_dir)[1:]) == 0
    written = {path.name for path in output_dir.iterdir() if path.is_file() and path.name != ".train.lock"}
    assert written == set(said["writes"].removeprefix(f"{output_dir}: ").split(", "))
    assert dry_run()["done"] == dry_run("--overwrite_output_dir")["done"] == "1 of 1 shards"
    assert dry_run()["left"] == "0 of 24"
    with pytest.raises(SystemExit, match="other settings: max_new_tokens was 16 and is now 9"):
        dry_run("--generation_max_length", "9")
    assert dry_run("--overwrite_output_dir", "--generation_max_length", "9")["done"] == "0 of 1 shards"


def test_nothing_is_said_of_git_where_there_is_no_repository(tiny_teacher, loaded, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    metrics = evaluate(tiny_teacher, loaded, tmp_path / "results", "--max_samples_per_split", "2")
    assert "_git_commit_hash" in metrics
    assert "fatal" not in capfd.readouterr().err
