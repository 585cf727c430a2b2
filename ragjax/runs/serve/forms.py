"""Requests and responses as JSON: what is asked is checked field by field, before any work.

The forms are those that clients have: of Search-R1's retrieval server, and of OpenAI.

References:
    Jin et al., Search-R1: Training LLMs to Reason and Leverage Search Engines with Reinforcement
    Learning, 2025, `search_r1/search/retrieval_server.py`.
"""

import base64
import json
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ragjax.runs.ask.view import reply_as_json
from ragjax.runs.serve.service import ENCODERS, MOST_DOCUMENTS, Ask, Explained, Found, Told
from ragjax.storage import nearest_name

CHAT_MODEL = "rag"
MODELS = (CHAT_MODEL, *ENCODERS)
# Of OpenAI: what a request may have beside the fields that are read here. Decoding is greedy, so
# none of them changes an answer.
_WITHOUT_EFFECT = (
    *("temperature", "top_p", "seed", "user", "metadata", "store", "service_tier"),
    *("frequency_penalty", "presence_penalty", "stream_options", "safety_identifier"),
)


class RequestError(Exception):
    """A request that cannot be answered: its status and a sentence that the client is told."""

    def __init__(self, status: int, message: str, *, retry_after: int = 0) -> None:
        """Takes the HTTP status, and after how many seconds the same may be asked again."""
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def as_json(value: Any) -> bytes:
    """Returns JSON in UTF-8; what is no Unicode text in it is escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def error_as_json(error: RequestError) -> dict[str, Any]:
    """Returns an error in the form of OpenAI."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.status}}


