"""What every script's command line promises: its flags, and one clear line for a mistake of the user."""

import importlib
import io
import itertools
import socket
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Features, List, Value
from huggingface_hub import DatasetCard, HfApi
from transformers import WhisperTokenizer

# Every flag of the commands that were published with the recipe.
FLAGS = {
    "reazonspeech_manual_downloader": "--target -p --pool -s --start -e --end",
    "reazonspeech_manual_dataloader": "--target",
    "run_pseudo_labelling": """
        --model_name_or_path --dataset_name --dataset_config_name --dataset_split_name --text_column_name
        --id_column_name --per_device_eval_batch_size --dataloader_num_workers --preprocessing_num_workers
        --logging_steps --max_label_length --language --return_timestamps --attn_type --generation_num_beams
        --decode_token_ids --overwrite_output_dir --output_dir --wandb_project --hub_model_id""",
    "run_data_filtering": """
        -d --dataset_config_name --wer_threshold --text_column_name --preprocessing_num_workers --max_label_length""",
    "create_student_model": "--teacher_checkpoint --encoder_layers --decoder_layers --save_dir",
    "run_distillation": """
        --model_name_or_path --teacher_model_name_or_path --train_dataset_name --train_dataset_config_name --language
        --max_label_length --train_split_name --save_steps --warmup_steps --learning_rate --lr_scheduler_type
        --logging_steps --save_total_limit --per_device_train_batch_size --gradient_accumulation_steps
        --preprocessing_num_workers --dataloader_num_workers --dtype --output_dir --wandb_project
        --gradient_checkpointing --freeze_encoder --push_to_hub --do_train --overwrite_output_dir
        --num_train_epochs""",
    "run_short_form_eval": """
        --model_name_or_path --dataset_name --dataset_split_name --text_column_name --output_dir
        --per_device_eval_batch_size --dataloader_num_workers --preprocessing_num_workers --generation_max_length
        --language""",
}
LABELLING, FILTERING, STUDENT = "run_pseudo_labelling", "run_data_filtering", "create_student_model"
DISTILLATION, EVALUATION = "run_distillation", "run_short_form_eval"
DOWNLOADER, LOADER = "reazonspeech_manual_downloader", "reazonspeech_manual_dataloader"


def write_split(root: Path, split: str, features: Features, rows: list[dict]) -> Path:
    (root / "tiny").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, features.arrow_schema)
    pq.write_table(table, root / "tiny" / f"{split}-00000-of-00001.parquet")
    entry = f"- config_name: tiny\n  data_files:\n  - split: {split}\n    path: tiny/{split}-*\n"
    (root / "README.md").write_text(f"---\nconfigs:\n{entry}---\n")
    return root


@pytest.fixture(scope="module")
def world(clips, loaded, tiny_teacher, tiny_teacher_v2, tmp_path_factory) -> dict[str, str]:
    """One good input for each kind, on the disk and on the Hub (private)."""
    root = tmp_path_factory.mktemp("command-lines")
    tokenizer = WhisperTokenizer.from_pretrained(tiny_teacher)
    tokenizer.set_prefix_tokens(language="ja", task="transcribe", predict_timestamps=False)
    rows = [
        {
            "name": clip["name"],
            "audio": {"bytes": clip["audio"], "path": clip["name"]},
            "transcription": clip["transcription"],
            "whisper_transcript": tokenizer(clip["transcription"]).input_ids,
        }
        for clip in clips[:4]
    ]
    audio = Audio(sampling_rate=16000, decode=False)
    features = {"name": Value("string"), "audio": audio, "transcription": Value("string")}
    labelled = write_split(
        root / "labelled", "train", Features({**features, "whisper_transcript": List(Value("int32"))}), rows
    )
    filtering = importlib.import_module(FILTERING)
    flags = ["-d", labelled, "--dataset_config_name", "tiny", "--model", tiny_teacher]
    assert filtering.main(list(map(str, flags))) == 0
    local = {
        "loaded": str(loaded),
        "labelled": str(labelled),
        "vectorized": f"{labelled}.wer_10.0.vectorized",
        "teacher": str(tiny_teacher),
        "teacher_v2": str(tiny_teacher_v2),
    }
    # The clients give what they have cached to anyone, so what a wrong token asks for is never read with a right one.
    remote = {}
    for prefix, name in itertools.product(("hub", "secret"), ("loaded", "labelled", "vectorized", "teacher")):
        kind = "model" if name == "teacher" else "dataset"
        remote[f"{prefix}_{name}"] = repository = f"acme/cli-{prefix}-{name}"
        HfApi().create_repo(repository, repo_type=kind, private=True)
        HfApi().upload_folder(repo_id=repository, repo_type=kind, folder_path=local[name])
    return local | remote


