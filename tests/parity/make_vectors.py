"""Makes texts.json and minilm.f32: texts of every awkward kind and their all-MiniLM-L6-v2 vectors by sentence-transformers.

Usage: python make_vectors.py MODEL_FOLDER. The folder's model.safetensors must be the known one. Vectors are computed one text
at a time in f32 and stored as little-endian floats, one behind the other.
"""

import hashlib
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

SENTENCE = (
    "One process owns the model and keeps its weights in memory once; every other program on the machine borrows the same "
    "pages, computes on them or asks for vectors, and gives them back when it is done. "
)


def texts():
    """All texts, in a fixed order."""
    ordinary = [
        "hello", "world", "How do I share one model between many processes?", "a", "I", ".",
        "The quick brown fox jumps over the lazy dog.", "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG.",
        "Embeddings turn texts into points; near texts become near points.",
        "Invoice 2024-0815: 3 x 19.90 EUR, due 31/12/2024, VAT 19 %.", "don't can't won't it's y'all", "e-mail re-use co-operate",
    ]  # fmt: skip
    lengths = [SENTENCE * count for count in (1, 2, 3, 5, 8, 13)] + [SENTENCE[:end] for end in (1, 7, 20, 45, 90)]
    edge = ["", " ", "   \t\n ", "\u00a0\u2003", "\u200b", "\x00", "\x00\x01\x02\x1f\x7f", "\ufeffbyte order mark", "line\r\nbreaks\u2028here\u2029now"]
    special = [
        "[SEP] [CLS] [MASK]", "[CLS]", "[PAD] [PAD]", "before[SEP]after", "[sep] [cls] is not special", "[UNK]",
        "a [MASK] in the middle of a sentence", "<s> </s> <pad> <mask>", "##ing ##ed",
    ]  # fmt: skip
    unicode_texts = [
        "敏捷的棕色狐狸跳过懒狗。", "日本語のテキスト、カタカナとひらがな。", "한국어 문장을 벡터로 바꿉니다.",
        "النص العربي يُقرأ من اليمين إلى اليسار", "עברית היא שפה", "Быстрая коричневая лиса", "ภาษาไทยไม่มีช่องว่าง", "हिन्दी में एक वाक्य",
        "👍🏽 👩‍👩‍👧‍👦 🇩🇪 emoji 😀", "naïve café résumé Ærøskøbing Łódź", unicodedata.normalize("NFD", "naïve café résumé Åström 한국어"),
        unicodedata.normalize("NFC", "naïve café résumé Åström 한국어"), "Z̷̡a̸̢l̵g̶o̴ t̷e̶x̵t̸", "ﬁ ligature, ½ fraction, ² square, Ⅷ numeral, ﷺ",
        "ΑΣ ΟΔΥΣΣΕΥΣ ς σ", "İstanbul ıçğü", "mixed 中文 and English и русский",
    ]  # fmt: skip
    other = [
        "https://example.org/a/b?c=d&e=%20#f", "user.name+tag@mail.example.com", "C:\\Program Files\\x; rm -rf / && echo $HOME",
        "fn main() { println!(\"{:?}\", vec![1, 2]); }", "0 1 2 3 4 5 6 7 8 9 10 100 1000 3.14159 -1e-9", "1234567890" * 12,
        "x" * 99, "x" * 100, "x" * 101, "!?" * 60, "a b " * 500, "word " * 10_000, "antidisestablishmentarianism floccinaucinihilipilification",
        "| Name | Qty |\n|---|---|\n| Bolt | 12 |",
    ]  # fmt: skip
    return ordinary + lengths + edge + special + unicode_texts + other


def main():
    folder, here = Path(sys.argv[1]), Path(__file__).parent
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == MODEL_SHA256, f"another model.safetensors: {digest}"
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    vectors = np.stack([model.encode(text, convert_to_numpy=True) for text in texts()]).astype("<f4")
    batched = model.encode(texts(), batch_size=32, convert_to_numpy=True)
    print(len(vectors), "texts; sentence-transformers, batch against single:", np.abs(vectors - batched).max())
    (here / "texts.json").write_text(json.dumps(texts(), ensure_ascii=True, indent=0) + "\n")
    (here / "minilm.f32").write_bytes(vectors.tobytes())


if __name__ == "__main__":
    main()
