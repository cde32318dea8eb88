#!/usr/bin/env bash
#
# Trains kotoba-whisper-v1.0 from nothing: download, label, filter, initialise, distil, evaluate.
#
#   through the Hub, after `hf auth login`:   HF_ORG=your-hf-org ./kotoba_whisper_training_v1.0.sh
#   through local directories:                ./kotoba_whisper_training_v1.0.sh
#
# Run it again after any failure: every stage keeps what it has finished and does only the rest.
# The environment overrides every setting below, as in `TARGET=tiny EPOCHS=2 ./kotoba_whisper_training_v1.0.sh`. The
# defaults are those of v1.0: 5,000 hours of audio, 1.2 TB of disk, and eight GPUs for its global batch of 256.
set -euo pipefail
SCRIPTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# ---- where -----------------------------------------------------------------------------------------------------------
HF_ORG="${HF_ORG:-}"                    # your user or organisation on the Hub; empty keeps everything in local directories
WORK_DIR="${WORK_DIR:-${PWD}}"          # datasets, models and evaluations are written here
DATASET_NAME="${DATASET_NAME:-reazonspeech-whisper-large-v3}"
MODEL_NAME="${MODEL_NAME:-kotoba-whisper-v1.0}"
ACCELERATE_ARGS="${ACCELERATE_ARGS:-}"  # for `accelerate launch`, such as "--multi_gpu --num_processes 8"

# ---- what ------------------------------------------------------------------------------------------------------------
TARGET="${TARGET:-large}"               # tiny (8.5 h), small (100 h), medium (1,000 h), large (5,000 h) or all (35,000 h)
DOWNLOADS="${DOWNLOADS:-${TARGET}}"     # subsets to download; "large test" adds the held-out tar
POOL="${POOL:-8}"                       # parallel downloads
TEACHER="${TEACHER:-openai/whisper-large-v3}"
LANGUAGE="${LANGUAGE_CODE:-ja}"         # set LANGUAGE_CODE: systems use LANGUAGE for their messages
WORKERS="${WORKERS:-$(env -u OMP_NUM_THREADS nproc)}"  # processes for what needs CPUs only
DATALOADER_WORKERS="${DATALOADER_WORKERS:-4}"  # loaders of audio or features per GPU
ATTN_TYPE="${ATTN_TYPE:-sdpa}"          # flash_attn where it is installed
DTYPE="${DTYPE:-bfloat16}"              # float16 for GPUs older than A100, RTX 30 and L4; float32 for the demo
MAX_LABEL_LENGTH="${MAX_LABEL_LENGTH:-128}"  # tokens

# ---- labels ----------------------------------------------------------------------------------------------------------
LABEL_BATCH="${LABEL_BATCH:-}"          # clips per device; empty = as many as the memory holds, at most 128
SHARD_SIZE="${SHARD_SIZE:-1000}"        # clips per file; a crash costs only the files that are not complete
NUM_BEAMS="${NUM_BEAMS:-1}"             # 1 = greedy

# ---- filter ----------------------------------------------------------------------------------------------------------
WER_THRESHOLD="${WER_THRESHOLD:-10}"    # per cent; in Japanese this keeps hardly more than exact matches
CER_THRESHOLD="${CER_THRESHOLD:-}"      # per cent; when set, in place of WER; 10 keeps more clips, and longer ones
TIMESTAMP_PROBABILITY="${TIMESTAMP_PROBABILITY:-0.2}"  # share of the labels that keep their timestamps
CONDITION_ON_PREV_PROBABILITY="${CONDITION_ON_PREV_PROBABILITY:-0.2}"  # share that gets the previous clip's text as a
                                        # prompt; 0 is better here, as neighbouring clips are unrelated
CONCATENATE_AUDIO="${CONCATENATE_AUDIO:-False}"  # True trains on windows of up to 30 s, packed with several clips
CONCATENATE_PROBABILITY="${CONCATENATE_PROBABILITY:-0.8}"  # share of the clips that are packed; the others stay alone, so
                                        # that the student also learns to stop on a short clip

# ---- student and training: 8 GPUs x 16 x 2 is v1.0's global batch of 256 ---------------------------------------------------
DECODER_LAYERS="${DECODER_LAYERS:-2}"
EPOCHS="${EPOCHS:-8}"
TRAIN_BATCH="${TRAIN_BATCH:-16}"        # clips per GPU at a time
GRADIENT_ACCUMULATION="${GRADIENT_ACCUMULATION:-2}"  # such batches per step; 16 on one GPU gives v1.0's global batch
LEARNING_RATE="${LEARNING_RATE:-0.0001}"
LR_SCHEDULER="${LR_SCHEDULER:-constant_with_warmup}"
WARMUP_STEPS="${WARMUP_STEPS:-100}"
SAVE_STEPS="${SAVE_STEPS:-2500}"        # steps between checkpoints
LOGGING_STEPS="${LOGGING_STEPS:-50}"
REPORT_TO="${REPORT_TO:-wandb}"         # or none; without a login wandb only writes files
TRAIN_ARGS="${TRAIN_ARGS:-}"            # more flags for run_distillation.py, such as "--cache_encoder_outputs DIR"

