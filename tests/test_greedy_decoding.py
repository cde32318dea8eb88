"""Greedy decoding in fixed memory, which labelling and evaluation share: its texts are those of `generate`."""

import contextlib
import io
import itertools
import types

import librosa
import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    GenerationConfig,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.generation import WhisperTimeStampLogitsProcessor

import run_pseudo_labelling as script

JAPANESE = {"language": "ja", "task": "transcribe"}
TEACHERS = ("tiny_teacher", "tiny_teacher_v2")


@pytest.fixture(scope="module")
def waveforms(clips) -> list[np.ndarray]:
    """Ten clips of 0.1 s to some 9 s, not in the order of their lengths."""
    found = []
    for number, clip in enumerate(clips[:10]):
        samples, rate = soundfile.read(io.BytesIO(clip["audio"]), dtype="float32")
        samples = librosa.resample(samples, orig_sr=rate, target_sr=16000)
        found.append(samples[: 1600 * (number + 1)] if number % 3 == 0 else samples)
    return found


def load(teacher, dtype: torch.dtype = torch.float32) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(teacher, dtype=dtype).eval()


def greedy(model, teacher, batch_size: int, max_new_tokens: int = 90, **options) -> script.GreedyDecoder:
    extractor = WhisperFeatureExtractor.from_pretrained(teacher)
    return script.GreedyDecoder(model, extractor, batch_size, max_new_tokens, **options)


def texts(decoder: script.GreedyDecoder, waveforms: list[np.ndarray]) -> list[list[int]]:
    """The sequences by clip; every clip has one."""
    found = list(decoder.decode(waveforms))
    assert sorted(number for number, _ in found) == list(range(len(waveforms)))
    return [sequence for _, sequence in sorted(found)]


def stock_texts(model, teacher, waveforms, max_new_tokens: int = 90, **options) -> list[list[int]]:
    """What `generate` gives for each clip alone, from transformers' own features, without padding."""
    extractor = WhisperFeatureExtractor.from_pretrained(teacher)
    end = model.generation_config.eos_token_id
    found = []
    for waveform in waveforms:
        features = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_features.to(model.dtype)
        options |= {"force_unique_generate_call": True, "max_new_tokens": max_new_tokens}
        sequence = model.generate(features, **options)[0].tolist()
        found.append(sequence[: sequence.index(end) + 1] if end in sequence else sequence)
    return found


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("arrangement", TEACHERS)
def test_texts_are_those_of_generate_whatever_the_batch_and_the_order(request, waveforms, arrangement, timestamps):
    teacher = request.getfixturevalue(arrangement)
    model = load(teacher)
    options = {**JAPANESE, "return_timestamps": timestamps}
    expected = stock_texts(model, teacher, waveforms, **options)
    lengths = {len(text) for text in expected}
    assert len(lengths) > 4  # so clips leave at different steps
    for batch_size in (2, 7):
        decoder = greedy(model, teacher, batch_size, **options)
        assert texts(decoder, waveforms) == expected
        assert texts(decoder, waveforms[::-1][:5]) == expected[::-1][:5]  # in memory that has been used
    assert not list(decoder.decode([]))


@pytest.mark.parametrize("language", ["en", "yue", None])
def test_languages_are_as_given_or_detected_clip_by_clip(tiny_teacher, waveforms, language):
    model = load(tiny_teacher)
    options = {"language": language, "task": "transcribe", "return_timestamps": True}
    expected = stock_texts(model, tiny_teacher, waveforms, **options)
    assert texts(greedy(model, tiny_teacher, 4, **options), waveforms) == expected
    if language is None:
        assert len({text[1] for text in expected}) > 1


def test_a_text_that_reaches_the_limit_is_as_long_as_it_and_one_that_ends_there_has_its_end(tiny_teacher, waveforms):
    model = load(tiny_teacher)
    options = {**JAPANESE, "return_timestamps": False}
    whole = stock_texts(model, tiny_teacher, waveforms[:5], **options)
    middle = sorted(map(len, whole))[2] - 4  # tokens of a text, its end included, behind the prefix of four
    for length in (1, middle - 1, middle, middle + 1):
        expected = [text[: 4 + length] for text in whole]
        assert texts(greedy(model, tiny_teacher, 3, length, **options), waveforms[:5]) == expected
        assert max(map(len, expected)) == 4 + length


