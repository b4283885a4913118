"""Every step ends in an optimizer exactly once."""

from collections.abc import Iterable, Mapping

from torch.optim import Optimizer

from lightning_qinit.insertion.layers import QuantizedLayer


def adopt_steps(layers: Mapping[str, QuantizedLayer], optimizers: Iterable[Optimizer]) -> list[str]:
    """Add steps that no optimizer holds to the parameter group that trains their layer.

    Steps are parameters of the layers when ``configure_optimizers`` runs, so it usually finds them; an optimizer
    built before the Trainer ran (``LightningCLI --optimizer``) does not. They join an existing group, since a new
    one would break schedulers that were built for those there are.

    Returns:
        Layers whose own parameters are in no optimizer either: their steps stay as calibrated.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    untrained = []
    for name, layer in layers.items():
        learned = {id(p): p for q in layer.quantizers().values() for p in q.parameters()}  # tied weights share one
        missing = [p for p in learned.values() if id(p) not in group_of]
        group = next((group_of[id(p)] for p in layer.parameters(recurse=False) if id(p) in group_of), None)
        if missing and group is None:
            untrained.append(name)
        elif group is not None:
            group["params"].extend(missing)
            group_of.update((id(p), group) for p in missing)
    return untrained
