"""Embeds texts with one engine, as a user would best use it, and says how long that took by its own clock.

Usage: peer_serve.py ENGINE PRECISION MODEL_FOLDER MADE_FOLDER THREADS
ENGINE: sentence-transformers, onnxruntime, openvino, fastembed. MADE_FOLDER: what peer_models.py made.
Says {"routes", "versions"} when it is ready, or {"unavailable": WHY}. Then for each line {"route", "single", "texts"}:
- single false: {"seconds", "dim", "vectors"}: all texts at once; the vectors' f32 bytes, little-endian, in hexadecimal
- single true: {"seconds": [..]}: one text after the other, each by itself
"""

import os
import sys

ENGINE, PRECISION, MODEL, MADE, THREADS = sys.argv[1:6]
# Read when the tokenizers' thread pool is made.
os.environ["RAYON_NUM_THREADS"] = THREADS

import importlib.metadata  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

# Tokens of a batch, padding counted, and texts of one: what was fastest for ONNX Runtime and OpenVINO on two cores.
BATCH_TOKENS = 2048
BATCH_TEXTS = 64
ST_BATCH = 32


class SentenceTransformers:
    packages = ["sentence-transformers", "transformers", "tokenizers", "torch"]
    routes = ["in_process"]

    def __init__(self):
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(int(THREADS))
        settings = {"torch_dtype": torch.bfloat16} if PRECISION == "bf16" else {}
        self.model = SentenceTransformer(MODEL, device="cpu", model_kwargs=settings)

    def embed(self, texts, _route):
        return self.model.encode(texts, batch_size=ST_BATCH, show_progress_bar=False)


