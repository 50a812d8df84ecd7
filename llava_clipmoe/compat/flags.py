"""Flags of ours in upstream's argument parser, which its train.py makes of three dataclasses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags more beside upstream's own, and what must hold once all are parsed: before weights are loaded."""

    beside: frozenset[str]
    """Fields of the one of upstream's dataclasses that gets them."""
    flags: tuple[tuple[str, Any, Any, str], ...]
    """Name, type, default and help of each."""
    check: Callable[[Any], None]
    """Called with every field that was parsed, of whichever dataclass. Raises ValueError for what cannot be meant."""

    def are_of(self, parsed: Any) -> bool:
        """Whether they were added to this parsed dataclass: a fork of upstream's may have fields of the same names."""
        return self in getattr(parsed, "flags_of_ours", ())


_ADDED: list[Flags] = []


def add_flags(*added: Flags) -> None:
    """Let upstream's parser know these flags; those that it knows already stay."""
    _ADDED.extend(flags for flags in added if flags not in _ADDED)
    import transformers

    parser = transformers.HfArgumentParser
    if getattr(parser.__init__, "knows_our_flags", False):
        return
    init, parse = parser.__init__, parser.parse_args_into_dataclasses

    @functools.wraps(init)
    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        if isinstance(dataclass_types, (list, tuple)):
            dataclass_types = [_with_flags(kind) for kind in dataclass_types]
        init(self, dataclass_types, **kwargs)

    @functools.wraps(parse)
    def parse_args_into_dataclasses(self, *rest: Any, **named: Any) -> tuple[Any, ...]:
        parsed = parse(self, *rest, **named)
        _check(parsed)
        return parsed

    __init__.knows_our_flags = True
    parser.__init__, parser.parse_args_into_dataclasses = __init__, parse_args_into_dataclasses


def _with_flags(kind: type) -> type:
    """One of upstream's dataclasses with what is added to it; any other as it is."""
    for added in _ADDED:
        known = getattr(kind, "__dataclass_fields__", {}).keys()
        if added.beside <= known and added.flags[0][0] not in known:
            fields = [
                (name, hint, dataclasses.field(default=default, metadata={"help": text}))
                for name, hint, default, text in added.flags
            ]
            ours = {"flags_of_ours": (*getattr(kind, "flags_of_ours", ()), added)}
            kind = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), namespace=ours)
    return kind


def _check(parsed: tuple[Any, ...]) -> None:
    given = SimpleNamespace()
    for part in parsed:
        if dataclasses.is_dataclass(part):
            vars(given).update(vars(part))
    for added in _ADDED:
        if any(map(added.are_of, parsed)):
            added.check(given)
