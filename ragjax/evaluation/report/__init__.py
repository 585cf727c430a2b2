"""One self-contained HTML page on a run: what changed, curves, questions, calibration, cost."""

from ragjax.evaluation.report.page import ReportData as ReportData
from ragjax.evaluation.report.page import render_report as render_report
