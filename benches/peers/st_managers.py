"""Builds many embedding managers in one process, each with a SentenceTransformer of its own, as a library does that shares
nothing.

Usage: st_managers.py MODEL_FOLDER COUNT
Says one JSON object: {"import_s", "each_s": [...], "total_s", "private_bytes", "first": [first numbers of a vector]}.
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
    managers, each = [], []
    begun = time.perf_counter()
    for _ in range(int(sys.argv[2])):
        start = time.perf_counter()
        managers.append(SentenceTransformer(sys.argv[1], device="cpu"))
        each.append(time.perf_counter() - start)
    total = time.perf_counter() - begun
    first = managers[0].encode(["the same text"])[0][:4].tolist()
    said = {
        "import_s": IMPORTED - START,
        "each_s": each,
        "total_s": total,
        "private_bytes": private_bytes(),
        "first": first,
    }
    print(json.dumps(said), flush=True)
    sys.stdin.read()
    del managers


main()
