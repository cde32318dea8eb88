#!/usr/bin/env python
"""Load the ReazonSpeech files that reazonspeech_manual_downloader.py stored, as a Hugging Face dataset.

In:   <data_dir>/<target>/<target>.<target>.tsv and <target>.000.tar, ..., and the same of a download in ranges in
      <data_dir>/<target>_<start>_<end>/. `data_dir` is REAZONSPEECH_DATA_DIR or ~/.cache/reazon_manual_download.
Out:  rows of `name` (000/0123456789abc.flac), `audio` ({bytes, path}, the tar's own FLAC bytes) and `transcription`,
      in the order of the tars and of the members in each, whatever the number of processes.

The next stage loads it by its path: `run_pseudo_labelling.py --dataset_name reazonspeech_manual_dataloader.py`. As a
script it tells what there is, and writes and pushes a dataset repository when asked. One process, many:

    python reazonspeech_manual_dataloader.py -t tiny
    python reazonspeech_manual_dataloader.py -t all --dataset_dir_suffix 0_50 --preprocessing_num_workers 16 \\
        --output_dir reazonspeech --hub_model_id my-org/reazonspeech

Tars are streamed, never extracted. What can't be used (a member without a transcript and the reverse, a malformed
line, a name twice, an empty clip) is left out, counted and named; a broken tar ends the run. The same command again
writes only the shards that are not there yet.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import sys
import tarfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from filelock import FileLock, Timeout
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx
from tqdm import tqdm

# Tars of each subset (https://huggingface.co/datasets/reazon-research/reazonspeech); the last one is the test set.
TRAIN_TARS = {"tiny": 1, "small": 12, "medium": 116, "large": 579, "all": 4095}
TARS = {target: range(count) for target, count in TRAIN_TARS.items()} | {"test": range(4095, 4096)}
DATA_DIR = "~/.cache/reazon_manual_download"
ROWS_AT_ONCE = 100  # of ~105 kB each, between the tar and the disk
DURATIONS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30)  # seconds, lower ends of the histogram's bars
AUDIO = datasets.Audio(sampling_rate=16000, decode=False)
# As the builder writes it: without torchcodec `datasets` encodes no Audio. Readers cast this struct to AUDIO.
FEATURES = datasets.Features(
    name=datasets.Value("string"),
    audio={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    transcription=datasets.Value("string"),
)
REMEDY = "run reazonspeech_manual_downloader.py --health_check, then without it"
HUB_ERRORS = (OSError, HFValidationError, httpx.HTTPError, RuntimeError)  # RuntimeError: Xet's uploads
CARD = """---
language: [ja]
license: other
task_categories: [automatic-speech-recognition]
---
# ReazonSpeech

