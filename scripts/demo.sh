#!/usr/bin/env bash
# Sets everything up, trains small models, measures their barriers, merges. Options go to `hf-moe-lmc demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
if [ $# -eq 0 ]; then set -- -o demo; fi
exec .venv/bin/hf-moe-lmc demo "$@"
