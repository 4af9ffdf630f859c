#!/usr/bin/env bash
# Makes .venv with the package (and with "dev" the tools) in it, at the releases that scripts/constraints.txt pins.
# PYTHON names another interpreter (3.11 or later), VENV another folder, CONSTRAINTS another file of releases.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
constraints="${CONSTRAINTS:-scripts/constraints.txt}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
# torch by its release, whatever the constraints: it has a CPU build, where the newest one brings gigabytes for GPUs
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint "$constraints" torch==2.13.0 --editable ".${1:+[$1]}"
