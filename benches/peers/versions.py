"""Says which versions the peer consists of, in one line."""

import importlib.metadata
import platform

NAMES = ["sentence-transformers", "transformers", "tokenizers", "safetensors", "torch", "numpy"]

print(", ".join([f"python {platform.python_version()}"] + [f"{n} {importlib.metadata.version(n)}" for n in NAMES]))
