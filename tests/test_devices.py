"""Devices: training on a stand-in that refuses what a GPU refuses; precision, attention, and loader processes."""

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

import run_data_filtering
import run_distillation
import run_pseudo_labelling
import run_short_form_eval
from tests import stages
from tests.fake_gpu import fake_gpu

ROOT = Path(__file__).resolve().parents[1]
DECODING = [run_distillation, run_pseudo_labelling, run_short_form_eval]


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory) -> Path:
    return stages.initialise(tiny_teacher, tmp_path_factory.mktemp("models") / "init")


@pytest.fixture(scope="module")
def labelled(clips, tiny_teacher, tmp_path_factory) -> Path:
    """Eight clips with their labels; the texts are the transcriptions."""
    rows = []
    for clip in clips[:8]:
        label = stages.make_label(tiny_teacher, clip["transcription"])
        rows.append({"audio": clip["audio"], "text": clip["transcription"], "labels": label})
    return stages.write_dataset(tmp_path_factory.mktemp("data") / "labelled", rows)


# ---- the stand-in refuses what a GPU refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "misuse",
    [
        lambda tensor: tensor.numpy(),
        lambda tensor: np.asarray(tensor),
        lambda tensor: tensor + torch.ones(2),
        lambda tensor: nn.functional.embedding(torch.tensor([0]), tensor[:, None]),
        lambda tensor: torch.cat([tensor, torch.ones(2)]),
    ],
)
def test_the_stand_in_refuses_a_host_that_takes_its_tensors_and_tensors_of_two_devices(misuse):
    with fake_gpu(), pytest.raises((RuntimeError, TypeError)):
        misuse(torch.zeros(2, device="cuda"))


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.ones(2).copy_(tensor),
        lambda tensor: tensor.copy_(torch.ones(2)),
        lambda tensor: tensor.new_tensor([1.0]),
    ],
)
def test_the_stand_in_notices_where_the_host_waits_and_forbids_it_in_a_graph(read):
    with fake_gpu() as gpu:
        tensor = torch.zeros(2, device="cuda")
        tensor.mul_(2).add_(1.0).sum()
        torch.ones(2).to("cuda", non_blocking=True)
        assert not gpu.reads and not gpu.copies
        read(tensor)
        assert gpu.reads.total() + gpu.copies.total() == 1
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="not permitted"):
            read(tensor)


