"""run_short_form_eval.py: the scorers and figures on strings, then the script on tiny teachers and real files."""

import argparse
import csv
import functools
import importlib.metadata
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download, parse_eval_result_entries
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

import run_data_filtering
import run_distillation
import run_short_form_eval as evaluation
from tests import stages
from tests.stages import samples_of, stock_text

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "run_short_form_eval.py"
# `--cpu` would start only one.
PROCESSES = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
PROCESSES += ["--mixed_precision", "no", "--dynamo_backend", "no"]

kotoba = evaluation.scoring_rule("kotoba", "ja", None)
KOTOBA = [evaluation.Scorer("kotoba", "characters", kotoba)]


def score(references: list[str], hypotheses: list[str], scorers: list) -> tuple[dict, list[dict]]:
    """The metrics of predictions, and the predictions with their own figures."""
    predictions = []
    for number, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        predictions.append({"id": str(number), "problem": None, "reference": reference, "hypothesis": hypothesis})
    return evaluation.score_predictions(predictions, scorers), predictions


# ------------------------------------------------------------------------------------------------------------- strings


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("ＡＢＣ　ＸＹＺ", "abcxyz"),  # full-width forms, and a full-width space
        ("ｶﾞｷﾞ", "ガギ"),  # half-width kana with a voicing mark of its own
        ("ハ\u3099\u30cf\u309a", "バパ"),  # decomposed
        ("コーヒー、スーパー", "コーヒースーパー"),  # prolonged sound marks are letters
        ("え〜っと…", "えっと"),  # wave dashes are not
        ("１２３と123と一二三", "123と123と一二三"),  # digits in three scripts
        ("、。！？「」・…", ""),
        ("いいね👍❤️です", "いいねです"),
        ("Wi-Fiの SSID", "wifiのssid"),
        ("[音楽]はい(笑)、<noise>どうぞ", "はいどうぞ"),  # what is in ASCII brackets is not speech
        ("（笑）", "笑"),  # what is in Japanese ones is
    ],
)
def test_kotoba_normalises_as_the_published_figures(text, normalised):
    assert kotoba(text) == normalised


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("「１２３円」です。", "百二十三円です"),
        ("ＡＢＣとabc、Ｚｚ！", "ABCとabcZz"),
        ("3.14は円周率", "三点一四は円周率"),
        ("第007話", "第七話"),
        ("（笑）コーヒー・バー", "（笑）コーヒー・バー"),  # its list of marks is short
    ],
)
def test_reazon_normalises_as_the_corpus_project_does(text, normalised):
    assert evaluation.normalise_reazon(text) == normalised


def test_whisper_normalises_english_by_its_own_rule_and_other_languages_by_the_basic_one():
    english = evaluation.scoring_rule("whisper", "en", {"colour": "color"})
    assert english("The colour of twenty-one cats, isn't it?") == "the color of 21 cats is not it"
    assert evaluation.scoring_rule("whisper", "en", None)(" Colour ") == "colour"
    assert evaluation.scoring_rule("whisper", "fr", None)("Ça, c'est l'été !") == "ça c est l été"


MIXED_TEXTS = [
    "今日は、晴れ。",
    "ＡＩが、８８％ です！",
    "Wi-Fiの SSID　を",
    "你好， 世界 。",
    "ว่า ดี ครับ",
    "The colour, isn't it?",
]


@pytest.mark.parametrize("language", ["ja", "zh", "th", "en", "fr"])
def test_filter_training_and_evaluation_score_by_one_rule(language):
    scorer = "kotoba" if language in ("ja", "zh", "th") else "whisper"
    spellings = {"colour": "color"}
    rule = evaluation.scoring_rule(scorer, language, spellings)
    for script in (run_data_filtering, run_distillation):
        other = script.text_normaliser(language, spellings)
        assert [other(text) for text in MIXED_TEXTS] == [rule(text) for text in MIXED_TEXTS]


@pytest.mark.parametrize(
    ("language", "scorer"),
    [("ja", "kotoba"), ("Chinese", "kotoba"), ("th", "kotoba"), ("en", "whisper"), ("fr", "whisper")],
)
def test_a_language_without_spaces_is_scored_without_them_unless_told_otherwise(language, scorer):
    args = evaluation.parse_args(["--model_name_or_path", "m", "--dataset_name", "d", "--language", language])
    assert args.scorer == scorer


@pytest.mark.parametrize("language", ["zh", "th", "ja"])
def test_spaces_of_chinese_and_thai_are_no_errors_but_by_whisper_s_own_rule(language):
    for scorer, rate in (("kotoba", 0), ("whisper", 50)):
        rule = evaluation.scoring_rule(scorer, language, None)
        metrics, _ = score(["你好"], ["你 好"], [evaluation.Scorer(scorer, "characters", rule)])
        assert metrics["cer"] == rate


# What num2words 0.5.14 gives for Japanese, which ReazonSpeech's scorer uses.
@pytest.mark.parametrize(
    ("number", "reading"),
    {
        "0": "零", "10": "十", "11": "十一", "100": "百", "110": "百十", "1001": "千一", "1100": "千百",
        "2024": "二千二十四", "10000": "一万", "11000": "一万千", "20000": "二万",
        "12345678": "千二百三十四万五千六百七十八",
        "100000000": "一億", "1000000000000": "一兆", "100000000000000000000": "一垓", "01": "一", "10.": "十",
        "1.5": "一点五", "0.05": "零点零五", "1.10": "一点一", "2.0": "二",
        "12345678901234567890123": "百二十三垓四千五百六十七京八千九百一兆二千三百四十五億六千七百八十九万百二十三",
    }.items(),
)  # fmt: skip
def test_numbers_are_read_as_by_num2words(number, reading):
    assert evaluation.read_number(number) == reading


def parse_kanji(text: str) -> int:
    """An independent way back: 千 before 百 before 十 in groups that end with a power of 10,000."""
    total, group, digit = 0, 0, 0
    for character in text:
        if character in evaluation.DIGITS:
            digit = evaluation.DIGITS.index(character)
        elif character in "十百千":
            group, digit = group + max(1, digit) * 10 ** ("十百千".index(character) + 1), 0
        else:
            total, group, digit = total + (group + digit) * 10_000 ** evaluation.POWERS.index(character), 0, 0
    return total + group + digit


@given(st.integers(0, 10**52 - 1))
def test_a_number_that_is_read_can_be_written_again(number):
    assert parse_kanji(evaluation.read_number(str(number))) == number


def test_a_number_without_a_name_is_read_digit_by_digit():
    assert evaluation.read_number("1" * 60) == "一" * 60


# ------------------------------------------------------------------------------------------------------------- figures


def edit_distance(reference, hypothesis) -> int:
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, said in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != said))
    return row[-1]


def words(text: str) -> list[str]:
    return [word for word in re.sub(r"\s\s+", " ", text.strip()).split(" ") if word]


