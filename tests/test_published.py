"""What is pushed, and to whom: names in place of places, nothing public by mistake, no password anywhere."""

import logging
import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download

import create_student_model
import reazonspeech_manual_dataloader
import reazonspeech_manual_downloader
import run_data_filtering
import run_pseudo_labelling
import run_short_form_eval
from tests.stages import distil, evaluate, filter_clips, initialise, label, load, run
from tests.test_flags import write_download


@pytest.fixture(scope="module")
def secret_place(clips, tiny_teacher, tmp_path_factory) -> Path:
    """A directory whose path nobody is to learn, with a download, a teacher, labels and what follows from them."""
    place = tmp_path_factory.mktemp("secret-place")
    write_download(place / "download", clips[:4])
    (place / "teacher").symlink_to(tiny_teacher)
    return place


def pulled(repo_id: str, kind: str, into: Path) -> Path:
    return Path(snapshot_download(repo_id, repo_type=kind, local_dir=into / kind / repo_id))


@pytest.fixture(scope="module")
def published(secret_place, tmp_path_factory) -> Path:
    """What all stages push, pulled again."""
    place, teacher = secret_place, secret_place / "teacher"
    repositories = tmp_path_factory.mktemp("pulled")
    push = ("--push_to_hub", "--hub_model_id")
    load(place / "download", place / "loaded", "-t", "small", *push, "acme/named-loaded")
    label(
        *(teacher, place / "loaded", place / "labels", "--dataset_config_name", "small", "--language", "ja"),
        *("--max_label_length", 16, *push, "acme/named-labels"),
    )
    filter_clips(teacher, place / "labels", "--wer_threshold", 1e9, *push, "acme/named-cut")
    initialise(teacher, place / "init", *push, "acme/named-init")
    data = f"{place}/labels.wer_1000000000.0.vectorized"
    flags = ("--train_dataset_config_name", "small", "--max_steps", 1, "--cache_encoder_outputs", place / "cache")
    distil(place / "init", teacher, data, place / "trained", *flags, *push, "acme/named-trained")

    cut = ("acme/named-cut.wer_1000000000.0", "acme/named-cut.wer_1000000000.0.vectorized")
    for repo_id in ("acme/named-loaded", "acme/named-labels", *cut):
        pulled(repo_id, "dataset", repositories)
    for repo_id in ("acme/named-init", "acme/named-trained"):
        pulled(repo_id, "model", repositories)
    return repositories


def test_what_is_pushed_names_things_and_no_places(published, secret_place):
    files = [path for path in published.rglob("*") if path.is_file()]
    assert {"labelling.small.train.json", "distillation.json", "student.json"} <= {path.name for path in files}
    for path in files:
        assert secret_place.name.encode() not in path.read_bytes(), path
    assert "| teacher | teacher |" in (published / "dataset/acme/named-labels/README.md").read_text()


def test_what_a_card_shows_is_pushed_with_it(published):
    shown = []
    for card in published.rglob("README.md"):
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", card.read_text(encoding="utf-8")):
            assert card.with_name(picture).read_bytes().startswith(b"\x89PNG"), card
            shown.append(picture)
    assert sorted(shown) == ["filtering.small.train.png"] * 2 + ["training_curves.png"]


def test_a_pushed_model_has_all_files_that_its_users_look_for(published):
    needed = "config.json generation_config.json model.safetensors tokenizer.json vocab.json preprocessor_config.json"
    for name in ("named-init", "named-trained"):
        assert set(needed.split()) <= {path.name for path in (published / "model" / "acme" / name).iterdir()}


