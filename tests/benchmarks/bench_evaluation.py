"""Speed of run_short_form_eval.py beside a plain evaluation, with a draft model, and what its scoring takes.

    python -m tests.benchmarks.bench_evaluation
    python -m tests.benchmarks.bench_evaluation --model org/model --clips 500 --rounds 1 --dtype bfloat16
    python -m tests.benchmarks.bench_evaluation --assistant org/student --clips 16

Runs take turns on the same clips in one process, after a first batch of each that is not counted. Ours is the
script's own `predict`, from stored audio to stored predictions. The plain one is what one writes first, with nothing of
ours: log-mels padded to 30 s and mapped to the disk, which counts, then batches of 4 in the dataset's order. The
encoder's own time is that of the same windows, ready in memory, the way that ours calls it (on a CPU one by one, which
is faster than in batches). With whisper-base, which ends its texts by itself as a trained model does.
"""

import argparse
import io
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import soundfile
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


def ours(clips, transcriber, args, root: Path) -> list[str]:
    shards = {root / "shard.jsonl": [[row] for row in range(len(clips))]}
    evaluation.predict(clips, shards, transcriber, args, show=False)
    rows, _ = evaluation.read_predictions(shards)
    return [row["hypothesis"] for row in rows]


def plain(clips, model, processor, root: Path) -> list[str]:
    def prepare(row: dict) -> dict:
        waveform, rate = soundfile.read(io.BytesIO(Path(row["audio"]["path"]).read_bytes()), dtype="float32")
        return {"input_features": processor.feature_extractor(waveform, sampling_rate=rate).input_features[0]}

    mapped = clips.map(prepare, remove_columns=clips.column_names, cache_file_name=str(root / "features.arrow"))
    texts = []
    for batch in torch.utils.data.DataLoader(mapped.with_format("torch"), batch_size=PLAIN_BATCH):
        features = batch["input_features"].to(model.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(features, language="ja", task="transcribe", max_new_tokens=256)
        texts += processor.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def encoder_alone(windows: torch.Tensor, model, batch_size: int) -> None:
    with torch.inference_mode():
        for batch in windows.to(model.device, model.dtype).split(1 if model.device.type == "cpu" else batch_size):
            model.model.encoder(batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def clock(function: Callable) -> tuple[float, float, list[str] | None]:
    """Seconds by the wall and of the CPU, and what came out."""
    with tempfile.TemporaryDirectory() as root:
        before = time.perf_counter(), time.process_time()
        result = function(Path(root))
        return time.perf_counter() - before[0], time.process_time() - before[1], result


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
    parser.add_argument("--clips", type=int, default=48, help="clips a run")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each")
    parser.add_argument("--batch_size", type=int, help="clips of a batch of ours; the script's own choice if unset")
    parser.add_argument("--assistant", help="student that drafts; then it is compared with none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if unset")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = options.model or str(whisper_base())
    flags = ["--model_name_or_path", name, "--dataset_name", "none", "--dtype", options.dtype]
    flags += ["--per_device_eval_batch_size", str(options.batch_size)] if options.batch_size else []

    def load(*more: str) -> tuple:
        args = evaluation.parse_args([*flags, *more])
        transcriber = evaluation.Transcriber(args, device)
        transcriber.load()
        return transcriber, args

    transcriber, args = load()
    model, processor = transcriber.model, transformers.WhisperProcessor.from_pretrained(name)
    with tempfile.TemporaryDirectory() as root:
        clips = make_clips(options.clips, Path(root))
        waveforms = [evaluation.read_item(clips, [row], args)[1] for row in range(len(clips))]
        windows = torch.cat([transcriber.extract([waveform]) for waveform in waveforms])
        runs = {
            "run_short_form_eval.py": lambda root: ours(clips, transcriber, args, root),
            "plain": lambda root: plain(clips, model, processor, root),
            "encoder alone": lambda root: encoder_alone(windows, model, transcriber.batch_size),
        }
        if options.assistant:  # which goes one clip at a time, so what it gains is against that
            alone = load("--per_device_eval_batch_size", "1")
            assisted = load("--assistant_model", options.assistant)
            runs = {
                "run_short_form_eval.py, batches of 1": lambda root: ours(clips, *alone, root),
                "with the assistant": lambda root: ours(clips, *assisted, root),
                "in batches": lambda root: ours(clips, transcriber, args, root),
            }
        warm = clips.select(range(PLAIN_BATCH))
        for function in (lambda root: ours(warm, transcriber, args, root), lambda r: plain(warm, model, processor, r)):
            clock(function)
        times: dict[str, list[tuple]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for run, function in runs.items():
                times[run].append(clock(function))

    first = next(iter(times))
    seconds = sum(map(len, waveforms)) / evaluation.SAMPLING_RATE
    print(f"{Path(name).name}, {options.dtype}, {len(clips)} clips of {seconds / len(clips):.1f} s, ", end="")
    print(f"{torch.get_num_threads()} threads, batches of {transcriber.batch_size}\n")
    print("| | clips/s | wall s | CPU s | wall, it / ours | CPU, it / ours | same texts as ours |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for run, taken in times.items():
        wall, cpu = (statistics.median(turn[kind] for turn in taken) for kind in (0, 1))
        ratios = [
            statistics.median(other[kind] / mine[kind] for mine, other in zip(times[first], taken, strict=True))
            for kind in (0, 1)
        ]
        texts, mine = taken[0][2], times[first][0][2]
        same = "" if texts is None else sum(map(str.__eq__, texts, mine))
        print(
            f"| {run} | {len(clips) / wall:.2f} | {wall:.1f} | {cpu:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {same} |"
        )
    if "encoder alone" in times:
        pairs = zip(times[first], times["encoder alone"], strict=True)
        print(f"\nours / encoder alone, wall: {statistics.median(mine[0] / encoder[0] for mine, encoder in pairs):.2f}")
    print(f"10,000 predictions scored, with intervals: {score_saved(10_000):.1f} s of CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
