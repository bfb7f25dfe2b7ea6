"""INT8 files: every layer fused, accuracy kept, origin told, and mistakes refused before anything is overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from precision_nets import Digits
from torch import Tensor, nn

from nni_prune_ext.errors import (
    ConfigError,
    DataError,
    ExportError,
    ModelError,
    NniPruneExtError,
    OutputError,
    ParityError,
)
from nni_prune_ext.export.int8 import CALIBRATIONS, Calibration, quantize_onnx
from nni_prune_ext.export.onnx_static import export_onnx
from nni_prune_ext.export.reduced_export import ReducedExport

LAYERS = ("/stem/stem.0/Conv", "/depthwise/depthwise.0/Conv", "/left/Conv", "/right/Conv", "/head/Gemm")


@pytest.fixture(scope="module")
def quantized(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> ReducedExport:
    out = tmp_path_factory.mktemp("int8") / "model.int8.onnx"
    return quantize_onnx(digits.path, out, digits.train, test_batches=digits.test)


def accuracy(path: Path, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Returns the accuracy of a file in a bare session."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    right = [session.run(None, {"images": i.numpy()})[0].argmax(1) == labels.numpy() for i, labels in batches]
    return float(np.concatenate(right).mean())


def test_every_layer_computes_in_int8(quantized: ReducedExport) -> None:
    assert LAYERS == quantized.reduced
    assert {} == quantized.kept_float


def test_accuracy_is_that_of_a_bare_session_and_hardly_lower(quantized: ReducedExport, digits: Digits) -> None:
    parity = quantized.parity

    assert accuracy(digits.path, digits.test) == parity.float_top1
    assert accuracy(quantized.path, digits.test) == parity.top1
    assert parity.float_top1 is not None
    assert parity.float_top1 > 0.9
    assert parity.drop is not None
    assert abs(parity.drop) < 0.02
    assert parity.top1_agreement is not None
    assert parity.top1_agreement > 0.97


def test_weights_are_signed_per_channel_and_activations_unsigned(quantized: ReducedExport) -> None:
    graph = onnx.load(str(quantized.path)).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}

    readers = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
    kernels = [node for node in readers if tensors[node.input[0]].dims[1:] and len(tensors[node.input[0]].dims) == 4]
    writers = [node for node in graph.node if node.op_type == "QuantizeLinear"]

    assert 4 == len(kernels)
    assert all(onnx.TensorProto.INT8 == tensors[node.input[0]].data_type for node in kernels)
    assert [list(tensors[node.input[0]].dims[:1]) for node in kernels] == [
        list(tensors[node.input[1]].dims) for node in kernels
    ]
    assert {onnx.TensorProto.UINT8} == {tensors[node.input[2]].data_type for node in writers}


def test_the_file_keeps_its_origin_and_tells_how_it_was_made(quantized: ReducedExport, digits: Digits) -> None:
    before = {entry.key: entry.value for entry in onnx.load(str(digits.path)).metadata_props}
    session = onnxruntime.InferenceSession(str(quantized.path), providers=["CPUExecutionProvider"])

    written = session.get_modelmeta().custom_metadata_map

    assert written == quantized.properties
    assert before.items() <= written.items()
    assert "int8" == written["nni_prune_ext.precision"]
    assert sha256(digits.path.read_bytes()).hexdigest() == written["nni_prune_ext.parent_sha256"]
    assert {
        "method": "minmax",
        "images": 128,
        "sha256": sha256(digits.train.numpy().tobytes()).hexdigest(),
    } == json.loads(written["nni_prune_ext.calibration"])


def test_the_file_is_silent_about_this_machine_and_takes_any_batch(quantized: ReducedExport) -> None:
    content = quantized.path.read_bytes()
    proto = onnx.load(str(quantized.path))

    assert not [word for word in (str(Path.cwd()), "site-packages", ".py", "/tmp/") if word.encode() in content]
    assert ["", "N"] == [proto.opset_import[0].domain, proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param]
    assert 1 == len(proto.opset_import)
    assert quantized.path.stat().st_size == quantized.size_bytes


@pytest.mark.parametrize("calibration", CALIBRATIONS[1:3])
def test_other_calibrations_keep_the_accuracy_too(
    digits: Digits, tmp_path: Path, calibration: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    made = quantize_onnx(
        digits.path, tmp_path / "q.onnx", digits.train, calibration=calibration, test_batches=digits.test
    )

    assert LAYERS == made.reduced
    assert calibration in made.properties["nni_prune_ext.calibration"]
    assert "" == capsys.readouterr().out  # the calibrator prints


def test_what_hinders_fusion_is_removed_first(digits: Digits, tmp_path: Path) -> None:
    """A graph with an Identity on a shared bias and BatchNorms by themselves, as an exporter leaves it."""
    dirty = tmp_path / "dirty.onnx"
    torch.onnx.export(
        digits.model.eval(),
        (torch.zeros(1, 1, 8, 8),),
        str(dirty),
        dynamo=False,
        input_names=["images"],
        dynamic_axes={"images": {0: "N"}},
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )
    proto = onnx.load(str(dirty))
    nodes = [node for node in proto.graph.node if node.op_type == "Conv" and len(node.input) == 3]
    for number, node in enumerate(nodes):
        proto.graph.node.insert(0, onnx.helper.make_node("Identity", [node.input[2]], [f"bias_{number}"]))
        node.input[2] = f"bias_{number}"
    onnx.helper.set_model_props(proto, {"nni_prune_ext.version": "of a file that was not cleaned"})
    onnx.save_model(proto, str(dirty))
    assert {"Identity", "BatchNormalization"} <= {node.op_type for node in proto.graph.node}

    made = quantize_onnx(dirty, tmp_path / "q.onnx", digits.train, test_batches=digits.test)

    assert (5, {}) == (len(made.reduced), made.kept_float)
    assert not {"Identity", "BatchNormalization"} & {node.op_type for node in onnx.load(str(made.path)).graph.node}


@pytest.mark.parametrize("pattern", ["*right*", "right", "/right/Conv"])
def test_named_layers_stay_in_float32(digits: Digits, tmp_path: Path, pattern: str) -> None:
    made = quantize_onnx(digits.path, tmp_path / "q.onnx", digits.train, keep_float=[pattern])

    assert {"/right/Conv": "named in keep_float"} == made.kept_float
    assert 4 == len(made.reduced)
    assert '{"/right/Conv": "named in keep_float"}' == made.properties["nni_prune_ext.float_layers"]


def test_without_labels_outputs_are_compared_on_the_calibration_images(digits: Digits, tmp_path: Path) -> None:
    parity = quantize_onnx(digits.path, tmp_path / "q.onnx", digits.train).parity

    assert (128, None, None, True) == (parity.images, parity.top1, parity.drop, parity.passed)
    assert 1e-3 < parity.max_rel < 0.5


def test_a_file_that_loses_too_much_is_not_kept(digits: Digits, tmp_path: Path) -> None:
    out = tmp_path / "q.onnx"
    out.write_text("old")
    too_dark = digits.train * 0.02

    with pytest.raises(ParityError, match=r"loses \d+\.\d points of accuracy .*at most 2\.0 .*keep_float"):
        quantize_onnx(digits.path, out, too_dark, test_batches=digits.test)

    assert ["old"] == [file.read_text() for file in tmp_path.iterdir()]
    made = quantize_onnx(digits.path, out, too_dark, test_batches=digits.test, max_drop=1.0)
    assert made.parity.drop is not None
    assert made.parity.drop > 0.02


def test_files_of_one_batch_size_are_calibrated_in_whole_batches(digits: Digits, tmp_path: Path) -> None:
    fixed = export_onnx(
        digits.model, digits.train[:6], tmp_path / "six.onnx", exporter="torchscript", dynamic_batch=False
    )

    made = quantize_onnx(fixed.path, tmp_path / "q.onnx", digits.train, test_batches=digits.test)

    assert 126 == json.loads(made.properties["nni_prune_ext.calibration"])["images"]
    assert 198 + 198 + 48 == made.parity.images
    with pytest.raises(DataError, match="5 test images, expected at least 6"):
        quantize_onnx(fixed.path, tmp_path / "q.onnx", digits.train, test_batches=[(digits.train[:5], torch.zeros(5))])


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def test_dynamic_quantisation_is_for_matrix_products(digits: Digits, tmp_path: Path) -> None:
    file = export_onnx(Perceptron(), digits.train[:1], tmp_path / "mlp.onnx", exporter="torchscript").path

    made = quantize_onnx(file, tmp_path / "q.onnx", None, calibration="dynamic")

    assert (2, {}) == (len(made.reduced), made.kept_float)
    assert "MatMulInteger" in {node.op_type for node in onnx.load(str(made.path)).graph.node}
    with pytest.raises(ConfigError, match=r"convolutions hold \d.* expected more in the latter.* slower"):
        quantize_onnx(digits.path, tmp_path / "q2.onnx", None, calibration="dynamic")


BAD_IMAGES: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "shape": (lambda images: images[:, :, :7], r"\(128, 1, 7, 8\), expected float32 \(N, 1, 8, 8\)"),
    "type": (lambda images: images.double(), "float64"),
    "one image": (lambda images: images[0], "expected float32"),
    "few": (lambda images: images[:7], "7 calibration images, expected at least 8"),
    "nan": (lambda images: images.clone().index_fill_(0, torch.tensor([3]), torch.nan), "1 of 128 .* number 3"),
    "none": (lambda images: None, "needs images"),
}


@pytest.mark.parametrize(("change", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_images_that_do_not_fit_are_refused(
    digits: Digits, tmp_path: Path, change: Callable[[Tensor], Tensor | None], message: str
) -> None:
    out = tmp_path / "q.onnx"
    out.write_text("old")

    with pytest.raises(DataError, match=message):
        quantize_onnx(digits.path, out, change(digits.train))

    assert ["old"] == [file.read_text() for file in tmp_path.iterdir()]


def foreign(proto: onnx.ModelProto) -> None:
    del proto.metadata_props[:]


def gated(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="nni_prune_ext.flavour", value="mask")


def two_inputs(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (foreign, ExportError, "does not say that nni_prune_ext wrote it"),
        (gated, ExportError, "is gated .flavour mask."),
        (two_inputs, ModelError, "has 2 inputs"),
    ],
)
def test_files_of_other_kinds_are_refused(
    digits: Digits,
    tmp_path: Path,
    change: Callable[[onnx.ModelProto], None],
    kind: type[NniPruneExtError],
    message: str,
) -> None:
    proto = onnx.load(str(digits.path))
    change(proto)
    onnx.save_model(proto, str(tmp_path / "other.onnx"))

    with pytest.raises(kind, match=message):
        quantize_onnx(tmp_path / "other.onnx", tmp_path / "q.onnx", digits.train)

    assert ["other.onnx"] == [file.name for file in tmp_path.iterdir()]


def test_damaged_absent_and_quantised_files_are_refused(
    digits: Digits, quantized: ReducedExport, tmp_path: Path
) -> None:
    damaged, out = tmp_path / "damaged.onnx", tmp_path / "q.onnx"
    damaged.write_bytes(digits.path.read_bytes()[:500])

    with pytest.raises(ModelError, match="is damaged or no ONNX file"):
        quantize_onnx(damaged, out, digits.train)
    with pytest.raises(ModelError, match="no file"):
        quantize_onnx(tmp_path / "absent.onnx", out, digits.train)
    with pytest.raises(ExportError, match="of precision int8 already"):
        quantize_onnx(quantized.path, out, digits.train)

    assert not out.exists()


def test_the_float32_file_is_never_overwritten(digits: Digits, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    shutil.copy(digits.path, file)

    with pytest.raises(OutputError, match="is the float32 file itself"):
        quantize_onnx(file, file, digits.train)

    assert digits.path.read_bytes() == file.read_bytes()


def test_mistaken_options_are_explained(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\*nowhere\*' matches no convolution .*expected one of .*/head/Gemm"):
        quantize_onnx(digits.path, tmp_path / "q.onnx", digits.train, keep_float=["*nowhere*"])
    with pytest.raises(ConfigError, match="'minmaxx', expected minmax.*Did you mean 'minmax'"):
        quantize_onnx(digits.path, tmp_path / "q.onnx", digits.train, calibration="minmaxx")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="compared on 0 images"):
        quantize_onnx(digits.path, tmp_path / "q.onnx", digits.train, test_batches=[])

    assert [] == list(tmp_path.iterdir())
