"""A small corpus of Japanese speech in ReazonSpeech's own layout, spoken by Open JTalk.

    python -m tests.sandbox.corpus DIR --clips 000=400 fff=60

builds in DIR what the mirror serves:

    data/000.tar, data/fff.tar      uncompressed, members 000/0123456789abc.flac: FLAC, 16 kHz, mono
    tsv/{tiny,small,medium,large,all}.tsv
                                    000/0123456789abc.flac<TAB>transcription, in the order of the names; a subset is
                                    the tars it has in ReazonSpeech (tiny 000, small 000 to 00b, …), as far as here

As in the real corpus, the tars also hold what a loader must live with, on top of the clips that were asked for:
every tar has one member without a transcription, every TSV that covers it one transcription without a member, and
every fourth member of the first tar is named with a leading `./`. The order of the members is not that of the TSV.

No sentence is in two tars, so a tar can be held out. The same numbers of clips give the same bytes.
"""

import argparse
import hashlib
import importlib.metadata
import io
import multiprocessing
import os
import random
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from tests.sandbox.files import built_once
from tests.sandbox.sentences import sentences

VERSION = 2  # of the recipe: count up when the same call shall give other bytes
SAMPLING_RATE = 16_000
# https://corpus.reazon-research.org/reazonspeech-v2: how many tars, from 000 on, a subset has
SUBSETS = {"tiny": 1, "small": 12, "medium": 116, "large": 579, "all": 4096}
# Open JTalk's "Mei", made into five speakers: (speed, pitch in half tones)
VOICES = {
    "plain": (1.0, 0.0),
    "brisk": (1.2, 1.5),
    "deep": (1.05, -5.0),
    "slow": (0.88, -2.0),
    "high": (1.12, 4.0),
}


@dataclass(frozen=True)
class Clip:
    """What is to be said, and under which name it is stored."""

    tar: str  # stem of the tar's name, three hex digits
    text: str

    @property
    def name(self) -> str:
        """`000/0123456789abc.flac`, by a hash, so that the order of the names says nothing about the content."""
        return f"{self.tar}/{hashlib.sha256(self.text.encode()).hexdigest()[:13]}.flac"


def cache_directory() -> Path:
    """Where the sandbox keeps what is expensive to make: `$KOTOBA_SANDBOX_CACHE` or ~/.cache/kotoba-whisper-sandbox."""
    path = Path(os.environ.get("KOTOBA_SANDBOX_CACHE") or "~/.cache/kotoba-whisper-sandbox").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def build_corpus(root: Path, clips: dict[str, int]) -> Path:
    """Build a corpus with these numbers of clips (`{"000": 24, "fff": 8}`) in `root`, unless it is there.

    The directory appears whole or not at all. When several processes want it at once, one builds and the others wait.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir()) and not (root / ".recipe.json").exists():
        raise FileExistsError(f"{root} has files in it that are no corpus")
    plan = plan_clips(clips)
    names = "\n".join(clip.name for tar in plan.values() for clip in tar)  # a name is a hash of what is said
    recipe = {
        "version": VERSION,
        "clips": clips,
        "names": hashlib.sha256(names.encode()).hexdigest(),
        "engine": "pyopenjtalk-plus " + importlib.metadata.version("pyopenjtalk-plus"),
    }
    return built_once(root, recipe, partial(write_corpus, plan=plan))


def write_corpus(root: Path, plan: dict[str, list[Clip]]) -> None:
    """Write the tars and the TSVs; of a tar's clips, the first gets no transcription and the last no member."""
    flacs = speak_all([clip for tar in plan.values() for clip in tar[:-1]])
    (root / "data").mkdir()
    for stem, tar_clips in plan.items():
        dotted = stem == next(iter(plan))
        write_tar(root / "data" / f"{stem}.tar", [(clip.name, flacs[clip.name]) for clip in tar_clips[:-1]], dotted)
    (root / "tsv").mkdir()
    for subset, tars in SUBSETS.items():
        rows = [(clip.name, clip.text) for stem, tar in plan.items() if int(stem, 16) < tars for clip in tar[1:]]
        lines = "".join(f"{name}\t{text}\n" for name, text in sorted(rows))
        (root / "tsv" / f"{subset}.tsv").write_text(lines, encoding="utf-8", newline="\n")


def plan_clips(clips: dict[str, int]) -> dict[str, list[Clip]]:
    """For each tar its clips and two more: the first, to have no transcription, and the last, to have no member."""
    texts = iter(sentences(sum(clips.values()) + 2 * len(clips)))
    return {stem: [Clip(stem, next(texts)) for _ in range(clips[stem] + 2)] for stem in sorted(clips)}


def speak_all(clips: list[Clip]) -> dict[str, bytes]:
    """Each clip's name and FLAC file, made on all cores."""
    workers = min(len(os.sched_getaffinity(0)), max(1, len(clips) // 8))
    bar = {"total": len(clips), "desc": "Speaking", "unit": "clip", "disable": len(clips) < 100}
    if workers == 1:
        return {clip.name: speak(clip) for clip in tqdm(clips, **bar)}
    # Spawned, not forked: the caller may have threads, and Open JTalk keeps state.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        flacs = pool.map(speak, clips, chunksize=4)
        return {clip.name: flac for clip, flac in tqdm(zip(clips, flacs, strict=True), **bar)}


def speak(clip: Clip) -> bytes:
    """A FLAC file of the text, by a voice, at a loudness and between silences that the text decides."""
    import pyopenjtalk  # slow to import, and not needed when the corpus is there

    rng = random.Random(clip.text)
    speed, half_tone = VOICES[rng.choice(list(VOICES))]
    speed *= rng.uniform(0.95, 1.05)
    half_tone += rng.uniform(-0.5, 0.5)
    samples, rate = pyopenjtalk.tts(clip.text, speed=speed, half_tone=half_tone, use_sudachi_kanji_yomi=False)
    samples = soxr.resample(samples, rate, SAMPLING_RATE)
    samples *= rng.uniform(0.25, 0.9) / np.abs(samples).max()
    silences = [np.zeros(int(rng.uniform(0.05, 0.35) * SAMPLING_RATE)) for _ in range(2)]
    samples = np.concatenate([silences[0], samples, silences[1]])
    flac = io.BytesIO()
    soundfile.write(flac, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return flac.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], dotted: bool) -> None:
    """Write (name, content) pairs in this order; `dotted` puts `./` before every fourth name."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, (name, content) in enumerate(members):
            info = tarfile.TarInfo(f"./{name}" if dotted and index % 4 == 3 else name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("directory", type=Path, help="root of the mirror to build")
    parser.add_argument(
        "--clips",
        type=tar_and_clips,
        nargs="+",
        default=[("000", 400), ("fff", 60)],
        metavar="TAR=N",
        help="how many clips a tar has, for each (000=400 fff=60)",
    )
    return parser.parse_args(argv)


def tar_and_clips(argument: str) -> tuple[str, int]:
    stem, number = argument.split("=")
    int(stem, 16)  # or ValueError
    return stem, int(number)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    print(build_corpus(args.directory, dict(args.clips)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
