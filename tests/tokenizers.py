"""Tokenizers small enough to see through."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|start|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, after two special tokens (start 0, end 1) and before some merged pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "u")]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[1])


def counting_tokenizer() -> PreTrainedTokenizerFast:
    """About as many tokens as a real one makes, all of them the same: for what only counts."""
    tokenizer = Tokenizer(models.WordLevel(vocab={"?": 0}, unk_token="?"))
    pieces = pre_tokenizers.Split(Regex(".{1,4}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pieces])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
