"""What no stage may stumble over: odd texts, odd audio, odd places, one row, no rows, no room, a clock that jumps."""

import contextlib
import csv
import errno
import fcntl
import importlib
import io
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import librosa
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Features, Value

import create_student_model
import run_data_filtering
import run_distillation
import run_pseudo_labelling
import run_short_form_eval

# Of which Whisper's normaliser leaves something, and one of which it leaves nothing.
ODD = [
    '改行\nと\r\nタブ\tと「引用, "quotes"」',
    "制御\x00\x07\x1b[31m文字\x7f",
    "右から\u202eשלום\u202c左\u200bへ\ufeff",
    "長い文です" * 2_000,
    "<script>alert('x')</script>&amp;",
    "👩‍👩‍👧‍👧が学校へ",
    "か\u3099き\u3099、ｶﾞｷﾞ、①㍿",
    '=HYPERLINK("http://x")',
]
EMPTY = " \u3000\n。"
FEATURES = Features(
    {
        "name": Value("string"),
        "audio": Audio(sampling_rate=16000, decode=False),
        "transcription": Value("string"),
    }
)


def write_dataset(root: Path, rows: list[dict]) -> Path:
    (root / "tiny").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, FEATURES.arrow_schema)
    pq.write_table(table, root / "tiny" / "train-00000-of-00001.parquet")
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: tiny\n  data_files:\n  - split: train\n    path: tiny/train-*\n---\n"
    )
    return root


def read_column(directory: str, column: str) -> list:
    shards = sorted(Path(directory, "tiny").glob("train-*.parquet"))
    return [value for shard in shards for value in pq.read_table(shard)[column].to_pylist()]


def odd_rows(clips: list[dict]) -> list[dict]:
    """Odd texts, in audio of several rates, channels and formats."""
    rows = []
    for clip, text, form in zip(
        clips, [*ODD, EMPTY], itertools.cycle(((8_000, 1), (44_100, 2), (96_000, 3), (16_000, 1)))
    ):
        rate, channels = form
        waveform, _ = soundfile.read(io.BytesIO(clip["audio"]), dtype="float32")
        waveform = librosa.resample(waveform, orig_sr=16_000, target_sr=rate)
        file = io.BytesIO()
        soundfile.write(file, waveform[:, None].repeat(channels, axis=1), rate, format="WAV")
        rows.append(
            {"name": text[:9], "audio": {"bytes": file.getvalue(), "path": "../../x.wav"}, "transcription": text}
        )
    return rows


def load(corpus: Path, output: str) -> int:
    """Make a dataset of the corpus' first tar, laid out as a download."""
    download = Path(output).with_name("download")
    (download / "tiny").mkdir(parents=True, exist_ok=True)
    for name, source in (("tiny.tiny.tsv", "tsv/tiny.tsv"), ("tiny.000.tar", "data/000.tar")):
        if not (download / "tiny" / name).exists():
            shutil.copyfile(corpus / source, download / "tiny" / name)
    # Labelling loads this script anew, and its worker processes look functions up in the newest module of that name.
    loader = importlib.import_module("reazonspeech_manual_dataloader")
    return loader.main(["-t", "tiny", "--data_dir", str(download), "--output_dir", output])


def label(teacher: Path, data: str, output: str, *more: str) -> int:
    given = ["--model_name_or_path", str(teacher), "--dataset_name", data, "--dataset_config_name", "tiny"]
    given += ["--language", "ja", "--max_label_length", "32", "--per_device_eval_batch_size", "64"]
    return run_pseudo_labelling.main([*given, "--dataloader_num_workers", "0", "--output_dir", output, *more])


def filter_all(teacher: Path, data: str, *more: str) -> int:
    given = ["-d", data, "--model", str(teacher), "--wer_threshold", "1e9", "--preprocessing_num_workers", "1"]
    return run_data_filtering.main([*given, "--timestamp_probability", "0", *more])


def initialise(teacher: Path, output: str) -> int:
    return create_student_model.main(
        ["--teacher_checkpoint", str(teacher), "--decoder_layers", "2", "--save_dir", output]
    )


def distil(teacher: Path, student: str, data: str, output: str) -> int:
    given = ["--model_name_or_path", student, "--teacher_model_name_or_path", str(teacher), "--output_dir", output]
    given += ["--train_dataset_name", data, "--train_dataset_config_name", "tiny", "--language", "ja", "--do_train"]
    given += ["--per_device_train_batch_size", "64", "--num_train_epochs", "1", "--freeze_encoder"]
    given += ["--dtype", "float32", "--dataloader_num_workers", "0", "--logging_steps", "1", "--report_to", "none"]
    return run_distillation.main(given)


def evaluate(model: Path | str, data: str, output: str) -> int:
    given = ["--model_name_or_path", str(model), "--dataset_name", data, "--dataset_config_name", "tiny"]
    given += ["--dataset_split_name", "train", "--text_column_name", "transcription", "--id_column_name", "name"]
    given += ["--generation_max_length", "32", "--dataloader_num_workers", "0", "--language", "ja"]
    return run_short_form_eval.main([*given, "--per_device_eval_batch_size", "64", "--output_dir", output])


@pytest.mark.parametrize("number", [len(ODD) + 1, 1])
def test_odd_texts_audio_places_and_clocks_go_through_every_stage(number, clips, tiny_teacher, tmp_path, monkeypatch):
    home = tmp_path / "家 の's"
    (home / "本当の場所").mkdir(parents=True)
    for link in ("labels", "student", "results"):
        (home / "本当の場所" / link).mkdir()
        (home / link).symlink_to(home / "本当の場所" / link)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 2e9 - 3600 * next(hours))  # a clock that is set back again and again
    rows = odd_rows(clips)[:number]
    texts = [row["transcription"] for row in rows]
    write_dataset(home / "デ ー タ", rows)

    assert label(tiny_teacher, "デ ー タ", "labels") == 0
    assert filter_all(tiny_teacher, "~/labels", "--output_dir", "~/cut it") == 0
    assert initialise(tiny_teacher, "~/student-init") == 0
    assert distil(tiny_teacher, "./student-init", "cut it/labels.wer_1000000000.0.vectorized", "~/student") == 0
    assert evaluate("student", "~/デ ー タ", "results") == 0

    assert read_column("labels", "transcription") == texts
    assert read_column("cut it/labels.wer_1000000000.0", "text") == [text for text in texts if text != EMPTY]
    with open("results/all_predictions.train.csv", encoding="utf-8", newline="") as file:
        assert [row["reference"] for row in csv.DictReader(file)] == texts
    assert all((home / link).is_symlink() for link in ("labels", "student", "results"))
    assert (home / "本当の場所" / "student" / "model.safetensors").is_file()
    for record in (*home.glob("cut it/*/filtering*.json"), home / "student" / "distillation.json"):
        assert json.loads(record.read_text(encoding="utf-8"))["seconds"] >= 0
    assert not [path for path in tmp_path.rglob("x.wav")]


@pytest.fixture(scope="module")
def made(loaded, tiny_teacher, tmp_path_factory) -> Path:
    """A directory with `labels`, what the filter makes of them, and `student-init`."""
    root = tmp_path_factory.mktemp("made")
    assert label(tiny_teacher, str(loaded), str(root / "labels"), "--max_samples", "8") == 0
    assert filter_all(tiny_teacher, str(root / "labels")) == 0
    assert initialise(tiny_teacher, str(root / "student-init")) == 0
    return root


@pytest.fixture
def stages(made, loaded, tiny_teacher, corpus):
    """Every stage that writes, as a function of its output directory."""
    vectorized = str(made / "labels.wer_1000000000.0.vectorized")
    return {
        "label": lambda output: label(tiny_teacher, str(loaded), output),
        "filter": lambda output: filter_all(tiny_teacher, str(made / "labels"), "--output_dir", output),
        "initialise": lambda output: initialise(tiny_teacher, output),
        "distil": lambda output: distil(tiny_teacher, str(made / "student-init"), vectorized, output),
        "evaluate": lambda output: evaluate(tiny_teacher, str(loaded), output),
        "load": lambda output: load(corpus, output),
    }


STAGES = ("label", "filter", "initialise", "distil", "evaluate")


def one_line(error: pytest.ExceptionInfo) -> str:
    line = str(error.value)
    assert line.count("\n") == 0 and ": error: " in line
    return line


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_ends_a_stage_in_one_line_and_the_same_command_goes_on(stage, stages, tmp_path):
    output = str(tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))  # bytes that a file may have: writing fails behind
    try:
        with pytest.raises(SystemExit) as error:
            stages[stage](output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in one_line(error)
    assert stages[stage](output) == 0


MODEL_FILES = ("tokenizer.json", "vocab.json", "model.safetensors")


@pytest.mark.parametrize(
    ("stage", "name"),
    [("distil", "optimizer.bin"), *itertools.product(["initialise", "distil"], MODEL_FILES)],
)
def test_a_disk_that_is_full_at_a_librarys_own_write_is_one_line(stage, name, stages, tmp_path):
    output = str(tmp_path / "out")
    assert stages[stage](str(tmp_path / "whole")) == 0
    written = [path.stat().st_size for path in (tmp_path / "whole").rglob(name)]
    assert written
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(written) - 1, limits[1]))
    try:
        with pytest.raises(SystemExit) as error:
            stages[stage](output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Run the same command again" in one_line(error)
    assert stages[stage](output) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_place_where_nothing_can_be_written_is_named_in_one_line(stage, stages, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(SystemExit) as error:
        stages[stage](str(tmp_path / "file" / "out"))
    assert str(tmp_path / "file") in one_line(error)


@contextlib.contextmanager
def another_run(locks: list[Path]) -> Iterator[subprocess.Popen]:
    """A process that holds these locks."""
    code = "import fcntl, sys; files = [open(path, 'ab') for path in sys.argv[1:]]; "
    code += "[fcntl.lockf(file, fcntl.LOCK_EX) for file in files]; print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, *map(str, locks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.stdin.close()


@pytest.mark.parametrize("stage", [*STAGES, "load"])
def test_a_second_run_into_one_output_is_refused_and_what_a_killed_one_left_is_deleted(stage, stages, tmp_path):
    output = str(tmp_path / "out")
    assert stages[stage](output) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    locks = [path for path in files if path.name.endswith(".lock")]
    assert locks
    left = []
    for path in files:
        if path.suffix in (".parquet", ".jsonl") or path.name in ("distillation.json", "metric.train.json"):
            left.append(path.with_name(f".{path.name}.0badcafe.partial"))
            left[-1].write_bytes(b"half")
    with another_run(locks), pytest.raises(SystemExit) as error:
        stages[stage](output)
    line = one_line(error)
    assert "another run is writing" in line and any(str(lock) in line for lock in locks)
    assert all(path.exists() for path in left)
    assert stages[stage](output) == 0
    assert not [path for path in left if path.exists()]


def test_a_file_system_without_locks_is_named_and_the_work_done(stages, tmp_path, monkeypatch, caplog):
    def no_locks(file, flags) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert stages["initialise"](str(tmp_path / "out")) == 0
    assert f"{tmp_path} has no file locks: make sure that no other run writes {tmp_path / 'out'}" in caplog.text


@pytest.mark.parametrize("stage", [*STAGES, "load"])
def test_all_that_is_written_may_be_read_by_others(stage, stages, tmp_path):
    before = os.umask(0o022)
    try:
        assert stages[stage](str(tmp_path / "out")) == 0
    finally:
        os.umask(before)
    modes = {str(path): oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert not {path: mode for path, mode in modes.items() if mode not in ("0o644", "0o755")}


@pytest.mark.parametrize("stage", ["label", "filter", "initialise", "distil", "load"])
def test_a_card_that_cannot_be_read_is_named_in_one_line_before_the_work(stage, stages, tmp_path):
    output = tmp_path / "out"
    directory = output / "labels.wer_1000000000.0" if stage == "filter" else output
    directory.mkdir(parents=True)
    (directory / "README.md").write_text("---\nlicense: [mit\n---\nMine.\n")
    with pytest.raises(SystemExit) as error:
        stages[stage](str(output))
    assert f"the card of {directory} cannot be read" in one_line(error)
    assert not [path for path in directory.rglob("*") if path.suffix in (".parquet", ".safetensors", ".json")]


def test_a_dataset_without_rows_is_labelled_and_then_refused_by_name(tiny_teacher, tmp_path):
    data = str(write_dataset(tmp_path / "none", []))
    assert label(tiny_teacher, data, str(tmp_path / "labels")) == 0
    with pytest.raises(SystemExit) as error:
        filter_all(tiny_teacher, str(tmp_path / "labels"))
    assert "no rows" in one_line(error)
    with pytest.raises(SystemExit) as error:
        evaluate(tiny_teacher, data, str(tmp_path / "out"))
    assert "no rows" in one_line(error)
