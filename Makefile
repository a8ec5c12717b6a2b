# make demo: text -> tokens -> model -> sample -> score, on two plain CPU cores in five minutes.
# make demo-analysis: the demo with strings planted in it, and what its checkpoints remember.
# make crystal-mini: CrystalCoder's three stages in small, on the same text, in about eight minutes.
# make test: the whole test suite.
# make mup: the learning-rate sweep of README.md, about 20 minutes on two cores; writes assets/mup.*.
# make proofs: what is too slow for the suite. All set up .venv on their first run, nothing twice.

PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo demo-analysis crystal-mini test mup proofs

demo: .venv/run
	@$(RUN) tests/demo_time.py
	$(RUN) prepare.py configs/demo.py
	$(RUN) train.py configs/demo.py
	$(RUN) sample.py out/demo/ckpt_007 --prompt="def read(self, " --max_new_tokens=150 --temperature=0.6
	$(RUN) evaluate.py out/demo/ckpt_007 --tasks=valid
	@echo
	@echo "The rows are in data/demo, the run in out/demo: eight checkpoints, metrics.jsonl, run.json."
	@echo "Three things to try next:"
	@echo "1. your own text, a file or a folder of .txt .md .py .jsonl:"
	@echo "     $(RUN) prepare.py configs/demo.py --dataset=mine --input=PATH"
	@echo "     $(RUN) train.py configs/demo.py --dataset=mine --run=mine"
	@echo "     $(RUN) sample.py out/mine/ckpt_007"
	@echo "2. the same prompt through the checkpoints of the run, from noise to Python:"
	@echo "     $(RUN) sample.py out/demo/ckpt_000 --prompt='def read(self, ' --temperature=0.6"
	@echo "3. another learning rate, in a folder of its own:"
	@echo "     $(RUN) train.py configs/demo.py --lr=1e-3 --run=demo_lr1e-3"

demo-analysis: .venv/plot
	$(RUN) prepare.py configs/demo_canaries.py
	$(RUN) train.py configs/demo_canaries.py
	$(RUN) analyze.py memorization out/demo_canaries --rows=100 --plot
	$(RUN) analyze.py trace out/demo_canaries --document=prose/threading.py:1
	$(RUN) analyze.py batch out/demo_canaries --step=220
	$(RUN) analyze.py replay out/demo_canaries --verify

# A stage is prepared with the tokenizer of the first and starts from the checkpoint before it.
crystal-mini: .venv/run
	$(RUN) prepare.py configs/crystal_mini_stage1.py
	$(RUN) train.py configs/crystal_mini_stage1.py
	$(RUN) prepare.py configs/crystal_mini_stage2.py
	$(RUN) train.py configs/crystal_mini_stage2.py
	$(RUN) prepare.py configs/crystal_mini_stage3.py
	$(RUN) train.py configs/crystal_mini_stage3.py
	$(RUN) evaluate.py out/crystal_mini_stage1/ckpt_001 --tasks=valid
	$(RUN) evaluate.py out/crystal_mini_stage2/ckpt_005 --tasks=valid
	$(RUN) evaluate.py out/crystal_mini_stage3/ckpt_001 --tasks=valid

# Three workers on two cores, as some tests only wait; what a file's tests share is made once.
test: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

mup: .venv/dev
	$(RUN) tests/mup.py

# The last three: every visit of the demo trained again, with a chunk that fails once and is put off.
proofs: mup demo demo-analysis
	$(RUN) tests/bench.py sample
	$(RUN) tests/bench.py score
	$(RUN) tests/bench.py search
	$(RUN) tests/bench.py init
	$(RUN) tests/bench.py tokenize
	$(RUN) tests/bench.py long
	$(RUN) tests/bench.py saving
	$(RUN) tests/bench.py memory
	$(RUN) tests/soak_prepare.py --kills=30
	$(RUN) tests/soak_kill.py --kills=100
	$(RUN) tests/soak_rank.py --kills=10
	$(RUN) tests/soak_score.py --kills=20
	$(RUN) tests/against.py 3e72e77
	$(RUN) tests/bench.py old 3e72e77
	$(RUN) tests/parity.py
	$(RUN) tests/harness.py
	$(RUN) tests/tamper.py out/demo_canaries
	$(RUN) analyze.py replay out/demo
	$(RUN) tests/fault.py --chunk=2 --once -- configs/demo.py --run=demo_late --on_nonfinite=defer
	$(RUN) analyze.py replay out/demo_late

# An empty file marks what is installed; it is older than a requirements file that has changed.
.venv/run: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/plot: requirements-dev.txt .venv/run
	$(RUN) -m pip install --quiet --disable-pip-version-check $(shell grep ^matplotlib requirements-dev.txt)
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
