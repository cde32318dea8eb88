"""run_pseudo_labelling.py: labels are the teacher's own, and nothing is lost."""

import errno
import io
import json
import logging
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import librosa
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import wandb
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizerFast

import run_pseudo_labelling as script

ROOT = Path(script.__file__).parent


def arguments(teacher, dataset, output, *more) -> list[str]:
    return [
        *("--model_name_or_path", str(teacher), "--dataset_name", str(dataset), "--dataset_config_name", "tiny"),
        *("--dataset_split_name", "train", "--text_column_name", "transcription", "--id_column_name", "name"),
        *("--language", "ja", "--dtype", "float32", "--report_to", "none", "--output_dir", str(output)),
        *map(str, more),
    ]


def read(output: Path, config="tiny", split="train") -> list[dict]:
    """Rows of a labelled dataset in order, as plain Python values."""
    shards = sorted((output / config).glob(f"{split}-*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def labels(output: Path, **where) -> list:
    return [row["whisper_transcript"] for row in read(output, **where)]


def files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "tiny").iterdir()}


def record(output: Path, config="tiny", split="train") -> dict:
    return json.loads((output / f"labelling.{config}.{split}.json").read_text())


def waveform(audio: bytes) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(audio), dtype="float32", always_2d=True)
    return librosa.resample(samples.mean(axis=1), orig_sr=rate, target_sr=16000)


def encoded(samples: np.ndarray, rate: int = 16000, **form) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **form)
    return buffer.getvalue()


def stock_labels(teacher: Path, audio: list[bytes], length=128, **generate) -> list[list[int]]:
    """What `generate` of transformers gives for each clip alone, in the stored form."""
    model = WhisperForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(teacher)
    end = model.generation_config.eos_token_id
    found = []
    for clip in audio:
        features = extractor(waveform(clip), sampling_rate=16000, return_tensors="pt").input_features
        sequence = model.generate(features, force_unique_generate_call=True, **generate)[0].tolist()
        text = sequence[: sequence.index(end)] if end in sequence else sequence
        found.append([*text[: length - 1], end])
    return found


def assert_stock_labels(teacher: Path, audio: list[bytes], found: list[list[int]], **generate) -> None:
    """The labels are those of `stock_labels`, or part from them where two logits of float32 are as good as equal."""
    expected = stock_labels(teacher, audio, **generate)
    for clip, ours, stock in zip(audio, found, expected, strict=True):
        if ours != stock:
            place = next(i for i, (a, b) in enumerate(zip(ours, stock, strict=False)) if a != b)
            model = WhisperForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32).eval()
            extractor = WhisperFeatureExtractor.from_pretrained(teacher)
            features = extractor(waveform(clip), sampling_rate=16000, return_tensors="pt").input_features
            logits = model(features, decoder_input_ids=torch.tensor([stock[:place]])).logits[0, -1]
            assert generate.get("num_beams", 1) == 1, (ours, stock)
            assert abs(logits[ours[place]] - logits[stock[place]]) < 1e-4, (place, ours, stock)


