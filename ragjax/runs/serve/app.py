"""The server: routes, limits, errors, streams.

    run_server(Service(Source(folder, prepare), ServeLimits()), listen("127.0.0.1", 8000))

Needs `pip install "ragjax[serve]"`. There is no authentication: it is for this machine, or for
a proxy that has one.
"""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from ragjax.data import encode_texts
from ragjax.runs.serve import forms, page
from ragjax.runs.serve.batches import Overloaded
from ragjax.runs.serve.forms import MODELS, RequestError
from ragjax.runs.serve.service import ENCODERS, MOST_DOCUMENTS, NotReady, Service, Told

_LOG = logging.getLogger(__name__)
# Connections at once; more are told to come back.
_CONNECTIONS = 1024
# Seconds after which a client that was refused may try again.
_RETRY = 2
# Seconds after the signal in which answers have to be on their way.
_ENDING_SECONDS = 60
# Seconds that a body may take to arrive.
_BODY_SECONDS = 30
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")


def check_installed() -> None:
    """Raises ImportError, with the remedy, where the server's packages are missing."""
    try:
        import starlette  # noqa: F401  (looked for)
        import uvicorn  # noqa: F401  (looked for)
    except ImportError as error:
        raise ImportError(f'{error}: pip install "ragjax[serve]"') from error


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches a host name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed_hosts(address: str) -> tuple[str, ...]:
    """Returns the names in a Host header that mean an address; `*`: any may."""
    return (*_LOOPBACK, address) if is_loopback(address) else ("*",)