class Tokens:
    """Tokenization for engines that take numbers: like lengths together, padded to the longest of the batch, and that to
    a multiple of some tokens."""

    def __init__(self, multiple):
        self.multiple = multiple
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(Path(MODEL) / "tokenizer.json"))
        self.tokenizer.no_padding()
        settings = json.loads((Path(MODEL) / "sentence_bert_config.json").read_text())
        self.tokenizer.enable_truncation(settings["max_seq_length"])

    def batches(self, texts):
        """Yields (numbers of the texts, inputs); what computes can begin with the first at once."""
        encoded = [text.ids for text in self.tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(texts)), key=lambda number: -len(encoded[number]))
        at = 0
        while at < len(order):
            longest = -(-len(encoded[order[at]]) // self.multiple) * self.multiple
            batch = order[at : at + max(1, min(BATCH_TEXTS, BATCH_TOKENS // longest))]
            ids = np.zeros((len(batch), longest), np.int64)
            mask = np.zeros_like(ids)
            for row, number in enumerate(batch):
                length = len(encoded[number])
                ids[row, :length] = encoded[number]
                mask[row, :length] = 1
            yield batch, {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            at += len(batch)


class OnnxRuntime:
    packages = ["onnxruntime", "tokenizers"]
    routes = ["in_process"]

    def __init__(self):
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = int(THREADS)
        settings.inter_op_num_threads = 1
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        path = str(Path(MADE) / f"{PRECISION}.onnx")
        self.session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self.tokens = Tokens(1)

    def embed(self, texts, _route):
        vectors = [None] * len(texts)
        for numbers, inputs in self.tokens.batches(texts):
            for number, vector in zip(numbers, self.session.run(None, inputs)[0]):
                vectors[number] = vector
        return np.stack(vectors)


class OpenVino:
    packages = ["openvino", "nncf", "tokenizers"]
    routes = ["throughput_hint", "latency_hint"]

    def __init__(self):
        import openvino

        core = openvino.Core()
        path = Path(MADE) / ("openvino_int8.xml" if PRECISION == "int8" else "plain.onnx")
        model = core.read_model(str(path))
        devices = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if PRECISION == "bf16" and "BF16" not in devices:
            raise RuntimeError("OpenVINO computes no bf16 on this processor")
        # The int8 model's other operations stay in f32, as with the other engines.
        hint = "bf16" if PRECISION == "bf16" else "f32"
        self.compiled = {}
        for route in self.routes:
            settings = {
                "INFERENCE_PRECISION_HINT": hint,
                "INFERENCE_NUM_THREADS": int(THREADS),
                "PERFORMANCE_HINT": "THROUGHPUT" if route == "throughput_hint" else "LATENCY",
            }
            self.compiled[route] = core.compile_model(model, "CPU", settings)
        self.queue = openvino.AsyncInferQueue(self.compiled["throughput_hint"])
        self.queue.set_callback(self.keep)
        self.requests = {route: compiled.create_infer_request() for route, compiled in self.compiled.items()}
        # It compiles for each shape that it sees first: fewer shapes gained it a third on mixed lengths.
        self.tokens = Tokens(16)
        self.vectors = []

    def keep(self, request, numbers):
        output = request.get_output_tensor().data
        for row, number in enumerate(numbers):
            self.vectors[number] = output[row].copy()

    def embed(self, texts, route):
        self.vectors = [None] * len(texts)
        for numbers, inputs in self.tokens.batches(texts):
            if route == "throughput_hint" and len(texts) > 1:
                self.queue.start_async(inputs, numbers)
            else:
                self.requests[route].infer(inputs, share_inputs=True)
                self.keep(self.requests[route], numbers)
        self.queue.wait_all()
        return np.stack(self.vectors)


class Fastembed:
    packages = ["fastembed", "onnxruntime", "tokenizers"]
    routes = ["in_process"]

    def __init__(self):
        import shutil

        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        folder = Path(MADE) / "fastembed"
        if not (folder / "model.onnx").exists():
            folder.mkdir(exist_ok=True)
            for name in ("tokenizer.json", "config.json", "special_tokens_map.json"):
                shutil.copy(Path(MODEL) / name, folder / name)
            # It cuts texts where the tokenizer's settings say; sentence-transformers has a bound of its own.
            settings = json.loads((Path(MODEL) / "tokenizer_config.json").read_text())
            bound = json.loads((Path(MODEL) / "sentence_bert_config.json").read_text())["max_seq_length"]
            settings["model_max_length"] = bound
            settings.pop("max_length", None)
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            shutil.copy(Path(MADE) / "f32.onnx", folder / "model.onnx")
        TextEmbedding.add_custom_model(
            model="local/embedder",
            # The graph pools and normalises.
            pooling=PoolingType.DISABLED,
            normalization=False,
            sources=ModelSource(hf="local/embedder"),
            dim=json.loads((folder / "config.json").read_text())["hidden_size"],
            model_file="model.onnx",
        )
        self.model = TextEmbedding("local/embedder", specific_model_path=str(folder), threads=int(THREADS))

    def embed(self, texts, _route):
        return np.stack(list(self.model.embed(texts, batch_size=ST_BATCH)))


ENGINES = {
    "sentence-transformers": SentenceTransformers,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "fastembed": Fastembed,
}


def serve(engine, said):
    for line in sys.stdin:
        order = json.loads(line)
        texts, route = order["texts"], order["route"]
        if order["single"]:
            seconds = []
            for text in texts:
                start = time.perf_counter()
                engine.embed([text], route)
                seconds.append(time.perf_counter() - start)
            answer = {"seconds": seconds}
        else:
            start = time.perf_counter()
            vectors = engine.embed(texts, route)
            seconds = time.perf_counter() - start
            flat = np.ascontiguousarray(vectors, dtype="<f4")
            answer = {"seconds": seconds, "dim": flat.shape[1], "vectors": flat.tobytes().hex()}
        print(json.dumps(answer), file=said, flush=True)


def main():
    # Libraries print while they work; what this script says must stay readable.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        engine = ENGINES[ENGINE]()
        engine.embed(["ready when this text has a vector"], engine.routes[0])
    except Exception as error:
        print(json.dumps({"unavailable": f"{type(error).__name__}: {error}"[:500]}), file=said, flush=True)
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in engine.packages)
    print(json.dumps({"routes": engine.routes, "versions": versions}), file=said, flush=True)
    serve(engine, said)


main()
