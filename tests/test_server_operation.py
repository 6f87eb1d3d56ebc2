"""How a server is watched and how it stops: metrics, logs, keepalive, progress, an orderly end."""

import json
import threading
import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlx_kimi.errors import KimiError
from mlx_kimi.server.engine import Status
from mlx_kimi.server.record import LONGEST
from tests.server import JSON, WEATHER, Running, Scripted, failed, serving, serving_pocket, until

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


def counted(running: Running) -> dict[str, float]:
    """The samples of /metrics, by name; of those with labels the sum."""
    found: dict[str, float] = {}
    text = running.asking.get("/metrics").text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_counters_are_the_sums_of_usages() -> None:
    usages = []
    with serving(Scripted(["One, two.<|im_end|>", "Three"])) as running:
        usages.append(running.chat().json()["usage"])
        usages.append(running.chat(n=2, max_tokens=1).json()["usage"])
        told = {**HI, "stream_options": {"include_usage": True}}
        usages.append(running.events(CHAT, told)[-1]["usage"])
        prompts = {"prompt": ["one", "two three"], "n": 2}
        usages.append(running.post("/v1/completions", prompts).json()["usage"])
        running.chat(temperature=-1)
        until(lambda: len(running.lines) == 5)
        metrics, lines = counted(running), running.lines[:5]
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    for kind in ("prompt", "completion"):
        total = sum(usage[f"{kind}_tokens"] for usage in usages)
        assert total == sum(line.get(f"{kind}_tokens", 0) for line in lines) > 0
        assert metrics[f"mlx_kimi_{kind}_tokens_total"] == total
    assert metrics["mlx_kimi_cached_tokens_total"] == cached > 0
    assert metrics["mlx_kimi_requests_total"] == 5
    assert metrics["mlx_kimi_request_seconds_count"] == 5
    assert metrics["mlx_kimi_first_token_seconds_count"] == 4
    assert metrics["mlx_kimi_prefill_slice_tokens"] == 512


def test_a_line_of_the_log_tells_of_a_request_and_not_what_it_says() -> None:
    with serving(Scripted(["An answer.<|im_end|>"])) as running:
        answer = running.chat("A secret.", user="me")
        running.post(CHAT, {"messages": [{"role": "user", "content": 7, "name": "A secret."}]})
        running.post(CHAT, {"messages": [{"role": "A secret.", "content": "A secret."}]})
        running.asking.get("/" + "x" * 2000, headers={"user-agent": "\x1b[31m" + "y" * 2000})
        until(lambda: len(running.lines) == 4)
        first, second, third, fourth = running.lines
        text = running.log.getvalue()
    assert first["id"] == answer.headers["x-request-id"]
    assert first["status"] == 200 and first["request"] == f"POST {CHAT}"
    assert first["client"].startswith("127.0.0.1 python-httpx/")
    assert first["why"] == "a script said so" and first["cached_tokens"] == 2
    assert first["finish"] == ["stop"] and first["completion_tokens"] > 0
    assert 0 <= first["started_seconds"] <= first["first_token_seconds"] <= first["seconds"]
    assert second["error"] == "invalid_value messages[0].content"
    assert third["error"] == "invalid_value messages[0].role"
    assert len(fourth["client"]) <= LONGEST and len(fourth["request"]) <= LONGEST + 10
    assert "secret" not in text and "answer" not in text and "\x1b" not in text


def test_prompts_are_logged_where_that_is_asked_for() -> None:
    call = '<|tool_call_begin|>get_weather:0<|tool_call_argument_begin|>{"city":"P"}'
    with serving(Scripted([f"Hm.{call}<|tool_call_end|>"]), log_prompts=True) as running:
        running.chat("A question.", tools=[WEATHER])
        running.events(CHAT, {**HI, "tools": [WEATHER]})
        until(lambda: len(running.lines) == 2)
        lines = running.lines
    assert lines[0]["asked"]["messages"] == [{"role": "user", "content": "A question."}]
    for line in lines:
        (said,) = line["answered"]
        assert said["text"] == "Hm." and said["calls"][0]["function"]["name"] == "get_weather"


