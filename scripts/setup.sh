#!/usr/bin/env bash
# Makes .venv with the package (and with "dev" the tools) in it, at the releases that scripts/constraints.txt pins.
# PYTHON names another interpreter (3.11 or later), VENV another folder, CONSTRAINTS another file of releases.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
constraints="${CONSTRAINTS:-scripts/constraints.txt}"
log="$(mktemp)"
heart=
trap '[ -z "$heart" ] || kill "$heart" 2> /dev/null; rm -f "$log"' EXIT

if [ -e "$venv/ready" ]; then
    echo "set-up: checking $venv"
else
    echo "set-up: installing about 60 packages into $venv. To download: 0.2 GB for torch where pip has its build for CPUs,"
    echo "about 3 GB where it has the one for GPUs (PyPI, for Linux), and 0.2 GB for the others. On disk: 1.3 GB, or 7."
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"

# a sign of life every five seconds: pip unpacks for a minute without a word
pip_says() { grep -Eo '(Collecting|Downloading|Installing collected) [^ ]+( \([0-9.]+ [kMG]B\))?' "$log" | tail -1; }
{ while sleep 5; do echo "set-up: $(du -sm "$venv" | cut -f1) MB in $venv; $(pip_says)"; done; } &
heart=$!
# torch by its release, whatever the constraints: it has a CPU build, where the newest one brings gigabytes for GPUs
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile --progress-bar off \
    --constraint "$constraints" torch==2.13.0 --editable ".${1:+[$1]}" > "$log" 2>&1; then
    cat "$log" >&2
    exit 1
fi
kill "$heart" 2> /dev/null || true
heart=
touch "$venv/ready"
echo "set-up: done. The command is $venv/bin/hf-moe-lmc; after \`. $venv/bin/activate\` it is hf-moe-lmc"