Japanese broadcast speech of [ReazonSpeech v2](https://huggingface.co/datasets/reazon-research/reazonspeech), as FLAC
in parquet. Its terms bind: use only for information analysis under Article 30-4 of the Japanese Copyright Act.
"""

logger = logging.getLogger(__name__)


class BrokenTarError(Exception):
    """A tar that can't be read to its end."""


def fail(message: str) -> NoReturn:
    """End the script with one line for the user: what was wrong, with which value, what to do."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}")


def reason(error: Exception) -> str:
    """The line of an error that says what is wrong; the Hub's begin with the request's id."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    return lines[0] if lines else type(error).__name__


def boolean(value: str) -> bool:
    """Value of a flag that may stand alone (`--flag`) or carry a value (`--flag False`)."""
    if value.lower() in ("true", "1", "yes"):
        return True
    if value.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")


@dataclass
class Corpus:
    """The files of a subset that are on the disk."""

    tsv: Path
    tars: dict[int, Path]  # by index, in order

    def fingerprint(self) -> str:
        """Changes when a file is added, replaced or rewritten."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in (self.tsv, *self.tars.values())]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def find_corpus(target: str, data_dir: str | None = None, dataset_dir_suffix: str | None = None) -> Corpus:
    """The downloaded files of `target`: of one range where a suffix such as `0_50` is given, else of all of them."""
    root = Path(data_dir or os.environ.get("REAZONSPEECH_DATA_DIR") or DATA_DIR).expanduser().absolute()
    if dataset_dir_suffix:
        directories = [root / f"{target}_{dataset_dir_suffix}"]
    else:
        ranges = [path for path in sorted(root.glob(f"{target}_*")) if re.fullmatch(r"\w+_\d+_\d+", path.name)]
        directories = [root / target, *ranges]
    tars = {}
    for directory in directories:
        for path in sorted(directory.glob(f"{target}.*.tar")):
            index = re.fullmatch(rf"{target}\.([0-9a-f]{{3}})\.tar", path.name)
            if index and int(index[1], 16) in TARS[target]:
                tars.setdefault(int(index[1], 16), path)
    tsv = f"{target}.{'all' if target == 'test' else target}.tsv"
    tsvs = [directory / tsv for directory in directories if (directory / tsv).is_file()]
    if not tars or not tsvs:
        missing = tsv if tars else f"{target}.*.tar"
        fail(f"no {missing} in {directories[0]}; fetch it with: python reazonspeech_manual_downloader.py -t {target}")
    return Corpus(tsvs[0], dict(sorted(tars.items())))


def locate_transcripts(tsv: Path, indices: list[int], problems: dict[str, list[str]]) -> dict[int, array]:
    """Where the lines of each tar stand, so that a worker reads those of its tars alone: all.tsv has 2.1 GB.

    Gives by index the runs of lines that follow each other, flat: number of the first line, its byte, the byte behind
    the last. Lines that belong to no tar at all are problems.
    """
    runs = {index: array("q") for index in indices}
    by_prefix = {b"%03x/" % index: runs[index] for index in indices}
    current, stray, position = b"", False, 0
    with open(tsv, "rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, 1):
            prefix = line[:4] if line[:2] != b"./" else line[2:6]
            if prefix != current:
                if current in by_prefix:
                    by_prefix[current].append(position)
                if prefix in by_prefix:
                    by_prefix[prefix].extend((number, position))
                current, stray = prefix, not re.fullmatch(rb"[0-9a-f]{3}/", prefix)
            if stray and line.strip():
                problems["malformed lines"].append(f"{tsv.name} line {number}")
            position += len(line)
    if current in by_prefix:
        by_prefix[current].append(position)
    return runs


def read_transcripts(tsv: Path, runs: array, problems: dict[str, list[str]]) -> dict[str, str]:
    """Transcripts by name of one tar's lines; of two lines for one name the first counts."""
    texts = {}
    with open(tsv, "rb") as file:
        for first, start, end in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
            file.seek(start)
            number = first
            while file.tell() < end:
                line, place = file.readline().rstrip(b"\r\n"), f"{tsv.name} line {number}"
                number += 1
                try:
                    name, text = line.decode().removeprefix("./").split("\t")
                except ValueError:  # not UTF-8, no tab, two tabs
                    problems["malformed lines"].append(place)
                    continue
                if name in texts:
                    problems["duplicate lines"].append(f"{place}: {name}")
                texts.setdefault(name, text)
    return texts


def check_tars(target: str, corpus: Corpus) -> None:
    """Say which tars of the subset are absent, and refuse truncated ones before any work is done."""
    absent = [f"{index:03x}" for index in TARS[target] if index not in corpus.tars]
    if absent:
        few = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        logger.warning("%s: %d of its %d tars are here, without %s", target, len(corpus.tars), len(TARS[target]), few)
    short = []
    for path in corpus.tars.values():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
            if file.read() != tarfile.NUL * tarfile.BLOCKSIZE:  # as a whole one ends
                short.append(f"{path} ({file.tell():,} bytes)")
    if short:
        fail(f"truncated: {', '.join(short)}; {REMEDY}")


def read_tar(path: Path, texts: dict[str, str], problems: dict[str, list[str]]) -> Iterator[dict]:
    """Rows of a tar in its order, one in memory at a time. Raises BrokenTarError where it can't be read further."""
    seen = set()
    place = 0
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            size = os.fstat(file.fileno()).st_size
            while member := tar.next():
                tar.members.clear()  # it would keep every one
                place, name = member.offset, member.name.removeprefix("./")
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{name} has {member.size:,} bytes, more than follow")
                if member.isdir():
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    problems["links, devices or sparse members"].append(f"{path.name}: {name}")
                elif name in seen:
                    problems["duplicate members"].append(f"{path.name} byte {place}: {name}")
                elif name not in texts:
                    problems["members without a transcript"].append(name)
                else:
                    seen.add(name)
                    if member.size == 0:
                        problems["empty clips"].append(f"{path.name}: {name}")
                        continue
                    file.seek(member.offset_data)
                    audio = {"bytes": file.read(member.size), "path": name}
                    yield {"name": name, "audio": audio, "transcription": texts[name]}
            place = tar.offset
            file.seek(place)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes damage for the end
                raise tarfile.ReadError("neither a header nor the end of the archive")
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise BrokenTarError(f"{path}: byte {place:,}: {error}; {REMEDY}") from error
    problems["transcripts without a member"] += [name for name in texts if name not in seen]


def summary(problems: dict[str, list[str]]) -> str:
    """One line: how many of each kind there are, and the places of the first three."""
    few = {kind: ", ".join(places[:3]) + (", ..." if len(places) > 3 else "") for kind, places in problems.items()}
    return "; ".join(f"{len(problems[kind])} {kind} ({few[kind]})" for kind in few if few[kind]) or "nothing"


@contextlib.contextmanager
def tied_workers():
    """Processes forked in here end at SIGTERM, and when this one ends.

    A pool ends its workers by SIGTERM, and a worker that inherits a handler of ours can lose one that comes early. And
    the workers that `datasets` has when it is killed would stay, and hold its lock: the next run would wait for ever.
    """
    parent, inside = os.getpid(), threading.Event()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    def tie() -> None:
        if inside.is_set():
            threading.Thread(target=watch, daemon=True).start()

    os.register_at_fork(after_in_child=tie)
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    inside.set()
    try:
        yield
    finally:
        inside.clear()
        signal.signal(signal.SIGTERM, handler)


@dataclass
class ReazonSpeechConfig(datasets.BuilderConfig):
    """A subset; `data_dir` and `dataset_dir_suffix` say where its files are."""

    dataset_dir_suffix: str | None = None

    def corpus(self) -> Corpus:
        return find_corpus(self.name, self.data_dir, self.dataset_dir_suffix)

    def create_config_id(self, config_kwargs: dict, custom_features=None) -> str:
        """Name of the cache: other files, other cache."""
        return f"{super().create_config_id(config_kwargs, custom_features)}-{self.corpus().fingerprint()}"


class ReazonSpeech(datasets.GeneratorBasedBuilder):
    """ReazonSpeech v2 from downloaded tars: split `train`, and `test` in the configuration `test`."""

    VERSION = datasets.Version("2.0.0")
    BUILDER_CONFIG_CLASS = ReazonSpeechConfig
    BUILDER_CONFIGS = [ReazonSpeechConfig(name=name, version=datasets.Version("2.0.0")) for name in TARS]  # noqa: RUF012
    DEFAULT_WRITER_BATCH_SIZE = ROWS_AT_ONCE

    def download_and_prepare(self, *args, **kwargs) -> None:
        with tied_workers():
            super().download_and_prepare(*args, **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        corpus, problems = self.config.corpus(), collections.defaultdict(list)
        check_tars(self.config.name, corpus)
        runs = locate_transcripts(corpus.tsv, list(corpus.tars), problems)
        if problems:
            logger.warning("%s: left out %s", self.config.name, summary(problems))
        # Workers share the lists out between them, each a stretch of both.
        files = {"tsv": corpus.tsv, "tars": list(corpus.tars.values()), "runs": list(runs.values())}
        split = datasets.Split.TEST if self.config.name == "test" else datasets.Split.TRAIN
        return [datasets.SplitGenerator(name=split, gen_kwargs=files)]

    def _generate_examples(self, tsv: Path, tars: list[Path], runs: list[array]):
        problems = collections.defaultdict(list)
        for path, lines in zip(tars, runs, strict=True):
            for row in read_tar(path, read_transcripts(tsv, lines, problems), problems):
                yield row["name"], row
        if any(problems.values()):
            logger.warning("%s to %s: left out %s", tars[0].name, tars[-1].name, summary(problems))


def counted(rows: Iterator[dict], counts: collections.Counter, problems: dict[str, list[str]]) -> Iterator[dict]:
    """The same rows, counted as they pass."""
    for row in rows:
        audio, seconds = row["audio"]["bytes"], 0.0
        try:
            seconds = soundfile.info(io.BytesIO(audio)).duration
        except soundfile.LibsndfileError:  # it stays: the next stage counts what it can't use
            problems["clips that are no audio"].append(row["name"])
        counts.update(clips=1, bytes=len(audio), seconds=seconds, characters=len(row["transcription"]))
        counts[f"from {max(lower for lower in DURATIONS if lower <= seconds)} s"] += 1
        yield row


def load_tar(job: tuple[Path, Path, array, Path | None]) -> dict:
    """Facts of a tar. Its rows go to a shard, if named, which gets its name only when whole and on the disk."""
    path, tsv, runs, shard = job
    counts, problems = collections.Counter(), collections.defaultdict(list)
    facts = {"counts": counts, "problems": problems}
    rows = counted(read_tar(path, read_transcripts(tsv, runs, problems), problems), counts, problems)
    try:
        if shard is None:
            collections.deque(rows, maxlen=0)
            return facts
        partial = shard.with_name(f".{shard.name}.partial")
        schema = datasets.Features({**FEATURES, "audio": AUDIO}).arrow_schema
        codecs = {"name": "zstd", "audio.bytes": "none", "audio.path": "zstd", "transcription": "zstd"}
        with open(partial, "wb") as file:
            with pq.ParquetWriter(file, schema, compression=codecs, use_dictionary=False) as writer:
                while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
                    writer.write_table(pa.Table.from_pylist(batch, schema))
                writer.add_key_value_metadata({"kotoba": json.dumps(facts, ensure_ascii=False)})
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, shard)
        return facts
    except BrokenTarError as error:
        return {"broken": str(error)}


def load_tars(jobs: list[tuple], workers: int) -> list[dict]:
    """Facts of each job's tar. A broken tar ends the run after the others are done."""
    facts = []
    sizes = [job[0].stat().st_size for job in jobs]
    with tied_workers():
        pool = multiprocessing.Pool(min(workers, len(jobs)) or 1, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with pool, tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="tars") as bar:
        for size, fact in zip(sizes, pool.imap(load_tar, jobs), strict=True):
            facts.append(fact)
            bar.update(size)
    if broken := [fact["broken"] for fact in facts if "broken" in fact]:
        fail("; ".join(broken))
    return facts


def total_facts(facts: list[dict]) -> dict:
    """Sum of the facts of tars."""
    counts, problems = collections.Counter(), collections.defaultdict(list)
    for fact in facts:
        counts.update(fact["counts"])
        for kind, places in fact["problems"].items():
            problems[kind] += places
    return {"counts": counts, "problems": problems}


def print_facts(counts: collections.Counter, problems: dict[str, list[str]]) -> None:
    print(f"{counts['clips']:,} clips, {counts['bytes'] / 1e9:,.3f} GB, {counts['seconds'] / 3600:,.2f} hours,")
    print(f"{counts['characters']:,} characters; left out: {summary(problems)}")
    for lower, upper in itertools.pairwise((*DURATIONS, "...")):
        count = counts[f"from {lower} s"]
        print(f"{lower:>3} to {upper:>3} s {count:>10,} {'#' * round(60 * count / max(1, counts['clips']))}")


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def shard_paths(args: argparse.Namespace, number: int) -> list[Path]:
    split = "test" if args.target == "test" else "train"
    return [args.output_dir / args.target / f"{split}-{i:05d}-of-{number:05d}.parquet" for i in range(number)]


def print_plan(args: argparse.Namespace, corpus: Corpus) -> None:
    """Say what a run would read, write and push, how much and about how long; a few seconds of a tar are the sample."""
    problems, counts = collections.defaultdict(list), collections.Counter()
    (index, tar), sizes = next(iter(corpus.tars.items())), [path.stat().st_size for path in corpus.tars.values()]
    texts = read_transcripts(corpus.tsv, locate_transcripts(corpus.tsv, [index], problems)[index], problems)
    began, part = time.monotonic(), sizes[0]  # bytes of the tar that were read
    for _ in counted(read_tar(tar, texts, problems), counts, problems):
        if time.monotonic() > began + 3:
            part = counts["bytes"]
            break
    rate, whole = part / (time.monotonic() - began), sum(sizes) / part
    clips, hours = counts["clips"] * whole, counts["seconds"] * whole / 3600
    print(f"input: {len(sizes)} tars, {sum(sizes) / 1e9:,.3f} GB, about {clips:,.0f} clips, {hours:,.2f} h")
    if args.output_dir:
        shards = shard_paths(args, len(sizes))
        sizes = [size for size, shard in zip(sizes, shards, strict=True) if not shard.exists()]
        print(f"done: {len(shards) - len(sizes)} of {len(shards)} shards")
    print(f"writes: {f'{args.output_dir}, about {sum(sizes) / 1e9:,.3f} GB' if args.output_dir else 'nothing'}")
    private = "private" if args.hub_private_repo else "public"
    print(f"pushes: {f'{args.hub_model_id} ({private})' if args.push_to_hub else 'nothing'}")
    seconds = round(sum(sizes) / rate / min(args.preprocessing_num_workers, len(sizes) or 1))
    print(f"time: about {timedelta(seconds=seconds)} (from a sample of {counts['clips']} clips)")


def start_record(path: Path, settings: dict) -> dict:
    """Put the record of a run on the disk before its work; refuses to go on with the work of another one."""
    if path.exists():
        for name, earlier in json.loads(path.read_text(encoding="utf-8"))["settings"].items():
            if earlier != settings[name]:
                fail(f"{path} says {name} {earlier}, now {settings[name]}; --overwrite_output_dir starts afresh")
    record = {"status": "running", "settings": settings}
    write_text(path, json.dumps(record, indent=2))
    return record


def card(text: str | None, config: str, split: str) -> str:
    """Dataset card that lists this configuration and split, and those which the card `text` lists already."""
    card = huggingface_hub.DatasetCard(text or CARD)
    configs = {entry["config_name"]: entry for entry in card.data.get("configs") or []}
    entry = configs.setdefault(config, {"config_name": config, "data_files": []})
    others = [files for files in entry["data_files"] if files["split"] != split]
    entry["data_files"] = [*others, {"split": split, "path": f"{config}/{split}-*"}]
    card.data.configs = list(configs.values())
    card.data.dataset_info = None  # row counts of earlier contents, which `datasets` would insist on
    return str(card)


def push_again(push: Callable[[], object]) -> None:
    """Push, and again where another push to the same repository came between, which the Hub answers with 409 or 412."""
    for waits in (1, 2, 4, 0):  # seconds, about
        try:
            push()
            return
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412) or not waits:
                raise
        time.sleep(waits * random.uniform(0.5, 1))


