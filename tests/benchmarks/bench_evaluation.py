"""Speed of run_short_form_eval.py beside a plain evaluation, with a draft model, and what its scoring takes.

    python -m tests.benchmarks.bench_evaluation
    python -m tests.benchmarks.bench_evaluation --model org/model --clips 500 --rounds 1 --dtype bfloat16
    python -m tests.benchmarks.bench_evaluation --assistant org/student --clips 16

Runs take turns on the same clips, after a first batch of each that is not counted. Ours is the script's own `predict`,
from stored audio to stored predictions, on a CPU in a process for every core, as `accelerate launch` starts them. The
plain one is what one writes first, with nothing of ours, in one process with a thread for every core: log-mels padded
to 30 s and mapped to the disk, which counts, then batches of 4 in the dataset's order. The encoder's own time is that
of the same windows, ready in memory, in our processes, the way that ours calls it (on a CPU one by one, which is faster
than in batches). With whisper-base, which ends its texts by itself as a trained model does.
"""

import argparse
import io
import multiprocessing
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
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
OURS, PLAIN, ENCODER = "run_short_form_eval.py", "plain", "encoder alone"
ALONE = "run_short_form_eval.py, batches of 1"
RUNS: dict = {}  # in a worker: what it can run, its clips, and how many of them a first batch takes


def make_clips(number: int, root: Path) -> Path:
    """Manifest of spoken Japanese."""
    corpus = build_corpus(cache_directory() / f"corpus-bench-{number}", {"000": number + 1})
    with tarfile.open(corpus / "data" / "000.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()][:number]
    for index, (_, audio) in enumerate(members):
        (root / f"{index}.flac").write_bytes(audio)
    (root / "clips.csv").write_text("audio,text\n" + "".join(f"{index}.flac,音声\n" for index in range(len(members))))
    return root / "clips.csv"


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


class Worker:
    """A process that evaluates a part of the clips."""

    def __init__(self, options: argparse.Namespace, manifest: Path, part: slice, threads: int):
        self.executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.executor.submit(prepare, options, manifest, part, threads).result()

    def submit(self, run: str, whole: bool) -> Future:
        return self.executor.submit(execute, run, whole)


def prepare(options: argparse.Namespace, manifest: Path, part: slice, threads: int) -> None:
    """Everything before the clock starts, kept for `execute`."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags = ["--model_name_or_path", options.model, "--dataset_name", str(manifest), "--dtype", options.dtype]
    flags += ["--per_device_eval_batch_size", str(options.batch_size)] if options.batch_size else []

    def load(*more: str) -> tuple:
        args = evaluation.parse_args([*flags, *more])
        transcriber = evaluation.Transcriber(args, device)
        transcriber.load()
        return transcriber, args

    transcriber, args = load()
    clips = evaluation.open_dataset(args)
    clips = clips.select(range(len(clips))[part])
    if options.assistant:  # which goes one clip at a time, so what it gains is against that
        alone, assisted = load("--per_device_eval_batch_size", "1"), load("--assistant_model", options.assistant)
        RUNS[ALONE] = lambda clips, root: ours(clips, *alone, root)
        RUNS["with the assistant"] = lambda clips, root: ours(clips, *assisted, root)
        RUNS["in batches"] = lambda clips, root: ours(clips, transcriber, args, root)
    else:
        processor = transformers.WhisperProcessor.from_pretrained(options.model)
        model = transformers.WhisperForConditionalGeneration.from_pretrained(options.model, dtype=options.dtype)
        model.to(device).eval()
        waveforms = [evaluation.read_item(clips, [row], args)[1] for row in range(len(clips))]
        windows = torch.cat([transcriber.extract([waveform]) for waveform in waveforms])
        RUNS[OURS] = lambda clips, root: ours(clips, transcriber, args, root)
        RUNS[PLAIN] = lambda clips, root: plain(clips, model, processor, root)
        RUNS[ENCODER] = lambda clips, root: encoder_alone(windows, model, transcriber.batch_size)
    RUNS["clips"], RUNS["first"] = clips, min(transcriber.batch_size, len(clips))


def execute(run: str, whole: bool) -> tuple[float, list[str] | None]:
    """CPU seconds, and the texts of this process' clips, or of a first batch."""
    clips = RUNS["clips"] if whole else RUNS["clips"].select(range(RUNS["first"]))
    with tempfile.TemporaryDirectory() as root:
        before = time.process_time()
        texts = RUNS[run](clips, Path(root))
        return time.process_time() - before, texts


def clock(workers: list[Worker], run: str, whole: bool = True) -> tuple[float, float, list | None]:
    """Seconds by the wall and of the CPU, and what came out."""
    before = time.perf_counter()
    answers = [future.result() for future in [worker.submit(run, whole) for worker in workers]]
    texts = [text for _, part in answers for text in part or []]
    return time.perf_counter() - before, sum(seconds for seconds, _ in answers), texts or None


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
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help="threads of both; one for every core if unset")
    parser.add_argument("--processes", type=int, help="processes of ours; on a CPU one for every thread if unset")
    options = parser.parse_args(argv)
    options.model = options.model or str(whisper_base())
    processes = options.processes or (1 if torch.cuda.is_available() else options.threads)

    with tempfile.TemporaryDirectory() as root:
        manifest = make_clips(options.clips, Path(root))
        parts = [slice(process, None, processes) for process in range(processes)]
        mine = [Worker(options, manifest, part, max(1, options.threads // processes)) for part in parts]
        if options.assistant:
            runs = {name: mine for name in (ALONE, "with the assistant", "in batches")}
        else:
            runs = {OURS: mine, ENCODER: mine, PLAIN: [Worker(options, manifest, slice(None), options.threads)]}
        for run, workers in runs.items():
            clock(workers, run, whole=False)
        times: dict[str, list[tuple]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for run, workers in runs.items():
                times[run].append(clock(workers, run))

    first = next(iter(times))
    print(f"{Path(options.model).name}, {options.dtype}, {options.clips} clips, {options.threads} threads in ", end="")
    print(f"{processes} processes against one\n")
    print("| | clips/s | wall s | CPU s | wall, it / ours | CPU, it / ours | same texts as ours |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    order = [row for part in parts for row in range(options.clips)[part]]  # of what our processes return
    for run, taken in times.items():
        wall, cpu = (statistics.median(turn[kind] for turn in taken) for kind in (0, 1))
        ratios = [
            statistics.median(other[kind] / mine[kind] for mine, other in zip(times[first], taken, strict=True))
            for kind in (0, 1)
        ]
        mine, texts = times[first][0][2], taken[0][2]
        if run == PLAIN:
            texts = [texts[row] for row in order]
        same = "" if texts is None else sum(map(str.__eq__, texts, mine))
        against = f"{ratios[0]:.2f} | {ratios[1]:.2f} | {same}"
        print(f"| {run} | {options.clips / wall:.2f} | {wall:.1f} | {cpu:.1f} | {against} |")
    if ENCODER in times:
        pairs = zip(times[first], times[ENCODER], strict=True)
        print(f"\nours / encoder alone, wall: {statistics.median(mine[0] / encoder[0] for mine, encoder in pairs):.2f}")
    print(f"10,000 predictions scored, with intervals: {score_saved(10_000):.1f} s of CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
