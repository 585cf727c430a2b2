"""What a run or an evaluation would cost, without making it."""

import tempfile
from contextlib import nullcontext
from pathlib import Path

from ragjax.runs.adapt import open_adapt
from ragjax.runs.compare.pair import open_pair
from ragjax.runs.data import Log
from ragjax.runs.evaluate import describe_cost, evaluation_record, open_evaluation
from ragjax.runs.folder import check_free, config_record
from ragjax.runs.forecast import estimate_cost, estimate_rag_cost
from ragjax.runs.options.compare import CompareConfig
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.options.end_to_end import RagConfig
from ragjax.runs.options.evaluate import EvaluateConfig
from ragjax.runs.train_rag import open_rag
from ragjax.storage import keep_compiled
from ragjax.training.loop import StopFlag, graceful_stop


def dry_run(
    config: AdaptConfig | RagConfig | EvaluateConfig | CompareConfig,
    *,
    stop: StopFlag | None = None,
    log: Log = print,
) -> None:
    """Reads the data, loads the models, measures their speed and forecasts time and disk.

    Nothing is written to the output folder; where it is not free, that is said last.

    Args:
        config: Options of `adapt`, `train_rag` or `evaluate`; of `compare_runs`, both folders are
            read and checked.
        stop: Set by the caller to stop between stages; None: set by SIGTERM and SIGINT.
        log: Shows one line to the user.

    Raises:
        FileNotFoundError, ValueError: For data, models or an output folder that cannot be used.
    """
    if isinstance(config, CompareConfig):
        open_pair(config, log)
        return
    keep_compiled()
    handled = nullcontext(stop) if stop else graceful_stop(kill=False)
    with handled as flag, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(config, AdaptConfig):
            workspace = open_adapt(config, folder, stop=flag, log=log)
            log(estimate_cost(workspace, config).describe())
        elif isinstance(config, RagConfig):
            workspace = open_rag(config, folder, stop=flag, log=log)
            log(estimate_rag_cost(workspace, config).describe())
        else:
            opened = open_evaluation(config, folder, stop=flag, log=log)
            log(describe_cost(opened, config))
    if isinstance(config, EvaluateConfig):
        record = evaluation_record(config)
    else:
        record = config_record(config, config.fingerprint(), mode=config.mode)
    check_free(record, config)