def test_a_text_may_end_at_its_first_token(tiny_teacher, waveforms):
    model = load(tiny_teacher)
    end = model.generation_config.eos_token_id
    model.generation_config.begin_suppress_tokens = None
    kept = {"bias": torch.full((len(model.model.decoder.embed_tokens.weight),), -1e4)}
    kept["bias"][end] = 0
    model.proj_out.register_forward_hook(lambda module, inputs, logits: logits + kept["bias"])
    options = {**JAPANESE, "return_timestamps": False}
    found = texts(greedy(model, tiny_teacher, 2, **options), waveforms[:3])
    assert [len(text) for text in found] == [5, 5, 5]
    assert {text[-1] for text in found} == {end}


def test_in_bfloat16_texts_part_only_where_two_tokens_are_nearly_as_good(tiny_teacher, waveforms):
    model = load(tiny_teacher, torch.bfloat16)
    options = {**JAPANESE, "return_timestamps": False}
    expected = stock_texts(model, tiny_teacher, waveforms, **options)
    found = texts(greedy(model, tiny_teacher, 8, **options), waveforms)
    exact = load(tiny_teacher)
    extractor = WhisperFeatureExtractor.from_pretrained(tiny_teacher)
    assert sum(ours == stock for ours, stock in zip(found, expected, strict=True)) >= len(waveforms) / 2
    for waveform, ours, stock in zip(waveforms, found, expected, strict=True):
        if ours != stock:
            place = next(place for place, (a, b) in enumerate(zip(ours, stock, strict=False)) if a != b)
            features = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_features
            logits = exact(features, decoder_input_ids=torch.tensor([stock[:place]])).logits[0, -1]
            margin = abs(logits[ours[place]] - logits[stock[place]])
            assert margin < 0.02 * (logits.max() - logits.min()), (place, margin)


def test_a_rule_of_the_model_that_the_step_does_not_know_is_left_to_generate(tiny_teacher, tmp_path, caplog):
    config = GenerationConfig.from_pretrained(tiny_teacher)
    assert not script.other_rules(config)
    config.repetition_penalty = 1.5
    assert script.other_rules(config) == {"repetition_penalty"}
    assert "generation_config.json sets repetition_penalty: `generate` decodes" in caplog.text
    config = GenerationConfig.from_pretrained(tiny_teacher)
    config.eos_token_id = [config.eos_token_id, 0]
    assert script.other_rules(config) == {"eos_token_id"}
    assert "generation_config.json sets eos_token_id: `generate` decodes" in caplog.text


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("arrangement", TEACHERS)
def test_the_rules_of_a_step_are_those_of_transformers_on_random_logits(request, arrangement, timestamps):
    teacher = request.getfixturevalue(arrangement)
    model = load(teacher)
    rules = model.generation_config
    decoder = greedy(model, teacher, 64, 40, **JAPANESE, return_timestamps=timestamps)
    prefix = len(decoder.prompt)
    slots = decoder.make_slots()
    generator = torch.Generator().manual_seed(0)
    times = rules.no_timestamps_token_id + 1
    slots.sequences[:, :prefix] = torch.tensor(decoder.prompt)
    slots.position.fill_(prefix - 1)
    slots.ended.fill_(False)
    slots.latest.fill_(times - 1)
    processors = [
        SuppressTokensLogitsProcessor(rules.suppress_tokens),
        SuppressTokensAtBeginLogitsProcessor(rules.begin_suppress_tokens, prefix),
    ]
    if timestamps:
        processors.append(WhisperTimeStampLogitsProcessor(rules, begin_index=prefix))
    chosen_times = []
    for _ in range(39):
        logits = 3 * torch.randn(64, model.config.vocab_size, generator=generator)
        logits[:, times:] -= 11 * torch.rand(64, 1, generator=generator)  # so that texts win as well
        logits[::2, rules.begin_suppress_tokens] += 20  # so that the rule for the first token is needed
        logits[::4].scatter_add_(1, slots.latest[::4, None], torch.tensor(15.0).expand(16, 1))  # and that of repeating
        decoder.next_logits = lambda slots, token, logits=logits: logits.clone()
        going_on = ~slots.ended
        text = slots.sequences[:, : int(slots.position.max()) + 1].clone()
        decoder.step(slots)
        expected = logits
        for processor in processors:
            expected = processor(text, expected)
        chosen = slots.sequences.gather(1, slots.position[:, None])[:, 0]
        assert torch.equal(chosen[going_on], expected.argmax(-1)[going_on])
        chosen_times.append((chosen >= times).float().mean().item())
        slots.ended.logical_and_(going_on.logical_not())  # this test goes on behind an end, as the rules do
    assert 0.05 < np.mean(chosen_times) < 0.5


