"""Labels from stage to stage: the longest that is kept, prompts, windows with prompts, spellings, and the task."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperTokenizerFast

from tests.stages import (
    distil,
    evaluate,
    features_of,
    filter_clips,
    initialise,
    label,
    make_label,
    read_figures,
    read_labels,
    read_metrics,
    read_predictions,
    read_rows,
    samples_of,
    speaking,
    stock_label,
    stock_text,
    tone,
    write_dataset,
)

LETTERS = "いろはにほへとちりぬるをわかよたれそつねならむうのおくやまけふこえてあさきゆめみしひもせす"
TRANSLATE = ["<|startoftranscript|>", "<|ja|>", "<|translate|>"]
ENGLISH = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>"]


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher) -> WhisperTokenizerFast:
    return WhisperTokenizerFast.from_pretrained(tiny_teacher)


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory) -> Path:
    return initialise(tiny_teacher, tmp_path_factory.mktemp("student") / "init")


@pytest.fixture(scope="module")
def text_of(tokenizer):
    """A text of exactly so many tokens, the beginning of which is not its end."""

    def make(tokens: int) -> str:
        text = ""
        for place in itertools.count():
            longer = text + LETTERS[place * place % len(LETTERS)]
            if len(ids_of(tokenizer, text)) == tokens:
                return text
            if len(ids_of(tokenizer, longer)) == len(ids_of(tokenizer, text)) + 1:
                text = longer

    return make


def ids_of(tokenizer: WhisperTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def labelled(root: Path, teacher: Path, texts: list[str], *timestamps: float, seconds: float = 1.0) -> Path:
    """A labelled dataset whose labels are its texts, on tones of a second."""
    rows = []
    for number, text in enumerate(texts):
        given = {"transcription": text, "whisper_transcript": make_label(teacher, text, *timestamps)}
        rows.append({"name": str(number), "audio": tone(seconds), **given})
    return write_dataset(root, rows)


def prompt_of(label: list[int], tokenizer: WhisperTokenizerFast) -> list[int] | None:
    """The text between <|startofprev|> and the start token; None without a prompt."""
    start = label.index(tokenizer.convert_tokens_to_ids("<|startoftranscript|>"))
    if not start:
        return None
    assert label[0] == tokenizer.convert_tokens_to_ids("<|startofprev|>")
    return label[1:start]


# ---- the longest label -----------------------------------------------------------------------------------------------


def test_the_filter_keeps_a_label_of_exactly_the_longest_and_none_of_a_token_more(tiny_teacher, text_of, tmp_path):
    texts = [text_of(14), text_of(15), text_of(16)]  # with <|startoftranscript|><|ja|><|transcribe|><|notimestamps|>…
    data = labelled(tmp_path / "data", tiny_teacher, texts)
    assert [len(ids) for ids in read_labels(data)] == [19, 20, 21]  # … and <|endoftext|>
    filter_clips(tiny_teacher, data, "--max_label_length", 20, "--skip_logmel")
    assert [row["text"] for row in read_rows(tmp_path / "data.wer_10.0")] == texts[:2]
    assert [len(row["labels"]) for row in read_rows(tmp_path / "data.wer_10.0")] == [19, 20]


def test_without_a_limit_the_filter_keeps_clips_of_128_tokens(tiny_teacher, text_of, tmp_path):
    data = labelled(tmp_path / "data", tiny_teacher, [text_of(123), text_of(124)])
    filter_clips(tiny_teacher, data, "--skip_logmel")
    assert [len(row["labels"]) for row in read_rows(tmp_path / "data.wer_10.0")] == [128]


@pytest.mark.parametrize("limit", [20, 21])  # the latter has room for <|startofprev|> alone
def test_a_label_that_leaves_no_room_for_a_prompt_is_kept_without_one(tiny_teacher, text_of, tmp_path, limit):
    data = labelled(tmp_path / "data", tiny_teacher, [text_of(15), text_of(15)])
    flags = ("--max_label_length", limit, "--condition_on_prev_probability", 1, "--skip_logmel")
    filter_clips(tiny_teacher, data, *flags)
    assert [len(row["labels"]) for row in read_rows(tmp_path / "data.wer_10.0")] == [20, 20]


def test_training_takes_a_label_of_exactly_the_longest_and_none_of_a_token_more(
    tiny_teacher, student, text_of, tmp_path
):
    data = labelled(tmp_path / "data", tiny_teacher, [text_of(14), text_of(15), text_of(16)])
    distil(student, tiny_teacher, data, tmp_path / "out", "--max_label_length", 20, "--max_steps", 1)
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert record["rows"] == 2
    assert list(record["rows_left_out"][data.name].values()) == [1]


def test_labels_of_exactly_the_longest_share_a_window_and_with_a_token_less_room_they_do_not(
    tiny_teacher, text_of, tmp_path
):
    data = labelled(tmp_path / "data", tiny_teacher, [text_of(10), text_of(12)], 0.0, 1.0)
    needed = (10 + 2) + (12 + 2) + 3 + 2  # texts with their timestamps, prefix, <|notimestamps|> and <|endoftext|>
    for limit, windows in ((needed, 1), (needed - 1, 2)):
        flags = (
            "--concatenate_audio",
            "--max_label_length",
            limit,
            "--skip_logmel",
            "--output_dir",
            tmp_path / f"{limit}",
        )
        filter_clips(tiny_teacher, data, *flags)
        assert len(read_rows(tmp_path / f"{limit}" / "data.wer_10.0.packed")) == windows


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_the_end_of_the_text_before_where_there_is_no_room_for_all(
    tiny_teacher, tokenizer, text_of, tmp_path
):
    texts = [text_of(20), text_of(9)]
    data = labelled(tmp_path / "data", tiny_teacher, texts)
    filter_clips(tiny_teacher, data, "--max_label_length", 25, "--condition_on_prev_probability", 1, "--skip_logmel")
    first, second = (row["labels"] for row in read_rows(tmp_path / "data.wer_10.0"))
    assert prompt_of(first, tokenizer) is None
    assert len(second) == 25
    assert prompt_of(second, tokenizer) == ids_of(tokenizer, texts[0])[-10:]


def test_a_prompt_has_at_most_half_of_the_decoder_s_positions(tiny_teacher, tokenizer, text_of, tmp_path):
    texts = [text_of(300), text_of(9)]
    data = labelled(tmp_path / "data", tiny_teacher, texts)
    filter_clips(tiny_teacher, data, "--max_label_length", 448, "--condition_on_prev_probability", 1, "--skip_logmel")
    prompt = prompt_of(read_rows(tmp_path / "data.wer_10.0")[1]["labels"], tokenizer)
    assert prompt == ids_of(tokenizer, texts[0])[-223:]  # 224 of 448 with <|startofprev|>


def test_a_window_s_prompt_is_the_end_of_the_window_before(tiny_teacher, tokenizer, text_of, tmp_path):
    texts = [f"{number}番。{text_of(8)}" for number in range(9)]
    data = labelled(tmp_path / "data", tiny_teacher, texts, 0.0, 2.0, seconds=2.0)
    flags = ("--concatenate_audio", "--concatenate_seconds", 7, "--condition_on_prev_probability", 1)
    filter_clips(tiny_teacher, data, *flags, "--max_label_length", 70, "--timestamp_probability", 0.5, "--skip_logmel")
    windows = read_rows(tmp_path / "data.wer_10.0.packed")
    assert len(windows) >= 3
    assert max(len(window["clips"]) for window in windows) == 3  # of 2 s each
    assert all(window["input_length"] <= 7 * 16_000 for window in windows)
    prompts = [prompt_of(window["labels"], tokenizer) for window in windows]
    assert prompts[0] is None
    cut = 0
    for before, window, prompt in zip(windows[:-1], windows[1:], prompts[1:], strict=True):
        said = ids_of(tokenizer, "".join(texts[clip] for clip in before["clips"]))
        assert said[-len(prompt) :] == prompt
        cut += prompt != said
        assert prompt == said or len(window["labels"]) == 70
    assert cut


def test_behind_a_window_without_text_the_prompt_is_the_last_text_before_it(tiny_teacher, tokenizer, tmp_path):
    rows = []
    for number in range(8):
        text = f"{number}番です。" if number % 2 else ""
        label = make_label(tiny_teacher, text)
        rows.append({"audio": tone(1.0), "transcription": f"{number}番です。", "whisper_transcript": label})
    data = write_dataset(tmp_path / "data", rows)
    flags = ("--wer_threshold", 100, "--concatenate_audio", "--concatenate_probability", 0, "--skip_logmel")
    filter_clips(tiny_teacher, data, *flags, "--condition_on_prev_probability", 1)
    prompts = []
    expected = []
    last = None
    for window in read_rows(tmp_path / "data.wer_100.0.packed"):
        prompts.append(prompt_of(window["labels"], tokenizer))
        expected.append(last)
        (clip,) = window["clips"]
        if clip % 2:
            last = ids_of(tokenizer, f"{clip}番です。")
    assert prompts == expected
    assert any(first and first == second for first, second in itertools.pairwise(expected))


def test_labels_of_the_older_arrangement_are_filtered_with_their_own_special_tokens(tiny_teacher_v2, clips, tmp_path):
    rows = []
    for clip in clips[:3]:
        given = {"transcription": clip["transcription"]}
        given["whisper_transcript"] = make_label(tiny_teacher_v2, clip["transcription"], 0.0, 1.0)
        rows.append({"audio": clip["audio"], **given})
    data = write_dataset(tmp_path / "data", rows)
    filter_clips(tiny_teacher_v2, data, "--condition_on_prev_probability", 1, "--timestamp_probability", 0)
    stored = read_rows(tmp_path / "data.wer_10.0.vectorized")
    plain = [make_label(tiny_teacher_v2, clip["transcription"]) for clip in clips[:3]]
    older = WhisperTokenizerFast.from_pretrained(tiny_teacher_v2)
    before = older.convert_tokens_to_ids("<|startofprev|>")
    texts = [ids_of(older, clip["transcription"]) for clip in clips[:2]]
    assert [row["labels"] for row in stored] == [
        plain[0],
        [before, *texts[0], *plain[1]],
        [before, *texts[1], *plain[2]],
    ]
    for clip, row in zip(clips, stored, strict=False):
        log_mel = features_of(tiny_teacher_v2, samples_of(clip["audio"])[:, 0])[0].T.numpy()
        features = np.frombuffer(row["input_features"], "<f2").reshape(-1, 80)
        assert np.array_equal(features, log_mel[: len(features)].astype(np.float16))


# ---- English spellings -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def american(tiny_teacher, tmp_path_factory) -> Path:
    """A teacher that says `The color.`, and knows American for British spellings."""
    teacher = speaking(tiny_teacher, tmp_path_factory.mktemp("teacher") / "american", "The color.")
    (teacher / "normalizer.json").write_text('{"colour": "color"}')
    return teacher


@pytest.fixture(scope="module")
def ignorant(american, tmp_path_factory) -> Path:
    """The same, without its list of spellings."""
    teacher = shutil.copytree(american, tmp_path_factory.mktemp("teacher") / "ignorant")
    (teacher / "normalizer.json").unlink()
    return teacher


def test_the_evaluation_takes_british_and_american_spellings_for_equal(american, ignorant, tmp_path):
    rows = [{"name": "a", "audio": tone(0.5), "transcription": "the colour"}]
    data = write_dataset(tmp_path / "data", rows)
    flags = ("--language", "en")
    said = evaluate(american, data, tmp_path / "knowing", *flags)
    assert read_predictions(said)[0]["hypothesis"] == "The color."
    assert (read_metrics(said)["wer"], read_metrics(said)["cer"]) == (0, 0)
    assert read_metrics(evaluate(ignorant, data, tmp_path / "ignorant", *flags))["wer"] == 50


def test_the_filter_takes_british_and_american_spellings_for_equal(american, ignorant, tmp_path):
    spellings = [("the colour", "The color."), ("the cat", "The cat.")]
    rows = []
    for number, (text, said) in enumerate(spellings):
        given = {"transcription": text, "whisper_transcript": make_label(american, said, start=ENGLISH)}
        rows.append({"name": str(number), "audio": tone(0.5), **given})
    data = write_dataset(tmp_path / "data", rows)
    flags = ("--language", "en", "--skip_logmel", "--wer_threshold", 100, "--output_dir")
    filter_clips(american, data, *flags, tmp_path / "knowing")
    assert [row["wer"] for row in read_rows(tmp_path / "knowing" / "data.wer_100.0")] == [0, 0]
    filter_clips(ignorant, data, *flags, tmp_path / "ignorant")
    assert [row["wer"] for row in read_rows(tmp_path / "ignorant" / "data.wer_100.0")] == [50, 0]


def test_training_takes_british_and_american_spellings_of_held_out_texts_for_equal(american, tmp_path):
    given = {"transcription": "the colour", "whisper_transcript": make_label(american, "The color.", start=ENGLISH)}
    data = write_dataset(tmp_path / "data", [{"audio": tone(0.5), **given}])
    init = initialise(american, tmp_path / "init")
    held_out = ("--eval_dataset_name", data, "--eval_split_name", "train", "--max_label_length", 20)
    output = tmp_path / "out"
    distil(init, american, data, output, *held_out, "--language", "en", "--max_steps", 1, "--learning_rate", 0)
    assert read_figures(output, "eval_wer") == [0, 0]
    assert read_figures(output, "eval_cer") == [0, 0]


# ---- the task --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(clips, tmp_path_factory) -> Path:
    """Three clips of speech with their transcriptions."""
    rows = [{name: clip[name] for name in ("name", "audio", "transcription")} for clip in clips[:3]]
    return write_dataset(tmp_path_factory.mktemp("spoken") / "spoken", rows)


@pytest.fixture(scope="module")
def translated(tiny_teacher, spoken, tmp_path_factory) -> Path:
    """The same, labelled by a teacher that was told to translate."""
    flags = ("--language", "ja", "--dtype", "float32", "--max_label_length", 24)
    return label(tiny_teacher, spoken, tmp_path_factory.mktemp("labels") / "spoken", *flags, "--task", "translate")


def test_a_label_of_the_task_translate_is_what_the_teacher_says_then(translated, clips, tiny_teacher, tokenizer):
    for clip, found in zip(clips, read_labels(translated), strict=False):
        assert tokenizer.convert_ids_to_tokens(found[:3]) == TRANSLATE
        assert found == stock_label(tiny_teacher, samples_of(clip["audio"])[:, 0], 24, task="translate")
    card = (translated / "README.md").read_text(encoding="utf-8")
    assert "| task | translate |" in card


def test_the_filter_keeps_labels_of_its_task_alone(translated, tiny_teacher, tokenizer, tmp_path):
    flags = ("--wer_threshold", 100_000, "--skip_logmel", "--output_dir", tmp_path)
    filter_clips(tiny_teacher, translated, "--task", "translate", *flags)
    rows = read_rows(tmp_path / "spoken.wer_100000.0")
    assert len(rows) == 3
    assert all(tokenizer.convert_ids_to_tokens(row["labels"][:3]) == TRANSLATE for row in rows)
    with pytest.raises(SystemExit, match="label for another language or task"):
        filter_clips(tiny_teacher, translated, *flags, "--overwrite_output_dir")


def test_a_hypothesis_of_the_task_translate_is_what_the_model_says_then(
    spoken, clips, tiny_teacher, tokenizer, tmp_path
):
    output = evaluate(tiny_teacher, spoken, tmp_path / "out", "--task", "translate")
    found = [row["hypothesis"] for row in read_predictions(output)]

    def said(clip: dict, task: str) -> str:
        return stock_text(tiny_teacher, samples_of(clip["audio"])[:, 0], 16, task=task)

    assert found == [said(clip, "translate") for clip in clips[:3]]
    assert found != [said(clip, "transcribe") for clip in clips[:3]]
    assert read_metrics(output)["task"] == "translate"


def test_translations_are_compared_and_joined_as_english_in_every_stage(tiny_teacher, tmp_path):
    teacher = speaking(tiny_teacher, tmp_path / "teacher", "Hello here.")
    clips = [{"name": str(n), "audio": tone(2 + n, 300), "transcription": "Hello there."} for n in range(2)]
    spoken = write_dataset(tmp_path / "spoken", clips)
    flags = ("--language", "ja", "--task", "translate")
    translated = label(teacher, spoken, tmp_path / "translated", *flags, "--dtype", "float32")

    packing = ("--concatenate_audio", "--wer_threshold", 60, "--skip_logmel", "--output_dir", tmp_path)
    filter_clips(teacher, translated, *flags, *packing)
    assert [row["wer"] for row in read_rows(tmp_path / "translated.wer_60.0")] == [50, 50]
    (window,) = read_rows(tmp_path / "translated.wer_60.0.packed")
    assert window["text"] == "Hello there. Hello there."

    metrics = read_metrics(evaluate(teacher, spoken, tmp_path / "scores", *flags))
    assert (metrics["scorer"], metrics["wer"]) == ("whisper", 50)
    windows = evaluate(teacher, spoken, tmp_path / "windows", *flags, "--concatenate_audio")
    assert [row["reference"] for row in read_predictions(windows, "train.windows_30")] == ["Hello there. Hello there."]

    student = initialise(teacher, tmp_path / "init")
    held_out = ("--eval_dataset_name", spoken, "--eval_split_name", "train", "--max_steps", 1, "--learning_rate", 0)
    trained = distil(student, teacher, translated, tmp_path / "trained", *flags, *held_out)
    assert read_figures(trained, "eval_wer") == [50, 50]


def test_training_for_the_task_translate_makes_held_out_labels_of_it_and_a_model_that_does_it(
    translated, spoken, clips, student, tiny_teacher, tokenizer, tmp_path
):
    held_out = ("--eval_dataset_name", spoken, "--eval_split_name", "train", "--max_label_length", 100)
    output = tmp_path / "out"
    distil(student, tiny_teacher, translated, output, *held_out, "--max_steps", 1, "--task", "translate")
    config = GenerationConfig.from_pretrained(output)
    assert (config.task, config.language) == ("translate", "ja")
    assert json.loads((output / "distillation.json").read_text())["settings"]["task"] == "translate"

    model = WhisperForConditionalGeneration.from_pretrained(student).eval()
    ce, tokens = 0.0, 0
    for clip in clips[:3]:
        ids = torch.tensor(make_label(tiny_teacher, clip["transcription"], start=TRANSLATE))
        features = features_of(tiny_teacher, samples_of(clip["audio"])[:, 0]).to(torch.float16).float()
        with torch.no_grad():
            logits = model(input_features=features, decoder_input_ids=ids[None, :-1]).logits[0]
        ce += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
    assert read_figures(output, "eval_ce")[0] == pytest.approx(ce / tokens, rel=1e-4)
