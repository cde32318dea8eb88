"""Every benchmark runs to its table, at its smallest: one that nobody runs breaks with the next name that changes.

`bench_packing` alone is not here, as it trains whisper-base, whose weights the tests do without.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_module(name: str, *flags) -> str:
    """What a module of the benchmarks prints, which must succeed."""
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def benchmark(name: str, *flags) -> str:
    return run_module(f"bench_{name}", *flags)


@pytest.mark.parametrize(
    ("name", "flags", "rows"),
    [
        ("download", ["--megabytes", 4, "--rounds", 1], ["builder", "parquet shards"]),
        ("filtering", ["--clips", 20, "--runs", 1], ["shuffled epoch", "another threshold"]),
        ("student", ["--shape", "base", "--runs", 1], ["peak resident memory, GB", "seconds"]),
        ("memory", ["--shape", "base"], ["clips, 20 tokens", "packed windows, 250 tokens"]),
        # This one ends with an error where ours has another loss than the plain way.
        ("distillation", ["--shape", "tiny", "--batch_size", 2, "--steps", 1], ["baseline", "ours, 8 epochs"]),
    ],
)
def test_a_benchmark_prints_its_table(name, flags, rows):
    printed = benchmark(name, *flags)
    for row in rows:
        assert re.search(rf"^\| {row}.*\d\.\d", printed, re.MULTILINE), printed


def test_the_labelling_benchmark_s_plain_way_gives_the_same_labels(tiny_teacher):
    printed = benchmark("labelling", "--teacher", tiny_teacher, "--max_label_length", 8, "--clips", 2, "--rounds", 1)
    assert "2 of 2 labels are equal" in printed


def test_the_evaluation_benchmark_s_plain_way_gives_the_same_texts(tiny_teacher):
    printed = benchmark("evaluation", "--model", tiny_teacher, "--clips", 2, "--rounds", 1, "--dtype", "float32")
    assert re.search(r"^\| plain .* 2 \|$", printed, re.MULTILINE), printed


def test_the_acceptance_of_a_gpu_runs_on_a_cpu_and_finds_equal_labels():
    printed = benchmark("gpu", "--tiny", "--sections", "device,labels,exact")
    assert "sections that failed: none" in printed
    assert re.search(r"^\| labelling, batches of 2 \| \d", printed, re.MULTILINE), printed
    assert printed.count("| 4 of 4 |") == 4  # as of generate, and made twice


def test_the_study_of_recipes_runs_to_its_table_and_measures_nothing_twice(tiny_teacher, tmp_path):
    flags = ["--clips", 16, "--held_out", 3, "--noises", 3, "--steps", 2, "--batch_size", 2, "--dtype", "float32"]
    flags += ["--recipes", "unfiltered"]  # what a random teacher says passes no filter
    logs = []
    for _ in range(2):
        run_module("study", "--directory", tmp_path, "--teacher", tiny_teacher, *flags)
        logs.append((tmp_path / "log.txt").read_text(encoding="utf-8"))
    assert logs[1] == logs[0]  # of all stages that were run
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    for row in ("teacher", "unfiltered"):
        assert re.search(rf"^\| {row} .*\d\.\d", table, re.MULTILINE), table
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
