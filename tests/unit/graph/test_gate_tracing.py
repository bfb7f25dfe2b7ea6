"""Where gates can sit in real networks, and whether what is said about zeros is true, image by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import nni_prune_ext as npe
from nni_prune_ext.costs import count_costs
from nni_prune_ext.graph.gate_places import Activation, GateFlow, GatePlace
from nni_prune_ext.graph.gate_tracing import trace_gate_flow
from nni_prune_ext.testing.method_bench import BenchNet, modes_of, traces_on
from nni_prune_ext.testing.toy_blocks import Apply, conv
from nni_prune_ext.testing.toy_models import ZOO

IMAGES = 3


def torchvision_model(name: str) -> nn.Module:
    """Builds a torchvision network without the minutes of drawing weights that are drawn again."""
    if name.startswith("regnet"):  # reads values while it is built
        return torchvision.models.get_model(name, num_classes=10)
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=10)
        if name.startswith("vgg"):
            model.classifier = nn.Linear(512 * 7 * 7, 10)
    return model.to_empty(device="cpu")


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        name: (lambda name=name: torchvision_model(name), 64)
        for name in ("vgg11", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "densenet121")
    },
    **{
        name: (lambda name=name: torchvision_model(name), 64)
        for name in ("efficientnet_b0", "shufflenet_v2_x1_0", "squeezenet1_1", "mobilenet_v3_small", "regnet_y_400mf")
    },
    "resnet20": (lambda: npe.build_model("resnet20", num_classes=10, in_channels=3), 32),
    "mobilenet_v1": (lambda: npe.build_model("mobilenet_v1", num_classes=10, in_channels=3), 32),
}


@cache
def traced(name: str) -> tuple[nn.Module, Tensor, GateFlow]:
    """Returns a randomised network, images, and its flow."""
    build, size = NETWORKS[name]
    model = randomised(build()).eval()
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(5))
    return model, images, trace_gate_flow(model, images[:1])


def randomised(model: nn.Module) -> nn.Module:
    """Draws every parameter and statistic, so that nothing is zero, one, or the same for two channels."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            for key, own in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not own.is_floating_point():
                    own.zero_()
                elif own.dim() > 1:
                    own.normal_(0, (2 / own[0].numel()) ** 0.5, generator=generator)
                elif key in ("bias", "running_mean"):
                    own.normal_(0, 0.4, generator=generator)
                else:
                    own.uniform_(0.6, 1.4, generator=generator)
    return model


