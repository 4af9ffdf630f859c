#!/usr/bin/env bash
# Makes .venv with the package (and with "dev" the tools) in it. PYTHON names another interpreter, from 3.11 on.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".${1:+[$1]}"