# ---- evaluation ------------------------------------------------------------------------------------------------------
EVAL_DATASETS="${EVAL_DATASETS:-japanese-asr/ja_asr.jsut_basic5000 japanese-asr/ja_asr.reazonspeech_test}"
EVAL_CONFIG="${EVAL_CONFIG:-}"          # configuration of these datasets; empty = the default one
EVAL_SPLIT="${EVAL_SPLIT:-test}"
EVAL_BATCH="${EVAL_BATCH:-}"            # as LABEL_BATCH
EVAL_MODELS="${EVAL_MODELS:-teacher init student}"  # these, or directories and Hub ids
EVAL_ARGS="${EVAL_ARGS:-}"              # more flags for run_short_form_eval.py

# ---- names that follow from these ------------------------------------------------------------------------------------
mkdir -p "${WORK_DIR}"
WORK_DIR="$(cd "${WORK_DIR}" && pwd)"
if [[ -n "${CER_THRESHOLD}" ]]; then
  FILTER=(--cer_threshold "${CER_THRESHOLD}")
  SUFFIX="cer_$(python -c "print(float('${CER_THRESHOLD}'))")"
else
  FILTER=(--wer_threshold "${WER_THRESHOLD}")
  SUFFIX="wer_$(python -c "print(float('${WER_THRESHOLD}'))")"
fi
TRAIN_LABELS=(--max_label_length "${MAX_LABEL_LENGTH}")
if [[ "${CONCATENATE_AUDIO}" == True ]]; then  # the filter has limits of its own for clips and for windows
  FILTER+=(--concatenate_audio --concatenate_probability "${CONCATENATE_PROBABILITY}")
  SUFFIX+=".packed"
  TRAIN_LABELS=()
else
  FILTER+=("${TRAIN_LABELS[@]}")
fi
MODEL_DIR="${WORK_DIR}/${MODEL_NAME}"
if [[ -n "${HF_ORG}" ]]; then
  LABELLED="${HF_ORG}/${DATASET_NAME}"
  STUDENT="${HF_ORG}/${MODEL_NAME}"
  LABEL_PUSH=(--hub_model_id "${LABELLED}")
  INIT_PUSH=(--push_to_hub --hub_model_id "${STUDENT}-init")
  TRAIN_PUSH=(--push_to_hub --hub_model_id "${STUDENT}")
else
  LABELLED="${WORK_DIR}/${DATASET_NAME}"
  STUDENT="${MODEL_DIR}"
  LABEL_PUSH=() INIT_PUSH=() TRAIN_PUSH=()
fi

stage() { printf '\n==== %s\n' "$*"; }
# shellcheck disable=SC2086  # ACCELERATE_ARGS holds several words
launch() { accelerate launch --quiet ${ACCELERATE_ARGS} "${SCRIPTS}/$1" "${@:2}"; }

# ---- 2. download -----------------------------------------------------------------------------------------------------
for target in ${DOWNLOADS}; do
  stage "download ReazonSpeech ${target}"
  python "${SCRIPTS}/reazonspeech_manual_downloader.py" --target "${target}" --pool "${POOL}"
done

# ---- 3. label --------------------------------------------------------------------------------------------------------
stage "label with ${TEACHER}"
launch run_pseudo_labelling.py \
  --model_name_or_path "${TEACHER}" \
  --dataset_name "${SCRIPTS}/reazonspeech_manual_dataloader.py" \
  --dataset_config_name "${TARGET}" \
  --dataset_split_name "train" \
  --text_column_name "transcription" \
  --id_column_name "name" \
  ${LABEL_BATCH:+--per_device_eval_batch_size "${LABEL_BATCH}"} \
  --shard_size "${SHARD_SIZE}" \
  --dataloader_num_workers "${DATALOADER_WORKERS}" \
  --preprocessing_num_workers "${WORKERS}" \
  --logging_steps 100 \
  --max_label_length "${MAX_LABEL_LENGTH}" \
  --language "${LANGUAGE}" \
  --return_timestamps \
  --attn_type "${ATTN_TYPE}" \
  --dtype "${DTYPE}" \
  --generation_num_beams "${NUM_BEAMS}" \
  --decode_token_ids False \
  --report_to "${REPORT_TO}" \
  --output_dir "${WORK_DIR}/${DATASET_NAME}" \
  "${LABEL_PUSH[@]}"

