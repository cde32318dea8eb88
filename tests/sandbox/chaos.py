"""Run the whole chain to its end through kills and faults, and compare with a run that nothing disturbed.

    make chaos                                   50 disturbances, about half an hour
    make chaos CHAOS_ARGS="--disturbances 10 --seed 7"

Each disturbance hits one stage of kotoba_whisper_training_v1.0.sh, at a moment drawn from the time that it took
when left alone: kill -9 or SIGTERM for all its processes, or the mirror or the Hub failing for a few requests or
for the rest of that run. Then the same command is run again. In the end every dataset, weight, prediction and score
must equal the undisturbed run's, on the disk and on the Hub, and no file may lie about that the other run has not.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.sandbox.corpus import build_corpus, cache_directory
from tests.sandbox.demo import SCRIPT, SETTINGS, environment
from tests.sandbox.hub import HubServer, User
from tests.sandbox.mirror import MirrorServer
from tests.sandbox.teachers import cached_whisper

ORGANISATION, TOKEN = "acme", "hf_write"
STAGES = ("download", "label", "filter", "initialise", "distil", "evaluate")
STATUSES = (401, 403, 409, 412, 429, 500, 503)
# A random teacher's labels have nothing to do with the transcriptions, so the filter has to let them all through.
SMALL = {
    "CER_THRESHOLD": "",
    "WER_THRESHOLD": "100000",
    "DATASET_NAME": "chain",
    "MODEL_NAME": "chain-student",
    "SHARD_SIZE": "8",
    "LABEL_BATCH": "4",
    "TIMESTAMP_PROBABILITY": "0.5",
    "CONDITION_ON_PREV_PROBABILITY": "0.5",
    "EPOCHS": "1",
    "TRAIN_BATCH": "4",
    "SAVE_STEPS": "2",
    "EVAL_MODELS": "init student",
    "WORKERS": "2",
}
DATASETS = ("chain", "chain.wer_100000.0", "chain.wer_100000.0.vectorized")
MODELS = ("chain-student-init", "chain-student")
EXACT = (".parquet", ".safetensors", ".tar", ".tsv", ".csv")  # files whose bytes must be the same; others hold times
SCORES = ("cer", "wer", "cer_raw", "wer_raw", "clips", "runaways")


@dataclass
class World:
    """A run's directory and servers; `hub` None hands over through local directories."""

    directory: Path
    teacher: Path
    mirror: MirrorServer
    hub: HubServer | None
    groups: list[int] = field(default_factory=list)  # of the processes of each run

    def start(self, output: Path, **settings: str) -> subprocess.Popen:
        """The shell script, leader of its own process group, with what it prints in a file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        url = self.hub and self.hub.url
        env = environment(self.directory, str(self.teacher), self.mirror.url, url, TOKEN, ORGANISATION)
        env |= SETTINGS | SMALL | settings
        with open(output, "wb") as file:
            process = subprocess.Popen(
                ["bash", str(SCRIPT)],
                env=env,
                cwd=self.directory,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.groups.append(process.pid)
        return process


@dataclass
class Disturbance:
    """What happens to one run, `after` seconds into a stage."""

    stage: str
    kind: str  # "SIGKILL", "SIGTERM", or what the servers do: a status, "reset", "lost reply"
    times: int  # requests that fail; -1 for all of the run's
    after: float

    def __str__(self) -> str:
        many = "" if self.kind.startswith("SIG") else " for ever" if self.times < 0 else f", {self.times} times"
        return f"{self.stage} + {self.after:.1f} s: {self.kind}{many}"

    def break_servers(self, world: World) -> None:
        fault = {"status": int(self.kind)} if self.kind.isdigit() else {}
        mirror_fault = fault or {"cut_after": 1000}
        world.mirror.fault("", times=self.times, method="GET|HEAD", **mirror_fault)
        if world.hub:
            hub_fault = fault or ({"lose_reply": True} if self.kind == "lost reply" else {"drop_after": 100})
            world.hub.fault("", times=self.times, **hub_fault)


def draw(number: int, seconds: dict[str, float], chance: random.Random) -> list[Disturbance]:
    """Disturbances in the order of the stages, as many for each, so that each finds work to disturb."""
    drawn = []
    for index in range(number):
        stage = STAGES[index * len(STAGES) // number]
        kinds = ["SIGKILL"] * 6 + ["SIGTERM"] * 4
        if stage != "evaluate":  # which asks the Hub for the model alone
            kinds += [*map(str, STATUSES), "reset", "lost reply"]
        drawn.append(
            Disturbance(stage, chance.choice(kinds), chance.choice((1, 2, -1)), chance.uniform(0, seconds[stage]))
        )
    return drawn


def stage_of(output: Path) -> str:
    """The stage that a run is in, by the headings that it printed; "" before the first."""
    headings = re.findall(r"(?m)^==== (\w+)", output.read_text(encoding="utf-8", errors="replace"))
    return headings[-1] if headings else ""


def time_stages(process: subprocess.Popen, output: Path) -> dict[str, float]:
    """Wait for a run's end; seconds of each of its stages."""
    seconds: dict[str, float] = Counter()
    last = time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        seconds[stage_of(output)] += time.monotonic() - last
        last = time.monotonic()
    return seconds


def disturb(world: World, disturbance: Disturbance, output: Path, **settings: str) -> int:
    """One run with its disturbance; its exit status, negative when a signal ended the script.

    A run that outlives it is stopped as the next stage begins, so that this finds all its work to do.
    """
    process = world.start(output, **settings)
    while process.poll() is None and stage_of(output) != disturbance.stage:
        time.sleep(0.05)
    deadline = time.monotonic() + disturbance.after
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is None:
        if disturbance.kind.startswith("SIG"):
            os.killpg(process.pid, signal.Signals[disturbance.kind])
        else:
            disturbance.break_servers(world)
    later = {*STAGES[STAGES.index(disturbance.stage) + 1 :], "results"}
    while process.poll() is None:
        if stage_of(output) in later:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        time.sleep(0.05)
    world.mirror.faults.clear()
    if world.hub:
        world.hub.faults.clear()
    return process.returncode


