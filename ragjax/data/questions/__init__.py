"""Questions of a user's files, whatever their kind: BEIR, FlashRAG, KILT, tables, SQuAD, DPR."""

from ragjax.data.questions.contexts import written_contexts as written_contexts
from ragjax.data.questions.reading import BEIR_NAME as BEIR_NAME
from ragjax.data.questions.reading import Asked as Asked
from ragjax.data.questions.reading import question_files as question_files
from ragjax.data.questions.reading import questions_among as questions_among
from ragjax.data.questions.reading import read_questions as read_questions
from ragjax.data.questions.records import holds_contexts as holds_contexts
