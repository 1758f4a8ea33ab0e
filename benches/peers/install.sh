#!/bin/sh
# Makes a Python environment with the peers of the benches in benches/peers/.venv (about 6 GB), and one for infinity in it,
# which takes torch from the first. PYTHON names another interpreter than python3.
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet -r requirements.txt
.venv/bin/python versions.py
.venv/bin/python -m venv .venv/infinity
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
# What the inner environment has comes first, so only what it lacks is taken from the outer one.
.venv/bin/python -c "$packages" >"$(.venv/infinity/bin/python -c "$packages")/zz_peers.pth"
.venv/infinity/bin/python -m pip install --quiet -r requirements-infinity.txt
