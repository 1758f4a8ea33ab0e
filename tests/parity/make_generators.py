"""Makes the small random generators below tiny_generators/ and what transformers generates with them.

Usage: python make_generators.py [OUT_FOLDER]. Each is a whole model folder, another corner each: T5 with ReLU and one table for
input and output; T5 with gated GELU and an output matrix of its own; Llama with grouped heads and stretched rotary positions;
Qwen3 with norms of heads and tied tables. expected.json has the answers for prompts and options, and chats as their templates
render them. Weights are so large that answers vary. An answer is kept only if it does not change in double precision nor with
weights that are off by 1e-5, so that no tie decides it.
"""

import copy
import json
import os
import sys
import warnings
from datetime import datetime, timezone
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

CORPUS = """The quick brown fox jumps over the lazy dog. A summary says what a text says, in fewer words. It's raining, we'll stay!
Numbers like 12345 and 2026 matter; so do names. Models of language read tokens and write tokens, one after the other.
Der schnelle braune Fuchs springt über den faulen Hund. Les élèves étudient à l'école. 敏捷的棕色狐狸跳过懒狗。
def add(a, b):\n    return a + b\n\n\tindented = {"key": [1, 2, 3]}\n
""".splitlines(keepends=True) * 4

PROMPTS = [
    "summarize: The quick brown fox jumps over the lazy dog, and it's raining.",
    "translate: Les élèves étudient à l'école 12345 敏捷的",
    "a",
    "Numbers like 2026 matter; so do names.\n\n  Models of language read tokens.   " * 3,
]
CHATS = [
    [{"role": "user", "content": "What does  the fox do? "}],
    [
        {"role": "system", "content": "You say little."},
        {"role": "user", "content": "Hello\nthere"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi."},
        {"role": "user", "content": "12 + 30? \"quoted\" <b>é</b>"},
    ],
]
BEAMS = dict(num_beams=4, max_output_tokens=20)
SEQUENCE_OPTIONS = [
    dict(max_output_tokens=24),
    dict(max_output_tokens=24, no_repeat_ngram_size=2),
    dict(max_output_tokens=20, repetition_penalty=1.3, min_output_tokens=8),
    dict(BEAMS, early_stopping=True),
    dict(BEAMS, early_stopping=False, length_penalty=2.0, no_repeat_ngram_size=3),
    dict(BEAMS, early_stopping=True, length_penalty=0.6, min_output_tokens=5, num_beams=3),
]
CAUSAL_OPTIONS = [
    dict(max_output_tokens=32),
    dict(max_output_tokens=24, repetition_penalty=1.2),
    dict(max_output_tokens=24, no_repeat_ngram_size=2),
    dict(num_beams=3, max_output_tokens=12, early_stopping=True),
]

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

HEADER_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('Only users and assistants may speak, not ' ~ message.role) }}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
THINK_TEMPLATE = """{%- if tools %}
    {{- raise_exception('no tools') }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- set content = message.content %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
INST_TEMPLATE = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{% if loop.first and system_message is defined %}{{ ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}{% else %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% elif message['role'] == 'assistant' %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}
"""
CHATML_TEMPLATE = """{% set roles = {'user': 'U', 'assistant': 'A', 'system': 'S'} %}
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {% endif %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
    {# a comment #}
    {% if loop.index0 == 7 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
{{ messages | tojson }}
{{ {'a': [1, 2.5, none, true], 'é': {}} | tojson(indent=2) }}{{ roles.items() | length }}{{ roles.get('nobody', 'N') }}{{ messages[-1].content.upper()[:3] }}
"""


def unigram():
    """A Unigram tokenizer as T5 has, in small."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=280, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def byte_level(split, specials, names, template, begins=None):
    """A byte-level BPE tokenizer as Llama 3 and Qwen have, in small."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=__import__("tokenizers").Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(specials)
    if begins:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{begins} $A", pair=f"{begins} $A {begins} $B", special_tokens=[(begins, tokenizer.token_to_id(begins))]
                ),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **names
    )


