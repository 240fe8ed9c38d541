"""Networks of torchvision, the smallest of each family, at the smallest image that it accepts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .case import Case, Made, images

KIND = "torchvision"

SIZES = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32,
    "googlenet": 32, "inception_v3": 75, "maxvit_t": 64, "mnasnet0_5": 32, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "regnet_x_400mf": 32, "regnet_y_400mf": 32, "resnet18": 32, "resnet50": 32,
    "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 32, "swin_v2_t": 32, "vgg11": 32,
    "vgg11_bn": 32, "vit_b_32": 64, "wide_resnet50_2": 32,
}  # fmt: skip
VIDEOS = ("r3d_18", "mc3_18", "r2plus1d_18")


def build(name: str, size: int) -> Callable[[], Made]:
    def make() -> Made:
        from torchvision import models

        options = {"num_classes": 5, "weights": None}
        if name in ("googlenet", "inception_v3"):
            options |= {"init_weights": True, "aux_logits": False}
        elif name.startswith("vit"):
            options["image_size"] = size
        elif name == "maxvit_t":
            network = models.MaxVit(
                (size, size), stem_channels=16, partition_size=2, block_channels=[16, 32], block_layers=[1, 1],
                head_dim=8, stochastic_depth_prob=0.0, num_classes=5,
            )  # fmt: skip
            return network, images(size)
        return getattr(models, name)(**options), images(size)

    return make


def build_video(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from torchvision.models import video

        return getattr(video, name)(num_classes=5), [torch.randn(n, 3, 4, 16, 16) for n in (3, 2)]

    return make


CASES = [
    *(Case(KIND, name, build(name, size)) for name, size in SIZES.items()),
    *(Case(KIND, name, build_video(name)) for name in VIDEOS),
]
