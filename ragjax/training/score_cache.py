"""A cache of the teacher's scores, keyed by language model, question, answer and document."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Score(NamedTuple):
    """How likely an answer is after one document."""

    log_prob: float  # log p_LM(y | c∘x), nats, summed over the answer's tokens
    length: int  # answer tokens, to turn the sum into a mean


def score_key(language_model: str, prompt: str, question: str, answer: str, document: str) -> str:
    """Returns the key of one score: a digest of everything the score depends on.

    Args:
      language_model: Fingerprint of the language model's parameters and tokenizer.
      prompt: Fingerprint of the prompt (template, lengths).
      question: Text of the question.
      answer: Text of the answer scored.
      document: Text of the document.
    """
    parts = json.dumps([language_model, prompt, question, answer, document], ensure_ascii=False)
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class ScoreCache:
    """Scores on disk, one JSON line each, appended in batches.

    While the language model is frozen, its score of (question, document) never changes, so epochs
    and re-runs with another retriever setting cost no forward pass for pairs seen before.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads what is there; a last line torn by a killed run is dropped.

        Raises:
          ValueError: If a line other than the last cannot be read.
        """
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._scores: dict[str, Score] = {}
        self.hits = 0
        self.misses = 0
        self._read()

    def __len__(self) -> int:
        """Returns how many scores are known."""
        return len(self._scores)

    def get(self, key: str) -> Score | None:
        """Returns a score, or None where it has not been computed; counts hits and misses."""
        score = self._scores.get(key)
        self.hits += score is not None
        self.misses += score is None
        return score

    def put(self, keys: Sequence[str], scores: Sequence[Score]) -> None:
        """Appends scores; they are on disk when this returns."""
        lines = []
        for key, score in zip(keys, scores, strict=True):
            self._scores[key] = Score(float(score.log_prob), int(score.length))
            lines.append(json.dumps({"key": key, "log_prob": self._scores[key].log_prob,
                                     "length": self._scores[key].length}))  # fmt: skip
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._scores[row["key"]] = Score(float(row["log_prob"]), int(row["length"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self._path}:{number}: not a score ({error}); delete the file to compute the"
                    " scores again"
                ) from error
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
