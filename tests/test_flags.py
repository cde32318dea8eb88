"""Every flag of every script is set to a working value by some test; here are those of the flags that no other sets."""

import argparse
import ast
import contextlib
import importlib
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import wandb
from huggingface_hub import HfApi
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperAttention

import reazonspeech_manual_dataloader
import run_distillation
import run_pseudo_labelling
from tests.stages import (
    distil,
    evaluate,
    features_of,
    filter_clips,
    initialise,
    label,
    load,
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

TESTS = Path(__file__).parent
SCRIPTS = (
    *("reazonspeech_manual_downloader", "reazonspeech_manual_dataloader", "run_pseudo_labelling"),
    *("run_data_filtering", "create_student_model", "run_distillation", "run_short_form_eval"),
)
# What functions of tests/stages.py run. In the files that use them, the words inside their calls count.
CALLS = {
    "load": "reazonspeech_manual_dataloader",
    "label": "run_pseudo_labelling",
    "filter_clips": "run_data_filtering",
    "initialise": "create_student_model",
    "distil": "run_distillation",
    "evaluate": "run_short_form_eval",
}
# Flags that no test can set to a working value other than the default, and why.
EXCEPTIONS: dict[str, tuple[str, ...]] = {}


# ---- the listing -----------------------------------------------------------------------------------------------------


def flags_of(script: str) -> list[argparse.Action]:
    """The options of a script's parser."""
    parsers = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, _: parsers.append(self) or sys.exit())
        importlib.import_module(script).parse_args([])
    return [action for action in parsers[0]._actions if action.option_strings and action.dest != "help"]


def words_of(node: ast.AST) -> list[str]:
    """The words of all strings in a piece of code, in their order; `…` is what is not known before it runs.

    `|` is the end of a list, a call or anything else that has parts, behind which a flag has no value.
    """
    if isinstance(node, ast.Constant):
        return node.value.split() if isinstance(node.value, str) else [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        text = "".join(piece.value if isinstance(piece, ast.Constant) else "…" for piece in node.values)
        return text.split()
    words = [word for child in ast.iter_child_nodes(node) for word in words_of(child)]
    if words:
        return [*words, "|"]
    return ["…"] if isinstance(node, ast.expr) else []


def words_for(script: str) -> list[list[str]]:
    """What the tests give to a script: all words of a file that imports it under another name, and calls elsewhere."""
    found = []
    for path in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names if name.asname}
        if script in imported:
            found.append(words_of(tree))
        if any(isinstance(node, ast.ImportFrom) and node.module == "tests.stages" for node in nodes):
            calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
            found += [words_of(call) for call in calls if CALLS.get(call.func.id) == script]
    return found


def is_working(action: argparse.Action, value: str) -> bool:
    """Whether the parser takes this value of a flag, and it is not the default."""
    if value == "…":
        return True
    try:
        read, default = ((action.type or str)(text) for text in (value, str(action.default)))
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return action.default is None
    return read != default and read in (action.choices or [read])


def is_set(action: argparse.Action, words: list[str]) -> bool:
    """Whether a flag is among these words, with a working value that is not its default."""
    for flag, value in zip(words, [*words[1:], "|"], strict=True):
        if flag in action.option_strings:
            alone = value == "|" or value.startswith("--")
            if is_working(action, "True" if alone and action.nargs == "?" else value):
                return True
    return False


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_set_to_another_value_than_its_default_by_some_test(script):
    given = words_for(script)
    untested = [
        action.option_strings[-1] for action in flags_of(script) if not any(is_set(action, words) for words in given)
    ]
    assert sorted(untested) == sorted(EXCEPTIONS.get(script, ()))


def test_the_listing_tells_a_flag_that_is_set_from_one_that_is_not():
    parser = argparse.ArgumentParser()
    number = parser.add_argument("--number", type=int, default=3)
    switch = parser.add_argument("--switch", nargs="?", const=True, default=False)
    for code, set_number, set_switch in (
        ("run('--number', 4, '--switch')", True, True),
        ("run('--number', 3, '--switch', 'False')", False, False),
        ("run('--number', 'many', '--other')", False, False),
        ("run('--number', some, f'--switch {some} now')", True, True),
        ("given = '--number 5 --switch'.split()", True, True),
        ("assert run(*['--switch']) == 0", False, True),
        ("print('no number, no switch')", False, False),
    ):
        words = words_of(ast.parse(code))
        assert (is_set(number, words), is_set(switch, words)) == (set_number, set_switch), code


