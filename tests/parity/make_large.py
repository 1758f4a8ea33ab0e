"""Checkpoints of real size with random weights, and our speed beside that of sentence-transformers, in turns in one run.

Usage: python make_large.py FOLDER EMBED_FOLDER_PROGRAM [NAME...]. EMBED_FOLDER_PROGRAM is the built example `embed_folder` of the
engine (`cargo build --release --workspace --example embed_folder`). Prints a row for docs/models.md for each model: largest
difference, resident memory of ours above the weights' size, and texts per second of both for 32 texts of about 128 tokens.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from make_tiny import byte_level, modules, unigram, word_piece, write_json
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

SECONDS = 10
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)


def bert_large():
    tokenizer, _ = word_piece()
    config = BertConfig(vocab_size=30522, max_position_embeddings=512, **LARGE)
    return tokenizer, BertModel(config, add_pooling_layer=False), ["cls_token"], 512


def xlm_roberta_large():
    tokenizer, _ = unigram()
    config = XLMRobertaConfig(
        vocab_size=250002, max_position_embeddings=8194, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5, **LARGE
    )
    return tokenizer, XLMRobertaModel(config, add_pooling_layer=False), ["cls_token"], 8192


def mpnet_base():
    tokenizer, _ = unigram()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = MPNetConfig(vocab_size=30527, max_position_embeddings=514, layer_norm_eps=1e-5, **BASE)
    return tokenizer, MPNetModel(config, add_pooling_layer=False), ["mean_tokens"], 512


def modernbert_base():
    tokenizer, _ = byte_level("[SEP]", "[CLS]")
    return tokenizer, ModernBertModel(ModernBertConfig(pad_token_id=0)), ["mean_tokens"], 8192


MODELS = (bert_large, xlm_roberta_large, mpnet_base, modernbert_base)


def texts(tokenizer):
    """32 texts of about 128 tokens."""
    text = "the cat sat on the mat and hello world in text: "
    per_copy = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [text * (126 // per_copy) + "cat" * (index % 2) for index in range(32)]


def peer(folder, batch):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    vectors = model.encode(batch, batch_size=len(batch), convert_to_numpy=True)
    started, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - started < SECONDS:
        model.encode(batch, batch_size=len(batch))
        rounds += 1
    return vectors, rounds * len(batch) / (time.perf_counter() - started)


def main():
    out, program, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    for make in MODELS:
        if names and make.__name__ not in names:
            continue
        folder = out / make.__name__
        torch.manual_seed(1)
        tokenizer, model, pooling, limit = make()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        modules(folder, pooling, model.config.hidden_size, True, limit)
        batch = texts(tokenizer)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        del model
        write_json(folder / "batch.json", batch)
        command = ["/usr/bin/time", "-v", program, str(folder), str(folder / "batch.json"), str(folder / "ours.f32")]
        run = subprocess.run([*command, "--time", str(SECONDS)], capture_output=True, text=True, check=True)
        ours = float(re.search(r"([0-9.]+) texts/s", run.stdout)[1])
        resident = re.search(r"Maximum resident set size .*: ([0-9]+)", run.stderr)
        vectors, theirs = peer(folder, batch)
        found = np.fromfile(folder / "ours.f32", dtype="<f4").reshape(vectors.shape)
        row = {
            "model": make.__name__,
            "parameters": parameters,
            "max_abs_difference": float(np.abs(found - vectors).max()),
            "peak_resident_mib": int(resident[1]) // 1024 if resident else None,
            "weights_mib": 4 * parameters >> 20,
            "ours_texts_per_s": round(ours, 2),
            "sentence_transformers_texts_per_s": round(theirs, 2),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
