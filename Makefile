# One command for each task in this repository; `make` lists them.
# PYTHON is the interpreter of an environment with the extra named in the line: pip install -c constraints.txt '.[test]'

PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help test lint format types goldens benchmarks notebooks

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: ## run the tests, except those marked large, stages, fuzz or compiled; parity with diffusers and transformers: pytest tests/parity (extra `parity`)
	$(PYTHON) -m pytest

lint: ## check style and formatting with ruff; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: ## fix what ruff can fix, and format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types: ## check the types of kandinsky5 and weights_convert with mypy
	$(PYTHON) -m mypy

goldens: ## recompute the references' results in tests/data: the same bytes (extra `parity`)
	$(PYTHON) tests/parity/make_goldens.py
	$(PYTHON) tests/parity/make_image_goldens.py
	PYTHONPATH=tests $(PYTHON) tests/parity/make_tokenizer_goldens.py
	PYTHONPATH=.:tests $(PYTHON) tests/parity/make_vision_goldens.py

benchmarks: ## compare with diffusers, into benchmarks/results; slow, needs the machine for itself (extra `parity`)
	$(PYTHON) benchmarks/compare.py
	$(PYTHON) benchmarks/growth.py
	$(PYTHON) benchmarks/convert.py
	$(PYTHON) benchmarks/magcache.py
	$(PYTHON) benchmarks/quantise.py

notebooks: ## run notebooks/*.py and write them with their outputs as .ipynb (extra `notebooks`)
	$(PYTHON) notebooks/build.py

# ---------------------------------------------------------------------------------------------- nano
# Every stage except the judge resumes after an interruption; RUNS is the folder of the runs.

RUNS ?= runs
PLACE = '$(subst ','\'',$(RUNS))'
FROM = --vae $(PLACE)/vae --text $(PLACE)/text
CLIPS = $(PLACE)/start/clips

.PHONY: nano vae text start dit nocfg distilled long sparse
nano vae text start dit nocfg distilled long sparse: export OMP_NUM_THREADS ?= 1

PROMPTS ?= 300
JUDGE = $(PYTHON) -m kandinsky5.nano.judge --prompts $(PROMPTS)
EXPORT = $(PYTHON) -m kandinsky5.nano.export $(FROM) --runs $(PLACE) --to $(PLACE)/checkpoints

nano: vae text start dit nocfg distilled long sparse ## train the nano family from scratch: all stages below, RUNS/checkpoints, the judge (extra `train`)
	$(EXPORT)
	mkdir -p $(PLACE)/judge
	set -e; for name in nano nano-nocfg nano-distilled16steps; do $(JUDGE) $(PLACE)/checkpoints/$$name -o $(PLACE)/judge/judge_$$name.json; done
	$(JUDGE) $(PLACE)/checkpoints/nano-10s --sets 'seen, English' -o $(PLACE)/judge/judge_nano-10s.json
	$(JUDGE) $(PLACE)/checkpoints/nano-10s --sets 'seen, English' --full-attention -o $(PLACE)/judge/judge_nano-10s-full-attention.json
	$(EXPORT) --judged $(PLACE)/judge

vae: ## train nano's VAE
	$(PYTHON) -m kandinsky5.nano.train_vae --folder $(PLACE)/vae

text: ## train nano's tokenizers and text encoders
	$(PYTHON) -m kandinsky5.nano.train_text --folder $(PLACE)/text

start: vae text ## pretrain nano's DiT (needs vae and text)
	$(PYTHON) -m kandinsky5.nano.train_dit --folder $(PLACE)/start $(FROM)

dit: start ## finish nano (needs start): times nearer the data, which removes halos
	$(PYTHON) -m kandinsky5.nano.train_dit --folder $(PLACE)/dit --start-from $(PLACE)/start --clips $(CLIPS) --seed 1 $(FROM)

nocfg: dit ## distil nano's guidance into one pass
	$(PYTHON) -m kandinsky5.nano.distill nocfg --folder $(PLACE)/nocfg --teacher $(PLACE)/dit --clips $(CLIPS) $(FROM)

distilled: nocfg ## distil that into 16 steps
	$(PYTHON) -m kandinsky5.nano.distill distilled --folder $(PLACE)/distilled --teacher $(PLACE)/nocfg --clips $(CLIPS) $(FROM)

long: dit ## fine-tune nano on clips of twice the length and size, with NABLA
	$(PYTHON) -m kandinsky5.nano.distill long --folder $(PLACE)/long --teacher $(PLACE)/dit --clips $(PLACE)/long/clips $(FROM)

sparse: long ## distil its full attention into NABLA: nano-10s
	$(PYTHON) -m kandinsky5.nano.distill sparse --folder $(PLACE)/sparse --teacher $(PLACE)/long --clips $(PLACE)/long/clips $(FROM)