def stream_times(running: Running, body: dict[str, Any]) -> list[tuple[float, str]]:
    """The pieces of a stream, with the seconds when they came."""
    began = time.monotonic()
    with running.asking.stream("POST", CHAT, json={**body, "stream": True}) as response:
        return [(time.monotonic() - began, piece) for piece in response.iter_text()]


def test_a_stream_that_says_nothing_sends_comments_by_the_clock() -> None:
    """While the prompt is read; and while tokens come that say nothing yet."""
    silent = Scripted(["Hello."], before=1.0)
    with serving(silent, keepalive=0.2) as running:
        pieces = stream_times(running, HI)
    comments = [at for at, piece in pieces if piece.startswith(":")]
    assert len(comments) >= 3
    held = Scripted(["<|tool_calls_section_begin|><|tool_call_begin|>" + "a" * 40], between=0.05)
    with serving(held, keepalive=0.2) as running:
        pieces = stream_times(running, {**HI, "tools": [WEATHER]})
    assert sum(piece.startswith(":") for _, piece in pieces) >= 3


def test_progress_is_told_to_those_who_ask() -> None:
    with serving(Scripted(["Hello."])) as running:
        asked = running.events(CHAT, {**HI, "return_progress": True})
        running.events("/v1/completions", {"prompt": "Hi there", "return_progress": True})
        plain = running.events(CHAT, HI)
    told = [event["prompt_progress"] for event in asked if "prompt_progress" in event]
    total = told[0]["total"]
    assert [(each["processed"], each["cache"]) for each in told] == [(2, 2), (total, 2)]
    assert not [event for event in plain if "prompt_progress" in event]
    assert [r.wants_progress for r in running.engine.requests] == [True, True, False]


def test_health_and_readiness() -> None:
    with serving(Scripted()) as running:
        for path in ("/health", "/ready"):
            assert running.asking.get(path).status_code == 200
            assert running.asking.head(path).status_code == 200
        running.service.is_stopping = True
        assert running.asking.get("/health").status_code == 200
        assert running.asking.get("/ready").json()["status"] == "stopping"
        assert running.asking.get("/ready").status_code == running.chat().status_code == 503
        running.engine.status = lambda: Status("failed", "the GPU is gone", 1, 0, 0, 0, 0, 0, 0)
        answer = running.asking.get("/health")
        assert answer.status_code == 503 and answer.json()["failure"] == "the GPU is gone"


def test_health_is_answered_while_texts_are_read() -> None:
    """A template may take seconds: it is rendered beside the loop."""
    begun, over = threading.Event(), threading.Event()
    with serving(Scripted()) as running:
        template = running.service.tokenizer.chat_template
        render = template.render

        def slow(*args: Any, **kwargs: Any) -> str:
            begun.set()
            assert over.wait(60)
            return render(*args, **kwargs)

        template.render = slow  # type: ignore[method-assign]
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=ask_apart, args=(running, HI, answers))
        try:
            thread.start()
            assert begun.wait(10)
            assert running.asking.get("/health").status_code == 200
            assert not answers
        finally:
            over.set()
            thread.join()
            del template.render
    assert answers[0].status_code == 200


def ask_apart(running: Running, body: dict[str, Any], answers: list[httpx.Response]) -> None:
    """Ask on a connection that outlives the server."""
    with running.client() as client:
        answers.append(client.post(CHAT, json=body))


def asking_apart(
    running: Running, engine: Scripted, stream: bool, answers: list[httpx.Response]
) -> threading.Thread:
    """A thread that asks so, once the engine has its request."""
    thread = threading.Thread(target=ask_apart, args=(running, {**HI, "stream": stream}, answers))
    thread.start()
    until(lambda: engine.tickets)
    return thread


