#!/usr/bin/env bash
# Renews scripts/constraints.txt: the newest releases that pyproject.toml admits, from a fresh environment.
# Afterwards run scripts/check.sh; scripts/check.sh --newest tells beforehand whether they pass.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
VENV="$folder/venv" CONSTRAINTS=/dev/null bash scripts/setup.sh dev
{
    echo "# The releases that scripts/setup.sh installs. Written by scripts/renew_constraints.sh; do not edit."
    "$folder/venv/bin/python" -m pip list --format freeze --exclude-editable --exclude pip --exclude setuptools |
        sed 's/+cpu$//'
} > scripts/constraints.txt
