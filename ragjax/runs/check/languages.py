"""Languages of the texts of a run, and whether its encoder was made for them.

Languages are told by their commonest words, as for BM25 (`ragjax.index.words`): that needs no
model and no package more, and knows the languages that have stems here, and those without spaces.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ragjax.data import encode_texts
from ragjax.index.words import language_of, split_words
from ragjax.models.encoder import TextEncoder
from ragjax.runs.check.lengths import sampled_rows
from ragjax.runs.workspace import Workspace

MEASURED = 1000  # passages, and as many questions
# Vocabularies of encoders of one language are smaller, those of many are larger.
_VOCABULARY_OF_MANY = 100_000
# Shares of the texts from which on another language matters, and of tokens that are unknown.
_FOREIGN, _UNKNOWN = 0.1, 0.01
_SHOWN = 4


class Languages(NamedTuple):
    """Languages of some texts, and how the encoder takes them."""

    what: str
    measured: int
    counts: Mapping[str, int]  # language to texts, the commonest first; "": not clear
    tokens_per_word: float
    unknown: float  # share of the tokens that stand for what the encoder does not know

    def describe(self) -> str:
        """Returns a line for the user."""
        shares = [
            f"{name or 'not clear'} {count / self.measured:.0%}"
            for name, count in list(self.counts.items())[:_SHOWN]
            if 100 * count >= self.measured
        ]
        return f"{', '.join(shares)}; {self.tokens_per_word:.1f} encoder tokens a word"


def measure_languages(workspace: Workspace) -> list[Languages]:
    """Tells the languages of a sample of the passages and of the questions."""
    corpus, encoder = workspace.dataset.corpus, workspace.encoder
    rows = sampled_rows(len(corpus), MEASURED)
    asked = [q.text for split in workspace.questions.values() for q in split]
    asked = [asked[row] for row in sampled_rows(len(asked), MEASURED)] if asked else []
    passages = (f"{corpus[row].title}\n{corpus[row].text}" for row in rows)
    found = [
        _measure("passages", passages, encoder),
        _measure("questions", asked, workspace.query_encoder),
    ]
    return [each for each in found if each.measured]


def language_problems(found: Iterable[Languages], encoder: TextEncoder) -> Iterable[str]:
    """Yields what is wrong with an encoder for these texts."""
    size = encoder.tokenizer.get_vocab_size()
    for each in found:
        clear = {name: count for name, count in each.counts.items() if name}
        foreign = {name: count for name, count in clear.items() if name != "english"}
        share = sum(foreign.values()) / each.measured
        if share >= _FOREIGN and size < _VOCABULARY_OF_MANY:
            names = ", ".join(list(foreign)[:_SHOWN])
            yield (
                f"{share:.0%} of the {each.what} that were measured are not English ({names}), and"
                f" {encoder.source} has a vocabulary of {size:,} tokens, as encoders of one"
                f" language have ({each.tokens_per_word:.1f} of them a word here); if it was not"
                " trained on them, give one of many languages with --encoder"
            )
        if each.unknown >= _UNKNOWN:
            yield (
                f"{each.unknown:.1%} of the tokens of the {each.what} are unknown to"
                f" {encoder.source}: it cannot tell such characters from each other; give an"
                " encoder that has them with --encoder"
            )


def _measure(what: str, texts: Iterable[str], encoder: TextEncoder) -> Languages:
    counts: Counter[str] = Counter()
    words = tokens = unknown = 0
    token = getattr(encoder.tokenizer.model, "unk_token", None)
    unknown_id = encoder.tokenizer.token_to_id(token) if isinstance(token, str) else None
    unknown_id = -1 if unknown_id is None else unknown_id
    for text in texts:
        counts[language_of(text)] += 1
        words += len(split_words(text, singles=False))
        (ids,) = encode_texts(
            encoder.tokenizer, [text], max_length=None, add_special_tokens=False
        ).ids
        tokens += len(ids)
        unknown += ids.count(unknown_id)
    return Languages(
        what=what,
        measured=counts.total(),
        counts=dict(counts.most_common()),
        tokens_per_word=tokens / max(words, 1),
        unknown=unknown / max(tokens, 1),
    )
