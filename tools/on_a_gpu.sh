#!/usr/bin/env bash
# What this project claims of devices, tried on the one that is here, in at most six minutes:
#
#     tools/on_a_gpu.sh [FOLDER [--only PART]...]
#
# Needs a Python with the project's backend for the device and its extra [bench] (docs/nvidia.md); `PYTHON` names
# another than python3, and `SECONDS_AT_MOST` another limit. Without a GPU it runs on the CPU. Into FOLDER
# (on-a-gpu) go report.json and report.md. Status 1: something that must hold does not.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(realpath -m "${1:-on-a-gpu}")
# The checkout's own code, and the tiny models of its tests.
export PYTHONPATH="$checkout:$checkout/server:$checkout/bench:$checkout/tools:$checkout/tests/support${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m on_a_gpu "$folder" --seconds "${SECONDS_AT_MOST:-360}" "${@:2}"