def dataset_of(rows: list[dict], root: Path) -> Path:
    """A local dataset directory with these rows (`name`, `audio`: bytes, `transcription`)."""
    audio = datasets.Audio(sampling_rate=16000, decode=False)
    strings = {"name": datasets.Value("string"), "transcription": datasets.Value("string")}
    rows = [{"transcription": "", **row, "audio": {"bytes": row["audio"], "path": None}} for row in rows]
    schema = datasets.Features({**strings, "audio": audio}).arrow_schema
    (root / "tiny").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), root / "tiny" / "train-00000-of-00001.parquet")
    files = "- config_name: tiny\n  data_files:\n  - split: train\n    path: tiny/train-*\n"
    (root / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    return root


@pytest.fixture(scope="module")
def whole(tiny_teacher, loaded, tmp_path_factory) -> Path:
    """Twelve clips labelled in one go, in four shards."""
    output = tmp_path_factory.mktemp("whole")
    assert script.main(arguments(tiny_teacher, loaded, output, *TWELVE)) == 0
    return output


TWELVE = ("--max_samples", 12, "--shard_size", 3, "--per_device_eval_batch_size", 3)


def in_process(flags: list[str], file_size: int | None = None) -> multiprocessing.Process:
    """`main` in a process of its own, forked from one that has the libraries loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_pseudo_labelling"])
    process = context.Process(target=run_main, args=(flags, file_size))
    process.start()
    return process


def run_main(flags: list[str], file_size: int | None) -> None:
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.exit(script.main(flags))


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("arrangement", ["tiny_teacher", "tiny_teacher_v2"])
def test_a_label_is_what_the_stock_call_gives_for_the_clip_alone(
    request, loaded, clips, tmp_path, arrangement, beams, timestamps
):
    teacher = request.getfixturevalue(arrangement)
    flags = ("--generation_num_beams", beams, "--return_timestamps", timestamps, "--per_device_eval_batch_size", 4)
    assert script.main(arguments(teacher, loaded, tmp_path, *flags, "--max_samples", 6)) == 0
    rows = read(tmp_path)
    assert [row["name"] for row in rows] == [clip["name"] for clip in clips[:6]]
    audio = [clip["audio"] for clip in clips[:6]]
    assert [row["audio"]["bytes"] for row in rows] == audio
    generate = {"language": "ja", "task": "transcribe", "num_beams": beams, "return_timestamps": timestamps}
    assert_stock_labels(teacher, audio, labels(tmp_path), **generate)
    tokenizer = WhisperTokenizerFast.from_pretrained(teacher)
    prefix = ["<|startoftranscript|>", "<|ja|>", "<|transcribe|>", *([] if timestamps else ["<|notimestamps|>"])]
    for label in labels(tmp_path):
        assert tokenizer.convert_ids_to_tokens(label)[: len(prefix)] == prefix
        assert label.count(tokenizer.eos_token_id) == 1


def test_batches_workers_and_shards_change_no_label(whole, tiny_teacher, loaded, tmp_path):
    flags = ("--max_samples", 12, "--shard_size", 7, "--per_device_eval_batch_size", 5, "--dataloader_num_workers", 1)
    assert script.main(arguments(tiny_teacher, loaded, tmp_path, *flags)) == 0
    assert labels(tmp_path) == labels(whole)


def test_scores_and_missing_flash_attention_change_no_label(whole, tiny_teacher, loaded, tmp_path, caplog):
    flags = (*TWELVE, "--scores", "--attn_type", "flash_attn")
    with caplog.at_level(logging.WARNING):
        assert script.main(arguments(tiny_teacher, loaded, tmp_path, *flags)) == 0
    assert caplog.text.count("sdpa is used") == 1
    assert labels(tmp_path) == labels(whole)


def test_a_label_that_does_not_end_is_cut_ended_and_counted(whole, tiny_teacher, loaded, tmp_path):
    bound = sorted(map(len, labels(whole)))[6]
    flags = (*TWELVE, "--max_label_length", bound)
    assert script.main(arguments(tiny_teacher, loaded, tmp_path, *flags)) == 0
    assert labels(tmp_path) == [
        label if len(label) <= bound else [*label[: bound - 1], label[-1]] for label in labels(whole)
    ]
    assert record(tmp_path)["truncated"] == sum(len(label) > bound for label in labels(whole)) > 0


def test_a_clip_over_30_seconds_is_labelled_on_its_first_30_with_a_warning(tiny_teacher, clips, tmp_path, caplog):
    long = np.concatenate([waveform(clip["audio"]) for clip in clips])[: 41 * 16000]
    wide = librosa.resample(long, orig_sr=16000, target_sr=44100)
    rows = [
        {"name": "long", "audio": encoded(long, format="FLAC")},
        {"name": "long and wide", "audio": encoded(np.stack([wide, wide], 1), 44100, format="WAV", subtype="FLOAT")},
        {"name": "cut", "audio": encoded(long[: 30 * 16000], format="FLAC")},
    ]
    source = dataset_of(rows, tmp_path / "in")
    assert script.main(arguments(tiny_teacher, source, tmp_path / "out", "--shard_size", 1)) == 0
    long, wide, cut = labels(tmp_path / "out")
    assert long == cut
    assert_stock_labels(tiny_teacher, [rows[1]["audio"]], [wide], language="ja", task="transcribe")
    assert record(tmp_path / "out")["over_30_s"] == 2
    early, late = [text for text in caplog.messages if "only their first 30 s are labelled" in text]
    assert early.startswith("there are clips over 30 s, such as one of 41 s: ")  # before the first of them is labelled
    assert late.startswith("2 clips are longer than 30 s: ")
    assert record(tmp_path / "out")["hours"] == pytest.approx((41 + 41 + 30) / 3600, abs=1e-4)


def test_the_length_is_that_of_the_decoded_audio_whatever_the_header_says(tiny_teacher, clips, tmp_path):
    long = np.concatenate([waveform(clip["audio"]) for clip in clips])[: 35 * 16000]
    mp3 = encoded(long, format="MP3")
    mp3 = mp3[: len(mp3) * 9 // 10]  # its header still says 35 s
    assert soundfile.info(io.BytesIO(mp3)).duration == 35
    source = dataset_of([{"name": "cut off", "audio": mp3}], tmp_path / "in")
    assert script.main(arguments(tiny_teacher, source, tmp_path / "out")) == 0
    assert record(tmp_path / "out")["hours"] == pytest.approx(len(waveform(mp3)) / 16000 / 3600, abs=1e-4)
    assert record(tmp_path / "out")["hours"] < 34 / 3600


@pytest.mark.parametrize(("capabilities", "dtype"), [({"avx512_bf16": True}, "bfloat16"), ({}, "float32")])
def test_the_precision_is_by_default_what_the_device_computes_natively_and_is_recorded(
    tiny_teacher, loaded, tmp_path, monkeypatch, caplog, capabilities, dtype
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    flags = arguments(tiny_teacher, loaded, tmp_path, "--max_samples", 2)
    with caplog.at_level(logging.INFO):
        assert script.main([flag for flag in flags if flag not in ("--dtype", "float32")]) == 0
    assert record(tmp_path)["settings"]["dtype"] == record(tmp_path)["arguments"]["dtype"] == dtype
    assert caplog.text.count(f"--dtype is not set: {dtype}") == 1


@given(st.lists(st.integers(0, 5), max_size=20))
def test_every_usable_clip_is_labelled_once_the_longest_first(lengths):
    rows = []
    for row, length in enumerate(lengths):
        problem = None if length else "no audio"
        rows.append(script.SpeechRow({"row": row}, script.Clip(None, length, length / 16000, problem)))
    found = [row.values["row"] for row in script.usable_longest_first(rows)]
    usable = [row for row, length in enumerate(lengths) if length]
    assert found == sorted(usable, key=lambda row: (-lengths[row], row))  # clips of one length in the order of rows


def test_labels_as_text_keep_their_timestamps(whole, tiny_teacher, loaded, tmp_path):
    flags = (*TWELVE, "--return_timestamps", "--decode_token_ids")
    assert script.main(arguments(tiny_teacher, loaded, tmp_path / "text", *flags)) == 0
    assert script.main(arguments(tiny_teacher, loaded, tmp_path / "ids", *TWELVE, "--return_timestamps")) == 0
    tokenizer = WhisperTokenizerFast.from_pretrained(tiny_teacher)
    for text, ids in zip(labels(tmp_path / "text"), labels(tmp_path / "ids"), strict=True):
        assert text == tokenizer.decode(ids, skip_special_tokens=True, decode_with_timestamps=True)
        assert text.startswith("<|")


def test_a_teacher_of_english_only_takes_no_language(tiny_teacher_v2, loaded, clips, tmp_path):
    teacher = shutil.copytree(tiny_teacher_v2, tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        text = (teacher / name).read_text()
        (teacher / name).write_text(text.replace("<|transcribe|>", "<|nothing|>"))
    config = json.loads((teacher / "generation_config.json").read_text())
    config["is_multilingual"] = False
    for name in ("lang_to_id", "task_to_id"):
        del config[name]
    (teacher / "generation_config.json").write_text(json.dumps(config))
    flags = arguments(teacher, loaded, tmp_path / "out", "--max_samples", 3)
    with pytest.raises(SystemExit, match=r"--language ja: .* has no such language, only en"):
        script.main(flags)
    flags = [flag for flag in flags if flag not in ("--language", "ja")]
    assert script.main(flags) == 0
    assert_stock_labels(teacher, [clip["audio"] for clip in clips[:3]], labels(tmp_path / "out"))


def test_without_a_language_the_teacher_hears_it(tiny_teacher, loaded, clips, tmp_path):
    flags = arguments(tiny_teacher, loaded, tmp_path, "--max_samples", 3, "--scores")
    assert script.main([flag for flag in flags if flag not in ("--language", "ja")]) == 0
    assert_stock_labels(tiny_teacher, [clip["audio"] for clip in clips[:3]], labels(tmp_path), task="transcribe")


@pytest.mark.parametrize(
    ("arrangement", "no_speech_token", "beams"),
    [
        ("tiny_teacher", "<|nospeech|>", 1),
        ("tiny_teacher", "<|nospeech|>", 3),
        ("tiny_teacher_v2", "<|nocaptions|>", 1),
    ],
)
def test_scores_are_those_of_whisper(request, loaded, clips, tmp_path, arrangement, no_speech_token, beams):
    teacher = request.getfixturevalue(arrangement)
    flags = ("--scores", "--generation_num_beams", beams, "--max_samples", 4, "--max_label_length", 60)
    assert script.main(arguments(teacher, loaded, tmp_path, *flags)) == 0
    model = WhisperForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(teacher)
    tokenizer = WhisperTokenizerFast.from_pretrained(teacher)
    rules = model.generation_config
    for row, clip in zip(read(tmp_path), clips[:4], strict=True):
        label = torch.tensor([row["whisper_transcript"]])
        features = extractor(waveform(clip["audio"]), sampling_rate=16000, return_tensors="pt").input_features
        with torch.inference_mode():
            logits = model(features, decoder_input_ids=label[:, :-1]).logits[0]
        no_speech = logits[0].softmax(-1)[tokenizer.convert_tokens_to_ids(no_speech_token)]
        assert row["no_speech_prob"] == pytest.approx(no_speech.item(), abs=1e-4)
        logits = logits[3:].clone()  # those that give the tokens behind the prefix
        logits[:, rules.suppress_tokens] = -math.inf
        logits[0, rules.begin_suppress_tokens] = -math.inf
        chosen = logits.log_softmax(-1).gather(1, label[0, 4:, None])
        chosen = chosen[:-1] if len(label[0]) == 60 else chosen
        assert row["avg_logprob"] == pytest.approx(chosen.mean().item(), abs=2e-4)
        text = tokenizer.decode(label[0], skip_special_tokens=True).strip().encode()
        assert row["compression_ratio"] == pytest.approx(len(text) / len(zlib.compress(text)), abs=1e-4)


@given(st.lists(st.integers(0, 8), max_size=12), st.integers(1, 4))
def test_a_stored_label_has_one_end_token_and_no_padding(body, prefix_length):
    end, prefix = 0, [9] * prefix_length
    label = script.finish_label([*prefix, 5, *body], prefix_length, end)
    assert label.ids[-1] == end
    assert label.ids.count(end) == 1
    assert label.truncated == (end not in body)
    assert len(label.ids) <= prefix_length + 1 + len(body)
    assert [*prefix, 5, *body][: len(label.ids) - 1] == label.ids[:-1]


FIRST = 100  # the id of <|0.00|> in the two tests below
TIMES = range(FIRST, FIRST + script.TIMESTAMPS)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 3)), max_size=4))
def test_paired_timestamps_that_never_go_back_are_well_formed(segments):
    body, clock = [], FIRST
    for pause, duration, words in segments:
        body += [clock + pause, *[7] * words, clock + pause + duration]
        clock += pause + duration
    assert script.timestamps_are_paired(body, TIMES)


@pytest.mark.parametrize(
    "body",
    [
        [7],
        [FIRST, 7],
        [FIRST, 7, FIRST + 9, 7],
        [FIRST + 9, 7, FIRST],
        [FIRST, 7, FIRST + 9, FIRST + 8, 7, FIRST + 10],
        [FIRST, 7, FIRST + 9, FIRST + 9],
    ],
)
def test_other_timestamps_are_malformed(body):
    assert not script.timestamps_are_paired(body, TIMES)


def test_malformed_timestamps_are_counted(tiny_teacher, loaded, tmp_path):
    flags = ("--return_timestamps", "--max_samples", 6, "--max_label_length", 16)
    assert script.main(arguments(tiny_teacher, loaded, tmp_path, *flags)) == 0
    tokenizer = WhisperTokenizerFast.from_pretrained(tiny_teacher)
    first = tokenizer.convert_tokens_to_ids("<|0.00|>")
    odd = [sum(token >= first for token in label) % 2 for label in labels(tmp_path)]
    assert record(tmp_path)["malformed_timestamps"] >= sum(odd) > 0


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 480_000), min_size=1, max_size=3), st.sampled_from([80, 128]), st.integers(0, 2**32 - 1))
def test_log_mel_is_that_of_the_stock_extractor(lengths, bins, seed):
    extractor = WhisperFeatureExtractor(feature_size=bins)
    noise = np.random.default_rng(seed)
    clips = [noise.normal(0, 10 ** noise.uniform(-6, 0), length).astype(np.float32) for length in lengths]
    found = script.pad_window(script.log_mel(clips, extractor))
    for row, clip in zip(found, clips, strict=True):
        expected = extractor(clip, sampling_rate=16000, return_tensors="pt").input_features[0]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- input


def test_audio_that_cannot_be_used_is_left_out_and_named(tiny_teacher, clips, tmp_path):
    bad = {
        "noise": b"this is no audio",
        "cut": clips[0]["audio"][:40],
        "zero": encoded(np.zeros(0, np.float32), format="WAV"),
        "empty": b"",
        "missing": None,
        "infinite": encoded(np.full(1600, np.inf, np.float32), format="WAV", subtype="FLOAT"),
    }
    rows = [dict(clip) for clip in clips[:4]]
    for place, (name, audio) in enumerate(bad.items()):
        rows.insert(1 + place, {"name": name, "audio": audio})
    source = dataset_of(rows, tmp_path / "in")
    flags = ("--shard_size", 2, "--per_device_eval_batch_size", 2)
    assert script.main(arguments(tiny_teacher, source, tmp_path / "out", *flags)) == 0
    assert [row["name"] for row in read(tmp_path / "out")] == [clip["name"] for clip in clips[:4]]
    audio = [clip["audio"] for clip in clips[:4]]
    assert_stock_labels(tiny_teacher, audio, labels(tmp_path / "out"), language="ja", task="transcribe")
    found = record(tmp_path / "out")
    assert [name for name, _ in found["unusable"]] == list(bad)
    assert len(datasets.load_dataset(str(tmp_path / "out"), "tiny", split="train")) == 4  # two shards have no row
    assert (found["rows_in"], found["rows_out"], found["unusable_rows"]) == (10, 4, 6)


def test_rows_without_an_id_or_a_file_are_named_by_their_numbers_in_the_dataset(tiny_teacher, clips, tmp_path):
    audio = [clips[0]["audio"], b"no audio", clips[1]["audio"], b"no audio", b"no audio"]
    source = dataset_of([{"name": "", "audio": content} for content in audio], tmp_path / "in")
    flags = arguments(tiny_teacher, source, tmp_path / "out", "--shard_size", 2)
    assert script.main([flag for flag in flags if flag not in ("--id_column_name", "name")]) == 0
    assert [name for name, _ in record(tmp_path / "out")["unusable"]] == ["row 1", "row 3", "row 4"]


def test_a_dataset_without_any_usable_audio_ends_with_an_error(tiny_teacher, tmp_path):
    source = dataset_of([{"name": "a", "audio": b"x"}], tmp_path / "in")
    with pytest.raises(SystemExit, match="none of the 1 clips"):
        script.main(arguments(tiny_teacher, source, tmp_path / "out"))


def test_a_dry_run_knows_no_time_where_none_of_the_first_clips_can_be_used(tiny_teacher, tmp_path, capsys):
    source = dataset_of([{"name": "a", "audio": b"x"}, {"name": "b", "audio": b""}], tmp_path / "in")
    assert script.main(arguments(tiny_teacher, source, tmp_path / "out", "--dry_run")) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    convert = "Convert it, for example: ffmpeg -i FILE -ar 16000 FILE.flac"
    problem = f"undecodable audio: Format not recognised. {convert}"
    assert said["unusable"] == f"2 clips, which are left out; the first: {problem}"
    assert said["time"] == "unknown, as no clip of the first ones can be used"
    assert not (tmp_path / "out").exists()


def test_a_row_without_a_name_is_listed_by_its_number_in_the_whole_split():
    args = SimpleNamespace(shard_size=5, id_column_name=None, audio_column_name="audio", return_timestamps=False)
    teacher = SimpleNamespace(args=args, prefix_length=4)
    rows = [script.SpeechRow({"audio": None}, script.Clip(problem="no audio"))] * 2
    notes = script.label_notes(teacher, 3, rows)
    assert notes["unusable"] == [["row 15", "no audio"], ["row 16", "no audio"]]


def test_an_empty_split_gives_an_empty_shard(tiny_teacher, tmp_path):
    source = dataset_of([], tmp_path / "in")
    assert script.main(arguments(tiny_teacher, source, tmp_path / "out")) == 0
    table = pq.read_table(tmp_path / "out" / "tiny" / "train-00000-of-00001.parquet")
    assert table.num_rows == 0
    assert table.schema.field("whisper_transcript").type == pa.list_(pa.int32())


def test_stereo_at_44_khz_and_lossy_formats_are_labelled_as_decoded(tiny_teacher, clips, tmp_path):
    wide = librosa.resample(waveform(clips[1]["audio"]), orig_sr=16000, target_sr=44100)
    stereo = np.stack([wide, 0.5 * wide], axis=1)
    rows = [
        {"name": "wav", "audio": encoded(stereo, 44100, format="WAV")},
        {"name": "mp3", "audio": encoded(wide, 44100, format="MP3")},
        {"name": "ogg", "audio": encoded(wide, 44100, format="OGG", subtype="VORBIS")},
        {"name": "flac", "audio": clips[1]["audio"]},
        {"name": "flac", "audio": clips[2]["audio"]},
        {"name": "n" * 100_000, "audio": clips[3]["audio"]},
    ]
    source = dataset_of(rows, tmp_path / "in")
    assert script.main(arguments(tiny_teacher, source, tmp_path / "out")) == 0
    found = read(tmp_path / "out")
    assert [row["name"] for row in found] == [row["name"] for row in rows]
    assert [row["audio"]["bytes"] for row in found] == [row["audio"] for row in rows]
    audio = [row["audio"] for row in rows]
    assert_stock_labels(tiny_teacher, audio, labels(tmp_path / "out"), language="ja", task="transcribe")


def test_the_result_is_a_dataset_directory_that_a_label_run_can_read_again(whole, tiny_teacher, tmp_path):
    dataset = datasets.load_dataset(str(whole), "tiny", split="train")
    dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
    assert dataset["whisper_transcript"][:] == labels(whole)
    assert dataset.features["audio"] == datasets.Audio(decode=False)
    schema = pq.read_schema(whole / "tiny" / "train-00000-of-00004.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["audio"] == {"sampling_rate": 16000, "_type": "Audio"}  # whoever loads it gets decoded audio
    assert script.main(arguments(tiny_teacher, whole, tmp_path)) == 0  # its labels are replaced
    assert labels(tmp_path) == labels(whole)


BUILDER = """
import datasets, pyarrow.parquet as pq

class Config(datasets.BuilderConfig):
    pass

class Speech(datasets.GeneratorBasedBuilder):
    BUILDER_CONFIG_CLASS = Config
    BUILDER_CONFIGS = [Config(name="tiny")]

    def _info(self):
        audio = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        strings = {"name": datasets.Value("string"), "transcription": datasets.Value("string")}
        return datasets.DatasetInfo(features=datasets.Features({**strings, "audio": audio}))

    def _split_generators(self, manager):
        return [datasets.SplitGenerator("train", gen_kwargs={"files": ["SHARD"]})]

    def _generate_examples(self, files):
        for number, row in enumerate(pq.read_table(files[0]).to_pylist()):
            yield number, row
"""


def test_builder_files_hub_datasets_and_folders_of_audio_give_the_same_labels(
    whole, tiny_teacher, loaded, clips, tmp_path, hub, capsys
):
    builder = tmp_path / "speech_loader.py"
    builder.write_text(BUILDER.replace("SHARD", str(loaded / "tiny" / "train-00000-of-00001.parquet")))
    flags = (*TWELVE, "--preprocessing_num_workers", 1)
    assert script.main(arguments(tiny_teacher, builder, tmp_path / "builder", *flags)) == 0
    assert labels(tmp_path / "builder") == labels(whole)

    api = script.HfApi()
    api.create_repo("acme/label-input", repo_type="dataset", private=True)
    api.upload_folder(repo_id="acme/label-input", repo_type="dataset", folder_path=loaded)
    assert script.main(arguments(tiny_teacher, "acme/label-input", tmp_path / "hub", *TWELVE)) == 0
    assert labels(tmp_path / "hub") == labels(whole)

    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    lines = []
    for number, clip in enumerate(clips[:12]):
        (folder / f"{number:02}.flac").write_bytes(clip["audio"])
        lines.append({"file_name": f"{number:02}.flac", "name": clip["name"], "transcription": clip["transcription"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = arguments(tiny_teacher, folder.parent, tmp_path / "out", *TWELVE)
    assert script.main([flag for flag in flags if flag not in ("--dataset_config_name", "tiny")]) == 0
    found = read(tmp_path / "out", config="default")
    assert [row["whisper_transcript"] for row in found] == labels(whole)
    capsys.readouterr()
    for source in (builder, "acme/label-input", folder.parent):
        flags = arguments(tiny_teacher, source, tmp_path / "plan", *TWELVE, "--dry_run")
        drop = ("--dataset_config_name", "tiny") if source == folder.parent else ()
        assert script.main([flag for flag in flags if flag not in drop]) == 0
        assert f"input: {source}, 12 clips, " in capsys.readouterr().out
    assert [row["audio"] for row in found[:1]] == [{"bytes": clips[0]["audio"], "path": "00.flac"}]
    assert [row["name"] for row in found] == [clip["name"] for clip in clips[:12]]


def test_a_manifest_names_audio_files_whose_bytes_are_stored_and_of_which_some_may_be_missing(
    whole, tiny_teacher, clips, tmp_path
):
    (tmp_path / "audio").mkdir()
    lines = ["name\taudio\ttranscription"]
    for number, clip in enumerate(clips[:3]):
        (tmp_path / "audio" / f"{number}.flac").write_bytes(clip["audio"])
        lines.append(f"{clip['name']}\taudio/{number}.flac\t{clip['transcription']}")
    lines.insert(2, "lost\taudio/lost.flac\t")
    (tmp_path / "speech.tsv").write_text("\n".join(lines))
    assert script.main(arguments(tiny_teacher, tmp_path / "speech.tsv", tmp_path / "out")) == 0
    found = read(tmp_path / "out")
    assert [row["audio"] for row in found] == [
        {"bytes": clip["audio"], "path": f"{number}.flac"} for number, clip in enumerate(clips[:3])
    ]
    assert labels(tmp_path / "out") == labels(whole)[:3]
    assert record(tmp_path / "out")["unusable"] == [
        ["lost", f"file not found: audio/lost.flac (paths count from {tmp_path})"]
    ]


def test_clips_in_a_zip_are_stored_under_their_own_names(tiny_teacher, clips, tmp_path):
    lines = ["name\taudio\ttranscription"]
    with zipfile.ZipFile(tmp_path / "speech.zip", "w") as archive:
        for number, clip in enumerate(clips[:2]):
            archive.writestr(f"day/{number}.flac", clip["audio"])
            lines.append(f"{number}\tzip://day/{number}.flac::{tmp_path}/speech.zip\t{clip['transcription']}")
    (tmp_path / "speech.tsv").write_text("\n".join(lines))
    assert script.main(arguments(tiny_teacher, tmp_path / "speech.tsv", tmp_path / "out", "--max_label_length", 8)) == 0
    stored = [row["audio"] for row in read(tmp_path / "out")]
    assert stored == [{"bytes": clip["audio"], "path": f"{number}.flac"} for number, clip in enumerate(clips[:2])]


@pytest.mark.parametrize("length", [6, 448])
def test_labels_may_have_one_token_of_text_or_all_that_the_decoder_has(tiny_teacher, loaded, tmp_path, length):
    flags = ("--max_samples", 1, "--max_label_length", length)
    assert script.main(arguments(tiny_teacher, loaded, tmp_path / "out", *flags)) == 0
    assert 6 <= len(labels(tmp_path / "out")[0]) <= length


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--dataset_split_name", "nowhere", "nowhere"),
        ("--dataset_config_name", "nothing", "nothing"),
        ("--text_column_name", "words", "has no column 'words' (--text_column_name)"),
        ("--id_column_name", "id", "it has name, audio, transcription"),
        ("--language", "tlh", "--language tlh"),
        ("--dataset_name", "/no/such/place", "neither a directory"),
        ("--dataset_name", "no_such_loader.py", "does not exist"),
        ("--dataset_name", "acme/no-such-dataset", "acme/no-such-dataset"),
        ("--model_name_or_path", "acme/no-such-model", "acme/no-such-model"),
        ("--max_label_length", "5", "--max_label_length 5 must be within 6 and 448"),
        ("--max_label_length", "449", "448"),
        ("--hub_model_id", "a b", "neither a directory"),
    ],
)
def test_what_a_user_gets_wrong_is_told_in_one_line(tiny_teacher, loaded, tmp_path, flag, value, message):
    with pytest.raises(SystemExit) as refusal:
        script.main(arguments(tiny_teacher, loaded, tmp_path / "out", flag, value))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_what_a_run_would_do_and_changes_nothing(
    whole, tiny_teacher, loaded, tmp_path, monkeypatch, capsys, hub
):
    output = shutil.copytree(whole, tmp_path / "out")
    (output / "tiny" / "train-00001-of-00004.parquet").unlink()
    before = files(output)
    flags = ["--dry_run", "--hub_model_id", "acme/label-plan"]
    assert script.main(arguments(tiny_teacher, loaded, output, *TWELVE, *flags)) == 0
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    audio = [row["audio"]["bytes"] for row in read(whole)]
    hours, size = sum(len(waveform(clip)) for clip in audio) / 16000 / 3600, sum(map(len, audio)) / 1e6
    assert told["input"] == f"{loaded}, 12 clips, {hours:.2f} h, {size:.1f} MB"
    assert told["done"] == "3 of 4 shards"
    assert told["left"] == "3 clips"
    assert told["writes"] == str(output)
    assert told["pushes"] == "acme/label-plan (private)"
    assert told["time"].startswith("about 0:00:0")
    assert files(output) == before
    assert not script.HfApi().repo_exists("acme/label-plan", repo_type="dataset")
    monkeypatch.setattr(script, "measure_rate", lambda *_: 0.1)  # clips a second
    script.main(arguments(tiny_teacher, loaded, output, *TWELVE, "--dry_run"))
    assert "time: about 0:00:30 with 1 processes on cpu, 0.1 clips/s each\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="max_label_length was 128 and is now 64"):
        script.main(arguments(tiny_teacher, loaded, output, *TWELVE, "--dry_run", "--max_label_length", 64))
    assert script.main(arguments(tiny_teacher, loaded, tmp_path / "new", "--dry_run")) == 0
    assert "done: 0 of 1 shards\n" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rows", [11, 13])
def test_a_dry_run_sees_that_the_input_has_other_rows_than_those_of_the_shards(
    whole, tiny_teacher, loaded, tmp_path, rows
):
    output = shutil.copytree(whole, tmp_path / "out")
    flags = ("--max_samples", rows, *TWELVE[2:], "--dry_run")
    with pytest.raises(SystemExit, match=f"rows was 12 and is now {rows}"):
        script.main(arguments(tiny_teacher, loaded, output, *flags))


def test_a_dry_run_counts_the_clips_that_labelling_would_cut_or_leave_out(tiny_teacher, tmp_path, capsys):
    audio = {
        "long": encoded(np.ones(31 * 16000), format="FLAC"),
        "whole": encoded(np.ones(30 * 16000), format="FLAC"),
        "film": b"x",
        "empty": b"",
    }
    dataset = dataset_of([{"name": name, "audio": content} for name, content in audio.items()], tmp_path / "in")
    script.main(arguments(tiny_teacher, dataset, tmp_path / "new", *TWELVE, "--dry_run"))
    told = capsys.readouterr().out
    assert "too long: 1 clips are over 30 s: only their first 30 s are labelled, and the filter drops them\n" in told
    problem = "undecodable audio: Format not recognised. Convert it, for example: ffmpeg -i FILE -ar 16000 FILE.flac"
    assert f"unusable: 2 clips, which are left out; the first: {problem}\n" in told


def test_a_dry_run_without_the_time_to_read_all_of_the_input_says_so(
    whole, tiny_teacher, loaded, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(script, "PLAN_SECONDS", 0)
    script.main(arguments(tiny_teacher, loaded, tmp_path / "new", *TWELVE, "--dry_run"))
    told = capsys.readouterr().out
    assert f"input: {loaded}, more than 3 clips, " in told
    assert "done: 0 of more than 1 shards\nleft: more than 3 clips\n" in told
    assert "time: more than 0:00:0" in told
    output = shutil.copytree(whole, tmp_path / "out")  # whose shards have noted the number of rows
    (output / "tiny" / "train-00001-of-00004.parquet").unlink()
    script.main(arguments(tiny_teacher, loaded, output, *TWELVE, "--dry_run"))
    assert "done: 3 of more than 4 shards\nleft: more than 3 clips\n" in capsys.readouterr().out


def test_a_dry_run_counts_the_rows_of_a_table_and_guesses_at_what_it_had_no_time_to_read(
    tiny_teacher, tmp_path, monkeypatch, capsys
):
    for name, seconds in (("a", 31), ("b", 2), ("c", 5)):
        (tmp_path / f"{name}.flac").write_bytes(encoded(np.ones(seconds * 16_000), format="FLAC"))
    table = tmp_path / "list.csv"
    rows = ["audio,name,transcription", *(f"{name}.flac,{name},x" for name in ("a", "b", "gone", "c", "c", "c"))]
    table.write_text("\n".join(rows))
    monkeypatch.setattr(script, "PLAN_SECONDS", 0)
    script.main(arguments(tiny_teacher, table, tmp_path / "out", *TWELVE[2:], "--dry_run"))
    told = capsys.readouterr().out
    first = sum((tmp_path / f"{name}.flac").stat().st_size for name in "ab")
    assert f"input: {table}, 6 clips, about {33 * 2 / 3600:.2f} h, about {2 * first / 1e6:.1f} MB\n" in told
    assert "too long: 1 of the first 3 clips are over 30 s: " in told
    problem = f"file not found: gone.flac (paths count from {tmp_path})"
    assert f"unusable: 1 of the first 3 clips, which are left out; the first: {problem}\n" in told
    assert "left: 6 clips\n" in told and "time: about " in told


def test_an_input_with_missing_shards_is_refused(whole, tiny_teacher, tmp_path):
    source = shutil.copytree(whole, tmp_path / "in")
    (source / "tiny" / "train-00002-of-00004.parquet").unlink()
    with pytest.raises(
        SystemExit, match="3 of 4 shards of train, -00002-of-00004 is missing: run run_pseudo_labelling"
    ):
        script.main(arguments(tiny_teacher, source, tmp_path / "out"))


def test_the_input_is_never_overwritten(tiny_teacher, loaded):
    with pytest.raises(SystemExit, match="is the input"):
        script.main(arguments(tiny_teacher, loaded, loaded, "--overwrite_output_dir"))


# -------------------------------------------------------------------------------------------------------------- restart


def wait_for_shards(output: Path, number: int, alive: Callable[[], bool]) -> None:
    """Until so many shards are there, or the process has ended."""
    while len(list(output.glob("tiny/train-*"))) < number and alive():
        time.sleep(0.02)


@pytest.mark.parametrize("seed", range(3))
def test_runs_killed_at_random_moments_end_with_the_same_bytes(whole, tiny_teacher, loaded, tmp_path, seed):
    chance = random.Random(seed)
    flags = arguments(tiny_teacher, loaded, tmp_path, *TWELVE)
    for number in range(3):
        process = in_process(flags)
        wait_for_shards(tmp_path, chance.randint(0, number + 1), process.is_alive)
        process.join(chance.uniform(0, 1))
        if process.exitcode is None:
            os.kill(process.pid, chance.choice([signal.SIGKILL, signal.SIGTERM]))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM)
        for path in (tmp_path / "tiny").glob("train-*"):  # what bears its final name is whole
            assert path.read_bytes() == (whole / "tiny" / path.name).read_bytes()
    assert script.main(flags) == 0
    shards = {name: content for name, content in files(tmp_path).items() if not name.startswith(".")}
    assert shards == files(whole)
    assert record(tmp_path)["status"] == "complete"


def launch(output: Path, flags: list[str], *more: str) -> subprocess.Popen:
    """The script under `accelerate launch` on processes of this machine; `--cpu` would start only one."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", *more]
    return subprocess.Popen([*command, script.__file__, *flags], cwd=output)


