"""The shell script, whole, on a tiny teacher: through the Hub, and through local directories."""

import csv
import os
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, snapshot_download
from safetensors.numpy import load_file

from tests.sandbox.demo import SCRIPT, SETTINGS, environment

# A random teacher's labels have nothing to do with the transcriptions, so the filter has to let them all through.
SMALL = {
    "CER_THRESHOLD": "",
    "WER_THRESHOLD": "100000",
    "DATASET_NAME": "chain",
    "MODEL_NAME": "chain-student",
    "TIMESTAMP_PROBABILITY": "0.5",
    "CONDITION_ON_PREV_PROBABILITY": "0.5",
    "EPOCHS": "1",
    "TRAIN_BATCH": "4",
    "EVAL_MODELS": "init student",
    "WORKERS": "2",
}
VECTORIZED = "chain.wer_100000.0.vectorized"


def run_chain(directory: Path, teacher: Path, mirror, hub, **settings) -> subprocess.CompletedProcess:
    directory.mkdir(exist_ok=True)
    env = environment(directory, str(teacher), mirror.url, hub and hub.url, "hf_write", "acme")
    env |= SETTINGS | SMALL | settings
    return subprocess.run(["bash", str(SCRIPT)], env=env, cwd=directory, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {mode: tmp_path_factory.mktemp("chain") / f"{mode} world" for mode in ("hub", "local")}


@pytest.fixture(scope="module")
def finished(directories, tiny_teacher, corpus):
    """Both runs of the chain; the local one is stopped by a dead mirror first and then run again."""
    from tests.conftest import HUB
    from tests.sandbox.mirror import MirrorServer

    with MirrorServer(corpus) as mirror:
        mirror.fault(r"fff\.tar", times=-1, status=404)
        stopped = run_chain(directories["local"], tiny_teacher, mirror, None)
        mirror.faults.clear()
        runs = {
            "stopped": stopped,
            "local": run_chain(directories["local"], tiny_teacher, mirror, None),
            "hub": run_chain(directories["hub"], tiny_teacher, mirror, HUB),
        }
    for mode in ("local", "hub"):
        assert runs[mode].returncode == 0, f"{runs[mode].stdout[-4000:]}\n{runs[mode].stderr[-8000:]}"
    return runs


def rows(directory: Path) -> list[dict]:
    shards = sorted((directory / "tiny").glob("train-*.parquet"))
    assert shards, f"no shards in {directory}"
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


def test_a_dead_mirror_stops_the_chain_at_the_download_with_the_file_named(finished, directories):
    assert finished["stopped"].returncode != 0
    assert "fff.tar" in finished["stopped"].stderr
    assert "==== label" not in finished["stopped"].stdout


def test_the_hub_and_local_directories_give_the_same_rows_and_labels(finished, directories, clips):
    for name in ("chain", "chain.wer_100000.0", VECTORIZED):
        local = rows(directories["local"] / name)
        assert len(local) == len(clips)
        assert local == rows(directories["hub"] / name)


def test_what_was_pushed_is_what_was_written(finished, directories, tmp_path):
    for name in ("chain", "chain.wer_100000.0", VECTORIZED):
        pulled = snapshot_download(f"acme/{name}", repo_type="dataset", cache_dir=tmp_path)
        assert rows(Path(pulled)) == rows(directories["hub"] / name)
    assert HfApi().dataset_info("acme/chain").private


def test_training_gives_the_same_student_either_way(finished, directories, tmp_path):
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


def test_every_held_out_clip_is_evaluated(finished, directories):
    evaluations = sorted((directories["local"] / "eval").glob("*/*/all_predictions.test.csv"))
    assert len(evaluations) == 2
    for evaluation in evaluations:
        with open(evaluation, encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == 8


def test_the_run_ends_with_a_table_of_the_models(finished):
    table = finished["hub"].stdout.split("==== results")[-1]
    assert "chain-student-init" in table
    assert "CER" in table
    assert "WER" in table


def test_no_token_is_shown_or_written(finished, directories):
    for run in finished.values():
        assert "hf_write" not in run.stdout + run.stderr
    for directory, _, names in os.walk(directories["hub"]):
        for name in names:
            if name.endswith((".json", ".jsonl", ".md", ".csv", ".html")):
                assert "hf_write" not in (Path(directory) / name).read_text(encoding="utf-8", errors="replace")