def listen(host: str, port: int) -> socket.socket:
    """Takes an address, before anything that takes time.

    Raises:
        OSError: It is taken, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"--host {host} --port {port}: {error}; give a free --port (0: any), and a --host of"
            " this machine"
        ) from error


def run_server(service: Service, listening: socket.socket) -> int:
    """Serves until SIGTERM or SIGINT, then answers what was asked and ends.

    Args:
        service: What answers.
        listening: Of `listen`.

    Returns:
        128 + the signal.

    Raises:
        Exception: What kept the run from being opened.
    """
    import uvicorn

    host = listening.getsockname()[0]
    config = uvicorn.Config(
        make_app(service, hosts=allowed_hosts(host)),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_ENDING_SECONDS,
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            # Of clients that do not read: to be closed, the event loop would wait for them.
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    server = Server(config)

    def end() -> None:
        server.should_exit = True

    caught: list[int] = []
    # uvicorn stops at these, and raises them again for whoever handled them before.
    old = {
        each: signal.signal(each, lambda number, _: caught.append(number))
        for each in (signal.SIGTERM, signal.SIGINT)
    }
    service.on_failure = end
    try:
        server.run(sockets=[listening])
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
    if service.failure is not None:
        raise service.failure
    return 128 + caught[0] if caught else 0


def make_app(service: Service, *, hosts: tuple[str, ...] = ("*",)) -> Any:
    """Returns the ASGI application, which starts and stops the service.

    Args:
        service: What answers.
        hosts: Names that a request may have in its Host header: a page of the internet must not
            reach a server of this machine by a name that it lets mean this machine. `*`: any.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    def respond(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Any:
        return Response(forms.as_json(value), status, headers, "application/json")

    def told(value: Any, results: list[Told]) -> Any:
        """Responds with the generations of the results: one, but for a swap in between."""
        names = "; ".join(dict.fromkeys(each.generation for each in results))
        return respond(value | {"generation": names}, headers={"x-generation": names})

    async def body(request: Request) -> bytes:
        # A page of another site may not send this type, unless the server allows it.
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != "application/json":
            raise RequestError(415, "send JSON with the header Content-Type: application/json")
        most = service.limits.body_kb * 1000
        if int(request.headers.get("content-length", 0)) > most:  # the protocol has checked it
            raise _too_long(most)
        content = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    content += part
                    if len(content) > most:
                        raise _too_long(most)
        except TimeoutError:  # it would keep an ending server waiting
            raise RequestError(408, f"the body did not come within {_BODY_SECONDS} s") from None
        return bytes(content)

    async def search(request: Request) -> Response:
        asker = service.opened.asker
        usual = min(max(asker.asked_documents, 1), MOST_DOCUMENTS)
        asked = forms.SearchRequest.read(
            await body(request), usual=usual, most=service.limits.waiting
        )
        results = await service.search(asked.queries, asked.k)
        return told(forms.search_response(results, scores=asked.scores), results)

    async def embeddings(request: Request) -> Response:
        system = service.opened.asker.system
        dim = system.workspace.encoder.embedding_size
        asked = forms.EmbeddingRequest.read(
            await body(request), most=service.limits.waiting, dim=dim
        )
        results = await service.embed(asked.encoder, asked.texts)
        tokens = await asyncio.to_thread(count_tokens, service, asked)
        return told(forms.embedding_response(asked, results, tokens), results)

    async def ask(request: Request) -> Response:
        service.opened  # noqa: B018  (raises where there is none)
        asked = forms.AskRequest.read(await body(request))
        if not asked.stream:
            result = await service.ask(asked.ask)
            return told(forms.ask_response(result), [result])
        events = _pieces(service, asked, lambda text: {"text": text}, lambda result: [
            {"reply": forms.ask_response(result)}
        ])  # fmt: skip
        return StreamingResponse(events, media_type="text/event-stream")

    async def chat(request: Request) -> Response:
        most = service.opened.asker.reader.prompts.options.max_new_tokens
        asked = forms.AskRequest.read_chat(await body(request), most_tokens=most)
        form = forms.Chat()
        if not asked.stream:
            result = await service.ask(asked.ask)
            return told(form.whole(result, asked.notes), [result])

        def last(result: Told) -> list[Any]:
            return form.last(result, asked.notes, usage=asked.usage)

        events = _pieces(service, asked, form.piece, last, end="[DONE]")
        return StreamingResponse(events, media_type="text/event-stream")

    async def models(request: Request) -> Response:
        shared = {"object": "model", "created": 0, "owned_by": "ragjax"}
        return respond({"object": "list", "data": [{"id": name, **shared} for name in MODELS]})

    async def health(request: Request) -> Response:
        opened = service.opened
        return respond(
            {
                "status": "ready",
                "generation": opened.name,
                "documents": opened.asker.system.size,
                "waiting": service.waiting(),
            }
        )

    async def show(request: Request) -> Response:
        return Response(page.PAGE, 200, page.HEADERS, "text/html")

    def refuse(error: RequestError) -> Response:
        headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
        if error.status == 408:  # the rest of the body is not waited for
            headers["connection"] = "close"
        return respond(forms.error_as_json(error), status=error.status, headers=headers)

    async def refused(request: Request, error: Exception) -> Response:
        return refuse(as_refusal(error))

    async def refused_by_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "it is registered for these"
        named = {404: f"nothing is at {request.url.path[:80]}", 405: "another method is needed"}
        text = named.get(error.status_code, error.detail)
        response = refuse(RequestError(error.status_code, text))
        response.headers.update(error.headers or {})
        return response

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncGenerator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/search": search,
        "/retrieve": search,  # where trainers look for it
        "/ask": ask,
        "/v1/chat/completions": chat,
        "/v1/embeddings": embeddings,
    }
    gets: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/": show,
        "/health": health,
        "/v1/models": models,
    }
    handlers = dict.fromkeys((RequestError, NotReady, Overloaded, ClientDisconnect), refused)
    return Starlette(
        routes=[
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={**handlers, HTTPException: refused_by_route, Exception: refused},
        lifespan=lifespan,
    )


def as_refusal(error: Exception) -> RequestError:
    """Returns what a client is told of an error: nothing of files or of the program."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, NotReady):
        return RequestError(503, "the models are being read; ask again soon", retry_after=_RETRY)
    if isinstance(error, Overloaded):
        return RequestError(503, "too many requests wait; ask again soon", retry_after=_RETRY)
    # What cannot be done with this question, in the words of `ask.py`.
    if isinstance(error, ValueError) and str(error).startswith("--decode"):
        return RequestError(400, str(error))
    return RequestError(500, "the server failed at this request; its log says why")


def count_tokens(service: Service, asked: forms.EmbeddingRequest) -> int:
    """Returns how many tokens were encoded, as a client is told."""
    workspace = service.opened.asker.system.workspace
    query = asked.encoder == ENCODERS[0]
    encoder = workspace.query_encoder if query else workspace.encoder
    prefix = encoder.query_prefix if query else encoder.doc_prefix
    texts = [prefix + text for text in asked.texts]
    return sum(map(len, encode_texts(encoder.tokenizer, texts, max_length=encoder.max_length).ids))


def _too_long(most: int) -> RequestError:
    return RequestError(
        413, f"the body is longer than {most:,} bytes; send less at once (--limits.body_kb)"
    )


def _pieces(
    service: Service,
    asked: forms.AskRequest,
    piece: Callable[[str], Any],
    last: Callable[[Told], list[Any]],
    *,
    end: str = "",
) -> AsyncIterator[bytes]:
    """Queues a question, and returns the events of its answer as it is written.

    Args:
        service: What answers.
        asked: The question.
        piece: Makes the event for some more text.
        last: Makes those that follow the whole answer.
        end: Data of an event at the very end; "": none.

    Raises:
        Overloaded: Too many wait; nothing has been sent yet.
    """
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[str | None] = asyncio.Queue()
    asked.ask.show = lambda text: loop.call_soon_threadsafe(heard.put_nowait, text)
    future = service.ask(asked.ask)
    future.add_done_callback(lambda _: heard.put_nowait(None))

    async def events() -> AsyncIterator[bytes]:
        shown = 0
        try:
            while (text := await heard.get()) is not None:
                if len(text) > shown:
                    yield _event(forms.as_json(piece(text[shown:])))
                    shown = len(text)
            result = future.result()
            if rest := result.value.reply.answer[shown:]:
                yield _event(forms.as_json(piece(rest)))
            for value in last(result):
                yield _event(forms.as_json(value))
        except Exception as error:  # the status has been sent: an event says it
            refusal = as_refusal(error)
            if refusal.status == 500:
                _LOG.exception("a stream failed")
            yield _event(forms.as_json(forms.error_as_json(refusal)))
        finally:
            asked.ask.gone = True  # ends the writing, where the client has gone
            future.cancel()
        if end:
            yield _event(end.encode())

    return events()


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