def push(repo_id: str, directory: Path, config: str, split: str) -> None:
    """Upload the shards and the record of a split, and a card that keeps what else the repository has."""
    api = huggingface_hub.HfApi()
    mine = [f"{config}/{split}-*.parquet", f"loading.{config}.{split}.json"]
    repo = {"repo_id": repo_id, "repo_type": "dataset", "commit_message": f"Add {config}, {split}"}
    what = {"allow_patterns": mine, "ignore_patterns": [".*", "*.partial"], "delete_patterns": mine}

    def push_card() -> None:
        head = api.dataset_info(repo_id).sha
        try:
            path = api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=head)
            text = Path(path).read_text(encoding="utf-8")
        except EntryNotFoundError:
            text = None
        text = card(text, config, split)
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", parent_commit=head, **repo)

    try:
        push_again(lambda: api.upload_folder(folder_path=directory, **what, **repo))
        push_again(push_card)
    except HUB_ERRORS as error:
        fail(f"the push to {repo_id} failed: {reason(error)}; all is in {directory}, the same command only pushes it")
    logger.info("pushed to %s/datasets/%s", api.endpoint, repo_id)


def write_dataset(args: argparse.Namespace, jobs: list[tuple], strays: dict, settings: dict) -> None:
    """Write the shards that are not there yet, then card and record, and push."""
    began = time.time()
    config, split = args.target, "test" if args.target == "test" else "train"
    directory, record_path = args.output_dir / config, args.output_dir / f"loading.{config}.{split}.json"
    directory.mkdir(exist_ok=True)
    if args.overwrite_output_dir:
        for path in (record_path, *directory.glob(f"{split}-*.parquet"), *directory.glob(f".{split}-*.partial")):
            path.unlink(missing_ok=True)
    record = start_record(record_path, settings)
    shards = shard_paths(args, len(jobs))
    jobs = [(*job[:3], shard) for job, shard in zip(jobs, shards, strict=True) if not shard.exists()]
    logger.info("%d of %d shards are there", len(shards) - len(jobs), len(shards))
    load_tars(jobs, args.preprocessing_num_workers)

    facts = total_facts([*(json.loads(pq.read_metadata(shard).metadata[b"kotoba"]) for shard in shards), strays])
    readme = args.output_dir / "README.md"
    write_text(readme, card(readme.read_text(encoding="utf-8") if readme.exists() else None, config, split))
    counts, seconds = facts["counts"], time.time() - began
    record |= {"status": "complete", "clips": counts["clips"], "hours": counts["seconds"] / 3600, **facts}
    record |= {"wall_seconds": seconds, "clips_per_second": counts["clips"] / seconds, "arguments": vars(args)}
    record |= {"versions": {name: version(name) for name in ("datasets", "huggingface_hub", "pyarrow")}}
    write_text(record_path, json.dumps(record, indent=2, ensure_ascii=False, default=str))
    print_facts(**facts)
    if args.push_to_hub:
        push(args.hub_model_id, args.output_dir, config, split)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    flag = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    group = parser.add_argument_group("input")
    group.add_argument("-t", "--target", choices=list(TARS), default="tiny", help="subset")
    group.add_argument("--dataset_dir_suffix", metavar="START_END", help="one range of a download in ranges, or all")
    group.add_argument("--data_dir", help=f"downloads; REAZONSPEECH_DATA_DIR or {DATA_DIR} if unset")
    group.add_argument("--preprocessing_num_workers", type=int, default=1, help="processes, a tar at a time each")
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=Path, help="dataset repository to write, a shard a tar; none if unset")
    group.add_argument("--overwrite_output_dir", default=False, help="start this subset afresh there", **flag)
    group.add_argument("--hub_model_id", metavar="ORG/NAME", help="dataset repository on the Hub to push to")
    group.add_argument("--push_to_hub", help="push; True where --hub_model_id is given", **flag)
    group.add_argument("--hub_private_repo", default=True, help="make a new repository private", **flag)
    group.add_argument("--dry_run", default=False, help="say what a run would do and how long it takes, stop", **flag)
    args = parser.parse_args(argv)
    if args.push_to_hub is None:
        args.push_to_hub = args.hub_model_id is not None
    if args.push_to_hub and not (args.hub_model_id and args.output_dir):
        parser.error("a push needs --hub_model_id and --output_dir")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    # 1. What there is, and whether it may be pushed.
    corpus, problems = find_corpus(args.target, args.data_dir, args.dataset_dir_suffix), collections.defaultdict(list)
    check_tars(args.target, corpus)
    if args.push_to_hub:
        repo = {"repo_id": args.hub_model_id, "repo_type": "dataset", "private": args.hub_private_repo}
        try:
            huggingface_hub.whoami() if args.dry_run else huggingface_hub.create_repo(**repo, exist_ok=True)
        except HUB_ERRORS as error:
            fail(f"can't push to {args.hub_model_id}: {reason(error)}; give a token that may write by: hf auth login")
    if args.dry_run:
        print_plan(args, corpus)
        return 0
    strays = {"counts": {}, "problems": problems}
    runs = locate_transcripts(corpus.tsv, list(corpus.tars), problems)
    jobs = [(path, corpus.tsv, runs[index], None) for index, path in corpus.tars.items()]
    if not args.output_dir:
        print_facts(**total_facts([*load_tars(jobs, args.preprocessing_num_workers), strays]))
        return 0

    # 2. The dataset repository.
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(args.output_dir / f".{args.target}.lock", timeout=60):  # workers of a killed run end their tars
            write_dataset(args, jobs, strays, {"files": corpus.fingerprint(), "tars": len(jobs)})
    except Timeout:
        fail(f"another run is writing {args.target} in {args.output_dir}; wait for its end")
    except OSError as error:
        fail(f"can't write the dataset: {error}; what is complete is kept, and the same command goes on")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
