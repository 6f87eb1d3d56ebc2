"""What can be chosen, in pairs: each pair of choices is met by some case, and changes no token.

Budget, 8-bit latents, drafts, batches, states from the disk, tools and schemas: an answer is that
of one text alone in memory, with the same latents, tools and schema. In a batch a text has drafts
once it runs alone.
"""

from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations, product
from pathlib import Path

import pytest

from mlx_kimi import load
from mlx_kimi.bundled import pocket_folder
from mlx_kimi.chat.conversation import Conversation
from mlx_kimi.chat.session import Session
from mlx_kimi.constraints.constraint import constraint_for
from mlx_kimi.generation.generate import prompt_ids, stream_generate
from mlx_kimi.generation.token_state import TokenState
from mlx_kimi.loading.budget import Budget
from mlx_kimi.server.engine import Engine, Request, Started, Token
from mlx_kimi.server.state_store import LEAST_TOKENS, StateStore
from tests.server import WEATHER

TOKENS, CONTEXT = 24, 1024
WORDS = "amber door code river stone maple cloud seven north piano"
FIRST = {"role": "user", "content": f"Remember: {' '.join([WORDS] * 12)}. What is 12 + 30?"}
SECOND = {"role": "user", "content": "What is the weather in Paris?"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "known": {"type": "boolean"}},
    "required": ["city", "known"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Case:
    budget: bool
    latents: bool  # of 8 bits
    drafts: bool
    batch: bool
    resume: bool
    tools: bool
    schema: bool

    @property
    def bits(self) -> int | None:
        return 8 if self.latents else None

    @property
    def offered(self) -> list[dict] | None:
        return [WEATHER] if self.tools else None

    @property
    def json_schema(self) -> dict | None:
        return SCHEMA if self.schema else None

    def __str__(self) -> str:
        chosen = [each.name for each in fields(self) if getattr(self, each.name)]
        return "-".join(chosen) or "nothing"


# An orthogonal array: of any two choices, all four pairs come twice.
CASES = [
    Case(a, b, c, a ^ b, a ^ c, b ^ c, a ^ b ^ c) for a, b, c in product([False, True], repeat=3)
]


def test_every_pair_of_choices_is_met() -> None:
    names = [each.name for each in fields(Case)]
    for one, other in combinations(names, 2):
        met = {(getattr(case, one), getattr(case, other)) for case in CASES}
        assert len(met) == 4, (one, other)


@cache
def plain(bits: int | None, tools: bool, schema: bool) -> tuple[list[int], list[int]]:
    """The tokens of both answers, of one text in memory."""
    case = Case(False, bits == 8, False, False, False, tools, schema)
    model, tokenizer = load()
    state = TokenState(model, bits, snapshot_every=None)
    return answers(case, model, tokenizer, state, lambda state, said: state)


def answers(case, model, tokenizer, state, between):
    """Two turns of a chat, the second with what the case asks for."""
    how = {"max_tokens": TOKENS, "speculate": "auto" if case.drafts else "off"}
    first = [c.token for c in stream_generate(model, tokenizer, [FIRST], state=state, **how)]
    said = tokenizer.decode([token for token in first if token not in tokenizer.stop_ids])
    state = between(state, said)
    messages = [FIRST, {"role": "assistant", "content": said}, SECOND]
    how |= {"tools": case.offered, "json_schema": case.json_schema}
    return first, [c.token for c in stream_generate(model, tokenizer, messages, state=state, **how)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_answers_as_one_text_in_memory(case: Case, tmp_path: Path) -> None:
    budget = Budget(2 * 10**9, CONTEXT, case.bits) if case.budget else None
    model, tokenizer = load(pocket_folder(), budget)
    if case.batch:
        found = in_a_batch(case, model, tokenizer, tmp_path)
    else:

        def between(state: TokenState, said: str) -> TokenState:
            if not case.resume:
                return state
            conversation = Conversation()
            conversation.say(FIRST["content"])
            conversation.reply({"role": "assistant", "content": said})
            session = Session(tmp_path / "session", {"states": 1}).open()
            session.save(conversation, state)
            session.close()
            again = TokenState(model, case.bits, snapshot_every=None)
            assert (
                Session(tmp_path / "session", {"states": 1}).load(again).messages
                == conversation.messages
            )
            assert len(again.ids) > LEAST_TOKENS
            return again

        state = TokenState(model, case.bits, snapshot_every=None)
        found = answers(case, model, tokenizer, state, between)
    assert found == plain(case.bits, case.tools, case.schema)


def in_a_batch(case, model, tokenizer, folder: Path):
    """Both turns as requests to an engine, beside another text."""

    def engine() -> Engine:
        store = StateStore(folder / "states", {}, 1 << 30, model, case.bits)
        drafts = "auto" if case.drafts else "off"
        made = Engine(
            model, latent_bits=case.bits, prefill_slice=128, store=store, speculate=drafts
        )
        made.start()
        return made

    def ask(engine: Engine, messages, tools=None, schema=None) -> tuple[int, list[int]]:
        ids = tuple(prompt_ids(model, tokenizer, messages, tools))
        constraint = constraint_for(tokenizer, json_schema=schema, tools=tools)
        request = Request(
            ids, max_tokens=TOKENS, stop_ids=tokenizer.stop_ids, constraint=constraint
        )
        other = engine.submit(Request(ids[:40], max_tokens=TOKENS))
        events = list(engine.submit(request))
        list(other)
        (began,) = [event for event in events if isinstance(event, Started)]
        return began.cached_tokens, [event.id for event in events if isinstance(event, Token)]

    running = engine()
    try:
        _, first = ask(running, [FIRST])
        if case.resume:
            running.stop(10)
            running = engine()
        said = tokenizer.decode([token for token in first if token not in tokenizer.stop_ids])
        messages = [FIRST, {"role": "assistant", "content": said}, SECOND]
        known, second = ask(running, messages, case.offered, case.json_schema)
        assert case.tools or known > LEAST_TOKENS  # (tools stand before all messages)
    finally:
        running.stop(10)
    return first, second
