"""Audio without reference texts goes through the whole chain: labels are judged by their own scores and texts."""

import json
import logging
from pathlib import Path

import pytest

from tests import stages
from tests.stages import filter_clips

GOOD = {"avg_logprob": -0.3, "compression_ratio": 1.2, "no_speech_prob": 0.01}
FIRST = "今日は良い天気ですね"


def labelled(teacher: Path, root: Path, texts: list[str], references: list[str] | None = None, **scores) -> Path:
    """A labelled dataset of these labels. `scores` are the rows' scores that differ from good ones, by row."""
    rows = []
    for number, text in enumerate(texts):
        row = {
            "name": f"clip {number}",
            "audio": stages.tone(1.0),
            "whisper_transcript": stages.make_label(teacher, text),
        }
        if references:
            row["transcription"] = references[number]
        rows.append(row | GOOD | scores.get(f"row{number}", {}))
    return stages.write_dataset(root, rows)


def filtered(teacher: Path, dataset: Path, *flags, suffix: str = ".unscored") -> tuple[list[dict], dict]:
    """The rows that a filter keeps, and its report."""
    filter_clips(teacher, dataset, *flags)
    output = dataset.with_name(dataset.name + suffix)
    record = json.loads((output / "filtering.default.train.json").read_text())
    return stages.read_rows(output), record["report"]


# ---- labelling ----


@pytest.fixture
def speech(clips, tmp_path) -> Path:
    """Two clips without texts."""
    rows = [{"name": clip["name"], "audio": clip["audio"]} for clip in clips[:2]]
    return stages.write_dataset(tmp_path / "speech", rows)


def label_columns(teacher: Path, dataset: Path, output: Path, *flags) -> set[str]:
    """The columns that labelling adds."""
    short = ("--language", "ja", "--dtype", "float32", "--max_label_length", 16)
    stages.label(teacher, dataset, output, *short, *flags)
    return set(stages.read_rows(output)[0]) - {"name", "audio", "transcription"}


