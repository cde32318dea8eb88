"""Nothing that comes from data runs, leads elsewhere, or shows a secret."""

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch.amp import GradScaler
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

import run_data_filtering
import run_pseudo_labelling
from tests.sandbox.demo import ROOT
from tests.test_limits import distil, evaluate, filter_all, initialise, label

SCRIPTS = sorted(ROOT.glob("*.py"))
# Functions that run or unpack what they are given, and settings that switch a protection off.
UNSAFE_CALLS = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "torch.hub.load"}
UNSAFE_SETTINGS = {("shell", True), ("verify", False), ("trust_remote_code", True), ("weights_only", False)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_calls_nothing_that_runs_data_or_switches_protection_off(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        place = f"{script.name}:{node.lineno}"
        name = ast.unparse(node.func)
        assert name not in UNSAFE_CALLS, place
        settings = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        assert not UNSAFE_SETTINGS & set(settings.items()), place
        if name == "torch.load":
            assert settings.get("weights_only") is True, place


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_no_flag_takes_a_token_which_others_could_see_in_the_list_of_processes(script):
    text = script.read_text(encoding="utf-8")
    assert not [
        flag for flag in ("--token", "--hub_token", "--use_auth_token", "--password", "--api_key") if flag in text
    ]


class Bomb:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bomb(tmp_path) -> bytes:
    content = pickle.dumps(Bomb(tmp_path / "exploded"))
    pickle.loads(content)  # it works
    (tmp_path / "exploded").rmdir()
    yield content
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def bad_teacher(bomb, tiny_teacher, tmp_path) -> Path:
    """A model whose weights are a pickle with something to run in it."""
    folder = tmp_path / "bad teacher"
    shutil.copytree(tiny_teacher, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb)
    return folder


@pytest.mark.parametrize("stage", ["initialise", "label", "evaluate"])
def test_weights_that_hold_code_are_refused_in_one_line(stage, bad_teacher, loaded, tmp_path):
    output = str(tmp_path / "out")
    with pytest.raises(SystemExit) as error:
        if stage == "initialise":
            initialise(bad_teacher, output)
        elif stage == "label":
            label(bad_teacher, str(loaded), output)
        else:
            evaluate(bad_teacher, str(loaded), output)
    assert str(error.value).count("\n") == 0 and "bad teacher" in str(error.value)


@pytest.fixture
def trained(loaded, tiny_teacher, tmp_path) -> list[str]:
    """Labels, a filtered dataset, a student, and a training run with a checkpoint; the arguments of the last."""
    assert label(tiny_teacher, str(loaded), str(tmp_path / "labels"), "--max_samples", "4") == 0
    assert filter_all(tiny_teacher, str(tmp_path / "labels")) == 0
    assert initialise(tiny_teacher, str(tmp_path / "student-init")) == 0
    data = str(tmp_path / "labels.wer_1000000000.0.vectorized")
    arguments = [tiny_teacher, str(tmp_path / "student-init"), data, str(tmp_path / "out")]
    assert distil(*arguments) == 0
    return arguments


def test_code_in_a_checkpoint_whose_manifest_agrees_does_not_run(bomb, trained, monkeypatch):
    output = Path(trained[-1])
    (output / "model.safetensors").unlink()  # so that the same command resumes
    (checkpoint,) = output.glob("checkpoint-*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    # A scaler is there on a GPU, the pickle of the schedule in checkpoints of earlier versions.
    names = {*manifest["files"], "scaler.pt", "custom_checkpoint_0.pkl"}
    assert {"model.safetensors", "optimizer.bin", "scheduler.json", "random_states_0.pkl"} < names
    scaler = property(lambda self: GradScaler("cpu"), lambda self, value: None)
    monkeypatch.setattr(Accelerator, "scaler", scaler, raising=False)
    whole = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    whole["scaler.pt"] = saved(GradScaler("cpu").state_dict())
    for name in sorted(names - {"random_states_0.pkl"}):
        contents = {**whole, name: bomb}
        if name == "custom_checkpoint_0.pkl":
            del contents["scheduler.json"]
        replace_files(checkpoint, contents)
        with pytest.raises(SystemExit) as error:
            distil(*trained)
        assert name in str(error.value) and str(error.value).count("\n") == 0
    monkeypatch.undo()
    replace_files(checkpoint, whole | {"random_states_0.pkl": bomb})
    assert distil(*trained) == 0  # nothing reads it


def saved(value: object) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def replace_files(checkpoint: Path, contents: dict[str, bytes]) -> None:
    """Let a checkpoint consist of these files, on which its manifest agrees."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    contents = {name: content for name, content in contents.items() if name != "manifest.json"}
    manifest["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest.pop("checksum", None)  # whoever puts a pickle there can compute it as well
    for path in checkpoint.iterdir():
        path.unlink()
    for name, content in contents.items():
        (checkpoint / name).write_bytes(content)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_code_beside_a_model_or_a_dataset_does_not_run(tiny_teacher, loaded, tmp_path):
    code = f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\nclass Model: pass\n"
    teacher, data = tmp_path / "teacher", tmp_path / "reazonspeech"
    shutil.copytree(tiny_teacher, teacher)
    shutil.copytree(loaded, data)
    for folder in (teacher, data):
        for name in ("modeling_bad.py", "reazonspeech.py", "__init__.py", "conftest.py"):
            (folder / name).write_text(code)
    for name, key in (("config.json", "AutoModelForSpeechSeq2Seq"), ("tokenizer_config.json", "AutoTokenizer")):
        config = json.loads((teacher / name).read_text(encoding="utf-8"))
        config["auto_map"] = {key: "modeling_bad.Model", "AutoConfig": "modeling_bad.Model"}
        (teacher / name).write_text(json.dumps(config))
    assert label(teacher, str(loaded), str(tmp_path / "labels"), "--max_samples", "2") == 0
    assert initialise(teacher, str(tmp_path / "student")) == 0
    with pytest.raises(SystemExit, match=r"reazonspeech\.py"):  # the library that would have run it refuses
        label(teacher, str(data), str(tmp_path / "labels of a script"))
    assert not (tmp_path / "exploded").exists()


def test_a_configuration_named_by_a_card_leads_nowhere_else(loaded, tiny_teacher, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(loaded, data)
    card = (data / "README.md").read_text(encoding="utf-8")
    (data / "README.md").write_text(card.replace("config_name: tiny", "config_name: ../../escaped"), encoding="utf-8")
    given = ["--model_name_or_path", str(tiny_teacher), "--dataset_name", str(data), "--language", "ja"]
    with pytest.raises(SystemExit) as error:
        run_pseudo_labelling.main([*given, "--output_dir", str(tmp_path / "a" / "b" / "labels")])
    assert str(error.value).count("\n") == 0
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]


def test_a_link_in_the_place_of_an_unfinished_file_is_not_followed(tiny_teacher, loaded, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    output = tmp_path / "labels"
    (output / "tiny").mkdir(parents=True)
    for path in ("README.md", "labelling.tiny.train.json", "tiny/train-00000-of-00001.parquet"):
        for ending in ("partial", "00000000.partial"):
            (output / path).with_name(f".{Path(path).name}.{ending}").symlink_to(precious)
    assert label(tiny_teacher, str(loaded), str(output), "--max_samples", "2") == 0
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("language", ["ja", "en"])
@pytest.mark.parametrize("text", ["<", "(", "[(", " ", "(<)", "7"])
def test_no_text_takes_the_normaliser_more_than_moments(language, text):
    normalise = run_data_filtering.text_normaliser(language, None)
    started = time.monotonic()
    assert len(normalise(f"あ{text * 120_000}い")) < 360_003
    assert time.monotonic() - started < 30  # some of these took Whisper's own normaliser five minutes


@given(st.text(alphabet="<>[]()| a1.,'け\u0338\n$%", max_size=20))
def test_what_is_scored_is_what_whisper_s_normalisers_leave(text):
    assert run_data_filtering.text_normaliser("de", None)(text).split() == BasicTextNormalizer()(text).split()
    assert run_data_filtering.text_normaliser("en", {})(text).split() == EnglishTextNormalizer({})(text).split()


def test_a_token_that_the_hub_refuses_is_in_no_message_and_no_file(hub, trained, tmp_path, monkeypatch):
    secret = "hf_" + "secretsecretsecret"
    monkeypatch.setenv("HF_TOKEN", secret)
    hub.fault("", times=-1, status=403, message="no write right for this repository")
    teacher, student, data = trained[:3]
    commands = {
        "run_pseudo_labelling.py": f"--model_name_or_path {teacher} --dataset_name {tmp_path / 'labels'} --language ja "
        f"--dataset_config_name tiny --hub_model_id acme/secret --output_dir {tmp_path / 'again'}",
        "run_distillation.py": f"--model_name_or_path {student} --teacher_model_name_or_path {teacher} --do_train "
        f"--train_dataset_name {data} --train_dataset_config_name tiny --language ja --output_dir {tmp_path / 'more'} "
        "--push_to_hub --hub_model_id acme/secret --report_to none",
        "create_student_model.py": f"--teacher_checkpoint {teacher} --decoder_layers 2 --save_dir {tmp_path / 'new'} "
        "--push_to_hub --hub_model_id acme/secret",
    }
    for script, flags in commands.items():
        run = subprocess.run([sys.executable, ROOT / script, *flags.split()], capture_output=True, text=True)
        assert run.returncode == 1
        last = run.stderr.strip().splitlines()[-1]
        assert "no write right" in last and "Traceback" not in run.stderr, run.stderr[-2000:]
        assert secret not in run.stdout + run.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