def test_two_processes_one_of_which_dies_and_then_two_machines_give_the_bytes_of_one(
    whole, tiny_teacher, loaded, tmp_path
):
    flags = arguments(tiny_teacher, loaded, tmp_path, *TWELVE, "--scores")
    process = launch(tmp_path, flags, "--num_machines", "1", "--main_process_port", "0")
    wait_for_shards(tmp_path, 1, lambda: process.poll() is None)
    children = psutil.Process(process.pid).children(recursive=True)
    [child for child in children if "run_pseudo_labelling.py" in " ".join(child.cmdline())][-1].kill()
    assert process.wait(timeout=120) != 0
    survivors = {path: path.read_bytes() for path in tmp_path.glob("tiny/train-*")}
    assert len(survivors) in range(1, 4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    main = ("--main_process_ip", "127.0.0.1", "--main_process_port", port)
    machines = [launch(tmp_path, flags, "--num_machines", "2", "--machine_rank", str(rank), *main) for rank in (0, 1)]
    assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    assert record(tmp_path)["last_run"]["processes"] == 2
    one = tmp_path / "one"
    assert script.main(arguments(tiny_teacher, loaded, one, *TWELVE, "--scores")) == 0
    shards = {name: content for name, content in files(tmp_path).items() if not name.startswith(".")}
    assert shards == files(one)
    assert all(path.read_bytes() == content for path, content in survivors.items())
    assert labels(tmp_path) == labels(whole)


def test_the_same_command_again_does_nothing_but_say_so(whole, tiny_teacher, loaded, tmp_path):
    output = shutil.copytree(whole, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (output / "tiny").iterdir()}
    old = record(output)
    flags = ("--overwrite_output_dir", "--per_device_eval_batch_size", 2, "--dataloader_num_workers", 2)
    assert script.main(arguments(tiny_teacher, loaded, output, *TWELVE, *flags)) == 0
    assert {path: path.stat().st_mtime_ns for path in (output / "tiny").iterdir()} == before
    assert record(output) == old
    running = {"status": "running", "settings": old["settings"]}  # as a run leaves it that is killed before its end
    (output / "labelling.tiny.train.json").write_text(json.dumps(running))
    assert script.main(arguments(tiny_teacher, loaded, output, *TWELVE)) == 0
    assert record(output)["status"] == "complete"


def test_only_missing_shards_are_made(whole, tiny_teacher, loaded, tmp_path):
    output = shutil.copytree(whole, tmp_path / "out")
    lost = output / "tiny" / "train-00001-of-00004.parquet"
    lost.unlink()
    (output / "tiny" / f".{lost.name}.partial").write_bytes(b"half of it")
    before = {path: path.stat().st_mtime_ns for path in (output / "tiny").glob("train-*")}
    assert script.main(arguments(tiny_teacher, loaded, output, *TWELVE)) == 0
    assert files(output) == files(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_record_counts_the_clips_that_the_last_run_labelled(tiny_teacher, loaded, tmp_path):
    flags = arguments(tiny_teacher, loaded, tmp_path, "--max_samples", 5, "--shard_size", 3)
    assert script.main(flags) == 0
    assert record(tmp_path)["last_run"]["clips"] == 5
    (tmp_path / "tiny" / "train-00001-of-00002.parquet").unlink()
    assert script.main(flags) == 0
    assert record(tmp_path)["last_run"]["clips"] == 2


def test_a_shard_that_was_damaged_is_made_again(whole, tiny_teacher, loaded, tmp_path):
    output = shutil.copytree(whole, tmp_path / "out")
    with open(output / "tiny" / "train-00002-of-00004.parquet", "r+b") as file:
        file.truncate(1000)
    assert script.main(arguments(tiny_teacher, loaded, output, *TWELVE)) == 0
    assert files(output) == files(whole)


def test_other_settings_are_refused_and_named_and_overwriting_starts_afresh(whole, tiny_teacher, loaded, tmp_path):
    output = shutil.copytree(whole, tmp_path / "out")
    (output / "tiny" / "notes.txt").write_text("mine")
    flags = arguments(tiny_teacher, loaded, output, *TWELVE[:2], "--shard_size", 5, "--return_timestamps")
    with pytest.raises(SystemExit, match=r"shard_size was 3 and is now 5.*--overwrite_output_dir"):
        script.main(flags)
    assert files(output).items() >= files(whole).items()
    assert script.main([*flags, "--overwrite_output_dir"]) == 0
    assert sorted(files(output)) == ["notes.txt", *(f"train-0000{i}-of-00003.parquet" for i in range(3))]
    assert len(read(output)) == 12


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--dtype", "bfloat16"], "dtype was 'float32' and is now 'bfloat16'"),
        (["--return_timestamps"], "return_timestamps was False and is now True"),
        (["--generation_num_beams", 2], "generation_num_beams was 1 and is now 2"),
        (["--max_label_length", 64], "max_label_length was 128 and is now 64"),
        (["--decode_token_ids"], "decode_token_ids was False and is now True"),
        (["--scores"], "scores was False and is now True"),
        (["--language", "en"], "language was 'ja' and is now 'en'"),
        (["--task", "translate"], "task was 'transcribe' and is now 'translate'"),
        (["--attn_type", "eager"], "attention was 'sdpa' and is now 'eager'"),
        (["--max_samples", 11], "rows was 12 and is now 11"),
    ],
)
def test_labels_are_not_taken_for_those_that_other_flags_ask_for(whole, tiny_teacher, loaded, tmp_path, flags, changed):
    output = shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(SystemExit, match=f"was made with other settings: {changed}"):
        script.main(arguments(tiny_teacher, loaded, output, *TWELVE, *flags))
    assert files(output) == files(whole)


