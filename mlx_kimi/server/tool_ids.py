"""Ids of calls: opaque and unique for clients, the model's own in prompts.

Clients break when an id comes twice in a conversation, and a model stops calling when its own are
rewritten. So each call gets an id for the client, and what the model wrote comes back in its place.
"""

from __future__ import annotations

import json
import secrets
from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from typing import Any, NamedTuple

from mlx_kimi.chat.tool_calls import Call, name_in
from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.user_files import shown

MEMORY = 32 << 20  # characters of arguments that are remembered, in all
NO_ARGUMENTS = "{}"  # for the client, where the model wrote nothing


class _Written(NamedTuple):
    id: str  # as the model wrote it
    arguments: str  # likewise
    sent: str  # the arguments that the client got

    @property
    def size(self) -> int:
        return len(self.id) + len(self.arguments) + len(self.sent) + 200  # of the entry itself


def no_call(where: str, id: str) -> ApiError:
    """A result answers no call."""
    said = f"{where} must be the id of a call before it but is {shown(id)}"
    return ApiError(400, said, param=where, code="invalid_value")


def check_results(ids: Iterable[tuple[str, str | None, bool]]) -> None:
    """Refuse a result that answers no call before it.

    Args:
        ids: where each stands in the request, the id itself, and whether it is a call's.

    Raises:
        ApiError: 400.
    """
    calls = set[str | None]()
    for where, id, is_call in ids:
        if is_call:
            calls.add(id)
        elif id not in calls:
            raise no_call(where, id or "")


class ToolIds:
    """Which id of a client stands for which call. Used by several threads."""

    def __init__(self, memory: int = MEMORY) -> None:
        self._memory, self._size = memory, 0
        self._known: OrderedDict[str, _Written] = OrderedDict()
        self._turn = Lock()

    def new(self) -> str:
        """An id that no call has had."""
        return f"call_{secrets.token_hex(12)}"

    def remember(self, outward: str, id: str, arguments: str, sent: str) -> None:
        """Keep what the model wrote; what was used least recently goes for it."""
        written = _Written(id, arguments, sent)
        with self._turn:
            self._known[outward] = written
            self._size += written.size
            while self._size > self._memory:
                self._size -= self._known.popitem(last=False)[1].size

    def native(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """These messages as the model wrote its part of them.

        An unknown id is one of another run of the server: it becomes `functions.NAME:INDEX`, with
        the call's index in the conversation.

        Raises:
            ApiError: a result answers no call before it.
        """
        calls: dict[str, Call] = {}
        count = 0
        found = []
        for number, message in enumerate(messages):
            if message.get("tool_calls"):
                inward = []
                for call in message["tool_calls"]:
                    inward.append(self._inward(call, count))
                    calls[call["id"]] = inward[-1]
                    count += 1
                message = {**message, "tool_calls": [call.message for call in inward]}
            elif message["role"] == "tool":
                asked = calls.get(message["tool_call_id"])
                if asked is None:
                    raise no_call(f"messages[{number}].tool_call_id", message["tool_call_id"])
                message = {**message, "tool_call_id": asked.id, "name": asked.name}
            found.append(message)
        return found

    def _inward(self, call: dict[str, Any], index: int) -> Call:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        with self._turn:
            written = self._known.get(call["id"])
            if written:
                self._known.move_to_end(call["id"])
        if written and name_in(written.id) == name:
            is_same = _means(arguments) == _means(written.sent)
            return Call(written.id, written.arguments if is_same else arguments, True)
        is_native = call["id"].startswith("functions.") and name_in(call["id"]) == name
        return Call(call["id"] if is_native else f"functions.{name}:{index}", arguments, True)


def _means(arguments: str) -> Any:
    """What clients may spell in another way: JSON; else the text itself."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
