"""Every step ends in an optimizer exactly once, without weight decay and at its own learning rate."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, NamedTuple

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_qinit.functional.sharded import spread_like
from lightning_qinit.insertion.layers import QuantizedLayer
from lightning_qinit.quantizers import Quantizer

# Learning rates in a parameter group, and what the schedulers of torch keep per group.
RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "min_lrs", "_last_lr")
PER_GROUP = (*RATES, "lr_lambdas", "base_momentums", "max_momentums")
SEPARATED = "separated_steps"  # marks the groups that are made here, also in checkpoints


def adopt_steps(layers: Mapping[str, QuantizedLayer], optimizers: Iterable[Optimizer]) -> list[str]:
    """Add steps that no optimizer holds to the parameter group that trains their layer: its bias, if that is apart.

    (An optimizer of matrices, such as Muon, takes no vectors, and a group of vectors decays none.)

    Steps are parameters of the layers when ``configure_optimizers`` runs, so it usually finds them; an optimizer
    built before the Trainer ran (``LightningCLI --optimizer``) does not.

    Returns:
        Layers whose own parameters are in no optimizer either, though they are not frozen: their steps stay as
        calibrated.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    untrained = []
    for name, layer in layers.items():
        learned = {id(p): p for q in layer.quantizers().values() for p in q.parameters()}  # tied weights share one
        missing = [p for p in learned.values() if id(p) not in group_of]
        trained = sorted((p for p in layer.parameters(recurse=False) if id(p) in group_of), key=lambda p: p.dim())
        group = group_of[id(trained[0])] if trained else None
        if missing and group is None:
            if any(p.requires_grad for p in layer.parameters(recurse=False)):
                untrained.append(name)
        elif group is not None:
            group["params"].extend(missing)
            if "param_names" in group:
                names = {id(p): f"{name}.{of_layer}" for of_layer, p in layer.named_parameters()}
                group["param_names"].extend(names[id(p)] for p in missing)
            group_of.update((id(p), group) for p in missing)
    return untrained


class Follower(NamedTuple):
    """A parameter group whose learning rate has to follow another's, since no scheduler knows of it."""

    optimizer: Optimizer
    group: int
    source: int
    lr_scale: float

    def follow(self) -> None:
        """Take the learning rate that the other has now."""
        groups = self.optimizer.param_groups
        groups[self.group]["lr"] = groups[self.source]["lr"] * self.lr_scale


def separate_steps(
    layers: Mapping[str, QuantizedLayer], optimizers: Iterable[Optimizer], schedulers: Iterable[Any], lr_scale: float
) -> list[Follower]:
    """Give the steps of a group that decays its weights a group of their own that does not.

    Weight decay pulls a step towards zero, where it means nothing (LSQ+ and others leave steps out of it). The new
    group copies every other setting, and schedulers that were built for the groups there are get the same entries for
    the new one, so that they go on as before. Groups that need no change stay as they are.

    Args:
        layers: the quantized layers.
        optimizers: the optimizers of a trainer.
        schedulers: its schedulers, and those that the module steps by hand.
        lr_scale: learning rate of steps relative to that of the group they come from.

    Returns:
        The new groups whose rates no scheduler of torch's sets: another's may set those of the groups that it was built
        for only, and so may a module that sets them itself.

    Raises:
        ValueError: if an optimizer that has one group only (L-BFGS) would need a second.
    """
    steps = {id(p) for layer in layers.values() for q in layer.quantizers().values() for p in q.parameters()}
    followers = []
    nested = {id(s): s for scheduler in schedulers for s in _nested(scheduler)}.values()
    for optimizer in optimizers:
        its_schedulers = [s for s in nested if getattr(s, "optimizer", optimizer) is optimizer]
        foreign = not its_schedulers or not all(isinstance(s, LRScheduler) for s in its_schedulers)
        groups, made = optimizer.param_groups, []
        for group in list(groups):
            is_step = [id(p) in steps for p in group["params"]]
            apart = all(is_step)  # a group of the user's own, or from an earlier fit
            if not any(is_step) or apart or (not group.get("weight_decay") and lr_scale == 1):
                continue
            if isinstance(optimizer, LBFGS):
                raise ValueError("`step_lr_scale` must be 1 with L-BFGS, which has one parameter group only.")
            settings = {name: _scaled(name, value, lr_scale) for name, value in group.items()}
            for name in ("params", "param_names"):  # the latter where the optimizer was given named parameters
                if name in group:
                    settings[name] = list(compress(group[name], is_step))
                    group[name] = list(compress(group[name], [not step for step in is_step]))
            if "weight_decay" in settings:
                settings["weight_decay"] = 0.0
            if "name" in settings:  # LearningRateMonitor takes no two of one name
                settings["name"] = f"{group['name']}_steps"
            count, source = len(groups), _place(group, groups)
            # a group that was added since is to stay the last, by which callbacks know it, and no earlier one may move
            place = source if any(SEPARATED in other for other in groups[:source]) else count
            settings[SEPARATED] = True
            optimizer.add_param_group(settings)
            groups.insert(place, groups.pop())
            made.append((groups[place], group))
            for scheduler in its_schedulers:
                for name, values in vars(scheduler).items():
                    if name in PER_GROUP and isinstance(values, list) and len(values) == count:
                        values.insert(place, _scaled(name, values[source], lr_scale))
        if foreign:
            followers += [Follower(optimizer, _place(new, groups), _place(of, groups), lr_scale) for new, of in made]
    return followers


def _place(group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> int:
    return next(index for index, other in enumerate(groups) if other is group)


@contextmanager
def published_gradients(quantizers: Iterable[Quantizer], optimizer: Optimizer) -> Iterator[None]:
    """Within, an optimizer's steps and offsets have the gradients to them in units of the data, to be clipped.

    Outside they have those in units of where they started, for the optimizer: larger by far where steps are small, so
    that they alone would decide the norm of all gradients.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    pairs = [
        (p.grad, spread_like(quantizer.initial_step, p.grad))
        for quantizer in quantizers
        for p in quantizer.parameters()
        if id(p) in held and p.grad is not None and p.grad.shape == quantizer.initial_step.shape
    ]
    for grad, unit in pairs:
        grad.mul_(unit)
    try:
        yield
    finally:
        for grad, unit in pairs:
            grad.div_(unit)


def _scaled(name: str, value: Any, lr_scale: float) -> Any:
    return value * lr_scale if name in RATES and value is not None else value


def held_schedulers(module: nn.Module) -> list[LRScheduler]:
    """The schedulers that a module keeps for itself, in attributes or in lists or mappings, to step them by hand."""
    values = [value for child in module.modules() for value in vars(child).values()]
    for container in [value for value in values if isinstance(value, (list, tuple, dict))]:
        values += container.values() if isinstance(container, dict) else container
    return [value for value in values if isinstance(value, LRScheduler)]


def _nested(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it holds (``SequentialLR``, ``ChainedScheduler``)."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", []):
        yield from _nested(inner)
