"""Compares two files of little-endian float vectors: python compare.py A.f32 B.f32 DIM. Prints the worst difference and cosine."""

import sys

import numpy as np

a, b = (np.fromfile(path, dtype="<f4").reshape(-1, int(sys.argv[3])).astype(np.float64) for path in sys.argv[1:3])
assert a.shape == b.shape, (a.shape, b.shape)
cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
print(f"{len(a)} vectors: max abs difference {np.abs(a - b).max():.3g}, min cosine {cosine.min():.9f}, worst row {np.abs(a - b).max(1).argmax()}")
