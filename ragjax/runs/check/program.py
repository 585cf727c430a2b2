"""The program that checks data and models before a run."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from ragjax.runs.check.checking import BAD, check_run
from ragjax.runs.check.report import as_json, describe
from ragjax.runs.options.dual import AdaptConfig
from ragjax.runs.program import (
    BAD_INPUT,
    CommonFlags,
    Config,
    escape_what_is_no_utf8,
    flag_names,
    in_own_flags,
    parse_flags,
    show_error,
)
from ragjax.storage import keep_compiled


@dataclass(frozen=True, kw_only=True)
class CheckFlags(CommonFlags[Config], Generic[Config]):
    """Flags of a check, beside those of the run.

    Attributes:
        json: One JSON object on stdout, and nothing else there.
        cost: Load both models and measure how long each stage of the run would take here.
    """

    json: bool = False
    cost: bool = True


def run_check_program(description: str | None, arguments: Sequence[str] | None) -> int:
    """Checks data and models with the flags of `adapt`.

    Args:
        description: Help text of the script.
        arguments: Flags; None: those of the command line.

    Returns:
        Exit code: 0 nothing is wrong; 1 there are problems that a run would go on with; 2 a run
        would be refused, or the flags cannot be used.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    escape_what_is_no_utf8()
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    default = AdaptConfig()
    names = flag_names(default)
    try:
        flags: CheckFlags[AdaptConfig] = parse_flags(default, description, arguments, CheckFlags)
        keep_compiled()
        found = check_run(flags.options, with_cost=flags.cost)
    except BAD as error:
        show_error(error, arguments, names)
        return BAD_INPUT
    if flags.json:
        own = as_json(found, own=lambda message: in_own_flags(message, names))
        print(json.dumps(own, ensure_ascii=False))
    else:
        print(in_own_flags(describe(found), names))
    return found.code
