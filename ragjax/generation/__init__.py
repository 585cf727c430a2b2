"""Greedy decoding with retrieved contexts, one per prompt or an ensemble over several."""

from ragjax.generation.decoder import Decoder as Decoder
from ragjax.generation.ensemble import generate_ensemble as generate_ensemble
from ragjax.generation.greedy import GreedyResult as GreedyResult
from ragjax.generation.greedy import ScoredGeneration as ScoredGeneration
from ragjax.generation.greedy import generate_greedy as generate_greedy
from ragjax.generation.greedy import score_and_generate as score_and_generate
