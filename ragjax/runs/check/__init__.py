"""What is wrong with the data and models of a run, and what they are like; trains nothing."""

from ragjax.runs.check.checking import Checked as Checked
from ragjax.runs.check.checking import check_run as check_run
from ragjax.runs.check.problems import Problem as Problem
