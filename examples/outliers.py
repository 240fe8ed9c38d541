"""Search a data set for wrong labels by the gradient norm of each example.

    python examples/outliers.py

A network is trained on scikit-learn's handwritten digits, of which one in twenty has a wrong label. The examples with
the largest gradients are the suspects. gradient_norms visits every example once, and gives the norm of its gradient by
each parameter and by all of them. The loss is the baseline: it asks for no backward pass.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from t2v_fast import gradient_norms

WRONG = 90  # labels


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [N, 1, 8, 8]
    labels = torch.tensor(digits.target)  # [N]
    wrong = torch.randperm(len(labels))[:WRONG]
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (WRONG,))) % 10

    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 4 * 4, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(4):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()

    norms = gradient_norms(model, zip(images.split(256), labels.split(256), strict=True))  # {parameter: [N]}
    with torch.no_grad():
        loss = F.cross_entropy(model(images), labels, reduction="none")

    def precision(suspicion: Tensor, k: int) -> float:
        """The part of the k most suspicious examples whose label is wrong."""
        return float(torch.isin(suspicion.argsort(descending=True)[:k], wrong).float().mean())

    print(f"{WRONG} of {len(labels)} labels are wrong. Among the most suspicious:    30    60    90")
    scores = {
        "gradient norm of all parameters": norms.total,
        "gradient norm of the second convolution": norms["3.weight"],
        "gradient norm of the first batch norm": norms["1.weight"],
        "loss": loss,
    }
    for name, suspicion in scores.items():
        print(f"{name:55}", *(f"{precision(suspicion, k):5.2f}" for k in (30, 60, 90)))

    # The norms are those of plain autograd, one example at a time.
    first = int(norms.total.argmax())
    alone = F.cross_entropy(model(images[first : first + 1]), labels[first : first + 1])
    gradients = torch.autograd.grad(alone, list(model.parameters()))
    plain = float(torch.stack([g.norm() for g in gradients]).norm())
    print(f"largest gradient norm: {float(norms.total[first]):.4g}, by plain autograd {plain:.4g}")


if __name__ == "__main__":
    main()
