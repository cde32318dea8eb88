"""What others wrote into a card stays, whichever stage writes into it."""

from pathlib import Path

import datasets
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, RepoCard, hf_hub_download, metadata_update

import run_pseudo_labelling
from tests import stages

MINE = """---
license: apache-2.0
tags:
- mine
---
# My own name

Written by hand.
"""


@pytest.fixture
def labelled(loaded, tiny_teacher, tmp_path) -> Path:
    flags = ["--dataset_config_name", "tiny", "--max_samples", 4, "--language", "ja"]
    return stages.label(tiny_teacher, loaded, tmp_path / "labels", *flags)


def pushed_card(repository: str, repo_type: str = "model") -> RepoCard:
    return RepoCard(Path(hf_hub_download(repository, "README.md", repo_type=repo_type)).read_text())


def write_by_hand(repository: str, repo_type: str = "model") -> None:
    api = HfApi()
    api.create_repo(repository, repo_type=repo_type, private=True)
    api.upload_file(repo_id=repository, repo_type=repo_type, path_in_repo="README.md", path_or_fileobj=MINE.encode())


def assert_mine(card: RepoCard, section: str) -> None:
    """What was written by hand is there, and one section of ours."""
    assert card.text.startswith("# My own name\n\nWritten by hand.\n")
    assert card.data["license"] == "apache-2.0"
    assert "mine" in card.data["tags"]
    assert card.text.count(section) == 1


def test_a_model_card_keeps_its_text_its_licence_and_the_rates_of_the_evaluation(hub, labelled, tiny_teacher, tmp_path):
    write_by_hand("acme/cards-student")
    flags = ["--push_to_hub", "--hub_model_id", "acme/cards-student"]
    student = stages.initialise(tiny_teacher, tmp_path / "init", *flags)
    assert_mine(pushed_card("acme/cards-student"), "the start of a\ndistillation")

    write_by_hand("acme/cards-trained")
    stages.filter_clips(tiny_teacher, labelled, "--dataset_config_name", "tiny", "--wer_threshold", "1e9")
    data = tmp_path / "labels.wer_1000000000.0.vectorized"
    flags = ["--train_dataset_config_name", "tiny", "--max_steps", 1]
    flags += ["--push_to_hub", "--hub_model_id", "acme/cards-trained"]
    output = stages.distil(student, tiny_teacher, data, tmp_path / "trained", *flags)
    rate = {"task": {"type": "automatic-speech-recognition"}, "dataset": {"type": "a", "name": "b"}}
    rate["metrics"] = [{"type": "cer", "value": 9.5}]
    metadata_update("acme/cards-trained", {"model-index": [{"name": "x", "results": [rate]}]})
    stages.distil(student, tiny_teacher, data, output, *flags)  # it finds all done and pushes
    assert_mine(pushed_card("acme/cards-trained"), "decoder layers, distilled from")
    (result,) = ModelCard(str(pushed_card("acme/cards-trained"))).data.eval_results
    assert result.metric_value == 9.5

    (output / "README.md").write_text(MINE)  # and on the disk
    stages.distil(student, tiny_teacher, data, output, *flags, "--overwrite_output_dir", "--seed", 7)
    assert_mine(RepoCard((output / "README.md").read_text()), "decoder layers, distilled from")


def test_a_dataset_card_keeps_its_text_and_its_licence(hub, labelled, loaded, tiny_teacher, tmp_path):
    (labelled / "README.md").write_text(MINE)
    write_by_hand("acme/cards-data", "dataset")
    flags = ["--dataset_config_name", "tiny", "--max_samples", 4, "--language", "ja"]
    for _ in range(2):
        stages.label(tiny_teacher, loaded, labelled, *flags, "--hub_model_id", "acme/cards-data")
    for card in (RepoCard((labelled / "README.md").read_text()), pushed_card("acme/cards-data", "dataset")):
        assert_mine(card, "Labels are in `whisper_transcript`")
    assert len(datasets.load_dataset("acme/cards-data", "tiny", split="train")) == 4


LEGAL = {
    "one pattern": {"data_files": "other/*.parquet"},
    "patterns": {"data_files": ["other/*.parquet"]},
    "by split": {"data_files": [{"split": "train", "path": ["other/*.parquet"]}]},
    "a directory": {"data_dir": "other"},
}


@pytest.mark.parametrize("skip", [0, 1])
def test_a_card_that_the_hub_does_not_give_just_now_is_not_replaced(hub, tiny_teacher, tmp_path, skip):
    """Neither before the work nor behind it, where the card has changed since it was looked at."""
    repository = f"acme/cards-withheld-{skip}"
    write_by_hand(repository)
    fault = hub.fault(rf"{repository}/resolve/.*README", method="HEAD", times=-1, skip=skip, status=403)
    with pytest.raises(SystemExit) as error:
        stages.initialise(tiny_teacher, tmp_path / "init", "--push_to_hub", "--hub_model_id", repository)
    assert fault.hits
    assert repository in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "init").exists() == bool(skip)
    hub.faults.clear()
    assert pushed_card(repository).text == RepoCard(MINE).text


@pytest.mark.parametrize("form", LEGAL.values(), ids=LEGAL)
@pytest.mark.parametrize("config", ["other", "tiny"])
def test_every_legal_form_of_configs_still_finds_its_files(form, config, loaded, tmp_path):
    shard = loaded / "tiny" / "train-00000-of-00001.parquet"
    for name in ("other/theirs.parquet", f"{config}/test-00000-of-00001.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(shard.read_bytes())
    metadata = {"configs": [{"config_name": "other", **form}], "dataset_info": {"config_name": config}}
    card = RepoCard(f"---\n{yaml.safe_dump(metadata)}---\n")
    run_pseudo_labelling.list_split(card, config, "test")
    (tmp_path / "README.md").write_text(str(card))
    theirs = datasets.load_dataset_builder(str(tmp_path), "other").config.data_files["train"]
    assert str(tmp_path / "other" / "theirs.parquet") in theirs
    ours = datasets.load_dataset_builder(str(tmp_path), config).config.data_files["test"]
    assert [Path(file).name for file in ours] == ["test-00000-of-00001.parquet"]


def test_row_counts_of_what_is_replaced_leave_the_card_and_those_of_others_stay():
    """`datasets` refuses a split whose number of rows is not the one in the card."""
    ours = {"config_name": "tiny", "splits": [{"name": "train", "num_examples": 1}]}
    theirs = {"config_name": "other", "splits": [{"name": "train", "num_examples": 2}]}
    for infos, left in ((ours, None), ([ours, theirs], [theirs]), (theirs, [theirs])):
        card = RepoCard(f"---\n{yaml.safe_dump({'dataset_info': infos})}---\n")
        run_pseudo_labelling.list_split(card, "tiny", "train")
        assert card.data["dataset_info"] == left


def test_configs_of_no_legal_form_are_one_line():
    for configs in ("tiny", [{"config_name": "tiny", "data_files": [{"split": "train"}]}], ["tiny"]):
        with pytest.raises(SystemExit, match="`configs` of the dataset's card cannot be read") as error:
            card = RepoCard(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
            run_pseudo_labelling.list_split(card, "tiny", "train")
        assert str(error.value).count("\n") == 0
