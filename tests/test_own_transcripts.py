"""Training on transcripts of one's own: labels are made from the texts, with a teacher beside or without."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import WhisperForConditionalGeneration, WhisperTokenizerFast

import run_distillation as script
from tests import stages

BATCH = ("--per_device_train_batch_size", 4, "--max_steps", 2, "--learning_rate", 0.001, "--warmup_steps", 0)
FINE_TUNING = ("--kl_weight", 0)
ENGLISH = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>"]


@pytest.fixture(scope="module")
def speech(clips, tmp_path_factory) -> Path:
    """Four clips with their transcripts, and no labels."""
    return stages.write_dataset(tmp_path_factory.mktemp("own") / "speech", clips[:4])


@pytest.fixture(scope="module")
def as_labels(clips, tiny_teacher, tmp_path_factory) -> Path:
    """The same with labels made of the transcripts by hand."""
    rows = []
    for clip in clips[:4]:
        label = stages.make_label(tiny_teacher, clip["transcription"])
        rows.append({"audio": clip["audio"], "whisper_transcript": label})
    return stages.write_dataset(tmp_path_factory.mktemp("own") / "labelled", rows)


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory) -> Path:
    return stages.initialise(tiny_teacher, tmp_path_factory.mktemp("own") / "init")


def fine_tune(student: Path, dataset: Path | str, output: Path, *flags) -> Path:
    """Train without a teacher; gives the directory of the trained model."""
    given = ["--model_name_or_path", student, "--output_dir", output, "--train_dataset_name", dataset]
    given += ["--language", "ja", "--do_train", "--dtype", "float32", "--logging_steps", 1, "--report_to", "none"]
    stages.run(script.main, *given, *FINE_TUNING, *BATCH, *flags)
    return output


def weights(model: Path) -> dict[str, torch.Tensor]:
    return WhisperForConditionalGeneration.from_pretrained(model).state_dict()


def test_labels_are_made_from_the_texts(speech, as_labels, student, tiny_teacher, tmp_path, caplog):
    """With a teacher as well: its divergence is that on the true text."""
    with caplog.at_level(logging.INFO):
        made = stages.distil(student, tiny_teacher, speech, tmp_path / "made", *BATCH)
    assert f"{speech}: labels are made from its column transcription" in caplog.text
    given = stages.distil(student, tiny_teacher, as_labels, tmp_path / "given", *BATCH)
    for name in ("loss", "ce_loss", "kl_loss"):
        assert stages.read_figures(made, name) == stages.read_figures(given, name)


def test_the_lines_of_a_text_make_one_line_of_a_label(clips, student, tmp_path):
    """Whisper says no line breaks. Its own .txt files have one behind each segment, and cells of Excel may."""
    losses = []
    for number, mark in enumerate(("\n", "\r\n", " ")):
        rows = [{"audio": clip["audio"], "transcription": f"はい。{mark}{clip['transcription']}"} for clip in clips[:4]]
        dataset = stages.write_dataset(tmp_path / f"speech{number}", rows)
        losses.append(stages.read_figures(fine_tune(student, dataset, tmp_path / f"out{number}"), "loss"))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("flags", [(), ("--freeze_encoder",)], ids=["all", "decoder"])
def test_fine_tuning_is_what_plain_cross_entropy_gives(speech, student, clips, flags, tmp_path):
    """The first step, and its gradient: AdamW's first update is the rate times the sign of it."""
    output = fine_tune(student, speech, tmp_path / "out", *flags, "--ce_weight", 1, "--max_grad_norm", 0)
    model = WhisperForConditionalGeneration.from_pretrained(student)
    total = 0.0
    tokens = 0
    for clip in clips[:4]:
        label = torch.tensor([stages.make_label(student, clip["transcription"])])
        features = stages.features_of(student, stages.samples_of(clip["audio"])[:, 0]).half().float()
        logits = model(features, decoder_input_ids=label[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(logits[0], label[0, 1:], reduction="sum")
        tokens += label.shape[1] - 1
    assert stages.read_figures(output, "loss")[0] == pytest.approx(total.item() / tokens, rel=1e-4)
    assert stages.read_figures(output, "kl_loss") == [0.0, 0.0]
    is_frozen = torch.equal(weights(output)["model.encoder.conv1.weight"], model.model.encoder.conv1.weight)
    assert is_frozen == bool(flags)


def test_fine_tuning_loads_no_teacher_and_says_so_in_the_card(speech, student, tmp_path):
    gone = tmp_path / "gone"
    held_out = ("--eval_dataset_name", speech, "--eval_split_name", "train", "--eval_steps", 1)
    output = fine_tune(student, speech, tmp_path / "out", *held_out, "--teacher_model_name_or_path", gone)
    card = (output / "README.md").read_text()
    assert "fine-tuned from init on 4 rows of speech" in card
    assert "fine-tuning" in card
    assert len(stages.read_figures(output, "eval_cer")) == 3
    record = json.loads((output / "distillation.json").read_text())
    assert record["teacher_evaluation"] is None
    assert "teacher" not in record["settings"]


def test_fine_tuning_goes_on_where_it_was_interrupted(speech, student, tmp_path):
    whole = fine_tune(student, speech, tmp_path / "whole", "--max_steps", 4)
    fine_tune(student, speech, tmp_path / "halves", "--max_steps", 2)
    halves = fine_tune(student, speech, tmp_path / "halves", "--max_steps", 4)
    ours = weights(halves)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights(whole).items())


def test_a_fine_tuned_model_has_learnt_the_texts(speech, student, tmp_path):
    flags = ("--max_steps", 60, "--learning_rate", 0.01, "--logging_steps", 20)
    output = fine_tune(student, speech, tmp_path / "out", *flags)
    losses = stages.read_figures(output, "loss")
    assert losses[-1] < 0.5 * losses[0]


def test_without_a_teacher_the_weight_of_its_divergence_must_be_zero(speech, student, tmp_path, capsys):
    given = ["--model_name_or_path", student, "--output_dir", tmp_path, "--train_dataset_name", speech, "--do_train"]
    with pytest.raises(SystemExit):
        script.main([str(word) for word in given])
    assert "--teacher_model_name_or_path is needed, unless --kl_weight is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--cache_encoder_outputs .* does not go with --kl_weight 0"):
        fine_tune(student, speech, tmp_path / "out", "--freeze_encoder", "--cache_encoder_outputs", tmp_path / "cache")


