"""Multiplies big square matrices with every library that is there and says the best rate, for each order again.

Usage: gemm_peak.py THREADS
Says {"libraries": {PRECISION: [NAME, ..]}} when it is ready; then for each line {PRECISION: {"gops", "library"}}: multiplications and
additions together, in 10^9 a second, the best of a few repetitions.
"""

import json
import os
import sys
import time

import numpy as np

THREADS = int(sys.argv[1])
SIDE = 2048
REPETITIONS = 4


def of_numpy():
    left, right = (np.random.rand(SIDE, SIDE).astype(np.float32) for _ in range(2))
    out = np.empty_like(left)
    return {("f32", "numpy"): lambda: np.matmul(left, right, out=out)}


def of_torch():
    import torch

    torch.set_num_threads(THREADS)
    left, right = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    half = left.bfloat16(), right.bfloat16()
    bytes_ = left.mul(99).to(torch.int8), right.mul(99).to(torch.int8)
    return {
        ("f32", "torch"): lambda: torch.mm(left, right),
        ("bf16", "torch"): lambda: torch.mm(*half),
        ("int8", "torch"): lambda: torch._int_mm(*bytes_),
    }


def of_openvino():
    """Products with a constant matrix, which the library packs when it compiles: oneDNN's kernels."""
    import openvino
    from openvino import opset13 as op

    core = openvino.Core()
    weights = np.random.rand(SIDE, SIDE).astype(np.float32) - 0.5
    data = np.random.rand(SIDE, SIDE).astype(np.float32)

    def product(precision):
        given = op.parameter([SIDE, SIDE], np.float32)
        left, right = given, op.constant(weights)
        if precision == "int8":
            quantised = op.constant(np.round(weights * 254).astype(np.int8))
            scale = op.constant(np.full((1, SIDE), 1 / 254, np.float32))
            right = op.multiply(op.convert(quantised, np.float32), scale)
            low, high = op.constant(np.float32(0)), op.constant(np.float32(1))
            left = op.fake_quantize(left, low, high, low, high, 256)
        # Little of the result is kept, so that copying it out is not what is measured.
        result = op.reduce_max(op.matmul(left, right, False, False), op.constant([1]), False)
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": THREADS,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(openvino.Model([result], [given]), "CPU", settings)
        request = compiled.create_infer_request()
        return lambda: request.infer([data], share_inputs=True)

    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precisions = [p for p in ("f32", "bf16", "int8") if p == "f32" or p.upper() in able]
    return {(precision, "openvino"): product(precision) for precision in precisions}


def main():
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    products = {}
    for of in (of_numpy, of_torch, of_openvino):
        try:
            made = of()
        except Exception:
            continue
        for name, product in made.items():
            try:
                product()
                products[name] = product
            except Exception:
                continue
    libraries = {}
    for precision, library in products:
        libraries.setdefault(precision, []).append(library)
    print(json.dumps({"libraries": libraries}), file=said, flush=True)
    for _ in sys.stdin:
        best = {}
        for (precision, library), product in products.items():
            for _ in range(REPETITIONS):
                start = time.perf_counter()
                product()
                gops = 2 * SIDE**3 / (time.perf_counter() - start) / 1e9
                if gops > best.get(precision, {"gops": 0})["gops"]:
                    best[precision] = {"gops": gops, "library": library}
        print(json.dumps(best), file=said, flush=True)


main()
