#!/bin/sh
# Makes a Python environment with the peers of the benches in benches/peers/.venv (about 6 GB).
# PYTHON names another interpreter than python3.
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet -r requirements.txt
.venv/bin/python versions.py
