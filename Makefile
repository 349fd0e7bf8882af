# make demo | test | docs | clean: each sets up .venv first when it is missing or out of date.
# SPECPRED_PYTHON chooses the interpreter, SPECPRED_ARGS is handed to `specpred reproduce`.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/up-to-date

.PHONY: help demo test docs figures lock clean

help:
	@echo "make demo     the whole pipeline on mock galaxies, no network needed after installation (15 to 40 minutes on 2 cores)"
	@echo "make test     all checks (15 to 35 minutes on 2 cores)"
	@echo "make docs     the documentation site, from the last run, in docs/_build/html"
	@echo "make figures  copy the last demo run's figures and numbers into figures/ and data/records/, draw the diagrams"
	@echo "make lock     resolve requirements.lock anew from settings.ini"
	@echo "make clean    remove .venv, the site and data/smoke and data/demo; data/mock and data/paper stay"

$(STAMP): requirements.lock settings.ini setup.py
	@.ci/install $(VENV)

demo: $(STAMP)
	@$(BIN)/specpred reproduce --profile demo $(SPECPRED_ARGS)

test: $(STAMP)
	@$(BIN)/python tests/check.py

docs: $(STAMP)
	@$(BIN)/python docs/build.py

figures: $(STAMP)
	@cp data/demo/figures/*.png figures/
	@$(BIN)/python -c "from specpred import config as c, runner; runner.write_record(c.get_profile('demo'), c.get_paths('demo'))"
	@$(BIN)/python docs/diagrams.py && ls -sh figures

lock:
	@.ci/install --lock

clean:
	rm -rf $(VENV) docs/_build data/smoke data/demo .pytest_cache .hypothesis *.egg-info
