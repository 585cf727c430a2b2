"""Keeping the index close to the document encoder: encoding the corpus again and again."""

from ragjax.refresh.encode import DEFAULT_BUCKETS as DEFAULT_BUCKETS
from ragjax.refresh.encode import EncodeOptions as EncodeOptions
from ragjax.refresh.encode import EncodeProgress as EncodeProgress
from ragjax.refresh.encode import Tokens as Tokens
from ragjax.refresh.encode import encode_corpus as encode_corpus
from ragjax.refresh.encode import encode_to_store as encode_to_store
from ragjax.refresh.encode import encode_token_ids as encode_token_ids
from ragjax.refresh.encode import tqdm_progress as tqdm_progress
