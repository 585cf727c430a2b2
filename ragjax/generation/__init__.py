"""Decoding with retrieved contexts: greedy, sampling, beam search, streaming, multiple choice."""

from ragjax.generation.beam import BeamResult as BeamResult
from ragjax.generation.beam import generate_beam as generate_beam
from ragjax.generation.beam import generate_rag_token as generate_rag_token
from ragjax.generation.choices import ChoiceScores as ChoiceScores
from ragjax.generation.choices import over_unconditional as over_unconditional
from ragjax.generation.choices import per_byte as per_byte
from ragjax.generation.choices import per_token as per_token
from ragjax.generation.choices import score_answers as score_answers
from ragjax.generation.choices import score_choices as score_choices
from ragjax.generation.choices import total as total
from ragjax.generation.decoder import Decoder as Decoder
from ragjax.generation.greedy import GreedyResult as GreedyResult
from ragjax.generation.greedy import ScoredGeneration as ScoredGeneration
from ragjax.generation.greedy import generate_ensemble as generate_ensemble
from ragjax.generation.greedy import generate_greedy as generate_greedy
from ragjax.generation.greedy import score_and_generate as score_and_generate
from ragjax.generation.prompts import Limits as Limits
from ragjax.generation.prompts import Prompts as Prompts
from ragjax.generation.prompts import doc_log_weights as doc_log_weights
from ragjax.generation.prompts import mix_log_probs as mix_log_probs
from ragjax.generation.rag_sequence import RagSequenceResult as RagSequenceResult
from ragjax.generation.rag_sequence import generate_rag_sequence_fast as generate_rag_sequence_fast
from ragjax.generation.rag_sequence import (
    generate_rag_sequence_thorough as generate_rag_sequence_thorough,
)
from ragjax.generation.sampling import Sampling as Sampling
from ragjax.generation.sampling import generate_ensemble_sampled as generate_ensemble_sampled
from ragjax.generation.sampling import generate_sampled as generate_sampled
from ragjax.generation.streaming import TextStream as TextStream
from ragjax.generation.streaming import decode_stream as decode_stream
from ragjax.generation.streaming import stream_greedy as stream_greedy
from ragjax.generation.streaming import stream_sampled as stream_sampled
