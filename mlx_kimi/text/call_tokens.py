"""The control tokens that a call of a tool is made of."""

from __future__ import annotations

from mlx_kimi.text.tokenizer import Tokenizer

# Models of the family differ in the section's spelling.
SECTION_BEGIN = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
SECTION_END = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
CALL_BEGIN, ARGUMENT_BEGIN, CALL_END = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)


def marks(tokenizer: Tokenizer, *names: str) -> frozenset[int]:
    """The ids of those of these control tokens that the tokenizer has."""
    ids = tokenizer.control_tokens
    return frozenset(ids[name] for name in names if name in ids)
