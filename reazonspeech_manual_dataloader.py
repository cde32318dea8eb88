#!/usr/bin/env python
"""Load the ReazonSpeech files that reazonspeech_manual_downloader.py stored, as a Hugging Face dataset.

In:   <data_dir>/<target>/<target>.<target>.tsv and <target>.000.tar, ..., and the same of a download in ranges in
      <data_dir>/<target>_<start>_<end>/. `data_dir` is REAZONSPEECH_DATA_DIR or ~/.cache/reazon_manual_download.
Out:  rows of `name` (000/0123456789abc.flac), `audio` ({bytes, path}, the tar's own FLAC bytes) and `transcription`,
      in the order of the tars and of the members in each, whatever the number of processes. As a script it prints
      what the files hold, and with --output_dir it writes a dataset repository of one shard for each tar.

The next stage loads it by its path: `run_pseudo_labelling.py --dataset_name reazonspeech_manual_dataloader.py`. By
hand, in one process and in many:

    python reazonspeech_manual_dataloader.py -t tiny
    python reazonspeech_manual_dataloader.py -t all --dataset_dir_suffix 0_50 --preprocessing_num_workers 16 \\
        --output_dir reazonspeech --hub_model_id my-org/reazonspeech

To resume, run the same command again: only missing shards are written. Tars are streamed, never extracted. What cannot
be used (a member without a transcript and the reverse, a malformed line, a second one of a name, an empty clip) is left
out, counted and named; a broken tar ends the run.
"""

import argparse
import bisect
import collections
import contextlib
import hashlib
import importlib.metadata
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
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from filelock import FileLock, Timeout
from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx
from tqdm import tqdm

TARS = {  # of each subset (https://huggingface.co/datasets/reazon-research/reazonspeech); the last one is the test set
    "tiny": range(1),
    "small": range(12),
    "medium": range(116),
    "large": range(579),
    "all": range(4095),
    "test": range(4095, 4096),
}
VERSION = datasets.Version("2.0.0")  # of the corpus
DATA_DIR = "~/.cache/reazon_manual_download"
END_OF_TAR = tarfile.NUL * tarfile.BLOCKSIZE
ROWS_AT_ONCE = 100  # of ~105 kB each, between the tar and the disk
DURATIONS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30)  # seconds, lower ends of the histogram's bars
# As the builder writes it: without torchcodec `datasets` encodes no Audio. Readers cast this struct to Audio.
FEATURES = datasets.Features(
    name=datasets.Value("string"),
    audio={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    transcription=datasets.Value("string"),
)
SCHEMA = datasets.Features({**FEATURES, "audio": datasets.Audio(sampling_rate=16_000)}).arrow_schema  # of the shards
Problems = dict[str, list[str]]  # places of what cannot be used, by its kind
REMEDY = "run reazonspeech_manual_downloader.py --health_check, then without it"
CARD = """---
language: [ja]
license: other
task_categories: [automatic-speech-recognition]
---
# ReazonSpeech

Japanese broadcast speech of [ReazonSpeech v2](https://huggingface.co/datasets/reazon-research/reazonspeech), as FLAC
in parquet. Its terms bind: use only for information analysis under Article 30-4 of the Japanese Copyright Act.
"""


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    group = parser.add_argument_group("input")
    group.add_argument("-t", "--target", choices=list(TARS), default="tiny", help="subset of the corpus")
    group.add_argument("--dataset_dir_suffix", metavar="START_END", help="range of a download in ranges; unset = all")
    group.add_argument("--data_dir", help=f"directory of downloads; unset = REAZONSPEECH_DATA_DIR or {DATA_DIR}")
    group.add_argument("--preprocessing_num_workers", type=int, default=1, help="processes, each a tar at a time")
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=Path, help="dataset repository to write; unset = only print statistics")
    group.add_argument("--overwrite_output_dir", default=False, help="delete the subset's shards there first", **flag)
    group.add_argument("--hub_model_id", metavar="ORG/NAME", help="dataset repository on the Hub; unset = no push")
    group.add_argument("--push_to_hub", help="push the dataset; unset = True with --hub_model_id, else False", **flag)
    group.add_argument("--hub_private_repo", default=True, help="make a new repository private", **flag)
    group.add_argument("--dry_run", default=False, help="print what would be done and how long it takes, stop", **flag)
    args = parser.parse_args(argv)
    if args.push_to_hub is None:
        args.push_to_hub = args.hub_model_id is not None
    if args.push_to_hub and not (args.hub_model_id and args.output_dir):
        parser.error("a push needs --hub_model_id and --output_dir")
    return args


