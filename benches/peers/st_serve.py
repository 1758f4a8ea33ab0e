"""Embeds lists of texts with sentence-transformers, one JSON list a line, and says how long each took.

Usage: st_serve.py MODEL_FOLDER THREADS BATCH
Says "ready", then for each line one JSON object: {"seconds", "first"} with the vector of the first text.
"""

import json
import sys
import time

import torch
from sentence_transformers import SentenceTransformer


def main():
    folder, threads, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    model = SentenceTransformer(folder, device="cpu")
    print("ready", flush=True)
    for line in sys.stdin:
        texts = json.loads(line)
        start = time.perf_counter()
        vectors = model.encode(texts, batch_size=batch, show_progress_bar=False)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "first": [float(x) for x in vectors[0]]}), flush=True)


main()