def read_fields(
    body: bytes, known: Collection[str], ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Returns the fields of a JSON object; those that are null are left out.

    Args:
        body: Of a request.
        known: Names that it may have.
        ignored: Others that it may have.

    Raises:
        RequestError: It is no JSON object, or has a field of another name.
    """
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON in UTF-8 ({error})") from error
    if not isinstance(values, dict):
        raise RequestError(400, f"the body must be a JSON object, got {_kind(values)}")
    for name in values.keys() - {*known, *ignored}:
        near = nearest_name(name, sorted(known))
        hint = f" (did you mean {near!r}?)" if near else ""
        raise RequestError(400, f"no field {name[:80]!r} here{hint}; known: {', '.join(known)}")
    return {name: values[name] for name in known if values.get(name) is not None}


class SearchRequest(NamedTuple):
    """What /search is asked."""

    queries: list[str]
    k: int
    scores: bool

    @classmethod
    def read(cls, body: bytes, *, usual: int, most: int) -> "SearchRequest":
        """Reads a request.

        Args:
            body: JSON.
            usual: Documents where it says nothing.
            most: Queries.

        Raises:
            RequestError: A field is missing or wrong.
        """
        fields = read_fields(body, ("queries", "topk", "return_scores"))
        # A trainer's model may write an empty query, which must not cost it the whole batch.
        queries = _texts(fields, "queries", most, blank=True)
        k = _whole(fields, "topk", usual, most=MOST_DOCUMENTS)
        return cls(queries, k, _truth(fields, "return_scores", False))


def search_response(told: Sequence[Told], *, scores: bool) -> dict[str, Any]:
    """Returns documents in the form of Search-R1; `contents` has the title on its first line."""

    def document(found: Found) -> dict[str, Any]:
        passage = found.passage
        title = " ".join((passage.title or "").split())
        shown = {"id": passage.id, "contents": f"{title}\n{passage.text}"}
        return {"document": shown, "score": found.score} if scores else shown

    return {"result": [[document(found) for found in each.value] for each in told]}


class AskRequest(NamedTuple):
    """What /ask, or a chat, is asked."""

    ask: Ask
    stream: bool
    notes: tuple[str, ...] = ()  # on what of the request was not read
    usage: bool = False  # a stream ends with the tokens that it took

    @classmethod
    def read(cls, body: bytes) -> "AskRequest":
        """Reads a request of /ask.

        Raises:
            RequestError: A field is missing or wrong.
        """
        fields = read_fields(body, ("question", "answer", "explain", "stream"))
        question = _text(fields.get("question"), "question")
        given = _text(fields["answer"], "answer") if "answer" in fields else None
        ask = Ask(question=question, answer=given, span=_truth(fields, "explain", True))
        return cls(ask, _truth(fields, "stream", False))

    @classmethod
    def read_chat(cls, body: bytes, *, most_tokens: int) -> "AskRequest":
        """Reads a request of /v1/chat/completions.

        Args:
            body: JSON.
            most_tokens: Of an answer.

        Raises:
            RequestError: A field is missing or wrong, or asks for what this server cannot do.
        """
        known = ("model", "messages", "stream", "n", "max_tokens", "max_completion_tokens")
        fields = read_fields(body, (*known, "stream_options"), _WITHOUT_EFFECT)
        check_model(fields.get("model"), (CHAT_MODEL,))
        if _whole(fields, "n", 1) != 1:
            raise RequestError(400, "n must be 1: decoding is greedy, one answer is written")
        for name in ("max_tokens", "max_completion_tokens"):
            if (asked := _whole(fields, name, most_tokens)) < most_tokens:
                raise RequestError(
                    400,
                    f"{name} {asked}: an answer of this server has up to {most_tokens} tokens; ask"
                    f" for as many, or start it with --max_new_tokens {asked}",
                )
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RequestError(400, "messages must be a list with at least one message")
        for message in messages:
            if not isinstance(message, dict):
                raise RequestError(400, f"a message must be an object, got {_kind(message)}")
        if messages[-1].get("role") != "user":
            raise RequestError(400, "the last of the messages must be of the role user")
        question = _text(_content(messages[-1].get("content")), "content of the last message")
        notes = ("only the last message is read: each question is answered on its own",)
        options = fields.get("stream_options", {})
        usage = isinstance(options, dict) and options.get("include_usage") is True
        asked = Ask(question=question, span=False)
        return cls(asked, _truth(fields, "stream", False), notes[: len(messages) - 1], usage)


def ask_response(told: Told, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Returns an answer as `ask.py --json` does, and the generation that it is of."""
    explained: Explained = told.value
    found = reply_as_json(explained.reply)
    return found | {"notes": [*found["notes"], *notes], "generation": told.generation}


class Chat:
    """One chat completion, whole or in pieces, in the form of OpenAI."""

    def __init__(self) -> None:
        """Gives it an id and a time."""
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, told: Told, notes: Sequence[str]) -> dict[str, Any]:
        """Returns the response; `rag` has the sources and the rest of `ask_response`."""
        explained: Explained = told.value
        message = {"role": "assistant", "content": explained.reply.answer}
        return self._response("chat.completion", {"message": message, **_finish(explained)}) | {
            "usage": _usage(explained),
            "rag": ask_response(told, notes),
        }

    def piece(self, text: str) -> dict[str, Any]:
        """Returns a chunk with some more text."""
        delta = {"role": "assistant", "content": text}
        return self._response("chat.completion.chunk", {"delta": delta, "finish_reason": None})

    def last(self, told: Told, notes: Sequence[str], *, usage: bool) -> list[dict[str, Any]]:
        """Returns the chunks that end a stream; `rag` as in `whole`."""
        explained: Explained = told.value
        kind = "chat.completion.chunk"
        ended = self._response(kind, {"delta": {}, **_finish(explained)})
        ended["rag"] = ask_response(told, notes)
        if not usage:
            return [ended]
        return [ended, self._response(kind) | {"choices": [], "usage": _usage(explained)}]

    def _response(self, kind: str, choice: Mapping[str, Any] | None = None) -> dict[str, Any]:
        about = {"id": self._id, "object": kind, "created": self._created, "model": CHAT_MODEL}
        return about | {"choices": [{"index": 0, "logprobs": None, **(choice or {})}]}


