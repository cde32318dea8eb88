#!/usr/bin/env python
"""Initialise a small student Whisper with layers copied from a large teacher.

In: any Whisper checkpoint, a Hub id or a local directory.

Out: `--save_dir`, a local directory with the student's weights and configuration, every file that transformers,
faster-whisper (CTranslate2) and whisper.cpp's converter look for, a model card (`README.md`) and a record of how it
was made (`student.json`).

Layers are copied from positions spaced as far apart as possible: the first and the last, and the rest evenly between
them (DistilBART, https://arxiv.org/abs/2010.13002). A student of one layer gets the teacher's last.

One process is all it needs:

    python create_student_model.py --teacher_checkpoint openai/whisper-large-v3 --encoder_layers 32 \
        --decoder_layers 2 --save_dir my-org/my-model-init

The same from chosen layers, pushed to the Hub as my-org/my-model-init:

    python create_student_model.py --teacher_checkpoint openai/whisper-large-v3 --decoder_layer_indices 0 15 31 \
        --save_dir init --push_to_hub --hub_model_id my-org/my-model-init

The student appears in `--save_dir` only after the saved copy has been loaded back, compared and run once; after an
interruption, run the same command again to continue.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import random
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

import torch
import yaml
from huggingface_hub import HfApi, RepoCard, set_client_factory, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from huggingface_hub.utils._http import default_client_factory
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS
from transformers.utils import cached_file, find_adapter_config_file

RECORD = "student.json"
TRAINING_RECORD = "distillation.json"  # which the training leaves beside a trained model
# The files of a student except its card, to which others may add. The configuration and the record come last,
# because without them nothing takes the directory for a model.
STUDENT_FILES = [
    "model.safetensors",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "normalizer.json",
    "config.json",
    RECORD,
]


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    switch = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher_checkpoint", required=True, help="Hub id or local directory of a Whisper model")
    teacher.add_argument("--subfolder", default="", help="folder of the model inside the teacher's repository")
    teacher.add_argument("--cache_dir", help="directory for downloads; unset = the Hub client's own cache")

    layers = parser.add_argument_group("layers")
    encoder = layers.add_mutually_exclusive_group()
    encoder.add_argument(
        "--encoder_layers", type=int, metavar="N", help="number of encoder layers; unset = all of the teacher's"
    )
    encoder.add_argument(
        "--encoder_layer_indices",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="the teacher's encoder layers to copy, counted from 0; unset = evenly spaced ones",
    )
    decoder = layers.add_mutually_exclusive_group()
    decoder.add_argument("--decoder_layers", type=int, default=2, metavar="N", help="number of decoder layers")
    decoder.add_argument(
        "--decoder_layer_indices",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="the teacher's decoder layers to copy, counted from 0; unset = evenly spaced ones",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--save_dir", required=True, help="local directory for the student; its parents are made")
    output.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float32",
        help="precision of the saved weights; training needs float32",
    )
    output.add_argument(
        "--overwrite_output_dir",
        **switch,
        help="replace another model in --save_dir or in the repository on the Hub",
    )
    output.add_argument("--seed", type=int, default=42, help="seed of the features that the saved student is run on")
    output.add_argument("--dry_run", **switch, help="print what a run would do, and stop")

    hub = parser.add_argument_group("Hugging Face Hub")
    hub.add_argument("--push_to_hub", **switch, help="publish the student")
    hub.add_argument("--hub_model_id", help="repository to push to; unset = --save_dir, if it reads org/name")
    private = switch | {"default": True}
    hub.add_argument(
        "--hub_private_repo", **private, help="make a new repository private; an existing one stays as it is"
    )

    args = parser.parse_args(argv)
    args.hub_model_id = args.hub_model_id or args.save_dir
    if args.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.hub_model_id):
        parser.error(f"--push_to_hub needs --hub_model_id org/name; {args.hub_model_id!r} is not one")
    return args


# ---- common ----------------------------------------------------------------------------------------------------------
# What stands under a banner "common" has the same text in every script that has it. Change it in all of them.

CONTINUE = "Run the same command again to continue."

logger = logging.getLogger(__name__)


def without_password(text: str) -> str:
    """The text without user and password of a URL."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def fail(message: str) -> NoReturn:
    """End the script with one line for the user: what was wrong, with which value, what to do.

    With KOTOBA_TRACEBACK=1 in the environment, the traceback comes before it.
    """
    if os.environ.get("KOTOBA_TRACEBACK"):
        logger.warning("traceback of the error below", exc_info=sys.exc_info()[0] is not None, stack_info=True)
    raise SystemExit(f"{Path(__file__).name}: error: {without_password(message)}")


