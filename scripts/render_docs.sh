#!/usr/bin/env bash
# Renews all of README.md and docs/ that is generated and takes no long run. PYTHON names another interpreter than that of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
for page in families costs command_line api architecture readme; do
    "${PYTHON:-.venv/bin/python}" "scripts/render_$page.py"
done
