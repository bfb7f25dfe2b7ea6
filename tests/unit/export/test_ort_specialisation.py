"""The cache of specialised files: what goes in, what comes out, and everything that leads back to the portable file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from blocked_nets import BLOCK, chain, in_order
from gated_nets import SIZE, Net
from onnx import numpy_helper
from torch import Tensor

from nni_prune_ext import ort_specialisation
from nni_prune_ext.errors import ConfigError, ModelError, OutputError
from nni_prune_ext.evaluation import LatencyReport, LatencyRow
from nni_prune_ext.export.blocked_layout import DOMAIN, BlockedForm
from nni_prune_ext.export.gate_graphs import compact_form, mask_form
from nni_prune_ext.ort_specialisation import Specialised, open_specialised, specialise_ort_cpu
from nni_prune_ext.runtimes.onnxruntime_blocks import host_block_size

pytestmark = pytest.mark.skipif(host_block_size() is None, reason="this machine has no blocked layout")


def compact(seed: int = 0) -> onnx.ModelProto:
    net = Net(seed)
    return compact_form(net.model(chain(net, in_order)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, SIZE, SIZE, generator=generator) * torch.linspace(0.2, 2.5, 8).reshape(-1, 1, 1, 1)


@pytest.fixture
def portable(tmp_path: Path) -> Path:
    onnx.save(compact(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def ratio(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Says what the specialised file's share of the time is: speed is no matter of tests."""

    def set_ratio(value: float) -> None:
        def clock(entries: dict[str, object], inputs: object, **_: object) -> LatencyReport:
            assert ["portable", "specialised"] == list(entries)
            rows = [
                LatencyRow(name, "made up", own, own, own, own, 1, (), {}, None)
                for name, own in zip(entries, (1, value))
            ]
            return LatencyReport(tuple(rows), 1.02, 0.02, "cpu", 1, 1, 1, 0)

        monkeypatch.setattr(ort_specialisation, "measure_latency", clock)

    set_ratio(0.5)
    return set_ratio


@pytest.fixture
def made(portable: Path, cache: Path, images: Tensor) -> Specialised:
    return specialise_ort_cpu(portable, images, cache_folder=cache)


def outputs(path: Path, images: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": image[None].numpy()})[0] for image in images])


def assert_portable(found: Specialised, portable: Path, reason: str) -> None:
    assert portable == found.path
    assert found.reason is not None
    assert reason in found.reason


def test_the_specialised_file_computes_what_the_portable_one_does(
    made: Specialised, portable: Path, cache: Path, images: Tensor
) -> None:
    assert ((made.path,), None) == (tuple(cache.iterdir()), made.reason)
    assert (BLOCK, 0.5, 3, {}) == (made.block, made.latency_ratio, len(made.blocked), made.left)
    assert made.parity is not None
    assert 8 == made.parity.compared
    assert DOMAIN in {node.domain for node in onnx.load(made.path).graph.node}
    expected = outputs(portable, images)
    assert np.abs(expected - outputs(made.path, images)).max() <= 1e-5 * np.abs(expected).max()


def test_it_is_found_again_and_compared_again(made: Specialised, portable: Path, cache: Path, images: Tensor) -> None:
    for given in (None, images):
        found = open_specialised(portable, cache_folder=cache, images=given)

        assert made == replace(found, parity=made.parity)
        assert found.parity is not None
        assert found.parity.passed
        assert 0.1 < found.parity.firing_rate < 0.95


def test_the_cache_file_does_not_pose_as_an_export(portable: Path, cache: Path, images: Tensor) -> None:
    model = onnx.load(portable)
    onnx.helper.set_model_props(model, {"nni_prune_ext.flavour": "compact"})
    onnx.save(model, portable)

    made = specialise_ort_cpu(portable, images, cache_folder=cache)

    assert ["nni_prune_ext.specialised"] == [own.key for own in onnx.load(made.path).metadata_props]


def test_the_cache_is_the_users_own_by_default(
    portable: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))

    made = specialise_ort_cpu(portable, images)

    assert tmp_path / "home" / "nni_prune_ext" == made.path.parent
    assert made.path == open_specialised(portable).path


def test_without_an_entry_the_portable_file_is_run(portable: Path, cache: Path) -> None:
    found = open_specialised(portable, cache_folder=cache)

    assert_portable(found, portable, f"the cache has no file for ONNX Runtime {onnxruntime.__version__}")
    assert not cache.exists()


def _other_version(monkeypatch: pytest.MonkeyPatch, portable: Path) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.99.0")


