"""An encoder of the BERT family as an ONNX graph, with its pooling and what follows it inside.

Shapes: B texts, L tokens, D hidden size, H heads; B and L are open. Values are named by strings;
`_Graph.add` appends a node and returns the name of what it computes.
"""

import math
from typing import Any

import numpy as np

from ragjax.models.encoder import TextEncoder
from ragjax.models.encoders.roberta import RobertaConfig
from ragjax.models.layers.head import Dense, Truncate
from ragjax.models.layers.pooling import pooling_modes

OPSET, IR_VERSION = 17, 8  # the first opset with LayerNormalization, and what goes with it
WORDS = "embeddings.word_embeddings.weight"  # the table of the tokens
HIDDEN, EMBEDDING = "last_hidden_state", "sentence_embedding"
_MASKED_SCORE = -1e9  # as in `ragjax.models.layers.attention`


def build_model(encoder: TextEncoder, tensors: Any) -> Any:
    """Builds the graph of an encoder.

    Args:
        encoder: Of the families of BERT or RoBERTa.
        tensors: Name as in a Hugging Face folder of BERT → float32 array.

    Returns:
        An `onnx.ModelProto`. Inputs: `input_ids`, `attention_mask` and, with token types,
        `token_type_ids`, each `[B, L]` int64. Outputs: `last_hidden_state` `[B, L, D]` and
        `sentence_embedding` `[B, D']`, float32, as `encoder.encode` computes it.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = _Graph()
    typed = encoder.config.type_vocab_size > 1
    names = ("input_ids", "attention_mask", *(("token_type_ids",) if typed else ()))
    mask = graph.add("Cast", "attention_mask", to=TensorProto.FLOAT)  # [B, L]
    hidden = _hidden(graph, encoder, tensors, mask, typed=typed)
    graph.add("Identity", hidden, output=HIDDEN)
    wide = graph.add("Unsqueeze", mask, graph.ints(2))  # [B, L, 1]
    pooled = [_pool(graph, mode, hidden, mask, wide) for mode in pooling_modes(encoder.pooling)]
    found = pooled[0] if len(pooled) == 1 else graph.add("Concat", *pooled, axis=1)
    graph.add("Identity", _finish(graph, encoder, found), output=EMBEDDING)
    size = encoder.config.hidden_size

    def value(name: str, kind: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    made = helper.make_graph(
        graph.nodes,
        "encoder",
        [value(name, TensorProto.INT64, ["batch", "tokens"]) for name in names],
        [
            value(HIDDEN, TensorProto.FLOAT, ["batch", "tokens", size]),
            value(EMBEDDING, TensorProto.FLOAT, ["batch", encoder.embedding_size]),
        ],
        graph.constants,
    )
    model = helper.make_model(
        made,
        producer_name="ragjax",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model


class _Graph:
    """Nodes in the order in which they run, and the constants that they take."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._named: dict[tuple[str, bytes, tuple[int, ...]], str] = {}

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output + "_", **attributes))
        return output

    def weight(self, name: str, array: Any) -> str:
        return self._tensor(name, np.asarray(array, np.float32, order="C"))

    def ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def _constant(self, array: np.ndarray) -> str:
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._named:
            self._named[key] = self._tensor(f"constant_{len(self._named)}", array)
        return self._named[key]

    def _tensor(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(array, name))
        return name


