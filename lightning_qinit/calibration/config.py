"""What the user asks of calibration."""

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_qinit.checks import check, check_flag, check_whole, is_number

Criterion = Literal["mse", "fisher", "hessian", "output"]


@dataclass(frozen=True)
class CalibrationConfig:
    """How the steps are chosen.

    Attributes:
        batches: how many training batches to read, over all ranks together.
        criterion: how the optimum weighs errors: ``"mse"`` alike; ``"fisher"`` by the squared gradients of the loss;
            ``"hessian"``, for weights, by the mean square of the inputs that they meet; ``"output"``, for weights, by
            what they do together to the layer's outputs.
        sequential: whether to choose layer by layer, each for inputs from layers already quantized.
        average_bits: bits of weights on average, 2 to 8, allocated over the layers; ``None`` to leave them as set.
        recalibrate_batchnorm: whether to re-estimate BatchNorm statistics under quantization.
    """

    batches: int = 16
    criterion: Criterion = "mse"
    sequential: bool = False
    average_bits: float | None = None
    recalibrate_batchnorm: bool = False

    def __post_init__(self) -> None:
        check_whole("calibration_batches", self.batches, 1)
        check(
            "criterion", self.criterion, self.criterion in get_args(Criterion), "'mse', 'fisher', 'hessian' or 'output'"
        )
        check_flag("sequential", self.sequential)
        check_flag("recalibrate_batchnorm", self.recalibrate_batchnorm)
        average = self.average_bits
        fits = average is None or (is_number(average) and 2 <= average <= 8)
        check("average_bits", average, fits, "a number from 2 to 8, or None")
