"""Makes the small random checkpoints below tiny/ and the vectors that sentence-transformers computes for them.

Each checkpoint is a whole model folder and exercises another corner: f32 with mean
pooling; sharded f16 with a `bert.` prefix, tanh GELU and CLS pooling; bf16 with two pooling modes and ReLU; XLM-RoBERTa with
a Unigram tokenizer; then one of each other family, and classifiers. The folder holds texts.json and expected.f32 (little-endian
floats, one vector behind the other) too; a classifier's holds logits there, and pairs.json (a query and texts, once short and
once too long) with pairs.f32.

Usage: python make_tiny.py [OUT_FOLDER [NAME...]]; with names only those are made.
"""

import json
import string
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    MPNetModel,
    NomicBertConfig,
    NomicBertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3Model,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

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

# For models whose layers treat distances differently.
LONG = ["the cat sat on the mat and hello world in text: " * 30, "hello cat " * 61]

PAIRS = {
    "queries": ["where is the cat?", "the cat sat on the mat and hello world in text: " * 8, ""],
    "texts": ["the cat sat on the mat.", "hello world", "", "[SEP] mat", "hello cat " * 60, "the cat sat on " * 6],
}

QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

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


def byte_level(end, begin=None, regex=None):
    """A byte-level BPE tokenizer with a few merges: GPT-2's way of splitting, or Qwen's by its regular expression."""
    special = [token for token in ("<pad>", begin, end) if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if regex:
        split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "the cat sat on the mat hello world " * 20], trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    single, pair = f"$A {end}", f"$A $B {end}"
    if begin:
        single, pair = f"{begin} $A {end}", f"{begin} $A {end} $B {end}"
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    names = dict(pad_token="<pad>", eos_token=end, model_input_names=["input_ids", "attention_mask"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names), tokenizer.get_vocab_size()


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def modules(folder, pooling, width, normalize, max_seq_length, lower_case=False, dense=()):
    """Writes the sentence-transformers side of a folder in the form that published models have."""
    names = ["Transformer", "Pooling"] + ["Dense"] * len(dense) + (["Normalize"] if normalize else [])
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(names) if i > 0)]
    generator = torch.Generator().manual_seed(77)
    for i, (inputs, outputs, bias, function) in enumerate(dense):
        config = {"in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": function}
        write_json(folder / paths[2 + i] / "config.json", config)
        tensors = {"linear.weight": torch.randn(outputs, inputs, generator=generator) * 0.25}
        if bias:
            tensors["linear.bias"] = torch.randn(outputs, generator=generator) * 0.25
        save_file(tensors, folder / paths[2 + i] / "model.safetensors", metadata={"format": "pt"})
    kinds = [{"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(names)]
    write_json(folder / "modules.json", kinds)
    modes = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"]
    modes += ["lasttoken"] if "lasttoken" in pooling else []
    config = {"word_embedding_dimension": width} | {f"pooling_mode_{mode}": mode in pooling for mode in modes}
    write_json(folder / "1_Pooling" / "config.json", config)
    if max_seq_length is not None:
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": lower_case})


def randomize(model, seed):
    """Random weights that keep activations lively; the defaults are so small that pooling hides errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        parameter.data = 1 + 0.2 * noise if is_norm else 0.25 * noise


def bert(**options):
    return BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64, **options
    )


def classified(folder):
    """Logits of a classifier's folder in f32, of single texts and of pairs, one at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 30))
    # RoBERTa and MPNet count positions from behind the padding id.
    if model.config.model_type in ("roberta", "xlm-roberta", "mpnet"):
        padding = 1 if model.config.model_type == "mpnet" else model.config.pad_token_id
        limit = min(tokenizer.model_max_length, model.config.max_position_embeddings - padding - 1)

    def logits(*texts):
        with torch.no_grad():
            # As BertTokenizer does; the plain tokenizer class leaves token types out.
            types = dict(return_token_type_ids=model.config.model_type == "bert")
            # Lists: an empty second text alone counts as none.
            encoded = tokenizer(*([text] for text in texts), truncation=True, max_length=limit, return_tensors="pt", **types)
            return model(**encoded).logits[0].numpy()

    texts = [text for text in TEXTS + LONG if text.strip() or model.config.model_type != "qwen3"]
    singles = np.stack([logits(text) for text in texts]).astype("<f4")
    pairs = np.stack([logits(query, text) for query in PAIRS["queries"] for text in PAIRS["texts"]]).astype("<f4")
    assert np.isfinite(singles).all() and np.isfinite(pairs).all()
    (folder / "expected.f32").write_bytes(singles.tobytes())
    (folder / "pairs.f32").write_bytes(pairs.tobytes())
    write_json(folder / "texts.json", texts)
    write_json(folder / "pairs.json", PAIRS)
    print(folder.name, singles.shape, pairs.shape, np.abs(pairs).max())


def expected(folder, texts=TEXTS):
    """Vectors of the folder's model in f32, one text at a time."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    vectors = np.stack([model.encode(text, convert_to_numpy=True) for text in texts]).astype("<f4")
    assert np.isfinite(vectors).all()
    (folder / "expected.f32").write_bytes(vectors.tobytes())
    write_json(folder / "texts.json", texts)
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


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


def save(folder, model, tokenizer, seed):
    randomize(model, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bert_dense(folder):
    tokenizer, vocab = word_piece()
    save(folder, BertModel(bert(vocab_size=vocab), add_pooling_layer=False), tokenizer, 5)
    tanh, identity = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
    modules(folder, ["mean_tokens"], 32, True, 48, dense=[(32, 40, True, tanh), (40, 24, False, identity)])
    prompts = {"query": "query: ", "document": ""}
    write_json(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})


def distilbert(folder):
    tokenizer, vocab = word_piece()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = DistilBertConfig(vocab_size=vocab, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64)
    save(folder, DistilBertModel(config), tokenizer, 6)
    modules(folder, ["mean_tokens"], 32, False, 48)


def mpnet(folder):
    tokenizer, vocab = unigram()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = MPNetConfig(vocab_size=vocab, max_position_embeddings=202, layer_norm_eps=1e-5, **SMALL)
    model = MPNetModel(config, add_pooling_layer=False)
    save(folder, model, tokenizer, 7)
    modules(folder, ["mean_tokens"], 32, True, 200)


def modernbert(folder):
    tokenizer, vocab = byte_level("[SEP]", "[CLS]")
    small = SMALL | dict(num_hidden_layers=4)
    config = ModernBertConfig(
        vocab_size=vocab, max_position_embeddings=256, local_attention=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2, **small,
    )  # fmt: skip
    save(folder, ModernBertModel(config), tokenizer, 8)
    modules(folder, ["mean_tokens"], 32, True, 256)


def nomic_bert(folder):
    tokenizer, vocab = word_piece()
    config = NomicBertConfig(vocab_size=vocab, max_position_embeddings=256, **SMALL)
    save(folder, NomicBertModel(config), tokenizer, 9)
    modules(folder, ["mean_tokens"], 32, True, 128)


def qwen3(folder):
    tokenizer, vocab = byte_level("<|endoftext|>", regex=QWEN_REGEX)
    config = Qwen3Config(
        vocab_size=vocab, max_position_embeddings=256, num_key_value_heads=2, head_dim=24, rope_theta=1000000.0,
        pad_token_id=0, eos_token_id=1, **(SMALL | dict(num_attention_heads=4)),
    )  # fmt: skip
    save(folder, Qwen3Model(config), tokenizer, 10)
    modules(folder, ["lasttoken"], 32, True, 256)
    prompts = {"query": "Instruct: find it\nQuery: ", "document": ""}
    write_json(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "document"})


def bert_reranker(folder):
    tokenizer, vocab = word_piece()
    save(folder, BertForSequenceClassification(bert(vocab_size=vocab, num_labels=1)), tokenizer, 11)


def roberta_classifier(folder):
    tokenizer, vocab = byte_level("</s>", "<s>")
    config = RobertaConfig(
        vocab_size=vocab, max_position_embeddings=66, type_vocab_size=1, pad_token_id=0, layer_norm_eps=1e-5, num_labels=3, **SMALL
    )  # fmt: skip
    config.id2label = {0: "contradiction", 1: "entailment", 2: "neutral"}
    config.problem_type = "single_label_classification"
    save(folder, RobertaForSequenceClassification(config), tokenizer, 12)


def xlm_roberta_reranker(folder):
    tokenizer, vocab = unigram()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = XLMRobertaConfig(
        vocab_size=vocab, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5, num_labels=1, **SMALL
    )  # fmt: skip
    save(folder, XLMRobertaForSequenceClassification(config), tokenizer, 13)


def distilbert_classifier(folder):
    tokenizer, vocab = word_piece()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = DistilBertConfig(
        vocab_size=vocab, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, num_labels=2
    )
    save(folder, DistilBertForSequenceClassification(config), tokenizer, 14)


def mpnet_classifier(folder):
    tokenizer, vocab = unigram()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = MPNetConfig(vocab_size=vocab, max_position_embeddings=82, layer_norm_eps=1e-5, num_labels=2, **SMALL)
    save(folder, MPNetForSequenceClassification(config), tokenizer, 15)


def modernbert_reranker(folder):
    tokenizer, vocab = byte_level("[SEP]", "[CLS]")
    config = ModernBertConfig(
        vocab_size=vocab, max_position_embeddings=128, local_attention=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2, classifier_pooling="mean", num_labels=1, **SMALL,
    )  # fmt: skip
    save(folder, ModernBertForSequenceClassification(config), tokenizer, 16)


def qwen3_classifier(folder):
    tokenizer, vocab = byte_level("<|endoftext|>", regex=QWEN_REGEX)
    config = Qwen3Config(
        vocab_size=vocab, max_position_embeddings=128, num_key_value_heads=1, head_dim=16, rope_theta=1000000.0,
        pad_token_id=0, eos_token_id=1, num_labels=2, **SMALL,
    )  # fmt: skip
    save(folder, Qwen3ForSequenceClassification(config), tokenizer, 17)


EMBEDDERS = (bert_mean, bert_cls_sharded_f16, bert_max_sqrt_bf16, xlm_roberta)
LONG_EMBEDDERS = (bert_dense, distilbert, mpnet, modernbert, nomic_bert, qwen3)
CLASSIFIERS = (
    bert_reranker,
    roberta_classifier,
    xlm_roberta_reranker,
    distilbert_classifier,
    mpnet_classifier,
    modernbert_reranker,
    qwen3_classifier,
)


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny"
    for make in EMBEDDERS + LONG_EMBEDDERS + CLASSIFIERS:
        if len(sys.argv) > 2 and make.__name__ not in sys.argv[2:]:
            continue
        folder = out / make.__name__
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        if make in CLASSIFIERS:
            classified(folder)
        else:
            expected(folder, TEXTS + LONG if make in LONG_EMBEDDERS else TEXTS)


if __name__ == "__main__":
    main()
