"""Leaving training: what is deployed holds no quantizer that learns."""

from lightning_qinit.export.fold import fold as fold
from lightning_qinit.export.integers import integer_state_dict as integer_state_dict
from lightning_qinit.export.integers import load_integers as load_integers
from lightning_qinit.export.integers import save_integers as save_integers
from lightning_qinit.export.onnx import OnnxReport as OnnxReport
from lightning_qinit.export.onnx import export_onnx as export_onnx
from lightning_qinit.export.size import SizeRow as SizeRow
from lightning_qinit.export.size import format_size as format_size
from lightning_qinit.export.size import size_report as size_report
from lightning_qinit.export.snap import snap_offsets as snap_offsets
