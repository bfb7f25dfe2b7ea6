"""Mask forms and compact forms of small gated networks, against a slow reference that runs the markers themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gated_nets import (
    NETS,
    PAIRS,
    SCATTERED,
    SIXTEENS,
    SIZE,
    UNEQUAL,
    Array,
    Net,
    chain,
    depthwise,
    gated_conv,
    large,
    one_each,
)
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn

from nni_prune_ext.errors import ExportError
from nni_prune_ext.export.gate_graphs import compact_form, gated_layers, mask_form, with_masks
from nni_prune_ext.export.graph_cleaning import strip_traces


class Gate(OpRun):
    """The marker as its definition says it, channel by channel."""

    op_domain = "nni_prune_ext"

    def _run(self, x, logits, name=None, units=None):
        y = np.zeros_like(x)
        for n in range(len(x)):
            largest = next((u for u in range(logits.shape[1]) if logits[n, u] == logits[n].max()), 0)
            for c, unit in enumerate(units):
                if logits[n, unit] > 0 or unit == largest:
                    y[n, c] = x[n, c]
        return (y,)


@pytest.fixture(params=NETS)
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    net = Net()
    return net.model(NETS[request.param](net))


def inputs_of(batch: int, count: int = 1, seed: int = 1) -> list[Array]:
    """Pictures of different brightness, so that heads decide differently."""
    random = np.random.default_rng(seed)
    scales = random.uniform(0.2, 2.5, (count, batch, 3, 1, 1))
    return list((scales * random.normal(0, 1, (count, batch, 3, SIZE, SIZE))).astype(np.float32))


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, pictures: list[Array]) -> list[list[Array]]:
    opened = session(model)
    return [opened.run(None, {"input": picture}) for picture in pictures]


def by_definition(model: onnx.ModelProto, pictures: list[Array]) -> list[Array]:
    reference = ReferenceEvaluator(model, new_ops=[Gate])
    return [reference.run(None, {"input": picture})[0] for picture in pictures]


def assert_close(expected: Array, actual: Array) -> None:
    assert expected.shape == actual.shape
    assert np.abs(expected - actual).max() <= 1e-5 * np.abs(expected).max()


def test_the_mask_form_computes_what_the_markers_say(model: onnx.ModelProto) -> None:
    pictures = inputs_of(batch=3, count=4)

    actual = run(mask_form(model), pictures)

    for expected, (output,) in zip(by_definition(model, pictures), actual):
        assert_close(expected, output)


def test_the_compact_form_computes_what_the_mask_form_computes(model: onnx.ModelProto) -> None:
    pictures = inputs_of(batch=1, count=32)

    actual = run(compact_form(model), pictures)

    for (expected,), (output,) in zip(run(mask_form(model), pictures), actual):
        assert_close(expected, output)


def test_gates_that_are_not_gathered_become_masks(model: onnx.ModelProto) -> None:
    names = [layer.name for layer in gated_layers(model) if layer.can_gather]
    pictures = inputs_of(batch=1, count=4)
    expected = run(mask_form(model), pictures)

    for gathered in ([], names[:1], names[1:]):
        compact = compact_form(model, gathered)

        assert len(gathered) == sum(node.op_type == "NonZero" for node in compact.graph.node)
        for (before,), (after,) in zip(expected, run(compact, pictures)):
            assert_close(before, after)


def test_both_forms_open_the_same_units_and_the_units_change_with_the_input() -> None:
    net = Net()
    model = net.model(chain(net, SCATTERED))
    pictures = inputs_of(batch=1, count=32)

    masked, compact = (run(with_masks(form), pictures) for form in (mask_form(model), compact_form(model)))

    for first, second in zip(masked, compact):
        assert [(1, 3), (1, 10)] == [mask.shape for mask in first[1:]]
        assert all(np.array_equal(*masks) for masks in zip(first[1:], second[1:]))
    for masks in zip(*[outputs[1:] for outputs in masked]):
        assert 0.1 < np.mean(masks) < 0.9
        assert len({mask.tobytes() for mask in masks}) > 2


def test_every_index_of_open_filters_comes_from_a_guarded_mask(model: onnx.ModelProto) -> None:
    compact = compact_form(model)

    writers = {node.output[0]: node for node in compact.graph.node}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in compact.graph.initializer}
    for node in compact.graph.node:
        if node.op_type == "NonZero":
            mask = writers[node.input[0]]
            if mask.op_type == "Gather":  # from units to blocks, of which every unit has one
                units = constants[mask.input[1]]
                mask = writers[mask.input[0]]
                assert set(range(constants[writers[mask.input[1]].input[0]].size)) == set(units.tolist())
            assert "Or" == mask.op_type
            positive, guard = (writers[name] for name in mask.input)
            numbers, largest = guard.input
            assert ("Equal", "ArgMax") == (guard.op_type, writers[largest].op_type)
            assert positive.input[0] == writers[largest].input[0]
            assert np.array_equal(np.arange(constants[numbers].size)[None], constants[numbers])


RUN_WITH_NUMBERS_THAT_ARE_NONE = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for value in (0.0, -1e30, np.inf, np.nan):
    outputs = session.run(None, {"input": np.full((1, 3, 7, 7), value, np.float32)})
    print(*[np.flatnonzero(mask).tolist() for mask in outputs[1:]])
"""


