"""One client process with a copy of the model of its own: loads it with sentence-transformers, embeds a list of texts, and
stays until standard input ends.

Usage: st_client.py MODEL_FOLDER TEXTS_FILE BATCH
TEXTS_FILE holds a JSON list. Says one JSON object: {"ready_s", "embed_s", "first"} with the vector of the first text.
"""

import time

START = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402

from sentence_transformers import SentenceTransformer  # noqa: E402


def main():
    folder, file, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with open(file, encoding="utf-8") as texts:
        texts = json.load(texts)
    model = SentenceTransformer(folder, device="cpu")
    ready = time.perf_counter()
    vectors = model.encode(texts, batch_size=batch, show_progress_bar=False)
    said = {
        "ready_s": ready - START,
        "embed_s": time.perf_counter() - ready,
        "first": [float(x) for x in vectors[0]],
    }
    print(json.dumps(said), flush=True)
    sys.stdin.read()
    del model


main()
