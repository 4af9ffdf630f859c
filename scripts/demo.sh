#!/usr/bin/env bash
# Sets everything up, trains small models, measures their barriers, merges. Options go to `hf-moe-lmc demo`; the output is demo/
# unless -o names another.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
place=(-o demo)
for option in "$@"; do
    case "$option" in -o* | --output*) place=() ;; esac
done
.venv/bin/hf-moe-lmc demo ${place[@]+"${place[@]}"} "$@"
echo "Your own models: \`. .venv/bin/activate\`, then hf-moe-lmc barrier A B --text FILE -o DIR"
