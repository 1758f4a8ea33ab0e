"""Makes the small random checkpoints below tiny/ and the vectors that sentence-transformers computes for them.

Usage: python make_tiny.py [OUT_FOLDER]. Each checkpoint is a whole model folder and exercises another corner: f32 with mean
pooling; sharded f16 with a `bert.` prefix, tanh GELU and CLS pooling; bf16 with two pooling modes and ReLU; XLM-RoBERTa with
a Unigram tokenizer. The folder holds texts.json and expected.f32 (little-endian floats, one vector behind the other) too.
"""

import json
import string
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

TEXTS = [
    "hello world",
    "the cat sat on the mat.",
    "",
    "   ",
    "a",
    "Numbers 12345 and words, mixed: the THE The!",
    "unknown 敏捷 éàü words",
    "[SEP] in the text [CLS] and <s> too </s> <pad> [PAD] end",
    "the cat " * 40,
    "x" * 150,
    "tab\tand\nnewline\r\nand\x00control",
]

WORDS = ["the", "cat", "sat", "on", "mat", "hello", "world", "and", "text", "in"]


def word_piece():
    """A WordPiece tokenizer over ASCII with a few whole words."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokens += [*string.ascii_lowercase, *string.digits, ".", ",", "!", ":"]
    tokens += ["##" + letter for letter in string.ascii_lowercase + string.digits]
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=48, **names), len(tokens)


def unigram():
    """A Unigram tokenizer as XLM-RoBERTa has, in small."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0 - index / 10) for index, word in enumerate(WORDS)]
    pieces += [(letter, -6.0 - index / 50) for index, letter in enumerate(string.ascii_letters + string.digits + ".,!:")]
    pieces += [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<mask>", **names), len(pieces)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def modules(folder, pooling, width, normalize, max_seq_length, lower_case=False):
    """Writes the sentence-transformers side of a folder in the form that published models have."""
    names = ["Transformer", "Pooling"] + (["Normalize"] if normalize else [])
    paths = ["", "1_Pooling", "2_Normalize"]
    kinds = [{"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(names)]
    write_json(folder / "modules.json", kinds)
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"]
    config = {"word_embedding_dimension": width} | {f"pooling_mode_{mode}": mode in pooling for mode in modes}
    write_json(folder / "1_Pooling" / "config.json", config)
    if max_seq_length is not None:
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": lower_case})


def randomize(model, seed):
    """Random weights that keep activations lively; the defaults are so small that pooling hides errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if "LayerNorm.weight" in name else 0.25 * noise


def bert(**options):
    return BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64, **options
    )


def expected(folder):
    """Vectors of the folder's model in f32, one text at a time."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    vectors = np.stack([model.encode(text, convert_to_numpy=True) for text in TEXTS]).astype("<f4")
    assert np.isfinite(vectors).all()
    (folder / "expected.f32").write_bytes(vectors.tobytes())
    write_json(folder / "texts.json", TEXTS)
    print(folder.name, vectors.shape)


def bert_mean(folder):
    tokenizer, vocab = word_piece()
    model = BertModel(bert(vocab_size=vocab), add_pooling_layer=False)
    randomize(model, 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules(folder, ["mean_tokens"], 32, True, 48)


def bert_cls_sharded_f16(folder):
    tokenizer, vocab = word_piece()
    model = BertModel(bert(vocab_size=vocab, hidden_act="gelu_new"), add_pooling_layer=True)
    randomize(model, 2)
    model.half().save_pretrained(folder)
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    (folder / "model.safetensors").unlink()
    parts = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    names = sorted(tensors)
    shards = {parts[0]: names[: len(names) // 2], parts[1]: names[len(names) // 2 :]}
    for part, members in shards.items():
        save_file({name: tensors[name].contiguous() for name in members}, folder / part, metadata={"format": "pt"})
    weight_map = {name: part for part, members in shards.items() for name in members}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})
    tokenizer.save_pretrained(folder)
    modules(folder, ["cls_token"], 32, False, None)


def bert_max_sqrt_bf16(folder):
    tokenizer, vocab = word_piece()
    model = BertModel(bert(vocab_size=vocab, hidden_act="relu"), add_pooling_layer=False)
    randomize(model, 3)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules(folder, ["max_tokens", "mean_sqrt_len_tokens"], 32, True, 40)


def xlm_roberta(folder):
    tokenizer, vocab = unigram()
    config = XLMRobertaConfig(
        vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    model = XLMRobertaModel(config, add_pooling_layer=False)
    randomize(model, 4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules(folder, ["cls_token"], 32, True, 64, lower_case=True)


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny"
    for make in (bert_mean, bert_cls_sharded_f16, bert_max_sqrt_bf16, xlm_roberta):
        folder = out / make.__name__
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        expected(folder)


if __name__ == "__main__":
    main()
