#!/usr/bin/env python
"""Initialise a small student Whisper with layers copied from a large teacher.

In: any Whisper checkpoint, a Hub id or a local directory. Its weights are read once, tensor by tensor.

Out: `--save_dir`, a local directory with the student's weights and configuration, every file that transformers,
faster-whisper (CTranslate2) and whisper.cpp's converter look for, a model card (`README.md`) and a record of how it
was made (`student.json`). It appears only after the saved copy has been loaded back, compared and run once.

Layers are copied from positions spaced as far apart as possible: the first and the last, and the rest evenly between
them (DistilBART, https://arxiv.org/abs/2010.13002). A student of one layer gets the teacher's last.

One process is all it needs:

    python create_student_model.py --teacher_checkpoint openai/whisper-large-v3 --encoder_layers 32 \
        --decoder_layers 2 --save_dir my-org/my-model-init

The same from chosen layers, pushed to the Hub as my-org/my-model-init:

    python create_student_model.py --teacher_checkpoint openai/whisper-large-v3 --decoder_layer_indices 0 15 31 \
        --save_dir init --push_to_hub --hub_model_id my-org/my-model-init
"""

import argparse
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS

logger = logging.getLogger(__name__)

RECORD = "student.json"
# Everything that this script writes into --save_dir. The configuration and the record come last: without them nothing
# takes the directory for a model.
OWN_FILES = [
    *("model.safetensors", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "normalizer.json", "README.md", "config.json", RECORD),
]
# The first of these that a repository has is read. The value matches the files that the name stands for.
WEIGHTS = {
    "model.safetensors": "model.safetensors",
    "model.safetensors.index.json": "model-*.safetensors",
    "pytorch_model.bin": "pytorch_model.bin",
    "pytorch_model.bin.index.json": "pytorch_model-*.bin",
}
SAMPLE = 64 << 20  # bytes that --dry_run writes to a temporary file
ENGLISH_ONLY_END = 50256  # <|endoftext|> in GPT-2's vocabulary, which only the English-only Whispers (`*.en`) use
HUB_ERRORS = (OSError, HFValidationError, httpx.HTTPError, RuntimeError)  # RuntimeError: Xet's uploads


