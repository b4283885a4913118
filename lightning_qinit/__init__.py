"""Quantization-aware training for PyTorch Lightning whose steps start where the quantization error is least."""

from lightning_qinit.batchnorm import fold_batchnorm as fold_batchnorm
from lightning_qinit.callback import QuantInitCallback as QuantInitCallback
from lightning_qinit.checkpoint import load_from_checkpoint as load_from_checkpoint
from lightning_qinit.checkpoint import restore as restore
from lightning_qinit.functional.sample import Sample as Sample
from lightning_qinit.initializers import Initial as Initial
from lightning_qinit.monitoring import QuantizationError as QuantizationError
from lightning_qinit.monitoring import ReportRow as ReportRow
from lightning_qinit.monitoring import SignalToQuantizationNoiseRatio as SignalToQuantizationNoiseRatio
from lightning_qinit.plain import calibrate as calibrate
from lightning_qinit.plain import prepare as prepare
from lightning_qinit.quantizers import LSQ as LSQ
from lightning_qinit.quantizers import PACT as PACT
from lightning_qinit.quantizers import APoT as APoT
from lightning_qinit.quantizers import Codebook as Codebook
from lightning_qinit.quantizers import LSQPlus as LSQPlus
from lightning_qinit.quantizers import Quantizer as Quantizer

__version__ = "0.1.0"