TEXTS = st.text("あいガｶﾞー漢字1２ab 、。👍\u3099", max_size=40)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8))
def test_counts_and_rates_are_those_of_an_independent_edit_distance(pairs):
    pairs = [("漢字", "漢"), *pairs]
    metrics, rows = score([pair[0] for pair in pairs], [pair[1] for pair in pairs], KOTOBA)
    kept = [pair for pair in pairs if kotoba(pair[0])]
    units = {
        "cer": [(kotoba(reference), kotoba(hypothesis)) for reference, hypothesis in kept],
        "wer": [(words(kotoba(reference)), words(kotoba(hypothesis))) for reference, hypothesis in kept],
        "cer_raw": [(reference.strip(), hypothesis.strip()) for reference, hypothesis in kept],
        "wer_raw": [(words(reference), words(hypothesis)) for reference, hypothesis in kept],
    }
    for name, sides in units.items():
        cell, length = metrics["details"][name], sum(len(reference) for reference, _ in sides)
        errors = cell["substitutions"] + cell["deletions"] + cell["insertions"]
        assert errors == sum(edit_distance(*side) for side in sides)
        assert cell["reference"] == length
        assert cell["insertions"] - cell["deletions"] == sum(len(hypothesis) for _, hypothesis in sides) - length
        assert metrics[name] == cell["rate"] == pytest.approx(100 * errors / length)
    assert metrics["clips"] == len(kept) == len(pairs) - metrics["empty_references"]
    scored = [row for row in rows if "cer" in row]
    for row, side in zip(scored, units["cer"], strict=True):
        errors = sum(row[f"character_{kind}"] for kind in ("substitutions", "deletions", "insertions"))
        assert errors == edit_distance(*side)
        assert row["cer"] == round(100 * errors / len(side[0]), 2)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "substitutions", "deletions", "insertions", "length"),
    [
        ("がっこう", "か\u3099っこう", 0, 0, 0, 4),  # composed and decomposed are one
        ("ＡＩが、８８％。", "aiが88", 0, 0, 0, 5),
        ("コーヒーを飲む", "コヒーを飲みむ", 0, 1, 1, 7),
        ("三時に", "3時に", 1, 0, 0, 3),  # kotoba does not read numbers out
        ("はい", "", 0, 2, 0, 2),
        ("はい", "、。", 0, 2, 0, 2),
        ("笑った😂", "笑った", 0, 0, 0, 3),
    ],
)
def test_fixed_strings_have_known_counts(reference, hypothesis, substitutions, deletions, insertions, length):
    _, (row,) = score([reference], [hypothesis], KOTOBA)
    assert [row[f"character_{name}"] for name in evaluation.COUNTS] == [substitutions, deletions, insertions, length]


def test_unsegmented_japanese_has_the_share_of_wrong_clips_for_a_word_error_rate():
    references = ["今日は、晴れ。", "明日は、雨。", "はい。", "いいえ。"]
    metrics, _ = score(references, ["今日は晴れ", "明日は雪", "はい", ""], KOTOBA)
    assert metrics["wer"] == 50
    assert metrics["details"]["wer"]["reference"] == 4


def test_an_empty_reference_is_left_out_of_raw_and_normalised_rates_and_counted():
    metrics, rows = score(["、。", "はい"], ["長い間違い", "はい"], KOTOBA)
    assert [metrics[name] for name in evaluation.METRICS] == [0, 0, 0, 0]
    assert (metrics["clips"], metrics["empty_references"]) == (1, 1)
    assert "cer" not in rows[0]


def test_a_runaway_output_is_longer_than_twice_the_reference_plus_ten_both_without_punctuation():
    hypotheses = ["あ" * 16, "あ" * 17, "あ、" * 16, "あ、" * 17]
    metrics, rows = score(["あ、い、う。"] * 4, hypotheses, KOTOBA)
    assert [row["runaway"] for row in rows] == [False, True, False, True]
    assert metrics["runaways"] == 2


def test_rates_by_length_are_the_rates_of_the_clips_of_that_length_alone():
    lengths = (1, 7, 8, 15, 16, 31, 32, 63, 64, 95, 96, 200)
    references = ["あ" * length for length in lengths]
    hypotheses = ["あ" * (length - 1) + "い" for length in lengths]
    metrics, _ = score(references, hypotheses, KOTOBA)
    assert [group["characters"] for group in metrics["by_length"]] == [
        [0, 7], [8, 15], [16, 31], [32, 63], [64, 95], [96, None]
    ]  # fmt: skip
    for group, pair in zip(metrics["by_length"], zip(lengths[::2], lengths[1::2], strict=True), strict=True):
        assert group["clips"] == 2
        for name in evaluation.METRICS:
            assert group[name]["substitutions"] == 2
        assert group["cer"]["rate"] == pytest.approx(200 / sum(pair))
        assert group["cer"]["low"] <= group["cer"]["rate"] <= group["cer"]["high"]


def test_the_interval_is_that_of_a_direct_bootstrap():
    random = np.random.default_rng(5)
    references = ["あ" * int(length) for length in random.integers(1, 60, 300)]
    hypotheses = ["".join(random.choice(["あ", "い"], p=[0.8, 0.2]) for _ in reference) for reference in references]
    metrics, rows = score(references, hypotheses, KOTOBA)
    rates, generator = [], np.random.default_rng(0)
    for _ in range(evaluation.BOOTSTRAP_DRAWS):
        drawn = [rows[index] for index in generator.integers(0, 300, 300)]
        rates.append(
            100 * sum(r["character_substitutions"] for r in drawn) / sum(r["character_reference"] for r in drawn)
        )
    cell = metrics["details"]["cer"]
    assert [cell["low"], cell["high"]] == pytest.approx(np.percentile(rates, [2.5, 97.5]))
    deviation = 100 * np.sqrt(0.2 * 0.8 / cell["reference"])  # independent characters
    assert cell["high"] - cell["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.2)


def test_the_paired_test_sees_a_small_difference_that_intervals_hide():
    random = np.random.default_rng(3)
    lengths, errors = random.integers(5, 60, 400), random.integers(0, 20, 400)
    zero = np.zeros_like(errors)
    first = np.stack([errors, zero, zero, lengths], axis=1)
    better = np.stack([np.maximum(errors - (random.random(400) < 0.2), 0), zero, zero, lengths], axis=1)
    rates = evaluation.bootstrap(np.stack([first, better], axis=1))
    assert np.percentile(rates[:, 0], 2.5) < np.percentile(rates[:, 1], 97.5)
    difference, low, high, p = evaluation.paired_difference(first, better).values()
    assert difference == pytest.approx(100 * (better[:, 0].sum() - first[:, 0].sum()) / lengths.sum())
    assert low < difference < high < 0
    assert p == pytest.approx(2 / 1001)
    assert tuple(evaluation.paired_difference(first, first).values()) == (0, 0, 0, 1)


def test_ten_thousand_predictions_are_scored_in_seconds_and_not_in_minutes_of_cpu_time(clips):
    references = [clip["transcription"] for clip in clips] * 420
    hypotheses = [text[1:] + "ん" if index % 3 else text for index, text in enumerate(references)]
    started = time.process_time()
    score(references[:10_000], hypotheses[:10_000], KOTOBA)
    assert time.process_time() - started < 30  # 3 to 6 s on one core; counting pairs of clips would take minutes


# ------------------------------------------------------------------------------------------------------- other scorers


@pytest.fixture(scope="module")
def japanese() -> dict[str, evaluation.Scorer]:
    return {scorer.name: scorer for scorer in evaluation.make_scorers("kotoba", "ja", None)}


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("三時に会う", "3時に会う"),
        ("一万円です", "10,000円です"),
        ("百二十三人", "１２３人"),
        ("二千二十四年十二月", "2024年12月"),
        ("二十日", "20日"),
        ("一億二千万", "1億2000万"),
        ("五パーセント", "5%"),
        ("そう言った", "そういった"),
        ("警察", "ケイサツ"),
        ("東京", "とうきょう"),
        ("続く", "つずく"),
        ("一緒に食べ物を", "いっしょにたべものを"),
        ("はい（笑）、どうぞ。", "はい どうぞ"),
    ],
)
def test_what_is_read_alike_is_equal_by_its_reading(japanese, reference, hypothesis):
    read = japanese["readings"].normalise
    assert read(reference) == read(hypothesis) != ""


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("三時", "二時"),
        ("一万円", "千円"),
        ("学校", "学生"),
        ("おばさん", "おばあさん"),
        ("ビル", "ビール"),
        ("病院", "美容院"),
    ],
)
def test_what_is_read_differently_stays_different(japanese, reference, hypothesis):
    read = japanese["readings"].normalise
    assert read(reference) != read(hypothesis)


