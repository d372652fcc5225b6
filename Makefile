# make repro: the whole pipeline (PROFILE=vision: for a vision-language model).  make test: the tests.  See README.md.
VENV    ?= .venv
PYTHON  ?= python3
PROFILE ?=
# Where torch comes from, e.g. https://download.pytorch.org/whl/cu126; empty: the CPU build where there is no GPU.
TORCH_INDEX ?=
# What not everybody needs, of pyproject.toml's optional dependencies: ray, trackers, harness
EXTRAS  ?=

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

# Exported models onto the Ollama server at OLLAMA_HOST, each checked prompt by prompt in both modes.
serve: setup
	$(RUN) python -m export.ollama create
	$(RUN) python -m export.ollama verify --backend ollama --mode both

# One process a core, one thread each. test: after a change. test-all: also the fault catalogue, kills, simulations, recipes,
# a browser and PostgreSQL.
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

# Those of GRIT-VLM need what `make repro PROFILE=vision` leaves; without it they are skipped.
NEED_VISION := vlm_claims vlm_tuning
# Hours of training, and the data and base that `make repro` leaves; run by name: `python -m benchmarks.frontier`.
NEED_HOURS := frontier rank distribute

bench: foreign
	@for script in benchmarks/[a-z]*.py; do \
		name=$$(basename $$script .py); \
		case " $(NEED_HOURS) " in *" $$name "*) echo "$$name: skipped, it takes hours"; continue;; esac; \
		if [ $$name = gpu ] && ! $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then echo "gpu: skipped, there is none"; continue; fi; \
		case " $(NEED_VISION) " in *" $$name "*) \
			if ! grep -qs '"pictures": true' models/base/base.json; then \
				echo "$$name: skipped, it needs what \`make repro PROFILE=vision\` makes"; continue; fi;; \
		esac; \
		$(RUN) python -m benchmarks.$$name || exit 1; \
	done

# Every fault of the catalogue must be named, no clean run blamed, others' optimizers told; about 5 minutes.
probe-faults: foreign
	$(RUN) python -m benchmarks.probe_faults

# Packages with optimizers that the probe is tried on and GRIT compared with; without them those tests are skipped.
foreign: setup
	@$(BIN)/python -c "import optimi, prodigyopt, pytorch_optimizer, schedulefree" 2>/dev/null || $(BIN)/python -m pip install -qq --no-build-isolation --editable ".[foreign]"

# What the stages made. DVC's cache and the environment stay, and so do the results of all runs: runs/ and databases.
clean:
	rm -rf data models texts tuned adapters verdicts gguf verified quantized measured scores checkpoints logs
	if [ -d outputs ]; then find outputs -mindepth 1 -maxdepth 1 ! -name "*.db" ! -name "*.db-*" ! -name "*.sqlite*" -exec rm -rf {} +; fi

lock: setup
	$(BIN)/python -m pip freeze --exclude-editable --exclude torch --exclude uv --exclude unsloth --exclude unsloth_zoo \
		--exclude pytorch-optimizer --exclude schedulefree --exclude torch-optimi > requirements.lock.partial
	@echo "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__.split("+")[0])')" >> requirements.lock.partial
	mv requirements.lock.partial requirements.lock
