"""Probes: heads found, images prepared, weights read, bad files refused."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from small import small_probe
from torch import Tensor, nn

from t2v_fast.tasks.probe import PACKAGED_SIZES, Preprocessing, Probe, load_probe


def test_the_head_is_found_and_replaced() -> None:
    probe = small_probe()
    assert probe.head == "7"
    assert probe.feature_dim == 8
    x = torch.randn(4, 3, 12, 12)
    features = probe.features(x)
    assert features.shape == (4, 8)
    own = probe.network[7]
    torch.testing.assert_close(own(features), probe.network(x))
    with probe.with_head(nn.Linear(8, 2)) as network:
        assert network(x).shape == (4, 2)
    assert probe.network[7] is own
    with pytest.raises(RuntimeError), probe.with_head(nn.Linear(9, 2)) as network:
        network(x)
    assert probe.network[7] is own
    assert probe.embedding_parameters() == ["0.weight", "1.weight", "3.weight"]


def test_networks_without_a_head() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(
        ValueError, match=r"no head was found in Sequential: .* after '2' \(Flatten\).* its linear layers: none"
    ):
        Probe(network)
    network.append(nn.Linear(4, 4)).append(nn.Softmax(1))
    with pytest.raises(ValueError, match=r"no head was found .* after '4' \(Softmax\).*; its linear layers: 3"):
        Probe(network)
    with pytest.raises(ValueError, match="'3' is no head in Sequential"):
        Probe(network, head="3")
    with pytest.raises(ValueError, match="head 'fc' is no layer of the network, expected one of its linear layers: 3"):
        Probe(network, head="fc")
    with pytest.raises(ValueError, match="head '0' is Conv2d"):
        Probe(network, head="0")
    network[4] = nn.ReLU(inplace=True)  # leaves the linear layer's storage as the output's
    with pytest.raises(ValueError, match=r"no head was found .* after '4' \(ReLU\)"):
        Probe(network)
    tokens = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(100, 2))
    with pytest.raises(ValueError, match="a probe has one feature vector an image"):
        Probe(tokens, preprocessing=Preprocessing(12, 12)).features(torch.zeros(2, 3, 12, 12))


def test_shared_weights_are_listed_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.b(self.a(x.mean((2, 3)).repeat(1, 2)[:, :4])))

    assert Probe(Shared()).embedding_parameters() == ["a.weight"]


def test_the_fingerprint_is_that_of_the_weights() -> None:
    a, b = small_probe(0), small_probe(0)
    assert a.fingerprint() == b.fingerprint() != small_probe(1).fingerprint()
    b = small_probe(0)
    nn.init.zeros_(b.network[7].weight)  # every task has a head of its own
    assert a.fingerprint() == b.fingerprint()
    b = small_probe(0)
    b.network[1].num_batches_tracked += 1  # changes no feature
    assert a.fingerprint() == b.fingerprint()
    b = small_probe(0)
    b.network[1].running_mean += 1e-3
    assert a.fingerprint() != b.fingerprint()


@pytest.mark.parametrize("size", [(12, 12), (30, 17), (5, 40)])
def test_preprocessing_takes_every_kind_of_image(size: tuple[int, int]) -> None:
    prepare = Preprocessing(14, 12, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    want = prepare(rgb)
    assert want.shape == (3, 12, 12)
    assert want.dtype == torch.float32
    opaque = np.concatenate([rgb, np.full((*size, 1), 255, np.uint8)], 2)
    for image in (torch.from_numpy(rgb).permute(2, 0, 1), Image.fromarray(rgb), opaque, Image.fromarray(opaque)):
        torch.testing.assert_close(prepare(image), want)
    grey = rgb[..., 0]
    for image in (grey[..., None], Image.fromarray(grey), torch.from_numpy(grey), Image.fromarray(grey).convert("P")):
        torch.testing.assert_close(prepare(image), prepare(grey))
    torch.testing.assert_close(prepare(np.zeros((*size, 4), np.uint8)), prepare(np.full((*size, 3), 255, np.uint8)))
    assert prepare(want) is want  # prepared already
    torch.testing.assert_close(prepare(np.ascontiguousarray(rgb.transpose(2, 0, 1))), want)


def test_deep_pixels_are_scaled_not_clipped() -> None:
    prepare = Preprocessing(12, 12)
    deep = np.linspace(0, 65535, 144).reshape(12, 12).astype(np.uint16)
    torch.testing.assert_close(prepare(Image.fromarray(deep)), prepare((deep // 257).astype(np.uint8)))
    with pytest.raises(ValueError, match="mode 'F' has no fixed range of pixels"):
        prepare(Image.fromarray(deep.astype(np.float32)))


def test_preprocessing_agrees_with_torchvision() -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2", reason="this torch has no torchvision built for it")
    rgb = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for mode in ("bilinear", "bicubic"):
        theirs = transforms.Compose(
            [
                transforms.ToImage(),
                transforms.Resize(32, getattr(transforms.InterpolationMode, mode.upper()), antialias=True),
                transforms.CenterCrop(28),
                transforms.ToDtype(torch.float32, scale=True),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        ours = Preprocessing(32, 28, mode)
        # They round and clamp to bytes after each axis, which noise as this makes the most of; a pixel off would be 1.
        assert float((ours(rgb) - theirs(rgb)).abs().mean()) < 0.02


def test_bad_preprocessing() -> None:
    with pytest.raises(ValueError, match="'nearest'"):
        Preprocessing(interpolation="nearest")
    with pytest.raises(ValueError, match="crop is 300 and resize 256"):
        Preprocessing(256, 300)
    with pytest.raises(ValueError, match=r"mean is \(1, 2\).* expected three numbers each, std above 0"):
        Preprocessing(mean=(1, 2))
    with pytest.raises(ValueError, match=r"std \(0, 1, 1\), expected"):
        Preprocessing(std=(0, 1, 1))
    for bad in (torch.zeros(1, 12, 12), torch.zeros(2, 3, 12, 12), np.zeros((12, 12, 3))):
        with pytest.raises(ValueError, match=r"counts as prepared and must be \[3, H, W\]"):
            Preprocessing()(bad)


def test_the_packaged_probe() -> None:
    probe = load_probe()
    assert (probe.name, probe.head, probe.feature_dim) == ("efficientnet-lite0", "_fc", 1280)
    assert len(probe.embedding_parameters()) == 98
    # It knows what a digit's page looks like no better than ImageNet does, but pretrained it is: two crops of one
    # picture are closer in features than two pictures.
    rng = np.random.default_rng(0)
    noise, stripes = rng.integers(0, 255, (230, 230, 3), dtype=np.uint8), np.zeros((230, 230, 3), np.uint8)
    stripes[::16] = 255
    x = torch.stack([probe.preprocessing(i) for i in (noise, noise[3:], stripes, stripes[3:])])
    f = torch.nn.functional.normalize(probe.features(x))
    assert float(f[0] @ f[1]) > float(f[0] @ f[2]) < float(f[2] @ f[3])


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"])
def test_packaged_networks_pad_for_the_size_of_the_image(name: str) -> None:
    """The package pads by the size for which a network is made. A probe must agree with one made for its own size."""
    lite = importlib.import_module("efficientnet_lite_pytorch")
    with pytest.warns(UserWarning, match="random weights"):
        probe = load_probe(name, "none", size=40)
    network = probe.network.double()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # gains that keep signals alive: with small ones, wrong padding hardly shows
        if parameter.dim() > 1:
            parameter.data.mul_(2)
    own = lite.EfficientNet.from_name(name).double().eval()
    own.load_state_dict(network.state_dict())
    right, wrong = [], []
    for size in (8, 20, 31, 32, 33, 40, 48, 56, 63, 64, 80, 96, 100, 112, 130, PACKAGED_SIZES[name]):
        made = lite.EfficientNet.from_name(name, image_size=size).double().eval()
        made.load_state_dict(network.state_dict())
        x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(network(x), made(x), rtol=1e-12, atol=0)
            probe.preprocessing = probe.preprocessing.sized(size)
            try:
                equal = torch.allclose(own(x), made(x), rtol=1e-9, atol=0)
            except RuntimeError:  # the padded image is smaller than a filter
                equal = False
        # Fingerprints differ from those of versions up to 0.2 where the numbers do, and only there.
        (right if " padded" not in probe.fingerprint() else wrong).append(size)
        assert equal == (right[-1:] == [size]), size
    assert PACKAGED_SIZES[name] in right
    assert {63, 100, 130} & set(wrong)


def test_the_size_of_the_input() -> None:
    probe, plain = load_probe(size=64), load_probe()
    assert (probe.preprocessing.resize, probe.preprocessing.crop) == (64, 64)
    assert plain.preprocessing.crop == 224
    assert probe.fingerprint() == plain.fingerprint()
    assert probe.features(torch.zeros(1, 3, 64, 64)).shape == (1, 1280)
    own = Preprocessing(12, 12, "bilinear", (0.5,) * 3, (0.25,) * 3)
    assert load_probe(preprocessing=own, size=40).preprocessing == own.sized(40)
    with pytest.raises(ValueError, match="crop is 0 and resize 0, expected 1 <= crop"):
        load_probe(size=0)


def test_a_size_that_a_network_cannot_run_on_is_refused() -> None:
    pytest.importorskip("torchvision", reason="this torch has no torchvision built for it")
    with (
        pytest.warns(UserWarning, match="random weights"),
        pytest.raises(ValueError, match=r"torchvision/vit_b_32 does not run on images of 96 x 96 pixels: .*height"),
    ):
        load_probe("torchvision/vit_b_32", "none", size=96)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "resnet18", "timm/resnet18"])
def test_probes_by_name(name: str) -> None:
    pytest.importorskip("torchvision", reason="this torch has no torchvision built for it")
    with pytest.warns(UserWarning, match="random weights"):
        probe = load_probe(name, weights="none")
    assert probe.head == "fc"
    assert probe.name == ("timm/resnet18" if name == "timm/resnet18" else "torchvision/resnet18")
    assert probe.preprocessing.crop == 224
    assert len(probe.embedding_parameters()) == 40


def test_weights_from_files(tmp_path: Path) -> None:
    packaged = load_probe()
    state = packaged.network.state_dict()
    torch.save(state, tmp_path / "w.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "checkpoint.pt")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    torch.save({**state, "_fc.weight": torch.zeros(3, 1280), "_fc.bias": torch.zeros(3)}, tmp_path / "head.pt")
    torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, tmp_path / "compiled.pt")
    torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, tmp_path / "both.pt")
    for file in ("w.pt", "checkpoint.pt", "w.safetensors", "head.pt", "compiled.pt", "both.pt"):
        assert load_probe(weights=tmp_path / file).fingerprint() == packaged.fingerprint(), file


def test_bad_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with pytest.raises(FileNotFoundError, match=r"no weights file .*w\.pt'"):
        load_probe(weights=path)
    with pytest.raises(FileNotFoundError, match="'imagenet': expected 'default', 'none' or a file"):
        load_probe(weights="imagenet")
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"w\.pt is no weights file"):
        load_probe(weights=path)
    (tmp_path / "w.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"w\.safetensors is no weights file"):
        load_probe(weights=tmp_path / "w.safetensors")
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="it holds list, expected a state dict"):
        load_probe(weights=path)
    torch.save(nn.Linear(2, 2), path)  # a pickled module would run code
    with pytest.raises(ValueError, match="is no weights file"):
        load_probe(weights=path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"does not fit 'efficientnet-lite0': it lacks _conv_stem\.weight.* more"):
        load_probe(weights=path)
    state = load_probe().network.state_dict()
    torch.save({**state, "_conv_stem.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"it has _conv_stem\.weight \[1\] instead of \[32, 3, 3, 3\]"):
        load_probe(weights=path)
    torch.save({**state, "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="it has besides extra"):
        load_probe(weights=path)


def test_unknown_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown probe 'hub/x': expected efficientnet-lite0, torchvision/NAME"):
        load_probe("hub/x")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        load_probe("timm/resnet18")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name in ("torchvision/resnet18", "resnet18"):
        with pytest.raises(ImportError, match="pip install torchvision"):
            load_probe(name)


def test_only_classifiers_are_probes() -> None:
    pytest.importorskip("torchvision", reason="this torch has no torchvision built for it")
    for name in ("fasterrcnn_resnet50_fpn", "raft_large"):
        with pytest.raises(ValueError, match="no such classifier in torchvision"):
            load_probe(f"torchvision/{name}", weights="none")


def test_a_failed_download_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models", reason="this torch has no torchvision built for it")

    def get_model(name: str, weights: object) -> None:
        raise TimeoutError("no route")

    monkeypatch.setattr(models, "get_model", get_model)
    with pytest.raises(RuntimeError, match=r"could not be had \(TimeoutError: no route\): pass a weights file"):
        load_probe("torchvision/resnet18")


class Attention(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.attention, self.rest = (
            nn.Conv2d(3, 8, 7, 7),
            nn.MultiheadAttention(8, 2),
            nn.Sequential(*layers),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).permute(2, 0, 1)
        return self.head(self.rest(self.attention(x, x, x)[0].mean(0)))


def test_weights_under_other_names_are_named() -> None:
    small = Preprocessing(resize=14, crop=14)
    with pytest.warns(
        UserWarning, match=r"probe Attention leaves out attention.in_proj_weight: .* `weight` of each module"
    ) as found:
        probe = Probe(Attention(), preprocessing=small)
    assert "remove_parametrizations" not in str(found[0].message)
    assert probe.embedding_parameters() == ["conv.weight", "attention.out_proj.weight"]
    normalised = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    with pytest.warns(
        UserWarning, match=r"in_proj_weight, rest\.0\.parametrizations\.weight\.original1: .*remove_param"
    ):
        Probe(Attention(normalised), preprocessing=small)
    network = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    with pytest.raises(
        ValueError, match=r"no weight is left .* 0\.parametrizations\.weight\.original1: .*remove_weight_norm"
    ):
        Probe(network, preprocessing=small)
    nn.utils.parametrize.remove_parametrizations(network[0], "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Probe(network, preprocessing=small).embedding_parameters() == ["0.weight"]