@pytest.mark.parametrize("logit", [-1.0, 0.0])
@pytest.mark.parametrize("units", [one_each(12), one_each(70), SCATTERED, UNEQUAL])
def test_the_first_unit_is_open_if_no_logit_is_positive(units: tuple[int, ...], logit: float, tmp_path: Path) -> None:
    net = Net()
    model = net.model(chain(net, units, units, shift=logit))
    for tensor in model.graph.initializer:
        if list(tensor.dims[:1]) == [max(units) + 1] and len(tensor.dims) == 2:  # heads that say the same to everything
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    onnx.save(with_masks(compact_form(model)), tmp_path / "compact.onnx")

    # In a process of its own: ONNX Runtime never returns from a convolution without input channels.
    script = [sys.executable, "-c", RUN_WITH_NUMBERS_THAT_ARE_NONE, str(tmp_path / "compact.onnx")]
    result = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True)

    assert ["[0] [0]"] * 4 == result.stdout.splitlines()


def test_blocks_are_gathered_as_blocks() -> None:
    net = Net()

    compact = compact_form(net.model(chain(net, SCATTERED, SCATTERED)))

    shapes = {tuple(tensor.dims) for tensor in compact.graph.initializer}
    assert (3, 4, 3, 3, 3) in shapes
    assert (3, 4, 12, 3, 3) in shapes


def test_large_kernels_are_gathered_in_one_pass() -> None:
    net = Net()

    compact = compact_form(net.model(large(net, SIXTEENS, SIXTEENS)))

    assert (192 * 12, 16, 3, 3) in {tuple(tensor.dims) for tensor in compact.graph.initializer}


def test_weights_are_stored_once_and_keep_their_names() -> None:
    net = Net()
    model = net.model(chain(net))

    compact = compact_form(model)

    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert weights == {tensor.name: tuple(tensor.dims) for tensor in compact.graph.initializer if len(tensor.dims) == 4}
    assert compact.ByteSize() < model.ByteSize() + 8000


def test_computed_weights_come_with_their_kernel_size(model: onnx.ModelProto) -> None:
    for node in compact_form(model).graph.node:
        if node.op_type == "Conv":
            assert "kernel_shape" in {entry.name for entry in node.attribute} or "/" not in node.input[1]


def test_everything_in_a_compact_form_is_read(model: onnx.ModelProto) -> None:
    graph = compact_form(model).graph

    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert all(not read.isdisjoint(node.output) for node in graph.node)
    assert read.issuperset(tensor.name for tensor in graph.initializer)


