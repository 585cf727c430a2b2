"""What a server is asked is checked field by field, and what clients read is in their form."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ragjax.runs.serve.batches import ANSWER, Batches, Kind, Overloaded, ServeLimits
from ragjax.runs.serve.forms import (
    AskRequest,
    EmbeddingRequest,
    RequestError,
    SearchRequest,
    as_json,
)

SEARCH = {"queries": ["a", "b"], "topk": 3, "return_scores": True}
CHAT = {"model": "rag", "messages": [{"role": "user", "content": "hi"}]}
EMBED = {"model": "query_encoder", "input": "hi"}


def search(**changes):
    return SearchRequest.read(as_json(SEARCH | changes), usual=4, most=5)


def chat(**changes):
    return AskRequest.read_chat(as_json(CHAT | changes), most_tokens=16)


def embed(**changes):
    return EmbeddingRequest.read(as_json(EMBED | changes), most=5, dim=8)


def test_what_search_r1_sends_is_read():
    assert search() == (["a", "b"], 3, True)
    assert search(topk=None, return_scores=None) == (["a", "b"], 4, False)
    assert search(queries=["", "a"]).queries == ["", "a"]  # its model may write an empty query


def test_what_clients_of_openai_send_is_read():
    parts = [{"type": "text", "text": "who"}, {"type": "text", "text": "?"}]
    asked = chat(messages=[{"role": "user", "content": parts}], temperature=0.2, max_tokens=512)
    assert (asked.ask.question, asked.ask.span, asked.notes) == ("who\n?", False, ())
    system = {"role": "system", "content": "be brief"}
    asked = chat(messages=[system, *CHAT["messages"]], stream=True,
                 stream_options={"include_usage": True})  # fmt: skip
    assert asked.stream and asked.usage and "only the last message" in asked.notes[0]
    assert embed() == ("query_encoder", ["hi"], False)
    assert embed(input=["a", "b"], encoding_format="base64").base64


@pytest.mark.parametrize(
    ("read", "changes", "status", "words"),
    [
        (search, {"queries": "a"}, 400, "queries must be a list"),
        (search, {"queries": []}, 400, "at least one text"),
        (search, {"queries": [1]}, 400, "queries[0] must be a text, got a number"),
        (search, {"queries": ["a"] * 6}, 400, "queries has 6 texts, more than the 5"),
        (search, {"queries": ["\ud800"]}, 400, "queries[0] is no Unicode text"),
        (search, {"topk": 0}, 400, "topk must be a whole number from 1 to 100"),
        (search, {"topk": 101}, 400, "topk must be"),
        (search, {"topk": True}, 400, "topk must be"),
        (search, {"return_scores": 1}, 400, "return_scores must be true or false, got a number"),
        (search, {"top_k": 3}, 400, "no field 'top_k' here (did you mean 'topk'?)"),
        (chat, {"model": None}, 400, "model is missing"),
        (chat, {"model": "gpt-4"}, 404, "no model 'gpt-4' here; there is: rag"),
        (chat, {"messages": []}, 400, "messages must be a list"),
        (chat, {"messages": ["hi"]}, 400, "a message must be an object, got a text"),
        (chat, {"messages": [{"role": "assistant", "content": "x"}]}, 400, "of the role user"),
        (chat, {"messages": [{"role": "user", "content": " "}]}, 400, "is empty"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts"),
        (chat, {"n": 2}, 400, "n must be 1"),
        (chat, {"max_tokens": 5}, 400, "start it with --max_new_tokens 5"),
        (chat, {"tools": []}, 400, "no field 'tools' here"),
        (embed, {"model": "rag"}, 404, "there is: query_encoder, doc_encoder"),
        (embed, {"input": [[1, 2]]}, 400, "input[0] must be a text, got a list"),
        (embed, {"input": ""}, 400, "input[0] is empty"),
        (embed, {"dimensions": 4}, 400, "dimensions must be 8"),
        (embed, {"encoding_format": "int8"}, 400, "encoding_format"),
    ],
)
def test_a_wrong_field_is_one_sentence(read, changes, status, words):
    with pytest.raises(RequestError) as raised:
        read(**changes)
    assert raised.value.status == status and words in str(raised.value)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff{}", b'{"question": NaN}', b"[" * 100_000, b"null"]
)
def test_a_body_that_is_no_object_is_one_sentence(body):
    with pytest.raises(RequestError, match="JSON") as raised:
        AskRequest.read(body)
    assert raised.value.status == 400


def test_lone_surrogates_of_a_corpus_are_sent_as_json():
    assert json.loads(as_json({"text": "\ud800é"})) == {"text": "\ud800é"}


# The queue.


def run_batches(work, compute, **limits):
    """Runs `work(batches)` beside the loop of `Batches`."""

    async def main():
        with ThreadPoolExecutor(1) as pool:
            batches = Batches(compute, ServeLimits(**limits), pool)
            task = asyncio.create_task(batches.run())
            try:
                return await asyncio.wait_for(work(batches), 20)
            finally:
                task.cancel()

    return asyncio.run(main())


def test_what_waits_is_computed_together_up_to_a_batch_and_kinds_take_turns():
    calls = []

    def compute(kind, items):
        calls.append((kind.what, list(items)))
        return [item * 10 for item in items]

    async def work(batches):
        put = [batches.put(Kind("search", 10), list(range(5))), batches.put(Kind(ANSWER), [7, 8])]
        return [await asyncio.gather(*futures) for futures in put]

    assert run_batches(work, compute, batch=3) == [[0, 10, 20, 30, 40], [70, 80]]
    assert calls == [
        ("search", [0, 1, 2]), (ANSWER, [7]), ("search", [3, 4]), (ANSWER, [8]),
    ]  # fmt: skip


def test_an_item_that_fails_fails_alone():
    def compute(kind, items):
        if 1 in items:
            raise KeyError(1)
        return items

    async def work(batches):
        return await asyncio.gather(*batches.put(Kind("search"), [0, 1, 2]), return_exceptions=True)

    zero, one, two = run_batches(work, compute)
    assert (zero, two) == (0, 2) and isinstance(one, KeyError)


def test_more_than_may_wait_is_refused_as_a_whole_and_what_is_cancelled_is_not_computed():
    started, go_on, seen = threading.Event(), threading.Event(), []

    def compute(kind, items):
        started.set()
        go_on.wait(20)
        seen.extend(items)
        return items

    async def work(batches):
        first = batches.put(Kind(ANSWER), [0])
        await asyncio.to_thread(started.wait, 20)
        put = batches.put(Kind(ANSWER), [1, 2])
        with pytest.raises(Overloaded):
            batches.put(Kind(ANSWER), [3])
        with pytest.raises(Overloaded):
            batches.put(Kind("search"), [1] * 5)
        assert batches.waiting(answers=True) == 2 and batches.waiting(answers=False) == 0
        put[0].cancel()
        go_on.set()
        assert await first[0] == 0 and await put[1] == 2

    run_batches(work, compute, answers=2, waiting=4)
    assert seen == [0, 2]


@pytest.mark.parametrize("name", ["batch", "waiting", "answers", "body_kb", "watch_seconds"])
def test_limits_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"^{name} must be at least"):
        ServeLimits(**{name: 0})
