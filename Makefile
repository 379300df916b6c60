.PHONY: bench demo slurm-demo test test-quick test-faults test-browser lint lock setup

PYTHON_RUN = .venv/bin/python
# Three processes for two cores: one of them waits for a server most of the time.
PARALLEL = -n 3 --dist loadscope --no-loadscope-reorder

setup:  ## create .venv with the locked versions
	@tools/setup

demo: setup  ## two iterations on speech made on the spot, through Prefect; prints a table, the report and the addresses
	.venv/bin/hubert demo

slurm-demo: setup  ## the demo through a real Slurm of virtual nodes on this machine (root; apt-get install slurm-wlm munge)
	@$(PYTHON_RUN) -m tools.slurm_demo

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: setup lint  ## what CI runs
	$(PYTHON_RUN) -m pytest -q $(PARALLEL) -m "not faults and not browser"

test-quick: setup  ## for every save: without servers, without trainings
	$(PYTHON_RUN) -m pytest -q $(PARALLEL) -m "not slow and not faults and not browser"

test-faults: setup  ## the long ones: kill -9 at many points, and compare with an undisturbed run
	$(PYTHON_RUN) -m pytest -q -m faults

test-browser: setup  ## the pages of Prefect and MLflow as people use them, in Chromium (Debian: apt-get install chromium)
	$(PYTHON_RUN) -m pytest -q -m browser

bench: setup  ## every stage beside the peers', who get an environment of their own (.bench-venv); prints and records a table
	$(PYTHON_RUN) -m benchmarks.run
	$(PYTHON_RUN) -m benchmarks.table
	$(PYTHON_RUN) -m benchmarks.scale

lock: setup  ## pin the newest versions that work together, with hashes and without index addresses
	@[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet uv
	.venv/bin/uv pip compile pyproject.toml --all-extras --generate-hashes --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links --python-version 3.12 \
		--python-platform x86_64-unknown-linux-gnu --upgrade --output-file requirements.lock
