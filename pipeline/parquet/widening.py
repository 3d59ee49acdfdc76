"""The Arrow type that holds the values of two types, if one exists."""

from __future__ import annotations

import pyarrow as pa

_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BINARIES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_TIME_UNITS = ("s", "ms", "us", "ns")


def text_type(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text."""
    kind = plain_type(kind)
    return any(is_one(kind) for is_one in _STRINGS)


def binary_type(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds bytes, which may be text."""
    kind = plain_type(kind)
    return any(is_one(kind) for is_one in _BINARIES)


def wider(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    """Return the type that holds every value of both; None if a value would be lost."""
    if one == two:
        return one
    if pa.types.is_null(one) or pa.types.is_null(two):
        return two if pa.types.is_null(one) else one
    if pa.types.is_dictionary(one) or pa.types.is_dictionary(two):
        return _wider_dictionary(one, two)
    for family, widest in ((_STRINGS, pa.large_string()), (_BINARIES, pa.large_binary())):
        if all(any(is_one(kind) for is_one in family) for kind in (one, two)):
            return widest
    if pa.types.is_integer(one) and pa.types.is_integer(two):
        return _wider_integer(one, two)
    if pa.types.is_floating(one) and pa.types.is_floating(two):
        return max(one, two, key=lambda kind: kind.bit_width)
    if pa.types.is_decimal(one) and pa.types.is_decimal(two):
        return _wider_decimal(one, two)
    return _wider_time(one, two) or _wider_nested(one, two)


def _wider_dictionary(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    values = wider(*(kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (one, two)))
    if values is None or not (pa.types.is_dictionary(one) and pa.types.is_dictionary(two)):
        return values
    # Each file orders its categories by itself, so ordered ones cannot be joined.
    return pa.dictionary(pa.int32(), values) if not one.ordered and not two.ordered else None


def _wider_integer(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    signed = [kind for kind in (one, two) if pa.types.is_signed_integer(kind)]
    if len(signed) != 1:
        return max(one, two, key=lambda kind: kind.bit_width)
    unsigned = two if signed[0] == one else one
    width = max(signed[0].bit_width, 2 * unsigned.bit_width)
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(width)


def _wider_decimal(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    scale = max(one.scale, two.scale)
    precision = scale + max(one.precision - one.scale, two.precision - two.scale)
    if precision > 76:
        return None
    return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)


def _wider_time(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    """Widen any two times of day, and timestamps and durations up to microseconds.

    Types in nanoseconds are left alone, because they cover 585 years only.
    """
    if pa.types.is_time(one) and pa.types.is_time(two):
        unit = max(one.unit, two.unit, key=_TIME_UNITS.index)
        return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    for is_one, make in ((pa.types.is_timestamp, pa.timestamp), (pa.types.is_duration, pa.duration)):
        if is_one(one) and is_one(two) and "ns" not in (one.unit, two.unit):
            zones = [kind.tz for kind in (one, two) if pa.types.is_timestamp(kind)]
            unit = max(one.unit, two.unit, key=_TIME_UNITS.index)
            return None if len(set(zones)) > 1 else make(unit, *zones[:1])
    return None


def _wider_nested(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    if pa.types.is_map(one) and pa.types.is_map(two):
        key, item = wider(one.key_type, two.key_type), wider(one.item_type, two.item_type)
        if key is None or item is None or one.keys_sorted != two.keys_sorted:
            return None
        item_field = one.item_field.with_type(item).with_nullable(one.item_field.nullable or two.item_field.nullable)
        return pa.map_(one.key_field.with_type(key), item_field, keys_sorted=one.keys_sorted)
    if all(any(is_one(kind) for is_one in _LISTS) for kind in (one, two)):
        value = wider(one.value_type, two.value_type)
        if value is None:
            return None
        element = one.value_field.with_type(value).with_nullable(one.value_field.nullable or two.value_field.nullable)
        if pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(two) and one.list_size == two.list_size:
            return pa.list_(element, one.list_size)
        return (
            pa.large_list(element) if pa.types.is_large_list(one) or pa.types.is_large_list(two) else pa.list_(element)
        )
    if pa.types.is_struct(one) and pa.types.is_struct(two) and [f.name for f in one] == [f.name for f in two]:
        parts = [(a, b, wider(a.type, b.type)) for a, b in zip(one, two, strict=True)]
        if all(kind is not None for _, _, kind in parts):
            return pa.struct([a.with_type(kind).with_nullable(a.nullable or b.nullable) for a, b, kind in parts])
    return None


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values, without extension and dictionary."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind
