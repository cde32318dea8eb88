"""What people have as audio and datasets: every stage takes it, or says in one line what is wrong and what to do."""

import csv
import io
import json
import logging
import os
import re
import shutil
import tarfile
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value
from fsspec.implementations.local import LocalFileSystem

import run_distillation
import run_short_form_eval
from run_short_form_eval import decode_clip, load_clip, open_dataset, require_columns, speech_digest, split_title
from tests.stages import (
    encoded,
    evaluate,
    filter_clips,
    initialise,
    label,
    make_label,
    read_metrics,
    read_predictions,
    read_rows,
    run,
    tone,
)

TEXTS = ["西日本では雨です。", "コンマ,です", "はい", "いいえ", "三つください", "ありがとう"]
NAMES = [f"clip{number}.flac" for number in range(len(TEXTS))]
STEMS = [(f"clip{number}", text) for number, text in enumerate(TEXTS)]
SHORT = ("--max_label_length", 12, "--language", "ja")


def clip(number: int) -> bytes:
    return tone(0.5 + 0.1 * number, 200 + 40 * number)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_clips(directory: Path, names: list[str] = NAMES) -> Path:
    for number, name in enumerate(names):
        write(directory / name, clip(number))
    return directory


def write_csv(path: Path, rows: list, **form) -> Path:
    file = io.StringIO(newline="")
    csv.writer(file, **form).writerows(rows)
    return write(path, file.getvalue())


def score(teacher: Path, dataset: Path, output: Path, *flags) -> Path:
    """Evaluate a model on clips without ids; gives the directory of the results."""
    given = ["--model_name_or_path", teacher, "--dataset_name", dataset, "--output_dir", output, "--dtype", "float32"]
    given += ["--dataset_split_name", "train", "--text_column_name", "transcription", "--generation_max_length", 8]
    run(run_short_form_eval.main, *given, *flags)
    return output


def write_parquet(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def embedded(number: int = len(TEXTS)) -> list[dict]:
    return [{"bytes": clip(n), "path": NAMES[n]} for n in range(number)]


def opened(
    dataset: Path, split: str = "train", text: str | None = "transcription", streaming: bool = False
) -> list[tuple]:
    """Text, seconds and problem of each clip, as every stage reads them; streaming, as labelling's dry run does."""
    rows, place = open_dataset(str(dataset), None, split, "audio", text, streaming=streaming)
    if streaming:
        rows = [row for table in rows.with_format("arrow").iter(4) for row in table.to_pylist()]
    found = []
    for row in rows:
        heard = load_clip(row["audio"], place)
        found.append((row.get(text), round(heard.seconds, 1), heard.problem))
    return found


def refusal(stage, *arguments) -> str:
    """The line in which a stage says why it fails."""
    with pytest.raises(SystemExit) as error:
        stage(*arguments)
    line = str(error.value)
    assert "\n" not in line and ": error: " in line
    return line


WHOLE = [(text, 0.5 + 0.1 * number, None) for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory) -> Path:
    return initialise(tiny_teacher, tmp_path_factory.mktemp("student") / "init")


def hold_out(student: Path, teacher: Path, dataset: Path, output: Path, *flags) -> int:
    """Evaluate a student on held-out clips as the training does."""
    given = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--output_dir", output]
    given += ["--eval_dataset_name", dataset, "--eval_split_name", "train", "--language", "ja", "--freeze_encoder"]
    given += ["--text_column_name", "transcription", "--dtype", "float32", "--report_to", "none", *flags]
    return run_distillation.main([*map(str, given), "--max_label_length", "12"])


def fine_tune(student: Path, dataset: Path | str, output: Path) -> Path:
    """Train a step without a teacher; gives the directory of the model."""
    given = ["--model_name_or_path", student, "--train_dataset_name", dataset, "--output_dir", output, "--do_train"]
    given += ["--kl_weight", 0, "--language", "ja", "--max_steps", 1, "--dtype", "float32", "--report_to", "none"]
    run(run_distillation.main, *given)
    return output


# ---- audio folders ---------------------------------------------------------------------------------------------------


def test_texts_and_ids_of_a_csv_stay_what_the_file_has(tiny_teacher, tmp_path):
    data = write_clips(tmp_path / "digits" / "train")
    rows = [(name, f"00{n}", f"{7 * n:03d}") for n, name in enumerate(NAMES)]
    write_csv(data / "metadata.csv", [("file_name", "id", "transcription"), *rows])
    flags = (*SHORT, "--id_column_name", "id", "--text_column_name", "transcription")
    found = read_rows(label(tiny_teacher, data.parent, tmp_path / "labels", *flags))
    assert [(row["id"], row["transcription"]) for row in found] == [row[1:] for row in rows]
    filter_clips(tiny_teacher, tmp_path / "labels", "--wer_threshold", 1e9, "--skip_logmel", "--max_label_length", 20)
    assert [row["text"] for row in read_rows(tmp_path / "labels.wer_1000000000.0")] == [row[2] for row in rows]


def test_metadata_without_a_header_is_a_list_of_texts(tmp_path):
    data = write_clips(tmp_path / "bare" / "train")
    write_csv(data / "metadata.csv", STEMS)
    assert opened(data.parent) == WHOLE


def test_metadata_that_names_nothing_is_refused_where_texts_may_be_wanted(tiny_teacher, tmp_path):
    data = write_clips(tmp_path / "other" / "train")
    write_csv(data / "metadata.csv", [("id", "text"), ("x", "はい")])
    line = refusal(label, tiny_teacher, data.parent, tmp_path / "labels", *SHORT)
    assert f"1 tables in {data.parent} are not read, such as {data / 'metadata.csv'}" in line
    line = refusal(label, tiny_teacher, data.parent, tmp_path / "more", *SHORT, "--text_column_name", "text")
    assert line.endswith(
        f". {data / 'metadata.csv'} has it, but no paths of audio files: add them in a column file_name"
    )


def test_metadata_that_names_no_file_that_is_there_is_an_error(tiny_teacher, tmp_path):
    data = write_clips(tmp_path / "nothing" / "train")
    write_csv(data / "metadata.csv", [("file_name", "transcription"), *zip(["x.flac", "y.flac"], TEXTS, strict=False)])
    line = refusal(label, tiny_teacher, data.parent, tmp_path / "labels")
    assert "none of the 2 clips" in line and f"file not found: {data / 'x.flac'}" in line
    assert "none" in refusal(score, tiny_teacher, data.parent, tmp_path / "eval")
    write_csv(data / "metadata.csv", [("file_name", "transcription"), (NAMES[0], TEXTS[0])])
    assert "pass --overwrite_output_dir" in line
    rows = read_rows(label(tiny_teacher, data.parent, tmp_path / "labels", "--overwrite_output_dir"))
    assert [row["transcription"] for row in rows] == TEXTS[:1]


def test_files_that_are_not_there_or_not_named_are_counted_and_named(tiny_teacher, tmp_path, caplog):
    data = write_clips(tmp_path / "partly" / "train")
    named = [*NAMES[:4], "gone.flac", "also_gone.flac"]
    write_csv(data / "metadata.csv", [("file_name", "transcription"), *zip(named, TEXTS, strict=True)])
    output = label(tiny_teacher, data.parent, tmp_path / "labels", *SHORT)
    record = json.loads((output / "labelling.default.train.json").read_text())
    assert (record["rows_in"], record["rows_out"]) == (6, 4)
    gone = [str(data / name) for name in named[4:]]
    assert record["unusable"] == [[name, f"file not found: {name}"] for name in gone]
    assert "2 audio files that no row of the metadata names" in caplog.text
    assert all(str(data / name) in caplog.text for name in NAMES[4:])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "zip"])
def test_metadata_of_every_kind_is_read(kind, tmp_path):
    data = tmp_path / kind / "train"
    rows = [{"file_name": f"音声/{name}", "transcription": text} for name, text in zip(NAMES, TEXTS, strict=True)]
    write_clips(data / "音声")
    if kind == "parquet":
        write_parquet(data / "metadata.parquet", **{key: [row[key] for row in rows] for key in rows[0]})
    elif kind == "jsonl":
        write(data / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_csv(data / "metadata.csv", [[*rows[0]], *(row.values() for row in rows)])
    if kind == "zip":
        with zipfile.ZipFile(data.parent / "train.zip", "w") as archive:
            for path in data.rglob("*.*"):
                archive.write(path, path.relative_to(data))
        shutil.rmtree(data)
    assert opened(data.parent) == opened(data.parent, streaming=True) == WHOLE


def test_one_metadata_file_above_the_splits_serves_them_all(tmp_path, caplog):
    root = tmp_path / "all"
    places = [f"{'train' if number < 4 else 'test'}/{name}" for number, name in enumerate(NAMES)]
    write_clips(root, places)
    rows = [*zip(places, TEXTS, strict=True), ("train/gone.flac", "x")]
    write_csv(root / "metadata.csv", [("file_name", "transcription"), *rows])
    gone = ("x", 0.0, f"file not found: {root / 'train/gone.flac'}")
    assert opened(root, "train") == [*WHOLE[:4], gone]
    assert opened(root, "test") == [*WHOLE[4:], gone]
    assert opened(root, "train[:1]+test[1:2]") == [WHOLE[0], WHOLE[5]]
    assert "left out" not in caplog.text


def test_a_split_that_a_folder_does_not_have_is_named_with_those_that_it_has(tmp_path):
    write_clips(tmp_path / "folder")
    with pytest.raises(SystemExit, match="has no split 'test'; it has train"):
        opened(tmp_path / "folder", split="test")


def test_a_folder_as_it_lies_on_a_disk_is_read(tmp_path):
    root = tmp_path / "録音 2024"
    write_clips(root, ["話者 A/録音 1.WAV", "話者 A/ 2.Flac", "B/深い/x.y.wav", "B/talk.SPH"])
    for name, content in (("Thumbs.db", b"x"), ("B/._x.wav", b"x"), ("B/x.y.srt", b"1"), ("話者 A/memo.txt", b"x")):
        write(root / name, content)
    assert sorted(seconds for _, seconds, _ in opened(root, text=None)) == [0.5, 0.6, 0.7, 0.8]


@pytest.mark.parametrize("suffix", ["normalised.txt", "json", "tsv"])
def test_texts_beside_the_audio_do_not_hide_it_and_are_read(suffix, tmp_path):
    root = write_clips(tmp_path / "pairs")
    for name, text in zip(NAMES, TEXTS, strict=True):
        write(root / f"{name[:-5]}.txt", f"\ufeff{text}\r\n")
        write(root / f"{name[:-5]}.{suffix}", "x")
        write(root / f"{name[:-5]}.2.{suffix}", "x")
    assert opened(root) == opened(root, streaming=True) == WHOLE


@pytest.mark.parametrize("name", ["cover{}.jpg", "clip{}.xml", "script{}.pdf", "train{}.list", "clip{}.flac.log"])
def test_files_of_other_kinds_beside_the_audio_neither_hide_it_nor_count_as_audio(name, tmp_path, caplog):
    write_clips(tmp_path)
    for number in range(2 * len(NAMES)):
        write(tmp_path / name.format(number), "x")
    assert opened(tmp_path, text=None) == [(None, seconds, None) for _, seconds, _ in WHOLE]
    assert "left out" not in caplog.text


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mpeg", ".3gpp", ".dss"])
def test_recordings_that_must_be_converted_first_are_clips_that_say_so(suffix, tmp_path):
    for number in range(2):
        write(tmp_path / f"film{number}{suffix}", b"\0\0\0\x20ftypisom" + bytes(500))
    advice = "undecodable audio: Format not recognised. Convert it, for example: ffmpeg -i FILE -ar 16000 FILE.flac"
    films = [(None, 0.0, advice)] * 2
    assert opened(tmp_path, text=None) == films
    write_clips(tmp_path, NAMES[:1])
    assert opened(tmp_path, text=None) == [(None, 0.5, None), *films]


@pytest.mark.parametrize("suffix", ["m4a", "wav"])
def test_a_text_is_that_of_a_recording_and_of_what_was_converted_from_it(suffix, tmp_path):
    write_clips(tmp_path)
    for name, text in zip(NAMES, TEXTS, strict=True):
        write(tmp_path / name.replace("flac", suffix), clip(0))
        write(tmp_path / name.replace("flac", "txt"), text)
    assert [text for text, *_ in opened(tmp_path)] == [text for text in TEXTS for _ in range(2)]


LISTS = {  # the audio's directory, the list, and its lines
    "LibriSpeech": ("84/121", "84/121/84-121.trans.txt", "clip{} {}"),
    "JSUT": ("basic5000/wav", "basic5000/transcript_utf8.txt", "clip{}:{}"),
    "ITA": ("wav", "emotion_transcript_utf8.txt", "clip{}:{},アア、ウー。"),
    "two fields": ("clips", "LIST.TXT", "clips/clip{}.flac|{}"),
    "CSS10": ("meian", "transcript.txt", "meian/clip{}.flac|{}|a i|5.80"),
    "LJSpeech": ("wavs", "metadata.csv", "clip{}|{}|a i"),
    "tabs": ("clips", "list.txt", "./clips/clip{}.FLAC\t{}"),
    "AISHELL": ("wav/S0002", "transcript/transcript_v0.8.txt", "clip{} {}"),
    "VITS": ("wavs", "filelists/train.txt", "DUMMY1/clip{}.flac|{}"),
    "VITS, speakers": ("wavs", "train.txt", "DUMMY2/clip{}.flac|4|{}"),
    "CMU ARCTIC": ("wav", "etc/txt.done.data", '( clip{} "{}" )'),
    "GPT-SoVITS": ("sliced", "speaker.list", r"D:\GPT-SoVITS\sliced\clip{}.flac|speaker|JA|{}"),
    "Style-Bert-VITS2": ("raw", "esd.list", "clip{}.flac|speaker|JP|{}"),
}


@pytest.mark.parametrize("layout", LISTS)
def test_lists_of_texts_are_read_as_corpora_have_them(layout, tmp_path):
    directory, file, line = LISTS[layout]
    write_clips(tmp_path / directory)
    write(tmp_path / "LICENSE.txt", "Free to use\n")
    write(tmp_path / file, "".join(f"{line.format(number, text)}\n" for number, text in enumerate(TEXTS)))
    assert opened(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("suffix", "content", "other_suffix", "other"),
    [
        ("lab", "{}\n", "TextGrid", "x"),
        ("normalized.txt", "{}", "original.txt", "another text"),
        ("json", '{{"id": 1, "text": "{}"}}', "wav.json", '["no object"]'),
        ("txt", "{}", "lab", "0 3125000 sil\n3125000 3525000 a\n"),
        ("txt", "{}", "json", '{{"text": null}}'),
        ("txt", "{}", "lab", "separator ;\nnfields 1\n#\n    0.13000   125  pau\n"),  # Festival's
        ("TXT", "0 8000 {}\n", "WRD", "0 800 yes\n"),
    ],
)
def test_a_file_of_one_clip_s_text_is_read_as_tools_write_it(suffix, content, other_suffix, other, tmp_path):
    write_clips(tmp_path)
    for name, text in zip(NAMES, TEXTS, strict=True):
        write(tmp_path / f"{name[:-5]}.{suffix}", content.format(text))
        write(tmp_path / f"{name[:-5]}.{other_suffix}", other.format(text))
    assert opened(tmp_path) == WHOLE


@pytest.mark.parametrize("suffix", ["srt", "vtt", "TextGrid"])
def test_texts_with_times_are_counted_and_named_with_what_to_do(suffix, tmp_path, caplog):
    write_clips(tmp_path)
    for name in NAMES[:2]:
        write(tmp_path / f"{name}.{suffix}", "1\n00:00:00,000 --> 00:00:01,000\nはい\n")
    assert opened(tmp_path, text=None) == [(None, seconds, None) for _, seconds, _ in WHOLE]
    assert re.search(
        rf"left out: 2 texts with times, such as .*clip[01].flac.{suffix}: cut the audio there", caplog.text
    )


def test_directories_such_as_TRAIN_and_TEST_are_splits(tmp_path):
    write_clips(tmp_path / "TRAIN" / "DR1", NAMES[:3])
    write_clips(tmp_path / "Dev", NAMES[:1])
    write_clips(tmp_path / "TEST" / "DR1", NAMES[:2])
    clips = [len(opened(tmp_path, split, text=None)) for split in ("train", "validation", "test")]
    assert clips == [3, 1, 2]


@pytest.mark.parametrize(
    ("audio", "named"),
    [
        ("calls/2024-05-10", "{}"),
        ("upload/4", "/data/upload/4/{}"),
        ("wavs/train", r"C:\corpus\wavs\train\{}"),
    ],
)
def test_a_table_of_another_machine_names_clips_below_it(audio, named, tmp_path):
    write_clips(tmp_path / audio)
    lines = [f"{named.format(name)}\t{text}\n" for name, text in zip(NAMES, TEXTS, strict=True)]
    write(tmp_path / "list.tsv", "path\ttranscription\n" + "".join(lines))
    assert opened(tmp_path / "list.tsv") == WHOLE


def test_a_clip_that_is_not_where_its_row_says_is_no_other_of_its_name(tmp_path):
    for directory in ("a", "b"):
        write_clips(tmp_path / directory, NAMES[:1])
    write_clips(tmp_path, NAMES[1:2])
    write_clips(tmp_path / "b", NAMES[2:3])
    named = ("clip0.flac", "a/clip1.flac", "/elsewhere/clip1.flac", "clip2.flac")
    write(tmp_path / "list.csv", "path,transcription\n" + "".join(f"{name},はい\n" for name in named))
    problems = [problem for *_, problem in opened(tmp_path / "list.csv")]
    assert [bool(problem) for problem in problems] == [True, True, True, False]
    assert all("file not found" in problem for problem in problems[:3])


def test_tables_in_an_audio_folder_that_are_not_read_are_refused_unless_no_texts_are_wanted(tiny_teacher, tmp_path):
    write_clips(tmp_path / "in", NAMES[:2])
    write(tmp_path / "in" / "clip0.json", "{}")
    for number in range(2):
        write(tmp_path / "in" / f"texts {number}.csv", "番号,書き起こし\n1,はい\n")
    for more in ((), ("--dry_run",)):
        line = refusal(label, tiny_teacher, tmp_path / "in", tmp_path / "out", *SHORT, *more)
        assert f"2 tables in {tmp_path / 'in'} are not read, such as {tmp_path / 'in' / 'texts 0.csv'}. If one" in line
    label(tiny_teacher, tmp_path / "in", tmp_path / "out", *SHORT, "--text_column_name", "none")
    assert len(read_rows(tmp_path / "out")) == 2


def test_a_list_s_paths_of_another_machine_are_of_no_clip_where_two_have_the_name(tmp_path):
    for speaker in ("a", "b"):
        write_clips(tmp_path / speaker, NAMES[:2])
    write(tmp_path / "clip1.flac", clip(0))
    write(tmp_path / "list.txt", "DUMMY/clip0.flac|someone's\na/clip1.flac|that of a\n")
    assert [text for text, *_ in opened(tmp_path)] == [None, "that of a", None, None, None]


def test_a_reading_in_katakana_is_cut_from_a_text_behind_a_colon_and_from_no_other(tmp_path):
    write_clips(tmp_path, NAMES[:2])
    write(tmp_path / "list.txt", "clip0:読むのは,ヨムノワ。\nclip1 読むのは,ラテン\n")
    assert [text for text, *_ in opened(tmp_path)] == ["読むのは", "読むのは,ラテン"]


def test_a_list_above_the_speakers_is_what_all_have_read_who_have_no_text_of_their_own(tmp_path, caplog):
    for speaker in ("jvs001", "jvs002"):
        write_clips(tmp_path / speaker / "wav", NAMES[:3])
        write(tmp_path / speaker / "list.txt", f"clip0:{speaker}\nclip2 {speaker}\n")
    write(tmp_path / "all.txt", "clip0 not theirs\nclip1 one text\n")
    write(tmp_path / "jvs001" / "others.txt", "clip2 another text\n")
    texts = [text for text, *_ in opened(tmp_path)]
    assert texts == ["jvs001", "one text", None, "jvs002", "one text", "jvs002"]
    first = tmp_path / "jvs001" / "wav" / "clip1.flac"
    assert f"2 clips, such as {first}, have the text of a list above them, which other clips" in caplog.text
    assert f"1 of 6 rows of {tmp_path} have no transcription" in caplog.text
    write(tmp_path / "more.txt", "clip1 other text\n")
    assert [text for text, *_ in opened(tmp_path)][1::3] == [None, None]


def test_a_text_that_is_missing_in_one_split_does_not_hide_the_audio_of_the_others(tmp_path):
    for split in ("train", "test"):
        for name, text in zip(write_clips(tmp_path / split) and NAMES, TEXTS, strict=True):
            write(tmp_path / split / name.replace("flac", "txt"), text)
    (tmp_path / "train" / "clip5.txt").unlink()
    assert opened(tmp_path) == [*WHOLE[:5], (None, *WHOLE[5][1:])]
    assert opened(tmp_path, "test") == WHOLE


def test_texts_in_a_tree_beside_that_of_the_audio_are_read_as_vctk_has_them(tmp_path):
    names = ["p225/1.flac", "p225/2_mic1.flac", "p225/2_mic2.flac", "p225/3.flac", "p226/1.flac", "p226/3.flac"]
    write_clips(tmp_path / "wav48", names)
    for name, text in {"p225/1": "a", "p225/2": "b", "p226/1": "c", "p227/3": "another's", "3": "whose?"}.items():
        write(tmp_path / "txt" / f"{name}.txt", text)
    assert [text for text, *_ in opened(tmp_path)] == ["a", "b", None, None, "c", None]


def test_texts_in_another_tree_count_for_clips_that_have_none_and_in_trees_without_audio(tmp_path):
    write_clips(tmp_path, [f"train/{number}.flac" for number in range(3)])
    write_clips(tmp_path / "test", ["0.flac", "1.flac"])
    for name in ("train/0", "raw/0", "raw/2", "test/1"):
        write(tmp_path / f"{name}.txt", name)
    assert [text for text, *_ in opened(tmp_path)] == ["train/0", None, "raw/2"]


def test_a_link_to_a_text_elsewhere_is_not_followed_and_named(tmp_path, caplog):
    write_clips(tmp_path / "data")
    (tmp_path / "data" / "clip0.txt").symlink_to(write(tmp_path / "secret.txt", "a secret"))
    write(tmp_path / "data" / "clip1.txt", "a text")
    assert [text for text, *_ in opened(tmp_path / "data")] == [None, "a text", *[None] * 4]
    assert (
        f"left out: 1 texts that are links to files elsewhere, such as {tmp_path / 'data' / 'clip0.txt'}" in caplog.text
    )


def test_links_to_audio_elsewhere_are_not_followed_and_named(tmp_path, caplog):
    elsewhere = write_clips(tmp_path / "disk")
    root = write_clips(tmp_path / "data", NAMES[:2])
    (root / "disk").symlink_to(elsewhere)
    (root / "clip5.flac").symlink_to(elsewhere / "clip5.flac")
    *_, (_, _, problem) = opened(root, text=None)
    assert problem == f"not in the dataset: {root / 'clip5.flac'}, a link to {elsewhere / 'clip5.flac'}"
    assert f"left out: {root / 'disk'} is a link to a directory: name a table of its files, or copy it" in caplog.text


def test_labels_of_audacity_are_no_texts(tmp_path):
    write_clips(tmp_path)
    write(tmp_path / "clip0.txt", "0.100000\t0.400000\tはい\n0.420000\t0.500000\tいいえ\n")
    assert "its .txt files have times, as Audacity's labels do: cut the audio there" in refusal(opened, tmp_path)


def test_the_rows_of_several_metadata_files_have_one_order(tmp_path):
    for number in range(9):
        directory = write_clips(tmp_path / f"speaker{number}", NAMES[:1])
        write_csv(directory / "metadata.csv", [("file_name", "transcription"), (NAMES[0], str(number))])
    assert [text for text, *_ in opened(tmp_path)] == [str(number) for number in range(9)]


def test_txt_files_in_another_encoding_are_one_line(tmp_path):
    write_clips(tmp_path)
    write(tmp_path / "clip0.txt", TEXTS[0].encode("cp932"))
    assert ".txt files are not UTF-8: convert it, for example with iconv" in refusal(opened, tmp_path)


def test_a_list_in_another_encoding_whose_names_fit_no_clip_is_named(tmp_path, caplog):
    write_clips(tmp_path, ["一.flac", "2.flac"])
    write(tmp_path / "2.txt", "a text")
    script = write(tmp_path / "台本.txt", "一\tはい\n".encode("cp932"))
    assert [text for text, *_ in opened(tmp_path)] == ["a text", None]
    assert f"left out: 1 texts that are not UTF-8, such as {script}: convert it, for example with iconv" in caplog.text


@pytest.mark.parametrize("name", ["mic_test.wav", "train_1.wav", "train.csv"])
def test_words_such_as_test_make_splits_of_directories_and_not_of_files(name, tmp_path, caplog):
    write_clips(tmp_path / "a")
    write(tmp_path / name, clip(0))
    assert len(opened(tmp_path, text=None)) == len(NAMES) + name.endswith(".wav")
    assert "left out" not in caplog.text
    (tmp_path / "a").rename(tmp_path / "test")
    assert len(opened(tmp_path, "test", text=None)) == len(NAMES)
    assert caplog.text.count(f"1 audio files that lie in the directory of no split: {tmp_path / name}") == (
        not name.endswith(".csv")
    )


def test_names_match_whatever_their_unicode_form_and_the_csv_s_dialect(tmp_path):
    root = tmp_path / "forms"
    names = [f"がぎ{number}.wav" for number in range(4)]
    write_clips(root, [unicodedata.normalize("NFD", name) for name in names])
    cells = ['"一行\r\n二行; です"', "NA", "null", "007"]
    lines = "".join(f"{name};{cell}\r\n" for name, cell in zip(names, cells, strict=True))
    write(root / "metadata.csv", f"\ufefffile_name;transcription\r\n{lines}\r\n")
    found = opened(root)
    assert [text for text, *_ in found] == ["一行\r\n二行; です", "NA", "null", "007"]
    assert not [problem for *_, problem in found if problem]


def test_the_only_audio_column_is_taken_whatever_its_name(tmp_path):
    root = write_clips(tmp_path / "speech")
    rows = [("speech_file_name", "transcription"), *zip(NAMES, TEXTS, strict=True)]
    write_csv(root / "metadata.csv", rows)
    assert opened(root) == WHOLE


def test_class_labels_are_read_by_their_names(tmp_path):
    write_clips(tmp_path / "words", ["はい/a.flac", "いいえ/b.flac"])
    assert sorted(text for text, *_ in opened(tmp_path / "words", text="label")) == ["いいえ", "はい"]
    features = Features({"audio": Audio(), "transcription": ClassLabel(names=["いいえ", "はい"])})
    table = pa.table({"audio": embedded(2), "transcription": [1, 0]})
    (tmp_path / "classes").mkdir()
    pq.write_table(table.cast(features.arrow_schema), tmp_path / "classes" / "train.parquet")
    assert [text for text, *_ in opened(tmp_path / "classes")] == ["はい", "いいえ"]


def write_table_folder(root: Path, name: str = "export.csv", text: str = "transcription") -> Path:
    """An audio folder with one table, in another order, with paths of another machine."""
    write_clips(root / "upload" / "1")
    rows = [(f"/data/upload/1/{name}", text, "x") for name, text in zip(NAMES, TEXTS, strict=True)]
    return write_csv(root / name, [("recording", text, "annotator"), *rows[::-1]])


@pytest.mark.parametrize("streaming", [False, True])
def test_an_audio_folder_has_the_texts_of_its_only_table_and_the_tables_order(streaming, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    table = write_table_folder(tmp_path / "data")
    for text in ("transcription", None):
        rows, _ = open_dataset(str(tmp_path / "data"), None, "train", "audio", text)
        assert rows.column_names == ["transcription", "annotator", "audio"]
    assert opened(tmp_path / "data", streaming=streaming) == WHOLE[::-1]
    assert f"the clips and their texts are those of {table}" in caplog.text
    assert "left out" not in caplog.text


def test_the_table_of_an_audio_folder_is_found_by_the_column_that_a_flag_names(tmp_path):
    write_table_folder(tmp_path, text="書き起こし")
    write(tmp_path / "lengths.csv", "path,seconds\n/data/upload/1/clip0.flac,0.5\n")
    assert opened(tmp_path, text="書き起こし") == WHOLE[::-1]
    rows, _ = open_dataset(str(tmp_path), None, "train", "audio", None)
    assert "書き起こし" not in rows.column_names and len(rows) == len(NAMES)
    write_table_folder(tmp_path, "copy.csv", text="書き起こし")
    rows, _ = open_dataset(str(tmp_path), None, "train", "audio", "書き起こし")
    columns = {"text_column_name": "書き起こし"}
    assert f"{tmp_path / 'copy.csv'}, {tmp_path / 'export.csv'}" in refusal(
        require_columns, str(tmp_path), rows, columns
    )


def test_a_table_is_not_looked_for_where_texts_lie_beside_the_clips_or_none_are_wanted(tmp_path):
    write_table_folder(tmp_path)
    rows, _ = open_dataset(str(tmp_path), None, "train", "audio", "none")
    assert rows.column_names == ["audio"]
    for name in NAMES:
        write((tmp_path / "upload" / "1" / name).with_suffix(".txt"), "はい")
    assert [text for text, *_ in opened(tmp_path)] == ["はい"] * len(NAMES)


def test_each_split_of_an_audio_folder_has_its_own_table(tmp_path, caplog):
    # NeMo's: clips of the splits have the same names.
    for split, stem in (("train", "train_manifest"), ("val", "val_manifest"), ("test", "test_manifest")):
        write_clips(tmp_path / "wavs" / split)
        names = [f"wavs/{split}/{name}" for name in NAMES]
        rows = [{"audio_filepath": name, "text": f"{split}{text}"} for name, text in zip(names, TEXTS, strict=True)]
        write(tmp_path / f"{stem}.json", "".join(json.dumps(row) + "\n" for row in rows))
    for split, said in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert opened(tmp_path, split, text="text") == [(f"{said}{text}", *rest) for text, *rest in WHOLE]
    assert "left out" not in caplog.text


def test_rows_of_a_folders_table_without_a_clip_and_clips_without_a_row_are_counted(tmp_path, caplog):
    write_clips(tmp_path / "data")
    write(tmp_path / "secret.flac", clip(0))
    rows = [("clip3.flac", "はい"), ("gone.flac", "x"), ("", "y"), ("../secret.flac", "z")]
    table = write_csv(tmp_path / "data" / "list.csv", [("file", "transcription"), *rows])
    assert opened(tmp_path / "data") == [("はい", 0.8, None)]
    assert f"left out: 3 rows of {table} that name no clip here, such as gone.flac" in caplog.text
    assert f"left out: 5 audio files that {table} do not name: {tmp_path}/data/clip0.flac, " in caplog.text


def test_a_folders_table_tells_files_of_one_stem_apart_and_clips_with_several_rows_are_counted(tmp_path, caplog):
    write(tmp_path / "a.flac", clip(1))
    write(tmp_path / "a.wav", encoded(np.zeros(16_000, np.float32), 16_000, "WAV"))
    write_csv(tmp_path / "list.csv", [("file", "transcription"), ("a.flac", "x"), ("a.wav", "y"), ("a", "z")])
    assert [row[:2] for row in opened(tmp_path)][:2] == [("x", 0.6), ("y", 1.0)]
    assert f"1 clips have several rows in {tmp_path / 'list.csv'}, such as {tmp_path}/a." in caplog.text


@pytest.mark.parametrize("name", ["list.csv", "LIST.TSV"])
def test_a_table_of_two_columns_without_a_header_is_a_list_of_texts(name, tmp_path):
    write_clips(tmp_path)
    delimiter = "\t" if name.endswith("TSV") else ","
    write_csv(tmp_path / name, zip(NAMES, TEXTS, strict=True), delimiter=delimiter)
    assert opened(tmp_path) == WHOLE
    write_csv(tmp_path / name, [*zip(NAMES, TEXTS, strict=True), ("clip0.flac", "話者", "x")], delimiter=delimiter)
    assert [text for text, *_ in opened(tmp_path)] == [None] * len(NAMES)


def test_a_table_of_speakers_is_no_list_of_texts(tmp_path):
    write_clips(tmp_path)
    write_csv(tmp_path / "speakers.csv", [("file", "speaker"), *((name, "佐藤") for name in NAMES)])
    assert [text for text, *_ in opened(tmp_path)] == [None] * len(NAMES)


def test_lists_of_several_splits_do_not_name_clips_of_the_same_name_in_another(tmp_path):
    for split in ("train", "test"):
        write_clips(tmp_path / "wavs" / split)
        rows = [f"/old/wavs/{split}/{name}|{split}{text}\n" for name, text in zip(NAMES, TEXTS, strict=True)]
        write(tmp_path / f"filelist_{split}.txt", "".join(rows))
    assert [text for text, *_ in opened(tmp_path)] == [f"train{text}" for text in TEXTS]
    assert [text for text, *_ in opened(tmp_path, "test")] == [f"test{text}" for text in TEXTS]


def test_a_folder_is_walked_a_few_times_and_anew_when_it_is_opened_again(tmp_path, monkeypatch):
    write_clips(tmp_path / "a" / "b", NAMES[:2])
    listed = Counter()
    list_directory = LocalFileSystem.ls

    def count(filesystem, path, *args, **options):
        listed[path] += 1
        return list_directory(filesystem, path, *args, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", count)
    assert len(opened(tmp_path)) == 2
    assert 0 < listed[str(tmp_path / "a" / "b")] <= 3
    write_clips(tmp_path / "a" / "b")
    assert len(opened(tmp_path)) == len(NAMES)


@pytest.mark.parametrize("header", ["path,transcription", "filename,transcription", "transcription,audio"])
def test_a_metadata_csv_may_call_the_files_as_it_likes(header, tmp_path):
    rows = [(text, name) if header.startswith("t") else (name, text) for name, text in zip(NAMES, TEXTS, strict=True)]
    for place in (tmp_path / "beside", tmp_path / "above" / "wavs"):
        write_clips(place)
    for place in (tmp_path / "beside", tmp_path / "above"):
        write_csv(place / "metadata.csv", [header.split(","), *rows])
        assert opened(place) == WHOLE


@pytest.mark.parametrize(("split", "stem"), [("train", "train"), ("validation", "my-dev"), ("test", "TEST.2024")])
def test_of_several_tables_that_fit_the_one_is_read_that_is_named_after_the_split(split, stem, tmp_path):
    write_clips(tmp_path / split / "clips")
    for number, name in enumerate(("extra", "trainers", stem)):
        rows = [(name, f"{number}{text}") for name, text in zip(NAMES, TEXTS, strict=True)]
        write_csv(tmp_path / "tables" / f"{name}.csv", [("file", "transcription"), *rows])
    assert opened(tmp_path, split) == [(f"2{text}", *rest) for text, *rest in WHOLE]


def test_where_an_audio_folder_has_no_such_split_its_table_is_named(tmp_path):
    write_clips(tmp_path / "clips")
    for name in ("train.csv", "dev.csv"):
        write_csv(tmp_path / name, [("file", "transcription"), *STEMS])
    line = refusal(opened, tmp_path, "validation")
    assert line.endswith(
        f"has no split 'validation'; it has train. Name a table instead of the directory: {tmp_path}/dev.csv"
    )
    assert refusal(opened, tmp_path, "test").endswith("has no split 'test'; it has train")


def test_tables_of_several_directories_are_read_together_where_none_names_the_clips_of_another(tmp_path, caplog):
    for number in range(2):
        episode = tmp_path / f"EP{number}"
        write_clips(episode / "clips")
        rows = [(name, f"{number}{text}") for name, text in zip(NAMES, TEXTS, strict=True)]
        write_csv(
            episode / "transcript.csv", [("clip", "transcription", f"more{number}"), *((*row, "x") for row in rows)]
        )
    both = [(f"{number}{text}", *rest) for number in range(2) for text, *rest in WHOLE]
    assert opened(tmp_path) == both
    assert "left out" not in caplog.text
    write_csv(tmp_path / "EP0" / "final.csv", [("clip", "transcription"), (NAMES[0], "違う")])
    assert [text for text, *_ in opened(tmp_path)] == [None] * len(both)


def test_the_table_of_an_audio_folder_may_lie_in_any_directory_and_count_its_paths_from_the_top(tmp_path):
    write_clips(tmp_path / "第2話" / "納品" / "A")
    table = tmp_path / "第2話" / "台本.csv"
    write_csv(table, [("ファイル名", "transcription"), *STEMS])
    assert opened(tmp_path) == WHOLE
    table.rename(tmp_path / "第2話" / "old.csv.bak")
    rows = [(f"第2話/納品/A/{name}", text) for name, text in zip(NAMES, TEXTS, strict=True)]
    write_csv(tmp_path / "lists" / "all.csv", [("file", "transcription"), *rows])
    assert opened(tmp_path) == WHOLE


def test_a_table_that_is_named_finds_clips_below_it_without_their_suffix(tmp_path):
    write_clips(tmp_path / "納品" / "A")
    table = write_csv(tmp_path / "台本.csv", [("path", "transcription"), *STEMS, ("twice", "x")])
    for name in ("twice.flac", "twice.wav"):
        write(tmp_path / "納品" / name, clip(0))
    *found, last = opened(table)
    assert found == WHOLE
    assert last[2].startswith("file not found: twice")


def test_a_table_that_links_elsewhere_is_not_read(tmp_path):
    write_clips(tmp_path / "data")
    table = write_csv(tmp_path / "private.csv", [("file", "transcription"), *STEMS])
    (tmp_path / "data" / "list.csv").symlink_to(table)
    assert [text for text, *_ in opened(tmp_path / "data")] == [None] * len(NAMES)


@pytest.mark.parametrize("name", ["line_index.tsv", "wavs/line_index.tsv"])
def test_a_list_without_a_header_may_name_clips_without_their_suffix(name, tmp_path):
    write_clips(tmp_path / "wavs")
    write_csv(tmp_path / name, STEMS, delimiter="\t")
    assert opened(tmp_path) == WHOLE


def test_a_list_without_a_header_may_have_speakers(tmp_path):
    write_clips(tmp_path / "data" / "cf")
    rows = [(stem, "話者", text) for stem, text in STEMS]
    write_csv(tmp_path / "utt_spk_text.tsv", rows, delimiter="\t")
    assert opened(tmp_path) == WHOLE


@pytest.mark.parametrize(
    "rows", [[("id", "file", "speaker"), ("1", "clip0", "佐藤")], [("clip0", "佐藤", "女", "東京")], []]
)
def test_a_table_without_names_in_its_first_line_or_with_more_columns_is_no_list_of_texts(rows, tmp_path):
    write_clips(tmp_path)
    write_csv(tmp_path / "list.csv", rows)
    write_csv(tmp_path / "list.tsv", rows, delimiter="\t")
    assert [text for text, *_ in opened(tmp_path)] == [None] * len(NAMES)


def test_a_table_of_another_split_is_never_read_for_another_and_a_broken_one_is_named(tmp_path, caplog):
    write_clips(tmp_path / "wavs")
    for name in ("eval", "train"):
        write_csv(tmp_path / f"meta_{name}.csv", [("file", "transcription"), *STEMS])
    table = tmp_path / "meta_train.csv"
    table.write_text(table.read_text() + "clip0,はい,そう\n")
    assert [text for text, *_ in opened(tmp_path)] == [None] * len(NAMES)
    assert f"not read: {table}, line 8: it has 3 cells, the header 2" in caplog.text
    table.unlink()
    assert [text for text, *_ in opened(tmp_path)] == [None] * len(NAMES)


def test_tables_with_bars_may_do_without_quoting(tmp_path):
    write_clips(tmp_path / "wavs")
    lines = ["audio_file|text|speaker", 'wavs/clip0.flac|"はい", と言った|a', "wavs/clip1.flac|いいえ|a"]
    table = write(tmp_path / "list.csv", "\n".join(lines))
    assert [text for text, *_ in opened(table, text="text")] == ['"はい", と言った', "いいえ"]


def test_files_that_clips_have_of_their_own_are_no_tables(tmp_path):
    write_clips(tmp_path / "wav")
    for stem, _ in STEMS:
        for name in (f"wav/{stem}.info.json", f"labels/{stem}.json"):
            write(tmp_path / name, "{}")
    table = write(tmp_path / "other.json", "{}")
    place = run_short_form_eval.Place(str(tmp_path), is_confined=True)
    assert run_short_form_eval.find_tables([str(file) for file in tmp_path.rglob("*")], place) == [table]


def test_the_texts_of_kss_and_voxforge_are_read(tmp_path):
    write_clips(tmp_path / "kss" / "1")
    lines = [f"1/{name}|{text}|{text}|x|3.5|Yes.\n" for name, text in zip(NAMES, TEXTS, strict=True)]
    write(tmp_path / "kss" / "transcript.v.1.4.txt", "".join(lines))
    assert opened(tmp_path / "kss") == WHOLE
    for speaker in ("ralf", "timo"):
        write_clips(tmp_path / "voxforge" / speaker / "wav")
        lines = [f"{stem} {speaker}{text}\n" for stem, text in STEMS]
        write(tmp_path / "voxforge" / speaker / "etc" / "prompts-original", "".join(lines))
    expected = [f"{speaker}{text}" for speaker in ("ralf", "timo") for text in TEXTS]
    assert [text for text, *_ in opened(tmp_path / "voxforge")] == expected


def test_configurations_are_named_where_one_has_to_be_chosen(tmp_path):
    for language in ("de", "en"):
        write_parquet(tmp_path / language / "train-00000-of-00001.parquet", audio=embedded(2), text=TEXTS[:2])
    configs = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in ("de", "en")]
    write(tmp_path / "README.md", f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert refusal(opened, tmp_path).endswith("Config name is missing. Name one of its configurations: ['de', 'en']")
    shutil.rmtree(tmp_path / "de")
    line = refusal(open_dataset, str(tmp_path), "en", "train", "audio")
    assert "If its README.md names files that are not there, name the directory of those that are" in line
    assert len(opened(tmp_path / "en", text="text")) == 2


def test_raw_samples_are_told_to_need_a_header(tmp_path):
    write(tmp_path / "a.pcm", bytes(1000))
    assert "Raw samples (.pcm) need a header first, for example by ffmpeg -f s16le" in refusal(opened, tmp_path)


def test_a_list_without_a_header_may_have_ids_and_commas_in_its_texts(tmp_path):
    write_clips(tmp_path)
    texts = ["Leeds, York or Hull?", *TEXTS[1:]]
    lines = [f"EN{number}, clip{number}, {text}\n" for number, text in enumerate(texts)]
    write(tmp_path / "line_index.csv", "".join(lines))
    assert [text for text, *_ in opened(tmp_path)] == texts


def test_the_pinyin_of_aishell_3_is_left_out(tmp_path):
    write_clips(tmp_path, ["a.wav", "b.wav", "c.wav"])
    lines = ["a.wav\t广 guang3 州 zhou1 女 nv3", "b.wav\tgo take5 me be2 you", "c.wav\t玩 wan2 儿 er5 "]
    write(tmp_path / "content.txt", "\n".join(lines))
    assert [text for text, *_ in opened(tmp_path)] == ["广州女", "go take5 me be2 you", "玩儿"]


def test_texts_in_zips_beside_audio_are_not_taken_for_audio(tmp_path, caplog):
    write_clips(tmp_path / "day1", NAMES[:2])
    with zipfile.ZipFile(tmp_path / "day2.zip", "w") as file:
        for number in (2, 3):
            file.writestr(f"day2/{NAMES[number]}", clip(number))
            file.writestr(f"day2/clip{number}.txt", TEXTS[number])
    assert [row[1:] for row in opened(tmp_path)] == [row[1:] for row in WHOLE[:4]]
    assert "left out: 2 files in archives, such as zip://day2/clip2.txt::" in caplog.text
    assert "unpack the archive, if they have the clips' texts" in caplog.text


@pytest.mark.parametrize("readme", [None, "# Speech Commands\n", "---\nlicense: mit\n---\nconfigs:\n"])
def test_lists_of_splits_make_no_splits_of_an_audio_folder_whatever_its_readme_says(readme, tmp_path):
    write_clips(tmp_path / "yes", NAMES[:2])
    write_clips(tmp_path / "no", NAMES[2:])
    for name in ("testing_list.txt", "validation_list.txt"):
        write(tmp_path / name, f"yes/{NAMES[0]}\n")
    if readme:
        write(tmp_path / "README.md", readme)
    assert Counter(text for text, *_ in opened(tmp_path, text="label")) == {"yes": 2, "no": 4}


def test_texts_of_names_that_several_clips_have_are_counted(tmp_path, caplog):
    for take in ("take1", "take2"):
        write_clips(tmp_path / "wav" / take)
    write(tmp_path / "台本" / "本編" / "list.txt", "".join(f"{stem}:{text}\n" for stem, text in STEMS))
    assert [text for text, *_ in opened(tmp_path)] == [None] * 2 * len(NAMES)
    said = "left out: 6 texts of names that several clips have, such as clip0: name the directory of those to read"
    assert said in caplog.text
    shutil.rmtree(tmp_path / "wav" / "take2")
    caplog.clear()
    assert opened(tmp_path) == WHOLE
    assert "left out" not in caplog.text


def test_clips_with_several_texts_are_counted(tmp_path, caplog):
    write_clips(tmp_path)
    write(tmp_path / "a.txt", "".join(f"{stem}:{text}\n" for stem, text in STEMS))
    write(tmp_path / "b.txt", f"clip3:違う\n{STEMS[0][0]}:{STEMS[0][1]}\n")
    assert [text for text, *_ in opened(tmp_path)] == [*TEXTS[:3], None, *TEXTS[4:]]
    texts = sorted([TEXTS[3], "違う"])
    assert f"no text for 1 clips that have several, such as {tmp_path / NAMES[3]}: {texts}" in caplog.text


def test_a_label_track_of_audacity_is_named(tmp_path, caplog):
    write_clips(tmp_path)
    track = write(tmp_path / "ラベル 1.txt", "0.000000\t1.500000\tはい\n1.500000\t2.500000\tいいえ\n")
    opened(tmp_path, text=None)
    assert f"left out: 1 texts with times, such as {track}: cut the audio there" in caplog.text


@pytest.mark.parametrize("where", ["metadata.csv", "train/metadata.csv"])
def test_metadata_may_name_clips_of_other_directories_by_their_names_alone(where, tmp_path):
    write_clips(tmp_path / "train" / "佐藤", NAMES[:3])
    write_clips(tmp_path / "train" / "鈴木", NAMES)
    for name in NAMES[:3]:
        (tmp_path / "train" / "鈴木" / name).unlink()
    write_csv(tmp_path / where, [("file_name", "transcription"), *zip(NAMES, TEXTS, strict=True)])
    assert opened(tmp_path) == WHOLE


def test_metadata_of_clips_that_are_not_there_still_count_them(tmp_path):
    write_clips(tmp_path / "wavs")
    write_csv(tmp_path / "metadata.csv", [("file_name", "transcription"), ("lost.flac", "はい")])
    assert [(text, problem) for text, _, problem in opened(tmp_path)] == [
        ("はい", f"file not found: {tmp_path / 'lost.flac'}")
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_the_table_of_an_audio_folder_may_be_a_txt_file_with_tabs_also_of_excel(encoding, tmp_path):
    write_clips(tmp_path / "38_5716")
    rows = [("UtteranceID", "SpeakerID", "Transcription"), *((f"{stem}.flac", "38_5716", text) for stem, text in STEMS)]
    table = write(tmp_path / "TRANS.txt", "".join("\t".join(row) + "\r\n" for row in rows).encode(encoding))
    assert opened(tmp_path, text="Transcription") == WHOLE
    assert opened(table, text="Transcription") == WHOLE
    write(tmp_path / "labels.txt", "0.0\t1.5\tはい\n")
    place = run_short_form_eval.Place(str(tmp_path), is_confined=True)
    assert run_short_form_eval.find_tables([str(file) for file in tmp_path.rglob("*")], place) == [table]


def test_the_texts_of_thchs_30_are_read_without_their_pinyin(tmp_path):
    write_clips(tmp_path / "data")
    for name, text in zip(NAMES, TEXTS, strict=True):
        write(tmp_path / "data" / f"{name}.trn", f"{text}\nlv4 shi4\nl v4 sh ix4\n")
    assert opened(tmp_path) == WHOLE
    for name in NAMES:  # those of the split directories name the others
        write(tmp_path / "data" / f"{name}.trn", f"../data/{name}.trn\n")
    assert [text for text, *_ in opened(tmp_path)] == [None] * len(NAMES)


@pytest.mark.parametrize("names", [NAMES, [stem for stem, _ in STEMS]])
def test_a_json_file_may_map_names_of_clips_to_their_texts_or_to_objects(names, tmp_path):
    write_clips(tmp_path / "wavs")
    table = tmp_path / "texts.json"
    write(table, json.dumps(dict(zip(names, TEXTS, strict=True)), indent=1))
    assert opened(tmp_path) == WHOLE
    write(table, json.dumps({name: {"text": text} for name, text in zip(names, TEXTS, strict=True)}, indent=1))
    assert opened(tmp_path, text="text") == WHOLE


def test_the_rows_of_a_json_file_may_be_the_only_list_in_its_object(tmp_path):
    write_clips(tmp_path / "wavs")
    rows = [{"audio": f"wavs/{name}", "sentence": text} for name, text in zip(NAMES, TEXTS, strict=True)]
    table = write(tmp_path / "dataset.json", json.dumps({"version": 1, "tags": [], "data": rows}, indent=1))
    assert opened(tmp_path, text="sentence") == WHOLE
    assert opened(table, text="sentence") == WHOLE
    write(table, json.dumps(rows[0]))
    assert opened(table, text="sentence") == WHOLE[:1]


def test_the_directory_and_the_name_of_a_file_may_stand_in_two_columns_of_a_table(tmp_path):
    rows = [("番号", "フォルダ", "ファイル", "transcription")]
    for speaker in ("佐藤", "鈴木"):
        write_clips(tmp_path / speaker)
        rows += [(number, speaker, name, f"{speaker}{number}") for number, name in enumerate(NAMES)]
    (tmp_path / "鈴木" / NAMES[5]).unlink()  # so that the name alone tells one clip
    rows.pop()
    write_csv(tmp_path / "録音.csv", rows)
    assert [text for text, *_ in opened(tmp_path)] == [text for *_, text in rows[1:]]


def test_the_column_of_a_table_that_names_the_most_clips_names_them(tmp_path):
    write_clips(tmp_path)
    write_csv(tmp_path / "list.csv", [("first", "file", "transcription"), *(("clip0", *row) for row in STEMS)])
    assert opened(tmp_path) == WHOLE


def test_the_audio_of_a_json_file_in_an_audio_folder_may_be_an_object_with_a_path(tmp_path):
    write_clips(tmp_path / "audio" / "train")
    paths = [{"path": f"dataset/audio/train/{name}"} for name in NAMES]
    rows = [{"audio": path, "sentence": text} for path, text in zip(paths, TEXTS, strict=True)]
    write(tmp_path / "train.json", "".join(json.dumps(row) + "\n" for row in rows))
    assert opened(tmp_path, text="sentence") == WHOLE


def test_all_files_that_whisper_writes_of_a_clip_have_one_text(tmp_path, caplog):
    write_clips(tmp_path)
    for stem, text in STEMS:
        lines = [text, "はい。"]
        write(tmp_path / f"{stem}.txt", "\n".join(lines) + "\n")
        write(tmp_path / f"{stem}.json", json.dumps({"text": "".join(lines), "segments": [{"text": text}]}))
        cues = [f"{number}\n00:00:00,000 --> 00:00:01,000\n{line}\n\n" for number, line in enumerate(lines, 1)]
        write(tmp_path / f"{stem}.srt", "".join(cues))
        write(tmp_path / f"{stem}.tsv", f"start\tend\ttext\n0\t1000\t{text}\n")
    assert [text for text, *_ in opened(tmp_path)] == [f"{text}はい。" for text in TEXTS]
    assert "left out" not in caplog.text and "several" not in caplog.text
    for stem, _ in STEMS:
        (tmp_path / f"{stem}.json").unlink()
    assert [text for text, *_ in opened(tmp_path)] == [f"{text} はい。" for text in TEXTS]


def test_a_list_with_bars_may_have_commas_in_its_texts_whatever_its_suffix(tmp_path):
    write_clips(tmp_path)
    texts = ["Mist, wieder nichts.", *TEXTS[1:]]
    lines = [f"{stem}|{text}\n" for (stem, _), text in zip(STEMS, texts, strict=True)]
    write(tmp_path / "thorsten-metadata.csv", "".join(lines))
    assert [text for text, *_ in opened(tmp_path)] == texts


def test_hidden_files_are_no_tables(tmp_path):
    table = write(tmp_path / "list.csv", "path,text\n")
    write(tmp_path / "._list.csv", b"\0\5\x16\7")
    place = run_short_form_eval.Place(str(tmp_path), is_confined=True)
    assert run_short_form_eval.find_tables([], place) == [table]


@pytest.mark.parametrize("separator", ["：", "\u3000", "、", ". ", "．　", "\t", " ", ":", ": "])
def test_names_and_texts_of_a_list_are_parted_as_people_type_them(separator, tmp_path):
    for number in (1, 2, 3):
        write(tmp_path / "五月七日" / f"{number:03d}.flac", clip(number))
    texts = ["本日の会議は、午後三時：からです。", "Yes. No", "はい"]
    lines = [f"{number:03d}{separator}{text}\r\n" for number, text in enumerate(texts, 1)]
    write(tmp_path / "五月七日" / "原稿.txt", "".join(lines).encode("utf-8-sig"))
    assert [text for text, *_ in opened(tmp_path)] == texts


def test_the_raw_texts_of_fleurs_are_read(tmp_path):
    for split in ("train", "dev"):
        write_clips(tmp_path / "audio" / split)
        write(tmp_path / "audio" / f"{split}.tar.gz", "packed")
        lines = []
        for number, name in enumerate(NAMES):
            wav = f"{split}{number}.wav"
            (tmp_path / "audio" / split / name).rename(tmp_path / "audio" / split / wav)
            lines.append(f'{number}\t{wav}\t"{split}" {number}\tplain\tp l a i n |\t8000\tFEMALE\n')
        write(tmp_path / f"{split}.tsv", "".join(lines))
    assert [text for text, *_ in opened(tmp_path)] == [f'"train" {number}' for number in range(len(NAMES))]


@pytest.mark.parametrize("name", ["台本.xlsx", "clips/a.xml", "script.txt"])
def test_texts_that_are_not_read_stop_labelling_without_a_text_column(name, tiny_teacher, tmp_path):
    data = write_clips(tmp_path / "data" / "clips").parent
    write(data / "README.txt", "about")
    file = write(data / name, "そのほか")
    line = refusal(label, tiny_teacher, data, tmp_path / "labels", *SHORT)
    assert (
        f"1 files beside the audio in {data} are not read, such as {file}. If one has the clips' texts, write them into"
        in line
    )
    label(tiny_teacher, data, tmp_path / "labels", *SHORT, "--text_column_name", "none")


def test_an_archive_that_is_unpacked_is_not_to_be_unpacked(tmp_path):
    rows, _ = open_dataset(str(write_clips(tmp_path / "data" / "train").parent), None, "train", "audio")
    write(tmp_path / "data" / "train.tar.gz", "packed")
    said = refusal(require_columns, str(tmp_path / "data"), rows, {"text_column_name": "text"})
    assert "Unpack" not in said and "metadata.csv" in said


@pytest.mark.parametrize("name", ["clip.wav", "train.parquet"])
def test_a_pointer_of_git_lfs_is_called_one(name, tiny_teacher, tmp_path):
    write(tmp_path / "data" / name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    said = refusal(label, tiny_teacher, tmp_path / "data", tmp_path / "labels", *SHORT)
    if name == "clip.wav":
        assert "none of the 1 clips could be labelled" in said
        assert opened(tmp_path / "data") == [(None, 0.0, f"no audio, but {run_short_form_eval.GET_LFS_FILES}")]
    else:
        assert said.endswith(f"{name} is {run_short_form_eval.GET_LFS_FILES}")


TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "sentence"
        intervals [1]:
            xmin = 0
            xmax = 0.1
            text = ""
        intervals [2]:
            xmin = 0.1
            xmax = 0.4
            text = "%s"
"""


@pytest.mark.parametrize(
    ("suffix", "form"),
    [
        (".TextGrid", TEXTGRID),
        (".srt", "1\n00:00:00,000 --> 00:00:00,500\n%s\n\n"),
        (".vtt", "WEBVTT\n\n00:00.0 --> 1\n%s"),
    ],
)
def test_the_only_text_in_a_file_of_texts_with_times_is_that_of_its_clip(suffix, form, tmp_path, caplog):
    write_clips(tmp_path)
    for stem, text in STEMS:
        write(tmp_path / f"{stem}{suffix}", (form % text).encode("utf-16"))
    assert opened(tmp_path) == WHOLE
    assert "left out" not in caplog.text
    write(tmp_path / f"clip0{suffix}", form % "はい" + form % "いいえ")
    assert [text for text, *_ in opened(tmp_path)] == [None, *TEXTS[1:]]
    assert f"left out: 6 texts with times, such as {tmp_path}" in caplog.text


def test_a_column_of_splits_is_named(tmp_path, caplog):
    write_clips(tmp_path / "audios")
    rows = [(f"audios/{name}", text, "train") for name, text in zip(NAMES, TEXTS, strict=True)]
    table = write_csv(tmp_path / "corpus.csv", [("audio_file", "transcription", "split"), *rows])
    assert opened(tmp_path) == opened(table) == WHOLE
    assert "several splits" not in caplog.text
    write_csv(tmp_path / "corpus.csv", [("audio_file", "transcription", "split"), *rows[1:], (*rows[0][:2], "test")])
    assert len(opened(tmp_path)) == len(opened(table)) == len(WHOLE)
    said = f"have several splits in a column, and all are read: {['train', 'test']}"
    assert f"the rows of {tmp_path} {said}" in caplog.text and f"the rows of {table} {said}" in caplog.text


def test_a_manifest_of_sagemaker_is_read(tmp_path):
    write_clips(tmp_path / "audio")
    rows = [{"source-ref": f"s3://b/{name}", "said": text} for name, text in zip(NAMES, TEXTS, strict=True)]
    write(tmp_path / "output.manifest", "".join(json.dumps(row) + "\n" for row in rows))
    assert opened(tmp_path, text="said") == WHOLE


def test_where_a_column_is_missing_only_files_are_named_that_can_have_it(tmp_path):
    rows, _ = open_dataset(str(write_clips(tmp_path / "clips").parent), None, "train", "audio")
    columns = {"text_column_name": "text"}

    def hint() -> str:
        return refusal(require_columns, str(tmp_path), rows, columns).partition("it has audio. ")[2]

    write(tmp_path / "cuts.jsonl.gz", "x")
    write(tmp_path / "odd.csv", "text\n1,2\n")
    write(tmp_path / "job.json", json.dumps({"results": {"text": "はい"}}))
    assert hint() == f"Write it into {tmp_path / 'metadata.csv'}, with the columns file_name and text"
    write(tmp_path / "~$sheet.xlsx", "x")
    sheet = write(tmp_path / "sheet.xlsx", "x")
    assert hint() == f"Save a spreadsheet as CSV (UTF-8), if {sheet} has the texts"
    table = write(tmp_path / "sheet.csv", "ファイル,text\nx,東京\n".encode("cp932"))
    assert hint().startswith(f"{table} is not UTF-8 (") and "iconv" in hint()
    archive = write(tmp_path / "a.tar.gz", "x")
    assert hint() == f"Unpack {archive}, if the texts lie in it"
    assert "Save a spreadsheet as CSV (UTF-8)" in refusal(opened, sheet)


# ---- parquet, tars and manifests -------------------------------------------------------------------------------------


def test_a_webdataset_is_read_without_torchcodec(tiny_teacher, tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train-000.tar", "w") as archive:
        for number, text in enumerate(TEXTS):
            for suffix, content in (("flac", clip(number)), ("txt", text.encode())):
                member = tarfile.TarInfo(f"clip{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert opened(tmp_path / "tars", text="txt") == opened(tmp_path / "tars", text="txt", streaming=True) == WHOLE
    flags = ("--audio_column_name", "flac", "--text_column_name", "txt")
    found = read_rows(label(tiny_teacher, tmp_path / "tars", tmp_path / "labels", *SHORT, *flags))
    assert [(row["flac"]["bytes"], row["txt"]) for row in found] == [(clip(n), text) for n, text in enumerate(TEXTS)]


def test_texts_in_the_json_of_a_webdataset_are_read(tmp_path):
    with tarfile.open(tmp_path / "JA-000000.tar", "w") as archive:
        for number, text in enumerate(TEXTS):
            row = {"text": text, "audio": "x.wav", "json": "x", "duration": 1.5}
            for suffix, content in (("flac", clip(number)), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"clip{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert opened(tmp_path, text="text") == WHOLE
    columns = open_dataset(str(tmp_path), None, "train", "audio")[0].column_names
    assert columns == ["audio", "json", "__key__", "duration", "text"]


def test_paths_in_parquet_are_relative_to_the_dataset(tiny_teacher, tmp_path):
    root = tmp_path / "paths"
    write_clips(root / "clips")
    paths = [*(f"clips/{name}" for name in NAMES), "clips/gone.flac"]
    write_parquet(root / "data" / "train-00000-of-00001.parquet", audio=paths, transcription=[*TEXTS, "x"])
    assert opened(root) == [*WHOLE, ("x", 0.0, "file not found: clips/gone.flac")]
    labels = [make_label(tiny_teacher, "東京")] * 7
    columns = {"audio": paths, "transcription": [*TEXTS, "x"], "whisper_transcript": labels}
    write_parquet(root / "data" / "train-00000-of-00001.parquet", **columns)
    filter_clips(tiny_teacher, root, "--wer_threshold", 1e9, "--timestamp_probability", 0)
    assert [row["audio"]["bytes"] for row in read_rows(tmp_path / "paths.wer_1000000000.0")] == [*map(clip, range(6))]


BUILDER = """
import datasets


class Speech(datasets.GeneratorBasedBuilder):
    def _info(self):
        features = datasets.Features(audio=datasets.Audio(), transcription=datasets.Value("string"))
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator("train")]

    def _generate_examples(self):
        for number, text in enumerate(TEXTS):
            with open(f"CLIPS/clip{number}.flac", "rb") as file:
                yield number, {"audio": file.read(), "transcription": text}
"""


def test_a_builder_may_give_its_audio_as_plain_bytes(tmp_path):
    code = BUILDER.replace("TEXTS", repr(TEXTS)).replace("CLIPS", str(write_clips(tmp_path / "clips")))
    assert opened(write(tmp_path / "speech_in_bytes.py", code)) == WHOLE


def test_a_python_file_without_a_builder_is_one_line(tmp_path):
    path = write(tmp_path / "no_builder.py", "TEXTS = []\n")
    assert refusal(opened, path).endswith(f"--dataset_name {path} must define a datasets.DatasetBuilder")


def test_a_column_of_nothing_is_a_column_of_texts_that_are_missing(tmp_path, caplog):
    write_parquet(tmp_path / "data" / "train.parquet", audio=pa.array(embedded()), transcription=pa.nulls(len(TEXTS)))
    assert opened(tmp_path / "data") == [(None, *heard) for _, *heard in WHOLE]
    assert f"6 of 6 rows of {tmp_path / 'data'} have no transcription" in caplog.text


@pytest.mark.parametrize("name", ["take [1]", "take*", "tak? 1"])
def test_a_directory_whose_name_is_a_pattern_to_datasets_is_to_be_renamed(name, tmp_path, monkeypatch):
    for root in (tmp_path / name, tmp_path / "take 1"):  # the second of which fits the pattern
        write_csv(write_clips(root) / "metadata.csv", [("file_name", "transcription"), *zip(NAMES, TEXTS, strict=True)])
    said = f"`datasets` takes the characters *, ? and [ of a path for a pattern: rename the directory {tmp_path / name}"
    assert refusal(opened, tmp_path / name).endswith(said)
    monkeypatch.chdir(tmp_path / name)
    assert refusal(opened, Path(".")).endswith(said)
    assert opened(tmp_path / "take 1") == WHOLE


def test_two_exports_make_up_a_split(tmp_path):
    for part in ("a", "b"):
        write_parquet(tmp_path / part / "train-00000-of-00001.parquet", audio=embedded(), transcription=TEXTS)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ['a/*', 'b/*']\n---\n"
    write(tmp_path / "README.md", card)
    assert opened(tmp_path) == WHOLE + WHOLE


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001-0123456789abcdef.parquet", "train-00001-of-00002-fedcba9876543210.parquet"),
        ("old-train-00000-of-00001.parquet", "new-train-00000-of-00001.parquet"),
        ("train_a.parquet", "train_b.parquet"),
        ("train-00000-of-00009.parquet", "train-00007-of-00009.parquet"),
    ],
)
def test_other_people_s_shards_are_read_under_any_name(names, tmp_path):
    for name in names:
        write_parquet(tmp_path / name, audio=embedded(), transcription=TEXTS)
    assert sorted(opened(tmp_path)) == sorted(WHOLE + WHOLE)


def test_a_shard_of_ours_that_is_missing_is_an_error(tiny_teacher, tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", audio=embedded(), transcription=TEXTS)
    labels = label(tiny_teacher, tmp_path / "data", tmp_path / "labels", *SHORT, "--shard_size", 3)
    (labels / "default" / "train-00001-of-00002.parquet").unlink()
    assert "has 1 of 2 shards of train" in refusal(opened, labels)
    assert "has 1 of 2 shards of train" in refusal(filter_clips, tiny_teacher, labels)


def test_what_save_to_disk_has_written_is_read(tiny_teacher, tmp_path):
    label_ids = [make_label(tiny_teacher, "東京")] * len(TEXTS)
    rows = Dataset.from_dict({"audio": embedded(), "transcription": TEXTS, "whisper_transcript": label_ids})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    assert opened(tmp_path / "one") == opened(tmp_path / "two") == opened(tmp_path / "one", streaming=True) == WHOLE
    assert opened(tmp_path / "two", "test+train[:1]") == 2 * WHOLE[:1]
    filter_clips(tiny_teacher, tmp_path / "two", "--wer_threshold", 1e9, "--skip_logmel")
    assert len(read_rows(tmp_path / "two.wer_1000000000.0")) == len(TEXTS)


def test_a_table_without_splits_is_one_split_of_any_name(tmp_path):
    rows = [("audio", "transcription"), *zip(NAMES, TEXTS, strict=True)]
    table = write_csv(write_clips(tmp_path / "files") / "clips.csv", rows)
    Dataset.from_dict({"audio": embedded(), "transcription": TEXTS}).save_to_disk(tmp_path / "saved")
    for dataset in (table, tmp_path / "saved"):
        assert opened(dataset, "any[:1]+any[5:]") == [WHOLE[0], WHOLE[5]]
        assert "train+test" in (line := refusal(opened, dataset, "train+test"))  # which would be the same rows twice
        assert line.endswith("its rows are those of one split")


@pytest.mark.parametrize(
    ("kind", "lists", "said"),
    [("zip", 1, "Unpack {}.zip"), ("gztar", 1, "Unpack {}.tar.gz"), ("zip", 9, "unpack an archive of both")],
)
def test_an_archive_of_audio_and_lists_of_texts_is_to_be_unpacked(kind, lists, said, tiny_teacher, tmp_path):
    write_clips(tmp_path / "corpus")
    for number in range(lists):
        write(tmp_path / "corpus" / f"list{number}.txt", f"clip0 {TEXTS[0]}\n")
    (tmp_path / "data").mkdir()
    shutil.make_archive(tmp_path / "data" / "corpus", kind, tmp_path, "corpus")
    line = refusal(score, tiny_teacher, tmp_path / "data", tmp_path / "out")
    assert said.format(tmp_path / "data" / "corpus") in line


def test_columns_of_samples_are_read(tmp_path):
    samples = np.sin(np.arange(8000) / 20).astype(np.float32)
    audio = [{"array": samples.tolist(), "sampling_rate": 16_000}, {"array": samples.tolist(), "sampling_rate": 8_000}]
    write_parquet(tmp_path / "train.parquet", audio=audio, transcription=TEXTS[:2])
    assert opened(tmp_path) == opened(tmp_path, streaming=True) == [(TEXTS[0], 0.5, None), (TEXTS[1], 1.0, None)]
    rows, place = open_dataset(str(tmp_path), None, "train", "audio")
    np.testing.assert_array_equal(load_clip(rows[0]["audio"], place).waveform, samples)
    write_parquet(tmp_path / "train.parquet", audio=[samples.tolist()], transcription=TEXTS[:1])
    assert "audio has samples without their rate" in refusal(opened, tmp_path)


NOT_TEXT = {
    "int64": pa.array([7, 14]),
    "list": pa.array([["はい"], ["いいえ"]]),
    "struct": pa.array([{"text": "はい"}, {"text": "いいえ"}]),
    "binary": pa.array(["はい".encode("cp932")] * 2),
    "UTF-8": pa.array(["はい".encode("cp932")] * 2).view(pa.string()),
}


@pytest.mark.parametrize("kind", NOT_TEXT)
def test_a_text_column_that_is_not_text_is_one_line_before_any_work_in_every_stage(
    kind, student, tiny_teacher, tmp_path
):
    root = tmp_path / "data"
    labels = [make_label(tiny_teacher, "東京")] * 2
    columns = {"audio": embedded(2), "transcription": NOT_TEXT[kind], "whisper_transcript": labels}
    write_parquet(root / "train.parquet", **columns)
    output = tmp_path / "out"
    lines = [
        refusal(label, tiny_teacher, root, output, "--text_column_name", "transcription"),
        refusal(filter_clips, tiny_teacher, root, "--output_dir", output),
        refusal(hold_out, student, tiny_teacher, root, output),
        refusal(score, tiny_teacher, root, output),
    ]
    assert all("'transcription' (--text_column_name)" in line and kind in line for line in lines)
    assert not [path for path in output.rglob("*") if path.suffix in (".parquet", ".csv", ".jsonl")]


def test_a_csv_row_with_too_many_or_too_few_cells_is_an_error_with_its_line(tiny_teacher, tmp_path):
    write_clips(tmp_path)
    table = write(tmp_path / "list.csv", 'audio,transcription\nclip0.flac,"西\n日"\nclip1.flac,コンマ,です\n')
    assert f"{table}, line 4" in refusal(score, tiny_teacher, table, tmp_path / "out")
    write(table, "audio,transcription\nclip0.flac\n")
    assert f"{table}, line 2" in refusal(label, tiny_teacher, table, tmp_path / "out")
    folder = write_clips(tmp_path / "folder")
    write(folder / "metadata.csv", "file_name,transcription\nclip0.flac,コンマ,です\nclip1.flac,はい,です\n")
    assert "metadata.csv, line 2" in refusal(label, tiny_teacher, folder, tmp_path / "out")


def test_rows_without_a_text_are_counted_and_the_others_scored(tiny_teacher, tmp_path, caplog):
    write_clips(tmp_path)
    rows = [{"audio": name, **({"transcription": TEXTS[n]} if n else {})} for n, name in enumerate(NAMES)]
    table = write(tmp_path / "list.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    output = score(tiny_teacher, table, tmp_path / "out")
    assert f"1 of 6 rows of {table} have no transcription" in caplog.text
    assert [row["problem"] for row in read_predictions(output)] == ["no reference", *[""] * 5]
    assert read_metrics(output)["clips"] == 5


MANIFESTS = {
    "list.csv": "path;transcription\n{root}/wavs/clip0.flac;はい, そう\nwavs\\clip1.flac;007\n",
    "list.tsv": 'x\tpath\ttranscription\na\twavs/clip0.flac\t"はい\nb\twavs/clip1.flac\t007\n',
    "list.json": '{{"audio_filepath": "wavs/clip0.flac", "transcription": "はい", "duration": 9}}\n'
    '{{"audio_filepath": "wavs/clip1.flac", "transcription": "007", "duration": 9}}\n',
    "excel.csv": "\ufeffpath;transcription;;\r\nwavs\\clip0.flac;はい, そう;;\r\nwavs\\clip1.flac;007;;\r\n;;;\r\n",
    "pandas.csv": ",path,transcription\n0,wavs/clip0.flac,はい\n1,wavs/clip1.flac,007\n",
    "rows.json": '[{{"audio": "wavs/clip0.flac", "transcription": "はい"}},\n'
    '{{"audio": "wavs/clip1.flac", "transcription": "007"}}]',
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_as_people_write_them_are_read(name, tmp_path):
    write_clips(tmp_path / "wavs")
    table = write(tmp_path / name, MANIFESTS[name].format(root=tmp_path))
    first, second = opened(table)
    assert first[0] in ("はい", "はい, そう", '"はい') and first[1:] == (0.5, None)
    assert second == ("007", 0.6, None)
    assert opened(table, "train[1:]") == [second]


@pytest.mark.parametrize(("column", "directory"), [("path", "clips"), ("audio_file", "audios")])
def test_the_tables_of_common_voice_name_files_in_a_directory_beside_them(column, directory, tmp_path):
    write_clips(tmp_path / directory)
    rows = [(column, "sentence"), *zip(NAMES, TEXTS, strict=True)]
    assert opened(write_csv(tmp_path / "TRAIN.TSV", rows, delimiter="\t"), text="sentence") == WHOLE


@pytest.mark.parametrize("directory", ["audio", "wavs", "wav"])
def test_a_table_may_name_files_in_the_usual_directory_beside_it_in_a_column_of_any_name(directory, tmp_path):
    write_clips(tmp_path / directory)
    rows = [
        ("ファイル名", "transcription", "話者"),
        *((name, text, "佐藤") for name, text in zip(NAMES, TEXTS, strict=True)),
    ]
    assert opened(write_csv(tmp_path / "list.csv", rows)) == WHOLE


@pytest.mark.parametrize("directory", ["here", "here/wavs"])
def test_a_table_may_name_clips_without_their_suffix(directory, tmp_path):
    write_clips(tmp_path / directory, [f"utt.{number}.flac" for number in range(len(NAMES))])
    rows = [("path", "transcription"), *((f"utt.{number}", text) for number, text in enumerate(TEXTS))]
    assert opened(write_csv(tmp_path / "here" / "list.csv", rows)) == WHOLE


def test_metadata_may_name_clips_without_their_suffix(tmp_path, caplog):
    for split in ("train", "test"):
        write_clips(tmp_path / split)
        write_csv(tmp_path / split / "metadata.csv", [("file_name", "transcription"), *STEMS])
    assert opened(tmp_path) == WHOLE
    (tmp_path / "train" / "metadata.csv").unlink()
    (tmp_path / "test" / "metadata.csv").unlink()
    rows = [*((f"train/{stem}", text) for stem, text in STEMS), *((f"test/{stem}", text) for stem, text in STEMS[:2])]
    write_csv(tmp_path / "metadata.csv", [("file_name", "transcription"), *rows])
    assert "left out" not in caplog.text
    assert opened(tmp_path) == WHOLE
    assert opened(tmp_path, "test") == WHOLE[:2]
    assert "left out: 4 audio files that no row of the metadata names" in caplog.text


def test_a_table_with_two_columns_of_audio_leaves_the_choice_to_the_flag(tiny_teacher, tmp_path):
    table = write_csv(tmp_path / "list.csv", [("mic", "phone", "text"), *((name, name, "はい") for name in NAMES)])
    assert "it has mic, phone, text" in refusal(label, tiny_teacher, table, tmp_path / "out")


def test_a_table_tells_from_where_its_paths_count(tmp_path):
    rows = [("path", "transcription"), ("nowhere.flac", TEXTS[0]), ("/gone.flac", TEXTS[1])]
    table = write_csv(write_clips(tmp_path / "recordings").parent / "list.csv", rows)
    said = [f"file not found: nowhere.flac (paths count from {tmp_path})", "file not found: /gone.flac"]
    assert [problem for *_, problem in opened(table)] == said


def test_a_table_without_a_header_is_one_line(tmp_path):
    table = write_csv(write_clips(tmp_path) / "list.tsv", zip(NAMES, TEXTS, strict=True), delimiter="\t")
    assert "its first line has to name the columns, such as path and text" in refusal(opened, table)


@pytest.mark.parametrize("name", ["data/clips.csv", "data/wav.scp"])
def test_a_model_is_trained_on_a_table_and_its_card_names_no_dataset_of_the_hub(name, student, tmp_path, monkeypatch):
    monkeypatch.chdir(write_clips(tmp_path))
    write_csv(tmp_path / "data" / "clips.csv", [("audio", "text"), *((f"../{n}", TEXTS[0]) for n in NAMES)])
    write(tmp_path / "data" / "wav.scp", "".join(f"{n} {tmp_path / n}\n" for n in NAMES))
    write(tmp_path / "data" / "text", "".join(f"{n} {TEXTS[0]}\n" for n in NAMES))
    output = fine_tune(student, name, tmp_path / "out")
    assert "datasets: []" in (output / "README.md").read_text()
    assert run_short_form_eval.is_hub_id("org/name") and not run_short_form_eval.is_hub_id(name)


def test_a_model_is_not_trained_where_no_clip_can_be_read(student, tmp_path):
    rows = [("audio", "text"), *((f"C:\\speech\\{name}", TEXTS[0]) for name in NAMES)]
    table = write_csv(tmp_path / "clips.csv", rows)
    line = refusal(fine_tune, student, table, tmp_path / "out")
    assert f"none of the 6 rows of {table} (train) can be used: file not found: C:\\speech\\clip0.flac (" in line
    write(tmp_path / "C:\\speech\\clip3.flac", clip(3))
    fine_tune(student, table, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("audio,transcription\nx.wav,東京\n".encode("cp932"), "not UTF-8"),
        (b"audio,a b,a b\n", "has two columns 'a b': does its first line name the columns?"),
        ("audio,transcription,\nx.wav,東,京\n".encode(), "has cells in column 3, which the header does not name"),
        (b'{"audio": "a.wav", "text": "x", "offset": 3.0}', "parts of recordings"),
        (b"[1, 2]", "an object for each row"),
        (b"", "an object for each row"),
        (b'{"audio": 1', "list.json"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_one_line(content, said, tmp_path):
    table = write(tmp_path / ("list.csv" if content.startswith(b"audio") else "list.json"), content)
    assert said in refusal(opened, table)


@pytest.mark.parametrize("content", ["", "\n", ",,\n"])
def test_a_table_of_no_cells_is_one_line(content, tmp_path):
    table = write(tmp_path / "list.csv", content)
    assert refusal(opened, table).endswith(f"{table} is empty")


def test_a_table_may_name_clips_by_their_urls(tmp_path):
    write_clips(tmp_path / "elsewhere")
    rows = [(f"file://{tmp_path}/elsewhere/{name}", text) for name, text in zip(NAMES, TEXTS, strict=True)]
    rows.append((f"file://{tmp_path}/gone.flac", "x"))
    table = write_csv(tmp_path / "list.csv", [("path", "transcription"), *rows])
    assert opened(table) == [*WHOLE, ("x", 0.0, f"file not found: file://{tmp_path}/gone.flac")]


def test_a_directory_whose_table_is_not_metadata_tells_to_name_the_table(tiny_teacher, tmp_path):
    write_clips(tmp_path / "data" / "wavs")
    write_csv(tmp_path / "data" / "test.csv", [("audio", "transcription"), (f"wavs/{NAMES[0]}", "はい")])
    line = refusal(label, tiny_teacher, tmp_path / "data", tmp_path / "out", "--text_column_name", "transcription")
    assert f"Name a table instead of the directory: {tmp_path / 'data' / 'test.csv'}" in line


def test_only_tables_with_the_column_are_named_and_metadata_where_there_are_none(tmp_path):
    rows, _ = open_dataset(str(write_clips(tmp_path / "clips").parent), None, "train", "audio")
    columns = {"text_column_name": "sentence"}
    assert f"Write it into {tmp_path / 'metadata.csv'}" in refusal(require_columns, str(tmp_path), rows, columns)
    other = write(tmp_path / "clip_durations.tsv", "clip\tduration[ms]\nclip0.flac\t500\n")
    write(tmp_path / "clips" / "clip0.json", "{}")
    line = refusal(require_columns, str(tmp_path), rows, columns)
    assert line.endswith(f"name it instead of the directory, and its column by --text_column_name: {other}")
    write(tmp_path / "words.csv", "number,sentence\n1,はい\n")
    line = refusal(require_columns, str(tmp_path), rows, columns)
    assert line.endswith(
        f"{tmp_path / 'words.csv'} has it, but no paths of audio files: add them in a column file_name"
    )
    content = "path\tsentence\nclips/clip0.flac\tはい\n"
    tables = [write(tmp_path / name, content) for name in ("DEV.TSV", "train.tsv")]
    line = refusal(require_columns, str(tmp_path), rows, columns)
    assert line.endswith(f"Name a table instead of the directory: {tables[0]}, {tables[1]}")


def test_a_file_that_is_no_table_tells_what_to_name(tmp_path):
    table = write_parquet(tmp_path / "a.parquet", audio=embedded(), transcription=TEXTS)
    assert f"{table} is no dataset: name its directory" in refusal(opened, table)


# ---- data directories of Kaldi and ESPnet ----------------------------------------------------------------------------


def write_kaldi(root: Path, audio: Path, **changed: str) -> Path:
    """A data directory with the clips in the directory `audio`; `changed` are other paths by the clip's id."""
    write_clips(audio)
    paths = {f"utt{number}": audio / name for number, name in enumerate(NAMES)} | changed
    write(root / "wav.scp", "".join(f"{clip} {path}\n" for clip, path in paths.items()))
    write(root / "text", "".join(f"utt{number} {text}\n" for number, text in enumerate(TEXTS)))
    return root


def test_a_data_directory_of_kaldi_is_read_in_every_stage(student, tiny_teacher, tmp_path):
    root = write_kaldi(tmp_path / "data" / "train", tmp_path / "data" / "train" / "wavs")
    write(root / "utt2spk", "utt1 speaker B\nutt0 A\n")
    flags = (*SHORT, "--text_column_name", "transcription", "--id_column_name", "id")
    rows = read_rows(label(tiny_teacher, root, tmp_path / "labels", *flags))
    assert [row["audio"]["bytes"] for row in rows] == [*map(clip, range(6))]
    assert [(row["id"], row["transcription"]) for row in rows] == [(f"utt{n}", text) for n, text in enumerate(TEXTS)]
    assert [row["speaker"] for row in rows] == ["A", "speaker B", *[None] * 4]
    output = score(tiny_teacher, root, tmp_path / "eval", "--id_column_name", "id")
    assert [(row["id"], row["reference"]) for row in read_predictions(output)][1] == ("utt1", TEXTS[1])
    assert hold_out(student, tiny_teacher, root, tmp_path / "out") == 0
    assert "has no column 'whisper_transcript'; it has id, audio" in refusal(filter_clips, tiny_teacher, root)
    assert opened(root) == opened(root, streaming=True) == WHOLE
    (root / "text").unlink()
    assert open_dataset(str(root), None, "train[1:]", "audio")[0]["id"] == [f"utt{n}" for n in range(1, 6)]


def test_files_of_kaldi_may_have_tabs_spaces_line_ends_of_windows_and_no_text(tmp_path):
    write_clips(tmp_path, ["a b.flac", *NAMES[1:]])
    write(tmp_path / "wav.scp", "\ufeff1\ta b.flac\r\n2  clip1.flac \r\n\r\n3 clip2.flac\n4 gone.flac\n5")
    write(tmp_path / "text", "2\r\n1\t西 日本 \r\nx y\r\n")
    found = [("西 日本", 0.5, None), ("", 0.6, None), (None, 0.7, None)]
    assert opened(tmp_path) == [*found, (None, 0.0, "file not found: gone.flac"), (None, 0.0, "no audio")]


def test_paths_of_kaldi_count_inside_the_directory_and_elsewhere_where_wav_scp_itself_is_named(tmp_path, monkeypatch):
    root = write_kaldi(tmp_path / "data" / "train", tmp_path / "downloads")
    line = refusal(opened, root)
    assert line.endswith(f"files elsewhere ({tmp_path}/downloads/clip0.flac): name {root}/wav.scp to read them")
    assert opened(root / "wav.scp") == WHOLE
    monkeypatch.chdir(tmp_path)  # ESPnet's paths are relative to it
    write_kaldi(root, Path("downloads"))
    assert "files elsewhere (downloads/clip0.flac)" in refusal(opened, root)
    assert opened(Path("data/train/wav.scp")) == WHOLE
    assert opened(write_kaldi(root, Path("data/train/wavs"))) == WHOLE
    (root / "text").unlink()
    (root / "text").symlink_to(write(tmp_path / "secret", "utt0 a secret"))
    assert "not in the dataset: text" in refusal(opened, root)


@pytest.mark.parametrize("path", ["touch {} |", "| touch {}", "wavs/data.ark:17"])
def test_a_command_in_a_wav_scp_is_refused_before_any_work_in_every_stage_and_never_run(
    path, student, tiny_teacher, tmp_path
):
    made = tmp_path / "made"
    root = write_kaldi(tmp_path / "data", tmp_path / "data" / "wavs", utt3=path.format(made))
    lines = [
        refusal(label, tiny_teacher, root, tmp_path / "out"),
        refusal(filter_clips, tiny_teacher, root),
        refusal(hold_out, student, tiny_teacher, root, tmp_path / "out"),
        refusal(score, tiny_teacher, root, tmp_path / "out"),
        refusal(opened, root / "wav.scp"),
    ]
    assert all(path.format(made) in line and "make files of them first" in line for line in lines)
    assert not made.exists() and not list(tmp_path.glob("out/**/*.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("segments", "utt0-1 utt0 0.0 0.5\n", "parts of recordings (segments): make files of them first"),
        ("text", "utt0 a\nutt1 b\nutt0 c\n", "its file text has two lines for utt0"),
        ("text", "utt0 東京\n".encode("cp932"), "text is not UTF-8"),
    ],
)
def test_a_data_directory_of_kaldi_that_cannot_be_read_is_one_line(name, content, said, tmp_path):
    root = write_kaldi(tmp_path, tmp_path / "wavs")
    write(root / name, content)
    assert said in refusal(opened, root)


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_splits_are_named_as_datasets_writes_them_and_files_stay_sane(student, tiny_teacher, tmp_path):
    root = tmp_path / "data"
    for number, split in enumerate(("train.360", "test")):
        names = [f"{number}{number}", *TEXTS[1:]]
        write_parquet(root / f"{split}.parquet", audio=embedded(), transcription=names)
    lines = [f"  - split: {split}\n    path: {split}.parquet\n" for split in ("train.360", "test")]
    write(root / "README.md", f"---\nconfigs:\n- config_name: default\n  data_files:\n{''.join(lines)}---\n")
    for split, title in (
        ("train.360", "train.360"),
        ("train.360[:2]", "train.360.to_2"),
        ("train.360[50%:]+test", "train.360.50pct_to_and_test"),
    ):
        expected = opened(root, split)
        labels = label(tiny_teacher, root, tmp_path / "labels", *SHORT, "--dataset_split_name", split)
        assert [row["transcription"] for row in read_rows(labels, split=title)] == [text for text, *_ in expected]
        assert (labels / f"labelling.default.{title}.json").exists()
    assert len(expected) == 9
    assert [text for text, *_ in opened(labels, title)] == [text for text, *_ in expected]  # by the card's name
    flags = ("--split", "train.360.50pct_to_and_test[:4]", "--wer_threshold", 1e9, "--skip_logmel")
    filter_clips(tiny_teacher, labels, *flags, "--max_label_length", 20)
    found = read_rows(tmp_path / "labels.wer_1000000000.0", split="train.360.50pct_to_and_test.to_4")
    assert [row["text"] for row in found] == [text for text, *_ in expected[:4]]
    output = score(tiny_teacher, root, tmp_path / "eval", "--dataset_split_name", "test[1:3]")
    assert [row["reference"] for row in read_predictions(output, "test.1_to_3")] == TEXTS[1:3]
    assert hold_out(student, tiny_teacher, root, tmp_path / "out", "--eval_split_name", "train.360[:1]+test[:1]") == 0


def test_spaces_around_the_plus_of_a_split_expression_change_nothing(tmp_path):
    for number, split in enumerate(("train", "test")):
        write_parquet(tmp_path / f"{split}.parquet", audio=embedded(2), transcription=TEXTS[2 * number :][:2])
    assert [text for text, *_ in opened(tmp_path, "train + test[:1]")] == TEXTS[:3]
    assert split_title("train + test[:1]") == split_title("train+test[:1]")


@pytest.mark.parametrize("split", ["train[:0]", "train[:1%]", "train[50%:50%]"])
def test_a_part_of_a_split_that_holds_no_row_is_empty_and_not_the_whole(split, tmp_path):
    write_parquet(tmp_path / "train.parquet", audio=embedded(), transcription=TEXTS)
    assert opened(tmp_path, split) == []


def test_titles_of_split_expressions_are_names_of_splits_and_differ():
    expressions = ["train", "train.360", "a+b", "train[:10]", "train[10:]", "train[:10%]", "train[-10:]", "a[1:2]+b"]
    titles = [split_title(split) for split in expressions]
    assert len(set(titles)) == len(titles)
    assert all(re.fullmatch(r"\w+(\.\w+)*", title) for title in titles)


# ---- what decodes ----------------------------------------------------------------------------------------------------


def noise(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    samples = np.random.default_rng(0).standard_normal((round(seconds * rate), channels))
    return (0.2 * samples).astype(np.float32)


def without_mp3_header(samples: np.ndarray) -> bytes:
    """An MP3 of variable bit rate, without its first frame, which counts the others."""
    content = encoded(samples, format="MP3", bitrate_mode="VARIABLE", compression_level=0.0)
    return content[content.index(content[:2], 10) :]


def holed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(300) + content[middle + 300 :]


def with_size(content: bytes, size: int) -> bytes:
    """A WAV whose header claims another size."""
    return content[:4] + size.to_bytes(4, "little") + content[8:40] + size.to_bytes(4, "little") + content[44:]


QUIET_END = np.concatenate([noise(1), np.zeros((16_000 * 10, 1), np.float32)])


@pytest.mark.parametrize(
    ("content", "shortest", "longest"),
    [
        (encoded(noise(3), format="FLAC")[:-20_000], 1.0, 2.9),
        (encoded(noise(3), format="OGG")[:-5_000], 1.0, 2.9),
        (encoded(noise(3), format="OGG", subtype="OPUS"), 3, 3),
        (encoded(noise(3), format="MP3"), 3, 3),
        (holed(encoded(noise(3), format="MP3")), 2.5, 3),
        (without_mp3_header(QUIET_END), 11, 11.2),
        (without_mp3_header(QUIET_END[::-1]), 11, 11.2),
        (encoded(noise(3), format="WAV", subtype="FLOAT"), 3, 3),
        (encoded(noise(3), format="WAV", subtype="PCM_24"), 3, 3),
        (encoded(noise(3), format="WAV", subtype="ULAW"), 3, 3),
        (with_size(encoded(noise(3), format="WAV"), 0), 3, 3),
        (with_size(encoded(noise(3), format="WAV"), 0xFFFFFFFF), 3, 3),
        (encoded(noise(3, 8_000), 8_000, format="WAV"), 3, 3),
        (encoded(noise(3, 96_000, 6), 96_000, format="WAV"), 3, 3),
        (encoded(noise(31), format="FLAC"), 31, 31),
    ],
)
def test_the_decoded_length_is_the_length(content, shortest, longest):
    heard = decode_clip(content)
    assert heard.problem is None
    assert shortest <= heard.seconds <= longest
    assert len(heard.waveform) == min(heard.samples, 30 * 16_000)


def test_audio_that_soundfile_cannot_read_tells_how_to_convert_it():
    problem = decode_clip(b"\0\0\0\x20ftypM4A " + bytes(500)).problem
    assert "ffmpeg -i FILE -ar 16000 FILE.flac" in problem


@pytest.mark.parametrize("rate", [1_000, 1_000_000])
def test_the_lowest_and_the_highest_sampling_rate_are_heard_and_none_beyond(rate):
    assert decode_clip(encoded(noise(0.1, rate), rate, format="WAV")).seconds == 0.1
    beyond = rate - 1 if rate == 1_000 else rate + 1
    assert decode_clip(encoded(noise(0.1, beyond), beyond, format="WAV")).problem == f"a sampling rate of {beyond} Hz"


def make_zoo(root: Path, teacher: Path) -> tuple[Path, dict[str, str]]:
    """An audio folder of odd files with labels, and the problem of each file that cannot be used."""
    spoiled = noise(1)
    spoiled[100] = np.nan
    files = {
        "truncated.flac": encoded(noise(3), format="FLAC")[:-20_000],
        "opus.opus": encoded(noise(1), format="OGG", subtype="OPUS"),
        "vbr.mp3": without_mp3_header(QUIET_END),
        "holed.mp3": holed(encoded(noise(2), format="MP3")),
        "pipe.wav": with_size(encoded(noise(1), format="WAV"), 0),
        "SURROUND.WAV": encoded(noise(1, 48_000, 6), 48_000, format="WAV"),
        "telephone.wav": encoded(noise(1, 8_000), 8_000, format="WAV", subtype="ULAW"),
    }
    problems = {
        "torn.flac": (encoded(noise(3), format="FLAC")[:900], "undecodable audio: Error : flac decoder lost sync"),
        "apple.m4a": (b"\0\0\0\x20ftypM4A " + bytes(500), "undecodable audio: Format not recognised. Convert it"),
        "text.wav": (b"not audio at all", "undecodable audio: Format not recognised"),
        "infinite.wav": (encoded(spoiled, format="WAV", subtype="FLOAT"), "samples that are not finite numbers"),
        "silent.wav": (encoded(noise(0), format="WAV"), "zero length"),
        "slow.wav": (encoded(noise(1, 999), 999, format="WAV"), "a sampling rate of 999 Hz"),
        "empty.wav": (b"", "no audio"),
    }
    for name, content in [*files.items(), *((name, content) for name, (content, _) in problems.items())]:
        write(root / name, content)
    write(root.parent / "elsewhere.wav", encoded(noise(1), format="WAV"))
    (root / "link.wav").symlink_to(root.parent / "elsewhere.wav")
    os.mkfifo(root / "fifo.wav")
    expected = {name: problem for name, (_, problem) in problems.items()}
    expected |= {"gone.wav": "file not found", "link.wav": "not in the dataset", "fifo.wav": "not a regular file"}
    given = {"transcription": "東京", "whisper_transcript": make_label(teacher, "東京")}
    rows = [{"file_name": name, "name": name, **given} for name in [*files, *expected]]
    write(root / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return root, expected


def test_every_stage_leaves_out_the_same_clips_of_a_zoo_for_the_same_reasons(student, tiny_teacher, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    zoo, expected = make_zoo(tmp_path / "zoo", tiny_teacher)
    names = [json.loads(line)["name"] for line in (zoo / "metadata.jsonl").read_text().splitlines()]
    found = {}
    labels = label(tiny_teacher, zoo, tmp_path / "labels", *SHORT, "--id_column_name", "name")
    found["label"] = dict(json.loads((labels / "labelling.default.train.json").read_text())["unusable"])
    predictions = read_predictions(evaluate(tiny_teacher, zoo, tmp_path / "eval"))
    found["evaluate"] = {row["id"]: row["problem"] for row in predictions if row["problem"]}
    caplog.clear()
    filter_clips(tiny_teacher, zoo, "--wer_threshold", 1e9, "--timestamp_probability", 0)
    lines = re.findall(r"left out: (\S+) \((.*)\)", caplog.text)
    found["filter"] = dict(lines)
    report = json.loads((tmp_path / "zoo.wer_1000000000.0" / "filtering.default.train.json").read_text())["report"]
    assert set(report["unusable"]["undecodable audio"]) == set(expected)
    caplog.clear()
    assert hold_out(student, tiny_teacher, zoo, tmp_path / "out") == 0
    lines = re.findall(r"row (\d+): unreadable audio, left out of the loss: (.*)", caplog.text)
    found["train"] = {names[int(row)]: problem for row, problem in lines}
    for stage, problems in found.items():
        assert problems == found["label"], stage
    assert problems.keys() == expected.keys()
    assert all(problems[name].startswith(expected[name]) for name in expected)


# ---- whose files ----------------------------------------------------------------------------------------------------


def test_a_dataset_s_paths_reach_no_file_outside_of_it_in_any_stage(student, tiny_teacher, tmp_path, caplog):
    secret = write(tmp_path / "data.wav", encoded(noise(1), format="WAV"))  # begins as the dataset's directory
    root = tmp_path / "data"
    write(root / "inside.flac", clip(0))
    (root / "link.wav").symlink_to(secret)
    os.mkfifo(root / "fifo.wav")
    hostile = [str(secret), "../data.wav", "link.wav", "fifo.wav", "/proc/kmsg", "/dev/zero", f"file://{secret}"]
    hostile += [
        "zip://x::inside.flac",
        f"zip://x::{secret}",
        f"zip://x::file://{secret}::inside.flac",
        "http://127.0.0.1:9/x.wav",
    ]
    paths = ["inside.flac", *hostile]
    columns = {"name": paths, "audio": [{"bytes": None, "path": path} for path in paths]}
    columns |= {
        "transcription": ["東京"] * len(paths),
        "whisper_transcript": [make_label(tiny_teacher, "東京")] * len(paths),
    }
    write_parquet(root / "train.parquet", **columns)
    labels = label(tiny_teacher, root, tmp_path / "labels", *SHORT)
    filter_clips(tiny_teacher, root, "--wer_threshold", 1e9, "--timestamp_probability", 0, "--skip_logmel")
    for written in (labels, tmp_path / "data.wer_1000000000.0"):
        assert [row["audio"]["bytes"] for row in read_rows(written)] == [clip(0)]
    output = evaluate(tiny_teacher, root, tmp_path / "eval")
    assert [row["id"] for row in read_predictions(output) if not row["problem"]] == ["inside.flac"]
    caplog.clear()
    assert hold_out(student, tiny_teacher, root, tmp_path / "out") == 0
    assert len(set(re.findall(r"row (\d+): unreadable", caplog.text))) == len(hostile)


def test_a_manifest_of_the_user_may_name_files_elsewhere_but_no_devices(tmp_path):
    elsewhere = write(tmp_path / "elsewhere" / "a.flac", clip(0))
    os.mkfifo(tmp_path / "fifo")
    rows = [(elsewhere, "x"), ("elsewhere/a.flac", "x"), ("/dev/zero", "x"), ("/proc/self/maps", "x"), ("fifo", "x")]
    table = write_csv(tmp_path / "list.csv", [("audio", "transcription"), *rows])
    problems = [problem for *_, problem in opened(table)]
    assert problems[:2] == [None, None]
    assert all(problem.startswith("not a regular file") for problem in problems[2:])


def test_a_dataset_on_the_hub_names_files_of_its_repository_only(hub, tmp_path):
    from huggingface_hub import HfApi

    write(tmp_path / "secret.wav", encoded(noise(1), format="WAV"))
    write_clips(tmp_path / "data" / "clips")
    with zipfile.ZipFile(tmp_path / "data" / "clips.zip", "w") as file:
        file.writestr("inner/clip.flac", clip(0))
    paths = [
        *("clips/clip0.flac", "zip://inner/clip.flac::clips.zip"),
        *(str(tmp_path / "secret.wav"), "../secret.wav", "clips/gone.flac"),
    ]
    audio = [{"bytes": None, "path": path} for path in paths]
    write_parquet(tmp_path / "data" / "train.parquet", audio=audio, transcription=[TEXTS[0], *TEXTS[:4]])
    HfApi().create_repo("acme/paths", repo_type="dataset")
    HfApi().upload_folder(repo_id="acme/paths", folder_path=tmp_path / "data", repo_type="dataset")
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.parquet\n---\n"
    HfApi().upload_file(
        path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="acme/paths", repo_type="dataset"
    )
    found = opened("acme/paths")
    assert found[:2] == [WHOLE[0], WHOLE[0]]
    assert [problem.split(":")[0] for *_, problem in found[2:]] == [*["not in the dataset"] * 2, "file not found"]


def test_an_audio_folder_on_the_hub_is_read(hub, tmp_path):
    from huggingface_hub import HfApi

    write_csv(write_clips(tmp_path) / "metadata.csv", [("file_name", "transcription"), *zip(NAMES, TEXTS, strict=True)])
    HfApi().create_repo("acme/folder", repo_type="dataset")
    HfApi().upload_folder(repo_id="acme/folder", folder_path=tmp_path, repo_type="dataset")
    assert opened("acme/folder") == WHOLE


# ---- other speech under the same name -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["embedded", "named"])
def test_other_speech_in_the_same_place_is_noticed_and_a_copy_is_not_other_speech(kind, tiny_teacher, tmp_path):
    def fill(root: Path, pitch: float) -> None:
        samples = 0.2 * np.sin(2 * np.pi * pitch * np.arange(16_000) / 16_000)
        samples[:4_000] = 0
        content = encoded(samples, format="WAV")  # of the same size at every pitch, and with the same beginning
        if kind == "embedded":
            write_parquet(root / "train.parquet", audio=[{"bytes": content, "path": "a.wav"}], transcription=["x"])
        else:
            write(root / "a.wav", content)
            write_parquet(root / "train.parquet", audio=["a.wav"], transcription=["x"])

    fill(tmp_path / "data", 220)
    label(tiny_teacher, tmp_path / "data", tmp_path / "labels", *SHORT)
    score(tiny_teacher, tmp_path / "data", tmp_path / "eval")
    shard = tmp_path / "labels" / "default" / "train-00000-of-00001.parquet"
    before = shard.stat().st_mtime_ns
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    label(tiny_teacher, tmp_path / "copy", tmp_path / "labels", *SHORT)
    assert shard.stat().st_mtime_ns == before
    fill(tmp_path / "data", 330)
    line = refusal(label, tiny_teacher, tmp_path / "data", tmp_path / "labels", *SHORT)
    assert "dataset_digest was" in line
    assert "rows_digest was" in refusal(score, tiny_teacher, tmp_path / "data", tmp_path / "eval")


def test_a_digest_of_many_clips_looks_into_some_of_them_and_at_the_size_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(run_short_form_eval, "SAMPLED_ROWS", 2)

    def digest(changed: int | None, content: bytes) -> str:
        audio = [{"bytes": b"same size", "path": None} for _ in range(6)]
        if changed is not None:
            audio[changed]["bytes"] = content
        write_parquet(tmp_path / "train.parquet", audio=audio, transcription=TEXTS)
        return speech_digest(*open_dataset(str(tmp_path), None, "train", "audio"), "audio", [])

    unchanged = digest(None, b"")
    assert digest(3, b"other one") != unchanged
    assert digest(4, b"another") != unchanged
    assert digest(4, b"other one") == unchanged  # rows 0 and 3 are looked into


# ---- what is written decodes for everybody ---------------------------------------------------------------------------


def test_nothing_that_is_written_tells_others_not_to_decode_it(tiny_teacher, tmp_path):
    root = write_clips(tmp_path / "data")
    write_csv(root / "metadata.csv", [("file_name", "transcription"), *zip(NAMES, TEXTS, strict=True)])
    labels = label(tiny_teacher, root, tmp_path / "labels", *SHORT)
    filter_clips(tiny_teacher, labels, "--wer_threshold", 1e9, "--skip_logmel", "--max_label_length", 20)
    for path in (*labels.rglob("*.parquet"), *tmp_path.glob("labels.*/default/*.parquet")):
        features = Features.from_arrow_schema(pq.read_schema(path))
        assert features["audio"].decode
        assert features["whisper_transcript"] != Value("string")
