# `make quickstart` sets up and runs the whole of TrackRec on this machine; `make test` sets up and passes the tests.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CONFIGS := $(wildcard pipelines/configs/*.yaml)

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | column -t -s "$$(printf '\t')"

# The stamp makes set-up a no-op until the lock file changes.
$(VENV)/.ready: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --requirement requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

.PHONY: setup
setup: $(VENV)/.ready ## Make .venv with the `trackrec` command; fetch the quick start's data and models
	$(BIN)/trackrec fetch ml-100k smollm2-135m-instruct all-minilm-l6-v2

.PHONY: quickstart
quickstart: setup ## Run the whole of TrackRec on this machine, in minutes
	$(BIN)/trackrec run --config pipelines/configs/quickstart.yaml

.PHONY: triton
triton: ## Make .venv-triton: the Triton server, and what its models run in on a CPU
	bash requirements/venv.sh triton

# The quick start's newest run that is whole; a run whose stages are all cached takes a minute.
.PHONY: release
release: setup triton ## Export the quick start's models as a Triton model repository (runs/release)
	$(BIN)/trackrec run --config pipelines/configs/quickstart.yaml
	run=$$(ls -td runs/quickstart-[0-9]*/ | head -1) && \
	  $(BIN)/trackrec run --pipeline release --config pipelines/configs/quickstart.yaml --from "$$run"

.PHONY: serve
serve: release ## Serve them on this machine (gRPC 8001, HTTP 8000, metrics 8002) until Ctrl-C
	$(BIN)/trackrec serve --repository runs/release --features runs/features

.PHONY: features
features: setup ## Write every active user's RecCoT and vector through the server of `make serve` (runs/features)
	$(BIN)/trackrec run --pipeline batch_features --config pipelines/configs/quickstart.yaml

.PHONY: test
test: setup triton ## Run the tests
	$(BIN)/python -m pytest

.PHONY: test-gpu
test-gpu: setup ## Run the tests that need a CUDA device (the environment must hold torch's CUDA build)
	$(BIN)/python -m pytest -m gpu

.PHONY: test-vllm
test-vllm: ## Run the vLLM engine's tests in an environment of its own
	bash requirements/venv.sh vllm
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm tests/llm/test_vllm_engine.py

.PHONY: images
images: $(VENV)/.ready ## Build the images (REGISTRY=...; BASE_IMAGE=... for another base; IMAGES="data rank" for some)
	$(BIN)/python images/make.py build $(IMAGES) --registry "$(REGISTRY)" --base-image "$(BASE_IMAGE)" --source "$(SOURCE)"

.PHONY: push
push: $(VENV)/.ready ## Push the images under the tags of all their stages (REGISTRY=...)
	$(BIN)/python images/make.py push $(IMAGES) --registry "$(REGISTRY)"

.PHONY: sbom
sbom: $(VENV)/.ready ## Write a CycloneDX SBOM for each image (build/sbom/)
	$(BIN)/python images/make.py sbom $(IMAGES)

.PHONY: test-images
test-images: setup ## Build the images for a CPU on a base made here, and run the compiled quick start in them (IMAGES="data rank" for some)
	bash images/test.sh $(IMAGES)

.PHONY: validate-manifests
validate-manifests: $(VENV)/.ready ## Make the manifests with kustomize; check them against Kubernetes' schemas and "restricted"
	bash manifests/validate.sh

.PHONY: lint
lint: $(VENV)/.ready ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m components.build --check

.PHONY: compile
compile: $(VENV)/.ready ## Write every component's spec and page, and every config's pipeline IR (build/)
	$(BIN)/python -m components.build
	for config in $(CONFIGS); do $(BIN)/trackrec compile --config $$config \
	  $$(grep -q deepspeed $$config && echo --profile gke-a100) || exit 1; done

.PHONY: bench
bench: setup triton ## Run the benchmarks of the README's table (ML_1M=path to ml-1m.zip adds those on MovieLens-1M)
	$(BIN)/python benchmarks/sdpo.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python -m benchmarks.ctr
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/features.py overhead
	$(BIN)/python benchmarks/features.py memory
	$(BIN)/python benchmarks/features.py engine
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python benchmarks/abtest.py memory
	if [ -n "$(ML_1M)" ]; then \
	  $(BIN)/python benchmarks/ingest.py ml-1m $(ML_1M) && $(BIN)/python benchmarks/table2.py --data $(ML_1M); fi

.PHONY: lock
lock: $(VENV)/.ready ## Resolve requirements/dev.txt anew from pyproject.toml
	$(BIN)/python -m pip install --quiet pip-tools
	DS_BUILD_OPS=0 $(BIN)/pip-compile --quiet --extra dev --strip-extras --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --no-header --no-annotate --allow-unsafe --output-file requirements/dev.txt pyproject.toml
	sed -i -e 's/^\(torch==[0-9.]*\)+cpu$$/\1/' -e '/^trackrec @/d' -e '/^#/d' requirements/dev.txt
