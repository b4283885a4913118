"""Quantizers: what a layer trains with. To add one, write a subclass of ``Quantizer`` in a file of its own."""

from lightning_qinit.quantizers.apot import APoT as APoT
from lightning_qinit.quantizers.base import Quantizer as Quantizer
from lightning_qinit.quantizers.codebook import Codebook as Codebook
from lightning_qinit.quantizers.lsq import LSQ as LSQ
from lightning_qinit.quantizers.lsqplus import LSQPlus as LSQPlus
from lightning_qinit.quantizers.pact import PACT as PACT
