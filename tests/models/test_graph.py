"""Layer graph and penultimate features of a network."""

import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from cnntrain.conv import BACKENDS
from cnntrain.models import GraphNode, LeNet5, TorchVision, layer_graph, summarise
from cnntrain.models.introspection import penultimate_features


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_in_their_order_on_every_backend(backend: str) -> None:
    network = LeNet5(conv=BACKENDS[backend])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nodes = layer_graph(network, (1, 28, 28))
    layers = summarise(network, (1, 28, 28))
    assert [node.kind for node in nodes] == ["input", *(layer.kind for layer in layers), "output"]
    assert [node.shape for node in nodes[1:-1]] == [layer.shape for layer in layers]
    assert nodes[1].name == f"features/0.{BACKENDS[backend].__name__}"
    for before, node in pairwise(nodes):  # a chain
        assert node.inputs == (before.name,)


def test_residual_connections() -> None:
    network = TorchVision(name="resnet18", small_images=True)
    nodes = {node.name: node for node in layer_graph(network, (1, 28, 28))}
    added = nodes["network/layer1/0/add"]
    assert set(added.inputs) == {"network/layer1/0/bn2.BatchNorm2d", "network/maxpool.Identity"}
    assert set(nodes["network/layer2/0/add"].inputs) == {
        "network/layer2/0/bn2.BatchNorm2d",
        "network/layer2/0/downsample/1.BatchNorm2d",
    }
    reached, edge = set(), ["logits"]
    while edge:  # backwards, from the end to the images
        name = edge.pop()
        reached.add(name)
        edge += [i for i in nodes[name].inputs if i not in reached]
    assert "images" in reached
    assert len(reached) == len(nodes)


class Mixed(nn.Module):
    """A layer that is called twice, keyword arguments, lists, functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        twice = [self.conv(images), self.conv(input=images * 2)]
        return torch.cat(twice, dim=1).flatten(1)


def test_layer_called_twice_has_two_nodes() -> None:
    nodes = layer_graph(Mixed(), (1, 4, 4))
    assert nodes == [
        GraphNode("images", "input", (), (1, 4, 4)),
        GraphNode("conv.Conv2d", "Conv2d", ("images",), (1, 4, 4)),
        GraphNode("mul", "mul", ("images",), (1, 4, 4)),
        GraphNode("conv.Conv2d_2", "Conv2d", ("mul",), (1, 4, 4)),
        GraphNode("cat", "cat", ("conv.Conv2d", "conv.Conv2d_2"), (2, 4, 4)),
        GraphNode("flatten", "flatten", ("cat",), (32,)),
        GraphNode("logits", "output", ("flatten",), (32,)),
    ]


def test_network_that_branches_on_values_is_rejected() -> None:
    class Branching(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) if images.sum() > 0 else -images.flatten(1)

    with pytest.raises(ValueError, match=r"torch\.fx cannot trace the network"):
        layer_graph(Branching(), (1, 4, 4))


def test_function_with_several_outputs() -> None:
    network = TorchVision(name="shufflenet_v2_x0_5")
    nodes = {node.name: node for node in layer_graph(network, (1, 28, 28))}
    assert any(node.kind == "chunk" for node in nodes.values())
    reached, edge = set(), ["logits"]
    while edge:
        reached.add(edge[-1])
        edge += [i for i in nodes[edge.pop()].inputs if i not in reached]
    assert reached == set(nodes)


def test_penultimate_features() -> None:
    """A container may have parameters, as the class token of a ViT."""
    vit = TorchVision((1, 32, 32), name="vit_b_16").network
    images = torch.randn(2, 3 if vit.conv_proj.in_channels == 3 else 1, 32, 32)
    given: list[Tensor] = []
    hook = vit.heads.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    found = penultimate_features(vit, images)
    hook.remove()
    assert found.shape == (2, 768)
    assert (found == given[0]).all()
    lenet = LeNet5().eval()
    pictures = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        wanted = lenet.classifier[:3](lenet.features(pictures))
    assert (penultimate_features(lenet, pictures) == wanted).all()


def test_network_is_not_changed() -> None:
    network = LeNet5().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    layer_graph(network, (1, 28, 28))
    assert network.training
    assert all((before[name] == tensor).all() for name, tensor in network.state_dict().items())
    assert (torch.get_rng_state() == state).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
