"""Causal decoders as a family: what loading, training, generation and export need of them."""

from ragjax.models.decoder.cache import CachedDecoder
from ragjax.models.decoder.checkpoint import (
    params_from_huggingface,
    params_to_huggingface,
    untied_by_file,
)
from ragjax.models.decoder.huggingface import (
    MODEL_TYPES,
    format_huggingface_config,
    parse_huggingface_config,
)
from ragjax.models.decoder.model import packed_states, packed_token_log_probs, token_log_probs
from ragjax.models.families import LMFamily
from ragjax.models.trainable import DECODER

FAMILY = LMFamily(
    model_types=MODEL_TYPES,
    parse_config=parse_huggingface_config,
    format_config=format_huggingface_config,
    load_params=params_from_huggingface,
    save_params=params_to_huggingface,
    token_log_probs=token_log_probs,
    make_decoder=CachedDecoder,
    layout=DECODER,
    packed_token_log_probs=packed_token_log_probs,
    packed_states=packed_states,
    fit_config=untied_by_file,
)
