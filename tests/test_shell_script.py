"""kotoba_whisper_training_v1.0.sh: the commands that it runs, with stand-ins for `python` and `accelerate`.

The stand-ins only write down what they are called with, so that a run of the whole script takes a second.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "kotoba_whisper_training_v1.0.sh"
STAND_IN = f"""#!{sys.executable} -IS
import json, os, sys
if sys.argv[1:2] == ["-c"]:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
sys.exit(7 if os.environ.get("FAILING") in map(os.path.basename, sys.argv) else 0)
"""
DOWNLOADER = "reazonspeech_manual_downloader.py"
LABELLING, FILTERING, STUDENT = "run_pseudo_labelling.py", "run_data_filtering.py", "create_student_model.py"
DISTILLATION, EVALUATION = "run_distillation.py", "run_short_form_eval.py"
LAUNCHED = (LABELLING, DISTILLATION, EVALUATION)  # by accelerate, on many processes


class Calls(list):
    """The commands that a run gave, as lists of words: the program, and all behind it; and the directories it made."""

    def __init__(self, commands: Iterable[list[str]], directories: list[str]):
        super().__init__(commands)
        self.directories = directories

    def of(self, script: str) -> list[list[str]]:
        """What each call of a script got behind its name."""
        found = [call for call in self if script_of(call) == script]
        return [call[call.index(str(ROOT / script)) + 1 :] for call in found]


def script_of(call: list[str]) -> str:
    """Name of the script that a command runs, which is the first one that it names."""
    return next(Path(word).name for word in call if word.endswith(".py"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the script with these variables alone; gives its calls, in which its working directory is called HERE."""
    programs = tmp_path_factory.mktemp("programs")
    for name in ("python", "accelerate"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)

    def start(status: int = 0, **variables: str) -> Calls:
        here = tmp_path_factory.mktemp("here").resolve()
        calls = programs / "calls.jsonl"
        calls.write_text("")
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(here), "CALLS": str(calls), "WORKERS": "3", **variables}
        done = subprocess.run(["bash", SCRIPT], env=environment, cwd=here, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        made = [path for path in here.rglob("*") if path.is_dir()]
        text = calls.read_text().replace(str(here), "HERE")
        return Calls(map(json.loads, text.splitlines()), [str(path.relative_to(here)) for path in made])

    return start


def flags(words: list[str]) -> dict[str, list[str]]:
    """Words of a command by the flag that they follow."""
    found: dict[str, list[str]] = {}
    for word in words:
        if re.fullmatch(r"--?[a-z]\w*", word):
            assert word not in found, f"{word} is given twice"
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


def expected(text: str, **places: str) -> dict[str, list[str]]:
    """The same from lines of a flag and its value; `{name}` stands for one of the places."""
    return flags(text.format(**places).split())


LABEL_FLAGS = """
    --model_name_or_path openai/whisper-large-v3
    --dataset_name {scripts}/reazonspeech_manual_dataloader.py
    --dataset_config_name large
    --dataset_split_name train
    --text_column_name transcription
    --id_column_name name
    --shard_size 1000
    --dataloader_num_workers 4
    --preprocessing_num_workers 3
    --logging_steps 100
    --max_label_length 128
    --language ja
    --return_timestamps
    --attn_type sdpa
    --dtype bfloat16
    --generation_num_beams 1
    --decode_token_ids False
    --report_to wandb
    --output_dir HERE/reazonspeech-whisper-large-v3
"""
FILTER_FLAGS = """
    -d {labelled}
    --dataset_config_name large
    --text_column_name transcription
    --language ja
    --model openai/whisper-large-v3
    --preprocessing_num_workers 3
    --timestamp_probability 0.2
    --condition_on_prev_probability 0.2
    --output_dir HERE
"""
STUDENT_FLAGS = """
    --teacher_checkpoint openai/whisper-large-v3
    --decoder_layers 2
    --save_dir HERE/kotoba-whisper-v1.0-init
"""
DISTIL_FLAGS = """
    --model_name_or_path HERE/kotoba-whisper-v1.0-init
    --teacher_model_name_or_path openai/whisper-large-v3
    --train_dataset_name {labelled}.{suffix}.vectorized
    --train_dataset_config_name large
    --train_split_name train
    --language ja
    --save_steps 2500
    --save_total_limit 1
    --warmup_steps 100
    --learning_rate 0.0001
    --lr_scheduler_type constant_with_warmup
    --logging_steps 50
    --per_device_train_batch_size 16
    --gradient_accumulation_steps 2
    --preprocessing_num_workers 3
    --dataloader_num_workers 4
    --dtype bfloat16
    --attn_type sdpa
    --report_to wandb
    --output_dir HERE/kotoba-whisper-v1.0
    --freeze_encoder
    --do_train
    --num_train_epochs 8
"""
EVALUATION_FLAGS = """
    --model_name_or_path {model}
    --dataset_name {dataset}
    --dataset_split_name test
    --text_column_name transcription
    --output_dir HERE/eval/{model_name}/{dataset_name}
    --overwrite_output_dir
    --dataloader_num_workers 4
    --preprocessing_num_workers 3
    --generation_max_length 256
    --attn_type sdpa
    --dtype bfloat16
    --language ja
"""
RECIPES = {  # variables, flags of the filter and of training that follow from them, the suffix of the filtered dataset
    "wer": ({}, "--wer_threshold 10\n--max_label_length 128", "--max_label_length 128", "wer_10.0"),
    "cer": (
        {"CER_THRESHOLD": "12.5"},
        "--cer_threshold 12.5\n--max_label_length 128",
        "--max_label_length 128",
        "cer_12.5",
    ),
    "packed": (
        {"CONCATENATE_AUDIO": "True"},
        "--wer_threshold 10\n--concatenate_audio\n--concatenate_probability 0.8",
        "",  # a window's label is longer than a clip's
        "wer_10.0.packed",
    ),
    "packed cer": (
        {"CONCATENATE_AUDIO": "True", "CONCATENATE_PROBABILITY": "0.5", "CER_THRESHOLD": "7"},
        "--cer_threshold 7\n--concatenate_audio\n--concatenate_probability 0.5",
        "",
        "cer_7.0.packed",
    ),
}


@pytest.mark.parametrize("hub", [False, True], ids=["local", "hub"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_gets_the_flags_of_the_recipe(run, recipe, hub):
    variables, filtering, training, suffix = RECIPES[recipe]
    calls = run(**variables, **({"HF_ORG": "acme"} if hub else {}))
    places = {"scripts": ROOT, "suffix": suffix}
    places["labelled"] = f"{'acme' if hub else 'HERE'}/reazonspeech-whisper-large-v3"
    push = {"label": "", "init": "", "train": ""}
    student = "HERE/kotoba-whisper-v1.0"
    if hub:
        student = "acme/kotoba-whisper-v1.0"
        push["label"] = "--hub_model_id acme/reazonspeech-whisper-large-v3"
        push["init"] = "--push_to_hub\n--hub_model_id acme/kotoba-whisper-v1.0-init"
        push["train"] = "--push_to_hub\n--hub_model_id acme/kotoba-whisper-v1.0"

    assert [flags(call) for call in calls.of(DOWNLOADER)] == [expected("--target large\n--pool 8")]
    assert [flags(call) for call in calls.of(LABELLING)] == [expected(LABEL_FLAGS + push["label"], **places)]
    assert [flags(call) for call in calls.of(FILTERING)] == [expected(FILTER_FLAGS + filtering, **places)]
    assert [flags(call) for call in calls.of(STUDENT)] == [expected(STUDENT_FLAGS + push["init"], **places)]
    wanted = DISTIL_FLAGS + training + "\n" + push["train"]
    assert [flags(call) for call in calls.of(DISTILLATION)] == [expected(wanted, **places)]

    evaluations, directories = [], []
    for model in ("openai/whisper-large-v3", "HERE/kotoba-whisper-v1.0-init", student):
        for dataset in ("japanese-asr/ja_asr.jsut_basic5000", "japanese-asr/ja_asr.reazonspeech_test"):
            names = {"model_name": Path(model).name, "dataset_name": Path(dataset).name}
            evaluations.append(expected(EVALUATION_FLAGS, model=model, dataset=dataset, **names, **places))
            directories += evaluations[-1]["--output_dir"]
    comparison = {"--compare": directories, "--output_dir": ["HERE/eval"]}
    assert [flags(call) for call in calls.of(EVALUATION)] == [*evaluations, comparison]


def test_the_stages_come_in_order_and_those_for_gpus_are_launched(run):
    calls = run(DOWNLOADS="tiny test", EVAL_MODELS="student", EVAL_DATASETS="org/data")
    stages = [DOWNLOADER, DOWNLOADER, LABELLING, FILTERING, STUDENT, DISTILLATION, EVALUATION, EVALUATION]
    assert list(map(script_of, calls)) == stages
    *launched, comparison = [call for call in calls if call[0] == "accelerate" or "--compare" in call]
    assert [call[:3] for call in launched] == [["accelerate", "launch", "--quiet"]] * 3
    assert [Path(call[3]).name for call in launched] == list(LAUNCHED)
    assert comparison[0] == "python"
    assert [flags(call)["--target"] for call in calls.of(DOWNLOADER)] == [["tiny"], ["test"]]


def test_models_and_datasets_of_one_last_name_are_evaluated_apart(run):
    calls = run(EVAL_MODELS="acme/model other/model", EVAL_DATASETS="acme/data other/data")
    evaluations = [flags(call)["--output_dir"][0] for call in calls.of(EVALUATION) if "--compare" not in call]
    assert len(set(evaluations)) == len(evaluations) == 4
    assert flags(calls.of(EVALUATION)[-1])["--compare"] == evaluations


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_accepts_the_flags_that_it_gets(run, recipe):
    calls = run(HF_ORG="acme", EVAL_CONFIG="tiny", **RECIPES[recipe][0])
    for script in (DOWNLOADER, LABELLING, FILTERING, STUDENT, DISTILLATION, EVALUATION):
        assert calls.of(script)
        for call in calls.of(script):
            importlib.import_module(script.removesuffix(".py")).parse_args(call)


NOT_GIVEN = "not given"
ONE = {"EVAL_MODELS": "student", "EVAL_DATASETS": "org/data"}  # evaluation
# Each variable at the top: a value, and what it changes: of which stage which flag, with that value if not another.
VARIABLES = {
    "HF_ORG": (
        "acme",
        [
            (LABELLING, "--hub_model_id", "acme/reazonspeech-whisper-large-v3"),
            (FILTERING, "-d", "acme/reazonspeech-whisper-large-v3"),
            (STUDENT, "--push_to_hub", None),
            (STUDENT, "--hub_model_id", "acme/kotoba-whisper-v1.0-init"),
            (DISTILLATION, "--train_dataset_name", "acme/reazonspeech-whisper-large-v3.wer_10.0.vectorized"),
            (DISTILLATION, "--push_to_hub", None),
            (DISTILLATION, "--hub_model_id", "acme/kotoba-whisper-v1.0"),
            (EVALUATION, "--model_name_or_path", "acme/kotoba-whisper-v1.0"),
        ],
    ),
    "WORK_DIR": (
        "deep/in the house",
        [
            (LABELLING, "--output_dir", "HERE/deep/in the house/reazonspeech-whisper-large-v3"),
            (FILTERING, "-d", "HERE/deep/in the house/reazonspeech-whisper-large-v3"),
            (FILTERING, "--output_dir", "HERE/deep/in the house"),
            (STUDENT, "--save_dir", "HERE/deep/in the house/kotoba-whisper-v1.0-init"),
            (DISTILLATION, "--model_name_or_path", "HERE/deep/in the house/kotoba-whisper-v1.0-init"),
            (
                DISTILLATION,
                "--train_dataset_name",
                "HERE/deep/in the house/reazonspeech-whisper-large-v3.wer_10.0.vectorized",
            ),
            (DISTILLATION, "--output_dir", "HERE/deep/in the house/kotoba-whisper-v1.0"),
            (EVALUATION, "--model_name_or_path", "HERE/deep/in the house/kotoba-whisper-v1.0"),
            (EVALUATION, "--output_dir", "HERE/deep/in the house/eval/kotoba-whisper-v1.0/data"),
        ],
    ),
    "DATASET_NAME": (
        "labels",
        [
            (LABELLING, "--output_dir", "HERE/labels"),
            (FILTERING, "-d", "HERE/labels"),
            (DISTILLATION, "--train_dataset_name", "HERE/labels.wer_10.0.vectorized"),
        ],
    ),
    "MODEL_NAME": (
        "small",
        [
            (STUDENT, "--save_dir", "HERE/small-init"),
            (DISTILLATION, "--model_name_or_path", "HERE/small-init"),
            (DISTILLATION, "--output_dir", "HERE/small"),
            (EVALUATION, "--model_name_or_path", "HERE/small"),
            (EVALUATION, "--output_dir", "HERE/eval/small/data"),
        ],
    ),
    "TARGET": (
        "medium",
        [
            (DOWNLOADER, "--target"),
            (LABELLING, "--dataset_config_name"),
            (FILTERING, "--dataset_config_name"),
            (DISTILLATION, "--train_dataset_config_name"),
        ],
    ),
    "DOWNLOADS": ("small", [(DOWNLOADER, "--target")]),
    "POOL": ("2", [(DOWNLOADER, "--pool")]),
    "TEACHER": (
        "org/teacher",
        [
            (LABELLING, "--model_name_or_path"),
            (FILTERING, "--model"),
            (STUDENT, "--teacher_checkpoint"),
            (DISTILLATION, "--teacher_model_name_or_path"),
        ],
    ),
    "LANGUAGE_CODE": (
        "ko",
        [(script, "--language") for script in (LABELLING, FILTERING, DISTILLATION, EVALUATION)],
    ),
    "WORKERS": (
        "5",
        [(script, "--preprocessing_num_workers") for script in (LABELLING, FILTERING, DISTILLATION, EVALUATION)],
    ),
    "DATALOADER_WORKERS": ("6", [(script, "--dataloader_num_workers") for script in LAUNCHED]),
    "ATTN_TYPE": ("flash_attn", [(script, "--attn_type") for script in LAUNCHED]),
    "DTYPE": ("float16", [(script, "--dtype") for script in LAUNCHED]),
    "MAX_LABEL_LENGTH": ("96", [(script, "--max_label_length") for script in (LABELLING, FILTERING, DISTILLATION)]),
    "LABEL_BATCH": ("9", [(LABELLING, "--per_device_eval_batch_size")]),
    "SHARD_SIZE": ("11", [(LABELLING, "--shard_size")]),
    "NUM_BEAMS": ("4", [(LABELLING, "--generation_num_beams")]),
    "WER_THRESHOLD": (
        "15",
        [
            (FILTERING, "--wer_threshold"),
            (DISTILLATION, "--train_dataset_name", "HERE/reazonspeech-whisper-large-v3.wer_15.0.vectorized"),
        ],
    ),
    "CER_THRESHOLD": (
        "2.5",
        [
            (FILTERING, "--wer_threshold", NOT_GIVEN),
            (FILTERING, "--cer_threshold"),
            (DISTILLATION, "--train_dataset_name", "HERE/reazonspeech-whisper-large-v3.cer_2.5.vectorized"),
        ],
    ),
    "TIMESTAMP_PROBABILITY": ("0.7", [(FILTERING, "--timestamp_probability")]),
    "CONDITION_ON_PREV_PROBABILITY": ("0.3", [(FILTERING, "--condition_on_prev_probability")]),
    "CONCATENATE_AUDIO": (
        "True",
        [
            (FILTERING, "--concatenate_audio", None),
            (FILTERING, "--concatenate_probability", "0.8"),
            (FILTERING, "--max_label_length", NOT_GIVEN),
            (DISTILLATION, "--max_label_length", NOT_GIVEN),
            (DISTILLATION, "--train_dataset_name", "HERE/reazonspeech-whisper-large-v3.wer_10.0.packed.vectorized"),
        ],
    ),
    "CONCATENATE_PROBABILITY": ("0.5", []),  # counts with CONCATENATE_AUDIO alone
    "DECODER_LAYERS": ("4", [(STUDENT, "--decoder_layers")]),
    "EPOCHS": ("1.5", [(DISTILLATION, "--num_train_epochs")]),
    "TRAIN_BATCH": ("24", [(DISTILLATION, "--per_device_train_batch_size")]),
    "GRADIENT_ACCUMULATION": ("3", [(DISTILLATION, "--gradient_accumulation_steps")]),
    "LEARNING_RATE": ("0.0005", [(DISTILLATION, "--learning_rate")]),
    "LR_SCHEDULER": ("linear", [(DISTILLATION, "--lr_scheduler_type")]),
    "WARMUP_STEPS": ("7", [(DISTILLATION, "--warmup_steps")]),
    "SAVE_STEPS": ("77", [(DISTILLATION, "--save_steps")]),
    "LOGGING_STEPS": ("5", [(DISTILLATION, "--logging_steps")]),
    "REPORT_TO": ("tensorboard", [(script, "--report_to") for script in (LABELLING, DISTILLATION)]),
    "TRAIN_ARGS": ("--weight_decay 0.1", [(DISTILLATION, "--weight_decay", "0.1")]),
    "EVAL_DATASETS": (
        "org/other",
        [(EVALUATION, "--dataset_name"), (EVALUATION, "--output_dir", "HERE/eval/kotoba-whisper-v1.0/other")],
    ),
    "EVAL_CONFIG": ("tiny", [(EVALUATION, "--dataset_config_name")]),
    "EVAL_SPLIT": ("validation", [(EVALUATION, "--dataset_split_name")]),
    "EVAL_BATCH": ("10", [(EVALUATION, "--per_device_eval_batch_size")]),
    "EVAL_MODELS": (
        "org/model",
        [(EVALUATION, "--model_name_or_path"), (EVALUATION, "--output_dir", "HERE/eval/model/data")],
    ),
    "EVAL_ARGS": ("--scorer reazon", [(EVALUATION, "--scorer", "reazon")]),
}


def by_stage(calls: Calls) -> dict[tuple[str, str], list[str]]:
    """The values of each flag of each stage; those of one evaluation, where there is one."""
    found = {}
    for script in (DOWNLOADER, LABELLING, FILTERING, STUDENT, DISTILLATION, EVALUATION):
        found |= {(script, flag): values for flag, values in flags(calls.of(script)[0]).items()}
    return found


def test_every_variable_at_the_top_is_in_the_list_of_those_that_are_tested():
    assigned = re.findall(r'^\w+="\$\{(\w+):-', SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(assigned) == sorted([*VARIABLES, "ACCELERATE_ARGS"])


@pytest.fixture(scope="module")
def usual(run) -> dict[tuple[str, str], list[str]]:
    """The flags of a run with none of the variables, but for those that make it evaluate once."""
    return by_stage(run(**ONE))


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_reaches_its_flags_and_no_others(run, usual, variable):
    value, changes = VARIABLES[variable]
    calls = run(**ONE | {variable: value})
    told = {}
    for script, flag, *other in changes:
        values = other or [value]
        told[script, flag] = NOT_GIVEN if values == [NOT_GIVEN] else [word for word in values if word is not None]
    given = by_stage(calls)
    changed = {key for key in usual.keys() | given.keys() if usual.get(key) != given.get(key)}
    assert {key: given.get(key, NOT_GIVEN) for key in changed} == told
    if variable == "WORK_DIR":
        assert value in calls.directories


def test_flags_for_accelerate_stand_before_every_script_that_it_launches(run):
    calls = run(ACCELERATE_ARGS="--multi_gpu --num_processes 8", EVAL_MODELS="init", EVAL_DATASETS="org/data")
    launched = [call for call in calls if call[0] == "accelerate"]
    head = ["accelerate", "launch", "--quiet", "--multi_gpu", "--num_processes", "8"]
    assert [call[:7] for call in launched] == [[*head, str(ROOT / script)] for script in LAUNCHED]


def test_as_many_processes_as_there_are_cores_do_what_needs_no_gpu(run):
    calls = run(WORKERS="", OMP_NUM_THREADS="1")  # which says nothing of processes
    assert flags(calls.of(FILTERING)[0])["--preprocessing_num_workers"] == [str(len(os.sched_getaffinity(0)))]


@pytest.mark.parametrize("script", [DOWNLOADER, LABELLING, FILTERING, STUDENT, DISTILLATION, EVALUATION])
def test_a_stage_that_fails_ends_the_run_with_its_status(run, script):
    calls = run(status=7, FAILING=script)
    assert script_of(calls[-1]) == script
    assert len(calls.of(script)) == 1
