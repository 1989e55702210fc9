# make help lists the targets
PYTHON ?= python3.11
VENV := .venv
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu demo demo-data test lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The environment is made anew when the pinned versions change.
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

setup: $(VENV)/.installed  ## the Python packages, in .venv

setup-gpu: setup  ## those that need a GPU as well: unsloth, deepspeed, liger-kernel
	$(VENV)/bin/pip install --quiet -r requirements-gpu.txt

demo: setup  ## teach the built-in tiny model when it is wrong, with both adapters (CPU, 3 minutes)
	HF_HUB_OFFLINE=1 bash train_fast_4gpu.sh demo --output_dir checkpoints/demo_lora --overwrite_output_dir
	HF_HUB_OFFLINE=1 bash train_fast_4gpu.sh demo --adapter activated --output_dir checkpoints/demo_activated --overwrite_output_dir

demo-data: setup  ## make the demo's model, questions and tagged answers again (CPU, 10 minutes)
	$(RUN) demo/make_demo.py
	rm -rf tagged/demo
	$(RUN) tag_answers.py --model_name demo/model --questions demo/questions.jsonl \
		--output tagged/demo/demo_all_tagged.jsonl --val_fraction 0.2 --max_new_tokens 16

test: setup  ## all tests
	$(RUN) -m pytest -q -n 2

lint: setup  ## ruff and shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck train_fast_4gpu.sh .ci/run

clean:  ## delete the environment and the demo's runs
	rm -rf $(VENV) checkpoints/demo_lora checkpoints/demo_activated
