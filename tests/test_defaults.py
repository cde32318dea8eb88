"""What every script does unless it is told otherwise: who changes a default or a limit changes it here on purpose."""

import importlib
import os

import pytest

from tests.test_flags import SCRIPTS, flags_of

# By script: the default of each flag, None where it is unset. `...` marks flags that must be given.
DEFAULTS = {
    "reazonspeech_manual_downloader": {
        "target": "tiny",
        "start": None,
        "end": None,
        "dry_run": False,
        "health_check": False,
        "base_url": None,
        "data_dir": None,
        "pool": 10,
        "retries": 8,
        "backoff": 2.0,
        "timeout": 60.0,
        "rate_limit": 0.0,
    },
    "reazonspeech_manual_dataloader": {
        "target": "tiny",
        "dataset_dir_suffix": None,
        "data_dir": None,
        "preprocessing_num_workers": 1,
        "output_dir": None,
        "overwrite_output_dir": False,
        "dry_run": False,
        "hub_model_id": None,
        "push_to_hub": None,
        "hub_private_repo": True,
    },
    "run_pseudo_labelling": {
        "dataset_name": ...,
        "dataset_config_name": None,
        "dataset_dir_suffix": None,
        "dataset_split_name": "train",
        "audio_column_name": "audio",
        "text_column_name": None,
        "id_column_name": None,
        "max_samples": None,
        "model_name_or_path": ...,
        "language": None,
        "task": "transcribe",
        "return_timestamps": False,
        "generation_num_beams": 1,
        "max_label_length": 128,
        "decode_token_ids": False,
        "scores": None,
        "per_device_eval_batch_size": None,
        "dataloader_num_workers": 4,
        "preprocessing_num_workers": 1,
        "shard_size": 1000,
        "dtype": None,
        "attn_type": "sdpa",
        "output_dir": ...,
        "overwrite_output_dir": False,
        "dry_run": False,
        "hub_model_id": None,
        "push_to_hub": None,
        "hub_private_repo": True,
        "report_to": "wandb",
        "wandb_project": "kotoba-whisper-labelling",
        "logging_steps": 100,
    },
    "run_data_filtering": {
        "dataset_name": ...,
        "dataset_config_name": None,
        "split": "train",
        "text_column_name": None,
        "audio_column_name": "audio",
        "speaker_id_column_name": None,
        "model": "openai/whisper-large-v3",
        "language": "ja",
        "task": "transcribe",
        "wer_threshold": 10.0,
        "cer_threshold": None,
        "min_duration_in_seconds": 0.0,
        "max_duration_in_seconds": 30.0,
        "max_label_length": None,
        "max_ngram_repeats": None,
        "min_avg_logprob": None,
        "max_compression_ratio": None,
        "max_no_speech_prob": None,
        "hallucinations": None,
        "timestamp_probability": 0.2,
        "condition_on_prev_probability": 0.0,
        "seed": 42,
        "concatenate_audio": False,
        "concatenate_seconds": 30.0,
        "concatenate_gap_seconds": 0.4,
        "concatenate_probability": 1.0,
        "skip_filtering": False,
        "skip_logmel": False,
        "preprocessing_num_workers": len(os.sched_getaffinity(0)),
        "preprocessing_batch_size": 8,
        "shard_size": 1000,
        "output_dir": None,
        "overwrite_output_dir": False,
        "dry_run": False,
        "hub_model_id": None,
        "push_to_hub": None,
        "hub_private_repo": True,
    },
    "create_student_model": {
        "teacher_checkpoint": ...,
        "subfolder": "",
        "cache_dir": None,
        "encoder_layers": None,
        "encoder_layer_indices": None,
        "decoder_layers": 2,
        "decoder_layer_indices": None,
        "save_dir": ...,
        "dtype": "float32",
        "overwrite_output_dir": False,
        "seed": 42,
        "dry_run": False,
        "push_to_hub": False,
        "hub_model_id": None,
        "hub_private_repo": True,
    },
    "run_distillation": {
        "model_name_or_path": ...,
        "teacher_model_name_or_path": None,
        "freeze_encoder": False,
        "dtype": None,
        "attn_type": "sdpa",
        "gradient_checkpointing": False,
        "torch_compile": False,
        "train_dataset_name": None,
        "train_dataset_config_name": None,
        "train_split_name": "train",
        "train_dataset_samples": None,
        "audio_column_name": "audio",
        "text_column_name": None,
        "train_on_silence": False,
        "language": None,
        "task": "transcribe",
        "max_label_length": 448,
        "preprocessing_num_workers": 1,
        "dataloader_num_workers": None,
        "cache_encoder_outputs": None,
        "do_train": False,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "lr_scheduler_kwargs": "{}",
        "warmup_steps": 50,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "ce_weight": 0.8,
        "kl_weight": "1.0",
        "temperature": 2.0,
        "seed": 42,
        "eval_dataset_name": None,
        "eval_dataset_config_name": None,
        "eval_split_name": "test",
        "eval_steps": 1000,
        "eval_max_samples": 256,
        "metric_for_best_model": "cer",
        "output_dir": ...,
        "overwrite_output_dir": False,
        "resume_from_checkpoint": "auto",
        "save_steps": 500,
        "save_total_limit": None,
        "logging_steps": 50,
        "dry_run": False,
        "report_to": "wandb",
        "wandb_project": "distillation",
        "wandb_name": None,
        "hub_model_id": None,
        "push_to_hub": False,
        "hub_private_repo": True,
    },
    "run_short_form_eval": {
        "model_name_or_path": None,
        "model_revision": "main",
        "subfolder": "",
        "dtype": None,
        "attn_type": "sdpa",
        "assistant_model": None,
        "dataset_name": None,
        "dataset_config_name": None,
        "dataset_split_name": "test",
        "audio_column_name": "audio",
        "text_column_name": "text",
        "id_column_name": None,
        "max_samples_per_split": None,
        "skip_long_audio": False,
        "long_form": False,
        "concatenate_audio": False,
        "concatenate_seconds": 30,
        "seed": 0,
        "language": "ja",
        "task": "transcribe",
        "generation_max_length": 256,
        "generation_num_beams": 1,
        "return_timestamps": False,
        "per_device_eval_batch_size": None,
        "dataloader_num_workers": 4,
        "preprocessing_num_workers": 1,
        "scorer": None,
        "output_dir": "eval",
        "overwrite_output_dir": False,
        "report_audio_mb": 20,
        "predictions": None,
        "compare": None,
        "push_to_hub": False,
        "report_to": "none",
        "wandb_project": "kotoba-whisper-evaluation",
        "dry_run": False,
    },
}
# Limits that results depend on and no flag sets.
LIMITS = {
    "reazonspeech_manual_downloader": {
        "LONGEST_BACKOFF": 60.0,
        "LONGEST_WAIT": 600,
        "LEAST_RATE": 1024,
        "SPARE": 64 << 20,
        "PADDING": 1 << 20,
        "BASE_URL": "https://corpus.reazon-research.org/reazonspeech-v2",
        "DATA_DIR": "~/.cache/reazon_manual_download",
        "TEMPORARY_STATUSES": {408, 425, 429, *range(500, 600)},
    },
    "reazonspeech_manual_dataloader": {
        "DURATIONS": (0, 1, 2, 3, 5, 7, 10, 15, 20, 30),
        "DATA_DIR": "~/.cache/reazon_manual_download",
        "TARS": {
            "tiny": range(1),
            "small": range(12),
            "medium": range(116),
            "large": range(579),
            "all": range(4095),
            "test": range(4095, 4096),
        },
    },
    "run_pseudo_labelling": {"CPU_BATCH": 16, "MOST_CLIPS": 128, "WINDOW_SECONDS": 30, "TIMESTAMPS": 1501},
    "run_data_filtering": {
        "MAX_CLIP_LABEL": 128,
        "MAX_WINDOW_LABEL": 256,
        "PACKED_ROWS": 1000,
        "SAMPLE_ROWS": 64,
        "OTHER_THRESHOLDS": (0, 5, 10, 15, 20, 30, 40, 80, 100),
        "LENGTH_CLASSES": (1, 8, 16, 32, 64, 128),
        "MEASURE_SETTINGS": (
            *("dataset", "audio_column_name", "task", "language", "normaliser", "tokenizer", "feature_extractor"),
        ),
        "UNSCORED_LIMITS": {
            "min_avg_logprob": -1.0,
            "max_compression_ratio": 2.4,
            "max_no_speech_prob": 0.6,
            "max_ngram_repeats": 5,
        },
    },
    "run_distillation": {
        "GPU_WORKERS": 4,
        "CACHE_BLOCK": 32,
        "LOGGED_PREDICTIONS": 8,
        "LED_BY_LOSS": ("reduce_lr_on_plateau", "greedy"),
    },
    "run_short_form_eval": {
        "CPU_BATCH": 32,
        "CONFUSIONS": 50,
        "BOOTSTRAP_DRAWS": 1000,
        "MAX_PLAYED_SECONDS": 120,
        "LONG_FORM_SHARD": 8,
        "MAX_SILENCE": 6400,
        "PROMPT_TOKENS": 4,
        "LENGTH_GROUPS": ((0, 7), (8, 15), (16, 31), (32, 63), (64, 95), (96, None)),
    },
}
# The least that a script needs, and by flag the values at a bound, which are taken, and those beyond it.
NEEDED = {
    "reazonspeech_manual_downloader": "-t small",
    "run_pseudo_labelling": "--dataset_name d --model_name_or_path m --output_dir o",
    "run_data_filtering": "--dataset_name d",
    "run_distillation": "--model_name_or_path m --output_dir o --teacher_model_name_or_path t",
    "run_short_form_eval": "--model_name_or_path m --dataset_name d",
}
BOUNDS = [
    ("reazonspeech_manual_downloader", "--pool", ["1"], ["0"]),
    ("reazonspeech_manual_downloader", "--start", ["0", "11"], ["-1", "12"]),
    ("reazonspeech_manual_downloader", "--end", ["1", "12"], ["0", "13"]),
    ("reazonspeech_manual_downloader", "--start 3 --end", ["4"], ["3", "2"]),
    *(
        ("run_pseudo_labelling", f"--{name}", ["1"], ["0"])
        for name in ("generation_num_beams", "per_device_eval_batch_size", "shard_size", "logging_steps")
    ),
    *(
        ("run_data_filtering", f"--{name}_probability", ["0", "1"], ["-0.01", "1.01"])
        for name in ("timestamp", "condition_on_prev", "concatenate")
    ),
    *(
        ("run_data_filtering", f"--{name}", ["1"], ["0"])
        for name in ("preprocessing_num_workers", "preprocessing_batch_size", "shard_size")
    ),
    ("run_data_filtering", "--concatenate_seconds 5 --concatenate_gap_seconds", ["0", "4.99"], ["-0.1", "5"]),
    *(
        ("run_distillation", f"--{name}", ["1"], ["0"])
        for name in (
            *("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "logging_steps"),
            "eval_steps",
        )
    ),
    *(
        ("run_short_form_eval", f"--{name}", ["1"], ["0"])
        for name in ("generation_num_beams", "per_device_eval_batch_size", "max_samples_per_split")
    ),
    ("run_short_form_eval", "--seed", ["0"], ["-1"]),
    ("run_short_form_eval", "--concatenate_audio --concatenate_seconds", ["0.1", "30"], ["0", "30.1"]),
    ("run_short_form_eval", "--concatenate_audio --long_form --concatenate_seconds", ["3600"], ["0", "3600.1"]),
    ("run_short_form_eval", "--concatenate_seconds", ["31"], []),  # which nothing uses
    ("run_short_form_eval", "--assistant_model a --generation_num_beams", ["1"], ["2"]),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_the_default_that_is_written_down_here(script):
    found = {action.dest: ... if action.required else action.default for action in flags_of(script)}
    assert found == DEFAULTS[script]


@pytest.mark.parametrize("script", LIMITS)
def test_limits_that_no_flag_sets_are_those_that_are_written_down_here(script):
    module = importlib.import_module(script)
    assert {name: getattr(module, name) for name in LIMITS[script]} == LIMITS[script]


@pytest.mark.parametrize(("script", "flag", "taken", "refused"), BOUNDS, ids=str)
def test_values_at_a_bound_are_taken_and_those_beyond_it_are_refused(script, flag, taken, refused, capsys):
    parse_args = importlib.import_module(script).parse_args
    words = [*NEEDED[script].split(), *flag.split()]
    for value in taken:
        assert str(vars(parse_args([*words[:-1], f"{words[-1]}={value}"]))[words[-1][2:]]) in (value, f"{value}.0")
    for value in refused:
        with pytest.raises(SystemExit, match="2"):
            parse_args([*words[:-1], f"{words[-1]}={value}"])
        assert words[-1] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("weights", "largest", "shares"),
    [("1", 1.0, None), ("2+1", 2.0, [1.0, 0.5]), ("0.5+0.5", 0.5, None), ("0+0.2", 0.2, [0.0, 1.0]), ("0", 0.0, None)],
)
def test_the_weight_of_the_divergence_is_the_largest_and_the_others_are_shares_of_it(weights, largest, shares):
    parse_args = importlib.import_module("run_distillation").parse_args
    args = parse_args([*NEEDED["run_distillation"].split(), "--kl_weight", weights])
    assert (args.kl_weight, args.kl_shares) == (largest, shares)
    assert args.teacher_model_name_or_path == ("t" if largest else None)
