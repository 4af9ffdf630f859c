#!/usr/bin/env bash
# Sets everything up and runs all checks: format, lint, types, who imports whom, tests. Options go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy &
.venv/bin/lint-imports
wait $!  # for the types
exec .venv/bin/pytest --numprocesses 2 --durations 10 "$@"