def test_the_log_mel_of_a_gpu_is_to_the_bit_what_the_extractor_computes(tiny_teacher, tiny_teacher_v2, waveforms):
    for teacher in (tiny_teacher, tiny_teacher_v2):
        extractor = WhisperFeatureExtractor.from_pretrained(teacher)
        padded = torch.zeros(len(waveforms), 480_000)
        for row, waveform in zip(padded, waveforms, strict=True):
            row[: len(waveform)] = torch.from_numpy(waveform)
        expected = extractor(waveforms, sampling_rate=16000, return_tensors="pt").input_features
        assert torch.equal(script.log_mel_on_device(padded, extractor), expected)


# ---- a GPU, as far as a CPU can show ---------------------------------------------------------------------------------


# Tensors of the device `meta` have no values: whatever reads one, or joins it with one of the CPU, raises.


def model_without_values(dtype: torch.dtype) -> WhisperForConditionalGeneration:
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 51866}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads)).eval().to(dtype)
    names = {"decoder_start_token_id": 50258, "eos_token_id": 50257, "no_timestamps_token_id": 50364}
    rules = {"suppress_tokens": [1, 2], "max_initial_timestamp_index": 50, "is_multilingual": False}
    model.generation_config = GenerationConfig(**names, **rules)
    return model