def test_another_dataset_or_teacher_of_the_same_name_is_refused(tiny_teacher, tiny_teacher_v2, clips, tmp_path):
    source = dataset_of(clips[:2], tmp_path / "in")
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    assert script.main(arguments(teacher, source, tmp_path / "out")) == 0
    shutil.rmtree(source)
    dataset_of(clips[1:3], source)
    with pytest.raises(SystemExit, match="dataset_digest"):
        script.main(arguments(teacher, source, tmp_path / "out"))
    shutil.rmtree(source)
    dataset_of(clips[:2], source)
    shutil.rmtree(teacher)
    shutil.copytree(tiny_teacher_v2, teacher)
    with pytest.raises(SystemExit, match="teacher_digest"):
        script.main(arguments(teacher, source, tmp_path / "out"))


@pytest.mark.parametrize(
    ("rule", "value"), [("suppress_tokens", [7]), ("begin_suppress_tokens", [7]), ("max_initial_timestamp_index", 7)]
)
def test_a_teacher_that_decodes_by_another_rule_is_refused(tiny_teacher, clips, tmp_path, rule, value):
    source = dataset_of(clips[:1], tmp_path / "in")
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    assert script.main(arguments(teacher, source, tmp_path / "out")) == 0
    path = teacher / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {rule: value}))
    with pytest.raises(SystemExit, match="teacher_digest"):
        script.main(arguments(teacher, source, tmp_path / "out"))


