"""The whole job on this machine: Japanese speech in, a distilled Whisper and its error rates out.

    make demo                        through a Hub on this machine
    make demo DEMO_ARGS=--local      through local directories, without any Hub
    make demo DEMO_ARGS="--teacher openai/whisper-small"
    make demo DEMO_ARGS="--clips 100 --directory demo/small"

Builds a small Japanese corpus and whisper-base, serves the corpus as ReazonSpeech's host does, starts a Hub, and runs
kotoba_whisper_training_v1.0.sh in that world. What is there from an earlier run is used again.
"""

import argparse
import csv
import itertools
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tests.sandbox.base_teacher import whisper_base
from tests.sandbox.corpus import build_corpus, cache_directory
from tests.sandbox.hub import HubServer, User
from tests.sandbox.mirror import MirrorServer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kotoba_whisper_training_v1.0.sh"
HELD_OUT = 30  # clips
TOKEN, ORGANISATION = "hf_demo", "demo"

# What differs from v1.0: the sizes, a filter that keeps enough of so few clips, and no prompts from strangers.
SETTINGS = {
    "TARGET": "tiny",
    "DOWNLOADS": "tiny test",
    "DATASET_NAME": "reazonspeech-whisper-base",
    "MODEL_NAME": "kotoba-whisper-demo",
    "POOL": "2",
    "DATALOADER_WORKERS": "1",
    "LABEL_BATCH": "16",
    "SHARD_SIZE": "100",
    "CER_THRESHOLD": "20",
    "TIMESTAMP_PROBABILITY": "0",
    "CONDITION_ON_PREV_PROBABILITY": "0",
    "EPOCHS": "10",
    "TRAIN_BATCH": "8",
    "GRADIENT_ACCUMULATION": "1",
    "WARMUP_STEPS": "10",
    "SAVE_STEPS": "100",
    "LOGGING_STEPS": "10",
    "REPORT_TO": "none",
    "EVAL_DATASETS": str(ROOT / "reazonspeech_manual_dataloader.py"),
    "EVAL_CONFIG": "test",
    "EVAL_BATCH": "16",
    "EVAL_ARGS": "--generation_max_length 96",
    "ACCELERATE_ARGS": "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "
    f"--num_cpu_threads_per_process {os.cpu_count()}",
}


def environment(directory: Path, teacher: str, mirror: str, hub: str | None, token: str, organisation: str) -> dict:
    """Environment of a run of the shell script whose every file and server is this sandbox's.

    Args:
        directory: where all that the run writes goes, the Hugging Face cache included.
        teacher: path or Hub id.
        mirror: base URL of the corpus.
        hub: URL of the Hub, or None to hand over through local directories.
        token, organisation: who pushes, and where to.
    """
    foreign = ("HF_", "HUGGING", "REAZONSPEECH_", "ACCELERATE_", "WANDB_")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HF_HOME": str(directory / "huggingface"),
        "HF_ORG": organisation if hub else "",
        **({"HF_ENDPOINT": hub, "HF_TOKEN": token} if hub else {}),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "REAZONSPEECH_BASE_URL": mirror,
        "REAZONSPEECH_DATA_DIR": str(directory / "downloads"),
        "TEACHER": teacher,
        "WORK_DIR": str(directory),
    }


def kept_port(file: Path) -> int:
    """The port of the last run, so that the clients' caches and the printed addresses stay valid; 0 at first."""
    return int(file.read_text()) if file.is_file() else 0


def start_hub(directory: Path) -> HubServer:
    """A Hub that still has what earlier runs pushed."""
    directory.mkdir(parents=True, exist_ok=True)
    port, tokens = directory / "port", {TOKEN: User(ORGANISATION)}
    try:
        hub = HubServer(directory, tokens=tokens, port=kept_port(port))
    except OSError:  # somebody else has that port now
        hub = HubServer(directory, tokens=tokens)
    port.write_text(str(hub.server_address[1]))
    return hub.start()


def print_transcripts(evaluation: Path, number: int = 10) -> None:
    """What the student heard in the first clips, beside what was said; nothing where it was not evaluated."""
    for predictions in evaluation.glob("all_predictions.*.csv"):
        say(f"what {evaluation.parent.name} hears in the first {number} clips")
        with open(predictions, encoding="utf-8", newline="") as file:
            for row in itertools.islice(csv.DictReader(file), number):
                print(f"said:  {row['reference']}\nheard: {row['hypothesis']}\n")


def native_precision() -> str:
    """The precision that the scripts choose on this CPU."""
    import torch  # slow to import, and so is what follows

    from run_pseudo_labelling import choose_dtype

    return choose_dtype(None, torch.device("cpu"))


def say(text: str) -> None:
    print(f"\n==== {text}", flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--directory", type=Path, default=ROOT / "demo", help="where everything goes")
    parser.add_argument("--clips", type=int, help="how many to train on (default: 600 in bfloat16, else 200)")
    parser.add_argument("--local", action="store_true", help="hand over through local directories, without a Hub")
    parser.add_argument("--teacher", help="Hub id or path of a Whisper (default: the sandbox's own whisper-base)")
    args = parser.parse_args(argv)
    began = time.monotonic()
    directory = args.directory.expanduser().absolute() / ("local" if args.local else "hub")
    directory.mkdir(parents=True, exist_ok=True)

    dtype = os.environ.get("DTYPE") or native_precision()
    if args.clips is None:
        args.clips = 600 if dtype == "bfloat16" else 200  # a CPU that computes in it natively is over twice as fast
    say(f"speak {args.clips + HELD_OUT} Japanese sentences into a small ReazonSpeech")
    corpus = build_corpus(cache_directory() / f"corpus-demo-{args.clips}", {"000": args.clips, "fff": HELD_OUT})
    print(corpus)
    if args.teacher is None:
        say("fetch and convert openai/whisper-base")
        args.teacher = str(whisper_base(cache_directory() / "whisper-base"))
        print(args.teacher)

    with ExitStack() as world:
        mirror = world.enter_context(MirrorServer(corpus))
        hub = None
        if not args.local:
            hub = start_hub(directory / "hub-server")
            world.callback(hub.stop)
        settings = environment(directory, args.teacher, mirror.url, hub and hub.url, TOKEN, ORGANISATION)
        # A value from the command line (EPOCHS=2 make demo) is worth more than the demo's own.
        chosen = {"DTYPE": dtype, "TRAIN_ARGS": f"--cache_encoder_outputs {directory / 'encoder-outputs'}"}
        settings |= {name: os.environ.get(name, value) for name, value in (SETTINGS | chosen).items()}
        status = subprocess.run(["bash", str(SCRIPT)], env=settings, cwd=directory).returncode
        if status:
            print(f"\nThe run stopped with exit status {status}; the same command continues it.", file=sys.stderr)
            return status

    print_transcripts(directory / "eval" / settings["MODEL_NAME"] / Path(settings["EVAL_DATASETS"]).stem)
    say(f"done in {time.monotonic() - began:.0f} s")
    print(f"datasets, student and evaluations: {directory}")
    if hub:
        repositories = sorted((directory / "hub-server" / "repos").glob(f"*/{ORGANISATION}/*.json"))
        print(f"on the Hub ({hub.url}): " + ", ".join(f"{ORGANISATION}/{path.stem}" for path in repositories))
    return 0


if __name__ == "__main__":
    sys.exit(main())
