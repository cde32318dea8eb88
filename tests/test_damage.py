"""Damaged files: the same command mends what its stage has made, and the stage behind says which file is damaged.

Every kind of file that a stage leaves is cut short, emptied, filled with zeros, or has a bit flipped.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

import run_short_form_eval
from tests.stages import (
    distil,
    evaluate,
    filter_clips,
    initialise,
    label,
    load,
    read_predictions,
    read_rows,
)
from tests.test_flags import write_download

KINDS: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "flipped": lambda content: (
        bytes([*content[: len(content) // 2], content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :]
    ),
}
SHORT = ("--max_label_length", 16, "--language", "ja")
CUT = "labels.wer_1000000000.0"
SIBLING = "labels.wer_100000000.0"


@dataclass
class World:
    """What all stages leave in a directory, and their commands."""

    place: Path
    teacher: Path

    def load(self) -> None:
        load(self.place / "download", self.place / "loaded", "-t", "small")

    def label(self) -> None:
        config = ("--dataset_config_name", "small", "--shard_size", 2)
        label(self.teacher, self.place / "loaded", self.place / "labels", *config, *SHORT)

    def filter(self, threshold: str = "1e9") -> None:
        filter_clips(self.teacher, self.place / "labels", "--shard_size", 2, "--wer_threshold", threshold)

    def filter_sibling(self) -> None:
        self.filter("1e8")

    def initialise(self) -> None:
        initialise(self.teacher, self.place / "init")

    def distil(self) -> None:
        flags = ("--cache_encoder_outputs", self.place / "cache", "--max_steps", 2, "--save_steps", 1)
        flags += ("--per_device_train_batch_size", 2, "--save_total_limit", 2)
        distil(self.place / "init", self.teacher, self.place / f"{CUT}.vectorized", self.place / "trained", *flags)

    def evaluate(self) -> None:
        flags = ("--dataset_config_name", "small", "--dataloader_num_workers", 0)
        evaluate(self.place / "trained", self.place / "loaded", self.place / "results", *flags)

    def compare(self) -> None:
        results = str(self.place / "results")
        assert run_short_form_eval.main(["--compare", results, "--output_dir", results]) == 0


ORDER = ("load", "label", "filter", "filter_sibling", "initialise", "distil", "evaluate")


@pytest.fixture(scope="module")
def whole(clips, tiny_teacher, tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("whole"), tiny_teacher)
    write_download(world.place / "download", clips[:4])
    for stage in ORDER:
        getattr(world, stage)()
    return world


@pytest.fixture
def world(whole, tmp_path) -> World:
    """A copy, to damage."""
    shutil.copytree(whole.place, tmp_path / "world", symlinks=True)
    return World(tmp_path / "world", whole.teacher)


def results(world: World) -> dict:
    """What the stages are for: rows, weights, predictions and figures; and what their records tell, without times."""
    place = world.place
    found = {}
    for path in sorted(place.rglob("*.parquet")):
        found[str(path.relative_to(place))] = path.read_bytes()
    for name in ("init", "trained"):
        weights = load_file(place / name / "model.safetensors")
        found[name] = {key: tensor.numpy().tobytes() for key, tensor in weights.items()}
        for file in ("config.json", "generation_config.json", "tokenizer.json", "vocab.json"):
            found[f"{name}/{file}"] = (place / name / file).read_text(encoding="utf-8")
    found["predictions"] = read_predictions(place / "results")
    found["losses"] = [
        {key: value for key, value in json.loads(line).items() if key != "samples_per_second"}
        for line in (place / "trained" / "metrics.jsonl").read_text().splitlines()
    ]
    for path in (*place.glob("*/*.train.json"), place / "init/student.json", place / "trained/distillation.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record.get("status", "complete") == "complete", path
        if "settings" in record:
            found[str(path.relative_to(place))] = record["settings"]
    return found


def differences(mine: dict, other: dict) -> list[str]:
    return [name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name)]


def files(world: World, pattern: str) -> list[Path]:
    found = [path for path in sorted(world.place.glob(pattern)) if path.is_file() and path.stat().st_size]
    assert found, pattern
    return found


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()  # a copy, so that no link leads to the original
    path.write_bytes(KINDS[kind](content))
    assert path.read_bytes() != content


def run_stage(stage: Callable[[], None]) -> str:
    """The one line that a stage ends with, or "" where it succeeds."""
    try:
        stage()
    except SystemExit as error:
        line = str(error)
        assert ": error: " in line and "\n" not in line
        return line
    return ""


# The files that every kind of damage is tried on; the others have one kind each.
IMPORTANT = {
    "load": ("loaded/small/*-00000-*", "loaded/loading.small.train.json"),
    "label": ("labels/small/*-00000-*", "labels/labelling.small.train.json"),
    "filter": (f"{CUT}/small/*-00000-*", f"{CUT}.vectorized/small/*-00001-*", f"{CUT}/filtering.small.train.json"),
    "initialise": ("init/model.safetensors", "init/student.json", "init/tokenizer.json"),
    "distil": (
        *("trained/model.safetensors", "trained/metrics.jsonl", "trained/distillation.json", "trained/config.json"),
    ),
    "evaluate": ("results/.predictions.train/*.jsonl", "results/.predictions.train/settings.json"),
}
OTHERS = {
    "load": "loaded/README.md",
    "label": "labels/README.md",
    "filter": f"{CUT}*/*.*",
    "initialise": "init/*",
    "distil": "trained/*",
    "evaluate": "results/*",
}
# Damage for which there is no remedy but that of the line, which must be in it.
REFUSED = {
    ("init/model.safetensors", "flipped"): "is not as it was written; --overwrite_output_dir makes it again",
}


@pytest.mark.parametrize("stage", OTHERS)
def test_the_same_command_mends_what_is_damaged_or_says_what_to_do(stage, whole, world, caplog):
    expected = results(whole)
    victims = [(pattern, kind) for pattern in IMPORTANT[stage] for kind in KINDS]
    important = {path for pattern in IMPORTANT[stage] for path in files(world, pattern)}
    # Copies of the scripts are left to whoever reads them: they may be of another version on purpose.
    others = [path for path in files(world, OTHERS[stage]) if path not in important and path.suffix != ".py"]
    for number, path in enumerate(others):
        victims.append((str(path.relative_to(world.place)), [*KINDS][number % len(KINDS)]))
    for pattern, kind in victims:
        path = files(world, pattern)[0]
        before = {other: other.read_bytes() for other in world.place.rglob("*") if other.is_file()}
        damage(path, kind)
        caplog.clear()
        line = run_stage(getattr(world, stage))
        wrong = [] if line else differences(results(world), expected)
        if pattern.endswith("metrics.jsonl"):  # what it told is in no other file; the run says so
            assert "is damaged" in caplog.text
            wrong = [name for name in wrong if name != "losses"]
        assert not wrong, (pattern, kind)
        remedies = ("again", "--overwrite_output_dir", "delete")
        assert not line or any(remedy in line for remedy in remedies), (pattern, kind, line)
        if line:
            print(f"{pattern}, {kind}: {line}")
        if line or pattern.endswith("metrics.jsonl"):  # back to the whole state for the next
            for other in [other for other in world.place.rglob("*") if other.is_file() and other not in before]:
                other.unlink()
            for other, content in before.items():
                if not other.exists() or other.read_bytes() != content:
                    other.parent.mkdir(exist_ok=True, parents=True)
                    other.write_bytes(content)
        elif pattern in IMPORTANT[stage] or "README" not in pattern:
            assert path.exists() and (path.read_bytes() != KINDS[kind](before[path])), (pattern, kind)


READ_BY = [
    ("loaded/small/*-00001-*", "label", "labels"),
    ("loaded/small/*-00001-*", "evaluate", "results"),
    ("loaded/loading.small.train.json", "label", "labels"),
    ("labels/small/*-00001-*", "filter", "labels.wer_*"),
    ("labels/labelling.small.train.json", "filter", f"{CUT}*"),
    (f"{CUT}.vectorized/small/*-00001-*", "distil", "trained"),
    (f"{CUT}.vectorized/filtering.small.train.json", "distil", "trained"),
    ("init/model.safetensors", "distil", "trained"),
    ("init/tokenizer.json", "distil", "trained"),
    ("init/config.json", "distil", "trained"),
    ("trained/model.safetensors", "evaluate", "results"),
    ("results/metric.train.json", "compare", "nothing"),
    ("results/all_predictions.train.csv", "compare", "nothing"),
]


@pytest.mark.parametrize(("pattern", "stage", "made"), READ_BY)
def test_damage_of_an_earlier_stage_is_refused_in_one_line(pattern, stage, made, whole, world):
    for kind in KINDS:
        for path in world.place.glob(made):
            shutil.rmtree(path)
        path = files(world, pattern)[0]
        content = path.read_bytes()
        damage(path, kind)
        line = run_stage(getattr(world, stage))
        if not line:  # nothing was wrong with what counts: then the results are those of the whole file
            wrong = set(differences(results(world), results(whole))) - {str(path.relative_to(world.place))}
            wrong = [name for name in wrong if not name.startswith(SIBLING)]
            assert kind == "flipped" and (not wrong or stage == "compare"), (pattern, kind, wrong)
        else:
            names = (path.name, path.parent.name, path.parent.parent.name)
            assert any(name in line for name in names) and "hf auth" not in line, line
        path.write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("record_too", [False, True])
def test_training_goes_on_from_the_checkpoint_before_one_with_a_damaged_manifest(kind, record_too, whole, world):
    trained = world.place / "trained"
    (trained / "model.safetensors").unlink()
    damage(files(world, "trained/checkpoint-2-*/manifest.json")[0], kind)
    if record_too:
        damage(trained / "distillation.json", kind)
    world.distil()
    assert not differences(results(world), results(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_block_of_the_encoder_cache_is_made_again(kind, whole, world, caplog):
    (block,) = files(world, "cache/*/0/0.safetensors")
    content = block.read_bytes()
    damage(block, kind)
    shutil.rmtree(world.place / "trained")
    world.distil()
    assert f"{block} is damaged and is made again" in caplog.text
    assert block.read_bytes() == content
    assert not differences(results(world), results(whole))


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"text"', b"{}"])
def test_a_manifest_that_is_not_one_is_skipped(content, whole, world):
    (world.place / "trained" / "model.safetensors").unlink()
    files(world, "trained/checkpoint-2-*/manifest.json")[0].write_bytes(content)
    world.distil()
    assert not differences(results(world), results(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_shard_at_another_threshold_is_not_taken(kind, whole, world):
    for suffix in ("", ".vectorized"):
        damage(files(world, f"{SIBLING}{suffix}/small/*-00000-*")[0], kind)
        shutil.rmtree(world.place / f"{CUT}{suffix}")
    world.filter()
    for suffix in ("", ".vectorized"):
        assert read_rows(world.place / f"{CUT}{suffix}", "small") == read_rows(whole.place / f"{CUT}{suffix}", "small")


# ---- incomplete input ----

INPUTS = [
    ("loaded", "label", "labels", "reazonspeech_manual_dataloader.py"),
    ("loaded", "evaluate", "results", "reazonspeech_manual_dataloader.py"),
    ("labels", "filter", f"{CUT}*", "run_pseudo_labelling.py"),
    (f"{CUT}.vectorized", "distil", "trained", "run_data_filtering.py"),
]


@pytest.mark.parametrize(("data", "stage", "made", "writer"), INPUTS)
def test_input_that_is_not_finished_is_refused_with_what_to_run(data, stage, made, writer, world):
    for path in world.place.glob(made):
        shutil.rmtree(path)
    (record,) = files(world, f"{data}/*.small.train.json")
    content = record.read_text(encoding="utf-8")
    unfinished = {name: value for name, value in json.loads(content).items() if name != "checksum"}
    record.write_text(json.dumps(unfinished | {"status": "running"}), encoding="utf-8")
    line = run_stage(getattr(world, stage))
    assert "is not finished" in line and record.name in line and f"run {writer} with the same flags again" in line
    record.write_text(content, encoding="utf-8")

    lost = files(world, f"{data}/small/train-00001-of-00002.parquet")[0]
    lost.rename(world.place / "lost")
    line = run_stage(getattr(world, stage))
    assert "has 1 of 2 shards of train, -00001-of-00002 is missing" in line
    assert f"run {writer} with the same flags again" in line
    (world.place / "lost").rename(lost)

    shutil.copyfile(lost, lost.with_name("train-00002-of-00003.parquet"))
    assert "has 1 of 3 shards of train" in run_stage(getattr(world, stage))
    lost.with_name("train-00002-of-00003.parquet").unlink()
    assert run_stage(getattr(world, stage)) == ""