@pytest.mark.parametrize("stream", [False, True])
def test_answers_may_end_when_the_server_stops(stream: bool) -> None:
    engine = Scripted(["One, two."], between=0.05)
    answers: list[httpx.Response] = []
    with serving(engine, patience=10) as running:
        thread = asking_apart(running, engine, stream, answers)
    thread.join()
    assert answers[0].status_code == 200
    assert "[DONE]" in answers[0].text if stream else answers[0].json()["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_take_too_long_end_in_an_error(stream: bool) -> None:
    engine = Scripted(["One, two."], between=60)
    answers: list[httpx.Response] = []
    with serving(engine, patience=0.2) as running:
        thread = asking_apart(running, engine, stream, answers)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    thread.join()
    assert engine.tickets[0].is_cancelled
    if stream:
        error = json.loads(answers[0].text.split("data: ")[-1])["error"]
    else:
        assert answers[0].status_code == 503
        error = answers[0].json()["error"]
    assert error["code"] == "stopping"


def test_a_fault_is_told_to_the_log_alone() -> None:
    with serving(Scripted()) as running:
        running.engine.status = lambda: 1 / 0
        answer = running.asking.get("/health")
        until(lambda: running.lines)
        (line,) = running.lines
        assert running.asking.get("/v1/models").status_code == 200
    assert answer.status_code == 500 and "ZeroDivisionError" not in answer.text
    assert line["id"] in answer.text and "ZeroDivisionError" in line["error"]


def test_what_fails_on_the_way_is_logged() -> None:
    with serving(Scripted([failed(KimiError("the GPU is gone"))])) as running:
        running.events(CHAT, HI)
        until(lambda: running.lines)
        assert running.lines[0]["error"] == "engine_failed"
        assert running.lines[0]["completion_tokens"] == 1


@pytest.mark.slow
def test_the_pocket_model_says_the_same_in_a_stream() -> None:
    body = {**HI, "logprobs": True, "top_logprobs": 3, "temperature": 1, "seed": 5, "n": 2}
    with serving_pocket() as running:
        whole = running.post(CHAT, body).json()
        events = running.events(CHAT, {**body, "stream_options": {"include_usage": True}})
    for choice in whole["choices"]:
        parts = [c for e in events for c in e["choices"] if c["index"] == choice["index"]]
        text = "".join(part["delta"].get("content", "") for part in parts)
        tokens = [
            token for part in parts if part["logprobs"] for token in part["logprobs"]["content"]
        ]
        assert text == choice["message"]["content"]
        assert len(tokens) == len(choice["logprobs"]["content"]) > 0
        for ours, other in zip(tokens, choice["logprobs"]["content"], strict=True):
            assert ours["bytes"] == other["bytes"] and len(ours["top_logprobs"]) == 3
            # The prompt's state comes from the tree here, and is the same; rows are summed alike.
            assert ours["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
    counts = ("prompt_tokens", "completion_tokens")
    assert [events[-1]["usage"][each] for each in counts] == [
        whole["usage"][each] for each in counts
    ]


@pytest.mark.slow
def test_the_pocket_model_answers_several_at_once() -> None:
    questions = {f"What is {n} + 58?": f"{n} + 58 = {n + 58}." for n in (347, 12, 5, 90)}
    said: dict[str, str] = {}
    with serving_pocket() as running:

        def ask(question: str) -> None:
            with running.client() as client:
                body = {"messages": [{"role": "user", "content": question}]}
                answer = client.post(CHAT, json=body, headers=JSON).json()
                said[question] = answer["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(each,)) for each in questions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: len(running.lines) == len(questions))
        lines = running.lines
        metrics = counted(running)
    assert said == questions
    assert (
        sum(line["completion_tokens"] for line in lines)
        == (metrics["mlx_kimi_engine_generated_tokens_total"])
    )