def test_shards_of_something_else_are_not_touched(tiny_teacher, loaded, tmp_path):
    (tmp_path / "tiny").mkdir()
    foreign = tmp_path / "tiny" / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"a": [1]}), foreign)
    with pytest.raises(SystemExit, match="audio_column_name was None"):
        script.main(arguments(tiny_teacher, loaded, tmp_path))
    assert pq.read_table(foreign).num_rows == 1


def test_a_full_disk_costs_the_shard_in_flight(whole, tiny_teacher, loaded, tmp_path):
    sizes = [path.stat().st_size for path in sorted((whole / "tiny").iterdir())]
    flags = arguments(tiny_teacher, loaded, tmp_path, *TWELVE)
    process = in_process(flags, file_size=max(sizes) - 1)
    process.join()
    assert process.exitcode == 1
    assert not list((tmp_path / "tiny").glob(".*"))
    for path in (tmp_path / "tiny").iterdir():
        assert path.read_bytes() == (whole / "tiny" / path.name).read_bytes()
    assert script.main(flags) == 0
    assert files(tmp_path) == files(whole)


def test_a_record_that_cannot_be_written_ends_the_run_in_one_line(tiny_teacher, loaded, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(script, "write_record", refuse)
    with pytest.raises(SystemExit, match=f"cannot write to --output_dir {tmp_path}: .*Read-only file system") as error:
        script.main(arguments(tiny_teacher, loaded, tmp_path, *TWELVE))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_shard_of_another_machine_that_does_not_appear_is_named_and_the_same_command_makes_it(
    whole, tiny_teacher, loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "APPEAR_SECONDS", 0.1)
    write_labels = script.write_labels

    def write_elsewhere(teacher, split, features, shard, rows):
        if shard != 2:
            write_labels(teacher, split, features, shard, rows)

    monkeypatch.setattr(script, "write_labels", write_elsewhere)
    missing = tmp_path / "tiny" / "train-00002-of-00004.parquet"
    with pytest.raises(SystemExit, match=f"{missing} has not appeared: do all machines see it.*Run the same command"):
        script.main(arguments(tiny_teacher, loaded, tmp_path, *TWELVE))
    assert record(tmp_path)["status"] == "running"
    monkeypatch.undo()
    assert script.main(arguments(tiny_teacher, loaded, tmp_path, *TWELVE)) == 0
    assert files(tmp_path) == files(whole)


def test_memory_that_runs_out_halves_the_batch(caplog):
    sizes = []

    def decode(clips):
        sizes.append(len(clips))
        if len(clips) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [-clip for clip in clips]

    decoder = script.BatchDecoder(16, decode)
    with caplog.at_level(logging.WARNING):
        assert list(decoder.decode(range(10))) == [(clip, -clip) for clip in range(10)]
    assert sizes == [10, 8, 4, 2, 2, 2, 2, 2]
    assert decoder.batch_size == 2
    assert "batches of 2 for the rest of the run" in caplog.text


def test_memory_that_one_clip_exhausts_ends_the_run_in_one_line():
    def decode(clips):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SystemExit, match="not enough memory for one clip"):
        list(script.BatchDecoder(2, decode).decode([0, 1]))


