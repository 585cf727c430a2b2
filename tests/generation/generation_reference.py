"""What the tests of generation share: prompts, and decoders written as plain loops in numpy."""

import jax
import numpy as np

ROWS, SLOTS, NEW = 4, 10, 5
LENGTHS = (10, 6, 3, 1)


def make_prompts(rng, vocabulary=256):
    """Four prompts of different lengths as lists of ids."""
    return [rng.integers(0, vocabulary, length).tolist() for length in LENGTHS]


def pad(prompts, rng, slots=SLOTS):
    """Left-pads with arbitrary tokens, which must not matter."""
    ids = rng.integers(0, 256, (len(prompts), slots)).astype(np.int32)
    mask = np.zeros((len(prompts), slots), bool)
    for row, prompt in enumerate(prompts):
        ids[row, slots - len(prompt) :], mask[row, slots - len(prompt) :] = prompt, True
    return ids, mask


def by_document(arrays, questions=2):
    """`[R, L]` arrays as `[B, K, L]`."""
    return tuple(array.reshape(questions, -1, *array.shape[1:]) for array in arrays)


class Scorer:
    """log p of next tokens, by a full forward over prompt and answer: nothing is cached."""

    def __init__(self, model):
        """Compiles one program that takes any prompt and answer of the tests."""
        self.model, self.known = model, {}
        if model.family.has_encoder:
            self.compute = jax.jit(self._encoder_decoder)
        else:
            self.compute = jax.jit(self._causal)

    def __call__(self, prompt, answer):
        """Returns `[V]` float64 log-probabilities of the token after the answer."""
        key = (tuple(prompt), tuple(answer))
        if key not in self.known:
            ids, mask = np.zeros((1, SLOTS), np.int32), np.zeros((1, SLOTS), bool)
            ids[0, SLOTS - len(prompt) :], mask[0, SLOTS - len(prompt) :] = prompt, True
            after = np.zeros((1, NEW), np.int32)
            after[0, : len(answer)] = answer
            self.known[key] = np.array(self.compute(ids, mask, after, len(answer)), np.float64)
        return self.known[key]

    def _causal(self, ids, mask, after, count):
        # One long prompt, its padding on the left.
        width = SLOTS + NEW
        joined = jax.numpy.concatenate([ids, after], axis=1)
        there = jax.numpy.concatenate([mask, jax.numpy.arange(NEW)[None] < count], axis=1)
        joined, there = (jax.numpy.roll(array, NEW - count, axis=1) for array in (joined, there))
        read = self.model.decoder.prefill(self.model.params, joined, there, cache_length=width)
        return jax.nn.log_softmax(read.logits[0])

    def _encoder_decoder(self, ids, mask, after, count):
        from ragjax.models.layers.vocabulary import logits
        from ragjax.models.seq2seq import model as seq2seq

        config, params = self.model.config, self.model.params
        read = seq2seq.shift_right(config, jax.numpy.pad(after, ((0, 0), (0, 1))))
        context = seq2seq.Memory(seq2seq.encode(config, params, ids, mask), mask)
        memory = seq2seq.remember(config, params, context)
        hidden, *_ = seq2seq.decode(config, params, read, memory=memory)
        return jax.nn.log_softmax(logits(params, hidden[0, count]))


def mixture(scorer, prompts, weights):
    """`answer -> [V]` log-probabilities under several prompts."""

    def next_token(answer):
        log_probs = np.stack([scorer(prompt, answer) for prompt in prompts])
        with np.errstate(divide="ignore"):
            return np.log(np.asarray(weights) @ np.exp(log_probs))

    return next_token


def log_prob_of(next_token, sequence):
    """Sums the log-probabilities of all tokens of a sequence."""
    return sum(next_token(sequence[:t])[token] for t, token in enumerate(sequence))


def beam_reference(next_token, *, beams, stop_ids=(), penalty=1.0, least=0, new=NEW):
    """Beam search over Python lists; returns (score, log p, sequence with its stop), best first."""
    live, finished = [(0.0, [])], []
    for step in range(new):
        candidates = []
        for total, sequence in live:
            log_probs = next_token(sequence)
            for token in np.argsort(-log_probs)[: beams + len(stop_ids)].tolist():
                if step >= least or token not in stop_ids:
                    candidates.append((total + log_probs[token], [*sequence, token]))
        candidates.sort(key=lambda pair: -pair[0])
        for total, sequence in candidates[:beams]:
            if sequence[-1] in stop_ids or step + 1 == new:
                finished.append((total / (step + 1) ** penalty, total, sequence))
        finished = sorted(finished, key=lambda each: -each[0])[:beams]
        live = [pair for pair in candidates if pair[1][-1] not in stop_ids][:beams]
        done = len(finished) == beams
        if done and live[0][0] / (step + 1) ** penalty <= finished[-1][0]:
            break
    return finished


def without_stop(sequence, stop_ids):
    """The answer of a sequence."""
    return sequence[:-1] if sequence and sequence[-1] in stop_ids else sequence


def answers_of(ids, lengths):
    """Rows of ids `[..., T]` as lists; checks that nothing stands after their ends."""
    ids, lengths = np.asarray(ids), np.asarray(lengths)
    found = []
    for row, length in zip(ids.reshape(-1, ids.shape[-1]), lengths.reshape(-1), strict=True):
        assert not row[length:].any()
        found.append(row[:length].tolist())
    return found