def test_labelling_stores_scores_where_there_are_no_references_and_says_so(speech, tiny_teacher, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        columns = label_columns(tiny_teacher, speech, tmp_path / "out")
    assert columns == {"whisper_transcript", *GOOD}
    assert f"{speech} has no reference texts: the labels' scores are stored" in caplog.text
    assert label_columns(tiny_teacher, speech, tmp_path / "yes", "--scores", True) == columns
    assert stages.read_rows(tmp_path / "out") == stages.read_rows(tmp_path / "yes")  # NaN would not be equal to itself
    assert label_columns(tiny_teacher, speech, tmp_path / "no", "--scores", False) == {"whisper_transcript"}


def test_labelling_stores_no_scores_beside_references_unless_asked(clips, tiny_teacher, tmp_path, caplog):
    speech = stages.write_dataset(tmp_path / "speech", clips[:2])
    assert label_columns(tiny_teacher, speech, tmp_path / "out") == {"whisper_transcript"}
    other = [{"name": clip["name"], "audio": clip["audio"], "text": clip["transcription"]} for clip in clips[:2]]
    other_name = stages.write_dataset(tmp_path / "other-name", other)
    caplog.set_level(logging.INFO)
    assert label_columns(tiny_teacher, other_name, tmp_path / "other") == {"whisper_transcript", "text"}
    assert "the reference texts are in the column text (--text_column_name none: there are none)" in caplog.text
    unused = label_columns(tiny_teacher, speech, tmp_path / "unused", "--text_column_name", "none")
    assert unused == {"whisper_transcript", *GOOD}
    again = label_columns(tiny_teacher, tmp_path / "unused", tmp_path / "again")
    assert again == {"whisper_transcript"}  # those scores were of the labels that are replaced


# ---- the filter ----


def test_labels_are_judged_by_their_scores_their_loops_and_what_whisper_hears_in_silence(tiny_teacher, tmp_path):
    texts = [
        FIRST,
        "自信のない言葉",
        "詰め込まれた言葉",
        "誰も話していない",
        "はい" * 6,
        "ご視聴ありがとうございました。",
        "ご視聴、ありがとうございましたー",  # near
        "ご視聴ありがとうございました" * 2,
        "チャンネル登録よろしくお願いします！",
        "ありがとうございました",  # which people say
        "",
    ]
    scores = {"row1": {"avg_logprob": -1.1}, "row2": {"compression_ratio": 2.5}, "row3": {"no_speech_prob": 0.7}}
    rows, report = filtered(tiny_teacher, labelled(tiny_teacher, tmp_path / "speech", texts, **scores))
    assert [row["text"] for row in rows] == [FIRST, "ありがとうございました"]
    assert [row["whisper_transcript"] for row in rows] == [stages.make_label(tiny_teacher, row["text"]) for row in rows]
    assert set(rows[0]) == {"audio", "text", "whisper_transcript", "labels", "input_length", *GOOD}
    assert rows[0]["avg_logprob"] == pytest.approx(-0.3)
    assert report["reasons"] == {
        "known hallucination": 4,
        "kept": 2,
        "mean log-probability under the minimum": 1,
        "compression ratio over the maximum": 1,
        "no-speech probability over the maximum": 1,
        "label repeats itself": 1,
        "empty label": 1,
    }
    assert report["unusable"] == {"empty label": ["clip 10"]}


def test_limits_of_the_user_go_before_the_usual_ones(tiny_teacher, tmp_path):
    dataset = labelled(tiny_teacher, tmp_path / "speech", [FIRST, "はい" * 6, "自信"], row2={"avg_logprob": -1.1})
    flags = ("--min_avg_logprob", -2, "--max_ngram_repeats", 10)
    rows, _ = filtered(tiny_teacher, dataset, *flags)
    assert len(rows) == 3


def test_a_limit_of_zero_is_a_limit(tiny_teacher, tmp_path):
    dataset = labelled(tiny_teacher, tmp_path / "speech", [FIRST, "自信"], row1={"avg_logprob": 0.0})
    rows, _ = filtered(tiny_teacher, dataset, "--min_avg_logprob", 0)
    assert len(rows) == 1


def test_phrases_of_one_s_own_are_dropped_as_well(tiny_teacher, tmp_path):
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("\ufeff提供は東京電力です。\n\n。。。\n", encoding="utf-8")
    dataset = labelled(
        tiny_teacher, tmp_path / "speech", [FIRST, "提供は、東京電力です", "ご視聴ありがとうございました"]
    )
    rows, report = filtered(tiny_teacher, dataset, "--hallucinations", phrases)
    assert [row["text"] for row in rows] == [FIRST]
    assert report["reasons"]["known hallucination"] == 2
    with pytest.raises(SystemExit, match=r"cannot read --hallucinations .*nowhere\.txt"):
        filter_clips(tiny_teacher, dataset, "--hallucinations", tmp_path / "nowhere.txt")


def test_english_has_a_list_of_its_own(tiny_teacher, tmp_path):
    start = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>"]
    texts = ["Thanks for watching!", " Thank you for watching, everyone.", "Thank you for waiting.", "Thank you."]
    rows = []
    for text in texts:
        label = stages.make_label(tiny_teacher, text, start=start)
        rows.append({"name": text, "audio": stages.tone(1.0), "whisper_transcript": label, **GOOD})
    kept, _ = filtered(tiny_teacher, stages.write_dataset(tmp_path / "speech", rows), "--language", "en")
    assert [row["text"] for row in kept] == texts[2:]


@pytest.mark.parametrize("language", ["de", "ja"])
def test_a_translation_is_judged_by_the_english_list_whatever_was_spoken(language, tiny_teacher, tmp_path):
    start = ["<|startoftranscript|>", f"<|{language}|>", "<|translate|>"]
    rows = []
    for text in ("Thanks for watching!", "Thank you."):
        label = stages.make_label(tiny_teacher, text, start=start)
        rows.append({"audio": stages.tone(1.0), "whisper_transcript": label, **GOOD})
    flags = ("--language", language, "--task", "translate")
    kept, report = filtered(tiny_teacher, stages.write_dataset(tmp_path / "speech", rows), *flags)
    assert [row["text"] for row in kept] == ["Thank you."]
    assert report["reasons"] == {"kept": 1, "known hallucination": 1}


def test_with_references_a_hallucination_goes_unless_somebody_says_it(tiny_teacher, tmp_path):
    phrase = "ご視聴ありがとうございました"
    references = [phrase + "。", "全く別の言葉", "ご視聴ありがとうございます"]
    dataset = labelled(tiny_teacher, tmp_path / "speech", [phrase] * 3, references)
    rows, report = filtered(tiny_teacher, dataset, "--cer_threshold", 500, suffix=".cer_500.0")
    assert [row["text"] for row in rows] == [phrase + "。"]
    assert report["reasons"] == {"known hallucination": 2, "kept": 1}


def test_the_report_lists_the_most_frequent_labels(tiny_teacher, tmp_path):
    texts = ["はい", "ご視聴ありがとうございました", "はい。", FIRST, "はい", "ご視聴ありがとうございました"]
    dataset = labelled(tiny_teacher, tmp_path / "speech", texts, row4={"avg_logprob": -3.0})
    _, report = filtered(tiny_teacher, dataset, "--shard_size", 2)
    assert report["frequent_labels"] == [["はい", 3, 2], ["ご視聴ありがとうございました", 2, 0], [FIRST, 1, 1]]
    card = dataset.with_name("speech.unscored").joinpath("README.md").read_text()
    assert "| はい | 3 | 2 |" in card
    assert "how many of these labels are wrong is not known" in card
    assert "CER" not in card


@pytest.mark.parametrize(
    ("flags", "suffix", "judged"),
    [
        (["--cer_threshold", 5], ".cer_5.0", "whose teacher label agrees with the reference"),
        (["--text_column_name", "none"], ".unscored", "whose teacher label nothing speaks against"),
    ],
)
def test_the_card_of_each_kind_of_result_says_what_it_holds(tiny_teacher, tmp_path, flags, suffix, judged):
    dataset = labelled(tiny_teacher, tmp_path / "speech", [FIRST, "はい"], references=[FIRST, "はい"])
    filter_clips(tiny_teacher, dataset, *flags)
    filter_clips(tiny_teacher, dataset, *flags, "--concatenate_audio")
    holds = {
        "": f"Clips {judged}",
        ".vectorized": "Log-mel features and labels",
        ".packed": "Windows of several whole clips",
        ".packed.vectorized": "Log-mel features and labels",
    }
    for kind, about in holds.items():
        card = dataset.with_name(f"speech{suffix}{kind}").joinpath("README.md").read_text()
        assert [text for text in {*holds.values()} if text in card] == [about]


def test_without_scores_loops_and_phrases_are_all_there_is_to_go_by(tiny_teacher, tmp_path, caplog):
    rows = []
    for text in (FIRST, "はい" * 6):
        rows.append({"audio": stages.tone(1.0), "whisper_transcript": stages.make_label(tiny_teacher, text)})
    dataset = stages.write_dataset(tmp_path / "speech", rows)
    kept, _ = filtered(tiny_teacher, dataset)
    assert [row["text"] for row in kept] == [FIRST]
    assert set(kept[0]) == {"audio", "text", "whisper_transcript", "labels", "input_length"}
    assert "has no column avg_logprob, which labelling with --scores adds" in caplog.text


def test_texts_that_are_not_to_be_trusted_are_left_unread(tiny_teacher, tmp_path):
    dataset = labelled(tiny_teacher, tmp_path / "speech", [FIRST, "はい"], references=["違う", ""])
    rows, _ = filtered(tiny_teacher, dataset, "--text_column_name", "none")
    assert [row["text"] for row in rows] == [FIRST, "はい"]
    with pytest.raises(SystemExit, match=r"--cer_threshold compares labels with references, and there are none"):
        filter_clips(tiny_teacher, dataset, "--text_column_name", "none", "--cer_threshold", 5)


def test_texts_in_a_column_of_another_name_are_not_taken_for_missing(tiny_teacher, tmp_path):
    label = stages.make_label(tiny_teacher, FIRST)
    row = {"audio": stages.tone(1.0), "sentence": FIRST, "whisper_transcript": label, **GOOD}
    dataset = stages.write_dataset(tmp_path / "speech", [row])
    with pytest.raises(SystemExit, match=r"has no column 'transcription'; it has audio, sentence, whisper_transcript"):
        filter_clips(tiny_teacher, dataset)


def test_nothing_kept_is_one_line(tiny_teacher, tmp_path):
    dataset = labelled(tiny_teacher, tmp_path / "speech", ["ご視聴ありがとうございました"] * 2)
    with pytest.raises(
        SystemExit, match=r"none of the 2 clips is kept: \{'known hallucination': 2\}\. Nothing is pushed"
    ):
        filter_clips(tiny_teacher, dataset)


# ---- the whole chain ----


def test_a_chain_without_references_ends_in_a_trained_student(clips, tiny_teacher, tmp_path):
    rows = [{"name": clip["name"], "audio": clip["audio"]} for clip in clips[:4]]
    speech = stages.write_dataset(tmp_path / "speech", rows)
    flags = ("--language", "ja", "--dtype", "float32", "--return_timestamps")
    stages.label(tiny_teacher, speech, tmp_path / "labelled", *flags)
    lenient = ("--min_avg_logprob", -99, "--max_compression_ratio", 99)  # the tiny teacher babbles
    filter_clips(tiny_teacher, tmp_path / "labelled", *lenient, "--concatenate_audio")
    student = stages.initialise(tiny_teacher, tmp_path / "init")
    data = tmp_path / "labelled.unscored.packed.vectorized"
    held_out = ("--eval_dataset_name", tmp_path / "labelled.unscored", "--eval_split_name", "train")
    batch = ("--per_device_train_batch_size", 2, "--max_steps", 2, "--max_label_length", 448)
    output = stages.distil(student, tiny_teacher, data, tmp_path / "trained", *batch, *held_out)
    assert len(stages.read_figures(output, "loss")) == 2
    assert len(stages.read_figures(output, "eval_cer")) == 2
