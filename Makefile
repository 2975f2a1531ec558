# The two commands of the README. Both make their own virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Threads that wait give their core away: on a shared machine spinning ones slow everything down.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test clean

demo: $(VENV)/.demo
	mkdir -p build
	$(BIN)/fp4export recipes/digits.yaml -o build/digits.plan
	$(BIN)/fp4export recipes/digits.yaml -o build/digits.onnx
	@ls -l build/digits.onnx build/digits.plan build/digits.report.html build/digits.metrics.json

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --durations 15

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit("fp4export needs Python >= 3.10, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.venv setup.cfg constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[rtx]'
	touch $@

$(VENV)/.test: $(VENV)/.venv setup.cfg constraints.txt
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[rtx,dev]'
	# On all cores; pip takes one. A few of the packages' own test files are no Python on purpose.
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
	touch $@ $(VENV)/.demo

clean:
	rm -rf build $(VENV)
