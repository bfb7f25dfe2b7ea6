"""Clean-up of graphs, on graphs written by hand."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from nni_prune_ext.export.graph_cleaning import (
    constants_to_initializers,
    drop_unused_domains,
    fold_constants,
    name_nodes_after_layers,
    remove_identities,
    remove_unread,
    strip_traces,
)


def graph_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    return helper.make_model(helper.make_graph(list(nodes), "graph", ports[:1], ports[1:]))


def test_chains_of_identities_vanish_and_their_readers_read_the_source() -> None:
    model = graph_of(
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Add", ["b", "a"], ["y"]),
    )

    remove_identities(model)

    assert [("Add", ["x", "x"])] == [(node.op_type, list(node.input)) for node in model.graph.node]


def test_an_identity_that_names_an_output_stays() -> None:
    model = graph_of(helper.make_node("Identity", ["x"], ["y"]))

    remove_identities(model)

    assert ["Identity"] == [node.op_type for node in model.graph.node]


def test_readers_inside_branches_read_the_source_too() -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
    )
    model = graph_of(
        helper.make_node("Identity", ["x"], ["a"]),
        helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch),
    )

    remove_identities(model)

    (node,) = model.graph.node
    assert [["x"], ["x"]] == [list(attribute.g.node[0].input) for attribute in node.attribute]


def test_constants_become_initializers() -> None:
    value = helper.make_tensor("ignored", TensorProto.FLOAT, [1], [2.0])
    model = graph_of(helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Add", ["x", "c"], ["y"]))

    constants_to_initializers(model)

    assert ["Add"] == [node.op_type for node in model.graph.node]
    assert [("c", [2.0])] == [(tensor.name, list(tensor.float_data)) for tensor in model.graph.initializer]


def test_documentation_and_metadata_vanish_at_every_depth() -> None:
    node = helper.make_node("Relu", ["x"], ["z"], doc_string="/home/me/model.py")
    branch = helper.make_graph([node], "branch", [], [], doc_string="/home/me/model.py")
    model = graph_of(helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))
    helper.set_model_props(model, {"trace": "/home/me/model.py"})

    strip_traces(model)

    assert b"model.py" not in model.SerializeToString()


def test_nodes_are_named_after_the_innermost_layer_and_numbered() -> None:
    nodes = [helper.make_node("Relu", ["x"], [output], name="node") for output in "abcd"]
    recorded = ["['', 'stem', 'stem.0', 'relu']", "['', 'stem', 'stem.0', 'relu_1']", "['_empty_hook', 'relu_2']"]
    for node, scopes in zip(nodes, recorded, strict=False):
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    model = graph_of(*nodes)

    name_nodes_after_layers(model)

    assert ["stem.0/Relu", "stem.0/Relu_2", "Relu", "node"] == [node.name for node in model.graph.node]


def constant(name: str, values: list[int]) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def test_sizes_are_computed_where_all_parts_are_known() -> None:
    model = graph_of(
        helper.make_node("Concat", ["a", "b"], ["c"], axis=0),
        helper.make_node("Cast", ["c"], ["d"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["d", "x"], ["e"], axis=0),
        helper.make_node("Relu", ["w"], ["z"]),
        helper.make_node("Add", ["e", "z"], ["y"]),
    )
    model.graph.initializer.extend([constant("a", [1]), constant("b", [2, 3]), constant("w", [4]), constant("v", [5])])

    fold_constants(model)

    assert ["Concat", "Relu", "Add"] == [node.op_type for node in model.graph.node]
    found = {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer}
    assert {"w": [4], "d": [1.0, 2.0, 3.0]} == found


def test_an_output_keeps_its_name_even_if_it_is_known() -> None:
    model = graph_of(helper.make_node("Concat", ["a"], ["y"], axis=0))
    model.graph.initializer.append(constant("a", [1]))

    fold_constants(model)

    assert ["Concat"] == [node.op_type for node in model.graph.node]


def test_what_a_branch_reads_stays() -> None:
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])
    branch = helper.make_graph([helper.make_node("Add", ["x", "a"], ["z"])], "branch", [], [output])
    model = graph_of(helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))
    model.graph.initializer.extend([constant("a", [1]), constant("b", [2])])

    remove_unread(model)

    assert ["a"] == [tensor.name for tensor in model.graph.initializer]


def test_operator_sets_that_nobody_uses_are_dropped() -> None:
    model = graph_of(helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Own", ["a"], ["y"], domain="own"))
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, 1) for domain in ("", "other", "own"))

    drop_unused_domains(model)

    assert ["", "own"] == [entry.domain for entry in model.opset_import]