def spaced_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher's layers that a student of this depth copies: `linspace(0, teacher_layers - 1, student_layers)`.

    Rounded down in integers: floating point lands just below some whole numbers (the twelfth of 23 from 31 layers
    would be 14 instead of 15). The last is always the teacher's last, also for a student of one layer.
    """
    if student_layers == 1:
        return [teacher_layers - 1]
    return [i * (teacher_layers - 1) // (student_layers - 1) for i in range(student_layers)]


def teacher_name(student_name: str, layers: dict[str, list[int]]) -> str:
    """The teacher's name of a student's tensor: the same, but for the number of the layer."""
    match = re.match(r"model\.(encoder|decoder)\.layers\.(\d+)", student_name)
    if match is None:
        return student_name
    return f"model.{match[1]}.layers.{layers[match[1]][int(match[2])]}{student_name[match.end() :]}"


def remap_alignment_heads(heads: list[list[int]] | None, decoder_layers: list[int], width: int) -> list[list[int]]:
    """The `[layer, head]` pairs that word timestamps are read from, renumbered to the student's layers.

    Heads of layers that were not copied are dropped. Where none is left, or the teacher names none, all `width` heads
    of the last half of the layers are used, as openai/whisper does for a model that it does not know.
    """
    kept = [[decoder_layers.index(layer), head] for layer, head in heads or [] if layer in decoder_layers]
    depth = len(decoder_layers)
    return kept or [[layer, head] for layer in range(depth // 2, depth) for head in range(width)]


def fingerprint(student: WhisperForConditionalGeneration, processor: WhisperProcessor) -> str:
    """SHA-256 over what makes a student: how it decodes, its vocabulary, and its tensors with names and types."""
    decoding = {**student.generation_config.to_diff_dict(), "transformers_version": None}
    digest = hashlib.sha256(json.dumps([decoding, processor.tokenizer.get_vocab()], sort_keys=True).encode())
    for name, tensor in sorted(student.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def boolean(value: str) -> bool:
    """Value of a flag that may stand alone (`--flag`) or carry a value (`--flag False`)."""
    if value.lower() in ("true", "1", "yes"):
        return True
    if value.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{value!r} is neither True nor False")


def fail(message: str) -> NoReturn:
    """End the script with one line for the user: what was wrong, with which value, what to do."""
    raise SystemExit(f"{Path(__file__).name}: error: {message}")


def hub_fail(action: str, error: Exception) -> NoReturn:
    """End the script because the Hub refused something, with the commands that may help."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("(Request ID")]
    reason = lines[0] if lines else type(error).__name__
    fail(f"{action} failed: {reason} Check name, connection and token (`hf auth login`); the same command tries again.")


def local_directory(reference: str) -> Path | None:
    """The directory that a repository reference names, or None where it is a Hub id (`org/name`)."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        fail(f"{reference!r} is neither a directory that exists nor a Hub id such as org/name")
    return None


def fetch_teacher(reference: str, subfolder: str, cache_dir: str | None, weights: bool) -> tuple[Path, str | None]:
    """The directory of the teacher's repository and its commit on the Hub. Of its weights one form is downloaded."""
    directory = local_directory(reference)
    if directory is not None:
        return directory, None
    try:
        small = ["*.json", "*.txt", "README.md"]
        directory = Path(snapshot_download(reference, allow_patterns=small, cache_dir=cache_dir))
        for name, pattern in WEIGHTS.items() if weights else ():
            if name.endswith(".index.json") and not (directory / subfolder / name).exists():
                continue
            wanted = str(Path(subfolder, pattern))
            snapshot_download(reference, revision=directory.name, allow_patterns=wanted, cache_dir=cache_dir)
            if (directory / subfolder / name).exists():
                break
    except HUB_ERRORS as error:
        hub_fail(f"downloading the teacher {reference}", error)
    return directory, directory.name


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint one after another, mapped from its files rather than read into memory at once."""
    files = [name for name in WEIGHTS if (folder / name).is_file()][:1]
    if not files:
        fail(f"{folder} has no weights: one of {', '.join(WEIGHTS)} must be there")
    if files[0].endswith(".index.json"):
        files = sorted(set(json.loads((folder / files[0]).read_text(encoding="utf-8"))["weight_map"].values()))
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(folder / file, framework="pt") as tensors:
                yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
        else:
            try:
                tensors = torch.load(folder / file, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                fail(f"{folder / file} can't be read as tensors: {str(error).splitlines()[0]}")
            yield from tensors.items()


def choose_layers(side: str, teacher_layers: int, count: int | None, indices: list[int] | None) -> list[int]:
    """The teacher's layers to copy into the student's encoder or decoder (`side`), checked."""
    if indices is None:
        count = teacher_layers if count is None else count
        if not 1 <= count <= teacher_layers:
            fail(f"--{side}_layers {count} must lie between 1 and the teacher's {teacher_layers}")
        return spaced_layers(teacher_layers, count)
    if sorted(set(indices)) != indices or indices[0] < 0 or indices[-1] >= teacher_layers:
        fail(f"--{side}_layer_indices {indices} must ascend without repeats within 0 to {teacher_layers - 1}")
    return indices


def remapped_generation_config(folder: Path, config: WhisperConfig, vocabulary: dict, layers: list) -> GenerationConfig:
    """The generation config of the teacher in `folder` with its alignment heads remapped to the decoder's `layers`.

    What decoding looks up in it today, and checkpoints of 2022 do not have yet, is added from the vocabulary.
    """
    if (folder / "generation_config.json").is_file():
        generation_config = GenerationConfig.from_pretrained(folder)
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        known = {name: getattr(config, name) for name in (*names, "suppress_tokens", "begin_suppress_tokens")}
        generation_config = GenerationConfig(max_length=config.max_target_positions, **known)
    languages = {token: vocabulary[token] for code in LANGUAGES if (token := f"<|{code}|>") in vocabulary}
    additions = {
        "is_multilingual": bool(languages) and vocabulary["<|endoftext|>"] != ENGLISH_ONLY_END,
        "max_initial_timestamp_index": 50,  # the first timestamp is at most 1 s, as in openai/whisper
        "no_timestamps_token_id": vocabulary.get("<|notimestamps|>"),
        "prev_sot_token_id": vocabulary.get("<|startofprev|>"),
    }
    if getattr(generation_config, "is_multilingual", additions["is_multilingual"]):
        additions |= {"lang_to_id": languages, "task_to_id": {task: vocabulary[f"<|{task}|>"] for task in TASK_IDS}}
    for name, value in additions.items():
        if getattr(generation_config, name, None) is None:
            setattr(generation_config, name, value)
    heads = getattr(generation_config, "alignment_heads", None)
    generation_config.alignment_heads = remap_alignment_heads(heads, layers, config.decoder_attention_heads)
    return generation_config


def empty_model(config: WhisperConfig) -> WhisperForConditionalGeneration:
    """A model of this configuration with shapes but no memory."""
    with torch.device("meta"):
        return WhisperForConditionalGeneration(config)


def build_student(config: WhisperConfig, folder: Path, layers: dict, dtype: torch.dtype) -> torch.nn.Module:
    """A student of this configuration with the tensors of the teacher in `folder` and its `layers`, as `dtype`."""
    student = empty_model(config)
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["proj_out.weight"]  # the same tensor as the embedding
    student_names = {teacher_name(name, layers): name for name in shapes}
    state = {}
    for stored_name, tensor in read_tensors(folder):
        # checkpoints saved from a bare WhisperModel lack the prefix
        target = student_names.get(stored_name, student_names.get(f"model.{stored_name}"))
        if target is not None and tensor.shape == shapes[target]:
            state[target] = tensor.to(dtype, copy=True)
    missing = sorted(teacher_name(name, layers) for name in shapes.keys() - state.keys())
    if missing:
        fail(f"the weights in {folder} lack {missing[0]} and {len(missing) - 1} more, or their shapes differ")
    student.load_state_dict(state, strict=False, assign=True)
    student.tie_weights()
    return student


def save_tokenizer_files(processor: WhisperProcessor, directory: Path) -> None:
    """Save a processor with the files that CTranslate2, whisper.cpp and transformers 4 look for as well."""
    tokenizer = processor.tokenizer
    processor.save_pretrained(directory)
    processor.feature_extractor.save_pretrained(directory)  # preprocessor_config.json
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["additional_special_tokens"] = config.pop("extra_special_tokens", [])  # transformers 4 fails over 5's name
    contents = {
        "vocab": model["vocab"],
        "added_tokens": tokenizer.get_added_vocab(),
        "normalizer": tokenizer.english_spelling_normalizer,
        "special_tokens_map": tokenizer.special_tokens_map,
        "tokenizer_config": config,
    }
    for name, content in contents.items():
        if content is not None:
            text = json.dumps(content, ensure_ascii=False, indent=2)
            (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def check_saved(directory: Path, expected: str, seed: int) -> None:
    """Load a saved student, compare its fingerprint with the expected one, and run it once on random features."""
    student = WhisperForConditionalGeneration.from_pretrained(directory).eval()
    if fingerprint(student, WhisperProcessor.from_pretrained(directory)) != expected:
        fail(f"{directory} has another student than this teacher gives; --overwrite_output_dir replaces it")
    shape = (1, student.config.num_mel_bins, 2 * student.config.max_source_positions)  # (batch, mels, frames)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(student.dtype)
    with torch.inference_mode():
        logits = student(features, decoder_input_ids=torch.tensor([[student.config.decoder_start_token_id]])).logits
    if not logits.isfinite().all():
        fail(f"the student's output in {student.dtype} is not finite; choose another --dtype")


def model_card(record: dict, repository: Path) -> str:
    """README.md: where the student comes from, what it is made of and how. `repository` is the teacher's."""
    settings, commit = record["settings"], record["teacher_commit"]
    teacher = settings["teacher_checkpoint"]
    card = repository / "README.md"
    licence = ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    header = ModelCardData(
        license=licence or "unknown",
        base_model=teacher if commit else None,  # a local directory means nothing to the Hub
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "distillation", "student-initialisation"],
    )
    source = (
        f"[{teacher}](https://huggingface.co/{teacher}) at commit {commit}" if commit else Path(teacher).resolve().name
    )
    encoder, decoder = (" ".join(map(str, settings[f"{side}_layer_indices"])) for side in ("encoder", "decoder"))
    return f"""---
{header.to_yaml()}
---

# A Whisper student before training

Its layers are copied from {source}. It is the start of a distillation: untrained, it does not transcribe.

| | teacher | student | student's layers are the teacher's (counted from 0) |
| --- | --- | --- | --- |
| encoder layers | {record["teacher_layers"]["encoder"]} | {len(encoder.split())} | {encoder} |
| decoder layers | {record["teacher_layers"]["decoder"]} | {len(decoder.split())} | {decoder} |
| parameters | {record["parameters"]["teacher"]:,} | {record["parameters"]["student"]:,} | |

Embeddings, positions, convolutions, final norms and output projection are the teacher's too, and every tensor equals
the teacher's as {settings["dtype"]}. The alignment heads of word timestamps (layer, head):
{" ".join(f"({layer}, {head})" for layer, head in record["alignment_heads"])}.

Licence of the teacher: {licence or "unknown (its model card names none)"}.

Made by `create_student_model.py --encoder_layer_indices {encoder} --decoder_layer_indices {decoder}`; see `{RECORD}`.
"""


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def student_in(save_dir: Path, settings: dict) -> bool:
    """Whether `save_dir` has a student of these settings already. Anything else that would be overwritten fails."""
    present = [name for name in OWN_FILES if (save_dir / name).exists()]
    if not present:
        return False
    if RECORD not in present:
        fail(f"{save_dir} has a {present[0]} that this script did not write; --overwrite_output_dir replaces it")
    record = json.loads((save_dir / RECORD).read_text(encoding="utf-8"))
    for name, value in settings.items():
        if (other := record["settings"].get(name)) != value:
            fail(f"{save_dir} has a student with {name} {other}, not {value}; --overwrite_output_dir replaces it")
    return record["status"] == "complete"