def test_rows_without_text_are_counted_and_left_out(clips, student, tmp_path):
    rows = [{**clip, "transcription": text} for clip, text in zip(clips, ["", "はい", "いいえ"], strict=False)]
    output = fine_tune(student, stages.write_dataset(tmp_path / "speech", rows), tmp_path / "out")
    record = json.loads((output / "distillation.json").read_text())
    assert list(record["rows_left_out"].values()) == [{"no label": 1}]


def test_rows_without_text_can_be_silence(clips, student, monkeypatch, tmp_path):
    """Their label is a text of no characters: they are trained on, and nothing is left out."""
    texts = ["", None, "はい"]
    rows = [{**clip, "transcription": text} for clip, text in zip(clips, texts, strict=False)]
    noise = stages.write_dataset(tmp_path / "noise", rows)
    seen = labels_seen(student, noise, monkeypatch, tmp_path, "--train_on_silence")
    nothing = ["<|startoftranscript|>", "<|ja|>", "<|transcribe|>", "<|notimestamps|>", "<|endoftext|>"]
    assert [label == nothing for label in seen].count(True) == 2
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert list(record["rows_left_out"].values()) == [{}]


def test_a_dataset_without_labels_and_texts_is_refused(clips, student, tmp_path):
    rows = [{"audio": clip["audio"], "sentence": clip["transcription"]} for clip in clips[:2]]
    dataset = stages.write_dataset(tmp_path / "speech", rows)
    with pytest.raises(SystemExit, match=r"needs labels or a column of texts \(--text_column_name\).*audio, sentence"):
        fine_tune(student, dataset, tmp_path / "out")
    assert fine_tune(student, dataset, tmp_path / "out", "--text_column_name", "sentence").is_dir()


# ---- several datasets ----


def labels_seen(student: Path, sources: str, monkeypatch, tmp_path: Path, *flags) -> list[list[str]]:
    """The tokens of the labels that a training step sees, by row."""
    seen = []
    collate = script.collate

    def note(examples):
        seen.extend(example["tokens"].tolist() for example in examples)
        return collate(examples)

    monkeypatch.setattr(script, "collate", note)
    fine_tune(student, sources, tmp_path / "out", "--per_device_train_batch_size", 16, "--max_steps", 1, *flags)
    tokenizer = WhisperTokenizerFast.from_pretrained(student)
    return sorted(tokenizer.convert_ids_to_tokens(ids) for ids in seen)


