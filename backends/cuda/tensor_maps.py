"""Tensor maps of a PrimFunc: parameters after its buffers, each the description of one of them (see `TensorMap`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cnnc.backends.cuda import tma
from cnnc.backends.host.device import TensorMap

_ATTRIBUTE = "cnnc.tensor_maps"


@dataclass(frozen=True)
class MappedBuffer:
    """A map of what lies in a buffer, and the parameter that it is."""

    buffer: Any
    described: TensorMap
    parameter: Any

    @property
    def address(self) -> Any:
        """What copies are given."""
        from cnnc.backends.cuda.launches import address

        return address(self.parameter, 0)


def mapped(buffer: Any, described: TensorMap, number: int) -> MappedBuffer:
    """Declare the parameter for a function's map of this number."""
    from cnnc.backends.lower import loops

    return MappedBuffer(buffer, described, loops.buffer(f"{tma.MAP}{number}", (tma.MAP_WORDS,), "uint64"))


def with_maps(buffers: Sequence[Any], maps: Sequence[MappedBuffer], statement: Any) -> Any:
    """Make a PrimFunc of buffers, then maps of some of them."""
    from cnnc.backends.lower import loops

    described = [[list(buffers).index(each.buffer), asdict(each.described)] for each in maps]
    func = loops.function([*buffers, *(each.parameter for each in maps)], statement)
    return func.with_attr(_ATTRIBUTE, json.dumps(described)) if maps else func


def maps_of(func: Any) -> tuple[tuple[int, TensorMap], ...]:
    """Give a PrimFunc's maps, each with the position of its buffer."""
    described = json.loads(str(func.attrs[_ATTRIBUTE])) if _ATTRIBUTE in func.attrs else []
    return tuple((position, map_from(fields)) for position, fields in described)


def map_from(fields: dict[str, Any]) -> TensorMap:
    """Read a map back from JSON, whose lists were tuples."""
    read: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return TensorMap(**read)
