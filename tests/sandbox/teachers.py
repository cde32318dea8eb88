"""Tiny random Whispers for the tests, with a tokenizer trained on the sandbox's own sentences.

    python -m tests.sandbox.teachers DIRECTORY --arrangement large-v3

They have what makes Whisper checkpoints hard to handle: the two arrangements of special tokens, 80 or 128 mel bins,
suppressed tokens, alignment heads, and labels that end by themselves after a varying number of tokens.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from tests.sandbox.corpus import cache_directory
from tests.sandbox.files import built_once
from tests.sandbox.sentences import sentences

RECIPE = 5  # raise it when what `tiny_whisper` makes changes
TEXT_TOKENS = 600
# large-v3 added Cantonese, which moved every special token after the languages by one
MEL_BINS = {"large-v2": 80, "large-v3": 128}
LEAN = 2.0  # how strongly each further position draws towards the end of the text
# as in OpenAI's non-speech list: marks that annotate a transcript rather than being spoken
NOT_SPOKEN = [*'"#()*+/:;<=>@[]^_`{|}~', "「", "」", "♪"]


def special_tokens(arrangement: str) -> list[str]:
    """The special tokens of a Whisper vocabulary in the order of their ids, without the timestamps."""
    languages = [code for code in LANGUAGES if code != "yue" or arrangement == "large-v3"]
    return [
        "<|endoftext|>",
        "<|startoftranscript|>",
        *(f"<|{code}|>" for code in languages),
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>" if arrangement == "large-v3" else "<|nocaptions|>",
        "<|notimestamps|>",
    ]


def train_tokenizer(arrangement: str) -> Tokenizer:
    """A byte-level BPE over the sandbox's sentences with Whisper's special tokens and 1,501 timestamps behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sentences(400), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens(arrangement)])
    tokenizer.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", special=False) for i in range(1501)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, arrangement: str) -> WhisperTokenizerFast:
    """Write the files that OpenAI's repositories have, and return the tokenizer that transformers reads from them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json, merges.txt
    added = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    write_json(directory / "added_tokens.json", {token["content"]: int(number) for number, token in added.items()})
    end = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    special = {"additional_special_tokens": special_tokens(arrangement), **end}
    write_json(directory / "special_tokens_map.json", special)
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "errors": "replace",
            "model_max_length": 1024,
            "processor_class": "WhisperProcessor",
            "return_attention_mask": False,
            "tokenizer_class": "WhisperTokenizer",
            **special,
        },
    )
    return WhisperTokenizerFast.from_pretrained(directory)


def generation_config(tokenizer: WhisperTokenizerFast, arrangement: str) -> GenerationConfig:
    """What OpenAI's checkpoints say about decoding, for this vocabulary."""
    number = tokenizer.convert_tokens_to_ids
    end, start = number("<|endoftext|>"), number("<|startoftranscript|>")
    marks = [tokenizer.encode(mark, add_special_tokens=False) for mark in NOT_SPOKEN]
    not_spoken = {ids[0] for ids in marks if len(ids) == 1}
    never_said = range(number("<|en|>"), number("<|notimestamps|>"))
    languages = [token for token in special_tokens(arrangement) if token[2:-2] in LANGUAGES]
    return GenerationConfig(
        alignment_heads=[[1, 1], [2, 0], [3, 1]],
        begin_suppress_tokens=[*tokenizer.encode(" ", add_special_tokens=False), end],
        bos_token_id=end,
        decoder_start_token_id=start,
        eos_token_id=end,
        is_multilingual=True,
        lang_to_id={token: number(token) for token in languages},
        max_initial_timestamp_index=50,
        max_length=448,
        no_timestamps_token_id=number("<|notimestamps|>"),
        pad_token_id=end,
        prev_sot_token_id=number("<|startofprev|>"),
        return_timestamps=False,
        suppress_tokens=sorted(not_spoken | {start, *never_said}),
        task_to_id={task: number(f"<|{task}|>") for task in ("transcribe", "translate")},
    )


def random_model(tokenizer: WhisperTokenizerFast, arrangement: str, layers: int, seed: int):
    """A random model whose labels depend on the audio and end after some 20 to 60 tokens."""
    end, start = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            num_mel_bins=MEL_BINS[arrangement],
            d_model=32,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            init_std=0.4,  # at the usual 0.02 a model this small says the same whatever it hears
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            decoder_start_token_id=start,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )
    decoder = model.model.decoder
    with torch.no_grad():
        # transformers zeroes the row of the padding token, which is also the end of the text. Each further position
        # leans a little more towards it.
        decoder.embed_tokens.weight[end].normal_(std=model.config.init_std)
        # Most of this vocabulary is timestamps; as loud as the text they would be all that such a model says.
        decoder.embed_tokens.weight[tokenizer.convert_tokens_to_ids("<|0.00|>") :] *= 0.25
        lean = decoder.embed_tokens.weight[end] / decoder.embed_tokens.weight[end].norm()
        steps = torch.arange(decoder.embed_positions.weight.shape[0], dtype=torch.float32)
        decoder.embed_positions.weight += LEAN * steps[:, None] * lean
    return model


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tiny_whisper(directory: Path, arrangement: str = "large-v3", layers: int = 4, seed: int = 2) -> Path:
    """Build the checkpoint once and return its directory; `arrangement` is "large-v3" or "large-v2"."""

    def build(partial: Path) -> None:
        tokenizer = save_tokenizer(train_tokenizer(arrangement), partial, arrangement)
        model = random_model(tokenizer, arrangement, layers, seed)
        model.generation_config = generation_config(tokenizer, arrangement)
        model.save_pretrained(partial)
        WhisperFeatureExtractor(feature_size=MEL_BINS[arrangement]).save_pretrained(partial)

    corpus = hashlib.sha256("\n".join(sentences(400)).encode()).hexdigest()
    recipe = {"recipe": RECIPE, "arrangement": arrangement, "layers": layers, "seed": seed, "sentences": corpus}
    return built_once(Path(directory), recipe, build)


def cached_whisper(name: str, arrangement: str = "large-v3", layers: int = 4) -> Path:
    """A checkpoint in the sandbox's cache, of the installed transformers: each version writes its files its own way."""
    directory = cache_directory() / f"transformers-{transformers.__version__}" / name
    return tiny_whisper(directory, arrangement, layers)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Build a tiny random Whisper.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--arrangement", choices=list(MEL_BINS), default="large-v3")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args(argv)
    print(tiny_whisper(args.directory, args.arrangement, seed=args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