def test_datasets_of_several_languages_tasks_and_kinds_mix(speech, as_labels, student, clips, monkeypatch, tmp_path):
    """Texts get the language and task of their dataset, labels keep their own."""
    english = [{"audio": clip["audio"], "text": "good morning"} for clip in clips[:2]]
    english = stages.write_dataset(tmp_path / "english", english)
    translated = Path(shutil.copytree(speech, tmp_path / "translated"))
    sources = f"{as_labels}+{english}+{translated}"
    flags = ("--language", "en+English+JA", "--task", "translate+transcribe+translate")
    starts = [label[:3] for label in labels_seen(student, sources, monkeypatch, tmp_path, *flags)]
    japanese = ["<|startoftranscript|>", "<|ja|>"]
    assert starts == sorted([ENGLISH] * 2 + [[*japanese, "<|transcribe|>"]] * 4 + [[*japanese, "<|translate|>"]] * 4)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["language"], generation["task"]) == ("en", "translate")


def test_what_is_held_out_is_in_the_first_language_and_task(speech, student, tmp_path):
    """The figures are those of the student before it is trained."""
    flags = ("--eval_dataset_name", speech, "--eval_split_name", "train", "--max_label_length", 60, "--max_steps", 1)
    alone = fine_tune(student, speech, tmp_path / "alone", *flags, "--task", "translate")
    several = (*flags, "--language", "ja+en", "--task", "translate+transcribe")
    mixed = fine_tune(student, f"{speech}+{speech}", tmp_path / "mixed", *several)
    for name in ("eval_loss", "eval_cer", "eval_wer"):
        assert stages.read_figures(mixed, name)[0] == stages.read_figures(alone, name)[0]


def test_a_language_or_task_that_the_model_lacks_is_named_wherever_it_stands(speech, student, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"--language xx: .* has no such language"):
        fine_tune(student, f"{speech}+{speech}", tmp_path / "out", "--language", "ja+xx")
    with pytest.raises(SystemExit, match=r"--language ja\+en\+de names 3 for 2 datasets"):
        fine_tune(student, f"{speech}+{speech}", tmp_path / "out", "--language", "ja+en+de")
    with pytest.raises(SystemExit):
        fine_tune(student, speech, tmp_path / "out", "--task", "transcribe+sing")
    assert "'transcribe+sing' is not one of" in capsys.readouterr().err


def test_each_dataset_has_its_own_weight_of_the_divergence(speech, as_labels, student, tiny_teacher, tmp_path):
    """With all rows in one batch the loss is the sum of its parts."""
    both = f"{speech}+{as_labels}"
    batch = ("--per_device_train_batch_size", 8, "--max_steps", 1)

    def losses(name: str, *flags) -> tuple[float, float]:
        output = stages.distil(student, tiny_teacher, both, tmp_path / name, *batch, *flags)
        return stages.read_figures(output, "loss")[0], stages.read_figures(output, "kl_loss")[0]

    whole, kl = losses("same", "--kl_weight", 1)
    loss, shared_kl = losses("each", "--kl_weight", "0.5+1.5")
    assert shared_kl == pytest.approx(kl * (0.5 + 1.5) / 2 / 1.5, rel=1e-5)  # both datasets have the same clips
    assert loss == pytest.approx(whole, rel=1e-5)
    alone, _ = losses("none", "--kl_weight", "0+2")
    assert alone == pytest.approx(whole, rel=1e-5)
    with pytest.raises(SystemExit, match=r"--kl_weight names 3 for 2 datasets"):
        losses("three", "--kl_weight", "1+2+3")


def test_the_gradient_of_shares_is_that_of_the_formula():
    torch.manual_seed(1)
    logits = torch.randn(6, 11, requires_grad=True)
    teacher_logits, targets = torch.randn(6, 11), torch.arange(6)
    shares = torch.tensor([0.0, 0.25, 1.0, 0.5, 1.0, 0.0])
    losses, gradient = script.chunk_loss(logits.detach(), teacher_logits, targets, shares, 2.0, (0.8, 1.5))
    ce = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    inputs = ((logits / 2).log_softmax(-1), (teacher_logits / 2).log_softmax(-1))
    divergence = torch.nn.functional.kl_div(*inputs, reduction="none", log_target=True).sum(-1)
    kl = 4 * (shares * divergence).sum()
    torch.testing.assert_close(losses, torch.stack([ce, kl]))
    (expected,) = torch.autograd.grad(0.8 * ce + 1.5 * kl, logits)
    torch.testing.assert_close(gradient, expected)
