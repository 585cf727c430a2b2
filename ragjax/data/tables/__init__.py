"""Rows of tables, each a dict by column, and the passages in them.

Tables are JSON lines, a JSON array, CSV, TSV, Parquet and Arrow files, folders of them, folders
saved by `datasets`, and data sets of the Hugging Face hub.
"""

from ragjax.data.tables.hub import UnreachableError as UnreachableError
from ragjax.data.tables.passages import Passage as Passage
from ragjax.data.tables.passages import PassageReader as PassageReader
from ragjax.data.tables.places import ENDINGS as ENDINGS
from ragjax.data.tables.places import SAVED_FILES as SAVED_FILES
from ragjax.data.tables.places import find_tables as find_tables
from ragjax.data.tables.places import saved_files as saved_files
from ragjax.data.tables.places import table_files as table_files
from ragjax.data.tables.places import table_stem as table_stem
from ragjax.data.tables.row import shown_columns as shown_columns
from ragjax.data.tables.rows import Row as Row
from ragjax.data.tables.rows import TableFile as TableFile
from ragjax.data.tables.rows import read_rows as read_rows
from ragjax.data.tables.sources import OTHERS as OTHERS
from ragjax.data.tables.sources import Part as Part
from ragjax.data.tables.sources import Source as Source
from ragjax.data.tables.sources import combined as combined
from ragjax.data.tables.sources import corpus_source as corpus_source
