"""One self-contained page that shows a run."""

from ipgo.report.build import total_cost, write_report

__all__ = ["total_cost", "write_report"]
