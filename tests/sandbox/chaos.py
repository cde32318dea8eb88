"""Run the whole chain to its end through kills and faults, and compare with a run that nothing disturbed.

    make chaos                                   50 disturbances, about half an hour
    make chaos CHAOS_ARGS="--disturbances 10 --seed 7"
    make chaos CHAOS_ARGS="--kinds damage"       50 of the other kinds

Each disturbance hits one stage of kotoba_whisper_training_v1.0.sh, at a moment drawn from the time that it took
when left alone. With `--kinds faults` it is kill -9 or SIGTERM for all its processes, or the mirror or the Hub failing
for a few requests or for the rest of that run. With `--kinds damage` it is a kill -9 after which a file that the stage
has written is cut short, emptied, filled with zeros, has a bit flipped or cannot be read; a full disk; a second run of
the same command; or a kill -9 for one of its workers. Then the same command is run again. Where it ends with a line
that names the damaged file, the file is put back, as its reader would do. In the end every dataset, weight, prediction
and score must equal the undisturbed run's, on the disk and on the Hub, and no file may lie about that the other run has
not.

A full disk is a tmpfs that is filled for the run, which takes the right to mount; files that cannot be read take
`setpriv` where root runs this. Without these, such kinds are not drawn.
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
from collections.abc import Sequence
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
DAMAGES = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "flipped bit": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
}
UNREADABLE, FULL_DISK, SECOND_RUN, KILLED_WORKER = "unreadable", "full disk", "second run", "killed worker"
DISK_SIZE = "2g"  # of the tmpfs that is filled for a full disk
UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # so that root, too, needs permissions
# Where each stage writes. What a host or somebody else's cache holds is not damaged.
WRITTEN = {
    "label": "chain/",
    "filter": "chain.wer_",
    "initialise": "chain-student-init/",
    "distil": "chain-student/",
    "evaluate": "eval/",
}
# A random teacher's labels have nothing to do with the transcriptions, so the filter has to let them all through.
SMALL = {
    "CER_THRESHOLD": "",
    "WER_THRESHOLD": "100000",
    "DATASET_NAME": "chain",
    "MODEL_NAME": "chain-student",
    "SHARD_SIZE": "8",
    "DTYPE": "float32",
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

    def start(self, output: Path, prefix: Sequence[str] = (), **settings: str) -> subprocess.Popen:
        """The shell script, leader of its own process group, with what it prints in a file.

        `prefix` are the words of a command that runs it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        url = self.hub and self.hub.url
        env = environment(self.directory, str(self.teacher), self.mirror.url, url, TOKEN, ORGANISATION)
        env |= SETTINGS | SMALL | settings
        with open(output, "wb") as file:
            process = subprocess.Popen(
                [*prefix, "bash", str(SCRIPT)],
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
    kind: str  # "SIGKILL", "SIGTERM", what the servers do (a status, "reset", "lost reply"), or one of `other_kinds`
    times: int  # requests that fail; -1 for all of the run's
    after: float
    choice: float = 0.0  # from 0 to 1: which of the files or workers is hit

    def __str__(self) -> str:
        is_fault = self.kind in (*map(str, STATUSES), "reset", "lost reply")
        many = "" if not is_fault else " for ever" if self.times < 0 else f", {self.times} times"
        return f"{self.stage} + {self.after:.1f} s: {self.kind}{many}"

    def break_servers(self, world: World) -> None:
        fault = {"status": int(self.kind)} if self.kind.isdigit() else {}
        mirror_fault = fault or {"cut_after": 1000}
        world.mirror.fault("", times=self.times, method="GET|HEAD", **mirror_fault)
        if world.hub:
            hub_fault = fault or ({"lose_reply": True} if self.kind == "lost reply" else {"drop_after": 100})
            world.hub.fault("", times=self.times, **hub_fault)


def fault_kinds(stage: str) -> list[str]:
    """Kills, and what the servers do."""
    kinds = ["SIGKILL"] * 6 + ["SIGTERM"] * 4
    if stage != "evaluate":  # which asks the Hub for the model alone
        kinds += [*map(str, STATUSES), "reset", "lost reply"]
    return kinds


def damage_kinds(directory: Path) -> list[str]:
    """What happens to files, disks and workers, as far as this machine can do it."""
    kinds = [*DAMAGES, *DAMAGES, SECOND_RUN, KILLED_WORKER]
    if os.geteuid() or subprocess.run([*UNPRIVILEGED, "true"], capture_output=True).returncode == 0:
        kinds.append(UNREADABLE)
    if os.path.ismount(directory):
        kinds.append(FULL_DISK)
    return kinds


def draw(
    number: int, seconds: dict[str, float], chance: random.Random, damages: Sequence[str] = ()
) -> list[Disturbance]:
    """Disturbances in the order of the stages, as many for each, so that each finds work to disturb.

    They are of these kinds, or else kills and faults of the servers.
    """
    stages = tuple(WRITTEN) if damages else STAGES
    drawn = []
    for index in range(number):
        stage = stages[index * len(stages) // number]
        kind = chance.choice(damages or fault_kinds(stage))
        times = chance.choice((1, 2, -1))
        drawn.append(Disturbance(stage, kind, times, chance.uniform(0, seconds[stage]), chance.random()))
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


def wait_for(process: subprocess.Popen, output: Path, disturbance: Disturbance) -> None:
    """Wait for the moment of a disturbance, or the end of the run if that comes first."""
    while process.poll() is None and stage_of(output) != disturbance.stage:
        time.sleep(0.05)
    deadline = time.monotonic() + disturbance.after
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def finish_stage(process: subprocess.Popen, output: Path, stage: str) -> int:
    """Wait for the end of a run, or stop it as the next stage begins, so that this finds all its work to do."""
    later = {*STAGES[STAGES.index(stage) + 1 :], "results"}
    while process.poll() is None:
        if stage_of(output) in later:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        time.sleep(0.05)
    return process.returncode


def disturb(world: World, disturbance: Disturbance, output: Path, **settings: str) -> int:
    """One run with its disturbance; its exit status, negative when a signal ended the script."""
    process = world.start(output, **settings)
    wait_for(process, output, disturbance)
    second = None
    if process.poll() is None:
        if disturbance.kind in (*DAMAGES, UNREADABLE):
            os.killpg(process.pid, signal.SIGKILL)
        elif disturbance.kind.startswith("SIG"):
            os.killpg(process.pid, signal.Signals[disturbance.kind])
        elif disturbance.kind == SECOND_RUN:
            second = world.start(output.with_suffix(".second.log"), **settings)
        elif disturbance.kind == KILLED_WORKER:
            kill_worker(process, disturbance)
        elif disturbance.kind == FULL_DISK:
            fill_disk(world)
        else:
            disturbance.break_servers(world)
    finish_stage(process, output, disturbance.stage)
    if second:
        finish_stage(second, output.with_suffix(".second.log"), disturbance.stage)
    (world.directory / BALLAST).unlink(missing_ok=True)
    world.mirror.faults.clear()
    if world.hub:
        world.hub.faults.clear()
    return process.returncode


# ---- damage ----------------------------------------------------------------------------------------------------------

BALLAST = ".ballast"


def fill_disk(world: World) -> None:
    """Leave no room on the world's disk, until `BALLAST` is removed."""
    with open(world.directory / BALLAST, "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()


def parents_of(group: int) -> dict[int, int]:
    """The processes of a group, each with its parent."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, parent, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group:
                found[int(stat.parent.name)] = int(parent)
    return found


def kill_worker(process: subprocess.Popen, disturbance: Disturbance) -> None:
    """Kill -9 for one process of a run that has no children and is not the script itself."""
    parents = parents_of(process.pid)
    workers = sorted(parents.keys() - set(parents.values()) - {process.pid})
    if workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[int(disturbance.choice * len(workers))], signal.SIGKILL)


def damage(world: World, disturbance: Disturbance) -> tuple[Path, bytes] | None:
    """Damage one of the files that a stage has left; the file and what it was, or None where there is none."""
    files = []
    for path in sorted(world.directory.rglob("*")):
        name = path.relative_to(world.directory).as_posix()
        is_written = name.startswith(WRITTEN[disturbance.stage]) and not re.search(r"(^|/)(wandb|runs|logs)/", name)
        if is_written and path.is_file() and path.stat().st_size and not name.endswith((".lock", ".partial", ".py")):
            files.append(path)
    if not files:
        return None
    path = files[int(disturbance.choice * len(files))]
    content = path.read_bytes()
    if disturbance.kind == UNREADABLE:
        path.chmod(0)
    else:
        path.write_bytes(DAMAGES[disturbance.kind](content))
    return path, content


def run_damaged(world: World, disturbance: Disturbance, output: Path, **settings: str) -> str:
    """Damage a file and run the stage again; says what came of it. Where the run names the file, it is put back.

    A file that could not be read must be there afterwards as it was.
    """
    hit = damage(world, disturbance)
    if hit is None:
        return "there was no file"
    path, content = hit
    name = path.relative_to(world.directory)
    unprivileged = UNPRIVILEGED if disturbance.kind == UNREADABLE and not os.geteuid() else ()
    process = world.start(output, unprivileged, **settings)
    status = finish_stage(process, output, disturbance.stage)
    if path.exists() and disturbance.kind == UNREADABLE:
        path.chmod(0o644)
    if stage_of(output) != disturbance.stage or status == 0:
        return f"{name}: mended"
    last = [line for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if "error: " in line]
    if not last or not any(part in last[-1] for part in (path.name, path.parent.name)):
        return f"{name}: NOT NAMED, exit {status}: {last[-1:]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return f"{name}: named and put back: {last[-1]}"


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
    unnamed: list[str] = field(default_factory=list)  # damaged files that were neither mended nor named


def run_disturbed(world: World, disturbances: list[Disturbance], outputs: Path, **settings: str) -> Chaos:
    """Disturb one run after another, then let the last one end."""
    chaos = Chaos()
    for number, disturbance in enumerate(disturbances):
        output = outputs / f"{world.directory.name}-{number:03d}.log"
        began = time.monotonic()
        status = disturb(world, disturbance, output, **settings)
        outcome = ""
        outputs_of_run = [output, output.with_suffix(".second.log")]
        if disturbance.kind in (*DAMAGES, UNREADABLE):
            outputs_of_run = [output.with_suffix(".damaged.log")]
            outcome = run_damaged(world, disturbance, outputs_of_run[0], **settings)
            if "NOT NAMED" in outcome:
                chaos.unnamed.append(f"{disturbance}: {outcome}")
            outcome = f" ({outcome})"
        chaos.happened[f"{disturbance.stage}, {re.sub(r'^[0-9]+$', 'status', disturbance.kind)}"] += 1
        chaos.log.append(
            f"{number + 1:3d}. {disturbance} -> exit {status} after {time.monotonic() - began:.0f} s{outcome}"
        )
        print(chaos.log[-1], flush=True)
        for path in outputs_of_run:
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            if "Traceback (most recent call last)" in text and disturbance.kind != "SIGKILL":
                chaos.tracebacks.append(f"{disturbance}: {path}\n{text[text.index('Traceback') :][-3000:]}")
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
    parser.add_argument("--kinds", choices=("faults", "damage"), default="faults", help="what disturbs the runs")
    parser.add_argument("--directory", type=Path, help="kept directory for both runs (default: a temporary one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    print(f"seed {args.seed}", flush=True)
    corpus = build_corpus(cache_directory() / "corpus-test", {"000": 24, "fff": 8})
    teacher = cached_whisper("tiny-whisper-v3")
    with tempfile.TemporaryDirectory(prefix="kotoba-chaos-") as temporary, contextlib.ExitStack() as stack:
        root = (args.directory or Path(temporary)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        disk = root / "chaos"
        disk.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(disk)]
        if args.kinds == "damage" and subprocess.run(mount, capture_output=True).returncode == 0:
            stack.callback(subprocess.run, ["umount", str(disk)])
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
                    damages = damage_kinds(disk) if args.kinds == "damage" else ()
                    drawn = draw(args.disturbances, seconds, random.Random(args.seed), damages)
                    chaos = run_disturbed(world, drawn, root)
                results.append(read_results(world))
    print("\n".join(f"{count:3d} x {what}" for what, count in sorted(chaos.happened.items())))
    for traceback in chaos.tracebacks:
        print(f"\na traceback where a line was due: {traceback}")
    print("\n".join(chaos.unnamed))
    if chaos.survivors:
        print(f"{len(chaos.survivors)} runs left processes behind")
    if chaos.status:
        print(f"{chaos.last_output[-5000:]}\nthe last run ended with exit status {chaos.status}")
        return 1
    differences = results[0].differences(results[1])
    print("\n".join(differences) or f"equal: {len(results[0].files)} files, {len(results[0].hub)} on the Hub")
    return 1 if differences or chaos.tracebacks or chaos.survivors or chaos.unnamed else 0


if __name__ == "__main__":
    sys.exit(main())
