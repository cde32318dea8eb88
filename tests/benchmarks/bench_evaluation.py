"""Speed of run_short_form_eval.py beside a plain evaluation, and what its scoring takes.

    python -m tests.benchmarks.bench_evaluation
    python -m tests.benchmarks.bench_evaluation --model org/model --clips 500 --rounds 1 --dtype bfloat16

Three runs take turns on the same clips in one process, after a first batch of each that is not counted. Ours is the
script's own `predict`, from stored audio to stored predictions. The plain one is what one writes first: log-mels padded
to 30 s and mapped to the disk, then batches of 4 in the dataset's order. The encoder's own time is that of the same
log-mels in batches of ours, ready in memory. CPU seconds are of all threads: on a busy machine they are the better
ones to compare. With whisper-base, which ends its texts by itself as a trained model does.
"""

import argparse
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import transformers  # noqa: E402

import run_short_form_eval as evaluation  # noqa: E402
from tests.sandbox.base_teacher import whisper_base  # noqa: E402
from tests.sandbox.corpus import build_corpus, cache_directory  # noqa: E402
from tests.sandbox.sentences import sentences  # noqa: E402

PLAIN_BATCH = 4


def make_clips(number: int, root: Path) -> datasets.Dataset:
    """Spoken Japanese, as the script itself opens it."""
    corpus = build_corpus(cache_directory() / f"corpus-bench-{number}", {"000": number + 1})
    with tarfile.open(corpus / "data" / "000.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()][:number]
    for index, (_, audio) in enumerate(members):
        (root / f"{index}.flac").write_bytes(audio)
    (root / "clips.csv").write_text("audio,text\n" + "".join(f"{index}.flac,音声\n" for index in range(len(members))))
    return evaluation.open_dataset(
        evaluation.parse_args(["--model_name_or_path", "none", "--dataset_name", str(root / "clips.csv")])
    )


def ours(clips, transcriber, args, root: Path) -> None:
    size = 64  # the script's smallest shard
    shards = {
        range(start, min(start + size, len(clips))): root / f"{start}.jsonl" for start in range(0, len(clips), size)
    }
    evaluation.predict(clips, shards, transcriber, args, show=False)


def plain(clips, transcriber, args, root: Path) -> None:
    def prepare(row: dict) -> dict:
        waveform = evaluation.load_clip(evaluation.audio_bytes(row["audio"])).waveform
        return {"input_features": transcriber.extract([waveform])[0].numpy()}

    mapped = clips.map(prepare, remove_columns=clips.column_names, cache_file_name=str(root / "features.arrow"))
    loader = torch.utils.data.DataLoader(mapped.with_format("torch"), batch_size=PLAIN_BATCH)
    texts = []
    for batch in loader:
        texts += transcriber.transcribe(batch["input_features"])


def encoder_alone(batches: list[torch.Tensor], transcriber) -> None:
    model = transcriber.model
    with torch.inference_mode():
        for features in batches:
            model.model.encoder(features.to(model.device, model.dtype))
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def clock(function: Callable, *arguments) -> tuple[float, float]:
    """Seconds by the wall and of the CPU."""
    with tempfile.TemporaryDirectory() as root:
        before = time.perf_counter(), time.process_time()
        function(*arguments, Path(root))
        return time.perf_counter() - before[0], time.process_time() - before[1]


def score_saved(number: int) -> float:
    """CPU seconds to score predictions with a tenth of the characters wrong."""
    choose = random.Random(0)
    references = choose.choices(sentences(400), k=number)
    hypotheses = ["".join("ん" if choose.random() < 0.1 else letter for letter in text) for text in references]
    started = time.process_time()
    evaluation.score(references, hypotheses, evaluation.normalise_kotoba)
    return time.process_time() - started


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="Whisper; whisper-base if unset")
    parser.add_argument("--clips", type=int, default=32, help="clips a run")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each")
    parser.add_argument("--batch_size", type=int, default=32, help="clips of a batch of ours")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if unset")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()

    model = options.model or str(whisper_base())
    args = evaluation.parse_args(
        [
            *("--model_name_or_path", model, "--dataset_name", "none", "--dtype", options.dtype),
            *("--per_device_eval_batch_size", str(options.batch_size)),
        ]
    )
    transcriber = evaluation.Transcriber(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as root:
        clips = make_clips(options.clips, Path(root))
        waveforms = [clip.waveform for _, clip in evaluation.read_rows(clips, range(len(clips)))]
        batches = [
            transcriber.extract(waveforms[start : start + options.batch_size])
            for start in range(0, len(waveforms), options.batch_size)
        ]
        runs = {
            "run_short_form_eval.py": lambda root: ours(clips, transcriber, args, root),
            "plain": lambda root: plain(clips, transcriber, args, root),
            "encoder alone": lambda root: encoder_alone(batches, transcriber),
        }
        encoder_alone([batches[0][:PLAIN_BATCH]], transcriber)
        transcriber.transcribe(batches[0][:PLAIN_BATCH])
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, function in runs.items():
                times[name].append(clock(function))

    first = next(iter(times))
    print(f"{Path(model).name}, {options.dtype}, {len(clips)} clips, {torch.get_num_threads()} threads\n")
    print(
        "| | clips/s | wall s | CPU s | wall, ours / it | CPU, ours / it |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for name, taken in times.items():
        wall, cpu = (statistics.median(run[kind] for run in taken) for kind in (0, 1))
        ratios = [
            statistics.median(mine[kind] / other[kind] for mine, other in zip(times[first], taken, strict=True))
            for kind in (0, 1)
        ]
        print(f"| {name} | {len(clips) / wall:.2f} | {wall:.1f} | {cpu:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    print(f"\n10,000 predictions scored, with intervals: {score_saved(10_000):.1f} s of CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
