"""The diagonal Fisher information of a small network, in ten lines.

    python examples/fisher_in_ten_lines.py

The Fisher says how much each weight matters to the network's predictions. The data are handwritten digits from
scikit-learn.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import t2v_fast


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [N, 1, 8, 8]
    labels = torch.tensor(digits.target)  # [N]
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):  # a little training, so that the network has opinions
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    # The Fisher. "exact" uses one backward pass for each class but one; "deflated", the default, uses two.
    loader = DataLoader(TensorDataset(images, labels), batch_size=256)
    exact = t2v_fast.fisher(model, loader, estimator="exact")
    fast = t2v_fast.fisher(model, loader)

    print("parameter   filters   mean Fisher")
    for name, values in exact.items():  # one value for each filter: the mean over the filter's weights
        print(f"{name:10}  {len(values):7}   {values.mean():.2e}")
    filters = exact["0.weight"]
    print(f"the filter that matters most: {int(filters.argmax())}")
    error = (fast.vector() - exact.vector()).norm() / exact.vector().norm()
    print(f"relative error of the default estimator: {error:.3f}")


if __name__ == "__main__":
    main()
