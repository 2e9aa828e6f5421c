"""Reports: an influence run as one page of HTML (extra ``plot``)."""

from hessops.reporting.report import report

__all__ = ["report"]
