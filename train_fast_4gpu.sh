#!/usr/bin/env bash
# Trains a confidence LoRA with settings chosen for the model, on the GPUs that are here.
#
#   bash train_fast_4gpu.sh qwen                       # Qwen2.5-7B-Instruct
#   bash train_fast_4gpu.sh mistral --num_epochs 3     # Mistral-7B-Instruct; your flags win
#   bash train_fast_4gpu.sh demo --adapter activated   # the built-in tiny model, no GPU needed
#   bash train_fast_4gpu.sh qwen --preset 8gpu         # 1gpu, 2gpu, 4gpu or 8gpu: FAST_TRAINING.md
#   DRY_RUN=1 bash train_fast_4gpu.sh qwen             # only prints the command
#
# Without --preset an update has 128 records, however many GPUs there are, and as many at a time as
# their memory holds.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  echo "usage: bash train_fast_4gpu.sh qwen|mistral|demo [--preset 1gpu|2gpu|4gpu|8gpu] [flags]" >&2
  exit 2
}
fail() {
  echo "train_fast_4gpu.sh: $*" >&2
  exit 2
}

[[ $# -ge 1 ]] || usage
name=$1
shift
preset=""
if [[ ${1:-} == --preset ]]; then
  preset=${2:-}
  shift 2 || usage
fi

python=python
[[ -x .venv/bin/python ]] && python=.venv/bin/python
"$python" -c 'from importlib.util import find_spec as find
assert all(map(find, ("torch", "transformers", "peft", "accelerate", "bitsandbytes")))' 2>/dev/null ||
  fail "the Python packages are missing; 'make setup' installs them (on GPUs 'make setup-gpu')"
# GPUS=2 leaves the others to somebody else
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
[[ $gpus =~ ^[0-9]+$ ]] || fail "GPUS is '$gpus': give a number" # (( )) would run $(commands)

case $name in
  qwen)
    settings=(--model_name Qwen/Qwen2.5-7B-Instruct
      --train_data tagged/qwen/qwen_all_tagged.jsonl --output_dir checkpoints/qwen_fast)
    ;;
  mistral)
    settings=(--model_name mistralai/Mistral-7B-Instruct-v0.2
      --train_data tagged/mistral/mistral_all_tagged.jsonl --output_dir checkpoints/mistral_fast)
    ;;
  demo)
    # A million parameters: few records a step, a high learning rate. An activated
    # adapter's steps cost less, so it can take twice the epochs in the same time.
    batch=4 epochs=3 demo_rate=1e-3
    [[ " $* " =~ [=\ ]activated\  ]] && batch=8 epochs=6 demo_rate=7e-4
    settings=(--model_name demo/model --train_data tagged/demo/demo_all_tagged.jsonl
      --output_dir checkpoints/demo
      --val_data reading=tagged/demo/demo_val_demo_reading.jsonl
      medicine=tagged/demo/demo_val_demo_medicine.jsonl
      --val_samples 600 --per_device_eval_batch_size 100 --max_new_tokens 16 --max_seq_length 256
      --num_epochs "$epochs" --learning_rate "$demo_rate"
      --logging_steps 200 --eval_steps 1000 --save_steps 1000 --no_bf16)
    ;;
  *) usage ;;
esac

if [[ $name == demo ]]; then
  processes=2 update=(--batch_size "$batch" --gradient_accumulation_steps 1)
  if [[ $gpus -eq 0 ]]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; else processes=$((gpus < 2 ? gpus : 2)); fi
elif [[ -n $preset ]]; then
  case $preset in # processes, records a GPU, accumulation, learning rate
    1gpu) processes=1 batch=8 accumulation=1 rate=2e-4 ;;
    2gpu) processes=2 batch=12 accumulation=2 rate=2.5e-4 ;;
    4gpu) processes=4 batch=16 accumulation=2 rate=3e-4 ;;
    8gpu) processes=8 batch=16 accumulation=2 rate=4e-4 ;;
    *) usage ;;
  esac
  [[ $gpus -ge $processes ]] || fail "--preset $preset needs $processes GPUs, $gpus are here"
  update=(--batch_size "$batch" --gradient_accumulation_steps "$accumulation" --learning_rate "$rate")
  # A 7B model's activations are megabytes a token: 16 long records do not fit without recomputing
  # them. An activated adapter keeps next to none.
  [[ " $* " =~ [=\ ]activated\  ]] || update+=(--gradient_checkpointing)
else
  [[ $gpus -ge 1 ]] ||
    fail "a 7B model needs at least one GPU and none is here; 'bash train_fast_4gpu.sh demo' runs on a CPU"
  processes=$((gpus < 4 ? gpus : 4))
  update=(--batch_size auto --learning_rate 3e-4)
fi
# Records differ in length: memory in pieces that can grow is not lost between them
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# Seconds in which a run that is told to stop may save its step; torchrun's own are 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

# accelerate's MULTI_GPU refuses a single process, which needs no launcher
launch=(-m accelerate.commands.launch --config_file train_config_4gpu.yaml
  --num_processes "$processes" --main_process_port 0) # 0: any free port, so that runs do not collide
[[ $processes -eq 1 ]] && launch=()
command=("$python" "${launch[@]}" train_confidence_lora.py
  "${settings[@]}" "${update[@]}" "$@")
if [[ -n ${DRY_RUN:-} ]]; then
  before=""
  for word in "${command[@]}"; do # secrets are not shown
    if [[ $before == --*token ]]; then
      printf '*** '
    elif [[ $word == --*token=* ]]; then
      printf '%q=*** ' "${word%%=*}"
    else
      printf '%q ' "$word"
    fi
    before=$word
  done
  echo
  exit 0
fi
exec "${command[@]}"