class Reads(TorchFunctionMode):
    """Notes what every convolution and linear layer reads, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Tensor]] = []

    def __torch_function__(self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict = {}):  # noqa: B006
        name = getattr(func, "__name__", "")
        if name in ("conv2d", "linear"):
            self.seen.append((name, args[0].detach().clone()))
        return func(*args, **(kwargs or {}))


def switched(model: nn.Module, masks: Mapping[GatePlace, Tensor], images: object) -> list[tuple[str, Tensor]]:
    """Runs a model whose places are multiplied by masks, by hooks of our own; returns what its layers read."""
    handles = [
        model.get_submodule(place.point).register_forward_hook(
            lambda _, args, out, mask=mask: out * mask.to(out.dtype)[:, :, None, None]
        )
        for place, mask in masks.items()
    ]
    try:
        with torch.no_grad(), Reads() as reads:
            model(*images) if isinstance(images, tuple) else model(images)
    finally:
        for handle in handles:
            handle.remove()
    return reads.seen


def random_masks(places: tuple[GatePlace, ...], images: int, share: float, seed: int) -> dict[GatePlace, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {place: torch.rand(images, place.channels, generator=generator) < share for place in places}


def check_signals(
    model: nn.Module, images: Tensor, flow: GateFlow, masks: Mapping[GatePlace, Tensor]
) -> tuple[int, int, int]:
    """Asserts that closed channels are exactly zero; returns how many are closed, are open, are open and not zero."""
    signals = flow.open_signals({place.layer: mask for place, mask in masks.items()})
    seen = switched(model, masks, images)
    assert len(flow.layers) == len(seen)
    closed = opened = lively = 0
    for layer, (kind, x) in zip(flow.layers, seen):
        channels = x.movedim(-3 if kind == "conv2d" else -1, 1).flatten(2) if x.dim() > 2 else x[:, :, None]
        assert len(layer.reads) == channels.shape[1], layer.layer
        if len(channels) != len(signals):
            assert not layer.reads.any(), f"{layer.layer} does not read image by image"
            continue
        is_open = signals[:, torch.from_numpy(layer.reads)]
        largest = channels.abs().amax(2)
        assert 0.0 == float(largest[~is_open].max() if (~is_open).any() else 0.0), layer.layer
        closed, opened = closed + int((~is_open).sum()), opened + int(is_open.sum())
        lively += int((largest[is_open] > 0).sum())
    return closed, opened, lively


# -- signals are true --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_channel_that_a_layer_reads_with_a_closed_signal_is_exactly_zero(name: str) -> None:
    model, images, flow = traced(name)
    masks = random_masks(flow.usual, IMAGES, 0.4, seed=1)

    closed, opened, lively = check_signals(model, images, flow, masks)

    assert closed > 100, "some are closed"
    assert lively > 0.5 * opened, "what is called open is mostly not zero"


@pytest.mark.parametrize("name", NETWORKS)
def test_signals_are_true_where_unusual_places_are_gated_too(name: str) -> None:
    model, images, flow = traced(name)
    masks = random_masks(flow.places, IMAGES, 0.5, seed=2)

    closed, _, _ = check_signals(model, images, flow, masks)

    assert closed > 100


def test_nothing_is_called_closed_that_no_gate_closes() -> None:
    for name in ("resnet18", "mobilenet_v2"):
        model, images, flow = traced(name)
        masks = {place: torch.ones(IMAGES, place.channels, dtype=torch.bool) for place in flow.places}

        closed, _, _ = check_signals(model, images, flow, masks)

        assert 0 == closed


@pytest.mark.parametrize("name", [n for n, toy in ZOO.items() if isinstance(toy.example_inputs(), (Tensor, tuple))])
def test_signals_are_true_for_every_topology_of_the_zoo(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = randomised(ZOO[name].build()).eval(), ZOO[name].example_inputs()
    flow = trace_gate_flow(model, inputs)
    images = len(inputs if isinstance(inputs, Tensor) else inputs[0])

    for seed in range(4):
        masks = random_masks(flow.places, images, 0.5, seed)
        if masks:
            check_signals(model, inputs, flow, masks)


def test_a_stream_is_closed_only_where_all_that_write_it_are_closed() -> None:
    model, images, flow = traced("resnet18")
    masks = {place: torch.ones(IMAGES, place.channels, dtype=torch.bool) for place in flow.usual}
    by_layer = {place.layer: mask for place, mask in masks.items()}
    by_layer["conv1"][:, :20] = False
    by_layer["layer1.0.conv2"][:, 10:30] = False
    by_layer["layer1.1.conv2"][0, 10:12] = False

    check_signals(model, images, flow, masks)
    signals = flow.open_signals(by_layer)

    after_first = (~signals[:, flow.layer("layer1.1.conv1").reads]).sum(1)
    after_second = (~signals[:, flow.layer("layer2.0.conv1").reads]).sum(1)
    assert [20, 20, 20] == (~signals[:, flow.layer("layer1.0.conv1").reads]).sum(1).tolist(), "the stem alone"
    assert [10, 10, 10] == after_first.tolist(), "10 to 19: stem and first branch"
    assert [2, 0, 0] == after_second.tolist()
    assert 64 == len(flow.layer("layer1.0.conv1").writes)


# -- places ------------------------------------------------------------------------------------------------------------


def places_of(name: str) -> dict[str, GatePlace]:
    return {place.layer: place for place in traced(name)[2].places}


@pytest.mark.parametrize(("name", "step"), [("vgg11", 0), ("vgg11_bn", 1)])
def test_vgg_is_gated_at_every_convolution_behind_its_norm(name: str, step: int) -> None:
    model, _, flow = traced(name)
    convolutions = [k for k, own in enumerate(model.features) if isinstance(own, nn.Conv2d)]

    assert 8 == len(flow.usual) == len(flow.places)
    assert [f"features.{k}" for k in convolutions] == [place.layer for place in flow.places]
    assert [f"features.{k + step}" for k in convolutions] == [place.point for place in flow.places]
    assert {Activation("relu")} == {place.activation for place in flow.places}
    assert [3, 64, 128, 256, 256, 512, 512, 512] == [place.inputs for place in flow.places]
    assert [64, 128, 256, 256, 512, 512, 512, 512] == [place.channels for place in flow.places]


def test_a_flatten_spreads_a_signal_over_all_its_pixels() -> None:
    flow = traced("vgg11")[2]

    reads, writes = flow.layer("classifier").reads, flow.layer("features.18").writes

    assert writes.repeat(49).tolist() == reads.tolist()


def test_a_residual_branch_is_gated_before_the_addition_and_a_projection_shortcut_is_not() -> None:
    basic, bottleneck = places_of("resnet18"), places_of("resnet50")

    assert Activation("relu") == basic["layer2.0.conv1"].activation
    for places, last, point in ((basic, "conv2", "bn2"), (bottleneck, "conv3", "bn3")):
        for place in (places[f"layer2.0.{last}"], places[f"layer2.1.{last}"]):
            assert place.activation is None, "what follows is the addition, in place here"
            assert place.point == place.layer.replace(last, point)
            assert "" == place.unsuitable
        shortcuts = {name: own.unsuitable for name, own in places.items() if "downsample" in name}
        assert {"it is a shortcut"} == set(shortcuts.values())
    assert 17 == len([place for place in basic.values() if not place.unsuitable])
    assert 3 == len([name for name in basic if "downsample" in name])
    assert 49 == len([place for place in bottleneck.values() if not place.unsuitable])
    assert 4 == len([name for name in bottleneck if "downsample" in name])


def test_the_cifar_residual_network_is_gated_at_every_convolution() -> None:
    flow = traced("resnet20")[2]

    assert 19 == len(flow.usual) == len(flow.places)
    assert {None} == {place.activation for place in flow.places if place.layer.endswith("conv2")}
    assert {Activation("relu")} == {place.activation for place in flow.places if place.layer.endswith("conv1")}


def test_linear_bottlenecks_and_depthwise_convolutions_are_gated() -> None:
    places = places_of("mobilenet_v2")
    expand, depthwise, project = (places[f"features.3.conv.{k}"] for k in ("0.0", "1.0", "2"))

    assert ("", "", "") == (expand.unsuitable, depthwise.unsuitable, project.unsuitable)
    assert depthwise.groups == depthwise.channels == depthwise.inputs == 144
    assert project.activation is None
    assert "features.3.conv.3" == project.point
    assert 52 == len([place for place in places.values() if not place.unsuitable])
    x = torch.linspace(-9, 9, 50)
    for own in (expand, depthwise):
        assert own.activation is not None
        assert torch.equal(x.clamp(0, 6), own.activation(x))


def test_what_a_norm_reads_later_is_not_gated_in_a_dense_network() -> None:
    places = places_of("densenet121")

    assert "'cat' reads it" in places["features.denseblock1.denselayer1.conv2"].unsuitable
    assert "'avg_pool2d' reads it" in places["features.transition1.conv"].unsuitable
    inner = {name: place.unsuitable for name, place in places.items() if name.endswith("conv1")}
    assert 58 == len(inner)
    assert {""} == set(inner.values())
    assert "" == places["features.conv0"].unsuitable


def test_squeeze_and_excitation_is_not_gated_because_it_works_on_one_pixel() -> None:
    places = places_of("efficientnet_b0")

    inside = [place.unsuitable for name, place in places.items() if ".fc" in name]
    assert 32 == len(inside)
    assert all("one pixel" in reason for reason in inside)
    assert Activation("silu") == places["features.2.0.block.1.0"].activation
    assert [] == [name for name, place in places.items() if ".fc" not in name and place.unsuitable]


def test_what_reaches_the_output_is_not_gated() -> None:
    places = places_of("squeezenet1_1")

    assert "its channels reach the output of the model" == places["classifier.1"].unsuitable
    assert ["classifier.1"] == [name for name, place in places.items() if place.unsuitable]


def test_grouped_convolutions_are_not_gated_but_depthwise_ones_are() -> None:
    resnext, shuffle = places_of("resnext50_32x4d"), places_of("shufflenet_v2_x1_0")

    grouped = [place for name, place in resnext.items() if name.endswith("conv2")]
    assert 16 == len(grouped)
    assert {"it is a grouped convolution"} == {place.unsuitable for place in grouped}
    assert [] == [name for name, place in shuffle.items() if place.unsuitable]
    assert any(place.groups == place.channels > 1 for place in shuffle.values())


def test_a_weight_that_is_used_twice_is_no_place() -> None:
    flow = trace_gate_flow(ZOO["shared"].build(), ZOO["shared"].example_inputs())

    assert ["stem.0"] == [place.layer for place in flow.places]
    assert ["stem.0", "conv", "conv", "conv", "head"] == [layer.layer for layer in flow.layers]


def test_a_convolution_in_front_of_a_function_that_makes_something_of_zeros_is_no_usual_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 6, 3), nn.Softplus(), nn.Conv2d(6, 4, 1))

    flow = trace_gate_flow(model, torch.randn(2, 3, 9, 9))

    assert "'sigmoid' reads it, behind which a closed filter may not stay zero" == flow.places[0].unsuitable
    assert "'softplus' reads it, behind which a closed filter may not stay zero" == flow.places[1].unsuitable
    assert not any(layer.reads.any() for layer in flow.layers)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), None),
        (nn.Hardtanh(-2.0, 3.0), "hardtanh"),
        (nn.LeakyReLU(0.3), "leaky_relu"),
        (nn.LeakyReLU(0.3, inplace=True), "leaky_relu"),
        (nn.ELU(0.5), "elu"),
        (nn.CELU(0.5), "celu"),
        (nn.SELU(), "selu"),
        (nn.SiLU(), "silu"),
        (nn.Mish(), "mish"),
        (nn.Hardswish(), "hardswish"),
        (nn.GELU(approximate="tanh"), "gelu"),
        (nn.Tanh(), "tanh"),
        (Apply(lambda x: functional.leaky_relu(x, 0.3)), "leaky_relu"),
        (Apply(lambda x: functional.hardtanh(x, max_val=0.5)), "hardtanh"),
        (Apply(torch.relu_), "relu"),
        (Apply(functional.relu6), "relu6"),
    ],
    ids=lambda own: own if isinstance(own, str) else type(own).__name__.lower(),
)
def test_an_activation_is_known_with_its_settings(module: nn.Module, name: str | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), module, nn.Conv2d(8, 4, 1))
    x = torch.linspace(-8, 8, 41)

    (place, _) = trace_gate_flow(model, torch.randn(2, 3, 8, 8)).places

    assert "" == place.unsuitable
    assert place.activation is not None
    assert name in (None, place.activation.name)
    assert torch.equal(module(x.clone()), place.activation(x))


def test_an_activation_that_does_not_keep_zeros_opens_all_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardtanh(0.5, 2.0), nn.Conv2d(8, 4, 1))
    images = torch.randn(2, 3, 8, 8)

    flow = trace_gate_flow(model, images)

    check_signals(model, images, flow, random_masks(flow.places, 2, 0.5, 0))


# -- signals of odd forward functions ----------------------------------------------------------------------------------


class TwoBranches(nn.Module):
    """Two gated convolutions, a function of both, a layer that reads it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.last, self.function = conv(3, 8), conv(3, 8), nn.Conv2d(8, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.one(x), self.two(x)))