def test_a_graph_of_the_stand_in_is_replayed_in_its_memory():
    with fake_gpu():
        counted = torch.zeros(2, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = (counted + 1)[:1] * 2
            counted.add_(1)
        for _ in range(3):
            graph.replay()
        assert counted.tolist() == [4, 4] and doubled.tolist() == [8]


def test_there_is_no_gpu_before_and_after_the_stand_in():
    for _ in range(2):
        with fake_gpu():
            assert torch.cuda.is_available() and torch.accelerator.is_available()
            assert torch.accelerator.current_accelerator() == torch.device("cuda")
        assert not torch.cuda.is_available() and not torch.accelerator.is_available()
        assert torch.accelerator.current_accelerator(check_available=True) is None
    weight = torch.ones(2, requires_grad=True)
    weight.sum().backward()
    assert weight.grad.tolist() == [1, 1]


# ---- the scripts on the stand-in -------------------------------------------------------------------------------------


def test_training_on_a_gpu_learns_what_it_learns_on_a_cpu_and_waits_once_a_step(
    student, tiny_teacher, labelled, tmp_path
):
    held_out = ("--eval_dataset_name", labelled, "--eval_split_name", "train", "--eval_max_samples", 2)
    flags = (*held_out, "--max_steps", 3, "--save_steps", 2, "--per_device_train_batch_size", 2)
    flags = (*flags, "--gradient_accumulation_steps", 2, "--dataloader_num_workers", 0)
    on_cpu = stages.distil(student, tiny_teacher, labelled, tmp_path / "cpu", *flags)
    with fake_gpu() as gpu:
        on_gpu = stages.distil(student, tiny_teacher, labelled, tmp_path / "gpu", *flags)
    for name in ("loss", "grad_norm", "eval_loss", "eval_cer"):
        assert stages.read_figures(on_gpu, name) == pytest.approx(stages.read_figures(on_cpu, name), rel=1e-3)
    in_steps = {line: count for line, count in gpu.reads.items() if line.startswith("optimiser_step")}
    assert list(in_steps.values()) == [3]
    within_steps = ("forward", "chunk_loss", "run_frozen", "encode_features", "decode_labels")
    waits = [line for line in (*gpu.reads, *gpu.copies) if "super()" not in line]  # that is `generate`'s, at the end
    assert not [line for line in waits if line.startswith(within_steps)]
    assert not [line for line in gpu.copies if line.startswith("optimiser_step")]


def test_a_gpu_whose_encoder_is_trained_and_the_cache_work_as_on_a_cpu(student, tiny_teacher, labelled, tmp_path):
    flags = ("--max_steps", 1, "--dataloader_num_workers", 0)
    for name, more in (
        ("whole", ("--freeze_encoder", "False")),
        ("cached", ("--cache_encoder_outputs", tmp_path / "cache")),
    ):
        on_cpu = stages.distil(student, tiny_teacher, labelled, tmp_path / f"{name}-cpu", *flags, *more)
        with fake_gpu():
            on_gpu = stages.distil(student, tiny_teacher, labelled, tmp_path / f"{name}-gpu", *flags, *more)
        assert stages.read_figures(on_gpu, "loss") == pytest.approx(stages.read_figures(on_cpu, "loss"), rel=1e-3)


@pytest.fixture(scope="module")
def spoken(clips, tmp_path_factory) -> Path:
    """Three clips as they are, without labels."""
    return stages.write_dataset(tmp_path_factory.mktemp("data") / "spoken", clips[:3])


def test_labels_made_on_a_gpu_are_those_made_on_a_cpu(tiny_teacher, spoken, tmp_path):
    flags = ("--language", "ja", "--dtype", "float32", "--max_label_length", 12, "--per_device_eval_batch_size", 2)
    for name, more in (("greedy", ()), ("scores", ("--scores",))):
        on_cpu = stages.label(tiny_teacher, spoken, tmp_path / f"{name}-cpu", *flags, *more)
        with fake_gpu():
            on_gpu = stages.label(tiny_teacher, spoken, tmp_path / f"{name}-gpu", *flags, *more)
        assert stages.read_labels(on_gpu) == stages.read_labels(on_cpu)


@pytest.mark.parametrize(
    "flags",
    [(), ("--generation_num_beams", 2), ("--long_form",)],
    ids=["clips", "beams", "long audio"],
)
def test_an_evaluation_on_a_gpu_hears_what_it_hears_on_a_cpu(tiny_teacher, spoken, tmp_path, flags):
    if "--long_form" in flags:
        row = {"audio": stages.tone(31), "name": "tone", "transcription": "あ"}
        spoken = stages.write_dataset(tmp_path / "long", [row])
    flags = (*flags, "--generation_max_length", 6, "--per_device_eval_batch_size", 2)
    on_cpu = stages.evaluate(tiny_teacher, spoken, tmp_path / "cpu", *flags)
    with fake_gpu():
        on_gpu = stages.evaluate(tiny_teacher, spoken, tmp_path / "gpu", *flags)
    (predictions,) = on_cpu.glob("all_predictions.*.csv")
    assert (on_gpu / predictions.name).read_bytes() == predictions.read_bytes()


@pytest.mark.parametrize("script", [run_data_filtering, *DECODING])
def test_a_log_mel_is_the_extractors_to_the_bit_and_stays_on_the_device_that_made_it(script, tiny_teacher, clips):
    extractor = WhisperFeatureExtractor.from_pretrained(tiny_teacher)
    waveforms = [stages.samples_of(clip["audio"])[:, 0] for clip in clips[:3]]
    found = script.log_mel(waveforms, extractor)
    frames = script.filled_frames(max(map(len, waveforms)))
    expected = extractor(waveforms, sampling_rate=16_000, max_length=160 * frames, return_tensors="pt").input_features
    assert torch.equal(found, expected)
    with fake_gpu() as gpu:
        on_device = script.log_mel(waveforms, extractor, "cuda")
        assert on_device.is_cuda and not gpu.reads and not gpu.copies
        assert torch.equal(on_device.cpu(), expected)


# ---- precision and attention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_encoder", [False, True])
def test_what_is_frozen_computes_in_bfloat16_and_what_is_trained_under_autocast(
    student, tiny_teacher, labelled, tmp_path, monkeypatch, own_encoder
):
    """A frozen LayerNorm gives bfloat16; autocast would compute it in float32."""
    init = student
    if own_encoder:
        model = WhisperForConditionalGeneration.from_pretrained(student)
        model.model.encoder.layer_norm.weight.data *= 1.5
        init = stages.initialise(tiny_teacher, tmp_path / "init")
        model.save_pretrained(init)
        (init / "student.json").unlink()  # which would say that the weights were changed
    seen = {}
    run_frozen = run_distillation.run_frozen

    def watch(models, batch):
        for name, module in (("teacher", models.teacher.model), ("encoder", models.student.model.encoder)):
            for norm in module.modules():
                if isinstance(norm, nn.LayerNorm):
                    norm.register_forward_hook(
                        lambda *given, name=name: seen.setdefault(name, set()).add(given[2].dtype)
                    )
        trained = models.trained.decoder.layer_norm
        trained.register_forward_hook(lambda *given: seen.setdefault("trained", set()).add(given[2].dtype))
        seen["weights"] = {parameter.dtype for parameter in models.trained.parameters()}
        _, hidden = result = run_frozen(models, batch)
        teacher = WhisperForConditionalGeneration.from_pretrained(tiny_teacher, dtype=torch.bfloat16).eval()
        inputs = {"input_features": batch["features"].bfloat16(), "decoder_input_ids": batch["decoder_input_ids"]}
        logits = teacher(**inputs, use_cache=False).logits.flatten(0, 1)[batch["positions"]]
        assert torch.equal(models.teacher.proj_out(hidden), logits)
        return result

    monkeypatch.setattr(run_distillation, "run_frozen", watch)
    stages.distil(init, tiny_teacher, labelled, tmp_path / "out", "--max_steps", 1, "--dtype", "bfloat16")
    half = {torch.bfloat16}
    assert seen == {"teacher": half, "encoder": half, "trained": {torch.float32}, "weights": {torch.float32}}


@pytest.mark.parametrize("script", DECODING)
def test_float32_is_float32_for_convolutions_too(script):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert script.choose_dtype("float32", torch.device("cpu")) == "float32"
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


@pytest.mark.parametrize("script", DECODING)
@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32_unless_told(
    script, capability, dtype, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)

    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation or capability >= (8, 0)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert script.choose_dtype(None, torch.device("cuda")) == dtype
    assert f"--dtype is not set: {dtype}, which this cuda computes natively" in caplog.text
    assert script.choose_dtype("bfloat16", torch.device("cuda")) == "bfloat16"


@pytest.mark.parametrize("script", DECODING)
@pytest.mark.parametrize(
    ("dtype", "device", "package", "kernel", "taken", "said"),
    [
        ("bfloat16", "cuda", True, False, "flash_attention_2", "by the package flash-attn"),
        ("float16", "cuda", False, True, "flash_attention_2", "by the kernel of kernels-community"),
        ("bfloat16", "cuda", False, False, "sdpa", "install the package kernels.*sdpa is used"),
        ("float32", "cuda", True, True, "sdpa", "this is float32 on cuda. sdpa is used"),
        ("bfloat16", "cpu", True, True, "sdpa", "this is bfloat16 on cpu. sdpa is used"),
    ],
)
def test_flash_attention_is_taken_where_it_runs_and_one_line_says_what_was_taken(
    script, dtype, device, package, kernel, taken, said, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)

    def is_available(kernels_fallback_ok: bool = False) -> bool:
        return package or (kernel and kernels_fallback_ok)

    monkeypatch.setattr(script, "is_flash_attn_2_available", is_available)
    assert script.choose_attention("flash_attn", dtype, torch.device(device)) == taken
    (record,) = caplog.records
    assert re.search(said, record.message)
    assert script.choose_attention("eager", dtype, torch.device(device)) == "eager"


def test_a_compilation_that_fails_ends_with_one_line(student, tiny_teacher, labelled, tmp_path, monkeypatch):
    def backend(*_):
        raise ValueError("no compiler here")

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=backend))
    with pytest.raises(SystemExit, match=r"--torch_compile failed: .*no compiler here.*without it") as error:
        stages.distil(student, tiny_teacher, labelled, tmp_path / "out", "--max_steps", 1, "--torch_compile")
    assert "\n" not in str(error.value)


