"""The sandbox's corpus against ReazonSpeech's layout, and the conversion of the real teacher's weights."""

import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import ctranslate2
import pytest
import soundfile
import torch
from huggingface_hub import HfApi
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

from tests.sandbox import base_teacher
from tests.sandbox import corpus as corpus_module
from tests.sandbox.corpus import VOICES, Clip, build_corpus, cache_directory, speak
from tests.sandbox.sentences import PATTERNS, WRITTEN, sentences

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"000": 1, "00b": 1, "fff": 1}


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("small") / "corpus", SMALL)


def read_tsv(path: Path) -> list[tuple[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return [tuple(row) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def members(path: Path) -> list[str]:
    with tarfile.open(path, "r:") as tar:  # "r:" refuses compressed files
        return tar.getnames()


# The sentences


def test_the_demo_has_400_distinct_sentences_and_more():
    assert len(set(sentences(600))) == 600
    assert len(set(WRITTEN)) == len(WRITTEN) >= 300


def test_sentences_are_3_to_100_characters_long():
    lengths = sorted(map(len, sentences(464)))
    assert lengths[0] == 3
    assert 90 <= lengths[-1] <= 100
    assert 15 <= lengths[len(lengths) // 2] <= 25


@pytest.mark.parametrize(
    ("kind", "pattern"),
    {"kanji": "[一-鿿]", "hiragana": "[ぁ-ん]", "katakana": "[ァ-ヴ]", "digits": "[0-9]", "latin": "[A-Za-z]"}.items(),
)
def test_every_kind_of_character_is_in_many_sentences_and_in_the_first_26(kind, pattern):
    # 26: what a corpus of 24 clips takes
    assert sum(bool(re.search(pattern, sentence)) for sentence in sentences(464)) >= 25
    assert any(re.search(pattern, sentence) for sentence in sentences(26))


def test_sentences_have_punctuation_and_fit_a_line_of_a_tsv():
    for sentence in sentences(600):
        assert sentence[-1] in "。？！、"
        assert not set('\t\n\r"{}') & set(sentence)
        assert sentence == sentence.strip()


def test_fewer_sentences_are_the_beginning_of_more():
    assert sentences(600)[:32] == sentences(32)


def test_the_grammar_goes_on_and_does_not_repeat_a_word_of_a_slot():
    many = sentences(2000)
    assert len(set(many)) == 2000
    twice = [pattern for pattern in PATTERNS if pattern.count("{city}") == 2]
    assert twice
    assert not [sentence for sentence in many if re.match(r"(\w+)から\1まで", sentence)]


# The layout


def test_a_tar_has_its_clips_and_one_without_transcription(corpus):
    for stem, clips in {"000": 24, "fff": 8}.items():
        names = {name.removeprefix("./") for name in members(corpus / "data" / f"{stem}.tar")}
        assert len(names) == clips + 1
        assert all(re.fullmatch(rf"{stem}/[0-9a-f]{{13}}\.flac", name) for name in names)
        transcribed = {name for name, _ in read_tsv(corpus / "tsv" / "all.tsv") if name.startswith(stem)}
        assert len(names & transcribed) == clips
        assert len(transcribed - names) == 1


def test_some_names_of_the_first_tar_begin_with_a_dot(corpus):
    assert sum(name.startswith("./") for name in members(corpus / "data" / "000.tar")) == 6
    assert not any(name.startswith("./") for name in members(corpus / "data" / "fff.tar"))


def test_tars_are_ustar_and_not_in_the_order_of_the_tsv(corpus):
    assert (corpus / "data" / "000.tar").read_bytes()[257:263] == b"ustar\0"
    names = [name.removeprefix("./") for name in members(corpus / "data" / "000.tar")]
    assert names != sorted(names)


def test_clips_are_mono_flac_at_16_khz(clips):
    for clip in clips:
        info = soundfile.info(io.BytesIO(clip["audio"]))
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16000, 1)
        assert 0.5 < info.duration < 10
        samples, _ = soundfile.read(io.BytesIO(clip["audio"]))
        assert 0.2 < abs(samples).max() < 0.95


def test_a_subset_is_the_tars_it_has_in_reazonspeech(small_corpus):
    stems = {
        path.stem: sorted({name.split("/")[0] for name, _ in read_tsv(path)})
        for path in (small_corpus / "tsv").iterdir()
    }
    first_twelve = ["000", "00b"]
    assert stems == {
        "tiny": ["000"],
        "small": first_twelve,
        "medium": first_twelve,
        "large": first_twelve,
        "all": ["000", "00b", "fff"],
    }


def test_tsvs_are_in_the_order_of_the_names_and_no_sentence_is_in_two_tars(corpus):
    rows = read_tsv(corpus / "tsv" / "all.tsv")
    assert rows == sorted(rows)
    assert len({text for _, text in rows}) == len(rows)
    assert b"\r" not in (corpus / "tsv" / "all.tsv").read_bytes()


# The build


def test_the_same_call_gives_the_same_bytes_also_from_two_processes_at_once(small_corpus, tmp_path):
    arguments = [f"{stem}={clips}" for stem, clips in SMALL.items()]
    command = [sys.executable, "-m", "tests.sandbox.corpus", tmp_path / "again", "--clips", *arguments]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    again = {path.relative_to(tmp_path / "again"): path for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert len(again) == 5 + 3 + 1  # TSVs, tars, the recipe
    for name, path in again.items():
        assert path.read_bytes() == (small_corpus / name).read_bytes(), name
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_what_is_built_is_used_again_until_the_recipe_changes(small_corpus, tmp_path, monkeypatch):
    root = shutil.copytree(small_corpus, tmp_path / "corpus")

    def write(directory: Path, plan: dict) -> None:
        (directory / "written").touch()

    monkeypatch.setattr(corpus_module, "write_corpus", write)
    build_corpus(root, SMALL)
    assert (root / "data" / "000.tar").exists()
    monkeypatch.setattr(corpus_module, "VERSION", corpus_module.VERSION + 1)
    build_corpus(root, SMALL)
    assert (root / "written").exists()
    assert not (root / "data").exists()


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("my only copy")
    with pytest.raises(FileExistsError, match="no corpus"):
        build_corpus(tmp_path, SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "my only copy"


def test_voices_differ_in_speed_and_pitch(corpus):
    speeds, pitches = zip(*VOICES.values(), strict=True)
    assert max(speeds) / min(speeds) > 1.3
    assert max(pitches) - min(pitches) >= 9  # half tones
    clip = Clip("000", sentences(1)[0])
    assert speak(clip) == speak(clip)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("KOTOBA_SANDBOX_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    assert cache_directory().is_dir()
    monkeypatch.delenv("KOTOBA_SANDBOX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "kotoba-whisper-sandbox"


# The real teacher


@pytest.fixture(scope="module")
def ctranslate2_teacher(tiny_teacher, tmp_path_factory) -> Path:
    """The tiny teacher as CTranslate2's own converter writes it."""
    directory = tmp_path_factory.mktemp("ct2") / "model"
    converter = ctranslate2.converters.TransformersConverter(str(tiny_teacher), copy_files=["tokenizer.json"])
    converter.convert(str(directory))
    return directory


def test_the_conversion_from_ctranslate2_gives_the_model_that_went_into_it(
    ctranslate2_teacher, tiny_teacher, tmp_path, clips
):
    base_teacher.convert(ctranslate2_teacher, tmp_path)
    original = WhisperForConditionalGeneration.from_pretrained(tiny_teacher, dtype=torch.float32)
    converted = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert converted.dtype == torch.float32
    assert converted.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name

    theirs, ours = WhisperProcessor.from_pretrained(tiny_teacher), WhisperProcessor.from_pretrained(tmp_path)
    texts = [clip["transcription"] for clip in clips]
    assert ours.tokenizer(texts).input_ids == theirs.tokenizer(texts).input_ids
    names = ["<|ja|>", "<|transcribe|>", "<|notimestamps|>", "<|0.00|>", "<|30.00|>"]
    assert ours.tokenizer.convert_tokens_to_ids(names) == theirs.tokenizer.convert_tokens_to_ids(names)

    samples, rate = soundfile.read(io.BytesIO(clips[0]["audio"]))
    generated = [
        model.generate(
            processor.feature_extractor(samples, sampling_rate=rate, return_tensors="pt").input_features,
            language="ja",
            task="transcribe",
            max_new_tokens=20,
            force_unique_generate_call=True,
        )
        for model, processor in ((original, theirs), (converted, ours))
    ]
    assert torch.equal(*generated)


def test_the_conversion_writes_what_every_reader_of_whisper_looks_for(ctranslate2_teacher, tiny_teacher, tmp_path):
    base_teacher.convert(ctranslate2_teacher, tmp_path)
    needed = {
        *("model.safetensors", "config.json", "generation_config.json", "preprocessor_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    }
    assert needed <= {path.name for path in tmp_path.iterdir()}
    theirs, ours = GenerationConfig.from_pretrained(tiny_teacher), GenerationConfig.from_pretrained(tmp_path)
    for name in ("alignment_heads", "lang_to_id", "task_to_id", "no_timestamps_token_id", "decoder_start_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_damaged_model_file_is_refused(ctranslate2_teacher, tmp_path):
    content = (ctranslate2_teacher / "model.bin").read_bytes()
    for name, damaged in {"longer": content + b"x", "newer": b"\x07" + content[1:]}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=name):
            base_teacher.read_variables(tmp_path / name)
    with pytest.raises(RuntimeError, match="SHA-256"):
        base_teacher.check_sha256(ctranslate2_teacher / "model.bin", base_teacher.MODEL_BIN_SHA256)


def test_without_pypi_the_files_come_from_the_hub_and_others_are_refused(hub, tiny_teacher, tmp_path, monkeypatch):
    HfApi().create_repo("acme/whisper-base")
    HfApi().upload_folder(repo_id="acme/whisper-base", folder_path=tiny_teacher)
    monkeypatch.setattr(base_teacher, "PIP", [sys.executable, "-c", "raise SystemExit('no index')"])
    monkeypatch.setattr(base_teacher, "HUB", hub.url)
    monkeypatch.setattr(base_teacher, "REPOSITORY", "acme/whisper-base")
    with pytest.raises(RuntimeError, match="not openai/whisper-base's"):
        base_teacher.whisper_base(tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()
    sha256 = hashlib.sha256((tiny_teacher / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(base_teacher, "WEIGHTS_SHA256", sha256)
    teacher = base_teacher.whisper_base(tmp_path / "teacher")
    assert (teacher / "model.safetensors").read_bytes() == (tiny_teacher / "model.safetensors").read_bytes()
    assert {path.name for path in tiny_teacher.iterdir()} == {path.name for path in teacher.iterdir()}
