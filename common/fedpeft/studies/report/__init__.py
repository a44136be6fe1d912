"""The report of a study: one self-contained HTML page, the figures as PNG and SVG, the tables as CSV and LaTeX."""

from __future__ import annotations

from fedpeft.studies.report.writing import write_report

__all__ = ["write_report"]