@pytest.fixture
def command(world, tmp_path, mirror):
    """A command that would do the work: `command(script, flag=value, …)`; None leaves a flag out."""

    def arguments(script: str, **changes) -> list[str]:
        good = {
            DOWNLOADER: {"target": "tiny", "base_url": mirror.url, "data_dir": tmp_path / "data"},
            LOADER: {"target": "tiny", "data_dir": tmp_path / "data"},
            LABELLING: {
                "model_name_or_path": world["teacher"],
                "dataset_name": world["loaded"],
                "dataset_config_name": "tiny",
                "dataset_split_name": "train",
                "text_column_name": "transcription",
                "language": "ja",
                "output_dir": tmp_path / "output",
            },
            FILTERING: {
                "dataset_name": world["labelled"],
                "dataset_config_name": "tiny",
                "model": world["teacher"],
                "output_dir": tmp_path / "output",
            },
            STUDENT: {"teacher_checkpoint": world["teacher"], "save_dir": tmp_path / "output"},
            DISTILLATION: {
                "model_name_or_path": world["teacher"],
                "teacher_model_name_or_path": world["teacher"],
                "train_dataset_name": world["vectorized"],
                "train_dataset_config_name": "tiny",
                "train_split_name": "train",
                "language": "ja",
                "max_steps": 1,
                "do_train": True,
                "output_dir": tmp_path / "output",
            },
            EVALUATION: {
                "model_name_or_path": world["teacher"],
                "dataset_name": world["loaded"],
                "dataset_config_name": "tiny",
                "dataset_split_name": "train",
                "text_column_name": "transcription",
                "language": "ja",
                "output_dir": tmp_path / "output",
            },
        }[script]
        flags = {
            name: world.get(value, value) if name in changes else value for name, value in (good | changes).items()
        }
        return [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]

    return arguments


