"""Literals as the engine moves them: bindings, attributes of messages, conditions of branches."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgpack
from flyteidl.core import condition_pb2, literals_pb2

START = "start-node"
"""Of a workflow's own inputs."""

Literals = Mapping[str, literals_pb2.Literal]


def bound(bindings: Iterable[Any], made: Mapping[str, Literals]) -> literals_pb2.LiteralMap:
    """What the bindings name, out of the outputs of the nodes so far."""
    found = literals_pb2.LiteralMap()
    for binding in bindings:
        found.literals[binding.var].CopyFrom(_value(binding.binding, made))
    return found


def _value(data: Any, made: Mapping[str, Literals]) -> literals_pb2.Literal:
    kind = data.WhichOneof("value")
    literal = literals_pb2.Literal()
    if kind == "promise":
        outputs = made[data.promise.node_id or START]
        return _attribute(outputs[data.promise.var], data.promise.attr_path)
    if kind == "scalar":
        literal.scalar.CopyFrom(data.scalar)
    elif kind == "collection":
        literal.collection.literals.extend(_value(each, made) for each in data.collection.bindings)
        literal.collection.SetInParent()
    elif kind == "map":
        literal.map.SetInParent()
        for name, each in data.map.bindings.items():
            literal.map.literals[name].CopyFrom(_value(each, made))
    else:
        raise AssertionError(f"a binding of kind {kind}")
    return literal


def _attribute(literal: literals_pb2.Literal, path: Any) -> literals_pb2.Literal:
    """A part of a message, as the engine cuts it out: msgpack in, msgpack out, and no hash."""
    if not path:
        return literal
    assert literal.scalar.WhichOneof("value") == "binary", "attributes are those of messages"
    value = msgpack.unpackb(literal.scalar.binary.value, strict_map_key=False)
    for part in path:
        value = value[getattr(part, part.WhichOneof("value"))]
    cut = literals_pb2.Literal()
    cut.scalar.binary.tag = literal.scalar.binary.tag
    cut.scalar.binary.value = msgpack.packb(value)
    return cut


def holds(expression: condition_pb2.BooleanExpression, inputs: Literals) -> bool:
    """Whether a branch is taken. Only primitives can be compared, as in the real engine."""
    if expression.WhichOneof("expr") == "conjunction":
        left, right = (holds(each, inputs) for each in (
            expression.conjunction.left_expression, expression.conjunction.right_expression))  # fmt: skip
        both = expression.conjunction.operator == condition_pb2.ConjunctionExpression.AND
        return (left and right) if both else (left or right)
    compared = expression.comparison
    left, right = (_operand(each, inputs) for each in (compared.left_value, compared.right_value))
    operators = condition_pb2.ComparisonExpression
    return {
        operators.EQ: left == right,
        operators.NEQ: left != right,
        operators.GT: left > right,
        operators.GTE: left >= right,
        operators.LT: left < right,
        operators.LTE: left <= right,
    }[compared.operator]


def _operand(operand: Any, inputs: Literals) -> Any:
    primitive = operand.primitive
    if operand.WhichOneof("val") == "var":
        scalar = inputs[operand.var].scalar
        assert scalar.WhichOneof("value") == "primitive", f"{operand.var} is no primitive"
        primitive = scalar.primitive
    return getattr(primitive, primitive.WhichOneof("value"))