# What may change from one start of a training to the next: it changes no weight, or the record knows it otherwise.
FREE = {
    *("model_name_or_path", "teacher_model_name_or_path", "attn_type", "gradient_checkpointing", "torch_compile"),
    *("train_dataset_name", "train_dataset_config_name", "train_split_name", "audio_column_name", "text_column_name"),
    *("preprocessing_num_workers", "dataloader_num_workers", "cache_encoder_outputs", "do_train", "num_train_epochs"),
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "train_on_silence",  # it makes other labels, of which the record has a digest
}


def test_every_flag_of_training_is_a_setting_of_the_run_or_known_to_change_no_weight():
    groups = {"models", "data", "training"}
    flags = {action.dest for action in flags_of("run_distillation") if action.container.title in groups}
    assert flags - FREE | {"kl_shares"} == set(run_distillation.SETTINGS)  # of --kl_weight, for each dataset
    assert flags > FREE


# What may change from one start of a labelling to the next: it changes no label, or the settings know it otherwise.
FREE_OF_LABELLING = {
    *("model_name_or_path", "language", "task", "max_samples"),
    *("dataset_name", "dataset_config_name", "dataset_split_name", "dataset_dir_suffix", "text_column_name"),
}


def test_every_flag_of_labelling_is_a_setting_of_the_run_or_known_to_change_no_label():
    groups = {"input", "teacher and labels"}
    flags = {action.dest for action in flags_of("run_pseudo_labelling") if action.container.title in groups}
    assert flags - FREE_OF_LABELLING == set(run_pseudo_labelling.SETTINGS) - {"shard_size", "dtype"}  # of "work"
    assert flags > FREE_OF_LABELLING


# ---- inputs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory) -> Path:
    return initialise(tiny_teacher, tmp_path_factory.mktemp("student") / "init")


@pytest.fixture(scope="module")
def speaker(tiny_teacher, tmp_path_factory) -> Path:
    """A model that says `あいうえお`, whatever it hears."""
    return speaking(tiny_teacher, tmp_path_factory.mktemp("speaker") / "speaker", "あいうえお")


def speech(clips: list[dict], number: int) -> list[dict]:
    """Rows of so many clips of speech."""
    return [{name: clip[name] for name in ("name", "audio", "transcription")} for clip in clips[:number]]


@pytest.fixture(scope="module")
def spoken(clips, tmp_path_factory) -> Path:
    """A dataset of three clips of speech."""
    return write_dataset(tmp_path_factory.mktemp("spoken") / "spoken", speech(clips, 3))


@pytest.fixture(scope="module")
def labelled(tiny_teacher, clips, tmp_path_factory) -> Path:
    """The same with their transcriptions as labels."""
    return write_dataset(tmp_path_factory.mktemp("labelled") / "labelled", with_labels(tiny_teacher, speech(clips, 3)))


def with_labels(teacher: Path, rows: list[dict]) -> list[dict]:
    return [row | {"whisper_transcript": make_label(teacher, row["transcription"])} for row in rows]


@pytest.fixture(scope="module")
def misplaced(tiny_teacher, clips, tmp_path_factory) -> Path:
    """The same under `sound` and `sentence`, with other sounds and texts where these are by default."""
    rows = []
    for row in with_labels(tiny_teacher, speech(clips, 3)):
        wrong = {"audio": tone(1.0), "text": "違う", "transcription": "違う"}
        rows.append({**row, **wrong, "sound": row["audio"], "sentence": row["transcription"]})
    return write_dataset(tmp_path_factory.mktemp("misplaced") / "misplaced", rows)


@contextlib.contextmanager
def watched():
    """The modules that are run, each time that they are, with their inputs."""
    seen = []
    hook = register_module_forward_pre_hook(lambda module, inputs: seen.append((module, inputs)))
    yield seen
    hook.remove()


