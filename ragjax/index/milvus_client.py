"""The connection to a Milvus server, and what it raises."""

import contextlib
import logging
import logging.config
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

TOKEN = "MILVUS_TOKEN"
SECONDS = 30
_ALIAS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
NO_COLLECTION, NO_ALIAS = 100, 1600
_NO_CONNECTION = 2


class Address(NamedTuple):
    """Where an index is served."""

    uri: str
    alias: str

    @classmethod
    def parse(cls, address: str) -> "Address":
        """Reads `milvus:URI/ALIAS`, such as `milvus:http://localhost:19530/manual`.

        Raises:
            ValueError: It has another form, or holds a password.
        """
        form = "an index is served at milvus:URI/ALIAS, such as milvus:http://localhost:19530/docs"
        uri, _, alias = address.removeprefix("milvus:").rpartition("/")
        if "@" in address:  # not shown: it may be a password
            raise ValueError(f"{form}, without user and password; put the token in {TOKEN}")
        try:
            parts = urlsplit(uri)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound = False
        if not address.startswith("milvus:") or not sound:
            raise ValueError(f"{form}; got {address!r}")
        if not _ALIAS.fullmatch(alias):
            raise ValueError(
                f"{form}; an alias is at most 200 letters, digits and underscores and begins with"
                f" no digit, got {alias!r} in {address!r}"
            )
        return cls(uri, alias)


def connect(uri: str) -> Any:
    """Returns a client of a server, which answered.

    Raises:
        ImportError: pymilvus is not installed.
    """
    milvus_error()  # imports pymilvus with care
    from pymilvus import MilvusClient

    # Every error is raised, too; its log would show it twice, with a traceback.
    logging.getLogger("pymilvus.decorators").setLevel(logging.CRITICAL)
    return MilvusClient(uri=uri, token=os.environ.get(TOKEN, ""), timeout=SECONDS)


def check_server(address: str) -> None:
    """Raises what `MilvusIndex.open` does where no server answers; the alias need not exist."""
    where = Address.parse(address)
    with named_errors(where.uri):
        connect(where.uri)


def aliased(client: Any, alias: str) -> str | None:
    """Returns the collection that an alias names; None where there is no such alias."""
    try:
        return client.describe_alias(alias, timeout=SECONDS)["collection_name"]
    except milvus_error() as error:
        if error.code == NO_ALIAS:
            return None
        raise


@contextlib.contextmanager
def named_errors(uri: str) -> Iterator[None]:
    """Raises what the client of a server raises as an OSError that says what to do."""
    try:
        yield
    except milvus_error() as error:
        text = error.message.replace(os.environ.get(TOKEN) or "\0", "***")
        if error.code == NO_COLLECTION:
            raise FileNotFoundError(
                f"Milvus at {uri} has dropped what was searched ({text}); open the index again"
            ) from error
        if error.code == _NO_CONNECTION or not isinstance(error.code, int):
            raise ConnectionError(
                f"no Milvus server answers at {uri} ({text}); start it, or check the address and"
                f" the token in {TOKEN}"
            ) from error
        raise OSError(f"Milvus at {uri} answers: {text}") from error


def milvus_error() -> Any:
    """Returns the exception of pymilvus.

    Raises:
        ImportError: pymilvus is not installed.
    """
    # Its import configures logging, which closes every handler that the program has: not here.
    configure, logging.config.dictConfig = logging.config.dictConfig, lambda config: None
    try:
        from pymilvus import MilvusException
    except ImportError as error:
        raise ImportError("Milvus needs its client: pip install 'ragjax[milvus]'") from error
    finally:
        logging.config.dictConfig = configure
    return MilvusException
