"""Every private Lightning name that the package touches (checked against Lightning 2.6.6)."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.data_connector import (
    _parse_num_batches,
    _process_dataloader,
    _request_dataloader,
    _resolve_overfit_batches,
)
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import has_len_all_ranks
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from lightning_qinit.generators import generators_in, keep_generator


@contextmanager
def isolate_rng() -> Iterator[None]:
    """Put the global random states back afterwards, also after an exception (Lightning's own does not then)."""
    states = _collect_rng_states()
    try:
        yield
    finally:
        _set_rng_states(states)


def is_stream(trainer: Trainer) -> bool:
    """Whether the training data can be read only once: reading ahead would take it away from training."""
    source = trainer.fit_loop._data_source
    if source.is_module():
        return False
    given = source.instance
    loaders = (given if isinstance(given, CombinedLoader) else CombinedLoader(given)).flattened
    with isolate_rng():  # starting an iterator may draw random numbers
        return any(_is_one_shot(loader) for loader in loaders)


def _is_one_shot(loader: Any) -> bool:
    data = loader
    if isinstance(loader, DataLoader):
        data = loader.dataset
        if not isinstance(data, IterableDataset):
            return False
        if loader.num_workers > 0:
            return isinstance(data, Iterator)  # not asked for one here, where there is no worker
    put_back = _keep(data)
    iterator = iter(data)
    one_shot = iterator is data or iterator is iter(data)
    for restore in put_back:
        restore()
    return one_shot


@contextmanager
def training_batches(trainer: Trainer, most: int) -> Iterator[Iterator[Any]]:
    """The first ``most`` batches that training is going to see, on its device.

    Asks the data source for a loader of its own and prepares it as the fit loop does (samplers, limits), so the
    loop's own state is untouched; generators that the loaders hold, attributes of their samplers and iterable datasets
    and of a data module, and what a loader itself keeps in a ``state_dict``, are put back. Use inside
    :func:`isolate_rng`.
    """
    loop, strategy, module = trainer.fit_loop, trainer.strategy, trainer.lightning_module
    if trainer.limit_train_batches == 0:
        yield iter(())
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fit loop gives its advice on loaders itself, a moment later
        source = loop._data_source.instance
        put_back = _keep(source) if isinstance(source, LightningDataModule) else []
        loader = _request_dataloader(loop._data_source)
        strategy.barrier("train_dataloader()")
        combined = copy.copy(loader) if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
        given = list(combined.flattened)
        combined.flattened = [_apart(part) for part in given]
        if getattr(trainer, "overfit_batches", 0) > 0:
            _resolve_overfit_batches(combined, mode=RunningStage.TRAINING)
        combined.flattened = [
            _process_dataloader(trainer, TrainerFn.FITTING, RunningStage.TRAINING, part) for part in combined.flattened
        ]
        may_be_empty = module.allow_zero_length_dataloader_with_multiple_devices
        lengths = [
            len(part) if has_len_all_ranks(part, strategy, may_be_empty) else float("inf")
            for part in combined.flattened
        ]
        limit = trainer.limit_train_batches
        combined.limits = [_parse_num_batches(RunningStage.TRAINING, length, limit) for length in lengths]
    put_back += _keep_loaders(given)
    held = loop._combined_loader, loop.max_batches
    try:
        batches = iter(combined)
        length = sized_len(combined)  # the limits bound its length, not its iterator
        # a step may ask the trainer for them
        loop._combined_loader, loop.max_batches = combined, float("inf") if length is None else length
        most = most if length is None else min(most, length)
        yield (_to_device(trainer, batch) for batch, _, _ in islice(batches, most))
    finally:
        loop._combined_loader, loop.max_batches = held
        combined.reset()
        for restore in put_back:
            restore()


def _apart(loader: Any) -> Any:
    """A loader of the same samples, whose workers are none of those that training may use already."""
    if not isinstance(loader, DataLoader):
        return loader
    twin = copy.copy(loader)
    twin._iterator = None
    return twin


def _keep_loaders(loaders: list[Any]) -> list[Callable[[], object]]:
    """What puts loaders back where they are now: which samples come next, and what is drawn for them."""
    put_back: list[Callable[[], object]] = []
    for loader in loaders:
        batch_sampler, dataset = getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)
        ordering = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
        if isinstance(dataset, IterableDataset):
            ordering.append(dataset)
        if not isinstance(loader, DataLoader):
            ordering.append(loader)
        put_back += map(_keep_attributes, ordering)
        put_back += map(keep_generator, generators_in(loader, *ordering, dataset))
        if callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None)):
            put_back.append(partial(loader.load_state_dict, copy.deepcopy(loader.state_dict())))
    return put_back


def _keep(*holders: Any) -> list[Callable[[], object]]:
    """What gives objects the attributes that they have now, and the generators that they hold their states."""
    return [*map(_keep_attributes, holders), *map(keep_generator, generators_in(*holders))]


