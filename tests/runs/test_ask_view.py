"""What is shown of an answer: on a terminal, in a pipe, as JSON."""

import json

import numpy as np
import pytest

from ragjax.runs.ask.asker import Reply, Source
from ragjax.runs.ask.spans import Span
from ragjax.runs.ask.view import coloured, format_reply, plain, reply_as_json, safe_text, verdict

HEBREW = "\u05d4\u05d7\u05ea\u05d5\u05dc \u05d4\u05d0\u05d3\u05d5\u05dd."


def reply_with(**changes):
    source = Source("d1", "Cats", "Red cats like fish. Dogs do not.", 0.25, 0.75, 0.5, -1.0)
    other = Source("d2", "Dogs", "Dogs like bones.", 0.75, 0.25, -0.1, -3.0)
    reply = Reply("q", "fish", -1.5, 2, -3.0, 1.5, True, (other, source), 1,
                  Span("text", 14, 18, "match", 1.0, None), (), 0.5, 0.8)  # fmt: skip
    return reply._replace(**changes)


def test_a_plain_reply_marks_the_span_and_lists_the_others():
    shown = format_reply(reply_with(), style=plain)
    assert shown.startswith(
        "fish\nprobability 0.22 (0.47 a token, 2 tokens); 0.5 s, explained after 0.8 s"
    )
    assert "Red cats like [[fish]]. Dogs do not." in shown
    assert "2. d1  Cats" in shown
    assert "p_R 0.25, posterior 0.75, without it the answer's log-prob changes by -0.50" in shown
    assert "d2  Dogs" in shown
    assert "\033" not in shown


def test_the_place_of_a_passage_is_shown_where_its_id_does_not_say_it():
    reply = reply_with()
    other, source = reply.sources
    for place, shown in (("a.pdf, page\033 3", "2. d1  Cats  [a.pdf, page\ufffd 3]\n"),
                         ("d1", "2. d1  Cats\n"), ("", "2. d1  Cats\n")):  # fmt: skip
        sources = (other, source._replace(source=place))
        assert shown in format_reply(reply._replace(sources=sources), style=plain)
        assert reply_as_json(reply._replace(sources=sources))["documents"][1]["source"] == place


def test_a_coloured_reply_highlights_the_span():
    shown = format_reply(reply_with(), style=coloured)
    assert "\033[1;30;43mfish\033[0m" in shown


def test_an_answer_that_no_document_helps_is_said_to_rest_on_none():
    shown = format_reply(reply_with(utility=-0.5, grounded=False), style=plain)
    assert "I found nothing relevant: the answer does not rest on the documents" in shown
    assert verdict(reply_with(sources=(), relied_on=None, span=None)) == "No document was read."


def test_an_answer_that_was_shown_is_not_repeated():
    assert not format_reply(reply_with(), style=plain, answer=False).startswith("fish")


def test_a_title_and_a_left_out_part_are_shown():
    title = format_reply(reply_with(span=Span("title", 0, 4, "match", 1.0, None)), style=plain)
    assert "[[Cats]]" in title
    part = Span("text", 0, 19, "left_out", None, 0.7)
    assert "without the marked part the answer's log-prob changes by -0.70 nats" in format_reply(
        reply_with(span=part), style=plain
    )


def test_json_has_the_span_as_offsets_into_the_text():
    value = reply_as_json(reply_with())
    chosen = next(d for d in value["documents"] if d["id"] == value["relied_on"])
    span = value["span"]
    assert chosen["text"][span["start"] : span["end"]] == span["text"] == "fish"
    assert value["probability"] == pytest.approx(np.exp(-1.5))
    assert json.dumps(value, allow_nan=False)


def test_documents_do_not_steer_the_terminal():
    assert "\033" not in safe_text("a\033[2Jb\x07\u009bc")
    assert safe_text("a\nb\tc") == "a b c"
    source = Source("d", "", "a \ue001fish\ue000 b", 1.0, 1.0, 0.0, 0.0)
    span = Span("text", 3, 7, "match", 1.0, None)
    shown = format_reply(reply_with(sources=(source,), relied_on=0, span=span), style=plain)
    assert "a \ufffd[[fish]]\ufffd b" in shown
    assert safe_text("\u202eabc") == "\u202eabc\u202c"
    assert safe_text("\u2067abc") == "\u2067abc\u2069"
    assert safe_text(HEBREW) == HEBREW
