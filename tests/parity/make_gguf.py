"""Makes the small GGUF files below tiny_generators/ and what transformers generates with them, its own reader's weights.

Usage: python make_gguf.py, where torch, transformers and the package gguf are. One file is the stored Qwen3 with blocks Q8_0 and
Q4_0 and a byte-level tokenizer; the other a random Llama with blocks Q4_K and Q6_K and a SentencePiece tokenizer.
"""

import copy
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent / "tiny_generators"
PROMPTS = ["The quick brown fox jumps", "it's 2026: élèves 敏捷", "a  b\nlazy dog "]
torch.set_num_threads(1)


def answers(folder, **settings):
    """What transformers generates from the file, weights dequantised, where rounding can't change it."""
    # transformers does not read all of the metadata.
    config = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
    for name, value in settings.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", config=config, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]

        def generate(model):
            inputs = torch.tensor([ids])
            with torch.no_grad():
                out = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=20)
            return out[0].tolist()[len(ids) :]

        answer = generate(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(1 + 1e-5 * torch.randn_like(weight))
        if generate(other) == answer:
            text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            cases.append(dict(prompt=prompt, prompt_ids=ids, options=dict(max_output_tokens=20), ids=answer, text=text))
        print(folder.name, prompt, ids, answer)
    assert len(cases) >= 2
    (folder / "expected.json").write_text(json.dumps(dict(cases=cases), ensure_ascii=False, indent=1))


def add(writer, name, weights, kind):
    data = gguf.quants.quantize(weights, kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def random_blocks(rng, shape, kind):
    """Blocks of random numbers, whose scales give weights of a sensible size."""
    rows, inputs = shape
    count = inputs // 256
    if kind == Kind.Q4_K:
        block = rng.integers(0, 256, (rows, count, 144), dtype=np.uint8)
        scales = np.array([1.2 / 480, 9 / 480], dtype=np.float16) / inputs**0.5 * 4
        block[:, :, :4] = np.frombuffer(scales.astype(np.float16).tobytes(), dtype=np.uint8)
    else:
        block = rng.integers(0, 256, (rows, count, 210), dtype=np.uint8)
        scale = np.array([1 / 74 / 20], dtype=np.float16) / inputs**0.5 * 2
        block[:, :, 208:] = np.frombuffer(scale.astype(np.float16).tobytes(), dtype=np.uint8)
    return block.reshape(rows, -1)


def qwen3():
    source, folder = HERE / "qwen3", HERE / "gguf_qwen3"
    folder.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    vocab = dict(tokenizer["model"]["vocab"]) | {name: token["id"] for name, token in added.items()}
    tokens = sorted(vocab, key=vocab.get)
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config["vocab_size"])]
    kinds = [5 if token.startswith("[PAD") else (3 if added[token]["special"] else 4) if token in added else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_pad_token_id(vocab["<|endoftext|>"])
    writer.add_bos_token_id(vocab["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((source / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        name = names.get_name(name, try_suffixes=(".weight",))
        weight = weight.numpy()
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            add(writer, name, weight, Kind.F16 if "embd" in name else Kind.Q4_0 if "ffn_up" in name else Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    answers(folder, head_dim=config["head_dim"])


def llama():
    folder = HERE / "gguf_llama"
    folder.mkdir(exist_ok=True)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [2, 3, 3] + [6] * 256
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz", "th", "▁t", "he", "▁the", "ck", "ui", "qu", "qui", "▁qui", "▁quick", "ow", "ro", "la", "zy"]
    tokens, kinds = tokens + pieces, kinds + [1] * len(pieces)
    scores = [0.0] * 259 + [-float(index) for index in range(len(pieces))]
    width, heads, wide, vocab = 256, 4, 256, len(tokens)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(5)
    norm = lambda: (1 + 0.1 * rng.standard_normal(width)).astype(np.float32)
    blocks = lambda name, shape, kind: writer.add_tensor(name, random_blocks(rng, shape, kind), raw_dtype=kind)
    blocks("token_embd.weight", (vocab, width), Kind.Q6_K)
    writer.add_tensor("output_norm.weight", 8 * norm())
    head = width // heads
    writer.add_tensor("blk.0.attn_norm.weight", norm())
    blocks("blk.0.attn_q.weight", (width, width), Kind.Q4_K)
    blocks("blk.0.attn_k.weight", (head, width), Kind.Q4_K)
    blocks("blk.0.attn_v.weight", (head, width), Kind.Q6_K)
    blocks("blk.0.attn_output.weight", (width, width), Kind.Q4_K)
    writer.add_tensor("blk.0.ffn_norm.weight", norm())
    blocks("blk.0.ffn_gate.weight", (wide, width), Kind.Q4_K)
    blocks("blk.0.ffn_up.weight", (wide, width), Kind.Q4_K)
    blocks("blk.0.ffn_down.weight", (width, wide), Kind.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    answers(folder)


qwen3()
llama()