def _other_block(monkeypatch: pytest.MonkeyPatch, portable: Path) -> None:
    monkeypatch.setattr(ort_specialisation, "host_block_size", lambda: BLOCK // 2)


def _other_cpu(monkeypatch: pytest.MonkeyPatch, portable: Path) -> None:
    monkeypatch.setattr(ort_specialisation, "environment", lambda: {"cpu": "another", "cpu_capability": "AVX2"})


def _other_package(monkeypatch: pytest.MonkeyPatch, portable: Path) -> None:
    monkeypatch.setattr(ort_specialisation, "package_version", lambda: "99")


def _other_file(monkeypatch: pytest.MonkeyPatch, portable: Path) -> None:
    onnx.save(compact(seed=1), portable)


CHANGES = {
    "onnxruntime": _other_version,
    "block": _other_block,
    "cpu": _other_cpu,
    "nni_prune_ext": _other_package,
    "portable_sha256": _other_file,
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_entry_that_was_made_for_something_else_is_never_run(
    what: str, made: Specialised, portable: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, no_comparison: None
) -> None:
    CHANGES[what](monkeypatch, portable)

    assert_portable(open_specialised(portable, cache_folder=cache), portable, "the cache has no file for")

    # Not under the right name either.
    monkeypatch.setattr(ort_specialisation, "_entry", lambda *_: made.path)
    found = open_specialised(portable, cache_folder=cache)
    assert_portable(found, portable, f"the file in the cache was made for {what} ")


@pytest.fixture
def no_comparison(made: Specialised, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the entry was made, nothing is compared any more: that would run it."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("an entry was run that should not have been")

    monkeypatch.setattr(ort_specialisation, "compare_gated_graphs", fail)


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _other_facts(content: bytes) -> bytes:
    return content.replace(b'"latency_ratio": 0.5', b'"latency_ratio": 0.1')


def _no_facts(content: bytes) -> bytes:
    model = onnx.load_model_from_string(content)
    del model.metadata_props[:]
    return model.SerializeToString()


DAMAGE = {
    "empty": lambda content: b"",
    "no ONNX": lambda content: b"not an ONNX file at all",
    "truncated": _truncated,
    "one bit": _flipped,
    "other facts": _other_facts,
    "no facts": _no_facts,
    "facts of another kind": lambda content: content.replace(b'{"key": ', b'[{"key": '),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_told_and_not_run(
    name: str, made: Specialised, portable: Path, cache: Path, no_comparison: None
) -> None:
    content = made.path.read_bytes()
    damaged = DAMAGE[name](content)
    assert content != damaged
    made.path.write_bytes(damaged)

    found = open_specialised(portable, cache_folder=cache)

    assert_portable(found, portable, "the file in the cache is damaged")
    assert damaged == made.path.read_bytes()


def test_a_folder_in_the_place_of_an_entry_is_damage(made: Specialised, portable: Path, cache: Path) -> None:
    made.path.unlink()
    made.path.mkdir()

    assert_portable(open_specialised(portable, cache_folder=cache), portable, "the file in the cache is damaged")


def test_a_damaged_entry_is_replaced_by_specialising_again(
    made: Specialised, portable: Path, cache: Path, images: Tensor
) -> None:
    made.path.write_bytes(b"damaged")

    assert made == specialise_ort_cpu(portable, images, cache_folder=cache)
    assert made.path == open_specialised(portable, cache_folder=cache).path


@pytest.fixture
def wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had other blocks than it seems: the weights are read in another order."""
    right = ort_specialisation.blocked_form

    def wrong(model: onnx.ModelProto, block: int) -> BlockedForm:
        form = right(model, block)
        weight = next(
            own for own in form.model.graph.initializer if own.name.endswith("/blocked") and len(own.dims) == 2
        )
        value = numpy_helper.to_array(weight)
        weight.CopyFrom(numpy_helper.from_array(value[:, ::-1].copy(), weight.name))
        return form

    monkeypatch.setattr(ort_specialisation, "blocked_form", wrong)


def test_a_file_that_computes_something_else_is_not_cached(
    portable: Path, cache: Path, images: Tensor, wrong_weights: None
) -> None:
    made = specialise_ort_cpu(portable, images, cache_folder=cache)

    assert_portable(made, portable, "it does not compute what the portable file computes")
    assert not cache.exists()


def test_an_entry_that_computes_something_else_today_is_not_run(
    portable: Path, cache: Path, images: Tensor, wrong_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = ort_specialisation.compare_gated_graphs
    with monkeypatch.context() as patch:
        patch.setattr(
            ort_specialisation, "compare_gated_graphs", lambda one, _, *rest, **own: compare(one, one, *rest, **own)
        )
        made = specialise_ort_cpu(portable, images, cache_folder=cache)
        assert made.reason is None

    found = open_specialised(portable, cache_folder=cache)

    assert_portable(found, portable, "it does not compute what the portable file computes")


def test_an_entry_that_onnx_runtime_cannot_run_is_not_run(
    portable: Path, cache: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ort_specialisation.blocked_form

    def unknown_operator(model: onnx.ModelProto, block: int) -> BlockedForm:
        form = right(model, block)
        next(node for node in form.model.graph.node if node.domain == DOMAIN).op_type = "Convolve"
        return form

    monkeypatch.setattr(ort_specialisation, "blocked_form", unknown_operator)

    made = specialise_ort_cpu(portable, images, cache_folder=cache)

    assert_portable(made, portable, "ONNX Runtime does not run the gated graph")


@pytest.mark.parametrize("share", [0.99, 1.0, 1.5])
def test_a_file_that_is_not_faster_is_not_cached(
    share: float, portable: Path, cache: Path, images: Tensor, ratio: Callable[[float], None]
) -> None:
    ratio(share)

    made = specialise_ort_cpu(portable, images, cache_folder=cache)

    assert_portable(made, portable, f"it would take × {share:.2f} of the portable file's time: no gain here")
    assert (share, []) == (made.latency_ratio, list(cache.iterdir()))


def test_a_machine_without_blocks_runs_the_portable_file(
    portable: Path, cache: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_specialisation, "host_block_size", lambda: None)

    for found in (
        specialise_ort_cpu(portable, images, cache_folder=cache),
        open_specialised(portable, cache_folder=cache),
    ):
        assert_portable(found, portable, "ONNX Runtime has no blocked layout on this machine")


def test_a_network_in_other_blocks_runs_the_portable_file(
    portable: Path, cache: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_specialisation, "host_block_size", lambda: BLOCK // 2)

    made = specialise_ort_cpu(portable, images, cache_folder=cache)

    assert_portable(made, portable, f"in blocks of {BLOCK // 2} channels: its filters open in blocks of {BLOCK}")


def test_masks_run_as_they_are(cache: Path, images: Tensor, tmp_path: Path) -> None:
    net = Net()
    onnx.save(mask_form(net.model(chain(net, in_order))), tmp_path / "mask.onnx")

    for found in (
        specialise_ort_cpu(tmp_path / "mask.onnx", images, cache_folder=cache),
        open_specialised(tmp_path / "mask.onnx", cache_folder=cache),
    ):
        assert_portable(found, tmp_path / "mask.onnx", "it takes several images")


def test_it_is_really_measured(portable: Path, cache: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    made = specialise_ort_cpu(portable, images, cache_folder=cache, rounds=2, min_seconds=0)

    assert (made.latency_ratio or 0) > 0


def test_mistakes_are_told(portable: Path, cache: Path, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There are 7 images .* expected 8 or more"):
        specialise_ort_cpu(portable, images[:7], cache_folder=cache)
    with pytest.raises(ConfigError, match=r"The images have the shape \(3, 6, 7\), expected \(3, 7, 7\)"):
        specialise_ort_cpu(portable, images[:, :, 1:], cache_folder=cache)
    with pytest.raises(ConfigError, match=r"The images have the shape \(3, 6, 7\), expected \(3, 7, 7\)"):
        open_specialised(portable, cache_folder=cache, images=images[:, :, 1:])
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        open_specialised(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("not an ONNX file at all")
    with pytest.raises(ModelError, match=r"text.onnx' cannot be read"):
        specialise_ort_cpu(tmp_path / "text.onnx", images)
    model = compact()
    model.graph.input[0].type.tensor_type.shape.dim[3].ClearField("dim_value")
    onnx.save(model, tmp_path / "open.onnx")
    with pytest.raises(ModelError, match=r"\[\[1, 3, 7, 0\]\], 0 for open sizes, expected images of one size"):
        specialise_ort_cpu(tmp_path / "open.onnx", images)


def test_a_cache_that_cannot_be_written_is_told(portable: Path, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="The cache cannot be written to"):
        specialise_ort_cpu(portable, images, cache_folder=tmp_path / "file")


def test_a_full_disk_leaves_nothing_behind(
    portable: Path, cache: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "write_bytes", _full)

    with pytest.raises(OutputError, match=r"The cache cannot take .* No space left"):
        specialise_ort_cpu(portable, images, cache_folder=cache)
    assert [] == list(cache.iterdir())


def _full(path: Path, content: bytes) -> int:
    raise OSError(28, "No space left on device")
