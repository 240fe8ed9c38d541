"""Architectures of torchvision, timm and transformers against per-example autograd in float64; writes docs/coverage.md.

Random weights, random norm statistics, three examples of the smallest input that the network takes.
"""

from __future__ import annotations

import collections
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from oracle import beside_itself, randomise_norms
from torch import Tensor, nn

from t2v_fast import FisherRecorder, UnsupportedError
from t2v_fast.factors import Factors
from t2v_fast.graph import Use

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
TOLERANCE = 1e-9

# The smallest network of each family, and the smallest image that it takes.
TORCHVISION = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32,
    "googlenet": 32, "inception_v3": 75, "maxvit_t": 64, "mnasnet0_5": 32, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "regnet_x_400mf": 32, "regnet_y_400mf": 32, "resnet18": 32, "resnet50": 32,
    "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 32, "swin_v2_t": 32, "vgg11": 32,
    "vgg11_bn": 32, "vit_b_32": 64, "wide_resnet50_2": 32,
}  # fmt: skip

TIMM = {
    "convmixer_768_32": 32, "test_convnext": 32, "cpubone_nano": 32, "crossvit_tiny_240": 32, "csatv2": 64,
    "cs3darknet_focus_s": 32, "cspnext_tiny": 32, "davit_tiny": 32, "densenet121": 32, "dla46x_c": 32, "dpn48b": 32,
    "edgenext_xx_small": 32, "test_efficientnet": 32, "efficientvim_m1": 32, "efficientvit_b0": 32, "fasternet_t0":
    32, "fastvit_t8": 32, "focalnet_tiny_srf": 32, "ghostnet_050": 32, "hardcorenas_b": 32, "hgnetv2_b0": 32,
    "sam2_hiera_tiny": 32, "hrnet_w18_small": 32, "iformer_t": 32, "inception_next_atto": 32, "inception_v3": 96,
    "lcnetv2_small": 32, "lowformer_b0": 32, "test_mambaout": 32, "poolformerv2_s12": 32, "lcnet_035": 32,
    "nextvit_small": 32, "test_nfnet": 32, "pvt_v2_b0": 32, "rdnet_tiny": 32, "regnetx_002": 32, "repghostnet_050":
    32, "res2next50": 32, "resnest14d": 32, "test_resnet": 32, "resnetv2_18": 32, "rexnet_100": 32, "selecsls42": 32,
    "legacy_seresnet18": 32, "shvit_s1": 32, "skresnet18": 32, "starnet_s050": 32, "tiny_vit_5m_224": 32, "tresnet_m":
    32, "ese_vovnet19b_slim_dw": 32, "legacy_xception": 32, "xception41p": 32,
}  # fmt: skip
TIMM_SIZED = {  # built for a size of image
    "halonet_h1": 256, "test_byobnet": 32, "cait_xxs24_224": 32, "coat_tiny": 32, "convit_tiny": 32,
    "deit_tiny_patch16_224": 32, "efficientformer_l1": 224, "efficientformerv2_s0": 32, "efficientvit_m0": 32,
    "vit_tiny_patch16_dinov3_qkvb": 32, "gcvit_xxtiny": 32, "hiera_tiny_224": 32, "levit_128s": 32, "test_coatnet":
    32, "gmlp_ti16_224": 32, "mobilevit_xxs": 32, "mvitv2_tiny": 32, "nest_tiny": 32, "pit_ti_224": 32, "repvit_m1":
    32, "sequencer2d_s": 32, "swiftformer_xs": 32, "swin_tiny_patch4_window7_224": 32, "swinv2_tiny_window16_256": 32,
    "swinv2_cr_tiny_224": 32, "tnt_s_legacy_patch16_224": 32, "twins_svt_small": 32, "visformer_tiny": 32, "test_vit":
    32, "vit_tiny_r_s16_p8_224": 32, "test_vit_relpos": 32, "vitamin_small_224": 32, "volo_d1_224": 32,
    "xcit_nano_12_p8_224": 32,
}  # fmt: skip


