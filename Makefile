# make help lists the targets
PYTHON ?= python3.11
VENV := .venv
CONFIG ?= configs/runs/confidence_qwen7b.yaml
LAUNCH := $(VENV)/bin/python plan_training.py launch $(CONFIG)
# DEEPSPEED_CONFIG=own.json: DeepSpeed's own file; without it ZeRO-2
DEEPSPEED := $(if $(DEEPSPEED_CONFIG),--deepspeed_config $(DEEPSPEED_CONFIG),--strategy zero2)
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu demo report demo-data test test-eval test-chaos benchmark benchmark-gpu lint clean \
	setup-accelerate gpu-info memory-check plan train train-distributed train-distributed-tb \
	train-deepspeed train-deepspeed-tb

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

# The environment is made anew when the pinned versions change.
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

setup: $(VENV)/.installed  ## the Python packages, in .venv

# Its operators are compiled when first used; before, it needs nothing but what is installed.
$(VENV)/.deepspeed: requirements-deepspeed.txt $(VENV)/.installed
	DS_BUILD_OPS=0 $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation \
		-r requirements-deepspeed.txt
	touch $@

setup-gpu: $(VENV)/.deepspeed  ## those that need a GPU as well: unsloth, deepspeed, liger-kernel
	$(VENV)/bin/pip install --quiet -r requirements-gpu.txt

demo: setup  ## teach the built-in tiny model when it is wrong, with both adapters (CPU, 3 minutes)
	HF_HUB_OFFLINE=1 bash train_fast_4gpu.sh demo --output_dir checkpoints/demo_lora --overwrite_output_dir
	HF_HUB_OFFLINE=1 bash train_fast_4gpu.sh demo --adapter activated --output_dir checkpoints/demo_activated --overwrite_output_dir

# The demo's test questions, its adapter and a bigger model's answers
REPORT := checkpoints/demo_lora
report: setup  ## what the demo's adapter is worth: evaluate, threshold, route, export (CPU, 1 to 2 minutes)
	@test -d $(REPORT)/final || $(MAKE) demo
	$(RUN) report_confidence.py evaluate --adapter $(REPORT)/final --max_new_tokens 16 \
		--data demo=demo/test_questions.jsonl --max_seq_length 256
	$(RUN) report_confidence.py threshold $(REPORT)/report --target_precision 0.95
	$(RUN) report_confidence.py route $(REPORT)/report --bigger_cost 10 \
		--bigger tagged/demo/bigger_all_tagged.jsonl
	$(RUN) report_confidence.py export $(REPORT)/final --merged checkpoints/demo_merged \
		--max_new_tokens 16

demo-data: setup  ## make the demo's models, questions and tagged answers again (CPU, 20 minutes)
	$(RUN) demo/make_demo.py
	$(RUN) demo/make_demo.py --bigger
	rm -rf tagged/demo
	$(RUN) tag_answers.py --model_name demo/model --questions demo/questions.jsonl \
		--output tagged/demo/demo_all_tagged.jsonl --val_fraction 0.2 --max_new_tokens 16
	$(RUN) tag_answers.py --model_name demo/bigger --questions demo/test_questions.jsonl \
		--output tagged/demo/bigger_all_tagged.jsonl --val_fraction 0 --max_new_tokens 16

test: $(VENV)/.deepspeed  ## all tests but the long ones (CPU, 12 to 18 minutes)
	$(RUN) -m pytest -q -n 2

test-eval: setup  ## those of evaluation, callbacks, configuration and failures, with coverage
	$(RUN) -m pytest -q -n 2 --cov=train_confidence_lora --cov=train_language_model \
		--cov=plan_training tests/test_metrics.py tests/test_scoring.py tests/test_validation.py \
		tests/test_language_model.py tests/test_settings.py tests/test_records.py tests/test_plan.py

test-chaos: $(VENV)/.deepspeed  ## the long ones: kills, full disks, lost ranks, fuzzing (half an hour)
	$(RUN) -m pytest -q -m chaos --timeout 3600

benchmark: setup  ## speed beside other ways to train and validate (two CPU cores, 9 minutes)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-benchmark.txt
	$(RUN) benchmarks/preparation_speed.py
	$(RUN) benchmarks/train_speed.py --rounds 2
	$(RUN) benchmarks/train_speed.py --rounds 1 --steps 8 --same_order --contenders recipe lora
	$(RUN) benchmarks/train_speed.py --rounds 1 --steps 3 --model wide_vocabulary --no_checkpointing \
		--batch_size 4 --accumulation 1 --contenders recipe lora
	$(RUN) benchmarks/validation_speed.py
	$(RUN) benchmarks/validation_speed.py --adapter activated

benchmark-gpu: setup  ## the same at 7B, on a GPU: random weights, nothing is downloaded
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-benchmark.txt
	$(RUN) benchmarks/train_speed.py --model qwen2.5-7b --batch_size 8 --json benchmark-gpu.jsonl
	$(RUN) benchmarks/validation_speed.py --model qwen2.5-7b --records 400 --json benchmark-gpu.jsonl
	$(RUN) benchmarks/validation_speed.py --model qwen2.5-7b --records 400 --adapter activated \
		--json benchmark-gpu.jsonl
	$(RUN) benchmarks/preparation_speed.py benchmark-gpu.jsonl

lint: setup  ## ruff and shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck train_fast_4gpu.sh cluster/slurm.sbatch .ci/run

clean:  ## delete the environment and the demo's runs
	rm -rf $(VENV) checkpoints/demo_lora checkpoints/demo_activated

setup-accelerate: setup  ## a default configuration for your own `accelerate launch`
	$(VENV)/bin/accelerate config default

gpu-info: setup  ## number, name and memory of the GPUs; cores, memory and disk
	@$(RUN) plan_training.py hardware

memory-check: setup  ## memory in use and free of each GPU
	@$(RUN) plan_training.py hardware --use

plan: setup  ## what CONFIG=… needs, what fits, how many steps, which command
	@$(VENV)/bin/python plan_training.py plan $(CONFIG)

train: setup  ## train as CONFIG=configs/runs/… says, in one process
	$(LAUNCH) --num_processes 1

train-distributed: setup  ## the same on all GPUs, by the fastest strategy that fits
	$(LAUNCH)

train-distributed-tb: setup  ## with TensorBoard beside it
	$(LAUNCH) --tensorboard

train-deepspeed: setup  ## with DeepSpeed (make setup-gpu), as DEEPSPEED_CONFIG=… says, or ZeRO-2
	$(LAUNCH) $(DEEPSPEED)

train-deepspeed-tb: setup  ## with TensorBoard beside it
	$(LAUNCH) $(DEEPSPEED) --tensorboard
