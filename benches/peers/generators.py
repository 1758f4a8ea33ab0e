"""Real-size random generators, and how fast transformers is with them: generators.py make FOLDER | time FOLDER DTYPE WORDS TOKENS BATCH.

`make` writes the shapes of Qwen3-0.6B and flan-t5-base in bf16 below FOLDER, with a tokenizer of single words. `time` prints what
the example generate_folder of the engine prints.
"""

import os
import sys
import time
from pathlib import Path

import torch


def make(out):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "word": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    qwen = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True, eos_token_id=1,
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(out / "qwen3-0.6b")
    Qwen3ForCausalLM(qwen).to(torch.bfloat16).save_pretrained(out / "qwen3-0.6b")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(out / "flan-t5-base")
    T5ForConditionalGeneration(t5).to(torch.bfloat16).save_pretrained(out / "flan-t5-base")


def measure(folder, dtype, words, tokens, batch):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    threads = int(os.environ.get("RAYON_NUM_THREADS", "2"))
    torch.set_num_threads(threads)
    kind = AutoModelForSeq2SeqLM if "t5" in Path(folder).name else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dict(f32=torch.float32, bf16=torch.bfloat16)[dtype]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["word " * words] * batch, return_tensors="pt")
    inputs = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    def run(count):
        started, busy = time.perf_counter(), time.process_time()
        with torch.no_grad():
            model.generate(**inputs, do_sample=False, num_beams=1, min_new_tokens=count, max_new_tokens=count)
        return time.perf_counter() - started, time.process_time() - busy

    run(2)
    first, first_busy = run(1)
    whole, whole_busy = run(tokens)
    rate, busy = batch * (tokens - 1) / (whole - first), batch * (tokens - 1) / (whole_busy - first_busy)
    print(f"{dtype} batch {batch}: prompts of {inputs['input_ids'].numel()} tokens in {first:.2f}s, then {rate:.1f} tokens/s, {busy:.1f} for each second that it ran")


if sys.argv[1] == "make":
    make(Path(sys.argv[2]))
else:
    measure(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