# ---- loader processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", DECODING)
def test_processes_on_a_cpu_share_its_cores_where_the_launcher_gave_each_one_thread(script, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for threads, expected in (("1", 2), ("3", 3)):  # the latter is a user's choice
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        torch.set_num_threads(int(threads))
        script.start_accelerator(argparse.Namespace(report_to="none", output_dir=tmp_path))
        assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("given", "device", "cores", "processes", "chosen"),
    [
        (None, "cpu", 16, 1, 0),
        (None, "cuda", 16, 1, 4),
        (None, "cuda", 16, 8, 1),
        (None, "cuda", 1, 1, 1),
        (None, "cuda", 9, 3, 2),
        (7, "cpu", 1, 1, 7),
        (0, "cuda", 16, 1, 0),
    ],
)
def test_a_gpu_gets_loader_processes_that_the_cores_can_hold(monkeypatch, given, device, cores, processes, chosen):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    flags = [] if given is None else ["--dataloader_num_workers", str(given)]
    required = ["--model_name_or_path", "a", "--teacher_model_name_or_path", "b", "--output_dir", "c"]
    args = run_distillation.parse_args([*required, *flags])
    assert run_distillation.choose_workers(args, torch.device(device), processes) == chosen


POISON = """
import os, signal, sys
import run_distillation

def end():
    os.kill(os.getpid(), signal.SIGKILL)

class Poison:
    def __reduce__(self):
        return end, ()

class Rows:
    def __init__(self):
        self.poison = Poison()
        self.large = bytes(1 << 20)  # more than a pipe holds

    def __getitem__(self, index):
        return index

if __name__ == "__main__":
    with run_distillation.one_line_for_faults():
        next(run_distillation.read_batches(Rows(), [[0]], 1))
"""


