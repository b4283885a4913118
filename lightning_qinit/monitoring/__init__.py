"""Monitoring: metrics, what is logged while training, and the calibration report."""

from lightning_qinit.monitoring.metrics import QuantizationError as QuantizationError
from lightning_qinit.monitoring.metrics import SignalToQuantizationNoiseRatio as SignalToQuantizationNoiseRatio
from lightning_qinit.monitoring.monitor import Monitor as Monitor
from lightning_qinit.monitoring.quantities import AGGREGATES as AGGREGATES
from lightning_qinit.monitoring.quantities import aggregates as aggregates
from lightning_qinit.monitoring.quantities import choose_quantities as choose_quantities
from lightning_qinit.monitoring.report import ReportRow as ReportRow
from lightning_qinit.monitoring.report import format_report as format_report
from lightning_qinit.monitoring.report import make_row as make_row
