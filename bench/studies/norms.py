"""Whether a batch norm's gradient may be taken from the product of the convolution before it.

    python -m bench.studies.norms

For a norm z = gamma (y - mean) rstd + beta behind a convolution y = W u + b, the weight's gradient is
sum_s g_s (y_s - mean) rstd = rstd (<W_o, G_o> - (mean - b) sum_s g_s) with G_o = sum_s g_s u_s. The right side needs no
pass over y. This script compares the errors of the squares of both sides against float64, for every norm of a ResNet-18
whose statistics are those of its inputs, and prints Markdown.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from bench.pages import markdown


def rounded(t: Tensor, kind: str) -> Tensor:
    """The values as a product takes them."""
    if kind == "bfloat16":
        return t.bfloat16().double()
    if kind == "TF32":
        bits = t.float().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()
    return t.float().double()


def errors(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, y: Tensor, g: Tensor, kind: str) -> tuple[Tensor, ...]:
    """Relative errors of the squares [N, O] for the pass over y, and for the product. Inputs are float64."""
    rstd = (norm.running_var + norm.eps).rsqrt()
    stored = (lambda t: t.bfloat16().double()) if kind == "bfloat16" else (lambda t: t.float().double())
    x, y, g = stored(x), stored(y), stored(g)  # as the network stores them
    u = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    w, s = stored(conv.weight).flatten(1), g.flatten(2)
    exact = torch.einsum("nop,ndp->nod", s, u)
    sums = s.sum(2)
    truth = (rstd * (torch.einsum("od,nod->no", w, exact) - norm.running_mean * sums)).square()
    passed = (rstd.float() * (s.float() * (y - norm.running_mean[:, None, None]).float().flatten(2)).sum(2)).square()
    G = torch.einsum("nop,ndp->nod", rounded(s, kind).float(), rounded(u, kind).float())
    of_product = torch.einsum("od,nod->no", w.float(), G) - norm.running_mean.float() * sums.float()
    product = (rstd.float() * of_product).square()
    scale = truth.mean(0, keepdim=True).clamp_min(1e-300)  # the entry of an embedding: the mean over examples
    return tuple(((found.double().mean(0) - truth.mean(0)).abs() / scale[0]) for found in (passed, product))


def main() -> None:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10).double()
    images = F.interpolate(torch.randn(32, 3, 12, 12), size=64, mode="bilinear").double() + torch.randn(32, 3, 1, 1)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
    network.train()(images)
    network.eval()
    seen: list[list[Tensor]] = []
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        kept[module] = (inputs[0], output)

    kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    handles = [m.register_forward_hook(keep) for m in (*convs, *norms)]
    logits = network(images[:8])
    (logits * torch.randn_like(logits)).sum().backward()
    for handle in handles:
        handle.remove()
    rows = [["products", "pass over y: median", "worst entry", "from the product: median", "worst entry"]]
    for kind in ("float32", "TF32", "bfloat16"):
        seen = [[], []]
        for conv in convs:
            x, y = (t.detach() for t in kept[conv])
            norm = next(n for n in norms if kept[n][0] is kept[conv][1])
            with torch.no_grad():
                for place, error in zip(seen, errors(conv, norm, x, y, kept[norm][1].grad, kind), strict=True):
                    place.append(error)
        both = [torch.cat(place) for place in seen]
        rows.append([kind, *(f"{v:.0e}" for e in both for v in (e.median(), e.max()))])
    print(markdown(rows))


if __name__ == "__main__":
    main()
