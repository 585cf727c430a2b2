"""Rows of tables: JSON lines, a JSON array, CSV, TSV, Parquet, Arrow; each is a dict by column."""

from ragjax.data.tables.rows import Row as Row
from ragjax.data.tables.rows import TableFile as TableFile
from ragjax.data.tables.rows import read_rows as read_rows
from ragjax.data.tables.rows import shown_columns as shown_columns