def boolean(value: str) -> bool:
    """Value of a flag that may stand alone (`--flag`) or carry a value (`--flag False`)."""
    if value.lower() in ("true", "1", "yes"):
        return True
    if value.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of a flag in its help, unless it has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class LastingStream:
    """A text stream that drops what cannot be written any more, because its terminal or its reader has gone."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def set_up_process(is_main_process: bool = True) -> None:
    """Log to stderr, only warnings outside of the main process; turn SIGTERM into SystemExit; outlive the terminal."""
    sys.stdout = LastingStream(sys.stdout)
    sys.stderr = LastingStream(sys.stderr)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    level = logging.INFO if is_main_process else logging.WARNING
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level)
    for noisy in ("httpx2", "httpx", "accelerate"):  # they log every request and every file of a checkpoint
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("datasets").propagate = False  # it has a handler of its own
    logging.getLogger("datasets.builder").setLevel(logging.ERROR)  # it warns of fewer files than processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def hold_lock(path: Path, output: str, *leftovers: str, wait: bool = False) -> Iterator[None]:
    """Let no other run write an output meanwhile. The kernel frees the lock when this process ends, in whatever way.

    Args:
        path: the lock file. Its directory is made.
        output: how a message names what is written.
        leftovers: patterns of the half-written files beside the lock that killed runs have left. They are deleted.
        wait: wait until another run ends, instead of failing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        fail(f"cannot write to {path.parent}: {error}. {CONTINUE}")
    with open(path, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            busy = f"another run is writing {output}: wait until it ends. If its machine was lost, delete {path}"
            if not wait:
                fail(busy)
            logger.warning(busy)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            logger.warning("%s has no file locks: make sure that no other run writes %s", path.parent, output)
        for pattern in leftovers:
            for leftover in path.parent.glob(pattern):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
        yield


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name only when it is complete and on the disk.

    Until then its name has a random part: no other process has it, and no link that somebody has planted is followed.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(unfinished, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file by `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


# ---- common: records -------------------------------------------------------------------------------------------------


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file; what JSON does not know, such as a path, is written as its text."""
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n")


def record_checksum(record: dict) -> str:
    """SHA-256 of a record's content as JSON."""
    return hashlib.sha256(json.dumps(record, default=str).encode()).hexdigest()


def write_record(path: Path, record: dict) -> None:
    """Write a record as JSON, with a checksum by which `read_record` notices damage."""
    write_json(path, record | {"checksum": record_checksum(record)})


def read_record(path: Path) -> dict | None:
    """What `write_record` wrote; None where there is nothing or, with a warning, where it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = record.pop("checksum", None)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # it may be whole
        fail(f"cannot read {path}: {error.strerror}. {CONTINUE}")
    except (ValueError, AttributeError, TypeError):  # it is not JSON, or not an object
        record = None
    if not record or (checksum is not None and checksum != record_checksum(record)):
        logger.warning("%s is damaged: it does not count", path)
        return None
    return record


def shown_name(reference: str | Path) -> str:
    """What others may see of a reference: the last name of a local path, and no user or password of a URL."""
    text = without_password(str(reference))
    path = os.path.abspath(os.path.expanduser(text))
    is_local = text.startswith(("/", "~", ".")) or os.path.exists(path)
    return os.path.basename(path) if text and is_local else text


def shown_arguments(args: argparse.Namespace) -> dict:
    """The arguments for a record, which others may read: paths and URLs as `shown_name` shows them."""
    shown = {}
    for name, value in vars(args).items():
        shown[name] = value
        if isinstance(value, str | Path):  # datasets may be joined by +
            shown[name] = "+".join(map(shown_name, str(value).split("+")))
    return shown


def library_versions(*names: str) -> dict[str, str]:
    """Version of each of these installed packages, for a record."""
    return {name: importlib.metadata.version(name) for name in names}


def changed_setting(earlier: dict, settings: dict) -> str | None:
    """The first setting in which an earlier run differs from this one, for people to read; None where none does."""
    settings = json.loads(json.dumps(settings, default=str))  # as a record gives them back, tuples as lists
    for name, value in settings.items():
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

# RuntimeError: an upload through Xet; JSONDecodeError: a proxy or a login page answers in place of the Hub.
HUB_ERRORS = (OSError, HFValidationError, httpx.HTTPError, RuntimeError, json.JSONDecodeError)
LONGEST_HUB_WAIT = 600  # s


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, without its full stop. The Hub's errors begin with an id."""
    if isinstance(error, json.JSONDecodeError):
        return f"JSON was expected, not {error.doc[:40]!r}"
    for line in str(error).splitlines():
        if line.strip() and not line.startswith("(Request ID"):
            return line.strip().rstrip(".")
    return type(error).__name__


def refuse_long_wait(response: httpx.Response) -> None:
    """Raise where the Hub asks to wait for longer than anybody would; its client would wait for a day."""
    waits = re.findall(r"^\d+$", response.headers.get("Retry-After", ""))
    waits += re.findall(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    seconds = max(map(int, waits), default=0)
    if response.status_code >= 400 and seconds > LONGEST_HUB_WAIT:
        raise OSError(f"the Hub asks to wait for {seconds / 3600:.1f} h (HTTP {response.status_code})")


def make_hub_client() -> httpx.Client:
    """The Hub's own HTTP client, with a bound on waiting."""
    client = default_client_factory()
    client.event_hooks = client.event_hooks | {"response": [refuse_long_wait]}
    return client


def hub_fail(action: str, error: BaseException) -> NoReturn:
    """Fail because the Hub refused something."""
    fail(
        f"{action} failed: {first_line(error)}. Check the name, and the token with `hf auth whoami`; "
        "`hf auth login` sets another token"
    )


def push_with_retries(push: Callable[[], object]) -> None:
    """Push, and retry if another push to the repository came first, which the Hub answers with 409 or 412."""
    for seconds in (1, 2, 4, 0):  # to wait after a try that failed; 0 = it was the last
        try:
            push()
            return
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412) or not seconds:
                raise
        time.sleep(seconds * random.uniform(0.5, 1))


# ---- common: repositories to push to ---------------------------------------------------------------------------------


def prepare_repository(repository: str, repo_type: str, private: bool, dry_run: bool) -> tuple[str, str]:
    """Create a repository if it is missing, and check the right to write to it.

    A dry run creates nothing: it checks the repository, or else whether this token could create it. Audio goes into a
    public repository only with --hub_private_repo False.

    Returns:
        its full id, and whether it is "private" or "public".
    """
    api = HfApi()
    visibilities = {True: "private", False: "public"}
    try:
        if dry_run:
            account = api.whoami()
            repo_id = repository if "/" in repository else f"{account['name']}/{repository}"
            organisations = [organisation["name"] for organisation in account.get("orgs", [])]
            if not api.repo_exists(repo_id, repo_type=repo_type):
                if repo_id.split("/")[0] not in (account["name"], *organisations):
                    fail(f"{account['name']} cannot create {repo_id}: it belongs to somebody else")
                return repo_id, visibilities[private]
        else:
            repo_id = api.create_repo(repository, repo_type=repo_type, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, repo_type=repo_type, write=True)
        is_private = api.repo_info(repo_id, repo_type=repo_type).private
    except HUB_ERRORS as error:
        hub_fail(f"preparing the {repo_type} repository {repository}", error)
    except KeyError as error:  # `create_repo` takes every 409 to say where the repository is
        fail(f"preparing the {repo_type} repository {repository}: the Hub's answer lacks {error}. {CONTINUE}")
    if repo_type == "dataset" and private and not is_private:
        fail(
            f"the dataset repository {repo_id} is public, so everybody would hear its audio: make it private, choose "
            "another, or pass --hub_private_repo False"
        )
    return repo_id, visibilities[is_private]


# ---- common: cards ---------------------------------------------------------------------------------------------------


def read_card(path: Path, place: str | None = None) -> RepoCard | None:
    """The card in a file, None where there is none. Fails in one line, which names `place`, if it cannot be read."""
    if not path.exists():
        return None
    try:
        return RepoCard(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        fail(f"the card of {place or path.parent} cannot be read: {first_line(error)}. Correct it. {CONTINUE}")


def download_card(repository: str, repo_type: str, revision: str | None = None) -> RepoCard | None:
    """The card of a repository on the Hub, None where there is none."""
    try:
        path = HfApi().hf_hub_download(repository, "README.md", repo_type=repo_type, revision=revision)
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):  # not where the Hub did not answer
        return None
    return read_card(Path(path), repository)


def check_cards(
    directory: Path, repository: str | None, repo_type: str, update: Callable[[RepoCard], object] | None = None
) -> None:
    """Try, before the work, what will be done with the cards that are there."""
    try:
        cards = [read_card(directory / "README.md")]
        if repository:
            cards.append(download_card(repository, repo_type))
    except HUB_ERRORS as error:
        hub_fail(f"reading the cards of {directory} and {repository}", error)
    for card in filter(None, cards):
        if update:
            update(card)


def push_card(repository: str, repo_type: str, update: Callable[[RepoCard | None], str], message: str) -> None:
    """Update the card of a repository on the Hub; `update` gives the text for the card there, None if there is none."""
    api = HfApi()

    def push() -> None:
        head = api.repo_info(repository, repo_type=repo_type).sha
        text = update(download_card(repository, repo_type, head))
        api.upload_file(
            repo_id=repository,
            repo_type=repo_type,
            path_or_fileobj=text.encode(),
            path_in_repo="README.md",
            parent_commit=head,
            commit_message=message,
        )

    push_with_retries(push)


# ---- common: card texts ----------------------------------------------------------------------------------------------


def fill_metadata(card: RepoCard, **values: str | list | None) -> None:
    """Add to a card's metadata what they do not have. A value that is there stays, a list gets what it lacks."""
    for name, value in values.items():
        present = card.data.get(name)
        if not present:
            card.data[name] = value
        elif isinstance(value, list):
            present = present if isinstance(present, list) else [present]
            missing = [item for item in value if item not in present]
            card.data[name] = [*present, *missing]


def set_section(card: RepoCard, name: str, section: str) -> None:
    """Put our part into a card, in the place of what an earlier run put there. All else in the card stays."""
    begin = f"<!-- {name}: begin. What stands up to its end is replaced by the next run. -->"
    end = f"<!-- {name}: end -->"
    part = f"{begin}\n\n{section.replace('<!--', '&lt;!--').strip()}\n\n{end}"
    earlier = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if earlier.search(card.text):
        card.text = earlier.sub(lambda _: part, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{part}\n"


# ---- common: models --------------------------------------------------------------------------------------------------

ENGLISH_ONLY_END = 50256  # <|endoftext|> in GPT-2's vocabulary, which only English-only Whispers (`*.en`) have
TIMESTAMPS = 1501  # <|0.00|> to <|30.00|>, behind <|notimestamps|>; tokens behind these were added later and are text
ENCODER_POSITIONS = 1500  # of the 30 s that every Whisper hears at a time
LFS_POINTER = b"version https://git-lfs"  # the start of what `git clone` writes without Git LFS
GET_LFS_FILES = "a pointer of Git LFS: get the file itself by `git lfs pull`, or all files by `hf download`"


def local_directory(reference: str) -> Path | None:
    """The directory that a repository reference names, or None for a Hub id (`org/name`). Fails if it is neither."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        fail(f"{reference!r} is neither a directory that exists nor a Hub id such as org/name")
    return None


def is_pointer(path: Path) -> bool:
    """Whether a file is only a pointer of Git LFS."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def load_pretrained(kind: type, reference: str, **options) -> Any:
    """`kind.from_pretrained` of a local directory or a Hub id. Fails in one line that says why."""
    # Otherwise `transformers` asks a Space to open a pull request at a repository that has no safetensors.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    directory = local_directory(reference)
    try:
        return kind.from_pretrained(str(directory or reference), **options)
    except (*HUB_ERRORS, ValueError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        # The last three are weights that were cut off, that are damaged, and that would run code.
        remedy = "It may be damaged" if directory else "A private one needs `hf auth login`"
        files = sorted(directory.iterdir()) if directory else []
        if pointer := next((file for file in files if file.is_file() and is_pointer(file)), None):
            remedy = f"{pointer.name} is {GET_LFS_FILES}"
        fail(f"cannot load the model {reference}: {first_line(error)}. {remedy}")


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_damaged_model(directory: Path) -> None:
    """Fail where a file of a student, before or after training, is not the one that its record tells of."""
    hashes: dict[str, list[str]] = {}
    for record_name in ("student.json", "distillation.json"):
        record = read_record(directory / record_name) or {}
        for name, hashed in record.get("files", {}).items():
            hashes.setdefault(name, []).append(hashed)
    for name, expected in hashes.items():
        path = directory / name
        if path.suffix not in (".safetensors", ".json", ".txt") or not path.exists():
            continue
        try:
            hashed = file_hash(path)
        except OSError as error:  # it may be whole
            fail(f"cannot read {path}: {error.strerror}. {CONTINUE}")
        if hashed not in expected:
            fail(
                f"{path} is damaged, or was changed: run the command that wrote it again, or, if it is meant to be as "
                "it is, delete student.json or distillation.json beside it"
            )


def load_config(reference: str, **options) -> WhisperConfig:
    """The configuration of a Whisper; fails for models of other kinds and for damaged ones."""
    directory = local_directory(reference)
    if directory:
        refuse_damaged_model(directory / options.get("subfolder", ""))
    with contextlib.suppress(*HUB_ERRORS):  # `load_pretrained` below reports them
        if find_adapter_config_file(str(directory or reference), **options):
            fail(
                f"{reference} has an adapter_config.json: an adapter (LoRA) has to be merged into its model first. "
                "Load it with PEFT, call `merge_and_unload()`, and save model and processor in a directory of their own"
            )
    config = load_pretrained(AutoConfig, reference, **options)
    if config.model_type != "whisper":
        fail(f"{reference} is a {config.model_type} model, not a Whisper")
    return config


def load_tokenizer(reference: str, **options) -> WhisperTokenizerFast:
    """The tokenizer of a Whisper. Without its files, `transformers` silently makes one with an empty vocabulary."""
    tokenizer = load_pretrained(WhisperTokenizerFast, reference, **options)
    # "a" as well: with tokenizer_config.json alone there are the special tokens, and no others.
    if not {"a", "<|startoftranscript|>", "<|notimestamps|>"} <= tokenizer.get_vocab().keys():
        fail(
            f"{reference} lacks the files of its tokenizer: tokenizer.json, or vocab.json and merges.txt. "
            "Copy them from the model that it was trained from"
        )
    return tokenizer


def refuse_other_sizes(
    reference: str, config: WhisperConfig, vocabulary: dict[str, int], extractor: WhisperFeatureExtractor
) -> None:
    """Fail where tokenizer or feature extractor are not of the model that config.json describes."""
    num_ids = 1 + max(*vocabulary.values(), vocabulary["<|notimestamps|>"] + TIMESTAMPS)
    if config.vocab_size > num_ids and config.vocab_size % 8 == 0:
        num_ids = config.vocab_size  # padded for the sake of speed
    sizes = {
        "vocab_size": ("the tokenizer's ids", num_ids),
        "num_mel_bins": ("the feature extractor's mel bins", extractor.feature_size),
        "max_source_positions": ("the encoder's positions", ENCODER_POSITIONS),
    }
    for key, (name, expected) in sizes.items():
        actual = getattr(config, key)
        if actual != expected:
            fail(f"{reference} has files of several models: {name} are {expected}, {key} in config.json is {actual}")


def is_multilingual(vocabulary: dict[str, int]) -> bool:
    """Whether a Whisper with this vocabulary takes a language and a task."""
    return "<|transcribe|>" in vocabulary and vocabulary["<|endoftext|>"] != ENGLISH_ONLY_END


# ---- common: saving models -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def saving_models() -> Iterator[None]:
    """Raise an OSError where torch (RuntimeError) or tokenizers (Exception) cannot write, as on a full disk."""
    try:
        yield
    except Exception as error:
        is_full_disk = re.search(r"PytorchStreamWriter|inline_container|iostream|os error", str(error))
        if isinstance(error, OSError) or not is_full_disk:
            raise
        raise OSError(errno.EIO, f"writing failed, perhaps on a full disk: {first_line(error)}") from None


# ---- common: weights and decoding ------------------------------------------------------------------------------------

# What is taken over from generation_config.json. How to search and what to return is up to the flags of each script.
DECODING_RULES = (
    "alignment_heads",
    "begin_suppress_tokens",
    "bos_token_id",
    "max_initial_timestamp_index",
    "no_repeat_ngram_size",
    "pad_token_id",
    "repetition_penalty",
    "suppress_tokens",
)


def load_generation_config(
    reference: str, config: WhisperConfig, vocabulary: dict[str, int], **options
) -> GenerationConfig:
    """How a model decodes: the rules of its file, and what follows from its vocabulary and its configuration.

    The file may be missing, as in 2022, lack most of this, or have settings that `transformers` 5 refuses.
    """
    source = str(local_directory(reference) or reference)
    try:
        path = cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False, **options)
        stored = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError) as error:  # a damaged file, or a Hub that does not answer
        fail(f"cannot load the generation config of {reference}: {first_line(error)}")
    positions = config.max_target_positions
    values = {"max_initial_timestamp_index": 50}  # the first timestamp is at most 1 s, as in openai/whisper
    for name in DECODING_RULES:
        value = stored.get(name, getattr(config, name, None))
        if value is not None:
            values[name] = value
    values |= {
        "decoder_start_token_id": vocabulary["<|startoftranscript|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "is_multilingual": is_multilingual(vocabulary),
        "max_length": min(stored.get("max_length") or positions, positions),
        "no_timestamps_token_id": vocabulary["<|notimestamps|>"],
        "prev_sot_token_id": vocabulary.get("<|startofprev|>"),
        "return_timestamps": False,
    }
    if is_multilingual(vocabulary):
        tokens = [f"<|{code}|>" for code in LANGUAGES]
        values["lang_to_id"] = {token: vocabulary[token] for token in tokens if token in vocabulary}
        values["task_to_id"] = {task: vocabulary[f"<|{task}|>"] for task in TASK_IDS}
    return GenerationConfig(**values)


def load_whisper(reference: str, generation_config: GenerationConfig, **options) -> WhisperForConditionalGeneration:
    """A Whisper with all of its weights: `transformers` fills in random ones for those that are missing, and warns."""
    model, report = load_pretrained(
        WhisperForConditionalGeneration,
        reference,
        generation_config=generation_config,  # otherwise the one that is stored is loaded, which may be refused
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report instead of an error that does not name them
        **options,
    )
    problems = {
        "lack": report["missing_keys"],
        "have another shape of": {name for name, *_ in report["mismatched_keys"]},
        "have, and config.json does not know,": report["unexpected_keys"],
    }
    for problem, names in problems.items():
        if names:
            fail(f"the weights of {reference} {problem} {min(names)} and {len(names) - 1} more tensors")
    model.config.forced_decoder_ids = None  # models of 2022 have these in place of language and task
    return model


# ---- layers ----------------------------------------------------------------------------------------------------------


def spaced_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher's layers that a student of this depth copies: `linspace(0, teacher_layers - 1, student_layers)`.

    Rounded down in integers: floating point lands just below some whole numbers (the twelfth of 23 from 31 layers
    would be 14 instead of 15). The last is always the teacher's last, also for a student of one layer.
    """
    if student_layers == 1:
        return [teacher_layers - 1]
    return [i * (teacher_layers - 1) // (student_layers - 1) for i in range(student_layers)]


def choose_layers(args: argparse.Namespace, side: str, teacher_layers: int) -> list[int]:
    """The teacher's layers to copy into the student's encoder or decoder (`side`), checked."""
    count = getattr(args, f"{side}_layers")
    indices = getattr(args, f"{side}_layer_indices")
    if indices is not None:
        if sorted(set(indices)) != indices or indices[0] < 0 or indices[-1] >= teacher_layers:
            fail(f"--{side}_layer_indices {indices} must ascend without repeats within 0 to {teacher_layers - 1}")
        return indices
    if count is None:
        return list(range(teacher_layers))
    if not 1 <= count <= teacher_layers:
        fail(f"--{side}_layers {count} must lie between 1 and the teacher's {teacher_layers}")
    return spaced_layers(teacher_layers, count)


def remap_alignment_heads(heads: list[list[int]] | None, decoder_layers: list[int], num_heads: int) -> list[list[int]]:
    """The `[layer, head]` pairs that word timestamps are read from, renumbered to the student's layers.

    Heads of layers that were not copied are dropped. Where none is left, or the teacher names none, all heads of the
    last half of the layers are used, as openai/whisper does for a model that it does not know.
    """
    kept = []
    for layer, head in heads or []:
        if layer in decoder_layers:
            kept.append([decoder_layers.index(layer), head])
    if kept:
        return kept
    depth = len(decoder_layers)
    last_half = range(depth // 2, depth)
    return [[layer, head] for layer in last_half for head in range(num_heads)]


# ---- student ---------------------------------------------------------------------------------------------------------


def fetch_teacher(reference: str, cache_dir: str | None) -> tuple[Path, str | None]:
    """The teacher's directory, and its commit on the Hub, None for a local teacher.

    Everything but the weights is downloaded from the Hub here.
    """
    directory = local_directory(reference)
    if directory is not None:
        return directory, None
    try:
        small_files = ["*.json", "*.txt", "README.md"]
        directory = Path(snapshot_download(reference, allow_patterns=small_files, cache_dir=cache_dir))
    except HUB_ERRORS as error:
        hub_fail(f"downloading the teacher {reference}", error)
    return directory, directory.name  # the Hub client names the directory of a download after its commit


def load_processor(folder: Path, config: WhisperConfig, reference: str) -> WhisperProcessor:
    """The teacher's tokenizer and feature extractor, which must be of the size that `config` says."""
    extractor = load_pretrained(WhisperFeatureExtractor, str(folder))
    tokenizer = load_tokenizer(str(folder))
    refuse_other_sizes(reference, config, tokenizer.get_vocab(), extractor)
    return WhisperProcessor(extractor, tokenizer)


def make_student(
    args: argparse.Namespace, generation_config: GenerationConfig, layers: dict[str, list[int]], commit: str | None
) -> WhisperForConditionalGeneration:
    """The teacher without the layers that are not in `layers`: all is copied. `generation_config` is the teacher's.

    Another initialisation of tensors belongs here, and what chooses it into the `settings` of `main`.
    """
    student = load_whisper(
        args.teacher_checkpoint,
        generation_config,
        subfolder=args.subfolder,
        revision=commit or "main",
        cache_dir=args.cache_dir,
        dtype=getattr(torch, args.dtype),
    )
    for side, chosen in layers.items():
        stack = getattr(student.model, side)
        stack.layers = torch.nn.ModuleList(stack.layers[layer] for layer in chosen)
        setattr(student.config, f"{side}_layers", len(chosen))
    teacher_heads = getattr(generation_config, "alignment_heads", None)
    num_heads = student.config.decoder_attention_heads
    heads = remap_alignment_heads(teacher_heads, layers["decoder"], num_heads)
    student.generation_config.alignment_heads = heads
    return student


def count_parameters(config: WhisperConfig) -> int:
    """The number of a model's parameters, without its weights."""
    with torch.device("meta"):  # shapes without memory
        return WhisperForConditionalGeneration(config).num_parameters()


def fingerprint(student: WhisperForConditionalGeneration, tokenizer: WhisperTokenizerFast) -> str:
    """SHA-256 over what makes a student: how it decodes, its vocabulary, and its tensors with names and types."""
    decoding = student.generation_config.to_diff_dict()
    decoding["transformers_version"] = None
    digest = hashlib.sha256(json.dumps([decoding, tokenizer.get_vocab()], sort_keys=True).encode())
    for name, tensor in sorted(student.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_saved(directory: Path, expected: str) -> None:
    """Load a saved student, compare its fingerprint with the expected one, and run it once on random features."""
    student = load_pretrained(WhisperForConditionalGeneration, str(directory)).eval()
    if fingerprint(student, load_tokenizer(str(directory))) != expected:
        fail(f"{directory} has another student than this teacher gives; --overwrite_output_dir replaces it")
    shape = (1, student.config.num_mel_bins, 2 * student.config.max_source_positions)  # (batch, mels, frames)
    features = torch.randn(shape, dtype=student.dtype)
    start = torch.tensor([[student.config.decoder_start_token_id]])
    with torch.inference_mode():
        logits = student(features, decoder_input_ids=start).logits
    if not logits.isfinite().all():
        fail(f"the student's output in {student.dtype} is not finite; choose another --dtype")


# ---- files, record, card, push ---------------------------------------------------------------------------------------


def has_student(save_dir: Path, settings: dict) -> bool:
    """Whether `save_dir` has a student of these settings. Fails for anything else that a run would overwrite."""
    present = [name for name in STUDENT_FILES if (save_dir / name).exists()]
    if not present:
        return False
    if RECORD not in present:
        fail(f"{save_dir} has a {present[0]} that this script did not write; --overwrite_output_dir replaces it")
    record = read_record(save_dir / RECORD)
    if record is None:  # damaged: `is_undamaged` looks at the student itself
        return True
    refuse_other_settings(save_dir, record["settings"], settings)
    return record["status"] == "complete"


def refuse_other_model(repository: str, settings: dict) -> None:
    """Fail where a repository on the Hub holds another model than a student of these settings: a trained one, say."""
    api = HfApi()
    try:
        files = api.list_repo_files(repository) if api.repo_exists(repository) else []
        record = {}
        if RECORD in files and TRAINING_RECORD not in files:
            record = read_record(Path(api.hf_hub_download(repository, RECORD)))
    except HUB_ERRORS as error:
        hub_fail(f"reading {repository}", error)
    weights = [name for name in files if "/" not in name and name.endswith((".safetensors", ".bin"))]
    if weights and not record:
        fail(f"{repository} has a {weights[0]} that this script did not write; --overwrite_output_dir replaces it")
    if record:
        refuse_other_settings(Path(repository), record["settings"], settings)


def can_be_read(path: Path) -> bool:
    """Whether a student's file is there and has the format that its name says."""
    try:
        path.open("rb").close()  # without permission to read it, safetensors says that there is no file
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            json.loads(text)
        return bool(text) and "\0" not in text
    except (FileNotFoundError, SafetensorError, ValueError):
        return False
    except OSError as error:  # it may be whole
        fail(f"cannot read {path}: {error.strerror}. {CONTINUE}")


def is_undamaged(save_dir: Path, expected: str) -> bool:
    """Whether all files of the student in `save_dir` are as they were written; `expected` is its fingerprint.

    Fails for a file with other contents that can be read: somebody may have changed it on purpose.
    """
    record = read_record(save_dir / RECORD) or {}
    hashes = record.get("files", {})
    damaged = [name for name in (*hashes, "README.md") if not can_be_read(save_dir / name)]
    for name, hashed in hashes.items():
        if name not in damaged and file_hash(save_dir / name) != hashed:
            fail(f"{save_dir / name} is not as it was written; --overwrite_output_dir makes it again")
    if damaged:
        logger.warning("%s has damaged files, and is made again: %s", save_dir, ", ".join(damaged))
        return False
    check_saved(save_dir, expected)
    return bool(record)  # without a whole record, the student is written again


def save_tokenizer_files(processor: WhisperProcessor, directory: Path) -> None:
    """Save a processor with the files that CTranslate2, whisper.cpp and transformers 4 look for as well."""
    tokenizer = processor.tokenizer
    processor.save_pretrained(directory)
    processor.feature_extractor.save_pretrained(directory)  # preprocessor_config.json
    tokenizer.backend_tokenizer.model.save(str(directory))  # vocab.json and merges.txt
    write_json(directory / "added_tokens.json", tokenizer.get_added_vocab())
    write_json(directory / "special_tokens_map.json", tokenizer.special_tokens_map)
    if tokenizer.english_spelling_normalizer is not None:
        write_json(directory / "normalizer.json", tokenizer.english_spelling_normalizer)
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])  # transformers 4 fails over 5's name
    write_json(directory / "tokenizer_config.json", config)


def licence_of(card: Path) -> str | None:
    """The licence that the teacher's card names. A card that cannot be read is no error: it is not the user's."""
    try:
        return RepoCard(card.read_text(encoding="utf-8-sig")).data.get("license")
    except (OSError, yaml.YAMLError, ValueError, TypeError):
        return None


def student_card(record: dict, card: RepoCard | None) -> str:
    """README.md: where the student comes from, what it is made of and how, beside what others wrote into `card`."""
    settings = record["settings"]
    teacher = settings["teacher_checkpoint"]
    commit = record["teacher_commit"]
    licence = record["teacher_licence"]
    card = card or RepoCard("---\n{}\n---\n# A Whisper student before training\n")
    fill_metadata(
        card,
        license=licence or "unknown",
        base_model=teacher if commit else None,  # a local directory means nothing to the Hub
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "distillation", "student-initialisation"],
    )
    source = teacher
    if commit:
        source = f"[{teacher}](https://huggingface.co/{teacher}) at commit {commit}"
    rows = ""
    for side, depth in record["teacher_layers"].items():
        copied = settings[f"{side}_layer_indices"]
        rows += f"| {side} layers | {depth} | {len(copied)} | {' '.join(map(str, copied))} |\n"
    section = f"""A Whisper student before training. Its layers are copied from {source}. It is the start of a
distillation: untrained, it does not transcribe.

| | teacher | student | student's layers are the teacher's (counted from 0) |
| --- | --- | --- | --- |
{rows}| parameters | {record["parameters"]["teacher"]:,} | {record["parameters"]["student"]:,} | |

Embeddings, positions, convolutions, final norms and output projection are the teacher's too, and every tensor equals
the teacher's as {settings["dtype"]}. The alignment heads of word timestamps (layer, head):
{" ".join(f"({layer}, {head})" for layer, head in record["alignment_heads"])}.

Licence of the teacher: {licence or "unknown (its model card names none)"}.

Made by `create_student_model.py`; `{RECORD}` has its arguments.
"""
    set_section(card, "model", section)
    return str(card)


def put_in_place(partial: Path, save_dir: Path, record: dict) -> None:
    """Put the finished student in place: in one step, or file by file where `save_dir` holds other things as well."""
    shutil.copymode(partial / "config.json", partial / "model.safetensors")  # safetensors makes its files private
    for path in [*partial.iterdir(), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if not save_dir.exists():
        os.replace(partial, save_dir)
        return
    write_record(save_dir / RECORD, {**record, "status": "running"})
    for name in reversed(STUDENT_FILES[:-1]):  # the configuration first; the record stays, and says "running"
        (save_dir / name).unlink(missing_ok=True)
    for name in ["README.md", *STUDENT_FILES]:
        if (partial / name).exists():
            shutil.move(partial / name, save_dir / name)


def write_student(
    student: WhisperForConditionalGeneration, processor: WhisperProcessor, save_dir: Path, record: dict, started: float
) -> None:
    """Save the student beside `save_dir`, load the copy back and run it, and only then put it in place."""
    partial = save_dir.with_name(f".{save_dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with saving_models():
            student.save_pretrained(partial)
            save_tokenizer_files(processor, partial)
        check_saved(partial, record["fingerprint"])
        write_atomically(partial / "README.md", student_card(record, read_card(save_dir / "README.md")))
        record["files"] = {path.name: file_hash(path) for path in sorted(partial.iterdir()) if path.suffix != ".md"}
        record["wall_time_s"] = round(time.monotonic() - started, 1)
        write_record(partial / RECORD, record)
        put_in_place(partial, save_dir, record)
    except (OSError, SafetensorError) as error:
        fail(f"cannot write the student to {save_dir}: {error}. {CONTINUE}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def push_student(save_dir: Path, repository: str, record: dict) -> None:
    """Upload the student, but no other files of its directory."""
    api = HfApi()
    try:
        # The training's record goes: it would tell of a model that is replaced here.
        upload = functools.partial(
            api.upload_folder, repo_id=repository, folder_path=save_dir, delete_patterns=[TRAINING_RECORD]
        )
        for patterns in ([RECORD], STUDENT_FILES):  # the record says what the rest is, also if the push is cut off
            push_with_retries(functools.partial(upload, allow_patterns=patterns))
        local_card = read_card(save_dir / "README.md")
        push_card(repository, "model", lambda card: student_card(record, card or local_card), "Describe the student")
    except HUB_ERRORS as error:
        reason = first_line(error)
        fail(f"the student is complete in {save_dir}, but the push to {repository} failed: {reason}. {CONTINUE}")
    logger.info("pushed to %s/%s", without_password(api.endpoint), repository)


def print_student_plan(
    args: argparse.Namespace, config: WhisperConfig, layers: dict, exists: bool, pushes: str
) -> None:
    """Say what a run would read, write and push. `config` is the teacher's and becomes the student's."""
    size = count_parameters(config) * (config.dtype or torch.float32).itemsize / 1e9
    print(f"input: {args.teacher_checkpoint}, {size:,.3f} GB of weights")
    for side, chosen in layers.items():
        setattr(config, f"{side}_layers", len(chosen))
    size = count_parameters(config) * getattr(torch, args.dtype).itemsize / 1e9
    done = written = pushed = "nothing"
    if exists:
        done = "the student is there and would be checked"
    else:
        written = f"{args.save_dir}, about {size:,.3f} GB"
    if args.push_to_hub:
        pushed = f"{pushes}, about {size:,.3f} GB"
    print(f"done: {done}")
    print(f"writes: {written}")
    print(f"pushes: {pushed}")


# ---- main ------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    # 1. Set up.
    args = parse_args(argv)
    set_up_process()
    set_client_factory(make_hub_client)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    save_dir = Path(args.save_dir).expanduser().resolve()

    # 2. Refuse what can be refused.
    if save_dir.exists() and not save_dir.is_dir():
        fail(f"--save_dir {args.save_dir} is not a directory")
    repository = visibility = None
    if args.push_to_hub:
        repository, visibility = prepare_repository(args.hub_model_id, "model", args.hub_private_repo, args.dry_run)
    teacher, commit = fetch_teacher(args.teacher_checkpoint, args.cache_dir)
    check_cards(save_dir, repository, "model")
    folder = teacher / args.subfolder
    if folder.resolve() == save_dir:
        fail(f"--save_dir {args.save_dir} is the teacher's own directory")

    # 3. Load.
    config = load_config(str(folder))
    processor = load_processor(folder, config, args.teacher_checkpoint)
    generation_config = load_generation_config(str(folder), config, processor.tokenizer.get_vocab())
    depths = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    layers = {side: choose_layers(args, side, depth) for side, depth in depths.items()}

    # 4. Find what is left to do.
    settings = {
        "teacher_checkpoint": shown_name(args.teacher_checkpoint),
        "subfolder": args.subfolder,
        "dtype": args.dtype,
        "encoder_layer_indices": layers["encoder"],
        "decoder_layer_indices": layers["decoder"],
    }
    if repository and not args.overwrite_output_dir:
        refuse_other_model(repository, settings)
    lock = hold_lock(save_dir.with_name(f".{save_dir.name}.lock"), str(save_dir), f".{save_dir.name}.partial")
    with contextlib.nullcontext() if args.dry_run else lock:
        exists = not args.overwrite_output_dir and has_student(save_dir, settings)
        if args.dry_run:
            print_student_plan(args, config, layers, exists, f"{repository} ({visibility})")
            return 0

        # 5. Work. A student that exists is made too: `is_undamaged` compares their fingerprints.
        student = make_student(args, generation_config, layers, commit)

        # 6. Write record and card.
        record = {
            "status": "complete",
            "settings": settings,
            "teacher_commit": commit,
            "teacher_licence": licence_of(teacher / "README.md"),
            "teacher_layers": depths,
            "parameters": {"teacher": count_parameters(config), "student": student.num_parameters()},
            "alignment_heads": student.generation_config.alignment_heads,
            "fingerprint": fingerprint(student, processor.tokenizer),
            "arguments": shown_arguments(args),
            "versions": library_versions("torch", "transformers", "safetensors"),
        }
        exists = exists and is_undamaged(save_dir, record["fingerprint"])
        if not exists:
            write_student(student, processor, save_dir, record, started)
        place = f"was already in {save_dir}" if exists else f"is in {save_dir}"
        logger.info("the student of the layers %s %s", layers, place)

        # 7. Push.
        if repository:
            push_student(save_dir, repository, record)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"stopped. {CONTINUE}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an exception while Python shuts down would print a traceback