def _keep_attributes(holder: Any) -> Callable[[], object]:
    """What gives an object the attributes that it has now, and lists among them, which may be shuffled, their order."""
    if not hasattr(holder, "__dict__"):
        return lambda: None
    attributes = dict(vars(holder))
    lists = [(value, list(value)) for value in attributes.values() if isinstance(value, list)]

    def put_back() -> None:
        for name in vars(holder).keys() - attributes.keys():
            del vars(holder)[name]
        vars(holder).update(attributes)
        for value, members in lists:
            value[:] = members

    return put_back


def _to_device(trainer: Trainer, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def run_step(trainer: Trainer, batch: Any, batch_idx: int) -> Any:
    """Call the module's ``training_step`` the way the loop does: through the strategy's wrapper and precision.

    Past the wrapper of DDP, which would take a pass with gradients for the first of training.
    """
    module = trainer.lightning_module
    arguments = {"batch": batch}
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        arguments["batch_idx"] = batch_idx
    if isinstance(trainer.strategy.model, DistributedDataParallel):
        with trainer.precision_plugin.train_step_context():
            return module.training_step(*arguments.values())
    return trainer.strategy.training_step(*arguments.values())


def overrides(module: LightningModule, hook: str) -> bool:
    """Whether a module has a hook of its own, in either Lightning package."""
    defined_in = getattr(getattr(module, hook), "__module__", "")
    return not defined_in.startswith(("lightning.pytorch.", "pytorch_lightning."))


def pulls_batches_itself(module: LightningModule) -> bool:
    """Whether ``training_step`` takes the iterator of the loader instead of a batch."""
    return is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)


def restores_late(trainer: Trainer) -> bool:
    """Whether the strategy loads checkpoints after ``on_fit_start`` (FSDP, DeepSpeed, ModelParallel)."""
    return trainer.strategy.restore_checkpoint_after_setup


def needs_every_gradient(trainer: Trainer) -> bool:
    """Whether the strategy fails if a parameter gets no gradient: DDP, unless it looks for unused ones itself."""
    wrapped = trainer.strategy.model
    return (
        isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters and not wrapped.static_graph
    )


def is_a(thing: object, *names: str) -> bool:
    """Whether something is of a class of one of these names: the twins in both Lightning packages have the same."""
    return any(base.__name__ in names for base in type(thing).__mro__)


def averaging_callbacks(trainer: Trainer) -> list[Callback]:
    """Callbacks that copy the module when they are set up (weight averaging), of either Lightning package."""
    return [c for c in callbacks(trainer) if is_a(c, "WeightAveraging", "StochasticWeightAveraging")]


def configures(callback: Callback) -> bool:
    """Whether an averaging callback calls ``configure_model`` before it copies the module."""
    return is_a(callback, "WeightAveraging")


def finetuning_callbacks(trainer: Trainer) -> list[Callback]:
    """Callbacks that put parameter groups back when a run resumes, of either Lightning package."""
    return [c for c in callbacks(trainer) if is_a(c, "BaseFinetuning")]


def callbacks(trainer: Trainer) -> list[Callback]:
    """The callbacks of a trainer in the order in which they are called."""
    return trainer.callbacks  # type: ignore[attr-defined]  # set by its connector


def averaged_modules(trainer: Trainer) -> list[nn.Module]:
    """The copies of the module that such callbacks hold by now."""
    copies = [getattr(callback, "_average_model", None) for callback in averaging_callbacks(trainer)]
    return [getattr(copy, "module", copy) for copy in copies if isinstance(copy, nn.Module)]


def uses_rich(trainer: Trainer) -> bool:
    """Whether one of Lightning's rich callbacks is in use."""
    return any(is_a(callback, "RichProgressBar", "RichModelSummary") for callback in callbacks(trainer))


def clip_within(trainer: Trainer, context: Callable[[Any], AbstractContextManager[None]]) -> None:
    """Have Lightning clip an optimizer's gradients inside a context, until :func:`clip_as_usual`."""
    plugin = trainer.precision_plugin
    vars(plugin)["clip_gradients"] = partial(_clip, plugin.clip_gradients, context)


def _clip(
    clip: Callable[..., None],
    context: Callable[[Any], AbstractContextManager[None]],
    optimizer: Any,
    clip_val: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> None:
    with context(optimizer) if clip_val > 0 else nullcontext():
        clip(optimizer, clip_val, *args, **kwargs)


def clip_as_usual(trainer: Trainer) -> None:
    """Undo :func:`clip_within`."""
    vars(trainer.precision_plugin).pop("clip_gradients", None)


def schedulers(trainer: Trainer) -> list[Any]:
    """The learning-rate schedulers of a trainer."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def is_dry_run(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by its connector


def spawns(trainer: Trainer) -> bool:
    """Whether this process was started by the one that holds the user's module, and works on a copy of it."""
    return type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"


def has_stepped(trainer: Trainer) -> bool:
    """Whether the optimizer stepped on the batch being trained, as opposed to accumulating its gradients."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def is_logging_batch(trainer: Trainer) -> bool:
    """Whether the batch being trained is part of a logging step, gradient accumulation included."""
    return trainer._logger_connector.should_update_logs


def logging_step(trainer: Trainer) -> int:
    """The step axis of Lightning's own logs, which counts batches that stepped."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
