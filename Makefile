# The one entrance for developers: `make check` is what CI runs.

.PHONY: check check-oldest lint test format

check: lint test

# On the oldest versions that setup.cfg claims; PYTHON=... names another python3.10.
check-oldest:
	bash .ci/oldest

lint:
	ruff format --check .
	ruff check .
	mypy --strict lightning_local

test:
	pytest

format:
	ruff format .
	ruff check --fix .
