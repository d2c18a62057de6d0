# make train [ARGS="--recipe faster"], make extras, make test, make lint: each sets up .venv first, once.
PYTHON ?= python3

.PHONY: train extras test lint
train: .venv/ready
	.venv/bin/python train.py $(ARGS)

# What app.py, export.py and --tracker need.
extras: .venv/ready requirements-extras.txt
	.venv/bin/python -m pip install -r requirements-extras.txt -c constraints.txt

test: .venv/ready-dev
	.venv/bin/python -m pytest $(ARGS)

lint: .venv/ready-dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# The marker is written last and an unmarked .venv is thrown away, so an interrupted installation is done again.
# Where $(PYTHON) is that of an activated .venv, the Python behind it makes the new one.
.venv/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11.5; name a newer one: make PYTHON=python3.12" >&2; exit 2; }
	base="$$($(PYTHON) -c 'import sys; print(sys._base_executable)')" && rm -rf .venv && "$$base" -m venv .venv
	.venv/bin/python -m pip install -r requirements.txt -c constraints.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-extras.txt requirements-dev.txt
	.venv/bin/python -m pip install -r requirements-dev.txt -c constraints.txt
	touch $@
