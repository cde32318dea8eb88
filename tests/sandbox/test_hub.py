"""The sandbox's Hub, held to what the genuine clients do with it: over Xet and over Git LFS, and when things fail."""

import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import Audio, Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    HfFileSystem,
    ModelCard,
    constants,
    hf_hub_download,
    metadata_update,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from tests.sandbox.hub import HubServer, User

API = HfApi()
HF = Path(sys.executable).with_name("hf")
CARD = b"---\nlicense: mit\n---\n# Hello\n"
SALT = ""


@pytest.fixture(autouse=True)
def own_noise(request, monkeypatch):
    """Let every test make noise of its own: a store does not want again what another test sent it."""
    monkeypatch.setattr(sys.modules[__name__], "SALT", request.node.name)


@pytest.fixture(params=["xet", "lfs"])
def transfer(request, hub, monkeypatch):
    """Once with each way that large files go; the test must really have used it."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    yield request.param
    uploads = {"xet": "/cas/v1/shards", "lfs": "/lfs/"}
    used = {name for name, path in uploads.items() if any(entry[1].startswith(path) for entry in hub.log)}
    assert used == {request.param}


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(f"{SALT} {seed}").randbytes(size)


def speech(rows: int, seed: int = 0) -> Dataset:
    """Rows with audio and text, as the project pushes them."""
    audio = [{"bytes": noise(30_000, seed * 1000 + row), "path": f"{row}.flac"} for row in range(rows)]
    dataset = Dataset.from_dict({"audio": audio, "text": [f"文{row}" for row in range(rows)]})
    return dataset.cast_column("audio", Audio(sampling_rate=16000, decode=False))


def folder(path: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def sent(hub, path: str) -> int:
    """How many requests to upload something below a path succeeded."""
    return sum(entry[0] in ("POST", "PUT") and entry[1].startswith(path) and entry[2] == 200 for entry in hub.log)


# Datasets and folders


def test_a_pushed_dataset_loads_as_it_was(transfer, tmp_path):
    repo = f"acme/pushed-{transfer}"
    pushed = DatasetDict(train=speech(6, seed=1), test=speech(2, seed=2))
    pushed.push_to_hub(repo, config_name="ja", num_shards={"train": 3, "test": 1}, private=True)
    loaded = load_dataset(repo, "ja", cache_dir=str(tmp_path))
    assert {split: loaded[split].to_list() for split in loaded} == {split: pushed[split].to_list() for split in pushed}


def test_delete_patterns_remove_what_a_folder_no_longer_has(transfer, tmp_path):
    repo = f"acme/folder-{transfer}"
    API.create_repo(repo, repo_type="dataset")
    old = {f"ja/train-0000{i}-of-00004.parquet": noise(20_000, i) for i in range(4)} | {"en/train.parquet": b"\0"}
    new = {f"ja/train-0000{i}-of-00002.parquet": noise(20_000, 9 + i) for i in range(2)} | {"README.md": CARD}
    kinds = {"repo_id": repo, "repo_type": "dataset"}
    API.upload_folder(folder_path=folder(tmp_path / "old", old), **kinds)
    API.upload_folder(folder_path=folder(tmp_path / "new", new), delete_patterns=["ja/train-*"], **kinds)
    pulled = Path(snapshot_download(repo, repo_type="dataset", cache_dir=tmp_path / "cache"))
    contents = {path.relative_to(pulled).as_posix(): path.read_bytes() for path in pulled.rglob("*") if path.is_file()}
    assert contents.pop(".gitattributes")
    assert contents == new | {"en/train.parquet": b"\0"}


def test_an_upload_that_broke_before_its_commit_resumes_without_sending_again(transfer, hub, tmp_path):
    repo = f"acme/resumed-{transfer}"
    API.create_repo(repo)
    source = folder(tmp_path / "model", {f"model-{i}.safetensors": noise(300_000, 50 + i) for i in range(3)})
    hub.fault("/commit/", status=403)  # the clients do not retry that
    with pytest.raises(HfHubHTTPError):
        API.upload_folder(repo_id=repo, folder_path=source)
    uploads = "/cas/v1/xorbs/" if transfer == "xet" else "/lfs/"
    assert sent(hub, uploads) > 0
    before = sent(hub, uploads)
    API.upload_folder(repo_id=repo, folder_path=source)
    assert sent(hub, uploads) == before
    assert {*API.list_repo_files(repo)} == {".gitattributes", *(path.name for path in source.iterdir())}


def test_a_connection_that_breaks_during_an_upload_is_survived(transfer, hub, tmp_path):
    fault = hub.fault(r"^/(lfs|cas/v1/xorbs)/", method="P.*", drop_after=20_000)
    speech(4, seed=30).push_to_hub(f"acme/broken-{transfer}")
    assert fault.hits == 1
    loaded = load_dataset(f"acme/broken-{transfer}", split="train", cache_dir=str(tmp_path))
    assert loaded.to_list() == speech(4, seed=30).to_list()


def test_a_commit_whose_reply_is_lost_has_happened(hub, tmp_path):
    API.create_repo("acme/lost")
    hub.fault("/commit/", lose_reply=True)
    with pytest.raises(httpx.TransportError):
        API.create_commit("acme/lost", [CommitOperationAdd("a.json", b"{}")], commit_message="once")
    assert [commit.title for commit in API.list_repo_commits("acme/lost")] == ["once", "initial commit"]
    hub.fault("/commit/", lose_reply=True)
    API.upload_folder(repo_id="acme/lost", folder_path=folder(tmp_path, {"b.json": b"{}"}))  # tries again by itself
    assert {*API.list_repo_files("acme/lost")} == {".gitattributes", "a.json", "b.json"}


def test_a_folder_of_many_files_is_listed_page_by_page(hub, tmp_path):
    API.create_repo("acme/many", repo_type="dataset")
    names = {f"part/{i:04d}.txt" for i in range(1100)}
    additions = [CommitOperationAdd(name, name.encode()) for name in sorted(names)]
    API.create_commit("acme/many", additions, commit_message="many", repo_type="dataset")
    assert {*API.list_repo_files("acme/many", repo_type="dataset")} == names | {".gitattributes"}
    assert len([*API.list_repo_tree("acme/many", "part", repo_type="dataset")]) == 1100
    assert sum("cursor=" in path for _, path, _, _ in hub.log) >= 1


def test_a_part_of_a_file_can_be_read(transfer, tmp_path):
    content = noise(2_000_000, 7)
    repo = f"acme/part-{transfer}"
    API.create_repo(repo)
    API.upload_file(repo_id=repo, path_or_fileobj=content, path_in_repo="model.bin")
    with HfFileSystem().open(f"{repo}/model.bin", block_size=1000) as file:
        file.seek(1_234_567)
        assert file.read(100) == content[1_234_567:1_234_667]
    url = f"{API.endpoint}/{repo}/resolve/main/model.bin"
    for wanted, part in {"5-9": content[5:10], "-7": content[-7:], "1999990-": content[-10:]}.items():
        answer = httpx.get(url, headers={"Range": f"bytes={wanted}"}, follow_redirects=True)
        assert (answer.status_code, answer.content) == (206, part)
    assert httpx.get(url, headers={"Range": "bytes=2000000-"}, follow_redirects=True).status_code == 416
    # With a proper prefix of the bytes only, the client must not believe that it has the file.
    assert Path(hf_hub_download(repo, "model.bin", cache_dir=tmp_path)).read_bytes() == content


# Models


def test_a_sharded_checkpoint_in_a_subfolder_loads_as_it_was(transfer, tiny_teacher, tmp_path):
    repo = f"acme/whisper-{transfer}"
    model = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(tiny_teacher))  # random weights, new ones
    model.save_pretrained(tmp_path / "init", max_shard_size="200KB")
    WhisperProcessor.from_pretrained(tiny_teacher).save_pretrained(tmp_path / "init")
    assert len([*(tmp_path / "init").glob("model-*.safetensors")]) > 1
    API.create_repo(repo, private=True)
    API.upload_folder(repo_id=repo, folder_path=tmp_path / "init", path_in_repo="init")
    pulled = WhisperForConditionalGeneration.from_pretrained(repo, subfolder="init", cache_dir=tmp_path / "cache")
    assert pulled.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(pulled.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    processor = WhisperProcessor.from_pretrained(repo, subfolder="init", cache_dir=tmp_path / "cache")
    assert processor.tokenizer.decode(processor.tokenizer.encode("今日は。"), skip_special_tokens=True) == "今日は。"


def test_a_card_gets_results_and_a_wrong_one_is_refused(hub):
    API.create_repo("acme/card")
    metadata = {"language": "ja", "license": "apache-2.0", "base_model": "openai/whisper-base", "tags": ["audio"]}
    ModelCard(f"---\n{json.dumps(metadata)}\n---\n# A card\n").push_to_hub("acme/card")
    result = {
        "task": {"type": "automatic-speech-recognition"},
        "dataset": {"type": "acme/speech", "name": "Speech"},
        "metrics": [{"type": "cer", "value": 12.3}],
    }
    metadata_update("acme/card", {"model-index": [{"name": "card", "results": [result]}]})
    assert ModelCard.load("acme/card", ignore_metadata_errors=False).data.eval_results[0].metric_value == 12.3
    wrong = {
        "base_model": "/data/whisper-base",
        "license": "no-such-license",
        "language": "Japanese",
        "model-index": [{"name": "card", "results": [{**result, "dataset": {"name": "Speech"}}]}],
    }
    for key, value in wrong.items():
        text = f"---\n{json.dumps({**metadata, key: value})}\n---\n"
        with pytest.raises(ValueError, match=key):
            API.upload_file(repo_id="acme/card", path_or_fileobj=text.encode(), path_in_repo="README.md")


# Who may do what


def test_a_private_repository_is_not_there_for_others(hub, tiny_teacher, tmp_path):
    speech(1).push_to_hub("acme/secret", private=True)
    API.create_repo("acme/secret", private=True)
    API.upload_folder(repo_id="acme/secret", folder_path=tiny_teacher)
    for token in (False, "hf_read"):
        with pytest.raises(DatasetNotFoundError):
            load_dataset("acme/secret", token=token, cache_dir=str(tmp_path))
        with pytest.raises(OSError, match="acme/secret"):
            WhisperForConditionalGeneration.from_pretrained("acme/secret", token=token, cache_dir=tmp_path)
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("acme/secret", token=token, cache_dir=tmp_path)
        with pytest.raises(RepositoryNotFoundError):
            API.auth_check("acme/secret", token=token)
        assert not API.repo_exists("acme/secret", token=token)
        assert "acme/secret" not in [model.id for model in API.list_models(author="acme", token=token)]
    assert "acme/secret" in [model.id for model in API.list_models(author="acme")]
    API.auth_check("acme/secret", write=True)
    API.update_repo_settings("acme/secret", private=False)
    assert API.repo_exists("acme/secret", token=False)


def test_a_reader_may_read_and_not_write(hub, tmp_path):
    API.create_repo("acme/public", exist_ok=True)
    source = folder(tmp_path, {"config.json": b"{}"})
    calls = (
        lambda: API.create_repo("bob/mine", token="hf_read"),
        lambda: API.upload_folder(repo_id="acme/public", folder_path=source, token="hf_read"),
        lambda: API.delete_repo("acme/public", token="hf_read"),
        lambda: API.auth_check("acme/public", token="hf_read", write=True),
    )
    for call in calls:
        with pytest.raises(HfHubHTTPError) as refused:
            call()
        assert refused.value.response.status_code == 403
    assert API.repo_info("acme/public", token="hf_read").id == "acme/public"
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        API.whoami(token="hf_wrong")


def test_the_content_store_wants_a_token(hub):
    for method, path in (
        ("POST", "xorbs/default/" + "0" * 64),
        ("POST", "shards"),
        ("GET", "reconstructions/" + "0" * 64),
    ):
        assert httpx.request(method, f"{hub.url}/cas/v1/{path}").status_code == 401


# Repositories and their history


def test_repositories_branches_and_tags_come_and_go(hub):
    API.create_repo("alice/notes")
    API.create_repo("alice/notes", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        API.create_repo("alice/notes")
    API.upload_file(repo_id="alice/notes", path_or_fileobj=b"one", path_in_repo="note.txt")
    API.create_tag("alice/notes", tag="v1")
    API.create_branch("alice/notes", branch="draft")
    API.upload_file(repo_id="alice/notes", path_or_fileobj=b"two", path_in_repo="note.txt", revision="draft")
    read = {
        name: Path(hf_hub_download("alice/notes", "note.txt", revision=name)).read_text() for name in ("v1", "draft")
    }
    assert read == {"v1": "one", "draft": "two"}
    assert [tag.name for tag in API.list_repo_refs("alice/notes").tags] == ["v1"]
    with pytest.raises(RevisionNotFoundError):
        API.upload_file(repo_id="alice/notes", path_or_fileobj=b"three", path_in_repo="note.txt", revision="v1")
    API.delete_tag("alice/notes", tag="v1")
    API.delete_branch("alice/notes", branch="draft")
    assert not API.file_exists("alice/notes", "note.txt", revision="draft")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("alice/notes", "note.txt", revision="draft", force_download=True)
    API.delete_repo("alice/notes")
    assert not API.repo_exists("alice/notes")


def test_only_one_of_two_commits_on_the_same_parent_succeeds(hub):
    API.create_repo("acme/race")
    parent = API.repo_info("acme/race").sha

    def commit(name: str) -> int:
        try:
            API.create_commit("acme/race", [CommitOperationAdd(name, b"x")], commit_message=name, parent_commit=parent)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(commit, ["a", "b"])) == [200, 412]


def test_a_pattern_pulls_only_what_it_names(hub, tmp_path):
    API.create_repo("acme/patterns")
    API.upload_folder(
        repo_id="acme/patterns",
        folder_path=folder(tmp_path / "up", {"a/x.json": b"{}", "a/y.txt": b"y", "b/x.json": b"[]"}),
    )
    pulled = Path(snapshot_download("acme/patterns", allow_patterns="a/*.json", cache_dir=tmp_path / "cache"))
    assert [path.name for path in pulled.rglob("*") if path.is_file()] == ["x.json"]
    assert (pulled / "a" / "x.json").exists()


# Faults


@pytest.mark.parametrize("status", [409, 412, 429, 500, 503])
def test_a_fault_is_answered_as_often_as_was_said(hub, status):
    API.create_repo("acme/faults", exist_ok=True)
    fault = hub.fault(r"/api/models/acme/faults$", status=status, times=2, skip=1, headers={"Retry-After": "7"})
    url = f"{hub.url}/api/models/acme/faults"
    answers = [httpx.get(url) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, status, status, 200]
    assert [answer.headers.get("Retry-After") for answer in answers] == [None, "7", "7", None]
    assert fault.hits == 2
    assert [entry[2] for entry in hub.log if entry[1] == "/api/models/acme/faults"] == [200, status, status, 200]


@pytest.mark.parametrize("politely", [False, True])
def test_a_download_can_be_cut_short(hub, politely):
    API.create_repo("acme/cut", exist_ok=True)
    API.upload_file(repo_id="acme/cut", path_or_fileobj=b"a" * 5000, path_in_repo="text.txt")
    hub.fault("text.txt", method="GET", drop_after=1000, fin=politely)
    got = b""
    with (
        pytest.raises(httpx.TransportError),
        httpx.stream("GET", f"{hub.url}/acme/cut/resolve/main/text.txt") as answer,
    ):
        for block in answer.iter_bytes():
            got += block
    assert got == b"a" * 1000
    assert len(httpx.get(f"{hub.url}/acme/cut/resolve/main/text.txt").content) == 5000


def test_a_fault_can_be_slow(hub):
    hub.fault("whoami", delay=0.3)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{hub.url}/api/whoami-v2", timeout=0.1)
    assert API.whoami()["name"] == "alice"


# The command line, and a Hub that is started again


@pytest.mark.parametrize("xet", [True, False])
def test_the_hf_command_creates_uploads_and_downloads(hub, tmp_path, xet):
    name = f"cli-{'xet' if xet else 'lfs'}"
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "0" if xet else "1", "HF_HOME": str(tmp_path / "home")}

    def hf(*arguments: str) -> str:
        done = subprocess.run(
            [HF, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    source = folder(tmp_path / "up", {"ja/train.parquet": noise(100_000, 77), "README.md": CARD})
    assert "alice" in hf("auth", "whoami")
    hf("repos", "create", f"acme/{name}", "--type", "dataset", "--private")
    assert API.dataset_info(f"acme/{name}").private
    hf("upload", f"acme/{name}", str(source), ".", "--type", "dataset")
    hf("download", f"acme/{name}", "--type", "dataset", "--local-dir", str(tmp_path / "down"))
    assert (tmp_path / "down/ja/train.parquet").read_bytes() == noise(100_000, 77)
    assert (tmp_path / "down/README.md").read_bytes() == CARD
    assert sent(hub, "/cas/v1/shards" if xet else "/lfs/") == 1


def test_a_hub_started_again_on_its_directory_and_port_has_what_it_had(tmp_path):
    tokens = {"hf_again": User("carol")}
    with HubServer(tmp_path / "hub", tokens) as first:
        api = HfApi(endpoint=first.url, token="hf_again")
        api.create_repo("carol/kept", private=True)
        api.upload_file(repo_id="carol/kept", path_or_fileobj=noise(50_000, 3), path_in_repo="model.bin")
    with HubServer(tmp_path / "hub", tokens, port=int(first.url.rsplit(":", 1)[1])) as second:
        assert second.url == first.url
        path = api.hf_hub_download("carol/kept", "model.bin", cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == noise(50_000, 3)
        assert second.log and not [entry for entry in second.log if entry[2] >= 500]


def test_the_hub_can_be_started_by_hand(tmp_path):
    command = [sys.executable, "-m", "tests.sandbox.hub", tmp_path, "--user", "hf_dora=dora,acme"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        account = HfApi(endpoint=process.stdout.readline().strip(), token="hf_dora").whoami()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    assert (account["name"], [org["name"] for org in account["orgs"]]) == ("dora", ["acme"])