def _hidden(graph: _Graph, encoder: TextEncoder, tensors: Any, mask: str, *, typed: bool) -> str:
    config = encoder.config
    epsilon = config.layer_norm_eps

    def norm(value: str, name: str) -> str:
        scale, bias = (
            graph.weight(f"{name}.{part}", tensors[f"{name}.{part}"]) for part in ("weight", "bias")
        )
        return graph.add("LayerNormalization", value, scale, bias, axis=-1, epsilon=epsilon)

    def linear(value: str, name: str) -> str:
        kernel = graph.weight(f"{name}.weight", tensors[f"{name}.weight"].T)
        bias = graph.weight(f"{name}.bias", tensors[f"{name}.bias"])
        return graph.add("Add", graph.add("MatMul", value, kernel), bias)

    def table(kind: str) -> str:
        name = f"embeddings.{kind}_embeddings.weight"
        return graph.weight(name, tensors[name])

    words = graph.add("Gather", table("word"), "input_ids")
    places = _positions(graph, encoder, table("position"))
    # Texts here are of type 0; whoever asks for another one gets it.
    types = graph.add("Gather", table("token_type"), "token_type_ids" if typed else graph.ints(0))
    summed = graph.add("Add", words, graph.add("Add", places, types))
    hidden = norm(summed, "embeddings.LayerNorm")
    blocked = graph.add(
        "Mul", graph.add("Sub", graph.number(1.0), mask), graph.number(_MASKED_SCORE)
    )
    blocked = graph.add("Unsqueeze", blocked, graph.ints(1, 2))  # [B, 1, 1, L]
    split = graph.ints(0, 0, config.num_heads, config.hidden_size // config.num_heads)
    joined = graph.ints(0, 0, config.hidden_size)
    scale = graph.number((config.hidden_size // config.num_heads) ** -0.5)
    for number in range(config.num_layers):
        layer = f"encoder.layer.{number}."

        def heads(name: str, order: list[int], layer: str = layer, value: str = hidden) -> str:
            projected = linear(value, f"{layer}attention.self.{name}")
            return graph.add("Transpose", graph.add("Reshape", projected, split), perm=order)

        query = graph.add("Mul", heads("query", [0, 2, 1, 3]), scale)
        scores = graph.add("MatMul", query, heads("key", [0, 2, 3, 1]))  # [B, H, L, L]
        weights = graph.add("Softmax", graph.add("Add", scores, blocked), axis=-1)
        attended = graph.add("MatMul", weights, heads("value", [0, 2, 1, 3]))
        attended = graph.add("Transpose", attended, perm=[0, 2, 1, 3])
        attended = linear(graph.add("Reshape", attended, joined), f"{layer}attention.output.dense")
        hidden = norm(graph.add("Add", hidden, attended), f"{layer}attention.output.LayerNorm")
        inner = _activate(graph, config.activation, linear(hidden, f"{layer}intermediate.dense"))
        outer = linear(inner, f"{layer}output.dense")
        hidden = norm(graph.add("Add", hidden, outer), f"{layer}output.LayerNorm")
    return hidden


def _positions(graph: _Graph, encoder: TextEncoder, table: str) -> str:
    """Returns the embeddings of the places, `[L, D]` of BERT, `[B, L, D]` of RoBERTa."""
    config = encoder.config
    if not isinstance(config, RobertaConfig):
        length = graph.add("Slice", graph.add("Shape", "input_ids"), graph.ints(1), graph.ints(2))
        return graph.add("Slice", table, graph.ints(0), length, graph.ints(0))
    # Real tokens are counted from `padding_id + 1`, as in `RobertaEmbeddings`.
    padding = graph.ints(config.padding_id)
    other = graph.add("Not", graph.add("Equal", "input_ids", padding))
    real = graph.add("Mul", "attention_mask", graph.add("Cast", other, to=7))  # INT64
    counted = graph.add("Mul", graph.add("CumSum", real, graph.ints(1)), real)
    return graph.add("Gather", table, graph.add("Add", counted, padding))


def _activate(graph: _Graph, name: str, value: str) -> str:
    if name.lower() == "relu":
        return graph.add("Relu", value)
    if name in ("gelu", "GELU"):
        inner = graph.add("Erf", graph.add("Div", value, graph.number(math.sqrt(2))))
    elif name in ("gelu_new", "gelu_pytorch_tanh"):
        square = graph.add("Mul", value, value)
        factor = graph.add(
            "Add", graph.add("Mul", square, graph.number(0.044715)), graph.number(1.0)
        )
        scaled = graph.add("Mul", value, graph.number(math.sqrt(2 / math.pi)))
        inner = graph.add("Tanh", graph.add("Mul", scaled, factor))
    elif name == "SiLU":
        return graph.add("Mul", value, graph.add("Sigmoid", value))
    else:
        return value if name == "Identity" else graph.add(name, value)  # Tanh, Sigmoid
    product = graph.add("Mul", value, graph.add("Add", inner, graph.number(1.0)))
    return graph.add("Mul", product, graph.number(0.5))


def _pool(graph: _Graph, mode: str, hidden: str, mask: str, wide: str) -> str:
    """Returns `[B, D]`, zeros for a text without tokens; see `ragjax.models.layers.pooling`."""
    one = graph.number(1.0)
    if mode == "cls":
        first = graph.add("Gather", hidden, graph.ints(0), axis=1)  # [B, 1, D]
        kept = graph.add("Gather", wide, graph.ints(0), axis=1)
        return graph.add("Squeeze", graph.add("Mul", first, kept), graph.ints(1))
    counts = graph.add("ReduceSum", wide, graph.ints(1), keepdims=0)  # [B, 1]
    if mode == "max":
        lowest = graph.number(float(np.finfo(np.float32).min))
        real = graph.add("Greater", wide, graph.number(0.0))
        largest = graph.add("Where", real, hidden, lowest)
        largest = graph.add("ReduceMax", largest, axes=[1], keepdims=0)
        some = graph.add("Greater", counts, graph.number(0.0))
        return graph.add("Where", some, largest, graph.number(0.0))
    weights = wide
    if mode in ("weightedmean", "lasttoken"):
        # The t-th real token counts t: padding is on the right.
        places = graph.add("Unsqueeze", graph.add("CumSum", mask, graph.ints(1)), graph.ints(2))
        if mode == "lasttoken":
            last = graph.add("Equal", places, graph.add("Unsqueeze", counts, graph.ints(1)))
            places = graph.add("Cast", last, to=1)  # FLOAT
        weights = graph.add("Mul", wide, places)
    total = graph.add("ReduceSum", graph.add("Mul", hidden, weights), graph.ints(1), keepdims=0)
    if mode == "lasttoken":
        return total
    if mode != "mean_sqrt_len_tokens":
        counts = graph.add("ReduceSum", weights, graph.ints(1), keepdims=0)
    divisor = graph.add("Max", counts, one)
    if mode == "mean_sqrt_len_tokens":
        divisor = graph.add("Sqrt", divisor)
    return graph.add("Div", total, divisor)


def _finish(graph: _Graph, encoder: TextEncoder, value: str) -> str:
    """Adds the dense layers, normalisations and truncations behind the pooling."""
    layers = 0
    for step in encoder.steps:
        if isinstance(step, Dense):
            params = encoder.params["projection"][str(layers)]
            kernel = graph.weight(f"dense.{layers}.weight", params["kernel"])
            value = graph.add("MatMul", value, kernel)
            if step.use_bias:
                bias = graph.weight(f"dense.{layers}.bias", params["bias"])
                value = graph.add("Add", value, bias)
            value = _activate(graph, step.activation.replace("ReLU", "relu"), value)
            layers += 1
        elif isinstance(step, Truncate):
            value = graph.add("Slice", value, graph.ints(0), graph.ints(step.size), graph.ints(1))
        else:
            squares = graph.add(
                "ReduceSum", graph.add("Mul", value, value), graph.ints(1), keepdims=1
            )
            large = graph.add("Greater", squares, graph.number(1e-24))
            safe = graph.add("Where", large, squares, graph.number(1.0))
            value = graph.add("Div", value, graph.add("Sqrt", safe))
    return value
