"""Networks run from one of their modules on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import relative_error
from small import shapes, small_probe
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_fast import Task2Vec, load_probe
from t2v_fast.analysis.distance import pdist
from t2v_fast.tasks.split_network import Cut, FeatureCache


class Stages(nn.Module):
    """Reuses a module below and above the cut, and computes between modules."""

    def __init__(self, leak: bool = False) -> None:
        super().__init__()
        self.leak = leak
        self.stem = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.one = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(5, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, _, _, _ = x.shape
        y = F.max_pool2d(self.act(self.stem(x)), 2)
        z = self.act(self.two(self.one(y)))
        out = self.head(z.mean((2, 3)).view(n, -1))
        return out + y.mean() if self.leak else out


@pytest.mark.parametrize(("layers", "name"), [(2, "act"), (3, "one"), ("one.0", "one.0"), (4, "two"), ("stem", "stem")])
def test_a_pass_from_the_cut_is_the_whole_pass(layers: int | str, name: str) -> None:
    torch.manual_seed(0)
    network, x = Stages(), torch.randn(5, 3, 12, 13)
    if layers == 2:
        with pytest.raises(ValueError, match="no module of the network that runs once"):
            Cut(network, layers, x[:2])  # it runs again behind the cut
        return
    cut = Cut(network, layers, x[:2])
    assert cut.name == name
    features = cut.features(network, x)
    ran = []
    for key in ("stem", "one", "two"):
        network.get_submodule(key).register_forward_hook(lambda m, i, o, key=key: ran.append((key, len(o))))
    assert torch.equal(cut.resume(network, features), network(x))
    with torch.no_grad():
        network.stem.weight.zero_()
    assert "stem.weight" in cut.below
    assert not any(key.startswith(("head", "two")) for key in cut.below) or name == "two"
    assert torch.equal(cut.resume(network, features), cut.resume(network, features))
    assert not any("forward" in m.__dict__ for m in network.modules())


def test_a_cut_that_is_none_is_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    with pytest.raises(ValueError, match=r"no cut at 'one': a pass from there differs by .* from a whole one"):
        Cut(Stages(leak=True), "one", x)
    with pytest.raises(ValueError, match=r"cannot skip 9 layers: .* stem, act, one, two, head, of which 1 to 4"):
        Cut(Stages(), 9, x)
    with pytest.raises(ValueError, match="no cut at 'three'"):
        Cut(Stages(), "three", x)


def test_features_are_cached_by_what_made_them(tmp_path: Path) -> None:
    calls = []

    def compute(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x * 2

    x = torch.randn(3, 4)
    cache = FeatureCache(tmp_path, "weights")
    assert torch.equal(cache.get(x, compute), x * 2)
    assert torch.equal(cache.get(x, compute), x * 2)
    assert torch.equal(FeatureCache(tmp_path, "weights").get(x, compute), x * 2)
    assert calls == [3]
    FeatureCache(tmp_path, "other weights").get(x, compute)
    cache.get(x + 1, compute)
    assert calls == [3, 3, 3]
    cache.path(x).write_bytes(b"damaged")
    assert torch.equal(cache.get(x, compute), x * 2)
    assert len(calls) == 4
    assert torch.equal(cache.get(x, compute), x * 2)
    assert len(calls) == 4


def test_task2vec_without_the_first_layers(tmp_path: Path) -> None:
    """The entries of the layers that are left are those of the whole embedding; cached or not."""
    data = shapes()
    whole = Task2Vec(small_probe()).embed(data)
    hessian = torch.from_numpy(whole.hessian)
    for layers, first in ((2, "3.weight"), ("0", "1.weight")):
        options = {"skip_layers": layers, "feature_folder": tmp_path / str(layers)}
        once = Task2Vec(small_probe(), skip_layers=layers).embed(data)
        cut = Task2Vec(small_probe(), skip_layers=layers, activation_megabytes=0).embed(data)
        assert relative_error(torch.from_numpy(cut.hessian), torch.from_numpy(once.hessian)) < 1e-5
        assert cut.layers[0][0] == first
        assert relative_error(torch.from_numpy(cut.hessian), hessian[-len(cut.hessian) :]) < 1e-5
        filled = Task2Vec(small_probe(), **options).embed(data)
        files = sorted(options["feature_folder"].iterdir())
        assert files
        again = Task2Vec(small_probe(), **options)
        again.probe.cut.features = None  # not to be asked
        again = again.embed(data)
        assert sorted(options["feature_folder"].iterdir()) == files
        assert (cut.hessian == filled.hessian).all()
        assert (cut.hessian == again.hessian).all()
        with pytest.raises(ValueError, match="cannot be compared: they differ in layers"):
            pdist([whole, cut])
    assert (Task2Vec(small_probe()).embed(data).hessian == whole.hessian).all()
    with pytest.raises(ValueError, match="feature_folder is for what skipped layers"):
        Task2Vec(small_probe(), feature_folder=tmp_path)
    with pytest.raises(ValueError, match="no layer is left behind '5'"):
        Task2Vec(small_probe(), skip_layers="5")


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/vit_b_32", "timm/test_convnext"])
def test_real_networks_can_be_cut(name: str) -> None:
    pytest.importorskip(name.split("/")[0], reason="this torch has no torchvision built for it")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="random weights"):
        probe = load_probe(name, "none")
    layers = {"resnet18": "layer2", "vit_b_32": "encoder.layers.encoder_layer_5", "test_convnext": "stages.1"}
    cut = probe.skipping(layers[name.split("/")[1]])
    size = probe.preprocessing.crop
    x = torch.randn(2, 3, size, size)
    assert torch.allclose(cut.features(cut.at_cut(x)), probe.features(x), rtol=0, atol=1e-5)
    assert set(cut.embedding_parameters()) < set(probe.embedding_parameters())
