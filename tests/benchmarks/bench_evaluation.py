"""Speed of run_short_form_eval.py beside a straightforward evaluation, with a draft model, and what its scoring takes.

    python -m tests.benchmarks.bench_evaluation
    python -m tests.benchmarks.bench_evaluation --model org/model --clips 500 --rounds 1 --dtype bfloat16
    python -m tests.benchmarks.bench_evaluation --assistant org/student --clips 16

All runs take turns on the same clips in one process, after a first batch of each that is not counted. Ours is the
script's own `predict`, from stored audio to stored predictions. The plain one is what one writes first, in the same
precision: log-mels padded to 30 s and mapped to the disk, which counts, then batches of 4 in the dataset's order. The
model is whisper-base, which ends its texts by itself as a trained model does.
"""

import argparse
import functools
import io
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import soundfile
import torch
import transformers

import run_short_form_eval as evaluation
from tests.sandbox.base_teacher import whisper_base
from tests.sandbox.corpus import build_corpus, cache_directory
from tests.sandbox.sentences import sentences

PLAIN_BATCH = 4
OURS, PLAIN = "run_short_form_eval.py", "plain"
ALONE, ASSISTED = "run_short_form_eval.py, batches of 1", "with the assistant"


def make_clips(number: int, root: Path) -> Path:
    """Manifest of spoken Japanese."""
    corpus = build_corpus(cache_directory() / f"corpus-bench-{number}", {"000": number + 1})
    with tarfile.open(corpus / "data" / "000.tar") as tar:
        members = [tar.extractfile(member).read() for member in tar if member.isfile()][:number]
    for index, audio in enumerate(members):
        (root / f"{index}.flac").write_bytes(audio)
    lines = "".join(f"{root / f'{index}.flac'},音声\n" for index in range(len(members)))
    (root / "clips.csv").write_text(f"audio,text\n{lines}")
    return root / "clips.csv"


def ours(clips: datasets.Dataset, recogniser: evaluation.Recogniser, args: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as root:
        shards = {Path(root) / "shard.jsonl": [[row] for row in range(len(clips))]}
        place = evaluation.Place(root, is_confined=False)  # the paths of the clips are absolute
        load = functools.partial(evaluation.load_recording, clips, place, args=args)
        evaluation.predict(load, shards, recogniser, args)
        predictions, _ = evaluation.read_predictions(shards)
    return [prediction["hypothesis"] for prediction in predictions]


def plain(clips: datasets.Dataset, model, processor) -> list[str]:
    def prepare(row: dict) -> dict:
        waveform, rate = soundfile.read(io.BytesIO(Path(row["audio"]["path"]).read_bytes()), dtype="float32")
        return {"input_features": processor.feature_extractor(waveform, sampling_rate=rate).input_features[0]}

    texts = []
    with tempfile.TemporaryDirectory() as root:
        mapped = clips.map(prepare, remove_columns=clips.column_names, cache_file_name=f"{root}/features.arrow")
        for batch in torch.utils.data.DataLoader(mapped.with_format("torch"), batch_size=PLAIN_BATCH):
            features = batch["input_features"].to(model.device, model.dtype)
            with torch.inference_mode():
                tokens = model.generate(features, language="ja", task="transcribe", max_new_tokens=256)
            texts += processor.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def prepare_runs(
    options: argparse.Namespace, manifest: Path
) -> tuple[datasets.Dataset, dict[str, Callable[[datasets.Dataset], list[str]]]]:
    """The clips, and what is measured on them, by name; everything is loaded before the clock starts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = evaluation.choose_dtype(options.dtype, device)
    flags = ["--model_name_or_path", options.model, "--dataset_name", str(manifest), "--dtype", options.dtype]
    batch = ["--per_device_eval_batch_size", str(options.batch_size)] if options.batch_size else []

    def run_ours(*more: str) -> Callable[[datasets.Dataset], list[str]]:
        args = evaluation.parse_args([*flags, *more])
        recogniser = evaluation.load_recogniser(args, device)
        return lambda clips: ours(clips, recogniser, args)

    clips, _ = evaluation.load_clips(evaluation.parse_args(flags))
    if options.assistant:  # which goes one clip at a time, so what it gains is against that
        runs = {ALONE: run_ours("--per_device_eval_batch_size", "1")}
        runs[ASSISTED] = run_ours("--assistant_model", options.assistant)
        runs["in batches"] = run_ours(*batch)
        return clips, runs
    processor = transformers.WhisperProcessor.from_pretrained(options.model)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(options.model, dtype=options.dtype)
    model.to(device).eval()
    return clips, {OURS: run_ours(*batch), PLAIN: lambda clips: plain(clips, model, processor)}


def clock(run: Callable, clips: datasets.Dataset) -> tuple[float, float, list[str]]:
    """Seconds by the wall and of the CPU, and the texts."""
    wall = time.perf_counter()
    cpu = time.process_time()
    texts = run(clips)
    return time.perf_counter() - wall, time.process_time() - cpu, texts


def score_saved(number: int) -> float:
    """CPU seconds to score predictions with a tenth of the characters wrong."""
    choose = random.Random(0)
    references = choose.choices(sentences(400), k=number)
    hypotheses = ["".join("ん" if choose.random() < 0.1 else letter for letter in text) for text in references]
    predictions = []
    for row, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        predictions.append({"id": str(row), "problem": None, "reference": reference, "hypothesis": hypothesis})
    started = time.process_time()
    evaluation.score_predictions(predictions, evaluation.make_scorers("kotoba", "ja", None))
    return time.process_time() - started


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="Whisper; unset = whisper-base")
    parser.add_argument("--clips", type=int, default=48, help="clips a run")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each")
    parser.add_argument("--batch_size", type=int, help="clips per batch of ours; unset = the script's own choice")
    parser.add_argument("--assistant", help="student that drafts; then it is compared with none")
    parser.add_argument("--dtype", help="precision of both; unset = the script's own choice")
    options = parser.parse_args(argv)
    options.model = options.model or str(whisper_base())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    with tempfile.TemporaryDirectory() as root:
        clips, runs = prepare_runs(options, make_clips(options.clips, Path(root)))
        for run in runs.values():
            clock(run, clips.select(range(min(32, len(clips)))))
        turns: dict[str, list[tuple]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                turns[name].append(clock(run, clips))

    first = turns[next(iter(turns))]
    print(f"{Path(options.model).name}, {options.dtype}, {options.clips} clips, {torch.get_num_threads()} threads\n")
    print("| | clips/s | wall s | CPU s | wall, it / ours | CPU, it / ours | same texts as ours |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, taken in turns.items():
        wall, cpu = (statistics.median(turn[kind] for turn in taken) for kind in (0, 1))
        ratios = [
            statistics.median(other[kind] / mine[kind] for mine, other in zip(first, taken, strict=True))
            for kind in (0, 1)
        ]
        same = sum(map(str.__eq__, first[0][2], taken[0][2]))
        against = f"{ratios[0]:.2f} | {ratios[1]:.2f} | {same}"
        print(f"| {name} | {options.clips / wall:.2f} | {wall:.1f} | {cpu:.1f} | {against} |")
    print(f"\n10,000 predictions scored, with intervals: {score_saved(10_000):.1f} s of CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
