"""Float training, then 2-bit quantization-aware training from the same float weights, from two kinds of steps.

python examples/quickstart.py
python examples/quickstart.py --data cifar10 --root data --epochs 30 --qat-epochs 10
"""

import argparse
import copy
import logging
import warnings

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from task import Classifier, Images

from lightning_qinit import QuantInitCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", choices=["digits", "fashion-mnist", "cifar10"])
    parser.add_argument("--root", default="data", help="folder of torchvision's datasets, downloaded if absent")
    parser.add_argument("--bits", type=int, default=2, help="of weights and inputs, but for the first and last layer")
    parser.add_argument("--epochs", type=int, default=12, help="of float training")
    parser.add_argument("--qat-epochs", type=int, default=4, help="of quantization-aware training")
    parser.add_argument("--logs", default="runs", help="folder of the TensorBoard logs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*GPU available.*")

    data = Images(arguments.data, arguments.root)
    pl.seed_everything(arguments.seed)
    trained = Classifier(data.channels)
    trainer = make_trainer(arguments, "float", arguments.epochs)
    trainer.fit(trained, data)
    rows = [("float", *measure(trainer, trained, data))]

    for initializer in ("optimal", "lsq"):
        pl.seed_everything(arguments.seed)
        model = copy.deepcopy(trained)
        model.losses.clear()
        model.learning_rate = trained.learning_rate / 5
        qinit = QuantInitCallback(weight_bits=arguments.bits, activation_bits=arguments.bits, initializer=initializer)
        trainer = make_trainer(arguments, initializer, arguments.qat_epochs, qinit)
        trainer.fit(model, data)
        rows.append((f"{arguments.bits} bits, {initializer}", *measure(trainer, model, data)))

    print(f"\n{'start':18}{'test accuracy':>15}{'loss of steps 1-20':>20}")
    for name, accuracy, loss in rows:
        print(f"{name:18}{100 * accuracy:14.2f}%{loss:20.3f}")
    print(f"\nTensorBoard: tensorboard --logdir {arguments.logs}")


def make_trainer(arguments: argparse.Namespace, name: str, epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=TensorBoardLogger(arguments.logs, name=f"{arguments.data}-{name}"),
        log_every_n_steps=5,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def measure(trainer: pl.Trainer, model: Classifier, data: Images) -> tuple[float, float]:
    accuracy = trainer.test(model, data, verbose=False)[0]["test_accuracy"]
    return accuracy, sum(model.losses[:20]) / 20


if __name__ == "__main__":
    main()