# ---- common ----------------------------------------------------------------------------------------------------------

CONTINUE = "Run the same command again to continue."

logger = logging.getLogger(__name__)


def fail(message: str) -> NoReturn:
    """End the script with one line for the user: what was wrong, with which value, what to do."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}")


def first_line(error: BaseException) -> str:
    """The line of an error that says what is wrong, without its full stop. The Hub's begin with the id of a request."""
    for line in str(error).splitlines():
        if line.strip() and not line.startswith("(Request ID"):
            return line.strip().rstrip(".")
    return type(error).__name__


def boolean(value: str) -> bool:
    """Value of a flag that may stand alone (`--flag`) or carry a value (`--flag False`)."""
    if value.lower() in ("true", "1", "yes"):
        return True
    if value.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")


def set_up_process(is_main_process: bool = True) -> None:
    """Log to stderr, from the main process more than from the others, and end in order on SIGTERM."""
    level = logging.INFO if is_main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    for noisy in ("httpx2", "httpx", "accelerate"):  # a line for every request, and for every file of a checkpoint
        logging.getLogger(noisy).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that appears under its name only when it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


# ---- common: records -------------------------------------------------------------------------------------------------


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file; what JSON does not know, such as a path, is written as its text."""
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict | None:
    """The content of a JSON file, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def library_versions(*names: str) -> dict[str, str]:
    """Version of each of these installed packages, for a record."""
    return {name: importlib.metadata.version(name) for name in names}


def changed_setting(earlier: dict, settings: dict) -> str | None:
    """The first setting in which an earlier run differs from this one, for people to read; None where none does."""
    for name, value in json.loads(json.dumps(settings, default=str)).items():
        if earlier.get(name) != value:
            return f"{name} was {earlier.get(name)!r} and is now {value!r}"
    return None


def refuse_other_settings(place: Path, earlier: dict, settings: dict) -> None:
    """Fail where `place` holds the results of a run with other settings, which must not be mixed with this run's."""
    if changed := changed_setting(earlier, settings):
        fail(
            f"{place} was made with other settings: {changed}. Choose another directory, "
            "or pass --overwrite_output_dir to start afresh"
        )


# ---- common: the Hub -------------------------------------------------------------------------------------------------

HUB_ERRORS = (OSError, HFValidationError, httpx.HTTPError, RuntimeError)  # RuntimeError: an upload through Xet


def hub_fail(action: str, error: BaseException) -> NoReturn:
    """Fail because the Hub refused something."""
    fail(
        f"{action} failed: {first_line(error)}. Check the name, and the token with `hf auth whoami`; "
        "`hf auth login` sets another token"
    )


def local_directory(reference: str) -> Path | None:
    """The directory that a repository reference names, or None where it is a Hub id (`org/name`)."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        fail(f"{reference!r} is neither a directory that exists nor a Hub id such as org/name")
    return None


def prepare_repository(repository: str, repo_type: str, private: bool | None, dry_run: bool) -> str:
    """Create a repository where it is missing and prove the right to write to it; gives its full id.

    A dry run creates nothing: it looks whether the repository, or else its owner, is there for this token.
    """
    api = HfApi()
    try:
        if not dry_run:
            url = api.create_repo(repository, repo_type=repo_type, private=private, exist_ok=True)
            api.auth_check(url.repo_id, repo_type=repo_type, write=True)
            return url.repo_id
        account = api.whoami()
        repo_id = repository if "/" in repository else f"{account['name']}/{repository}"
        owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
        if api.repo_exists(repo_id, repo_type=repo_type):
            api.auth_check(repo_id, repo_type=repo_type, write=True)
        elif repo_id.split("/")[0] not in owners:
            fail(f"{account['name']} cannot create {repo_id}: it belongs to somebody else")
        return repo_id
    except HUB_ERRORS as error:
        hub_fail(f"preparing the {repo_type} repository {repository}", error)


def push_again(push: Callable[[], object]) -> None:
    """Push, and try again where another push to the repository came between: the Hub then answers 409 or 412."""
    for seconds in (1, 2, 4, 0):
        try:
            push()
            return
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412) or not seconds:
                raise
        time.sleep(seconds * random.uniform(0.5, 1))


# ---- common: dataset repositories ------------------------------------------------------------------------------------


def write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema, notes: dict) -> None:
    """Write a shard that appears under its name only when it is complete and on the disk.

    `read_notes` gives the notes back. They are written last, so they may be filled while the tables are made.
    """
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer:
            for table in tables:
                if table.num_rows:  # `datasets` cannot read a row group without rows
                    writer.write_table(table, row_group_size=100)
            writer.add_key_value_metadata({"kotoba": json.dumps(notes, ensure_ascii=False)})
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_notes(path: Path) -> dict | None:
    """What `write_parquet` noted in a shard; None where the shard is missing or damaged."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return json.loads(metadata.get(b"kotoba", "{}"))


