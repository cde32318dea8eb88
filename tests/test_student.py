"""create_student_model.py: which layers, which tensors, which files, and nothing half done."""

import importlib.metadata
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

import create_student_model as script
from tests.sandbox.chaos import UNPRIVILEGED

CONVERTER_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
JAPANESE = {"language": "ja", "task": "transcribe", "max_new_tokens": 16}
LOADER_FILES = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"]


def create(teacher, save_dir, *flags) -> Path:
    assert script.main(["--teacher_checkpoint", str(teacher), "--save_dir", str(save_dir), *map(str, flags)]) == 0
    return Path(save_dir)


def refused(capsys, *flags) -> str:
    """The one line on stderr with which the script ends."""
    with pytest.raises(SystemExit) as end:
        script.main(list(map(str, flags)))
    message = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert end.value.code not in (0, None)
    assert "\n" not in message
    return message


def load(directory) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(directory).eval()


def edit(path: Path, change) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def copied(teacher: Path, directory: Path) -> Path:
    return Path(shutil.copytree(teacher, directory))


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def features_of(clip: dict, directory: Path) -> torch.Tensor:
    samples, rate = soundfile.read(io.BytesIO(clip["audio"]), dtype="float32")
    extractor = WhisperProcessor.from_pretrained(directory).feature_extractor
    return extractor(samples, sampling_rate=rate, return_tensors="pt").input_features


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory) -> Path:
    """Decoder layers 0 and 3 of the teacher's four."""
    return create(tiny_teacher, tmp_path_factory.mktemp("student") / "init")


# ---- which layers ----


def test_the_layer_map_is_linspace_rounded_down_for_every_pair_of_depths_up_to_32():
    for teacher_layers in range(1, 33):
        for student_layers in range(1, teacher_layers + 1):
            layers = script.spaced_layers(teacher_layers, student_layers)
            step = Fraction(teacher_layers - 1, max(1, student_layers - 1))
            expected = [int(number * step) for number in range(student_layers)]
            expected[-1] = teacher_layers - 1
            assert layers == expected
            assert sorted(set(layers)) == layers


def test_large_v3_gives_its_first_and_last_layer_to_a_student_of_two():
    assert script.spaced_layers(32, 2) == [0, 31]
    assert script.spaced_layers(32, 32) == list(range(32))
    assert script.spaced_layers(32, 1) == [31]
    # 14.999... in floating point
    assert script.spaced_layers(31, 23)[11] == 15 != np.linspace(0, 30, 23).astype(int)[11]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--decoder_layers", 5], "--decoder_layers 5 must lie between 1 and the teacher's 4"),
        (["--decoder_layers", 0], "--decoder_layers 0 must lie between 1 and the teacher's 4"),
        (["--encoder_layers", -1], "--encoder_layers -1 must lie between 1 and the teacher's 4"),
        (["--decoder_layer_indices", 0, 4], "--decoder_layer_indices [0, 4] must ascend"),
        (["--decoder_layer_indices", -1], "--decoder_layer_indices [-1] must ascend"),
        (["--encoder_layer_indices", 2, 1], "--encoder_layer_indices [2, 1] must ascend"),
        (["--encoder_layer_indices", 1, 1], "--encoder_layer_indices [1, 1] must ascend"),
        (["--decoder_layers", 1, "--decoder_layer_indices", 1], "not allowed with argument"),
    ],
)
def test_layers_that_the_teacher_does_not_have_are_one_clear_line(tiny_teacher, tmp_path, capsys, flags, named):
    target = tmp_path / "init"
    assert named in refused(capsys, "--teacher_checkpoint", tiny_teacher, "--save_dir", target, *flags)
    assert not list(tmp_path.iterdir())


# ---- which tensors ----


def expected_tensors(teacher: Path, layers: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The student's tensors, taken from the whole teacher by replacing its lists of layers."""
    model = load(teacher)
    for side, chosen in layers.items():
        stack = getattr(model.model, side)
        stack.layers = torch.nn.ModuleList([stack.layers[layer] for layer in chosen])
    return model.state_dict()


@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        ([], {"encoder": [0, 1, 2, 3], "decoder": [0, 3]}),
        (["--encoder_layers", 2, "--decoder_layers", 3], {"encoder": [0, 3], "decoder": [0, 1, 3]}),
        (["--encoder_layers", 3, "--decoder_layers", 4], {"encoder": [0, 1, 3], "decoder": [0, 1, 2, 3]}),
        (["--decoder_layer_indices", 1, 2, "--encoder_layer_indices", 2], {"encoder": [2], "decoder": [1, 2]}),
    ],
)
def test_every_tensor_equals_the_teachers(tiny_teacher, tmp_path, flags, layers):
    student = create(tiny_teacher, tmp_path / "init", *flags)
    expected, actual = expected_tensors(tiny_teacher, layers), load(student).state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
    config = load(student).config
    assert (config.encoder_layers, config.decoder_layers) == (len(layers["encoder"]), len(layers["decoder"]))


def test_an_80_bin_teacher_gives_an_80_bin_student(tiny_teacher_v2, tmp_path, clips):
    student = create(tiny_teacher_v2, tmp_path / "init")
    assert features_of(clips[0], student).shape == (1, 80, 3000)
    assert load(student).model.encoder.conv1.weight.shape[1] == 80


