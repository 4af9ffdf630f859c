#!/usr/bin/env bash
# Renews all of README.md and docs/ that is generated and takes no long run. PYTHON names another interpreter than that of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
for script in scripts/render_*.py; do
    [ "$script" = scripts/render_demo.py ] || "${PYTHON:-.venv/bin/python}" "$script" # the demo trains for minutes
done