def list_split(card: DatasetCard, config: str, split: str) -> None:
    """Name the files of a split in a dataset card, which keeps what it says of other splits."""
    configs = {entry["config_name"]: entry for entry in card.data.get("configs") or []}
    entry = configs.setdefault(config, {"config_name": config})
    listed = entry.get("data_files")
    others = [files for files in listed if files["split"] != split] if isinstance(listed, list) else []
    entry["data_files"] = [*others, {"split": split, "path": f"{config}/{split}-*"}]
    card.data.configs = list(configs.values())
    card.data.dataset_info = None  # row counts of earlier contents, on which `datasets` would insist


def push_dataset(
    repository: str, directory: Path, patterns: list[str], update_card: Callable[[str | None], str], message: str
) -> None:
    """Upload the files of a directory that match, and then the card.

    Args:
        repository: Hub id of a dataset.
        patterns: which files are this run's; those that are only on the Hub are deleted there.
        update_card: gives the new text of the card for the one on the Hub, None where there is none.
        message: of the commits.
    """
    api, target = HfApi(), {"repo_id": repository, "repo_type": "dataset", "commit_message": message}

    def push_files() -> None:
        ignored = [".*", "*.partial"]
        api.upload_folder(
            folder_path=directory, allow_patterns=patterns, delete_patterns=patterns, ignore_patterns=ignored, **target
        )

    def push_card() -> None:
        head = api.dataset_info(repository).sha
        try:
            path = api.hf_hub_download(repository, "README.md", repo_type="dataset", revision=head)
            text = Path(path).read_text(encoding="utf-8")
        except EntryNotFoundError:
            text = None
        card = update_card(text).encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", parent_commit=head, **target)

    try:
        push_again(push_files)
        push_again(push_card)
    except HUB_ERRORS as error:
        fail(f"the push to {repository} failed: {first_line(error)}. All data is in {directory}. {CONTINUE}")
    logger.info("pushed to %s/datasets/%s", api.endpoint, repository)


# ---- downloaded files ------------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """The files of a subset that are on the disk."""

    tsv: Path
    tars: dict[int, Path]  # by index, in order

    def fingerprint(self) -> str:
        """Changes when a file is added, replaced or rewritten."""
        files = []
        for path in (self.tsv, *self.tars.values()):
            status = path.stat()
            files.append((path.name, status.st_size, status.st_mtime_ns))
        digest = hashlib.sha256(json.dumps(files).encode())
        return digest.hexdigest()[:16]


def find_corpus(target: str, data_dir: str | None = None, dataset_dir_suffix: str | None = None) -> Corpus:
    """The downloaded files of `target`: of one range where a suffix such as `0_50` is given, else of all of them."""
    data_dir = data_dir or os.environ.get("REAZONSPEECH_DATA_DIR") or DATA_DIR
    root = Path(data_dir).expanduser().absolute()
    if dataset_dir_suffix:
        directories = [root / f"{target}_{dataset_dir_suffix}"]
    else:
        ranges = [path for path in root.glob(f"{target}_*") if re.fullmatch(r"\w+_\d+_\d+", path.name)]
        directories = [root / target, *sorted(ranges)]
    indices = {f"{target}.{index:03x}.tar": index for index in TARS[target]}
    tars = {}
    for directory in directories:
        for path in directory.glob(f"{target}.*.tar"):
            if path.name in indices:
                tars.setdefault(indices[path.name], path)
    tsv = f"{target}.{'all' if target == 'test' else target}.tsv"
    tsvs = [directory / tsv for directory in directories if (directory / tsv).is_file()]
    if not tars or not tsvs:
        missing = tsv if tars else f"{target}.*.tar"
        fail(f"no {missing} in {directories[0]}; fetch it with: python reazonspeech_manual_downloader.py -t {target}")
    return Corpus(tsvs[0], dict(sorted(tars.items())))


