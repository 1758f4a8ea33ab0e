"""Makes what the other engines of the bench `peers` load, once, from a sentence-transformers folder.

Usage: peer_models.py MODEL_FOLDER CACHE_FOLDER CALIBRATION_FILE
CALIBRATION_FILE holds a JSON list of texts, for the quantisation that wants to see activations. Says one JSON object:
{"folder", "errors": {NAME: WHY}}; the folder then holds, as far as there is no error,
- f32.onnx: the encoder with mean pooling and normalisation, its graph fused for ONNX Runtime
- int8.onnx: the same, quantised dynamically, weights per channel
- plain.onnx: the graph as exported, for OpenVINO, which fuses by itself
- openvino_int8.xml: weights and activations in int8, by NNCF
No engine is run or measured here.
"""

import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
CALIBRATION_TEXTS = 300
# Changed when what is made changes in a way that versions do not show.
RECIPE = "1"
MAKERS = ["onnx", "onnxruntime", "openvino", "nncf", "torch", "transformers"]


def key(folder):
    """Names the cache folder: other weights, versions or recipes give another one."""
    digest = hashlib.sha256(RECIPE.encode())
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        digest.update((folder / name).read_bytes())
    for name in MAKERS:
        try:
            digest.update(f"{name} {importlib.metadata.version(name)}".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"no {name}".encode())
    return digest.hexdigest()[:16]


def export(folder, target):
    import torch
    from transformers import AutoModel

    class Embedder(torch.nn.Module):
        """Encoder, mean over the tokens, length 1: what sentence-transformers does for this model."""

        def __init__(self):
            super().__init__()
            # The eager attention is the form that ONNX Runtime's optimizer knows and fuses.
            self.encoder = AutoModel.from_pretrained(folder, attn_implementation="eager")

        def forward(self, input_ids, attention_mask, token_type_ids):
            hidden = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state
            kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)

    ids = torch.randint(5, 999, (2, 16))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    axes = {name: {0: "texts", 1: "tokens"} for name in INPUTS}
    torch.onnx.export(
        Embedder().eval(),
        (ids, mask, torch.zeros_like(ids)),
        str(target),
        input_names=INPUTS,
        output_names=["vectors"],
        dynamic_axes=axes | {"vectors": {0: "texts"}},
        opset_version=17,
        dynamo=False,
    )


def fuse(folder, plain, target):
    from onnxruntime.transformers.optimizer import optimize_model

    config = json.loads((folder / "config.json").read_text())
    model = optimize_model(
        str(plain),
        model_type="bert",
        num_heads=config["num_attention_heads"],
        hidden_size=config["hidden_size"],
        opt_level=0,
    )
    model.save_model_to_file(str(target))


def quantise(fused, target):
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # The fused operations are unknown to ONNX's shape inference, which then cannot say what they give.
    options = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(
        str(fused), str(target), weight_type=QuantType.QInt8, per_channel=True, extra_options=options
    )


def quantise_for_openvino(folder, plain, calibration, target):
    import nncf
    import numpy as np
    import openvino
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)

    def inputs(text):
        encoded = tokenizer.encode(text)
        rows = [encoded.ids, encoded.attention_mask, encoded.type_ids]
        return {name: np.array([row], np.int64) for name, row in zip(INPUTS, rows)}

    texts = json.loads(Path(calibration).read_text())[:CALIBRATION_TEXTS]
    model = nncf.quantize(
        openvino.convert_model(str(plain)),
        nncf.Dataset(texts, inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(texts),
    )
    openvino.save_model(model, str(target), compress_to_fp16=False)


def main():
    source, cache, calibration = (Path(argument) for argument in sys.argv[1:4])
    folder = cache / key(source)
    folder.mkdir(parents=True, exist_ok=True)
    # Libraries print while they work; what this script says must stay readable.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    plain, fused = folder / "plain.onnx", folder / "f32.onnx"
    steps = [
        (plain, lambda to: export(source, to)),
        (fused, lambda to: fuse(source, plain, to)),
        (folder / "int8.onnx", lambda to: quantise(fused, to)),
        (folder / "openvino_int8.xml", lambda to: quantise_for_openvino(source, plain, calibration, to)),
    ]
    errors = {}
    for target, make in steps:
        done = target.with_suffix(target.suffix + ".done")
        if done.exists():
            continue
        try:
            make(target)
            done.touch()
        except Exception as error:
            errors[target.name] = f"{type(error).__name__}: {error}"[:500]
    print(json.dumps({"folder": str(folder), "errors": errors}), file=said, flush=True)


main()