def test_words_are_counted_where_none_are_written(japanese):
    counts = evaluation.count_errors(*map(japanese["words"].normalise, ("今日は、晴れです。", "今日は雨です")), "words")
    assert counts == [1, 0, 0, 4]


def test_a_text_of_any_length_and_of_any_characters_can_be_scored(japanese):
    text = "漢字とカナ、123。" * 8_000
    for name in ("readings", "words"):
        assert len(japanese[name].normalise(text)) > 50_000
        for odd in ("", " ", "\x00", "👍", "ö", "\u3099", "한국어", "\n\n"):
            assert isinstance(japanese[name].normalise(odd), str)


def test_all_scorers_rate_the_same_predictions_and_the_first_is_the_headline():
    references = ["三時に会う。", "そう言った。", "犬が好き。"]
    hypotheses = ["3時に会う。", "そういった。", "猫が好き。"]
    metrics, rows = score(references, hypotheses, evaluation.make_scorers("kotoba", "ja", None))
    scores = metrics["scores"]
    assert list(scores) == ["kotoba", "reazon", "whisper", "readings", "words"]
    assert [scores[name]["unit"] for name in scores] == ["characters"] * 4 + ["words"]
    assert scores["kotoba"]["rate"] == metrics["cer"] == pytest.approx(100 * 3 / 14)
    assert scores["reazon"]["rate"] == pytest.approx(100 * 2 / 14)  # which reads 3 out
    assert [row["readings_errors"] for row in rows] == [0, 0, 2]  # イヌ, ネコ
    for name, summary in scores.items():
        assert summary["reference"] == sum(row[f"{name}_reference"] for row in rows)
        assert summary["low"] <= summary["rate"] <= summary["high"]


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("zh", {"kotoba": "characters", "whisper": "characters"}),
        ("th", {"kotoba": "characters", "whisper": "characters"}),
        ("ko", {"whisper": "characters", "kotoba": "characters"}),
        ("de", {"whisper": "words", "characters": "characters"}),
        ("en", {"whisper": "words", "characters": "characters"}),
    ],
)
def test_other_languages_are_scored_by_character_or_by_word_as_they_are_written(language, expected):
    headline = evaluation.parse_args(["--predictions", "x.csv", "--language", language]).scorer
    scorers = evaluation.make_scorers(headline, language, None)
    assert {scorer.name: scorer.unit for scorer in scorers} == expected
    assert [scorer.name for scorer in scorers] == list(expected)


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [("pyopenjtalk", "readings", "pyopenjtalk-plus"), ("sudachipy", "words", "sudachipy sudachidict_core")],
)
def test_a_scorer_without_its_package_is_left_out_in_one_line_and_the_others_stay(
    monkeypatch, caplog, module, name, package
):
    monkeypatch.setitem(sys.modules, module, None)
    scorers = [scorer.name for scorer in evaluation.make_scorers("kotoba", "ja", None)]
    assert scorers == [other for other in ("kotoba", "reazon", "whisper", "readings", "words") if other != name]
    (record,) = caplog.records
    assert record.getMessage() == f"the scorer {name} is left out: it needs `pip install {package}`"


def test_what_is_said_where_nobody_speaks_is_counted():
    metrics, _ = score(["", "、。", "", "はい"], ["ご視聴", "", "ん", "はい"], KOTOBA)
    assert metrics["silence"] == {"clips_with_text": 2, "characters": 4}
    assert (metrics["empty_references"], metrics["clips"], metrics["cer"]) == (3, 1, 0)
    metrics, _ = score(["あ"] * 4 + ["、"], ["あ", "い" * 99, "あ", "あ", ""], KOTOBA)
    assert (metrics["runaways"], metrics["runaway_rate"]) == (1, 25)


def test_the_differences_that_occur_most_are_counted_with_examples():
    texts = [
        ("三時三分", "3時3分"),
        ("三日", "3日"),
        ("はい", "い"),
        ("三つ", "3つ"),
        ("一万円", "10000円"),
        ("犬", "犬だ"),
    ]
    predictions = [
        {"id": str(number), "problem": None, "reference": reference, "hypothesis": hypothesis}
        for number, (reference, hypothesis) in enumerate([*texts, ("三", "3"), ("", "無")])
    ]
    metrics = evaluation.score_predictions(predictions, KOTOBA)
    first, *others = metrics["confusions"]
    assert first == {
        "kind": "substitution", "reference": "三", "hypothesis": "3", "count": 5, "clips": ["0", "1", "3"]
    }  # fmt: skip
    assert [tuple(other.values())[:4] for other in others] == [
        ("deletion", "は", "", 1), ("substitution", "一万", "10000", 1), ("insertion", "", "だ", 1)
    ]  # fmt: skip


@given(TEXTS, TEXTS)
def test_both_texts_are_whole_in_their_alignment(reference, hypothesis):
    pieces = evaluation.align_texts(kotoba(reference), kotoba(hypothesis), "characters")
    assert "".join(piece[0] for piece in pieces) == kotoba(reference)
    assert "".join(piece[1] for piece in pieces) == kotoba(hypothesis)
    differ = [expected != predicted for expected, predicted in pieces]
    assert not any(first and second for first, second in itertools.pairwise(differ))


# ------------------------------------------------------------------------------------------------------------ the world