def check_tars(target: str, corpus: Corpus) -> None:
    """Say which tars of the subset are absent, and refuse truncated ones before any work is done."""
    absent = [f"{index:03x}" for index in TARS[target] if index not in corpus.tars]
    if absent:
        present = f"{len(corpus.tars)} of its {len(TARS[target])} tars"
        logger.warning("%s: %s are here, without %s", target, present, few(absent, 8))
    truncated = []
    for path in corpus.tars.values():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
            if file.read() != END_OF_TAR:
                truncated.append(f"{path} ({file.tell():,} bytes)")
    if truncated:
        fail(f"truncated: {', '.join(truncated)}; {REMEDY}")


# ---- transcripts and clips -------------------------------------------------------------------------------------------


class BrokenTarError(Exception):
    """A tar that cannot be read to its end."""


class TarJob(NamedTuple):
    """A tar to load."""

    tar: Path
    tsv: Path
    runs: array  # of its lines in the tsv, as `locate_transcripts` gives them
    shard: Path | None = None  # parquet file to write


def few(names: list[str], count: int) -> str:
    """The first names of a list."""
    ellipsis = ["..."] if len(names) > count else []
    return ", ".join(names[:count] + ellipsis)


def summary(problems: Problems) -> str:
    """One line: how many problems of each kind there are, and the places of the first three."""
    kinds = [f"{len(places)} {kind} ({few(places, 3)})" for kind, places in problems.items() if places]
    return "; ".join(kinds) or "nothing"


def tar_prefix(line: bytes) -> bytes:
    """`000/`, by which a line of the tsv names its tar."""
    return line[2:6] if line[:2] == b"./" else line[:4]


def locate_transcripts(tsv: Path, indices: Iterable[int], problems: Problems) -> dict[int, array]:
    """Find the lines of each tar, so that a worker reads only those of its tars: all.tsv has 2.1 GB.

    Gives for each index its runs of neighbouring lines, three numbers each in one flat array: number of the first
    line, byte where it begins, byte behind the last line. Lines that name no tar at all are problems.
    """
    runs = {index: array("q") for index in indices}
    runs_by_prefix = {b"%03x/" % index: runs[index] for index in indices}
    number = 1
    start = 0
    with open(tsv, "rb", buffering=1 << 20) as file:
        for prefix, neighbours in itertools.groupby(file, tar_prefix):
            lines = list(neighbours)
            end = start + sum(map(len, lines))
            if prefix in runs_by_prefix:
                runs_by_prefix[prefix].extend((number, start, end))
            elif not re.fullmatch(rb"[0-9a-f]{3}/", prefix):
                places = [f"{tsv.name} line {number + i}" for i, line in enumerate(lines) if line.strip()]
                problems["malformed lines"] += places
            number += len(lines)
            start = end
    return runs


def list_jobs(corpus: Corpus, problems: Problems) -> list[TarJob]:
    """All tars of a corpus."""
    runs = locate_transcripts(corpus.tsv, corpus.tars, problems)
    jobs = []
    for index, tar in corpus.tars.items():
        jobs.append(TarJob(tar, corpus.tsv, runs[index]))
    return jobs


def read_transcripts(tsv: Path, runs: array, problems: Problems) -> dict[str, str]:
    """Transcripts by name of one tar's lines; of two lines for one name the first counts."""
    texts = {}
    with open(tsv, "rb") as file:
        for i in range(0, len(runs), 3):
            first, start, end = runs[i : i + 3]
            file.seek(start)
            lines = io.BytesIO(file.read(end - start))
            for number, line in enumerate(lines, first):
                place = f"{tsv.name} line {number}"
                try:
                    name, text = line.decode().rstrip("\r\n").removeprefix("./").split("\t")
                except ValueError:  # not UTF-8, no tab, two tabs
                    problems["malformed lines"].append(place)
                    continue
                if name in texts:
                    problems["duplicate lines"].append(f"{place}: {name}")
                texts.setdefault(name, text)
    return texts


