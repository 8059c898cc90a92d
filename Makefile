# `make demo` shows FlexLLM at work, `make up` starts it; both need nothing but Python 3.11 or newer.

PYTEST_WORKERS ?= 2
RUN := .venv/bin/python
INSTALLED := .venv/.flexllm-installed

BENCHMARKS := scheduler latency peers overhead coserve serving memory quantised
MODEL := .flexllm/models/SmolLM2-135M-Instruct

.PHONY: demo up test lint format settings-table docs-plans bench bench-gpu $(BENCHMARKS:%=bench-%) clean

demo: $(INSTALLED)
	.venv/bin/flexllm demo

up: $(INSTALLED)
	.venv/bin/flexllm up

test: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest -n $(PYTEST_WORKERS) --dist worksteal

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

# the scheduler and co-serving beside their alternatives, in less than half an hour
bench: bench-scheduler bench-latency bench-peers bench-coserve bench-serving

# as a worker of `flexllm up` runs (services/stack.py)
$(BENCHMARKS:%=bench-%): bench-%: $(INSTALLED) $(MODEL)
	GOMP_SPINCOUNT=20000 ONEDNN_PRIMITIVE_CACHE_CAPACITY=8192 $(RUN) -m benchmarks.$*

# on a GPU, with what is installed there: nothing but torch, triton, numpy, safetensors and transformers is needed
bench-gpu:
	$(or $(PYTHON),$(if $(wildcard $(RUN)),$(RUN),python3)) -m benchmarks.gpu

$(MODEL): | $(INSTALLED)
	.venv/bin/flexllm models pull

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist

$(INSTALLED): pyproject.toml constraints.txt scripts/bootstrap.sh
	scripts/bootstrap.sh
