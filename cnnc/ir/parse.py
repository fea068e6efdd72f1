"""Reads the text form of graphs back (the grammar stands in `text`)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import ml_dtypes  # noqa: F401  (registers bfloat16, so that numpy can read it)
import numpy as np

from cnnc.errors import CnncError, LimitError, ModelError, ShapeError
from cnnc.ir.attribute import ATTRIBUTES
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.layout import Layout
from cnnc.ir.literal import Literal
from cnnc.ir.op import OPERATORS
from cnnc.ir.types import Dim, DType, Size, TensorType

_TOKEN = re.compile(
    r"""(?P<space>\s+|;[^\n]*)
      | (?P<string>"(?:[^"\\]|\\.)*")
      | (?P<attribute>[A-Za-z_]\w*<[^>\n]*>)
      | (?P<literal><[^>\n]*>)
      | (?P<extent>\{\w+<=\d+\})
      | (?P<digest>\#[0-9a-f]+)
      | (?P<value>%\d+)
      | (?P<number>-?(?:inf|nan)\b|-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<mark>//|[-+*{}()\[\]=:,@])""",
    re.VERBOSE,
)


def parse_graph(text: str, weights: Mapping[str, np.ndarray] | None = None) -> Graph:
    """Read one graph; `weights` maps the digests of large constants to their arrays.

    Every type is inferred again and compared with the one written.  Raises `ModelError` naming the line.
    """
    parser = _Parser(text, weights or {})
    with parser.explained():
        graph = parser.graph()
        if parser.kind != "end":
            parser.fail("nothing may follow the graph")
    return graph


def parse_attributes(text: str) -> dict[str, Any]:
    """Read `{key=value, ...}` without tensors, as the options of passes are written; raises `ModelError`."""
    parser = _Parser(text, {})
    with parser.explained():
        found = parser.attributes()
        if parser.kind != "end":
            parser.fail("nothing may follow the attributes")
    return found


class _Parser:
    """Recursive descent over the tokens."""

    def __init__(self, text: str, weights: Mapping[str, np.ndarray]) -> None:
        self.text = text
        self.weights = weights
        self.end = 0
        self.advance()

    def advance(self) -> str:
        """Step to the next token, giving the one just left."""
        left = getattr(self, "token", "")
        while True:
            self.start = self.end
            if self.start == len(self.text):
                self.kind, self.token = "end", "the end"
                return left
            match = _TOKEN.match(self.text, self.start)
            if match is None:
                self.token = self.text[self.start]
                self.fail("cannot be read")
            self.end = match.end()
            self.kind, self.token = str(match.lastgroup), match.group()
            if self.kind != "space":
                return left

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say of any error where in the text it is."""
        try:
            yield
        except RecursionError:
            self.fail("nested too deeply")
        except (ShapeError, LimitError, ValueError, OverflowError) as error:
            self.fail(str(error))

    @contextmanager
    def pointing_at(self, begin: tuple[int, str]) -> Iterator[None]:
        """Let errors inside name the token where something begins, not the one after it."""
        here = self.start, self.token
        self.start, self.token = begin
        yield
        self.start, self.token = here

    def fail(self, message: str) -> NoReturn:
        """Raise `ModelError` with the line and the token being looked at."""
        line = self.text.count("\n", 0, self.start) + 1
        raise ModelError(f"IR text line {line}, at {self.token!r}: {message}")

    def accept(self, token: str) -> bool:
        if self.token != token:
            return False
        self.advance()
        return True

    def expect(self, token: str) -> None:
        if not self.accept(token):
            self.fail(f"{token!r} is wanted here")

    def take(self, kind: str) -> str:
        if self.kind != kind:
            self.fail(f"a {kind} is wanted here")
        return self.advance()

    def string(self) -> str:
        return str(json.loads(self.take("string")))

    def graph(self) -> Graph:
        self.expect("graph")
        name = self.string()
        self.expect("{")
        values: dict[str, Value] = {}
        inputs: list[Value] = []
        while self.kind == "value":
            results = self.node(values)
            inputs += [v for v in results if v.op.name == "input"]
        self.expect("return")
        outputs, names = [], []
        while True:
            outputs.append(self.value(values))
            self.expect("as")
            names.append(self.string())
            if not self.accept(","):
                break
        self.expect("}")
        return Graph(name, tuple(inputs), tuple(outputs), tuple(names))

    def value(self, values: Mapping[str, Value]) -> Value:
        if self.kind == "value" and self.token not in values:
            self.fail("this value is not defined above")
        return values[self.take("value")]

    def node(self, values: dict[str, Value]) -> tuple[Value, ...]:
        begin = self.start, self.token
        names = [self.take("value")]
        while self.accept(","):
            names.append(self.take("value"))
        self.expect("=")
        if self.token not in OPERATORS:
            self.fail("there is no such operator")
        operator = self.take("word")
        inputs = []
        if self.accept("("):
            inputs.append(self.value(values))
            while self.accept(","):
                inputs.append(self.value(values))
            self.expect(")")
        attributes = self.attributes()
        self.expect(":")
        types = [self.type()]
        while self.accept(","):
            types.append(self.type())
        loc = self.locations()
        if self.accept("body"):
            attributes["body"] = self.graph()
        with self.pointing_at(begin):
            node = self.build(operator, inputs, attributes, types, loc)
            if len(names) != len(node):
                self.fail(f"{operator} has {len(node)} outputs, {len(names)} are named")
        values.update(zip(names, node, strict=True))
        return node

    def locations(self) -> list[str]:
        loc = []
        if self.accept("@"):
            loc.append(self.string())
            while self.accept(","):
                loc.append(self.string())
        return loc

    def build(
        self, operator: str, inputs: list[Value], attributes: dict[str, Any], types: list[TensorType], loc: list[str]
    ) -> tuple[Value, ...]:
        cls = OPERATORS[operator]
        fields = {spec.name: spec for spec in dataclasses.fields(cls)}
        unknown = sorted(set(attributes) - set(fields))
        if unknown:
            self.fail(f"{operator} has no attribute {unknown[0]}")
        if "type" in fields and "type" not in attributes:
            attributes["type"] = types[0]
        for key, value in attributes.items():
            if isinstance(value, _Deferred):
                attributes[key] = self.literal(value.text, types[0])
        try:
            result = call(cls(**attributes), *inputs, loc=loc).node
        except TypeError as error:
            self.fail(f"{operator}: {error}")
        except CnncError as error:
            self.fail(str(error))
        if result.types != tuple(types):
            self.fail(f"{operator} gives {', '.join(map(str, result.types))}, not {', '.join(map(str, types))}")
        return result.values

    def attributes(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not self.accept("{"):
            return found
        while True:
            key = self.take("word")
            self.expect("=")
            found[key] = self.attribute()
            if not self.accept(","):
                break
        self.expect("}")
        return found

    def attribute(self) -> Any:
        if self.kind == "string":
            return self.string()
        if self.kind in ("literal", "digest"):
            return _Deferred(self.advance())
        if self.kind == "attribute":
            name, _, inner = self.advance()[:-1].partition("<")
            return ATTRIBUTES[name].parse(inner) if name in ATTRIBUTES else self.fail(f"there is no {name}")
        if self.accept("["):
            items = []
            while not self.accept("]"):
                items.append(self.attribute())
                if self.token != "]":
                    self.expect(",")
            return tuple(items)
        words = {"True": True, "False": False, "None": None}
        if self.token in words:
            return words[self.advance()]
        if self.kind == "word":
            return self.dtype()
        if self.kind == "number" and not re.fullmatch(r"-?\d+", self.token):
            return float(self.advance())
        return self.size()

    def dtype(self) -> DType:
        if self.token not in DType.__members__.values():
            self.fail("a dtype is wanted here")
        return DType(self.take("word"))

    def type(self) -> TensorType:
        begin = self.start, self.token
        dtype = self.dtype()
        self.expect("[")
        shape: list[Size] = []
        while not self.accept("]"):
            shape.append(self.size())
            if self.token != "]":
                self.expect(",")
        layout = self.advance() if self.kind == "word" and self.token[0].isupper() else None
        with self.pointing_at(begin):
            return TensorType(tuple(shape), dtype, Layout(layout) if layout else None)

    def size(self) -> Size:
        """Read a sum of products, as `Dim` prints itself."""
        total = self.term()
        while self.token in ("+", "-") or (self.kind == "number" and self.token.startswith("-")):
            if self.accept("+"):
                total = total + self.term()
            elif self.accept("-"):
                total = total - self.term()
            else:
                total = total + self.term()
        return total

    def term(self) -> Size:
        if self.accept("-"):
            return -self.term()
        value = self.factor()
        while self.accept("*"):
            value = value * self.factor()
        return value

    def factor(self) -> Size:
        if self.kind == "number":
            return int(self.advance())
        if self.kind == "extent":
            name, _, upper = self.advance()[1:-1].partition("<=")
            return Dim.symbol(name, int(upper))
        self.expect("(")
        value = self.size()
        self.expect(")")
        self.expect("//")
        divisor = int(self.take("number"))
        return value // divisor

    def literal(self, text: str, type_: TensorType) -> Literal:
        if not text.startswith("#"):
            try:
                return Literal(_read_elements(text[1:-1], type_))
            except (ValueError, OverflowError):
                self.fail(f"the constant {text} cannot be read as {type_}")
        array = self.weights.get(text[1:])
        if array is None:
            self.fail(f"the weights file has no constant {text}")
        if array.nbytes != type_.elements * type_.dtype.itemsize:
            self.fail(f"the weights file has other numbers for {text}")
        literal = Literal(array.reshape(-1).view(type_.dtype.numpy).reshape(type_.static_shape))
        if not literal.digest.startswith(text[1:]):
            self.fail(f"the weights file has other numbers for {text}")
        return literal


@dataclasses.dataclass(frozen=True)
class _Deferred:
    """A literal whose dtype is not known before the type is read."""

    text: str


def _read_elements(text: str, type_: TensorType) -> np.ndarray:
    items = [item.strip() for item in text.split(",")] if text else []
    if type_.dtype is DType.BOOL:
        return np.array([item == "True" for item in items], np.bool_).reshape(type_.static_shape)
    return np.array([type_.dtype.numpy.type(item) for item in items], type_.dtype.numpy).reshape(type_.static_shape)
