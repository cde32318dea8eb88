"""The shell script, whole, on a tiny teacher: through local directories, and through the Hub with faults everywhere."""

import csv
import os
import random
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, snapshot_download
from safetensors.numpy import load_file

from tests.conftest import HUB
from tests.sandbox.chaos import DATASETS, STAGES, World, draw, read_results, run_disturbed, time_stages
from tests.sandbox.mirror import MirrorServer

SEED = 3  # of what happens when in the disturbed run


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, corpus, tiny_teacher):
    root = tmp_path_factory.mktemp("chain")
    with MirrorServer(corpus) as mirror:
        yield {
            "local": World(root / "local world", tiny_teacher, mirror, None),
            "hub": World(root / "hub world", tiny_teacher, mirror, HUB),
        }


@pytest.fixture(scope="module")
def finished(worlds, tmp_path_factory):
    """Both runs of the chain: what the quiet one printed, and what the disturbed one went through."""
    logs = tmp_path_factory.mktemp("logs")
    process = worlds["local"].start(logs / "quiet.log")
    seconds = time_stages(process, logs / "quiet.log")
    printed = (logs / "quiet.log").read_text(encoding="utf-8", errors="replace")
    assert process.returncode == 0, printed[-8000:]
    chaos = run_disturbed(worlds["hub"], draw(len(STAGES), seconds, random.Random(SEED)), logs)
    assert chaos.status == 0, chaos.last_output[-8000:]
    return {"printed": printed, "chaos": chaos, "logs": logs}


@pytest.fixture(scope="module")
def directories(finished, worlds):
    return {mode: world.directory for mode, world in worlds.items()}


def rows(directory: Path) -> list[dict]:
    shards = sorted((directory / "tiny").glob("train-*.parquet"))
    assert shards, f"no shards in {directory}"
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def test_the_hub_and_local_directories_give_the_same_rows_and_labels(directories, clips):
    for name in DATASETS:
        local = rows(directories["local"] / name)
        assert len(local) == len(clips)
        assert local == rows(directories["hub"] / name)


def test_what_was_pushed_is_what_was_written(directories, tmp_path):
    for name in DATASETS:
        pulled = snapshot_download(f"acme/{name}", repo_type="dataset", cache_dir=tmp_path)
        assert rows(Path(pulled)) == rows(directories["hub"] / name)
    assert HfApi().dataset_info("acme/chain").private


def test_training_gives_the_same_student_either_way(directories, tmp_path):
    local, hub, init = (
        load_file(directory / "model.safetensors")
        for directory in (
            directories["local"] / "chain-student",
            Path(snapshot_download("acme/chain-student", cache_dir=tmp_path)),
            directories["local"] / "chain-student-init",
        )
    )
    assert local.keys() == hub.keys() == init.keys()
    assert all((local[name] == hub[name]).all() for name in local)
    changed = {name for name in local if (local[name] != init[name]).any()}
    assert any(name.startswith("model.decoder") for name in changed)
    assert not any(name.startswith("model.encoder") for name in changed)


def test_a_log_file_has_lines_of_the_stages_and_no_noise_of_libraries(finished):
    printed = finished["printed"]
    for noise in ("num_proc", "No files matched", "Fetching 0 files", "FutureWarning", "DeprecationWarning"):
        assert noise not in printed
    assert re.search(r"^labelling: 100%.* 24/24 ", printed, re.MULTILINE)  # a line, as there is no terminal
    for line in (
        r"labelling train of \S+reazonspeech_manual_dataloader.py with \S+: CPU, threads: \d+, float32, batches of 4, "
        r"processes: 1; (\d+) of \1 shards are left",
        r"filtered: (\d+) of \1 shards are left, workers: \d+",
        r"training .*: CPU, threads: \d+, float32, processes: 1",
        r"transcribing test of .*: CPU, .*, processes: 1; (\d+) of \1 shards are left",
    ):
        assert re.search(line, printed), line


def test_every_held_out_clip_is_evaluated(directories):
    evaluations = sorted((directories["local"] / "eval").glob("*/*/all_predictions.test.csv"))
    assert len(evaluations) == 2
    for evaluation in evaluations:
        with open(evaluation, encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == 8


def test_the_run_ends_with_a_table_of_the_models(finished):
    table = finished["chaos"].last_output.split("==== results")[-1]
    assert "chain-student-init" in table
    assert "CER" in table
    assert "WER" in table


def test_a_fault_is_told_without_a_traceback(finished):
    assert not finished["chaos"].tracebacks


def test_no_process_outlives_its_run(finished):
    assert not finished["chaos"].survivors


def test_a_disturbed_run_leaves_the_files_and_scores_of_a_quiet_one(finished, worlds):
    quiet, disturbed = (read_results(worlds[mode]) for mode in ("local", "hub"))
    disturbed.hub.clear()  # the other one has no Hub
    assert not quiet.differences(disturbed)


def test_no_token_is_shown_or_written(finished, directories):
    for directory, _, names in [*os.walk(directories["hub"]), *os.walk(finished["logs"])]:
        for name in names:
            if name.endswith((".json", ".jsonl", ".md", ".csv", ".html", ".log")):
                assert "hf_write" not in (Path(directory) / name).read_text(encoding="utf-8", errors="replace")
