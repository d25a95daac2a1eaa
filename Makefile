# `make book` and `make test` do everything on a fresh machine: environment, packages, work.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Threads of the numerical libraries; more than one helps nobody on matrices as small as these.
export OMP_NUM_THREADS ?= 1

.PHONY: help book test browser clean

help:
	@echo "make book   build the pages strictly from clean into _build/html"
	@echo "make test   run every test, those in a browser included"
	@echo "make clean  remove what building and testing made, except the environment"

$(STAMP): requirements.txt lib/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# After a strict build from clean, _build/html/.complete dates it: the tests build only where it is missing or old.
book: $(STAMP)
	$(BIN)/jupyter-book clean --all .
	$(BIN)/jupyter-book build . --all -W -n --keep-going
	touch _build/html/.complete
	@echo "The pages are in $(CURDIR)/_build/html; open $(CURDIR)/_build/html/index.html"

# A Chromium for the tests of the built pages: one that is here, else Debian's where we may install it.
browser:
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then true; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium \
	  > /dev/null || echo "Chromium could not be installed; the tests in a browser will say so."; \
	else echo "No Chromium found and none can be installed here; the tests in a browser will be skipped."; fi

# Besides tests/, every chapter runs as a notebook with a live kernel, which the strict build does not do.
test: $(STAMP) browser
	$(BIN)/python -m pytest -c tests/pytest.ini --nbmake --nbmake-timeout=600 tests book/*.ipynb

clean:
	rm -rf _build .pytest_cache .hypothesis lib/build