def torchvision_network(name: str, size: int) -> nn.Module:
    from torchvision import models

    options = {"num_classes": 5, "weights": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": True, "aux_logits": False}
    elif name == "maxvit_t":
        options |= {"input_size": (size, size), "partition_size": 2}
        del options["weights"], options["num_classes"]
        return models.MaxVit(
            stem_channels=16, block_channels=[16, 32], block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0,
            num_classes=5, **options,
        )  # fmt: skip
    elif name.startswith("vit"):
        options["image_size"] = size
    return getattr(models, name)(**options)


def varied(network: nn.Module) -> nn.Module:
    """Every parameter away from where initialisation makes gradients vanish: no constant norms, scales and heads."""
    randomise_norms(network)
    with torch.no_grad():
        for p in network.parameters():
            if p.numel() > 1 and p.std() < 1e-3:
                p.copy_(p.mean() + 0.1 * torch.randn(p.shape))
    return network.double().eval()


def timm_network(name: str, size: int) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=5, **({"img_size": size} if name in TIMM_SIZED else {}))


class Logits(nn.Module):
    """A network of transformers, from token numbers to its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(input_ids=x).logits


def transformers_network(name: str, size: int) -> nn.Module:
    import transformers

    small = {"vocab_size": 60, "attn_implementation": "eager" if name.endswith("eager") else "sdpa"}
    if name.startswith("gpt2"):
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=size, **small)
        return Logits(transformers.GPT2LMHeadModel(config))
    width = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if name.startswith("bert"):
        config = transformers.BertConfig(max_position_embeddings=size, num_labels=5, **width, **small)
        return Logits(transformers.BertForSequenceClassification(config))
    config = transformers.LlamaConfig(max_position_embeddings=size, num_key_value_heads=2, **width, **small)
    return Logits(transformers.LlamaForCausalLM(config))


TRANSFORMERS = dict.fromkeys(("gpt2", "gpt2_eager", "bert", "bert_eager", "llama"), 12)  # tokens

ARCHITECTURES = {
    **{("torchvision", name): size for name, size in TORCHVISION.items()},
    **{("timm", name): size for name, size in sorted({**TIMM, **TIMM_SIZED}.items())},
    **{("transformers", name): size for name, size in TRANSFORMERS.items()},
}
NETWORKS = {"torchvision": torchvision_network, "timm": timm_network, "transformers": transformers_network}


@dataclass
class Row:
    """What became of one architecture."""

    library: str
    name: str
    size: int
    numbers: int  # of all parameters
    tensors: int
    by_rules: int = 0  # parameters
    reason: str = ""  # why the others are not
    error: float = float("nan")
    paths: dict[str, collections.Counter] = field(default_factory=dict)

    @property
    def result(self) -> str:
        if not self.error < TOLERANCE:
            return f"refused: {self.reason}" if self.reason else f"**differs by {self.error:.1e}**"
        by_request = self.tensors - self.by_rules
        return "agrees" if not by_request else f'agrees, {by_request} by `unsupported="exact"`: {self.reason}'


ROWS: dict[tuple[str, str], Row] = {}


def filter_means(network: nn.Module, x: Tensor, u: Tensor) -> dict[str, Tensor]:
    """{name: [N, O]} by plain autograd, an example at a time."""
    squares = collections.defaultdict(list)
    for n in range(len(x)):
        output = network(beside_itself(x, n))[:1]
        gradients = torch.autograd.grad(
            output, list(network.parameters()), u[n : n + 1], allow_unused=True, materialize_grads=True
        )
        for (name, _), g in zip(network.named_parameters(), gradients, strict=True):
            squares[name].append(g.square().reshape(max(g.shape[:1], default=1), -1).mean(1))
    return {name: torch.stack(each) for name, each in squares.items()}


def fused(row: Row, network: nn.Module, x: Tensor, u: Tensor, unsupported: str) -> dict[str, Tensor]:
    """The same by the library; notes the paths in ``row``."""
    row.paths = collections.defaultdict(collections.Counter)

    def observe(use: Use, factors: Factors, cotangents: int, start: float, end: float) -> None:
        row.paths[use.node.name().removesuffix("0").removesuffix("Backward")][factors.work(cotangents)[0]] += 1

    with torch.enable_grad(), FisherRecorder(network, unsupported=unsupported) as recorder:
        recorder.observer = observe
        return recorder.backward(network(x), u)


@pytest.mark.parametrize(
    ("library", "name"), ARCHITECTURES, ids=[f"{library}-{name}" for library, name in ARCHITECTURES]
)
def test_agrees_with_per_example_autograd(library: str, name: str) -> None:
    pytest.importorskip(library, reason="beside this torch it cannot be had")
    torch.manual_seed(0)
    size = ARCHITECTURES[library, name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        network = varied(NETWORKS[library](name, size))
    x = torch.randint(0, 60, (3, size)) if library == "transformers" else torch.randn(3, 3, size, size).double()
    parameters = dict(network.named_parameters())
    row = Row(library, name, size, sum(p.numel() for p in parameters.values()), len(parameters))
    with torch.no_grad():
        u = torch.randn(network(x).shape, dtype=torch.float64)
    want = filter_means(network, x, u)
    try:
        got = fused(row, network, x, u, "error")
        row.by_rules = len(got)
    except UnsupportedError as error:
        row.reason = str(error).split(";")[0].removeprefix("the parameter ").split(" (rules are known")[0]
        got = {}
    try:
        if not got:
            row.by_rules = len(fused(row, network, x, u, "skip"))
            got = fused(row, network, x, u, "exact")
        # Relative to the whole, so that rounding in a parameter without influence does not count.
        scale = sum(float(w.square().sum()) for w in want.values()) ** 0.5
        row.error = max(float((got[name] - w).norm()) / max(float(w.norm()), 1e-12 * scale) for name, w in want.items())
    except UnsupportedError as error:
        row.reason = str(error)
    ROWS[library, name] = row
    assert row.error < TOLERANCE or row.reason, f"differs by {row.error:.1e}"


def test_nearly_all_agree_for_all_weights() -> None:
    """Runs last, and writes the page where all of the above have run."""
    agree = [row for row in ROWS.values() if row.error < TOLERANCE]
    assert len(agree) >= 0.95 * len(ROWS)
    if len(ROWS) == len(ARCHITECTURES):
        PAGE.write_text(page())


def page() -> str:
    rows = list(ROWS.values())
    agree = [row for row in rows if row.error < TOLERANCE]
    by_rules = [row for row in agree if row.by_rules == row.tensors]
    lines = [
        "# Coverage",
        "",
        "Written by `make slow` (`tests/test_coverage.py`). Random weights and norm statistics, float64, three "
        "examples of the smallest input that the network takes; the per-example filter means of every parameter are "
        f"compared with plain autograd, an example at a time, and must agree to {TOLERANCE:.0e} relative.",
        "",
        f"{len(rows)} architectures: {len(agree)} agree for all weights, {len(by_rules)} of them by rules alone. The "
        'others ask for `unsupported="exact"`, which forms the gradients of the layers concerned.',
        "",
        "| library | architecture | input | parameters | largest error | layers and paths | result |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        paths = ", ".join(
            f"{kind} {' '.join(f'{path} {count}' for path, count in sorted(paths.items()))}"
            for kind, paths in sorted(row.paths.items())
        )
        lines.append(
            f"| {row.library} | {row.name} | {row.size} | {row.numbers:,} in {row.tensors} | {row.error:.0e} | {paths} "
            f"| {row.result} |"
        )
    return "\n".join(lines) + "\n"
