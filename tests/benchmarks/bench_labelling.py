"""Speed of run_pseudo_labelling.py beside the recipe's plain way, and beside what the encoder alone takes.

    python -m tests.benchmarks.bench_labelling
    python -m tests.benchmarks.bench_labelling --shape large-v3 --dtype bfloat16 --clips 512 --batch_size 64 \\
        --max_label_length 32 --torch_compile          # on a GPU

Every round runs both on the same clips. Ours is the script's own labelling, from stored audio to shards on the disk, on
a CPU in a process for every core, each with a shard. The plain one is how the recipe was first run, in one process with
a thread for every core: log-mels padded to 30 s and mapped to the disk, then batches of 4 in the dataset's order, and
everything written at the end. The encoder alone is timed in our processes, on the same windows, as the script calls it.
Start-up (imports, dataset, model, compilation) is not in the rates but shown. CPU seconds and memory are of all threads
and processes.

The teacher is whisper-base, which ends its labels by itself. With `--shape` it is a random Whisper of that shape, whose
labels all run to `--max_label_length`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import run_pseudo_labelling as labelling
from tests.sandbox.base_teacher import whisper_base
from tests.sandbox.corpus import build_corpus, cache_directory

PLAIN_BATCH = 4
SHAPES = {"base": (512, 6, 8, 80), "small": (768, 12, 12, 80), "large-v3": (1280, 32, 20, 128)}


def make_dataset(number: int, root: Path) -> Path:
    """Spoken Japanese as a local dataset directory."""
    corpus = build_corpus(cache_directory() / f"corpus-bench-{number}", {"000": number + 1})
    with tarfile.open(corpus / "data" / "000.tar") as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()][:number]
    rows = [{"name": name, "audio": {"bytes": audio, "path": name}} for name, audio in members]
    audio = datasets.Audio(sampling_rate=16000, decode=False)
    schema = datasets.Features({"name": datasets.Value("string"), "audio": audio}).arrow_schema
    (root / "default").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), root / "default" / "train-00000-of-00001.parquet")
    return root


def random_teacher(shape: str, root: Path) -> Path:
    """A random Whisper of a published shape, with whisper-base's tokenizer and rules."""
    base = whisper_base()
    width, layers, heads, bins = SHAPES[shape]
    sizes = {"d_model": width, "num_mel_bins": bins}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
    config = WhisperConfig.from_pretrained(base, **sizes)
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig.from_pretrained(base)
    model.generation_config.alignment_heads = None
    model.save_pretrained(root)
    labelling.WhisperTokenizerFast.from_pretrained(base).save_pretrained(root)
    WhisperFeatureExtractor(feature_size=bins).save_pretrained(root)
    return root


def window_flops(config: WhisperConfig) -> float:
    """Floating-point operations of the encoder on one window: a multiplication and an addition for each weight."""
    width, positions = config.d_model, config.max_source_positions
    convolutions = 3 * width * (2 * positions * config.num_mel_bins + positions * width)
    layer = positions * (4 * width**2 + 2 * width * config.encoder_ffn_dim) + 2 * positions**2 * width
    return 2.0 * (convolutions + config.encoder_layers * layer)