def read_tar(path: Path, texts: dict[str, str], problems: Problems) -> Iterator[dict]:
    """Rows of a tar in its order, one in memory at a time. Raises BrokenTarError where it cannot be read further."""
    seen = set()
    place = 0
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            size = path.stat().st_size
            while member := tar.next():
                tar.members.clear()  # otherwise it keeps every one
                place = member.offset
                name = member.name.removeprefix("./")
                if not 0 <= member.size <= size - member.offset_data:
                    raise tarfile.ReadError(f"{name} has {member.size:,} bytes, more than follow")
                if member.isdir():
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    problems["links, devices or sparse members"].append(f"{path.name}: {name}")
                elif name in seen:
                    problems["duplicate members"].append(f"{path.name} byte {place}: {name}")
                elif name not in texts:
                    problems["members without a transcript"].append(name)
                elif member.size == 0:
                    seen.add(name)
                    problems["empty clips"].append(f"{path.name}: {name}")
                else:
                    seen.add(name)
                    file.seek(member.offset_data)
                    audio = {"bytes": file.read(member.size), "path": name}
                    yield {"name": name, "audio": audio, "transcription": texts[name]}
            place = tar.offset
            file.seek(place)
            if file.read(tarfile.BLOCKSIZE) != END_OF_TAR:  # `tarfile` takes a damaged header for the end
                raise tarfile.ReadError("neither a header nor the end of the archive")
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise BrokenTarError(f"{path}: byte {place:,}: {error}; {REMEDY}") from error
    problems["transcripts without a member"] += [name for name in texts if name not in seen]


def tar_rows(job: TarJob, problems: Problems) -> Iterator[dict]:
    """Rows of a tar, as `read_tar` gives them."""
    texts = read_transcripts(job.tsv, job.runs, problems)
    return read_tar(job.tar, texts, problems)


# ---- builder ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tied_workers() -> Iterator[None]:
    """Processes forked in here end at SIGTERM, and when this one ends.

    A pool ends its workers by SIGTERM, and a worker that inherits our handler can lose one that comes early. And the
    workers that `datasets` has when it is killed would stay and hold its lock: the next run would wait for ever.
    """
    parent = os.getpid()
    inside = threading.Event()

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

    def create_config_id(self, config_kwargs, custom_features=None) -> str:
        """Name of the cache: other files, other cache."""
        config_id = super().create_config_id(config_kwargs, custom_features)
        return f"{config_id}-{self.corpus().fingerprint()}"


class ReazonSpeech(datasets.GeneratorBasedBuilder):
    """ReazonSpeech v2 from downloaded tars: split `train`, and `test` in the configuration `test`."""

    BUILDER_CONFIG_CLASS = ReazonSpeechConfig
    BUILDER_CONFIGS = [ReazonSpeechConfig(name, VERSION) for name in TARS]  # noqa: RUF012
    DEFAULT_WRITER_BATCH_SIZE = ROWS_AT_ONCE

    def download_and_prepare(self, *args, **kwargs):
        with tied_workers():
            super().download_and_prepare(*args, **kwargs)

    def _info(self):
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager):
        corpus = self.config.corpus()
        check_tars(self.config.name, corpus)
        problems = collections.defaultdict(list)
        jobs = list_jobs(corpus, problems)  # `datasets` divides the list among its workers
        if problems:
            logger.warning("%s: left out %s", self.config.name, summary(problems))
        split = split_name(self.config.name)
        return [datasets.SplitGenerator(split, {"jobs": jobs})]

    def _generate_examples(self, jobs: list[TarJob]):
        problems = collections.defaultdict(list)
        for job in jobs:
            for row in tar_rows(job, problems):
                yield row["name"], row
        if any(problems.values()):
            first = jobs[0].tar.name
            last = jobs[-1].tar.name
            logger.warning("%s to %s: left out %s", first, last, summary(problems))


# ---- shards and statistics -------------------------------------------------------------------------------------------


def count_clip(row: dict, counts: collections.Counter, problems: Problems) -> None:
    """Add a clip to the statistics."""
    content = row["audio"]["bytes"]
    seconds = 0.0
    try:
        seconds = soundfile.info(io.BytesIO(content)).duration
    except soundfile.LibsndfileError:  # it stays: the next stage counts what it cannot use
        problems["clips that are no audio"].append(row["name"])
    counts["clips"] += 1
    counts["bytes"] += len(content)
    counts["seconds"] += seconds
    counts["characters"] += len(row["transcription"])
    lower = DURATIONS[bisect.bisect(DURATIONS, seconds) - 1]
    counts[f"from {lower} s"] += 1