# ---- 4. filter -------------------------------------------------------------------------------------------------------
stage "filter: ${FILTER[*]}"
python "${SCRIPTS}/run_data_filtering.py" \
  -d "${LABELLED}" \
  --dataset_config_name "${TARGET}" \
  "${FILTER[@]}" \
  --text_column_name "transcription" \
  --language "${LANGUAGE}" \
  --model "${TEACHER}" \
  --preprocessing_num_workers "${WORKERS}" \
  --timestamp_probability "${TIMESTAMP_PROBABILITY}" \
  --condition_on_prev_probability "${CONDITION_ON_PREV_PROBABILITY}" \
  --output_dir "${WORK_DIR}"

# ---- 5. initialise the student -----------------------------------------------------------------------------------------
stage "initialise a student with ${DECODER_LAYERS} decoder layers"
python "${SCRIPTS}/create_student_model.py" \
  --teacher_checkpoint "${TEACHER}" \
  --decoder_layers "${DECODER_LAYERS}" \
  --save_dir "${MODEL_DIR}-init" \
  "${INIT_PUSH[@]}"

# ---- 6. distil -------------------------------------------------------------------------------------------------------
stage "distil for ${EPOCHS} epochs"
# shellcheck disable=SC2086  # TRAIN_ARGS holds several words
launch run_distillation.py \
  --model_name_or_path "${MODEL_DIR}-init" \
  --teacher_model_name_or_path "${TEACHER}" \
  --train_dataset_name "${LABELLED}.${SUFFIX}.vectorized" \
  --train_dataset_config_name "${TARGET}" \
  --train_split_name "train" \
  --language "${LANGUAGE}" \
  "${TRAIN_LABELS[@]}" \
  --save_steps "${SAVE_STEPS}" \
  --save_total_limit 1 \
  --warmup_steps "${WARMUP_STEPS}" \
  --learning_rate "${LEARNING_RATE}" \
  --lr_scheduler_type "${LR_SCHEDULER}" \
  --logging_steps "${LOGGING_STEPS}" \
  --per_device_train_batch_size "${TRAIN_BATCH}" \
  --gradient_accumulation_steps "${GRADIENT_ACCUMULATION}" \
  --preprocessing_num_workers "${WORKERS}" \
  --dataloader_num_workers "${DATALOADER_WORKERS}" \
  --dtype "${DTYPE}" \
  --attn_type "${ATTN_TYPE}" \
  --report_to "${REPORT_TO}" \
  --output_dir "${MODEL_DIR}" \
  --freeze_encoder \
  --do_train \
  --num_train_epochs "${EPOCHS}" \
  "${TRAIN_PUSH[@]}" ${TRAIN_ARGS}

# ---- 7. evaluate -----------------------------------------------------------------------------------------------------
EVALUATIONS=()
for model in ${EVAL_MODELS}; do
  case "${model}" in
    teacher) path="${TEACHER}" ;;
    init) path="${MODEL_DIR}-init" ;;
    student) path="${STUDENT}" ;;
    *) path="${model}" ;;
  esac
  for dataset in ${EVAL_DATASETS}; do
    stage "evaluate ${path} on ${dataset}"
    evaluation="${WORK_DIR}/eval/$(basename "${path}")/$(basename "${dataset}" .py)"
    if [[ " ${EVALUATIONS[*]} " == *" ${evaluation} "* ]]; then # another path ends with the same names
      evaluation="${WORK_DIR}/eval/${path//\//_}/${dataset//\//_}"
    fi
    EVALUATIONS+=("${evaluation}")
    # shellcheck disable=SC2086  # EVAL_ARGS holds several words
    launch run_short_form_eval.py \
      --model_name_or_path "${path}" \
      --dataset_name "${dataset}" \
      ${EVAL_CONFIG:+--dataset_config_name "${EVAL_CONFIG}"} \
      --dataset_split_name "${EVAL_SPLIT}" \
      --text_column_name "transcription" \
      --output_dir "${evaluation}" \
      --overwrite_output_dir \
      ${EVAL_BATCH:+--per_device_eval_batch_size "${EVAL_BATCH}"} \
      --dataloader_num_workers "${DATALOADER_WORKERS}" \
      --preprocessing_num_workers "${WORKERS}" \
      --generation_max_length 256 \
      --attn_type "${ATTN_TYPE}" \
      --dtype "${DTYPE}" \
      --language "${LANGUAGE}" ${EVAL_ARGS}
  done
done

stage "results in ${WORK_DIR}"
python "${SCRIPTS}/run_short_form_eval.py" --compare "${EVALUATIONS[@]}" --output_dir "${WORK_DIR}/eval"