def widen(model, seed, scale, table=1.0, final=1.0, ends=()):
    """Large random weights: tokens then depend on what came before, not on the last one alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower():
                weight.copy_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
                if "final_layer_norm" in name or name == "model.norm.weight":
                    weight.mul_(final)
            else:
                fan = weight.shape[-1]
                factor = table if "embed" in name or "shared" in name else scale / fan**0.5
                weight.copy_(factor * torch.randn(weight.shape, generator=generator))
        # Ends must come up now and then.
        for end in ends:
            model.get_output_embeddings().weight[end] *= 1.6


def generate(model, ids, options):
    names = dict(max_output_tokens="max_new_tokens", min_output_tokens="min_new_tokens")
    arguments = {names.get(name, name): value for name, value in options.items()}
    inputs = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, **arguments)[0].tolist()
    out = out[1:] if model.config.is_encoder_decoder else out[len(ids) :]
    ends = model.generation_config.eos_token_id
    for index, token in enumerate(out):
        if token in (ends if isinstance(ends, list) else [ends]):
            return out[: index + 1]
    return out


def stable(model, ids, options):
    """The answer, or None when rounding could change it."""
    wanted = generate(model, ids, options)
    others = [copy.deepcopy(model).double()]
    for seed in range(1):
        torch.manual_seed(seed)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(1 + 1e-5 * torch.randn_like(weight))
        others.append(other)
    return wanted if all(generate(other, ids, options) == wanted for other in others) else None


def rendered(tokenizer, chat):
    """A chat as its template renders it, with a date that does not change."""
    today = datetime.now().strftime("%d %b %Y")
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text.replace(today, "26 Jul 2024")


def save(folder, model, tokenizer, options, dtype):
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kind = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases, unstable = [], 0
    prompts = list(PROMPTS)
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        for option in options:
            answer = stable(model, ids, option)
            if answer is None:
                unstable += 1
                continue
            text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            cases.append(dict(prompt=prompt, prompt_ids=ids, options=option, ids=answer, text=text))
    greedy = [case["ids"] for case in cases if len(case["options"]) == 1]
    varied = [len(set(ids)) for ids in greedy]
    beams = sum("num_beams" in case["options"] for case in cases)
    print(folder.name, len(cases), "cases", unstable, "unstable", "distinct tokens", varied, "lengths", [len(c["ids"]) for c in cases], "beams", beams)
    if len({token for ids in greedy for token in ids}) < 16 or beams < 3 or sum(len(ids) < 10 for ids in greedy) > 2:
        return False
    chats = []
    if tokenizer.chat_template:
        for chat in CHATS:
            text = rendered(tokenizer, chat)
            chats.append(dict(messages=chat, rendered=text, ids=tokenizer(text, add_special_tokens=False)["input_ids"]))
    (folder / "expected.json").write_text(json.dumps(dict(cases=cases, chats=chats), ensure_ascii=False, indent=1))
    return True


def save_first(folder, make, tokenizer, options, dtype, **weights):
    """With the first weights whose answers vary."""
    for seed in range(1, 40):
        model = make()
        widen(model, seed, **weights)
        if save(folder, model, tokenizer, options, dtype):
            return
    raise SystemExit("answers do not vary")


def templates(folder):
    """Renderings of templates of several families, by transformers."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    cases = []
    for name, template in dict(header=HEADER_TEMPLATE, think=THINK_TEMPLATE, inst=INST_TEMPLATE, chatml=CHATML_TEMPLATE).items():
        tokenizer.chat_template = template
        for chat in CHATS:
            cases.append(dict(name=name, template=template, messages=chat, rendered=rendered(tokenizer, chat)))
    (folder / "templates.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1))


def main():
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny_generators"
    out.mkdir(parents=True, exist_ok=True)
    templates(out)
    tokenizer = unigram()
    size = (len(tokenizer) + 31) // 32 * 32
    common = dict(vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    config = T5Config(**common, feed_forward_proj="relu")
    make = lambda: T5ForConditionalGeneration(config).eval()
    save_first(out / "t5_tied", make, tokenizer, SEQUENCE_OPTIONS, torch.float32, scale=2.5, table=0.3, final=12.0, ends=[1])
    gated = T5Config(**common, feed_forward_proj="gated-gelu", tie_word_embeddings=False)

    def untied():
        model = T5ForConditionalGeneration(gated).eval()
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        return model

    save_first(out / "t5_gated", untied, tokenizer, SEQUENCE_OPTIONS, torch.bfloat16, scale=2.2, ends=[1])

    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(
        LLAMA_SPLIT, names, dict(bos_token=names[0], eos_token=names[4], pad_token=names[1]), HEADER_TEMPLATE, begins=names[0]
    )
    ends = [tokenizer.convert_tokens_to_ids(names[1]), tokenizer.convert_tokens_to_ids(names[4])]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=ends[0] - 1, eos_token_id=ends,
        rope_parameters=dict(
            rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        tie_word_embeddings=False,
    )

    def llama():
        model = LlamaForCausalLM(config).eval()
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0], do_sample=True, temperature=0.6)
        return model

    save_first(out / "llama", llama, tokenizer, CAUSAL_OPTIONS, torch.bfloat16, scale=2.0, ends=ends)

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(QWEN_SPLIT, names, dict(eos_token=names[2], pad_token=names[0]), THINK_TEMPLATE)
    tokenizer.add_tokens(["<think>", "</think>"])
    last = [tokenizer.convert_tokens_to_ids(names[2]), tokenizer.convert_tokens_to_ids(names[0])]
    qwen = Qwen3Config(
        vocab_size=(len(tokenizer) + 7) // 8 * 8, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=last[0],
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    )

    def qwen3():
        model = Qwen3ForCausalLM(qwen).eval()
        model.generation_config = GenerationConfig(eos_token_id=last, pad_token_id=last[1])
        return model

    save_first(out / "qwen3", qwen3, tokenizer, CAUSAL_OPTIONS, torch.float32, scale=2.5, table=0.3, final=8.0, ends=last)


main()