def test_features_stay_on_the_device_that_computes_them(tiny_teacher):
    extractor = WhisperFeatureExtractor.from_pretrained(tiny_teacher)
    features = script.pad_window(script.log_mel([np.zeros(5000, np.float32)] * 2, extractor, "meta"))
    assert features.device.type == "meta"
    assert features.shape == (2, 128, 3000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("timestamps", [False, True])
@torch.inference_mode()
def test_a_step_reads_nothing_back_and_mixes_no_devices(timestamps, dtype):
    model = model_without_values(dtype)
    decoder = script.GreedyDecoder(model, None, 16, 60, return_timestamps=timestamps)
    slots = decoder.make_slots()
    for number in (16, 8):
        decoder.step(slots.first(number))
    tensors = [slots.sequences, slots.position, slots.ended, slots.before_is_time, slots.latest]
    assert {tensor.device.type for tensor in itertools.chain(tensors, *slots.keys_values)} == {"meta"}
    decoder.next_logits = lambda slots, token: torch.zeros(16, 51866)
    with pytest.raises(RuntimeError, match="meta"):
        decoder.step(slots)
    decoder.next_logits = lambda slots, token: torch.zeros(16, int(token.max()), device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        decoder.step(slots)


class StandInGraph:
    """In place of a CUDA graph: it does again what was done while it was captured."""

    def __init__(self):
        self.step = None

    def replay(self):
        self.step()


@pytest.fixture
def gpu(monkeypatch):
    """Decoders on a CPU take themselves to be on a GPU; gives the sizes of the steps that were captured."""
    sizes = []
    step = script.GreedyDecoder.step
    capturing = []
    waited = []

    @contextlib.contextmanager
    def graph(stand_in):
        capturing.append(stand_in)
        yield
        capturing.remove(stand_in)

    def noted(decoder, slots):
        step(decoder, slots)
        for stand_in in capturing:
            sizes.append(len(slots.position))
            stand_in.step = lambda: step(decoder, slots)

    stream = types.SimpleNamespace(
        wait_stream=lambda other: None, record_event=lambda: "after the steps", wait_event=waited.append
    )
    monkeypatch.setattr(script.GreedyDecoder, "step", noted)
    forget = script.GreedyDecoder.forget
    monkeypatch.setattr(
        script.GreedyDecoder, "forget", lambda decoder: (forget(decoder), setattr(decoder, "on_gpu", True))
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    yield sizes
    assert set(waited) == {"after the steps"}  # each time before the host looks


@pytest.mark.parametrize("timestamps", [False, True])
def test_steps_of_graphs_for_all_slots_and_for_half_of_them_give_the_same_texts(
    gpu, tiny_teacher, waveforms, timestamps
):
    model = load(tiny_teacher)
    options = {**JAPANESE, "return_timestamps": timestamps}
    expected = stock_texts(model, tiny_teacher, waveforms, **options)
    decoder = greedy(model, tiny_teacher, 16, **options)
    assert texts(decoder, waveforms) == texts(decoder, waveforms) == expected
    assert gpu == [16, 8]  # each once, while clips were in its slots


def test_a_gpu_has_the_next_clips_to_encode_while_the_host_looks_which_have_ended(tiny_teacher, waveforms, monkeypatch):
    decoder = greedy(load(tiny_teacher), tiny_teacher, 8, **JAPANESE, return_timestamps=False)
    events = []
    for name in ("encode_group", "fill", "run_steps", "take_ended"):
        work = getattr(decoder, name)
        monkeypatch.setattr(decoder, name, lambda *given, name=name, work=work: (events.append(name), work(*given))[1])
    texts(decoder, waveforms)
    assert events.count("encode_group") == events.count("fill") == 5  # in groups of two
    first_steps = events.index("run_steps")
    assert events[:first_steps].count("encode_group") == 4  # what is encoded for later comes after the steps
    for moment in [index for index, event in enumerate(events) if event == "take_ended"]:
        filled = events[:moment].count("fill")
        assert events[:moment].count("encode_group") == min(5, filled + 1)


def test_a_step_that_cannot_be_captured_runs_as_it_is_and_is_named(gpu, tiny_teacher, waveforms, monkeypatch, caplog):
    @contextlib.contextmanager
    def refuse(graph):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    model = load(tiny_teacher)
    options = {**JAPANESE, "return_timestamps": True}
    expected = stock_texts(model, tiny_teacher, waveforms[:6], **options)
    assert texts(greedy(model, tiny_teacher, 4, **options), waveforms[:6]) == expected
    assert caplog.text.count("cannot be a CUDA graph: CUDA error: operation not permitted") == 1


def test_memory_that_runs_out_while_a_step_is_captured_halves_the_slots_and_changes_no_text(
    gpu, tiny_teacher, waveforms, monkeypatch, caplog
):
    model = load(tiny_teacher)
    options = {**JAPANESE, "return_timestamps": True}
    expected = stock_texts(model, tiny_teacher, waveforms, **options)
    decoder = greedy(model, tiny_teacher, 16, **options)
    graph = torch.cuda.graph

    @contextlib.contextmanager
    def small_device(stand_in):
        if decoder.batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        with graph(stand_in):
            yield

    monkeypatch.setattr(torch.cuda, "graph", small_device)
    assert texts(decoder, waveforms) == expected
    assert (decoder.batch_size, gpu) == (8, [8])
    assert caplog.text.count("for the rest of the run") == 1
    assert "cannot be a CUDA graph" not in caplog.text


def test_memory_that_runs_out_halves_the_slots_and_changes_no_text(tiny_teacher, waveforms, monkeypatch, caplog):
    model = load(tiny_teacher)
    options = {**JAPANESE, "return_timestamps": True}
    expected = stock_texts(model, tiny_teacher, waveforms, **options)
    decoder = greedy(model, tiny_teacher, 8, **options)
    fill, steps = decoder.fill, []

    def small_device(clips, targets):
        steps.append(decoder.batch_size)
        if decoder.batch_size > 2 and len(steps) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        fill(clips, targets)

    decoder.fill = small_device
    assert texts(decoder, waveforms) == expected
    assert decoder.batch_size == 2
    assert caplog.text.count("for the rest of the run") == 2
    decoder.batch_size = 1
    decoder.fill = lambda clips, targets: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(SystemExit, match="not enough memory for one clip"):
        texts(decoder, waveforms[:1])


LARGE_V3 = {"d_model": 1280, "encoder_ffn_dim": 5120, "decoder_layers": 32, "vocab_size": 51866}


@pytest.mark.parametrize(
    ("free", "layers", "beams", "by_generate", "number"),
    [
        (80e9, 32, 1, False, 128),
        (24e9, 32, 1, False, 76),
        (24e9, 32, 1, True, 65),  # which encodes all clips of a batch at a time
        (24e9, 32, 5, False, 15),
        (24e9, 2, 1, False, 128),
        (1e8, 32, 1, False, 1),
    ],
)
def test_the_batch_that_fits_follows_from_free_memory_and_shape(
    monkeypatch, caplog, free, layers, beams, by_generate, number
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    config = WhisperConfig(**LARGE_V3 | {"decoder_layers": layers})
    model = types.SimpleNamespace(config=config, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert script.fitting_batch(model, 128, beams, by_generate, 16) == number
    model.device = torch.device("cpu")
    assert script.fitting_batch(model, 128, beams, by_generate, 16) == 16
