"""Read a frozen TensorFlow graph (a serialized GraphDef) by protobuf, without TensorFlow."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# The part of TensorFlow's public format that a frozen graph needs: message -> field -> (number,
# type). The name of a message as type means that message; * means repeated.
SCHEMA = {
    "GraphDef": {"node": (1, "*NodeDef"), "library": (2, "FunctionLibrary")},
    "FunctionLibrary": {"function": (1, "*Function")},
    "Function": {"node_def": (3, "*NodeDef")},
    "NodeDef": {
        "name": (1, "string"),
        "op": (2, "string"),
        "input": (3, "*string"),
        "attr": (5, "*Attribute"),
    },
    "Attribute": {"key": (1, "string"), "value": (2, "Value")},
    "Value": {
        "list": (1, "List"),
        "s": (2, "bytes"),
        "i": (3, "int64"),
        "f": (4, "float"),
        "b": (5, "bool"),
        "type": (6, "int32"),
        "tensor": (8, "Tensor"),
    },
    "List": {"s": (2, "*bytes"), "i": (3, "*int64"), "f": (4, "*float")},
    "Tensor": {
        "dtype": (1, "int32"),
        "tensor_shape": (2, "Shape"),
        "tensor_content": (4, "bytes"),
        "float_val": (5, "*float"),
        "double_val": (6, "*double"),
        "int_val": (7, "*int32"),
        "int64_val": (10, "*int64"),
        "bool_val": (11, "*bool"),
    },
    "Shape": {"dim": (2, "*Dimension")},
    "Dimension": {"size": (1, "int64")},
}
# TensorFlow's number of a type -> the type, and the field that holds values outside tensor_content.
DTYPES = {
    1: (np.float32, "float_val"),
    2: (np.float64, "double_val"),
    3: (np.int32, "int_val"),
    9: (np.int64, "int64_val"),
    10: (np.bool_, "bool_val"),
}


@dataclass(frozen=True)
class Node:
    """An operation. An input is `name`, `name:output`, or `^name` for order alone.

    An attribute is a number, bytes, a list of these, or a message Tensor (see `constant`).
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class GraphDef:
    """The nodes of a graph by name, and those in the bodies of its functions."""

    nodes: dict[str, Node]
    function_nodes: tuple[Node, ...]


def parse_graph(content: bytes) -> GraphDef:
    """The graph in the bytes of a .pb file; ValueError if they are none."""
    message = MESSAGES["GraphDef"]()
    try:
        message.ParseFromString(content)
    except Exception as error:  # the error classes differ between protobuf's implementations
        raise ValueError(f"not a GraphDef: {error}") from error
    nodes = {node.name: _node(node) for node in message.node}
    bodies = message.library.function
    return GraphDef(nodes, tuple(_node(node) for body in bodies for node in body.node_def))


def constant(node: Node) -> np.ndarray:
    """The value of a Const node; ValueError if its type is not in DTYPES, or values are lacking."""
    tensor = node.attributes["value"]
    if tensor.dtype not in DTYPES:
        raise ValueError(f"its type is number {tensor.dtype}, which is not supported")
    dtype, field = DTYPES[tensor.dtype]
    shape = [dimension.size for dimension in tensor.tensor_shape.dim]
    if tensor.tensor_content:
        return np.frombuffer(tensor.tensor_content, dtype).reshape(shape)
    values: np.ndarray = np.array(getattr(tensor, field), dtype)
    missing = int(np.prod(shape)) - len(values)
    return np.pad(values, (0, missing), mode="edge").reshape(shape)  # the last value repeats


def _node(message: Any) -> Node:
    attributes = {entry.key: _plain(entry.value) for entry in message.attr}
    return Node(message.name, message.op, tuple(message.input), attributes)


def _plain(value: Any) -> Any:
    """What a Value holds; None if it is of a kind that the schema leaves out."""
    (field, content), *_ = value.ListFields() or [(None, None)]
    if field is None or field.name != "list":
        return content
    return [item for _, items in content.ListFields() for item in items]


def _messages() -> dict[str, Any]:
    """The classes of SCHEMA's messages."""
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="soflow", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            label = kinds.LABEL_REPEATED if kind[0] == "*" else kinds.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            kind = kind.lstrip("*")
            if kind in SCHEMA:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".soflow.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()  # apart from TensorFlow's own messages
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"soflow.{name}"))
        for name in SCHEMA
    }


MESSAGES = _messages()
