"""Self-contained HTML pages and PNG contact sheets of finished attributions."""

from attrib_jax.report.data import Credit, Region, ReportData, Timing
from attrib_jax.report.page import write_report
from attrib_jax.report.sheet import write_contact_sheet

__all__ = ["Credit", "Region", "ReportData", "Timing", "write_contact_sheet", "write_report"]
