"""Text encoders and language models: loading, placing, converting and exporting them."""

from ragjax.models.cross_encoder import CrossEncoder as CrossEncoder
from ragjax.models.cross_encoder import load_cross_encoder as load_cross_encoder
from ragjax.models.encoder import TextEncoder as TextEncoder
from ragjax.models.encoder import load_encoder as load_encoder
from ragjax.models.export import export_encoder as export_encoder
from ragjax.models.export import export_language_model as export_language_model
from ragjax.models.files.placement import sharding_of as sharding_of
from ragjax.models.files.sources import DEFAULT_ENCODER as DEFAULT_ENCODER
from ragjax.models.files.sources import DEFAULT_LM as DEFAULT_LM
from ragjax.models.files.sources import resolve_source as resolve_source
from ragjax.models.inputs import LMBatch as LMBatch
from ragjax.models.inputs import Tokens as Tokens
from ragjax.models.language_model import LanguageModel as LanguageModel
from ragjax.models.language_model import load_language_model as load_language_model
from ragjax.models.layers.stacks import cast_floats as cast_floats
from ragjax.models.rag import load_rag as load_rag
