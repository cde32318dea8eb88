"""Speed of run_pseudo_labelling.py beside a straightforward baseline of the same precision.

    python -m tests.benchmarks.bench_labelling
    python -m tests.benchmarks.bench_labelling --dtype bfloat16
    python -m tests.benchmarks.bench_labelling --shape large-v3 --dtype bfloat16 --clips 512 --batch_size 64 \\
        --max_label_length 32          # on a GPU

Both label the same clips, in turns, each time in a process of its own with the same number of threads. Ours is the
script's own labelling, from stored audio to shards on the disk. The baseline is how the recipe was first run: log-mels
padded to 30 s and mapped to the disk, then batches of 4 in the dataset's order, and everything written at the end.
Start-up (imports, dataset, model, compilation) is shown apart. CPU seconds and memory are of all threads.

The teacher is whisper-base, which ends its labels by itself. With `--shape` it is a random Whisper of that shape, whose
labels all run to `--max_label_length`.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import transformers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

import run_pseudo_labelling as labelling
from tests.sandbox.base_teacher import whisper_base
from tests.sandbox.corpus import build_corpus, cache_directory

BASELINE_BATCH = 4
SHAPES = {"base": (512, 6, 8, 80), "small": (768, 12, 12, 80), "large-v3": (1280, 32, 20, 128)}


def make_dataset(number: int, root: Path) -> Path:
    """Spoken Japanese as a local dataset directory."""
    corpus = build_corpus(cache_directory() / f"corpus-bench-{number}", {"000": number + 1})
    with tarfile.open(corpus / "data" / "000.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()][:number]
    rows = [{"name": name, "audio": {"bytes": audio, "path": name}} for name, audio in members]
    features = datasets.Features({"name": datasets.Value("string"), "audio": datasets.Audio(sampling_rate=16000)})
    (root / "default").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, features.arrow_schema)
    pq.write_table(table, root / "default" / "train-00000-of-00001.parquet")
    return root


def random_teacher(shape: str, root: Path) -> Path:
    """A random Whisper of a published shape, with whisper-base's tokenizer and rules."""
    base = whisper_base()
    width, layers, heads, bins = SHAPES[shape]
    sizes = {"d_model": width, "num_mel_bins": bins}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(base, **sizes))
    model.generation_config = GenerationConfig.from_pretrained(base)
    model.generation_config.alignment_heads = None
    model.save_pretrained(root)
    WhisperTokenizerFast.from_pretrained(base).save_pretrained(root)
    WhisperFeatureExtractor(feature_size=bins).save_pretrained(root)
    return root


def script_arguments(options: argparse.Namespace, output: Path) -> argparse.Namespace:
    """The script's arguments for what this benchmark was asked."""
    flags = [
        *("--model_name_or_path", options.teacher, "--dataset_name", options.dataset, "--dtype", options.dtype),
        *("--id_column_name", "name", "--language", "ja", "--report_to", "none", "--output_dir", str(output)),
        *("--return_timestamps", str(options.return_timestamps)),
        *("--max_label_length", str(options.max_label_length), "--generation_num_beams", str(options.num_beams)),
        *("--per_device_eval_batch_size", str(options.batch_size), "--shard_size", str(options.shard_size)),
    ]
    return labelling.parse_args(flags)


def timed(work: Callable[[], None]) -> dict:
    """Wall and CPU seconds of some work, the seconds of start-up before it, and the peak of memory in MiB."""
    startup = time.time() - psutil.Process().create_time()
    began, cpu_began = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"wall": wall, "cpu": cpu, "startup": startup, "peak": peak}


def run_ours(options: argparse.Namespace, root: Path) -> dict:
    args = script_arguments(options, root / "out")
    accelerator = labelling.start_accelerator(args)
    dataset, place = labelling.open_speech(args)
    teacher = labelling.load_teacher(args, accelerator.device)
    split = labelling.plan_split(teacher, len(dataset), None)
    shards = list(range(len(split.shards)))
    progress = labelling.start_progress(teacher, accelerator, split, shards)
    result = timed(lambda: labelling.label_shards(teacher, dataset, place, split, shards, progress))
    rows = [row for path in split.shards for row in pq.read_table(path).to_pylist()]
    result["labels"] = {row["name"]: row["whisper_transcript"] for row in rows}
    return result


