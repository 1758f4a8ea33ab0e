"""Loads a model with sentence-transformers, says how long that took, and stays until standard input ends.

Usage: st_load.py MODEL_FOLDER [TEXT]
With a text it is embedded once before anything is said.
Says one JSON object: {"import_s", "load_s", "private_bytes"}.
"""

import json
import sys
import time

START = time.perf_counter()
from sentence_transformers import SentenceTransformer  # noqa: E402

IMPORTED = time.perf_counter()


def private_bytes():
    """Resident bytes that no other process uses, as the kernel counts them."""
    total = 0
    with open("/proc/self/smaps_rollup", encoding="ascii") as rollup:
        for line in rollup:
            name, _, value = line.partition(":")
            if name in ("Private_Clean", "Private_Dirty", "Private_Hugetlb"):
                total += int(value.split()[0]) * 1024
    return total


def main():
    model = SentenceTransformer(sys.argv[1], device="cpu")
    loaded = time.perf_counter()
    if len(sys.argv) > 2:
        model.encode([sys.argv[2]])
    said = {"import_s": IMPORTED - START, "load_s": loaded - IMPORTED, "private_bytes": private_bytes()}
    print(json.dumps(said), flush=True)
    sys.stdin.read()
    del model


main()
