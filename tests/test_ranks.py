"""Who does what, and what comes first: processes their own shards, a draft model its drafts, the worst clips."""

import base64
import collections
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

import run_distillation
import run_pseudo_labelling
import run_short_form_eval
from tests.stages import (
    evaluate,
    filter_clips,
    initialise,
    make_label,
    read_page,
    read_players,
    read_predictions,
    read_rows,
    run,
    samples_of,
    speaking,
    tone,
    write_dataset,
)

# Runs a script as it is, and writes down which files this process has written and how many clips it has encoded.
WATCHED = """
import atexit, json, os, runpy, sys
from transformers.models.whisper.modeling_whisper import WhisperEncoder

script, record = sys.argv[1:3]
encoded, written, forward, replace = [], [], WhisperEncoder.forward, os.replace

def count(self, *args, **named):
    encoded.append(len(args[0] if args else named["input_features"]))
    return forward(self, *args, **named)

def note(source, target, **named):
    replace(source, target, **named)
    written.append(os.path.basename(target))

def tell():
    with open(f"{record}.{os.environ['RANK']}", "w") as file:
        json.dump({"encoded": sum(encoded), "written": written}, file)

WhisperEncoder.forward, os.replace = count, note
atexit.register(tell)
sys.argv[:] = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""
TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
TWO_PROCESSES += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> Path:
    """Twenty short tones of different pitch, with a text."""
    rows = [{"name": f"{n:02}", "audio": tone(0.2, 100 + 20 * n), "transcription": "はい"} for n in range(20)]
    return write_dataset(tmp_path_factory.mktemp("tones") / "tones", rows)


def watch(script, record: Path, *flags) -> list[dict]:
    """Run a script on two processes; gives what each of them has encoded and written."""
    watcher = record.with_name("watched.py")
    watcher.write_text(WATCHED)
    command = [sys.executable, *TWO_PROCESSES, str(watcher), script.__file__, str(record), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{record}.{rank}").read_text()) for rank in (0, 1)]


def test_a_process_of_the_evaluation_transcribes_its_own_shards_and_no_others(tones, tiny_teacher, tmp_path):
    given = ("--model_name_or_path", tiny_teacher, "--dataset_name", tones, "--output_dir", tmp_path / "out")
    columns = ("--dataset_split_name", "train", "--text_column_name", "transcription", "--id_column_name", "name")
    flags = ("--long_form", "--generation_max_length", 4)  # shards of long form are small
    processes = watch(run_short_form_eval, tmp_path / "process", *given, *columns, *flags)
    shards = sorted((tmp_path / "out" / ".predictions.train.long_form").glob("*.jsonl"))
    clips = [
        len(shard.read_text(encoding="utf-8").splitlines()) - 1 for shard in shards
    ]  # the first line is of figures
    assert len(shards) == 3 and sum(clips) == 20
    for rank, process in enumerate(processes):
        assert [name for name in process["written"] if name.endswith(".jsonl")] == [p.name for p in shards[rank::2]]
        assert process["encoded"] == sum(clips[rank::2])
    assert [row["id"] for row in read_predictions(tmp_path / "out", "train.long_form")] == [
        f"{n:02}" for n in range(20)
    ]


def test_a_process_of_the_labelling_labels_its_own_shards_and_no_others(tones, tiny_teacher, tmp_path):
    given = ("--model_name_or_path", tiny_teacher, "--dataset_name", tones, "--output_dir", tmp_path / "out")
    flags = ("--language", "ja", "--shard_size", 4, "--max_label_length", 8, "--report_to", "none")
    flags += ("--per_device_eval_batch_size", 2, "--logging_steps", 1)  # only the main process has a bar to report
    processes = watch(run_pseudo_labelling, tmp_path / "process", *given, *flags)
    shards = sorted((tmp_path / "out" / "default").glob("*.parquet"))
    clips = [pq.read_metadata(shard).num_rows for shard in shards]
    assert clips == [4] * 5
    for rank, process in enumerate(processes):
        assert [name for name in process["written"] if name.endswith(".parquet")] == [p.name for p in shards[rank::2]]
        assert process["encoded"] == sum(clips[rank::2])

    content = bytearray(shards[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards[1].write_bytes(content)
    processes = watch(run_pseudo_labelling, tmp_path / "process", *given, *flags)
    assert [process["encoded"] for process in processes] == [0, 4]
    assert processes[0]["written"].count("labelling.default.train.json") == 2  # as running, and as complete
    record = json.loads((tmp_path / "out" / "labelling.default.train.json").read_text())
    assert record["last_run"]["clips"] == 4


def test_processes_of_the_training_share_the_held_out_rows_and_score_all_of_them(tones, tiny_teacher, tmp_path):
    init = initialise(tiny_teacher, tmp_path / "init")
    given = ("--model_name_or_path", init, "--teacher_model_name_or_path", tiny_teacher, "--language", "ja")
    held_out = ("--eval_dataset_name", tones, "--eval_split_name", "train", "--eval_max_samples", 9)
    flags = ("--freeze_encoder", "--max_label_length", 12, "--dtype", "float32", "--per_device_train_batch_size", 2)
    run(run_distillation.main, *given, *held_out, *flags, "--output_dir", tmp_path / "one")
    processes = watch(
        run_distillation, tmp_path / "process", *given, *held_out, *flags, "--output_dir", tmp_path / "two"
    )
    # Five batches, the last of one row: three and two. The encoder is the teacher's, and runs for each of both models.
    assert [process["encoded"] for process in processes] == [2 * 5, 2 * 4]
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    for model in ("teacher", "student"):
        assert two[model] == {name: pytest.approx(value, rel=1e-5) for name, value in one[model].items()}


# ---- a draft model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def passes():
    """How often each kind of model is run."""
    counts = collections.Counter()
    hook = register_module_forward_pre_hook(lambda module, _: counts.update([type(module).__name__]))
    yield counts
    hook.remove()


def test_a_draft_model_is_run_and_saves_the_model_its_own_steps(loaded, tiny_teacher, passes, tmp_path):
    counts = []
    # Beams are decoded by `generate` too, which runs the whole decoder once for each token.
    for number, flags in enumerate((("--generation_num_beams", 2), ("--assistant_model", tiny_teacher))):
        passes.clear()
        more = ("--dataset_config_name", "tiny", "--max_samples_per_split", 3, "--per_device_eval_batch_size", 1)
        evaluate(tiny_teacher, loaded, tmp_path / str(number), *more, *flags)
        counts.append(collections.Counter(passes))
    alone, assisted = counts
    assert alone["WhisperForCausalLM"] == 0
    assert assisted["WhisperForCausalLM"] >= 3
    # A model that drafts for itself is always right. Each step of the draft model runs its own decoder.
    assert assisted["WhisperDecoder"] - assisted["WhisperForCausalLM"] < 0.75 * alone["WhisperDecoder"]


# ---- the worst clips -------------------------------------------------------------------------------------------------


def wrong_by(number: int) -> str:
    """A text to which あいうえお is worse, the larger the number is."""
    return "あいうえお" + "か" * number


def test_the_audio_on_the_report_s_page_is_that_of_the_worst_clips_as_far_as_it_may_be_large(tiny_teacher, tmp_path):
    numbers = random.Random(0).sample(range(25), 25)
    sounds = {str(number): tone(0.2, 100 + 20 * number) for number in numbers}
    rows = [{"name": str(n), "audio": sounds[str(n)], "transcription": wrong_by(n)} for n in numbers]
    data = write_dataset(tmp_path / "data", rows)
    output = evaluate(speaking(tiny_teacher, tmp_path / "teacher", "あいうえお"), data, tmp_path / "out")
    assert {row["hypothesis"] for row in read_predictions(output)} == {"あいうえお"}
    players = read_players(output / "report.train.html")
    assert set(players) == set(sounds)  # all fit
    for name, audio in players.items():
        assert np.array_equal(samples_of(audio), samples_of(sounds[name]))
    for clip in read_page(output / "report.train.html")["clips"]:
        number = int(clip["id"])
        assert clip["texts"][0]["aligned"][1] == ["あいうえお", *([["か" * number, ""]] if number else [])]
        assert clip["figures"][0] == pytest.approx(100 * number / (5 + number))
    # As many megabytes as the 20 worst take in base64, and half of the next one.
    sizes = [len(base64.b64encode(players[str(number)])) for number in range(25)]
    megabytes = (sum(sizes[5:]) + sizes[4] / 2) / 1e6
    evaluate(tmp_path / "teacher", data, output, "--report_audio_mb", megabytes)
    assert set(read_players(output / "report.train.html")) == {str(number) for number in range(5, 25)}


def test_the_labels_in_the_filter_s_report_are_the_worst_of_those_dropped(tiny_teacher, tmp_path):
    numbers = [0, 2, 4, 15, 13, 11, 9, 7, 1, 3, 5, 14, 12, 10, 8, 6]  # two shards, of each of which five are told
    label = make_label(tiny_teacher, "あいうえお")
    rows = [
        {"name": str(n), "audio": tone(0.2), "transcription": wrong_by(n), "whisper_transcript": label} for n in numbers
    ]
    data = write_dataset(tmp_path / "data", rows)
    filter_clips(tiny_teacher, data, "--cer_threshold", 10, "--shard_size", 8, "--skip_logmel")
    assert [row["text"] for row in read_rows(tmp_path / "data.cer_10.0")] == ["あいうえお"]
    record = json.loads((tmp_path / "data.cer_10.0" / "filtering.default.train.json").read_text())
    worst = record["report"]["worst"]
    assert [row["name"] for row in worst] == [str(number) for number in range(15, 5, -1)]
    assert [row["cer"] for row in worst] == pytest.approx([100 * n / (5 + n) for n in range(15, 5, -1)])
