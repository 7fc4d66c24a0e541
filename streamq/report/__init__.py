"""`report.html`: what quantization did, on one page that opens offline; and what the page is made of."""

from streamq.report.data import Candidate, Clip, ReportData
from streamq.report.page import build

__all__ = ["Candidate", "Clip", "ReportData", "build"]
