# Everything works from a fresh clone with nothing set up. What it installs is in .venv and in ~/.cache/mcp-opa-sidecar.
# Variables: PYTHON (interpreter for .venv), OTLP (collector's address, for demo), JAEGER=1 (Jaeger, for demo), SECONDS
# (how long to fuzz), ARGS (more arguments for pytest, demo, fuzz, bench).

SHELL := /bin/sh
.DEFAULT_GOAL := help

PY    := .venv/bin/python
READY := .venv/.ready
export PYTHON
export STEPS := 3
test: export STEPS := 8
test-cluster: export STEPS := 7
test-kubelet: export STEPS := 6

# The path of the OPA to use, installed if need be, as MCP_SIDECAR_OPA_BIN of the commands that follow.
WITH_OPA = MCP_SIDECAR_OPA_BIN=$$(STEP="[3/$$STEPS]" .ci/install-opa) && export MCP_SIDECAR_OPA_BIN &&

.PHONY: help setup demo jaeger check lint types layers policy unit test test-cluster test-kubelet fuzz bench fmt clean moved

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## the virtual environment (.venv) and OPA, nothing else
	@$(WITH_OPA) echo "Ready: .venv/bin/mcp-sidecar, with OPA at $$MCP_SIDECAR_OPA_BIN"

demo: $(READY) ## sets everything up, then runs the main job on a real MCP server (JAEGER=1: traces in Jaeger; OTLP=URL: there)
	@$(WITH_OPA) $(if $(JAEGER),JAEGER_BIN=$$(.ci/install-jaeger) &&) \
		exec $(PY) -m tests.demo $(if $(JAEGER),--jaeger "$$JAEGER_BIN") $(if $(OTLP),--otlp '$(OTLP)') $(ARGS)

jaeger: ## Jaeger on loopback until Ctrl-C (http://127.0.0.1:16686, spans to http://localhost:4318)
	@JAEGER_BIN=$$(.ci/install-jaeger) && \
		echo "Jaeger: http://127.0.0.1:$${JAEGER_HTTP_PORT:-16686}, spans to :$${JAEGER_OTLP_HTTP_PORT:-4318}; Ctrl-C ends it" && \
		exec "$$JAEGER_BIN" --config .ci/jaeger.yaml

check: lint types layers policy unit ## format, lint, types, layers, policies and unit tests, in about a minute

lint: $(READY) ## … ruff
	@$(PY) -m ruff format --check --quiet . || { echo "Not formatted: make fmt" >&2; exit 1; }
	@$(PY) -m ruff check .

types: $(READY) ## … mypy --strict
	@$(PY) -m mypy

layers: $(READY) ## … import-linter
	@.venv/bin/lint-imports --no-logo

policy: $(READY) ## … opa fmt, check, test and coverage
	@$(WITH_OPA) .ci/check-policies "$$MCP_SIDECAR_OPA_BIN"

unit: $(READY) ## … the tests that do no I/O
	@$(PY) -m pytest tests/unit --quiet $(ARGS)

test: $(READY) ## sets everything up, then runs every test but those of test-cluster and test-kubelet, and says what ran
	@STEP="[4/$$STEPS]" .ci/install-node-parts >/dev/null || :
	@STEP="[5/$$STEPS]" .ci/install-jaeger >/dev/null || :
	@STEP="[6/$$STEPS]" .ci/install-prometheus >/dev/null || :
	@STEP="[7/$$STEPS]" .ci/install-collector >/dev/null || :
	@STEP="[8/$$STEPS]" .ci/install-nft >/dev/null || :
	@$(WITH_OPA) exec $(PY) -m pytest --ignore=tests/cluster --ignore=tests/kubelet $(ARGS)

test-cluster: $(READY) ## sets everything up, then runs the injector's tests on a real API server (built once: about 15 minutes)
	@STEP="[4/$$STEPS]" .ci/install-cluster >/dev/null || :
	@STEP="[5/$$STEPS]" .ci/install-helm >/dev/null || :
	@STEP="[6/$$STEPS]" .ci/install-jaeger >/dev/null || :
	@STEP="[7/$$STEPS]" .ci/install-nft >/dev/null || :
	@$(WITH_OPA) exec $(PY) -m pytest tests/cluster $(ARGS)

test-kubelet: $(READY) ## sets everything up, then runs injected pods on a real node: kubelet and containerd (as root, on Linux)
	@STEP="[4/$$STEPS]" .ci/install-cluster >/dev/null || :
	@STEP="[5/$$STEPS]" .ci/install-containerd >/dev/null || :
	@STEP="[6/$$STEPS]" .ci/install-nft >/dev/null || :
	@$(WITH_OPA) exec $(PY) -m pytest tests/kubelet $(ARGS)

SECONDS := 600
fuzz: $(READY) ## searches longer for bytes that break the readers (SECONDS=600); what it learned stays in ~/.cache/mcp-opa-sidecar
	@exec $(PY) -m tests.fuzz --seconds $(SECONDS) --corpus "$${MCP_SIDECAR_CACHE:-$$HOME/.cache/mcp-opa-sidecar}/fuzz" $(ARGS)

bench: $(READY) ## calls per second, latency, CPU and memory: direct, pass-through and full path
	@$(WITH_OPA) exec $(PY) -m tests.bench $(ARGS)

fmt: $(READY) ## formats Python and Rego
	@$(PY) -m ruff check --fix --quiet . || :
	@$(PY) -m ruff format --quiet .
	@$(WITH_OPA) "$$MCP_SIDECAR_OPA_BIN" fmt --write policies

clean: ## removes what make put into the clone (~/.cache/mcp-opa-sidecar stays)
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage dist
	@find sidecar tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml .ci/constraints.txt .ci/setup .ci/lib.sh
	@.ci/setup

# A .venv that was copied with its clone, or whose interpreter is gone, is made anew.
ifneq ($(shell [ -x $(PY) ] && cat $(READY) 2>/dev/null),$(CURDIR))
$(READY): moved
endif
