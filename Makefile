# make demo: text -> tokens -> model -> sample -> score, on two CPU cores, in a few minutes.
# make test: the whole test suite.
# make mup: the learning-rate sweep of README.md, about 20 minutes on two cores; writes assets/mup.*.
# make proofs: what is too slow for the suite. All set up .venv on their first run, nothing twice.

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test mup proofs

demo: .venv/run
	$(RUN) prepare.py configs/demo.py
	$(RUN) train.py configs/demo.py
	$(RUN) sample.py out/demo/ckpt_007 --prompt="def read(self, " --max_new_tokens=150
	$(RUN) evaluate.py out/demo/ckpt_007 --tasks=valid
	@echo
	@echo "The rows are in data/demo, the run in out/demo: eight checkpoints, metrics.jsonl, run.json."
	@echo "Three things to try next:"
	@echo "1. your own text, a file or a folder of .txt .md .py .jsonl:"
	@echo "     $(RUN) prepare.py configs/demo.py --dataset=mine --input=PATH"
	@echo "     $(RUN) train.py configs/demo.py --dataset=mine --run=mine"
	@echo "     $(RUN) sample.py out/mine/ckpt_007"
	@echo "2. the same prompt through the checkpoints of the run, from noise to Python:"
	@echo "     $(RUN) sample.py out/demo/ckpt_000 --prompt='def read(self, '"
	@echo "3. another learning rate, in a folder of its own:"
	@echo "     $(RUN) train.py configs/demo.py --lr=1e-3 --run=demo_lr1e-3"

test: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m pytest

mup: .venv/dev
	$(RUN) tests/mup.py

proofs: mup
	$(RUN) tests/bench.py sample
	$(RUN) tests/bench.py init
	$(RUN) tests/bench.py tokenize
	$(RUN) tests/bench.py long
	$(RUN) tests/soak_prepare.py --kills=30

# An empty file marks what is installed; it is older than a requirements file that has changed.
.venv/run: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