def run_baseline(options: argparse.Namespace, root: Path) -> dict:
    args = script_arguments(options, root / "out")
    dataset = labelling.open_speech(args)[0].with_format(None)
    extractor = WhisperFeatureExtractor.from_pretrained(options.teacher)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, options.dtype)
    model = WhisperForConditionalGeneration.from_pretrained(options.teacher, dtype=dtype).to(device).eval()
    prefix = 3 if options.return_timestamps else 4
    labels = []

    def prepare(row: dict) -> dict:
        waveform, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        return {"input_features": extractor(waveform, sampling_rate=rate).input_features[0]}

    def label_all() -> None:
        mapped = dataset.map(prepare, remove_columns=["audio"], cache_file_name=str(root / "features.arrow"))
        for batch in torch.utils.data.DataLoader(mapped.with_format("torch"), batch_size=BASELINE_BATCH):
            with torch.no_grad():
                sequences = model.generate(
                    batch["input_features"].to(device, dtype),
                    language="ja",
                    task="transcribe",
                    return_timestamps=options.return_timestamps,
                    num_beams=options.num_beams,
                    max_new_tokens=options.max_label_length - prefix,
                    force_unique_generate_call=True,
                )
            for sequence in sequences.tolist():
                labels.append(labelling.finish_label(sequence, prefix, model.generation_config.eos_token_id).ids)
        dataset.add_column("whisper_transcript", labels).to_parquet(root / "labels.parquet")

    result = timed(label_all)
    result["labels"] = dict(zip(dataset["name"][:], labels, strict=True))
    return result


def measure(side: str, options: argparse.Namespace) -> dict:
    """Run one side in a process of its own, with caches of its own."""
    with tempfile.TemporaryDirectory() as root:
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{root}/cache", "TOKENIZERS_PARALLELISM": "false"}
        given = json.dumps({**vars(options), "side": side, "root": root})
        command = [sys.executable, "-m", "tests.benchmarks.bench_labelling", "--run_side", given]
        subprocess.run(command, env=environment, check=True)
        answer = Path(root) / "answer.json"
        result = json.loads(answer.read_text())
        written = [path for path in Path(root).rglob("*") if path.is_file() and path != answer]
        result["disk"] = sum(path.stat().st_size for path in written) / 2**20
    return result


def run_side(given: str) -> int:
    """One side, in the process that `measure` has started for it."""
    options = argparse.Namespace(**json.loads(given))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    run = run_ours if options.side == "ours" else run_baseline
    result = run(options, Path(options.root))
    (Path(options.root) / "answer.json").write_text(json.dumps(result))
    return 0


def print_table(rounds: list[tuple[dict, dict]]) -> None:
    """Medians of the rounds, and the median of their ratios."""

    def median(pick: Callable[[dict], float]) -> str:
        ours = [pick(ours) for ours, _ in rounds]
        baseline = [pick(baseline) for _, baseline in rounds]
        ratio = statistics.median(a / b for a, b in zip(ours, baseline, strict=True))
        return f"{statistics.median(ours):.2f} | {statistics.median(baseline):.2f} | {ratio:.2f}"

    clips = len(rounds[0][0]["labels"])
    equal = [sum(ours["labels"][name] == label for name, label in base["labels"].items()) for ours, base in rounds]
    tokens = np.mean([len(label) for label in rounds[0][0]["labels"].values()])
    print("| | run_pseudo_labelling.py | baseline | ours / baseline |\n| --- | ---: | ---: | ---: |")
    print(f"| clips/s | {median(lambda side: clips / side['wall'])} |")
    print(f"| clips per CPU second | {median(lambda side: clips / side['cpu'])} |")
    print(f"| start-up, s | {median(lambda side: side['startup'])} |")
    print(f"| peak resident memory, MiB | {median(lambda side: side['peak'])} |")
    print(f"| written to disk, MiB | {median(lambda side: side['disk'])} |")
    print(f"\n{min(equal)} of {clips} labels are equal; {tokens:.1f} tokens a label")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher", help="Whisper; unset = whisper-base")
    parser.add_argument("--shape", choices=list(SHAPES), help="a random Whisper of this shape instead")
    parser.add_argument("--clips", type=int, default=32, help="clips per run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--batch_size", type=int, default=16, help="clips per batch of ours")
    parser.add_argument("--shard_size", type=int, default=1000, help="clips per shard of ours")
    parser.add_argument("--num_beams", type=int, default=1, help="beams, 1 = greedy")
    parser.add_argument("--max_label_length", type=int, default=128, help="maximum label length in tokens")
    parser.add_argument("--return_timestamps", type=labelling.boolean, default=True, metavar="BOOL")
    parser.add_argument("--dtype", default="float32", help="precision of both")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of both")
    parser.add_argument("--run_side", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run_side:
        return run_side(options.run_side)
    with tempfile.TemporaryDirectory() as root:
        options.dataset = str(make_dataset(options.clips, Path(root) / "speech"))
        if options.shape:
            options.teacher = str(random_teacher(options.shape, Path(root) / "teacher"))
        options.teacher = options.teacher or str(whisper_base())
        rounds = [(measure("ours", options), measure("baseline", options)) for _ in range(options.rounds)]
    name = f"random {options.shape}" if options.shape else Path(options.teacher).name
    print(
        f"{name}, {options.dtype}, {options.clips} clips, batches of {options.batch_size}, {options.threads} threads\n"
    )
    print_table(rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