def install(partial: Path, save_dir: Path, record: dict) -> None:
    """Put the finished student in place: in one step, or file by file where `save_dir` holds other things as well."""
    shutil.copymode(partial / "config.json", partial / "model.safetensors")  # safetensors makes its files private
    for path in [*partial.iterdir(), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if not save_dir.exists():
        os.replace(partial, save_dir)
        return
    write_json(save_dir / RECORD, {**record, "status": "running"})
    for name in reversed(OWN_FILES[:-1]):
        (save_dir / name).unlink(missing_ok=True)
    for name in OWN_FILES:
        if (partial / name).exists():
            shutil.move(partial / name, save_dir / name)


def print_plan(args: argparse.Namespace, config: WhisperConfig, folder: Path, commit: str | None, exists: bool) -> None:
    """Say what a run would read, write and push, how much and about how long."""
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    if commit:
        tree = HfApi().list_repo_tree(args.teacher_checkpoint, args.subfolder or None, revision=commit)
        files = {Path(file.path).name: getattr(file, "size", 0) for file in tree}
    forms = [[size for name, size in files.items() if fnmatch(name, pattern)] for pattern in WEIGHTS.values()]
    stored = next((sum(sizes) for sizes in forms if sizes), 0)
    size = empty_model(config).num_parameters() * getattr(torch, args.dtype).itemsize
    began = time.monotonic()
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(SAMPLE))
        os.fsync(file.fileno())
    rate = SAMPLE / (time.monotonic() - began)
    seconds = round((stored + 3 * size) / rate)  # the student is written once and read twice
    print(f"input: {args.teacher_checkpoint}, {stored / 1e9:,.3f} GB of weights{', on the Hub' if commit else ''}")
    print(f"done: {'the student is there and would be checked' if exists else 'nothing'}")
    print(f"writes: {'nothing' if exists else f'{args.save_dir}, about {size / 1e9:,.3f} GB'}")
    print(f"pushes: {f'{args.hub_model_id}, about {size / 1e9:,.3f} GB' if args.push_to_hub else 'nothing'}")
    print(f"time: about {timedelta(seconds=seconds)} without any download (a disk that writes {rate / 1e6:,.0f} MB/s)")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    group = parser.add_argument_group("teacher")
    group.add_argument("--teacher_checkpoint", required=True, help="Hub id or local directory of a Whisper model")
    group.add_argument("--subfolder", default="", help="folder of the model inside the teacher's repository")
    group.add_argument("--cache_dir", help="directory for downloads (unset = the Hub client's own cache)")
    group = parser.add_argument_group("layers")
    for side, default, unset in (("encoder", None, " (unset = all of the teacher's)"), ("decoder", 2, "")):
        number, one = {"type": int, "default": default, "metavar": "N"}, {"type": int, "nargs": "+", "metavar": "LAYER"}
        either = group.add_mutually_exclusive_group()
        either.add_argument(f"--{side}_layers", **number, help=f"number of {side} layers{unset}")
        either.add_argument(f"--{side}_layer_indices", **one, help="the teacher's layers to copy instead, from 0")
    group = parser.add_argument_group("output")
    group.add_argument("--save_dir", required=True, help="local directory for the student; its parents are made")
    dtypes = {"choices": ["float32", "float16", "bfloat16"], "default": "float32"}
    group.add_argument("--dtype", **dtypes, help="precision of the saved weights; training wants float32")
    group.add_argument("--overwrite_output_dir", **flag, help="replace another student, but no other files")
    group.add_argument("--seed", type=int, default=42, help="seed of the features that the saved student is run on")
    group = parser.add_argument_group("Hugging Face Hub")
    group.add_argument("--push_to_hub", **flag, help="publish the student")
    group.add_argument("--hub_model_id", help="repository to push to (unset = --save_dir, if it reads org/name)")
    group.add_argument("--dry_run", **flag, help="say what a run would do and how long it takes, stop")

    args = parser.parse_args(argv)
    args.hub_model_id = args.hub_model_id or args.save_dir
    if args.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.hub_model_id):
        parser.error(f"--push_to_hub needs --hub_model_id org/name; {args.hub_model_id!r} is not one")
    return args


