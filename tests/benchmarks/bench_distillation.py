"""Training speed and memory of run_distillation.py beside a plain implementation of the original recipe.

    python -m tests.benchmarks.bench_distillation
    python -m tests.benchmarks.bench_distillation --shape large-v3 --dtype bfloat16 --batch_size 32      (on a GPU)

The baseline is written here as the recipe was first run: labels padded to 128 tokens, float32 logits for all of them
and for both losses, the encoder every epoch. Ours is the script's own training step, with and without
`--cache_encoder_outputs`. The three run in processes of their own, which take steps in turn on the same clips from the
same random weights, so that a busy machine slows all of them; each must have the same loss at the same step.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.sandbox.teachers import tiny_whisper  # noqa: E402

# width, layers of the encoder and of the teacher's decoder, heads, log-mel bins, and vocabulary: Whisper's, padded to a
# multiple of 8, because the tokenizer has fewer tokens
SHAPES = {
    "tiny": (384, 4, 6, 80, 51872),
    "base": (512, 6, 8, 80, 51872),
    "large-v3": (1280, 32, 20, 128, 51872),
}
LABEL_LENGTH = 128  # to which the original pads
EPOCHS = 8
WEIGHTS = (0.8, 1.0, 2.0)  # cross-entropy, KL, temperature


def make_models(root: Path, shape: str) -> None:
    """A random teacher and its student with two decoder layers, with any tokenizer."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

    width, layers, heads, mels, vocabulary = SHAPES[shape]
    arrangement = "large-v3" if mels == 128 else "large-v2"
    tokenizer = WhisperProcessor.from_pretrained(tiny_whisper(root / "tokenizer", arrangement=arrangement)).tokenizer
    torch.manual_seed(0)
    for name, decoder_layers in (("teacher", layers), ("student", 2)):
        config = WhisperConfig(
            d_model=width,
            encoder_layers=layers,
            decoder_layers=decoder_layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            num_mel_bins=mels,
            vocab_size=vocabulary,
        )
        model = WhisperForConditionalGeneration(config)
        if name == "teacher":
            state = model.state_dict()
        else:
            last = {f"layers.{decoder_layers - 1}.": f"layers.{layers - 1}."}
            own = {key: key for key in model.state_dict()}
            for ours, theirs in last.items():
                own = {key: source.replace(ours, theirs) if "decoder" in key else source for key, source in own.items()}
            model.load_state_dict({key: state[source] for key, source in own.items()})
        model.save_pretrained(root / name)
        WhisperProcessor(WhisperFeatureExtractor(feature_size=mels), tokenizer).save_pretrained(root / name)


def make_data(root: Path, shape: str, rows: int) -> None:
    """Clips as ReazonSpeech's are once filtered: 4.3 s and 19 tokens in the mean."""
    from transformers import WhisperTokenizer

    rng, mels = np.random.default_rng(0), SHAPES[shape][3]
    tokenizer = WhisperTokenizer.from_pretrained(root / "student")
    tokenizer.set_prefix_tokens(language="ja", task="transcribe", predict_timestamps=False)
    table = []
    for _ in range(rows):
        text = int(np.clip(rng.gamma(2.5, 5.9), 1, LABEL_LENGTH - 5))
        seconds = float(np.clip(rng.gamma(4.0, 1.08), 0.5, 29.0))
        frames = math.ceil((seconds * 16000 + 200) / 160) + 1
        prefix, end = tokenizer.prefix_tokens, [tokenizer.eos_token_id]
        table.append(
            {
                "input_features": rng.normal(0, 0.5, (frames, mels)).astype("<f2").tobytes(),
                "labels": [*prefix, *rng.integers(300, 800, text).tolist(), *end],
            }
        )
    schema = pa.schema([("input_features", pa.binary()), ("labels", pa.list_(pa.int32()))])
    (root / "data" / "default").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(table, schema), root / "data" / "default" / "train-00000-of-00001.parquet")


def answer(**values) -> None:
    print(json.dumps(values), file=sys.__stdout__, flush=True)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: the GPU's where there is one, otherwise the process'."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plain_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The recipe's loss per token, of whole float32 logits (clips, tokens, vocabulary); labels of -100 do not count."""
    ce_weight, kl_weight, temperature = WEIGHTS
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    teacher_probs = (teacher_logits / temperature).softmax(dim=-1)
    log_probs = (logits / temperature).log_softmax(dim=-1)
    divergence = teacher_probs * (teacher_probs.log() - log_probs)
    kl = (divergence.sum(-1) * (labels >= 0)).sum() / (labels >= 0).sum()
    return ce_weight * ce + kl_weight * temperature**2 * kl


