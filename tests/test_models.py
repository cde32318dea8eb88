"""Models as people have them: every stage that loads one takes it, or says in one line what is wrong before any work.

A stage of this file is a function of the model to try and of a directory for its results. Training is there twice, with
the model as the student and as the teacher.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import WhisperForConditionalGeneration, WhisperTokenizerFast

from tests import stages
from tests.test_student import edit, with_full_vocabulary

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
KEEP_ALL = ("--cer_threshold", 1e9)
TWO_CLIPS = ("--max_samples", 2, "--max_label_length", 20, "--dtype", "float32")
ONE_STEP = ("--max_steps", 1, "--per_device_train_batch_size", 4)
JAPANESE = ("--language", "ja")


@dataclass
class World:
    """What the stages read beside the model to try, made with the tiny teacher."""

    speech: Path
    teacher: Path
    labelled: Path
    vectorized: Path
    student: Path


def make_world(teacher: Path, clips: list[dict], root: Path, language: str | None = "ja") -> World:
    """Four clips with labels by this teacher, and a student. Without a language the teacher is an English-only one."""
    speech = stages.write_dataset(root / "speech", clips[:4])
    flags = ("--language", language) if language else ()
    labelled = stages.label(teacher, speech, root / "labelled", *flags, "--dtype", "float32", "--return_timestamps")
    stages.filter_clips(teacher, labelled, *KEEP_ALL, "--language", language or "en")
    student = stages.initialise(teacher, root / "init", "--decoder_layers", 2)
    vectorized = root / "labelled.cer_1000000000.0.vectorized"
    return World(speech, teacher, labelled, vectorized, student)


@pytest.fixture(scope="module")
def world(clips, tiny_teacher, tmp_path_factory) -> World:
    return make_world(tiny_teacher, clips, tmp_path_factory.mktemp("world"))


# ---- the stages, each with what it made as a value that can be compared ----


def labelling(model: Path, world: World, out: Path, language=JAPANESE):
    stages.label(model, world.speech, out / "out", *TWO_CLIPS, *language)
    return stages.read_labels(out / "out")


def filtering(model: Path, world: World, out: Path, language=JAPANESE):
    stages.filter_clips(model, world.labelled, *KEEP_ALL, "--output_dir", out / "out", *language)
    results = [out / "out" / f"labelled.cer_1000000000.0{suffix}" for suffix in ("", ".vectorized")]
    return [stages.read_rows(result) for result in results]


def initialising(model: Path, world: World, out: Path, language=None):
    student = stages.initialise(model, out / "out", "--decoder_layers", 2)
    generation = json.loads((student / "generation_config.json").read_text())
    del generation["alignment_heads"]  # which not every teacher names
    return generation, load_file(student / "model.safetensors").keys()


def train(student: Path, teacher: Path, world: World, out: Path, language):
    output = stages.distil(student, teacher, world.vectorized, out / "out", *ONE_STEP, *language)
    generation = json.loads((output / "generation_config.json").read_text())
    generation.pop("alignment_heads", None)
    return stages.read_figures(output, "loss"), generation


def learning(model: Path, world: World, out: Path, language=JAPANESE):
    return train(model, world.teacher, world, out, language)


def teaching(model: Path, world: World, out: Path, language=JAPANESE):
    return train(world.student, model, world, out, language)


def evaluating(model: Path, world: World, out: Path, language=JAPANESE):
    stages.evaluate(model, world.speech, out / "out", "--max_samples_per_split", 2, *language)
    return [row["hypothesis"] for row in stages.read_predictions(out / "out")]


ALL = [labelling, filtering, initialising, learning, teaching, evaluating]
LOADING_WEIGHTS = [stage for stage in ALL if stage != filtering]
LOADING_TOKENIZER = [stage for stage in ALL if stage != teaching]
WITH_LANGUAGE = [labelling, filtering, learning, evaluating]


@pytest.fixture
def model(tiny_teacher, tmp_path) -> Path:
    """A copy of the tiny teacher, to be changed."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "model"))


def complaint(stage, model: Path, world: World, tmp_path: Path, capsys) -> str:
    """The one line that a stage ends with. It must not have written anything but a lock."""
    with pytest.raises(SystemExit) as error:
        stage(model, world, tmp_path)
    line = str(error.value)
    assert "error: " in line
    assert "\n" not in line
    assert "Traceback" not in capsys.readouterr().err
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files <= {".training.lock"}
    return line


# ---- what is refused ----


