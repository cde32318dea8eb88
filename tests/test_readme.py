"""The README's commands, run as they are printed, one after the other, in the sandbox."""

import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from huggingface_hub import HfApi
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from tests.sandbox.demo import ROOT, environment
from tests.sandbox.hub import User
from tests.sandbox.mirror import MirrorServer
from tests.sandbox.teachers import cached_whisper

NAMES = {"{your-hf-org}": "acme", "{your-dataset-name}": "readme-labels", "{your-model-name}": "readme-model"}
# These change the machine, ask questions, or are the whole chain, which test_chain.py runs.
NOT_HERE = ("make demo", "git clone", "accelerate config", "HF_ORG=")


def blocks() -> list[str]:
    """The README's shell commands, and its Python for a shell to run, block by block."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.M | re.S)
    return [block if kind == "bash" else f"python - <<'END'\n{block}END\n" for kind, block in found]


@pytest.fixture(scope="module")
def teacher() -> Path:
    """Of large-v3's depth, because the README initialises a student with its 32 encoder layers."""
    return cached_whisper("tiny-whisper-32-layers", layers=32)


@pytest.fixture(scope="module")
def agreeing_corpus(corpus, clips, teacher, tmp_path_factory) -> Path:
    """A few clips with the teacher's own words as transcriptions, so that some pass the README's WER of 10 %.

    The tars 001 to 031 are there too, with one clip each.
    """
    root = tmp_path_factory.mktemp("mirror") / "corpus"
    shutil.copytree(corpus, root)
    write_tar(root / "data" / "000.tar", clips[:8])
    for index in range(1, 50):
        write_tar(root / "data" / f"{index:03x}.tar", clips[:1])
    processor = WhisperProcessor.from_pretrained(teacher)
    model = WhisperForConditionalGeneration.from_pretrained(teacher).eval()
    waveforms = [soundfile.read(io.BytesIO(clip["audio"]))[0] for clip in clips[:8]]
    features = processor.feature_extractor(waveforms, sampling_rate=16_000, return_tensors="pt")
    options = {"language": "ja", "task": "transcribe", "return_timestamps": True, "max_new_tokens": 100}
    with torch.inference_mode():
        labels = model.generate(features.input_features, force_unique_generate_call=True, **options)
    texts = processor.tokenizer.batch_decode(labels, skip_special_tokens=True)
    lines = [f"{clip['name']}\t{text}\n" for clip, text in zip(clips, texts, strict=False)]
    (root / "tsv" / "tiny.tsv").write_text("".join(lines), encoding="utf-8")
    return root


def write_folder(directory: Path, corpus: Path, clips: list[dict]) -> None:
    """An audio folder with the clips and transcriptions of `tiny`."""
    directory.mkdir()
    lines = ["file_name,transcription"]
    for row in (corpus / "tsv" / "tiny.tsv").read_text(encoding="utf-8").splitlines():
        name, text = row.split("\t")
        content = next(clip["audio"] for clip in clips if clip["name"] == name)
        (directory / Path(name).name).write_bytes(content)
        lines.append(f'{Path(name).name},"{text.replace(chr(34), 2 * chr(34))}"')
    (directory / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_tar(path: Path, clips: list[dict]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for clip in clips:
            member = tarfile.TarInfo(clip["name"])
            member.size = len(clip["audio"])
            tar.addfile(member, io.BytesIO(clip["audio"]))


@pytest.fixture(scope="module")
def published(teacher, clips) -> None:
    """What the README takes from others' repositories: the teacher, and the held-out test set."""
    from tests.conftest import HUB

    HUB.tokens |= {"hf_openai": User("openai"), "hf_asahi": User("asahi417")}
    api = HfApi(token="hf_openai")
    api.create_repo("openai/whisper-large-v3", exist_ok=True)
    api.upload_folder(repo_id="openai/whisper-large-v3", folder_path=teacher, ignore_patterns=[".*"])
    rows = [
        {"audio": {"bytes": clip["audio"], "path": clip["name"]}, "transcription": clip["transcription"]}
        for clip in clips[:6]
    ]
    test_set = Dataset.from_list(rows).cast_column("audio", Audio(sampling_rate=16000, decode=False))
    test_set.push_to_hub("asahi417/ja_asr.reazonspeech_test", split="test", token="hf_asahi")


def test_every_command_in_the_readme_runs_as_printed(agreeing_corpus, published, clips, tmp_path):
    from tests.conftest import HUB

    wanted = [block for block in blocks() if not block.startswith(NOT_HERE)]
    script = ["set -e"]
    for block in wanted:
        for name, value in NAMES.items():
            block = block.replace(name, value)
        first = block.splitlines()[0]
        script.append(f"echo '#### {first}' >&2\n{block}")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "clip.flac").write_bytes(clips[0]["audio"])
    lines = [f"{Path(clip['name']).name},{clip['transcription']}" for clip in clips[:6]]
    (tmp_path / "engine.csv").write_text("\n".join(["id,hypothesis", *lines]), encoding="utf-8")
    for name in ("my-audio", "my-test-audio"):
        write_folder(tmp_path / name, agreeing_corpus, clips)
    with MirrorServer(agreeing_corpus) as mirror:
        env = environment(tmp_path, "", mirror.url, HUB.url, "hf_write", "acme")
        env |= {"ACCELERATE_USE_CPU": "1", "WANDB_MODE": "offline"}
        run = subprocess.run(
            ["bash", "-c", "\n".join(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200
        )
    assert run.returncode == 0, run.stderr[-6000:]
    files = set(HfApi().list_repo_files("acme/readme-model"))
    assert {"model.safetensors", "README.md", "create_student_model.py", "run_distillation.py"} <= files
    assert (tmp_path / "eval" / "report.test.html").is_file()
    assert (tmp_path / "models" / "student" / "model.safetensors").is_file()
    assert (tmp_path / "eval" / "own" / "report.train.html").is_file()
    assert (tmp_path / "eval" / "metric.test.windows_30.json").is_file()
    assert json.loads((tmp_path / "eval" / "engine" / "metric.test.json").read_text())["cer"] == 0
    assert (tmp_path / "eval" / "comparison.html").is_file()
    assert (tmp_path / "models" / "student-faster-whisper" / "model.bin").is_file()


def test_the_readme_names_every_script():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]}
    assert len(scripts) == 8
    assert not {name for name in scripts if name not in text}


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.*)$", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "tests/README.md", "tests/benchmarks/README.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
