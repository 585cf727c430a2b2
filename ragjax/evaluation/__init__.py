"""Retrieval and answer metrics per question, intervals, paired tests, tables."""

from ragjax.evaluation.answers import answer_at_k as answer_at_k
from ragjax.evaluation.answers import answer_in_text as answer_in_text
from ragjax.evaluation.answers import exact_match as exact_match
from ragjax.evaluation.answers import f1_score as f1_score
from ragjax.evaluation.answers import normalize_answer as normalize_answer
from ragjax.evaluation.intervals import Interval as Interval
from ragjax.evaluation.intervals import PairedDifference as PairedDifference
from ragjax.evaluation.intervals import bootstrap_interval as bootstrap_interval
from ragjax.evaluation.intervals import paired_difference as paired_difference
from ragjax.evaluation.records import METRICS as METRICS
from ragjax.evaluation.records import Comparison as Comparison
from ragjax.evaluation.records import QuestionRecord as QuestionRecord
from ragjax.evaluation.records import compare as compare
from ragjax.evaluation.records import summarize as summarize
from ragjax.evaluation.retrieval import ndcg as ndcg
from ragjax.evaluation.retrieval import recall_at_k as recall_at_k
from ragjax.evaluation.retrieval import reciprocal_rank as reciprocal_rank
from ragjax.evaluation.retrieval import retrieval_metrics as retrieval_metrics
from ragjax.evaluation.systems import COMPARED_PAIRS as COMPARED_PAIRS
from ragjax.evaluation.systems import SYSTEMS as SYSTEMS
from ragjax.evaluation.table import format_difference as format_difference
from ragjax.evaluation.table import format_report as format_report
from ragjax.evaluation.table import format_table as format_table