def events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each figure that tensorboard has in a directory."""
    (file,) = directory.glob("events.out.tfevents.*")
    found = EventAccumulator(str(file)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def is_private(repository: str, kind: str = "dataset") -> bool:
    return HfApi().repo_info(repository, repo_type=kind).private


# ---- flags of several stages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_attention_is_of_the_kind_that_attn_type_names(tiny_teacher, student, spoken, labelled, tmp_path, kind):
    short = ("--language", "ja", "--max_label_length", 8)
    with watched() as seen:
        label(tiny_teacher, spoken, tmp_path / "1", *short, "--attn_type", kind)
        distil(student, tiny_teacher, labelled, tmp_path / "2", "--max_steps", 1, "--attn_type", kind)
        evaluate(tiny_teacher, spoken, tmp_path / "3", "--attn_type", kind, "--dtype", "bfloat16")
    attentions = [module for module, _ in seen if isinstance(module, WhisperAttention)]
    assert {module.config._attn_implementation for module in attentions} == {kind}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_labelling_and_evaluation_compute_in_the_precision_that_dtype_names_on_a_cpu_too(
    tiny_teacher, spoken, tmp_path, dtype
):
    with watched() as seen:
        label(tiny_teacher, spoken, tmp_path / "labels", "--language", "ja", "--max_label_length", 8, "--dtype", dtype)
        evaluate(tiny_teacher, spoken, tmp_path / "texts", "--dtype", dtype)
    models = [module for module, _ in seen if type(module).__name__ in ("WhisperEncoder", "WhisperDecoder")]
    assert {weight.dtype for module in models for weight in module.parameters()} == {getattr(torch, dtype)}
    record = json.loads((tmp_path / "labels" / "labelling.default.train.json").read_text())
    assert record["settings"]["dtype"] == read_metrics(tmp_path / "texts")["dtype"] == dtype


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_without_dtype_the_precision_that_is_recorded_is_the_one_that_is_computed_in(
    chosen, tiny_teacher, spoken, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_pseudo_labelling, "choose_dtype", lambda dtype, device: chosen)  # as on any machine
    with watched() as seen:
        label(tiny_teacher, spoken, tmp_path / "labels", "--language", "ja", "--max_label_length", 8)
    (dtype,) = {module.conv1.weight.dtype for module, _ in seen if type(module).__name__ == "WhisperEncoder"}
    record = json.loads((tmp_path / "labels" / "labelling.default.train.json").read_text())
    assert (record["settings"]["dtype"], dtype) == (chosen, getattr(torch, chosen))


def test_audio_and_texts_are_read_from_the_columns_that_are_named(tiny_teacher, misplaced, spoken, clips, tmp_path):
    flags = ("--language", "ja", "--dtype", "float32", "--max_label_length", 24)
    found = label(tiny_teacher, misplaced, tmp_path / "named", *flags, "--audio_column_name", "sound")
    expected = label(tiny_teacher, spoken, tmp_path / "usual", *flags)
    assert read_labels(found) == read_labels(expected)
    assert [row["sound"]["bytes"] for row in read_rows(found)] == [clip["audio"] for clip in clips[:3]]

    # Another threshold has the same texts, but not this audio.
    filter_clips(tiny_teacher, misplaced, "--cer_threshold", 10, "--text_column_name", "sentence")
    filter_clips(tiny_teacher, misplaced, "--audio_column_name", "sound", "--text_column_name", "sentence")
    kept = read_rows(misplaced.with_name("misplaced.wer_10.0"))
    assert [row["audio"]["bytes"] for row in kept] == [clip["audio"] for clip in clips[:3]]
    assert [row["text"] for row in kept] == [clip["transcription"] for clip in clips[:3]]
    alone = shutil.copytree(misplaced, tmp_path / "alone")
    filter_clips(tiny_teacher, alone, "--audio_column_name", "sound", "--text_column_name", "sentence")
    features = read_rows(misplaced.with_name("misplaced.wer_10.0.vectorized"))
    assert features == read_rows(tmp_path / "alone.wer_10.0.vectorized")

    found = tmp_path / "found"
    evaluate(tiny_teacher, misplaced, found, "--audio_column_name", "sound", "--text_column_name", "sentence")
    assert read_predictions(found) == read_predictions(evaluate(tiny_teacher, spoken, tmp_path / "expected"))


def test_training_reads_audio_from_the_column_that_is_named(tiny_teacher, student, misplaced, labelled, tmp_path):
    usual = distil(student, tiny_teacher, labelled, tmp_path / "usual", "--max_steps", 1)
    named = distil(
        student, tiny_teacher, misplaced, tmp_path / "named", "--max_steps", 1, "--audio_column_name", "sound"
    )
    wrong = distil(student, tiny_teacher, misplaced, tmp_path / "wrong", "--max_steps", 1)
    assert read_figures(named, "loss") == read_figures(usual, "loss")
    assert read_figures(wrong, "loss") != read_figures(usual, "loss")


def test_new_repositories_of_data_are_private_unless_told_otherwise(hub, clips, tiny_teacher, labelled, tmp_path):
    """Loaded, labelled and filtered."""
    root = write_download(tmp_path / "down", clips)
    short = ("--language", "ja", "--max_label_length", 8)
    names = ("loaded", "labels", "cut.wer_10.0", "cut.wer_10.0.vectorized")
    for value, name in (("True", "closed"), ("False", "open")):
        out = tmp_path / name
        repositories = [f"acme/{name}-{kind}" for kind in ("loaded", "labels", "cut")]
        target = ("-t", "small", "--hub_model_id", repositories[0])
        load(root, out / "loaded", *target, "--hub_private_repo", value)
        label(
            tiny_teacher,
            labelled,
            out / "labels",
            *short,
            "--hub_model_id",
            repositories[1],
            "--hub_private_repo",
            value,
        )
        filter_clips(
            tiny_teacher, labelled, "--output_dir", out, "--hub_model_id", repositories[2], "--hub_private_repo", value
        )
        private = {repository: is_private(f"acme/{name}-{repository}") for repository in names}
        assert private == dict.fromkeys(names, value == "True")


def test_new_repositories_of_models_are_private_unless_told_otherwise(hub, tiny_teacher, student, labelled, tmp_path):
    for value, name in (("True", "closed"), ("False", "open")):
        push = ("--push_to_hub", "--hub_model_id", f"acme/{name}-init")
        initialise(tiny_teacher, tmp_path / f"{name}-init", *push, "--hub_private_repo", value)
        flags = ("--max_steps", 1, "--push_to_hub", "--hub_model_id", f"acme/{name}-trained")
        distil(student, tiny_teacher, labelled, tmp_path / f"{name}-trained", *flags, "--hub_private_repo", value)
        for kind in ("init", "trained"):
            assert is_private(f"acme/{name}-{kind}", "model") == (value == "True")


def test_workers_change_no_label_no_text_and_no_loss(tiny_teacher, student, clips, tmp_path):
    data = tmp_path / "data"
    for number in range(2):  # two files, for two processes to read
        write_dataset(data, with_labels(tiny_teacher, speech(clips[number:], 1)))
        path = data / "default" / "train-00000-of-00001.parquet"
        path.rename(data / "default" / f"train-0000{number}-of-00002.parquet")
    labels, texts, losses = [], [], []
    short = ("--language", "ja", "--dtype", "float32", "--max_label_length", 24)
    for name, processes, threads in (("one", 1, 0), ("more", 2, 3)):
        out = tmp_path / name
        label(
            *(tiny_teacher, data, out / "labels", *short),
            *("--preprocessing_num_workers", processes, "--dataloader_num_workers", threads),
        )
        labels.append(read_labels(out / "labels"))
        evaluate(
            *(tiny_teacher, data, out / "texts"),
            *("--preprocessing_num_workers", processes, "--dataloader_num_workers", threads),
        )
        texts.append(read_predictions(out / "texts"))
        distil(
            *(student, tiny_teacher, data, out / "student", "--max_steps", 1),
            *("--preprocessing_num_workers", processes),
        )
        losses.append(read_figures(out / "student", "loss"))
    assert labels[0] == labels[1]
    assert labels[0][0] == stock_label(tiny_teacher, samples_of(clips[0]["audio"])[:, 0], 24)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def parts(tiny_teacher, clips, tmp_path_factory) -> Path:
    """Two splits and two configurations, of different rows: one, two and three times the same."""
    root = tmp_path_factory.mktemp("parts") / "parts"
    rows = with_labels(tiny_teacher, speech(clips, 3))
    for number, (config, split) in enumerate(PARTS):
        write_dataset(root, rows[number : number + 1] * (1 + number), config, split)
    return root


PARTS = (("one", "train"), ("one", "validation"), ("two", "validation"))


@pytest.mark.parametrize("part", PARTS, ids=" ".join)
def test_every_stage_takes_the_configuration_and_the_split_that_are_named(tiny_teacher, parts, clips, tmp_path, part):
    (config, split), rows = part, 1 + PARTS.index(part)
    name = clips[PARTS.index(part)]["name"]
    short = ("--language", "ja", "--max_label_length", 8)
    output = tmp_path / "labels"
    label(tiny_teacher, parts, output, *short, "--dataset_config_name", config, "--dataset_split_name", split)
    assert [row["name"] for row in read_rows(output, config, split)] == [name] * rows
    filter_clips(
        *(tiny_teacher, parts, "--output_dir", tmp_path / "cut", "--dataset_config_name", config, "--split", split),
        "--skip_logmel",
    )
    assert len(read_rows(tmp_path / "cut" / "parts.wer_10.0", config, split)) == rows
    output = tmp_path / "texts"
    evaluate(tiny_teacher, parts, output, "--dataset_config_name", config, "--dataset_split_name", split)
    assert [row["id"] for row in read_predictions(output, split)] == [name] * rows


# ---- ranges of a download --------------------------------------------------------------------------------------------


def write_download(root: Path, clips: list[dict]) -> Path:
    """Two ranges of a download of the subset `small`, each with one tar of two clips."""
    for number in range(2):
        directory = root / f"small_{number}_{number + 1}"
        directory.mkdir(parents=True)
        with tarfile.open(directory / f"small.{number:03x}.tar", "w") as tar:
            for place, clip in enumerate(clips[2 * number :][:2]):
                member = tarfile.TarInfo(f"{number:03x}/{place}.flac")
                member.size = len(clip["audio"])
                tar.addfile(member, io.BytesIO(clip["audio"]))
        lines = [f"{n // 2:03x}/{n % 2}.flac\t{clip['transcription']}\n" for n, clip in enumerate(clips[:4])]
        (directory / "small.small.tsv").write_text("".join(lines), encoding="utf-8")
    return root


def test_one_range_of_a_download_is_loaded_or_labelled(clips, tiny_teacher, tmp_path, monkeypatch):
    root = write_download(tmp_path / "down", clips)
    names = ["000/0.flac", "000/1.flac", "001/0.flac", "001/1.flac"]
    whole = read_rows(load(root, tmp_path / "whole", "-t", "small"), "small")
    assert [row["name"] for row in whole] == names
    part = load(root, tmp_path / "part", "-t", "small", "--dataset_dir_suffix", "1_2")
    assert read_rows(part, "small") == whole[2:]

    monkeypatch.setenv("REAZONSPEECH_DATA_DIR", str(root))
    loader = Path(reazonspeech_manual_dataloader.__file__)
    flags = ("--dataset_config_name", "small", "--language", "ja", "--max_label_length", 8)
    for suffix, expected in (("0_1", names[:2]), ("1_2", names[2:])):
        output = label(tiny_teacher, loader, tmp_path / suffix, *flags, "--dataset_dir_suffix", suffix)
        assert [row["name"] for row in read_rows(output, "small")] == expected


# ---- trackers --------------------------------------------------------------------------------------------------------


def test_labelling_reports_to_the_project_that_is_named_every_so_many_batches(tiny_teacher, clips, tmp_path):
    data = write_dataset(tmp_path / "data", speech(clips, 6))
    flags = ("--language", "ja", "--max_label_length", 8, "--per_device_eval_batch_size", 1)
    label(
        tiny_teacher,
        data,
        tmp_path / "out",
        *flags,
        *("--report_to", "tensorboard", "--wandb_project", "my-labels", "--logging_steps", 2),
    )
    found = events(tmp_path / "out" / "my-labels")
    assert found["clips"] == [(2, 2.0), (4, 4.0), (6, 6.0)]
    assert [step for step, _ in found["clips_per_second"]] == [2, 4, 6]


def test_the_speed_that_labelling_reports_is_of_this_run_alone(tiny_teacher, clips, tmp_path):
    """Clips and hours of audio are both by the same time, so that this shortens out of their ratio."""
    data = write_dataset(tmp_path / "data", speech(clips, 6))
    flags = ["--language", "ja", "--max_label_length", 8, "--per_device_eval_batch_size", 1, "--shard_size", 2]
    label(tiny_teacher, data, tmp_path / "out", *flags)
    (tmp_path / "out" / "default" / "train-00002-of-00003.parquet").unlink()
    tracker = ("--report_to", "tensorboard", "--wandb_project", "again", "--logging_steps", 2)
    label(tiny_teacher, data, tmp_path / "out", *flags, *tracker)
    found = events(tmp_path / "out" / "again")
    (_, clips_rate), (_, audio_rate) = found["clips_per_second"][-1], found["audio_hours_per_hour"][-1]
    seconds = sum(len(samples_of(clip["audio"])) / 16_000 for clip in clips[4:6])
    assert clips_rate / audio_rate == pytest.approx(2 / seconds, rel=1e-4)


def test_the_evaluation_reports_its_rates_to_the_project_that_is_named(tiny_teacher, spoken, tmp_path):
    output = evaluate(
        tiny_teacher, spoken, tmp_path / "out", "--report_to", "tensorboard", "--wandb_project", "my-rates"
    )
    found, metrics = events(output / "my-rates"), read_metrics(output)
    assert {name: values[0][1] for name, values in found.items()} == {
        name: pytest.approx(metrics[name], rel=1e-5) for name in ("cer", "wer", "cer_raw", "wer_raw")
    }


def test_training_reports_its_figures_to_the_project_that_is_named(tiny_teacher, student, labelled, tmp_path):
    output = distil(
        student,
        tiny_teacher,
        labelled,
        tmp_path / "out",
        *("--max_steps", 4, "--logging_steps", 2, "--report_to", "tensorboard", "--wandb_project", "my-student"),
    )
    found = events(output / "my-student")
    for name in ("loss", "ce_loss", "kl_loss", "learning_rate", "grad_norm"):
        assert found[name] == [
            (step, pytest.approx(value, rel=1e-5))
            for step, value in zip((2, 4), read_figures(output, name), strict=True)
        ]


def test_a_run_has_the_name_and_the_project_that_it_is_given_in_wandb(
    tiny_teacher, student, labelled, tmp_path, monkeypatch
):
    started, start = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda *args, **named: started.append(start(*args, **named)) or started[0])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # forget the mode that an earlier test has set
    distil(
        *(student, tiny_teacher, labelled, tmp_path / "out", "--max_steps", 1, "--report_to", "wandb"),
        *("--wandb_name", "my-named-run", "--wandb_project", "my-own-project"),
    )
    (run,) = started
    assert (run.name, run.project) == ("my-named-run", "my-own-project")
    wandb.teardown()


# ---- the filter ------------------------------------------------------------------------------------------------------


def test_which_labels_keep_their_timestamps_is_drawn_by_the_seed(tiny_teacher, tmp_path):
    timed = {"transcription": "東京", "whisper_transcript": make_label(tiny_teacher, "東京", 0.0, 0.2)}
    data = write_dataset(tmp_path / "data", [{"audio": tone(0.2), **timed} for _ in range(24)])
    drawn = []
    for number, seed in enumerate((42, 42, 7)):
        out = tmp_path / str(number)
        choice = ("--timestamp_probability", 0.5, "--skip_logmel")
        filter_clips(tiny_teacher, data, *choice, "--output_dir", out, "--seed", seed)
        labels = [row["labels"] for row in read_rows(out / "data.wer_10.0")]
        drawn.append([row == timed["whisper_transcript"] for row in labels])
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(4 < sum(kept) < 20 for kept in drawn)


# ---- the student -----------------------------------------------------------------------------------------------------


def test_a_teacher_may_lie_in_a_folder_of_its_repository(tiny_teacher, student, hub, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "repository" / "models" / "small")
    api = HfApi()
    api.create_repo("acme/with-folders")
    api.upload_folder(repo_id="acme/with-folders", folder_path=tmp_path / "repository")
    expected = (student / "model.safetensors").read_bytes()
    for number, source in enumerate((tmp_path / "repository", "acme/with-folders")):
        output = initialise(source, tmp_path / str(number), "--subfolder", "models/small")
        assert (output / "model.safetensors").read_bytes() == expected
        assert (output / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


def test_the_saved_student_is_run_on_features_that_the_seed_draws(tiny_teacher, tmp_path):
    heard = []
    for number, seed in enumerate((1, 1, 2)):
        with watched() as seen:
            initialise(tiny_teacher, tmp_path / str(number), "--seed", seed)
        heard += [inputs[0] for module, inputs in seen if type(module).__name__ == "Conv1d"][:1]
    assert torch.equal(heard[0], heard[1])
    assert not torch.equal(heard[0], heard[2])


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrangement", ["tiny_teacher", "tiny_teacher_v2"])
def test_three_steps_are_those_of_a_plain_loop_with_every_setting_of_the_optimiser(
    request, clips, tmp_path, arrangement
):
    tiny_teacher = request.getfixturevalue(arrangement)
    student = initialise(tiny_teacher, tmp_path / "init")
    labelled = write_dataset(tmp_path / "labelled", with_labels(tiny_teacher, speech(clips, 3)))
    output = distil(
        student,
        tiny_teacher,
        labelled,
        tmp_path / "out",
        *("--max_steps", 3, "--learning_rate", 0.01, "--warmup_steps", 2, "--max_grad_norm", 0.05),
        *("--weight_decay", 0.5, "--adam_beta1", 0.8, "--adam_beta2", 0.9, "--adam_epsilon", 0.001),
        *("--temperature", 3, "--ce_weight", 0.3, "--kl_weight", 0.7),
    )
    model = WhisperForConditionalGeneration.from_pretrained(student).eval()
    teacher = WhisperForConditionalGeneration.from_pretrained(tiny_teacher).eval()
    trained = list(model.model.decoder.parameters())
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.5}]
    groups += [{"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=0.001)
    losses = []
    for rate in (0.0, 0.005, 0.01):  # every step has all three rows
        loss, tokens = 0.0, 0
        for row in read_rows(labelled):
            ids = torch.tensor(row["whisper_transcript"])
            features = features_of(tiny_teacher, samples_of(row["audio"]["bytes"])[:, 0]).to(torch.float16).float()
            given = {"input_features": features, "decoder_input_ids": ids[None, :-1]}
            with torch.no_grad():
                teacher_logits = teacher(**given).logits[0]
            logits = model(**given).logits[0]  # (tokens, vocabulary)
            ce = F.cross_entropy(logits, ids[1:], reduction="sum")
            p, q = (teacher_logits / 3).log_softmax(-1), (logits / 3).log_softmax(-1)
            loss = loss + 0.3 * ce + 0.7 * 9 * F.kl_div(q, p, log_target=True, reduction="sum")
            tokens += len(ids) - 1
        optimizer.zero_grad()
        (loss / tokens).backward()
        losses.append(loss.item() / tokens)
        torch.nn.utils.clip_grad_norm_(trained, 0.05)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert read_figures(output, "loss") == pytest.approx(losses, rel=1e-4)
    ours, expected = load_file(output / "model.safetensors"), model.state_dict()
    assert max((ours[name] - expected[name]).abs().max().item() for name in ours) < 2e-5


def test_training_and_its_evaluation_take_the_configuration_and_the_split_that_are_named(
    tiny_teacher, student, parts, tmp_path
):
    single = {}
    for number, name in enumerate(PARTS):
        flags = ("--max_steps", 1, "--train_dataset_config_name", name[0], "--train_split_name", name[1])
        output = distil(student, tiny_teacher, parts, tmp_path / str(number), *flags)
        assert json.loads((output / "distillation.json").read_text())["rows"] == 1 + number
        single[name] = read_figures(output, "ce_loss")
    assert len({loss for (loss,) in single.values()}) == 3
    for name in PARTS[1:]:
        output = distil(
            student,
            tiny_teacher,
            parts,
            tmp_path / f"held-out {name}",
            *("--max_steps", 1, "--train_dataset_config_name", "one", "--max_label_length", 64),
            *("--eval_dataset_name", parts, "--eval_dataset_config_name", name[0], "--eval_split_name", name[1]),
        )
        assert read_figures(output, "eval_ce")[0] == pytest.approx(single[name][0], rel=1e-5)


def test_sampling_weights_are_the_shares_of_the_datasets_in_an_epoch(tiny_teacher, student, clips, tmp_path):
    rows = with_labels(tiny_teacher, speech(clips, 2))
    rows[1]["whisper_transcript"] = rows[1]["whisper_transcript"][:4] + rows[0]["whisper_transcript"][4:]
    assert len(rows[0]["whisper_transcript"]) == len(rows[1]["whisper_transcript"])
    data = [
        write_dataset(tmp_path / name, [row] * number) for name, row, number in (("a", rows[0], 2), ("b", rows[1], 6))
    ]
    flags = ("--max_steps", 1, "--per_device_train_batch_size", 8)  # a whole epoch
    alone = [
        read_figures(distil(student, tiny_teacher, path, tmp_path / f"{path.name}-out", *flags), "ce_loss")[0]
        for path in data
    ]
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)
    both = "+".join(map(str, data))
    mixed = distil(student, tiny_teacher, both, tmp_path / "mixed", *flags, "--train_dataset_samples", "3+1")
    assert read_figures(mixed, "ce_loss") == pytest.approx([0.75 * alone[0] + 0.25 * alone[1]], rel=1e-5)
    plain = distil(student, tiny_teacher, both, tmp_path / "plain", *flags)
    assert read_figures(plain, "ce_loss") == pytest.approx([0.25 * alone[0] + 0.75 * alone[1]], rel=1e-5)


def test_held_out_rows_are_evenly_spaced_where_they_are_too_many(tiny_teacher, student, labelled, tmp_path):
    rows = read_rows(labelled)
    ends = [{**row, "audio": row["audio"]["bytes"]} for row in (rows[0], rows[2])]
    some, flags = (
        write_dataset(tmp_path / "ends", ends),
        ("--eval_split_name", "train", "--max_steps", 1, "--max_label_length", 64),
    )
    losses = []
    for data, number in ((labelled, 2), (some, 0), (labelled, 0)):
        output = tmp_path / f"{data.name} {number}"
        distil(
            *(student, tiny_teacher, labelled, output, *flags, "--eval_dataset_name", data),
            *("--eval_max_samples", number),
        )
        losses.append(read_figures(output, "eval_ce")[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] != pytest.approx(losses[1], rel=1e-5)


@pytest.fixture(scope="module")
def contradicting(speaker, clips, tmp_path_factory) -> Path:
    """Clips whose text is what the speaker says, and whose labels say something else."""
    rows = []
    for row in speech(clips, 3):
        given = {"labels": make_label(speaker, "かきくけこ"), "text": "違う", "sentence": "あいうえお"}
        rows.append({"audio": row["audio"], **given})
    return write_dataset(tmp_path_factory.mktemp("data") / "contradicting", rows)


def test_held_out_rows_are_scored_against_the_text_column_that_is_named(speaker, contradicting, tmp_path):
    small = initialise(speaker, tmp_path / "init")
    held_out = ("--eval_dataset_name", contradicting, "--eval_split_name", "train", "--max_steps", 1)
    named = distil(
        small,
        speaker,
        contradicting,
        tmp_path / "named",
        *held_out,
        "--text_column_name",
        "sentence",
        "--learning_rate",
        0,
    )
    assert read_figures(named, "eval_cer") == [0, 0]
    usual = distil(small, speaker, contradicting, tmp_path / "usual", *held_out, "--learning_rate", 0)
    assert min(read_figures(usual, "eval_cer")) > 0


def test_the_best_checkpoint_is_that_of_the_figure_that_is_named(speaker, contradicting, tmp_path):
    """The more is learnt of the labels the smaller the loss, but what is said is right from the start."""
    small = initialise(speaker, tmp_path / "init")
    best = {}
    for name in ("loss", "cer"):
        output = distil(
            small,
            speaker,
            contradicting,
            tmp_path / name,
            *("--eval_dataset_name", contradicting, "--eval_split_name", "train", "--text_column_name", "sentence"),
            *("--max_steps", 3, "--eval_steps", 1, "--learning_rate", 0.01, "--warmup_steps", 0, "--kl_weight", 0),
            *("--metric_for_best_model", name, "--save_total_limit", 1),
        )
        losses = read_figures(output, "eval_loss")
        assert sorted(losses, reverse=True) == losses and len(set(losses)) == 4
        assert read_figures(output, "eval_cer") == [0, 0, 0, 0]
        best[name] = json.loads((output / "distillation.json").read_text())["best"]["step"]
        kept = sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
        assert kept == sorted({best[name], 3})
    assert best == {"loss": 3, "cer": 1}


def test_torch_compile_compiles_the_models_that_are_trained(tiny_teacher, student, labelled, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(type(self).__name__))
    monkeypatch.setattr(torch, "compile", lambda model, *_, **__: compiled.append(type(model).__name__) or model)
    distil(student, tiny_teacher, labelled, tmp_path / "plain", "--max_steps", 1)
    assert compiled == []
    distil(student, tiny_teacher, labelled, tmp_path / "compiled", "--max_steps", 1, "--torch_compile")
    assert compiled.count("WhisperDecoder") == 2  # the teacher's and the student's
    assert "WhisperEncoder" in compiled
    compiled.clear()
    flags = ("--max_steps", 1, "--kl_weight", 0, "--freeze_encoder", "--torch_compile")  # no teacher to share it with
    distil(student, tiny_teacher, labelled, tmp_path / "frozen", *flags)
    assert sorted(compiled) == ["WhisperDecoder", "WhisperEncoder"]


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (("--generation_num_beams", 3), {"num_beams": 3}),
        (("--return_timestamps",), {"return_timestamps": True}),
    ],
)
def test_a_hypothesis_is_what_the_stock_call_gives_with_beams_or_timestamps(
    spoken, clips, tiny_teacher, tmp_path, flags, options
):
    found = [row["hypothesis"] for row in read_predictions(evaluate(tiny_teacher, spoken, tmp_path, *flags))]
    waveforms = [samples_of(clip["audio"])[:, 0] for clip in clips[:3]]
    assert found == [stock_text(tiny_teacher, waveform, 16, **options) for waveform in waveforms]
    assert found != [stock_text(tiny_teacher, waveform, 16) for waveform in waveforms]


def test_a_revision_and_a_folder_of_a_repository_are_evaluated(speaker, tiny_teacher, spoken, hub, tmp_path):
    other = speaking(tiny_teacher, tmp_path / "other", "かきくけこ")
    api = HfApi()
    api.create_repo("acme/revised")
    first = api.upload_folder(repo_id="acme/revised", folder_path=speaker).oid
    api.upload_folder(repo_id="acme/revised", folder_path=other)
    api.upload_folder(repo_id="acme/revised", folder_path=speaker, path_in_repo="models/small")
    api.create_tag("acme/revised", tag="v1", revision=first)

    def said(name: str, *flags) -> set[str]:
        return {
            row["hypothesis"] for row in read_predictions(evaluate("acme/revised", spoken, tmp_path / name, *flags))
        }

    assert said("newest") == {"かきくけこ"}
    evaluate("acme/revised", spoken, tmp_path / "commit", "--model_revision", first)
    evaluate("acme/revised", spoken, tmp_path / "tag", "--model_revision", "v1")
    evaluate("acme/revised", spoken, tmp_path / "folder", "--subfolder", "models/small")
    for name in ("commit", "tag", "folder"):
        assert {row["hypothesis"] for row in read_predictions(tmp_path / name)} == {"あいうえお"}
