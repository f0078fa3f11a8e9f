# One command each for what one does with this repository; `make` lists them.
# PYTHON is the interpreter of an environment with the extra that the line names: pip install -c constraints.txt '.[test]'

PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help test lint format types goldens benchmarks notebooks

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: ## the tests, without those marked large or stages; those beside diffusers and transformers are pytest tests/parity (extra `parity`)
	$(PYTHON) -m pytest

lint: ## what ruff finds wrong, formatting included; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: ## correct what ruff can correct, and format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types: ## mypy over kandinsky5 and weights_convert
	$(PYTHON) -m mypy

goldens: ## the references' results in tests/data, computed again: the same bytes (extra `parity`)
	$(PYTHON) tests/parity/make_goldens.py
	PYTHONPATH=tests $(PYTHON) tests/parity/make_tokenizer_goldens.py

benchmarks: ## beside diffusers, into benchmarks/results; takes long, alone on the machine (extra `parity`)
	$(PYTHON) benchmarks/compare.py
	$(PYTHON) benchmarks/growth.py
	$(PYTHON) benchmarks/convert.py
	$(PYTHON) benchmarks/magcache.py

notebooks: ## execute notebooks/*.py and write them with their outputs as .ipynb (extra `notebooks`)
	$(PYTHON) notebooks/build.py

# ---------------------------------------------------------------------------------------------- nano
# Every stage but the judge goes on where it was cut off; RUNS is where they live.

RUNS ?= runs
FROM = --vae $(RUNS)/vae --text $(RUNS)/text
CLIPS = $(RUNS)/start/clips

.PHONY: nano vae text start dit nocfg distilled long sparse
nano vae text start dit nocfg distilled long sparse: export OMP_NUM_THREADS ?= 1

PROMPTS ?= 300
JUDGE = $(PYTHON) -m kandinsky5.nano.judge --prompts $(PROMPTS)
EXPORT = $(PYTHON) -m kandinsky5.nano.export $(FROM) --runs $(RUNS) --to $(RUNS)/checkpoints

nano: vae text start dit nocfg distilled long sparse ## the nano family from nothing: all stages below, RUNS/checkpoints, the judge (extra `train`)
	$(EXPORT)
	mkdir -p $(RUNS)/judge
	set -e; for name in nano nano-nocfg nano-distilled16steps; do $(JUDGE) $(RUNS)/checkpoints/$$name -o $(RUNS)/judge/judge_$$name.json; done
	$(JUDGE) $(RUNS)/checkpoints/nano-10s --sets 'seen, English' -o $(RUNS)/judge/judge_nano-10s.json
	$(JUDGE) $(RUNS)/checkpoints/nano-10s --sets 'seen, English' --full-attention -o $(RUNS)/judge/judge_nano-10s-full-attention.json
	$(EXPORT) --judged $(RUNS)/judge

vae: ## nano's VAE
	$(PYTHON) -m kandinsky5.nano.train_vae --folder $(RUNS)/vae

text: ## nano's tokenizers and text encoders
	$(PYTHON) -m kandinsky5.nano.train_text --folder $(RUNS)/text

start: vae text ## nano's DiT as far as it has halos, after these two
	$(PYTHON) -m kandinsky5.nano.train_dit --folder $(RUNS)/start $(FROM)

dit: start ## nano, from that: nearer the data, where halos go
	$(PYTHON) -m kandinsky5.nano.train_dit --folder $(RUNS)/dit --start-from $(RUNS)/start --clips $(CLIPS) --seed 1 $(FROM)

nocfg: dit ## nano without guidance, from nano
	$(PYTHON) -m kandinsky5.nano.distill nocfg --folder $(RUNS)/nocfg --teacher $(RUNS)/dit --clips $(CLIPS) $(FROM)

distilled: nocfg ## nano in 16 steps, from that
	$(PYTHON) -m kandinsky5.nano.distill distilled --folder $(RUNS)/distilled --teacher $(RUNS)/nocfg --clips $(CLIPS) $(FROM)

long: dit ## nano of twice the length and size with NABLA, from nano
	$(PYTHON) -m kandinsky5.nano.distill long --folder $(RUNS)/long --teacher $(RUNS)/dit --clips $(RUNS)/long/clips $(FROM)

sparse: long ## that once more, to answer through NABLA as with full attention: nano-10s
	$(PYTHON) -m kandinsky5.nano.distill sparse --folder $(RUNS)/sparse --teacher $(RUNS)/long --clips $(RUNS)/long/clips $(FROM)