def overwritten_part(a: Tensor, b: Tensor) -> Tensor:
    a[:, :4] = b[:, :4]
    return a


def written_through_a_view(a: Tensor, b: Tensor) -> Tensor:
    a[:, :4].add_(b[:, :4])
    return a


ODD: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference": lambda a, b: a - b,
    "added in place": lambda a, b: a.add_(b),
    "product": lambda a, b: a * b,
    "shifted": lambda a, b: a + 1,
    "shifted in place": lambda a, b: a.add_(1),
    "joined": lambda a, b: torch.cat([a[:, :3], b[:, 3:]], 1),
    "crossed": lambda a, b: a.chunk(2, 1)[0].repeat(1, 2, 1, 1) + b,
    "mean removed": lambda a, b: a - a.mean((2, 3), keepdim=True),
    "normed": lambda a, b: functional.instance_norm(a + b) + 0.1,
    "larger of two": lambda a, b: torch.maximum(a, b),
    "max of two": lambda a, b: torch.max(a, b),
    "picked": lambda a, b: torch.where(a > b, a, b),
    "cosine in place": lambda a, b: a.cos_(),
    "exponential in place": lambda a, b: a.exp_(),
    "quotient": lambda a, b: b / (a + 1),
    "overwritten part": overwritten_part,
    "written through a view": written_through_a_view,
    "copied over": lambda a, b: a.copy_(b),
    "clamped up": lambda a, b: a.clamp(min=0.1),
    "clamped down": lambda a, b: a.clamp(max=3.0),
    "weighted": lambda a, b: torch.lerp(a, b, 0.3),
    "spread": lambda a, b: a.mean(1, keepdim=True).expand_as(b),
    "reversed": lambda a, b: a.flip(1),
    "sorted": lambda a, b: a.sort(1).values,
}


