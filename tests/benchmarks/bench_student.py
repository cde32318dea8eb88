"""Memory and time of `create_student_model.py` on a teacher with random weights, beside a straightforward baseline.

    python -m tests.benchmarks.bench_student [--shape large-v3] [--directory /a/disk/with/room]

The baseline loads the teacher, builds the student, copies the layers and saves, and does not check what it saved. Each
runs in a process of its own; the peak is the kernel's count of resident pages, which includes those mapped from files.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tests.sandbox.teachers import tiny_whisper

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {  # width, layers of encoder and decoder, heads
    "base": (512, 6, 8),
    "small": (768, 12, 12),
    "medium": (1024, 24, 16),
    "large-v3": (1280, 32, 20),
}
# The baseline, run as `python -c PLAIN TEACHER STUDENT`.
PLAIN = """
import sys
from transformers import WhisperConfig, WhisperForConditionalGeneration
teacher = WhisperForConditionalGeneration.from_pretrained(sys.argv[1], dtype="float32")
config = WhisperConfig.from_pretrained(sys.argv[1], decoder_layers=2)
student = WhisperForConditionalGeneration(config)
student.model.encoder.load_state_dict(teacher.model.encoder.state_dict())
student.model.decoder.load_state_dict(teacher.model.decoder.state_dict(), strict=False)
last = teacher.model.decoder.layers[-1].state_dict()
student.model.decoder.layers[1].load_state_dict(last)
student.save_pretrained(sys.argv[2])
"""


def random_teacher(directory: Path, shape: str) -> Path:
    """A Whisper of this shape with random float16 weights and the tiny teacher's tokenizer."""
    width, layers, heads = SHAPES[shape]
    tiny_whisper(directory, arrangement="large-v3")
    config = WhisperConfig.from_pretrained(directory)
    # As many rows as large-v3 has, padded to a multiple of 8, because the tokenizer has fewer tokens.
    config.update({"d_model": width, "vocab_size": 51872, "init_std": 0.02})
    for side in ("encoder", "decoder"):
        ours = {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
        config.update(ours)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in WhisperForConditionalGeneration(config).state_dict().items()}
    del shapes["proj_out.weight"]
    torch.manual_seed(0)
    weights = {name: torch.empty(size, dtype=torch.float16).normal_(std=0.02) for name, size in shapes.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    return directory


def measure(command: list) -> tuple[float, float]:
    """Peak resident memory in GB and seconds of a command."""
    started = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors.decode())
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - started


def weight(directory: Path) -> float:
    return (directory / "model.safetensors").stat().st_size / 1e9


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="medium", help="shape of the teacher")
    parser.add_argument("--runs", type=int, default=1, help="runs of each way; the medians are printed")
    parser.add_argument("--directory", type=Path, help="where there is room (unset = the temporary directory)")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        teacher = subprocess_teacher(Path(scratch) / "teacher", args.shape)
        ours = [sys.executable, "create_student_model.py", "--teacher_checkpoint", teacher, "--overwrite_output_dir"]
        ours += ["--save_dir", Path(scratch) / "ours"]
        plain = [sys.executable, "-c", PLAIN, teacher, Path(scratch) / "plain"]
        pairs = [(measure(ours), measure(plain)) for _ in range(args.runs)]
        weights = weight(teacher) + weight(Path(scratch) / "ours")
    rows = {"peak resident memory, GB": 0, "seconds": 1}
    print(f"{args.shape}, random float16 weights, 2 decoder layers, medians of {args.runs}\n")
    print("| | create_student_model.py | baseline | ratio |\n| --- | --- | --- | --- |")
    for name, column in rows.items():
        mine, theirs = (statistics.median(pair[way][column] for pair in pairs) for way in (0, 1))
        print(f"| {name} | {mine:.2f} | {theirs:.2f} | {mine / theirs:.2f} |")
    peak = statistics.median(pair[0][0] for pair in pairs)
    print(f"\nTeacher's and student's weights: {weights:.2f} GB; the peak is {peak / weights:.2f} of them.")
    return 0


def subprocess_teacher(directory: Path, shape: str) -> Path:
    """`random_teacher` in a process of its own, so that its memory is given back."""
    code = "import sys; from tests.benchmarks.bench_student import *; random_teacher(Path(sys.argv[1]), sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, str(directory), shape], cwd=ROOT, check=True, capture_output=True)
    return directory


if __name__ == "__main__":
    sys.exit(main())
