"""Insertion: which layers, and how a layer becomes a quantized layer and back."""

from lightning_qinit.insertion.insert import call_layers as call_layers
from lightning_qinit.insertion.insert import copy_quantizers as copy_quantizers
from lightning_qinit.insertion.insert import float_parameters as float_parameters
from lightning_qinit.insertion.insert import insert as insert
from lightning_qinit.insertion.insert import named_quantizers as named_quantizers
from lightning_qinit.insertion.insert import quantized_layers as quantized_layers
from lightning_qinit.insertion.insert import remove as remove
from lightning_qinit.insertion.layers import QUANTIZED_LAYERS as QUANTIZED_LAYERS
from lightning_qinit.insertion.layers import QuantizedLayer as QuantizedLayer
from lightning_qinit.insertion.layers import held as held
from lightning_qinit.insertion.optimizers import Follower as Follower
from lightning_qinit.insertion.optimizers import adopt_steps as adopt_steps
from lightning_qinit.insertion.optimizers import held_schedulers as held_schedulers
from lightning_qinit.insertion.optimizers import published_gradients as published_gradients
from lightning_qinit.insertion.optimizers import separate_steps as separate_steps
