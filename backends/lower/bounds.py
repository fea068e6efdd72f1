"""What is known of indices while a kernel is described: their ranges, and whether reads stay inside."""

from __future__ import annotations

import math
from typing import Any

from tvm import DataType, ir, te, tirx
from tvm.sym import Analyzer
from tvm_ffi import structural

_LINE = 64
"""Bytes buffers are aligned to: the rest of the last line of one may be read."""


class Bounds:
    """Ranges of the index variables of a kernel."""

    def __init__(self) -> None:
        self._analyzer = Analyzer()
        self._guarded: dict[Any, bool] = {}

    def bind(self, variable: Any, extent: int) -> None:
        """Note that a variable is in [0, extent)."""
        if int(extent) > 0:
            self._analyzer.bind(variable, ir.Range(0, extent), True)

    def simplify(self, index: Any) -> Any:
        """Simplify an index."""
        return self._analyzer.simplify(index)

    def are_reads_safe(self, expression: Any) -> bool:
        """Tell whether every tensor read in an expression is within its buffer, whatever guards stand outside.

        What reads a guarded expression is not safe: once it is inlined, an equal guard outside makes the simplifier
        drop the inner one, and a selection outside is none.
        """
        safe = True

        def visit(call: Any, visitor: Any) -> None:
            nonlocal safe
            if call.op.name == "prim.if_then_else":
                condition, chosen, other = call.args
                visitor.visit(condition)
                # A branch is guarded by this condition and by nothing outside.
                with self._analyzer.constraint_scope(condition):
                    visitor.visit(chosen)
                with self._analyzer.constraint_scope(self._analyzer.simplify(tirx.Not(condition))):
                    visitor.visit(other)
                return
            if call.op.name == "te.tensor_load":
                safe = (
                    safe and self._is_inside(call.args[0], list(call.args[1:])) and not self._has_guards(call.args[0])
                )
            visitor.default_visit(call)

        structural.structural_visit(expression, [(ir.Call, visit)])
        return safe

    def _is_inside(self, tensor: Any, index: list[Any]) -> bool:
        shape = [int(extent) for extent in tensor.shape]
        if len(shape) == 1 and isinstance(tensor.op, te.PlaceholderOp):
            # A vector in memory is read in whole registers.
            per_line = _LINE * 8 // max(DataType(str(tensor.dtype)).bits, 8)
            shape = [math.ceil(shape[0] / per_line) * per_line]
        for position, extent in zip(index, shape, strict=True):
            bound = self._analyzer.const_int_bound(position)
            if bound.min_value < 0 or bound.max_value >= extent:
                return False
        return True

    def _has_guards(self, tensor: Any) -> bool:
        """Tell whether a tensor is computed, by itself or by what it reads, with guards around reads."""
        if not isinstance(tensor.op, te.ComputeOp):
            return False
        if tensor not in self._guarded:
            self._guarded[tensor] = any(map(self._guards_in, tensor.op.body))
        return self._guarded[tensor]

    def _guards_in(self, expression: Any) -> bool:
        found = False

        def visit(call: Any, visitor: Any) -> None:
            nonlocal found
            if call.op.name == "prim.if_then_else":
                found = True
            elif call.op.name == "te.tensor_load":
                found = found or self._has_guards(call.args[0])
            visitor.default_visit(call)

        structural.structural_visit(expression, [(ir.Call, visit)])
        return found
