"""Tiny random models for tests and for trying things out: no files, no network."""

from ragjax.models.testing.cross_encoder import (
    write_tiny_cross_encoder as write_tiny_cross_encoder,
)
from ragjax.models.testing.encoder import tiny_encoder as tiny_encoder
from ragjax.models.testing.encoder import write_tiny_encoder as write_tiny_encoder
from ragjax.models.testing.language_model import tiny_language_model as tiny_language_model
from ragjax.models.testing.language_model import (
    write_tiny_language_model as write_tiny_language_model,
)