def script_arguments(options: argparse.Namespace, output: Path) -> argparse.Namespace:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags = [
        *("--model_name_or_path", options.teacher, "--dataset_name", options.dataset, "--dtype", options.dtype),
        *("--id_column_name", "name", "--language", "ja", "--output_dir", str(output)),
        *("--return_timestamps", str(options.return_timestamps), "--torch_compile", str(options.torch_compile)),
        *("--max_label_length", str(options.max_label_length), "--generation_num_beams", str(options.num_beams)),
        *("--per_device_eval_batch_size", str(options.batch_size), "--shard_size", str(options.shard_size)),
    ]
    args = labelling.parse_args(flags)
    args.device = device
    if device.type == "cpu":
        torch.set_num_threads(options.threads // options.processes)
    return args


class Stopwatch:
    """Wall and CPU seconds since its making, which waits until all processes are ready; the start-up is before."""

    def __init__(self, options: argparse.Namespace, what: str):
        startup = time.time() - psutil.Process().create_time()
        (Path(options.root) / f"{what}.{options.process}").touch()
        while len(list(Path(options.root).glob(f"{what}.*"))) < options.processes:
            time.sleep(0.01)
        self.startup, self.wall, self.cpu = startup, time.perf_counter(), time.process_time()

    def read(self) -> dict:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        return {"wall": wall, "cpu": cpu, "startup": self.startup, "peak": peak}


def run_ours(options: argparse.Namespace, root: Path) -> dict:
    args = script_arguments(options, root / "out")
    dataset = labelling.open_dataset(args)
    teacher = labelling.Teacher(args, args.device)
    teacher.load_weights()
    if options.torch_compile:
        teacher.label([np.zeros(1600, np.float32)], options.batch_size)
    shards = labelling.Shards(args, len(dataset), {})
    mine = list(range(options.process, shards.number, options.processes))
    watch = Stopwatch(options, "labelling")
    labelling.label_shards(dataset, shards, mine, teacher, args, lambda clips, seconds: None)
    result = watch.read()
    rows = [row for shard in mine for row in pq.read_table(shards.paths[shard]).to_pylist()]
    result["labels"] = {row["name"]: row["whisper_transcript"] for row in rows}

    clips = [labelling.load_clip(pa.scalar(row["audio"]["bytes"])).waveform for row in rows]
    size = args.per_device_eval_batch_size if args.device.type == "cuda" else 1
    with torch.inference_mode():
        windows = []
        for clip in clips:
            waveform = torch.from_numpy(clip)[None].to(args.device)
            windows.append(labelling.log_mel(waveform, teacher.extractor).to(teacher.model.dtype))
        batches = [torch.cat(windows[start : start + size]) for start in range(0, len(windows), size)]
        teacher.encoder(batches[0])
        watch = Stopwatch(options, "encoder")
        for batch in batches:
            teacher.encoder(batch)
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        encoder = watch.read()
    result["encoder"] = {"wall": encoder["wall"], "cpu": encoder["cpu"]}
    result["flops"] = window_flops(teacher.config) * len(clips)
    return result


def run_plain(options: argparse.Namespace, root: Path) -> dict:
    args = script_arguments(options, root / "out")
    dataset = labelling.open_dataset(args)
    extractor = WhisperFeatureExtractor.from_pretrained(options.teacher)
    dtype = getattr(torch, options.dtype)
    model = WhisperForConditionalGeneration.from_pretrained(options.teacher, dtype=dtype).to(args.device).eval()
    prefix = 3 if options.return_timestamps else 4

    def prepare(row: dict) -> dict:
        waveform, rate = labelling.soundfile.read(labelling.io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        return {"input_features": extractor(waveform, sampling_rate=rate).input_features[0]}

    watch = Stopwatch(options, "plain")
    mapped = dataset.map(prepare, remove_columns=["audio"], cache_file_name=str(root / "features.arrow"))
    labels = []
    for batch in torch.utils.data.DataLoader(mapped.with_format("torch"), batch_size=PLAIN_BATCH):
        with torch.no_grad():
            sequences = model.generate(
                batch["input_features"].to(args.device, dtype),
                language="ja",
                task="transcribe",
                return_timestamps=options.return_timestamps,
                num_beams=options.num_beams,
                max_new_tokens=options.max_label_length - prefix,
                force_unique_generate_call=True,
            )
        labels += sequences.tolist()
    end = model.generation_config.eos_token_id
    labels = [labelling.finish_label(label, prefix, end)[0] for label in labels]
    dataset.add_column("whisper_transcript", labels).to_parquet(root / "labels.parquet")
    result = watch.read()
    result["labels"] = dict(zip(dataset["name"][:], labels, strict=True))
    return result


def measure(side: str, options: argparse.Namespace) -> dict:
    """Run one side in processes of its own, with caches of its own."""
    with tempfile.TemporaryDirectory() as root:
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{root}/cache", "TOKENIZERS_PARALLELISM": "false"}
        command, running = [sys.executable, "-m", "tests.benchmarks.bench_labelling", "--run_side"], []
        processes = options.processes if side == "ours" else 1
        for process in range(processes):
            given = {**vars(options), "side": side, "root": root, "process": process, "processes": processes}
            running.append(subprocess.Popen([*command, json.dumps(given)], env=environment))
        assert not any(process.wait() for process in running)
        answers = [Path(root) / f"answer{process}.json" for process in range(processes)]
        parts = [json.loads(answer.read_text()) for answer in answers]
        whole = {name: max(part[name] for part in parts) for name in ("wall", "startup")}
        whole |= {name: sum(part[name] for part in parts) for name in ("cpu", "peak")}
        whole["labels"] = {name: label for part in parts for name, label in part["labels"].items()}
        if side == "ours":
            encoders = [part["encoder"] for part in parts]
            whole["encoder"] = {"wall": max(e["wall"] for e in encoders), "cpu": sum(e["cpu"] for e in encoders)}
            whole["flops"] = sum(part["flops"] for part in parts)
        written = [path for path in Path(root).rglob("*") if path.is_file() and path not in answers]
        whole["disk"] = sum(path.stat().st_size for path in written) / 2**20
    return whole


def run_side(given: str) -> int:
    options = argparse.Namespace(**json.loads(given))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    result = (run_ours if options.side == "ours" else run_plain)(options, Path(options.root))
    (Path(options.root) / f"answer{options.process}.json").write_text(json.dumps(result))
    return 0


def print_tables(rounds: list[tuple[dict, dict]], options: argparse.Namespace) -> None:
    def median(pick) -> str:
        ours, plain = ([pick(pair[side]) for pair in rounds] for side in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
        return f"{statistics.median(ours):.2f} | {statistics.median(plain):.2f} | {ratio:.2f}"

    clips = len(rounds[0][0]["labels"])
    equal = [sum(ours["labels"][name] == label for name, label in plain["labels"].items()) for ours, plain in rounds]
    tokens = np.mean([len(label) for label in rounds[0][0]["labels"].values()])
    print("| | run_pseudo_labelling.py | plain | ours / plain |\n| --- | ---: | ---: | ---: |")
    print(f"| clips/s | {median(lambda side: clips / side['wall'])} |")
    print(f"| clips per CPU second | {median(lambda side: clips / side['cpu'])} |")
    print(f"| start-up, s | {median(lambda side: side['startup'])} |")
    print(f"| peak resident memory, MiB | {median(lambda side: side['peak'])} |")
    print(f"| written to disk, MiB | {median(lambda side: side['disk'])} |")
    print(f"\n{min(equal)} of {clips} labels are equal; {tokens:.1f} tokens a label\n")
    print("| | wall, s | CPU, s |\n| --- | ---: | ---: |")
    for name, pick in (
        ("the whole of labelling", lambda side, clock: side[clock]),
        ("the encoder alone", lambda side, clock: side["encoder"][clock]),
        ("ratio", lambda side, clock: side[clock] / side["encoder"][clock]),
    ):
        values = [statistics.median(pick(ours, clock) for ours, _ in rounds) for clock in ("wall", "cpu")]
        print(f"| {name} | {values[0]:.2f} | {values[1]:.2f} |")
    rate = statistics.median(ours["flops"] / ours["encoder"]["wall"] for ours, _ in rounds) / 1e12
    print(f"\nthe encoder does {rate:.2f} TFLOP/s, {100 * rate / options.peak_tflops:.1f} % of --peak_tflops")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher", help="Whisper; whisper-base if unset")
    parser.add_argument("--shape", choices=list(SHAPES), help="a random Whisper of this shape instead")
    parser.add_argument("--clips", type=int, default=32, help="clips a run")
    parser.add_argument("--rounds", type=int, default=2, help="turns of both")
    parser.add_argument("--batch_size", type=int, default=16, help="clips in a batch of ours")
    parser.add_argument("--shard_size", type=int, help="clips in a shard of ours; a shard for every process if unset")
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--max_label_length", type=int, default=128, help="bound of a label, tokens")
    parser.add_argument("--return_timestamps", type=labelling.boolean, default=True, metavar="BOOL")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads on a CPU, of both")
    parser.add_argument("--processes", type=int, help="processes of ours; on a CPU one for every thread if unset")
    parser.add_argument("--peak_tflops", type=float, default=989.4, help="of the device: the default is an H100's bf16")
    parser.add_argument("--run_side", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run_side:
        return run_side(options.run_side)
    options.processes = options.processes or (1 if torch.cuda.is_available() else options.threads)
    options.shard_size = options.shard_size or -(-options.clips // options.processes)
    with tempfile.TemporaryDirectory() as root:
        options.dataset = str(make_dataset(options.clips, Path(root) / "speech"))
        if options.shape:
            options.teacher = str(random_teacher(options.shape, Path(root) / "teacher"))
        options.teacher = options.teacher or str(whisper_base())
        rounds = [(measure("ours", options), measure("plain", options)) for _ in range(options.rounds)]
    what = f"random {options.shape}" if options.shape else Path(options.teacher).name
    print(
        f"{what}, {options.dtype}, {options.clips} clips, batches of {options.batch_size}, {options.threads} threads in"
    )
    print(f"{options.processes} processes against one\n")
    print_tables(rounds, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
