"""The ids of a chat that grows at its end: what is new costs its own length, not the chat's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlx_kimi.errors import KimiError
from mlx_kimi.text.chat_template import check_messages
from mlx_kimi.text.template_renderer import Rendered
from mlx_kimi.text.tokenizer import Encoded, Tokenizer
from mlx_kimi.user_files import Json


class _Known(NamedTuple):
    """A chat as it was rendered last."""

    messages: list[Json]
    variables: Mapping[str, Json]  # protected, the first message among them
    first: list[Json]
    rendered: Rendered
    encoded: Encoded


class ChatText:
    """Gives the ids that `Tokenizer.apply_chat_template` gives.

    A template that is proven to go message by message renders the new ones alone, and what follows
    them; any other renders all of them each time. Ids are kept up to the last control token before
    the text differs.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Json = None) -> None:
        self._tokenizer, self._tools = tokenizer, tools
        self._known: _Known | None = None

    def ids(self, kept: int, new: Sequence[Mapping[str, Json]]) -> Sequence[int]:
        """Of a chat whose first `kept` messages are those of the call before, and `new` after them.

        A call that raised something leaves no messages.

        Raises:
            KimiError: as of `apply_chat_template`.
        """
        known, self._known = self._known, None
        messages: list[Json] = []
        if known:
            messages = known.messages
            del messages[kept:]
        assert len(messages) == kept, "these were given before"
        messages += new
        made = self._grown(known, kept, new) if known and kept else None
        self._known = made or self._whole(known, messages)
        return self._known.encoded.ids

    def _grown(self, known: _Known, kept: int, new: Sequence[Json]) -> _Known | None:
        """None where it is not certain what all messages would give."""
        try:
            check_messages(new)
        except KimiError:  # which is told with the message's number
            return None
        tokenizer, mark = self._tokenizer, known.encoded.mark
        more = tokenizer.control.protect_more(new, mark)
        if more is None:
            return None
        rendered = tokenizer.chat_template.continued(
            known.rendered, known.variables, [*known.first, *more], kept
        )
        if rendered is None:
            return None
        # A token might begin before the new text and end in it.
        certain = known.rendered.starts[kept] - tokenizer.control.longest
        same = bisect_right(known.encoded.ends, certain)
        encoded = tokenizer.encode_after(known.encoded, same, rendered.text, mark)
        return known._replace(rendered=rendered, encoded=encoded)

    def _whole(self, known: _Known | None, messages: list[Json]) -> _Known:
        tokenizer = self._tokenizer
        check_messages(messages, self._tools)
        variables, mark = tokenizer.protect({"messages": messages, "tools": self._tools})
        variables["add_generation_prompt"] = True
        rendered = tokenizer.chat_template.rendered(variables)
        before = known.encoded if known else Encoded()
        same = before.shared(rendered.text, mark, tokenizer.control.longest)
        encoded = tokenizer.encode_after(before, same, rendered.text, mark)
        first = variables.pop("messages")[:1]
        return _Known(messages, variables, first, rendered, encoded)