def create_student(args: argparse.Namespace) -> int:
    started = time.monotonic()
    save_dir = Path(args.save_dir).expanduser().resolve()
    if save_dir.exists() and not save_dir.is_dir():
        fail(f"--save_dir {args.save_dir} is not a directory")

    # 1. The right to push is proved before the work.
    if args.push_to_hub:
        try:
            HfApi().whoami() if args.dry_run else HfApi().create_repo(args.hub_model_id, exist_ok=True)
        except HUB_ERRORS as error:
            hub_fail(f"creating {args.hub_model_id}", error)

    # 2. The teacher, and which of its layers the student gets.
    repository, commit = fetch_teacher(args.teacher_checkpoint, args.subfolder, args.cache_dir, not args.dry_run)
    folder = repository / args.subfolder
    if folder.resolve() == save_dir:
        fail(f"--save_dir {args.save_dir} is the teacher's own directory")
    config = AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None
    if getattr(config, "model_type", None) != "whisper":
        fail(f"--teacher_checkpoint {args.teacher_checkpoint} has no config.json of a Whisper model")
    depths = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    layers = {
        side: choose_layers(side, depth, getattr(args, f"{side}_layers"), getattr(args, f"{side}_layer_indices"))
        for side, depth in depths.items()
    }
    settings = {name: getattr(args, name) for name in ("teacher_checkpoint", "subfolder", "dtype")}
    settings |= {f"{side}_layer_indices": chosen for side, chosen in layers.items()}
    exists = not args.overwrite_output_dir and student_in(save_dir, settings)

    # 3. The student.
    teacher_parameters = empty_model(config).num_parameters()
    config.encoder_layers, config.decoder_layers = len(layers["encoder"]), len(layers["decoder"])
    if args.dry_run:
        print_plan(args, config, folder, commit, exists)
        return 0
    processor = WhisperProcessor.from_pretrained(folder)
    student = build_student(config, folder, layers, getattr(torch, args.dtype))
    vocabulary = processor.tokenizer.get_vocab()
    student.generation_config = remapped_generation_config(folder, config, vocabulary, layers["decoder"])
    record = {
        "status": "complete",
        "settings": settings,
        "teacher_commit": commit,
        "teacher_layers": depths,
        "parameters": {"teacher": teacher_parameters, "student": student.num_parameters()},
        "alignment_heads": student.generation_config.alignment_heads,
        "fingerprint": fingerprint(student, processor),
        "arguments": vars(args),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }

    # 4. Saved beside --save_dir, loaded back and run, and only then put in place.
    partial = save_dir.with_name(f".{save_dir.name}.partial")
    try:
        if exists:
            del student
            check_saved(save_dir, record["fingerprint"], args.seed)
        else:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            student.save_pretrained(partial)
            save_tokenizer_files(processor, partial)
            del student  # the copy that is loaded back takes its place in memory
            check_saved(partial, record["fingerprint"], args.seed)
            (partial / "README.md").write_text(model_card(record, repository), encoding="utf-8")
            record["wall_time_s"] = round(time.monotonic() - started, 1)
            write_json(partial / RECORD, record)
            install(partial, save_dir, record)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("Layers: encoder %(encoder)s, decoder %(decoder)s", layers)
    logger.info("Parameters: teacher %(teacher)d, student %(student)d", record["parameters"])
    logger.info("The student %s %s", "was already in" if exists else "is in", save_dir)

    # 5. Published, if asked for.
    if args.push_to_hub:
        try:
            done = HfApi().upload_folder(repo_id=args.hub_model_id, folder_path=save_dir, allow_patterns=OWN_FILES)
        except HUB_ERRORS as error:
            hub_fail(f"the student is complete in {save_dir}, but pushing it to {args.hub_model_id}", error)
        logger.info("Pushed to %s", done.commit_url)
    return 0


def main(argv=None) -> int:
    args = parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return create_student(args)
    except KeyboardInterrupt:
        return 130
    except (OSError, SafetensorError) as error:  # a full disk, a place where nothing may be written, damaged weights
        fail(f"{error}; when that is mended, run the same command")


if __name__ == "__main__":
    sys.exit(main())
