#!/usr/bin/env bash
# Sets everything up and runs all checks: format, lint, types, import rules, tests. Options go to pytest.
# With --newest first, on the newest releases that pyproject.toml admits (in .venv-newest), with every test of every model type.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=.venv
if [ "${1:-}" = --newest ]; then
    shift
    export VENV=.venv-newest CONSTRAINTS=/dev/null HF_MOE_LMC_TEST_ALL=1
    rm -rf "$VENV"
fi
bash scripts/setup.sh dev
"$VENV/bin/ruff" format --check .
"$VENV/bin/ruff" check .
"$VENV/bin/mypy" &
"$VENV/bin/lint-imports"
wait $! # for the types
exec "$VENV/bin/pytest" --numprocesses 2 --durations 10 "$@"
