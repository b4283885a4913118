"""Loggers that log nothing, and tell where they would."""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger

PLAIN = str, bytes, int, float, PurePath, dict, list, tuple, set, frozenset, type(None)


class _Nowhere:
    """What takes any call, and has any attribute and no members."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, index: Any) -> Any:
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())


NOWHERE = _Nowhere()


class _Mute:
    """What makes a logger keep to itself: it tells where its logs are; methods and handles lead nowhere."""

    experiment = NOWHERE

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return value if name.startswith("_") or isinstance(value, PLAIN) else NOWHERE

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(super(), "__getattr__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return NOWHERE  # a logger that forwards to its handle

    def __reduce__(self) -> Any:
        return DummyLogger, ()  # in the processes of workers


def mute(logger: Logger) -> Logger:
    """The same logger, of a class that is its own but mute."""
    kind: Any = type(logger)
    muted: Logger = object.__new__(type(kind)(kind.__name__, (_Mute, kind), {}))
    vars(muted).update(vars(logger))
    return muted
