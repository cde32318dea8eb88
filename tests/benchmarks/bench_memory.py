"""GPU memory that run_distillation.py needs by batch size, counted without a GPU.

    python -m tests.benchmarks.bench_memory [--shape large-v3]

The script's own step runs on fake tensors, of which only the sizes exist: what is counted is the most that was alive at
once, of weights, optimiser, activations and gradients. CUDA itself, its libraries and the allocator's gaps come on top,
about 1 to 2 GB, and DDP's buckets as much as the trained weights. A window of several clips has more tokens than a clip
and the same encoder.
"""

import argparse
import sys
import weakref
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import WhisperConfig, WhisperForConditionalGeneration

import run_distillation as distillation

SHAPES = {  # width, layers of encoder and teacher's decoder, heads, log-mel bins, vocabulary
    "base": (512, 6, 8, 80, 51865),
    "small": (768, 12, 12, 80, 51865),
    "medium": (1024, 24, 16, 80, 51865),
    "large-v3": (1280, 32, 20, 128, 51866),
}
BATCHES = (8, 16, 32, 64, 128)
ROWS = {"clips, 20 tokens": 20, "packed windows, 250 tokens": 250}


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most that there were."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def make_model(shape: str, decoder_layers: int, dtype: torch.dtype) -> WhisperForConditionalGeneration:
    width, layers, heads, mels, vocabulary = SHAPES[shape]
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=decoder_layers or layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        num_mel_bins=mels,
        vocab_size=vocabulary,
    )
    torch.set_default_dtype(dtype)  # fake tensors refuse `.to`
    try:
        return WhisperForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)


def peak_bytes(shape: str, rows: int, tokens: int, decoder_layers: int) -> int:
    """Of two steps in bfloat16, with a frozen encoder and float32 weights, in `rows` labels of `tokens` tokens."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher = make_model(shape, 0, torch.bfloat16)
        student = make_model(shape, decoder_layers, torch.float32)
        student.model.encoder = teacher.model.encoder.requires_grad_(False)
        settings = argparse.Namespace(freeze_encoder=True, temperature=2.0, ce_weight=0.8, kl_weight=1.0)
        trained = distillation.TrainedPart(student, settings).train()
        models = SimpleNamespace(student=student, teacher=teacher, trained=trained)
        optimizer = torch.optim.AdamW([weight for weight in trained.parameters() if weight.requires_grad])
        width = -(-tokens // 8) * 8
        batch = {
            "features": torch.zeros(rows, teacher.config.num_mel_bins, 3000, dtype=torch.float16),
            "decoder_input_ids": torch.zeros(rows, width, dtype=torch.int64),
            "positions": torch.zeros(rows * tokens, dtype=torch.int64),
            "targets": torch.zeros(rows * tokens, dtype=torch.int64),
        }
        memory = Memory()
        for tensor in (*teacher.parameters(), *trained.parameters(), *batch.values()):
            memory.add(tensor)
        with memory:
            for _ in range(2):  # the optimiser's state appears with the first
                with torch.autocast("cpu", torch.bfloat16):
                    inputs, hidden = distillation.run_frozen(models, batch)
                    loss, _ = trained(inputs, hidden, teacher.proj_out.weight, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                del inputs, hidden, loss
    return memory.peak


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="large-v3", help="of the teacher")
    parser.add_argument("--decoder_layers", type=int, default=2, help="of the student")
    options = parser.parse_args(argv)
    print(f"GB of a training step in bfloat16, whisper-{options.shape}, {options.decoder_layers} decoder layers\n")
    print(f"| batch size | {' | '.join(map(str, BATCHES))} |\n| --- |{' ---: |' * len(BATCHES)}")
    for name, tokens in ROWS.items():
        peaks = [peak_bytes(options.shape, rows, tokens, options.decoder_layers) for rows in BATCHES]
        print(f"| {name} | {' | '.join(f'{peak / 1e9:.1f}' for peak in peaks)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
