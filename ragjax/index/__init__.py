"""Finding documents: exact, approximate, lexical and hybrid search behind one protocol."""

from ragjax.index.base import Index as Index
from ragjax.index.base import IndexSnapshot as IndexSnapshot
from ragjax.index.base import SearchResult as SearchResult
from ragjax.index.bm25 import Bm25Index as Bm25Index
from ragjax.index.callback import HostIndex as HostIndex
from ragjax.index.callback import JitSearchResult as JitSearchResult
from ragjax.index.callback import call_host as call_host
from ragjax.index.callback import make_jit_search as make_jit_search
from ragjax.index.choose import IndexChoice as IndexChoice
from ragjax.index.choose import choose_index as choose_index
from ragjax.index.exact import ExactIndex as ExactIndex
from ragjax.index.exact import exact_search as exact_search
from ragjax.index.hybrid import USUAL_WEIGHT as USUAL_WEIGHT
from ragjax.index.hybrid import DenseWeight as DenseWeight
from ragjax.index.hybrid import HybridIndex as HybridIndex
from ragjax.index.hybrid import HybridQueries as HybridQueries
from ragjax.index.hybrid import choose_dense_weight as choose_dense_weight
from ragjax.index.recall import recall_against_exact as recall_against_exact
from ragjax.index.scann import ScannIndex as ScannIndex
from ragjax.index.scann import ScannOptions as ScannOptions
from ragjax.index.scann import scann_options as scann_options
from ragjax.index.shards import EmbeddingWriter as EmbeddingWriter
from ragjax.index.shards import ShardWriter as ShardWriter
from ragjax.index.store import EmbeddingStore as EmbeddingStore
from ragjax.index.store import StoreSpec as StoreSpec
from ragjax.storage import DiskFullError as DiskFullError
