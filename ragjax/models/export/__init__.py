"""Exports models to folders that other programs serve from."""

from ragjax.models.export.api import MAX_SHARD_SIZE as MAX_SHARD_SIZE
from ragjax.models.export.api import Format as Format
from ragjax.models.export.api import check_formats as check_formats
from ragjax.models.export.api import check_packages as check_packages
from ragjax.models.export.api import export_encoder as export_encoder
from ragjax.models.export.api import export_language_model as export_language_model
from ragjax.models.export.api import plan_encoder as plan_encoder
from ragjax.models.export.api import plan_language_model as plan_language_model
