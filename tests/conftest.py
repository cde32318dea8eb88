"""The world that the tests run in: a Hub, a mirror, a corpus and tiny teachers, all on this machine.

The Hub clients read `HF_*` when they are first imported, so the Hub starts here, before any of them is.
"""

import os
import signal
import sys
import tempfile

# A shell's background job ignores Ctrl-C, and so would every script that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Of several that run tests each has cores of its own: threads that wait for each other on a shared one hardly go on.
if "PYTEST_XDIST_WORKER" in os.environ:
    number, workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % len(cores) :: workers])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for two, whose number changes the last bits

assert not {"huggingface_hub", "datasets", "transformers"} & set(sys.modules), "a Hub client was imported too early"

from tests.sandbox.hub import HubServer, User  # noqa: E402

WORLD = tempfile.TemporaryDirectory(prefix="kotoba-tests-")
HUB = HubServer(
    os.path.join(WORLD.name, "hub"),
    tokens={"hf_write": User("alice", orgs=("acme",)), "hf_read": User("bob", role="read")},
).start()
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "REAZONSPEECH_", "ACCELERATE_"))]:
    del os.environ[name]
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_HOME=os.path.join(WORLD.name, "hf"),
    HF_TOKEN="hf_write",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_XET_CLIENT_RETRY_BASE_DELAY="50ms",
    HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="3",
    NO_PROXY="127.0.0.1,localhost",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
    WANDB_DIR=WORLD.name,
    MPLBACKEND="agg",
)

import csv  # noqa: E402
import tarfile  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

import reazonspeech_manual_dataloader as loader  # noqa: E402
from tests.sandbox.corpus import build_corpus, cache_directory  # noqa: E402
from tests.sandbox.mirror import MirrorServer  # noqa: E402
from tests.sandbox.teachers import cached_whisper  # noqa: E402


def forget_processes() -> None:
    """accelerate keeps its first settings for the life of a process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def fresh_process():
    """What a script's `main` sets for its whole process is taken back."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP)
    }
    threads = torch.get_num_threads()
    sys.modules[loader.__name__] = loader  # a stage that was given its path has put another copy there
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    forget_processes()


@pytest.fixture
def hub():
    """The Hub, without faults; what earlier tests pushed is still there, so use names of your own."""
    HUB.faults.clear()
    HUB.log.clear()
    yield HUB
    HUB.faults.clear()


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Root of a small mirror: `tsv/*.tsv`, `data/000.tar` with 24 clips and `data/fff.tar` with 8."""
    return build_corpus(cache_directory() / "corpus-test", {"000": 24, "fff": 8})


@pytest.fixture
def mirror(corpus):
    with MirrorServer(corpus) as server:
        yield server


@pytest.fixture(scope="session")
def clips(corpus) -> list[dict]:
    """The clips of `000.tar` in the order of the tar: `name`, `audio` (FLAC bytes), `transcription`."""
    with open(corpus / "tsv" / "tiny.tsv", encoding="utf-8", newline="") as file:
        texts = dict(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    with tarfile.open(corpus / "data" / "000.tar") as tar:
        members = [
            (member.name.removeprefix("./"), tar.extractfile(member).read()) for member in tar if member.isfile()
        ]
    return [{"name": name, "audio": audio, "transcription": texts[name]} for name, audio in members if name in texts]


@pytest.fixture(scope="session")
def loaded(clips, tmp_path_factory) -> Path:
    """The clips as the local dataset directory that the data loader writes: config `tiny`, split `train`."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Audio, Features, Value

    features = Features(
        {
            "name": Value("string"),
            "audio": Audio(sampling_rate=16000, decode=False),
            "transcription": Value("string"),
        }
    )
    rows = [{**clip, "audio": {"bytes": clip["audio"], "path": clip["name"]}} for clip in clips]
    root = tmp_path_factory.mktemp("loaded") / "reazonspeech"
    (root / "tiny").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), root / "tiny" / "train-00000-of-00001.parquet")
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: tiny\n  data_files:\n  - split: train\n    path: tiny/train-*\n---\n"
    )
    return root


@pytest.fixture(scope="session")
def tiny_teacher() -> Path:
    """A random Whisper of a few hundred kB with large-v3's special tokens and 128 mel bins."""
    return cached_whisper("tiny-whisper-v3", arrangement="large-v3")


@pytest.fixture(scope="session")
def tiny_teacher_v2() -> Path:
    """The same with large-v2's special tokens (one language fewer) and 80 mel bins."""
    return cached_whisper("tiny-whisper-v2", arrangement="large-v2")
