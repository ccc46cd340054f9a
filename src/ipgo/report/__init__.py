"""One self-contained page that shows a run."""

from ipgo.report.build import write_report

__all__ = ["write_report"]
