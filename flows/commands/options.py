"""Parts that several commands share: help texts, and the type of a command and of a number."""

from __future__ import annotations

import math
from typing import Any

import click

from flows.terminal import complain

ENCODER = "Location of the encoder: a Hub id, a folder, or package:NAME."
OFFLINE = "Never ask the Hub."
JSON = "Print one JSON object."


class Command(click.Command):
    """A command that takes no empty value, and says of a value that another one replaces it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Look at the values as they are given: as a path, an empty one is the current folder."""
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        for param in dict.fromkeys(order):
            values = given[param.name or ""]
            if "" in (values if isinstance(values, list) else [values]):
                raise click.BadParameter("it is empty", ctx=ctx, param=param)
            if order.count(param) > 1 and not (param.multiple or getattr(param, "is_flag", False)):
                complain(f"warning: {param.opts[0]} is given {order.count(param)} times; the last one counts")
        return super().parse_args(ctx, args)


class FiniteRange(click.FloatRange):
    """Numbers between two; ``nan`` is in no range, though click lets it into each."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number
