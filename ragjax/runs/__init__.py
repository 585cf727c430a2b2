"""Complete runs: train, evaluate, ask, in a script or a notebook.

from ragjax.runs import AdaptConfig, Asker, adapt, open_system

run = adapt(AdaptConfig(data="FOLDER", output="runs/mine"))
run.metrics["after"]["recall@5"]
Asker(open_system(run.folder)).ask("how long is the warranty?")
"""

from ragjax.runs.adapt import adapt as adapt
from ragjax.runs.ask.asker import Asker as Asker
from ragjax.runs.ask.prompts import ReaderOptions as ReaderOptions
from ragjax.runs.compare.two_runs import compare_runs as compare_runs
from ragjax.runs.evaluate import evaluate as evaluate
from ragjax.runs.options.compare import CompareConfig as CompareConfig
from ragjax.runs.options.dual import AdaptConfig as AdaptConfig
from ragjax.runs.options.dual import LMConfig as LMConfig
from ragjax.runs.options.dual import RetrieverConfig as RetrieverConfig
from ragjax.runs.options.end_to_end import ObjectiveConfig as ObjectiveConfig
from ragjax.runs.options.end_to_end import RagConfig as RagConfig
from ragjax.runs.options.end_to_end import ReaderConfig as ReaderConfig
from ragjax.runs.options.end_to_end import TrainingConfig as TrainingConfig
from ragjax.runs.options.evaluate import EvaluateConfig as EvaluateConfig
from ragjax.runs.options.questions import QuestionsConfig as QuestionsConfig
from ragjax.runs.options.refresh import RefreshConfig as RefreshConfig
from ragjax.runs.options.shared import DataConfig as DataConfig
from ragjax.runs.options.shared import EvaluationConfig as EvaluationConfig
from ragjax.runs.options.shared import PromptConfig as PromptConfig
from ragjax.runs.options.shared import RunConfig as RunConfig
from ragjax.runs.options.shared import TowersConfig as TowersConfig
from ragjax.runs.preview import dry_run as dry_run
from ragjax.runs.saved import Evaluation as Evaluation
from ragjax.runs.saved import FinishedRun as FinishedRun
from ragjax.runs.saved import open_run as open_run
from ragjax.runs.system import open_base_system as open_base_system
from ragjax.runs.system import open_system as open_system
from ragjax.runs.teachers.plain import LMTeacher as LMTeacher
from ragjax.runs.teachers.plain import Teacher as Teacher
from ragjax.runs.train_rag import train_rag as train_rag