def test_the_given_model_stays_as_it_was(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()

    for form in (mask_form(model), compact_form(model)):
        with_masks(form)

    assert before == model.SerializeToString()


def test_results_import_no_domain_of_their_own(model: onnx.ModelProto) -> None:
    for form in (mask_form(model), compact_form(model)):
        assert [("", 18)] == [(entry.domain, entry.version) for entry in form.opset_import]
        assert model.ir_version == form.ir_version


def test_layers_are_described() -> None:
    net = Net()

    first, second, third = gated_layers(net.model(depthwise(net)))

    assert (8, 8, 1, SIZE, SIZE, (1, 1), 3, True) == (
        first.channels,
        first.units,
        first.block,
        first.height,
        first.width,
        first.kernel,
        first.in_channels,
        first.can_gather,
    )
    assert (False, "the convolution has 8 groups, a number that ONNX fixes") == (second.can_gather, second.reason)
    assert (4, 2) == (third.units, third.block)


def test_a_layer_whose_output_others_read_is_masked_and_says_so() -> None:
    net = Net()
    conv = net.conv("input", 3, 8)
    model = net.model(net.classify(net.op("Add", net.gate(conv, "input", 3, PAIRS), conv), 8))

    (layer,) = gated_layers(model)

    assert (False, "the output of the convolution is read by others than the gate") == (layer.can_gather, layer.reason)
    with pytest.raises(ExportError, match="'gate0' cannot be gathered: the output of the convolution is read"):
        compact_form(model, ["gate0"])


def test_an_unknown_gate_cannot_be_gathered() -> None:
    net = Net()

    with pytest.raises(ExportError, match="'nowhere' cannot be gathered: there is no such gate"):
        compact_form(net.model(chain(net)), ["nowhere"])


def test_units_without_channels_are_refused() -> None:
    net = Net()
    model = net.model(gated_conv(net, "input", 3, (0, 0, 2, 2)))

    with pytest.raises(ExportError, match=r"units of gate 'gate0' are \[0, 2\]"):
        mask_form(model)


def test_logits_for_units_without_channels_are_refused() -> None:
    net = Net()
    pooled = net.op("Flatten", net.op("GlobalMaxPool", "input"))
    model = net.model(net.marker(net.conv("input", 3, 4), pooled, (0, 0, 1, 1)))

    with pytest.raises(ExportError, match=r"'gate0' has 2 units for logits of shape \(None, 3\)"):
        mask_form(model)


def test_a_fixed_batch_of_two_has_no_compact_form() -> None:
    net = Net()
    model = net.model(chain(net))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2

    with pytest.raises(ExportError, match="fixed batch size 2"):
        compact_form(model)


class TorchNet(nn.Module):
    """A gated residual block in PyTorch, which leaves markers when it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)])
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(13, 3)])
        self.shortcut = nn.Conv2d(3, 12, 1)
        self.classifier = nn.Linear(12, 5)
        for head in self.heads:
            nn.init.normal_(head.weight, std=6)

    def gated(self, index: int, x: Tensor) -> Tensor:
        pooled = x.amax((2, 3))
        logits = self.heads[index](torch.cat([pooled, torch.ones_like(pooled[:, :1])], 1).softmax(1))
        features = self.convs[index](x)
        if torch.onnx.is_in_onnx_export():
            return torch.onnx.ops.symbolic(
                "nni_prune_ext::Gate",
                (features, logits),
                {"name": f"convs.{index}", "units": list(SCATTERED)},
                dtype=features.dtype,
                shape=features.shape,
                version=1,
            )
        opened = (logits > 0) | nn.functional.one_hot(logits.argmax(1), 3).bool()
        return features * opened[:, list(SCATTERED)][:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.silu(self.gated(0, x))
        return self.classifier(nn.functional.gelu(self.gated(1, inner) + self.shortcut(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def torch_net() -> TorchNet:
    torch.manual_seed(3)
    return TorchNet().eval()


@pytest.fixture(scope="module")
def exported(torch_net: TorchNet) -> onnx.ModelProto:
    program = torch.onnx.export(
        torch_net,
        (torch.randn(2, 3, SIZE, SIZE),),
        input_names=["input"],
        opset_version=18,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: "N"},),
        verbose=False,
    )
    strip_traces(program.model_proto)
    return program.model_proto


def test_markers_of_pytorch_survive_the_exporter(exported: onnx.ModelProto) -> None:
    layers = gated_layers(exported)

    assert [("convs.0", 3, 4), ("convs.1", 3, 4)] == [(layer.name, layer.units, layer.block) for layer in layers]
    assert all(layer.can_gather for layer in layers)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_mask_form_agrees_with_pytorch(torch_net: TorchNet, exported: onnx.ModelProto, batch: int) -> None:
    pictures = inputs_of(batch, count=8)

    for picture, (output,) in zip(pictures, run(mask_form(exported), pictures)):
        assert_close(torch_net(torch.from_numpy(picture)).detach().numpy(), output)


def test_a_compact_form_agrees_with_pytorch(torch_net: TorchNet, exported: onnx.ModelProto) -> None:
    pictures = inputs_of(1, count=32)

    compact = compact_form(exported)

    assert 2 == sum(node.op_type == "NonZero" for node in compact.graph.node)
    for picture, (output,) in zip(pictures, run(compact, pictures)):
        assert_close(torch_net(torch.from_numpy(picture)).detach().numpy(), output)