@pytest.mark.parametrize("stage", ALL)
def test_a_model_of_another_kind_is_refused(stage, model, world, tmp_path, capsys):
    edit(model / "config.json", lambda config: config.update(model_type="wav2vec2"))
    assert "model is a wav2vec2 model, not a Whisper" in complaint(stage, model, world, tmp_path, capsys)


@pytest.mark.parametrize("stage", LOADING_WEIGHTS)
def test_a_damaged_generation_config_is_named(stage, model, world, tmp_path, capsys):
    (model / "generation_config.json").write_text('{"max_length": 448')
    line = complaint(stage, model, world, tmp_path, capsys)
    assert f"cannot load the generation config of {model}: JSON was expected, not '{{" in line


@pytest.mark.parametrize("stage", LOADING_TOKENIZER)
def test_a_model_without_tokenizer_files_is_refused(stage, model, world, tmp_path, capsys):
    for name in (*TOKENIZER_FILES, "tokenizer_config.json"):
        (model / name).unlink()
    line = complaint(stage, model, world, tmp_path, capsys)
    assert "model lacks the files of its tokenizer: tokenizer.json, or vocab.json and merges.txt" in line
    assert "Copy them from the model that it was trained from" in line


@pytest.mark.parametrize("stage", LOADING_TOKENIZER)
def test_a_checkpoint_directory_of_a_trainer_lacks_its_tokenizer(stage, model, world, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint-500"
    checkpoint.mkdir()
    WhisperForConditionalGeneration.from_pretrained(model).save_pretrained(checkpoint)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (checkpoint / name).write_bytes(b"of the trainer")
    (checkpoint / "trainer_state.json").write_text("{}")
    shutil.copy(model / "preprocessor_config.json", checkpoint)
    assert "checkpoint-500 lacks the files of its tokenizer" in complaint(stage, checkpoint, world, tmp_path, capsys)
    for name in (*TOKENIZER_FILES, "tokenizer_config.json"):
        shutil.copy(model / name, checkpoint)
    stage(checkpoint, world, tmp_path)


@pytest.mark.parametrize("stage", LOADING_TOKENIZER)
def test_a_model_without_feature_extractor_is_refused(stage, model, world, tmp_path, capsys):
    (model / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in complaint(stage, model, world, tmp_path, capsys)


@pytest.mark.parametrize("stage", LOADING_TOKENIZER)
def test_a_tokenizer_of_another_model_is_refused(stage, model, tiny_teacher_v2, world, tmp_path, capsys):
    for name in (*TOKENIZER_FILES, "tokenizer_config.json"):
        shutil.copy(tiny_teacher_v2 / name, model)
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    line = complaint(stage, model, world, tmp_path, capsys)
    assert f"the tokenizer's ids are {rows - 1}, vocab_size in config.json is {rows}" in line


@pytest.mark.parametrize("stage", LOADING_TOKENIZER)
def test_a_feature_extractor_of_another_model_is_refused(stage, model, tiny_teacher_v2, world, tmp_path, capsys):
    shutil.copy(tiny_teacher_v2 / "preprocessor_config.json", model)
    line = complaint(stage, model, world, tmp_path, capsys)
    assert "the feature extractor's mel bins are 80, num_mel_bins in config.json is 128" in line


@pytest.mark.parametrize("stage", LOADING_TOKENIZER)
def test_an_encoder_that_hears_other_than_30_seconds_is_refused(stage, model, world, tmp_path, capsys):
    edit(model / "config.json", lambda config: config.update(max_source_positions=750))
    assert "max_source_positions" in complaint(stage, model, world, tmp_path, capsys)


def lose_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.decoder.layers.3.fc1.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def forget_layers(model: Path) -> None:
    edit(model / "config.json", lambda config: config.update(decoder_layers=3))


def shorten_positions(model: Path) -> None:
    edit(model / "config.json", lambda config: config.update(max_target_positions=224))


DAMAGES = {
    lose_a_tensor: "lack model.decoder.layers.3.fc1.weight and 0 more tensors",
    forget_layers: "have, and config.json does not know, model.decoder.layers.3.",
    shorten_positions: "have another shape of model.decoder.embed_positions.weight and 0 more tensors",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stage", LOADING_WEIGHTS)
def test_weights_that_are_not_those_of_config_json_are_refused(damage, stage, model, world, tmp_path, capsys):
    damage(model)
    assert f"the weights of {model} {DAMAGES[damage]}" in complaint(stage, model, world, tmp_path, capsys)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("stage", LOADING_WEIGHTS)
def test_a_pointer_of_git_lfs_is_called_one(stage, file, model, world, tmp_path, capsys):
    (model / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert f"{file} is a pointer of Git LFS: get the file" in complaint(stage, model, world, tmp_path, capsys)


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("stage", ALL)
def test_an_adapter_has_to_be_merged_first(stage, has_config, model, world, tmp_path, capsys):
    adapter = {"base_model_name_or_path": "openai/whisper-large-v3", "peft_type": "LORA", "r": 8}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    if not has_config:
        (model / "config.json").unlink()
    line = complaint(stage, model, world, tmp_path, capsys)
    assert "an adapter (LoRA) has to be merged into its model first" in line
    assert "merge_and_unload()" in line


# ---- how a model decodes ----


def forget(*names: str):
    """A change of the generation config that takes these out."""

    def change(model: Path) -> None:
        kept = json.loads((model / "generation_config.json").read_text())
        for name in names:
            del kept[name]
        (model / "generation_config.json").write_text(json.dumps(kept))

    return change


def add(**settings):
    """A change of the generation config that adds these."""

    def change(model: Path) -> None:
        edit(model / "generation_config.json", lambda config: config.update(settings))

    return change


def move_into_config(model: Path) -> None:
    """As OpenAI's checkpoints were in 2022: no generation config, and what there was to say of it in the model's."""
    generation = json.loads((model / "generation_config.json").read_text())
    forced = [[1, generation["lang_to_id"]["<|en|>"]], [2, generation["task_to_id"]["translate"]]]
    moved = {name: generation[name] for name in ("suppress_tokens", "begin_suppress_tokens", "max_length")}
    edit(model / "config.json", lambda config: config.update(forced_decoder_ids=forced, **moved))
    (model / "generation_config.json").unlink()


def made_from_config(model: Path) -> None:
    """As `transformers` made them of those, which says so in the file."""
    move_into_config(model)
    config = json.loads((model / "config.json").read_text())
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "begin_suppress_tokens")
    kept = {name: config[name] for name in (*names, "suppress_tokens", "forced_decoder_ids", "max_length")}
    (model / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **kept}))


OLD = ("lang_to_id", "task_to_id", "is_multilingual", "no_timestamps_token_id", "prev_sot_token_id", "max_length")
REFUSED = {"num_return_sequences": 3, "early_stopping": "perhaps", "temperature": 0.0, "logits_processor": []}
FOR_OTHERS = {"do_sample": True, "num_beams": 3, "max_new_tokens": 1, "return_timestamps": True, "prompt_ids": [1, 2]}
RETURNED = {"return_dict_in_generate": True, "output_scores": True}
ENGLISH = {"language": "english", "task": "translate", "forced_decoder_ids": [[1, None], [2, 5]]}
CONFIGS = {
    "none": move_into_config,
    "from the model's": made_from_config,
    "of 2022": forget(*OLD),
    "wrongly English only": add(is_multilingual=False),
    "for another use": add(**REFUSED, **FOR_OTHERS, **RETURNED, **ENGLISH),
}
PLAIN: dict = {}  # what the stages make with the unchanged model


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stage", LOADING_WEIGHTS)
def test_generation_configs_of_all_times_give_the_same(stage, config, model, world, tmp_path):
    if stage not in PLAIN:
        PLAIN[stage] = stage(model, world, tmp_path)
        shutil.rmtree(tmp_path / "out")
    CONFIGS[config](model)
    assert stage(model, world, tmp_path) == PLAIN[stage]


# ---- other Whispers ----


@pytest.fixture(scope="module")
def shapes(tiny_teacher, clips, tmp_path_factory) -> dict[str, Path]:
    """Tiny models of the shapes of large-v3-turbo, distil-large-v3 and the English-only ones."""
    root = tmp_path_factory.mktemp("shapes")
    turbo = stages.initialise(tiny_teacher, root / "turbo", "--decoder_layers", 3)
    distilled = stages.initialise(tiny_teacher, root / "distilled", "--decoder_layers", 2)
    for directory in (turbo, distilled):  # neither repository has what our script writes
        (directory / "student.json").unlink()
        (directory / "README.md").unlink()
    return {"turbo": turbo, "distilled": distilled}


@pytest.mark.parametrize("shape", ["turbo", "distilled"])
@pytest.mark.parametrize("stage", ALL)
def test_models_of_few_decoder_layers_are_teachers_and_students(stage, shape, shapes, world, tmp_path):
    assert stage(shapes[shape], world, tmp_path)


@pytest.fixture(scope="module")
def english(tiny_teacher_v2, tmp_path_factory) -> Path:
    """A Whisper of English only, `*.en`, with what OpenAI's config.json has had since 2022."""
    model = with_full_vocabulary(tiny_teacher_v2, tmp_path_factory.mktemp("en") / "tiny.en", text_tokens=50256)

    def forget_languages(config: dict) -> None:
        del config["lang_to_id"], config["task_to_id"]
        config["is_multilingual"] = False

    edit(model / "generation_config.json", forget_languages)
    no_timestamps = json.loads((model / "generation_config.json").read_text())["no_timestamps_token_id"]
    edit(model / "config.json", lambda config: config.update(forced_decoder_ids=[[1, no_timestamps]]))
    return model


def test_an_english_only_model_goes_through_the_whole_chain(english, clips, tmp_path):
    world = make_world(english, clips, tmp_path / "world", language=None)
    tokenizer = WhisperTokenizerFast.from_pretrained(english)
    start, zero = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|0.00|>"])
    for label in stages.read_labels(world.labelled):
        assert label[0] == start
        assert label[1] >= zero
    for stage in (teaching, evaluating):
        assert stage(english, world, tmp_path / stage.__name__, ("--language", "en"))
    trained = tmp_path / "teaching" / "out"
    assert json.loads((trained / "generation_config.json").read_text())["is_multilingual"] is False
    assert evaluating(trained, world, tmp_path / "trained", ("--language", "English"))


def test_weights_of_a_pickle_with_the_tied_projection_in_it_are_all_known(model, world, tmp_path):
    """As `pytorch_model.bin` of earlier `transformers` has them."""
    weights = WhisperForConditionalGeneration.from_pretrained(model).state_dict()
    assert "proj_out.weight" in weights
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert labelling(model, world, tmp_path) == labelling(world.teacher, world, tmp_path / "expected")


# ---- tokens that were added to the vocabulary ----


@pytest.fixture
def extended(tiny_teacher, tmp_path) -> Path:
    """The tiny teacher as fine-tuned with two more tokens, "東京" and "<|laugh|>", behind the timestamps.

    It says "は東京<|laugh|>です", whatever it hears.
    """
    directory = Path(shutil.copytree(tiny_teacher, tmp_path / "extended"))
    tokenizer = WhisperTokenizerFast.from_pretrained(directory)
    tokenizer.add_tokens(["東京", "<|laugh|>"])
    tokenizer.save_pretrained(directory)
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (directory / name).unlink()
    model = WhisperForConditionalGeneration.from_pretrained(directory)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    return stages.speaking(directory, tmp_path / "speaking", SAID)


SAID = "は東京<|laugh|>です"


@pytest.mark.parametrize("flags", [(), ("--decode_token_ids",)], ids=["ids", "text"])
def test_tokens_added_behind_the_timestamps_are_text_in_every_stage(flags, extended, clips, tmp_path):
    rows = [{**clip, "transcription": SAID} for clip in clips[:3]]
    speech = stages.write_dataset(tmp_path / "speech", rows)
    labelled = stages.label(extended, speech, tmp_path / "labelled", *JAPANESE, "--dtype", "float32", *flags)
    if flags:
        assert stages.read_labels(labelled) == [SAID] * 3
    else:
        assert stages.read_labels(labelled) == [stages.make_label(extended, SAID)] * 3
    stages.filter_clips(extended, labelled, "--wer_threshold", 0)
    filtered = stages.read_rows(tmp_path / "labelled.wer_0.0")
    assert [row["labels"] for row in filtered] == [stages.make_label(extended, SAID)] * 3
    student = stages.initialise(extended, tmp_path / "init", "--decoder_layers", 2)
    vectorized = tmp_path / "labelled.wer_0.0.vectorized"
    stages.distil(student, extended, vectorized, tmp_path / "trained", *ONE_STEP)
    stages.evaluate(extended, speech, tmp_path / "eval")
    assert [row["hypothesis"] for row in stages.read_predictions(tmp_path / "eval")] == [SAID] * 3


def test_added_tokens_keep_their_place_between_timestamps_and_in_windows(extended, clips, tmp_path):
    label = stages.make_label(extended, SAID, 0.0, 1.0)
    rows = [{"name": clip["name"], "audio": stages.tone(1.0), "transcription": SAID} for clip in clips[:2]]
    rows = [{**row, "whisper_transcript": label} for row in rows]
    labelled = stages.write_dataset(tmp_path / "labelled", rows)
    flags = ("--timestamp_probability", 1, "--concatenate_audio", "--concatenate_gap_seconds", 0, "--skip_logmel")
    stages.filter_clips(extended, labelled, "--wer_threshold", 0, *flags)
    (window,) = stages.read_rows(tmp_path / "labelled.wer_0.0.packed")
    second = stages.make_label(extended, SAID, 1.0, 2.0)
    assert window["labels"] == [*label[:-1], *second[3:]]
    assert window["text"] == SAID + SAID


def test_pairs_of_timestamps_are_told_from_added_tokens():
    script = stages.run_pseudo_labelling
    zero = 1000
    added = zero + 1501
    times = range(zero, added)
    assert script.timestamps_are_paired([zero, 5, added, 6, zero + 50], times)
    assert not script.timestamps_are_paired([zero, 5, added], times)
    assert not script.timestamps_are_paired([added, zero, 5, zero + 50], times)


# ---- languages ----


@pytest.mark.parametrize("language", ["<|ja|>", "JA", "Japanese"])
@pytest.mark.parametrize("stage", WITH_LANGUAGE)
def test_a_language_has_one_meaning_however_it_is_written(stage, language, world, tmp_path):
    assert stage(world.teacher, world, tmp_path / "code") == stage(
        world.teacher, world, tmp_path / "other", ("--language", language)
    )


# ---- how the encoder computes ----


def test_the_encoder_keeps_its_states_row_by_row_and_computes_what_transformers_does(tiny_teacher):
    script = stages.run_pseudo_labelling
    config = script.load_config(tiny_teacher)
    rules = script.load_generation_config(tiny_teacher, config, script.load_tokenizer(tiny_teacher).get_vocab())
    ours = script.spare_copies(script.load_whisper(tiny_teacher, rules)).eval()
    stock = WhisperForConditionalGeneration.from_pretrained(tiny_teacher).eval()
    layouts = {}
    for model in (ours, stock):
        for layer in model.model.encoder.layers:
            layer.self_attn_layer_norm.register_forward_hook(
                lambda norm, inputs, output, model=model: layouts.setdefault(model, []).append(
                    inputs[0].is_contiguous()
                )
            )
    features = torch.randn(2, config.num_mel_bins, 3000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = [model.model.encoder(features).last_hidden_state for model in (ours, stock)]
    assert torch.equal(*states)
    assert all(layouts[ours])
    assert not any(layouts[stock])  # once it does by itself, ours need not do it


class Copies(TorchDispatchMode):
    """Counts copies of tensors."""

    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += operation is torch.ops.aten.clone.default
        return operation(*args, **kwargs or {})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("script", [stages.run_distillation, stages.run_pseudo_labelling, stages.run_short_form_eval])
def test_attention_copies_nothing_and_computes_what_transformers_does(script, attention, tiny_teacher):
    options = {"attn_implementation": attention}
    config = script.load_config(tiny_teacher)
    rules = script.load_generation_config(tiny_teacher, config, script.load_tokenizer(tiny_teacher).get_vocab())
    ours = script.spare_copies(script.load_whisper(tiny_teacher, rules, **options)).eval()
    stock = WhisperForConditionalGeneration.from_pretrained(tiny_teacher, **options).eval()
    inputs = {
        "input_features": torch.randn(2, config.num_mel_bins, 3000, generator=torch.Generator().manual_seed(0)),
        "decoder_input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]),
    }
    copies, results = [], []
    for model in (ours, stock):
        for use_cache in (False, True):
            with torch.no_grad():
                results.append(model(**inputs, use_cache=use_cache, output_attentions=attention == "eager"))
                with Copies() as counted:  # which itself changes how attention is computed
                    model(**inputs, use_cache=use_cache)
            copies.append(counted.number)
    if attention == "eager":  # whose matrix products copy what is not in one piece, and add in another order
        for name in ("encoder_attentions", "cross_attentions"):
            torch.testing.assert_close(results[0][name], results[2][name])
        for result in results:
            torch.testing.assert_close(result.logits, results[0].logits)
    else:
        assert all(torch.equal(result.logits, results[0].logits) for result in results)
        layers = config.encoder_layers + 2 * config.decoder_layers
        assert copies[2] - copies[0] >= 3 * layers  # of queries, keys and values