def serve_baseline(root: Path, dtype: str) -> None:
    """The recipe as it was: one step for each line of standard input."""
    from transformers import WhisperForConditionalGeneration

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = getattr(torch, dtype)
    teacher = WhisperForConditionalGeneration.from_pretrained(root / "teacher", dtype=compute).to(device).eval()
    student = WhisperForConditionalGeneration.from_pretrained(root / "student", dtype=torch.float32).to(device).train()
    student.model.encoder.requires_grad_(False).eval()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    rows = pq.read_table(root / "data" / "default" / "train-00000-of-00001.parquet").to_pylist()
    features = torch.zeros(len(rows), teacher.config.num_mel_bins, 3000, dtype=torch.float16)
    labels = torch.full((len(rows), LABEL_LENGTH), -100)
    inputs = torch.full((len(rows), LABEL_LENGTH), student.config.pad_token_id)
    for i, row in enumerate(rows):
        stored = torch.frombuffer(bytearray(row["input_features"]), dtype=torch.float16).view(-1, features.shape[1]).T
        features[i] = stored[:, -1:]
        features[i, :, : stored.shape[1]] = stored
        tokens = torch.tensor(row["labels"])
        inputs[i, : len(tokens) - 1], labels[i, : len(tokens) - 1] = tokens[:-1], tokens[1:]
    features, labels, inputs = features.to(device, compute), labels.to(device), inputs.to(device)
    answer(ready=True)
    for _ in sys.stdin:
        synchronise()
        start = time.perf_counter()
        with torch.autocast(device.type, compute, enabled=compute != torch.float32):
            with torch.no_grad():
                states = teacher.model.encoder(features)
                teacher_logits = teacher(encoder_outputs=states, decoder_input_ids=inputs).logits.float()
            logits = student(encoder_outputs=states, decoder_input_ids=inputs).logits.float()
        loss = plain_loss(logits, teacher_logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(loss.detach())
        synchronise()
        answer(loss=loss, seconds=time.perf_counter() - start, peak=peak_memory())


def serve_script(root: Path, dtype: str, cached: bool, batch_size: int) -> None:
    """The script's own run, of which each step waits for a line of standard input."""
    import run_distillation as script

    fill_cache = script.fill_cache
    filling = 0.0

    def timed_fill_cache(*arguments):
        nonlocal filling
        start = time.perf_counter()
        try:
            return fill_cache(*arguments)
        finally:
            filling = time.perf_counter() - start

    def serve_steps(training) -> int:
        data = training.data
        indices = data.plan.micro_batches(0, data.total_steps, 0)
        batches = script.read_batches(data.train[0], indices, workers=0)
        training.wrapped.train()
        answer(ready=True, filling=filling)
        for _ in sys.stdin:
            synchronise()
            start = time.perf_counter()
            (ce_sum, kl_sum, num_tokens), _, _ = script.optimiser_step(training, batches)
            synchronise()
            training.state.step += 1
            loss = (WEIGHTS[0] * ce_sum + WEIGHTS[1] * kl_sum) / num_tokens
            answer(loss=loss, seconds=time.perf_counter() - start, peak=peak_memory())
        return 1  # stopped early: nothing is written

    script.fill_cache = timed_fill_cache
    script.train = serve_steps
    name = "cached" if cached else "plain"
    arguments = f"--model_name_or_path {root}/student --teacher_model_name_or_path {root}/teacher --do_train"
    arguments += f" --train_dataset_name {root}/data --freeze_encoder --dtype {dtype} --report_to none --max_steps 1000"
    arguments += f" --output_dir {root}/{name} --per_device_train_batch_size {batch_size} --warmup_steps 0"
    if cached:
        arguments += f" --cache_encoder_outputs {root}/cache"
    script.main(arguments.split())


class Worker:
    """One of the three, in a process of its own."""

    def __init__(self, name: str, root: Path, args: argparse.Namespace):
        command = [sys.executable, __file__, "--worker", name, "--root", str(root)]
        command += ["--dtype", args.dtype, "--batch_size", str(args.batch_size)]
        environment = os.environ | {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
        log = open(root / f"{name}.log", "w")  # noqa: SIM115 (the process writes to it)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self.name, self.log, self.steps = name, root / f"{name}.log", []
        self.ready = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} process ended:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def step(self) -> None:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self.read())

    def seconds(self) -> float:
        """The median step but for the first."""
        return statistics.median(step["seconds"] for step in self.steps[1:])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="base", help="shape of the teacher (base)")
    parser.add_argument("--batch_size", type=int, default=16, help="clips a step (16)")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each, after one that is not (2)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="compute precision (float32)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker == "baseline":
        serve_baseline(args.root, args.dtype)
        return 0
    if args.worker:
        serve_script(args.root, args.dtype, args.worker == "cached", args.batch_size)
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-distillation-") as directory:
        root = Path(directory)
        make_models(root, args.shape)
        make_data(root, args.shape, args.batch_size)
        workers = [Worker(name, root, args) for name in ("baseline", "plain", "cached")]
        for _ in range(args.steps + 1):
            for worker in workers:
                worker.step()
        for worker in workers:
            worker.close()
        baseline, plain, cached = workers
        tolerance = 1e-3 if args.dtype == "float32" else 3e-2
        for ours in (plain, cached):
            for one, other in zip(baseline.steps, ours.steps, strict=True):
                if abs(one["loss"] - other["loss"]) > tolerance * abs(one["loss"]):
                    raise SystemExit(f"the losses differ: baseline {one['loss']}, {ours.name} {other['loss']}")
        clips, filling = args.batch_size, cached.ready["filling"]
        eight = EPOCHS * baseline.seconds() / (filling + EPOCHS * cached.seconds())
        cores = f"{len(os.sched_getaffinity(0))} CPU cores"
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else cores
        print(f"\nTraining, whisper-{args.shape} shape, 2 decoder layers, batch {clips}, {args.dtype}, {device}")
        last = baseline.steps[-1]["loss"]
        print(f"losses of the {len(plain.steps)} steps agree to {tolerance:g}: {last:.4f} at the last\n")
        print("| | clips/s | ratio | peak memory, GB | ratio |")
        print("| --- | --- | --- | --- | --- |")
        for worker, label in ((baseline, "baseline"), (plain, "ours"), (cached, "ours, a step from the cache")):
            speed, peak = clips / worker.seconds(), worker.steps[-1]["peak"]
            ratio, share = baseline.seconds() / worker.seconds(), peak / baseline.steps[-1]["peak"]
            print(f"| {label} | {speed:.2f} | {ratio:.2f} | {peak / 1e9:.2f} | {share:.2f} |")
        speed = EPOCHS * clips / (filling + EPOCHS * cached.seconds())
        print(f"| ours, {EPOCHS} epochs with the cache, filled first | {speed:.2f} | {eight:.2f} | | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
