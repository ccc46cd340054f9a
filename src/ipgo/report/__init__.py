"""One self-contained page that shows a run."""

from ipgo.report.build import run_cost, verdict, write_report

__all__ = ["run_cost", "verdict", "write_report"]