@pytest.mark.timeout(300)  # what it guards against is waiting for ever
def test_a_loader_process_that_is_killed_before_it_has_read_its_task_ends_the_run_with_one_line(tmp_path):
    (tmp_path / "poison.py").write_text(POISON)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, tmp_path / "poison.py"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 1
    assert "a process that loads batches was killed" in run.stderr and "Run the same command again" in run.stderr
    assert "Traceback" not in run.stderr.split("poison.py: error")[-1]


@pytest.mark.timeout(300)
def test_a_loader_process_that_is_killed_while_it_works_ends_the_run_with_one_line(
    student, tiny_teacher, labelled, tmp_path, monkeypatch
):
    optimiser_step = run_distillation.optimiser_step

    def step_and_kill(*given):
        result = optimiser_step(*given)
        for process in psutil.Process().children(recursive=True):
            if "forkserver" in " ".join(process.cmdline()) and process.ppid() != os.getpid():
                process.send_signal(signal.SIGKILL)
        return result

    monkeypatch.setattr(run_distillation, "optimiser_step", step_and_kill)
    flags = ("--max_steps", 50, "--dataloader_num_workers", 2, "--per_device_train_batch_size", 1)
    with pytest.raises(SystemExit, match=r"was killed\. .*Run the same command again to continue\.") as error:
        stages.distil(student, tiny_teacher, labelled, tmp_path / "out", *flags)
    assert "\n" not in str(error.value)
    assert json.loads((tmp_path / "out" / "distillation.json").read_text())["status"] == "running"