@pytest.mark.parametrize("name", ODD)
def test_signals_are_true_behind(name: str) -> None:
    model = randomised(TwoBranches(ODD[name])).eval()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    flow = trace_gate_flow(model, images)

    for seed in range(5):
        check_signals(model, images, flow, random_masks(flow.places, 4, 0.4, seed))


class RawToo(nn.Module):
    """Reads a convolution in front of its norm as well as behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.behind, self.front = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv(x)
        return self.behind(functional.relu(self.norm(raw))) + self.front(raw)


def test_signals_are_true_where_a_convolution_is_read_in_front_of_its_norm_too() -> None:
    model, images = randomised(RawToo()).eval(), torch.randn(2, 3, 8, 8)
    flow = trace_gate_flow(model, images)

    check_signals(model, images, flow, random_masks(flow.places, 2, 0.5, 0))


class SharedNorm(nn.Module):
    """One norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm, self.last = (
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.relu(self.norm(self.two(functional.relu(self.norm(self.one(x)))))))


def test_a_norm_that_is_called_twice_is_no_point_for_a_gate() -> None:
    flow = trace_gate_flow(randomised(SharedNorm()).eval(), torch.randn(2, 3, 8, 8))

    points = [place.point for place in flow.places]
    assert len(points) == len(set(points)), "two gates on one module would both switch both calls"


