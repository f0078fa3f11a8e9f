# The nano family from nothing: `make nano`. Every stage goes on where it was cut off; RUNS is where they live.

RUNS ?= runs
PYTHON ?= python
export OMP_NUM_THREADS ?= 1

FROM = --vae $(RUNS)/vae --text $(RUNS)/text

.PHONY: nano vae text dit nocfg distilled long
nano: vae text dit nocfg distilled long
	$(PYTHON) -m kandinsky5.nano.export $(FROM) --runs $(RUNS) --to $(RUNS)/checkpoints

vae:
	$(PYTHON) -m kandinsky5.nano.train_vae --folder $(RUNS)/vae

text:
	$(PYTHON) -m kandinsky5.nano.train_text --folder $(RUNS)/text

dit: vae text
	$(PYTHON) -m kandinsky5.nano.train_dit --folder $(RUNS)/dit $(FROM)

nocfg: dit
	$(PYTHON) -m kandinsky5.nano.distill nocfg --folder $(RUNS)/nocfg --teacher $(RUNS)/dit $(FROM)

distilled: nocfg
	$(PYTHON) -m kandinsky5.nano.distill distilled --folder $(RUNS)/distilled --teacher $(RUNS)/nocfg $(FROM)

long: dit
	$(PYTHON) -m kandinsky5.nano.distill long --folder $(RUNS)/long --teacher $(RUNS)/dit $(FROM)
