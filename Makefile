# The one entrance for developers: `make check` is what CI runs.

.PHONY: check lint test format

check: lint test

lint:
	ruff format --check .
	ruff check .
	mypy --strict lightning_local

test:
	pytest

format:
	ruff format .
	ruff check --fix .