class EmbeddingRequest(NamedTuple):
    """What /v1/embeddings is asked."""

    encoder: str
    texts: list[str]
    base64: bool

    @classmethod
    def read(cls, body: bytes, *, most: int, dim: int) -> "EmbeddingRequest":
        """Reads a request.

        Args:
            body: JSON.
            most: Texts.
            dim: Size of an embedding.

        Raises:
            RequestError: A field is missing or wrong.
        """
        known = ("model", "input", "encoding_format", "dimensions")
        fields = read_fields(body, known, ("user",))
        model = check_model(fields.get("model"), ENCODERS)
        form = fields.get("encoding_format", "float")
        if form not in ("float", "base64"):
            raise RequestError(400, "encoding_format must be 'float' or 'base64'")
        if _whole(fields, "dimensions", dim) != dim:
            raise RequestError(400, f"dimensions must be {dim}, as the encoder has, or left out")
        if isinstance(fields.get("input"), str):
            fields["input"] = [fields["input"]]
        return cls(model, _texts(fields, "input", most), form == "base64")


def embedding_response(
    request: EmbeddingRequest, told: Sequence[Told], num_tokens: int
) -> dict[str, Any]:
    """Returns embeddings in the form of OpenAI."""

    def shown(embedding: np.ndarray) -> str | list[float]:
        if request.base64:
            return base64.b64encode(np.asarray(embedding, "<f4").tobytes()).decode("ascii")
        return [float(value) for value in embedding]

    return {
        "object": "list",
        "model": request.encoder,
        "data": [
            {"object": "embedding", "index": place, "embedding": shown(each.value)}
            for place, each in enumerate(told)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def check_model(name: Any, known: Sequence[str]) -> str:
    """Returns the model of a request.

    Raises:
        RequestError: There is no model of this name, or not for this use.
    """
    if name is None:
        raise RequestError(400, f"model is missing; here it is one of: {', '.join(known)}")
    if name not in known:
        shown = str(name)[:80]
        raise RequestError(404, f"no model {shown!r} here; there is: {', '.join(known)}")
    return name


def _finish(explained: Explained) -> dict[str, Any]:
    return {"finish_reason": "stop" if explained.ended else "length"}


def _usage(explained: Explained) -> dict[str, Any]:
    read, written = explained.prompt_tokens, explained.reply.num_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _content(content: Any) -> Any:
    """Returns the text of a message, whose parts may stand in a list."""
    if not isinstance(content, list):
        return content
    found = (part.get("text") for part in content if isinstance(part, dict))
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(content):
        raise RequestError(400, "a message may have parts of the type text, and no others")
    return "\n".join(texts)


def _texts(fields: Mapping[str, Any], name: str, most: int, *, blank: bool = False) -> list[str]:
    values = fields.get(name)
    if not isinstance(values, list) or not values:
        raise RequestError(400, f"{name} must be a list with at least one text")
    if len(values) > most:
        raise RequestError(
            400, f"{name} has {len(values):,} texts, more than the {most:,} of --limits.waiting"
        )
    return [_text(value, f"{name}[{at}]", blank=blank) for at, value in enumerate(values)]


def _text(value: Any, name: str, *, blank: bool = False) -> str:
    if value is None:
        raise RequestError(400, f"{name} is missing")
    if not isinstance(value, str):
        raise RequestError(400, f"{name} must be a text, got {_kind(value)}")
    if not blank and not value.strip():
        raise RequestError(400, f"{name} is empty; write at least one word")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(400, f"{name} is no Unicode text ({error.reason})") from error
    return value


def _whole(fields: Mapping[str, Any], name: str, usual: int, *, most: int = 2**31) -> int:
    value = fields.get(name, usual)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        upper = f" to {most:,}" if most < 2**31 else " on"
        raise RequestError(400, f"{name} must be a whole number from 1{upper}")
    return value


def _truth(fields: Mapping[str, Any], name: str, usual: bool) -> bool:
    value = fields.get(name, usual)
    if not isinstance(value, bool):
        raise RequestError(400, f"{name} must be true or false, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else "a number")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