@dataclass
class Results:
    """What a finished run left: files with digests (None: not compared), on the disk and the Hub; scores."""

    files: dict[str, str | None]
    hub: dict[str, str | None]
    scores: dict[str, dict]

    def differences(self, other: "Results") -> list[str]:
        found = []
        for mine, its in ((self.files, other.files), (self.hub, other.hub), (self.scores, other.scores)):
            found += [f"only one run has {name}" for name in sorted(mine.keys() ^ its.keys())]
            found += [f"{name} differs" for name in sorted(mine.keys() & its.keys()) if mine[name] != its[name]]
        return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_results(world: World) -> Results:
    """All under the directory but the Hugging Face cache, which is the clients' own, and logs of trackers."""
    directory, files, scores = world.directory, {}, {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not path.is_file() or re.search(r"^huggingface/|(^|/)(wandb|runs|logs|\.cache)/", name):
            continue
        name = re.sub(r"/[0-9a-f]{16}-", "/key-", name)  # predictions are kept under a key of the model's place, too
        files[name] = digest(path) if path.suffix in EXACT else None
        if path.name.startswith("metric."):
            saved = json.loads(path.read_text(encoding="utf-8"))
            scores[name] = {key: saved[key] for key in SCORES}
    hub = {}
    if world.hub:
        for kind in ("dataset", "model"):
            for repo_id, repo in world.hub.store.list_repos(kind):
                if repo_id.partition("/")[2] in (*DATASETS, *MODELS):
                    commit = repo["commits"][repo["refs"]["main"]]
                    for name, entry in commit["files"].items():
                        exact = name.endswith(EXACT)
                        hub[f"{repo_id}/{name}"] = entry["sha256"] if exact else None
        assert hub, "nothing was pushed"
    return Results(files, hub, scores)


@dataclass
class Chaos:
    """A run through disturbances: what happened, and what was wrong with how it was told."""

    log: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    happened: Counter = field(default_factory=Counter)
    status: int = 0
    last_output: str = ""
    survivors: list[int] = field(default_factory=list)  # process groups of runs that did not end with them


def run_disturbed(world: World, disturbances: list[Disturbance], outputs: Path, **settings: str) -> Chaos:
    """Disturb one run after another, then let the last one end."""
    chaos = Chaos()
    for number, disturbance in enumerate(disturbances):
        output = outputs / f"{world.directory.name}-{number:03d}.log"
        began = time.monotonic()
        status = disturb(world, disturbance, output, **settings)
        chaos.happened[f"{disturbance.stage}, {re.sub(r'^[0-9]+$', 'status', disturbance.kind)}"] += 1
        chaos.log.append(f"{number + 1:3d}. {disturbance} -> exit {status} after {time.monotonic() - began:.0f} s")
        print(chaos.log[-1], flush=True)
        text = output.read_text(encoding="utf-8", errors="replace")
        if "Traceback (most recent call last)" in text and disturbance.kind != "SIGKILL":
            chaos.tracebacks.append(f"{disturbance}: {output}\n{text[text.index('Traceback') :][-3000:]}")
    output = outputs / f"{world.directory.name}-end.log"
    chaos.status = world.start(output, **settings).wait()
    chaos.last_output = output.read_text(encoding="utf-8", errors="replace")
    for group in world.groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
            chaos.survivors.append(group)
    return chaos


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--disturbances", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), help="of what happens when")
    parser.add_argument("--directory", type=Path, help="kept directory for both runs (default: a temporary one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    print(f"seed {args.seed}", flush=True)
    corpus = build_corpus(cache_directory() / "corpus-test", {"000": 24, "fff": 8})
    teacher = cached_whisper("tiny-whisper-v3")
    with tempfile.TemporaryDirectory(prefix="kotoba-chaos-") as temporary:
        root = (args.directory or Path(temporary)).absolute()
        users = {TOKEN: User("alice", orgs=(ORGANISATION,))}
        results = []
        for name in ("quiet", "chaos"):
            with MirrorServer(corpus) as mirror, HubServer(root / f"{name}-hub", users) as hub:
                world = World(root / name, teacher, mirror, hub)
                if name == "quiet":
                    output = root / "quiet.log"
                    process = world.start(output)
                    seconds = time_stages(process, output)
                    if process.returncode:
                        print(output.read_text(encoding="utf-8"), file=sys.stderr)
                        return 1
                    print(f"undisturbed: {sum(seconds.values()):.0f} s", flush=True)
                else:
                    drawn = draw(args.disturbances, seconds, random.Random(args.seed))
                    chaos = run_disturbed(world, drawn, root)
                results.append(read_results(world))
    print("\n".join(f"{count:3d} x {what}" for what, count in sorted(chaos.happened.items())))
    for traceback in chaos.tracebacks:
        print(f"\na traceback where a line was due: {traceback}")
    if chaos.survivors:
        print(f"{len(chaos.survivors)} runs left processes behind")
    if chaos.status:
        print(f"{chaos.last_output[-5000:]}\nthe last run ended with exit status {chaos.status}")
        return 1
    differences = results[0].differences(results[1])
    print("\n".join(differences) or f"equal: {len(results[0].files)} files, {len(results[0].hub)} on the Hub")
    return 1 if differences or chaos.tracebacks or chaos.survivors else 0


if __name__ == "__main__":
    sys.exit(main())