def make_tables(job: TarJob, counts: collections.Counter, problems: Problems) -> Iterator[pa.Table]:
    """The rows of a tar, a few at a time, counted as they pass."""
    rows = tar_rows(job, problems)
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        for row in batch:
            count_clip(row, counts, problems)
        yield pa.Table.from_pylist(batch, SCHEMA)


def load_tar(job: TarJob) -> dict:
    """Write the shard of a tar, if one is named; gives the notes in it, or what is broken."""
    counts = collections.Counter()
    problems = collections.defaultdict(list)
    notes = {"counts": counts, "problems": problems}
    tables = make_tables(job, counts, problems)
    try:
        if job.shard:
            write_parquet(job.shard, tables, SCHEMA, notes)
        else:
            collections.deque(tables, maxlen=0)
    except BrokenTarError as error:
        return {"broken": str(error)}
    return notes


def load_tars(jobs: list[TarJob], num_workers: int) -> list[dict]:
    """The notes of each tar. A broken one ends the run when the others are done."""
    num_workers = max(1, min(num_workers, len(jobs)))
    with tied_workers():
        ignore_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
        pool = multiprocessing.Pool(num_workers, ignore_ctrl_c)
    with pool:
        results = pool.imap(load_tar, jobs)
        all_notes = list(tqdm(results, "loading", len(jobs), unit="tar"))
    broken = [notes["broken"] for notes in all_notes if "broken" in notes]
    if broken:
        fail("; ".join(broken))
    return all_notes


def sum_notes(all_notes: list[dict]) -> dict:
    """The notes of all tars together."""
    counts = collections.Counter()
    problems = collections.defaultdict(list)
    for notes in all_notes:
        counts.update(notes["counts"])
        for kind, places in notes["problems"].items():
            problems[kind] += places
    return {"counts": counts, "problems": problems}


def print_statistics(counts: collections.Counter, problems: Problems) -> None:
    """Print sums, problems and a histogram of the durations."""
    print(f"{counts['clips']:,} clips, {counts['bytes'] / 1e9:,.3f} GB, {counts['seconds'] / 3600:,.2f} hours,")
    print(f"{counts['characters']:,} characters; left out: {summary(problems)}")
    for lower, upper in itertools.pairwise((*DURATIONS, "...")):
        count = counts[f"from {lower} s"]
        share = count / max(1, counts["clips"])
        print(f"{lower:>3} to {upper:>3} s {count:>10,} {'#' * round(60 * share)}")


# ---- files, record, card, push ---------------------------------------------------------------------------------------


def split_name(target: str) -> str:
    """The split that a target is in the dataset."""
    return "test" if target == "test" else "train"


def name_shards(jobs: list[TarJob], directory: Path, split: str) -> list[TarJob]:
    """The same jobs, with the shards that they write."""
    named = []
    for number, job in enumerate(jobs):
        shard = directory / f"{split}-{number:05d}-of-{len(jobs):05d}.parquet"
        named.append(job._replace(shard=shard))
    return named


def delete_split(directory: Path, split: str) -> None:
    """Delete the shards of a split, and what a killed run has left of them."""
    for pattern in (f"{split}-*.parquet", f".{split}-*.partial"):
        for path in directory.glob(pattern):
            path.unlink()


def find_missing(jobs: list[TarJob]) -> list[TarJob]:
    """The jobs whose shards are not complete; all where none are to be written."""
    return [job for job in jobs if job.shard is None or read_notes(job.shard) is None]


def total_size(jobs: list[TarJob]) -> int:
    """Bytes of the tars."""
    return sum(job.tar.stat().st_size for job in jobs)