def test_the_evaluations_page_and_the_tracker_get_names_and_no_places(secret_place, loaded, tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(
        run_short_form_eval.Accelerator, "init_trackers", lambda self, project, values, options: told.update(values)
    )
    data = secret_place / "data"
    data.symlink_to(loaded)
    flags = ("--dataset_config_name", "tiny", "--max_samples_per_split", 2, "--report_to", "tensorboard")
    evaluate(secret_place / "teacher", data, tmp_path / "results", *flags)
    page = (tmp_path / "results" / "report.train.html").read_text(encoding="utf-8")
    assert secret_place.name not in page and "<title>teacher on data, train</title>" in page
    assert told["model_name_or_path"] == "teacher" and told["dataset_name"] == "data"
    assert not [value for value in told.values() if secret_place.name in str(value)]


def test_a_password_in_an_address_is_shown_nowhere(corpus, mirror, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    url = mirror.url.replace("://", "://user:s3cr3t@")
    flags = ["--data_dir", str(tmp_path), "--retries", "1", "--backoff", "0.01"]
    assert reazonspeech_manual_downloader.main([*flags, "--base_url", url]) == 0
    errors = []
    for address in (f"{url}/nowhere", "http://user:s3cr3t@127.0.0.1:9", "ftp://user:s3cr3t@host", "user:s3cr3t@host"):
        with pytest.raises(SystemExit) as error:
            status = reazonspeech_manual_downloader.main([*flags, "--target", "small", "--base_url", address])
            raise SystemExit(status)
        errors.append(str(error.value))
    out, err = capfd.readouterr()
    assert "127.0.0.1:9" in errors[1] and "--base_url must begin with" in err
    assert "s3cr3t" not in "".join([*errors, out, err, caplog.text])


# ---- private and public ----


def public_repository(name: str, kind: str) -> str:
    HfApi().create_repo(name, repo_type=kind, private=False, exist_ok=True)
    return name


def stages_that_push_audio(place: Path, teacher: Path, name: str) -> dict:
    """Command lines, by stage, that would push into the repository `name`."""
    push = ["--push_to_hub", "--hub_model_id", name]
    return {
        reazonspeech_manual_dataloader.main: [
            *("-t", "small", "--data_dir", place / "download", "--output_dir", place / "again"),
            *push,
        ],
        run_pseudo_labelling.main: [
            *("--model_name_or_path", teacher, "--dataset_name", place / "loaded", "--dataset_config_name", "small"),
            *("--language", "ja", "--max_label_length", 16, "--output_dir", place / "again", *push),
        ],
        run_data_filtering.main: [
            *("-d", place / "labels", "--model", teacher, "--wer_threshold", 1e9, "--preprocessing_num_workers", 1),
            *("--output_dir", place / "again", "--skip_logmel", *push),
        ],
    }


def test_audio_goes_into_a_public_repository_only_if_that_is_said(hub, secret_place, capsys):
    place, teacher = secret_place, secret_place / "teacher"
    load(place / "download", place / "loaded", "-t", "small")
    label(
        *(teacher, place / "loaded", place / "labels", "--dataset_config_name", "small", "--language", "ja"),
        *("--max_label_length", 16),
    )
    for repo_id in ("acme/open-door", "acme/open-door.wer_1000000000.0"):
        public_repository(repo_id, "dataset")
    for main, words in stages_that_push_audio(place, teacher, "acme/open-door").items():
        for more in ([], ["--dry_run"]):
            with pytest.raises(SystemExit, match=r"acme/open-door\S* is public.*--hub_private_repo False"):
                run(main, *words, *more)
        assert not list(place.rglob("again/**/*.parquet"))
        capsys.readouterr()
        run(main, *words, "--hub_private_repo", "False", "--dry_run")
        assert "(public)" in capsys.readouterr().out


def test_a_dry_run_tells_who_will_see_a_model(hub, secret_place, tmp_path, capsys):
    public_repository("acme/open-model", "model")
    for name, flag, expected in (
        ("acme/open-model", "True", "acme/open-model (public)"),
        ("acme/no-model-yet", "True", "acme/no-model-yet (private)"),
        ("acme/no-model-yet", "False", "acme/no-model-yet (public)"),
    ):
        flags = ["--push_to_hub", "--hub_model_id", name, "--hub_private_repo", flag, "--dry_run"]
        teacher = str(secret_place / "teacher")
        words = ["--teacher_checkpoint", teacher, "--save_dir", str(tmp_path / "init"), *flags]
        assert create_student_model.main(words) == 0
        assert f"pushes: {expected}" in capsys.readouterr().out


def test_an_evaluation_creates_no_repository(hub, loaded, tmp_path):
    for more in ([], ["--dry_run"]):
        with pytest.raises(SystemExit, match="acme/no-such-model failed"):
            evaluate("acme/no-such-model", loaded, tmp_path / "results", "--push_to_hub", *more)
    assert not HfApi().repo_exists("acme/no-such-model")