def test_memory_that_runs_out_changes_no_label(whole, tiny_teacher, loaded, tmp_path, monkeypatch):
    fill, sizes = script.GreedyDecoder.fill, []

    def small_device(decoder, waveforms, targets):
        sizes.append(decoder.batch_size)
        if decoder.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        fill(decoder, waveforms, targets)

    monkeypatch.setattr(script.GreedyDecoder, "fill", small_device)
    assert script.main(arguments(tiny_teacher, loaded, tmp_path, *TWELVE)) == 0
    assert files(tmp_path) == files(whole)
    assert sizes == [3, *[2] * 12]  # what did not fit once is not tried again in the other shards


# ------------------------------------------------------------------------------------------------------ Hub and tracker


def test_labels_are_pushed_and_other_configurations_of_the_repository_stay(whole, tiny_teacher, loaded, tmp_path, hub):
    api = script.HfApi()
    api.create_repo("acme/label-push", repo_type="dataset", private=True)
    card = (
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: small/train-*\n---\n# Mine\n"
    )
    other = loaded / "tiny" / "train-00000-of-00001.parquet"
    there = {"README.md": card.encode(), f"small/{other.name}": other, "tiny/train-00000-of-00009.parquet": b"stale"}
    for name, content in there.items():
        api.upload_file(repo_id="acme/label-push", repo_type="dataset", path_in_repo=name, path_or_fileobj=content)
    (tmp_path / "script.py").write_text("not for the Hub")
    flags = arguments(tiny_teacher, loaded, tmp_path, *TWELVE, "--hub_model_id", "acme/label-push")
    assert script.main(flags) == 0
    names = api.list_repo_files("acme/label-push", repo_type="dataset")
    shards = [f"tiny/train-0000{i}-of-00004.parquet" for i in range(4)]
    expected = ["README.md", "labelling.tiny.train.json", f"small/{other.name}", *shards]
    assert sorted(set(names) - {".gitattributes"}) == expected
    pulled = datasets.load_dataset("acme/label-push", "tiny", split="train")
    assert pulled["whisper_transcript"][:] == labels(whole)
    text = Path(api.hf_hub_download("acme/label-push", "README.md", repo_type="dataset")).read_text()
    assert len(datasets.load_dataset("acme/label-push", "small", split="train")) == 24
    assert "# Mine" in text
    assert f"| teacher | {tiny_teacher.name} |" in text


