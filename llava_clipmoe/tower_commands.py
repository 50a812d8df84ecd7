"""The commands `llava-clipmoe register` and `llava-clipmoe towers`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from . import tower_registry
from .tower_registry import DEFAULT_NAME, OVERRIDE, Tower, UnknownTower


@dataclass
class Register:
    """Give a CLIP-MoE a short name, so that LLaVA takes it as `--vision_tower NAME`.

    Example: llava-clipmoe register clipmoe-336 runs/mine/clip-moe
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[NAME]")] = DEFAULT_NAME
    """The short name."""
    source: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[DIR_OR_HUB_ID]")] = None
    """A CLIP-MoE model directory on this machine, or a hub id (org/name)."""
    s2: bool = False
    """Look at the picture on several scales (S2); the projector must be trained with it."""
    s2_scales: Annotated[list[int], tyro.conf.arg(metavar="PIXELS ...")] = field(default_factory=list)
    """Image sides for --s2, ascending, each a multiple of the first. Default: 1, 2 and 3 times the model's."""
    remove: bool = False
    """Forget the name instead. The model stays where it is."""


@dataclass
class Towers:
    """List the registered vision towers, or check one name: exit status 0 when LLaVA would accept it."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """A name, directory or hub id to check."""


def register_main(argv: list[str]) -> int:
    """`llava-clipmoe register NAME DIR_OR_HUB_ID`."""
    args = tyro.cli(Register, args=argv, prog="llava-clipmoe register")
    if args.remove:
        tower_registry.unregister(args.name)
        print(f"{args.name} is forgotten.")
        return 0
    if args.source is None:
        raise ValueError(f"where is the model? llava-clipmoe register {args.name} DIR_OR_HUB_ID")
    s2 = args.s2 or bool(args.s2_scales)
    tower = tower_registry.register(Tower(args.name, args.source, s2, args.s2_scales))
    print(
        f"{tower.name} -> {tower.source} (in {tower_registry.registry_file()}). In LLaVA: --vision_tower {tower.name}"
    )
    return 0


def towers_main(argv: list[str]) -> int:
    """`llava-clipmoe towers [NAME]`."""
    args = tyro.cli(Towers, args=argv, prog="llava-clipmoe towers")
    if args.name is not None:
        tower = tower_registry.resolve(args.name)
        print(f"{args.name}: " + (f"CLIP-MoE at {tower.source}" if tower else "upstream LLaVA's own tower"))
        return 0
    known = tower_registry.registered()
    if not known:
        print(f"No tower is registered ({tower_registry.registry_file()}, or {OVERRIDE}).")
        print(f"    llava-clipmoe register {DEFAULT_NAME} DIR_OR_HUB_ID")
        return 0
    table = Table("name", "model", "state", box=None)
    for name, tower in sorted(known.items()):
        try:
            tower_registry.resolve(name)
            state = "ready, S2" if tower.s2 else "ready"
        except UnknownTower as error:
            state = str(error).splitlines()[0]
        table.add_row(name, tower.source, state)
    Console().print(table)
    return 0
