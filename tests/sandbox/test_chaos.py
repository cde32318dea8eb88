"""What `chaos.py` does to files and workers happens to one of them, and to no other."""

import random
import subprocess
from pathlib import Path

import pytest

from tests.sandbox.chaos import DAMAGES, WRITTEN, Disturbance, World, damage, draw, kill_worker, parents_of


@pytest.mark.parametrize("kind", DAMAGES)
def test_one_file_of_the_stage_is_damaged_and_can_be_put_back(kind, tmp_path):
    world = World(tmp_path, tmp_path, None, None)
    for name in ("chain/a.parquet", "chain/tiny/b.json", "chain/.tiny.lock", "downloads/c.tar", "eval/d.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"content of " + name.encode())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    path, content = damage(world, Disturbance("label", kind, 1, 0.0, choice=0.9))
    assert path == tmp_path / "chain/tiny/b.json" and content == before[path]
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert changed == [path]


def test_a_stage_that_has_left_nothing_is_spared(tmp_path):
    assert damage(World(tmp_path, tmp_path, None, None), Disturbance("label", "zeros", 1, 0.0)) is None


def test_disturbances_of_the_other_kinds_hit_each_stage_that_writes_equally_often():
    drawn = draw(20, dict.fromkeys(WRITTEN, 5.0), random.Random(1), [*DAMAGES])
    assert [sum(each.stage == stage for each in drawn) for stage in WRITTEN] == [4] * 5
    assert {each.kind for each in drawn} <= set(DAMAGES) and all(0 <= each.after <= 5 for each in drawn)


def test_a_worker_is_killed_and_not_the_script():
    script = subprocess.Popen(["bash", "-c", "sleep 1000; exit 7"], start_new_session=True)
    while len(parents_of(script.pid)) < 2:
        assert script.poll() is None
    kill_worker(script, Disturbance("label", "killed worker", 1, 0.0))
    assert script.wait() == 7
    assert not Path(f"/proc/{script.pid}").exists()