def test_a_student_as_deep_as_the_teacher_says_what_the_teacher_says(tiny_teacher, tmp_path, clips):
    student = create(tiny_teacher, tmp_path / "init", "--decoder_layers", 4)
    features = features_of(clips[0], student)
    ids = [load(path).generate(features, **JAPANESE) for path in (tiny_teacher, student)]
    assert torch.equal(*ids)


def test_the_projection_is_tied_as_in_the_teacher(student, tiny_teacher, tmp_path):
    model = load(student)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert "proj_out.weight" not in load_file(student / "model.safetensors")

    untied = copied(tiny_teacher, tmp_path / "untied")
    edit(untied / "config.json", lambda config: config.update(tie_word_embeddings=False))
    tensors = load_file(untied / "model.safetensors")
    tensors["proj_out.weight"] = torch.randn_like(tensors["model.decoder.embed_tokens.weight"])
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    model = load(create(untied, tmp_path / "init"))
    assert torch.equal(model.proj_out.weight, tensors["proj_out.weight"])
    assert torch.equal(model.model.decoder.embed_tokens.weight, tensors["model.decoder.embed_tokens.weight"])


def test_a_half_precision_teacher_gives_float32_weights_unless_told_otherwise(tiny_teacher, tmp_path):
    half = copied(tiny_teacher, tmp_path / "half")
    tensors = {name: tensor.half() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    for flags, dtype in (([], torch.float32), (["--dtype", "float16"], torch.float16)):
        saved = load_file(create(half, tmp_path / f"init-{dtype}", *flags) / "model.safetensors")
        assert all(tensor.dtype == dtype for tensor in saved.values())
        embedding = saved["model.decoder.embed_tokens.weight"]
        assert torch.equal(embedding, tensors["model.decoder.embed_tokens.weight"].to(dtype))


def resave(teacher: Path, directory: Path, form: str) -> Path:
    """The same teacher with its weights in another form."""
    copied(teacher, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if form == "shards":
        load(teacher).save_pretrained(directory, max_shard_size="300KB")
        assert len(list(directory.glob("model-*.safetensors"))) > 2
    elif form == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
    elif form == "bin shards":
        names = sorted(tensors)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, part in parts.items():
            torch.save({name: tensors[name] for name in part}, directory / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif form == "bare":
        bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(bare, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("form", ["shards", "bin", "bin shards", "bare"])
def test_the_form_in_which_the_teacher_is_stored_does_not_matter(tiny_teacher, student, tmp_path, form):
    other = create(resave(tiny_teacher, tmp_path / "teacher", form), tmp_path / "init")
    assert (other / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()


def test_a_teacher_that_lacks_a_tensor_is_one_clear_line(tiny_teacher, tmp_path, capsys):
    broken = copied(tiny_teacher, tmp_path / "teacher")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.decoder.layers.3.fc1.bias"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    message = refused(capsys, "--teacher_checkpoint", broken, "--save_dir", tmp_path / "init")
    assert "lack model.decoder.layers.3.fc1.bias" in message
    assert not (tmp_path / "init").exists()


def cut_off(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:5_000])


def emptied_pickle(weights: Path) -> None:
    weights.rename(weights.with_name("pytorch_model.bin")).write_bytes(b"")


def other_shape(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["model.decoder.layers.3.fc1.bias"] = torch.zeros(3)
    save_file(tensors, weights, metadata={"format": "pt"})


def untied(weights: Path) -> None:
    edit(weights.with_name("config.json"), lambda config: config.update(tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_off, "cannot load the model"),
        (emptied_pickle, "cannot load the model"),
        (other_shape, "have another shape of model.decoder.layers.3.fc1.bias"),
        (untied, "lack proj_out.weight"),
    ],
)
def test_weights_that_are_damaged_or_of_other_shapes_are_one_clear_line(tiny_teacher, tmp_path, capsys, damage, named):
    broken = copied(tiny_teacher, tmp_path / "teacher")
    damage(broken / "model.safetensors")
    message = refused(capsys, "--teacher_checkpoint", broken, "--save_dir", tmp_path / "init")
    assert named in message
    assert not (tmp_path / "init").exists()


def test_a_teacher_in_a_subfolder_gives_the_same_student(tiny_teacher, student, tmp_path):
    copied(tiny_teacher, tmp_path / "repository" / "inner")
    (tmp_path / "repository" / "README.md").write_text("---\nlicense: mit\n---\n# Several models\n")
    other = create(tmp_path / "repository", tmp_path / "init", "--subfolder", "inner")
    assert ModelCard.load(other / "README.md").data.license == "mit"
    assert (other / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    for name in (*CONVERTER_FILES, *LOADER_FILES):
        assert (other / name).read_bytes() == (student / name).read_bytes(), name


def test_the_student_of_the_student_has_the_teachers_last_layer(student, tiny_teacher, tmp_path, clips):
    smaller = create(student, tmp_path / "init", "--decoder_layers", 1)
    expected = expected_tensors(tiny_teacher, {"decoder": [3]})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(smaller).state_dict().items())
    assert GenerationConfig.from_pretrained(smaller).alignment_heads == [[0, 1]]
    load(smaller).generate(features_of(clips[0], smaller), **JAPANESE)


# ---- alignment heads and the rest of the generation config ----


def test_alignment_heads_of_copied_layers_are_renumbered_and_the_others_dropped():
    heads = [[7, 0], [10, 17], [31, 3], [31, 9]]
    assert script.remap_alignment_heads(heads, [0, 31], 20) == [[1, 3], [1, 9]]
    assert script.remap_alignment_heads(heads, [7, 10, 31], 20) == [[0, 0], [1, 17], [2, 3], [2, 9]]


@pytest.mark.parametrize("heads", [[[1, 0], [2, 5]], [], None])
def test_without_an_alignment_head_left_those_of_the_last_half_are_used(heads):
    assert script.remap_alignment_heads(heads, [0, 31], 3) == [[1, 0], [1, 1], [1, 2]]
    assert script.remap_alignment_heads(heads, [31], 2) == [[0, 0], [0, 1]]


def test_the_rest_of_the_generation_config_is_the_teachers(student, tiny_teacher):
    before, after = (json.loads((path / "generation_config.json").read_text()) for path in (tiny_teacher, student))
    assert before.pop("alignment_heads") == [[1, 1], [2, 0], [3, 1]]
    assert after.pop("alignment_heads") == [[1, 1]]
    del before["transformers_version"], after["transformers_version"]
    assert after == before


@pytest.mark.parametrize("indices", [[0, 3], [0, 2], [0]], ids=["one head kept", "another", "none kept"])
def test_word_timestamps_run_on_the_student(tiny_teacher, tmp_path, clips, indices):
    student = create(tiny_teacher, tmp_path / "init", "--decoder_layer_indices", *indices)
    features = features_of(clips[0], student)
    model = load(student)
    result = model.generate(features, return_token_timestamps=True, **JAPANESE)
    times = result["token_timestamps"][0]
    assert len(times) == len(result["sequences"][0])
    assert (times.diff() >= 0).all()
    assert 0 < times.max() <= 30


def old_checkpoint(teacher: Path, directory: Path) -> Path:
    """As OpenAI's Whispers were in 2022: no generation config, decoding settings in the model's, slow tokenizer."""
    copied(teacher, directory)
    generation = json.loads((directory / "generation_config.json").read_text())
    forced = [[1, generation["lang_to_id"]["<|ja|>"]], [2, generation["task_to_id"]["transcribe"]]]
    moved = {name: generation[name] for name in ("suppress_tokens", "begin_suppress_tokens", "max_length")}
    edit(directory / "config.json", lambda config: config.update(forced_decoder_ids=forced, **moved))
    (directory / "generation_config.json").unlink()
    (directory / "tokenizer.json").unlink()
    return directory


def test_a_checkpoint_without_generation_config_gets_one_that_decodes_as_todays_do(tiny_teacher, tmp_path, clips):
    student = create(old_checkpoint(tiny_teacher, tmp_path / "teacher"), tmp_path / "init")
    today = json.loads((tiny_teacher / "generation_config.json").read_text())
    made = json.loads((student / "generation_config.json").read_text())
    for name in (
        "lang_to_id",
        "task_to_id",
        "no_timestamps_token_id",
        "is_multilingual",
        "suppress_tokens",
        "max_length",
    ):
        assert made[name] == today[name], name
    assert made["alignment_heads"] == [[1, 0], [1, 1]]
    features = features_of(clips[0], student)
    expected = load(create(tiny_teacher, tmp_path / "expected"))
    for timestamps in (False, True):
        settings = {**JAPANESE, "return_timestamps": timestamps}
        assert torch.equal(load(student).generate(features, **settings), expected.generate(features, **settings))


def test_an_english_only_teacher_stays_english_only(tiny_teacher_v2, tmp_path, clips):
    english = with_full_vocabulary(tiny_teacher_v2, tmp_path / "teacher.en", text_tokens=50256)

    def forget_languages(config: dict) -> None:
        del config["lang_to_id"], config["task_to_id"]
        config["is_multilingual"] = False

    edit(english / "generation_config.json", forget_languages)
    student = create(english, tmp_path / "init")
    generation_config = GenerationConfig.from_pretrained(student)
    assert generation_config.is_multilingual is False
    assert not hasattr(generation_config, "lang_to_id")
    load(student).generate(features_of(clips[0], student), max_new_tokens=16)


# ---- which files ----


def only_tokenizer_json(teacher: Path, directory: Path) -> Path:
    copied(teacher, directory)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (directory / name).unlink()
    return directory


def only_processor_config(teacher: Path, directory: Path) -> Path:
    """As transformers 5 saves a processor."""
    copied(teacher, directory)
    for name in (
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
    ):
        (directory / name).unlink()
    WhisperProcessor.from_pretrained(teacher).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("make", [copied, only_tokenizer_json, only_processor_config, old_checkpoint])
def test_all_files_are_there_whatever_the_teachers_folder_had(tiny_teacher, tmp_path, make):
    student = create(make(tiny_teacher, tmp_path / "teacher"), tmp_path / "init")
    assert {*CONVERTER_FILES, *LOADER_FILES} <= {path.name for path in student.iterdir()}
    for name in ("vocab.json", "added_tokens.json"):
        assert json.loads((student / name).read_text()) == json.loads((tiny_teacher / name).read_text())
    assert (student / "merges.txt").read_text() == (tiny_teacher / "merges.txt").read_text()
    for name in ("feature_size", "n_fft", "hop_length", "sampling_rate", "chunk_length"):
        expected = json.loads((tiny_teacher / "preprocessor_config.json").read_text())[name]
        assert json.loads((student / "preprocessor_config.json").read_text())[name] == expected

    theirs, ours = (WhisperProcessor.from_pretrained(path).tokenizer for path in (tiny_teacher, student))
    text = "東京の天気は、晴れです。 Hello 123"
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text, add_special_tokens=False).input_ids) == text


def test_a_teacher_without_tokenizer_files_is_one_clear_line(tiny_teacher, tmp_path, capsys):
    silent = copied(tiny_teacher, tmp_path / "teacher")
    for name in (*CONVERTER_FILES, "tokenizer_config.json"):
        (silent / name).unlink()
    message = refused(capsys, "--teacher_checkpoint", silent, "--save_dir", tmp_path / "init")
    assert f"{silent} lacks the files of its tokenizer" in message
    assert not (tmp_path / "init").exists()


def test_the_spelling_normalizer_is_kept(tiny_teacher, tmp_path):
    teacher = copied(tiny_teacher, tmp_path / "teacher")
    (teacher / "normalizer.json").write_text('{"colour": "color"}')
    student = create(teacher, tmp_path / "init")
    assert json.loads((student / "normalizer.json").read_text()) == {"colour": "color"}


def test_transformers_4_can_read_the_list_of_special_tokens(student):
    config = json.loads((student / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in config
    assert "<|ja|>" in config["additional_special_tokens"]


def test_others_may_read_what_was_saved(student):
    assert {oct(path.stat().st_mode & 0o777) for path in student.iterdir()} == {oct(0o666 & ~current_umask())}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def with_full_vocabulary(teacher: Path, directory: Path, text_tokens: int = 50257) -> Path:
    """The teacher with as many text tokens as Whisper has, so that every special token has its usual id.

    CTranslate2 takes a model for multilingual when the empty text is one of its tokens, as in OpenAI's files.
    """
    copied(teacher, directory)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (directory / name).unlink()
    first = json.loads((directory / "config.json").read_text())["eos_token_id"]
    added = text_tokens - first

    def moved(number):
        return number + added if isinstance(number, int) and number >= first else number

    def move_tokenizer(content: dict) -> None:
        fillers = {f"<filler {number}>": number for number in range(first, text_tokens - 1)}
        content["model"]["vocab"] |= fillers | {"": text_tokens - 1}
        for token in content["added_tokens"]:
            token["id"] = moved(token["id"])

    def move_ids(content: dict) -> None:
        for name, value in content.items():
            if name.endswith("_token_id") or name == "vocab_size":
                content[name] = moved(value)
            elif name.endswith("_to_id"):
                content[name] = {token: moved(number) for token, number in value.items()}
            elif name.endswith("suppress_tokens") and value:
                content[name] = [moved(number) for number in value]

    edit(directory / "tokenizer.json", move_tokenizer)
    edit(directory / "tokenizer_config.json", lambda content: content.pop("added_tokens_decoder"))
    edit(directory / "config.json", move_ids)
    edit(directory / "generation_config.json", move_ids)
    tensors = load_file(directory / "model.safetensors")
    text, special = tensors["model.decoder.embed_tokens.weight"].tensor_split([first])
    tensors["model.decoder.embed_tokens.weight"] = torch.cat([text, torch.zeros(added, text.shape[1]), special])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_faster_whisper_decodes_the_converted_student_as_transformers_does(tiny_teacher, tmp_path, clips):
    from faster_whisper import WhisperModel

    student = create(with_full_vocabulary(tiny_teacher, tmp_path / "teacher"), tmp_path / "init")
    command = [Path(sys.executable).with_name("ct2-transformers-converter"), "--model", student]
    command += ["--output_dir", tmp_path / "ct2", "--copy_files", "tokenizer.json", "preprocessor_config.json"]
    subprocess.run(command, check=True, capture_output=True)
    converted = WhisperModel(str(tmp_path / "ct2"), device="cpu", compute_type="float32")
    assert converted.model.is_multilingual
    assert json.loads((tmp_path / "ct2" / "config.json").read_text())["alignment_heads"] == [[1, 1]]

    model, processor = load(student), WhisperProcessor.from_pretrained(student)
    for clip in clips[:2]:
        samples, _ = soundfile.read(io.BytesIO(clip["audio"]), dtype="float32")
        ids = model.generate(features_of(clip, student), language="ja", task="transcribe")[0].tolist()
        segments, _ = converted.transcribe(
            np.pad(samples, (0, 480_000 - len(samples))),
            language="ja",
            beam_size=1,
            temperature=0,
            without_timestamps=True,
            suppress_tokens=model.generation_config.suppress_tokens,
            no_speech_threshold=None,
            log_prob_threshold=None,
            compression_ratio_threshold=None,
        )
        segments = list(segments)
        assert [token for segment in segments for token in segment.tokens] == ids
        assert "".join(segment.text for segment in segments) == processor.decode(ids, skip_special_tokens=True)
        assert len(ids) > 3


def test_the_card_says_where_the_student_comes_from(tiny_teacher, tmp_path):
    teacher = copied(tiny_teacher, tmp_path / "the-teacher")
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n# A teacher\n")
    student = create(teacher, tmp_path / "init", "--encoder_layers", 3)
    card = ModelCard.load(student / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "automatic-speech-recognition"
    sizes = [sum(tensor.numel() for tensor in load(path).parameters()) for path in (teacher, student)]
    for text in (
        "the-teacher",
        "| 0 1 3 |",
        "| 0 3 |",
        *(f"{size:,}" for size in sizes),
        "Licence of the teacher: mit",
    ):
        assert text in card.text
    assert str(tmp_path) not in card.text
    assert card.data.base_model is None


def test_the_card_does_not_invent_a_licence(student):
    card = ModelCard.load(student / "README.md")
    assert card.data.license == "unknown"
    assert "names none" in card.text


def test_the_record_has_arguments_versions_and_counts(student, tiny_teacher):
    record = json.loads((student / "student.json").read_text())
    assert record["status"] == "complete"
    assert record["settings"]["decoder_layer_indices"] == [0, 3]
    assert record["arguments"]["teacher_checkpoint"] == tiny_teacher.name
    assert record["arguments"]["seed"] == 42
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["wall_time_s"] > 0


# ---- nothing half done ----


def test_running_again_changes_nothing(tiny_teacher, tmp_path):
    student = create(tiny_teacher, tmp_path / "init")
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in student.iterdir()}
    create(tiny_teacher, student)
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in student.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".init.lock", "init"]


def test_a_card_that_is_missing_or_empty_is_made_again(tiny_teacher, tmp_path):
    student = create(tiny_teacher, tmp_path / "init")
    card = (student / "README.md").read_text()
    (student / "README.md").unlink()
    create(tiny_teacher, student)
    assert (student / "README.md").read_text() == card
    (student / "README.md").write_text("")
    create(tiny_teacher, student)
    assert "A Whisper student before training. Its layers are copied from" in (student / "README.md").read_text()


def change_weights(teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.decoder.layer_norm.bias"][0] += 1
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})


def change_decoding(teacher: Path) -> None:
    edit(teacher / "generation_config.json", lambda config: config.update(max_length=100))


@pytest.mark.parametrize("change", [change_weights, change_decoding])
def test_a_student_of_a_changed_teacher_is_not_overwritten(tiny_teacher, tmp_path, capsys, change):
    teacher = copied(tiny_teacher, tmp_path / "teacher")
    student = create(teacher, tmp_path / "init")
    before = snapshot(student)
    change(teacher)
    message = refused(capsys, "--teacher_checkpoint", teacher, "--save_dir", student)
    assert "another student" in message
    assert "--overwrite_output_dir" in message
    assert snapshot(student) == before
    create(teacher, student, "--overwrite_output_dir")
    assert snapshot(student) != before


def test_a_student_of_other_settings_is_overwritten_only_when_asked(tiny_teacher, tmp_path, capsys):
    student = create(tiny_teacher, tmp_path / "init", "--decoder_layers", 3)
    (student / "notes.txt").write_text("mine")
    before = snapshot(student)
    message = refused(capsys, "--teacher_checkpoint", tiny_teacher, "--save_dir", student)
    assert "decoder_layer_indices was [0, 1, 3] and is now [0, 3]" in message
    assert "--overwrite_output_dir" in message
    assert snapshot(student) == before

    create(tiny_teacher, student, "--overwrite_output_dir", "True")
    assert load(student).config.decoder_layers == 2
    assert (student / "notes.txt").read_text() == "mine"


def test_other_files_in_the_directory_stay(tiny_teacher, tmp_path):
    directory = tmp_path / "clone"
    (directory / ".git").mkdir(parents=True)
    (directory / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (directory / "run_distillation.py").write_text("pass\n")
    student = create(tiny_teacher, directory)
    assert (directory / ".git" / "HEAD").read_text() == "ref: refs/heads/main\n"
    assert (directory / "run_distillation.py").exists()
    assert load(student).config.decoder_layers == 2


def test_a_model_that_the_script_did_not_write_is_not_overwritten(tiny_teacher, tiny_teacher_v2, tmp_path, capsys):
    model = copied(tiny_teacher_v2, tmp_path / "model")
    before = snapshot(model)
    message = refused(capsys, "--teacher_checkpoint", tiny_teacher, "--save_dir", model)
    assert "did not write" in message
    message = refused(capsys, "--teacher_checkpoint", model, "--save_dir", model, "--overwrite_output_dir")
    assert "the teacher's own directory" in message
    assert snapshot(model) == before


def test_a_student_whose_check_fails_is_not_saved(tiny_teacher, tmp_path, capsys):
    teacher = copied(tiny_teacher, tmp_path / "teacher")
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.decoder.layer_norm.weight"][0] = float("inf")
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    message = refused(capsys, "--teacher_checkpoint", teacher, "--save_dir", tmp_path / "init")
    assert "not finite" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == [".init.lock", "teacher"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_that_looks_whole(tiny_teacher, tmp_path, number):
    command = [sys.executable, script.__file__, "--teacher_checkpoint", tiny_teacher, "--save_dir", tmp_path / "init"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / ".init.partial"
    while not (partial / "model.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
    assert "Traceback" not in errors
    assert not (tmp_path / "init").exists()
    assert partial.exists() == (number == signal.SIGKILL)
    create(tiny_teacher, tmp_path / "init")
    assert {path.name for path in tmp_path.iterdir()} == {"init", ".init.lock"}


def test_a_run_stopped_among_other_files_is_taken_up_again(tiny_teacher, tmp_path, monkeypatch):
    directory = tmp_path / "clone"
    directory.mkdir()
    (directory / "train.sh").write_text("true\n")
    move, moved = shutil.move, []

    def stopped_at_the_fifth(source, target):
        moved.append(target)
        if len(moved) == 5:
            raise KeyboardInterrupt
        return move(source, target)

    monkeypatch.setattr(shutil, "move", stopped_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        create(tiny_teacher, directory)
    monkeypatch.undo()
    assert not (directory / "config.json").exists()
    assert json.loads((directory / "student.json").read_text())["status"] == "running"

    create(tiny_teacher, directory)
    assert json.loads((directory / "student.json").read_text())["status"] == "complete"
    assert load(directory).config.decoder_layers == 2
    assert (directory / "train.sh").exists()


# ---- the Hub ----


@pytest.fixture(scope="module")
def hub_teacher(tiny_teacher, tmp_path_factory) -> str:
    """The teacher on the Hub, its weights there in three forms, as openai/whisper-large-v3 has them."""
    folder = copied(tiny_teacher, tmp_path_factory.mktemp("hub") / "teacher")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    shutil.copy(folder / "model.safetensors", folder / "model.fp32-00001-of-00001.safetensors")
    HfApi().create_repo("acme/student-teacher", exist_ok=True)
    HfApi().upload_folder(repo_id="acme/student-teacher", folder_path=folder)
    return "acme/student-teacher"


def test_a_teacher_on_the_hub_is_downloaded_once_and_in_one_form(hub, hub_teacher, student, tmp_path, monkeypatch):
    other = create(hub_teacher, tmp_path / "init", "--cache_dir", tmp_path / "cache")
    assert (other / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    assert list((tmp_path / "cache").rglob("model.safetensors"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".bin" or "fp32" in path.name]

    card = ModelCard.load(other / "README.md")
    commit = HfApi().model_info(hub_teacher).sha
    assert card.data.base_model == hub_teacher
    assert card.data.license == "apache-2.0"
    assert commit in card.text

    hub.log.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = create(hub_teacher, tmp_path / "offline", "--cache_dir", tmp_path / "cache")
    assert (offline / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    assert not hub.log


def test_a_teacher_that_changes_on_the_hub_meanwhile_is_copied_as_it_was(
    hub, tiny_teacher, student, tmp_path, monkeypatch
):
    """The weights are of the commit that the card names, although they are loaded after the small files."""
    api = HfApi()
    teacher = copied(tiny_teacher, tmp_path / "teacher")
    api.create_repo("acme/moving-teacher")
    first = api.upload_folder(repo_id="acme/moving-teacher", folder_path=teacher).oid
    load_processor = script.load_processor

    def change_meanwhile(*given):
        change_weights(teacher)
        api.upload_folder(repo_id="acme/moving-teacher", folder_path=teacher)
        return load_processor(*given)

    monkeypatch.setattr(script, "load_processor", change_meanwhile)
    output = create("acme/moving-teacher", tmp_path / "init")
    assert api.model_info("acme/moving-teacher").sha != first
    assert json.loads((output / "student.json").read_text())["teacher_commit"] == first
    assert (output / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()


def test_nobody_is_asked_to_convert_a_teacher_whose_weights_are_pickled(
    hub, tiny_teacher, student, tmp_path, monkeypatch
):
    folder = resave(tiny_teacher, tmp_path / "pickled", "bin")
    HfApi().create_repo("acme/pickled-teacher", exist_ok=True)
    HfApi().upload_folder(repo_id="acme/pickled-teacher", folder_path=folder)
    asked = []
    monkeypatch.setattr("transformers.modeling_utils.auto_conversion", lambda *_, **__: asked.append(True))
    other = create("acme/pickled-teacher", tmp_path / "init", "--cache_dir", tmp_path / "cache")
    assert (other / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    assert not asked


@pytest.mark.parametrize(
    "path", ["/config.json$", "generation_config.json$", "/tokenizer.json$", "/(xet-read-token|cas)/"]
)
def test_a_hub_that_fails_for_one_file_is_one_clear_line(hub, hub_teacher, tmp_path, capsys, path):
    hub.fault(path, times=-1, status=403)
    flags = ["--teacher_checkpoint", hub_teacher, "--cache_dir", tmp_path / "cache", "--save_dir", tmp_path / "init"]
    assert hub_teacher in refused(capsys, *flags)
    assert not (tmp_path / "init").exists()


def test_a_hub_that_asks_to_wait_for_a_day_is_one_clear_line(hub, tmp_path, capsys):
    hub.fault("", times=-1, status=429, headers={"Retry-After": "86400"})
    message = refused(capsys, "--teacher_checkpoint", "acme/never-seen", "--save_dir", tmp_path / "init")
    assert "the Hub asks to wait for 24.0 h" in message


def test_an_upload_that_is_asked_to_wait_for_a_day_is_one_clear_line(hub, tiny_teacher, tmp_path, capsys):
    """The Xet client does not heed Retry-After: it tries a few times, for some minutes at most where nobody sets it."""
    hub.fault("/cas/", times=-1, status=429, headers={"Retry-After": "86400"})
    flags = ("--push_to_hub", "--hub_model_id", "acme/asked-to-wait", "--save_dir", tmp_path / "init")
    message = refused(capsys, "--teacher_checkpoint", tiny_teacher, *flags)
    assert "acme/asked-to-wait" in message
    assert "429 Too Many Requests" in message
    assert (tmp_path / "init" / "model.safetensors").exists()


class LoginPage(BaseHTTPRequestHandler):
    """Answers every request as the login page of a network does."""

    def do_GET(self) -> None:
        content = b"<html>Please log in.</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_POST = do_GET

    def log_message(self, *words) -> None:
        pass


@pytest.mark.parametrize("more", ["", "--push_to_hub --hub_model_id acme/behind-a-login"])
def test_a_login_page_in_place_of_the_hub_is_one_clear_line(tiny_teacher, tmp_path, more):
    teacher = tiny_teacher if more else "acme/never-seen"
    with ThreadingHTTPServer(("127.0.0.1", 0), LoginPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        command = [sys.executable, script.__file__, "--teacher_checkpoint", teacher, "--save_dir", tmp_path / "init"]
        run = subprocess.run([*command, *more.split()], env=environment, capture_output=True, text=True)
        server.shutdown()
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "JSON was expected, not '<html>Please log in" in run.stderr.splitlines()[-1]


def test_a_pushed_student_is_the_same_when_pulled(hub, hub_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "pushed-init").mkdir(parents=True)
    (tmp_path / "acme" / "pushed-init" / "notes.txt").write_text("mine")
    student = create(hub_teacher, "acme/pushed-init", "--push_to_hub")
    pulled = snapshot(Path(snapshot_download("acme/pushed-init", cache_dir=tmp_path / "cache")))
    assert pulled.pop(".gitattributes")
    local = snapshot(student)
    assert local.pop("notes.txt")
    assert pulled == local


def test_after_a_failed_push_the_same_command_only_pushes(hub, tiny_teacher, tmp_path, capsys):
    flags = ["--teacher_checkpoint", tiny_teacher, "--save_dir", tmp_path / "init"]
    flags += ["--push_to_hub", "--hub_model_id", "acme/failed-init"]
    hub.fault(r"/acme/failed-init/commit/", method="POST", times=-1, status=403)
    message = refused(capsys, *flags)
    assert f"complete in {tmp_path / 'init'}" in message
    assert "acme/failed-init" in message
    before = snapshot(tmp_path / "init")
    hub.faults.clear()
    assert script.main(list(map(str, flags))) == 0
    assert snapshot(tmp_path / "init") == before
    assert "model.safetensors" in HfApi().list_repo_files("acme/failed-init")


def test_a_trained_model_on_the_hub_is_replaced_only_when_asked(hub, tiny_teacher, tmp_path, capsys):
    flags = ["--teacher_checkpoint", tiny_teacher, "--save_dir", tmp_path / "init", "--push_to_hub"]
    flags += ["--hub_model_id", "acme/trained"]
    assert script.main(list(map(str, flags))) == 0
    files = {"model.safetensors": b"trained", "distillation.json": b"{}"}
    for name, content in files.items():
        HfApi().upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="acme/trained")
    shutil.rmtree(tmp_path / "init")
    message = refused(capsys, *flags)
    assert "acme/trained has a model.safetensors" in message and "--overwrite_output_dir" in message
    assert not (tmp_path / "init").exists()  # it was refused before the work
    assert Path(hf_hub_download("acme/trained", "model.safetensors")).read_bytes() == b"trained"
    assert script.main([*map(str, flags), "--overwrite_output_dir"]) == 0
    assert Path(hf_hub_download("acme/trained", "model.safetensors")).read_bytes() != b"trained"


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_model_of_somebody_else_on_the_hub_is_not_replaced(hub, name):
    repository = f"acme/others-{name.partition('.')[0]}"
    HfApi().create_repo(repository)
    script.refuse_other_model(repository, {})
    HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo=name, repo_id=repository)
    with pytest.raises(SystemExit, match=rf"{repository} has a {name} that this script did not write"):
        script.refuse_other_model(repository, {})


def test_a_student_of_other_settings_on_the_hub_is_replaced_only_when_asked(hub, tiny_teacher, tmp_path, capsys):
    flags = ["--teacher_checkpoint", tiny_teacher, "--push_to_hub", "--hub_model_id", "acme/other-init", "--save_dir"]
    assert script.main([*map(str, flags), str(tmp_path / "init")]) == 0
    message = refused(capsys, *flags, tmp_path / "second", "--decoder_layers", "1")
    assert "acme/other-init was made with other settings: decoder_layer_indices" in message
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("README.md", "reading the cards of {directory} and {repository} failed"),
        (script.RECORD, "reading {repository} failed"),
    ],
)
def test_a_repository_that_the_hub_does_not_give_is_one_clear_line_before_the_work(
    hub, tiny_teacher, tmp_path, capsys, name, said
):
    repository = f"acme/withheld-{name.partition('.')[0]}".lower()
    HfApi().create_repo(repository)
    for file in ("README.md", script.RECORD):
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo=file, repo_id=repository)
    hub.fault(rf"{repository}/resolve/.*{name}", times=-1, status=403)
    flags = ["--teacher_checkpoint", tiny_teacher, "--push_to_hub", "--hub_model_id", repository]
    message = refused(capsys, *flags, "--save_dir", tmp_path / "init")
    assert said.format(directory=tmp_path / "init", repository=repository) in message
    assert not (tmp_path / "init").exists()


def test_without_push_to_hub_nothing_is_sent(hub, tiny_teacher, tmp_path):
    create(tiny_teacher, tmp_path / "init", "--hub_model_id", "acme/never")
    create(tiny_teacher, tmp_path / "other", "--hub_model_id", "acme/never", "--push_to_hub", "False")
    assert not hub.log


def test_the_right_to_push_is_checked_before_the_work(hub, tiny_teacher, tmp_path, capsys, monkeypatch):
    flags = ["--teacher_checkpoint", tiny_teacher, "--save_dir", tmp_path / "init", "--push_to_hub"]
    assert "--hub_model_id" in refused(capsys, *flags)
    HfApi().create_repo("acme/readable-init")
    for token, repository in itertools.product(("hf_read", "hf_wrong"), ("acme/forbidden", "acme/readable-init")):
        monkeypatch.setenv("HF_TOKEN", token)
        message = refused(capsys, *flags, "--hub_model_id", repository)
        assert repository in message
        assert "hf auth" in message
        assert token not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("teacher", "named"),
    [
        ("acme/no-such-teacher", "acme/no-such-teacher"),
        ("no/such/directory", "neither a directory that exists nor a Hub id"),
    ],
)
def test_a_teacher_that_is_not_there_is_one_clear_line(hub, tmp_path, capsys, teacher, named):
    assert named in refused(capsys, "--teacher_checkpoint", teacher, "--save_dir", tmp_path / "init")
    assert not list(tmp_path.iterdir())


def test_a_directory_without_a_whisper_is_one_clear_line(tiny_teacher, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    flags = ["--save_dir", tmp_path / "init", "--teacher_checkpoint"]
    assert "config.json" in refused(capsys, *flags, tmp_path / "empty")
    weightless = copied(tiny_teacher, tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refused(capsys, *flags, weightless)
    assert not (tmp_path / "init").exists()


def test_a_file_in_place_of_the_student_s_directory_is_one_clear_line(tiny_teacher, tmp_path, capsys):
    (tmp_path / "init").write_text("mine")
    message = refused(capsys, "--teacher_checkpoint", tiny_teacher, "--save_dir", tmp_path / "init")
    assert message.endswith(f"error: --save_dir {tmp_path / 'init'} is not a directory")
    assert (tmp_path / "init").read_text() == "mine"


def test_a_dry_run_tells_what_a_run_would_do_and_changes_nothing(tiny_teacher, student, tmp_path, capsys):
    size = (student / "model.safetensors").stat().st_size / 1e9
    before = snapshot(student)
    HfApi().create_repo("acme/plan-teacher", exist_ok=True)
    HfApi().upload_folder(repo_id="acme/plan-teacher", folder_path=tiny_teacher)
    weights = (tiny_teacher / "model.safetensors").stat().st_size / 1e9
    for teacher, directory, done in (
        (tiny_teacher, student, "the student is there and would be checked"),
        ("acme/plan-teacher", tmp_path / "new", "nothing"),
    ):
        create(teacher, directory, "--dry_run", "--push_to_hub", "--hub_model_id", "acme/plan-student")
        told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
        assert told["input"].startswith(f"{teacher}, {weights:.3f} GB of weights")
        assert told["done"] == done
        assert told["pushes"] == f"acme/plan-student (private), about {size:.3f} GB"
        assert "time" not in told
    assert told["writes"] == f"{tmp_path / 'new'}, about {size:.3f} GB"
    create(tiny_teacher, tmp_path / "new", "--dry_run", "--dtype", "float16")
    assert f"about {size / 2:.3f} GB\n" in capsys.readouterr().out
    assert snapshot(student) == before
    assert not (tmp_path / "new").exists()
    assert not HfApi().repo_exists("acme/plan-student")


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors", script.RECORD])
def test_a_file_that_cannot_be_read_just_now_is_named_and_nothing_is_made_again(tiny_teacher, tmp_path, name):
    student = tmp_path / "init"
    flags = ["--teacher_checkpoint", tiny_teacher, "--save_dir", student]
    assert script.main(list(map(str, flags))) == 0
    before = snapshot(student)
    (student / name).chmod(0)
    labelling = ["--model_name_or_path", student, "--dataset_name", "none", "--output_dir", tmp_path / "out"]
    for stage, given in (("create_student_model.py", flags), ("run_pseudo_labelling.py", labelling)):
        command = [*(UNPRIVILEGED if os.geteuid() == 0 else []), sys.executable, stage, *map(str, given)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(script.__file__).parent)
        assert done.returncode == 1
        assert f"cannot read {student / name}: Permission denied. Run the same" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    (student / name).chmod(0o644)
    assert snapshot(student) == before


def test_the_fingerprint_of_a_student_changes_with_each_of_its_parts(tiny_teacher, tiny_teacher_v2, monkeypatch):
    tokenizers = [script.load_tokenizer(str(path)) for path in (tiny_teacher, tiny_teacher_v2)]
    student = script.WhisperForConditionalGeneration.from_pretrained(tiny_teacher, dtype=torch.float32)
    found = [script.fingerprint(student, tokenizer) for tokenizer in tokenizers]
    student.generation_config.alignment_heads = [[0, 1]]
    found.append(script.fingerprint(student, tokenizers[0]))
    with torch.no_grad():
        student.model.decoder.layers[-1].fc2.bias[-1] += 1e-5
    found.append(script.fingerprint(student, tokenizers[0]))
    found.append(script.fingerprint(student.to(torch.bfloat16), tokenizers[0]))
    assert len(set(found)) == 5
    monkeypatch.setattr(transformers.generation.configuration_utils, "__version__", "99.0")
    assert student.generation_config.to_diff_dict()["transformers_version"] == "99.0"
    assert script.fingerprint(student, tokenizers[0]) == found[-1]