def test_a_layer_on_tokens_reads_the_signals_of_its_channels() -> None:
    model = nn.Sequential(conv(3, 8), Apply(lambda x: x.flatten(2).transpose(1, 2)), nn.Linear(8, 4))
    images = torch.randn(2, 3, 6, 6)

    flow = trace_gate_flow(randomised(model).eval(), images)

    assert flow.layers[0].writes.tolist() == flow.layers[1].reads.tolist()
    closed, _, _ = check_signals(model, images, flow, random_masks(flow.places, 2, 0.5, 0))
    assert closed > 0
    assert 36 == flow.layers[1].positions


class PreActivation(nn.Module):
    """A residual block that norms what it reads; its input goes around the norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(functional.relu(self.norm(x)))


def test_signals_are_true_in_a_network_of_pre_activations() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), PreActivation(), PreActivation(), nn.Conv2d(8, 4, 1))
    images = torch.randn(2, 3, 6, 6)
    flow = trace_gate_flow(randomised(model).eval(), images)

    for seed in range(4):
        check_signals(model, images, flow, random_masks(flow.places, 2, 0.5, seed))


# -- costs and manners -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_multiplications_of_all_layers_are_those_that_the_counter_counts(name: str) -> None:
    model, images, flow = traced(name)

    counted = count_costs(model, images[:1])

    assert () == counted.uncounted
    assert counted.macs == sum(layer.macs for layer in flow.layers)


def test_multiplications_are_per_image() -> None:
    model, images = BenchNet(), torch.randn(6, 3, 8, 8)

    one, six = (trace_gate_flow(model, images[:count]) for count in (1, 6))

    assert [layer.macs for layer in one.layers] == [layer.macs for layer in six.layers]
    assert 64 * 9 * 3 * 12 == one.layer("stem.0").macs
    assert 64 * 9 * 12 == one.layer("depthwise.0").macs
    assert 8 * 4 == one.layer("head").macs


def test_the_model_is_left_as_it_was() -> None:
    model = BenchNet().train()
    model.stem.eval()
    model.stem[0].weight.requires_grad_(False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, random_state = modes_of(model), torch.get_rng_state()

    trace_gate_flow(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))

    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert modes == modes_of(model)
    assert [] == traces_on(model)
    assert torch.equal(random_state, torch.get_rng_state())
