"""The fingerprint of documents: of their whole content, and of nothing else."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.data import Passage
from ragjax.refresh import EncodeTask
from ragjax.refresh.task import content_bytes

LONG = np.arange(3000) % 50
BASE = {"numpy": LONG, "jax": jnp.asarray(LONG), "list": LONG.tolist(), "tuple": tuple(LONG)}


@dataclasses.dataclass
class Page:
    """A document of a user's own kind."""

    text: str
    tokens: np.ndarray


def digest(*documents) -> str:
    return EncodeTask(encode=lambda p, t: t, documents=documents, pad_id=0).corpus_digest


def changed(document):
    """The same document with one token changed in the middle, where `repr` shows dots."""
    tokens = np.asarray(document).copy()
    tokens[1500] += 1
    return type(document)(tokens.tolist()) if isinstance(document, list | tuple) else tokens


@pytest.mark.parametrize("kind", BASE)
def test_a_token_in_the_middle_of_a_long_document_counts(kind):
    assert digest(BASE[kind]) != digest(changed(BASE[kind]))
    assert digest({"ids": BASE[kind]}) != digest({"ids": changed(BASE[kind])})
    assert digest(Page("a", BASE[kind])) != digest(Page("a", changed(BASE[kind])))


def test_print_options_do_not_count():
    document = np.linspace(0, 1, 20)
    before = digest(LONG, document)
    with np.printoptions(threshold=5, precision=2, suppress=True):
        assert digest(LONG, document) == before


def test_token_ids_are_the_same_however_they_are_held():
    kinds = [LONG, LONG.astype(np.int32), LONG.astype(np.uint8), jnp.asarray(LONG), LONG.tolist()]
    assert len({digest(kind) for kind in kinds}) == 1
    assert digest([]) == digest(np.zeros(0, np.int32))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["ab", "c"], ["a", "bc"]),
        ([[1, 2], [3]], [[1], [2, 3]]),
        ([1], ["1"]),
        ([1.0], [1]),
        ([True], [1]),
        ([None], [""]),
        ([2**63], [2**63 + 1]),
        ([np.float32([1e-9])], [np.float32([2e-9])]),
        ([np.array([[1, 2]])], [np.array([[1], [2]])]),
        ([Passage("a", "", "b")], [Passage("a", "b", "")]),
        ([{"a": 1, "b": 2}], [{"a": 2, "b": 1}]),
        (["\ud800"], ["\ud801"]),
    ],
)
def test_other_content_has_another_digest(one, other):
    assert digest(*one) != digest(*other)
    assert digest(*one) == digest(*one)


def test_the_order_of_fields_in_a_mapping_does_not_count():
    assert content_bytes({"a": 1, "b": 2}) == content_bytes({"b": 2, "a": 1})


def test_what_cannot_be_digested_is_named():
    with pytest.raises(ValueError, match=r"documents\[1\] holds a set.*corpus_fingerprint"):
        digest([1], {1, 2})
