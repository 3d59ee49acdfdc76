"""Parts that several commands share: help texts, command class, parameter types."""

from __future__ import annotations

import math
from typing import Any

import click

from flows.terminal import complain

ENCODER = "Location of the encoder: a Hub id, a folder, or package:NAME."
OFFLINE = "Never ask the Hub."
JSON = "Print one JSON object."


class Command(click.Command):
    """A command that rejects empty values, and warns of an option that is given twice."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Check the values before conversion, which would turn an empty path into the current folder."""
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        for param in dict.fromkeys(order):
            values = given[param.name or ""]
            if "" in (values if isinstance(values, list) else [values]):
                raise click.BadParameter("it is empty", ctx=ctx, param=param)
            if order.count(param) > 1 and not (param.multiple or getattr(param, "is_flag", False)):
                complain(f"warning: {param.opts[0]} is given {order.count(param)} times; only the last one counts")
        return super().parse_args(ctx, args)


class FiniteRange(click.FloatRange):
    """A range of finite numbers. Click itself accepts ``nan`` in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert a value to a finite number in the range."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number