def evaluate(teacher, dataset, output_dir, *flags, name: str = "train", dtype: str | None = "float32") -> dict:
    """Run the script on `dataset` (config tiny, split train where it has them); returns the metrics."""
    arguments = ["--model_name_or_path", str(teacher), "--dataset_name", str(dataset), "--output_dir", str(output_dir)]
    columns = ["--dataset_split_name", "train", "--text_column_name", "transcription", "--generation_max_length", "16"]
    config = [] if str(dataset).endswith((".csv", ".tsv", ".jsonl")) else ["--dataset_config_name", "tiny"]
    precision = ["--dtype", dtype] if dtype else []
    assert evaluation.main([*arguments, *columns, *config, *precision, *flags]) == 0
    return json.loads((output_dir / f"metric.{name}.json").read_text(encoding="utf-8"))


def command(teacher, dataset, output_dir, *flags) -> list[str]:
    return [
        *(str(SCRIPT), "--model_name_or_path", str(teacher), "--dataset_name", str(dataset)),
        *("--output_dir", str(output_dir), "--dataset_config_name", "tiny", "--dataset_split_name", "train"),
        *("--text_column_name", "transcription", "--generation_max_length", "16", "--dtype", "float32", *flags),
    ]


def predictions(output_dir: Path, which: str = "all", name: str = "train") -> list[dict]:
    with open(output_dir / f"{which}_predictions.{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_dataset(root: Path, rows: list[dict], like: Path) -> Path:
    """A dataset directory with these rows, and the columns and the card of another."""
    table = pq.read_table(next((like / "tiny").glob("*.parquet")))
    (root / "tiny").mkdir(parents=True)
    shutil.copy(like / "README.md", root)
    pq.write_table(
        table.schema.empty_table().from_pylist(rows, table.schema), root / "tiny/train-00000-of-00001.parquet"
    )
    return root


def wave(seconds: float, rate: int = 16_000, channels: int = 1) -> bytes:
    time_axis = np.arange(round(seconds * rate)) / rate
    samples = np.stack(
        [0.3 * np.sin(2 * np.pi * 220 * (channel + 1) * time_axis) for channel in range(channels)], axis=1
    )
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def mp3_without_length() -> bytes:
    """An MP3 of 15 s that says nothing of its length: readers guess it from the first frames, here at over 30 s."""
    noise = np.random.default_rng(0).uniform(-1, 1, 10 * 16_000)
    file = io.BytesIO()
    soundfile.write(file, np.append(np.zeros(5 * 16_000), noise), 16_000, format="MP3", bitrate_mode="VARIABLE")
    content = file.getvalue()
    content = content[content.index(content[:2], 4) :]  # without the first frame, which counts the others
    assert soundfile.info(io.BytesIO(content)).duration > 30
    return content


def row(name: str, audio: bytes | None, transcription: str | None) -> dict:
    return {"name": name, "audio": {"bytes": audio, "path": name}, "transcription": transcription}


@pytest.fixture(scope="session")
def evaluated(tiny_teacher, loaded, tmp_path_factory) -> Path:
    """The results of the tiny teacher on the loaded clips."""
    output_dir = tmp_path_factory.mktemp("evaluated")
    evaluate(tiny_teacher, loaded, output_dir, "--id_column_name", "name")
    return output_dir


def test_a_clip_may_have_the_number_0_as_its_id(tiny_teacher, tmp_path):
    rows = [{"audio": stages.tone(0.5), "name": number, "transcription": "あ"} for number in (1, 0)]
    data = stages.write_dataset(tmp_path / "data", rows)
    output = stages.evaluate(tiny_teacher, data, tmp_path / "out")
    assert [row["id"] for row in stages.read_predictions(output)] == ["1", "0"]


def test_every_clip_has_a_row_in_the_dataset_s_order_and_the_rows_add_up_to_the_metrics(evaluated, clips):
    rows = predictions(evaluated)
    metrics = json.loads((evaluated / "metric.train.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in rows] == [clip["name"] for clip in clips]
    assert [row["reference"] for row in rows] == [clip["transcription"] for clip in clips]
    for unit, name in (("character", "cer"), ("word", "wer")):
        for count in evaluation.COUNTS:
            assert metrics["details"][name][count] == sum(int(row[f"{unit}_{count}"]) for row in rows)
    seconds = sum(soundfile.info(io.BytesIO(clip["audio"])).duration for clip in clips)
    assert metrics["audio_seconds"] == pytest.approx(seconds, abs=0.1)
    assert metrics["real_time_factor"] == pytest.approx(metrics["process_seconds"] / seconds, rel=0.05)
    assert metrics["rtfx"] == pytest.approx(seconds / metrics["process_seconds"], rel=0.05)
    assert (metrics["dtype"], metrics["batch_size"]) == ("float32", "32")
    assert metrics["device"].startswith("CPU")
    assert metrics["clips_per_second"] == pytest.approx(len(clips) / metrics["process_seconds"], rel=0.05)
    incorrect = predictions(evaluated, "incorrect")
    assert incorrect == [row for row in rows if row["normalised_reference"] != row["normalised_hypothesis"]]
    assert incorrect


def test_the_texts_are_those_that_the_model_gives_for_one_clip_at_a_time(evaluated, tiny_teacher, clips):
    model = WhisperForConditionalGeneration.from_pretrained(tiny_teacher).eval()
    tokenizer = WhisperTokenizer.from_pretrained(tiny_teacher)
    extractor = WhisperFeatureExtractor.from_pretrained(tiny_teacher)
    texts = []
    for clip in clips[:6]:
        waveform, rate = soundfile.read(io.BytesIO(clip["audio"]), dtype="float32")
        features = extractor(waveform, sampling_rate=rate, return_tensors="pt").input_features
        with torch.inference_mode():
            tokens = model.generate(features, language="ja", task="transcribe", max_new_tokens=16)
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
    assert [row["hypothesis"] for row in predictions(evaluated)[:6]] == texts
    assert len(set(texts)) > 2


def test_an_empty_reference_can_be_scored_and_a_missing_one_cannot():
    args = argparse.Namespace(long_form=False, concatenate_audio=False)
    clip = evaluation.Clip(np.zeros(16_000, np.float32), 16_000, 1.0)
    assert evaluation.find_problem(clip, "", args) is None
    assert evaluation.find_problem(clip, None, args) == "no reference"


def test_the_space_that_whisper_writes_before_its_text_is_no_part_of_it(tiny_teacher, tmp_path):
    speaker = stages.speaking(tiny_teacher, tmp_path / "speaker", " Hello.")
    rules = json.loads((speaker / "generation_config.json").read_text())
    del rules["begin_suppress_tokens"]  # a space that is a token of its own is one of them
    (speaker / "generation_config.json").write_text(json.dumps(rules))
    data = stages.write_dataset(tmp_path / "data", [{"audio": stages.tone(1), "name": "a", "transcription": "Hello."}])
    output = stages.evaluate(speaker, data, tmp_path / "out", "--language", "en")
    assert [row["hypothesis"] for row in stages.read_predictions(output)] == ["Hello."]
    assert stages.read_metrics(output)["cer_raw"] == 0


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_an_unset_precision_is_the_one_that_the_device_computes_natively_and_is_recorded(
    native, dtype, tiny_teacher, loaded, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    metrics = evaluate(tiny_teacher, loaded, tmp_path, "--max_samples_per_split", "2", dtype=None)
    assert metrics["dtype"] == dtype


def test_the_metrics_name_the_versions_of_the_libraries_that_decide_them(evaluated):
    metrics = json.loads((evaluated / "metric.train.json").read_text(encoding="utf-8"))
    names = ("torch", "transformers", "datasets", "jiwer")
    assert metrics["versions"] == {name: importlib.metadata.version(name) for name in names}


def test_the_time_of_the_first_batch_does_not_count_in_the_rtfx(tiny_teacher, loaded, tmp_path, monkeypatch):
    clock, audio = [0.0], []

    def transcribe(recogniser, recordings):
        for index, recording in enumerate(recordings):
            if index % recogniser.decoder.batch_size == 0:
                clock[0] += 10 if audio else 1_000
                audio.append(0.0)
            audio[-1] += recording.seconds
            recording.hypothesis = "はい"
            yield recording

    monkeypatch.setattr(evaluation, "transcribe", transcribe)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock[0])
    metrics = evaluate(tiny_teacher, loaded, tmp_path / "two", "--per_device_eval_batch_size", "12")
    assert len(audio) == 2
    assert metrics["process_seconds"] == 1_010
    assert metrics["rtfx"] == pytest.approx(audio[1] / 10, abs=0.01)
    metrics = evaluate(tiny_teacher, loaded, tmp_path / "one", "--per_device_eval_batch_size", "24")
    assert metrics["rtfx"] == pytest.approx(audio[2] / 10, abs=0.01)  # the only batch
    parts = {tmp_path / "a": slice(9), tmp_path / "b": slice(9, None)}

    def plan(_directory, rows, *_settings):
        return {path: rows[part] for path, part in parts.items()}

    monkeypatch.setattr(evaluation, "plan_shards", plan)
    audio.clear()
    metrics = evaluate(tiny_teacher, loaded, tmp_path / "small shards", "--per_device_eval_batch_size", "24")
    assert metrics["rtfx"] == pytest.approx(audio[1] / 10, abs=0.01)


def test_an_evaluation_without_any_reference_says_so_before_it_loads_a_model(tiny_teacher, loaded, clips, tmp_path):
    rows = [row(clip["name"], clip["audio"], text) for clip, text in zip(clips, ("", None, "、。"), strict=False)]
    dataset = write_dataset(tmp_path / "data", rows, loaded)
    (tmp_path / "model").mkdir()  # of which nothing can be loaded
    with pytest.raises(SystemExit, match="nothing to score: every reference is empty after normalisation"):
        evaluate(tmp_path / "model", dataset, tmp_path / "results")


def test_a_second_run_keeps_what_the_model_said_and_can_score_it_by_another_rule(
    evaluated, tiny_teacher, loaded, tmp_path
):
    shutil.copytree(evaluated, tmp_path / "again")
    (shard,) = (tmp_path / "again/.predictions.train").glob("*.jsonl")
    before = shard.stat()
    metrics = evaluate(tiny_teacher, loaded, tmp_path / "again", "--id_column_name", "name", "--scorer", "reazon")
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert metrics["scorer"] == "reazon"
    hypotheses = [[row["hypothesis"] for row in predictions(path)] for path in (evaluated, tmp_path / "again")]
    assert hypotheses[0] == hypotheses[1]


@pytest.mark.parametrize("damage", ["text", "time", "not JSON", "no checksum"])
def test_a_damaged_shard_of_predictions_is_named_and_made_again_with_the_same_rates(
    evaluated_by_one, tiny_teacher, many, tmp_path, caplog, damage
):
    output = shutil.copytree(evaluated_by_one, tmp_path / "results")
    whole, damaged = sorted((output / ".predictions.train").glob("*.jsonl"))
    before = whole.stat()
    work, first, *others = damaged.read_text(encoding="utf-8").split("\n")
    text = json.loads(first)["hypothesis"]
    work_with = functools.partial(dict, json.loads(work))
    changed = {
        "text": [work, first.replace(text, text.replace(text[0], "犬", 1)), *others],
        "time": [json.dumps(work_with(process_seconds=0.001)), first, *others],
        "not JSON": [work, first[:-1], *others],
        "no checksum": [json.dumps({"process_seconds": 0.001}), first, *others],
    }[damage]
    assert changed != [work, first, *others]
    damaged.write_text("\n".join(changed), encoding="utf-8")
    (output / "metric.train.json").unlink()
    metrics = evaluate(tiny_teacher, many, output)
    assert caplog.text.count(f"{damaged} is damaged and is made again") == 1
    assert (whole.stat().st_ino, whole.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    made = damaged.read_text(encoding="utf-8").split("\n")
    assert made[1:] == [first, *others]
    assert predictions(output) == predictions(evaluated_by_one)
    expected = json.loads((evaluated_by_one / "metric.train.json").read_text())
    assert [metrics[name] for name in ("scores", "details")] == [expected[name] for name in ("scores", "details")]


def test_another_model_never_gets_the_saved_predictions(evaluated, tiny_teacher, loaded, tmp_path):
    shutil.copytree(evaluated, tmp_path / "results")
    shutil.copytree(tiny_teacher, tmp_path / "model")
    trained = load_file(tmp_path / "model/model.safetensors")
    with pytest.raises(
        SystemExit, match=r"other settings: model was .*tiny-whisper.* and is now .*--overwrite_output_dir"
    ):
        evaluate(tmp_path / "model", loaded, tmp_path / "results", "--id_column_name", "name")
    evaluate(tmp_path / "model", loaded, tmp_path / "results", "--id_column_name", "name", "--overwrite_output_dir")
    first = predictions(tmp_path / "results")
    torch.manual_seed(1)
    trained = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in trained.items()}
    save_file(trained, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="other settings: model_digest was"):
        evaluate(tmp_path / "model", loaded, tmp_path / "results", "--id_column_name", "name")
    evaluate(tmp_path / "model", loaded, tmp_path / "results", "--id_column_name", "name", "--overwrite_output_dir")
    assert [row["hypothesis"] for row in predictions(tmp_path / "results")] != [row["hypothesis"] for row in first]
    assert len(list((tmp_path / "results/.predictions.train").glob("*.jsonl"))) == 1


def test_a_machine_without_git_gets_its_metrics_all_the_same(evaluated, tiny_teacher, loaded, tmp_path, monkeypatch):
    shutil.copytree(evaluated, tmp_path / "again")
    (tmp_path / "again/metric.train.json").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evaluate(tiny_teacher, loaded, tmp_path / "again", "--id_column_name", "name")["clips"] == 24


def test_other_clips_under_the_same_name_are_refused(evaluated, tiny_teacher, loaded, clips, tmp_path):
    rows = [row(clip["name"], clip["audio"], clip["transcription"]) for clip in clips]
    dataset = write_dataset(tmp_path / "data", rows, loaded)
    evaluate(tiny_teacher, dataset, tmp_path / "results")
    shutil.rmtree(dataset)
    write_dataset(dataset, [{**rows[0], "transcription": "別の文です。"}, *rows[1:]], loaded)
    with pytest.raises(SystemExit, match="other settings: rows_digest was"):
        evaluate(tiny_teacher, dataset, tmp_path / "results")


@pytest.fixture(scope="session")
def many(loaded, clips, tmp_path_factory) -> Path:
    """100 rows, two shards."""
    rows = [row(f"{turn}/{clip['name']}", clip["audio"], clip["transcription"]) for turn in range(5) for clip in clips]
    return write_dataset(tmp_path_factory.mktemp("many") / "data", rows[:100], loaded)


@pytest.fixture(scope="session")
def evaluated_by_one(tiny_teacher, many, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("one")
    evaluate(tiny_teacher, many, output_dir)
    return output_dir


def test_two_processes_write_what_one_writes(evaluated_by_one, tiny_teacher, many, tmp_path):
    run = subprocess.run(
        [sys.executable, *PROCESSES, *command(tiny_teacher, many, tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert predictions(tmp_path) == predictions(evaluated_by_one)
    both = [json.loads((path / "metric.train.json").read_text()) for path in (tmp_path, evaluated_by_one)]
    assert both[0]["details"] == both[1]["details"]
    assert both[0]["by_length"] == both[1]["by_length"]


def test_a_killed_run_goes_on_where_it_was(evaluated_by_one, tiny_teacher, many, tmp_path):
    shards = tmp_path / ".predictions.train"
    run = subprocess.Popen([sys.executable, *command(tiny_teacher, many, tmp_path)], stderr=subprocess.DEVNULL)
    while not list(shards.glob("*.jsonl")) and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    written = {path: path.stat().st_mtime_ns for path in shards.glob("*.jsonl")}
    assert len(written) == 1
    assert not (tmp_path / "metric.train.json").exists()
    evaluate(tiny_teacher, many, tmp_path)
    assert predictions(tmp_path) == predictions(evaluated_by_one)
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert len(list(shards.glob("*.jsonl"))) == 2


def test_sigterm_ends_with_143_and_leaves_everything_resumable(tiny_teacher, many, tmp_path, monkeypatch):
    replace = os.replace

    def replace_and_be_told(source, target) -> None:
        replace(source, target)
        if Path(target).suffix == ".jsonl":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "replace", replace_and_be_told)
    with pytest.raises(SystemExit) as stopped:
        evaluate(tiny_teacher, many, tmp_path)
    assert stopped.value.code == 143
    assert len(list(tmp_path.glob(".predictions.train/*.jsonl"))) == 1
    assert not list(tmp_path.glob("*.json"))


def test_manifests_and_stereo_at_another_rate_are_read(evaluated, tiny_teacher, clips, tmp_path):
    chosen = clips[:4]
    names = [f"clip {index}, é.flac" for index in range(4)]
    for name, clip in zip(names, chosen, strict=True):
        (tmp_path / name).write_bytes(clip["audio"])
    (tmp_path / "stereo.wav").write_bytes(wave(2, rate=44_100, channels=2))
    texts = [clip["transcription"] for clip in chosen] + ['1行目\n"2行目", 終わり']
    rows = [{"audio": name, "transcription": text} for name, text in zip([*names, "stereo.wav"], texts, strict=True)]
    with open(tmp_path / "clips.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["audio", "transcription"])
        writer.writeheader()
        writer.writerows(rows)
    with open(tmp_path / "clips.tsv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["audio", "transcription"], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for kind in ("csv", "tsv", "jsonl"):
        metrics = evaluate(tiny_teacher, tmp_path / f"clips.{kind}", tmp_path / kind)
        assert metrics["clips"] == 5
        assert metrics["unusable"] == {}
    assert predictions(tmp_path / "csv") == predictions(tmp_path / "tsv") == predictions(tmp_path / "jsonl")
    read = predictions(tmp_path / "csv")
    assert [row["reference"] for row in read] == texts
    assert [row["hypothesis"] for row in read[:4]] == [row["hypothesis"] for row in predictions(evaluated)[:4]]
    assert read[4]["seconds"] == "2.0"
    assert read[4]["id"].endswith("stereo.wav")


def test_a_data_loader_file_is_evaluated(evaluated, tiny_teacher, loaded, tmp_path):
    shutil.copy(next((loaded / "tiny").glob("*.parquet")), tmp_path / "clips.parquet")
    (tmp_path / "my_loader.py").write_text(
        f"""
import datasets, pyarrow.parquet as pq

class Loader(datasets.GeneratorBasedBuilder):
    BUILDER_CONFIGS = [datasets.BuilderConfig("tiny")]
    def _info(self):
        audio = {{"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
        text = datasets.Value("string")
        return datasets.DatasetInfo(features=datasets.Features({{"name": text, "audio": audio, "transcription": text}}))
    def _split_generators(self, manager):
        return [datasets.SplitGenerator("train", {{"path": {str(tmp_path / "clips.parquet")!r}}})]
    def _generate_examples(self, path):
        yield from enumerate(pq.read_table(path).to_pylist())
""",
        encoding="utf-8",
    )
    evaluate(tiny_teacher, tmp_path / "my_loader.py", tmp_path / "results", "--id_column_name", "name")
    assert predictions(tmp_path / "results") == predictions(evaluated)


def test_a_clip_over_30_s_is_an_error_by_name_unless_it_is_skipped(tiny_teacher, loaded, clips, tmp_path):
    rows = [
        row("good.flac", clips[0]["audio"], "はい"),
        row("long.wav", wave(30.5), "長い"),
        row("full.wav", wave(30), "全部"),
        row("promises-more.mp3", mp3_without_length(), "短い"),
    ]
    dataset = write_dataset(tmp_path / "data", rows, loaded)
    with pytest.raises(
        SystemExit, match=r"1 clips are longer than 30 s \(long\.wav\): pass --skip_long_audio .*, or --long_form"
    ):
        evaluate(tiny_teacher, dataset, tmp_path / "results")
    metrics = evaluate(tiny_teacher, dataset, tmp_path / "results", "--skip_long_audio")
    assert metrics["unusable"] == {"longer than 30 s": ["long.wav"]}
    assert metrics["clips"] == 3
    rows = predictions(tmp_path / "results")
    assert [row["problem"] for row in rows] == ["", "longer than 30 s", "", ""]
    assert [float(row["seconds"]) for row in rows[1:]] == [30.5, 30, pytest.approx(15, abs=0.2)]


def test_a_clip_over_30_s_is_refused_before_its_shard_is_transcribed_and_earlier_shards_stay(
    tiny_teacher, loaded, clips, tmp_path
):
    rows = [row(f"{number}", clips[0]["audio"], "はい") for number in range(64)]
    rows += [row("good", clips[1]["audio"], "はい"), row("long", wave(31), "長い"), row("longer", wave(32), "長い")]
    dataset = write_dataset(tmp_path / "data", rows, loaded)
    flags = ["--id_column_name", "name"]
    with pytest.raises(SystemExit, match=r"2 clips are longer than 30 s \(long, longer\): "):
        evaluate(tiny_teacher, dataset, tmp_path / "results", *flags)
    (first,) = (tmp_path / "results/.predictions.train").glob("*.jsonl")  # of the two shards
    assert not (tmp_path / "results/metric.train.json").exists()
    written = first.stat().st_mtime_ns
    metrics = evaluate(tiny_teacher, dataset, tmp_path / "results", *flags, "--skip_long_audio")
    assert metrics["unusable"] == {"longer than 30 s": ["long", "longer"]}
    assert first.stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match=r"2 clips are longer than 30 s \(long, longer\): "):
        evaluate(tiny_teacher, dataset, tmp_path / "results", *flags)


def test_windows_refuse_clips_over_30_s_before_any_clip_is_transcribed(tiny_teacher, loaded, clips, tmp_path):
    rows = [row("good", clips[0]["audio"], "はい"), row("long", wave(31), "長い")]
    dataset = write_dataset(tmp_path / "data", rows, loaded)
    flags = ["--id_column_name", "name", "--concatenate_audio"]
    with pytest.raises(SystemExit, match=r"1 clips are longer than 30 s \(long\): "):
        evaluate(tiny_teacher, dataset, tmp_path / "results", *flags)
    assert not list((tmp_path / "results").rglob("*.parquet"))


def test_clips_without_readable_audio_are_listed_and_fatal_only_when_there_are_no_others(
    tiny_teacher, loaded, clips, tmp_path
):
    bad = [
        row("cut.flac", clips[0]["audio"][:60], "はい"),
        row("none.flac", None, "はい"),
        row("empty.wav", wave(0), "はい"),
    ]
    dataset = write_dataset(tmp_path / "data", [*bad, row("good.flac", clips[0]["audio"], None)], loaded)
    with pytest.raises(SystemExit, match="none of the 4 clips"):
        evaluate(tiny_teacher, dataset, tmp_path / "first")
    dataset = write_dataset(tmp_path / "more", [*bad, row("good.flac", clips[0]["audio"], "はい")], loaded)
    metrics = evaluate(tiny_teacher, dataset, tmp_path / "second")
    assert metrics["clips"] == 1
    assert sorted(name for names in metrics["unusable"].values() for name in names) == [
        "cut.flac",
        "empty.wav",
        "none.flac",
    ]
    dataset = write_dataset(tmp_path / "worst", bad, loaded)
    with pytest.raises(SystemExit, match="none of the 3 clips"):
        evaluate(tiny_teacher, dataset, tmp_path / "third")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text_column_name", "text"], r"has no column 'text' \(--text_column_name\); it has name, audio, trans"),
        (["--id_column_name", "number"], r"has no column 'number'"),
        (
            ["--id_column_name", "transcription"],
            r"--id_column_name transcription is the column of audio or texts: leave it out, or name another",
        ),
        (["--dataset_split_name", "test"], r"has no split 'test'; it has train"),
        (
            ["--dataset_name", "no/such/directory"],
            r"'no/such/directory' is neither a directory that exists nor a Hub id",
        ),
        (["--model_name_or_path", "no/such/model"], r"'no/such/model' is neither a directory that exists nor a Hub id"),
        (["--model_name_or_path", "acme/no-such-model"], r"cannot load the model acme/no-such-model"),
        (["--dataset_name", "acme/no-such-dataset"], r"cannot load tiny, train of acme/no-such-dataset"),
        (["--dataset_name", "missing.csv"], r"cannot load .*missing\.csv"),
        (["--language", "xx"], r"--language xx: .* has no such language, only af, am, "),
        (["--push_to_hub"], r"is a local directory"),
    ],
)
def test_a_mistake_is_one_clear_line(tiny_teacher, loaded, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message) as error:
        evaluate(tiny_teacher, loaded, tmp_path / "results", *flags)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("run_short_form_eval.py: error: ")


@pytest.fixture
def monolingual(tiny_teacher, tmp_path) -> Path:
    """The tiny teacher as an English-only checkpoint, which knows neither languages nor tasks."""
    directory = shutil.copytree(tiny_teacher, tmp_path / "english")
    path = directory / "generation_config.json"
    config = json.loads(path.read_text()) | {"is_multilingual": False}
    del config["lang_to_id"], config["task_to_id"]
    path.write_text(json.dumps(config))
    for path in directory.glob("*token*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("<|transcribe|>", "<|nothing|>"), encoding="utf-8")
    return directory


def test_a_model_without_japanese_is_refused_and_serves_its_own_language(monolingual, loaded, tmp_path):
    with pytest.raises(SystemExit, match=r"--language ja: .*english has no such language, only en$"):
        evaluate(monolingual, loaded, tmp_path / "results")
    with pytest.raises(SystemExit, match=r"--task translate: .*english knows only English$"):
        evaluate(monolingual, loaded, tmp_path / "results", "--language", "en", "--task", "translate")
    metrics = evaluate(
        monolingual, loaded, tmp_path / "results", "--language", "English", "--max_samples_per_split", "3"
    )
    assert metrics["scorer"] == "whisper"
    assert metrics["clips"] == 3


def test_a_checkpoint_of_2022_without_a_table_of_languages_serves_as_well(evaluated, tiny_teacher, loaded, tmp_path):
    model = shutil.copytree(tiny_teacher, tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    for name in ("is_multilingual", "lang_to_id", "task_to_id", "no_timestamps_token_id"):
        del config[name]
    (model / "generation_config.json").write_text(json.dumps(config))
    evaluate(model, loaded, tmp_path / "results", "--max_samples_per_split", "3")
    hypotheses = [[row["hypothesis"] for row in predictions(path)[:3]] for path in (tmp_path / "results", evaluated)]
    assert hypotheses[0] == hypotheses[1]


def test_a_model_without_the_files_of_its_tokenizer_is_refused_in_one_line(tiny_teacher, loaded, tmp_path):
    model = shutil.copytree(tiny_teacher, tmp_path / "model")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
        (model / name).unlink()
    with pytest.raises(SystemExit, match=r"model lacks the files of its tokenizer: tokenizer\.json"):
        evaluate(model, loaded, tmp_path / "results")


def test_the_older_arrangement_of_special_tokens_and_80_mels_serve_as_well(tiny_teacher_v2, loaded, clips, tmp_path):
    flags = ["--max_samples_per_split", "3", "--generation_num_beams", "2", "--return_timestamps"]
    assert evaluate(tiny_teacher_v2, loaded, tmp_path / "results", *flags)["clips"] == 3
    options = {"num_beams": 2, "return_timestamps": True}
    waveforms = [samples_of(clip["audio"])[:, 0] for clip in clips[:3]]
    expected = [stock_text(tiny_teacher_v2, waveform, 16, **options) for waveform in waveforms]
    assert [row["hypothesis"] for row in predictions(tmp_path / "results")] == expected
    assert all("<|" not in text for text in expected)


# ----------------------------------------------------------------------------------------------------------------- Hub


def test_a_model_and_a_dataset_on_the_hub_are_evaluated_and_the_card_gets_the_rates(
    hub, evaluated, tiny_teacher, loaded, tmp_path
):
    api = HfApi()
    for kind, folder in (("model", tiny_teacher), ("dataset", loaded)):
        api.create_repo("acme/eval-me", repo_type=kind)
        api.upload_folder(repo_id="acme/eval-me", repo_type=kind, folder_path=folder)
    flags = ["--id_column_name", "name", "--push_to_hub"]
    metrics = evaluate("acme/eval-me", "acme/eval-me", tmp_path / "results", *flags)
    assert predictions(tmp_path / "results") == predictions(evaluated)

    def published() -> dict:
        results = ModelCard.load("acme/eval-me").data.eval_results
        assert all(result.dataset_type == "acme/eval-me" and result.dataset_split == "train" for result in results)
        return {result.metric_name: (result.metric_type, result.metric_value) for result in results}

    rates = {name: round(summary["rate"], 2) for name, summary in metrics["scores"].items()}
    expected = {f"CER ({name})": ("cer", rates[name]) for name in ("kotoba", "reazon", "whisper", "readings")}
    assert published() == expected | {"WER (words)": ("wer", rates["words"])}
    hub.fault("/commit/main", method="POST", times=1, status=412)  # another evaluation's push came between
    evaluate("acme/eval-me", "acme/eval-me", tmp_path / "results", *flags, "--scorer", "reazon")
    assert published() == expected | {"WER (words)": ("wer", rates["words"])}
    for scorer in ("kotoba", "reazon"):
        path = hf_hub_download("acme/eval-me", f".eval_results/acme--eval-me.train.{scorer}.yaml")
        (entry,) = parse_eval_result_entries(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        assert (entry.dataset_id, entry.task_id, entry.value) == ("acme/eval-me", "tiny", rates[scorer])
        assert entry.notes == f"CER ({scorer}), per cent, train, 24 clips"
    hub.fault("/commit/main", method="POST", times=5, status=500)
    with pytest.raises(SystemExit, match="the results are written, but not on the card of acme/eval-me"):
        evaluate("acme/eval-me", "acme/eval-me", tmp_path / "results", *flags, "--scorer", "whisper")
    assert json.loads((tmp_path / "results/metric.train.json").read_text())["scorer"] == "whisper"


def test_a_card_that_cannot_be_read_is_named_before_anything_is_transcribed(hub, loaded, tmp_path):
    api = HfApi()
    api.create_repo("acme/eval-bad-card")
    card = b"---\nmodel-index:\n- name: mine\n---\nRates without results.\n"
    api.upload_file(repo_id="acme/eval-bad-card", path_in_repo="README.md", path_or_fileobj=card)
    with pytest.raises(SystemExit, match=r"the card of acme/eval-bad-card cannot be read: .* Correct it") as error:
        evaluate("acme/eval-bad-card", loaded, tmp_path / "results", "--push_to_hub")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_a_card_leaves_out_the_scorers_that_find_no_reference(tmp_path):
    only_reazon_keeps = "♪"
    rows = f"id,reference,text\n1,{only_reazon_keeps},{2 * only_reazon_keeps}\n"
    (tmp_path / "engine.csv").write_text(rows, encoding="utf-8")
    given = ["--predictions", tmp_path / "engine.csv", "--scorer", "reazon", "--output_dir", tmp_path / "out"]
    assert evaluation.main([*map(str, given), "--dataset_split_name", "train"]) == 0
    metrics = json.loads((tmp_path / "out/metric.train.json").read_text())
    assert metrics["scores"]["kotoba"]["rate"] is None
    results = evaluation.card_results(metrics)
    assert [(result.metric_name, result.metric_value) for result in results] == [("CER (reazon)", 100.0)]


def test_a_card_that_the_hub_does_not_give_just_now_keeps_its_text_and_gets_the_rates_later(hub, evaluated):
    metrics = json.loads((evaluated / "metric.train.json").read_text()) | {"model": "acme/eval-withheld"}
    HfApi().create_repo("acme/eval-withheld")
    for text in (b"first", b"second"):  # the first of which is in the cache when the second cannot be had
        HfApi().upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id="acme/eval-withheld")
        hub.fault("acme/eval-withheld/resolve/.*README", method="HEAD", times=-1, status=403)
        with pytest.raises(SystemExit, match="the results are written, but not on the card of acme/eval-withheld"):
            evaluation.publish_rates(metrics)
        hub.faults.clear()
        assert Path(hf_hub_download("acme/eval-withheld", "README.md")).read_bytes() == text
    evaluation.publish_rates(metrics)
    card = ModelCard.load("acme/eval-withheld")
    assert card.text.strip() == "second"
    assert len(card.data.eval_results) == len(metrics["scores"])


def test_the_rate_of_a_leaderboard_is_the_headline_also_where_it_counts_words():
    scorers = [evaluation.Scorer("whisper", "words", evaluation.scoring_rule("whisper", "en", None))]
    metrics, _ = score(["the cat sat"], ["the cat sits"], scorers)
    metrics |= {"dataset": "acme/english", "dataset_config_name": None, "name": "test", "scorer": "whisper"}
    (entry,) = parse_eval_result_entries(yaml.safe_load(evaluation.leaderboard_file(metrics)))
    assert (entry.value, entry.notes) == (33.33, "WER (whisper), per cent, test, 1 clips")


# ------------------------------------------------------------------------------------------------------------- command


def test_help_names_every_flag_of_the_readme_and_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        evaluation.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())  # wrapped to the terminal's width
    for flag in (
        *("model_name_or_path", "dataset_name", "dataset_split_name", "text_column_name", "output_dir", "language"),
        *("per_device_eval_batch_size", "dataloader_num_workers", "preprocessing_num_workers", "generation_max_length"),
        *(
            "dataset_config_name",
            "audio_column_name",
            "id_column_name",
            "max_samples_per_split",
            "generation_num_beams",
        ),
        *("attn_type", "dtype", "scorer", "report_to", "push_to_hub", "model_revision", "skip_long_audio", "compare"),
        *("concatenate_audio", "concatenate_seconds", "long_form", "seed", "assistant_model", "dry_run"),
        *("predictions", "report_audio_mb"),
    ):
        assert f"--{flag} " in text
    assert "(default: 256)" in text


@pytest.mark.parametrize("flags", [["--no_such_flag"], [], ["--per_device_eval_batch_size", "0"], ["--dtype", "int8"]])
def test_flags_that_can_t_be_meant_end_with_2(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(flags)