def complaint(script: str, arguments: list[str], capsys) -> str:
    """The last line on stderr of a run that must fail, which has no traceback."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [f"{script}.py", *arguments])
        sys.exit(importlib.import_module(script).main(arguments))
    errors = capsys.readouterr().err
    if isinstance(end.value.code, str):  # the interpreter prints it, and exits with 1
        errors += end.value.code
        assert "\n" not in end.value.code.strip(), end.value.code
    assert end.value.code not in (None, 0)
    assert "Traceback" not in errors
    line = errors.strip().splitlines()[-1]
    assert f"{script}.py: error: " in line
    return line


@pytest.mark.parametrize("script", FLAGS)
def test_help_names_every_published_flag(script, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(["--help"])
    assert end.value.code == 0
    words = set(capsys.readouterr().out.replace(",", " ").replace("[", " ").replace("]", " ").split())
    assert not set(FLAGS[script].split()) - words


@pytest.mark.parametrize("script", FLAGS)
def test_an_unknown_flag_is_named(script, command, capsys):
    assert "--no_such_flag" in complaint(script, [*command(script), "--no_such_flag"], capsys)


@pytest.mark.parametrize("script", FLAGS)
def test_flags_are_not_abbreviated(script, command, capsys):
    flag, value = command(script)[:2]
    assert flag[:-1] in complaint(script, [*command(script), flag[:-1], value], capsys)


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (LABELLING, {"text_column_name": "no_such_column"}),
        (LABELLING, {"audio_column_name": "no_such_column"}),
        (LABELLING, {"id_column_name": "no_such_column"}),
        (FILTERING, {"text_column_name": "no_such_column"}),
        (FILTERING, {"audio_column_name": "no_such_column"}),
        (EVALUATION, {"text_column_name": "no_such_column"}),
        (EVALUATION, {"audio_column_name": "no_such_column"}),
    ],
)
def test_a_missing_column_is_named(script, changes, command, capsys):
    assert "no_such_column" in complaint(script, command(script, **changes), capsys)


def test_a_dataset_without_labels_is_refused_with_the_column_named(command, capsys):
    assert "whisper_transcript" in complaint(FILTERING, command(FILTERING, dataset_name="loaded"), capsys)


@pytest.mark.parametrize("place", ["", "hub_"], ids=["local", "hub"])
@pytest.mark.parametrize(
    ("script", "flag", "dataset", "value"),
    [
        (LABELLING, "dataset_split_name", "dataset_name", "loaded"),
        (FILTERING, "split", "dataset_name", "labelled"),
        (DISTILLATION, "train_split_name", "train_dataset_name", "vectorized"),
        (EVALUATION, "dataset_split_name", "dataset_name", "loaded"),
    ],
)
def test_an_unknown_split_is_named(script, flag, dataset, value, place, command, hub, capsys):
    line = complaint(script, command(script, **{flag: "no_such_split", dataset: place + value}), capsys)
    assert "no_such_split" in line


@pytest.mark.parametrize(
    ("script", "flag", "dataset"),
    [
        (LABELLING, "dataset_config_name", "loaded"),
        (FILTERING, "dataset_config_name", "labelled"),
        (DISTILLATION, "train_dataset_config_name", "vectorized"),
        (EVALUATION, "dataset_config_name", "loaded"),
    ],
)
def test_an_unknown_configuration_is_named(script, flag, dataset, command, capsys):
    assert "no_such_config" in complaint(script, command(script, **{flag: "no_such_config"}), capsys)


@pytest.mark.parametrize("script", [LABELLING, FILTERING, DISTILLATION, EVALUATION])
def test_a_language_that_whisper_does_not_know_is_named(script, command, capsys):
    assert "xx" in complaint(script, command(script, language="xx"), capsys)


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (LABELLING, {"model_name_or_path": "teacher_v2"}),
        (FILTERING, {"model": "teacher_v2"}),
        (DISTILLATION, {"model_name_or_path": "teacher_v2", "teacher_model_name_or_path": "teacher_v2"}),
        (EVALUATION, {"model_name_or_path": "teacher_v2"}),
    ],
)
def test_a_language_that_this_model_lacks_is_named(script, changes, command, capsys):
    assert "yue" in complaint(script, command(script, language="yue", **changes), capsys)


REFERENCES = [
    (LABELLING, "dataset_name"),
    (LABELLING, "model_name_or_path"),
    (FILTERING, "dataset_name"),
    (FILTERING, "model"),
    (STUDENT, "teacher_checkpoint"),
    (DISTILLATION, "model_name_or_path"),
    (DISTILLATION, "teacher_model_name_or_path"),
    (DISTILLATION, "train_dataset_name"),
    (EVALUATION, "model_name_or_path"),
    (EVALUATION, "dataset_name"),
]


@pytest.mark.parametrize(("script", "flag"), REFERENCES)
def test_a_path_that_is_neither_a_directory_nor_a_hub_id_is_named(script, flag, command, capsys):
    line = complaint(script, command(script, **{flag: "./no/such/directory"}), capsys)
    assert "./no/such/directory" in line
    assert "Hub id" in line


@pytest.mark.parametrize("script", FLAGS)
def test_an_environment_variable_shows_where_the_script_stopped(script, monkeypatch, caplog):
    monkeypatch.setenv("KOTOBA_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        importlib.import_module(script).fail("what went wrong")
    (record,) = caplog.records
    assert "test_an_environment_variable_shows_where_the_script_stopped" in record.stack_info


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_progress_bar_is_drawn_on_a_terminal_and_writes_lines_elsewhere(on_terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: on_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    bars = importlib.import_module(DOWNLOADER)
    for _ in bars.ProgressBar(range(2), "outer", file=stream):
        for _ in bars.ProgressBar(range(3), "inner", file=stream):
            pass
    written = stream.getvalue()
    assert ("\r" in written) == on_terminal
    assert ("\x1b[A" in written) == on_terminal  # the cursor goes up to the outer bar
    assert "outer: 100%" in written and "inner: 100%" in written


@pytest.mark.parametrize(("script", "flag"), REFERENCES)
def test_a_repository_that_is_not_on_the_hub_is_named(script, flag, command, hub, capsys):
    assert "acme/no-such-repository" in complaint(script, command(script, **{flag: "acme/no-such-repository"}), capsys)


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (LABELLING, {"dataset_name": "secret_loaded", "hub_model_id": "acme/cli-labels"}),
        (LABELLING, {"model_name_or_path": "secret_teacher"}),
        (LABELLING, {"hub_model_id": "acme/cli-labels"}),
        (FILTERING, {"dataset_name": "secret_labelled"}),
        (STUDENT, {"teacher_checkpoint": "secret_teacher"}),
        (STUDENT, {"push_to_hub": True, "hub_model_id": "acme/cli-init"}),
        (DISTILLATION, {"train_dataset_name": "secret_vectorized"}),
        (DISTILLATION, {"push_to_hub": True, "hub_model_id": "acme/cli-student"}),
        (EVALUATION, {"model_name_or_path": "secret_teacher"}),
        (EVALUATION, {"dataset_name": "secret_loaded"}),
    ],
)
def test_a_wrong_token_is_one_line_that_says_how_to_log_in(script, changes, command, world, hub, capsys, monkeypatch):
    arguments = command(script, **changes)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = complaint(script, arguments, capsys)
    assert "hf auth" in line
    assert "hf_wrong" not in line


@pytest.mark.parametrize(
    "repository, message",
    [
        ("somebody-else/repository", "somebody-else"),
        ("acme/not--allowed", "not--allowed"),
        ("acme/" + "long" * 30, "longlong"),
        ("no such name/at all", "no such name"),
    ],
)
@pytest.mark.parametrize("script", [LABELLING, FILTERING, STUDENT, DISTILLATION, LOADER])
def test_a_repository_that_can_not_be_pushed_to_is_refused_before_the_work(
    script, repository, message, command, hub, mirror, tmp_path, capsys
):
    if script == LOADER:
        downloader = importlib.import_module(DOWNLOADER)
        assert downloader.main(command(DOWNLOADER)) == 0
    changes = {"output_dir": tmp_path / "output"} if script == LOADER else {}
    given = command(script, hub_model_id=repository, push_to_hub=True, **changes)
    line = complaint(script, given, capsys)
    assert message in line
    made = [path for path in (tmp_path / "output").rglob("*") if path.suffix in (".parquet", ".safetensors")]
    assert not made


@pytest.mark.parametrize("script", [LABELLING, FILTERING, STUDENT, DISTILLATION])
def test_storage_that_is_used_up_ends_in_a_line_and_the_same_command_pushes_later(script, command, hub, capsys):
    name = f"quota-{script.replace('_', '-')}"
    given = command(script, hub_model_id=f"acme/{name}", push_to_hub=True)
    hub.fault(f"{name}.*/(preupload|commit|xet-write)", times=-1, status=403, message="Private storage limit reached")
    line = complaint(script, given, capsys)
    assert "storage limit reached" in line
    assert "command" in line  # what to run to push what is complete
    hub.faults.clear()
    assert importlib.import_module(script).main(given) == 0


@pytest.mark.parametrize("script", [LABELLING, FILTERING, LOADER])
def test_two_pushes_at_once_lose_neither_card(script, command, hub, mirror, tmp_path, monkeypatch):
    if script == LOADER:
        assert importlib.import_module(DOWNLOADER).main(command(DOWNLOADER)) == 0
    name = f"at-once-{script.replace('_', '-')}"
    changes = {"output_dir": tmp_path / "output"} if script == LOADER else {}
    hub.fault(f"{name}.*/commit", times=1, status=412)
    upload, pushed = HfApi.upload_file, []

    def upload_after_another(self, **what):
        """Another machine's card appears after this one's was read."""
        monkeypatch.setattr(HfApi, "upload_file", upload)
        pushed.append(what["repo_id"])
        other = b"---\nconfigs:\n- config_name: other\n  data_files: other/*\n---\n\n## other, train\n\nOther words.\n"
        upload(self, path_or_fileobj=other, path_in_repo="README.md", repo_id=what["repo_id"], repo_type="dataset")
        return upload(self, **what)

    monkeypatch.setattr(HfApi, "upload_file", upload_after_another)
    given = command(script, hub_model_id=f"acme/{name}", push_to_hub=True, **changes)
    assert importlib.import_module(script).main(given) == 0
    card = DatasetCard.load(pushed[0])
    assert {entry["config_name"] for entry in card.data.configs} == {"other", "tiny"}
    assert "Other words." in card.text


def test_a_tar_range_that_is_empty_is_refused(command, capsys):
    assert "--start 3" in complaint(DOWNLOADER, [*command(DOWNLOADER), "-s", "3", "-e", "2"], capsys)


def test_a_corpus_that_was_not_downloaded_is_named_with_the_command_that_does(command, tmp_path, capsys):
    line = complaint(LOADER, command(LOADER), capsys)
    assert str(tmp_path / "data") in line
    assert "reazonspeech_manual_downloader.py" in line


def test_a_host_that_does_not_answer_is_named(command, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        line = complaint(DOWNLOADER, [*command(DOWNLOADER, base_url=url), "--retries", "0"], capsys)
    assert url in line