def print_loading_plan(args: argparse.Namespace, jobs: list[TarJob]) -> None:
    """Say what a run would read, write and push, and how long it takes; the first tar, loaded aside, is the sample."""
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            job = jobs[0]._replace(shard=Path(scratch) / "sample.parquet")
            counts = load_tars([job], num_workers=1)[0]["counts"]
    except OSError as error:
        fail(f"no place for a sample: {error}; set TMPDIR to a directory with 1 GB")
    seconds = time.monotonic() - started
    left = jobs if args.overwrite_output_dir else find_missing(jobs)
    tars = total_size(jobs) / total_size([job])  # of the sample's size
    tars_left = total_size(left) / total_size([job])
    clips = tars * counts["clips"]
    hours = tars * counts["seconds"] / 3600
    workers = max(1, min(args.preprocessing_num_workers, len(left)))
    duration = timedelta(seconds=round(tars_left * seconds / workers))
    print(f"input: {len(jobs)} tars, {total_size(jobs) / 1e9:,.3f} GB, about {clips:,.0f} clips, {hours:,.2f} h")
    print(f"done: {len(jobs) - len(left)} of {len(jobs)} shards")
    print(f"left: {len(left)} tars, {total_size(left) / 1e9:,.3f} GB")
    print(f"writes: {args.output_dir or 'nothing'}")
    visibility = "private" if args.hub_private_repo else "public"
    print(f"pushes: {f'{args.hub_model_id} ({visibility})' if args.push_to_hub else 'nothing'}")
    print(f"time: about {duration} (from a sample of {counts['clips']} clips)")


@contextlib.contextmanager
def locked_output(directory: Path, target: str) -> Iterator[None]:
    """Make the output directory and hold the lock of a target; an error of the disk ends the script in one line."""
    try:
        (directory / target).mkdir(parents=True, exist_ok=True)
        with FileLock(directory / f".{target}.lock", timeout=60):  # workers of a killed run end their tars
            yield
    except Timeout:
        fail(f"another run is writing {target} in {directory}; wait for its end")
    except OSError as error:
        fail(f"cannot write the dataset: {error}; what is complete is kept. {CONTINUE}")


def corpus_card(text: str | None, config: str, split: str) -> str:
    """Dataset card that lists this split, and what the card `text` lists already."""
    card = DatasetCard(text or CARD)
    list_split(card, config, split)
    return str(card)


# ---- main ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    # 1. Set up.
    set_up_process()
    started = time.monotonic()
    split = split_name(args.target)

    # 2. Refuse what can be refused.
    corpus = find_corpus(args.target, args.data_dir, args.dataset_dir_suffix)
    check_tars(args.target, corpus)
    if args.push_to_hub:
        repository = prepare_repository(args.hub_model_id, "dataset", args.hub_private_repo, args.dry_run)

    # 3. Load.
    strays = {"counts": {}, "problems": collections.defaultdict(list)}
    jobs = list_jobs(corpus, strays["problems"])
    if args.output_dir:
        jobs = name_shards(jobs, args.output_dir / args.target, split)
    if args.dry_run:
        print_loading_plan(args, jobs)
        return 0
    if not args.output_dir:
        all_notes = load_tars(jobs, args.preprocessing_num_workers)
        print_statistics(**sum_notes([*all_notes, strays]))
        return 0

    with locked_output(args.output_dir, args.target):
        # 4. Find what is left to do.
        record_path = args.output_dir / f"loading.{args.target}.{split}.json"
        if args.overwrite_output_dir:
            delete_split(args.output_dir / args.target, split)
            record_path.unlink(missing_ok=True)
        settings = {"files": corpus.fingerprint(), "tars": len(jobs)}
        if earlier := read_json(record_path):
            refuse_other_settings(record_path, earlier["settings"], settings)
        write_json(record_path, {"status": "running", "settings": settings})
        left = find_missing(jobs)
        logger.info("%d of %d shards are there", len(jobs) - len(left), len(jobs))

        # 5. Work.
        load_tars(left, args.preprocessing_num_workers)

        # 6. Write record and card.
        notes = sum_notes([read_notes(job.shard) for job in jobs] + [strays])
        counts = notes["counts"]
        seconds = time.monotonic() - started
        readme = args.output_dir / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.exists() else None
        write_atomically(readme, corpus_card(text, args.target, split))
        record = {
            "status": "complete",
            "settings": settings,
            "clips": counts["clips"],
            "hours": counts["seconds"] / 3600,
            **notes,
            "wall_seconds": seconds,
            "clips_per_second": counts["clips"] / seconds,
            "arguments": vars(args),
            "versions": library_versions("datasets", "huggingface_hub", "pyarrow"),
        }
        write_json(record_path, record)
        print_statistics(**notes)

        # 7. Push.
        if args.push_to_hub:
            push_dataset(
                repository,
                args.output_dir,
                patterns=[f"{args.target}/{split}-*.parquet", record_path.name],
                update_card=partial(corpus_card, config=args.target, split=split),
                message=f"Add {args.target}, {split}",
            )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"stopped. {CONTINUE}", file=sys.stderr)
        sys.exit(130)