def test_a_push_that_fails_is_done_by_the_same_command_again(whole, tiny_teacher, loaded, tmp_path, hub):
    output = shutil.copytree(whole, tmp_path / "out")
    flags = arguments(tiny_teacher, loaded, output, *TWELVE, "--hub_model_id", "acme/label-again")
    hub.fault(r"/api/datasets/acme/label-again/commit/.*", method="POST", times=50, status=403)
    with pytest.raises(SystemExit, match=r"the push to acme/label-again failed.*Run the same command again"):
        script.main(flags)
    assert files(output) == files(whole)
    hub.faults.clear()
    assert script.main(flags) == 0
    pulled = datasets.load_dataset("acme/label-again", "tiny", split="train")
    assert pulled["whisper_transcript"][:] == labels(whole)


def test_a_conflict_without_an_address_is_one_line_and_the_same_command_goes_on(tiny_teacher, loaded, tmp_path, hub):
    flags = arguments(tiny_teacher, loaded, tmp_path, "--max_samples", 2, "--hub_model_id", "acme/label-conflict")
    hub.fault("/api/repos/create", method="POST", status=409)
    with pytest.raises(SystemExit, match=r"acme/label-conflict: the Hub's answer lacks 'url'\. Run"):
        script.main(flags)
    assert script.main(flags) == 0
    assert len(datasets.load_dataset("acme/label-conflict", "tiny", split="train")) == 2


