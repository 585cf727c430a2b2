"""Text encoders and language models, and the loaders of their checkpoints."""

from ragjax.models.encoder import TextEncoder as TextEncoder
from ragjax.models.encoder import load_encoder as load_encoder
from ragjax.models.files.sources import DEFAULT_ENCODER as DEFAULT_ENCODER
from ragjax.models.files.sources import DEFAULT_LM as DEFAULT_LM
from ragjax.models.files.sources import resolve_source as resolve_source
from ragjax.models.inputs import LMBatch as LMBatch
from ragjax.models.inputs import Tokens as Tokens
from ragjax.models.language_model import LanguageModel as LanguageModel
from ragjax.models.language_model import load_language_model as load_language_model
