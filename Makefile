# The one entrance for developers: `make check` is what CI runs.

.PHONY: check check-oldest check-wheel lint test docs format

check: lint test docs

# On the oldest versions that setup.cfg claims; PYTHON=... names another python3.10.
check-oldest:
	bash .ci/oldest

# Wheel and sdist, and the digits example from the sdist trained by the wheel in an empty directory.
check-wheel:
	bash .ci/wheel

lint:
	ruff format --check .
	ruff check .
	mypy --strict lightning_local

test:
	pytest

# The site, in build/site.
docs:
	python -m sphinx -q -E -W --keep-going -c docs . build/site

format:
	ruff format .
	ruff check --fix .
