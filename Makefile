# make repro: the whole pipeline (PROFILE=vision: for a vision-language model).  make test: the tests.  See README.md.
VENV    ?= .venv
PYTHON  ?= python3
PROFILE ?=
# Index to install torch from, e.g. https://download.pytorch.org/whl/cu126; empty: the CPU build if there is no GPU.
TORCH_INDEX ?=
# Optional dependencies of pyproject.toml: ray, trackers, harness, smollm2 (which PROFILE=smollm2 needs)
EXTRAS  ?= $(if $(findstring smollm2,$(PROFILE)),smollm2)

BIN  := $(VENV)/bin
DONE := $(VENV)/.installed
RUN  := PATH="$(abspath $(BIN)):$$PATH"

.PHONY: setup repro serve test test-all check format bench probe-faults foreign clean lock

setup: $(DONE)
	@$(if $(EXTRAS),$(BIN)/python -m pip install -qq --no-build-isolation --constraint requirements.lock --editable ".[$(EXTRAS)]")

$(DONE): pipelines/setup.sh requirements.lock requirements-unsloth.lock pyproject.toml
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" pipelines/setup.sh $(VENV)
	@touch $@

repro: setup
	$(if $(PROFILE),$(RUN) python -m pipelines.profile $(PROFILE))
	$(RUN) python -m pipelines.repro $(if $(WORKERS),--workers $(WORKERS))
	$(RUN) python -m evaluation.compare_all --db "$$($(BIN)/python -c 'import yaml; print(yaml.safe_load(open("params.yaml"))["compare"]["database"])')"
	@echo "report: outputs/report.html (and outputs/grit_evaluation.md)"

# Put the exported models onto the Ollama server at OLLAMA_HOST, and check each prompt by prompt in both modes.
serve: setup
	$(RUN) python -m export.ollama create
	$(RUN) python -m export.ollama verify --backend ollama --mode both

# One process per core, one thread each. test: after a change. test-all: also the fault catalogue, kills, simulations,
# recipes, a browser and PostgreSQL.
TESTS := python -m pytest -n $(or $(WORKERS),auto)

test: setup
	$(RUN) $(TESTS) -m "not full"

test-all: setup
	$(RUN) $(TESTS)

check: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy db grit grit_vlm probes trainers export evaluation pipelines benchmarks examples

format: setup
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

# Benchmarks of GRIT-VLM need the results of `make repro PROFILE=vision`; without them they are skipped.
NEED_VISION := vlm_claims vlm_tuning
# Hours of training, on the data and base of `make repro`; run them by name: `python -m benchmarks.frontier`.
NEED_HOURS := frontier rank distribute real

bench: foreign
	@for script in benchmarks/[a-z]*.py; do \
		name=$$(basename $$script .py); \
		case " $(NEED_HOURS) " in *" $$name "*) echo "$$name: skipped: takes hours"; continue;; esac; \
		if [ $$name = gpu ] && ! $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then echo "gpu: skipped: no GPU"; continue; fi; \
		case " $(NEED_VISION) " in *" $$name "*) \
			if ! grep -qs '"pictures": true' models/base/base.json; then \
				echo "$$name: skipped: needs \`make repro PROFILE=vision\`"; continue; fi;; \
		esac; \
		$(RUN) python -m benchmarks.$$name || exit 1; \
	done

# Every fault of the catalogue must be named, no clean run blamed, foreign optimizers recognized; about 5 minutes.
probe-faults: foreign
	$(RUN) python -m benchmarks.probe_faults

# Packages whose optimizers test the probe and are compared with GRIT; without them those tests are skipped.
foreign: setup
	@$(BIN)/python -c "import optimi, prodigyopt, pytorch_optimizer, schedulefree" 2>/dev/null || $(BIN)/python -m pip install -qq --no-build-isolation --editable ".[foreign]"

# Remove what the stages wrote. DVC's cache, the environment and the results of all runs (runs/, databases) stay.
clean:
	rm -rf data models texts tuned adapters verdicts gguf verified quantized measured scores checkpoints logs
	if [ -d outputs ]; then find outputs -mindepth 1 -maxdepth 1 ! -name "*.db" ! -name "*.db-*" ! -name "*.sqlite*" -exec rm -rf {} +; fi

lock: setup
	$(BIN)/python -m pip freeze --exclude-editable --exclude torch --exclude uv --exclude unsloth --exclude unsloth_zoo \
		--exclude pytorch-optimizer --exclude schedulefree --exclude torch-optimi > requirements.lock.partial
	@echo "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__.split("+")[0])')" >> requirements.lock.partial
	mv requirements.lock.partial requirements.lock
