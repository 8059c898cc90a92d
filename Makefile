# `make demo` shows FlexLLM at work, `make up` starts it; both need nothing but Python 3.11 or newer.

PYTEST_WORKERS ?= 2
RUN := .venv/bin/python
INSTALLED := .venv/.flexllm-installed

.PHONY: demo up test lint format settings-table docs-plans bench-peers bench-memory bench-quantised clean

demo: $(INSTALLED)
	.venv/bin/flexllm demo

up: $(INSTALLED)
	.venv/bin/flexllm up

test: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest -n $(PYTEST_WORKERS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) scripts/settings_table.py --check

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

settings-table: $(INSTALLED)
	$(RUN) scripts/settings_table.py

docs-plans: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(RUN) scripts/plans.py

bench-peers: $(INSTALLED)
	$(RUN) -m benchmarks.peers

bench-quantised: $(INSTALLED)
	$(RUN) -m benchmarks.quantised

bench-memory: $(INSTALLED)
	$(RUN) -m benchmarks.memory

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist

$(INSTALLED): pyproject.toml constraints.txt scripts/bootstrap.sh
	scripts/bootstrap.sh
