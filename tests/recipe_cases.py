"""For tests of the published recipes: rows of the published schemas, and small base models with the tokens, special
tokens, chat templates and head of the real ones. Everything is written here; nothing comes from a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

BASES = {
    "gsm8k_llama1b": "llama",
    "math_qwen7b": "qwen",
    "kava_llama1b": "llama",
    "codi_llama1b": "llama",
    "simcot_llama1b": "llama",
    "spans_llama1b": "llama",
    "lotus_llama1b": "llama",
    "pccot_gpt2": "gpt2",
    "coconut_gpt2": "gpt2",
}
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
QUESTION = "Tom has {} eggs. He eats 3 and sells the rest for $2 each. How many dollars does he make?"
LLAMA_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN_TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nPlease reason step by step, and put your final answer within \\\\boxed{}.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != "system" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# how the three models cut text into words before merging bytes
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL = {
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gpt2": ["<|endoftext|>"],
}


def published_rows(recipe: str, split: str, count: int) -> list[dict[str, Any]]:
    """Return rows of `train`, `validation` or `test` with field names and texts as in the data a recipe names; none
    where its data have no such split."""
    first = {"train": 10, "validation": 1010, "test": 2010}[split]
    found = []
    for eggs in range(first, first + count):
        question, left = QUESTION.format(eggs), eggs - 3
        steps, answer = [f"<<{eggs}-3={left}>>", f"<<{left}*2={2 * left}>>"], str(2 * left)
        if recipe in ("kava_llama1b", "lotus_llama1b", "pccot_gpt2", "coconut_gpt2"):  # whynlp/gsm8k-aug
            row: dict[str, Any] = {"question": question, "steps": steps, "answer": answer}
        elif split == "validation":
            return []
        elif recipe == "math_qwen7b":  # OpenR1-Math-220k-v-train-4k.jsonl and Math-500-test.jsonl
            cot = f"Okay, {eggs} eggs.\n\nThen {left} are left, so ${2 * left}."
            text = f"He makes $\\boxed{{{answer}}}$ dollars."
            row = {"problem": question, "cot": f"<think>\n{cot}\n</think>", "cot_answer": text}
            if split == "test":
                row = {"problem": question, "solution": f"{cot} {text}", "answer": answer}
        else:  # zen-E/GSM8k-Aug and openai/gsm8k
            row = {"question": question, "cot": " ".join(steps), "answer": answer}
            if split == "test":
                row = {"question": question, "answer": f"He sells {eggs}-3={steps[0]}{left}.\n#### {answer}"}
        found.append(row)
    return found


def data_overrides(recipe: str, count: int, folder: Path) -> list[str]:
    """Write the rows of a recipe and return the settings that name their files; nothing else about data is set."""
    settings = []
    for split in ("train", "validation", "test"):
        if rows := published_rows(recipe, split, count):
            path = folder / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings.append(f"data.{split}={path}")
    return settings


def base_tokenizer(base: str) -> PreTrainedTokenizerFast:
    """Return a small byte-level tokenizer that is as the base model's in everything but its merges."""
    backend = Tokenizer(models.BPE())
    words = Regex(GPT2_WORDS if base == "gpt2" else LLAMA_WORDS)
    pieces = [
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(pieces), decoders.ByteLevel()
    texts = [f"{INSTRUCTION} {QUESTION} The answer is: {' '.join(f'<<{n}-3={n - 3}>>' for n in range(10, 40))}"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=SPECIAL[base],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    end = "<|eot_id|>" if base == "llama" else "<|endoftext|>"
    named = {"eos_token": end}
    if base == "llama":
        begin = ("<|begin_of_text|>", 0)
        backend.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
        named["bos_token"] = begin[0]
    else:
        named["pad_token" if base == "qwen" else "bos_token"] = end
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = {"llama": LLAMA_TEMPLATE, "qwen": QWEN_TEMPLATE, "gpt2": None}[base]
    return tokenizer


def save_base(base: str, folder: Path) -> Path:
    """Write a base model of two layers as a Hub folder: Llama tied, Qwen2 untied, GPT-2 with its dropout."""
    tokenizer = base_tokenizer(base)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    common = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": 2048, **sizes, **ids}
    torch.manual_seed(0)
    if base == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, **ids))
    elif base == "llama":
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **common))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, **common))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