@pytest.mark.parametrize("token", ["hf_read", "hf_wrong", None])
def test_a_token_that_cannot_write_is_found_before_any_work(tiny_teacher, tmp_path, hub, monkeypatch, token):
    script.HfApi().create_repo("acme/label-token", repo_type="dataset", private=False, exist_ok=True)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match=r"the dataset repository acme/label-token failed.*hf auth login"):
        script.main(
            arguments(tiny_teacher, "no_such_loader.py", tmp_path / "out", "--hub_model_id", "acme/label-token")
        )
    assert not (tmp_path / "out").exists()


def test_a_push_without_the_name_of_a_repository_is_refused_before_any_work(tiny_teacher, tmp_path):
    with pytest.raises(SystemExit, match="--push_to_hub needs --hub_model_id, the dataset repository to push to"):
        script.main(arguments(tiny_teacher, "no_such_loader.py", tmp_path / "out", "--push_to_hub"))
    assert not (tmp_path / "out").exists()


def test_a_local_directory_as_hub_model_id_and_push_to_hub_false_push_nothing(
    whole, tiny_teacher, loaded, tmp_path, hub
):
    output = shutil.copytree(whole, tmp_path / "out")
    assert script.main(arguments(tiny_teacher, loaded, output, *TWELVE, "--hub_model_id", output)) == 0
    flags = ("--hub_model_id", "acme/label-not", "--push_to_hub", "False")
    assert script.main(arguments(tiny_teacher, loaded, output, *TWELVE, *flags)) == 0
    assert not script.HfApi().repo_exists("acme/label-not", repo_type="dataset")


@pytest.mark.parametrize(
    ("tracker", "warning"),
    [("wandb", "wandb has no login"), ("trackio", "--report_to trackio does not work and is left out")],
)
def test_a_tracker_that_cannot_be_had_stops_nothing(
    whole, tiny_teacher, loaded, tmp_path, monkeypatch, caplog, tracker, warning
):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # forget the mode that an earlier test has set
    flags = arguments(tiny_teacher, loaded, tmp_path / "out", *TWELVE, "--report_to", tracker)
    with caplog.at_level(logging.WARNING):
        assert script.main(flags) == 0
    assert caplog.text.count(warning) == 1
    assert labels(tmp_path / "out") == labels(whole)


def test_a_tracker_gets_how_many_clips_are_done_and_how_many_hours_are_left(
    tiny_teacher, loaded, tmp_path, monkeypatch
):
    reports = []
    monkeypatch.setattr(script, "track", lambda accelerator, values, step: reports.append((step, values)))
    assert script.main(arguments(tiny_teacher, loaded, tmp_path, *TWELVE, "--logging_steps", 2)) == 0
    assert [(step, values["clips"]) for step, values in reports] == [(2, 6), (4, 12)]  # batches of three clips
    for _, values in reports:
        left = (12 - values["clips"]) / values["clips_per_second"]
        assert values["hours_left"] == pytest.approx(left / 3600)


def test_an_interrupt_ends_with_130_and_no_traceback(tiny_teacher, loaded, tmp_path):
    command = [sys.executable, script.__file__, *arguments(tiny_teacher, loaded, tmp_path, "--shard_size", 2)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for_shards(tmp_path, 1, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
